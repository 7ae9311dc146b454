"""How often scaled formats are compiled while they are verified: once for all sizes, and not again for every piece of a batch."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from formats import get_format, quantize_scaled
from formats.scaled import ScaledFormat
from verification import verify
from verification.block_calls import BlockCaller

NAMES = ["e4m3fn@tile4x8", "e4m3fn@block32", "nvfp4", "e4m3fn@row"]


class LikeAGPU:
    """A compiler that counts, and refuses what PyTorch 2.11's for GPUs does: a view that it can't tell to hold its tensor.

    There "failed to set ranges" is what comes of a size that was divided, rounded up and multiplied again.
    """

    def __init__(self) -> None:
        self.compiled = 0

    def __call__(self, graph: torch.fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        self.compiled += 1
        given = [node.meta["example_value"] for node in graph.graph.find_nodes(op="placeholder")]
        (x,) = (one for one in given if isinstance(one, Tensor) and one.ndim)
        views = [node.meta["example_value"] for node in graph.graph.find_nodes(op="call_method", target="reshape")]
        assert views
        if not all(statically_known_true(view.numel() == x.numel()) for view in views):
            raise RuntimeError("failed to set ranges")
        return graph.forward


@pytest.mark.parametrize("name", NAMES)
def test_one_program_serves_whole_groups_of_every_size(name: str) -> None:
    torch._dynamo.reset()
    backend = LikeAGPU()
    program = torch.compile(lambda x: quantize_scaled(x, name), backend=backend, dynamic=True, fullgraph=True)
    random = torch.Generator().manual_seed(0)
    for rows, columns in ((64, 96), (32, 64), (128, 224), (48, 160)):
        x = torch.randn(rows, columns, generator=random)
        assert torch.equal(program(x), quantize_scaled(x, name))
    assert backend.compiled == 1


@pytest.mark.parametrize("name", ["e4m3fn@tile4x8", "mxfp8_e4m3fn:rceil"])
def test_verifying_a_compiled_quantiser_compiles_it_a_few_times(name: str) -> None:
    """For batches, for a block alone, and for strided ones; where a batch was refused, for each of its pieces."""
    torch._dynamo.reset()
    backend = LikeAGPU()
    program = torch.compile(lambda x: quantize_scaled(x, name), backend=backend, dynamic=True)
    assert verify(program, name).passed
    assert backend.compiled <= 3


def test_looking_for_who_is_to_blame_takes_no_longer_than_a_call_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that raises after two seconds, as a compiler does, would be made 64 times a batch."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    made: list[int] = []

    def refuses(x: Tensor) -> Tensor:
        made.append(len(x))
        now[0] += 2.0
        raise RuntimeError("failed to set ranges")

    f = get_format("e4m3fn@row")
    assert isinstance(f, ScaledFormat)
    caller = BlockCaller(refuses, f, "tensor", "values", seconds=20.0, device="cpu")
    for _ in range(3):
        assert caller.answer(torch.ones(256, 32)).values.shape == (256, 32)
        assert caller.unanswered.all()
    assert len(made) == 3 + 10
    assert caller.complaints == ["raises RuntimeError: failed to set ranges for 1.0"]
