"""What the second half's studies show beyond its claims: looked for after the runs, so that it is for a next study to decide.

Each function says nothing where its study has nothing to say it of. What warned and what did not is `warnings_beyond`'s.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from exmy.findings.beyond import LEVEL
from exmy.findings.contrast import (
    TRAINING,
    VALIDATION,
    Losses,
    by_seed,
    failed,
    failures_table,
    less,
    mean_of,
    neighbours,
    past_its_best,
    told,
)
from exmy.findings.numbers import Number
from exmy.findings.studies import Evidence, Part, departures
from exmy.findings.tables import NONE, headed, line, ranged, rate_words
from train.optimum import optimum
from train.paired import Difference
from train.proportions import mcnemar, pairs_of

LIMITS = 0.95  # of a correlation's interval
CHOSEN_BADLY = 0.1  # nats/token above its own best, from which a baseline is said to be past it
SPLIT = re.compile(r"(?P<of>\w+)-(?P<which>after|until)-(?P<step>\d+)")
KEPT = re.compile(r"(?P<of>\w+)-(?P<what>\w+)-kept")

Rates = Sequence[float]


def of_fp8(evidence: Evidence, rates: Rates) -> Iterator[str]:
    """What the LM head's format does by itself; baselines past their best."""
    apart, alike = [], []
    for kept, own in _heads(evidence):
        for rate, recipe in itertools.product(rates, own.recipes):
            training, validation = (
                less(by_seed(own, recipe, rate, of), by_seed(kept, recipe, rate, of)) for of in (TRAINING, VALIDATION)
            )
            if any(training.values()):
                apart.append(
                    f"`{recipe}` at {rate_words(rate)} {told(mean_of(training))} training, {told(mean_of(validation))} validation"
                )
            elif training:
                alike.append(f"`{recipe}` at {rate_words(rate)} ({len(training)} of {len(training)} pairs)")
    if apart:
        yield (
            "- With the LM head in the recipe's formats less with it in BF16, the same recipe and seeds, so that no "
            "baseline has a "
            f"part in it: {'; '.join(apart)}."
        )
    if alike:
        yield f"- The same to the last bit under both settings of the LM head, as it should be: {'; '.join(alike)}."
    yield from _past_best(evidence, rates)


def _heads(evidence: Evidence) -> Iterator[tuple[Part, Part]]:
    """Pairs of parts: the head in BF16, and in the recipe's own formats."""
    for pair in neighbours(evidence.parts, "lm_head"):
        kept, own = sorted(pair, key=lambda part: part.where["lm_head"] == "body")
        if own.where["lm_head"] == "body":
            yield kept, own


def _past_best(evidence: Evidence, rates: Rates) -> Iterator[str]:
    found = list(past_its_best(evidence, rates, CHOSEN_BADLY))
    if found:
        yield (
            f"- The baseline itself ends more than {CHOSEN_BADLY:g} nats/token above its own best rate at: "
            f"{'; '.join(found)}. What "
            "a format costs there is not what it costs where anybody would train."
        )


def of_hardware(evidence: Evidence, rates: Rates) -> Iterator[str]:
    """Which card; whether single runs are foretold, and not only their means."""
    yield f"- Claims name the H100; the runs were on one {evidence.tree.attrs.get('device', 'other card')}."
    rows = [
        line([
            f"`{recipe}`", f"{departures(part, evidence.parts)}, rate {rate_words(rate)}",
            f"{sum(ours[seed] == theirs[seed] for seed in ours)} of {len(ours)}", ranged(correlation(ours, theirs), ".2f"),
            f"{float(np.std(list(less(ours, theirs).values()), ddof=1)):.3f}",
        ])
        for part, rate, recipe, ours, theirs in hardware_pairs(evidence, rates)
    ]  # fmt: skip
    if rows:
        yield ""
        yield "Whether the simulation foretells a single run, and not only the mean: final training losses, seed by seed."
        yield ""
        yield from headed(
            (
                "simulated",
                "setting",
                "pairs with the same bits",
                "correlation over seeds [95 %]",
                "SD of the difference, nats/token",
            )
        )
        yield from rows


class Paired(NamedTuple):
    """Training losses of a simulation and of the hardware's products, of the seeds that both have."""

    part: Part
    rate: float
    recipe: str
    ours: Losses
    theirs: Losses


