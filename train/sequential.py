"""Looking at results as they come in without being fooled by it: group-sequential tests with alpha spending.

Who looks K times at a growing sample, each time at level alpha, finds something by chance far more often than that: at 5 % and
ten looks in 19 of 100 studies. A plan made beforehand divides alpha among the looks instead. Lan and DeMets (1983, Biometrika
70:659) say how: a spending function is alpha's share that may be used up to the time t, the part of the planned sample that is
there, and each look's boundary uses what the looks before it left.

    obrien-fleming   4 - 4 Phi(z(1 - alpha/4) / sqrt(t))     almost nothing early; the last look is nearly the test of one look
    pocock           alpha ln(1 + (e - 1) t)                 about alike at each look; ends early more often, needs more in all

`spending_bounds` are those of looks at a normal statistic z of variance 1, where z_j and z_k correlate by sqrt(t_j / t_k). They
come from the recursion of Armitage, McPherson and Rowe (1969, JRSS A 132:235): with W = z sqrt(t), whose increments are
independent, the density of W at a look, of the studies that have not ended, is that of the look before, cut at its boundary,
convolved with the increment's; integrated by Gauss and Legendre.

Few seeds are no normal statistic: looks at Student's t, turned into z, reject in 5.8 % of studies without an effect instead of
5 (measured: 2 pairs a look, 4 looks, pocock). So what decides about pairs of runs is exact, by signs. If two formats are alike,
each pair's difference could as well have had the other sign; given the sizes of all differences, their signs are fair coins
(Fisher 1935, Design of Experiments, section 21). Each look rejects the most extreme of the sign patterns that no look before it
rejected, as many as alpha may be spent on. At most alpha of all patterns are rejected, whatever the losses' distribution is.

- `sign_looks`, for whether runs diverged: the differences are 1, 0 and -1, and the recursion runs over the binomial distribution
  itself. McNemar's exact test (1947, Psychometrika 12:153) is the case of one look.
- `flip_looks`, for losses: patterns are drawn, by a generator that is seeded, and the observed one is among them (Dwass 1957,
  Ann. Math. Stat. 28:181), so that the error is at most alpha with drawn patterns too.

`power_family_bounds` are Pocock's (1977, Biometrika 64:191) and O'Brien and Fleming's own (1979, Biometrics 35:549), of the
family of Wang and Tsiatis (1987, Biometrics 43:193); `crossing_probabilities` tells any boundaries' error and, with a drift,
their power.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats

Floats = npt.NDArray[np.float64]
Spending = Literal["obrien-fleming", "pocock"]

NODES, NODES_LIMIT = 200, 4000
PATTERNS = 2**17
LEAST_ALPHA = 1e-6  # below which no p-value is told apart
FAR = 10.0  # standard deviations beyond which no mass is followed: 1.5e-23


def alpha_spent(time: float, alpha: float, spending: Spending) -> float:
    """How much of alpha may have been used up to `time`, 0 to 1 of the planned sample; two-sided."""
    if not 0 <= time <= 1:
        raise ValueError(f"time must be from 0 to 1, got {time}")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be between 0 and 1, got {alpha}")
    if time == 0:
        return 0.0
    if spending == "pocock":
        return alpha * math.log1p((math.e - 1) * time)
    return float(4 * stats.norm.sf(stats.norm.isf(alpha / 4) / math.sqrt(time)))


def spending_bounds(times: Sequence[float], alpha: float, spending: Spending = "obrien-fleming") -> Floats:
    """|z| at or above which a look ends the study, [K], for looks at `times`, rising, at most 1.

    Correct to about 1e-8; infinite where a look has nothing to spend that floating point could tell from 0.
    """
    walk, bounds, before = _Walk(), [], 0.0
    for time in _checked(times):
        spent = alpha_spent(time, alpha, spending)
        walk.go_on(time)
        bounds.append(walk.bound(spent - before))
        walk.cut(bounds[-1])
        before = spent
    return np.array(bounds)


def power_family_bounds(times: Sequence[float], alpha: float, delta: float) -> Floats:
    """|z| bounds C t^(delta - 1/2), [K], with C such that all looks together reject in `alpha` of studies without an effect.

    delta 1/2 is Pocock's: the same bound at every look; 0 O'Brien and Fleming's. C is the last one where the last time is 1.
    """
    shape = np.array(_checked(times)) ** (delta - 0.5)

    def excess(constant: float) -> float:
        return float(crossing_probabilities(constant * shape, times).sum()) - alpha

    return np.asarray(optimize.brentq(excess, 0.1, 20.0, xtol=1e-10) * shape, np.float64)


def crossing_probabilities(bounds: Sequence[float] | Floats, times: Sequence[float], drift: float = 0.0) -> Floats:
    """The chance that |z| is first at or above its bound at each look, [K]; their sum is the error, or with a drift the power.

    drift: the expected z at time 1. Of n pairs in all whose differences have mean d and deviation s: d sqrt(n) / s.
    """
    walk, found = _Walk(drift), []
    for time, bound in zip(_checked(times), bounds, strict=True):
        walk.go_on(time)
        found.append(walk.beyond(float(bound)))
        walk.cut(float(bound))
    return np.array(found)


def _checked(times: Sequence[float]) -> list[float]:
    rising = [0.0, *map(float, times)]
    if len(rising) < 2 or any(later <= sooner for sooner, later in pairwise(rising)) or rising[-1] > 1:
        raise ValueError(f"times must rise from above 0 to at most 1, got {list(times)}")
    return rising[1:]


class _Walk:
    """W = z sqrt(t) of the studies that have not ended: its density on nodes, [n], from look to look."""

    def __init__(self, drift: float = 0.0) -> None:
        self.drift = drift
        self.time, self.deviation = 0.0, 0.0
        self.nodes, self.mass = np.zeros(1), np.ones(1)  # at time 0 all is at 0
        self.step = 0.0

    def go_on(self, time: float) -> None:
        """To the next look; until `cut`, nodes and mass are those of the look before."""
        self.step, self.time = time - self.time, time
        self.deviation = math.sqrt(self.step)
        self.centre = self.nodes + self.drift * self.step

    def beyond(self, bound: float) -> float:
        """The chance of |z| >= bound at this look."""
        edge = bound * math.sqrt(self.time)
        above = stats.norm.sf((edge - self.centre) / self.deviation)
        below = stats.norm.cdf((-edge - self.centre) / self.deviation)
        return float(self.mass @ (above + below))

    def bound(self, chance: float) -> float:
        """|z| which is reached by that chance."""
        if self.beyond(30.0) >= chance:
            return math.inf
        return float(optimize.brentq(lambda z: math.log(max(self.beyond(z), 1e-320) / chance), 0.0, 30.0, xtol=1e-11))

    def cut(self, bound: float) -> None:
        """Leave those at or beyond the bound out."""
        reach = min(bound, FAR + abs(self.drift)) * math.sqrt(self.time)
        count = min(NODES_LIMIT, max(NODES, math.ceil(8 * reach / self.deviation)))
        points, weights = np.polynomial.legendre.leggauss(count)
        nodes = points * reach
        density = stats.norm.pdf((nodes[:, None] - self.centre) / self.deviation) @ self.mass / self.deviation
        self.nodes, self.mass = nodes, density * weights * reach


def repeated_interval(differences: npt.ArrayLike, bound: float) -> tuple[float, float]:
    """The interval of the mean that holds at all looks together (Jennison and Turnbull 1989, JRSS B 51:305); differences [n].

    bound: the look's |z|, of which Student's quantile of the same p-value is taken; by normal theory, so about, with few pairs.
    NaN for fewer than two differences.
    """
    values = np.asarray(differences, np.float64)
    if values.size < 2:
        return math.nan, math.nan
    half = float(stats.t.isf(stats.norm.sf(bound), values.size - 1) * values.std(ddof=1) / math.sqrt(values.size))
    return float(values.mean()) - half, float(values.mean()) + half


@functools.lru_cache(maxsize=256)
def _signs(pair: int) -> npt.NDArray[np.int8]:
    """A pair's sign in each drawn pattern, [PATTERNS]; the first pattern is the observed one, all 1."""
    bits = np.random.Generator(np.random.Philox(key=pair)).integers(0, 2, PATTERNS, dtype=np.int8)
    bits[0] = 1
    return 2 * bits - 1


