"""Power and equivalence against sums over every outcome with SciPy's own tests, and known answers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from exmy.seeds import seeds_line
from train.equivalence import (
    EXACT_PAIRS,
    apart_rates,
    equivalent_means,
    equivalent_rates,
    power_of_equivalence,
    seeds_for_equivalence,
)
from train.proportions import Pairs, tango_score
from train.sample_size import (
    least_telling,
    power_of_looks,
    power_paired,
    power_unpaired,
    seeds_needed,
    seeds_to_see_one,
)
from train.study import Study


def tables(n: int) -> np.ndarray:
    """Every number of pairs in which one alone diverged, and the rest, [tables, 3]."""
    return np.array([(b, c, n - b - c) for b in range(n + 1) for c in range(n + 1 - b)])


def test_ten_per_cent_against_none_needs_a_hundred_a_side() -> None:
    # Against a share of 0 the test rejects where the other diverged in 6 pairs or more: 2 / 2^6 < 0.05 < 2 / 2^5.
    assert power_paired(100, 0.0, 0.1) == pytest.approx(stats.binom.sf(5, 100, 0.1), rel=1e-12)
    assert power_paired(100, 0.0, 0.1) == pytest.approx(0.942, abs=5e-4)
    assert power_paired(29, 0.0, 0.1) == pytest.approx(0.064, abs=5e-4)
    assert seeds_needed(0.0, 0.1, 0.94) == 100 == seeds_needed(0.1, 0.0, 0.94)
    assert seeds_to_see_one(0.1) == 29
    assert 1 - 0.9**29 > 0.95 > 1 - 0.9**28


@pytest.mark.parametrize(
    ("n", "p0", "p1", "both", "alpha"),
    [(12, 0.1, 0.5, None, 0.05), (25, 0.2, 0.6, 0.15, 0.05), (9, 0.0, 0.9, 0.0, 0.01)],
)
def test_paired_power_is_a_sum_over_every_table(n: int, p0: float, p1: float, both: float | None, alpha: float) -> None:
    together = p0 * p1 if both is None else both
    of = [p0 - together, p1 - together, 1 - p0 - p1 + 2 * together]
    rejects = [
        row
        for row in tables(n)
        if stats.binomtest(int(row[0]), int(max(1, row[0] + row[1]))).pvalue <= alpha and row[0] + row[1]
    ]
    assert power_paired(n, p0, p1, alpha, both) == pytest.approx(stats.multinomial.pmf(rejects, n, of).sum(), rel=1e-10)


@pytest.mark.parametrize("n", [4, 9])
def test_unpaired_power_is_a_sum_over_every_table_of_scipys_boschloo(n: int) -> None:
    p0, p1 = 0.2, 0.8
    expected = 0.0
    for x, y in itertools.product(range(n + 1), repeat=2):
        if 0 < x + y < 2 * n and stats.boschloo_exact([[x, y], [n - x, n - y]]).pvalue <= 0.05:
            expected += stats.binom.pmf(x, n, p0) * stats.binom.pmf(y, n, p1)
    assert power_unpaired(n, p0, p1) == pytest.approx(expected, rel=1e-10)


def test_boschloo_errs_in_at_most_alpha() -> None:
    # At shares between those that the region was made at.
    assert all(power_unpaired(n, p, p) <= 0.0505 for n in (10, 40, 87) for p in np.linspace(0.003, 0.997, 97))


def test_agreeing_seeds_make_fewer_do_and_unpaired_ones_no_fewer_than_that() -> None:
    assert seeds_needed(0.1, 0.2, both=0.08) == pytest.approx(114, abs=0)
    independent, alike, unpaired = (
        seeds_needed(0.1, 0.2),
        seeds_needed(0.1, 0.2, both=0.1),
        seeds_needed(0.1, 0.2, paired=False),
    )
    assert independent is not None
    assert alike is not None
    assert unpaired is not None
    assert alike < unpaired < independent


@pytest.mark.parametrize(("p0", "p1", "paired"), [(0.0, 0.1, True), (0.1, 0.4, True), (0.2, 0.6, False)])
def test_so_many_seeds_do_and_one_fewer_does_not(p0: float, p1: float, paired: bool) -> None:
    n = seeds_needed(p0, p1, paired=paired)
    power = power_paired if paired else power_unpaired
    assert n is not None
    assert power(n, p0, p1) >= 0.8 > power(n - 1, p0, p1)


def test_what_few_seeds_can_tell() -> None:
    assert [least_telling(n) for n in (1, 5)] == [None, None]  # 2 / 2^5 > 0.05
    found = least_telling(8)
    assert found is not None
    assert power_paired(8, 0.0, found) >= 0.8 > power_paired(8, 0.0, found - 0.001)
    assert seeds_needed(0.3, 0.3) is None
    assert seeds_needed(0.0, 1e-4) is None


@pytest.mark.parametrize("spending", ["obrien-fleming", "pocock"])
def test_one_look_has_the_power_of_the_test_and_several_a_little_less(spending: str) -> None:
    exact = power_paired(60, 0.05, 0.3)
    one, four = (power_of_looks(pairs, 0.05, 0.3, spending=spending) for pairs in ([60], [15, 30, 45, 60]))  # type: ignore[arg-type]
    assert one == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 4000))
    assert exact - 0.15 < four <= one + 0.01


@pytest.mark.parametrize(("call", "what"), [
    (lambda: power_paired(5, -0.1, 0.2), "p0 and p1 must be from 0 to 1"),
    (lambda: power_paired(5, 0.1, 0.2, both=0.15), "both must be from 0 to 0.1"),
    (lambda: seeds_needed(0.1, 0.2, power=1.0), "power must be between"),
    (lambda: seeds_needed(0.1, 0.2, alpha=0.0), "alpha must be between"),
    (lambda: equivalent_rates(Pairs(0, 0, 0, 9), 0.0), "margin must be between"),
    (lambda: equivalent_means([0.1, 0.2], 0.0), "margin must be above 0"),
    (lambda: equivalent_means([0.1, math.nan], 0.1), "must be finite"),
    (lambda: seeds_to_see_one(0.0), "must be between 0 and 1"),
])  # fmt: skip
def test_questions_without_an_answer_are_refused(call: object, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        call()  # type: ignore[operator]


# --- as stable as


def test_twenty_nine_pairs_without_a_failure_show_ten_per_cent_and_no_fewer() -> None:
    """Where the shares differ by 10 %, no failure in n pairs has a chance of up to 0.9^n: 5.2 % for 28, 4.7 % for 29."""
    assert equivalent_rates(Pairs(0, 0, 0, 28), 0.1).p == pytest.approx(0.9**28, rel=1e-6)
    assert equivalent_rates(Pairs(0, 0, 0, 29), 0.1).p <= 0.05
    assert seeds_for_equivalence(0.1) == 29
    assert all(
        equivalent_rates(Pairs(0, int(b), int(c), int(d)), 0.1).p > 0.05 for n in (5, 20, 28) for b, c, d in tables(n)
    )


@pytest.mark.parametrize(("n", "margin"), [(12, 0.3), (40, 0.1), (40, 0.25), (90, 0.1)])
def test_formats_that_differ_by_the_margin_are_called_alike_in_at_most_alpha(n: int, margin: float) -> None:
    """By SciPy's multinomial, at chances of the second alone that the p-values were not made at."""
    every = tables(n)
    shown = every[[equivalent_rates(Pairs(0, int(b), int(c), int(d)), margin).p <= 0.05 for b, c, d in every]]
    assert len(shown)
    for q in np.linspace(0.0007, (1 - margin) / 2 - 0.0007, 41):
        for of in ([margin + q, q, 1 - margin - 2 * q], [q, margin + q, 1 - margin - 2 * q]):
            assert stats.multinomial.pmf(shown, n, of).sum() <= 0.05005


