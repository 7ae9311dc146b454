"""Everything random in a run, as a function of the run's own seeds and nothing else.

Initial weights and batches are drawn from Philox, a counter-based generator (Salmon et al. 2011): its key is the seed and the
purpose, its counter the position, so a draw depends neither on the device, nor on the run's slot, nor on what was
drawn before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from train.model import ModelShape

Weights = Mapping[str, NDArray[np.float32]]

WORDS_PER_COUNTER = 4  # Philox 4x64 gives four words for each value of its counter


def _generator(seed: int, purpose: str, counter: int = 0) -> np.random.Philox:
    word = int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little")
    return np.random.Philox(key=np.array([seed, word], dtype=np.uint64), counter=counter)


def initial_weights(
    shape: ModelShape, init_seed: int, names: Collection[str] | None = None
) -> dict[str, NDArray[np.float32]]:
    """One run's initial parameters: normal with the model's standard deviations, norm gains one; float32, keyed by name.

    names: of those parameters alone.
    """
    weights: dict[str, NDArray[np.float32]] = {}
    for name, size in shape.parameters().items():
        if names is not None and name not in names:
            continue
        std = shape.initial_std(name)
        if std is None:
            weights[name] = np.ones(size, np.float32)
        else:
            normal = np.random.Generator(_generator(init_seed, f"weights/{name}")).standard_normal(
                size, dtype=np.float32
            )
            weights[name] = normal * np.float32(std)
    return weights


def different(seeds: Iterable[int]) -> list[int]:
    """Each seed once, in the order in which they came."""
    return list(dict.fromkeys(seeds))


def stacked_weights(shape: ModelShape, init_seeds: Sequence[int]) -> dict[str, NDArray[np.float32]]:
    """The initial parameters of several runs, float32 [len(init_seeds), ...] by name; a thread draws a run at a time."""
    stacks = {name: np.empty((len(init_seeds), *size), np.float32) for name, size in shape.parameters().items()}

    def draw(i: int) -> None:
        for name, weights in initial_weights(shape, init_seeds[i]).items():
            stacks[name][i] = weights

    with ThreadPoolExecutor() as threads:  # NumPy draws and copies without holding the interpreter
        list(threads.map(draw, range(len(init_seeds))))
    return stacks


def batch_offsets(data_seed: int, steps: int, sequences: int, windows: int, first_step: int = 0) -> NDArray[np.int64]:
    """Where each sequence of each step starts in the training text, uniform on [0, windows), [steps, sequences].

    Sequence n of step s reads word n of the counters that belong to s, whichever steps are asked for. The modulo's bias is
    at most windows / 2^64.
    """
    counters = -(-sequences // WORDS_PER_COUNTER)
    words = _generator(data_seed, "batches", first_step * counters).random_raw(steps * counters * WORDS_PER_COUNTER)
    per_step = words.reshape(steps, counters * WORDS_PER_COUNTER)[:, :sequences]
    return (per_step % np.uint64(windows)).astype(np.int64)


def held_out_offsets(sequences: int, windows: int) -> NDArray[np.int64]:
    """Where the fixed held-out sequences start: evenly spread over the text, the same for every run, [sequences]."""
    return np.linspace(0, windows - 1, sequences).astype(np.int64)


def random_words(seed: int, purpose: str, first: int, count: int) -> NDArray[np.uint64]:
    """Words first, first + 1, ... of the stream that belongs to (seed, purpose), [count], whichever are asked for."""
    counter, skip = divmod(first, WORDS_PER_COUNTER)
    words: NDArray[np.uint64] = _generator(seed, purpose, counter).random_raw(skip + count)[skip:]
    return words
