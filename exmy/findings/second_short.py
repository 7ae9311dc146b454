"""The second half in a few sentences, a study each; every number, and every choice of words, is made from its dataset."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from exmy.compare_page import signed
from exmy.findings.beyond import LEVEL
from exmy.findings.contrast import by_seed, failed, failing, less, mean_of, told
from exmy.findings.numbers import Number
from exmy.findings.second_beyond import KEPT, SPLIT, correlation, hardware_pairs, saved
from exmy.findings.sharpness_measures import measured_alike
from exmy.findings.studies import Available, Evidence, departures
from exmy.findings.tables import condition_rows, ranged, rate_words, share
from exmy.findings.warnings_part import WHOLE, Ranked, most_in_time, warmup_of
from train.alarm_ranking import FALSE_ALARMS

Rates = Sequence[float]


def in_short(studies: Available, rates: Mapping[str, Rates], alarms: Mapping[str, Ranked]) -> Iterator[tuple[str, str]]:
    """(study, sentences) of each that is there and has something to say; rates: those that a study's claims are about."""
    for name, of in SHORT.items():
        found = studies.get(name)
        words = " ".join(of(found, rates[name])) if isinstance(found, Evidence) else ""
        if words:
            yield name, words
    for name, ranking in alarms.items():
        found = studies.get(name)
        alike = measured_alike(found.tree, warmup_of(found)) if name == WHOLE and isinstance(found, Evidence) else ()
        if words := " ".join([*_alarms(ranking), *alike]):
            yield name, words


def came(studies: Available, study: str, rates: Mapping[str, Rates]) -> str:
    """What a study says of the cause that it tries; "" where it is not there or tries none."""
    found = studies.get(study)
    if study != "hardware" or not isinstance(found, Evidence):
        return ""
    return next(_hardware(found, rates[study]), "").removesuffix(".")


def _costs(evidence: Evidence, rates: Rates) -> Iterator[str]:
    """Which validation losses are told from the baseline's, and how far the others may be from it."""
    rows = [
        (words, row)
        for words, row, _ in condition_rows(evidence)
        if any(math.isclose(row.learning_rate, rate) for rate in rates)
    ]
    apart = [(words, row) for words, row in rows if row.validation.difference.p_holm <= LEVEL]
    rest = [row.validation.difference for _, row in rows if row.validation.difference.p_holm > LEVEL]
    for higher, way in ((True, "higher"), (False, "lower")):
        those = [
            f"`{row.recipe}` {signed(row.validation.difference.mean)} ({words})"
            for words, row in apart
            if (row.validation.difference.mean > 0) == higher
        ]
        yield f"Validation losses {way} than `{evidence.baseline}`'s, told from it over all rows: {', '.join(those) or 'none'}."
    if rest:
        yield (
            f"The other {len(rest)} lie within [{signed(min(of.low for of in rest))}, {signed(max(of.high for of in rest))}] "
            "(95 % limits, each for itself)."
        )


def _hardware(evidence: Evidence, rates: Rates) -> Iterator[str]:
    for part, rate, recipe, ours, theirs in hardware_pairs(evidence, rates):
        (k, n), (j, m) = (failed(part, name, rate) for name in (recipe, evidence.baseline))
        yield (
            f"`{recipe}`, {departures(part, evidence.parts)}, at {rate_words(rate)}: "
            f"{told(mean_of(less(ours, theirs)))} nats/token from "
            f"the hardware's products, {k}/{n} runs failed against {j}/{m}, losses correlated over seeds by "
            f"{ranged(correlation(ours, theirs), '.2f')}."
        )


def _switch(evidence: Evidence, rates: Rates) -> Iterator[str]:
    """Shares saved at each rate; failures by which steps are precise."""
    part = evidence.parts[0]
    for rate in rates:
        found = saved(evidence, rate, SPLIT)
        for of in dict.fromkeys(one.of for one in found):
            plain = f"masked-{of}"
            whole = mean_of(less(by_seed(part, plain, rate), by_seed(part, evidence.baseline, rate)))
            k, n = failed(part, plain, rate)
            each = []
            for one in found:
                if one.of == of:
                    bad = failed(part, one.recipe, rate)
                    steps = one.what.replace(" ", " step ")
                    each.append(f"{steps} {_percent(one.share)}" + (f" ({bad[0]}/{bad[1]} fail)" if k else ""))
            yield (
                f"`{plain}` at {rate_words(rate)} costs {signed(whole.mean)} in training loss"
                + (f" ({k}/{n} fail)" if k else "")
                + f", of which is saved where bits are few only {', '.join(each)}."
            )


def _layers(evidence: Evidence, rates: Rates) -> Iterator[str]:
    for rate in rates:
        found = sorted(saved(evidence, rate, KEPT), key=lambda one: -one.share)
        for of in dict.fromkeys(one.of for one in found):
            each = ", ".join(f"{one.what} {_percent(one.share)}" for one in found if one.of == of)
            yield f"Kept precise, so much of what `masked-{of}` costs at {rate_words(rate)} is saved: {each}."


def _percent(share: float) -> str:
    return f"{round(100 * share)} %" if math.isfinite(share) else "not told"


