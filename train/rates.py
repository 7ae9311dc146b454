"""How often runs diverge: a table by recipe and learning rate, each rate with its uncertainty.

The rates come with Clopper and Pearson's interval (1934), which covers at least at its level whatever the rate: the one that exmy
shows wherever it shows a share of diverged runs. Wilson's (1927), shorter, and at its level on average alone, is beside it. NumPy
and xarray in, xarray out; loss in nats per token.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import xarray as xr

from train.proportions import clopper_pearson_interval
from train.proportions import wilson_interval as wilson_interval

Floats = npt.NDArray[np.float64]

TABLE_VARIABLES: dict[str, dict[str, str]] = {
    "n": {"units": "1", "long_name": "runs"},
    "k": {"units": "1", "long_name": "runs that diverged"},
    "rate": {"units": "1", "long_name": "share of runs that diverged"},
    "rate_lower": {
        "units": "1",
        "long_name": "lower 95 % limit of the rate",
        "source": "Clopper and Pearson 1934, exact",
    },
    "rate_upper": {
        "units": "1",
        "long_name": "upper 95 % limit of the rate",
        "source": "Clopper and Pearson 1934, exact",
    },
    "wilson_lower": {
        "units": "1",
        "long_name": "lower 95 % limit of the rate",
        "source": "Wilson 1927, score interval",
    },
    "wilson_upper": {
        "units": "1",
        "long_name": "upper 95 % limit of the rate",
        "source": "Wilson 1927, score interval",
    },
    "final_loss_mean": {"units": "nats/token", "long_name": "mean final loss of the runs where it is finite"},
    "finite": {"units": "1", "long_name": "runs with a finite final loss"},
}


def stability_table(summary: xr.Dataset) -> xr.Dataset:
    """Runs, divergences and final losses by recipe and learning rate: a Dataset over (recipe, learning_rate).

    summary: diverged (run) and final_loss (run) with coordinates recipe and learning_rate on run. Recipes keep the
    order in which they first appear, learning rates rise. Whatever else varies along run (seeds, datasets, models) is
    pooled: select before where that is not wanted. `final_loss_mean` is over the runs with a finite final loss,
    diverged or not, and `finite` says how many those are: leaving out the diverged would make a recipe look better the
    more of its runs fail. Runs whose `diverged` is missing don't count.
    """
    known = summary["diverged"].notnull().values
    recipe, rate = summary["recipe"].values[known], summary["learning_rate"].values[known]
    recipes = list(dict.fromkeys(recipe.tolist()))
    rates, column = np.unique(rate, return_inverse=True)
    shape = (len(recipes), len(rates))
    cell = np.array([recipes.index(r) for r in recipe.tolist()], np.int64) * len(rates) + column
    loss = summary["final_loss"].values[known].astype(np.float64)
    finite = np.isfinite(loss)

    def per_cell(weight: npt.NDArray[np.generic]) -> Floats:
        total = np.bincount(cell, weights=weight.astype(np.float64), minlength=shape[0] * shape[1])
        return total.astype(np.float64).reshape(shape)

    n, k = per_cell(np.ones(cell.size)), per_cell(summary["diverged"].values[known])
    count = per_cell(finite)
    with np.errstate(invalid="ignore"):
        rate_kn, mean = k / n, per_cell(np.where(finite, loss, 0.0)) / count
    lower, upper = clopper_pearson_interval(k, n)
    wilson = dict(zip(("wilson_lower", "wilson_upper"), wilson_interval(k, n), strict=True))
    values = {"n": n.astype(np.int64), "k": k.astype(np.int64), "rate": rate_kn, "rate_lower": lower}
    values |= {"rate_upper": upper, **wilson, "final_loss_mean": mean, "finite": count.astype(np.int64)}
    described = {"units": "1", "long_name": "learning rate"}
    table = xr.Dataset(
        {name: (("recipe", "learning_rate"), value, dict(TABLE_VARIABLES[name])) for name, value in values.items()},
        coords={"recipe": recipes, "learning_rate": ("learning_rate", rates, described)},
    )
    table.attrs["definition"] = str(summary["diverged"].attrs.get("definition", ""))
    return table
