"""The index of a study's packs: never needed, never trusted against the files, and what it says is what the packs say."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import xarray as xr
from click.testing import CliRunner

from exmy.cli import main
from tests.test_execute import Recorder, cut, flipped, tiny
from train import StudyError, finished, index, merge_studies, open_study, read_study, run_study, store, study_status
from train.directory import INDEX, found_packs, study_of
from train.durable import CHECKSUM
from train.finished import finished_rows
from train.index import all_differ, append_row, losses_of, read_index, rule_of, runs_of
from train.pack_file import PackFile
from train.settings import DivergenceTable
from train.store import finished_runs

ROOT = Path(__file__).parent.parent
COMMITTED = sorted((ROOT / "studies" / "results").glob("*/packs/*.nc"))[::6]


@pytest.fixture(scope="module")
def study_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study of two packs, one of whose rates diverges."""
    directory = tmp_path_factory.mktemp("indexed")
    run_study(diverging(), directory, "cpu", Recorder())
    return directory


def diverging(**changes: Any) -> Any:
    return tiny(axes={"learning_rate": [1e-3, 90.0]}, training={"clip": "none"}, **changes)


@pytest.fixture
def directory(study_directory: Path, tmp_path: Path) -> Path:
    """A copy, with an index of its own: a copied file has times of its own."""
    copy = tmp_path / "copy"
    shutil.copytree(study_directory, copy, ignore=shutil.ignore_patterns(INDEX))
    finished_runs(copy)
    return copy


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which packs are read from here on."""
    packs: list[str] = []
    real = PackFile.__init__

    def noted(self: PackFile, path: Path) -> None:
        packs.append(path.stem)
        real(self, path)

    monkeypatch.setattr(PackFile, "__init__", noted)
    return packs


def index_file(directory: Path) -> Path:
    [path] = (directory / INDEX).glob("*.jsonl")
    return path


def without_index(directory: Path) -> dict[str, str]:
    """What the packs themselves say."""
    runs: dict[str, str] = {}
    for path in store.pack_files(directory):
        tree = store.read_pack(path)
        runs |= dict.fromkeys(store.runs_of(tree), str(tree.attrs["dataset_sha256"]))
    return runs


def test_a_second_start_reads_no_pack(study_directory: Path, read: list[str]) -> None:
    """A sweep writes rows as it writes packs."""
    outcome = run_study(diverging(), study_directory, "cpu", Recorder())
    assert (outcome.trained, outcome.found) == (0, 8)
    assert read == []
    assert finished_runs(study_directory) == without_index(study_directory)


def test_a_status_reads_no_pack_and_waits_for_neither_torch_nor_xarray(study_directory: Path) -> None:
    code = (
        "import sys\nfrom train import study_status\n"
        f"assert study_status({str(study_directory)!r})['runs']['finished'] == 8\n"
        "from exmy import status, cli\n"
        "print({'torch', 'xarray', 'h5py'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("definition", ["no_progress", "spike", "gap"])
def test_a_status_says_what_the_summary_says(definition: str, tmp_path: Path) -> None:
    """By every definition, with rows of the rule or of another."""
    directory = tmp_path / "copy"
    shutil.copytree(ROOT / "studies" / "results" / "first-look-cpu", directory)
    text = (directory / "study.toml").read_text(encoding="utf-8")
    text = text.replace('definition = "no_progress"', f'definition = "{definition}"').replace(
        "sigma = 6.0", "sigma = 5.0"
    )
    (directory / "study.toml").write_text(text, encoding="utf-8")
    finished_rows(directory, read_study(ROOT / "studies" / "results" / "first-look-cpu" / "study.toml"), keep=True)
    summary = open_study(directory)["summary"].to_dataset()
    counts = int(summary["diverged"].sum())
    assert 0 < counts < 48  # nothing is to be learnt from all or none
    for _ in ("rows of another rule", "rows of this one"):
        status = study_status(directory)
        assert status["runs"] == {"planned": 48, "finished": 48, "diverged": counts, "definition": definition}
        for pack in status["packs"]:
            tree = store.read_pack(directory / "packs" / f"{pack['hash']}.nc")
            assert pack["diverged"] == int(summary["diverged"].sel(run=store.runs_of(tree)).sum())
        finished_rows(directory, study_of(directory), keep=True)


def test_a_run_that_ended_in_nan_is_told(study_directory: Path) -> None:
    summary = open_study(study_directory)["summary"].to_dataset()
    said = {
        run: (bit == "1", loss)
        for row in finished_rows(study_directory).values()
        for run, bit, loss in zip(runs_of(row), row["non_finite"], losses_of(row), strict=True)
    }
    assert 0 < int(summary["non_finite"].sum()) < 8
    for run, bad, loss in zip(
        *(summary[name].values.tolist() for name in ("run", "non_finite", "final_loss")), strict=True
    ):
        assert said[run] == pytest.approx((bad, loss), rel=0, abs=0, nan_ok=True)


def test_runs_that_are_in_two_packs_are_seen() -> None:
    """Each of the digits that are looked at counts, and each value of one."""
    runs = [hashlib.sha256(bytes([i])).hexdigest()[:24] for i in range(200)]
    packs = [" ".join(runs[i : i + 8]) for i in range(0, 200, 8)]
    assert all_differ(packs)
    assert all_differ([])
    assert not all_differ([*packs, runs[17]])
    assert not all_differ([*packs, "short"])
    for place in range(16):
        assert all_differ([runs[0][:place] + digit + runs[0][place + 1 :] for digit in "0123456789abcdef"])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same study in packs of one."""
    directory = tmp_path_factory.mktemp("alone")
    run_study(diverging(execution={"pack_size": 1}), directory, "cpu", Recorder())
    return directory