def hardware_pairs(evidence: Evidence, rates: Rates) -> Iterator[Paired]:
    """Each simulation at each rate, where there are more than two pairs."""
    base = evidence.baseline
    for part, rate in itertools.product(evidence.parts, rates):
        whole = by_seed(part, base, rate)
        for recipe in part.recipes:
            own = by_seed(part, recipe, rate)
            shared = sorted(own.keys() & whole.keys())
            if recipe != base and len(shared) > 2:
                yield Paired(part, rate, recipe, {s: own[s] for s in shared}, {s: whole[s] for s in shared})


def correlation(ours: Losses, theirs: Losses) -> Number:
    """Pearson's, over shared seeds, with Fisher's interval; NaN of fewer than four, or where all of one are alike."""
    one, other = list(ours.values()), [theirs[seed] for seed in ours]
    if len(one) < 4 or min(np.ptp(one), np.ptp(other)) == 0:
        return Number(math.nan, math.nan, math.nan)
    found = stats.pearsonr(one, other)
    return Number(float(found.statistic), *map(float, found.confidence_interval(LIMITS)))


def of_natives(hardware: Evidence, seeds: Evidence) -> Iterator[str]:
    """How far native formats foretell each other's single runs, at the model, training, text and rate of the hardware's study."""
    for ours, theirs in itertools.product(hardware.parts, seeds.parts):
        if _setting(ours) != _setting(theirs):
            continue
        for rate in ours.rates:
            natives = {name: by_seed(theirs, name, rate) for name in theirs.recipes if name.startswith("native-")}
            found = {}
            for one, other in itertools.combinations(natives, 2):
                shared = sorted(natives[one].keys() & natives[other].keys())
                of = correlation(*({seed: natives[name][seed] for seed in shared} for name in (one, other)))
                if math.isfinite(of.value):
                    found[f"`{one}` and `{other}` {ranged(of, '.2f')}, {len(shared)} pairs"] = of
            simulated = [
                correlation(pair.ours, pair.theirs)
                for pair in hardware_pairs(hardware, [rate])
                if pair.part is ours
            ]  # fmt: skip
            if found and simulated:
                apart = all(of.high < min(native.low for native in found.values()) for of in simulated)
                yield ""
                yield (
                    f"- To hold that against: at {rate_words(rate)}, of the same model, text and schedule in `{seeds.name}`, the "
                    f"card's own formats foretell each other's runs no better than this: {'; '.join(found)}. "
                    + (
                        "That is more than the simulation does."
                        if apart
                        else "So single runs part at this rate whatever the products are: that they do here is not shown to be "
                        "the simulation's."
                    )
                )


def _setting(part: Part) -> tuple[object, ...]:
    """What runs of one seed share but for their recipe and rate; not how often they are evaluated."""
    run = part.sample
    return run.dataset, run.model, run.training.model_copy(update={"evaluate_every": 1})


class Saved(NamedTuple):
    """A remedy: the recipe that it is for, what is kept, and which share of the cost it saves; NaN where that is not told."""

    recipe: str
    of: str
    what: str
    share: float
    difference: Difference


def saved(evidence: Evidence, rate: float, written: re.Pattern[str]) -> list[Saved]:
    """Remedies by their names, at one rate: training losses against the recipe's without, as a share of what that costs."""
    found = []
    for part in evidence.parts:
        base = by_seed(part, evidence.baseline, rate)
        for recipe in part.recipes:
            name = written.fullmatch(recipe)
            plain = f"masked-{name['of']}" if name else ""
            if name and plain in part.recipes and by_seed(part, recipe, rate) and base:
                without = by_seed(part, plain, rate)
                cost = mean_of(less(without, base)).mean
                gain = mean_of(less(by_seed(part, recipe, rate), without))
                what = f"{name['which']} {name['step']}" if "which" in name.groupdict() else name["what"]
                found.append(Saved(recipe, name["of"], what, -gain.mean / cost if cost > 0 else math.nan, gain))
    return found


