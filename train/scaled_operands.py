"""An activation's or a gradient's two operands by kernel, where their rules are among those that a kernel serves.

    take_both(x) = take(x, first, -1), take(x, second, -2)

to the bit (`train.products.take`), in one pass over x where both have one format, and one more for the amaxes where it has a
scale for the whole tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from formats.factored import Factored
from formats.scale_arithmetic import fp32_scale
from train.precision import OperandPlan, Precision
from train.scaled_layers import FEWEST_STEPS, ROTATION, amax, kernel_group, take_both, whole_tensor_limit
from train.share import largest_of_ranks

STRIDE = 0xD1342543DE82EF95
OPERANDS_A_SITE = 8


def seed_of(precision: Precision, plan: OperandPlan, site: int) -> Tensor:
    """The seeds of an operand's random bits, int64 [R]."""
    assert precision.seed is not None
    # Odd multiples apart, modulo 2^64; what draws from a seed hashes it.
    offset = (site * OPERANDS_A_SITE + plan.number + 1) * STRIDE % 2**64
    return precision.seed + (offset - 2**64 if offset >= 2**63 else offset)


def is_served(x: Tensor, plan: OperandPlan, axis: int, precision: Precision) -> bool:
    """Whether a kernel rounds x by that rule, for the product that contracts `axis`."""
    if not precision.kernels or plan.kind != "scaled" or plan.tile or x.ndim != 3:
        return False
    if plan.stochastic and precision.share is not None and precision.share.covers(plan.role):
        return False  # the kernel counts a part's elements from 0
    group = kernel_group(plan.name, plan.rounding, plan.overflow)
    if not group or x.shape[1] % group or x.shape[2] % group or x.shape[1] * x.shape[2] >= FEWEST_STEPS:
        return False
    return not plan.hadamard or (axis == -2 and plan.hadamard == ROTATION and x.shape[1] % ROTATION == 0)


def take_served(
    x: Tensor, first: OperandPlan | None, second: OperandPlan | None, precision: Precision, site: int
) -> tuple[Factored | None, Factored | None]:
    """X [R, M, K] for the product that contracts K and for the one that contracts M, of rules that are served and of one format;
    None for a rule that is None. Factors as `formats.factored` leaves them.
    """
    plan = first or second
    if plan is None:
        return None, None
    x = x.detach()
    signs = precision.signs if second is not None and second.hadamard else None
    scale_k, scale_m = _tensor_scales(x, first, second, signs, precision)
    seeds = [seed_of(precision, p, site) if p is not None and p.stochastic else None for p in (first, second)]
    values_k, values_m, factor_k, factor_m = take_both(
        x, plan.name, first is not None, second is not None, scale_k, scale_m, *seeds, signs, precision.carrier
    )

    def whole(values: Tensor, factor: Tensor, scale: Tensor | None) -> Factored:
        if scale is not None:
            return Factored(values, scale.view(-1, 1, 1))
        return Factored(values, factor if plan.group else None)

    return (
        whole(values_k, factor_k, scale_k) if first is not None else None,
        whole(values_m, factor_m, scale_m) if second is not None else None,
    )


def _tensor_scales(
    x: Tensor, first: OperandPlan | None, second: OperandPlan | None, signs: Tensor | None, precision: Precision
) -> tuple[Tensor | None, Tensor | None]:
    """The tensor's scale on either side, FP32 [R], where the format has one: from its amax, or from before."""
    plan = first or second
    assert plan is not None
    limit = whole_tensor_limit(plan.name)
    if not limit:
        return None, None

    def delayed(plan: OperandPlan | None) -> Tensor | None:
        if plan is None or not plan.delayed or precision.scales is None:
            return None
        t = precision.scales[:, plan.role].detach()
        return torch.where((t > 0) & (t < float("inf")), t, float("nan"))

    scales = [delayed(first), delayed(second)]
    if any(p is not None and t is None for p, t in zip((first, second), scales, strict=True)):
        largest, share = amax(x, signs), precision.share
        if share is not None and share.covers(plan.role):
            largest = largest_of_ranks(largest)
        found = fp32_scale(largest.view(torch.int32), limit)
        scales = [found[:, i].contiguous() if t is None else t for i, t in enumerate(scales)]
    return scales[0], scales[1]
