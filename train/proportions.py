"""How often, with its uncertainty: k of n runs diverged; one recipe's share against another's, of the same seeds or of others.

One share, k of n:

    Wilson            {p : |k/n - p| <= z sqrt(p (1 - p) / n)}; covers at its level on average      (1927, JASA 22:209)
    Clopper-Pearson   the exact tests' interval: covers at least at its level, whatever p is       (1934, Biometrika 26:404)

Two recipes on the same seeds, that is the same initial weights and batches, make a table of pairs: a both diverged, b the first
alone, c the second alone, d neither; n = a + b + c + d. Only b and c tell the recipes apart.

    McNemar's exact test     b is binomial(b + c, 1/2) if both diverge alike                       (1947, Psychometrika 12:153)
    Tango's score interval   {D : |b - c - n D| <= z sqrt(n (2 q + D (1 - D)))}, q: P(second alone), the likeliest that differs
                             from P(first alone) by D                                              (1998, Stat. Med. 17:891)
    Newcombe's method 10     the two Wilson intervals, squared and added, with the table's correlation
                                                                                                   (1998, Stat. Med. 17:2635)

On seeds of their own: Boschloo's (1970, Stat. Neerl. 24:1) and Barnard's (1945, Nature 156:177) exact tests, of which the first
rejects at least as often as Fisher's at the same level; the interval is Newcombe's for independent shares (1998, Stat. Med.
17:873). Score intervals cover at their level on average over the truth, not at each; `docs/stability.md` has Wilson's worst.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import xarray as xr
from scipy import optimize, stats

Floats = npt.NDArray[np.float64]


def wilson_interval(k: npt.ArrayLike, n: npt.ArrayLike, confidence: float = 0.95) -> tuple[Floats, Floats]:
    """Wilson's score interval for the rate behind k events in n trials, elementwise: (low, high); n = 0 gives NaN.

    The rates p with |k/n - p| <= z sqrt(p (1 - p) / n), solved for p (Wilson 1927, JASA 22:209). Raises ValueError
    unless 0 <= k <= n and 0 < confidence < 1.
    """
    events, trials = _counts(k, n, confidence)
    z = stats.norm.ppf((1 + confidence) / 2)
    with np.errstate(invalid="ignore"):
        middle = (events + z**2 / 2) / (trials + z**2)
        half = z / (trials + z**2) * np.sqrt(events * (trials - events) / trials + z**2 / 4)
    # At the ends one limit is 0 or 1 exactly, and the subtraction would leave 1e-17 of either sign.
    low = np.where(events == 0, 0.0 * half, middle - half)
    high = np.where(events == trials, 1 + 0.0 * half, middle + half)
    return low, high


def clopper_pearson_interval(k: npt.ArrayLike, n: npt.ArrayLike, confidence: float = 0.95) -> tuple[Floats, Floats]:
    """Clopper and Pearson's exact interval, elementwise: (low, high); n = 0 gives NaN; ValueError as `wilson_interval`.

    P(at least k events) = (1 - confidence) / 2 at the lower limit, P(at most k) at the upper; quantiles of the beta distribution.
    """
    events, trials = _counts(k, n, confidence)
    tail = (1 - confidence) / 2
    with np.errstate(invalid="ignore"):
        low = np.where(events == 0, 0.0, stats.beta.ppf(tail, events, trials - events + 1))
        high = np.where(events == trials, 1.0, stats.beta.isf(tail, events + 1, trials - events))
    return np.where(trials == 0, np.nan, low), np.where(trials == 0, np.nan, high)


def _counts(k: npt.ArrayLike, n: npt.ArrayLike, confidence: float) -> tuple[Floats, Floats]:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    events, trials = np.broadcast_arrays(np.asarray(k, np.float64), np.asarray(n, np.float64))
    if not ((events >= 0) & (events <= trials)).all():
        raise ValueError(f"k must be between 0 and n, got k = {k!r} with n = {n!r}")
    return events, trials


class Pairs(NamedTuple):
    """How many pairs of runs: both diverged, the first alone, the second alone, neither."""

    both: int
    first: int
    second: int
    neither: int

    @property
    def n(self) -> int:
        """All pairs."""
        return sum(self)

    @property
    def difference(self) -> float:
        """Share of the first that diverged - share of the second; NaN of no pairs."""
        return (self.first - self.second) / self.n if self.n else math.nan


def pairs_of(first: xr.DataArray, second: xr.DataArray) -> Pairs:
    """The table of two recipes' runs, joined by the labels of their one dimension, such as seed; 1 or True where one diverged.

    Seeds that one of them lacks, or has NaN for, make no pair. ValueError where a label is there twice.
    """
    for array in (first, second):
        if array.ndim != 1 or array.get_index(array.dims[0]).has_duplicates:
            raise ValueError("pairs are made by label: each array needs one dimension, whose labels are all different")
    here, there = (of.get_index(of.dims[0]) for of in (first, second))
    if first.dims != second.dims or not here.equals(there):
        first, second = xr.align(first, second, join="inner")
    ours, theirs = (of.values.astype(np.float64) for of in (first, second))
    known = ~np.isnan(ours) & ~np.isnan(theirs)
    x, y = ours[known] != 0, theirs[known] != 0
    return Pairs(*(int(found.sum()) for found in (x & y, x & ~y, ~x & y, ~x & ~y)))


def mcnemar(pairs: Pairs) -> float:
    """Two-sided p-value of McNemar's exact test that both diverge alike; 1 where no pair differs."""
    return float(stats.binomtest(pairs.first, pairs.first + pairs.second).pvalue) if pairs.first + pairs.second else 1.0


