"""Pinned files: nothing but the pinned bytes is ever read, and where they can't be had, one line says what to do."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

from tests.archives import deb, pinned
from train import artefacts
from train.artefacts import Artefact, deb_member, fetched, is_cached
from train.documents import TextError
from train.waiting import Waiting

CONTENT = b"the file that was pinned"


class Registry:
    """Stands for pip and apt-get: the command writes `content` into the folder, or fails with `error`."""

    def __init__(self, content: bytes = CONTENT, error: str = "") -> None:
        self.content, self.error, self.commands = content, error, 0

    def command(self, artefact: Artefact, path: Path) -> list[str]:
        self.commands += 1
        script = f"import sys, pathlib; pathlib.Path('brought').write_bytes({self.content!r})"
        if self.error:
            script = f"import sys; print({self.error!r}, file=sys.stderr); sys.exit(1)"
        return [sys.executable, "-c", script]


def serve(monkeypatch: pytest.MonkeyPatch, registry: Registry) -> Registry:
    monkeypatch.setattr(artefacts, "_command", registry.command)
    return registry


def test_what_was_downloaded_once_is_read_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = serve(monkeypatch, Registry())
    thing = pinned(CONTENT)
    assert not is_cached(thing, tmp_path)
    assert fetched(thing, tmp_path) == fetched(thing, tmp_path) == CONTENT
    assert registry.commands == 1
    assert is_cached(thing, tmp_path)
    assert [file.name for file in (tmp_path / "artefacts").iterdir()] == [thing.file]


def test_a_file_put_there_by_hand_needs_no_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = serve(monkeypatch, Registry(error="no network"))
    thing = pinned(CONTENT)
    thing.path(tmp_path).parent.mkdir()
    thing.path(tmp_path).write_bytes(CONTENT)
    assert fetched(thing, tmp_path) == CONTENT
    assert registry.commands == 0


def test_a_damaged_file_is_downloaded_again_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, Registry())
    thing = pinned(CONTENT)
    fetched(thing, tmp_path)
    thing.path(tmp_path).write_bytes(CONTENT[:-1])
    assert not is_cached(thing, tmp_path)
    with pytest.warns(UserWarning, match="not the pinned file"):
        assert fetched(thing, tmp_path) == CONTENT
    assert is_cached(thing, tmp_path)


def test_another_file_than_the_pinned_one_is_never_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, Registry(b"something else"))
    with pytest.raises(TextError, match=f"SHA-256 {hashlib.sha256(b'something else').hexdigest()}, not the pinned one"):
        fetched(pinned(CONTENT), tmp_path)
    assert list((tmp_path / "artefacts").iterdir()) == []


@pytest.mark.parametrize(
    ("manager", "error", "message"),
    [
        (
            "pip",
            "WARNING: retrying\nERROR: No matching distribution",
            r"pip can't download thing==1.0 \(ERROR: No matching",
        ),
        (
            "apt",
            "E: Unable to locate package thing",
            r"apt can't download thing=1.0 \(E: Unable.*run apt-get update, or put",
        ),
        ("apt", "E: Version '1.0' for 'thing' was not found", r"was not found\).*Debian's snapshot archive has"),
    ],
)
def test_a_registry_that_fails_is_quoted_with_the_way_round_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, manager: str, error: str, message: str
) -> None:
    serve(monkeypatch, Registry(error=error))
    thing = pinned(CONTENT, "apt" if manager == "apt" else "pip")
    with pytest.raises(TextError, match=message) as refusal:
        fetched(thing, tmp_path)
    line = str(refusal.value)
    assert "\n" not in line
    assert thing.sha256 in line
    assert str(tmp_path / "artefacts") in line


def test_a_python_without_pip_is_told_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PathFinder, "find_spec", lambda _: None)
    with pytest.raises(TextError, match=r"pip, which this Python lacks: run .* -m ensurepip, or put thing-1.0.pip"):
        fetched(pinned(CONTENT), tmp_path)


def test_looking_for_pip_wakes_no_import_hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Setuptools' hook, asked for pip, turns its distutils off for the whole process, and torch.compile fails without it."""
    asked = []

    class Witness:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            asked.append(name)

    monkeypatch.setattr(sys, "meta_path", [Witness()])
    artefacts._command(pinned(CONTENT), tmp_path)
    assert asked == []


def test_a_machine_without_apt_is_told_what_to_put_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(TextError, match=r"no apt-get here: take another text, or put thing-1.0.apt"):
        fetched(pinned(CONTENT, "apt"), tmp_path)


def test_nothing_is_ever_installed(tmp_path: Path) -> None:
    assert artefacts._command(pinned(CONTENT), tmp_path)[1:4] == ["-m", "pip", "download"]
    if shutil.which("apt-get"):
        assert artefacts._command(pinned(CONTENT, "apt"), tmp_path)[:2] == ["apt-get", "download"]


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, Registry())
    (tmp_path / "file").touch()
    with pytest.raises(TextError, match=r"can't write there .*; set EXMY_CACHE to a folder that can be written"):
        fetched(pinned(CONTENT), tmp_path / "file")


def test_an_interrupted_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, Registry())

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "environ", {**os.environ})
    monkeypatch.setattr(Waiting, "advance", stopped)
    with pytest.raises(KeyboardInterrupt):
        fetched(pinned(CONTENT), tmp_path)
    assert list((tmp_path / "artefacts").iterdir()) == []


@pytest.mark.parametrize("compression", ["xz", "gz"])
@pytest.mark.parametrize("length", [0, 1, 2, 1001])
def test_a_debian_packages_files_are_read_without_installing_it(compression: str, length: int) -> None:
    package = deb({"usr/share/a": b"x" * length, "usr/share/b": b"b"}, "gz" if compression == "gz" else "xz")
    assert deb_member(package, "usr/share/a") == b"x" * length
    assert deb_member(package, "usr/share/b") == b"b"
    with pytest.raises(KeyError):
        deb_member(package, "usr/share/c")
    with pytest.raises(TextError, match="no ar archive"):
        deb_member(b"<html>", "usr/share/a")
