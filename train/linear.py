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

from typing import Any

import torch
from torch import Tensor

from formats import FormatParameters
from train import smooth
from train.accumulate import accumulated_product, smallest_normals
from train.compiling import Quantizer
from train.operands import Role
from train.precision import Precision, WeightOperand, dress, strip
from train.products import product_by_rules
from train.straight_through import straight_through


class _RoundGradient(torch.autograd.Function):
    """Identity forward; backward rounds the arriving gradient to a format's grid, or to a dtype where no format is given."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, quantizer: Quantizer, rounding: str, dtype: torch.dtype, *parameters: Tensor
    ) -> Tensor:
        ctx.quantizer, ctx.rounding, ctx.dtype = quantizer, rounding, dtype
        ctx.save_for_backward(*parameters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        parameters = ctx.saved_tensors
        value = grad.detach()
        if parameters:
            value = ctx.quantizer(value.to(torch.float32), FormatParameters(*parameters), ctx.rounding).to(grad.dtype)
        else:
            value = value.to(ctx.dtype).to(grad.dtype)
        return straight_through(grad, value), None, None, None, *(None for _ in parameters)


def _round_gradient(x: Tensor, parameters: FormatParameters | None, precision: Precision, dtype: torch.dtype) -> Tensor:
    rounding = precision.structure.rounding
    result: Tensor = _RoundGradient.apply(x, precision.quantizer, rounding, dtype, *(parameters or ()))
    return result


def on_grid(x: Tensor, precision: Precision, role: Role) -> Tensor:
    """x, of a floating dtype, as it goes to products, in the carrier: on its grid, or where products round it by rules in the
    output type; carries no gradient.
    """
    x, parameters = x.detach(), precision.formats(role)
    if precision.plan is not None:
        return precision.to_output(x)
    if parameters is not None:
        x = precision.quantizer(x.to(torch.float32), parameters, precision.structure.rounding)
    elif precision.native_dtype is not None:
        x = x.to(precision.native_dtype)
    return x.to(precision.carrier)


def operand(x: Tensor, precision: Precision, role: Role) -> Tensor:
    """`on_grid`, straight through; same shape."""
    if precision.smooth and not smooth.rounds(precision, role == "activation"):
        return x.to(precision.carrier)
    return straight_through(x, on_grid(x, precision, role))


def product(
    x_RSD: Tensor, w_RDF: Tensor | WeightOperand, precision: Precision, site: int = 0, is_transposed: bool = False
) -> Tensor:
    """Each run's x W, of operands in the carrier, and in it; the result and both gradients rounded to the recipe's output.

    site: a number by which the layers of one block draw different random bits. is_transposed: the weight lies as [R, F, D].
    """
    if precision.smooth:
        assert isinstance(w_RDF, Tensor)
        return smooth.product(x_RSD, w_RDF, precision, site, is_transposed)
    if precision.plan is not None:
        return product_by_rules(x_RSD, w_RDF, precision, site, is_transposed)
    assert isinstance(w_RDF, Tensor)
    w_RDF = w_RDF.transpose(1, 2) if is_transposed else w_RDF
    if precision.structure.accumulate is not None:
        bare, counts, tensors = strip(precision)
        result: Tensor = _AccumulatedProduct.apply(x_RSD, w_RDF, bare, counts, *tensors)
        return result
    if precision.rounds_outputs:
        x_RSD, w_RDF = (_round_gradient(t, None, precision, precision.output) for t in (x_RSD, w_RDF))
    y = torch.bmm(x_RSD, w_RDF)
    return straight_through(y, round_output(y.detach(), precision)) if precision.rounds_outputs else y


def round_output(y: Tensor, precision: Precision) -> Tensor:
    """A product's result rounded to the recipe's output where the carrier is wider."""
    return y.to(precision.output).to(y.dtype) if precision.rounds_outputs else y


def multiply(a: Tensor, b: Tensor, precision: Precision, of: tuple[Role, Role]) -> Tensor:
    """Each run's a b, of operands in the carrier, and in it: summed, and rounded to the output, as the recipe says.

    a [R, M, K] and b [R, K, N] are rounded operands of the kinds `of`. Differentiable only where the recipe leaves sums alone.
    """
    if precision.structure.accumulate is None:
        return round_output(torch.bmm(a, b), precision)
    return round_output(wide_product(a, b, precision, of).to(precision.carrier), precision)


def wide_product(
    a: Tensor, b: Tensor, precision: Precision, of: tuple[Role, Role], start: Tensor | None = None
) -> Tensor:
    """`multiply` before its output is rounded: FP32 (FP64 in FP64); CPUs multiply in FP32 anyway.

    start: what this gave for earlier products of the same sum, of a recipe that says how sums are formed.
    """
    accumulation = precision.structure.accumulate
    if accumulation is not None:
        formats = {"activation": precision.activation, "weight": precision.weight, "gradient": precision.gradient}
        first, second = (None if (f := formats[kind]) is None else smallest_normals(f) for kind in of)
        return accumulated_product(a, b, accumulation, first, second, start)
    # A part of a sum over ranks stays wide in every carrier.
    wide = a.dtype == torch.bfloat16 or (a.dtype == torch.float16 and precision.share is not None)
    return torch.bmm(a, b, out_dtype=torch.float32) if wide else torch.bmm(a, b)


class _AccumulatedProduct(torch.autograd.Function):
    """x W whose sums, and those of both its gradients, are formed as the recipe says; to second derivatives an ordinary product.

    The formats come as plain tensors, which is how the compiler sees them: activation's, weight's, gradient's.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bare: Precision, counts: tuple[int, ...], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(x, w, *tensors)
        ctx.bare, ctx.counts = bare, counts
        return multiply(x, w, dress(bare, counts, tensors), ("activation", "weight"))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w, *tensors = ctx.saved_tensors
        precision = dress(ctx.bare, ctx.counts, tensors)

        def gradient(a: Tensor, b: Tensor, of: tuple[Role, Role]) -> Tensor:
            value = multiply(a.detach(), b.detach(), precision, of)
            return straight_through(torch.bmm(a, b), value) if torch.is_grad_enabled() else value

        dx = gradient(dy, w.transpose(1, 2), ("gradient", "weight")) if ctx.needs_input_grad[0] else None
        dw = gradient(x.transpose(1, 2), dy, ("activation", "gradient")) if ctx.needs_input_grad[1] else None
        return dx, dw, None, None, *(None for _ in tensors)


