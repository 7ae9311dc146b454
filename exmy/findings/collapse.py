"""Runs that learnt and lost it again: looked for after the runs, in the histories, since no count of final losses shows them.

A run counts whose smoothed training loss came well below the text's unigram entropy, where it knows no more than how often each
token occurs, and later rose to about that or above; it may come down again as the learning rate does, and end below it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from exmy.findings.canvas import GREY, Drawing, legend_below, ordered_styles, plain, sheet
from exmy.findings.numbers import by_definition
from exmy.findings.once import once
from exmy.findings.studies import Evidence, Part, departures
from exmy.findings.tables import at_rate, rate_words

DEEP, BACK = 0.5, 0.1  # nats: below the entropy, and around it
KEPT = 10  # steps of the history that are averaged


class Collapse(NamedTuple):
    """Of a recipe's runs at one rate: how many learnt and lost it again, and where their median went."""

    runs: int
    back: int
    lowest: float
    lowest_step: int
    highest: float
    highest_step: int
    end: float
    by: dict[str, tuple[int, int]]


def smoothed(evidence: Evidence, part: Part, recipe: str, rate: float) -> xr.DataArray | None:
    """Training losses of a recipe's runs at one rate, (run, step), means of kept steps; None where these are fewer."""
    own = (part.names == recipe) & (part.runs["learning_rate"].values == rate)
    if not own.any():
        return None
    loss = evidence.tree["history"].to_dataset()["train_loss"].sel(run=part.runs["run"].values[own])
    loss = loss.isel(step=np.isfinite(loss.values).any(axis=loss.get_axis_num("run")))
    found = loss.rolling(step=KEPT).mean().isel(step=slice(KEPT - 1, None))
    return found.transpose("run", "step") if found.sizes["step"] else None


def collapses(evidence: Evidence, part: Part, recipe: str, rate: float) -> Collapse | None:
    """None where there is no history, or no run was ever so far below the entropy."""
    loss = smoothed(evidence, part, recipe, rate)
    if loss is None:
        return None
    values = loss.values.astype(np.float64)
    entropy = float(part.runs["unigram_entropy"].values[0])
    learnt = np.maximum.accumulate(values < entropy - DEEP, axis=1)
    back = (learnt & ~(values < entropy - BACK)).any(axis=1)
    if not back.any():
        return None
    median = np.nanmedian(values, axis=0)
    steps = loss["step"].values
    highest = int(np.nanargmax(np.where(np.arange(median.size) > np.argmax(median < entropy - DEEP), median, -np.inf)))
    lowest = int(np.nanargmin(median[: highest + 1]))
    return Collapse(
        values.shape[0], int(back.sum()), float(median[lowest]), int(steps[lowest]), float(median[highest]),
        int(steps[highest]), float(median[-1]), by_definition(at_rate(part, rate), recipe),
    )  # fmt: skip


@once
def lost_again(evidence: Evidence) -> tuple[tuple[Part, float, str, Collapse], ...]:
    """Where most runs of a recipe did: the part, the rate, the recipe, and how."""
    each = (
        (part, rate, recipe, collapses(evidence, part, recipe, rate))
        for part in evidence.parts for rate in part.rates for recipe in part.recipes
    )  # fmt: skip
    return tuple((part, rate, name, of) for part, rate, name, of in each if of and 2 * of.back > of.runs)


def collapse_drawing(evidence: Evidence) -> Iterator[Drawing]:
    """Curves of the part and rate in which most runs learnt and lost it again."""
    found = [(of.back / of.runs, evidence.parts.index(part), rate) for part, rate, _, of in lost_again(evidence)]
    if found:
        _, place, rate = max(found)
        part = evidence.parts[place]
        yield Drawing(
            "conditions", "conditions-curves",
            f"Training loss, {departures(part, evidence.parts)}, at {rate_words(rate)}: the median of the seeds and, as a band, "
            f"the middle 80 %, means of {KEPT} kept steps",
            lambda: curves(evidence, part, rate),
        )  # fmt: skip


def curves(evidence: Evidence, part: Part, rate: float) -> Figure:
    """A line a recipe."""
    figure, axes = sheet((2.7,))
    panel = axes[0, 0]
    looks = ordered_styles(part.recipes, evidence.baseline)
    entropy = float(part.runs["unigram_entropy"].values[0])
    for i, recipe in enumerate(part.recipes):
        loss = smoothed(evidence, part, recipe, rate)
        if loss is None:
            continue
        low, median, high = np.nanquantile(loss.values, (0.1, 0.5, 0.9), axis=0)
        style = looks[recipe]
        panel.fill_between(loss["step"].values, low, high, color=style.colour, alpha=0.16, lw=0, zorder=2)
        every = slice(5 * i, None, max(1, len(median) // 8))
        panel.plot(loss["step"].values, median, color=style.colour, zorder=3, marker="")
        panel.plot(loss["step"].values[every], median[every], zorder=4, **style.point)
    panel.axhline(entropy, color=GREY, ls=":", lw=1.1, zorder=1)
    panel.set_xlabel("step")
    panel.set_ylabel("training loss (nats/token)")
    handles = [Line2D([], [], label=plain(name), **looks[name].line) for name in part.recipes]
    legend_below(figure, [*handles, Line2D([], [], color=GREY, ls=":", label="unigram entropy")])
    return figure
