"""A sweep that computed nothing leaves nothing behind, and takes away nothing that was there."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.test_execute import tiny
from train import StudyError, run_study
from train.lock import LOCK_FILE, locked
from train.status import study_status

REFUSED = StudyError("no such text")


def everything(folder: Path) -> dict[str, bytes]:
    """Every path under a folder, with the content of files."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


def ended_by(error: BaseException) -> Any:
    def load_texts(*_: object) -> None:
        raise error

    return load_texts


@pytest.mark.parametrize("error", [REFUSED, KeyboardInterrupt(), MemoryError()], ids=["refused", "Ctrl-C", "failed"])
@pytest.mark.parametrize(
    "there", [[], ["new"], ["new/study"], ["new/study/packs"], ["new/study/notes.txt"], ["new/study/.lock"]]
)
def test_what_was_made_goes_and_what_was_there_stays(
    there: list[str], error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in there:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine\n") if path.suffix or name.endswith(LOCK_FILE) else path.mkdir()
    before = everything(tmp_path)
    monkeypatch.setattr("train.execute.load_texts", ended_by(error))
    with pytest.raises(type(error)):
        run_study(tiny(), tmp_path / "new" / "study", "cpu")
    after = everything(tmp_path)
    assert after.keys() == before.keys()
    assert {name: of for name, of in after.items() if not name.endswith(LOCK_FILE)} == {
        name: of for name, of in before.items() if not name.endswith(LOCK_FILE)
    }


def test_a_study_that_was_begun_stays(tmp_path: Path) -> None:
    """Ctrl-C before the first pack, when the study is written down: `exmy resume` goes on with it."""

    class Stopped:
        def planned(self, *_: object) -> None:
            raise KeyboardInterrupt

    out = tmp_path / "study"
    with pytest.raises(KeyboardInterrupt):
        run_study(tiny(), out, "cpu", Stopped())  # type: ignore[arg-type]
    assert {"study.toml", LOCK_FILE} <= {path.name for path in out.iterdir()}
    assert study_status(out)["state"] == "interrupted"


def test_folders_that_were_made_on_the_way_to_one_that_can_not_be_go(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"can't write there \(File name too long\)"):
        run_study(tiny(), tmp_path / "runs" / "mine" / ("n" * 300), "cpu")
    assert everything(tmp_path) == {}


def test_finished_runs_of_another_study_stay(tmp_path: Path) -> None:
    out = tmp_path / "study"
    run_study(tiny(), out, "cpu")
    before = everything(out)
    with pytest.raises(StudyError, match="of another study"):
        run_study(tiny(training={"steps": 9, "warmup": 2}), out, "cpu")
    after = everything(out)
    assert before.keys() == after.keys()
    assert all(after[name] == of for name, of in before.items() if name not in (LOCK_FILE, "status.json"))


def test_who_waited_for_a_directory_that_went_has_its_own_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It had opened a file that has no name any more; held as it is, a third could have the directory as well."""
    monkeypatch.setattr("train.lock.PATIENCE", 60.0)
    opened = threading.Event()
    really = os.pread

    def pread(*arguments: Any) -> bytes:
        opened.set()
        return really(*arguments)

    has: list[bool] = []

    def wait() -> None:
        with locked(tmp_path) as file:
            has.append(os.path.samestat(os.fstat(file), (tmp_path / LOCK_FILE).stat()))

    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(tmp_path))
        (tmp_path / LOCK_FILE).write_text("nobody\n")  # so that it is waited for
        monkeypatch.setattr("os.pread", pread)
        waiting = threading.Thread(target=wait)
        waiting.start()
        assert opened.wait(60)
        (tmp_path / LOCK_FILE).unlink()
    waiting.join(60)
    assert has == [True]
