"""The page's answer on early warning: every alarm ranked, the best held against a text and a size that it never saw.

Numbers are `train.alarm_ranking`'s, on the digests that `exmy export --digest --alarms` made. The horizon and the rate of false
alarms were fixed before the studies ran; signals are chosen on half of the seeds and scored on the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from exmy.alarm_options import HORIZON, STUDY
from exmy.findings import warnings_beyond
from exmy.findings.beyond import TITLE
from exmy.findings.canvas import Drawing, plain, sheet
from exmy.findings.contrast import failed
from exmy.findings.sharpness_measures import agreement
from exmy.findings.studies import Available, Evidence
from exmy.findings.tables import NONE, headed, line, rate_words, share, shown
from train.alarm_ranking import FALSE_ALARMS, Alarm, Judged, best, rank_alarms, scored_again
from train.proportions import clopper_pearson_interval

CHOSEN, WHOLE = STUDY, "curvature"  # by which an alarm is chosen; and which has every measure
UNSEEN = {"warning-english": "on English", "warning-6x256": "at 6 × 256"}
LOOKS = {"warning-english": ("x", "crosses"), "warning-6x256": ("s", "open squares")}  # of what was scored again
USABLE = 0.5  # of the runs that diverged, before which an alarm that is of use rings in time
PAPERS = Alarm("logit_sharpness at epsilon 0.0005")
CONFIDENCE = 0.95
LINE, AROUND = 0.19, 0.6
ASIDE = {"x": -0.17, "s": 0.17}  # of a row: marks of what was scored again, so that neither covers the other


@dataclass(frozen=True, eq=False)
class Ranked:
    """A study's ranking, and the best of it and the paper's metric on studies that they never saw, by (study, alarm)."""

    name: str
    table: xr.Dataset
    again: Mapping[tuple[str, Alarm], Mapping[str, Any]]

    @property
    def best(self) -> Alarm | None:
        """The alarm at the top."""
        return best(self.table)


def ranked(studies: Available, name: str) -> Ranked | None:
    """A study's alarms, ranked; None where it is not there. Only what was chosen on `CHOSEN` is scored again elsewhere."""
    evidence = studies.get(name)
    if not isinstance(evidence, Evidence):
        return None
    table = rank_alarms(evidence.tree, HORIZON, FALSE_ALARMS, study=evidence.study)
    found = Ranked(name, table, {})
    if name != CHOSEN or found.best is None:
        return found
    alarms = list(dict.fromkeys([found.best, _papers(table)]))
    there = {other: of for other in UNSEEN if isinstance(of := studies.get(other), Evidence)}
    return Ranked(name, table, {
        (other, alarm): scored_again(alarm, evidence.tree, of.tree, HORIZON)
        for other, of in there.items() for alarm in alarms if alarm.name in table["signal"].values
    })  # fmt: skip


def _papers(table: xr.Dataset) -> Alarm:
    """The paper's metric, in the direction that it had where alarms were chosen."""
    if PAPERS.name not in table["signal"].values:
        return PAPERS
    return Alarm(PAPERS.name, bool(table["below"].sel(signal=PAPERS.name)))


def part(of: Ranked, studies: Available) -> Iterator[str]:
    """The ranked table, in Markdown; and of the study on which the alarm is chosen, what became of that elsewhere."""
    attrs = of.table.attrs
    yield (
        f"Ranked on {attrs['seeds_chosen_on']} seeds ({attrs['diverged_chosen_on']} of "
        f"{attrs['runs_chosen_on']} runs diverged), by "
        f"AUROC within recipe, rate and step; all other columns are of the other {attrs['seeds_scored_on']} "
        f"({attrs['diverged_scored']} of {attrs['runs_scored']} runs diverged). A warning counts within "
        f"{HORIZON:g} steps before the "
        "onset; rings are at thresholds that a run which does not diverge passes with a chance of "
        f"{100 * FALSE_ALARMS:g} % at most."
    )
    yield ""
    yield from alarm_table(of.table)
    yield ""
    yield (
        "Of a signal at several epsilons or ranks each is a row. What it adds is to learning rate, step, loss "
        "and gradient norm. Rang in "
        "time, too early: of the diverged runs that could be judged, whose first ring came within the horizon, "
        "or sooner. A probe's "
        "cost is in training steps, by operations; probes run eagerly and in FP32, where an operation takes longer."
        + told_apart(of.table)
    )
    yield ""
    tree = studies[of.name]
    if isinstance(tree, Evidence):
        yield outcomes(tree)
        yield ""
    if of.best is None:
        yield "Nothing can be told of any alarm: no two runs of a recipe and rate differ in what became of them."
        return
    top = "The best" if of.name == CHOSEN else "At the top of these runs"
    yield f"**{top}: `{of.best.name}`{', falling' if of.best.below else ''}.** {_worth(of)}{_alike(of.table)}"
    yield ""
    yield from usable(of.table)
    if of.name == CHOSEN:
        yield from _elsewhere(of, studies)
    if isinstance(tree, Evidence):
        alike = agreement(tree.tree, warmup_of(tree)) if of.name == WHOLE else ()
        more = [*alike, *warnings_beyond.beyond(tree.tree, of.table, _papers(of.table))]
        if more:
            yield from (TITLE, "", *more)


