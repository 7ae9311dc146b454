"""Every well-known element format and rounding, scaled formats and lists, FP32 and BF16, each against a copy of the same dtype.

On a GPU if there is one; on a CPU a few of them, since compiling takes longer there than measuring. `of_copy` is a copy's time
over this one's. The peers' scaled formats run where they can be imported: torchao, and microxcaling from the checkout in the
environment variable MICROXCALING (its PyTorch path); `ours_faster` is their time over ours, compiled, on the same work, which
is checked first.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.turns import DEVICE, measure
from formats import ElementFormat, Rounding, get_format, list_formats, quantize
from formats.quantizer import check_carrier
from formats.rounding import DETERMINISTIC

ELEMENTS = {torch.float32: 2**27, torch.bfloat16: 2**28} if DEVICE == "cuda" else dict.fromkeys(
    (torch.float32, torch.bfloat16), 2**20
)  # fmt: skip
ROUNDS = 15
ON_A_CPU = ("e4m3fn", "e8m0fnu", "int8", "nf4")
NOT_TABLES = ("fp64", "fp32", "posit16")
MODES = [*map(str, DETERMINISTIC), "stochastic"]
SCALED = [name for name in list_formats("scaled") if not name.startswith("nvfp4")]

pytestmark = pytest.mark.benchmark(group=f"formats on {DEVICE}", disable_gc=True)


def fitting(dtype: torch.dtype) -> list[str]:
    """The well-known element formats that the dtype holds, not counting those as wide as the carrier."""
    names = [f.name for f in map(get_format, WELL_KNOWN) if isinstance(f, ElementFormat)]
    return [
        name
        for name in names
        if name not in NOT_TABLES and (DEVICE == "cuda" or name in ON_A_CPU) and holds(name, dtype)
    ]


def holds(name: str, dtype: torch.dtype) -> bool:
    """Whether the dtype holds every value of the format."""
    f = get_format(name)
    assert isinstance(f, ElementFormat)
    try:
        check_carrier(f, dtype)
    except ValueError:
        return False
    return True


WELL_KNOWN = list_formats()[: list_formats().index("e1m0f")]
CASES = [(name, mode, dtype) for dtype in ELEMENTS for name in fitting(dtype) for mode in MODES]


@pytest.fixture(scope="module", params=ELEMENTS, ids=lambda dtype: str(dtype).removeprefix("torch."))
def x(request: pytest.FixtureRequest) -> Tensor:
    """Normal numbers in rows of 8,192."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    return torch.randn(ELEMENTS[request.param] // 8192, 8192, generator=generator, device=DEVICE).to(request.param)


def compiled(once: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    torch._dynamo.reset()
    return torch.compile(once, fullgraph=True, dynamic=False)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", sorted({name for name, _, _ in CASES}))
def test_format(benchmark: BenchmarkFixture, x: Tensor, name: str, mode: str) -> None:
    if (name, mode, x.dtype) not in CASES:
        pytest.skip(f"{x.dtype} does not hold {name}")
    seed = 1 if mode == Rounding.STOCHASTIC else None
    program = compiled(lambda x: quantize(x, name, mode, seed=seed))
    piece = x[:16]
    assert torch.equal(program(x)[:16], quantize(piece, name, mode, seed=seed))
    measure(benchmark, x, lambda: program(x), rounds=ROUNDS)


@pytest.mark.parametrize(
    "name", [*SCALED, "nvfp4", "e4m3fn@row", "e4m3fn@block128", "e4m3fn@tile128x128", "e4m3fn@tensor"]
)
def test_scaled(benchmark: BenchmarkFixture, x: Tensor, name: str) -> None:
    """Quantise and dequantise along the last axis; nvfp4 with a given tensor scale."""
    from formats import quantize_scaled

    options: dict[str, Any] = {"tensor_scale": torch.tensor(2.0**-9, device=DEVICE)} if name == "nvfp4" else {}
    program = compiled(lambda x: quantize_scaled(x, name, **options))
    if name != "e4m3fn@tensor":  # its scale is the whole tensor's
        assert torch.equal(program(x)[:128], quantize_scaled(x[:128], name, **options))
    measure(benchmark, x, lambda: program(x), rounds=ROUNDS)


def against_ours(
    benchmark: BenchmarkFixture, x: Tensor, name: str, theirs: Callable[[Tensor], Tensor], same_on: Tensor
) -> None:
    from formats import quantize_scaled

    program = compiled(lambda x: quantize_scaled(x, name))
    assert torch.equal(theirs(same_on), quantize_scaled(same_on, name)), "not the same work"
    measure(benchmark, x, lambda: theirs(x), rounds=5, against={"ours_faster": lambda: program(x)})


@pytest.mark.parametrize("name", ["mxfp8_e4m3fn", "mxfp4"])
def test_torchao(benchmark: BenchmarkFixture, x: Tensor, name: str) -> None:
    """Its to_mx and to_dtype with the floor rule, compiled on a GPU (a CPU's compiler lacks E8M0)."""
    mx_tensor = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    element = torch.float8_e4m3fn if name == "mxfp8_e4m3fn" else torch.float4_e2m1fn_x2

    def round_trip(x: Tensor) -> Tensor:
        scale, data = mx_tensor.to_mx(x, element, 32)
        result: Tensor = mx_tensor.to_dtype(data, scale, element, 32, x.dtype)
        return result

    against_ours(benchmark, x, name, compiled(round_trip) if DEVICE == "cuda" else round_trip, x[:64])


@pytest.mark.skipif("MICROXCALING" not in os.environ, reason="set MICROXCALING to a checkout of microsoft/microxcaling")
@pytest.mark.parametrize(("name", "element"), [("mxfp8_e4m3fn", "fp8_e4m3"), ("mxfp4", "fp4")])
def test_microxcaling(benchmark: BenchmarkFixture, x: Tensor, name: str, element: str) -> None:
    """Its PyTorch path, which takes a logarithm for the scale and rounds BF16 twice: held to ours on FP32."""
    sys.path.insert(0, os.environ["MICROXCALING"])
    from mx.mx_ops import _quantize_mx

    def round_trip(x: Tensor) -> Tensor:
        result: Tensor = _quantize_mx(x, 8, element, axes=[-1], block_size=32, round="even", custom_cuda=False)
        return result

    piece = x[: len(x) // 16]
    against_ours(benchmark, piece, name, round_trip, piece[:64].float())
