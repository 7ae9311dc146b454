"""One start of a process, timed from its very beginning; for `benchmarks.sweeps`, which says on the system's clock when that was.

python -m benchmarks.one_start BEGAN start STUDY.toml DIR           begin the study, or go on with it
python -m benchmarks.one_start BEGAN compile MODEL RECIPE SIZE [STEPS RUNS]    make a pack, and each kind of its passes once; told
                                                                    of how many steps and runs, the pass for wild logits too
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

FIRST_STEP = "seconds_to_first_step"
KEPT_AT = 25  # steps, after which a study that begins is stopped by SIGTERM, with a checkpoint


class Silent:
    """An observer that says nothing."""

    def planned(self, packs: Any, finished: int, device: str) -> None:
        """Nothing."""

    def pack_started(self, pack: Any) -> None:
        """Nothing."""

    def pack_progress(self, pack: Any, progress: Any) -> None:
        """Nothing."""

    def pack_finished(self, pack: Any, result: Any) -> None:
        """Nothing."""


def start(began: float, study: Path, directory: Path) -> None:
    """Until the first new step is made; a study that begins goes on to `KEPT_AT` and keeps a checkpoint."""
    import torch

    from train import run_study
    from train.interruption import Interrupted
    from train.pack import Pack

    step = Pack.step

    def timed(pack: Pack) -> None:
        before = pack.made
        step(pack)
        if not said:
            pack.train_loss[before].cpu()
            said.update({FIRST_STEP: time.monotonic() - began, "from_step": before, "cuda": torch.cuda.is_available()})
            print(json.dumps(said), flush=True)
            if before:
                os._exit(0)
        if pack.made == KEPT_AT:
            signal.raise_signal(signal.SIGTERM)

    said: dict[str, Any] = {}
    Pack.step = timed  # type: ignore[method-assign, assignment]
    try:
        run_study(study, directory, observer=Silent())
    except Interrupted:
        return


def compile_passes(model: str, recipe: str, size: str, steps: str = "1000", runs: str | None = None) -> None:
    """Make a pack; then each kind of pass."""
    from benchmarks.sweep_sizes import SIZES, one_pack, passes_of, probe_wild, seconds

    _, pack, making = one_pack(SIZES[size], model, recipe, int(steps), None if runs is None else int(runs))

    def once() -> None:
        for work in passes_of(pack).values():
            work()
        if runs is not None:
            probe_wild(pack)

    print(json.dumps({"making": making, "passes": seconds(once)}), flush=True)


if __name__ == "__main__":
    if sys.argv[2] == "start":
        start(float(sys.argv[1]), Path(sys.argv[3]), Path(sys.argv[4]))
    else:
        compile_passes(*sys.argv[3:])
