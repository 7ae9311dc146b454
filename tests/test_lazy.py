"""A study in chunks is the study in memory, to the bit: in values, types, labels, attributes and what is missing."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from train import Study, StudyError, lazy, open_study, run_study, store
from train.pack_file import PackFile

ROOT = Path(__file__).parent.parent


class Silent:
    """An observer that says nothing."""

    def planned(self, *_: Any) -> None: ...
    def pack_started(self, *_: Any) -> None: ...
    def pack_progress(self, *_: Any) -> None: ...
    def pack_finished(self, *_: Any) -> None: ...


def study(**changes: Any) -> Study:
    """Runs of unlike kinds: of 6 and 11 steps, of one and two blocks, with and without a loss scale; some diverge to NaN."""
    content: dict[str, Any] = {
        "name": "mixed",
        "axes": {
            "recipe": ["e8m7", "native-fp16-scaled"], "learning_rate": [1e-3, 90.0], "seed": 3, "steps": [11, 6],
            "layers": [2, 1],
        },
        "model": {"heads": 2, "width": 16, "context": 8},
        "training": {"sequences": 2, "warmup": 1, "clip": "none", "evaluate_every": 4, "evaluation_batches": 1},
        "probe": {"every": 5},
        "signals": {"every": 4},
        "execution": {"pack_size": 4, "checkpoint_seconds": 0},
    }  # fmt: skip
    for table, values in changes.items():
        content[table] = {**content.get(table, {}), **values}
    return Study.model_validate(content)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two probes' grids, a part without signals, runs that are in two packs, and runs that the study does not plan."""
    directory = tmp_path_factory.mktemp("mixed")
    run_study(study(axes={"seed": 1}, signals={"every": 0}, execution={"pack_size": 2}), directory, "cpu", Silent())
    run_study(study(axes={"seed": 2}), directory, "cpu", Silent())
    others = tmp_path_factory.mktemp("others")
    other = study(axes={"seed": [1, 3], "learning_rate": [1e-3], "steps": [6]}, execution={"pack_size": 2})
    run_study(other, others, "cpu", Silent())
    for i, path in enumerate(sorted((others / "packs").glob("*.nc"))):
        rewrite(path, directory / "packs" / path.name, 1 + i)
    (directory / "study.toml").write_text(store.study_text(study(axes={"seed": [1, 0, 3, 4]})), encoding="utf-8")
    return directory


def rewrite(path: Path, out: Path, seed: int) -> None:
    """A pack with other numbers in its attributes, and losses whose sum depends on the order in which they are added up."""
    tree = store.read_pack(path)
    rng = np.random.default_rng(seed)
    loss = tree["history"].to_dataset()["train_loss"]
    wild = rng.normal(size=loss.shape).astype(np.float32)
    wild[:, -6:] = [1, 1, 1, 1, 0, 2**53]  # which swallows ones that are added to it one by one
    tree["history"] = tree["history"].to_dataset().assign(train_loss=loss.copy(data=wild))
    for name in (
        "unigram_entropy",
        "tokens_per_step",
        "train_tokens",
        "evaluation_bytes_per_token",
        "train_bytes_per_token",
    ):
        tree.attrs[name] = tree.attrs[name] * (1 + seed)
    tree.to_netcdf(out, engine=store.ENGINE)


@pytest.fixture(scope="module")
def whole(mixed: Path) -> xr.DataTree:
    """In memory."""
    return open_study(mixed)


def assert_same(ours: xr.DataTree, theirs: xr.DataTree) -> None:
    assert list(ours.children) == list(theirs.children)
    assert ours.attrs == theirs.attrs
    assert [type(v) for v in ours.attrs.values()] == [type(v) for v in theirs.attrs.values()]
    for group in theirs.children:
        a, b = ours[group].to_dataset(), theirs[group].to_dataset()
        assert list(a.data_vars) == list(b.data_vars)
        for name in b.variables:
            x, y = a[name], b[name]
            assert (x.dims, x.dtype, x.attrs) == (y.dims, y.dtype, y.attrs)
            assert x.values.tobytes() == y.values.tobytes(), f"{group}/{name}"
        xr.testing.assert_identical(a.load(), b)


