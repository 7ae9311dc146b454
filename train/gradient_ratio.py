"""GNMR: a step's gradient norm over the mean of those before it, an alarm for a run or for one block of it.

    gnmr_t = |g_t| / mean(|g_0|, ..., |g_(t-1)|)

Kong et al. 2026 (2606.00539) compare "each recoverable unit's current gradient norm with its historical mean" (their abstract;
the paper could not be read). Here the history is the whole run so far, each step alike, without norms that are not finite: no
constant is needed. The first step has no ratio, NaN; a norm that is not finite has one that is not finite.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def norm_to_mean(norms: NDArray[Any]) -> NDArray[np.float32]:
    """The ratio along the second axis, of norms [run, step, ...]; same shape, FP32, computed in FP64."""
    whole = np.isfinite(norms).all(axis=tuple(range(1, norms.ndim)))
    ratio = np.full(norms.shape, np.nan, np.float32)
    with np.errstate(invalid="ignore", divide="ignore"):
        for runs, means in (
            (whole, _sums_of_all),
            (~whole, _sums_of_finite),
        ):  # the first, nearly all, in a tenth of the time
            of = norms[runs].astype(np.float64)
            total, count = means(of[:, :-1])
            ratio[runs, 1:] = of[:, 1:] * count / total
    return ratio


def _sums_of_all(norms: Floats) -> tuple[Floats, NDArray[np.int64]]:
    """The sum of each step and those before, and how many these are; of finite norms."""
    return np.cumsum(norms, 1), np.arange(1, norms.shape[1] + 1).reshape(-1, *[1] * (norms.ndim - 2))


def _sums_of_finite(norms: Floats) -> tuple[Floats, NDArray[np.int64]]:
    """The same, of finite ones among any."""
    finite = np.isfinite(norms)
    return np.cumsum(np.where(finite, norms, 0.0), 1), np.cumsum(finite, 1)
