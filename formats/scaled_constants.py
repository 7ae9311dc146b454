"""What the tensor functions of scaled formats need of a format, a rule and the modes, as numbers for the compiler to fold."""

from functools import cache
from typing import NamedTuple

from formats.compile_time import assume_constant_result
from formats.names import element_format, float_format
from formats.rounding import Overflow, Rounding, check_modes
from formats.scale_arithmetic import SPLIT_BITS, ElementConstants
from formats.scaled import ScaledFormat, ScaleRule, largest_product, scaled_format, significant_bits
from formats.spec import ElementFormat, FloatFormat, Format


class ScaledConstants(NamedTuple):
    """A format, a rule and the modes as numbers that the compiler folds into the program."""

    granularity: str
    group: tuple[int, ...]
    scale: str
    element: str
    rounding: str
    overflow: str
    threshold: int
    offset: int
    largest: float
    largest_product: float
    p: int
    limit: int
    fast: bool
    two_bits: bool
    long: bool
    wide: bool
    element_constants: ElementConstants
    scale_constants: ElementConstants
    smallest_scale_bits: int
    takes_tensor_scale: bool


def resolve(f: Format | str, rule: str | None) -> ScaledFormat:
    """The format, or the one of that name, with another rule if one is given. ValueError for formats without scales."""
    if isinstance(f, str):
        f = scaled_format(f)
    if not isinstance(f, ScaledFormat):
        raise ValueError(f"{f} has no scales; name who shares one, {f}@row or {f}@block32:e8m0fnu, or use quantize")
    return f.with_rule(rule)


# As in formats.quantizer: the compiler runs this itself, guarding on names, so that a program is one of constants.
@assume_constant_result
def scaled_constants(name: str, rule: str | None, rounding: str, overflow: str) -> ScaledConstants:
    """The numbers for a format's name; ValueError for a name, rule or mode that there is not."""
    return _derive(resolve(name, rule), *check_modes(rounding, overflow))


@assume_constant_result
def is_long(element: str) -> bool:
    """Whether FP32 does not hold an element times half of a scale, so that products are formed in FP64."""
    return significant_bits(element_format(element)) > SPLIT_BITS


@cache
def _derive(f: ScaledFormat, rounding: Rounding, overflow: Overflow) -> ScaledConstants:
    element, bits = f.element, significant_bits(f.element)
    fast = rounding is Rounding.NEAREST_EVEN and overflow is Overflow.SATURATE and _is_plain(element)
    threshold, offset = _threshold(f)
    scale_format = float_format("e4m3fn")
    return ScaledConstants(
        granularity=str(f.granularity),
        group=f.group,
        scale=f.scale,
        element=element.canonical_name,
        rounding=str(rounding),
        overflow=str(overflow),
        threshold=threshold,
        offset=offset,
        largest=element.max,
        largest_product=largest_product(f),
        p=min(bits + 1, SPLIT_BITS),
        limit=_pattern(element.max) if fast else _pattern(2.0 ** (_exponent(element.max) + 3)),
        fast=fast,
        two_bits=bits <= 2,
        long=is_long(element.canonical_name),
        wide=rounding.is_stochastic or bits >= SPLIT_BITS,
        element_constants=_element_constants(element)
        if isinstance(element, FloatFormat)
        else ElementConstants(0, 0, 0),
        scale_constants=_element_constants(scale_format),
        smallest_scale_bits=_pattern(scale_format.smallest_subnormal),
        takes_tensor_scale=f.takes_tensor_scale,
    )


def _is_plain(element: ElementFormat) -> bool:
    """Whether `round_to_element` serves the format: floating point with subnormals, a -0 and a mantissa."""
    if not isinstance(element, FloatFormat):
        return False
    return element.subnormals and element.has_negative_zero and 1 <= element.mantissa_bits < SPLIT_BITS - 1


def _element_constants(f: FloatFormat) -> ElementConstants:
    return ElementConstants(_pattern(f.max), _pattern(f.smallest_normal), 23 - f.mantissa_bits)


def _threshold(f: ScaledFormat) -> tuple[int, int]:
    """Of power_of_two_scale, for a rule; each derived in formats.scale_arithmetic."""
    emax = _exponent(f.element.max)
    whole = 1 << 23
    if f.rule is ScaleRule.CEIL:
        return 1, emax
    if f.rule is ScaleRule.RCEIL:
        return (_pattern(f.element.max) & (whole - 1)) + 1, emax
    if f.rule is ScaleRule.NEAREST:
        middle = 1.5 * f.element.max
        return _pattern(middle) & (whole - 1), _exponent(middle)
    if f.rule is ScaleRule.EVEN:
        return whole - (whole >> significant_bits(f.element)), emax
    return whole, emax


def _exponent(value: float) -> int:
    return (_pattern(value) >> 23) - 127


def _pattern(value: float) -> int:
    """The bits of a positive number that FP32 holds."""
    return int(element_format("fp32").encode(value))
