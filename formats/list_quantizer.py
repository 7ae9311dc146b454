"""Rounding tensors to a list of values: one look-up in a table keyed by the input's leading bits, and one comparison.

A deterministic rounding is a step function: between two steps the result is constant. In the order of their integer keys (the
bit pattern, its magnitude bits flipped where the sign is set) floating-point numbers ascend, and numbers that agree in their
leading bits are a run of keys. Cut so finely that no run holds two steps, one comparison with that run's step, if it has one,
decides between two values. The table covers the runs from the first step to the last; all other inputs go to its ends. Lists
whose steps lie too close for a table of a million runs are bisected.

to_odd and the stochastic modes have steps too close together for that, at each value and right beside it. They look up the
neighbours of x instead. to_odd then takes the one that x equals, or the odd one; a stochastic mode compares x with the threshold
that the random number picks between them, in FP64, where both sides are exact: a list and a number of bits for which they
are not is refused.
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from formats.compile_time import assume_constant_result
from formats.lists import GridFormat
from formats.names import element_format
from formats.overflow import Outcome, outcome
from formats.rounding import Rounding, check_modes, check_overflow, check_random_bits

MAX_RUNS = 1 << 20
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


class Lookup(NamedTuple):
    """A table for one list and mode: inputs of key >> shift in first..first + runs - 1, clamped, have their own run.

    steps [runs]: the smallest key of the run that goes to the upper entry. There are two entries a run, lower and upper; or,
    with shift -1, steps [values - 1] are bisected and there is an entry a value. values: what x becomes, or, where that takes
    more than an entry, the neighbour below x; others: then the odd one of the two neighbours.
    """

    shift: int
    first: int
    steps: Tensor
    values: Tensor
    others: Tensor


class Neighbours(NamedTuple):
    """The same for stochastic modes, whose entries are the neighbours nearer zero and away from it, and, in FP64, exact
    multiples of them: inner * 2^(N+1), and outer - inner.
    """

    shift: int
    first: int
    steps: Tensor
    inner: Tensor
    outer: Tensor
    inner_scaled: Tensor
    distance: Tensor


def quantize_to_list(
    x: Tensor, f: str, rounding: str, overflow: str, random: Tensor | None, stochastic_bits: int
) -> Tensor:
    """Round x, of a dtype that holds the list of that canonical name, to it: see quantize."""
    wide_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide = x.to(wide_dtype)
    mode, lowest, largest, nan_above, nan_below = _question(x.dtype, f, rounding, overflow, stochastic_bits)
    inside = torch.clamp(wide, lowest, largest)
    if random is None:
        table = _lookup(f, mode, x.dtype == torch.float64, x.device)
        entry = _entry(wide, table.shift, table.first, table.steps)
        rounded = table.values[entry]
        if mode == Rounding.TO_ODD:
            rounded = torch.where(rounded == inside, rounded, table.others[entry])
    else:
        rounded = _stochastic(inside, f, mode, random, stochastic_bits)
    if nan_above:
        rounded = torch.where(wide == torch.inf, torch.nan, rounded)
    if nan_below:
        rounded = torch.where(wide == -torch.inf, torch.nan, rounded)
    return torch.where(wide.isnan(), wide, rounded).to(x.dtype)


def _entry(x: Tensor, shift: int, first: int, steps: Tensor) -> Tensor:
    integer, magnitude = (torch.int64, (1 << 63) - 1) if x.dtype == torch.float64 else (torch.int32, (1 << 31) - 1)
    bits = x.view(integer)
    key = bits ^ ((bits >> (integer.itemsize * 8 - 1)) & magnitude)
    if shift < 0:
        return torch.bucketize(key, steps, right=True)
    run = torch.clamp((key >> shift) - first, 0, len(steps) - 1)
    return 2 * run + (key >= steps[run])


def _stochastic(x: Tensor, f: str, mode: str, random: Tensor, width: int) -> Tensor:
    table = _neighbours(f, width, x.dtype == torch.float64, x.device)
    entry = _entry(x, table.shift, table.first, table.steps)
    short = (1 << width) - random.to(torch.int64 if width > 29 else torch.int32)
    k = 2 * short if mode == Rounding.STOCHASTIC_A else 2 * short - 1
    # x against inner + k / 2^(N+1) (outer - inner), multiplied out: both sides are exact, by the check of the question.
    distance = table.distance[entry]
    threshold = table.inner_scaled[entry] + k.to(torch.float64) * distance
    scaled = x.to(torch.float64) * 2.0 ** (width + 1)
    past = torch.where(distance < 0, scaled < threshold, scaled > threshold)
    at_threshold = scaled == threshold
    away = past | (at_threshold & (short % 2 == 0) if mode == Rounding.STOCHASTIC_C else at_threshold)
    return torch.where(away, table.outer[entry], table.inner[entry])


def _listed(f: str) -> GridFormat:
    listed = element_format(f)
    assert isinstance(listed, GridFormat)
    return listed


@assume_constant_result
def _question(
    dtype: torch.dtype, f: str, rounding: str, overflow: str, width: int
) -> tuple[str, float, float, bool, bool]:
    """The mode, the list's ends, and whether inf and -inf become NaN. ValueError for what can't be asked."""
    from formats.quantizer import check_carrier

    listed = _listed(f)
    mode, over = check_modes(rounding, overflow)
    check_overflow(listed.name, listed.has_inf, listed.has_nan, over)
    check_carrier(listed, dtype)
    room = 53 - _widest_pair(listed)
    if mode.is_stochastic and check_random_bits(width) + 1 > room:
        raise ValueError(
            f"{listed.name}: with {width} random bits the thresholds between its values need more than FP64's 53 bits; "
            f"take stochastic_bits of at most {max(room - 1, 0)}"
        )
    ends = [outcome(listed, mode, over, negative=negative, infinite=True) for negative in (False, True)]
    return mode.value, listed.min, listed.max, ends[0] is Outcome.NAN, ends[1] is Outcome.NAN


@assume_constant_result
def _lookup(f: str, mode: str, is_double: bool, device: torch.device) -> Lookup:
    return _made_lookup(_listed(f), Rounding(mode), is_double, device)


@assume_constant_result
def _neighbours(f: str, width: int, is_double: bool, device: torch.device) -> Neighbours:
    return _made_neighbours(_listed(f), width, is_double, device)


@cache
def _made_lookup(f: GridFormat, mode: Rounding, is_double: bool, device: torch.device) -> Lookup:
    carrier = torch.float64 if is_double else torch.float32
    shift, first, steps, places = _entries(f, Rounding.TOWARD_NEGATIVE if mode is Rounding.TO_ODD else mode, is_double)
    above = np.minimum(places + 1, len(f.values) - 1)
    odd = np.where(f.finite_codes[places] % 2 == 1, places, above)
    tensors = (torch.from_numpy(f.grid()[chosen]).to(device, carrier) for chosen in (places, odd))
    return Lookup(shift, first, _keys_on(steps, is_double, device), *tensors)


@cache
def _made_neighbours(f: GridFormat, width: int, is_double: bool, device: torch.device) -> Neighbours:
    carrier = torch.float64 if is_double else torch.float32
    shift, first, steps, places = _entries(f, Rounding.TOWARD_NEGATIVE, is_double)
    values = f.grid()
    low, high = values[places], values[np.minimum(places + 1, len(values) - 1)]
    inner, outer = np.where(high <= 0, high, low), np.where(high <= 0, low, high)
    return Neighbours(
        shift,
        first,
        _keys_on(steps, is_double, device),
        torch.from_numpy(inner).to(device, carrier),
        torch.from_numpy(outer).to(device, carrier),
        torch.from_numpy(np.ldexp(inner, width + 1)).to(device),
        torch.from_numpy(outer - inner).to(device),
    )


def _keys_on(keys: Integers, is_double: bool, device: torch.device) -> Tensor:
    return torch.from_numpy(keys).to(device, torch.int64 if is_double else torch.int32)


def _entries(f: GridFormat, mode: Rounding, is_double: bool) -> tuple[int, int, Integers, Integers]:
    """The shift, first run and steps of a table, and the place in the list that each entry stands for."""
    keys = _steps(f, mode, is_double)
    for shift in range(53 if is_double else 24, -1, -1):
        runs = keys >> shift
        first, count = int(runs[0]), int(runs[-1] - runs[0]) + 1
        if count > MAX_RUNS:
            break
        if len(np.unique(runs)) == len(runs):
            every = np.arange(first, first + count)
            before = np.searchsorted(runs, every)  # steps in earlier runs: the place of the lower entry
            has_step = np.isin(every, runs)
            never = np.iinfo(np.int64 if is_double else np.int32).max
            steps = np.where(has_step, keys[np.minimum(before, len(keys) - 1)], never)
            upper = np.minimum(before + has_step, len(f.values) - 1)
            return shift, first, steps, np.stack([before, upper], axis=1).reshape(-1)
    return -1, 0, keys, np.arange(len(f.values))


def _steps(f: GridFormat, mode: Rounding, is_double: bool) -> Integers:
    """For each value but the first, the key of the smallest number of the carrier that rounds to it or beyond."""
    if mode in (Rounding.NEAREST_EVEN, Rounding.NEAREST_AWAY):
        thresholds, lows, highs = f.dividers, f.values, f.values[1:]
        at = (
            (np.array(f.codes[1:]) % 2 == 0) if mode is Rounding.NEAREST_EVEN else np.array([d > 0 for d in thresholds])
        )
        # Values themselves stay, wherever the divider is.
        at &= np.array([divider != low for divider, low in zip(thresholds, lows, strict=False)])
        at |= np.array([divider == high for divider, high in zip(thresholds, highs, strict=True)])
        return _keys_from(thresholds, at, is_double)
    pairs = list(pairwise(f.values))
    up = [mode is Rounding.TOWARD_POSITIVE or (mode is Rounding.TOWARD_ZERO and high <= 0) for _, high in pairs]
    thresholds = tuple(low if is_up else high for (low, high), is_up in zip(pairs, up, strict=True))
    return _keys_from(thresholds, ~np.array(up), is_double)


def _keys_from(thresholds: Sequence[Fraction], included: npt.NDArray[np.bool_], is_double: bool) -> Integers:
    """The key of the smallest carrier number that is above each threshold, or at it where that is included."""
    kind, integer = (np.float64, np.int64) if is_double else (np.float32, np.int32)
    with np.errstate(over="ignore"):
        near = np.array([float(threshold) for threshold in thresholds]).astype(kind)
    sides = np.array([_side(x, threshold) for x, threshold in zip(near.tolist(), thresholds, strict=True)])

    def move(i: int, end: float) -> None:
        near[i] = np.nextafter(near[i], kind(end))
        sides[i] = _side(float(near[i]), thresholds[i])

    for i in np.flatnonzero(sides > 0).tolist():
        while sides[i] > 0:
            move(i, -np.inf)
    for i in np.flatnonzero((sides < 0) | ((sides == 0) & ~included)).tolist():
        while sides[i] < 0 or (not sides[i] and not included[i]):
            move(i, np.inf)
    bits = near.view(integer).astype(np.int64)
    keys = np.where(bits >= 0, bits, bits ^ int(np.iinfo(integer).max))
    # Both zeros are one number: the key of -0 is the lower of the two.
    return np.where(near == 0, -1, keys)


def _side(x: float, threshold: Fraction) -> int:
    """The sign of x - threshold."""
    numerator, denominator = x.as_integer_ratio()
    difference = numerator * threshold.denominator - threshold.numerator * denominator
    return (difference > 0) - (difference < 0)


@cache
def _widest_pair(f: GridFormat) -> int:
    """The bits from the finest bit of two neighbours to their leading one, at most: theirs, and their difference's."""
    widest = 0
    for low, high in pairwise(f.values):
        finest = max(low.denominator, high.denominator)
        a, b = int(low * finest), int(high * finest)
        either = abs(a) | abs(b)
        widest = max(widest, max(abs(a), abs(b), b - a).bit_length() - (either & -either).bit_length() + 1)
    return widest
