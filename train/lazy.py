"""A study of any number of packs as one DataTree whose histories stay on the disk until they are asked for, by way of dask.

One pass reads every pack, holds it against its checksum, and keeps what is small: the runs' coordinates, the packs' attributes
and what each run's history says of it (`stability.outcomes`), some hundred bytes a run. Histories and signals become dask arrays,
chunked along `run`: a chunk reads the packs that hold its runs, held against their checksums again, and no more than a few chunks
are in memory at a time. Values, labels and attributes are those of `open_study` without chunks.

How variables are joined (ticks, order, attributes, what is filled with NaN) is xarray's to say: packs that differ in their
variables or ticks are of different *kinds*, and a run of each kind is joined as `open_study` joins packs; the result is the
pattern that all runs are laid out by.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from train.derived import measured, parts_of
from train.pack_file import DAMAGE, PackFile, damaged
from train.stability import DivergenceSettings, outcomes
from train.waiting import Waiting

TICKS = (
    "step", "eval_step", "probe_step", "epsilon", "signal_step", "block", "tensor", "role", "rho", "rank", "sample",
    "lanczos_step",
)  # fmt: skip
CHUNK_BYTES = 2**26  # of the largest variable
KEPT = 16  # files that were read last, open; HDF5 takes half a megabyte for one
TOGETHER = 2048  # runs whose histories are looked at together

Ints = NDArray[np.int64]


@dataclass
class Survey:
    """What one pass over the packs keeps. `pack` and `row` say where a run is: in which pack, and which of its runs."""

    paths: list[Path] = field(default_factory=list)
    kinds: list[Path] = field(default_factory=list)  # the first pack of each
    kind: list[int] = field(default_factory=list)
    groups: list[frozenset[str]] = field(default_factory=list)
    attrs: list[dict[str, Any]] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    pack: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    row: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    columns: dict[str, NDArray[Any]] = field(default_factory=dict)  # the runs' coordinates
    plain: dict[tuple[str, str], list[Any]] = field(default_factory=dict)  # of a group, what is over the runs alone
    outcomes: xr.Dataset = field(default_factory=xr.Dataset)


class Packs:
    """Packs by their paths, the last few kept; a pack is held against its checksum whenever its file is read."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Path, PackFile] = OrderedDict()
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, _: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def values(self, path: Path, group: str, name: str) -> NDArray[Any]:
        """A variable of a pack; StudyError where it is damaged."""
        with self._lock:  # HDF5 does one thing at a time anyway
            pack = self._kept.pop(path, None) or PackFile(path)
            self._kept[path] = pack
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            try:
                return pack.values(group, name)
            except DAMAGE as error:
                raise damaged(path, error) from None


def survey(paths: Sequence[Path], settings: DivergenceSettings) -> Survey:
    """One pass over the packs."""
    found = Survey()
    known: dict[Any, int] = {}
    same: dict[Any, Any] = {}  # what a million runs have in common is kept once
    columns: dict[str, list[Any]] = {}
    look = _Look(settings)
    sizes: list[int] = []
    counted = 0
    with Waiting("opening packs", len(paths)) as bar:
        for path in paths:
            pack = PackFile(path)
            key, labels, plain = _kind(pack)
            if key not in known:
                known[key] = len(found.kinds)
                found.kinds.append(path)
            found.kind.append(known[key])
            found.groups.append(same.setdefault(frozenset(pack.groups), frozenset(pack.groups)))
            found.attrs.append({k: same.setdefault(v, v) if isinstance(v, str) else v for k, v in pack.attrs.items()})
            for name in labels:
                values = pack.values("history", name).tolist()
                columns.setdefault(name, []).extend(same.setdefault(v, v) if isinstance(v, str) else v for v in values)
            for group, name in plain:
                column = found.plain.setdefault((group, name), [])
                column += [None] * (counted - len(column)) + pack.values(group, name).tolist()
            sizes.append(len(pack.runs))
            counted += sizes[-1]
            found.paths.append(path)
            look.add(path, pack.history())
            bar.advance(1)
    found.runs = columns.pop("run", [])
    counts = np.array(sizes, np.int64)
    found.pack = np.repeat(np.arange(counts.size), counts)
    found.row = np.arange(counted) - (np.cumsum(counts) - counts)[found.pack]
    found.columns = {name: np.array(values) for name, values in columns.items()}
    found.outcomes = look.result() if sizes else xr.Dataset()
    return found


