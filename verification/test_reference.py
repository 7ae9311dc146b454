"""The reference in rationals: against mpmath's decision points, and worked examples."""

import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch

from formats import Overflow, float_format, list_formats, round_exact
from formats.rounding import DETERMINISTIC, Rounding
from verification import oracle
from verification.points import decision_inputs
from verification.test_conditional import EVERY, FP64

OVERFLOWS = list(Overflow)
UP_TO_10_BITS = [
    name for name in list_formats("float") if (f := float_format(name)).bits <= 10 and f.has_negative_zero and f.zero
]
SMALL = [f for f in EVERY if f.bits <= 7 and FP64.holds(f)]
JUST = Fraction(1, 10**30)


@pytest.mark.parametrize("rounding", ["nearest_even", "toward_zero"])
@pytest.mark.parametrize("name", UP_TO_10_BITS)
def test_reference_steps_where_mpmath_says(name: str, rounding: str) -> None:
    f = float_format(name)
    grid = oracle.values(f)
    for code, step in enumerate(oracle.decision_points(f, rounding)):
        exact, low, high = Fraction(float(step)), Fraction(grid[code]), Fraction(grid[code + 1])
        up_at_step = rounding == "toward_zero" or code % 2 == 1
        assert round_exact(exact * (1 - JUST), f, rounding) == low
        assert round_exact(exact, f, rounding) == (high if up_at_step else low)
        assert round_exact(exact * (1 + JUST), f, rounding) == high
        assert round_exact(-exact * (1 + JUST), f, rounding) == -high


def test_every_kind_of_number_goes_in_without_passing_through_a_float() -> None:
    f = float_format("e4m3fn")
    assert round_exact(17 + 10**0, f) == 18
    assert round_exact(17, f) == 16  # a tie
    assert round_exact(17 + Fraction(1, 10**40), f) == 18
    with mpmath.workprec(200):
        assert round_exact(17 + mpmath.mpf(2) ** -150, f) == 18
        assert round_exact(-17 - mpmath.mpf(2) ** -150, f) == -18
    assert round_exact(10**400, f) == 448
    assert round_exact(-(10**400), f) == -448
    assert round_exact(np.float64(17), f) == 16
    with pytest.raises(TypeError, match=r"x must be an int, float, Fraction or mpmath.mpf, got str"):
        round_exact("17", f)


def test_zeros_infinities_and_nan() -> None:
    f = float_format("e4m3fn")
    for negative in (-0.0, -1e-300, Fraction(-1, 10**400), mpmath.mpf(-1) / 10**9):
        assert str(round_exact(negative, f)) == "-0.0"
    for positive in (0, 0.0, 1e-300, Fraction(1, 10**400), mpmath.mpf(0)):
        assert str(round_exact(positive, f)) == "0"
    for inf in (float("inf"), mpmath.inf):
        assert round_exact(inf, f) == 448
        assert round_exact(-inf, f, "toward_zero") == -448
        assert round_exact(inf, "e5m2") == 57344
    assert str(round_exact(float("nan"), f)) == str(round_exact(mpmath.nan, f)) == "nan"
    with pytest.raises(ValueError, match="e2m1fn has no NaN"):
        round_exact(float("nan"), "e2m1fn")


def test_without_mantissa_bits_even_is_the_codes_parity() -> None:
    # e3m0f: codes 0 1 2 3 4 ... are 0 1/4 1/2 1 2 4 8 16.
    ties = {
        Fraction(1, 8): 0,
        Fraction(3, 8): Fraction(1, 2),
        Fraction(3, 4): Fraction(1, 2),
        Fraction(3, 2): 2,
        3: 2,
        6: 8,
        12: 8,
    }
    for tie, even in ties.items():
        assert round_exact(tie, "e3m0f") == even


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.proof)], ids=["a third", "every"])
@pytest.mark.parametrize("overflow", OVERFLOWS)
@pytest.mark.parametrize("rounding", DETERMINISTIC)
def test_reference_agrees_with_the_oracle(rounding: str, overflow: str, every: bool) -> None:
    """Every mode and every small format, at the FP64 decision points: two implementations that share nothing.

    In CI a third of the formats by each pair of modes, each format by a third of the pairs.
    """
    third = (DETERMINISTIC.index(Rounding(rounding)) + OVERFLOWS.index(Overflow(overflow))) % 3
    for f in SMALL if every else SMALL[third::3]:
        if overflow == Overflow.NONSATURATING and not (f.has_inf or f.has_nan):
            continue
        x = decision_inputs(f, torch.float64, 40).numpy()
        x = x[~np.isnan(x)]
        want = oracle.expected(f, rounding, x, overflow)
        got = np.array([float(round_exact(float(v), f, rounding, overflow)) for v in x])
        np.testing.assert_array_equal(got, want, err_msg=f.name)
        np.testing.assert_array_equal(
            np.signbit(got) & ~np.isnan(got), np.signbit(want) & ~np.isnan(want), err_msg=f.name
        )


