"""The harness is judged by what it catches: quantisers broken in one way each, as somebody has shipped them or could.

Every one is caught, at the level that claims to, under the law that was made for it, and its counterexample really fails when it
is asked for alone. What nothing but all inputs can find is in the proofs, as it takes all inputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from formats import decode, encode, encode_scaled, quantize
from formats.scaled import is_scaled_name
from verification import Failure, Report, verify
from verification.points import INTEGERS

Quantizer = Callable[[Any], Any]
NAME = "e4m3fn"  # 2^-9 to 448, smallest normal number 2^-6
LEAST = 60


class Mutant(NamedTuple):
    """What is wrong with it, how it is made, the law that it breaks, and how it is asked."""

    name: str
    quantizer: Quantizer
    law: str
    asked: dict[str, Any] = {}  # noqa: RUF012

    @property
    def format(self) -> str:
        """Which it claims to round to."""
        return str(self.asked.get("format", NAME))


def right(x: Tensor) -> Tensor:
    return quantize(x, NAME)


def but(where: Callable[[Tensor], Tensor], otherwise: Callable[[Tensor], Tensor]) -> Quantizer:
    """Right, save where it is something else."""
    return lambda x: torch.where(where(x), otherwise(x), right(x))


def signed(value: float) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.copysign(torch.full_like(x, value), x)


def by(rounding: str) -> Quantizer:
    return lambda x: quantize(x, NAME, rounding)


class Stateful:
    """Right every other time."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return right(x) if self.calls % 2 else torch.where(x.abs() == 1.0625, 1.125, right(x))


def first_of_a_batch(x: Tensor) -> Tensor:
    q = right(x)
    q[0] = q[0] * 2
    return q


def beside_nan(x: Tensor) -> Tensor:
    return torch.where(x.roll(-1).isnan(), by("toward_zero")(x), right(x))


def truncates_a_binade(x: Tensor) -> Tensor:
    return torch.where((x.abs() > 4) & (x.abs() < 8), quantize(x, NAME, "toward_zero"), right(x))


def away_from_zero(x: Tensor) -> Tensor:
    return torch.where(x < 0, quantize(x, NAME, "toward_negative"), quantize(x, NAME, "toward_positive"))


def by_adding_half(x: Tensor) -> Tensor:
    """Half an ulp without a look at the lowest kept bit."""
    bits = x.view(torch.int32)
    rounded = ((bits & 0x7FFFFFFF) + (1 << 19)) & -(1 << 20)
    normal = (rounded | (bits & -(1 << 31))).view(torch.float32).clamp(-448, 448)
    return torch.where(x.abs() < 2**-6, right(x), torch.where(x.isnan(), x, normal))


def through(dtype: torch.dtype) -> Quantizer:
    return lambda x: right(x.to(dtype).to(x.dtype))


def next_to(value: float, toward: float) -> float:
    return float(np.nextafter(np.float32(value), np.float32(toward)))


def writes(x: Tensor) -> Tensor:
    q = right(x)
    x.zero_()
    return q


def raises_at_nan(x: Tensor) -> Tensor:
    if x.isnan().any():
        raise ValueError("no NaN, please")
    return right(x)


