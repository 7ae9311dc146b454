"""A disk that is full, or can't be written to, for real: one clear line, nothing lost, and with room again the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PREFIXES = (["unshare", "-m"], ["unshare", "-r", "-m"])  # root's own mounts; a user's, who is root in there
FULL, CLOSED = "No space left on device", "Read-only file system"
STATUS = r"status.json can't be written ({}); the training goes on without it"
CHECKPOINT = f"a checkpoint can't be written ({FULL}); the training goes on, and there is none yet"
# What is said, which lines are logged, whether a pack is in the temporary folder, and how many of eight runs are trained after.
EXPECTED: dict[str, tuple[list[str], list[str], int, int]] = {
    "pack_write": (["/packs: can't write there", FULL, "this pack is in", "make room"], [STATUS.format(FULL)], 1, 4),
    "checkpoint_write": ([], [CHECKPOINT, CHECKPOINT], 0, 0),
    "status_write": ([], [STATUS.format(FULL)], 0, 0),
    "study_write": (["study.toml: can't be written", FULL, "make room and run the sweep again"], [], 0, 4),
    "full_from_the_start": (["can't write there", FULL, "name another with --out"], [], 0, 8),
    "read_only": (["/packs: can't write there", CLOSED, "is in", "name another with --out"], [STATUS.format(CLOSED)], 1, 4),
}  # fmt: skip


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the harness says of each scenario; a visible skip where nobody may mount anything."""
    folder = tmp_path_factory.mktemp("disk")
    for prefix in PREFIXES:
        may = [*prefix, "mount", "-t", "tmpfs", "tmpfs", str(folder)]
        if subprocess.run(may, capture_output=True, check=False).returncode == 0:
            command = [*prefix, sys.executable, "-m", "tests.disk_harness", str(folder)]
            break
    else:
        pytest.skip("no file system may be mounted here, by root or in a user's namespace")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return {line["scenario"]: line for line in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("scenario", EXPECTED)
def test_a_disk_that_cannot_be_written_to_costs_a_line_and_no_result(
    scenario: str, told: dict[str, dict[str, Any]]
) -> None:
    words, lines, rescued, trained_after = EXPECTED[scenario]
    outcome = told[scenario]
    assert outcome["said"].isprintable()
    assert bool(outcome["said"]) == bool(words)
    assert all(word in outcome["said"] for word in words), outcome["said"]
    assert len(outcome["logged"]) == len(lines), outcome["logged"]
    assert all(said.endswith(line) for said, line in zip(outcome["logged"], lines, strict=True)), outcome["logged"]
    assert outcome["parts"] == [], "nothing half written is left"
    assert (outcome["rescued"], outcome["trained_after"]) == (rescued, trained_after)
    assert outcome["differences"] == []
    assert outcome["state"] == "finished"
