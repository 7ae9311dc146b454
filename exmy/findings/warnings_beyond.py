"""Why no alarm of the ranking rings in time, looked for after it: where a constant threshold comes from, which way the paper's
metric moves before an onset, and what thresholds that move with the step would have done.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xarray as xr
from scipy import stats

from exmy.alarm_options import HORIZON
from exmy.findings.beyond import LEVEL
from exmy.findings.numbers import Number
from exmy.findings.tables import NONE, headed, line, ranged, shown
from train.alarm_ranking import FALSE_ALARMS, Alarm, Judged, seeds_of_choice
from train.alarms import kinds, numbered, steps_of
from train.lead_times import incremental, lead_time
from train.proportions import clopper_pearson_interval

Floats = npt.NDArray[np.float64]
FEWEST = 5  # runs of a kind that did not diverge, for a mean and a spread at a step
LAGS = (200, 150, 100, 50, 20, 0)  # steps before the onset
MOST = 9  # signals, of the top of the ranking


def first_values(whole: Judged, alarm: Alarm) -> tuple[float, float]:
    """The least and the largest value of all runs at the first step."""
    signal = whole.signals[alarm.name]
    first = signal.transpose("run", steps_of(signal)).values[:, 0].astype(np.float64)
    return float(np.nanmin(first)), float(np.nanmax(first))


class Before(NamedTuple):
    """A value by that of its kind's runs that did not diverge, so many steps before the onset: median, and runs by side of 1."""

    lag: int
    ratio: float
    below: int
    above: int

    @property
    def runs(self) -> int:
        """Told from the others' median at all."""
        return self.below + self.above

    @property
    def p(self) -> float:
        """Of a sign test: whether more runs lie on one side than by chance."""
        return float(stats.binomtest(self.below, self.runs).pvalue) if self.runs else 1.0


def before_the_onset(whole: Judged, name: str) -> list[Before]:
    """Of each of `LAGS`.

    A run's value is that of the last step measured by then, and is held against the median, at that step, of the runs of its kind
    that did not diverge; runs of kinds with fewer than `FEWEST` such others are left out.
    """
    signal = whole.signals[name]
    values = signal.transpose("run", steps_of(signal)).values.astype(np.float64)
    steps, onset = signal[steps_of(signal)].values, whole.onset.values
    kind, healthy = _kind(signal), ~np.isfinite(onset)
    found = []
    for lag in LAGS:
        ratios = []
        for run in np.flatnonzero(~healthy):
            others = healthy & (kind == kind[run])
            place = int(np.searchsorted(steps, onset[run] - lag, side="right")) - 1
            if others.sum() >= FEWEST and place >= 0 and onset[run] - lag >= 0:
                ratios.append(values[run, place] / np.median(values[others, place]))
        of = np.array(ratios, np.float64)
        middle = float(np.median(of)) if of.size else math.nan
        found.append(Before(lag, middle, int((of < 1).sum()), int((of > 1).sum())))
    return found


def which_way(lags: Sequence[Before]) -> str:
    """What is told of the steps before the onset, by a sign test at 5 % over all (Bonferroni); the onset is none of them."""
    early = [of for of in lags if of.lag > 0 and of.runs]
    if not early:
        return ""
    told = [of for of in early if of.p <= LEVEL / len(early)]
    below, above = ([str(of.lag) for of in told if (of.below > of.above) == lower] for lower in (True, False))
    by = f"sign test over runs, {100 * LEVEL:g} % over all {len(early)} of these, Bonferroni"
    if below and above:
        return f"It lies below theirs {_listed(below)} steps before, and above {_listed(above)} steps before ({by})."
    if below:
        return f"So it falls behind theirs, told {_listed(below)} steps before ({by}), and is nowhere told to rise above them."
    if above:
        return f"So it rises above theirs, told {_listed(above)} steps before ({by})."
    return f"At no step before the onset is it told from theirs ({by})."


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _kind(signal: xr.DataArray) -> npt.NDArray[np.int64]:
    return np.asarray(numbered([signal[name].values.tolist() for name in kinds(signal)]))


class Moving(NamedTuple):
    """At thresholds that move: runs that rang in time and too early, of how many; false alarms; and what it adds, centred."""

    in_time: int
    early: int
    judged: int
    false_alarms: float
    adds: Number


