"""A linear layer whose operands are on a format's grid in the forward product and in both backward products.

It is built from ordinary differentiable pieces, so that second derivatives are right (a Hessian-vector product through it is
that of the straight-through surrogate, and plain autograd's with quantisers off):

    x ── round to grid ──┐                                   ┌── round gradient to grid
                         ├── product ── round the output ────┤
    W ── round to grid ──┘                                   └── y

Rounding an operand has the identity as its derivative (straight-through). The gradient dy is rounded once, on arrival, and
autograd then forms dx = dy Wᵀ and dW = xᵀ dy from the rounded dy, W and x. Each product's result, dx and dW included, is
rounded to the recipe's `output`: in BF16 by the product itself, with a wider carrier explicitly.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from formats import FloatFormat, FormatParameters, format_parameters, quantize
from train.compiling import Quantizer
from train.recipe import LinearPrecision, Structure

CARRIER_DTYPES = {"bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32, "fp64": torch.float64}


class Precision(NamedTuple):
    """One place's precision for a whole pack: the program's structure, and each run's formats, [R, 1, 1], if simulated."""

    structure: Structure
    carrier: torch.dtype
    activation: FormatParameters | None
    weight: FormatParameters | None
    gradient: FormatParameters | None
    quantizer: Quantizer

    @property
    def rounds_outputs(self) -> bool:
        """Whether a product's result needs rounding to BF16, since its carrier does not do so by itself."""
        return self.structure.output == "bf16" and self.carrier != torch.bfloat16


def pack_precision(linears: list[LinearPrecision], device: torch.device, quantizer: Quantizer = quantize) -> Precision:
    """Stack the runs' formats along the run axis. On a CPU the carrier is FP32, since its BF16 products are several
    times slower.

    All runs must share one structure (the planner groups them so); raises ValueError otherwise.
    """
    structures = {linear.structure for linear in linears}
    if len(structures) != 1:
        raise ValueError(f"runs of {len(structures)} structures can't share a program: {sorted(map(str, structures))}")
    structure = structures.pop()
    carrier = CARRIER_DTYPES[structure.carrier]
    if device.type == "cpu" and carrier == torch.bfloat16:
        carrier = torch.float32
    if structure.native is not None:
        return Precision(structure, carrier, None, None, None, quantizer)

    def stack(formats: list[FloatFormat | None]) -> FormatParameters:
        return format_parameters([f for f in formats if f is not None], ndim=3, device=device)

    return Precision(
        structure,
        carrier,
        stack([linear.activation for linear in linears]),
        stack([linear.weight for linear in linears]),
        stack([linear.gradient for linear in linears]),
        quantizer,
    )


class _StraightThrough(torch.autograd.Function):
    """The value of `y` with the derivative of the identity in `x`, at every order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


def straight_through(x: Tensor, y: Tensor) -> Tensor:
    """`y`, computed from x, as if it were x to every derivative; y's shape and dtype."""
    result: Tensor = _StraightThrough.apply(x, y)
    return result


class _RoundGradient(torch.autograd.Function):
    """Identity forward; backward rounds the arriving gradient to a format's grid, or to BF16 where no format is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantizer: Quantizer, rounding: str, *parameters: Tensor) -> Tensor:
        ctx.quantizer, ctx.rounding = quantizer, rounding
        ctx.save_for_backward(*parameters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        parameters = ctx.saved_tensors
        value = grad.detach()
        if parameters:
            value = ctx.quantizer(value.to(torch.float32), FormatParameters(*parameters), ctx.rounding).to(grad.dtype)
        else:
            value = value.to(torch.bfloat16).to(grad.dtype)
        return straight_through(grad, value), None, None, *(None for _ in parameters)


def _round_gradient(x: Tensor, parameters: FormatParameters | None, precision: Precision) -> Tensor:
    result: Tensor = _RoundGradient.apply(x, precision.quantizer, precision.structure.rounding, *(parameters or ()))
    return result


def on_grid(x: Tensor, precision: Precision, parameters: FormatParameters | None) -> Tensor:
    """x, of a floating dtype, as products take it: on the grid of `parameters` and in the carrier; carries no gradient."""
    x = x.detach()
    if parameters is not None:
        x = precision.quantizer(x.to(torch.float32), parameters, precision.structure.rounding)
    elif precision.structure.native == "bf16":
        x = x.to(torch.bfloat16)
    return x.to(precision.carrier)


def operand(x: Tensor, precision: Precision, parameters: FormatParameters | None) -> Tensor:
    """`on_grid`, straight through; same shape."""
    return straight_through(x, on_grid(x, precision, parameters))


def product(x_RSD: Tensor, w_RDF: Tensor, precision: Precision) -> Tensor:
    """Each run's x W, of operands in the carrier, and in it; the result and both gradients rounded to the recipe's output."""
    if precision.rounds_outputs:
        x_RSD, w_RDF = _round_gradient(x_RSD, None, precision), _round_gradient(w_RDF, None, precision)
    y = torch.bmm(x_RSD, w_RDF)
    return straight_through(y, round_output(y.detach(), precision)) if precision.rounds_outputs else y


def round_output(y: Tensor, precision: Precision) -> Tensor:
    """A product's result rounded to the recipe's output where the carrier is wider."""
    return y.to(torch.bfloat16).to(y.dtype) if precision.rounds_outputs else y


def round_gradient(y: Tensor, precision: Precision) -> Tensor:
    """The same values, whose gradient is rounded as an operand of the backward products, in the dtype in which it arrives."""
    if precision.gradient is not None:
        return _round_gradient(y, precision.gradient, precision)
    if precision.structure.native == "bf16" and precision.carrier != torch.bfloat16:
        return _round_gradient(y, None, precision)
    return y


def receive(y: Tensor, precision: Precision) -> Tensor:
    """A product's result as it is used, FP32 (FP64 in FP64), its gradient rounded once, from there straight to its grid."""
    return round_gradient(y.to(torch.float64 if precision.carrier == torch.float64 else torch.float32), precision)


def linear(x_RSD: Tensor, w_RDF: Tensor, precision: Precision) -> Tensor:
    """y_RSF = x W run by run, in FP32 (FP64 for native-fp64), every operand of the three products rounded as
    `precision` says.

    x_RSD and w_RDF are FP32 master values, [R, S, D] and [R, D, F]; the FP32 result holds values of the recipe's output type.
    """
    x = operand(x_RSD, precision, precision.activation)
    w = operand(w_RDF, precision, precision.weight)
    return receive(product(x, w, precision), precision)
