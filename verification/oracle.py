"""What is right, worked out from the definition by mpmath, sharing no code with what is tested.

Only a format's parameters are read, never its decoder, grid or reference. mpmath gives each finite value and each
midpoint once. A rounding is a step function, whose steps lie at these *decision points*: the midpoints for
nearest_even, the values themselves for toward_zero. So the expected result of any input follows from comparing
integers, the bit patterns of non-negative float64 numbers, which ascend as the numbers do.
"""

from functools import cache
from itertools import pairwise

import mpmath
import numpy as np
import numpy.typing as npt

from formats import FloatFormat

MAX_BITS = 20
Floats = npt.NDArray[np.float64]


def value(f: FloatFormat, code: int) -> mpmath.mpf:
    """The value of a code, special ones included, by IEEE 754-2019 3.4 and, for which codes are NaN, OCP OFP8."""
    mantissa = code & (2**f.mantissa_bits - 1)
    field = (code >> f.mantissa_bits) & (2**f.exponent_bits - 1)
    sign = -1 if code >> (f.exponent_bits + f.mantissa_bits) else 1
    top = field == 2**f.exponent_bits - 1
    if top and f.specials == "ieee":
        return mpmath.nan if mantissa else sign * mpmath.inf
    if top and f.specials == "fn" and mantissa == 2**f.mantissa_bits - 1:
        return mpmath.nan
    with mpmath.workprec(100):
        fraction = mpmath.mpf(mantissa) / 2**f.mantissa_bits
        return sign * (fraction + (1 if field else 0)) * mpmath.mpf(2) ** ((field or 1) - f.bias)


@cache
def _table(f: FloatFormat) -> tuple[Floats, Floats]:
    """Every value from 0 up, and the midpoints between them; ascending, as float64, where both are exact."""
    if f.exponent_bits + f.mantissa_bits >= MAX_BITS:
        raise ValueError(f"{f.name} is too wide to list its values: at most {MAX_BITS} bits")
    listed = (value(f, code) for code in range(2 ** (f.exponent_bits + f.mantissa_bits)))
    values = [v for v in listed if mpmath.isfinite(v)]
    with mpmath.workprec(100):
        middles = [(low + high) / 2 for low, high in pairwise(values)]
    return _exactly(values), _exactly(middles)


def _exactly(values: list[mpmath.mpf]) -> Floats:
    array = np.array([float(v) for v in values], np.float64)
    if any(v != float(v) for v in values) or np.any(np.diff(array) <= 0):
        raise ArithmeticError("float64 does not hold these values, or they do not ascend")
    array.setflags(write=False)  # it is shared through the cache
    return array


def values(f: FloatFormat) -> Floats:
    """Every finite value from 0 up, so that a value's index is its code."""
    return _table(f)[0]


def decision_points(f: FloatFormat, rounding: str) -> Floats:
    """Where the result steps from value i to value i + 1, for each i: between the two, or at the second."""
    grid, middles = _table(f)
    return {"nearest_even": middles, "toward_zero": grid[1:]}[rounding]


def expected(f: FloatFormat, rounding: str, x: Floats) -> Floats:
    """What x, float64 of any shape, rounds to, saturating: NaN for NaN, and the sign of x, on zeros too."""
    steps = decision_points(f, rounding).view(np.int64)
    magnitude = np.abs(x).view(np.int64)
    code = np.searchsorted(steps, magnitude, side="left")  # the steps below |x|
    at_step = np.append(steps, -1)[code] == magnitude
    # At a step toward_zero is already up; a midpoint between codes i and i + 1 goes to the even one.
    code += at_step & (code % 2 == 1) if rounding == "nearest_even" else at_step
    result = np.copysign(values(f)[code], x)
    return np.where(np.isnan(x), np.nan, result)
