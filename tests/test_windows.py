"""Windows, optima, penalties and LR sensitivity of a learning-rate grid, against tables worked by hand and SciPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from tests.synthetic_studies import INITIAL, Truth, make_runs
from train.contrasts import bound
from train.optimum import best_rates, loss_penalty, optimum, optimum_shift, spread
from train.resample import LEAST_SEEDS, expanded_interval, seed_draws
from train.seed_cube import common_rates, in_order, seed_grid, trained_loss
from train.sensitivity import lr_sensitivity
from train.window import Window, stable_window, window_difference

NAN, INF = float("nan"), float("inf")
RATES = [1e-3, 2e-3, 4e-3, 8e-3]


def runs(
    losses: dict[str, Any], diverged: dict[str, Any] | None = None, initial: float = 5.0, rates: list[float] = RATES
) -> xr.Dataset:
    """Runs of losses[recipe] [rate][seed]; None: no run. diverged: the same shape, else where the loss is not finite."""
    rows = []
    for recipe, table in losses.items():
        for i, of_rate in enumerate(table):
            for seed, loss in enumerate(of_rate):
                if loss is not None:
                    bad = not math.isfinite(loss) if diverged is None else diverged[recipe][i][seed]
                    rows.append((recipe, rates[i], seed, bool(bad), loss))
    recipe_, rate, seed_, bad_, loss_ = (list(column) for column in zip(*rows, strict=True))
    return xr.Dataset(
        {"diverged": ("run", bad_), "final_loss": ("run", loss_), "initial_loss": ("run", [initial] * len(rows))},
        {"recipe": ("run", recipe_), "learning_rate": ("run", rate), "seed": ("run", seed_)},
    )


def grid(*args: Any, **kwargs: Any) -> xr.Dataset:
    return seed_grid(runs(*args, **kwargs))


# --- the cube


def test_runs_stand_where_their_recipe_rate_and_seed_are() -> None:
    cube = grid({"b": [[2.0, 2.2], [NAN, 1.9]], "a": [[3.0], [9.0]]})
    assert cube["recipe"].values.tolist() == ["b", "a"]
    np.testing.assert_array_equal(cube["final_loss"].sel(recipe="b"), [[2.0, 2.2], [NAN, 1.9]])
    np.testing.assert_array_equal(cube["clipped_loss"].sel(recipe="b"), [[2.0, 2.2], [5.0, 1.9]])
    np.testing.assert_array_equal(cube["clipped_loss"].sel(recipe="a"), [[3.0, NAN], [5.0, NAN]])
    np.testing.assert_array_equal(cube["diverged"].sel(recipe="b"), [[0, 0], [1, 0]])
    np.testing.assert_array_equal(trained_loss(cube).sel(recipe="b"), [[2.0, 2.2], [NAN, 1.9]])


def test_a_seed_is_both_seeds_where_they_differ() -> None:
    data = runs({"a": [[2.0, 2.1, 2.2]]})
    both = data.assign_coords(init_seed=("run", [0, 0, 1]), data_seed=("run", [0, 1, 0])).drop_vars("seed")
    assert seed_grid(both)["seed"].values.tolist() == ["0/0", "0/1", "1/0"]


@pytest.mark.parametrize(
    ("weights", "batches"),
    [
        (range(12), range(1, 13)),  # "10/11" is above "2/3", though not by its letters
        (range(100, 112), range(12)),
        ([i for i in range(4) for _ in range(4)], [d for _ in range(4) for d in range(4)]),
    ],
)
def test_more_seeds_of_either_kind_leave_the_first_ones_where_they_are(weights: Any, batches: Any) -> None:
    """A look is at the first so many seeds: who adds some must not change which those were."""
    pairs = sorted(zip(weights, batches, strict=True), key=lambda pair: (max(pair), pair))
    both = [f"{i}/{d}" for i, d in pairs]
    top = max(max(weights), max(batches)) + 1
    more = [f"{i}/{d}" for i in {*weights, top, top + 1} for d in {*batches, top, top + 1}]
    square = len(set(weights)) * len(set(batches)) == len(both)
    grown = in_order([*reversed(both), *(more if square else (f"{top}/{top + 1}", f"{top + 1}/{top + 2}"))])
    assert grown[: len(both)] == in_order(both)
    assert len(set(grown)) == len(grown)
    data = runs({"a": [[2.0 + 0.01 * i for i in range(len(both))]]}).drop_vars("seed")
    pair = {"init_seed": ("run", [i for i, _ in pairs]), "data_seed": ("run", [d for _, d in pairs])}
    if list(weights) != list(batches):
        assert seed_grid(data.assign_coords(pair))["seed"].values.tolist() == in_order(both)


def test_two_runs_in_one_place_are_refused_by_the_axis_in_which_they_differ() -> None:
    data = runs({"a": [[2.0]]})
    two = xr.concat([data.assign_coords(dataset=("run", [name])) for name in ("python", "maths")], "run")
    with pytest.raises(
        ValueError, match=r"two runs of a at learning rate 0\.001 with seed 0: select one of dataset first"
    ):
        seed_grid(two)
    with pytest.raises(ValueError, match="nothing can be said of no runs"):
        seed_grid(data.isel(run=[]))


def test_a_run_that_failed_in_its_first_step_starts_where_the_others_do() -> None:
    data = runs({"a": [[NAN, 2.0]]})
    data["initial_loss"] = ("run", [NAN, 5.5])
    np.testing.assert_array_equal(seed_grid(data)["clipped_loss"], [[[5.5, 2.0]]])


# --- bounds


def test_a_bound_is_the_end_of_scipys_interval() -> None:
    values = np.random.default_rng(0).normal(0, 1, (3, 7))
    for side, end in ((-1, "low"), (1, "high")):
        theirs = [getattr(stats.ttest_1samp(row, 0).confidence_interval(0.9), end) for row in values]
        np.testing.assert_allclose(bound(values, 0.05, side), theirs, rtol=1e-12)
    np.testing.assert_array_equal(bound([[1.0, NAN], [NAN, NAN]], 0.05, 1), [INF, INF])
    np.testing.assert_allclose(bound([[0.1, 0.1, 0.1]], 0.05, -1), [0.1], rtol=1e-15)


def test_draws_are_of_as_many_seeds_and_few_seeds_have_no_interval() -> None:
    draws = seed_draws(7, 500)
    assert (draws.sum(axis=1) == 7).all()
    np.testing.assert_array_equal(draws, seed_draws(7, 500))
    low, high = expanded_interval(draws, LEAST_SEEDS - 1)
    assert np.isnan(low).all()
    assert np.isnan(high).all()
    # Of normal draws: Student's 2.776 (4 degrees, printed tables) takes the place of 1.960, and the spread is that of n - 1.
    normal = stats.norm.ppf((np.arange(200_000) + 0.5) / 200_000)
    assert [float(end) for end in expanded_interval(normal, 5)] == pytest.approx(
        [-2.776 * math.sqrt(5 / 4), 2.776 * math.sqrt(5 / 4)], abs=2e-3
    )
    # Student's interval, by the bootstrap of a normal mean, to the draws' own noise.
    values = np.random.default_rng(1).normal(0, 1, 20)
    theirs = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    ours = expanded_interval(seed_draws(20, 20_000) @ values / 20, 20)
    assert [float(end) for end in ours] == pytest.approx([theirs.low, theirs.high], abs=0.06)


# --- LR sensitivity


def test_sensitivity_by_hand() -> None:
    """Seeds are averaged before the minimum, and a loss that is not finite, or above the start, is the start's."""
    found = lr_sensitivity(grid({"a": [[2.0, 3.0], [3.0, 2.0], [NAN, 9.0], [4.0, 4.0]]}))
    means = [2.5, 2.5, 5.0, 4.0]
    assert float(found["sensitivity"][0]) == pytest.approx(np.mean(means) - 2.5)
    assert np.isnan(found["sensitivity_low"])
    assert int(found["seeds"][0]) == 2


