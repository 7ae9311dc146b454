"""`exmy status` at every moment of a study's life: before, during and after, killed, stopped and failed."""

from __future__ import annotations

import datetime
import json
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from exmy.cli import main
from tests.test_execute import Recorder, Stopper, tiny
from train import StudyError, run_study, study_status
from train.interruption import Interrupted
from train.observer import Together
from train.status import HEARTBEAT, STALE, STATUS_FILE, StatusFile
from train.store import STUDY_FILE

LATER = datetime.timedelta(seconds=STALE + 5)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def fields(words: str) -> set[str]:
    return set(words.split())


def at(moment: datetime.datetime) -> Any:
    return lambda: moment


class Witness(Recorder):
    """Asks for the status while a study runs: as another shell would, from its directory alone."""

    def __init__(self, directory: Path, error: BaseException | None = None) -> None:
        super().__init__()
        self.directory, self.error, self.seen = directory, error, list[dict[str, Any]]()

    def pack_progress(self, pack: Any, progress: Any) -> None:
        super().pack_progress(pack, progress)
        self.seen.append(study_status(self.directory))
        if self.error and len(self.packs) == 2:
            raise self.error


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A directory whose study has had its first pack of two trained, and was stopped in the second by Ctrl-C."""
    with pytest.raises(KeyboardInterrupt):
        run_study(tiny(), tmp_path, "cpu", Witness(tmp_path, KeyboardInterrupt()))
    return tmp_path


def test_who_names_a_study_file_or_the_folder_of_studies_is_told_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "study.toml").touch()
    assert "study.toml: a file, and no study directory; " in invoke("status", tmp_path / "study.toml").output
    for name in "abcdefg":
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "study.toml").touch()
        told = invoke("status", tmp_path / "runs").output
        if name == "a":
            assert told == f"exmy: {tmp_path / 'runs'}: no study.toml here; do you mean {tmp_path / 'runs' / 'a'}?\n"
    assert told.endswith("runs: no study.toml here; studies in it are a, b, c, d, e and 2 more\n")


def test_a_directory_without_a_study_is_refused_in_one_line(tmp_path: Path) -> None:
    for directory, missing in ((tmp_path, "no study.toml here"), (tmp_path / "absent", "there is no such directory")):
        refused = invoke("status", directory)
        assert refused.exit_code == 2
        assert refused.output.strip() == (
            f"exmy: {directory}: {missing}; a study directory is what `exmy sweep --out DIR` writes"
        )


def test_a_study_named_without_its_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / STUDY_FILE).write_text(tiny().to_toml())
    monkeypatch.chdir(tmp_path)
    refused = invoke("status", "mine")
    assert (refused.exit_code, refused.output) == (
        2,
        "exmy: mine: there is no such directory; do you mean runs/mine?\n",
    )


def test_a_study_that_nobody_began(tmp_path: Path) -> None:
    (tmp_path / STUDY_FILE).write_text(tiny().to_toml())
    status = study_status(tmp_path)
    assert status["state"] == "not_started"
    assert status["runs"] == {"planned": 8, "finished": 0, "diverged": 0, "definition": "no_progress"}
    shown = invoke("status", tmp_path)
    assert shown.exit_code == 0
    assert "tiny not started: none of 8 runs has begun" in shown.output
    assert f"To go on: exmy resume {tmp_path}" in shown.output.replace("\n", "")


def test_a_study_under_way_is_running(tmp_path: Path) -> None:
    witness = Witness(tmp_path)
    run_study(tiny(), tmp_path, "cpu", witness)
    first = witness.seen[0]
    assert first["state"] == "running"
    assert first["under_way"]["packs_planned"] == 2
    assert first["under_way"]["run_steps"] == 8 * 12
    assert first["runs"]["finished"] == 0
    assert [status["runs"]["finished"] for status in witness.seen[-2:]] == [4, 4]


def test_a_finished_study(tmp_path: Path) -> None:
    run_study(tiny(), tmp_path, "cpu", Recorder())
    status = study_status(tmp_path)
    assert (status["state"], status["message"], status["under_way"]) == ("finished", "all 8 runs are finished", None)
    assert [pack["runs"] for pack in status["packs"]] == [4, 4]
    assert {pack["hash"] for pack in status["packs"]} == {path.stem for path in (tmp_path / "packs").iterdir()}
    assert sum(pack["diverged"] for pack in status["packs"]) == status["runs"]["diverged"]
    shown = invoke("status", tmp_path)
    assert shown.exit_code == 0
    assert "8 of 8 runs finished" in shown.output
    (tmp_path / STATUS_FILE).unlink()  # the packs are the truth
    assert study_status(tmp_path)["state"] == "finished"


def test_ctrl_c_is_told_from_a_kill(begun: Path) -> None:
    status = study_status(begun)
    assert status["state"] == "interrupted"
    assert "stopped by hand" in status["message"]
    assert "4 of 8 runs are still to be trained" in status["message"]
    told = json.loads((begun / STATUS_FILE).read_text())
    told["state"] = "running"  # as a process leaves it that had no time to say good-bye
    (begun / STATUS_FILE).write_text(json.dumps(told))
    beat = datetime.datetime.fromisoformat(told["heartbeat"])
    assert study_status(begun, at(beat + LATER / 2))["state"] == "running"
    killed = study_status(begun, at(beat + LATER))
    assert killed["state"] == "stale"
    assert f"no sign of life since {told['heartbeat']}" in killed["message"]
    assert killed["under_way"]["packs"][0]["step"] == 10


def test_a_scheduler_that_ends_the_job_is_told_from_ctrl_c(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run_study(tiny(), tmp_path, "cpu", Stopper(signal.SIGTERM))
    status = study_status(tmp_path)
    assert status["state"] == "interrupted"
    assert "stopped by SIGTERM at" in status["message"]


def test_the_live_rule_is_by_the_studys_own_margin(tmp_path: Path) -> None:
    run_study(tiny(divergence={"progress_margin": 0.7}), tmp_path, "cpu", Recorder())
    assert " is not 0.7 nats below " in json.loads((tmp_path / STATUS_FILE).read_text())["live_rule"]


def test_an_error_is_told(tmp_path: Path) -> None:
    with pytest.raises(StudyError):
        run_study(tiny(), tmp_path, "cpu", Witness(tmp_path, StudyError("no room\nleft")))
    status = study_status(tmp_path)
    assert status["state"] == "failed"
    assert "no room left" in status["message"]
    assert "no room left" in invoke("status", tmp_path).output.replace("\n", " ")


def test_a_study_that_grew_is_incomplete(tmp_path: Path) -> None:
    run_study(tiny(), tmp_path, "cpu", Recorder())
    (tmp_path / STUDY_FILE).write_text(tiny(axes={"seed": 3}).to_toml())
    status = study_status(tmp_path)
    assert status["state"] == "incomplete"
    assert status["runs"]["planned"] == 12
    assert status["runs"]["finished"] == 8


def test_what_is_finished_is_not_told_as_under_way(begun: Path) -> None:
    """Between a pack's file and the next heartbeat both know it: the file is right."""
    told = json.loads((begun / STATUS_FILE).read_text())
    finished = study_status(begun)["packs"][0]["hash"]
    told["packs"][0]["hash"] = finished
    (begun / STATUS_FILE).write_text(json.dumps(told))
    assert study_status(begun)["under_way"]["packs"] == []


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"schema": 1}', '{"schema": 99, "heartbeat": "2026-01-01"}']
)
def test_a_status_file_that_means_nothing_is_passed_over(begun: Path, content: str) -> None:
    (begun / STATUS_FILE).write_text(content)
    assert study_status(begun)["state"] == "incomplete"


