"""Text as tokens: what a run trains and is validated on.

    a name or a path -> documents, split -> tokens, each document closed by a separator -> a token file in the cache

The unigram entropy H = -sum_i p_i ln p_i of the training tokens is the loss of a model that knows how frequent each
token is and nothing else. A run that ends there has learnt nothing from context: it is the line that `no_progress` draws
(see stability). It belongs to the tokens, so a text has another one with each tokenizer. Where a share s of the tokens is
noise, H = s ln V + (1 - s) H(the other tokens), since to tell noise from text is easy and teaches nothing about text.

Losses in nats per token say little across tokenizers: a token of GPT-2 stands for four bytes of English. Bits per byte do,
loss / (ln 2 * bytes per token), and every token's number of bytes is known.
"""

from __future__ import annotations

import atexit
import dataclasses
import difflib
import functools
import hashlib
import json
import math
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from train.cache import cache_folder, keep, read_checked
from train.corpora import CORPORA
from train.corruption import Corruption, corrupt
from train.documents import Source, TextError
from train.own_text import is_path, is_tokenized, own_name, own_source, own_tokens
from train.standard_library import python_source
from train.tokenizer import (
    VOCABULARIES,
    Tokens,
    check_tokenizer,
    gpt2_tokenizer,
    separator_of,
    token_bytes,
    token_dtype,
    tokenize,
    vocabulary_of,
)

KNOWN_TEXTS = ("python", *CORPORA)
CLEAN = Corruption()
BLOCK = 2**24


@dataclass(frozen=True, eq=False)
class Text:
    """A text as tokens, split by document. The arrays are read-only: use `torch.tensor`, not `torch.from_numpy`."""

    name: str
    train: Tokens  # [tokens]; uint8 for a vocabulary of at most 256, else uint16
    validation: Tokens  # [tokens]
    vocabulary: int
    unigram_entropy: float  # nats, of the training tokens
    sha256: str  # hex, of the token file: both splits and where one ends
    source: str  # a sentence for a study's provenance
    tokenizer: str = "bytes"
    token_bytes: npt.NDArray[np.uint16] | None = None  # [vocabulary], what each token stands for; None where unknown

    @functools.cached_property
    def train_bytes_per_token(self) -> float:
        """The mean over the training tokens; counting them takes as long as a hundred steps, so it is done once."""
        return self.bytes_per_token(self.train)

    def bytes_per_token(self, tokens: Tokens) -> float:
        """The mean over these tokens, separators counted as one byte; NaN where a token's bytes are not known."""
        if self.token_bytes is None or not tokens.size:
            return math.nan
        return float(_counts(tokens, self.vocabulary) @ self.token_bytes.astype(np.int64)) / tokens.size


def load_text(name: str, cache: Path | None = None, tokenizer: str = "bytes", corruption: Corruption = CLEAN) -> Text:
    """The text of that name or at that path, from its token file in `cache`, or made and put there.

    `cache` is a folder; None means `$EXMY_CACHE`, else `$XDG_CACHE_HOME/exmy`, else `~/.cache/exmy`. What is not there is
    read from the installed Python (`python`), downloaded (see `corpora`) or read from the path, and tokenised, which takes up
    to a minute. A token file that does not match its hash is made again, with a warning; a cache that can't be written
    costs a warning and the time. Raises ValueError for an unknown name or tokenizer, TextError (a RuntimeError) where the
    text can't be had.
    """
    check_dataset(name)
    check_tokenizer(tokenizer)
    folder = _folder(cache)
    path = Path(name).expanduser()
    if is_path(name) and is_tokenized(path):
        text = _own_tokens(path, tokenizer, folder)
    else:
        if tokenizer.startswith("ids-"):
            raise TextError(f"{name} is text, and {tokenizer} is for a .bin of tokens: take {', '.join(VOCABULARIES)}")
        text = _from_source(own_source(path) if is_path(name) else known_source(name), tokenizer, folder)
    return _corrupted(text, corruption) if corruption else text


def check_dataset(name: str) -> str:
    """The name, if it is a known text's or a path; else ValueError."""
    if name in KNOWN_TEXTS:
        return name
    if is_path(name):
        if own_name(name) in KNOWN_TEXTS:
            raise ValueError(
                f"dataset {name!r} would be called {own_name(name)!r}, as the text that comes with exmy: rename it"
            )
        return name
    nearest = (difflib.get_close_matches(name, KNOWN_TEXTS, n=1, cutoff=0.0) or KNOWN_TEXTS)[0]
    raise ValueError(
        f"dataset {name!r} is unknown; there are: {', '.join(KNOWN_TEXTS)}, or a path (./{name}); did you mean {nearest!r}?"
    )


def dataset_label(name: str) -> str:
    """What a dataset is called in results: a known text's name, or the last part of a path, wherever that lies."""
    return name if name in KNOWN_TEXTS else own_name(name)


def known_source(name: str) -> Source:
    """Of a text that comes with exmy."""
    return python_source() if name == "python" else CORPORA[name].source()


def token_file(source: Source, tokenizer: str, cache: Path) -> Path:
    """Where a text's tokens are kept."""
    return cache / f"{source.key}{'' if tokenizer == 'bytes' else f'-{tokenizer}'}.tokens"


