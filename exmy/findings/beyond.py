"""What the studies show beyond the claims: looked for after the runs, so that it is for a next study to decide.

Each section's table or sentences are made of its dataset alone, and say nothing where that has nothing to say it of.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import xarray as xr

from exmy.compare_page import interval, p_value, signed
from exmy.findings.collapse import BACK, DEEP, lost_again
from exmy.findings.flushed import HEAD, gradient_flushed, others
from exmy.findings.growth import NOTE, from_which_bit, growth_table
from exmy.findings.numbers import Number, has_signals, rounding_gaps
from exmy.findings.studies import Evidence, Part, departures, usual
from exmy.findings.tables import NONE, condition_rows, cost_rows, headed, line, ranged, rate_words
from train.optimum import loss_penalty, optimum
from train.paired import holm
from train.proportions import mcnemar, paired_interval, pairs_of
from train.sample_size import least_telling, power_paired

MARGINS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4)
PAPER = 0.1  # one seed in ten
LEVEL, POWER = 0.05, 0.8

TITLE = "**Beyond the claims.** Looked for after the runs; nothing here was announced, and no rule decides it."


def of_seeds(evidence: Evidence) -> Iterator[str]:
    """Bits that agree; how many fail by other margins of the definition; what so many seeds could have told."""
    base = evidence.baseline
    for recipe in dict.fromkeys(name for part in evidence.parts for name in part.recipes if name != base):
        same, of = (sum(n) for n in zip(*(_alike(part.runs, recipe, base) for part in evidence.parts), strict=True))
        if of and same == of:
            yield (
                f"- `{recipe}` ends in `{base}`'s loss to the last bit in {same} of {of} pairs, and so has all its counts. What "
                "is found of the one is found of the other, and no claim about their difference tests more than that."
            )
    yield from _what_seeds_tell(evidence)
    apart = [
        f"`{row.recipe}` at {', '.join(filter(None, [rate_words(row.learning_rate), row.group]))} {interval(row.validation)}, "
        f"Holm p {p_value(row.validation.difference.p_holm)}"
        for row in cost_rows(evidence.comparison)
        if row.validation.difference.low > 0 or row.validation.difference.high < 0
    ]
    if apart:
        yield f"- Mean validation losses whose own interval leaves zero out, against `{base}`: {'; '.join(apart)}."
    yield ""
    yield from headed(
        ("gap that counts, nats/token", "recipe", f"`{base}` / recipe", f"`{base}` alone / recipe alone", "McNemar p",
         f"share of `{base}` above the recipe's [95 %]")
    )  # fmt: skip
    least = []
    for part in evidence.parts:
        for rate in part.rates:
            where = ", ".join([f"at {rate_words(rate)}", *([part.label] if part.label else [])])
            for margin, recipe, k, other, alone, beside, p, difference in _by_margin(part, base, rate):
                least.append(p)
                yield line(
                    [f"{margin:g}, {where}", f"`{recipe}`", f"{k} / {other}", f"{alone} / {beside}", p_value(p),
                     ranged(difference, "+.1f") + " %"]
                )  # fmt: skip
    smallest = (
        f"; the least of these {len(least)} is {p_value(min(holm(least)))} after Holm's adjustment" if least else ""
    )
    yield ""
    yield (
        "A run counts where its final training loss lies so far above the baseline's best median, or is not finite; the study's "
        f"own margin is in its block. p-values are each for itself{smallest}. Where a margin cuts through the middle of the "
        "losses, as the picture shows, its count says little of runs that fail."
    )


def _alike(runs: xr.Dataset, recipe: str, base: str) -> tuple[int, int]:
    """Pairs with equal final training losses, of how many."""

    def of(name: str) -> dict[tuple[float, int], float]:
        own = runs.isel(run=runs["recipe"].values.astype(str) == name)
        keys = zip(own["learning_rate"].values.tolist(), own["seed"].values.tolist(), strict=True)
        return dict(zip(keys, own["final_loss"].values.tolist(), strict=True))

    ours, theirs = of(recipe), of(base)
    shared = ours.keys() & theirs.keys()
    return sum(ours[key] == theirs[key] for key in shared), len(shared)


def _what_seeds_tell(evidence: Evidence) -> Iterator[str]:
    """Power: of the smallest part."""
    part = min(evidence.parts, key=lambda part: len(np.unique(part.runs["seed"].values)))
    n = len(np.unique(part.runs["seed"].values))
    told = least_telling(n, LEVEL, POWER)
    if told is not None:
        yield (
            f"- What {n} seeds a side could tell (McNemar's exact test at {100 * LEVEL:g} %, one comparison): {100 * told:.1f} % "
            f"of failed runs from none with a power of {100 * POWER:g} %, and the paper's {100 * PAPER:g} % from none with "
            f"{100 * min(power_paired(n, 0.0, PAPER, LEVEL), 0.999):.1f} % or more."
        )


class _Margin(NamedTuple):
    margin: float
    recipe: str
    base: int
    other: int
    alone: int
    beside: int
    p: float
    difference: Number


def _by_margin(part: Part, base: str, rate: float) -> Iterator[_Margin]:
    """At one rate, of recipes whose losses are not the baseline's own."""
    here = part.runs.isel(run=part.runs["learning_rate"].values == rate)
    for recipe in part.recipes:
        same, of = _alike(here, recipe, base)
        if recipe == base or not of or same == of:
            continue
        for margin in MARGINS:
            ours, theirs = (_failed(here, name, margin) for name in (base, recipe))
            found = pairs_of(ours, theirs)
            low, high = paired_interval(found)
            if found.first + found.second + found.both:
                yield _Margin(
                    margin, recipe, int(ours.sum()), int(theirs.sum()), found.first, found.second, mcnemar(found),
                    Number(*(100 * x for x in (found.difference, low, high))),
                )  # fmt: skip


