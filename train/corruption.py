"""Text of lower quality, on purpose: a share of the training documents is made noise, shuffled, or a copy of others.

| kind | a document of n tokens becomes |
|---|---|
| noise | n tokens drawn uniformly from the whole vocabulary |
| shuffled | its own tokens in random order: their frequencies stay, their context is gone |
| duplicated | n tokens copied from documents that are untouched: nothing new |

Each keeps its length, and its closing separator, so that every other token stays where it was: two runs of the same data
seed read the same batches, but for what was corrupted, and runs are paired across qualities of data as they are across
formats. Validation is never touched.

A share is one of the training *tokens*, in whole documents: documents are put in a random order, one order for each kind,
and as many are taken from its front as come nearest to the share, those left out that an earlier kind (noise, then
shuffled, then duplicated) has taken. So a larger share holds the documents of a smaller one, as long as the shares of
earlier kinds are the same. Document i's place is decided by word i, a noise token at position p by word p, of Philox with
key (`SEED`, purpose): nothing depends on the run, its seeds or the machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Final

import numpy as np
import numpy.typing as npt

from train.seeds import random_words
from train.tokenizer import Tokens

SEED: Final = 0  # of which documents, and of what they become: one for all studies, so that their texts are the same
KINDS = ("noise", "shuffled", "duplicated")
UNMARKED = 4096  # tokens; a document where nothing says where documents end

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Corruption:
    """Shares of the training tokens, each in [0, 1], together at most 1."""

    noise: float = 0.0
    shuffled: float = 0.0
    duplicated: float = 0.0

    def __bool__(self) -> bool:
        return any(getattr(self, kind) for kind in KINDS)

    def __str__(self) -> str:
        """Shares that differ have words that differ; six digits where they say it."""
        shares = {f.name: getattr(self, f.name) for f in fields(self)}
        words = {
            name: short if float(short := f"{share:g}") == share else repr(share) for name, share in shares.items()
        }
        return ", ".join(f"{name} {words[name]}" for name, share in shares.items() if share)


@dataclass(frozen=True, eq=False)
class Corrupted:
    """Corrupted training tokens, same dtype and length as before, read-only; which of them are noise; all in words."""

    tokens: Tokens  # [tokens]
    is_noise: npt.NDArray[np.bool_]  # [tokens]
    done: str


def corrupt(train: Tokens, corruption: Corruption, vocabulary: int, separator: int | None) -> Corrupted:
    """A corrupted copy of the training tokens; `separator` is the token that closes a document, None where there is none."""
    bounds = document_bounds(train, separator)
    lengths = np.diff(bounds)
    taken = choose(lengths, corruption)
    result = train.copy()
    is_noise = np.zeros(train.size, bool)
    for document in taken["noise"]:
        start, end = _body(train, bounds, document, separator)
        result[start:end] = random_words(SEED, "data/noise", start, end - start) % np.uint64(vocabulary)
        is_noise[start:end] = True
    for document in taken["shuffled"]:
        start, end = _body(train, bounds, document, separator)
        order = np.argsort(random_words(SEED, "data/shuffled", start, end - start), kind="stable")
        result[start:end] = train[start:end][order]
    untouched = np.ones(len(bounds) - 1, bool)
    untouched[np.concatenate([*taken.values()])] = False
    originals = _from_anywhere(np.flatnonzero(untouched))
    for document in taken["duplicated"]:
        start, end = _body(train, bounds, document, separator)
        while start < end:
            original = next(originals)
            copied = train[bounds[original] : bounds[original + 1]][: end - start]
            result[start : start + copied.size] = copied
            start += copied.size
    result.flags.writeable = False
    done = (
        f"{kind} {len(documents)} ({lengths[documents].sum() / lengths.sum():.1%} of the tokens)"
        for kind, documents in taken.items()
        if len(documents)
    )
    words = f"{lengths.size} training documents, of which {', '.join(done) or 'none corrupted'}"
    return Corrupted(result, is_noise, words)


def document_bounds(tokens: Tokens, separator: int | None) -> Ints:
    """Where documents begin, and the end, [documents + 1]; 4,096 tokens are one where there is no separator."""
    ends = np.flatnonzero(tokens == separator) + 1 if separator is not None else np.zeros(0, np.int64)
    if not ends.size:
        ends = np.arange(UNMARKED, tokens.size + UNMARKED, UNMARKED)
    return np.unique(np.concatenate([[0], np.minimum(ends, tokens.size), [tokens.size]])).astype(np.int64)


def choose(lengths: Ints, corruption: Corruption) -> dict[str, Ints]:
    """Which documents, of these lengths in tokens, each kind takes; no document is taken twice."""
    free = np.ones(lengths.size, bool)
    taken: dict[str, Ints] = {}
    for kind in KINDS:
        order = np.argsort(random_words(SEED, f"data/order/{kind}", 0, lengths.size), kind="stable")
        order = order[free[order]]
        # After how many documents the sum is nearest to what is wanted; for a share of 1, after all of them.
        sums = np.concatenate([[0], np.cumsum(lengths[order])])
        count = int(np.abs(sums - getattr(corruption, kind) * lengths.sum()).argmin())
        taken[kind] = np.sort(order[:count])
        free[taken[kind]] = False
    if taken["duplicated"].size and not free.any():  # something must be left to copy
        taken["duplicated"] = taken["duplicated"][1:]
    return taken


def _body(train: Tokens, bounds: Ints, document: int, separator: int | None) -> tuple[int, int]:
    """A document's first token, and one past its last that is no closing separator."""
    start, end = int(bounds[document]), int(bounds[document + 1])
    return start, end - (separator is not None and int(train[end - 1]) == separator)


def _from_anywhere(documents: Ints) -> Iterator[int]:
    """Documents drawn at random, without end."""
    drawn = 0
    while True:
        for word in random_words(SEED, "data/duplicated", drawn, 1024):
            yield int(documents[int(word) % documents.size])
        drawn += 1024
