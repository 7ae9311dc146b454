"""Studies whose truth is known: intervals cover it as often as they say, tests err as seldom, power is what was computed.

Each check is there twice: with some studies among the tests, with a thousand and more as a `proof` (make verify). What is allowed
is the binomial distribution's: a coverage that is nominal falls below the bound once in ten thousand.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from tests.synthetic_coverage import BASE, covered, grids
from tests.synthetic_studies import Truth, make_runs
from train.alarms import alarm_rows
from train.claims import Claims, judge
from train.early_warning import warning_skill
from train.equivalence import equivalent_rates, power_of_equivalence
from train.lead_times import incremental, lead_time
from train.proportions import Pairs, mcnemar
from train.resample import LEAST_SEEDS
from train.sample_size import power_paired
from train.seed_cube import seed_grid
from train.sensitivity import lr_sensitivity
from train.sequential import flip_looks, repeated_interval, sign_looks, spending_bounds
from train.verdicts import VerdictSettings, verdict
from train.window import stable_window

ROOT = Path(__file__).parent.parent
LUCK = 1e-4  # how often a check of what holds would fail, each for itself


def sizes(short: int, long: int) -> pytest.MarkDecorator:
    """The number of studies: some, or as many as a proof takes."""
    return pytest.mark.parametrize("studies", [short, pytest.param(long, marks=pytest.mark.proof)])


def at_least(rate: float, studies: int) -> float:
    """What a count of studies with that chance each may fall to."""
    return float(stats.binom.ppf(LUCK, studies, rate))


def at_most(rate: float, studies: int) -> float:
    return float(stats.binom.isf(LUCK, studies, rate))


@pytest.mark.parametrize("seeds", [8, 32])
@sizes(40, 1000)
def test_every_interval_of_a_verdict_covers_the_truth(studies: int, seeds: int) -> None:
    counts = covered(studies, seeds)
    assert len(counts) == 20
    assert {name: count for name, count in counts.items() if count < at_least(0.95, studies)} == {}


def test_the_page_has_the_coverage_that_was_counted() -> None:
    """Of benchmarks/results/cpu-coverage.json, by its command; none of it is below what 95 % may come out as."""
    counted = json.loads((ROOT / "benchmarks" / "results" / "cpu-coverage.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "stability.md").read_text(encoding="utf-8")
    assert counted["studies"] >= 1000
    names = {name.split(",")[0] for name in counted["covered"]["8"]}
    for name in names:
        shares = [
            f"{100 * counted['covered'][seeds][f'{name}, {recipe}'] / counted['studies']:.1f} %"
            for seeds in ("8", "32")
            for recipe in ("worse", "same")
        ]
        assert f"| `{name}` | {' | '.join(shares)} |" in page
    assert page.count(" % |\n") == len(names)
    assert min(min(of.values()) for of in counted["covered"].values()) >= at_least(0.95, counted["studies"])


@pytest.mark.parametrize(("seeds", "kind"), [(8, "curved"), (16, "curved"), (8, "flat"), (16, "flat")])
@sizes(100, 2000)
def test_sensitivity_is_covered_by_contrasts_always_and_by_the_bootstrap_where_one_rate_is_best(
    studies: int, seeds: int, kind: str
) -> None:
    """Where all rates are as good, the truth is 0 and every draw above it: so the bootstrap is not what a verdict shows."""
    truth = Truth((0.0,) * 5, tuple(1.5 + 0.03 * (i - 1.0) ** 2 for i in range(5)) if kind == "curved" else (1.5,) * 5)
    covered = {"contrasts": 0, "bootstrap": 0}
    for grid in grids(studies, seeds, a=truth):
        for method in covered:
            found = lr_sensitivity(grid, method=method, draws=400)  # type: ignore[arg-type]
            covered[method] += bool(found["sensitivity_low"] <= truth.sensitivity <= found["sensitivity_high"] + 1e-12)
    assert covered["contrasts"] >= at_least(0.95, studies)
    if kind == "curved":
        assert covered["bootstrap"] >= at_least(0.94, studies)
    else:
        assert covered["bootstrap"] == 0


@pytest.mark.parametrize(("p", "both"), [(0.05, 0.0025), (0.2, 0.15), (0.5, 0.25)])
@pytest.mark.parametrize("pairs", [16, 64])
@sizes(1000, 20_000)
def test_alike_formats_are_told_apart_in_at_most_alpha(studies: int, pairs: int, p: float, both: float) -> None:
    of = [both, p - both, p - both, 1 - 2 * p + both]
    drawn = np.random.default_rng(7).multinomial(pairs, of, studies)
    rejected = sum(mcnemar(Pairs(*map(int, row))) <= 0.05 for row in drawn)
    assert rejected <= at_most(0.05, studies)


@pytest.mark.parametrize(("worse", "better"), [(0.1, 0.0), (0.15, 0.05), (0.0, 0.1), (0.5, 0.4)])
@pytest.mark.parametrize("pairs", [32, 90])
@sizes(1000, 20_000)
def test_formats_that_differ_by_the_margin_are_called_as_stable_in_at_most_alpha(
    studies: int, pairs: int, worse: float, better: float
) -> None:
    drawn = np.random.default_rng(8).multinomial(pairs, [0.0, worse, better, 1 - worse - better], studies)
    called = sum(equivalent_rates(Pairs(*map(int, row)), 0.1).p <= 0.05 for row in drawn)
    assert called <= at_most(0.05, studies)


@pytest.mark.parametrize("definition", ["divergence", "loss"])
@sizes(150, 2000)
def test_looks_at_growing_studies_err_in_at_most_alpha(studies: int, definition: str) -> None:
    """Of two recipes that are alike, by runs that share seeds: four planned looks of 8 seeds each."""
    truth = Truth((0.2,), (1.5,))
    rejected = 0
    times, pairs = [0.25, 0.5, 0.75, 1.0], [8, 16, 24, 32]
    for grid in grids(studies, 32, a=truth, b=truth):
        if definition == "divergence":
            a, b = (grid["diverged"].sel(recipe=name).values[0] for name in "ab")
            first, second = (np.cumsum(of)[[n - 1 for n in pairs]].astype(int).tolist() for of in (a > b, b > a))
            rejected += sign_looks(first, second, times, 0.05, "pocock")[-1].rejected
        else:
            differences = (grid["clipped_loss"].sel(recipe="a") - grid["clipped_loss"].sel(recipe="b")).values[0]
            rejected += flip_looks(differences, pairs, times, 0.05, "pocock")[-1].rejected
    assert rejected <= at_most(0.05, studies)


@sizes(16, 1000)
def test_claims_are_decided_wrongly_in_at_most_alpha_of_files_and_looks_together(studies: int) -> None:
    """Four claims about recipes that are alike: any decision, at either of two looks, is an error of the file."""
    rule = {
        "claim": "c",
        "source": "s",
        "study": "s",
        "recipe": "a",
        "baseline": "b",
        "smallest_n": 8,
        "looks": [16, 32],
    }
    each = [
        {"statistic": "divergence", "expect": "higher", "spending": "pocock"}, {"statistic": "divergence", "expect": "lower"},
        {"statistic": "optimum_shift", "expect": "lower"}, {"statistic": "sensitivity", "expect": "higher"},
    ]  # fmt: skip
    file = Claims.model_validate({"claims": [rule | {"name": str(i)} | of for i, of in enumerate(each)]})
    truth = Truth((0.1, 0.3, 0.4), (1.5, 1.45, 1.6))
    wrong = 0
    for grid in grids(studies, 32, a=truth, b=truth):
        looks = (grid.isel(seed=slice(n)) for n in (16, 32))
        wrong += any(of.state != "undecided" for seen in looks for of in judge(file, lambda _, seen=seen: seen))  # type: ignore[misc]
    assert wrong <= at_most(0.05, studies)


@sizes(400, 4000)
def test_a_repeated_interval_covers_at_all_looks_together(studies: int) -> None:
    """By normal theory of normal differences, "about": 1 % below its level is let pass."""
    bounds = spending_bounds([0.25, 0.5, 0.75, 1.0], 0.05)
    drawn = np.random.default_rng(9).normal(0.3, 1.0, (studies, 48))
    covered = 0
    for values in drawn:
        limits = [repeated_interval(values[:n], bound) for n, bound in zip((12, 24, 36, 48), bounds, strict=True)]
        covered += all(low <= 0.3 <= high for low, high in limits)
    assert covered >= at_least(0.94, studies)


@pytest.mark.parametrize(("p0", "p1", "alike"), [(0.0, 0.15, 0.0), (0.1, 0.35, 0.0), (0.1, 0.35, 0.8)])
@sizes(60, 1000)
def test_power_is_what_was_computed(studies: int, p0: float, p1: float, alike: float) -> None:
    """Of the verdicts of whole studies of 40 seeds; alike: how much of a run's frailty is its seed's."""
    both = (
        stats.multivariate_normal([0, 0], [[1, alike], [alike, 1]]).cdf(stats.norm.ppf([max(p0, 1e-12), p1]))
        if p0
        else 0.0
    )
    power = power_paired(40, p0, p1, both=float(both))
    found = 0
    for study in range(studies):
        truths = {"base": Truth((p0,), (1.5,)), "a": Truth((p1,), (1.5,))}
        data = make_runs(truths, 40, np.random.default_rng([11, study]), alike=alike)
        found += str(verdict(seed_grid(data), "base")["state"].values[0]) == "less stable"
    assert stats.binomtest(found, studies, power).pvalue > LUCK


@pytest.mark.parametrize(("p", "pairs"), [(0.0, 29), (0.03, 60), (0.1, 120)])
@sizes(2000, 20_000)
def test_the_power_to_show_equivalence_is_what_was_computed(studies: int, p: float, pairs: int) -> None:
    alone = p * (1 - p)
    drawn = np.random.default_rng(10).multinomial(pairs, [p * p, alone, alone, 1 - p * p - 2 * alone], studies)
    shown = sum(equivalent_rates(Pairs(*map(int, row)), 0.1).p <= 0.05 for row in drawn)
    power = power_of_equivalence(pairs, 0.1, alone, alone)
    assert (shown == studies) if power > 1 - 1e-12 else stats.binomtest(shown, studies, power).pvalue > LUCK


@sizes(60, 1000)
def test_windows_that_may_go_on_beyond_the_grid_are_always_said_to(studies: int) -> None:
    """A window that touches the lowest rate tried: where it is seen to, it is censored, and no upper limit is ever claimed."""
    truth = Truth((0.0, 0.0, 0.6, 0.9), (1.50, 1.51, 1.60, 1.90))
    for grid in grids(studies, 16, a=truth):
        window = stable_window(grid, "a")
        first, last = grid["learning_rate"].values[[0, -1]]
        assert window.censored_below == (window.lowest == first)
        assert window.censored_above == (window.highest == last)
        assert window.open_ended
        assert str(window).startswith("at least") == window.censored


@sizes(40, 1000)
def test_no_verdict_and_no_interval_rests_on_too_few_seeds(studies: int) -> None:
    for seeds in (1, 3, 5):
        for grid in grids(studies // 4, seeds, base=BASE, a=Truth((0.9,) * 5, (3.0,) * 5)):
            found = verdict(grid, "base", settings=VerdictSettings(learning_rate=2.0**-9))
            assert str(found["state"].values[0]) == "undecided"
            assert np.isnan(found["sensitivity_low"].values).all() == (seeds < LEAST_SEEDS)
            assert not np.isfinite(found["window_at_least"].values).any()


# --- alarms


def alarms(
    study: int, seeds: int, strength: float, of_seed: float, steps: int = 8
) -> tuple[xr.DataArray, xr.DataArray, xr.DataArray]:
    """Three rates; a signal that is normal, `strength` higher within 3 steps of the onset; a seed's runs share a part of it."""
    rng = np.random.default_rng([study, seeds])
    rate, which = np.repeat([1e-3, 2e-3, 4e-3], seeds), np.tile(np.arange(seeds), 3)
    fails = rng.random(rate.size) < np.repeat([0.2, 0.4, 0.6], seeds)
    onset = np.where(fails, rng.integers(4, steps, rate.size), np.nan)
    t = np.arange(steps)
    near = (t < onset[:, None]) & (onset[:, None] <= t + 3)
    shared = of_seed * rng.standard_normal(seeds)[which][:, None]
    values = rng.standard_normal(near.shape) + shared + strength * near
    coords: dict[str, Any] = {
        "recipe": ("run", ["a"] * rate.size),
        "learning_rate": ("run", rate),
        "seed": ("run", which),
        "step": t,
    }
    signal = xr.DataArray(values, dims=("run", "step"), coords=coords)
    return signal, xr.DataArray(onset, dims="run"), xr.DataArray(np.full(rate.size, steps - 1), dims="run")