@pytest.mark.parametrize("twice", [True, False])
@pytest.mark.parametrize("grown", [True, False])
def test_runs_count_once_and_only_those_of_the_study(
    twice: bool, grown: bool, study_directory: Path, alone: Path, tmp_path: Path
) -> None:
    """Some are in two packs; some the study does not plan any more, while others of their packs it does."""
    directory = tmp_path / "copy"
    shutil.copytree(study_directory, directory, ignore=shutil.ignore_patterns(INDEX))
    if twice:
        for path in sorted((alone / "packs").iterdir())[:6]:
            shutil.copy(path, directory / "packs")
    study = diverging()
    if grown:
        study = tiny(axes={"learning_rate": [90.0, 4e-3], "seed": 3}, training={"clip": "none"})
        (directory / "study.toml").write_text(study.to_toml(), encoding="utf-8")
    finished_rows(directory, study, keep=True)
    summary = open_study(directory)["summary"].to_dataset()
    said = study_status(directory)
    wanted = (12, 4) if grown else (8, 8)
    assert (said["runs"]["planned"], said["runs"]["finished"]) == wanted
    assert summary.sizes["run"] == wanted[1]
    assert said["runs"]["diverged"] == int(summary["diverged"].sum())
    assert said["packs_finished"] == len(said["packs"]) == 2 + 3 * twice


def test_rules_are_told_apart_by_all_that_changes_an_outcome() -> None:
    rules = {rule_of(DivergenceTable(**change)) for change in (
        {}, {"window": 3}, {"progress_margin": 0.2}, {"sigma": 5.0}, {"spike_window": 64},
    )}  # fmt: skip
    assert len(rules) == 5
    assert rule_of(DivergenceTable(definition="gap", gap_margin=1.0)) == rule_of(DivergenceTable())


def test_outcomes_do_not_change_from_version_to_version() -> None:
    """They are kept in indexes on other people's disks: where this fails, raise RULES_VERSION or mend what moved them."""
    committed = ROOT / "studies" / "results" / "first-look-cpu"
    rows = finished_rows(committed, study_of(committed))
    assert index.RULES_VERSION == 1
    assert [(row["non_finite"], row["no_progress"], row["spike"]) for row in rows.values()] == [
        ("0000000000000000", "0000000000000000", "0000000000000000"),
        ("0000000000000000", "1111111111111111", "0010000000001000"),
        ("0000000000000000", "0000000011111111", "0000000000000010"),
    ]
    total = sum(loss for row in rows.values() for loss in losses_of(row))
    assert total == pytest.approx(269.7543673396111, rel=1e-12)


