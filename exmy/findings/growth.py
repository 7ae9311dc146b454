"""How fast a cost grows as mantissa bits go: looked for after the runs, in the studies of mantissa bits and of roundings.

A rounding with a bias shifts every operand the same way, by a share of it that doubles with each bit that goes; what it costs is
then of first order in it, and doubles too. One without a bias adds noise, whose mean square, by which the loss rises, grows
fourfold. So the factor by which a cost grows per bit tells bias from noise. It is taken from the most bits at which the cost lies
above zero by its own 95 % interval, down to the fewest:

    factor = (cost at m bits / cost at n bits)^(1 / (n - m)),  n > m

with Student's interval from the jackknife of its logarithm over the seeds that both share (Efron and Stein 1981).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy import stats

from exmy.compare_page import signed
from exmy.costs import Row
from exmy.findings.canvas import (
    GREY,
    Drawing,
    Style,
    beside,
    legend_below,
    plain,
    plain_numbers,
    sheet,
    styles,
    whole_axis,
)
from exmy.findings.numbers import Number
from exmy.findings.studies import Evidence, Part
from exmy.findings.tables import NONE, cost_rows, headed, line, ranged, rate_words
from exmy.looks import MARKERS

LEVEL = 0.05
LEAST = 1e-3  # nats/token: the foot of a logarithmic axis of costs
Cells = Mapping[tuple[str, float], Mapping[int, Row]]
"""Of a rounding and a learning rate, the row of each number of mantissa bits."""


class Growth(NamedTuple):
    """By which factor the cost grows for each bit that goes, and from how many bits to how many."""

    factor: Number
    most: int
    fewest: int


def cells(evidence: Evidence, part: Part) -> Cells:
    """The costs of unscaled formats with the baseline's exponent bits, by rounding and rate; in the study's order."""
    found: dict[tuple[str, float], dict[int, Row]] = {}
    kinds = {recipe: part.numerics(recipe) for recipe in part.recipes}
    wide = max((kind.exponent_bits or 0 for kind in kinds.values()), default=0)
    for row in cost_rows(evidence.comparison):
        kind = kinds.get(row.recipe)
        if row.group != part.key or row.recipe == evidence.baseline or kind is None or kind.native:
            continue
        if kind.mantissa_bits is not None and (kind.exponent_bits, kind.scaling) == (wide, "unscaled"):
            found.setdefault((kind.rounding, row.learning_rate), {})[kind.mantissa_bits] = row
    order = list(dict.fromkeys(rounding for rounding, _ in found))
    return {key: found[key] for key in sorted(found, key=lambda key: (order.index(key[0]), key[1]))}


def growth(rows: Mapping[int, Row]) -> Growth | None:
    """Of one rounding at one rate; None where fewer than two numbers of bits cost more than nothing, or seeds are too few."""
    above = sorted(bits for bits, row in rows.items() if row.validation.difference.low > 0)
    if len(above) < 2:
        return None
    fewest, most = above[0], above[-1]
    few, many = (rows[bits].validation.differences for bits in (fewest, most))
    shared = [seed for seed in few if seed in many]
    n = len(shared)
    if n < 3:
        return None
    x, y = (np.array([of[seed] for seed in shared]) for of in (few, many))

    def of_sums(a: float, b: float) -> float:
        return math.log(a / b) / (most - fewest) if a > 0 and b > 0 else math.nan

    whole = of_sums(x.sum(), y.sum())
    left_out = np.array([of_sums(x.sum() - a, y.sum() - b) for a, b in zip(x, y, strict=True)])
    error = math.sqrt((n - 1) / n * float(((left_out - left_out.mean()) ** 2).sum()))
    half = float(stats.t.ppf(1 - LEVEL / 2, n - 1)) * error
    return Growth(Number(*(math.exp(value) for value in (whole, whole - half, whole + half))), most, fewest)


def growth_table(evidence: Evidence, part: Part) -> Iterator[str]:
    """A row a rounding and rate: the cost at each number of bits, bold where it is told from zero among all; and its growth."""
    found = cells(evidence, part)
    bits = sorted({b for rows in found.values() for b in rows}, reverse=True)
    several = len({rounding for rounding, _ in found}) > 1
    yield from headed(("at rate", *(f"M = {b}" for b in bits), "times a bit that goes [95 %]"))
    for (rounding, rate), rows in found.items():
        grown = growth(rows)
        last = f"{ranged(grown.factor, '.2f')}, M = {grown.most} to {grown.fewest}" if grown else NONE
        first = f"{rounding}, {rate_words(rate)}" if several else rate_words(rate)
        yield line([first, *(_cell(rows.get(b)) for b in bits), last])


def _cell(row: Row | None) -> str:
    if row is None or not row.validation.differences:
        return NONE
    words = signed(row.validation.difference.mean)
    return f"**{words}**" if row.validation.difference.p_holm <= LEVEL else words


def from_which_bit(evidence: Evidence, part: Part) -> Iterator[str]:
    """The most bits that cost something at any rate, and what lies below the baseline, each told from zero among all rows."""
    found = cells(evidence, part)
    told = [
        (rounding, rate, bits, row)
        for (rounding, rate), rows in found.items()
        for bits, row in rows.items()
        if row.validation.difference.p_holm <= LEVEL
    ]
    for rounding in dict.fromkeys(rounding for rounding, _ in found):
        above = [(bits, rate) for r, rate, bits, row in told if r == rounding and row.validation.difference.mean > 0]
        if above:
            most = max(bits for bits, _ in above)
            rates = ", ".join(rate_words(rate) for bits, rate in sorted(above) if bits == most)
            yield f"Rounding {rounding}, the most mantissa bits with a cost that is told from zero are {most}, at {rates}."
        else:
            yield f"Rounding {rounding}, no number of mantissa bits has a cost that is told from zero."
    below = [(rate, row) for _, rate, _, row in told if row.validation.difference.mean < 0]
    if below:
        each = ", ".join(
            f"`{row.recipe}` at {rate_words(rate)} {signed(row.validation.difference.mean)}" for rate, row in below
        )
        yield f"Unexpected, lower losses with fewer bits, told from zero: {each}."


NOTE = (
    "Mean differences of final validation loss from the baseline's, nats/token, in pairs of the same seed, at the same rate; "
    "bold: Holm p at most 0.05 over all rows of the study. The last column: by which factor the cost grows for each bit that "
    "goes, from the most bits at which its own interval is above zero; 2 is a bias of first order, 4 the mean square of a noise."
)


def growth_drawing(evidence: Evidence, section: str) -> Drawing:
    """Costs against bits on a logarithmic axis."""
    return Drawing(
        section, f"{evidence.name}-growth",
        "Final validation loss above the baseline's at the same rate against mantissa bits, on a logarithmic axis, with "
        "Student's 95 % intervals, only where that lies above zero; grey: what doubles, and what grows fourfold, with each bit "
        "that goes",
        lambda: drawn(evidence),
    )  # fmt: skip


def drawn(evidence: Evidence) -> Figure:
    """A column a rounding where there are several, else one panel; a line a rate."""
    part = evidence.parts[0]
    found = cells(evidence, part)
    roundings = list(dict.fromkeys(rounding for rounding, _ in found))
    rates = sorted({rate for _, rate in found})
    figure, axes = sheet((2.9,), max(len(roundings), 1), sharey=True)
    looks = _rate_styles(rates)
    means = [row.validation.difference.mean for rows in found.values() for row in rows.values()]
    highest = max([x for x in means if math.isfinite(x)] + [10 * LEAST])
    ends = LEAST, 2.5 * highest
    every = sorted({bits for rows in found.values() for bits in rows})
    for rounding, panel in zip(roundings, axes[0], strict=False):
        panel.set_yscale("log")
        panel.set_ylim(ends)
        plain_numbers(panel.yaxis)
        for factor in (2.0, 4.0):  # guides, from the highest down
            guide = [highest * factor ** (every[0] - bits) for bits in every]
            panel.plot(every, guide, color=GREY, lw=0.9, ls=":" if factor == 2 else "--", zorder=1, marker="")
        for i, rate in enumerate(rates):
            rows = found.get((rounding, rate), {})
            _line(panel, rows, beside(i, len(rates), 0.45), looks[rate], ends)
        whole_axis(panel, every, "mantissa bits")
        if len(roundings) > 1:
            panel.set_title(rounding, loc="left")
    axes[0, 0].set_ylabel(f"final validation loss above\n{plain(evidence.baseline)}'s (nats/token)")
    handles = [Line2D([], [], label=f"rate {rate_words(rate)}", **looks[rate].line) for rate in rates]
    handles += [
        Line2D([], [], color=GREY, lw=0.9, ls=dashes, label=words)
        for dashes, words in ((":", "doubles a bit"), ("--", "fourfold a bit"))
    ]
    legend_below(figure, handles)
    return figure


def _rate_styles(rates: Sequence[float]) -> dict[float, Style]:
    """Rates have an order: viridis, and a marker each."""
    if len(rates) <= 4:
        named = styles([rate_words(rate) for rate in rates])
        return {rate: named[rate_words(rate)] for rate in rates}
    shades = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.9, len(rates)))
    return {
        rate: Style(matplotlib.colors.to_hex(shade), MARKERS[i % len(MARKERS)])
        for i, (rate, shade) in enumerate(zip(rates, shades, strict=True))
    }


def _line(panel: Axes, rows: Mapping[int, Row], aside: float, style: Style, ends: tuple[float, float]) -> None:
    of = {bits: row.validation.difference for bits, row in sorted(rows.items(), reverse=True)}
    there = {bits: found for bits, found in of.items() if found.low > 0}
    panel.plot([b + aside for b in there], [found.mean for found in there.values()], zorder=3, **style.line)
    for bits, found in there.items():
        limits = [max(found.low, ends[0]), min(found.high, ends[1])]
        panel.plot([bits + aside] * 2, limits, color=style.colour, lw=1.0, marker="", zorder=2)
