"""Quantise FP32 to FP32: ours, the peers', and a plain copy, which is as fast as memory allows.

On a GPU if there is one, else on the CPU. A timed call makes PASSES passes over the data and then waits for the device.
What is compared is timed in turns, before every round, so that both see the same machine: `extra_info` has elements/s,
`of_copy` (a copy's time over this one's), `of_constants` (for formats as tensors: the time with constants over this one's)
and `ours_faster` (for peers: their time over ours, compiled). Outputs are new tensors, as users get them, for the copy
too. On a CPU leave the cores to it: a neighbour on one of them makes the threads wait for each other.
"""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.turns import DEVICE, measure
from formats import FormatParameters, format_parameters, quantize

ELEMENTS = 2**28 if DEVICE == "cuda" else 2**20
ROUNDINGS = ["nearest_even", "toward_zero"]
FORMAT = "e4m3fn"
RUNS = ["e4m3fn", "e5m2", "bf16", "e8m3", "e4m3", "e3m2", "e5m7", "fp16"]

pytestmark = pytest.mark.benchmark(group=f"quantize 2^{ELEMENTS.bit_length() - 1} FP32 on {DEVICE}", disable_gc=True)


@pytest.fixture(scope="module")
def x() -> Tensor:
    """Normal numbers in eight rows, one a run."""
    return torch.randn(
        len(RUNS), ELEMENTS // len(RUNS), generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE
    )


def with_constants(x: Tensor, rounding: str) -> Callable[[], Tensor]:
    """Ours, compiled for one format."""
    program = torch.compile(lambda x: quantize(x, FORMAT, rounding), fullgraph=True, dynamic=False)
    return lambda: program(x)


def test_copy(benchmark: BenchmarkFixture, x: Tensor) -> None:
    measure(benchmark, x, x.clone)


def test_copy_into_place(benchmark: BenchmarkFixture, x: Tensor) -> None:
    out = torch.empty_like(x)
    measure(benchmark, x, lambda: out.copy_(x))


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_compiled_with_constants(benchmark: BenchmarkFixture, x: Tensor, rounding: str) -> None:
    torch._dynamo.reset()
    assert torch.equal(with_constants(x, rounding)(), quantize(x, FORMAT, rounding))
    measure(benchmark, x, with_constants(x, rounding))


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_compiled_with_parameters(benchmark: BenchmarkFixture, x: Tensor, rounding: str) -> None:
    torch._dynamo.reset()
    parameters = format_parameters(RUNS, ndim=2, device=DEVICE)

    def of_runs(x: Tensor, parameters: FormatParameters) -> Tensor:
        return quantize(x, parameters, rounding)

    program = torch.compile(of_runs, fullgraph=True, dynamic=False)
    assert torch.equal(program(x, parameters)[0], quantize(x[0], RUNS[0], rounding))
    measure(benchmark, x, lambda: program(x, parameters), against={"of_constants": with_constants(x, rounding)})


def against_ours(benchmark: BenchmarkFixture, x: Tensor, once: Callable[[], Any]) -> None:
    """A slower way to the same values, held against ours, compiled, to nearest even."""
    torch._dynamo.reset()
    assert torch.equal(torch.as_tensor(once()), quantize(x, FORMAT)), "not the same work"
    measure(benchmark, x, once, rounds=20, against={"ours_faster": with_constants(x, "nearest_even")})


def test_eager(benchmark: BenchmarkFixture, x: Tensor) -> None:
    against_ours(benchmark, x, lambda: quantize(x, FORMAT))


def test_torch_float8_round_trip(benchmark: BenchmarkFixture, x: Tensor) -> None:
    """Eager and not clamped: beyond the range torch gives NaN, where ours saturates."""
    against_ours(benchmark, x, lambda: x.to(torch.float8_e4m3fn).to(torch.float32))


@pytest.mark.skipif(DEVICE == "cuda", reason="ml_dtypes runs on the CPU only")
def test_ml_dtypes_round_trip(benchmark: BenchmarkFixture, x: Tensor) -> None:
    """Not clamped either."""
    array = x.numpy()
    against_ours(benchmark, x, lambda: array.astype(ml_dtypes.float8_e4m3fn).astype(np.float32))
