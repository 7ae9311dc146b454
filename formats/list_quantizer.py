"""Rounding tensors to a list of values: one look-up in a table keyed by the input's leading bits, and one comparison.

A deterministic rounding is a step function: between two steps the result is constant. In the order of their integer keys (the
bit pattern, its magnitude bits flipped where the sign is set) floating-point numbers ascend, and numbers that agree in their
leading bits are a run of keys. Cut so finely that no run holds two steps, one comparison with that run's step, if it has one,
decides between two values. The table covers the runs from the first step to the last; all other inputs go to its ends. Lists
whose steps lie too close for a table of a million runs are bisected.

Stochastic modes bisect for the two neighbours and compare x with the threshold that the random number picks between them,
in FP64, where both sides are exact: a list and a number of bits for which they are not is refused.
"""

from fractions import Fraction
from functools import cache
from math import ceil
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from formats.lists import GridFormat
from formats.names import element_format
from formats.overflow import Outcome, outcome
from formats.rounding import Rounding, check_modes, check_overflow, check_random_bits

MAX_RUNS = 1 << 20
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


class Lookup(NamedTuple):
    """A table for one list and mode: inputs of key >> shift in first..first + runs - 1, clamped, have their own run.

    steps [runs]: the smallest key of the run that goes to the upper value. values [2 runs]: lower and upper.
    """

    shift: int
    first: int
    steps: Tensor
    values: Tensor


def quantize_to_list(
    x: Tensor, f: str, rounding: str, overflow: str, random: Tensor | None, stochastic_bits: int
) -> Tensor:
    """Round x, of a dtype that holds the list of that canonical name, to it: see quantize."""
    wide_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide = x.to(wide_dtype)
    if random is None:
        rounded = _look_up(wide, _lookup(x.dtype, f, rounding, overflow, x.device))
    else:
        rounded = _stochastic(wide, f, x.dtype, rounding, overflow, random, stochastic_bits)
    nan_ends = _nan_ends(f, rounding, overflow)
    for sign, becomes_nan in zip((1, -1), nan_ends, strict=True):
        if becomes_nan:
            rounded = torch.where(wide == sign * torch.inf, torch.nan, rounded)
    return torch.where(wide.isnan(), wide, rounded).to(x.dtype)


def _look_up(x: Tensor, table: Lookup) -> Tensor:
    integer, magnitude = (torch.int64, (1 << 63) - 1) if x.dtype == torch.float64 else (torch.int32, (1 << 31) - 1)
    bits = x.view(integer)
    key = bits ^ ((bits >> (integer.itemsize * 8 - 1)) & magnitude)
    if table.shift < 0:
        return table.values[torch.bucketize(key, table.steps, right=True)]
    run = torch.clamp((key >> table.shift) - table.first, 0, len(table.steps) - 1)
    return table.values[2 * run + (key >= table.steps[run])]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _nan_ends(f: str, rounding: str, overflow: str) -> tuple[bool, bool]:
    listed = _listed(f)
    mode, over = check_modes(rounding, overflow)
    check_overflow(listed.name, listed.has_inf, listed.has_nan, over)
    ends = [outcome(listed, mode, over, negative=negative, infinite=True) for negative in (False, True)]
    return ends[0] is Outcome.NAN, ends[1] is Outcome.NAN


def _listed(f: str) -> GridFormat:
    listed = element_format(f)
    assert isinstance(listed, GridFormat)
    return listed


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _lookup(dtype: torch.dtype, f: str, rounding: str, overflow: str, device: torch.device) -> Lookup:
    from formats.quantizer import check_carrier

    listed = _listed(f)
    mode, over = check_modes(rounding, overflow)
    check_overflow(listed.name, listed.has_inf, listed.has_nan, over)
    check_carrier(listed, dtype)
    return _made_lookup(listed, mode, dtype == torch.float64, device)


@cache
def _made_lookup(f: GridFormat, mode: Rounding, is_double: bool, device: torch.device) -> Lookup:
    carrier = torch.float64 if is_double else torch.float32
    values = torch.from_numpy(f.grid().copy()).to(device, carrier)
    keys = _steps(f, mode, is_double)
    top = 53 if is_double else 24
    for shift in range(top, -1, -1):
        runs = keys >> shift
        first, count = int(runs[0]), int(runs[-1] - runs[0]) + 1
        if len(np.unique(runs)) == len(runs) and count <= MAX_RUNS:
            break
        if count > MAX_RUNS:
            shift, first = -1, 0
            break
    else:
        shift, first = -1, 0
    integer = torch.int64 if is_double else torch.int32
    if shift < 0:
        return Lookup(-1, 0, torch.from_numpy(keys).to(device, integer), values)
    every = np.arange(first, first + count)
    before = np.searchsorted(runs, every)  # steps in earlier runs: the index of the lower value
    has_step = np.isin(every, runs)
    never = np.iinfo(np.int64 if is_double else np.int32).max
    steps = np.where(has_step, keys[np.minimum(before, len(keys) - 1)], never)
    pairs = np.stack([before, np.minimum(before + has_step, len(f.values) - 1)], axis=1).reshape(-1)
    return Lookup(shift, first, torch.from_numpy(steps).to(device, integer), values[torch.from_numpy(pairs).to(device)])


