"""Where a sweep trains its packs: on this machine (`local`) or on a Ray cluster (`on_ray`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, Protocol

import torch

from train.checkpoint import packs_under_way
from train.early import discard
from train.interruption import Interruption
from train.local import Worker, count_workers, train_here, train_in_processes
from train.observer import Observer
from train.one_pack import Setting, Trainer
from train.pack_sizes import read_lowered, read_splits
from train.plan import PlannedPack, pick_device, plan
from train.provenance import device_name
from train.remote import is_url
from train.schedule import Schedule
from train.study import Study, StudyError
from train.text import Text

ExecutorName = Literal["local", "ray"]


class Site(Protocol):
    """A place to train at. directory: the study's, on this machine; device: "cpu" or "cuda", of whatever trains."""

    directory: Path
    device: str

    def fetch(self) -> None:
        """Bring into `directory` what the study's other place holds, if it has one."""

    def send(self, name: str) -> None:
        """Keep a file of `directory` in the study's other place, if it has one."""

    def get_ready(self, runs: int, lock: int) -> None:
        """Begin what takes long to start, for so many runs. lock: as `train` takes it."""

    def plan(self, study: Study, finished: Mapping[str, str]) -> tuple[list[PlannedPack], str]:
        """The packs that are missing, of which no worker is without one where that can be, and the device model's name."""

    def train(
        self, schedule: Schedule, setting: Setting, texts: Mapping[str, Text], lock: int, observer: Observer,
        interruption: Interruption,
    ) -> None:  # fmt: skip
        """Train what the schedule gives, until it gives no more or a signal came. lock: the directory's file descriptor."""


class Here:
    """At this machine."""

    def __init__(self, directory: Path, device: torch.device, workers: int) -> None:
        self.directory, self.device, self._where, self._workers = directory, device.type, device, workers
        self._ready: list[Worker] = []

    def fetch(self) -> None:
        """The directory is the only place."""

    def send(self, name: str) -> None:
        """The directory is the only place."""

    def get_ready(self, runs: int, lock: int) -> None:
        """Start the workers, which take seconds to import what they need, while the study is planned, or take early ones."""
        count = min(self._workers, runs)
        if count > 1:
            self._ready += [Worker(self.device, number, lock) for number in range(count)]
        discard()

    def close(self) -> None:
        """End workers that were started and not needed."""
        for worker in self._ready:
            worker.kill()
        self._ready.clear()

    def plan(self, study: Study, finished: Mapping[str, str]) -> tuple[list[PlannedPack], str]:
        """By the memory that is free here."""
        name = device_name(self._where)
        lowered, splits = read_lowered(self.directory).get(name), read_splits(self.directory).get(name)
        packs = plan(
            study, self._where, finished, lowered, None, self._workers, splits, packs_under_way(self.directory)
        )
        return packs, name

    def train(
        self, schedule: Schedule, setting: Setting, texts: Mapping[str, Text], lock: int, observer: Observer,
        interruption: Interruption,
    ) -> None:  # fmt: skip
        """In this process, where there is one worker or one pack."""
        if min(self._workers, len(schedule.packs)) < 2:
            self.close()
            train_here(schedule, Trainer(setting, self._where, interruption, texts), observer, interruption)
        else:
            train_in_processes(schedule, setting, self._workers, lock, observer, interruption, self._ready)


@contextlib.contextmanager
def make_site(
    executor: ExecutorName, device: str, workers: int | None, ray_address: str | None, out: Path | str
) -> Iterator[Site]:
    """The site that is asked for, given back on leaving; StudyError where it can't be had."""
    if executor == "ray":
        try:
            from train.on_ray import ray_site
        except ImportError as error:
            if (error.name or "").partition(".")[0] != "ray":
                raise
            raise StudyError("the executor 'ray' needs Ray: pip install 'exmy[ray]'") from None
        with ray_site(device, workers, ray_address, out) as site:
            yield site
        return
    if ray_address is not None:
        raise StudyError(f"ray_address {ray_address!r} is for the executor 'ray': add --executor ray, or leave it out")
    if is_url(out):
        raise StudyError(f"{out}: a URL is for the executor 'ray': add --executor ray, or name a directory with --out")
    where = pick_device(device)
    with contextlib.closing(Here(Path(out), where, count_workers(where, workers))) as here:
        yield here
