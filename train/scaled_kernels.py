"""Products whose operands have FP32 factors, in Triton: one pass for a product, its sum in FP32 and what that is multiplied by.

    c = round( sum_k a_mk b_kn * (f_m g_n) )                    factors that are constant along the sum
    c = round( sum_chunks (f_mc g_cn) * sum_k in c a_mk b_kn )  factors that change every `chunk` terms (DeepSeek-V3, 3.3.2)

Products are of BF16 values, sums FP32 on tensor cores. Both factors are multiplied with each other first, rounded to FP32, as
`train.products.contract` does, whose plain form is this one's. Operands come by strides, so a transposed view costs no copy:
x^T dy and dy W^T read what lies there.

A program owns a block of the result. Where a result has few blocks and its sum is long, as a weight's gradient, a sum over all
tokens, the sum is cut into parts: each is a program's, and leaves FP32 sums, which a second pass adds in order. Sizes and parts
follow from the shape of one run alone: not from a clock, nor from the card, nor from how many runs there are. No atomics. So a
run's bits are always the same.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.scaled_layers import LONGEST_STEP, SHORTEST_STEP, can_change


class Tiling(NamedTuple):
    """A block's rows, columns and terms a step; warps and stages; into how many parts the sum is cut."""

    rows: int
    columns: int
    terms: int
    warps: int
    stages: int
    parts: int


# The quickest of those tried on an H100 (`benchmarks/test_operand_kernels.py -k tilings`): 0.80 and 0.44 of cuBLAS' rate for BF16
# products. A factor that changes along the sum needs a second accumulator, hence a smaller block.
CONSTANT = Tiling(128, 256, 64, 8, 3, 1)
CHANGING = Tiling(128, 128, 128, 8, 3, 1)
NARROW = 64  # rows or columns of a block where the result has no more
BLOCKS_WANTED = 400  # three times as many programs as an H100 has multiprocessors, so that the last of them idle little
SHORTEST_PART = 2048  # terms
MOST_PARTS = 16
TOGETHER = 8  # rows of blocks that are formed one after the other, so that what they share stays in the L2
SUMMED = 1024  # elements a program of the second pass


def tiling(M: int, N: int, K: int, chunk: int = 0) -> Tiling:
    """What a product of those sizes is cut into."""
    t = CHANGING if chunk else CONSTANT
    if chunk:
        t = t._replace(terms=min(chunk, LONGEST_STEP))
    t = t._replace(rows=NARROW if M <= NARROW else t.rows, columns=NARROW if N <= NARROW else t.columns)
    parts = 1
    blocks = triton.cdiv(M, t.rows) * triton.cdiv(N, t.columns)
    while blocks * parts < BLOCKS_WANTED and parts < MOST_PARTS and 2 * parts * SHORTEST_PART <= K:
        parts *= 2
    return t._replace(parts=parts)


