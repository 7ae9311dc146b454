"""Timing things in turns, so that what is compared sees the same machine.

A timed call makes PASSES passes and then waits for the device. Before each of its rounds everything that it is held against is
timed too: ratios are of medians of such rounds. Outputs are new tensors, as users get them, for the copy too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PASSES = 16 if DEVICE == "cuda" else 4


def passes(once: Callable[[], Any]) -> Callable[[], None]:
    def call() -> None:
        for _ in range(PASSES):
            once()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return call


def measure(
    benchmark: BenchmarkFixture,
    x: Tensor,
    once: Callable[[], Any],
    rounds: int = 100,
    against: dict[str, Callable[[], Any]] | None = None,
) -> None:
    """Time `once`; before each round also a copy of x and what else it is held `against`; note the ratios of medians."""
    others = {name: passes(call) for name, call in {"of_copy": x.clone, **(against or {})}.items()}
    seconds: dict[str, list[float]] = {name: [] for name in others}

    def others_first() -> None:
        for name, call in others.items():
            call()  # untimed: the first pass after another contender pays for the memory that the other gave back
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
        once()

    timed: Callable[..., Any] = benchmark.pedantic
    timed(passes(once), setup=others_first, rounds=rounds, warmup_rounds=3)
    if benchmark.stats:  # none under --benchmark-disable
        median_seconds = benchmark.stats.stats.median
        benchmark.extra_info["elements_per_second"] = x.numel() * PASSES / median_seconds
        for name, times in seconds.items():
            ratio = median(times) / median_seconds
            benchmark.extra_info[name] = 1 / ratio if name == "ours_faster" else ratio
