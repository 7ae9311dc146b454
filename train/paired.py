"""Differences of pairs: two runs that differ in the recipe alone start from the same weights and read the same batches.

Much of what a seed does to the one's loss it does to the other's, and is gone from their difference. Of n pairs with differences
of mean d and standard deviation s, Student's paired interval (Student 1908, Biometrika 6:1) is

    d ± t(0.975; n - 1) s / √n

Of many comparisons some lie apart by chance: `holm` adjusts their p-values (Holm 1979, Scand. J. Statist. 6:65).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

Floats = npt.NDArray[np.float64]

CONFIDENCE = 0.95
LEAST_PAIRS = 2  # one difference has no spread
NAN = float("nan")


@dataclass(frozen=True)
class Difference:
    """Mean of the paired differences, recipe - baseline, its 95 % interval and two-sided p-value; NaN where pairs are too few.

    p_holm: adjusted for all p-values of the study's differences in that loss.
    """

    mean: float = NAN
    low: float = NAN
    high: float = NAN
    p: float = NAN
    p_holm: float = NAN


def paired(differences: Sequence[float]) -> Difference:
    """Student's interval and two-sided p-value for the mean of finite differences; the mean alone of one, nothing of none."""
    values, n = np.asarray(differences, np.float64), len(differences)
    if n < LEAST_PAIRS:
        return Difference(mean=float(values[0]) if n else NAN)
    mean, error = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(n)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * error
    # Runs with the same bits have differences without any spread.
    p = 2 * float(stats.t.sf(abs(mean) / error, n - 1)) if error > 0 else float(mean == 0)
    return Difference(mean, mean - half, mean + half, p)


def holm(p: npt.ArrayLike) -> Floats:
    """Holm's adjusted p-values, in the order given: of p_1 <= ... <= p_m, the i-th is max of min(1, (m - j + 1) p_j) over j <= i.

    What is below 0.05 may be claimed all at once, with a chance of at most 0.05 that any of it is false, however the tests hang
    together. NaN is no test: it stays NaN, and m does not count it.
    """
    values = np.asarray(p, np.float64)
    order = np.argsort(values)[: np.isfinite(values).sum()]  # NaN sorts last
    stepped = np.minimum(1.0, values[order] * np.arange(order.size, 0, -1))
    adjusted = np.full(values.shape, np.nan)
    adjusted[order] = np.maximum.accumulate(stepped)
    return adjusted
