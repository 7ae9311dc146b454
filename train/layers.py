"""The layers as training runs them: first derivatives only, each operand rounded once, activations kept in the carrier.

`model.forward` says what is computed, in pieces that can be differentiated again and again. Training needs one gradient, and its
time goes into passes over activations, so here those pieces are joined by what they read and write:

    cross_entropy_gradient   a chunk of logits becomes losses and gradients in place of being kept
    add_norm   stream <- stream + a product's result; normalise; round: the operand of the next product. Backward: the gradient of
               the stream, the same rounded to the grid for the product before, and the gain's gradient
    attend     queries, keys and values stay packed as their product left them, and so does their gradient

The same numbers in the same order of roundings; `tests/test_layers.py` holds one to the other in FP64. On a GPU with Triton the
backward passes are `kernels`', elsewhere PyTorch's own.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from formats import FormatParameters, Rounding
from train.elsewhere import rounded
from train.linear import on_grid, operand
from train.precision import Precision, strip

Norm = Literal["layernorm", "rmsnorm"]
NORM_EPS = 1e-5
HEAD_SIZES = (16, 32, 64, 128)  # of the attention kernel
# `kernels`' numbers for how a gradient is rounded on its way out.
ROUNDINGS = {None: 0, Rounding.NEAREST_EVEN: 1, Rounding.TOWARD_ZERO: 2}


@torch.library.custom_op("exmy::norm_backward", mutates_args=())
def _norm_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, gain: Tensor, stream: Tensor | None, wanted: bool,
    rounding: int, parameters: list[Tensor], centred: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from train import kernels

    return kernels.norm_backward(dy, x, mean, rstd, gain, stream, wanted, rounding, parameters, centred)


@_norm_backward.register_fake
def _(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, gain: Tensor, stream: Tensor | None, wanted: bool,  # noqa: ARG001
    rounding: int, parameters: list[Tensor], centred: bool = True,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rounded = x.new_empty(x.shape if wanted else (0,), dtype=torch.bfloat16)
    return torch.empty_like(x), rounded, x.new_empty(x.shape[0], x.shape[2])


@torch.library.custom_op("exmy::attention_forward", mutates_args=())
def _attention_forward(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    from train import attention_kernels

    return attention_kernels.attention_forward(qkv, scale)


@_attention_forward.register_fake
def _(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    B, T, _, H, d = qkv.shape
    return qkv.new_empty(B, T, H, d), qkv.new_empty(B, H, T, dtype=torch.float32)


@torch.library.custom_op("exmy::attention_backward", mutates_args=())
def _attention_backward(dy: Tensor, qkv: Tensor, y: Tensor, lse: Tensor, scale: float) -> Tensor:
    from train import attention_kernels

    return attention_kernels.attention_backward(dy, qkv, y, lse, scale)


@_attention_backward.register_fake
def _(dy: Tensor, qkv: Tensor, y: Tensor, lse: Tensor, scale: float) -> Tensor:  # noqa: ARG001
    return torch.empty_like(qkv)


@torch.library.custom_op("exmy::cross_entropy", mutates_args=())
def _cross_entropy(
    logits: Tensor, targets: Tensor, vocabulary: int, tokens: int, rounding: int, parameters: list[Tensor], scale: Tensor | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from train import kernels

    return kernels.cross_entropy(logits, targets.contiguous(), vocabulary, tokens, rounding, parameters, scale)


@_cross_entropy.register_fake
def _(
    logits: Tensor, targets: Tensor, vocabulary: int, tokens: int, rounding: int, parameters: list[Tensor],  # noqa: ARG001
    scale: Tensor | None,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return logits.new_empty(targets.shape, dtype=torch.float32), torch.empty_like(logits)


@torch.library.custom_op("exmy::embedding_gradient", mutates_args=())
def _embedding_gradient(dx: Tensor, tokens: Tensor, vocabulary: int) -> Tensor:
    from train import kernels

    return kernels.embedding_gradient(dx, tokens, vocabulary)


@_embedding_gradient.register_fake
def _(dx: Tensor, tokens: Tensor, vocabulary: int) -> Tensor:  # noqa: ARG001
    return dx.new_empty(dx.shape[0], vocabulary, dx.shape[2])


def _once() -> None:
    """Refuse to be differentiated again, which would give Hessian-vector products that are wrong without an error."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("training's layers are differentiable once: take model.forward for second derivatives")


def _rounding(precision: Precision) -> int:
    return ROUNDINGS[precision.structure.rounding if precision.formats("gradient") is not None else None]


