"""The tables of the findings' page, in Markdown, and what follows from them by rule; every number made from the datasets.

Intervals are 95 %. A recipe is said to lie apart only where its interval, or its p-value after Holm's adjustment, says so; an
interval that contains zero is no proof of equality, and "as stable" is said only where it is shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import xarray as xr

from exmy.compare_page import interval, p_value, signed
from exmy.costs import Comparison, Row
from exmy.findings.numbers import (
    ROLES,
    SHARES,
    Number,
    by_definition,
    edges_of,
    endings,
    losses,
    number,
    reference,
    rounding_gaps,
    signal_share,
    spread,
    verdict_row,
)
from exmy.findings.once import once
from exmy.findings.studies import Evidence, Part, departures, power, sizes_apart
from train.proportions import clopper_pearson_interval
from train.window import ALLOWED

NONE = "–"


def line(cells: Sequence[str]) -> str:
    """A row of a table."""
    return f"| {' | '.join(cells)} |"


def headed(headings: Sequence[str]) -> list[str]:
    """The first two lines: the first column to the left, the others to the right."""
    return [line(headings), line(["---", *["---:"] * (len(headings) - 1)])]


def shown(value: float, form: str) -> str:
    """A number, – for none, ∞ for no bound."""
    return (
        NONE if math.isnan(value) else "∞" if value == math.inf else "-∞" if value == -math.inf else f"{value:{form}}"
    )


def ranged(of: Number, form: str) -> str:
    """A number with its interval, such as "+0.100 [+0.050, +0.150]"; the number alone where it has none."""
    if math.isnan(of.value):
        return NONE
    limits = "" if math.isnan(of.low) and math.isnan(of.high) else f" [{shown(of.low, form)}, {shown(of.high, form)}]"
    return shown(of.value, form) + limits


def share(k: int, n: int) -> str:
    """Diverged runs with Clopper and Pearson's interval, such as "3/20 [3.2–37.9 %]"."""
    if not n:
        return "no runs"
    low, high = (100 * float(end) for end in clopper_pearson_interval(k, n))
    return f"{k}/{n} [{low:.1f}–{high:.1f} %]"


def rate_words(rate: float) -> str:
    """A learning rate: as a power of two if it is one."""
    if not math.isfinite(rate):
        return NONE
    return power(rate) if power(rate).startswith("2^") else f"{rate:.3g}"


def in_table_order(evidence: Evidence, part: Part) -> list[str]:
    """The baseline first."""
    return sorted(part.recipes, key=lambda recipe: recipe != evidence.baseline)


def named(evidence: Evidence, recipe: str) -> str:
    """A recipe's name as code, the baseline's in bold."""
    return f"**`{recipe}`**" if recipe == evidence.baseline else f"`{recipe}`"


def definitions(part: Part, recipe: str) -> str:
    """Runs diverged by each definition in the order of `stability.DEFINITIONS`, of all rates."""
    found = by_definition(part, recipe)
    return " · ".join(str(k) for k, _ in found.values()) + f" of {next(iter(found.values()))[1]}"


@once
def at_rate(part: Part, rate: float) -> Part:
    """The part's runs at one learning rate."""
    return Part(part.label, part.where, part.runs.isel(run=part.runs["learning_rate"].values == rate), part.of)


def recipe_table(evidence: Evidence, part: Part, of: xr.Dataset | str) -> Iterator[str]:
    """A row a recipe: how often it diverged, its window, sensitivity and penalty against the baseline's."""
    rate = reference(evidence, part)
    yield from headed(
        (
            "recipe",
            f"diverged at {rate_words(rate)} [95 %]",
            "all rates, by definition",
            "validation loss there, median",
            "window, octaves [at least, at most]",
            "LR sensitivity, nats/token [95 %]",
            "best rate",
            "loss penalty, nats/token [95 %]",
            "pairs",
        )
    )
    for recipe in in_table_order(evidence, part):
        row = verdict_row(of, recipe)
        median = spread(losses(part, recipe, rate)).median if math.isfinite(rate) else math.nan
        own = recipe == evidence.baseline
        yield line(
            [
                named(evidence, recipe),
                share(int(row["diverged"]), int(row["runs"])) if row and math.isfinite(rate) else NONE,
                definitions(part, recipe),
                "not finite" if median == math.inf else shown(median, ".4f"),
                ("≥ " if row.get("window_censored_below") or row.get("window_censored_above") else "")
                + ranged(number(row, "window"), ".1f"),
                ranged(number(row, "sensitivity"), ".4f"),
                rate_words(row.get("optimum", math.nan)),
                "baseline" if own else ranged(number(row, "loss_penalty"), "+.4f"),
                "" if own else shown(row.get("loss_pairs", math.nan), ".0f"),
            ]
        )


