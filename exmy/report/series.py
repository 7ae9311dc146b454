"""What runs did step by step, as the page holds it: bucketed so that it stays small, every extreme kept.

Curves and signals are held run by run, since the page's filters choose runs; how many buckets a study gets follows from how many
runs it has. What was measured in every layer is held run by run where that fits, and as the mean over seeds where it does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from exmy.groups import groups
from exmy.report.packing import Floats, bucketed, packed, packed_steps
from train import lead_time
from train.study_alarms import study_onset, study_signals

FEWEST, MOST = 24, 120  # buckets of a curve
FALSE_ALARMS = 0.1
BY_LAYER = ("quantization_error", "clipped", "flushed", "at_maximum")
OF_THE_LOSS = ("train_loss", "grad_norm")


@dataclass(frozen=True)
class Room:
    """How many numbers a page may hold of a study: of curves, of signals, of layers. All of it is some 4 MB deflated."""

    curves: int = 1_000_000
    signals: int = 400_000
    layers: int = 500_000

    def shared(self, studies: int) -> Room:
        """A study's part where a page has several."""
        return Room(self.curves // studies, self.signals // studies, self.layers // studies)


def curves(history: xr.Dataset, runs: xr.Dataset, room: int) -> dict[str, Any]:
    """Loss and gradient norm of every run in buckets, and the loss at the step where a run counts as diverged."""
    steps = history["step"].values.astype(np.float64)
    recorded = steps <= history["last_step"].values.astype(np.float64)[:, None]
    buckets = int(np.clip(room // (6 * max(1, runs.sizes["run"])), FEWEST, MOST))
    width = -(-steps.size // buckets)
    content: dict[str, Any] = {
        "over": _over(steps, width),
        "starts": steps[::width].tolist(),
        "last": history["last_step"].values.tolist(),
        "lost": packed_steps(lost_from(steps, history["train_loss"].transpose("run", "step").values, recorded)),
    }
    for name in OF_THE_LOSS:
        values = np.where(recorded, history[name].transpose("run", "step").values.astype(np.float64), np.nan)
        middles, found = bucketed(steps, values, buckets, recorded)
        content[name] = {part: packed(of) for part, of in found.items()}
        if name == "train_loss":
            column = np.clip(np.searchsorted(steps, np.nan_to_num(runs["diverged_step"].values)), 0, steps.size - 1)
            content["loss_at"] = packed(values[np.arange(column.size), column])
    return content | {"steps": middles.tolist(), "span": [float(steps[0]), float(steps[-1])]}


def lost_from(steps: Floats, loss: npt.ArrayLike, recorded: npt.NDArray[np.bool_]) -> Floats:
    """The step from which on no recorded loss of a run is finite; NaN where its last one is. [run, step] -> [run]."""
    places = np.arange(steps.size)
    first = 1 + np.where(np.isfinite(loss) & recorded, places, -1).max(axis=1)
    lost = first <= np.where(recorded, places, -1).max(axis=1)
    return np.where(lost, steps[np.minimum(first, steps.size - 1)], np.nan)


def _over(steps: Floats, width: int) -> str:
    """What a bucket of so many recorded steps is the mean over, in words; a digest has not every step."""
    apart = int(steps[1] - steps[0]) if steps.size > 1 else 1
    counted = f"{width} step{'s' if width > 1 else ''}"
    return counted if apart == 1 else f"{counted} of {width * apart}"


def signals(tree: xr.DataTree, room: int) -> list[dict[str, Any]]:
    """Every signal of the study, [run, step], and what it is worth as an alarm.

    Signals are `study_signals`'s, the largest value of a bucket where there are many steps. The alarm is `lead_time`'s, at a
    false-alarm rate of `FALSE_ALARMS` a run: the step at which it rang in each run, and how long before the onset that was. What
    no run has a value of is left out.
    """
    found = [(name, of) for name, of in study_signals(tree) if np.isfinite(of.values).any()]
    onset, last = study_onset(tree), tree["history"].to_dataset()["last_step"]
    each = room // max(1, sum(name not in OF_THE_LOSS for name, _ in found) * last.size)
    return [_signal(name, of, onset, last, max(6, each)) for name, of in found]


def _signal(name: str, of: xr.DataArray, onset: xr.DataArray, last: xr.DataArray, most: int) -> dict[str, Any]:
    (axis,) = [str(dim) for dim in of.dims if dim != "run"]
    values = of.transpose("run", axis).values.astype(np.float64)
    steps = of[axis].values.astype(np.float64)
    ring = lead_time(of, onset, FALSE_ALARMS, last)
    content: dict[str, Any] = {
        "name": name, "label": str(of.attrs.get("long_name", name)), "units": str(of.attrs.get("units", "1")),
        "kind": "sharpness" if axis == "probe_step" else "signal",
        "rang": packed_steps(ring["alarm_step"].values), "lead": packed_steps(ring["lead"].values),
        "judged": ring["judged"].values.astype(int).tolist(), "failed": ring["diverged"].values.astype(int).tolist(),
        "worth": {key: ring.attrs[key] for key in ("detected", "false_alarm_rate", "median_lead", "diverged_judged")},
    }  # fmt: skip
    if name not in OF_THE_LOSS:  # whose curves are there
        middles, parts = bucketed(steps, values, most) if steps.size > most else (steps, {"high": values})
        content |= {"steps": middles.tolist(), "values": packed(parts["high"])}
    return content


def layers(tree: xr.DataTree, room: int) -> dict[str, Any] | None:
    """What rounding did to each layer's operands over time: shares and errors, [unit, step, tensor, role].

    None if it was not recorded, and of a digest that has kept of all layers only the loudest.

    A unit is a run, or, where those are too many, the runs of a recipe and learning rate in a group, of which the mean is held;
    steps are bucketed, by their largest value.
    """
    if "signals" not in tree.children:
        return None
    signals = tree["signals"].to_dataset()
    apart = [name for name in BY_LAYER if name in signals and {"tensor", "role"} <= set(signals[name].dims)]
    names = [name for name in apart if np.isfinite(signals[name].values).any()]
    if not names:
        return None
    shape = signals[names[0]].transpose("run", "signal_step", "tensor", "role").shape
    each = len(names) * shape[2] * shape[3]
    units = _units(tree["summary"].to_dataset(), pooled=shape[0] * each * 8 > room)
    most = max(2, room // (each * len(units)))
    steps = signals["signal_step"].values.astype(np.float64)
    content: dict[str, Any] = {"units": units, "tensors": signals["tensor"].values.astype(str).tolist(), "measures": []}
    content["roles"] = signals["role"].values.astype(str).tolist()
    for name in names:
        values = signals[name].transpose("run", "tensor", "role", "signal_step").values.astype(np.float64)
        held = np.stack([_mean(values[unit]) for unit in units])
        middles, parts = bucketed(steps, held.reshape(-1, steps.size), most)
        largest = parts["high"].reshape(*held.shape[:-1], -1).transpose(0, 3, 1, 2)
        label = str(signals[name].attrs.get("long_name", name))
        content["measures"].append({"name": name, "label": label, "values": packed(largest)})
    return content | {"steps": middles.tolist()}


def _units(summary: xr.Dataset, *, pooled: bool) -> list[list[int]]:
    if not pooled:
        return [[run] for run in range(summary.sizes["run"])]
    units: dict[tuple[int, str, float], list[int]] = {}
    for number, group in enumerate(groups(summary)):
        for run in np.flatnonzero(group.runs).tolist():
            key = number, str(summary["recipe"].values[run]), float(summary["learning_rate"].values[run])
            units.setdefault(key, []).append(run)
    return list(units.values())


def _mean(values: Floats) -> Floats:
    """The mean over the first axis of what is there; NaN where nothing is."""
    there = ~np.isnan(values)
    count: npt.NDArray[np.int64] = there.sum(axis=0)
    total = np.where(there, values, 0.0).sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), math.nan)
