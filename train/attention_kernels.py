"""Causal attention by hand, in Triton, on the packed queries, keys and values that their product leaves.

The gradient is written packed as well, where PyTorch's own comes in three tensors that have to be stacked and copied. Scores are
computed again in the backward pass (FlashAttention-2, Dao 2023). No atomics: one program owns a block of keys, then the block of
queries at the same place, so every sum has one order. Products take BF16 operands, sums are FP32.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.0 / math.log(2.0)
# The quickest on an H100 of those tried, for heads of 32 and 64 and contexts of 256 and 1,024.
BLOCK, DOT_BLOCK = 64, 128  # positions a program


@triton.jit
def _scores(q, k, q_at, k_at, T, scale, DIAGONAL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Q k^T log2(e) times the scale of scores, of one block, the future at minus infinity."""
    s = tl.dot(q, tl.trans(k)) * scale
    if DIAGONAL:
        s = tl.where((q_at[:, None] >= k_at[None, :]) & (k_at < T)[None, :], s, float("-inf"))
    return s


@triton.jit
def _attend(acc, top, weight, q, k, v, q_at, k_at, T, scale, DIAGONAL: tl.constexpr):  # type: ignore[no-untyped-def]
    """One more block of keys and values, against the running maximum (online softmax, Milakov & Gimelshein 2018)."""
    s = _scores(q, k, q_at, k_at, T, scale, DIAGONAL)
    higher = tl.maximum(top, tl.max(s, 1))
    p = tl.exp2(s - higher[:, None])
    shrink = tl.exp2(top - higher)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
    return acc, higher, weight * shrink + tl.sum(p, 1)


@triton.jit
def _attention_forward_kernel(  # type: ignore[no-untyped-def]
    qkv, y, lse, T, scale, H: tl.constexpr, HD: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    block, bh = tl.program_id(0), tl.program_id(1)
    b, h = (bh // H).to(tl.int64), bh % H
    step = 3 * H * HD
    base = qkv + b * T * step + h * HD
    d = tl.arange(0, HD)
    q_at = block * M + tl.arange(0, M)
    q = tl.load(base + q_at[:, None] * step + d[None, :], mask=(q_at < T)[:, None], other=0.0)
    top = tl.full((M,), float("-inf"), tl.float32)
    weight = tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, HD), tl.float32)
    for start in range(0, block * M, N):
        k_at = start + tl.arange(0, N)
        k = tl.load(base + H * HD + k_at[:, None] * step + d[None, :])
        v = tl.load(base + 2 * H * HD + k_at[:, None] * step + d[None, :])
        acc, top, weight = _attend(acc, top, weight, q, k, v, q_at, k_at, T, scale, False)
    for start in range(block * M, block * M + M, N):
        k_at = start + tl.arange(0, N)
        there = (k_at < T)[:, None]
        k = tl.load(base + H * HD + k_at[:, None] * step + d[None, :], mask=there, other=0.0)
        v = tl.load(base + 2 * H * HD + k_at[:, None] * step + d[None, :], mask=there, other=0.0)
        acc, top, weight = _attend(acc, top, weight, q, k, v, q_at, k_at, T, scale, True)
    out = (acc / weight[:, None]).to(y.dtype.element_ty)
    tl.store(y + (b * T + q_at[:, None]) * (H * HD) + h * HD + d[None, :], out, mask=(q_at < T)[:, None])
    tl.store(lse + bh.to(tl.int64) * T + q_at, top + tl.log2(weight), mask=q_at < T)


