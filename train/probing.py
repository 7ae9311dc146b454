"""A pack's measures while it trains: when they are due, what they gave so far, and from where the next one starts.

Values are kept beside the pack's histories, [probes, R, ...] and NaN until they are taken, and go into its checkpoints with the
vectors that the next eigenvalues start from: a pack that goes on from one has the values that it would have had, bit for bit. A
measure only reads: what a step makes of the pack does not depend on what was measured before it.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from landscape import LandscapeError
from train.at_point import AtPoint
from train.dead import with_one_nan
from train.determinism import deterministic
from train.measures import MEASURES
from train.program import Program
from train.taking import STARTED, take, ticks

if TYPE_CHECKING:
    from train.pack import Pack

log = logging.getLogger(__name__)


class Probes:
    """The measures of one pack's program, for so many runs."""

    def __init__(self, program: Program, runs: int, device: torch.device) -> None:
        self._program = program
        self._steps = {measure: program.steps_of(measure) for measure in program.measures}
        self._values = {
            f"{measure}/{name}": torch.full((len(steps), runs, *_sizes(program, measure, axes)), torch.nan)
            for measure, steps in self._steps.items()
            for name, axes in MEASURES[measure].variables.items()
        }
        self._vectors = {
            measure: torch.zeros(
                runs, program.probe.eigenvalues, program.shape.size, dtype=program.dtype, device=device
            )
            for measure in STARTED
            if measure in self._steps
        }

    def measure(self, pack: Pack) -> None:
        """Take what is due after the pack's last step."""
        due = [measure for measure, steps in self._steps.items() if pack.made in steps]
        if not due:
            return
        with deterministic(False):
            at = AtPoint(pack, self._program.probe)
            for measure in due:
                try:
                    found, vectors = take(measure, at, self._vectors.get(measure))
                except LandscapeError as error:  # no reason to lose the training
                    log.warning("%s after step %d can't be taken: %s", measure, pack.made, error)
                    continue
                row = self._steps[measure].index(pack.made)
                for name, values in found.items():
                    self._values[f"{measure}/{name}"][row] = torch.from_numpy(values)
                if vectors is not None:
                    self._vectors[measure].copy_(vectors)

    def values(self, name: str) -> Tensor:
        """A variable's values so far, by "measure/variable", [probes, R, ...]; the tensor itself."""
        return self._values[name]

    def state(self) -> dict[str, Tensor]:
        """What later probes and the results need, by name; the tensors themselves."""
        values = {f"probe {name}": t for name, t in self._values.items()}
        return values | {f"vectors {measure}": t for measure, t in self._vectors.items()}

    def results(self) -> dict[str, NDArray[np.float32]]:
        """All values, by "measure/variable"."""
        return {name: with_one_nan(t.numpy().astype(np.float32)) for name, t in self._values.items()}


def _sizes(program: Program, measure: str, axes: tuple[str, ...]) -> list[int]:
    return [len(ticks(program.probe, measure, axis)) for axis in axes]
