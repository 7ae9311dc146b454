"""FP64 and FP32 inputs by what a rounding can see of them: sign, exponent, kept bits, guard and sticky.

A result depends on x = ± 1.m × 2^e by its sign, its exponent, the bits of its significand that some value of the format in
that binade has, the one bit after them (guard), and whether anything follows (sticky): deterministic modes compare what is
dropped with zero and with half a quantum, and with nothing else. A format of M mantissa bits keeps M of them at most, in
subnormals fewer (and one more for each binade that it reaches into the carrier's subnormals), so the first M + 1 bits and one
bit for all the rest say everything. That leaves few enough classes to enumerate all: 2 signs × 2046 exponents × 2^(M+1) × 2
for FP64, where all inputs would be 2^64.

    every class is enumerated      each against the oracle, with three inputs for sticky = 1: the least, the largest, one between
    inputs of a class are alike    any input, from Hypothesis, gives what its class gives

The second is what the steps do: `formats.bitwise` says where they look.
"""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from formats import ElementFormat, FloatFormat, GridFormat, element_format, float_format, quantize
from formats.names import well_known
from formats.rounding import DETERMINISTIC
from verification.elements import find_wrong
from verification.points import CARRIERS, from_codes
from verification.question import Question

Codes = npt.NDArray[np.int64]
DTYPES = [torch.float64, torch.float32]
NARROW = [
    f
    for f in map(element_format, (n for n in well_known() if "@" not in n and not n.startswith(("mx", "nv"))))
    if f.bits <= 8 and not isinstance(f, GridFormat)
] + [element_format(name) for name in ("binary8p3se", "binary8p4uf", "binary8p1sf", "e3m2-nosub", "int2", "e5m2b8fnuz")]
WIDER = [element_format(name) for name in ("bf16", "fp16", "binary12p5se", "int12")]


def seen_bits(f: ElementFormat, carrier: FloatFormat) -> int:
    """How many mantissa bits of the carrier can be kept bits or guard.

    Among the carrier's subnormals the leading one takes a mantissa bit itself, one lower with each binade: of e8m0fnu's values
    2^-127 is an FP32 subnormal, with its guard in the second bit.
    """
    kept = f.mantissa_bits if isinstance(f, FloatFormat) else f.bits - 1
    lower = max(carrier.emin - f.emin, 0) if isinstance(f, FloatFormat) else 0
    return min(kept + lower + 1, carrier.mantissa_bits)


def class_of(codes: Codes, mantissa: int, seen: int) -> Codes:
    """The bits that a rounding sees: what is above the sticky bits, then whether these are other than 0."""
    rest = mantissa - seen
    return np.asarray((codes >> rest) << 1 | ((codes & ((1 << rest) - 1)) != 0), np.int64)


def members(classes: Codes, mantissa: int, seen: int) -> list[Codes]:
    """Inputs of each class: the least, the largest and one between, which are the same where sticky is 0."""
    rest = mantissa - seen
    base, sticky = classes >> 1 << rest, classes & 1
    if not rest:
        return [base[sticky == 0]]
    return [base | sticky, base | sticky * ((1 << rest) - 1), base | sticky * ((1 << rest) // 3 | 1)]


def every_class(f: ElementFormat, dtype: torch.dtype) -> tuple[Codes, int, int]:
    """All classes of non-negative finite inputs; the carrier's subnormals, which have no leading one, by all their seen bits."""
    carrier = float_format(CARRIERS[dtype])
    seen = seen_bits(f, carrier)
    exponents = (1 << carrier.exponent_bits) - 1
    return np.arange(exponents << (seen + 1)), carrier.mantissa_bits, seen


def check(f: ElementFormat, dtype: torch.dtype) -> None:
    classes, mantissa, seen = every_class(f, dtype)
    for codes in members(classes, mantissa, seen):
        assert np.array_equal(class_of(codes, mantissa, seen), classes[: len(codes)] if seen < mantissa else codes << 1)
        for negative in (False, True):
            x = from_codes(codes, dtype)
            x = -x if negative else x
            for rounding in DETERMINISTIC:
                wrong = find_wrong(Question(f, rounding), x, quantize(x, f, rounding))
                assert not len(wrong), (f, rounding, float(x[wrong[0]]).hex())


CASES = [(f, dtype) for dtype in DTYPES for f in NARROW if float_format(CARRIERS[dtype]).holds(f)]
LONG = [(f, dtype) for dtype in DTYPES for f in WIDER if float_format(CARRIERS[dtype]).holds(f)]


SHORT = [
    (f, dtype) for f, dtype in CASES if dtype == torch.float32 or f.name in ("e4m3fn", "e8m0fnu", "e2m1fn", "int2")
]


@pytest.mark.parametrize(("f", "dtype"), SHORT, ids=str)
def test_every_class_comes_out_right(f: ElementFormat, dtype: torch.dtype) -> None:
    check(f, dtype)


@pytest.mark.proof
@pytest.mark.parametrize(("f", "dtype"), CASES + LONG, ids=str)
def test_every_class_comes_out_right_in_all_formats(f: ElementFormat, dtype: torch.dtype) -> None:
    check(f, dtype)


@given(
    st.sampled_from(CASES), st.integers(0, 2**63 - 1), st.sampled_from([m.value for m in DETERMINISTIC]), st.booleans()
)
@example((element_format("e8m0fnu"), torch.float32), 0x400001 << 32, "nearest_even", False)
def test_inputs_of_one_class_are_alike(
    case: tuple[ElementFormat, torch.dtype], code: int, rounding: str, negative: bool
) -> None:
    f, dtype = case
    carrier = float_format(CARRIERS[dtype])
    mantissa, seen = carrier.mantissa_bits, seen_bits(f, carrier)
    codes = np.array([code >> (64 - carrier.bits)]) % (((1 << carrier.exponent_bits) - 1) << mantissa)
    of_class = [codes, *members(class_of(codes, mantissa, seen), mantissa, seen)]
    x = from_codes(np.concatenate(of_class), dtype)
    got = quantize(-x if negative else x, f, rounding)
    assert (got == got[0]).all() or got.isnan().all()
