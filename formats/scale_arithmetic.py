"""The arithmetic of scales on tensors: exact exponents, exact quotients, products rounded once. Nothing here knows of axes.

Magnitudes are FP32 numbers of either view, float or int32 pattern; x travels through FP32 exactly. What must hold, and why:

1. Powers of two (`power_of_two_scale`). With t a threshold on the mantissa, floor(log2(amax)) + (mantissa >= t) is
   ((pattern - t) >> 23) + 1 - bias, an integer operation. Every rule for E8M0 scales is one such t:

       floor    never: t = 2^23             rceil     mantissa > that of largest
       ceil     mantissa > 0: t = 1         nearest   mantissa >= that of 1.5 * largest
       even     mantissa >= 2^23 - 2^(22-M), from where M bits round up to the next binade (a tie goes there too: the mantissa
                below it is all ones, hence odd)

   FP32's subnormals have no leading one. Shifted left by one, those from 2^-127 on do, as a binade with field 1, and all
   others gain 1 in their field. The smaller ones stay at field 0: an exponent of at most -127, where E8M0 ends. Not so where
   the largest element is below 1, so that the exponent is a larger one: there the pattern, as an integer of less than 2^24,
   becomes an FP32 number exactly, which has a leading one, and whose field is 148 more than that of the subnormal.

2. Quotients by powers of two are products with the inverse, 2^-127 included, which FP32 holds as a subnormal. They are
   exact where they are normal; smaller ones lie below 2^-126, far from what an element can tell from 0.

3. Other quotients (`nudged_quotient`): x / S with S = c * t, c short (an E4M3 scale, or 1) and t an FP32 number. What an
   element's rounding can tell apart are the intervals between neighbours of a set D, the numbers of at most p bits: the
   element's values and the middles between them have no more. So any number of the quotient's own interval will do, and a
   point of D itself only for a quotient equal to it. Such a number is

       m   the number of at most p bits nearest to an approximate quotient. An error of less than half a step of D, 2^-(p+1),
           leaves m one of the interval's two ends, so nothing depends on how the approximation was rounded; a division that a
           compiler made two ulps wrong is as good.
       e   x - m * S, with the right sign. S = c * (high + low), t cut after 12 bits. With p + bits(c) <= 12, (m * c) * high and
           (m * c) * low are exact in FP32; so is x - (m * c) * high, of two numbers within a factor 2 of each other (Sterbenz);
           and the last difference has the sign of what it rounds. All products being exact, whether a compiler contracts a
           product and a difference to a fused multiply-add changes nothing.
       m, or the FP32 number next to it, up if e > 0 and down if e < 0. D has no other point so near.

   To keep all of this away from overflow and underflow, x and t are first multiplied by the same power of two (`frame`), which
   brings t into [1, 4), or for t < 2^-100, which is brought up by 2^100, into [2^-49, 1).

4. Rounding to an element (`round_to_element`), nearest even, for y >= 0: with 2^b <= y < 2^(b+1), b at least emin, adding
   c = 2^(b - M + 23) leaves the sum in [c, 2c), where FP32's spacing is the element's, 2^(b - M). So the hardware's
   rounding of the sum is the one wanted, ties by the same parity since c / 2^(b-M) is even, and subtracting c is exact.
   This needs M <= 22, a y that is clamped to the largest value first, and a sign put back afterwards.

5. Products (`product`) element * c * t, rounded once to x's dtype. In FP32 one multiplication of the short element * c by t does.
   BF16 and FP16 would be rounded twice. There the product is cut to 16 bits, and the last of them set if anything was cut off
   (round to odd); the sign of the remainder is found as in 3. 16 bits are at least 2 more than either has, so rounding
   that number rounds the product (Boldo and Melquiond, "When double rounding is odd"), subnormal results included: FP32 holds
   16 bits of anything from BF16's smallest middle, 2^-134, on.

   Elements of more than 12 bits, and 24 have the values of lists, times a 24-bit t are exact in FP64, and cut there
   (`long_product`); so are they times a power of two, where FP32's subnormals would drop bits of theirs.
"""

from math import frexp
from typing import NamedTuple

