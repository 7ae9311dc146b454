"""Does a signal warn before a run diverges? Judged so that knowing the learning rate is no merit.

Pooled over learning rates, a signal that says nothing but the rate scores an AUROC of 0.94, since high rates diverge; within a
rate it scores 0.5. So only rows of the same recipe, rate and step are held against each other (see `alarm_rows`):

    AUROC               of all pairs of a positive and a negative row in one stratum, the share in which the positive one's
    signal is
                        the larger, ties half (Mann and Whitney 1947; stratified as van Elteren's test 1960 weighs pairs)
    average precision   in each stratum, mean over positives of the share of positives among all at least as loud (ties together);
                        averaged over positives, beside what chance gives in strata of those sizes, which is no constant

Strata without both kinds of rows say nothing, and are counted. Intervals are over seeds (see `resample`), the bootstrap's for
AUROC and the jackknife's for average precision: runs of one seed share weights and batches. Whether one signal adds to another
is `incremental`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xarray as xr
from scipy.stats import rankdata

from train.alarms import Rows
from train.resample import DRAWS, expanded_interval, jackknife_interval, left_out, seed_draws

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Concordance:
    """Pairs of a positive and a negative row in one stratum, by both seeds, [seeds, seeds]: how many, and how many are won."""

    wins: Floats
    pairs: Floats

    def auroc(self, weights: npt.ArrayLike | None = None) -> Floats:
        """Wins over pairs, with seeds so often as weights [..., seeds] say; NaN without a pair."""
        each = np.ones(self.wins.shape[0]) if weights is None else np.asarray(weights, np.float64)
        # Halves and counts: whatever the order they are added in, these sums are exact.
        wins, pairs = (((each @ of) * each).sum(axis=-1) for of in (self.wins, self.pairs))
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(wins / pairs, np.float64)


def concordance(rows: Rows) -> Concordance:
    """Of all strata; a run is never held against itself, since a stratum has one row of it."""
    wins, pairs = np.zeros((rows.seeds, rows.seeds)), np.zeros((rows.seeds, rows.seeds))
    for of in informative(rows):
        positive, negative = of[rows.positive[of]], of[~rows.positive[of]]
        louder = rows.signal[positive][:, None], rows.signal[negative][None]
        place = np.ix_(rows.seed[positive], rows.seed[negative])
        score = (louder[0] > louder[1]) + 0.5 * (louder[0] == louder[1])
        np.add.at(wins, place, score)
        np.add.at(pairs, place, np.ones_like(score))
    return Concordance(wins, pairs)


def informative(rows: Rows) -> Iterator[npt.NDArray[np.int64]]:
    """The rows of each stratum that has positive and negative ones."""
    order = np.argsort(rows.stratum, kind="stable")
    edges = [0, *(np.flatnonzero(np.diff(rows.stratum[order])) + 1).tolist(), order.size]
    positives = np.concatenate([[0], rows.positive[order].cumsum()])[edges]
    for start, end, of in zip(edges[:-1], edges[1:], np.diff(positives).tolist(), strict=True):
        if 0 < of < end - start:
            yield order[start:end]


def average_precision(rows: Rows, weights: npt.ArrayLike | None = None) -> Floats:
    """Average precision over all positives, each in its stratum; with seeds so often as weights [..., seeds] say; NaN of none."""
    each = np.ones(rows.seeds) if weights is None else np.asarray(weights, np.float64)
    total = np.zeros(each.shape[:-1])
    count = np.zeros(each.shape[:-1])
    for of in informative(rows):
        order = of[np.argsort(-rows.signal[of], kind="stable")]
        weight = each[..., rows.seed[order]]
        positive = np.where(rows.positive[order], weight, 0.0)
        # Rows that are equally loud are let through together: each has the precision at the last of them.
        last = np.searchsorted(-rows.signal[order], -rows.signal[order], side="right") - 1
        heard, right = weight.cumsum(axis=-1)[..., last], positive.cumsum(axis=-1)[..., last]
        both = (positive.sum(axis=-1) > 0) & (weight.sum(axis=-1) > positive.sum(axis=-1))  # in a draw, too
        precision = right / np.maximum(heard, 1e-300)
        total += np.where(both, (positive * precision).sum(axis=-1), 0.0)
        count += np.where(both, positive.sum(axis=-1), 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(total / count, np.float64)


def chance_precision(rows: Rows) -> float:
    """The average precision expected of a signal without ties that says nothing; NaN of no informative stratum.

    Of m positives among n rows in random order: (H_n + (n - H_n) (m - 1) / (n - 1)) / n, H_n = 1 + 1/2 + ... + 1/n.
    """
    total = count = 0.0
    for of in informative(rows):
        n, m = of.size, int(rows.positive[of].sum())
        harmonic = float((1 / np.arange(1, n + 1)).sum())
        total += m * (harmonic + (n - harmonic) * (m - 1) / (n - 1)) / n
        count += m
    return total / count if count else float("nan")


def pooled_auroc(rows: Rows) -> float:
    """AUROC of all rows at once, strata forgotten; NaN where all are of one kind."""
    m, n = int(rows.positive.sum()), int((~rows.positive).sum())
    if not m or not n:
        return float("nan")
    return float((rankdata(rows.signal)[rows.positive].sum() - m * (m + 1) / 2) / (m * n))


def warning_skill(rows: Rows, confidence: float = 0.95, draws: int = DRAWS) -> xr.Dataset:
    """How well the signal warns, no dimensions: auroc, average_precision, their limits, and what they rest on.

    Without a stratum that has both kinds of rows (nothing diverged, everything did, one seed) the scores are NaN. Limits are
    NaN with fewer seeds than `resample` needs. pooled_auroc is over all rows at once, and says mostly how well the rate is
    known.
    """
    pairs = concordance(rows)
    weights = seed_draws(rows.seeds, draws)
    kinds = [int(rows.positive[of].sum()) for of in informative(rows)]
    values: dict[str, object] = {"auroc": float(pairs.auroc()), "average_precision": float(average_precision(rows))}
    without = average_precision(rows, left_out(rows.seeds))
    limits = {
        "auroc": tuple(map(float, expanded_interval(pairs.auroc(weights), rows.seeds, confidence))),
        "average_precision": jackknife_interval(float(average_precision(rows)), without, confidence),
    }
    for name, (low, high) in limits.items():
        values[f"{name}_low"], values[f"{name}_high"] = low, high
    values["average_precision_chance"] = chance_precision(rows)
    values["pooled_auroc"] = pooled_auroc(rows)
    values |= {
        "strata": int(np.unique(rows.stratum).size), "informative_strata": len(kinds), "pairs": int(pairs.pairs.sum()),
        "positives": int(rows.positive.sum()), "negatives": int((~rows.positive).sum()), "unmeasured": rows.unmeasured,
        "runs": int(np.unique(rows.run).size), "seeds": int(np.unique(rows.seed).size),
    }  # fmt: skip
    attributes = {name: {"units": "1", "long_name": VARIABLES[name]} for name in values}
    return xr.Dataset(
        {name: ((), of, attributes[name]) for name, of in values.items()}, attrs={"confidence": confidence}
    )


VARIABLES = {
    "auroc": "AUROC within recipe, learning rate and step",
    "auroc_low": "lower limit of the AUROC, bootstrap over seeds",
    "auroc_high": "upper limit of the AUROC, bootstrap over seeds",
    "average_precision": "average precision within recipe, learning rate and step",
    "average_precision_low": "lower limit of the average precision, leaving seeds out",
    "average_precision_high": "upper limit of the average precision, leaving seeds out",
    "average_precision_chance": "average precision expected of a signal that says nothing",
    "pooled_auroc": "AUROC of all rows at once, to which the learning rate adds",
    "strata": "strata with rows",
    "informative_strata": "strata with positive and negative rows",
    "pairs": "pairs of a positive and a negative row in one stratum",
    "positives": "rows from which the run diverged within the horizon",
    "negatives": "rows from which the run is known not to have",
    "unmeasured": "rows without a measured signal, left out",
    "runs": "runs with rows",
    "seeds": "seeds with rows",
}
