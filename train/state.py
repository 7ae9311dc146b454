"""What the optimiser keeps between steps, in any format: master weights, moments, and the gradient on its way to them.

Everything is computed in FP32 (FP64 for an FP64 run) and rounded where it is stored, once: a step reads values that are on
their grids, and what it writes is on them again. So the moments that a step's own weight update sees are those that it is about
to store, unrounded, as in bitsandbytes' and torchao's 8-bit Adam, which hold them in registers. Tensors stay FP32; a scaled
format's scales are each run's own, and blocks lie along the last axis. Beyond a plain format's largest value there is its
infinity, or the largest value where it has none; an infinity or a NaN that arrives stays one, so that a run that diverged is
seen to have.

Two ways keep small changes from being lost to a narrow master (both in Zamirai et al. 2010.06192):

    stochastic      up or down by chance, so that the mean is the unrounded value
    Kahan           what rounding lost waits in a buffer c of the master's own format, and is added to the next change d:
                    y = d + c;   w' = round(w + y);   c' = round(y - (w' - w))

(Kahan 1965; there c has the other sign). Where c' needs no rounding, w' + c' = w + c + d exactly.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from formats import Overflow, get_format, quantize, quantize_scaled
from formats.compile_time import assume_constant_result
from formats.scaled import ScaledFormat
from train.rounding_seeds import purpose_words, rounding_seeds
from train.state_formats import StateFormats as StateFormats

PURPOSES = ("master", "lost", "first", "second")


class Kept(NamedTuple):
    """What the optimiser keeps of one parameter, [R, ...] each: moments, Kahan's buffer; and the purposes of its draws, [4]."""

    first: Tensor
    second: Tensor | None = None  # Muon has none
    lost: Tensor | None = None
    words: Tensor | None = None


class Chance(NamedTuple):
    """What a step's draws come from, beside their purpose: `run_keys`, [R], and the steps made before, [1]."""

    keys: Tensor
    counter: Tensor


def parameter_words(name: str) -> Tensor:
    """The purposes for which a parameter's state is rounded at random, as `purpose_words` has them, [4]."""
    return purpose_words([f"{purpose} of {name}" for purpose in PURPOSES])


def stored(x: Tensor, name: str | None, rounding: str = "nearest_even", seeds: Tensor | None = None) -> Tensor:
    """What x [R, ...] becomes when it is stored in the format and read again; each run is a tensor of its own."""
    if name is None:
        return x
    if _is_scaled(name):
        # A vector is a matrix of one row to formats that are scaled by tiles.
        rows = x[:, None] if x.ndim == 2 else x
        return quantize_scaled(rows, name, rounding=rounding, seed=seeds, batch_dims=1).view_as(x)
    rounded = quantize(x, name, rounding, Overflow.SAT_NONE, seed=seeds)
    return torch.where(x.isinf(), x, rounded)


class Store(NamedTuple):
    """Where one parameter's state is stored: the formats, and what chance there is in it."""

    formats: StateFormats
    chance: Chance | None
    words: Tensor | None

    def __call__(self, x: Tensor, what: Literal["master", "lost", "first", "second"]) -> Tensor:
        """What x [R, ...] becomes when it is stored as that."""
        formats = self.formats
        name = {"master": formats.master, "lost": formats.master, "first": formats.first, "second": formats.second}[
            what
        ]
        if name is None or self.chance is None or self.words is None:
            return stored(x, name, formats.rounding)
        i = PURPOSES.index(what)
        seeds = rounding_seeds(self.chance.keys, self.chance.counter, self.words[i : i + 1])
        return stored(x, name, formats.rounding, seeds)


def compensated(w: Tensor, change: Tensor, lost: Tensor, store: Store) -> tuple[Tensor, Tensor]:
    """The master weights w + change + lost as they are stored, and what that lost, as it is; all [R, ...]."""
    y = change + lost
    total = store(w + y, "master")
    return total, store(y - (total - w), "lost")


# The compiler runs it and folds in the answer; it can't follow the parsing of a name.
@assume_constant_result
def _is_scaled(name: str) -> bool:
    return isinstance(get_format(name), ScaledFormat)
