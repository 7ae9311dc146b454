"""Seeds for stochastic rounding: a function of the run's own seeds, the step and the purpose, and of nothing else.

`formats.random_bits` turns a seed into as many random bits as a tensor needs, counted within the run; here is where seeds come
from. What rounds at random, one tensor of one step for one purpose, takes one seed a run. All words of 64 bits, sums and
products modulo 2^64:

    key     = blake2b(init_seed, data_seed)                       once a run, on the host
    word    = blake2b(purpose)                                    once a purpose, on the host
    z       = mix(key + word)
    seed    = mix(z + (step + 1) * 0x9E3779B97F4A7C15)

with mix the finaliser of splitmix64 (Steele, Lea, Flood 2014: "Fast splittable pseudorandom number generators"; variant 13 of
Stafford's), so the seeds of one purpose over the steps are splitmix64's own sequence from the state z. The step is the device's
counter: nothing waits for the host.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from formats.compile_time import assume_constant_result
from formats.random_bits import GOLDEN

SIGN, WORD = 1 << 63, 1 << 64
FIRST, SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def run_keys(seeds: Sequence[tuple[int, int]]) -> Tensor:
    """A 64-bit key for each run's (init_seed, data_seed), int64 [R]; runs that differ in either have different keys."""
    return torch.tensor([_hash(f"run/{init_seed}/{data_seed}") for init_seed, data_seed in seeds], dtype=torch.int64)


def purpose_words(purposes: Sequence[str]) -> Tensor:
    """The purposes as `rounding_seeds` mixes them in, int64 [P]: for compiled code that serves many purposes alike."""
    return torch.tensor([_hash(f"purpose/{purpose}") for purpose in purposes], dtype=torch.int64)


def rounding_seeds(keys: Tensor, counter: Tensor, purpose: str | Tensor) -> Tensor:
    """A seed for each run, int64 [R], as `seed=` of `quantize` takes it; or for each purpose and run, [P, R].

    keys: `run_keys`, [R]. counter: the steps made so far, int64 [1], on the keys' device. purpose: what is rounded, as
    "gradient of h.3.mlp.fc", or an element [1] of `purpose_words`, or all of them [P, 1]. Inside a compiled function a word of
    text is a constant, and another word another program.
    """
    word = _word(purpose) if isinstance(purpose, str) else purpose
    return _mix(_mix(keys + word) + (counter + 1) * _signed(GOLDEN))


def _mix(z: Tensor) -> Tensor:
    """splitmix64's finaliser in wrapping int64, shifts logical."""
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _signed(FIRST)
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _signed(SECOND)
    return z ^ ((z >> 31) & ((1 << 33) - 1))


# The compiler runs it and folds in the number; it can't follow a hash.
@assume_constant_result
def _word(purpose: str) -> int:
    return _hash(f"purpose/{purpose}")


def _hash(text: str) -> int:
    return _signed(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"))


def _signed(word: int) -> int:
    """A 64-bit pattern as int64 has it."""
    return word - WORD if word >= SIGN else word
