"""What a study under way is said to do, from made-up events on a clock of the test's own: all numbers are worked out by hand."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from train import Study
from train.plan import PlannedPack, pick_device, plan
from train.program import PackResult, Progress
from train.progress import EVERY, RichObserver, duration, number, redraws, status_table
from train.watch import MARGIN, WINDOW, Watch

ENTROPY = 3.0
STEPS, WARMUP = 1000, 50


class Clock:
    """Seconds that the test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def packs(models: int = 1, size: int = 4, **tables: Any) -> list[PlannedPack]:
    """Two packs of four runs for each model; models differ in their context, and so in their program."""
    study = Study.model_validate(
        {
            "axes": {
                "recipe": ["e8m7", "e4m3"],
                "learning_rate": [1e-3, 2e-3],
                "seed": 2,
                "context": [16, 32][:models],
            },
            "model": {"layers": 1, "heads": 2, "width": 16},
            "training": {"steps": STEPS, "sequences": 2, "warmup": WARMUP},
            "execution": {"pack_size": size},
            **tables,
        }
    )
    return plan(study, pick_device("cpu"))


def report(step: int, *losses: float) -> Progress:
    return Progress(step, np.array(losses or (2.0,) * 4, np.float32), ENTROPY)


def result(seconds: float, first: float, made: int | None = None) -> PackResult:
    return SimpleNamespace(seconds=seconds, seconds_first_step=first, steps_made=made)  # type: ignore[return-value]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watch(clock: Clock) -> Watch:
    return Watch(clock, memory=lambda: 3 * 2**30)


def test_a_rate_leaves_the_first_step_out(watch: Watch, clock: Clock) -> None:
    todo = packs()
    watch.planned(todo, 0, "cpu")
    watch.pack_started(todo[0])
    clock.now += 60  # a minute of compiling
    watch.pack_progress(todo[0], report(10))
    assert watch.snapshot().packs[0].steps_per_second is None
    assert watch.snapshot().seconds_left is None
    clock.now += 2
    watch.pack_progress(todo[0], report(20))
    view = watch.snapshot().packs[0]
    assert view.steps_per_second == 5
    assert view.run_steps_per_second == 20
    assert view.seconds_left == (STEPS - 20) / 5


def test_time_left_counts_the_waiting_packs_and_their_first_steps(watch: Watch, clock: Clock) -> None:
    todo = packs(models=2)
    assert len(todo) == 4
    by_program = sorted(todo, key=lambda pack: pack.program.shape.context)
    watch.planned(by_program, 0, "cpu")
    watch.pack_started(by_program[0])
    clock.now += 130
    watch.pack_progress(by_program[0], report(STEPS))
    # One first step of 30 s, then 999 steps at 10 a second.
    watch.pack_finished(by_program[0], result(30 + 99.9, 30))
    # The second pack shares the program: compiled already. The two others see twice the tokens, and compile once.
    work = 2 * by_program[2].program.shape.size / by_program[0].program.shape.size
    expected = 100 + 2 * 100 * work + 30
    assert watch.snapshot().seconds_left == pytest.approx(expected)


def test_the_pack_under_way_needs_no_more_than_its_own_steps(watch: Watch, clock: Clock) -> None:
    todo = packs()
    watch.planned(todo, 0, "cpu")
    watch.pack_started(todo[0])
    for step in range(10, STEPS + 1, 10):
        clock.now += 1
        watch.pack_progress(todo[0], report(step))
    assert watch.snapshot().packs[0].seconds_left == 0
    assert watch.snapshot().seconds_left == pytest.approx(STEPS / 10)  # the second pack
    clock.now += 1000  # writing takes long: never less than nothing
    assert watch.snapshot().packs[0].seconds_left == 0


