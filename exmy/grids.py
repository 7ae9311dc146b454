"""`exmy formats plot`: formats beside each other on one axis of magnitudes.

Three panels share the axis. The *values* themselves: a stroke a value where a format has few, a band where it has so many that
strokes would touch, subnormals lighter. The *ulp*, the distance between neighbours: a staircase that rises with each binade,
flat over the subnormals, and ends at the largest value. The *largest relative rounding error* of rounding to nearest,
|round(x) - x| / |x|: a sawtooth between 2^-(M+2) and 2^-(M+1) among normal numbers, growing towards 1 below them, and 1 where
everything rounds to 0; above the largest value x saturates, so the error is (x - max) / x. Of floating-point formats all of it is
derived from emin, M and the largest value, so it is exact for any width; of integers and lists from their values, and from the
points that divide these for rounding to nearest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from exmy.looks import BASELINE_COLOUR, COLOURS, DASHES, LETTERING
from formats import ElementFormat, FloatFormat, GridFormat
from train.durable import atomically

Floats = npt.NDArray[np.float64]

STROKES_UP_TO = 300  # positive values; 8 bits have 127 at most
SUFFIXES = (".png", ".svg", ".pdf")
WITHIN = 1000  # binades above and below 1
BEYOND = 2  # binades that the axis reaches past the formats' ends


def ulp(f: ElementFormat, x: npt.ArrayLike) -> Floats:
    """The distance between the neighbours around each magnitude x > 0; NaN above max, and below the least of a format without 0.

    In floating point 2^(e - M) in binade e >= emin; below the smallest value of a format without subnormals, that value.
    """
    magnitude = np.asarray(x, np.float64)
    if isinstance(f, FloatFormat):
        exponent = np.maximum(np.frexp(magnitude)[1] - 1, f.emin)
        gap = np.ldexp(1.0, exponent - f.mantissa_bits)
        if not (f.subnormals and f.zero):
            gap = np.where(magnitude < float(f.smallest), float(f.smallest) if f.zero else np.nan, gap)
    else:
        values = _from_zero(f)
        place = np.clip(np.searchsorted(values, magnitude, side="right"), 1, len(values) - 1)
        gap = np.where(magnitude < values[0], np.nan, values[place] - values[place - 1])
    return np.where(magnitude <= f.max, gap, np.nan)


def largest_error(f: ElementFormat, x: npt.ArrayLike) -> Floats:
    """The largest relative error of rounding to nearest around each magnitude x > 0: half an ulp over x, 1 where it becomes 0.

    Where a list divides its neighbours elsewhere: the longer part over x. Above the largest value: what saturating there loses,
    (x - max) / x; below the smallest of a format that never rounds to 0, the same on that side.
    """
    magnitude = np.asarray(x, np.float64)
    part = _longer_part(f, magnitude) if isinstance(f, GridFormat) else ulp(f, magnitude) / 2
    smallest = smallest_positive(f)
    with np.errstate(invalid="ignore"):
        inside = part / magnitude
        inside = np.where(magnitude < smallest, np.minimum(inside, 1.0), inside)
        if _never_to_zero(f):
            inside = np.where(magnitude < smallest, smallest / magnitude - 1, inside)
    return np.where(magnitude <= f.max, inside, 1 - f.max / magnitude)


def smallest_positive(f: ElementFormat) -> float:
    """The smallest positive value."""
    if isinstance(f, FloatFormat):
        return f.smallest_subnormal
    grid = f.grid()
    return float(grid[grid > 0][0])


def _from_zero(f: ElementFormat) -> Floats:
    """The values from 0 up, or from the smallest positive one where 0 is none."""
    grid = f.grid()
    return np.asarray(grid[grid >= 0])


def _longer_part(f: GridFormat, magnitude: Floats) -> Floats:
    values = _from_zero(f)
    dividers = np.array([float(d) for d in f.dividers])[len(f.values) - len(values) :]
    place = np.clip(np.searchsorted(values, magnitude, side="right"), 1, len(values) - 1)
    divider = dividers[place - 1]
    return np.asarray(np.maximum(divider - values[place - 1], values[place] - divider))


def _never_to_zero(f: ElementFormat) -> bool:
    """Whether small magnitudes become the smallest value: in formats without 0, and in posits."""
    if isinstance(f, FloatFormat):
        return not f.zero
    values = _from_zero(f)
    return values[0] > 0 or (isinstance(f, GridFormat) and Fraction(0) in f.dividers)


def grids_figure(formats: Sequence[ElementFormat], path: Path) -> None:
    """Draw the formats into `path`, as PNG, SVG or PDF by its suffix. ValueError for another one, OSError for a bad place."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"{path}: the picture's name must end in {', '.join(SUFFIXES)}, got {path.suffix or 'no suffix'!r}"
        )
    for f in formats:
        if not -WITHIN < math.log2(smallest_positive(f)) <= math.log2(f.max) < WITHIN:
            raise ValueError(
                f"{f.name} reaches the ends of float64, in which pictures are drawn; draw a narrower format"
            )
    low = min(math.log2(smallest_positive(f)) for f in formats) - BEYOND
    high = max(math.log2(f.max) for f in formats) + BEYOND
    # Every binade's ends and a few points within, so that each tooth is drawn to its tip.
    binades = np.arange(math.floor(low), math.ceil(high))
    x = np.ldexp(np.linspace(1, 2, 12, endpoint=False), binades[:, None])
    x = np.sort(np.concatenate([x.ravel(), np.nextafter(np.ldexp(1.0, binades), 0)]))
    with matplotlib.rc_context(LETTERING | {"axes.titlesize": 12.5}):
        rows = 0.42 * len(formats)
        figure = Figure(figsize=(11.0, 8.2 + rows), dpi=120, layout="constrained")
        top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(0.7 + rows, 3, 3.4))
        for place, f in enumerate(formats):
            colour, dashes = _look(place)
            _draw_values(top, f, len(formats) - 1 - place, colour)
            middle.plot(x, ulp(f, x), color=colour, ls=dashes, lw=1.8)
            bottom.plot(
                x, largest_error(f, x), color=colour, ls=dashes, lw=1.8 if len(binades) < 80 else 1.1, label=_label(f)
            )
        top.set_yticks(range(len(formats)), [f.name for f in reversed(formats)])
        top.set_ylim(-0.6, len(formats) - 0.4)
        top.grid(visible=False)
        top.set_title("Positive values: a stroke each, or a band where they are many; subnormals lighter", loc="left")
        middle.set_title("ulp, the distance between neighbours", loc="left")
        middle.set_ylabel("ulp (log scale)")
        bottom.set_title(
            "Largest relative error of rounding to nearest, saturating above the largest value", loc="left"
        )
        bottom.set_ylabel("relative error (log scale)")
        bottom.set_xlabel("magnitude (log scale)")
        for axes in (middle, bottom):
            axes.set_yscale("log", base=2)
        # A format that never rounds to 0 is wrong by any factor below its smallest value; that would hide all else.
        bottom.set_ylim(min(_least_error(f, x) for f in formats) / 2.5, 4)
        for axes in (middle, bottom):
            _powers(axes.yaxis, *map(math.log2, axes.get_ylim()), most=8)
        bottom.set_xscale("log", base=2)
        bottom.set_xlim(2.0**low, 2.0 ** min(high, 1023))
        _powers(bottom.xaxis, low, high, most=14)
        figure.legend(loc="outside lower left", ncols=min(2, len(formats)), handlelength=3.4, fontsize=11.5)
        with atomically(path) as aside:
            figure.savefig(aside, format=path.suffix[1:].lower())


