"""The findings in a few sentences at the head of their page, and of each cause of disagreement what its study came to.

Every number is made from the datasets, and so is every choice of words: a format is said to fail, or a rate to matter more than
a format, only where the counts or the intervals say so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from exmy.compare_page import signed
from exmy.findings.collapse import lost_again
from exmy.findings.growth import LEVEL, cells, growth
from exmy.findings.numbers import Number, edges_of, number, rounding_gaps, verdict_row
from exmy.findings.rates import size_words
from exmy.findings.studies import Available, Evidence, Part, departures, sizes_apart
from exmy.findings.tables import condition_rows, ranged, rate_words
from train.optimum import optimum
from train.proportions import paired_interval, pairs_of


def in_short(studies: Available) -> Iterator[tuple[str, str]]:
    """(study, sentences) of each that is there and has something to say."""
    for name, of in SHORT.items():
        found = studies.get(name)
        words = " ".join(of(found)) if isinstance(found, Evidence) else ""
        if words:
            yield name, words


def came(studies: Available, study: str) -> str:
    """What a study says of the cause that it tries, in a clause; "" where it is not there."""
    found = studies.get(study)
    return "; ".join(CAME[study](found)) if study in CAME and isinstance(found, Evidence) else ""


def counts(part: Part, recipe: str, rate: float | None = None) -> tuple[int, int]:
    """Runs diverged, of how many; at one rate or at all."""
    own = part.names == recipe
    if rate is not None:
        own &= part.runs["learning_rate"].values == rate
    return int(part.runs["diverged"].values[own].sum()), int(own.sum())


def _seeds(evidence: Evidence) -> Iterator[str]:
    """Counts by format at each rate; whether the rate moves them more than the formats can."""
    base = evidence.baseline
    limits, by_rate = [0.0], []
    for part in evidence.parts:
        for rate in part.rates:
            at = {recipe: counts(part, recipe, rate) for recipe in part.recipes}
            said = ", ".join(f"`{recipe}` {k}/{n}" for recipe, (k, n) in at.items() if n)
            where = f" ({part.label})" if part.label else ""
            yield f"Failed at {rate_words(rate)}{where}: {said}."
            by_rate.append((part.label, at[base][0] / at[base][1] if base in at and at[base][1] else math.nan))
            limits += [
                abs(end) for recipe in part.recipes if recipe != base for end in _limits(part, recipe, base, rate)
            ]
    moves = [
        abs(a - b)
        for i, (where, a) in enumerate(by_rate)
        for other, b in by_rate[:i]
        if where == other and a == a and b == b
    ]
    if moves and max(moves) > max(limits):
        yield (
            f"The rate moves `{base}`'s share by {100 * max(moves):.0f} %, no format differs from it by more than "
            f"{100 * max(limits):.1f} % at any rate (95 % limits)."
        )


def _limits(part: Part, recipe: str, base: str, rate: float) -> list[float]:
    if not {recipe, base} <= set(part.recipes):
        return []
    grid = part.grid.sel(learning_rate=rate)["diverged"]
    low, high = paired_interval(pairs_of(*(grid.sel(recipe=name, drop=True) for name in (recipe, base))))
    return [x for x in (low, high) if math.isfinite(x)]


def _mantissa(evidence: Evidence) -> Iterator[str]:
    for part in evidence.parts:
        yield from _alone_in_failing(part, evidence.baseline)
        told = [
            f"{ranged(grown.factor, '.2f')} at {rate_words(rate)}"
            for (_, rate), rows in cells(evidence, part).items()
            if (grown := growth(rows)) is not None and counts(part, evidence.baseline, rate)[0] == 0
        ]
        if told:
            yield (
                "In loss fewer bits cost something all the same, and with each bit that goes so many times more: "
                f"{', '.join(told)}."
            )


def _alone_in_failing(part: Part, base: str) -> Iterator[str]:
    failing = {
        recipe: [
            f"{k}/{n} at {rate_words(rate)}"
            for rate in part.rates
            for k, n in [counts(part, recipe, rate)]
            if k and counts(part, base, rate)[0] == 0 < counts(part, base, rate)[1]
        ]
        for recipe in part.recipes
    }
    told = ", ".join(f"`{recipe}` ({', '.join(at)})" for recipe, at in failing.items() if at)
    if told:
        yield f"Runs failed at rates where none of `{base}` did: {told}; of the other formats none."
    elif counts(part, base)[1]:
        yield f"At no rate where every run of `{base}` trained did a run of another format fail."


def _conditions(evidence: Evidence) -> Iterator[str]:
    most = _most_costly(evidence)
    if most:
        yield f"The most that fewer bits cost under any condition tried, told from zero over all: {', '.join(most)}."
    for part, rate, recipe, found in lost_again(evidence):
        yield (
            f"`{recipe}`, {departures(part, evidence.parts)}, rate {rate_words(rate)}: {found.back} of {found.runs} runs "
            f"learnt, down to a median of {found.lowest:.2f}, and lost it again."
        )


def _most_costly(evidence: Evidence) -> list[str]:
    best: dict[str, tuple[float, str]] = {}
    for words, row, _ in condition_rows(evidence):
        mean = row.validation.difference.mean
        if row.validation.difference.p_holm <= LEVEL and mean > best.get(row.recipe, (0.0, ""))[0]:
            best[row.recipe] = mean, words
    return [f"`{recipe}` {signed(mean)} ({words})" for recipe, (mean, words) in best.items()]


def _exponent(evidence: Evidence) -> Iterator[str]:
    told = list(_failed_by_part(evidence))
    if told:
        yield f"Failed, of all rates together: {'; '.join(told)}."


def _scaling(evidence: Evidence) -> Iterator[str]:
    """Counts; at each recipe's own best rate, which losses are told from the baseline's, and what others may cost at most."""
    yield from _exponent(evidence)
    table = evidence.verdicts[0]
    penalties = {
        recipe: number(verdict_row(table, recipe), "loss_penalty")
        for recipe in evidence.parts[0].recipes
        if recipe != evidence.baseline
    }
    known = {recipe: found for recipe, found in penalties.items() if math.isfinite(found.value)}
    dearer = {recipe: found for recipe, found in known.items() if found.low > 0}
    told = [f"`{recipe}` {ranged(found, '+.4f')}" for recipe, found in dearer.items()]
    rest = [found.high for recipe, found in known.items() if recipe not in dearer]
    if told:
        yield f"In loss, each at its own best rate, more than `{evidence.baseline}`: {', '.join(told)}."
    if rest and all(map(math.isfinite, rest)):
        others = "of the others that train " if told else ""
        yield f"No loss {others}is shown to be higher, and beyond {max(rest):+.4f} none can be (95 % limits)."


def _failed_by_part(evidence: Evidence) -> Iterator[str]:
    """Recipes of which any run failed, and at the end those of which none did."""
    for recipe in dict.fromkeys(recipe for part in evidence.parts for recipe in part.recipes):
        at = [(part.label, *counts(part, recipe)) for part in evidence.parts if recipe in part.recipes]
        if any(k for _, k, _ in at):
            yield f"`{recipe}` " + ", ".join(f"{k}/{n}" + (f" at {label}" if label else "") for label, k, n in at)
    sound = [
        recipe
        for recipe in dict.fromkeys(r for part in evidence.parts for r in part.recipes)
        if not _failures(evidence, recipe)
    ]
    if sound:
        yield f"none of {', '.join(f'`{recipe}`' for recipe in sound)}"


def _failures(evidence: Evidence, recipe: str) -> int:
    return sum(counts(part, recipe)[0] for part in evidence.parts if recipe in part.recipes)


def _rounding(evidence: Evidence) -> Iterator[str]:
    part = evidence.parts[0]
    gaps = list(_fewest_gaps(part))
    if gaps:
        yield f"Above rounding to nearest, each at its own best rate: {', '.join(gaps)}."
    grown: dict[str, list[str]] = {}
    for (rounding, rate), rows in cells(evidence, part).items():
        found = growth(rows)
        if found:
            grown.setdefault(rounding, []).append(f"{ranged(found.factor, '.2f')} at {rate_words(rate)}")
    if grown:
        told = "; ".join(f"{rounding} {', '.join(each)}" for rounding, each in grown.items())
        yield f"With each bit that goes its cost is multiplied so many times: {told}."


def _fewest_gaps(part: Part) -> Iterator[str]:
    """Of each rounding, at the fewest bits and at three."""
    gaps = list(rounding_gaps(part))
    fewest = min((kind.mantissa_bits or 0 for kind, *_ in gaps), default=0)
    for kind, _, recipe, _, penalty, _ in gaps:
        if kind.mantissa_bits in (3, fewest):
            yield f"`{recipe}` {ranged(penalty, '+.4f')}"


def _size(evidence: Evidence) -> Iterator[str]:
    for label, parts in sizes_apart(evidence.parts).items():
        told = list(_from_small_to_large(evidence, parts))
        if told:
            yield (
                f"From {size_words(parts[0].parameters)} to {size_words(parts[-1].parameters)} parameters"
                + (f", {label}" if label else "")
                + f", the loss penalty: {'; '.join(told)}."
            )
        base = evidence.baseline
        for recipe in parts[0].recipes:
            ends = [edges_of(part, recipe) for part in (parts[0], parts[-1]) if recipe in part.recipes]
            if len(ends) == 2 and all(math.isfinite(end.largest) and math.isfinite(end.unstable) for end in ends):
                rates = [
                    optimum(part.grid, base) if base in part.recipes else math.nan for part in (parts[0], parts[-1])
                ]
                yield (
                    f"`{recipe}`'s largest stable rate goes from {' to '.join(rate_words(end.largest) for end in ends)}, the "
                    f"best of `{base}` from {' to '.join(map(rate_words, rates))}."
                )


def _from_small_to_large(evidence: Evidence, parts: list[Part]) -> Iterator[str]:
    def penalty(part: Part, recipe: str) -> Number:
        return number(verdict_row(evidence.verdicts[evidence.parts.index(part)], recipe), "loss_penalty")

    for recipe in parts[0].recipes:
        ends = [penalty(part, recipe) for part in (parts[0], parts[-1])]
        if recipe != evidence.baseline and np.isfinite([of.value for of in ends]).all():
            yield f"`{recipe}` " + " to ".join(ranged(of, "+.4f") for of in ends)


def _sizes(evidence: Evidence) -> Iterator[str]:
    for parts in sizes_apart(evidence.parts).values():
        yield from _from_small_to_large(evidence, parts)


Says = Callable[[Evidence], Iterator[str]]
SHORT: Mapping[str, Says] = {
    "seeds": _seeds, "mantissa": _mantissa, "conditions": _conditions, "exponent": _exponent, "rounding": _rounding,
    "scaling": _scaling, "size": _size,
}  # fmt: skip
CAME: Mapping[str, Says] = {
    "size": _sizes, "conditions": lambda evidence: iter(_most_costly(evidence)), "exponent": _failed_by_part,
    "rounding": lambda evidence: _fewest_gaps(evidence.parts[0]),
}  # fmt: skip
