"""Packs in several processes: the same bits as in one, whatever dies, and nothing of it lost.

A worker takes seconds to start, so these tests ask much of few of them; what needs no process is in test_schedule.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from exmy import sweep_commands
from exmy.cli import main
from tests.kill_harness import differences
from tests.test_execute import ROOT, Recorder, tiny
from train import Study, StudyError, early, local, lock, open_study, run_study, site
from train.interruption import Interrupted
from train.local import count_workers
from train.lock import locked
from train.plan import PlannedPack, plan
from train.program import PackResult, Progress

UNLIKE = {"seconds", "seconds_first_step"}  # attributes of a study that tell of the clock


def four_packs(**changes: Any) -> Study:
    """Of two programs, with the state of every pack kept after every step."""
    axes = {"recipe": ["e8m7", "native-fp32"], "learning_rate": [1e-3, 4e-3], "seed": 2}
    return tiny(axes=axes, execution={"pack_size": 2, "checkpoint_seconds": 1e-9}, **changes)


class Witness(Recorder):
    """Remembers which packs began and ended; does something after the n-th report."""

    def __init__(self, at_report: int = -1, action: Callable[[], None] | None = None) -> None:
        super().__init__()
        self.ended: list[str] = []
        self.at_report, self.then = at_report, action

    def pack_progress(self, pack: PlannedPack, progress: Progress) -> None:
        super().pack_progress(pack, progress)
        assert progress.memory is not None
        assert progress.memory > 2**20, "bytes of the process that trains it"
        if len(self.steps) == self.at_report and self.then:
            self.then()

    def pack_finished(self, pack: PlannedPack, result: PackResult) -> None:
        self.ended.append(pack.hash)
        assert 0 < result.seconds_first_step <= result.seconds


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four packs, trained in this process."""
    directory = tmp_path_factory.mktemp("alone")
    run_study(four_packs(), directory, "cpu", Recorder())
    return directory


def assert_same(directory: Path, other: Path) -> None:
    """Every bit of every group, and every attribute but the times."""
    assert list(differences(directory, other)) == []
    mine, theirs = open_study(directory).attrs, open_study(other).attrs
    assert {k: v for k, v in mine.items() if k not in UNLIKE} == {k: v for k, v in theirs.items() if k not in UNLIKE}


def test_two_workers_give_the_bits_of_one_process(tmp_path: Path, alone: Path) -> None:
    witness = Witness()
    outcome = run_study(four_packs(), tmp_path, "cpu", witness, workers=2)
    assert (outcome.trained, outcome.found) == (8, 0)
    assert sorted(pack.hash for pack in witness.packs) == sorted(witness.ended)
    assert sorted(path.stem for path in (tmp_path / "packs").glob("*.nc")) == sorted(witness.ended)
    assert sorted(witness.steps) == [10] * 4 + [12] * 4
    assert [pack.runs[0].recipe.name for pack in witness.packs[:2]] == ["e8m7", "native-fp32"], "a program each"
    assert_same(tmp_path, alone)
    status = json.loads((tmp_path / "status.json").read_text(encoding="utf-8"))
    assert (status["state"], status["packs_finished"], status["run_steps_done"]) == ("finished", 4, 8 * 12)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_pack_whose_worker_was_killed_goes_on_in_another_behind_the_others(
    tmp_path: Path, alone: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "once").touch()
    monkeypatch.setenv("EXMY_FAULT", str(tmp_path / "once"))
    monkeypatch.setattr(local, "MODULE", "tests.faulty_worker")
    witness = Witness()
    with caplog.at_level(logging.INFO, "train"):
        run_study(four_packs(), tmp_path / "study", "cpu", witness, workers=2)
    [lost] = [record.message for record in caplog.records if "its worker was ended by SIGKILL" in record.message]
    hashes = [pack.hash for pack in witness.packs]
    assert len(hashes) == 5
    assert lost.startswith(f"pack {hashes[-1]} (2 runs of "), "the last one to begin"
    assert hashes[-1] in hashes[:2]
    assert f"checkpoints/{hashes[-1]}: going on after step 9" in caplog.text, "a worker's line of the log"
    assert_same(tmp_path / "study", alone)