@pytest.mark.parametrize("seed", range(12))
def test_a_damaged_index_costs_a_reading_and_nothing_else(seed: int, directory: Path, read: list[str]) -> None:
    """Cut off, or a bit of it flipped, anywhere; deleted; or full of what nobody wrote."""
    rng = random.Random(seed)
    path, wanted = index_file(directory), finished_runs(directory)
    content = bytearray(path.read_bytes())
    if seed % 3 == 0:
        del content[rng.randrange(len(content) - 1) :]
    elif seed % 3 == 1:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    else:
        content = bytearray([b"", b"[]\n" * 9, b'["00000000", {}]\n', bytes(range(256)) * 9][seed // 3])
    path.write_bytes(content)
    read.clear()
    assert finished_runs(directory) == wanted == without_index(directory)
    assert 1 <= len(read) <= 2
    read.clear()
    assert finished_runs(directory) == wanted
    assert read == []  # made again


def test_rows_that_are_none_are_passed_over(directory: Path) -> None:
    """Their CRC is right, and they say nothing that could be used."""
    row: Any = next(iter(finished_rows(directory).values()))
    without_rule = {key: row[key] for key in row if key != "rule"}
    wrongs: list[Any] = [{**row, "runs": 3}, {**row, "file": "1 x"}, {**row, "more": 1}, without_rule, [], 3]
    with index_file(directory).open("ab") as file:
        file.writelines(index._line(json.dumps(wrong).encode()) + b"\n" for wrong in wrongs)
    assert len(read_index(directory).rows) == 2
    assert finished_runs(directory) == without_index(directory)


@pytest.mark.parametrize("harm", [cut, flipped])
@pytest.mark.parametrize("what", ["pack", "checksum"])
def test_a_pack_that_was_changed_is_seen_whatever_the_index_says(harm: Any, what: str, directory: Path) -> None:
    """Its size or its times are others; modification times can be set back, and are."""
    path = next(iter(sorted((directory / "packs").glob("*.nc"))))
    harmed = path if what == "pack" else path.with_suffix(CHECKSUM)
    before = harmed.stat()
    content = harmed.read_bytes()
    harmed.write_bytes(flipped(content) if harm is flipped else content[: len(content) // 2])
    os.utime(harmed, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert len(finished_runs(directory, mend=False)) == 4
    assert path.exists()
    assert len(finished_runs(directory)) == 4
    assert path.with_name(f"{path.name}.damaged").exists()


def rotten(directory: Path) -> Path:
    """A pack in which a bit is another, and an index by which its file is as it was: a disk that forgets sets no time."""
    path = next(iter(sorted((directory / "packs").glob("*.nc"))))
    path.write_bytes(flipped(path.read_bytes()))
    found = found_packs(directory)[path.stem]
    row = finished_rows(directory)[path.stem]
    append_row(directory, {**row, "file": " ".join(map(str, found.file))})
    return path


def test_a_bit_that_a_disk_lost_is_found_on_opening_and_mended_by_resume(
    directory: Path, study_directory: Path
) -> None:
    path = rotten(directory)
    assert len(finished_runs(directory)) == 8  # no time tells
    with pytest.raises(StudyError, match=rf"{path.name}: a damaged pack .*`exmy resume {directory}` keeps it aside"):
        open_study(directory)
    with pytest.raises(StudyError, match="a damaged pack"):
        open_study(directory, chunks="auto")
    result = CliRunner().invoke(main, ["resume", str(directory), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert path.with_name(f"{path.name}.damaged").exists()
    ours, theirs = open_study(directory), open_study(study_directory)
    xr.testing.assert_identical(ours["history"].to_dataset(), theirs["history"].to_dataset())


def _append(directory: Path, row: Any, first: int) -> None:
    for i in range(first, first + 100):
        append_row(directory, row | {"pack": f"{i:016x}"})


def test_several_processes_add_rows_at_once(directory: Path) -> None:
    """None is lost, none is torn."""
    row = next(iter(finished_rows(directory).values()))
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append, args=(directory, row, 100 * i)) for i in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert len(read_index(directory).rows) == 2 + 400
    assert len(finished_runs(directory)) == 8


def test_a_row_after_one_that_was_cut_off_is_whole(directory: Path) -> None:
    row = next(iter(finished_rows(directory).values()))
    path = index_file(directory)
    path.write_bytes(path.read_bytes()[:-40])
    append_row(directory, {**row, "pack": "f" * 16})
    assert "f" * 16 in read_index(directory).rows
    assert len(read_index(directory).rows) == 2


def test_an_index_that_is_mostly_dead_is_written_anew(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = next(iter(finished_rows(directory).values()))
    for i in range(20):
        append_row(directory, {**row, "pack": f"{i:016x}"})
    other = directory / INDEX / "another-host.jsonl"
    shutil.copy(index_file(directory), other)
    monkeypatch.setattr(index, "LEAST_DEAD", 10)
    wanted = finished_runs(directory)
    assert not other.exists()
    assert len(index_file(directory).read_bytes().splitlines()) == 2
    assert finished_runs(directory) == wanted


def test_who_only_looks_writes_nothing(study_directory: Path, tmp_path: Path) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(study_directory, directory, ignore=shutil.ignore_patterns(INDEX))
    before = sorted(directory.rglob("*"))
    assert study_status(directory)["runs"]["finished"] == 8
    assert len(finished_runs(directory, mend=False)) == 8
    open_study(directory, chunks=3)
    assert sorted(directory.rglob("*")) == before


def test_no_row_is_written_through_a_link(directory: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.move(directory / INDEX, elsewhere)
    (directory / INDEX).symlink_to(elsewhere)
    before = {path.name: path.read_bytes() for path in elsewhere.iterdir()}
    assert len(finished_runs(directory)) == 8
    assert {path.name: path.read_bytes() for path in elsewhere.iterdir()} == before


def test_an_index_that_cannot_be_written_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / INDEX).write_text("in the way")
    assert run_study(tiny(), tmp_path, "cpu", Recorder()).trained == 8
    assert run_study(tiny(), tmp_path, "cpu", Recorder()).found == 8
    assert any("packs are read again at the next start" in record.message for record in caplog.records)


def test_merged_packs_are_in_the_index(study_directory: Path, tmp_path: Path, read: list[str]) -> None:
    merge_studies([study_directory], tmp_path / "all")
    read.clear()
    assert finished_runs(tmp_path / "all") == without_index(study_directory)
    assert read == []


def test_a_pack_that_vanishes_between_two_looks_is_passed_over(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = found_packs(directory)
    gone = {**there, "0" * 16: next(iter(there.values()))}
    monkeypatch.setattr(finished, "found_packs", lambda *_, **__: gone)
    assert len(finished_runs(directory)) == 8


@pytest.mark.parametrize("path", COMMITTED, ids=[path.stem for path in COMMITTED])
def test_a_file_looked_into_says_what_xarray_says(path: Path) -> None:
    pack, tree = PackFile(path), store.read_pack(path)
    assert pack.attrs == dict(tree.attrs)
    assert list(pack.attrs) == list(tree.attrs)
    assert {type(v) for v in pack.attrs.values()} == {type(v) for v in tree.attrs.values()}
    assert set(pack.groups) == set(tree.children)
    for group in pack.groups:
        dataset = tree[group].to_dataset()
        assert set(pack.names(group)) == set(map(str, dataset.variables))
        for name, variable in dataset.variables.items():
            ours = pack.values(group, str(name))
            assert (ours.dtype, ours.shape) == (variable.dtype, variable.shape)
            assert ours.tobytes() == variable.values.tobytes()


def test_a_line_is_json_and_says_what_a_person_looks_for(directory: Path) -> None:
    line = json.loads(index_file(directory).read_text(encoding="utf-8").splitlines()[0])
    assert line[1]["runs"].split()[0] in without_index(directory)
    assert line[1]["pack"] in found_packs(directory)