FP64 = {"input_dtype": torch.float64}
BF16 = {"input_dtype": torch.bfloat16}
ELEMENTS = [
    Mutant("ties away", by("nearest_away"), "ties"),
    Mutant("ties away by adding half", by_adding_half, "ties"),
    Mutant("one tie up", but(lambda x: x == 1.0625, lambda _: torch.tensor(1.125)), "ties"),
    Mutant("one tie to odd", but(lambda x: x.abs() == 1.1875, signed(1.125)), "ties"),
    Mutant("ties to odd without mantissa bits",
           lambda x: torch.where(x.abs() == 0.375, torch.copysign(torch.full_like(x, 0.25), x), quantize(x, "e3m0f")),
           "ties", {"format": "e3m0f"}),
    Mutant("half the smallest up", but(lambda x: x.abs() == 2**-10, signed(2**-9)), "ties"),
    Mutant("truncation", by("toward_zero"), "rounding"),
    Mutant("truncation in one binade", truncates_a_binade, "rounding"),
    Mutant("away from zero", away_from_zero, "rounding"),
    Mutant("up", by("toward_positive"), "rounding"),
    Mutant("down below zero", lambda x: torch.where(x < 0, right(torch.nextafter(x, signed(torch.inf)(x))), right(x)),
           "ties"),
    Mutant("an ulp early", but(lambda x: x == next_to(1.0625, 2), lambda _: torch.tensor(1.0)), "rounding"),
    Mutant("every input an ulp late", lambda x: right(torch.nextafter(x, torch.zeros_like(x))), "ties"),
    Mutant("by way of BF16", through(torch.bfloat16), "rounding"),
    Mutant("nearest to truncation", right, "rounding", {"rounding": "toward_zero"}),
    Mutant("to_odd moves what is exact", lambda x: quantize(x + 2.0**-40, NAME, "to_odd"), "rounding",
           {"rounding": "to_odd", **FP64}),
    Mutant("subnormals flushed", but(lambda x: x.abs() < 2**-6, signed(0.0)), "subnormals"),
    Mutant("subnormal results flushed", lambda x: torch.where(right(x).abs() < 2**-6, signed(0.0)(x), right(x)), "subnormals"),
    Mutant("the smallest subnormal flushed", but(lambda x: x.abs() < 1.5 * 2**-9, signed(0.0)), "subnormals"),
    Mutant("subnormals truncated", but(lambda x: x.abs() < 2**-6, by("toward_zero")), "subnormals"),
    Mutant("FP32's own subnormals flushed", lambda x: quantize(torch.where(x.abs() < 2.0**-126, signed(0.0)(x), x), "bf16"),
           "subnormals", {"format": "bf16"}),
    Mutant("+0 for -0", lambda x: right(x) + 0.0, "signed_zero"),
    Mutant("-0 for +0", but(lambda x: x == 0, lambda x: torch.full_like(x, -0.0)), "signed_zero"),
    Mutant("NaN to zero", but(torch.isnan, torch.zeros_like), "nan"),
    Mutant("NaN to the largest", but(torch.isnan, signed(448.0)), "nan"),
    Mutant("one NaN lost", but(lambda x: x.view(torch.int32) == 0x7FC00000, torch.zeros_like), "nan"),
    Mutant("signalling NaN to infinity", lambda x: torch.where(x.view(torch.int32) == 0x7F800001, torch.inf, quantize(x, "e5m2")),
           "nan", {"format": "e5m2"}),
    Mutant("overflow an ulp late", but(lambda x: x.abs() > 464, signed(torch.inf)), "overflow_point"),
    Mutant("non-saturating overflow an ulp late",
           lambda x: quantize(torch.where(x.abs() == next_to(464, 500), signed(464.0)(x), x), NAME, overflow="nonsaturating"),
           "overflow_point", {"overflow": "nonsaturating"}),
    Mutant("the largest is a step short", lambda x: right(x).clamp(-416, 416), "overflow_point"),
    Mutant("the other e4m3's largest", lambda x: quantize(x, "e4m3"), "overflow_point"),
    Mutant("infinity for the largest", but(lambda x: (x.abs() > 448) & x.isfinite(), signed(torch.inf)), "overflow_point"),
    Mutant("overflow wraps to zero", but(lambda x: x.abs() >= 512, signed(0.0)), "overflow_point"),
    Mutant("infinity stays", but(torch.isinf, lambda x: x), "infinity"),
    Mutant("infinity to NaN", but(torch.isinf, lambda x: x * 0), "infinity"),
    Mutant("infinity to zero", but(torch.isinf, signed(0.0)), "infinity"),
    Mutant("the sign of infinity lost", but(torch.isinf, lambda x: torch.full_like(x, 448.0)), "infinity"),
    Mutant("the sign lost at one value", but(lambda x: x == -1.5, torch.abs), "rounding"),
    Mutant("off the grid at one value", but(lambda x: x.abs() == 1.5, signed(1.53125)), "on_grid"),
    Mutant("more mantissa bits", lambda x: quantize(x, "e4m4fn").clamp(-448, 448), "on_grid"),
    Mutant("falls in one place", but(lambda x: x == 2.0, torch.ones_like), "monotone"),
    Mutant("moves one of its results", but(lambda x: x == 1.25, lambda _: torch.tensor(1.375)), "idempotent"),
    Mutant("all results move", lambda x: right(right(x) * 1.0625), "idempotent"),
    Mutant("negative numbers otherwise", lambda x: torch.where(x < 0, by("toward_zero")(x), right(x)), "odd_symmetry"),
    Mutant("the parameters of the neighbour", lambda x: quantize(x, "e4m3"), "overflow_point"),
    Mutant("FP64 by way of FP32", through(torch.float32), "single_rounding", FP64),
    Mutant("FP64 by way of FP16", through(torch.float16), "single_rounding", FP64),
    Mutant("FP64 by way of BF16", through(torch.bfloat16), "single_rounding", FP64),
    Mutant("one BF16 input of 65,536", but(lambda x: x.view(torch.int16) == 0x3F87, torch.zeros_like), "rounding",
           {**BF16, "level": "exhaustive"}),
    Mutant("another answer the second time", Stateful(), "deterministic"),
    Mutant("the first of a batch", first_of_a_batch, "deterministic"),
    Mutant("small batches", lambda x: right(x) if len(x) > 64 else by("toward_zero")(x), "deterministic"),
    Mutant("one input alone", lambda x: right(x) if len(x) > 1 else by("nearest_away")(x), "deterministic"),
    Mutant("alignment", lambda x: right(x) if x.data_ptr() % 64 == 0 else by("nearest_away")(x), "deterministic"),
    Mutant("stride", lambda x: right(x) if x.is_contiguous() else by("nearest_away")(x), "deterministic"),
    Mutant("a NaN beside it", beside_nan, "deterministic"),
    Mutant("another dtype", lambda x: right(x).double(), "interface"),
    Mutant("a row too many", lambda x: torch.cat([right(x), x[:1]]), "interface"),
    Mutant("two dimensions", lambda x: right(x)[None], "interface"),
    Mutant("no tensor", lambda _: 1.0, "interface"),
    Mutant("codes for values", lambda x: encode(x, NAME), "interface"),
    Mutant("writes into its input", writes, "interface"),
    Mutant("raises at NaN", raises_at_nan, "interface"),
]  # fmt: skip


