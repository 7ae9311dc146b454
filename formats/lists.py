"""Formats that are a list of values: any finite set of numbers is one, with the same interface and the same proofs.

Three well-known families are made here. Values are rationals; nothing else is stored.

NF4 (Dettmers et al., QLoRA, 2305.14314, appendix E): 16 quantiles of the normal distribution, normalised to [-1, 1], as the FP32
numbers that its table gives.

Posits (Standard for Posit Arithmetic 2022, es = 2): a sign, a run of equal bits (the regime r), two exponent bits e and a
fraction, negative codes in two's complement; 2^(4r + e) (1 + f); the code 10...0 is NaR, which stands for NaN here. The nearest
modes divide two neighbours as the standard does, at the posit of one more bit that lies between them, not at their mean, and a
value that is not zero never rounds to zero.

Logarithmic numbers (LNS): a sign and a biased fixed-point logarithm with F fraction bits, |value| = 2^(c / 2^F - 2^(I-1)) for
magnitude codes c > 0, code 0 being zero. They are irrational but for whole logarithms, so each is the FP32 number nearest
to it, which is what a tensor can hold.
"""

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from hashlib import sha256
from itertools import pairwise
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from formats.spec import ElementFormat, Interval

MAX_BITS = 16
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


_made: "WeakValueDictionary[str, GridFormat]" = WeakValueDictionary()


def made_list(canonical_name: str) -> "GridFormat | None":
    """The list of values of that canonical name, if there is one in this process: compiled programs know it by name."""
    return _made.get(canonical_name)


@dataclass(frozen=True)
class GridFormat(ElementFormat):
    """A format that is its list of values, ascending, at least two.

    values: numbers or rationals, each once. codes: the code of each, by default its place in the list; neighbours' codes
    must differ in parity, which is what nearest_even and to_odd go by. nan_code: a code that stands for NaN, if any.
    dividers: where the nearest modes divide each two neighbours, by default at their mean; an exact tie goes to the even
    code, but a value of the list itself always stays. The list has no next value beyond its ends, so nothing finite
    overflows: it goes to the end, whatever `overflow` says.

    ValueError for values that do not ascend, codes that repeat or do not alternate, and more than 16 bits.
    """

    name: str = field(compare=False)
    values: tuple[Fraction, ...]
    codes: tuple[int, ...] = ()
    nan_code: int | None = None
    dividers: tuple[Fraction, ...] = ()
    canonical_name: str = field(init=False, repr=False, compare=False)

    signed = True
    has_negative_zero = False
    inf_code = None
    unbounded = False

    def __post_init__(self) -> None:
        exact = tuple(map(_exact, self.values))
        codes = tuple(self.codes) or tuple(range(len(exact)))
        dividers = tuple(map(_exact, self.dividers)) or tuple((a + b) / 2 for a, b in pairwise(exact))
        object.__setattr__(self, "values", exact)
        object.__setattr__(self, "codes", codes)
        object.__setattr__(self, "dividers", dividers)
        digest = sha256(repr((exact, codes, self.nan_code, dividers)).encode()).hexdigest()[:12]
        object.__setattr__(self, "canonical_name", f"{self.name}#{digest}")
        registered = _made.setdefault(self.canonical_name, self)
        if registered is not self:
            object.__setattr__(
                self, "_registered", registered
            )  # it lives as long as any list that is known by its name
        every = [*codes, *([] if self.nan_code is None else [self.nan_code])]
        object.__setattr__(self, "bits", max(1, max(every, default=0).bit_length()))
        problem = self._problem(every)
        if problem:
            raise ValueError(f"{self.name}: {problem}")

    def _problem(self, every: list[int]) -> str | None:
        falling = next((f"{float(b):g} after {float(a):g}" for a, b in pairwise(self.values) if b <= a), None)
        if falling:
            return f"values must ascend, each once, got {falling}; sort them"
        if len(self.values) < 2:
            return f"a format needs at least 2 values, got {len(self.values)}"
        if len(self.codes) != len(self.values) or len(set(every)) != len(every) or min(every) < 0:
            return "codes must be non-negative integers, one a value, each once"
        if self.bits > MAX_BITS:
            return f"codes must fit {MAX_BITS} bits, got {max(every)}; give fewer values or smaller codes"
        if any((a + b) % 2 == 0 for a, b in pairwise(self.codes)):
            return (
                "codes of neighbouring values must be one even, one odd, so that a tie has an even side; renumber them"
            )
        inside = len(self.dividers) == len(self.values) - 1 and all(
            low <= divider <= high for divider, (low, high) in zip(self.dividers, pairwise(self.values), strict=True)
        )
        return None if inside else "dividers must be one between each two neighbours"

    def __str__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple[object, ...]:
        # By the constructor, so that a list that comes from another process is known by its name here too.
        return GridFormat, (self.name, self.values, self.codes, self.nan_code, self.dividers)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:  # a long list is hashed once, not at every look into a cache
        return hash((self.values, self.codes, self.nan_code, self.dividers))

    @property
    def largest(self) -> Fraction:
        """The last value."""
        return self.values[-1]

    @property
    def lowest(self) -> Fraction:
        """The first value."""
        return self.values[0]

    @cached_property
    def finite_codes(self) -> npt.NDArray[np.int64]:
        """The codes in ascending order of value."""
        return np.array(self.codes, np.int64)

    @cached_property
    def _by_code(self) -> dict[int, Fraction]:
        return dict(zip(self.codes, self.values, strict=True))

    def has_code(self, code: int) -> bool:
        """Whether a code stands for a value or for NaN."""
        return code in self._by_code or code == self.nan_code

    def decode_exact(self, code: int) -> Fraction | float:
        """One code's value; nan for the code that stands for it. ValueError for a code that stands for nothing."""
        self._check_code(code)
        if code == self.nan_code:
            return float("nan")
        if code not in self._by_code:
            raise ValueError(f"{self.name}: no value has code {code}; there are {len(self.values)}")
        return self._by_code[code]

    def interval(self, x: Fraction) -> Interval:
        """The neighbours around x; beyond an end that end alone."""
        below = bisect_right(self.values, x) - 1
        if below < 0 or below == len(self.values) - 1 or x == self.values[below]:
            end = self.values[max(below, 0)]
            return Interval(end, end, end, self.codes[max(below, 0)] % 2 == 0)
        return Interval(self.values[below], self.values[below + 1], self.dividers[below], self.codes[below] % 2 == 0)

    def holds(self, other: ElementFormat) -> bool:
        """Whether every finite value of `other` is one of this format's."""
        if other.bits > MAX_BITS:
            return False
        mine = set(self.values)
        return all(Fraction(other.decode_exact(int(code))) in mine for code in other.finite_codes)


