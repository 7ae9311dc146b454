"""The other kinds of implementation: decoders, stochastic quantisers, those on all inputs; and certificates of any."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

from formats import decode, element_format, quantize, torch_dtype, view_as_values
from verification import LAWS, Report, compare, matrix, read_certificates, verify, write_certificates
from verification.calls import Caller
from verification.certificates import by_default, label
from verification.elements import same_bits
from verification.laws import OF_INPUTS, Failure, law_of, off_grid
from verification.parity import differences
from verification.question import Question
from verification.staircase import INFINITY, Staircase, inputs_of
from verification.sweep import ALL, AllLaws, counts


# Decoders.
@pytest.mark.parametrize(
    "name", ["e4m3fn", "e5m2", "e4m3fnuz", "e8m0fnu", "e2m1fn", "int8", "int4", "nf4", "posit8", "bf16", "binary8p4se"]
)
def test_ours_decodes_every_code(name: str) -> None:
    report = verify(lambda c: decode(c, name, torch.float64), name, takes="codes")
    assert report.passed, str(report)
    assert report.input_dtype == "codes"
    assert report.checked == 1 << element_format(name).bits
    assert report.proves == "right for every code; a proof"


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz", "e8m0fnu"])
def test_dtypes_of_torch_and_ml_dtypes_decode_every_code(name: str) -> None:
    assert verify(lambda c: c.view(torch_dtype(name)).to(torch.float32), name, takes="codes").passed
    assert verify(lambda c: view_as_values(c.numpy(), name).astype(np.float64), name, takes="codes").passed


# Stochastic rounding.
def stochastic(name: str, **arguments: Any) -> Callable[[Tensor], Tensor]:
    """With another seed each time."""
    calls = iter(range(10**9))
    mode = arguments.pop("mode", "stochastic")
    return lambda x: quantize(x, name, mode, seed=next(calls), **arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["e4m3fn", "e2m1fn", "int8", "binary8p3ue"])
def test_ours_is_unbiased(name: str, dtype: torch.dtype) -> None:
    report = verify(stochastic(name), name, "stochastic", input_dtype=dtype, level="quick")
    assert report.passed, str(report)
    assert report.law("unbiased").verdict == "pass"
    assert report.law("deterministic").verdict == report.law("ties").verdict == "not applicable"


def test_it_is_found_to_be_stochastic() -> None:
    assert verify(stochastic("e4m3fn"), "e4m3fn", "found", level="quick").rounding == "stochastic"


def test_few_random_bits_are_as_biased_as_they_must_be() -> None:
    """stochastic_a with 4 bits rounds d down to sixteenths: up to 2^-4 too little, and no more (P3109 4.7.4)."""
    four = {"mode": "stochastic_a", "stochastic_bits": 4}
    told = verify(stochastic("e4m3fn", **four), "e4m3fn", "stochastic", level="quick").law("unbiased")
    assert told.verdict == "fail"
    assert "standard deviations away from zero" in told.smallest.note  # type: ignore[union-attr]
    assert verify(stochastic("e4m3fn", **four), "e4m3fn", "stochastic", level="quick", bias=2.0**-4).passed
    assert not verify(stochastic("e4m3fn", **four), "e4m3fn", "stochastic", level="quick", bias=2.0**-6).passed


def test_all_stochastic_results_can_not_be_asked() -> None:
    with pytest.raises(ValueError, match="for them the levels are quick and conditional"):
        verify(stochastic("e4m3fn"), "e4m3fn", "stochastic", level="exhaustive")
    with pytest.raises(ValueError, match="bias is a share of the distance between neighbours"):
        verify(stochastic("e4m3fn"), "e4m3fn", "stochastic", bias=2.0)


# All inputs.
@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e8m0fnu", "int8", "binary8p3ue", "e4m3fnuz", "nf4", "bf16"])
def test_every_fp32_input_belongs_to_one_law(name: str) -> None:
    question = Question(element_format(name))
    counted = counts(question)
    assert sum(counted.values()) == ALL
    assert counted["nan"] == 2 * (2**23 - 1)
    assert (counted["infinity"], counted["signed_zero"]) == (2, 2)
    # By counting, in the 2^16 inputs of every binade's start: keys that end in 16 zeros.
    keys = np.arange(-1 - INFINITY, INFINITY + 1, 1 << 16)
    x = inputs_of(torch.from_numpy(keys.astype(np.int32))).double().numpy()
    own = law_of(question, "float32", x, question.expected(x))
    for place, law in enumerate(OF_INPUTS):
        assert abs(int((own == place).sum()) * 65536 - counted[law]) <= max(4 * 65536, 0.01 * ALL) or law == "nan", law


@pytest.mark.parametrize(
    "conventions", [{}, {"zero": "unsigned"}, {"subnormals": "flushed"}, {"subnormals": "flushed_early"}]
)
def test_the_staircase_is_the_question_asked_input_by_input(conventions: dict[str, str]) -> None:
    question = Question(element_format("e4m3fn"), "nearest_away", "propagate", **conventions)
    stairs = Staircase(question)
    for start in (
        -1 - INFINITY,
        -0x43E00000 - 70,
        -0x3C800000 - 40,
        -60,
        0x3A000000 - 30,
        0x3C700000,
        0x43E00000 - 9,
        INFINITY - 99,
    ):
        stop = min(start + 100, INFINITY + 1)
        x = inputs_of(torch.arange(start, stop, dtype=torch.int32))
        right = torch.from_numpy(question.expected(x.double().numpy())).float()
        assert torch.equal(stairs.patterns(start, stop), right.view(torch.int32))
    for step in stairs.steps[:: len(stairs.steps) // 9].tolist():  # at the first and at the last of a chunk
        for start, stop in ((step, step + 30), (step - 30, step + 1), (step - 30, step), (step, step + 1)):
            x = inputs_of(torch.arange(start, stop, dtype=torch.int32))
            right = torch.from_numpy(question.expected(x.double().numpy())).float()
            assert torch.equal(stairs.patterns(start, stop), right.view(torch.int32))


@pytest.mark.parametrize("name", ["e4m3fn", "e8m0fnu", "int8", "binary8p3ue", "e5m2"])
def test_many_wrong_inputs_are_sorted_as_one_by_one(name: str) -> None:
    """An eighth of all inputs wrong, in five places; by law, count and smallest, and which leave the grid."""
    question = Question(element_format(name))

    def wrong_often(x: Tensor) -> Tensor:
        y = quantize(x, name)
        return torch.where((x.view(torch.int32) * 2654435761 & 0x7) == 0, y * 2 + 1e-3, y)

    caller, laws = Caller(wrong_often, question.f), AllLaws(question)
    found: dict[str, tuple[int, Failure | None]] = dict.fromkeys((*OF_INPUTS, "on_grid"), (0, None))
    counted, smallest = dict.fromkeys(found, 0), dict[str, float]()
    for start in (-0x43E00000 - 5000, -5000, 0x3C800000 - 5000, 0x43E00000 - 3000, INFINITY - 5000):
        x = inputs_of(torch.arange(start, min(start + 10000, INFINITY + 1), dtype=torch.int32))
        got, right = caller(x), torch.from_numpy(question.expected(x.double().numpy())).float()
        wrong = ~same_bits(got, right)
        laws.sort_out(start, x, got, wrong, found)
        places = np.flatnonzero(wrong.numpy())
        values = x.double().numpy()[places]
        own = law_of(question, "float32", values, question.expected(values))
        counted["on_grid"] += len(off_grid(question.f, values, got.double().numpy()[places]))
        for place, law in enumerate(OF_INPUTS):
            mine = np.abs(values[own == place])
            counted[law] += len(mine)
            smallest[law] = min([smallest.get(law, np.inf), *mine.tolist()])
    assert {law: count for law, (count, _) in found.items()} == counted
    assert counted["rounding"] > 1000
    for law, (count, failure) in found.items():
        if count and law != "on_grid":
            assert failure is not None
            assert abs(failure.input) == smallest[law]


# Certificates.
def cast(x: Tensor) -> Tensor:
    return x.to(torch.float8_e4m3fn).to(x.dtype)


@pytest.fixture(scope="module")
def some() -> list[Report]:
    """Ours, torch's from FP64, NumPy's from FP32, a stochastic one and blocks."""
    ours = verify(lambda x: quantize(x, "e4m3fn"), "e4m3fn", name="exmy", version="1")
    theirs = verify(cast, "e4m3fn", "found", "found", torch.float64, name="torch", version="2")
    numpys = verify(lambda x: x.astype(ml_dtypes.float4_e2m1fn).astype(x.dtype), "e2m1fn", "found", "found", takes="array",
                    name="ml_dtypes", version="3")  # fmt: skip
    mx = verify(lambda x: quantize(x, "mxfp4:ceil"), "mxfp4", name="exmy", version="1")
    odd = verify(
        lambda x: quantize(x, "e4m3fn", "to_odd"), "e4m3fn", "found", claimed="to_odd", name="exmy", version="1"
    )
    return [ours, theirs, numpys, mx, odd]


def test_certificates_come_back_as_they_were(some: list[Report], tmp_path: Path) -> None:
    write_certificates(some, tmp_path / "a.json")
    assert [r.to_dict() for r in read_certificates(tmp_path / "a.json")] == [r.to_dict() for r in some]
    write_certificates(some, tmp_path / "a.json.gz")
    assert [r.to_dict() for r in read_certificates(tmp_path / "a.json.gz")] == [r.to_dict() for r in some]
    assert (tmp_path / "a.json.gz").stat().st_size < (tmp_path / "a.json").stat().st_size / 5
    assert not re.search(r": -?(NaN|Infinity)", (tmp_path / "a.json").read_text())  # JSON has no such words
    failure = json.loads((tmp_path / "a.json").read_text())[1]["laws"][9]["smallest"]
    assert failure["exact"] == "4503599627370497/4611686018427387904"
    assert failure["decision_point"] == "1/1024"
    for text in ("{}", "[1]", "not json", '[{"format": "e4m3fn"}]'):
        (tmp_path / "b.json").write_text(text)
        with pytest.raises(ValueError, match=r"b\.json is no certificate"):
            read_certificates(tmp_path / "b.json")


def test_certificates_touch_no_file_but_theirs(tmp_path: Path) -> None:
    kept = [tmp_path / name for name in ("a.json.partial", "a.json.tmp")]
    for file in kept:
        file.write_text("mine")
    write_certificates([], tmp_path / "a.json")
    assert {file.read_text() for file in kept} == {"mine"}
    assert sorted(tmp_path.iterdir()) == [tmp_path / "a.json", *kept]


def test_a_certificate_to_a_pipe_leaves_the_pipe_where_it_is(some: list[Report], tmp_path: Path) -> None:
    """As /dev/stdout may be one: a file renamed onto it would take its place, as it would a device's."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_certificates(some[:1], pipe)
    written = os.read(reader, 1 << 20)
    os.close(reader)
    assert json.loads(written)[0]["format"] == "e4m3fn"
    assert pipe.is_fifo()
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        write_certificates(some, tmp_path / "folder")


