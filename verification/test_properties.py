"""What any rounding must satisfy, for any format and any FP32 number; and formats too wide to list, at their
corners."""

from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from formats import FloatFormat, float_format, list_formats, quantize, round_exact
from verification.points import both_signs, from_codes
from verification.strategies import fp32_formats, nasty_singles, roundings

ROUNDINGS = ["nearest_even", "toward_zero"]
WIDE = [
    f
    for name in list_formats("float")
    if (f := float_format(name)).bits > 16 and f.name == name and float_format("fp32").holds(f)
]


def quantized(x: float, f: FloatFormat, rounding: str) -> float:
    return float(quantize(torch.tensor([x]), f, rounding))


@given(st.data(), fp32_formats(), roundings())
@settings(max_examples=1000)
def test_agrees_with_the_reference(data: st.DataObject, f: FloatFormat, rounding: str) -> None:
    x = data.draw(nasty_singles(f))
    want = round_exact(x, f, rounding)
    got = quantized(x, f, rounding)
    assert (got, str(got)) == (float(want), str(float(want)))
    assert Fraction(got) == want  # and not only once it is a float


@given(st.data(), fp32_formats(), roundings())
def test_idempotent_and_on_the_grid(data: st.DataObject, f: FloatFormat, rounding: str) -> None:
    once = quantized(data.draw(nasty_singles(f)), f, rounding)
    assert str(quantized(once, f, rounding)) == str(once)
    assert float(f.decode(f.encode(once))) == once
    assert round_exact(once, f, "toward_zero") == Fraction(once)


@given(st.data(), fp32_formats(), roundings())
def test_monotone(data: st.DataObject, f: FloatFormat, rounding: str) -> None:
    low, high = sorted([data.draw(nasty_singles(f)), data.draw(nasty_singles(f))])
    assert quantized(low, f, rounding) <= quantized(high, f, rounding)


@given(st.data(), fp32_formats(), roundings())
def test_odd(data: st.DataObject, f: FloatFormat, rounding: str) -> None:
    mirrored = {"toward_positive": "toward_negative", "toward_negative": "toward_positive"}.get(rounding, rounding)
    x = data.draw(nasty_singles(f))
    assert str(quantized(-x, f, mirrored)) == str(-quantized(x, f, rounding))


@given(st.data(), fp32_formats())
def test_error_at_most_half_an_ulp_or_less_than_one(data: st.DataObject, f: FloatFormat) -> None:
    x = data.draw(nasty_singles(f).filter(lambda x: abs(x) <= f.max))
    exact = Fraction(x)
    ulp = Fraction(2) ** (max(int(np.frexp(x)[1]) - 1 if x else f.emin, f.emin) - f.mantissa_bits)
    assert abs(Fraction(quantized(x, f, "nearest_even")) - exact) <= ulp / 2
    truncated = Fraction(quantized(x, f, "toward_zero"))
    assert abs(truncated - exact) < ulp
    assert abs(truncated) <= abs(exact)


def corners(f: FloatFormat) -> npt.NDArray[np.int64]:
    """FP32 codes around the ends of every binade of the format, its subnormals, its maximum and FP32's own edges."""
    ends = np.ldexp(1.0, np.arange(f.emin - f.mantissa_bits - 2, min(f.emax + 2, 128)))
    quanta = np.arange(-3.0, 4.0, 0.5) * f.smallest_subnormal
    targets = np.concatenate([ends, f.smallest_normal + quanta, f.max + np.arange(-3, 3, 0.5) * f.max * f.eps, quanta])
    with np.errstate(over="ignore"):
        codes = np.abs(targets).astype(np.float32).view(np.int32).astype(np.int64)
    drop = 1 << (23 - f.mantissa_bits)
    offsets = [k * drop // 2 + near for k in range(-3, 4) for near in (-1, 0, 1)]
    edges = [0, 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F800000]
    codes = np.concatenate([*(codes + offset for offset in offsets), edges])
    return both_signs(codes[codes <= 0x7F800000], torch.float32)


@pytest.mark.parametrize("f", WIDE, ids=str)
def test_wide_formats_at_their_corners(f: FloatFormat) -> None:
    """By `encode`, which shares nothing with the tensors' way and is held to the reference in its own tests."""
    x = from_codes(corners(f), torch.float32)
    for rounding in ROUNDINGS:
        want = f.decode(f.encode(x.double().numpy(), rounding)).astype(np.float32)
        got = quantize(x, f, rounding).numpy()
        np.testing.assert_array_equal(got.view(np.int32), want.view(np.int32))


@pytest.mark.parametrize("name", ["tf32", "fp32", "e8m21", "e8m22", "e5m23", "e5m22f", "e1m23f", "e2m20fn", "e7m23fn"])
def test_wide_formats_against_the_reference_itself(name: str) -> None:
    f = float_format(name)
    codes = corners(f)
    x = from_codes(codes[:: max(1, len(codes) // 1000)], torch.float32)
    for rounding in ROUNDINGS:
        got = quantize(x, f, rounding).tolist()
        want = [round_exact(v, f, rounding) for v in x.tolist()]
        assert [(str(g), Fraction(g)) for g in got] == [(str(float(w)), Fraction(w)) for w in want]


def test_fp32_to_itself_changes_nothing_but_infinity() -> None:
    x = from_codes(np.arange(0, 2**32, 65537), torch.float32)
    for rounding in ROUNDINGS:
        assert torch.equal(quantize(x, "fp32", rounding).view(torch.int32), x.view(torch.int32))
    assert quantize(torch.tensor([-float("inf")]), "fp32").item() == -float_format("fp32").max
