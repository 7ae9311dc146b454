"""Finished packs shown elsewhere, TensorBoard or Weights & Biases, by an observer that never stands in the training's way.

A hook is given packs as they lie in the study's directory, so that what it shows is what is stored, wherever they were trained.
It works in a thread of its own. When it fails, for want of network or disk, that is a line in the log, and it is given no more.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Protocol

from train.curves import Curves, curves_of
from train.plan import PlannedPack
from train.program import PackResult, Progress
from train.store import PACKS, pack_files, read_pack
from train.study import Study

PATIENCE = 60.0  # seconds that the end of a study waits for its hooks

log = logging.getLogger(__name__)


class Sink(Protocol):
    """Where a run's curves go."""

    def write(self, curves: Curves) -> None:
        """All of a run; written again, it replaces what was written before."""

    def close(self) -> None:
        """Nothing more will come."""


class Hook:
    """Gives each pack of a study that is finished, before or now, to a sink; an observer, and a context that ends its thread.

    called: what the log calls it. found: packs that the directory holds already are given too.
    """

    def __init__(
        self, called: str, study: Study, directory: Path, sink: Callable[[], Sink], *, found: bool, patience: float = PATIENCE
    ) -> None:  # fmt: skip
        self._called, self._study, self._directory, self._open = called, study, directory, sink
        self._found, self._patience = found, patience
        self._packs: queue.SimpleQueue[Path | None] = queue.SimpleQueue()
        self._off = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"exmy-{called}", daemon=True)

    def __enter__(self) -> Hook:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._packs.put(None)
        self._thread.join(self._patience)
        if self._thread.is_alive():
            self._off.set()
            log.warning("%s has not taken all runs after %.0f s: left to itself", self._called, self._patience)

    def planned(self, packs: list[PlannedPack], finished: int, device: str) -> None:  # noqa: ARG002
        """What is there already."""
        if self._found:
            for path in pack_files(self._directory):
                self._packs.put(path)

    def pack_started(self, pack: PlannedPack) -> None:
        """Nothing: curves are whole or not there."""

    def pack_progress(self, pack: PlannedPack, progress: Progress) -> None:
        """Nothing."""

    def pack_finished(self, pack: PlannedPack, result: PackResult) -> None:  # noqa: ARG002
        """A pack's file is there."""
        self._packs.put(self._directory / PACKS / f"{pack.hash}.nc")

    def _work(self) -> None:
        try:
            sink = self._open()
            try:
                while (path := self._packs.get()) is not None:
                    self._show(path, sink)
            finally:
                sink.close()
        except Exception as error:  # whatever it is, it is the hook's and not the training's
            said = " ".join(str(error).split()) or type(error).__name__
            log.warning("%s: %s; it is left out from here on, and the training goes on", self._called, said[:300])

    def _show(self, path: Path, sink: Sink) -> None:
        planned = {run.identity for run in self._study.runs()}
        for curves in curves_of(self._study, read_pack(path)):
            if self._off.is_set():
                return
            if curves.identity in planned:
                sink.write(curves)