def _kind(pack: PackFile) -> tuple[Any, list[str], list[tuple[str, str]]]:
    """All in which packs of one kind agree; the names of the runs' coordinates; what else there is over the runs alone."""
    n = len(pack.runs)
    key: list[Any] = []
    labels: list[str] = []
    plain: list[tuple[str, str]] = []
    for group in ("history", *(name for name in pack.groups if name != "history")):
        for name in pack.names(group):
            if name in TICKS:
                key.append((group, name, pack.values(group, name).tobytes()))
            elif name in labels:  # every group of a pack has the same
                key.append((group, name))
            else:
                shape = pack.shape(group, name)
                key.append((group, name, shape[1:]))
                if shape != (n,):
                    continue
                if name in ("last_step", "measured"):
                    plain.append((group, name))
                else:
                    labels.append(name)
    return tuple(key), labels, plain


class _Look:
    """What histories say of their runs, some thousand runs at a time; those of other steps laid out again, once all are known."""

    def __init__(self, settings: DivergenceSettings) -> None:
        self._settings = settings
        self._waiting: list[xr.Dataset] = []
        self._done: list[xr.Dataset] = []
        self._steps: list[tuple[NDArray[Any], list[Path]]] = []
        self._paths: list[Path] = []

    def add(self, path: Path, history: xr.Dataset) -> None:
        """A pack's; in the order in which runs are counted."""
        if self._waiting:
            first = self._waiting[0]
            alike = set(first) == set(history) and np.array_equal(first["step"].values, history["step"].values)
            if not alike or sum(part.sizes["run"] for part in self._waiting) >= TOGETHER:
                self._flush()
        self._waiting.append(history)
        self._paths.append(path)

    def _flush(self) -> None:
        history = xr.concat(self._waiting, "run") if len(self._waiting) > 1 else self._waiting[0]
        self._steps.append((history["step"].values, self._paths))
        self._done.append(self._looked(history))
        self._waiting, self._paths = [], []

    def _looked(self, history: xr.Dataset) -> xr.Dataset:
        return (
            outcomes(history, self._settings).assign(last_step=history["last_step"]).drop_vars("step", errors="ignore")
        )

    def result(self) -> xr.Dataset:
        """Over all runs."""
        self._flush()
        steps = np.unique(np.concatenate([ticks for ticks, _ in self._steps]))
        for i, (ticks, paths) in enumerate(self._steps):
            if not np.array_equal(ticks, steps):  # a short run's means are summed in another order beside longer ones
                parts = []
                for path in paths:
                    parts.append(PackFile(path).history())
                self._done[i] = self._looked(xr.concat(parts, "run").reindex(step=steps))
        return xr.concat(self._done, "run")


