"""What a GPU need not wait for: the next pack's weights are drawn, and the last one's file is written, while it trains.

Both are the processor's work, a second or two between packs that may take no longer than fifteen. On a CPU they would only take
from the training what they save after it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

from train.plan import PlannedPack, free_memory
from train.seeds import Weights, different, stacked_weights

T = TypeVar("T")

OVERLAPS = {"cuda"}  # types of devices on which it pays
MOST_OF_MEMORY = 0.25  # of what the host has left, for weights that wait


class Drawing:
    """The initial weights of the pack that begins, and of one that is likely to come next."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "drawing")
        self._drawn: dict[str, Future[Weights]] = {}

    def begin(self, pack: PlannedPack | None) -> None:
        """Draw this one's too, where there is memory for it; of those drawn before only the last one is kept."""
        if pack is None or pack.hash in self._drawn:
            return
        shape, seeds = pack.program.shape, different(slot.init_seed for slot in pack.slots)
        if 4 * len(seeds) * shape.size <= MOST_OF_MEMORY * free_memory(torch.device("cpu")):
            self._drawn = dict([*self._drawn.items()][-1:])
            self._drawn[pack.hash] = self._pool.submit(stacked_weights, shape, seeds)

    def take(self, pack: PlannedPack) -> Weights | None:
        """A pack's own, waited for; None where it was not expected, or where drawing failed: drawn anew, it will say why."""
        drawn = self._drawn.pop(pack.hash, None)
        return None if drawn is None or drawn.exception() is not None else drawn.result()


class Writing(Generic[T]):
    """One pack's file at a time, written beside the training; what became of it is for the thread that asks.

    `pack` is whose file is being written, or was without anybody having asked.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "writing")
        self.pack: PlannedPack | None = None

    def begin(self, pack: PlannedPack, write: Callable[[], T]) -> None:
        """Write it; the one before has to have been asked about."""
        assert self.pack is None, "one at a time"
        self.pack, self._end = pack, self._pool.submit(write)

    def ended(self, wait: bool = False) -> tuple[PlannedPack, T] | None:
        """The pack and what its `write` returned, told once; None where there is none, or, unless asked to wait, not yet."""
        if self.pack is None or not (wait or self._end.done()):
            return None
        pack, self.pack = self.pack, None
        return pack, self._end.result()
