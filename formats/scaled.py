"""Formats whose values share a scale: a group of elements, a scale for the group, and where scales are narrow one more
scale for the whole tensor.

What is stored for a value v is an element p of a small format and, once for its group, a scale s:

    v = p * s            (MX, DeepSeek's tiles, FP8 per tensor and per row)
    v = p * s * t        (NVFP4: s in E4M3, t in FP32, one for the tensor)

The scale comes from the group's largest magnitude, amax = max |x|, by a named rule (`ScaleRule`), and is rounded to its own
format first. Then each element is the element format's value nearest to the exact quotient x / s, or x / (s * t), so
that the rounding of the scale is never an error of the element.

Names. The formats that have one, `mxfp8_e4m3fn` to `nvfp4`, are short for what the grammar spells out:

    ELEMENT@GROUP[:SCALE][:RULE]        element format, who shares a scale, the scale's format, the rule for it

    GROUP   tensor                one scale for the tensor
            row                   one scale for each vector along the axis (the last, if not told)
            block{n}              one for n consecutive elements along the axis
            tile{a}x{b}           one for a * b elements of the last two axes
    SCALE   fp32 (the default), e8m0fnu (powers of two), e4m3fn (then times an FP32 tensor scale)
    RULE    amax for fp32 and e4m3fn; floor (the default), ceil, rceil, nearest or even for e8m0fnu

    e4m3fn@tensor  e4m3fn@row  int8@row         scaled by amax / largest element
    e4m3fn@block128  e4m3fn@tile128x128         DeepSeek-V3's activations and weights (arXiv 2412.19437, section 3.3.2)
    e4m3fn@block128:e8m0fnu:rceil               the same with power-of-two scales
    mxfp4 = e2m1fn@block32:e8m0fnu:floor        OCP MX v1.0, section 5; mxfp4:rceil is NVIDIA's way to its scales
    nvfp4 = e2m1fn@block16:e4m3fn               NVIDIA's
"""

import re
from dataclasses import dataclass, field
from enum import StrEnum
from fractions import Fraction
from functools import cache
from math import prod

from formats.lists import GridFormat
from formats.names import element_format
from formats.spec import ElementFormat, FloatFormat, Format

PATTERN = re.compile(
    r"(?P<element>[^@:]+)@(?P<group>tensor|row|block(?P<n>\d+)|tile(?P<a>\d+)x(?P<b>\d+))"
    r"(?::(?P<scale>fp32|e8m0fnu|e4m3fn))?(?::(?P<rule>[a-z]+))?"
)
# OCP MX v1.0 table 1 and section 5.3; NVFP4 as NVIDIA's Transformer Engine and cuDNN define it.
NAMED = {
    "mxfp8_e4m3fn": "e4m3fn@block32:e8m0fnu",
    "mxfp8_e5m2": "e5m2@block32:e8m0fnu",
    "mxfp6_e2m3fn": "e2m3fn@block32:e8m0fnu",
    "mxfp6_e3m2fn": "e3m2fn@block32:e8m0fnu",
    "mxfp4": "e2m1fn@block32:e8m0fnu",
    "mxint8": "int8q6@block32:e8m0fnu",
    "nvfp4": "e2m1fn@block16:e4m3fn",
}
MAX_EXPONENT = 64
MIN_EXPONENT = -80
MAX_BITS_WITH_NARROW_SCALE = 7


class Granularity(StrEnum):
    """Which elements share a scale."""

    TENSOR = "tensor"
    ROW = "row"
    BLOCK = "block"
    TILE = "tile"


class ScaleRule(StrEnum):
    """How a scale s follows from amax, the group's largest magnitude; `largest` is the element format's largest value.

    emax is floor(log2(largest)): 8 for e4m3fn, 15 for e5m2, 2 for e2m1fn, 0 for MXINT8's element. All logarithms are
    exact: they are the position of amax among powers of two, never a rounded log2. E8M0 exponents are then clamped to
    [-127, 127].
    """

    FLOOR = "floor"
    """s = 2^(floor(log2(amax)) - emax). OCP MX v1.0, section 6.3; torchao FLOOR, microxcaling. Clips the top of a block:
    an amax of 1.99 * 2^k becomes `largest` / 2^emax * 2^k."""
    CEIL = "ceil"
    """s = 2^(ceil(log2(amax)) - emax). torchao CEIL. Never clips; amax may land a whole binade under `largest`."""
    RCEIL = "rceil"
    """s = 2^ceil(log2(amax / largest)), the smallest power of two with which nothing is clipped. NVIDIA's for MXFP8 (cuBLAS,
    "1D block scaling"; PTX cvt.rp.ue8m0x2), torchao RCEIL, which rounds the quotient to FP32 first; here it is exact."""
    NEAREST = "nearest"
    """s = the power of two nearest to amax / largest, by distance and not by ratio; halfway, at 1.5 * 2^k, the larger. So it
    is the quotient rounded to e8m0fnu as torch and ml_dtypes round. Clips where the quotient lies in (2^k, 1.5 * 2^k)."""
    EVEN = "even"
    """s = 2^(floor(log2(amax rounded to the element's M mantissa bits, to nearest even)) - emax): one more than `floor` where
    amax would round up a binade. torchao EVEN."""
    AMAX = "amax"
    """s = amax / largest, rounded to nearest even in the scale's format, FP32 or (amax / (largest * t)) E4M3. FP8 training per
    tensor and per row, DeepSeek-V3's tiles, NVFP4. A quotient that rounds to 0 becomes the format's smallest positive value,
    one beyond its largest that largest value."""


