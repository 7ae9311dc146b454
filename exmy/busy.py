"""A sign of life for work that may take longer than two seconds: on a terminal, a line with its name and the time it took."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from train.progress import redraws
from train.waiting import PATIENCE


@contextlib.contextmanager
def busy(
    what: str, total: int | None = None, console: Console | None = None, patience: float = PATIENCE
) -> Iterator[Callable[[int, int], None]]:
    """Use as a context around what calls nothing back; what does may say how much is done, and of how much: (done, total).

    The line comes after `patience` seconds, by a thread of its own, and leaves nothing behind.
    """
    console = console or Console(stderr=True)
    if not redraws(console):
        yield lambda _done, _total: None
        return
    counted = (MofNCompleteColumn(),) if total is not None else ()
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        *counted,
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    task = progress.add_task(what, total=total)
    timer = threading.Timer(patience, progress.start)
    timer.daemon = True
    timer.start()
    try:
        yield lambda done, of: progress.update(task, completed=done, total=of)
    finally:
        timer.cancel()
        timer.join()
        progress.stop()
