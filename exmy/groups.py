"""Runs that may be pooled: whatever a study varies beside recipe, learning rate and seed parts it into groups.

A table or a figure of recipe × learning rate says something only about one text, one model and one setting of every further
axis: losses on different texts are no samples of one thing. So tables, figures and the report all show a group at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xarray as xr

# What a group pools, and what follows from it.
POOLED = frozenset({"run", "recipe", "format", "learning_rate", "init_seed", "data_seed", "seed", "pack_size"})


@dataclass(frozen=True)
class Group:
    """Where the runs of a group agree, by the names of the axes that vary in the study, and which runs they are, [run]."""

    where: dict[str, str]
    runs: npt.NDArray[np.bool_]

    @property
    def label(self) -> str:
        """The group in words, such as "dataset python, layers 2"; empty where the study has one group."""
        return ", ".join(f"{axis} {value}" for axis, value in self.where.items())


def groups(summary: xr.Dataset) -> list[Group]:
    """The groups of a study in the order of their first runs; all runs in one where nothing else varies."""
    axes = [str(name) for name in summary.coords if name not in POOLED and summary[name].dims == ("run",)]
    varied = [axis for axis in axes if len(set(summary[axis].values.tolist())) > 1]
    keys = list(zip(*(summary[axis].values.tolist() for axis in varied), strict=True)) or [()] * summary.sizes["run"]
    return [
        Group(dict(zip(varied, map(_word, key), strict=True)), np.array([other == key for other in keys], np.bool_))
        for key in dict.fromkeys(keys)
    ]


def lost_baseline(runs: xr.Dataset, baseline: str, where: str = "") -> str:
    """A line where the baseline diverged in all of these runs: then the study is to blame, and no format. Else empty."""
    lost = runs["diverged"].values[runs["recipe"].values == baseline]
    if not lost.size or not lost.all():
        return ""
    runs_there = f"{lost.size} runs{f' ({where})' if where else ''}"
    return (
        f"{baseline}, the baseline, diverged in all of its {runs_there}, so nothing is learnt of the other recipes: take more "
        "steps, more text or other learning rates."
    )


def _word(value: object) -> str:
    """As a study file would have it: 0, not 0.0."""
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)
