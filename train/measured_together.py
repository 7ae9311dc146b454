"""How many runs of a pack, and how many sequences of each, a probe has in memory at a time.

A pack as a whole, a sequence at a time, reads and rounds all weights for every sequence, and goes on until its slowest run is
done. A few runs with all of their sequences take the same memory, read their weights once, and leave the others to be done. So
few that a device is not busy, though, each operation costs its launch. A run's numbers depend on how many they are by rounding
alone, and not at all on which: it is always as many, whoever of them is done (see `landscape.products`).

Where what is rounded depends on a whole tensor, a scale or a random bit, a run's loss depends on how many sequences are
rounded together, and `at_once` says how many.
"""

from __future__ import annotations

from typing import NamedTuple

from train.program import Probe, Program
from train.recipe import Structure

# Elements of the residual stream from which on operations take longer than their launch: on a GPU, on a CPU.
BUSY = {"cuda": 2**22, "cpu": 2**16}


class Together(NamedTuple):
    """What is evaluated in one go."""

    runs: int
    sequences: int


def together(program: Program, probe: Probe, runs: int, device_type: str) -> Together:
    """For a pack of so many runs; never more sequences in all than `at_once` of every run."""
    whole, shape = program.sequences, program.shape
    at_once = min(probe.at_once, whole)
    held = runs * at_once
    sequences = at_once if probe.quantisers != "off" and is_of_whole_tensors(program) else min(whole, held)
    busy = -(-BUSY[device_type] // (sequences * shape.context * shape.width))
    return Together(max(1, min(runs, held // sequences, 2 ** (busy - 1).bit_length())), sequences)


def is_of_whole_tensors(program: Program) -> bool:
    """Whether a number is rounded by more than itself: by scales, random bits, a sum's order, or rules that may have them."""
    structures = (program.structure, program.before)
    places = [place for of in structures if of is not None for place in of.places if place is not None]
    return any(map(_is_of_whole_tensors, places))


def _is_of_whole_tensors(place: Structure) -> bool:
    return place.rules is not None or place.accumulate is not None or place.rounding.is_stochastic
