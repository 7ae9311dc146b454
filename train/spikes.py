"""The arithmetic of the spike rule: which losses lie far above the line through their recent past.

OLMo's rule holds a step against mean + 6 sigma of the last 128. While the loss falls, that mean lies above the present
and sigma measures the fall, so a spike has to climb back over all of it to be seen. Fitting a line to the window and
extrapolating it by one step removes the fall to first order; what curvature is left stays in sigma.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

BLOCK = 2**21  # elements of the windows looked at together: 16 MiB, so memory does not grow with the number of steps


def carried_forward(loss: Floats) -> Floats:
    """Non-finite values replaced by the last finite one before them; those before the first finite value stay."""
    source = np.maximum.accumulate(np.where(np.isfinite(loss), np.arange(loss.shape[1]), 0), axis=1)
    return np.take_along_axis(loss, source, axis=1)


def above_trend(course: Floats, loss: Floats, sigma: float, window: int) -> Bools:
    """Loss [run, step] more than sigma above the line through the preceding `window` values of course.

    Written with explicit windows, a block of steps at a time, rather than with running sums: a loss of 1e30 stays in
    every later sum, and squares minus squared means leave nothing of a small sigma.
    """
    runs, steps = loss.shape
    found = np.zeros(loss.shape, np.bool_)
    if steps <= window:
        return found
    x = np.arange(window) - (window - 1) / 2
    windows = np.lib.stride_tricks.sliding_window_view(course[:, :-1], window, axis=1)
    block = max(1, BLOCK // (runs * window))
    for start in range(0, steps - window, block):
        y = windows[:, start : start + block]
        with np.errstate(invalid="ignore", over="ignore"):
            mean = y.mean(axis=2)
            residual = y - mean[..., None]
            slope = residual @ x / (x @ x)
            residual -= slope[..., None] * x
            spread = np.sqrt(np.einsum("rsw,rsw->rs", residual, residual) / (window - 2))
            # A loss is recorded in FP32; below one ulp of it, deviations are rounding.
            spread = np.maximum(spread, np.finfo(np.float32).eps * np.abs(mean))
            expected = mean + slope * (window + 1) / 2
            at = slice(window + start, window + start + y.shape[1])
            found[:, at] = loss[:, at] - expected > sigma * spread
    return found
