"""Random Hadamard transforms: blocks of an operand rotated before they are rounded, so that no element stands out.

    x' = x diag(s) H / sqrt(n)      blocks of n along the contracted axis, s random signs, H the Hadamard matrix of +-1

Both operands of a product are rotated alike. H H^T / n = 1 and s_i^2 = 1, so that their product stays what it was, while an
outlier is spread over its block (Ashkboos et al. 2404.00456; in training Tseng et al. 2502.20586, NVIDIA 2509.25149).

H x is formed by log2 n stages of sums and differences in FP32, in one order, so that every device gives the same bits.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from formats.random_bits import random_bits


def random_signs(seeds_R: Tensor, size: int) -> Tensor:
    """Signs [R, size], 1 or -1 in FP32, from a seed a run, int64 [R]."""
    return 1.0 - 2.0 * random_bits(seeds_R, (seeds_R.shape[0], size), 1).to(torch.float32)


def rotate(x: Tensor, axis: int, signs: Tensor) -> Tensor:
    """Blocks along an axis (-1 or -2) of x [R, .., M, K] rotated, FP32; the axis padded with zeros to whole blocks.

    signs: [R, n], n a power of two.
    """
    R, n = signs.shape
    x = x.to(torch.float32)
    if short := -x.shape[axis] % n:
        x = F.pad(x, (0, short) if axis == -1 else (0, 0, 0, short))
    shape = x.shape
    # The block's own axis in the middle, what lies inside it behind: [.., n, inner].
    inner = 1 if axis == -1 else shape[-1]
    blocks = x.reshape(R, -1, n, inner) * signs[:, None, :, None]
    blocks = _transform(blocks, inner)
    return blocks.reshape(shape)


def rotate_back(x: Tensor, axis: int, signs: Tensor, length: int) -> Tensor:
    """What was rotated, of `length` along the axis: H is its own inverse, and so is a sign."""
    R, n = signs.shape
    shape = x.shape
    inner = 1 if axis == -1 else shape[-1]
    blocks = _transform(x.to(torch.float32).reshape(R, -1, n, inner), inner) * signs[:, None, :, None]
    return blocks.reshape(shape).narrow(axis, 0, length)


def _transform(blocks: Tensor, inner: int) -> Tensor:
    """H / sqrt(n) along the third axis of [R, blocks, n, inner]."""
    R, _, n, _ = blocks.shape
    step = 1
    while step < n:
        pairs = blocks.reshape(R, -1, n // (2 * step), 2, step * inner)
        low, high = pairs.unbind(3)
        blocks = torch.stack([low + high, low - high], 3)
        step *= 2
    return blocks.reshape(R, -1, n, inner) * (1.0 / math.sqrt(n))