@dataclass(frozen=True)
class ScaledFormat(Format):
    """A format for groups of values with a scale each; made by `scaled_format` from a name.

    element: the elements' format. granularity, group: who shares a scale; group is () for tensor and row, (n,) for blocks,
    (a, b) for tiles. scale: "e8m0fnu", "e4m3fn" or "fp32". rule: see ScaleRule. Two formats are equal if they do the same,
    whatever they are called: mxfp4 == e2m1fn@block32:e8m0fnu:floor, which is then the canonical_name of both.

    ValueError for what makes no format: a rule that is not for that scale, a group of no elements, an element format without a
    sign or whose values reach below 2^-80 or beyond 2^64 (what FP32 arithmetic on quotients leaves room for).
    """

    name: str = field(compare=False)
    element: ElementFormat
    granularity: Granularity
    group: tuple[int, ...]
    scale: str
    rule: ScaleRule
    canonical_name: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise ValueError(f"{self.name}: {problem}")
        shape = "x".join(map(str, self.group))
        canonical = f"{self.element.canonical_name}@{self.granularity}{shape}:{self.scale}:{self.rule}"
        object.__setattr__(self, "canonical_name", canonical)

    def _problem(self) -> str | None:
        allowed = rules_for(self.scale)
        if self.rule not in allowed:
            return f"a scale in {self.scale} follows the rule {' or '.join(allowed)}, got {self.rule}"
        axes = {Granularity.BLOCK: 1, Granularity.TILE: 2}.get(self.granularity, 0)
        if len(self.group) != axes or any(n < 1 for n in self.group):
            return f"a {self.granularity} has {axes} sizes of at least 1, got {self.group}"
        if not self.element.signed:
            return f"the elements must have a sign, and {self.element} has none; use a signed format"
        if self.element.largest > Fraction(2) ** MAX_EXPONENT or smallest(self.element) < Fraction(2) ** MIN_EXPONENT:
            limit = f"2^{MIN_EXPONENT}..2^{MAX_EXPONENT}"
            return f"{self.element}'s positive values must lie in {limit} to be scaled; use fewer exponent bits"
        length = significant_bits(self.element)
        if self.has_tensor_scale and length > MAX_BITS_WITH_NARROW_SCALE:
            limit = f"at most {MAX_BITS_WITH_NARROW_SCALE} significant bits"
            return (
                f"with a scale in {self.scale} elements have {limit}, and {self.element} has {length}; use fp32 scales"
            )
        return None

    def __str__(self) -> str:
        return self.name

    @property
    def has_tensor_scale(self) -> bool:
        """Whether an FP32 scale of the whole tensor stands above the groups' scales: where those are as narrow as E4M3."""
        return self.scale == "e4m3fn"

    @property
    def takes_tensor_scale(self) -> bool:
        """Whether one can be given: as the upper scale, or as the scale of a format scaled per tensor in FP32."""
        return self.has_tensor_scale or (self.granularity is Granularity.TENSOR and self.scale == "fp32")

    @property
    def whole_groups(self) -> bool:
        """Whether only whole groups can be stored: in MX and NVFP4, by their layouts; not with FP32 scales."""
        return self.scale != "fp32"

    @property
    def elements_per_scale(self) -> int | None:
        """How many elements share a scale; None for tensor and row, where that is the tensor's matter."""
        return prod(self.group) if self.group else None

    @property
    def scale_bits(self) -> int:
        """Width of a scale."""
        return 32 if self.scale == "fp32" else 8

    @property
    def bits_per_element(self) -> float:
        """Width of an element and its share of the scale: 4.25 for mxfp4. Scales of rows and tensors are not counted."""
        shared = self.scale_bits / self.elements_per_scale if self.elements_per_scale else 0.0
        return self.element.bits + shared

    @property
    def description(self) -> str:
        """The format in one sentence, with its formula and its source."""
        sizes = " x ".join(map(str, self.group))
        groups = {
            Granularity.TENSOR: "each tensor",
            Granularity.ROW: "each vector along the axis",
            Granularity.BLOCK: f"each {sizes} consecutive elements along the axis",
            Granularity.TILE: f"each tile of {sizes} elements of the last two axes",
        }
        value = "element * scale * tensor scale" if self.has_tensor_scale else "element * scale"
        formula = {
            ScaleRule.FLOOR: "2^(floor(log2(amax)) - emax)",
            ScaleRule.CEIL: "2^(ceil(log2(amax)) - emax)",
            ScaleRule.RCEIL: f"2^ceil(log2(amax / {self.element.max:g}))",
            ScaleRule.NEAREST: f"the power of two nearest to amax / {self.element.max:g}",
            ScaleRule.EVEN: "2^(floor(log2(amax to the element's precision)) - emax)",
            ScaleRule.AMAX: f"amax / {self.element.max:g}" + (" / tensor scale" if self.has_tensor_scale else ""),
        }[self.rule]
        upper = (
            f", tensor scale = amax of the tensor / {largest_product(self):g} in fp32" if self.has_tensor_scale else ""
        )
        return (
            f"{self.name}: elements in {self.element.name}, a scale in {self.scale} for {groups[self.granularity]}; "
            f"value = {value}, scale = {formula}{upper} ({self._source()})."
        )

    def _source(self) -> str:
        if self.scale == "e8m0fnu":
            return "OCP MX v1.0, sections 5 and 6.3"
        if self.has_tensor_scale:
            return "NVIDIA NVFP4"
        tiled = self.granularity in (Granularity.BLOCK, Granularity.TILE)
        return "DeepSeek-V3 report, arXiv 2412.19437, section 3.3.2" if tiled else "FP8 formats, arXiv 2209.05433"

    def with_rule(self, rule: str | None) -> "ScaledFormat":
        """The same format with another rule for its scales; itself for None. ValueError for a rule that is not for its scale."""
        if rule is None or rule == self.rule:
            return self
        base = self.name.removesuffix(f":{self.rule}")
        return ScaledFormat(f"{base}:{rule}", self.element, self.granularity, self.group, self.scale, _rule(base, rule))


