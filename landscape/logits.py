"""How sharp the loss is at a token's logits: Keskar's sharpness, exactly, without an optimiser.

Keskar et al. 2017 (1609.04836, metric 2.1) ask how far a loss f rises inside a small box around a point z,

    phi = 100 (max_{|y_i| <= b_i} f(z + y) - f(z)) / (1 + f(z))   percent,      b_i = eps (|z_i| + 1),

and climb with ten iterations of L-BFGS-B. Lee et al. 2024 (2405.18710) take z to be a token's logits and f the cross
entropy with its target t. There no climbing is needed: f(z) = logsumexp(z) - z_t has slope p_i > 0 in every other logit
and p_t - 1 < 0 in z_t, wherever one stands, so the maximum over the box is at one known corner: z_i + b_i for i != t,
and z_t - b_t.

Subtracting the two losses would lose the answer: both are numbers around 1 whose difference is around eps. With m the
log-odds against the target, q the other tokens' distribution among themselves, and c_i = b_i + b_t the change of z_i -
z_t, the rise itself is

    m = logsumexp_{i != t} z_i - z_t,   f = softplus(m),   delta f = log1p(sigmoid(m) sum_{i != t} q_i expm1(c_i)),

a sum of positive terms: nothing cancels (sigmoid(m) q_i is p_i). Written with expm1(c) = -e^c expm1(-c) and the largest
exponent taken out of the sum, as in logsumexp, it does not overflow either.

As eps -> 0, phi -> 100 eps ||(|z| + 1) * grad f||_1 / (1 + f): it measures a slope, not a curvature. And it depends on
where zero is: the loss does not change under z -> z + c, the box does. The centred variant takes its box around z minus
its mean over V.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SMALL = 0.5


def half_width(z: Tensor, epsilon: float) -> Tensor:
    """Keskar's box around z: epsilon * (|z| + 1), elementwise; same shape and dtype as z."""
    return epsilon * (z.abs() + 1)


def logit_sharpness(
    logits: Tensor, targets: Tensor, epsilon: float | Sequence[float] = 5e-4, *, centred: bool = False
) -> Tensor:
    """Keskar's sharpness of the cross entropy at each token's logits, in percent, exact.

    logits [..., V] of any floating dtype, targets [...] of any integer dtype in 0..V-1 -> [...], or [..., E] for a
    sequence of E epsilons. Computed and returned in FP32, or FP64 for FP64 logits: in BF16, adding the half-width
    rounds away. `centred` takes the box around the logits minus their mean. Tokens are perturbed separately, so a mean
    over tokens is a mean of sharpnesses.

    A token with a NaN or infinite logit gives NaN. Relative error a few times (8 + |m| + c) 2^-24 in FP32, with m and c
    of the module's formula; what lies below the smallest normal number of the dtype becomes 0. Memory: a few times the
    logits, whatever E; where all boxes are small (`small_box_sharpness`) time does not depend on E either. Raises
    ValueError for shapes, dtypes and epsilons that don't fit; targets out of range raise where indexing does (CPU).
    """
    epsilons = _epsilons(epsilon)
    check_logits(logits, targets)
    at = _stand(logits, targets, centred)
    percent, small = _by_moments(at, epsilons)
    if torch.compiler.is_compiling() or not small.all():
        percent = torch.where(small, percent, _by_sums(at, epsilons))
    return percent if isinstance(epsilon, Sequence) else percent.squeeze(-1)


def small_box_sharpness(
    logits: Tensor, targets: Tensor, epsilons: Sequence[float], *, centred: bool = False
) -> tuple[Tensor, Tensor]:
    """`logit_sharpness` where boxes are small, [..., E], and where they are, alike; the same bits.

    A box is small where no logit and target move apart by more than 1/2; the values elsewhere mean nothing. For code that
    can't branch on the values, as in a CUDA graph: all epsilons cost one pass.
    """
    check_logits(logits, targets)
    return _by_moments(_stand(logits, targets, centred), _epsilons(epsilons))


class _Stand(NamedTuple):
    """Where a token stands: what all epsilons share. Names as in the module's formula."""

    u: Tensor  # [..., V], the other logits below the largest of them; -inf at the target
    u_sum: Tensor  # [...], sum of e^u
    m: Tensor  # [...], log-odds against the target
    loss: Tensor  # [...]
    width: Tensor  # [..., V], the box's half-width at epsilon 1
    width_t: Tensor  # [..., 1], the target's
    width_top: Tensor  # [..., 1], that of the largest other logit


def _stand(logits: Tensor, targets: Tensor, centred: bool) -> _Stand:
    z = logits if logits.dtype == torch.float64 else logits.float()
    target = targets.long().unsqueeze(-1)
    is_target = torch.arange(z.shape[-1], device=z.device) == target
    z_t = z.gather(-1, target)
    # Differences of logits don't depend on where zero is, the box does.
    others = z.masked_fill(is_target, -math.inf)
    largest = others.amax(-1, keepdim=True)
    u = others - largest
    u_sum = u.exp().sum(-1)
    m = (largest - z_t).squeeze(-1) + u_sum.log()
    zero: Tensor | float = z.mean(-1, keepdim=True) if centred else 0.0
    return _Stand(
        u,
        u_sum,
        m,
        _softplus(m),
        half_width(z - zero, 1.0),
        half_width(z_t - zero, 1.0),
        half_width(largest - zero, 1.0),
    )


