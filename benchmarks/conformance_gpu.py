"""What a GPU adds to the conformance matrix: every implementation that runs there, judged; ours on all 2^32 FP32 inputs.

    python -m benchmarks.conformance_gpu --out benchmarks/results/conformance-h100.json

Ours, eager and compiled, and torch's casts are judged by level "exhaustive" where that can be, since a GPU makes seconds of it.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from exmy.verify import Asked, Job, everything
from formats.scaled import is_scaled_name
from verification import Report, write_certificates

EXHAUSTIVE = ("float32", "bfloat16", "float16")


def listed() -> list[Job]:
    """Of all that is here those on the GPU by their default rounding, and torch's casts on the CPU of this version."""
    found = []
    for job in everything(Asked()):
        slow = "compiled" in job.implementation and (job.dtype != "float32" or ":" in job.format)  # a program each
        if job.asked.device == "cuda" and job.claimed == "nearest_even" and not slow:
            whole = job.dtype in EXHAUSTIVE and not is_scaled_name(job.format) and "torchao" not in job.implementation
            found.append(replace(job, asked=replace(job.asked, level="exhaustive")) if whole else job)
        elif job.implementation == "torch":
            found.append(job)
    return found


def main() -> int:
    """Judge, write as it goes, say how long each took; 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=Path("conformance-gpu.json"))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("conformance_gpu needs a CUDA device, and there is none", file=sys.stderr)
        return 2
    began, found, left = time.monotonic(), list[Report](), 0
    jobs = listed()
    for place, job in enumerate(jobs):
        if time.monotonic() - began > options.seconds:
            left = len(jobs) - place
            break
        start = time.monotonic()
        try:
            report = job.run(lambda _: None)
        except Exception as error:  # one that can't be judged takes no other with it
            print(
                f"left out: {job.implementation} {job.format} {job.dtype}: {type(error).__name__}: {error}", flush=True
            )
            continue
        found.append(report)
        verdict = "pass" if report.passed else "FAIL " + ", ".join(f"{v.law} {v.failed}" for v in report.broken)
        took = time.monotonic() - start
        print(
            f"{job.implementation} {job.format} {job.dtype} {report.level} {report.checked:,} {took:.1f} s {verdict}",
            flush=True,
        )
        write_certificates(found, options.out)
    print(f"{len(found)} judgements, {left} not reached, in {time.monotonic() - began:.0f} s: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
