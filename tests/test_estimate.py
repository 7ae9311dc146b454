"""What a plan will take, against what it took: packs whose times are committed, a pack timed here, arithmetic by hand."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from exmy.cli import main
from exmy.sweep import _size
from tests.small import make_program
from train import plan as planning
from train.estimate import Estimate, Rates, estimate, measured_rates, step_seconds, total
from train.pack_file import PackFile
from train.plan import PlannedPack, plan
from train.program import Probe
from train.store import pack_files
from train.study import Study, StudyError
from train.study_file import read_study

ROOT = Path(__file__).parent.parent
H100 = Rates(700e12, 2.9e12)  # as benchmarks/results/h100-packs.json has them


def planned(study: Study, monkeypatch: pytest.MonkeyPatch) -> list[PlannedPack]:
    """As on a card of 80 GiB."""
    monkeypatch.setattr(planning, "free_memory", lambda _: 80 * 2**30)
    return plan(study, torch.device("cuda"))


@pytest.mark.parametrize("name", ["first-look-gpu", "recipes-12m"])
def test_packs_on_an_h100_took_what_is_estimated(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a factor of two, without the first step, which compiles."""
    folder = ROOT / "studies" / "results" / name
    if not folder.is_dir():
        pytest.skip(f"no results of {name}")
    packs = {
        frozenset(run.identity for run in p.runs): p for p in planned(read_study(folder / "study.toml"), monkeypatch)
    }
    compared = 0
    for file in map(PackFile, pack_files(folder)):
        pack = packs.get(frozenset(file.runs))
        if pack is not None:
            took = file.attrs["seconds"] - file.attrs["seconds_first_step"]
            assert 0.5 < estimate(pack, "cuda", H100).seconds / took < 2, file.attrs["recipes"]
            compared += 1
    assert compared >= 4


def test_a_step_by_hand() -> None:
    """Of 2 blocks of 16: 2 x 3,072 + 32 x 16 parameters that are multiplied, 5 gains; 48 tokens."""
    program, rates = make_program("native-fp32"), Rates(1e9, 1e12)
    assert program.sequences * program.shape.context == 48
    operations = 48 * (6 * (2 * 12 * 16 * 16 + 5 * 16 + 32 * 16) + 12 * 2 * 16 * 12)
    once, twice = (step_seconds(program, size, "cpu", rates) for size in (1, 2))
    assert operations / 1e9 < twice - once < 1.02 * operations / 1e9, "and what is moved"
    assert 2 * once - twice == pytest.approx(3 * 2e-3), "what launches cost, whatever R is"
    slower = step_seconds(make_program("tf32"), 1, "cuda", rates) - step_seconds(make_program("e4m3"), 1, "cuda", rates)
    assert slower == pytest.approx(operations / 1e9, rel=0.01)


def test_rules_cost_more_and_rotations_without_a_kernel_most() -> None:
    rates = Rates(1e15, 1e9)
    seconds = {
        device: [step_seconds(make_program(name), 1, device, rates) for name in ("e4m3", "mxfp8", "nvfp4", "mxfp4")]
        for device in ("cuda", "cpu")
    }
    assert seconds["cuda"][0] < seconds["cuda"][1] == seconds["cuda"][2] < seconds["cuda"][3]
    assert seconds["cpu"][0] < seconds["cpu"][1] < seconds["cpu"][2] == seconds["cpu"][3]


def test_each_program_is_compiled_once_and_memory_is_not_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    study = read_study(ROOT / "studies" / "first-look-gpu.toml")
    packs = planned(study, monkeypatch)
    found = [Estimate(memory=10 * i, seconds=1.0, compiling=7.0, disk=3) for i in range(len(packs))]
    whole = total(packs, found)
    programs = len({pack.program for pack in packs})
    assert programs < len(packs)
    assert whole == Estimate(10 * (len(packs) - 1), float(len(packs)), 7.0 * programs, 3 * len(packs))
    assert total([], []) == Estimate(0, 0, 0, 0)


@pytest.mark.parametrize(("device", "steps"), [("cuda", 9.0), ("cpu", 1.0)])
def test_a_probe_on_a_gpu_takes_nine_steps_a_gradient(device: str, steps: float) -> None:
    """A curvature along the gradient: a gradient and a product that is worth three, after 0, 10 and 20 steps."""
    rates, plain = Rates(1e15, 1e9), make_program(probe=Probe())
    probed = dataclasses.replace(plain, probe=Probe(every=10, measures=("gradient_curvature",)))
    found = [estimate(PlannedPack(p, (), 4), device, rates).seconds for p in (plain, probed)]
    assert found[1] - found[0] == pytest.approx(steps * 3 * 4 * step_seconds(plain, 4, device, rates))


