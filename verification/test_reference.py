"""The reference in rationals: against mpmath's decision points, and worked examples."""

from fractions import Fraction

import mpmath
import numpy as np
import pytest

from formats import float_format, list_formats, round_exact
from verification import oracle

UP_TO_10_BITS = [name for name in list_formats("float") if float_format(name).bits <= 10]
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


def test_unknown_modes_are_refused() -> None:
    with pytest.raises(ValueError, match="rounding must be one of nearest_even, toward_zero, got 'stochastic'"):
        round_exact(1, "e4m3", rounding="stochastic")
    with pytest.raises(ValueError, match="overflow must be one of saturate, got 'propagate'"):
        round_exact(1, "e4m3", overflow="propagate")