@pytest.mark.parametrize("chunks", ["auto", 1, 5])
def test_runs_of_many_kinds(mixed: Path, whole: xr.DataTree, chunks: Any) -> None:
    history, signals = whole["history"].to_dataset(), whole["signals"].to_dataset()
    assert history.sizes == {"run": 36, "step": 11, "block": 3}
    assert 0 < int(signals["measured"].sum()) < 36
    assert np.isnan(history["train_loss"].values).any()
    assert len(set(history["run"].values.tolist())) == 36
    assert_same(open_study(mixed, chunks=chunks), whole)


def test_the_gap_to_the_baseline_is_that_of_all_runs(mixed: Path, tmp_path: Path) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(mixed, directory)
    other = study(axes={"seed": [1, 0, 3, 4]}, divergence={"definition": "gap", "window": 9})
    (directory / "study.toml").write_text(store.study_text(other), encoding="utf-8")
    assert_same(open_study(directory, chunks=4), open_study(directory))


def test_a_first_spike_is_that_of_the_whole_history(tmp_path: Path) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(ROOT / "studies" / "results" / "first-look-cpu", directory)
    text = (directory / "study.toml").read_text(encoding="utf-8")
    (directory / "study.toml").write_text(text.replace('"no_progress"', '"spike"'), encoding="utf-8")
    ours = open_study(directory, chunks=7)
    assert 0 < int(ours["summary"]["diverged"].sum()) < 48
    assert_same(ours, open_study(directory))


@pytest.mark.parametrize("name", ["first-look-cpu", "recipes-12m"])
def test_the_committed_studies(name: str) -> None:
    directory = ROOT / "studies" / "results" / name
    assert_same(open_study(directory, chunks=50), open_study(directory))


def test_a_chunk_reads_the_packs_of_its_runs_alone(
    mixed: Path, whole: xr.DataTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = open_study(mixed, chunks=4)
    read: list[str] = []
    real = PackFile.__init__

    def noted(self: PackFile, path: Path) -> None:
        read.append(path.stem)
        real(self, path)

    monkeypatch.setattr(PackFile, "__init__", noted)
    run = str(tree["history"].to_dataset()["run"].values[9])
    loss = tree["history"].to_dataset()["train_loss"].isel(run=9).compute().values
    assert 1 <= len(set(read)) <= 4
    assert any(run in PackFile(mixed / "packs" / f"{pack}.nc").runs for pack in set(read))
    assert loss.tobytes() == whole["history"].to_dataset()["train_loss"].isel(run=9).values.tobytes()


def test_what_is_kept_of_files_is_bounded(mixed: Path) -> None:
    """However many packs a chunk has: the last few stay open."""
    packs, paths = lazy.Packs(), store.pack_files(mixed)
    for path in paths:
        packs.values(path, "history", "train_loss")
    assert len(paths) > lazy.KEPT
    assert list(packs._kept) == paths[-lazy.KEPT :]


def test_another_process_reads_for_itself(mixed: Path, whole: xr.DataTree) -> None:
    """What is kept of files stays where it is."""
    loss = open_study(mixed, chunks=8)["history"].to_dataset()["train_loss"]
    loss[0].compute()
    moved = pickle.loads(pickle.dumps(loss))
    assert moved.compute().values.tobytes() == whole["history"].to_dataset()["train_loss"].values.tobytes()


@pytest.mark.parametrize("chunks", [0, -3])
def test_chunks_of_nothing_are_refused(mixed: Path, chunks: int) -> None:
    with pytest.raises(StudyError, match=f'chunks must be "auto" or a number of runs, at least 1, got {chunks}'):
        open_study(mixed, chunks=chunks)


def test_a_study_without_a_finished_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(store.study_text(study()), encoding="utf-8")
    with pytest.raises(StudyError, match="none of the study's 48 runs is finished"):
        open_study(tmp_path, chunks="auto")
