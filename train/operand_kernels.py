"""Operands rounded by scaled formats, in Triton: both of an activation's, or of a gradient's, in one pass over it.

A tensor [M, K] enters two products. One contracts K, and takes it with groups of elements along K; the other contracts M, and
takes it with groups along M. The plain form, `formats.factored.quantize_factored`, reads it once for each and once more for the
scales; here a program holds a tile of whole groups either way, finds both kinds of scales in it and writes both results. The same
bits: `rounding_kernels` has the steps.

NVFP4 and formats scaled per tensor need the tensor's amax first: `amax`, of a tensor and of its rotation in one pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.rounding_kernels import ROTATED, in_doubt, rotate, taken

if TYPE_CHECKING:
    from train.scaled_layers import Elements

# Rows and columns of a tile, warps, by the size of a group up to which they serve: the quickest on an H100 of those tried.
TILES = {32: (32, 128, 4), 64: (64, 64, 4), 128: (128, 128, 8)}
# By how much an FP32 quotient may leave a stochastic decision in doubt, in 2^-23 of an element's spacing, times 2^M: wrong by at
# most 3 * 2^-23 of itself, and below 2^(M+1) spacings, it moves a share by less than 6, its own rounding by 1 more.
DOUBT = 16
AMAX_TILE, AMAX_ROWS = (32, 128), 256  # a step's rows and columns, rows a program


@triton.jit
def _take_tile(  # type: ignore[no-untyped-def]
    tile, r, doubts, x, values_k, values_m, factor_k, factor_m, scale_k, scale_m, seed_k, seed_m, signs, M, K,
    HAS_K: tl.constexpr, HAS_M: tl.constexpr, STOCHASTIC_K: tl.constexpr, STOCHASTIC_M: tl.constexpr, TURNED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, THRESHOLD: tl.constexpr,
    OFFSET: tl.constexpr, LARGEST: tl.constexpr, P: tl.constexpr, LIMIT: tl.constexpr, MAX_BITS: tl.constexpr,
    NORMAL_BITS: tl.constexpr, MAGIC: tl.constexpr, QUANTUM: tl.constexpr, WIDE_MAX: tl.constexpr, WIDE_NORMAL: tl.constexpr,
    DOUBT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A tile of ROWS x COLUMNS, whole groups either way. TURNED: what is rounded along M is the rotated tensor.

    DOUBT: not 0 where decisions may be in doubt, of which `doubts`, [R, 2, tiles], tells for each side.
    """
    across = tl.cdiv(K, COLUMNS)
    row, column = (tile // across) * ROWS, (tile % across) * COLUMNS
    m, k = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    mask = (m < M)[:, None] & (k < K)[None, :]
    index = m[:, None] * K + k[None, :]
    base = r * M * K
    x_t = tl.load(x + base + index, mask=mask, other=0.0).to(tl.float32)
    seed, given = 0, 0.0
    if HAS_K:
        if SCALE == "tensor" or SCALE == "e4m3fn":
            given = tl.full((1, 1, 1), 1.0, tl.float32) * tl.load(scale_k + r)
        if STOCHASTIC_K:
            seed = tl.load(seed_k + r)
        value, group, decides = taken(
            tl.reshape(x_t, (ROWS, COLUMNS // GROUP, GROUP)), tl.reshape(index, (ROWS, COLUMNS // GROUP, GROUP)),
            given, seed, 2, SCALE, STOCHASTIC_K, THRESHOLD, OFFSET, LARGEST, P, LIMIT, MAX_BITS, NORMAL_BITS, MAGIC,
            QUANTUM, WIDE_MAX, WIDE_NORMAL, EXACT,
        )  # fmt: skip
        if DOUBT != 0 and STOCHASTIC_K:
            tl.store(doubts + r * 2 * tl.num_programs(0) + tile, in_doubt(decides, DOUBT))
        value = tl.reshape(value, (ROWS, COLUMNS)).to(values_k.dtype.element_ty)
        tl.store(values_k + base + index, value, mask=mask)
        if SCALE == "fp32":
            g = column // GROUP + tl.arange(0, COLUMNS // GROUP)
            groups = K // GROUP
            at = factor_k + r * M * groups + m[:, None] * groups + g[None, :]
            there = (m < M)[:, None] & (g < groups)[None, :]
            tl.store(at, tl.reshape(group, (ROWS, COLUMNS // GROUP)), mask=there)
    if HAS_M:
        if TURNED:
            x_t = rotate(x_t, signs + r * ROTATED, ROWS, COLUMNS)
        if SCALE == "tensor" or SCALE == "e4m3fn":
            given = tl.full((1, 1, 1), 1.0, tl.float32) * tl.load(scale_m + r)
        if STOCHASTIC_M:
            seed = tl.load(seed_m + r)
        value, group, decides = taken(
            tl.reshape(x_t, (ROWS // GROUP, GROUP, COLUMNS)), tl.reshape(index, (ROWS // GROUP, GROUP, COLUMNS)),
            given, seed, 1, SCALE, STOCHASTIC_M, THRESHOLD, OFFSET, LARGEST, P, LIMIT, MAX_BITS, NORMAL_BITS, MAGIC,
            QUANTUM, WIDE_MAX, WIDE_NORMAL, EXACT,
        )  # fmt: skip
        if DOUBT != 0 and STOCHASTIC_M:
            tl.store(doubts + (r * 2 + 1) * tl.num_programs(0) + tile, in_doubt(decides, DOUBT))
        value = tl.reshape(value, (ROWS, COLUMNS)).to(values_m.dtype.element_ty)
        tl.store(values_m + base + index, value, mask=mask)
        if SCALE == "fp32":
            g = row // GROUP + tl.arange(0, ROWS // GROUP)
            groups = M // GROUP
            at = factor_m + r * groups * K + g[:, None] * K + k[None, :]
            there = (g < groups)[:, None] & (k < K)[None, :]
            tl.store(at, tl.reshape(group, (ROWS // GROUP, COLUMNS)), mask=there)


@triton.jit
def _take_kernel(  # type: ignore[no-untyped-def]
    doubts, x, values_k, values_m, factor_k, factor_m, scale_k, scale_m, seed_k, seed_m, signs, M, K,
    HAS_K: tl.constexpr, HAS_M: tl.constexpr, STOCHASTIC_K: tl.constexpr, STOCHASTIC_M: tl.constexpr, TURNED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, THRESHOLD: tl.constexpr,
    OFFSET: tl.constexpr, LARGEST: tl.constexpr, P: tl.constexpr, LIMIT: tl.constexpr, MAX_BITS: tl.constexpr,
    NORMAL_BITS: tl.constexpr, MAGIC: tl.constexpr, QUANTUM: tl.constexpr, WIDE_MAX: tl.constexpr, WIDE_NORMAL: tl.constexpr,
    DOUBT: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """All tiles; or, AGAIN, those that were left in doubt, in FP64."""
    tile, r = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if AGAIN:
        doubt = 0
        if STOCHASTIC_K:
            doubt += tl.load(doubts + r * 2 * tl.num_programs(0) + tile)
        if STOCHASTIC_M:
            doubt += tl.load(doubts + (r * 2 + 1) * tl.num_programs(0) + tile)
        if doubt > 0:
            _take_tile(
                tile, r, doubts, x, values_k, values_m, factor_k, factor_m, scale_k, scale_m, seed_k, seed_m, signs, M,
                K, HAS_K, HAS_M, STOCHASTIC_K, STOCHASTIC_M, TURNED, ROWS, COLUMNS, GROUP, SCALE, THRESHOLD, OFFSET,
                LARGEST, P, LIMIT, MAX_BITS, NORMAL_BITS, MAGIC, QUANTUM, WIDE_MAX, WIDE_NORMAL, 0, True,
            )  # fmt: skip
    else:
        _take_tile(
            tile, r, doubts, x, values_k, values_m, factor_k, factor_m, scale_k, scale_m, seed_k, seed_m, signs, M, K,
            HAS_K, HAS_M, STOCHASTIC_K, STOCHASTIC_M, TURNED, ROWS, COLUMNS, GROUP, SCALE, THRESHOLD, OFFSET, LARGEST,
            P, LIMIT, MAX_BITS, NORMAL_BITS, MAGIC, QUANTUM, WIDE_MAX, WIDE_NORMAL, DOUBT, False,
        )  # fmt: skip


def take_both(
    x: Tensor, elements: Elements, along_k: bool, along_m: bool, scale_k: Tensor | None, scale_m: Tensor | None,
    seed_k: Tensor | None, seed_m: Tensor | None, signs: Tensor | None, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(values for the product along K, values for that along M, factors of the one, factors of the other), empty where not asked.

    x [R, M, K] BF16 or FP32, M and K multiples of the group, M K below 2^31. Values [R, M, K] in dtype; factors, where the
    format has FP32 ones that come from groups, [R, M, K / n] and [R, M / n, K]. scale_k, scale_m: FP32 [R], the tensor's scale,
    where the format has one. seed_k, seed_m: int64 [R]; without one a side is rounded to nearest even. signs: FP32 [R, 16], for a
    rotation of what is rounded along M.
    """
    x = x.contiguous()
    R, M, K = x.shape
    group = elements.group
    there = (along_k, along_m)
    values = [torch.empty(x.shape if it else (0,), dtype=dtype, device=x.device) for it in there]
    has_factors = elements.scale == "fp32"
    shapes = ((R, M, K // group), (R, M // group, K))
    factors = [
        torch.empty(shape if it and has_factors else (0,), dtype=torch.float32, device=x.device)
        for shape, it in zip(shapes, there, strict=True)
    ]
    rows, columns, warps = next(tile for size, tile in TILES.items() if group <= size)
    stochastic = (along_k and seed_k is not None, along_m and seed_m is not None)
    grid = (triton.cdiv(M, rows) * triton.cdiv(K, columns), R)
    doubt = DOUBT << (23 - elements.magic) if any(stochastic) and elements.scale != "e8m0fnu" else 0
    doubts = torch.empty((R, 2, grid[0]) if doubt else (0,), dtype=torch.int32, device=x.device)
    args = (doubts, x, *values, *factors, scale_k, scale_m, seed_k, seed_m, signs, M, K)
    constants = (*there, *stochastic, signs is not None, rows, columns, *elements, doubt)
    _take_kernel[grid](*args, *constants, False, num_warps=warps)
    if doubt:
        _take_kernel[grid](*args, *constants, True, num_warps=2 * warps)
    return values[0], values[1], factors[0], factors[1]


@triton.jit
def _amax_kernel(  # type: ignore[no-untyped-def]
    x, signs, partial, M, K,
    TURNED: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(1).to(tl.int64)
    across = tl.cdiv(K, COLUMNS)
    tile = tl.program_id(0)
    k = (tile % across) * COLUMNS + tl.arange(0, COLUMNS)
    first = (tile // across) * (ROWS * STEPS)
    largest = tl.zeros((ROWS, COLUMNS), tl.int32)
    turned = tl.zeros((ROWS, COLUMNS), tl.int32)
    for step in range(0, STEPS):
        m = first + step * ROWS + tl.arange(0, ROWS)
        at = m.to(tl.int64)[:, None] * K + k[None, :]
        x_t = tl.load(x + r * M * K + at, mask=(m < M)[:, None] & (k < K)[None, :], other=0.0).to(tl.float32)
        largest = tl.maximum(largest, x_t.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        if TURNED:
            x_t = rotate(x_t, signs + r * ROTATED, ROWS, COLUMNS)
            turned = tl.maximum(turned, x_t.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    parts = tl.num_programs(0)
    tl.store(partial + r * 2 * parts + tile, tl.max(tl.max(largest, 1), 0))
    if TURNED:
        tl.store(partial + (r * 2 + 1) * parts + tile, tl.max(tl.max(turned, 1), 0))


def amax(x: Tensor, signs: Tensor | None) -> Tensor:
    """[R, 2] FP32: the largest magnitude of each run's x [R, M, K], and of x with blocks of 16 rows rotated where signs [R, 16]
    are given, else the same again. M is then a multiple of 16. As `formats.tensor_amax`: NaN wins, then inf.
    """
    x = x.contiguous()
    R, M, K = x.shape
    rows, columns = AMAX_TILE
    parts = triton.cdiv(M, AMAX_ROWS) * triton.cdiv(K, columns)
    partial = torch.empty(R, 2, parts, dtype=torch.int32, device=x.device)
    _amax_kernel[(parts, R)](x, signs, partial, M, K, signs is not None, AMAX_ROWS // rows, rows, columns, num_warps=4)
    if signs is None:
        return partial[:, :1].amax(-1).view(torch.float32).expand(R, 2).contiguous()
    return partial.amax(-1).view(torch.float32)