def test_equivalence_does_not_mind_which_is_first_and_minds_either_direction() -> None:
    one, other = equivalent_rates(Pairs(1, 6, 2, 60), 0.1), equivalent_rates(Pairs(1, 2, 6, 60), 0.1)
    assert (one.p_higher, one.p_lower) == (other.p_lower, other.p_higher)
    assert one.p == max(one.p_higher, one.p_lower) == one.p_higher
    assert equivalent_rates(Pairs(0, 0, 0, 0), 0.1).p == 1.0


@pytest.mark.parametrize(("first", "second"), [(2, 0), (14, 0), (9, 3)])
def test_many_pairs_have_exact_p_values_too(first: int, second: int) -> None:
    """Against all 52,000 tables of 320 pairs; the normal approximation has 0.0063 in place of 0.0145 for (14, 0) at 2 %."""
    n, margin = 320, 0.02
    pairs = Pairs(0, first, second, n - first - second)
    b, c = np.nonzero(np.add.outer(np.arange(n + 1), np.arange(n + 1)) <= n)
    table, score = tango_score(b, c, n, margin), float(tango_score(first, second, n, margin))
    at_most, at_least = table <= score + 1e-9, table >= score - 1e-9
    low = high = 0.0
    for q in np.concatenate([np.linspace(0, 0.05, 21), np.linspace(0.06, (1 - margin) / 2, 7)]):
        chance = stats.binom.pmf(c, n, q) * stats.binom.pmf(b, n - c, (q + margin) / (1 - q))
        low, high = max(low, chance[at_most].sum()), max(high, chance[at_least].sum())
    assert equivalent_rates(pairs, margin).p_higher == pytest.approx(low, rel=0.02)
    assert apart_rates(pairs, margin) == pytest.approx(min(1.0, 2 * high), rel=0.02)
    assert apart_rates(Pairs(0, second, first, pairs.neither), margin) == apart_rates(pairs, margin)