# P3109 4.0, 4.7.5: the table of SatNone, row by row, by hand.
SAT_NONE = [
    ("binary8p4se", "nearest_even", math.inf, math.inf),
    ("binary8p4se", "nearest_even", 1000, math.inf),
    ("binary8p4se", "toward_zero", 1000, 224),
    ("binary8p4se", "toward_zero", math.inf, math.inf),
    ("binary8p4se", "to_odd", 1000, math.inf),
    ("binary8p4se", "toward_positive", -1000, -224),
    ("binary8p4se", "toward_negative", -1000, -math.inf),
    ("binary8p4sf", "nearest_even", 1000, 240),
    ("binary8p4sf", "nearest_even", -math.inf, -240),
    ("binary8p4ue", "to_odd", 1e9, 53248),
    ("binary8p4ue", "nearest_even", 1e9, math.inf),
    ("binary8p4ue", "nearest_even", -1, math.nan),
    ("binary8p4ue", "toward_zero", -1, 0),
    ("binary8p4ue", "nearest_even", -1e-9, 0),
    ("binary8p4ue", "toward_negative", -1e-9, math.nan),
    ("binary8p4uf", "nearest_even", -math.inf, math.nan),
    ("binary8p4uf", "nearest_even", math.inf, 57344),
]


@pytest.mark.parametrize(("name", "rounding", "x", "want"), SAT_NONE)
def test_sat_none_is_the_standards_table(name: str, rounding: str, x: float, want: float) -> None:
    got = float(round_exact(x, name, rounding, "sat_none"))
    assert got == want or (math.isnan(got) and math.isnan(want))


@pytest.mark.parametrize("bits", range(1, 7))
@pytest.mark.parametrize("rounding", ["stochastic_a", "stochastic_b", "stochastic_c"])
def test_stochastic_rounding_is_the_standards_inequality(rounding: str, bits: int) -> None:
    """Counting the R that go away, for every share of a finer grid: floor, half up and half to even of d 2^N."""
    shares = [Fraction(k, 2 ** (bits + 3)) for k in range(2 ** (bits + 3))]
    for share in shares:
        away = sum(
            round_exact(1 + share, "int8", rounding, random_bits=r, stochastic_bits=bits) == 2 for r in range(2**bits)
        )
        exact = share * 2**bits
        want = {
            "stochastic_a": math.floor(exact),
            "stochastic_b": math.floor(exact + Fraction(1, 2)),
            "stochastic_c": round(exact),
        }[rounding]
        assert away == want, share


def test_unknown_modes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rounding must be one of nearest_even, .*, got 'up'"):
        round_exact(1, "e4m3", rounding="up")
    with pytest.raises(ValueError, match=r"overflow must be one of saturate, propagate, .*, got 'wrap'"):
        round_exact(1, "e4m3", overflow="wrap")
    with pytest.raises(ValueError, match="e2m1fn has neither inf nor NaN to overflow to"):
        round_exact(1, "e2m1fn", overflow="nonsaturating")
    with pytest.raises(ValueError, match=r"stochastic_c needs random_bits, an integer in 0..2\^23 - 1, got None"):
        round_exact(1, "e4m3", "stochastic")
    with pytest.raises(ValueError, match=r"random_bits, an integer in 0..2\^4 - 1, got 16"):
        round_exact(1, "e4m3", "stochastic", random_bits=16, stochastic_bits=4)
    with pytest.raises(ValueError, match=r"stochastic_bits must be 1..32, got 33"):
        round_exact(1, "e4m3", "stochastic", random_bits=16, stochastic_bits=33)