def of_switch(evidence: Evidence, rates: Rates) -> Iterator[str]:
    """Whether it is how many steps are precise that counts, or which."""
    part = evidence.parts[0]
    rows, alike, apart = [], [], []
    for rate in rates:
        found = {one.recipe: one for one in saved(evidence, rate, SPLIT)}
        for early, late in _mirrored(found, part.sample.training.steps):
            between = mean_of(less(by_seed(part, late, rate), by_seed(part, early, rate)))
            fails = [failed(part, recipe, rate) for recipe in (early, late)]
            rows.append(
                line([rate_words(rate), *(cell for name, (k, n) in zip((early, late), fails, strict=True)
                      for cell in (f"`{name}`", _percent(found[name].share), f"{k}/{n}")), told(between)])
            )  # fmt: skip
            which = "first" if between.mean > 0 else "last"
            words = f"`{early}` and `{late}` at {rate_words(rate)}"
            (alike.append(words) if between.low <= 0 <= between.high else apart.append(f"{words} (the {which} ones)"))
    if rows:
        yield "Precise in the first steps, or in as many of the last: which share of the recipe's cost in training loss it saves."
        yield ""
        yield from headed(
            ("at rate", "precise first", "saves", "diverged", "precise last", "saves", "diverged",
             "last above first, nats/token [95 %]")
        )  # fmt: skip
        yield from rows
        yield ""
    if alike:
        yield f"- How many steps are precise is all that is seen to count, and not which, of {'; '.join(alike)}."
    if apart:
        yield f"- It counts which steps are precise of {'; '.join(apart)}."
    yield ""
    yield from failures_table(evidence)


def _mirrored(found: Mapping[str, Saved], steps: int) -> Iterator[tuple[str, str]]:
    """Of each recipe the one that is precise in its first steps and the one in as many of its last."""
    for name, one in found.items():
        kind = SPLIT.fullmatch(name)
        if kind and kind["which"] == "after":
            other = f"{one.of}-until-{steps - int(kind['step'])}"
            if other in found:
                yield name, other


def _percent(share: float) -> str:
    return f"{round(100 * share)} %" if math.isfinite(share) else NONE


def of_layers(evidence: Evidence, rates: Rates) -> Iterator[str]:
    """What each kept part saves, and what the second of two adds to the first."""
    for rate in rates:
        rows = sorted(saved(evidence, rate, KEPT), key=lambda one: (one.of, -one.share))
        if rows:
            yield f"What is kept precise, at {rate_words(rate)}, and which share of the recipe's cost in training loss it saves:"
            yield ""
            yield from headed(("recipe", "kept", "against it throughout, nats/token [95 %]", "saves"))
            for one in rows:
                yield line([f"`masked-{one.of}`", one.what, told(one.difference), _percent(one.share)])
            yield ""
        for part, of in itertools.product(evidence.parts, dict.fromkeys(one.of for one in rows)):
            both, first = (by_seed(part, f"{of}-{what}-kept", rate) for what in ("ends", "first"))
            if both and first:
                more = mean_of(less(both, first))
                yield (
                    f"- The last block kept as well as the first: `{of}-ends-kept` ends {told(more)} nats/token from "
                    f"`{of}-first-kept`"
                    + (", so that the last is not seen to add to what the first saves." if more.high > 0 else ".")
                )
    yield ""
    yield from failures_table(evidence)


def of_data(evidence: Evidence, rates: Rates) -> Iterator[str]:
    """Where the boundary lies on each text; how much of a training loss could be lost at all."""
    yield from failures_table(evidence)
    yield from _moved(evidence)
    rooms = {
        departures(part, evidence.parts): float(part.runs["unigram_entropy"].values[0])
        - float(np.mean(list(base.values())))
        for part in evidence.parts
        for rate in rates[-1:]
        if (base := by_seed(part, evidence.baseline, rate))
    }
    if "as usual" in rooms and len(rooms) > 1:
        usual_room = rooms.pop("as usual")
        each = ", ".join(f"{words} {room - usual_room:+.2f}" for words, room in rooms.items())
        yield (
            f"- A run that collapses to its text's unigram entropy ends as usual {usual_room:.2f} nats/token above the "
            "baseline, in "
            f"training; and otherwise so many more or fewer: {each}. By as much the difference of two such costs is of "
            "the texts, and "
            "not of the format; what it has beyond that is of runs that collapse under the one and not under the "
            "other. Documents are "
            "corrupted for training alone: validation losses are on the same clean text, and can be compared."
        )


