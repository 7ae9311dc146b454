"""Learning-rate schedules: a linear warm-up to the peak, then one of four ways down to `final_fraction` of it, or none.

constant   stays at the peak
linear     falls evenly over all steps after the warm-up (Defazio et al. 2310.07831 find it the best of the simple ones)
cosine     falls along half a cosine over all steps after the warm-up (Loshchilov & Hutter 1608.03983, one cycle)
wsd        warm-up, stable, decay: stays at the peak, then falls evenly over the last `decay_fraction` of all steps
           (Hu et al. 2404.06395, MiniCPM; Hägele et al. 2405.18392, who find a linear fall over 20 % as good as a cosine)
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Schedule = Literal["cosine", "linear", "constant", "wsd"]
DECAY_FRACTION = 0.2
MUON_RATE = 20.0  # Muon's learning rate in units of AdamW's


def decay_steps(steps: int, decay_fraction: float) -> int:
    """How many steps at the end wsd's decay takes: the share of all steps, to the nearest step, and one at least."""
    return max(1, round(decay_fraction * steps))


def learning_rates(
    peaks: list[float],
    steps: int,
    warmup: int,
    schedule: str,
    final_fraction: float,
    decay_fraction: float = DECAY_FRACTION,
) -> NDArray[np.float64]:
    """The learning rate of every step and run, [steps, R].

    Step s of the warm-up has (s + 1) / warmup of the peak; the last step of one that falls has exactly final_fraction of it, but
    where that is the only step: cosine and linear begin at the peak.
    """
    decay, falls = decay_steps(steps, decay_fraction), steps - 1 - warmup

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / falls if falls else float(warmup > 0)
        if schedule == "cosine":
            left = 0.5 * (1 + math.cos(math.pi * progress))
        elif schedule == "linear":
            left = 1 - progress
        elif schedule == "wsd":
            left = min(1.0, (steps - 1 - step) / decay)
        elif schedule == "constant":
            return 1.0
        else:
            raise ValueError(f"schedule must be cosine, linear, constant or wsd, got {schedule!r}")
        return final_fraction + (1 - final_fraction) * left

    return np.array([factor(step) for step in range(steps)])[:, None] * np.array(peaks, np.float64)
