"""Alarm signals: what a run shows of itself while it trains, all of them in the tables below.

Every few steps (`[signals] every`) the step's own batch is looked at once more, one sequence a run, through `model.forward` with
training's own weights, formats, scales and random bits, and its gradient (see `signal_pass`). Each signal is an entry of one of
three tables, by what it is computed from:

    OF_PASS        a `Look` at the pass                            [R], or [R, block]
    OF_OPERANDS    a `Rounded` operand of a linear layer           [R] of each tensor and role
    OF_UPDATE      a group's gradients and moments, of the step    [R] of each block

To add one, add an entry: it is recorded, stored, labelled and documented from there. The gradient norm's own signals are made
from what every step computes anyway: `grad_norm_block` and, on opening a study, `gnmr` (see `schema`, `gradient_ratio`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from landscape import Variable
from train.optim import update_rms
from train.seen import Seen

OUTSIDE = -1
"""Of the parameters outside the blocks, along `block`: embeddings, the last norm and the LM head."""
# An FP32 scale is rounded: the amax that it was made for may lie 2^-24 beyond its limit, and is not clipped.
SCALE_MARGIN = 1 + 2.0**-20
SMALLEST = 2.0**-149  # positive number of FP32
SCORES_AT_ONCE = 2**25  # attention logits in memory at a time


class Look(NamedTuple):
    """One sequence a run on its way through the model: logits [R, T, V], what `seen` has, and the scale of attention's scores."""

    seen: Seen
    logits: Tensor
    attention_scale: float


class Rounded(NamedTuple):
    """An operand [R, M, K], FP32: x, which is rounded, and q, which it becomes. What follows broadcasts against them.

    limit: the largest number that the element's format and scale have. scale: of each element, None where the format has none.
    edge: where elements begin to be clipped, a magnitude: the limit, or below zero in two's complement one step more.
    """

    x: Tensor
    q: Tensor
    limit: Tensor
    scale: Tensor | None
    edge: Tensor


class Signal(NamedTuple):
    """dims: beyond (run, signal_step). source: the formula, and where it comes from. of: how it is computed."""

    dims: tuple[str, ...]
    units: str
    long_name: str
    source: str
    of: Callable[..., Tensor]

    @property
    def variable(self) -> Variable:
        """As a dataset describes it."""
        return Variable(("run", "signal_step", *self.dims), self.units, self.long_name, self.source)


def attention_logit(look: Look) -> Tensor:
    """[R, block], in blocks of queries, so that no run's scores are ever in memory together."""
    return torch.stack(
        [_largest_score(q, k) * look.attention_scale for q, k in zip(look.seen.queries, look.seen.keys, strict=True)], 1
    )


