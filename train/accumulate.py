"""How a product's sums are formed: in short chunks and a narrow accumulator, as hardware does, where FP32 would be kinder.

Rounding the operands to a format leaves a product's sums as wide as FP32's. FP8 tensor cores sum shorter, and an `Accumulation`
says how. K products x_k w_k are taken `chunk` at a time, in order; with a the accumulator, zero at first, a chunk makes it

    a <- R_p(a + sum_k x_k w_k)                                                          the chunk summed exactly, or
    a <- R_p([a]_T + sum_k [x_k w_k]_T),   [v]_T = 2^(T-F) trunc(v / 2^(T-F)),           aligned to F fraction bits,
                                           T = max(e(a), e(x_k) + e(w_k) for the chunk's k whose product is not zero)

R_p rounds once to p significant bits, toward zero or to nearest even, with FP32's exponents (the format e8m{p-1}). e(v) is the
exponent of v = 1.m 2^e, of a subnormal the smallest normal's; so 1.5 · 1.5 = 2.25 aligns as 2^0. Where sums are promoted, each
run of `promote` products has an accumulator of its own, which an FP32 total takes up: t <- RN_24(t + a), a <- 0.

What an FP8 wgmma of Hopper does is the aligned form with chunk 32, F 13, p 14, toward zero: DeepSeek-V3's report (2412.19437,
3.3.2 and 3.5.2) saw 14 bits and a sum aligned by the largest exponent; Xie et al. (2511.10909, "MMA-Sim") and Khattak and
Mikaitis (2512.07004) have models that agree with the hardware bit for bit, the first with just these numbers. Without fast
accumulation cuBLAS and CUTLASS promote every 128 products.

What is exact. Everything is FP64 until R_p. A product has 48 bits at most. Aligned terms are integers in units of 2^(T-F), below
2^(F+2), so that 4,096 of them with F <= 30 stay below 2^45: exact, in whatever order they are added. Exact chunk sums are
multiples of the operands' quanta: 2^-18 for e4m3fn twice, with sums below 2^17.7 K, so 36 + log2 K of 53 bits. Operands with
wider exponents can exceed 53 bits; then FP64's own rounding, 2^-53, comes before R_p.
"""

from __future__ import annotations

import torch
from torch import Tensor

from formats import FormatParameters, quantize
from train.sums import NAMED as NAMED
from train.sums import Accumulation as Accumulation
from train.sums import parse_accumulation as parse_accumulation

# Products of a chunk in memory at a time, in elements of FP64: a CPU's fit its cache, which is five times as fast.
BLOCK = {"cpu": 2**18, "cuda": 2**24}
ABSENT, LOWEST, HIGHEST = -600, -400, 300  # exponents: of a zero, and the ends between which those of products lie
FP64_BIAS, FP64_FRACTION = 1023, 52


def smallest_normals(parameters: FormatParameters) -> Tensor:
    """The smallest normal number of each format, FP32, shaped as the parameters are: no operand has a smaller exponent."""
    return parameters.subnormals_below.view(torch.float32).clamp_min(2.0**-126)


