"""What the findings' figures share: a sheet as wide as one column, lettering that stays readable there, looks, axes and edges.

Colours are Okabe and Ito's, or viridis where they stand for an order of bits; nothing hangs on colour alone. No figure has a
title: its words stand beside it on the page. Files carry no version and no date, so that the same numbers give the same bytes.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from exmy.looks import BASELINE_COLOUR, COLOURS, LETTERING, MARKERS

Floats = npt.NDArray[np.float64]

WIDTH, DPI = 4.8, 170  # inches and dots an inch: 816 pixels, a column of a page
SMALL = LETTERING | {
    "font.size": 8.5, "axes.titlesize": 8.5, "axes.titleweight": "normal", "axes.labelsize": 8.5, "xtick.labelsize": 8,
    "ytick.labelsize": 8, "legend.fontsize": 8, "lines.linewidth": 1.4, "lines.markersize": 4.5, "axes.linewidth": 0.7,
    "xtick.major.width": 0.7, "ytick.major.width": 0.7, "grid.linewidth": 0.6, "axes.axisbelow": True,
}  # fmt: skip
GREY = "#6F6F6F"
MOST_TICKS, CROWDED = 12, 45  # ticks with a label, and characters in all of them, before these are turned
COLOURS_OF_A_FILE = 256
LEGEND = 74  # characters of a legend's width
POWER = re.compile(r"\b2\^(-?\d+)")
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Drawing:
    """A figure: the section of the page that it stands in, its file's name, its words, and how it is drawn."""

    section: str
    name: str
    words: str
    draw: Callable[[], Figure]

    def save(self, path: Path) -> None:
        """The same bytes for the same numbers, in 256 colours, a third of what all colours take. OSError for a bad place."""
        from PIL import Image  # pillow's name, which matplotlib too imports only to write

        drawn = io.BytesIO()
        with matplotlib.rc_context(SMALL):
            self.draw().savefig(drawn, format="png", pil_kwargs={"compress_level": 0})  # for nobody but the next line
        with Image.open(drawn) as image:
            few = image.convert("RGB").quantize(COLOURS_OF_A_FILE, dither=Image.Dither.NONE)
        few.save(path, format="PNG", optimize=True)


@dataclass(frozen=True)
class Style:
    """How a series is drawn."""

    colour: str
    marker: str
    again: bool = False  # the colours' second round: open markers and dashes

    @property
    def line(self) -> dict[str, Any]:
        """For a line with markers."""
        face, dashes = ("white", (0, (4, 1.5))) if self.again else (self.colour, "-")
        return {"color": self.colour, "marker": self.marker, "mfc": face, "mec": self.colour, "ls": dashes}

    @property
    def point(self) -> dict[str, Any]:
        """For markers alone."""
        return self.line | {"ls": ""}


def sheet(rows: Sequence[float], columns: int = 1, **options: Any) -> tuple[Figure, npt.NDArray[Any]]:
    """A figure of panels of these heights, in inches, and its axes, [rows, columns]; the legend comes on top of that."""
    figure = Figure(figsize=(WIDTH, sum(rows)), dpi=DPI, layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False, height_ratios=rows, **options)
    return figure, axes


