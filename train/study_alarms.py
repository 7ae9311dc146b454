"""A study's signals as alarms: whatever was measured beside the loss, each along (run, steps), and when its runs diverged.

    history               train_loss, grad_norm, gnmr                              at every step
    sharpness, probes     landscape's measures, at each epsilon, radius or rank    at probe steps
    landscape             the same, measured afterwards on the weights that were kept
    signals               of a run's blocks, tensors and roles the loudest         at signal steps

A probe at step t is of the weights that step t starts from, before its loss is known; so of a run that diverges at step t it is
no warning, as nothing at that step is. Each signal is scored as `early_warning` and `lead_times` say, on its own steps; what it
adds is held against learning rate, step, loss and gradient norm at those.

The onset is `diverged_step` where the study's definition has a step, `non_finite` and `spike`; of `no_progress` and `gap`, which
are about a run's end, it is `point_of_no_return`. A digest whose histories are thinned has it from the whole ones, in /summary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import xarray as xr

from train.alarms import alarm_rows, point_of_no_return
from train.early_warning import warning_skill
from train.lead_times import incremental, lead_time
from train.measures import AFTERWARDS, LOGITS, PROBES

HISTORY = ("train_loss", "grad_norm", "gnmr")
WITH_A_STEP = ("non_finite", "spike")
LANDSCAPE = "landscape"
RINGS = ("detected", "early", "false_alarm_rate", "median_lead", "diverged_judged", "not_judged")
ONSET = "onset"  # of /summary, where it was worked out before histories were thinned


def study_onset(tree: xr.DataTree) -> xr.DataArray:
    """The step from which each run of `open_study` counts as diverged, (run); NaN of those that did not."""
    summary, history = tree["summary"].to_dataset(), tree["history"].to_dataset()
    if ONSET in summary:
        return summary[ONSET]
    if summary["diverged"].attrs.get("definition") in WITH_A_STEP:
        return summary["diverged_step"]
    return point_of_no_return(history["train_loss"], summary["diverged"], history["last_step"])


def study_signals(tree: xr.DataTree) -> Iterator[tuple[str, xr.DataArray]]:
    """Every signal of a study with its name, (run, step), (run, probe_step) or (run, signal_step)."""
    history = tree["history"].to_dataset()
    yield from ((name, history[name]) for name in HISTORY if name in history)
    if "sharpness" in tree:
        sharpness = tree["sharpness"].to_dataset()
        for name in sharpness.data_vars:
            if str(name).startswith(LOGITS):
                yield from _at_ticks(str(name), sharpness[name], "probe_step")
    for where, group in _measure_groups(tree):
        folder, _, measure = where.rpartition("/")
        if measure == LOGITS:
            for name in AFTERWARDS[LOGITS].own:
                yield from _at_ticks(f"{folder}/{name}", group[name], "probe_step")
            continue
        main = group[next(iter(AFTERWARDS[measure].variables))]
        if main.ndim <= 3:  # a spectrum is no signal
            yield from _at_ticks(where.removeprefix(f"{PROBES}/"), main, "probe_step")
    if "signals" in tree:
        yield from (
            (str(name), of) for name, of in loudest(tree["signals"].to_dataset()).data_vars.items() if of.ndim == 2
        )


def loudest(signals: xr.Dataset) -> xr.Dataset:
    """/signals with the largest of blocks, tensors and roles, (run, signal_step) each; what has no such axis is as it was."""
    further = {
        name: [dim for dim in of.dims if dim not in ("run", "signal_step")] for name, of in signals.data_vars.items()
    }
    largest = {name: signals[name].max(dims, keep_attrs=True) for name, dims in further.items() if dims}
    return signals.assign(largest).drop_dims([dim for dim in signals.dims if dim not in ("run", "signal_step")])


def _measure_groups(tree: xr.DataTree) -> Iterator[tuple[str, xr.Dataset]]:
    """/probes/<measure> and /landscape/<quantisers>/<measure>, of the runs that /history has."""
    finished = tree["history"].to_dataset()["run"].values
    for node in tree.subtree:
        where = node.path.strip("/")
        if where.split("/")[0] in (PROBES, LANDSCAPE) and where.rsplit("/", 1)[-1] in AFTERWARDS:
            yield where, node.to_dataset().sel(run=finished)


def _at_ticks(name: str, values: xr.DataArray, steps: str) -> Iterator[tuple[str, xr.DataArray]]:
    """A variable at each value of its further axis, if it has one."""
    others = [dim for dim in values.dims if dim not in ("run", steps)]
    if not others:
        yield name, values
        return
    (axis,) = others
    for i, tick in enumerate(values[axis].values.tolist()):
        yield f"{name} at {axis} {tick:g}", values.isel({axis: i}, drop=True)


def study_warnings(
    tree: xr.DataTree,
    horizon: float,
    false_alarms: float = 0.1,
    confidence: float = 0.95,
    on_progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """Each signal's worth as an alarm, over signal: see `VARIABLES`. tree: of `open_study`.

    horizon: steps within which a warning counts, fixed before looking. on_progress is told (signals done, signals in all).
    ValueError unless horizon > 0 and 0 < false_alarms < 1.
    """
    history = tree["history"].to_dataset()
    onset, last = study_onset(tree), history["last_step"]
    known = {name: history[name] for name in ("train_loss", "grad_norm")}
    signals = list(study_signals(tree))
    rows = []
    for done, (name, signal) in enumerate(signals):
        if on_progress:
            on_progress(done, len(signals))
        rows.append(signal_row(name, signal, onset, last, known, horizon, false_alarms, confidence))
    columns = {name: ("signal", [row[name] for row in rows], described) for name, described in VARIABLES.items()}
    attrs = {
        "horizon": horizon, "false_alarms": false_alarms, "confidence": confidence,
        "definition": str(tree["summary"]["diverged"].attrs.get("definition", "")),
        "runs": history.sizes["run"], "diverged": int(np.isfinite(onset.values).sum()),
    }  # fmt: skip
    return xr.Dataset(columns, {"signal": [name for name, _ in signals]}, attrs)


def signal_row(
    name: str, signal: xr.DataArray, onset: xr.DataArray, last: xr.DataArray, known: Mapping[str, xr.DataArray],
    horizon: float, false_alarms: float, confidence: float,
) -> dict[str, Any]:  # fmt: skip
    """One signal's numbers, by `VARIABLES`; known: what it is held against, by name."""
    skill = warning_skill(alarm_rows(signal, onset, horizon, last), confidence)
    row: dict[str, Any] = {str(of): skill[of].item() for of in skill.data_vars if of in VARIABLES}
    ring = lead_time(signal, onset, false_alarms, last, horizon=horizon)
    row |= {of: ring.attrs[of] for of in RINGS}
    others = {of: values for of, values in known.items() if of != name}
    gain = incremental(signal, others, onset, horizon, last, confidence) if name not in known else None
    return row | {of: math.nan if gain is None else gain[of].item() for of in ("gain", "gain_low", "gain_high")}


