"""All 2^32 FP32 inputs, for every element format of at most 16 bits and every deterministic rounding, on one GPU.

In the order of their keys (magnitude codes from -inf to +inf) FP32 inputs rise, and so do the results of a rounding. The oracle
says, from mpmath's decision points, at which keys the result steps and from which value to which. A quantiser is right on all
inputs if and only if

    1. it is right at every step and at the input just before it, and
    2. nowhere else do two neighbouring inputs have different results.

The first is a comparison with the oracle on the host, of `quantize` to the format by name. The second is one fused pass over
all inputs on the device: quantise input i and input i + 1, compare bit patterns, count the differences, write nothing. If the
count is the oracle's number of steps and 1 holds, there is no step elsewhere. That needs no table on the device, so it runs at
the quantiser's own speed. All 2^24 - 2 NaN inputs are checked by themselves: each must come out as it went in. Then all 2^16
BF16 and FP16 inputs, which are FP32 inputs too, must come out as these did.

Formats that differ only in numbers share the compiled program of the second part, which gets the numbers as tensors: so some
hundred programs are compiled instead of thousands; lists of values have one each. Roundings run beside each other, a process
each, and the oracle in as many as there are cores.

    python -m verification.on_gpu [--formats e4m3fn,e5m2,...] [--roundings nearest_even,...] [--device cpu]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from formats import (
    ElementFormat,
    FloatFormat,
    FormatParameters,
    GridFormat,
    Overflow,
    Rounding,
    bitwise,
    element_format,
    float_format,
    format_parameters,
    list_formats,
    quantize,
)
from formats.bitwise import FP32, Constants
from verification.points import Codes
from verification.question import Question
from verification.staircase import INFINITY, inputs_of, patterns, step_keys

CHUNK = 1 << 27
SAVE_EVERY = 5  # seconds
Quantizer = Callable[[Tensor], Tensor]


def every_format() -> list[ElementFormat]:
    """Every registered element format of at most 16 bits that FP32 holds, each once."""
    names = [name for kind in ("float", "integer", "list") for name in list_formats(kind)]
    distinct = dict.fromkeys(f for f in map(element_format, names) if f.bits <= 16)
    return [f for f in distinct if float_format("fp32").holds(f)]


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


def steps_of(f: ElementFormat, roundings: tuple[str, ...]) -> dict[str, Steps]:
    """The oracle's part for each rounding, on the host; some seconds for a format of 16 bits."""
    found = {}
    for rounding in roundings:
        question = Question(f, rounding)
        steps = step_keys(question)
        keys = np.concatenate([steps, steps - 1, [-1 - INFINITY, INFINITY]])
        found[rounding] = Steps(len(steps), keys, patterns(question, keys))
    return found


def program_of(f: ElementFormat) -> tuple[object, ...]:
    """What of a format shapes its compiled program; formats of the same shape differ in numbers only."""
    if isinstance(f, GridFormat) or not bitwise.fits(f, FP32):
        return ("by name", f.canonical_name)
    if isinstance(f, FloatFormat) and f.shares_programs:
        return ("shared",)
    c = bitwise.constants(f, FP32)
    words = (c.odd_bias, c.smallest_bits, c.deep, c.signed, c.negative_zero, c.zero, c.ties_away)
    beyond = [bitwise.outcomes(f, rounding, Overflow.SATURATE) for rounding in Rounding if not rounding.is_stochastic]
    return (*words, c.max_bits != c.lowest_bits, *beyond)


def counter(f: ElementFormat, rounding: str, device: str, size: int = CHUNK) -> Callable[[Tensor, Tensor], Tensor]:
    """The fused pass for the format: its program, compiled once a process, with the format's numbers."""
    shape = program_of(f)
    if shape[0] == "by name":
        return _compiled_by_name(f.canonical_name, rounding, size)
    if shape == ("shared",):
        assert isinstance(f, FloatFormat)
        return partial(_compiled_shared(rounding, size), format_parameters([f], ndim=1, device=device))
    key = (shape, rounding, size)
    if key not in _programs:
        _programs[key] = _compiled_steps(f, rounding, size)
    return partial(_programs[key], numbers_of(f, device))


_programs: dict[tuple[object, ...], Callable[..., Tensor]] = {}


@cache
def _compiled_by_name(name: str, rounding: str, size: int) -> Callable[..., Tensor]:
    def program(start: Tensor, count: Tensor) -> Tensor:
        return changes(lambda x: quantize(x, name, rounding), start, count, size)

    return torch.compile(program, dynamic=False, fullgraph=True)


@cache
def _compiled_shared(rounding: str, size: int) -> Callable[..., Tensor]:
    def program(parameters: FormatParameters, start: Tensor, count: Tensor) -> Tensor:
        return changes(lambda x: quantize(x, parameters, rounding), start, count, size)

    return torch.compile(program, dynamic=False, fullgraph=True)


