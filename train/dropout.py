"""Dropout (Srivastava et al. 2014) by each run's own random bits, where GPT-2 and nanoGPT have it.

    y = x m / (1 - p)         m = 1 with probability 1 - p, else 0

after the embeddings, on attention's weights, and on what attention and MLP add to the stream. The mask is a function of the run's
seeds, the step, the block, the place and the element (see `rounding_seeds`), so that a run's numbers depend neither on its slot
nor on its neighbours. Attention is written out then: no fused kernel takes a mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from formats.random_bits import random_bits

BITS = 24
STRIDE = 0xD1342543DE82EF95
EMBEDDING, WEIGHTS, ATTENTION, MLP = range(1, 5)  # places, by which a block's masks differ


def dropped(x: Tensor, seed_R: Tensor | None, rate: float, place: int) -> Tensor:
    """A share `rate` of the elements of x [R, ...] made 0 and the others larger; x itself without seeds, int64 [R].

    Its derivative is the same mask, so `dropped` of a gradient is the gradient.
    """
    if seed_R is None:
        return x
    offset = place * STRIDE % 2**64
    bits = random_bits(seed_R + (offset - 2**64 if offset >= 2**63 else offset), x.shape, BITS)
    return torch.where(bits >= round(rate * 2**BITS), x * (1.0 / (1.0 - rate)), torch.zeros_like(x))
