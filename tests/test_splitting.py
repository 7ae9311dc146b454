"""No GPU is idle beside a large pack, and a study that goes on elsewhere keeps the packs that it has."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from exmy.cli import main
from tests.kill_harness import differences
from tests.small import make_program
from tests.test_execute import Recorder, tiny
from train import Study, open_study, run_study
from train import plan as planning
from train.checkpoint import CHECKPOINTS
from train.local import train_here
from train.one_pack import Trainer
from train.pack_sizes import Lowered, Split, program_key, read_lowered, read_splits, write_lowered, write_splits
from train.plan import OVERHEAD, PlannedPack, describe, plan, splits_of
from train.program import Program
from train.provenance import device_name
from train.site import Here
from train.splitting import Portion, split
from train.study_file import read_study

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CURVATURE = Path(__file__).parent.parent / "studies" / "curvature.toml"


def portion(runs: int, size: int, program: Program | None = None, **how: Any) -> Portion:
    numbers: Any = range(runs)
    return Portion(program or make_program(), numbers, size, **how)


@pytest.mark.parametrize(
    ("runs", "size", "workers", "want"),
    [
        (128, 128, 1, 128),
        (128, 128, 2, 64),
        (128, 128, 3, 64),  # 64 + 8 at once; packs of 32 would take two rounds of 32 + 8
        (128, 128, 4, 32),
        (128, 128, 8, 16),
        (128, 128, 16, 8),
        (128, 128, 64, 8),  # the least
        (100, 128, 2, 64),
        (512, 128, 4, 128),  # none is idle
        (5, 8, 8, 8),
        (12, 16, 2, 8),
    ],
)
def test_a_large_pack_is_split_until_nobody_waits(runs: int, size: int, workers: int, want: int) -> None:
    [found] = split([portion(runs, size)], workers, OVERHEAD["cuda"], 8)
    assert found.size == want
    assert found.split_from == (size if want < size else None)


def test_the_longest_packs_are_split_first_and_those_that_are_fixed_never() -> None:
    short = make_program()
    long = dataclasses.replace(short, steps=10 * short.steps)
    sizes = [p.size for p in split([portion(64, 64, short), portion(64, 64, long)], 3, 8, 8)]
    assert sizes == [64, 32]
    sizes = [p.size for p in split([portion(64, 64, short), portion(64, 64, long, is_fixed=True)], 3, 8, 8)]
    assert sizes == [64, 64], "the long one takes as long either way"
    assert [p.size for p in split([portion(0, 64), portion(64, 64)], 2, 8, 8)] == [64, 32], (
        "of nothing nothing is split"
    )


def planned(monkeypatch: pytest.MonkeyPatch, *how: Any, **more: Any) -> list[PlannedPack]:
    """The study of 128 runs in one program, on cards of 140 GiB."""
    monkeypatch.setattr(planning, "free_memory", lambda _: 140 * 2**30)
    return plan(read_study(CURVATURE), CUDA, *how, **more)


def test_a_study_of_one_pack_is_planned_for_all_gpus_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    [alone] = planned(monkeypatch)
    packs = planned(monkeypatch, workers=4)
    assert [(pack.size, len(pack.runs), pack.split_from) for pack in packs] == [(32, 32, 128)] * 4
    assert [run for pack in packs for run in pack.runs] == list(alone.runs)
    assert describe(packs).startswith("128 runs in 4 packs of 32, R = 128 split so that no worker is idle (1 program)")
    assert "split" not in describe([alone])
    fixed = read_study(CURVATURE, ["execution.pack_size=64"])
    assert [pack.size for pack in plan(fixed, CUDA, workers=4)] == [64, 64]


def test_what_was_planned_before_stays_whatever_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    study, [alone], four = read_study(CURVATURE), planned(monkeypatch), planned(monkeypatch, workers=4)
    splits = splits_of(study, four)
    assert splits == {(program_key(alone.program), 128): Split(32, 128)}
    assert splits_of(study, [alone]) == {}
    for workers in (1, 2, 8):
        assert planned(monkeypatch, workers=workers, splits=splits) == four
        done = {run.identity for run in four[1].runs}
        left = planned(monkeypatch, done, workers=workers, splits=splits)
        assert left == [four[0], four[2], four[3]], "a finished one is no reason to share the others out anew"
    said = read_study(CURVATURE, ["execution.pack_size=64"])
    assert [pack.size for pack in plan(said, CUDA, splits=splits)] == [64, 64]
    assert planned(monkeypatch, workers=4, under_way={alone.hash}) == [alone]
    assert planned(monkeypatch, workers=4, under_way={"another"}) == four
    lowered = {program_key(alone.program): Lowered(16, 32)}
    found = planned(monkeypatch, (), lowered, workers=1, splits=splits)
    assert {(pack.size, pack.restarted_from) for pack in found} == {(16, 32)}, "out of memory at what it was split to"
    more = {(program_key(alone.program), 64): Split(8, 64)}
    assert planned(monkeypatch, workers=1, splits=more) == [alone], "a study that grew is planned anew"


def test_splits_and_what_was_out_of_memory_stand_in_one_file(tmp_path: Path) -> None:
    program, other = make_program(), make_program("e8m3", steps=7)
    key, second = program_key(program), program_key(other)
    write_splits(tmp_path, "here", {})
    assert list(tmp_path.iterdir()) == []
    write_splits(tmp_path, "here", {(key, 128): Split(32, 128)})
    assert read_lowered(tmp_path) == {}
    write_lowered(tmp_path, "here", other, Lowered(4, 8))
    assert read_splits(tmp_path) == {"here": {(key, 128): Split(32, 128)}}
    write_splits(tmp_path, "there", {(key, 128): Split(64, 128)})
    write_splits(tmp_path, "here", {(key, 64): Split(16, 64), (key, 128): Split(8, 128)})
    assert read_splits(tmp_path) == {
        "here": {(key, 128): Split(8, 128), (key, 64): Split(16, 64)},
        "there": {(key, 128): Split(64, 128)},
    }
    assert read_lowered(tmp_path) == {"here": {second: Lowered(4, 8)}}
    (tmp_path / "pack_sizes.json").write_text('{"schema": 1, "programs": [], "split": [{"pack_size": 3}]}')
    assert read_splits(tmp_path) == {}


class InTurn(Here):
    """Plans for several workers, and trains one pack after the other in this process, since workers take seconds to start."""

    def get_ready(self, runs: int, lock: int) -> None:
        """Nobody."""

    def train(self, schedule: Any, setting: Any, texts: Any, lock: int, observer: Any, interruption: Any) -> None:
        """Here."""
        train_here(schedule, Trainer(setting, CPU, interruption, texts), observer, interruption)


def eight(**execution: Any) -> Study:
    axes = {"recipe": ["e8m7"], "learning_rate": [1e-3, 4e-3], "seed": 4}
    return tiny(axes=axes, execution={"pack_size": "auto", "checkpoint_seconds": 0, **execution})


def sweep(directory: Path, workers: int) -> list[PlannedPack]:
    recorder = Recorder()
    run_study(eight(), directory, observer=recorder, site=contextlib.nullcontext(InTurn(directory, CPU, workers)))
    return recorder.packs


def test_a_sweep_goes_on_with_its_packs_on_another_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two packs of 4 for two workers; one of them lost, and made again by one worker: the bits of R = 4 all along."""
    monkeypatch.setitem(planning.LEAST, "cpu", 1)
    begun = sweep(tmp_path / "two", 2)
    assert [(pack.size, pack.split_from) for pack in begun] == [(4, 8)] * 2
    (tmp_path / "two" / "packs" / f"{begun[1].hash}.nc").unlink()
    assert sweep(tmp_path / "two", 1) == [begun[1]]
    run_study(eight(pack_size=4), tmp_path / "one", "cpu", Recorder())
    assert list(differences(tmp_path / "one", tmp_path / "two")) == []
    assert set(open_study(tmp_path / "two")["summary"].to_dataset().pack_size.values) == {4}


