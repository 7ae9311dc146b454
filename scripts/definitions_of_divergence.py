"""Do definitions of "diverged" agree? Runs that each of four counts, and of the overlap of any two the share.

python scripts/definitions_of_divergence.py [STUDY] [PICTURE]: every study stores all of them.
"""

import sys

import matplotlib.pyplot as plt
import xarray as xr

from train import open_study

STUDY, PICTURE = "studies/results/first-look-gpu", "definitions_of_divergence.png"
DEFINITIONS = ["non_finite", "no_progress", "spike", "gap"]


def main(study: str = STUDY, picture: str = PICTURE) -> xr.DataArray:
    """Draw, and give of each definition's runs (row) the share that another (column) counts too; NaN of none."""
    summary = open_study(study)["summary"].to_dataset()
    counts = summary[DEFINITIONS].to_dataarray("definition").astype(bool)  # (definition, run)
    also = counts.rename(definition="other")
    share = (counts & also).sum("run") / counts.sum("run").where(counts.any("run"))
    figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    image = axes.imshow(100 * share, cmap="cividis", vmin=0, vmax=100)
    for i, j in ((i, j) for i in range(4) for j in range(4)):
        value = float(share[i, j])
        text = "none" if value != value else f"{100 * value:.0f}"
        axes.text(j, i, text, ha="center", va="center", color="white" if value < 0.6 else "black")
    names = [name.replace("_", "\n") for name in DEFINITIONS]
    rows = [f"{name}\n{int(n)} of {counts.sizes['run']}" for name, n in zip(names, counts.sum("run"), strict=True)]
    axes.set(xticks=range(4), xticklabels=names, yticks=range(4), yticklabels=rows)
    axes.set(xlabel="are counted by this one too", ylabel="of the runs that this one counts")
    figure.colorbar(image, label="% of the row's runs")
    figure.savefig(picture, dpi=150)
    return share


if __name__ == "__main__":
    print(main(*sys.argv[1:]).to_pandas().round(2).to_string())