def _steps(f: GridFormat, mode: Rounding, is_double: bool) -> Integers:
    """For each value but the first, the key of the smallest number of the carrier that rounds to it or beyond."""
    steps = []
    for place, (low, high, divider) in enumerate(zip(f.values, f.values[1:], f.dividers, strict=False)):
        upper_is_even = f.codes[place + 1] % 2 == 0
        if mode in (Rounding.NEAREST_EVEN, Rounding.NEAREST_AWAY):
            threshold = divider
            included = upper_is_even if mode is Rounding.NEAREST_EVEN else divider > 0
        elif mode is Rounding.TO_ODD:
            threshold, included = (high, True) if upper_is_even else (low, False)
        else:
            up = mode is Rounding.TOWARD_POSITIVE or (mode is Rounding.TOWARD_ZERO and high <= 0)
            threshold, included = (low, False) if up else (high, True)
        # Values themselves stay, wherever the divider is.
        included = (included and threshold != low) or threshold == high
        steps.append(_key_from(threshold, included, is_double))
    return np.array(steps, np.int64)


def _key_from(threshold: Fraction, included: bool, is_double: bool) -> int:
    """The key of the smallest carrier number that is above the threshold, or at it if that is included."""
    kind, integer = (np.float64, np.int64) if is_double else (np.float32, np.int32)
    with np.errstate(over="ignore"):
        near = kind(float(threshold))
    while Fraction(float(near)) > threshold:
        near = np.nextafter(near, kind(-np.inf))
    while Fraction(float(near)) < threshold or (Fraction(float(near)) == threshold and not included):
        near = np.nextafter(near, kind(np.inf))
    if near == 0:
        # Both zeros are one number: the key of -0 is the lower of the two.
        return -1
    bits = int(near.view(integer))
    return bits if bits >= 0 else bits ^ int(np.iinfo(integer).max)


def _stochastic(
    x: Tensor, f: str, dtype: torch.dtype, rounding: str, overflow: str, random: Tensor, width: int
) -> Tensor:
    mode, count, lowest, largest = _stochastic_question(dtype, f, rounding, overflow, width)
    values, powers = _values(f, x.device).values, 2.0 ** (width + 1)
    inside = torch.clamp(x.to(torch.float64), lowest, largest)
    place = torch.clamp(torch.bucketize(inside, values, right=True) - 1, 0, count - 2)
    low, high = values[place], values[place + 1]
    short = (1 << width) - random.to(torch.int64)
    k = 2 * short - (0 if mode == Rounding.STOCHASTIC_A else 1)
    inner_is_high = high <= 0
    inner = torch.where(inner_is_high, high, low)
    # |x - inner| >= k / 2^(N+1) (high - low), multiplied out: all of it is exact, by the check of the constants.
    reach = k.to(torch.float64) * (high - low)
    distance = torch.abs(inside * powers - inner * powers)
    at_threshold = distance == reach
    away = (distance > reach) | (at_threshold & (short % 2 == 0) if mode == Rounding.STOCHASTIC_C else at_threshold)
    chosen = torch.where(away ^ inner_is_high, high, low)
    return torch.where(inside == low, low, torch.where(inside == high, high, chosen)).to(x.dtype)


class _Values(NamedTuple):
    values: Tensor


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _values(f: str, device: torch.device) -> _Values:
    return _Values(torch.from_numpy(_listed(f).grid().copy()).to(device))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _stochastic_question(
    dtype: torch.dtype, f: str, rounding: str, overflow: str, width: int
) -> tuple[str, int, float, float]:
    from formats.quantizer import check_carrier

    listed = _listed(f)
    mode, over = check_modes(rounding, overflow)
    check_overflow(listed.name, listed.has_inf, listed.has_nan, over)
    check_random_bits(width)
    check_carrier(listed, dtype)
    room = 53 - _widest_pair(listed)
    if width + 1 > room:
        raise ValueError(
            f"{listed.name}: with {width} random bits the thresholds between its values need more than FP64's 53 bits; "
            f"take stochastic_bits of at most {max(room - 1, 0)}"
        )
    return mode.value, len(listed.values), listed.min, listed.max


def _widest_pair(f: GridFormat) -> int:
    """The bits from the finest bit of two neighbours to their leading one, at most: theirs, and their difference's."""
    widest = 0
    for low, high in zip(f.values, f.values[1:], strict=False):
        finest = max(low.denominator, high.denominator)
        widest = max(widest, ceil(max(abs(low), abs(high), high - low) * finest).bit_length())
    return widest
