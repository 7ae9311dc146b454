"""The ranking of alarms on made-up studies, of which is known what warns: on seeds it was not chosen on, and elsewhere."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import xarray as xr

from train import read_study
from train.alarm_ranking import Alarm, best, cost_of, first_rings, rank_alarms, scored_again, seeds_of_choice
from train.alarms import alarm_rows
from train.early_warning import warning_skill

NAN = float("nan")
SEEDS, STEPS, EVERY, HORIZON = 120, 300, 10, 50
TICKS = np.arange(0, STEPS, EVERY)
STUDIES = Path(__file__).parent.parent / "studies"
Floats = npt.NDArray[np.float64]


def made(values: dict[str, Floats], fails: npt.NDArray[np.bool_], onset: Floats, seeds: int = SEEDS) -> xr.DataTree:
    """A study of one recipe and rate whose signals, (run, tick), are those given, and whose onset is known."""
    runs = fails.size
    coords: dict[str, Any] = {
        "run": np.array([f"r{i}" for i in range(runs)]), "recipe": ("run", ["e5m7"] * runs),
        "learning_rate": ("run", np.full(runs, 2e-3)), "seed": ("run", np.arange(runs) % seeds),
        "init_seed": ("run", np.arange(runs) % seeds), "data_seed": ("run", np.arange(runs) % seeds),
    }  # fmt: skip
    rng = np.random.default_rng(9)
    history = xr.Dataset(
        {
            "train_loss": (("run", "step"), rng.random((runs, TICKS.size))),
            "grad_norm": (("run", "step"), rng.random((runs, TICKS.size))),
            "last_step": ("run", np.full(runs, STEPS - 1)),
        },
        {**coords, "step": TICKS},
    )
    summary = xr.Dataset(
        {"diverged": ("run", fails, {"definition": "no_progress"}), "onset": ("run", np.where(fails, onset, NAN))},
        coords,
    )
    signals = xr.Dataset(
        {name: (("run", "signal_step"), of) for name, of in values.items()}, {**coords, "signal_step": TICKS}
    )
    return xr.DataTree.from_dict({"history": history, "summary": summary, "signals": signals})


def known_study(seed: int = 0, lead: int = 40, scale: float = 1.0) -> xr.DataTree:
    """A third of the runs diverge at 200: kurtosis rises `lead` steps before it, update_rms falls, the others say nothing."""
    rng = np.random.default_rng(seed)
    fails = np.arange(SEEDS) % 6 < 2  # as many of even seeds as of odd ones
    near = (fails[:, None] & (200 - lead <= TICKS) & (TICKS < 200)).astype(np.float64)
    shape = (SEEDS, TICKS.size)
    values = {
        "logsumexp_max": rng.random(shape),
        "clipped": np.zeros(shape),
        "kurtosis": scale * (3 + near + 0.5 * rng.random(shape)),
        "update_rms": 1 - 0.9 * near + 0.2 * rng.random(shape),
        "scale": np.full(shape, NAN),
    }
    return made(values, fails, np.full(SEEDS, 200.0))


@pytest.fixture(scope="module")
def ranked() -> xr.Dataset:
    return rank_alarms(known_study(), HORIZON, study=read_study(STUDIES / "warning.toml"))


def test_what_was_made_to_warn_comes_first_in_its_direction_and_what_says_nothing_has_one_half_in_its_interval(
    ranked: xr.Dataset,
) -> None:
    assert set(ranked["signal"].values[:2]) == {"kurtosis", "update_rms"}
    falling = ranked.sel(signal="update_rms")
    assert bool(falling["below"])
    assert not bool(ranked.sel(signal="kurtosis")["below"])
    # Of the five ticks from which the onset is within 50 steps the signal knows at four; at 150 it is a draw of noise.
    for known in ("kurtosis", "update_rms"):
        assert float(ranked.sel(signal=known)["auroc"]) == pytest.approx((4 + 0.5) / 5, abs=0.06)
        assert float(ranked.sel(signal=known)["gain_low"]) > 0.1
        assert (float(ranked.sel(signal=known)["detected"]), float(ranked.sel(signal=known)["median_lead"])) == (
            1.0,
            40.0,
        )
    nothing = ranked.sel(signal="logsumexp_max")
    assert float(nothing["auroc_low"]) < 0.5 < float(nothing["auroc_high"])


def test_what_is_always_the_same_has_one_half_and_what_was_never_measured_comes_last(ranked: xr.Dataset) -> None:
    tied = ranked.sel(signal="clipped")
    assert float(tied["auroc"]) == float(tied["chosen_auroc"]) == 0.5
    assert not bool(tied["below"])
    assert float(tied["detected"]) == 0.0
    assert ranked["signal"].values[-1] == "scale"
    assert np.isnan(float(ranked["chosen_auroc"][-1]))


def test_seeds_of_choice_and_others_are_apart_and_the_table_is_of_the_others(ranked: xr.Dataset) -> None:
    tree = known_study()
    chosen = seeds_of_choice(tree)
    seeds = tree["history"].to_dataset()["seed"].values
    assert set(seeds[chosen]) == set(range(0, SEEDS, 2))
    assert set(seeds[~chosen]) == set(range(1, SEEDS, 2))
    assert (ranked.attrs["runs_scored"], ranked.attrs["diverged_scored"], ranked.attrs["diverged_chosen_on"]) == (
        60,
        20,
        20,
    )
    signal, onset = tree["signals"].to_dataset()["kurtosis"], tree["summary"].to_dataset()["onset"]
    last = tree["history"].to_dataset()["last_step"]
    own = warning_skill(alarm_rows(signal[~chosen], onset, HORIZON, last))
    for of in ("auroc", "auroc_low", "auroc_high"):
        assert float(ranked.sel(signal="kurtosis")[of]) == float(own[of])
    theirs = warning_skill(alarm_rows(signal[chosen], onset, HORIZON, last))
    assert float(ranked.sel(signal="kurtosis")["chosen_auroc"]) == float(theirs["auroc"])


def test_a_signal_that_knows_the_seeds_of_choice_alone_is_chosen_and_then_scores_one_half() -> None:
    tree = known_study()
    even = seeds_of_choice(tree)
    signals = tree["signals"].to_dataset()
    fails = np.isfinite(tree["summary"].to_dataset()["onset"].values)
    lucky = np.where((even & fails)[:, None], 1.0, 0.0) * np.ones(TICKS.size)
    found = rank_alarms(
        tree.assign({"signals": xr.DataTree(signals.assign(flushed=(signals["kurtosis"].dims, lucky)))}), HORIZON
    )
    assert best(found) == Alarm("flushed")
    assert float(found.sel(signal="flushed")["chosen_auroc"]) == 1.0
    assert float(found.sel(signal="flushed")["auroc"]) == 0.5


def test_equally_good_signals_stand_in_order_of_their_cost() -> None:
    tree = known_study()
    signals = tree["signals"].to_dataset()
    loss = signals["kurtosis"].rename(signal_step="step").drop_vars("step", errors="ignore")
    history = tree["history"].to_dataset().assign(gnmr=(("run", "step"), loss.values))
    tree = tree.assign({"history": xr.DataTree(history)})
    found = rank_alarms(tree, HORIZON, study=read_study(STUDIES / "warning.toml"))
    order = found["signal"].values.tolist()
    assert float(found.sel(signal="gnmr")["chosen_auroc"]) == float(found.sel(signal="kurtosis")["chosen_auroc"])
    assert order.index("gnmr") < order.index("kurtosis")
    assert (float(found.sel(signal="gnmr")["cost"]), float(found.sel(signal="kurtosis")["cost"])) == (0.0, 1 / 8)


@pytest.mark.parametrize("runs", [(), (0, 2, 4, 6), (0, 2, 4, 6, 8), (1,), (0, 1, 2, 4, 6, 8)])
def test_with_few_diverged_runs_what_can_t_be_told_is_nan_and_nothing_is_the_best(runs: tuple[int, ...]) -> None:
    fails = np.isin(np.arange(SEEDS), runs)
    values = {"kurtosis": np.where(fails[:, None], 5.0, 3.0) * np.ones(TICKS.size)}
    found = rank_alarms(made(values, fails, np.full(SEEDS, 200.0)), HORIZON)
    known = {
        name: dict(zip(found["signal"].values, found[name].values, strict=True)) for name in ("chosen_auroc", "auroc")
    }
    chosen = sum(run % 2 == 0 for run in runs) >= 5  # of as many seeds an alarm is chosen at least
    assert known["chosen_auroc"]["kurtosis"] == pytest.approx(1.0 if chosen else NAN, nan_ok=True)
    assert known["auroc"]["kurtosis"] == pytest.approx(1.0 if 1 in runs else NAN, nan_ok=True)
    assert best(found) == (Alarm("kurtosis") if chosen else None)
    assert np.isnan(float(found.sel(signal="kurtosis")["gain"]))  # one diverged run is in one fold: there is no model


def test_infinite_values_are_loud_of_a_signal_that_warns_by_falling_too() -> None:
    signal = xr.DataArray([[1.0, np.inf, NAN, -np.inf]], dims=("run", "step"))
    np.testing.assert_array_equal(Alarm("x", below=True).louder(signal), [[-1.0, np.inf, NAN, np.inf]])
    np.testing.assert_array_equal(Alarm("x").louder(signal), signal)


# --- elsewhere


def test_the_best_is_scored_again_elsewhere_by_its_own_threshold_and_by_the_one_it_brings() -> None:
    chosen, other = known_study(), known_study(seed=3, lead=20)
    again = scored_again(Alarm("kurtosis"), chosen, other, HORIZON)
    assert again["auroc"] == pytest.approx((2 + 1.5) / 5, abs=0.1)
    assert (again["detected"], again["median_lead"]) == (1.0, 20.0)
    assert (again["threshold_detected"], again["threshold_early"], again["threshold_median_lead"]) == (1.0, 0.0, 20.0)
    assert again["threshold_false_alarms"] <= 0.15
    # Of 40 runs of even seeds that did not diverge, the ceil(0.95 x 41) = 39th smallest of their largest values.
    fails = np.isfinite(chosen["summary"].to_dataset()["onset"].values)
    largest = chosen["signals"].to_dataset()["kurtosis"].max("signal_step").values
    assert again["threshold"] == np.sort(largest[~fails & seeds_of_choice(chosen)])[38]


def test_a_threshold_does_not_carry_over_to_a_signal_of_another_size() -> None:
    again = scored_again(Alarm("kurtosis"), known_study(), known_study(seed=3, scale=10), HORIZON)
    assert again["detected"] == 1.0  # by thresholds of its own runs
    assert (again["threshold_false_alarms"], again["threshold_early"], again["threshold_detected"]) == (1.0, 1.0, 0.0)


def test_a_falling_signal_has_its_threshold_in_its_own_units() -> None:
    again = scored_again(Alarm("update_rms", below=True), known_study(), known_study(seed=3), HORIZON)
    assert 0.1 < again["threshold"] < 1.1
    assert again["threshold_detected"] > 0.9
    assert again["threshold_detected"] + again["threshold_early"] == pytest.approx(
        1.0
    )  # all rang, a few by chance before


def test_a_study_without_the_signal_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="no signal 'attention_logit'; it has train_loss, grad_norm, logsumexp_max"):
        scored_again(Alarm("attention_logit"), known_study(), known_study(), HORIZON)


def test_first_rings_counted_one_by_one() -> None:
    rng = np.random.default_rng(4)
    values = np.where(rng.random((6, 8)) < 0.1, NAN, rng.random((6, 8)))
    signal = xr.DataArray(values, dims=("run", "step"), coords={"step": 10 * np.arange(8)})
    last, onset = (
        xr.DataArray([70, 70, 30, 30, 70, 70], dims="run"),
        xr.DataArray([NAN, 40, NAN, 20, 0, 70], dims="run"),
    )
    expected = np.full(6, NAN)
    for run, i in itertools.product(range(6), reversed(range(8))):
        if values[run, i] > 0.6 and 10 * i <= last[run] and not 10 * i >= onset[run]:
            expected[run] = 10 * i
    np.testing.assert_array_equal(first_rings(signal, 0.6, last, onset), expected)


def test_what_a_probe_costs() -> None:
    study = read_study(STUDIES / "curvature.toml")
    costs = {name: cost_of(name, study) for name in (
        "train_loss", "gnmr", "kurtosis", "logit_sharpness_centred at epsilon 0.001", "gradient_curvature",
        "landscape/off/hessian_eigenvalue at rank 0", "my own",
    )}  # fmt: skip
    assert list(costs.values()) == [0, 0, 1 / 8, 1 / 3, 4, 63, pytest.approx(NAN, nan_ok=True)]