def code_off(at: Callable[[Tensor], Tensor], by: int) -> Quantizer:
    return lambda x: encode(x, NAME) + at(x).to(torch.uint8) * by


TO_CODES = {"gives": "codes"}
FROM_CODES = {"takes": "codes"}
CODES = [
    Mutant("off by one at the top code", code_off(lambda x: x == 448, 255), "round_trip", TO_CODES),
    Mutant("the code of 1 is the next", code_off(lambda x: x == 1, 1), "round_trip", TO_CODES),
    Mutant("the sign bit lost at one code", lambda x: torch.where(x == -1.5, 0x3C, encode(x, NAME)), "round_trip", TO_CODES),
    Mutant("codes of another format", lambda x: encode(x, "e5m2"), "rounding", TO_CODES),
    Mutant("a decoder without subnormals",
           lambda c: torch.where((c & 0x78) == 0, 0.0, decode(c, NAME, torch.float32)), "subnormals", FROM_CODES),
    Mutant("a decoder that takes NaN for 480", lambda c: torch.where(c == 0x7F, 480.0, decode(c, NAME, torch.float32)), "nan",
           FROM_CODES),
    Mutant("a decoder with a bias too many", lambda c: decode(c, NAME, torch.float32) / 2, "round_trip", FROM_CODES),
    Mutant("a decoder that loses -0", lambda c: decode(c, NAME, torch.float32) + 0.0, "signed_zero", FROM_CODES),
]  # fmt: skip


def blockwise(scale_of: Callable[[Tensor], Tensor], element: str = "e2m1fn") -> Quantizer:
    """MX with some scale of amax [B, 1], > 0 where amax is 0 too."""

    def mutant(x: Tensor) -> Tensor:
        s = scale_of(x.abs().amax(-1, keepdim=True).double())
        return (quantize((x.double() / s).float(), element).double() * s).float()

    return mutant


def power(exponent: Tensor) -> Tensor:
    return torch.exp2(exponent.clamp(-127, 127))


def floored(amax: Tensor) -> Tensor:
    """OCP's: exact in FP64."""
    mantissa, exponent = torch.frexp(amax)
    return power(torch.where(mantissa > 0, exponent - 3, -127).double())


def by_fp32_logarithm(amax: Tensor) -> Tensor:
    return power(torch.floor(torch.log2(amax.float())).double().clamp(min=-149) - 2)


