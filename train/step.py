"""One training step of a pack, in the few pieces that are compiled and then strung together.

    start ─ attention_half ─ mlp_half ─ ... ─ finish ─ head ┄ backward through all of them ┄ update, a group at a time

Each piece is compiled once, whatever the number of layers, and a layer is a call. The stream x passes from piece to piece
beside the last product's result, which the next piece adds, since it reads both anyway. Weights come as *operands*, on their
grid and in the carrier: they are rounded when they are updated, once a step, and gradients arrive in the carrier too.

The head's loss and gradients are written out, not left to autograd: a chunk's logits become loss, dx and dW while they are
there, so those of all runs, tokens and vocabulary are never in memory together. A chunk is some runs, or some tokens of one
run; then dW is summed in FP32 over the chunks and rounded once, as one product's sum is. A recipe that says how sums are formed
(`accumulate`) has dW's carried on from chunk to chunk instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from formats import FormatParameters
from landscape import logit_sharpness, small_box_sharpness
from train.layers import add_norm, attend, cross_entropy_gradient, last_norm, token_losses, wide_logits
from train.linear import (
    Precision,
    multiply,
    on_grid,
    operand,
    product,
    receive,
    round_gradient,
    round_output,
    wide_product,
)
from train.loss_scale import advance_scale
from train.model import ModelShape, Numerics
from train.optim import AdamW, Factors, Parts, Rule, factors, squares, update
from train.state import Chance, Kept, StateFormats

# The most logits in memory at a time, in elements: of several runs, and of one, where each chunk costs another pass over dW.
CHUNK_LOGITS, CHUNK_OF_ONE_RUN = 2**27, 2**29
ALIGNMENT = 64  # rows of the LM head's operand are padded to a multiple: products of odd sizes are several times slower


def padded_vocabulary(vocabulary: int) -> int:
    """Rows of the LM head's operand: the vocabulary, or the next multiple of 64 where it is none of 8."""
    return vocabulary if vocabulary % 8 == 0 else -(-vocabulary // ALIGNMENT) * ALIGNMENT


def as_operand(w: Tensor, precision: Precision) -> Tensor:
    """A master weight as its products take it: on its grid, in the carrier."""
    return on_grid(w, precision, precision.weight)


def head_operand(wte_RVD: Tensor, precision: Precision) -> Tensor:
    """The token embedding as the LM head's operand, [R, V', D], padded with zeros."""
    V = wte_RVD.shape[1]
    return F.pad(as_operand(wte_RVD, precision), (0, 0, 0, padded_vocabulary(V) - V))


def batch(text: Tensor, offsets_RN: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """Tokens [R, N·T] and their successors, alike, from where each sequence starts; int64."""
    positions = offsets_RN[..., None] + torch.arange(T + 1, device=text.device)
    window = text[positions].to(torch.int64)
    return window[..., :-1].flatten(1), window[..., 1:].flatten(1)


def start(wte: Tensor, wpe: Tensor, tokens_RS: Tensor) -> Tensor:
    """Token and position embeddings, [R, S, D]."""
    (R, V, D), T = wte.shape, wpe.shape[1]
    # All runs' embeddings are one table: run r's token t is its row r V + t.
    rows = tokens_RS + V * torch.arange(R, device=tokens_RS.device)[:, None]
    x_RND = wte.reshape(R * V, D)[rows].view(R, -1, T, D)
    return (x_RND + wpe[:, None]).view(R, -1, D)


def attention_half(
    x: Tensor, delta: Tensor | None, ln: Tensor, qkv: Tensor, proj: Tensor, shape: ModelShape, numerics: Numerics
) -> tuple[Tensor, Tensor]:
    """The stream with delta added, and what attention adds next, in the carrier."""
    body, (R, S, D) = numerics.body, x.shape
    x, a = add_norm(x, delta, ln, body, numerics.kernels)
    y = round_gradient(product(a, qkv, body), body)
    packed = y.view(R * S // shape.context, shape.context, 3, shape.heads, D // shape.heads)
    y = attend(packed, numerics.kernels).reshape(R, S, D)
    return x, product(operand(y, body, body.activation), proj, body)


def mlp_half(
    x: Tensor, delta: Tensor, ln: Tensor, fc: Tensor, proj: Tensor, numerics: Numerics
) -> tuple[Tensor, Tensor]:
    """The stream with delta added, and what the MLP adds next, in the carrier."""
    body = numerics.body
    x, a = add_norm(x, delta, ln, body, numerics.kernels)
    h = F.gelu(receive(product(a, fc, body), body))
    return x, product(operand(h, body, body.activation), proj, body)


def finish(x: Tensor, delta: Tensor, ln: Tensor, numerics: Numerics) -> Tensor:
    """The LM head's operand, [R, S, D]."""
    return last_norm(x, delta, ln, numerics.body, numerics.lm_head, numerics.kernels)


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
    formats: StateFormats, chance: Chance | None, operands: Sequence[Tensor | None], precision: Precision,
) -> None:  # fmt: skip
    """The optimiser's step on some parameters, and their operands for the next step, all in place."""
    update(parameters, grads, kept, f, config, rules, formats, chance)
    for p, o in zip(parameters, operands, strict=True):
        if o is not None:
            o[:, : p.shape[1]].copy_(as_operand(p, precision))


def record(losses_R: Tensor, norm_R: Tensor, train_loss: Tensor, grad_norm: Tensor, counter: Tensor) -> None:
    """One step's row of the histories [steps, R]; the counter moves on."""
    train_loss.index_copy_(0, counter, losses_R[None].to(train_loss.dtype))
    grad_norm.index_copy_(0, counter, norm_R[None].to(grad_norm.dtype))
    counter.add_(1)


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

    def hidden(
        self, x: Tensor, gains: Mapping[str, Tensor], operands: Mapping[str, Tensor], shape: ModelShape, numerics: Numerics
    ) -> Tensor:  # fmt: skip
        """The LM head's operand [R, S, D], from the embedded tokens x [R, S, D]; differentiable once."""
        delta: Tensor | None = None
        for i in range(shape.layers):
            h = f"h.{i}."
            x, delta = self.attention_half(
                x, delta, gains[h + "ln_1"], operands[h + "attn.qkv"], operands[h + "attn.proj"], shape, numerics
            )
            x, delta = self.mlp_half(
                x, delta, gains[h + "ln_2"], operands[h + "mlp.fc"], operands[h + "mlp.proj"], numerics
            )
        hidden: Tensor = self.finish(x, delta, gains["ln_f"], numerics)
        return hidden


def chunks(runs: int, tokens: int, vocabulary: int, multiple: int = 1) -> Iterator[tuple[slice, slice]]:
    """(runs, tokens) of each chunk of logits: several whole runs, or equal parts of one run's tokens where that is too much, but
    for the last of them a multiple of `multiple`.
    """
    if tokens * vocabulary <= CHUNK_OF_ONE_RUN:
        most = max(1, CHUNK_LOGITS // (tokens * vocabulary))
        together = next(r for r in range(min(most, runs), 0, -1) if runs % r == 0)
        for r in range(0, runs, together):
            yield slice(r, r + together), slice(0, tokens)
        return
    parts = -(-tokens * vocabulary // CHUNK_OF_ONE_RUN)
    parts = next((p for p in range(parts, 2 * parts) if tokens % p == 0), parts)
    size = -(-tokens // (parts * multiple)) * multiple
    for r in range(runs):
        for s in range(0, tokens, size):
            yield slice(r, r + 1), slice(s, min(s + size, tokens))


def of_runs(precision: Precision, r: slice) -> Precision:
    """The precision of some runs; of formats only the gradient's, which is all that the head still needs, unless the recipe says
    how sums are formed.
    """

    def chosen(formats: FormatParameters | None) -> FormatParameters | None:
        return None if formats is None else FormatParameters(*(parameter[r] for parameter in formats))

    if precision.structure.accumulate is None:
        precision = precision._replace(activation=None, weight=None)
    return precision._replace(
        activation=chosen(precision.activation), weight=chosen(precision.weight), gradient=chosen(precision.gradient)
    )


def _logits(x: Tensor, w: Tensor, precision: Precision) -> Tensor:
    """[r, s, V'], in the carrier."""
    return multiply(x, w.transpose(1, 2), precision, ("activation", "weight"))


def head(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    precision: Precision,
    vocabulary: int,
    tokens: int,
    whole: bool,
    kernels: bool,
    start: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A chunk's losses, summed, [r], and the gradients of a run's mean loss in x [r, s, D] and w [r, V', D], in the carrier.

    x and w are operands, targets [r, s]; the mean is over all `tokens` of a run. Where the chunk is not a run's `whole` batch, dW
    is FP32 (the carrier on a CPU), to be summed; or, where the recipe says how sums are formed, the sum of chunks so far, which
    goes on from `start`, that of the chunk before. The gradients, not the losses, are times the runs' loss `scale` [r], if any.
    """
    logits = _logits(x, w, precision)
    kernels = kernels and precision.carrier == torch.bfloat16
    losses, dz = cross_entropy_gradient(logits, targets, precision, vocabulary, tokens, kernels, scale)
    # What pads the vocabulary is zero, but another chunk to the accumulator of a recipe that says how sums are formed.
    terms = dz.shape[2] if precision.structure.accumulate is None else vocabulary
    dx = multiply(dz[..., :terms], w[:, :terms], precision, ("gradient", "weight"))
    transposed = dz.transpose(1, 2)
    if not whole:
        return losses, dx, wide_product(transposed, x, precision, ("gradient", "activation"), start)
    return losses, dx, multiply(transposed, x, precision, ("gradient", "activation"))


def head_loss(x: Tensor, w: Tensor, targets: Tensor, precision: Precision, vocabulary: int) -> Tensor:
    """A chunk's losses alone, summed over its tokens, [r]."""
    return token_losses(wide_logits(_logits(x, w, precision), vocabulary), targets)[2].sum(1)


def head_sharpness(
    x: Tensor, w: Tensor, targets: Tensor, precision: Precision, vocabulary: int, epsilons: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """A chunk's logit sharpness summed over its tokens, percent, [2, r, epsilons]: as defined, and centred; and which runs'
    boxes are all small, [r]: the sums of others mean nothing.
    """
    z = _logits(x, w, precision)[..., :vocabulary]
    plain, small = small_box_sharpness(z, targets, epsilons)
    centred, small_too = small_box_sharpness(z, targets, epsilons, centred=True)
    return torch.stack([plain.sum(1), centred.sum(1)]), (small & small_too).flatten(1).all(1)


def head_sharpness_of_any(
    x: Tensor, w: Tensor, targets: Tensor, precision: Precision, vocabulary: int, epsilons: tuple[float, ...]
) -> Tensor:
    """The same for boxes of any size, several times as slow."""
    z = _logits(x, w, precision)[..., :vocabulary]
    return torch.stack([logit_sharpness(z, targets, epsilons, centred=c).sum(1) for c in (False, True)])


def head_over_chunks(
    pieces: Pieces,
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    numerics: Numerics,
    vocabulary: int,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each run's mean loss [R], and its gradients in the operands x [R, S, D] and w [R, V', D], in the carrier.

    scale: each run's loss scale [R], which multiplies the gradients, or None.
    """
    (R, S, _), precision = x.shape, numerics.lm_head
    losses = x.new_zeros(R, dtype=torch.promote_types(x.dtype, torch.float32))
    dx, dw = torch.empty_like(x), torch.empty_like(w)
    accumulate = precision.structure.accumulate
    parts = list(chunks(R, S, w.shape[1], accumulate.step if accumulate else 1))
    if len(parts) == 1:
        losses, dx, dw = pieces.head(
            x, w, targets, of_runs(precision, slice(None)), vocabulary, S, True, numerics.kernels, None, scale
        )
        return losses / S, dx, dw
    sums: Tensor | None = None
    for r, s in parts:
        whole = s == slice(0, S)
        sums = None if s.start == 0 else sums
        loss, dx_part, dw_part = pieces.head(
            x[r, s], w[r], targets[r, s], of_runs(precision, r), vocabulary, S, whole, numerics.kernels,
            sums if accumulate else None, None if scale is None else scale[r],
        )  # fmt: skip
        losses[r] += loss
        dx[r, s] = dx_part
        if whole:
            dw[r] = dw_part
        else:
            sums = dw_part if sums is None or accumulate else sums.add_(dw_part)
            if s.stop == S:
                dw[r] = round_output(sums, precision)
    return losses / S, dx, dw
