"""Curves with fewer points that still show every extreme.

A picture a thousand pixels wide shows no more than two points a pixel column, but which two matters: a mean, or every tenth step,
hides the loss spike that the picture is for. So the steps are cut into equal buckets, and each bucket keeps its least and its
greatest value, in the order in which they came. They are drawn at the bucket's start and middle, so that all curves share
one even axis: a value stands less than one bucket beside its step.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def thinned(steps: Floats, curves: Floats, points: int) -> tuple[Floats, Floats]:
    """Even steps [s] and curves [run, s] with at most `points` (two or more) in place of s; as they are where s is no more.

    A bucket's values that are not finite are passed over; a bucket with no others is NaN. Over its curve's finite values, the
    least and the greatest are always among those kept.
    """
    if steps.size <= points:
        return steps, curves
    width = -(-steps.size // max(1, points // 2))
    starts = np.arange(0, steps.size, width)
    kept = np.full((len(curves), 2 * starts.size), np.nan)
    for i, start in enumerate(starts):
        bucket = curves[:, start : start + width]
        finite = np.isfinite(bucket)
        low = np.where(finite, bucket, np.inf)
        high = np.where(finite, bucket, -np.inf)
        pair = np.stack([low.min(axis=1), high.max(axis=1)], axis=1)
        falls = high.argmax(axis=1) < low.argmin(axis=1)
        pair[falls] = pair[falls, ::-1]
        pair[~finite.any(axis=1)] = np.nan
        kept[:, 2 * i : 2 * i + 2] = pair
    middle = steps[starts] + (steps[1] - steps[0]) * width / 2
    return np.stack([steps[starts], middle], axis=1).ravel(), kept
