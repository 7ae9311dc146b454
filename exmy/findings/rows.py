"""Figures with a row a recipe or a condition: how often runs diverge over seeds, in which losses they end, what it costs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from exmy.compare_figure import EDGE, limits
from exmy.costs import Cost, Row
from exmy.findings.canvas import GREY, Drawing, Floats, Style, beside, legend_below, plain, sheet, styles
from exmy.findings.numbers import losses, shares, spread
from exmy.findings.studies import Evidence, Part
from exmy.findings.tables import condition_rows, in_table_order, rate_words

LINE, AROUND = 0.24, 0.62  # inches: of a row, and of an axis with its words
FEW_TICKS = 6
LONGEST = 26  # characters of a row's words in one line
ROOM = 0.15  # of the axis' width, for words behind the intervals


def seed_drawings(evidence: Evidence) -> list[Drawing]:
    """Shares and losses of the seeds' study."""
    return [
        Drawing(
            "seeds", "seeds-rates",
            "Share of runs that diverged, by recipe, with Clopper and Pearson's 95 % intervals and the counts",
            lambda: seed_shares(evidence),
        ),
        Drawing(
            "seeds", "seeds-losses",
            "Final validation losses, a dot a seed, by recipe; the thick line is the middle 80 %, the upright one the "
            "median; diverged runs are open; how many lie beyond the axis, or are not finite, stands behind it",
            lambda: seed_losses(evidence),
        ),
    ]  # fmt: skip


def _rows(evidence: Evidence) -> list[tuple[str, Part, str, float]]:
    """(words, part, recipe, rate), the baseline first at each rate."""
    several = len({rate for part in evidence.parts for rate in part.rates}) > 1
    found = []
    for part in evidence.parts:
        for rate in part.rates:
            here = set(part.runs["recipe"].values[part.runs["learning_rate"].values == rate].astype(str).tolist())
            for recipe in in_table_order(evidence, part):
                if recipe in here:
                    words = [
                        recipe,
                        *([f"at {rate_words(rate)}"] if several else []),
                        *([part.label] if part.label else []),
                    ]
                    found.append((", ".join(words), part, recipe, rate))
    return found


