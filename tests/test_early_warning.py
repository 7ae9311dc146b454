"""Alarms against scikit-learn stratum by stratum, counts by hand, and signals whose worth is known: nothing, all, the rate."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import xarray as xr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score

from train.alarms import alarm_rows, point_of_no_return
from train.early_warning import (
    average_precision,
    chance_precision,
    concordance,
    informative,
    pooled_auroc,
    warning_skill,
)
from train.lead_times import RIDGE, conformal_threshold, incremental, lead_time, logistic

NAN, INF = float("nan"), float("inf")
RATES, CHANCES = (1e-3, 2e-3, 4e-3, 8e-3), (0.01, 0.1, 0.55, 0.99)
STEPS, HORIZON, SEEDS = 60, 10, 24


def signals(seed: int = 0, seeds: int = SEEDS) -> tuple[dict[str, xr.DataArray], xr.DataArray, xr.DataArray]:
    """Runs at four rates, which fail the more the higher, from step 15 on; their signals, onsets and last steps."""
    rng = np.random.default_rng(seed)
    rate, which = np.repeat(RATES, seeds), np.tile(np.arange(seeds), len(RATES))
    n = rate.size
    onset = np.where(rng.random(n) < np.repeat(CHANCES, seeds), rng.integers(15, STEPS, n), np.nan)
    t = np.arange(STEPS)
    values = {
        "rate": np.repeat(rate[:, None], STEPS, axis=1),
        "constant": np.ones((n, STEPS)),
        "noise": rng.random((n, STEPS)),
        "perfect": ((t >= onset[:, None] - HORIZON) & (t < onset[:, None])).astype(float),
    }
    values["shuffled"] = values["perfect"][rng.permutation(n)]
    coords: dict[str, Any] = {
        "recipe": ("run", ["a"] * n),
        "learning_rate": ("run", rate),
        "seed": ("run", which),
        "step": t,
    }
    return (
        {name: xr.DataArray(of, dims=("run", "step"), coords=coords) for name, of in values.items()},
        xr.DataArray(onset, dims="run"), xr.DataArray(np.full(n, STEPS - 1), dims="run"),
    )  # fmt: skip


def one(
    signal: npt.ArrayLike, onset: list[float], rate: list[float] | None = None, seed: list[int] | None = None
) -> tuple[xr.DataArray, xr.DataArray]:
    values = np.asarray(signal, float)
    n = values.shape[0]
    coords: dict[str, Any] = {
        "recipe": ("run", ["a"] * n), "learning_rate": ("run", rate or [1e-3] * n), "seed": ("run", seed or list(range(n))),
        "step": np.arange(values.shape[1]),
    }  # fmt: skip
    return xr.DataArray(values, dims=("run", "step"), coords=coords), xr.DataArray(onset, dims="run")


# --- rows


def test_rows_by_hand() -> None:
    """Horizon 2 of steps 0..5. A run that fails at 4: 0, 1 live through it, 2, 3 do not. One that ends well at 5: 0..3 do."""
    signal, onset = one(np.arange(12).reshape(2, 6), [4.0, NAN])
    rows = alarm_rows(signal, onset, 2)
    assert list(zip(rows.run.tolist(), rows.step.tolist(), rows.positive.tolist(), strict=True)) == [
        (0, 0, False), (0, 1, False), (0, 2, True), (0, 3, True), (1, 0, False), (1, 1, False), (1, 2, False), (1, 3, False),
    ]  # fmt: skip
    assert rows.signal.tolist() == [0, 1, 2, 3, 6, 7, 8, 9]


def test_a_short_run_s_end_is_no_divergence_and_what_was_not_measured_is_no_row() -> None:
    signal, onset = one([[1, 2, 3, NAN, NAN, NAN], [1, NAN, 3, 4, 5, INF]], [NAN, 5.0])
    rows = alarm_rows(signal, onset, 2)
    assert [(r, s) for r, s in zip(rows.run.tolist(), rows.step.tolist(), strict=True)] == [
        (0, 0),
        (1, 0),
        (1, 2),
        (1, 3),
        (1, 4),
    ]
    assert rows.unmeasured == 1
    ends = alarm_rows(signal, onset, 2, xr.DataArray([5, 5], dims="run"))
    assert ends.unmeasured == 2  # run 0 went on to step 5: at step 3 it lived through its horizon, unmeasured


def test_runs_of_one_seed_are_numbered_alike_and_strata_part_recipes_rates_and_steps() -> None:
    signal, onset = one(np.ones((4, 4)), [NAN] * 4, [1e-3, 2e-3, 1e-3, 2e-3], [0, 0, 1, 1])
    rows = alarm_rows(signal, onset, 1)
    assert rows.seeds == 2
    assert len(set(rows.stratum.tolist())) == 2 * 3
    assert all(len(set(rows.seed[rows.stratum == s].tolist())) == 2 for s in set(rows.stratum.tolist()))


def test_rows_that_make_no_sense_are_refused() -> None:
    signal, onset = one(np.ones((2, 3)), [NAN, 1.0])
    with pytest.raises(ValueError, match="the horizon must be above 0"):
        alarm_rows(signal, onset, 0)
    with pytest.raises(ValueError, match="select one of, or take the largest over, the others"):
        alarm_rows(signal.expand_dims("block"), onset, 1)


def test_the_point_of_no_return_is_where_a_run_leaves_its_best_for_good() -> None:
    loss = np.full((5, 10), 2.0)
    loss[0, 3], loss[0, 7:] = 9.0, 5.0  # a spike that it comes back from, and one that it does not
    loss[1, 4:] = NAN
    loss[2] = 5.0  # learns nothing, and never leaves it
    loss[3, 6:] = 9.0  # its last step is 5: padding is not looked at
    coords = {"run": list("abcde"), "step": np.arange(10, 110, 10)}
    data = xr.DataArray(loss, dims=("run", "step"), coords=coords)
    last = xr.DataArray([100, 100, 100, 60, 100], dims="run")
    onset = point_of_no_return(data, xr.DataArray([True, True, True, True, False], dims="run"), last)
    np.testing.assert_array_equal(onset, [80, 50, 100, 60, NAN])


# --- scores


@pytest.mark.parametrize("seed", range(4))
def test_scores_are_scikit_learns_within_each_stratum(seed: int) -> None:
    """With ties, infinities aside, and strata of one kind left out."""
    values, onset, last = signals(seed)
    rng = np.random.default_rng(seed)
    signal = values["perfect"] + rng.integers(0, 4, values["perfect"].shape)
    rows = alarm_rows(signal, onset, HORIZON, last)
    pairs = wins = precision = positives = 0.0
    for stratum in set(rows.stratum.tolist()):
        y, x = rows.positive[rows.stratum == stratum], rows.signal[rows.stratum == stratum]
        if 0 < y.sum() < y.size:
            pairs += y.sum() * (~y).sum()
            wins += y.sum() * (~y).sum() * roc_auc_score(y, x)
            precision += y.sum() * average_precision_score(y, x)
            positives += y.sum()
    assert float(concordance(rows).auroc()) == pytest.approx(wins / pairs, rel=1e-12)
    assert float(average_precision(rows)) == pytest.approx(precision / positives, rel=1e-12)
    assert pooled_auroc(rows) == pytest.approx(roc_auc_score(rows.positive, rows.signal), rel=1e-12)
    assert concordance(rows).pairs.sum() == pairs


def test_a_signal_that_knows_the_rate_alone_scores_a_half_where_pooled_it_would_seem_to_warn() -> None:
    values, onset, last = signals(seeds=100)
    found = warning_skill(alarm_rows(values["rate"], onset, HORIZON, last))
    assert float(found["auroc"]) == 0.5
    assert (float(found["auroc_low"]), float(found["auroc_high"])) == (0.5, 0.5)
    assert float(found["pooled_auroc"]) > 0.65
    # Whole runs, as papers pool them: of one that diverged and one that did not, the first has the higher rate in 0.94 of pairs.
    fails = np.isfinite(onset.values)
    p = np.array(CHANCES)
    expected = (
        sum(p[i] * (1 - p[j]) * (1.0 if i > j else 0.5 * (i == j)) for i in range(4) for j in range(4))
        / p.sum()
        / (1 - p).sum()
    )
    assert expected == pytest.approx(0.94, abs=0.005)
    assert roc_auc_score(fails, values["rate"][:, 0].values) == pytest.approx(expected, abs=0.03)
    ring = lead_time(values["rate"], onset, 0.1, last)
    assert (ring.attrs["detected"], ring.attrs["false_alarm_rate"]) == (0.0, 0.0)


def test_a_constant_and_a_shuffled_signal_score_a_half_and_a_perfect_one_everything() -> None:
    values, onset, last = signals(seeds=60)
    constant, noise, shuffled, perfect = (
        warning_skill(alarm_rows(values[name], onset, HORIZON, last))
        for name in ("constant", "noise", "shuffled", "perfect")
    )
    assert float(constant["auroc"]) == 0.5
    for nothing in (noise, shuffled):
        assert float(nothing["auroc"]) == pytest.approx(0.5, abs=0.06)
        assert float(nothing["auroc_low"]) < 0.5 < float(nothing["auroc_high"])
    assert float(noise["average_precision"]) == pytest.approx(float(noise["average_precision_chance"]), abs=0.05)
    assert float(perfect["auroc"]) == float(perfect["average_precision"]) == 1.0


def test_the_precision_that_chance_gives_is_that_of_every_order() -> None:
    """All 720 orders of two positives among six rows of a stratum."""
    import itertools

    signal, onset = one(np.zeros((6, 3)), [2.0, 2.0, NAN, NAN, NAN, NAN])
    rows = alarm_rows(signal, onset, 1, xr.DataArray([2] * 6, dims="run"))
    (of,) = informative(rows)
    every = [average_precision_score(rows.positive[of], order) for order in itertools.permutations(range(6))]
    assert chance_precision(rows) == pytest.approx(np.mean(every), rel=1e-12)


def test_infinite_is_the_loudest_alarm() -> None:
    signal, onset = one([[INF, 0, 0], [5.0, 0, 0], [-INF, 0, 0]], [1.0, NAN, NAN])
    rows = alarm_rows(signal, onset, 1, xr.DataArray([2] * 3, dims="run"))
    assert float(concordance(rows).auroc()) == 1.0


def test_resampled_seeds_are_the_same_as_runs_written_out() -> None:
    """Seed weights (2, 0, 1) against a data set in which seed 0 is there twice and seed 1 is not."""
    rng = np.random.default_rng(0)
    signal, onset = one(rng.normal(size=(6, 8)), [5.0, NAN, NAN, NAN, 4.0, 6.0], [1e-3] * 3 + [2e-3] * 3, [0, 1, 2] * 2)
    rows = alarm_rows(signal, onset, 3)
    order = [0, 0, 2, 3, 3, 5]
    again = signal.isel(run=order).assign_coords(seed=("run", [0, 7, 2, 0, 7, 2]))
    copied = alarm_rows(again, onset.isel(run=order), 3)
    weights = [2.0, 0.0, 1.0]
    assert float(concordance(rows).auroc(weights)) == pytest.approx(float(concordance(copied).auroc()))
    assert float(average_precision(rows, weights)) == pytest.approx(float(average_precision(copied)))


@pytest.mark.parametrize(("onset", "seed"), [([NAN] * 4, None), ([2.0] * 4, None), ([2.0, NAN, NAN, NAN], [0] * 4)])
def test_without_both_kinds_there_is_no_score_and_one_seed_has_no_interval(
    onset: list[float], seed: list[int] | None
) -> None:
    signal, when = one(np.random.default_rng(0).normal(size=(4, 5)), onset, seed=seed)
    found = warning_skill(alarm_rows(signal, when, 2))
    assert math.isnan(float(found["auroc"])) == (len(set(map(math.isnan, onset))) == 1)
    assert math.isnan(float(found["auroc_low"]))
    assert int(found["runs"]) == 4


def test_a_signal_that_was_never_measured_has_no_rows() -> None:
    signal, onset = one(np.full((4, 5), NAN), [2.0, NAN, NAN, 3.0])
    found = warning_skill(alarm_rows(signal, onset, 2, xr.DataArray([4] * 4, dims="run")))
    assert (int(found["pairs"]), int(found["runs"])) == (0, 0)
    assert int(found["unmeasured"]) > 0
    assert math.isnan(float(found["auroc"]))
    assert lead_time(signal, onset).attrs["not_judged"] == 4
    assert math.isnan(float(incremental(signal, {}, onset, 2)["gain"]))


# --- lead time


def test_a_perfect_signal_has_the_lead_that_it_was_given() -> None:
    values, onset, last = signals()
    found = lead_time(values["perfect"], onset, 0.1, last, within=())
    assert found.attrs["detected"] == 1.0
    assert found.attrs["false_alarm_rate"] == 0.0
    fails = found["diverged"].values
    np.testing.assert_array_equal(found["lead"].values[fails], HORIZON)
    assert np.isnan(found["lead"].values[~fails]).all()


def test_what_rings_at_or_after_the_onset_is_no_warning() -> None:
    values = np.zeros((24, 10))
    values[0, 5:] = 9.0
    signal, onset = one(values, [5.0, *[NAN] * 23])
    found = lead_time(signal, onset, 0.1)
    assert bool(found["judged"][0])
    assert math.isnan(float(found["alarm_step"][0]))
    assert found.attrs["detected"] == 0.0


@pytest.mark.parametrize(
    ("runs", "rate", "place"), [(9, 0.1, 9), (19, 0.1, 18), (99, 0.05, 95), (4, 0.2, 4), (8, 0.1, None), (0, 0.5, None)]
)
def test_a_threshold_is_the_rank_that_exchangeable_runs_exceed_so_often(
    runs: int, rate: float, place: int | None
) -> None:
    """Of m + 1 exchangeable runs, the last exceeds the k-th of m with a chance of (m + 1 - k) / (m + 1)."""
    threshold = conformal_threshold(np.random.default_rng(0).permutation(runs) + 1.0, rate)
    assert threshold == (INF if place is None else place)
    if place is not None:
        assert (runs + 1 - place) / (runs + 1) <= rate < (runs + 2 - place) / (runs + 1)


def test_a_run_s_own_seed_does_not_set_its_threshold() -> None:
    values = np.zeros((20, 4))
    values[:2] = 100.0  # seed 0, twice: its own runs would hide each other
    signal, onset = one(values, [NAN] * 20, seed=[0, 0, *range(1, 19)])
    found = lead_time(signal, onset, 0.1, folds=19)
    assert found["threshold"].values[0] == 0.0
    assert (found["alarm_step"].values[:2] == 0).all()


def test_too_few_healthy_runs_judge_nothing_and_say_so() -> None:
    signal, onset = one(np.ones((6, 5)), [2.0, NAN, NAN, NAN, NAN, NAN])
    found = lead_time(signal, onset, 0.1)
    assert found.attrs["not_judged"] == 6
    assert math.isnan(found.attrs["detected"])
    with pytest.raises(ValueError, match="false_alarms must be a rate per run"):
        lead_time(signal, onset, 1.0)
    with pytest.raises(ValueError, match="folds must be at least 2"):
        lead_time(signal, onset, folds=1)


# --- what a signal adds


def test_the_regression_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 3))
    y = rng.random(300) < 1 / (1 + np.exp(-(x @ [1.0, -2.0, 0.0] + 0.5)))
    theirs = LogisticRegression(C=1 / (RIDGE * 300), tol=1e-10, max_iter=10_000).fit(x, y)
    np.testing.assert_allclose(logistic(x, y), [*theirs.intercept_, *theirs.coef_[0]], atol=1e-4)


def test_a_signal_adds_what_is_not_known_without_it() -> None:
    values, onset, last = signals()
    rng = np.random.default_rng(1)
    hint = values["perfect"] + rng.normal(0, 0.7, values["perfect"].shape)
    again = 2 * hint + 1
    nothing, more, all_of_it = (
        incremental(signal, {"loss": hint}, onset, HORIZON, last)
        for signal in (again, values["noise"], values["perfect"])
    )
    assert float(nothing["gain"]) == pytest.approx(0.0, abs=0.01)
    assert float(more["gain_low"]) <= 0.0 <= float(more["gain_high"]) + 0.01
    assert float(all_of_it["gain_low"]) > 0.05
    assert float(all_of_it["with_signal_auroc"]) > 0.98
    assert nothing.attrs["known"] == "learning_rate, step, loss"


def test_what_is_higher_in_recipes_that_fail_and_lower_in_runs_that_do_adds_only_where_each_is_centred() -> None:
    """Half of the runs are of another recipe, which hardly fails and has a signal 5 lower; of either, runs that fail "
    "have it 1 lower."""
    values, onset, last = signals(seeds=48)
    other = (values["noise"]["seed"].values % 2).astype(bool)
    onset = onset.where(~other | (values["noise"]["seed"].values % 8 == 1))
    near = (values["noise"]["step"] >= onset - HORIZON) & (values["noise"]["step"] < onset)
    signal = -near.transpose("run", "step").astype(float) - 5.0 * other[:, None] + 0.1 * values["noise"]
    signal = signal.transpose("run", "step").assign_coords(recipe=("run", np.where(other, "b", "a")))
    plain, centred = (incremental(signal, {}, onset, HORIZON, last, centred=of) for of in (False, True))
    assert float(plain["gain"]) < 0
    assert float(centred["gain_low"]) > 0.4
    assert float(centred["with_signal_auroc"]) > 0.98
    assert float(centred["baseline_auroc"]) == 0.5


