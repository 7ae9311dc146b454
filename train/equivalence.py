"""As stable as: shown, not assumed. Two one-sided tests within a margin (Schuirmann 1987, J. Pharmacokin. Biopharm. 15:657).

That a test finds no difference says nothing where it had little chance to: with 8 seeds it misses nearly any. So "as stable as"
turns the question round. Its null hypotheses are that the first recipe's share of diverged runs is higher than the second's by
the margin or more, and that it is lower by the margin or more; each is tested at alpha, and only where both are rejected are
the two equivalent. No further correction is needed: of the two nulls at most one is true.

Shares, on pairs of the same seeds: Tango's score is the statistic (1998, Stat. Med. 17:891) and its p-value exact, the largest
chance of so small a score over all tables that the null allows (unconditional, as Sidik 2003, Stat. Med. 22:265): by its normal
approximation 25 pairs of which none diverged would pass at a margin of 10 %, though such luck has a chance of 0.9^25 = 7 %;
exactly it takes 29; and at 320 pairs it would still call 6.3 % of formats that differ by 2 % further apart, at 5 %. Up to
`EXACT_PAIRS` pairs the p-values of all tables are made at once, above that of the one that was seen.

Losses: Student's t of the paired differences against either margin, exact for normal differences.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats
from scipy.special import gammaln, xlogy

from train.proportions import Pairs, tango_score

Floats = npt.NDArray[np.float64]

EXACT_PAIRS = 300
# Values of P(second alone) at which the null's chance is looked at, evenly apart by their arcsine, by which chances of any size
# spread alike: p-values from 0.001 to 0.2 are within 0.1 % of those of 900 values. Twice as many for one table of many pairs.
NUISANCE = 160
COARSE = 64  # for power
POWER_PAIRS = 100  # up to here power is summed over all tables
WITHIN = 1e-9  # scores this close are the same table's, or a mirrored one's


class Equivalence(NamedTuple):
    """p_higher: that the first's share (or mean) is higher by the margin or more; p_lower: lower; p: the larger of both."""

    p_higher: float
    p_lower: float
    margin: float

    @property
    def p(self) -> float:
        """Of the two one-sided tests together: equivalent within the margin where it is at most alpha."""
        return max(self.p_higher, self.p_lower)


def _checked(margin: float) -> float:
    if not 0 < margin < 1:
        raise ValueError(f"margin must be between 0 and 1, a difference of shares, got {margin}")
    return margin


def equivalent_rates(pairs: Pairs, margin: float) -> Equivalence:
    """Whether two recipes' shares of diverged runs differ by less than margin; p = 1 of no pairs."""
    _checked(margin)
    if not pairs.n:
        return Equivalence(1.0, 1.0, margin)
    # Lower by the margin is higher by it with the two recipes' names exchanged.
    higher, lower = (
        _p_value(b, c, pairs.n, margin) for b, c in ((pairs.first, pairs.second), (pairs.second, pairs.first))
    )
    return Equivalence(higher, lower, margin)


def _p_value(b: int, c: int, n: int, margin: float) -> float:
    if n > EXACT_PAIRS:
        return _exact_of_one(b, c, n, margin)
    tables, p = _exact(n, margin)
    return float(p[tables[b, c]])


def apart_rates(pairs: Pairs, margin: float) -> float:
    """The p-value that two recipes' shares of diverged runs differ by at most margin, in either direction; 1 of no pairs.

    Twice the smaller of two one-sided p-values, exact as those of `equivalent_rates`.
    """
    _checked(margin)
    if not pairs.n:
        return 1.0
    b, c, n = pairs.first, pairs.second, pairs.n
    if n > EXACT_PAIRS:
        sides = [_exact_of_one(x, y, n, margin, above=True) for x, y in ((b, c), (c, b))]
    else:
        tables, p = _exact(n, margin, above=True)
        sides = [float(p[tables[b, c]]), float(p[tables[c, b]])]
    return min(1.0, 2 * min(sides))


