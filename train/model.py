"""A decoder for a pack of R independent runs, GPT-2 style or Llama style: every tensor carries the run axis first.

Tokens are embedded, pass L blocks of pre-norm attention and pre-norm MLP, a last norm, and meet the LM head. What GPT-2 (Radford
et al. 2019; no biases, as in later GPT recipes) and Llama (Touvron et al. 2023) do differently are options, each by itself:

    norm        layernorm (x - mean) / std                  rmsnorm x / rms(x), which keeps the mean
    mlp         gelu: gelu(x W) W'                          swiglu: (silu(x W_gate) * x W_up) W'
    positions   learned: a vector added to each token       rope: queries and keys turned by angles that grow with the position
    LM head     tied: the token embedding again             a matrix of its own
    kv_heads    as many as heads                            fewer, each shared by a group of queries (GQA)

and so are those that keep training stable: qk_norm, z_loss, logit_softcap, init_std and muP. Parameters are a dict of [R, ...]
tensors, so one linear layer of all runs is one batched product, and attention folds R into its batch. A run alone is a pack of
one: there is no other model.

Dimension letters: R runs, N sequences a run, T tokens a sequence, S = N·T tokens, D width, H heads, K key and value heads, d
features of a head (D/H), F features, V vocabulary. Between products everything is FP32: norms, rotations, residuals, the MLP's
activation and the loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from train.dropout import ATTENTION, EMBEDDING, MLP, WEIGHTS, dropped
from train.elsewhere import rounded
from train.layers import NORM_EPS, Norm, Readout
from train.linear import operand, product, receive
from train.precision import Precision
from train.products import HEAD_SITE
from train.recipe import Elsewhere
from train.seen import LM_HEAD, Layers

Attention = Literal["fused", "math"]
Parameters = Mapping[str, Tensor]


@dataclass(frozen=True)
class ModelShape:
    """The sizes and options of a model; `width` must be a multiple of `heads`, and `heads` one of `kv_heads`.

    kv_heads None is as many as heads, hidden None the MLP's own number of `features`, and the rest as `settings` tells.

    With `mup_base_width` B the model is parametrised by muP for Adam (Yang et al. 2203.03466, table 8), m = D / B: matrices of
    the blocks start smaller by sqrt(m) and learn at 1/m of the rate, logits are divided by m, and attention's scale falls as 1/d
    from 1/sqrt(d) at the base model's heads. Embeddings and LM head start and learn as in the standard model: in this variant the
    head's factor is on the logits, so that tied and untied heads are parametrised alike. At D = B nothing is changed.
    """

    layers: int
    heads: int
    width: int
    context: int
    vocabulary: int
    norm: Norm = "layernorm"
    mlp: Literal["gelu", "swiglu"] = "gelu"
    positions: Literal["learned", "rope"] = "learned"
    tied: bool = True
    kv_heads: int | None = None
    hidden: int | None = None
    rope_base: float = 10_000.0
    qk_norm: bool = False
    z_loss: float = 0.0
    dropout: float = 0.0
    logit_softcap: float | None = None
    init_std: float = 0.02
    mup_base_width: int | None = None
    mup_base_heads: int | None = None

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Each parameter's shape without the run axis, in a fixed order; linear weights are [inputs, outputs]."""
        D, features = self.width, self.features
        shapes: dict[str, tuple[int, ...]] = {"wte": (self.vocabulary, D)}
        if self.positions == "learned":
            shapes["wpe"] = (self.context, D)
        for i in range(self.layers):
            shapes |= {f"h.{i}.ln_1": (D,), f"h.{i}.attn.qkv": (D, sum(self.attention_features))}
            if self.qk_norm:
                shapes |= {f"h.{i}.attn.ln_q": (self.head_size,), f"h.{i}.attn.ln_k": (self.head_size,)}
            shapes |= {
                f"h.{i}.attn.proj": (D, D),
                f"h.{i}.ln_2": (D,),
                f"h.{i}.mlp.fc": (D, 2 * features if self.mlp == "swiglu" else features),  # gate and up are one product
                f"h.{i}.mlp.proj": (features, D),
            }
        return shapes | {"ln_f": (D,)} | ({} if self.tied else {"lm_head": (self.vocabulary, D)})

    @property
    def size(self) -> int:
        """Parameters of one run, counted; a tied LM head once."""
        return sum(math.prod(shape) for shape in self.parameters().values())

    @property
    def head(self) -> str:
        """The parameter that is the LM head's matrix, [V, D]."""
        return "wte" if self.tied else "lm_head"

    @property
    def head_size(self) -> int:
        """Features of a head, d."""
        return self.width // self.heads

    @property
    def attention_features(self) -> tuple[int, int, int]:
        """Features of all queries, keys and values, in this order in the product that makes them."""
        kv = (self.kv_heads or self.heads) * self.head_size
        return self.width, kv, kv

    @property
    def features(self) -> int:
        """Features of the MLP, F: `hidden`, or 4 D for GELU; for SwiGLU, which has three matrices in place of two, 8/3 D, up to a
        multiple of 64, or of 16 where the width is below 256.
        """
        if self.hidden is not None:
            return self.hidden
        if self.mlp == "gelu":
            return 4 * self.width
        multiple = 64 if self.width >= 256 else 16
        return -(-8 * self.width // (3 * multiple)) * multiple

    @property
    def mup_ratio(self) -> float:
        """How much wider than muP's base model this one is, m; 1 without muP."""
        return 1.0 if self.mup_base_width is None else self.width / self.mup_base_width

    @property
    def attention_scale(self) -> float:
        """What scores are multiplied by: 1/sqrt(d); with muP sqrt(d_base) / d."""
        d = self.head_size
        base = d if self.mup_base_width is None else self.mup_base_width / (self.mup_base_heads or self.heads)
        return math.sqrt(base / d) / math.sqrt(d)

    @property
    def readout(self) -> Readout:
        """What lies between the LM head's product and the loss."""
        return Readout(1.0 / self.mup_ratio, self.logit_softcap, self.z_loss)

    def initial_std(self, name: str) -> float | None:
        """Standard deviation of a parameter's initial normal weights; None for a norm's gain, which starts at one.

        Projections back into the residual stream are smaller by sqrt(2 L), so that its variance does not grow with depth.
        """
        if "ln_" in name:
            return None
        std = self.init_std / math.sqrt(2 * self.layers) if name.endswith(".proj") else self.init_std
        return std / math.sqrt(self.mup_ratio) if is_matrix(name) else std

    def rate_factor(self, name: str) -> float:
        """The share of the run's learning rate at which a parameter learns; weight decay goes by the whole."""
        return 1.0 / self.mup_ratio if is_matrix(name) else 1.0

    def kinds(self, name: str) -> frozenset[str]:
        """Which of the words "gains", "embeddings" and "head" name the parameter; none do for a block's linear weight.

        A tied LM head is the token embedding, so either word names it.
        """
        if len(self.parameters()[name]) == 1:
            return frozenset({"gains"})
        embeddings = {"embeddings"} if name in ("wte", "wpe") else set()
        return frozenset(embeddings | ({"head"} if name == self.head else set()))

    def matrices(self, name: str) -> tuple[int, ...]:
        """The outputs of each matrix in a linear weight [inputs, outputs], side by side: queries, keys, values; gate and up."""
        outputs = self.parameters()[name][-1]
        if name.endswith(".qkv"):
            return tuple(self.attention_features)
        return (outputs // 2,) * 2 if name.endswith(".fc") and self.mlp == "swiglu" else (outputs,)


def is_matrix(name: str) -> bool:
    """Whether a parameter is the weight of a linear layer in a block, and not an embedding, the LM head or a gain."""
    return name.startswith("h.") and "ln_" not in name


class BlockPrecision(NamedTuple):
    """One block: its attention's linears, its MLP's, and QKᵀ and PV where these are rounded too."""

    attention: Precision
    mlp: Precision
    products: Precision | None = None
    drop: Tensor | None = None  # seeds of the block's dropout, int64 [R], where there is any


# The products of a block, by which its stochastic operands draw different random bits.
QKV, PROJECTION, SCORES, VALUES, FC, MLP_PROJECTION = range(6)


class Numerics(NamedTuple):
    """How a pack computes: the precision of the blocks' linears and of the LM head, the form of attention, whether training takes
    the hand-written passes of `kernels`, each block's precision where they differ, and what is rounded outside the products.
    """

    body: Precision
    lm_head: Precision
    attention: Attention = "fused"
    kernels: bool = False
    blocks: tuple[BlockPrecision, ...] = ()
    elsewhere: Elsewhere = Elsewhere()
    drop: Tensor | None = None  # seeds of the embeddings' dropout

    def block(self, index: int) -> BlockPrecision:
        """How block `index` computes."""
        return self.blocks[index] if self.blocks else BlockPrecision(self.body, self.body)


def rms_normal(x: Tensor) -> Tensor:
    """X over its root mean square, along the last axis (Zhang & Sennrich 2019)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + NORM_EPS)


def _norm(x_RSD: Tensor, gain_RD: Tensor, norm: Norm, numerics: Numerics) -> Tensor:
    centred = norm == "layernorm"
    normal = F.layer_norm(x_RSD, x_RSD.shape[-1:], eps=NORM_EPS) if centred else rms_normal(x_RSD)
    return normal * rounded(gain_RD, numerics.elsewhere.gains)[:, None, :]


def rotation(T: int, shape: ModelShape, like: Tensor) -> Tensor | None:
    """Cosines and sines of RoPE's angles t base^(-2i/d), [2, T, 1, d/2], in the dtype of `like`; None for learned positions.

    The angles are formed in FP64: in FP32 they would be off by up to T 2^-24, position by position.
    """
    if shape.positions == "learned":
        return None
    exponent = torch.arange(0, shape.head_size, 2, dtype=torch.float64, device=like.device) / shape.head_size
    t = torch.arange(T, dtype=torch.float64, device=like.device)
    angle = t[:, None, None] * shape.rope_base**-exponent
    return torch.stack([angle.cos(), angle.sin()]).to(like.dtype)


def rotate(x_RNTHd: Tensor, turn: Tensor) -> Tensor:
    """RoPE (Su et al. 2104.09864) in the half-split form of GPT-NeoX and Llama: features i and i + d/2 are a pair, turned by
    angle i of their position.
    """
    first, second = x_RNTHd.chunk(2, -1)
    cos, sin = turn
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def split_heads(
    qkv_RSF: Tensor, gain_q: Tensor | None, gain_k: Tensor | None, turn: Tensor | None, shape: ModelShape, T: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as attention takes them, [R, N, T, H, d] each, from their product [R, S, (H + 2 K) d].

    Normalised first, with gains [R, d], then turned, as in OLMo 2 and Qwen 3. Query h meets key and value h // (H / K).
    """
    R, S, _ = qkv_RSF.shape
    parts = qkv_RSF.split(shape.attention_features, -1)
    q, k, v = (part.reshape(R, S // T, T, -1, shape.head_size) for part in parts)
    if gain_q is not None and gain_k is not None:
        q, k = (rms_normal(x) * gain[:, None, None, None] for x, gain in ((q, gain_q), (k, gain_k)))
    if turn is not None:
        q, k = rotate(q, turn), rotate(k, turn)
    if k.shape[3] < shape.heads:
        k, v = (x[..., None, :].expand(-1, -1, -1, -1, shape.heads // k.shape[3], -1).flatten(3, 4) for x in (k, v))
    return q, k, v


def written_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, products: Precision | None = None, softmax: str | None = None,
    drop: Tensor | None = None, dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """Causal attention of [R, B, T, d] each, its products written out, so that it can be differentiated twice.

    products: how QKᵀ and PV are rounded; None leaves them to the tensors' dtype. softmax: a format of the weights. drop: seeds,
    where so many of the weights are dropped.
    """
    T = q.shape[-2]
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    if products is None:
        scores = q @ k.mT * scale
        weights = scores.masked_fill(future, -math.inf).softmax(-1, torch.promote_types(q.dtype, torch.float32))
        return dropped(rounded(weights, softmax), drop, dropout, WEIGHTS).to(v.dtype) @ v
    scores = receive(product(q, k.mT, products, SCORES), products) * scale
    weights = dropped(rounded(scores.masked_fill(future, -math.inf).softmax(-1), softmax), drop, dropout, WEIGHTS)
    return product(operand(weights, products, "activation"), v, products, VALUES)


def _attention(
    x_RSD: Tensor, p: Parameters, h: str, shape: ModelShape, turn: Tensor | None, T: int, numerics: Numerics,
    block: BlockPrecision, layers: Layers,
) -> Tensor:  # fmt: skip
    here = block.attention
    qkv = layers(x_RSD, h + "attn.qkv", here, QKV)
    heads = split_heads(qkv, p.get(h + "attn.ln_q"), p.get(h + "attn.ln_k"), turn, shape, T)
    q, k, v = (x.to(here.carrier).transpose(2, 3) for x in heads)
    if layers.seen is not None:
        layers.seen.queries.append(q)
        layers.seen.keys.append(k)
    if numerics.attention == "fused":
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=shape.attention_scale).unflatten(
            0, (len(x_RSD), -1)
        )
    else:
        q, k, v = (x.flatten(1, 2) for x in (q, k, v))
        y = written_attention(
            q, k, v, shape.attention_scale, block.products, numerics.elsewhere.softmax, block.drop, shape.dropout
        )
        y = y.unflatten(1, (-1, shape.heads))
    y_RSD = y.transpose(2, 3).reshape(x_RSD.shape).to(x_RSD.dtype)
    return dropped(layers(y_RSD, h + "attn.proj", here, PROJECTION), block.drop, shape.dropout, ATTENTION)


def activate(y_RSF: Tensor, shape: ModelShape) -> Tensor:
    """What the MLP's first product becomes before the second: its GELU, or its second half gated by SiLU of the first."""
    if shape.mlp == "gelu":
        return F.gelu(y_RSF)
    gate, up = y_RSF.chunk(2, -1)
    return F.silu(gate) * up


def _mlp(x_RSD: Tensor, h: str, shape: ModelShape, numerics: Numerics, block: BlockPrecision, layers: Layers) -> Tensor:
    features = activate(layers(x_RSD, h + "mlp.fc", block.mlp, FC), shape)
    y_RSD = layers(rounded(features, numerics.elsewhere.gelu), h + "mlp.proj", block.mlp, MLP_PROJECTION)
    return dropped(y_RSD, block.drop, shape.dropout, MLP)


def forward(
    p: Parameters, tokens_RNT: Tensor, shape: ModelShape, numerics: Numerics, layers: Layers | None = None
) -> Tensor:
    """Logits [R, S, V] of the next token at every position; tokens are integers in [0, V), [R, N, T] with T <= context.

    layers: the linear ones, where they are not those of the master weights `p`, or somebody looks on (see `seen`).
    """
    layers = Layers(p, shape.head) if layers is None else layers
    x_RSD = hidden(p, tokens_RNT, shape, numerics, layers)
    return shape.readout.logits(layers(x_RSD, LM_HEAD, numerics.lm_head, HEAD_SITE))


def hidden(p: Parameters, tokens_RNT: Tensor, shape: ModelShape, numerics: Numerics, layers: Layers) -> Tensor:
    """What meets the LM head, [R, S, D], before it is rounded for that."""
    R, N, T = tokens_RNT.shape
    D, V = shape.width, shape.vocabulary
    # All runs' embeddings are one table: run r's token t is its row r V + t.
    elsewhere = numerics.elsewhere
    rows = tokens_RNT + V * torch.arange(R, device=tokens_RNT.device)[:, None, None]
    x_RNTD = F.embedding(rows, rounded(p["wte"], elsewhere.embedding).reshape(R * V, D))
    if shape.positions == "learned":
        x_RNTD = x_RNTD + rounded(p["wpe"], elsewhere.embedding)[:, None, :T, :]
    turn = rotation(T, shape, x_RNTD)
    x_RSD = dropped(rounded(x_RNTD.view(R, N * T, D), elsewhere.residual), numerics.drop, shape.dropout, EMBEDDING)
    for i in range(shape.layers):
        h, block = f"h.{i}.", numerics.block(i)
        a_RSD = _norm(x_RSD, p[h + "ln_1"], shape.norm, numerics)
        x_RSD = rounded(x_RSD + _attention(a_RSD, p, h, shape, turn, T, numerics, block, layers), elsewhere.residual)
        a_RSD = _norm(x_RSD, p[h + "ln_2"], shape.norm, numerics)
        x_RSD = rounded(x_RSD + _mlp(a_RSD, h, shape, numerics, block, layers), elsewhere.residual)
        if layers.seen is not None:
            layers.seen.streams.append(x_RSD)
    return _norm(x_RSD, p["ln_f"], shape.norm, numerics)


def cross_entropy(logits_RSV: Tensor, targets_RS: Tensor) -> Tensor:
    """Mean negative log likelihood of each run in nats per token, [R].

    The target's logit is picked by comparison, not by a gather, whose gradient would be a scatter: this form stays one fused,
    deterministic pass in both directions.
    """
    is_target = targets_RS[..., None] == torch.arange(logits_RSV.shape[-1], device=logits_RSV.device)
    target_RS = torch.where(is_target, logits_RSV, 0.0).sum(-1)
    return (logits_RSV.logsumexp(-1) - target_RS).mean(-1)


def objective(logits_RSV: Tensor, targets_RS: Tensor, shape: ModelShape) -> Tensor:
    """What training descends, [R]: the cross entropy, and the z-loss where there is one."""
    loss_R = cross_entropy(logits_RSV, targets_RS)
    return loss_R + shape.z_loss * logits_RSV.logsumexp(-1).square().mean(-1) if shape.z_loss else loss_R
