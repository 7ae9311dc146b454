"""Figures along bits: windows and sensitivities, loss penalties by rounding and by scale, and what is flushed and clipped."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from exmy.findings.canvas import (
    Drawing,
    Style,
    bar,
    beside,
    legend_below,
    mark,
    plain,
    plain_numbers,
    sheet,
    styles,
    whole_axis,
)
from exmy.findings.numbers import ROLES, SHARES, Number, number, reference, signal_share, verdict_row
from exmy.findings.studies import Evidence, Part, power

LINEAR_UP_TO = (
    25.0  # the largest over the median of penalties, beyond which an axis of them is logarithmic away from zero
)
LEAST_SHARE = 1e-5
PARTING: dict[str, Callable[[Any], str]] = {  # how each is called beside another, where it varies
    "rounding": str,
    "scaling": str,
    "exponent_bits": lambda bits: f"E{bits}",
    "mantissa_bits": lambda bits: f"M{bits}",
    "loss_scale": lambda scale: (
        "dynamic loss scale" if scale is None else f"loss scale {power(scale)}" if scale != 1 else ""
    ),
}


class Point(NamedTuple):
    """A recipe's statistic at its bits."""

    bits: int
    of: Number


Series = Mapping[str, Sequence[Point]]


def series_of(
    part: Part, verdict: xr.Dataset | str, baseline: str, which: str, statistic: str, by: str
) -> dict[str, list[Point]]:
    """A statistic of every simulated recipe against its bits, rising; by: "rounding" or "scaling", by which a series is called.

    Whatever else differs between the recipes parts them too, so that a line joins only what differs in the bits of the axis.
    """
    every = {recipe: part.numerics(recipe) for recipe in part.recipes if recipe != baseline}
    simulated = {r: n for r, n in every.items() if not n.native and getattr(n, which) is not None}
    rest = [field for field in PARTING if field not in (which, by)]
    varied = [field for field in rest if len({getattr(n, field) for n in simulated.values()}) > 1]
    found: dict[str, list[Point]] = {}
    for recipe, numerics in simulated.items():
        name = ", ".join(filter(None, [getattr(numerics, by), *(PARTING[f](getattr(numerics, f)) for f in varied)]))
        value = number(verdict_row(verdict, recipe), statistic)
        found.setdefault(name, []).append(Point(getattr(numerics, which), value))
    return {name: sorted(points) for name, points in found.items()}


def window_drawing(evidence: Evidence) -> Drawing:
    """Of the mantissa study."""
    return Drawing(
        "mantissa", "mantissa-windows",
        "Width of the stable window of learning rates, and LR sensitivity, against mantissa bits, with 95 % intervals; the "
        "dashed line and the grey band are the baseline's",
        lambda: windows(evidence),
    )  # fmt: skip


def windows(evidence: Evidence) -> Figure:
    """Above, the window; below, the sensitivity; a column a part."""
    both = list(zip(evidence.parts, evidence.verdicts, strict=True))
    figure, axes = sheet((1.9, 1.9), len(both), sharex=True, sharey="row")
    looks: dict[str, Style] = {}
    bits: set[int] = set()
    for row, (statistic, label) in enumerate(
        (("window", "stable window\n(octaves)"), ("sensitivity", "LR sensitivity\n(nats/token)"))
    ):
        each = [series_of(part, of, evidence.baseline, "mantissa_bits", statistic, "rounding") for part, of in both]
        bases = [number(verdict_row(of, evidence.baseline), statistic) for _, of in both]
        known = [x for series in each for points in series.values() for p in points for x in p.of if math.isfinite(x)]
        top = 1.12 * max([*known, *(x for base in bases for x in base if math.isfinite(x)), 0.05])
        if statistic == "window":  # at most the whole grid
            top = max(top, 1.12 * max(math.log2(part.rates[-1] / part.rates[0]) for part, _ in both))
        ends = -0.04 * top, top
        looks |= styles(list(dict.fromkeys(name for series in each for name in series)))
        for column, (series, base) in enumerate(zip(each, bases, strict=True)):
            panel = axes[row, column]
            panel.set_ylim(ends)
            if math.isfinite(base.value):
                panel.axhline(base.value, color="#000000", ls="--", lw=1.1, zorder=1)
                low, high = (
                    (0.0 if math.isnan(base.low) else base.low),
                    (base.value if math.isnan(base.high) else base.high),
                )
                panel.axhspan(low, min(high, top), color="#EDEDED", lw=0, zorder=0)
            _series(panel, series, ends, looks, least=0.0)
            bits |= {p.bits for points in series.values() for p in points}
            if row == 0 and both[column][0].label:
                panel.set_title(plain(both[column][0].label), loc="left")
        axes[row, 0].set_ylabel(label)
    for panel in axes[1]:
        if bits:
            whole_axis(panel, sorted(bits), "mantissa bits")
    handles = [Line2D([], [], label=plain(name), **style.line) for name, style in looks.items()]
    handles.append(Line2D([], [], color="#000000", ls="--", label=plain(evidence.baseline)))
    legend_below(figure, handles)
    return figure


