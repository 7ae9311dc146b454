"""One picture of a study: which recipes train at which learning rates, and how their losses ran.

Left, the final loss of every run against its learning rate, a point a seed and a line through the seed medians: a
recipe that is as safe as the baseline has its line on the baseline's, as wide and as low. Right, the loss curves at the
learning rate that suits the baseline best, the one at which a change of format alone would be tried. The dotted line is
the text's unigram entropy: a run that ends there has learnt nothing from context.

No run is left out of the picture. A diverged run is an open marker; a loss that is not finite has no place on an axis
and is a cross at its upper edge, counted above it; a finite loss above the axis is a triangle at the edge. How
a recipe is drawn is `looks`'s.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from exmy.groups import groups
from exmy.looks import LETTERING, Look, in_order, recipe_looks

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

WIDTH, ROW_HEIGHT, DPI = 16.0, 5.6, 100  # inches; 1600 pixels wide: a README shows them without shrinking the text away
FEW_SEEDS = 8  # up to here a thin line a seed; more become a band
POINTS = 800  # of a curve: what a panel can show


def study_figure(tree: xr.DataTree, path: Path) -> None:
    """Draw a study into a PNG at `path`: a row of two panels for each group of runs (see `groups`).

    tree: /history (run, step) train_loss, last_step; /summary (run) diverged, final_loss, unigram_entropy, each with
    the coordinates recipe, learning_rate and dataset; attributes `name` and `baseline` where there are any. Raises
    OSError where `path` can't be written.
    """
    history, summary = tree["history"].to_dataset(), tree["summary"].to_dataset()
    baseline = str(tree.attrs.get("baseline", ""))
    looks = recipe_looks(in_order(summary["recipe"]), baseline)
    rows = groups(summary)
    with matplotlib.rc_context(LETTERING):
        layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12)
        figure = Figure(figsize=(WIDTH, 1.2 + ROW_HEIGHT * len(rows)), dpi=DPI, layout=layout)
        axes = figure.subplots(len(rows), 2, squeeze=False, width_ratios=(1, 1))
        for row, (left, right) in zip(rows, axes, strict=True):
            group, curves = summary.isel(run=row.runs), history.isel(run=row.runs)
            rate, why = reference_rate(group, baseline)
            edge = highest(curves, group)
            _draw_final_losses(left, group, looks, edge)
            _draw_curves(right, curves, group, rate, looks, edge)
            label = f", {row.label}" if row.label else ""
            left.set_title(_plain(f"Final training loss{label}"), loc="left", pad=24)  # above the counts
            right.set_title(_plain(f"Training loss{label}\nat learning rate {rate:.3g}, {why}"), loc="left")
        name = tree.attrs.get("name")
        if name:
            count = "1 run" if summary.sizes["run"] == 1 else f"{summary.sizes['run']} runs"
            figure.suptitle(_plain(f"{name}: {count}"), x=0.012, ha="left", fontsize=15)
        handles = [*_recipe_handles(summary, looks), *_sign_handles(summary)]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), handlelength=3.2)
        figure.savefig(path, format="png")


def reference_rate(runs: xr.Dataset, baseline: str) -> tuple[float, str]:
    """The learning rate at which the baseline's seed-median of the final loss is lowest, and a few words that say so.

    A final loss that is not finite counts as infinite. Without runs of the baseline, the best rate of any recipe; where
    every median is infinite, the lowest rate.
    """
    recipe, rate = runs["recipe"].values.astype(str), runs["learning_rate"].values.astype(np.float64)
    loss = _or_inf(runs["final_loss"].values)
    names, why = (
        ([baseline], f"the best of {baseline}") if baseline in recipe else (in_order(runs["recipe"]), "the best of all")
    )
    medians = {
        (float(np.median(loss[(recipe == name) & (rate == r)])), float(r))
        for name in names
        for r in np.unique(rate[recipe == name])
    }
    median, best = min(medians)
    return best, why if math.isfinite(median) else "the lowest"


def highest(history: xr.Dataset, runs: xr.Dataset) -> float:
    """Where an axis of losses ends, nats/token: a little above what a model that guesses evenly gets, ln of the vocabulary.

    A fresh model guesses almost evenly, so its first loss tells: the median over the runs; or the unigram entropy, should that be
    higher. Without a finite first loss, twice the unigram entropy. Nothing above is of interest but that it is there.
    """
    first = _finite(history["train_loss"].transpose("run", "step").values[:, 0])
    entropy = _finite(runs["unigram_entropy"].values)
    counting = float(entropy.max()) if entropy.size else 1.0
    return 1.04 * max(float(np.median(first)) if first.size else 2 * counting, counting)


def smoothed(loss: Floats, window: int) -> Floats:
    """Mean of the last `window` steps at each step, fewer at the start; NaN where one of them is not finite. [run, step]."""
    finite = np.isfinite(loss)
    count = np.minimum(np.arange(1, loss.shape[1] + 1), window)

    def trailing(values: Floats) -> Floats:
        total = np.cumsum(values, axis=1)
        total[:, window:] = total[:, window:] - total[:, :-window]
        return total

    # Cut first: one loss of 1e30 would stay in every later running sum.
    mean = trailing(np.where(finite, np.minimum(loss, 1e3), 0.0)) / count
    return np.where(trailing((~finite).astype(np.float64)) > 0, np.nan, mean)


def _draw_final_losses(axes: Axes, runs: xr.Dataset, looks: dict[str, Look], edge: float) -> None:
    recipe, rate = runs["recipe"].values.astype(str), runs["learning_rate"].values.astype(np.float64)
    loss, diverged = runs["final_loss"].values.astype(np.float64), runs["diverged"].values.astype(bool)
    rates = np.unique(rate)
    spacing, room = room_of(rates)
    entropy = np.unique(_finite(runs["unigram_entropy"].values))
    low, high = limits(np.concatenate([_finite(loss), entropy]), edge, headroom=0.16)
    axes.set_ylim(low, high)
    lost_at, above_at = high - 0.03 * (high - low), high - 0.08 * (high - low)
    for value in entropy:
        axes.axhline(value, color="#555555", ls=":", lw=1.6, zorder=1)
    for name, look in looks.items():
        own = recipe == name
        if not own.any():
            continue
        shift = 2 ** (look.aside * room)
        x = rate * shift * 2 ** (_spread(rate, own) * 0.25 / len(looks) * room)
        tried = np.unique(rate[own])
        medians = np.array([np.median(_or_inf(loss[own & (rate == r)])) for r in tried])
        axes.plot(tried * shift, _up_to(medians, above_at), color=look.colour, ls=look.dashes, lw=1.8, zorder=2)
        inside = own & (loss <= above_at)
        above, lost = own & np.isfinite(loss) & ~inside, own & ~np.isfinite(loss)
        for filled in (True, False):
            chosen = inside & (diverged != filled)
            _points(axes, x[chosen], loss[chosen], look, look.marker, filled=filled)
        _points(axes, x[above], np.full(above.sum(), above_at), look, 6, filled=True)
        _points(axes, x[lost], np.full(lost.sum(), lost_at), look, "x", filled=True)
    _count_lost(axes, rates, rate[~np.isfinite(loss)])
    _rate_axis(axes, rates, spacing)
    axes.set_ylabel("final training loss (nats/token)")


def room_of(rates: Floats) -> tuple[float, float]:
    """The least distance of ascending rates, and how much of it one rate's recipes may stand apart, in octaves."""
    spacing = float(np.diff(np.log2(rates)).min()) if rates.size > 1 else 1.0
    # A fifth of the axis is room enough for one rate's recipes; where rates are few, more would tear them apart.
    return spacing, min(spacing, 0.2 * (math.log2(rates[-1] / rates[0]) + spacing))