def test_a_rate_follows_what_happened_lately(watch: Watch, clock: Clock) -> None:
    todo = packs()
    watch.planned(todo, 0, "cpu")
    watch.pack_started(todo[0])
    for step, each in enumerate([1.0] * 20 + [0.1] * int(10 * WINDOW + 30)):
        clock.now += each
        watch.pack_progress(todo[0], report(step))
    assert watch.snapshot().packs[0].steps_per_second == pytest.approx(10)


def test_a_rate_is_of_as_many_steps_as_bring_every_measure(watch: Watch, clock: Clock) -> None:
    """Steps of 10 ms, 10 s for a probe every 30 of them and 90 s more every 60: 110.6 s for 60 steps, wherever one looks."""
    measures = ["sam_sharpness", "hessian_eigenvalue"]
    probe = {"every": 30, "measures": measures, "intervals": {"hessian_eigenvalue": 60}}
    todo = packs(probe=probe)
    watch.planned(todo, 0, "cpu")
    watch.pack_started(todo[0])
    for step in range(10, 310, 10):
        clock.now += 0.1
        watch.pack_progress(todo[0], report(step))
        if step > 70:
            rate = watch.snapshot().packs[0].steps_per_second
            assert rate is not None
            # A report more or less, and the slowest measure at either end of them.
            assert 60 / 210.7 < rate < 70 / 110.5
        clock.now += 10.0 * (step % 30 == 0) + 90.0 * (step % 60 == 0)


def test_runs_are_counted_by_the_live_definitions(watch: Watch, clock: Clock) -> None:
    """Trains; stays at the entropy; just short of the margin below it; lost."""
    todo = packs()
    watch.planned(todo, 0, "cpu")
    watch.pack_started(todo[0])
    losses = (1.0, ENTROPY, ENTROPY - 0.9 * MARGIN, float("nan"))
    for step in (10, 20, 30, 40):
        watch.pack_progress(todo[0], report(step, *losses))
    state = watch.snapshot()
    assert (state.alive, state.non_finite, state.no_progress) == (3, 1, 0)  # still warming up
    watch.pack_progress(todo[0], report(WARMUP + 10, *losses))
    state = watch.snapshot()
    assert (state.alive, state.non_finite, state.no_progress) == (3, 1, 2)
    watch.pack_progress(todo[0], report(WARMUP + 20, float("inf"), 1.0, 1.0, float("nan")))
    state = watch.snapshot()
    assert (state.alive, state.non_finite) == (2, 2)
    assert state.no_progress == 0  # the mean over three reports: (3 + 3 + 1) / 3 is below 2.9


def test_the_margin_is_the_studys(clock: Clock) -> None:
    watch, todo = Watch(clock, margin=0.9), packs()
    watch.planned(todo, 0, "cpu")
    watch.pack_started(todo[0])
    for step in (60, 70, 80):
        watch.pack_progress(todo[0], report(step, ENTROPY - 0.8, ENTROPY - 1.0, 1.0, 1.0))
    assert watch.snapshot().no_progress == 1


def test_one_batch_that_is_hard_is_no_lack_of_progress(watch: Watch) -> None:
    todo = packs()
    watch.planned(todo, 0, "cpu")
    watch.pack_started(todo[0])
    for step, loss in ((60, 2.0), (70, 2.0), (80, 4.0)):
        watch.pack_progress(todo[0], report(step, *(loss,) * 4))
    assert watch.snapshot().no_progress == 0


def test_a_pack_that_ended_early_is_done_and_its_rate_is_of_the_steps_that_it_made(watch: Watch, clock: Clock) -> None:
    planned = packs()
    first = planned[0]
    watch.planned(planned, 0, "cpu")
    watch.pack_started(first)
    clock.now += 31.0
    dead = np.array([True, True, False, True])
    watch.pack_progress(first, Progress(101, np.full(4, np.nan, np.float32), ENTROPY, dead))
    assert (watch.snapshot().dead, watch.snapshot().packs[0].dead) == (3, 3)
    watch.pack_finished(first, result(seconds=31.0, first=21.0, made=101))
    state = watch.snapshot()
    assert state.packs[0].step == 101
    assert state.packs[0].steps_per_second == 10.0
    assert state.run_steps_done == state.run_steps / 2
    assert state.seconds_left == pytest.approx(STEPS / 10.0)


