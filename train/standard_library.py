"""The text `python`: the source of the installed Python's own standard library.

A study of stability needs text that everybody has, that never moves, and that is worth learning: a model that has
collapsed must be told from one that learns. The standard library's source is on every machine that can run exmy, about
11 MB without its tests. A document is a file, in the order of relative paths, split by a hash of the path.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import sysconfig
from pathlib import Path

from train.documents import Documents, Source, TextError, split_by_name

MINIMUM_BYTES = (
    1_000_000  # a whole standard library has ten times as much; far below it the losses of studies can't be compared
)
NOT_SOURCE = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
# Written by the build, with the machine's own paths and compiler flags: not source, and not the same on two machines.
BUILT_FILE, BUILT_FOLDER = "_sysconfigdata", "config-"


def python_source() -> Source:
    """The text `python` of the Python that runs; its key holds the full version, the files and how long each is."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = source_files(root)
    sentence = (
        f"Source of the standard library of {platform.python_implementation()} {platform.python_version()} as {{unit}}, "
        "{documents} files without tests, each followed by one {end}; split by file."
    )
    return Source("python", _key(root, paths), sentence, lambda _: _read(root, paths))


def source_files(root: Path) -> list[str]:
    """Posix paths below `root` of the library's own *.py, sorted; tests, installed packages, built files left out."""
    found: list[str] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [s for s in subfolders if s not in NOT_SOURCE and not s.startswith(BUILT_FOLDER)]
        python = (n for n in names if n.endswith(".py") and not n.startswith(BUILT_FILE))
        found += [(Path(folder) / n).relative_to(root).as_posix() for n in python]
    return sorted(found)


def _key(root: Path, paths: list[str]) -> str:
    """By the Python's full version and, no file being read, by which files there are and how long each is."""
    key = hashlib.blake2b(sys.version.encode(), digest_size=8)
    for path in paths:
        key.update(f"{path}\0{(root / path).stat().st_size}\0".encode())
    return f"python-{platform.python_version()}-{key.hexdigest()}"


def _read(root: Path, paths: list[str]) -> Documents:
    documents = split_by_name((path, (root / path).read_bytes()) for path in paths)
    size = documents.size + documents.count
    if size < MINIMUM_BYTES:
        raise TextError(
            f"the text 'python' needs at least {MINIMUM_BYTES} bytes of standard library source, got {size} in "
            f"{len(paths)} files below {root}; run with a Python that was installed with its source (this one has been "
            "stripped or zipped)"
        )
    return documents
