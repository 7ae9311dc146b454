"""What the kernels of scaled formats take, at GPT-2 124M's sizes (B 32 x T 1024); on a GPU only.

Products beside torch.bmm in BF16 of the same size: `of_bf16` in extra_info is its median over ours, `tflops` ours. Operands
beside a copy of the bytes that must be read and written: `of_copy`; `faster` is the plain form's median, compiled, over ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.test_kernels import close, compare
from benchmarks.test_packs import CUDA, DEVICE
from train import products, scaled_layers
from train.precision import pack_precision
from train.resolve import resolve_recipe

pytestmark = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")

TOKENS = 32768
LAYERS = {"qkv": (768, 2304), "proj": (768, 768), "fc": (768, 3072), "mlp_proj": (3072, 768)}
CHUNK = 128


class Product(NamedTuple):
    """M, N and K of one, and which operand is read across the way it lies: x W, dy W^T, x^T dy."""

    M: int
    N: int
    K: int
    transposed: tuple[bool, bool]


def product_of(name: str, which: str) -> Product:
    D, F = LAYERS[name]
    if which == "forward":
        return Product(TOKENS, F, D, (False, False))
    if which == "dgrad":
        return Product(TOKENS, D, F, (False, True))
    return Product(D, F, TOKENS, (True, False))


def operands(p: Product) -> tuple[Tensor, Tensor]:
    a = torch.randn(1, p.K, p.M, device=DEVICE).mT if p.transposed[0] else torch.randn(1, p.M, p.K, device=DEVICE)
    b = torch.randn(1, p.N, p.K, device=DEVICE).mT if p.transposed[1] else torch.randn(1, p.K, p.N, device=DEVICE)
    return a.to(torch.bfloat16), b.to(torch.bfloat16)


def factors(p: Product, changing: bool) -> tuple[Tensor, Tensor]:
    """Of whole tensors; or of blocks of 128 along the sum and one element, or a tile of a weight, across."""
    if not changing:
        return torch.full((1, 1, 1), 0.5, device=DEVICE), torch.full((1, 1, 1), 3.0, device=DEVICE)
    a = (
        torch.rand(1, p.K // CHUNK, p.M, device=DEVICE).mT
        if p.transposed[0]
        else torch.rand(1, p.M, p.K // CHUNK, device=DEVICE)
    )
    return a, torch.rand(1, p.K // CHUNK, p.N, device=DEVICE)


def measure(benchmark: Any, ours: Callable[[], Tensor], p: Product, a: Tensor, b: Tensor, group: str) -> None:
    moved = 2 * (p.M * p.K + p.K * p.N + p.M * p.N)
    compare(benchmark, ours, lambda: torch.bmm(a, b), group=group, moved=moved)
    info = benchmark.extra_info
    info["of_bf16"] = info.pop("faster")
    info["tflops"] = 2e-9 * p.M * p.N * p.K / info["milliseconds"]


@pytest.mark.parametrize("changing", [False, True], ids=["constant", "changing"])
@pytest.mark.parametrize("which", ["forward", "dgrad", "wgrad"])
@pytest.mark.parametrize("name", LAYERS)
def test_scaled_matmul(benchmark: Any, name: str, which: str, changing: bool) -> None:
    p = product_of(name, which)
    a, b = operands(p)
    f, g = factors(p, changing)
    chunk = CHUNK if changing else 0

    def ours() -> Tensor:
        y: Tensor = scaled_layers.scaled_matmul(a, b, f, g, chunk, torch.bfloat16)
        return y

    if not changing:
        close(ours(), torch.bmm(a, b) * (f * g))
    measure(benchmark, ours, p, a, b, f"scaled_matmul-{which}")


# Candidates for `scaled_kernels.CONSTANT` and CHANGING, and for the parts of a weight's gradient; `-k tilings` tries them.
CONSTANTS = [
    (128, 256, 64, 8, 3),
    (128, 256, 64, 8, 4),
    (256, 128, 64, 8, 3),
    (128, 128, 64, 4, 4),
    (128, 128, 64, 8, 4),
]
CHANGINGS = [
    (64, 256, 128, 8, 2),
    (128, 128, 128, 8, 3),
    (128, 64, 128, 8, 3),
    (64, 128, 128, 4, 3),
    (128, 64, 128, 4, 3),
]
TRIED = [(t, False) for t in CONSTANTS] + [(t, True) for t in CHANGINGS]


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
@pytest.mark.parametrize(("tiling", "changing"), TRIED, ids=str)
@pytest.mark.parametrize("which", ["forward", "dgrad", "wgrad"])
@pytest.mark.parametrize("name", ["proj", "fc"])
def test_tilings(
    benchmark: Any, name: str, which: str, tiling: tuple[int, int, int, int, int], changing: bool, parts: int
) -> None:
    from train import scaled_kernels

    if (parts > 1) != (which == "wgrad"):
        pytest.skip("parts are for the long sums of weights' gradients, and those need some")
    p = product_of(name, which)
    a, b = operands(p)
    f, g = factors(p, changing)
    shape = scaled_kernels.Tiling(*tiling, parts)

    def ours() -> Tensor:
        y: Tensor = scaled_kernels.scaled_matmul(a, b, f, g, CHUNK if changing else 0, torch.bfloat16, shape)
        return y

    measure(benchmark, ours, p, a, b, f"tilings-{name}-{which}-{'changing' if changing else 'constant'}")


@pytest.mark.parametrize("recipe", ["fp8-hybrid", "mxfp8", "deepseek", "nvfp4"])
@pytest.mark.parametrize("role", ["activation", "gradient"])
@pytest.mark.parametrize("width", [768, 3072])
def test_take_both(benchmark: Any, recipe: str, role: str, width: int) -> None:
    """A pass that finds an amax, where the recipe needs one, is in it; the copy moves what is read once and written."""
    linear = resolve_recipe(recipe).body
    precision = pack_precision([linear], DEVICE)._replace(
        seed=torch.tensor([7], device=DEVICE), signs=torch.ones(1, 16, device=DEVICE)
    )
    x = torch.randn(1, TOKENS, width, device=DEVICE, dtype=torch.bfloat16)

    def work(kernels: bool) -> Callable[[], Any]:
        p = precision._replace(kernels=kernels)

        def both() -> Any:
            if role == "activation":
                return products.take_activation(x, p, 0, training=True)
            return products.take_gradient(x, p, 0)

        return torch.compile(both, dynamic=False)

    for ours, plain in zip(work(True)(), work(False)(), strict=True):
        assert torch.equal(ours.values, plain.values)
    compare(
        benchmark, work(True), work(False), group="take_both", moved=(4 if recipe == "fp8-hybrid" else 6) * x.numel()
    )


@pytest.mark.parametrize("rotated", [False, True])
def test_amax(benchmark: Any, rotated: bool) -> None:
    x = torch.randn(1, TOKENS, 3072, device=DEVICE, dtype=torch.bfloat16)
    signs = torch.ones(1, 16, device=DEVICE) if rotated else None
    plain = torch.compile(lambda: x.abs().amax((1, 2)), dynamic=False)
    compare(benchmark, lambda: scaled_layers.amax(x, signs), plain, group="amax", moved=2 * x.numel())
