"""Where a number comes from: versions, device, git commit, study; stored with every pack."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from train.study import Study

PACKAGES = ("exmy", "torch", "numpy", "xarray", "tokenizers")


def provenance(study: Study, device: torch.device) -> dict[str, Any]:
    """Attributes for a pack: all strings and numbers, as netCDF wants them."""
    where = machine(device)
    created = where.pop("created")
    return {**where, "study": study.name, "study_hash": study.hash, "created": created}


def machine(device: torch.device) -> dict[str, Any]:
    """Versions, device, commit and time of what is no study's."""
    return {
        **{f"version_{name}": _version(name) for name in PACKAGES},
        "version_python": platform.python_version(),
        "device": device_name(device),
        "cpu_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda or "none",
        "git_commit": _git_commit(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def device_name(device: torch.device) -> str:
    """The device in the words of its maker."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"CPU: {model}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@functools.cache
def _git_commit() -> str:
    """The commit of the checkout that this package runs from, "+changed" behind it where files differ; "none" outside one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return "none"

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changed" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "none"
