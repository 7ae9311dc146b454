"""What a finding's tables and its figures both show, so that neither can say what the other does not.

Statistics are `train`'s; here they are only asked for, part by part of a study. Losses that are not finite count as infinite in
medians and quantiles, so that a recipe is not the better for the runs that it lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xarray as xr

from exmy.findings.once import once
from exmy.findings.studies import Evidence, Numerics, Part
from train.bisect import edge
from train.optimum import loss_penalty
from train.rates import stability_table
from train.stability import DEFINITIONS
from train.verdicts import reference_rate
from train.window import ALLOWED

Floats = npt.NDArray[np.float64]
BAND = (0.1, 0.9)  # quantiles of the seeds: the middle 80 %
ROLES = ("activation", "weight", "gradient")
SHARES = ("flushed", "clipped")


class Number(NamedTuple):
    """A number with its limits; NaN where there is none."""

    value: float
    low: float
    high: float


class Spread(NamedTuple):
    """Over seeds: the median and the quantiles of `BAND`, each infinite where so many runs are lost; and how many there are."""

    median: float
    low: float
    high: float
    runs: int


class Edges(NamedTuple):
    """The largest stable rate with its counts and the next higher that is not; NaN where there is none, "3/8" else."""

    largest: float
    largest_counts: str
    unstable: float
    unstable_counts: str


def spread(values: Floats) -> Spread:
    """Of the losses of a cell's runs."""
    if not values.size:
        return Spread(math.nan, math.nan, math.nan, 0)
    known = np.sort(np.where(np.isfinite(values), values, np.inf))
    low, high = (float(known[round(q * (known.size - 1))]) for q in BAND)  # no mean of a loss and infinity
    return Spread(float(np.median(known)), low, high, known.size)


def losses(part: Part, recipe: str, rate: float | None = None) -> Floats:
    """Final validation losses of a recipe's runs, at one rate or at all; NaN and infinities as they are."""
    runs = part.runs
    chosen = part.names == recipe
    if rate is not None:
        chosen &= runs["learning_rate"].values == rate
    return np.asarray(runs["final_validation_loss"].values[chosen], np.float64)


def curve(part: Part, recipe: str) -> tuple[Floats, list[Spread]]:
    """The rates at which a recipe has runs, and its losses there."""
    own = part.names == recipe
    rates = np.unique(part.runs["learning_rate"].values[own].astype(np.float64))
    return rates, [spread(losses(part, recipe, rate)) for rate in rates]


@once
def reference(evidence: Evidence, part: Part) -> float:
    """The learning rate that is best for the baseline; NaN where it has none."""
    return reference_rate(part.grid, evidence.baseline) if evidence.baseline in part.recipes else math.nan


@once
def shares(part: Part) -> xr.Dataset:
    """Runs, diverged runs and exact intervals by recipe and learning rate."""
    return stability_table(part.runs)


def by_definition(part: Part, recipe: str) -> dict[str, tuple[int, int]]:
    """How many runs of a recipe each definition counts as diverged, of how many."""
    own = part.names == recipe
    return {name: (int(part.runs.variables[name][own].sum()), int(own.sum())) for name in DEFINITIONS}


def verdict_row(found: xr.Dataset | str, recipe: str) -> dict[str, Any]:
    """A recipe's numbers of a verdict; empty where there is none."""
    if isinstance(found, str) or recipe not in found["recipe"].values:
        return {}
    place = found["recipe"].values.tolist().index(recipe)
    return {str(name): of.values[place : place + 1].item() for name, of in found.data_vars.items()}


def number(row: Mapping[str, Any], name: str) -> Number:
    """A statistic of a verdict's row with its limits. A recipe that trains at no rate has no sensitivity; it would be 0."""
    if name == "sensitivity" and math.isnan(row.get("optimum", math.nan)):
        return Number(math.nan, math.nan, math.nan)
    if name == "window":
        return Number(*(row.get(f"window{end}", math.nan) for end in ("", "_at_least", "_at_most")))
    return Number(*(row.get(f"{name}{end}", math.nan) for end in ("", "_low", "_high")))


