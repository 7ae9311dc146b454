"""Corruption does what its table says to the documents that it takes, and nothing to anything else."""

from __future__ import annotations

import collections
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.corruption import KINDS, UNMARKED, Corruption, choose, corrupt, document_bounds
from train.seeds import random_words
from train.text import load_text
from train.tokenizer import Tokens

VOCABULARY = 50


def text(documents: int = 200, separator: int = 0) -> Tokens:
    """Documents of 1 to 60 tokens other than the separator, the separator last."""
    rng = np.random.default_rng(5)
    parts = [np.append(rng.integers(1, VOCABULARY, rng.integers(0, 60)), 0) for _ in range(documents)]
    tokens = np.concatenate(parts).astype(np.uint16)
    tokens[tokens == 0] = separator
    tokens.flags.writeable = False
    return tokens


def documents_of(tokens: Tokens, like: Tokens, separator: int = 0) -> list[list[int]]:
    """Tokens cut where `like` has its separators."""
    return [part.tolist() for part in np.split(tokens, np.flatnonzero(like == separator) + 1)[:-1]]


def changed(before: Tokens, after: Tokens) -> set[int]:
    pairs = zip(documents_of(before, before), documents_of(after, before), strict=True)
    return {i for i, (one, other) in enumerate(pairs) if one != other}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_a_share_of_the_tokens_is_corrupted_in_whole_documents_and_all_else_stays(kind: str, share: float) -> None:
    before = text()
    corrupted = corrupt(before, Corruption(**{kind: share}), VOCABULARY, 0)
    after, done = corrupted.tokens, corrupted.done
    assert after.size == before.size
    assert after.dtype == before.dtype
    assert not after.flags.writeable
    lengths = np.array([len(document) for document in documents_of(before, before)])
    taken = choose(lengths, Corruption(**{kind: share}))[kind]
    # A document is at most 60 tokens, so the nearest sum is at most half of one away; a copy needs one left to copy from.
    limit = 60 if kind == "duplicated" and share == 1 else 30
    assert abs(lengths[taken].sum() - share * lengths.sum()) <= limit
    assert changed(before, after) <= set(taken.tolist())
    assert f"{kind} {len(taken)} (" in done or not len(taken)
    ends = np.flatnonzero(before == 0)
    np.testing.assert_array_equal(after[ends], 0)  # every document still ends where it ended


def test_shuffled_documents_keep_their_tokens_in_another_order() -> None:
    before = text()
    after = corrupt(before, Corruption(shuffled=0.5), VOCABULARY, 0).tokens
    differing = 0
    for one, other in zip(documents_of(before, before), documents_of(after, before), strict=True):
        assert collections.Counter(one) == collections.Counter(other)
        differing += one != other
    assert differing > 50


def test_noise_is_the_words_of_the_stream_and_uniform() -> None:
    before = text()
    after = corrupt(before, Corruption(noise=1.0), VOCABULARY, 0).tokens
    ends = before == 0
    inside = ~ends
    np.testing.assert_array_equal(corrupt(before, Corruption(noise=1.0), VOCABULARY, 0).is_noise, inside)
    expected = random_words(0, "data/noise", 0, before.size) % VOCABULARY
    np.testing.assert_array_equal(after[inside], expected[inside])
    count = np.bincount(after[inside], minlength=VOCABULARY)
    n = int(inside.sum())
    assert abs(count - n / VOCABULARY).max() < 5 * np.sqrt(n / VOCABULARY)  # five standard deviations of each count


def test_duplicated_documents_are_copies_of_untouched_ones_one_after_the_other() -> None:
    before = text()
    after = corrupt(before, Corruption(duplicated=0.5), VOCABULARY, 0).tokens
    lengths = np.array([len(document) for document in documents_of(before, before)])
    taken = set(choose(lengths, Corruption(duplicated=0.5))["duplicated"].tolist())
    untouched = [tuple(d) for i, d in enumerate(documents_of(before, before)) if i not in taken]
    for i in taken:
        copy = np.array(documents_of(after, before)[i])[:-1]
        *whole, rest = [tuple(part.tolist()) for part in np.split(copy, np.flatnonzero(copy == 0) + 1)]
        assert set(whole) <= set(untouched)
        assert any(document[: len(rest)] == rest for document in untouched)  # the last is cut where the document ends


