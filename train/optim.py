"""AdamW and Muon with gradient clipping for a pack: each run has its own learning rate and its own gradient norm.

Per run r, with g clipped to norm c over all its parameters (Loshchilov & Hutter 2019, as in torch.optim.AdamW):

    g <- g min(1, c / (|g| + 1e-6))
    m <- b1 m + (1 - b1) g                 v <- b2 v + (1 - b2) g^2
    w <- w (1 - lr wd) - lr / (1 - b1^t)  m / (sqrt(v / (1 - b2^t)) + eps)

`Muon` has a step of its own (see `muon`) for the blocks' linear weights, and this one for everything else. A parameter's rate
may be a multiple of its optimiser's, `ModelShape.rate_factor`; its decay stays lr wd, so that a wider model under muP is held as
tight (Wang & Aitchison 2405.13698). What decays is all but what `no_decay` names.

All state is FP32, on the grid of a narrower format where `state` says so, and stays on the device, the step counter too, so
nothing in a step waits for the host. With a loss scale, gradients arrive multiplied by it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from train.model import ModelShape, is_matrix
from train.muon import muon_direction
from train.schedules import MUON_RATE
from train.state import Chance, Kept, StateFormats, Store, compensated, stored

FP32 = StateFormats()
CLIP_EPS = 1e-6

Parts = Sequence[Tensor]
"""A gradient as tensors whose sum it is: most have one, the tied embedding one from either end."""


@dataclass(frozen=True)
class AdamW:
    """The optimiser's constants; `clip` is the largest gradient norm of a run, infinity for none.

    no_decay: the kinds of parameters that weight decay leaves alone, of "gains", "embeddings" and "head".
    """

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    no_decay: tuple[str, ...] = ("gains",)


@dataclass(frozen=True)
class Muon(AdamW):
    """Muon for the blocks' linear weights, AdamW with the constants above for embeddings, head and gains.

    muon_rate: Muon's learning rate in units of the run's, which is AdamW's: at the customary 1e-3 the default is Jordan's 0.02.
    """

    muon_rate: float = MUON_RATE
    momentum: float = 0.95


class Rule(NamedTuple):
    """How a step treats one parameter, the same for all runs and steps."""

    decays: bool = True
    factor: float = 1.0
    """Of the learning rate."""
    parts: tuple[int, ...] = ()
    """For Muon: the outputs of each matrix that lies in the parameter. None for AdamW."""
    narrow: bool = True
    """Whether what is kept of it is in the state's formats, and not in FP32."""


def parameter_rules(shape: ModelShape, config: AdamW, formats: StateFormats = FP32) -> dict[str, Rule]:
    """The rule of every parameter, by name."""
    return {
        name: Rule(
            decays=not shape.kinds(name) & set(config.no_decay),
            factor=shape.rate_factor(name),
            narrow=formats.of == "all" or is_matrix(name) or name == shape.head,
            parts=shape.matrices(name) if isinstance(config, Muon) and is_matrix(name) else (),
        )
        for name in shape.parameters()
    }


class Factors(NamedTuple):
    """What a step multiplies by, the same for every parameter of a run; [R] but for a correction that all runs share."""

    clip: Tensor  # on the gradient
    decay: Tensor  # lr wd, of the weight
    rate: Tensor  # lr / (1 - b1^t)
    correction: Tensor  # sqrt(1 - b2^t), [1] or [R]
    learning_rate: Tensor  # lr itself
    unscale: Tensor | None = None  # 1 / loss scale, on the gradient
    made: Tensor | None = None  # whether the step is made: bool


def squares(
    grads: Sequence[Parts], gradient_formats: Sequence[str | None] | None = None, unscale_R: Tensor | None = None
) -> Tensor:
    """Each run's sum of squares over some of its gradients, [R]; FP32, or FP64 for FP64 gradients.

    gradient_formats: that of each gradient, None for FP32.
    """
    names = gradient_formats or [None] * len(grads)
    gradients = [_gradient(parts, name, unscale_R) for parts, name in zip(grads, names, strict=True)]
    return torch.stack([gradient.square().flatten(1).sum(1) for gradient in gradients]).sum(0)


