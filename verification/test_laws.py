"""What `verify` says of quantisers: ours keep every law, conventions are no bugs, what libraries do is found unaided."""

from __future__ import annotations

import json
import time
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
from verification.test_mutants import NAME, but, right, signed


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


def test_a_search_finds_what_no_list_of_points_has() -> None:
    """A sixteenth of all inputs, none of them beside a decision point: its counterexample is shrunk to the smallest pattern."""
    wrong = but(lambda x: (x.view(torch.int32) & 0xF000) == 0x1000, torch.zeros_like)
    assert verify(wrong, NAME).passed
    report = verify(wrong, NAME, level="quick")
    assert not report.passed
    assert report.failures[0].input_bits & 0xF000 == 0x1000


def test_signs_of_zeros_may_stay_in_a_tensor_of_a_format_without_them() -> None:
    def keeps_signs(x: Tensor) -> Tensor:
        return torch.copysign(quantize(x, "int8").abs(), x)

    report = verify(keeps_signs, "int8", zero="found")
    assert report.passed, str(report)
    assert report.conventions["zero"] == "signed_anyway"
    assert not verify(keeps_signs, "int8").passed


def test_flushing_before_and_after_rounding_are_two_conventions() -> None:
    normal = 2.0**-6
    early = but(lambda x: x.abs() < normal, signed(0.0))
    after = but(lambda x: right(x).abs() < normal, signed(0.0))
    for quantizer, name in ((early, "flushed_early"), (after, "flushed")):
        report = verify(quantizer, NAME, subnormals="found")
        assert report.passed, str(report)
        assert report.conventions["subnormals"] == report.asked["subnormals"] == name
    assert not verify(early, NAME, subnormals="flushed").passed
    assert not verify(after, NAME, subnormals="flushed_early").passed


def test_a_result_that_only_fp64_tells_from_the_grid_is_seen() -> None:
    """An array of a wider dtype is welcome, and its last bits count."""

    def beside(x: Any) -> Any:
        exact = right(torch.from_numpy(x)).numpy().astype(np.float64)
        return np.where(x == 1.5, exact * (1 + 2.0**-40), exact)

    report = verify(beside, NAME, takes="array")
    assert report.law("on_grid").failed == 1
    assert report.law("interface").verdict == "pass"


@pytest.mark.parametrize("level", ["quick", "conditional"])
def test_each_level_finds_what_it_claims(level: str) -> None:
    report = verify(lambda x: quantize(x, NAME, "nearest_away"), NAME, level=level)
    assert not report.passed
    assert report.level == level
    assert verify(right, NAME, level=level).passed


def test_conventions_are_found_and_are_no_bugs() -> None:
    def nonsaturating(x: Tensor) -> Tensor:
        return quantize(x, NAME, overflow="nonsaturating")

    report = verify(nonsaturating, NAME, overflow="found")
    assert report.passed
    assert report.overflow == report.conventions["overflow"] == "nonsaturating"
    assert report.conventions["infinity"] == "nan"
    assert not verify(nonsaturating, NAME).passed
    found = verify(lambda x: quantize(x, NAME, "to_odd"), NAME, "found", "found")
    assert found.passed
    assert found.conventions["rounding"] == "to_odd"
    assert verify(but(lambda x: x.abs() < 2**-6, signed(0.0)), NAME).conventions["subnormals"] == "flushed_early"
    assert verify(lambda x: right(x) + 0.0, NAME).conventions["zero"] == "unsigned"
    assert verify(but(torch.isnan, torch.zeros_like), NAME).conventions["nan"] == "zero"


@pytest.mark.parametrize("mode", ["to_odd", "nearest_away"])
def test_of_roundings_that_no_answer_tells_apart_it_is_the_claimed_one(mode: str) -> None:
    """BF16 has nothing between two of its own values, and no FP32 number lies halfway between two of NF4's."""
    report = verify(lambda x: quantize(x, "nf4", mode), "nf4", "found", claimed=mode)
    assert report.passed, str(report)
    assert report.rounding == mode
    inside = verify(lambda x: x.clone(), "bf16", "found", "found", torch.bfloat16, claimed=mode)
    assert (inside.conventions["rounding"], inside.rounding) == ("none", mode)


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
    assert content["environment"]["flush_to_zero"] in ("True", "False")
    assert {row["law"] for row in content["laws"]} == set(LAWS)
    data = report.to_dataset()
    assert data.sizes["law"] == len(LAWS) == len(OF_INPUTS) + 11
    assert str(data["verdict"].sel(law="ties").values) == "fail"
    assert data.attrs["convention_rounding"] == "nearest_away"


def test_what_libraries_do_is_found_unaided() -> None:
    known = adapters()
    for library in ("torch", "ml_dtypes"):
        adapter = known[library]
        report = verify(adapter.make(NAME), NAME, "found", "found", torch.float64, takes=adapter.takes)
        assert [v.law for v in report.laws if v.verdict == "fail"] == ["single_rounding"]
        assert report.conventions["rounding"] == "nearest_even"
        x = 1 + 2.0**-4 + 2.0**-40  # FP32 takes it for the tie 1 + 2^-4, which goes to 1
        given = np.array([x]) if adapter.takes == "array" else torch.tensor([x], dtype=torch.float64)
        assert float(adapter.make(NAME)(given)[0]) == 1.0
        assert float(quantize(torch.tensor([x], dtype=torch.float64), NAME)) == 1.125
    nan = verify(known["ml_dtypes"].make("e2m1fn"), "e2m1fn", "found", "found", takes="array")
    assert nan.conventions["nan"] == "zero"
    assert nan.passed
    assert verify(known["torch"].make("e5m2"), "e5m2", "found", "found").conventions["overflow"] == "nonsaturating"
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
