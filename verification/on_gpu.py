"""All 2^32 FP32 inputs, for every element format of at most 16 bits and every deterministic rounding, on one GPU.

In the order of their keys (magnitude codes from -inf to +inf) FP32 inputs rise, and so do the results of a rounding. The oracle
says, from mpmath's decision points, at which keys the result steps and from which value to which. A quantiser is right on all
inputs if and only if

    1. it is right at every step and at the input just before it, and
    2. nowhere else do two neighbouring inputs have different results.

The first is a comparison with the oracle on the host. The second is one fused pass over all inputs on the device: quantise
input i and input i + 1, compare bit patterns, count the differences, write nothing. If the count is the oracle's number of
steps and 1 holds, there is no step elsewhere. That needs no table on the device, so it runs at the quantiser's own speed.
NaN inputs are checked by themselves: each must come out as it went in.

    python -m verification.on_gpu [--formats e4m3fn,e5m2,...] [--roundings nearest_even,...] [--seconds 600] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from formats import (
    ElementFormat,
    FloatFormat,
    FormatParameters,
    element_format,
    float_format,
    format_parameters,
    list_formats,
    quantize,
)
from formats.rounding import DETERMINISTIC
from verification import oracle
from verification.points import Codes, from_codes

INFINITY = 0x7F800000
CHUNK = 1 << 27
Quantizer = Callable[[Tensor], Tensor]


def every_format() -> list[ElementFormat]:
    """Every registered element format of at most 16 bits that FP32 holds, each once."""
    names = [name for kind in ("float", "integer", "list") for name in list_formats(kind)]
    distinct = dict.fromkeys(f for f in map(element_format, names) if f.bits <= 16)
    return [f for f in distinct if float_format("fp32").holds(f)]


def inputs_of(keys: Tensor) -> Tensor:
    """FP32 numbers of int32 keys: k for the code k, and -1 - k for the code k with the sign bit."""
    return torch.where(keys >= 0, keys, (-1 - keys) | -(1 << 31)).view(torch.float32)


def step_keys(f: ElementFormat, rounding: str) -> Codes:
    """The keys of the inputs at which the oracle's result differs from that of the input before, ascending.

    Between two neighbouring decision points nothing steps, so only inputs around them are candidates: their own FP32
    neighbours, and zero, where the sign changes.
    """
    listed = oracle.table(f)
    targets = np.unique(np.concatenate([listed.entries, listed.middles]))
    with np.errstate(over="ignore"):
        near = np.clip(targets, -3.4028234663852886e38, 3.4028234663852886e38).astype(np.float32)
    codes = near.view(np.int32).astype(np.int64)
    at = np.where(codes >= 0, codes, -1 - (codes & 0x7FFFFFFF))
    around = np.unique(np.concatenate([*(at + near for near in range(-2, 3)), [-1, 0, 1, INFINITY, -1 - INFINITY + 1]]))
    around = around[(around > -1 - INFINITY) & (around <= INFINITY)]
    here, before = patterns(f, rounding, around), patterns(f, rounding, around - 1)
    return np.asarray(around[here != before])


def patterns(f: ElementFormat, rounding: str, keys: Codes) -> Codes:
    """The FP32 bit patterns of the oracle's results for inputs of these keys."""
    x = inputs_of(torch.from_numpy(keys.astype(np.int32))).double().numpy()
    result = oracle.expected(f, rounding, x).astype(np.float32)
    return np.asarray(result.view(np.int32), np.int64)


def changes(quantizer: Quantizer, start: Tensor, count: Tensor, size: int) -> Tensor:
    """How many of `count` neighbouring pairs, from the key `start` on, come out different; both 0-dim int32 tensors."""
    offset = torch.arange(size, dtype=torch.int32, device=start.device)
    keys = start + offset
    here = quantizer(inputs_of(keys)).view(torch.int32)
    after = quantizer(inputs_of(keys + 1)).view(torch.int32)
    return ((here != after) & (offset < count)).sum()


class Steps(NamedTuple):
    """The oracle's part of one proof: how many keys results step at, and the inputs beside them with their results."""

    steps: int
    keys: Codes
    patterns: Codes


def steps_of(question: tuple[ElementFormat, str]) -> Steps:
    """The oracle's part, on the host; a second for a format of 16 bits."""
    f, rounding = question
    steps = step_keys(f, rounding)
    keys = np.concatenate([steps, steps - 1, [-1 - INFINITY, INFINITY]])
    return Steps(len(steps), keys, patterns(f, rounding, keys))


def prove(steps: Steps, quantizer: Quantizer, count_changes: Callable[[Tensor, Tensor], Tensor]) -> str:
    """An empty string if every input comes out right, else what does not."""
    got = quantizer(inputs_of(torch.from_numpy(steps.keys.astype(np.int32)).to("cuda"))).view(torch.int32).cpu().numpy()
    wrong = np.flatnonzero(got != steps.patterns)
    if len(wrong):
        return f"{len(wrong)} inputs beside a step, the first of key {steps.keys[wrong[0]]}"
    totals = []
    for start in range(-1 - INFINITY, INFINITY, CHUNK):  # pairs of the keys k and k + 1
        count = min(CHUNK, INFINITY - start)
        where = torch.tensor(start, dtype=torch.int32, device="cuda")
        totals.append(count_changes(where, torch.tensor(count, dtype=torch.int32, device="cuda")))
    counted = int(torch.stack(totals).sum())
    return "" if counted == steps.steps else f"{counted} changes between neighbours where there should be {steps.steps}"


