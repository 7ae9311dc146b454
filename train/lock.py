"""One sweep at a time in a study directory: a lock on an open file, which dies with the process that holds it."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from train.study import StudyError

LOCK_FILE = ".lock"

log = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the directory's lock; StudyError, which names the holder, where another process or thread has it. OSError where there
    can't be a file.

    The file stays, with the last holder's process id and host in it: who removed it could remove another's. A link is not
    followed: what it led to, in a directory that somebody sent, would be emptied.
    """
    opened = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    with open(opened, "r+", encoding="utf-8") as file:  # noqa: PTH123
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise StudyError(
                f"{directory}: another sweep is at work there ({holder}); wait for it, stop it, or name another with --out"
            ) from None
        except OSError as error:  # some network file systems
            log.warning("%s can't be locked (%s): see to it that no other sweep works there", directory, error.strerror)
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
