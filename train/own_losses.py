"""Anyone's runs: losses in a table, or in a DataTree, judged by the same named definitions as a study's.

A table has a row for each run and logged step. Runs may have other steps than each other, log at other intervals and end at other
places: each is taken by its own order of logged steps, so that what one run did not log is no hole in it. A window of 20 is 20
logged steps then. NaN and infinities are losses that are not finite; a loss that was not logged is no row.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import xarray as xr
from scipy import stats

from train.paired import CONFIDENCE, Difference, holm, paired
from train.proportions import (
    clopper_pearson_interval,
    mcnemar,
    paired_interval,
    pairs_of,
    unpaired_interval,
    unpaired_test,
    wilson_interval,
)
from train.stability import DivergenceSettings, judged, outcomes

if TYPE_CHECKING:
    import pandas as pd

ALL = "all"  # the group of runs without one
NO_RATE = 0.0  # stands for a learning rate where none is given


def history_of_frame(
    frame: pd.DataFrame,
    run: str = "run",
    step: str = "step",
    loss: str = "loss",
    *,
    group: str | None = None,
    learning_rate: str | None = None,
    seed: str | None = None,
    grad_norm: str | None = None,
) -> xr.Dataset:
    """train_loss and grad_norm (run, step), last_step (run) of a table; step is the place among the run's own logged steps.

    The other arguments name columns. `logged_step` (run, step) has the table's own steps. Coordinates on run: recipe (the group),
    learning_rate and seed where there are columns for them. ValueError, in a line, for a column that is not there, a step that a
    run has twice, a run with two groups, rates or seeds, steps or losses that are no numbers, and a table without rows.
    """
    columns = {
        "run": run,
        "step": step,
        "loss": loss,
        "group": group,
        "learning rate": learning_rate,
        "seed": seed,
        "grad norm": grad_norm,
    }
    for what, name in columns.items():
        if name is not None and name not in frame.columns:
            raise ValueError(f"no column {name!r} for the {what}; the columns are {', '.join(map(str, frame.columns))}")
    if not len(frame):
        raise ValueError("the table has no rows")
    steps, losses = _numbers(frame, step), _numbers(frame, loss)
    if not np.isfinite(steps).all():
        raise ValueError(f"column {step!r}: every row needs a step, and {int((~np.isfinite(steps)).sum())} have none")
    nameless = _empty(frame, run)
    if nameless.any():
        raise ValueError(f"column {run!r}: every row needs a run, and {int(nameless.sum())} have none")
    names = frame[run].to_numpy()
    runs = list(dict.fromkeys(names.tolist()))
    number = {name: i for i, name in enumerate(runs)}
    row = np.array([number[name] for name in names.tolist()])
    order = np.lexsort((steps, row))
    row, steps, losses = row[order], steps[order], losses[order]
    twice = np.flatnonzero((np.diff(row) == 0) & (np.diff(steps) == 0))
    if twice.size:
        raise ValueError(
            f"run {runs[row[twice[0]]]} has step {steps[twice[0]]:g} twice: is --run the column that tells runs apart?"
        )
    length = np.bincount(row, minlength=len(runs))
    place = np.arange(row.size) - np.repeat(np.cumsum(length) - length, length)

    def table(values: npt.NDArray[Any], absent: float) -> npt.NDArray[np.float64]:
        cells = np.full((len(runs), int(length.max())), absent)
        cells[row, place] = values
        return cells

    norms = np.ones(row.size) if grad_norm is None else _numbers(frame, grad_norm)[order]
    coords: dict[str, Any] = {"run": np.array(list(map(str, runs))), "step": np.arange(int(length.max()))}
    coords["recipe"] = (
        "run",
        np.array([ALL] * len(runs)) if group is None else _of_runs(frame, group, runs, row, order).astype(str),
    )
    for word, name in (("learning_rate", learning_rate), ("seed", seed)):
        if name is not None:
            values = _of_runs(frame, name, runs, row, order)
            if word == "learning_rate":
                _check_rates(values, name, runs)
            coords[word] = ("run", values.astype(np.float64) if word == "learning_rate" else values)
    return xr.Dataset(
        {
            "train_loss": (("run", "step"), table(losses, np.nan)),
            "grad_norm": (("run", "step"), table(norms, 1.0)),
            "logged_step": (("run", "step"), table(steps, np.nan)),
            "last_step": ("run", length - 1),
        },
        coords,
    )


def _numbers(frame: pd.DataFrame, name: str) -> npt.NDArray[np.float64]:
    try:
        return np.asarray(frame[name].to_numpy(), np.float64)
    except (TypeError, ValueError):
        of = next(of for of in frame[name].tolist() if not _is_number(of))
        raise ValueError(f"column {name!r} must be numbers, got {of!r}") from None


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _of_runs(
    frame: pd.DataFrame, name: str, runs: list[Any], row: npt.NDArray[np.int64], order: npt.NDArray[np.int64]
) -> npt.NDArray[Any]:
    """A column's one value for each run."""
    values = frame[name].to_numpy()[order]
    empty = np.flatnonzero(_empty(frame, name)[order])
    if empty.size:
        raise ValueError(f"run {runs[row[empty[0]]]} has no {name}: fill column {name!r}, or leave the option away")
    first = np.concatenate([[0], np.flatnonzero(np.diff(row)) + 1])
    own = values[first]
    differs = np.flatnonzero(values != own[row])
    if differs.size:
        at = differs[0]
        one, other = own.tolist()[row[at]], values.tolist()[at]
        raise ValueError(f"run {runs[row[at]]} has {name} {one!r} and {other!r}: a run has one")
    return np.asarray(own)


