"""When a pack is out of memory, its runs start over in packs of the next smaller R, and that is remembered; so is the R of packs
that were split, so that no worker is idle (see `splitting`).

    pack_sizes.json   {"schema": 1, "programs": [{"program": ..., "device": ..., "pack_size": 8, "restarted_from_pack_size": 16}],
                       "split": [{"program": ..., "device": ..., "runs": 128, "pack_size": 32, "split_from_pack_size": 128}]}

R is part of a program, so a pack never shrinks under way: all of it is redone. What is written down in the study's directory
holds for one program on one model of device: a study started again plans the same R at once, whatever number of workers it has
then, and one that goes on elsewhere tries the larger R there. A split is that of so many runs of a study: more of them are
planned anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from train.durable import atomically
from train.program import Program
from train.settings import PACK_SIZES

PACK_SIZES_FILE = "pack_sizes.json"
SCHEMA = 1
# Of errors that no class of their own tells: a CPU's allocator, cuBLAS' workspace, a driver that has none left.
SAID = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory", "CUDA out of memory")

log = logging.getLogger(__name__)


class Lowered(NamedTuple):
    """R of a program that was out of memory, and the R that was planned first."""

    size: int
    planned: int


class Split(NamedTuple):
    """R of a program whose packs were split for so many workers, and the R that they would have had."""

    size: int
    planned: int


Splits = dict[tuple[str, int], Split]  # by `program_key` and the number of a study's runs that are of it


def program_key(program: Program) -> str:
    """16 hex digits that tell programs apart, in files."""
    return hashlib.sha256(repr(program).encode()).hexdigest()[:16]


def smaller(size: int) -> int | None:
    """The next smaller R of the list; None after 1."""
    return max((other for other in PACK_SIZES if other < size), default=None)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an exception, or one that it came of, says that memory was too small."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(error, RuntimeError) and any(words in str(error) for words in SAID):
            return True
        error = error.__cause__ or error.__context__
    return False


def read_lowered(directory: Path) -> dict[str, dict[str, Lowered]]:
    """What a study's directory says of the programs that were out of memory: by a device's name, then by `program_key`.

    A file that is damaged costs a line in the log, and what it said will be found out again.
    """
    lowered: dict[str, dict[str, Lowered]] = {}
    for row in _content(directory)["programs"]:
        size, planned = row["pack_size"], row["restarted_from_pack_size"]
        lowered.setdefault(row["device"], {})[row["program"]] = Lowered(size, planned)
    return lowered


def read_splits(directory: Path) -> dict[str, Splits]:
    """What a study's directory says of the programs whose packs were split, by a device's name."""
    splits: dict[str, Splits] = {}
    for row in _content(directory)["split"]:
        key = row["program"], row["runs"]
        splits.setdefault(row["device"], {})[key] = Split(row["pack_size"], row["split_from_pack_size"])
    return splits


def write_lowered(directory: Path, device: str, program: Program, lowered: Lowered) -> None:
    """Add a program, or replace what was said of it; where that can't be written, a line in the log."""
    key, content = program_key(program), _content(directory)
    rows = [row for row in content["programs"] if (row["program"], row["device"]) != (key, device)]
    sizes = {"pack_size": lowered.size, "restarted_from_pack_size": lowered.planned}
    _write(directory, content | {"programs": [*rows, {"program": key, "device": device, **sizes}]})


def write_splits(directory: Path, device: str, splits: Splits) -> None:
    """The same of programs whose packs were split; nothing where none was."""
    content = _content(directory)
    said = {(row["program"], row["runs"]): row for row in content["split"] if row["device"] == device}
    others = [row for row in content["split"] if row["device"] != device]
    for (key, runs), split in splits.items():
        sizes = {"pack_size": split.size, "split_from_pack_size": split.planned}
        said[key, runs] = {"program": key, "device": device, "runs": runs, **sizes}
    if splits:
        _write(directory, content | {"split": [*others, *said.values()]})


def _write(directory: Path, content: Mapping[str, Any]) -> None:
    kept = {"schema": SCHEMA} | {name: rows for name, rows in content.items() if rows}
    try:
        with atomically(directory / PACK_SIZES_FILE) as aside:
            aside.write_text(json.dumps({"programs": []} | kept, indent=1), encoding="utf-8")
    except OSError as error:
        log.warning("%s can't be written (%s)", directory / PACK_SIZES_FILE, error.strerror)


def _content(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """The file's lists of rows."""
    path = directory / PACK_SIZES_FILE
    try:
        content = json.loads(path.read_bytes())
        if content["schema"] != SCHEMA:
            raise ValueError(content["schema"])
        return {
            "programs": list(_checked(content["programs"], "restarted_from_pack_size")),
            "split": list(_checked(content.get("split", []), "split_from_pack_size", "runs")),
        }
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        log.warning("%s: damaged, and left out", path)
    return {"programs": [], "split": []}


def _checked(rows: Sequence[Mapping[str, Any]], before: str, *counts: str) -> Iterator[dict[str, Any]]:
    """Rows that are as they were written; ValueError, KeyError or TypeError otherwise."""
    for row in rows:
        size, planned = row["pack_size"], row[before]
        if size not in PACK_SIZES or planned not in PACK_SIZES or not size < planned:
            raise ValueError(row)
        known = {"program": str(row["program"]), "device": str(row["device"]), "pack_size": size, before: planned}
        yield known | {name: int(row[name]) for name in counts}
