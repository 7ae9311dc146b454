"""`--executor ray`: on a local cluster of two workers, the bits of one process; and what can be said without a cluster."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
import torch
from click.testing import CliRunner

from exmy.cli import main
from tests.test_execute import Recorder, tiny
from tests.test_executors import Witness, alone, assert_same, four_packs
from tests.test_schedule import DONE
from train import StudyError, run_study
from train.interruption import Interrupted, Interruption
from train.one_pack import Setting
from train.plan import plan
from train.remote import Remote, is_url
from train.schedule import Schedule

__all__ = ["alone"]  # the fixture

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'exmy[ray]'"
)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two workers, which know of a file that tells one of them to die."""
    import ray

    from train import on_ray

    monkeypatch.setenv("EXMY_FAULT", str(tmp_path / "once"))
    monkeypatch.setenv("EXMY_CACHE", str(tmp_path / "cache"))
    on_ray._connect("cpu", 2, None)
    yield on_ray
    ray.shutdown()


@needs_ray
def test_a_ray_cluster_gives_the_bits_of_one_process_whatever_is_lost_on_the_way(
    cluster: Any, tmp_path: Path, alone: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One cluster for three sweeps, since it takes seconds to start."""
    from tests import dying_task

    # Into a shared directory; a worker dies in the middle of a pack, and Ray starts another.
    (tmp_path / "once").touch()
    monkeypatch.setattr(cluster, "train_there", dying_task.train_there)
    witness = Witness()
    with caplog.at_level(logging.INFO, "train"):
        outcome = run_study(four_packs(), tmp_path / "shared", "cpu", witness, executor="ray")
    monkeypatch.undo()
    assert (outcome.trained, outcome.directory) == (8, tmp_path / "shared")
    assert not (tmp_path / "once").exists()
    [again] = [record.message for record in caplog.records if "going on after step 9" in record.message]
    assert "/checkpoints/" in again
    assert sorted(pack.hash for pack in witness.packs) == sorted(witness.ended)
    assert len(witness.ended) == 4
    assert_same(tmp_path / "shared", alone)

    # To a URL; then again, when one of its packs has gone.
    monkeypatch.setenv("EXMY_CACHE", str(tmp_path / "cache"))
    url = f"file://{tmp_path}/url"
    assert run_study(four_packs(), url, "cpu", Recorder(), executor="ray").trained == 8
    next((tmp_path / "url" / "packs").glob("*.nc")).unlink()
    outcome = run_study(four_packs(), url, "cpu", Recorder(), executor="ray")
    assert (outcome.trained, outcome.found) == (2, 6)
    assert_same(outcome.directory, alone)
    there = sorted(path.relative_to(tmp_path / "url").as_posix() for path in (tmp_path / "url").rglob("*.*"))
    assert [Path(name).suffix for name in there] == [".nc", ".sha256"] * 4 + [".toml"]

    # A signal: those at work end their step, and keep it.
    long = four_packs(training={"steps": 3000})
    stopper = Witness(1, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted) as stop:
        run_study(long, tmp_path / "long", "cpu", stopper, executor="ray")
    assert stop.value.number == signal.SIGTERM
    kept = [json.loads(file.read_text())["step"] for file in (tmp_path / "long" / "checkpoints").glob("*/*.json")]
    assert sorted(kept) == list(stop.value.steps)
    assert kept
    assert not stopper.ended


@needs_ray
def test_a_directory_that_a_worker_does_not_have_is_refused(tmp_path: Path) -> None:
    from train import on_ray

    study = tiny()
    (tmp_path / "study.toml").write_text("another", encoding="utf-8")
    for directory in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(StudyError, match=rf"{directory}: not the study's on .* a URL such as s3://"):
            on_ray._check_shared(Setting(study, directory, "cpu", {}))


@needs_ray
@pytest.mark.parametrize(
    ("faults", "lacking"),
    [(2, 0), (3, 0), (5, 0), (99, 4)],
    ids=["for a moment", "for a pack", "for three", "for good"],
)
def test_a_network_that_fails_costs_no_pack_and_no_more_is_claimed_than_is_here(
    faults: int, lacking: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    """Four tasks of a cluster that is made up, all of which end with their packs at the URL."""
    from train import on_ray

    url, copy = f"file://{tmp_path}/url", tmp_path / "copy"
    there, cancelled, left = tmp_path / "url" / "packs", [], [faults]
    packs = plan(four_packs(), torch.device("cpu"))
    there.mkdir(parents=True)
    for pack in packs:
        (there / f"{pack.hash}.nc").write_bytes(pack.hash.encode())
    real = Remote.fetch_pack

    def fetch_pack(remote: Remote, directory: Path, name: str) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise ConnectionResetError("Connection reset by peer")
        real(remote, directory, name)

    monkeypatch.setattr(Remote, "fetch_pack", fetch_pack)
    monkeypatch.setattr(on_ray, "PAUSE", 0.0)
    monkeypatch.setattr(on_ray, "_board", lambda: None)
    monkeypatch.setattr(on_ray, "_news", lambda *_: None)
    monkeypatch.setattr(on_ray, "_task", lambda *_: SimpleNamespace(remote=lambda *_: object()))
    monkeypatch.setattr("ray.put", lambda of: of)
    monkeypatch.setattr("ray.wait", lambda refs, **_: (refs[:1], refs[1:]))
    monkeypatch.setattr("ray.get", lambda _: DONE)
    monkeypatch.setattr("ray.cancel", lambda ref, **_: cancelled.append(ref))
    schedule, witness, interruption = Schedule(packs, lambda *_: None), Witness(), Interruption()
    texts: dict[str, Any] = {pack.program.dataset: None for pack in packs}
    site = on_ray.OnRay("cpu", copy, Remote(url))
    with caplog.at_level(logging.WARNING, "train.on_ray"):
        site.train(schedule, Setting(four_packs(), copy, "cpu", {}), texts, 0, witness, interruption)
    here = sorted(path.stem for path in copy.rglob("*.nc"))
    assert here == sorted(witness.ended) == sorted(pack.hash for pack in schedule.finished)
    assert len(here) == 4 - lacking
    assert not cancelled
    said = [record.message for record in caplog.records]
    first = [line for line in said if line.endswith("tried again at the end")]
    # Three tries for the first pack that fails, one for each that ends while one is owed.
    assert len(first) == max(0, min(4, faults - 2))
    if not lacking:
        schedule.conclude(interruption)
        assert said == first
        return
    with pytest.raises(StudyError) as refusal:
        schedule.conclude(interruption)
    assert (
        said[-1]
        == str(refusal.value)
        == (
            f"{url}: 4 packs finished there and can't be fetched (ConnectionResetError: Connection reset by peer): run the "
            "sweep again, which fetches what is missing here"
        )
    )


@needs_ray
def test_a_cluster_that_is_not_there_is_said_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from train import on_ray

    with pytest.raises(
        StudyError, match=r"workers is for a cluster that is started here, and the one at auto has its own"
    ):
        on_ray._connect("cpu", 2, "auto")

    def refuse(**options: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.\nPlease")

    monkeypatch.setattr("ray.init", refuse)
    with pytest.raises(
        StudyError, match=r"no Ray cluster at auto \(ConnectionError: Could not find .*\); start one by"
    ):
        run_study(tiny(), tmp_path / "out", "cpu", executor="ray", ray_address="auto")
    assert not (tmp_path / "out").exists()


def test_without_ray_the_executor_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == "train.on_ray" or name.partition(".")[0] == "ray"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.chdir(tmp_path)
    said = CliRunner().invoke(main, ["sweep", "--device", "cpu", "--executor", "ray"])
    assert said.exit_code == 2
    assert said.stderr == "exmy: the executor 'ray' needs Ray: pip install 'exmy[ray]'\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("out", "is_one"),
    [("s3://bucket/a", True), ("file:///tmp/a", True), ("runs/a", False), ("/tmp/a", False), (Path("s3://b/a"), False)],
)
def test_a_path_is_no_url(out: Path | str, is_one: bool) -> None:
    assert is_url(out) is is_one


@pytest.mark.parametrize("url", ["memory://study-{}", "file://{}/url"])
def test_a_study_at_a_url_is_copied_and_what_is_damaged_or_gone_there_is_too(url: str, tmp_path: Path) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    (mine / "packs").mkdir(parents=True)
    (other / "packs").mkdir(parents=True)
    names = ["0" * 16 + ".nc", "1" * 16 + ".nc"]
    for name in names:
        (mine / "packs" / name).write_bytes(name.encode())
        (mine / "packs" / name).with_suffix(".sha256").write_text(
            f"{hashlib.sha256(name.encode()).hexdigest()}  {name}\n"
        )
    (mine / "study.toml").write_text("a study", encoding="utf-8")
    remote = Remote(url.format(tmp_path))
    remote.fetch(other)
    assert [path.name for path in other.rglob("*")] == ["packs"], "nothing is there yet"
    remote.send(mine, "study.toml")
    for name in names:
        remote.send_pack(mine, name)
    (other / "packs" / f"{'2' * 16}.nc").write_bytes(b"not at the URL")
    (other / "pack_sizes.json").write_bytes(b"not at the URL")
    Remote(url.format(tmp_path)).fetch(other)
    assert {p.relative_to(other): p.read_bytes() for p in other.rglob("*.*")} == {
        p.relative_to(mine): p.read_bytes() for p in mine.rglob("*.*")
    }
    files, root = fsspec.core.url_to_fs(url.format(tmp_path))
    assert sorted(Path(path).name for path in files.find(root)) == sorted(
        ["study.toml", *names, *(name.replace(".nc", ".sha256") for name in names)]
    ), "nothing half-written is left"
    files.pipe_file(f"{root}/packs/../evil.nc", b"no")
    files.pipe_file(f"{root}/packs/evil.nc", b"no")
    remote.fetch(other)
    assert not list(other.rglob("evil.nc")), "no name that a stranger chose"


@pytest.mark.parametrize("url", ["memory://again-{}", "file://{}/url"])
@pytest.mark.parametrize("sealed", [True, False])
def test_a_pack_that_is_another_at_the_url_is_fetched_again_and_no_other(
    sealed: bool, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one name, since its runs and its R are the same: trained again, after the first was removed there."""
    mine, copy = tmp_path / "mine" / "packs", tmp_path / "copy"
    mine.mkdir(parents=True)
    (copy / "packs").mkdir(parents=True)
    remote = Remote(url.format(tmp_path))
    again, kept = f"{'0' * 16}.nc", f"{'1' * 16}.nc"

    def put(name: str, content: bytes, *, seal: bool = True) -> None:
        (mine / name).write_bytes(content)
        remote.send(mine.parent, f"packs/{name}")
        if seal:
            checksum = (mine / name).with_suffix(".sha256")
            checksum.write_text(f"{hashlib.sha256(content).hexdigest()}  {name}\n")
            remote.send(mine.parent, f"packs/{checksum.name}")

    put(again, b"first")
    put(kept, b"whole")
    remote.fetch(copy)
    if sealed:
        put(again, b"other")  # as long as before
    else:
        put(again, b"longer than before", seal=False)
        files, root = fsspec.core.url_to_fs(url.format(tmp_path))
        files.rm_file(f"{root}/packs/{again.replace('.nc', '.sha256')}")
        (mine / again).with_suffix(".sha256").unlink()
    fetched: list[str] = []
    real = Remote.fetch_pack

    def fetch_pack(self: Remote, directory: Path, name: str) -> None:
        fetched.append(name)
        real(self, directory, name)

    monkeypatch.setattr(Remote, "fetch_pack", fetch_pack)
    for _ in range(2):
        remote.fetch(copy)
    assert fetched == [again]
    assert {path.name: path.read_bytes() for path in (copy / "packs").iterdir()} == {
        path.name: path.read_bytes() for path in mine.iterdir()
    }


@pytest.mark.parametrize(
    ("url", "message"),
    [("nothing://bucket/a", "nothing://bucket/a: Protocol not known"), ("sftp://host/a", "sftp://host/a: ")],
)
def test_a_url_that_can_not_be_opened_is_said_in_a_line(url: str, message: str) -> None:
    with pytest.raises(StudyError, match=message) as refusal:
        Remote(url)
    assert "\n" not in str(refusal.value)


def test_a_url_that_can_not_be_written_is_said_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "study.toml").touch()
    with pytest.raises(StudyError, match=rf"file://{tmp_path}/file/url: study.toml can't be written there"):
        Remote(f"file://{tmp_path}/file/url").send(tmp_path, "study.toml")


def test_no_fault_is_left_in_the_environment() -> None:
    assert "EXMY_FAULT" not in os.environ
