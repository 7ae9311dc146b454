"""The formula of `train.accumulate` in exact rationals, one element after another.

It shares nothing with the code under test, which works in FP64, on exponent fields and by the quantiser.
"""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from formats import float_format
from train.accumulate import parse_accumulation
from train.recipe_table import RecipeTable


def floor_log2(v: Fraction) -> int:
    n, d = abs(v).numerator, abs(v).denominator
    e = n.bit_length() - d.bit_length()
    return e if Fraction(2) ** e <= abs(v) else e - 1


def to_significand(v: Fraction, bits: int, rounding: str) -> Fraction:
    """v with that many significant bits, any exponent."""
    if v == 0:
        return v
    ulp = Fraction(2) ** (floor_log2(v) - bits + 1)
    return ulp * (round(v / ulp) if rounding == "nearest_even" else int(v / ulp))


def reference(
    x: list[float], w: list[float], word: str, emin: tuple[int, int], start: Fraction = Fraction(0)
) -> Fraction:
    """The module's formula, read off a word's letters; emin: exponents of the operands' smallest normal numbers."""
    a_parsed = parse_accumulation(word)
    assert a_parsed is not None
    chunk, bits, rounding, F, promote = dataclasses.astuple(a_parsed)
    total, a = (start, Fraction(0)) if promote else (Fraction(0), start)
    for k in range(0, len(x), chunk):
        pairs = [(Fraction(u), Fraction(v)) for u, v in zip(x[k : k + chunk], w[k : k + chunk], strict=True) if u * v]
        if F is None:
            a = a + sum(u * v for u, v in pairs)
        elif pairs or a:
            tops = [max(floor_log2(u), emin[0]) + max(floor_log2(v), emin[1]) for u, v in pairs]
            unit = Fraction(2) ** (max(tops + ([floor_log2(a)] if a else [])) - F)
            a = unit * sum(int(v / unit) for v in [a, *(u * v for u, v in pairs)])
        a = to_significand(a, bits, rounding)
        if promote and ((k + chunk) % promote == 0 or k + chunk >= len(x)):
            total, a = to_significand(total + a, 24, "nearest_even"), Fraction(0)
    return total if promote else a


def reference_matrix(x: NDArray[Any], w: NDArray[Any], word: str, emin: tuple[int, int]) -> NDArray[np.float64]:
    return np.array([[float(reference(r.tolist(), c.tolist(), word, emin)) for c in w.T] for r in x])


def round_to(values: NDArray[Any], name: str, rounding: str = "nearest_even") -> NDArray[np.float64]:
    f = float_format(name)
    return f.decode(f.encode(np.asarray(values, np.float64), rounding=rounding))


def sums(word: str | None, **changes: Any) -> RecipeTable:
    table = RecipeTable("e4m3fn", "e3m2f", "e5m2", accumulate=word)
    return dataclasses.replace(table, **changes)
