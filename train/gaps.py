"""Which runs of a study ended above the baseline's best, from the index: `stability.gap`, without opening a pack."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import xarray as xr

from train.index import Row, losses_of, runs_of
from train.stability import gap, gap_reference
from train.study import Study


def gaps(study: Study, packs: Collection[Row]) -> dict[str, bool]:
    """Of each finished run of the study, by its identity; of a run that two packs have, the first's."""
    final: dict[str, float] = {}
    for row in packs:
        for run, ended in zip(runs_of(row), losses_of(row), strict=True):
            final.setdefault(run, ended)
    runs = [run for run in study.runs() if run.identity in final]
    if not runs:
        return {}
    within = ("dataset", "model", *(study.axes.model_extra or {}))
    columns = {
        "recipe": [run.recipe.name for run in runs], "learning_rate": [run.learning_rate for run in runs],
        "dataset": [run.dataset for run in runs], "model": [run.model.label for run in runs],
    }  # fmt: skip
    columns |= {axis: [dict(run.extra_axes)[axis] for run in runs] for axis, _ in runs[0].extra_axes}
    loss = xr.DataArray(
        [final[run.identity] for run in runs], dims="run",
        coords={name: ("run", np.array(values)) for name, values in columns.items()},
    )  # fmt: skip
    found = gap(loss, gap_reference(loss, study.reference, within), study.divergence.gap_margin)
    return dict(zip((run.identity for run in runs), found.values.tolist(), strict=True))