def test_workers_start_while_the_study_is_planned_and_end_where_they_are_not_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[local.Worker] = []

    class Counted(local.Worker):
        def __init__(self, device: str, number: int, lock: int) -> None:
            super().__init__(device, number, lock)
            started.append(self)

    def planned(*arguments: Any) -> Any:
        assert [worker.number for worker in started] == [0, 1], "no more than there are runs"
        assert all(worker.process.poll() is None for worker in started)
        return plan(*arguments)

    def refused(*_: Any) -> Any:
        raise StudyError("no such memory")

    class Alone(Witness):
        def pack_started(self, pack: PlannedPack) -> None:
            super().pack_started(pack)
            assert all(worker.process.poll() is not None for worker in started)

    monkeypatch.setattr(site, "Worker", Counted)
    two = tiny(axes={"recipe": ["e8m7"], "learning_rate": [1e-3], "seed": 2})
    monkeypatch.setattr(site, "plan", refused)
    with pytest.raises(StudyError, match="no such memory"):
        run_study(two, tmp_path, "cpu", Witness(), workers=2)
    assert [worker.process.poll() is None for worker in started] == [False, False]
    started.clear()
    monkeypatch.setattr(site, "plan", planned)
    witness = Alone()
    monkeypatch.setattr(Witness, "pack_progress", Recorder.pack_progress)
    run_study(two, tmp_path, "cpu", witness, workers=2)
    assert len(witness.packs) == 1, "one pack, trained in this process"
    started.clear()
    monkeypatch.setattr(site, "plan", plan)
    run_study(two, tmp_path, "cpu", Witness(), workers=2)
    assert started == [], "there is nothing left to train"


def test_workers_that_a_command_started_early_train_with_the_lock_and_those_that_nobody_takes_end(
    tmp_path: Path, alone: Path
) -> None:
    def has_lock(worker: early.Started) -> bool:
        opened = Path(f"/proc/{worker.process.pid}/fd").iterdir()
        return str(tmp_path / lock.LOCK_FILE) in [str(file.readlink()) for file in opened]

    def look() -> None:
        seen.append([has_lock(worker) for worker in workers[:2]])
        assert [worker.process.poll() is None for worker in workers] == [True, True, False]

    seen: list[list[bool]] = []
    witness = Witness(1, look)
    with early.early_workers(3, "auto"):
        workers = [early._waiting[number] for number in range(3)]
        run_study(four_packs(), tmp_path, "cpu", witness, workers=2)
    assert seen == [[True, True]]
    assert {worker.process.poll() is None for worker in workers} == {False}
    assert_same(tmp_path, alone)


def test_an_early_worker_ends_with_who_started_it() -> None:
    worker = early.start("cpu", 0, None)
    worker.mine.close()
    assert worker.process.wait(60) == 1


def test_a_command_starts_early_only_what_it_will_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    begun: list[tuple[Any, ...]] = []

    @contextlib.contextmanager
    def noted(*what: Any) -> Iterator[None]:
        begun.append(what)
        yield

    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(sweep_commands, "early_workers", noted)
    monkeypatch.setattr(sweep_commands, "_sweep", lambda *_, **__: None)
    for options in (
        "", "--workers 1", "--workers 2 --dry-run", "--workers 2 --executor ray", "--wide ddp --workers 2",
        "--workers 5", "--workers 3 --device cuda",
    ):  # fmt: skip
        result = CliRunner().invoke(main, ["sweep", "--out", str(tmp_path), *options.split()])
        assert result.exit_code == 0, result.output
    assert begun == [(3, "cuda")]


def test_a_worker_that_can_not_start_is_tried_four_times_and_its_last_words_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "MODULE", "this")
    witness = Witness()
    with pytest.raises(StudyError) as refusal:
        run_study(tiny(), tmp_path, "cpu", witness, workers=2)
    message = str(refusal.value)
    assert message.startswith("2 of 2 packs could not be trained, the others are finished: pack ")
    assert message.count("its worker ended with exit status 0 (Namespaces are one honking great idea") == 2
    assert message.count("4 times in a row") == 2
    assert "\n" not in message
    assert len(witness.packs) == 8


def test_a_signal_ends_every_worker_between_two_steps_and_one_process_goes_on(tmp_path: Path, alone: Path) -> None:
    study = four_packs()
    stopper = Witness(1, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted, match="the packs that were finished are kept, and ") as stop:
        run_study(study, tmp_path, "cpu", stopper, workers=2)
    assert stop.value.number == signal.SIGTERM
    assert {pack.hash for pack in stopper.packs} - set(stopper.ended), "nothing was under way"
    kept = [json.loads(file.read_text())["step"] for file in (tmp_path / "checkpoints").glob("*/checkpoint.json")]
    assert sorted(kept) == list(stop.value.steps)
    run_study(study, tmp_path, "cpu", Recorder())
    assert_same(tmp_path, alone)