def _elsewhere(of: Ranked, studies: Available) -> Iterator[str]:
    """What became of the chosen alarm on the text and the size that it never saw."""
    absent = [f"`{other}` ({studies[other]})" for other in UNSEEN if not isinstance(studies.get(other), Evidence)]
    if of.again:
        yield from again_table(of)
        yield ""
        yield (
            "On runs that it was not chosen on, as it is, nothing fitted anew: at thresholds of their own runs "
            "that did not diverge, and at "
            f"the one threshold that such runs of `{CHOSEN}` set, which is what a sweep without runs of its own has."
        )
        yield ""
        for other, signals in at_the_first_step(of, studies).items():
            where = UNSEEN[other][0].upper() + UNSEEN[other][1:]
            yield (
                f"{where} (`{other}`), at the threshold brought along, {'; '.join(signals)}. That says of untrained "
                "weights that the "
                "text or the size is another, and warns of nothing."
            )
            yield ""
        all_lost = dict.fromkeys(
            other for (other, _), row in of.again.items() if math.isnan(row["threshold_false_alarms"])
        )
        if all_lost:
            yield (
                f"Every run of {', '.join(f'`{other}`' for other in all_lost)} diverged: there are no false alarms to "
                "be counted, and no "
                "thresholds of its own."
            )
            yield ""
    if absent:
        yield f"Not yet scored on {', '.join(absent)}."
        yield ""


def _worth(of: Ranked) -> str:
    """Whether what was chosen holds on the seeds that it was not chosen on."""
    row = of.table.isel(signal=0)
    low, gain = float(row["auroc_low"]), float(row["gain_low"])
    if not low > 0.5:
        return "On seeds that it was not chosen on its interval reaches one half: it is not shown to warn."
    if math.isnan(float(row["gain"])):
        return "It warns on seeds that it was not chosen on, and is itself among what all others are held against."
    if not gain > 0:
        return (
            "It tells runs apart on seeds that it was not chosen on; added to loss and gradient norm in one plane over "
            "all recipes "
            "and rates it is not shown to add to what they say."
        )
    return "It warns on seeds that it was not chosen on, and adds to what loss and gradient norm say."


def _alike(table: xr.Dataset) -> str:
    """How many alarms can't be told from the best: whose interval holds its score."""
    top = float(table["auroc"][0])
    others = int(((table["auroc_low"] <= top) & (top <= table["auroc_high"])).values[1:].sum())
    return (
        f" {others} more have its AUROC in their interval: which of them stands first is little but chance."
        if others
        else ""
    )


def most_in_time(table: xr.Dataset) -> tuple[str, int, int] | None:
    """(signal, runs, of how many) of the alarm that rang in time before most of the runs that diverged; None of none judged."""
    shares, judged = table["detected"].values, table["diverged_judged"].values
    if not judged.any():
        return None
    place = int(np.argmax(np.where(judged > 0, shares, -1.0)))
    return str(table["signal"].values[place]), round(float(shares[place] * judged[place])), int(judged[place])


