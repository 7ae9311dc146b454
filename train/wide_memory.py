"""The memory that each of several GPUs needs for a run that they share, worked out from the shape.

With P parameters, P_b of them in L blocks and P_o outside (embeddings, LM head, last norm), n ranks, f = 4 bytes (8 for FP64) and c
bytes of the carrier (2 for BF16), each GPU holds

                 ddp                     fsdp
    masters      f P                     f (P_o + P_b / n)
    moments      2 f P                   2 f (P_o + P_b / n)           a third with Kahan's buffer
    operands     c P, 2 c P by rules     c P_o at rest                 + c P_b (2 c by rules) where compiled code keeps a block's
                                                                       operands from its forward to its backward pass; of one block
                                                                       where it is run eagerly
    gradients    f P + c P               f P_o + c P_o + (f + c) P_b / n      sums in FP32, and rounded
    gathered     none                    4 f P_b / L                   two blocks' masters, one's gradient and its way to the others
    work         of B / n sequences      of B / n sequences            activations and logits: `Program.bytes_per_run`'s

A tied embedding's gradient has two parts, both FP32 while they are summed. Work is the planner's own estimate, upper rather than
lower; the rest is counted, and a test holds it to what a small pack really has.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

from train.program import Program
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
    body, of_head = (2 if place is not None and place.rules else 1 for place in program.structure.places[:2])
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
    state = (20 + 4 * program.state.kahan) * program.shape.size * carrier_bytes(program, compiled) // 2
    return alone.bytes_per_run(compiled) - state


def work_per_sequence(program: Program, compiled: bool) -> int:
    """What one sequence more adds to `work`, logits apart, of which a chunk is there at a time."""
    of = [work(dataclasses.replace(program, sequences=n, signals_every=0), 1, compiled) for n in (64, 65)]
    return of[1] - of[0]


def parameters_in_blocks(program: Program) -> int:
    """P_b."""
    return sum(math.prod(size) for name, size in program.shape.parameters().items() if name.startswith("h."))


def carrier_bytes(program: Program, compiled: bool) -> int:
    """c: of a value between products; eager carriers are a CPU's."""
    width = {"bf16": 2, "fp16": 2, "tf32": 4, "fp32": 4, "fp64": 8}[program.structure.body.carrier]
    return width if compiled else max(width, 4)
