"""Our quantiser on a CPU and on a GPU, eager and compiled: the same bits for all 2^32 FP32 inputs, NaN and its payload
included.

That each is right is another matter (`verify` at level "exhaustive", on either device); this holds them against each other
directly, and so needs no oracle. A chunk of bit patterns is quantised in four ways and compared on the GPU. Stochastic
rounding has its bits from a seed and the element's index. Besides: whether compiled code, Triton's on a GPU and C++ on a CPU,
keeps subnormal numbers, which formats as wide as BF16 rest on.

    python -m verification.parity --out FILE.json [--formats e4m3fn,e5m2,...] [--roundings nearest_even,...]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from formats import get_format, quantize
from formats.rounding import Rounding
from verification.report import environment

FORMATS = ("e4m3fn", "e5m2", "e2m1fn", "fp16", "bf16")
ROUNDINGS = ("nearest_even", "toward_zero", "stochastic")
CHUNK = 1 << 22
"""Patterns at a time: what a CPU computes of them stays in its cache."""
SEED = 2405
Program = Callable[[Tensor], Tensor]
WAYS = ("cpu eager", "cpu compiled", "cuda eager", "cuda compiled")


def ways(name: str, rounding: str) -> dict[str, tuple[str, Program]]:
    """The device and the program of each way."""
    seed = SEED if rounding.startswith(Rounding.STOCHASTIC) else None

    def program(x: Tensor) -> Tensor:
        return quantize(x, name, rounding, seed=seed)

    return {
        way: (way.split()[0], torch.compile(program, dynamic=False) if "compiled" in way else program) for way in WAYS
    }


def differences(
    programs: dict[str, tuple[str, Program]], stop: int, step: Callable[[], None], where: str = "cuda"
) -> dict[str, int]:
    """For each way after the first, for how many of the patterns 0..stop - 1 it gives other bits; compared on `where`."""
    first_way, *others = programs
    found = dict.fromkeys(others, 0)
    for start in range(0, stop, CHUNK):
        codes = torch.arange(start, min(start + CHUNK, stop), device=where)
        x = {where: codes.to(torch.int32).view(torch.float32)}
        x["cpu"] = x[where].cpu()
        results = {way: program(x[device]).view(torch.int32).to(where) for way, (device, program) in programs.items()}
        for way in others:
            found[way] += int((results[way] != results[first_way]).sum())
        step()
    return found


def flushed(device: str) -> dict[str, int]:
    """How many subnormal numbers each compiled operation loses: those that come out as another number than they must.

    All 2^23 - 1 positive FP32 and 127 positive BF16 ones. What is right are integers: a pattern, twice it, half of it.
    """
    operations: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
        "x * 1": (lambda x: x * 1.0, lambda c: c),
        "x + 0": (lambda x: x + 0.0, lambda c: c),
        "x * 2": (lambda x: x * 2.0, lambda c: 2 * c),  # the exponent field takes the carry
        "2 x / 2": (lambda x: (x * 2.0) * 0.5, lambda c: c),
        "max(x, 0)": (lambda x: torch.clamp(x, min=0.0), lambda c: c),
    }
    found = {}
    for dtype, integers, bits in ((torch.float32, torch.int32, 23), (torch.bfloat16, torch.int16, 7)):
        codes = torch.arange(1, 1 << bits, device=device).to(integers)
        torch._dynamo.reset()
        every = torch.compile(lambda x: tuple(operation(x) for operation, _ in operations.values()), dynamic=False)
        for (name, (_, right)), got in zip(operations.items(), every(codes.view(dtype)), strict=True):
            lost = got.view(integers) != right(codes)
            found[f"{name} {str(dtype).removeprefix('torch.')}"] = int(lost.sum())
    return found


def main() -> int:
    """Compare, write, say; 1 if any bit differs or a subnormal was lost, 2 without a GPU or for names that mean nothing."""
    parser = argparse.ArgumentParser(
        description="Our quantiser on CPU and GPU, eager and compiled, over all FP32 inputs."
    )
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--roundings", default=",".join(ROUNDINGS))
    parser.add_argument("--out", type=Path, default=Path("parity.json"))
    parser.add_argument("--patterns", type=int, default=1 << 32, help="fewer, for a try")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("parity needs a CUDA device, and there is none", file=sys.stderr)
        return 2
    try:
        names = [get_format(name).name for name in options.formats.split(",")]
        roundings = [str(Rounding(name).value) for name in options.roundings.split(",")]
    except ValueError as error:
        print(f"parity: {error}", file=sys.stderr)
        return 2
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(show_speed=True), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    content: dict[str, Any] = {"environment": environment("cuda"), "against": WAYS[0], "parity": []}
    content["subnormals_lost"] = {device: flushed(device) for device in ("cpu", "cuda")}
    rows: list[dict[str, Any]] = content["parity"]
    chunks = -(-options.patterns // CHUNK)
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("parity", total=len(names) * len(roundings) * chunks)
        for rounding in roundings:
            for name in names:
                began = time.monotonic()
                torch._dynamo.reset()
                found = differences(ways(name, rounding), chunks * CHUNK, lambda: progress.advance(task))
                seconds = round(time.monotonic() - began, 1)
                rows.append(
                    {
                        "format": name,
                        "rounding": rounding,
                        "inputs": chunks * CHUNK,
                        "different": found,
                        "seconds": seconds,
                    }
                )
                print(f"{name} {rounding} {seconds} s {found}", flush=True)
                options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")  # as it goes
    lost = sum(sum(counts.values()) for counts in content["subnormals_lost"].values())
    wrong = sum(sum(row["different"].values()) for row in rows) + lost
    print(f"{len(rows)} comparisons, {wrong} differences or lost subnormals: {options.out}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