def factors(
    squares_GR: Sequence[Tensor],
    rates: Tensor,
    counter: Tensor,
    config: AdamW,
    unscale_R: Tensor | None = None,
    updates_R: Tensor | None = None,
) -> tuple[Tensor, Factors]:
    """Each run's gradient norm before clipping, [R], and the step's factors.

    squares_GR: `squares` of every group of parameters. rates [steps, R] and counter [1], the steps made before this one, are
    on the device. unscale_R: 1 / loss scale, if any. updates_R: the updates that each run has made before, where steps can be
    skipped: then this one is, for runs whose norm is not finite.
    """
    norm_R = torch.stack(list(squares_GR)).sum(0).sqrt()
    clip_R = (
        torch.clamp(config.clip / (norm_R + CLIP_EPS), max=1.0)
        if math.isfinite(config.clip)
        else torch.ones_like(norm_R)
    )
    rate_R = rates.index_select(0, counter)[0]
    made_before = counter if updates_R is None else updates_R
    exponent = (made_before + 1).to(torch.float64)  # 1 - beta2 is small against an FP32 power's error
    correction1 = (1 - config.beta1**exponent).to(rate_R.dtype)
    correction2 = (1 - config.beta2**exponent).sqrt().to(rate_R.dtype)
    made_R = None if updates_R is None else norm_R.isfinite()
    return norm_R, Factors(
        clip_R, rate_R * config.weight_decay, rate_R / correction1, correction2, rate_R, unscale_R, made_R
    )


def update(
    parameters: Sequence[Tensor],
    grads: Sequence[Parts],
    kept: Sequence[Kept],
    f: Factors,
    config: AdamW,
    rules: Sequence[Rule],
    formats: StateFormats = FP32,
    chance: Chance | None = None,
) -> None:
    """One step in place on parameters and what is kept of them, [R, ...] each.

    A run's non-finite gradient makes that run's own weights non-finite, and no other's; or, where steps can be skipped, leaves
    all that is the run's as it is, to the bit.
    """
    for p, parts, old, rule in zip(parameters, grads, kept, rules, strict=True):
        its = formats if rule.narrow else FP32
        store = Store(its, chance, old.words)
        gradient = _gradient(parts, its.gradient, f.unscale).to(p.dtype) * _along(f.clip, p)
        if rule.parts:
            assert isinstance(config, Muon)
            first = old.first.lerp(gradient, 1 - config.momentum)
            second = None
            direction = muon_direction(gradient.lerp(first, config.momentum), rule.parts)
            rate, own = f.learning_rate, config.muon_rate
        else:
            assert old.second is not None
            first = old.first.lerp(gradient, 1 - config.beta1)
            second = (old.second * config.beta2).addcmul(gradient, gradient, value=1 - config.beta2)
            direction = first / (second.sqrt() / _along(f.correction, p) + config.eps)
            rate, own = f.rate, 1.0
        step = _along(_times(rate, own * rule.factor), p) * direction
        decay = _along(_times(f.decay, own), p) if rule.decays else 0.0
        lost = None
        if old.lost is None:
            weights = store(p * (1 - decay) - step, "master")
        else:
            weights, lost = compensated(p, -(decay * p) - step, old.lost, store)
        _write(p, weights, f.made)
        _write(old.first, store(first, "first"), f.made)
        if old.second is not None and second is not None:
            _write(old.second, store(second, "second"), f.made)
        if old.lost is not None and lost is not None:
            _write(old.lost, lost, f.made)


def update_rms(
    grads: Sequence[Parts], kept: Sequence[Kept], f: Factors, config: AdamW, rules: Sequence[Rule],
    formats: StateFormats = FP32,
) -> Tensor:  # fmt: skip
    """Each run's sqrt(mean(g^2 / max(v, eps^2))) over the elements of some parameters, after their `update`, [R].

    g is clipped, as the update has it, and v the second moment that it left, bias corrected (StableAdamW, 2304.13013). Of what
    AdamW updates; NaN where that is nothing.
    """
    sums, count = [], 0
    for parts, state, rule in zip(grads, kept, rules, strict=True):
        if state.second is None:
            continue
        gradient = _gradient(parts, formats.gradient if rule.narrow else None, f.unscale).to(state.second.dtype)
        root = state.second.sqrt() / _along(f.correction, gradient)
        ratio = gradient * _along(f.clip, gradient) / root.clamp(min=config.eps)
        sums.append(ratio.square().flatten(1).sum(1))
        count += ratio[0].numel()
    return (torch.stack(sums).sum(0) / count).sqrt() if sums else torch.full_like(f.clip, torch.nan)


def _write(old: Tensor, new: Tensor, made_R: Tensor | None) -> None:
    old.copy_(new if made_R is None else torch.where(_along(made_R, old), new, old))


def _along(factor_R: Tensor, p: Tensor) -> Tensor:
    """A factor [R], or [1], as it broadcasts against a parameter [R, ...]."""
    return factor_R.view(-1, *(1,) * (p.ndim - 1))


def _times(factor_R: Tensor, number: float) -> Tensor:
    return factor_R if number == 1.0 else factor_R * number


def _gradient(parts: Parts, name: str | None = None, unscale_R: Tensor | None = None) -> Tensor:
    """The sum of a gradient's parts, which stay apart, and narrow, in memory; FP32 at least. Stored in the format `name`, and
    then without the loss scale.
    """
    total, *others = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in parts)
    for part in others:
        total = total + part
    total = stored(total, name)
    return total if unscale_R is None else total * _along(unscale_R, total)