def by_ceiling(amax: Tensor) -> Tensor:
    mantissa, _ = torch.frexp(amax)
    return torch.where((mantissa == 0.5) | (amax == 0), floored(amax), floored(amax) * 2)


def by_unrounded(x: Tensor) -> Tensor:
    """Elements divided by amax / 6, multiplied by the power of two."""
    amax = x.abs().amax(-1, keepdim=True).double()
    raw = torch.where(amax > 0, amax / 6, 1.0)
    return (quantize((x.double() / raw).float(), "e2m1fn").double() * floored(amax)).float()


def nvfp4_unrounded(x: Tensor) -> Tensor:
    t = x.abs().amax().double() / (6 * 448)
    s = quantize((x.abs().amax(-1, keepdim=True).double() / 6 / t).float(), "e4m3fn").double().clamp(min=2.0**-9) * t
    raw = x.abs().amax(-1, keepdim=True).double() / 6
    return (quantize((x.double() / torch.where(raw > 0, raw, 1.0)).float(), "e2m1fn").double() * s).float()


def neighbours_scale(x: Tensor) -> Tensor:
    s = floored(x.abs().amax(-1, keepdim=True).double()).roll(1, 0)
    return (quantize((x.double() / s).float(), "e2m1fn").double() * s).float()


def of_the_tensor(x: Tensor) -> Tensor:
    s = floored(x.abs().amax().double())
    return (quantize((x.double() / s).float(), "e2m1fn").double() * s).float()


def without_magnitude(x: Tensor) -> Tensor:
    s = floored(x.amax(-1, keepdim=True).double().clamp(min=0))
    return (quantize((x.double() / s).float(), "e2m1fn").double() * s).float()


def without_the_last(x: Tensor) -> Tensor:
    s = floored(x[:, :-1].abs().amax(-1, keepdim=True).double())
    return (quantize((x.double() / s).float(), "e2m1fn").double() * s).float()


def in_halves(x: Tensor) -> Tensor:
    return quantize(x, "e2m1fn@block16:e8m0fnu")


def scale_codes(x: Tensor, change: Callable[[Tensor], Tensor]) -> Any:
    found = encode_scaled(x, "mxfp4")
    return found.elements, change(found.scales)


def elements_of_a_larger_scale(x: Tensor) -> Any:
    return encode_scaled(x, "mxfp4:ceil").elements, encode_scaled(x, "mxfp4").scales


def loses_nan_in_blocks(x: Tensor) -> Tensor:
    return quantize(torch.nan_to_num(x, nan=0.0), "mxfp8_e4m3fn")