def _spread(rate: Floats, own: Bools) -> Floats:
    """Where a recipe's seeds stand beside each other at one rate: from -1 to 1 in their order, 0 for one alone."""
    place = np.zeros(rate.shape)
    for r in np.unique(rate[own]):
        here = own & (rate == r)
        place[here] = np.linspace(-1, 1, here.sum()) if here.sum() > 1 else 0.0
    return place


def _up_to(medians: Floats, edge: float) -> Floats:
    """A line that leaves the picture ends at its edge, and comes back from there; between two points outside there is none."""
    inside = np.pad(medians <= edge, 1)
    beside = inside[:-2] | inside[1:-1] | inside[2:]
    return np.where(beside, np.minimum(medians, edge), np.nan)


def _points(axes: Axes, x: Floats, y: Floats, look: Look, marker: Any, *, filled: bool) -> None:
    face = look.colour if filled else "white"
    size, edge = (8.5, 2.0) if marker == "x" else (7.0, 1.4)
    (line,) = axes.plot(x, y, ls="", marker=marker, ms=size, mfc=face, mec=look.colour, mew=edge, alpha=0.85, zorder=3)
    # Marks at the edge are drawn whole; the layout then must not make room for them as if they were text.
    line.set_clip_on(False)
    line.set_in_layout(False)


