"""How a study's numbers lie in the page: rounded, packed, and all of them deflated once.

A picture shows three digits of a number, so 13 significant bits are kept of it, an error below 0.013 %: the bits that are
dropped are noise that would not deflate. Steps are no measurements: they are packed as they are. NaN and the infinities stay what
they are. The whole content is one JSON text, gzipped and in base64; browsers have what unpacks it (DecompressionStream).
"""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

Floats = npt.NDArray[np.float64]

KEPT_BITS = 13  # of a significand, the leading one included
DROPPED = np.uint32(24 - KEPT_BITS)


def rounded(values: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """FP32 with `KEPT_BITS` significant bits, to nearest; what is not finite, or would become so, stays as it is."""
    with np.errstate(over="ignore"):
        single = np.ascontiguousarray(values, np.float32)
    bits = single.view(np.uint32)
    half = np.uint32(1) << (DROPPED - np.uint32(1))
    kept = ((bits + half) >> DROPPED << DROPPED).view(np.float32)
    return np.where(np.isfinite(single) & np.isfinite(kept), kept, single)


def packed(values: npt.ArrayLike) -> dict[str, Any]:
    """An array as its shape and the base64 of its rounded little-endian FP32 values."""
    return _held(rounded(values))


def packed_steps(steps: npt.ArrayLike) -> dict[str, Any]:
    """The same of steps, which are not rounded: FP32 has every whole number up to 2^24."""
    return _held(np.asarray(steps, np.float32))


def _held(array: npt.NDArray[np.float32]) -> dict[str, Any]:
    return {"shape": list(array.shape), "f4": base64.b64encode(array.astype("<f4").tobytes()).decode("ascii")}


def unpacked(held: Mapping[str, Any]) -> npt.NDArray[np.float32]:
    """The array that was packed, as it was rounded."""
    return np.frombuffer(base64.b64decode(held["f4"]), "<f4").reshape(held["shape"])


def embedded(content: Mapping[str, Any]) -> Markup:
    """The content for a script element: strict JSON, gzipped, in base64, which has no character that markup means."""
    text = json.dumps(strict(content), allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    return Markup(base64.b64encode(gzip.compress(text.encode(), compresslevel=6, mtime=0)).decode("ascii"))


def strict(content: Any) -> Any:
    """The content as JSON has words for it: a float that is not finite becomes null, and NumPy's numbers Python's."""
    if isinstance(content, np.generic):
        content = content.item()
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {str(key): strict(value) for key, value in content.items()}
    return [strict(value) for value in content] if isinstance(content, list | tuple) else content


def bucketed(
    steps: Floats, curves: Floats, most: int, recorded: npt.NDArray[np.bool_] | None = None
) -> tuple[Floats, dict[str, Floats]]:
    """Middles of at most `most` equal buckets of the steps, and each curve's low, high and mean in them, [run, bucket].

    low and high are over the bucket's finite values, NaN where it has none: a curve's extremes are always among them. mean is NaN
    where a recorded value of the bucket is not finite, so that a run that was lost is seen to be. recorded: which values are,
    [run, step], all where None; what follows a run's end is not, and NaN in `curves`.
    """
    recorded = np.ones(curves.shape, bool) if recorded is None else recorded
    width = -(-steps.size // max(1, most))
    starts = np.arange(0, steps.size, width)
    ends = np.append(starts[1:], steps.size) - 1
    count = np.add.reduceat(recorded, starts, axis=1, dtype=np.int64)
    finite = np.isfinite(curves)
    low = np.minimum.reduceat(np.where(finite, curves, np.inf), starts, axis=1)
    high = np.maximum.reduceat(np.where(finite, curves, -np.inf), starts, axis=1)
    none = ~np.logical_or.reduceat(finite, starts, axis=1)
    with np.errstate(invalid="ignore", over="ignore"):
        mean = np.add.reduceat(np.where(recorded, curves, 0.0), starts, axis=1) / np.where(count, count, np.nan)
    found = {"low": np.where(none, np.nan, low), "high": np.where(none, np.nan, high)}
    return (steps[starts] + steps[ends]) / 2, found | {"mean": np.where(np.isfinite(mean), mean, np.nan)}