MXFP4 = {"format": "mxfp4"}
BLOCKS = [
    Mutant("FP32 logarithm for the scale", blockwise(by_fp32_logarithm), "scale_rule", MXFP4),
    Mutant("ceil for floor", blockwise(by_ceiling), "scale_rule", MXFP4),
    Mutant("a scale twice as large", blockwise(lambda a: floored(a) * 2), "scale_rule", MXFP4),
    Mutant("epsilon added to amax", blockwise(lambda a: floored(a + 1e-12)), "scale_rule", MXFP4),
    Mutant("exponents clamped at -126", blockwise(lambda a: floored(a).clamp(min=2.0**-126)), "scale_rule", MXFP4),
    Mutant("FP32 scales rounded to BF16", lambda x: fp32_scaled(x, lambda s: s.bfloat16().float()), "rounding",
           {"format": "e4m3fn@row"}),
    Mutant("FP32 scale an ulp too large", lambda x: fp32_scaled(x, lambda s: torch.nextafter(s, torch.tensor(torch.inf))),
           "scale_rule", {"format": "e4m3fn@row"}),
    Mutant("elements by the unrounded scale", by_unrounded, "scale_then_quantise", MXFP4),
    Mutant("NVFP4's elements by the unrounded scale", nvfp4_unrounded, "scale_then_quantise", {"format": "nvfp4"}),
    Mutant("the neighbour's scale", neighbours_scale, "scale_rule", MXFP4),
    Mutant("the tensor's scale", of_the_tensor, "rounding", MXFP4),
    Mutant("amax without the sign", without_magnitude, "scale_rule", MXFP4),
    Mutant("amax without the last element", without_the_last, "scale_rule", MXFP4),
    Mutant("blocks of half the size", in_halves, "rounding", MXFP4),
    Mutant("a block of zeros gives NaN", lambda x: quantize(x, "mxfp4") + x.abs().amax(-1, keepdim=True).eq(0) * torch.nan,
           "zero_block", MXFP4),
    Mutant("ties away in elements", lambda x: quantize(x, "mxfp4", "nearest_away"), "ties", MXFP4),
    Mutant("elements truncated", lambda x: quantize(x, "mxfp4", "toward_zero"), "rounding", MXFP4),
    Mutant("element subnormals flushed", lambda x: flushed_elements(x), "subnormals", MXFP4),
    Mutant("elements overflow to infinity", lambda x: overflowing(x), "overflow_point", MXFP4),
    Mutant("-0 lost in blocks", lambda x: quantize(x, "mxfp4") + 0.0, "signed_zero", MXFP4),
    Mutant("NaN lost in a block", loses_nan_in_blocks, "nan", {"format": "mxfp8_e4m3fn"}),
    Mutant("negative elements otherwise", lambda x: torch.where(x < 0, quantize(x, "mxfp4", "toward_zero"), quantize(x, "mxfp4")),
           "odd_symmetry", MXFP4),
    Mutant("small batches of blocks", lambda x: quantize(x, "mxfp4" if len(x) > 20 else "mxfp4:ceil"), "deterministic", MXFP4),
    Mutant("a scale code too large", lambda x: scale_codes(x, lambda s: (s.int() + 1).clamp(max=254).to(torch.uint8)),
           "scale_rule", {**MXFP4, **TO_CODES}),
    Mutant("elements of another scale", elements_of_a_larger_scale, "rounding", {**MXFP4, **TO_CODES}),
    Mutant("codes without scales", lambda x: encode_scaled(x, "mxfp4").elements, "interface", {**MXFP4, **TO_CODES}),
    Mutant("half of the blocks", lambda x: quantize(x, "mxfp4")[::2], "interface", MXFP4),
]  # fmt: skip


