"""A study in Weights & Biases: a run there for each run here, logged when its pack ends; offline under WANDB_MODE=offline."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from train.curves import Curves
from train.study import StudyError

EXTRA = "--wandb needs Weights & Biases, which is not installed: pip install 'exmy[wandb]'"


class WandbRuns:
    """Logs runs to a project; StudyError where the package is missing. group: what they are shown under together."""

    def __init__(self, directory: Path, project: str, group: str) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise StudyError(EXTRA)
        self.directory, self.project, self.group = directory, project, group

    def write(self, curves: Curves) -> None:
        """The run, by its identity: the same run logged again goes on where it was."""
        import wandb

        # Nothing of the machine's or the terminal's, which are not the run's.
        quiet = wandb.Settings(console="off", silent=True, x_disable_stats=True)
        run: Any = wandb.init(
            project=self.project, group=self.group, name=curves.name, id=curves.identity, config=dict(curves.settings),
            dir=str(self.directory), resume="allow", reinit="create_new", settings=quiet,
        )  # fmt: skip
        try:
            for step, values in curves.by_step().items():
                run.log(values, step=step)
            run.summary.update(dict(curves.summary))
        finally:
            run.finish()

    def close(self) -> None:
        """Every run is finished already."""