@functools.lru_cache(maxsize=64)
def _exact(n: int, margin: float, above: bool = False) -> tuple[npt.NDArray[np.int64], Floats]:
    """Each table's place, [first alone, second alone], -1 where there is none; and the exact p-value at each place.

    The null is that the first's share is higher by the margin, or more, and small scores speak against it; above: by the margin
    or less, and large scores do.
    """
    b, c = np.nonzero(np.add.outer(np.arange(n + 1), np.arange(n + 1)) <= n)
    score = (-1 if above else 1) * tango_score(b, c, n, margin)
    order = np.argsort(score, kind="stable")
    at = _nuisance(margin, NUISANCE)
    mass = np.exp(log_chance(b[order], c[order], n, at + margin, at))  # [at, tables]
    # All tables with an equal score count, so the last of them has their p-value.
    last = np.searchsorted(score[order], score[order] + WITHIN, side="right") - 1
    p = np.minimum(mass.cumsum(axis=1).max(axis=0)[last], 1.0)
    place = np.full((n + 1, n + 1), -1)
    place[b[order], c[order]] = np.arange(order.size)
    return place, p


def _nuisance(margin: float, places: int) -> Floats:
    return np.asarray((1 - margin) / 2 * np.sin(np.linspace(0, np.pi / 2, places)) ** 2, np.float64)


@functools.lru_cache(maxsize=256)
def _exact_of_one(b: int, c: int, n: int, margin: float, above: bool = False) -> float:
    """The exact p-value of one table, as `_exact` has it of all."""
    score = float(tango_score(b, c, n, margin))
    edge = score - WITHIN if above else score + WITHIN
    return _largest_chance(edge, n, margin, above, NUISANCE * 2)


def _largest_chance(edge: float, n: int, margin: float, above: bool, places: int) -> float:
    """The null's largest chance of a score up to `edge`, above: beyond it. Of each number of pairs in which the second alone
    diverged, the tables that count are those up to (from) some number of the first's, with which the score rises.
    """
    seconds = np.arange(n + 1)
    fewest = _up_to(lambda first: tango_score(first, seconds, n, margin) <= edge, n)
    at = _nuisance(margin, places)[:, None]
    tail = stats.binom.sf if above else stats.binom.cdf
    chance = stats.binom.pmf(seconds, n, at) * tail(fewest - 1, n - seconds, np.minimum((at + margin) / (1 - at), 1.0))
    return float(min(1.0, chance.sum(axis=1).max()))


def _up_to(holds: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.bool_]], n: int) -> npt.NDArray[np.int64]:
    """Of each number of the second's, 0 to n, for how many of the first's, from 0 on, what `holds` for these up to some does."""
    fewest, most = np.zeros(n + 1, np.int64), n - np.arange(n + 1) + 1
    while (fewest < most).any():
        middle = (fewest + most) // 2
        below = holds(middle) & (fewest < most)
        fewest, most = np.where(below, middle + 1, fewest), np.where(below | (fewest >= most), most, middle)
    return fewest


@functools.lru_cache(maxsize=4096)
def _edge(n: int, margin: float, alpha: float) -> float:
    """The score up to which tables speak against the null at alpha, from below within 0.0005; -inf where none does."""
    low, high = -math.sqrt(n * margin / (1 - margin)) - WITHIN, 0.0  # no score is below that of no failure
    if _largest_chance(low + 2 * WITHIN, n, margin, False, COARSE) > alpha:
        return -math.inf
    low = max(low, -8.0)
    while high - low > 0.0005:
        middle = (low + high) / 2
        low, high = (middle, high) if _largest_chance(middle, n, margin, False, COARSE) <= alpha else (low, middle)
    return low


def log_chance(b: npt.NDArray[Any], c: npt.NDArray[Any], n: int, first: Floats, second: Floats) -> Floats:
    """The logarithm of P(b pairs first alone, c second alone, of n), [chances, tables]."""
    coefficient = gammaln(n + 1) - gammaln(b + 1) - gammaln(c + 1) - gammaln(n - b - c + 1)
    x, y = first[:, None], second[:, None]
    return np.asarray(
        coefficient + xlogy(b, x) + xlogy(c, y) + xlogy(n - b - c, np.maximum(1 - x - y, 0.0)), np.float64
    )