class _AddNorm(torch.autograd.Function):
    """See `add_norm`. Formats come as plain tensors, which is how the compiler sees them: first `ahead`'s, for the operand, then
    `behind`'s, for the gradient of delta.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, gain: Tensor, ahead: Precision, behind: Precision, activations: int,
        keep: bool, kernels: bool, norm: Norm, residual: str | None, *formats: Tensor,
    ) -> Any:  # fmt: skip
        total = x if delta is None else rounded(x + delta.to(x.dtype), residual)
        if norm == "layernorm":
            normal, mean, rstd = torch.native_layer_norm(total, (x.shape[-1],), None, None, NORM_EPS)
        else:  # RMSNorm: as if the mean were zero, to the kernel too
            rstd = torch.rsqrt(total.square().mean(-1, keepdim=True) + NORM_EPS)
            normal, mean = total * rstd, torch.zeros_like(rstd)
        ahead = ahead._replace(activation=FormatParameters(*formats[:activations]) if activations else None)
        a = operand(normal * gain[:, None, :], ahead, "activation")
        ctx.save_for_backward(total, mean, rstd, gain, *formats[activations:])
        ctx.has_delta, ctx.behind, ctx.kernels, ctx.inputs = delta is not None, behind, kernels, 10 + len(formats)
        ctx.centred = norm == "layernorm"
        if not keep:
            return a
        return (total.view_as(total) if delta is None else total), a

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        _once()
        total, mean, rstd, gain, *formats = ctx.saved_tensors
        stream, da = grads if len(grads) == 2 else (None, grads[0])
        behind = ctx.behind._replace(gradient=FormatParameters(*formats) if formats else None)
        d_delta = None
        if ctx.kernels:
            rounding = _rounding(behind)
            dx, rounded, d_gain = _norm_backward(
                da, total, mean, rstd, gain, stream, ctx.has_delta, rounding, formats, ctx.centred
            )
            d_delta = rounded if ctx.has_delta else None
        else:
            dy = da.to(total.dtype)
            normal = (total - mean) * rstd
            d_gain = (dy * normal).sum(1)
            scaled = dy * gain[:, None, :]
            if ctx.centred:
                dx = torch.ops.aten.native_layer_norm_backward(
                    scaled, total, (total.shape[-1],), mean, rstd, None, None, [True, False, False]
                )[0]
            else:
                dx = rstd * (scaled - normal * (scaled * normal).mean(-1, keepdim=True))
            dx = dx if stream is None else dx + stream
            d_delta = on_grid(dx, behind, "gradient") if ctx.has_delta else None
        return dx, d_delta, d_gain, *(None for _ in range(ctx.inputs - 3))


def _bare(precision: Precision) -> Precision:
    return strip(precision)[0]


def _add_norm(
    x: Tensor, delta: Tensor | None, gain: Tensor, ahead: Precision, behind: Precision, keep: bool, kernels: bool,
    norm: Norm, residual: str | None,
) -> Any:  # fmt: skip
    activation, gradient = ahead.formats("activation") or (), behind.formats("gradient") or ()
    return _AddNorm.apply(
        x,
        delta,
        gain,
        _bare(ahead),
        _bare(behind),
        len(activation),
        keep,
        kernels,
        norm,
        residual,
        *activation,
        *gradient,
    )


def add_norm(
    x: Tensor, delta: Tensor | None, gain: Tensor, ahead: Precision, behind: Precision, kernels: bool,
    norm: Norm = "layernorm", residual: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The sum x + delta, [R, S, D] as x is, and its norm times the gain as an operand of the next product, alike in the carrier.

    x [R, S, D] FP32 (FP64 for native-fp64); delta [R, S, D] a product's result, in the carrier, or None; gain [R, D]. `ahead` is
    the next product's precision, `behind` that of the product which left delta: the gradient that goes there is rounded as its
    operand already. residual: a format of the sum.
    """
    total, a = _add_norm(x, delta, gain, ahead, behind, True, kernels, norm, residual)
    return total, a


def last_norm(
    x: Tensor, delta: Tensor, gain: Tensor, head: Precision, behind: Precision, kernels: bool, norm: Norm = "layernorm",
    residual: str | None = None,
) -> Tensor:  # fmt: skip
    """The norm before the LM head: the operand alone, rounded for the head; delta's gradient is rounded for the last block."""
    a: Tensor = _add_norm(x, delta, gain, head, behind, False, kernels, norm, residual)
    return a


