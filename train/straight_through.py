"""A value with another's derivative: how rounding is differentiated.

To be differentiated forward, by dual numbers or a transform of torch.func, a function of autograd needs what the compiler of
training's steps refuses. So there are two of one meaning, and training never meets the second.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


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
    """The same with a derivative forward too, for dual numbers and transforms of torch.func."""

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


def both_ways() -> bool:
    """Whether dual numbers or a transform of torch.func are at work; never in code that is being compiled, training's."""
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def straight_through(x: Tensor, y: Tensor) -> Tensor:
    """`y`, computed from x, as if it were x to every derivative; y's shape and dtype."""
    function = _StraightThroughBothWays if both_ways() else _StraightThrough
    result: Tensor = function.apply(x, y)
    return result