def paired_interval(
    pairs: Pairs, confidence: float = 0.95, method: Literal["tango", "newcombe"] = "tango"
) -> tuple[float, float]:
    """Interval of the difference of two paired shares, first - second: (low, high); NaN of no pairs."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    if not pairs.n:
        return math.nan, math.nan
    if method == "newcombe":
        return _square_and_add(
            (pairs.both + pairs.first, pairs.n), (pairs.both + pairs.second, pairs.n), confidence, _correlation(pairs)
        )
    return _tango(pairs.first, pairs.second, pairs.n, float(stats.norm.ppf((1 + confidence) / 2)))


def tango_score(first: npt.ArrayLike, second: npt.ArrayLike, n: int, difference: float) -> Floats:
    """The z of the observed counts if the true difference of the shares were `difference`, elementwise; falls as that rises."""
    b, c = np.asarray(first, np.float64), np.asarray(second, np.float64)
    d = difference
    linear = b + c - (2 * n - b + c) * d
    q = (linear + np.sqrt(np.maximum(linear**2 + 8 * n * c * d * (1 - d), 0.0))) / (4 * n)
    q = np.clip(q, max(0.0, -d), (1 - d) / 2)
    variance = n * np.maximum(2 * q + d * (1 - d), 0.0)
    excess = b - c - n * d
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(excess == 0, 0.0, excess / np.sqrt(variance)), np.float64)


@functools.lru_cache(maxsize=4096)
def _tango(b: int, c: int, n: int, z: float) -> tuple[float, float]:
    found = (b - c) / n

    def solved(sign: int) -> float:
        def excess(d: float) -> float:
            return 0.0 if d == found else float(tango_score(b, c, n, d))

        end = math.copysign(1 - 1e-12, sign)
        if abs(found) == 1 and found == sign:
            return found
        return float(optimize.brentq(lambda d: excess(d) + sign * z, found, end, xtol=1e-13))

    return solved(-1), solved(1)


def _correlation(pairs: Pairs) -> float:
    """The table's phi, its numerator drawn towards 0 by n/2 if it is positive, as method 10 has it."""
    a, b, c, d = pairs
    scale = (a + b) * (c + d) * (a + c) * (b + d)
    cross = a * d - b * c
    return (max(cross - pairs.n / 2, 0) if cross > 0 else cross) / math.sqrt(scale) if scale else 0.0


def _square_and_add(
    first: tuple[int, int], second: tuple[int, int], confidence: float, correlation: float = 0.0
) -> tuple[float, float]:
    (low, high), (low_2, high_2) = (map(float, wilson_interval(*each, confidence)) for each in (first, second))
    p, p_2 = first[0] / first[1], second[0] / second[1]

    def reach(ours: float, theirs: float) -> float:
        return math.sqrt(max(0.0, ours**2 - 2 * correlation * ours * theirs + theirs**2))

    return p - p_2 - reach(p - low, high_2 - p_2), p - p_2 + reach(high - p, p_2 - low_2)


def unpaired_interval(k: int, n: int, k_2: int, n_2: int, confidence: float = 0.95) -> tuple[float, float]:
    """Newcombe's interval of k/n - k_2/n_2 of independent runs: (low, high); NaN where either has none."""
    _counts([k, k_2], [n, n_2], confidence)
    return _square_and_add((k, n), (k_2, n_2), confidence) if n and n_2 else (math.nan, math.nan)


def unpaired_test(k: int, n: int, k_2: int, n_2: int, method: Literal["boschloo", "barnard"] = "boschloo") -> float:
    """Two-sided p-value that k of n and k_2 of n_2 independent runs diverge alike; 1 where either has no run, or none differs."""
    _counts([k, k_2], [n, n_2], 0.95)
    if not (n and n_2) or k + k_2 in (0, n + n_2):
        return 1.0
    test = stats.boschloo_exact if method == "boschloo" else stats.barnard_exact
    with _quiet():
        return float(min(1.0, test([[k, k_2], [n - k, n_2 - k_2]]).pvalue))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """SciPy's search for the largest p-value logs its bounds to the root logger, whoever listens there."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.INFO))
    try:
        yield
    finally:
        logging.disable(before)