class _Attention(torch.autograd.Function):
    """The kernels' attention."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, scale: float) -> Tensor:
        y: Tensor
        y, lse = _attention_forward(qkv, scale)
        ctx.save_for_backward(qkv, y, lse)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        _once()
        return _attention_backward(dy, *ctx.saved_tensors, ctx.scale), None


def attend(qkv: Tensor, kernels: bool, scale: float | None = None) -> Tensor:
    """Causal attention of packed queries, keys and values [B, T, 3, H, d], in the carrier -> [B, T, H, d] alike.

    Scores are q k `scale`, 1/sqrt(d) where none is given.
    """
    scale = 1.0 / math.sqrt(qkv.shape[-1]) if scale is None else scale
    if kernels and qkv.shape[-1] in HEAD_SIZES:
        y: Tensor = _Attention.apply(qkv, scale)
        return y
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)


def embedding_gradient(dx: Tensor, tokens: Tensor, vocabulary: int, kernels: bool) -> Tensor:
    """[R, V, D]: for each run, the rows of dx [R, S, D] summed by token [R, S]; in a fixed order."""
    gradient: Tensor
    if kernels:
        gradient = _embedding_gradient(dx, tokens, vocabulary)
        return gradient
    R, _, D = dx.shape
    rows = tokens + vocabulary * torch.arange(R, device=tokens.device)[:, None]
    gradient = torch.ops.aten.embedding_dense_backward(dx, rows, R * vocabulary, -1, False)
    return gradient.view(R, vocabulary, D)


class Readout(NamedTuple):
    """What lies between the LM head's product z and the loss.

        logits = cap tanh(multiplier z / cap)        the loss that is descended: cross entropy + z_loss logsumexp(logits)^2

    The multiplier is muP's, the cap Gemma 2's (2408.00118); without one the logits are multiplier z. The z-loss (PaLM,
    2204.02311) keeps the log sum near zero; recorded losses, and the sharpness of logits, are of the cross entropy alone.
    """

    multiplier: float = 1.0
    softcap: float | None = None
    z_loss: float = 0.0

    def logits(self, z: Tensor) -> Tensor:
        """The logits, in the dtype of z."""
        scaled = z if self.multiplier == 1.0 else self.multiplier * z
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)

    def through(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """The gradient in z, from that in the logits."""
        if self.softcap is not None:
            gradient = gradient * (1.0 - (logits / self.softcap).square())
        return gradient if self.multiplier == 1.0 else self.multiplier * gradient


PLAIN = Readout()


def cross_entropy_gradient(
    product: Tensor, targets: Tensor, precision: Precision, vocabulary: int, tokens: int, kernels: bool,
    readout: Readout = PLAIN, scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sums of each run's losses [r], and the gradient, in the LM head's product, of what is descended, summed / tokens, as an
    operand [r, s, V'], in the carrier.

    product [r, s, V'] in the carrier, of which the first `vocabulary` count; targets [r, s]. The kernel knows of no readout.
    scale [r], the runs' loss scales, if any, multiplies the gradient before it is rounded, and no loss.
    """
    if kernels and readout == PLAIN:
        losses, gradient = _cross_entropy(
            product, targets, vocabulary, tokens, _rounding(precision), list(precision.formats("gradient") or ()), scale
        )
        return losses.sum(1), gradient
    logits = wide_logits(product, readout)
    z = padded_with_nothing(logits, vocabulary)
    log_sum, is_target, losses = token_losses(z, targets)
    p = torch.exp(z - log_sum)
    if readout.z_loss:
        p = p * (1.0 + 2.0 * readout.z_loss * log_sum)
    dz = readout.through((p - is_target.to(z.dtype)) / tokens, logits)
    dz = dz if scale is None else dz * scale[:, None, None]
    return losses.sum(1), on_grid(dz, precision, "gradient")


def wide_logits(product: Tensor, readout: Readout = PLAIN) -> Tensor:
    """Logits in FP32 (FP64 in FP64), of the shape of the LM head's product."""
    return readout.logits(product if product.dtype == torch.float64 else product.float())


def padded_with_nothing(logits: Tensor, vocabulary: int) -> Tensor:
    """Logits [r, s, V'] with what pads the vocabulary at minus infinity, so that rows stay aligned."""
    padded = logits.shape[-1] > vocabulary
    return logits.masked_fill(_ticks(logits) >= vocabulary, -math.inf) if padded else logits


def token_losses(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The log sums of logits z [r, s, V'], [r, s, 1], which of them is the target's, and the losses, [r, s]."""
    is_target = targets[..., None] == _ticks(z)
    # By comparison, not by a gather: one fused pass.
    log_sum = z.logsumexp(-1, keepdim=True)
    return log_sum, is_target, log_sum[..., 0] - torch.where(is_target, z, 0.0).sum(-1)


def _ticks(z: Tensor) -> Tensor:
    return torch.arange(z.shape[-1], device=z.device)
