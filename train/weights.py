"""Weights as products take them: rounded once a step, when they are updated, in memory of their own.

A recipe that rounds each operand once has a tensor for a weight; one that rounds by rules a `WeightOperand`, what x W and dy
Wᵀ take. The LM head's lies as the embedding does, [R, V', D], with rows of zeros up to a size at which products are fast.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from train.linear import on_grid
from train.model import FC, MLP_PROJECTION, PROJECTION, QKV
from train.precision import Precision, WeightOperand
from train.products import HEAD_SITE, take_weight

ALIGNMENT = 64  # rows of the LM head's operand are padded to a multiple: products of odd sizes are several times slower


def padded_vocabulary(vocabulary: int) -> int:
    """Rows of the LM head's operand: the vocabulary, or the next multiple of 64 where it is none of 8."""
    return vocabulary if vocabulary % 8 == 0 else -(-vocabulary // ALIGNMENT) * ALIGNMENT


def as_operand(w: Tensor, precision: Precision, site: int = 0) -> Tensor | WeightOperand:
    """A master weight as its products take it: on its grid, in the carrier."""
    return take_weight(w, precision, site) if precision.plan is not None else on_grid(w, precision, "weight")


def head_operand(head_RVD: Tensor, precision: Precision) -> Tensor | WeightOperand:
    """The LM head's matrix, the token embedding where they are tied, as an operand, [R, V', D], padded with zeros."""
    V = head_RVD.shape[1]
    padded = F.pad(head_RVD, (0, 0, 0, padded_vocabulary(V) - V))
    if precision.plan is not None:
        return take_weight(padded, precision, HEAD_SITE, is_transposed=True)
    return on_grid(padded, precision, "weight")


def detached(operand: Tensor | WeightOperand) -> Tensor | WeightOperand:
    """The operand without what autograd knows of it."""
    return operand.detach() if isinstance(operand, Tensor) else operand.map(Tensor.detach)


def site_of(name: str) -> int:
    """By which number a matrix draws its random bits, from its name."""
    return {"qkv": QKV, "fc": FC}.get(name.rpartition(".")[2], PROJECTION if ".attn." in name else MLP_PROJECTION)


def parts_of(operand: Tensor | WeightOperand) -> list[Tensor]:
    """The tensors of an operand, the one first of which gradients are asked."""
    return [operand] if isinstance(operand, Tensor) else [t for t in operand if t is not None]


def own(operand: Tensor | WeightOperand) -> Tensor | WeightOperand:
    """The operand in memory of its own, so that it can be written to."""
    return operand.clone() if isinstance(operand, Tensor) else operand.map(Tensor.clone)


def weight_of_runs(w: Tensor | WeightOperand, r: slice) -> Tensor | WeightOperand:
    """The LM head's operand for some runs."""
    return w[r] if isinstance(w, Tensor) else w.map(lambda t: t[r])
