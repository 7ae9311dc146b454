"""`--executor local`: packs on the GPUs of this machine, a process each, or one pack after the other in this process.

A free worker is sent the next pack. Messages on the socket that a worker shares with this process, pickled, since both are ours:

    to it       Setting, first;  ("train", PlannedPack);  ("expect", PlannedPack or None), likely to be the next;
                ("stop", signal's number): end the step, keep a checkpoint
    from it     ("progress", Progress);  ("log", logger, level, line);  ("report", a pack's hash, Report);  ("free",)

A worker has a session of its own, so that Ctrl-C reaches this process alone, which says it to all. Where it dies, its pack is
tried again by a fresh one; where this process dies, they end by themselves (see `worker`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from train import early
from train.interruption import Interruption
from train.observer import Observer
from train.one_pack import Report, Setting, Trainer
from train.plan import PlannedPack
from train.program import Program
from train.schedule import Schedule
from train.study import StudyError

MODULE = early.MODULE
TICK = 0.2  # seconds between two looks at whether a signal came
PATIENCE = 10.0  # seconds that a worker has to end when nothing is left for it


def count_workers(device: torch.device, asked: int | None) -> int:
    """How many packs are trained at once: as asked, else as many as there are GPUs, one on a CPU; StudyError for too many."""
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    if asked is None:
        return max(1, gpus)
    most = gpus if device.type == "cuda" else os.cpu_count() or 1
    if not 1 <= asked <= most:
        of = "GPUs" if device.type == "cuda" else "CPUs"
        raise StudyError(
            f"workers must be 1 to {most}, the {of} of this machine, got {asked}; leave it out for {max(1, gpus)}"
        )
    return asked


def train_here(schedule: Schedule, trainer: Trainer, observer: Observer, interruption: Interruption) -> None:
    """One pack after the other in this process."""

    def hear(pack: PlannedPack, report: Report) -> None:
        schedule.hear(pack, report)
        if report.result is not None:
            observer.pack_finished(pack, report.result)

    last: Program | None = None
    try:
        while interruption.number is None:
            pack = schedule.take(last)
            if pack is None:
                if not trainer.writing:
                    return
                trainer.finish(hear)  # there may be packs again, where one starts over
                continue
            last = pack.program
            observer.pack_started(pack)
            trainer.expect(schedule.upcoming(last))
            trainer(pack, lambda progress, pack=pack: observer.pack_progress(pack, progress), hear)  # type: ignore[misc]
    finally:
        trainer.finish(hear)


def train_in_processes(
    schedule: Schedule, setting: Setting, workers: int, lock: int, observer: Observer, interruption: Interruption,
    ready: list[Worker],
) -> None:  # fmt: skip
    """As many packs at once as there are workers, on a GPU each where the setting has them.

    lock: the directory's. ready: workers that are started already; what is needed of them is taken out.
    """
    crew: list[Worker] = []

    def start(number: int) -> Worker:
        worker = ready.pop(0) if ready and ready[0].number == number else Worker(setting.device, number, lock)
        worker.begin(setting)
        return worker

    with contextlib.ExitStack() as stack:
        stack.callback(lambda: _end(crew))
        told = False
        while True:
            if interruption.number is not None and not told:
                told = True
                for worker in crew:
                    worker.tell("stop", interruption.number)
            if not told:
                _give(schedule, crew, workers, start, observer)
            busy = {worker.connection: worker for worker in crew if worker.packs or worker.pack}
            if not busy:
                return
            for connection in wait(list(busy), TICK):
                worker = busy[connection]  # type: ignore[index]
                if not _hear(worker, schedule, observer, told):
                    crew.remove(worker)


def _give(
    schedule: Schedule, crew: list[Worker], workers: int, start: Callable[[int], Worker], observer: Observer
) -> None:
    """Each free worker, and each that is still to be started, the next pack, while there are some."""
    places: dict[int, Worker | None] = dict.fromkeys(range(workers))
    for number, worker in (places | {worker.number: worker for worker in crew}).items():
        if worker is not None and worker.pack is not None:
            continue
        pack = schedule.take(worker.last if worker else None)
        if pack is None:
            return
        if worker is None:
            worker = start(number)
            crew.append(worker)
        observer.pack_started(pack)
        worker.train(pack)
        worker.tell("expect", schedule.upcoming(pack.program, workers - 1))  # what the others will take before


def _hear(worker: Worker, schedule: Schedule, observer: Observer, told: bool) -> bool:
    """One message of a worker that has packs; False where it is the last, since the worker is dead."""
    try:
        word, *content = worker.connection.recv()
    except (EOFError, OSError):
        how = worker.buried()
        for pack in worker.packs.values():
            schedule.lost(pack, how)
        return False
    if word == "progress":
        assert worker.pack is not None
        observer.pack_progress(worker.pack, content[0])
    elif word == "log":
        logging.getLogger(content[0]).log(content[1], "%s", content[2])
    elif word == "free":
        worker.pack = None
    else:
        pack, report = worker.packs.pop(content[0]), content[1]
        if report.end == "interrupted" and not told:  # by a signal that it alone got
            schedule.lost(pack, "was stopped by a signal")
            worker.kill()
            return False
        schedule.hear(pack, report)
        if report.result is not None:
            observer.pack_finished(pack, report.result)
    return True


class Worker:
    """A process of `train.worker`; `pack` is what it trains, None where it is free, `last` the program that it has compiled.

    packs: by their hash, of which it has not reported: that one, and one whose file it may still be writing.
    """

    def __init__(self, device: str, number: int, lock: int) -> None:
        started = early.take(device, number, lock) or early.start(device, number, lock, MODULE)
        self.number, self.pack, self.last, self.packs = number, None, None, {}
        self.process, self._errors = started.process, started.errors
        self.connection = Connection(started.mine.detach())

    def begin(self, setting: Setting) -> None:
        """Tell it what its packs will have in common; before any of them."""
        self._send(setting)

    pack: PlannedPack | None
    last: Program | None
    packs: dict[str, PlannedPack]

    def train(self, pack: PlannedPack) -> None:
        """Give it a pack."""
        self.pack, self.last, self.packs[pack.hash] = pack, pack.program, pack
        self.tell("train", pack)

    def tell(self, word: str, content: object) -> None:
        """Send a message; that it is dead is heard when it is listened to."""
        self._send((word, content))

    def _send(self, message: object) -> None:
        with contextlib.suppress(OSError):
            self.connection.send(message)

    def buried(self) -> str:
        """How a worker ended whose socket has."""
        self.kill(PATIENCE)
        status = self.process.returncode
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
        said = _last_line(self._errors)
        self._errors.close()
        return f"{how} ({said})" if said else how

    def kill(self, patience: float = 0.0) -> None:
        """End it, where it has not ended in so many seconds."""
        self.connection.close()
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _end(crew: Sequence[Worker]) -> None:
    """The free ones end by themselves, once their sockets have; those that train, where an error left them, are killed."""
    for worker in crew:
        worker.connection.close()
        if worker.packs:
            worker.process.kill()
    for worker in crew:
        worker.kill(PATIENCE)


def _last_line(file: Any) -> str:
    """What a dead process said last, at most 200 characters of it."""
    file.seek(0)
    lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return str(lines[-1][:200]) if lines else ""