@pytest.mark.parametrize("method", ["contrasts", "bootstrap"])
def test_sensitivity_is_over_the_rates_that_all_recipes_have(method: Any) -> None:
    seeds = np.random.default_rng(0).normal(0, 0.01, 8)
    a = [(level + seeds).tolist() for level in (2.0, 2.2, 2.6)]
    b = [(level + seeds).tolist() for level in (2.0, 2.4)]
    found = lr_sensitivity(grid({"a": a, "b": b}), "a", method=method)
    assert found["rate"].values.tolist() == [1e-3, 2e-3]
    assert found.attrs["rates_left_out"] == "0.004"
    np.testing.assert_allclose(found["sensitivity"], [0.1, 0.2], rtol=1e-9)
    np.testing.assert_allclose(found["difference"], [0, 0.1], atol=1e-12)
    # Seeds that shift all rates alike leave no doubt about the sensitivity.
    np.testing.assert_allclose([found["sensitivity_low"], found["sensitivity_high"]], [[0.1, 0.2]] * 2, rtol=1e-6)
    np.testing.assert_allclose([found["difference_low"][1], found["difference_high"][1]], [0.1, 0.1], rtol=1e-6)


def test_sensitivity_of_one_contrast_has_students_bounds() -> None:
    """Two rates: the sensitivity is half the difference where that is far from 0; lower bound shared by the two rates."""
    rng = np.random.default_rng(2)
    first, second = rng.normal(2.0, 0.1, 9), rng.normal(3.0, 0.1, 9)
    found = lr_sensitivity(grid({"a": [first.tolist(), second.tolist()]}))
    half = (second - first) / 2
    low = stats.ttest_1samp(half, 0).confidence_interval(1 - 2 * 0.025 / 2).low
    high = stats.ttest_1samp(half, 0).confidence_interval(1 - 2 * 0.025).high
    assert float(found["sensitivity"][0]) == pytest.approx(half.mean())
    assert [float(found["sensitivity_low"][0]), float(found["sensitivity_high"][0])] == pytest.approx([low, high])


