"""All 2^32 FP32 inputs of a few formats on the CPU, against an oracle of runs: `make verify`, minutes.

In the order of FP32's codes the expected results are runs: each value of the format, repeated from the first input that rounds
to it up to the next one's first. The first inputs come from the oracle's decision points, so nothing here knows a bit trick.
Negative inputs must give the negative results, and NaN inputs must come out as they went in. For every other format see
`verification.on_gpu`.

    python -m verification.every_input [--formats e4m3fn,e5m2,...] [--roundings nearest_even,toward_zero]
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from formats import FloatFormat, float_format, quantize
from verification import oracle
from verification.points import from_codes

INFINITY = 0x7F800000
NAMES = ("e4m3fn", "e5m2", "bf16", "fp16", "e8m3", "e3m4")
ROUNDINGS = ("nearest_even", "toward_zero")
CHUNK = 1 << 22
PARTS = 32
Codes = npt.NDArray[np.int64]
Quantizer = Callable[[Tensor], Tensor]


def first_inputs(f: FloatFormat, rounding: str) -> Codes:
    """For each value from code 1 up, the FP32 code of the smallest input that rounds to it."""
    steps = oracle.decision_points(f, rounding)
    near = steps.astype(np.float32)
    at_or_above = near.view(np.int32) + (near.astype(np.float64) < steps)
    even_below = (np.arange(len(steps)) % 2 == 0) & (rounding == "nearest_even")
    on_step = near.astype(np.float64) == steps
    return np.asarray(at_or_above + (on_step & even_below), np.int64)


class Runs(NamedTuple):
    """What non-negative inputs round to, in the order of their codes: FP32 patterns, and the code at which each begins."""

    patterns: npt.NDArray[np.int32]
    begins: Codes


@cache
def runs(f: FloatFormat, rounding: str) -> Runs:
    """The runs of a format whose codes ascend with its values."""
    return Runs(oracle.values(f).astype(np.float32).view(np.int32), first_inputs(f, rounding))


def expected(f: FloatFormat, rounding: str, codes: Codes) -> npt.NDArray[np.int32]:
    """The patterns of what these ascending codes of non-negative numbers round to."""
    found = runs(f, rounding)
    ends = np.searchsorted(codes, found.begins)
    return np.repeat(found.patterns, np.diff(ends, prepend=0, append=len(codes)))


def first_wrong(f: FloatFormat, rounding: str, codes: Codes, quantizer: Quantizer) -> str:
    """Of these ascending codes, and of the same with the sign bit, the first that comes out wrong; empty if none does."""
    numbers = codes[codes <= INFINITY]
    want = np.concatenate([expected(f, rounding, numbers), codes[codes > INFINITY].astype(np.int32)])
    for sign in (0, -(1 << 31)):
        x = from_codes(codes + (1 << 31 if sign else 0), torch.float32)
        got = quantizer(x).view(torch.int32).numpy()
        wrong = got != (want | np.int32(sign))
        if wrong.any():
            at = int(wrong.argmax())
            return f"{float(x[at]).hex()} becomes {float(got[at : at + 1].view(np.float32)[0]).hex()}"
    return ""


def chunks(start: int, stop: int) -> Iterator[Codes]:
    """The codes start..stop - 1, a piece at a time."""
    for begin in range(start, stop, CHUNK):
        yield np.arange(begin, min(begin + CHUNK, stop))


def has_compiler() -> bool:
    """Whether torch.compile can work on this CPU."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++"))


@cache
def _quantizer(name: str, rounding: str) -> Quantizer:
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 1000  # one of these for each proof

    def program(x: Tensor) -> Tensor:
        return quantize(x, name, rounding)

    return torch.compile(program, fullgraph=True, dynamic=False) if has_compiler() else program


class Part(NamedTuple):
    """A piece of one proof: the codes start..stop - 1, with and without the sign bit."""

    name: str
    rounding: str
    start: int
    stop: int


def check_part(part: Part) -> str:
    """What is wrong in it, if anything."""
    f = float_format(part.name)
    for codes in chunks(part.start, part.stop):
        wrong = first_wrong(f, part.rounding, codes, _quantizer(part.name, part.rounding))
        if wrong:
            return f"{part.name} {part.rounding}: {wrong}"
    return ""


def main() -> int:
    """Prove, with progress; 0 if everything is right, 1 if not, 2 for names that mean nothing here."""
    parser = argparse.ArgumentParser(description="All 2^32 FP32 inputs, on the CPU.")
    parser.add_argument("--formats", default=",".join(NAMES), help="floating-point formats that FP32 holds, by commas")
    parser.add_argument("--roundings", default=",".join(ROUNDINGS), help="nearest_even, toward_zero")
    options = parser.parse_args()
    try:
        names = [float_format(name).name for name in options.formats.split(",")]
        proofs = [(name, rounding) for rounding in options.roundings.split(",") for name in names]
        for name, rounding in proofs:
            check_proof(name, rounding)
    except ValueError as error:
        print(f"every_input: {error}", file=sys.stderr)
        return 2
    size = (1 << 31) // PARTS
    parts = [Part(name, rounding, i * size, (i + 1) * size) for name, rounding in proofs for i in range(PARTS)]
    began = time.monotonic()
    wrong: list[str] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(show_speed=True), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    workers = ProcessPoolExecutor(mp_context=get_context("spawn"))
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("all FP32 inputs", total=len(parts))
        try:
            for done in as_completed([workers.submit(check_part, part) for part in parts]):
                wrong += [done.result()] if done.result() else []
                progress.advance(task)
        finally:
            workers.shutdown(wait=False, cancel_futures=True)
    for line in wrong:
        print(line, file=sys.stderr)
    how = "compiled" if has_compiler() else "eager: no C++ compiler"
    passed = len(proofs) - len({tuple(line.split(":")[0].split()) for line in wrong})
    print(
        f"{passed} of {len(proofs)} proofs over all 2^32 FP32 inputs hold ({how}), in {time.monotonic() - began:.0f} s"
    )
    return 1 if wrong else 0


def check_proof(name: str, rounding: str) -> None:
    """ValueError unless the runs of this format and rounding are what the proof is about."""
    if rounding not in ROUNDINGS:
        raise ValueError(f"roundings are {' and '.join(ROUNDINGS)}, got {rounding!r}; make verify-gpu has the others")
    f = float_format(name)
    if not (f.has_negative_zero and f.bits <= 16 and float_format("fp32").holds(f)):
        raise ValueError(f"{name}: formats here have -0, at most 16 bits, and fit FP32; make verify-gpu has the others")


if __name__ == "__main__":
    sys.exit(main())