@dataclass(frozen=True)
class OnDisk:
    """A variable of many runs, [run, ...], that is read when it is sliced; what dask makes its chunks of.

    rows: of the survey's runs, one a run here, -1 for one that has no such variable. places: for each kind of pack where its
    values go on the axes after the first, None where they fill them.
    """

    packs: Packs
    paths: Sequence[Path]
    kind: Sequence[int]
    pack: Ints
    row: Ints
    rows: Ints
    group: str
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    places: Sequence[tuple[Ints, ...] | None]
    absent: frozenset[int] = frozenset()  # kinds that lack it

    @property
    def ndim(self) -> int:
        """Axes."""
        return len(self.shape)

    def __getitem__(self, key: Any) -> NDArray[Any]:
        key = key if isinstance(key, tuple) else (key,)
        rows = self.rows[key[0]]
        values = self._read(np.atleast_1d(rows))
        return values[(slice(None) if np.ndim(rows) else 0, *key[1:])]

    def _read(self, rows: Ints) -> NDArray[Any]:
        out: NDArray[Any] = np.full((len(rows), *self.shape[1:]), np.nan, self.dtype)
        of = np.where(rows >= 0, self.pack[rows], -1)
        for pack in np.unique(of[of >= 0]).tolist():
            kind = self.kind[pack]
            if kind in self.absent:
                continue
            here = np.flatnonzero(of == pack)
            values = self.packs.values(self.paths[pack], self.group, self.name)[self.row[rows[here]]]
            places = self.places[kind]
            out[here if places is None else np.ix_(here, *places)] = values
        return out


