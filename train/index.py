"""Which runs the packs of a study directory hold, and what became of them, without opening a file a pack.

    index/<host>.jsonl    a line a pack: ["<CRC-32 of the row's text>", {row}]

The packs' files are the truth, and a row is a copy of what one says. It counts only for a file of the size and the times that
the row has (`directory.Stamp`); whatever else there is is read again. So nothing here has to be kept: an index that is deleted,
cut off or damaged costs a reading of the packs, and a row that a killed process had no time for costs one.

Whoever writes a pack appends its row, after the file has its name, by one `write` to a file opened for appending. A host has a
file of its own, since appending is whole among the processes of one host, and not among the clients of a network file system; two
hosts of one name can at worst spoil each other's lines, which their CRC shows. Rows are never changed: of two of a pack that one
counts whose file was changed last. A sweep that has the directory writes the index anew once most of its rows are dead.

A row: pack, file and seal (stamps, "size modified changed"; "" without a checksum), design (the hash of a `Study.design` to which
all of its runs belong; "" where none is known), text (SHA-256), size (R), device, seconds, first_step, ended (the step after
which all runs were dead, or 0), runs (identities), and by the rule `rule` (`rule_of`), for each run: final_loss ("nan" for NaN)
and, each 0 or 1, non_finite, no_progress and spike. What runs have is one string, so that a million of them are read in a second:
`runs_of` and `losses_of` take it apart.
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
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from train.collection import no_collection
from train.directory import INDEX, Found, Stamp
from train.durable import atomically
from train.settings import DivergenceTable

# Of the definitions in `stability` and `spikes`: whoever changes what one of them says of a run raises it.
RULES_VERSION = 1
IDENTITY = 24  # hex digits
HEAD = len('["01234567", ')
BLOCK = 2**21  # bytes of lines that are read together: they fit a processor's cache
LEAST_DEAD = 1000  # rows that are worth writing an index anew

log = logging.getLogger(__name__)


class Row(TypedDict):
    """What the index says of a pack; see above."""

    pack: str
    file: str
    seal: str
    design: str
    text: str
    size: int
    device: str
    seconds: float
    first_step: float
    ended: int
    runs: str
    rule: str
    final_loss: str
    non_finite: str
    no_progress: str
    spike: str


KINDS: dict[str, type] = {
    "pack": str, "file": str, "seal": str, "design": str, "text": str, "size": int, "device": str, "seconds": float,
    "first_step": float, "ended": int, "runs": str,
    "rule": str, "final_loss": str, "non_finite": str, "no_progress": str, "spike": str,
}  # fmt: skip
NAMES, TYPES = list(KINDS), list(KINDS.values())
STAMP = re.compile(r"\d{1,20} \d{1,20} \d{1,20}")


class Index:
    """The rows of a study directory's index, one a pack, and how many lines there were for them."""

    def __init__(self, rows: Iterable[Row] = (), lines: int = 0) -> None:
        self.lines = lines
        self.rows: dict[str, Row] = {}
        for row in rows:
            known = self.rows.setdefault(row["pack"], row)
            if known is not row and changed(known) <= changed(row):
                self.rows[row["pack"]] = row


def changed(row: Row) -> int:
    """When the pack's file got to be what the row says of it, ns."""
    return int(row["file"].rpartition(" ")[2])


def modified(row: Row) -> int:
    """When the pack's file was written, ns."""
    return int(row["file"].split(" ")[1])


def runs_of(row: Row) -> list[str]:
    """The identities of a pack's runs."""
    return row["runs"].split(" ")


def all_differ(runs: Sequence[str]) -> bool:
    """Whether no run is in two of these rows' `runs`. False can be wrong, and means a look at each.

    By sorting 64 bits of each identity, in a tenth of the time that a set of a million strings takes.
    """
    text = np.frombuffer((" ".join(runs) + " ").encode(), np.uint8)
    if not runs or text.size % (IDENTITY + 1):
        return not runs
    letters = text.reshape(-1, IDENTITY + 1)
    if (letters[:, -1] != ord(" ")).any():
        return False
    halves = np.ascontiguousarray(letters[:, :16]).view(np.uint64)  # 16 hex digits, four bits a byte
    packed = (halves & np.uint64(0x0F0F0F0F0F0F0F0F)) + np.uint64(9) * (
        halves >> np.uint64(6) & np.uint64(0x0101010101010101)
    )
    keys = np.sort(packed[:, 0] << np.uint64(4) | packed[:, 1])
    return bool((keys[1:] != keys[:-1]).all())


def losses_of(row: Row) -> list[float]:
    """The final losses of a pack's runs."""
    return [float(loss) for loss in row["final_loss"].split(" ")]


def is_unchanged(row: Row, found: Found) -> bool:
    """Whether the pack's file and its checksum are, by their stamps, those that the row was made of."""
    return row["file"] == _words(found.file) and row["seal"] == _words(found.seal)


def _words(stamp: Stamp | None) -> str:
    return "" if stamp is None else " ".join(map(str, stamp))


def rule_of(table: DivergenceTable) -> str:
    """8 hex digits over all that decides a row's outcomes, apart from the histories."""
    numbers = [table.window, table.progress_margin, table.sigma, table.spike_window]
    return hashlib.sha256(json.dumps([RULES_VERSION, *map(float, numbers)]).encode()).hexdigest()[:8]


def read_index(directory: Path) -> Index:
    """The index of a study directory; what is damaged in it, or not there, is as if it had never been written."""
    rows: list[Row] = []
    lines = 0
    with no_collection():
        for path in _files(directory):
            with contextlib.suppress(OSError), path.open("rb") as file:
                while some := file.readlines(BLOCK):
                    lines += len(some)
                    rows += _rows(some)
    return Index(rows, lines)


def _rows(lines: Iterable[bytes]) -> list[Row]:
    """Those of lines that are whole, read together, which is twice as fast."""
    texts = [line[HEAD:-2] for line in lines]
    whole = [text for text, line in zip(texts, lines, strict=True) if line == _line(text) + b"\n"]
    try:
        rows = json.loads(b"[" + b",".join(whole) + b"]")
    except ValueError:  # of a right checksum: nothing that exmy wrote
        return []
    return list(filter(_is_row, rows))


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
    return Row(file=_words(stamps.file), seal=_words(stamps.seal), **facts)  # type: ignore[typeddict-item, no-any-return]


def _text(row: Row) -> bytes:
    content: dict[str, Any] = {**row}
    return json.dumps({name: content[name] for name in NAMES}, separators=(",", ":"), allow_nan=False).encode()


def _line(text: bytes) -> bytes:
    return b'["%08x", %s]' % (zlib.crc32(text), text)


def _is_row(row: Any) -> bool:
    if type(row) is not dict or list(row) != NAMES:
        return False
    return list(map(type, row.values())) == TYPES and STAMP.fullmatch(row["file"]) is not None


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
