"""How a carrier's own bit pattern is rounded to a narrower format: a few integer and exact floating-point operations.

With x in the carrier, FP32 or FP64, of m mantissa bits, a = |x| as an integer, and d = m - M the bits to drop:

    1. clamp      a <- min(a, bits of the largest value), where overflow ends there. That value is on the grid and rounding
                  is monotone (for fixed random bits too), so clamping first saturates, inf included, and no later sum can
                  overflow, at the top of E = 8 either.
    2. normal     each mode adds a number below 2^d, or to a tie's parity, and clears the low d bits: nearest_even adds
                  2^(d-1) - 1 + lsb, nearest_away 2^(d-1), a directed mode 2^d - 1 on its side, a stochastic one its random
                  bits, aligned. A carry out of the mantissa lands in the exponent, which is the next binade: codes ascend
                  with values.
    3. subnormal  (|x| + c) - c with c = 2^m quanta, a quantum being 2^(emin - M): the sum lies in [c, 2c), where the
                  carrier's own spacing is one quantum, so the hardware rounds to nearest even and the difference is exact.
                  One quantum less where that went up is toward_zero; what is left, |x| - that, is exact, and decides the
                  other modes. Stochastic: left + c' with c' = 2^(m-N) quanta is left rounded to N bits by the hardware, half to
                  even, as an integer in the sum's low bits, to which the N random bits are added. All integers, and
                  fixed-point numbers, are "subnormal".
    4. beyond     past the largest value: infinity or NaN where overflow says so.
    5. sign, NaN  put back.

Why the corners hold:

    M = 0   the lowest kept bit is the exponent's; the carrier's bias is odd, so it has the parity of our code if ours is odd
            too, and the opposite one if it is even (E = 1 has one binade only, whose one normal value needs no rounding).
    M = m   nothing to drop: a >> 31, which is 0, stands in for lsb, and 0 for 2^(d-1) - 1.
    uniform where emin is the carrier's own, subnormals are the carrier's, equally spaced integers in a: step 2 covers them.
    deep    where emin is below the carrier's, the carrier's subnormals are taken apart: as a fixed-point number for the
            format's own subnormals, and for its normal numbers with an exponent that goes below the carrier's, by converting the
            integer a to the carrier, exactly.
    else    a quantum is at least the carrier's smallest normal number, so whatever is subnormal in it rounds as 0 < x < quantum
            does, decided by integers, and step 3 yields no subnormals of the carrier: flush-to-zero modes change nothing.

No division, no logarithm, no product that rounds: compiled or not, on CPU and GPU, the bits are the same. And the result depends
on x by its sign, exponent, kept bits, guard (the first dropped bit) and sticky (whether any other is set) alone, for every
deterministic mode: steps 2 and 3 compare what is dropped with 0 and with half a quantum, and with nothing else.
"""

from fractions import Fraction
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from formats.integers import IntegerFormat
from formats.overflow import Outcome, outcome
from formats.rounding import Overflow, Rounding
from formats.spec import ElementFormat, FloatFormat


class Carrier(NamedTuple):
    """The type whose bits are worked on: its mantissa bits and smallest exponent, its width, and two patterns.

    `magnitude` is all bits but the sign; `infinity` the pattern of +inf.
    """

    dtype: torch.dtype
    integer: torch.dtype
    mantissa: int
    emin: int
    bits: int
    magnitude: int
    infinity: int


FP32 = Carrier(torch.float32, torch.int32, 23, -126, 32, (1 << 31) - 1, 0xFF << 23)
FP64 = Carrier(torch.float64, torch.int64, 52, -1022, 64, (1 << 63) - 1, 0x7FF << 52)


def pattern(value: Fraction, carrier: Carrier) -> int:
    """The bits of a non-negative number that the carrier holds."""
    kind, integer = (np.float32, np.int32) if carrier.bits == 32 else (np.float64, np.int64)
    number = np.array(float(value), kind)
    if Fraction(float(number)) != value:
        raise ValueError(f"{carrier.dtype} does not hold {value}")
    return int(number.view(integer))