def _failed(here: xr.Dataset, recipe: str, margin: float) -> xr.DataArray:
    own = here.isel(run=here["recipe"].values.astype(str) == recipe)
    final = own["final_loss"].values.astype(np.float64)
    return xr.DataArray(~(final <= own["gap_reference"].values + margin), {"seed": own["seed"].values}, ["seed"])


def of_mantissa(evidence: Evidence) -> Iterator[str]:
    """From which bit on, at which rates, and how fast it grows."""
    for part in evidence.parts:
        yield from growth_table(evidence, part)
        yield ""
        for words in from_which_bit(evidence, part):
            yield f"- {words}"
        yield from _too_slow(part)
    yield ""
    yield NOTE


def _too_slow(part: Part) -> Iterator[str]:
    """The lowest rates at which every run of every recipe counts as diverged: there they are slow."""
    diverged = part.grid["diverged"].transpose("learning_rate", "recipe", "seed")
    for i, rate in enumerate(part.grid["learning_rate"].values.tolist()):
        known = diverged.isel(learning_rate=i)
        if not bool(((known == 1) | known.isnull()).all()):
            return
        yield (
            f"- At {rate_words(rate)}, the lowest rate, all runs of all recipes count as diverged, the baseline's too: they are "
            "too slow to pass the entropy in these steps, and say nothing of stability."
        )


def of_rounding(evidence: Evidence) -> Iterator[str]:
    """The same by rounding; and each against the nearest with a bit less."""
    yield from of_mantissa(evidence)
    rows = []
    for part in evidence.parts:
        kinds = {recipe: part.numerics(recipe) for recipe in part.recipes}
        nearest = {kind.mantissa_bits: name for name, kind in kinds.items() if kind.rounding == "nearest even"}
        for kind, _, recipe, _, _, _ in rounding_gaps(part):
            other = nearest.get((kind.mantissa_bits or 0) - 1)
            if other:
                value, low, high, pairs = loss_penalty(part.grid, recipe, other)
                rows.append(line([f"`{recipe}`", f"`{other}`", ranged(Number(value, low, high), "+.4f"), str(pairs)]))
    if rows:
        yield ""
        yield from headed(("recipe", "against one bit fewer, to nearest", "loss penalty, nats/token [95 %]", "pairs"))
        yield from rows
        yield ""
        yield (
            "Cutting bits off errs by as much in the mean square as rounding to nearest with one bit fewer, and stochastic "
            "rounding by half of that: if the error's size were all, the first would cost here as much as the other, at every "
            "number of bits."
        )


def of_conditions(evidence: Evidence) -> Iterator[str]:
    """What lies below the baseline; how a cost changes with each condition; runs that learnt and lost it again."""
    yield from _at_best_rates(evidence)
    rows = [(words, row) for words, row, _ in condition_rows(evidence)]
    below = [
        f"{words}, `{row.recipe}` {signed(row.validation.difference.mean)} (Holm p {p_value(row.validation.difference.p_holm)})"
        for words, row in rows
        if row.validation.difference.mean < 0 and row.validation.difference.p_holm <= LEVEL
    ]
    if below:
        yield f"- Unexpected, lower losses with fewer bits, told from zero over all rows: {'; '.join(below)}."
    yield from _in_between(evidence)
    yield from _longer(evidence)
    for part, rate, recipe, found in lost_again(evidence):
        by = {name: k for name, (k, _) in found.by.items()}
        yield (
            f"- {_capital(departures(part, evidence.parts))}, rate {rate_words(rate)}, `{recipe}`: {found.back} of {found.runs} "
            f"runs came {DEEP:g} nats below the entropy and later rose to within {BACK:g} of it or above: the median falls to "
            f"{found.lowest:.2f} at step {found.lowest_step:,}, rises to {found.highest:.2f} at step {found.highest_step:,} and "
            f"ends at {found.end:.2f}. By `no_progress` {by['no_progress']} of them diverged, by `spike` {by['spike']}, by `gap` "
            f"{by['gap']}."
        )