@pytest.mark.parametrize(("strength", "of_seed"), [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0)])
@sizes(60, 1000)
def test_scores_of_alarms_are_covered(studies: int, strength: float, of_seed: float) -> None:
    """AUROC of a normal signal: Phi(strength / sqrt(2 (1 + of_seed^2))), seeds being different ones in every pair of a stratum.

    What a signal adds to learning rate and step is all of it. Of the average precision the truth is its mean over studies.
    """
    truth = stats.norm.cdf(strength / math.sqrt(2 * (1 + of_seed**2)))
    found, gains = [], []
    for study in range(studies):
        signal, onset, last = alarms(study, 24, strength, of_seed)
        found.append(warning_skill(alarm_rows(signal, onset, 3, last), draws=400))
        gains.append(incremental(signal, {}, onset, 3, last, draws=400))
    of = {name: np.array([float(skill[name]) for skill in found]) for name in found[0].data_vars}
    covered = {"auroc": truth, "average_precision": of["average_precision"].mean()}
    for name, value in covered.items():
        inside = (of[f"{name}_low"] <= value) & (value <= of[f"{name}_high"])
        # Of 24 seeds, resampled: 2 % below the level are let pass.
        assert inside.sum() >= at_least(0.93, studies), name
    if strength:
        assert sum(float(gain["gain_low"]) <= truth - 0.5 <= float(gain["gain_high"]) for gain in gains) >= at_least(
            0.93, studies
        )
    else:
        assert sum(float(gain["gain_low"]) > 0 for gain in gains) <= at_most(0.035, studies)
        assert of["average_precision"].mean() == pytest.approx(
            of["average_precision_chance"].mean(), abs=4 * of["average_precision"].std() / math.sqrt(studies)
        )


@pytest.mark.parametrize("rate", [0.1, 0.2])
@sizes(80, 1000)
def test_false_alarms_are_as_rare_as_stated(studies: int, rate: float) -> None:
    """The share of runs that did not diverge and rang, over all studies; runs of a study share seeds, studies do not."""
    shares = []
    for study in range(studies):
        signal, onset, last = alarms(study, 24, 1.0, 1.0)
        found = lead_time(signal, onset, rate, last)
        if found.attrs["healthy_judged"]:
            shares.append(found.attrs["false_alarm_rate"])
    assert len(shares) > 0.9 * studies
    assert np.mean(shares) <= rate + 4 * np.std(shares) / math.sqrt(len(shares))
    assert np.mean(shares) > rate / 3
