"""Every code of every format of up to 16 bits decodes to what mpmath computes from the definition, and encodes back."""

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats import FloatFormat, float_format, list_formats, round_exact
from verification import oracle
from verification.strategies import formats, nasty_doubles, roundings

UP_TO_16_BITS = [name for name in list_formats("float") if float_format(name).bits <= 16]


@pytest.mark.parametrize("name", UP_TO_16_BITS)
def test_every_code_decodes_to_its_definition(name: str) -> None:
    f = float_format(name)
    positive = oracle.values(f)
    special = [float(oracle.value(f, code)) for code in range(len(positive), 2 ** (f.bits - 1))]
    half = np.concatenate([positive, special])
    decoded = f.decode(np.arange(2**f.bits))
    np.testing.assert_array_equal(decoded, np.concatenate([half, -half]))
    assert np.array_equal(np.signbit(decoded[len(half) :]) | np.isnan(decoded[len(half) :]), np.ones(len(half), bool))
    assert f.max_code == len(positive) - 1


@pytest.mark.parametrize("name", UP_TO_16_BITS)
def test_grid_is_every_finite_value_once(name: str) -> None:
    f = float_format(name)
    positive = oracle.values(f)
    grid = f.grid()
    np.testing.assert_array_equal(grid, np.concatenate([-positive[:0:-1], positive]))
    assert not np.signbit(grid[len(positive) - 1])


@pytest.mark.parametrize("name", UP_TO_16_BITS)
def test_encode_undoes_decode(name: str) -> None:
    f = float_format(name)
    codes = np.arange(2**f.bits)
    values = f.decode(codes)
    finite = np.isfinite(values)
    encoded = f.encode(values[finite])
    assert encoded.dtype == (np.uint8 if f.bits <= 8 else np.uint16)
    np.testing.assert_array_equal(encoded, codes[finite])
    if f.has_nan:
        assert set(f.encode(values[np.isnan(values)])) == {f.nan_code}
        assert np.isnan(f.decode(f.nan_code or 0))


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e2m1fn", "e3m0f", "e1m0f", "e8m2"])
def test_one_exact_code_is_a_fraction_where_it_can_be(name: str) -> None:
    f = float_format(name)
    for code in range(2**f.bits):
        exact, defined = f.decode_exact(code), oracle.value(f, code)
        assert float(exact) == float(defined) or mpmath.isnan(defined)
        assert str(float(exact)) == str(float(f.decode(code)))  # the sign of zero too
        assert isinstance(exact, float) == (not mpmath.isfinite(defined) or code == 2 ** (f.bits - 1))


@given(st.data(), formats(), roundings())
def test_encode_agrees_with_the_reference(data: st.DataObject, f: FloatFormat, rounding: str) -> None:
    x = data.draw(nasty_doubles(f))
    got = f.decode_exact(int(f.encode(x, rounding)))
    want = round_exact(x, f, rounding)
    assert (got, str(float(got))) == (want, str(float(want)))


@given(formats(), st.integers(0, 2**32 - 1))
def test_wide_formats_decode_to_their_definition(f: FloatFormat, code: int) -> None:
    code %= 2**f.bits
    decoded, defined = float(f.decode(code)), oracle.value(f, code)
    assert decoded == defined or (np.isnan(decoded) and mpmath.isnan(defined))
    if np.isfinite(decoded):
        assert f.encode(decoded) == code


def test_what_cannot_be_encoded_is_refused() -> None:
    with pytest.raises(ValueError, match="e2m1fn has no NaN, and 2 of the values are NaN"):
        float_format("e2m1fn").encode([np.nan, 1.0, np.nan])
    with pytest.raises(ValueError, match="encode rounds once"):
        float_format("e4m3").encode(np.ones(2, np.longdouble))
    with pytest.raises(ValueError, match="encode rounds once"):
        float_format("e4m3").encode([2**53 + 1])
    with pytest.raises(ValueError, match="rounding must be one of nearest_even, toward_zero, got 'up'"):
        float_format("e4m3").encode([1.0], rounding="up")
    with pytest.raises(ValueError, match="overflow must be one of saturate, got 'wrap'"):
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