@dataclass(frozen=True)
class FlipLook:
    """A look at the first `pairs` differences. bound: |sum| beyond which it ends the study; spent: of alpha, so far."""

    pairs: int
    total: float
    bound: float
    spent: float

    @property
    def rejected(self) -> bool:
        """Whether this look ended the study: the mean difference is not 0."""
        return abs(self.total) > self.bound


def flip_looks(
    differences: npt.ArrayLike,
    pairs: Sequence[int],
    times: Sequence[float],
    alpha: float,
    spending: Spending = "obrien-fleming",
) -> list[FlipLook]:
    """The looks at `times` up to the one that rejects, or all; differences [n], of which look k has the first pairs[k].

    Rejects in at most alpha of studies in which each difference could as well have had the other sign. The most extreme of 2^17
    patterns are the least that can be spent: 8e-6. ValueError where a difference is not finite, or pairs fall or are too many.
    """
    values = np.asarray(differences, np.float64)
    if not np.isfinite(values).all():
        raise ValueError("differences must be finite: say what a loss that is not counts as")
    if list(pairs) != sorted(pairs) or (pairs and pairs[-1] > values.size):
        raise ValueError(f"pairs so far must rise to at most {values.size}, got {list(pairs)}")
    sums = np.zeros(PATTERNS)
    alive = np.ones(PATTERNS, np.bool_)
    looks: list[FlipLook] = []
    known = 0
    for count, time in zip(pairs, _checked(times), strict=True):
        for pair in range(known, count):
            sums += _signs(pair) * values[pair]
        known = count
        may = math.floor(alpha_spent(time, alpha, spending) * PATTERNS) - int((~alive).sum())
        size = np.abs(sums[alive])
        # Beyond the largest that may not be rejected, and what equals it but for the rounding of a sum.
        place = size.size - 1 - may
        bound = float(np.partition(size, place)[place] * (1 + 1e-9)) if 0 <= place < size.size else math.inf
        alive &= np.abs(sums) <= bound
        looks.append(FlipLook(count, float(sums[0]), bound, float((~alive).sum() / PATTERNS)))
        if looks[-1].rejected:
            break
    return looks


