"""Does the loss get sharper where it stops falling? Sharpness at the logits above, loss below, on one axis of steps.

python scripts/sharpness_and_loss.py [STUDY] [PICTURE]: median over 8 seeds, and all of them as a band.
"""

import sys

import matplotlib.pyplot as plt
import xarray as xr

from landscape.looks import COLOURS, DASHES
from train import open_study

STUDY, PICTURE = "studies/results/first-look-gpu", "sharpness_and_loss.png"
RATE, RECIPES = 8e-3, ["native-bf16", "e8m1", "e5m7", "e4m7"]


def main(study: str = STUDY, picture: str = PICTURE) -> xr.Dataset:
    """Draw, and give the medians of both by recipe."""
    tree = open_study(study)
    sharpness = tree["sharpness"]["logit_sharpness"].sel(epsilon=5e-4).rename(probe_step="step")
    loss = tree["history"]["train_loss"].rolling(step=20, min_periods=1).mean()
    medians = {}
    figure, axes = plt.subplots(2, 1, figsize=(6, 5.5), sharex=True, layout="constrained")
    for row, values in zip(axes, (sharpness, loss), strict=True):
        for i, recipe in enumerate(RECIPES):
            runs = values.isel(run=((values["recipe"] == recipe) & (values["learning_rate"] == RATE)).values)
            median = medians[values.name, recipe] = runs.median("run")
            row.plot(median["step"], median, color=COLOURS[i], ls=DASHES[i], label=recipe if row is axes[0] else None)
            row.fill_between(runs["step"], runs.min("run"), runs.max("run"), color=COLOURS[i], alpha=0.2, lw=0)
    axes[0].set(yscale="log", ylabel="sharpness at the logits,\n%, at ε = 5e-4")
    axes[1].set(
        ylabel="training loss, nats/token,\nmean of 20 steps", xlabel=f"step, at learning rate {RATE:g}", ylim=(None, 6)
    )
    figure.legend(loc="outside upper center", ncols=4)
    figure.savefig(picture, dpi=150)
    names = {name for name, _ in medians}
    return xr.Dataset({name: xr.concat([medians[name, r].rename(step=f"{name}_step") for r in RECIPES], "recipe")
                       for name in names}, {"recipe": RECIPES})  # fmt: skip


if __name__ == "__main__":
    print(main(*sys.argv[1:])["logit_sharpness"].to_pandas().round(2).to_string())