def _least_error(f: ElementFormat, x: Floats) -> float:
    """The lowest tip of the sawtooth between the smallest value and the largest."""
    return float(np.min(largest_error(f, x[(x >= smallest_positive(f)) & (x <= f.max)]), initial=0.5))


def _look(place: int) -> tuple[str, object]:
    colours = (BASELINE_COLOUR, *COLOURS)
    return colours[place % len(colours)], DASHES[(place + place // len(colours)) % len(DASHES)]


def _label(f: ElementFormat) -> str:
    return f"{f.name}: {f.bits} bits, {smallest_positive(f):.3g} to {f.max:.5g}"


def _draw_values(axes: Axes, f: ElementFormat, row: int, colour: str) -> None:
    low, high = row - 0.3, row + 0.3
    smallest = smallest_positive(f)
    normal_from = f.smallest_normal if isinstance(f, FloatFormat) else smallest
    count = f.max_code if isinstance(f, FloatFormat) else len(_from_zero(f))
    if count <= STROKES_UP_TO:
        values = f.grid()[f.grid() > 0]
        normal = values >= normal_from
        for chosen, opacity in ((normal, 1.0), (~normal, 0.45)):
            axes.vlines(values[chosen], low, high, color=colour, lw=0.9, alpha=opacity)
        return
    for start, end, opacity in ((smallest, normal_from, 0.3), (normal_from, f.max, 0.75)):
        axes.fill_between([start, end], low, high, color=colour, alpha=opacity, lw=0)


def _powers(axis: Axis, low: float, high: float, *, most: int) -> None:
    """Ticks at powers of two, evenly, at most that many."""
    every = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128, 256) if (high - low) / step <= most)
    exponents = [e for e in range(math.floor(low), math.ceil(high) + 1) if e % every == 0]
    axis.set_major_locator(FixedLocator([2.0**e for e in exponents if -1074 <= e <= 1023]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"$2^{{{round(math.log2(value))}}}$"))
    axis.set_minor_locator(NullLocator())
