"""A study under way, on a terminal, in a notebook or in a log.

On a terminal and in a notebook: a table of the packs, redrawn in place, with rates, runs alive and time left, and a line
of totals and memory under it. Elsewhere, in a file, a pipe or a batch job's log: plain lines, at the start and the end
of each pack and at most one every `EVERY` seconds between. The numbers are `watch`'s and so are their definitions.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from train.plan import PlannedPack, describe
from train.program import PackResult
from train.program import Progress as PackProgress
from train.quantities import duration as duration
from train.quantities import gibibytes as gibibytes
from train.quantities import number as number
from train.watch import MARGIN, PackView, Snapshot, Watch, live_rule

EVERY = 30.0  # seconds between two plain lines of one pack
SHOWN = (
    4  # packs in the table, or all that are under way, where they are more; the finished ones before them are counted
)


class RichObserver:
    """Shows a study's progress; use it as a context, so that the terminal is left as it was, whatever happens."""

    def __init__(
        self, console: Console | None = None, clock: Callable[[], float] = time.monotonic, margin: float = MARGIN
    ) -> None:
        self.console = console or Console(stderr=True)
        self._clock = clock
        self._watch = Watch(clock, margin=margin)
        self._said = clock()
        self._live: Live | None = None
        if redraws(self.console):
            self._live = Live(
                console=self.console,
                get_renderable=lambda: status_table(self._watch.snapshot(), margin),
                refresh_per_second=2,
            )

    def __enter__(self) -> RichObserver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def planned(self, packs: list[PlannedPack], finished: int, device: str) -> None:
        """Say what will be done, and what is there already."""
        self._watch.planned(packs, finished, device)
        already = f", {finished} runs are finished already" if finished else ""
        plan = f"{describe(packs)} on {device}{already}"
        self._say(plan if packs else f"Nothing to train: all {finished} runs are finished.")
        if self._live and packs:
            self._live.start()

    def pack_started(self, pack: PlannedPack) -> None:
        """Announce it."""
        self._watch.pack_started(pack)
        if not self._live:
            state, view = self._of(pack)
            self._say(f"{_name(state, view)}: {_content(view)}; the first step may have to compile")

    def pack_progress(self, pack: PlannedPack, progress: PackProgress) -> None:
        """A line, where the last one is long ago."""
        self._watch.pack_progress(pack, progress)
        if not self._live and self._clock() - self._said >= EVERY:
            state, view = self._of(pack)
            self._say(f"{_name(state, view)}: {plain_line(state, view)}")

    def pack_finished(self, pack: PlannedPack, result: PackResult) -> None:
        """What it took and what became of its runs."""
        self._watch.pack_finished(pack, result)
        if self._live:
            self._live.refresh()
            return
        state, view = self._of(pack)
        left = "" if state.packs_finished == state.packs_planned else f"; {_left(state.seconds_left)} for all"
        first = duration(view.seconds_first_step)
        made = f"{view.step} steps" + (f" of {view.steps}, then all runs were dead," if view.step < view.steps else "")
        took = f"{made} in {duration(view.seconds)}, {first} of it for the first"
        self._say(f"{_name(state, view)} finished: {took}, then {_rates(view)}; {_runs(view)}{left}")

    def _of(self, pack: PlannedPack) -> tuple[Snapshot, PackView]:
        state = self._watch.snapshot()
        return state, next(view for view in state.packs if view.hash == pack.hash)

    def _say(self, line: str) -> None:
        self._said = self._clock()
        self.console.print(line, soft_wrap=True, highlight=False, markup=False)


def redraws(console: Console) -> bool:
    """Whether a display can be redrawn in place here: on a terminal that moves its cursor, or by Jupyter's widgets."""
    if console.is_jupyter:
        return importlib.util.find_spec("ipywidgets") is not None
    return console.is_terminal and not console.is_dumb_terminal


