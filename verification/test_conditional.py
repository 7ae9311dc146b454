"""Our quantiser at every decision point of every format of up to 16 bits: eager, compiled, constants, parameters.

The expectations are the oracle's, from mpmath. Level: conditional.
"""

import os
import shutil
from collections.abc import Container, Iterable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from formats import (
    ElementFormat,
    FloatFormat,
    Overflow,
    element_format,
    float_format,
    format_parameters,
    list_formats,
    quantize,
)
from formats.rounding import DETERMINISTIC
from verification import verify
from verification.elements import find_wrong
from verification.points import decision_inputs
from verification.question import Question

FP32, FP64 = float_format("fp32"), float_format("fp64")
ROUNDINGS = [mode.value for mode in DETERMINISTIC]


def listed() -> list[ElementFormat]:
    """Every registered element format of at most 16 bits, each once, whatever its names."""
    names = [name for kind in ("float", "integer", "list") for name in list_formats(kind)]
    names += ["e4m3fnb8", "e4m3b11", "e5m2b8fnuz", "e8m3b140", "e3m2-nosub", "e4m3fn-nosub", "e2m5f-nosub", "lns6q2"]
    return list(dict.fromkeys(f for f in map(element_format, names) if f.bits <= 16))


def in_ci(f: ElementFormat) -> bool:
    """Whether `make test` takes the format: of those of more than 12 bits, which take a second to list, two widths alone.

    Of these a few of each kind: P3109's shortest and longest precisions, splits of exponent and mantissa with every suffix,
    integers and posits. `make verify` takes every one, at every point.
    """
    if f.bits <= 12 or f.name in ("int13", "int16", "posit13", "posit16"):
        return True
    if not isinstance(f, FloatFormat) or f.bits not in (13, 16):
        return False
    if f.name.startswith("binary"):
        ends = f.name in ("binary16p1se", "binary16p15uf")
        return ends or f.mantissa_bits + 1 in ((1, 2, 8, 12) if f.bits == 13 else (8,))
    return f.exponent_bits in ((2, 5, 8) if f.bits == 13 else (5, 8))


def held(f: ElementFormat, carrier: FloatFormat) -> bool:
    """Whether the carrier holds every value; lists of values that float64 does not hold have no oracle either."""
    return carrier.holds(f)


EVERY = listed()
IN_CI = [f for f in EVERY if in_ci(f)]
AT_MOST = 300
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")),
    reason="no C++ compiler to compile with",
)
needs_cuda = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def check_every_mode(f: ElementFormat, dtype: torch.dtype, at_most: int | None) -> None:
    x = decision_inputs(f, dtype, at_most)
    for overflow in Overflow:
        if overflow is Overflow.NONSATURATING and not (f.has_inf or f.has_nan):
            with pytest.raises(ValueError, match="has neither inf nor NaN"):
                quantize(x, f, overflow=overflow)
            continue
        for rounding in ROUNDINGS:
            wrong = find_wrong(Question(f, rounding, overflow), x, quantize(x, f, rounding, overflow))
            assert not len(wrong), (f, rounding, overflow, [float(v).hex() for v in x[wrong[:5]]])


@pytest.mark.parametrize("f", IN_CI, ids=str)
def test_every_mode_is_right_at_the_decision_points(f: ElementFormat) -> None:
    """All of them for narrow formats; of wider ones some hundred, the ends always among them."""
    assert held(f, FP32) or held(f, FP64) or f.name.startswith("binary")
    for dtype, carrier in ((torch.float32, FP32), (torch.float64, FP64)):
        if held(f, carrier):
            check_every_mode(f, dtype, AT_MOST)


@pytest.mark.proof
@pytest.mark.parametrize("f", EVERY, ids=str)
def test_every_mode_is_right_at_every_decision_point(f: ElementFormat) -> None:
    for dtype, carrier in ((torch.float32, FP32), (torch.float64, FP64)):
        if held(f, carrier):
            check_every_mode(f, dtype, None)


def to_prove(cases: Iterable[tuple[str, str]], in_ci: Container[tuple[str, str]]) -> list[Any]:
    """The cases, those that are not in CI being longer proofs."""
    return [case if case in in_ci else pytest.param(*case, marks=pytest.mark.proof) for case in cases]


NARROW_AND_BF16 = ["e4m3fn", "e5m2", "bf16", "e8m0fnu", "int8", "nf4", "posit8"]


@pytest.mark.parametrize(
    ("name", "rounding"),
    [
        *product(NARROW_AND_BF16, ROUNDINGS),
        *to_prove(product(["tf32"], ROUNDINGS), [("tf32", "nearest_even")]),  # of 2^19 values
    ],
)
def test_verify_says_so(name: str, rounding: str) -> None:
    report = verify(lambda x: quantize(x, name, rounding), name, rounding)
    report.raise_for_failures()


