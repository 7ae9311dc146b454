"""What lies where in a study directory, and whose it is; without torch or xarray, so that a look at one takes no second.

study.toml            the study as resolved
packs/<hash>.nc       the results of one pack
packs/<hash>.sha256   its checksum
index/<host>.jsonl    which runs the packs hold (see `index`); a copy of what they say, and made again where it is lost
checkpoints/<hash>/   the state of a pack under way (see `checkpoint`)
snapshots/<run>/      weights of a run that [probe] snapshots names (see `snapshots`)
landscape/            what `exmy landscape` measured of them (see `landscape_files`)
digest.nc             instead of packs: what is said of the runs that were finished (see `digest`)
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from train.durable import CHECKSUM
from train.measures import AFTERWARDS, QUANTISERS
from train.study import Study, StudyError
from train.study_file import read_study

STUDY_FILE, PACKS, INDEX, SNAPSHOTS, LANDSCAPE = "study.toml", "packs", "index", "snapshots", "landscape"
PACK = ".nc"
DIGEST = "digest.nc"


class Stamp(NamedTuple):
    """By what a file is known to be the one that it was: bytes, and when its content and its entry were changed, ns.

    Programs that copy set the first time and can't set the second.
    """

    size: int
    modified: int
    changed: int


class Found(NamedTuple):
    """A pack's file, and its checksum's, None where it has none."""

    file: Stamp
    seal: Stamp | None


class Point(NamedTuple):
    """A point's file, and what its name says."""

    path: Path
    quantisers: str
    measure: str
    step: int


def stamp_of(path: Path) -> Stamp:
    """A file's stamp; OSError where there is none."""
    return _stamp(path.stat())


def _stamp(status: os.stat_result) -> Stamp:
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def found_packs(directory: Path) -> dict[str, Found]:
    """The packs whose files a study directory has, by their hashes, in the order of `pack_files`, by one look at the folder."""
    files: dict[str, Stamp] = {}
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(directory / PACKS) as entries:
        for entry in entries:
            if entry.name.endswith((PACK, CHECKSUM)):
                with contextlib.suppress(FileNotFoundError):  # gone since
                    files[entry.name] = _stamp(entry.stat())
    hashes = (name.removesuffix(PACK) for name in sorted(files) if name.endswith(PACK))
    return {name: Found(files[name + PACK], files.get(name + CHECKSUM)) for name in hashes}


def pack_names(directory: Path) -> list[str]:
    """The hashes of `found_packs`, without a look at each file."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        names = os.listdir(directory / PACKS)  # noqa: PTH208 (a path for each of 200,000 names takes a second)
        return [name.removesuffix(PACK) for name in sorted(name for name in names if name.endswith(PACK))]
    return []


def pack_files(directory: Path) -> list[Path]:
    """The files of a study directory's finished packs, by name."""
    return sorted((directory / PACKS).glob(f"*{PACK}"))


def has_digest(directory: Path) -> bool:
    """Whether a digest lies there."""
    return (directory / DIGEST).is_file()


def is_digest(directory: Path) -> bool:
    """Whether a digest is all that is there of a study's results: packs come before a digest of them."""
    return has_digest(directory) and not pack_names(directory)


def _some(names: Sequence[str], most: int = 5) -> str:
    """The names, the first few of many."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def study_of(directory: Path) -> Study:
    """The study whose directory it is; StudyError where it is none."""
    if not (directory / STUDY_FILE).is_file():
        usual = Path("runs") / directory
        mend = (
            f"do you mean {usual}?"
            if (usual / STUDY_FILE).exists()
            else "a study directory is what `exmy sweep --out DIR` writes"
        )
        inside = sorted(file.parent.name for file in directory.glob(f"*/{STUDY_FILE}")) if directory.is_dir() else []
        if inside:
            mend = f"do you mean {directory / inside[0]}?" if len(inside) == 1 else f"studies in it are {_some(inside)}"
        missing = f"no {STUDY_FILE} here" if directory.is_dir() else "there is no such directory"
        if directory.is_file():
            missing = "a file, and no study directory"
        raise StudyError(f"{directory}: {missing}; {mend}")
    return read_study(directory / STUDY_FILE)


def study_text(study: Study) -> str:
    """What a study directory's study.toml says."""
    return f"# As resolved, every default spelt out. Hash: {study.hash}\n{study.to_toml()}"


def points_in(directory: Path) -> Iterator[Point]:
    """The points of a study directory, by their names alone; no file is opened."""
    for path in sorted((directory / LANDSCAPE).glob(f"*/*/*-*{PACK}")):
        step, quantisers, measure = path.stem.partition("-")[0], path.parent.parent.name, path.parent.name
        if step.isdigit() and quantisers in QUANTISERS and measure in AFTERWARDS:
            yield Point(path, quantisers, measure, int(step))
