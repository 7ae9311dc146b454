"""Rank correlations between measures of sharpness, over seeds: against pandas', and on signals made to correlate so and so."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from scipy import stats

from exmy.findings.sharpness_measures import (
    FEWEST,
    agreement,
    along_steps,
    cells,
    mean_over,
    measures_of,
    rank_correlation,
)


def signal(values: np.ndarray, rates: np.ndarray, seeds: np.ndarray, steps: list[int]) -> xr.DataArray:
    along = {"recipe": ["a"] * len(seeds), "learning_rate": rates, "init_seed": seeds, "data_seed": seeds}
    return xr.DataArray(values, {**{k: ("run", v) for k, v in along.items()}, "step": steps}, ("run", "step"))


def two(correlation: float, seeds: int, steps: int = 3) -> tuple[xr.DataArray, xr.DataArray]:
    """Normal ones, at two rates of which one has all values a hundred higher, and steps that are each higher than the last."""
    random = np.random.default_rng(1)
    x, y = random.standard_normal((2, 2 * seeds, steps))
    y = correlation * x + math.sqrt(1 - correlation**2) * y
    rates, labels = np.repeat([0.1, 0.2], seeds), np.tile(np.arange(seeds), 2)
    lift = 100 * (rates == 0.2)[:, None] + 10 * np.arange(steps)
    return (signal(of + lift, rates, labels, list(range(steps))) for of in (x, y))  # type: ignore[return-value]


@pytest.mark.parametrize("correlation", [-0.9, 0.0, 0.5])
def test_it_is_within_rate_and_step_and_its_interval_holds_what_was_put_in(correlation: float) -> None:
    """Of normal ones Spearman's is 6 / pi asin(r / 2) (Pearson 1907); over all runs at once it would be near one."""
    one, other = two(correlation, 400)
    found = rank_correlation(one, other, np.ones(800, bool))
    assert found.low < 6 / math.pi * math.asin(correlation / 2) < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 * (1 - correlation**2) / math.sqrt(800 * 3), rel=0.35)
    assert stats.spearmanr(one.values.ravel(), other.values.ravel()).statistic > 0.8
    assert rank_correlation(other, one, np.ones(800, bool)).value == pytest.approx(found.value)


def test_it_is_the_mean_of_cells_of_the_runs_that_are_asked_for_at_steps_that_both_have() -> None:
    one, other = two(0.3, 20)
    other = other.isel(step=[0, 2])
    one[3, 0] = np.nan
    among = np.arange(40) % 7 != 0
    cells = []
    for rate in (0.1, 0.2):
        for step in (0, 2):
            rows = among & (one["learning_rate"].values == rate)
            a, b = (pd.Series(of.sel(step=step).values[rows]) for of in (one, other))
            cells.append(a.corr(b, method="spearman"))  # leaves out what is missing
    assert rank_correlation(one, other, among).value == pytest.approx(np.mean(cells))


def test_leaving_seeds_out_is_done_with_a_seeds_runs_at_both_rates() -> None:
    one, other = two(0.3, 12)

    def mean(kept: np.ndarray) -> float:
        return float(np.mean([
            stats.spearmanr(*(of.values[kept & (one["learning_rate"].values == rate), step] for of in (one, other))).statistic
            for rate in (0.1, 0.2) for step in range(3)
        ]))  # fmt: skip

    seeds = one["init_seed"].values
    left = np.array([mean(seeds != seed) for seed in range(12)])
    reach = stats.t.ppf(0.975, 11) * math.sqrt(11 / 12 * ((left - left.mean()) ** 2).sum())
    found = rank_correlation(one, other, np.ones(24, bool))
    assert [found.low, found.high] == pytest.approx([found.value - reach, found.value + reach])


def test_its_cells_say_where_they_are_so_that_two_that_cancel_are_seen() -> None:
    """One measure is the other at one rate, and the other turned round at the second: the mean of both says nothing of either."""
    one, _ = two(0.0, 20)
    other = one * xr.where(one["learning_rate"] == 0.1, 1, -1)
    found = cells(one, other, np.ones(40, bool))
    told = {(of.rate, of.step): float(of.found[0]) for of in found}
    assert told == pytest.approx({(rate, step): sign for rate, sign in ((0.1, 1.0), (0.2, -1.0)) for step in range(3)})
    assert mean_over(found).value == pytest.approx(0.0)
    assert mean_over([of for of in found if of.rate == 0.2]).value == pytest.approx(-1.0)
    assert math.isnan(mean_over([]).value)


def test_along_the_steps_of_a_run_it_is_of_that_run_alone_from_a_step_on() -> None:
    random = np.random.default_rng(3)
    steps = list(range(0, 300, 20))
    a, b = random.standard_normal((2, 6, 15))
    b[2] = np.nan
    one, other = (signal(of, np.full(6, 0.1), np.arange(6), steps) for of in (a, b))
    found = along_steps(one, other, np.arange(6) != 1, 100)
    expected = [stats.spearmanr(a[i, 5:], b[i, 5:]).statistic for i in (0, 2, 3, 4, 5)]
    assert found == pytest.approx(np.array(expected), nan_ok=True)
    assert np.isnan(found).tolist() == [False, True, False, False, False]
    assert np.isnan(along_steps(one, other, np.ones(6, bool), 200)).all()  # five steps tell nothing


def test_of_too_few_runs_there_is_none() -> None:
    for seeds, there in ((FEWEST, False), (FEWEST + 1, True)):
        one, other = two(0.5, seeds)
        found = rank_correlation(one, other, np.ones(2 * seeds, bool))
        assert [math.isfinite(end) for end in found] == [there] * 3


def test_a_signal_that_never_moves_correlates_with_nothing() -> None:
    one, other = two(0.5, 20)
    found = rank_correlation(one * 0, other, np.ones(40, bool))
    assert [math.isnan(end) for end in found] == [True] * 3


def test_of_a_measure_at_several_places_the_first_is_taken() -> None:
    names = ["train_loss", "logit_sharpness at epsilon 0.0005", "logit_sharpness at epsilon 0.001", "kurtosis",
             "logit_sharpness_centred at epsilon 0.0005", "gradient_curvature", "hessian_eigenvalue at rank 0",
             "hessian_eigenvalue at rank 1"]  # fmt: skip
    told = measures_of(dict.fromkeys(names, xr.DataArray(0.0)))
    assert told == [names[i] for i in (1, 4, 5, 6)]


def test_a_study_without_measures_has_nothing_said_of_it() -> None:
    run = {"run": [0, 1], **{name: ("run", [0, 1]) for name in ("learning_rate", "seed", "init_seed", "data_seed")}}
    along = {**run, "recipe": ("run", ["a", "a"]), "step": [0, 1]}
    history = xr.Dataset(
        {"train_loss": (("run", "step"), np.ones((2, 2))), "grad_norm": (("run", "step"), np.ones((2, 2))),
         "last_step": ("run", [1, 1])}, along,
    )  # fmt: skip
    summary = xr.Dataset({"onset": ("run", [np.nan, np.nan]), "diverged": ("run", [False, False])}, {
        name: of for name, of in along.items() if name != "step"})  # fmt: skip
    assert list(agreement(xr.DataTree.from_dict({"/history": history, "/summary": summary}), 0)) == []
