"""What a quantiser is asked: to which format, by which rounding, and by which of the conventions that implementations differ
in.

The oracle says what IEEE 754, OCP and P3109 make of an input. A convention on top of that changes some results and leaves the
others: zeros without their sign, subnormal results flushed to zero. A question has one answer for every input, and everything
that judges, by points, by search or by all inputs, asks it here.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from formats import ElementFormat, FloatFormat, Overflow, Rounding
from verification import oracle

Floats = npt.NDArray[np.float64]
ZEROS = ("signed", "unsigned", "signed_anyway", "smallest", "nan")
SUBNORMALS = ("kept", "flushed", "flushed_early")
FOUND = "found"


class Question(NamedTuple):
    """A format and how numbers become its values.

    rounding, overflow: of formats.Rounding and formats.Overflow; or "nearest_even_code", e8m0fnu's ties to even codes as
    P3109 has them. zero: "signed", or "unsigned" where every zero is +0, or "signed_anyway" where zeros keep signs in a
    format without -0; in a format without zero it becomes the smallest value, or with "nan" NaN. subnormals: "kept";
    "flushed" where a result below the smallest normal number is zero; "flushed_early" where an input below it is.
    """

    f: ElementFormat
    rounding: str = Rounding.NEAREST_EVEN
    overflow: str = Overflow.SATURATE
    zero: str = "signed"
    subnormals: str = "kept"

    def expected(self, x: Floats) -> Floats:
        """What x, float64 of any shape, becomes; NaN for NaN."""
        right = oracle.expected(self.f, self.rounding, x, self.overflow)
        if self.subnormals != "kept":
            normal = smallest_normal(self.f)
            flushed = np.abs(x if self.subnormals == "flushed_early" else right) < normal
            right = np.where(flushed, np.copysign(0.0, right), right)
        if self.zero == "nan":
            return np.where(x == 0, np.nan, right)
        if self.zero == "signed_anyway":
            return np.where(right == 0, np.copysign(right, x), right)
        return right + 0.0 if self.zero == "unsigned" else right

    def expected_beyond(self, *, below: bool, infinite: bool) -> float:
        """What becomes of numbers past an end, or of infinity."""
        return oracle.beyond(self.f, self.rounding, self.overflow, below=below, infinite=infinite)


def smallest_normal(f: ElementFormat) -> float:
    """Below which numbers are subnormal; 0 where the format has none."""
    return f.smallest_normal if isinstance(f, FloatFormat) and f.subnormals and f.zero and f.mantissa_bits else 0.0
