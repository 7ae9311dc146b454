"""The reference for scaled formats: one group of values, in Fractions, by the definitions and not by any bit pattern.

    amax      = max |x|
    scale     = rule(amax), an exact comparison of rationals, rounded to its format by round_exact
    element   = round_exact(x / (scale * tensor scale)), of the exact quotient
    value     = element * scale * tensor scale, rounded to a dtype by round_exact

It shares nothing with formats.scaling, which is held against it: no tensor, no integer trick, no layout. A group is any
list of numbers; which elements of a tensor make one is for the caller to say.
"""

from collections.abc import Sequence
from fractions import Fraction
from math import copysign, isfinite, nan
from typing import NamedTuple

from formats.names import element_format, float_format
from formats.reference import round_exact
from formats.rounding import DEFAULT_RANDOM_BITS, Overflow, Rounding
from formats.scaled import ScaledFormat, ScaleRule, scaled_format, significant_bits, smallest

Number = int | float | Fraction
E8M0_LIMIT = 127


class Group(NamedTuple):
    """A quantised group.

    scale: exact, or None for a NaN scale, with which every element is NaN. elements: as round_exact gives them, Fractions
    or -0.0, inf, nan.
    """

    scale: Fraction | None
    tensor_scale: Fraction
    elements: list[Fraction | float]

    def values(self, dtype: str) -> list[float]:
        """The products element * scale * tensor scale, rounded once to fp32, bf16 or fp16: to nearest even, to inf beyond it."""
        if self.scale is None:
            return [nan] * len(self.elements)
        return [_times(element, self.scale * self.tensor_scale, dtype) for element in self.elements]


def quantize_group(
    values: Sequence[Number],
    f: ScaledFormat | str,
    rounding: str = Rounding.NEAREST_EVEN,
    overflow: str = Overflow.SATURATE,
    rule: str | None = None,
    tensor_scale: Number | None = None,
    random_bits: Sequence[int] | None = None,
    stochastic_bits: int = DEFAULT_RANDOM_BITS,
) -> Group:
    """Scale and elements of one group; rounding, overflow, stochastic_bits and a random number an element as in round_exact.

    tensor_scale: needed where the format has one; for a format scaled per tensor it is the scale, if it is not to come from
    these values. ValueError where it is missing.
    """
    f = (scaled_format(f) if isinstance(f, str) else f).with_rule(rule)
    upper = Fraction(1)
    if f.has_tensor_scale:
        if tensor_scale is None:
            raise ValueError(f"{f.name} needs a tensor_scale; see reference_tensor_scale")
        upper = Fraction(tensor_scale)
    given = Fraction(tensor_scale) if tensor_scale is not None and not f.has_tensor_scale else None
    scale = given if given is not None else group_scale(values, f, upper)
    if scale is None:
        return Group(None, upper, [nan] * len(values))
    randoms = [None] * len(values) if random_bits is None else random_bits
    elements = [
        round_exact(
            _quotient(x, scale * upper), f.element, rounding, overflow, random_bits=r, stochastic_bits=stochastic_bits
        )
        for x, r in zip(values, randoms, strict=True)
    ]
    return Group(scale, upper, elements)


def reference_tensor_scale(values: Sequence[Number], f: ScaledFormat | str) -> Fraction | None:
    """NVFP4's: the tensor's amax / (largest element * largest scale), to FP32. None for NaN."""
    f = scaled_format(f) if isinstance(f, str) else f
    amax = _amax(values)
    return None if amax is None else _rounded_scale(amax / (f.element.largest * 448), "fp32")


def group_scale(values: Sequence[Number], f: ScaledFormat, tensor_scale: Fraction = Fraction(1)) -> Fraction | None:
    """The scale of one group (formats.scaled.ScaleRule), exact; None for NaN, where one of the values is inf or NaN."""
    amax = _amax(values)
    if amax is None:
        return None
    if f.scale != "e8m0fnu":
        return _rounded_scale(amax / (f.element.largest * tensor_scale), f.scale)
    if not amax:
        return _power(-E8M0_LIMIT)
    return _power(max(-E8M0_LIMIT, min(E8M0_LIMIT, _exponent_by_rule(amax, f))))


def _exponent_by_rule(amax: Fraction, f: ScaledFormat) -> int:
    largest = f.element.largest
    emax = _floor_log2(largest)
    match f.rule:
        case ScaleRule.FLOOR:
            return _floor_log2(amax) - emax
        case ScaleRule.CEIL:
            return _ceil_log2(amax) - emax
        case ScaleRule.RCEIL:
            return _ceil_log2(amax / largest)
        case ScaleRule.NEAREST:
            ratio = amax / largest
            below = _floor_log2(ratio)
            return below + (_power(below + 1) - ratio <= ratio - _power(below))
        case ScaleRule.EVEN:
            quantum = _power(_floor_log2(amax)) / 2 ** (significant_bits(f.element) - 1)
            return _floor_log2(round(amax / quantum) * quantum) - emax
        case _:
            raise ValueError(f"{f.name}: {f.rule} gives no power of two")


def _rounded_scale(ratio: Fraction, name: str) -> Fraction:
    return max(Fraction(round_exact(ratio, name)), smallest(element_format(name)))


def _quotient(x: Number, scale: Fraction) -> Fraction | float:
    special = isinstance(x, float) and (not isfinite(x) or (x == 0 and copysign(1.0, x) < 0))
    return x if isinstance(x, float) and special else Fraction(x) / scale


def _times(element: Fraction | float, scale: Fraction, dtype: str) -> float:
    if isinstance(element, float) and (element == 0 or not isfinite(element)):
        return element
    exact = Fraction(element) * scale
    f = float_format(dtype)
    largest = Fraction(f.max)
    if abs(exact) >= largest + _power(f.emax - f.mantissa_bits) / 2:
        return copysign(float("inf"), exact)
    return float(round_exact(exact, f))


def _amax(values: Sequence[Number]) -> Fraction | None:
    if any(isinstance(x, float) and not isfinite(x) for x in values):
        return None
    return max((abs(Fraction(x)) for x in values), default=Fraction(0))


def _power(exponent: int) -> Fraction:
    return Fraction(2) ** exponent


def _floor_log2(x: Fraction) -> int:
    guess = x.numerator.bit_length() - x.denominator.bit_length()  # right, or one too many
    return guess - (_power(guess) > x)


def _ceil_log2(x: Fraction) -> int:
    below = _floor_log2(x)
    return below + (_power(below) < x)
