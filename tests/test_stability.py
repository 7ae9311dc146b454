"""Divergence and its statistics, against scipy, np.polyfit, hand-worked tables and curves whose spikes we put there."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from train.rates import stability_table, wilson_interval
from train.spikes import above_trend, carried_forward
from train.stability import (
    VARIABLES,
    DivergenceSettings,
    divergence,
    first_non_finite_step,
    gap_reference,
    smoothed_final_loss,
    spike_score,
    spikes,
)

NAN, INF = float("nan"), float("inf")
ENTROPY = 3.2


def history(
    loss: Any,
    grad_norm: npt.ArrayLike = 1.0,
    last_step: npt.ArrayLike | None = None,
    recipe: str | list[str] = "base",
    learning_rate: float | list[float] = 1e-3,
    dataset: str | list[str] = "python",
) -> xr.Dataset:
    values = np.atleast_2d(np.asarray(loss, np.float32))
    runs, steps = values.shape
    last = np.full(runs, steps - 1) if last_step is None else np.broadcast_to(np.asarray(last_step), runs)
    each = {"recipe": recipe, "learning_rate": learning_rate, "dataset": dataset, "seed": list(range(runs))}
    coords: dict[str, Any] = {k: ("run", v if isinstance(v, list) else [v] * runs) for k, v in each.items()}
    return xr.Dataset(
        {
            "train_loss": (("run", "step"), values),
            "grad_norm": (("run", "step"), np.broadcast_to(np.asarray(grad_norm, np.float32), values.shape)),
            "last_step": ("run", last),
        },
        coords=coords | {"step": np.arange(steps)},
    )


def noisy(runs: int, steps: int, level: float = 2.0, fall: float = 3.5, seed: int = 0) -> npt.NDArray[np.float64]:
    """Curves that fall from level + fall and settle at level, with noise of 0.05 nats."""
    noise = np.random.default_rng(seed).normal(0, 0.05, (runs, steps))
    return level + fall * np.exp(-np.arange(steps) / 100) + noise


def judge(h: xr.Dataset, baseline: str = "base", **numbers: Any) -> xr.Dataset:
    return divergence(h, ENTROPY, baseline, DivergenceSettings(**numbers))


# --- the interval


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.999])
def test_wilson_interval_is_scipys(confidence: float) -> None:
    cells = [(k, n) for n in (1, 2, 3, 8, 30, 1000) for k in {0, 1, n // 2, n - 1, n}]
    low, high = wilson_interval([k for k, _ in cells], [n for _, n in cells], confidence)
    expected = [binomtest(k, n).proportion_ci(confidence, method="wilson") for k, n in cells]
    # Both solve the same quadratic in float64; ten roundings of numbers up to 1.
    np.testing.assert_allclose(low, [e.low for e in expected], rtol=0, atol=1e-15)
    np.testing.assert_allclose(high, [e.high for e in expected], rtol=0, atol=1e-15)


def test_wilson_limits_solve_the_equation_they_come_from() -> None:
    # |k/n - p| = z sqrt(p (1 - p) / n) at both limits, z = 1.959964 the normal's 97.5 % quantile.
    for p in wilson_interval(3, 29):
        assert abs(3 / 29 - p) == pytest.approx(1.959963984540054 * np.sqrt(p * (1 - p) / 29), rel=1e-12)


def test_wilson_at_the_ends_and_without_trials() -> None:
    low, high = wilson_interval([0, 5, 0], [5, 5, 0])
    assert low[0] == 0.0
    assert high[1] == 1.0
    assert np.isnan([low[2], high[2]]).all()


@pytest.mark.parametrize(
    ("k", "n", "confidence"), [(4, 3, 0.95), (-1, 3, 0.95), (NAN, 3, 0.95), (1, 3, 1.0), (1, 3, 0)]
)
def test_wilson_refuses_what_is_no_count(k: float, n: int, confidence: float) -> None:
    with pytest.raises(ValueError, match="must be between 0 and"):
        wilson_interval(k, n, confidence)


# --- the smoothed loss


def test_the_final_loss_is_the_mean_of_the_last_steps_that_were_run() -> None:
    h = history(
        [[9, 9, 1, 2, 3, NAN], [1, 2, 3, 4, 5, 6], [1, 2, NAN, 4, 5, 6], [7.0, INF, 5, 5, 1, 2]], last_step=[4, 5, 5, 5]
    )
    final = smoothed_final_loss(h.train_loss, h.last_step, 3)
    np.testing.assert_array_equal(final, [2.0, 5.0, 5.0, 8 / 3])
    np.testing.assert_array_equal(smoothed_final_loss(h.train_loss, h.last_step, 5), [4.8, 4.0, NAN, NAN])
    np.testing.assert_array_equal(smoothed_final_loss(h.train_loss, h.last_step, 99), [4.8, 3.5, NAN, NAN])


def test_last_step_is_a_label_of_the_step_axis_not_a_position() -> None:
    h = history([[5, 4, 3, 2, 1]], last_step=30).assign_coords(step=[10, 20, 30, 40, 50])
    assert float(smoothed_final_loss(h.train_loss, h.last_step, 2).item()) == 3.5


@pytest.mark.parametrize("last", [NAN, -1])
def test_a_run_that_never_trained_is_refused(last: float) -> None:
    h = history([[1, 1]] * 2, last_step=[1, last])
    with pytest.raises(ValueError, match=r"last_step must be at least the first step.* for run 1; leave out"):
        judge(h)


# --- each definition


def test_non_finite_names_the_first_step_of_either_signal() -> None:
    loss, grad = np.ones((4, 6)), np.ones((4, 6))
    loss[0, 4] = NAN
    grad[0, 2] = INF
    loss[1, 3] = -INF
    loss[2, 5] = NAN  # padding: the run ended at 4
    h = history(loss, grad, [5, 5, 4, 5])
    np.testing.assert_array_equal(first_non_finite_step(h.train_loss, h.grad_norm, h.last_step), [2, 3, NAN, NAN])
    np.testing.assert_array_equal(judge(h, definition="non_finite").diverged, [True, True, False, False])


def test_a_skipped_steps_gradient_norm_is_no_sign_of_divergence_but_its_loss_is() -> None:
    loss, grad, skipped = np.ones((4, 6)), np.ones((4, 6)), np.zeros((4, 6))
    grad[:, 2] = [INF, NAN, INF, 1.0]
    skipped[:2, 2] = 1.0  # the third run's step was made, with its infinity
    skipped[3] = NAN  # of a pack that did not record it
    loss[1, 2] = NAN
    h = history(loss, grad).assign(skipped=(("run", "step"), skipped.astype(np.float32)))
    np.testing.assert_array_equal(judge(h, definition="non_finite").diverged, [False, True, True, False])


def test_no_progress_is_measured_from_the_unigram_entropy_not_from_the_start() -> None:
    level = np.array([ENTROPY, ENTROPY - 0.09, ENTROPY - 0.11, 1.4, 5.55, NAN])
    curves = np.concatenate([np.full((6, 30), 5.55), np.repeat(level[:, None], 30, axis=1)], axis=1)
    np.testing.assert_array_equal(judge(history(curves)).no_progress, [True, True, False, False, True, True])


def test_each_run_has_the_entropy_of_its_own_text() -> None:
    h = history(np.full((2, 30), 3.0), dataset=["python", "noise"])
    entropy = xr.DataArray([ENTROPY, 2.5], dims="run", coords={"dataset": ("run", ["python", "noise"])})
    np.testing.assert_array_equal(divergence(h, entropy, "base").no_progress, [False, True])
    with pytest.raises(ValueError, match="must be one number or lie over run"):
        divergence(h, entropy.rename(run="text"), "base")


def test_the_trend_is_polyfits_line_continued_by_one_step() -> None:
    loss = noisy(3, 260, seed=4)
    for step in (20, 21, 100, 259):
        for run in range(3):
            x, y = np.arange(20), loss[run, step - 20 : step]
            line = np.polyfit(x, y, 1)
            sd = np.std(y - np.polyval(line, x), ddof=2)
            score = (loss[run, step] - np.polyval(line, 20)) / sd
            # Either side of the score, the rule must decide differently; 1e-9 covers polyfit's own rounding.
            assert above_trend(loss, loss, score - 1e-9, 20)[run, step]
            assert not above_trend(loss, loss, score + 1e-9, 20)[run, step]


def above_by_rationals(before: npt.NDArray[np.float64], value: float, sigma: float) -> bool | None:
    """The rule in exact arithmetic, squared; None where what FP64 loses of so large losses might decide otherwise."""
    y, n = [Fraction(float(of)) for of in before], len(before)
    x = [Fraction(2 * i - n + 1, 2) for i in range(n)]
    mean: Fraction = sum(y, Fraction(0)) / n
    slope: Fraction = sum((a * b for a, b in zip(x, y, strict=True)), Fraction(0)) / sum(a * a for a in x)
    residuals = [b - mean - slope * a for a, b in zip(x, y, strict=True)]
    variance: Fraction = sum((of * of for of in residuals), Fraction(0)) / (n - 2)
    above = Fraction(float(value)) - mean - slope * Fraction(n + 1, 2)
    ulp = Fraction(float(np.finfo(np.float32).eps)) * mean
    asked = Fraction(sigma) * Fraction(sigma) * max(variance, ulp * ulp)
    lost = n * max(abs(of) for of in [*y, Fraction(float(value))]) / 10**13 + abs(above) / 10**6
    low, high = (of > 0 and of * of > asked for of in (above - lost, above + lost))
    return low if low == high else None


@given(
    seed=st.integers(0, 2**32 - 1), window=st.integers(3, 24), level=st.sampled_from([0.0, 1e-3, 4.0, 1e4]),
    noise=st.sampled_from([0.0, 1e-7, 0.05, 3.0]), fall=st.sampled_from([0.0, 8.0]), sigma=st.sampled_from([0.0, 1.0, 3.0, 6.0]),
    odd=st.lists(st.tuples(st.integers(0, 299), st.sampled_from([1e30, -1e30, 1e8, 40.0, NAN, INF, -INF])), max_size=4),
)  # fmt: skip
def test_every_step_is_decided_as_by_rationals(
    seed: int, window: int, level: float, noise: float, fall: float, sigma: float, odd: list[tuple[int, float]]
) -> None:
    """Curves that fall, noise of any size on any level, huge losses and none: over more than one stretch of running sums."""
    rng = np.random.default_rng(seed)
    loss = (level + fall * np.exp(-np.arange(300) / 40) + noise * rng.standard_normal((1, 300))).astype(np.float32)
    loss[0, rng.integers(0, 300, 3)] += np.float32(6 * noise)
    for at, value in odd:
        loss[0, at] = value
    values = loss.astype(np.float64)
    course = carried_forward(values)
    found = above_trend(course, values, sigma, window)
    assert not found[0, :window].any()
    for step in [*rng.integers(window, 300, 25).tolist(), *np.flatnonzero(found[0])[:10].tolist()]:
        before, value = course[0, step - window : step], values[0, step]
        if np.isfinite(before).all() and np.isfinite(value):
            expected = above_by_rationals(before, value, sigma)
            assert expected is None or found[0, step] == expected, step
        else:
            assert not found[0, step] or value == INF, step


def test_known_spikes_are_found_and_nothing_else() -> None:
    loss = noisy(4, 1000)
    loss[0, [400, 700]] += 1.0
    loss[1, 999] += 1.0  # the last step counts
    loss[2, 128] += 1.0  # the first step that has 128 before it counts
    loss[3, 600] -= 1.0  # a fall is no spike
    h = history(loss)
    found = spikes(h.train_loss, h.last_step)
    assert [list(np.flatnonzero(row)) for row in found.values] == [[400, 700], [999], [128], []]
    score = spike_score(found, h.train_loss, h.last_step)
    np.testing.assert_allclose(score, [2 / 872, 1 / 872, 1 / 872, 0], rtol=1e-15)
    result = judge(h, definition="spike")
    np.testing.assert_array_equal(result.diverged, [True, True, True, False])
    np.testing.assert_array_equal(result.diverged_step, [400, 999, 128, NAN])


def test_a_steep_fall_is_no_spike_and_does_not_hide_one() -> None:
    # 0.04 nats a step: without its trend removed, the window's own standard deviation would be 1.5 nats, and 6 of them
    # 9.
    loss = 20 - 0.04 * np.arange(400) + np.random.default_rng(1).normal(0, 0.02, (2, 400))
    loss[1, 300] += 0.5
    np.testing.assert_array_equal(judge(history(loss)).spike, [False, True])
    exponential = 1.5 + 4 * np.exp(-np.arange(400) / np.array([[3.0], [30.0], [300.0]]))
    assert not judge(history(exponential)).spike.any()


def test_rounding_noise_on_a_constant_loss_is_no_spike() -> None:
    loss = np.full((3, 300), 5.55, np.float32)
    loss[1, 200] = np.nextafter(loss[1, 200], np.float32(9))  # one ulp
    loss[2, 200] += 0.01  # 10,000 ulp
    np.testing.assert_array_equal(judge(history(loss)).spike, [False, False, True])


def test_a_nan_is_a_spike_and_does_not_blind_the_rule_after_it() -> None:
    loss = noisy(3, 600)
    loss[0, 300] = NAN
    loss[1, 300] = INF
    loss[1, 350] += 1.0
    loss[2, 5] = NAN  # before anything can be judged by its trend
    h = history(loss)
    found = spikes(h.train_loss, h.last_step)
    assert [list(np.flatnonzero(row)) for row in found.values] == [[300], [300, 350], [5]]
    np.testing.assert_allclose(spike_score(found, h.train_loss, h.last_step), [1 / 472, 2 / 472, 1 / 473], rtol=1e-15)


@pytest.mark.parametrize(("steps", "has_score"), [(1, False), (128, False), (129, True)])
def test_a_short_run_has_no_spike_score(steps: int, has_score: bool) -> None:
    loss = np.ones((2, 200))
    loss[1, 0] = NAN
    result = judge(history(loss, last_step=steps - 1))
    np.testing.assert_array_equal(result.spike, [False, True])
    assert result.spike_score.notnull().all() == has_score
    assert result.spike_score.isnull().all() != has_score


def test_recovered_compares_the_end_with_the_loss_before_the_first_spike() -> None:
    loss = np.repeat(noisy(1, 600, seed=2), 5, axis=0)
    loss[:4, 300] += 3.0
    loss[1, 300:] += 0.5  # settles too high
    loss[2, 300:] += 0.05  # higher, within the margin: noise over 20 steps is 0.05 / sqrt(20) = 0.011, the fall 0.17
    loss[3, -1] = NAN  # ends in nothing
    np.testing.assert_array_equal(judge(history(loss)).recovered, [True, False, True, False, False])
    # worked by hand: 4 before, ends at 4.1 or 4.125 (exact in binary, as is the margin)
    steps = np.concatenate(
        [np.full((2, 20), 4.0), np.full((2, 1), NAN), np.array([[4.125], [4.25]]).repeat(30, axis=1)], 1
    )
    np.testing.assert_array_equal(judge(history(steps), recovery_margin=0.125).recovered, [True, False])
    assert not judge(history([[NAN, 1.0, 1.0]])).recovered.any()  # nothing before the spike to return to


def test_the_gap_is_to_the_baselines_seed_median_at_its_best_rate() -> None:
    # base at 1e-3: 2, 2.2, NaN -> median 2.2; at 2e-3: 1, NaN, NaN -> infinite: its one good seed is not its median.
    final = [2.0, 2.2, NAN, 1.0, NAN, NAN, 2.39, 2.41, NAN]
    h = history(
        np.repeat(np.array(final)[:, None], 30, axis=1),
        recipe=["base"] * 6 + ["e4m3"] * 3,
        learning_rate=[1e-3] * 3 + [2e-3] * 3 + [1e-3] * 3,
    )
    result = judge(h, definition="gap")
    np.testing.assert_allclose(result.gap_reference, 2.2, rtol=1e-7)  # losses are kept in FP32
    np.testing.assert_array_equal(result.gap, [False, False, True, False, True, True, False, True, True])
    np.testing.assert_array_equal(result.diverged, result.gap)
    np.testing.assert_array_equal(result.diverged_step, [NAN, NAN, 0, NAN, 0, 0, NAN, 29, 0])


def test_the_gap_is_taken_within_each_dataset() -> None:
    final = xr.DataArray(
        [1.0, 3.0, 1.1, 3.3],
        dims="run",
        coords={
            "recipe": ("run", ["base", "base", "e4m3", "e4m3"]),
            "learning_rate": ("run", [1e-3] * 4),
            "dataset": ("run", ["easy", "hard", "easy", "hard"]),
        },
    )
    np.testing.assert_array_equal(gap_reference(final, "base"), [1.0, 3.0, 1.0, 3.0])
    np.testing.assert_array_equal(gap_reference(final, "base", within=()), [2.0, 2.0, 2.0, 2.0])


@pytest.mark.parametrize(("baseline", "level"), [("absent", 1.0), ("base", NAN)])
def test_without_a_baseline_only_nan_is_a_gap_and_the_study_that_reports_it_is_told(
    baseline: str, level: float
) -> None:
    h = history(np.array([[level] * 3, [1.0] * 3, [NAN] * 3]), recipe=["base", "e4m3", "e4m3"])
    with pytest.warns(UserWarning, match="no finite final loss of the baseline"):
        result = judge(h, baseline, definition="gap")
    np.testing.assert_array_equal(result.gap, [np.isnan(level), False, True])
    assert result.gap_reference.isnull().all()


# --- laws that hold wherever the NaN stand


@settings(max_examples=60)
@given(st.data())
def test_padding_is_never_taken_for_divergence(data: st.DataObject) -> None:
    steps = data.draw(st.integers(1, 40))
    end = data.draw(st.integers(1, steps))
    hole = data.draw(st.lists(st.integers(0, end - 1), max_size=3))
    bad = data.draw(st.sampled_from([NAN, INF, -INF]))
    loss = noisy(1, steps)
    loss[0, hole] = bad
    loss[0, end:] = data.draw(st.sampled_from([NAN, INF, 1e30, 0.0]))
    numbers: dict[str, Any] = {"spike_window": 8, "window": 5}
    padded = judge(history(loss, last_step=end - 1), **numbers)
    cut = judge(history(loss[:, :end]), **numbers)
    xr.testing.assert_identical(padded, cut)
    assert bool(padded.non_finite.item()) == bool(hole)
    assert not hole or bool(padded.spike.item())
    assert bool(padded.no_progress.item()) or not any(h >= end - 5 for h in hole)


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(2, 6))
def test_a_run_is_judged_as_if_it_were_alone(seed: int, runs: int) -> None:
    rng = np.random.default_rng(seed)
    loss = noisy(runs, 60, seed=seed)
    loss[rng.random(loss.shape) < 0.01] = NAN
    loss[rng.random(loss.shape) < 0.01] = 1e30  # must not leak into later windows' sums, or into neighbours
    loss[rng.random(loss.shape) < 0.01] += 2
    h = history(loss, last_step=rng.integers(0, 60, runs))
    own = ["non_finite", "no_progress", "spike", "spike_score", "recovered", "final_loss", "diverged", "diverged_step"]
    together = judge(h, spike_window=12)[own]
    alone = [judge(h.isel(run=[i]), spike_window=12)[own] for i in range(runs)]
    for i, single in enumerate(alone):
        xr.testing.assert_equal(together.isel(run=[i]).drop_attrs(), single.drop_attrs())


def test_blocks_of_steps_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = noisy(3, 300)
    whole = above_trend(loss, loss, 2.0, 16)
    assert whole.sum() > 10
    monkeypatch.setattr("train.spikes.BLOCK", 3 * 16 * 7)
    np.testing.assert_array_equal(above_trend(loss, loss, 2.0, 16), whole)


# --- whole results


def test_all_diverged_one_run_one_step() -> None:
    everything = judge(history(np.full((3, 200), NAN)))
    for name in ("non_finite", "no_progress", "spike", "gap", "diverged"):
        assert everything[name].all()
    np.testing.assert_array_equal(everything.diverged_step, [0, 0, 0])
    one = judge(history([[1.5]]))
    assert not one.diverged.item()
    assert one.final_loss.item() == 1.5
    assert np.isnan(one.spike_score.item())


@pytest.mark.parametrize("definition", ["non_finite", "no_progress", "spike", "gap"])
def test_the_settings_name_what_diverged_reports(definition: str) -> None:
    loss = noisy(5, 400)
    loss[1, 200] = NAN  # non_finite and spike
    loss[2] += 1.5  # no_progress and gap
    loss[3, 200] += 1.0  # spike alone
    loss[4] += 0.5  # gap alone
    h = history(loss, recipe=["base", "a", "b", "c", "d"])
    result = judge(h, definition=definition)
    assert {
        "non_finite": [False, True, False, False, False],
        "no_progress": [False, False, True, False, False],
        "spike": [False, True, False, True, False],
        "gap": [False, False, True, False, True],
    }[definition] == result.diverged.values.tolist()
    assert result.diverged.attrs["definition"] == definition
    assert (result.diverged_step.notnull() == result.diverged).all()


def test_every_variable_says_what_it_is_and_keeps_the_runs_coordinates() -> None:
    result = judge(history(noisy(2, 40), recipe=["base", "e4m3"]), sigma=7.5)
    assert set(result.data_vars) == set(VARIABLES)
    for name, variable in result.data_vars.items():
        assert variable.dims == ("run",)
        assert {"units", "long_name", "source"} <= set(variable.attrs), name
        assert "{" not in variable.attrs["source"]
    assert "7.5 standard deviations" in result.spike.attrs["source"]
    assert {"recipe", "learning_rate", "seed", "dataset"} == set(result.coords)
    assert result.diverged_step.dtype == np.float64


def test_the_result_survives_netcdf(tmp_path: Any) -> None:
    result = judge(history(noisy(2, 40)))
    result.to_netcdf(tmp_path / "summary.nc", engine="h5netcdf")
    xr.testing.assert_identical(xr.load_dataset(tmp_path / "summary.nc", engine="h5netcdf"), result)


@pytest.mark.parametrize(
    "wrong",
    [
        {"definition": "exploded"},
        {"window": 0},
        {"sigma": NAN},
        {"spike_window": 2},
        {"gap_margin": -0.1},
        {"gap_margin": INF},
    ],
)
def test_settings_refuse_what_means_nothing(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        DivergenceSettings(**wrong)
    assert dataclasses.is_dataclass(DivergenceSettings)


def test_the_table_by_hand() -> None:
    summary = xr.Dataset(
        {
            "diverged": ("run", [True, False, False, True, True, False], {"definition": "spike"}),
            "final_loss": ("run", [NAN, 1.0, 2.0, 5.0, NAN, 4.0]),
        },
        coords={
            "recipe": ("run", ["z", "z", "z", "a", "a", "z"]),
            "learning_rate": ("run", [2e-3, 2e-3, 2e-3, 1e-3, 2e-3, 1e-3]),
        },
    )
    table = stability_table(summary)
    assert table.recipe.values.tolist() == ["z", "a"]  # as they first appear
    assert table.learning_rate.values.tolist() == [1e-3, 2e-3]
    np.testing.assert_array_equal(table.n, [[1, 3], [1, 1]])
    np.testing.assert_array_equal(table.k, [[0, 1], [1, 1]])
    np.testing.assert_array_equal(table.rate, [[0, 1 / 3], [1, 1]])
    np.testing.assert_array_equal(table.final_loss_mean, [[4.0, 1.5], [5.0, NAN]])  # the diverged 5.0 counts, NaN can't
    np.testing.assert_array_equal(table.finite, [[1, 2], [1, 0]])
    exact = binomtest(1, 3).proportion_ci(method="exact")
    assert table.rate_lower.values[0, 1] == pytest.approx(exact.low, rel=1e-9)
    assert table.rate_upper.values[0, 1] == pytest.approx(exact.high, rel=1e-9)
    third = binomtest(1, 3).proportion_ci(method="wilson")
    assert table.wilson_lower.values[0, 1] == pytest.approx(third.low, abs=1e-15)
    assert table.wilson_upper.values[0, 1] == pytest.approx(third.high, abs=1e-15)
    assert table.attrs["definition"] == "spike"
    for variable in table.data_vars.values():
        assert {"units", "long_name"} <= set(variable.attrs)


def test_a_cell_without_runs_is_empty_not_stable() -> None:
    summary = xr.Dataset(
        {"diverged": ("run", [0.0, 1.0, NAN]), "final_loss": ("run", [1.0, 2.0, 3.0])},  # NaN: aligned, never judged
        coords={"recipe": ("run", ["a", "b", "b"]), "learning_rate": ("run", [1e-3, 2e-3, 1e-3])},
    )
    table = stability_table(summary)
    np.testing.assert_array_equal(table.n, [[1, 0], [0, 1]])
    for name in ("rate", "rate_lower", "rate_upper", "wilson_lower", "wilson_upper", "final_loss_mean"):
        np.testing.assert_array_equal(table[name].isnull(), [[False, True], [True, False]])
