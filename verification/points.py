"""The inputs at which a quantiser has to be right: both sides of every step, and the edges of the number system.

For each value of the format and each point that divides two of them for the nearest modes: the nearest inputs below, at and above
it in the input's own dtype, so both sides of every step of every deterministic mode. Besides these the next value that there
would be, and the middle before it (the overflow point), zero, the smallest and largest subnormals of the dtype, its
largest value, infinity and NaNs, quiet and signalling. All with both signs.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from formats import ElementFormat, float_format
from verification import oracle

CARRIERS = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
INTEGERS = {
    torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16
}  # fmt: skip
Codes = npt.NDArray[np.int64]


def decision_inputs(f: ElementFormat, dtype: torch.dtype, at_most: int | None = None) -> Tensor:
    """Those inputs for the format, 1-D, each once, ascending by code (positive first).

    at_most: of longer lists every k-th point alone, from both ends of the list on, so that no more are left.
    """
    listed = oracle.table(f)
    targets = np.unique(np.abs(np.concatenate([listed.middles, listed.entries])))
    if at_most is not None and len(targets) > at_most:
        every = -(-len(targets) // at_most)
        ends = 64
        targets = np.unique(np.concatenate([targets[:ends], targets[::every], targets[-ends:]]))
    at = _largest_not_above(targets, dtype)
    codes = np.concatenate([at - 1, at, at + 1, _edges(dtype)])
    return from_codes(both_signs(codes, dtype), dtype)


def from_codes(codes: Codes, dtype: torch.dtype) -> Tensor:
    """Tensor of dtype with these bit patterns, given as non-negative integers, or of FP64 as any."""
    if dtype == torch.float64:
        return torch.from_numpy(codes.astype(np.int64)).view(dtype)
    width = 32 if dtype == torch.float32 else 16
    unsigned = codes.astype(np.uint32 if width == 32 else np.uint16)
    signed = unsigned.view(np.int32 if width == 32 else np.int16)
    return torch.from_numpy(signed).view(dtype)


def both_signs(codes: Codes, dtype: torch.dtype) -> Codes:
    """The positive codes that there are among these, each once, then the same with the sign bit."""
    if dtype == torch.float64:
        positive = np.unique(codes[codes >= 0])
        return np.concatenate([positive, positive | np.int64(-(2**63))])
    sign = 1 << (float_format(CARRIERS[dtype]).bits - 1)
    positive = np.unique(codes[(codes >= 0) & (codes < sign)])
    return np.concatenate([positive, positive + sign])


def _largest_not_above(targets: npt.NDArray[np.float64], dtype: torch.dtype) -> Codes:
    """The code of the largest number of dtype that is <= each non-negative target; above the largest one, infinity."""
    if dtype == torch.float64:
        return targets.view(np.int64)
    half = dtype == torch.float16
    with np.errstate(over="ignore"):
        near = targets.astype(np.float16 if half else np.float32)
    codes: Codes = near.view(np.int16 if half else np.int32).astype(np.int64)
    codes -= near.astype(np.float64) > targets
    return codes >> 16 if dtype == torch.bfloat16 else codes  # BF16 is the upper half of FP32


def _edges(dtype: torch.dtype) -> Codes:
    carrier = float_format(CARRIERS[dtype])
    smallest_normal = 1 << carrier.mantissa_bits
    infinity = (2**carrier.exponent_bits - 1) << carrier.mantissa_bits
    quiet = infinity + smallest_normal // 2
    finite = [0, 1, 2, smallest_normal - 1, smallest_normal, smallest_normal + 1, infinity - 1]
    return np.array([*finite, infinity, infinity + 1, quiet, quiet + 1, infinity + smallest_normal - 1])
