"""`exmy landscape`: what was kept is measured once, as training measured it, can be stopped anywhere, and touches nothing."""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from click.testing import CliRunner, Result
from xarray.testing import assert_identical

from exmy.cli import main
from exmy.export import export_study
from landscape import validate
from tests.test_execute import Recorder, Stopper, tiny
from train import Study, StudyError, open_study, run_study, study_status
from train.afterwards import Progress, measure_study
from train.curves import curves_of
from train.directory import points_in
from train.durable import is_intact, seal
from train.interruption import Interrupted
from train.snapshots import Kept, Snapshots, read
from train.store import read_packs

ROOT = Path(__file__).parent.parent
PROBE = {
    "every": 6, "measures": ["logit_sharpness", "hessian_trace", "gradient_curvature", "m_sam_sharpness", "hessian_eigenvalue"],
    "intervals": {"gradient_curvature": 4}, "snapshots": ["e4m3, seed=0", "e8m7, learning_rate=4e-3"], "samples": 2, "at_once": 2,
}  # fmt: skip
MEASURES = ("hessian_trace", "gradient_curvature", "m_sam_sharpness")


def asking(**changes: Any) -> Study:
    return tiny(probe=PROBE | changes.pop("probe", {}), **changes)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["landscape", *map(str, arguments)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four of the study's eight runs are kept, after 0, 4, 6, 8 and 12 steps."""
    directory = tmp_path_factory.mktemp("trained")
    run_study(asking(), directory, "cpu", Recorder())
    return directory


@pytest.fixture
def study(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "study"))


