"""Every code of every format decodes to what mpmath computes from the definition, and encodes back."""

from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from formats import (
    ElementFormat,
    FloatFormat,
    GridFormat,
    Overflow,
    Rounding,
    element_format,
    float_format,
    round_exact,
)
from verification import oracle
from verification.strategies import doubles_beside, formats
from verification.test_conditional import EVERY, FP64, IN_CI

HELD = [f for f in EVERY if not isinstance(f, FloatFormat) or FP64.holds(f)]


def cases(formats: Iterable[ElementFormat]) -> list[Any]:
    """These formats, those that are not in CI as proofs."""
    in_ci = set(IN_CI)
    return [f if f in in_ci else pytest.param(f, marks=pytest.mark.proof) for f in formats]


@pytest.mark.parametrize("f", cases(f for f in HELD if f.bits <= 13 or f.name in ("bf16", "fp16", "int16")), ids=str)
def test_every_code_decodes_to_its_definition(f: ElementFormat) -> None:
    decoded = f.decode(np.arange(2**f.bits)) if not isinstance(f, GridFormat) else f.decode(f.finite_codes)
    codes = range(2**f.bits) if not isinstance(f, GridFormat) else f.finite_codes.tolist()
    defined = np.array([float(oracle.value(f, code)) for code in codes])
    np.testing.assert_array_equal(decoded, defined)
    zero = decoded == 0
    if isinstance(f, FloatFormat) and f.zero:
        assert np.flatnonzero(zero).tolist() == ([0, 2 ** (f.bits - 1)] if f.has_negative_zero else [0])
        assert np.signbit(decoded[zero]).tolist() == ([False, True] if f.has_negative_zero else [False])


@pytest.mark.parametrize("f", cases(HELD), ids=str)
def test_grid_is_every_finite_value_once(f: ElementFormat) -> None:
    grid = f.grid()
    np.testing.assert_array_equal(grid, oracle.finite_values(f))
    assert not np.signbit(grid[grid == 0]).any()
    assert (f.min, f.max) == (grid[0], grid[-1])


@pytest.mark.parametrize("f", cases(HELD), ids=str)
def test_encode_undoes_decode(f: ElementFormat) -> None:
    codes = np.arange(2**f.bits) if not isinstance(f, GridFormat) else f.finite_codes
    values = f.decode(codes)
    finite = np.isfinite(values)
    encoded = f.encode(values[finite])
    assert encoded.dtype == (np.uint8 if f.bits <= 8 else np.uint16)
    np.testing.assert_array_equal(encoded, codes[finite])
    if f.has_nan:
        assert set(f.encode(values[np.isnan(values)])) <= {f.nan_code}
        assert np.isnan(f.decode(f.nan_code or 0))
    if f.has_inf:
        infinite = np.isinf(values)
        np.testing.assert_array_equal(f.encode(values[infinite], overflow="propagate"), codes[infinite])


@pytest.mark.parametrize("bits", range(3, 17))
def test_posits_are_what_their_bits_say(bits: int) -> None:
    """By the standard's own words for a bit string, in mpmath: useed ** regime * 2 ** exponent * (1 + fraction)."""
    f = element_format(f"posit{bits}")
    for code in range(1, 2 ** (bits - 1), 1 if bits < 13 else 37):
        assert f.decode_exact(code) == Fraction(*mpmath.libmp.to_rational(posit(code, bits)._mpf_))
        assert f.decode_exact(2**bits - code) == -f.decode_exact(code)
    assert f.decode_exact(0) == 0
    assert np.isnan(float(f.decode_exact(2 ** (bits - 1))))


def posit(code: int, bits: int) -> mpmath.mpf:
    """A positive posit with es = 2, a bit at a time."""
    at = bits - 2
    first = code >> at & 1
    run = 0
    while at >= 0 and code >> at & 1 == first:
        run, at = run + 1, at - 1
    at -= 1
    exponent, scale, fraction = 0, 2, mpmath.mpf(1)
    for weight in (2, 1):
        exponent += weight * (code >> at & 1) if at >= 0 else 0
        at -= 1
    while at >= 0:
        fraction += mpmath.mpf(code >> at & 1) / scale
        at, scale = at - 1, scale * 2
    with mpmath.workprec(100):
        return mpmath.mpf(16) ** (run - 1 if first else -run) * mpmath.mpf(2) ** exponent * fraction


@pytest.mark.parametrize(
    ("bits", "fraction_bits"), [(8, 3), (6, 2), (5, 0), (12, 4), pytest.param(16, 9, marks=pytest.mark.proof)]
)
def test_logarithmic_numbers_are_the_nearest_in_fp32(bits: int, fraction_bits: int) -> None:
    f = element_format(f"lns{bits}q{fraction_bits}")
    for code in range(1, 2 ** (bits - 1), 1 if bits <= 8 else 53):
        with mpmath.workprec(200):
            exact = mpmath.mpf(2) ** (mpmath.mpf(code - 2 ** (bits - 2)) / 2**fraction_bits)
            near = np.float32(float(mpmath.nstr(exact, 30)))
            around = (np.nextafter(near, np.float32(0)), near, np.nextafter(near, np.float32(np.inf)))
            errors = [abs(mpmath.mpf(float(n)) - exact) for n in around]
        assert float(f.decode_exact(code)) == float(near)
        assert errors[1] == min(errors)


