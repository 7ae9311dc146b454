"""The judge of scaled formats: its oracle against the one in rationals, ours against its laws, and rules found by name."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from formats import encode_scaled, quantize_scaled, scaled_format
from formats.scaled import rules_for
from formats.scaled_reference import quantize_group, reference_tensor_scale
from verification import oracle, verify
from verification.block_oracle import BlockQuestion, quotient, right, scales_of, tensor_scale
from verification.block_points import decision_blocks

MX = ["mxfp8_e4m3fn", "mxfp8_e5m2", "mxfp6_e2m3fn", "mxfp6_e3m2fn", "mxfp4", "mxint8"]
BY_RULE = [f"{name}:{rule}" for name in MX for rule in rules_for("e8m0fnu")]
WITH_OTHER_SCALES = [
    "nvfp4",
    "e4m3fn@row",
    "e5m2@row",
    "int8@row",
    "e4m3fn@block128",
    "e2m1fn@block16",
    "e4m3fnuz@block8",
    "int8q7@row",
]
ALL_BELOW_ONE = ["int8q8@block32:e8m0fnu", "e4m3fb30@block32:e8m0fnu"]
EVERYWHERE = ["e2m1fn@tensor:e4m3fn", "e4m3fn@tensor", "int8@tensor", "e4m3fn@tile4x8", "e2m1fn@tile2x16:e8m0fnu"]


@st.composite
def blocks(draw: st.DrawFn, name: str, dtype: torch.dtype, n: int = 8) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A block from a list of decision blocks, or of any numbers of the dtype."""
    f = scaled_format(name)
    batches = decision_blocks(f, dtype, "quick")
    batch = batches[draw(st.integers(0, len(batches) - 1))]
    row = batch[draw(st.integers(0, len(batch) - 1))][:n].double().numpy()
    largest = float(torch.finfo(dtype).max)
    if draw(st.booleans()):
        some = draw(st.lists(st.floats(-largest, largest), min_size=n, max_size=n))
        row = torch.tensor(some, dtype=torch.float64).to(dtype).double().numpy()
    finite = np.where(np.isfinite(row), row, 0.0)
    return np.asarray(finite[None])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", [*BY_RULE, *WITH_OTHER_SCALES, *ALL_BELOW_ONE])
@settings(max_examples=25)
@given(data=st.data())
def test_two_oracles_agree(name: str, dtype: str, data: st.DataObject) -> None:
    """This one compares float64 numbers, that one divides rationals; neither calls the other, or a quantiser."""
    f = scaled_format(name)
    x = data.draw(blocks(name, getattr(torch, dtype)))
    mode = data.draw(st.sampled_from(["nearest_even", "nearest_away", "toward_zero", "to_odd", "toward_negative"]))
    upper = reference_tensor_scale(x[0].tolist(), f) if f.has_tensor_scale else None
    slow = quantize_group(x[0].tolist(), f, mode, tensor_scale=upper)
    fast = right(BlockQuestion(f, mode), x, dtype)
    assert Fraction(float(fast.scales[0])) == slow.scale
    assert [float(e) for e in slow.elements] == fast.elements[0].tolist()
    names = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    assert slow.values(names[dtype]) == fast.values[0].tolist()
    if upper is not None:
        assert tensor_scale(f, float(np.abs(x).max())) == float(upper)


def test_a_quotient_beside_a_decision_point_is_on_its_side() -> None:
    """The hardest there are: FP32 numbers nearest to p d, p a divider of NF4's, of 25 bits, and d an FP32 scale."""
    rng = np.random.default_rng(0)
    scales = rng.random(2000).astype(np.float32).astype(np.float64) + 2.0**-10
    for p in oracle.table(scaled_format("nf4@row").element).middles:
        x = (p * scales).astype(np.float32).astype(np.float64)
        got = np.sign(quotient(x, scales) - p)
        exact = [
            (Fraction(a) > Fraction(p) * Fraction(d)) - (Fraction(a) < Fraction(p) * Fraction(d))
            for a, d in zip(x, scales, strict=True)
        ]
        assert got.tolist() == [float(side) for side in exact]


