"""One sweep at a time in a study directory: a lock on an open file, which dies with the process that holds it."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from train.study import StudyError

LOCK_FILE = ".lock"
TRIES = 5  # file systems that give a file another number each time have no more of them
PATIENCE = 30.0  # seconds that the workers of a sweep that was killed have to end: a GPU's memory is given back first

log = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(directory: Path, who: str = "sweep") -> Iterator[int]:
    """Hold the directory's lock; StudyError, which names the holder, where another process or thread has it. OSError where there
    can't be a file. who: takes such a lock, in a word.

    Gives the lock's file descriptor. A process that inherits it holds the lock too, until it ends: so workers that outlive, for a
    moment, a sweep that was killed keep the next one waiting, and never write beside it.

    The file stays, with the last holder's process id and host in it: who removed it could remove another's. Only who holds it
    may, of a directory in which nothing was done; whoever opened it before finds that it is another file now. A link is not
    followed: what it led to, in a directory that somebody sent, would be emptied.
    """
    for tries_left in reversed(range(TRIES)):
        opened = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        with open(opened, "r+", encoding="utf-8") as file:  # noqa: PTH123
            _take(file.fileno(), directory, who)
            if tries_left and not _is_there(file.fileno(), directory):
                continue
            file.seek(0)
            file.truncate()
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            yield file.fileno()
            return


def _take(file: int, directory: Path, who: str) -> None:
    """Lock an open file; StudyError where another has it."""
    try:
        holder = _taken(file)
    except OSError as error:  # some network file systems
        log.warning("%s can't be locked (%s): see to it that no other %s works there", directory, error.strerror, who)
        return
    if holder is not None:
        other = ", or name another with --out" if who == "sweep" else ""
        raise StudyError(f"{directory}: another {who} is at work there ({holder}); wait for it, stop it{other}")


def _is_there(file: int, directory: Path) -> bool:
    """Whether an open file is the directory's lock still."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file), (directory / LOCK_FILE).lstat())
    return False


def _taken(file: int) -> str | None:
    """Lock an open file; who has it already, where somebody has who is not about to end."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(file, 1000, 0).decode(errors="replace").strip() or "another process"
            if not _may_be_ending(holder) or time.monotonic() > until:
                return holder
            time.sleep(0.05)
        else:
            return None


def _may_be_ending(holder: str) -> bool:
    """Whether "process 12 on here" is of this host, and no more, so that its workers are ending; or words that name nobody, of a
    file that is damaged, or not yet written.
    """
    found = re.fullmatch(r"process (\d{1,9}) on (.*)", holder)
    if found is None:
        return True
    if found[2] != socket.gethostname():
        return False
    try:
        os.kill(int(found[1]), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
