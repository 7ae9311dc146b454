"""The largest stable learning rate, by rounds: which rates to try next, given what became of those that were tried.

Learning rates are those of a lattice, 2^(k / n) for whole k, n to an octave, so that rounds, recipes and studies share runs, and
a rate is the same number on every machine. A round tries several rates at once, as many as fill a pack: with p inside a bracket,
it is p + 1 times narrower afterwards, so that W steps take log(W) / log(p + 1) rounds.

A search holds brackets, a stable rate and the next one tried above it, which is unstable, until the two are neighbours:

- `largest` is the largest stable rate with no unstable one between it and the lowest stable one; `unstable` the next above it.
- Stability may not be monotone: seeds are few, and rates that are too low train too little. Where a rate is stable above an
  unstable one, the edge above the highest stable rate is looked for too, and the result names every unstable rate below it:
  they are exceptions, to be read with their counts, and not passed over.
- Where no rate that was tried is stable, the search goes down, and looks into gaps of more than two octaves, since stable ones
  may lie between rates too low to train and rates too high. Where the highest is stable, it goes up. It goes two octaves at once,
  or as far as it has looked already, until its limits; what it did not find within them is said to lie beyond.

Only verdicts decide, so whoever has the same results asks for the same rates. Rates are whole numbers k here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from itertools import pairwise
from typing import Literal

RATE_LIMIT = 100.0  # the largest learning rate of a study
LOWEST = -100  # octaves: below, no search looks


def rate_at(k: int, per_octave: int) -> float:
    """2^(k / per_octave), correctly rounded, whatever the machine's own pow does."""
    octave, part = divmod(k, per_octave)
    with localcontext() as context:
        context.prec = 60
        root = float(Decimal(2) ** (Decimal(part) / per_octave))
    return math.ldexp(root, octave)


def nearest(rate: float, per_octave: int) -> int:
    """The k whose rate is nearest, in octaves; from the lowest that is looked at to the largest that a study may have."""
    top = math.floor(math.log2(RATE_LIMIT) * per_octave)
    return max(LOWEST * per_octave, min(round(math.log2(rate) * per_octave), top))


@dataclass(frozen=True)
class Limits:
    """The lowest and the highest k that a search may try, and how far it goes at once, at least, where it has no bracket."""

    lowest: int
    highest: int
    stride: int


def limits(rates: Sequence[int], per_octave: int, octaves: int) -> Limits:
    """As far as `octaves` beyond the rates of the study itself, on either side."""
    top = math.floor(math.log2(RATE_LIMIT) * per_octave)
    lowest = max(min(rates) - octaves * per_octave, LOWEST * per_octave)
    return Limits(lowest, min(max(rates) + octaves * per_octave, top), 2 * per_octave)


@dataclass(frozen=True)
class Edge:
    """Where the stable rates end, as far as it is known. largest: None where none is stable; unstable: None where none is above.

    highest: the largest stable rate of all. exceptions: unstable rates below `highest`. beyond: where what was not found lies.
    """

    largest: int | None
    unstable: int | None
    highest: int | None
    exceptions: tuple[int, ...]
    beyond: Literal["", "below", "above"]

    @property
    def monotone(self) -> bool:
        """Whether no stable rate lies above an unstable one."""
        return not self.exceptions


def edge(stable: Mapping[int, bool]) -> Edge:
    """The edge by the verdicts on all rates that were tried."""
    good = sorted(k for k, verdict in stable.items() if verdict)
    bad = sorted(k for k, verdict in stable.items() if not verdict)
    if not good:
        return Edge(None, bad[0], None, (), "below")
    unstable = next((k for k in bad if k > good[0]), None)
    largest = max(k for k in good if unstable is None or k < unstable)
    exceptions = tuple(k for k in bad if k < good[-1])
    return Edge(largest, unstable, good[-1], exceptions, "above" if not bad or bad[-1] < good[-1] else "")


def next_rates(stable: Mapping[int, bool], points: int, within: Limits) -> list[int]:
    """The rates to try in the next round, rising, `points` of them at most (two where there are two edges); none at the end."""
    found = edge(stable)
    tried = sorted(stable)
    span = tried[-1] - tried[0]
    if found.highest is None or found.largest is None:
        return _without_a_stable_one(tried, points, within)
    brackets = []
    if found.unstable is not None:
        brackets.append((found.largest, found.unstable))
    above = next((k for k in tried if k > found.highest), None)
    if above is not None and found.highest != found.largest:
        brackets.append((found.highest, above))
    wanted = [inside for low, high in brackets for inside in between(low, high, max(1, points // len(brackets)))]
    if above is None:
        reach = min(within.highest - tried[-1], max(within.stride, span))
        wanted += [tried[-1] + step for step in _steps(reach, max(1, points // (len(brackets) + 1)))]
    return sorted(wanted)


def _without_a_stable_one(tried: list[int], points: int, within: Limits) -> list[int]:
    """Half of the points below, the other half where the gaps are wide; all of them where the other has none."""
    reach = min(tried[0] - within.lowest, max(within.stride, tried[-1] - tried[0]))
    wide = max((high - low for low, high in pairwise(tried)), default=0) > within.stride
    inside = 0 if not wide else points if reach <= 0 else -(-points // 2)
    below = [tried[0] - step for step in _steps(reach, max(1, points - inside))]
    return sorted({*below, *filled(tried, len(tried) + inside)} - set(tried))


def between(low: int, high: int, points: int) -> list[int]:
    """At most `points` whole numbers inside an interval, evenly."""
    count = min(points, high - low - 1)
    return [low + i * (high - low) // (count + 1) for i in range(1, count + 1)]


def _steps(reach: int, points: int) -> list[int]:
    """At most `points` whole numbers from 1 to `reach`, evenly, the last among them."""
    count = max(0, min(points, reach))
    return [-(-i * reach // count) for i in range(1, count + 1)]


def filled(rates: Sequence[int], points: int) -> list[int]:
    """The rates, and as many between them, as evenly as they allow, as make `points` in all."""
    ends = sorted(set(rates))
    gaps = list(pairwise(ends))
    inside = [0] * len(gaps)
    for _ in range(points - len(ends)):
        widths = [
            (high - low) / (n + 1) if high - low - 1 > n else 0.0 for (low, high), n in zip(gaps, inside, strict=True)
        ]
        if not any(widths):
            break
        inside[widths.index(max(widths))] += 1
    return sorted({*ends, *(k for (low, high), n in zip(gaps, inside, strict=True) for k in between(low, high, n))})
