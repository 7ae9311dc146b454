"""The command line as a user meets it: what it prints, what it refuses, and what it leaves behind."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from exmy.cli import main
from train import open_study

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
        "2/2 [34–100]",
        "no_progress",
        "Figure:",
    ):
        assert expected in first.output
    assert (out / "report" / "study.png").stat().st_size > 10_000
    assert open_study(out).attrs["runs_finished"] == 8
    second = invoke("sweep", study, "--out", out, "--device", "cpu")
    assert second.exit_code == 0
    assert "Nothing to train: all 8 runs are finished." in second.output


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


def test_ctrl_c_says_how_to_go_on(study: Path, tmp_path: Path) -> None:
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
        "steps=100000",
        "--set",
        'axes.tokenizer=["bytes"]',
    ]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "8 runs in 1 pack" in line:  # the plan is out: training begins
            break
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(timeout=60) == 130
    assert (
        f"exmy: stopped; the packs that were finished are kept. To go on: {shlex.join(['exmy', *command[3:]])}" in rest
    )
    assert "Traceback" not in rest


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