def test_a_pack_that_has_a_checkpoint_is_not_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(planning.LEAST, "cpu", 1)
    [whole] = plan(eight(), CPU)
    (tmp_path / CHECKPOINTS / whole.hash).mkdir(parents=True)
    packs, name = Here(tmp_path, CPU, 2).plan(eight(), {})
    assert packs == [whole]
    assert name == device_name(CPU)
    (tmp_path / CHECKPOINTS / whole.hash).rmdir()
    assert len(Here(tmp_path, CPU, 2).plan(eight(), {})[0]) == 2


def test_a_split_is_found_again_by_all_runs_of_its_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(planning.LEAST, "cpu", 1)
    study = tiny(execution={"pack_size": "auto"})
    packs = plan(study, CPU, workers=4)
    assert {run.recipe.name for run in study.runs()} == {"e8m7", "e4m3"}
    assert [pack.size for pack in packs] == [2] * 4
    splits = splits_of(study, packs)
    assert splits == {(program_key(packs[0].program), 8): Split(2, 8)}
    assert plan(study, CPU, splits=splits) == packs


def test_a_dry_run_shows_what_is_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(planning.LEAST, "cpu", 1)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    arguments = ["sweep", str(CURVATURE.with_name("first-look-cpu.toml")), "--device", "cpu", "--dry-run", "--workers"]
    small = [
        "--out",
        str(tmp_path / "out"),
        "--set",
        "seed=1",
        "--set",
        "recipe=['e8m7']",
        "--set",
        "learning_rate=[1e-3, 2e-3]",
    ]
    result = CliRunner().invoke(main, [*arguments, "2", *small])
    assert result.exit_code == 0, result.output
    assert "2 runs in 2 packs of 1, R = 2 split so that no worker is idle" in " ".join(result.output.split())
    result = CliRunner().invoke(main, [*arguments, "1", *small])
    assert "split" not in result.output


def test_a_cluster_plans_for_all_of_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    from train import on_ray

    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": 6.0, "CPU": 64.0})
    assert on_ray._workers("cuda") == 6
    monkeypatch.setitem(planning.LEAST, "cpu", 1)
    there = on_ray.plan_there(eight(), "cpu", set(), {}, 2, {}, set())
    [whole] = plan(eight(), CPU)
    assert [pack.size for pack in there[0]] == [4, 4]
    assert on_ray.plan_there(eight(), "cpu", set(), {}, 2, {}, {whole.hash})[0] == [whole]
    splits = {device_name(CPU): splits_of(eight(), there[0])}
    assert on_ray.plan_there(eight(), "cpu", set(), {}, 1, splits, set()) == there