def fp32_scaled(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    s = change((x.abs().amax(-1, keepdim=True).double() / 448).float().clamp(min=2.0**-149)).double()
    return (quantize((x.double() / s).float(), "e4m3fn").double() * s).float()


def flushed_elements(x: Tensor) -> Tensor:
    s = floored(x.abs().amax(-1, keepdim=True).double())
    q = quantize((x.double() / s).float(), "e2m1fn")
    return (torch.where(q.abs() < 1, q * 0, q).double() * s).float()


def overflowing(x: Tensor) -> Tensor:
    s = floored(x.abs().amax(-1, keepdim=True).double())
    y = x.double() / s
    return torch.where(y.abs() > 7, torch.copysign(torch.full_like(x, torch.inf), x), quantize(x, "mxfp4"))


class Chance:
    """Stochastic rounding to e4m3fn by whole random numbers u in 0..1, which `change` may spoil; bumps what is exact if told."""

    def __init__(
        self, change: Callable[[Tensor], Tensor] = lambda u: u, exact: bool = False, below: str = "toward_negative"
    ) -> None:
        self.change, self.exact, self.below, self.calls = change, exact, below, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        generator = torch.Generator().manual_seed(self.calls)
        u = self.change(torch.rand(x.shape, generator=generator, dtype=torch.float64))
        low, high = quantize(x, NAME, self.below), quantize(x, NAME, "toward_positive")
        share = (x.double() - low.double()) / (high.double() - low.double())
        up = torch.where(u < share, high, low)
        if self.exact:
            bumped = quantize(torch.nextafter(x, torch.full_like(x, torch.inf)), NAME, "toward_positive")
            return torch.where(low == high, torch.where(u < 2**-4, bumped, x.clamp(-448, 448)), up)
        return torch.where(low == high, low, up)


CHANCE = {"rounding": "stochastic", "level": "quick"}
STOCHASTIC = [
    Mutant("a bias of 2^-8", Chance(lambda u: u - 2**-8), "unbiased", CHANCE),
    Mutant("a bias of -2^-8", Chance(lambda u: u + 2**-8), "unbiased", CHANCE),
    Mutant("values of the format bumped", Chance(exact=True), "idempotent", CHANCE),
    Mutant("three random bits", Chance(lambda u: torch.floor(u * 8) / 8), "unbiased", CHANCE),
    Mutant("one random number for all", Chance(lambda u: torch.full_like(u, float(u.flatten()[0]))), "unbiased", CHANCE),
    Mutant("nearest for stochastic", right, "unbiased", CHANCE),
    Mutant("random numbers that are not uniform", Chance(lambda u: u * u), "unbiased", CHANCE),
    Mutant("two steps up at times", lambda x: Chance()(x + torch.rand_like(x) * x.abs() * 0.25), "rounding", CHANCE),
]  # fmt: skip
MUTANTS = [*ELEMENTS, *CODES, *BLOCKS, *STOCHASTIC]


@pytest.mark.parametrize("mutant", MUTANTS, ids=[m.name for m in MUTANTS])
def test_a_mutant_is_caught_by_its_law_and_its_counterexample_fails(mutant: Mutant) -> None:
    asked = {name: value for name, value in mutant.asked.items() if name != "format"}
    report = verify(mutant.quantizer, mutant.format, **asked)
    assert not report.passed
    verdict = report.law(mutant.law)
    assert verdict.verdict == "fail", [str(v) for v in report.laws]
    assert verdict.failed > 0
    if verdict.smallest is not None and mutant.law not in ("deterministic", "unbiased"):
        check_counterexample(mutant, verdict.smallest, report)


def check_counterexample(mutant: Mutant, example: Failure, report: Report) -> None:
    """Asked for alone, it gives what the report says, and that is not what is right."""
    dtype = mutant.asked.get("input_dtype", torch.float32)
    if mutant.asked.get("takes") == "codes":
        got = float(mutant.quantizer(torch.tensor([int(example.input)], dtype=torch.uint8))[0])
        assert same(got, example.got)
        return
    if example.law == "monotone":
        return
    if is_scaled_name(mutant.format):
        if (
            mutant.format == "nvfp4"
            or "codes" in mutant.asked.values()
            or example.law in ("odd_symmetry", "idempotent")
        ):
            return
        block = torch.tensor([example.block], dtype=dtype)
        place = example.block.index(example.input) if not np.isnan(example.input) else 1
        again = mutant.quantizer(block)[0]
        assert same(float(again[place]), example.got) or mutant.name in ("the neighbour's scale", "the tensor's scale")
        return
    pattern = torch.tensor([example.input_bits], dtype=torch.int64).to(INTEGERS[dtype]).view(dtype)
    assert same(float(pattern[0]), example.input)
    if report.rounding != "stochastic" and not isinstance(mutant.quantizer, Stateful):
        answer = mutant.quantizer(pattern)
        got = float(decode(answer, NAME, torch.float64)[0] if "codes" in mutant.asked.values() else answer[0])
        assert same(got, example.got)
    if example.law not in ("odd_symmetry", "monotone"):
        assert not same(example.got, example.expected) or example.law == "idempotent"


def same(a: float, b: float) -> bool:
    return bool((a == b and np.signbit(a) == np.signbit(b)) or (np.isnan(a) and np.isnan(b)))


@pytest.mark.proof
def test_a_tie_broken_by_float_error_at_one_input_in_four_billion() -> None:
    """Beside no decision point, so that no list of points has it: the level that claims to catch it is all inputs."""
    wrong = but(lambda x: x.view(torch.int32) == 0x3F8A3D71, torch.zeros_like)
    assert verify(wrong, NAME).passed
    report = verify(wrong, NAME, level="exhaustive")
    assert report.checked == 2**32
    assert (report.failure_count, report.law("rounding").failed) == (1, 1)
    assert report.failures[0].input_bits == 0x3F8A3D71


@pytest.mark.proof
def test_a_cast_that_doubles_at_one_input_in_a_million() -> None:
    """Of RESEARCH 5: it passes every list of decision points."""
    wrong = but(lambda x: (x.view(torch.int32) & 0xFFFFF) == 0x23456, lambda x: right(x) * 2)
    assert verify(wrong, NAME).passed
    report = verify(wrong, NAME, level="exhaustive")
    assert 2000 < report.failure_count <= 4096


def test_there_are_enough_of_them() -> None:
    """And every law that a quantiser can break has one that was made for it."""
    names = Counter(m.name for m in MUTANTS)
    assert max(names.values()) == 1
    assert len(MUTANTS) >= LEAST
    from verification import LAWS

    assert {m.law for m in MUTANTS} == set(LAWS)
