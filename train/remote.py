"""A study at a URL that fsspec can write to (s3://, gs://, file://, ...), for workers that share no folder.

    URL/study.toml  URL/pack_sizes.json  URL/packs/<hash>.sha256  URL/packs/<hash>.nc

A worker trains in a folder of its own and puts up the pack's checksum, then the pack, each whole or not at all. The sweep's own
process has a copy of it all, which is a study directory like any other; the URL is right where they differ. Checkpoints stay with
their worker: a pack whose worker was lost starts over. Nothing at a URL is locked: see to it that one sweep writes there.
"""

from __future__ import annotations

import hashlib
import logging
import posixpath
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec

from train.cache import cache_folder
from train.durable import CHECKSUM, atomically
from train.pack_sizes import PACK_SIZES_FILE
from train.store import PACKS, STUDY_FILE
from train.study import StudyError

PACK = re.compile(r"[0-9a-f]{16}\.nc")
# These have no half-written files: an object is there once all of it is.
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "r2", "oci", "memory"}

log = logging.getLogger(__name__)


def is_url(out: Path | str) -> bool:
    """Whether a place for a study is a URL, and no path."""
    return isinstance(out, str) and "://" in out


class Remote:
    """The study at a URL."""

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self._files, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise StudyError(
                f"{url}: {error}; install what fsspec needs for it, or name a directory that all share"
            ) from None
        self._root = root.rstrip("/")

    @property
    def copy(self) -> Path:
        """Where on this machine the copy is kept: in the cache, by the URL."""
        name = re.sub(r"[^\w.-]", "-", posixpath.basename(self._root)) or "study"
        return cache_folder() / "studies" / f"{name}-{hashlib.sha256(self.url.encode()).hexdigest()[:12]}"

    def fetch(self, directory: Path) -> None:
        """Make a directory a copy of the URL: packs that it lacks, or has otherwise, are fetched, what the URL lacks goes.

        A pack's name says which runs it has, and not with what results: its size and its checksum do.
        """
        try:
            there = self._sizes(PACKS)
            for name in (STUDY_FILE, PACK_SIZES_FILE):
                if self._files.exists(self._at(name)):
                    self._get(name, directory / name)
                else:
                    (directory / name).unlink(missing_ok=True)
            for path in (directory / PACKS).glob("*.nc"):
                if path.name not in there:
                    path.unlink()
                    path.with_suffix(CHECKSUM).unlink(missing_ok=True)
            for name in self._other(directory / PACKS, there):
                self.fetch_pack(directory, name)
        except Exception as error:  # each file system has errors of its own
            raise StudyError(f"{self.url}: can't be read ({type(error).__name__}: {error})") from None

    def fetch_pack(self, directory: Path, name: str) -> None:
        """A pack and its checksum, if it has one; what was there under its name goes first, so that no two are mixed."""
        seal = _seal(name)
        for one in (name, seal):
            (directory / PACKS / one).unlink(missing_ok=True)
        if self._files.exists(self._at(PACKS, seal)):
            self._get(f"{PACKS}/{seal}", directory / PACKS / seal)
        self._get(f"{PACKS}/{name}", directory / PACKS / name)

    def send(self, directory: Path, name: str) -> None:
        """Put a file of a directory up, whole or not at all; StudyError where that can't be done."""
        content, target = (directory / name).read_bytes(), self._at(name)
        try:
            if set(_protocols(self._files)) & OBJECT_STORES:
                self._files.pipe_file(target, content)
                return
            self._files.makedirs(posixpath.dirname(target), exist_ok=True)
            aside = f"{target}.{uuid.uuid4().hex}.part"
            self._files.pipe_file(aside, content)
            self._files.mv(aside, target)
        except Exception as error:
            raise StudyError(f"{self.url}: {name} can't be written there ({type(error).__name__}: {error})") from None

    def send_pack(self, directory: Path, name: str) -> None:
        """A pack, its checksum first."""
        self.send(directory, f"{PACKS}/{_seal(name)}")
        self.send(directory, f"{PACKS}/{name}")

    def _other(self, packs: Path, there: Mapping[str, int | None]) -> list[str]:
        """The packs at the URL that a folder lacks, or has of another size, or with another checksum."""
        names = sorted(filter(PACK.fullmatch, there))
        other = {
            name for name in names if _size(packs / name) is None or there[name] not in (None, _size(packs / name))
        }
        sealed = [name for name in names if name not in other and _seal(name) in there]
        # All at once, where the file system can: one after the other, thousands of small files take minutes.
        seals = self._files.cat_ranges([self._at(PACKS, _seal(name)) for name in sealed], None, None, on_error="raise")
        other.update(
            name for name, seal in zip(sealed, seals, strict=True) if _content(packs / _seal(name)) != bytes(seal)
        )
        return [name for name in names if name in other]

    def _sizes(self, folder: str) -> dict[str, int | None]:
        """What a folder at the URL has, and how large it is, where the file system tells."""
        self._files.invalidate_cache()
        try:
            files = self._files.ls(self._at(folder), detail=True)
        except FileNotFoundError:
            return {}
        return {posixpath.basename(file["name"]): file.get("size") for file in files}

    def _get(self, name: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomically(target) as aside:
            aside.write_bytes(self._files.cat_file(self._at(name)))

    def _at(self, *parts: str) -> str:
        return "/".join([self._root, *parts])


def _seal(name: str) -> str:
    """The checksum's file of a pack's."""
    return Path(name).with_suffix(CHECKSUM).name


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _protocols(files: Any) -> tuple[str, ...]:
    return (files.protocol,) if isinstance(files.protocol, str) else tuple(files.protocol)
