"""Which alarm is the best, asked so that the answer is no luck: chosen on some seeds, scored on others, then elsewhere.

Of two dozen signals one looks good by chance. So a study's seeds are dealt in two: on those of even places, in their order,
signals are ranked by AUROC within recipe, rate and step, and each is given its direction, since some warn by falling. All that
is reported besides (AUROC with its interval, lead time, false alarms, what a signal adds) is of the other seeds, which took no
part in that. `scored_again` holds the one at the top against a study of other runs, such as another text or size, and once more
at the threshold that it had where it was chosen: what somebody can do who has no runs of his own to set one by.

A signal that warns by falling is turned round (-x), but for values that are not finite: those are the loudest alarm either way.
What a probe costs is counted in training steps, by operations: nothing for what training computes anyway.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from train.alarms import Bools, alarm_rows, of_its_runs, steps_of
from train.early_warning import concordance, informative
from train.lead_times import conformal_threshold
from train.measures import LOGITS, MEASURES
from train.probe_costs import FORWARD, gradients_of
from train.resample import LEAST_SEEDS
from train.seed_cube import in_order, seed_labels
from train.signals import SIGNALS
from train.study import Study
from train.study_alarms import HISTORY, VARIABLES, signal_row, study_onset, study_signals

FALSE_ALARMS = 0.05  # of a run
KNOWN = ("train_loss", "grad_norm")


@dataclass(frozen=True)
class Alarm:
    """A signal and its direction: it rings above a threshold, or below one."""

    name: str
    below: bool = False

    @property
    def words(self) -> str:
        """Such as "kurtosis" or "scale, falling"."""
        return f"{self.name}, falling" if self.below else self.name

    def louder(self, signal: xr.DataArray) -> xr.DataArray:
        """The signal so that louder is larger; what is not finite is infinite, NaN stays "not measured"."""
        if not self.below:
            return signal
        turned = -signal.astype(np.float64)
        return turned.where(~np.isinf(turned), np.inf)


class Judged:
    """A study's signals, and what its runs came to; kept: of which runs, [runs]."""

    def __init__(self, tree: xr.DataTree, kept: Bools | None = None) -> None:
        history = tree["history"].to_dataset()
        self.kept = np.ones(history.sizes["run"], np.bool_) if kept is None else kept
        self.onset, self.last = study_onset(tree)[self.kept], history["last_step"][self.kept]
        self.known = {name: history[name][self.kept] for name in KNOWN}
        self.signals = {name: signal.isel(run=self.kept) for name, signal in study_signals(tree)}

    def row(self, alarm: Alarm, horizon: float, false_alarms: float, confidence: float) -> dict[str, Any]:
        """Its numbers, by `study_alarms.VARIABLES`; ValueError where the study has no such signal."""
        if alarm.name not in self.signals:
            raise ValueError(f"the study has no signal {alarm.name!r}; it has {', '.join(self.signals)}")
        signal = alarm.louder(self.signals[alarm.name])
        return signal_row(alarm.name, signal, self.onset, self.last, self.known, horizon, false_alarms, confidence)

    def auroc(self, alarm: Alarm, horizon: float) -> float:
        """Within recipe, rate and step; NaN where diverged runs of fewer than `LEAST_SEEDS` seeds tell."""
        rows = alarm_rows(alarm.louder(self.signals[alarm.name]), self.onset, horizon, self.last)
        telling = [rows.seed[of][rows.positive[of]] for of in informative(rows)]
        if not telling or np.unique(np.concatenate(telling)).size < LEAST_SEEDS:
            return math.nan
        return float(concordance(rows).auroc())

    def better(self, name: str, horizon: float) -> tuple[Alarm, float]:
        """The signal in the direction in which it warns better, rising where neither is, with its AUROC."""
        rising, falling = Alarm(name), Alarm(name, below=True)
        up, down = self.auroc(rising, horizon), self.auroc(falling, horizon)
        return (falling, down) if down > up else (rising, up)

    def threshold(self, alarm: Alarm, false_alarms: float) -> float:
        """Of all runs that did not diverge, whatever their recipe and rate, in the alarm's own direction; inf of too few."""
        loudest = _loudest(alarm.louder(self.signals[alarm.name]), self.last)
        healthy = ~np.isfinite(self.onset.values) & (loudest > -np.inf)
        return conformal_threshold(loudest[healthy], false_alarms)

    def first_the_loudest(self, alarm: Alarm) -> tuple[int, int]:
        """Of runs that did not diverge, how many have their loudest value at the first step, and how many there are."""
        signal = alarm.louder(self.signals[alarm.name])
        values = signal.transpose("run", steps_of(signal)).values.astype(np.float64)[~np.isfinite(self.onset.values)]
        heard = np.where(np.isnan(values), -np.inf, values)
        first = heard[:, 0] if heard.shape[1] else np.zeros(0)
        alone = (first[:, None] > heard[:, 1:]).all(axis=1)  # of a signal that never moves nothing is said
        return int(alone.sum()), heard.shape[0]


