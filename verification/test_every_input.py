"""All 2^32 FP32 inputs, or every 1009th of them, against an oracle of runs.

In the order of FP32's codes the expected results are runs: each value of the format, repeated from the first input
that rounds to it up to the next one's first. The first inputs come from the oracle's decision points, so nothing here
knows a bit trick.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch

from formats import FloatFormat, float_format, quantize
from verification import oracle
from verification.points import from_codes

INFINITY = 0x7F800000
NAMES = ["e4m3fn", "e5m2", "bf16", "fp16", "e8m3", "e4m0f"]
PRIME = 1009


def first_inputs(f: FloatFormat, rounding: str) -> npt.NDArray[np.int64]:
    """For each value from code 1 up, the FP32 code of the smallest input that rounds to it."""
    steps = oracle.decision_points(f, rounding)
    near = steps.astype(np.float32)
    at_or_above = near.view(np.int32) + (near.astype(np.float64) < steps)
    even_below = (np.arange(len(steps)) % 2 == 0) & (rounding == "nearest_even")
    on_step = near.astype(np.float64) == steps
    return np.asarray(at_or_above + (on_step & even_below), np.int64)


def runs(f: FloatFormat, rounding: str, codes: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """What these ascending codes of non-negative numbers round to."""
    ends = np.searchsorted(codes, first_inputs(f, rounding))
    lengths = np.diff(ends, prepend=0, append=len(codes))
    return np.repeat(oracle.values(f).astype(np.float32), lengths)


def check(f: FloatFormat, rounding: str, codes: npt.NDArray[np.int64]) -> None:
    want = runs(f, rounding, codes).view(np.int32)
    for sign in (0, 1 << 31):
        got = quantize(from_codes(codes + sign, torch.float32), f, rounding).numpy().view(np.int32)
        np.testing.assert_array_equal(got & 0x7FFFFFFF, want)
        np.testing.assert_array_equal(got < 0, bool(sign))


@pytest.mark.parametrize("rounding", ["nearest_even", "toward_zero"])
@pytest.mark.parametrize("name", NAMES)
def test_every_1009th_input(name: str, rounding: str) -> None:
    check(float_format(name), rounding, np.arange(0, INFINITY + 1, PRIME))


@pytest.mark.proof
@pytest.mark.parametrize("rounding", ["nearest_even", "toward_zero"])
@pytest.mark.parametrize("name", NAMES)
def test_every_input(name: str, rounding: str) -> None:
    for codes in chunks():
        check(float_format(name), rounding, codes)
    for sign in (0, 1 << 31):
        nan = from_codes(np.arange(INFINITY + 1, 1 << 31) + sign, torch.float32)
        assert torch.equal(quantize(nan, name, rounding).view(torch.int32), nan.view(torch.int32))


def chunks(size: int = 1 << 22) -> Iterator[npt.NDArray[np.int64]]:
    """The codes of all non-negative numbers, infinity included, a piece at a time."""
    for start in range(0, INFINITY + 1, size):
        yield np.arange(start, min(start + size, INFINITY + 1))
