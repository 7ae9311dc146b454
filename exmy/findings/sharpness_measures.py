"""Do measures of sharpness measure one thing? Their rank correlations over seeds, in the study that has all of them; and how much
of the logits' sharpness ten iterations of L-BFGS-B find while a model trains.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xarray as xr
from scipy import stats

from exmy.findings.numbers import Number
from exmy.findings.tables import headed, line, ranged, rate_words
from train.alarm_ranking import Judged
from train.alarms import kinds, numbered, steps_of
from train.measures import LOGITS, MEASURES
from train.resample import jackknife_interval
from train.seed_cube import seed_labels

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
PAPERS, CURVATURE = "logit_sharpness at epsilon 0.0005", "hessian_eigenvalue at rank 0"
AGAINST = {
    PAPERS: "with the paper's",
    CURVATURE: "with the Hessian's eigenvalue",
    "grad_norm": "with the gradient norm",
}
FEWEST = 8  # runs of a cell whose ranks tell something, one of them left out
SEARCHED = "logit_sharpness_lbfgsb"


def measures_of(signals: Mapping[str, xr.DataArray]) -> list[str]:
    """Signals that are measures of sharpness; of several epsilons, radii or ranks the first."""
    first = dict[str, str]()
    for name in signals:
        measure = name.partition(" at ")[0]
        if measure in MEASURES or measure.startswith(LOGITS):
            first.setdefault(measure, name)
    return list(first.values())


class Cell(NamedTuple):
    """Runs of a recipe and rate at a step: Spearman's rank correlation of all, then with each seed left out, [1 + seeds]."""

    rate: float
    step: int
    found: Floats


def rank_correlation(one: xr.DataArray, other: xr.DataArray, among: Bools) -> Number:
    """Spearman's rank correlation within recipe, rate and step, the mean over these cells; and its interval over seeds.

    among: which runs, [runs]. The interval is the jackknife's; NaN without any cell, and no interval with fewer than
    `train.resample.LEAST_SEEDS` seeds.
    """
    return mean_over(cells(one, other, among))


def mean_over(found: Sequence[Cell]) -> Number:
    """The mean of cells with the jackknife's interval over seeds; NaN without any."""
    if not found:
        return Number(math.nan, math.nan, math.nan)
    value, *left_out = np.array([of.found for of in found]).mean(axis=0)
    return Number(float(value), *jackknife_interval(float(value), left_out))


def cells(one: xr.DataArray, other: xr.DataArray, among: Bools) -> list[Cell]:
    """Of steps at which both were measured, and of `FEWEST` runs and one more; those in which one never moves are left out."""
    steps = np.intersect1d(one[steps_of(one)].values, other[steps_of(other)].values)
    a, b = (
        of.transpose("run", steps_of(of)).sel({steps_of(of): steps}).values.astype(np.float64)[among]
        for of in (one, other)
    )
    seed = numbered(
        [[label for label, kept in zip(seed_labels(one.to_dataset(name="one")), among, strict=True) if kept]]
    )
    kind = numbered([one[name].values[among].tolist() for name in kinds(one)])
    rates = one["learning_rate"].values[among].astype(np.float64)
    of_cells = []
    for k in np.unique(kind):
        for s in range(len(steps)):
            rows = np.flatnonzero((kind == k) & np.isfinite(a[:, s]) & np.isfinite(b[:, s]))
            if rows.size > FEWEST:
                ranked = _cell(a[rows, s], b[rows, s], seed[rows], int(seed.max()) + 1)
                of_cells.append(Cell(float(rates[rows[0]]), int(steps[s]), ranked))
    return [of for of in of_cells if math.isfinite(of.found[0])]


