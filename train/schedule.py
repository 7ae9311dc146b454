"""Which pack is trained next, and what became of those before: the part that all executors share.

Longest first (Graham 1969): who is free takes the longest pack that waits, so that the last ones to end are short. Packs that are
equally long are taken by who has compiled their program, then by who finds a program that nobody else is at. A pack whose worker
was lost waits behind all others, from its checkpoint; one that was out of memory, and those of its program that wait, start over
at the next smaller R (see `pack_sizes`). No error of a pack ends another: `conclude` tells them when all else is done.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import chain, islice

from train.estimate import pack_operations
from train.interruption import Interrupted, Interruption
from train.one_pack import Report
from train.pack_sizes import Lowered, smaller
from train.plan import PlannedPack, chunked, counted
from train.program import Program
from train.study import StudyError

RETRIES = 3  # of a pack whose worker died

log = logging.getLogger(__name__)


@dataclass
class _Line:
    """The packs of one program that wait; `work` is the first one's, in operations, `at` how many are under way."""

    program: Program
    packs: deque[PlannedPack]
    work: float = 0.0
    at: int = 0

    def weigh(self) -> _Line:
        """Itself, weighed anew."""
        self.work = pack_operations(self.packs[0]) if self.packs else 0.0
        return self


class Schedule:
    """The packs of a sweep, each taken once: `take` one, and give what became of it to `hear`, or to `lost`.

    on_lowered hears of each program that will go on at a smaller R, after its packs were planned anew.
    """

    def __init__(
        self,
        packs: Sequence[PlannedPack],
        on_lowered: Callable[[Program, Lowered], None],
    ) -> None:
        grouped: dict[int, list[PlannedPack]] = {}
        for pack in packs:  # those of a plan share their program: to hash 100,000 would take seconds
            grouped.setdefault(id(pack.program), []).append(pack)
        self._lines: dict[Program, _Line] = {}
        for group in grouped.values():
            self._lines.setdefault(group[0].program, _Line(group[0].program, deque())).packs += group
        self._order = [line.weigh() for line in self._lines.values()]  # the study's, which decides between equals
        self._again: deque[PlannedPack] = deque()
        self._lost: Counter[str] = Counter()
        self._lowered: dict[Program, Lowered] = {}
        self._on_lowered = on_lowered
        self._stopped = ""
        self._kept: list[int] = []
        self._failures: list[str] = []
        self.under_way: dict[str, PlannedPack] = {}
        self.finished: list[PlannedPack] = []
        self.failed: list[PlannedPack] = []

    @property
    def packs(self) -> list[PlannedPack]:
        """All: finished, failed, under way and waiting."""
        waiting = [pack for line in self._order for pack in line.packs]
        return [*self.finished, *self.failed, *self.under_way.values(), *waiting, *self._again]

    def take(self, last: Program | None = None) -> PlannedPack | None:
        """The next pack, for a worker whose last one was of that program; None where none waits."""
        lines = [line for line in self._order if line.packs]
        if self._stopped:
            return None
        if lines:
            longest = max(line.work for line in lines)
            line = _choice([line for line in lines if line.work == longest], last)
            pack = line.packs.popleft()
            if line.packs and line.packs[0].size != pack.size:
                line.weigh()
        elif self._again:
            pack = self._again.popleft()
        else:
            return None
        self.under_way[pack.hash] = pack
        self._lines[pack.program].at += 1
        return pack

    def upcoming(self, last: Program | None = None, after: int = 0) -> PlannedPack | None:
        """What `take` will give once so many other packs were taken, as far as can be told now; None where none is left."""
        lines = sorted(self._order, key=lambda line: (-line.work, line.program != last))
        waiting = chain.from_iterable(line.packs for line in lines)
        return next(islice(chain(waiting, self._again), after, None), None)

    def _give_back(self, pack: PlannedPack) -> None:
        del self.under_way[pack.hash]
        self._lines[pack.program].at -= 1

    def hear(self, pack: PlannedPack, report: Report) -> None:
        """Take in what became of a pack that was taken."""
        self._give_back(pack)
        if report.end == "finished":
            self.finished.append(pack)
        elif report.end == "interrupted":
            self._again.append(pack)
            self._kept.append(report.step)
        elif report.end == "out of memory":
            self._start_over(pack, report.message)
        elif report.end == "failed":
            self._fail([pack], report.message)
        else:
            self._again.append(pack)
            self.stop(report.message)

    def lost(self, pack: PlannedPack, how: str) -> None:
        """Its worker ended in the middle of it: another will try again, `RETRIES` times."""
        self._give_back(pack)
        self._lost[pack.hash] += 1
        if self._lost[pack.hash] > RETRIES:
            self._fail([pack], f"its worker {how}, {self._lost[pack.hash]} times in a row")
            return
        log.warning("%s: its worker %s; another goes on from its checkpoint, behind the others", named(pack), how)
        self._again.append(pack)

    def stop(self, why: str) -> None:
        """No more packs are given out: there is something that would stop every one of them."""
        self._stopped = self._stopped or why
        for line in self._order:
            self._again += line.packs
            line.packs.clear()

    @property
    def stopped(self) -> bool:
        """Whether it was told to `stop`."""
        return bool(self._stopped)

    def conclude(self, interruption: Interruption) -> None:
        """When nothing is under way any more: StudyError or `Interrupted` where packs are left that are not trained."""
        if self._stopped:
            raise StudyError(self._stopped)
        if interruption.number is not None and (self._again or any(line.packs for line in self._order)):
            raise Interrupted(interruption.number, *self._kept)
        if self._failures:
            count = f"{len(self.failed)} of {len(self.packs)} packs could not be trained, the others are finished: "
            raise StudyError(count + "; ".join(self._failures[:3]) + ("; ..." if len(self._failures) > 3 else ""))

    def _fail(self, packs: list[PlannedPack], why: str) -> None:
        self.failed += packs
        failure = (
            ", ".join(map(named, packs[:3])) + (f" and {len(packs) - 3} more" if len(packs) > 3 else "") + f": {why}"
        )
        self._failures.append(failure)
        log.error("%s", failure)

    def _drop(self, line: _Line, packs: Collection[PlannedPack]) -> None:
        """Packs of a line wait no more."""
        gone = {pack.hash for pack in packs}
        line.packs = deque(pack for pack in line.packs if pack.hash not in gone)
        self._again = deque(pack for pack in self._again if pack.hash not in gone)

    def _start_over(self, pack: PlannedPack, why: str) -> None:
        """All that is left of the pack's program, planned anew at the next smaller R."""
        program, size = pack.program, smaller(pack.size)
        line = self._lines[program]
        waiting = [*line.packs, *(other for other in self._again if other.program == program)]
        if size is None:
            gone = [other for other in waiting if other.size == 1]
            need = program.bytes_per_run(compiled=False) / 2**30
            self._drop(line, gone)
            self._fail(
                [pack, *gone],
                f"out of memory with one run at a time, which needs about {need:.1f} GiB ({why}): take fewer training.sequences, "
                "a shorter model.context or a smaller model, or a device with more memory",
            )
            return
        before = self._lowered.get(program)
        lowered = Lowered(min(size, before.size) if before else size, pack.restarted_from or pack.size)
        larger = [other for other in waiting if other.size > lowered.size]
        self._drop(line, larger)
        runs = [run for other in (pack, *larger) for run in other.runs]
        line.packs.extendleft(reversed(chunked(program, runs, lowered.size, lowered.planned)))
        line.weigh()
        self._lowered[program] = lowered
        log.warning(
            "%s: out of memory at R = %d (%s): its runs start over in packs of R = %d%s", named(pack), pack.size, why,
            lowered.size, f", and {counted(len(larger), 'pack')} beside it" if larger else "",
        )  # fmt: skip
        self._on_lowered(program, lowered)


def _choice(lines: Sequence[_Line], last: Program | None) -> _Line:
    """Of lines whose packs are equally long."""
    same = next((line for line in lines if line.program == last), None)
    return same or next((line for line in lines if not line.at), lines[0])


def named(pack: PlannedPack) -> str:
    """A pack in words: its name, and what its runs are."""
    recipes = list(dict.fromkeys(run.recipe.name for run in pack.runs))
    few = ", ".join(recipes[:3]) + (", ..." if len(recipes) > 3 else "")
    return f"pack {pack.hash} ({counted(len(pack.runs), 'run')} of {few}, {pack.runs[0].model.label} on {pack.program.dataset})"
