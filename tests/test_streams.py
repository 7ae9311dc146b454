"""From a study to its tokens: what shares a program, what a run is called, and what its results say of its text."""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from train import Study, StudyError, open_study, run_study, store
from train.derived import shared_attributes
from train.plan import PlannedPack, plan, program_of
from train.program import Progress
from train.progress import RichObserver
from train.streams import epochs, evaluation_bytes_per_token, load_texts
from train.text import load_text

LINES = "".join(f"The {i}th line says {i * i % 97} — and no more.\n" for i in range(6000))


def small(dataset: str | list[str], **changes: Any) -> Study:
    """One run of a few steps for each text."""
    content: dict[str, Any] = {
        "name": "small",
        "axes": {"recipe": ["e8m7"], "learning_rate": [1e-3], "dataset": dataset},
        "model": {"layers": 1, "heads": 2, "width": 16, "context": 16},
        "training": {"steps": 12, "sequences": 2, "warmup": 3, "evaluate_every": 6, "evaluation_batches": 2},
        "probe": {"every": 0},
    }
    for table, values in changes.items():
        content[table] = {**content.get(table, {}), **values}
    return Study.model_validate(content)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A text of one's own."""
    path = tmp_path / "mine.txt"
    path.write_text(LINES, encoding="utf-8")
    return path


def summary_of(directory: Path) -> xr.Dataset:
    return open_study(directory)["summary"].to_dataset()


def tokens_of(path: Path) -> Path:
    """A pair of .bin files of 300 different tokens."""
    path.mkdir()
    for name, size in (("train.bin", 4000), ("val.bin", 400)):
        np.random.default_rng(size).integers(0, 300, size).astype("<u2").tofile(path / name)
    return path


def test_runs_on_different_tokens_are_never_in_one_pack(mine: Path) -> None:
    study = small(
        [str(mine), "python"],
        axes={"tokenizer": ["bytes", "bpe-4096"], "noise": [0.0, 0.1], "seed": 2},
        execution={"pack_size": 8},
    )
    packs = plan(study, torch.device("cpu"))
    assert len(packs) == 2 * 2 * 2
    for pack in packs:
        assert len({(run.dataset, run.model.tokenizer, run.data.noise) for run in pack.runs}) == 1
        assert len(pack.runs) == 2
    assert {pack.program.dataset for pack in packs} >= {
        "mine.txt",
        "mine.txt as bpe-4096, noise 0.1",
        "python, noise 0.1",
    }


@pytest.mark.parametrize(
    ("tokenizer", "vocabulary"), [("bytes", 256), ("bpe-4096", 4096), ("gpt2", 50_257), ("ids-65", 65)]
)
def test_the_models_vocabulary_is_the_tokenizers(tokenizer: str, vocabulary: int) -> None:
    (run,) = small("python", model={"tokenizer": tokenizer}).runs()
    assert program_of(run).shape.vocabulary == vocabulary


def test_a_text_that_moved_has_the_same_runs(tmp_path: Path) -> None:
    here, there = (next(small(place).runs()) for place in ("here/mine.txt", "/there/mine.txt"))
    assert here.identity == there.identity
    assert here.dataset == there.dataset == "mine.txt"
    assert next(small("here/other.txt").runs()).identity != here.identity


def test_defaults_of_data_leave_identities_and_any_other_share_does_not() -> None:
    plain = next(small("python").runs()).identity
    assert next(small("python", data={"noise": 0.0}).runs()).identity == plain
    others = [{"noise": 0.1}, {"shuffled": 0.1}, {"duplicated": 0.1}, {"noise": 0.2}]
    assert len({plain, *(next(small("python", data=other).runs()).identity for other in others)}) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"noise": 1.5}}, "less than or equal to 1"),
        ({"data": {"noise": 0.6, "shuffled": 0.5}}, "at most 1 together, got 1.1"),
        ({"axes": {"noise": [0.1, 0.7]}, "data": {"shuffled": 0.5}}, "at most 1 together, got 1.2"),
        ({"axes": {"dataset": ["a/mine.txt", "b/mine.txt"]}}, "called by the last part of their paths"),
        ({"model": {"tokenizer": "bpe-4069"}}, "did you mean 'bpe-4096'"),
        ({"axes": {"noize": [0.1]}}, "axes.noize is no axis; did you mean 'noise'"),
    ],
)
def test_impossible_data_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small("python", **change)


