"""What each hand-written pass wins over the compiler's or PyTorch's own, at the shapes of packs; on a GPU only.

`faster` in extra_info is the plain form's median over ours, `of_copy` the bytes that must be read and written over what a copy
moves in the same time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.test_packs import CUDA, DEVICE, median_seconds, note_device
from train.determinism import deterministic
from train.layers import add_norm, attend, cross_entropy_gradient, embedding_gradient
from train.precision import pack_precision
from train.resolve import resolve_recipe

pytestmark = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")

# R, S, D, heads, T, V
SHAPES = {
    "4x128": (128, 2048, 128, 4, 256, 256),
    "6x384": (32, 2048, 384, 6, 256, 4096),
    "gpt2-124m": (1, 32768, 768, 12, 1024, 50304),
}
TOGETHER = 10


def compare(benchmark: Any, ours: Callable[[], Any], plain: Callable[[], Any], group: str, moved: float) -> None:
    """Ours timed by the benchmark, the plain form beside it, and a copy of as many bytes as have to be moved."""
    buffer = torch.empty(int(moved / 2), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(buffer)

    def together(work: Callable[[], Any]) -> Callable[[], None]:
        """Recorded, so that the card is timed and not the host that launches."""
        for _ in range(3):
            work()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(TOGETHER):
                work()

        def timed() -> None:
            graph.replay()
            torch.cuda.synchronize()

        return timed

    benchmark.group = group
    with deterministic(tf32=False):
        plain_seconds = median_seconds(together(plain), 20)
        copy_seconds = median_seconds(together(lambda: target.copy_(buffer)), 20)
        benchmark.pedantic(together(ours), rounds=20, warmup_rounds=3)
    benchmark.extra_info["faster"] = plain_seconds / benchmark.stats.stats.median
    benchmark.extra_info["of_copy"] = copy_seconds / benchmark.stats.stats.median
    benchmark.extra_info["milliseconds"] = 1e3 * benchmark.stats.stats.median / TOGETHER
    note_device(benchmark)


def close(a: Tensor, b: Tensor) -> None:
    """The same work: to BF16's resolution."""
    assert float((a - b).float().norm() / b.float().norm()) < 2**-7


@pytest.mark.parametrize("name", SHAPES)
def test_add_norm(benchmark: Any, name: str) -> None:
    """Forward, the compiler's in both, and backward, ours by hand."""
    R, S, D, *_ = SHAPES[name]
    precision = pack_precision([resolve_recipe("native-bf16").body] * R, DEVICE)
    x = torch.randn(R, S, D, device=DEVICE, requires_grad=True)
    delta = torch.randn(R, S, D, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    gain = torch.randn(R, D, device=DEVICE, requires_grad=True)
    grads = (torch.randn_like(x), torch.randn_like(delta))

    def both(kernels: bool) -> Callable[[], tuple[Tensor, ...]]:
        compiled = torch.compile(add_norm, dynamic=False)
        return lambda: torch.autograd.grad(
            compiled(x, delta, gain, precision, precision, kernels), (x, delta, gain), grads
        )

    for a, b in zip(both(True)(), both(False)(), strict=True):
        close(a, b)
    compare(benchmark, both(True), both(False), group="add_norm", moved=28 * R * S * D)


@pytest.mark.parametrize("name", SHAPES)
def test_attention(benchmark: Any, name: str) -> None:
    """Forward and backward, from packed queries, keys and values to their packed gradient."""
    R, S, D, H, T, _ = SHAPES[name]
    qkv = torch.randn(R * S // T, T, 3, H, D // H, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(R * S // T, T, H, D // H, device=DEVICE, dtype=torch.bfloat16)

    def both(kernels: bool) -> Callable[[], Tensor]:
        forward = torch.compile(attend, dynamic=False)

        def work() -> Tensor:
            gradient: Tensor = torch.autograd.grad(forward(qkv, kernels), qkv, dy)[0]
            return gradient

        return work

    close(both(True)(), both(False)())
    compare(benchmark, both(True), both(False), group="attention", moved=(6 + 2 + 6 + 2 + 2 + 6) * R * S * D)


@pytest.mark.parametrize("name", SHAPES)
def test_cross_entropy(benchmark: Any, name: str) -> None:
    R, S, _, _, _, V = SHAPES[name]
    R, S = max(1, min(R, 2**27 // (S * V))), min(S, 2**29 // V)
    precision = pack_precision([resolve_recipe("native-bf16").body] * R, DEVICE)
    logits = torch.randn(R, S, V, device=DEVICE, dtype=torch.bfloat16)
    targets = torch.randint(0, V, (R, S), device=DEVICE)

    def work(kernels: bool) -> Callable[[], tuple[Tensor, Tensor]]:
        compiled = torch.compile(cross_entropy_gradient, dynamic=False)
        return lambda: compiled(logits, targets, precision, V, S, kernels)

    for a, b in zip(work(True)(), work(False)(), strict=True):
        close(a, b)
    compare(benchmark, work(True), work(False), group="cross_entropy", moved=4 * R * S * V)


@pytest.mark.parametrize("name", SHAPES)
def test_embedding_gradient(benchmark: Any, name: str) -> None:
    """Tokens as frequent as in text: the rank-th by 1 / rank."""
    R, S, D, _, _, V = SHAPES[name]
    share = 1 / torch.arange(1, V + 1, device=DEVICE, dtype=torch.float64)
    tokens = torch.multinomial(share.expand(R, V), S, replacement=True)
    dx = torch.randn(R, S, D, device=DEVICE)

    def work(kernels: bool) -> Callable[[], Tensor]:
        return lambda: embedding_gradient(dx, tokens, V, kernels)

    close(work(True)(), work(False)())
    compare(benchmark, work(True), work(False), group="embedding_gradient", moved=4 * R * (S + V) * D)
