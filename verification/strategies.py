"""Hypothesis strategies: any format there is, and the floats that break quantisers."""

from collections.abc import Callable
from fractions import Fraction

import numpy as np
from hypothesis import strategies as st

from formats import ElementFormat, FloatFormat, float_format, list_formats
from formats.rounding import DETERMINISTIC


def formats(where: Callable[[FloatFormat], bool] | None = None) -> st.SearchStrategy[FloatFormat]:
    """Every floating-point format that a name stands for, or those of them that `where` lets through."""
    return st.sampled_from([f for f in map(float_format, list_formats("float")) if where is None or where(f)])


def fp32_formats() -> st.SearchStrategy[FloatFormat]:
    """The formats whose values FP32 holds and that have -0: those that are odd functions, bit for bit."""
    return formats(lambda f: f.has_negative_zero and f.subnormals and float_format("fp32").holds(f))


def roundings() -> st.SearchStrategy[str]:
    """The deterministic rounding modes."""
    return st.sampled_from([mode.value for mode in DETERMINISTIC])


def nasty_doubles(f: FloatFormat) -> st.SearchStrategy[float]:
    """Float64 numbers without NaN: any, and the format's values, the middles between them, and a few float64 ulps around."""
    code = st.integers(0, 2 ** (f.bits - 1) - 1).map(lambda c: min(c, f.max_code))
    nudge = st.integers(-2, 2)
    values = st.builds(lambda c: float(f.decode(c)), code)
    middles = st.builds(lambda c: float(f.decode(c) / 2 + f.decode(min(c + 1, f.max_code)) / 2), code)
    near = st.builds(_nudged, values | middles, nudge)
    signed = st.builds(lambda x, negative: -x if negative else x, near, st.booleans())
    return signed | st.floats(allow_nan=False)


def doubles_beside(f: ElementFormat) -> st.SearchStrategy[float]:
    """Float64 numbers without NaN, for any element format: any, and those near its values and the points between them."""
    code = st.sampled_from([int(c) for c in f.finite_codes[:: max(1, len(f.finite_codes) // 512)]])
    near = st.builds(_beside, st.just(f), code, st.integers(0, 2), st.integers(-2, 2))
    ends = st.sampled_from([f.largest, f.lowest]).map(_nearest_double)
    signed = st.builds(lambda x, factor: x * factor, near | ends, st.sampled_from([1.0, -1.0, 1.0, 1.03125, 1.5]))
    return signed | st.floats(allow_nan=False)


def _beside(f: ElementFormat, code: int, place: int, ulps: int) -> float:
    low = Fraction(f.decode_exact(code))
    around = f.interval(low + Fraction(1, 10**9) * (abs(low) or Fraction(1, 10**9)))
    return _nudged(_nearest_double([low, around.middle, around.high][place]), ulps)


def _nearest_double(value: Fraction) -> float:
    try:
        return float(value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def nasty_singles(f: FloatFormat) -> st.SearchStrategy[float]:
    """FP32 numbers without NaN: any bit pattern, and the FP32 numbers beside the format's values and middles."""
    patterns = st.integers(0, 2**32 - 1).map(_from_bits).filter(lambda x: x == x)
    beside = st.builds(_single_nudged, nasty_doubles(f), st.integers(-2, 2))
    return beside | patterns | st.floats(allow_nan=False, width=32)


def _from_bits(bits: int) -> float:
    return float(np.uint32(bits).view(np.float32))


def _nudged(x: float, ulps: int) -> float:
    for _ in range(abs(ulps)):
        x = float(np.nextafter(x, np.inf if ulps > 0 else -np.inf))
    return x


def _single_nudged(x: float, ulps: int) -> float:
    with np.errstate(over="ignore"):
        y = np.float32(x)
    for _ in range(abs(ulps)):
        y = np.nextafter(y, np.float32(np.inf if ulps > 0 else -np.inf))
    return float(y)