def along_steps(one: xr.DataArray, other: xr.DataArray, among: Bools, start: float) -> Floats:
    """Spearman's rank correlation over the steps of each run, from start on, [runs]; NaN where either never moves."""
    steps = np.intersect1d(one[steps_of(one)].values, other[steps_of(other)].values)
    steps = steps[steps >= start]
    if steps.size < FEWEST:
        return np.full(int(among.sum()), math.nan)
    a, b = (
        of.transpose("run", steps_of(of)).sel({steps_of(of): steps}).values.astype(np.float64)[among]
        for of in (one, other)
    )
    return np.where(np.isfinite(a).all(axis=1) & np.isfinite(b).all(axis=1), _spearman(a, b), math.nan)


def _cell(a: Floats, b: Floats, seed: npt.NDArray[np.int64], seeds: int) -> Floats:
    """Of all of a cell's runs, then with each seed left out, [1 + seeds]; a cell has a run of a seed, or none."""
    found = np.full(1 + seeds, _spearman(a, b))
    without = np.array([np.delete(np.arange(len(a)), i) for i in range(len(a))])
    found[1 + seed] = _spearman(a[without], b[without])
    return found


def _spearman(a: Floats, b: Floats) -> Floats:
    """Pearson's of mid-ranks, along the last axis; NaN where all of one are alike."""
    x, y = (stats.rankdata(of, axis=-1) for of in (a, b))
    x, y = (of - of.mean(axis=-1, keepdims=True) for of in (x, y))
    scale = np.asarray(np.sqrt((x**2).sum(axis=-1) * (y**2).sum(axis=-1)))
    return np.asarray((x * y).sum(axis=-1) / np.where(scale > 0, scale, math.nan))


def measured_alike(tree: xr.DataTree, warmup: float) -> Iterator[str]:
    """In a sentence: whether the paper's metric is the Hessian's; nothing where one of the two is missing."""
    judged = Judged(tree)
    if {PAPERS, CURVATURE} <= set(judged.signals):
        both, among = [judged.signals[name] for name in (PAPERS, CURVATURE)], ~np.isfinite(judged.onset.values)
        each = cells(both[0], both[1], among)
        if each:
            own = [float(of.found[0]) for of in each]
            along = _along(both, among, warmup)
            yield (
                "Over seeds the paper's metric and the Hessian's largest eigenvalue correlate by "
                f"{ranged(mean_over(each), '+.2f')}, the mean of {min(own):+.2f} to {max(own):+.2f} by rate and step"
                + (f"; over the steps of a run by {along.value:+.2f}, in the median." if along else ".")
            )


class Along(NamedTuple):
    """Over runs: the median and the deciles at both ends; and of how many runs."""

    value: float
    low: float
    high: float
    runs: int


def _along(both: Sequence[xr.DataArray], among: Bools, warmup: float) -> Along | None:
    found = along_steps(both[0], both[1], among, warmup)
    found = found[np.isfinite(found)]
    if not found.size:
        return None
    middle, low, high = map(float, np.quantile(found, (0.5, 0.1, 0.9)))
    return Along(middle, low, high, found.size)


def agreement(tree: xr.DataTree, warmup: float) -> Iterator[str]:
    """A table of correlations with a row a measure, and what is said of the search; nothing where there is nothing to compare.

    warmup: the steps of the warm-up, before which the course of a run is left out.
    """
    judged = Judged(tree)
    names, among = measures_of(judged.signals), ~np.isfinite(judged.onset.values)
    against = [name for name in AGAINST if name in judged.signals]
    if len(names) > 1 and PAPERS in names and among.sum() > FEWEST:
        yield from _table(judged, names, against, among)
        yield ""
        if {PAPERS, CURVATURE} <= set(names):
            yield from _by_cell(judged, among, warmup)
        if "last" in str(tree["sharpness"].attrs.get("positions", "")):
            yield (
                "Sharpness at the logits is here of the last token of each of the probe's sequences, all else but "
                "`hidden_sharpness` of all tokens: what so few tokens leave to chance makes the first column's numbers "
                "smaller, by how much is not told."
            )
            yield ""
    searched = _searched(tree)
    if searched:
        yield searched
        yield ""


