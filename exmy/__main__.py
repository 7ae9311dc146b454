"""`exmy`, and `python -m exmy`: the command line, from its first import to its exit status."""

from __future__ import annotations

import _thread
import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from sys import UnraisableHookArgs
    from types import FrameType

PATIENCE = 5.0  # seconds, that an import is given to end after Ctrl-C
FILES = ("h5netcdf", "h5py", "xarray")  # whose files are half open, or half closed, where Ctrl-C fell into that
_asked: list[float] = []  # when Ctrl-C came, while it waits for an import
_pending: list[threading.Timer] = []  # Ctrl-C that comes again
_stopped = threading.Event()  # a Ctrl-C has cut something off


def program() -> NoReturn:
    """The command line as a process of its own: `run`, and its end without taking all that was imported apart, which with PyTorch
    takes a second, and longer where there are a GPU's graphs.
    """
    status: int | str | None = 0
    try:
        run()
    except SystemExit as end:
        status = end.code
    except KeyboardInterrupt:
        status = 130
    _end_quietly()
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    # What Python does at its end before that: threads and pools are waited for, what asked to be called is called.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    _flush()
    os._exit(status or 0)


def run() -> None:
    """Do what the command line says. A Ctrl-C that comes before there is a command ends like one that comes after: with 130."""
    sys.unraisablehook = _lost
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _between_imports)
    try:
        from exmy.cli import main

        main()
    except KeyboardInterrupt:
        status: int | str | None = 130
    except SystemExit as end:
        status = end.code
    else:
        status = 0
    if any(thread.name == "exmy-call" for thread in threading.enumerate()):
        # A judged function that never came back: Python would end its thread from within, and C++ the process with an abort.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else int(status is not None))
    sys.exit(status)


def _between_imports(number: int, frame: FrameType | None) -> None:
    """Ctrl-C, as Python has it, but for one that falls into an import: that is ended first. Libraries of C and C++ take an
    exception there for "not installed", go on with half a module, or abort. One that takes longer is not waited for.
    """
    now = time.monotonic()
    inside = frame if not _asked or now - _asked[0] < PATIENCE else None
    while inside is not None:
        if inside.f_code.co_filename == "<frozen importlib._bootstrap>":
            _asked[:] = _asked or [now]
            _again()
            return
        inside = inside.f_back
    _asked.clear()
    _stopped.set()
    signal.default_int_handler(number, frame)


def _again() -> None:
    """The same Ctrl-C once more, a moment later."""
    later = threading.Timer(0.01, _thread.interrupt_main)
    later.daemon = True  # a command that has ended by then is not waited for
    _pending.append(later)
    later.start()


def _lost(lost: UnraisableHookArgs) -> None:
    """A Ctrl-C that falls into a finaliser, where Python prints it and goes on, comes again when that is over.

    A file that Ctrl-C left half open or half closed can't be closed by its finaliser. That is of no use to be told: what exmy
    writes is whole or not there. All else is told, and of files that nothing cut off this too.
    """
    if issubclass(lost.exc_type, KeyboardInterrupt):
        _stopped.set()
        _again()
    elif not (_stopped.is_set() and str(getattr(lost.object, "__module__", "")).partition(".")[0] in FILES):
        sys.__unraisablehook__(lost)


def _end_quietly() -> None:
    """The command has said its last line: no Ctrl-C comes again, and one that is new ends the process at once, without a word."""
    for later in _pending:
        later.cancel()
    if signal.getsignal(signal.SIGINT) in (_between_imports, signal.default_int_handler):
        _flush()
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


if __name__ == "__main__":
    program()
