"""`exmy verify` as a user meets it: what it prints, its exit status, its certificate, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from exmy.cli import main

OWN = """
import torch

def to_fp8(x):
    return x.to(torch.float8_e4m3fn).to(x.dtype)

def leaves_the_grid(x):
    return torch.where(x == 1.5, x + 1 / 32, to_fp8(x))
"""


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["verify", *(str(a) for a in arguments)])


def test_ours_keeps_every_law(tmp_path: Path) -> None:
    path = tmp_path / "certificate.json"
    done = invoke("exmy", "e4m3fn", "int8", "--json", path)
    assert done.exit_code == 0, done.output
    assert "a proof for all inputs only if the quantiser is monotone" in " ".join(done.output.split())
    certificate = json.loads(path.read_text())
    assert [row["format"] for row in certificate] == ["e4m3fn", "int8"]
    assert all(law["verdict"] != "fail" for row in certificate for law in row["laws"])


def test_what_torch_does_to_fp64_is_told_with_the_smallest_input() -> None:
    done = invoke("torch", "e4m3fn", "--input", "float64")
    assert done.exit_code == 1
    assert "FAIL" in done.output
    assert "e4m3fn breaks single_rounding" in done.output
    assert "0x1.0000000000001p-10" in done.output


def test_a_function_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_kernels.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    done = invoke("own_kernels:to_fp8", "--format", "e4m3fn", "--level", "quick")
    assert done.exit_code == 0, done.output
    wrong = invoke("own_kernels:leaves_the_grid", "--format", "e4m3fn")
    assert wrong.exit_code == 1
    assert "breaks on_grid" in wrong.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["torch", "e9m3"], "torch has no e9m3: it has"),
        (["nobody"], "nobody: neither exmy, torch"),
        (["nobody:f", "--format", "e4m3fn"], "nobody:f: nobody can't be imported"),
        (["math:sin"], "math:sin: say which format it rounds to, by --format"),
        (["math:nothing", "--format", "e4m3fn"], "math has no function 'nothing'"),
        (["exmy", "e4m3fn", "--rounding", "up"], "rounding must be one of nearest_even"),
        (["exmy", "e4m3fn", "--overflow", "wrap"], "overflow must be one of saturate"),
        (["exmy", "fp32"], "fp32: this level lists every value, so at most 20 bits, got 32"),
        (["exmy", "e8m3", "--input", "float16"], "e8m3 does not fit float16"),
        (["exmy", "e4m3fn", "--input", "float64", "--level", "exhaustive"], "2^64 inputs can't all be asked"),
        (["ml_dtypes", "e5m2", "--input", "bfloat16"], "ml_dtypes is given float32, float64, float16, got bfloat16"),
        (["exmy", "e4m3fn", "--json", "/proc/nowhere/a.json"], "/proc/nowhere/a.json: can't be written"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments: list[str], message: str) -> None:
    refused = invoke(*arguments)
    assert refused.exit_code == 2, refused.output
    assert message in refused.output
    assert "Traceback" not in refused.output
