"""Encode and decode 2^24 elements in NumPy on one core, beside ml_dtypes' casts to and from the same types, and NumPy's of
fp16.

From FP32 to codes, saturating, which theirs are not; from codes to FP64 and to FP32. The peer is timed in turns with ours:
`of_peer` is its time over ours, so above 1 ours is the faster one. Wide results are bound by memory, for which a first write
of 128 MB is the limit. Set OMP_NUM_THREADS=1: bf16 goes through torch's conversion, which would use every core, and theirs one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.turns import DEVICE
from formats import element_format
from formats.bits import decode, encode, numpy_dtype, view_as_codes

ELEMENTS = 2**24
ROUNDS = 7
NAMES = [
    "bf16", "fp16", "e5m2", "e4m3", "e4m3fn", "e3m4", "e5m2fnuz", "e4m3fnuz", "e4m3b11fnuz", "e8m0fnu", "e3m2fn", "e2m3fn",
    "e2m1fn", "int4", "int2",
]  # fmt: skip

pytestmark = [
    pytest.mark.benchmark(group=f"codes of 2^24 elements in NumPy {np.__version__}, ml_dtypes {ml_dtypes.__version__}"),
    pytest.mark.skipif(DEVICE == "cuda", reason="arrays are the CPU's"),
]


@pytest.fixture(scope="module")
def x() -> npt.NDArray[np.float32]:
    """Normal numbers, which no format here finds only small or large."""
    torch.set_num_threads(1)
    return np.random.default_rng(0).standard_normal(ELEMENTS, np.float32)


def in_turns(benchmark: BenchmarkFixture, ours: Callable[[], Any], peers: Callable[[], Any]) -> None:
    """Time one pass of ours a round, and one of the peer's before it."""
    seconds: list[float] = []

    def peer_first() -> None:
        start = time.perf_counter()
        peers()
        seconds.append(time.perf_counter() - start)

    timed: Callable[..., Any] = benchmark.pedantic
    timed(ours, setup=peer_first, rounds=ROUNDS, warmup_rounds=1)
    if benchmark.stats:  # none under --benchmark-disable
        benchmark.extra_info["elements_per_second"] = ELEMENTS / benchmark.stats.stats.median
        benchmark.extra_info["of_peer"] = median(seconds) / benchmark.stats.stats.median


@pytest.mark.parametrize("name", NAMES)
def test_encode(benchmark: BenchmarkFixture, x: npt.NDArray[np.float32], name: str) -> None:
    dtype = numpy_dtype(name)
    inside = (
        np.abs(x) < element_format(name).max if not name.startswith(("int", "e8m0")) else np.zeros(x.shape, np.bool_)
    )
    assert np.array_equal(encode(x, name)[inside], view_as_codes(x.astype(dtype))[inside]), "not the same work"
    in_turns(benchmark, lambda: encode(x, name), lambda: x.astype(dtype))


@pytest.mark.parametrize("wide", ["float64", "float32"])
@pytest.mark.parametrize("name", NAMES)
def test_decode(benchmark: BenchmarkFixture, x: npt.NDArray[np.float32], name: str, wide: str) -> None:
    codes = encode(np.abs(x) if name == "e8m0fnu" else x, name)
    theirs = codes.view(numpy_dtype(name))
    assert np.array_equal(decode(codes, name, wide), theirs.astype(wide)), "not the same work"
    in_turns(benchmark, lambda: decode(codes, name, wide), lambda: theirs.astype(wide))
