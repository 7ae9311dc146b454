"""A linear layer whose operands are on a format's grid in the forward product and in both backward products.

It is built from ordinary differentiable pieces, so that second derivatives are right (a Hessian-vector product through it is
that of the straight-through surrogate, and plain autograd's with quantisers off):

    x ── round to grid ──┐                                   ┌── round gradient to grid
                         ├── product ── round the output ────┤
    W ── round to grid ──┘                                   └── y

Rounding an operand has the identity as its derivative (straight-through). The gradient dy is rounded once, on arrival, and
autograd then forms dx = dy Wᵀ and dW = xᵀ dy from the rounded dy, W and x. Each product's result, dx and dW included, is
rounded to the recipe's `output`: in BF16 by the product itself, with a wider carrier explicitly. Where the recipe says how sums
are formed (`accumulate`), it says so for all three products; to second derivatives they are ordinary products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from formats import FloatFormat, FormatParameters, format_parameters, quantize
from train.accumulate import accumulated_product, smallest_normals
from train.compiling import Quantizer
from train.recipe import LinearPrecision, Structure

Operand = Literal["activation", "weight", "gradient"]
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
    if precision.structure.accumulate is not None:
        formats = [f for f in (precision.activation, precision.weight, precision.gradient) if f is not None]
        bare = precision._replace(activation=None, weight=None, gradient=None)
        result: Tensor = _AccumulatedProduct.apply(x_RSD, w_RDF, bare, *(p for f in formats for p in f))
        return result
    if precision.rounds_outputs:
        x_RSD, w_RDF = _round_gradient(x_RSD, None, precision), _round_gradient(w_RDF, None, precision)
    y = torch.bmm(x_RSD, w_RDF)
    return straight_through(y, round_output(y.detach(), precision)) if precision.rounds_outputs else y


def round_output(y: Tensor, precision: Precision) -> Tensor:
    """A product's result rounded to the recipe's output where the carrier is wider."""
    return y.to(torch.bfloat16).to(y.dtype) if precision.rounds_outputs else y


def multiply(a: Tensor, b: Tensor, precision: Precision, of: tuple[Operand, Operand]) -> Tensor:
    """Each run's a b, of operands in the carrier, and in it: summed, and rounded to the output, as the recipe says.

    a [R, M, K] and b [R, K, N] are rounded operands of the kinds `of`. Differentiable only where the recipe leaves sums alone.
    """
    if precision.structure.accumulate is None:
        return round_output(torch.bmm(a, b), precision)
    return round_output(wide_product(a, b, precision, of).to(precision.carrier), precision)


def wide_product(
    a: Tensor, b: Tensor, precision: Precision, of: tuple[Operand, Operand], start: Tensor | None = None
) -> Tensor:
    """`multiply` before its output is rounded: FP32 (FP64 in FP64); CPUs multiply in FP32 anyway.

    start: what this gave for earlier products of the same sum, of a recipe that says how sums are formed.
    """
    accumulation = precision.structure.accumulate
    if accumulation is not None:
        formats = {"activation": precision.activation, "weight": precision.weight, "gradient": precision.gradient}
        first, second = (None if (f := formats[kind]) is None else smallest_normals(f) for kind in of)
        return accumulated_product(a, b, accumulation, first, second, start)
    return torch.bmm(a, b, out_dtype=torch.float32) if a.dtype == torch.bfloat16 else torch.bmm(a, b)


class _AccumulatedProduct(torch.autograd.Function):
    """x W whose sums, and those of both its gradients, are formed as the recipe says; to second derivatives an ordinary product.

    The formats come as plain tensors, which is how the compiler sees them: activation's, weight's, gradient's.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bare: Precision, *formats: Tensor) -> Tensor:
        ctx.save_for_backward(x, w, *formats)
        ctx.bare = bare
        return multiply(x, w, _dressed(bare, formats), ("activation", "weight"))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w, *formats = ctx.saved_tensors
        precision = _dressed(ctx.bare, formats)

        def gradient(a: Tensor, b: Tensor, of: tuple[Operand, Operand]) -> Tensor:
            value = multiply(a.detach(), b.detach(), precision, of)
            return straight_through(torch.bmm(a, b), value) if torch.is_grad_enabled() else value

        dx = gradient(dy, w.transpose(1, 2), ("gradient", "weight")) if ctx.needs_input_grad[0] else None
        dw = gradient(x.transpose(1, 2), dy, ("activation", "gradient")) if ctx.needs_input_grad[1] else None
        return dx, dw, None, *(None for _ in formats)


def _dressed(bare: Precision, formats: Sequence[Tensor]) -> Precision:
    """A precision with the formats whose tensors were taken out of it."""
    n = len(FormatParameters._fields)
    activation, weight, gradient = (FormatParameters(*formats[i * n : (i + 1) * n]) for i in range(3))
    return bare._replace(activation=activation, weight=weight, gradient=gradient)


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