@pytest.mark.parametrize(
    ("first", "second", "n", "margin"), [(47, 10, 500, 0.1), (86, 2, 1000, 0.1), (30, 21, 300, 0.1), (4, 0, 40, 0.3)]
)
def test_a_p_value_is_the_largest_chance_wherever_the_second_alone_lies(
    first: int, second: int, n: int, margin: float
) -> None:
    """Against 2,000 chances of the second alone, evenly apart: of the first two, looked at in few places, 0.0492 and 0.0494."""
    score, seconds = float(tango_score(first, second, n, margin)), np.arange(n + 1)
    firsts = np.arange(n + 1)[:, None]
    below = (tango_score(firsts, seconds, n, margin) <= score + 1e-9) & (firsts + seconds <= n)
    assert (below == (firsts < below.sum(axis=0))).all()
    at = np.linspace(0, (1 - margin) / 2, 2000)[:, None]
    chance = stats.binom.pmf(seconds, n, at) * stats.binom.cdf(
        below.sum(axis=0) - 1, n - seconds, np.minimum((at + margin) / (1 - at), 1)
    )
    assert equivalent_rates(Pairs(0, first, second, n - first - second), margin).p_higher == pytest.approx(
        chance.sum(axis=1).max(), rel=0.002
    )


@pytest.mark.parametrize(("n", "margin", "first", "second"), [
    (150, 0.1, 0.06, 0.01), (300, 0.1, 0.06, 0.04), pytest.param(400, 0.05, 0.05, 0.05, marks=pytest.mark.proof),
])  # fmt: skip
def test_the_power_of_many_pairs_is_that_of_their_tables(n: int, margin: float, first: float, second: float) -> None:
    """Each table is asked about by itself; the normal approximation has 0.876 in place of 0.843 for the last."""
    b, c = (of.ravel() for of in np.meshgrid(np.arange(60), np.arange(60), indexing="ij"))
    chance = stats.multinomial.pmf(np.stack([b, c, n - b - c], axis=1), n, [first, second, 1 - first - second])
    likely = np.flatnonzero(chance > 2e-5)
    shown = [equivalent_rates(Pairs(0, int(b[i]), int(c[i]), int(n - b[i] - c[i])), margin).p <= 0.05 for i in likely]
    assert chance[likely].sum() > 0.98
    assert power_of_equivalence(n, margin, first, second) == pytest.approx(chance[likely][shown].sum(), abs=0.02)


