"""How much the loss minds the learning rate: LR sensitivity (Wortsman et al. 2309.14322), alone and against the baseline's.

    sensitivity = mean over rates of m(rate) - min over rates of m(rate),    m(rate) = mean over seeds of min(final, initial loss)

over one grid of learning rates, the same for all recipes; a loss that is not finite counts as the initial one, and seeds are
averaged before the minimum is taken, since the minimum over single runs falls with their number. In nats/token; it depends on
the grid.

Two intervals. "contrasts", the default: the sensitivity is the largest of the means of c_r = (a seed's mean over rates) - (its
loss at r), and `contrasts` bounds a largest mean. "bootstrap": seeds are drawn, with Hesterberg's percentiles (see `resample`).
Where several rates are equally good the true minimum lies above nearly every draw's, and the bootstrap's interval above the
truth: in a recipe that minds nothing it never covers 0. Both take what was seen for what there is: a rate at which none of n
seeds diverged, and some would, has a mean that is too good by more than its interval tells. The interval of the divergence rate
says how many may.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import xarray as xr

from train.contrasts import bound, mean_over
from train.resample import DRAWS, LEAST_SEEDS, expanded_interval, seed_draws
from train.seed_cube import common_rates

Floats = npt.NDArray[np.float64]
Method = Literal["contrasts", "bootstrap"]

VARIABLES = {
    "sensitivity": ("nats/token", "LR sensitivity", "mean - min over rates of the seeds' mean of min(final, initial loss)"),
    "sensitivity_low": ("nats/token", "lower limit of the LR sensitivity", "see interval"),
    "sensitivity_high": ("nats/token", "upper limit of the LR sensitivity", "see interval"),
    "difference": ("nats/token", "LR sensitivity above the baseline's", "recipe - baseline, the same seeds"),
    "difference_low": ("nats/token", "lower limit of that difference", "see interval"),
    "difference_high": ("nats/token", "upper limit of that difference", "see interval"),
    "seeds": ("1", "seeds with a run at every learning rate of the grid", "those that the interval is over"),
}  # fmt: skip


def lr_sensitivity(
    grid: xr.Dataset,
    baseline: str | None = None,
    confidence: float = 0.95,
    method: Method = "contrasts",
    draws: int = DRAWS,
) -> xr.Dataset:
    """LR sensitivity with its interval, over recipe, and `rate` of the grid, as `VARIABLES` says; differences with a baseline.

    grid: of `seed_grid`, with clipped_loss. Rates at which some recipe has no run are no part of the grid: attrs name them.
    Fewer than LEAST_SEEDS seeds: a number without an interval. One rate: 0. ValueError without an initial loss, with no rate that
    all recipes have, and for a baseline that is no recipe.
    """
    if "clipped_loss" not in grid:
        raise ValueError("LR sensitivity counts a loss that is not finite as the initial one: give initial_loss (run)")
    if baseline is not None and baseline not in grid["recipe"].values:
        raise ValueError(f"baseline {baseline!r} is none of the recipes {', '.join(map(str, grid['recipe'].values))}")
    rates = common_rates(grid)
    if not rates.size:
        raise ValueError("no learning rate at which every recipe has a run: LR sensitivity is over one grid for all")
    loss = grid["clipped_loss"].sel(learning_rate=rates).transpose("recipe", "learning_rate", "seed").values
    complete = np.isfinite(loss).all(axis=1)  # [recipe, seed]
    own = _of(mean_over(loss))
    limits = _by_contrasts(loss, complete, confidence) if method == "contrasts" else _drawn(loss, confidence, draws)
    values = dict(zip(("sensitivity", "sensitivity_low", "sensitivity_high"), (own, *limits), strict=True))
    values["seeds"] = complete.sum(axis=1)
    if baseline is not None:
        i = grid["recipe"].values.tolist().index(baseline)
        ends = (_difference if method == "contrasts" else _drawn_difference)(loss, i, confidence, draws)
        values |= dict(zip(("difference_low", "difference_high"), ends, strict=True)) | {"difference": own - own[i]}
    left_out = sorted(set(grid["learning_rate"].values.tolist()) - set(rates.tolist()))
    return xr.Dataset(
        {name: ("recipe", of, described(VARIABLES[name])) for name, of in values.items()},
        {"recipe": grid["recipe"].values, "rate": ("rate", rates)},
        {"confidence": confidence, "interval": method, "rates_left_out": ", ".join(f"{rate:g}" for rate in left_out) or "none"},
    )  # fmt: skip


def described(row: tuple[str, str, str]) -> dict[str, str]:
    """A variable's attributes, from its units, long name and how it is made."""
    return dict(zip(("units", "long_name", "source"), row, strict=True))