def test_json_has_the_documented_fields_and_no_others(begun: Path) -> None:
    answer = invoke("status", begun, "--json")
    assert answer.exit_code == 0
    status = json.loads(answer.output, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert set(status) == fields(
        "schema name study_hash directory state message runs packs_finished digest packs snapshots landscape alarms under_way"
    )
    assert set(status["packs"][0]) == fields(
        "hash runs pack_size diverged device written seconds seconds_first_step ended_early_at"
    )
    assert set(status["under_way"]) == fields(
        "schema state error started heartbeat live_rule device runs_found runs_planned packs_planned packs_finished "
        "run_steps run_steps_done seconds seconds_left alive non_finite no_progress dead memory_bytes packs rang"
    )
    assert set(status["under_way"]["packs"][0]) == fields(
        "number hash dataset model recipes runs pack_size state step steps seconds seconds_first_step steps_per_second "
        "run_steps_per_second seconds_left alive non_finite no_progress dead rang"
    )


def test_a_status_that_cannot_be_written_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / STATUS_FILE).mkdir()  # no file can take its place
    outcome = run_study(tiny(), tmp_path, "cpu", Recorder())
    assert outcome.trained == 8
    assert [r.message for r in caplog.records if "can't be written" in r.message] == [caplog.records[0].message]
    assert not list(tmp_path.glob(f".{STATUS_FILE}*"))


def test_the_heartbeat_ends_with_the_work(tmp_path: Path) -> None:
    with StatusFile(tmp_path):
        assert any(thread.name == "exmy-status" for thread in threading.enumerate())
    assert not any(thread.name == "exmy-status" for thread in threading.enumerate())
    assert json.loads((tmp_path / STATUS_FILE).read_text())["state"] == "finished"
    assert HEARTBEAT < STALE / 10  # a late writing or two is no death


def test_all_observers_hear_everything(tmp_path: Path) -> None:
    one, other = Recorder(), Recorder()
    run_study(tiny(), tmp_path, "cpu", Together(one, other))
    assert one.steps == other.steps != []
    assert len(one.packs) == len(other.packs) == 2
