"""A process that trains the packs that it is sent, one after the other: `python -P -m train.worker CHANNEL LOCK DEVICE`.

CHANNEL is a socket that it shares with the sweep's own process (`local` writes down the messages), LOCK the study directory's
lock, which it holds too by having it open; "-" where it comes over the socket (see `early`). Where that process is gone, the
socket ends, and so does this process, at once: what is on the disk is whole at any instant. A GPU is chosen by
CUDA_VISIBLE_DEVICES, so that each worker sees its own as the first: compiled code is kept by the device's number, and so one
worker's serves all.
"""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from train.compiling import warm_up
from train.early import LATER, receive_lock
from train.interruption import Interruption
from train.one_pack import Report, Setting, Trainer
from train.plan import PlannedPack, pick_device
from train.program import Progress
from train.watch import memory_in_use

TICK = 0.05  # seconds between two looks at whether a file is written


class Channel:
    """The worker's end of the socket; messages are (word, ...)."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._sending = connection, threading.Lock()

    def send(self, *message: Any) -> None:
        """From any thread; nothing where nobody listens any more."""
        with self._sending:
            try:
                self._connection.send(message)
            except OSError:
                os._exit(1)

    def receive(self) -> Any:
        """The next message; the end of the process where there will be none."""
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            os._exit(1)


class Lines(logging.Handler):
    """Lines of the log, for the sweep's process to say."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        """One line."""
        self._channel.send("log", record.name, record.levelno, record.getMessage())


def serve(channel: Channel) -> None:
    """Train until the channel ends."""
    setting: Setting = channel.receive()
    if torch.get_num_threads() != setting.threads:
        torch.set_num_threads(setting.threads)
    device = pick_device(setting.device)
    if device.type == "cuda":
        torch.cuda.set_device(0)
    packs: queue.SimpleQueue[PlannedPack] = queue.SimpleQueue()

    def hear(pack: PlannedPack, report: Report) -> None:
        channel.send("report", pack.hash, report)

    with Interruption() as interruption:
        trainer = Trainer(setting, device, interruption)
        threading.Thread(target=_listen, args=(channel, packs, trainer), daemon=True).start()
        while True:
            try:
                pack = packs.get(timeout=TICK if trainer.writing else None)
            except queue.Empty:
                trainer.listen(hear)
                continue
            trainer(pack, lambda progress: channel.send("progress", _measured(progress)), hear)
            channel.send("free")


def _listen(channel: Channel, packs: queue.SimpleQueue[PlannedPack], trainer: Trainer) -> None:
    interruption = trainer.interruption
    while True:
        word, content = channel.receive()
        if word == "train":
            packs.put(content)
        elif word == "expect":
            trainer.expect(content)
        elif interruption.number is None:
            interruption.number = content


def _measured(progress: Progress) -> Progress:
    return replace(progress, memory=memory_in_use())


def main() -> None:
    """The process, from its arguments on."""
    shared, lock, device = sys.argv[1:4]
    channel = Channel(Connection(int(shared)))
    for descriptor in (shared, *([] if lock == LATER else [lock])):
        os.set_inheritable(int(descriptor), False)
    logging.basicConfig(level=logging.INFO, handlers=[Lines(channel)], force=True)
    for noisy in ("torch", "matplotlib", "h5py"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.captureWarnings(capture=True)
    warm_up(pick_device(device).type)
    if lock == LATER:  # it is held from now on, by being open
        os.set_inheritable(receive_lock(int(shared)), False)
    serve(channel)


if __name__ == "__main__":
    main()
