"""Products by weights whose gradient is a part of a sum: ranks sum it over all tokens before it is rounded.

    y  = out( x Q(W) )          dx = out( dy Q(W)ᵀ )          dW = out( sum over ranks of  x_rᵀ dy_r )

One process rounds dW = xᵀ dy once, when its sum over all tokens is done. So here a product leaves its part of the sum in FP32
(FP64 in FP64), as the gradient of the *master* weight, which has that dtype; who sums the parts rounds the sum (`round_sum`).

A weight comes as its operand, rounded when it was updated; or as its master alone, where that is gathered for one block at a time
(FSDP). Then it is rounded here, once for each direction, and nothing but the master, which is gathered again, waits for the
backward pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from formats import tensor_amax
from formats.factored import Factored
from train import linear
from train.precision import Precision, WeightOperand, dress, strip
from train.products import (
    dgrad_product,
    forward_product,
    take_activation,
    take_gradient,
    wgrad_product,
)
from train.weights import as_operand, parts_of


class SharedWeight(NamedTuple):
    """A matrix [1, D, F]: the master, to which the gradient's part goes, and its operand, None to make it of the master."""

    master: Tensor
    operand: Tensor | WeightOperand | None = None


def product(x_RSD: Tensor, w_RDF: Tensor | WeightOperand | SharedWeight, precision: Precision, site: int = 0) -> Tensor:
    """`linear.product`, or that of a shared weight, whose master's gradient is this rank's part of the sum, in FP32."""
    if not isinstance(w_RDF, SharedWeight):
        return linear.product(x_RSD, w_RDF, precision, site)
    if not torch.is_grad_enabled():  # where the compiler would lose arguments of a function of autograd
        return _forward(x_RSD, w_RDF, precision, site)[0]
    bare, counts, tensors = strip(precision._replace(scales=None))
    there: tuple[bool, ...] | None = None
    if w_RDF.operand is not None:
        there = (True,) if isinstance(w_RDF.operand, Tensor) else tuple(t is not None for t in w_RDF.operand)
        tensors += parts_of(w_RDF.operand)
    result: Tensor = _SharedProduct.apply(x_RSD, w_RDF.master, precision.scales, bare, counts, site, there, *tensors)
    return result


def round_sum(sum_of_parts: Tensor, precision: Precision) -> Tensor:
    """A weight's gradient, summed over all ranks, as one process leaves it: rounded to the output, in the carrier."""
    return precision.to_output(sum_of_parts)


def _forward(
    x: Tensor, w: SharedWeight, precision: Precision, site: int
) -> tuple[Tensor, WeightOperand, Factored, Tensor | None]:
    """The product, what it took of the weight, x as wgrad takes it, and where scales are delayed x's amax, [1]."""
    operand = as_operand(w.master, precision, site) if w.operand is None else w.operand
    taken = WeightOperand(operand) if isinstance(operand, Tensor) else operand
    if precision.plan is None:
        return linear.round_output(torch.bmm(x, taken.first.values), precision), taken, Factored(x, None), None
    x_out = precision.to_output(x.detach())
    first, second = take_activation(x_out, precision, site, training=True)
    assert second is not None
    amax = tensor_amax(x_out, 1) if precision.scales is not None else None
    return forward_product(first, taken.first, precision), taken, second, amax


class _SharedProduct(torch.autograd.Function):
    """See `product`. Tensors come one by one, as in `products`: `strip`'s, then those of the operand that are `there`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, master: Tensor, scales: Tensor | None, bare: Precision, counts: tuple[int, ...], site: int,
        there: tuple[bool, ...] | None, *tensors: Tensor,
    ) -> Tensor:  # fmt: skip
        n = len(tensors) if there is None else len(tensors) - there.count(True)
        precision = dress(bare, counts, tensors[:n])._replace(scales=scales)
        shared = SharedWeight(master, None if there is None else _rebuilt(tensors[n:], there))
        y, w, second, amax = _forward(x, shared, precision, site)
        waits = Factored(master, None) if there is None else w.second
        ctx.save_for_backward(scales, amax, *waits, *second, *tensors[:n])
        ctx.bare, ctx.counts, ctx.site, ctx.made = bare, counts, site, there is None
        ctx.dtypes, ctx.inputs = (x.dtype, master.dtype), 7 + len(tensors)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        scales, amax, w_values, w_factor, x_values, x_factor, *tensors = ctx.saved_tensors
        precision = dress(ctx.bare, ctx.counts, tensors)._replace(scales=scales)
        w, x = Factored(w_values, w_factor), Factored(x_values, x_factor)
        if ctx.made:
            made = as_operand(w_values, precision, ctx.site)
            w = Factored(made, None) if isinstance(made, Tensor) else made.second
        x_dtype, dtype = ctx.dtypes
        dx = dw = d_scales = None
        if precision.plan is None:
            if ctx.needs_input_grad[0]:
                dx = linear.round_output(torch.bmm(dy, w.values.mT), precision)
            if ctx.needs_input_grad[1]:
                dw = _wide(x.values.mT, dy).to(dtype)
        else:
            g = precision.to_output(dy.detach())
            for_dgrad, for_wgrad = take_gradient(g, precision, ctx.site)
            if ctx.needs_input_grad[0]:
                dx = dgrad_product(for_dgrad, w, precision).to(x_dtype)
            if ctx.needs_input_grad[1]:
                dw = wgrad_product(x, for_wgrad, precision, rounded=False).to(dtype)
            if scales is not None and ctx.needs_input_grad[2]:
                of_g = tensor_amax(g, 1)
                d_scales = torch.stack([amax, torch.zeros_like(of_g), of_g], 1)
        return dx, dw, d_scales, *(None for _ in range(ctx.inputs - 3))


def _rebuilt(tensors: tuple[Tensor, ...], there: tuple[bool, ...]) -> WeightOperand:
    rest = iter(tensors)
    return WeightOperand(*(next(rest) if is_there else None for is_there in there))  # type: ignore[arg-type]


def _wide(a: Tensor, b: Tensor) -> Tensor:
    """Each run's a b with its sums as they are, FP32 of narrower operands."""
    return torch.bmm(a, b, out_dtype=torch.float32) if a.dtype in (torch.bfloat16, torch.float16) else torch.bmm(a, b)