import torch
from torch import Tensor

MAGNITUDE = 0x7FFFFFFF
INFINITY = 0x7F800000
NAN = 0x7FC00000
SMALLEST_NORMAL = 0x00800000
HALF_OF_SMALLEST_NORMAL = 0x00400000  # 2^-127
HIGH = ~0xFFF  # 12 of the 24 bits of a significand
SIXTEEN_BITS = ~0xFF
SIXTEEN_BITS_OF_FP64 = -1 << 37
SPLIT_BITS = 12


class ElementConstants(NamedTuple):
    """What `round_to_element` needs of a format: two FP32 patterns, and log2 of c over y's binade."""

    max_bits: int
    smallest_normal_bits: int
    magic_shift: int


def power_of_two_scale(amax: Tensor, threshold: int, offset: int) -> tuple[Tensor, Tensor]:
    """The E8M0 scale for amax and its inverse, both FP32.

    amax: int32 patterns of FP32 magnitudes. The exponent is floor(log2(amax)) + (mantissa >= threshold) - offset, clamped
    to [-127, 127]; NaN, twice, where amax is inf or NaN; 2^-127 for a zero.
    """
    small = amax << 1 if offset >= 0 else amax.to(torch.float32).view(torch.int32) - (148 << 23)
    coded = torch.where(amax < SMALLEST_NORMAL, small, amax + SMALLEST_NORMAL)  # bias 128: up to 2^31 - 1
    exponent = torch.clamp(((coded - threshold) >> 23) - (127 + offset), -127, 127)
    finite = amax < INFINITY
    scale = torch.where(finite, _power_bits(exponent), NAN)
    inverse = torch.where(finite, _power_bits(-exponent), NAN)
    return scale.view(torch.float32), inverse.view(torch.float32)


def _power_bits(exponent: Tensor) -> Tensor:
    return torch.where(exponent == -127, HALF_OF_SMALLEST_NORMAL, (exponent + 127) << 23)


class Scale(NamedTuple):
    """S = short * t, as 3 needs it: all FP32, broadcast against x."""

    frame: Tensor  # the power of two by which x is multiplied first
    high: Tensor  # t * frame, cut after 12 bits
    low: Tensor  # the rest of it
    short: Tensor | float  # 1 where the scale is t itself


def fp32_scale(amax: Tensor, largest: float) -> Tensor:
    """The quotient amax / largest, rounded once to FP32, within FP32's positive finite numbers; NaN where amax is inf or NaN.

    amax: int32 patterns of FP32 magnitudes. In FP64 a product with a rounded inverse is right to 2^-51. Where largest has at
    most 12 bits and the quotient is no point d between FP32 numbers, of at most 25 bits, amax and d * largest, of 24 and
    37 bits, differ by 2^-37 of themselves. So to round to 40 bits first moves the product onto d if that is the quotient, and
    across no d if not. For a longer one, of at most 28 bits, the result may be the next number, and is held against the d on
    either side of it: d * largest is exact in FP64.
    """
    exact = amax.view(torch.float32).to(torch.float64)
    wide = exact * (1.0 / largest)
    snapped = ((wide.view(torch.int64) + (1 << 12)) & -(1 << 13)).view(torch.float64).to(torch.float32)
    pattern = snapped.view(torch.int32)
    if frexp(largest)[0] * 2**SPLIT_BITS % 1 != 0:
        pattern = torch.clamp(pattern, 0, INFINITY - 1)
        above, below = _middle(pattern, pattern + 1) * largest, _middle(pattern, torch.clamp(pattern - 1, 0)) * largest
        is_odd = (pattern & 1) == 1
        up, down = (exact > above) | (exact == above) & is_odd, (exact < below) | (exact == below) & is_odd
        pattern = pattern + up.to(torch.int32) - down.to(torch.int32)
    pattern = torch.clamp(pattern, 1, INFINITY - 1)
    return torch.where(amax < INFINITY, pattern, NAN).view(torch.float32)


def _middle(one: Tensor, other: Tensor) -> Tensor:
    """Halfway between two FP32 patterns, in FP64."""
    return (one.view(torch.float32).to(torch.float64) + other.view(torch.float32).to(torch.float64)) * 0.5


