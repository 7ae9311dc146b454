"""What every format has in common, and the floating-point ones: one immutable description from which limits, grid,
codes, reference, oracle and quantisers are derived.

A floating-point code is a sign bit (where the format is signed), E exponent bits and M mantissa bits, in that order from
the top. With exponent field k and mantissa field m it stands for (IEEE 754-2019 clause 3.4; OCP OFP8; OCP MX section 5.3;
IEEE P3109)

    (-1)^sign * 2^(k - bias) * (1 + m / 2^M)    where k > 0,
    (-1)^sign * 2^(1 - bias) * (0 + m / 2^M)    where k = 0 (zero and the subnormals),

except for the codes that its `specials` set aside. Without subnormals the first line holds for k = 0 too, save that code 0 is
zero. So non-negative values ascend with their codes, whole binades included, which is what every fast algorithm in this
package rests on.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from formats import codes as _codes
from formats.rounding import DEFAULT_RANDOM_BITS, Overflow, Rounding

Specials = Literal["ieee", "fn", "finite", "fnuz", "extended"]

MAX_EXPONENT_BITS = 8
MAX_MANTISSA_BITS = 23
MAX_BIAS = 512
MAX_GRID_BITS = 16


class Format(ABC):
    """A number format: something with a name, that a tensor can be quantised to."""

    name: str
    canonical_name: str

    def __str__(self) -> str:
        return self.name


class Interval(NamedTuple):
    """Two neighbours of a grid around a number: low <= x < high, where the nearest modes divide them, and low's parity."""

    low: Fraction
    high: Fraction
    middle: Fraction
    low_is_even: bool


