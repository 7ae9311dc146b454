"""Files that can be made again, kept with the hash of what is in them: token files and trained tokenisers.

The first line of a file says the SHA-256 of the rest, so a file that was cut short or changed is seen and made again, and
one that another version of exmy wrote is never taken for ours. A cache that can't be written costs time, nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import warnings
from pathlib import Path

MAGIC = "exmy-tokens-1"


def cache_folder() -> Path:
    """`$EXMY_CACHE`, else `exmy` in the platform's cache folder. Raises RuntimeError where there is no home folder."""
    if own := os.environ.get("EXMY_CACHE"):
        return Path(own)
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification: a relative path is invalid and to be ignored.
    return (base if base.is_absolute() else Path.home() / ".cache") / "exmy"


def read_checked(file: Path) -> bytes | None:
    """What `write_checked` wrote, or None where there is none or it is damaged, which costs a warning."""
    try:
        first, _, content = file.read_bytes().partition(b"\n")
    except OSError:
        return None
    if first.decode(errors="replace") == f"{MAGIC} sha256 {hashlib.sha256(content).hexdigest()}":
        return content
    warnings.warn(f"{file} is damaged (its SHA-256 does not match): built again", stacklevel=3)
    return None


def keep(file: Path, content: bytes) -> None:
    """Write it for `read_checked`; where that can't be done, one warning."""
    try:
        write_whole(file, f"{MAGIC} sha256 {hashlib.sha256(content).hexdigest()}\n".encode(), content)
    except OSError as error:
        warnings.warn(f"the text can't be kept in {file.parent} ({error.strerror}): used from memory", stacklevel=3)


def write_whole(file: Path, *parts: bytes) -> None:
    """All of it or nothing, also when killed: written aside, flushed to the disk, renamed. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, aside = tempfile.mkstemp(dir=file.parent, prefix=file.name, suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            for part in parts:
                stream.write(part)
            stream.flush()
            os.fsync(stream.fileno())
        Path(aside).chmod(0o644)  # mkstemp's files are their owner's alone, a cache may be shared
        Path(aside).replace(file)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(aside).unlink()
        raise