def test_nf4_is_the_papers_quantiles() -> None:
    """QLoRA, appendix E: 8 + 9 quantiles of the normal distribution between 0.9677 and 1 - 0.9677, one zero, scaled to 1."""
    offset = 0.9677083
    positive = norm.ppf(np.linspace(offset, 0.5, 9))[:-1]
    negative = -norm.ppf(np.linspace(offset, 0.5, 8))[:-1]
    values = np.sort(np.concatenate([positive, [0.0], negative])) / positive.max()
    np.testing.assert_allclose(element_format("nf4").grid(), values, atol=1e-6)


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e2m1fn", "e3m0f", "e1m0f", "e8m2"])
def test_one_exact_code_is_a_fraction_where_it_can_be(name: str) -> None:
    f = float_format(name)
    for code in range(2**f.bits):
        exact, defined = f.decode_exact(code), oracle.value(f, code)
        assert float(exact) == float(defined) or mpmath.isnan(defined)
        assert str(float(exact)) == str(float(f.decode(code)))  # the sign of zero too
        assert isinstance(exact, float) == (not mpmath.isfinite(defined) or code == 2 ** (f.bits - 1))


@given(
    st.data(),
    st.sampled_from(EVERY),
    st.sampled_from(list(Rounding)),
    st.sampled_from(list(Overflow)),
    st.integers(1, 32),
)
@settings(max_examples=1500)
def test_encode_agrees_with_the_reference(
    data: st.DataObject, f: ElementFormat, rounding: Rounding, overflow: Overflow, bits: int
) -> None:
    """Formats that float64 does not hold among them."""
    if overflow is Overflow.NONSATURATING and not (f.has_inf or f.has_nan):
        overflow = Overflow.SAT_NONE
    x = data.draw(doubles_beside(f))
    random = data.draw(st.integers(0, 2**bits - 1))
    got = f.decode_exact(int(f.encode(x, rounding, overflow, random_bits=random, stochastic_bits=bits)))
    want = round_exact(x, f, rounding, overflow, random_bits=random, stochastic_bits=bits)
    assert same(got, want)


def same(got: Fraction | float, want: Fraction | float) -> bool:
    """The same number, or both NaN, or the same zero."""
    if got != got or want != want:
        return got != got and want != want
    zeros = isinstance(got, float) == isinstance(want, float) or got != 0
    return got == want and zeros


@given(formats(), st.integers(0, 2**32 - 1))
def test_wide_formats_decode_to_their_definition(f: FloatFormat, code: int) -> None:
    code %= 2**f.bits
    defined = oracle.value(f, code)
    exact = f.decode_exact(code)
    assert exact == defined or (exact != exact and mpmath.isnan(defined))
    if FP64.holds(f) and mpmath.isfinite(defined):
        assert float(f.decode(code)) == float(exact)
        assert f.encode(float(exact)) == code


def test_what_cannot_be_encoded_is_refused() -> None:
    with pytest.raises(ValueError, match="e2m1fn has no NaN, and 2 of the values are NaN"):
        float_format("e2m1fn").encode([np.nan, 1.0, np.nan])
    with pytest.raises(ValueError, match="encode rounds once"):
        float_format("e4m3").encode(np.ones(2, np.longdouble))
    with pytest.raises(ValueError, match="encode rounds once"):
        float_format("e4m3").encode([2**53 + 1])
    with pytest.raises(ValueError, match=r"rounding must be one of nearest_even, .*, got 'up'"):
        float_format("e4m3").encode([1.0], rounding="up")
    with pytest.raises(ValueError, match=r"overflow must be one of saturate, propagate, .*, got 'wrap'"):
        float_format("e4m3").encode([1.0], overflow="wrap")


def test_what_cannot_be_decoded_is_refused() -> None:
    f = float_format("e4m3")
    for codes in ([256], [-1], [1.0]):
        with pytest.raises(ValueError, match=r"codes must be integers in 0..255"):
            f.decode(codes)
    with pytest.raises(ValueError, match=r"a code must be 0..255, got 256"):
        f.decode_exact(256)
    with pytest.raises(ValueError, match="up to 16 bits, and this has 19"):
        float_format("tf32").grid()


def test_shapes_and_inputs_of_every_kind() -> None:
    f = float_format("e4m3fn")
    assert f.encode([[1, 2], [3, 4]]).shape == (2, 2)
    assert f.encode(np.float32(1.5)).shape == ()
    assert f.decode(np.zeros((3, 0), np.uint8)).shape == (3, 0)
    assert f.encode([]).shape == (0,)
    strided = np.arange(12.0).reshape(3, 4).T[::2]
    np.testing.assert_array_equal(f.decode(f.encode(strided)), strided)
    np.testing.assert_array_equal(f.encode([np.inf, -np.inf, -0.0]), [f.max_code, f.max_code + 128, 128])
