"""Each law is broken by quantisers made for it, and found broken under its own name; what libraries do is found unaided."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from formats import encode, quantize
from verification import LAWS, verify
from verification.adapters import adapters, load_function
from verification.laws import OF_INPUTS

Quantizer = Callable[[Any], Any]
NAME = "e4m3fn"  # 2^-9 to 448, smallest normal number 2^-6


def right(x: Tensor) -> Tensor:
    return quantize(x, NAME)


def but(where: Callable[[Tensor], Tensor], otherwise: Callable[[Tensor], Tensor]) -> Quantizer:
    """Right, save where it is something else."""
    return lambda x: torch.where(where(x), otherwise(x), right(x))


def signed(value: float) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.copysign(torch.full_like(x, value), x)


class Stateful:
    """Right the first time."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return right(x) if self.calls % 2 else torch.where(x.abs() == 1.0625, 1.125, right(x))


def first_of_a_batch(x: Tensor) -> Tensor:
    q = right(x)
    q[0] = q[0] * 2
    return q


def by_batch_size(x: Tensor) -> Tensor:
    return right(x) if len(x) > 64 else quantize(x, NAME, "toward_zero")


def by_alignment(x: Tensor) -> Tensor:
    return right(x) if x.data_ptr() % 64 == 0 else quantize(x, NAME, "nearest_away")


def by_stride(x: Tensor) -> Tensor:
    return right(x) if x.is_contiguous() else quantize(x, NAME, "nearest_away")


def truncates_a_binade(x: Tensor) -> Tensor:
    return torch.where((x.abs() > 4) & (x.abs() < 8), quantize(x, NAME, "toward_zero"), right(x))


def away_from_zero(x: Tensor) -> Tensor:
    return torch.where(x < 0, quantize(x, NAME, "toward_negative"), quantize(x, NAME, "toward_positive"))


def an_ulp_early(x: Tensor) -> Tensor:
    return torch.where(x == np.nextafter(np.float32(1.0625), np.float32(0)), 1.125, right(x))


def through(dtype: torch.dtype) -> Quantizer:
    return lambda x: right(x.to(dtype).to(x.dtype))


MUTANTS: list[tuple[str, Quantizer, str]] = [
    ("ties away", lambda x: quantize(x, NAME, "nearest_away"), "ties"),
    ("one tie up", but(lambda x: x == 1.0625, lambda _: torch.tensor(1.125)), "ties"),
    ("ties to odd", but(lambda x: x.abs() == 1.1875, signed(1.125)), "ties"),
    ("truncation", lambda x: quantize(x, NAME, "toward_zero"), "rounding"),
    ("truncation in one binade", truncates_a_binade, "rounding"),
    ("away from zero", away_from_zero, "rounding"),
    ("up", lambda x: quantize(x, NAME, "toward_positive"), "rounding"),
    ("an ulp early", an_ulp_early, "rounding"),
    ("subnormals flushed", but(lambda x: x.abs() < 2**-6, signed(0.0)), "subnormals"),
    ("the smallest subnormal flushed", but(lambda x: x.abs() < 1.5 * 2**-9, signed(0.0)), "subnormals"),
    ("subnormals truncated", but(lambda x: x.abs() < 2**-6, lambda x: quantize(x, NAME, "toward_zero")), "subnormals"),
    ("+0 for -0", lambda x: right(x) + 0.0, "signed_zero"),
    ("-0 for +0", but(lambda x: x == 0, lambda x: torch.full_like(x, -0.0)), "signed_zero"),
    ("NaN to zero", but(torch.isnan, torch.zeros_like), "nan"),
    ("NaN to the largest", but(torch.isnan, signed(448.0)), "nan"),
    ("one NaN lost", but(lambda x: x.view(torch.int32) == 0x7FC00000, torch.zeros_like), "nan"),
    ("overflow an ulp late", but(lambda x: x.abs() > 464, signed(torch.inf)), "overflow_point"),
    ("the largest is a step short", lambda x: right(x).clamp(-416, 416), "overflow_point"),
    ("inf for the largest", but(lambda x: (x.abs() > 448) & x.isfinite(), signed(torch.inf)), "overflow_point"),
    ("infinity stays", but(torch.isinf, lambda x: x), "infinity"),
    ("infinity to NaN", but(torch.isinf, lambda x: x * 0), "infinity"),
    ("infinity to zero", but(torch.isinf, signed(0.0)), "infinity"),
    ("the sign lost at one value", but(lambda x: x == -1.5, torch.abs), "rounding"),
    ("the sign of infinity lost", but(torch.isinf, lambda x: torch.full_like(x, 448.0)), "infinity"),
    ("off the grid", but(lambda x: x.abs() == 1.5, signed(1.53125)), "on_grid"),
    ("more mantissa bits", lambda x: quantize(x, "e4m4fn").clamp(-448, 448), "on_grid"),
    ("falls in one place", but(lambda x: x == 2.0, torch.ones_like), "monotone"),
    ("moves one of its results", but(lambda x: x == 1.25, lambda _: torch.tensor(1.375)), "idempotent"),
    ("all results move", lambda x: right(right(x) * 1.0625), "idempotent"),
    ("negative numbers otherwise", lambda x: torch.where(x < 0, quantize(x, NAME, "toward_zero"), right(x)), "odd_symmetry"),
    ("another answer the second time", Stateful(), "deterministic"),
    ("the first of a batch", first_of_a_batch, "deterministic"),
    ("small batches", by_batch_size, "deterministic"),
    ("alignment", by_alignment, "deterministic"),
    ("stride", by_stride, "deterministic"),
    ("another dtype", lambda x: right(x).double(), "interface"),
    ("a row too many", lambda x: torch.cat([right(x), x[:1]]), "interface"),
    ("a scalar", lambda _: 1.0, "interface"),
    ("two dimensions", lambda x: right(x)[None], "interface"),
]  # fmt: skip
FROM_FP64: list[tuple[str, Quantizer, str]] = [
    ("by way of FP32", through(torch.float32), "single_rounding"),
    ("by way of FP16", through(torch.float16), "single_rounding"),
    ("by way of BF16", through(torch.bfloat16), "single_rounding"),
]