def test_beyond_the_exact_pairs_nothing_jumps() -> None:
    near, far = (equivalent_rates(Pairs(0, 38, 38, n - 76), 0.06).p for n in (EXACT_PAIRS, EXACT_PAIRS + 1))
    assert far == pytest.approx(near, rel=0.05)
    # No failure among 545 pairs has a chance of 6.5 % where formats differ by 0.5 %.
    assert equivalent_rates(Pairs(0, 0, 0, 545), 0.005).p == pytest.approx(0.995**545)
    assert power_of_equivalence(545, 0.005, 0.0, 0.0) == 0.0
    assert seeds_for_equivalence(0.005) == math.ceil(math.log(0.05) / math.log(0.995))
    exact, about = (power_of_equivalence(n, 0.1, 0.1, 0.1) for n in (EXACT_PAIRS, EXACT_PAIRS + 1))
    assert about == pytest.approx(exact, abs=0.02)


@pytest.mark.parametrize("shift", [0.0, 0.04, -0.12])
def test_means_are_equivalent_by_two_of_scipys_one_sided_tests(shift: float) -> None:
    values = np.random.default_rng(3).normal(shift, 0.1, 14)
    found = equivalent_means(values, 0.1)
    assert found.p_higher == pytest.approx(stats.ttest_1samp(values, 0.1, alternative="less").pvalue)
    assert found.p_lower == pytest.approx(stats.ttest_1samp(values, -0.1, alternative="greater").pvalue)


def test_means_of_runs_with_the_same_bits_and_of_too_few() -> None:
    assert equivalent_means([0.0, 0.0, 0.0], 0.1).p == 0.0
    assert equivalent_means([0.1, 0.1, 0.1], 0.1).p == 1.0
    assert equivalent_means([0.0], 0.1).p == equivalent_means([], 0.1).p == 1.0


# --- the line before a study


def study(seeds: int, **more: object) -> Study:
    axes = {"recipe": ["e8m7", "e8m3", "e4m3"], "learning_rate": [1e-3, 2e-3], "seed": seeds}
    return Study.model_validate({"name": "s", "baseline": "e8m7", "axes": axes, **more})


def test_a_study_is_told_what_its_seeds_can_tell() -> None:
    few, many = seeds_line(study(3)), seeds_line(study(64))
    assert few.startswith(
        "seeds: 3 a recipe and learning rate, which in 2 comparisons with e8m7 can tell no share of diverged runs"
    )
    needed, told = seeds_needed(0.0, 0.1, 0.8, 0.025), least_telling(64, 0.025)
    assert told is not None
    assert (
        f"10 % from 0 % needs {needed}, as stable within 10 % at least {seeds_for_equivalence(0.1, alpha=0.025)}" in few
    )
    assert f"can tell {100 * told:.0f} % diverged from 0 % (80 % power, 5 % in all)" in many
    assert "\n" not in few


def test_planned_looks_share_their_own_alpha_among_recipes_and_rates() -> None:
    line = seeds_line(study(16, strategy={"kind": "seeds", "looks": 4, "alpha": 0.01}))
    assert line.startswith("seeds: at most 64 a recipe and learning rate, which in 4 comparisons")
    assert "1 % in all" in line


def test_a_study_of_one_recipe_compares_nothing() -> None:
    alone = Study.model_validate(
        {"name": "s", "baseline": "e8m7", "axes": {"recipe": ["e8m7"], "learning_rate": [1e-3], "seed": 2}}
    )
    assert seeds_line(alone) == "seeds: 2 a recipe and learning rate; no recipe is held against the baseline e8m7"