def rules_for(scale: str) -> list[ScaleRule]:
    """The rules that give a scale in that format, the default first."""
    return [rule for rule in ScaleRule if (rule is ScaleRule.AMAX) == (scale != "e8m0fnu")]


def largest_product(f: ScaledFormat) -> float:
    """The largest element times the largest narrow scale, exact: 6 * 448 in NVFP4, to which a tensor scale fits its tensor."""
    return f.element.max * (element_format(f.scale).max if f.has_tensor_scale else 1.0)


@cache
def significant_bits(element: ElementFormat) -> int:
    """Of the element's longest value: M + 1 in floating point, n - 1 for an n-bit integer; FP32's 24 for a list of any values."""
    if isinstance(element, GridFormat):
        return 24
    return element.mantissa_bits + 1 if isinstance(element, FloatFormat) else element.bits - 1


@cache
def smallest(element: ElementFormat) -> Fraction:
    """The smallest positive value."""
    positive = element.finite_codes if isinstance(element, GridFormat) else [1]
    return min(value for code in positive if (value := abs(Fraction(element.decode_exact(int(code))))))


@cache
def scaled_format(name: str) -> ScaledFormat:
    """The scaled format of that name, which keeps the name. ValueError for one that means nothing."""
    base, _, rule = name.partition(":")
    spelled = f"{NAMED[base]}:{rule}" if base in NAMED and rule else NAMED.get(name, name)
    match = PATTERN.fullmatch(spelled)
    if match is None:
        raise ValueError(
            f"{name}: neither {', '.join(NAMED)}, each with :RULE or without, nor "
            "ELEMENT@tensor|row|block{n}|tile{a}x{b}[:fp32|e8m0fnu|e4m3fn][:RULE]; for example e4m3fn@block128"
        )
    sizes = tuple(int(size) for size in (match["n"], match["a"], match["b"]) if size is not None)
    granularity = Granularity(match["group"].rstrip("0123456789x"))
    scale = match["scale"] or "fp32"
    rule_name = _rule(name, match["rule"]) if match["rule"] else rules_for(scale)[0]
    return ScaledFormat(name, element_format(match["element"]), granularity, sizes, scale, rule_name)


def is_scaled_name(name: str) -> bool:
    """Whether a name is meant for `scaled_format`: a named one, or with an @ in it."""
    return "@" in name or name.partition(":")[0] in NAMED


def list_scaled_formats() -> list[str]:
    """The scaled formats that have a name of their own; the grammar gives many more."""
    return list(NAMED)


def _rule(name: str, rule: str) -> ScaleRule:
    try:
        return ScaleRule(rule)
    except ValueError:
        raise ValueError(f"{name}: the rule must be one of {', '.join(ScaleRule)}, got {rule!r}") from None