@pytest.mark.parametrize(("mutant", "law"), [m[1:] for m in MUTANTS], ids=[m[0] for m in MUTANTS])
def test_a_mutant_breaks_its_law(mutant: Quantizer, law: str) -> None:
    check_mutant(mutant, law, torch.float32)


@pytest.mark.parametrize(("mutant", "law"), [m[1:] for m in FROM_FP64], ids=[m[0] for m in FROM_FP64])
def test_a_detour_from_fp64_is_found(mutant: Quantizer, law: str) -> None:
    check_mutant(mutant, law, torch.float64)


def check_mutant(mutant: Quantizer, law: str, dtype: torch.dtype) -> None:
    """It fails, the law that was made for it is broken, and the counterexample really fails, alone."""
    report = verify(mutant, NAME, input_dtype=dtype)
    assert not report.passed
    verdict = report.law(law)
    assert verdict.verdict == "fail", [str(v) for v in report.laws]
    if verdict.smallest is None or law == "deterministic":
        return
    example = verdict.smallest
    got = float(mutant(torch.tensor([example.input], dtype=dtype))[0])
    assert got == example.got or (np.isnan(got) and np.isnan(example.got))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "name", [NAME, "e5m2", "e4m3fnuz", "e8m0fnu", "int8", "nf4", "posit8", "binary8p3ue", "e2m1fn"]
)
def test_ours_keeps_every_law(name: str, dtype: torch.dtype) -> None:
    if name == "nf4" and dtype == torch.bfloat16:
        pytest.skip("BF16 does not hold NF4's values")
    for overflow in ("saturate", "propagate", "sat_none"):

        def ours(x: Tensor, overflow: str = overflow) -> Tensor:
            return quantize(x, name, overflow=overflow)

        for asked in (overflow, "found"):
            report = verify(ours, name, "nearest_even", asked, dtype)
            assert report.passed, str(report)
            assert {verdict.law for verdict in report.laws} == set(LAWS)


@pytest.mark.parametrize("level", ["quick", "conditional"])
def test_each_level_finds_what_it_claims(level: str) -> None:
    report = verify(lambda x: quantize(x, NAME, "nearest_away"), NAME, level=level)
    assert not report.passed
    assert report.level == level
    assert verify(right, NAME, level=level).passed


def test_one_input_in_sixty_four_thousand_is_found_by_asking_all() -> None:
    wrong = but(
        lambda x: x.view(torch.int16) == 0x3F87, torch.zeros_like
    )  # 1.0546875 in BF16, beside no decision point
    assert verify(wrong, NAME, input_dtype=torch.bfloat16, level="exhaustive").law("rounding").failed == 1


@pytest.mark.proof
def test_one_input_in_four_billion_is_found_by_asking_all() -> None:
    wrong = but(lambda x: x.view(torch.int32) == 0x3F8A3D71, torch.zeros_like)
    assert verify(wrong, NAME).passed  # no decision point, and it takes no law to see that
    report = verify(wrong, NAME, level="exhaustive")
    assert report.checked == 2**32
    assert (report.failure_count, report.law("rounding").failed) == (1, 1)
    assert report.failures[0].input_bits == 0x3F8A3D71