def _compiled_steps(example: ElementFormat, rounding: str, size: int) -> Callable[..., Tensor]:
    """For all formats of the example's program: the words in it are the example's, the numbers come as tensors."""
    words = bitwise.constants(example, FP32)
    beyond = bitwise.outcomes(example, Rounding(rounding), Overflow.SATURATE)
    alike = words.max_bits == words.lowest_bits

    def program(n: Numbers, start: Tensor, count: Tensor) -> Tensor:
        numbers: Any = (
            n.max_bits, n.max_bits if alike else n.lowest_bits, n.lsb_shift, n.half_less_one, n.keep_mask, n.subnormals_below,
            n.quantum, words.odd_bias, words.smallest_bits, words.smallest, words.deep, n.fixed_shift, n.fixed_half,
            n.fixed_mask, words.signed, words.negative_zero, words.zero, words.ties_away,
        )  # fmt: skip
        constants = Constants(*numbers)
        return changes(lambda x: bitwise.round_bits(x, FP32, constants, rounding, beyond, None, 0), start, count, size)

    return torch.compile(program, dynamic=False, fullgraph=True)


class Numbers(NamedTuple):
    """Constants of a format that are numbers, as 0-dim tensors: int32 patterns, shifts and masks, and an FP32 quantum."""

    max_bits: Tensor
    lowest_bits: Tensor
    lsb_shift: Tensor
    half_less_one: Tensor
    keep_mask: Tensor
    subnormals_below: Tensor
    fixed_shift: Tensor
    fixed_half: Tensor
    fixed_mask: Tensor
    quantum: Tensor


def numbers_of(f: ElementFormat, device: str) -> Numbers:
    """The format's own."""
    row = bitwise.constants(f, FP32)
    kinds = {name: torch.float32 if name == "quantum" else torch.int32 for name in Numbers._fields}
    return Numbers(**{n: torch.tensor(getattr(row, n), dtype=kind, device=device) for n, kind in kinds.items()})


def prove(f: ElementFormat, rounding: str, steps: Steps, device: str) -> str:
    """An empty string if every input comes out right, else what does not."""
    x = inputs_of(torch.from_numpy(steps.keys.astype(np.int32)).to(device))
    got = quantize(x, f, rounding).view(torch.int32).cpu().numpy()
    wrong = np.flatnonzero(got != steps.patterns)
    if len(wrong):
        return f"{len(wrong)} inputs beside a step, the first of key {steps.keys[wrong[0]]}"
    counted = count_changes(counter(f, rounding, device), device)
    if counted != steps.steps:
        return f"{counted} changes between neighbours where there should be {steps.steps}"
    if not nan_stays(f, rounding, device):
        return "a NaN changed"
    return next(
        (f"{dtype} differs from FP32" for dtype in narrow_carriers(f) if not agrees(f, rounding, dtype, device)), ""
    )


def count_changes(count: Callable[[Tensor, Tensor], Tensor], device: str) -> int:
    """Changes between neighbours among all inputs from -inf to +inf."""
    totals = []
    for start in range(-1 - INFINITY, INFINITY, CHUNK):  # pairs of the keys k and k + 1
        pairs = min(CHUNK, INFINITY - start)
        totals.append(count(_scalar(start, device), _scalar(pairs, device)))
    return int(torch.stack(totals).sum())


def _scalar(value: int, device: str) -> Tensor:
    return torch.tensor(value, dtype=torch.int32, device=device)


def nan_stays(f: ElementFormat, rounding: str, device: str) -> bool:
    """Whether every NaN comes out as it went in, bit for bit."""
    positive = torch.arange(INFINITY + 1, 1 << 31, device=device).to(torch.int32)
    for codes in (positive, positive | -(1 << 31)):
        if not torch.equal(quantize(codes.view(torch.float32), f, rounding).view(torch.int32), codes):
            return False
    return True


def narrow_carriers(f: ElementFormat) -> list[torch.dtype]:
    """Of BF16 and FP16 those that hold the format."""
    carriers = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    return [dtype for dtype, name in carriers.items() if float_format(name).holds(f)]


def agrees(f: ElementFormat, rounding: str, dtype: torch.dtype, device: str) -> bool:
    """Whether all 2^16 inputs of a narrow dtype come out as the FP32 inputs of the same values do."""
    x = torch.arange(1 << 16, device=device).to(torch.int16).view(dtype)
    x = x[~x.isnan()]
    same = quantize(x, f, rounding).float().view(torch.int32) == quantize(x.float(), f, rounding).view(torch.int32)
    return bool(same.all())


class Proof(NamedTuple):
    """One format and rounding: right where `wrong` is empty; seconds on the device, compiling included."""

    format: str
    rounding: str
    wrong: str
    seconds: float