def _largest_score(q_RNHTd: Tensor, k_RNHTd: Tensor) -> Tensor:
    wide = torch.promote_types(q_RNHTd.dtype, torch.float32)
    q, k = (t.detach().to(wide).flatten(1, 2) for t in (q_RNHTd, k_RNHTd))
    R, B, T, _ = q.shape
    at_once = max(1, SCORES_AT_ONCE // (R * B * T))
    position = torch.arange(T, device=q.device)
    largest = []
    for start in range(0, T, at_once):
        rows = slice(start, min(start + at_once, T))
        scores = (q[:, :, rows] @ k[:, :, : rows.stop].mT).abs()
        scores = scores.masked_fill(position[: rows.stop] > position[rows, None], 0.0)
        largest.append(scores.flatten(1).amax(1))
    return torch.stack(largest).amax(0)


def kurtosis(look: Look) -> Tensor:
    """[R, block]."""
    return torch.stack([_kurtosis(x.detach()) for x in look.seen.streams], 1)


def _kurtosis(x_RSD: Tensor) -> Tensor:
    centred = x_RSD - x_RSD.mean(-1, keepdim=True)
    # Divided before the fourth power, which FP32 would not hold.
    normal = centred / centred.square().mean(-1, keepdim=True).sqrt()
    return normal.square().square().mean(-1).mean(-1)


def logsumexp_mean(look: Look) -> Tensor:
    """[R]."""
    return look.logits.detach().logsumexp(-1).mean(-1)


def logsumexp_max(look: Look) -> Tensor:
    """[R]."""
    return look.logits.detach().logsumexp(-1).amax(-1)


def _count(which: Tensor) -> Tensor:
    return which.flatten(1).sum(1, dtype=torch.int32)  # twice as fast as in int64 on a CPU


def clipped(r: Rounded) -> Tensor:
    """[R]."""
    edge = r.edge if r.scale is None else r.edge * SCALE_MARGIN
    return _count(r.x.abs() > edge) / math.prod(r.x.shape[1:])


def flushed(r: Rounded) -> Tensor:
    """[R]; 0 where all elements are zero."""
    some = _count(r.x != 0)
    return (some - _count(r.q != 0)) / some.clamp(min=1)  # what is zero stays it


def at_maximum(r: Rounded) -> Tensor:
    """[R]."""
    # Of nothing but zeros even the scale, and so the limit, can be zero.
    return _count(r.q.abs() >= r.limit.clamp(min=SMALLEST)) / math.prod(r.x.shape[1:])


def quantization_error(r: Rounded) -> Tensor:
    """[R]; 0 where all elements are zero."""
    amax = r.x.abs().flatten(1).amax(1)[:, None, None]
    unit = amax.masked_fill(amax == 0, 1.0)  # squares of small gradients would be lost
    error, whole = (((t / unit).square()).flatten(1).sum(1) for t in (r.q - r.x, r.x))
    return (error / whole.masked_fill(whole == 0, 1.0)).sqrt()


def scale(r: Rounded) -> Tensor:
    """[R]; 0 where there are no scales, or no element that is not zero."""
    if r.scale is None:
        return r.x.new_zeros(r.x.shape[0])
    zero = r.x == 0
    exponents = r.scale.log2().expand_as(r.x).masked_fill(zero, 0.0)
    return exponents.flatten(1).sum(1) / _count(~zero).clamp(min=1)


OF_PASS = {
    "attention_logit": Signal(
        ("block",), "1", "largest attention logit of the sequence",
        "max |q . k| * scale over heads and causal pairs, of queries and keys as attention takes them (Dehghani et al. "
        "2302.05442; Wortsman et al. 2309.14322)",
        attention_logit,
    ),
    "kurtosis": Signal(
        ("block",), "1", "kurtosis of the stream behind the block, mean over the sequence's tokens",
        "E[(x - mean)^4] / var^2 over the features of a token, 3 for a normal distribution (as an early alarm: 2505.20524)",
        kurtosis,
    ),
    "logsumexp_mean": Signal(
        (), "nats", "log sum exp of the logits, mean over the sequence's tokens",
        "logsumexp of the logits that softmax sees, which z-loss keeps near zero (PaLM 2204.02311; Wortsman et al. 2309.14322)",
        logsumexp_mean,
    ),
    "logsumexp_max": Signal(
        (), "nats", "largest log sum exp of the logits among the sequence's tokens",
        "logsumexp of the logits that softmax sees (PaLM 2204.02311; Wortsman et al. 2309.14322)",
        logsumexp_max,
    ),
}  # fmt: skip

OF_OPERANDS = {
    "clipped": Signal(
        ("tensor", "role"), "1", "share of the operand's elements that are clipped",
        "elements with |x| > the largest element * scale (the lowest, below zero), of all; by more than the rounding of an FP32 "
        "scale, 2^-20",
        clipped,
    ),
    "flushed": Signal(
        ("tensor", "role"), "1", "share of the operand's non-zero elements that are flushed to zero",
        "elements with x != 0 and q = 0, of those with x != 0; 0 if there are none", flushed,
    ),
    "at_maximum": Signal(
        ("tensor", "role"), "1", "share of the operand's elements at the largest magnitude",
        "elements with |q| >= the largest element * scale, of all, those of zero apart", at_maximum,
    ),
    "quantization_error": Signal(
        ("tensor", "role"), "1", "relative error of the rounded operand",
        "sqrt(sum (q - x)^2 / sum x^2), x as it is rounded: after a rotation if there is one; 0 for a tensor of zeros",
        quantization_error,
    ),
    "scale": Signal(
        ("tensor", "role"), "octaves", "binary logarithm of the operand's scales",
        "mean of log2 scale over the elements that are not zero, that is of the scales' geometric mean; with the tensor's scale "
        "where there is one above the blocks'; 0 for formats without scales",
        scale,
    ),
}  # fmt: skip

OF_UPDATE = {
    "update_rms": Signal(
        ("block",), "1", "root mean square of the step's update before momentum",
        "sqrt(mean(g^2 / max(v, eps^2))) over what AdamW updates, g clipped, v the second moment after the step, bias corrected "
        "(RMS_t of StableAdamW, 2304.13013); it rises above 1 where v lags behind; not finite where a step was skipped",
        update_rms,
    ),
}  # fmt: skip

SIGNALS: dict[str, Signal] = OF_PASS | OF_OPERANDS | OF_UPDATE


def statistics(x: Tensor, q: Tensor, limit: Tensor, scale_of: Tensor | None, edge: Tensor) -> Tensor:
    """All signals of an operand (see `Rounded`), [signals, R], in the order of `OF_OPERANDS`."""
    operand = Rounded(x, q, limit, scale_of, edge)
    return torch.stack([signal.of(operand) for signal in OF_OPERANDS.values()])


def markdown() -> str:
    """The tables as one of Markdown, for the guide."""
    rows = [("signal", "of each", "units", "what", "definition"), ("---",) * 5]
    for name, signal in SIGNALS.items():
        each: Any = ", ".join(signal.dims) or "run"
        rows.append((f"`{name}`", each, signal.units, signal.long_name, signal.source.replace("|", "\\|")))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
