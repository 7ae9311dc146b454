"""The reference: what rounding means, in integers and Fractions, one value at a time and never through a float.

It shares nothing with the quantiser for tensors or with `encode`: those are held against it.
"""

from fractions import Fraction
from math import copysign, floor, isinf, isnan
from typing import TYPE_CHECKING

from formats.names import as_format
from formats.rounding import Overflow, Rounding, check_modes
from formats.spec import FloatFormat

if TYPE_CHECKING:
    import mpmath


def round_exact(
    x: "int | float | Fraction | mpmath.mpf",
    f: FloatFormat | str,
    rounding: str = Rounding.NEAREST_EVEN,
    overflow: str = Overflow.SATURATE,
) -> Fraction | float:
    """Round an int, float, Fraction or mpmath.mpf to the format (IEEE 754-2019 4.3, 7.4; OCP OFP8, saturating conversion).

    Returns a Fraction, or a float for what no Fraction can be: -0.0 and nan. A negative value that rounds to zero
    gives -0.0. saturate: inf gives the largest finite value. ValueError for NaN where the format has none, TypeError
    for other types.
    """
    f = as_format(f)
    mode, _ = check_modes(rounding, overflow)
    value = _exact(x)
    if isinstance(value, float) and isnan(value):
        if not f.has_nan:
            raise ValueError(f"{f.name} has no NaN to round NaN to")
        return value
    negative = value < 0 if isinstance(value, Fraction) else copysign(1.0, value) < 0
    limit = Fraction(f.decode_exact(f.max_code))
    if isinstance(value, float):
        magnitude = limit if isinf(value) else Fraction(0)
    else:
        magnitude = min(_round_unbounded(abs(value), f, mode), limit)
    if not magnitude:
        return -0.0 if negative else magnitude
    return -magnitude if negative else magnitude


def _round_unbounded(x: Fraction, f: FloatFormat, mode: Rounding) -> Fraction:
    """Round x >= 0 with an exponent that has no upper end."""
    if not x:
        return x
    binade = max(_exponent(x), f.emin)
    quantum = Fraction(2) ** (binade - f.mantissa_bits)
    below = floor(x / quantum)
    rest = x / quantum - below
    # In each binade from emin on codes go up by 2^M; in the lowest two, code and multiple of the quantum are the same
    # number.
    code = below + (binade - f.emin) * 2**f.mantissa_bits
    up = mode is Rounding.NEAREST_EVEN and (rest > Fraction(1, 2) or (rest == Fraction(1, 2) and code % 2 == 1))
    return (below + up) * quantum


def _exponent(x: Fraction) -> int:
    """floor(log2(x)) for x > 0."""
    guess = x.numerator.bit_length() - x.denominator.bit_length()
    return guess if x >= Fraction(2) ** guess else guess - 1


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
