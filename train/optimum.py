"""A recipe's best learning rate, how surely it is that one, what is lost there against the baseline, and how far seeds spread.

The optimum is the rate with the lowest mean final loss of the seeds that trained, among rates at which at least half of the seeds
did. Failures are told apart from losses, since they are counted elsewhere; and so whether few or many of a rate's runs happened
to fail has no say in which rate is looked at, and the share that failed there is no share picked for being low.

`best_rates`: which rates may be the optimum: all that are not shown, by paired differences of seeds that trained at both, to lose
more than another (comparisons with the best, see `contrasts`). At least the stated share of studies keeps the true one.

`loss_penalty`: the difference from the baseline's loss by pairs of the same seed, each recipe at its own optimum. Its limits
are bounds of the least mean of each (see `contrasts`): Student's interval at the rates that look best would pass over that
others may be.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import xarray as xr
from scipy import stats

from train.contrasts import bound, mean_over
from train.seed_cube import by_rate, trained_loss

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

HALF = 0.5


def candidates(diverged: Floats) -> Bools:
    """Rates at which at most half of the seeds diverged and one did not, [rate]; diverged: 0, 1 or NaN, [rate, seed]."""
    share = mean_over(diverged)
    with np.errstate(invalid="ignore"):
        return np.asarray((share <= HALF) & (diverged == 0).any(axis=1), np.bool_)


def best_of(loss: Floats, diverged: Floats) -> int | None:
    """The optimum's place; loss: trained_loss, [rate, seed]; None where no rate is a candidate."""
    means = np.where(candidates(diverged), mean_over(loss), np.nan)
    return int(np.nanargmin(means)) if np.isfinite(means).any() else None


def optimum(grid: xr.Dataset, recipe: str) -> float:
    """A recipe's best learning rate; NaN where more than half of the seeds diverged at each."""
    place = best_of(*by_rate(grid, recipe))
    return math.nan if place is None else float(grid["learning_rate"].values[place])


def best_rates(grid: xr.Dataset, recipe: str, error: float = 0.05) -> Floats:
    """The learning rates that may be the recipe's optimum, rising: the true one is among them in at least 1 - error of studies.

    Empty where no rate is a candidate.
    """
    loss, diverged = by_rate(grid, recipe)
    rivals = np.flatnonzero(candidates(diverged))
    if not rivals.size:
        return np.zeros(0)
    may = [
        r
        for r in rivals
        if not any(bound(loss[r] - loss[s], error / max(1, rivals.size - 1), -1) > 0 for s in rivals if s != r)
    ]
    return np.asarray(grid["learning_rate"].values[may], np.float64)


def optimum_shift(grid: xr.Dataset, recipe: str, baseline: str, confidence: float = 0.95) -> dict[str, float | bool]:
    """How far the recipe's optimum lies above the baseline's, in octaves: shift, low, high, and whether it is censored.

    low and high: of all rates that may be the optimum, each recipe's at half the error, so that both hold together. NaN where
    either has none. censored: the optimum, of one of them, is the lowest or the highest rate it was tried at, and may lie beyond.
    """
    pairs = {name: best_rates(grid, name, (1 - confidence) / 2) for name in (recipe, baseline)}
    ours, theirs = optimum(grid, recipe), optimum(grid, baseline)
    ends = {name: _tried(grid, name)[[0, -1]] for name in pairs if _tried(grid, name).size}
    if not (math.isfinite(ours) and math.isfinite(theirs)):
        return {"shift": math.nan, "low": math.nan, "high": math.nan, "censored": False}
    return {
        "shift": math.log2(ours / theirs),
        "low": math.log2(pairs[recipe].min() / pairs[baseline].max()),
        "high": math.log2(pairs[recipe].max() / pairs[baseline].min()),
        "censored": bool(ours in ends[recipe] or theirs in ends[baseline]),
    }


def loss_penalty(
    grid: xr.Dataset, recipe: str, baseline: str, confidence: float = 0.95
) -> tuple[float, float, float, int]:
    """Final loss above the baseline's, each at its own optimum, nats/token: penalty, low, high; and of how many pairs.

    Pairs are seeds that trained in both, there; the others are counted where divergence is. NaN without pairs, and limits with
    one. With one rate each, the limits are those of Student's paired interval.
    """
    each = {name: by_rate(grid, name) for name in (recipe, baseline)}
    ours, theirs = (best_of(*each[name]) for name in (recipe, baseline))
    if ours is None or theirs is None:
        return math.nan, math.nan, math.nan, 0
    differences = each[recipe][0][ours] - each[baseline][0][theirs]
    pairs = int(np.isfinite(differences).sum())
    penalty = float(mean_over(differences))
    if recipe == baseline:
        return penalty, penalty, penalty, pairs
    # min_r m_r - min_s n_s = min_r max_s (m_r - n_s), of which each is a mean over the same seeds.
    first, second = (each[name][0][candidates(each[name][1])] for name in (recipe, baseline))
    apart = first[:, None] - second[None]
    error = (1 - confidence) / 2
    low = float(bound(apart, error / len(second), -1).max(axis=1).min())
    high = float(bound(apart, error / len(first), 1).max(axis=1).min())
    return penalty, low if math.isfinite(low) else math.nan, high if math.isfinite(high) else math.nan, pairs


def spread(grid: xr.Dataset, confidence: float = 0.95) -> xr.Dataset:
    """Standard deviation over seeds of the final loss of runs that trained, (recipe, learning_rate): sd, sd_low, sd_high, seeds.

    The interval is that of normal losses, by chi-squared; NaN with fewer than two seeds.
    """
    loss = trained_loss(grid).transpose("recipe", "learning_rate", "seed")
    n = loss.notnull().sum("seed")
    sd = loss.std("seed", ddof=1).where(n > 1)
    tail, freedom = (1 - confidence) / 2, np.maximum(n.values - 1, 1)
    nats = {"units": "nats/token"}
    limits = {
        name: sd * np.sqrt(freedom / quantile(tail, freedom))
        for name, quantile in (("sd_low", stats.chi2.isf), ("sd_high", stats.chi2.ppf))
    }
    long_name = {
        "sd": "standard deviation over seeds of the final loss",
        "sd_low": "its lower limit",
        "sd_high": "its upper limit",
    }
    result = xr.Dataset({"sd": sd, **limits, "seeds": n})
    for name, words in long_name.items():
        result[name].attrs = nats | {
            "long_name": words,
            "source": "chi-squared interval, for normal losses; runs that trained",
        }
    result["seeds"].attrs = {"units": "1", "long_name": "runs that trained"}
    return result.assign_attrs(confidence=confidence)


def _tried(grid: xr.Dataset, recipe: str) -> Floats:
    """The learning rates at which a recipe has a run, rising."""
    there = np.isfinite(by_rate(grid, recipe)[1]).any(axis=1)
    return np.asarray(grid["learning_rate"].values[there], np.float64)
