"""The passes that are written by hand, in Triton: what the compiler does not fuse, each with the plain form it must equal.

    norm_backward       through "add to the residual stream, normalise": one pass for the stream's gradient, for the operand
                        of the product before, on its grid, and for the gain's gradient, for which the compiler reads
                        everything again
    cross_entropy       a chunk of logits into losses and gradients, on their grid, one program a row
    embedding_gradient  the rows of a gradient summed by token, in the batch's order: tokens are sorted, a program owns a row

`benchmarks/test_kernels.py` says what each wins. All sums are FP32, all orders fixed by shapes alone. They need Triton and BF16
tensors on a GPU; elsewhere `train` takes the plain forms.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# `rounding` of what leaves: 0 a cast, 1 nearest even, 2 toward zero, to the format whose parameters come with it.
NO_FORMAT = (None,) * 6
ROWS = 32  # tokens a program of norm_backward: the quickest on an H100 of those tried, for widths of 128, 384 and 768


@triton.jit
def _round(x, max_bits, lsb_shift, half_less_one, keep_mask, subnormals_below, quantum, nearest: tl.constexpr):  # type: ignore[no-untyped-def]
    """`formats.quantizer`'s three steps, on FP32; the same bits."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    a = tl.minimum(magnitude, max_bits)
    m = a.to(tl.float32, bitcast=True)
    c = quantum * 8388608.0
    small = (m + c) - c
    if nearest:
        normal = (a + half_less_one + ((a >> lsb_shift) & 1)) & keep_mask
    else:
        normal = a & keep_mask
        small = tl.where(small > m, small - quantum, small)
    rounded = tl.where(a < subnormals_below, small.to(tl.int32, bitcast=True), normal)
    signed = rounded | (bits & -2147483648)
    return tl.where(magnitude > 0x7F800000, bits, signed).to(tl.float32, bitcast=True)


@triton.jit
def _norm_backward_kernel(  # type: ignore[no-untyped-def]
    dy, x, mean, rstd, gain, stream, dx, operand, partial,
    max_bits, lsb_shift, half_less_one, keep_mask, subnormals_below, quantum,
    S, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    HAS_STREAM: tl.constexpr, HAS_OPERAND: tl.constexpr, ROUNDING: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    r, part = tl.program_id(1).to(tl.int64), tl.program_id(0)
    d = tl.arange(0, WIDTH)
    inside = d < D
    g = tl.load(gain + r * D + d, mask=inside, other=0.0).to(tl.float32)
    if ROUNDING != 0:
        p_max, p_shift = tl.load(max_bits + r), tl.load(lsb_shift + r)
        p_half, p_keep = tl.load(half_less_one + r), tl.load(keep_mask + r)
        p_below, p_quantum = tl.load(subnormals_below + r), tl.load(quantum + r)
    total = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, ROWS, TILE):
        row = part * ROWS + start + tl.arange(0, TILE)
        there = row < S
        at = (r * S + row)[:, None] * D + d[None, :]
        mask = there[:, None] & inside[None, :]
        dy_t = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        x_t = tl.load(x + at, mask=mask, other=0.0)
        m_t = tl.load(mean + r * S + row, mask=there, other=0.0)
        s_t = tl.load(rstd + r * S + row, mask=there, other=0.0)
        normal = tl.where(mask, (x_t - m_t[:, None]) * s_t[:, None], 0.0)
        scaled = dy_t * g[None, :]
        c2 = tl.sum(scaled * normal, 1) / D
        if CENTRED:
            c1 = tl.sum(scaled, 1) / D
            out = (scaled - c1[:, None] - normal * c2[:, None]) * s_t[:, None]
        else:
            out = (scaled - normal * c2[:, None]) * s_t[:, None]
        if HAS_STREAM:
            out += tl.load(stream + at, mask=mask, other=0.0)
        tl.store(dx + at, out, mask=mask)
        if HAS_OPERAND:
            rounded = out
            if ROUNDING != 0:
                rounded = _round(out, p_max, p_shift, p_half, p_keep, p_below, p_quantum, ROUNDING == 1)
            tl.store(operand + at, rounded.to(operand.dtype.element_ty), mask=mask)
        total += tl.sum(dy_t * normal, 0)
    parts = tl.num_programs(0)
    tl.store(partial + (r * parts + part) * D + d, total, mask=inside)