def test_a_device_waits_for_its_host() -> None:
    """L-BFGS-B at the last token of each of 4 sequences, for 2 epsilons, after 0, 10 and 20 steps of each of 4 runs."""
    rates, plain = Rates(1e15, 1e9), make_program(probe=Probe())
    probe = Probe(every=10, measures=("logit_sharpness_lbfgsb",))
    assert len(probe.epsilons) == 2
    probed = dataclasses.replace(plain, probe=probe)
    found = [estimate(PlannedPack(p, (), 4), "cpu", rates).seconds for p in (plain, probed)]
    forward = 3 / 3 * step_seconds(plain, 4, "cpu", rates)
    assert found[1] - found[0] - forward == pytest.approx(4 * 3 * 4 * 2 * 1.7e-3)


def test_rates_are_measured() -> None:
    rates = measured_rates(torch.device("cpu"))
    assert 1e8 < rates.products < 1e14
    assert 1e8 < rates.copied < 1e13


def test_a_dry_run_shows_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    arguments = ["sweep", str(ROOT / "studies" / "first-look-cpu.toml"), "--device", "cpu", "--dry-run"]
    out = tmp_path / "out"
    result = CliRunner().invoke(main, [*arguments, "--out", str(out), "--set", "seed=2"])
    assert result.exit_code == 0, result.output
    assert not any(tmp_path.iterdir())
    for words in (
        "32 runs in",
        "0 runs found finished",
        "gpt2-2x64",
        "of training; as a rule within a factor of two",
        "are free",
    ):
        assert words in result.output


def test_sizes_are_told_in_words_and_none_is_zero() -> None:
    assert [_size(number) for number in (3, 2**20 * 7 // 2, 5 * 2**29)] == ["1 MiB", "4 MiB", "2.5 GiB"]


def test_of_torchruns_processes_one_shows_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []
    for rank in ("0", "1", "3"):
        for name, value in (("TORCHELASTIC_RUN_ID", "1"), ("WORLD_SIZE", "4"), ("RANK", rank), ("LOCAL_RANK", rank)):
            monkeypatch.setenv(name, value)
        result = CliRunner().invoke(main, ["sweep", "--device", "cpu", "--dry-run"])
        assert result.exit_code == 0
        shown.append(result.output)
    assert "programs: runs that train as one" in shown[0]
    assert shown[1:] == ["", ""]


def test_a_dry_run_counts_what_is_there_and_leaves_a_damaged_pack_where_it_is(tmp_path: Path) -> None:
    kept = ROOT / "studies" / "results" / "first-look-cpu"
    shutil.copytree(kept, tmp_path / "out")
    arguments = ["sweep", str(kept / "study.toml"), "--device", "cpu", "--dry-run", "--out", str(tmp_path / "out")]
    whole = CliRunner().invoke(main, arguments)
    assert "0 runs in 0 packs, 0 run-steps" in whole.output
    assert "48 runs found finished" in whole.output
    one = min((tmp_path / "out" / "packs").glob("*.nc"))
    one.write_bytes(one.read_bytes()[:-1000])
    before = sorted(tmp_path.rglob("*"))
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "16 runs in 1 pack of 16" in result.output
    assert "32 runs found finished" in result.output
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_refuses_what_a_sweep_refuses(tmp_path: Path) -> None:
    arguments = ["sweep", "--device", "cpu", "--dry-run", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(
        main, [*arguments, "--set", 'axes.recipe=["native-tf32"]', "--set", "baseline=native-tf32"]
    )
    assert result.exit_code == 2
    assert "TF32" in result.output
    result = CliRunner().invoke(main, [*arguments, "--set", "dataset=./nowhere"])
    assert result.exit_code == 2
    assert result.output.startswith("exmy: ./nowhere: no such file or folder; "), "before any of the plan"
    assert result.output.count("\n") == 1
    with pytest.raises(StudyError, match="TF32"):
        plan(
            read_study(
                ROOT / "studies" / "first-look-cpu.toml", ['axes.recipe=["native-tf32"]', "baseline=native-tf32"]
            ),
            torch.device("cpu"),
        )