def _described(units: str, long_name: str) -> dict[str, str]:
    return {"units": units, "long_name": long_name}


VARIABLES = {
    "auroc": _described("1", "AUROC within recipe, learning rate and step"),
    "auroc_low": _described("1", "lower limit of the AUROC, bootstrap over seeds"),
    "auroc_high": _described("1", "upper limit of the AUROC, bootstrap over seeds"),
    "average_precision": _described("1", "average precision within recipe, learning rate and step"),
    "average_precision_low": _described("1", "its lower limit, leaving seeds out"),
    "average_precision_high": _described("1", "its upper limit, leaving seeds out"),
    "average_precision_chance": _described("1", "average precision of a signal that says nothing"),
    "gain": _described("1", "AUROC added to learning rate, step, loss and gradient norm"),
    "gain_low": _described("1", "its lower limit, bootstrap over seeds"),
    "gain_high": _described("1", "its upper limit, bootstrap over seeds"),
    "detected": _described(
        "1", "share of judged diverged runs whose alarm first rang within the horizon before the onset"
    ),
    "early": _described("1", "share of judged diverged runs whose alarm first rang before that"),
    "false_alarm_rate": _described("1", "share of judged runs that did not diverge in which it rang"),
    "median_lead": _described("steps", "median lead of those detected"),
    "diverged_judged": _described("1", "diverged runs for which there was a threshold"),
    "not_judged": _described("1", "runs without healthy runs enough of their kind for a threshold"),
    "positives": _described("1", "rows from which the run diverged within the horizon"),
    "negatives": _described("1", "rows from which the run is known not to have"),
    "informative_strata": _described("1", "strata with positive and negative rows"),
}