def _at_best_rates(evidence: Evidence) -> Iterator[str]:
    """Costs at the rate that is best for the baseline under each condition."""
    recipes = list(dict.fromkeys(row.recipe for _, row, _ in condition_rows(evidence)))
    yield from headed(("condition", "best rate of the baseline", *(f"`{recipe}`" for recipe in recipes)))
    for part in evidence.parts:
        best = optimum(part.grid, evidence.baseline) if evidence.baseline in part.recipes else math.nan
        found = {
            row.recipe: row.validation
            for _, row, _ in condition_rows(evidence)
            if (row.group, row.learning_rate) == (part.key, best) and row.validation.differences
        }
        words = (departures(part, evidence.parts), rate_words(best))
        yield line([*words, *(interval(found[recipe]) if recipe in found else NONE for recipe in recipes)])
    yield ""


def _in_between(evidence: Evidence) -> Iterator[str]:
    """Formats with three to six bits that end higher: a half of what would change our mind on F2, if no run fails for it."""
    told, tried, failed = [], 0, 0
    parts = {part.key: part for part in evidence.parts}
    for words, row, base in condition_rows(evidence):
        bits = parts[row.group].numerics(row.recipe).mantissa_bits
        if bits in range(3, 7) and base is not None:
            tried += 1
            failed += max(0, len(row.diverged) - len(base.diverged))
            if row.validation.difference.mean > 0 and row.validation.difference.p_holm <= LEVEL:
                told.append((row.validation.difference.mean, f"`{row.recipe}`, {words}"))
    if told:
        most, where = max(told)
        yield (
            f"- With three to six bits {len(told)} of {tried} losses lie above the baseline's, told from zero over all rows, by "
            f"up to {signed(most)} ({where}). "
            + (
                "So a half of what we said would change our mind is here: they fall behind in loss, though no run fails for it."
                if not failed
                else f"{failed} more of their runs failed."
            )
        )


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def _longer(evidence: Evidence) -> Iterator[str]:
    """How many times what it costs as usual it costs after more steps."""
    most = usual(evidence.parts)
    if "steps" not in most:
        return
    at = {
        (part.where["steps"], row.learning_rate, row.recipe): row.validation.difference
        for part in evidence.parts
        for _, row, _ in condition_rows(evidence)
        if row.group == part.key and all(part.where[axis] == most[axis] for axis in most if axis != "steps")
    }
    for steps in dict.fromkeys(steps for steps, _, _ in at if steps != most["steps"]):
        told = [
            f"`{recipe}` at {rate_words(rate)} {signed(of.mean)} against {signed(before.mean)}"
            for (place, rate, recipe), of in at.items()
            if place == steps
            and (before := at.get((most["steps"], rate, recipe))) is not None
            and (of.low > before.high or of.high < before.low)
        ]
        if told:
            yield (
                f"- After {int(steps):,} steps in the place of {int(most['steps']):,}, where the two intervals don't touch: "
                f"{'; '.join(told)}."
            )


def of_sizes(evidence: Evidence) -> Iterator[str]:
    """Best rates by size; and what is flushed of the gradient, at the lowest rate, where every size trains."""
    recipes = list(dict.fromkeys(recipe for part in evidence.parts for recipe in part.recipes))
    parts = sorted(evidence.parts, key=lambda part: part.parameters)
    yield from headed(("parameters", *(f"best rate of `{recipe}`" for recipe in recipes)))
    edges = set()
    for part in parts:
        cells_ = []
        for recipe in recipes:
            rate = optimum(part.grid, recipe)
            edge = math.isfinite(rate) and rate in (part.rates[0], part.rates[-1])
            edges |= {recipe} if edge else set()
            cells_.append(rate_words(rate) + (" (the grid's end)" if edge else ""))
        yield line([f"{part.parameters:,}", *cells_])
    if edges:
        yield ""
        yield (
            f"- At a grid's end a better rate may lie beyond, and the penalty is at most what the table says: {_listed(edges)}."
        )
    if has_signals(evidence):
        yield ""
        lowest = max(part.rates[0] for part in parts)
        rows = [
            (part, recipe, found)
            for part in parts
            for recipe in recipes
            if recipe in part.recipes
            and (found := gradient_flushed(evidence, part, recipe, lowest)) is not None
            and found.head + found.most > 0
        ]
        if rows:
            yield from headed(
                ("parameters", "recipe", f"flushed of the gradient at {rate_words(lowest)}, %: `{HEAD}`",
                 "the most of another layer", "median of the other layers")
            )  # fmt: skip
            for part, recipe, found in rows:
                yield line([f"{part.parameters:,}", f"`{recipe}`", f"{100 * found.head:.3g}", *others(found)])


def _listed(names: set[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))