def usable(table: xr.Dataset) -> Iterator[str]:
    """Whether anybody could act on an alarm of the table; what so many runs can show of that."""
    found = most_in_time(table)
    if found is None or found[1] >= USABLE * found[2]:
        return
    name, k, n = found
    signals = table.sizes["signal"]
    rang = (
        f"none rang in time before any of the {n} runs"
        if not k
        else f"the most that one rang in time is {k} of {n} (`{name}`)"
    )
    # Of many alarms the one that rang most often was picked: its limit is of all at once (Bonferroni).
    most = float(clopper_pearson_interval(k, n, 1 - (1 - CONFIDENCE) / signals)[1])
    excluded = most < USABLE
    head = "No alarm is usable here" if excluded else "No alarm is seen to be usable here"
    yield (
        f"**{head} at {100 * FALSE_ALARMS:g} % of false alarms a run:** of {signals}, "
        f"{rang} that diverged "
        "and could be judged. An AUROC within a step, of runs that are compared at that step, promises no alarm that "
        "rings once and "
        "at the right time."
    )
    yield ""
    shares = " and ".join(share(one, n) for one in dict.fromkeys((0, k)))
    yield (
        f"What {n} runs can show, by Clopper and Pearson's 95 % interval and as if all were of other seeds: of one alarm by "
        f"itself {shares}; of the best of {signals}, over all at once (Bonferroni), up to {100 * most:.1f} %. An alarm of "
        f"use is one that rings in time before {100 * USABLE:g} % of them: "
        + ("that is excluded." if excluded else "that is not excluded of all at once, and takes more runs that fail.")
        + _not_judged(table, n)
    )
    yield ""


def _not_judged(table: xr.Dataset, judged: int) -> str:
    diverged = int(table.attrs.get("diverged_scored", judged))
    return (
        f" The other {diverged - judged} of the {diverged} that diverged have too few runs beside them, of their recipe and rate "
        "and of other seeds, that did not, to set a threshold by."
        if diverged > judged
        else ""
    )


def told_apart(table: xr.Dataset) -> str:
    """How far from one half an AUROC has to be, by the intervals that there are; "" without any."""
    half = (table["auroc_high"].values - table["auroc_low"].values) / 2
    half = half[np.isfinite(half) & (half > 0)]
    return (
        f" The intervals of AUROC reach {half.min():.2f} to {half.max():.2f} to either side, {np.median(half):.2f} in the "
        "median: what lies nearer to one half than that is not told from it."
        if half.size
        else ""
    )


def outcomes(evidence: Evidence) -> str:
    """How many runs of each recipe and rate diverged: only where some did and some did not is there anything to tell apart."""
    cells = {
        f"`{recipe}` at {rate_words(rate)}{', ' + part.label if part.label else ''}": failed(part, recipe, rate)
        for part in evidence.parts
        for recipe in part.recipes
        for rate in part.rates
    }
    cells = {words: of for words, of in cells.items() if of[1]}
    telling = sum(0 < k < n for k, n in cells.values())
    each = ", ".join(f"{words} {k}/{n}" for words, (k, n) in cells.items())
    return (
        f"Diverged, of all seeds: {each}. Within a recipe and rate {telling} of these {len(cells)} can tell runs apart."
    )


def warmup_of(evidence: Evidence) -> float:
    """Steps of the longest warm-up."""
    return float(max(run.training.warmup for part in evidence.parts for run in part.of.values()))


def at_the_first_step(of: Ranked, studies: Available) -> dict[str, list[str]]:
    """Of studies not seen before, the alarms that ring in all runs at the first step, with the values there and where chosen."""
    here, found = studies.get(of.name), dict[str, list[str]]()
    for (other, alarm), row in of.again.items():
        there = studies[other]
        if not isinstance(here, Evidence) or not isinstance(there, Evidence):
            continue
        ends = warnings_beyond.first_values(Judged(there.tree), alarm)
        threshold = row["threshold"]
        if max(ends) < threshold if alarm.below else min(ends) > threshold:
            own = warnings_beyond.first_values(Judged(here.tree), alarm)
            low, high = (f"{end:.4f}" for end in ends)
            found.setdefault(other, []).append(
                f"`{alarm.name}` rings in every run at the first step, before training: its values there are {low} to {high}, "
                f"on the other side of the threshold {threshold:.4f}, and {own[0]:.4f} to {own[1]:.4f} where it was set"
            )
    return found


def alarm_table(table: xr.Dataset) -> Iterator[str]:
    """A row a signal, the best first."""
    yield from headed(
        ("signal", "AUROC where ranked", "AUROC [95 %]", "adds [95 %]", "rang in time", "too early", "false alarms, %",
         "median lead, steps", "cost of a probe, steps")
    )  # fmt: skip
    for i, name in enumerate(table["signal"].values.tolist()):
        row = {str(of): table[of].values[i].item() for of in table.data_vars}
        words = f"`{name}`" + (", falling" if row["below"] else "")
        yield line([words, shown(row["chosen_auroc"], ".3f"), *_scores(row), shown(row["cost"], ".3g")])


