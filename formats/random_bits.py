"""Random bits for stochastic rounding: a function of (seed, element's index within its run), and of nothing else.

So a run's bits depend neither on its slot in a pack, nor on the device, nor on how often anything was called. The function, on
32-bit words, all products modulo 2^32 and all shifts logical:

    z = splitmix64(seed)                     (Steele, Lea, Flood 2014: seed + 0x9E3779B97F4A7C15, then its finaliser)
    k0, k1 = z mod 2^32, z div 2^32
    h = (i mod 2^32 xor k0) * 0x21F0AAAD
    h = (h xor h >> 16) + k1 + (i div 2^32) * 0x9E3779B1
    h = h * 0x735A2D97
    h = (h xor h >> 15) * 0x2C1B3C6D
    R = the upper N bits of h

a keyed variant of the two-round multiply-xorshift hashes found by search (Wellons, hash-prospector), whose second key enters
between the rounds, so that two seeds' sequences are no permutations of each other.
"""

import math

import torch
from torch import Tensor

from formats.rounding import check_random_bits

GOLDEN = 0x9E3779B97F4A7C15
FIRST, SECOND, THIRD, HIGH = 0x21F0AAAD, 0x735A2D97, 0x2C1B3C6D, 0x9E3779B1
WORD = 1 << 32


def random_bits(
    seed: int | Tensor,
    shape: torch.Size | tuple[int, ...],
    bits: int,
    device: torch.device | str | None = None,
    first: int = 0,
) -> Tensor:
    """Random numbers in 0..2^bits - 1, [*shape]: int32 up to 31 bits, int64 for 32.

    seed: an int, any 64 bits, for the whole shape as one run; or an int64 tensor of as many dimensions as the shape with a size
    other than 1 in the first alone, [R, 1, ..., 1], or of shape [R], for R runs along the first axis, whose elements are
    counted within each run. first: the index of the first element, for a shape that is a part of a larger one. ValueError for
    seeds of another shape or dtype.
    """
    check_random_bits(bits)
    k0: int | Tensor
    k1: int | Tensor
    if isinstance(seed, Tensor):
        device = seed.device
        runs = _runs(seed, tuple(shape))
        k0, k1 = _keys(runs)
        within = tuple(shape[1:]) if runs.dim() else tuple(shape)
    else:
        k0, k1 = keys(seed)
        within = tuple(shape)
    count = math.prod(within)
    if first + count < 1 << 31:
        low = torch.arange(first, first + count, dtype=torch.int32, device=device).reshape(within)
        h = _rounds(low, k0, k1)
    else:
        index = torch.arange(first, first + count, device=device).reshape(within)
        h = _rounds(index.to(torch.int32), k0, k1 + (index >> 32).to(torch.int32) * _signed(HIGH))
    h = h.expand(shape)
    if bits == 32:
        return h.to(torch.int64) & (WORD - 1)
    return (h >> (32 - bits)) & ((1 << bits) - 1)


def keys(seed: int) -> tuple[int, int]:
    """(k0, k1) of a seed, as signed 32-bit integers."""
    mask = (1 << 64) - 1
    z = (seed + GOLDEN) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    z ^= z >> 31
    return _signed(z % WORD), _signed(z // WORD)


def _runs(seed: Tensor, shape: tuple[int, ...]) -> Tensor:
    if seed.dtype != torch.int64:
        raise ValueError(f"seed must be an int or an int64 tensor, got {str(seed.dtype).removeprefix('torch.')}")
    if seed.dim() == 0:
        return seed
    one_axis = seed.dim() in (1, len(shape)) and seed.numel() == seed.shape[0]
    if not one_axis or not shape or seed.shape[0] not in (1, shape[0]):
        raise ValueError(
            f"seed must be one number or one a run, [{shape[0] if shape else 1}] along the first axis of "
            f"{list(shape)}, got {list(seed.shape)}"
        )
    return seed.reshape(-1, *[1] * (len(shape) - 1))


def _keys(seed: Tensor) -> tuple[Tensor, Tensor]:
    """The same as `keys`, elementwise in wrapping int64."""
    z = seed + (GOLDEN - (1 << 64))
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * (0xBF58476D1CE4E5B9 - (1 << 64))
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * (0x94D049BB133111EB - (1 << 64))
    z = z ^ ((z >> 31) & ((1 << 33) - 1))
    return z.to(torch.int32), (z >> 32).to(torch.int32)


def _rounds(index: Tensor, k0: int | Tensor, k1: int | Tensor) -> Tensor:
    h = (index ^ k0) * _signed(FIRST)
    h = (h ^ ((h >> 16) & 0xFFFF)) + k1
    h = h * _signed(SECOND)
    return (h ^ ((h >> 15) & 0x1FFFF)) * _signed(THIRD)


def _signed(word: int) -> int:
    """A 32-bit pattern as int32 has it."""
    return word - WORD if word >= WORD // 2 else word
