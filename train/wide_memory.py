"""The memory that each of several GPUs needs for a run that they share, worked out from the shape.

With P parameters, P_b of them in L blocks and P_o outside (embeddings, LM head, last norm), n ranks, f = 4 bytes (8 for FP64)
and c bytes of the carrier (2 for BF16), each GPU holds

                 ddp                     fsdp
    masters      f P                     f (P_o + P_b / n)
    moments      2 f P                   2 f (P_o + P_b / n)           a third with Kahan's buffer
    operands     c P                     c P_o + c P_b                 where compiled code keeps a block's until its backward
                                                                       pass; of one block where not
    gradients    f P + c P               (f + c) (P_o + P_b / n)       sums in FP32, and rounded
    gathered     none                    4 f P_b / L                   two blocks' masters, a gradient, and it on its way
    work         of B / n sequences      of B / n sequences            activations and logits: `Program.bytes_per_run`'s

Operands count twice where both products that take a weight round it otherwise. A tied embedding's gradient has two parts, both
FP32 while they are summed. Work is the planner's own estimate, upper rather than lower; the rest is counted, and a test holds it
to what a small pack really has.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

from train.precision import make_plan
from train.products import serves_both
from train.program import Program
from train.recipe import Structure
from train.share import WEIGHT
from train.weights import padded_vocabulary
from train.wide_recipes import Way

GATHERED = 4  # blocks' worth of FP32 at a time


class Memory(NamedTuple):
    """Bytes on each GPU."""

    masters: int
    moments: int
    operands: int
    gradients: int
    gathered: int
    work: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def memory(program: Program, ranks: int, way: Way, compiled: bool) -> Memory:
    """What each of so many GPUs holds of a run of the program."""
    shape, f, c = program.shape, program.dtype.itemsize, carrier_bytes(program, compiled)
    blocks, outside = parameters_in_blocks(program), shape.size - parameters_in_blocks(program)
    gains = sum(math.prod(size) for size in shape.parameters().values() if len(size) == 1)
    head = padded_vocabulary(shape.vocabulary) * shape.width
    body, of_head = (1 if place is None else operands_of_a_weight(place) for place in program.structure.places[:2])
    kept = 3 if program.state.kahan else 2
    tied = shape.vocabulary * shape.width if shape.tied else 0
    if way == "ddp":
        mine, matrices, gathered = shape.size, shape.size - outside - gains + shape.width, 0
    else:
        block = -(-blocks // shape.layers)
        mine, matrices, gathered = outside + -(-blocks // ranks), blocks if compiled else block, GATHERED * f * block
    return Memory(
        masters=f * mine,
        moments=kept * f * mine,
        operands=c * (body * matrices + of_head * head),
        gradients=f * (mine + tied) + c * mine,
        gathered=gathered,
        work=work(program, ranks, compiled),
    )


def work(program: Program, ranks: int, compiled: bool) -> int:
    """Activations, logits and histories of a rank's sequences, as the planner counts them."""
    alone = dataclasses.replace(program, sequences=program.sequences // ranks)
    c, rules = (
        carrier_bytes(program, compiled),
        any(place is not None and place.rules for place in program.structure.places),
    )
    state = (20 + 4 * program.state.kahan) * program.shape.size * c // 2
    weights = c * program.shape.size if rules else 0  # which that estimate counts once more
    return alone.bytes_per_run(compiled) - state - weights


def work_per_sequence(program: Program, compiled: bool) -> int:
    """What one sequence more adds to `work`, logits apart, of which a chunk is there at a time."""
    of = [work(dataclasses.replace(program, sequences=n, signals_every=0), 1, compiled) for n in (64, 65)]
    return of[1] - of[0]


def operands_of_a_weight(place: Structure) -> int:
    """Two where both products that take a weight round it for themselves, else one."""
    return 1 if place.rules is None or serves_both(make_plan(place.rules), WEIGHT) else 2


def parameters_in_blocks(program: Program) -> int:
    """P_b."""
    return sum(math.prod(size) for name, size in program.shape.parameters().items() if name.startswith("h."))


def carrier_bytes(program: Program, compiled: bool) -> int:
    """c: of a value between products; eager carriers are a CPU's."""
    width = {"bf16": 2, "fp16": 2, "tf32": 4, "fp32": 4, "fp64": 8}[program.structure.body.carrier]
    return width if compiled else max(width, 4)