def test_what_sensitivity_can_t_be_said_of() -> None:
    alone = grid({"a": [[2.0] * 6]})
    assert float(lr_sensitivity(alone)["sensitivity"][0]) == 0.0  # one rate
    with pytest.raises(ValueError, match="give initial_loss"):
        lr_sensitivity(alone.drop_vars("clipped_loss"))
    with pytest.raises(ValueError, match="no learning rate at which every recipe has a run"):
        lr_sensitivity(grid({"a": [[2.0], []], "b": [[], [2.0]]}))
    with pytest.raises(ValueError, match="'c' is none of the recipes a"):
        lr_sensitivity(alone, "c")
    failed = lr_sensitivity(grid({"a": [[NAN] * 6, [NAN] * 6]}))
    assert (float(failed["sensitivity"][0]), float(failed["sensitivity_high"][0])) == (0.0, 0.0)


# --- the optimum


def test_the_optimum_is_the_lowest_mean_of_runs_that_trained_where_half_did() -> None:
    losses = {"a": [[2.0, 2.0, 2.0], [1.9, 1.9, NAN], [1.0, NAN, NAN]]}
    assert optimum(grid(losses), "a") == 2e-3  # at 4e-3 two of three failed
    assert math.isnan(optimum(grid({"a": [[NAN, NAN, NAN]]}), "a"))
    finite = grid({"a": [[2.0, 2.0], [1.0, 1.0]]}, {"a": [[0, 0], [1, 1]]})  # diverged with a finite loss
    assert optimum(finite, "a") == 1e-3


def test_rates_that_may_be_best_are_those_not_shown_to_be_worse() -> None:
    rng = np.random.default_rng(5)
    seeds = rng.normal(0, 0.1, 10)
    table = [(level + seeds + rng.normal(0, 0.01, 10)).tolist() for level in (2.0, 1.5, 1.501, 2.5)]
    cube = grid({"a": table, "b": [[1.4] * 10, *[[2.0] * 10] * 3]})
    np.testing.assert_array_equal(best_rates(cube, "a"), [2e-3, 4e-3])
    shift = optimum_shift(cube, "a", "b")
    assert (shift["low"], shift["high"], shift["censored"]) == (1.0, 2.0, True)  # b's optimum is at the grid's end
    assert shift["shift"] in (1.0, 2.0)
    assert math.isnan(optimum_shift(grid({"a": [[NAN]], "b": [[1.0]]}), "a", "b")["shift"])


