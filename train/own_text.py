"""A user's own text, from local paths: a file, a folder, tables of documents, or tokens that somebody has made already.

| what | documents |
|---|---|
| a text file (UTF-8) | pieces of at most 64 KiB, cut at line ends |
| a folder | its files, in the order of their paths, hidden ones left out; tables among them by row |
| .parquet .jsonl .jsonl.zst .jsonl.gz | rows: column `text`, or the only one of strings; by Hugging Face `datasets` |
| .bin, or a folder with train.bin and val.bin | nanoGPT's: uint16, little endian, tokens already |

Nothing is ever looked up on a network. A text is called by the last part of its path, and what it is, is its content: a
file that moves is the same text, with the same tokens in the cache, and runs on it stay finished; one that changes is
another text (`execute` refuses to mix runs on both). Which documents are held out is decided by their contents.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from train.documents import Documents, Source, TextError, is_validation, split_by_content
from train.tokenizer import vocabulary_of
from train.waiting import Waiting

TABLES = {".parquet": "parquet", ".jsonl": "json", ".jsonl.zst": "json", ".jsonl.gz": "json"}
PAIR = ("train.bin", "val.bin")
BIN = ".bin"
# Of a .bin that is not a pair: a 64th of it, at least and at most so many tokens.
SMALLEST_PIECE, LARGEST_PIECE, PIECES = 1024, 65_536, 64
BLOCK = 2**24

Stream = npt.NDArray[np.uint16]


def is_path(name: str) -> bool:
    """Whether a dataset is named by its place: anything with a slash or a dot in it, whatever there is on this machine."""
    return "/" in name or os.sep in name or "." in name


def own_name(path: str) -> str:
    """What a text at this path is called in a study's results: the path's last part. ValueError where it has none."""
    name = Path(path).name
    if name in ("", ".."):
        raise ValueError(
            f"dataset {path!r} has no name of its own: name the file or folder by its place, as in ../mine"
        )
    return name


def is_tokenized(path: Path) -> bool:
    """Whether there are tokens at this path, not text."""
    return path.suffix == BIN or (path.is_dir() and any((path / name).is_file() for name in PAIR))


def own_source(path: Path) -> Source:
    """The text at a path. Its files are read once, to know their content; TextError where there are none."""
    files = _files(path)
    digest, size = _digest(files)
    if not size:
        raise TextError(f"{path}: there is nothing in it; name a file or a folder with text")
    what = "file" if path.is_file() else f"folder of {len(files)} files"
    named = own_name(str(path)).replace("{", "{{").replace("}", "}}")  # it becomes part of a format string
    sentence = (
        f"{named}, a {what}, {size} bytes, BLAKE2b {digest}, as {{unit}}, {{documents}} documents, each followed "
        "by one {end}; split by a hash of each document."
    )
    return Source(own_name(str(path)), f"own-{digest}", sentence, lambda _: _documents(path, files))


@dataclass(frozen=True)
class OwnTokens:
    """Tokens read from .bin files, uint16, read-only: of a pair memory-mapped, of one file copied as split."""

    train: Stream
    validation: Stream
    sentence: str


def own_tokens(path: Path, tokenizer: str) -> OwnTokens:
    """The tokens at a path. TextError where they are no tokens of this tokenizer's vocabulary."""
    if tokenizer.startswith("bpe-"):
        raise TextError(
            f"{path} is tokens already, and {tokenizer} is trained on text: take tokenizer gpt2, bytes or ids-V"
        )
    name = own_name(str(path))
    if path.is_dir():
        if missing := [file for file in PAIR if not (path / file).is_file()]:
            raise TextError(f"{path}: {missing[0]} is missing beside {next(f for f in PAIR if f not in missing)}")
        train, validation = (_mapped(path / file, tokenizer) for file in PAIR)
        return OwnTokens(train, validation, f"{name}, a pair of train.bin and val.bin, as {tokenizer} tokens.")
    whole = _mapped(path, tokenizer)
    length = min(LARGEST_PIECE, max(SMALLEST_PIECE, whole.size // PIECES))
    pieces = [whole[start : start + length] for start in range(0, whole.size, length)]
    if len(pieces) < 2:
        raise TextError(
            f"{path}: {whole.size} tokens can't be split into training and validation; take more than {length}"
        )
    held_out = [is_validation(piece.tobytes()) for piece in pieces]
    if len(set(held_out)) == 1:  # few pieces, and chance put them on one side
        held_out[-1] = not held_out[-1]
    train, validation = (
        np.concatenate([piece for piece, held in zip(pieces, held_out, strict=True) if held is side] or [whole[:0]])
        for side in (False, True)
    )
    sentence = f"{name}, as {tokenizer} tokens, split by a hash of each {length} of them."
    return OwnTokens(train, validation, sentence)


def _mapped(file: Path, tokenizer: str) -> Stream:
    """A .bin as it lies on the disk, every token checked against the vocabulary."""
    try:
        size = file.stat().st_size
        if size == 0 or size % 2:
            raise TextError(
                f"{file} has {size} bytes: a .bin holds uint16 tokens, two bytes each, as nanoGPT writes them"
            )
        tokens: Stream = np.memmap(file, "<u2", mode="r")
    except OSError as error:
        raise TextError(f"{file}: {error.strerror}") from None
    with Waiting(f"reading {file.name}", tokens.size) as waiting:
        largest = 0
        for start in range(0, tokens.size, BLOCK):
            largest = max(largest, int(tokens[start : start + BLOCK].max()))
            waiting.advance(BLOCK)
    vocabulary = vocabulary_of(tokenizer)
    if largest >= vocabulary:
        known = "gpt2" if largest < vocabulary_of("gpt2") else f"ids-{largest + 1}"
        raise TextError(
            f"{file} holds token {largest} and tokenizer {tokenizer!r} has {vocabulary}: say which tokens they are, as in "
            f"--set tokenizer={known}"
        )
    return tokens


def _files(path: Path) -> list[Path]:
    """Every file of a text, in the order of relative paths."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise TextError(f"{path}: no such file or folder; a dataset with a slash or a dot in its name is a path")
    found = []
    for folder, subfolders, names in os.walk(path):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [Path(folder) / name for name in names if not name.startswith(".")]
    return sorted((file for file in found if file.is_file()), key=lambda file: file.relative_to(path).as_posix())


def _digest(files: list[Path]) -> tuple[str, int]:
    """16 hex digits over what the files are and hold, in order, not over their names; and their bytes."""
    digest, total = hashlib.blake2b(digest_size=8), sum(_size(file) for file in files)
    with Waiting("reading", total) as waiting:
        for file in files:
            digest.update(f"{_table(file)} {_size(file)}\n".encode())
            try:
                with file.open("rb") as stream:
                    while block := stream.read(BLOCK):
                        digest.update(block)
                        waiting.advance(len(block))
            except OSError as error:
                raise TextError(f"{file}: can't be read ({error.strerror})") from None
    return digest.hexdigest(), total


def _size(file: Path) -> int:
    return file.stat().st_size


def _table(file: Path) -> str | None:
    """How `datasets` calls this kind of table; None for text."""
    return next((kind for ending, kind in TABLES.items() if file.name.endswith(ending)), None)


def _documents(path: Path, files: list[Path]) -> Documents:
    found: list[bytes] = []
    left_out: list[Path] = []
    for file in files:
        if _table(file):
            found += _rows(file)
            continue
        content = file.read_bytes()
        wrong = _not_text(content)
        if not wrong:
            found.append(content)
        elif path.is_file():
            raise TextError(f"{file}: {wrong}")
        else:
            left_out.append(file)
    if left_out:
        warnings.warn(
            f"{path}: {len(left_out)} files that are not UTF-8 text are left out: {left_out[0].name}, ...", stacklevel=2
        )
    documents = split_by_content(found)
    if not documents.train or not documents.validation:
        raise TextError(
            f"{path}: {sum(map(len, found))} bytes of text can't be split into training and validation; take more text"
        )
    return documents


def _not_text(content: bytes) -> str:
    """What is wrong with a text file, or nothing."""
    if (position := content.find(b"\0")) >= 0:
        return f"holds a NUL byte at {position}: not a text file; a .bin of tokens must be called so"
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return f"not UTF-8 at byte {error.start}; convert it, as in iconv -f latin1 -t utf-8"
    return ""


def _rows(file: Path) -> Iterator[bytes]:
    """The documents of a table, one by one, without a copy of the table on the disk."""
    try:
        import datasets
    except ImportError:
        raise TextError(
            f"{file} is read by Hugging Face datasets, which is not installed: pip install 'exmy[data]'"
        ) from None
    try:
        with _offline(datasets.config):
            table = datasets.load_dataset(_table(file), data_files=str(file), split="train", streaming=True)
        column = None
        with Waiting(f"reading {file.name}") as waiting:
            for number, row in enumerate(table):
                column = column or _column(row, file)
                document = row[column]
                if not isinstance(document, str):
                    raise TextError(f"{file}: row {number}'s {column!r} is {type(document).__name__}, not a string")
                if "\0" in document:
                    raise TextError(f"{file}: row {number}'s {column!r} holds a NUL character; remove it")
                yield document.encode(errors="replace")
                waiting.advance()
    except TextError:
        raise
    except Exception as error:  # whatever a damaged file makes of `datasets`, pyarrow or zstandard
        reason = str(error.__cause__ or error).strip().splitlines()
        raise TextError(f"{file}: can't be read as {_table(file)} ({reason[0] if reason else error!r})") from error


@contextlib.contextmanager
def _offline(config: Any) -> Iterator[None]:
    """Without it, `load_dataset` tells a server that a table was opened, a local one, too."""
    before, config.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def _column(row: dict[str, object], file: Path) -> str:
    strings = [name for name, value in row.items() if isinstance(value, str)]
    if "text" in row:
        return "text"
    if len(strings) == 1:
        return strings[0]
    raise TextError(
        f"{file}: no column 'text' among {', '.join(map(repr, row))}; rename the one that holds the documents"
    )