def _series(
    axes: Axes, series: Series, ends: tuple[float, float], looks: Mapping[str, Style], least: float = -math.inf
) -> None:
    """Lines with intervals, side by side, none below `least`; a cross at the upper edge where a recipe has no such number."""
    for i, (name, points) in enumerate(series.items()):
        aside, style = beside(i, len(series)), looks[name]
        there = [p for p in points if math.isfinite(p.of.value)]
        axes.plot([p.bits + aside for p in there], [p.of.value for p in there], zorder=3, **style.line)
        for p in points:
            if math.isfinite(p.of.value):
                # A limit that is not there: of a window, nothing is shown to be in it; of one pair, no interval.
                low = (least if math.isfinite(least) else p.of.value) if math.isnan(p.of.low) else p.of.low
                high = p.of.value if math.isnan(p.of.high) else p.of.high
                bar(axes, p.bits + aside, max(low, least), high, style, ends)
            else:
                mark(axes, p.bits + aside, ends[1], style, "x")


def penalty_drawing(evidence: Evidence, section: str, which: str, by: str) -> Drawing:
    """Of the studies of roundings and scales. which: the bits of the axis; by: what the series are, "rounding" or "scaling"."""
    axis = which.replace("_", " ")
    every = [p.of for series in _penalties(evidence, which, by) for points in series.values() for p in points]
    threshold = penalty_axis(every)[1]
    return Drawing(
        section, section,
        f"Loss penalty against {axis}, by {by}, each recipe at its own best learning rate, with 95 % intervals"
        + (f", on an axis that is linear within {threshold:.2g} of zero and logarithmic beyond" if threshold else "")
        + ("; a cross at the upper edge: trains at no rate" if any(math.isnan(of.value) for of in every) else ""),
        lambda: penalties(evidence, which, by),
    )  # fmt: skip


def _penalties(evidence: Evidence, which: str, by: str) -> list[Series]:
    return [
        series_of(part, of, evidence.baseline, which, "loss_penalty", by)
        for part, of in zip(evidence.parts, evidence.verdicts, strict=True)
    ]


def penalties(evidence: Evidence, which: str, by: str) -> Figure:
    """Loss penalties against bits, a panel a part."""
    each = _penalties(evidence, which, by)
    figure, axes = sheet([2.7 if len(each) == 1 else 2.0] * len(each), sharex=True, sharey=True)
    every = [p for series in each for points in series.values() for p in points]
    ends, threshold = penalty_axis([p.of for p in every])
    looks = styles(list(dict.fromkeys(name for series in each for name in series)))
    for part, series, panel in zip(evidence.parts, each, axes[:, 0], strict=True):
        if threshold:
            panel.set_yscale("symlog", linthresh=threshold, linscale=1.2)
            plain_numbers(panel.yaxis, threshold)
        panel.set_ylim(ends)
        panel.axhline(0.0, color="#000000", lw=0.8, zorder=1)
        _series(panel, series, ends, looks)
        if part.label:
            panel.set_title(plain(part.label), loc="left")
    if every:
        whole_axis(axes[-1, 0], sorted({p.bits for p in every}), which.replace("_", " "))
    figure.supylabel(
        f"final training loss above\n{plain(evidence.baseline)}'s (nats/token)", fontsize=8.5, multialignment="center"
    )
    legend_below(figure, [Line2D([], [], label=plain(name), **style.line) for name, style in looks.items()])
    return figure


