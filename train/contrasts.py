"""Means over seeds held against each other, seed by seed: Student's bounds of differences, and of a maximum of means.

What many statistics of a learning-rate grid have in common is a best among means: the lowest loss, the rate that has it, how
far others are above it. The least of several noisy means lies below the least of the true ones, and resampling does not undo
that. What holds is a bound of each difference of two means, over seeds that have both, and what follows from bounds alone:

    max over r of m_r  is at least  max of lower bounds, each at alpha / R,  and at most  max of upper bounds, each at alpha,

since of the true maximum's place only its own upper bound has to hold, whichever place that is (as Hsu's comparisons with the
best 1981, Ann. Stat. 9:1026, without his assumption of equal variances).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

Floats = npt.NDArray[np.float64]


def bound(values: npt.ArrayLike, error: float, side: int) -> Floats:
    """Student's one-sided bound of the mean over the last axis, [..., seeds] -> [...]: the lower for side -1, the upper for 1.

    It errs with the chance `error`. NaN in values is no seed; with fewer than two there is no bound: -inf or inf.
    """
    x = np.asarray(values, np.float64)
    there = np.isfinite(x)
    n = there.sum(axis=-1)
    filled = np.where(there, x, 0.0)
    mean = filled.sum(axis=-1) / np.maximum(n, 1)
    square = np.where(there, (x - mean[..., None]) ** 2, 0.0).sum(axis=-1)
    spread = np.sqrt(square / np.maximum(n - 1, 1) / np.maximum(n, 1))
    # The mean of equal numbers is off by a rounding, and so would be their spread.
    spread = np.where(spread > 1e-14 * np.abs(mean), spread, 0.0)
    reach = -stdtrit(np.maximum(n - 1, 1), error) * spread
    return np.asarray(np.where(n >= 2, mean + side * reach, side * np.inf), np.float64)


def mean_over(values: npt.ArrayLike) -> Floats:
    """The mean over the last axis without NaN; NaN of nothing."""
    x = np.asarray(values, np.float64)
    n = np.isfinite(x).sum(axis=-1)
    return np.where(n > 0, np.nansum(x, axis=-1) / np.maximum(n, 1), np.nan)
