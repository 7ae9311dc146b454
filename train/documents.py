"""A text before it is tokenised: whole documents, each of them for training or for validation.

A document is on one side, all of it: a split by position would let the model read the beginning of a page that it is later
asked to predict. Which side is decided by a hash of the document's name (for texts that come with exmy) or of its content
(for a user's own, where names and places may change): the split is the same on every machine, a document that is added
or taken away moves no other, and by content exact copies are never on both sides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

VALIDATION_SHARE = 0.1
FEW_DOCUMENTS = 20  # fewer than that can't be split a tenth to nine tenths
LARGEST_PIECE, SMALLEST_PIECE, PIECES = 65_536, 1024, 64


class TextError(RuntimeError):
    """A text that can't be had; the message is one line that says why and how to mend it."""


@dataclass(frozen=True)
class Documents:
    """Documents as UTF-8, without NUL, in the order in which a text holds them."""

    train: list[bytes]
    validation: list[bytes]

    @property
    def count(self) -> int:
        """Of both splits."""
        return len(self.train) + len(self.validation)

    @property
    def size(self) -> int:
        """Bytes of both splits."""
        return sum(map(len, self.train)) + sum(map(len, self.validation))


@dataclass(frozen=True)
class Source:
    """Where a text comes from: `read` gives its documents, given the cache folder, and may take a minute and the network.

    `key` names its files in the cache, and says its version or its content. `sentence` describes it, with places for the
    number of documents and for what they became: {documents}, {unit} and {end}.
    """

    name: str
    key: str
    sentence: str
    read: Callable[[Path], Documents]


def is_validation(name: str | bytes) -> bool:
    """Whether the document of this name (or content) is held out; depends on that alone."""
    return _rank(name) < VALIDATION_SHARE * 2**64


def split_by_name(named: Iterable[tuple[str, bytes]]) -> Documents:
    """Documents split by a hash of their names, order kept."""
    sides: dict[bool, list[bytes]] = {False: [], True: []}
    for name, content in named:
        sides[is_validation(name)].append(content)
    return Documents(sides[False], sides[True])


def split_by_content(documents: list[bytes]) -> Documents:
    """Documents split by a hash of their contents, order kept; fewer than 20 are cut into pieces first.

    Neither side is left empty where there are two different documents: chance leaves one out of 30 texts of 32 documents
    without a held-out one, and then it is the one of the lowest hash; where it would hold out all, the one of the highest is not.
    """
    documents = [document for document in documents if document]
    if len(documents) < FEW_DOCUMENTS:
        limit = min(LARGEST_PIECE, max(SMALLEST_PIECE, sum(map(len, documents)) // PIECES))
        documents = [piece for document in documents for piece in pieces(document, limit)]
    ranks = [_rank(document) for document in documents]
    border = max(VALIDATION_SHARE * 2**64, min(ranks, default=0) + 1)
    if len(set(ranks)) > 1:
        border = min(border, max(ranks))
    train = [d for d, rank in zip(documents, ranks, strict=True) if rank >= border]
    return Documents(train, [d for d, rank in zip(documents, ranks, strict=True) if rank < border])


def pieces(document: bytes, limit: int) -> Iterator[bytes]:
    """A document in parts of at most `limit` bytes, cut after a line's end, or where there is none between two characters."""
    start = 0
    while len(document) - start > limit:
        end = document.rfind(b"\n", start, start + limit) + 1
        if not end:
            end = start + limit
            while end > start + 1 and document[end] & 0xC0 == 0x80:  # UTF-8's continuation bytes are 10xxxxxx
                end -= 1
        yield document[start:end]
        start = end
    if start < len(document):
        yield document[start:]


def _rank(name: str | bytes) -> int:
    content = name.encode() if isinstance(name, str) else name
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")
