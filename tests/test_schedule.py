"""Which pack comes next, and what becomes of those that fail: without a process, and in this one."""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from exmy.cli import main
from tests.kill_harness import differences
from tests.test_execute import Recorder, tiny
from train import Study, StudyError, one_pack, open_study, run_study
from train.interruption import Interrupted, Interruption
from train.one_pack import Report, Setting, Trainer
from train.pack import Pack, train_pack
from train.pack_sizes import (
    PACK_SIZES_FILE,
    Lowered,
    is_out_of_memory,
    program_key,
    read_lowered,
    smaller,
    write_lowered,
)
from train.plan import PlannedPack, plan
from train.program import PackResult
from train.provenance import device_name
from train.schedule import RETRIES, Schedule
from train.store import read_packs

CPU = torch.device("cpu")
NONE = np.empty(0, np.float32)
DONE = Report("finished", PackResult(NONE, NONE, NONE, {}, 1.0, 0.5, False))
FULL = Report("out of memory", message="OutOfMemoryError: no")


def packs_of(study: Study) -> list[PlannedPack]:
    return plan(study, CPU)


def three_programs(**changes: Any) -> Study:
    """Of one layer, of three and of two, six packs each."""
    axes = {"recipe": ["e8m7"], "learning_rate": [1e-3], "seed": 12, "layers": [1, 3, 2]}
    return tiny(axes=axes, execution={"pack_size": 2}, **changes)


def make(packs: list[PlannedPack], lowered: list[Any] | None = None) -> Schedule:
    heard: list[Any] = [] if lowered is None else lowered
    return Schedule(packs, lambda program, low: heard.append((program, low)))


def layers(packs: list[PlannedPack]) -> list[int]:
    return [pack.program.shape.layers for pack in packs]


def take_all(schedule: Schedule, report: Report = DONE) -> list[PlannedPack]:
    taken: list[PlannedPack] = []
    while (pack := schedule.take(taken[-1].program if taken else None)) is not None:
        taken.append(pack)
        schedule.hear(pack, report)
    return taken


def test_the_longest_packs_come_first_and_equal_ones_in_the_studys_order() -> None:
    packs = packs_of(three_programs())
    taken = take_all(make(packs))
    assert layers(taken) == [3] * 6 + [2] * 6 + [1] * 6
    for number in (1, 2, 3):
        of_one = [pack.hash for pack in taken if pack.program.shape.layers == number]
        assert of_one == [pack.hash for pack in packs if pack.program.shape.layers == number]


def test_more_steps_and_a_larger_pack_are_longer() -> None:
    """Twice the steps of half the layers, and four times the runs: by hand, 2 x 1 and 4 x 1 against 1 x 3."""
    [one] = [p for p in packs_of(three_programs()) if p.program.shape.layers == 1][:1]
    [three] = [p for p in packs_of(three_programs()) if p.program.shape.layers == 3][:1]
    longer = dataclasses.replace(one, program=dataclasses.replace(one.program, steps=10 * one.program.steps))
    larger = dataclasses.replace(one, program=dataclasses.replace(one.program, warmup=1), size=one.size * 4)
    assert take_all(make([one, three, longer, larger])) == [longer, larger, three, one]


def test_who_is_free_keeps_to_a_program_or_takes_one_that_nobody_is_at() -> None:
    axes = {"recipe": ["e8m7", "native-fp32"], "learning_rate": [1e-3], "seed": 6}
    packs = packs_of(tiny(axes=axes, execution={"pack_size": 2}))
    first, second = packs[0].program, packs[3].program
    schedule = make(packs)

    def take(last: Any = None) -> Any:
        pack = schedule.take(last)
        assert pack is not None
        return pack.program

    assert [take(), take()] == [first, second]
    assert [take(first), take(second), take(second)] == [first, second, second]
    assert take(second) == first, "none of its own waits any more"
    assert schedule.take(first) is None


def test_the_longest_goes_before_one_of_the_same_program() -> None:
    schedule = make(packs_of(three_programs()))
    last = next(pack.program for pack in schedule.packs if pack.program.shape.layers == 1)
    pack = schedule.take(last)
    assert pack is not None
    assert layers([pack]) == [3]