@triton.jit
def _more(total, a_at, b_at, left, term, a_term, b_term, TERMS: tl.constexpr, WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """A sum with the next TERMS terms, of which `left` are left, and where those after them lie."""
    if WHOLE:
        a_t, b_t = tl.load(a_at), tl.load(b_at)
    else:
        a_t = tl.load(a_at, mask=(term < left)[None, :], other=0.0)
        b_t = tl.load(b_at, mask=(term < left)[:, None], other=0.0)
    total = tl.dot(a_t, b_t, total, input_precision="ieee")
    return total, a_at + TERMS * a_term, b_at + TERMS * b_term


@triton.jit
def _scaled_matmul_kernel(  # type: ignore[no-untyped-def]
    a, b, a_factor, b_factor, out, M, N, K, steps,
    a_run, a_row, a_term, b_run, b_term, b_column,
    af_run, af_row, af_chunk, bf_run, bf_chunk, bf_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TERMS: tl.constexpr, INNER: tl.constexpr, TOGETHER: tl.constexpr,
    CHANGING: tl.constexpr, HAS_A: tl.constexpr, HAS_B: tl.constexpr, WHOLE: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """A block of the result, or of one part of its sum: `steps` steps of INNER * TERMS terms, factors being one step's.

    WHOLE: K is a multiple of TERMS * INNER. SCALED: constant factors are multiplied here, not by a second pass.
    """
    block, part, r = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    blocks_down, blocks_across = tl.cdiv(M, ROWS), tl.cdiv(N, COLUMNS)
    a_group = TOGETHER * blocks_across
    first = (block // a_group) * TOGETHER
    height = tl.minimum(blocks_down - first, TOGETHER)
    row = (first + (block % a_group) % height) * ROWS + tl.arange(0, ROWS)
    column = ((block % a_group) // height) * COLUMNS + tl.arange(0, COLUMNS)
    # Rows and columns beyond the end are others' over again: they are read without a mask and never written.
    row_in, column_in = (row % M).to(tl.int64), (column % N).to(tl.int64)
    term = tl.arange(0, TERMS)
    start = part * steps
    first_term = start.to(tl.int64) * (INNER * TERMS)
    a_at = a + r * a_run + row_in[:, None] * a_row + (first_term + term[None, :]) * a_term
    b_at = b + r * b_run + (first_term + term[:, None]) * b_term + column_in[None, :] * b_column
    if HAS_A:
        af_at = a_factor + r * af_run + row_in * af_row
    if HAS_B:
        bf_at = b_factor + r * bf_run + column_in * bf_column
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    end = tl.minimum(start + steps, tl.cdiv(K, INNER * TERMS))
    for step in range(start, end):
        if CHANGING:
            partial = tl.zeros((ROWS, COLUMNS), tl.float32)
            if INNER == 1:
                partial, a_at, b_at = _more(
                    partial, a_at, b_at, K - step * TERMS, term, a_term, b_term, TERMS, WHOLE
                )  # fmt: skip
            else:
                for inner in tl.static_range(0, INNER):
                    left = K - (step * INNER + inner) * TERMS
                    partial, a_at, b_at = _more(partial, a_at, b_at, left, term, a_term, b_term, TERMS, WHOLE)
        else:
            total, a_at, b_at = _more(total, a_at, b_at, K - step * TERMS, term, a_term, b_term, TERMS, WHOLE)
        if CHANGING:
            if HAS_A and HAS_B:
                factor = tl.load(af_at + step * af_chunk)[:, None] * tl.load(bf_at + step * bf_chunk)[None, :]
                total += partial * factor
            elif HAS_A:
                total += partial * tl.load(af_at + step * af_chunk)[:, None]
            else:
                total += partial * tl.load(bf_at + step * bf_chunk)[None, :]
    if SCALED:
        if HAS_A and HAS_B:
            total = total * (tl.load(af_at)[:, None] * tl.load(bf_at)[None, :])
        elif HAS_A:
            total = total * tl.load(af_at)[:, None]
        elif HAS_B:
            total = total * tl.load(bf_at)[None, :]
    at = out + ((r * tl.num_programs(1) + part) * M + row[:, None]) * N + column[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=(row < M)[:, None] & (column < N)[None, :])


@triton.jit
def _sum_parts_kernel(  # type: ignore[no-untyped-def]
    parts, a_factor, b_factor, out, N, size, af_run, af_row, bf_run, bf_column,
    PARTS: tl.constexpr, WIDTH: tl.constexpr, HAS_A: tl.constexpr, HAS_B: tl.constexpr,
):  # fmt: skip
    """The parts of a sum, [R, parts, M N] FP32, added in order, times constant factors, rounded once."""
    r = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    there = at < size
    total = tl.load(parts + r * PARTS * size + at, mask=there, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(parts + (r * PARTS + part) * size + at, mask=there, other=0.0)
    row, column = (at // N).to(tl.int64), (at % N).to(tl.int64)
    if HAS_A and HAS_B:
        f = tl.load(a_factor + r * af_run + row * af_row, mask=there, other=0.0)
        total = total * (f * tl.load(b_factor + r * bf_run + column * bf_column, mask=there, other=0.0))
    elif HAS_A:
        total = total * tl.load(a_factor + r * af_run + row * af_row, mask=there, other=0.0)
    elif HAS_B:
        total = total * tl.load(b_factor + r * bf_run + column * bf_column, mask=there, other=0.0)
    tl.store(out + r * size + at, total.to(out.dtype.element_ty), mask=there)


def scaled_matmul(
    a: Tensor, b: Tensor, a_factor: Tensor | None, b_factor: Tensor | None, chunk: int, dtype: torch.dtype,
    shape: Tiling | None = None,
) -> Tensor:  # fmt: skip
    """Each run's a b times its factors, [R, M, N] in dtype, FP32 or BF16: a [R, M, K] and b [R, K, N], of any strides.

    a_factor: FP32, [R or 1, M or 1, C or 1], or None; b_factor: [R or 1, C or 1, N or 1]. chunk: after how many terms of the sum
    a factor changes, of which C = ceil(K / chunk); 0 for never, C = 1. ValueError for a chunk that `can_change` refuses. shape:
    other sizes than `tiling`'s, to try them.
    """
    (R, M, K), N = a.shape, b.shape[2]
    chunk = chunk if chunk < K else 0
    changing = bool(chunk) and (a_factor is not None or b_factor is not None)
    if changing and not can_change(chunk):
        raise ValueError(
            f"factors change every power of two from {SHORTEST_STEP} on, or every multiple of 128; got {chunk}"
        )
    chunk = chunk if changing else 0
    t = tiling(M, N, K, chunk) if shape is None else shape
    inner = chunk // t.terms if chunk else 1
    step = inner * t.terms
    steps = triton.cdiv(triton.cdiv(K, step), t.parts)
    out = torch.empty(R, M, N, dtype=dtype, device=a.device)
    target = out if t.parts == 1 else torch.empty(R, t.parts, M, N, dtype=torch.float32, device=a.device)
    af, bf = _strides(a_factor), _strides(b_factor)
    has = (a_factor is not None, b_factor is not None)
    grid = (triton.cdiv(M, t.rows) * triton.cdiv(N, t.columns), t.parts, R)
    _scaled_matmul_kernel[grid](
        a, b, a_factor, b_factor, target, M, N, K, steps, *a.stride(), *b.stride(), *af, *bf,
        t.rows, t.columns, t.terms, inner, TOGETHER, changing, *has, K % step == 0, not changing and t.parts == 1,
        num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    if t.parts > 1:
        later = (False, False) if changing else has
        _sum_parts_kernel[(triton.cdiv(M * N, SUMMED), R)](
            target, a_factor, b_factor, out, N, M * N, af[0], af[1], bf[0], bf[2], t.parts, SUMMED, *later, num_warps=4
        )
    return out


def _strides(factor: Tensor | None) -> tuple[int, ...]:
    """A factor's strides, 0 along an axis on which it does not vary."""
    if factor is None:
        return (0, 0, 0)
    return tuple(0 if size == 1 else stride for size, stride in zip(factor.shape, factor.stride(), strict=True))
