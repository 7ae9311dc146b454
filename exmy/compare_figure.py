"""A forest plot: what each recipe costs, a line a recipe in the study's order, its 95 % interval, and each seed's difference.

Left the final validation loss, right the final training loss, as differences from the baseline in nats/token; the grey band is
the baseline's own standard deviation over seeds, to each side, for scale. A difference far beyond the others would squeeze them
all onto the zero line: it is an arrow at the edge with its number beside it. Nothing hangs on colour: the mark of an interval
without zero has another shape, a diverged seed's dot is open.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from exmy.costs import Comparison, Cost, Panel, Row
from exmy.looks import COLOURS, LETTERING

WIDTH, LINE, AROUND, DPI = 16.0, 0.31, 1.5, 100  # inches: of the figure, of a recipe's line, above and below a panel
FITS = 4.0  # times the median reach of the recipes: what lies farther out is an arrow
BESIDE = 0.02  # of the axis' width, between an arrow and its number
WITHIN, APART, SURE = ("o", "#000000"), ("D", COLOURS[1]), ("s", COLOURS[0])
BAND = "#E9E9E9"
EDGE = 0.03  # of the axis' width, kept free at both ends


def compare_figure(comparison: Comparison, path: Path, picture: str = "png") -> None:
    """Draw a comparison into `path`, as the kind of file that `picture` names. OSError for a bad place."""
    panels = list(comparison.panels())
    lines = [max(1, len(panel.rows)) for panel in panels]
    with matplotlib.rc_context(LETTERING):
        height = 1.3 + sum(AROUND + LINE * n for n in lines)
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
        figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout=layout)
        axes = figure.subplots(len(panels), 2, squeeze=False, height_ratios=[AROUND + LINE * n for n in lines])
        for panel, (left, right) in zip(panels, axes, strict=True):
            ends = limits([cost for row in panel.rows for cost in (row.validation, row.training)])
            _draw(left, panel, "validation", ends, named=True)
            _draw(right, panel, "training", ends, named=False)
        count = f"{comparison.finished} runs" + (f", {comparison.missing} missing" if comparison.missing else "")
        title = f"{comparison.name}: difference from {comparison.baseline} ({count})"
        figure.suptitle(_plain(title), x=0.012, ha="left", fontsize=15)
        figure.legend(handles=_handles(), loc="outside lower center", ncols=3)
        figure.savefig(path, format=picture)


def reach(cost: Cost) -> float:
    """How far a recipe's interval and seeds lie from zero, nats/token; NaN without a difference."""
    return max(map(abs, _ends(cost)), default=math.nan)


def _ends(cost: Cost) -> list[float]:
    """All that is drawn of a recipe, nats/token."""
    return [x for x in (cost.difference.low, cost.difference.high, *cost.differences.values()) if math.isfinite(x)]


def limits(costs: list[Cost]) -> tuple[float, float]:
    """Ends of an axis that holds zero and all whose reach is at most `FITS` times the median reach."""
    reaches = [reach(cost) for cost in costs]
    known = [x for x in reaches if math.isfinite(x)]
    edge = FITS * float(np.median(known)) if known else 0.0
    inside = [cost for cost, x in zip(costs, reaches, strict=True) if x <= edge]
    finite = [0.0, *(x for cost in inside for x in _ends(cost))]
    low, high = min(finite), max(finite)
    margin = EDGE * ((high - low) or 1.0)
    return low - margin, high + margin


def _draw(axes: Axes, panel: Panel, what: str, ends: tuple[float, float], *, named: bool) -> None:
    costs = [_cost(row, what) for row in panel.rows]
    low, high = ends
    axes.set_xlim(low, high)
    axes.set_ylim(max(1, len(costs)) - 0.4, -0.6)
    sd = _cost(panel.baseline, what).sd if panel.baseline is not None else math.nan
    if math.isfinite(sd):
        axes.axvspan(max(-sd, low), min(sd, high), color=BAND, lw=0, zorder=0)
    axes.axvline(0.0, color="#000000", lw=1.2, zorder=1)
    for y, (row, cost) in enumerate(zip(panel.rows, costs, strict=True)):
        _recipe(axes, y, row, cost)
    axes.set_yticks(range(len(costs)), [_plain(_label(row)) for row in panel.rows] if named else [""] * len(costs))
    axes.tick_params(axis="y", length=0)
    axes.set_title(_plain(f"Final {what} loss, {panel.label}"), loc="left")
    axes.set_xlabel("difference from the baseline (nats/token)")