def _moved(evidence: Evidence) -> Iterator[str]:
    """Settings under which a recipe fails in other seeds than as usual, told apart by McNemar's test over all of them."""
    parts = evidence.parts
    usual_part = next((part for part in parts if departures(part, parts) == "as usual"), None)
    if usual_part is None:
        return
    rows = []
    for part, recipe in itertools.product(parts, evidence.parts[0].recipes):
        for rate in part.rates:
            if part is usual_part or recipe not in part.recipes or rate not in usual_part.rates:
                continue
            ours, theirs = (
                of.grid["diverged"].sel(recipe=recipe, learning_rate=rate, drop=True) for of in (part, usual_part)
            )
            if failed(part, recipe, rate)[1] and failed(usual_part, recipe, rate)[1]:
                rows.append((mcnemar(pairs_of(ours, theirs)), part, recipe, rate))
    level = LEVEL / max(len(rows), 1)  # Bonferroni's, over all settings, recipes and rates
    apart = []
    for p, part, recipe, rate in rows:
        (k, n), (j, m) = failed(part, recipe, rate), failed(usual_part, recipe, rate)
        if p <= level:
            apart.append(
                (k / n > j / m, f"{departures(part, parts)}, `{recipe}` at {rate_words(rate)} {k}/{n} against {j}/{m}")
            )
    for more, words in ((True, "More"), (False, "Fewer")):
        those = [of for up, of in apart if up == more]
        if those:
            yield (
                f"- {words} runs diverge than as usual, told apart by McNemar's test at {100 * LEVEL:g} % over all {len(rows)} "
                f"comparisons (Bonferroni): {'; '.join(those)}."
            )


def of_schedules(evidence: Evidence, rates: Rates) -> Iterator[str]:
    """The boundary by schedule; baselines past their best; what a larger batch changes besides."""
    yield from failures_table(evidence)
    yield from _moved(evidence)
    yield from _past_best(evidence, rates)
    for small, large in neighbours(evidence.parts, "sequences"):
        small, large = sorted((small, large), key=lambda part: int(part.where["sequences"]))
        ends = []
        for part in (small, large):
            epochs = float(part.runs["epochs"].values.mean()) if "epochs" in part.runs else math.nan
            each = [
                f"{np.mean(list(base.values())):.2f} at {rate_words(rate)}"
                for rate in rates
                if (base := by_seed(part, evidence.baseline, rate))
            ]
            ends.append(f"{epochs:.2f} epochs, `{evidence.baseline}` ends at {' and '.join(each)}")
        yield (
            f"- {large.where['sequences']} sequences for as many steps are "
            f"{int(large.where['sequences']) / int(small.where['sequences']):g} times "
            f"the tokens: {ends[1]}; with {small.where['sequences']}, {ends[0]}. Whether it is the batch, the tokens "
            "or the lower loss "
            "that makes bits dearer, these runs can't tell."
        )


def of_optimizer(evidence: Evidence, rates: Rates) -> Iterator[str]:
    """The boundary by optimiser; whose best rate lies at the grid's end; recipes of which no run trains."""
    yield from failures_table(evidence)
    yield from _moved(evidence)
    for part in evidence.parts:
        ends = [
            f"`{recipe}` {rate_words(best)}"
            for recipe in part.recipes
            if len(part.rates) > 1 and (best := optimum(part.grid, recipe)) in (part.rates[0], part.rates[-1])
        ]
        if ends and part.where.get("optimizer", "") != "adamw":
            yield (
                f"- {departures(part, evidence.parts)}: the best rate lies at the grid's end, and a better one may lie beyond: "
                f"{', '.join(ends)}."
            )
    for usual_part, other in neighbours(evidence.parts, "optimizer"):
        for recipe, rate in itertools.product(other.recipes, rates):
            if recipe == evidence.baseline:
                continue
            costs = [
                mean_of(
                    less(by_seed(part, recipe, rate, VALIDATION), by_seed(part, evidence.baseline, rate, VALIDATION))
                )
                for part in (usual_part, other)
            ]
            if all(math.isfinite(of.low) for of in costs):
                yield (
                    f"- `{recipe}` costs {told(costs[1])} in validation loss with {other.where['optimizer']} at "
                    f"{rate_words(rate)}, "
                    f"{told(costs[0])} with {usual_part.where['optimizer']}."
                )


Says = Callable[[Evidence, Rates], Iterator[str]]
BEYOND: Mapping[str, Says] = {
    "fp8": of_fp8, "hardware": of_hardware, "switch": of_switch, "layers": of_layers, "data": of_data,
    "schedules": of_schedules, "optimizer": of_optimizer,
}  # fmt: skip
