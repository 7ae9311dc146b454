"""Which runs the packs of a study directory hold, and what became of them, without opening a file a pack.

    index/<host>.jsonl    a line a pack: ["<CRC-32 of the row's text>", {row}]

The packs' files are the truth, and a row is a copy of what one says. It counts only for a file of the size and the times that
the row has (`directory.Stamp`); whatever else there is is read again. So nothing here has to be kept: an index that is deleted,
cut off or damaged costs a reading of the packs, and a row that a killed process had no time for costs one.

Whoever writes a pack appends its row, after the file has its name, by one `write` to a file opened for appending. A host has a
file of its own, since appending is whole among the processes of one host, and not among the clients of a network file system; two
hosts of one name can at worst spoil each other's lines, which their CRC shows. Rows are never changed: of two of a pack that one
counts whose file was changed last. A sweep that has the directory writes the index anew once most of its rows are dead.

A row: pack, file and seal (stamps; seal is null without a checksum), text (SHA-256), size (R), device, seconds,
first_step, ended (null, or the step after which all runs were dead), runs (identities), and by the rule `rule`
(`rule_of`), for each run: final_loss (null for NaN) and, as strings of 0 and 1, non_finite, no_progress and spike.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import socket
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict

from train.directory import INDEX, Found, Stamp
from train.durable import atomically
from train.settings import DivergenceTable

# Of the definitions in `stability` and `spikes`: whoever changes what one of them says of a run raises it.
RULES_VERSION = 1
HEAD = len('["01234567", ')
LEAST_DEAD = 1000  # rows that are worth writing an index anew

log = logging.getLogger(__name__)


class Row(TypedDict):
    """What the index says of a pack; see above."""

    pack: str
    file: list[int]
    seal: list[int] | None
    text: str
    size: int
    device: str
    seconds: float
    first_step: float
    ended: int | None
    runs: list[str]
    rule: str
    final_loss: list[float | None]
    non_finite: str
    no_progress: str
    spike: str


KINDS: dict[str, type | tuple[type, ...]] = {
    "pack": str, "file": list, "seal": (list, type(None)), "text": str, "size": int, "device": str,
    "seconds": float, "first_step": float, "ended": (int, type(None)),
    "runs": list, "rule": str, "final_loss": list, "non_finite": str,
    "no_progress": str, "spike": str,
}  # fmt: skip


class Index:
    """The rows of a study directory's index, one a pack's file, and how many lines there were for them."""

    def __init__(self, rows: Iterable[Row] = (), lines: int = 0) -> None:
        self.lines = lines
        self._rows: dict[tuple[str, int], Row] = {}
        for row in rows:
            self.add(row)

    def add(self, row: Row) -> None:
        """One row more."""
        key = (row["pack"], row["file"][0])
        known = self._rows.get(key)
        if known is None or known["file"][2] <= row["file"][2]:
            self._rows[key] = row

    def row(self, pack: str, found: Found) -> Row | None:
        """The row of a pack's file, if there is one of a file of this size."""
        return self._rows.get((pack, found.file.size))

    def __len__(self) -> int:
        return len(self._rows)


def is_unchanged(row: Row, found: Found) -> bool:
    """Whether the pack's file and its checksum are, by their stamps, those that the row was made of."""
    seal = None if found.seal is None else list(found.seal)
    return row["file"] == list(found.file) and row["seal"] == seal


def rule_of(table: DivergenceTable) -> str:
    """8 hex digits over all that decides a row's outcomes, apart from the histories."""
    numbers = [table.window, table.progress_margin, table.sigma, table.spike_window]
    return hashlib.sha256(json.dumps([RULES_VERSION, *map(float, numbers)]).encode()).hexdigest()[:8]


def read_index(directory: Path) -> Index:
    """The index of a study directory; what is damaged in it, or not there, is as if it had never been written."""
    texts: list[bytes] = []
    lines = 0
    for path in _files(directory):
        with contextlib.suppress(OSError):
            for line in path.read_bytes().split(b"\n"):
                lines += bool(line)
                text = line[HEAD:-1]
                if text and line == _line(text):
                    texts.append(text)
    try:
        rows = json.loads(b"[" + b",".join(texts) + b"]")
    except ValueError:  # of a right checksum: nothing that exmy wrote
        return Index(lines=lines)
    return Index(filter(_is_row, rows), lines)


def append_row(directory: Path, row: Row) -> None:
    """Add a row; where that can't be done, the pack will be read again, and a line in the log says so."""
    append_rows(directory, [row])


def append_rows(directory: Path, rows: Iterable[Row]) -> None:
    """Add rows, each whole."""
    try:
        folder = _folder(directory)
        opened = os.open(folder / _name(), os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            size = os.fstat(opened).st_size
            torn = size > 0 and os.pread(opened, 1, size - 1) != b"\n"  # a line that a kill or a full disk cut off
            for row in rows:
                os.write(opened, b"\n" * torn + _line(_text(row)) + b"\n")
                torn = False
        finally:
            os.close(opened)
    except OSError as error:
        log.warning(
            "%s: can't be written (%s): packs are read again at the next start", directory / INDEX, error.strerror
        )


def write_index(directory: Path, rows: Iterable[Row]) -> None:
    """The index anew, of these rows alone: for whoever has the directory. Rows that others append meanwhile may be lost."""
    try:
        folder = _folder(directory)
        before = _files(directory)
        with atomically(folder / _name()) as aside, aside.open("wb") as file:
            file.writelines(_line(_text(row)) + b"\n" for row in rows)
        for path in before:
            if path.name != _name():
                path.unlink(missing_ok=True)
    except OSError as error:
        log.warning(
            "%s: can't be written (%s): packs are read again at the next start", directory / INDEX, error.strerror
        )


def is_mostly_dead(index: Index, live: int) -> bool:
    """Whether an index has so many rows of files that are no more that it is worth writing anew."""
    return index.lines - live > max(LEAST_DEAD, live)


def row_of(stamps: Found, facts: Mapping[str, Any]) -> Row:
    """A row of a pack's file and of what is in it (`pack_file.facts`)."""
    seal = None if stamps.seal is None else list(stamps.seal)
    return Row(file=list(stamps.file), seal=seal, **facts)  # type: ignore[typeddict-item, no-any-return]


def _text(row: Row) -> bytes:
    return json.dumps(row, separators=(",", ":"), allow_nan=False).encode()


def _line(text: bytes) -> bytes:
    return b'["%08x", %s]' % (zlib.crc32(text), text)


def _is_row(row: Any) -> bool:
    return (
        type(row) is dict
        and row.keys() == KINDS.keys()
        and all(isinstance(row[key], kind) for key, kind in KINDS.items())
        and len(row["file"]) == len(Stamp._fields)
    )


def _folder(directory: Path) -> Path:
    """The index's folder; OSError where it can't be made, or is a link, which could lead out of the directory."""
    folder = directory / INDEX
    folder.mkdir(exist_ok=True)
    if folder.is_symlink():
        raise OSError(0, "it is a link")
    return folder


def _files(directory: Path) -> list[Path]:
    folder = directory / INDEX
    return [] if folder.is_symlink() else sorted(folder.glob("*.jsonl"))


def _name() -> str:
    return re.sub(r"[^\w.-]", "_", socket.gethostname())[:100].lstrip(".") + ".jsonl"
