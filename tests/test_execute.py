"""A study from file to DataTree: nothing finished is trained again, nothing computed is lost, every number is labelled."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import logging
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from train import Study, StudyError, durable, one_pack, open_study, run_study, site, store, streams, text
from train.interruption import Interrupted
from train.lock import locked
from train.loss_scale import DynamicLossScale
from train.plan import PlannedPack, choose_pack_size, plan
from train.program import PackResult, Progress
from train.schema import GROUPS, OPTIONAL, RUN_COORDINATES

ROOT = Path(__file__).parent.parent


def tiny(**changes: Any) -> Study:
    """Eight runs of a second in all."""
    content: dict[str, Any] = {
        "name": "tiny",
        "axes": {"recipe": ["e8m7", "e4m3"], "learning_rate": [1e-3, 4e-3], "seed": 2},
        "model": {"layers": 1, "heads": 2, "width": 16, "context": 16},
        "training": {"steps": 12, "sequences": 2, "warmup": 3, "evaluate_every": 5, "evaluation_batches": 1},
        "probe": {"every": 6},
        "execution": {"pack_size": 4},
    }
    for table, values in changes.items():
        content[table] = {**content.get(table, {}), **values} if isinstance(values, dict) else values
    return Study.model_validate(content)


class Recorder:
    """An observer that remembers, and does something at the start of the n-th pack."""

    def __init__(self, at_pack: int = -1, action: Callable[[], None] | None = None) -> None:
        self.packs: list[PlannedPack] = []
        self.finished = 0
        self.steps: list[int] = []
        self.at_pack, self.action = at_pack, action

    def planned(self, packs: list[PlannedPack], finished: int, device: str) -> None:
        self.finished = finished

    def pack_started(self, pack: PlannedPack) -> None:
        self.packs.append(pack)
        if len(self.packs) == self.at_pack and self.action:
            self.action()

    def pack_progress(self, pack: PlannedPack, progress: Progress) -> None:
        self.steps.append(progress.step)

    def pack_finished(self, pack: PlannedPack, result: PackResult) -> None:
        pass


def runs(recorder: Recorder) -> int:
    return sum(len(pack.runs) for pack in recorder.packs)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny study."""
    directory = tmp_path_factory.mktemp("tiny")
    run_study(tiny(), directory, "cpu", Recorder())
    return directory


def test_every_run_is_there_with_its_coordinates(finished: Path) -> None:
    tree = open_study(finished)
    assert set(tree.children) == {"history", "evaluation", "sharpness", "signals", "summary"}
    assert tree["history"]["train_loss"].shape == (8, 12)
    assert tree["evaluation"].to_dataset()["eval_step"].values.tolist() == [0, 5, 10, 12]
    assert tree["sharpness"].to_dataset()["probe_step"].values.tolist() == [0, 6, 12]
    wanted = [(r.identity, r.recipe.name, r.learning_rate, r.seed) for r in tiny().runs()]
    for node in tree.children.values():
        group = node.to_dataset()
        found = [group[name].values.tolist() for name in ("run", "recipe", "learning_rate", "seed")]
        assert list(zip(*found, strict=True)) == wanted


def test_the_schema_describes_every_variable(finished: Path) -> None:
    tree = open_study(finished)
    for name, group in tree.children.items():
        assert set(group.data_vars) == set(GROUPS[name]) & set(group.data_vars) == set(group.data_vars)
        assert set(RUN_COORDINATES) <= set(group.coords)
        for variable, values in group.to_dataset().data_vars.items():
            row = GROUPS[name][str(variable)]
            assert values.dims == row.dims
            assert values.attrs["units"] == row.units
            assert values.attrs["long_name"]
            assert values.attrs["source"]
        for coordinate in set(group.coords) - {"run"}:
            assert {"units", "long_name"} <= set(group[str(coordinate)].attrs), coordinate
    for key in ("version_torch", "device", "git_commit", "study_hash", "dataset_sha256", "baseline", "seconds"):
        assert tree.attrs[key], key
    for recipe in {run.recipe for run in tiny().runs()}:
        assert f"{recipe.name}: {recipe.description}" in tree.attrs["recipes"]


def test_every_described_variable_is_written(finished: Path) -> None:
    tree = open_study(finished)
    for name, rows in GROUPS.items():
        assert set(tree[name].data_vars) == set(rows) - OPTIONAL