class Constants(NamedTuple):
    """What the steps need of one format, as numbers that the compiler folds into the program.

    max_bits, lowest_bits: patterns of |largest| and |lowest|. lsb_shift, half_less_one, keep_mask: d, 2^(d-1) - 1 and -2^d, and
    stand-ins for d = 0. subnormals_below: the pattern under which step 3 applies. quantum: of step 3. odd_bias: whether the
    lowest kept bit has the code's parity. smallest, smallest_bits: for formats without subnormals, the smallest value, below
    which there is zero or nothing, and its pattern; else 0. deep: whether exponents go below the carrier's; fixed_shift,
    fixed_half, fixed_mask: then, as the three above, of the bits that subnormals drop from the carrier's fixed-point ones.
    """

    max_bits: int
    lowest_bits: int
    lsb_shift: int
    half_less_one: int
    keep_mask: int
    subnormals_below: int
    quantum: float
    odd_bias: bool
    smallest_bits: int
    smallest: float
    deep: bool
    fixed_shift: int
    fixed_half: int
    fixed_mask: int
    signed: bool
    negative_zero: bool
    zero: bool
    ties_away: bool


class Drop(NamedTuple):
    """The low bits to round away: d, 2^(d-1) - 1, -2^d, and whether the lowest kept bit has the code's parity."""

    shift: int
    half_less_one: int
    mask: int
    is_odd: bool


class Parameters(NamedTuple):
    """Those of them that vary among the formats of a batch, as tensors that broadcast against x: see FormatParameters."""

    max_bits: Tensor
    lsb_shift: Tensor
    half_less_one: Tensor
    keep_mask: Tensor
    subnormals_below: Tensor
    quantum: Tensor


class Beyond(NamedTuple):
    """Outcomes past the two ends, for finite values and for infinity."""

    positive: str
    negative: str
    positive_infinity: str
    negative_infinity: str


END, TO_INFINITY = Outcome.END.value, Outcome.INFINITY.value
SATURATED = Beyond(END, END, END, END)


@cache
def outcomes(f: ElementFormat, mode: Rounding, over: Overflow) -> Beyond:
    """The four outcomes for a format. A format that has no next value sends nothing finite beyond its ends."""
    found = [
        outcome(f, mode, over, negative=negative, infinite=infinite).value
        for infinite in (False, True)
        for negative in (False, True)
    ]
    return Beyond(*found)


def fits(f: ElementFormat, carrier: Carrier) -> bool:
    """Whether these steps round to the format in this carrier, which holds its values."""
    if isinstance(f, IntegerFormat):
        return True
    assert isinstance(f, FloatFormat)
    smallest_normal = Fraction(2) ** carrier.emin
    if f.zero and not f.subnormals:
        return f.smallest >= 2 * smallest_normal
    return f.emin <= carrier.emin or Fraction(2) ** (f.emin - f.mantissa_bits) >= smallest_normal


@cache
def constants(f: ElementFormat, carrier: Carrier) -> Constants:
    """The constants of a format in a carrier that it fits."""
    smallest_normal = Fraction(2) ** carrier.emin
    if isinstance(f, IntegerFormat):
        return Constants(
            max_bits=pattern(f.largest, carrier),
            lowest_bits=pattern(-f.lowest, carrier),
            **_dropping(0, carrier),
            subnormals_below=carrier.infinity + 1,
            quantum=float(f.quantum),
            odd_bias=True,
            smallest_bits=0,
            smallest=0.0,
            deep=False,
            **_fixed(0, carrier),
            signed=True,
            negative_zero=False,
            zero=True,
            ties_away=False,
        )
    assert isinstance(f, FloatFormat)
    drop = carrier.mantissa - f.mantissa_bits
    gradual = f.subnormals and f.zero
    quantum = Fraction(2) ** (f.emin - f.mantissa_bits)
    own_subnormals = gradual and f.emin > carrier.emin and quantum >= smallest_normal
    deep = f.emin < carrier.emin
    # The exponent of the carrier's fixed-point subnormals is emin - m.
    fixed_drop = max(0, f.emin - f.mantissa_bits - (carrier.emin - carrier.mantissa)) if gradual else 0
    return Constants(
        max_bits=pattern(f.largest, carrier),
        lowest_bits=pattern(abs(f.lowest), carrier),
        **_dropping(drop, carrier),
        subnormals_below=pattern(Fraction(2) ** f.emin, carrier) if own_subnormals or (deep and gradual) else 0,
        # Where step 3 never applies any number would do, but products with FP32 subnormals slow a CPU down fourfold.
        quantum=float(quantum) if own_subnormals else 1.0,
        odd_bias=f.mantissa_bits > 0 or f.bias % 2 == 1,
        smallest_bits=0 if gradual else pattern(f.smallest, carrier),
        smallest=0.0 if gradual else float(f.smallest),
        deep=deep,
        **_fixed(fixed_drop if deep else 0, carrier),
        signed=f.signed,
        negative_zero=f.has_negative_zero,
        zero=f.zero,
        ties_away=f.ties_away,
    )