def _table(judged: Judged, names: list[str], against: list[str], among: Bools) -> Iterator[str]:
    yield (
        "**Whether they measure one thing.** Rank correlations (Spearman's) over seeds of the runs that did not diverge, "
        "within recipe, rate and step, mean over steps; intervals, 95 %, over seeds. Ranks within a step leave out what all "
        "runs do alike as training goes on."
    )
    yield ""
    yield from headed(("measure", *(AGAINST[name] for name in against)))
    for name in names:
        cells = [
            "1" if name == other
            else ranged(rank_correlation(judged.signals[name], judged.signals[other], among), "+.2f")
            for other in against
        ]  # fmt: skip
        yield line([f"`{name}`", *cells])


def _by_cell(judged: Judged, among: Bools, warmup: float) -> Iterator[str]:
    """From where to where the mean's cells go, by rate and before any run failed; and the same over a run's own steps."""
    both = [judged.signals[name] for name in (PAPERS, CURVATURE)]
    each = cells(both[0], both[1], among)
    if not each:
        return
    least, most = min(each, key=_value), max(each, key=_value)
    rates = list(dict.fromkeys(of.rate for of in each))
    first = np.nanmin(judged.onset.values) if np.isfinite(judged.onset.values).any() else math.inf
    lots = (
        {f"at {rate_words(rate)}": [of for of in each if of.rate == rate] for rate in rates} if len(rates) > 1 else {}
    )
    if 0 < sum(of.step < first for of in each) < len(each):
        lots[f"before step {first:.0f}, at which the first run failed,"] = [of for of in each if of.step < first]
        lots["from then on"] = [of for of in each if of.step >= first]
    means = ", ".join(f"{words} {ranged(mean_over(of), '+.2f')}" for words, of in lots.items())
    yield (
        f"The mean of the paper's and the Hessian's eigenvalue is of {len(each)} cells, which go from {_value(least):+.2f} (rate "
        f"{rate_words(least.rate)}, step {least.step}) to {_value(most):+.2f} (rate {rate_words(most.rate)}, step {most.step})"
        + (f"; means: {means}" if means else "")
        + ". "
        + (
            "Cells of both signs make no one number that holds at every rate and step; the interval is the mean's, and of these "
            "rates and steps alone."
            if _value(least) < 0 < _value(most)
            else "The interval is the mean's, and of these rates and steps alone."
        )
    )
    yield ""
    along = _along(both, among, warmup)
    if along:
        yield (
            f"Over the steps of one run, from the end of the warm-up on, the same two correlate by {along.value:+.2f}, the "
            f"median of {along.runs} runs, in the middle 80 % by {along.low:+.2f} to {along.high:+.2f}: "
            + ("both rise as training goes on, as any two that rise would. " if along.value > 0.5 else "")
            + "What is said of seeds is not said of steps."
        )
        yield ""


def _value(of: Cell) -> float:
    return float(of.found[0])


def _searched(tree: xr.DataTree) -> str:
    """How much ten iterations of L-BFGS-B found of the maximum at the same logits; "" where they did not run."""
    if "probes" not in tree or SEARCHED not in tree["probes"]:
        return ""
    of = tree["probes"][SEARCHED].to_dataset()
    exact = of[f"{SEARCHED}_upper"]
    found = (of[f"{SEARCHED}_lower"] / exact).values
    told = found[np.isfinite(found)]
    if not told.size:
        return ""
    words = (
        f"Ten iterations of L-BFGS-B, at {told.size:,} points of training (a run, a step, an epsilon), mean over tokens: "
        f"they find {100 * told.min():.1f} % of the exact maximum at these logits or more, in the median "
        f"{100 * np.median(told):.1f} %; the closed form gives all of it."
    )
    if LOGITS in tree["sharpness"]:
        apart = abs(tree["sharpness"].to_dataset()[LOGITS] / exact - 1).values
        words += (
            f" These are a probe's own logits, by FP32 products; `{LOGITS}` is of training's, whose sums are others, and is "
            f"up to {100 * np.nanmax(apart):.2f} % away, in the median {100 * np.nanmedian(apart):.2f} %."
        )
    return words
