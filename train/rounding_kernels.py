"""The steps of rounding to scaled formats, as functions that Triton's kernels call: the same bits as the plain forms.

`formats.scale_arithmetic` tells what makes scales and quotients right, `formats.bitwise` the same of stochastic rounding,
`formats.random_bits` has the random bits and `train.hadamard` the rotation. What stands here are their steps, line for line, on
int32 patterns of FP32 and int64 ones of FP64. A contraction of a product and a sum to a fused multiply-add changes nothing: every
such product is exact.

Stochastic rounding of a quotient x / S, S no power of two, is defined from FP64, to 48 bits. That costs as much as all else does.
But an element is one of two, and share + random >= 2^23 says which, both integers. In FP32 a quotient has a share that
is wrong by less than a known `doubt`; only where the sum is nearer than that to a multiple of 2^23 can it decide otherwise. So
`taken` decides in FP32 and gives the sums, and the few tiles with a decision `in_doubt` (of 4,096 elements of FP4 one in 30) are
done again in FP64.
"""

from __future__ import annotations

import triton
import triton.language as tl

ROTATED = tl.constexpr(16)  # the size of rotations, NVIDIA's (2509.25149, section 4.2)
INFINITY = tl.constexpr(0x7F800000)
NAN = tl.constexpr(0x7FC00000)
SMALLEST_NORMAL = tl.constexpr(0x00800000)
HALF_OF_SMALLEST_NORMAL = tl.constexpr(0x00400000)
# E4M3, of NVFP4's scales: FP32 patterns of 448, 2^-6 and 2^-9; the shift of `round_to_element`.
SCALE_MAX, SCALE_NORMAL, SCALE_SMALLEST = tl.constexpr(0x43E00000), tl.constexpr(0x3C800000), tl.constexpr(0x3B000000)
SCALE_MAGIC = tl.constexpr(20)
RANDOM_BITS = tl.constexpr(23)


@triton.jit
def _keys(seed):  # type: ignore[no-untyped-def]
    """`formats.random_bits`' splitmix64, in wrapping int64."""
    z = seed + -7046029254386353131
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    z = z ^ ((z >> 31) & 0x1FFFFFFFF)
    return z.to(tl.int32), (z >> 32).to(tl.int32)


@triton.jit
def _random(index, k0, k1):  # type: ignore[no-untyped-def]
    """23 random bits of each element."""
    h = (index ^ k0) * 0x21F0AAAD
    h = (h ^ ((h >> 16) & 0xFFFF)) + k1
    h = h * 0x735A2D97
    h = (h ^ ((h >> 15) & 0x1FFFF)) * 0x2C1B3C6D
    return (h >> 9) & 0x7FFFFF


@triton.jit
def _power_bits(exponent):  # type: ignore[no-untyped-def]
    return tl.where(exponent == -127, HALF_OF_SMALLEST_NORMAL, (exponent + 127) << 23)


@triton.jit
def _power_of_two_scale(amax, THRESHOLD: tl.constexpr, OFFSET: tl.constexpr):  # type: ignore[no-untyped-def]
    """An E8M0 scale and its inverse."""
    coded = tl.where(amax < SMALLEST_NORMAL, amax << 1, amax + SMALLEST_NORMAL)
    exponent = ((coded - THRESHOLD) >> 23) - (127 + OFFSET)
    exponent = tl.minimum(tl.maximum(exponent, -127), 127)
    scale = tl.where(amax < INFINITY, _power_bits(exponent), NAN)
    inverse = tl.where(amax < INFINITY, _power_bits(-exponent), NAN)
    return scale.to(tl.float32, bitcast=True), inverse.to(tl.float32, bitcast=True)