def seed_table(evidence: Evidence, part: Part, rate: float) -> Iterator[str]:
    """A row a recipe at one learning rate: shares with exact intervals, pairs with the baseline, and final losses."""
    of = evidence.verdict_at(part, rate)
    costs = {
        row.recipe: row for row in cost_rows(evidence.comparison) if row.group == part.key and row.learning_rate == rate
    }
    yield from headed(
        (
            "recipe",
            "diverged [95 %]",
            "by definition",
            "recipe alone / baseline alone",
            "McNemar p (Holm)",
            "share above the baseline's [95 %]",
            "validation loss, median",
            "difference of means, nats/token [95 %]",
        )
    )
    here = at_rate(part, rate)
    for recipe in in_table_order(evidence, here):
        own = here.runs["diverged"][here.names == recipe]
        row, base = verdict_row(of, recipe), recipe == evidence.baseline
        median = spread(losses(part, recipe, rate)).median
        alone = f"{int(row['only_recipe'])} / {int(row['only_baseline'])}" if row else NONE
        yield line(
            [
                named(evidence, recipe),
                share(int(own.sum()), own.sizes["run"]),
                definitions(here, recipe),
                "baseline" if base else alone,
                "" if base else p_value(row.get("p_differ_holm", math.nan)),
                "" if base else ranged(Number(*(100 * x for x in number(row, "rate_difference"))), "+.1f") + " %",
                "not finite" if median == math.inf else shown(median, ".4f"),
                "" if base or recipe not in costs else interval(costs[recipe].validation),
            ]
        )


def cost_rows(found: Comparison | str) -> list[Row]:
    """The rows of a comparison; none where there is no comparison."""
    return [] if isinstance(found, str) else list(found.rows)


def condition_rows(evidence: Evidence) -> Iterator[tuple[str, Row, Row | None]]:
    """Each condition with a recipe's row and the baseline's there, in the study's order."""
    rows = cost_rows(evidence.comparison)
    several = len({row.learning_rate for row in rows}) > 1
    for part in evidence.parts:
        words = departures(part, evidence.parts)
        for row in rows:
            if row.group == part.key and row.recipe != evidence.baseline:
                own = [r for r in rows if r.recipe == evidence.baseline and r.group == row.group]
                base = next((r for r in own if r.learning_rate == row.learning_rate), None)
                yield words + (f", rate {rate_words(row.learning_rate)}" if several else ""), row, base


def condition_table(evidence: Evidence, rates: Sequence[float] | None = None) -> Iterator[str]:
    """A row a condition and recipe: the difference of final validation losses from the baseline under the same condition.

    rates: the learning rates that are meant, all if None.
    """
    yield from headed(
        ("condition", "recipe", "baseline's loss", "difference, nats/token [95 %]", "Holm p", "pairs",
         "diverged, by definition", "baseline's")
    )  # fmt: skip
    parts = {part.key: part for part in evidence.parts}
    for words, row, base in condition_rows(evidence):
        if rates is not None and row.learning_rate not in rates:
            continue
        yield line(
            [
                words,
                f"`{row.recipe}`",
                shown(base.validation.mean, ".4f") if base else NONE,
                interval(row.validation) if row.validation.differences else NONE,
                p_value(row.validation.difference.p_holm),
                str(len(row.validation.differences)),
                definitions(at_rate(parts[row.group], row.learning_rate), row.recipe),
                definitions(at_rate(parts[row.group], row.learning_rate), evidence.baseline) if base else NONE,
            ]
        )


def signal_table(evidence: Evidence) -> Iterator[str]:
    """A row a recipe: shares flushed and clipped of each role, in %, the median of its runs at the baseline's best rate."""
    yield from headed(
        ("recipe", *(f"{role} {which}, % [least, most]" for which in SHARES for role in ROLES))
    )  # fmt: skip
    for part in evidence.parts:
        rate = reference(evidence, part)
        for recipe in in_table_order(evidence, part):
            cells = [
                ranged(Number(*(100 * x for x in signal_share(evidence, part, recipe, which, role, rate))), ".3g")
                for which in SHARES
                for role in ROLES
            ]
            if any(cell != NONE for cell in cells):
                yield line([named(evidence, recipe) + (f", {part.label}" if part.label else ""), *cells])


def endings_table(evidence: Evidence) -> Iterator[str]:
    """How the runs that diverged ended, of all rates."""
    yield from headed(
        ("recipe", "diverged", "not finite", "at the text's unigram entropy", "above it", "median step of divergence")
    )
    for part in evidence.parts:
        for recipe in in_table_order(evidence, part):
            found = endings(part, recipe)
            if found.diverged:
                yield line(
                    [
                        named(evidence, recipe) + (f", {part.label}" if part.label else ""),
                        f"{found.diverged}/{by_definition(part, recipe)['no_progress'][1]}",
                        *map(str, (found.lost, found.collapsed, found.above)),
                        shown(found.median_step, ",.0f"),
                    ]
                )