def test_fp32_scales_end_at_fp32s_largest_number() -> None:
    """Where elements end below 1, amax / largest may lie beyond it (formats.scaled.ScaleRule.AMAX)."""
    top = float(np.finfo(np.float32).max)
    assert scales_of(scaled_format("int8q7@row"), np.array([top, 127 / 128 * top])).tolist() == [top, top]
    assert tensor_scale(scaled_format("e2m1fb20@block16:e4m3fn"), top) == top
    assert quantize_group([top, 1.0], "int8q7@row").scale == Fraction(top)


@pytest.mark.parametrize("rule", ["floor", "ceil", "rceil", "nearest", "even"])
def test_scales_at_the_steps_of_each_rule(rule: str) -> None:
    """e2m1fn: largest 6, emax 2, one mantissa bit; worked out by hand from formats.scaled.ScaleRule."""
    f = scaled_format(f"mxfp4:{rule}")
    steps = {"floor": 8.0, "ceil": np.nextafter(4.0, 5), "rceil": np.nextafter(6.0, 7), "nearest": 9.0, "even": 7.0}
    at = float(steps[rule])
    got = scales_of(f, np.array([np.nextafter(at, 0), at]))
    assert got.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", [*MX, *WITH_OTHER_SCALES, *ALL_BELOW_ONE, *EVERYWHERE, "mxfp4:rceil", "mxfp8_e4m3fn:even"]
)
def test_ours_keeps_every_law(name: str, dtype: torch.dtype) -> None:
    report = verify(lambda x: quantize_scaled(x, name), name, input_dtype=dtype)
    assert report.passed, str(report)
    assert report.law("scale_rule").verdict == report.law("zero_block").verdict == "pass"


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8_e5m2:ceil", "mxint8", "nvfp4", "e4m3fn@row"])
def test_ours_keeps_every_law_in_codes(name: str) -> None:
    def codes(x: Tensor) -> Any:
        found = encode_scaled(x, name)
        upper = () if found.tensor_scale is None else (found.tensor_scale,)
        return (found.elements, found.scales, *upper)

    report = verify(codes, name, gives="codes")
    assert report.passed, str(report)
    assert report.conventions["zero_block"] in ("scale 2^-127", "scale 2^-9", "scale 2^-149")


@pytest.mark.parametrize("mode", ["nearest_even", "nearest_away", "toward_zero", "toward_positive", "to_odd"])
@pytest.mark.parametrize("rule", ["floor", "ceil", "rceil", "nearest", "even"])
def test_rule_and_rounding_are_found_by_name(rule: str, mode: str) -> None:
    found = verify(lambda x: quantize_scaled(x, f"mxfp4:{rule}", rounding=mode), "mxfp4", "found", rule="found")
    assert found.passed, str(found)
    assert (found.conventions["rule"], found.conventions["rounding"]) == (rule, mode)
    assert found.asked["rule"] == rule


def test_flushed_elements_and_unsigned_zeros_are_conventions() -> None:
    def flushes(x: Tensor) -> Tensor:
        scale = torch.from_numpy(scales_of(scaled_format("mxfp4"), x.abs().amax(-1).double().numpy()))[:, None]
        q = quantize_scaled(x, "mxfp4").double() / scale
        return (torch.where(q.abs() < 1, torch.zeros_like(q), q) * scale).float()

    report = verify(flushes, "mxfp4", zero="found", subnormals="found", rule="found")
    assert report.passed, str(report)
    assert (report.conventions["subnormals"], report.conventions["zero"]) == ("flushed", "unsigned")
    assert not verify(flushes, "mxfp4").passed


def test_what_becomes_of_nan_and_infinity_is_told() -> None:
    report = verify(lambda x: quantize_scaled(x, "mxfp4"), "mxfp4")
    assert (report.conventions["nan"], report.conventions["infinity"]) == ("block", "block")

    def refuses(x: Tensor) -> Tensor:
        if not x.isfinite().all():
            raise ValueError("finite numbers only")
        return quantize_scaled(x, "mxfp4")

    refused = verify(refuses, "mxfp4")
    assert refused.passed
    assert (refused.conventions["nan"], refused.conventions["infinity"]) == ("raises", "raises")

    of_nan = verify(refuses, "mxfp8_e4m3fn")
    assert not of_nan.passed
    assert "finite numbers only" in of_nan.law("interface").note
    assert of_nan.law("nan").verdict == "not applicable"  # it was: got nan, expected nan


