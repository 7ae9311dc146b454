"""Everything random is a function of seed, purpose and position."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from tests.small import SHAPE
from train.seeds import batch_offsets, held_out_offsets, initial_weights


def test_batches_from_any_step_on_are_the_same_batches() -> None:
    whole = batch_offsets(3, steps=20, sequences=6, windows=1000)
    np.testing.assert_array_equal(batch_offsets(3, 7, 6, 1000, first_step=13), whole[13:])


def test_more_sequences_do_not_move_the_first_ones() -> None:
    np.testing.assert_array_equal(batch_offsets(3, 5, 4, 1000)[:, :3], batch_offsets(3, 5, 3, 1000))


def test_batches_are_uniform_over_the_text() -> None:
    counts = np.bincount(batch_offsets(0, 4000, 8, 16).ravel(), minlength=16)
    assert stats.chisquare(counts).pvalue > 1e-4


def test_seeds_differ() -> None:
    assert not np.array_equal(batch_offsets(0, 5, 4, 10**6), batch_offsets(1, 5, 4, 10**6))
    a, b = initial_weights(SHAPE, 0), initial_weights(SHAPE, 1)
    assert not np.array_equal(a["wte"], b["wte"])
    assert not np.array_equal(a["h.0.mlp.fc"].ravel()[:64], a["h.1.mlp.fc"].ravel()[:64])


@pytest.mark.parametrize(("name", "std"), [("wte", 0.02), ("h.0.mlp.fc", 0.02), ("h.1.mlp.proj", 0.02 / 2)])
def test_weights_have_the_models_standard_deviation(name: str, std: float) -> None:
    sample = np.concatenate([initial_weights(SHAPE, seed)[name].ravel() for seed in range(20)])
    # The standard error of a normal sample's deviation is std / sqrt(2 n); five of them.
    assert abs(sample.std() - std) < 5 * std / np.sqrt(2 * sample.size)


def test_held_out_sequences_cover_the_text() -> None:
    offsets = held_out_offsets(5, 101)
    np.testing.assert_array_equal(offsets, [0, 25, 50, 75, 100])
