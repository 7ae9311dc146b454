"""A study's signals as alarms: all that were measured, each on its own steps, only before the onset; and `exmy alarms`."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import xarray as xr
from click.testing import CliRunner, Result

from exmy.alarms import alarms_table, notes
from exmy.cli import main
from train.study_alarms import study_onset, study_signals, study_warnings

CPU = Path(__file__).parent.parent / "studies" / "results" / "first-look-cpu"
NAN = float("nan")
SEEDS, STEPS, ONSET, HORIZON = 20, 40, 30, 10
RATES = (1e-3, 2e-3)
RUNS = SEEDS * len(RATES)
FAILS = np.isin(np.arange(RUNS), (1, 4, 6, 9, 22, 25, 28))


def study(definition: str = "spike", fails: npt.NDArray[np.bool_] = FAILS, seed: int = 0) -> xr.DataTree:
    """Seven runs of 40 diverge at step 30; the curvature at probe steps 20 and 25 knows, at rank 0; at 30 all do."""
    rng = np.random.default_rng(seed)
    seeds = np.tile(np.arange(SEEDS), len(RATES))
    names = np.array([f"r{i}" for i in range(RUNS)])
    coords: dict[str, Any] = {
        "run": names, "recipe": ("run", ["e4m3"] * RUNS), "learning_rate": ("run", np.repeat(RATES, SEEDS)),
        "init_seed": ("run", seeds), "data_seed": ("run", seeds), "seed": ("run", seeds), "pack_size": ("run", [8] * RUNS),
    }  # fmt: skip
    loss = 3 - 0.02 * np.arange(STEPS) + 0.001 * rng.standard_normal((RUNS, STEPS))
    loss[fails, ONSET:] += 5
    probes = np.arange(0, STEPS + 1, 5)
    knows = fails[:, None] & np.isin(probes, (20, 25, 30))
    curvature = np.stack([knows + 0.1 * rng.random(knows.shape), rng.random(knows.shape)], axis=-1)
    quantisers = ("run", "probe_step"), np.full((RUNS, probes.size), "on")
    at_probes = {**coords, "probe_step": probes}
    history = xr.Dataset(
        {
            "train_loss": (("run", "step"), loss),
            "grad_norm": (("run", "step"), rng.random((RUNS, STEPS))),
            "last_step": ("run", np.full(RUNS, STEPS - 1)),
        },
        {**coords, "step": np.arange(STEPS)},
    )
    summary = xr.Dataset(
        {"diverged": ("run", fails, {"definition": definition}), "diverged_step": ("run", np.where(fails, 30.0, NAN))},
        coords,
    )
    sharpness = xr.Dataset(
        {
            "logit_sharpness": (("run", "probe_step", "epsilon"), curvature[..., ::-1]),
            "measured": ("run", np.ones(RUNS, bool)),
        },
        {**at_probes, "epsilon": [5e-4, 1e-3]},
    )
    eigenvalue = xr.Dataset(
        {
            "hessian_eigenvalue": (("run", "probe_step", "rank"), curvature),
            "residual": (("run", "probe_step", "rank"), 0 * curvature),
        },
        {**at_probes, "rank": [0, 1], "quantisers": quantisers},
    )
    spectrum = xr.Dataset(
        {"node": (("run", "probe_step", "sample", "lanczos_step"), np.ones((RUNS, probes.size, 2, 3)))}, at_probes
    )
    trace = xr.Dataset({"hessian_trace": (("run", "probe_step"), curvature[..., 0])}, at_probes)
    blocks = rng.random((RUNS, 4, 3))
    signals = xr.Dataset(
        {"kurtosis": (("run", "signal_step", "block"), blocks)},
        {**coords, "signal_step": [0, 10, 20, 28], "block": [-1, 0, 1]},
    )
    afterwards = xr.Dataset(
        {
            f"logit_sharpness{which}": (("run", "probe_step", "epsilon"), curvature[..., :1])
            for which in ("", "_centred")
        },
        {**at_probes, "epsilon": [2e-3]},
    )
    more = trace.isel(run=0).expand_dims("run").assign_coords(run=["unfinished"])  # measured before its run ended
    return xr.DataTree.from_dict(
        {
            "history": history, "summary": summary, "sharpness": sharpness, "probes/hessian_eigenvalue": eigenvalue,
            "probes/spectral_density": spectrum, "landscape/off/hessian_trace": xr.concat([more, trace], "run"),
            "landscape/on/logit_sharpness": afterwards,
            "signals": signals,
        }
    )  # fmt: skip


def test_every_measure_and_signal_is_an_alarm_and_a_spectrum_is_none() -> None:
    tree = study()
    found = dict(study_signals(tree))
    assert list(found) == [
        "train_loss", "grad_norm", "logit_sharpness at epsilon 0.0005", "logit_sharpness at epsilon 0.001",
        "hessian_eigenvalue at rank 0", "hessian_eigenvalue at rank 1", "landscape/off/hessian_trace",
        "landscape/on/logit_sharpness at epsilon 0.002", "landscape/on/logit_sharpness_centred at epsilon 0.002", "kurtosis",
    ]  # fmt: skip
    assert all(set(of.dims) - {"run"} <= {"step", "probe_step", "signal_step"} for of in found.values())
    runs = tree["history"]["run"].values
    assert all((of["run"].values == runs).all() for of in found.values())
    np.testing.assert_array_equal(found["kurtosis"], np.asarray(tree["signals/kurtosis"]).max(axis=-1))


def test_sharpness_that_knows_at_probe_steps_before_the_onset_warns_and_what_it_knows_at_it_is_no_warning() -> None:
    found = study_warnings(study(), HORIZON)
    knows = found.sel(signal="hessian_eigenvalue at rank 0")
    # Rows with both kinds: a failing and a living run of one rate, at the probes whose horizon the onset falls into: 20 and 25.
    assert int(knows["positives"]) == 2 * FAILS.sum()
    assert float(knows["auroc"]) == float(knows["average_precision"]) == 1.0
    assert float(knows["gain_low"]) > 0  # loss and gradient norm know nothing before it
    assert (float(knows["detected"]), float(knows["median_lead"])) == (1.0, 10.0)
    nothing = found.sel(signal="hessian_eigenvalue at rank 1")
    assert float(nothing["auroc_low"]) < 0.5 < float(nothing["auroc_high"])
    assert float(found.sel(signal="landscape/off/hessian_trace")["auroc"]) == 1.0
    late = found.sel(signal="train_loss")
    assert float(late["auroc"]) == pytest.approx(0.5, abs=0.15)  # it rises at the onset, which is no warning
    assert np.isnan(float(late["gain"]))  # the loss is what others are held against


def test_scores_are_those_of_pairs_counted_one_by_one() -> None:
    tree = study(seed=5)
    signal = np.asarray(tree["probes/hessian_eigenvalue/hessian_eigenvalue"])[..., 1]
    rate = np.asarray(tree["history/learning_rate"])
    won = n = 0.0
    for i, j in itertools.permutations(range(RUNS), 2):
        if FAILS[i] and not FAILS[j] and rate[i] == rate[j]:
            for probe in (4, 5):  # steps 20 and 25
                n += 1
                won += signal[i, probe] > signal[j, probe]
    found = study_warnings(tree, HORIZON).sel(signal="hessian_eigenvalue at rank 1")
    assert float(found["auroc"]) == pytest.approx(won / n, rel=1e-12)


def test_an_onset_is_a_step_of_the_definition_or_the_point_of_no_return() -> None:
    np.testing.assert_array_equal(study_onset(study("spike")), np.where(FAILS, 30.0, NAN))
    tree = study("no_progress")
    summary = tree["summary"].to_dataset()
    tree["summary"] = xr.DataTree(summary.assign(diverged_step=summary["diverged_step"] + 9))
    np.testing.assert_array_equal(study_onset(tree), np.where(FAILS, 30.0, NAN))


@pytest.mark.parametrize(("fails", "what"), [
    (np.zeros(RUNS, bool), "No run diverged: there was nothing to warn of."),
    (np.ones(RUNS, bool), "Every run diverged"),
    (np.repeat([False, True], SEEDS), "nothing can be told"),
    (FAILS, "Up to 40 runs of 40 have no threshold: that takes 49 runs"),
])  # fmt: skip
def test_what_can_t_be_told_is_said(fails: npt.NDArray[np.bool_], what: str) -> None:
    found = study_warnings(study(fails=fails), HORIZON, false_alarms=0.02)
    assert what in " ".join(notes(found))
    assert np.isnan(found["auroc"].values).all() == (fails is not FAILS)
    assert alarms_table(found).row_count == 10


# --- on the command line


def exmy(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["alarms", *map(str, arguments)])


def test_where_no_run_diverged_there_is_no_table_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exmy.alarms.open_study", lambda _: study(fails=np.zeros(RUNS, bool)))
    done = exmy(CPU, "--horizon", "20", "--json", tmp_path / "a.json")
    assert done.exit_code == 0, done.output
    assert done.output.startswith("0 of 40 runs diverged")
    assert "No run diverged: there was nothing to warn of." in done.output
    assert len(json.loads((tmp_path / "a.json").read_text())["signals"]) == 10


def test_a_study_s_alarms_are_printed_with_intervals_and_what_they_rest_on(tmp_path: Path) -> None:
    done = exmy(CPU, "--horizon", "20", "--json", tmp_path / "a.json")
    assert done.exit_code == 0, done.output
    assert "logit_sharpness at epsilon 0.0005" in done.output
    assert "24 of 48 runs diverged (no_progress)" in done.output
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["horizon"] == 20
    assert [of["signal"] for of in content["signals"]][:2] == ["train_loss", "grad_norm"]
    assert content["signals"][0]["detected"] is None


@pytest.mark.parametrize(("arguments", "what"), [
    ((CPU, "--horizon", "0"), "--horizon must be above 0 steps, got 0"),
    ((CPU, "--horizon", "nan"), "--horizon must be above 0 steps, got nan"),
    ((CPU, "--horizon", "9", "--false-alarms", "1"), "--false-alarms must be a rate per run between 0 and 1, got 1"),
    ((CPU.parent, "--horizon", "9"), "no study.toml here"),
    ((CPU, "--horizon", "9", "--json", "/dev/null/a.json"), "can't be written"),
])  # fmt: skip
def test_bad_input_has_one_line_and_status_2(arguments: list[str | Path], what: str) -> None:
    done = exmy(*arguments)
    assert done.exit_code == 2
    assert what in done.output
