"""A study under way, on a terminal or in a notebook: one bar for all of it, with rates, time left and how many runs
are alive.

Quiet where there is neither: a log gets no bar.
"""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from train.pack import PackResult
from train.pack import Progress as PackProgress
from train.plan import PlannedPack, describe


class _Rate(ProgressColumn):
    """Steps and run-steps a second of the pack under way."""

    def render(self, task: Task) -> Text:
        steps, runs = task.fields["steps_per_second"], task.fields["runs"]
        if not steps:
            return Text("compiling or first step", style="dim") if task.fields["pack"] else Text("")
        return Text(f"{steps:.3g} steps/s · {steps * runs:,.0f} run-steps/s")


class RichObserver:
    """Shows a study's progress; use it as a context, so that the terminal is left as it was, whatever happens."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        shown = self.console.is_terminal or self.console.is_jupyter
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.percentage:>3.0f} %"), _Rate(),
            TextColumn("{task.fields[state]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            console=self.console, disable=not shown,
        )  # fmt: skip
        self._task = self._bar.add_task("study", total=1, steps_per_second=0.0, runs=0, pack=0, state="")
        self._packs: list[PlannedPack] = []
        self._done = 0
        self._not_finite = 0
        self._clock = (0, 0.0)

    def __enter__(self) -> RichObserver:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def planned(self, packs: list[PlannedPack], finished: int, device: str) -> None:
        """Say what will be done, and what is there already."""
        self._packs = packs
        total = sum(len(pack.runs) * pack.program.steps for pack in packs)
        self._bar.update(self._task, total=total or 1)
        already = f", {finished} runs are finished already" if finished else ""
        plan = f"{describe(packs)} on {device}{already}"
        self.console.print(plan if packs else f"Nothing to train: all {finished} runs are finished.", soft_wrap=True)

    def pack_started(self, pack: PlannedPack) -> None:
        """Begin a pack's own clock once its first steps are through."""
        number = self._packs.index(pack) + 1
        self._clock = (0, 0.0)
        self._bar.update(
            self._task,
            description=f"pack {number}/{len(self._packs)}",
            runs=len(pack.runs),
            pack=number,
            steps_per_second=0.0,
        )

    def pack_progress(self, pack: PlannedPack, progress: PackProgress) -> None:
        """Move the bar; rates count from the first report, so that compiling does not distort them."""
        step, since = self._clock
        now = time.perf_counter()
        if not since:
            self._clock = (progress.step, now)
        rate = (progress.step - step) / (now - since) if since and now > since else 0.0
        lost = self._not_finite + progress.runs_not_finite(len(pack.runs))
        self._bar.update(
            self._task,
            completed=self._done + progress.step * len(pack.runs),
            steps_per_second=rate,
            state=f"{lost} non-finite" if lost else "all finite",
        )

    def pack_finished(self, pack: PlannedPack, result: PackResult) -> None:
        """Count the pack as done."""
        n = len(pack.runs)
        self._done += n * pack.program.steps
        self._not_finite += int(n - _finite(result, n))
        self._bar.update(self._task, completed=self._done)


def _finite(result: PackResult, runs: int) -> int:
    last = result.train_loss[-1, :runs]
    return int((abs(last) < float("inf")).sum())