@pytest.mark.parametrize("kind", KINDS)
def test_a_larger_share_holds_the_documents_of_a_smaller_one(kind: str) -> None:
    lengths = np.random.default_rng(1).integers(1, 1000, 300)
    others = {"shuffled": {"noise": 0.2}, "duplicated": {"noise": 0.1, "shuffled": 0.2}, "noise": {}}[kind]
    taken: set[int] = set()
    for share in (0.05, 0.1, 0.3, 0.7):
        larger = set(choose(lengths, Corruption(**{kind: share}, **others))[kind].tolist())
        assert taken < larger
        taken = larger


def test_noise_at_a_position_is_the_same_whatever_the_share() -> None:
    before = text()
    few, many = (corrupt(before, Corruption(noise=share), VOCABULARY, 0).tokens for share in (0.2, 0.6))
    both = few != before
    np.testing.assert_array_equal(few[both], many[both])


@settings(max_examples=200)
@given(
    st.lists(st.integers(1, 1000), min_size=1, max_size=50),
    st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)).filter(lambda shares: sum(shares) <= 1),
)
def test_no_document_is_taken_twice(lengths: list[int], shares: tuple[float, float, float]) -> None:
    taken = choose(np.array(lengths), Corruption(*shares))
    every = np.concatenate(list(taken.values()))
    assert len(set(every.tolist())) == len(every)


def test_two_calls_and_two_neighbours_agree() -> None:
    """A run's text depends on nothing but the text and the shares."""
    before, corruption = text(), Corruption(0.2, 0.2, 0.2)
    one, other = (corrupt(before, corruption, VOCABULARY, 0).tokens for _ in range(2))
    np.testing.assert_array_equal(one, other)


def test_which_documents_they_are_is_pinned() -> None:
    """Studies of two versions must not differ in what they call the same text."""
    taken = choose(np.full(20, 10), Corruption(noise=0.2, shuffled=0.2, duplicated=0.2))
    found = {kind: documents.tolist() for kind, documents in taken.items()}
    assert found == {"noise": [6, 10, 11, 14], "shuffled": [2, 7, 16, 18], "duplicated": [8, 13, 15, 17]}


def test_where_nothing_marks_documents_they_are_of_4096_tokens() -> None:
    tokens = np.ones(10_000, np.uint16)
    assert document_bounds(tokens, None).tolist() == [0, UNMARKED, 2 * UNMARKED, 10_000]
    assert document_bounds(tokens, 7).tolist() == [0, UNMARKED, 2 * UNMARKED, 10_000]
    assert document_bounds(np.array([5, 7, 5, 5], np.uint8), 7).tolist() == [0, 2, 4]  # the last is not closed
    assert document_bounds(np.array([7, 7], np.uint8), 7).tolist() == [0, 1, 2]


def test_a_collapsed_run_makes_no_progress_on_noisy_text_either(tmp_path: Path) -> None:
    """A model that knows how frequent bytes are, and which documents are noise, is at the line, not below it."""
    clean = load_text("python", tmp_path)
    noisy = load_text("python", tmp_path, corruption=Corruption(noise=0.5))
    pairs = [part.train.tobytes() for part in (clean, noisy)]
    ends = np.flatnonzero(clean.train == 0) + 1
    same = [pairs[0][i:j] for i, j in itertools.pairwise([0, *ends]) if pairs[0][i:j] == pairs[1][i:j]]
    count = collections.Counter(b"".join(same) + b"\0" * (len(ends) - len(same)))
    p = np.array(list(count.values())) / count.total()
    share = 1 - count.total() / clean.train.size
    half_a_document = np.diff(ends).max() / 2 / clean.train.size  # whole ones are taken, to the nearest sum
    assert share == pytest.approx(0.5, abs=half_a_document)
    assert noisy.unigram_entropy == pytest.approx(share * math.log(256) - (1 - share) * (p * np.log(p)).sum(), abs=1e-4)
    assert noisy.sha256 != clean.sha256
    np.testing.assert_array_equal(noisy.validation, clean.validation)
    everything = load_text("python", tmp_path, corruption=Corruption(noise=1.0))
    assert everything.unigram_entropy == pytest.approx(math.log(256), abs=1e-3)  # the closing NULs are text
    shuffled = load_text("python", tmp_path, corruption=Corruption(shuffled=0.5))
    assert shuffled.unigram_entropy == pytest.approx(clean.unigram_entropy, abs=1e-12)


def test_in_words_only_what_is_corrupted() -> None:
    assert not Corruption()
    assert str(Corruption()) == ""
    assert str(Corruption(noise=0.1, duplicated=0.25)) == "noise 0.1, duplicated 0.25"
    assert str(Corruption(noise=1, shuffled=1e-5)) == "noise 1, shuffled 1e-05"
    assert str(Corruption(noise=0.10000001)) == "noise 0.10000001", "another text than that of 0.1"
