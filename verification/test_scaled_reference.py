"""The reference for scaled formats against numbers worked out by hand, and against properties that define its rules."""

from fractions import Fraction

import mpmath
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from formats import element_format, float_format
from formats.scaled import list_scaled_formats, rules_for, scaled_format
from formats.scaled_reference import quantize_group, reference_tensor_scale

ELEMENTS = ["e4m3fn", "e5m2", "e2m3fn", "e3m2fn", "e2m1fn"]
AMAX = st.builds(lambda m, e: Fraction(m) * Fraction(2) ** e, st.integers(1, 2**24 - 1), st.integers(-140, 100))
NEAR_POWERS = st.builds(lambda e, k: Fraction(2) ** e * (2**24 + k) / 2**24, st.integers(-120, 120), st.integers(-2, 2))


def power_for(amax: Fraction, element: str, rule: str) -> Fraction:
    scale = quantize_group([amax], f"{element}@block32:e8m0fnu:{rule}").scale
    assert scale is not None
    return scale


@given(AMAX | NEAR_POWERS, st.sampled_from(ELEMENTS))
@settings(max_examples=300)
def test_each_rule_by_the_inequality_that_defines_it(amax: Fraction, element: str) -> None:
    f = float_format(element)
    largest, top = Fraction(f.max), Fraction(2) ** f.emax
    scale = {str(rule): power_for(amax, element, str(rule)) for rule in rules_for("e8m0fnu")}
    smallest, biggest = Fraction(2) ** -127, Fraction(2) ** 127
    assume(all(smallest < s < biggest for s in scale.values()))
    assert top * scale["floor"] <= amax < 2 * top * scale["floor"]
    assert top * scale["ceil"] / 2 < amax <= top * scale["ceil"]
    assert largest * scale["rceil"] / 2 < amax <= largest * scale["rceil"]
    assert 3 * largest * scale["nearest"] / 4 <= amax < 3 * largest * scale["nearest"] / 2
    rounded = mpmath.libmp.from_rational(amax.numerator, amax.denominator, f.mantissa_bits + 1, "n")
    bumped = Fraction(*mpmath.libmp.to_rational(rounded))
    assert top * scale["even"] <= bumped < 2 * top * scale["even"]


@given(st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=8), st.sampled_from(ELEMENTS))
@settings(max_examples=100)
def test_rceil_and_ceil_never_clip_and_the_others_at_most_a_binade(values: list[float], element: str) -> None:
    amax = max(abs(Fraction(x)) for x in values)
    assume(amax > Fraction(2) ** -100)
    largest = Fraction(element_format(element).max)
    for rule in rules_for("e8m0fnu"):
        quotient = amax / power_for(amax, element, str(rule))
        assert quotient <= largest or rule not in ("ceil", "rceil")
        assert quotient < 2 * largest


@pytest.mark.parametrize(
    ("name", "block", "scale", "elements"),
    [
        # log2(7.9) floors to 2, emax is 2: a scale of 1, and 7.9 saturates at 6; -2.5 and 5 are ties, which go to even codes
        ("mxfp4", [7.9, -2.5, 5.0, 0.25, 0.75], 1, [6, -2, 4, 0, 1]),
        ("mxfp4:rceil", [7.9, -2.5, 5.0, 0.25, 0.75], 2, [4, -1, 2, 0, Fraction(1, 2)]),
        # amax 1000 = 1.95 * 2^9, emax 8: 2^1
        ("mxfp8_e4m3fn", [1000.0, 34.0, 2.0**-9], 2, [448, 16, 0]),
        ("mxfp8_e4m3fn", [1000.0, 34.0, 2.0**-8], 2, [448, 16, Fraction(2) ** -9]),
        ("mxfp8_e5m2", [65536.0, 1.0], 2, [32768, Fraction(1, 2)]),
        ("mxfp6_e2m3fn", [7.75, 0.0625], 1, [Fraction(15, 2), 0]),
        ("mxfp6_e3m2fn", [31.0, 0.03125], 1, [28, 0]),
        ("e4m3fn@tensor", [896.0, 3.0], 2, [448, Fraction(3, 2)]),
        ("e2m1fn@row", [3.0, 1.0, -0.125], Fraction(1, 2), [6, 2, -0.0]),
    ],
)
def test_blocks_worked_out_by_hand(name: str, block: list[float], scale: Fraction, elements: list[Fraction]) -> None:
    group = quantize_group(block, name)
    assert group.scale == scale
    assert group.elements == elements


def test_mxfp4_with_amax_just_under_128_takes_16() -> None:
    assert quantize_group([128 - Fraction(1, 2**100)], "mxfp4").scale == 16
    assert quantize_group([128], "mxfp4").scale == 32


def test_nvfp4_worked_out_by_hand() -> None:
    upper = reference_tensor_scale([2688.0, 1.0], "nvfp4")
    assert upper == 1
    group = quantize_group([3.3, 0.375], "nvfp4", tensor_scale=upper)
    assert group.scale == Fraction(9, 16)  # 0.55 between 0.5625 and 0.5
    assert group.elements == [6, Fraction(1, 2)]
    assert group.values("fp32") == [3.375, 0.28125]


def test_zeros_take_the_smallest_scale_and_keep_their_signs() -> None:
    for name, smallest in [("mxfp4", -127), ("nvfp4", -9), ("e4m3fn@tensor", -149)]:
        group = quantize_group([0.0, -0.0], name, tensor_scale=1 if name == "nvfp4" else None)
        assert group.scale == Fraction(2) ** smallest
        assert [str(v) for v in group.values("bf16")] == ["0.0", "-0.0"]


def test_inf_or_nan_in_a_block_makes_its_scale_nan() -> None:
    for bad in (float("inf"), float("nan")):
        group = quantize_group([1.0, bad], "mxfp4")
        assert group.scale is None
        assert all(v != v for v in group.values("fp32"))


def test_values_are_rounded_once_and_to_inf_beyond_the_range() -> None:
    group = quantize_group([65504], "mxfp4:even")
    assert group.values("fp16") == [float("inf")]
    assert group.values("bf16") == [65536.0]
    third = quantize_group([Fraction(1, 3)], "e4m3fn@tensor")
    assert third.values("fp32") == [float(np.float32(float(third.scale or 0) * 448))]


def test_names_say_the_same_as_the_grammar() -> None:
    assert scaled_format("mxfp4") == scaled_format("e2m1fn@block32:e8m0fnu:floor")
    assert scaled_format("nvfp4").canonical_name == "e2m1f@block16:e4m3fn:amax"
    assert scaled_format("mxfp4").with_rule("rceil") == scaled_format("mxfp4:rceil") != scaled_format("mxfp4")
    assert scaled_format("mxfp4").bits_per_element == 4.25
    assert scaled_format("nvfp4").bits_per_element == 4.5
    assert scaled_format("e4m3fn@tile128x128").elements_per_scale == 16384
    for name in list_scaled_formats():
        if name == "mxint8":
            continue
        f = scaled_format(name)
        assert scaled_format(f.canonical_name) == f
        assert "\n" not in f.description
        assert f.element.name in f.description
