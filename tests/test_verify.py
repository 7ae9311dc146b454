"""`exmy verify` as a user meets it: what it prints, its exit status, its certificate, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from exmy.cli import main
from verification.adapters import OURS

OWN = """
import torch

def to_fp8(x):
    return x.to(torch.float8_e4m3fn).to(x.dtype)

def leaves_the_grid(x):
    return torch.where(x == 1.5, x + 1 / 32, to_fp8(x))
"""

KINDS = """
import itertools
import torch
from formats import decode, encode, quantize

seeds = itertools.count()

def mx(x):
    return quantize(x, "mxfp4")

def decodes(codes):
    return decode(codes, "e4m3fn")

def codes(x):
    return x.to(torch.float8_e4m3fn)

def chance(x):
    return quantize(x, "e4m3fn", "stochastic", seed=next(seeds))
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
    assert "e4m3fn from float64 breaks single_rounding" in done.output
    assert "0x1.0000000000001p-10" in done.output


def test_a_function_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_kernels.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    done = invoke("own_kernels:to_fp8", "--format", "e4m3fn", "--level", "quick")
    assert "own_kernels:to_fp8, level quick: " in done.output
    assert done.exit_code == 0, done.output
    wrong = invoke("own_kernels:leaves_the_grid", "--format", "e4m3fn")
    assert wrong.exit_code == 1
    assert "breaks on_grid" in wrong.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["torch", "e9m3"], "e9m3: exponent_bits must be 1..8, got 9"),
        (["torch", "e4m3"], "torch has no e4m3: it has"),
        (["nobody"], "nobody: neither exmy, torch"),
        (["nobody:f", "--format", "e4m3fn"], "nobody:f: nobody can't be imported"),
        (
            ["./nobody.py:f", "--format", "e4m3fn"],
            "; MODULE is a name, as after import: nobody:f, from the folder of nobody.py",
        ),
        (["syss:f", "--format", "e4m3fn"], "looked for in this folder, "),
        (["math:sin"], "math:sin: say which format it rounds to, by --format"),
        (["math:nothing", "--format", "e4m3fn"], "math has no function 'nothing'"),
        (["math:sine", "--format", "e4m3fn"], "math has no function 'sine'; did you mean 'sin'?"),
        (
            ["exmy", "e4m3fn", "--rounding", "up"],
            "rounding must be found, or one that it offers (nearest_even, nearest_away, ",
        ),
        (["exmy", "e4m3fn", "--overflow", "wrap"], "overflow must be one of saturate"),
        (["exmy", "fp32"], "fp32: every level lists every value, so at most 20 bits, got 32"),
        (["exmy", "e8m3", "--input", "float16"], "e8m3 does not fit float16"),
        (["exmy", "e4m3fn", "--input", "float64", "--level", "exhaustive"], "2^64 inputs can't all be asked"),
        (["ml_dtypes", "e5m2", "--input", "bfloat16"], "ml_dtypes is given float32, float64, float16, got bfloat16"),
        (["e4m3fn"], "e4m3fn is a format: say first who is to be judged, as in exmy verify torch e4m3fn"),
        (["transformer-engine"], "transformer-engine: needs a CUDA device, which is not here"),
        (["exmy", "mxfp4", "--level", "exhaustive"], "mxfp4: all blocks can't be asked"),
        (["exmy", "mxfp4", "--rule", "up"], "rule must be one of floor, ceil, rceil, nearest, even, found, got 'up'"),
        (
            ["exmy", "e4m3fn", "--zero", "lost"],
            "zero must be one of signed, unsigned, signed_anyway, smallest, nan, found, got 'lost'",
        ),
        (["exmy", "e4m3fn", "--against", "nowhere.json"], "nowhere.json: No such file or directory"),
        (["exmy", "e4m3fn", "--from", "a.json"], "--from is for --matrix"),
        (["exmy", "--matrix", "folder"], "--matrix judges all that is here: leave exmy out"),
        (
            ["exmy", "e4m3fn", "--gives", "codes"],
            "--gives codes is for MODULE:FUNCTION, and exmy is none; leave it out",
        ),
        (["torch", "e4m3fn", "--takes", "array"], "--takes array is for MODULE:FUNCTION, and torch is none"),
        (["torch", "e4m3fn", "--device", "cuda"], "--device cuda is for MODULE:FUNCTION, and torch is none"),
        (["--gives", "codes"], "--gives codes is for MODULE:FUNCTION, and exmy is none"),
        (["--matrix", "folder", "--takes", "array"], "--takes array is for MODULE:FUNCTION, and --matrix is none"),
        (["--level", "quick"], "the complete proof asks every input: for --level quick say who is to be judged"),
        (["exmy", "e4m3fn", "--rule", "bogus"], "--rule bogus is of scales, and e4m3fn has none; leave it out"),
        (["--rule", "floor"], "rule must be one of amax, found, got 'floor'"),
        (["exmy", "e4m3fn", "--json", "/proc/nowhere/a.json"], "/proc/nowhere: no such folder; name another place"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments: list[str], message: str) -> None:
    refused = invoke(*arguments)
    assert refused.exit_code == 2, refused.output
    assert message in refused.output
    assert "Traceback" not in refused.output
    assert not Path("folder").exists()


