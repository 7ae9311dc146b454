"""Files that outlive a crash: written whole or not at all, vouched for by a checksum, never thrown away where they are damaged.

A file is written aside, flushed to the disk and renamed, so that a reader or a restart never sees half of one. A disk that
changes a bit is another matter, and so is a copy that was cut short: `seal` writes the SHA-256 of a file's content beside it, in
the form of `sha256sum`, before the file itself, so that no file is ever without it; `is_intact` asks.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

PART = ".part"
CHECKSUM = ".sha256"


@contextlib.contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """A path to write to; on success it is flushed to the disk and renamed to `path`, on any failure removed."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PART, dir=path.parent)
    os.close(handle)
    aside = Path(name)
    try:
        yield aside
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        aside.chmod(0o666 & ~umask)
        aside.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def made(folder: Path) -> Iterator[None]:
    """A folder, made where it is missing; where what is then done fails, and left nothing there, it is removed as it came."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # one that holds something stays, and so do those above it
            for one in missing:
                one.rmdir()
        raise


def remove_parts(folder: Path) -> None:
    """Remove what `atomically` left in a folder when its process was killed; whoever calls has it to itself."""
    for part in folder.glob(f".*{PART}"):
        part.unlink(missing_ok=True)


def seal(path: Path, content: bytes) -> None:
    """Write the checksum of what is about to be written to `path` beside it; OSError where that can't be done."""
    with atomically(path.with_suffix(CHECKSUM)) as aside:
        aside.write_text(f"{hashlib.sha256(content).hexdigest()}  {path.name}\n", encoding="ascii")


def is_intact(path: Path) -> bool | None:
    """Whether a file is what its checksum says; None where it has none, as files of before."""
    said = _checksum_of(path)
    if said is None:
        return None
    with path.open("rb") as file:
        return said == f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n".encode()


def read_intact(path: Path) -> bytes:
    """A file's content; ValueError where that is not what its checksum says, OSError where it can't be read."""
    said, content = _checksum_of(path), path.read_bytes()
    if said is not None and said != f"{hashlib.sha256(content).hexdigest()}  {path.name}\n".encode():
        raise ValueError("its SHA-256 does not match")
    return content


def _checksum_of(path: Path) -> bytes | None:
    try:
        return path.with_suffix(CHECKSUM).read_bytes()
    except FileNotFoundError:
        return None


def set_aside(path: Path, why: str) -> Path:
    """Rename a file, and its checksum, or a folder, to NAME.why, NAME.why-2, ... beside it, and give the new name."""
    names = (f"{path.name}.{why}" + (f"-{n}" if n > 1 else "") for n in range(1, 1_000_000))
    aside = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    path.rename(aside)
    with contextlib.suppress(OSError):
        path.with_suffix(CHECKSUM).unlink(missing_ok=True)
    return aside
