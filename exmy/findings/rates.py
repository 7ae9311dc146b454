"""Figures along learning rates and sizes: final losses with seed bands, a heat map of diverged runs; the boundary by size."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from exmy.figure import limits
from exmy.findings.canvas import (
    GREY,
    Drawing,
    Floats,
    Style,
    bar,
    beside,
    legend_below,
    mark,
    ordered_styles,
    plain,
    rate_axis,
    sheet,
    styles,
)
from exmy.findings.numbers import curve, edges_of, number, shares, verdict_row
from exmy.findings.studies import Evidence, Part, sizes_apart
from exmy.findings.tables import in_table_order
from train.window import ALLOWED

EDGE, FEW = 1.08, 3
CROWDED = 14  # columns of a heat map beyond which numbers don't fit


def rate_drawings(evidence: Evidence, section: str) -> Iterator[Drawing]:
    """A figure for each part of a study: losses, and shares of diverged runs, against the learning rate."""
    ends = loss_ends(evidence)
    for i, part in enumerate(evidence.parts):
        where = f", {part.label}" if part.label else ""
        yield Drawing(
            section,
            f"{evidence.name}-rates" + (f"-{i + 1}" if len(evidence.parts) > 1 else ""),
            f"Final validation loss against learning rate, median and middle 80 % of seeds, and the share of runs that "
            f"diverged, by recipe{where}{_beyond(part, ends)}",
            lambda part=part: against_rates(evidence, part, ends),  # type: ignore[misc]
        )


def _beyond(part: Part, ends: tuple[float, float]) -> str:
    """What marks at the upper edge mean, where there are any."""
    medians = [each.median for name in part.recipes for each in curve(part, name)[1]]
    top = _edge(ends)
    marks = [
        f"a {shape}: {what}"
        for shape, what, there in (
            ("triangle", "a median beyond it", any(top < of < math.inf for of in medians)),
            ("cross", "half of the runs or more are not finite", any(not math.isfinite(of) for of in medians)),
        )
        if there
    ]
    return f"; at the upper edge {', '.join(marks)}" if marks else ""


def _edge(ends: tuple[float, float]) -> float:
    return ends[1] - 0.03 * (ends[1] - ends[0])


def loss_ends(evidence: Evidence) -> tuple[float, float]:
    """The loss axis, the same for all parts: up to a little above the texts' unigram entropy, where nothing is learnt."""
    edge = EDGE * float(evidence.summary["unigram_entropy"].max())
    each = [s for part in evidence.parts for recipe in part.recipes for s in curve(part, recipe)[1]]
    values = np.array([x for s in each for x in (s.median, s.low, s.high) if math.isfinite(x)], np.float64)
    return limits(values, edge, headroom=0.08)


def against_rates(evidence: Evidence, part: Part, ends: tuple[float, float]) -> Figure:
    """Above, the losses; below, on the same axis, how many of the runs diverged."""
    names = in_table_order(evidence, part)
    looks = ordered_styles(names, evidence.baseline)
    figure, axes = sheet((2.7, 0.75 + 0.21 * len(names)), sharex=True)
    top, bottom = axes[:, 0]
    _losses(top, part, names, looks, ends)
    _heat(bottom, part, names)
    rate_axis(top, part.rates, named=False)
    rate_axis(bottom, part.rates)
    handles = [Line2D([], [], label=plain(name), **looks[name].line) for name in names]
    entropy = np.unique(part.runs["unigram_entropy"].values)
    if any(ends[0] < value < ends[1] for value in entropy):
        handles.append(Line2D([], [], color=GREY, ls=":", label="unigram entropy"))
    legend_below(figure, handles)
    return figure


def _losses(
    axes: Axes, part: Part, names: Sequence[str], looks: Mapping[str, Style], ends: tuple[float, float]
) -> None:
    low, high = ends
    axes.set_ylim(low, high)
    for value in np.unique(part.runs["unigram_entropy"].values):
        axes.axhline(value, color=GREY, ls=":", lw=1.1, zorder=1)
    top = _edge(ends)
    for i, name in enumerate(names):
        rates, found = curve(part, name)
        x = rates * 2 ** beside(i, len(names), 0.35 * _spacing(part))
        medians, lows, highs = (np.array([getattr(s, of) for s in found]) for of in ("median", "low", "high"))
        style = looks[name]
        if len(names) <= FEW:
            axes.fill_between(
                x, np.minimum(lows, high), np.minimum(highs, high), color=style.colour, alpha=0.13, lw=0, zorder=2
            )
        else:  # many areas over each other would hide what they show
            axes.vlines(
                x, np.minimum(lows, high), np.minimum(highs, high), color=style.colour, lw=1.0, alpha=0.7, zorder=2
            )
        inside = medians <= top
        axes.plot(x, _within(medians, top), color=style.colour, zorder=3)
        axes.plot(x[inside], medians[inside], zorder=3, **style.point)
        for at, median in zip(x[~inside], medians[~inside], strict=True):
            mark(axes, float(at), top, style, "^" if math.isfinite(median) else "x")
    axes.set_ylabel("final validation loss\n(nats/token)")


def _within(medians: Floats, top: float) -> Floats:
    """A line that leaves the picture ends at its edge; between two points outside there is none."""
    inside = np.pad(medians <= top, 1)
    near = inside[:-2] | inside[1:-1] | inside[2:]
    return np.where(near, np.minimum(medians, top), np.nan)


def _spacing(part: Part) -> float:
    return float(np.diff(np.log2(part.rates)).min()) if len(part.rates) > 1 else 1.0


