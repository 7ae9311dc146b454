"""Runs that have diverged for good, and packs that end early since no run of theirs can come back.

A training loss that is NaN says little: the next batch may be finite again, and a dynamic loss scale skips the step and goes on.
A run is *dead* when every element of its weights and of all that the optimiser keeps is NaN, after `patience` steps whose loss
and gradient norms were NaN: no batch, rate or draw makes a number of that. It stays in its slot, since R is part of the program.

A pack whose runs are all dead ends, if what is left can be said without training it. Tokens only choose rows of embeddings that
are NaN throughout, and targets elements of logits that are, so from then on a step does not depend on them:

- losses and norms are NaN, as the last `patience` of them were;
- validation losses and sharpness: measured once more, and NaN;
- signals: two looks since the last run died, at other batches with other draws, that are equal to the bit; the amaxes that
  delayed scales are made of have been the same for the whole length of their history. The rest of the looks are equal to these.

Else it trains on. So does a program with a dynamic loss scale, whose scale goes on falling, and one whose recipe is still to be
switched. What NaN it is depends on who made it, so results have one NaN.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from train.pack import Pack

LOOKS = 2  # at signals, that have to be equal
OF_THE_STATE = ("parameter ", "first ", "second ", "lost ")


class Vigil:
    """Follows a pack by its reports, and says which runs are dead and whether it may end; patience in steps, 0 for never.

    `dead`, [R], is what is known. A look at the weights costs about a third of a step: it comes when a run's losses have been NaN
    for `patience` steps of reports, and again after twice as many, four times as many, ...
    """

    def __init__(self, pack: Pack, patience: int) -> None:
        self._pack, self._patience = pack, patience
        program, runs = pack.program, len(pack.slots)
        self.dead = np.zeros(runs, bool)
        self.watches = bool(patience) and program.dynamic_loss_scale is None
        self._since = np.full(runs, -1)  # the first report of NaN after one that was finite, or -1
        self._wait = np.full(runs, patience)
        self._all_dead_at: int | None = None
        self._may_end = True

    def hear(self, loss_R: NDArray[np.float32]) -> None:
        """The training losses of the step that was just made, or of one a report before it."""
        pack = self._pack
        if not self.watches or pack.made <= pack.program.until:
            return
        nan = np.isnan(loss_R)
        self._since = np.where(nan, np.where(self._since < 0, pack.made, self._since), -1)
        self._wait = np.where(nan, self._wait, self._patience)
        due = nan & ~self.dead & (pack.made - self._since >= self._wait)
        if due.any():
            found = due & beyond_help(pack, self._patience).cpu().numpy()
            self.dead |= found
            self._wait = np.where(due & ~found, 2 * self._wait, self._wait)
            if self.dead.all():
                self._all_dead_at = pack.made

    def ends(self) -> bool:
        """Whether the pack, which has steps to make, need not make them; then `pack.signals` has been filled to the end."""
        pack, since = self._pack, self._all_dead_at
        if since is None or not self._may_end or pack.made >= pack.program.steps:
            return False
        if pack.program.signal_steps and not self._same_signals(since):
            return False
        # Last, since it costs most; what it finds is the same whenever it is asked.
        self._may_end = _nothing_to_measure(pack)
        if self._may_end and (looks := _looks(pack)):
            for values in pack.signals.values.values():
                values[looks:] = values[looks - 1]
        return self._may_end

    def _same_signals(self, since: int) -> bool:
        """Whether looks since then are equal, and what delayed scales are made of has settled; without asking in vain."""
        pack = self._pack
        made = _looks(pack)
        if made == len(pack.program.signal_steps):
            return True
        if made - sum(step < since for step in pack.program.signal_steps) < LOOKS:
            return False
        settled = [_equal(t, t[..., :1]) for t in pack.histories.state().values()]
        equal = [_equal(v[made - LOOKS : made - 1], v[made - 1 : made]) for v in pack.signals.values.values()]
        return bool(torch.stack(settled + equal).all())


def beyond_help(pack: Pack, steps: int) -> Tensor:
    """Which runs have nothing but NaN in weights and optimiser, and in the last `steps` losses and gradient norms, [R], bool."""
    rows = slice(max(0, pack.made - steps), pack.made)
    histories = (pack.train_loss, pack.grad_norm, pack.grad_norm_block)
    found = [history[rows].isnan().transpose(0, 1).flatten(1).all(1) for history in histories]
    kept = [t for name, t in pack.state().items() if name.startswith(OF_THE_STATE)]
    return torch.stack([*found, *(t.isnan().flatten(1).all(1) for t in kept)]).all(0)


def with_one_nan(numbers: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same numbers, every NaN the one of NumPy's, in place."""
    numbers[np.isnan(numbers)] = math.nan
    return numbers


def _looks(pack: Pack) -> int:
    return sum(step < pack.made for step in pack.program.signal_steps)


def _equal(a: Tensor, b: Tensor) -> Tensor:
    """Whether all elements are equal, or both NaN, [] bool."""
    return ((a == b) | (a.isnan() & b.isnan())).all()


def _nothing_to_measure(pack: Pack) -> bool:
    """Whether all that is still to be measured is NaN."""
    program, found = pack.program, []
    if any(step >= pack.made for step in program.evaluation_steps):
        found.append(pack.validation_loss())
    if any(step >= pack.made for step in program.probe_steps):
        found += pack.sharpness().values()
    return all(bool(t.isnan().all()) for t in found)
