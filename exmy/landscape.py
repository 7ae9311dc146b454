"""`exmy landscape`: measure what weights a study has, with a bar on a terminal, and say where the numbers are."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from exmy.console import output
from train.afterwards import Measured, measure_study
from train.afterwards import Progress as Points
from train.measures import Quantisers
from train.progress import redraws
from train.quantities import duration, number


class Shown:
    """A bar of points with rate and time left, where a terminal can show it; nothing elsewhere."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.console, self._clock = console or Console(stderr=True), clock
        self._began = clock()
        self._bar: Progress | None = None

    def __enter__(self) -> Shown:
        if redraws(self.console):
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._task = self._bar.add_task("points", total=None, rate="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, points: Points) -> None:
        """As far as it is now."""
        if self._bar:
            rate = points.done / max(self._clock() - self._began, 1e-9)
            shown = f"{number(rate)} points/s" if points.done else ""
            what = {"description": points.what} if points.what else {}
            self._bar.update(self._task, total=points.points, completed=points.done, rate=shown, **what)  # type: ignore[arg-type]


def run_landscape(
    directory: Path, measures: Sequence[str], runs: Sequence[str], quantisers: Quantisers | None, device: str,
    epsilons: Sequence[float] = (),
) -> Measured:  # fmt: skip
    """Measure, and print what was done and how to read it. StudyError as `measure_study`."""
    began = time.monotonic()
    with Shown() as shown:
        done = measure_study(directory, measures, runs, quantisers, device, on_progress=shown, epsilons=epsilons)
    console = output()
    console.print(
        f"{directory}: {done.taken} values measured in {duration(time.monotonic() - began)}, {done.found} were there already",
        soft_wrap=True, highlight=False,
    )  # fmt: skip
    if done.taken or done.found:
        console.print(
            f'Results: python -c "from train import open_study; print(open_study({str(directory)!r})[\'landscape\'])"',
            soft_wrap=True, highlight=False,
        )  # fmt: skip
    return done