def _empty(frame: pd.DataFrame, name: str) -> npt.NDArray[np.bool_]:
    """Rows of the table without anything in a column."""
    blank = [isinstance(of, str) and not of.strip() for of in frame[name].tolist()]
    return np.asarray(np.array(blank, np.bool_) | frame[name].isna().to_numpy(np.bool_), np.bool_)


def _check_rates(values: npt.NDArray[Any], name: str, runs: list[Any]) -> None:
    for run, of in zip(runs, values.tolist(), strict=True):
        if isinstance(of, str) or not 0 < of < math.inf:
            raise ValueError(f"run {run} has {name} {of}: a learning rate is a number above 0")


def own_stability(
    data: xr.Dataset | xr.DataTree,
    settings: DivergenceSettings | None = None,
    unigram_entropy: float | None = None,
    baseline: str | None = None,
) -> xr.Dataset:
    """`stability.divergence` of anyone's runs, (run): of `history_of_frame`, or a DataTree that has /history with the same names.

    Without unigram_entropy there is no `no_progress`. settings None: `no_progress` with the entropy, else `spike`. baseline:
    the group that `gap` is held against, the first one if None. `diverged_step` is in the table's own steps, where it has
    `logged_step`. ValueError for a definition that what is there can't tell.
    """
    history = data["history"].to_dataset() if isinstance(data, xr.DataTree) else data
    if settings is None:
        settings = DivergenceSettings(definition="spike" if unigram_entropy is None else "no_progress")
    if settings.definition == "no_progress" and unigram_entropy is None:
        raise ValueError(
            "no_progress is held against the unigram entropy of the training tokens: give it, in nats/token (--entropy)"
        )
    if "grad_norm" not in history:
        history = history.assign(grad_norm=xr.ones_like(history["train_loss"]))
    given = set(history.coords)
    absent = {"recipe": ALL, "learning_rate": NO_RATE}
    history = history.assign_coords(
        {name: ("run", [of] * history.sizes["run"]) for name, of in absent.items() if name not in given}
    )
    first = str(history["recipe"].values[0])
    entropy = math.nan if unigram_entropy is None else unigram_entropy
    rows = outcomes(history, settings)
    found = judged(rows, history["last_step"], entropy, baseline or first, settings)
    if "logged_step" in history:
        found["diverged_step"] = _as_logged(found["diverged_step"], history["logged_step"])
    found = found.drop_vars([name for name in absent if name not in given])
    return found.drop_vars("no_progress") if unigram_entropy is None else found


def _as_logged(place: xr.DataArray, logged: xr.DataArray) -> xr.DataArray:
    at = place.values
    there = np.isfinite(at)
    steps = logged.transpose("run", "step").values
    own = np.where(there, steps[np.arange(at.size), np.where(there, at, 0).astype(np.int64)], np.nan)
    return place.copy(data=own)


