"""Ctrl-C and SIGTERM while a study trains: the step under way is finished, its pack's state is written down, then the work ends.

A signal's handler only notes it; who trains asks between two steps. A second Ctrl-C leaves at once, as Python does by itself.
What ignores a signal, as a shell's background jobs do SIGINT, goes on ignoring it.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

KEPT = "the packs that were finished are kept"


class Interrupted(KeyboardInterrupt):
    """A signal ended the work between two steps. steps: up to which packs under way are kept, 0 where nothing of one is."""

    def __init__(self, number: int, *steps: int) -> None:
        kept = sorted(step for step in steps if step)
        under_way = "the one under way up to step" if len(kept) == 1 else "those under way up to steps"
        super().__init__(KEPT + (f", and {under_way} {', '.join(map(str, kept))}" if kept else ""))
        self.number, self.steps = number, tuple(kept)

    @property
    def name(self) -> str:
        """The signal's name."""
        return signal.Signals(self.number).name


class Interruption:
    """A context in which SIGINT and SIGTERM are noted, in the main thread; `number` is the first that came, None before."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None and number == signal.SIGINT:
            before = self._before.get(number)
            if not callable(before):
                raise KeyboardInterrupt
            # Python's raises the same; the command line's waits for an import, and knows what was cut off.
            before(number, frame)
            return
        if self.number is None:
            self.number = number
