"""Two's complement integers, and fixed-point numbers, which are integers times a power of two.

With n bits and F of them behind the point the code c, read as a signed integer, is c * 2^-F, for c in -2^(n-1)..2^(n-1) - 1.
There is no -0, no infinity and no NaN. MXINT8's element (OCP MX 5.3.4) is the one with n = 8 and F = 6, called int8q6.
"""

from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property

import numpy as np
import numpy.typing as npt

from formats.spec import ElementFormat, Interval

MIN_BITS, MAX_BITS = 2, 16


@dataclass(frozen=True)
class IntegerFormat(ElementFormat):
    """Signed two's complement of `bits` bits, 2..16, `fraction_bits` of them, 0..bits, behind the binary point."""

    name: str = field(compare=False)
    width: int
    fraction_bits: int = 0
    canonical_name: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.width <= MAX_BITS:
            raise ValueError(f"{self.name}: bits must be {MIN_BITS}..{MAX_BITS}, got {self.width}")
        if not 0 <= self.fraction_bits <= self.width:
            raise ValueError(f"{self.name}: fraction bits must be 0..{self.width}, got {self.fraction_bits}")
        point = f"q{self.fraction_bits}" if self.fraction_bits else ""
        object.__setattr__(self, "canonical_name", f"int{self.width}{point}")
        object.__setattr__(self, "bits", self.width)

    def __str__(self) -> str:
        return self.name

    signed = True
    has_negative_zero = False
    nan_code = None
    inf_code = None

    @property
    def quantum(self) -> Fraction:
        """The distance between neighbours, 2^-F."""
        return Fraction(1, 2**self.fraction_bits)

    @property
    def largest(self) -> Fraction:
        """(2^(n-1) - 1) 2^-F."""
        return Fraction(2 ** (self.width - 1) - 1) * self.quantum

    @property
    def lowest(self) -> Fraction:
        """-2^(n-1) 2^-F."""
        return -Fraction(2 ** (self.width - 1)) * self.quantum

    def decode_exact(self, code: int) -> Fraction:
        """One code's value in rationals."""
        self._check_code(code)
        return Fraction(code - (1 << self.width if code >> (self.width - 1) else 0), 1 << self.fraction_bits)

    def interval(self, x: Fraction) -> Interval:
        """The multiples of 2^-F around x, without end."""
        steps = x // self.quantum
        low, high = steps * self.quantum, (steps + 1) * self.quantum
        return Interval(low, low if x == low else high, (low + high) / 2, steps % 2 == 0)

    @cached_property
    def finite_codes(self) -> npt.NDArray[np.int64]:
        """All codes, from the lowest value to the largest."""
        half = 1 << (self.width - 1)
        return np.concatenate([np.arange(half, 2 * half), np.arange(half)])

    def holds(self, other: ElementFormat) -> bool:
        """Whether every finite value of `other` is one of this format's."""
        if other.bits > MAX_BITS or not self.lowest <= other.lowest <= other.largest <= self.largest:
            return False
        values = (Fraction(other.decode_exact(code)) for code in other.finite_codes.tolist())
        return all(self.quantum.denominator % value.denominator == 0 for value in values)
