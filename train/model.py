"""A GPT-2 style decoder for a pack of R independent runs: every tensor carries the run axis first.

Tokens and learned positions are embedded, pass L blocks of pre-norm attention and pre-norm GELU MLP, a last norm, and
meet the token embedding again as the LM head (Radford et al. 2019; no biases, as in later GPT recipes). Parameters are
a dict of [R, ...] tensors, so one linear layer of all runs is one batched product, and attention folds R into its
batch. A run alone is a pack of one: there is no other model.

Dimension letters: R runs, N sequences a run, T tokens a sequence, S = N·T tokens, D width, H heads, F features, V vocabulary.
Between products everything is FP32: norms, residuals, GELU and the loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from train.layers import NORM_EPS
from train.linear import Precision, linear

Attention = Literal["fused", "math"]
Parameters = Mapping[str, Tensor]

INITIAL_STD = 0.02


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model; `width` must be a multiple of `heads`."""

    layers: int
    heads: int
    width: int
    context: int
    vocabulary: int

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Each parameter's shape without the run axis, in a fixed order; linear weights are [inputs, outputs]."""
        D = self.width
        shapes: dict[str, tuple[int, ...]] = {"wte": (self.vocabulary, D), "wpe": (self.context, D)}
        for i in range(self.layers):
            shapes |= {
                f"h.{i}.ln_1": (D,),
                f"h.{i}.attn.qkv": (D, 3 * D),
                f"h.{i}.attn.proj": (D, D),
                f"h.{i}.ln_2": (D,),
                f"h.{i}.mlp.fc": (D, 4 * D),
                f"h.{i}.mlp.proj": (4 * D, D),
            }
        return shapes | {"ln_f": (D,)}

    @property
    def size(self) -> int:
        """Parameters of one run, counted; the tied LM head once."""
        return sum(math.prod(shape) for shape in self.parameters().values())

    def initial_std(self, name: str) -> float | None:
        """Standard deviation of a parameter's initial normal weights; None for a norm's gain, which starts at one.

        Projections back into the residual stream are smaller by sqrt(2 L), so that its variance does not grow with depth.
        """
        if "ln_" in name:
            return None
        return INITIAL_STD / math.sqrt(2 * self.layers) if name.endswith(".proj") else INITIAL_STD

    def rate_factor(self, name: str) -> float:  # noqa: ARG002
        """The parameter's learning rate in units of the run's; one for all parameters."""
        return 1.0

    def kinds(self, name: str) -> frozenset[str]:
        """Which of the words "gains", "embeddings" and "head" name the parameter; none do for a block's linear weight.

        A tied LM head is the token embedding, so either word names it.
        """
        if len(self.parameters()[name]) == 1:
            return frozenset({"gains"})
        return {"wte": frozenset({"embeddings", "head"}), "wpe": frozenset({"embeddings"})}.get(name, frozenset())

    def matrices(self, name: str) -> tuple[int, ...]:
        """The outputs of each matrix that lies in a linear weight [inputs, outputs], side by side: queries, keys, values."""
        outputs = self.parameters()[name][-1]
        return (outputs // 3,) * 3 if name.endswith(".qkv") else (outputs,)


def is_matrix(name: str) -> bool:
    """Whether a parameter is a linear layer's weight, and not an embedding or a gain."""
    return name.startswith("h.") and "ln_" not in name


class Numerics(NamedTuple):
    """How a pack computes: the precision of the blocks' linears and of the LM head, the form of attention in `forward`, and
    whether training takes the hand-written passes of `kernels`.
    """

    body: Precision
    lm_head: Precision
    attention: Attention = "fused"
    kernels: bool = False


def _norm(x_RSD: Tensor, gain_RD: Tensor) -> Tensor:
    return F.layer_norm(x_RSD, x_RSD.shape[-1:], eps=NORM_EPS) * gain_RD[:, None, :]


def _attend(q: Tensor, k: Tensor, v: Tensor, form: Attention) -> Tensor:
    """Causal attention, [B, H, T, D/H] each; "math" writes the products out, which can be differentiated twice."""
    if form == "fused":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    T = q.shape[-2]
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1) @ v


def _attention(x_RSD: Tensor, p: Parameters, prefix: str, heads: int, T: int, numerics: Numerics) -> Tensor:
    R, S, D = x_RSD.shape
    qkv = linear(x_RSD, p[f"{prefix}.qkv"], numerics.body).to(numerics.body.carrier)
    q, k, v = (t.transpose(1, 2) for t in qkv.view(R * S // T, T, 3, heads, D // heads).unbind(2))
    y = _attend(q, k, v, numerics.attention)
    y_RSD = y.transpose(1, 2).reshape(R, S, D).to(x_RSD.dtype)
    return linear(y_RSD, p[f"{prefix}.proj"], numerics.body)


def _mlp(x_RSD: Tensor, p: Parameters, prefix: str, numerics: Numerics) -> Tensor:
    return linear(F.gelu(linear(x_RSD, p[f"{prefix}.fc"], numerics.body)), p[f"{prefix}.proj"], numerics.body)


def forward(p: Parameters, tokens_RNT: Tensor, shape: ModelShape, numerics: Numerics) -> Tensor:
    """Logits [R, S, V] of the next token at every position; tokens are integers in [0, V), [R, N, T] with T <= context."""
    R, N, T = tokens_RNT.shape
    D, V = shape.width, shape.vocabulary
    # All runs' embeddings are one table: run r's token t is its row r V + t.
    rows = tokens_RNT + V * torch.arange(R, device=tokens_RNT.device)[:, None, None]
    x_RNTD = F.embedding(rows, p["wte"].reshape(R * V, D)) + p["wpe"][:, None, :T, :]
    x_RSD = x_RNTD.view(R, N * T, D)
    for i in range(shape.layers):
        x_RSD = x_RSD + _attention(_norm(x_RSD, p[f"h.{i}.ln_1"]), p, f"h.{i}.attn", shape.heads, T, numerics)
        x_RSD = x_RSD + _mlp(_norm(x_RSD, p[f"h.{i}.ln_2"]), p, f"h.{i}.mlp", numerics)
    return linear(_norm(x_RSD, p["ln_f"]), p["wte"].transpose(1, 2), numerics.lm_head)


def cross_entropy(logits_RSV: Tensor, targets_RS: Tensor) -> Tensor:
    """Mean negative log likelihood of each run in nats per token, [R].

    The target's logit is picked by comparison, not by a gather, whose gradient would be a scatter: this form stays one fused,
    deterministic pass in both directions.
    """
    is_target = targets_RS[..., None] == torch.arange(logits_RSV.shape[-1], device=logits_RSV.device)
    target_RS = torch.where(is_target, logits_RSV, 0.0).sum(-1)
    return (logits_RSV.logsumexp(-1) - target_RS).mean(-1)
