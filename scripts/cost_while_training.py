"""Does what a recipe costs grow as training goes on? Validation loss over native BF16's, paired by seed, at each evaluation.

python scripts/cost_while_training.py [STUDY] [PICTURE]: GPTs of 12 M parameters, 8 seeds a recipe.
"""

import sys

import matplotlib.pyplot as plt
import xarray as xr
from scipy import stats

from landscape.looks import COLOURS, DASHES, MARKERS
from train import open_study

STUDY, PICTURE = "studies/results/recipes-12m", "cost_while_training.png"
BASELINE, RECIPES = "native-bf16", ["masked-e8m1", "masked-e8m3", "mxfp4-all", "nvfp4-all", "fp8-hybrid"]


def main(study: str = STUDY, picture: str = PICTURE) -> xr.Dataset:
    """Draw, and give the mean difference with Student's 95 % interval, (recipe, eval_step), nats/token."""
    loss = open_study(study)["evaluation"]["validation_loss"]
    grid = loss.set_index(run=["recipe", "seed"]).sel(run=loss["recipe"].isin([BASELINE, *RECIPES])).unstack("run")
    difference = grid.sel(recipe=RECIPES) - grid.sel(recipe=BASELINE, drop=True)
    half = stats.t.ppf(0.975, grid.sizes["seed"] - 1) * difference.std("seed", ddof=1) / grid.sizes["seed"] ** 0.5
    found = xr.Dataset({"mean": difference.mean("seed"), "half": half})
    figure, axes = plt.subplots(figsize=(6, 3.8), layout="constrained")
    for i, recipe in enumerate(RECIPES):
        at = found.sel(recipe=recipe).isel(eval_step=slice(1, None))  # before the first step all are alike
        axes.errorbar(
            at["eval_step"] + 8 * (i - 2), at["mean"], at["half"],
            color=COLOURS[i], marker=MARKERS[i], ls=DASHES[i], capsize=3, label=recipe,
        )  # fmt: skip
    axes.axhline(0, color="black", lw=0.8)
    axes.set(xlabel="step", ylabel=f"validation loss over {BASELINE}'s,\nnats/token, with 95 % interval")
    figure.legend(loc="outside right upper")
    figure.savefig(picture, dpi=150)
    return found


if __name__ == "__main__":
    print(main(*sys.argv[1:])["mean"].to_pandas().round(4).to_string())
