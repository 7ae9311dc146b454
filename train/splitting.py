"""A study that has fewer packs than workers: its largest packs are split, so that no worker is idle.

    128 runs on one GPU      a pack of 128          cost 128 + 8       (`plan.OVERHEAD`: what a step costs at any R)
    on four                  four packs of 32       cost  32 + 8, at once

R is part of a program, so a run's bits are those of the smaller R, on any number of workers: what was split is written down
(`pack_sizes`), and a study that goes on with other workers keeps it. A pack that has a checkpoint is never split, nor is one
whose size the study says. Each time the pack that takes longest goes down to the next smaller R of the list, with all packs of
its program, as long as some worker has none; of the plans on the way the one is taken that is done first.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from train.program import Program
from train.settings import PACK_SIZES

if TYPE_CHECKING:
    from train.study import Run


@dataclass(frozen=True)
class Portion:
    """Runs of one program that are still to be trained, and their R; is_fixed: whether it stays.

    restarted_from, split_from: as a `PlannedPack` has them.
    """

    program: Program
    runs: Sequence[Run]
    size: int
    restarted_from: int | None = None
    split_from: int | None = None
    is_fixed: bool = False

    @property
    def packs(self) -> int:
        """How many they come to."""
        return -(-len(self.runs) // self.size)

    def cost(self, overhead: int) -> float:
        """Of one of its packs, in any unit."""
        program, shape = self.program, self.program.shape
        a_run = program.steps * program.sequences * shape.context * shape.size
        return float((self.size + overhead) * a_run)


def split(portions: Sequence[Portion], workers: int, overhead: int, least: int) -> list[Portion]:
    """The portions at the R of the list, not below `least`, at which so many workers are done first."""
    best = now = list(portions)
    while sum(portion.packs for portion in now) < workers:
        splittable = [i for i, p in enumerate(now) if p.runs and not p.is_fixed and p.size > least]
        if not splittable:
            break
        i = max(splittable, key=lambda i: now[i].cost(overhead))
        size = max(other for other in PACK_SIZES if other < now[i].size)
        before = now[i].split_from or now[i].size
        now = [*now[:i], replace(now[i], size=size, split_from=before), *now[i + 1 :]]
        if _seconds(now, workers, overhead) < _seconds(best, workers, overhead):
            best = now
    return best


def _seconds(portions: Sequence[Portion], workers: int, overhead: int) -> float:
    """Until all packs are trained, the longest first, in the unit of their cost."""
    free = [0.0] * workers
    for cost in sorted((p.cost(overhead) for p in portions for _ in range(p.packs)), reverse=True):
        heapq.heappush(free, heapq.heappop(free) + cost)
    return max(free)