def seeds_of_choice(tree: xr.DataTree) -> Bools:
    """Whether each run's seed is one on which the alarm is chosen, [runs]: those of even places in their order."""
    labels = seed_labels(tree["history"].to_dataset())
    even = set(in_order(labels)[::2])
    return np.array([label in even for label in labels], np.bool_)


def rank_alarms(
    tree: xr.DataTree,
    horizon: float,
    false_alarms: float = FALSE_ALARMS,
    confidence: float = 0.95,
    study: Study | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """Every signal of a study, the best first, over signal: `RANKED` and `study_alarms.VARIABLES`.

    tree: of `open_study`. horizon: steps within which a warning counts, fixed before looking. study: by which probes' costs are
    told. on_progress is told (signals done, signals in all). Equally good signals stand in order of their cost, then of their
    place in the study; those of which nothing can be told come last. attrs: seeds chosen and scored on, and how many runs
    diverged. ValueError unless horizon > 0 and 0 < false_alarms < 1.
    """
    chosen_on = seeds_of_choice(tree)
    choosing, scoring = Judged(tree, chosen_on), Judged(tree, ~chosen_on)
    found = []
    for done, name in enumerate(choosing.signals):
        if on_progress:
            on_progress(done, len(choosing.signals))
        alarm, auroc = choosing.better(name, horizon)
        row = scoring.row(alarm, horizon, false_alarms, confidence) | {"chosen_auroc": auroc, "below": alarm.below}
        row |= {"cost": math.nan if study is None else cost_of(name, study), "signal": name}
        found.append(row)
    found.sort(
        key=lambda row: (math.isnan(row["chosen_auroc"]), _nan_last(-row["chosen_auroc"]), _nan_last(row["cost"]))
    )
    columns = {
        name: ("signal", [row[name] for row in found], described) for name, described in (RANKED | VARIABLES).items()
    }
    labels = np.array(list(map(str, seed_labels(tree["history"].to_dataset()))))
    attrs = {
        "horizon": horizon, "false_alarms": false_alarms, "confidence": confidence,
        "seeds_chosen_on": len(set(labels[chosen_on])), "seeds_scored_on": len(set(labels[~chosen_on])),
        "runs_scored": int((~chosen_on).sum()), "diverged_scored": int(np.isfinite(scoring.onset.values).sum()),
        "runs_chosen_on": int(chosen_on.sum()), "diverged_chosen_on": int(np.isfinite(choosing.onset.values).sum()),
    }  # fmt: skip
    return xr.Dataset(columns, {"signal": ("signal", [row["signal"] for row in found])}, attrs)


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def best(ranked: xr.Dataset) -> Alarm | None:
    """The alarm at the top; None where nothing could be told of any."""
    if not ranked.sizes["signal"] or math.isnan(float(ranked["chosen_auroc"][0])):
        return None
    return Alarm(str(ranked["signal"].values[0]), bool(ranked["below"].values[0]))


def scored_again(
    alarm: Alarm, chosen: xr.DataTree, other: xr.DataTree, horizon: float, false_alarms: float = FALSE_ALARMS,
    confidence: float = 0.95,
) -> dict[str, Any]:  # fmt: skip
    """An alarm on a study that it was not chosen on: `study_alarms.VARIABLES`, and the same rings at the threshold of `chosen`.

    `threshold` is that of all runs of the seeds of choice that did not diverge; `threshold_detected`, `threshold_early`,
    `threshold_false_alarms` and `threshold_median_lead` are of all runs of the other. ValueError where it lacks the signal.
    """
    there = Judged(other)
    row = there.row(alarm, horizon, false_alarms, confidence)
    threshold = Judged(chosen, seeds_of_choice(chosen)).threshold(alarm, false_alarms)
    rings = first_rings(alarm.louder(there.signals[alarm.name]), threshold, there.last, there.onset)
    return (
        row
        | {"threshold": -threshold if alarm.below else threshold}
        | _at_threshold(rings, there.onset.values, horizon)
    )


def _at_threshold(step: npt.NDArray[np.float64], onset: npt.NDArray[np.float64], horizon: float) -> dict[str, Any]:
    fails, lead = np.isfinite(onset), onset - step
    in_time, rang = lead <= horizon, np.isfinite(step)
    return {
        "threshold_detected": float(in_time[fails].mean()) if fails.any() else math.nan,
        "threshold_early": float((rang & ~in_time)[fails].mean()) if fails.any() else math.nan,
        "threshold_false_alarms": float(rang[~fails].mean()) if (~fails).any() else math.nan,
        "threshold_median_lead": float(np.median(lead[in_time])) if in_time.any() else math.nan,
    }


def first_rings(
    signal: xr.DataArray, threshold: float, last_step: xr.DataArray | None = None, onset: xr.DataArray | None = None
) -> npt.NDArray[np.float64]:
    """The step of each run's first value above the threshold, [runs]; NaN where there is none.

    signal (run, steps). Steps after last_step, and from the onset on, are not looked at.
    """
    axis = steps_of(signal)
    values = signal.transpose("run", axis).values.astype(np.float64)
    steps = signal[axis].values.astype(np.float64)
    heard = values > threshold  # of NaN never
    for bound, before in ((last_step, False), (onset, True)):
        if bound is not None:
            end = of_its_runs(bound, signal, "a bound").values.astype(np.float64)[:, None]
            end = np.where(np.isnan(end), np.inf, end)
            heard &= (steps < end) if before else (steps <= end)
    return np.where(heard.any(axis=1), steps[heard.argmax(axis=1)] if steps.size else np.nan, np.nan)


def _loudest(signal: xr.DataArray, last_step: xr.DataArray) -> npt.NDArray[np.float64]:
    """Each run's largest value up to its last step, [runs]; -inf without one."""
    axis = steps_of(signal)
    values = signal.transpose("run", axis).values.astype(np.float64)
    there = (signal[axis].values[None] <= of_its_runs(last_step, signal, "last_step").values[:, None]) & ~np.isnan(
        values
    )
    return np.asarray(np.where(there, values, -np.inf).max(axis=1, initial=-np.inf), np.float64)


def cost_of(name: str, study: Study) -> float:
    """What a probe of a signal costs, in training steps, by operations; NaN of a name that is none of a study's.

    A training step is a forward and a backward pass of its batch. Signals look at one of the batch's sequences, forwards and
    back. Probes are of a batch as large as training's; see `probe_costs`.
    """
    signal = name.split(" at ")[0].rsplit("/", 1)[-1]
    if signal in HISTORY:
        return 0.0
    if signal in SIGNALS:
        return 1 / study.training.sequences
    if signal in (LOGITS, f"{LOGITS}_centred"):
        return FORWARD
    return gradients_of(signal, study.probe) if signal in MEASURES else math.nan  # type: ignore[arg-type]


def _described(units: str, long_name: str) -> Mapping[str, str]:
    return {"units": units, "long_name": long_name}


RANKED = {
    "chosen_auroc": _described(
        "1", "AUROC on the seeds of choice, in the signal's own direction, by which signals are ranked"
    ),
    "below": _described("1", "whether the signal warns by falling, as on the seeds of choice"),
    "cost": _described("1", "training steps that a probe costs, by operations"),
}
