"""Finished packs shown elsewhere, TensorBoard or Weights & Biases, by an observer that never stands in the training's way.

A hook is given packs as they lie in the study's directory, so that what it shows is what is stored, wherever they were trained.
Which runs are the study's it reads there too, in study.toml, which has each round of a strategy before that is planned.
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
from train.store import PACKS, STUDY_FILE, pack_files, read_pack, runs_of, study_of
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
    """Gives each finished run of a study to a sink, once; an observer, and a context that ends its thread.

    called: what the log calls it. found: packs that the directory holds already are given too.
    """

    def __init__(
        self, called: str, directory: Path, sink: Callable[[], Sink], *, found: bool, patience: float = PATIENCE
    ) -> None:  # fmt: skip
        self._called, self._directory, self._open = called, directory, sink
        self._found, self._patience = found, patience
        self._files: queue.SimpleQueue[Path | None] = (
            queue.SimpleQueue()
        )  # packs, and study.toml where a round is planned
        self._off = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"exmy-{called}", daemon=True)

    def __enter__(self) -> Hook:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.put(None)
        self._thread.join(self._patience)
        if self._thread.is_alive():
            self._off.set()
            log.warning("%s has not taken all runs after %.0f s: left to itself", self._called, self._patience)

    def planned(self, packs: list[PlannedPack], finished: int, device: str) -> None:  # noqa: ARG002
        """The study as it is now, and what is there already."""
        self._files.put(self._directory / STUDY_FILE)
        if self._found:
            for path in pack_files(self._directory):
                self._files.put(path)

    def pack_started(self, pack: PlannedPack) -> None:
        """Nothing: curves are whole or not there."""

    def pack_progress(self, pack: PlannedPack, progress: Progress) -> None:
        """Nothing."""

    def pack_finished(self, pack: PlannedPack, result: PackResult) -> None:  # noqa: ARG002
        """A pack's file is there."""
        self._files.put(self._directory / PACKS / f"{pack.hash}.nc")

    def _work(self) -> None:
        try:
            sink = self._open()
            try:
                self._show_all(sink)
            finally:
                sink.close()
        except Exception as error:  # whatever it is, it is the hook's and not the training's
            said = " ".join(str(error).split()) or type(error).__name__
            log.warning("%s: %s; it is left out from here on, and the training goes on", self._called, said[:300])

    def _show_all(self, sink: Sink) -> None:
        planned: set[str] = set()
        shown: set[str] = set()
        while (path := self._files.get()) is not None:
            if path.name == STUDY_FILE:
                study = study_of(self._directory)
                planned = set(study.identities())
            else:
                self._show(study, path, planned, shown, sink)

    def _show(self, study: Study, path: Path, planned: set[str], shown: set[str], sink: Sink) -> None:
        pack = read_pack(path)
        if (planned - shown).isdisjoint(runs_of(pack)):
            return
        for curves in curves_of(study, pack):
            if self._off.is_set():
                return
            if curves.identity in planned and curves.identity not in shown:
                sink.write(curves)
                shown.add(curves.identity)
