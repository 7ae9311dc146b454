"""How many seeds a question needs, before any is trained: power of the exact tests by summing over all that could come out.

Paired, the same seeds for both (McNemar's exact test): the chance that both diverge is `both`; what is left of each share is the
chance that one alone does, p0 - both and p1 - both. The more the seeds decide, the more pairs agree, and the fewer are needed;
independence, both = p0 p1, is what is taken where nothing is known. Given m pairs that differ, the test is one of fair coins, so

    power(n) = sum over m of Binomial(m; n, d) P(the test rejects | m),    d = p0 + p1 - 2 both

Unpaired (Boschloo's exact test): all (n + 1)^2 outcomes, those rejected which have the least p-values of Fisher's one-sided
test, as many as the largest chance over a common share allows.

Known answers: 10 % against 0 % with a power of 94 % needs about 100 seeds a side; 29, enough to see one failure with a chance
of 95 %, tell the two apart with a chance of 6 %. Looks at growing results cost little more (see `sequential`; its power is here
too).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import stats

from train.equivalence import least
from train.sequential import SignLook, Spending, sign_looks

Floats = npt.NDArray[np.float64]

MOST = 20_000  # seeds a side beyond which no paired question is searched
MOST_UNPAIRED = 500
COMMON = 50  # common shares up to 1/2 at which Boschloo's size is looked at; at 1 - p it is as at p
STUDIES = 4000  # simulated for the power of looks: within 0.8 % of it, one standard deviation


def power_paired(n: int, p0: float, p1: float, alpha: float = 0.05, both: float | None = None) -> float:
    """The chance that McNemar's exact test on n pairs tells shares p0 and p1 apart, two-sided at alpha."""
    alone = _alone(p0, p1, both)
    differ = sum(alone)
    if not differ or n < 1:
        return 0.0
    m = np.arange(n + 1)
    chance = stats.binom.pmf(m, n, min(1.0, differ))
    likely = np.flatnonzero(chance > 1e-15 * chance.max())
    return float(chance[likely] @ _rejects(m[likely], alone[1] / differ, alpha))


def _rejects(differing: npt.NDArray[np.int64], share: float, alpha: float) -> Floats:
    """The chance that the two-sided sign test rejects, for each number of pairs that differ; share: of them the second's."""
    # It rejects where at most k of m are on one side, k the largest with 2 P(X <= k) <= alpha for m fair coins.
    k = stats.binom.ppf(alpha / 2, differing, 0.5)
    k = np.where(2 * stats.binom.cdf(k, differing, 0.5) <= alpha * (1 + 1e-12), k, k - 1)
    return np.asarray(
        stats.binom.cdf(k, differing, share) + stats.binom.sf(differing - k - 1, differing, share), np.float64
    )


def _alone(p0: float, p1: float, both: float | None) -> tuple[float, float]:
    if not (0 <= p0 <= 1 and 0 <= p1 <= 1):
        raise ValueError(f"p0 and p1 must be from 0 to 1, got {p0} and {p1}")
    both = p0 * p1 if both is None else both
    if not max(0.0, p0 + p1 - 1) - 1e-12 <= both <= min(p0, p1) + 1e-12:
        raise ValueError(
            f"both must be from {max(0.0, p0 + p1 - 1):g} to {min(p0, p1):g}, the smaller share, got {both}"
        )
    return max(0.0, p0 - both), max(0.0, p1 - both)


def power_unpaired(n: int, p0: float, p1: float, alpha: float = 0.05) -> float:
    """The chance that Boschloo's exact test on n runs a side tells shares p0 and p1 apart, two-sided at alpha."""
    _alone(p0, p1, None)
    rejected = _boschloo_region(n, alpha) | _boschloo_region(n, alpha).T
    k = np.arange(n + 1)
    return float(stats.binom.pmf(k, n, p0) @ rejected @ stats.binom.pmf(k, n, p1))


