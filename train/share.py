"""A run whose tokens several processes share: what a recipe takes from whole tensors is taken from all of their parts.

Rank r of n has sequences r B/n to (r + 1) B/n of every batch, so of each activation and gradient [1, S, F] rows r S/n to
(r + 1) S/n. Weights are whole on every rank. Then

    a tensor's amax         is the largest of the ranks' (`largest_of_ranks`): exact in any order; NaN and inf win
    a row's along tokens    so is that of each column of wgrad's operands
    blocks, tiles           lie within one rank's rows, where those are whole blocks (`wide_recipes` sees to that)
    random bits             belong to an element by its number in the whole tensor, r S/n F + i for element i of the part

so every operand has the bits that one process would give it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from formats import ScaledFormat, tensor_amax
from formats.compile_time import assume_constant_result
from formats.random_bits import random_bits
from formats.rounding import DEFAULT_RANDOM_BITS
from formats.scale_arithmetic import MAGNITUDE, fp32_scale
from formats.scaled import Granularity
from train.operands import ROLES, described
from train.scaled_layers import whole_tensor_limit

WEIGHT = ROLES.index("weight")


class Share(NamedTuple):
    """One rank's share of a run, in one place.

    rank: 0 on all ranks where nothing is drawn, so that they compile one program. weights: whether the second operand is a
    weight, whole on every rank, and the first one's rows are tokens; not so in attention's QKᵀ and PV, whose operands all are
    parts, with whole sequences in each.
    """

    ranks: int
    rank: int = 0
    weights: bool = True

    def covers(self, role: int) -> bool:
        """Whether operands of that role are parts of larger ones."""
        return self.ranks > 1 and not (self.weights and role == WEIGHT)

    def random_bits(self, seed: Tensor, shape: torch.Size) -> Tensor:
        """Those of a part's elements, by their numbers in the whole; seed int64 [R], shape [R, .., M, K]."""
        return random_bits(seed, shape, DEFAULT_RANDOM_BITS, first=self.rank * math.prod(shape[1:]))

    def with_largest(self, x: Tensor, name: str, axis: int) -> tuple[Tensor, Tensor | None]:
        """X [R, .., M, K], FP32, and the tensor's scale [R], so that x rounded to the format for the product that contracts
        `axis` has the whole tensor's scales: x itself where its own are that, or with a row below it that holds the largest
        magnitudes of all ranks, where no scale can be given.
        """
        if limit := whole_tensor_limit(name):
            return x, fp32_scale(largest_of_ranks(tensor_amax(x, 1)).view(torch.int32), limit)
        granularity = scale_of_parts(name)
        if granularity == Granularity.TENSOR:
            top = (
                largest_of_ranks(tensor_amax(x, 1)).view(-1, *(1,) * (x.ndim - 1)).expand(*x.shape[:-2], 1, x.shape[-1])
            )
            return torch.cat([x, top], -2), None
        if granularity == Granularity.ROW and axis == -2 and self.weights:
            columns = (x.view(torch.int32) & MAGNITUDE).amax(-2, keepdim=True)
            return torch.cat([x, largest_of_ranks(columns.view(torch.float32))], -2), None
        return x, None


# One operation to the compiler, which need not know what ranks are.
@torch.library.custom_op("exmy::largest_of_ranks", mutates_args=())
def largest_of_ranks(magnitude: Tensor) -> Tensor:
    """Element by element the largest of all ranks' magnitudes, FP32; NaN wins. By their patterns, whose order is exact."""
    largest = magnitude.contiguous().view(torch.int32).clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.view(torch.float32)


@largest_of_ranks.register_fake
def _(magnitude: Tensor) -> Tensor:
    return magnitude.new_empty(magnitude.shape)


# The compiler folds in what a name means.
@assume_constant_result
def scale_of_parts(name: str) -> str:
    """Which elements share a scale in a format: `Granularity`'s word."""
    f = described(name)
    assert isinstance(f, ScaledFormat)
    return f.granularity.value