def penalty_axis(of: Sequence[Number]) -> tuple[tuple[float, float], float]:
    """The ends of an axis of penalties, and up to where it is linear; 0 where it is so throughout."""
    known = [x for each in of for x in each if math.isfinite(x)]
    largest, least = max([0.0, *known]), min([0.0, *known])
    span = (largest - least) or 0.1
    values = sorted(abs(each.value) for each in of if math.isfinite(each.value))
    middle = values[len(values) // 2] if values else 0.0
    if middle and largest > LINEAR_UP_TO * middle:
        return (least - 0.5 * max(abs(least), middle), 1.6 * largest), max(2 * middle, 5e-3)
    return (least - 0.06 * span, largest + 0.1 * span), 0.0


def signal_drawings(evidence: Evidence) -> Iterator[Drawing]:
    """Of the exponent study, two parts a figure."""
    pairs = [evidence.parts[i : i + 2] for i in range(0, len(evidence.parts), 2)]
    for i, parts in enumerate(pairs):
        yield _signal_drawing(evidence, parts, "exponent-signals" + (f"-{i + 1}" if len(pairs) > 1 else ""))


def _signal_drawing(evidence: Evidence, parts: Sequence[Part], name: str) -> Drawing:
    return Drawing(
        "signals", name,
        "Shares of elements flushed to zero and clipped, of activations, weights and gradients, in the layer where that is most, "
        "against exponent bits: the median of the runs at the baseline's best rate, from the least to the largest; axes are "
        f"linear up to {100 * LEAST_SHARE:g} %, and logarithmic beyond",
        lambda: signals(evidence, parts),
    )  # fmt: skip


def signals(evidence: Evidence, parts: Sequence[Part]) -> Figure:
    """A column a part, a row a share."""
    figure, axes = sheet((1.8, 1.8), len(parts), sharex=True, sharey=True)
    looks = styles(ROLES)
    bits: set[int] = set()
    for column, part in enumerate(parts):
        rate = reference(evidence, part)
        recipes = _of_one_mantissa(part)
        for row, which in enumerate(SHARES):
            panel = axes[row, column]
            panel.set_yscale("symlog", linthresh=LEAST_SHARE, linscale=0.5)
            panel.set_ylim(-2e-6, 1.6)
            panel.set_yticks([0, 1e-4, 1e-3, 1e-2, 0.1, 1], ["0", "0.01 %", "0.1 %", "1 %", "10 %", "100 %"])
            panel.minorticks_off()
            for i, role in enumerate(ROLES):
                found = [
                    (b, signal_share(evidence, part, name, which, role, rate)) for b, name in recipes if b is not None
                ]
                there = sorted((b + beside(i, len(ROLES), 0.4), of) for b, of in found if math.isfinite(of.value))
                panel.plot([x for x, _ in there], [of.value for _, of in there], zorder=3, **looks[role].line)
                for x, of in there:
                    panel.plot([x, x], [of.low, of.high], color=looks[role].colour, lw=1.1, marker="", zorder=2)
                bits |= {b for b, _ in found}
            if column == 0:
                panel.set_ylabel(which)
        if part.label:
            axes[0, column].set_title(plain(part.label), loc="left")
    for panel in axes[1]:
        if bits:
            whole_axis(panel, sorted(bits), "exponent bits")
    legend_below(figure, [Line2D([], [], label=role, **looks[role].line) for role in ROLES])
    return figure


def _of_one_mantissa(part: Part) -> list[tuple[int | None, str]]:
    """Exponent bits and names of the simulated recipes with as many mantissa bits as most have."""
    kinds = {name: kind for name in part.recipes if not (kind := part.numerics(name)).native}
    most = Counter(kind.mantissa_bits for kind in kinds.values()).most_common(1)
    return [(kind.exponent_bits, name) for name, kind in kinds.items() if kind.mantissa_bits == most[0][0]]


def nothing(verdicts: Sequence[xr.Dataset | str]) -> bool:
    """Whether no part of a study has a verdict to draw."""
    return all(isinstance(of, str) for of in verdicts)