def test_the_tree_survives_netcdf(finished: Path, tmp_path: Path) -> None:
    tree = open_study(finished)
    tree.to_netcdf(tmp_path / "tree.nc", engine="h5netcdf")
    with xr.open_datatree(tmp_path / "tree.nc", engine="h5netcdf") as again:
        xr.testing.assert_identical(again.load().to_dict()["/history"], tree.to_dict()["/history"])
        xr.testing.assert_equal(again.to_dict()["/summary"], tree.to_dict()["/summary"])


def test_a_second_call_trains_nothing(finished: Path) -> None:
    recorder = Recorder()
    outcome = run_study(tiny(), finished, "cpu", recorder)
    assert (outcome.trained, outcome.found, runs(recorder), recorder.finished) == (0, 8, 0, 8)


def test_a_study_that_grew_trains_what_is_new(tmp_path: Path) -> None:
    run_study(tiny(), tmp_path, "cpu", Recorder())
    before = open_study(tmp_path)["history"].to_dataset()["train_loss"]
    recorder = Recorder()
    larger = tiny(axes={"recipe": ["e8m7", "e4m3", "e8m1"], "seed": 3})
    outcome = run_study(larger, tmp_path, "cpu", recorder)
    assert (outcome.trained, outcome.found) == (3 * 2 * 3 - 8, 8)
    after = open_study(tmp_path)["history"].to_dataset()["train_loss"]
    assert after.sizes["run"] == 18
    xr.testing.assert_identical(after.sel(run=before["run"].values), before)


def test_an_interrupted_study_goes_on_where_packs_ended(tmp_path: Path, finished: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(tiny(), tmp_path, "cpu", Recorder(at_pack=2, action=interrupt))
    assert open_study(tmp_path).attrs["runs_finished"] == 4
    recorder = Recorder()
    run_study(tiny(), tmp_path, "cpu", recorder)
    assert runs(recorder) == 4
    xr.testing.assert_identical(
        open_study(tmp_path)["history"].to_dataset(), open_study(finished)["history"].to_dataset()
    )


def test_a_padded_pack_gives_the_numbers_of_a_full_one(tmp_path: Path, finished: Path) -> None:
    """The last three runs alone, in a pack of four with one slot of padding: the same bits."""
    study = tiny(axes={"recipe": ["e4m3"], "learning_rate": [4e-3]})
    run_study(study, tmp_path, "cpu", Recorder())
    alone, among = open_study(tmp_path)["history"].to_dataset(), open_study(finished)["history"].to_dataset()
    assert alone.sizes["run"] == 2
    assert alone["pack_size"].values.tolist() == [4, 4]
    xr.testing.assert_identical(alone["train_loss"], among["train_loss"].sel(run=alone["run"].values))


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = store.write_pack, []
    study_directory, rescue = tmp_path / "study", tmp_path / "tmp"
    rescue.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(rescue))

    def full(directory: Path, pack: PlannedPack, tree: xr.DataTree) -> Path:
        calls.append(directory)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(directory, pack, tree)

    monkeypatch.setattr(one_pack, "write_pack", full)
    with pytest.raises(StudyError, match=r"No space left on device.*move it to") as refusal:
        run_study(tiny(), study_directory, "cpu", Recorder())
    assert "\n" not in str(refusal.value)
    [rescued] = (rescue / "exmy-rescued" / "packs").glob("*.nc")
    rescued.rename(study_directory / "packs" / rescued.name)
    assert open_study(study_directory).attrs["runs_finished"] == 8


def test_a_disk_that_fills_up_while_a_pack_is_written_crashes_nothing(tmp_path: Path) -> None:
    """The real thing, by a limit on file sizes: the HDF5 library itself would end the process."""
    rescue = Path(tempfile.gettempdir()) / "exmy-rescued" / "packs"
    rescued = set(rescue.glob("*.nc"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_up() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))

    try:
        with pytest.raises(StudyError, match=r"File too large.*this pack's 4 runs are lost.*make room"):
            run_study(tiny(), tmp_path, "cpu", Recorder(at_pack=2, action=fill_up))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert set(rescue.glob("*.nc")) == rescued
    assert len(list((tmp_path / "packs").glob("*.nc"))) == 1
    assert open_study(tmp_path).attrs["runs_finished"] == 4


