"""What two cells of a study differ by, seed by seed: another recipe, another setting, or a difference of differences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from exmy.findings.numbers import Number
from exmy.findings.studies import Evidence, Part, departures
from exmy.findings.tables import NONE, headed, line, ranged, rate_words
from train.claims import Claim, Judged, rates_of
from train.paired import Difference, paired

TRAINING, VALIDATION = "final_loss", "final_validation_loss"
Losses = Mapping[int, float]


def by_seed(part: Part, recipe: str, rate: float, variable: str = TRAINING) -> Losses:
    """A cell's finite values by seed, rising."""
    runs = part.runs
    chosen = (part.names == recipe) & np.isclose(runs["learning_rate"].values, rate)
    pairs = zip(runs["seed"].values[chosen].tolist(), runs[variable].values[chosen].astype(float).tolist(), strict=True)
    return {seed: value for seed, value in sorted(pairs) if math.isfinite(value)}


def less(ours: Losses, theirs: Losses) -> Losses:
    """Of shared seeds the difference."""
    return {seed: value - theirs[seed] for seed, value in ours.items() if seed in theirs}


def mean_of(differences: Losses) -> Difference:
    """Their mean with Student's interval."""
    return paired(list(differences.values()))


def told(of: Difference) -> str:
    """Such as "-0.0140 [-0.0222, -0.0058]"."""
    return ranged(Number(of.mean, of.low, of.high), "+.4f")


def validation_of(of: Judged, evidence: Evidence) -> Difference | None:
    """A claim's own contrast in the validation loss, on the seeds that it used; None of a claim that is not about losses.

    Of them those without a finite loss are left out: a claim counts them at the initial one, and there is none of validation.
    """
    claim = of.claim
    if claim.statistic != "loss" or not of.looks:
        return None
    validation, used = _contrast(claim, evidence, VALIDATION), _seeds_of(claim, evidence)[: of.used]
    return mean_of({seed: validation[seed] for seed in used if seed in validation})


def at_other_rates(of: Judged, evidence: Evidence) -> list[tuple[float, Difference]]:
    """A claim's own contrast, in training loss, at every rate but its own at which all its cells have pairs, rising.

    Of a claim at the rate that is best for its baseline all rates, both of its parts at the same. Losses that are not finite are
    left out.
    """
    claim = of.claim
    if claim.statistic != "loss" or not of.looks:
        return []
    parts = [_part_of(one, evidence) for one in (claim, claim.elsewhere) if one]
    found = []
    for rate in sorted(set.intersection(*(set(part.rates) for part in parts))):
        there_are = all(failed(part, name, rate)[1] for part in parts for name in (claim.recipe, claim.baseline))
        if there_are and not (claim.learning_rate and math.isclose(rate, claim.learning_rate)):
            there = _contrast(claim.model_copy(update={"learning_rate": rate}), evidence, TRAINING)
            if len(there) > 1:
                found.append((rate, mean_of(there)))
    return found


def _contrast(claim: Claim, evidence: Evidence, variable: str) -> Losses:
    found, *other = [
        less(*(by_seed(part, name, rate, variable) for name in (claim.recipe, claim.baseline)))
        for part, rate in _parts(claim, evidence)
    ]
    return less(found, *other) if other else found


def _parts(claim: Claim, evidence: Evidence) -> list[tuple[Part, float]]:
    """The runs that a claim is about, and those that it is held against, each with its learning rate."""
    parts = [_part_of(of, evidence) for of in (claim, claim.elsewhere) if of]
    return list(zip(parts, rates_of(claim, [part.grid for part in parts]), strict=True))


def _seeds_of(claim: Claim, evidence: Evidence) -> list[int]:
    """The seeds that both recipes have at the claim's rates in all of its parts, lost ones too, in the order of its looks."""
    shared: list[int] | None = None
    for part, rate in _parts(claim, evidence):
        there = (
            part.grid["diverged"].sel(recipe=[claim.recipe, claim.baseline], learning_rate=rate).notnull().all("recipe")
        )
        own = part.grid["seed"].values[there.values].tolist()
        shared = own if shared is None else [seed for seed in shared if seed in own]
    return shared or []


def _part_of(claim: Claim, evidence: Evidence) -> Part:
    (part,) = [part for part in evidence.parts if claim.where.items() <= part.where.items()]
    return part


def neighbours(parts: Sequence[Part], axis: str) -> Iterator[tuple[Part, Part]]:
    """Pairs of parts, in the study's order, that differ in nothing but their place on one axis."""
    for i, one in enumerate(parts):
        for other in parts[i + 1 :]:
            if {name for name in one.where if one.where[name] != other.where[name]} == {axis}:
                yield one, other


def failed(part: Part, recipe: str, rate: float) -> tuple[int, int]:
    """Runs of a cell that diverged by the study's definition, of how many."""
    runs = part.runs
    own = (part.names == recipe) & np.isclose(runs["learning_rate"].values, rate)
    return int(runs["diverged"].values[own].sum()), int(own.sum())


def failing(evidence: Evidence) -> list[str]:
    """Recipes of which at some rate and setting at least half of the runs diverged, in the study's order."""
    found: dict[str, bool] = {}
    for part in evidence.parts:
        for recipe in part.recipes:
            cells = [failed(part, recipe, rate) for rate in part.rates]
            found[recipe] = found.get(recipe, False) or any(n and 2 * k >= n for k, n in cells)
    return [recipe for recipe, at in found.items() if at]


def failures_table(evidence: Evidence) -> Iterator[str]:
    """A row a setting and failing recipe, a column a rate; nothing where no recipe fails in half of its runs."""
    rates = sorted({rate for part in evidence.parts for rate in part.rates})
    rows = []
    for recipe in failing(evidence):
        for part in evidence.parts:
            cells = [failed(part, recipe, rate) for rate in rates]
            if any(k for k, _ in cells):
                shown = [f"{k}/{n}" if n else NONE for k, n in cells]
                rows.append(line([departures(part, evidence.parts), f"`{recipe}`", *shown]))
    if rows:
        yield (
            "Runs that diverged by the study's definition, at all its rates, of recipes half of whose runs do at some "
            "rate; settings "
            "in which none does are left out:"
        )
        yield ""
        yield from headed(("setting", "recipe", *map(rate_words, rates)))
        yield from rows
        yield ""


def past_its_best(evidence: Evidence, rates: Sequence[float], margin: float) -> Iterator[str]:
    """Settings and rates at which the baseline itself ends so far above its own best, in words."""
    base = evidence.baseline
    for part in evidence.parts:
        means = {rate: np.mean(list(found.values())) for rate in part.rates if (found := by_seed(part, base, rate))}
        for rate in rates:
            if rate in means and means[rate] > min(means.values()) + margin:
                best = min(means, key=lambda one: means[one])
                yield (
                    f"{departures(part, evidence.parts)}, {rate_words(rate)} ({means[rate] - means[best]:+.3f} above "
                    f"{rate_words(best)})"
                )