def test_padding_is_not_counted(watch: Watch) -> None:
    (todo,) = packs(size=16)
    watch.planned([todo], 0, "cpu")
    watch.pack_started(todo)
    watch.pack_progress(todo, report(10, *[1.0] * 8, *[float("nan")] * 8))
    state = watch.snapshot()
    assert (len(todo.runs), state.alive, state.non_finite) == (8, 8, 0)
    assert state.run_steps == 8 * STEPS
    assert state.run_steps_done == 80


def test_memory_is_told(watch: Watch) -> None:
    todo = packs()
    watch.planned(todo, 0, "cpu")
    watch.pack_started(todo[0])
    watch.pack_progress(todo[0], report(10))
    assert watch.snapshot().memory_bytes == 3 * 2**30


def play(observer: RichObserver, clock: Clock) -> None:
    """Two packs of 100 reports each, a second apart."""
    todo = packs()
    with observer:
        observer.planned(todo, 3, "a CPU")
        for pack in todo:
            observer.pack_started(pack)
            for step in range(10, STEPS + 1, 10):
                clock.now += 1
                observer.pack_progress(pack, report(step, 1.0, 1.0, 4.0, float("nan")))
            observer.pack_finished(pack, result(100, 1))


def test_a_log_gets_plain_lines_now_and_then(clock: Clock) -> None:
    out = io.StringIO()
    play(RichObserver(Console(file=out), clock), clock)
    lines = out.getvalue().splitlines()
    assert "\x1b" not in out.getvalue()
    assert lines[0].startswith("8 runs in 2 packs of 4")
    assert lines[0].endswith("3 runs are finished already")
    assert sum("finished:" in line for line in lines) == 2
    between = [line for line in lines if "step " in line and "left" in line and "finished" not in line]
    assert len(between) == 2 * int(STEPS / 10 // EVERY)
    # After 30 s step 300 is reached; the other pack takes 100 s more.
    assert "pack 1/2: step 300/1000, 10 steps/s, 40 run-steps/s; 3/4 alive, 1 without progress so far" in between[0]
    assert "1:10 left, 2:50 left for all" in between[0]
    assert "for all" not in between[-1]


@pytest.mark.parametrize("width", [80, 200])
def test_a_terminal_gets_a_table_that_fits(clock: Clock, width: int) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width, color_system=None)
    play(RichObserver(console, clock), clock)
    shown = out.getvalue()
    assert "1000/1000" in shown
    assert "100 %" in shown
    assert "2 of 2 packs" in shown
    assert "of 8 runs so far 2 non-finite and 2 without progress" in " ".join(shown.split())
    assert shown.rstrip().endswith("\x1b[?25h")  # the cursor is back


def test_packs_that_train_at_once_have_each_its_own_account(watch: Watch, clock: Clock) -> None:
    """Two at 10 and 5 steps a second, with 980 and 4 steps to go, while two of 1000 steps wait: two go on at a time."""
    todo = packs(size=2)
    watch.planned(todo, 0, "cpu")
    watch.pack_started(todo[0])
    watch.pack_started(todo[1])
    for first_step, second_step in ((10, 991), (20, 996)):
        watch.pack_progress(todo[0], Progress(first_step, np.ones(2, np.float32), ENTROPY, memory=2**30))
        watch.pack_progress(todo[1], Progress(second_step, np.full(2, np.nan, np.float32), ENTROPY, memory=2**31))
        clock.now += 1
    clock.now -= 1
    state = watch.snapshot()
    first, second = state.packs
    assert (first.hash, first.step, second.hash, second.step) == (todo[0].hash, 20, todo[1].hash, 996)
    assert (first.non_finite, second.non_finite, state.alive) == (0, 2, 2)
    assert state.memory_bytes == 3 * 2**30
    assert [first.seconds_left, second.seconds_left] == pytest.approx([98, 4 / 5])
    # All are of one program, whose latest pack makes 5 steps a second.
    assert state.seconds_left == pytest.approx((98 + 4 / 5 + 2 * STEPS / 5) / 2)
    watch.pack_finished(todo[1], result(300, 100))
    assert [view.state for view in watch.snapshot().packs] == ["training", "finished"]


