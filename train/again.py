"""Computed again for its derivatives: what a function leaves between its ends is not kept.

As torch.utils.checkpoint, but for dual numbers too, with which that does not go: forward over reverse, memory holds one call's
intermediate values at a time, whether its value, its gradient or its Hessian-vector product is being computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


class _Again(torch.autograd.Function):
    """y, which is f(x, w, *rest) with its tangent already, and that function's gradients in x and w."""

    @staticmethod
    def forward(ctx: Any, f: Callable[..., Tensor], y: Tensor, *tensors: Tensor) -> Tensor:
        ctx.f = f
        ctx.save_for_backward(*tensors)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, w, *rest = ctx.saved_tensors
        again = torch.is_grad_enabled()  # the gradient is to be differentiated in turn: twice backward
        with torch.enable_grad():
            if not again:
                x, w = _leaf(x), _leaf(w)
            y = ctx.f(x, w, *rest)
        return None, None, *torch.autograd.grad(y, (x, w), gradient, create_graph=again), *(None for _ in rest)

    @staticmethod
    def jvp(ctx: Any, _: None, dy: Tensor, *others: Tensor | None) -> Tensor:  # noqa: ARG004
        return dy


def _leaf(x: Tensor) -> Tensor:
    """The same dual number, with a history that begins here."""
    if forward_ad._current_level < 0:
        return x.detach().requires_grad_()
    value, tangent = forward_ad.unpack_dual(x)
    value = value.detach().requires_grad_()
    dual: Tensor = value if tangent is None else forward_ad.make_dual(value, tangent)
    return dual


def again(f: Callable[..., Tensor], x: Tensor, w: Tensor, *rest: Tensor) -> Tensor:
    """f(x, w, *rest), differentiable in x and w alone; all tensors that f needs are its arguments.

    Under a transform of torch.func it is f itself, and what f leaves is kept.
    """
    if torch._C._are_functorch_transforms_active():
        return f(x, w, *rest)
    with torch.no_grad():
        y = f(x, w, *rest)
    result: Tensor = _Again.apply(f, y, x, w, *rest)
    return result