def accumulated_product(
    x_RSD: Tensor,
    w_RDF: Tensor,
    accumulation: Accumulation,
    x_smallest: Tensor | None = None,
    w_smallest: Tensor | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Each run's x W, [R, S, F] in FP32, summed over D as `accumulation` says (formula and what is exact: this module).

    x and w: operands on their grids, [R, S, D] and [R, D, F], FP32 or narrower. x_smallest and w_smallest: the formats' smallest
    normal numbers, broadcast against them (`smallest_normals`); without them no operand counts as subnormal. start: [R, S, F],
    the result over earlier products, a multiple of `accumulation.step` of them, which this one goes on from. No gradient.
    """
    start = x_RSD.new_zeros(*x_RSD.shape[:2], w_RDF.shape[2], dtype=torch.float32) if start is None else start
    result: Tensor = _accumulated_product(
        x_RSD.detach(), w_RDF.detach(), accumulation.name, x_smallest, w_smallest, start.detach()
    )
    return result


# One operation to the compiler: hundreds of chunks, unrolled, would keep it busy for minutes.
@torch.library.custom_op("exmy::accumulated_product", mutates_args=())
def _accumulated_product(
    x: Tensor, w: Tensor, word: str, x_smallest: Tensor | None, w_smallest: Tensor | None, start: Tensor
) -> Tensor:
    accumulation = parse_accumulation(word)
    assert accumulation is not None
    x, w = x.double(), w.double()
    if accumulation.fraction_bits is None:
        return _sums(x, w, None, None, start, accumulation)
    e_x, e_w = _exponents(x, x_smallest), _exponents(w, w_smallest)
    rows = max(1, BLOCK[x.device.type] // max(1, x.shape[0] * accumulation.chunk * w.shape[2]))
    parts = [
        _sums(x[:, i : i + rows], w, e_x[:, i : i + rows], e_w, start[:, i : i + rows], accumulation)
        for i in range(0, x.shape[1], rows)
    ]
    return torch.cat(parts, 1)


@_accumulated_product.register_fake
def _(
    x: Tensor, w: Tensor, word: str, x_smallest: Tensor | None, w_smallest: Tensor | None, start: Tensor  # noqa: ARG001
) -> Tensor:  # fmt: skip
    return start.new_empty(start.shape)


def _sums(
    x: Tensor, w: Tensor, e_x: Tensor | None, e_w: Tensor | None, start: Tensor, accumulation: Accumulation
) -> Tensor:
    length, chunk, promote = x.shape[2], accumulation.chunk, accumulation.promote
    register, rounding = f"e8m{accumulation.significand_bits - 1}", accumulation.rounding.value
    total, a = start, torch.zeros_like(start, dtype=torch.float64) if promote else start.double()
    for k in range(0, length, chunk):
        end = min(k + chunk, length)
        if e_x is None or e_w is None or accumulation.fraction_bits is None:
            a = a + torch.bmm(x[:, :, k:end], w[:, k:end])
        else:
            a = _aligned_sum(
                a, x[:, :, k:end], w[:, k:end], e_x[:, :, k:end], e_w[:, k:end], accumulation.fraction_bits
            )
        a = quantize(a, register, rounding, "nonsaturating")
        if promote and (end % promote == 0 or end == length):
            total, a = total + a.float(), torch.zeros_like(a)
    return total if promote else a.float()


def _aligned_sum(a: Tensor, x: Tensor, w: Tensor, e_x: Tensor, e_w: Tensor, fraction_bits: int) -> Tensor:
    """[a]_T + sum_k [x_k w_k]_T, exact: a [R, S, F], x [R, S, c], w [R, c, F], exponents as x and w."""
    top = (e_x[..., None] + e_w[:, None]).amax(2)
    top = torch.maximum(top, _exponents(a, None)).clamp(LOWEST, HIGHEST)
    per_unit = _power_of_two(fraction_bits - top)
    terms = (x[..., None] * w[:, None] * per_unit[:, :, None]).trunc().sum(2)
    return (terms + (a * per_unit).trunc()) * _power_of_two(top - fraction_bits)


def _exponents(x: Tensor, smallest: Tensor | None) -> Tensor:
    """e(x) of FP64 numbers that FP32 holds, int32; `ABSENT` for zeros."""
    magnitude = x.abs() if smallest is None else torch.maximum(x.abs(), smallest.double())
    exponent = (magnitude.view(torch.int64) >> FP64_FRACTION) - FP64_BIAS
    return torch.where(x == 0, ABSENT, exponent).to(torch.int32)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in FP64, exactly, for what is normal there."""
    return ((exponent.to(torch.int64) + FP64_BIAS) << FP64_FRACTION).view(torch.float64)
