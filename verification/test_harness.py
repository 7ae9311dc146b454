"""The harness catches broken quantisers: each mutant is a bug that somebody has shipped, or could."""

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


def flushes_subnormals(x: Tensor) -> Tensor:
    q = right(x)
    return torch.where(q.abs() < 2**-6, torch.copysign(torch.zeros_like(q), q), q)


def loses_the_sign_of_zero(x: Tensor) -> Tensor:
    return right(x) + 0.0


def overflows_to_infinity(x: Tensor) -> Tensor:
    return torch.where(x.abs() >= 464, torch.copysign(torch.full_like(x, torch.inf), x), right(x))


def infinity_stays(x: Tensor) -> Tensor:
    return torch.where(x.isinf(), x, right(x))


def truncates_in_one_binade(x: Tensor) -> Tensor:
    return torch.where((x.abs() >= 4) & (x.abs() < 8), quantize(x, E4M3FN, "toward_zero"), right(x))


def rounds_twice(x: Tensor) -> Tensor:
    return right(x.bfloat16().float())


def loses_nan(x: Tensor) -> Tensor:
    return torch.nan_to_num(right(x), nan=0.0)


def maximum_one_step_short(x: Tensor) -> Tensor:
    return right(x).clamp(-416, 416)


def maximum_of_the_other_e4m3(x: Tensor) -> Tensor:
    return quantize(x, "e4m3")


def smallest_subnormal_rounds_up(x: Tensor) -> Tensor:
    tie = x.abs() == 2**-10
    return torch.where(tie, torch.copysign(torch.full_like(x, 2**-9), x), right(x))


def negative_numbers_round_down(x: Tensor) -> Tensor:
    """As adding to a two's complement pattern would."""
    return torch.where(x < 0, right(torch.nextafter(x, torch.full_like(x, -torch.inf))), right(x))


def one_ulp_late(x: Tensor) -> Tensor:
    return right(torch.nextafter(x, torch.zeros_like(x)))


MUTANTS = [
    ties_away,
    flushes_subnormals,
    loses_the_sign_of_zero,
    overflows_to_infinity,
    infinity_stays,
    truncates_in_one_binade,
    rounds_twice,
    loses_nan,
    maximum_one_step_short,
    maximum_of_the_other_e4m3,
    smallest_subnormal_rounds_up,
    negative_numbers_round_down,
    one_ulp_late,
]


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_broken_quantiser_is_caught(mutant: Quantizer) -> None:
    report = verify(mutant, E4M3FN)
    assert not report.passed
    with pytest.raises(AssertionError, match="inputs wrong"):
        report.raise_for_failures()


def test_wrong_parity_without_mantissa_bits_is_caught() -> None:
    def ties_down(x: Tensor) -> Tensor:
        return torch.where(x.abs() == 0.375, torch.copysign(torch.full_like(x, 0.25), x), quantize(x, "e3m0f"))

    assert {abs(failure.input) for failure in verify(ties_down, "e3m0f").failures} == {0.375}


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
    assert "0.0166015625 (0x1.1000000000000p-6, bits 0x3c880000): got 0.017578125, expected 0.015625" in str(report)


def test_what_there_is_no_proof_for_is_refused() -> None:
    for question, says in [
        ({"level": "complete"}, "level must be one of quick, conditional, exhaustive, got 'complete'"),
        ({"level": "exhaustive", "input_dtype": torch.float64}, "2.64 inputs can't all be asked"),
        ({"rounding": "stochastic"}, r"rounding must be one of nearest_even, .*, got 'stochastic'"),
        ({"overflow": "wrap"}, r"overflow must be one of saturate, .*, got 'wrap'"),
        ({"input_dtype": torch.int8}, "input_dtype must be one of float64, float32, bfloat16, float16, got int8"),
    ]:
        with pytest.raises(ValueError, match=says):
            verify(right, "e4m3fn", **question)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fp32: this level lists every value, so at most 20 bits, got 32"):
        verify(right, "fp32")
    with pytest.raises(ValueError, match="e8m3 does not fit float16"):
        verify(right, "e8m3", input_dtype=torch.float16)