def test_conventions_are_found_and_are_no_bugs() -> None:
    def nonsaturating(x: Tensor) -> Tensor:
        return quantize(x, NAME, overflow="nonsaturating")

    report = verify(nonsaturating, NAME, overflow="found")
    assert report.passed
    assert report.overflow == report.conventions.overflow == "nonsaturating"
    assert report.conventions.infinity == "nan"
    assert not verify(nonsaturating, NAME).passed
    found = verify(lambda x: quantize(x, NAME, "to_odd"), NAME, "found", "found")
    assert found.passed
    assert found.conventions.rounding == "to_odd"
    assert verify(but(lambda x: x.abs() < 2**-6, signed(0.0)), NAME).conventions.subnormals == "flushed"
    assert verify(lambda x: right(x) + 0.0, NAME).conventions.zero == "unsigned"
    assert verify(but(torch.isnan, torch.zeros_like), NAME).conventions.nan == "zero"


def test_codes_are_decoded() -> None:
    assert verify(lambda x: encode(x, NAME), NAME, gives="codes").passed
    assert not verify(lambda x: encode(x, NAME) + (x == 1.0).to(torch.uint8), NAME, gives="codes").passed
    assert verify(lambda x: x.astype(ml_dtypes.float8_e5m2).view(np.uint8), "e5m2", "nearest_even", "found",
                  takes="array", gives="codes").passed  # fmt: skip


def test_what_raises_hangs_or_writes_is_said_and_the_rest_is_judged() -> None:
    def raises(x: Tensor) -> Tensor:
        if (x == 1.5).any():
            raise RuntimeError("no 1.5 here")
        return right(x)

    report = verify(raises, NAME)
    assert report.law("interface").note == "raises RuntimeError: no 1.5 here for 1.5"
    assert report.law("rounding").verdict == report.law("ties").verdict == "pass"

    def writes(x: Tensor) -> Tensor:
        q = right(x)
        x.zero_()
        return q

    assert "writes into its input" in verify(writes, NAME).law("interface").note

    def hangs(x: Tensor) -> Tensor:
        time.sleep(3)
        return right(x)

    report = verify(hangs, NAME, seconds=0.2)
    assert "hangs" in report.law("interface").note
    assert not report.passed


def test_a_certificate_says_where_it_was_made() -> None:
    report = verify(lambda x: quantize(x, NAME, "nearest_away"), NAME, name="away")
    content = json.loads(report.to_json())
    assert content["implementation"] == "away"
    assert content["environment"]["torch"] == torch.__version__
    assert content["environment"]["flushes_results"] in ("True", "False")
    assert {row["law"] for row in content["laws"]} == set(LAWS)
    data = report.to_dataset()
    assert data.sizes["law"] == len(LAWS) == len(OF_INPUTS) + 6
    assert str(data["verdict"].sel(law="ties").values) == "fail"
    assert data.attrs["convention_rounding"] == "nearest_away"


def test_what_libraries_do_is_found_unaided() -> None:
    known = adapters()
    for library in ("torch", "ml_dtypes"):
        adapter = known[library]
        report = verify(adapter.make(NAME), NAME, "found", "found", torch.float64, takes=adapter.takes)
        assert [v.law for v in report.laws if v.verdict == "fail"] == ["single_rounding"]
        assert report.conventions.rounding == "nearest_even"
        x = 1 + 2.0**-4 + 2.0**-40  # FP32 takes it for the tie 1 + 2^-4, which goes to 1
        given = np.array([x]) if adapter.takes == "array" else torch.tensor([x], dtype=torch.float64)
        assert float(adapter.make(NAME)(given)[0]) == 1.0
        assert float(quantize(torch.tensor([x], dtype=torch.float64), NAME)) == 1.125
    nan = verify(known["ml_dtypes"].make("e2m1fn"), "e2m1fn", "found", "found", takes="array")
    assert nan.conventions.nan == "zero"
    assert nan.passed
    assert verify(known["torch"].make("e5m2"), "e5m2", "found", "found").conventions.overflow == "nonsaturating"
    lifted = verify(known["ml_dtypes"].make("e8m0fnu"), "e8m0fnu", "found", "found", takes="array")
    assert lifted.law("rounding").smallest is not None


def test_functions_are_found_by_their_place() -> None:
    assert load_function("verification.test_laws:right") is not None
    for place, says in [
        ("no_such_module:f", "can't be imported"),
        ("verification.laws:nothing", "has no function 'nothing'"),
    ]:
        with pytest.raises(ValueError, match=says):
            load_function(place)