def round_gradient(y: Tensor, precision: Precision) -> Tensor:
    """The same values, whose gradient is rounded as an operand of the backward products, in the dtype in which it arrives."""
    if precision.plan is not None or precision.smooth:
        return y
    if precision.gradient is not None:
        return _round_gradient(y, precision.gradient, precision, y.dtype)
    if precision.native_dtype is not None and precision.carrier != precision.native_dtype:
        return _round_gradient(y, None, precision, precision.native_dtype)
    return y


def receive(y: Tensor, precision: Precision) -> Tensor:
    """A product's result as it is used, FP32 (FP64 in FP64), its gradient rounded once, from there straight to its grid."""
    return round_gradient(y.to(torch.float64 if precision.carrier == torch.float64 else torch.float32), precision)


def linear(x_RSD: Tensor, w_RDF: Tensor, precision: Precision, site: int = 0, is_transposed: bool = False) -> Tensor:
    """y_RSF = x W run by run, in FP32 (FP64 for native-fp64), every operand of the three products rounded as
    `precision` says.

    x_RSD and w_RDF are FP32 master values, [R, S, D] and [R, D, F], or [R, F, D] if `is_transposed`; the FP32 result holds values
    of the recipe's output type.
    """
    w = w_RDF if precision.plan is not None else operand(w_RDF, precision, "weight")
    return multiply_operand(x_RSD, w, precision, site, is_transposed)


def multiply_operand(
    x_RSD: Tensor, w: Tensor | WeightOperand, precision: Precision, site: int = 0, is_transposed: bool = False
) -> Tensor:
    """`linear` by a weight as its products take it already."""
    return receive(product(operand(x_RSD, precision, "activation"), w, precision, site, is_transposed), precision)
