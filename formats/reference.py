"""The reference: what rounding means, in integers and Fractions, one value at a time and never through a float.

It shares nothing with the quantiser for tensors or with `encode`: those are held against it.
"""

from fractions import Fraction
from math import copysign, floor, isinf, isnan
from typing import TYPE_CHECKING

from formats.names import as_element
from formats.rounding import DEFAULT_RANDOM_BITS, Overflow, Rounding, check_modes, check_overflow, check_random_bits
from formats.spec import ElementFormat, Interval

if TYPE_CHECKING:
    import mpmath


def round_exact(
    x: "int | float | Fraction | mpmath.mpf",
    f: ElementFormat | str,
    rounding: str = Rounding.NEAREST_EVEN,
    overflow: str = Overflow.SATURATE,
    *,
    random_bits: int | None = None,
    stochastic_bits: int = DEFAULT_RANDOM_BITS,
) -> Fraction | float:
    """Round an int, float, Fraction or mpmath.mpf to the format (IEEE 754-2019 4.3, 7.4; OCP OFP8; P3109 4.0, 4.7).

    Stochastic modes take the random number as `random_bits`, in 0..2^stochastic_bits - 1. Returns a Fraction, or a float for
    what no Fraction can be: -0.0, inf and nan. A negative value that rounds to zero gives -0.0 where the format has it.
    ValueError for NaN where the format has none, for nonsaturating where there is nothing to overflow to, and for missing
    or excessive random bits; TypeError for other types.
    """
    f = as_element(f)
    mode, over = check_modes(rounding, overflow)
    check_overflow(f.name, f.has_inf, f.has_nan, over)
    random = _check_random(mode, random_bits, check_random_bits(stochastic_bits))
    value = _exact(x)
    if isinstance(value, float) and isnan(value):
        if not f.has_nan:
            raise ValueError(f"{f.name} has no NaN to round NaN to")
        return value
    if isinstance(value, float) and isinf(value):
        return _beyond(f, value < 0, mode, over, infinite=True)
    negative = value < 0 if isinstance(value, Fraction) else copysign(1.0, value) < 0
    rounded = _round(Fraction(value), f, mode, random, stochastic_bits)
    if not f.lowest <= rounded <= f.largest:
        return _beyond(f, rounded < 0, mode, over, infinite=False)
    return -0.0 if negative and not rounded and f.has_negative_zero else rounded


def _round(x: Fraction, f: ElementFormat, mode: Rounding, random: int, bits: int) -> Fraction:
    """Round x on a grid that has no end where the format is unbounded."""
    between = f.interval(x)
    low, high, middle, low_is_even = between
    if low == high:
        return low
    if mode is Rounding.NEAREST_EVEN and not f.ties_away:
        up = x > middle or (x == middle and not low_is_even)
    elif mode in (Rounding.NEAREST_EVEN, Rounding.NEAREST_AWAY):
        up = x > middle or (x == middle and x > 0)
    elif mode is Rounding.TO_ODD:
        up = low_is_even
    elif mode.is_stochastic:
        up = _goes_away(mode, abs(x - _inner(between)) / (high - low), random, bits) == (_inner(between) == low)
    else:
        up = mode is Rounding.TOWARD_POSITIVE or (mode is Rounding.TOWARD_ZERO and _inner(between) == high)
    return high if up else low


def _inner(between: Interval) -> Fraction:
    """The neighbour nearer zero: the higher one below zero. Around zero, where a grid lacks it, the lower one."""
    return between.high if between.high <= 0 else between.low


def _goes_away(mode: Rounding, share: Fraction, random: int, bits: int) -> bool:
    """Whether a value that lies this share of the way from the inner neighbour to the outer one goes to the outer one."""
    steps = share * (1 << bits)
    if mode is Rounding.STOCHASTIC_A:
        return floor(steps) + random >= 1 << bits
    if mode is Rounding.STOCHASTIC_B:
        return floor(2 * steps) + 2 * random + 1 >= 2 << bits
    return round(steps) + random >= 1 << bits  # Python rounds Fractions half to even


def _beyond(f: ElementFormat, negative: bool, mode: Rounding, over: Overflow, infinite: bool) -> Fraction | float:
    """What a value past an end of the format becomes."""
    end = f.lowest if negative else f.largest
    into_unsigned = negative and not f.signed
    infinity = float("-inf") if negative else float("inf")
    has_infinity = f.has_inf and not into_unsigned
    if over is Overflow.SATURATE:
        return end
    if over is Overflow.PROPAGATE:
        return infinity if infinite and has_infinity else end
    stops = mode.stops_at_end(negative)
    if over is Overflow.NONSATURATING:
        if not infinite and (stops or mode is Rounding.TO_ODD):
            return end
        return infinity if has_infinity else float("nan")
    # P3109 4.0, 4.7.5, the rows of SatNone from the top.
    if infinite:
        return infinity if has_infinity else float("nan") if into_unsigned and f.has_nan else end
    if stops or (mode is Rounding.TO_ODD and not f.signed and f.has_inf and not negative):
        return end
    if into_unsigned and f.has_nan:
        return float("nan")
    return infinity if has_infinity else end


def _check_random(mode: Rounding, random: int | None, bits: int) -> int:
    if not mode.is_stochastic:
        return 0
    if random is None or not 0 <= random < 2**bits:
        raise ValueError(f"{mode} needs random_bits, an integer in 0..2^{bits} - 1, got {random}")
    return random


def _exact(x: "int | float | Fraction | mpmath.mpf") -> Fraction | float:
    """The same number as a Fraction, or as the float that no Fraction can be."""
    if isinstance(x, float):
        special = isnan(x) or isinf(x) or (x == 0 and copysign(1.0, x) < 0)
        return float(x) if special else Fraction(x)
    if isinstance(x, int | Fraction):
        return Fraction(x)
    import mpmath  # here, since nothing else in this package needs it

    if not isinstance(x, mpmath.mpf):
        raise TypeError(f"x must be an int, float, Fraction or mpmath.mpf, got {type(x).__name__}")
    return Fraction(*mpmath.libmp.to_rational(x._mpf_)) if mpmath.isfinite(x) else float(x)