def test_what_is_wrong_with_a_text_is_said_before_any_work(mine: Path, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"nowhere\.txt: no such file"):
        run_study(small(str(tmp_path / "nowhere.txt")), tmp_path / "out", "cpu")
    mine.write_text(LINES[:20_000])
    with pytest.raises(
        StudyError, match=r"mine.txt: its validation part has \d+ tokens, and a context of 8192 needs more"
    ):
        run_study(small(str(mine), model={"context": 8192}), tmp_path / "out", "cpu")
    assert not (tmp_path / "out" / "study.toml").exists()


def test_the_attributes_of_a_study_say_where_its_packs_are_not_alike() -> None:
    """Whichever comes first; a pack that says nothing of a thing is one more answer."""
    one: dict[str, Any] = {"device": "CPU", "seconds": 1.0, "pack": "a"}
    other = one | {"restarted_from_pack_size": 16, "peak_bytes": 5, "seconds": 2.0, "pack": "b"}
    for packs, word in (([one, other, one], "absent | 16"), ([other, one], "16 | absent"), ([other, other], 16)):
        found = shared_attributes(packs)
        assert found.pop("seconds") == sum(pack["seconds"] for pack in packs)
        assert found == {"device": "CPU", "restarted_from_pack_size": word, "peak_bytes": 5}
    assert shared_attributes([one, one]) == {"device": "CPU", "seconds": 2.0}


def test_results_say_what_the_text_was(mine: Path, tmp_path: Path) -> None:
    study = small(str(mine), model={"tokenizer": "bytes"}, data={"shuffled": 0.25})
    run_study(study, tmp_path / "out", "cpu", cache=tmp_path / "cache")
    tree = open_study(tmp_path / "out")
    attributes = tree.attrs
    text = load_text(str(mine), tmp_path / "cache", "bytes", next(study.runs()).data.corruption)
    assert attributes["dataset"] == "mine.txt"
    assert attributes["dataset_sha256"] == text.sha256
    assert attributes["corruption"] == "shuffled 0.25"
    assert attributes["train_tokens"] == text.train.size
    assert (attributes["tokenizer"], attributes["vocabulary"]) == ("bytes", 256)
    assert "Corrupted on purpose (shuffled 0.25)" in attributes["dataset_source"]
    assert str(tmp_path) not in attributes["dataset_source"]


def test_a_run_under_way_is_held_against_the_line_that_will_judge_it(mine: Path, tmp_path: Path) -> None:
    lines: list[float] = []

    class Ear(RichObserver):
        def pack_progress(self, pack: PlannedPack, progress: Progress) -> None:
            lines.append(progress.unigram_entropy)

    run_study(small(str(mine), data={"noise": 0.5}), tmp_path / "out", "cpu", Ear(), tmp_path / "cache")
    line = float(summary_of(tmp_path / "out")["unigram_entropy"].item())
    assert set(lines) == {line}
    clean = load_text(str(mine), tmp_path / "cache").unigram_entropy
    assert line == pytest.approx((math.log(256) + clean) / 2, abs=0.2)  # documents are whole, so half is about half


def test_a_byte_costs_the_loss_over_ln_2_in_bits(mine: Path, tmp_path: Path) -> None:
    run_study(small(str(mine)), tmp_path / "out", "cpu", cache=tmp_path / "cache")
    tree = open_study(tmp_path / "out")
    evaluation, summary = tree["evaluation"].to_dataset(), tree["summary"].to_dataset()
    np.testing.assert_allclose(evaluation["bits_per_byte"], np.log2(np.exp(evaluation["validation_loss"])), rtol=1e-6)
    np.testing.assert_allclose(summary["final_bits_per_byte"], np.log2(np.exp(summary["final_loss"])), rtol=1e-6)
    # An untrained model is about uniform: 8 bits for each of 256 bytes.
    assert evaluation["bits_per_byte"].values[0, 0] == pytest.approx(8, abs=0.1)
    assert evaluation["bits_per_byte"].attrs["units"] == "bits/byte"


