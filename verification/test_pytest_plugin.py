"""The plugin in a suite of somebody else's: a process of its own, in which nothing of ours is configured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SUITE = """
import pytest, torch

def to_fp8(x):
    return x.to(torch.float8_e4m3fn).to(x.dtype)

@pytest.mark.quantizer("e4m3fn", "e5m2", overflow="found")
def test_casts(verify_quantizer):
    dtype = getattr(torch, f"float8_{verify_quantizer.format}")
    report = verify_quantizer(lambda x: x.to(dtype).to(x.dtype))
    assert report.passed

@pytest.mark.quantizer("e4m3fn", overflow="found", input_dtype=torch.float64)
def test_rounds_once(verify_quantizer):
    verify_quantizer(to_fp8)

def test_format_in_the_call(verify_quantizer):
    assert verify_quantizer.format is None
    assert verify_quantizer(to_fp8, "e4m3fn", level="quick").level == "quick"

def test_no_format(verify_quantizer):
    verify_quantizer(to_fp8)
"""


OTHERS = """
import itertools, pytest, torch
from formats import quantize

seeds = itertools.count()

@pytest.mark.quantizer("mxfp4")
def test_scaled_has_no_such_level(verify_quantizer):
    assert verify_quantizer(lambda x: quantize(x, "mxfp4")).level == "conditional"

@pytest.mark.quantizer("e2m1fn", input_dtype=torch.float64)
def test_fp64_has_no_such_level(verify_quantizer):
    assert verify_quantizer(lambda x: quantize(x, "e2m1fn")).level == "conditional"

@pytest.mark.quantizer("e2m1fn", rounding="found")
def test_chance_has_no_such_level(verify_quantizer):
    judged = verify_quantizer(lambda x: quantize(x, "e2m1fn", "stochastic", seed=next(seeds)))
    assert (judged.level, judged.rounding) == ("conditional", "stochastic")
"""


# One process for all: each would import torch again.
RUNS = {
    "certificates": ["test_kernels.py", "--quantizer-certificates", "kept"],
    "exhaustive": ["test_others.py", "--quantizer-level", "exhaustive"],
    "conditional": ["test_kernels.py", "--quantizer-level", "conditional", "-k", "format_in_the_call"],
}
PROGRAM = """
import json, sys, pytest
for name, options in json.loads(sys.argv[1]).items():
    print(f"BEGIN {name}")
    pytest.main(["-p", "verification.pytest_plugin", "--strict-markers", "-rA", *options])
"""


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The folder of the suite, and what each run of pytest in it said."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "test_kernels.py").write_text(SUITE)
    (folder / "test_others.py").write_text(OTHERS)
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, json.dumps(RUNS)]
    said = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600).stdout
    return folder, dict(part.split("\n", 1) for part in said.split("BEGIN ")[1:])


def test_a_suite_judges_its_kernels(suite: tuple[Path, dict[str, str]]) -> None:
    folder, outputs = suite
    output = outputs["certificates"]
    assert "3 passed, 2 failed" in output.replace("2 failed, 3 passed", "3 passed, 2 failed"), output
    assert "PASSED test_kernels.py::test_casts[e4m3fn]" in output
    assert "PASSED test_kernels.py::test_casts[e5m2]" in output
    assert "breaks single_rounding" in output  # with the counterexample
    assert "0x1.0000000000001p-10" in output
    assert "verify_quantizer needs a format" in output
    from verification import read_certificates

    kept = sorted((folder / "kept").glob("*.json"))
    assert len(kept) == 4
    assert sum(report.passed for path in kept for report in read_certificates(path)) == 3


def test_an_exhaustive_run_judges_what_has_no_such_level_at_the_conditional_one(
    suite: tuple[Path, dict[str, str]],
) -> None:
    output = suite[1]["exhaustive"]
    assert "3 passed" in output, output


def test_the_level_of_the_whole_run(suite: tuple[Path, dict[str, str]]) -> None:
    assert "assert 'conditional' == 'quick'" in suite[1]["conditional"]


def test_pytest_finds_it_where_exmy_is_installed() -> None:
    from importlib.metadata import entry_points

    found = [entry.value for entry in entry_points(group="pytest11") if entry.name == "exmy"]
    if not found:
        pytest.skip("exmy is not installed, only on the path")
    assert found == ["verification.pytest_plugin"]


def test_loading_it_does_not_load_torch() -> None:
    """It is loaded by every run of pytest on the machine."""
    code = "import sys, verification.pytest_plugin; sys.exit('torch' in sys.modules or 'xarray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