def test_learning_rate_and_step_alone_say_nothing_within_a_stratum() -> None:
    values, onset, last = signals()
    found = incremental(values["rate"], {}, onset, HORIZON, last)
    assert float(found["baseline_auroc"]) == 0.5
    assert float(found["gain"]) == 0.0


def test_what_is_known_is_taken_at_the_signals_steps() -> None:
    values, onset, last = signals()
    rare = values["noise"].isel(step=slice(0, None, 5)).rename(step="probe_step")
    found = incremental(rare, {"loss": values["perfect"]}, onset, HORIZON, last)
    direct = incremental(
        rare, {"loss": values["perfect"].isel(step=slice(0, None, 5)).rename(step="probe_step")}, onset, HORIZON, last
    )
    assert float(found["baseline_auroc"]) == float(direct["baseline_auroc"]) > 0.98
    lacking = incremental(rare, {"loss": values["perfect"].isel(step=slice(0, 30))}, onset, HORIZON, last)
    assert int(lacking["rows"]) < int(found["rows"])


def test_what_is_known_of_runs_is_taken_by_their_labels() -> None:
    """Shuffled onsets and last steps of labelled runs are the same runs'; and a signal may lie over (step, run)."""
    values, onset, last = signals()
    names = [f"r{i}" for i in range(onset.size)]
    signal = values["noise"].assign_coords(run=names)
    order = np.random.default_rng(0).permutation(onset.size)
    onset, last = (of.assign_coords(run=names) for of in (onset, last - np.arange(onset.size) % 7))
    mixed, mixed_last = onset.isel(run=order), last.isel(run=order)
    there, shuffled = (
        warning_skill(alarm_rows(signal, *of)) for of in ((onset, HORIZON, last), (mixed, HORIZON, mixed_last))
    )
    xr.testing.assert_identical(there, shuffled)
    xr.testing.assert_identical(lead_time(signal, onset, 0.1, last), lead_time(signal, mixed, 0.1, mixed_last))
    known = {"loss": values["perfect"].assign_coords(run=names)}
    direct = incremental(signal, known, onset, HORIZON, last)
    turned = incremental(signal.T, {"loss": known["loss"].isel(run=order)}, mixed, HORIZON, mixed_last)
    xr.testing.assert_identical(direct, turned)
    with pytest.raises(ValueError, match="onset says nothing of run 'r1'"):
        alarm_rows(signal, onset.isel(run=[0]), HORIZON)
    with pytest.raises(ValueError, match="onset is of 3 runs, the signal of 96: label both"):
        lead_time(values["noise"], onset.drop_vars("run").isel(run=slice(3)))
    for of in (lead_time, lambda sheet, when: incremental(sheet, {}, when, HORIZON)):
        with pytest.raises(ValueError, match="a signal lies over run and steps"):
            of(signal.expand_dims(block=2), onset)