def test_a_matrix_has_a_place_for_every_judgement(some: list[Report], tmp_path: Path) -> None:
    data = matrix(some)
    assert dict(data.sizes) == {"implementation": 4, "format": 3, "input_dtype": 2, "law": len(LAWS)}
    assert data["implementation"].values.tolist() == ["exmy 1", "torch 2", "ml_dtypes 3", "exmy 1 to_odd"]
    torchs = data.sel(implementation="torch 2", format="e4m3fn", input_dtype="float64")
    assert str(torchs["verdict"].sel(law="single_rounding").values) == "fail"
    assert int(torchs["failed"].sel(law="single_rounding")) == 252
    assert (
        str(data["verdict"].sel(implementation="torch 2", format="mxfp4", input_dtype="float32", law="nan").values)
        == ""
    )
    assert (
        str(data["convention_nan"].sel(implementation="ml_dtypes 3", format="e2m1fn", input_dtype="float32").values)
        == "zero"
    )
    data.to_netcdf(tmp_path / "m.nc", engine="h5netcdf")
    xr.testing.assert_identical(xr.load_dataset(tmp_path / "m.nc", engine="h5netcdf"), data)
    assert [label(r) for r in by_default(some)] == ["exmy 1", "torch 2", "ml_dtypes 3", "exmy 1"]


