"""Loss scaling: gradients too small for a narrow format are made larger on their way back, and smaller where they arrive.

The scale multiplies the gradient of the loss at the logits, before that is rounded to its format; by the chain rule it is in
every gradient, and the optimiser takes it out again before anything else (Micikevicius et al. 1710.03740, section 3.2). With a
power of two, and no format whose range matters, nothing changes at all.

A *static* scale is a number a run. A *dynamic* one is torch.amp.GradScaler's, for each run by itself: where a gradient is not
finite the step is skipped, weights and moments stay as they are and the scale falls to `backoff` of it; after `interval` good
steps in a row it grows by `growth`, unless that is beyond FP32. The learning rate's schedule goes on through skipped steps;
Adam's bias correction counts only steps that were made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DynamicLossScale:
    """The constants of a dynamic loss scale; the defaults are torch.amp.GradScaler's."""

    initial: float = 2.0**16
    growth: float = 2.0
    backoff: float = 0.5
    interval: int = 2000

    def __post_init__(self) -> None:
        check_scale(self.initial)
        if not 1 < self.growth < math.inf:
            raise ValueError(f"growth of the loss scale must be greater than 1, got {self.growth:g}; 2 is usual")
        if not 0 < self.backoff < 1:
            raise ValueError(f"backoff of the loss scale must be between 0 and 1, got {self.backoff:g}; 0.5 is usual")
        if self.interval < 1:
            raise ValueError(f"interval of the loss scale must be at least 1 step, got {self.interval}")


def check_scale(scale: float) -> float:
    """The scale itself; ValueError unless it and its inverse are normal FP32 numbers."""
    if not 2.0**-126 <= scale <= 2.0**126:
        raise ValueError(f"a loss scale must be in 2^-126..2^126, got {scale:g}; 2^16 is usual")
    return scale


def inverse(scale_R: Tensor) -> Tensor:
    """1 / scale in the scale's dtype, by way of FP64, as GradScaler has it: correctly rounded on every device."""
    return scale_R.double().reciprocal().to(scale_R.dtype)


def advance_scale(
    scale_R: Tensor, good_steps_R: Tensor, updates_R: Tensor, made_R: Tensor, scales: Tensor, skipped: Tensor, counter: Tensor,
    config: DynamicLossScale,
) -> None:  # fmt: skip
    """The scaler after a step, all in place; and the step's rows of the histories `scales` and `skipped`, [steps, R].

    made: which runs' gradients were finite. good_steps counts those in a row, updates all of them; counter [1] is the step.
    """
    scales.index_copy_(0, counter, scale_R[None].to(scales.dtype))
    skipped.index_copy_(0, counter, ~made_R[None])
    updates_R.add_(made_R)
    good = torch.where(made_R, good_steps_R + 1, 0)
    grown = scale_R * config.growth
    grows = (good == config.interval) & grown.isfinite()
    kept = torch.where(grows, grown, scale_R)
    scale_R.copy_(torch.where(made_R, kept, scale_R * config.backoff))
    good_steps_R.copy_(torch.where(good == config.interval, 0, good))
