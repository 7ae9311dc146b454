"""A study in a few megabytes, to be committed: all that is said of its runs, and of their histories every tenth step.

    study.toml      the study as resolved, as in any study directory
    digest.nc       /summary, /evaluation, /sharpness and other measures whole; /history thinned; /signals of some seeds, or, for
                    alarms, of all seeds the loudest of blocks, tensors and roles
    digest.sha256   its checksum, for `sha256sum -c` too

Noise does not compress: a run's loss and gradient norm of a thousand steps are 6 kB, the norms of its blocks 3 kB each. A
study of a thousand runs comes to tens of megabytes, and what is decided of it to some hundred bytes a run. /summary is worked out
of the whole histories before they are thinned, and no number is rounded. `open_study` reads a directory that has a digest and no
packs; what rests on it works as before, but that histories have steps 0, 10, 20, ..., and that divergence by another definition
than those in /summary can't be worked out again.

`exmy alarms` takes of /signals the loudest, of every run, and the step of the onset: a digest for alarms has these, worked out
of the whole, so that signals and sharpness are judged as they are of the packs. With signals and sharpness at every tenth step
that is 4 to 7 kB a run of a thousand steps, where all signals are a hundred.
"""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import xarray as xr

from train.directory import DIGEST as DIGEST
from train.directory import STUDY_FILE
from train.directory import has_digest as has_digest
from train.durable import atomically, read_intact, seal
from train.pack_file import DAMAGE
from train.study import StudyError

EVERY, SEEDS = 10, 4
ENGINE: Final = "h5netcdf"
DERIVED = frozenset({"gnmr", "grad_norm_block", "gnmr_block"})  # of /history: left out, with what they are made of


def digest_of(tree: xr.DataTree, every: int = EVERY, seeds: int = SEEDS, *, alarms: bool = False) -> xr.DataTree:
    """A study as `open_study` gives it with every so many steps of its histories, and signals of its first so many seeds alone;
    or, for alarms, the loudest signals of all, the onset in /summary and `gnmr` in /history.

    ValueError unless both are at least 1.
    """
    if every < 1 or seeds < 1:
        raise ValueError(f"every and seeds must be at least 1, got {every} and {seeds}")
    groups = {node.path: node.to_dataset(inherit=False) for node in tree.subtree if node.path != "/"}
    history = groups["/history"]
    left_out = (DERIVED - {"gnmr"} if alarms else DERIVED) & set(history.data_vars)
    groups["/history"] = history.drop_vars(left_out).isel(step=slice(None, None, every))
    kept: dict[str, int | str] = {"digest_signal_seeds": seeds}
    if alarms:
        from train.study_alarms import ONSET, loudest, study_onset  # waits for SciPy

        described = {
            "units": "step",
            "long_name": "step from which the run counts as diverged, for alarms; NaN if it did not",
        }
        groups["/summary"] = groups["/summary"].assign({ONSET: study_onset(tree).assign_attrs(described)})
        kept = {"digest_signals": "loudest"}
    if "/signals" in groups:
        groups["/signals"] = loudest(groups["/signals"]) if alarms else _of_first_seeds(groups["/signals"], seeds)
    small = xr.DataTree.from_dict(groups)
    small.attrs = {**tree.attrs, "digest_every": every, **kept}
    return small


def _of_first_seeds(signals: xr.Dataset, seeds: int) -> xr.Dataset:
    """Those of the lowest seeds of batches; for the others NaN, and `measured` says so."""
    kept = signals["data_seed"].isin(np.unique(signals["data_seed"].values)[:seeds]) & signals["measured"]
    attrs = signals["measured"].attrs
    return signals.drop_vars("measured").where(kept).assign(measured=kept.assign_attrs(attrs))


def write_digest(
    tree: xr.DataTree, directory: Path, folder: Path, every: int = EVERY, seeds: int = SEEDS, *, alarms: bool = False
) -> None:
    """The digest of the study of `directory`, opened, in a folder that is there; OSError where it can't be written."""
    small = digest_of(tree, every, seeds, alarms=alarms)
    labels = _labels(small["history"].to_dataset())
    encoding: dict[str, dict[str, dict[str, Any]]] = {}
    for node in small.subtree:
        if not node.to_dataset(inherit=False).variables:  # the root, and groups of groups
            continue
        # Runs stand in one order in all groups: their labels are written once.
        if node.path != "/history":
            node.dataset = node.to_dataset(inherit=False).drop_vars(["run", *labels])
        encoding[node.path] = {
            str(name): {"zlib": True, "complevel": 9, "shuffle": True} | _as_characters(of)
            for name, of in node.to_dataset(inherit=False).variables.items()
            if of.ndim
        }
    content = bytes(small.to_netcdf(engine=ENGINE, encoding=encoding))
    seal(folder / DIGEST, content)
    with atomically(folder / DIGEST) as aside:
        aside.write_bytes(content)
    shutil.copyfile(directory / STUDY_FILE, folder / STUDY_FILE)


def _as_characters(of: xr.Variable) -> dict[str, str]:
    """Strings of any length are not compressed; characters are."""
    return {"dtype": "S1"} if of.dtype.kind in "OUST" else {}


def _labels(history: xr.Dataset) -> list[str]:
    return [str(name) for name, of in history.coords.items() if of.dims == ("run",) and name != "run"]


def read_digest(directory: Path, chunks: int | Literal["auto"] | None = None) -> xr.DataTree:
    """The digest of a directory, in memory, or in dask's chunks of so many runs; StudyError where it is damaged."""
    path = directory / DIGEST
    try:
        with xr.open_datatree(io.BytesIO(read_intact(path)), engine=ENGINE) as opened:
            tree = opened.load()
    except DAMAGE as error:
        raise StudyError(f"{path}: damaged ({error}): take it from where it came from again") from None
    every = {node.path: node.to_dataset(inherit=False) for node in tree.subtree if node.path != "/"}
    groups = {path: of for path, of in every.items() if of.variables}
    of_runs = {name: groups["/history"].coords[name] for name in ("run", *_labels(groups["/history"]))}
    whole = {path: of if path == "/history" else of.assign_coords(of_runs) for path, of in groups.items()}
    if chunks is not None:
        # Labels stay in memory: nothing that writes strings takes them piece by piece.
        pieces = {"run": -1 if chunks == "auto" else chunks}
        whole = {
            path: of.assign({name: v.chunk(pieces) for name, v in of.data_vars.items()}) for path, of in whole.items()
        }
    found = xr.DataTree.from_dict(whole)
    found.attrs = tree.attrs
    return found
