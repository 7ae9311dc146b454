"""Six kills at random instants, with damaged files between them: the whole of it is `make survive`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_a_study_that_is_killed_and_damaged_ends_with_the_bits_of_one_that_was_not() -> None:
    """In a process of its own, which forks: one that has threads must not."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kill_harness", "--kills", "6", "--seed", "1"], cwd=ROOT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert ": the same bits" in done.stdout
    assert "6 kills; " in done.stdout
