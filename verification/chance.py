"""Judging stochastic rounding: by its own random numbers, so by statistics, with the error of the first kind stated.

A value a share d of the way from its lower neighbour to the upper one must go up with probability d. The quantiser is given n
copies of such a value, many values at once; the count of those that went up is binomial. Each is tested by itself, and so are
two sums over all values, of what went up and of what went away from zero, in which a small bias adds up: with n copies of m
values a bias b in probability stands out by 2 b sqrt(n m) standard deviations or more. Each test has a chance of ALPHA to be
failed by an unbiased quantiser. Results must be one of the two neighbours, and values of the format must stay, always.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from verification import oracle
from verification.calls import Caller
from verification.elements import failures, not_applicable
from verification.laws import Failure, Flags, Floats, Places, Verdict, decision_point, off_grid
from verification.points import INTEGERS
from verification.question import Question, smallest_normal

ALPHA = 1e-9
COPIES = {"quick": 1 << 14, "conditional": 1 << 18}
STAY = 256
SHARES = (0.0625, 1 / 3, 0.5, 0.71, 0.9375)
INTERVALS = 10
NOTHING_BETWEEN = "no number of the input's dtype lies between two values"


def judge_chance(
    caller: Caller, question: Question, dtype: torch.dtype, level: str, bias: float
) -> tuple[int, list[Verdict]]:
    """How many results were seen, and what became of each law."""
    copies = COPIES[level]
    question = question._replace(rounding="nearest_even")  # for what no rounding moves
    points = _points(question, dtype)
    seen = [caller(torch.full((copies,), x, dtype=dtype)).double().numpy() for x, _, _ in points]
    stays = _staying(caller, question, dtype)
    inputs = torch.tensor([x for x, _, _ in points], dtype=dtype)
    outside = [
        ~((got == low) | (got == high)) & ~np.isnan(got) for got, (_, low, high) in zip(seen, points, strict=True)
    ]
    count = copies * len(points)
    stray = sum(int(wrong.sum()) for wrong in outside)
    if points:
        found = [
            _first("rounding", count, stray, inputs, seen, outside, points, question),
            _grid(question, inputs, seen, count),
            *stays,
            _unbiased(seen, points, copies, question, dtype, bias),
        ]
    else:  # the input's dtype has nothing that would have to be rounded
        count = sum(verdict.checked for verdict in stays)
        found = list(stays)
        found += [not_applicable(law, NOTHING_BETWEEN) for law in ("rounding", "on_grid", "unbiased")]
    judged = {verdict.law for verdict in found}
    found += [not_applicable(law) for law in ("ties", "subnormals", "overflow_point", "single_rounding", "monotone",
                                              "odd_symmetry", "deterministic", "round_trip") if law not in judged]  # fmt: skip
    return count, found


def _points(question: Question, dtype: torch.dtype) -> list[tuple[float, float, float]]:
    """Values that the dtype holds, with their neighbours: of both signs, subnormal and normal."""
    values = oracle.finite_values(question.f)
    positive = np.flatnonzero(values >= 0)[:-1]
    normal = smallest_normal(question.f)
    small = positive[values[positive] < normal]
    chosen = {*_spread(positive, INTERVALS).tolist(), *_spread(small, 2).tolist()}
    if question.f.signed:
        negative = np.flatnonzero(values < 0)
        chosen |= {*_spread(negative, INTERVALS).tolist()}
    points = []
    for place in sorted(chosen):
        low, high = float(values[place]), float(values[place + 1])
        for share in SHARES:
            x = float(torch.tensor(low + share * (high - low), dtype=torch.float64).to(dtype))
            if low < x < high:
                points.append((x, low, high))
    return points


def _spread(places: Places, most: int) -> Places:
    return (
        places[np.unique(np.linspace(0, len(places) - 1, min(len(places), most)).astype(int))]
        if len(places)
        else places
    )


def _staying(caller: Caller, question: Question, dtype: torch.dtype) -> list[Verdict]:
    """Values of the format, NaN and infinity: no random number moves them."""
    f = question.f
    values = torch.tensor(oracle.finite_values(f)[:: max(1, 2 ** (f.bits - 10))], dtype=dtype)
    special = torch.tensor([torch.inf, -torch.inf], dtype=dtype)
    found = []
    nonzero = values[values != 0]
    for law, x in (("idempotent", nonzero), ("signed_zero", torch.tensor([0.0, -0.0], dtype=dtype)),
                   ("infinity", special), ("nan", torch.tensor([torch.nan], dtype=dtype))):  # fmt: skip
        if law == "nan" and not f.has_nan:
            found.append(not_applicable(law))
            continue
        many = x.repeat(STAY)
        got = caller(many)
        right = torch.from_numpy(question.expected(many.double().numpy())).to(dtype)
        same = (got == right) & (got.signbit() == right.signbit()) | (got.isnan() & right.isnan())
        broken = np.flatnonzero((~same & ~caller.unanswered).numpy())
        smallest = failures(question, many, got, broken, 1, law, "sometimes")[0] if len(broken) else None
        found.append(Verdict(law, "fail" if smallest else "pass", len(many), len(broken), smallest))
    return found


def _first(
    law: str, checked: int, count: int, inputs: Tensor, seen: list[Floats], outside: list[Flags],
    points: list[tuple[float, float, float]], question: Question,
) -> Verdict:  # fmt: skip
    if not count:
        return Verdict(law, "pass", checked, 0)
    at = min((i for i, wrong in enumerate(outside) if wrong.any()), key=lambda i: abs(points[i][0]))
    x, low, high = points[at]
    got = float(seen[at][outside[at]][0])
    near = low if abs(got - low) < abs(got - high) else high
    bits = _bits(inputs[at : at + 1])
    note = f"neither of its neighbours {low!r} and {high!r}"
    return Verdict(law, "fail", checked, count, Failure(x, bits, got, near, law, note, decision_point(question.f, x)))


def _grid(question: Question, inputs: Tensor, seen: list[Floats], checked: int) -> Verdict:
    given = inputs.double().numpy()
    off = [off_grid(question.f, np.full(got.shape, x), got) for x, got in zip(given, seen, strict=True)]
    count = sum(map(len, off))
    if not count:
        return Verdict("on_grid", "pass", checked, 0)
    at = next(i for i, places in enumerate(off) if len(places))
    got = float(seen[at][off[at][0]])
    right = float(question.expected(given[at : at + 1])[0])
    return Verdict(
        "on_grid", "fail", checked, count, Failure(float(given[at]), _bits(inputs[at : at + 1]), got, right, "on_grid")
    )


def _unbiased(
    seen: list[Floats], points: list[tuple[float, float, float]], copies: int, question: Question, dtype: torch.dtype,
    allowed: float,
) -> Verdict:  # fmt: skip
    ups = np.array([int((got == high).sum()) for got, (_, _, high) in zip(seen, points, strict=True)])
    shares = np.array([(x - low) / (high - low) for x, low, high in points])
    outward = np.array([1.0 if high > 0 else -1.0 for _, _, high in points])
    least, most = np.maximum(shares - allowed, 0.0), np.minimum(shares + allowed, 1.0)
    tails = np.minimum(stats.binom.cdf(ups, copies, least), stats.binom.sf(ups - 1, copies, most))
    excess, spread = ups - copies * shares, np.sqrt(np.sum(copies * shares * (1 - shares)))
    sums = {"up": excess.sum(), "away from zero": (excess * outward).sum()}
    beyond = {way: np.sign(n) * max(0.0, abs(n) - allowed * copies * len(points)) / spread for way, n in sums.items()}
    worst = int(np.argmin(tails))
    unlikely = [way for way, z in beyond.items() if 2 * stats.norm.sf(abs(z)) < ALPHA]
    broken = int((2 * tails < ALPHA / len(points)).sum())
    if not broken and not unlikely:
        limit = allowed + 6 / (2 * np.sqrt(copies * len(points)))
        note = f"a mean bias beyond {limit:.1e} of the distance between neighbours would have been seen"
        return Verdict("unbiased", "pass", copies * len(points), 0, None, note)
    x, low, high = points[worst]
    mean = low + (high - low) * float(ups[worst]) / copies
    where = "".join(f"; over all values {beyond[way]:+.0f} standard deviations {way}" for way in unlikely)
    bias = excess[worst] / copies
    note = f"the mean of {copies:,} results; bias {bias:+.2e} of the distance between {low!r} and {high!r}{where}"
    pattern = _bits(torch.tensor([x], dtype=dtype))
    smallest = Failure(x, pattern, mean, x, "unbiased", note, decision_point(question.f, x))
    return Verdict("unbiased", "fail", copies * len(points), max(broken, 1), smallest)


def _bits(x: Tensor) -> int:
    return int(x.view(INTEGERS[x.dtype])[0]) & ((1 << (x.dtype.itemsize * 8)) - 1)
