"""What an alarm is judged on: a row for each run and step at which it could have warned, and whether the run then diverged.

The onset is the first step at which a run has diverged. With a horizon of H steps, fixed before anything is looked at, a row at
step t is positive if the onset comes within it, t < onset <= t + H, and negative if the run is known to live through it. Steps
at and after the onset are no rows: nobody needs a warning then. Nor are steps whose horizon reaches beyond the end of a run
that did not diverge: what would have come is not known.

A row's stratum is its recipe, learning rate and step, and its text, model and whatever else varies: only rows of one stratum
are ever held against each other.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import xarray as xr

from train.seed_cube import seed_labels

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

NO_STRATA = frozenset({"run", "init_seed", "data_seed", "seed", "format", "pack_size"})  # coordinates that part no runs


@dataclass(frozen=True)
class Rows:
    """Rows [n]: the signal, whether the run diverged within the horizon, the stratum, seed and run, all by number; and the step.

    seeds: how many there are; unmeasured: rows without a signal, left out.
    """

    signal: Floats
    positive: Bools
    stratum: Ints
    seed: Ints
    run: Ints
    step: Floats
    seeds: int
    unmeasured: int

    def with_signal(self, signal: Floats) -> Rows:
        """The same rows with another signal."""
        return replace(self, signal=signal)

    def where(self, kept: Bools) -> Rows:
        """Some of the rows, [n]; seeds and unmeasured as they are."""
        names = ("signal", "positive", "stratum", "seed", "run", "step")
        return replace(self, **{name: getattr(self, name)[kept] for name in names})


def point_of_no_return(
    train_loss: xr.DataArray, diverged: xr.DataArray, last_step: xr.DataArray, margin: float = 0.1
) -> xr.DataArray:
    """The onset of each run that diverged, (run), as a label of step; NaN for the others.

    The step after the last one whose loss was within `margin` nats of the lowest so far: from there on the run never came back. A
    loss that is not finite never is. A run that stays within it to its end, as one that learns nothing, has its last step.
    """
    loss = train_loss.transpose("run", "step").values.astype(np.float64)
    steps, last = train_loss["step"].values.astype(np.float64), last_step.values.astype(np.float64)
    recorded = steps[None] <= last[:, None]
    finite = np.isfinite(loss) & recorded
    lowest = np.minimum.accumulate(np.where(finite, loss, np.inf), axis=1)
    with np.errstate(invalid="ignore"):
        good = finite & (loss <= lowest + margin)
    after = np.where(good.any(axis=1), good.shape[1] - good[:, ::-1].argmax(axis=1), 0)
    end = np.searchsorted(steps, last, side="right") - 1
    onset = np.where(diverged.values.astype(bool), steps[np.minimum(after, end)], np.nan)
    return xr.DataArray(onset, dims=("run",), coords={"run": train_loss["run"]} if "run" in train_loss.coords else None)


def of_its_runs(values: xr.DataArray, signal: xr.DataArray, what: str) -> xr.DataArray:
    """What is known of runs, in the order of the signal's: by their labels where both have them, else as they stand.

    ValueError for a run of the signal's that is not there, and for another number of runs without labels.
    """
    if "run" in values.indexes and "run" in signal.indexes:
        absent = signal.get_index("run").difference(values.get_index("run"))
        if absent.size:
            raise ValueError(f"{what} says nothing of run {absent[0]!r}, which the signal has")
        same = values.get_index("run").equals(signal.get_index("run"))
        return values if same else values.sel(run=signal["run"].values)
    if values.sizes["run"] != signal.sizes["run"]:
        raise ValueError(
            f"{what} is of {values.sizes['run']} runs, the signal of {signal.sizes['run']}: label both with a coordinate run"
        )
    return values


def steps_of(signal: xr.DataArray) -> Hashable:
    """The signal's other dimension, whose labels are steps; ValueError where it has not two, of which one is run."""
    if signal.ndim != 2 or "run" not in signal.dims:
        raise ValueError(
            f"a signal lies over run and steps, got dimensions {signal.dims}: select one of, or take the largest over, the others"
        )
    return next(dim for dim in signal.dims if dim != "run")


def kinds(signal: xr.DataArray) -> list[str]:
    """The coordinates on run by which runs are of different kinds: recipe, learning rate, and all others but seeds."""
    return [str(name) for name, of in signal.coords.items() if of.dims == ("run",) and name not in NO_STRATA]


def alarm_rows(
    signal: xr.DataArray,
    onset: xr.DataArray,
    horizon: float,
    last_step: xr.DataArray | None = None,
    measured: Bools | None = None,
) -> Rows:
    """The rows of a signal (run, step) whose runs have coordinates recipe, learning_rate and seed (or init_seed and data_seed).

    signal's second dimension may have any name, its labels are steps. onset (run): the label of the first diverged step, NaN
    where the run did not diverge. last_step (run): the label of the run's last step; its last measured one where None. NaN in
    the signal is "not measured" and no row; infinite is the loudest alarm. ValueError unless horizon > 0, and for a signal of
    other dimensions.
    """
    if not horizon > 0:
        raise ValueError(f"the horizon must be above 0 steps, got {horizon}")
    axis = steps_of(signal)
    values = signal.transpose("run", axis).values.astype(np.float64)
    steps = signal[axis].values.astype(np.float64)
    known = ~np.isnan(values) if measured is None else measured
    start = of_its_runs(onset, signal, "onset").values.astype(np.float64)[:, None]
    if last_step is None:
        last = np.where(known.any(axis=1), steps[steps.size - 1 - known[:, ::-1].argmax(axis=1)], -np.inf)[:, None]
    else:
        last = of_its_runs(last_step, signal, "last_step").values.astype(np.float64)[:, None]
    fails = np.isfinite(start)
    positive = fails & (steps < start) & (start <= steps + horizon)
    negative = np.where(fails, steps + horizon < start, steps + horizon <= last) & (steps <= last)
    row = positive | negative
    strata = numbered([signal[name].values.tolist() for name in kinds(signal)] or [[0] * values.shape[0]])
    seeds = numbered([list(map(str, seed_labels(signal.to_dataset(name="signal"))))])
    at = row & known
    run, step = np.nonzero(at)
    return Rows(
        values[at], positive[at], strata[run] * steps.size + step, seeds[run], run.astype(np.int64), steps[step],
        int(seeds.max(initial=-1)) + 1, int((row & ~known).sum()),
    )  # fmt: skip


def numbered(columns: list[list[object]]) -> Ints:
    """A number for each row, the same where all columns agree, by first appearance."""
    keys = list(zip(*columns, strict=True))
    order = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    return np.array([order[key] for key in keys], np.int64)