def test_what_is_left_is_never_less_than_the_longest_pack_under_way(watch: Watch, clock: Clock) -> None:
    todo = packs()
    watch.planned(todo, 0, "cpu")
    for pack, step in zip(todo, (10, 900), strict=True):
        watch.pack_started(pack)
        watch.pack_progress(pack, report(step))
    clock.now += 1
    watch.pack_progress(todo[0], report(20))
    watch.pack_progress(todo[1], report(910))
    assert watch.snapshot().seconds_left == pytest.approx(980 / 10)


def test_packs_that_are_planned_anew_take_the_place_of_those_they_were(watch: Watch, clock: Clock) -> None:
    whole, halves = packs(), packs(size=2)
    watch.planned(whole, 3, "cpu")
    clock.now += 5
    for pack in whole:
        watch.pack_started(pack)
        watch.pack_progress(pack, report(10))
    watch.planned([whole[1], *halves[:2]], 3, "cpu")
    state = watch.snapshot()
    assert (state.packs_planned, state.runs_planned, state.run_steps, state.seconds) == (3, 8, 8 * STEPS, 5)
    assert [view.hash for view in state.packs] == [whole[1].hash]
    assert state.run_steps_done == 40


def test_the_table_shows_every_pack_under_way_and_the_latest_before_them(clock: Clock) -> None:
    watch, todo = Watch(clock), packs(models=2, size=1)
    watch.planned(todo, 0, "cpu")
    for pack in todo[:10]:
        watch.pack_started(pack)
    for pack in todo[:3]:
        watch.pack_finished(pack, result(2, 1))

    def shown() -> list[str]:
        out = io.StringIO()
        Console(file=out, width=100).print(status_table(watch.snapshot()))
        return [word for word in out.getvalue().split() if word.endswith("/16")]

    assert shown() == [f"{number}/16" for number in range(4, 11)]
    for pack in todo[3:8]:
        watch.pack_finished(pack, result(2, 1))
    assert shown() == ["7/16", "8/16", "9/16", "10/16"]


def test_the_table_is_drawn_before_anything_began() -> None:
    out = io.StringIO()
    Console(file=out, width=100).print(status_table(Watch().snapshot()))
    assert "0 of 0 packs" in out.getvalue()


def test_a_dumb_terminal_gets_plain_lines(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    out = io.StringIO()
    play(RichObserver(Console(file=out, force_terminal=True), clock), clock)
    assert "pack 2/2 finished" in out.getvalue()


@pytest.mark.parametrize("widgets", [True, False])
def test_a_notebook_redraws_where_it_has_widgets_and_prints_lines_where_not(
    monkeypatch: pytest.MonkeyPatch, *, widgets: bool
) -> None:
    find = importlib.util.find_spec
    there = SimpleNamespace() if widgets else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: there if name == "ipywidgets" else find(name))
    assert redraws(Console(file=io.StringIO(), force_jupyter=True)) is widgets


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(None, "-"), (0.04, "0.0 s"), (9.0, "9.0 s"), (14.2, "14 s"), (59.6, "1:00"), (125, "2:05"), (3723, "1:02:03")],
)
def test_durations(seconds: float | None, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize(("value", "words"), [(None, "-"), (0.01234, "0.0123"), (5, "5"), (6388, "6,388")])
def test_rates(value: float | None, words: str) -> None:
    assert number(value) == words


def test_this_process_holds_memory() -> None:
    from train.watch import memory_in_use

    assert (memory_in_use() or 0) > 10_000_000 or not Path("/proc/self/statm").exists()
