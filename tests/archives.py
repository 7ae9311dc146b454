"""Tiny wheels and Debian packages, as the real ones are built, so that no test needs a network."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
import zipfile
from typing import Any, Literal

from train.artefacts import Artefact


def wheel(files: dict[str, bytes]) -> bytes:
    """A zip archive of these files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def deb(files: dict[str, bytes], compression: Literal["xz", "gz"] = "xz") -> bytes:
    """An ar archive of debian-binary, control.tar and data.tar, as deb(5) has it; members padded to even lengths."""
    members = {
        "debian-binary": b"2.0\n",
        f"control.tar.{compression}": _tar({"control": b"Package: x\n"}, compression),
        f"data.tar.{compression}": _tar(files, compression),
    }
    content = b"!<arch>\n"
    for name, member in members.items():
        content += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(member):<10}".encode() + b"`\n"
        content += member + b"\n" * (len(member) % 2)
    return content


def _tar(files: dict[str, bytes], compression: Literal["xz", "gz"]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz" if compression == "xz" else "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def models(services: dict[str, dict[str, Any]]) -> bytes:
    """A wheel of botocore's shape; keys are service/version, every other model is compressed."""
    files = {"botocore/__init__.py": b"", "botocore/data/endpoints.json": b'{"documentation": "no service"}'}
    for number, (place, model) in enumerate(services.items()):
        content = json.dumps(model).encode()
        packed = number % 2 == 1
        ending = ".gz" if packed else ""
        files[f"botocore/data/{place}/service-2.json{ending}"] = gzip.compress(content) if packed else content
        files[f"botocore/data/{place}/paginators-1.json"] = b'{"documentation": "no model"}'
    return wheel(files)


def pinned(content: bytes, manager: Literal["pip", "apt"] = "pip") -> Artefact:
    """An artefact that pins this content."""
    digest = hashlib.sha256(content).hexdigest()
    return Artefact(manager, "thing", "1.0", f"thing-1.0.{manager}", digest, len(content), "CC0-1.0")
