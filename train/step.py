"""One training step of a pack, in the few pieces that are compiled and then strung together.

    start ─ attention_half ─ mlp_half ─ ... ─ finish ─ head ┄ backward through all of them ┄ update, a group at a time

Each piece is compiled once, whatever the number of layers, and a layer is a call. The stream x passes from piece to piece
beside the last product's result, which the next piece adds, since it reads both anyway. Weights come as *operands*, on their
grid and in the carrier: they are rounded when they are updated, once a step, and gradients arrive in the carrier too.

The head is `head`'s, a chunk of logits at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from train.dropout import ATTENTION, EMBEDDING, MLP, dropped
from train.elsewhere import rounded
from train.head import head, head_loss, head_sharpness, head_sharpness_of_any
from train.layers import add_norm, attend, last_norm
from train.linear import operand, receive, round_gradient
from train.loss_scale import advance_scale
from train.model import (
    FC,
    MLP_PROJECTION,
    PROJECTION,
    QKV,
    BlockPrecision,
    ModelShape,
    Numerics,
    activate,
    rotation,
    split_heads,
    written_attention,
)
from train.optim import AdamW, Factors, Parts, Rule, factors, squares, update
from train.precision import Precision, WeightOperand
from train.recipe import Elsewhere
from train.shared_products import SharedWeight, product
from train.signals import OF_UPDATE
from train.state import Chance, Kept, StateFormats
from train.weights import as_operand, head_operand, parts_of

Weight = Tensor | WeightOperand | SharedWeight
NOWHERE = Elsewhere()
OF_HEAD = -1  # the LM head's matrix, among the sites of `update_group`
BLOCK_MATRICES = (("attn.qkv", "attn.proj"), ("mlp.fc", "mlp.proj"))


def batch(text: Tensor, offsets_RN: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """Tokens [R, N·T] and their successors, alike, from where each sequence starts; int64."""
    positions = offsets_RN[..., None] + torch.arange(T + 1, device=text.device)
    window = text[positions].to(torch.int64)
    return window[..., :-1].flatten(1), window[..., 1:].flatten(1)


def start(
    wte: Tensor, wpe: Tensor | None, tokens_RS: Tensor, elsewhere: Elsewhere = NOWHERE, drop: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """Token embeddings, and those of positions where they are learned, [R, S, D]; carries no gradient."""
    R, V, D = wte.shape
    wte, wpe = rounded(wte, elsewhere.embedding), None if wpe is None else rounded(wpe, elsewhere.embedding)
    # All runs' embeddings are one table: run r's token t is its row r V + t.
    rows = tokens_RS + V * torch.arange(R, device=tokens_RS.device)[:, None]
    x_RSD = wte.reshape(R * V, D)[rows]
    x_RSD = x_RSD if wpe is None else (x_RSD.view(R, -1, wpe.shape[1], D) + wpe[:, None]).view(R, -1, D)
    return dropped(rounded(x_RSD, elsewhere.residual), drop, dropout, EMBEDDING)


def attention_half(
    x: Tensor, delta: Tensor | None, ln: Tensor, qkv: Weight, proj: Weight, shape: ModelShape,
    numerics: Numerics, block: BlockPrecision, behind: Precision, scales: Sequence[Tensor | None] = (None, None),
    ln_q: Tensor | None = None, ln_k: Tensor | None = None, turn: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The stream with delta added, and what attention adds next, in the carrier.

    numerics: with what is the same in all blocks. behind: the precision of the product that left delta. scales: delayed ones
    [R, 3] of both linears.
    """
    here, elsewhere, (R, S, D), T = block.attention, numerics.elsewhere, x.shape, shape.context
    x, a = add_norm(
        x, delta, rounded(ln, elsewhere.gains), here, behind, numerics.kernels, shape.norm, elsewhere.residual
    )
    y = product(a, qkv, here._replace(scales=scales[0]), QKV)
    if ln_q is None and turn is None and y.shape[-1] == 3 * D:  # attention reads what the product left
        packed = round_gradient(y, here)
    else:
        heads = split_heads(receive(y, here), ln_q, ln_k, turn, shape, T)
        packed = torch.stack([part.to(here.carrier) for part in heads], -3)
    packed = packed.view(R * S // T, T, 3, shape.heads, shape.head_size)
    if numerics.attention == "fused":
        y = attend(packed, numerics.kernels, shape.attention_scale).reshape(R, S, D)
    else:
        q, k, v = packed.view(R, -1, *packed.shape[1:]).transpose(2, 4).flatten(1, 2).unbind(2)
        y = written_attention(
            q, k, v, shape.attention_scale, block.products, elsewhere.softmax, block.drop, shape.dropout
        )
        y = y.view(R, -1, shape.heads, T, shape.head_size).transpose(2, 3).reshape(R, S, D)
    y = product(operand(y, here, "activation"), proj, here._replace(scales=scales[1]), PROJECTION)
    return x, y if block.drop is None else dropped(receive(y, here), block.drop, shape.dropout, ATTENTION)


def mlp_half(
    x: Tensor, delta: Tensor, ln: Tensor, fc: Weight, proj: Weight, shape: ModelShape,
    numerics: Numerics, block: BlockPrecision, behind: Precision, scales: Sequence[Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The stream with delta added, and what the MLP adds next, in the carrier."""
    here, elsewhere = block.mlp, numerics.elsewhere
    x, a = add_norm(
        x, delta, rounded(ln, elsewhere.gains), here, behind, numerics.kernels, shape.norm, elsewhere.residual
    )
    h = activate(receive(product(a, fc, here._replace(scales=scales[0]), FC), here), shape)
    h = operand(rounded(h, elsewhere.gelu), here, "activation")
    y = product(h, proj, here._replace(scales=scales[1]), MLP_PROJECTION)
    return x, y if block.drop is None else dropped(receive(y, here), block.drop, shape.dropout, MLP)


def finish(x: Tensor, delta: Tensor, ln: Tensor, shape: ModelShape, numerics: Numerics, behind: Precision) -> Tensor:
    """The LM head's operand, [R, S, D]."""
    elsewhere = numerics.elsewhere
    gain = rounded(ln, elsewhere.gains)
    return last_norm(x, delta, gain, numerics.lm_head, behind, numerics.kernels, shape.norm, elsewhere.residual)


def position_gradient(dx: Tensor, T: int) -> Tensor:
    """The gradient [R, T, D] of the position embeddings, from that of the embedded tokens [R, S, D]."""
    R, _, D = dx.shape
    # Term by term: compiled as a reduction over so few it takes several times as long.
    first, *others = dx.view(R, -1, T, D).unbind(1)
    for term in others:
        first = first + term
    return first


def update_group(
    parameters: Sequence[Tensor], grads: Sequence[Parts], kept: Sequence[Kept], f: Factors, config: AdamW, rules: Sequence[Rule],
    formats: StateFormats, chance: Chance | None, operands: Sequence[Tensor | WeightOperand | None],
    of_operand: Sequence[Precision], sites: Sequence[int],
) -> None:  # fmt: skip
    """The optimiser's step on some parameters, and their operands for the next step, all in place."""
    update(parameters, grads, kept, f, config, rules, formats, chance)
    for p, o, precision, site in zip(parameters, operands, of_operand, sites, strict=True):
        if o is not None:
            new = head_operand(p, precision) if site == OF_HEAD else as_operand(p, precision, site)
            for old, value in zip(parts_of(o), parts_of(new), strict=True):
                old.copy_(value)


def record(
    losses_R: Tensor, norm_R: Tensor, squares_GR: Sequence[Tensor], train_loss: Tensor, grad_norm: Tensor,
    grad_norm_block: Tensor, counter: Tensor,
) -> None:  # fmt: skip
    """One step's row of the histories [steps, R], and [steps, R, groups] of the squares' roots, the last group, what is outside
    the blocks, first; the counter moves on.
    """
    train_loss.index_copy_(0, counter, losses_R[None].to(train_loss.dtype))
    grad_norm.index_copy_(0, counter, norm_R[None].to(grad_norm.dtype))
    norms_RG = torch.stack([squares_GR[-1], *squares_GR[:-1]], 1).sqrt()
    grad_norm_block.index_copy_(0, counter, norms_RG[None].to(grad_norm_block.dtype))
    counter.add_(1)


def behind_dropout(precision: Precision, block: BlockPrecision) -> Precision:
    """What a product's result meets on its way back: behind dropout the gradient is rounded once more, not yet here."""
    return precision if block.drop is None else precision.unrounded


class Pieces:
    """The pieces of this module and of `optim`, each compiled or as it is; `compiler` is `compiling.compiler()`, or None."""

    def __init__(self, compiler: Callable[[Any], Any] | None = None) -> None:
        wrap = compiler or (lambda piece: piece)
        self.batch, self.start = wrap(batch), wrap(start)
        self.attention_half, self.mlp_half, self.finish = wrap(attention_half), wrap(mlp_half), wrap(finish)
        self.head, self.head_loss = wrap(head), wrap(head_loss)
        self.head_sharpness, self.head_sharpness_of_any = wrap(head_sharpness), wrap(head_sharpness_of_any)
        self.position_gradient, self.update_group = wrap(position_gradient), wrap(update_group)
        self.squares, self.factors, self.record = wrap(squares), wrap(factors), wrap(record)
        self.advance_scale = wrap(advance_scale)
        self.update_signals = {name: wrap(signal.of) for name, signal in OF_UPDATE.items()}

    def hidden(
        self, x: Tensor, gains: Mapping[str, Tensor], operands: Mapping[str, Weight], shape: ModelShape,
        numerics: Numerics, scales: Mapping[str, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """The LM head's operand [R, S, D], from the embedded tokens x [R, S, D]; differentiable once.

        scales: delayed ones, by the name of their matrix.
        """
        delta: Tensor | None = None
        turn = rotation(shape.context, shape, x)
        shared, scales = numerics._replace(blocks=(), drop=None), scales or {}
        behind = numerics.block(0).mlp
        for i in range(shape.layers):
            h, block = f"h.{i}.", numerics.block(i)
            of = [[operands[h + name] for name in names] for names in BLOCK_MATRICES]
            delayed = [[scales.get(h + name) for name in names] for names in BLOCK_MATRICES]
            x, delta = self.attention_half(
                x, delta, gains[h + "ln_1"], *of[0], shape, shared, block, behind, delayed[0],
                gains.get(h + "attn.ln_q"), gains.get(h + "attn.ln_k"), turn,
            )  # fmt: skip
            x, delta = self.mlp_half(
                x,
                delta,
                gains[h + "ln_2"],
                *of[1],
                shape,
                shared,
                block,
                behind_dropout(block.attention, block),
                delayed[1],
            )
            behind = behind_dropout(block.mlp, block)
        hidden: Tensor = self.finish(x, delta, gains["ln_f"], shape, shared, behind)
        return hidden