def test_a_counterexample_is_the_simplest_block() -> None:
    """Two elements are enough to show that the last is left out of amax: it, and nothing but zeros."""

    def without_the_last(x: Tensor) -> Tensor:
        return quantize_scaled(torch.where(x[:, -1:].abs() > x[:, :-1].abs().amax(-1, keepdim=True), 0.0, x), "mxfp4")

    failure = (
        verify(without_the_last, "mxfp4").law("rounding").smallest or verify(without_the_last, "mxfp4").failures[0]
    )
    assert np.count_nonzero(failure.block) == 1


def test_the_quick_level_finds_a_block_by_search() -> None:
    def wrong_at_threes(x: Tensor) -> Tensor:
        q = quantize_scaled(x, "mxfp4")
        return torch.where(x == 96.5, 2 * q, q)

    def wrong_often(x: Tensor) -> Tensor:
        return torch.where(
            x.abs() > 1000, quantize_scaled(x, "mxfp4", rounding="toward_zero"), quantize_scaled(x, "mxfp4")
        )

    def wrong_for_three(x: Tensor) -> Tensor:
        """Where three elements are not zero, as in no block of the list that is not tiny."""
        three = ((x != 0).sum(-1, keepdim=True) == 3) & (x.abs().amax(-1, keepdim=True) > 2.0**-60)
        return quantize_scaled(x, "mxfp4") * torch.where(three, 2.0, 1.0)

    assert verify(wrong_for_three, "mxfp4").passed
    found = verify(wrong_for_three, "mxfp4", level="quick")
    assert not found.passed
    assert {sum(map(bool, verdict.smallest.block)) for verdict in found.broken if verdict.smallest} == {3}
    assert verify(wrong_at_threes, "mxfp4", level="quick").passed  # a needle that no search promises
    assert not verify(wrong_often, "mxfp4", level="quick").passed
    for dtype in (torch.bfloat16, torch.float16):
        assert verify(lambda x: quantize_scaled(x, "mxint8"), "mxint8", level="quick", input_dtype=dtype).passed


def test_questions_about_blocks_that_make_no_sense_are_refused() -> None:
    for question, says in [
        ({"level": "exhaustive"}, "mxfp4: all blocks can't be asked"),
        ({"rounding": "stochastic"}, "rounding must be one of nearest_even"),
        ({"rule": "amax"}, "rule must be one of floor, ceil, rceil, nearest, even, found, got 'amax'"),
        (
            {"input_dtype": torch.float64},
            "input_dtype must be one of float32, bfloat16, float16 for scaled formats, got float64",
        ),
        ({"takes": "codes"}, "mxfp4: decoders are judged of element formats, such as e2m1fn"),
    ]:
        with pytest.raises(ValueError, match=says):
            verify(lambda x: x, "mxfp4", **question)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="int16@row: elements have at most 8 bits here, got 16"):
        verify(lambda x: x, "int16@row")


@pytest.mark.parametrize("name", ["e4m3fn@block1", "int8@tile1x1:e8m0fnu", "e2m1fn@block1:e4m3fn"])
def test_groups_of_one_element_are_judged(name: str) -> None:
    def sets_nan_to_zero(x: Tensor) -> Tensor:
        return torch.nan_to_num(quantize_scaled(x, name), nan=0.0)

    report = verify(lambda x: quantize_scaled(x, name), name, level="quick")
    assert report.passed, str(report)
    assert report.conventions["nan"] == report.conventions["infinity"] == "block"
    wrong = verify(sets_nan_to_zero, name, level="quick")
    if scaled_format(name).element.has_nan:
        assert "element 0 of its block" in str(wrong)
    assert wrong.conventions["nan"] == "other"