def moving(chosen: Judged, scored: Judged, alarm: Alarm) -> Moving:
    """Mean and spread at each step from runs of the kind that did not diverge, of the seeds of choice; all else of the others."""
    own, other = (alarm.louder(of.signals[alarm.name]) for of in (chosen, scored))
    axis = steps_of(other)
    ours, theirs = (of.transpose("run", axis).values.astype(np.float64) for of in (own, other))
    keys = [list(zip(*(of[name].values.tolist() for name in kinds(of)), strict=True)) for of in (own, other)]
    healthy, moved = ~np.isfinite(chosen.onset.values), np.full(theirs.shape, np.nan)
    for key in dict.fromkeys(keys[1]):
        alike = healthy & np.array([of == key for of in keys[0]])
        if alike.sum() >= FEWEST:
            spread = ours[alike].std(axis=0)
            here = np.array([of == key for of in keys[1]])
            moved[here] = (theirs[here] - ours[alike].mean(axis=0)) / np.where(spread > 0, spread, np.inf)
    sheet = other.transpose("run", axis).copy(data=moved)
    rings = lead_time(sheet, scored.onset, FALSE_ALARMS, scored.last, horizon=HORIZON).attrs
    judged = int(rings["diverged_judged"])
    known = {name: of for name, of in scored.known.items() if name != alarm.name}
    adds = incremental(other, known, scored.onset, HORIZON, scored.last, centred=True)
    in_time, early = (round(rings[name] * judged) if judged else 0 for name in ("detected", "early"))
    gain = Number(*(float(adds[f"gain{end}"]) for end in ("", "_low", "_high")))
    return Moving(in_time, early, judged, float(rings["false_alarm_rate"]), gain)


def beyond(tree: xr.DataTree, table: xr.Dataset, papers: Alarm) -> Iterator[str]:
    """What was looked for after the ranking; table: the ranking, papers: the paper's metric in the direction it has there."""
    even = seeds_of_choice(tree)
    whole, chosen, scored = Judged(tree), Judged(tree, even), Judged(tree, ~even)
    each = [
        Alarm(str(name), bool(below))
        for name, below, auroc in zip(
            *(table[of].values.tolist() for of in ("signal", "below", "chosen_auroc")), strict=True
        )
        if math.isfinite(auroc)
    ][:MOST]
    flat = [(alarm, whole.first_the_loudest(alarm)) for alarm in each]
    stuck = [f"`{alarm.name}`" for alarm, (k, n) in flat if n and k == n]
    if stuck:
        yield (
            f"- Of {', '.join(stuck)}, falling as they warn, every one of the {flat[0][1][1]} runs that did not "
            "diverge has its loudest "
            "value at the first step, before anything is learnt. A constant threshold is that of the first step, then, and no "
            "later value ever passes it: the AUROC within a step does not see that, who listens to a sweep does."
        )
    if papers.name in whole.signals:
        lags = before_the_onset(whole, papers.name)
        if any(of.runs for of in lags):
            words = ", ".join(
                f"{of.lag} steps before {of.ratio:.2f}" if of.lag else f"at it {of.ratio:.2f}" for of in lags if of.runs
            )
            yield (
                f"- The paper's metric, `{papers.name}`, by that of the runs of the same recipe and rate that did not "
                "diverge, at the "
                f"same step, median of {max(of.runs for of in lags)} runs: {words} times. {which_way(lags)}".rstrip()
            )
    rows = [(alarm, moving(chosen, scored, alarm)) for alarm in each]
    if not any(of.judged for _, of in rows):
        return
    yield ""
    yield (
        "Thresholds that move: each signal less the mean, by the standard deviation, of the runs of its recipe and rate that "
        "did not diverge, at the same step, of the seeds that it was ranked on; then, of the other seeds' runs of a recipe and "
        f"rate, one threshold at all steps, which a run that does not diverge passes with a chance of {100 * FALSE_ALARMS:g} % "
        "at most. And what a signal adds where all is taken less its mean over the runs of the same recipe, rate and step: the "
        "ranking's *adds* is of one plane over all recipes and rates, which turns a signal round that is higher in recipes that "
        "fail and lower in the runs that do."
    )
    yield ""
    yield from headed(("signal", "rang in time", "too early", "false alarms, %", "adds within [95 %]"))
    for alarm, of in rows:
        counts = [f"{k}/{of.judged}" if of.judged else NONE for k in (of.in_time, of.early)]
        yield line([f"`{alarm.name}`" + (", falling" if alarm.below else ""), *counts, shown(100 * of.false_alarms, ".1f"),
                    ranged(of.adds, "+.3f")])  # fmt: skip
    yield ""
    yield best_moving(rows)


def best_moving(rows: Sequence[tuple[Alarm, Moving]]) -> str:
    """Which rang in time before most runs, with the interval of its share; all of those that did so as often."""
    most = max(of.in_time for _, of in rows)
    tops = [(alarm, of) for alarm, of in rows if of.in_time == most]
    judged = max(of.judged for _, of in tops)
    if not most:
        return f"None of these {len(rows)} rings in time before any of {judged}."
    low, high = clopper_pearson_interval(most, judged, 1 - LEVEL / len(rows))
    names = ", ".join(f"`{alarm.name}`" for alarm, _ in tops)
    return (
        f"The most of these {len(rows)}, {names}, {'ring' if len(tops) > 1 else 'rings'} in time before {most} of {judged}, "
        f"{100 * float(low):.1f} to {100 * float(high):.1f} % (Clopper and Pearson's, over all {len(rows)} at once): such a "
        "threshold takes runs of the same recipe and rate that did not diverge, and these were looked at after the ranking."
    )