def legend_below(figure: Figure, handles: Sequence[Any]) -> None:
    """Under all panels, in as many columns as fit, and the figure higher by its lines."""
    if not handles:
        return
    labels = [str(handle.get_label()) for handle in handles]
    columns = next(n for n in (3, 2, 1) if n == 1 or (n <= len(labels) and _legend_width(labels, n) <= LEGEND))
    lines = -(-len(handles) // columns)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.18 * lines + 0.08)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, handlelength=2.4, columnspacing=1.4)


def _legend_width(labels: Sequence[str], columns: int) -> int:
    """In characters: of matplotlib's columns, the first ones the longer, each as wide as its longest label and its line."""
    lines, more = divmod(len(labels), columns)
    sizes = [lines + (i < more) for i in range(columns)]
    starts = [sum(sizes[:i]) for i in range(columns)]
    return sum(max(map(len, labels[at : at + size])) + 7 for at, size in zip(starts, sizes, strict=True))


def ordered_styles(names: Sequence[str], baseline: str) -> Mapping[str, Style]:
    """Styles of names that stand for an order, the baseline black; the others from viridis' dark end to its light one."""
    others = [name for name in names if name != baseline]
    shades = matplotlib.colormaps["viridis"](np.linspace(0.02, 0.86, max(len(others), 2)))
    styles = {
        name: Style(matplotlib.colors.to_hex(shade), MARKERS[i % len(MARKERS)])
        for i, (name, shade) in enumerate(zip(others, shades, strict=False))
    }
    return {name: styles.get(name, Style(BASELINE_COLOUR, "o")) for name in names}


def styles(names: Sequence[str], baseline: str | None = None) -> Mapping[str, Style]:
    """Styles of names without an order, the baseline black."""
    others = [name for name in names if name != baseline]
    found = {
        name: Style(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], again=i // len(COLOURS) % 2 == 1)
        for i, name in enumerate(others)
    }
    return {name: found.get(name, Style(BASELINE_COLOUR, "o")) for name in names}


def tick_words(rate: float) -> str:
    """A learning rate under an axis: as a power of two if it is one."""
    exponent = math.log2(rate)
    return raised(f"2^{round(exponent)}") if abs(exponent - round(exponent)) < 1e-9 else f"{rate:.2g}"


def rate_axis(axes: Axes, rates: Sequence[float], *, vertical: bool = False, named: bool = True) -> None:
    """A learning-rate axis to base 2 with a tick a rate, every second or third labelled where they are many."""
    spacing = float(np.diff(np.log2(rates)).min()) if len(rates) > 1 else 1.0
    ends = rates[0] / 2 ** (0.5 * spacing), rates[-1] * 2 ** (0.5 * spacing)
    axis = axes.yaxis if vertical else axes.xaxis
    (axes.set_yscale if vertical else axes.set_xscale)("log", base=2)
    (axes.set_ylim if vertical else axes.set_xlim)(ends)
    every = -(-len(rates) // MOST_TICKS)
    axis.set_major_locator(FixedLocator(list(rates)))
    axis.set_minor_locator(NullLocator())
    shown = {rate: tick_words(rate) for rate in list(rates)[::every]}
    axis.set_major_formatter(
        FuncFormatter(lambda value, _: next((w for r, w in shown.items() if math.isclose(r, value)), ""))
    )
    if not vertical and sum(len(words) for words in shown.values()) > CROWDED:
        axes.tick_params(axis="x", rotation=45)
    if named:
        (axes.set_ylabel if vertical else axes.set_xlabel)("peak learning rate")


def plain_numbers(axis: Axis, least: float = 0.0) -> None:
    """Numbers on a logarithmic axis as they are, 0.01 and not a power; nearer to 0 than least, where they meet, 0 alone."""
    axis.set_major_formatter(
        FuncFormatter(lambda value, _: "" if 0 < abs(value) < least else f"{value:g}".replace("-", "−"))
    )
    axis.set_minor_formatter(NullFormatter())


def whole_axis(axes: Axes, values: Sequence[int], label: str) -> None:
    """An axis of bits: whole numbers, the larger to the left, as bits are taken away to the right."""
    axes.set_xticks(list(values), [str(v) for v in values])
    axes.set_xlim(max(values) + 0.5, min(values) - 0.5)
    axes.set_xlabel(label)


def beside(place: int, count: int, room: float = 0.5) -> float:
    """How far a series stands from the middle, so that intervals of several don't cover each other."""
    return (place - (count - 1) / 2) / max(count, 2) * room


def bar(axes: Axes, x: float, low: float, high: float, style: Style, ends: tuple[float, float]) -> None:
    """An upright interval; where it has no bound, it runs to the end of the axis and ends in an arrow."""
    bottom, top = ends
    axes.plot([x, x], [max(low, bottom), min(high, top)], color=style.colour, lw=1.1, zorder=2, marker="")
    for beyond, at, marker in ((high > top, top, "^"), (low < bottom, bottom, "v")):
        if beyond:
            mark(axes, x, at, style, marker, size=3.6)


def mark(axes: Axes, x: float, y: float, style: Style, marker: str, size: float = 5.5) -> None:
    """A mark at the edge, drawn whole."""
    (line,) = axes.plot([x], [y], ls="", marker=marker, ms=size, color=style.colour, mew=1.4, zorder=4)
    line.set_clip_on(False)
    line.set_in_layout(False)


def raised(text: str) -> str:
    """The text with its powers of two as people write them: "loss scale 2⁻⁸"."""
    return POWER.sub(lambda found: "2" + found[1].translate(RAISED), text)


def plain(text: str) -> str:
    """Text that matplotlib won't read as mathematics, its powers raised."""
    return raised(text).replace("$", r"\$")