def test_blocks_decoders_and_stochastic_functions_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_kinds.py").write_text(KINDS)
    monkeypatch.chdir(tmp_path)
    blocks = invoke("own_kinds:mx", "--format", "mxfp4", "--rule", "floor")
    assert blocks.exit_code == 0, blocks.output
    assert "floor, nearest_even, saturate" in " ".join(blocks.output.split())
    assert invoke("own_kinds:decodes", "--format", "e4m3fn", "--takes", "codes").exit_code == 0
    chance = invoke("own_kinds:chance", "--format", "e4m3fn", "--rounding", "stochastic", "--level", "quick")
    assert chance.exit_code == 0, chance.output
    assert "no bias that 2^14 results" in " ".join(chance.output.split())
    codes = invoke("own_kinds:codes", "--format", "e4m3fn", "--gives", "codes", "--overflow", "found")
    assert codes.exit_code == 0, codes.output


def test_a_certificate_is_held_against_an_earlier_one(tmp_path: Path) -> None:
    before = tmp_path / "before.json"
    assert invoke("torch", "e4m3fn", "--json", before).exit_code == 0
    same = invoke("torch", "e4m3fn", "--against", before)
    assert f"nothing differs from {before}" in same.output.replace("\n", "")
    rows = json.loads(before.read_text())
    rows[0]["conventions"]["nan"] = "largest"
    before.write_text(json.dumps(rows))
    assert (
        "torch e4m3fn float32 nearest_even: nan: largest, now nan"
        in invoke("torch", "e4m3fn", "--against", before).output
    )


def test_a_matrix_of_certificates(tmp_path: Path) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json.gz"
    assert invoke("torch", "e4m3fn", "--input", "float64", "--json", one).exit_code == 1
    assert invoke("exmy", "mxfp4", "--json", two).exit_code == 0
    made = invoke("--matrix", tmp_path / "matrix", "--from", one, "--from", two)
    assert made.exit_code == 0, made.output
    names = {path.name for path in (tmp_path / "matrix").iterdir()}
    assert names == {"index.html", "matrix.png", "matrix.nc", "certificates.json"}


def test_without_words_it_is_the_complete_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of what is proved; one of its short judgements is made, and stopped after."""
    from exmy import verify as module

    listed = module.complete(module.Asked())
    asked = {(job.format, job.dtype): job.asked.level for job in listed}
    for name in OURS:
        assert asked[name, "float32"] == "exhaustive"
        assert asked[name, "float64"] == "conditional"
    assert asked["e4m3fn", "bfloat16"] == asked["e4m3fn", "float16"] == "exhaustive"
    assert asked["mxfp4", "float32"] == asked["nvfp4", "float32"] == "conditional"
    assert {job.claimed for job in module.complete(module.Asked(rounding="to_odd"))} == {"to_odd"}
    with pytest.raises(ValueError, match="rounding must be found, or one that it offers"):
        module.complete(module.Asked(rounding="up"))
    short = [job for job in listed if (job.format, job.dtype) == ("e2m1fn", "bfloat16")]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "complete", lambda _: short)
    done = invoke()
    assert done.exit_code == 0, done.output
    assert "exmy-certificate.json" in done.output
    assert json.loads((tmp_path / "exmy-certificate.json").read_text())[0]["checked"] == 2**16
    (tmp_path / "exmy-certificate.json").unlink()

    def interrupted(jobs: Any, _: Any = None) -> Any:
        yield jobs[0].run(lambda _: None)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "reports", interrupted)
    stop = invoke()
    assert stop.exit_code == 130
    assert "what 1 judgements said is in exmy-certificate.json" in stop.output
    assert (tmp_path / "exmy-certificate.json").exists()


def test_every_job_is_checked_before_the_first_is_judged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """e3m2fn has neither inf nor NaN for nonsaturating."""
    from exmy import verify as module

    monkeypatch.setattr(module, "reports", lambda _: pytest.fail("judged"))
    refused = invoke("exmy", "e4m3fn", "e3m2fn", "--overflow", "nonsaturating", "--json", tmp_path / "c.json")
    assert refused.exit_code == 2
    assert "e3m2fn has neither inf nor NaN" in refused.output


def test_where_there_is_no_exhaustive_level_it_is_said_which_is_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from exmy import verify as module

    listed = module.complete(module.Asked(level="exhaustive"))
    levels = {(job.format, job.dtype): job.asked.level for job in listed}
    assert levels["mxfp4", "float32"] == levels["e4m3fn", "float64"] == "conditional"
    assert levels["e4m3fn", "float32"] == "exhaustive"
    ours = module.jobs("exmy", (), module.Asked(level="exhaustive"))
    assert {job.asked.level for job in ours if job.format in ("mxfp4", "nvfp4")} == {"conditional"}

    def none(_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "reports", none)
    monkeypatch.chdir(tmp_path)
    said = invoke("--level", "exhaustive").output
    assert "of float64 inputs and scaled formats all can't be asked: they are judged at level conditional" in said


def test_a_module_and_a_function_that_are_nearly_right_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nearly_kernels.py").write_text("import nothing_of_this_name\n")
    absent = invoke("nearly_kernel:f", "--format", "e4m3fn").output
    assert "among what is installed; did you mean 'nearly_kernels'?" in absent
    broken = invoke(
        "nearly_kernels:f", "--format", "e4m3fn"
    ).output  # found, and broken: not to be looked for elsewhere
    assert "No module named 'nothing_of_this_name')" in broken
    assert "looked for" not in broken
