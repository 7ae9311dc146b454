"""A text of one's own: whatever it is kept in, the tokens are its documents', and it is known by what it holds."""

from __future__ import annotations

import gzip
import json
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from train.documents import TextError
from train.own_text import own_source
from train.text import Text, load_text

ROWS = [f"Document {i}, in which {i * i} is said.\n" * 3 for i in range(60)]


def documents(text: Text) -> list[str]:
    """What the tokens of both splits say, sorted."""
    both = text.train.tobytes() + text.validation.tobytes()
    assert both.endswith(b"\0")
    return sorted(part.decode() for part in both[:-1].split(b"\0"))


def load(path: Path, cache: Path, tokenizer: str = "bytes") -> Text:
    return load_text(str(path), cache, tokenizer)


def test_a_file_is_cut_into_pieces_at_line_ends(tmp_path: Path) -> None:
    content = "".join(f"line {i} — ok\n" for i in range(20_000))
    (tmp_path / "mine.txt").write_text(content, encoding="utf-8")
    text = load(tmp_path / "mine.txt", tmp_path / "cache")
    pieces = documents(text)
    assert sum(map(len, pieces)) == len(content)
    assert set("".join(pieces).split("\n")) == set(content.split("\n"))
    assert all(piece.startswith("line ") and piece.endswith("\n") for piece in pieces)
    assert text.name == "mine.txt"
    assert 0.02 < text.validation.size / text.train.size < 0.3  # a tenth, of about 64 pieces


def test_a_folders_files_are_its_documents(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    for i, row in enumerate(ROWS):
        path = folder / f"part {i % 3}" / f"{i}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(row)
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("hidden")
    (folder / ".hidden").write_text("hidden")
    (folder / "empty").touch()
    (folder / "picture.png").write_bytes(b"\x89PNG\0")
    (folder / "latin").write_bytes(b"caf\xe9")
    with pytest.warns(UserWarning, match="2 files that are not UTF-8 text are left out: latin"):
        text = load(folder, tmp_path / "cache")
    assert documents(text) == sorted(ROWS)
    assert text.validation.size


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "jsonl.gz", "jsonl.zst"])
def test_a_tables_rows_are_its_documents(tmp_path: Path, ending: str) -> None:
    pytest.importorskip("datasets")
    path = tmp_path / f"mine.{ending}"
    lines = "".join(json.dumps({"id": i, "text": row}) + "\n" for i, row in enumerate(ROWS)).encode()
    if ending == "parquet":
        parquet, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
        parquet.write_table(pa.table({"id": list(range(len(ROWS))), "text": ROWS}), path)
    elif ending == "jsonl.zst":
        path.write_bytes(pytest.importorskip("zstandard").compress(lines))
    else:
        path.write_bytes(gzip.compress(lines) if ending == "jsonl.gz" else lines)
    text = load(path, tmp_path / "cache")
    assert documents(text) == sorted(ROWS)
    assert text.validation.size


def test_tables_and_files_may_lie_in_one_folder(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "a.txt").write_text(ROWS[0])
    (folder / "b.jsonl").write_text("".join(json.dumps({"words": row}) + "\n" for row in ROWS[1:]))
    assert documents(load(folder, tmp_path / "cache")) == sorted(ROWS)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"a": "x", "b": "y"}], r"no column 'text' among 'a', 'b'; rename the one"),
        ([{"text": 3}], r"row 0's 'text' is int, not a string"),
        ([{"text": "a\0b"}], r"row 0's 'text' holds a NUL character"),
        (["{not json"], r"can't be read as json"),
    ],
)
def test_a_table_that_will_not_do_is_one_line(tmp_path: Path, lines: list[object], message: str) -> None:
    pytest.importorskip("datasets")
    path = tmp_path / "mine.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    with pytest.raises(TextError, match=message) as refusal:
        load(path, tmp_path / "cache")
    assert "\n" not in str(refusal.value)


def test_without_datasets_a_table_says_what_to_install_and_text_needs_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "mine.jsonl").write_text(json.dumps({"text": "a"}))
    with pytest.raises(TextError, match=r"not installed: pip install 'exmy\[data\]'"):
        load(tmp_path / "mine.jsonl", tmp_path / "cache")
    (tmp_path / "mine.txt").write_text("a line\n" * 1000)
    assert load(tmp_path / "mine.txt", tmp_path / "cache").train.size