def _dropping(d: int, carrier: Carrier) -> dict[str, int]:
    """What stands for dropping d bits: see `Constants`."""
    return {
        "lsb_shift": d if d else carrier.bits - 1,
        "half_less_one": (1 << d >> 1) - 1 if d else 0,
        "keep_mask": -(1 << d),
    }


def _fixed(d: int, carrier: Carrier) -> dict[str, int]:
    return dict(zip(("fixed_shift", "fixed_half", "fixed_mask"), _dropping(d, carrier).values(), strict=True))


def parameters_alone(p: Parameters) -> Constants:
    """Parameters of a batch in the place of constants: of formats that are plain in all that does not vary."""
    return Constants(
        p.max_bits, p.max_bits, p.lsb_shift, p.half_less_one, p.keep_mask, p.subnormals_below, p.quantum,  # type: ignore[arg-type]
        odd_bias=True, smallest_bits=0, smallest=0.0, deep=False, fixed_shift=0, fixed_half=0, fixed_mask=0,
        signed=True, negative_zero=True, zero=True, ties_away=False,
    )  # fmt: skip


def round_bits(
    x: Tensor, carrier: Carrier, p: Constants, mode: str, beyond: Beyond, random: Tensor | None, random_width: int
) -> Tensor:
    """Round x, of the carrier's dtype, by the steps above; `random` are numbers of `random_width` bits."""
    bits = x.view(carrier.integer)
    magnitude = bits & carrier.magnitude
    negative = bits < 0
    if mode == Rounding.NEAREST_EVEN and p.ties_away:
        mode = Rounding.NEAREST_AWAY
    a = _clamped(magnitude, negative, p, beyond)
    aligned = _align(mode, random, random_width)
    if p.deep:
        rounded = _deep(a, negative, p, mode, carrier, *aligned)
    else:
        rounded = _round_normal(a, negative, _normal(p), mode, carrier, *aligned)
    if not p.deep and _has_subnormals(p):
        subnormal = _round_subnormal(a, negative, p, mode, carrier, *aligned)
        rounded = torch.where(a < p.subnormals_below, subnormal, rounded)
    if p.smallest_bits and p.zero:
        lone = _below_smallest(a, negative, p, mode, carrier, random, random_width)
        rounded = torch.where(a < p.smallest_bits, lone, rounded)
    signed = _with_sign(rounded, bits, p, carrier)
    signed = _patched(signed, rounded, magnitude, negative, p, beyond, carrier)
    return torch.where(magnitude > carrier.infinity, bits, signed).view(carrier.dtype)


def _normal(p: Constants) -> Drop:
    return Drop(p.lsb_shift, p.half_less_one, p.keep_mask, p.odd_bias)


def _has_subnormals(p: Constants) -> bool:
    """Whether step 3 may apply; where the pattern varies among the formats of a batch, it may."""
    return not isinstance(p.subnormals_below, int) or p.subnormals_below != 0


def _clamped(magnitude: Tensor, negative: Tensor, p: Constants, beyond: Beyond) -> Tensor:
    """Step 1, on the sides where the outcome for finite values is the end."""
    positive_end, negative_end = beyond.positive == END, beyond.negative == END
    a = magnitude
    if positive_end and negative_end and not _is_lopsided(p):
        a = torch.clamp(a, max=p.max_bits)
    else:
        # The carrier's largest patterns, its NaN, are no limit.
        top = torch.iinfo(magnitude.dtype).max
        low = p.lowest_bits if negative_end else top
        high = p.max_bits if positive_end else top
        a = torch.minimum(a, torch.where(negative, low, high).to(a.dtype))
    return a if p.zero else torch.clamp(a, min=p.smallest_bits)


def _with_sign(rounded: Tensor, bits: Tensor, p: Constants, carrier: Carrier) -> Tensor:
    if not p.signed:
        return rounded
    sign = bits & ~carrier.magnitude
    return rounded | (sign if p.negative_zero else torch.where(rounded == 0, 0, sign))


def _patched(
    signed: Tensor, rounded: Tensor, magnitude: Tensor, negative: Tensor, p: Constants, beyond: Beyond, carrier: Carrier
) -> Tensor:
    """Step 4. Nothing to do where all outcomes are the end: the clamp did it."""
    nan = carrier.infinity | 1 << (carrier.mantissa - 1)
    infinite = magnitude == carrier.infinity
    sides = [
        (beyond.positive, beyond.positive_infinity, ~negative, p.max_bits, False),
        (beyond.negative, beyond.negative_infinity, negative, p.lowest_bits, True),
    ]
    same = beyond.positive == beyond.negative and beyond.positive_infinity == beyond.negative_infinity
    if same and p.signed and not _is_lopsided(p):
        sides = [(beyond.positive, beyond.positive_infinity, torch.ones_like(negative), p.max_bits, False)]
    for finite, infinity, side, limit, is_below in sides:
        past = rounded > limit
        if is_below and not p.signed and not p.zero:
            past = magnitude > 0
        for left, where in ((finite, past & ~infinite), (infinity, infinite)):
            if left == END:
                continue
            pattern_left: int | Tensor = nan
            if left == TO_INFINITY:
                pattern_left = carrier.infinity | (signed & ~carrier.magnitude)
            signed = torch.where(side & where, pattern_left, signed)
    return signed