def nan_stays(f: ElementFormat, rounding: str, device: str) -> bool:
    """Whether every 101st NaN comes out as it went in, bit for bit."""
    codes = np.arange(INFINITY + 1, 1 << 31, 101)
    x = from_codes(np.concatenate([codes, codes + (1 << 31)]), torch.float32).to(device)
    return torch.equal(quantize(x, f, rounding).view(torch.int32), x.view(torch.int32))


def main() -> int:
    """Prove what was asked for, write what was found; 1 if anything was wrong, 2 if there is no GPU."""
    parser = argparse.ArgumentParser(description="All FP32 inputs of every narrow format, on a GPU.")
    parser.add_argument("--formats", help="names, by commas; all if not given")
    parser.add_argument("--roundings", default=",".join(DETERMINISTIC))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing new after so many")
    parser.add_argument("--out", type=Path, default=Path("verify-gpu.json"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "verify-gpu needs a CUDA device, and there is none; make verify proves six formats on the CPU",
            file=sys.stderr,
        )
        return 2
    formats = [element_format(name) for name in options.formats.split(",")] if options.formats else every_format()
    results = run(formats, options.roundings.split(","), options.seconds)
    options.out.write_text(json.dumps(results._asdict(), indent=1) + "\n")
    failures = [row for row in results.proofs if row["wrong"]]
    done = len(results.proofs)
    print(f"{done} of {results.asked} proofs, {len(failures)} failed, in {results.seconds:.0f} s: {options.out}")
    for row in failures[:20]:
        print(f"  {row['format']} {row['rounding']}: {row['wrong']}", file=sys.stderr)
    return 1 if failures or done < results.asked else 0


class Results(NamedTuple):
    """What was proved, where and how long it took; a proof is right where `wrong` is empty."""

    asked: int
    seconds: float
    device: str
    torch: str
    cuda: str
    python: str
    proofs: list[dict[str, object]]


def run(formats: list[ElementFormat], roundings: list[str], seconds: float) -> Results:
    """The proofs, one a format and rounding, formats that can share a compiled program first."""
    torch._dynamo.config.recompile_limit = 10_000
    torch._dynamo.config.accumulated_recompile_limit = 100_000
    began = time.monotonic()
    ordered = sorted(formats, key=lambda f: not _shares(f))
    questions = [(f, rounding) for f in ordered for rounding in roundings]
    together = {mode: torch.compile(_with_parameters(mode), dynamic=False, fullgraph=True) for mode in roundings}
    proofs: list[dict[str, object]] = []
    columns = (TextColumn("proofs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    workers = ProcessPoolExecutor(mp_context=get_context("spawn"))
    with workers, Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("proofs", total=len(questions))
        oracles = workers.map(steps_of, questions, chunksize=len(roundings))
        for (f, rounding), steps in zip(questions, oracles, strict=True):
            if time.monotonic() - began > seconds:
                workers.shutdown(wait=False, cancel_futures=True)
                break
            start = time.monotonic()
            wrong = prove(steps, partial(quantize, f=f, rounding=rounding), _counter(f, rounding, together[rounding]))
            wrong = wrong or ("" if nan_stays(f, rounding, "cuda") else "a NaN changed")
            took = round(time.monotonic() - start, 3)
            proofs.append({"format": f.name, "rounding": str(rounding), "wrong": wrong, "seconds": took})
            progress.advance(task)
    return Results(
        len(questions),
        round(time.monotonic() - began, 1),
        torch.cuda.get_device_name(),
        torch.__version__,
        str(torch.version.cuda),
        platform.python_version(),
        proofs,
    )


def _shares(f: ElementFormat) -> bool:
    return isinstance(f, FloatFormat) and f.shares_programs


def _counter(f: ElementFormat, rounding: str, together: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    if isinstance(f, FloatFormat) and f.shares_programs:
        return partial(together, format_parameters([f], ndim=1, device="cuda"))
    torch._dynamo.reset()
    return torch.compile(_by_name(f, rounding), dynamic=False, fullgraph=True)


def _with_parameters(rounding: str) -> Callable[..., Tensor]:
    def program(parameters: FormatParameters, start: Tensor, count: Tensor) -> Tensor:
        return changes(lambda x: quantize(x, parameters, rounding), start, count, CHUNK)

    return program


def _by_name(f: ElementFormat, rounding: str) -> Callable[..., Tensor]:
    name = f.canonical_name

    def program(start: Tensor, count: Tensor) -> Tensor:
        return changes(lambda x: quantize(x, name, rounding), start, count, CHUNK)

    return program


if __name__ == "__main__":
    sys.exit(main())