@pytest.mark.parametrize("formats", [IN_CI, pytest.param(EVERY, marks=pytest.mark.proof)], ids=["in_ci", "every"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_one_batch_of_all_formats(rounding: str, formats: list[ElementFormat]) -> None:
    check_mixed(rounding, "cpu", compiled=False, among=formats)


@needs_compiler
@pytest.mark.parametrize("formats", [IN_CI, pytest.param(EVERY, marks=pytest.mark.proof)], ids=["in_ci", "every"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_one_compiled_program_for_all_formats(rounding: str, formats: list[ElementFormat]) -> None:
    check_mixed(rounding, "cpu", compiled=True, among=formats)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_cuda)])
def test_all_formats_on_a_gpu(rounding: str, device: str, compiled: bool) -> None:
    check_mixed(rounding, device, compiled=compiled, among=IN_CI)


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=needs_compiler), pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize(
    ("name", "rounding"),
    to_prove(
        product(["e4m3fn", "e8m0fn", "bf16"], ROUNDINGS),
        {
            ("e4m3fn", "nearest_even"),
            ("e4m3fn", "to_odd"),
            ("e8m0fn", "toward_positive"),
            ("e8m0fn", "toward_negative"),
            ("bf16", "toward_zero"),
            ("bf16", "nearest_away"),
        },
    ),
)
def test_compiled_with_constants(name: str, rounding: str, device: str) -> None:
    torch._dynamo.reset()
    program = torch.compile(lambda x: quantize(x, name, rounding), fullgraph=True)
    verify(lambda x: program(x.to(device)), name, rounding).raise_for_failures()


def check_mixed(rounding: str, device: str, compiled: bool, among: list[ElementFormat]) -> None:
    """One program, eight formats in the rows of every batch; all inputs of all formats pass through it."""
    plain = [f for f in among if isinstance(f, FloatFormat) and FP32.holds(f) and f.shares_programs]
    torch._dynamo.reset()
    program = torch.compile(quantize, fullgraph=True, dynamic=False) if compiled else quantize
    by_size = sorted(plain, key=lambda f: f.max_code)
    for start in range(0, len(by_size), 8):
        formats = (by_size[start:] + by_size[:8])[:8]
        parameters = format_parameters(formats, ndim=2, device=device)
        inputs = [decision_inputs(f, torch.float32, AT_MOST) for f in formats]
        outputs = [program(batch.to(device), parameters, rounding).cpu() for batch in rows_in_batches(inputs)]
        for f, x, got in zip(formats, inputs, torch.cat(outputs, dim=1), strict=True):
            assert not len(find_wrong(Question(f, rounding), x, got[: len(x)])), f


def rows_in_batches(inputs: list[Tensor], columns: int = 1 << 14) -> Iterator[Tensor]:
    """The inputs as rows of batches of one fixed shape, padded with zeros."""
    for start in range(0, max(map(len, inputs)), columns):
        batch = torch.zeros(len(inputs), columns)
        for row, x in zip(batch, inputs, strict=True):
            piece = x[start : start + columns]
            row[: len(piece)] = piece
        yield batch


@needs_compiler
def test_a_program_follows_its_format_and_rounding() -> None:
    torch._dynamo.reset()
    program = torch.compile(quantize, fullgraph=True)
    x = decision_inputs(float_format("e3m2"), torch.float32)
    e5m2, e3m2f = float_format("e5m2"), float_format("e3m2f")
    for f, rounding in (
        ("e4m3fn", "nearest_even"), ("e4m3fn", "toward_zero"), (e5m2, "toward_zero"), (e3m2f, "nearest_even"),
        (e5m2, "toward_zero"), ("e4m3fn", "nearest_even"),
    ):  # fmt: skip
        same = program(x, f, rounding).view(torch.int32) == quantize(x, f, rounding).view(torch.int32)
        assert same.all(), (f, rounding)


def test_nan_keeps_its_bits_and_inputs_are_left_alone() -> None:
    bits = torch.tensor([0x7F800001, 0x7FC12345, -1, -0x7FFFFF], dtype=torch.int32)
    x = bits.view(torch.float32)
    for name in ("e4m3fn", "e2m1fn", "fp32"):
        assert torch.equal(quantize(x, name).view(torch.int32), bits)
        assert torch.equal(x.view(torch.int32), bits)


def test_flush_to_zero_changes_nothing() -> None:
    formats = [float_format(name) for name in ("bf16", "e8m3", "e8m0fn", "e7m8", "fp16", "e4m3fn")]
    inputs = [decision_inputs(f, torch.float32) for f in formats]
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        outputs = [quantize(x, f, rounding) for f, x in zip(formats, inputs, strict=True) for rounding in ROUNDINGS]
    finally:
        torch.set_flush_denormal(False)
    questions = ((f, x, rounding) for f, x in zip(formats, inputs, strict=True) for rounding in ROUNDINGS)
    for (f, x, rounding), got in zip(questions, outputs, strict=True):
        assert not len(find_wrong(Question(f, rounding), x, got)), (f, rounding)


def test_any_shape_and_layout_and_no_gradient() -> None:
    x = torch.linspace(-3, 3, 60, requires_grad=True).reshape(3, 4, 5).transpose(0, 2)
    got = quantize(x, "e3m2f")
    assert got.shape == x.shape
    assert not got.requires_grad
    assert torch.equal(got.reshape(-1), quantize(x.reshape(-1), "e3m2f"))
    assert quantize(torch.empty(0, 3), "e4m3").shape == (0, 3)
    assert quantize(torch.tensor(17.0), "e4m3fn") == 16


def test_parameters_broadcast_along_the_first_axis() -> None:
    names: list[FloatFormat | str] = ["e4m3fn", float_format("e5m2")]
    parameters = format_parameters(names, ndim=4)
    assert {field.shape for field in parameters} == {(2, 1, 1, 1)}
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    got = quantize(x, parameters)
    for row, name in enumerate(names):
        assert torch.equal(got[row], quantize(x[row], name))