@functools.lru_cache(maxsize=64)
def _boschloo_region(n: int, alpha: float) -> npt.NDArray[np.bool_]:
    """Outcomes [first's events, second's] at which the one-sided test rejects at alpha/2 that the first's share is the less."""
    ours, theirs = np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij")
    fisher = stats.hypergeom.sf(ours - 1, 2 * n, ours + theirs, n)
    order = np.argsort(fisher, axis=None, kind="stable")
    ascending = fisher.ravel()[order]
    common = np.linspace(0, 0.5, COMMON + 1)[1:]
    each = stats.binom.pmf(np.arange(n + 1)[:, None], n, common)
    chance = (each[ours.ravel()[order]] * each[theirs.ravel()[order]]).cumsum(axis=0).max(axis=1)
    # Outcomes with an equal p-value of Fisher's are rejected together or not at all.
    last = np.searchsorted(ascending, ascending * (1 + 1e-9), side="right") - 1
    rejected = np.zeros(fisher.size, np.bool_)
    rejected[order] = chance[last] <= alpha / 2
    return rejected.reshape(fisher.shape)


@functools.lru_cache(maxsize=1024)
def seeds_needed(
    p0: float, p1: float, power: float = 0.8, alpha: float = 0.05, *, paired: bool = True, both: float | None = None
) -> int | None:
    """The least number of seeds a side that tells shares of diverged runs p0 and p1 apart with at least that power.

    paired: the same seeds in both; both: then the chance that both diverge, p0 p1 where None. comparisons: give alpha /
    comparisons (Bonferroni). None where not even MOST seeds (MOST_UNPAIRED unpaired) do, and where p0 = p1. Power rises with n
    but for steps of less than a percent, by which a smaller n may do too.
    """
    if not 0 < power < 1:
        raise ValueError(f"power must be between 0 and 1, got {power}")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be between 0 and 1, got {alpha}")
    _alone(p0, p1, both)
    if p0 == p1:
        return None
    if paired:
        return least(lambda n: power_paired(n, p0, p1, alpha, both) >= power, MOST)
    return least(lambda n: power_unpaired(n, p0, p1, alpha) >= power, MOST_UNPAIRED)


def least_telling(n: int, alpha: float = 0.05, power: float = 0.8) -> float | None:
    """The least share that n pairs tell from 0 with that power, to 0.1 %; None where not even 100 % can be told from 0."""
    if power_paired(n, 0.0, 1.0, alpha) < power:
        return None
    shares = np.arange(1, 1001) / 1000
    found = least(lambda i: power_paired(n, 0.0, float(shares[i - 1]), alpha) >= power, shares.size)
    return None if found is None else float(shares[found - 1])


def power_of_looks(
    pairs: Sequence[int], p0: float, p1: float, alpha: float = 0.05, spending: Spending = "obrien-fleming",
    both: float | None = None,
) -> float:  # fmt: skip
    """The chance that looks at so many pairs, rising, tell p0 and p1 apart by `sign_looks`: of simulated studies, seeded."""
    alone = _alone(p0, p1, both)
    new = np.diff([0, *pairs])
    times = [count / pairs[-1] for count in pairs]
    drawn = np.random.Generator(np.random.Philox(key=1)).multinomial(
        new, [*alone, max(0.0, 1 - sum(alone))], (STUDIES, len(new))
    )
    so_far = drawn[..., :2].cumsum(axis=1)
    found = 0
    for ours in so_far:
        found += _judged(
            tuple(map(int, ours[:, 0])), tuple(map(int, ours[:, 1])), tuple(times), alpha, spending
        ).rejected
    return found / STUDIES


@functools.lru_cache(maxsize=65536)
def _judged(
    first: tuple[int, ...], second: tuple[int, ...], times: tuple[float, ...], alpha: float, spending: Spending
) -> SignLook:
    return sign_looks(first, second, times, alpha, spending)[-1]


def seeds_to_see_one(rate: float, chance: float = 0.95) -> int:
    """How many seeds show at least one failure with that chance: ln(1 - chance) / ln(1 - rate), rounded up; 29 at 10 %, 95 %."""
    if not 0 < rate < 1 or not 0 < chance < 1:
        raise ValueError(f"rate and chance must be between 0 and 1, got {rate} and {chance}")
    return math.ceil(math.log1p(-chance) / math.log1p(-rate))