@dataclass(frozen=True)
class SignLook:
    """A look at pairs of which one alone had the event: `first` of them the first's, `second` the second's, in all so far.

    bound: |first - second| at or above which the look ends the study; None where no count may. spent: of alpha, so far.
    """

    first: int
    second: int
    bound: int | None
    spent: float

    @property
    def rejected(self) -> bool:
        """Whether this look ended the study: the first has the event more often, or less often, than the second."""
        return self.bound is not None and abs(self.first - self.second) >= self.bound


def sign_looks(
    first: Sequence[int],
    second: Sequence[int],
    times: Sequence[float],
    alpha: float,
    spending: Spending = "obrien-fleming",
) -> list[SignLook]:
    """The looks at `times` up to the one that rejects, or all. first, second: counts so far of pairs that differ, by whose event
    it was, [K].

    Whatever the numbers of such pairs, all looks together reject in at most alpha of studies where both are alike: given those
    numbers, each pair's sign is a fair coin, and a boundary is the least that keeps what was spent within what may be.
    """
    mass, offset = np.ones(1), 0  # of the difference s, at s + offset, not ended yet
    looks: list[SignLook] = []
    spent, known = 0.0, 0
    for ours, theirs, time in zip(first, second, _checked(times), strict=True):
        new = ours + theirs - known
        if new < 0 or min(ours, theirs) < 0:
            raise ValueError(f"counts so far must not fall, got {list(first)} and {list(second)}")
        coins = np.zeros(2 * new + 1)
        coins[::2] = stats.binom.pmf(np.arange(new + 1), new, 0.5)
        mass, offset, known = np.convolve(mass, coins), offset + new, ours + theirs
        distance = np.abs(np.arange(mass.size) - offset)
        by_distance = np.bincount(distance, weights=mass)
        beyond = np.cumsum(by_distance[::-1])[::-1]  # chance of |s| >= m, by m
        may = np.flatnonzero(beyond <= alpha_spent(time, alpha, spending) - spent)
        bound = int(may[0]) if may.size and by_distance[may[0] :].any() else None
        if bound is not None:
            spent += float(beyond[bound])
            mass = np.where(distance >= bound, 0.0, mass)
        looks.append(SignLook(int(ours), int(theirs), bound, spent))
        if looks[-1].rejected:
            break
    return looks


def sign_p_value(
    first: Sequence[int], second: Sequence[int], times: Sequence[float], spending: Spending = "obrien-fleming"
) -> float:
    """The least alpha at which, and at all above it, `sign_looks` reject: a p-value that holds at all looks; 1 if they never do.

    A boundary is a count, so that a little more alpha may lower an early one and leave less for a later one: what rejects at
    one alpha need not at the next. Boundaries stay the same down to an alpha that does not pay for one of them; below that the
    next ones are looked at.
    """
    p, alpha = 1.0, 1 - 1e-9
    while alpha > LEAST_ALPHA:
        looks = sign_looks(first, second, times, alpha, spending)
        if not looks[-1].rejected:
            break
        paid = [(time, of.spent) for time, of in zip(times, looks, strict=False) if of.bound is not None]
        p = min(alpha, max(_alpha_of(time, spent, spending) for time, spent in paid) * (1 + 1e-12))  # a rounding above
        alpha = p * (1 - 1e-9)
    return max(p, LEAST_ALPHA)


def _alpha_of(time: float, spent: float, spending: Spending) -> float:
    """The alpha of which `alpha_spent` at that time is `spent`."""
    if spending == "pocock":
        return spent / math.log1p((math.e - 1) * time)
    return float(4 * stats.norm.sf(stats.norm.isf(spent / 4) * math.sqrt(time)))