def _heat(axes: Axes, part: Part, names: Sequence[str]) -> None:
    """Shares in %, a row a recipe; a cell without runs is crossed."""
    table = shares(part).sel(recipe=list(names))
    rates, share = table["learning_rate"].values, table["rate"].values.astype(np.float64)
    logs = np.log2(rates)
    half = _spacing(part) / 2
    middles = (logs[1:] + logs[:-1]) / 2
    x = 2 ** np.concatenate([[logs[0] - half], middles, [logs[-1] + half]])
    shades = matplotlib.colormaps["Oranges"].with_extremes(bad="#FFFFFF")
    axes.pcolormesh(
        x, np.arange(len(names) + 1), np.ma.masked_invalid(share), cmap=shades, vmin=0, vmax=1, lw=0.6, ec="white"
    )
    for i, j in np.ndindex(*share.shape):
        value, x_middle = float(share[i, j]), math.sqrt(float(x[j] * x[j + 1]))
        words = "" if math.isnan(value) else f"{100 * value:.0f}"
        if words and len(rates) <= CROWDED:
            dark = value > 0.6
            axes.text(
                x_middle, i + 0.5, words, ha="center", va="center", fontsize=7, color="white" if dark else "black"
            )
        elif math.isnan(value):
            axes.text(x_middle, i + 0.5, "·", ha="center", va="center", fontsize=7, color=GREY)
    axes.set_ylim(len(names), 0)
    axes.set_yticks(np.arange(len(names)) + 0.5, [plain(name) for name in names])
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False)
    axes.set_ylabel("diverged (%)")


def size_drawings(evidence: Evidence) -> Iterator[Drawing]:
    """The boundary against parameters, a figure for each setting of all else that varies."""
    apart = sizes_apart(evidence.parts)
    for i, (label, parts) in enumerate(apart.items()):
        yield Drawing(
            "size",
            "size" + (f"-{i + 1}" if len(apart) > 1 else ""),
            f"Against the number of parameters, by recipe: the largest learning rate at which at most {100 * ALLOWED:g} % of "
            "the runs diverged, with a line up to the next rate tried, at which more did; and the loss penalty with 95 % "
            "intervals" + (f"; {label}" if label else ""),
            lambda parts=parts: against_size(evidence, parts),  # type: ignore[misc]
        )


def size_words(parameters: float) -> str:
    """Such as 0.82M, 12M, 10k."""
    return f"{parameters / 1e6:.2g}M" if parameters >= 1e5 else f"{parameters / 1e3:.2g}k"


def against_size(evidence: Evidence, of_sizes: Sequence[Part]) -> Figure:
    """Above, the largest stable rate; below, the loss penalty."""
    parts = [(part, evidence.verdicts[evidence.parts.index(part)]) for part in of_sizes]
    names = list(dict.fromkeys(name for part, _ in parts for name in in_table_order(evidence, part)))
    looks = styles(names, evidence.baseline)
    figure, axes = sheet((2.2, 2.0), sharex=True)
    above, below = axes[:, 0]
    rates = sorted({rate for part, _ in parts for rate in part.rates})
    above.set_xscale("log")
    penalties = {
        name: [
            (part.parameters, number(verdict_row(of, name), "loss_penalty"))
            for part, of in parts
            if name in part.recipes
        ]
        for name in names
        if name != evidence.baseline
    }
    known = [x for of in penalties.values() for _, n in of for x in n if math.isfinite(x)]
    span = (max([0.0, *known]) - min([0.0, *known])) or 0.1
    ends = min([0.0, *known]) - 0.06 * span, max([0.0, *known]) + 0.1 * span
    below.set_ylim(ends)
    for i, name in enumerate(names):
        aside = 1.09 ** beside(i, len(names), 2.0)
        found = [(part.parameters * aside, edges_of(part, name)) for part, _ in parts if name in part.recipes]
        there = [(x, e) for x, e in found if math.isfinite(e.largest)]
        above.plot([x for x, _ in there], [e.largest for _, e in there], zorder=3, **looks[name].line)
        for x, e in found:
            if math.isfinite(e.largest):
                top = e.unstable if math.isfinite(e.unstable) else rates[-1] * 1.3
                bar(above, x, e.largest, top, looks[name], (0.0, rates[-1] * 1.2))
            else:
                mark(above, x, rates[0] / 1.3, looks[name], "x")
        for parameters, of in penalties.get(name, []):
            x = parameters * aside
            if math.isfinite(of.value):
                bar(below, x, of.low, of.high, looks[name], ends)
            else:
                mark(below, x, ends[1], looks[name], "x")
        line = [(parameters * aside, of.value) for parameters, of in penalties.get(name, []) if math.isfinite(of.value)]
        below.plot([x for x, _ in line], [y for _, y in line], zorder=3, **looks[name].line)
    rate_axis(above, rates, vertical=True, named=False)
    above.set_ylabel("largest stable\nlearning rate")
    below.axhline(0.0, color="#000000", lw=0.8, zorder=1)
    below.set_ylabel("loss penalty\n(nats/token)")
    below.set_xlabel("parameters")
    sizes = sorted({part.parameters for part, _ in parts})
    below.xaxis.set_major_locator(FixedLocator(sizes))
    below.xaxis.set_minor_locator(NullLocator())
    below.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size_words(value)))
    legend_below(figure, [*(Line2D([], [], label=plain(name), **looks[name].line) for name in names),
                          Line2D([], [], ls="", marker="^", color=GREY, label="beyond the rates tried"),
                          Line2D([], [], ls="", marker="x", color=GREY, label="at no rate that was tried")])  # fmt: skip
    return figure