@pytest.fixture(scope="module")
def measured(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = Path(shutil.copytree(trained, tmp_path_factory.mktemp("measured") / "study"))
    measure_study(directory, device="cpu")
    return directory


def files(directory: Path, without: str = "-") -> dict[str, tuple[int, bytes]]:
    """Every file by its path: when it was written, and its content."""
    paths = [
        path for path in directory.rglob("*") if path.is_file() and without not in path.parts and path.name != ".lock"
    ]
    return {str(path.relative_to(directory)): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def test_values_are_those_of_the_training_for_the_runs_that_were_kept(measured: Path) -> None:
    tree = open_study(measured)
    study = asking()
    kept = {run.identity for run in study.chosen(PROBE["snapshots"], study.runs())}  # type: ignore[arg-type]
    assert len(kept) == 4
    for measure in (*MEASURES, "hessian_eigenvalue"):
        before, after = tree[f"probes/{measure}"].to_dataset(), tree[f"landscape/on/{measure}"].to_dataset()
        assert after["probe_step"].values.tolist() == [0, 4, 6, 8, 12]
        assert set(after["run"].values[after["measured"].values]) == kept
        assert (after["taken"].all("probe_step") == after["measured"]).all()
        assert after["run"].values.tolist() == before["run"].values.tolist()
        here = after.sel(run=sorted(kept), probe_step=before["probe_step"])
        there = before.sel(run=sorted(kept))
        # Eigenvalues to their residuals: those of the training started from the last probe's vectors.
        rtol = 2e-2 if measure == "hessian_eigenvalue" else 1e-4
        np.testing.assert_allclose(here[measure], there[measure], rtol=rtol, atol=1e-6, err_msg=measure)
        assert np.isnan(after[measure].values[~after["measured"].values]).all()
        assert (after["quantisers"].item(), before["quantisers"].item()) == ("on", "on")


@pytest.mark.parametrize("positions", ["all", "last"])
def test_logit_sharpness_is_that_of_the_training_and_other_epsilons_stand_beside(
    positions: str, trained: Path, tmp_path: Path
) -> None:
    if positions == "all":
        shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    else:
        run_study(
            asking(probe={"positions": "last"}, axes={"seed": 1}, training={"steps": 6}), tmp_path, "cpu", Recorder()
        )
    done = measure_study(tmp_path, ["logit_sharpness"], device="cpu")
    tree = open_study(tmp_path)
    group, before = tree["landscape/on/logit_sharpness"].to_dataset(), tree["sharpness"].to_dataset()
    assert done.taken == int(group["taken"].sum()) > 0
    there = group["run"].values[group["measured"].values]
    for name in ("logit_sharpness", "logit_sharpness_centred"):
        at = {"run": there, "probe_step": before["probe_step"]}
        np.testing.assert_allclose(group[name].sel(at), before[name].sel(run=there), rtol=2e-5)
    assert group["logit_sharpness"].attrs["units"] == "percent"
    more = measure_study(tmp_path, ["logit_sharpness"], device="cpu", epsilons=[1e-3, 4e-3])
    assert (more.taken, more.found) == (done.taken, 0)
    wider = open_study(tmp_path)["landscape/on/logit_sharpness"].to_dataset()
    assert wider["epsilon"].values.tolist() == [5e-4, 1e-3, 4e-3]
    values = wider["logit_sharpness"].sel(run=there)
    np.testing.assert_allclose(values.sel(epsilon=[5e-4, 1e-3]), group["logit_sharpness"].sel(run=there), rtol=1e-6)
    assert (values.sel(epsilon=4e-3) > 3 * values.sel(epsilon=1e-3)).all()
    for epsilons in ([], [4e-3], [1e-3]):
        assert measure_study(tmp_path, ["logit_sharpness"], device="cpu", epsilons=epsilons).taken == 0


def test_the_tree_is_described_opens_in_chunks_and_survives_netcdf(measured: Path, tmp_path: Path) -> None:
    tree = open_study(measured)
    assert validate(tree) == []
    lazy = open_study(measured, chunks=2)
    zarr = tmp_path / "tree.zarr" if importlib.util.find_spec("zarr") else None
    export_study(measured, zarr, tmp_path / "tree.nc")
    for name, engine in (("tree.nc", "h5netcdf"), ("tree.zarr", "zarr"))[: 2 if zarr else 1]:
        with xr.open_datatree(tmp_path / name, engine=engine) as read:
            again = read.load()
        assert {n.path for n in tree.subtree} == {n.path for n in lazy.subtree} == {n.path for n in again.subtree}
        for node in tree.subtree:
            assert_identical(node.to_dataset(), lazy[node.path].to_dataset().compute())
            for variable, values in node.to_dataset().data_vars.items():
                np.testing.assert_array_equal(values, again[node.path][str(variable)])


def test_what_was_measured_while_training_is_told_elsewhere_as_curves(trained: Path) -> None:
    tree = open_study(trained)
    for pack in read_packs(trained):
        for curves in curves_of(asking(), pack):
            for measure, at in {
                "hessian_trace": "",
                "m_sam_sharpness": " at rho 0.05",
                "hessian_eigenvalue": " at rank 0",
            }.items():
                values = tree[f"probes/{measure}"].to_dataset()[measure].sel(run=curves.identity).squeeze()
                wanted = list(zip(values["probe_step"].values.tolist(), values.values.tolist(), strict=True))
                assert curves.points[f"probes/{measure}{at}"] == wanted


def test_nothing_that_was_there_is_touched_and_what_is_there_is_not_measured_again(study: Path) -> None:
    before = files(study)
    done = measure_study(study, MEASURES[:1], device="cpu")
    assert (done.taken, done.found, done.failed) == (20, 0, 0)
    assert files(study, "landscape") == before
    points = files(study)
    again = measure_study(study, MEASURES[:1], device="cpu")
    assert (again.taken, again.found, again.failed) == (0, 20, 0)
    assert files(study) == points
    more = measure_study(study, MEASURES[:2], ["e4m3"], device="cpu")
    assert (more.taken, more.found) == (10, 10)


def test_stopped_anywhere_it_goes_on_and_loses_no_point(study: Path, measured: Path) -> None:
    after = 2

    def stop(progress: Progress) -> None:
        if progress.done == after and not progress.what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_study(study, MEASURES, device="cpu", on_progress=stop)
    assert [is_intact(point.path) for point in points_in(study)] == [True] * after
    kept = files(study)
    seen: list[Progress] = []
    done = measure_study(study, MEASURES, device="cpu", on_progress=seen.append)
    assert done.taken + done.found == 3 * 5 * 4
    assert done.found > 0
    assert (seen[0].done, seen[-1].done) == (0, seen[-1].points)
    assert {path: kept[path] for path in kept} == {
        path: content for path, content in files(study).items() if path in kept
    }
    tree, whole = open_study(study), open_study(measured)
    for measure in MEASURES:
        assert_identical(tree[f"landscape/on/{measure}"].to_dataset(), whole[f"landscape/on/{measure}"].to_dataset())


def test_half_a_file_of_a_measurement_that_was_killed_is_removed(study: Path, measured: Path) -> None:
    folder = study / "landscape" / "on" / "hessian_trace"
    folder.mkdir(parents=True)
    (folder / ".0-abc.nc.xyz.part").write_bytes(b"half")
    measure_study(study, ["hessian_trace"], ["e4m3"], device="cpu")
    assert not list(folder.glob(".*"))


def test_a_point_that_is_damaged_is_refused_and_measured_again(study: Path) -> None:
    measure_study(study, ["hessian_trace"], ["e4m3"], device="cpu")
    point = next(points_in(study)).path
    point.write_bytes(point.read_bytes()[:-7])
    with pytest.raises(StudyError, match=r"damaged; remove it, and `exmy landscape .*study` measures it again"):
        open_study(study)
    assert measure_study(study, ["hessian_trace"], ["e4m3"], device="cpu").taken > 0
    open_study(study)


def test_weights_that_changed_are_measured_again(study: Path) -> None:
    name = "e4m3, learning_rate=1e-3"
    assert measure_study(study, ["m_sam_sharpness"], device="cpu").taken == 20
    [run] = asking().chosen([name, "e4m3"], [next(run for run in asking().runs() if run.recipe.name == "e4m3")])
    folder = study / "snapshots" / run.identity
    values = open_study(study)["landscape/on/m_sam_sharpness"].to_dataset()["m_sam_sharpness"].sel(run=run.identity)
    state = read(Kept(folder / "4.safetensors", run.identity, 4))[1]
    for path in folder.glob("12.*"):
        path.unlink()
    header = dict.fromkeys(("device", "version_exmy", "version_torch"), "") | {"text": values_of_text(study)}
    Snapshots(study, {0: run.identity}, [12], header)._keep(run.identity, 12, state)
    done = measure_study(study, ["m_sam_sharpness"], [name], device="cpu")
    assert (done.taken, done.found) == (1, 4)
    again = open_study(study)["landscape/on/m_sam_sharpness"].to_dataset()["m_sam_sharpness"].sel(run=run.identity)
    # What was measured last counts, by whatever name: here of a run alone, before of it among others.
    assert measure_study(study, ["m_sam_sharpness"], [name], device="cpu").taken == 0
    *_, one, other = sorted(point.path for point in points_in(study) if point.step == 12)
    was = [path.stat().st_mtime_ns for path in (one, other)]
    os.utime(one, ns=(was[1], was[1]))
    os.utime(other, ns=(was[0], was[0]))
    stale = open_study(study)["landscape/on/m_sam_sharpness"].to_dataset()["m_sam_sharpness"].sel(run=run.identity)
    np.testing.assert_array_equal(stale, values)
    assert again.sel(probe_step=12).item() == again.sel(probe_step=4).item() != values.sel(probe_step=12).item()


def values_of_text(study: Path) -> str:
    return str(open_study(study).attrs["dataset_sha256"])


def test_other_quantisers_stand_beside_and_differ_as_rounding_does(study: Path) -> None:
    for word in ("on", "off", "finite-difference"):
        assert measure_study(study, ["gradient_curvature"], ["e8m7, seed=0"], word, device="cpu").taken == 5
    tree = open_study(study)["landscape"]
    values = {str(word): tree[f"{word}/gradient_curvature"].to_dataset() for word in tree.children}
    assert {word: of["quantisers"].item() for word, of in values.items()} == {
        word: word for word in ("finite-difference", "off", "on")
    }
    on, off = (values[word]["gradient_norm"].dropna("run") for word in ("on", "off"))
    assert on.sizes["run"] == 1
    np.testing.assert_allclose(on, off, rtol=0.2)
    assert not np.array_equal(on, off)


def test_a_snapshot_that_is_damaged_costs_its_own_values(study: Path, caplog: pytest.LogCaptureFixture) -> None:
    [*_, bad] = sorted((study / "snapshots").glob("*/8.safetensors"))
    content = bytearray(bad.read_bytes())
    content[-1] ^= 1
    bad.write_bytes(content)
    done = invoke(study, "--measure", "m_sam_sharpness", "--measure", "gradient_curvature", "--device", "cpu")
    assert done.exit_code == 2
    assert "38 values measured" in done.output
    assert "2 values could not be measured; the lines above say why" in done.output
    assert caplog.messages[-1:] == [f"{bad}: not measured: its SHA-256 does not match"]
    for path in (study / "snapshots").glob("*/0.*"):
        path.unlink()
    assert invoke(study, "--measure", "m_sam_sharpness", "--device", "cpu").exit_code == 2


def test_a_disk_that_is_full_ends_it_in_a_line_and_keeps_what_there_is(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = list[Path]()

    def fills_up(path: Path, content: bytes) -> None:
        if len(made) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        made.append(path)
        seal(path, content)

    monkeypatch.setattr("train.landscape_files.seal", fills_up)
    done = invoke(study, "--measure", "m_sam_sharpness", "--device", "cpu")
    assert done.exit_code == 2
    assert "can't write there (No space left on device); make room and start again" in done.output
    assert [point.path for point in points_in(study)] == sorted(made)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--measure", "hesian_trace"],
            "'hesian_trace' is nothing that is measured afterwards; did you mean 'hessian_trace'?",
        ),
        (
            ["--measure", "hessian_trace", "--epsilon", "1e-3"],
            "an epsilon is of boxes, and none of hessian_trace is one",
        ),
        (["--measure", "box_sharpness", "--epsilon", "2"], "an epsilon must be above 0 and at most 1, got 2"),
        (["--run", "e4m4"], "the study has no recipe 'e4m4'; did you mean 'e4m3'?"),
        (["--run", "e4m3, seed=1"], "no weights of e4m3, seed=1 are kept there, but those of runs of e8m7, e4m3"),
        (["--quantisers", "of"], "is not one of 'on', 'off', 'finite-difference'"),
    ],
)
def test_what_is_not_there_is_refused_in_a_line(trained: Path, arguments: list[str], message: str) -> None:
    done = invoke(trained, *arguments)
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output
    assert not (trained / "landscape").exists()


