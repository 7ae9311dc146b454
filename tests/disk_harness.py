"""Disks that are really full, and directories that really can't be written to: `unshare -m python -m tests.disk_harness FOLDER`.

In a mount namespace of its own, where it may mount small file systems in memory that vanish with it: as root, or, with
`unshare -r`, where a user may have such a namespace. A study is trained on one whose room runs out at an instant that the
scenario chooses, once as it is and then, with room again, to its end. For each scenario a line of JSON says what was told, and
in which variables the outcome differs from that of a study that nobody disturbed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

from tests.kill_harness import Silent, differences
from tests.test_execute import tiny
from train import Study, StudyError, execute, open_study, run_study, status
from train.plan import PlannedPack
from train.program import Progress

SIZE = 4 * 2**20
FILLER = "filler"


class Disk:
    """A file system of 4 MiB in memory, mounted on a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        mount("-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder))
        self.folder = folder

    def fill(self, leave: int = 0) -> None:
        """Up to the last byte, but for `leave`."""
        with contextlib.suppress(OSError), (self.folder / FILLER).open("ab", buffering=0) as file:
            while free(self.folder) > leave:
                file.write(b"x" * min(4096, free(self.folder) - leave))

    def clear(self) -> None:
        """Room again."""
        (self.folder / FILLER).unlink(missing_ok=True)


def mount(*arguments: str) -> None:
    """CalledProcessError where it may not be done."""
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


usage = shutil.disk_usage


def free(folder: Path) -> int:
    return usage(folder).free


class At(Silent):
    """Does something when the n-th pack starts, and at its reports; 0 for every pack."""

    def __init__(self, number: int, start: Callable[[], None] = bool, report: Callable[[], None] = bool) -> None:  # type: ignore[assignment]
        self.number, self.start, self.report, self.begun = number, start, report, 0

    def pack_started(self, pack: PlannedPack) -> None:
        self.begun += 1
        if self.number in (0, self.begun):
            self.start()

    def pack_progress(self, pack: PlannedPack, progress: Progress) -> None:
        if self.number in (0, self.begun):
            self.report()


@contextlib.contextmanager
def lied_to() -> Iterator[None]:
    """Who asks how much is free hears "enough": as where somebody else takes it just after that."""
    with mock.patch.object(shutil, "disk_usage", lambda folder: usage(folder)._replace(free=2**40)):
        yield


def attempt(study: Study, directory: Path, observer: Silent) -> str:
    """What a sweep was refused with; "" where it came to its end."""
    try:
        run_study(study, directory, "cpu", observer)
    except StudyError as error:
        return str(error)
    return ""


def pack_write(disk: Disk, rescue: Path) -> str:
    """The room is gone when the second pack is written."""
    del rescue
    study = tiny(execution={"checkpoint_seconds": 0})
    return attempt(study, disk.folder / "study", At(2, start=disk.fill))


def checkpoint_write(disk: Disk, rescue: Path) -> str:
    """Room for results, and none for the state of a pack."""
    del rescue
    study = tiny(execution={"checkpoint_seconds": 1e-9})

    def start() -> None:
        disk.clear()
        disk.fill(leave=260_000)

    with lied_to():
        return attempt(study, disk.folder / "study", At(0, start=start))


def status_write(disk: Disk, rescue: Path) -> str:
    """No room for a status between the first pack's start and its last steps."""
    del rescue

    def wait() -> None:
        disk.fill()
        keeper.write()
        assert status.read_status(disk.folder / "study") is not None, "the one before"
        disk.clear()

    keeper = status.StatusFile(disk.folder / "study")
    with mock.patch.object(execute, "StatusFile", return_value=keeper):
        return attempt(tiny(execution={"checkpoint_seconds": 0}), disk.folder / "study", At(1, report=wait))


def study_write(disk: Disk, rescue: Path) -> str:
    """A study that grew, whose file has no room."""
    del rescue
    directory = disk.folder / "study"
    run_study(tiny(axes={"seed": 1}), directory, "cpu", Silent())
    before = (directory / "study.toml").read_bytes()
    with lied_to(), mock.patch.object(execute, "report_epochs", side_effect=lambda *_: disk.fill()):
        said = attempt(tiny(), directory, Silent())
    assert (directory / "study.toml").read_bytes() == before
    assert open_study(directory).attrs["runs_finished"] == 4
    return said


def full_from_the_start(disk: Disk, rescue: Path) -> str:
    """Nothing fits."""
    del rescue
    disk.fill()
    return attempt(tiny(), disk.folder / "study", Silent())


def read_only(disk: Disk, rescue: Path) -> str:
    """From the second pack's start on; what is there can be read, and a new sweep is refused."""
    del rescue
    directory = disk.folder / "study"

    def close() -> None:
        mount("--bind", str(directory), str(directory))
        mount("-o", "remount,ro,bind", str(directory))

    said = attempt(tiny(execution={"checkpoint_seconds": 0}), directory, At(2, start=close))
    assert open_study(directory).attrs["runs_finished"] == 4
    assert status.study_status(directory)["runs"]["finished"] == 4
    again = attempt(tiny(), directory, Silent())
    subprocess.run(["umount", str(directory)], check=True)
    return f"{said} | {again}"


SCENARIOS = (
    pack_write, checkpoint_write, status_write, study_write, full_from_the_start, read_only,
)  # fmt: skip


class Lines(logging.Handler):
    """The messages of warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def run(scenario: Callable[[Disk, Path], str], folder: Path, whole: Path) -> dict[str, object]:
    """What was said and logged, what was left half written, what was trained after that, and what of it differs."""
    heard = Lines()
    logging.getLogger("train").addHandler(heard)
    disk, rescue = Disk(folder / scenario.__name__), folder / f"{scenario.__name__}-rescue"
    with mock.patch.object(tempfile, "tempdir", str(rescue)):
        rescue.mkdir()
        said = scenario(disk, rescue)
    logging.getLogger("train").removeHandler(heard)
    directory = disk.folder / "study"
    parts = [str(path.relative_to(directory)) for path in directory.rglob(".*.part")]
    rescued = len(list((rescue / "exmy-rescued" / "packs").glob("*.nc")))
    disk.clear()
    outcome = run_study(tiny(), directory, "cpu", Silent())
    return {
        "scenario": scenario.__name__, "said": said, "logged": heard.lines, "parts": parts, "rescued": rescued,
        "trained_after": outcome.trained, "differences": list(differences(directory, whole)),
        "state": status.study_status(directory)["state"],
    }  # fmt: skip


def main() -> None:
    """All scenarios, each as a line."""
    folder = Path(sys.argv[1])
    mount(
        "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(folder)
    )  # goes with the namespace, and all that is mounted below it
    run_study(tiny(), folder / "whole", "cpu", Silent())
    for scenario in SCENARIOS:
        print(json.dumps(run(scenario, folder, folder / "whole")), flush=True)


if __name__ == "__main__":
    main()