def kept_tokens(source: Source, cache: Path) -> dict[str, int]:
    """Tokenizers in which the cache holds a text, with its number of training tokens in each; hashes are not looked at."""
    kept: dict[str, int] = {}
    for tokenizer in VOCABULARIES:
        try:
            with token_file(source, tokenizer, cache).open("rb") as stream:
                stream.readline()
                kept[tokenizer] = int(json.loads(stream.readline())["train"])
        except (OSError, ValueError, KeyError, TypeError):  # none, or a damaged one
            continue
    return kept


def unigram_entropy(tokens: Tokens) -> float:
    """-sum_i p_i ln p_i in nats, p_i the share of token i: the best loss of a model that ignores context."""
    count = _counts(tokens, 1)
    share = count[count > 0] / tokens.size
    return float(-(share * np.log(share)).sum()) + 0.0  # one token only gives -0.0; an entropy has no sign


def _counts(tokens: Tokens, vocabulary: int) -> npt.NDArray[np.int64]:
    """How often each token occurs, [at least vocabulary]; by blocks, since bincount makes 64-bit integers of its input."""
    total = np.zeros(vocabulary, np.int64)
    for start in range(0, tokens.size, BLOCK):
        count = np.bincount(tokens[start : start + BLOCK], minlength=total.size)
        count[: total.size] += total
        total = count
    return total


def _folder(cache: Path | None) -> Path:
    try:
        return cache or cache_folder()
    except RuntimeError as error:  # no home folder to be found
        warnings.warn(f"no cache folder ({error}): set EXMY_CACHE, or texts are made again each time", stacklevel=3)
        return _passing_cache()


@functools.cache
def _passing_cache() -> Path:
    """A folder of this process's own, gone with it."""
    folder = tempfile.mkdtemp(prefix="exmy-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _from_source(source: Source, tokenizer: str, cache: Path) -> Text:
    file = token_file(source, tokenizer, cache)
    content = read_checked(file)
    if content is None:
        content = _content(source, tokenizer, cache)
        keep(file, content)
    return _text(source, tokenizer, content)


def _content(source: Source, tokenizer: str, cache: Path) -> bytes:
    """A token file: one line of JSON; bytes per token, unless tokens are bytes; training tokens; validation tokens."""
    documents = source.read(cache)
    train, validation, lengths = tokenize(documents, tokenizer, source.key, cache)
    header = {"files": documents.count, "train": train.size, "validation": validation.size}
    table = b"" if tokenizer == "bytes" else _little(lengths)
    return json.dumps(header).encode() + b"\n" + table + _little(train) + _little(validation)


def _little(tokens: Tokens) -> bytes:
    return tokens.astype(tokens.dtype.newbyteorder("<"), copy=False).tobytes()


def _text(source: Source, tokenizer: str, content: bytes) -> Text:
    line, _, rest = content.partition(b"\n")
    header = json.loads(line)
    vocabulary = vocabulary_of(tokenizer)
    if tokenizer == "bytes":
        lengths, unit, end = np.ones(vocabulary, np.uint16), "bytes", "NUL"
        tokens: Tokens = np.frombuffer(rest, np.uint8)
    else:
        both = np.frombuffer(rest, "<u2").astype(np.uint16, copy=False)
        lengths, tokens = both[:vocabulary], both[vocabulary:]
        unit, end = f"{tokenizer} tokens", "separator"
    train, validation = tokens[: header["train"]], tokens[header["train"] :]
    sentence = source.sentence.format(unit=unit, documents=header["files"], end=end)
    digest = hashlib.sha256(content).hexdigest()
    return Text(
        source.name, train, validation, vocabulary, unigram_entropy(train), digest, sentence, tokenizer, lengths
    )


def _own_tokens(path: Path, tokenizer: str, cache: Path) -> Text:
    """Tokens that came as such: not kept in the cache, since they are what a cache would hold."""
    own = own_tokens(path, tokenizer)
    vocabulary = vocabulary_of(tokenizer)
    lengths: npt.NDArray[np.uint16] | None = None
    if tokenizer == "bytes":
        lengths = np.ones(vocabulary, np.uint16)
    elif tokenizer == "gpt2":
        try:
            lengths = token_bytes(gpt2_tokenizer(cache), tokenizer)
        except TextError as error:
            warnings.warn(f"no losses in bits per byte: {error}", stacklevel=4)
    dtype = token_dtype(vocabulary)
    train: Tokens = own.train.astype(dtype, copy=False)
    validation: Tokens = own.validation.astype(dtype, copy=False)
    for part in (train, validation):
        part.flags.writeable = False
    digest = _digest([train, validation])
    sentence = f"{own.sentence} SHA-256 of both splits {digest}."
    return Text(
        own_name(str(path)), train, validation, vocabulary, unigram_entropy(train), digest, sentence, tokenizer, lengths
    )


def _corrupted(text: Text, corruption: Corruption) -> Text:
    separator = separator_of(text.tokenizer)
    corrupted = corrupt(text.train, corruption, text.vocabulary, separator)
    share, rest = float(corrupted.is_noise.mean()), corrupted.tokens[~corrupted.is_noise]
    return dataclasses.replace(
        text,
        train=corrupted.tokens,
        unigram_entropy=share * math.log(text.vocabulary) + (1 - share) * (unigram_entropy(rest) if rest.size else 0.0),
        sha256=_digest([corrupted.tokens, text.validation]),
        source=f"{text.source} Corrupted on purpose ({corruption}): {corrupted.done}.",
    )


def _digest(parts: Sequence[Tokens]) -> str:
    """SHA-256 over splits and where they end."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part.size}\n".encode())
        for start in range(0, part.size, BLOCK):
            digest.update(_little(part[start : start + BLOCK]))
    return digest.hexdigest()