def test_a_lost_pack_comes_last_and_is_given_up_after_three_more_tries() -> None:
    schedule = make(packs_of(three_programs()))
    bad = schedule.take()
    assert bad is not None
    schedule.lost(bad, "was ended by SIGKILL")
    tries = 1
    order = []
    while (pack := schedule.take()) is not None:
        order.append(pack)
        if pack == bad:
            tries += 1
            schedule.lost(pack, "was ended by SIGKILL")
        else:
            schedule.hear(pack, DONE)
    assert tries == 1 + RETRIES == 4
    assert order[-3:] == [bad] * 3
    assert len(schedule.finished) == 17
    with pytest.raises(
        StudyError, match=rf"1 of 18 packs could not.*pack {bad.hash} \(2 runs of e8m7, gpt2-3x16 on python\): its"
    ):
        schedule.conclude(Interruption())


def test_nothing_more_is_given_when_the_disk_is_full() -> None:
    schedule = make(packs_of(three_programs()))
    one, two = schedule.take(), schedule.take()
    assert one is not None
    assert two is not None
    schedule.hear(one, Report("stopped", message="no room"))
    assert schedule.take() is None
    schedule.hear(two, DONE)
    assert (len(schedule.finished), len(schedule.packs)) == (1, 18)
    with pytest.raises(StudyError, match=r"^no room$"):
        schedule.conclude(Interruption())


def test_a_signal_when_all_is_done_interrupts_nothing() -> None:
    schedule, interruption = make(packs_of(tiny())), Interruption()
    first = schedule.take()
    assert first is not None
    schedule.hear(first, Report("interrupted", step=7))
    interruption.number = 15
    with pytest.raises(Interrupted, match=r"the one under way up to step 7$"):
        schedule.conclude(interruption)
    take_all(schedule)
    schedule.conclude(interruption)


def test_all_that_is_left_of_a_program_starts_over_at_the_next_smaller_size() -> None:
    """Three packs of four are under way when one, then another, is out of memory; a third one finishes."""
    lowered: list[Any] = []
    study = tiny(axes={"recipe": ["e8m7"], "learning_rate": [1e-3], "seed": 18}, execution={"pack_size": 4})
    schedule = make(packs_of(study), lowered)
    one, two, three = (schedule.take() for _ in range(3))
    assert one is not None
    assert two is not None
    assert three is not None
    schedule.hear(one, FULL)
    assert lowered == [(one.program, Lowered(2, 4))]
    assert {(pack.size, pack.restarted_from) for pack in schedule.packs} == {(4, None), (2, 4)}
    schedule.hear(two, FULL)
    schedule.hear(three, DONE)
    rest = take_all(schedule)
    assert {(pack.size, pack.restarted_from) for pack in rest} == {(2, 4)}
    runs = [run.identity for pack in [three, *rest] for run in pack.runs]
    assert sorted(runs) == sorted(run.identity for run in study.runs()), "each once"
    again = plan(study, CPU, {run.identity for run in three.runs}, {program_key(one.program): Lowered(2, 4)})
    assert {(pack.size, pack.restarted_from) for pack in again} == {(2, 4)}
    assert sorted(run.identity for pack in again for run in pack.runs) == sorted(
        set(runs) - {r.identity for r in three.runs}
    )


def test_a_late_pack_that_is_out_of_memory_joins_the_others_at_their_size() -> None:
    lowered: list[Any] = []
    study = tiny(axes={"recipe": ["e8m7"], "learning_rate": [1e-3], "seed": 8}, execution={"pack_size": 4})
    schedule = make(packs_of(study), lowered)
    late, early = schedule.take(), schedule.take()
    assert late is not None
    assert early is not None
    schedule.hear(early, FULL)
    smaller_one = schedule.take()
    assert smaller_one is not None
    schedule.hear(smaller_one, FULL)
    schedule.hear(late, FULL)
    assert [low for _, low in lowered] == [Lowered(2, 4), Lowered(1, 4), Lowered(1, 4)]
    assert {(pack.size, pack.restarted_from) for pack in take_all(schedule)} == {(1, 4)}


def test_one_run_that_is_too_much_fails_with_all_of_its_program_and_others_go_on() -> None:
    study = tiny(execution={"pack_size": 1}, axes={"recipe": ["e8m7", "native-fp32"]})
    schedule = make(packs_of(study))
    first = schedule.take()
    assert first is not None
    schedule.hear(first, FULL)
    rest = take_all(schedule)
    assert {pack.runs[0].recipe.name for pack in rest} == {"native-fp32"}
    with pytest.raises(StudyError) as refusal:
        schedule.conclude(Interruption())
    message = str(refusal.value)
    assert message.startswith(
        f"4 of 8 packs could not be trained, the others are finished: pack {first.hash} (1 run of e8m7"
    )
    assert "out of memory with one run at a time, which needs about 0.0 GiB (OutOfMemoryError: no)" in message
    assert "take fewer training.sequences, a shorter model.context or a smaller model" in message
    assert "\n" not in message