def norm_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, gain: Tensor, stream: Tensor | None, operand: bool,
    rounding: int, parameters: list[Tensor], centred: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Dx [R, S, D] FP32, dx rounded for the product before [R, S, D] BF16 (empty if not asked for), dgain [R, D] FP32.

    dy [R, S, D] BF16 is the gradient of the normed value, `stream` [R, S, D] FP32 that of the sum beside it, x [R, S, D] FP32 the
    sum itself, mean and rstd [R, S] its own. `parameters` are the format's six, [R, 1, 1], none for a cast. Not `centred`
    is RMSNorm: its mean is zero here, and the gradient has no term for it.
    """
    R, S, D = x.shape
    rows = min(ROWS, triton.next_power_of_2(S))
    parts = triton.cdiv(S, rows)
    dx = torch.empty_like(x)
    rounded = torch.empty((R, S, D) if operand else (0,), dtype=torch.bfloat16, device=x.device)
    partial = x.new_empty(R, parts, D)
    width = triton.next_power_of_2(D)
    _norm_backward_kernel[(parts, R)](
        dy, x, mean, rstd, gain, stream, dx, rounded, partial, *(parameters or NO_FORMAT),
        S, D, width, rows, min(8, rows), stream is not None, operand, rounding, centred, num_warps=2 if width <= 512 else 4,
    )  # fmt: skip
    return dx, rounded, partial.sum(1)


@triton.jit
def _cross_entropy_kernel(  # type: ignore[no-untyped-def]
    logits, targets, losses, gradient, loss_scale, max_bits, lsb_shift, half_less_one, keep_mask, subnormals_below, quantum,
    S, V, V_PADDED: tl.constexpr, WIDTH: tl.constexpr, scale, HAS_SCALE: tl.constexpr, ROUNDING: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    r = row // S
    target = tl.load(targets + row)
    column = tl.arange(0, WIDTH)
    # Maximum and sum a lane, brought together once: a long row waits for no one on the way.
    lane_top = tl.full((WIDTH,), float("-inf"), tl.float32)
    lane_sum = tl.zeros((WIDTH,), tl.float32)
    lane_t = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, V_PADDED, WIDTH):
        at = start + column
        z = tl.load(logits + row * V_PADDED + at, mask=at < V, other=-float("inf")).to(tl.float32)
        lane_t += tl.where(at == target, z, 0.0)
        higher = tl.maximum(lane_top, z, propagate_nan=tl.PropagateNan.ALL)
        # A lane that has seen nothing stays at -inf; -inf less -inf would be NaN.
        shrink = tl.where(lane_top == higher, 1.0, tl.exp(lane_top - higher))
        lane_sum = lane_sum * shrink + tl.where(at < V, tl.exp(z - higher), 0.0)
        lane_top = higher
    top = tl.max(lane_top, 0)
    total = tl.sum(tl.where(lane_top == float("-inf"), 0.0, lane_sum * tl.exp(lane_top - top)), 0)
    log_sum = top + tl.log(total)
    z_t = tl.sum(lane_t, 0)
    tl.store(losses + row, log_sum - z_t)
    if HAS_SCALE:
        run_scale = tl.load(loss_scale + r)
    if ROUNDING != 0:
        p_max, p_shift = tl.load(max_bits + r), tl.load(lsb_shift + r)
        p_half, p_keep = tl.load(half_less_one + r), tl.load(keep_mask + r)
        p_below, p_quantum = tl.load(subnormals_below + r), tl.load(quantum + r)
    for start in range(0, V_PADDED, WIDTH):
        at = start + column
        z = tl.load(logits + row * V_PADDED + at, mask=at < V, other=-float("inf")).to(tl.float32)
        dz = (tl.exp(z - log_sum) - tl.where(at == target, 1.0, 0.0)) * scale
        if HAS_SCALE:
            dz = dz * run_scale
        if ROUNDING != 0:
            dz = _round(dz, p_max, p_shift, p_half, p_keep, p_below, p_quantum, ROUNDING == 1)
        tl.store(gradient + row * V_PADDED + at, dz.to(gradient.dtype.element_ty), mask=at < V_PADDED)


def cross_entropy(
    logits: Tensor, targets: Tensor, vocabulary: int, tokens: int, rounding: int, parameters: list[Tensor],
    loss_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Each token's loss [r, s] FP32, and the gradient [r, s, V'] of the sum of losses / tokens, rounded, in the logits' dtype.

    logits [r, s, V'] BF16, of which the first `vocabulary` columns count; the others' gradient is 0. targets [r, s].
    loss_scale [r] FP32, or None, multiplies the gradient before it is rounded.
    """
    r, s, padded = logits.shape
    losses = logits.new_empty(r, s, dtype=torch.float32)
    gradient = torch.empty_like(logits)
    width = min(8192, triton.next_power_of_2(padded))
    _cross_entropy_kernel[(r * s,)](
        logits, targets, losses, gradient, loss_scale, *(parameters or NO_FORMAT),
        s, vocabulary, padded, width, 1.0 / tokens, loss_scale is not None, rounding, num_warps=max(1, min(16, width // 512)),
    )  # fmt: skip
    return losses, gradient


@triton.jit
def _embedding_gradient_kernel(  # type: ignore[no-untyped-def]
    dx, order, ends, out, S, V, D: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr
):
    token, r = tl.program_id(0), tl.program_id(1).to(tl.int64)
    d = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    begin = tl.load(ends + r * (V + 1) + token)
    end = tl.load(ends + r * (V + 1) + token + 1)
    inside = d < D
    total = tl.zeros((WIDTH,), tl.float32)
    for start in range(begin, end, TILE):
        place = start + tl.arange(0, TILE)
        there = place < end
        row = tl.load(order + r * S + place, mask=there, other=0).to(tl.int64)
        rows = tl.load(dx + (r * S + row)[:, None] * D + d[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        total += tl.sum(rows, 0)
    tl.store(out + (r * V + token) * D + d, total, mask=inside)


def embedding_gradient(dx: Tensor, tokens: Tensor, vocabulary: int) -> Tensor:
    """[R, V, D]: the sum of the rows of dx [R, S, D] FP32 whose token [R, S] is v, each in the order of the batch."""
    R, S, D = dx.shape
    in_order, order = tokens.to(torch.int32).sort(dim=1, stable=True)
    ticks = torch.arange(vocabulary + 1, dtype=torch.int32, device=dx.device).expand(R, -1).contiguous()
    ends = torch.searchsorted(in_order, ticks, out_int32=True)
    out = dx.new_empty(R, vocabulary, D)
    width = min(512, triton.next_power_of_2(D))
    _embedding_gradient_kernel[(vocabulary, R, triton.cdiv(D, width))](
        dx, order, ends, out, S, vocabulary, D, width, 16, num_warps=4
    )
    return out
