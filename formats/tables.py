"""Encoding FP32 arrays by look-up, for formats so narrow that the upper half of an FP32 pattern decides.

Where every decision point (values, and the points that divide them) has zeros in the lower 16 bits of its FP32 pattern, all
inputs that share the upper 16 bits and differ only in a non-zero lower half lie strictly between the same two decision points.
So 2 * upper + (lower != 0) determines the code, and a table of 2^17 codes, filled by the general encoder, holds them all.
"""

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from formats.rounding import Overflow, Rounding

if TYPE_CHECKING:
    from formats.spec import ElementFormat

MIN_ELEMENTS = 1 << 18
BLOCK = 1 << 14
LOW = 0xFFFF
MAGNITUDE = 0x7FFFFFFF
INFINITY = 0x7F800000


def encode(
    f: "ElementFormat", x: npt.NDArray[np.generic], mode: Rounding, over: Overflow
) -> npt.NDArray[np.unsignedinteger] | None:
    """The codes of an FP32 array, or None where it is small, or the format wide, or it has NaN without a code."""
    if x.dtype != np.float32 or x.size < MIN_ELEMENTS or mode.is_stochastic or f.bits > 8 or not _is_decided(f):
        return None
    table = _table(f, mode, over)
    flat = np.ascontiguousarray(x).reshape(-1).view(np.uint32)
    codes = np.empty(flat.shape, np.uint8)
    upper, lower = np.empty(BLOCK, np.uint32), np.empty(BLOCK, np.uint32)
    places = np.empty(BLOCK, np.intp)
    for start in range(0, len(flat), BLOCK):
        piece = flat[start : start + BLOCK]
        n = len(piece)
        np.bitwise_and(piece, LOW, out=lower[:n])
        np.minimum(lower[:n], 1, out=lower[:n])
        np.right_shift(piece, 15, out=upper[:n])
        np.bitwise_and(upper[:n], ~np.uint32(1), out=upper[:n])
        np.bitwise_or(upper[:n], lower[:n], out=places[:n])
        np.take(table, places[:n], out=codes[start : start + n], mode="wrap")
        if f.nan_code is None and (piece & MAGNITUDE).max() > INFINITY:
            return None
    return codes.reshape(x.shape)


@lru_cache(maxsize=64)
def _is_decided(f: "ElementFormat") -> bool:
    """Whether every value and every point between two has an FP32 pattern that ends in 16 zeros."""
    values = f.grid()
    after = values[-1:] + np.diff(values[-2:])
    points = np.concatenate([values, (values[1:] + values[:-1]) / 2, after, (values[-1:] + after) / 2])
    in_fp32 = points.astype(np.float32)
    return bool(np.all(in_fp32 == points) and not np.any(in_fp32.view(np.uint32) & LOW))


@lru_cache(maxsize=32)
def _table(f: "ElementFormat", mode: Rounding, over: Overflow) -> npt.NDArray[np.uint8]:
    patterns = np.arange(1 << 16, dtype=np.uint32) << 16
    x = np.stack([patterns, patterns | 1], axis=1).reshape(-1).view(np.float32).astype(np.float64)
    if f.nan_code is None:
        x = np.where(np.isnan(x), 0.0, x)
    return np.asarray(f.encode(x, mode, over), np.uint8)