def test_the_sizes_of_the_list_go_down_to_one() -> None:
    sizes: list[int | None] = [128]
    while (size := sizes[-1]) is not None:
        sizes.append(smaller(size))
    assert sizes == [128, 64, 32, 16, 8, 4, 2, 1, None]


def raised(*errors: Exception) -> Exception:
    """The last of several exceptions, each while the one before was handled."""
    try:
        try:
            raise errors[0]
        except Exception:
            if len(errors) > 1:
                raise errors[1]  # noqa: B904
            raise
    except Exception as error:
        return error


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (raised(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")), True),
        (raised(MemoryError()), True),
        (raised(RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried")), True),
        (raised(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")), True),
        (raised(torch.OutOfMemoryError("no"), RuntimeError("operation failed due to a previous error during capture")), True),
        (raised(RuntimeError("CUDA error: an illegal memory access was encountered")), False),
        (raised(ValueError("can't allocate memory")), False),
    ],
)  # fmt: skip
def test_what_is_out_of_memory(error: Exception, is_one: bool) -> None:
    assert is_out_of_memory(error) is is_one


def test_a_real_allocation_that_fails_is_one() -> None:
    with pytest.raises(RuntimeError) as failed:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(failed.value)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"schema": 2, "programs": []}', b'{"schema": 1, "programs": [{"program": "a"}]}']
)
def test_a_damaged_record_is_left_out(content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / PACK_SIZES_FILE).write_bytes(content)
    assert read_lowered(tmp_path) == {}
    assert f"{PACK_SIZES_FILE}: damaged, and left out" in caplog.text


@pytest.mark.parametrize(
    "row", [{"pack_size": 3}, {"pack_size": 16}, {"pack_size": 10**9}, {"restarted_from_pack_size": "8"}]
)
def test_a_record_of_a_size_that_is_none_is_left_out(row: dict[str, Any], tmp_path: Path) -> None:
    program = packs_of(tiny())[0].program
    write_lowered(tmp_path, "here", program, Lowered(8, 16))
    write_lowered(tmp_path, "there", program, Lowered(2, 16))
    write_lowered(tmp_path, "here", program, Lowered(4, 16))
    key = program_key(program)
    assert read_lowered(tmp_path) == {"here": {key: Lowered(4, 16)}, "there": {key: Lowered(2, 16)}}
    content = json.loads((tmp_path / PACK_SIZES_FILE).read_text())
    content["programs"][0] |= row
    (tmp_path / PACK_SIZES_FILE).write_text(json.dumps(content))
    assert read_lowered(tmp_path) == {}


def test_a_worker_that_reads_another_text_stops_the_sweep(tmp_path: Path) -> None:
    study = tiny()
    pack = packs_of(study)[0]
    trainer = Trainer(Setting(study, tmp_path, "cpu", {"python": "0" * 64}), CPU, Interruption())
    report = trainer.alone(pack, lambda _: None)
    assert report.end == "stopped"
    assert "python: a worker reads another text (" in report.message
    assert "than the sweep (000000000000); see to it that it stays the same" in report.message


def trains_until(step: int, fails: Callable[[int], Exception | None]) -> Any:
    """`train_pack`, which raises at a step what it is told for the R of its pack."""

    def train(
        program: Any,
        slots: Any,
        text: Any,
        device: Any,
        compiled: Any,
        on_progress: Any,
        checkpointer: Any,
        dead_after: int,
        **rest: Any,
    ) -> Any:
        def hear(progress: Any) -> None:
            on_progress(progress)
            if progress.step == step and (error := fails(len(slots))) is not None:
                raise error

        return train_pack(program, slots, text, device, compiled, hear, checkpointer, dead_after, **rest)

    return train


def too_large(largest: int) -> Callable[[int], Exception | None]:
    return lambda size: torch.OutOfMemoryError("CUDA out of memory.\nTried") if size > largest else None


class Planned(Recorder):
    """Remembers what it was told is planned."""

    def __init__(self) -> None:
        super().__init__()
        self.plans: list[list[int]] = []

    def planned(self, packs: list[PlannedPack], finished: int, device: str) -> None:
        super().planned(packs, finished, device)
        self.plans.append([pack.size for pack in packs])


def test_a_study_that_is_out_of_memory_goes_on_at_a_smaller_size_and_remembers_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    study = tiny(execution={"pack_size": 8, "checkpoint_seconds": 1e-9})
    monkeypatch.setattr(one_pack, "train_pack", trains_until(10, too_large(2)))
    planned = Planned()
    assert run_study(study, tmp_path / "small", "cpu", planned).trained == 8
    assert planned.plans == [[8], [4, 4], [2, 2, 2, 2]]
    first, second = (record for record in caplog.records if record.name == "train.schedule")
    assert (
        "out of memory at R = 8 (OutOfMemoryError: CUDA out of memory.): its runs start over in packs of R = 4"
        in first.message
    )
    assert "out of memory at R = 4" in second.message
    assert second.message.endswith("its runs start over in packs of R = 2, and 1 pack beside it")
    assert {pack.attrs["restarted_from_pack_size"] for pack in read_packs(tmp_path / "small")} == {8}
    assert not list((tmp_path / "small" / "checkpoints").iterdir())
    monkeypatch.undo()
    run_study(tiny(execution={"pack_size": 2}), tmp_path / "asked", "cpu", Recorder())
    assert list(differences(tmp_path / "small", tmp_path / "asked")) == []
    assert "restarted_from_pack_size" not in next(read_packs(tmp_path / "asked")).attrs

    # The study, grown: what is new is planned at the size that was found, and a pack of it is the one that it was.
    grown = tiny(axes={"seed": 3}, execution={"pack_size": 8})
    again = Planned()
    assert run_study(grown, tmp_path / "small", "cpu", again).trained == 4
    assert again.plans == [[2, 2]]
    assert read_lowered(tmp_path / "small") == {
        device_name(CPU): {program_key(planned.packs[0].program): Lowered(2, 8)}
    }


def test_what_a_pack_that_was_out_of_memory_held_is_free_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error's frames hold the pack, which only its traceback refers to."""
    alive: list[weakref.ref[Pack]] = []
    found: list[int] = []

    class Seen(Pack):
        def __init__(self, *arguments: Any) -> None:
            gc_was_on = gc.isenabled()
            found.append(sum(pack() is not None for pack in alive))
            assert gc_was_on
            super().__init__(*arguments)
            alive.append(weakref.ref(self))

    monkeypatch.setattr("train.pack.Pack", Seen)
    monkeypatch.setattr(one_pack, "train_pack", trains_until(10, too_large(2)))
    run_study(tiny(axes={"seed": 1}, execution={"pack_size": 4}), tmp_path, "cpu", Recorder())
    assert found == [0, 0, 0]


def test_an_error_in_a_pack_ends_that_pack_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    study = tiny(axes={"recipe": ["e8m7", "native-fp32"]})
    (tmp_path / "study.toml").write_text(study.to_toml(), encoding="utf-8")
    errors = iter([ArithmeticError("a thing that\nnobody thought of")])
    monkeypatch.setattr(one_pack, "train_pack", trains_until(12, lambda _: next(errors, None)))
    said = CliRunner().invoke(
        main, ["sweep", str(tmp_path / "study.toml"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    )
    assert said.exit_code == 2
    bad, good = packs_of(study)
    trace = tmp_path / "out" / "failures" / f"{bad.hash}.txt"
    line = f"pack {bad.hash} (4 runs of e8m7, gpt2-1x16 on python): ArithmeticError: a thing that (its traceback is in {trace})"
    assert said.stderr.splitlines()[-1] == f"exmy: 1 of 2 packs could not be trained, the others are finished: {line}"
    assert [record.message for record in caplog.records if record.levelno == logging.ERROR] == [line]
    assert "nobody thought of" in trace.read_text(encoding="utf-8")
    assert [pack.attrs["pack"] for pack in read_packs(tmp_path / "out")] == [good.hash]
    status = json.loads((tmp_path / "out" / "status.json").read_text(encoding="utf-8"))
    assert (status["state"], status["packs_finished"]) == ("failed", 1)
    run_study(study, tmp_path / "out", "cpu", Recorder())
    assert open_study(tmp_path / "out").attrs["runs_finished"] == 8
    assert not trace.exists()
