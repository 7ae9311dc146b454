"""Codes to values and back for whole arrays, in NumPy integers: bit fields of float64 in, bit fields of the format out.

Nothing here calls the rational reference, so that each can be held against the other.
"""

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from formats.rounding import Rounding, check_modes

if TYPE_CHECKING:
    from formats.spec import FloatFormat

MANTISSA = 52  # float64's
BIAS = 1023


def code_dtype(bits: int) -> type[np.unsignedinteger]:
    """The narrowest unsigned integer of 8, 16 or 32 bits for a code."""
    return np.uint8 if bits <= 8 else np.uint16 if bits <= 16 else np.uint32


def decode(f: "FloatFormat", codes: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Values of integer codes, any shape; exact, since 24 significand bits and 8 exponent bits fit float64."""
    array = np.asarray(codes)
    if array.dtype.kind not in "iu" or (array.size and (int(array.min()) < 0 or int(array.max()) >= 1 << f.bits)):
        raise ValueError(f"{f.name}: codes must be integers in 0..{(1 << f.bits) - 1}")
    wide = array.astype(np.int64)
    magnitude = wide & ((1 << (f.bits - 1)) - 1)
    k = magnitude >> f.mantissa_bits
    hidden = np.minimum(k, 1) << f.mantissa_bits
    significand = hidden | (magnitude & ((1 << f.mantissa_bits) - 1))
    value = np.ldexp(significand.astype(np.float64), np.maximum(k, 1) - f.bias - f.mantissa_bits)
    value = np.where(magnitude > f.max_code, np.nan, value)
    if f.inf_code is not None:
        value = np.where(magnitude == f.inf_code, np.inf, value)
    return np.asarray(np.where(wide >> (f.bits - 1) == 1, -value, value), np.float64)


def encode(f: "FloatFormat", values: npt.ArrayLike, rounding: str, overflow: str) -> npt.NDArray[np.unsignedinteger]:
    """Codes of values, any shape, rounded once from float64's bits; see FloatFormat.encode."""
    mode, _ = check_modes(rounding, overflow)
    x = _as_float64(f, values)
    nan = np.isnan(x)
    if f.nan_code is None and nan.any():
        raise ValueError(f"{f.name} has no NaN, and {int(nan.sum())} of the values are NaN; replace them first")
    magnitude = np.minimum(_rounded_magnitude(f, x, mode), f.max_code)
    negative = np.signbit(x) & ~nan
    if f.nan_code is not None:
        magnitude = np.where(nan, f.nan_code, magnitude)
    codes = magnitude | (negative.astype(np.int64) << (f.bits - 1))
    return np.asarray(codes, code_dtype(f.bits))


def _rounded_magnitude(f: "FloatFormat", x: npt.NDArray[np.float64], mode: Rounding) -> npt.NDArray[np.int64]:
    """Code of |x| as if exponents went on for ever: 0 for zero, larger than max_code on overflow, anything for NaN."""
    bits: npt.NDArray[np.int64] = x.view(np.int64) & np.iinfo(np.int64).max
    field = bits >> MANTISSA
    # |x| = significand * 2^(exponent - 52); zero and float64's own subnormals share the exponent of field 1 and lack
    # the hidden bit.
    significand = (bits & ((1 << MANTISSA) - 1)) | (np.minimum(field, 1) << MANTISSA)
    exponent = np.maximum(field, 1) - BIAS
    binade = np.maximum(exponent, f.emin)
    # So many low bits lie below the quantum 2^(binade - M). Past 54 of them |x| is under a quarter of it and nothing
    # changes any more.
    drop = np.minimum(MANTISSA - f.mantissa_bits + binade - exponent, MANTISSA + 2)
    kept = significand >> drop
    # The hidden bit, counted in `kept`, is the 1 that lifts a code from the field before: hence the - 1.
    code: npt.NDArray[np.int64] = kept + ((binade + f.bias - 1) << f.mantissa_bits)
    if mode is Rounding.TOWARD_ZERO:
        return code
    rest = significand - (kept << drop)
    half = np.int64(1) << (drop - 1)
    # Adding 1 to a code goes to the next value, over the end of a binade too.
    code += (rest > half) | ((rest == half) & (code & 1 == 1))
    return code


def _as_float64(f: "FloatFormat", values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    array = np.asarray(values)
    exact_float = array.dtype.kind == "f" and array.dtype.itemsize <= 8
    exact_integer = array.dtype.kind in "iub" and (
        not array.size or max(int(array.max()), -int(array.min())) <= 1 << 53
    )
    if not (exact_float or exact_integer):
        raise ValueError(
            f"{f.name}: encode rounds once, from float64, which does not hold these {array.dtype} values exactly"
        )
    return array.astype(np.float64)
