"""The directory of a study that is about to be trained: made, held, and not left behind empty.

A sweep may be refused after it has a directory: its text is not to be had, its runs are of another study, the disk is too small.
Until study.toml is written nothing was computed, and what was made for it, folders and lock, goes again. What was there before
stays, and so does all that has a file in it.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from train.directory import PACKS, STUDY_FILE, is_digest
from train.lock import LOCK_FILE, locked
from train.study import StudyError

TRIES = 3  # another sweep may remove its directory just when this one takes it


def refuse_digest(directory: Path) -> None:
    """StudyError where a directory holds a digest: of its runs none would be found finished, and all would be trained again."""
    if is_digest(directory):
        raise StudyError(
            f"{directory}: a digest of a study, which can be looked at and not be gone on with: name another directory with --out"
        )


@contextlib.contextmanager
def study_folder(directory: Path) -> Iterator[int]:
    """Make a study's directory where there is none, and hold it: the lock's file descriptor, as `locked` gives it.

    StudyError where it can't be written to, where another sweep has it, or where it is a digest.
    """
    refuse_digest(directory)
    made: list[Path] = []
    with contextlib.ExitStack() as stack:
        # Removed while the lock is held still, and where no lock was to be had, folders that have nothing in them.
        try:
            lock = _held(directory, made, stack)
            stack.callback(_remove_unused, directory, made)
            with tempfile.TemporaryFile(dir=directory / PACKS):
                pass
        except OSError as error:
            _remove_unused(directory, made)
            raise StudyError(
                f"{directory}: can't write there ({error.strerror}); mend that, or name another with --out"
            ) from None
        yield lock


def _held(directory: Path, made: list[Path], stack: contextlib.ExitStack) -> int:
    """The lock of a directory that is made first; `made` grows by what was not there, innermost first."""
    packs = directory / PACKS
    for tries_left in reversed(range(TRIES)):
        made += [
            path
            for path in (packs, directory / LOCK_FILE, *packs.parents)
            if path not in made and not os.path.lexists(path)
        ]
        try:
            packs.mkdir(parents=True, exist_ok=True)
            return stack.enter_context(locked(directory))
        except FileNotFoundError:
            if not tries_left:
                raise
    raise AssertionError


def _remove_unused(directory: Path, made: list[Path]) -> None:
    """Remove what was made, unless the directory is a study's by now; folders that have something in them stay."""
    if os.path.lexists(directory / STUDY_FILE):
        return
    for path in made:
        with contextlib.suppress(OSError):
            path.unlink() if path.name == LOCK_FILE else path.rmdir()