def rounding_table(evidence: Evidence) -> Iterator[str]:
    """A row a format and rounding: the final loss above that of nearest even, each at its own best rate."""
    yield from headed(("recipe", "against", "loss penalty, nats/token [95 %]", "pairs"))
    for part in evidence.parts:
        for _, _, recipe, other, penalty, pairs in rounding_gaps(part):
            words = f"`{recipe}`" + (f", {part.label}" if part.label else "")
            yield line([words, f"`{other}`", ranged(penalty, "+.4f"), str(pairs)])


def size_table(evidence: Evidence) -> Iterator[str]:
    """A row a model and recipe: the largest stable rate, the next that is not, and the loss penalty."""
    yield from headed(
        ("model", "parameters", "recipe", f"largest rate at which at most {100 * ALLOWED:g} % diverged",
         "next rate that is not", "loss penalty, nats/token [95 %]", "pairs")
    )  # fmt: skip
    apart = [(label, part) for label, parts in sizes_apart(evidence.parts).items() for part in parts]
    for label, part in apart:
        of = evidence.verdicts[evidence.parts.index(part)]
        for recipe in in_table_order(evidence, part):
            found, row, own = edges_of(part, recipe), verdict_row(of, recipe), recipe == evidence.baseline
            yield line(
                [
                    part.sample.model.label + (f", {label}" if label else ""),
                    f"{part.parameters:,}",
                    named(evidence, recipe),
                    f"{rate_words(found.largest)} ({found.largest_counts})"
                    if found.largest_counts
                    else "none of those tried",
                    f"{rate_words(found.unstable)} ({found.unstable_counts})"
                    if found.unstable_counts
                    else "beyond the grid",
                    "baseline" if own else ranged(number(row, "loss_penalty"), "+.4f"),
                    "" if own else shown(row.get("loss_pairs", math.nan), ".0f"),
                ]
            )


def divergence_words(evidence: Evidence, part: Part, of: xr.Dataset | str) -> Iterator[str]:
    """What a verdict says about divergence, in a sentence."""
    if isinstance(of, str):
        yield f"No comparison: {of}."
        return
    rate = float(of.attrs["reference_rate"])
    if not math.isfinite(rate):
        yield f"Divergence is compared at no rate: more than half of {evidence.baseline}'s runs diverged at each."
        return
    every = {recipe: verdict_row(of, recipe) for recipe in part.recipes if recipe != evidence.baseline}
    rows = {recipe: row for recipe, row in every.items() if row.get("pairs")}
    states = ("less stable", "more stable", "as stable", "undecided")
    by_state = {state: _told(r for r, row in rows.items() if row.get("state") == state) for state in states}
    yield (
        f"Divergence at {rate_words(rate)}, pairs of seeds, Holm's p-values: less stable {by_state['less stable']}; more stable "
        f"{by_state['more stable']}; as stable within {100 * float(of.attrs['margin']):g} % {by_state['as stable']}; undecided "
        f"{by_state['undecided']}."
    )


def loss_words(evidence: Evidence, part: Part, of: xr.Dataset | str) -> Iterator[str]:
    """What a verdict says about losses, and about recipes that train nowhere, a sentence each."""
    if isinstance(of, str):
        return
    rows = {recipe: verdict_row(of, recipe) for recipe in part.recipes}
    penalties = {r: number(row, "loss_penalty") for r, row in rows.items() if r != evidence.baseline}
    higher = {recipe: of for recipe, of in penalties.items() if of.low > 0}
    lower = {recipe: of for recipe, of in penalties.items() if of.high < 0}
    within = [of for of in penalties.values() if of.low <= 0 <= of.high]
    most = f", up to {signed(max(of.high for of in within))} still possible" if within else ""
    yield (
        f"Final training loss of pairs that trained, each recipe at its own best rate, interval without zero: higher "
        f"{_numbered(higher)}; lower {_numbered(lower)}; with zero in it {len(within)} of {len(penalties)}{most}."
    )
    nowhere = [recipe for recipe, row in rows.items() if math.isnan(row["optimum"])]
    if nowhere:
        yield f"Trained at no learning rate that was tried: {_told(nowhere)}."


def follows(evidence: Evidence, part: Part, of: xr.Dataset | str) -> Iterator[str]:
    """What a part's verdict says by rule, a sentence or two each."""
    yield from divergence_words(evidence, part, of)
    yield from loss_words(evidence, part, of)


def _told(recipes: Iterable[str]) -> str:
    return ", ".join(f"`{recipe}`" for recipe in recipes) or "none"


def _numbered(those: Mapping[str, Number]) -> str:
    return ", ".join(f"`{recipe}` {signed(of.value)}" for recipe, of in those.items()) or "none"