@triton.jit
def _attention_dot_kernel(dy, y, dot, T, H: tl.constexpr, HD: tl.constexpr, M: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum over d of dy y, for every query and head."""
    block, bh = tl.program_id(0), tl.program_id(1)
    b, h = (bh // H).to(tl.int64), bh % H
    q_at = block * M + tl.arange(0, M)
    at = (b * T + q_at[:, None]) * (H * HD) + h * HD + tl.arange(0, HD)[None, :]
    mask = (q_at < T)[:, None]
    product = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32) * tl.load(y + at, mask=mask, other=0.0).to(
        tl.float32
    )
    tl.store(dot + bh.to(tl.int64) * T + q_at, tl.sum(product, 1), mask=q_at < T)


@triton.jit
def _key_block(  # type: ignore[no-untyped-def]
    dk, dv, k, v, k_at, base, dy_base, lse, dot, start, T, scale, step, y_step, HD: tl.constexpr, M: tl.constexpr,
    DIAGONAL: tl.constexpr,
):  # fmt: skip
    """What one block of queries adds to the gradients of a block of keys and values."""
    d = tl.arange(0, HD)
    q_at = start + tl.arange(0, M)
    there = q_at < T
    q = tl.load(base + q_at[:, None] * step + d[None, :], mask=there[:, None], other=0.0)
    dy = tl.load(dy_base + q_at[:, None] * y_step + d[None, :], mask=there[:, None], other=0.0)
    top = tl.load(lse + q_at, mask=there, other=float("inf"))
    s = tl.dot(k, tl.trans(q)) * scale  # [keys, queries]
    if DIAGONAL:
        s = tl.where(q_at[None, :] >= k_at[:, None], s, float("-inf"))
    p = tl.exp2(s - top[None, :])
    dv = tl.dot(p.to(dy.dtype), dy, dv)
    dp = tl.dot(v, tl.trans(dy))
    ds = p * (dp - tl.load(dot + q_at, mask=there, other=0.0)[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk)
    return dk, dv


@triton.jit
def _query_block(  # type: ignore[no-untyped-def]
    dq, q, dy, top, dot, q_at, base, start, T, scale, step, H: tl.constexpr, HD: tl.constexpr, N: tl.constexpr,
    DIAGONAL: tl.constexpr,
):  # fmt: skip
    """What one block of keys adds to the gradient of a block of queries."""
    d = tl.arange(0, HD)
    k_at = start + tl.arange(0, N)
    there = (k_at < T)[:, None]
    k = tl.load(base + H * HD + k_at[:, None] * step + d[None, :], mask=there, other=0.0)
    v = tl.load(base + 2 * H * HD + k_at[:, None] * step + d[None, :], mask=there, other=0.0)
    s = _scores(q, k, q_at, k_at, T, scale, DIAGONAL)
    p = tl.exp2(s - top[:, None])
    dp = tl.dot(dy, tl.trans(v))
    ds = p * (dp - dot[:, None])
    return tl.dot(ds.to(k.dtype), k, dq)


@triton.jit
def _attention_backward_kernel(  # type: ignore[no-untyped-def]
    qkv, dy, lse, dot, dqkv, T, scale, slope, H: tl.constexpr, HD: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    """The gradient of one block of keys and values, then that of the block of queries at the same place.

    M positions a program, taken N at a time against the other side.
    """
    block, bh = tl.program_id(0), tl.program_id(1)
    b, h = (bh // H).to(tl.int64), bh % H
    step, y_step = 3 * H * HD, H * HD
    base = qkv + b * T * step + h * HD
    out = dqkv + b * T * step + h * HD
    dy_base = dy + b * T * y_step + h * HD
    lse += bh.to(tl.int64) * T
    dot += bh.to(tl.int64) * T
    d = tl.arange(0, HD)
    at = block * M + tl.arange(0, M)
    there = (at < T)[:, None]
    place = at[:, None] * step + d[None, :]

    k = tl.load(base + H * HD + place, mask=there, other=0.0)
    v = tl.load(base + 2 * H * HD + place, mask=there, other=0.0)
    dk, dv = tl.zeros((M, HD), tl.float32), tl.zeros((M, HD), tl.float32)
    for start in range(block * M, block * M + M, N):
        dk, dv = _key_block(dk, dv, k, v, at, base, dy_base, lse, dot, start, T, scale, step, y_step, HD, N, True)
    for start in range(block * M + M, T, N):
        dk, dv = _key_block(dk, dv, k, v, at, base, dy_base, lse, dot, start, T, scale, step, y_step, HD, N, False)
    tl.store(out + H * HD + place, (dk * slope).to(dqkv.dtype.element_ty), mask=there)
    tl.store(out + 2 * H * HD + place, dv.to(dqkv.dtype.element_ty), mask=there)

    q = tl.load(base + place, mask=there, other=0.0)
    dy_t = tl.load(dy_base + at[:, None] * y_step + d[None, :], mask=there, other=0.0)
    top = tl.load(lse + at, mask=at < T, other=float("inf"))
    dot_t = tl.load(dot + at, mask=at < T, other=0.0)
    dq = tl.zeros((M, HD), tl.float32)
    for start in range(0, block * M, N):
        dq = _query_block(dq, q, dy_t, top, dot_t, at, base, start, T, scale, step, H, HD, N, False)
    for start in range(block * M, block * M + M, N):
        dq = _query_block(dq, q, dy_t, top, dot_t, at, base, start, T, scale, step, H, HD, N, True)
    tl.store(out + place, (dq * slope).to(dqkv.dtype.element_ty), mask=there)


def attention_forward(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention of packed BF16 qkv [B, T, 3, H, d] -> y [B, T, H, d] BF16, base-2 log sums of scores [B, H, T] FP32.

    Scores are q k `scale`.
    """
    B, T, _, H, HD = qkv.shape
    y = qkv.new_empty(B, T, H, HD)
    lse = qkv.new_empty(B, H, T, dtype=torch.float32)
    _attention_forward_kernel[(triton.cdiv(T, BLOCK), B * H)](
        qkv, y, lse, T, LOG2_E * scale, H, HD, BLOCK, BLOCK, num_warps=4, num_stages=3
    )
    return y, lse


def attention_backward(dy: Tensor, qkv: Tensor, y: Tensor, lse: Tensor, scale: float) -> Tensor:
    """The gradient of `attention_forward` in qkv, packed alike, BF16."""
    B, T, _, H, HD = qkv.shape
    dy, dot = dy.contiguous(), torch.empty_like(lse)
    _attention_dot_kernel[(triton.cdiv(T, DOT_BLOCK), B * H)](dy, y, dot, T, H, HD, DOT_BLOCK)
    dqkv = torch.empty_like(qkv)
    _attention_backward_kernel[(triton.cdiv(T, BLOCK), B * H)](
        qkv, dy, lse, dot, dqkv, T, LOG2_E * scale, scale, H, HD, BLOCK, BLOCK,
        num_warps=4, num_stages=1,
    )  # fmt: skip
    return dqkv
