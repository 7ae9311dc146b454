"""Whose weights are kept: named, refused beforehand, whole or not at all, and to the bit those of the training."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import signal
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from pydantic import ValidationError

from exmy.cli import main
from tests.conftest import make_text
from tests.recipe_packs import program_for, slot
from tests.test_checkpoint import RECIPES, bits
from tests.test_execute import Recorder, Stopper, tiny
from train import Study, StudyError, run_study, snapshots
from train.interruption import Interrupted
from train.pack import Pack
from train.plan import plan
from train.program import Probe
from train.resolve import resolve_recipe
from train.snapshots import Kept, need, read, snapshots_in, state_of

CPU = torch.device("cpu")
NAMED = ["e4m3, learning_rate=4e-3", "seed=1, recipe=e8m7, learning_rate=0.001"]


def asking(*names: str, **changes: Any) -> Study:
    probe = {"snapshots": list(names), "measures": ["sam_sharpness"], "intervals": {"sam_sharpness": 8}}
    return tiny(probe=probe | changes.pop("probe", {}), **changes)


def meant(study: Study) -> list[tuple[str, float, int]]:
    return [(r.recipe.name, r.learning_rate, r.seed) for r in study.chosen(study.probe.snapshots, study.runs())]


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["e4m3, seed=1"], [("e4m3", 1e-3, 1), ("e4m3", 4e-3, 1)]),
        (["learning_rate=1e-3, seed=0"], [("e8m7", 1e-3, 0), ("e4m3", 1e-3, 0)]),
        (NAMED, [("e8m7", 1e-3, 1), ("e4m3", 4e-3, 0), ("e4m3", 4e-3, 1)]),
        (["recipe = e8m7 , learning_rate = 0.0040, init_seed=1, model=gpt2-1x16"], [("e8m7", 4e-3, 1)]),
        ([], []),
    ],
)
def test_runs_are_named_by_what_they_are(names: list[str], wanted: list[tuple[str, float, int]]) -> None:
    assert meant(asking(*names)) == wanted


def test_a_run_may_be_named_by_its_identity_and_all_by_one_word() -> None:
    runs = list(asking("all").runs())
    assert meant(asking(runs[3].identity[:8])) == [(runs[3].recipe.name, runs[3].learning_rate, runs[3].seed)]
    assert len(meant(asking("all"))) == len(runs) == 8


def test_an_axis_of_the_study_names_runs_too() -> None:
    study = asking("clip=0.5, seed=0, e8m7", axes={"clip": [0.5, 1.0]})
    assert [dict(run.extra_axes)["clip"] for run in study.chosen(study.probe.snapshots, study.runs())] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("e4m4", "the study has no recipe 'e4m4'; did you mean 'e4m3'?"),
        ("e4m3, sed=1", "runs have no 'sed'; did you mean 'seed'?"),
        ("seed=7", "'seed=7' matches no run of the study"),
        ("seed=one", "'seed=one' matches no run of the study"),
        ("deadbeef", "'deadbeef' matches no run of the study"),
        ("e4m3, e8m7", "matches no run of the study"),
    ],
)
def test_a_name_that_means_no_run_is_refused_where_it_stands(name: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(f"{tiny().to_toml().replace('snapshots = []', f'snapshots = {json.dumps([name])}')}")
    result = CliRunner().invoke(main, ["sweep", str(path), "--out", str(tmp_path / "out"), "--dry-run"])
    line = next(i for i, text in enumerate(path.read_text().splitlines(), 1) if text.startswith("snapshots"))
    assert result.exit_code == 2
    assert f"study.toml:{line}: probe.snapshots: " in result.output
    assert message in result.output
    assert result.output.count("\n") == 1


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        ({"measures": ["hesian_trace"]}, "'hesian_trace' is no measure; did you mean 'hessian_trace'?"),
        ({"measures": ["sam_sharpness"] * 2}, "a measure is named twice"),
        ({"intervals": {"hessian_trace": 5}}, "intervals names 'hessian_trace', which is not among measures"),
        ({"measures": ["hessian_trace"], "intervals": {"hessian_trace": 0}}, "greater than or equal to 1"),
        ({"quantisers": "of"}, "'on', 'off' or 'finite-difference'"),
    ],
)
def test_a_probe_that_means_nothing_is_refused(probe: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        tiny(probe=probe)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"training": {"optimizer": "muon"}, "probe": {"measures": ["preconditioned_eigenvalue"]}},
            "of Adam's moments",
        ),
        ({"model": {"logit_softcap": 3.0}, "probe": {"measures": ["hidden_sharpness"]}}, "logit_softcap=3 bends"),
    ],
)
def test_a_measure_that_no_run_can_have_is_refused_before_any_work(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        plan(tiny(**changes), CPU)


def test_a_measure_that_some_runs_can_have_is_taken_of_those() -> None:
    study = tiny(axes={"optimizer": ["adamw", "muon"]}, probe={"measures": ["critical_sharpness", "sam_sharpness"]})
    packs = plan(study, CPU)
    assert sorted({tuple(pack.program.measures) for pack in packs}) == [
        ("critical_sharpness", "sam_sharpness"),
        ("sam_sharpness",),
    ]


def test_whose_weights_are_kept_does_not_change_which_runs_there_are() -> None:
    plain, other = tiny(), tiny(probe={"snapshots": ["all"]})
    assert list(plain.identities()) == list(other.identities())
    assert list(plain.identities()) != list(tiny(probe={"measures": ["hessian_trace"]}).identities())


def test_the_dry_run_tells_how_much_it_will_be(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(asking(*NAMED, model={"width": 128}).to_toml())
    result = CliRunner().invoke(
        main, ["sweep", str(path), "--out", str(tmp_path / "out"), "--device", "cpu", "--dry-run"]
    )
    [line] = [text for text in result.output.splitlines() if text.startswith("snapshots")]
    # After 0, 6, 8 and 12 steps; 229,632 parameters and two moments, 4 bytes each.
    assert line == "snapshots of 3 runs: 12 files, at most 32 MiB"


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study's directory, trained to its end."""
    directory = tmp_path_factory.mktemp("kept")
    run_study(asking(*NAMED), directory, "cpu", Recorder())
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted((directory / "snapshots").glob("*/*"))}


