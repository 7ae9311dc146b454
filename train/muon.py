"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): momentum whose singular values are all brought near one.

For a weight W [inputs, outputs] of each run, with gradient g and momentum buffer m (Nesterov's form, as Jordan's code has it):

    m <- mu m + (1 - mu) g                  u = (1 - mu) g + mu m
    O = U V^T for u = U S V^T, nearly       by Newton and Schulz's iteration below, without an SVD
    W <- W (1 - lr wd) - lr sqrt(max(1, outputs / inputs)) O

The iteration X <- a X + (b A + c A^2) X, with A = X X^T, sends every singular value s to a s + b s^3 + c s^5 and leaves the
singular vectors alone. From X = u / |u| (Frobenius) five of them bring all but the smallest singular values into about
(0.7, 1.2): the coefficients are chosen for the slope at zero, and do not converge to one.

As in Jordan's code it runs in BF16 on a GPU; on a CPU, whose BF16 products are slow, in FP32, and for an FP64 run in FP64.
Matrices that lie side by side in one weight, as queries, keys and values do, are orthogonalised each for itself, which Jordan
found to work better than together.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

A, B, C = 3.4445, -4.7750, 2.0315
ITERATIONS = 5
NORM_EPS = 1e-7


def orthogonalize(u: Tensor) -> Tensor:
    """Each matrix of u [B, n, k] with its singular values near one; u's dtype."""
    wide = u.shape[1] <= u.shape[2]
    x: Tensor = u if wide else u.mT  # the smaller of both products with itself
    norm = x.square().flatten(1).sum(1).sqrt()
    x = (x / (norm + NORM_EPS)[:, None, None]).to(_working_dtype(u))
    for _ in range(ITERATIONS):
        gram = torch.bmm(x, x.mT)
        x = A * x + torch.bmm(B * gram + C * torch.bmm(gram, gram), x)
    result: Tensor = (x if wide else x.mT).to(u.dtype)
    return result


def muon_direction(u: Tensor, parts: tuple[int, ...]) -> Tensor:
    """What a step subtracts, for a rate of one, from weights [R, inputs, outputs]; `parts` are the outputs of each matrix."""
    inputs = u.shape[1]

    def scaled(x: Tensor, outputs: int) -> Tensor:
        return orthogonalize(x) * math.sqrt(max(1.0, outputs / inputs))

    if len(parts) == 1:
        return scaled(u, parts[0])
    if len(set(parts)) > 1:
        return torch.cat([scaled(x, x.shape[2]) for x in u.split(parts, 2)], 2)
    # Equal ones, and those of all runs, are one batch.
    R, K = u.shape[0], len(parts)
    each = u.view(R, inputs, K, parts[0]).transpose(1, 2).reshape(R * K, inputs, parts[0])
    return scaled(each, parts[0]).view(R, K, inputs, parts[0]).transpose(1, 2).reshape(u.shape)


def _working_dtype(u: Tensor) -> torch.dtype:
    return torch.bfloat16 if u.is_cuda and u.dtype == torch.float32 else u.dtype
