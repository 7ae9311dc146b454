"""What a report says, and which questions are refused."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from formats import float_format, format_parameters, quantize
from verification import Report, verify

Quantizer = Callable[[Tensor], Tensor]
E4M3FN = float_format("e4m3fn")


def right(x: Tensor) -> Tensor:
    return quantize(x, E4M3FN)


def ties_away(x: Tensor) -> Tensor:
    """Adds half an ulp without looking at the lowest kept bit."""
    bits = x.view(torch.int32)
    rounded = ((bits & 0x7FFFFFFF) + (1 << 19)) & -(1 << 20)
    normal = (rounded | (bits & -(1 << 31))).view(torch.float32).clamp(-448, 448)
    return torch.where(x.abs() < 2**-6, right(x), torch.where(x.isnan(), x, normal))


def test_truncation_is_not_nearest_and_nearest_is_not_truncation() -> None:
    assert not verify(right, E4M3FN, "toward_zero").passed
    assert not verify(lambda x: quantize(x, E4M3FN, "toward_zero"), E4M3FN).passed


def test_flushed_fp32_subnormals_are_caught() -> None:
    def flushes(x: Tensor) -> Tensor:
        return quantize(torch.where(x.abs() < 2.0**-126, torch.copysign(torch.zeros_like(x), x), x), "bf16")

    assert not verify(flushes, "bf16").passed


def test_parameters_of_the_neighbour_are_caught() -> None:
    parameters = format_parameters(["e4m3", "e4m3fn"], ndim=2)
    assert verify(lambda x: quantize(x.expand(2, -1), parameters)[1], "e4m3fn").passed
    assert not verify(lambda x: quantize(x.expand(2, -1), parameters)[0], "e4m3fn").passed


def test_the_report_says_what_it_proves_and_lists_the_smallest_first() -> None:
    report = verify(right, "e4m3fn")
    assert isinstance(report, Report)
    assert report.passed
    assert report.failures == ()
    assert report.level == "conditional"
    assert "only if the quantiser is monotone" in report.proves
    assert "inputs right (conditional" in str(report)
    report.raise_for_failures()

    report = verify(ties_away, "e4m3fn")
    assert [abs(failure.input) for failure in report.failures] == sorted(abs(f.input) for f in report.failures)
    first = report.failures[0]
    assert abs(first.input) == 2**-6 * (1 + 1 / 16)
    assert (abs(first.got), abs(first.expected)) == (2**-6 * 1.125, 2**-6)
    assert (
        "0.0166015625 (0x1.1000000000000p-6, bits 0x3c880000; 17/1024, the decision point): got 0.017578125, expected 0.015625"
        in str(report)
    )


def test_what_there_is_no_proof_for_is_refused() -> None:
    for question, says in [
        ({"level": "complete"}, "level must be one of quick, conditional, exhaustive, got 'complete'"),
        ({"level": "exhaustive", "input_dtype": torch.float64}, "2.64 inputs can't all be asked"),
        ({"rounding": "up"}, r"rounding must be one of nearest_even, .*, got 'up'"),
        ({"overflow": "wrap"}, r"overflow must be one of saturate, .*, got 'wrap'"),
        ({"input_dtype": torch.int8}, "input_dtype must be one of float64, float32, bfloat16, float16, got int8"),
    ]:
        with pytest.raises(ValueError, match=says):
            verify(right, "e4m3fn", **question)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fp32: every level lists every value, so at most 20 bits, got 32"):
        verify(right, "fp32")
    with pytest.raises(ValueError, match="e8m3 does not fit float16"):
        verify(right, "e8m3", input_dtype=torch.float16)
