"""Training losses on their way from the device to the host, a report behind, so that a GPU always has steps to make.

A host that waits for the losses of the step that it has just launched leaves the GPU without work until the next is launched.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Report = tuple[int, NDArray[np.float32]]


class Losses:
    """Reports of (step, losses [R]), in their order: of a GPU each is given when the next one is asked for; of a CPU at once."""

    def __init__(self, device: torch.device) -> None:
        self._behind = device.type == "cuda"
        self._waiting: tuple[int, Tensor, torch.cuda.Event] | None = None

    def report(self, step: int, losses_R: Tensor) -> Iterator[Report]:
        """Send off a step's losses; those before them, which the steps since have given time to arrive."""
        if not self._behind:
            yield step, losses_R.numpy().copy()
            return
        host = torch.empty(losses_R.shape, dtype=losses_R.dtype, pin_memory=True)
        host.copy_(losses_R, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        before, self._waiting = self._waiting, (step, host, arrived)
        yield from self._given(before)

    def rest(self) -> Iterator[Report]:
        """The last ones, waited for."""
        before, self._waiting = self._waiting, None
        yield from self._given(before)

    def _given(self, waiting: tuple[int, Tensor, torch.cuda.Event] | None) -> Iterator[Report]:
        if waiting is not None:
            step, host, arrived = waiting
            arrived.synchronize()
            yield step, host.numpy()