def test_what_no_model_could_be_fitted_for_is_not_said_to_add_nothing() -> None:
    """One run diverges: the other fold knows of none, so that a perfect signal's gain is unknown, and not 0."""
    values, _, last = signals()
    one_fails = xr.DataArray(np.where(np.arange(values["noise"].sizes["run"]) == 3, 30.0, NAN), dims="run")
    found = incremental(values["perfect"], {}, one_fails, HORIZON, last)
    assert np.isnan([float(found[name]) for name in ("gain", "gain_low", "gain_high", "baseline_auroc")]).all()
    assert (
        0 < int(found["rows_judged"]) < int(found["rows"])
    )  # those of the seeds that it was not fitted to, none of which fails


def test_a_first_ring_before_the_horizon_is_early_and_not_in_time() -> None:
    runs, steps = 40, 100
    fails = np.arange(runs) < 10
    values = np.zeros((runs, steps))
    values[:4, 70] = 1.0  # 20 steps before the onset
    values[4:6, 10] = 1.0  # 80 steps before it, and once more in time: who acts has acted
    values[4:6, 80] = 1.0
    signal = xr.DataArray(
        values, dims=("run", "step"), coords={"step": np.arange(steps), "seed": ("run", np.arange(runs))}
    )
    onset = xr.DataArray(np.where(fails, 90.0, np.nan), dims="run")
    within = lead_time(signal, onset, 0.1, horizon=20).attrs
    assert (within["detected"], within["early"], within["median_lead"]) == (0.4, 0.2, 20.0)
    without = lead_time(signal, onset, 0.1).attrs
    assert (without["detected"], without["early"], without["median_lead"]) == (pytest.approx(0.6), 0.0, 20.0)
    with pytest.raises(ValueError, match="horizon must be above 0 steps, got 0"):
        lead_time(signal, onset, 0.1, horizon=0)
