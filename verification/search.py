"""Level "quick": Hypothesis looks for an input that comes out wrong, and makes it as simple as it can."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from hypothesis import HealthCheck, Phase, find, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample
from torch import Tensor

from verification.block_calls import BlockCaller
from verification.block_oracle import BlockQuestion, decision_points
from verification.block_points import block_size
from verification.blocks import judged
from verification.calls import Caller
from verification.elements import find_broken
from verification.points import INTEGERS, decision_inputs
from verification.question import Question

EXAMPLES = 300
T = TypeVar("T")


def searched(caller: Caller, question: Question, dtype: torch.dtype) -> Tensor:
    """What was found wrong, made simple; 1-D, at most one input."""
    points = decision_inputs(question.f, dtype)
    width = dtype.itemsize * 8
    places = st.integers(0, len(points) - 1).map(lambda i: points[i : i + 1])
    patterns = st.integers(-(2 ** (width - 1)), 2 ** (width - 1) - 1).map(
        lambda bits: torch.tensor([bits], dtype=INTEGERS[dtype]).view(dtype)
    )

    def is_wrong(x: Tensor) -> bool:
        got = caller(x)
        return not bool(caller.unanswered.any()) and len(find_broken(question, x, got)) > 0

    found = simplest(places | patterns, is_wrong)
    return torch.empty(0, dtype=dtype) if found is None else found


def searched_blocks(caller: BlockCaller, question: BlockQuestion, dtype: torch.dtype) -> list[Tensor]:
    """The same for blocks: at most one, [1, n], of numbers beside decision points times a power of two, zeros and anything."""
    points = decision_points(question.f.element)
    points = points[points >= 0]
    n, largest = block_size(question.f), torch.finfo(dtype).max
    near = st.builds(
        lambda i, k, ulps, sign: sign * float(points[i]) * 2.0**k * (1 + ulps * torch.finfo(dtype).eps),
        st.integers(0, len(points) - 1), st.integers(-6, 6), st.integers(-1, 1), st.sampled_from([1.0, -1.0]),
    )  # fmt: skip
    anything = st.floats(-largest, largest)
    blocks = st.lists(near | anything | st.just(0.0), min_size=1, max_size=n)

    def block_of(values: list[float]) -> Tensor:
        return torch.tensor([values + [0.0] * (n - len(values))], dtype=torch.float64).to(dtype)

    def is_wrong(values: list[float]) -> bool:
        block = block_of(values)
        if not bool(block.isfinite().all()):
            return False
        found = judged(caller, question, block, str(dtype).removeprefix("torch."))
        return any(bool(broken.any()) for broken in found.broken.values())

    found = simplest(blocks, is_wrong)
    return [] if found is None else [block_of(found)]


def simplest(strategy: st.SearchStrategy[T], is_wrong: Callable[[T], bool]) -> T | None:
    """The simplest example of those that are wrong; None if none turned up. The same search every time."""
    quiet = settings(
        max_examples=EXAMPLES, database=None, deadline=None, derandomize=True,
        phases=(Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    try:
        return find(strategy, is_wrong, settings=quiet)
    except NoSuchExample:
        return None
