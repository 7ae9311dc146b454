"""When a pack is out of memory, its runs start over in packs of the next smaller R, and that is remembered.

    pack_sizes.json   {"schema": 1, "programs": [{"program": ..., "device": ..., "pack_size": 8, "restarted_from_pack_size": 16}]}

R is part of a program, so a pack never shrinks under way: all of it is redone. What is written down in the study's directory
holds for one program on one model of device: a study started again plans the same R at once, and one that goes on elsewhere tries
the larger R there.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
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
    for row in _rows(directory):
        lowered.setdefault(row["device"], {})[row["program"]] = Lowered(row["pack_size"], row["planned"])
    return lowered


def write_lowered(directory: Path, device: str, program: Program, lowered: Lowered) -> None:
    """Add a program, or replace what was said of it; where that can't be written, a line in the log."""
    key = program_key(program)
    rows = [row for row in _rows(directory) if (row["program"], row["device"]) != (key, device)]
    rows.append({"program": key, "device": device, "pack_size": lowered.size, "planned": lowered.planned})
    written = [{**row, "restarted_from_pack_size": row.pop("planned")} for row in rows]
    try:
        with atomically(directory / PACK_SIZES_FILE) as aside:
            aside.write_text(json.dumps({"schema": SCHEMA, "programs": written}, indent=1), encoding="utf-8")
    except OSError as error:
        log.warning("%s can't be written (%s)", directory / PACK_SIZES_FILE, error.strerror)


def _rows(directory: Path) -> list[dict[str, Any]]:
    path = directory / PACK_SIZES_FILE
    try:
        return list(_checked(json.loads(path.read_bytes())))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError):
        log.warning("%s: damaged, and left out", path)
        return []


def _checked(content: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of a file that is as `write_lowered` wrote it; ValueError, KeyError or TypeError otherwise."""
    if content["schema"] != SCHEMA:
        raise ValueError(content["schema"])
    for row in content["programs"]:
        size, planned = row["pack_size"], row["restarted_from_pack_size"]
        if size not in PACK_SIZES or planned not in PACK_SIZES or not size < planned:
            raise ValueError(row)
        yield {"program": str(row["program"]), "device": str(row["device"]), "pack_size": size, "planned": planned}