@dataclass(frozen=True)
class Layout:
    """The packs of a survey, and the pattern by which each group's runs are laid out."""

    survey: Survey
    patterns: dict[str, xr.Dataset]
    kinds: dict[str, dict[int, xr.Dataset]]  # of each group, what a pack of the kind has
    of_some: Sequence[str] = ()  # groups that get all runs that /history has, those that they lack as NaN
    packs: Packs = field(default_factory=Packs)

    def groups(self, planned: Sequence[str], chunk: int | None) -> dict[str, xr.Dataset]:
        """All groups, `chunk` runs at a time or as many as `chunk_of` says for all."""
        rows = {group: self.rows(group, planned) for group in self.patterns}
        rows = {group: where for group, where in rows.items() if where.size or group not in self.of_some}
        chunk = chunk or min(map(chunk_of, self.patterns.values()))
        known: list[tuple[Ints, NDArray[np.bool_], dict[str, Any]]] = []  # what groups have in common is there once
        groups = {
            group: self._dataset(group, where, chunk, self._labels(group, where, known))
            for group, where in rows.items()
        }
        history = groups["history"]
        labels = {name: of for name, of in history.coords.items() if of.dims == ("run",)}
        for group in filter(groups.__contains__, self.of_some):
            some = groups[group]
            at = {self.survey.runs[row]: row for row in rows[group].tolist()}
            where = np.array([at.get(run, -1) for run in history["run"].values.tolist()], np.int64)
            ticks = {name: of for name, of in some.coords.items() if of.dims != ("run",)}
            whole = self._dataset(group, where, chunk, {**labels, **ticks})
            groups[group] = whole.assign(measured=measured(some, history))
        return groups

    def rows(self, group: str, planned: Sequence[str]) -> Ints:
        """Where the planned runs that the group has are, in the plan's order; of a run in two packs, the first."""
        first: dict[str, int] = {}
        for row in np.flatnonzero(self._has(group)).tolist():
            first.setdefault(self.survey.runs[row], row)
        return np.array([first[run] for run in planned if run in first], np.int64)

    def numbers(self, runs: Iterable[str], attribute: str, absent: float) -> NDArray[np.float64]:
        """An attribute of the packs that have these runs; of a run in two packs, the last's, as without chunks."""
        last = {run: row for row, run in enumerate(self.survey.runs)}
        per_pack = np.array([float(attrs.get(attribute, absent)) for attrs in self.survey.attrs])
        return per_pack[self.survey.pack[[last[run] for run in runs]]]

    def _has(self, group: str) -> NDArray[np.bool_]:
        """Of the survey's runs, those whose pack has the group."""
        has: NDArray[np.bool_] = np.array([group in groups for groups in self.survey.groups], bool)[self.survey.pack]
        return has

    def _labels(
        self, group: str, rows: Ints, known: list[tuple[Ints, NDArray[np.bool_], dict[str, Any]]]
    ) -> dict[Any, Any]:
        """The coordinates of these runs, and the group's ticks. known: columns of other groups, for those of the same runs."""
        has = self._has(group)
        columns = next((c for r, h, c in known if np.array_equal(r, rows) and np.array_equal(h, has)), None)
        if columns is None:
            columns = self._columns(rows, has)
            known.append((rows, has, columns))
        return {
            name: ("run", columns[str(name)], of.attrs) if of.dims == ("run",) else of.variable
            for name, of in self.patterns[group].coords.items()
        }

    def _columns(self, rows: Ints, has: NDArray[np.bool_]) -> dict[str, Any]:
        """What the packs' coordinates say of these runs; strings as wide as in any of the packs of which these are."""
        columns = {}
        for name, values in {"run": np.array(self.survey.runs), **self.survey.columns}.items():
            taken = values[rows]
            if values.dtype.kind == "U":
                taken = taken.astype(f"U{max(1, int(np.strings.str_len(values[has]).max(initial=1)))}", copy=False)
            columns[name] = taken
        return columns

    def _dataset(self, group: str, rows: Ints, chunk: int, labels: dict[Any, Any]) -> xr.Dataset:
        """A group of these runs, in chunks of so many; with -1, a run that it lacks, what is over the runs alone is left out."""
        import dask.array as da

        pattern, missing = self.patterns[group], bool((rows < 0).any())
        variables: dict[str, Any] = {}
        for name, of in pattern.data_vars.items():
            if of.dims == ("run",):
                if not missing:
                    column = self.survey.plain[(group, str(name))]
                    variables[str(name)] = ("run", np.array([column[row] for row in rows.tolist()], of.dtype), of.attrs)
                continue
            array = self._array(group, str(name), of, rows)
            chunks = (max(1, min(chunk, len(rows))), *of.shape[1:])
            meta = np.empty((0,) * of.ndim, of.dtype)
            data = da.from_array(array, chunks, name=False, asarray=False, fancy=False, meta=meta)
            variables[str(name)] = (of.dims, data, of.attrs)
        return xr.Dataset(variables, labels, pattern.attrs)

    def _array(self, group: str, name: str, of: xr.DataArray, rows: Ints) -> OnDisk:
        found = self.survey
        places: list[tuple[Ints, ...] | None] = []
        absent = set()
        for kind in range(len(found.kinds)):
            own = self.kinds[group].get(kind)
            if own is None or name not in own:
                absent.add(kind)
                places.append(None)
                continue
            at = tuple(of.get_index(dim).get_indexer(own.get_index(dim)) for dim in of.dims[1:])
            full = all(np.array_equal(i, np.arange(size)) for i, size in zip(at, of.shape[1:], strict=True))
            places.append(None if full else at)
        return OnDisk(
            self.packs, found.paths, found.kind, found.pack, found.row, rows, group, name, (len(rows), *of.shape[1:]), of.dtype,
            places, frozenset(absent),
        )  # fmt: skip


def layout(
    found: Survey, read: Callable[[Path], xr.DataTree], join: Callable[[Sequence[xr.Dataset]], xr.Dataset],
    groups: Sequence[str], of_some: Sequence[str],
) -> Layout:  # fmt: skip
    """The pattern of each group: a run of the first pack of each kind, joined. of_some: as `Layout` has it."""
    kinds: dict[str, dict[int, xr.Dataset]] = {group: {} for group in groups}
    for kind, path in enumerate(found.kinds):
        tree = read(path)
        for group in groups:
            for part in parts_of([tree], group):
                kinds[group][kind] = part.isel(run=[0])
    patterns = {group: join(list(of.values())) for group, of in kinds.items() if of}
    return Layout(found, patterns, kinds, of_some)


def chunk_of(pattern: xr.Dataset) -> int:
    """Runs whose largest variable has about `CHUNK_BYTES`."""
    largest = max((of.dtype.itemsize * of[0].size for of in pattern.data_vars.values()), default=1)
    return max(1, CHUNK_BYTES // largest)
