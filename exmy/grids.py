"""`exmy formats plot`: formats beside each other on one axis of magnitudes.

Three panels share the axis. The *values* themselves: a stroke a value where a format has few, a band where it has so many that
strokes would touch, subnormals lighter. The *ulp*, the distance between neighbours: a staircase that rises with each binade,
flat over the subnormals, and ends at the largest value. The *largest relative rounding error* of rounding to nearest,
|round(x) - x| / |x|: a sawtooth between 2^-(M+2) and 2^-(M+1) among normal numbers, growing towards 1 below them, and 1 where
everything rounds to 0; above the largest value x saturates, so the error is (x - max) / x. All of it is derived from a format's
emin, M and largest value, so it is exact for formats of any width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from exmy.looks import BASELINE_COLOUR, COLOURS, DASHES, LETTERING
from formats import FloatFormat

Floats = npt.NDArray[np.float64]

STROKES_UP_TO = 300  # positive values; 8 bits have 127 at most
SUFFIXES = (".png", ".svg", ".pdf")
BEYOND = 2  # binades that the axis reaches past the formats' ends


def ulp(f: FloatFormat, x: npt.ArrayLike) -> Floats:
    """The distance between the neighbours around each magnitude x > 0: 2^(e - M) in binade e >= emin; NaN above max."""
    magnitude = np.asarray(x, np.float64)
    exponent = np.maximum(np.frexp(magnitude)[1] - 1, f.emin)
    return np.where(magnitude <= f.max, np.ldexp(1.0, exponent - f.mantissa_bits), np.nan)


def largest_error(f: FloatFormat, x: npt.ArrayLike) -> Floats:
    """The largest relative error of rounding to nearest around each magnitude x > 0: half an ulp over x, 1 at most.

    Above the largest value: what saturating there loses, (x - max) / x.
    """
    magnitude = np.asarray(x, np.float64)
    with np.errstate(invalid="ignore"):
        inside = np.minimum(ulp(f, magnitude) / 2 / magnitude, 1.0)
    return np.where(magnitude <= f.max, inside, 1 - f.max / magnitude)


def grids_figure(formats: Sequence[FloatFormat], path: Path) -> None:
    """Draw the formats into `path`, as PNG, SVG or PDF by its suffix. ValueError for another one, OSError for a bad place."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"{path}: the picture's name must end in {', '.join(SUFFIXES)}, got {path.suffix or 'no suffix'!r}"
        )
    low = min(math.log2(f.smallest_subnormal) for f in formats) - BEYOND
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
            _powers(axes.yaxis, *map(math.log2, axes.get_ylim()), most=8)
        bottom.set_xscale("log", base=2)
        bottom.set_xlim(2.0**low, 2.0 ** min(high, 1023))
        _powers(bottom.xaxis, low, high, most=14)
        figure.legend(loc="outside lower left", ncols=min(2, len(formats)), handlelength=3.4, fontsize=11.5)
        figure.savefig(path, format=path.suffix[1:].lower())


def _look(place: int) -> tuple[str, object]:
    colours = (BASELINE_COLOUR, *COLOURS)
    return colours[place % len(colours)], DASHES[(place + place // len(colours)) % len(DASHES)]


def _label(f: FloatFormat) -> str:
    return f"{f.name}: {f.bits} bits, {f.smallest_subnormal:.3g} to {f.max:.5g}"


def _draw_values(axes: Axes, f: FloatFormat, row: int, colour: str) -> None:
    low, high = row - 0.3, row + 0.3
    if f.max_code <= STROKES_UP_TO:
        values = f.decode(np.arange(1, f.max_code + 1))
        normal = values >= f.smallest_normal
        for chosen, opacity in ((normal, 1.0), (~normal, 0.45)):
            axes.vlines(values[chosen], low, high, color=colour, lw=0.9, alpha=opacity)
        return
    ends = [f.smallest_subnormal, f.smallest_normal, f.max]
    for start, end, opacity in ((ends[0], ends[1], 0.3), (ends[1], ends[2], 0.75)):
        axes.fill_between([start, end], low, high, color=colour, alpha=opacity, lw=0)


def _powers(axis: Axis, low: float, high: float, *, most: int) -> None:
    """Ticks at powers of two, evenly, at most that many."""
    every = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128, 256) if (high - low) / step <= most)
    exponents = [e for e in range(math.floor(low), math.ceil(high) + 1) if e % every == 0]
    axis.set_major_locator(FixedLocator([2.0**e for e in exponents if -1074 <= e <= 1023]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"$2^{{{round(math.log2(value))}}}$"))
    axis.set_minor_locator(NullLocator())