def _scores(row: Mapping[str, Any]) -> list[str]:
    judged = int(row["diverged_judged"])
    return [
        _ranged(row, "auroc", ".3f"), _ranged(row, "gain", "+.3f"),
        *(f"{round(row[of] * judged)}/{judged}" if judged else NONE for of in ("detected", "early")),
        shown(100 * row["false_alarm_rate"], ".1f"), shown(row["median_lead"], ".0f"),
    ]  # fmt: skip


def _ranged(row: Mapping[str, Any], name: str, form: str) -> str:
    if math.isnan(row[name]):
        return NONE
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return shown(row[name], form) + ("" if math.isnan(low) else f" [{shown(low, form)}, {shown(high, form)}]")


def again_table(of: Ranked) -> Iterator[str]:
    """A row a study and alarm: by thresholds of its own runs, then by the one that the alarm brings."""
    yield from headed(
        ("unseen", "signal", "AUROC [95 %]", "adds [95 %]", "rang in time", "too early", "false alarms, %", "median lead, steps",
         "at the threshold brought along: in time, %", "too early, %", "false alarms, %", "median lead, steps")
    )  # fmt: skip
    for (other, alarm), row in of.again.items():
        brought = [shown(100 * row[f"threshold_{of}"], ".1f") for of in ("detected", "early", "false_alarms")]
        words = f"`{alarm.name}`" + (", falling" if alarm.below else "")
        lead = shown(row["threshold_median_lead"], ".0f")
        yield line([f"{UNSEEN[other]} (`{other}`)", words, *_scores(row), *brought, lead])


def alarm_drawing(of: Ranked) -> Drawing:
    """AUROC and what each adds, a row a signal, the best at the top."""
    where = [f"{LOOKS[other][1]}: {UNSEEN[other]}" for other in dict.fromkeys(other for other, _ in of.again)]
    return Drawing(
        of.name, f"{of.name}-alarms",
        "AUROC of every alarm within recipe, learning rate and step, and what it adds to learning rate, step, "
        "loss and gradient norm (dots), "
        "with 95 % intervals over seeds that it was not ranked on; upright lines: a half, which is chance, and nothing added; "
        "in the order of the AUROC where it was ranked, which is of other seeds, the best at the top"
        + (f"; {', '.join(where)}, which it never saw, without intervals" if where else ""),
        lambda: alarms(of),
    )  # fmt: skip


def alarms(of: Ranked) -> Figure:
    """Two panels beside each other, AUROC and gain, with the unseen studies' marks in the row of the alarm."""
    names = of.table["signal"].values.tolist()
    below = of.table["below"].values.tolist()
    figure, axes = sheet((AROUND + LINE * max(len(names), 2),), 2, sharey=True)
    for panel, name, chance, label in zip(
        axes[0], ("auroc", "gain"), (0.5, 0.0), ("AUROC", "adds to AUROC"), strict=True
    ):
        value, low, high = (of.table[f"{name}{end}"].values for end in ("", "_low", "_high"))
        panel.axvline(chance, color="#000000", lw=0.9, zorder=1)
        for y in range(len(names)):
            if math.isfinite(value[y]):
                if math.isfinite(low[y]):
                    panel.plot([low[y], high[y]], [y, y], color="#0072B2", lw=1.3, zorder=2)
                panel.plot([value[y]], [y], ls="", marker="o", ms=3.6, color="#0072B2", zorder=3)
        for (other, alarm), row in of.again.items():
            if math.isfinite(row[name]):
                place = names.index(alarm.name) + ASIDE[LOOKS[other][0]]
                panel.plot(
                    [row[name]], [place], ls="", marker=LOOKS[other][0], ms=4, mfc="none", color="#D55E00", mew=1.3, zorder=4,
                )  # fmt: skip
        panel.set_xlabel(label)
        panel.xaxis.set_major_locator(MaxNLocator(4) if name == "auroc" else MaxNLocator(3))
        panel.grid(visible=False, axis="y")
        panel.tick_params(axis="y", length=0)
    words = [plain(_short(name)) + (", falling" if turned else "") for name, turned in zip(names, below, strict=True)]
    axes[0, 0].set_yticks(range(len(names)), words, fontsize=6.5)
    axes[0, 0].set_ylim(len(names) - 0.4, -0.6)
    return figure


def _short(name: str) -> str:
    """A signal as a figure has it."""
    return name.replace(" at epsilon ", " ε ").replace(" at rank 0", "").replace(" at rho ", " ρ ")
