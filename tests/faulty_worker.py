"""A worker process that is killed when its pack has made ten steps, once: by whom finds the file that EXMY_FAULT names, and
removes it. It writes files and draws weights beside the training, as workers with a GPU do.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from train import one_pack, pack, worker

train_pack: Any = pack.train_pack


def train_and_die(*arguments: Any, **rest: Any) -> Any:
    """`train_pack`, up to there."""
    *others, on_progress, checkpointer, dead_after = arguments
    once = Path(os.environ["EXMY_FAULT"])

    def hear(progress: Any) -> None:
        on_progress(progress)
        assert "torch._inductor" not in sys.modules, "seconds of every worker's start, and nothing is compiled"
        if progress.step == 10 and once.exists():
            once.unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    return train_pack(*others, hear, checkpointer, dead_after, **rest)


if __name__ == "__main__":
    vars(one_pack)["train_pack"] = train_and_die
    vars(one_pack)["OVERLAPS"] = {"cpu"}
    worker.main()
