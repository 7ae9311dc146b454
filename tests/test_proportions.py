"""Shares and their differences, against SciPy, published worked examples, and likelihoods maximised numerically."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import xarray as xr
from scipy import optimize, stats
from scipy.special import xlogy

from train.proportions import (
    Pairs,
    clopper_pearson_interval,
    mcnemar,
    paired_interval,
    pairs_of,
    tango_score,
    unpaired_interval,
    unpaired_test,
    wilson_interval,
)

NAN = float("nan")


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.999])
def test_clopper_and_pearsons_interval_is_scipys(confidence: float) -> None:
    cells = [(k, n) for n in (1, 2, 3, 8, 30, 1000) for k in {0, 1, n // 2, n - 1, n}]
    low, high = clopper_pearson_interval([k for k, _ in cells], [n for _, n in cells], confidence)
    expected = [stats.binomtest(k, n).proportion_ci(confidence, method="exact") for k, n in cells]
    # SciPy finds the limits by a root search, to 2e-12 of the answer.
    np.testing.assert_allclose(low, [e.low for e in expected], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(high, [e.high for e in expected], rtol=1e-9, atol=1e-12)


def test_clopper_and_pearson_by_hand_and_at_the_ends() -> None:
    low, high = clopper_pearson_interval([0, 8, 0], [8, 8, 0])
    assert (low[0], high[1]) == (0.0, 1.0)
    assert high[0] == pytest.approx(1 - 0.025 ** (1 / 8))  # (1 - p)^8 = 0.025
    assert low[1] == pytest.approx(0.025 ** (1 / 8))
    assert np.isnan([low[2], high[2]]).all()
    with pytest.raises(ValueError, match="k must be between 0 and n"):
        clopper_pearson_interval(3, 2)


@pytest.mark.parametrize(
    ("pairs", "confidence", "method", "low", "high"),
    [
        # Newcombe 1998 (Stat. Med. 17:2635), the first example, method 10.
        (Pairs(36, 12, 2, 0), 0.95, "newcombe", 0.0569, 0.3404),
        # Airway hyper-responsiveness (Bentur et al. 2009), as Fagerland, Lydersen and Laake 2013 tabulate it.
        (Pairs(1, 1, 7, 12), 0.95, "newcombe", -0.507, -0.026),
        (Pairs(1, 1, 7, 12), 0.95, "tango", -0.517, -0.026),
        # R's PropCIs::scoreci.mp(25, 28, 618, 0.9) and (0, 7, 14, 0.95).
        (Pairs(0, 28, 25, 565), 0.90, "tango", -0.0148, 0.0247),
        (Pairs(3, 7, 0, 4), 0.95, "tango", 0.177034, 0.732008),
    ],
)
def test_paired_intervals_are_the_published_ones(
    pairs: Pairs, confidence: float, method: str, low: float, high: float
) -> None:
    found = paired_interval(pairs, confidence, method)  # type: ignore[arg-type]
    digits = max(len(f"{abs(end)}".split(".")[1]) for end in (low, high))
    assert found == pytest.approx((low, high), abs=0.6 * 10**-digits)


@pytest.mark.parametrize(
    "pairs", [Pairs(3, 5, 2, 10), Pairs(0, 1, 0, 7), Pairs(20, 0, 9, 11), Pairs(0, 4, 4, 0), Pairs(1, 6, 0, 1)]
)
def test_tangos_limits_are_those_of_the_score_at_the_likeliest_table(pairs: Pairs) -> None:
    """Found without his quadratic: q by a bounded search of the likelihood, the variance from its definition."""
    b, c, n = pairs.first, pairs.second, pairs.n

    def score(d: float) -> float:
        def unlikely(q: float) -> float:
            return -float(xlogy(b, q + d) + xlogy(c, q) + xlogy(n - b - c, 1 - 2 * q - d))

        low, high = max(0.0, -d), (1 - d) / 2
        q = optimize.minimize_scalar(unlikely, bounds=(low, high), method="bounded", options={"xatol": 1e-13}).x
        # Of b - c: n (p_b + p_c - (p_b - p_c)^2).
        return float((b - c - n * d) / math.sqrt(n * (2 * q + d - d**2)))

    z = stats.norm.isf(0.025)
    low, high = paired_interval(pairs)
    for limit, side in ((low, 1), (high, -1)):
        if abs(limit) < 1:
            assert score(limit) == pytest.approx(side * z, abs=2e-5)
            assert float(tango_score(b, c, n, limit)) == pytest.approx(side * z, abs=1e-9)


def test_tangos_interval_where_no_pair_differs_and_where_all_do() -> None:
    z2 = stats.norm.isf(0.025) ** 2
    # With b = c = 0 the score at d is -sqrt(n d / (1 - d)).
    assert paired_interval(Pairs(0, 0, 0, 8)) == pytest.approx((-z2 / (8 + z2), z2 / (8 + z2)))
    assert paired_interval(Pairs(0, 5, 0, 0))[1] == 1.0
    assert paired_interval(Pairs(0, 0, 5, 0))[0] == -1.0
    assert all(map(math.isnan, paired_interval(Pairs(0, 0, 0, 0))))
    low, high = paired_interval(Pairs(2, 3, 8, 4))
    assert paired_interval(Pairs(2, 8, 3, 4)) == pytest.approx((-high, -low))


def test_mcnemar_by_hand() -> None:
    assert mcnemar(Pairs(1, 1, 7, 12)) == 2 * (1 + 8) / 2**8
    assert mcnemar(Pairs(4, 0, 0, 9)) == 1.0
    assert mcnemar(Pairs(0, 6, 0, 2)) == 2 / 2**6


def test_an_unpaired_interval_is_newcombes() -> None:
    # Newcombe 1998 (Stat. Med. 17:873), example (a), method 10: 56/70 - 48/80.
    assert unpaired_interval(56, 70, 48, 80) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert all(map(math.isnan, unpaired_interval(0, 0, 1, 2)))


def test_unpaired_tests_are_scipys_and_quiet(caplog: pytest.LogCaptureFixture) -> None:
    table = [[2, 7], [10, 5]]
    with caplog.at_level(logging.INFO):
        found = unpaired_test(2, 12, 7, 12), unpaired_test(2, 12, 7, 12, "barnard")
    assert caplog.records == []
    assert found == pytest.approx((stats.boschloo_exact(table).pvalue, stats.barnard_exact(table).pvalue))
    assert [unpaired_test(*counts) for counts in ((0, 9, 0, 5), (3, 3, 4, 4), (0, 0, 1, 2))] == [1.0, 1.0, 1.0]


def test_pairs_are_made_by_the_seeds_that_both_have() -> None:
    first = xr.DataArray([1.0, 0.0, 1.0, 0.0, 1.0], dims="seed", coords={"seed": [0, 1, 2, 3, 9]})
    second = xr.DataArray([False, True, True, False], dims="seed", coords={"seed": [2, 1, 0, 3]})
    assert pairs_of(first, second) == Pairs(1, 1, 1, 1)
    assert pairs_of(first.where(first["seed"] != 0), second) == Pairs(0, 1, 1, 1)
    assert pairs_of(first.isel(seed=[4]), second) == Pairs(0, 0, 0, 0)
    with pytest.raises(ValueError, match="labels are all different"):
        pairs_of(first.assign_coords(seed=[0, 0, 1, 2, 3]), second)


def coverage_of_one(interval: object, n: int) -> np.ndarray:
    """The exact coverage at 199 shares, by summing over what could come out."""
    k, p = np.arange(n + 1), np.arange(1, 200) / 200
    low, high = interval(k, n)  # type: ignore[operator]
    inside = (low <= p[:, None]) & (p[:, None] <= high)
    return np.asarray((stats.binom.pmf(k, n, p[:, None]) * inside).sum(axis=1))


@pytest.mark.parametrize("n", [3, 8, 29, 100])
def test_shares_are_covered_as_often_as_said(n: int) -> None:
    assert coverage_of_one(clopper_pearson_interval, n).min() >= 0.95
    # Score intervals cover at their level on average; Wilson's least, near 0 and 1, is known to be 0.83 (Newcombe 1998).
    of_wilson = coverage_of_one(wilson_interval, n)
    assert 0.945 <= of_wilson.mean() <= 0.975
    assert of_wilson.min() > 0.83


@pytest.mark.parametrize(("n", "method"), [(8, "tango"), (8, "newcombe"), (30, "tango"), (30, "newcombe")])
def test_differences_of_pairs_are_covered_as_often_as_said(n: int, method: str) -> None:
    """Exactly, over 200 truths drawn evenly from all: multinomial chances of every table, with those of neither summed out."""
    rng = np.random.default_rng(n)
    truths = rng.dirichlet(np.ones(4), 200)
    tables = [(a, b, c) for a in range(n + 1) for b in range(n + 1 - a) for c in range(n + 1 - a - b)]
    if method == "tango":  # which looks at b and c alone
        tables = [(0, b, c) for b in range(n + 1) for c in range(n + 1 - b)]
        truths = np.column_stack([np.zeros(200), truths[:, 1:3], truths[:, 0] + truths[:, 3]])
    counts = np.array([(*table, n - sum(table)) for table in tables])
    limits = np.array([paired_interval(Pairs(*map(int, row)), 0.95, method) for row in counts])  # type: ignore[arg-type]
    covered = []
    for truth in truths:
        chance = stats.multinomial.pmf(counts, n, truth)
        d = truth[1] - truth[2]
        covered.append(chance[(limits[:, 0] <= d) & (d <= limits[:, 1])].sum())
    assert 0.945 <= np.mean(covered) <= 0.975
    assert min(covered) > 0.88