def _boundaries(evidence: Evidence, _: Rates) -> Iterator[str]:
    """How many runs of the recipes that fail do so, by setting."""
    for recipe in failing(evidence):
        parts = [part for part in evidence.parts if recipe in part.recipes]
        alike, none = dict[tuple[str, tuple[float, ...]], list[str]](), []
        for part in parts:
            own = {rate: cell for rate in part.rates if (cell := failed(part, recipe, rate))[1]}
            words = departures(part, evidence.parts)
            if any(k for k, _ in own.values()):
                cells = ", ".join(f"{k}/{n}" for k, n in own.values())
                alike.setdefault((cells, tuple(own)), []).append(words)
            else:
                none.append(words)
        shared = max((rates for _, rates in alike), key=len, default=())
        said = [
            (f"{' / '.join(words)} " if len(parts) > 1 else "")
            + cells
            + (f" (at {_listed(rates)})" if rates != shared else "")
            for (cells, rates), words in alike.items()
        ]
        yield (
            f"Of `{recipe}` failed, at {_listed(shared)}, {'; '.join(said)}"
            + (
                f"; none: {' / '.join(none) if len(none) < len(said) + 2 else 'in all other settings'}."
                if none
                else "."
            )
        )


def _listed(rates: Rates) -> str:
    return ", ".join(map(rate_words, rates))


def _bits_by_setting(evidence: Evidence, rates: Rates) -> Iterator[str]:
    """From where to where what a recipe costs goes over settings, of recipes whose runs train, at the last rate of the claims."""
    if not rates:
        return
    rate, lost = rates[-1], failing(evidence)
    for recipe in dict.fromkeys(recipe for part in evidence.parts for recipe in part.recipes):
        costs = [
            (of.mean, departures(part, evidence.parts), of)
            for part in evidence.parts
            if recipe not in (evidence.baseline, *lost)
            and math.isfinite(
                (of := mean_of(less(by_seed(part, recipe, rate), by_seed(part, evidence.baseline, rate)))).low
            )
        ]
        if len(costs) > 1:
            least, most = min(costs, key=lambda one: one[0]), max(costs, key=lambda one: one[0])
            yield (
                f"What `{recipe}` costs in training loss at {rate_words(rate)} goes from {told(least[2])} ({least[1]}) "
                f"to {told(most[2])} "
                f"({most[1]})."
            )


def _data(evidence: Evidence, rates: Rates) -> Iterator[str]:
    return itertools.chain(_boundaries(evidence, rates), _bits_by_setting(evidence, rates))


def _optimizer(evidence: Evidence, rates: Rates) -> Iterator[str]:
    yield from _boundaries(evidence, rates)
    kept = [
        (row.recipe, row.validation.difference)
        for words, row, _ in condition_rows(evidence)
        if words.startswith("as usual") and row.recipe not in failing(evidence) and not row.recipe.startswith("masked")
        and any(math.isclose(row.learning_rate, rate) for rate in rates)
    ]  # fmt: skip
    if kept:
        yield (
            f"What else is kept in fewer bits, {', '.join(f'`{name}`' for name, _ in kept)}, ends within "
            f"[{signed(min(of.low for _, of in kept))}, {signed(max(of.high for _, of in kept))}] of "
            f"`{evidence.baseline}`'s validation "
            "loss (95 % limits)."
        )


def _alarms(of: Ranked) -> Iterator[str]:
    """Whether any alarm may be used, and how good the best is in the ranking."""
    found = most_in_time(of.table)
    if found is not None:
        name, k, n = found
        yield (
            f"At {100 * FALSE_ALARMS:g} % false alarms a run "
            + (
                f"no alarm rang in time before any of {n} runs that diverged and could be judged, 95 % interval "
                if not k
                else f"the most that one rang in time is {k}/{n} (`{name}`), 95 % interval "
            )
            + f"{share(k, n).partition('[')[2].removesuffix(']')}."
        )
    if of.best is not None:
        row = of.table.isel(signal=0)
        auroc = Number(*(float(row[f"auroc{end}"]) for end in ("", "_low", "_high")))
        yield (
            f"The best of the ranking, `{of.best.name}`{', falling' if of.best.below else ''}, has an AUROC of "
            f"{ranged(auroc, '.3f')} within recipe, rate and step."
        )


def _too_few_seeds(evidence: Evidence, rates: Rates) -> Iterator[str]:
    """What each recipe costs and how many of its runs fail, the dearest last, where no verdict may rest on it."""
    rows = [row for _, row, _ in condition_rows(evidence)]
    costs: dict[str, list[float]] = {}
    fails: dict[str, list[str]] = {}
    for rate, row in itertools.product(rates, rows):
        if math.isclose(row.learning_rate, rate):
            costs.setdefault(row.recipe, []).append(row.validation.difference.mean)
            fails.setdefault(row.recipe, []).append(f"{len(row.diverged)}/{len(row.runs)}")
    pairs = max(len(row.validation.differences) for row in rows)
    each = "; ".join(
        f"`{recipe}` {', '.join(map(signed, costs[recipe]))} ({', '.join(fails[recipe])} failed)"
        for recipe in sorted(costs, key=lambda one: max(costs[one]))
    )
    where = f"at {_listed(rates)}, means of {pairs} pairs"
    yield f"Validation losses above `{evidence.baseline}`'s {where}, described and not judged: {each}."


Says = Callable[[Evidence, Rates], Iterator[str]]
SHORT: Mapping[str, Says] = {
    "fp8": _costs, "hardware": _hardware, "switch": _switch, "layers": _layers, "data": _data,
    "schedules": _data, "optimizer": _optimizer, "llama-120m": _too_few_seeds,
}  # fmt: skip
