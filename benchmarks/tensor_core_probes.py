"""What a matrix unit does to its sums, found out from products alone, by inputs made to tell (Fasi et al. 2021; 2511.10909).

A probe is one output element: a few products, powers of two nearly all of them, at chosen places along K. Most have the form

    L ... -L ... t        L = 2^16 twice, of opposite sign, and a small t

whose exact sum is t. Units that align a chunk's products to its largest exponent lose t where it lies below L's last kept bit
and in the chunk of an L, or where the accumulator holds L. So the smallest t that survives tells how many bits are kept, the
places where it survives tell the chunk, and where it survives although the accumulator held L, sums were promoted. All powers
here are exact products of two e4m3fn numbers, and an output that survives is the power itself, whatever it is rounded to.
`probe` asks in the order in which answers are needed; what could not be told is None.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from formats import Rounding
from train.accumulate import Accumulation

Product = Callable[[Tensor, Tensor], Tensor]
Term = tuple[int, float, float]  # a place along K, and the two factors there

LARGE, MIDDLE, LOWEST = 16, 12, -18  # exponents of products: the largest, one with room above, the least
ALIGNED_K, WIDEST_CHUNK, DISTANCES = 512, 128, (1, 2, 4, 8)
PROMOTED_KS = (512, 2048, 8192)


def power(q: int, place: int, factor: float = 1.0) -> Term:
    """The product factor · 2^q at a place, -18 <= q <= 16; the factor is on the grid of two or three mantissa bits."""
    half = q // 2
    return place, factor * 2.0 ** (q - half), 2.0**half


def outputs(multiply: Product, probes: Iterable[Sequence[Term]], K: int) -> list[float]:
    """The probes' sums: probe i is row i of the left factor by column i of the right one."""
    listed = list(probes)
    n = -(-len(listed) // 16) * 16
    a, b = torch.zeros(n, K), torch.zeros(K, n)
    for i, terms in enumerate(listed):
        for place, left, right in terms:
            a[i, place], b[place, i] = left, right
    found: list[float] = multiply(a, b).diagonal()[: len(listed)].tolist()
    return found


def fraction_bits(multiply: Product) -> int | None:
    """F: a chunk's products are cut at 2^(T-F), T the largest exponent among them; None where nothing is cut in reach."""
    exponents = list(range(LARGE, LOWEST - 1, -1))
    sums = outputs(multiply, [[power(LARGE, 0), power(LARGE, 1, -1), power(q, 2)] for q in exponents], ALIGNED_K)
    kept = [y == 2.0**q for q, y in zip(exponents, sums, strict=True)]
    return None if all(kept) else kept.index(False) - 1


def doublings(length: int | None) -> int:
    """How often 2^12 can be doubled by copies in a chunk that has room for two terms more."""
    return 4 if length is None or length >= 18 else 3


def last_chunk(length: int | None) -> int:
    """Where the last chunk begins, or the first, where chunks are unknown or too short for the terms to come."""
    known = length is not None and length >= 10 and ALIGNED_K % length == 0
    return ALIGNED_K - length if length is not None and known else 0


def significand_bits(multiply: Product, F: int | None, length: int | None) -> int | None:
    """p: the widest n 2^12 + 2^q that comes out whole, n = 1, 2, 4, ... to reach beyond F; no more than the output holds.

    The terms are the last chunk's, of `length` products if that is known: another chunk would align them again.
    """
    cases = [
        (n, q)
        for n in range(doublings(length) + 1)
        for q in range(MIDDLE - 1, LOWEST - 1, -1)
        if F is None or q >= MIDDLE - F
    ]
    at = last_chunk(length)
    probes = [[*(power(MIDDLE, at + i) for i in range(2**n)), power(q, at + 2**n)] for n, q in cases]
    found = zip(cases, outputs(multiply, probes, ALIGNED_K), strict=True)
    whole = [n + MIDDLE - q + 1 for (n, q), y in found if y == 2.0 ** (n + MIDDLE) + 2.0**q]
    return max(whole, default=None)


def rounding_of(up: float, down: float, tie: float, unit: float) -> str:
    """A rounding's name from what becomes of 0.75 units, of -0.75 and, above an even number, of 0.5."""
    names: dict[tuple[float, float], str] = {
        (0, 0): "toward_zero",
        (0, -1): "toward_negative",
        (1, 0): "toward_positive",
    }
    if (up, down) == (unit, -unit):
        return "nearest_even" if tie == 0 else "nearest_away"
    return names.get((up / unit, down / unit), "unknown")


def register_rounding(multiply: Product, F: int | None, length: int | None, p: int) -> str | None:
    """How the accumulator's last bit is rounded, told by bits that alignment lets through; None where none get through."""
    n = doublings(length)
    ulp = MIDDLE + n - p + 1
    if ulp - 2 < LOWEST or (F is not None and ulp - 2 < MIDDLE - F):
        return None
    at = last_chunk(length)
    places = range(at, at + 2**n)

    def around(sign: int, *parts: int) -> list[Term]:
        small = [power(ulp - part, places.stop + i, sign) for i, part in enumerate(parts)]
        return [*(power(MIDDLE, i, sign) for i in places), *small]

    whole = 2.0 ** (MIDDLE + n)
    up, down, tie = outputs(multiply, [around(1, 1, 2), around(-1, 1, 2), around(1, 1)], ALIGNED_K)
    return rounding_of(up - whole, down + whole, tie - whole, 2.0**ulp)


def alignment_rounding(multiply: Product, F: int) -> str:
    """How a product is cut: by what becomes of 1.5 · 2^(T-F-1) and of half a unit beside two terms that cancel."""
    unit = LARGE - F
    probes = [[power(LARGE, 0), power(LARGE, 1, -1), power(unit - 1, 2, factor)] for factor in (1.5, -1.5, 1.0)]
    up, down, tie = outputs(multiply, probes, ALIGNED_K)
    return rounding_of(up, down, tie, 2.0**unit)


def aligned_chunk(multiply: Product, F: int) -> tuple[int | None, bool]:
    """How many products are summed at once, and whether they lie side by side: where a t beside L and -L at d is lost."""
    cases = [(d, j) for d in DISTANCES for j in range(1, WIDEST_CHUNK + 2) if j != d]
    probes = [[power(LARGE, 0), power(LARGE, d, -1), power(LARGE - F - 1, j)] for d, j in cases]
    lost = {case: y == 0 for case, y in zip(cases, outputs(multiply, probes, ALIGNED_K), strict=True)}
    first = next((j for d, j in cases if d == 1 and not lost[d, j]), None)
    return first, first is not None and all(gone == (j < first) for (d, j), gone in lost.items() if d < first)


def exact_chunk(multiply: Product, p: int) -> tuple[int | None, bool]:
    """The same of a unit that cuts nothing: at which d a t right after L is lost before -L comes."""
    places = range(2, WIDEST_CHUNK + 2)
    probes = [[power(MIDDLE, 0), power(MIDDLE - p - 1, 1), power(MIDDLE, d, -1)] for d in places]
    kept = [y != 0 for y in outputs(multiply, probes, ALIGNED_K)]
    return (None, False) if all(kept) else (kept.index(False) + 2, not any(kept[kept.index(False) :]))


def accumulator_is_aligned(multiply: Product, F: int, length: int) -> bool:
    """Whether the accumulator is one of the terms that are aligned: L in it, and a chunk of t, lost one by one or added."""
    terms = [power(LARGE, 0), *(power(LARGE - F - 1, j) for j in range(length, 2 * length))]
    return outputs(multiply, [terms], ALIGNED_K)[0] == 2.0**LARGE


def exponents(multiply: Product, F: int) -> dict[str, str]:
    """Whether 1.5 · 1.5 aligns as 2^0 or as the 2^1 that it reaches, and a subnormal operand as itself or as e4m3fn's 2^-6."""
    of_product = [power(LARGE, 0), power(LARGE, 1, -1), power(LARGE - F, 2)]
    of_product[:2] = [(i, sign * 1.5 * 2.0**8, 1.5 * 2.0**8) for i, sign in ((0, 1), (1, -1))]
    found = {"product": of_product}
    if 1 - F >= LOWEST:
        found["subnormal"] = [(0, 2.0**-9, 2.0**8), (1, -(2.0**-9), 2.0**8), power(1 - F, 2)]
    kept = {name: y != 0 for name, y in zip(found, outputs(multiply, found.values(), ALIGNED_K), strict=True)}
    said = {"product": "sum of the operands'" if kept["product"] else "the product's own"}
    if "subnormal" in kept:
        said["subnormal"] = "its own" if kept["subnormal"] else "the smallest normal's"
    return said


def promotion(multiply: Product, F: int | None, p: int, length: int) -> dict[str, int | None]:
    """For some K, after how many products the accumulator goes elsewhere, None for never; K cut into parts shows as a part."""
    found: dict[str, int | None] = {}
    t = LARGE - (F if F is not None else p) - 1
    for K in PROMOTED_KS:
        places = range(length, K // 2 + 1, length)
        probes = [[power(LARGE, 0), power(t, j), power(LARGE, K - 1, -1)] for j in places]
        kept = [y == 2.0**t for y in outputs(multiply, probes, K)]
        found[str(K)] = places[kept.index(True)] if any(kept) else None
    return found


def probe(multiply: Product) -> dict[str, Any]:
    """Every answer, and under "accumulate" the accumulation that they make, None where they make none."""
    F = fraction_bits(multiply)
    length, side_by_side = (None, False) if F is None else aligned_chunk(multiply, F)
    p = significand_bits(multiply, F, length)
    answers: dict[str, Any] = {"fraction_bits": F, "significand_bits": p, "accumulate": None}
    if p is None:
        return answers
    if F is None:
        length, side_by_side = exact_chunk(multiply, p)
    else:
        answers |= {"alignment_rounding": alignment_rounding(multiply, F), "exponents": exponents(multiply, F)}
    rounding = register_rounding(multiply, F, length, p)
    answers |= {"rounding": rounding, "chunk": length, "chunk_is_contiguous": side_by_side}
    if length is None:
        return answers
    aligned = F is None or accumulator_is_aligned(multiply, F, length)
    answers |= {"accumulator_aligned": aligned, "promotion": promotion(multiply, F, p, length)}
    intervals = {answers["promotion"][str(K)] for K in PROMOTED_KS[1:]}  # the least K has room for short ones alone
    known = rounding in (Rounding.TOWARD_ZERO, Rounding.NEAREST_EVEN) and side_by_side and aligned
    if rounding is not None and known and answers.get("alignment_rounding", "toward_zero") == "toward_zero":
        with contextlib.suppress(ValueError):  # not one that `train.accumulate` has
            (promote,) = intervals
            answers["accumulate"] = Accumulation(length, p, Rounding(rounding), F, promote).name
    return answers
