"""A bar for what takes longer than two seconds, on a terminal; nothing anywhere else."""

from __future__ import annotations

from time import monotonic
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

PATIENCE = 2.0  # seconds


class Waiting:
    """Use as a context, and call `advance` at least a few times a second; a `total` of None is a bar without an end."""

    def __init__(self, what: str, total: float | None = None, console: Console | None = None) -> None:
        self.what, self.total = what, total
        self.console = console or Console(stderr=True)
        self._since = monotonic()
        self._done = 0.0
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Waiting:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, amount: float = 0.0) -> None:
        """So much more of `total` is done."""
        self._done += amount
        if self._bar:
            self._bar.update(self._task, completed=self._done)
        elif self.console.is_terminal and monotonic() - self._since > PATIENCE:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn())
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._task = self._bar.add_task(self.what, total=self.total, completed=int(self._done))
            self._bar.start()