def test_a_penalty_is_students_where_each_recipe_has_one_rate() -> None:
    found = loss_penalty(grid({"a": [[2.0, 2.1, 2.2, NAN]], "b": [[1.5, 1.7, 1.6, 1.5]]}), "a", "b")
    theirs = stats.ttest_1samp([0.5, 0.4, 0.6], 0).confidence_interval(0.95)
    assert found[:3] == pytest.approx((0.5, theirs.low, theirs.high))
    assert found[3] == 3  # a's fourth seed failed


def test_a_penalty_is_between_optima_and_its_limits_know_that_others_may_be() -> None:
    a, b = [[3.0, 3.1, 3.2], [2.0, 2.1, 2.2]], [[1.5, 1.7, 1.6], [4.0, 4.0, 4.0]]
    found = loss_penalty(grid({"a": a, "b": b}), "a", "b")
    # Of the best two; the others lie 1 and more beyond, and have a share in the error of either side.
    theirs = stats.ttest_1samp([0.5, 0.4, 0.6], 0).confidence_interval(1 - 2 * 0.025 / 2)
    assert found[:3] == pytest.approx((0.5, theirs.low, theirs.high))
    same = grid({"a": a, "b": a})
    low, high = loss_penalty(same, "a", "b")[1:3]
    assert low <= 0 <= high
    assert loss_penalty(same, "a", "a")[:3] == (0.0, 0.0, 0.0)
    assert math.isnan(loss_penalty(grid({"a": [[NAN]], "b": [[1.0]]}), "a", "b")[0])
    assert [math.isnan(x) for x in loss_penalty(grid({"a": [[1.0]], "b": [[1.0]]}), "a", "b")[:3]] == [
        False,
        True,
        True,
    ]


def test_spread_is_that_of_runs_that_trained_with_chi_squareds_interval() -> None:
    found = spread(grid({"a": [[2.0, 2.1, 2.4, NAN], [2.0, NAN, NAN, NAN]]}))
    sd = np.std([2.0, 2.1, 2.4], ddof=1)
    assert float(found["sd"][0, 0]) == pytest.approx(sd)
    limits = [sd * math.sqrt(2 / 7.377759), sd * math.sqrt(2 / 0.0506356)]  # chi-squared's printed quantiles, 2 degrees
    assert [float(found["sd_low"][0, 0]), float(found["sd_high"][0, 0])] == pytest.approx(limits, rel=1e-6)
    assert np.isnan(found["sd"][0, 1])
    assert found["seeds"].values.tolist() == [[3, 1]]


# --- the window


def test_a_window_by_hand_and_where_it_is_censored() -> None:
    losses = {"a": [[2.5, 2.5], [2.0, 2.0], [2.05, 2.05], [NAN, 2.0]]}
    window = stable_window(grid(losses), "a")
    assert (window.lowest, window.highest, window.octaves) == (2e-3, 4e-3, 1.0)
    assert not window.censored
    assert str(window) == "1.0 octaves, 0.002 to 0.004"
    wide = stable_window(grid(losses), "a", margin=1.0, allowed=0.5)
    assert (wide.octaves, wide.censored_below, wide.censored_above) == (3.0, True, True)
    assert str(wide) == "at least 3.0 octaves, 0.001 to 0.008"
    assert wide.open_ended


def test_a_gap_parts_a_window_and_the_wider_part_is_it_in_octaves() -> None:
    uneven = [1e-3, 1.1e-3, 1.2e-3, 4e-3, 1.6e-2]
    losses = {"a": [[2.0], [2.0], [NAN], [2.0], [2.0]]}
    window = stable_window(grid(losses, rates=uneven), "a")
    assert (window.lowest, window.highest) == (4e-3, 1.6e-2)
    assert window.octaves == pytest.approx(2.0)
    assert (window.censored_below, window.censored_above) == (False, True)


