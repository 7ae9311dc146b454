"""Who hears how a study goes: a display, the status file, whoever else wants to."""

from __future__ import annotations

from typing import Protocol

from train.plan import PlannedPack
from train.program import PackResult, Progress


class Observer(Protocol):
    """Who hears how a study goes; `RichObserver`, the default, shows it on a terminal or in a notebook."""

    def planned(self, packs: list[PlannedPack], finished: int, device: str) -> None:
        """Before any training: what will be trained, how many runs are there already, and on what.

        Told again, with all packs, finished ones too, where some had to be planned anew, for want of memory.
        """

    def pack_started(self, pack: PlannedPack) -> None:
        """A pack begins; its first step may compile for a minute."""

    def pack_progress(self, pack: PlannedPack, progress: Progress) -> None:
        """A few steps were made."""

    def pack_finished(self, pack: PlannedPack, result: PackResult) -> None:
        """A pack's results are on the disk. Where another process trained it, `result` has its times alone, and no histories."""


class Together:
    """Several observers as one, each told in turn."""

    def __init__(self, *observers: Observer) -> None:
        self.observers = observers

    def planned(self, packs: list[PlannedPack], finished: int, device: str) -> None:
        """Tell all."""
        for observer in self.observers:
            observer.planned(packs, finished, device)

    def pack_started(self, pack: PlannedPack) -> None:
        """Tell all."""
        for observer in self.observers:
            observer.pack_started(pack)

    def pack_progress(self, pack: PlannedPack, progress: Progress) -> None:
        """Tell all."""
        for observer in self.observers:
            observer.pack_progress(pack, progress)

    def pack_finished(self, pack: PlannedPack, result: PackResult) -> None:
        """Tell all."""
        for observer in self.observers:
            observer.pack_finished(pack, result)
