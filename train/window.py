"""The stable window: the widest range of learning rates, in octaves, in which a recipe trains and trains as well as it can.

A rate is in it if at most a stated share of seeds diverges there, and the mean final loss of the seeds that trained is within a
stated margin of the recipe's own best; the window is the widest run of neighbouring rates of the grid of which all are. Its
width is log2 of the last rate over the first: 0 octaves for one rate alone. Where it touches the grid's end it may go on
beyond: then the width is censored, "at least that wide", and no number says otherwise.

The interval is of the window that infinitely many seeds would show on this grid. Each rate is put to two tests: is it shown to
be in, is it shown to be out; by Clopper and Pearson's limits of the share, and Student's bounds of paired differences of loss
(see `contrasts`), divided among the rates (Bonferroni). The widest run of rates shown to be in is at most as wide as the true
window, the widest of those not shown to be out at least as wide: so both limits hold together. With few seeds nothing is shown
to be in: to show that at most 10 % diverge, at the only rate that is tried, takes 36 without a failure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xarray as xr

from train.contrasts import bound, mean_over
from train.optimum import candidates
from train.proportions import clopper_pearson_interval
from train.seed_cube import by_rate

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

ALLOWED = 0.1  # share of seeds that may diverge
MARGIN = 0.1  # nats/token above the recipe's own best


@dataclass(frozen=True)
class Window:
    """A recipe's stable window: its rates and octaves (NaN where no rate is in), limits, and where it touches the grid's ends.

    at_least: NaN where no rate is shown to be in; at_most: NaN where all are shown to be out. open_ended: what is not shown to be
    out touches the grid's end, so that at_most is of this grid alone. rates: how many were tried.
    """

    lowest: float
    highest: float
    octaves: float
    at_least: float
    at_most: float
    censored_below: bool
    censored_above: bool
    open_ended: bool
    rates: int

    @property
    def censored(self) -> bool:
        """Whether it touches an end of the grid, so that it is at least this wide."""
        return self.censored_below or self.censored_above

    def __str__(self) -> str:
        if not math.isfinite(self.octaves):
            return f"none of {self.rates} rates"
        return (
            f"{'at least ' if self.censored else ''}{self.octaves:.1f} octaves, {self.lowest:.3g} to {self.highest:.3g}"
        )


def stable_window(
    grid: xr.Dataset, recipe: str, allowed: float = ALLOWED, margin: float = MARGIN, confidence: float = 0.95
) -> Window:
    """The window of a recipe over the rates at which it has runs; allowed: share that may diverge; margin: nats/token.

    ValueError unless 0 <= allowed < 1, margin >= 0, and for a recipe without runs.
    """
    if not 0 <= allowed < 1:
        raise ValueError(f"allowed must be a share from 0 to below 1, got {allowed}")
    if not margin >= 0:
        raise ValueError(f"margin must be at least 0 nats/token, got {margin}")
    loss, diverged = by_rate(grid, recipe)
    there = np.isfinite(diverged).any(axis=1)
    rates, loss, diverged = grid["learning_rate"].values[there], loss[there], diverged[there]
    if not rates.size:
        raise ValueError(f"{recipe} has no runs")
    seen = _widest(_observed(loss, diverged, allowed, margin), rates)
    shown, possible = _shown(loss, diverged, allowed, margin, 1 - confidence)
    inner, outer = _widest(shown, rates), _widest(possible, rates)
    end = rates.size - 1
    lowest, highest = (math.nan, math.nan) if seen is None else (float(rates[place]) for place in seen)
    return Window(
        lowest, highest, _octaves(rates, seen), _octaves(rates, inner), _octaves(rates, outer),
        censored_below=seen is not None and seen[0] == 0, censored_above=seen is not None and seen[1] == end,
        open_ended=outer is not None and (outer[0] == 0 or outer[1] == end), rates=int(rates.size),
    )  # fmt: skip


def window_difference(ours: Window, theirs: Window) -> tuple[float, float, float]:
    """How much wider, octaves: difference, low, high; both made at a confidence of (1 + c) / 2, for one of c.

    The difference is of the widths as they were seen, NaN where one has no window; the limits are infinite where a width could be
    any, and count a window that is not shown to be there as 0 octaves.
    """

    def most(window: Window) -> float:
        return math.inf if window.open_ended else 0.0 if math.isnan(window.at_most) else window.at_most

    def surely(window: Window) -> float:
        return 0.0 if math.isnan(window.at_least) else window.at_least

    return ours.octaves - theirs.octaves, surely(ours) - most(theirs), most(ours) - surely(theirs)


def _octaves(rates: Floats, ends: tuple[int, int] | None) -> float:
    return math.nan if ends is None else math.log2(float(rates[ends[1]] / rates[ends[0]]))


def _widest(inside: Bools, rates: Floats) -> tuple[int, int] | None:
    """First and last place of the run of True that is the most octaves wide; of equal ones the lowest; None without any."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], inside, [False]])))
    runs = list(zip(edges[::2].tolist(), (edges[1::2] - 1).tolist(), strict=True))
    return max(runs, key=lambda run: rates[run[1]] / rates[run[0]], default=None)


def _observed(loss: Floats, diverged: Floats, allowed: float, margin: float) -> Bools:
    means = mean_over(loss)
    rivals = np.where(candidates(diverged), means, np.nan)
    if not np.isfinite(rivals).any():
        return np.zeros(means.size, np.bool_)
    with np.errstate(invalid="ignore"):
        return np.asarray((mean_over(diverged) <= allowed) & (means <= np.nanmin(rivals) + margin), np.bool_)


def _shown(loss: Floats, diverged: Floats, allowed: float, margin: float, error: float) -> tuple[Bools, Bools]:
    """Rates shown to be in the window, and those not shown to be out, each wrong about any with a chance of at most error / 2."""
    n, k = np.isfinite(diverged).sum(axis=1), np.nansum(diverged, axis=1)
    each = error / 2 / n.size
    # To be in, a rate must pass both tests, and one of them is enough to be right; to be out it must fail one of them.
    _, share_high = clopper_pearson_interval(k, n, 1 - 2 * each)
    share_low, _ = clopper_pearson_interval(k, n, 1 - each)
    rivals = np.flatnonzero(candidates(diverged))
    within = np.zeros(n.size, np.bool_)
    beyond = np.zeros(n.size, np.bool_)
    for r in range(n.size):
        apart = [loss[r] - loss[s] for s in rivals if s != r]
        highs = [float(bound(of, each, 1)) for of in apart]
        lows = [float(bound(of, each / 2 / max(1, len(apart)), -1)) for of in apart]
        within[r] = bool(rivals.size) and max(highs, default=0.0) <= margin
        beyond[r] = max(lows, default=-math.inf) > margin
    return within & (share_high <= allowed), ~(beyond | (share_low > allowed))