@triton.jit
def _fp32_scale(amax, LARGEST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Amax / largest, rounded once. A quotient serves as well as the product with an inverse: both are right to 2^-51."""
    wide = amax.to(tl.float32, bitcast=True).to(tl.float64) / tl.full((1, 1, 1), LARGEST, tl.float64)
    snapped = (wide.to(tl.int64, bitcast=True) + 4096) & -8192
    pattern = snapped.to(tl.float64, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True)
    pattern = tl.minimum(tl.maximum(pattern, 1), INFINITY - 1)
    return tl.where(amax < INFINITY, pattern, NAN).to(tl.float32, bitcast=True)


@triton.jit
def _split(t):  # type: ignore[no-untyped-def]
    """A scale's frame, and what it is in it, cut in two."""
    field = t.to(tl.int32, bitcast=True) >> 23
    frame = (tl.minimum(tl.maximum(254 - field, 1), 227) << 23).to(tl.float32, bitcast=True)
    framed = t * frame
    high = (framed.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
    return frame, high, framed - high


@triton.jit
def _quotient(a, frame, high, low):  # type: ignore[no-untyped-def]
    """A / S, wrong by 3 * 2^-23 of itself at most: Triton divides to two units in the last place, all else rounds once."""
    return (a * frame) * (1.0 / (high + low))


@triton.jit
def _nudged_quotient(a, frame, high, low, P: tl.constexpr, LIMIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """A number that rounds to the element as a / S does. high, low: of S, times the short factor."""
    DROP: tl.constexpr = 24 - P
    x = a * frame
    pattern = tl.minimum(_quotient(a, frame, high, low).to(tl.int32, bitcast=True), LIMIT)
    m = (pattern + (1 << (DROP - 1))) & -(1 << DROP)
    multiple = m.to(tl.float32, bitcast=True)
    e = (x - multiple * high) - multiple * low
    nudge = tl.minimum(tl.maximum(e.to(tl.int32, bitcast=True), -1), 1)
    return (m + nudge).to(tl.float32, bitcast=True)


@triton.jit
def _nearest(y, MAX_BITS: tl.constexpr, NORMAL_BITS: tl.constexpr, MAGIC: tl.constexpr):  # type: ignore[no-untyped-def]
    """The element nearest to y >= 0, ties to even, saturating."""
    pattern = tl.minimum(y.to(tl.int32, bitcast=True), MAX_BITS)
    binade = tl.maximum(pattern & INFINITY, NORMAL_BITS)
    c = (binade + (MAGIC << 23)).to(tl.float32, bitcast=True)
    return (pattern.to(tl.float32, bitcast=True) + c) - c


@triton.jit
def _stochastic(  # type: ignore[no-untyped-def]
    y, random, MAX_BITS: tl.constexpr, NORMAL_BITS: tl.constexpr, DROP: tl.constexpr, QUANTUM: tl.constexpr
):
    """stochastic_c of patterns of y >= 0, FP32: with 23 random bits every dropped bit meets one.

    And the sum that decides, modulo 2^23 where it is 0 or more: in 2^-23 of what lies between two elements.
    """
    a = tl.minimum(y, MAX_BITS)
    normal = (a + (random >> (RANDOM_BITS - DROP))) & -(1 << DROP)
    magnitude = a.to(tl.float32, bitcast=True)
    c = QUANTUM * 8388608.0
    below = (magnitude + c) - c
    below = tl.where(below > magnitude, below - QUANTUM, below)
    steps = ((magnitude - below) + QUANTUM).to(tl.int32, bitcast=True)
    steps = steps - tl.full((1, 1, 1), QUANTUM, tl.float32).to(tl.int32, bitcast=True)
    small = tl.where(steps + random >= 8388608, below + QUANTUM, below).to(tl.int32, bitcast=True)
    is_small = a < NORMAL_BITS
    share = tl.where(is_small, steps, a << (RANDOM_BITS - DROP))
    return tl.where(is_small, small, normal).to(tl.float32, bitcast=True), share + random


@triton.jit
def _stochastic_wide(  # type: ignore[no-untyped-def]
    y, random, MAX_BITS: tl.constexpr, NORMAL_BITS: tl.constexpr, DROP: tl.constexpr, QUANTUM: tl.constexpr
):
    """The same of FP64's patterns, of which what lies below the random bits is rounded first; FP32."""
    EXCESS: tl.constexpr = DROP - 23
    wide_random = random.to(tl.int64)
    a = tl.minimum(y, MAX_BITS)
    kept = (a + ((1 << (EXCESS - 1)) - 1) + ((a >> EXCESS) & 1)) & -(1 << EXCESS)
    normal = (kept + (wide_random << EXCESS)) & -(1 << DROP)
    magnitude = a.to(tl.float64, bitcast=True)
    quantum = tl.full((1, 1, 1), QUANTUM, tl.float64)
    c = quantum * tl.full((1, 1, 1), 4503599627370496.0, tl.float64)
    below = (magnitude + c) - c
    below = tl.where(below > magnitude, below - quantum, below)
    base = quantum * tl.full((1, 1, 1), 536870912.0, tl.float64)  # 2^(52 - 23) quanta
    steps = ((magnitude - below) + base).to(tl.int64, bitcast=True) - base.to(tl.int64, bitcast=True)
    away = steps + wide_random >= 8388608
    small = tl.where(away, below + quantum, below)
    return tl.where(a < NORMAL_BITS, small, normal.to(tl.float64, bitcast=True)).to(tl.float32)


@triton.jit
def _wide_quotient(a, s):  # type: ignore[no-untyped-def]
    """The pattern of a / S in FP64, to 48 bits."""
    y = a.to(tl.float64) / s
    return (y.to(tl.int64, bitcast=True) + 16) & -32


@triton.jit
def taken(  # type: ignore[no-untyped-def]
    x, index, given, seed, AXIS: tl.constexpr, SCALE: tl.constexpr, STOCHASTIC: tl.constexpr, THRESHOLD: tl.constexpr,
    OFFSET: tl.constexpr, LARGEST: tl.constexpr, P: tl.constexpr, LIMIT: tl.constexpr, MAX_BITS: tl.constexpr,
    NORMAL_BITS: tl.constexpr, MAGIC: tl.constexpr, QUANTUM: tl.constexpr, WIDE_MAX: tl.constexpr, WIDE_NORMAL: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Values of x, FP32 [a, b, c], the scales of its groups, which lie along AXIS, and what decided, for `in_doubt`.

    given [1, 1, 1]: the tensor's scale. EXACT: stochastic decisions are made in FP64; else in FP32, which leaves some in doubt.
    """
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    a = magnitude.to(tl.float32, bitcast=True)
    if SCALE == "tensor":
        group = given
    else:
        amax = tl.max(magnitude, AXIS, keep_dims=True)
    if SCALE == "e8m0fnu":
        group, inverse = _power_of_two_scale(amax, THRESHOLD, OFFSET)
    if SCALE == "fp32":
        group = _fp32_scale(amax, LARGEST)
    if SCALE == "e4m3fn":
        frame, high, low = _split(given)
        most = tl.full((1, 1, 1), LARGEST, tl.float32)
        ratio = _nudged_quotient(amax.to(tl.float32, bitcast=True), frame, most * high, most * low, 5, SCALE_MAX)
        pattern = _nearest(ratio, SCALE_MAX, SCALE_NORMAL, SCALE_MAGIC).to(tl.int32, bitcast=True)
        pattern = tl.where(amax < INFINITY, tl.maximum(pattern, SCALE_SMALLEST), NAN)
        group = pattern.to(tl.float32, bitcast=True)
        high, low = group * high, group * low
    decides = magnitude
    if STOCHASTIC:
        k0, k1 = _keys(seed)
        random = _random(index, k0, k1)
    if SCALE == "e8m0fnu":
        y = a * inverse
        if STOCHASTIC:
            q, _ = _stochastic(y.to(tl.int32, bitcast=True), random, MAX_BITS, NORMAL_BITS, MAGIC, QUANTUM)
        else:
            q = _nearest(y, MAX_BITS, NORMAL_BITS, MAGIC)
    elif STOCHASTIC and EXACT:
        s = group.to(tl.float64)
        if SCALE == "e4m3fn":
            s = s * given.to(tl.float64)
        q = _stochastic_wide(_wide_quotient(a, s), random, WIDE_MAX, WIDE_NORMAL, 29 + MAGIC, QUANTUM)
    elif STOCHASTIC:
        if SCALE != "e4m3fn":
            frame, high, low = _split(group)
        y = _quotient(a, frame, high, low).to(tl.int32, bitcast=True)
        q, decides = _stochastic(y, random, MAX_BITS, NORMAL_BITS, MAGIC, QUANTUM)
    else:
        if SCALE != "e4m3fn":
            frame, high, low = _split(group)
        q = _nearest(_nudged_quotient(a, frame, high, low, P, LIMIT), MAX_BITS, NORMAL_BITS, MAGIC)
    value = (q.to(tl.int32, bitcast=True) | (bits & -2147483648)).to(tl.float32, bitcast=True)
    if SCALE == "e8m0fnu" or SCALE == "e4m3fn":
        value = value * group
    if SCALE == "tensor":  # x had no part in a scale that was given, so its NaN would be lost
        value = tl.where(magnitude > INFINITY, NAN, value.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    return value, group, decides


@triton.jit
def in_doubt(decides, DOUBT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether any element of [a, b, c] would be another if its quotient were wrong by that much: 1 or 0."""
    close = ((decides + DOUBT) & 0x7FFFFF) < 2 * DOUBT
    return tl.max(tl.max(tl.max(close.to(tl.int32), 2), 1), 0)


@triton.jit
def _stage(x, SIZE: tl.constexpr, INNER: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums and differences of what lies INNER apart, in the place of both."""
    pairs = tl.reshape(x, (SIZE // (2 * INNER), 2, INNER))
    low, high = tl.split(tl.permute(pairs, (0, 2, 1)))
    return tl.permute(tl.join(low + high, low - high), (0, 2, 1))


@triton.jit
def rotate(x, signs, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Blocks of 16 rows rotated: `train.hadamard.rotate` along -2."""
    sign = tl.load(signs + tl.arange(0, ROTATED))
    blocks = tl.reshape(x, (ROWS // ROTATED, ROTATED, COLUMNS)) * sign[None, :, None]
    blocks = _stage(blocks, ROWS * COLUMNS, COLUMNS)
    blocks = _stage(blocks, ROWS * COLUMNS, 2 * COLUMNS)
    blocks = _stage(blocks, ROWS * COLUMNS, 4 * COLUMNS)
    blocks = _stage(blocks, ROWS * COLUMNS, 8 * COLUMNS)
    return tl.reshape(blocks, (ROWS, COLUMNS)) * 0.25
