"""What `exmy landscape` adds to a study directory, and what `open_study` makes of it.

    landscape/<quantisers>/<measure>/<step>-<hash>.nc        a measure of some runs after so many steps, complete or absent
    landscape/<quantisers>/<measure>/<step>-<hash>.sha256    its checksum

A file is a *point*: runs that were measured together. It says of each run which weights those were, by the SHA-256 of the file
that held them. In a study's tree each measure is `/landscape/<quantisers>/<measure>`, as `/probes/<measure>` is of what was
measured while training: NaN where nothing was, and `taken` telling where something was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import xarray as xr

from train.directory import LANDSCAPE, PACK, Point, points_in
from train.durable import atomically, seal
from train.measures import group_of
from train.pack_file import DAMAGE, PackFile
from train.schema import COORDINATES, MEASURED, OF_MEASURES, TAKEN
from train.study import StudyError

ENGINE: Final = "h5netcdf"
GROUP = "landscape"  # of a point's file, in which all of it is


def write_point(directory: Path, data: xr.Dataset, measure: str, quantisers: str, step: int) -> Path:
    """A point as `point_dataset` makes it, whole or not at all; OSError where it can't be written."""
    folder = directory / LANDSCAPE / quantisers / measure
    folder.mkdir(parents=True, exist_ok=True)
    of = [*data["run"].values.tolist(), *map(str, data["epsilon"].values.tolist() if "epsilon" in data.dims else ())]
    name = hashlib.sha256(" ".join(of).encode()).hexdigest()[:16]
    path = folder / f"{step}-{name}{PACK}"
    content = bytes(data.to_netcdf(engine=ENGINE, group=GROUP))
    seal(path, content)
    with atomically(path) as aside:
        aside.write_bytes(content)
    return path


def by_age(points: Iterable[Point]) -> list[Point]:
    """The oldest first: of weights that changed, or were measured again, what was written last counts."""
    return sorted(points, key=lambda point: (point.path.stat().st_mtime_ns, point.path))


def read_point(point: Point) -> xr.Dataset:
    """A point in memory, without attributes; StudyError where it is damaged. By `PackFile`, ten times as fast as by xarray."""
    try:
        file = PackFile(point.path)
        values = {name: file.values(GROUP, name) for name in file.names(GROUP)}
    except DAMAGE:
        raise StudyError(
            f"{point.path}: damaged; remove it, and `exmy landscape {point.path.parents[3]}` measures it again"
        ) from None
    rows = OF_MEASURES[group_of(point.measure)]
    axes = {axis for row in rows.values() for axis in row.dims}
    dims = {name: rows[name].dims if name in rows else (name,) if name in axes else ("run",) for name in values}
    return xr.Dataset(
        {name: (dims[name], of) for name, of in values.items() if name in rows},
        {name: (dims[name], of) for name, of in values.items() if name not in rows},
    )


def point_dataset(
    values: Mapping[str, Any], measure: str, quantisers: str, step: int, ticks: Mapping[str, Sequence[Any]],
    coordinates: Mapping[str, Any], weights: Sequence[str], attrs: Mapping[str, Any],
) -> xr.Dataset:  # fmt: skip
    """Values [R, ...] of a measure with their names, along (run, probe_step, ...).

    coordinates: of the runs. weights: the SHA-256 of each run's, by which a point is known to be up to date.
    """
    schema = OF_MEASURES[group_of(measure)]
    variables: dict[str, Any] = {
        name: (schema[name].dims, np.asarray(of, np.float32)[:, None], schema[name].attrs())
        for name, of in values.items()
    }
    variables["weights"] = ("run", np.array(weights), {"long_name": "SHA-256 of the file that held the weights"})
    along = {axis: (axis, np.array(of), COORDINATES[axis].attrs()) for axis, of in ticks.items()}
    along["probe_step"] = ("probe_step", np.array([step]), COORDINATES["probe_step"].attrs())
    return xr.Dataset(variables, {**coordinates, **along}, {**attrs, "quantisers": quantisers})


def landscape_groups(directory: Path, planned: Sequence[str], history: xr.Dataset) -> dict[str, xr.Dataset]:
    """/landscape/<quantisers>/<measure> of all points: over the runs of /history, and those measured before they ended."""
    by_group: dict[tuple[str, str], list[xr.Dataset]] = {}
    for point in by_age(points_in(directory)):
        by_group.setdefault((point.quantisers, point.measure), []).append(read_point(point))
    finished = set(history["run"].values.tolist())
    groups = {}
    for (quantisers, measure), points in by_group.items():
        measured = {run for data in points for run in data["run"].values.tolist()}
        runs = [run for run in planned if run in finished or run in measured]
        if measured & set(runs):
            joined = _joined(measure, points, runs)
            labelled = joined.assign_coords(_labels(runs, [history, *points]))
            groups[f"{LANDSCAPE}/{quantisers}/{measure}"] = labelled.assign_attrs(quantisers=quantisers)
    return groups


def _joined(measure: str, points: Sequence[xr.Dataset], runs: Sequence[str]) -> xr.Dataset:
    """One dataset of all points; of what was measured twice, the last."""
    schema = {name: row for name, row in OF_MEASURES[group_of(measure)].items() if name != "measured"} | {
        "taken": TAKEN
    }
    axes = dict.fromkeys(axis for row in schema.values() for axis in row.dims if axis != "run")
    along: dict[str, Any] = {axis: np.unique(np.concatenate([data[axis].values for data in points])) for axis in axes}
    places = {
        axis: {tick: i for i, tick in enumerate(of.tolist())} for axis, of in (along | {"run": np.array(runs)}).items()
    }
    arrays = {name: np.full([len(places[d]) for d in row.dims], np.nan, np.float32) for name, row in schema.items()}
    for data in points:
        known = data.isel(run=np.isin(data["run"].values.astype(str), runs))
        known["taken"] = (TAKEN.dims, np.ones([known.sizes[d] for d in TAKEN.dims], np.float32))
        at = {axis: [places[axis][tick] for tick in known[axis].values.tolist()] for axis in places}
        for name, row in schema.items():
            arrays[name][np.ix_(*(at[d] for d in row.dims))] = known[name].transpose(*row.dims).values
    taken = arrays.pop("taken") == 1
    variables: dict[str, Any] = {
        name: (schema[name].dims, values, schema[name].attrs()) for name, values in arrays.items()
    }
    variables["taken"] = (TAKEN.dims, taken, TAKEN.attrs())
    variables["measured"] = ("run", taken.any(1), MEASURED.attrs())
    return xr.Dataset(variables, {axis: (axis, of, COORDINATES[axis].attrs()) for axis, of in along.items()})


def _labels(runs: Sequence[str], sources: Sequence[xr.Dataset]) -> dict[str, Any]:
    """The runs' coordinates, each from the first source that has the run."""
    names = {str(name): of.attrs for name, of in sources[0].coords.items() if of.dims == ("run",)}
    rows: dict[str, dict[str, Any]] = {}
    for source in sources:
        columns = {name: source[name].values.tolist() for name in names}
        for i, run in enumerate(columns["run"]):
            rows.setdefault(run, {name: column[i] for name, column in columns.items()})
    return {name: ("run", np.array([rows[run][name] for run in runs]), attrs) for name, attrs in names.items()}
