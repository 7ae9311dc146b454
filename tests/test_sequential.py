"""Group-sequential tests against published tables, an independent integral, all sign patterns, and simulated studies."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from train.sequential import (
    Spending,
    alpha_spent,
    crossing_probabilities,
    flip_looks,
    power_family_bounds,
    repeated_interval,
    sign_looks,
    sign_p_value,
    spending_bounds,
)

SPENDINGS: tuple[Spending, ...] = ("obrien-fleming", "pocock")
# Jennison and Turnbull 2000, tables 2.1 and 2.3, alpha 0.05 (and 0.01): the constant of the last look, by number of looks.
POCOCK = {2: 2.178, 3: 2.289, 4: 2.361, 5: 2.413, 10: 2.555}
OBRIEN_FLEMING = {2: 1.977, 3: 2.004, 4: 2.024, 5: 2.040, 10: 2.087}
POCOCK_1, OBRIEN_FLEMING_1 = {2: 2.772, 5: 2.986}, {2: 2.580}
# Five equal looks at alpha 0.05, two-sided, as the programs of Reboussin, DeMets, Kim and Lan (2000) print them.
LAN_DEMETS = {
    "obrien-fleming": [4.8769, 3.3569, 2.6803, 2.2898, 2.0310],
    "pocock": [2.4380, 2.4268, 2.4101, 2.3966, 2.3859],
}


def equal(looks: int) -> list[float]:
    return [k / looks for k in range(1, looks + 1)]


@pytest.mark.parametrize(("delta", "table", "alpha"), [
    (0.5, POCOCK, 0.05), (0.0, OBRIEN_FLEMING, 0.05), (0.5, POCOCK_1, 0.01), (0.0, OBRIEN_FLEMING_1, 0.01),
])  # fmt: skip
def test_the_constants_are_those_of_the_published_tables(delta: float, table: dict[int, float], alpha: float) -> None:
    for looks, constant in table.items():
        assert power_family_bounds(equal(looks), alpha, delta)[-1] == pytest.approx(constant, abs=6e-4), looks


@pytest.mark.parametrize("spending", SPENDINGS)
def test_spending_bounds_are_those_of_the_published_programs(spending: Spending) -> None:
    assert spending_bounds(equal(5), 0.05, spending) == pytest.approx(LAN_DEMETS[spending], abs=2e-4)


@pytest.mark.parametrize("spending", SPENDINGS)
def test_each_look_spends_what_it_may(spending: Spending) -> None:
    """By another method: the chance to stay inside, as an integral of the joint normal density (Genz 1992, in SciPy)."""
    times = [0.2, 0.5, 0.8, 1.0]
    bounds = spending_bounds(times, 0.05, spending)
    for k in range(1, 5):
        joint = np.sqrt([[min(s, t) / max(s, t) for s in times[:k]] for t in times[:k]])
        normal = stats.multivariate_normal(np.zeros(k), joint, seed=1, maxpts=200_000, abseps=1e-7)
        inside = normal.cdf(bounds[:k], lower_limit=-bounds[:k])
        assert 1 - inside == pytest.approx(alpha_spent(times[k - 1], 0.05, spending), abs=2e-6)
    assert alpha_spent(1.0, 0.05, spending) == pytest.approx(0.05, rel=1e-12)


def test_looking_ten_times_without_a_plan_finds_something_in_nineteen_of_a_hundred_studies() -> None:
    """Armitage, McPherson and Rowe 1969, table 2: 0.193 for ten looks at 5 %."""
    assert crossing_probabilities([stats.norm.isf(0.025)] * 10, equal(10)).sum() == pytest.approx(0.193, abs=5e-4)


def test_power_is_that_of_simulated_studies() -> None:
    times, drift = equal(4), 2.8
    bounds = spending_bounds(times, 0.05)
    steps = np.random.default_rng(5).normal(drift / 4, 0.5, (100_000, 4))
    z = np.abs(steps.cumsum(axis=1)) / np.sqrt(times)
    first = np.where((z >= bounds).any(axis=1), (z >= bounds).argmax(axis=1), 4)
    found = crossing_probabilities(bounds, times, drift)
    for look, chance in enumerate(found):
        assert stats.binomtest(int((first == look).sum()), 100_000, chance).pvalue > 1e-4


@pytest.mark.parametrize("times", [[], [0.5, 0.5], [0.0, 1.0], [0.5, 1.1], [0.6, 0.5]])
def test_looks_at_times_that_do_not_rise_to_one_are_refused(times: list[float]) -> None:
    with pytest.raises(ValueError, match="times must rise"):
        spending_bounds(times, 0.05)


def test_one_look_at_signs_is_mcnemars_exact_test() -> None:
    for ours, theirs in itertools.product(range(12), repeat=2):
        (look,) = sign_looks([ours], [theirs], [1.0], 0.05)
        p = stats.binomtest(ours, ours + theirs).pvalue if ours + theirs else 1.0
        assert look.rejected == (p <= 0.05), (ours, theirs)


@pytest.mark.parametrize("spending", SPENDINGS)
@pytest.mark.parametrize("groups", [(3, 5, 6), (8, 0, 6), (1, 1, 1, 11), (7, 7)])
def test_of_all_sign_patterns_at_most_alpha_are_rejected(spending: Spending, groups: Sequence[int]) -> None:
    """Every one of 2^14, and as many as the looks say that they spent."""
    ends = np.cumsum(groups)
    patterns = np.array(list(itertools.product((0, 1), repeat=int(ends[-1]))))
    first = np.stack([patterns[:, :end].sum(axis=1) for end in ends], axis=1)
    rejected, spent = 0, 0.0
    for counts, times in zip(*np.unique(first, axis=0, return_counts=True), strict=True):
        looks = sign_looks(counts.tolist(), (ends - counts).tolist(), equal(len(ends)), 0.05, spending)
        rejected += int(times) * looks[-1].rejected
        spent = max(spent, looks[-1].spent)
    assert 0 < rejected / len(patterns) <= 0.05
    assert spent == pytest.approx(rejected / len(patterns), abs=1e-12)


@pytest.mark.parametrize("spending", SPENDINGS)
@pytest.mark.parametrize(("share", "agreeing"), [(0.1, 0.0), (0.5, 0.0), (0.4, 0.8)])
def test_the_error_of_looks_at_divergence_is_at_most_alpha(spending: Spending, share: float, agreeing: float) -> None:
    """1,000 studies of two formats that diverge alike, 4 looks of 16 pairs, agreeing by chance or mostly."""
    rng = np.random.default_rng(11)
    studies, pairs = 1000, 64
    ours = rng.random((studies, pairs)) < share
    theirs = np.where(rng.random(ours.shape) < agreeing, ours, rng.random(ours.shape) < share)
    counts = [
        np.cumsum((a & ~b).reshape(studies, 4, 16).sum(axis=2), axis=1) for a, b in ((ours, theirs), (theirs, ours))
    ]
    errors = sum(
        sign_looks(first.tolist(), second.tolist(), equal(4), 0.05, spending)[-1].rejected
        for first, second in zip(*counts, strict=True)
    )
    assert errors <= stats.binom.isf(1e-4, studies, 0.05)


@pytest.mark.parametrize("spending", SPENDINGS)
@pytest.mark.parametrize("law", ["normal", "heavy"])
def test_the_error_of_looks_at_losses_is_at_most_alpha(spending: Spending, law: str) -> None:
    """200 studies, 4 looks of 4 pairs; heavy: differences of runs of which some lost everything."""
    rng = np.random.default_rng(3)
    errors = 0
    for _ in range(200):
        values = rng.standard_normal((2, 16)) if law == "normal" else rng.random((2, 16)) ** -1.5
        errors += flip_looks(values[0] - values[1], [4, 8, 12, 16], equal(4), 0.05, spending)[-1].rejected
    assert errors <= stats.binom.isf(1e-4, 200, 0.05)


def test_looks_at_losses_find_what_is_there() -> None:
    rng = np.random.default_rng(4)
    found = [flip_looks(rng.normal(1, 1, 16), [4, 8, 12, 16], equal(4), 0.05)[-1] for _ in range(50)]
    assert np.mean([look.rejected for look in found]) > 0.85
    assert min(look.pairs for look in found) < 16
    values = rng.normal(1, 1, 16)
    assert [look.total for look in flip_looks(values, [4, 9], [0.3, 1.0], 0.05)] == pytest.approx(
        [values[:4].sum(), values[:9].sum()]
    )


def test_flipped_losses_are_signs_where_all_differ_by_as_much() -> None:
    """The drawn patterns against the exact recursion; both fall where 14 of 16 have one sign, and neither where 11 have."""
    for ups in (16, 15, 14, 13, 12, 11, 8):
        values = np.repeat([1.0, -1.0], [ups, 16 - ups])
        order = np.random.default_rng(ups).permutation(16)
        first = np.cumsum(values[order] > 0)[[7, 15]].tolist()
        flips = flip_looks(values[order], [8, 16], [0.5, 1.0], 0.05, "pocock")
        signs = sign_looks(first, [8 - first[0], 16 - first[1]], [0.5, 1.0], 0.05, "pocock")
        assert flips[-1].rejected == signs[-1].rejected, ups
        assert flips[-1].spent == pytest.approx(signs[-1].spent, abs=5 * math.sqrt(0.05 / 2**17)), ups


def test_pairs_that_do_not_differ_reject_nothing() -> None:
    assert not flip_looks(np.zeros(8), [4, 8], [0.5, 1.0], 0.05)[-1].rejected
    assert sign_looks([0, 0], [0, 0], [0.5, 1.0], 0.05)[-1].bound is None


@pytest.mark.parametrize("spending", ["obrien-fleming", "pocock"])
@pytest.mark.parametrize(
    ("groups", "times"), [((8, 8), (0.5, 1.0)), ((12, 6), (0.5, 1.0)), ((5, 4, 6), (0.3, 0.6, 1.0))]
)
def test_a_p_value_of_looks_is_at_most_x_in_at_most_x_of_all_patterns(
    spending: Spending, groups: tuple[int, ...], times: tuple[float, ...]
) -> None:
    """Of coins, every outcome with its chance; on a grid of alphas a quarter apart 11 % of studies had p at most 10 %."""
    chance: dict[float, float] = {}
    for firsts in itertools.product(*(range(n + 1) for n in groups)):
        first = list(itertools.accumulate(firsts))
        second = [total - of for total, of in zip(itertools.accumulate(groups), first, strict=True)]
        p = sign_p_value(first, second, times, spending)
        weight = math.prod(float(stats.binom.pmf(of, n, 0.5)) for of, n in zip(firsts, groups, strict=True))
        chance[p] = chance.get(p, 0.0) + weight
    below = np.cumsum([chance[p] for p in sorted(chance)])
    assert (below <= np.array(sorted(chance)) * (1 + 1e-6)).all()
    assert (below > 0.3 * np.array(sorted(chance)))[1:].any()  # and not by being 1


def test_a_p_value_of_looks_rejects_at_all_alphas_above_it_and_not_just_below() -> None:
    """2 of 12 pairs, then 3 of 18: at 0.0077 Pocock's boundaries are crossed, and from 0.0103 to 0.0114 they are not."""
    counts = ([2, 3], [10, 15])
    for spending in SPENDINGS:
        p = sign_p_value(*counts, (0.5, 1.0), spending)
        for alpha in np.geomspace(p * 1.000001, 0.99, 3000).tolist():
            assert sign_looks(*counts, (0.5, 1.0), alpha, spending)[-1].rejected, (spending, alpha)
        assert not sign_looks(*counts, (0.5, 1.0), p * 0.999999, spending)[-1].rejected
    assert 0.01145 < p < 0.012
    assert sign_p_value([0, 0], [0, 0], (0.5, 1.0)) == 1.0
    assert sign_p_value([0, 0], [60, 120], (0.5, 1.0)) == 1e-6


def test_later_pairs_do_not_change_earlier_looks() -> None:
    values = np.random.default_rng(0).standard_normal(12)
    short, long = (flip_looks(values, pairs, [0.3, 0.6, 1.0][: len(pairs)], 0.05) for pairs in ([4, 8], [4, 8, 12]))
    assert long[:2] == short


def test_what_looks_can_t_be_taken_at_is_refused() -> None:
    with pytest.raises(ValueError, match="must be finite"):
        flip_looks([1.0, math.nan], [2], [1.0], 0.05)
    with pytest.raises(ValueError, match="must rise to at most 2"):
        flip_looks([1.0, 2.0], [3], [1.0], 0.05)
    with pytest.raises(ValueError, match="must not fall"):
        sign_looks([3, 2], [0, 0], [0.5, 1.0], 0.05)


def test_a_repeated_interval_is_student_s_at_the_last_look_of_one() -> None:
    values = np.random.default_rng(2).normal(0.3, 1, 12)
    theirs = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert repeated_interval(values, stats.norm.isf(0.025)) == pytest.approx((theirs.low, theirs.high))
    assert all(map(math.isnan, repeated_interval([1.0], 2.0)))
