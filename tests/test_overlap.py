"""Files written, and weights drawn, beside the training: the same bits, whatever happens meanwhile, and nothing told too soon."""

from __future__ import annotations

import errno
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.kill_harness import differences
from tests.test_execute import Recorder, tiny
from train import StudyError, local, one_pack, overlap, run_study
from train.interruption import Interrupted
from train.overlap import Drawing, Writing
from train.plan import PlannedPack, plan
from train.program import PackResult, Progress
from train.schedule import Schedule
from train.seeds import initial_weights, stacked_weights
from train.store import pack_tree, write_pack

CPU = torch.device("cpu")
PATIENCE = 60.0  # seconds after which a test that waits in vain fails


@pytest.fixture
def overlapping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_pack, "OVERLAPS", {"cpu"})


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two packs of `tiny`, one after the other."""
    directory = tmp_path_factory.mktemp("alone")
    run_study(tiny(), directory, "cpu", Recorder())
    return directory


class Diary(Recorder):
    """Writes down what it hears, packs by their place; does something at a report of the n-th pack."""

    def __init__(self, directory: Path, at_pack: int = -1, action: Callable[[], None] | None = None) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.directory, self.pack, self.then = directory, at_pack, action

    def place(self, pack: PlannedPack) -> int:
        return 1 + [other.hash for other in self.packs].index(pack.hash)

    def pack_started(self, pack: PlannedPack) -> None:
        super().pack_started(pack)
        self.lines.append(f"{self.place(pack)} began")

    def pack_progress(self, pack: PlannedPack, progress: Progress) -> None:
        self.lines.append(f"{self.place(pack)} at {progress.step}")
        if self.place(pack) == self.pack and self.then:
            self.then()

    def pack_finished(self, pack: PlannedPack, result: PackResult) -> None:
        assert (self.directory / "packs" / f"{pack.hash}.nc").exists()
        assert not (self.directory / "checkpoints" / pack.hash).exists()
        self.lines.append(f"{self.place(pack)} ended")


def held_until(event: threading.Event, monkeypatch: pytest.MonkeyPatch) -> list[threading.Thread]:
    """The first file is not written before the event; who writes files, in their order."""
    save, writers = one_pack.save, list[threading.Thread]()

    def wait_and_save(*arguments: Any) -> None:
        writers.append(threading.current_thread())
        assert len(writers) > 1 or event.wait(PATIENCE)
        save(*arguments)

    monkeypatch.setattr(one_pack, "save", wait_and_save)
    return writers


@pytest.mark.usefixtures("overlapping")
def test_a_pack_trains_while_the_file_of_the_one_before_is_written(
    tmp_path: Path, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    event = threading.Event()
    writers = held_until(event, monkeypatch)
    diary = Diary(tmp_path, 2, event.set)
    outcome = run_study(tiny(), tmp_path, "cpu", diary)
    assert (outcome.trained, outcome.found) == (8, 0)
    began, ended = ["1 began", "1 at 10", "1 at 12", "2 began", "2 at 10"], ["2 at 12", "2 ended"]
    assert diary.lines in ([*began, "1 ended", *ended], [*began, ended[0], "1 ended", ended[1]])
    assert threading.main_thread() not in writers
    assert list(differences(tmp_path, alone)) == []
    assert not list((tmp_path / "checkpoints").glob("*"))


def test_on_a_cpu_each_file_is_there_before_the_next_pack_begins(tmp_path: Path) -> None:
    diary = Diary(tmp_path)
    run_study(tiny(), tmp_path, "cpu", diary)
    assert [line for line in diary.lines if " at " not in line] == ["1 began", "1 ended", "2 began", "2 ended"]


@pytest.mark.usefixtures("overlapping")
def test_a_full_disk_ends_the_pack_that_trains_meanwhile_and_all_goes_on_from_there(
    tmp_path: Path, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = threading.Event()

    def wait() -> None:
        assert failed.wait(PATIENCE)

    def full(directory: Path, *_: Any) -> Path:
        if directory == (tmp_path / "study").absolute():
            failed.set()
            raise OSError(errno.ENOSPC, "No space left on device")
        return directory / "rescued.nc"

    study = tiny(training={"steps": 30}, execution={"pack_size": 4, "checkpoint_seconds": 1e-9})
    with monkeypatch.context() as patch:
        patch.setattr(one_pack, "write_pack", full)
        diary = Diary(tmp_path / "study", 2, wait)
        with pytest.raises(StudyError, match=r"packs: can't write there \(No space left on device\); this pack is in "):
            run_study(study, tmp_path / "study", "cpu", diary)
    assert "2 began" in diary.lines
    assert not {"1 ended", "2 at 30"} & set(diary.lines)
    assert len(list((tmp_path / "study" / "checkpoints").iterdir())) == 2, "neither pack is lost"
    again = Diary(tmp_path / "study")
    run_study(study, tmp_path / "study", "cpu", again)
    assert again.lines.count("1 at 10") == 0, "it goes on from its last step"
    run_study(study, tmp_path / "other", "cpu", Recorder())
    assert list(differences(tmp_path / "study", tmp_path / "other")) == []


@pytest.mark.usefixtures("overlapping")
def test_an_error_in_writing_ends_its_own_pack_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree, calls = pack_tree, iter([True, False])

    def broken(*arguments: Any) -> Any:
        if next(calls):
            raise KeyError("a name that no table has")
        return tree(*arguments)

    monkeypatch.setattr(one_pack, "pack_tree", broken)
    diary = Diary(tmp_path)
    with pytest.raises(StudyError, match=r"^1 of 2 packs could not be trained, .*KeyError.*failures/"):
        run_study(tiny(), tmp_path, "cpu", diary)
    assert "2 ended" in diary.lines
    assert "in broken" in next((tmp_path / "failures").iterdir()).read_text()


@pytest.mark.usefixtures("overlapping")
@pytest.mark.parametrize("twice", [False, True])
def test_a_signal_waits_for_the_file_that_is_being_written(
    tmp_path: Path, alone: Path, monkeypatch: pytest.MonkeyPatch, twice: bool
) -> None:
    event = threading.Event()
    held_until(event, monkeypatch)

    def interrupt() -> None:
        threading.Timer(0.1, event.set).start()
        for _ in range(1 + twice):
            signal.raise_signal(signal.SIGINT)

    diary = Diary(tmp_path, 2, interrupt)
    with pytest.raises(KeyboardInterrupt) as stop:
        run_study(tiny(), tmp_path, "cpu", diary)
    assert isinstance(stop.value, Interrupted) != twice
    assert diary.lines[-1] == "1 ended"
    again = Diary(tmp_path)
    outcome = run_study(tiny(), tmp_path, "cpu", again)
    assert (outcome.trained, outcome.found) == (4, 4)
    assert list(differences(tmp_path, alone)) == []


def packs(seeds: int = 4, **changes: Any) -> list[PlannedPack]:
    study = tiny(axes={"recipe": ["e8m7", "e4m3"], "learning_rate": [1e-3], "seed": seeds}, **changes)
    return plan(study, CPU)


@pytest.mark.usefixtures("overlapping")
def test_the_next_packs_weights_are_drawn_while_one_trains(
    tmp_path: Path, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[bool, list[int]]] = []

    def draw(shape: Any, seeds: list[int]) -> Any:
        drawn.append((threading.current_thread() is threading.main_thread(), seeds))
        return stacked_weights(shape, seeds)

    monkeypatch.setattr(overlap, "stacked_weights", draw)
    monkeypatch.setattr("train.pack.stacked_weights", draw)
    run_study(tiny(), tmp_path, "cpu", Recorder())
    assert sorted(drawn) == [(False, [0, 1]), (True, [0, 1])], "the first pack's own, and the second one's beside it"
    assert list(differences(tmp_path, alone)) == []


def test_weights_are_each_seeds_own_whoever_draws_them() -> None:
    pack = packs()[0]
    drawing = Drawing()
    drawing.begin(pack)
    weights = drawing.take(pack)
    assert weights is not None
    for i, seed in enumerate(slot.init_seed for slot in pack.slots):
        for name, own in initial_weights(pack.program.shape, seed).items():
            np.testing.assert_array_equal(weights[name][i], own, strict=True)


def test_the_pack_that_begins_and_one_that_may_follow_have_weights_and_others_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second, third = packs(6, execution={"pack_size": 4})[:3]
    drawing = Drawing()
    for pack in (first, second, None, second):
        drawing.begin(pack)
    assert drawing.take(third) is None
    assert drawing.take(first) is not None
    assert drawing.take(first) is None, "given once"
    drawing.begin(first)
    drawing.begin(third)
    assert drawing.take(second) is None
    monkeypatch.setattr(overlap, "free_memory", lambda _: 4 * 4 * 4 * first.program.shape.size - 1)
    drawing.begin(second)
    assert drawing.take(second) is None, "more than a quarter of what is free"
    monkeypatch.setattr(overlap, "free_memory", lambda _: 4 * 4 * 4 * first.program.shape.size)
    drawing.begin(second)
    assert drawing.take(second) is not None


def test_weights_that_could_not_be_drawn_are_drawn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    pack, drawing = packs()[0], Drawing()

    def fail(*_: object) -> Any:
        raise MemoryError

    monkeypatch.setattr(overlap, "stacked_weights", fail)
    drawing.begin(pack)
    assert drawing.take(pack) is None


def test_what_became_of_a_file_is_told_once_when_it_is_there() -> None:
    [pack, *_], writing, event = packs(), Writing[str](), threading.Event()
    assert writing.ended(wait=True) is None
    writing.begin(pack, lambda: "written" if event.wait(PATIENCE) else "")
    assert writing.ended() is None
    assert writing.pack is pack
    event.set()
    assert writing.ended(wait=True) == (pack, "written")
    assert writing.ended(wait=True) is None


def test_what_will_be_taken_after_others_is_told() -> None:
    waiting = packs(4, execution={"pack_size": 2})
    schedule = Schedule(waiting, lambda *_: None)
    last = waiting[0].program
    guesses = [schedule.upcoming(last, after) for after in range(5)]
    assert guesses[4] is None
    assert [schedule.take(last) for _ in range(4)] == guesses[:4]
    assert schedule.upcoming(last) is None


def test_of_equally_long_packs_those_of_the_compiled_program_are_expected() -> None:
    waiting = plan(tiny(axes={"recipe": ["e8m7", "native-fp32"], "learning_rate": [1e-3], "seed": 4}), CPU)
    assert len({pack.program for pack in waiting}) == 2
    schedule = Schedule(waiting, lambda *_: None)
    for pack in waiting:
        assert schedule.upcoming(pack.program) == pack


@pytest.mark.usefixtures("overlapping")
def test_packs_that_start_over_after_the_last_files_end_are_trained(
    tmp_path: Path, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(directory: Path, pack: PlannedPack, tree: Any) -> Path:
        if pack.size == 4 and pack.hash == diary.packs[-1].hash:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return write_pack(directory, pack, tree)

    monkeypatch.setattr(one_pack, "write_pack", no_room)
    diary = Diary(tmp_path)
    assert run_study(tiny(), tmp_path, "cpu", diary).trained == 8


def test_both_packs_of_a_worker_that_died_are_trained_again() -> None:
    first, second = packs()
    schedule = Schedule([first, second], lambda *_: None)
    for _ in range(2):
        schedule.take()

    def receive() -> Any:
        raise EOFError

    worker: Any = SimpleNamespace(
        pack=second, packs={first.hash: first, second.hash: second}, buried=lambda: "was ended by SIGKILL",
        connection=SimpleNamespace(recv=receive),
    )  # fmt: skip
    assert not local._hear(worker, schedule, Recorder(), told=False)
    assert not schedule.under_way
    assert [schedule.take(), schedule.take()] == [first, second]
