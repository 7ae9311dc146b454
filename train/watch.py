"""A study under way, in numbers: how fast, how long still, and which runs train; the display and the status file show them.

Rates leave the start of a pack out: its first report holds compiling and the first steps, so a rate looks back from report to
report, over the last `WINDOW` seconds, and over as many steps as bring each of the measures once, where these are taken:
between two of them a pack seems fast, and at one of them to stand still. What is left is the packs' remaining steps, each at
the rate of its own program where one has been measured, else at that of another program scaled by R, parameters and tokens, and
a first step of its own for each program that has not been compiled yet. Where nothing is measured yet there is no estimate
rather than a guess.

Whether a run *diverged* is decided when it has ended (`stability`). While it runs, two counts are cheap and honest:
`non_finite`, a training loss that is NaN or infinite, and `no_progress`: after warm-up, the mean of the last `REPORTS` reported
losses is not below the line that the ended run will be held against: the text's unigram entropy, as `text` defines it where a
share is noise, less the study's margin. `dead` are those of the first that nothing can bring back (see `dead`); a pack of these
alone ends before its last step, which its rate does not count as made.
"""

from __future__ import annotations

import functools
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from train.plan import PlannedPack
from train.program import PackResult, Program, Progress
from train.stability import DivergenceSettings

WINDOW = 30.0  # seconds that a rate looks back
REPORTS = 3  # whose mean loss is held against the unigram entropy
MARGIN = DivergenceSettings().progress_margin


def live_rule(margin: float = MARGIN) -> str:
    """What "no progress so far" means, in words."""
    return (
        f"no progress so far: after warm-up, the mean of the last {REPORTS} reported losses is not {margin:g} nats below the "
        "text's unigram entropy; whether a run diverged is decided when it has ended"
    )


PackState = Literal["first step", "training", "finished"]


@dataclass(frozen=True)
class PackView:
    """One pack at one moment. Rates are None until two reports came; `seconds_first_step` includes compiling."""

    number: int
    hash: str
    dataset: str
    model: str
    recipes: tuple[str, ...]
    runs: int
    pack_size: int
    state: PackState
    step: int
    steps: int
    seconds: float
    seconds_first_step: float | None
    steps_per_second: float | None
    run_steps_per_second: float | None
    seconds_left: float | None
    alive: int
    non_finite: int
    no_progress: int
    dead: int
    rang: int = 0


@dataclass(frozen=True)
class Snapshot:
    """A whole call of `run_study` at one moment; counts of runs are over the packs that have begun."""

    device: str
    runs_found: int
    runs_planned: int
    packs_planned: int
    packs_finished: int
    run_steps: int
    run_steps_done: int
    seconds: float
    seconds_left: float | None
    alive: int
    non_finite: int
    no_progress: int
    dead: int
    memory_bytes: int | None
    packs: tuple[PackView, ...]
    rang: int = 0


@dataclass
class _Account:
    """What is known of one pack since it began."""

    pack: PlannedPack
    number: int
    began: float
    step: int = 0
    reports: deque[tuple[float, int]] = field(default_factory=deque)
    losses: deque[NDArray[np.float32]] = field(default_factory=lambda: deque(maxlen=REPORTS))
    unigram_entropy: float = math.nan
    memory: int | None = None
    ended: float | None = None
    seconds_first_step: float | None = None
    steady: float | None = None  # steps a second of the whole pack, once it has ended
    dead: int = 0
    rang: int = 0

    @property
    def rate(self) -> float | None:
        """Steps a second, the start left out."""
        if self.steady is not None or len(self.reports) < 2:
            return self.steady
        (since, first), (now, last) = self.reports[0], self.reports[-1]
        return (last - first) / (now - since) if now > since else None

    @functools.cached_property
    def span(self) -> int:
        """Steps from one probe of a measure to its next, of the rarest of them; 0 without any."""
        program = self.pack.program
        return max((program.probe.interval(measure) for measure in program.measures), default=0)

    def hear(self, progress: Progress, now: float) -> None:
        """Take a report in, and forget those that are older than the window, the two latest apart, and than all measures."""
        self.step, self.unigram_entropy, self.memory = progress.step, progress.unigram_entropy, progress.memory
        self.losses.append(progress.loss[: len(self.pack.runs)])
        self.dead = 0 if progress.dead is None else int(progress.dead[: len(self.pack.runs)].sum())
        self.rang = 0 if progress.rang is None else int(progress.rang.sum())
        self.reports.append((now, progress.step))
        while len(self.reports) > 2 and self.reports[1][0] < now - WINDOW:
            if progress.step - self.reports[1][1] < self.span:
                break
            self.reports.popleft()

    def counts(self, margin: float) -> tuple[int, int]:
        """Runs whose last loss is not finite, and finite ones without progress so far."""
        if not self.losses:
            return 0, 0
        finite = np.isfinite(self.losses[-1])
        idle = np.zeros_like(finite)
        if self.step > self.pack.program.warmup and len(self.losses) == REPORTS:
            idle = finite & ~(np.mean(self.losses, axis=0) < self.unigram_entropy - margin)
        return int((~finite).sum()), int(idle.sum())


