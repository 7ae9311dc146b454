"""A linear layer as a landscape sees it: what the forward pass rounds, straight through, around an ordinary product.

    y = out( x' W' ),      x' = Q(x), W' = Q(W), whose derivatives are the identity's, and out's too

So the loss is the run's own, with its rounded operands and outputs, and has derivatives of every order: those of the smooth
surrogate in which each rounded value stands for what was rounded. Its Hessian is symmetric, whatever the recipe. What a recipe
does to gradients is no part of a loss, and is left out: see `linear` and `products` for what training descends by.

Values are held in FP32, or FP64, on every device, as training holds them on a CPU; formats are the run's. Where the recipe says
how sums are formed, the value is that sum and the derivatives are the ordinary product's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from formats.factored import Factored
from train.accumulate import accumulated_product, smallest_normals
from train.hadamard import rotate_back
from train.precision import Precision, ProductPlan
from train.products import factor_of_elements, forward_product, take_alone
from train.straight_through import straight_through


class Operands(NamedTuple):
    """Both operands of a forward product, x [R, .., S, D] and w [R, .., D, F], rounded and straight through; and, where its sums
    are formed by rules, what the sum is formed of.
    """

    x: Tensor
    w: Tensor
    parts: tuple[Factored, Factored] | None = None

    def part(self, r: slice, s: slice) -> Operands:
        """Those of some runs, and of some rows of x."""
        if self.parts is None:
            return Operands(self.x[r, s], self.w[r])
        (x, x_factor), (w, w_factor) = self.parts
        if x_factor is not None:
            x_factor = x_factor[r, s] if x_factor.shape[1] > 1 else x_factor[r]
        parts = Factored(x[r, s], x_factor), Factored(w[r], None if w_factor is None else w_factor[r])
        return Operands(self.x[r, s], self.w[r], parts)


def operands_of(x: Tensor, w: Tensor, tensors: Sequence[Tensor | None]) -> Operands:
    """Operands from their tensors one by one: the parts' values and factors, or none."""
    if not tensors:
        return Operands(x, w)
    x_values, x_factor, w_values, w_factor = tensors
    assert x_values is not None
    assert w_values is not None
    return Operands(x, w, (Factored(x_values, x_factor), Factored(w_values, w_factor)))


def operands(x: Tensor, w: Tensor, precision: Precision, site: int = 0, is_transposed: bool = False) -> Operands:
    """The operands of x and w: as they are, being rounded already, or by the plan's rules.

    x [R, .., S, D]; w [R, .., D, F], or [R, F, D] if `is_transposed`, which is rounded as it lies.
    """
    plan = precision.plan
    if plan is None:
        return Operands(x, w.mT if is_transposed else w)
    of, axis = plan.forward, -1 if is_transposed else -2
    x_op = take_alone(precision.to_output(x.detach()), of.first, -1, of.chunk, precision, site)
    w_op = take_alone(w.detach(), of.second, axis, of.chunk, precision, site)
    a = straight_through(x, _value(x_op, of, 0, -1, precision, x))
    b = straight_through(w, _value(w_op, of, 1, axis, precision, w))
    if is_transposed:
        b, w_op = b.mT, Factored(w_op.values.mT, None if w_op.factor is None else w_op.factor.mT)
    return Operands(a, b, (x_op, w_op) if precision.structure.accumulate is not None else None)


def multiply(of: Operands, precision: Precision) -> Tensor:
    """Each run's product of operands, in the carrier, rounded to the recipe's output."""
    y = torch.matmul(of.x, of.w)
    accumulate = precision.structure.accumulate
    if of.parts is not None:
        return straight_through(y, forward_product(*of.parts, precision).to(y.dtype))
    if accumulate is not None:
        smallest = (None if f is None else smallest_normals(f) for f in (precision.activation, precision.weight))
        value = accumulated_product(of.x.detach(), of.w.detach(), accumulate, *smallest)
        return straight_through(y, precision.to_output(value).to(y.dtype))
    return straight_through(y, precision.to_output(y.detach())) if precision.rounds_outputs else y


def product(x: Tensor, w: Tensor, precision: Precision, site: int = 0, is_transposed: bool = False) -> Tensor:
    """`linear.product` of the surrogate."""
    return multiply(operands(x, w, precision, site, is_transposed), precision)


def rounds(precision: Precision, activation: bool) -> bool:
    """Whether an operand is changed when it is made, before its products round it by rules."""
    if precision.plan is not None:
        return activation and precision.rounds_outputs
    own = precision.activation if activation else precision.weight
    return own is not None or precision.native_dtype is not None


def _value(operand: Factored, plan: ProductPlan, place: int, axis: int, precision: Precision, like: Tensor) -> Tensor:
    """An operand's value as it lies where it came from, rotated back, in the carrier."""
    rule = (plan.first, plan.second)[place]
    value, factor = operand.values.to(precision.carrier), factor_of_elements(operand, plan.chunk, axis)
    value = value if factor is None else value * factor.to(precision.carrier)
    if rule.hadamard:
        assert precision.signs is not None
        value = rotate_back(value, axis, precision.signs, like.shape[axis])
    return value.to(precision.carrier)