def status_table(state: Snapshot, margin: float = MARGIN) -> Group:
    """The packs that have begun, latest last, and the totals."""
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="bold", collapse_padding=True)
    for heading in ("pack", "runs", "step", "steps/s", "run-steps/s", "alive", "no progress", "left"):
        table.add_column(heading, justify="left" if heading == "pack" else "right", no_wrap=heading != "pack")
    for view in _shown(state.packs):
        done = view.state == "finished"
        bad = "red" if view.non_finite == view.runs else "yellow"
        table.add_row(
            f"{view.number}/{state.packs_planned} {view.model} {view.dataset}",
            str(view.runs),
            "first step" if view.state == "first step" else f"{view.step}/{view.steps}",
            number(view.steps_per_second),
            number(view.run_steps_per_second),
            Text(f"{view.alive}/{view.runs}", style=bad if view.non_finite else ""),
            Text(str(view.no_progress), style="yellow" if view.no_progress else ""),
            "done" if done else duration(view.seconds_left),
            style="dim" if done else "",
        )
    share = state.run_steps_done / state.run_steps if state.run_steps else 1.0
    totals = Table.grid(padding=(0, 1))
    totals.add_row(
        ProgressBar(total=1.0, completed=share, width=16), Text(f"{100 * share:.0f} %  {totals_line(state)}")
    )
    began = state.alive + state.non_finite
    for_good = f" ({state.dead} for good)" if state.dead else ""
    counts = f"of {began} runs so far {state.non_finite} non-finite{for_good} and {state.no_progress} without progress"
    counts += f"; {state.rang} rang an alarm" if state.rang else ""
    return Group(table, totals, Text(counts), Text(live_rule(margin), style="dim"))


def _shown(packs: Sequence[PackView]) -> list[PackView]:
    """Those under way, and as many of the latest before them as there is room for."""
    under_way = [view for view in packs if view.state != "finished"]
    finished = [view for view in packs if view.state == "finished"]
    latest = finished[max(0, len(finished) - max(0, SHOWN - len(under_way))) :]
    return [view for view in packs if view in under_way or view in latest]


def totals_line(state: Snapshot) -> str:
    """All packs of this call in one line."""
    words = [
        f"{state.packs_finished} of {state.packs_planned} packs",
        f"{duration(state.seconds)} gone",
        _left(state.seconds_left),
        *([gibibytes(state.memory_bytes)] if state.memory_bytes else []),
    ]
    return " · ".join(words)


def plain_line(state: Snapshot, view: PackView) -> str:
    """A pack under way in one line, for a log."""
    memory = f"; {gibibytes(state.memory_bytes)}" if state.memory_bytes else ""
    last = state.packs_planned == view.number
    rest = "" if last else f", {_left(state.seconds_left)} for all"
    return f"step {view.step}/{view.steps}, {_rates(view)}; {_runs(view)}{memory}; {_left(view.seconds_left)}{rest}"


def _name(state: Snapshot, view: PackView) -> str:
    return f"pack {view.number}/{state.packs_planned}"


def _content(view: PackView) -> str:
    few = ", ".join(view.recipes[:4]) + (", ..." if len(view.recipes) > 4 else "")
    return f"{view.runs} runs of {view.model} on {view.dataset} in {few}, {view.steps} steps"


def _rates(view: PackView) -> str:
    if view.steps_per_second is None:
        return "no rate yet"
    return f"{number(view.steps_per_second)} steps/s, {number(view.run_steps_per_second)} run-steps/s"


def _runs(view: PackView) -> str:
    """Counts so far; the words are `watch`'s live definitions, not the study's."""
    rang = f", {view.rang} rang an alarm" if view.rang else ""
    return f"{view.alive}/{view.runs} alive, {view.no_progress} without progress so far{rang}"


def _left(seconds: float | None) -> str:
    return "time left unknown" if seconds is None else f"{duration(seconds)} left"
