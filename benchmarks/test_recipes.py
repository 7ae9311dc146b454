"""What a step costs in each recipe, against native BF16, on GPT-2 124M where there is a GPU.

Before each timed round of a recipe's pack the native pack makes as many steps, so that both see the same machine;
`times_native` in extra_info is the ratio of the medians. On a CPU, where carriers are FP32 and steps eager, the model is tiny
and the ratios say what eager rounding costs there.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import pytest

from benchmarks.test_packs import CASES, CUDA, DEVICE, Case, note_device, synchronize, text
from train.loss_scale import DynamicLossScale
from train.optim import AdamW
from train.pack import Pack
from train.program import Probe, Program, Slot
from train.resolve import resolve_recipe

CASE = CASES["gpt2-124m" if CUDA else "2x64"]
RECIPES = (
    "masked-e8m3", "stochastic-e8m3", "fp8-hybrid-unscaled", "fp8-hybrid", "fp8-hybrid-delayed", "fp8-row", "mxfp8", "deepseek",
    "nvfp4-all", "nvfp4-nearest", "mxfp4", "int8", "ms-amp-o2", "native-fp8", "native-fp16-scaled", "native-bf16-math",
)  # fmt: skip
EVERY = 10  # steps between two looks
# Aimed at: at most so many times the native step, on one H100.
LIMITS = {"masked-e8m3": 1.05, "fp8-hybrid": 1.05, "mxfp8": 1.15, "deepseek": 1.15, "nvfp4-all": 1.35}


def make(name: str, case: Case, signals_every: int = 0) -> Pack:
    """A pack of the case's size in one recipe, warmed up: compiled, and recorded where there is a GPU."""
    recipe = resolve_recipe(name)
    program = Program(
        case.shape, recipe.structure, "python", 10_000, case.sequences, 100, "cosine", 0.1, AdamW(), 10_000, case.sequences,
        Probe(0), state=recipe.state, signals_every=signals_every,
        dynamic_loss_scale=DynamicLossScale() if recipe.loss_scale is None else None,
    )  # fmt: skip
    pack = Pack(program, [Slot(recipe, 1e-3, i, i) for i in range(case.runs)], text(case.tokenizer), DEVICE)
    for _ in range(4 if not signals_every else 2 * signals_every + 1):
        pack.step()
    synchronize()
    return pack


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(benchmark: Any, name: str) -> None:
    compare(benchmark, make("native-bf16", CASE), make(name, CASE), CASE.steps)
    if benchmark.stats:
        benchmark.extra_info["at_most"] = LIMITS.get(name)


@pytest.mark.parametrize("name", ["native-bf16", "fp8-hybrid"])
def test_signals(benchmark: Any, name: str) -> None:
    """All alarm signals against none, over whole rounds of ten steps, one of which is looked at."""
    compare(benchmark, make(name, CASE), make(name, CASE, EVERY), EVERY)
    if benchmark.stats:
        benchmark.extra_info["at_most"] = 1.03


def compare(benchmark: Any, native: Pack, pack: Pack, count: int) -> None:
    """So many steps of the pack, timed after as many of the other, in turns."""
    others: list[float] = []

    def steps(of: Pack) -> None:
        for _ in range(count):
            of.step()
        synchronize()

    def native_first() -> None:
        begun = time.perf_counter()
        steps(native)
        others.append(time.perf_counter() - begun)

    benchmark.group = "recipes"
    benchmark.pedantic(lambda: steps(pack), setup=native_first, rounds=10 if CUDA else 5, warmup_rounds=2)
    if benchmark.stats:
        benchmark.extra_info["milliseconds"] = 1e3 * benchmark.stats.stats.median / count
        benchmark.extra_info["native_milliseconds"] = 1e3 * median(others) / count
        benchmark.extra_info["times_native"] = benchmark.stats.stats.median / median(others)
        note_device(benchmark)
    assert pack.train_loss[0].isfinite().all()
