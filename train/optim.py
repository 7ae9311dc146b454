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
from dataclasses import dataclass

import torch
from torch import Tensor

CLIP_EPS = 1e-6


@dataclass(frozen=True)
class AdamW:
    """The optimiser's constants; `clip` is the largest gradient norm of a run, infinity for none."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0


def learning_rates(
    peaks: list[float], steps: int, warmup: int, schedule: str, final_fraction: float
) -> list[list[float]]:
    """The learning rate of every step and run, [steps][R]: linear warm-up, then cosine to `final_fraction` of the
    peak, or constant.

    Step s of the warm-up has (s + 1) / warmup of the peak; the last step of a cosine has exactly final_fraction of it.
    """

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if schedule == "constant":
            return 1.0
        progress = (step - warmup) / max(1, steps - 1 - warmup)
        return final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))

    return [[peak * factor(step) for peak in peaks] for step in range(steps)]


def gradient_norms(grads: list[Tensor]) -> Tensor:
    """Each run's gradient norm over all its parameters, [R], for gradients [R, ...]."""
    squares = [g.square().flatten(1).sum(1) for g in grads]
    return torch.stack(squares).sum(0).sqrt()


def update(
    parameters: list[Tensor],
    grads: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    rate_R: Tensor,
    step: Tensor,
    config: AdamW,
) -> Tensor:
    """One AdamW step in place on parameters and both moments, [R, ...] each; returns the norms before clipping, [R].

    `rate_R` are the learning rates of this step and `step` counts from 1, [1]; both on the device, `step` an integer.
    A run's non-finite gradient makes that run's own weights non-finite, and no other's.
    """
    norm_R = gradient_norms(grads)
    scale_R = (
        torch.clamp(config.clip / (norm_R + CLIP_EPS), max=1.0)
        if math.isfinite(config.clip)
        else torch.ones_like(norm_R)
    )
    exponent = step.to(torch.float64)  # 1 - beta2 is small against an FP32 power's error
    correction1 = (1 - config.beta1**exponent).to(rate_R.dtype)
    correction2 = (1 - config.beta2**exponent).sqrt().to(rate_R.dtype)
    for p, g, m, v in zip(parameters, grads, first, second, strict=True):
        ones = (1,) * (p.ndim - 1)
        rate, scale = rate_R.view(-1, *ones), scale_R.view(-1, *ones)
        clipped = g * scale
        m.lerp_(clipped, 1 - config.beta1)
        v.mul_(config.beta2).addcmul_(clipped, clipped, value=1 - config.beta2)
        decay = rate * config.weight_decay if p.ndim > 2 else 0.0
        denominator = v.sqrt() / correction2.view(1, *ones) + config.eps
        p.copy_(p * (1 - decay) - (rate / correction1.view(1, *ones)) * (m / denominator))
    return norm_R
