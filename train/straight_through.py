"""A value with another's derivative: how rounding is differentiated.

Under a transform of torch.func (`grad`, `jvp`) a function of autograd needs a form of its own, which the compiler of training's
steps refuses; so there are two of one meaning, and training never meets the second.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _StraightThrough(torch.autograd.Function):
    """The value of `y` with the derivative of the identity in `x`, at every order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


class _StraightThroughBothWays(torch.autograd.Function):
    """The same with a derivative forward too, for transforms of torch.func."""

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG004
        return y.clone()  # a view of an input would want its tangent to be one

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.dtype, ctx.dtype_out = inputs[0].dtype, output.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dy: Tensor | None) -> Tensor | None:  # noqa: ARG004
        return None if dx is None else dx.to(ctx.dtype_out)


def transformed() -> bool:
    """Whether a transform of torch.func is at work; never in code that is being compiled as a whole, training's."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def straight_through(x: Tensor, y: Tensor) -> Tensor:
    """`y`, computed from x, as if it were x to every derivative; y's shape and dtype."""
    function = _StraightThroughBothWays if transformed() else _StraightThrough
    result: Tensor = function.apply(x, y)
    return result