def test_a_disk_without_room_for_checkpoints_stops_no_training(
    tmp_path: Path, finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The real thing again: 300 kB are enough for a pack's results, and not for its state."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_up() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))

    try:
        study = tiny(execution={"checkpoint_seconds": 1e-9})
        assert run_study(study, tmp_path, "cpu", Recorder(at_pack=1, action=fill_up)).trained == 8
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    lines = [record.message for record in caplog.records if record.name == "train.checkpoint"]
    assert len(lines) == 2, "one a pack"
    assert all("File too large); the training goes on, and there is none yet" in line for line in lines)
    xr.testing.assert_identical(
        open_study(tmp_path)["history"].to_dataset(), open_study(finished)["history"].to_dataset()
    )


def test_a_half_written_file_is_never_seen(tmp_path: Path) -> None:
    target = tmp_path / "pack.nc"

    def write() -> None:
        with durable.atomically(target) as aside:
            aside.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_the_directory_of_another_study_is_refused(finished: Path) -> None:
    with pytest.raises(StudyError, match="another study"):
        run_study(tiny(training={"steps": 13}), finished, "cpu", Recorder())
    assert open_study(finished).attrs["runs_finished"] == 8


def test_runs_on_another_text_are_refused(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = text.load_text

    def other(*arguments: Any) -> Any:
        return dataclasses.replace(real(*arguments), sha256="0" * 64)

    monkeypatch.setattr(streams, "load_text", other)
    with pytest.raises(StudyError, match="holds runs on another 'python' text"):
        run_study(tiny(), finished, "cpu", Recorder())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"axes": {"recipe": ["native-tf32"]}}, "a CPU has no TF32 products; take 'tf32'"),
        ({"model": {"width": 65536, "layers": 200}}, "needs about .* GiB"),
        ({"model": {"context": 8192}, "training": {"sequences": 4096}}, "take fewer sequences"),
    ],
)
def test_what_this_machine_cannot_train_is_refused_first(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    recorder = Recorder()
    with pytest.raises(StudyError, match=message):
        run_study(tiny(**change), tmp_path, "cpu", recorder)
    assert not recorder.packs
    assert not (tmp_path / "study.toml").exists()


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("not a folder")
    with pytest.raises(StudyError, match="can't write there"):
        run_study(tiny(), tmp_path / "out", "cpu", Recorder())


def flipped(content: bytes) -> bytes:
    """A bit of an uncompressed loss, that no format's own checks would notice."""
    return bytes(b ^ (i == len(content) // 2) for i, b in enumerate(content))


def cut(content: bytes) -> bytes:
    return content[:1000]


# Directories of before have no checksums, and there what HDF5 can't read is damaged.
@pytest.mark.parametrize(("harm", "sealed"), [(cut, True), (flipped, True), (cut, False)])
def test_a_damaged_pack_is_named_kept_aside_and_trained_again(
    harm: Callable[[bytes], bytes], sealed: bool, tmp_path: Path, finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    path = next((tmp_path / "packs").glob("*.nc"))
    path.write_bytes(harm(path.read_bytes()))
    if not sealed:
        path.with_suffix(".sha256").unlink()
    with pytest.raises(StudyError, match=rf"{path.name}: a damaged pack .*; `exmy resume {tmp_path}` keeps it aside"):
        open_study(tmp_path)
    recorder = Recorder()
    outcome = run_study(tiny(), tmp_path, "cpu", recorder)
    assert (outcome.trained, outcome.found, runs(recorder)) == (4, 4, 4)
    [line] = [record.message for record in caplog.records if record.name == "train.store"]
    assert line == f"{path}: damaged: kept as {path.name}.damaged, and its runs are trained again"
    assert path.with_name(f"{path.name}.damaged").is_file()
    xr.testing.assert_identical(
        open_study(tmp_path)["history"].to_dataset(), open_study(finished)["history"].to_dataset()
    )


def test_a_pack_has_a_checksum_that_other_tools_can_read(finished: Path) -> None:
    for path in (finished / "packs").glob("*.nc"):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert path.with_suffix(".sha256").read_text() == f"{digest}  {path.name}\n"


def test_a_directory_of_before_there_were_checksums_opens(tmp_path: Path, finished: Path) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "packs").glob("*.sha256"):
        path.unlink()
    assert open_study(tmp_path).identical(open_study(finished))
    assert run_study(tiny(), tmp_path, "cpu", Recorder()).found == 8


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path, finished: Path) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    for left in (tmp_path / ".study.toml.abc.part", tmp_path / "packs" / ".x.nc.abc.part"):
        left.write_bytes(b"half")
    run_study(tiny(), tmp_path, "cpu", Recorder())
    assert not list(tmp_path.rglob("*.part"))


class Stopper(Recorder):
    """Sends itself a signal after the first report of the second pack, as Ctrl-C or a cluster's scheduler would."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def pack_progress(self, pack: PlannedPack, progress: Progress) -> None:
        super().pack_progress(pack, progress)
        if len(self.packs) == 2:
            signal.raise_signal(self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_study_between_two_steps_and_it_goes_on_from_there(
    number: int, tmp_path: Path, finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted, match="the packs that were finished are kept, and the one under way up to step 10"):
        run_study(tiny(), tmp_path, "cpu", Stopper(number))
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    [checkpoint] = (tmp_path / "checkpoints").iterdir()
    recorder = Recorder()
    with caplog.at_level(logging.INFO, "train.checkpoint"):
        run_study(tiny(), tmp_path, "cpu", recorder)
    assert recorder.steps == [12]
    assert f"{checkpoint}: going on after step 10" in caplog.text
    assert not list((tmp_path / "checkpoints").iterdir())
    whole = open_study(finished)
    for name, group in open_study(tmp_path).children.items():
        xr.testing.assert_identical(group.to_dataset(), whole[name].to_dataset())


def test_a_checkpoint_that_no_pack_goes_on_from_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(Interrupted):
        run_study(tiny(), tmp_path, "cpu", Stopper(signal.SIGINT))
    [folder] = (tmp_path / "checkpoints").iterdir()
    run_study(tiny(execution={"pack_size": 2}), tmp_path, "cpu", Recorder())
    [line] = [record.message for record in caplog.records if record.name == "train.checkpoint"]
    assert line == f"{folder}: a checkpoint of a pack of other runs, or of another pack_size: left where it is"
    run_study(tiny(), tmp_path, "cpu", Recorder())
    assert not folder.exists(), "its runs are finished"


def test_a_study_can_do_without_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match=r"the packs that were finished are kept$"):
        run_study(tiny(execution={"checkpoint_seconds": 0}), tmp_path, "cpu", Stopper(signal.SIGINT))
    assert not (tmp_path / "checkpoints").exists()


def test_the_second_ctrl_c_leaves_at_once(tmp_path: Path) -> None:
    class Impatient(Stopper):
        def pack_progress(self, pack: PlannedPack, progress: Progress) -> None:
            super().pack_progress(pack, progress)
            super().pack_progress(pack, progress)

    with pytest.raises(KeyboardInterrupt) as stop:
        run_study(tiny(), tmp_path, "cpu", Impatient(signal.SIGINT))
    assert not isinstance(stop.value, Interrupted)
    assert not (tmp_path / "checkpoints").exists()


def test_a_signal_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        outcome = run_study(tiny(), tmp_path, "cpu", Stopper(signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)
    assert outcome.trained == 8


def test_a_second_sweep_on_a_directory_is_refused_before_any_work(tmp_path: Path) -> None:
    refused: list[str] = []

    def again() -> None:
        before = (tmp_path / "status.json").read_bytes()
        second = Recorder()
        with pytest.raises(StudyError) as refusal:
            run_study(tiny(), tmp_path, "cpu", second)
        refused.append(str(refusal.value))
        assert (tmp_path / "status.json").read_bytes() == before
        assert not second.packs

    run_study(tiny(), tmp_path, "cpu", Recorder(at_pack=1, action=again))
    assert refused == [
        f"{tmp_path}: another sweep is at work there (process {os.getpid()} on {socket.gethostname()}); wait for it, stop it, "
        "or name another with --out"
    ]
    assert run_study(tiny(), tmp_path, "cpu", Recorder()).found == 8


def test_a_lock_is_no_link_to_somebodys_file(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious", encoding="utf-8")
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / ".lock").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="symbolic links"), locked(tmp_path / "study"):
        pass
    assert (tmp_path / "mine").read_text(encoding="utf-8") == "precious"


def test_a_lock_whose_file_is_damaged_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who holds it can't be asked then; it may be the workers of a sweep that was killed."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(tmp_path))
        (tmp_path / ".lock").write_text("proc%ss 12 on here\n")
        monkeypatch.setattr("train.lock.PATIENCE", 0.0)
        with pytest.raises(StudyError, match=r"is at work there \(proc%ss 12 on here\)"), locked(tmp_path):
            pass
        monkeypatch.setattr("train.lock.PATIENCE", 60.0)
        let_go, released = stack.pop_all().close, threading.Event()

        def end() -> None:
            released.set()
            let_go()

        release = threading.Timer(0.2, end)
        release.start()
        with locked(tmp_path):
            assert released.is_set()
    release.join()


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from train.lock import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); os.read(0, 1); os.kill(os.getpid(), 9)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    with holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(StudyError, match=f"process {holder.pid} on"), locked(tmp_path):
            pass
        holder.stdin.write(b"x")
    assert holder.returncode == -signal.SIGKILL
    with locked(tmp_path):
        pass


def test_a_directory_without_a_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"no study.toml here"):
        open_study(tmp_path)


@pytest.mark.parametrize(
    ("count", "largest", "overhead", "size"),
    [
        (48, 16, 1, 16),  # 3 packs of 16 + 1 against 6 of 8 + 1
        (21, 128, 8, 32),  # 1 of 32 + 8 against 2 of 16 + 8
        (1, 128, 8, 1),
        (128, 128, 8, 128),
        (129, 128, 8, 32),  # 5 of 40 against 3 of 72 and 2 of 136
        (336, 128, 8, 128),  # 3 of 136 against 6 of 72
    ],
)
def test_the_pack_size_trains_the_runs_soonest(count: int, largest: int, overhead: int, size: int) -> None:
    assert choose_pack_size(count, largest, overhead) == size


def test_runs_share_a_program_where_carrier_structure_and_shapes_are_the_same() -> None:
    recipes = ["e8m7", "e4m3", "e5m7", "native-bf16", "native-fp32", "tf32", "e8m3", "e5m10"]
    study = tiny(axes={"recipe": recipes, "layers": [1, 2]}, execution={"pack_size": 128})
    packs = plan(study, torch.device("cpu"))
    together = [{run.recipe.name for run in pack.runs} for pack in packs if pack.program.shape.layers == 2]
    assert together == [{"e8m7", "e4m3", "e5m7", "e8m3"}, {"native-bf16"}, {"native-fp32"}, {"tf32", "e5m10"}]
    assert len(packs) == 8
    assert sum(len(pack.runs) for pack in packs) == len(list(study.runs()))


@pytest.mark.parametrize("probe", [{"every": 0}, {"measures": []}])
def test_a_study_without_probes_has_no_sharpness(tmp_path: Path, probe: dict[str, Any]) -> None:
    run_study(tiny(probe=probe), tmp_path, "cpu", Recorder())
    assert set(open_study(tmp_path).children) == {"history", "evaluation", "signals", "summary"}


def test_progress_is_reported_to_the_end(tmp_path: Path) -> None:
    recorder = Recorder()
    run_study(tiny(), tmp_path, "cpu", recorder)
    assert recorder.steps == [10, 12, 10, 12]


def test_summary_agrees_with_the_history(finished: Path) -> None:
    tree = open_study(finished)
    summary, history = tree["summary"].to_dataset(), tree["history"].to_dataset()
    window = summary.attrs["window"]
    expected = history["train_loss"].values[:, -min(window, 12) :].astype(np.float64).mean(1)
    np.testing.assert_allclose(summary["final_loss"].values, expected, rtol=1e-12)
    assert summary["no_progress"].all(), "twelve steps teach nothing"


def test_dynamic_loss_scales_are_stored_beside_runs_without_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first scale beyond what FP32 gradients have room for, so that the first step is skipped."""
    dynamic = DynamicLossScale(2.0**126, backoff=2.0**-100, interval=4)

    def planned(*arguments: Any) -> list[PlannedPack]:
        return [
            dataclasses.replace(pack, program=dataclasses.replace(pack.program, dynamic_loss_scale=dynamic))
            if pack.runs[0].recipe.name == "native-fp32"
            else pack
            for pack in plan(*arguments)
        ]

    monkeypatch.setattr(site, "plan", planned)
    study = tiny(axes={"recipe": ["e8m7", "native-fp32"]})
    run_study(study, tmp_path, "cpu", Recorder())
    tree = open_study(tmp_path)
    history, summary = tree["history"].to_dataset(), tree["summary"].to_dataset()
    scaled = history["recipe"].values == "native-fp32"
    for name in OPTIONAL:
        assert history[name].dims == GROUPS["history"][name].dims
        assert history[name].attrs == GROUPS["history"][name].attrs()
        assert np.isnan(history[name].values[~scaled]).all()
    assert history["skipped"].values[scaled].tolist() == [[1.0] + [0.0] * 11] * 4
    expected = [2.0**126, *[2.0**26] * 4, *[2.0**27] * 4, *[2.0**28] * 3]
    assert history["loss_scale"].values[scaled].tolist() == [expected] * 4
    assert not np.isfinite(history["grad_norm"].values[scaled, 0]).any()
    assert not summary["non_finite"].values.any()