def _by_moments(at: _Stand, epsilons: list[float]) -> tuple[Tensor, Tensor]:
    """Sharpness [..., E] for small boxes, and where they are small, alike: from moments over q, which serve all epsilons.

    With c_i = epsilon a_i,   sum_i q_i expm1(c_i) = sum_k epsilon^k / k! sum_i q_i a_i^k:   positive terms, those left out below
    half an ulp for c <= 1/2. The moments are of a over its largest, so that no power overflows.
    """
    a = at.width + at.width_t
    widest = a.amax(-1)
    share = a * (1 / widest).unsqueeze(-1)
    terms = 14 if a.dtype == torch.float64 else 8
    weight, moments = at.u.exp(), []
    for _ in range(terms):
        weight = weight * share
        moments.append(weight.sum(-1))
    before = torch.sigmoid(at.m) / at.u_sum

    def percent(eps: float) -> Tensor:
        c = eps * widest
        total = moments[-1] / math.factorial(terms)
        for k in range(terms - 1, 0, -1):
            total = total * c + moments[k - 1] / math.factorial(k)
        return 100 * (torch.log1p(before * (total * c)) / (1 + at.loss))

    widths = torch.stack([eps * widest for eps in epsilons], -1)
    small = ~(widths > SMALL) | ~widths.isfinite()  # a logit that is not finite gives NaN either way
    return torch.stack([percent(eps) for eps in epsilons], -1), small


def _by_sums(at: _Stand, epsilons: list[float]) -> Tensor:
    """Sharpness for boxes of any size, a sum of exponentials for every epsilon."""

    def percent(eps: float) -> Tensor:
        c = eps * at.width + eps * at.width_t
        top = eps * at.width_top + eps * at.width_t if eps <= 1 else None
        return 100 * (_rise(at.u, at.u_sum, at.m, c, top) / (1 + at.loss))

    return torch.stack([percent(eps) for eps in epsilons], -1)


def _rise(u: Tensor, u_sum: Tensor, m: Tensor, c: Tensor, top: Tensor | None) -> Tensor:
    """log1p(S), S = sigmoid(m) sum_i e^(u_i) expm1(c_i) / u_sum, for u <= 0 with maximum 0 and c >= 0, [..., V] -> [...].

    top [..., 1] is the largest u_i + c_i, or None where it has to be looked for. For epsilon <= 1 it is at the largest logit:
    z + epsilon |z| does not fall with z.
    """
    w = u + c
    if top is None:
        top = w.amax(-1, keepdim=True)
    # S = sigmoid(m) e^top scaled
    scaled = -((w - top).exp() * torch.expm1(-c)).sum(-1) / u_sum
    top = top.squeeze(-1)
    # e^top is at most e^64 here, far from overflow and exact to a few ulp; above it S is so large that its logarithm
    # serves as well.
    direct = torch.log1p(torch.sigmoid(m) * top.clamp(max=64).exp() * scaled)
    logarithmic = _softplus(top + scaled.log() - _softplus(-m))
    return torch.where(top <= 64, direct, logarithmic)


def _softplus(x: Tensor) -> Tensor:
    """log(1 + e^x) to full precision on both sides; torch's own returns x from 20 on, which FP64 can tell apart."""
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))


def _epsilons(epsilon: float | Sequence[float]) -> list[float]:
    epsilons = [float(e) for e in epsilon] if isinstance(epsilon, Sequence) else [float(epsilon)]
    if not epsilons:
        raise ValueError("epsilon must be a positive number or a sequence of at least one, got none; 5e-4 is Keskar's")
    for value in epsilons:
        if not 0 < value < math.inf:
            raise ValueError(f"epsilon must be positive and finite, got {value}; Keskar's are 1e-3 and 5e-4")
    return epsilons


def check_logits(logits: Tensor, targets: Tensor) -> None:
    """ValueError unless logits are [..., V] of a floating dtype, V >= 2, and targets [...] integers."""
    if not logits.is_floating_point():
        raise ValueError(f"logits must be of a floating dtype, got {logits.dtype}; convert them with .float()")
    if logits.ndim < 1 or logits.shape[-1] < 2:
        raise ValueError(
            f"logits must be [..., V] with V >= 2, got shape {tuple(logits.shape)}; with one class the loss is always 0"
        )
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"targets must be class indices of an integer dtype, got {targets.dtype}; use .long()")
    if targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"targets must have the shape of logits without V, {tuple(logits.shape[:-1])}, got {tuple(targets.shape)}; "
            "one target a row of logits"
        )
