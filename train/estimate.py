"""How long a study will take, before it begins: what a step computes and moves, at rates that this device just showed.

    step    = R (operations / products a second + bytes / bytes a second) + launches
    pack    = steps x step + what compiling its program takes, once a program

Operations are counted as Chowdhery et al. 2022 (2204.02311, appendix B) do: 6 a parameter that is multiplied and token,
12 L D T a token for attention. Bytes: weights, moments and gradients of the update, three times the saved activations, and what
rounding an element moves. A model of the whole step, and no more than that: it is within a factor of two of every pack whose time
is committed in studies/results (a test holds it to that). Once a pack has run, its own rate is the better guide, and the sweep
shows it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from train.compiling import compiles_steps
from train.operands import Rules
from train.plan import PlannedPack
from train.probe_costs import STEPS_A_GRADIENT, gradients, host_seconds
from train.program import Program
from train.scaled_layers import ROTATION

# Seconds, measured: of a program's first step compiled on an H100's host, 11 to 45 where kernels serve its rules; of what
# launches, or a CPU's interpreter, cost a layer and step. A step by rules launches about three times as much.
COMPILING = {"plain": 20.0, "rules": 30.0}
LAUNCHES = {"cuda": 3e-4, "cpu": 2e-3}
BYTES_AN_ELEMENT = {"cuda": (6, 16, 60), "cpu": (6, 75, 150)}
# Products in FP32 and TF32 against those in BF16, on tensor cores; a CPU's all run in FP32.
SLOWER = {"bf16": 1.0, "fp16": 1.0, "tf32": 2.0, "fp32": 12.0, "fp64": 12.0}


class Rates(NamedTuple):
    """Operations a second in large products, BF16 on a GPU and FP32 on a CPU; bytes a second read and written by a copy."""

    products: float
    copied: float


class Estimate(NamedTuple):
    """Of one pack: device memory in bytes, seconds of all its steps, seconds to compile its program where nothing is cached, and
    bytes of its file before compression.
    """

    memory: int
    seconds: float
    compiling: float
    disk: int


def measured_rates(device: torch.device) -> Rates:
    """The device's, in a second or less."""
    gpu = device.type == "cuda"
    n, dtype = (8192, torch.bfloat16) if gpu else (1024, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    x = torch.zeros(2**29 if gpu else 2**26, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return Rates(
        2 * n**3 / _median_seconds(lambda: a @ b, device),
        2 * x.numel() / _median_seconds(lambda: y.copy_(x), device),
    )


def _median_seconds(work: Callable[[], object], device: torch.device, rounds: int = 5) -> float:
    times = []
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


def estimate(pack: PlannedPack, device_type: str, rates: Rates) -> Estimate:
    """What a pack will take of a device of that type ("cuda", "cpu") and those rates."""
    program, compiled = pack.program, compiles_steps(device_type)
    step = step_seconds(program, pack.size, device_type, rates)
    kind = "rules" if _has_rules(program) else "plain"
    return Estimate(
        memory=program.bytes_per_run(compiled) * pack.size,
        seconds=step * _steps_worth(program, device_type) + pack.size * host_seconds(program),
        compiling=COMPILING[kind] if compiled else 0.0,
        disk=program.history_bytes * len(pack.runs),
    )


def step_seconds(program: Program, size: int, device_type: str, rates: Rates) -> float:
    """Of one step of a pack of R = size."""
    shape, tokens = program.shape, program.sequences * program.shape.context
    operations = step_operations(program)
    slower = SLOWER[program.structure.body.carrier] if device_type == "cuda" else 1.0
    rules = _has_rules(program)
    activations = tokens * shape.layers * (22 * shape.width + 4 * shape.features + 16 * shape.width)
    moved = (
        28 * shape.size
        + 3 * activations
        + _bytes_an_element(program, device_type) * program.rounded_elements_per_step()
    )
    launches = LAUNCHES[device_type] * (shape.layers + 1) * (3 if rules else 1)
    # Eager code on a CPU reads and writes a tensor several times where fused code does so once, and slower than a copy.
    passes = 1.0 if device_type == "cuda" else 8.0
    return size * (slower * operations / rates.products + passes * moved / rates.copied) + launches


def step_operations(program: Program) -> int:
    """Of one run's training step."""
    shape, tokens = program.shape, program.sequences * program.shape.context
    embedded = shape.context * shape.width if shape.positions == "learned" else 0
    return tokens * (6 * (shape.size - embedded) + 12 * shape.layers * shape.width * shape.context)


def pack_operations(pack: PlannedPack) -> float:
    """Of all that a pack trains and measures: what packs are ordered by, on any device."""
    return pack.size * step_operations(pack.program) * _steps_worth(pack.program, "cuda")


def _steps_worth(program: Program, device_type: str) -> float:
    """Steps, evaluations and probes in steps: a third without a backward pass; other measures as `probe_costs` has them."""
    looks = len(program.evaluation_steps) * program.evaluation_sequences / program.sequences
    return (
        program.steps + (looks + 2 * len(program.probe_steps)) / 3 + STEPS_A_GRADIENT[device_type] * gradients(program)
    )


def _bytes_an_element(program: Program, device_type: str) -> int:
    """That rounding one moves: without rules; by them; rotated too, where no kernel does it."""
    plain, ruled, rotated = BYTES_AN_ELEMENT[device_type]
    rotations = {rules.hadamard for rules in _rules(program)}
    by_kernel = {0, ROTATION} if device_type == "cuda" else {0}
    return rotated if rotations - by_kernel else ruled if rotations else plain


def _has_rules(program: Program) -> bool:
    return bool(_rules(program))


def _rules(program: Program) -> list[Rules]:
    places = (*program.structure.places, *(program.before.places if program.before else ()))
    return [place.rules for place in places if place is not None and place.rules is not None]


def total(packs: Sequence[PlannedPack], estimates: Sequence[Estimate]) -> Estimate:
    """Of packs one after the other: the most memory that one takes, seconds and bytes added up, each program compiled once."""
    compiling = {pack.program: found.compiling for pack, found in zip(packs, estimates, strict=True)}
    return Estimate(
        max((found.memory for found in estimates), default=0),
        sum(found.seconds for found in estimates),
        sum(compiling.values()),
        sum(found.disk for found in estimates),
    )
