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

from formats import FormatParameters, tensor_amax
from landscape import logit_sharpness, small_box_sharpness
from train.elsewhere import rounded
from train.layers import (
    PLAIN,
    Readout,
    add_norm,
    attend,
    cross_entropy_gradient,
    last_norm,
    padded_with_nothing,
    token_losses,
    wide_logits,
)
from train.linear import (
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
from train.products import (
    HEAD_SITE,
    dgrad_product,
    forward_product,
    take_activation,
    take_gradient,
    take_weight,
    transposed,
    wgrad_product,
)
from train.recipe import Elsewhere
from train.signals import OF_UPDATE
from train.state import Chance, Kept, StateFormats

# The most logits in memory at a time, in elements: of several runs, and of one, where each chunk costs another pass over dW.
CHUNK_LOGITS, CHUNK_OF_ONE_RUN = 2**27, 2**29
BLOCKS_OF_TOKENS = 256  # chunks of a head that is rounded by rules are whole blocks, of tiles and rotations too
ALIGNMENT = 64  # rows of the LM head's operand are padded to a multiple: products of odd sizes are several times slower


NOWHERE = Elsewhere()
OF_HEAD = -1  # the LM head's matrix, among the sites of `update_group`
BLOCK_MATRICES = (("attn.qkv", "attn.proj"), ("mlp.fc", "mlp.proj"))


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


def batch(text: Tensor, offsets_RN: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """Tokens [R, N·T] and their successors, alike, from where each sequence starts; int64."""
    positions = offsets_RN[..., None] + torch.arange(T + 1, device=text.device)
    window = text[positions].to(torch.int64)
    return window[..., :-1].flatten(1), window[..., 1:].flatten(1)


def start(wte: Tensor, wpe: Tensor | None, tokens_RS: Tensor, elsewhere: Elsewhere = NOWHERE) -> Tensor:
    """Token embeddings, and those of positions where they are learned, [R, S, D]; carries no gradient."""
    R, V, D = wte.shape
    wte, wpe = rounded(wte, elsewhere.embedding), None if wpe is None else rounded(wpe, elsewhere.embedding)
    # All runs' embeddings are one table: run r's token t is its row r V + t.
    rows = tokens_RS + V * torch.arange(R, device=tokens_RS.device)[:, None]
    x_RSD = wte.reshape(R * V, D)[rows]
    x_RSD = x_RSD if wpe is None else (x_RSD.view(R, -1, wpe.shape[1], D) + wpe[:, None]).view(R, -1, D)
    return rounded(x_RSD, elsewhere.residual)


def attention_half(
    x: Tensor, delta: Tensor | None, ln: Tensor, qkv: Tensor | WeightOperand, proj: Tensor | WeightOperand, shape: ModelShape,
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
        y = written_attention(q, k, v, shape.attention_scale, block.products, elsewhere.softmax)
        y = y.view(R, -1, shape.heads, T, shape.head_size).transpose(2, 3).reshape(R, S, D)
    return x, product(operand(y, here, "activation"), proj, here._replace(scales=scales[1]), PROJECTION)


def mlp_half(
    x: Tensor, delta: Tensor, ln: Tensor, fc: Tensor | WeightOperand, proj: Tensor | WeightOperand, shape: ModelShape,
    numerics: Numerics, block: BlockPrecision, behind: Precision, scales: Sequence[Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The stream with delta added, and what the MLP adds next, in the carrier."""
    here, elsewhere = block.mlp, numerics.elsewhere
    x, a = add_norm(
        x, delta, rounded(ln, elsewhere.gains), here, behind, numerics.kernels, shape.norm, elsewhere.residual
    )
    h = activate(receive(product(a, fc, here._replace(scales=scales[0]), FC), here), shape)
    h = operand(rounded(h, elsewhere.gelu), here, "activation")
    return x, product(h, proj, here._replace(scales=scales[1]), MLP_PROJECTION)


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
        self, x: Tensor, gains: Mapping[str, Tensor], operands: Mapping[str, Tensor | WeightOperand], shape: ModelShape,
        numerics: Numerics, scales: Mapping[str, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """The LM head's operand [R, S, D], from the embedded tokens x [R, S, D]; differentiable once.

        scales: delayed ones, by the name of their matrix.
        """
        delta: Tensor | None = None
        turn = rotation(shape.context, shape, x)
        shared, scales = numerics._replace(blocks=()), scales or {}
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
                x, delta, gains[h + "ln_2"], *of[1], shape, shared, block, block.attention, delayed[1]
            )
            behind = block.mlp
        hidden: Tensor = self.finish(x, delta, gains["ln_f"], shape, shared, behind)
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
    how sums are formed or rounds by rules.
    """

    def chosen(formats: FormatParameters | None) -> FormatParameters | None:
        return None if formats is None else FormatParameters(*(parameter[r] for parameter in formats))

    if precision.plan is not None:
        seed, signs, scales = (None if t is None else t[r] for t in (precision.seed, precision.signs, precision.scales))
        precision = precision._replace(seed=seed, signs=signs, scales=scales)
    elif precision.structure.accumulate is None:
        precision = precision._replace(activation=None, weight=None)
    return precision._replace(
        activation=chosen(precision.activation), weight=chosen(precision.weight), gradient=chosen(precision.gradient)
    )


def weight_of_runs(w: Tensor | WeightOperand, r: slice) -> Tensor | WeightOperand:
    """The LM head's operand for some runs."""
    return w[r] if isinstance(w, Tensor) else w.map(lambda t: t[r])


def _logits(x: Tensor, w: Tensor | WeightOperand, precision: Precision) -> Tensor:
    """The LM head's product, [r, s, V'], in the carrier; the readout makes of it what softmax sees."""
    if isinstance(w, WeightOperand):
        first, _ = take_activation(x, precision, HEAD_SITE, training=False)
        return forward_product(first, transposed(w.first), precision)
    return multiply(x, w.transpose(1, 2), precision, ("activation", "weight"))


def head(
    x: Tensor,
    w: Tensor | WeightOperand,
    targets: Tensor,
    precision: Precision,
    vocabulary: int,
    tokens: int,
    whole: bool,
    kernels: bool,
    start: Tensor | None = None,
    readout: Readout = PLAIN,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """A chunk's losses, summed, [r], the gradients of a run's mean loss in x [r, s, D] and w [r, V', D], in the carrier, and
    where scales are delayed the amaxes of activation and gradient, [r, 2].

    x and w are operands, targets [r, s]; the mean is over all `tokens` of a run. Losses are cross entropies, gradients of all
    that is descended (see `Readout`), times the runs' loss `scale` [r], if any. Where the chunk is not a run's `whole` batch, dW
    is FP32 (the carrier on a CPU), to be summed; or, where the recipe says how sums are formed, the sum of chunks so far, which
    goes on from `start`, that of the chunk before. A chunk rounded by rules is a tensor of its own: its scales are of its own
    amaxes, and dW is summed in FP32.
    """
    kernels = kernels and precision.carrier == torch.bfloat16
    if isinstance(w, WeightOperand):
        first, second = take_activation(x, precision, HEAD_SITE, training=True)
        assert second is not None
        z = forward_product(first, transposed(w.first), precision)
        losses, dz = cross_entropy_gradient(z, targets, precision, vocabulary, tokens, kernels, readout, scale)
        for_dgrad, for_wgrad = take_gradient(dz, precision, HEAD_SITE)
        dx = dgrad_product(for_dgrad, transposed(w.second), precision)
        dw = wgrad_product(second, for_wgrad, precision, rounded=whole).transpose(1, 2)
        amaxes = None if precision.scales is None else torch.stack([tensor_amax(x, 1), tensor_amax(dz, 1)], 1)
        return losses, dx, dw, amaxes
    z = _logits(x, w, precision)
    losses, dz = cross_entropy_gradient(z, targets, precision, vocabulary, tokens, kernels, readout, scale)
    # What pads the vocabulary is zero, but another chunk to the accumulator of a recipe that says how sums are formed.
    terms = dz.shape[2] if precision.structure.accumulate is None else vocabulary
    dx = multiply(dz[..., :terms], w[:, :terms], precision, ("gradient", "weight"))
    dz_T = dz.transpose(1, 2)
    if not whole:
        return losses, dx, wide_product(dz_T, x, precision, ("gradient", "activation"), start), None
    return losses, dx, multiply(dz_T, x, precision, ("gradient", "activation")), None


def head_loss(
    x: Tensor,
    w: Tensor | WeightOperand,
    targets: Tensor,
    precision: Precision,
    vocabulary: int,
    readout: Readout = PLAIN,
) -> Tensor:
    """A chunk's losses alone, summed over its tokens, [r]."""
    logits = padded_with_nothing(wide_logits(_logits(x, w, precision), readout), vocabulary)
    return token_losses(logits, targets)[2].sum(1)


def head_sharpness(
    x: Tensor, w: Tensor | WeightOperand, targets: Tensor, precision: Precision, vocabulary: int, epsilons: tuple[float, ...],
    readout: Readout = PLAIN,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A chunk's logit sharpness summed over its tokens, percent, [2, r, epsilons]: as defined, and centred; and which runs'
    boxes are all small, [r]: the sums of others mean nothing.

    It is of the cross entropy around the logits that softmax sees, capped ones where they are capped: the closed form knows no
    z-loss, and so a z-loss is not in it.
    """
    z = wide_logits(_logits(x, w, precision)[..., :vocabulary], readout)
    plain, small = small_box_sharpness(z, targets, epsilons)
    centred, small_too = small_box_sharpness(z, targets, epsilons, centred=True)
    return torch.stack([plain.sum(1), centred.sum(1)]), (small & small_too).flatten(1).all(1)


def head_sharpness_of_any(
    x: Tensor, w: Tensor | WeightOperand, targets: Tensor, precision: Precision, vocabulary: int, epsilons: tuple[float, ...],
    readout: Readout = PLAIN,
) -> Tensor:  # fmt: skip
    """The same for boxes of any size, several times as slow."""
    z = wide_logits(_logits(x, w, precision)[..., :vocabulary], readout)
    return torch.stack([logit_sharpness(z, targets, epsilons, centred=c).sum(1) for c in (False, True)])


def head_over_chunks(
    pieces: Pieces, x: Tensor, w: Tensor | WeightOperand, targets: Tensor, numerics: Numerics, vocabulary: int,
    readout: Readout = PLAIN, scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Each run's mean loss [R], its gradients in the operands x [R, S, D] and w [R, V', D], in the carrier, and where scales are
    delayed the amaxes of activation and gradient, [R, 2].

    scale: each run's loss scale [R], which multiplies the gradients, or None.
    """
    (R, S, D), precision = x.shape, numerics.lm_head
    rows = parts_of(w)[0].shape[1]
    accumulate = None if precision.plan is not None else precision.structure.accumulate
    multiple = accumulate.step if accumulate else BLOCKS_OF_TOKENS if precision.plan is not None else 1
    parts = list(chunks(R, S, rows, multiple))
    if len(parts) == 1:
        losses, dx, dw, amaxes = pieces.head(
            x, w, targets, of_runs(precision, slice(None)), vocabulary, S, True, numerics.kernels, None, readout, scale
        )
        return losses / S, dx, dw, amaxes
    losses = x.new_zeros(R, dtype=torch.promote_types(x.dtype, torch.float32))
    dx, dw = torch.empty_like(x), x.new_empty(R, rows, D)
    amaxes = None if precision.scales is None else x.new_zeros(R, 2, dtype=torch.float32)
    sums: Tensor | None = None
    for r, s in parts:
        whole = s == slice(0, S)
        sums = None if s.start == 0 else sums
        of = of_runs(precision, r)
        if of.seed is not None:  # each chunk counts its elements from 0
            of = of._replace(seed=of.seed + s.start)
        loss, dx_part, dw_part, amax = pieces.head(
            x[r, s], weight_of_runs(w, r), targets[r, s], of, vocabulary, S, whole, numerics.kernels,
            sums if accumulate else None, readout, None if scale is None else scale[r],
        )  # fmt: skip
        losses[r] += loss
        dx[r, s] = dx_part
        if amaxes is not None and amax is not None:
            amaxes[r] = torch.maximum(amaxes[r], amax)
        if whole:
            dw[r] = dw_part
        else:
            sums = dw_part if sums is None or accumulate else sums.add_(dw_part)
            if s.stop == S:
                dw[r] = round_output(sums, precision)
    return losses / S, dx, dw, amaxes
