"""A clock that is set back or forward by days while a study trains: the same bits, and a status that is right again at once."""

from __future__ import annotations

import datetime
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kill_harness import differences
from tests.test_execute import Recorder, Stopper, tiny
from train import execute, run_study, study_status
from train.status import STALE, STATUS_FILE, StatusFile, utc_now

DAYS = (0.0, 3.0, -9.0, 400.0, -400.0, 0.001)


def jumping() -> Callable[[], float]:
    """A wall clock that is days off, by another number of them at each look."""
    real, days = time.time, itertools.cycle(DAYS)
    return lambda: real() + 86_400 * next(days)


def test_a_jumping_clock_changes_no_bit_and_loses_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints at every step, a stop in the middle, and going on."""
    study = tiny(execution={"checkpoint_seconds": 1e-9})
    run_study(study, tmp_path / "whole", "cpu", Recorder())
    clock = jumping()
    monkeypatch.setattr(time, "time", clock)

    def status(directory: Path, margin: float) -> StatusFile:
        return StatusFile(directory, now=lambda: datetime.datetime.fromtimestamp(clock(), datetime.UTC), margin=margin)

    monkeypatch.setattr(execute, "StatusFile", status)
    with pytest.raises(KeyboardInterrupt):
        run_study(study, tmp_path / "jumped", "cpu", Stopper(2))
    resumed = Recorder()
    assert run_study(study, tmp_path / "jumped", "cpu", resumed).found == 4
    assert resumed.steps == [12], "in the middle of the second pack"
    assert list(differences(tmp_path / "jumped", tmp_path / "whole")) == []
    assert not list((tmp_path / "jumped" / "checkpoints").iterdir())


def test_progress_is_measured_by_a_clock_that_nobody_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", jumping())
    run_study(tiny(), tmp_path, "cpu", Recorder())
    told = json.loads((tmp_path / STATUS_FILE).read_text())
    assert 0 < told["seconds"] < 3600
    assert all(0 <= pack["seconds"] < 3600 for pack in study_status(tmp_path)["packs"])


@pytest.mark.parametrize("days", [-2.0, 2.0])
def test_a_heartbeat_of_another_day_is_stale_whichever_way_the_clock_went(days: float, tmp_path: Path) -> None:
    """A process that is alive writes the next one within seconds; one that was killed never does."""
    with pytest.raises(KeyboardInterrupt):
        run_study(tiny(), tmp_path, "cpu", Stopper(2))
    left = json.loads((tmp_path / STATUS_FILE).read_text())
    beat = utc_now()
    (tmp_path / STATUS_FILE).write_text(json.dumps(left | {"state": "running", "heartbeat": beat.isoformat()}))
    assert study_status(tmp_path, lambda: beat)["state"] == "running"
    assert study_status(tmp_path, lambda: beat - datetime.timedelta(seconds=STALE - 5))["state"] == "running"
    assert study_status(tmp_path, lambda: beat + datetime.timedelta(days=days))["state"] == "stale"