def _names(axes: Axes, words: Sequence[str]) -> None:
    axes.set_yticks(range(len(words)), [plain(word) for word in words])
    axes.set_ylim(len(words) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")


def seed_shares(evidence: Evidence) -> Figure:
    """A row a recipe and rate: k of n, and the exact interval."""
    rows = _rows(evidence)
    figure, axes = sheet((AROUND + LINE * len(rows),))
    panel = axes[0, 0]
    looks = styles(list(dict.fromkeys(recipe for _, _, recipe, _ in rows)), evidence.baseline)
    tables = {id(part): shares(part) for part in evidence.parts}
    highest = 0.0
    for y, (_, part, recipe, rate) in enumerate(rows):
        cell = tables[id(part)].sel(recipe=recipe, learning_rate=rate)
        low, value, high = (100 * float(cell[name]) for name in ("rate_lower", "rate", "rate_upper"))
        style = looks[recipe]
        panel.plot([low, high], [y, y], color=style.colour, lw=1.6, zorder=2, solid_capstyle="butt")
        panel.plot([value], [y], zorder=3, **style.point)
        panel.annotate(
            f"{int(cell['k'])}/{int(cell['n'])}",
            (high, y),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
        )
        highest = max(highest, high)
    panel.set_xlim(-0.02 * highest, 1.17 * highest)
    _names(panel, [words for words, *_ in rows])
    panel.set_xlabel("runs that diverged (%)")
    return figure


def seed_losses(evidence: Evidence) -> Figure:
    """A row a recipe and rate: every seed's final validation loss; what is far out or not finite is counted at the edge."""
    rows = _rows(evidence)
    figure, axes = sheet((AROUND + 1.6 * LINE * len(rows),))
    panel = axes[0, 0]
    looks = styles(list(dict.fromkeys(recipe for _, _, recipe, _ in rows)), evidence.baseline)
    each = [losses(part, recipe, rate) for _, part, recipe, rate in rows]
    low, high = _ends(np.concatenate(each))
    panel.set_xlim(low, high)
    panel.xaxis.set_major_locator(MaxNLocator(FEW_TICKS))
    for y, ((_, part, recipe, rate), values) in enumerate(zip(rows, each, strict=True)):
        style = looks[recipe]
        own = (part.names == recipe) & (part.runs["learning_rate"].values == rate)
        diverged = part.runs["diverged"].values[own].astype(bool)
        inside = np.isfinite(values) & (values <= high)
        heights = y + 0.27 * _aside(values[inside])
        for bad, face in ((False, style.colour), (True, "white")):
            chosen = diverged[inside] == bad
            panel.plot(values[inside][chosen], heights[chosen], ls="", marker="o", ms=2.6, mfc=face, mec=style.colour, mew=0.6,
                       alpha=0.55, zorder=2)  # fmt: skip
        found = spread(values)
        panel.plot([found.low, min(found.high, high)], [y, y], color="#000000", lw=2.0, zorder=3, solid_capstyle="butt")
        if found.median <= high:
            panel.plot([found.median] * 2, [y - 0.3, y + 0.3], color="#000000", lw=1.4, zorder=4)
        beyond = int((~inside).sum())
        if beyond:
            panel.annotate(
                f"+ {beyond}", (high, y), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7.5
            )
    _names(panel, [words for words, *_ in rows])
    panel.set_xlabel("final validation loss (nats/token)")
    return figure


def _ends(values: Floats) -> tuple[float, float]:
    """Of the axis: all finite losses, but those beyond five times the middle 80 % above the median."""
    finite = np.sort(values[np.isfinite(values)])
    if not finite.size:
        return 0.0, 1.0
    middle = float(np.median(finite))
    reach = max(5 * (float(np.quantile(finite, 0.9)) - float(np.quantile(finite, 0.1))), 0.05)
    kept = finite[finite <= middle + reach]
    margin = 0.05 * ((float(kept[-1]) - float(kept[0])) or 0.1)
    return float(kept[0]) - margin, float(kept[-1]) + margin


def _aside(values: Floats) -> Floats:
    """How far each dot stands from its row, -1 to 1: neighbours in value in turn above and below, by the golden ratio."""
    order = np.argsort(np.argsort(values))
    return np.asarray(2 * ((order * 0.6180339887498949) % 1.0) - 1, np.float64)


def condition_drawings(evidence: Evidence) -> Iterator[Drawing]:
    """Of the conditions' study, a figure a learning rate."""
    rates = sorted({row.learning_rate for _, row, _ in condition_rows(evidence)})
    for i, rate in enumerate(rates):
        several = len(rates) > 1
        yield _condition_drawing(
            evidence, rate, f"-{i + 1}" if several else "", f", at {rate_words(rate)}" if several else ""
        )


def _condition_drawing(evidence: Evidence, rate: float, number: str, at: str) -> Drawing:
    return Drawing(
        "conditions", f"conditions{number}",
        f"Final validation loss above that of {evidence.baseline} under the same condition, a row a condition: mean with "
        f"Student's 95 % interval, and each pair of seeds{at}"
        + ("; an arrow: pairs beyond the axis, with the mean and its interval" if _any_beyond(evidence, rate) else ""),
        lambda: conditions(evidence, rate),
    )  # fmt: skip


def conditions(evidence: Evidence, rate: float) -> Figure:
    """A forest plot, a row a condition, its recipes beneath each other; what is far beyond is an arrow with its number."""
    found: dict[str, list[Row]] = {}
    for words, row, _ in condition_rows(evidence):
        if row.learning_rate == rate:
            found.setdefault(words.removesuffix(f", rate {rate_words(rate)}"), []).append(row)
    recipes = list(dict.fromkeys(row.recipe for rows in found.values() for row in rows))
    looks = styles(recipes)
    figure, axes = sheet((AROUND + LINE * len(found) * (0.4 + 0.6 * len(recipes)),))
    panel = axes[0, 0]
    panel.set_xlim(*_condition_ends([row.validation for rows in found.values() for row in rows]))
    panel.xaxis.set_major_locator(MaxNLocator(FEW_TICKS))
    panel.axvline(0.0, color="#000000", lw=0.9, zorder=1)
    for y, rows in enumerate(found.values()):
        for row in rows:
            _condition(panel, y + beside(recipes.index(row.recipe), len(recipes), 0.75), row, looks[row.recipe])
        if y:
            panel.axhline(y - 0.5, color="#E4E4E4", lw=0.6, zorder=0)
    _names(panel, [in_lines(words) for words in found])
    panel.set_ylim(len(found) - 0.5, -0.5)
    panel.set_xlabel(f"final validation loss above\n{plain(evidence.baseline)}'s (nats/token)")
    handles = [Line2D([], [], label=plain(name), **looks[name].line) for name in recipes]
    handles.append(Line2D([], [], ls="", marker="o", ms=2.6, color=GREY, label="a pair of runs"))
    legend_below(figure, handles)
    return figure


def _condition_ends(costs: list[Cost]) -> tuple[float, float]:
    """Of the axis, with room for words."""
    low, high = limits(costs)
    return low, high + ROOM * (high - low)


def _drawn(cost: Cost) -> list[float]:
    """What a row reaches: its interval and its pairs."""
    return [x for x in (cost.difference.low, cost.difference.high, *cost.differences.values()) if math.isfinite(x)]


def _any_beyond(evidence: Evidence, rate: float) -> bool:
    """Whether any row is an arrow."""
    costs = [row.validation for _, row, _ in condition_rows(evidence) if row.learning_rate == rate]
    low, high = _condition_ends(costs)
    reach = [x for cost in costs if math.isfinite(cost.difference.mean) for x in _drawn(cost)]
    return any(not low <= x <= high for x in reach)


def in_lines(words: str, longest: int = LONGEST) -> str:
    """Words that would leave the panel no room, in two lines."""
    if len(words) <= longest or ", " not in words:
        return words
    breaks = [place for place in range(len(words)) if words.startswith(", ", place)]
    middle = min(breaks, key=lambda place: abs(place - len(words) / 2))
    return f"{words[:middle]},\n{words[middle + 2 :]}"


def _condition(axes: Axes, y: float, row: Row, style: Style) -> None:
    cost: Cost = row.validation
    found, (low, high) = cost.difference, axes.get_xlim()
    fate = f"{len(row.diverged)}/{len(row.runs)} diverged" if row.diverged else ""
    if not math.isfinite(found.mean):
        words = f"no pair with finite losses; {fate}".removesuffix("; ")
        axes.text(
            0.98,
            y,
            words,
            transform=axes.get_yaxis_transform(),
            ha="right",
            va="center",
            fontsize=7,
            color=style.colour,
        )
        return
    seeds = np.array(list(cost.differences.values()))
    drawn = _drawn(cost)
    if min(drawn) < low or max(drawn) > high:
        right = found.mean > 0
        edge, inward = (high, -1) if right else (low, 1)
        width = (high - low) * inward
        axes.plot(
            [edge + EDGE * width / 2], [y], ls="", marker=">" if right else "<", ms=5, color=style.colour, zorder=4
        )
        words = (
            f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"
            if math.isfinite(found.low)
            else f"{found.mean:+.2f}"
        )
        words = f"{words}; {fate}".removesuffix("; ").replace("-", "−")
        axes.text(edge + 2 * EDGE * width, y, words, ha="right" if right else "left", va="center", fontsize=7)
        return
    axes.plot(seeds, np.full(seeds.size, y), ls="", marker="o", ms=2.6, color=GREY, alpha=0.6, mew=0, zorder=2)
    if math.isfinite(found.low):
        axes.plot([found.low, found.high], [y, y], color=style.colour, lw=1.6, zorder=3, solid_capstyle="butt")
    axes.plot([found.mean], [y], zorder=4, **style.point)
    if fate:
        axes.annotate(fate, (max(drawn), y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7)
