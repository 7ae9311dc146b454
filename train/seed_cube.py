"""Runs as a cube, recipe × learning rate × seed, so that what shares a seed stands in one place: NaN where no run is.

Two runs with the same seed start from the same weights and read the same batches, whatever their recipe and rate; so a statistic
is over seeds, and what is resampled is seeds. Where the weights' and the batches' seeds differ, a seed is the pair of both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import xarray as xr

Floats = npt.NDArray[np.float64]
DIMS = ("recipe", "learning_rate", "seed")


def study_runs(tree: xr.DataTree) -> xr.Dataset:
    """What `seed_grid` takes, from a study as `open_study` gives it: /summary, and `initial_loss` (run), the first step's."""
    first = tree["history"]["train_loss"].isel(step=0, drop=True)
    return tree["summary"].to_dataset().assign(initial_loss=first.astype(np.float64))


def seed_labels(runs: xr.Dataset) -> list[object]:
    """Each run's seed, or "7/3" for weights of seed 7 and batches of seed 3 where those differ; all alike without any."""
    if {"init_seed", "data_seed"} <= set(runs.coords):
        weights, batches = runs["init_seed"].values.tolist(), runs["data_seed"].values.tolist()
        if weights != batches:
            return [f"{i}/{d}" for i, d in zip(weights, batches, strict=True)]
        return list(weights)
    return list(runs["seed"].values.tolist()) if "seed" in runs.coords else [0] * runs.sizes["run"]


def crossed_words(runs: xr.Dataset) -> str:
    """What is to be said of runs whose pairs of seeds share one of the two, so are not independent; "" where none does."""
    if not {"init_seed", "data_seed"} <= set(runs.coords):
        return ""
    return crossed(zip(runs["init_seed"].values.tolist(), runs["data_seed"].values.tolist(), strict=True))


def crossed(seeds: Iterable[tuple[int, int]]) -> str:
    """The same of (init_seed, data_seed), a run each. One seed of weights for all, or of batches, crosses nothing."""
    pairs = set(seeds)
    weights, batches = ({pair[i] for pair in pairs} for i in (0, 1))
    if min(len(weights), len(batches)) < 2 or len(weights) == len(batches) == len(pairs):
        return ""
    return (
        f"Seeds are crossed: {len(pairs)} pairs of {len(weights)} init_seed and {len(batches)} data_seed share weights or "
        "batches, and count as independent, so that intervals are too short: vary one of the two, or both together by seed."
    )


def seed_grid(runs: xr.Dataset) -> xr.Dataset:
    """The cube: diverged, final_loss, clipped_loss, (recipe, learning_rate, seed); float64, NaN where there is no run.

    runs: diverged, final_loss and, if known, initial_loss, all (run), with coordinates recipe, learning_rate and seed on run, or
    init_seed and data_seed. Recipes keep the order of their first runs, rates rise, and seeds too (see `in_order`).
    clipped_loss: min(final, initial), the initial loss where the final one is not finite (Wortsman et al. 2309.14322); without
    initial_loss it is not there. ValueError where two runs would stand in one place, and where there is no run.
    """
    known = runs.isel(run=runs["diverged"].notnull().values)
    if not known.sizes["run"]:
        raise ValueError("no run whose divergence is known: nothing can be said of no runs")
    recipe = known["recipe"].values.astype(str).tolist()
    rate, seed = known["learning_rate"].values.astype(np.float64), seed_labels(known)
    recipes, rates = list(dict.fromkeys(recipe)), np.unique(rate)
    seeds = in_order(seed)
    column = {label: i for i, label in enumerate(seeds)}
    place = (
        np.array([recipes.index(name) for name in recipe]),
        np.searchsorted(rates, rate),
        np.array([column[label] for label in seed]),
    )
    shape = (len(recipes), len(rates), len(seeds))
    cell, count = np.unique(np.ravel_multi_index(place, shape), return_counts=True)
    if (count > 1).any():
        i, j, k = np.unravel_index(cell[count > 1][0], shape)
        apart = [str(n) for n in known.coords if n not in (*DIMS, "run") and known[n].dims == ("run",)]
        varied = [name for name in apart if len(set(known[name].values.tolist())) > 1]
        raise ValueError(
            f"two runs of {recipes[i]} at learning rate {rates[j]:g} with seed {seeds[k]}: select one "
            + (f"of {', '.join(varied)} first" if varied else "of them, or number the seeds apart")
        )
    final = known["final_loss"].values.astype(np.float64)
    columns = {"diverged": known["diverged"].values.astype(np.float64), "final_loss": final}
    if "initial_loss" in known:
        first = known["initial_loss"].values.astype(np.float64)
        finite = np.isfinite(first)  # a run may fail in its first step: what others start from is what it would have
        first = np.where(finite, first, np.median(first[finite]) if finite.any() else np.nan)
        columns["clipped_loss"] = clipped(final, first)
    grid = xr.Dataset(coords={"recipe": recipes, "learning_rate": rates, "seed": seeds})
    for name, values in columns.items():
        cube = np.full(shape, np.nan)
        cube[place] = values
        grid[name] = (DIMS, cube)
    grid.attrs["definition"] = str(runs["diverged"].attrs.get("definition", ""))
    return grid


def in_order(labels: Sequence[object]) -> list[object]:
    """Each label once, rising: those of a look are the first ones, however many seeds a study gains later.

    Of "7/3" the seeds are numbers, and what counts first is how far up either is among its kind: a study that gains seeds of
    weights, of batches or of both has its former ones in the places that they had.
    """
    known = list(dict.fromkeys(labels))
    apart = [str(label).split("/") for label in known]
    if not all(isinstance(of, str) for of in known) or not all(
        len(pair) == 2 and all(part.isdecimal() for part in pair) for pair in apart
    ):
        return sorted(known, key=lambda label: (isinstance(label, str), label))
    pairs = [(int(weights), int(batches)) for weights, batches in apart]
    ranks = [{seed: i for i, seed in enumerate(sorted(set(of)))} for of in zip(*pairs, strict=True)]
    place = {label: (ranks[0][i], ranks[1][d]) for label, (i, d) in zip(known, pairs, strict=True)}
    return sorted(known, key=lambda label: (max(place[label]), place[label]))


def clipped(final: Floats, initial: Floats) -> Floats:
    """min(final, initial), the initial loss where the final one is not finite; elementwise."""
    return np.where(np.isfinite(final), np.minimum(final, initial), initial)


def trained_loss(grid: xr.Dataset) -> xr.DataArray:
    """The final loss of runs that did not diverge, NaN elsewhere, (recipe, learning_rate, seed)."""
    return grid["final_loss"].where((grid["diverged"] == 0) & np.isfinite(grid["final_loss"]))


def by_rate(grid: xr.Dataset, recipe: str) -> tuple[Floats, Floats]:
    """A recipe's `trained_loss` and diverged, both [rate, seed], in the order of the grid's rates and seeds."""
    place = grid["recipe"].values.tolist().index(recipe)
    loss, diverged = (grid.variables[name].transpose(*DIMS).values[place] for name in ("final_loss", "diverged"))
    return np.where((diverged == 0) & np.isfinite(loss), loss, np.nan), diverged


def common_rates(grid: xr.Dataset, recipes: Sequence[str] | None = None) -> Floats:
    """The learning rates at which every recipe (of those named) has a run: the same grid for all."""
    there = grid["diverged"].notnull().any("seed")
    there = there if recipes is None else there.sel(recipe=list(recipes))
    return np.asarray(grid["learning_rate"].values[there.all("recipe").values], np.float64)