def split_scale(t: Tensor, short: Tensor | float = 1.0) -> Scale:
    """A scale t (FP32, positive, or NaN) in its frame and two halves."""
    field = t.view(torch.int32) >> 23
    frame = (torch.clamp(254 - field, 1, 227) << 23).view(torch.float32)
    framed = t * frame
    high = (framed.view(torch.int32) & HIGH).view(torch.float32)
    return Scale(frame, high, framed - high, short)


def nudged_quotient(a: Tensor, s: Scale, p: int, limit: int) -> Tensor:
    """A number that every deterministic rounding to an element of p - 1 bits takes to where it takes a / S.

    a: FP32, >= 0. p + bits(short) <= 12. limit: pattern of the number of at most p bits, at least the largest element,
    to which larger quotients are cut. FP32, as float; anything where S is NaN.
    """
    x = a * s.frame
    approximate = x * (1.0 / (s.short * (s.high + s.low)))
    pattern = torch.clamp(approximate.view(torch.int32), max=limit)
    drop = 24 - p
    m = (pattern + (1 << (drop - 1))) & -(1 << drop)
    multiple = m.view(torch.float32)
    # c * high and c * low have at most 24 bits, so they are exact, and once a group is enough.
    e = (x - multiple * (s.short * s.high)) - multiple * (s.short * s.low)
    # The sign of a pattern is that of its number, and a difference that is zero is +0.
    return (m + torch.clamp(e.view(torch.int32), -1, 1)).view(torch.float32)


def round_to_element(y: Tensor, p: ElementConstants) -> Tensor:
    """The element's value nearest to y >= 0, ties to even, saturating; FP32. Anything for a NaN."""
    pattern = torch.clamp(y.view(torch.int32), max=p.max_bits)
    binade = torch.clamp(pattern & INFINITY, min=p.smallest_normal_bits)
    c = (binade + (p.magic_shift << 23)).view(torch.float32)
    return (pattern.view(torch.float32) + c) - c


def product(q: Tensor, s: Scale, t: Tensor, dtype: torch.dtype, two_bits: bool = False) -> Tensor:
    """A number that rounds to dtype as the exact product q * S does; FP32. q: magnitudes of elements of at most 12 bits, short as
    in 3.

    two_bits: they have no more than two significant bits, as those of FP4.
    """
    if dtype == torch.float32:
        return (q * s.short) * t
    frame = ((254 << 23) - s.frame.view(torch.int32)).view(torch.float32)
    if not two_bits:
        return _to_odd(q * s.short, s) * frame
    # q is 2^k or 1.5 * 2^k: both significands are multiplied and rounded once a group, and 2^k is exact.
    pattern = q.view(torch.int32)
    whole, half_more = _to_odd(s.short * torch.ones_like(s.high), s), _to_odd(s.short * torch.full_like(s.high, 1.5), s)
    chosen = torch.where((pattern & (1 << 22)) == 0, whole, half_more)
    return chosen * (pattern & INFINITY).view(torch.float32) * frame


def long_product(q: Tensor, t: Tensor) -> Tensor:
    """The same for elements of any length up to 24 bits, and a scale that is t alone."""
    exact = (q.to(torch.float64) * t.to(torch.float64)).view(torch.int64)
    cut = exact & SIXTEEN_BITS_OF_FP64
    return torch.where(exact != cut, cut | -SIXTEEN_BITS_OF_FP64, cut).view(torch.float64).to(torch.float32)


def _to_odd(multiple: Tensor, s: Scale) -> Tensor:
    """The exact multiple * (high + low), framed, rounded to odd at 16 bits."""
    rounded = multiple * (s.high + s.low)
    cut = rounded.view(torch.int32) & SIXTEEN_BITS
    e = (multiple * s.high - cut.view(torch.float32)) + multiple * s.low
    cut = torch.where(e < 0, cut + SIXTEEN_BITS, cut)
    return torch.where(e != 0, cut | -SIXTEEN_BITS, cut).view(torch.float32)
