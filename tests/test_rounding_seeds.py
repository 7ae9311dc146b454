"""Seeds of stochastic rounding against the formula in Python's own integers, and the bits that come of them against chance."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from scipy import stats

from formats.random_bits import random_bits
from train.rounding_seeds import purpose_words, rounding_seeds, run_keys

MASK = 2**64 - 1
RUNS = [(0, 0), (0, 1), (1, 0), (2**32 - 1, 7)]


def hashed(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def mixed(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_the_formula_is_splitmix64s_sequence() -> None:
    """From state 0: the first outputs of its authors' C code."""
    assert [mixed(n * 0x9E3779B97F4A7C15 & MASK) for n in (1, 2, 3)] == [
        0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F,
    ]  # fmt: skip


@pytest.mark.parametrize("step", [0, 1, 299, 10**6])
@pytest.mark.parametrize("purpose", ["gradient of h.3.mlp.fc", "master wte"])
def test_seeds_are_the_formulas(step: int, purpose: str) -> None:
    expected = []
    for run in RUNS:
        z = mixed((hashed("run/{}/{}".format(*run)) + hashed(f"purpose/{purpose}")) & MASK)
        expected.append(mixed((z + (step + 1) * 0x9E3779B97F4A7C15) & MASK))
    for given in (purpose, purpose_words([purpose, "another"])[:1]):
        seeds = rounding_seeds(run_keys(RUNS), torch.tensor([step]), given)
        assert seeds.dtype == torch.int64
        assert [int(seed) & MASK for seed in seeds] == expected


def test_a_runs_seeds_know_neither_slot_nor_neighbours() -> None:
    step = torch.tensor([41])
    together = rounding_seeds(run_keys(RUNS), step, "x")
    assert torch.equal(rounding_seeds(run_keys(RUNS[::-1]), step, "x"), together.flip(0))
    for run, seed in zip(RUNS, together, strict=True):
        assert torch.equal(rounding_seeds(run_keys([run]), step, "x"), seed[None])


def test_seeds_differ_between_runs_steps_and_purposes() -> None:
    keys = run_keys([(i, d) for i in range(16) for d in range(16)])
    seeds = torch.cat([rounding_seeds(keys, torch.tensor([s]), p) for s in range(64) for p in ("a", "b", "ab", "ba")])
    assert seeds.unique().numel() == seeds.numel() == 256 * 64 * 4


@pytest.mark.parametrize("along", ["runs", "steps", "purposes"])
def test_random_bits_of_neighbouring_seeds_are_uniform_and_do_not_follow_each_other(along: str) -> None:
    """Pairs (bits of one seed, bits of the next) over a 16 x 16 table, for the same element of each."""
    n = 512
    if along == "runs":
        seeds = rounding_seeds(run_keys([(s, s) for s in range(n)]), torch.tensor([3]), "p")
    elif along == "steps":
        seeds = torch.cat([rounding_seeds(run_keys([(5, 5)]), torch.tensor([s]), "p") for s in range(n)])
    else:
        seeds = torch.cat([rounding_seeds(run_keys([(5, 5)]), torch.tensor([3]), f"h.{s}") for s in range(n)])
    bits = random_bits(seeds, (n, 200), 4).numpy()
    pairs = np.bincount((16 * bits[:-1] + bits[1:]).ravel(), minlength=256)
    assert stats.chisquare(pairs).pvalue > 1e-4


def test_compiled_seeds_are_the_same_seeds() -> None:
    """Whole, with a word of text folded in or with a tensor of words; the tracer alone, which is what could refuse."""
    keys, step = run_keys(RUNS), torch.tensor([7])
    compiled = torch.compile(rounding_seeds, dynamic=False, fullgraph=True, backend="aot_eager")
    for purpose in ("a", "b", purpose_words(["c"])):
        assert torch.equal(compiled(keys, step, purpose), rounding_seeds(keys, step, purpose))