def _count_lost(axes: Axes, rates: Floats, lost: Floats) -> None:
    """Above the axis at each rate, how many runs' final loss is not finite."""
    for rate in rates:
        count = int((lost == rate).sum())
        if count:
            axes.annotate(
                f"{count}×", (rate, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 2), textcoords="offset points",
                ha="center", va="bottom", fontsize=11,
            )  # fmt: skip


def _rate_axis(axes: Axes, rates: Floats, spacing: float) -> None:
    axes.set_xscale("log", base=2)
    margin = 2 ** (0.5 * spacing)
    axes.set_xlim(rates[0] / margin, rates[-1] * margin)
    axes.xaxis.set_major_locator(FixedLocator(rates.tolist()))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    labels = [f"{r:.3g}" for r in rates]
    crowded = sum(map(len, labels)) > 55
    axes.set_xticks(rates.tolist(), labels, rotation=35 if crowded else 0, ha="right" if crowded else "center")
    axes.set_xlabel("peak learning rate (log scale)")


def _draw_curves(
    axes: Axes, history: xr.Dataset, runs: xr.Dataset, rate: float, looks: dict[str, Look], edge: float
) -> None:
    loss = history["train_loss"].transpose("run", "step").values.astype(np.float64)
    steps = history["step"].values.astype(np.float64)
    recorded = np.asarray(steps <= history["last_step"].values.astype(np.float64)[:, None])
    window = max(1, steps.size // 60)
    # A loss that is not finite up to last_step ends its run's curve with a cross; padding after it just ends it.
    curves = np.where(recorded, smoothed(loss, window), np.nan)
    recipe = runs["recipe"].values.astype(str)
    at_rate = runs["learning_rate"].values.astype(np.float64) == rate
    entropy = np.unique(_finite(runs["unigram_entropy"].values))
    low, high = limits(np.concatenate([_finite(curves[at_rate]), entropy]), edge, headroom=0.04)
    axes.set_ylim(low, high)
    for value in entropy:
        axes.axhline(value, color="#555555", ls=":", lw=1.6, zorder=1)
    shown = np.unique(np.linspace(0, steps.size - 1, min(POINTS, steps.size)).astype(int))
    for name, look in looks.items():
        own = at_rate & (recipe == name)
        if own.any():
            _draw_recipe(axes, steps, curves[own], recorded[own] & ~np.isfinite(curves[own]), look, shown)
    axes.set_xlim(steps[0], steps[-1] if steps.size > 1 else steps[0] + 1)
    axes.set_xlabel("step")
    unit = f"mean of {window} steps, " if window > 1 else ""
    axes.set_ylabel(f"training loss ({unit}nats/token)")


def _draw_recipe(
    axes: Axes, steps: Floats, curves: Floats, lost: Bools, look: Look, shown: npt.NDArray[np.int64]
) -> None:
    """One recipe's curves [run, step]: a strong line for the median, thin lines or a band for the seeds, lost ones crossed."""
    low, high = axes.get_ylim()
    if 1 < len(curves) <= FEW_SEEDS:
        axes.plot(steps[shown], curves[:, shown].T, color=look.colour, lw=0.8, alpha=0.35, zorder=2)
    elif len(curves) > FEW_SEEDS:
        some = np.any(np.isfinite(curves), axis=0)[shown]  # nanmin warns where there is nothing
        x, y = steps[shown][some], curves[:, shown][:, some]
        axes.fill_between(x, np.nanmin(y, axis=0), np.nanmax(y, axis=0), color=look.colour, alpha=0.15, lw=0, zorder=2)
    # A seed that is lost counts as infinite, so the median is lost with the seed in the middle.
    median = np.median(np.where(lost, np.inf, curves), axis=0)
    median = np.where(np.isfinite(median), median, np.nan)
    axes.plot(steps[shown], median[shown], color=look.colour, ls=look.dashes, lw=2.2, zorder=3)
    for curve, gone in zip(curves, lost, strict=True):
        if gone.any():
            at = int(gone.argmax())
            last = min(float(curve[at - 1]), high) if at else high
            _points(axes, steps[[at]], np.array([last]), look, "x", filled=True)
        over = np.isfinite(curve) & (curve > high)
        if over.any():
            _points(axes, steps[[int(over.argmax())]], np.array([high - 0.015 * (high - low)]), look, 6, filled=True)


def limits(values: Floats, edge: float, headroom: float) -> tuple[float, float]:
    """Limits of an axis around the values, robust against a few huge ones: those above `edge` are left out."""
    kept = values[values <= edge]
    low, high = (float(kept.min()), float(kept.max())) if kept.size else (0.0, edge)
    span = max(high - low, 0.5)  # nats; what lies closer than that is not worth the whole height
    middle = (low + high) / 2
    return middle - 0.56 * span, middle + (0.5 + headroom) * span


def _recipe_handles(summary: xr.Dataset, looks: dict[str, Look]) -> list[Line2D]:
    recipe, diverged = summary["recipe"].values.astype(str), summary["diverged"].values.astype(bool)
    return [
        Line2D(
            [], [], color=look.colour, ls=look.dashes, lw=2, marker=look.marker, ms=7.5,
            label=_plain(f"{name}: {diverged[recipe == name].sum()}/{(recipe == name).sum()} diverged"),
        )
        for name, look in looks.items()
    ]  # fmt: skip


def _sign_handles(summary: xr.Dataset) -> list[Line2D]:
    definition = str(summary["diverged"].attrs.get("definition", "")).replace("_", " ")
    grey: dict[str, Any] = {"ls": "", "ms": 8, "mec": "#555555", "mew": 1.6}
    return [
        Line2D([], [], color="#555555", ls=":", lw=1.6, label="unigram entropy: no better than counting tokens"),
        Line2D([], [], marker="o", mfc="white", label=f"diverged ({definition})" if definition else "diverged", **grey),
        Line2D([], [], marker="x", label="not finite, counted above (n×)", **grey),
        Line2D([], [], marker=6, mfc="#555555", label="finite, above the axis", **grey),
    ]


def _finite(values: npt.ArrayLike) -> Floats:
    array = np.asarray(values, np.float64)
    return array[np.isfinite(array)]


def _or_inf(values: npt.ArrayLike) -> Floats:
    array = np.asarray(values, np.float64)
    return np.where(np.isfinite(array), array, np.inf)


def _plain(text: str) -> str:
    """Text that matplotlib won't read as mathematics."""
    return text.replace("$", r"\$")
