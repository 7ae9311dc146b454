"""`exmy sweep --alarm`: an alarm with a threshold of one's own, or with that of the runs of the study `warning` that lived.

"best" is the signal that is at the top of that study's ranking (see `train.alarm_ranking`).

The default is conformal: of the runs of the committed `warning` that did not diverge, all rates together, it is passed by a
further such run with a chance of at most 5 %. It is about runs like those; of another size or text it is a guess, and said to be.
So is, before anything is trained, how often the alarm rang in time there: to ring rarely for nothing is all that the threshold
promises, and not that it rings.
"""

from __future__ import annotations

import importlib.resources
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from exmy.busy import busy
from train import StudyError
from train.alarm_rules import rule_of

if TYPE_CHECKING:
    from train.alarm_ranking import Alarm, Judged

STUDY = "warning"
BEST = "best"
HORIZON = 100.0  # steps, as that study's file says

log = logging.getLogger(__name__)


def thresholds(alarms: Sequence[str], results: Path | None = None) -> list[str]:
    """The alarms, each with its threshold; results: the folder of studies that a default comes from, exmy's own if None.

    StudyError, in a line, where one is no alarm, or has no threshold and there is none for it.
    """
    try:
        return [
            alarm if set(alarm) & set("=<>") else default(alarm.strip(), results) for alarm in map(_checked, alarms)
        ]
    except ValueError as error:
        raise StudyError(f"--alarm: {error}") from None


def _checked(alarm: str) -> str:
    if set(alarm) & set("=<>") or not alarm.strip():
        rule_of(alarm)
    return alarm


def default(name: str, results: Path | None = None) -> str:
    """A signal with the threshold of the study `warning`, in the direction in which it warned there; ValueError without one.

    name: "best" for the one that is at the top of that study's ranking.
    """
    from train.alarm_ranking import FALSE_ALARMS, Judged, best, rank_alarms, seeds_of_choice
    from train.digest import has_digest
    from train.directory import pack_names, study_of
    from train.store import open_study

    folder = (results or Path(str(importlib.resources.files("studies") / "results"))) / STUDY
    which = "NAME" if name == BEST else name
    give = f"give one, as in --alarm '{which}=VALUE', which rings above it, or '{which}<VALUE', which rings below"
    if not has_digest(folder) and not pack_names(folder):
        lacks = "which alarm is the best is not known" if name == BEST else f"{name} has no threshold"
        raise ValueError(f"{lacks}: {folder}, by whose runs it would be, is not there; {give}")
    tree, top = open_study(folder), ""
    if name == BEST:
        with busy(f"ranking the alarms of {STUDY}"):
            ranked = rank_alarms(tree, HORIZON, study=study_of(folder))
        found = best(ranked)
        if found is None:
            raise ValueError(f"{STUDY} tells nothing of any alarm: name one, and {give}")
        name = found.name
        top = f", the best of the ranking with an AUROC of {float(ranked['auroc'][0]):.3f} within recipe, rate and step"
    chosen = Judged(tree, seeds_of_choice(tree))
    if name not in chosen.signals:
        raise ValueError(
            f"{name} is no signal of {STUDY}, of whose runs its threshold would be ({', '.join(chosen.signals)}): {give}"
        )
    alarm, auroc = chosen.better(name, HORIZON)
    whole = Judged(tree)
    threshold = whole.threshold(alarm, FALSE_ALARMS)
    if math.isnan(auroc) or not math.isfinite(threshold):
        raise ValueError(f"{name} has no threshold: too few runs of {STUDY} tell one: {give}")
    written = f"{name}{'<' if alarm.below else '>'}{-threshold if alarm.below else threshold!r}"
    log.info("alarm %s%s: %s", written, top, worth(whole, alarm, threshold))
    return written


def worth(of: Judged, alarm: Alarm, threshold: float) -> str:
    """What became of an alarm on the runs that its threshold was made of, in a sentence; threshold: of the louder signal."""
    from train.alarm_ranking import FALSE_ALARMS, first_rings

    ring = first_rings(alarm.louder(of.signals[alarm.name]), threshold, of.last, of.onset)
    onset = of.onset.values
    fails, rang = np.isfinite(onset), np.isfinite(ring)
    in_time = rang & (onset - ring <= HORIZON)  # no comparison with NaN, a run that lived, is true
    told, n = int(in_time.sum()), int(fails.sum())
    first, lived = of.first_the_loudest(alarm)
    start = (
        "; its loudest value is the first step's in every run that lived, so that it rings there or never"
        if first == lived
        else ""
    )
    return (
        f"set so that at most {100 * FALSE_ALARMS:g} % of the runs of {STUDY} that lived pass it, as "
        f"{int((rang & ~fails).sum())} of "
        f"{int((~fails).sum())} do; within {HORIZON:g} steps before they diverged it rang for {told} of {n} runs, and sooner for "
        f"{int((rang & fails & ~in_time).sum())}{start}. "
        + ("So it is no alarm to rely on, even there; of" if 2 * told < n else "Of")
        + " another size or text its threshold is a guess"
    )
