"""Worker processes that a command starts before it imports what it needs itself: both take seconds, and now the same ones.

It is not known yet what they will train, or in which directory: such a process gets the directory's lock when a `local.Worker`
takes it, over the socket that they share. Until then it has none, and does nothing but import. What is not taken is ended.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

MODULE = "train.worker"
LATER = "-"  # in place of the lock's file descriptor: it will come
MOST = 16

_waiting: dict[int, Started] = {}


@dataclass
class Started:
    """A process of `train.worker`, this process' end of the socket, and a file of what it says on its standard outputs."""

    process: subprocess.Popen[bytes]
    mine: socket.socket
    errors: IO[bytes]
    device: str

    def end(self) -> None:
        """At once."""
        self.mine.close()
        self.process.kill()
        self.process.wait()
        self.errors.close()


def start(device: str, number: int, lock: int | None, module: str = MODULE) -> Started:
    """Start the worker of that number; lock: a file descriptor, None for one that is sent later. device: "auto" may be either."""
    mine, theirs = socket.socketpair()
    errors = tempfile.TemporaryFile()  # noqa: SIM115
    kept = [theirs.fileno(), *([] if lock is None else [lock])]
    with theirs:
        process = subprocess.Popen(
            # Without -P a folder `train` where the sweep was started would come before ours.
            [sys.executable, "-P", "-m", module, str(theirs.fileno()), LATER if lock is None else str(lock), device],
            env=_environment(device, number), pass_fds=kept, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors,
            start_new_session=True,
        )  # fmt: skip
    return Started(process, mine, errors, device)


@contextlib.contextmanager
def early_workers(count: int, device: str) -> Iterator[None]:
    """Workers 0 to count - 1, for whoever takes them in this context."""
    _waiting.update({number: start(device, number, None) for number in range(min(count, MOST))})
    try:
        yield
    finally:
        discard()


def take(device: str, number: int, lock: int) -> Started | None:
    """The worker of that number, from now on with the lock; None where none was started that could serve this device."""
    found = _waiting.get(number)
    if found is None or found.device not in ("auto", device):
        return None
    del _waiting[number]
    with contextlib.suppress(OSError):  # that it is dead is heard when it is listened to
        socket.send_fds(found.mine, [b"\0"], [lock])
    return found


def discard() -> None:
    """End those that nobody took."""
    while _waiting:
        _waiting.popitem()[1].end()


def receive_lock(channel: int) -> int:
    """In the worker: the lock's file descriptor, once it comes; the end of the process where it will not."""
    with socket.socket(fileno=os.dup(channel)) as theirs:
        _, sent, *_ = socket.recv_fds(theirs, 1, 1)
    if not sent:
        os._exit(1)
    return sent[0]


def _environment(device: str, number: int) -> dict[str, str]:
    """As here, with the same modules to be found, and one GPU to be seen."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}
    if device != "cpu":
        seen = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
        environment["CUDA_VISIBLE_DEVICES"] = seen[number] if number < len(seen) else str(number)
    return environment
