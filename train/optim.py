"""AdamW with gradient clipping for a pack: each run has its own learning rate and its own gradient norm.

Per run r, with g clipped to norm c (Loshchilov & Hutter 2019, as in torch.optim.AdamW):

    g <- g min(1, c / (|g| + 1e-6))
    m <- b1 m + (1 - b1) g                 v <- b2 v + (1 - b2) g^2
    w <- w (1 - lr wd) - lr / (1 - b1^t)  m / (sqrt(v / (1 - b2^t)) + eps)

Decay acts on matrices (embeddings included), not on norm gains. All state is FP32 and stays on the device, the step counter
too, so nothing in a step waits for the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

CLIP_EPS = 1e-6

Parts = Sequence[Tensor]
"""A gradient as tensors whose sum it is: most have one, the tied embedding one from either end."""


@dataclass(frozen=True)
class AdamW:
    """The optimiser's constants; `clip` is the largest gradient norm of a run, infinity for none."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0


class Factors(NamedTuple):
    """What a step multiplies by, the same for every parameter of a run; [R] but for the last."""

    clip: Tensor  # on the gradient
    decay: Tensor  # lr wd, of the weight
    rate: Tensor  # lr / (1 - b1^t)
    correction: Tensor  # sqrt(1 - b2^t), [1]


def squares(grads: Sequence[Parts]) -> Tensor:
    """Each run's sum of squares over some of its gradients, [R]; FP32, or FP64 for FP64 gradients."""
    return torch.stack([_gradient(parts).square().flatten(1).sum(1) for parts in grads]).sum(0)


def factors(squares_GR: Sequence[Tensor], rates: Tensor, counter: Tensor, config: AdamW) -> tuple[Tensor, Factors]:
    """Each run's gradient norm before clipping, [R], and the step's factors.

    squares_GR: `squares` of every group of parameters. rates [steps, R] and counter [1], the steps made before this one, are
    on the device.
    """
    norm_R = torch.stack(list(squares_GR)).sum(0).sqrt()
    clip_R = (
        torch.clamp(config.clip / (norm_R + CLIP_EPS), max=1.0)
        if math.isfinite(config.clip)
        else torch.ones_like(norm_R)
    )
    rate_R = rates.index_select(0, counter)[0]
    exponent = (counter + 1).to(torch.float64)  # 1 - beta2 is small against an FP32 power's error
    correction1 = (1 - config.beta1**exponent).to(rate_R.dtype)
    correction2 = (1 - config.beta2**exponent).sqrt().to(rate_R.dtype)
    return norm_R, Factors(clip_R, rate_R * config.weight_decay, rate_R / correction1, correction2)


def update(
    parameters: Sequence[Tensor],
    grads: Sequence[Parts],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    f: Factors,
    config: AdamW,
) -> None:
    """One AdamW step in place on parameters and both moments, [R, ...] each.

    A run's non-finite gradient makes that run's own weights non-finite, and no other's.
    """
    for p, parts, m, v in zip(parameters, grads, first, second, strict=True):
        ones = (1,) * (p.ndim - 1)
        clipped = _gradient(parts).to(p.dtype) * f.clip.view(-1, *ones)
        m.lerp_(clipped, 1 - config.beta1)
        v.mul_(config.beta2).addcmul_(clipped, clipped, value=1 - config.beta2)
        decay = f.decay.view(-1, *ones) if p.ndim > 2 else 0.0
        denominator = v.sqrt() / f.correction.view(1, *ones) + config.eps
        p.copy_(p * (1 - decay) - f.rate.view(-1, *ones) * (m / denominator))


def _gradient(parts: Parts) -> Tensor:
    """The sum of a gradient's parts, which stay apart, and narrow, in memory; FP32 at least."""
    total, *others = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in parts)
    for part in others:
        total = total + part
    return total
