"""What a finished pack holds, run by run, as other programs show it: settings, curves over steps, and what became of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import xarray as xr

from train.derived import parts_of
from train.measures import MEASURES, group_of
from train.schema import OPTIONAL, RUN_COORDINATES
from train.store import summarise
from train.study import Study

HISTORY: Final = ("train_loss", "grad_norm", *sorted(OPTIONAL))
VERDICTS: Final = ("non_finite", "no_progress", "diverged")
LONGEST_NAME: Final = 150

Number = float | int | bool
Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Curves:
    """One run: a folder's name that people can read and that no other run has, coordinates, curves and verdicts.

    points: (step, value) by name, all that was recorded, NaN too. summary: `stability`'s definitions that need no other run.
    """

    name: str
    identity: str
    settings: dict[str, str | Number]
    points: dict[str, Points]
    summary: dict[str, Number]

    def by_step(self) -> dict[int, dict[str, float]]:
        """The same points, the values of a step together, steps ascending."""
        rows: dict[int, dict[str, float]] = {}
        for name, points in self.points.items():
            for step, value in points:
                rows.setdefault(step, {})[name] = value
        return dict(sorted(rows.items()))


def curves_of(study: Study, pack: xr.DataTree) -> Iterator[Curves]:
    """Every run of a pack of the study. Whether it diverged is left out where that is a matter of its distance to others."""
    groups = {name: pack[name].to_dataset() for name in ("history", "evaluation", "sharpness") if name in pack}
    groups |= {measure: part for measure in MEASURES for part in parts_of([pack], group_of(measure))}
    history = groups["history"]
    verdicts = summarise(study, history, [pack]) if study.divergence.definition != "gap" else xr.Dataset()
    for i, identity in enumerate(map(str, history["run"].values)):
        one = {name: group.isel(run=i) for name, group in groups.items()}
        settings = {
            str(name): value.item() for name, value in one["history"].coords.items() if not value.dims and name != "run"
        }
        summary: dict[str, Number] = {name: bool(verdicts[name][i]) for name in VERDICTS if name in verdicts}
        if "final_loss" in verdicts:
            summary["final_loss"] = float(verdicts["final_loss"][i])
        yield Curves(_name(settings, identity), identity, settings, _points(one), summary)


def _points(groups: dict[str, xr.Dataset]) -> dict[str, Points]:
    last = int(groups["history"]["last_step"])
    points = {
        name: _curve(groups["history"][name].sel(step=slice(0, last))) for name in HISTORY if name in groups["history"]
    }
    if "evaluation" in groups:
        points["validation_loss"] = _curve(groups["evaluation"]["validation_loss"])
    if "sharpness" in groups:
        for name, values in groups["sharpness"].data_vars.items():
            if values.dims == ("probe_step", "epsilon"):
                for epsilon in values["epsilon"]:
                    points[f"sharpness/{name} at {float(epsilon):g}"] = _curve(values.sel(epsilon=epsilon))
    for measure in (name for name in MEASURES if name in groups):
        main = groups[measure][next(iter(MEASURES[measure].variables))]
        axes = main.dims[1:]
        if not axes:
            points[f"probes/{main.name}"] = _curve(main)
        elif len(axes) == 1:  # a spectrum is no curve
            for tick in main[axes[0]]:
                points[f"probes/{main.name} at {axes[0]} {float(tick):g}"] = _curve(main.sel({axes[0]: tick}))
    return points


def _curve(values: xr.DataArray) -> Points:
    [axis] = values.dims
    return list(zip(map(int, values[axis].values), map(float, values.values), strict=True))


def _name(settings: dict[str, str | Number], identity: str) -> str:
    """As "e4m3_lr=0.004_seed=1_python_gpt2-1x16_3f9c01ab": what people look for first, and what makes it one run's alone."""
    s = settings
    seeds = f"seed={s['seed']}" if s["init_seed"] == s["data_seed"] else f"seeds={s['init_seed']},{s['data_seed']}"
    own = [f"{key}={value}" for key, value in s.items() if key not in RUN_COORDINATES]
    words = [str(s["recipe"]), f"lr={s['learning_rate']:g}", seeds, *own, str(s["dataset"]), str(s["model"])]
    return re.sub(r"[^\w.,=+-]+", "-", "_".join(words)).lstrip(".-")[:LONGEST_NAME] + f"_{identity[:8]}"
