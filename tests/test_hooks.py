"""What TensorBoard and Weights & Biases are told is what is stored, and what goes wrong there ends no training."""

from __future__ import annotations

import importlib.util
import logging
import re
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import xarray as xr
from click.testing import CliRunner

from exmy.cli import main
from tests.test_execute import Recorder, Stopper, tiny
from train import Study, open_study, run_strategy, run_study
from train.curves import Curves
from train.hooks import Hook, Sink
from train.tensorboard import EventFiles
from train.wandb import WandbRuns

STUDY: dict[str, Any] = {
    "axes": {"recipe": ["e8m7", "wild"], "learning_rate": [1e-3, 100.0], "seed": 1, "beta2": [0.95, 0.99]},
    "recipes": {"wild": {"base": "native-fp16-scaled"}},
    "execution": {"pack_size": 2},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight runs, some of them diverged, some with a dynamic loss scale."""
    directory = tmp_path_factory.mktemp("hooked")
    run_study(tiny(**STUDY), directory, "cpu", Recorder())
    return directory


class Kept:
    """A sink that remembers."""

    def __init__(self, fail_at: int = -1) -> None:
        self.runs: list[Curves] = []
        self.closed, self.fail_at = False, fail_at

    def write(self, curves: Curves) -> None:
        if len(self.runs) == self.fail_at:
            raise OSError("No route to\nhost")
        self.runs.append(curves)

    def close(self) -> None:
        self.closed = True


class Stuck(Kept):
    """One that takes a run when it is let go."""

    go: threading.Event

    def write(self, curves: Curves) -> None:
        self.go.wait()
        super().write(curves)


def show(study: Study, directory: Path, sink: Sink, *, found: bool = True, observer: Recorder | None = None) -> None:
    with Hook("The sink", directory, lambda: sink, found=found) as hook:
        run_study(study, directory, "cpu", observer or Recorder(), hooks=[hook])


def test_every_run_is_told_whole_and_as_it_is_stored(finished: Path) -> None:
    sink = Kept()
    show(tiny(**STUDY), finished, sink)
    assert sink.closed
    tree = open_study(finished)
    assert {run.identity for run in sink.runs} == set(tree["history"].to_dataset()["run"].values)
    assert len({run.name for run in sink.runs}) == len(sink.runs) == 8
    for run in sink.runs:
        assert_same_curves(run.points, run.summary, tree, run.identity)
        assert re.fullmatch(r"(e8m7|wild)_lr=(0.001|100)_seed=0_beta2=0.9[59]_python_gpt2-1x16_[0-9a-f]{8}", run.name)
        assert run.settings["learning_rate"] == float(tree["history"]["learning_rate"].sel(run=run.identity))


def assert_same_curves(points: dict[str, Any], summary: dict[str, Any], tree: xr.DataTree, identity: str) -> None:
    """Every curve of the run, point by point, against what xarray reads; and nothing else."""
    history, evaluation = (tree[name].to_dataset().sel(run=identity) for name in ("history", "evaluation"))
    sharpness, told = tree["sharpness"].to_dataset().sel(run=identity), tree["summary"].to_dataset().sel(run=identity)
    expected = {name: (history["step"], history[name]) for name in ("train_loss", "grad_norm")}
    if str(history["recipe"].values) == "wild":
        expected |= {name: (history["step"], history[name]) for name in ("loss_scale", "skipped")}
    expected["validation_loss"] = (evaluation["eval_step"], evaluation["validation_loss"])
    for name in ("logit_sharpness", "logit_sharpness_centred"):
        for epsilon in (5e-4, 1e-3):
            values = sharpness[name].sel(epsilon=epsilon)
            expected[f"sharpness/{name} at {epsilon:g}"] = (sharpness["probe_step"], values)
    assert set(points) == set(expected)
    for name, (steps, values) in expected.items():
        assert [step for step, _ in points[name]] == steps.values.tolist(), name
        np.testing.assert_array_equal([value for _, value in points[name]], values.values.astype(np.float32), name)
    for name in ("diverged", "non_finite", "no_progress"):
        assert bool(summary[name]) == bool(told[name]), name
    np.testing.assert_allclose(summary["final_loss"], told["final_loss"], rtol=1e-6)


def test_a_failing_hook_costs_a_line_and_no_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sink = Kept(fail_at=1)
    show(tiny(), tmp_path, sink)
    assert open_study(tmp_path).attrs["runs_finished"] == 8
    assert [r.message for r in caplog.records if r.name == "train.hooks"] == [
        "The sink: No route to host; it is left out from here on, and the training goes on"
    ]
    assert len(sink.runs) == 1
    assert sink.closed


def test_a_hook_that_hangs_does_not_keep_the_study(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stuck = Stuck()
    stuck.go = threading.Event()
    study = tiny()
    with Hook("The sink", tmp_path, lambda: stuck, found=False, patience=0.05) as hook:
        run_study(study, tmp_path, "cpu", Recorder(), hooks=[hook])
    stuck.go.set()
    hook._thread.join()
    [line] = [r.message for r in caplog.records if r.name == "train.hooks"]
    assert line == "The sink has not taken all runs after 0 s: left to itself"
    assert len(stuck.runs) == 1, "the one that it was at"


def test_what_finished_before_is_told_where_it_is_asked_for(tmp_path: Path) -> None:
    study = tiny()
    with pytest.raises(KeyboardInterrupt):
        run_study(study, tmp_path, "cpu", Stopper(2))
    news, everything = Kept(), Kept()
    show(study, tmp_path, news, found=False)
    show(study, tmp_path, everything)
    assert (len(news.runs), len(everything.runs)) == (4, 8)


@pytest.mark.parametrize("found", [False, True])
@pytest.mark.parametrize(
    "strategy",
    [{"kind": "seeds", "looks": 2}, {"kind": "bisect", "points": 1, "rounds": 2, "octaves": 1}],
    ids=lambda strategy: strategy["kind"],
)
def test_the_runs_of_every_round_are_told_and_each_once(strategy: dict[str, Any], found: bool, tmp_path: Path) -> None:
    """Neither the seeds of a second look nor a rate of bisect's lattice is in the study as it was written."""
    axes = {"recipe": ["e8m7", "e4m3"], "learning_rate": [1e-3], "seed": 1}
    study = tiny(axes=axes, training={"steps": 4}, strategy=strategy, divergence={"definition": "non_finite"})
    sink = Kept()
    with Hook("The sink", tmp_path, lambda: sink, found=found) as hook:
        run_strategy(study, tmp_path, "cpu", Recorder(), hooks=[hook])
    written = set(study.identities())
    stored = open_study(tmp_path)["history"].to_dataset()["run"].values.tolist()
    assert len(stored) > 2, "a second round was trained"
    assert not set(stored) <= written
    assert sorted(run.identity for run in sink.runs) == sorted(stored)


def test_event_files_read_back_are_the_histories(finished: Path) -> None:
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    study, tree = tiny(**STUDY), open_study(finished)
    for _ in range(2):  # the second time they replace the first
        show(study, finished, EventFiles(finished))
    files = sorted((finished / "tensorboard").glob("*/events.out.tfevents.*"))
    assert len(files) == 8
    for file in files:
        points: dict[str, list[tuple[int, float]]] = {}
        for event in loader.LegacyEventFileLoader(str(file)).Load():
            for value in event.summary.value:
                points.setdefault(value.tag, []).append((event.step, value.simple_value))
        summary = {
            tag.removeprefix("summary/"): points.pop(tag)[0][1] for tag in list(points) if tag.startswith("summary/")
        }
        identity = file.name.rsplit(".", 1)[1]
        assert file.parent.name.endswith(identity[:8])
        assert_same_curves(points, summary, tree, identity)


def test_wandb_is_told_each_run_once(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in that writes down what it is called with."""
    begun: list[dict[str, Any]] = []

    def init(**settings: Any) -> SimpleNamespace:
        record: dict[str, Any] = {"init": settings, "rows": [], "summary": {}, "finished": False}
        begun.append(record)
        return SimpleNamespace(
            log=lambda values, step: record["rows"].append((step, values)),
            summary=record["summary"], finish=lambda: record.update(finished=True),
        )  # fmt: skip

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Settings=dict, __spec__=True))
    show(tiny(**STUDY), finished, WandbRuns(finished, "project", "tiny"))
    tree = open_study(finished)
    assert {record["init"]["id"] for record in begun} == set(tree["history"].to_dataset()["run"].values)
    for record in begun:
        assert record["finished"]
        assert record["init"]["project"] == "project"
        points: dict[str, list[tuple[int, float]]] = {}
        assert [step for step, _ in record["rows"]] == sorted({step for step, _ in record["rows"]})
        for step, values in record["rows"]:
            for name, value in values.items():
                points.setdefault(name, []).append((step, value))
        assert_same_curves(points, record["summary"], tree, record["init"]["id"])


def test_wandb_itself_takes_them_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    study = tiny(axes={"recipe": ["e8m7"], "learning_rate": [1e-3], "seed": 1})
    show(study, tmp_path, WandbRuns(tmp_path, "project", "tiny"))
    assert not [record for record in caplog.records if record.name == "train.hooks"]
    [run] = study.runs()
    [written] = (tmp_path / "wandb").glob(f"offline-run-*-{run.identity}/run-{run.identity}.wandb")
    assert written.stat().st_size > 1000


@pytest.mark.parametrize(("package", "option"), [("tensorboard", ["--tensorboard"]), ("wandb", ["--wandb", "mine"])])
def test_a_missing_extra_is_said_before_any_work(
    package: str, option: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else real(name, *rest))
    (tmp_path / "study.toml").write_text(tiny().to_toml(), encoding="utf-8")
    out = tmp_path / "out"
    refused = CliRunner().invoke(main, ["sweep", str(tmp_path / "study.toml"), "--out", str(out), *option])
    assert refused.exit_code == 2
    [line] = refused.output.splitlines()
    assert line.endswith(f"which is not installed: pip install 'exmy[{package}]'")
    assert not out.exists()


def test_a_sweep_writes_event_files_when_it_is_asked_to(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("tensorboard")
    caplog.set_level(logging.WARNING)
    (tmp_path / "study.toml").write_text(tiny().to_toml(), encoding="utf-8")
    arguments = ["sweep", str(tmp_path / "study.toml"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert not (tmp_path / "out" / "tensorboard").exists(), "off by default"
    assert CliRunner().invoke(main, [*arguments, "--tensorboard"]).exit_code == 0
    assert len(list((tmp_path / "out" / "tensorboard").iterdir())) == 8