def equivalent_means(differences: npt.ArrayLike, margin: float) -> Equivalence:
    """Whether the mean of paired differences lies within (-margin, margin); margin in their units; p = 1 of fewer than two.

    ValueError where a difference is not finite, or the margin not positive.
    """
    values = np.asarray(differences, np.float64)
    if not margin > 0:
        raise ValueError(f"margin must be above 0, got {margin}")
    if not np.isfinite(values).all():
        raise ValueError("differences must be finite: say what a loss that is not counts as")
    if values.size < 2:
        return Equivalence(1.0, 1.0, margin)
    mean, error = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(values.size)
    if error <= 1e-14 * abs(mean):  # runs of the same bits: the mean of equal numbers is off by a rounding
        return Equivalence(float(values[0] >= margin), float(values[0] <= -margin), margin)
    higher, lower = (float(stats.t.cdf((of - margin) / error, values.size - 1)) for of in (mean, -mean))
    return Equivalence(higher, lower, margin)


def power_of_equivalence(n: int, margin: float, first: float, second: float, alpha: float = 0.05) -> float:
    """The chance that n pairs show equivalence; first, second: the true chances that one of a pair alone diverges.

    Exact up to POWER_PAIRS pairs; above, where the test rejects is known to 0.0005 of its score, which few tables are in.
    """
    _checked(margin)
    if n > POWER_PAIRS:
        edge, seconds = _edge(n, margin, alpha), np.arange(n + 1)
        higher = _up_to(lambda b: tango_score(b, seconds, n, margin) <= edge, n)
        # With more of the first's pairs it is less likely that the first's share is lower by the margin.
        lower = _up_to(lambda b: tango_score(seconds, b, n, margin) > edge, n)
        share = min(1.0, first / (1 - second)) if second < 1 else 0.0
        of_first = stats.binom.cdf(higher - 1, n - seconds, share) - stats.binom.cdf(lower - 1, n - seconds, share)
        return float(stats.binom.pmf(seconds, n, second) @ np.maximum(of_first, 0.0))
    b, c = np.nonzero(np.add.outer(np.arange(n + 1), np.arange(n + 1)) <= n)
    tables, p = _exact(n, margin)
    shown = np.maximum(p[tables[b, c]], p[tables[c, b]]) <= alpha
    chance = np.exp(log_chance(b[shown], c[shown], n, np.array([first]), np.array([second])))
    return min(1.0, float(chance.sum()))


@functools.lru_cache(maxsize=1024)
def seeds_for_equivalence(
    margin: float, alone: float = 0.0, power: float = 0.8, alpha: float = 0.05, most: int = 1000, apart: float = 0.0
) -> int | None:
    """How many pairs show, with that power, that two recipes are as stable; None where more than `most` would be needed.

    alone: the chance that one of a pair diverges and the other does not; apart: how much more of it is the one's than the
    other's, their true difference. With 0 and 0: 29 at 10 % and 5 %, since no fewer make (1 - margin)^n, the chance of such luck
    where the margin is reached, at most alpha. ValueError where apart is more than alone.
    """
    if not abs(apart) <= alone + 1e-12:
        raise ValueError(f"apart must be at most alone = {alone}, got {apart}")
    if abs(apart) >= margin:
        return None
    first, second = (alone + abs(apart)) / 2, (alone - abs(apart)) / 2
    return least(lambda n: power_of_equivalence(n, margin, first, second, alpha) >= power, most)


def least(enough: Callable[[int], bool], most: int) -> int | None:
    """The first n from 1 at which `enough` turns true, for what stays so from there on; None beyond `most`."""
    high = 1
    while not enough(high):
        if high >= most:
            return None
        high = min(2 * high, most)
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
