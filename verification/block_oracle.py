"""What is right for a block with a scale, by exact comparisons of float64 numbers; shares nothing with `formats.scaling`.

A block's largest magnitude is amax = m 2^k with m in 1/2..1, exactly, and the largest element is M 2^K alike, so that every rule
for powers of two compares m with a few multiples of M. A quotient x / d is not exact in float64, but all that matters is on which
side of a decision point p it lies. x has 24 bits, d at most 28 and p d at most 49, so where x is not p d they differ by more than
2^-50 of themselves, which the division's rounding, 2^-53, can't turn round; and where x is p d the quotient is p, exactly. The
definition that both follow is in formats.scaled; `test_blocks` holds this against the one in rationals.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from formats import ElementFormat, FloatFormat, GridFormat, Overflow, Rounding, element_format
from formats.scaled import ScaledFormat
from verification import oracle
from verification.laws import Floats
from verification.question import Question

LIMIT = 127
NARROW_MAX = 448.0
FP32_MAX = float(np.finfo(np.float32).max)
SMALLEST = {"fp32": 2.0**-149, "e4m3fn": 2.0**-9}


class BlockQuestion(NamedTuple):
    """A scaled format, its rule for scales among its parts, and how elements are rounded; see Question."""

    f: ScaledFormat
    rounding: str = Rounding.NEAREST_EVEN
    overflow: str = Overflow.SATURATE
    zero: str = "signed"
    subnormals: str = "kept"

    @property
    def element(self) -> Question:
        """What becomes of a quotient."""
        return Question(self.f.element, self.rounding, self.overflow, self.zero, self.subnormals)


class Right(NamedTuple):
    """Of blocks x [B, n]: scales [B], the scale of the tensor, elements [B, n], and their products rounded to a dtype [B, n]."""

    scales: Floats
    tensor_scale: float
    elements: Floats
    values: Floats


def right(question: BlockQuestion, x: Floats, dtype: str) -> Right:
    """What blocks x [B, n], finite or not, become, x being the whole tensor."""
    f = question.f
    amax = np.abs(x).max(1)
    t = tensor_scale(f, float(amax.max())) if f.has_tensor_scale else 1.0
    scales = scales_of(f, amax, t)
    return of_scales(question, x, scales, t, dtype)


def of_scales(question: BlockQuestion, x: Floats, scales: Floats, t: float, dtype: str) -> Right:
    """The same with these scales."""
    divisor = (scales * t)[:, None]
    elements = question.element.expected(quotient(x, divisor))
    with np.errstate(all="ignore"):
        elements = np.where(np.isnan(divisor), np.nan, elements)
        return Right(scales, t, elements, rounded(elements * divisor, dtype))


def by_unrounded_scale(question: BlockQuestion, x: Floats, scales: Floats, t: float, dtype: str) -> Right:
    """What comes of elements divided by amax / largest as it is, before that becomes a scale, and multiplied by the scale."""
    amax = np.abs(x).max(1, keepdims=True)
    largest = oracle.finite_values(question.f.element)[-1]
    with np.errstate(all="ignore"):
        elements = question.element.expected(quotient(x * largest, np.where(amax > 0, amax, 1.0)))
        return Right(scales, t, elements, rounded(elements * (scales * t)[:, None], dtype))


def tensor_scale(f: ScaledFormat, amax: float) -> float:
    """NVFP4's: amax / (largest element * 448) to FP32; float64 divides once, and FP32 numbers are too short to notice."""
    if not np.isfinite(amax):
        return float("nan")
    return float(_fp32_scales(np.array(amax / (oracle.finite_values(f.element)[-1] * NARROW_MAX))))


def scales_of(f: ScaledFormat, amax: Floats, t: float = 1.0) -> Floats:
    """Scales of blocks with these largest magnitudes; NaN for infinite ones and NaN."""
    largest = oracle.finite_values(f.element)[-1]
    fine = np.isfinite(amax)
    a = np.where(fine, amax, 1.0)
    if f.scale == "e8m0fnu":
        found = np.ldexp(1.0, np.where(a > 0, np.clip(_exponents(f, np.where(a > 0, a, 1.0)), -LIMIT, LIMIT), -LIMIT))
    elif f.scale == "fp32":
        found = _fp32_scales(a / largest)
    else:
        narrow = element_format("e4m3fn")
        ratio = quotient(a, np.full(a.shape, largest * t))
        found = np.maximum(oracle.expected(narrow, "nearest_even", ratio), SMALLEST["e4m3fn"])
    return np.asarray(np.where(fine & ~np.isnan(t), found, np.nan))


def _fp32_scales(ratios: Floats) -> Floats:
    """Quotients as positive FP32 numbers: the smallest where they round to 0, the largest beyond it."""
    with np.errstate(over="ignore"):
        return np.clip(np.asarray(ratios).astype(np.float32).astype(np.float64), SMALLEST["fp32"], FP32_MAX)


def _exponents(f: ScaledFormat, amax: Floats) -> oracle.Integers:
    """Of powers of two, by f.rule, not yet limited; amax > 0."""
    largest = oracle.finite_values(f.element)[-1]
    (m, k), (top, top_exponent) = np.frexp(amax), np.frexp(largest)
    emax = int(top_exponent) - 1
    match str(f.rule):
        case "floor":
            found = k - 1 - emax
        case "ceil":
            found = k - (m == 0.5) - emax
        case "rceil":
            found = k - emax - 1 + (m > top)
        case "nearest":
            below = k - emax - 1 - (m < top)
            found = below + (m >= np.where(m < top, 0.75, 1.5) * top)
        case _:
            kept = np.ldexp(np.rint(np.ldexp(m, significant_length(f.element))), -significant_length(f.element))
            found = k - 1 - emax + (kept >= 1.0)
    return np.asarray(found, np.int64)


def significant_length(element: ElementFormat) -> int:
    """Significant bits of the longest value."""
    if isinstance(element, FloatFormat):
        return element.mantissa_bits + 1
    if isinstance(element, GridFormat):
        return 24
    return element.bits - 1


def quotient(x: Floats, divisor: Floats) -> Floats:
    """The quotient, on the right side of every decision point; NaN where the divisor is."""
    with np.errstate(all="ignore"):
        return np.asarray(x / divisor)


@cache
def decision_points(f: ElementFormat) -> Floats:
    """Every value and divider, ascending."""
    listed = oracle.table(f)
    return np.unique(np.concatenate([listed.entries[np.isfinite(listed.entries)], listed.middles]))


def rounded(x: Floats, dtype: str) -> Floats:
    """Exact products as the dtype holds them, to nearest even, to infinity beyond it."""
    with np.errstate(all="ignore"):
        if dtype in ("float32", "float16"):
            return x.astype(dtype).astype(np.float64)
    return oracle.expected(element_format("bf16"), "nearest_even", x, "nonsaturating") if dtype == "bfloat16" else x
