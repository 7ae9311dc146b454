"""What shipped libraries do, found by the judge unaided: asked as `exmy verify` asks, and told nothing of where to look.

Versions are those of the lock file; a library that mends what is asserted here makes a test fail, and the matrix is made anew.
microxcaling is asked where MICROXCALING names a checkout.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from formats import quantize
from formats.scaled import is_scaled_name
from verification import Report, verify
from verification.adapters import Adapter, adapters


def adapter(name: str) -> Adapter:
    known = adapters()
    if name not in known:
        pytest.skip(f"{name} is not installed")
    return known[name]


@cache
def judged(name: str, f: str, dtype: str = "float32", claimed: str | None = None) -> Report:
    library = adapter(name)
    mode = claimed or library.roundings[0]
    try:
        quantizer = library.make(f, mode)
    except ValueError as error:
        pytest.skip(str(error))
    return verify(
        quantizer, f, "found", "found", getattr(torch, dtype), takes=library.takes, gives=library.gives,
        zero="found", subnormals="found", rule="found" if is_scaled_name(f) else None, claimed=mode, name=name,
        version=library.version,
    )  # fmt: skip


def one(name: str, f: str, x: float, dtype: str = "float32", claimed: str | None = None) -> float:
    """What it makes of one number."""
    library = adapter(name)
    given: Any = torch.tensor([x], dtype=getattr(torch, dtype))
    given = given.numpy() if library.takes == "array" else given
    return float(library.make(f, claimed or library.roundings[0])(given)[0])


def broken(report: Report) -> set[str]:
    return {verdict.law for verdict in report.broken}


@pytest.mark.parametrize("name", ["torch", pytest.param("torch-compiled", marks=pytest.mark.proof), "ml_dtypes"])
def test_fp64_is_rounded_twice(name: str) -> None:
    report = judged(name, "e4m3fn", "float64")
    assert broken(report) == {"single_rounding"}
    assert report.law("single_rounding").failed == report.law("single_rounding").checked > 250
    x = 1 + 2.0**-4 + 2.0**-40  # FP32 takes it for the tie 1 + 2^-4, which goes to 1
    assert one(name, "e4m3fn", x, "float64") == 1.0
    assert float(quantize(torch.tensor([x], dtype=torch.float64), "e4m3fn")) == 1.125
    assert judged(name, "e4m3fn").passed  # from FP32


def test_torch_saturates_into_e4m3fn_and_not_into_e5m2() -> None:
    """Two conventions of one library, neither of which is a bug."""
    narrow, wide = judged("torch", "e4m3fn"), judged("torch", "e5m2")
    assert narrow.passed
    assert wide.passed
    if torch.__version__.split("+")[0] >= "2.13":
        assert (narrow.conventions["overflow"], narrow.conventions["infinity"]) == ("saturate", "largest")
    assert (wide.conventions["overflow"], wide.conventions["infinity"]) == ("nonsaturating", "infinity")
    assert one("torch", "e5m2", 61440.0) == float("inf")  # halfway to 2^16, to even
    assert one("torch", "e5m2", float(np.nextafter(np.float32(61440), np.float32(0)))) == 57344.0


def test_ml_dtypes_makes_nan_a_negative_zero() -> None:
    for name in ("e2m1fn", "e2m3fn", "e3m2fn"):
        report = judged("ml_dtypes", name)
        assert report.passed  # these formats have no NaN, so that no standard says
        assert report.conventions["nan"] == "zero"
    got = one("ml_dtypes", "e2m1fn", float("nan"))
    assert got == 0
    assert np.signbit(got)


def test_e8m0_is_lifted_above_its_smallest_value_and_loses_signs() -> None:
    assert broken(judged("ml_dtypes", "e8m0fnu")) == {"rounding"}
    assert {"rounding", "overflow_point", "monotone"} <= broken(judged("torch", "e8m0fnu"))
    smallest = judged("ml_dtypes", "e8m0fnu").law("rounding").smallest
    assert smallest is not None
    assert smallest.input_bits == 0x400001  # the first FP32 number above 2^-127
    assert judged("ml_dtypes", "e8m0fnu").conventions["zero"] == "nan"
    assert judged("torch", "e8m0fnu").conventions["zero"] == "smallest"


def test_gfloat_leaves_e8m0_and_sends_its_ties_to_even_codes() -> None:
    report = judged("gfloat", "e8m0fnu")
    assert report.rounding == "nearest_even_code"  # P3109's; a convention
    assert report.law("ties").verdict == "pass"
    assert "on_grid" in broken(report)
    assert judged("gfloat", "e4m3fn", "float64").passed  # it rounds FP64 once


def test_pychops_overflow() -> None:
    report = judged("pychop", "e5m2")
    assert {"on_grid", "overflow_point", "monotone", "signed_zero"} <= broken(report)
    point = report.law("overflow_point").smallest
    assert point is not None
    assert (abs(point.input), abs(point.got)) == (61440.0, 65536.0)  # no value of e5m2
    assert one("pychop", "e5m2", 70000.0) == 0.0
    assert one("pychop", "e5m2", 140000.0) == float("inf")


def test_pychops_to_odd_moves_values_of_the_format() -> None:
    report = judged("pychop", "e5m2", claimed="to_odd")
    assert {"rounding", "idempotent"} <= broken(report)
    assert one("pychop", "e5m2", 1.0, claimed="to_odd") == 1.25


def test_pychops_ties_away_go_toward_zero_below_zero() -> None:
    report = judged("pychop", "e5m2", claimed="nearest_away")
    assert report.conventions["rounding"] == "other"
    assert {"ties", "odd_symmetry"} <= broken(report)
    assert one("pychop", "e5m2", -1.125, claimed="nearest_away") == -1.0


def test_gfloats_ties_go_away_from_zero_where_that_is_asked_for() -> None:
    report = judged("gfloat", "e5m2", claimed="nearest_away")
    assert report.rounding == report.conventions["rounding"] == "nearest_away"
    assert report.passed


@pytest.mark.proof  # it compiles itself for a minute where it is first imported
def test_qtorchs_ties_go_away_from_zero() -> None:
    """It calls that "nearest"; a convention, and named, so that what is left is what it does below its smallest value."""
    report = judged("qtorch", "e5m2f")
    assert report.rounding == report.conventions["rounding"] == "nearest_away"
    assert report.law("ties").verdict == "pass"
    assert broken(report) == {"subnormals"}
    assert report.conventions["nan"] == "largest"
    smallest = report.law("subnormals").smallest
    assert smallest is not None
    assert smallest.input < 2.0**-17  # half the smallest subnormal
    assert smallest.got == 2.0**-16


def test_torchaos_rceil_divides_in_fp32_and_its_smallest_scale_is_halved() -> None:
    report = judged("torchao-rceil", "mxfp4:rceil")
    assert report.conventions["rule"] == "rceil"
    assert "scale_rule" in broken(report)
    assert judged("torchao", "mxfp4").conventions["rule"] == "floor"
    assert judged("torchao", "mxfp4").law("scale_rule").verdict == "pass"
    halved = judged("torchao", "mxfp4").law("rounding").smallest
    assert halved is not None
    assert (abs(halved.got), abs(halved.expected)) == (0.5, 1.0)


def test_torchaos_nvfp4_of_zeros() -> None:
    assert {"scale_rule", "zero_block"} <= broken(judged("torchao", "nvfp4"))


@pytest.mark.parametrize("name", ["pychop-mx", pytest.param("gfloat", marks=pytest.mark.proof), "microxcaling"])
def test_scales_by_a_rounded_logarithm(name: str) -> None:
    """floor(log2(amax)) in FP32 is a power too high where amax is just below it; everywhere else the rule is the standard's."""
    report = judged(name, "mxfp4")
    assert report.conventions["rule"] == "floor"
    scale = report.law("scale_rule")
    assert scale.verdict == "fail"
    example = scale.smallest
    assert example is not None
    mantissa, _ = np.frexp(max(abs(x) for x in example.block))
    assert mantissa > 1 - 2.0**-20


def test_microxcalings_own_names_for_roundings() -> None:
    if "MICROXCALING" not in os.environ:
        pytest.skip("set MICROXCALING to a checkout of microsoft/microxcaling")
    assert judged("microxcaling", "e4m3fn").rounding == "nearest_away"
    assert "on_grid" in broken(judged("microxcaling", "e4m3fn"))  # infinity, which e4m3fn lacks
    assert judged("microxcaling", "e4m3fn", claimed="nearest_even").rounding == "nearest_even"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_torchs_cast_on_a_gpu() -> None:
    library = adapter("torch-cuda")
    for name in ("e4m3fn", "e5m2"):
        report = verify(library.make(name), name, "found", "found", zero="found", subnormals="found", device="cuda")
        assert report.passed, str(report)