def timed_proof(f: ElementFormat, rounding: str, steps: Steps, device: str) -> Proof:
    """A proof in a process of its rounding."""
    began = time.monotonic()
    try:
        wrong = prove(f, rounding, steps, device)
    except Exception as error:  # one proof that can't be made takes no other with it
        wrong = f"{type(error).__name__}: {error}"
    return Proof(f.name, rounding, wrong, round(time.monotonic() - began, 3))


def _start() -> None:
    """A process that proves: it compiles many programs from few functions, of one kernel each."""
    torch._dynamo.config.recompile_limit = 10_000
    torch._dynamo.config.accumulated_recompile_limit = 100_000
    torch._inductor.config.compile_threads = 1


def run(formats: list[ElementFormat], roundings: tuple[str, ...], seconds: float, device: str) -> Iterator[Proof]:
    """The proofs, each as it is made. The wide formats come first, since they take the oracle longest."""
    began = time.monotonic()
    columns = (TextColumn("proofs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    context = get_context("spawn")
    # Oracles give way: what they prepare waits for the few processes that compile and prove.
    oracles = ProcessPoolExecutor(mp_context=context, initializer=os.nice, initargs=(10,))
    devices = {rounding: ProcessPoolExecutor(1, mp_context=context, initializer=_start) for rounding in roundings}
    finished: SimpleQueue[Future[Any]] = SimpleQueue()
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("proofs", total=len(formats) * len(roundings))
        try:
            preparing: dict[Future[Any], ElementFormat] = {}
            for f in sorted(formats, key=lambda f: -f.bits):
                prepared = oracles.submit(steps_of, f, roundings)
                preparing[prepared] = f
                prepared.add_done_callback(finished.put)
            for _ in range(len(formats) * (1 + len(roundings))):
                done = finished.get(timeout=min(1e6, max(0.0, seconds - (time.monotonic() - began))))
                if done in preparing:
                    f = preparing.pop(done)
                    for rounding, steps in done.result().items():
                        devices[rounding].submit(timed_proof, f, rounding, steps, device).add_done_callback(
                            finished.put
                        )
                else:
                    yield done.result()
                    progress.advance(task)
        except Empty:
            return  # the time is up
        finally:
            for pool in (oracles, *devices.values()):
                pool.shutdown(wait=False, cancel_futures=True)


def write(path: Path, asked: int, began: float, device: str, proofs: list[Proof]) -> None:
    """What was proved so far, where, and how long it took; whole or not at all."""
    content = {
        "asked": asked,
        "seconds": round(time.monotonic() - began, 1),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "proofs": [proof._asdict() for proof in proofs],
    }
    partial_file = path.with_name(f"{path.name}.partial")
    partial_file.write_text(json.dumps(content, indent=1) + "\n")
    partial_file.replace(path)


def main() -> int:
    """Prove what was asked for, write what was found; 1 if anything was wrong or left out, 2 if there is no GPU."""
    deterministic = [rounding.value for rounding in Rounding if not rounding.is_stochastic]
    parser = argparse.ArgumentParser(description="All FP32 inputs of every narrow format, on a GPU.")
    parser.add_argument("--formats", help="names, by commas; all if not given")
    parser.add_argument("--roundings", default=",".join(deterministic))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: some ten seconds a proof")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many")
    parser.add_argument("--out", type=Path, default=Path("verify-gpu.json"))
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "verify-gpu needs a CUDA device, and there is none; make verify proves six formats on the CPU",
            file=sys.stderr,
        )
        return 2
    try:
        formats = [element_format(name) for name in options.formats.split(",")] if options.formats else every_format()
        roundings = tuple(str(Rounding(name).value) for name in options.roundings.split(","))
    except ValueError as error:
        print(f"verify-gpu: {error}", file=sys.stderr)
        return 2
    began = written = time.monotonic()
    asked, proofs = len(formats) * len(roundings), list[Proof]()
    status = 0
    try:
        for proof in run(formats, roundings, options.seconds, options.device):
            proofs.append(proof)
            if time.monotonic() - written > SAVE_EVERY:
                written = time.monotonic()
                write(options.out, asked, began, options.device, proofs)
    except KeyboardInterrupt:
        status = 130
    write(options.out, asked, began, options.device, proofs)
    failures = [proof for proof in proofs if proof.wrong]
    took = time.monotonic() - began
    print(f"{len(proofs)} of {asked} proofs, {len(failures)} failed, in {took:.0f} s: {options.out}", flush=True)
    for proof in failures[:20]:
        print(f"  {proof.format} {proof.rounding}: {proof.wrong}", file=sys.stderr)
    return status or int(bool(failures) or len(proofs) < asked)


if __name__ == "__main__":
    sys.exit(main())