def by_group(summary: xr.Dataset, baseline: str | None = None) -> xr.Dataset:
    """Each group against the baseline, the first if None, at each learning rate: over row, with `group` and `learning_rate`.

    summary: of `own_stability`. runs, diverged, rate with both intervals; final loss: mean, sd and count of the finite ones.
    Against the baseline: `rate_difference` and `loss_difference` with 95 % limits, p (Holm adjusts over all rows), and how:
    "paired" with a coordinate seed (Tango's interval, McNemar's test, Student's t), "unpaired" without (Newcombe's, Boschloo's,
    Welch's t). ValueError for a baseline that is no group, and two runs of one group, rate and seed.
    """
    group = summary["recipe"].values.astype(str) if "recipe" in summary.coords else np.full(summary.sizes["run"], ALL)
    rate = summary["learning_rate"].values if "learning_rate" in summary.coords else np.full(group.size, NO_RATE)
    groups = list(dict.fromkeys(group.tolist()))
    baseline = groups[0] if baseline is None else baseline
    if baseline not in groups:
        raise ValueError(f"baseline {baseline!r} is none of the groups {', '.join(groups)}")
    places = [
        (name, of) for of in np.unique(rate).tolist() for name in groups if ((group == name) & (rate == of)).any()
    ]
    rows = []
    for name, of in places:
        ours, theirs = (summary.isel(run=(group == g) & (rate == of)) for g in (name, baseline))
        rows.append(_one(ours) | _against(ours, theirs if name != baseline else ours.isel(run=slice(0))))
    for p in ("p_rate", "p_loss"):
        for row, adjusted in zip(rows, holm([row[p] for row in rows]).tolist(), strict=True):
            row[f"{p}_holm"] = adjusted
    coords: dict[str, Any] = {"group": ("row", [name for name, _ in places])}
    if "learning_rate" in summary.coords:
        coords["learning_rate"] = ("row", [of for _, of in places])
    attrs = {"baseline": baseline, "definition": summary["diverged"].attrs.get("definition", "")}
    return xr.Dataset({name: ("row", [row[name] for row in rows]) for name in rows[0]}, coords, attrs)


def _one(runs: xr.Dataset) -> dict[str, Any]:
    k, n = int(runs["diverged"].sum()), runs.sizes["run"]
    loss = runs["final_loss"].values
    finite = loss[np.isfinite(loss)]
    row: dict[str, Any] = {"runs": n, "diverged": k, "rate": k / n}
    row["wilson_low"], row["wilson_high"] = map(float, wilson_interval(k, n))
    row["exact_low"], row["exact_high"] = map(float, clopper_pearson_interval(k, n))
    row |= {"loss_mean": float(finite.mean()) if finite.size else math.nan, "finite": finite.size}
    return row | {"loss_sd": float(finite.std(ddof=1)) if finite.size > 1 else math.nan}


NOTHING = {
    "how": "", "pairs": 0, "rate_difference": math.nan, "rate_difference_low": math.nan, "rate_difference_high": math.nan,
    "p_rate": math.nan, "loss_difference": math.nan, "loss_difference_low": math.nan, "loss_difference_high": math.nan,
    "p_loss": math.nan,
}  # fmt: skip


def _against(ours: xr.Dataset, theirs: xr.Dataset) -> dict[str, Any]:
    if not theirs.sizes["run"]:
        return dict(NOTHING)
    if "seed" in ours.coords:
        first, second = (_by_seed(runs["diverged"].astype(float)) for runs in (ours, theirs))
        pairs = pairs_of(first, second)
        apart, p = pairs.difference, mcnemar(pairs) if pairs.n else math.nan
        limits, how, count = paired_interval(pairs), "paired", pairs.n
        difference = (_by_seed(ours["final_loss"]) - _by_seed(theirs["final_loss"])).values
        loss = paired(difference[np.isfinite(difference)].tolist())
    else:
        (k, n), (k_2, n_2) = ((int(runs["diverged"].sum()), runs.sizes["run"]) for runs in (ours, theirs))
        apart, p = k / n - k_2 / n_2, unpaired_test(k, n, k_2, n_2)
        limits, how, count = unpaired_interval(k, n, k_2, n_2), "unpaired", 0
        loss = _welch(ours["final_loss"].values, theirs["final_loss"].values)
    return {
        "how": how, "pairs": count, "rate_difference": apart, "rate_difference_low": limits[0], "rate_difference_high": limits[1],
        "p_rate": p, "loss_difference": loss.mean, "loss_difference_low": loss.low, "loss_difference_high": loss.high,
        "p_loss": loss.p,
    }  # fmt: skip


def _by_seed(values: xr.DataArray) -> xr.DataArray:
    seeds = values["seed"].values.tolist()
    if len(set(seeds)) < len(seeds):
        double = next(seed for seed in seeds if seeds.count(seed) > 1)
        raise ValueError(
            f"two runs of one group have seed {double} at the same learning rate: give --learning-rate, or number seeds apart"
        )
    return xr.DataArray(values.values, dims=("seed",), coords={"seed": seeds})


def _welch(ours: npt.NDArray[np.float64], theirs: npt.NDArray[np.float64]) -> Difference:
    """Welch's t of two means of finite losses (1947, Biometrika 34:28); the difference alone of fewer than two each."""
    x, y = ours[np.isfinite(ours)], theirs[np.isfinite(theirs)]
    mean = float(x.mean() - y.mean()) if x.size and y.size else math.nan
    found = Difference(mean=mean)
    if min(x.size, y.size) < 2 or not x.var() + y.var():
        return found
    test = stats.ttest_ind(x, y, equal_var=False)
    limits = test.confidence_interval(CONFIDENCE)
    return replace(found, low=float(limits.low), high=float(limits.high), p=float(test.pvalue))