def test_what_changed_between_two_versions_is_told(some: list[Report]) -> None:
    assert compare(some, some) == []
    mended = verify(lambda x: quantize(x, "e4m3fn", overflow="nonsaturating"), "e4m3fn", "found", "found", torch.float64,
                    name="torch", version="4")  # fmt: skip
    changes = compare(some, [mended])
    assert "torch e4m3fn float64 nearest_even: single_rounding: fail (252), now pass" in changes
    assert "torch e4m3fn float64 nearest_even: overflow: saturate, now nonsaturating" in changes
    back = compare([mended], some)
    assert any("single_rounding: pass, now fail (252); 0.0009765625000000002" in line for line in back)


def test_a_report_has_every_law_once(some: list[Report]) -> None:
    for report in some:
        assert [verdict.law for verdict in report.laws] == list(LAWS)
        with pytest.raises(KeyError, match="no law 'speed': there are interface, on_grid"):
            report.law("speed")


def test_compiled_code_on_this_cpu_keeps_subnormals() -> None:
    """Formats as wide as BF16 rest on it; on a GPU `test_cuda` says so of Triton's code."""
    from verification.every_input import has_compiler
    from verification.parity import flushed

    if not has_compiler():
        pytest.skip("no C++ compiler to compile with")
    assert not any(flushed("cpu").values())


def test_differences_are_counted_pattern_by_pattern() -> None:
    """A program that is wrong at one pattern of every 1,024."""

    def wrong(x: Tensor) -> Tensor:
        return torch.where((x.view(torch.int32) & 0x3FF) == 5, 7.0, quantize(x, "e4m3fn"))

    programs = {"right": ("cpu", lambda x: quantize(x, "e4m3fn")), "same": ("cpu", lambda x: quantize(x, "e4m3fn")),
                "wrong": ("cpu", wrong)}  # fmt: skip
    assert differences(programs, (1 << 23) + 3000, lambda: None, where="cpu") == {"same": 0, "wrong": (1 << 13) + 3}