def _is_lopsided(p: Constants) -> bool:
    if p.max_bits is p.lowest_bits:
        return False
    return isinstance(p.max_bits, Tensor) or p.max_bits != p.lowest_bits


def _align(mode: str, random: Tensor | None, width: int) -> tuple[Tensor | None, int]:
    """Random numbers and their width for the addition: 2 R + 1, of a bit more, in stochastic_b."""
    if random is not None and mode == Rounding.STOCHASTIC_B:
        return 2 * random + 1, width + 1
    return random, width


def _round_normal(
    a: Tensor, negative: Tensor, drop: Drop, mode: str, carrier: Carrier, random: Tensor | None, width: int
) -> Tensor:
    """Step 2: the low bits rounded away."""
    low = ~drop.mask
    if mode == Rounding.NEAREST_EVEN:
        lsb = (a >> drop.shift) & 1
        carry = drop.half_less_one + (lsb if drop.is_odd else 1 - lsb)
        return (a + carry) & drop.mask
    if mode == Rounding.NEAREST_AWAY:
        return (a + ((low + 1) >> 1)) & drop.mask
    if mode == Rounding.TOWARD_ZERO:
        return a & drop.mask
    if mode in (Rounding.TOWARD_POSITIVE, Rounding.TOWARD_NEGATIVE):
        outward = ~negative if mode == Rounding.TOWARD_POSITIVE else negative
        return torch.where(outward, a + low, a) & drop.mask
    if mode == Rounding.TO_ODD:
        lsb = (a >> drop.shift) & 1
        even = (1 - lsb) if drop.is_odd else lsb
        # (rest + 2^d - 1) has bit d set exactly where the rest is not 0.
        return (a & drop.mask) + (((a & low) + low) & (low + 1) & -even)
    assert random is not None
    return _add_random(a, low, drop, mode, carrier, random, width)


def _add_random(a: Tensor, low: int, drop: Drop, mode: str, carrier: Carrier, random: Tensor, width: int) -> Tensor:
    """Add the random bits, aligned to the top of the low bits; for stochastic_c what is below them is rounded first."""
    if isinstance(low, int):
        excess = low.bit_length() - width
        if excess > 0 and mode == Rounding.STOCHASTIC_C:
            a = (a + (1 << excess >> 1) - 1 + ((a >> excess) & 1)) & -(1 << excess)
        return (a + (random << excess if excess > 0 else random >> -excess)) & drop.mask
    # d varies: left-align in all bits but the sign, then shift down to d bits. With d = 0 the mask leaves nothing.
    room = carrier.bits - 1
    if mode == Rounding.STOCHASTIC_C:
        excess = torch.clamp(drop.shift - width, min=0)
        excess = torch.where(low == 0, 0, excess)
        unit = torch.ones_like(excess) << excess
        lsb = ((a >> excess) & 1) & (excess > 0)
        a = (a + ((unit - 1) >> 1) + lsb) & -unit
    aligned = ((random << (room - width)) >> (room - drop.shift)) & low
    return (a + aligned) & drop.mask


def _round_subnormal(
    a: Tensor, negative: Tensor, p: Constants, mode: str, carrier: Carrier, random: Tensor | None, width: int
) -> Tensor:
    """Step 3: the bits of a whole number of quanta."""
    magnitude = a.view(carrier.dtype)
    quantum = p.quantum.to(carrier.dtype) if isinstance(p.quantum, Tensor) else p.quantum
    c = quantum * 2.0**carrier.mantissa
    nearest = (magnitude + c) - c
    if mode == Rounding.NEAREST_EVEN:
        return nearest.view(carrier.integer)
    # Where nearest went up the neighbour below is one quantum less, exactly.
    below = torch.where(nearest > magnitude, nearest - quantum, nearest)
    if mode == Rounding.TOWARD_ZERO:
        return below.view(carrier.integer)
    inexact = below.view(carrier.integer) != a
    if mode == Rounding.NEAREST_AWAY:
        left = magnitude - below
        away = left + left >= quantum
    elif mode == Rounding.TOWARD_POSITIVE:
        away = inexact & ~negative
    elif mode == Rounding.TOWARD_NEGATIVE:
        away = inexact & negative
    elif mode == Rounding.TO_ODD:
        away = inexact & (((below + c).view(carrier.integer) & 1) == 0)
    else:
        assert random is not None
        away = _share_goes_away(magnitude - below, quantum, mode, carrier, random, width)
    return torch.where(away, below + quantum, below).view(carrier.integer)


