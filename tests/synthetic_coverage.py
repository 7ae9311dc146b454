"""How often each interval of a verdict covers the truth of synthetic studies: counted for a test, and for the table in the docs.

python -m tests.synthetic_coverage --studies 1000 --out benchmarks/results/cpu-coverage.json
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import scipy
import xarray as xr

from tests.synthetic_studies import Truth, make_runs
from train.provenance import device_name
from train.seed_cube import seed_grid
from train.verdicts import VerdictSettings, verdict

SETTINGS = VerdictSettings()
BASE = Truth((0.0, 0.0, 0.05, 0.3, 0.8), (1.60, 1.50, 1.52, 1.70, 1.90))
WORSE = Truth((0.0, 0.05, 0.2, 0.6, 0.95), (1.62, 1.55, 1.53, 1.80, 2.00))


def grids(studies: int, seeds: int, **truths: Truth) -> Iterator[xr.Dataset]:
    """Studies of recipes with those truths, the same for the same numbers."""
    for study in range(studies):
        yield seed_grid(make_runs(truths, seeds, np.random.default_rng([seeds, study])))


def octaves(truth: Truth) -> float:
    """Of the window at the default settings; the rates are octaves apart, and no window of these has a gap."""
    return float(truth.inside(SETTINGS.allowed, SETTINGS.loss_margin).sum() - 1)


def cost(truth: Truth) -> float:
    """In runs, by the formula of the docs: five rates, a trial a tenth of a run."""
    return 1 / (1 - truth.diverges[truth.best]) + 0.1 * 5 / (octaves(truth) + 1)


def covered(studies: int, seeds: int) -> dict[str, int]:
    """Of so many studies, in how many each interval has the truth in it: of a worse recipe, and of the baseline's twin."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for grid in grids(studies, seeds, base=BASE, worse=WORSE, same=BASE):
        found = verdict(grid, "base", ["worse", "same"])
        for name, truth in (("worse", WORSE), ("same", BASE)):
            row = {str(key): found[key].sel(recipe=name).item() for key in found.data_vars}
            for key, value in _truths(truth, row).items():
                hits[f"{key}, {name}"].append(row[f"{key}_low"] - 1e-9 <= value <= row[f"{key}_high"] + 1e-9)
            low = 0.0 if math.isnan(row["window_at_least"]) else row["window_at_least"]
            hits[f"window, {name}"].append(low <= octaves(truth) <= row["window_at_most"])
    return {name: sum(of) for name, of in hits.items()}


def _truths(truth: Truth, row: dict[str, Any]) -> dict[str, float]:
    at = round(math.log2(row["learning_rate"])) + 10
    return {
        "rate": truth.diverges[at], "rate_difference": truth.diverges[at] - BASE.diverges[at],
        "sensitivity": truth.sensitivity, "sensitivity_difference": truth.sensitivity - BASE.sensitivity,
        "optimum_shift": truth.best - BASE.best, "loss_penalty": truth.loss[truth.best] - BASE.loss[BASE.best],
        "window_difference": octaves(truth) - octaves(BASE), "break_even": cost(truth) / cost(BASE), "sd": math.hypot(0.03, 0.02),
    }  # fmt: skip


@click.command()
@click.option("--studies", default=1000, show_default=True)
@click.option("--out", required=True, type=click.Path(path_type=Path))
def main(studies: int, out: Path) -> None:
    """Count, and write what was counted."""
    import torch

    began = time.perf_counter()
    counts = {str(seeds): covered(studies, seeds) for seeds in (8, 32)}
    content = {
        "command": f"python -m tests.synthetic_coverage --studies {studies}", "device": device_name(torch.device("cpu")),
        "scipy": scipy.__version__, "numpy": np.__version__, "seconds": round(time.perf_counter() - began, 1),
        "studies": studies, "nominal": 0.95, "covered": counts,
    }  # fmt: skip
    out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