def edges_of(part: Part, recipe: str) -> Edges:
    """The largest rate at which at most `ALLOWED` of the runs diverged, without one below it, from the lowest such rate up, at
    which more did.
    """
    table = shares(part)
    place = table["recipe"].values.tolist().index(recipe)
    k, n, rate = (table[name].values[place] for name in ("k", "n", "rate"))
    rates, k, n, rate = (of[n > 0] for of in (table["learning_rate"].values, k, n, rate))
    found = edge({i: bool(of <= ALLOWED) for i, of in enumerate(rate.tolist())})

    def at(place: int | None) -> tuple[float, str]:
        if place is None:
            return math.nan, ""
        return float(rates[place]), f"{int(k[place])}/{int(n[place])}"

    return Edges(*at(found.largest), *at(found.unstable))


def rounding_gaps(part: Part) -> Iterator[tuple[Numerics, Numerics, str, str, Number, int]]:
    """The loss of each unscaled format by one rounding above that by nearest even: both, their recipes, the penalty and pairs."""
    kinds = {recipe: part.numerics(recipe) for recipe in part.recipes}
    for recipe, kind in kinds.items():
        if kind.rounding in ("native", "nearest even", "mixed") or kind.mantissa_bits is None:
            continue
        same = replace(kind, rounding="nearest even")
        for other, against in kinds.items():
            if against == same:
                value, low, high, pairs = loss_penalty(part.grid, recipe, other)
                yield kind, against, recipe, other, Number(value, low, high), pairs


def has_signals(evidence: Evidence) -> bool:
    """Whether the dataset kept what is clipped and flushed."""
    return "signals" in evidence.tree.children and all(name in evidence.tree["signals"].data_vars for name in SHARES)


def signal_share(evidence: Evidence, part: Part, recipe: str, which: str, role: str, rate: float) -> Number:
    """Share of a role's elements that are flushed, or clipped, in the layer where it is most, mean over steps: the median of the
    runs at a rate, of all where it is NaN, and the least and the largest. Diverged runs count.

    Not the mean over layers: below one whose gradient is flushed altogether all is zero, and of nothing nothing is flushed.
    """
    runs = part.runs
    chosen = part.names == recipe
    if math.isfinite(rate):
        chosen &= runs["learning_rate"].values == rate
    values = evidence.tree["signals"].to_dataset()[which].sel(run=runs["run"].values[chosen], role=role)
    each = values.mean("signal_step", skipna=True).max("tensor").values.astype(np.float64)
    known = each[np.isfinite(each)]
    return (
        Number(float(np.median(known)), float(known.min()), float(known.max()))
        if known.size
        else Number(*[math.nan] * 3)
    )


class Endings(NamedTuple):
    """How a recipe's diverged runs ended: not finite; at the text's unigram entropy, within the margin; above that."""

    diverged: int
    lost: int
    collapsed: int
    above: int
    median_step: float


def endings(part: Part, recipe: str) -> Endings:
    """Of all learning rates. What is neither of the three ended below the entropy, and diverged by another definition."""
    own = (part.names == recipe) & part.runs["diverged"].values.astype(bool)
    final, entropy, steps = (
        part.runs[name].values[own].astype(np.float64) for name in ("final_loss", "unigram_entropy", "diverged_step")
    )
    margin = float(part.runs.attrs.get("progress_margin", 0.1))
    finite = np.isfinite(final)
    collapsed = finite & (np.abs(final - entropy) <= margin)
    return Endings(
        int(own.sum()), int((~finite).sum()), int(collapsed.sum()), int((finite & (final > entropy + margin)).sum()),
        float(np.median(steps)) if steps.size else math.nan,
    )  # fmt: skip
