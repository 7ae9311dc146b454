"""A rounding of FP32 numbers as what it is, a staircase: where it steps, and from which value to which.

FP32 numbers are taken in the order of their keys, integers that rise with the number: k for the code k, and -1 - k for the code
k with the sign bit, so that -0 and +0 are -1 and 0. The oracle says, from mpmath's decision points, at which keys the result
steps. Between these nothing happens, so that all 2^32 expected results are a few runs.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from formats import ElementFormat
from verification import oracle
from verification.points import Codes
from verification.question import Question

INFINITY = 0x7F800000


def inputs_of(keys: Tensor) -> Tensor:
    """FP32 numbers of int32 keys."""
    return torch.where(keys >= 0, keys, (-1 - keys) | -(1 << 31)).view(torch.float32)


def step_keys(question: Question) -> Codes:
    """The keys of the inputs at which the result differs from that of the input before, ascending.

    Between two neighbouring decision points nothing steps, so only inputs around them are candidates: their own FP32
    neighbours, zero, where the sign changes, and the infinities.
    """
    around = keys_around(question.f)[1:]
    return np.asarray(around[patterns(question, around) != patterns(question, around - 1)])


def keys_around(f: ElementFormat) -> Codes:
    """The keys of the FP32 numbers at and beside each value and divider of the format, zero and the infinities, ascending."""
    listed = oracle.table(f)
    targets = np.unique(np.concatenate([listed.entries, listed.middles]))
    with np.errstate(over="ignore"):
        near = np.clip(targets, -3.4028234663852886e38, 3.4028234663852886e38).astype(np.float32)
    codes = near.view(np.int32).astype(np.int64)
    at = np.where(codes >= 0, codes, -1 - (codes & 0x7FFFFFFF))
    around = np.concatenate([*(at + near for near in range(-2, 3)), [-2, -1, 0, 1, INFINITY - 1, INFINITY]])
    around = np.unique(np.concatenate([around, [-1 - INFINITY, -INFINITY]]))
    return np.asarray(around[(around >= -1 - INFINITY) & (around <= INFINITY)])


def patterns(question: Question, keys: Codes) -> Codes:
    """The FP32 bit patterns of the results for inputs of these keys."""
    x = inputs_of(torch.from_numpy(keys.astype(np.int32))).double().numpy()
    result = question.expected(x).astype(np.float32)
    return np.asarray(result.view(np.int32), np.int64)


class Staircase:
    """All results of a rounding, from -inf to +inf, on a device."""

    def __init__(self, question: Question, device: str = "cpu") -> None:
        self.steps = step_keys(question)
        first = np.concatenate([[-1 - INFINITY], self.steps])
        results = patterns(question, first).astype(np.int32)
        self.results = torch.from_numpy(results).to(device)

    def patterns(self, start: int, stop: int) -> Tensor:
        """The results' patterns, int32, of the keys start..stop - 1."""
        low, high = np.searchsorted(self.steps, [start, stop - 1], side="right")
        ends = np.clip(self.steps[low:high] - start, 0, stop - start)
        counts = np.diff(ends, prepend=0, append=stop - start)
        runs = self.results[low : high + 1]
        return torch.repeat_interleave(runs, torch.from_numpy(counts).to(runs.device), output_size=stop - start)