class ElementFormat(Format):
    """A finite set of values with a code each: what a single number can be rounded to.

    Some codes may be infinities, NaN and -0. Codes of neighbouring values have alternating parity, and "even" and "odd" in
    a rounding's name are that parity.
    """

    bits: int
    nan_code: int | None
    """The NaN that `encode` writes; None where the format has none."""
    inf_code: int | None
    """The code of +inf; None where there is none."""
    signed: bool
    has_negative_zero: bool
    ties_away = False
    """Whether nearest_even sends ties away from zero in this format, as e8m0fnu's users agreed."""
    unbounded = True
    """Whether the grid goes on, as rounding sees it, beyond its last value, so that there is an overflow point."""

    @property
    def has_inf(self) -> bool:
        """Whether some code is an infinity."""
        return self.inf_code is not None

    @property
    def has_nan(self) -> bool:
        """Whether some code is NaN."""
        return self.nan_code is not None

    @property
    @abstractmethod
    def largest(self) -> Fraction:
        """The largest finite value, exact."""

    @property
    @abstractmethod
    def lowest(self) -> Fraction:
        """The lowest finite value, exact: negative in a signed format."""

    @property
    def max(self) -> float:
        """The largest finite value. ValueError where float64 cannot hold it: see `largest`."""
        return self._as_float(self.largest)

    @property
    def min(self) -> float:
        """The lowest finite value. ValueError where float64 cannot hold it: see `lowest`."""
        return self._as_float(self.lowest)

    def _as_float(self, value: Fraction) -> float:
        try:
            nearest = float(value)
        except OverflowError:
            nearest = float("inf")
        if nearest != value:
            raise ValueError(f"{self.name}: float64 can't hold {describe(value)}; use decode_exact, in rationals")
        return nearest

    @abstractmethod
    def decode_exact(self, code: int) -> Fraction | float:
        """One code's value in rationals; a float for what no Fraction can be: -0.0, inf and nan."""

    @abstractmethod
    def interval(self, x: Fraction) -> Interval:
        """The neighbours around x, the grid going on for ever upward and downward where the format is `unbounded`."""

    @cached_property
    @abstractmethod
    def finite_codes(self) -> npt.NDArray[np.int64]:
        """The codes of all finite values in ascending order of value, -0 left out. ValueError over 16 bits."""

    @abstractmethod
    def holds(self, other: "ElementFormat") -> bool:
        """Whether every finite value of `other` is one of this format's."""

    def grid(self) -> npt.NDArray[np.float64]:
        """Every finite value, ascending, each once (-0 left out): float64 [n].

        ValueError over 16 bits, and where float64 does not hold them.
        """
        return self.decode(self.finite_codes)

    def _check_listable(self) -> None:
        if self.bits > MAX_GRID_BITS:
            raise ValueError(
                f"{self.name}: grid() is for up to {MAX_GRID_BITS} bits, and this has {self.bits}; use decode(codes)"
            )

    def _check_code(self, code: int) -> None:
        if not 0 <= code < 1 << self.bits:
            raise ValueError(f"{self.name}: a code must be 0..{(1 << self.bits) - 1}, got {code}")

    def decode(self, codes: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """The codes' values: integers of any shape to float64 of that shape, exact.

        ValueError for codes wider than `bits`, and where float64 does not hold the format's values. For tensors, and for
        arrays of a narrower dtype, see `formats.decode`.
        """
        return np.asarray(_codes.decode(self, codes), np.float64)

    def encode(
        self,
        values: npt.ArrayLike | Sequence[float],
        rounding: str = Rounding.NEAREST_EVEN,
        overflow: str = Overflow.SATURATE,
        *,
        random_bits: npt.ArrayLike | None = None,
        stochastic_bits: int = DEFAULT_RANDOM_BITS,
    ) -> npt.NDArray[np.unsignedinteger]:
        """The codes of the values, rounded once.

        Any shape of float64, or of what float64 holds exactly, to uint8, uint16, uint32 or uint64, the narrowest that
        holds `bits`. NaN becomes `nan_code`. Stochastic modes need `random_bits`, integers in 0..2^stochastic_bits - 1 that
        broadcast against the values. ValueError for NaN where the format has none, and for an array that float64 does not
        hold. For tensors see `formats.encode`.
        """
        return _codes.encode(self, values, rounding, overflow, random_bits, stochastic_bits)


@dataclass(frozen=True)
class FloatFormat(ElementFormat):
    """A binary floating-point format.

    `specials` says which codes are no finite values: "ieee", the top exponent holds infinity and NaN; "fn", no infinity,
    and NaN only where all bits but the sign are ones; "finite", none; "fnuz", NaN in place of -0, no infinity (P3109's
    finite signed formats too); "extended", as P3109: infinity above the largest value and, signed, NaN in place of -0,
    unsigned, NaN above infinity. `signed`: without it there is no sign bit and there are no negative values. `subnormals`:
    without them codes with exponent field 0 are normal numbers, save 0. `zero`: without it code 0 is 2^-bias.
    `ties_away`: nearest_even sends ties away from zero, as e8m0fnu's users agreed.

    Two formats are equal if the same codes stand for the same values, whatever they are called: fp16 == e5m10; then
    canonical_name, which get_format understands, is the same too. ValueError for parameters that describe nothing.
    """

    name: str = field(compare=False)
    exponent_bits: int
    mantissa_bits: int
    bias: int
    specials: Specials
    signed: bool = True
    subnormals: bool = True
    zero: bool = True
    canonical_name: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        problem = impossible(self.exponent_bits, self.mantissa_bits, self.specials, self.bias) or self._nameless()
        if problem:
            raise ValueError(f"{self.name}: {problem}")
        # Without mantissa bits nothing is subnormal, so the flag says nothing.
        if not self.mantissa_bits and self.zero:
            object.__setattr__(self, "subnormals", True)
        object.__setattr__(self, "canonical_name", self._canonical_name())

    def _nameless(self) -> str | None:
        """Why no name could say what these parameters say, or None if one can."""
        p3109 = self.bias == p3109_bias(self.exponent_bits) and self.subnormals and self.zero
        if self.specials == "extended" and not p3109:
            return f"extended formats are IEEE P3109's, with bias {p3109_bias(self.exponent_bits)}"
        scale_only = not self.zero and self.mantissa_bits == 0 and self.bias == standard_bias(self.exponent_bits)
        if not self.signed and self.specials != "extended" and not (self.specials == "fn" and (p3109 or scale_only)):
            return "unsigned formats are IEEE P3109's and e{E}m0fnu"
        if not self.zero and self.signed:
            return "only the unsigned e{E}m0fnu has no zero"
        widest = self.exponent_bits > MAX_EXPONENT_BITS or self.mantissa_bits > MAX_MANTISSA_BITS
        if widest and not (self.specials in ("extended", "fn", "fnuz") and p3109 and self.bits <= MAX_GRID_BITS):
            is_fp64 = (self.exponent_bits, self.mantissa_bits, self.bias, self.specials) == (11, 52, 1023, "ieee")
            if not (is_fp64 and self.subnormals):
                return impossible_width(self.exponent_bits, self.mantissa_bits)
        return None

    def _canonical_name(self) -> str:
        if not self.zero:
            return f"e{self.exponent_bits}m0fnu"
        if not self.signed or self.specials == "extended" or self.exponent_bits > 11:
            kind = ("s" if self.signed else "u") + ("e" if self.specials == "extended" else "f")
            return f"binary{self.bits}p{self.mantissa_bits + 1}{kind}"
        if self.exponent_bits > MAX_EXPONENT_BITS and self.specials == "fnuz":
            return f"binary{self.bits}p{self.mantissa_bits + 1}sf"
        suffix = {"ieee": "", "fn": "fn", "finite": "f", "fnuz": "fnuz"}[self.specials]
        bias = "" if self.bias == default_bias(self.exponent_bits, self.specials) else f"b{self.bias}"
        return f"e{self.exponent_bits}m{self.mantissa_bits}{suffix}{bias}{'' if self.subnormals else '-nosub'}"

    def __str__(self) -> str:
        return self.name

    @property
    def bits(self) -> int:  # type: ignore[override]
        """Width of a code, sign included."""
        return self.signed + self.exponent_bits + self.mantissa_bits

    @property
    def ties_away(self) -> bool:  # type: ignore[override]
        """Only where there is no zero: e8m0fnu, as torch and ml_dtypes round it."""
        return not self.zero

    @property
    def has_negative_zero(self) -> bool:  # type: ignore[override]
        """Whether -0 has a code of its own."""
        return self.signed and self.specials in ("ieee", "fn", "finite")

    @property
    def max_code(self) -> int:
        """The code of the largest finite value: every smaller one, down to 0, is finite too."""
        codes_per_sign = 1 << (self.exponent_bits + self.mantissa_bits)
        reserved = {"ieee": 1 << self.mantissa_bits, "fn": 1, "finite": 0, "fnuz": 0, "extended": 2 - self.signed}
        return codes_per_sign - reserved[self.specials] - 1

    @property
    def inf_code(self) -> int | None:  # type: ignore[override]
        """The code of +inf: the one after the largest value. None where there is no infinity."""
        return self.max_code + 1 if self.specials in ("ieee", "extended") else None

    @property
    def nan_code(self) -> int | None:  # type: ignore[override]
        """The NaN that `encode` writes: positive, and quiet (IEEE 754-2019 6.2.1) where there is a choice; None without one."""
        if self.specials == "ieee":
            return self.max_code + 1 + (1 << (self.mantissa_bits - 1))
        if self.specials == "finite":
            return None
        if self.signed and self.specials in ("fnuz", "extended"):
            return 1 << (self.bits - 1)
        return (1 << (self.exponent_bits + self.mantissa_bits)) - 1

    @property
    def emin(self) -> int:
        """Exponent of the smallest normal number, written 1.m × 2^e (IEEE 754-2019 3.3)."""
        return int(self._gradual) - self.bias

    @property
    def emax(self) -> int:
        """Exponent of the largest finite number, written 1.m × 2^e."""
        return (self.max_code >> self.mantissa_bits) - self.bias

    @cached_property
    def largest(self) -> Fraction:
        """The largest finite value, exact."""
        return Fraction(self.decode_exact(self.max_code))

    @cached_property
    def lowest(self) -> Fraction:
        """The lowest finite value, exact: -largest, or unsigned the smallest there is."""
        return -self.largest if self.signed else Fraction(self.decode_exact(0))

    @property
    def smallest_normal(self) -> float:
        """The smallest number written 1.m × 2^e: 2^emin where there are subnormals, else the smallest positive value."""
        return self._as_float(Fraction(2) ** self.emin if self._gradual else self.smallest)

    @property
    def smallest_subnormal(self) -> float:
        """The smallest positive value: 2^(emin - M) where there are subnormals; with M = 0 it is the smallest normal."""
        return self._as_float(self.smallest)

    @cached_property
    def smallest(self) -> Fraction:
        """The smallest positive value, exact."""
        return Fraction(self.decode_exact(1 if self.zero else 0))

    @property
    def eps(self) -> float:
        """2^-M, the distance from 1 to the next number if the exponent reaches both."""
        return 2.0**-self.mantissa_bits

    @cached_property
    def finite_codes(self) -> npt.NDArray[np.int64]:
        """The codes of all finite values in ascending order of value, -0 left out."""
        self._check_listable()
        positive = np.arange(1 if self.zero else 0, self.max_code + 1)
        negative = positive[::-1] + (1 << (self.bits - 1)) if self.signed else positive[:0]
        return np.concatenate([negative, np.arange(int(self.zero)), positive])

    def decode_exact(self, code: int) -> Fraction | float:
        """One code's value, by the module's formula in rationals; a float for what no Fraction can be: -0.0, inf and nan."""
        self._check_code(code)
        negative, magnitude = divmod(code, 1 << (self.exponent_bits + self.mantissa_bits))
        sign = -1 if negative else 1
        if magnitude > self.max_code:
            return sign * float("inf") if magnitude == self.inf_code else float("nan")
        if negative and not magnitude:
            return -0.0 if self.has_negative_zero else float("nan")
        k, m = divmod(magnitude, 1 << self.mantissa_bits)
        if self.zero and (not magnitude or (self.subnormals and not k)):
            return sign * m * two_to(1 - self.bias - self.mantissa_bits)
        return sign * (m + (1 << self.mantissa_bits)) * two_to(k - self.bias - self.mantissa_bits)

    def interval(self, x: Fraction) -> Interval:
        """The neighbours around x, with an exponent that has no upper end; negative ones too, as if there were a sign."""
        magnitude = abs(x)
        if magnitude < self.smallest and not self._gradual:
            # Below the smallest value there is only zero, or nothing: then that value is the nearest there is.
            low, high, even = Fraction(0) if self.zero else self.smallest, self.smallest, True
        else:
            binade = max(exponent_of(magnitude), self.emin)
            quantum = two_to(binade - self.mantissa_bits)
            steps = magnitude // quantum
            low, high = steps * quantum, (steps + 1) * quantum
            # In each binade from emin on codes go up by 2^M; without subnormals emin's own binade begins with code 0.
            even = (steps + (binade - self.emin - (not self._gradual)) * 2**self.mantissa_bits) % 2 == 0
        if magnitude == low:
            return Interval(x, x, x, even)
        if x < 0:
            low, high, even = -high, -low, not even
        return Interval(low, high, (low + high) / 2, even)

    def holds(self, other: ElementFormat) -> bool:
        """Whether every finite value of `other` is one of this format's.

        A format's positive values are the n * 2^q with n of at most M + 1 bits and q >= emin - M, up to its maximum. So a
        few comparisons decide, all exact: of the bits of the longest odd n, the finest and the smallest value, and the
        largest.
        """
        if not isinstance(other, FloatFormat):
            if not self.lowest <= other.lowest <= other.largest <= self.largest:
                return False
            return all(self._has(Fraction(other.decode_exact(code))) for code in other.finite_codes.tolist())
        if (other.signed and not self.signed) or (other.zero and not self.zero):
            return False
        fine = other._finest >= self._finest if self._gradual else other.smallest >= self.smallest
        return other._longest_odd <= self.mantissa_bits + 1 and fine and other.largest <= self.largest

    def _has(self, value: Fraction) -> bool:
        """Whether it is a value of the format, or would be one if that had no ends: 0, or n * 2^q as `holds` says."""
        n, d = abs(value.numerator), value.denominator
        if not n or d & (d - 1):
            return not n
        shift = d.bit_length() - 1
        leading, last = n.bit_length() - 1 - shift, (n & -n).bit_length() - 1 - shift
        if leading <= self.emin and not self._gradual and abs(value) < self.smallest:
            return False
        return last >= max(leading, self.emin) - self.mantissa_bits

    @property
    def shares_programs(self) -> bool:
        """Whether one program can round to it and to other such formats, in FP32: see `format_parameters`.

        That takes a sign, -0, gradual underflow, codes whose parity is that of FP32's bits, and subnormals that are FP32's own or
        multiples of its smallest normal number, 2^-126.
        """
        alike = self.has_negative_zero and self._gradual and (self.mantissa_bits > 0 or self.bias % 2 == 1)
        return alike and (self.emin == -126 or self.emin - self.mantissa_bits >= -126)

    @property
    def _gradual(self) -> bool:
        """Whether the binade of exponent field 0 is zero and subnormals (gradual underflow)."""
        return self.subnormals and self.zero

    @property
    def _longest_odd(self) -> int:
        """Bits of the longest odd n in any value n * 2^q."""
        if not self.mantissa_bits or (self.max_code and not self.subnormals):
            return self.mantissa_bits + 1
        # In the two lowest binades code and n are the same number; e1m1fn (0, 1, 2) ends before it needs two bits.
        return ((min(self.max_code, (2 << self.mantissa_bits) - 1) - 1) | 1).bit_length()

    @property
    def _finest(self) -> Fraction:
        """The smallest power of two that all values are multiples of."""
        return Fraction(2) ** (self.emin - self.mantissa_bits) if self.mantissa_bits else self.smallest


def standard_bias(exponent_bits: int) -> int:
    """2^(E-1) - 1 (IEEE 754-2019 3.4), and so 0 for a single exponent bit."""
    return (1 << (exponent_bits - 1)) - 1


def p3109_bias(exponent_bits: int) -> int:
    """2^(E-1): P3109's 2^(K-P-1) signed and 2^(K-P) unsigned, where there is one exponent bit more (4.0, section 3.1)."""
    return 1 << (exponent_bits - 1)


def default_bias(exponent_bits: int, specials: Specials) -> int:
    """The bias of a name that gives none: IEEE 754's, and 2^(E-1) where -0 made room for NaN."""
    return p3109_bias(exponent_bits) if specials in ("fnuz", "extended") else standard_bias(exponent_bits)


def impossible_width(exponent_bits: int, mantissa_bits: int) -> str | None:
    """Why a name of this package can't have so many bits, or None if it can."""
    if not 1 <= exponent_bits <= MAX_EXPONENT_BITS:
        return f"exponent_bits must be 1..{MAX_EXPONENT_BITS}, got {exponent_bits}"
    if not 0 <= mantissa_bits <= MAX_MANTISSA_BITS:
        return f"mantissa_bits must be 0..{MAX_MANTISSA_BITS}, got {mantissa_bits}"
    return None


def impossible(exponent_bits: int, mantissa_bits: int, specials: Specials, bias: int = 0) -> str | None:
    """Why there is no such format, or None if there is."""
    if exponent_bits < 1 or mantissa_bits < 0:
        return impossible_width(exponent_bits, mantissa_bits)
    if exponent_bits <= MAX_EXPONENT_BITS and not 0 <= bias <= MAX_BIAS:
        return f"bias must be 0..{MAX_BIAS}, got {bias}"
    if specials == "ieee" and exponent_bits < 2:
        return "exponent_bits must be at least 2 where the top exponent holds inf and NaN, got 1"
    if specials == "ieee" and mantissa_bits < 1:
        return "mantissa_bits must be at least 1 to tell inf from NaN, got 0"
    if specials == "fn" and exponent_bits + mantissa_bits < 2:
        return "with the code of all ones for NaN its only finite value is 0"
    return None


def exponent_of(x: Fraction) -> int:
    """floor(log2(x)) for x > 0; very low for 0."""
    if not x:
        return -(1 << 20)
    guess = x.numerator.bit_length() - x.denominator.bit_length()
    return guess if x >= two_to(guess) else guess - 1


@lru_cache(maxsize=4096)
def two_to(exponent: int) -> Fraction:
    """2^exponent."""
    return Fraction(2) ** exponent


def describe(value: Fraction) -> str:
    """A rational for a person to read: m x 2^e."""
    exponent = exponent_of(abs(value))
    return f"{float(value / Fraction(2) ** exponent):g} × 2^{exponent}"