def test_the_second_ctrl_c_ends_all_workers_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processes: list[Any] = []
    start = subprocess.Popen

    def started(*arguments: Any, **options: Any) -> Any:
        processes.append(start(*arguments, **options))
        return processes[-1]

    class Impatient(Recorder):
        def pack_started(self, pack: PlannedPack) -> None:
            super().pack_started(pack)
            if len(self.packs) == 2:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("train.local.subprocess.Popen", started)
    with pytest.raises(KeyboardInterrupt) as stop:
        run_study(four_packs(), tmp_path, "cpu", Impatient(), workers=2)
    assert not isinstance(stop.value, Interrupted)
    assert len(processes) == 2
    assert all(process.poll() is not None for process in processes)
    with locked(tmp_path):
        pass


def test_workers_whose_sweep_was_killed_keep_the_lock_until_they_have_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is stopped, as one that is held up for long would be: it has the lock, and the next sweep is not let in."""
    study = four_packs(training={"steps": 60})
    (tmp_path / "study.toml").write_text(study.to_toml(), encoding="utf-8")
    out = tmp_path / "out"
    code = "import sys; from train import run_study; run_study(sys.argv[1], sys.argv[2], 'cpu', workers=2)"
    sweep = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "study.toml"), str(out)], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    while not list(out.glob("checkpoints/*/checkpoint.json")):
        assert sweep.poll() is None
        time.sleep(0.02)
    of_sweep = Path(f"/proc/{sweep.pid}/task/{sweep.pid}/children").read_text(encoding="ascii").split()
    workers = [int(pid) for pid in of_sweep if b"train.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGSTOP)
    sweep.kill()
    sweep.wait()
    try:
        monkeypatch.setattr(lock, "PATIENCE", 0.3)
        with pytest.raises(StudyError, match=f"another sweep is at work there .process {sweep.pid} on"):
            run_study(study, out, "cpu", Recorder())
    finally:
        os.kill(workers[0], signal.SIGCONT)
    monkeypatch.setattr(lock, "PATIENCE", 600.0)
    run_study(study, out, "cpu", Recorder())
    run_study(study, tmp_path / "alone", "cpu", Recorder())
    assert_same(out, tmp_path / "alone")


def test_a_folder_of_the_same_name_where_the_sweep_began_is_not_taken_for_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "__init__.py").write_text("raise SystemExit('not ours')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(local, "MODULE", "train.version_of_nothing")
    with pytest.raises(StudyError, match=r"No module named train\.version_of_nothing"):
        run_study(tiny(), tmp_path / "study", "cpu", Recorder(), workers=2)


@pytest.mark.parametrize(
    ("seen", "number", "shown"), [(None, 1, "1"), ("2,5", 1, "5"), ("GPU-aa, GPU-bb", 0, "GPU-aa"), ("", 0, "0")]
)
def test_a_worker_sees_its_gpu_alone(
    seen: str | None, number: int, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if seen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    assert early._environment("cuda", number)["CUDA_VISIBLE_DEVICES"] == shown
    assert early._environment("cpu", number).get("CUDA_VISIBLE_DEVICES") == seen


def test_there_are_as_many_workers_as_gpus_and_one_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert [count_workers(cpu, None), count_workers(cuda, None), count_workers(cuda, 3)] == [1, 8, 3]
    for device, asked, most in ((cpu, 5, 4), (cuda, 9, 8), (cuda, 0, 8)):
        with pytest.raises(StudyError, match=rf"workers must be 1 to {most}, .* got {asked}"):
            count_workers(device, asked)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "1000000"], "workers must be 1 to "),
        (["--ray-address", "here:1"], "ray_address 'here:1' is for the executor 'ray'"),
        (["--out", "s3://bucket/mine"], "s3://bucket/mine: a URL is for the executor 'ray'"),
        (["--out", "s3://bucket/mine", "--dry-run"], "--dry-run looks into a directory"),
    ],
)
def test_what_can_not_be_is_said_in_a_line(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = CliRunner().invoke(main, ["sweep", "--device", "cpu", *options])
    assert said.exit_code == 2
    assert message in said.stderr
    assert said.stderr.count("\n") == 1
    assert not list(tmp_path.rglob("*"))
