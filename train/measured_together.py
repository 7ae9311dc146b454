"""How many runs of a pack, and how many sequences of each, a probe has in memory at a time.

A pack as a whole, a sequence at a time, reads and rounds all weights for every sequence, and goes on until its slowest run is
done. A few runs with all of their sequences take the same memory, read their weights once, and leave the others to be done. So
few that a device is not busy, though, each operation costs its launch. A run's numbers depend on how many they are by rounding
alone, and not at all on which: it is always as many, whoever of them is done (see `landscape.products`).

Where what is rounded depends on a whole tensor, a scale or a random bit, a run's loss depends on how many sequences are
rounded together, and `at_once` says how many.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from train.program import Probe, Program
from train.recipe import Structure
from train.surface import Surface

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


def in_groups(surface: Surface, group: int) -> Callable[[Mapping[str, Tensor], tuple[Tensor, Tensor]], Tensor]:
    """The surface's loss, with its first derivatives, so many runs at a time: only these have a graph in memory."""
    runs = len(surface.slots)
    if group >= runs:
        return surface.loss
    # All as large: where R is no multiple, the last one has some of those before it once more.
    starts = [min(first, runs - group) for first in range(0, runs, group)]
    parts = [(slice(start, start + group), surface.of_runs(range(start, start + group))) for start in starts]

    def loss(params: Mapping[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        losses: Tensor = _InGroups.apply(parts, batch, list(params), *params.values())
        return losses

    return loss


class _InGroups(torch.autograd.Function):
    """Gradients are made with the losses, group by group, and wait for what the losses are multiplied by."""

    @staticmethod
    def forward(
        ctx: Any,
        parts: list[tuple[slice, Surface]],
        batch: tuple[Tensor, Tensor],
        names: list[str],
        *values: Tensor,
    ) -> Tensor:
        needed = [i for i, needs in enumerate(ctx.needs_input_grad[3:]) if needs]
        gradients = {i: torch.empty_like(values[i]) for i in needed}
        losses: list[Tensor] = []
        done = 0
        for r, surface in parts:
            own = [value[r].detach() for value in values]
            tokens, targets = batch[0][r], batch[1][r]
            with torch.set_grad_enabled(bool(needed)):
                for i in needed:
                    own[i].requires_grad_()
                of = surface.loss(dict(zip(names, own, strict=True)), (tokens, targets))
                total = of.sum()
            losses.append(of.detach()[done - r.start :])
            done = r.stop
            if needed:
                found = torch.autograd.grad(total, [own[i] for i in needed], allow_unused=True, materialize_grads=True)
                for i, gradient in zip(needed, found, strict=True):
                    gradients[i][r] = gradient
        ctx.gradients = gradients
        return torch.cat(losses)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, times: Tensor) -> Any:
        found: list[Tensor | None] = [None] * (len(ctx.needs_input_grad) - 3)
        gradients, ctx.gradients = ctx.gradients, None  # once, so that it takes no more memory than they do
        for i, gradient in gradients.items():
            found[i] = gradient.mul_(times.reshape(-1, *(1,) * (gradient.ndim - 1)))
        return None, None, None, *found