def test_named_runs_are_kept_at_every_probe_with_a_checksum(kept: Path) -> None:
    study = asking(*NAMED)
    wanted = {run.identity for run in study.chosen(NAMED, study.runs())}
    found = list(snapshots_in(kept))
    assert {one.run for one in found} == wanted
    assert sorted(one.step for one in found) == sorted([0, 6, 8, 12] * 3)
    for one in found:
        digest = hashlib.sha256(one.path.read_bytes()).hexdigest()
        assert one.path.with_suffix(".sha256").read_text() == f"{digest}  {one.path.name}\n"
    assert need(study, plan(study, CPU))[:2] == (3, 12)


def test_what_is_kept_is_what_the_training_had(kept: Path) -> None:
    """Against a pack that is trained here."""
    from train.text import load_text

    study = asking(*NAMED)
    [pack] = [pack for pack in plan(study, CPU) if any(run.recipe.name == "e4m3" for run in pack.runs)]
    [_, _, slot_of, _] = [run.identity for run in pack.runs]
    trained = Pack(pack.program, pack.slots, load_text("python"), CPU)
    while trained.made < 8:
        trained.step()
    header, found = read(Kept(kept / "snapshots" / slot_of / "8.safetensors", slot_of, 8))
    assert (header["run"], header["step"], header["pack_size"]) == (slot_of, "8", "4")
    for name, p in trained.parameters.items():
        assert torch.equal(found[f"parameter {name}"][0], p[2])
        second = trained.kept[name].second
        assert second is not None
        assert torch.equal(found[f"second {name}"][0], second[2])
    assert len(found) == 3 * len(trained.parameters)


def test_a_training_that_was_stopped_leaves_the_files_of_one_that_was_not(kept: Path, tmp_path: Path) -> None:
    study = asking(*NAMED)
    with pytest.raises(Interrupted):
        run_study(study, tmp_path, "cpu", Stopper(signal.SIGINT))
    assert 0 < len(contents(tmp_path)) < len(contents(kept))
    run_study(study, tmp_path, "cpu", Recorder())
    assert contents(tmp_path) == contents(kept)


