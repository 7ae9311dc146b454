"""The judge and our quantiser on a GPU."""

from __future__ import annotations

import pytest
import torch

from formats import quantize, quantize_scaled
from verification import verify
from verification.parity import differences, flushed, ways

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e2m1fn", "bf16", "e8m0fnu", "int8", "nf4", "posit8"])
def test_ours_is_right_for_all_fp32_inputs_on_a_gpu(name: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: quantize(x, name), dynamic=True)
    for quantizer in (lambda x: quantize(x, name), compiled):
        report = verify(quantizer, name, level="exhaustive", device="cuda")
        assert report.passed, str(report)
        assert report.checked >= 2**32 - 2**24
        assert report.environment["device"] != "cpu"


ALL_BELOW_ONE = ["int8q8@block32:e8m0fnu", "e4m3fb30@block32:e8m0fnu"]  # scales of subnormal amaxes end within FP32
LONG_ELEMENTS = ["nf4@block64", "int8q7@row"]  # rounded once to narrow inputs, from more than FP32 holds


@pytest.mark.parametrize(
    "name", ["mxfp4", "mxfp8_e4m3fn:rceil", "nvfp4", "e4m3fn@row", "e4m3fn@tile4x8", *ALL_BELOW_ONE, *LONG_ELEMENTS]
)
def test_scaled_formats_keep_every_law_on_a_gpu(name: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: quantize_scaled(x, name), dynamic=True)
    for quantizer in (lambda x: quantize_scaled(x, name), compiled):
        report = verify(quantizer, name, device="cuda")
        assert report.passed, str(report)


@pytest.mark.parametrize("shape", [(32,), (1, 32), (1, 64), (3, 64)])
def test_one_block_alone_is_compiled_for_many_sizes(shape: tuple[int, ...]) -> None:
    """Inductor of torch 2.11 found no loop for one of (32,) and (1, 32), and raised."""
    torch._dynamo.reset()
    x = torch.randn(shape, device="cuda")
    compiled = torch.compile(lambda x: quantize_scaled(x, "mxfp4"), dynamic=True)
    assert torch.equal(compiled(x), quantize_scaled(x, "mxfp4"))


def test_a_wrong_kernel_is_caught_on_a_gpu() -> None:
    """At one input in 2^32, by the sweep that runs on the device."""

    def wrong(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x.view(torch.int32) == 0x3F8A3D71, 0.0, quantize(x, "e4m3fn"))

    report = verify(wrong, "e4m3fn", level="exhaustive", device="cuda")
    assert (report.failure_count, report.failures[0].input_bits) == (1, 0x3F8A3D71)

    def raises(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of registers")

    assert "out of registers" in verify(raises, "e4m3fn", device="cuda").law("interface").note


def test_cpu_and_gpu_eager_and_compiled_agree_to_the_bit() -> None:
    """A sixty-fourth of the inputs; `python -m verification.parity` is all of them."""
    torch._dynamo.reset()
    found = differences(ways("e4m3fn", "nearest_even"), 1 << 26, lambda: None)
    assert found == dict.fromkeys(("cpu compiled", "cuda eager", "cuda compiled"), 0)


def test_compiled_code_on_a_gpu_keeps_subnormals() -> None:
    assert not any(flushed("cuda").values())