def _exact(value: float | int | Fraction) -> Fraction:
    return value if type(value) is Fraction else Fraction(value)


def grid_format(name: str, values: Iterable[float | int | Fraction]) -> GridFormat:
    """A format of one's own from any numbers, in any order; their codes are their places, ascending from 0."""
    return GridFormat(name, tuple(sorted({Fraction(value) for value in values})))


def nf4() -> GridFormat:
    """NormalFloat4, code = place, as its table has it."""
    return grid_format("nf4", NF4_VALUES)


def posit(bits: int) -> GridFormat:
    """posit{bits} of the 2022 standard (es = 2), 2 < bits <= 16."""
    if not 3 <= bits <= MAX_BITS:
        raise ValueError(f"posit{bits}: bits must be 3..{MAX_BITS}, got {bits}")
    half = 1 << (bits - 1)
    positive = [_posit_value(code, bits) for code in range(1, half)]
    between = [_posit_value(2 * code + 1, bits + 1) for code in range(1, half - 1)]
    values = (*(-v for v in reversed(positive)), Fraction(0), *positive)
    codes = (*range(half + 1, 2 * half), *range(half))
    # Nothing but zero itself rounds to zero: the dividers beside it are zero.
    dividers = (*(-v for v in reversed(between)), Fraction(0), Fraction(0), *between)
    return GridFormat(f"posit{bits}", values, codes, nan_code=half, dividers=dividers)


def _posit_value(code: int, bits: int) -> Fraction:
    """2^(4r + e) (1 + f) of a positive code, its missing trailing bits being zeros."""
    digits = f"{code:0{bits}b}"[1:]
    run = len(digits) - len(digits.lstrip(digits[0]))
    regime = run - 1 if digits[0] == "1" else -run
    rest = digits[run + 1 :]
    exponent = int(rest[:2].ljust(2, "0"), 2)
    fraction = rest[2:]
    significand = int("1" + fraction, 2)
    scale = 4 * regime + exponent - len(fraction)
    return Fraction(significand << scale if scale > 0 else significand, 1 << max(0, -scale))


def lns(bits: int, fraction_bits: int) -> GridFormat:
    """lns{bits}q{fraction_bits}: a sign and bits - 1 bits of biased logarithm, fraction_bits of them behind the point.

    The bias puts 2^0 in the middle, and the whole part has at most 8 bits, so that FP32 holds every value.
    """
    whole = bits - 1 - fraction_bits
    if not (3 <= bits <= MAX_BITS and fraction_bits >= 0 and 1 <= whole <= 7):
        raise ValueError(f"lns{bits}q{fraction_bits}: of 3..{MAX_BITS} bits 1..7 must be before the point, got {whole}")
    half = 1 << (bits - 1)
    middle = 1 << (bits - 2)
    positive = [_power_of_two(code - middle, fraction_bits) for code in range(1, half)]
    values = (*(-v for v in reversed(positive)), Fraction(0), *positive)
    codes = (*range(2 * half - 1, half, -1), *range(half))
    return GridFormat(f"lns{bits}q{fraction_bits}", values, codes)


def _power_of_two(steps: int, fraction_bits: int) -> Fraction:
    """2^(steps / 2^fraction_bits) rounded to the nearest number of 24 significant bits, in integers.

    With 2^(k/m) = 2^q * 2^(r/m), 0 <= r/m < 1, the significand n is floor(2^(r/m) 2^23 + 1/2): the largest n with
    (2n - 1)^m <= 2^(r + 24 m). No tie is possible, an irrational number being no midpoint.
    """
    m = 1 << fraction_bits
    q, r = divmod(steps, m)
    low, high = 1 << 23, 1 << 24
    while high - low > 1:
        n = (low + high) // 2
        low, high = (n, high) if (2 * n - 1) ** m <= 2 ** (r + 24 * m) else (low, n)
    return low * Fraction(2) ** (q - 23)
