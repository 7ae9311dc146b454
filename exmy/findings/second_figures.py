"""Figures of the second half: what each recipe costs at the rates that its claims are about, a row a recipe and setting."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from exmy.costs import Row
from exmy.findings.canvas import Drawing, mark, plain, sheet, styles
from exmy.findings.rows import in_lines
from exmy.findings.studies import Evidence
from exmy.findings.tables import condition_rows, rate_words

LINE, BROKEN, AROUND = (
    0.2,
    0.25,
    0.9,
)  # inches: of a row, of one with a name in two lines, and of an axis with its words
FEW_TICKS = 5
FAR = 8.0  # times the middle interval's reach, beyond which a row runs to the edge
LONGEST = 34  # characters of a row's words


def cost_drawings(evidence: Evidence, rates: Sequence[float]) -> Iterator[Drawing]:
    """A figure a rate at which there are pairs; none where nothing can be compared."""
    if isinstance(evidence.comparison, str):
        return
    for rate in rates:
        rows = rows_at(evidence, rate)
        if any(math.isfinite(row.validation.difference.mean) for _, row in rows):
            yield _drawing(evidence, rate, rows)


def _drawing(evidence: Evidence, rate: float, rows: Sequence[tuple[str, Row]]) -> Drawing:
    name = f"{evidence.name}-{rate:g}".replace(".", "-")
    return Drawing(
        evidence.name, name,
        f"Final validation loss above that of {evidence.baseline} at {rate_words(rate)}, mean of pairs of seeds "
        "with Student's 95 % "
        "interval, and behind it how many runs diverged by the study's definition"
        + ("; a colour and mark a recipe" if len({row.recipe for _, row in rows}) < len(rows) else "")
        + ("; an arrow: beyond the axis, with the mean" if _beyond([row for _, row in rows]) else ""),
        lambda: costs(evidence, rows),
    )  # fmt: skip


def rows_at(evidence: Evidence, rate: float) -> list[tuple[str, Row]]:
    """Each recipe and setting but the baseline, in the study's order, with its words."""
    several = len(evidence.parts) > 1
    found = []
    for words, row, _ in condition_rows(evidence):
        if math.isclose(row.learning_rate, rate):
            where = words.removesuffix(f", rate {rate_words(rate)}")
            found.append((f"{row.recipe}, {where}" if several and where != "as usual" else row.recipe, row))
    return found


def costs(evidence: Evidence, rows: Sequence[tuple[str, Row]]) -> Figure:
    """The rows of one rate, a colour a recipe."""
    names = [plain(in_lines(words, LONGEST)) for words, _ in rows]
    figure, axes = sheet((AROUND + (BROKEN if any("\n" in name for name in names) else LINE) * len(rows),))
    panel = axes[0, 0]
    recipes = list(dict.fromkeys(row.recipe for _, row in rows))
    # A colour says which rows are of one recipe: where each has one row alone it would say nothing.
    one = styles([recipes[0]])[recipes[0]]
    looks = styles(recipes, evidence.baseline) if len(recipes) < len(rows) else dict.fromkeys(recipes, one)
    ends = _ends([row for _, row in rows])
    panel.set_xlim(*ends)
    panel.xaxis.set_major_locator(MaxNLocator(FEW_TICKS))
    panel.axvline(0.0, color="#000000", lw=0.9, zorder=1)
    for y, (_, row) in enumerate(rows):
        of, style = row.validation.difference, looks[row.recipe]
        if math.isfinite(of.mean):
            inside = min(max(of.mean, ends[0]), ends[1])
            if inside == of.mean:
                low, high = (of.mean if math.isnan(x) else x for x in (of.low, of.high))
                panel.plot([max(low, ends[0]), min(high, ends[1])], [y, y], color=style.colour, lw=1.3, zorder=2)
                panel.plot([of.mean], [y], zorder=3, **style.point)
            else:
                right = of.mean > 0
                mark(panel, inside, y, style, ">" if right else "<")
                panel.annotate(
                    f"{of.mean:+.2f}".replace("-", "−"), (inside, y), xytext=(-6 if right else 6, 0), textcoords="offset points",
                    ha="right" if right else "left", va="center", fontsize=6.5,
                )  # fmt: skip
        else:
            panel.annotate(
                "no pair with finite losses",
                (0.98, y),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="center",
                fontsize=6.5,
            )
        panel.annotate(
            f"{len(row.diverged)}/{len(row.runs)}", (1.0, y), xycoords=("axes fraction", "data"), xytext=(5, 0),
            textcoords="offset points", va="center", fontsize=6.5, annotation_clip=False,
        )  # fmt: skip
    panel.annotate(
        "diverged", (1.0, 1.0), xycoords="axes fraction", xytext=(5, 3), textcoords="offset points", va="bottom", fontsize=6.5,
        annotation_clip=False,
    )  # fmt: skip
    panel.set_yticks(range(len(rows)), names, fontsize=6.5)
    panel.set_ylim(len(rows) - 0.4, -0.6)
    panel.tick_params(axis="y", length=0)
    panel.grid(visible=False, axis="y")
    panel.set_xlabel(f"final validation loss above\n{plain(evidence.baseline)}'s (nats/token)")
    return figure


def _beyond(rows: Sequence[Row]) -> bool:
    """Whether any mean lies beyond the axis."""
    low, high = _ends(rows)
    means = [row.validation.difference.mean for row in rows]
    return any(math.isfinite(mean) and not low <= mean <= high for mean in means)


def _ends(rows: Sequence[Row]) -> tuple[float, float]:
    """Of the axis: all limits, but those of rows far beyond most."""
    means = sorted(abs(of.mean) for of in (row.validation.difference for row in rows) if math.isfinite(of.mean))
    usual = FAR * max(means[len(means) // 2], 0.01)
    kept = [
        x
        for of in (row.validation.difference for row in rows)
        if math.isfinite(of.mean) and abs(of.mean) <= usual
        for x in (of.mean, of.low, of.high)
        if math.isfinite(x) and abs(x) <= usual
    ]
    low, high = min([0.0, *kept]), max([0.0, *kept])
    room = 0.06 * ((high - low) or 0.1)
    return low - room, high + room
