"""The bootstrap over seeds: studies of as many seeds, drawn with replacement, each seed with all of its runs.

Runs that share a seed share weights and batches, so runs are never drawn by themselves. A draw is how often each seed is in it.
The interval between two percentiles of the draws is too short with few seeds: it takes the normal's percentiles where Student's
belong, and a spread of n where n - 1 belongs. Hesterberg (2015, Am. Stat. 69:371) widens it to the percentiles

    Phi(-+ sqrt(n / (n - 1)) t(1 - a/2; n - 1))

which are wide of what draws of fewer than `LEAST_SEEDS` seeds can show: of so few there is no interval.

A seed that is drawn twice brings rows that are equal to the last bit. What minds ties (average precision does) is biased by
that, and its interval comes from leaving seeds out one at a time instead: the jackknife's standard error (Tukey 1958; Efron
1982) and Student's t.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy import stats

Floats = npt.NDArray[np.float64]

DRAWS = 2000
LEAST_SEEDS = 5


def seed_draws(seeds: int, draws: int = DRAWS, key: int = 0) -> Floats:
    """How often each seed is in each draw, [draws, seeds]; the same for the same key."""
    if seeds < 1:
        return np.zeros((draws, 0))
    generator = np.random.Generator(np.random.Philox(key=key))
    return generator.multinomial(seeds, np.full(seeds, 1 / seeds), draws).astype(np.float64)


def expanded_interval(of_draws: npt.ArrayLike, seeds: int, confidence: float = 0.95) -> tuple[Floats, Floats]:
    """Low and high of a statistic, from its values in each draw, [draws, ...] -> [...]; NaN with fewer than LEAST_SEEDS seeds.

    Draws without a value (NaN) are left out.
    """
    values = np.asarray(of_draws, np.float64)
    if seeds < LEAST_SEEDS or not np.isfinite(values).any():
        nothing = np.full(values.shape[1:], np.nan)
        return nothing, nothing.copy()
    tail = float(stats.norm.sf(math.sqrt(seeds / (seeds - 1)) * stats.t.isf((1 - confidence) / 2, seeds - 1)))
    some = np.isfinite(values).any(axis=0)
    filled = np.where(some, values, 0.0)
    low, high = np.nanquantile(filled, [tail, 1 - tail], axis=0)
    return np.where(some, low, np.nan), np.where(some, high, np.nan)


def left_out(seeds: int) -> Floats:
    """How often each seed is there when one is left out, [seeds, seeds]."""
    return 1.0 - np.eye(seeds)


def jackknife_interval(value: float, of_left_out: npt.ArrayLike, confidence: float = 0.95) -> tuple[float, float]:
    """Low and high of a statistic from its values with each seed left out, [seeds]; NaN of too few, or where one is."""
    values = np.asarray(of_left_out, np.float64)
    n = values.size
    if n < LEAST_SEEDS or not np.isfinite(values).all():
        return math.nan, math.nan
    error = math.sqrt((n - 1) / n * float(((values - values.mean()) ** 2).sum()))
    reach = float(stats.t.isf((1 - confidence) / 2, n - 1)) * error
    return value - reach, value + reach
