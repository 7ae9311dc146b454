"""`exmy export`: a whole study in one place for other tools, a Zarr store or a netCDF file, written a few hundred runs at a time;
or a small study directory that has what is said of it (see `train.digest`).

What is written aside gets its name once it is whole; what had the name before goes only then. Values, labels and attributes are
those of `open_study`: `xr.open_datatree(OUT, engine="zarr")` gives them back, bit for bit. Zarr's format 2: it has strings and
consolidated metadata in its specification, and every reader of Zarr knows it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from itertools import pairwise, permutations
from pathlib import Path

import numpy as np
import xarray as xr

from train import StudyError, open_study
from train.digest import has_digest, write_digest
from train.directory import is_digest, pack_names
from train.durable import PART, atomically
from train.store import ENGINE, PACKS
from train.waiting import Waiting

ZARR_MARKS = (".zgroup", "zarr.json")  # of a store, in format 2 and 3


def export_study(
    directory: Path, zarr: Path | None, netcdf: Path | None, digest: Path | None = None, *, alarms: bool = False,
    force: bool = False,
) -> list[Path]:  # fmt: skip
    """Write the study to a Zarr store, a netCDF file and a digest, as far as they are named; what was written.

    alarms: the digest is for `exmy alarms`. force: replace what is there. StudyError, before anything is read, where that can not
    or should not be done.
    """
    outs = [out for out in (zarr, netcdf, digest) if out is not None]
    for out in outs:
        _check_target(directory, out, netcdf, force=force)
    _check_apart(outs)
    if zarr is not None:
        _check_zarr(zarr)
    if netcdf is not None:
        _check_netcdf(netcdf)
    if digest is not None:
        _check_digest(directory, digest)
    wholes = [out for out in (zarr, netcdf) if out is not None]
    tree = open_study(directory, chunks="auto") if wholes else xr.DataTree()
    for out in wholes:
        _check_room(tree, out)
    try:
        if digest is not None:
            with _folder_aside(digest) as aside:
                write_digest(open_study(directory), directory, aside, alarms=alarms)
        if zarr is not None:
            _write_zarr(tree, zarr)
        if netcdf is not None:
            _write_netcdf(tree, netcdf)
    except OSError as error:
        where = ", ".join(map(str, outs))
        raise StudyError(
            f"{where}: can't be written ({error.strerror or error}); make room, or name another place"
        ) from None
    return outs


def _check_target(directory: Path, out: Path, netcdf: Path | None, *, force: bool) -> None:
    if not out.absolute().parent.is_dir():
        raise StudyError(f"{out}: there is no folder {out.absolute().parent}; make it, or name another place")
    if directory.resolve().is_relative_to(out.resolve()):
        raise StudyError(f"{out}: the study itself lies there; name another place")
    if out.resolve().is_relative_to((directory / PACKS).resolve()):
        raise StudyError(f"{out}: the study's own packs lie there; name another place")
    if out.is_dir() and out == netcdf:
        raise StudyError(f"{out}: a folder, and --netcdf writes a file; name another place")
    if out.exists() and not force:
        raise StudyError(f"{out}: there already; name another place, or replace it with --force")


def _check_apart(outs: Sequence[Path]) -> None:
    """StudyError where one would be written over another, or into it and go with it."""
    for one, other in permutations(outs, 2):
        if one.resolve() == other.resolve():
            raise StudyError(
                f"{one}: named for two exports, of which one would replace the other; name a place for each"
            )
        if one.resolve().is_relative_to(other.resolve()):
            raise StudyError(f"{one}: lies in {other}, which is written too; name a place beside it")


def _check_zarr(out: Path) -> None:
    if importlib.util.find_spec("zarr") is None:
        raise StudyError("zarr is not installed: pip install 'exmy[zarr]'")
    is_store = out.is_dir() and (not any(out.iterdir()) or any((out / mark).exists() for mark in ZARR_MARKS))
    if out.exists() and not is_store:
        raise StudyError(f"{out}: no Zarr store, so --force does not replace it; name another place")


def _check_netcdf(out: Path) -> None:
    if out.exists() and not (out.is_file() and _starts_as_netcdf(out)):
        raise StudyError(f"{out}: no netCDF file, so --force does not replace it; name another place")


def _starts_as_netcdf(file: Path) -> bool:
    """NetCDF 4 is HDF5; before that, its own. What can't be read is taken for none."""
    try:
        with file.open("rb") as opened:
            start = opened.read(4)
    except OSError:
        return False
    return start == b"\x89HDF" or start.startswith(b"CDF")


