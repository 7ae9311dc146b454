"""What a code of a known format stands for, by the formulas of the standards, in rationals: shares nothing with `formats`.

IEEE 754-2019, section 3.4, and OCP's OFP8 and MX for narrow formats; the Posit Standard (2022), section 3.2, its formula with the
sign bit in it; a logarithmic number by 60 digits of mpmath, rounded to FP32 by NumPy.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Literal, NamedTuple

import mpmath
import numpy as np


class Fields(NamedTuple):
    """Widths, bias, and which codes are no finite values: the top exponent's, all ones', that of -0, or none."""

    exponent: int
    mantissa: int
    bias: int
    specials: Literal["ieee", "fn", "fnuz", "none"]
    subnormals: bool = True


FLOATS = {
    "fp64": Fields(11, 52, 1023, "ieee"), "fp32": Fields(8, 23, 127, "ieee"), "tf32": Fields(8, 10, 127, "ieee"),
    "bf16": Fields(8, 7, 127, "ieee"), "fp16": Fields(5, 10, 15, "ieee"), "e5m2": Fields(5, 2, 15, "ieee"),
    "e4m3fn": Fields(4, 3, 7, "fn"), "e4m3": Fields(4, 3, 7, "ieee"), "e3m4": Fields(3, 4, 3, "ieee"),
    "e5m2fnuz": Fields(5, 2, 16, "fnuz"), "e4m3fnuz": Fields(4, 3, 8, "fnuz"), "e4m3b11fnuz": Fields(4, 3, 11, "fnuz"),
    "e2m3fn": Fields(2, 3, 1, "none"), "e3m2fn": Fields(3, 2, 3, "none"), "e2m1fn": Fields(2, 1, 1, "none"),
    "e1m1f": Fields(1, 1, 0, "none"), "e3m2-nosub": Fields(3, 2, 3, "ieee", False), "e8m0f": Fields(8, 0, 127, "none"),
    "e8m23f": Fields(8, 23, 127, "none"), "e8m23-nosub": Fields(8, 23, 127, "ieee", False),
}  # fmt: skip
ELEMENTS = {
    "mxfp8_e4m3fn": "e4m3fn", "mxfp8_e5m2": "e5m2", "mxfp6_e2m3fn": "e2m3fn", "mxfp6_e3m2fn": "e3m2fn", "mxfp4": "e2m1fn",
    "mxint8": "int8q6", "nvfp4": "e2m1fn", "e4m3fn@tile128x128": "e4m3fn",
}  # fmt: skip
# Codes by two's complement, in units; the lowest is left out where a format is symmetric.
INTEGERS = {
    "int8": (8, Fraction(1)),
    "int8q6": (8, Fraction(1, 64)),
    "int2": (2, Fraction(1)),
    "int16": (16, Fraction(1)),
}
POSITS = {"posit3": 3, "posit8": 8, "posit16": 16}


def exact(name: str, code: int) -> Fraction | float:
    """A code's value; a float for -0, infinities and NaN. KeyError for a name that is not here."""
    name = ELEMENTS.get(name, name)
    if name in INTEGERS:
        bits, unit = INTEGERS[name]
        return (code - (code >> (bits - 1) << bits)) * unit
    if name in POSITS:
        return _posit(code, POSITS[name])
    if name == "lns8q3":
        return _logarithmic(code)
    if name == "e8m0fnu":  # OCP MX v1.0, section 5.4.1
        return math.nan if code == 255 else Fraction(2) ** (code - 127)
    if (
        name == "binary3p1uf"
    ):  # P3109: unsigned, finite, no mantissa: 0, then powers of two about 2^0 = code 4, NaN last
        return math.nan if code == 7 else Fraction(2) ** (code - 4) if code else Fraction(0)
    return _float(code, FLOATS[name])


def _float(code: int, f: Fields) -> Fraction | float:
    negative, rest = divmod(code, 1 << (f.exponent + f.mantissa))
    sign, (e, m) = 1 - 2 * negative, divmod(rest, 1 << f.mantissa)
    if f.specials == "fnuz" and negative and not rest:
        return math.nan
    if f.specials == "ieee" and e == (1 << f.exponent) - 1:
        return math.nan if m else sign * math.inf
    if f.specials == "fn" and rest == (1 << (f.exponent + f.mantissa)) - 1:
        return math.nan
    if not rest:
        return -0.0 if negative else Fraction(0)
    if e == 0 and f.subnormals:
        return sign * Fraction(m, 1 << f.mantissa) * Fraction(2) ** (1 - f.bias)
    return sign * (1 + Fraction(m, 1 << f.mantissa)) * Fraction(2) ** (e - f.bias)


def _posit(code: int, bits: int) -> Fraction | float:
    """((1 - 3 S) + F) 2^((1 - 2 S)(4 R + E + S)), of the bits as they stand."""
    if code in (0, 1 << (bits - 1)):
        return math.nan if code else Fraction(0)
    s, digits = code >> (bits - 1), f"{code:0{bits}b}"[1:]
    k = len(digits) - len(digits.lstrip(digits[0]))
    r = k - 1 if digits[0] == "1" else -k
    tail = digits[k + 1 :]
    e, f = int(tail[:2].ljust(2, "0"), 2), tail[2:]
    fraction = Fraction(int(f, 2), 1 << len(f)) if f else Fraction(0)
    return ((1 - 3 * s) + fraction) * Fraction(2) ** ((1 - 2 * s) * (4 * r + e + s))


def _logarithmic(code: int) -> Fraction | float:
    """8 bits: a sign, and 7 of biased logarithm, 3 of them behind the point."""
    sign, magnitude = 1 - 2 * (code >> 7), code & 127
    if not magnitude:
        return math.nan if code else Fraction(0)
    with mpmath.workdps(60):
        value = mpmath.mpf(2) ** (mpmath.mpf(magnitude - 64) / 8)
        return sign * Fraction(float(np.float32(float(value))))
