"""The LM head of a step: losses, gradients and sharpness of a chunk of logits at a time.

Loss and gradients are written out, not left to autograd: a chunk's logits become loss, dx and dW while they are there, so
those of all runs, tokens and vocabulary are never in memory together. A chunk is some runs, or some tokens of one run; then dW
is summed in FP32 over the chunks and rounded once, as one product's sum is. A recipe that says how sums are formed
(`accumulate`) has dW's carried on from chunk to chunk instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from formats import FormatParameters, tensor_amax
from landscape import logit_sharpness, small_box_sharpness
from train.layers import PLAIN, Readout, cross_entropy_gradient, padded_with_nothing, token_losses, wide_logits
from train.linear import multiply, round_output, wide_product
from train.model import Numerics
from train.precision import Precision, WeightOperand
from train.products import (
    HEAD_SITE,
    dgrad_product,
    forward_product,
    take_activation,
    take_gradient,
    transposed,
    wgrad_product,
)
from train.weights import parts_of, weight_of_runs

if TYPE_CHECKING:
    from train.step import Pieces

# The most logits in memory at a time, in elements: of several runs, and of one, where each chunk costs another pass over dW.
CHUNK_LOGITS, CHUNK_OF_ONE_RUN = 2**27, 2**29
BLOCKS_OF_TOKENS = 256  # chunks of a head that is rounded by rules are whole blocks, of tiles and rotations too


def chunks(
    runs: int,
    tokens: int,
    vocabulary: int,
    multiple: int = 1,
    limits: tuple[int, int] | None = None,
) -> Iterator[tuple[slice, slice]]:
    """(runs, tokens) of each chunk of logits: several whole runs, or equal parts of one run's tokens where that is too much, but
    for the last of them a multiple of `multiple`.

    limits: the most elements of a chunk of several runs, and of one; training's own if left out.
    """
    together, of_one_run = limits or (CHUNK_LOGITS, CHUNK_OF_ONE_RUN)
    if tokens * vocabulary <= of_one_run:
        most = max(1, together // (tokens * vocabulary))
        count = next(r for r in range(min(most, runs), 0, -1) if runs % r == 0)
        for r in range(0, runs, count):
            yield slice(r, r + count), slice(0, tokens)
        return
    parts = -(-tokens * vocabulary // of_one_run)
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


def head_product(x: Tensor, w: Tensor | WeightOperand, precision: Precision) -> Tensor:
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
    z = head_product(x, w, precision)
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
    logits = padded_with_nothing(wide_logits(head_product(x, w, precision), readout), vocabulary)
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
    z = wide_logits(head_product(x, w, precision)[..., :vocabulary], readout)
    plain, small = small_box_sharpness(z, targets, epsilons)
    centred, small_too = small_box_sharpness(z, targets, epsilons, centred=True)
    return torch.stack([plain.sum(1), centred.sum(1)]), (small & small_too).flatten(1).all(1)


def head_sharpness_of_any(
    x: Tensor, w: Tensor | WeightOperand, targets: Tensor, precision: Precision, vocabulary: int, epsilons: tuple[float, ...],
    readout: Readout = PLAIN,
) -> Tensor:  # fmt: skip
    """The same for boxes of any size, several times as slow."""
    z = wide_logits(head_product(x, w, precision)[..., :vocabulary], readout)
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
