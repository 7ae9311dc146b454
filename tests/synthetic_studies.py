"""Studies whose truth is known: how often each recipe diverges at each rate, and what its runs lose if they don't.

Runs of one seed are alike, in both: a seed has a frailty, of which its runs share a part, and a level of loss. Divergence and
loss are drawn apart, so that every population value below is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xarray as xr
from scipy import stats

Floats = npt.NDArray[np.float64]

INITIAL = 5.5


@dataclass(frozen=True)
class Truth:
    """A recipe's chance to diverge and mean loss of runs that train, at each rate [rates]."""

    diverges: tuple[float, ...]
    loss: tuple[float, ...]

    @property
    def clipped(self) -> Floats:
        """The mean of min(final, initial loss)."""
        p = np.array(self.diverges)
        return np.asarray(p * INITIAL + (1 - p) * np.array(self.loss))

    @property
    def sensitivity(self) -> float:
        """Wortsman's."""
        return float(self.clipped.mean() - self.clipped.min())

    @property
    def best(self) -> int:
        """The place of the optimum: lowest loss where at most half diverge."""
        return int(np.argmin(np.where(np.array(self.diverges) <= 0.5, self.loss, np.inf)))

    def inside(self, allowed: float, margin: float) -> npt.NDArray[np.bool_]:
        """Which rates are in the stable window."""
        return np.asarray((np.array(self.diverges) <= allowed) & (np.array(self.loss) <= self.loss[self.best] + margin))


def make_runs(
    truths: Mapping[str, Truth],
    seeds: int,
    rng: np.random.Generator,
    alike: float = 0.5,
    of_seed: float = 0.03,
    of_run: float = 0.02,
) -> xr.Dataset:
    """diverged, final_loss and initial_loss (run), rates 2^-10, 2^-9, ...; alike: of the frailty, the seed's share."""
    rates = len(next(iter(truths.values())).diverges)
    frailty, level = rng.standard_normal(seeds), of_seed * rng.standard_normal(seeds)
    columns: dict[str, list[npt.NDArray[np.generic]]] = {
        name: [] for name in ("recipe", "learning_rate", "seed", "diverged", "final_loss")
    }
    for name, truth in truths.items():
        own = np.sqrt(alike) * frailty + np.sqrt(1 - alike) * rng.standard_normal((rates, seeds))
        diverged = own < stats.norm.ppf(np.array(truth.diverges))[:, None]
        loss = np.array(truth.loss)[:, None] + level + of_run * rng.standard_normal((rates, seeds))
        loss = np.where(diverged, np.where(rng.random(loss.shape) < 0.5, np.nan, INITIAL + 1), loss)
        columns["recipe"].append(np.full(rates * seeds, name))
        columns["learning_rate"].append(np.repeat(2.0 ** np.arange(-10, rates - 10), seeds))
        columns["seed"].append(np.tile(np.arange(seeds), rates))
        columns["diverged"].append(diverged.ravel())
        columns["final_loss"].append(loss.ravel())
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    coords = {name: ("run", joined.pop(name)) for name in ("recipe", "learning_rate", "seed")}
    variables = {name: ("run", values) for name, values in joined.items()}
    return xr.Dataset({**variables, "initial_loss": ("run", np.full(joined["diverged"].size, INITIAL))}, coords)