def _share_goes_away(
    left: Tensor, quantum: "float | Tensor", mode: str, carrier: Carrier, random: Tensor, width: int
) -> Tensor:
    """Whether left, in [0, quantum), plus the random bits reaches a quantum: both as integers of `width` bits."""
    base = quantum * 2.0 ** (carrier.mantissa - width)
    total = left + base
    steps = total.view(carrier.integer)
    if mode in (Rounding.STOCHASTIC_A, Rounding.STOCHASTIC_B):
        steps = steps - (total - base > left).to(carrier.integer)
    # base is a power of two, so its pattern ends in zeros and the steps are counted from it.
    zero_steps = (torch.zeros_like(left) + base).view(carrier.integer)
    return steps - zero_steps + random >= 1 << width


def _deep(
    a: Tensor, negative: Tensor, p: Constants, mode: str, carrier: Carrier, random: Tensor | None, width: int
) -> Tensor:
    """Step 2 and 3 where the format's exponents go below the carrier's."""
    one, lowest_exponent = 1 << carrier.mantissa, carrier.mantissa - carrier.emin
    is_small = a < one
    offset = lowest_exponent * one  # integer a, converted, has this much too large an exponent field
    wide = torch.where(is_small, a.to(carrier.dtype).view(carrier.integer) - offset, a)
    rounded = _round_normal(wide, negative, _normal(p), mode, carrier, random, width)
    as_number = (rounded + offset).view(carrier.dtype)
    back = torch.where(rounded < one, torch.where(is_small, as_number, 0.0).to(carrier.integer), rounded)
    if not _has_subnormals(p):
        return back
    fixed = Drop(p.fixed_shift, p.fixed_half, p.fixed_mask, True)
    own = _round_normal(a, negative, fixed, mode, carrier, random, width)
    return torch.where(a < p.subnormals_below, own, back)


def _below_smallest(
    a: Tensor, negative: Tensor, p: Constants, mode: str, carrier: Carrier, random: Tensor | None, width: int
) -> Tensor:
    """Without subnormals: zero, or the smallest value, whose code is 1, the odd one."""
    magnitude = a.view(carrier.dtype)
    smallest = p.smallest
    if mode == Rounding.NEAREST_EVEN:
        away = magnitude > smallest / 2
    elif mode == Rounding.NEAREST_AWAY:
        away = magnitude >= smallest / 2
    elif mode == Rounding.TOWARD_ZERO:
        away = torch.zeros_like(negative)
    elif mode == Rounding.TO_ODD:
        away = a != 0
    elif mode in (Rounding.TOWARD_POSITIVE, Rounding.TOWARD_NEGATIVE):
        away = (a != 0) & (negative if mode == Rounding.TOWARD_NEGATIVE else ~negative)
    else:
        assert random is not None
        away = _lone_share_goes_away(magnitude, smallest, mode, random, width)
    return torch.where(away, p.smallest_bits, 0).to(carrier.integer)


def _lone_share_goes_away(magnitude: Tensor, smallest: float, mode: str, random: Tensor, width: int) -> Tensor:
    """The same decision for a share of a number that is no power of two, in FP64: share >= k / 2^(N+1), or beyond it.

    smallest = n 2^q with a short odd n, so both sides of |x| 2^(N+1-q) >= k n are integers below 2^60 but for the fraction
    that |x| may leave.
    """
    n, power = float(smallest).as_integer_ratio()
    q = -(power.bit_length() - 1)
    while n % 2 == 0:
        n, q = n // 2, q + 1
    short = (1 << width) - random.to(torch.int64)
    k = 2 * short - (0 if mode == Rounding.STOCHASTIC_A else 1)
    scaled = magnitude * 2.0 ** (width + 1 - q)
    whole = torch.floor(scaled)
    at_least = whole.to(torch.int64) >= k * n
    if mode in (Rounding.STOCHASTIC_A, Rounding.STOCHASTIC_B):
        return at_least
    is_tie = (whole.to(torch.int64) == k * n) & (scaled == whole)
    return at_least & (~is_tie | (short % 2 == 0))
