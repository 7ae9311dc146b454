"""Real text as tokens: the source of the installed Python's own standard library, byte by byte.

A study of stability needs text that everybody has, that never moves, and that is worth learning: a model that has
collapsed must be told from one that learns. The standard library's source is on every machine that can run exmy, about
11 MB without its tests, and as bytes it needs no tokenizer: V = 256, and each token is a byte of a file. Files follow
each other in the order of their relative paths, each closed by one NUL byte, which Python source can't contain, so a
model sees where a file ends.

A file is either for training or for validation, all of it: a split by position would let the model read the beginning
of a function that it is later asked to predict. Which of the two is decided by a hash of the file's relative path, so
the split is the same on every machine, and a file that is added or taken away moves no other.

The unigram entropy H = -sum_i p_i ln p_i of the training tokens is the loss of a model that knows how frequent each
byte is and nothing else. A run that ends there has learnt nothing from context: it is the line that `no_progress` draws
(see stability).
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import platform
import sys
import sysconfig
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.uint8]

KNOWN_TEXTS = ("python",)
VOCABULARY = 256
VALIDATION_SHARE = 0.1
MINIMUM_BYTES = (
    1_000_000  # a whole standard library has ten times as much; far below it the losses of studies can't be compared
)
NOT_SOURCE = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
# Written by the build, with the machine's own paths and compiler flags: not source, and not the same on two machines.
BUILT_FILE, BUILT_FOLDER = "_sysconfigdata", "config-"
MAGIC = "exmy-tokens-1"


@dataclass(frozen=True, eq=False)
class Text:
    """A text as tokens, split by file. The arrays are read-only: use `torch.tensor`, not `torch.from_numpy`."""

    name: str
    train: Tokens  # [tokens]
    validation: Tokens  # [tokens]
    vocabulary: int
    unigram_entropy: float  # nats, of the training tokens
    sha256: str  # hex, of the token file: both splits and where one ends
    source: str  # a sentence for a study's provenance


def load_text(name: str, cache: Path | None = None) -> Text:
    """The text called `name`, from its token file in `cache`, or built and put there.

    `cache` is a folder; None means `$EXMY_CACHE`, else `$XDG_CACHE_HOME/exmy`, else `~/.cache/exmy`. A token file that
    does not match its hash is built again, with a warning. A cache that can't be written costs a warning and the time
    to build, nothing more. Raises ValueError for an unknown name, RuntimeError where the installed Python has too little source.
    """
    if name not in KNOWN_TEXTS:
        nearest = difflib.get_close_matches(name, KNOWN_TEXTS, n=1, cutoff=0.0) or KNOWN_TEXTS
        raise ValueError(f"dataset must be one of {', '.join(KNOWN_TEXTS)}, got {name!r}; did you mean {nearest[0]!r}?")
    root = Path(sysconfig.get_path("stdlib"))
    paths = source_files(root)
    try:
        file = (cache or cache_folder()) / token_file_name(root, paths)
    except RuntimeError as error:  # no home folder to be found
        warnings.warn(f"no cache folder ({error}): the text is read from source again", stacklevel=2)
        return _text(name, _tokenize(root, paths))
    content = _read_checked(file)
    if content is None:
        content = _tokenize(root, paths)
        try:
            _write_whole(file, content)
        except OSError as error:
            warnings.warn(f"the text can't be kept in {file.parent} ({error.strerror}): used from memory", stacklevel=2)
    return _text(name, content)


def unigram_entropy(tokens: Tokens) -> float:
    """-sum_i p_i ln p_i in nats, p_i the share of token i: the best loss of a model that ignores context."""
    count = np.bincount(tokens, minlength=1)
    share = count[count > 0] / tokens.size
    return float(-(share * np.log(share)).sum()) + 0.0  # one token only gives -0.0; an entropy has no sign


def source_files(root: Path) -> list[str]:
    """Posix paths below `root` of the library's own *.py, sorted; tests, installed packages, built files left out."""
    found: list[str] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [s for s in subfolders if s not in NOT_SOURCE and not s.startswith(BUILT_FOLDER)]
        python = (n for n in names if n.endswith(".py") and not n.startswith(BUILT_FILE))
        found += [(Path(folder) / n).relative_to(root).as_posix() for n in python]
    return sorted(found)


def is_validation(path: str) -> bool:
    """Whether the file at this relative posix path is held out; depends on the path alone."""
    digest = hashlib.blake2b(path.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < VALIDATION_SHARE * 2**64


def cache_folder() -> Path:
    """`$EXMY_CACHE`, else `exmy` in the platform's cache folder. Raises RuntimeError where there is no home folder."""
    if own := os.environ.get("EXMY_CACHE"):
        return Path(own)
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification: a relative path is invalid and to be ignored.
    return (base if base.is_absolute() else Path.home() / ".cache") / "exmy"


def token_file_name(root: Path, paths: list[str]) -> str:
    """Keyed by the Python's full version and, no file being read, by which files there are and how long each is."""
    key = hashlib.blake2b(sys.version.encode(), digest_size=8)
    for path in paths:
        key.update(f"{path}\0{(root / path).stat().st_size}\0".encode())
    return f"python-{platform.python_version()}-{key.hexdigest()}.tokens"


def _tokenize(root: Path, paths: list[str]) -> bytes:
    """The content of a token file: one line of JSON, the training tokens, the validation tokens."""
    split: dict[bool, list[bytes]] = {False: [], True: []}
    for path in paths:
        split[is_validation(path)].append((root / path).read_bytes() + b"\0")
    train, validation = b"".join(split[False]), b"".join(split[True])
    size = len(train) + len(validation)
    if size < MINIMUM_BYTES:
        raise RuntimeError(
            f"the text 'python' needs at least {MINIMUM_BYTES} bytes of standard library source, got {size} in "
            f"{len(paths)} files below {root}; run with a Python that was installed with its source (this one has been "
            "stripped or zipped)"
        )
    header = {"files": len(paths), "train": len(train), "validation": len(validation)}
    return json.dumps(header).encode() + b"\n" + train + validation


def _text(name: str, content: bytes) -> Text:
    line, _, tokens = content.partition(b"\n")
    header = json.loads(line)
    train, validation = np.split(np.frombuffer(tokens, np.uint8), [header["train"]])
    source = (
        f"Source of the standard library of {platform.python_implementation()} {platform.python_version()} as bytes, "
        f"{header['files']} files without tests, each followed by one NUL; split by file."
    )
    digest = hashlib.sha256(content).hexdigest()
    return Text(name, train, validation, VOCABULARY, unigram_entropy(train), digest, source)


def _read_checked(file: Path) -> bytes | None:
    """What `_write_whole` wrote, or None where there is none or it is damaged."""
    try:
        first, _, content = file.read_bytes().partition(b"\n")
    except OSError:
        return None
    if first.decode(errors="replace") == f"{MAGIC} sha256 {hashlib.sha256(content).hexdigest()}":
        return content
    warnings.warn(f"{file} is damaged (its SHA-256 does not match): built again", stacklevel=3)
    return None


def _write_whole(file: Path, content: bytes) -> None:
    """All of it or nothing, also when killed: written aside, flushed to the disk, renamed. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, aside = tempfile.mkstemp(dir=file.parent, prefix=file.name, suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(f"{MAGIC} sha256 {hashlib.sha256(content).hexdigest()}\n".encode())
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        Path(aside).chmod(0o644)  # mkstemp's files are their owner's alone, a cache may be shared
        Path(aside).replace(file)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(aside).unlink()
        raise
