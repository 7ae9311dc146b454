"""One immutable description of a floating-point format; limits, grid, codes, oracle and quantisers are all derived
from it.

A code is a sign bit, E exponent bits and M mantissa bits, in that order from the top. With exponent field k and
mantissa field m it stands for (IEEE 754-2019 clause 3.4; OCP OFP8; OCP MX section 5.3)

    (-1)^sign * 2^(k - bias) * (1 + m / 2^M)    where k > 0,
    (-1)^sign * 2^(1 - bias) * (0 + m / 2^M)    where k = 0 (zero and the subnormals),

except for the codes that its `specials` set aside. So positive values ascend with their codes, whole binades
included, which is what every fast algorithm in this package rests on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

import numpy as np
import numpy.typing as npt

from formats import codes as _codes
from formats.rounding import Overflow, Rounding

Specials = Literal["ieee", "fn", "finite"]

MAX_EXPONENT_BITS = 8
MAX_MANTISSA_BITS = 23
MAX_GRID_BITS = 16


@dataclass(frozen=True)
class FloatFormat:
    """A signed binary floating-point format.

    `specials` says which codes are no finite values: "ieee", the top exponent holds infinity and NaN; "fn", no
    infinity, and NaN only where all bits but the sign are ones; "finite", none. Two formats are equal if the same
    codes stand for the same values, whatever they are called: fp16 == e5m10; then canonical_name, e{E}m{M} with its
    suffix, is the same too. ValueError for parameters that describe nothing.
    """

    name: str = field(compare=False)
    exponent_bits: int
    mantissa_bits: int
    bias: int
    specials: Specials
    canonical_name: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        problem = impossible(self.exponent_bits, self.mantissa_bits, self.specials)
        if problem:
            raise ValueError(f"{self.name}: {problem}")
        if self.bias != standard_bias(self.exponent_bits):
            expected = standard_bias(self.exponent_bits)
            raise ValueError(
                f"{self.name}: bias must be {expected} for {self.exponent_bits} exponent bits, got {self.bias}"
            )
        suffix = {"ieee": "", "fn": "fn", "finite": "f"}[self.specials]
        object.__setattr__(self, "canonical_name", f"e{self.exponent_bits}m{self.mantissa_bits}{suffix}")

    def __str__(self) -> str:
        return self.name

    @property
    def bits(self) -> int:
        """Width of a code, sign included."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def has_inf(self) -> bool:
        """Whether some code is an infinity."""
        return self.specials == "ieee"

    @property
    def has_nan(self) -> bool:
        """Whether some code is NaN."""
        return self.specials != "finite"

    @property
    def max_code(self) -> int:
        """The code of the largest finite value: every smaller one, down to 0, is finite too."""
        codes_per_sign = 1 << (self.exponent_bits + self.mantissa_bits)
        reserved = {"ieee": 1 << self.mantissa_bits, "fn": 1, "finite": 0}[self.specials]
        return codes_per_sign - reserved - 1

    @property
    def inf_code(self) -> int | None:
        """The code of +inf: top exponent, mantissa 0. None where there is no infinity."""
        return self.max_code + 1 if self.has_inf else None

    @property
    def nan_code(self) -> int | None:
        """The NaN that `encode` writes: positive, and quiet (IEEE 754-2019 6.2.1) where there is a choice; None without one."""
        if self.specials == "ieee":
            return self.max_code + 1 + (1 << (self.mantissa_bits - 1))
        return self.max_code + 1 if self.specials == "fn" else None

    @property
    def emin(self) -> int:
        """Exponent of the smallest normal number, written 1.m × 2^e (IEEE 754-2019 3.3)."""
        return 1 - self.bias

    @property
    def emax(self) -> int:
        """Exponent of the largest finite number, written 1.m × 2^e."""
        return (self.max_code >> self.mantissa_bits) - self.bias

    @property
    def max(self) -> float:
        """The largest finite value."""
        return float(self.decode_exact(self.max_code))

    @property
    def smallest_normal(self) -> float:
        """2^emin."""
        return 2.0**self.emin

    @property
    def smallest_subnormal(self) -> float:
        """2^(emin - M), the smallest positive value and the spacing up to 2^(emin + 1); with M = 0 it is the smallest normal."""
        return 2.0 ** (self.emin - self.mantissa_bits)

    @property
    def eps(self) -> float:
        """2^-M, the distance from 1 to the next number if the exponent reaches both."""
        return 2.0**-self.mantissa_bits

    def grid(self) -> npt.NDArray[np.float64]:
        """Every finite value, ascending, each once (-0 left out): float64 [2 * max_code + 1]. ValueError over 16 bits."""
        if self.bits > MAX_GRID_BITS:
            raise ValueError(
                f"{self.name}: grid() is for up to {MAX_GRID_BITS} bits, and this has {self.bits}; use decode(codes)"
            )
        positive = self.decode(np.arange(1, self.max_code + 1))
        return np.concatenate([-positive[::-1], [0.0], positive])

    def decode(self, codes: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """The codes' values: integers of any shape to float64 of that shape, exact. ValueError for codes wider than `bits`."""
        return _codes.decode(self, codes)

    def decode_exact(self, code: int) -> Fraction | float:
        """One code's value, by the module's formula in rationals; a float for what no Fraction can be: -0.0, inf and nan."""
        if not 0 <= code < 1 << self.bits:
            raise ValueError(f"{self.name}: a code must be 0..{(1 << self.bits) - 1}, got {code}")
        negative, magnitude = divmod(code, 1 << (self.bits - 1))
        sign = -1 if negative else 1
        if magnitude > self.max_code:
            return sign * float("inf") if magnitude == self.inf_code else float("nan")
        if code and not magnitude:
            return -0.0
        k, m = divmod(magnitude, 1 << self.mantissa_bits)
        significand = Fraction(m, 1 << self.mantissa_bits) + (1 if k else 0)
        return sign * significand * Fraction(2) ** (max(k, 1) - self.bias)

    def encode(
        self,
        values: npt.ArrayLike | Sequence[float],
        rounding: str = Rounding.NEAREST_EVEN,
        overflow: str = Overflow.SATURATE,
    ) -> npt.NDArray[np.unsignedinteger]:
        """The codes of the values, rounded once.

        Any shape of float64, or of what float64 holds exactly, to uint8, uint16 or uint32, the narrowest that holds
        `bits`. NaN becomes `nan_code`. ValueError for NaN where the format has none, and for an array that float64
        does not hold.
        """
        return _codes.encode(self, values, rounding, overflow)

    def holds(self, other: "FloatFormat") -> bool:
        """Whether every finite value of `other` is one of this format's.

        A format's positive values are the n * 2^q with n of at most M + 1 bits and q >= emin - M, up to its maximum. So
        three comparisons decide, all exact: of the bits of the longest odd n, the smallest value and the largest.
        """
        # In the two lowest binades code and n are the same number; e1m1fn (0, 1, 2) ends before it needs two bits.
        longest_odd = (min(other.max_code, 2 ** (other.mantissa_bits + 1) - 1) - 1) | 1
        return (
            longest_odd.bit_length() <= self.mantissa_bits + 1
            and other.decode_exact(1) >= self.decode_exact(1)
            and other.decode_exact(other.max_code) <= self.decode_exact(self.max_code)
        )


def standard_bias(exponent_bits: int) -> int:
    """2^(E-1) - 1 (IEEE 754-2019 3.4), and so 0 for a single exponent bit."""
    return (1 << (exponent_bits - 1)) - 1


def impossible(exponent_bits: int, mantissa_bits: int, specials: Specials) -> str | None:
    """Why there is no such format, or None if there is."""
    if not 1 <= exponent_bits <= MAX_EXPONENT_BITS:
        return f"exponent_bits must be 1..{MAX_EXPONENT_BITS}, got {exponent_bits}"
    if not 0 <= mantissa_bits <= MAX_MANTISSA_BITS:
        return f"mantissa_bits must be 0..{MAX_MANTISSA_BITS}, got {mantissa_bits}"
    if specials == "ieee" and exponent_bits < 2:
        return "exponent_bits must be at least 2 where the top exponent holds inf and NaN, got 1"
    if specials == "ieee" and mantissa_bits < 1:
        return "mantissa_bits must be at least 1 to tell inf from NaN, got 0"
    if specials == "fn" and exponent_bits + mantissa_bits < 2:
        return "with the code of all ones for NaN its only finite value is 0"
    return None