def test_a_training_that_starts_over_does_not_keep_what_another_left(kept: Path, tmp_path: Path) -> None:
    """As after a checkpoint that is another device's: what is there is of a training that never was."""
    study = asking(*NAMED)
    run = study.chosen(NAMED, study.runs())[0].identity
    (tmp_path / "snapshots" / run).mkdir(parents=True)
    for name in ("8.safetensors", "8.sha256", "7.safetensors"):
        (tmp_path / "snapshots" / run / name).write_bytes(b"old")
    run_study(study, tmp_path, "cpu", Recorder())
    assert contents(tmp_path) == contents(kept)


def test_runs_that_are_named_too_late_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    study = asking(NAMED[0], training={"steps": 8}, axes={"seed": 1})
    run_study(study, tmp_path, "cpu", Recorder())
    assert run_study(study, tmp_path, "cpu", Recorder()).trained == 0
    assert "whose weights" not in caplog.text
    later = asking(NAMED[0], "e8m7", training={"steps": 8}, axes={"seed": 1})
    assert run_study(later, tmp_path, "cpu", Recorder()).trained == 0
    assert "probe.snapshots names 2 runs that are finished, and whose weights were not kept" in caplog.text


def test_a_disk_that_is_full_costs_the_snapshots_and_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(snapshots, "seal", full)
    with caplog.at_level(logging.WARNING):
        assert run_study(asking("all"), tmp_path, "cpu", Recorder()).trained == 8
    assert caplog.text.count("a snapshot can't be written (No space left on device)") == 2, "once a pack"


def test_a_snapshot_that_is_damaged_or_anothers_is_not_read(kept: Path, tmp_path: Path) -> None:
    one = next(iter(snapshots_in(kept)))
    content = bytearray(one.path.read_bytes())
    copy = tmp_path / one.path.name
    digest = one.path.with_suffix(".sha256").read_text()
    copy.with_suffix(".sha256").write_text(digest)
    copy.write_bytes(content)
    read(one._replace(path=copy))
    with pytest.raises(ValueError, match="it is of run"):
        read(one._replace(path=copy, run="another"))
    content[-1] ^= 1
    copy.write_bytes(content)
    with pytest.raises(ValueError, match="SHA-256"):
        read(one._replace(path=copy))
    copy.with_suffix(".sha256").unlink()
    with pytest.raises(ValueError, match="no checksum"):
        read(one._replace(path=copy))
    (size,) = struct.unpack("<Q", one.path.read_bytes()[:8])
    json.loads(one.path.read_bytes()[8 : 8 + size])  # safetensors: a header that is JSON, and numbers


def test_a_place_that_is_a_url_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="snapshots are kept in a directory, and memory://x is a URL"):
        run_study(asking("all"), "memory://x", "cpu", Recorder(), executor="ray")


@pytest.mark.parametrize("name", ["e4m3", "fp8-hybrid-delayed", "native-fp64", "delayed later"])
def test_a_pack_that_is_given_snapshots_stands_where_the_training_stood(name: str) -> None:
    """To the bit, in what is measured: losses and sharpness by operands, and the surface's scales."""
    meant = resolve_recipe(name, RECIPES)
    program = program_for(meant, steps=8, probe=Probe(every=4), evaluate_every=4)
    slots = [slot(meant, 0), slot(meant, 1, 1e-2), slot(meant, 2, 1e-3)]
    pack = Pack(program, slots, make_text(), CPU)
    for _ in range(6):
        pack.step()
    delayed = bool(pack.histories.names)
    saved = [state_of({k: t.clone() for k, t in pack.state().items()}, slot, delayed=delayed) for slot in (2, 0, 1)]
    other = Pack(program, [slots[2], slots[0], slots[1]], make_text(), CPU)
    other.put(6, saved)
    assert torch.equal(other.validation_loss(), pack.validation_loss()[[2, 0, 1]])
    for mine, theirs in zip(other.sharpness().values(), pack.sharpness().values(), strict=True):
        assert torch.equal(mine, theirs[[2, 0, 1]])
    for key, scale in other.histories.scales().items():
        assert torch.equal(scale, pack.histories.scales()[key][[2, 0, 1]])
    assert bits(other.state())["counter"].item() == 6
    with pytest.raises(ValueError, match="not a state of this program: "):
        other.put(6, [{**saved[0], "parameter of another": torch.zeros(1)}])