class Watch:
    """Keeps the accounts of a study under way; give it an observer's events, ask it for a `snapshot` from any thread.

    margin: the study's `divergence.progress_margin`, nats.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        memory: Callable[[], int | None] | None = None,
        margin: float = MARGIN,
    ) -> None:
        self._clock, self._memory, self.margin = clock, memory or memory_in_use, margin
        self._lock = threading.Lock()
        self._began = clock()
        self._packs: list[PlannedPack] = []
        self._accounts: dict[str, _Account] = {}
        self._device, self._found = "", 0
        self._bytes: tuple[float, int | None] = (-math.inf, None)

    def planned(self, packs: list[PlannedPack], finished: int, device: str) -> None:
        """All that this call will train; told again, what that has become, and packs that are not among them are forgotten."""
        with self._lock:
            if not self._packs:
                self._began = self._clock()
            self._packs, self._found, self._device = packs, finished, device
            still = {pack.hash for pack in packs}
            self._accounts = {key: account for key, account in self._accounts.items() if key in still}

    def pack_started(self, pack: PlannedPack) -> None:
        """A pack begins, or begins again."""
        with self._lock:
            before = self._accounts.get(pack.hash)
            number = before.number if before else 1 + max((a.number for a in self._accounts.values()), default=0)
            self._accounts[pack.hash] = _Account(pack, number, self._clock())

    def pack_progress(self, pack: PlannedPack, progress: Progress) -> None:
        """A report of a pack under way."""
        with self._lock:
            now = self._clock()
            self._accounts[pack.hash].hear(progress, now)
            if progress.memory is not None:
                under_way = (account for account in self._accounts.values() if account.ended is None)
                self._bytes = (now, sum(account.memory or 0 for account in under_way))
            elif now - self._bytes[0] >= 1:  # asking costs more than a report
                self._bytes = (now, self._memory())

    def pack_finished(self, pack: PlannedPack, result: PackResult) -> None:
        """A pack's end; its own clock knows exactly how long the first step took."""
        with self._lock:
            account = self._accounts[pack.hash]
            made = pack.program.steps if result.steps_made is None else result.steps_made
            account.ended, account.step = self._clock(), made
            account.seconds_first_step = result.seconds_first_step
            rest = result.seconds - result.seconds_first_step
            if made > 1 and rest > 0:
                account.steady = (made - 1) / rest

    def snapshot(self) -> Snapshot:
        """Everything at this moment."""
        with self._lock:
            now = self._clock()
            views = tuple(self._view(account, now) for account in self._accounts.values())
            return Snapshot(
                device=self._device,
                runs_found=self._found,
                runs_planned=sum(len(pack.runs) for pack in self._packs),
                packs_planned=len(self._packs),
                packs_finished=sum(view.state == "finished" for view in views),
                run_steps=sum(len(pack.runs) * pack.program.steps for pack in self._packs),
                run_steps_done=sum(v.runs * (v.steps if v.state == "finished" else v.step) for v in views),
                seconds=now - self._began,
                seconds_left=self._left(now),
                alive=sum(view.alive for view in views),
                non_finite=sum(view.non_finite for view in views),
                no_progress=sum(view.no_progress for view in views),
                dead=sum(view.dead for view in views),
                memory_bytes=self._bytes[1],
                packs=views,
                rang=sum(view.rang for view in views),
            )

    def _view(self, account: _Account, now: float) -> PackView:
        pack, rate = account.pack, account.rate
        non_finite, no_progress = account.counts(self.margin)
        finished = account.ended is not None
        return PackView(
            number=account.number,
            hash=pack.hash,
            dataset=pack.program.dataset,
            model=pack.runs[0].model.label,
            recipes=tuple(dict.fromkeys(run.recipe.name for run in pack.runs)),
            runs=len(pack.runs),
            pack_size=pack.size,
            state="finished" if finished else "training" if account.reports else "first step",
            step=account.step,
            steps=pack.program.steps,
            seconds=(now if account.ended is None else account.ended) - account.began,
            seconds_first_step=account.seconds_first_step,
            steps_per_second=rate,
            run_steps_per_second=None if rate is None else rate * len(pack.runs),
            seconds_left=0.0 if finished else self._pack_left(account, now),
            alive=len(pack.runs) - non_finite,
            non_finite=non_finite,
            no_progress=no_progress,
            dead=account.dead,
            rang=account.rang,
        )

    def _pack_left(self, account: _Account, now: float) -> float | None:
        pack = account.pack
        per_step = 1 / account.rate if account.rate else self._seconds_per_step(pack)
        if per_step is None:
            return None
        steps = pack.program.steps - account.step
        if account.reports:  # since the last report some of them were made
            return max(0.0, steps * per_step - (now - account.reports[-1][0]))
        return steps * per_step + max(0.0, self._first_step(pack) - (now - account.began))

    def _left(self, now: float) -> float | None:
        """Seconds until all packs are done; None where no rate is known to reckon with."""
        waiting = [pack for pack in self._packs if pack.hash not in self._accounts]
        under_way = [account for account in self._accounts.values() if account.ended is None]
        parts = [self._pack_left(account, now) for account in under_way]
        compiled = {account.pack.program for account in self._accounts.values()}
        for pack in waiting:
            per_step = self._seconds_per_step(pack)
            first = self._first_step(pack) if pack.program not in compiled else self._next_first_step(pack)
            compiled.add(pack.program)
            parts.append(None if per_step is None else pack.program.steps * per_step + first)
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        # As many go on at once as are under way now, and none of them ends before it is done.
        return max([sum(known) / max(1, len(under_way)), *known[: len(under_way)]], default=0.0)

    def _seconds_per_step(self, pack: PlannedPack) -> float | None:
        """Of the latest pack of the same program, or of another, scaled by its work."""
        measured = [(account.pack, account.rate) for account in self._accounts.values() if account.rate]
        same = [rate for other, rate in measured if (other.program, other.size) == (pack.program, pack.size)]
        if same:
            return 1 / same[-1]
        if not measured:
            return None
        other, rate = measured[-1]
        return _work(pack) / _work(other) / rate

    def _first_step(self, pack: PlannedPack) -> float:
        """Seconds of a pack's first step, as far as packs before it tell."""
        ended = [a for a in self._accounts.values() if a.seconds_first_step is not None]
        if any(a.pack.program == pack.program for a in ended):
            return self._next_first_step(pack)
        return next((a.seconds_first_step or 0.0 for a in reversed(ended)), 0.0)

    def _next_first_step(self, pack: PlannedPack) -> float:
        """The same for a program that has been compiled before: as the second of its packs took; little, if none has."""
        again = [
            a.seconds_first_step
            for a in self._accounts.values()
            if a.pack.program == pack.program and a.seconds_first_step
        ]
        return again[-1] if len(again) > 1 else 0.0


def _work(pack: PlannedPack) -> float:
    """What a step costs, up to a factor: runs × tokens × parameters."""
    program: Program = pack.program
    return float(pack.size * program.sequences * program.shape.context * program.shape.size)


def memory_in_use() -> int | None:
    """Bytes: what PyTorch has reserved on the GPU where it uses one, else what this process holds; None where that is unknown."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.memory_reserved())
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None
