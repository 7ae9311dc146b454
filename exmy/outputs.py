"""Files that a command was asked for: written whole or not at all, or refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from train.durable import atomically
from train.study import StudyError


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a file beside the path, which then takes its place; StudyError where that can't be done."""
    try:
        with atomically(path) as aside:
            write(aside)
    except OSError as error:
        raise StudyError(f"{path}: can't be written ({error.strerror}); name another place") from None


def write_text(path: Path | None, text: Callable[[], str]) -> None:
    """A text in UTF-8, made only where there is a path for it."""
    if path is not None:
        write_whole(path, lambda aside: aside.write_text(text(), encoding="utf-8"))
