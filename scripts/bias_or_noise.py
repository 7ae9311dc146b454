"""Does a rounding harm by its bias or by its noise? What a bit less costs, by rounding: twice as much, or four times.

python scripts/bias_or_noise.py [STUDY] [PICTURE]: GPTs of 0.9 M parameters, 32 seeds a cell. A bias of every operand doubles with
each bit that goes, and its cost with it; noise without a bias costs by its mean square, which grows fourfold.
"""

import sys

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr

from landscape.looks import COLOURS, MARKERS
from train import open_study

STUDY, PICTURE, BASELINE, RATE = "studies/results/rounding", "bias_or_noise.png", "native-bf16", 2e-3
ROUNDINGS = {"toward zero": "masked-e8m", "stochastic": "stochastic-e8m", "to nearest even": "e8m"}
BITS = [5, 4, 3, 2, 1]


def main(study: str = STUDY, picture: str = PICTURE) -> xr.Dataset:
    """Draw, and give the mean cost with its standard error, (rounding, bits), nats/token, paired by seed at one rate."""
    loss = open_study(study)["summary"].to_dataset()["final_loss"]
    loss = loss[(loss["learning_rate"] == RATE).values].set_index(run=["recipe", "seed"]).unstack("run")
    cost = loss - loss.sel(recipe=BASELINE, drop=True)
    cost = xr.concat(
        [cost.sel(recipe=[f"{name}{m}" for m in BITS]).assign_coords(recipe=BITS) for name in ROUNDINGS.values()],
        xr.DataArray(list(ROUNDINGS), dims="rounding", name="rounding"),
    ).rename(recipe="bits")
    found = xr.Dataset({"mean": cost.mean("seed"), "error": cost.std("seed", ddof=1) / cost.sizes["seed"] ** 0.5})
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for i, rounding in enumerate(ROUNDINGS):
        at = found.sel(rounding=rounding)
        at = at.where(at["mean"] > 2 * at["error"])  # what is told from zero
        axes.errorbar(
            at["bits"], at["mean"], 2 * at["error"], color=COLOURS[i], marker=MARKERS[i], capsize=3, label=rounding
        )
    highest = float(found["mean"].max())
    for factor, dashes in ((2, ":"), (4, "--")):
        axes.plot(
            BITS, highest * factor ** (1.0 - np.array(BITS)), color="grey", ls=dashes, label=f"{factor} times a bit"
        )
    axes.set(yscale="log", xlim=(5.3, 0.7), ylim=(highest / 100, 2 * highest), xticks=BITS)
    axes.set(xlabel="mantissa bits", ylabel=f"training loss over {BASELINE}'s,\nnats/token, ± 2 standard errors")
    figure.legend(loc="outside right upper")
    figure.savefig(picture, dpi=150)
    return found


if __name__ == "__main__":
    print(main(*sys.argv[1:])["mean"].to_pandas().round(4).to_string())