def test_a_text_that_moves_is_the_same_text(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for i, row in enumerate(ROWS):
        (tmp_path / "a" / f"{i:02d}.txt").write_text(row)
    first = load(tmp_path / "a", tmp_path / "cache")
    shutil.move(tmp_path / "a", tmp_path / "deep.er")
    moved = load(tmp_path / "deep.er", tmp_path / "cache")
    assert moved.sha256 == first.sha256
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert (first.name, moved.name) == ("a", "deep.er")
    assert str(tmp_path) not in first.source


def test_a_text_that_changes_is_another_even_at_the_same_length(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("a line\n" * 1000)
    first = load(path, tmp_path / "cache")
    path.write_text("b line\n" * 1000)
    second = load(path, tmp_path / "cache")
    assert first.sha256 != second.sha256
    assert b"a line" not in second.train.tobytes()


def test_a_name_with_braces_is_only_a_name(tmp_path: Path) -> None:
    (tmp_path / "{unit}.txt").write_text("a line\n" * 1000)
    assert "{unit}.txt" in load(tmp_path / "{unit}.txt", tmp_path / "cache").source


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "there is nothing in it"),
        (b"one line\n", "can't be split into training and validation; take more text"),
        (b"abc\0def", "holds a NUL byte at 3"),
        (b"abc caf\xe9", "not UTF-8 at byte 7; convert it"),
    ],
)
def test_a_file_that_will_not_do_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "mine.txt").write_bytes(content)
    with pytest.raises(TextError, match=message) as refusal:
        load(tmp_path / "mine.txt", tmp_path / "cache")
    assert "mine.txt" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_path_with_nothing_at_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="nowhere: no such file or folder"):
        load(tmp_path / "nowhere", tmp_path / "cache")
    with pytest.raises(TextError, match="no such file or folder"):
        own_source(Path("nowhere.bin"))


def write(path: Path, tokens: npt.ArrayLike) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.asarray(tokens, "<u2").tofile(path)
    return path


def test_a_pair_of_bins_is_nanogpts_split(tmp_path: Path) -> None:
    train = np.random.default_rng(0).integers(0, 65, 5000)
    write(tmp_path / "mine" / "train.bin", train)
    write(tmp_path / "mine" / "val.bin", [1, 2, 3, 0x0102 % 65])
    text = load(tmp_path / "mine", tmp_path / "cache", "ids-65")
    assert text.train.tolist() == train.tolist()
    assert text.validation.tolist() == [1, 2, 3, 0x0102 % 65]
    assert text.vocabulary == 65
    assert text.train.dtype == np.uint8
    assert text.token_bytes is None
    assert not text.train.flags.writeable
    assert not (tmp_path / "cache").exists()  # they are tokens already
    p = np.bincount(train) / 5000
    assert text.unigram_entropy == pytest.approx(-(p * np.log(p)).sum())


def test_tokens_are_little_endian_and_may_need_16_bits(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for name in ("train.bin", "val.bin"):
        (tmp_path / "mine" / name).write_bytes(b"\x01\x02" * 3 + b"\xff\x00")
    text = load(tmp_path / "mine", tmp_path / "cache", "ids-32000")
    assert text.train.tolist() == [0x0201] * 3 + [0x00FF]
    assert text.train.dtype == np.uint16


def test_a_single_bin_is_split_by_pieces(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 1000, 200_000)
    text = load(write(tmp_path / "mine.bin", tokens), tmp_path / "cache", "ids-1000")
    assert text.train.size + text.validation.size == tokens.size
    both = np.bincount(text.train, minlength=1000) + np.bincount(text.validation, minlength=1000)
    np.testing.assert_array_equal(both, np.bincount(tokens, minlength=1000))
    assert 0.01 < text.validation.size / tokens.size < 0.25


@pytest.mark.parametrize(
    ("tokenizer", "tokens", "message"),
    [
        ("bytes", [1, 50_256], r"holds token 50256 and tokenizer 'bytes' has 256: .*--set tokenizer=gpt2"),
        ("gpt2", [1, 50_300], r"holds token 50300 and tokenizer 'gpt2' has 50257: .*--set tokenizer=ids-50301"),
        ("bpe-4096", [1], r"is tokens already, and bpe-4096 is trained on text"),
        ("ids-9", [1, 2], r"2 tokens can't be split into training and validation"),
        ("ids-9", [], r"0 bytes: a \.bin holds uint16 tokens"),
    ],
)
def test_tokens_of_another_vocabulary_are_refused(
    tmp_path: Path, tokenizer: str, tokens: list[int], message: str
) -> None:
    with pytest.raises(TextError, match=message):
        load(write(tmp_path / "mine.bin", tokens), tmp_path / "cache", tokenizer)


def test_an_odd_number_of_bytes_and_half_a_pair_are_refused(tmp_path: Path) -> None:
    (tmp_path / "odd.bin").write_bytes(b"abc")
    with pytest.raises(TextError, match=r"3 bytes: a \.bin holds uint16"):
        load(tmp_path / "odd.bin", tmp_path / "cache")
    write(tmp_path / "half" / "train.bin", [1, 2])
    with pytest.raises(TextError, match=r"val\.bin is missing beside train\.bin"):
        load(tmp_path / "half", tmp_path / "cache")


def test_text_is_not_taken_for_tokens(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("a line\n" * 1000)
    with pytest.raises(TextError, match=r"is text, and ids-65 is for a \.bin of tokens: take bytes"):
        load(tmp_path / "mine.txt", tmp_path / "cache", "ids-65")


def test_no_network_is_ever_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where `datasets` was imported before, without its offline mode."""
    pytest.importorskip("datasets")
    asked: list[object] = []

    def ask(*arguments: object, **_: object) -> None:
        asked.append(arguments)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", ask)
    monkeypatch.setattr(socket, "getaddrinfo", ask)
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
    assert documents(load(tmp_path / "mine.jsonl", tmp_path / "cache")) == sorted(ROWS)
    assert not asked
