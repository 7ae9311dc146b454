"""Alarms that a sweep listens to, as people write them: a signal and a threshold, "kurtosis=12" or "update_rms<0.2".

    NAME=VALUE, NAME>VALUE      rings at the first step at which the signal is above
    NAME<VALUE                  rings at the first step at which it is below

Names are those that `exmy alarms` prints: losses and gradient norms of every step, `SIGNALS`, measures at an epsilon, a radius or
a rank. NaN is "not measured", and rings never; infinity is the loudest alarm, in either direction.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

if TYPE_CHECKING:
    from train.program import Probe
    from train.settings import ProbeSettings, SignalsTable

HISTORY = ("train_loss", "grad_norm", "gnmr")
WRITTEN = re.compile(r"\s*(?P<name>[^=<>]*[^=<>\s])\s*(?P<sign>[=<>])\s*(?P<value>\S+)\s*")
EXAMPLE = "write NAME=VALUE, which rings above, or NAME<VALUE, which rings below, as in kurtosis=12"


class Rule(NamedTuple):
    """An alarm: it rings where the signal is above the threshold, or below it."""

    name: str
    threshold: float
    below: bool = False

    @property
    def label(self) -> str:
        """As it is written, such as "kurtosis>12", every digit of its threshold told."""
        short = f"{self.threshold:g}"
        return f"{self.name}{'<' if self.below else '>'}{short if float(short) == self.threshold else repr(self.threshold)}"


def rule_of(text: str) -> Rule:
    """A rule as it is written; ValueError, in a line, where it is none."""
    found = WRITTEN.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is no alarm: {EXAMPLE}")
    try:
        threshold = float(found["value"])
    except ValueError:
        threshold = math.nan
    if not math.isfinite(threshold):
        raise ValueError(f"{text!r}: a threshold is a finite number, got {found['value']!r}")
    return Rule(found["name"], threshold, found["sign"] == "<")


def check_alarm(text: str) -> str:
    """The text as `Rule.label` has it, if it is a rule's."""
    return rule_of(text).label


def rules_of(texts: Sequence[str]) -> list[Rule]:
    """The rules of a study; ValueError for one that is written twice."""
    rules = list(map(rule_of, texts))
    labels = [rule.label for rule in rules]
    if len(set(labels)) < len(labels):
        raise ValueError(f"an alarm is named twice: {', '.join(labels)}")
    return rules


def check_recorded(rules: Sequence[Rule], probe: ProbeSettings, signals: SignalsTable) -> None:
    """ValueError for an alarm on a signal that the study does not record, with what it does."""
    known = recorded(probe, signals) if rules else []  # which waits for torch
    for rule in rules:
        if rule.name not in known:
            near = difflib.get_close_matches(rule.name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it records {', '.join(known)}"
            raise ValueError(f"the study records no signal {rule.name!r}: {hint}")


def recorded(probe: ProbeSettings, signals: SignalsTable) -> list[str]:
    """The names of the signals that a study records, as `exmy alarms` prints them."""
    from train.signals import SIGNALS

    named = [*HISTORY, *(SIGNALS if signals.every else ())]
    for measure in probe.measures:
        if probe.intervals.get(measure, probe.every):
            named += of_measure(measure, probe)
    return named


def of_measure(measure: str, probe: ProbeSettings) -> list[str]:
    """A measure's signals: at each tick of its further axis, if it has one."""
    from train.measures import LOGITS, MEASURES
    from train.taking import ticks

    if measure == LOGITS:
        return [f"{name} at epsilon {tick:g}" for name in (LOGITS, f"{LOGITS}_centred") for tick in probe.epsilons]
    axes = next(iter(MEASURES[measure].variables.values()))
    if len(axes) > 1:  # a spectrum is no signal
        return []
    return (
        [f"{measure} at {axes[0]} {tick:g}" for tick in ticks(cast("Probe", probe), measure, axes[0])]
        if axes
        else [measure]
    )
