"""`exmy vectors`: test vectors into a file, whole or not at all, with progress where they take a while."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from formats import element_format
from formats.rounding import DETERMINISTIC
from train.durable import atomically
from verification.vector_sets import as_csv, as_hex, decoding_vectors, vectors


def write_vectors(
    name: str, input_format: str, roundings: tuple[str, ...], overflows: tuple[str, ...],
    *, every: bool, decode: bool, file_format: str | None, out: Path | None,
) -> int:  # fmt: skip
    """Make the vectors and write them to `out`, or print them; how many. ValueError: bad input. OSError: a bad place."""
    f, given = element_format(name), element_format(input_format)
    if decode and (roundings or overflows or every):
        raise ValueError("decoding has no rounding, no overflow, and is always complete; leave these options out")
    kind = file_format or ("hex" if out is not None and out.suffix == ".hex" else "csv")
    if out is not None:
        _check_place(out)
    if decode:
        found = decoding_vectors(f)
    else:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(
            *columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True
        ) as progress:

            def shown(items: Iterable[Any], what: str) -> Iterator[Any]:
                yield from progress.track(list(items), description=what)

            found = vectors(f, given, roundings or tuple(DETERMINISTIC), overflows or None, every=every, progress=shown)
    lines = as_hex(found) if kind == "hex" else as_csv(found)
    if out is None:
        for line in lines:
            click.echo(line)
    else:
        with _place(out) as place, place.open("w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
    return found.sizes["vector"]


def _place(out: Path) -> AbstractContextManager[Path]:
    """Where to write: aside, to be renamed; itself where it is a pipe or a device, which a file would take the place of."""
    return nullcontext(out) if _is_special(out) else atomically(out.resolve())


def _is_special(out: Path) -> bool:
    return out.exists() and not out.is_file()


def _check_place(out: Path) -> None:
    """OSError now, and not after the work, where `out` can't be written."""
    if out.is_dir():
        raise IsADirectoryError(21, "Is a directory")
    if not _is_special(out):
        with tempfile.TemporaryFile(dir=out.resolve().parent):
            return
    if not os.access(out, os.W_OK):
        raise PermissionError(13, "Permission denied")
