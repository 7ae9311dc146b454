"""What does it buy to share seeds between formats? The spread of a difference of losses, paired by seed and not.

python scripts/shared_seeds.py [STUDY] [PICTURE]: a tenth of the spread is a hundredth of the seeds.
"""

import sys

import matplotlib.pyplot as plt
import xarray as xr

from landscape.looks import COLOURS, MARKERS
from train import open_study

STUDY, PICTURE, BASELINE = "studies/results/recipes-12m", "shared_seeds.png", "native-bf16"


def main(study: str = STUDY, picture: str = PICTURE) -> xr.Dataset:
    """Draw, and give both standard deviations by recipe, nats/token: of pairs, and of runs that share nothing."""
    summary = open_study(study)["summary"].to_dataset()
    loss = summary["final_loss"].where(summary["diverged"] == 0).set_index(run=["recipe", "seed"]).unstack("run")
    loss = loss.dropna("recipe")  # recipes of which every seed trained
    base, others = loss.sel(recipe=BASELINE, drop=True), loss.drop_sel(recipe=BASELINE)
    paired = (others - base).std("seed", ddof=1)
    apart = (others.var("seed", ddof=1) + base.var("seed", ddof=1)) ** 0.5
    found = xr.Dataset({"paired": paired, "apart": apart}).sortby("paired")
    figure, axes = plt.subplots(figsize=(6, 5.5), layout="constrained")
    for i, (name, label) in enumerate({"paired": "the same seed", "apart": "seeds of their own"}.items()):
        axes.plot(found[name], found["recipe"], color=COLOURS[i], marker=MARKERS[i], ls="", label=label)
    axes.set(xscale="log", xlabel=f"standard deviation of final loss - {BASELINE}'s, nats/token")
    axes.grid(axis="y", lw=0.3)
    figure.legend(loc="outside upper center", ncols=2)
    figure.savefig(picture, dpi=150)
    return found


if __name__ == "__main__":
    found = main(*sys.argv[1:])
    times = ((found["apart"] / found["paired"]) ** 2).median()
    print(
        found.to_dataframe().round(4).to_string(), f"\nseeds saved by sharing: {float(times):.0f} times, median", sep=""
    )