def test_one_rate_is_a_window_of_no_octaves_and_none_is_no_window() -> None:
    one = stable_window(grid({"a": [[3.0], [2.0], [3.0]]}), "a")
    assert (one.octaves, one.censored, one.rates) == (0.0, False, 3)
    for losses in ([[NAN, NAN], [NAN, NAN]], [[5.0, NAN], [NAN, NAN]]):
        none = stable_window(grid({"a": losses}, {"a": [[1, 1], [1, 1]]}), "a")
        assert math.isnan(none.octaves)
        assert math.isnan(none.at_least)
        assert not none.censored
        assert str(none) == "none of 2 rates"


def test_few_seeds_show_no_rate_to_be_in_and_many_do() -> None:
    """At 10 % allowed and 95 % confidence with one rate: (1 - 0.1)^n <= 0.025 takes 36 seeds of which none diverged."""
    for seeds, shown in ((35, False), (36, True)):
        window = stable_window(grid({"a": [[2.0] * seeds]}), "a")
        assert math.isnan(window.at_least) != shown
        assert window.octaves == 0.0


def test_limits_hold_the_truth_between_them_by_tests_of_each_rate() -> None:
    rng = np.random.default_rng(0)
    truth = Truth((0.0, 0.0, 0.0, 0.9), (2.0, 1.5, 1.51, 1.6))
    window = stable_window(seed_grid(make_runs({"a": truth}, 80, rng)), "a")
    assert (window.octaves, window.at_least, window.at_most, window.open_ended) == (1.0, 1.0, 1.0, False)
    few = stable_window(seed_grid(make_runs({"a": truth}, 8, rng)), "a")
    assert math.isnan(few.at_least)
    assert few.at_most == 1.0


def test_differences_of_windows_take_the_worst_of_both() -> None:
    def window(at_least: float, at_most: float, open_ended: bool, octaves: float = 2.0) -> Window:
        return Window(1.0, 4.0, octaves, at_least, at_most, False, False, open_ended, 5)

    assert window_difference(window(1, 3, False), window(0, 2, False, 1.0)) == (1.0, -1.0, 3.0)
    assert window_difference(window(1, 3, True), window(NAN, 2, False, 1.0)) == (1.0, -1.0, INF)
    assert window_difference(window(NAN, NAN, False), window(1, 2, True))[1:] == (-INF, -1.0)


def test_cells_without_runs_are_no_rates_and_seeds_may_be_missing() -> None:
    losses = {"a": [[2.0, 2.0], [], [2.0, None], [None, 2.01]], "b": [[2.0], [2.0], [2.0], [2.0]]}
    cube = grid(losses)
    window = stable_window(cube, "a")
    assert (window.rates, window.octaves) == (3, 3.0)
    assert common_rates(cube).tolist() == [1e-3, 4e-3, 8e-3]
    assert float(lr_sensitivity(cube)["sensitivity"][0]) == pytest.approx((2 + 2 + 2.01) / 3 - 2)


@pytest.mark.parametrize(
    ("numbers", "what"),
    [({"allowed": 1.0}, "allowed must be a share"), ({"margin": -0.1}, "margin must be at least 0")],
)
def test_windows_that_mean_nothing_are_refused(numbers: dict[str, float], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        stable_window(grid({"a": [[2.0]]}), "a", **numbers)


def test_the_generator_s_truth_is_that_of_many_runs() -> None:
    truth = Truth((0.0, 0.2, 0.7), (2.0, 1.5, 1.4))
    cube = seed_grid(make_runs({"a": truth}, 4000, np.random.default_rng(1)))
    np.testing.assert_allclose(cube["diverged"].mean("seed").values[0], truth.diverges, atol=0.03)
    np.testing.assert_allclose(trained_loss(cube).mean("seed").values[0], truth.loss, atol=0.005)
    np.testing.assert_allclose(cube["clipped_loss"].mean("seed").values[0], truth.clipped, atol=0.12)
    assert float(cube["clipped_loss"].max()) == INITIAL
    assert truth.best == 1
