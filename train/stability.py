"""Did a run diverge? Named definitions, each of them stored.

There is no one definition of divergence, and the definition moves the answer, so each gets a name, all are stored
beside each other, and a study says which one it reports:

- `non_finite`: a loss or a gradient norm was NaN or infinite. The strictest evidence, and the rarest: clipping, BF16's range and
  AdamW's normalised step keep most failed runs finite.
- `no_progress`: the final smoothed loss is not below the training tokens' unigram entropy by a margin. A collapsed
  model predicts each byte by its frequency alone and stays there, far below where it started (3.24 nats on Python's
  source, from 5.55), so "lower than at the start" would call it trained.
- `spike`: the loss exceeds its recent course by 6 sigma. The course is the straight line fitted to the preceding 128
  steps, continued by one step, and sigma is the residuals' standard deviation about it, so a falling loss is neither
  taken for noise nor does it widen sigma by its slope. While the loss still bends steeply the residuals hold the bend,
  and the rule is nearly blind: read early spikes as "at least".
- `gap`: the final smoothed loss is above what the baseline reaches at its own best learning rate, by a margin.

NaN means something in all of them, and comparisons with NaN are false, so each definition is written to say what NaN
does: a non-finite loss diverges, is a spike, makes no progress, and is a gap. Steps after a run's `last_step` are
padding and never looked at. NumPy and xarray in, xarray out; loss in nats per token. How often runs diverge is `rates`'s.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import xarray as xr

from train.spikes import above_trend, carried_forward

Definition = Literal["non_finite", "no_progress", "spike", "gap"]
DEFINITIONS: tuple[str, ...] = get_args(Definition)

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DivergenceSettings:
    """The numbers in the definitions, and which of them `diverged` reports."""

    definition: Definition = "no_progress"
    window: int = 20  # steps whose mean is the smoothed loss
    progress_margin: float = 0.1  # nats below the unigram entropy
    gap_margin: float = 0.2  # nats above the baseline's best
    sigma: float = 6.0
    spike_window: int = 128  # steps
    recovery_margin: float = 0.1  # nats above the smoothed loss before the first spike

    def __post_init__(self) -> None:
        if self.definition not in DEFINITIONS:
            raise ValueError(f"definition must be one of {', '.join(DEFINITIONS)}, got {self.definition!r}")
        for field in fields(self):
            value = getattr(self, field.name)
            least = {"window": 1, "spike_window": 3}.get(field.name, 0)  # two points leave no residual about their line
            if field.name != "definition" and not least <= value < np.inf:
                raise ValueError(f"{field.name} must be at least {least} and finite, got {value}")


def smoothed_final_loss(train_loss: xr.DataArray, last_step: xr.DataArray, window: int) -> xr.DataArray:
    """Mean of the last `window` steps up to `last_step`, of all there are in a shorter run; NaN if one of them is not
    finite.

    train_loss (run, step), last_step (run) in the labels of `step` -> (run).
    """
    loss = _by_run(train_loss)
    return _per_run(_mean_before(loss, _length(train_loss, last_step), window), train_loss)


def first_non_finite_step(train_loss: xr.DataArray, grad_norm: xr.DataArray, last_step: xr.DataArray) -> xr.DataArray:
    """The first step up to `last_step` whose loss or gradient norm is NaN or infinite, as a label of `step`; NaN if none."""
    bad = ~(np.isfinite(_by_run(train_loss)) & np.isfinite(_by_run(grad_norm)))
    return _first(bad & _recorded(train_loss, last_step), train_loss)


def no_progress(final_loss: xr.DataArray, unigram_entropy: xr.DataArray | float, margin: float) -> xr.DataArray:
    """True unless the final loss is below the unigram entropy by more than the margin; a NaN loss made none."""
    return ~(final_loss < unigram_entropy - margin)


def spikes(train_loss: xr.DataArray, last_step: xr.DataArray, sigma: float = 6.0, window: int = 128) -> xr.DataArray:
    """Whether each step is a spike, (run, step): more than `sigma` above the line through the `window` steps before it.

    Line: least squares over the window, continued by one step. sigma: the residuals' standard deviation (window - 2
    degrees of freedom), at least one FP32 ulp of the loss, so that rounding noise on a constant loss is no spike. A NaN
    or infinite loss is a spike wherever it stands; in later windows the last finite loss before it takes its place, so
    that it does not blind the rule for `window` steps. The first `window` finite steps have too little before them and
    are never spikes.
    """
    recorded = _recorded(train_loss, last_step)
    loss = np.where(recorded, _by_run(train_loss), np.nan)
    found = above_trend(carried_forward(loss), loss, sigma, window)
    found |= recorded & ~np.isfinite(loss)
    return xr.DataArray(found, dims=("run", "step"), coords=train_loss.transpose("run", "step").coords)


def spike_score(
    found: xr.DataArray, train_loss: xr.DataArray, last_step: xr.DataArray, window: int = 128
) -> xr.DataArray:
    """Share of judged steps that are spikes, (run); NaN for runs of at most `window` steps.

    Judged are the steps with `window` steps before them, and non-finite ones wherever they are.
    """
    loss, length = _by_run(train_loss), _length(train_loss, last_step)
    judged = _recorded(train_loss, last_step) & ((np.arange(loss.shape[1]) >= window) | ~np.isfinite(loss))
    share = _by_run(found).sum(axis=1) / np.maximum(judged.sum(axis=1), 1)
    return _per_run(np.where(length > window, share, np.nan), train_loss)


def recovered(
    found: xr.DataArray, train_loss: xr.DataArray, last_step: xr.DataArray, window: int, margin: float
) -> xr.DataArray:
    """Whether a run that spiked ended no more than `margin` above where it was: False where there was no spike.

    Where it was: the mean of the `window` steps before the first spike (fewer in its first steps). Where it ended: the
    smoothed final loss. A run whose first step is a spike has nothing to return to.
    """
    loss, bad = _by_run(train_loss), _by_run(found).astype(bool)
    before = _mean_before(loss, np.where(bad.any(axis=1), bad.argmax(axis=1), 0), window)
    final = _mean_before(loss, _length(train_loss, last_step), window)
    return _per_run(final <= before + margin, train_loss)  # NaN on either side: not recovered


def gap_reference(
    final_loss: xr.DataArray, baseline: str, within: Sequence[str] = ("dataset", "model")
) -> xr.DataArray:
    """The baseline's lowest seed-median of the final loss over its learning rates, for each run; NaN where it has none.

    final_loss (run) with coordinates recipe and learning_rate on run. Runs are compared inside groups of equal `within`
    coordinates; names that are no coordinate are passed over. A baseline run without a finite final loss counts as
    infinitely bad, so a rate at which half of the seeds fail is not the best one by grace of the others.
    """
    loss = np.where(np.isfinite(final_loss), final_loss, np.inf)
    groups = _group_index([final_loss[name].values for name in within if name in final_loss.coords], loss.size)
    is_baseline, rate = final_loss["recipe"].values == baseline, final_loss["learning_rate"].values
    reference = np.full(loss.shape, np.nan)
    for group in np.unique(groups[is_baseline]):
        ours = is_baseline & (groups == group)
        best = min(np.median(loss[ours & (rate == r)]) for r in np.unique(rate[ours]))
        reference[groups == group] = best if np.isfinite(best) else np.nan
    return _per_run(reference, final_loss)


def gap(final_loss: xr.DataArray, reference: xr.DataArray, margin: float) -> xr.DataArray:
    """True where the final loss is above the reference by more than the margin, or is NaN; no reference, no gap for a
    finite loss.
    """
    return (final_loss > reference + margin) | ~np.isfinite(final_loss)


def divergence(
    history: xr.Dataset,
    unigram_entropy: xr.DataArray | float,
    baseline: str,
    settings: DivergenceSettings | None = None,
    within: Sequence[str] = ("dataset", "model"),
) -> xr.Dataset:
    """Every definition for every run, and `diverged` by the one that the settings name.

    history: train_loss (run, step), grad_norm (run, step), last_step (run), with coordinates recipe and learning_rate
    on run, and skipped (run, step) where steps were: their norms don't count. unigram_entropy: of the training tokens, nats,
    one number or (run). Returns a Dataset over run with the history's run coordinates: see `VARIABLES`. Raises ValueError where a
    last_step is missing or lies before the first step.
    """
    settings = settings or DivergenceSettings()
    found = outcomes(history, settings)
    return judged(found, history["last_step"], unigram_entropy, baseline, settings, within)


def outcomes(history: xr.Dataset, settings: DivergenceSettings) -> xr.Dataset:
    """What each run's history says by itself: first_non_finite_step and first_spike (labels of step, NaN where there is none),
    recovered, spike_score, final_loss; over run. Runs may be looked at together or apart.
    """
    loss, last = history["train_loss"], history["last_step"]
    norm = history["grad_norm"]
    if "skipped" in history:  # a dynamic loss scale found its limit: no weight saw that gradient
        norm = norm.where(history["skipped"] != 1, 0.0)
    found = spikes(loss, last, settings.sigma, settings.spike_window)
    rows = xr.Dataset(
        {
            "first_non_finite_step": first_non_finite_step(loss, norm, last),
            "first_spike": _first(_by_run(found).astype(bool), loss),
            "recovered": recovered(found, loss, last, settings.window, settings.recovery_margin),
            "spike_score": spike_score(found, loss, last, settings.spike_window),
            "final_loss": smoothed_final_loss(loss, last, settings.window),
        }
    )
    return rows.drop_vars("step", errors="ignore")


def judged(
    rows: xr.Dataset, last_step: xr.DataArray, unigram_entropy: xr.DataArray | float, baseline: str,
    settings: DivergenceSettings, within: Sequence[str] = ("dataset", "model"),
) -> xr.Dataset:  # fmt: skip
    """`divergence` of all runs, from the `outcomes` of each."""
    final, first_bad = rows["final_loss"], rows["first_non_finite_step"]
    reference = gap_reference(final, baseline, within)
    if settings.definition == "gap" and bool(reference.isnull().any()):
        warnings.warn(
            f"no finite final loss of the baseline {baseline!r} to hold {int(reference.isnull().sum())} runs against: "
            "there only a non-finite final loss counts as a gap",
            stacklevel=3,  # whoever called `divergence`
        )
    entropy = unigram_entropy if isinstance(unigram_entropy, xr.DataArray) else xr.DataArray(float(unigram_entropy))
    if not set(entropy.dims) <= {"run"}:
        raise ValueError(f"unigram_entropy must be one number or lie over run, got dimensions {entropy.dims}")
    result = xr.Dataset(
        {
            "non_finite": first_bad.notnull(),
            "no_progress": no_progress(final, entropy.reset_coords(drop=True), settings.progress_margin),
            "spike": rows["first_spike"].notnull(),
            "gap": gap(final, reference, settings.gap_margin),
            "recovered": rows["recovered"],
            "spike_score": rows["spike_score"],
            "final_loss": final,
            "gap_reference": reference,
        }
    )
    result["diverged"] = result[settings.definition].copy()
    when = rows["first_spike"] if settings.definition == "spike" else first_bad
    result["diverged_step"] = when.fillna(last_step.astype(np.float64)).where(result["diverged"])
    return _described(result, settings, baseline)


def _described(result: xr.Dataset, settings: DivergenceSettings, baseline: str) -> xr.Dataset:
    numbers = {field.name: getattr(settings, field.name) for field in fields(settings)} | {"baseline": baseline}
    for name, (units, long_name, sentence) in VARIABLES.items():
        result[name].attrs = {"units": units, "long_name": long_name, "source": sentence.format(**numbers)}
    result["diverged"].attrs["definition"] = settings.definition
    result.attrs = numbers
    return result


# What each variable of `divergence` means: units, long name, definition (with the settings' numbers filled in).
VARIABLES: dict[str, tuple[str, str, str]] = {
    "non_finite": ("1", "non-finite loss or gradient norm", "a loss or gradient norm up to last_step is not finite"),
    "no_progress": (
        "1",
        "no progress beyond unigram statistics",
        "final_loss is not below the unigram entropy of the training tokens - {progress_margin} nats, or is NaN",
    ),
    "spike": (
        "1",
        "loss spike",
        "a loss up to last_step exceeds the line fitted to the preceding {spike_window} steps by {sigma} standard "
        "deviations of the residuals, or is not finite",
    ),
    "gap": ("1", "gap to the baseline", "final_loss is above gap_reference + {gap_margin} nats, or is NaN"),
    "diverged": ("1", "diverged", "the definition {definition}"),
    "diverged_step": (
        "steps",
        "step of divergence",
        "the first spike if that is the definition; else the first non-finite step or last_step; NaN if not diverged",
    ),
    "recovered": (
        "1",
        "recovered from its spikes",
        "final_loss is at most the mean of the {window} steps before the first spike + {recovery_margin} nats",
    ),
    "spike_score": (
        "1",
        "share of steps that are spikes",
        "spikes / judged steps, as OLMo's spike score, trend removed, NaN counted; NaN up to {spike_window} steps",
    ),
    "final_loss": (
        "nats/token",
        "final smoothed training loss",
        "mean of the last {window} steps up to last_step; NaN if one is not finite",
    ),
    "gap_reference": (
        "nats/token",
        "the best final loss of the baseline",
        "lowest seed-median of final_loss over the learning rates of {baseline}, non-finite taken as infinite",
    ),
}


def _by_run(array: xr.DataArray) -> Floats:
    return np.asarray(array.transpose("run", "step").values, np.float64)


def _per_run(values: npt.NDArray[np.generic], like: xr.DataArray) -> xr.DataArray:
    """Values [run] with the coordinates that `like` has on run alone."""
    coords = {name: c for name, c in like.coords.items() if c.dims in ((), ("run",))}
    return xr.DataArray(values, dims=("run",), coords=coords)


def _length(train_loss: xr.DataArray, last_step: xr.DataArray) -> Ints:
    """How many steps each run has, from the label of its last one."""
    labels = train_loss["step"].values  # 0, 1, ... where the dimension has no coordinate
    last = np.asarray(last_step.values, np.float64)
    length = np.where(np.isnan(last), 0, np.searchsorted(labels, last, side="right"))
    if (length < 1).any():
        raise ValueError(
            f"last_step must be at least the first step ({labels[0]!s}), got {last[length < 1][0]} for run "
            f"{int(np.argmax(length < 1))}; leave out runs that have not trained"
        )
    return length.astype(np.int64)


def _recorded(train_loss: xr.DataArray, last_step: xr.DataArray) -> Bools:
    return np.arange(train_loss.sizes["step"]) < _length(train_loss, last_step)[:, None]


def _first(marked: Bools, like: xr.DataArray) -> xr.DataArray:
    labels = like["step"].values.astype(np.float64)
    return _per_run(np.where(marked.any(axis=1), labels[marked.argmax(axis=1)], np.nan), like)


def _mean_before(loss: Floats, end: Ints, window: int) -> Floats:
    """Mean of the `window` values before position `end` in each row; NaN where there are none or one is not finite."""
    position = end[:, None] - 1 - np.arange(min(window, loss.shape[1]))
    inside = position >= 0
    value = np.where(inside, np.take_along_axis(loss, np.maximum(position, 0), axis=1), 0.0)
    mean = value.sum(axis=1) / np.maximum(inside.sum(axis=1), 1)
    return np.where(inside.any(axis=1) & np.isfinite(value).all(axis=1), mean, np.nan)


def _group_index(columns: list[npt.NDArray[np.generic]], size: int) -> Ints:
    """An integer for each run, the same where all columns agree."""
    keys = list(zip(*(column.tolist() for column in columns), strict=True)) if columns else [()] * size
    order = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    return np.array([order[key] for key in keys], np.int64)
