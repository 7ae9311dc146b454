"""A rounding of FP32 numbers as what it is, a staircase: where it steps, and from which value to which.

FP32 numbers are taken in the order of their keys, integers that rise with the number: k for the code k, and -1 - k for the code
k with the sign bit, so that -0 and +0 are -1 and 0. The oracle says, from mpmath's decision points, at which keys the result
steps. Between these nothing happens, so that all 2^32 expected results are a few runs.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from formats import ElementFormat
from verification import oracle
from verification.points import Codes

INFINITY = 0x7F800000


def inputs_of(keys: Tensor) -> Tensor:
    """FP32 numbers of int32 keys."""
    return torch.where(keys >= 0, keys, (-1 - keys) | -(1 << 31)).view(torch.float32)


def step_keys(f: ElementFormat, rounding: str, overflow: str = "saturate") -> Codes:
    """The keys of the inputs at which the oracle's result differs from that of the input before, ascending.

    Between two neighbouring decision points nothing steps, so only inputs around them are candidates: their own FP32
    neighbours, zero, where the sign changes, and the infinities.
    """
    listed = oracle.table(f)
    targets = np.unique(np.concatenate([listed.entries, listed.middles]))
    with np.errstate(over="ignore"):
        near = np.clip(targets, -3.4028234663852886e38, 3.4028234663852886e38).astype(np.float32)
    codes = near.view(np.int32).astype(np.int64)
    at = np.where(codes >= 0, codes, -1 - (codes & 0x7FFFFFFF))
    around = np.unique(np.concatenate([*(at + near for near in range(-2, 3)), [-1, 0, 1, INFINITY, -1 - INFINITY + 1]]))
    around = around[(around > -1 - INFINITY) & (around <= INFINITY)]
    here, before = patterns(f, rounding, around, overflow), patterns(f, rounding, around - 1, overflow)
    return np.asarray(around[here != before])


def patterns(f: ElementFormat, rounding: str, keys: Codes, overflow: str = "saturate") -> Codes:
    """The FP32 bit patterns of the oracle's results for inputs of these keys."""
    x = inputs_of(torch.from_numpy(keys.astype(np.int32))).double().numpy()
    result = oracle.expected(f, rounding, x, overflow).astype(np.float32)
    return np.asarray(result.view(np.int32), np.int64)


class Staircase:
    """All results of a rounding, from -inf to +inf."""

    def __init__(self, f: ElementFormat, rounding: str, overflow: str = "saturate") -> None:
        self.steps = step_keys(f, rounding, overflow)
        first = np.concatenate([[-1 - INFINITY], self.steps])
        self.results = patterns(f, rounding, first, overflow).astype(np.int32)

    def patterns(self, keys: Codes) -> npt.NDArray[np.int32]:
        """The results' patterns of keys that ascend by one."""
        ends = np.searchsorted(keys, self.steps)
        return np.repeat(self.results, np.diff(ends, prepend=0, append=len(keys)))