def _check_digest(directory: Path, out: Path) -> None:
    if is_digest(directory):
        raise StudyError(f"{directory} is a digest itself: copy it")
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or has_digest(out)) and not pack_names(out)):
        raise StudyError(f"{out}: no digest of a study, so --force does not replace it; name another place")


def _check_room(tree: xr.DataTree, out: Path) -> None:
    """Room for all of it uncompressed: HDF5 ends the process, not the call, where a disk is full when it closes a file."""
    wanted = sum(node.to_dataset(inherit=False).nbytes for node in tree.subtree)
    free = shutil.disk_usage(out.absolute().parent).free
    if free < wanted:
        raise StudyError(
            f"{out}: takes up to {wanted / 2**20:.1f} MiB and {free / 2**20:.1f} MiB are free there; "
            "make room, or name another place"
        )


@contextlib.contextmanager
def _folder_aside(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name on success, and is removed on failure."""
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=PART, dir=out.absolute().parent))
    try:
        aside.chmod(0o755)
        yield aside
        if out.exists():
            before = aside.with_suffix(".old")
            out.rename(before)
            aside.rename(out)
            shutil.rmtree(before)
        else:
            aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_zarr(tree: xr.DataTree, out: Path) -> None:
    """Coordinates, attributes and what is in memory first; then every chunk, all variables of the same runs together."""
    import zarr

    # A chunk of NaN alone is written too: left out, it would be read back as NaN of another sign.
    with _folder_aside(out) as aside, zarr.config.set({"array.write_empty_chunks": True}):
        tree.to_zarr(aside, mode="w", compute=False, zarr_format=2, consolidated=True)
        lazy = {name: (array, zarr.open_array(aside / name, mode="r+", zarr_format=2)) for name, array in _lazy(tree)}
        with Waiting("exporting runs", tree["history"].sizes["run"]) as bar:
            for part in _parts(tree):
                for array, stored in lazy.values():
                    if (few := array.isel(run=part)).size:
                        stored[part] = few.compute(scheduler="synchronous").values
                bar.advance(part.stop - part.start)


def _write_netcdf(tree: xr.DataTree, out: Path) -> None:
    import dask

    sizes = {name: tuple(chunk[0] for chunk in array.chunks or ()) for name, array in _lazy(tree) if array.size}
    encoding: dict[str, dict[str, object]] = {}
    for name, chunk in sizes.items():
        group, _, variable = name.rpartition("/")
        encoding.setdefault(f"/{group}", {})[variable] = {"zlib": True, "complevel": 4, "chunksizes": chunk}
    with atomically(out) as aside, dask.config.set(scheduler="synchronous"), _Shown():
        tree.to_netcdf(aside, engine=ENGINE, encoding=encoding)


def _lazy(tree: xr.DataTree) -> Iterator[tuple[str, xr.DataArray]]:
    """What is on the disk still, "group/variable"."""
    for node in tree.subtree:
        for name, array in node.to_dataset().data_vars.items():
            if array.chunks is not None:
                yield f"{node.path.strip('/')}/{name}", array


def _parts(tree: xr.DataTree) -> Iterator[slice]:
    """The runs, a chunk at a time."""
    chunks = tree["history"]["train_loss"].chunks
    ends = np.cumsum(chunks[0] if chunks else ()).tolist()
    yield from (slice(start, end) for start, end in pairwise([0, *ends]))


class _Shown:
    """A bar over dask's tasks."""

    def __init__(self) -> None:
        from dask.callbacks import Callback

        self._stack = contextlib.ExitStack()
        self._bar = Waiting("exporting")

        def told(*_: object) -> None:
            self._bar.advance(1)

        self._callback = Callback(posttask=told)

    def __enter__(self) -> None:
        self._stack.enter_context(self._bar)
        self._stack.enter_context(self._callback)

    def __exit__(self, *_: object) -> None:
        self._stack.close()
