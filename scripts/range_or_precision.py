"""Does a format fail for its range or for its precision? Shares of diverged runs, by bits taken from exponent and mantissa.

python scripts/range_or_precision.py [STUDY] [PICTURE]: 392 GPTs of 3.3 M parameters, 8 seeds a cell.
"""

import sys

import matplotlib.pyplot as plt
import xarray as xr

from landscape.looks import COLOURS, MARKERS
from train import clopper_pearson_interval, open_study

STUDY, PICTURE = "studies/results/first-look-gpu", "range_or_precision.png"
SERIES = {
    "mantissa (e8m7, e8m3, e8m1)": ["e8m7", "e8m3", "e8m1"],
    "exponent (e8m7, e5m7, e4m7)": ["e8m7", "e5m7", "e4m7"],
}


def main(study: str = STUDY, picture: str = PICTURE) -> xr.Dataset:
    """Draw, and give diverged k of n by recipe with Clopper and Pearson's interval, over all learning rates."""
    diverged = open_study(study)["summary"]["diverged"]
    found = xr.Dataset({"k": diverged.groupby("recipe").sum(), "n": diverged.groupby("recipe").count()})
    low, high = clopper_pearson_interval(found["k"].values, found["n"].values)
    found = found.assign(low=("recipe", low), high=("recipe", high), share=found["k"] / found["n"])
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for i, (name, recipes) in enumerate(SERIES.items()):
        at = found.sel(recipe=recipes)
        off = [int(recipe[1]) + int(recipe[3]) for recipe in recipes]
        bits = [15 - both + 0.08 * (i - 0.5) for both in off]
        error = 100 * abs(xr.concat([at["low"], at["high"]], "side") - at["share"])
        axes.errorbar(bits, 100 * at["share"], error, color=COLOURS[i], marker=MARKERS[i], capsize=3, label=name)
    axes.set(xlabel="bits fewer than BF16's 8 + 7", ylabel="diverged, % of runs, with 95 % interval", ylim=(-2, 102))
    figure.legend(title="bits taken from the", loc="outside upper center", ncols=2)
    figure.savefig(picture, dpi=150)
    return found


if __name__ == "__main__":
    print(main(*sys.argv[1:])[["k", "n"]].to_dataframe().to_string())
