"""The command line as a user meets it: what it prints, what it refuses, and what it leaves behind."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import xarray as xr
from click.testing import CliRunner, Result

from exmy.cli import main
from exmy.console import lost_baselines
from train import open_study
from train.lock import locked

TINY = """
name = "tiny"
baseline = "e8m7"
[axes]
recipe = ["e8m7", "e4m3"]
learning_rate = [1e-3, 4e-3]
seed = 2
[model]
layers = 1
heads = 2
width = 16
context = 16
[training]
steps = 12
sequences = 2
warmup = 3
[probe]
every = 6
"""
ROOT = Path(__file__).parent.parent


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_a_sweep_trains_shows_a_table_and_draws_a_figure(study: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = invoke("sweep", study, "--out", out, "--device", "cpu")
    assert first.exit_code == 0, first.output
    for expected in (
        "8 runs in 1 pack of 8",
        "lr 0.001",
        "lr 0.004",
        "e8m7",
        "(baseline)",
        "e4m3",
        "2/2 [16–100]",
        "no_progress",
        "e8m7, the baseline, diverged in all of its 4 runs, so nothing is learnt",
        "Figure:",
    ):
        assert expected in first.output
    assert (out / "report" / "study.png").stat().st_size > 10_000
    assert open_study(out).attrs["runs_finished"] == 8
    second = invoke("sweep", study, "--out", out, "--device", "cpu")
    assert second.exit_code == 0
    assert "Nothing to train: all 8 runs are finished." in second.output


@pytest.mark.parametrize(("baseline", "lines"), [("e8m7", 0), ("e8m1", 0), ("e4m7", 1)])
def test_a_baseline_that_always_diverges_is_told_and_no_other(baseline: str, lines: int) -> None:
    """Of 56 runs each e8m7 lost none, e8m1 nine and e4m7 all, as the README has it."""
    tree = open_study(ROOT / "studies" / "results" / "first-look-gpu")
    tree.attrs["baseline"] = baseline
    assert len(list(lost_baselines(tree))) == lines


def test_a_table_for_each_further_axis(study: Path, tmp_path: Path) -> None:
    result = invoke(
        "sweep", study, "--out", tmp_path / "out", "--device", "cpu", "--set", "axes.layers=[1, 2]", "--set", "seed=1"
    )
    assert result.exit_code == 0, result.output
    assert "layers 1" in result.output
    assert "layers 2" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.toml"], "nowhere.toml: No such file"),
        (["--set", "stepps=3"], "did you mean 'steps'?"),
        (["--set", "recipe=['e9m3']"], "exponent_bits must be 1..8, got 9"),
        (["--device", "tpu"], "'tpu' is not one of"),
        (["--out", "/proc/exmy"], "can't write there"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments: list[str], message: str) -> None:
    result = invoke("sweep", *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_says_how_to_go_on(number: int, status: int, study: Path, tmp_path: Path) -> None:
    out = tmp_path / "my out"
    command = [
        sys.executable,
        "-m",
        "exmy",
        "sweep",
        str(study),
        "--out",
        str(out),
        "--device",
        "cpu",
        "--set",
        "steps=5000",  # minutes, and too few to be worth compiling a quantiser for
        "--set",
        "checkpoint_seconds=0.1",
        "--set",
        'axes.tokenizer=["bytes"]',
    ]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    while not list(out.glob("checkpoints/*/checkpoint.json")):  # training is under way
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.05)
        assert process.returncode is None
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == status
    last = re.escape(f" To go on: {shlex.join(['exmy', *command[3:]])}\n")
    kept = r"exmy: stopped; the packs that were finished are kept, and the one under way up to step \d+\."
    assert re.search(f"^{kept}{last}$", said, re.MULTILINE)
    assert "Traceback" not in said
    assert len(list(out.glob("checkpoints/*/*.safetensors"))) == 1


def test_resume_goes_on_with_the_study_of_a_directory(study: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    for directory in (out, whole):
        assert invoke("sweep", study, "--out", directory, "--device", "cpu", "--set", "pack_size=4").exit_code == 0
    for path in (sorted((out / "packs").glob("*.nc"))[0], out / "report" / "index.html"):
        path.unlink()
    done = invoke("resume", out, "--device", "cpu")
    assert done.exit_code == 0, done.output
    for expected in ("4 runs in 1 pack of 4", "4 runs are finished already", "e8m7", "lr 0.004", "Report:"):
        assert expected in done.output
    assert (out / "report" / "index.html").is_file()
    xr.testing.assert_identical(open_study(out)["history"].to_dataset(), open_study(whole)["history"].to_dataset())


def test_resume_needs_a_study_directory(tmp_path: Path) -> None:
    refused = invoke("resume", tmp_path)
    assert refused.exit_code == 2
    assert refused.output == (
        f"exmy: {tmp_path}: no study.toml here; a study directory is what `exmy sweep --out DIR` writes\n"
    )


def test_a_second_sweep_is_refused_in_one_line(study: Path, tmp_path: Path) -> None:
    with locked(tmp_path):
        refused = invoke("sweep", study, "--out", tmp_path, "--device", "cpu")
    assert refused.exit_code == 2
    [line] = refused.output.splitlines()
    assert f"another sweep is at work there (process {os.getpid()} on " in line
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.toml", "packs", ".lock"}


def test_formats_show_tells_what_is_easily_confused() -> None:
    result = invoke("formats", "show", "e4m3", "e4m3fn")
    assert result.exit_code == 0
    assert "240" in result.output
    assert "448" in result.output
    assert "e4m3fn: largest 448, no infinity" in result.output
    assert "e4m3: largest 240, infinity" in result.output


def test_formats_show_refuses_nonsense_with_the_nearest() -> None:
    result = invoke("formats", "show", "e9m3")
    assert result.exit_code == 2
    assert "e9m3: exponent_bits must be 1..8, got 9; the nearest formats are e8m3" in result.output


def test_formats_list() -> None:
    result = invoke("formats", "list")
    assert "e4m3fn" in result.output
    assert "65504" in result.output
    every = invoke("formats", "list", "--all").output.split()
    assert {"e1m0f", "e8m23", "e2m1fn"} <= set(every)
    assert len(every) == len(set(every))


def test_help_needs_no_torch() -> None:
    code = "import sys; from exmy.cli import main; main(['--help'], standalone_mode=False); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False).returncode == 0