def _cost(row: Row, what: str) -> Cost:
    return row.validation if what == "validation" else row.training


def _label(row: Row) -> str:
    marks = [
        f"{len(runs)}/{len(row.runs)} {word}"
        for word, runs in (("diverged", row.diverged), ("not finite", row.lost))
        if runs
    ]
    return f"{row.recipe} ({', '.join(marks)})" if marks else row.recipe


def _recipe(axes: Axes, y: int, row: Row, cost: Cost) -> None:
    """One line: dots of the seeds, the interval and its mean; an arrow and words where they don't fit."""
    found, (low, high) = cost.difference, axes.get_xlim()
    if not math.isfinite(found.mean):
        axes.text(
            0.5,
            y,
            "no pair with finite losses",
            transform=axes.get_yaxis_transform(),
            ha="center",
            va="center",
            fontsize=10.5,
        )
        return
    marker, colour = _mark(cost)
    seeds = np.array(list(cost.differences.values()))
    if min(_ends(cost)) < low or max(_ends(cost)) > high:
        right = found.mean > 0
        edge, inward = (high, -1) if right else (low, 1)
        width = (high - low) * inward
        axes.plot([edge + EDGE * width / 2], [y], marker=">" if right else "<", ms=9, color=colour, zorder=4)
        words = (
            f"{abs(found.mean):.2f} {'higher' if right else 'lower'}, seeds {seeds.min():+.2f} to {seeds.max():+.2f}"
        )
        axes.text(
            edge + (EDGE + BESIDE) * width,
            y,
            words,
            ha="right" if right else "left",
            va="center",
            fontsize=10.5,
            zorder=4,
        )
        return
    diverged = np.array([name in row.diverged for name in cost.differences])
    style: dict[str, Any] = {"ls": "", "marker": "o", "ms": 3.8, "mec": "#7A7A7A", "mew": 0.9, "zorder": 2}
    for those, face in ((~diverged, "#9A9A9A"), (diverged, "#FFFFFF")):
        axes.plot(seeds[those], np.full(those.sum(), y), mfc=face, **style)
    if math.isfinite(found.low):
        axes.plot([found.low, found.high], [y, y], color=colour, lw=2.2, zorder=3, solid_capstyle="butt")
    axes.plot([found.mean], [y], marker=marker, ms=7, color=colour, zorder=4)


def _mark(cost: Cost) -> tuple[str, str]:
    found = cost.difference
    if not (found.low > 0 or found.high < 0):
        return WITHIN
    return SURE if found.p_holm < 0.05 else APART


def _handles() -> list[Line2D | Patch]:
    dot: dict[str, Any] = {"ls": "", "marker": "o", "ms": 5, "mec": "#7A7A7A"}

    def mean(look: tuple[str, str], label: str) -> Line2D:
        return Line2D([], [], marker=look[0], color=look[1], lw=2.2, ms=7, label=label)

    return [
        mean(WITHIN, "mean, 95 % interval contains zero"),
        mean(APART, "interval without zero, Holm p at least 0.05"),
        mean(SURE, "interval without zero, Holm p below 0.05"),
        Line2D([], [], mfc="#9A9A9A", label="one seed's pair of runs", **dot),
        Line2D([], [], mfc="#FFFFFF", label="the same, diverged", **dot),
        Patch(color=BAND, label="the baseline's SD over seeds, to each side"),
    ]


def _plain(text: str) -> str:
    """Text that matplotlib won't read as mathematics."""
    return text.replace("$", r"\$")
