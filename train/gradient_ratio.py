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


def norm_to_mean(norms: NDArray[Any]) -> NDArray[np.float32]:
    """The ratio along the second axis, of norms [run, step, ...]; same shape, FP32, computed in FP64."""
    norms = norms.astype(np.float64)
    finite = np.isfinite(norms)
    total = np.cumsum(np.where(finite, norms, 0.0), 1)[:, :-1]
    count = np.cumsum(finite, 1)[:, :-1]
    ratio = np.full_like(norms, np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio[:, 1:] = norms[:, 1:] * count / total
    return ratio.astype(np.float32)