def test_hidden_sharpness_of_capped_logits_is_refused_as_it_is_while_training(tmp_path: Path) -> None:
    """They are not linear in the hidden state; without the cap its limits would not hold."""
    capped = tiny(
        model={"logit_softcap": 30.0}, training={"steps": 4}, axes={"seed": 1}, probe={"every": 4, "snapshots": ["all"]}
    )
    run_study(capped, tmp_path, "cpu", Recorder())
    done = invoke(tmp_path, "--measure", "hidden_sharpness")
    assert done.exit_code == 2
    assert "logits that are linear in the hidden state, and logit_softcap=30 bends them" in done.output
    assert not (tmp_path / "landscape").exists()


def test_a_study_without_weights_says_what_to_set(tmp_path: Path) -> None:
    run_study(tiny(training={"steps": 4}, axes={"seed": 1}), tmp_path, "cpu", Recorder())
    done = invoke(tmp_path)
    assert done.exit_code == 2
    assert done.output == (
        f'exmy: {tmp_path}: no weights are kept there: set [probe] snapshots, such as snapshots = ["all"], before the study is '
        "trained\n"
    )
    assert invoke(tmp_path / "nowhere").exit_code == 2


def test_a_pack_under_way_is_measured_from_its_checkpoint(tmp_path: Path, measured: Path) -> None:
    """The same as its snapshots at that step; its runs are not finished, and stand in the tree all the same."""
    study = asking(
        probe={"snapshots": [], "measures": ["m_sam_sharpness"], "intervals": {}},
        execution={"pack_size": 2, "checkpoint_seconds": 1e9},
    )
    with pytest.raises(Interrupted):
        run_study(study, tmp_path, "cpu", Stopper(signal.SIGINT))
    done = measure_study(tmp_path, ["m_sam_sharpness"], device="cpu")
    assert done.taken == 2
    tree = open_study(tmp_path)
    group = tree["landscape/on/m_sam_sharpness"].to_dataset()
    finished = tree["history"].to_dataset()["run"].values.tolist()
    unfinished = [run for run in group["run"].values.tolist() if run not in finished]
    assert len(unfinished) == 2
    assert group["probe_step"].values.tolist() == [10]
    assert group.sel(run=unfinished)["taken"].all()
    assert group.sel(run=unfinished)["recipe"].values.tolist() == ["e8m7"] * 2
    run_study(study, tmp_path, "cpu", Recorder())
    assert open_study(tmp_path)["landscape/on/m_sam_sharpness"].to_dataset()["measured"].sum() == 2


def test_the_command_says_what_it_did_and_status_knows(study: Path) -> None:
    done = invoke(study, "--measure", "m_sam_sharpness", "--run", "e4m3, seed=0", "--device", "cpu")
    assert done.exit_code == 0
    assert re.search(r"study: 10 values measured in [\d.]+ s, 0 were there already\n", done.output)
    assert "open_study(" in done.output
    status = study_status(study)
    assert status["snapshots"] == {"runs": 4, "files": 20}
    assert [(row["quantisers"], row["measure"]) for row in status["landscape"]] == [("on", "m_sam_sharpness")]
    shown = CliRunner().invoke(main, ["status", str(study)]).output
    assert "Snapshots: 20 of 4 runs" in shown
    assert "m_sam_sharpness" in shown


def test_control_c_says_how_to_go_on(study: Path) -> None:
    command = [sys.executable, "-m", "exmy", "landscape", str(study), "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    while not list(points_in(study)):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"exmy: stopped; what was measured is kept. To go on: exmy landscape {study}" in said
    assert "Traceback" not in said