def test_epochs_are_tokens_read_over_tokens_there_are(
    mine: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    study = small(str(mine), training={"steps": 12, "sequences": 1024})
    text = load_texts(study, tmp_path / "cache")["mine.txt"]
    expected = 12 * 1024 * 16 / text.train.size
    assert epochs(program_of(next(study.runs())), text) == expected
    with caplog.at_level(logging.WARNING):
        run_study(small(str(mine), training={"sequences": 2048}), tmp_path / "out", "cpu", cache=tmp_path / "cache")
    assert f"mine.txt: {text.train.size:,} training tokens, so a run reads them {2 * expected:.1f} times" in caplog.text
    assert summary_of(tmp_path / "out")["epochs"].values.tolist() == [2 * expected]


def test_a_run_that_reads_less_than_its_text_is_not_warned_of(
    mine: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_study(small(str(mine)), tmp_path / "out", "cpu", cache=tmp_path / "cache")
    assert "epochs" not in caplog.text


def test_changed_data_is_refused_and_data_that_only_moved_is_found_finished(mine: Path, tmp_path: Path) -> None:
    out, cache = tmp_path / "out", tmp_path / "cache"
    run_study(small(str(mine)), out, "cpu", cache=cache)
    (tmp_path / "elsewhere").mkdir()
    moved = mine.rename(tmp_path / "elsewhere" / mine.name)
    outcome = run_study(small(str(moved)), out, "cpu", cache=cache)
    assert (outcome.trained, outcome.found) == (0, 1)
    moved.write_text(LINES.replace("more", "less"))
    with pytest.raises(StudyError, match=r"holds runs on another 'mine\.txt' text"):
        run_study(small(str(moved)), out, "cpu", cache=cache)


def test_tokens_of_16_bits_train(tmp_path: Path) -> None:
    path = tokens_of(tmp_path / "tokens.d")
    study = small(str(path), model={"tokenizer": "ids-300"})
    run_study(study, tmp_path / "out", "cpu", cache=tmp_path / "cache")
    evaluation = open_study(tmp_path / "out")["evaluation"].to_dataset()
    summary = summary_of(tmp_path / "out")
    # Uniform over 300 tokens to begin with, whose bytes nobody knows.
    assert evaluation["validation_loss"].values[0, 0] == pytest.approx(math.log(300), abs=0.1)
    assert np.isnan(evaluation["bits_per_byte"].values).all()
    assert np.isnan(summary["final_bits_per_byte"].values).all()
    assert summary["epochs"].values[0] == 12 * 2 * 16 / 4000


def test_evaluation_bytes_are_those_of_the_tokens_that_were_predicted(mine: Path, tmp_path: Path) -> None:
    study = small(str(mine))
    text = load_texts(study, tmp_path / "cache")["mine.txt"]
    lengths = np.arange(1, 257, dtype=np.uint16)  # as if token i stood for i + 1 bytes
    odd = dataclasses.replace(text, token_bytes=lengths)
    program = program_of(next(study.runs()))
    starts = np.linspace(0, text.validation.size - 16 - 1, 4).astype(int)
    predicted = [int(text.validation[start + 1 + t]) + 1 for start in starts for t in range(16)]
    assert evaluation_bytes_per_token(program, odd) == pytest.approx(np.mean(predicted), rel=1e-12)


def test_results_of_before_are_of_bytes_and_know_no_epochs(mine: Path, tmp_path: Path) -> None:
    """Packs that an earlier version wrote lack the attributes that these are derived from."""
    run_study(small(str(mine)), tmp_path / "out", "cpu", cache=tmp_path / "cache")
    packs = list(store.read_packs(tmp_path / "out"))
    study = small(str(mine))
    for name in ("train_tokens", "train_bytes_per_token", "evaluation_bytes_per_token", "tokenizer"):
        del packs[0].attrs[name]
    summary = store.summarise(study, packs[0]["history"].to_dataset(), packs)
    np.testing.assert_allclose(summary["final_bits_per_byte"], summary["final_loss"] / math.log(2))
    assert np.isnan(summary["epochs"].values).all()
