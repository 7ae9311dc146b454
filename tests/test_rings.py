"""Alarms while a study trains: who rang, at which step and value, told live and in the dataset, and no bit of a run changed."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from click.testing import CliRunner

from exmy.alarm_options import thresholds, worth
from exmy.cli import main
from tests.test_execute import Recorder, Stopper, tiny
from tests.test_study_files import STUDIES
from train import StudyError, open_study, read_study, run_study, study_status
from train.alarm_ranking import Alarm, Judged, rank_alarms
from train.alarm_rules import Rule, check_alarm, rule_of
from train.digest import write_digest
from train.interruption import Interrupted
from train.plan import PlannedPack
from train.program import Progress
from train.rings import Listener, first_heard
from train.schema import OF_ALARMS
from train.store import read_packs
from train.study import Study
from train.study_alarms import study_signals

NAN = float("nan")
SIGNALS = {"every": 3}
EVERY = [
    "train_loss>5.2", "grad_norm>1.5", "gnmr<0.9", "kurtosis>2.5", "update_rms<0.99", "logsumexp_mean>5.55",
    "logit_sharpness at epsilon 0.001>0.02", "sam_sharpness at rho 0.05>0.05", "train_loss>1000",
]  # fmt: skip
PROBE = {"every": 6, "measures": ["logit_sharpness", "sam_sharpness"]}


def study(alarms: list[str] = EVERY, **changes: Any) -> Study:
    return tiny(**{"signals": SIGNALS, "probe": PROBE, "alarms": {"thresholds": alarms}, **changes})


class Told(Recorder):
    """Remembers for how many runs of each pack an alarm rang, at each report."""

    def __init__(self) -> None:
        super().__init__()
        self.rang: dict[str, list[int]] = {}

    def pack_progress(self, pack: PlannedPack, progress: Progress) -> None:
        super().pack_progress(pack, progress)
        if progress.rang is not None:
            self.rang.setdefault(pack.hash, []).append(int(progress.rang.sum()))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Told, list[str]]:
    folder, told, lines = tmp_path_factory.mktemp("rings"), Told(), list[str]()
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("train.rings")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    run_study(study(), folder, "cpu", told)
    logger.removeHandler(handler)
    return folder, told, lines


def test_who_rang_and_when_is_the_first_value_beyond_the_threshold_counted_one_by_one(
    trained: tuple[Path, Told, list[str]],
) -> None:
    tree = open_study(trained[0])
    alarms, signals = tree["alarms"].to_dataset(), dict(study_signals(tree))
    assert alarms["alarm"].values.tolist() == [check_alarm(text) for text in EVERY]
    assert set(alarms.data_vars) == set(OF_ALARMS["alarms"])
    assert all(
        alarms[name].dims == row.dims and alarms[name].attrs == row.attrs() for name, row in OF_ALARMS["alarms"].items()
    )
    some = 0
    for i, rule in enumerate(map(rule_of, EVERY)):
        signal = signals[rule.name]
        axis = next(dim for dim in signal.dims if dim != "run")
        for run, values in zip(alarms["run"].values, signal.transpose("run", axis).values, strict=True):
            beyond = [k for k, x in enumerate(values) if (x < rule.threshold if rule.below else x > rule.threshold)]
            rang = alarms.isel(alarm=i).sel(run=run)
            assert np.isfinite(float(rang["rang_step"])) == bool(beyond)
            if beyond:
                assert float(rang["rang_step"]) == float(signal[axis].values[beyond[0]])
                assert float(rang["rang_value"]) == float(values[beyond[0]])
                some += 1
    assert 0 < some < alarms["rang_step"].size
    assert np.isnan(alarms["rang_step"].values[:, -1]).all()  # no loss is above 1000


def test_lines_while_it_trains_say_the_same_as_the_dataset(trained: tuple[Path, Told, list[str]]) -> None:
    folder, told, lines = trained
    alarms = open_study(folder)["alarms"].to_dataset()
    said = {(line.removeprefix("alarm ").split(": ")[0], *ring) for line in lines for ring in rings_in(line)}
    for label in alarms["alarm"].values.tolist():
        one = alarms.sel(alarm=label)
        # A pack has four runs, and three of a line are named.
        named = {entry[1:] for entry in said if entry[0] == label}
        rang = {
            (str(recipe), f"{rate:g}", str(seed), f"{step:.0f}", f"{value:.4g}")
            for recipe, rate, seed, step, value in zip(
                *(one[name].values for name in ("recipe", "learning_rate", "seed", "rang_step", "rang_value")),
                strict=True,
            )
            if np.isfinite(step)
        }
        assert named <= rang
        assert len(named) == len(rang) - sum(
            int(more[1])
            for line in lines
            if line.startswith(f"alarm {label}: ") and (more := re.search(r"and (\d+) more", line))
        )
    by_pack = [int(np.isfinite(pack).any(axis=1).sum()) for pack in np.split(alarms["rang_step"].values, 2)]
    assert sorted(rang[-1] for rang in told.rang.values()) == sorted(by_pack)


def test_two_alarms_of_one_signal_are_heard_each_as_if_it_were_alone() -> None:
    """Of norms 10, then 1 and once 1.9 the ratio to the mean so far is at most 0.95, by hand 1.9 / 2; none has one at step 0."""
    norms = torch.tensor([10.0, 1, 1, 1, 1, 1, 1, 1, 1, 1.9, 1, 1])[:, None]
    rang = []
    for alarms in (["gnmr>5", "gnmr>1.2"], ["gnmr>0.9", "gnmr>0.94", "gnmr>0.96"]):
        pack: Any = SimpleNamespace(program=None, grad_norm=norms, device=torch.device("cpu"))
        listener = Listener([rule_of(alarm) for alarm in alarms], pack.program, [next(iter(study().runs()))])
        for pack.made in (4, 8, 12):
            listener.after_step(pack)
            listener.listen()
        rang.append((listener.rang.tolist(), (~listener._silent).ravel().tolist()))
    assert rang == [([False], [False, False]), ([True], [True, True, False])]


def rings_in(line: str) -> list[tuple[str, ...]]:
    return re.findall(r"([\w.-]+), rate ([\d.e-]+), seed (\d+) at step (\d+) \((-?[\d.e+-]+)\)", line)


def test_no_bit_of_a_run_and_no_identity_depends_on_alarms(
    trained: tuple[Path, Told, list[str]], tmp_path: Path
) -> None:
    run_study(study([]), tmp_path, "cpu", Recorder())
    with_alarms, without = (list(read_packs(folder)) for folder in (trained[0], tmp_path))
    assert [pack.attrs["pack"] for pack in with_alarms] == [pack.attrs["pack"] for pack in without]
    for ours, theirs in zip(with_alarms, without, strict=True):
        for node in theirs.subtree:
            for name, values in node.to_dataset(inherit=False).data_vars.items():
                np.testing.assert_array_equal(
                    ours[node.path].to_dataset()[name].values, values.values, err_msg=str(name)
                )
    assert "alarms" not in open_study(tmp_path)
    assert "alarms" not in study([]).to_toml()  # so that a study without them has the hash that it had


def test_a_study_that_was_stopped_and_goes_on_says_the_same(
    trained: tuple[Path, Told, list[str]], tmp_path: Path
) -> None:
    import signal

    with pytest.raises(Interrupted):
        run_study(study(), tmp_path, "cpu", Stopper(signal.SIGTERM))
    told = Told()
    run_study(study(), tmp_path, "cpu", told)
    xr.testing.assert_identical(
        open_study(tmp_path)["alarms"].to_dataset(), open_study(trained[0])["alarms"].to_dataset()
    )
    (pack,) = told.rang  # the one that was under way; what rang before it was stopped is told again
    assert told.rang[pack][-1] == trained[1].rang[pack][-1]


@pytest.mark.cuda
@pytest.mark.usefixtures("cuda")
def test_on_a_gpu_as_many_ring_as_the_dataset_says(tmp_path: Path) -> None:
    told = Told()
    run_study(study(), tmp_path, "cuda", told)
    alarms = open_study(tmp_path)["alarms"].to_dataset()["rang_step"].values
    by_pack = [int(np.isfinite(pack).any(axis=1).sum()) for pack in np.split(alarms, len(told.rang))]
    assert sorted(rang[-1] for rang in told.rang.values()) == sorted(by_pack)
    assert any(by_pack)


def test_status_the_sweep_and_the_report_say_who_rang(trained: tuple[Path, Told, list[str]]) -> None:
    folder = trained[0]
    told = {row["alarm"]: row for row in study_status(folder)["alarms"]}
    alarms = open_study(folder)["alarms"].to_dataset()
    for label, row in told.items():
        steps = alarms.sel(alarm=label)["rang_step"]
        assert [of["step"] for of in row["who"]] == sorted(steps.values[np.isfinite(steps.values)].tolist())
        assert (row["runs"], row["rang"]) == (8, len(row["who"]))
    shown = CliRunner().invoke(main, ["status", str(folder)], terminal_width=200)
    assert shown.exit_code == 0, shown.output
    assert "Alarms" in shown.output
    assert "0/8" in shown.output  # of the loss above 1000
    page = CliRunner().invoke(main, ["report", str(folder), "--out", str(folder / "page")])
    assert page.exit_code == 0, page.output
    text = (folder / "page" / "index.html").read_text(encoding="utf-8")
    assert "Which alarms of tiny rang" in text
    assert "train_loss&gt;1000</th><td>0/8</td>" in text


def test_a_digest_keeps_who_rang_of_the_whole_histories(trained: tuple[Path, Told, list[str]], tmp_path: Path) -> None:
    write_digest(open_study(trained[0]), trained[0], tmp_path)
    ours, theirs = (open_study(folder)["alarms"].to_dataset() for folder in (tmp_path, trained[0]))
    for name in theirs.data_vars:
        np.testing.assert_array_equal(ours[name].values, theirs[name].values)


# --- as they are written


@pytest.mark.parametrize(("text", "rule"), [
    ("kurtosis=12", Rule("kurtosis", 12.0)), ("kurtosis>12", Rule("kurtosis", 12.0)),
    (" update_rms < 2e-1 ", Rule("update_rms", 0.2, below=True)), ("scale=-3", Rule("scale", -3.0)),
    ("logit_sharpness at epsilon 0.0005=0.7", Rule("logit_sharpness at epsilon 0.0005", 0.7)),
])  # fmt: skip
def test_an_alarm_is_read_as_it_is_written(text: str, rule: Rule) -> None:
    assert rule_of(text) == rule
    assert rule_of(check_alarm(text)) == rule


@pytest.mark.parametrize(("alarm", "what"), [
    ("kurtosis=", "'kurtosis=' is no alarm: write NAME=VALUE"), ("=3", "'=3' is no alarm"),
    ("kurtosis=high", "a threshold is a finite number, got 'high'"), ("kurtosis=inf", "a finite number, got 'inf'"),
    ("kurtosis=nan", "a finite number, got 'nan'"),
    ("kurtosi=3", "the study records no signal 'kurtosi': did you mean 'kurtosis'?"),
    ("logit_sharpness at epsilon 0.3=1", "no signal 'logit_sharpness at epsilon 0.3': did you mean"),
])  # fmt: skip
def test_a_bad_alarm_is_one_line_before_any_work(alarm: str, what: str, tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    file.write_text(tiny().to_toml())
    done = CliRunner().invoke(main, ["sweep", str(file), "--out", str(tmp_path / "out"), "--alarm", alarm])
    assert done.exit_code == 2
    assert len(done.output.strip().splitlines()) == 1, done.output
    assert what in done.output
    assert not (tmp_path / "out").exists()


def test_an_alarm_on_what_is_not_recorded_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"alarms.thresholds: the study records no signal 'kurtosis': it records train_loss"
    ):
        study(["kurtosis=3"], signals={"every": 0}, probe={"every": 0})
    with pytest.raises(ValueError, match="named twice"):
        study(["kurtosis=3", "kurtosis>3.0"])


def test_without_a_threshold_and_without_the_study_that_has_one_the_option_asks_for_it(tmp_path: Path) -> None:
    with pytest.raises(
        StudyError,
        match=r"kurtosis has no threshold: .*warning.* is not there; give one, as in --alarm 'kurtosis=VALUE'",
    ):
        thresholds(["grad_norm=3", "kurtosis"], tmp_path)
    with pytest.raises(
        StudyError, match=r"which alarm is the best is not known: .*warning.* is not there; .*'NAME=VALUE'"
    ):
        thresholds(["best"], tmp_path)


def test_what_is_wrong_with_an_alarm_is_said_of_the_option_that_named_it() -> None:
    refused = CliRunner().invoke(main, ["sweep", str(STUDIES / "first-look-cpu.toml"), "--alarm", "gradnorm=3"])
    assert refused.exit_code == 2
    assert refused.stderr.startswith("exmy: --alarm: the study records no signal 'gradnorm': did you mean 'grad_norm'?")


def test_a_default_is_passed_by_one_of_twenty_runs_that_lived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.test_alarm_ranking import known_study

    (tmp_path / "warning").mkdir()
    monkeypatch.setattr("train.digest.has_digest", lambda _: True)
    tree = known_study()
    monkeypatch.setattr("train.store.open_study", lambda _: tree)
    kurtosis, falling = map(rule_of, thresholds(["kurtosis", "update_rms"], tmp_path))
    lived = ~np.isfinite(tree["summary"].to_dataset()["onset"].values)
    signals = tree["signals"].to_dataset()
    # Of 80 the ceil(0.95 x 81) = 77th smallest of their largest, and largest of their smallest: passed by three of them.
    assert kurtosis == Rule("kurtosis", float(np.sort(signals["kurtosis"].values.max(axis=1)[lived])[76]))
    assert falling == Rule("update_rms", float(np.sort(signals["update_rms"].values.min(axis=1)[lived])[3]), below=True)
    shutil.copyfile(STUDIES / "warning.toml", tmp_path / "warning" / "study.toml")
    ranked = rank_alarms(tree, 100.0, study=read_study(STUDIES / "warning.toml"))
    assert thresholds(["best"], tmp_path) == thresholds([str(ranked["signal"].values[0])], tmp_path)
    with pytest.raises(StudyError, match="attention_logit is no signal of warning"):
        thresholds(["attention_logit"], tmp_path)
    with pytest.raises(StudyError, match="' ' is no alarm: write NAME=VALUE"):
        thresholds([" "], tmp_path)


def test_with_its_default_an_alarm_says_what_became_of_it_there() -> None:
    from tests.test_alarm_ranking import known_study

    # Kurtosis rises 40 steps before the onset of all 40 runs that diverge; with a threshold above all it has nothing to say.
    of = Judged(known_study())
    kurtosis = Alarm("kurtosis")
    told = worth(of, kurtosis, of.threshold(kurtosis, 0.05))
    assert (
        "as 3 of 80 do; within 100 steps before they diverged it rang for 40 of 40 runs, and sooner for 0. Of another"
        in told
    )
    silent = worth(of, kurtosis, 100.0)
    assert "as 0 of 80 do" in silent
    assert "it rang for 0 of 40 runs, and sooner for 0. So it is no alarm to rely on, even there" in silent
    tree = known_study()
    tree["signals"].to_dataset()["kurtosis"].values[:, 0] = 50.0
    assert Judged(tree).first_the_loudest(kurtosis) == (80, 80)
    assert of.first_the_loudest(Alarm("clipped")) == (0, 80)
    early = worth(Judged(tree), kurtosis, 10.0)  # 200 steps before, which is beyond the horizon of 100
    assert (
        "as 80 of 80 do; within 100 steps before they diverged it rang for 0 of 40 runs, and sooner for 40; its"
        in early
    )
    assert "it rings there or never" in early


def test_nan_never_rings_and_infinity_always() -> None:
    values, steps = np.array([[NAN, 1.0, NAN], [np.inf, 2.0, NAN]]), np.array([0, 10])
    np.testing.assert_array_equal(first_heard(values, steps, Rule("x", 1.5))[0], [10.0, 10.0, NAN])
    np.testing.assert_array_equal(first_heard(values, steps, Rule("x", 1.5, below=True))[0], [10.0, 0.0, NAN])
    np.testing.assert_array_equal(first_heard(values[:0], steps[:0], Rule("x", 1.5))[0], [NAN] * 3)
