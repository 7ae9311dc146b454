"""Computed again for its derivatives: what a function leaves between its ends is not kept.

As torch.utils.checkpoint, for first and second derivatives, under transforms of torch.func too, where that can't go: forward over
reverse, memory holds one call's intermediate values at a time, whether its value, its gradient or its product is being computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Again(torch.autograd.Function):
    """f(x, w, *rest), differentiable in x and w."""

    @staticmethod
    def forward(f: Callable[..., Tensor], x: Tensor, w: Tensor, *rest: Tensor) -> Tensor:
        return f(x, w, *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.f, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, w, *rest = ctx.saved_tensors
        pull: Callable[[Tensor], tuple[Tensor, Tensor]] = torch.func.vjp(lambda x, w: ctx.f(x, w, *rest), x, w)[1]
        return None, *pull(gradient), *(None for _ in rest)

    @staticmethod
    def jvp(ctx: Any, _: None, dx: Tensor | None, dw: Tensor | None, *others: None) -> Tensor:  # noqa: ARG004
        x, w, *rest = ctx.saved_tensors
        tangents = tuple(torch.zeros_like(t) if dt is None else dt for t, dt in ((x, dx), (w, dw)))
        tangent: Tensor = torch.func.jvp(lambda x, w: ctx.f(x, w, *rest), (x, w), tangents)[1]
        return tangent


def again(f: Callable[..., Tensor], x: Tensor, w: Tensor, *rest: Tensor) -> Tensor:
    """f(x, w, *rest), differentiable in x and w alone; all tensors that f needs are its arguments."""
    result: Tensor = _Again.apply(f, x, w, *rest)
    return result
