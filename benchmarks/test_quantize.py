"""Quantise FP32 to FP32: ours, the peers', and a plain copy, which is as fast as memory allows.

On a GPU if there is one, else on the CPU. A timed call makes PASSES passes over the data and then waits for the device.
`extra_info` says elements/s and, as of_copy, a copy's time over ours: it is timed before every round, so that both see
the same machine. Outputs are new tensors, as users get them, for the copy too. On a CPU leave the cores to it: a
neighbour on one of them makes the threads wait for each other, and only the minimum means anything.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from formats import FormatParameters, format_parameters, quantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ELEMENTS = 2**28 if DEVICE == "cuda" else 2**20
PASSES = 16 if DEVICE == "cuda" else 4
ROUNDS = 100
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


def passes(once: Callable[[], Any]) -> Callable[[], None]:
    def call() -> None:
        for _ in range(PASSES):
            once()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return call


def measure(benchmark: BenchmarkFixture, x: Tensor, once: Callable[[], Any], rounds: int = ROUNDS) -> None:
    """Time `once`, a copy of x before each round, and note how they compare."""
    copies: list[float] = []
    copy = passes(x.clone)

    def copy_first() -> None:
        start = time.perf_counter()
        copy()
        copies.append(time.perf_counter() - start)

    timed: Callable[..., Any] = benchmark.pedantic
    timed(passes(once), setup=copy_first, rounds=rounds, warmup_rounds=3)
    if benchmark.stats:  # none under --benchmark-disable
        seconds = benchmark.stats.stats.median
        benchmark.extra_info["elements_per_second"] = ELEMENTS * PASSES / seconds
        benchmark.extra_info["of_copy"] = median(copies) / seconds


def test_copy(benchmark: BenchmarkFixture, x: Tensor) -> None:
    measure(benchmark, x, x.clone)


def test_copy_into_place(benchmark: BenchmarkFixture, x: Tensor) -> None:
    out = torch.empty_like(x)
    measure(benchmark, x, lambda: out.copy_(x))


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_compiled_with_constants(benchmark: BenchmarkFixture, x: Tensor, rounding: str) -> None:
    torch._dynamo.reset()
    program = torch.compile(lambda x: quantize(x, FORMAT, rounding), fullgraph=True, dynamic=False)
    measure(benchmark, x, lambda: program(x))


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_compiled_with_parameters(benchmark: BenchmarkFixture, x: Tensor, rounding: str) -> None:
    torch._dynamo.reset()
    parameters = format_parameters(RUNS, ndim=2, device=DEVICE)

    def of_runs(x: Tensor, parameters: FormatParameters) -> Tensor:
        return quantize(x, parameters, rounding)

    program = torch.compile(of_runs, fullgraph=True, dynamic=False)
    measure(benchmark, x, lambda: program(x, parameters))


def test_eager(benchmark: BenchmarkFixture, x: Tensor) -> None:
    measure(benchmark, x, lambda: quantize(x, FORMAT), rounds=20)


def test_torch_float8_round_trip(benchmark: BenchmarkFixture, x: Tensor) -> None:
    """Eager and not clamped: beyond the range torch gives NaN, where ours saturates."""
    measure(benchmark, x, lambda: x.to(torch.float8_e4m3fn).to(torch.float32), rounds=20)


@pytest.mark.skipif(DEVICE == "cuda", reason="ml_dtypes runs on the CPU only")
def test_ml_dtypes_round_trip(benchmark: BenchmarkFixture, x: Tensor) -> None:
    """Not clamped either."""
    array = x.numpy()
    measure(benchmark, x, lambda: array.astype(ml_dtypes.float8_e4m3fn).astype(np.float32), rounds=10)
