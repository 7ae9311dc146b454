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

BLOCK = 2**21  # elements of the windows decided together, 16 MiB


def carried_forward(loss: Floats) -> Floats:
    """Non-finite values replaced by the last finite one before them; those before the first finite value stay."""
    source = np.maximum.accumulate(np.where(np.isfinite(loss), np.arange(loss.shape[1]), 0), axis=1)
    return np.take_along_axis(loss, source, axis=1)


def above_trend(course: Floats, loss: Floats, sigma: float, window: int) -> Bools:
    """Loss [run, step] more than sigma above the line through the preceding `window` values of course.

    Decided with explicit windows rather than with running sums: a loss of 1e30 stays in every later sum, and squares minus
    squared means leave nothing of a small sigma. But of most steps even such sums say that they can be none, whatever was
    lost in them, and only what is left is decided.
    """
    found = np.zeros(loss.shape, np.bool_)
    if loss.shape[1] <= window:
        return found
    runs, steps = np.nonzero(_may_be_above(course, loss, sigma, window))
    x = np.arange(window) - (window - 1) / 2
    windows = np.lib.stride_tricks.sliding_window_view(course, window, axis=1)
    block = max(1, BLOCK // window)
    for start in range(0, runs.size, block):
        run, step = runs[start : start + block], steps[start : start + block]
        y = windows[run, step - window]
        with np.errstate(invalid="ignore", over="ignore"):
            mean = y.mean(axis=1)
            residual = y - mean[:, None]
            slope = residual @ x / (x @ x)
            residual -= slope[:, None] * x
            spread = np.sqrt(np.einsum("nw,nw->n", residual, residual) / (window - 2))
            # A loss is recorded in FP32; below one ulp of it, deviations are rounding.
            spread = np.maximum(spread, np.finfo(np.float32).eps * np.abs(mean))
            expected = mean + slope * (window + 1) / 2
            found[run, step] = loss[run, step] - expected > sigma * spread
    return found


def _may_be_above(course: Floats, loss: Floats, sigma: float, window: int) -> Bools:
    """False where a step is surely no more than sigma above its line, [run, step]; steps without a window before them are none.

    Sums run over a stretch of a few windows, of differences to its first value, so that what one loss costs in digits ends
    with its stretch. The most that n additions of terms up to m can lose is n^2 u m, u = 2^-53 (Higham 2002, section 4.2).
    """
    may_be = np.zeros(loss.shape, np.bool_)
    if sigma < 0:  # what spread is at least says nothing then
        may_be[:, window:] = True
        return may_be
    stretch = max(4 * window, 256)
    squares = window * (window**2 - 1) / 12  # of x, over a window
    for start in range(0, loss.shape[1] - window, stretch):
        at = slice(start + window, start + window + stretch)
        target = loss[:, at]
        values = course[:, start : start + window + target.shape[1] - 1]
        first = values[:, :1]
        with np.errstate(invalid="ignore", over="ignore"):
            y = values - first
            largest = np.abs(y).max(axis=1, keepdims=True)
            total, moment, squared = (_windowed(of, window) for of in (y, np.arange(y.shape[1]) * y, np.square(y)))
            middle = np.arange(target.shape[1]) + (window - 1) / 2
            product = moment - middle * total
            slope, mean = product / squares, total / window
            expected = first + mean + slope * (window + 1) / 2
            left = squared - total * mean - product * slope
            n = y.shape[1] + 1
            lost = 4 * n**2 * 2.0**-53 * largest  # of a sum; n times that of a moment
            lost_slope = 2 * n * lost / squares
            lost_line = lost + lost_slope * window + 2.0**-50 * (np.abs(first) + largest)
            lost_left = 4 * lost * largest + 2 * np.abs(product) * lost_slope + squares * lost_slope**2
            spread = np.sqrt(np.maximum(left - lost_left, 0) / (window - 2)) * (1 - 2.0**-40)
            floor = np.finfo(np.float32).eps * (np.abs(first + mean) - lost_line)
            none = target - expected + lost_line <= sigma * np.maximum(spread, floor)
        may_be[:, at] = ~none & ~np.isnan(target)
    return may_be


def _windowed(terms: Floats, window: int) -> Floats:
    """Sums over each `window` of the second axis, by differences of running sums."""
    sums = np.zeros((terms.shape[0], terms.shape[1] + 1))
    np.cumsum(terms, axis=1, out=sums[:, 1:])
    return sums[:, window:] - sums[:, :-window]