def _of(means: Floats) -> Floats:
    """Mean - min over the last axis, of means that are all there; NaN otherwise."""
    return np.asarray(means.mean(axis=-1) - means.min(axis=-1), np.float64)


def _contrast(loss: Floats, complete: npt.NDArray[np.bool_]) -> Floats:
    """c_r of each seed, [rate, seed]: its mean over rates - its loss at r; NaN of a seed that lacks a rate."""
    return np.where(complete, loss.mean(axis=0) - loss, np.nan)


def _by_contrasts(loss: Floats, complete: npt.NDArray[np.bool_], confidence: float) -> tuple[Floats, Floats]:
    error, count = (1 - confidence) / 2, loss.shape[1]
    low, high = [], []
    for of, there in zip(loss, complete, strict=True):
        c = _contrast(of, there)
        low.append(max(0.0, float(bound(c, error / count, -1).max())) if there.sum() >= LEAST_SEEDS else np.nan)
        high.append(float(bound(c, error, 1).max()) if there.sum() >= LEAST_SEEDS else np.nan)
    return np.array(low), np.array(high)


def _difference(loss: Floats, baseline: int, confidence: float, _: int) -> tuple[Floats, Floats]:
    """max_r m_r - max_s n_s = max_r min_s (m_r - n_s), of which each is a mean over the same seeds; bounds at error / rates."""
    error, complete = (1 - confidence) / 2 / loss.shape[1], np.asarray(np.isfinite(loss).all(axis=1), np.bool_)
    low, high = [], []
    for i, of in enumerate(loss):
        both = complete[i] & complete[baseline]
        if i == baseline or both.sum() < LEAST_SEEDS:
            same = 0.0 if i == baseline and both.any() else np.nan
            low.append(same)
            high.append(same)
            continue
        apart = _contrast(of, both)[:, None] - _contrast(loss[baseline], both)[None]
        low.append(float(bound(apart, error, -1).min(axis=1).max()))
        high.append(float(bound(apart, error, 1).min(axis=1).max()))
    return np.array(low), np.array(high)


def _statistics(loss: Floats, draws: int) -> tuple[Floats, int]:
    """The sensitivity in each draw of seeds, [draws, recipe]; a seed without a run in a cell is not in that cell's mean."""
    weights = seed_draws(loss.shape[2], draws)
    there = np.isfinite(loss)
    with np.errstate(invalid="ignore"):
        sums, counts = (
            np.einsum("ds,crs->dcr", weights, of) for of in (np.where(there, loss, 0.0), there.astype(np.float64))
        )
        means = sums / counts
    return _of(means), int(there.any(axis=(0, 1)).sum())


def _drawn(loss: Floats, confidence: float, draws: int) -> tuple[Floats, Floats]:
    return expanded_interval(*_statistics(loss, draws), confidence)


def _drawn_difference(loss: Floats, baseline: int, confidence: float, draws: int) -> tuple[Floats, Floats]:
    drawn, seeds = _statistics(loss, draws)
    return expanded_interval(drawn - drawn[:, [baseline]], seeds, confidence)
