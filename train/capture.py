"""Work on a GPU recorded once as a CUDA graph and replayed: a step is thousands of launches, and then it is one.

A graph is tied to the addresses of the tensors that it reads and writes, so it belongs to a pack; recording one takes a
fraction of a second, and what is slow to make, the compiled code, is cached on the disk between processes (see `compiling`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from train.collection import no_collection


class Recorded:
    """Work without arguments or result, on tensors that stay where they are; the same bits whether launched or replayed.

    The first call runs it as it is, which compiles what is to be compiled; the second records it; from then on it is
    replayed. Where there is nothing to record on (`enabled` False) every call runs it as it is. Several can share the memory
    of `beside`, as long as none of them leaves anything there for later.
    """

    def __init__(self, enabled: bool, beside: Recorded | None = None) -> None:
        self._enabled, self._beside = enabled, beside
        self._warm = False
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, work: Callable[[], None]) -> None:
        """Run or replay. The work is the same every time; it comes with the call, so that who owns both makes no cycle."""
        if not self._enabled:
            work()
            return
        if not self._warm:
            with no_collection():  # the compiler makes millions of objects that stay
                work()
            self._warm = True
            return
        if self._graph is None:
            self._graph = self._record(work)
        self._graph.replay()

    def _record(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        pool = self._beside._graph.pool() if self._beside and self._beside._graph else None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            work()
        return graph
