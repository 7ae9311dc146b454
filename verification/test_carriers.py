"""BF16 and FP16 tensors: all 65,536 inputs, and which dtypes are refused."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch

from formats import ElementFormat, GridFormat, float_format, format_parameters, list_formats, quantize
from formats.rounding import DETERMINISTIC
from verification import verify
from verification.elements import find_wrong
from verification.points import CARRIERS, from_codes
from verification.question import Question
from verification.test_conditional import EVERY, IN_CI, needs_compiler

EVERY_INPUT = np.arange(1 << 16)
HALVES = [torch.bfloat16, torch.float16]
NAMED = [
    "e5m2",
    "e4m3",
    "e4m3fn",
    "e3m2fn",
    "e2m1fn",
    "e4m0f",
    "e5m7",
    "e5m3",
    "e8m3",
    "e8m7",
    "e5m10",
    "e2m9fn",
    "e6m1f",
]
FITTING = [
    (name, dtype) for dtype in HALVES for name in NAMED if float_format(CARRIERS[dtype]).holds(float_format(name))
]


@pytest.mark.parametrize("rounding", ["nearest_even", "toward_zero"])
@pytest.mark.parametrize(("name", "dtype"), FITTING)
def test_every_input(name: str, dtype: torch.dtype, rounding: str) -> None:
    x, f = from_codes(EVERY_INPUT, dtype), float_format(name)
    got = quantize(x, f, rounding)
    assert got.dtype == dtype
    assert not len(find_wrong(Question(f, rounding), x, got))


@needs_compiler
@pytest.mark.parametrize("rounding", ["nearest_even", "toward_zero"])
@pytest.mark.parametrize(("name", "dtype"), [case for case in FITTING if case[0] in ("e4m3fn", "e8m7", "e5m10")])
def test_every_input_compiled(name: str, dtype: torch.dtype, rounding: str) -> None:
    x, f = from_codes(EVERY_INPUT, dtype), float_format(name)
    torch._dynamo.reset()
    got = torch.compile(quantize, fullgraph=True)(x, f, rounding)
    assert not len(find_wrong(Question(f, rounding), x, got))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rounding", ["nearest_even", "toward_zero"])
def test_every_input_with_parameters(dtype: torch.dtype, rounding: str) -> None:
    formats = [float_format(name) for name, carrier in FITTING if carrier == dtype]
    x = from_codes(EVERY_INPUT, dtype)
    got = quantize(x.expand(len(formats), -1), format_parameters(formats, ndim=2, dtype=dtype), rounding)
    for row, f in enumerate(formats):
        assert not len(find_wrong(Question(f, rounding), x, got[row])), f


@pytest.mark.parametrize("dtype", HALVES)
def test_verify_takes_these_dtypes_too(dtype: torch.dtype) -> None:
    assert verify(lambda x: quantize(x, "e4m3fn"), "e4m3fn", input_dtype=dtype).passed


def test_a_dtype_fits_exactly_if_casting_loses_nothing() -> None:
    for name in list_formats("float"):
        f = float_format(name)
        if f.bits > 12 or not float_format("fp64").holds(f):
            continue
        grid = torch.from_numpy(f.grid())
        for dtype in CARRIERS:
            lossless = torch.equal(grid.to(dtype).double(), grid)
            if lossless:
                quantize(torch.zeros(1, dtype=dtype), f)
            else:
                with pytest.raises(ValueError, match=f"{name}|{f.canonical_name} does not fit {str(dtype)[6:]}"):
                    quantize(torch.zeros(1, dtype=dtype), f)


@pytest.mark.parametrize("name", ["e4m3fn", "e3m2-nosub", "e3m0f", "e8m0fnu", "binary6p3ue", "binary8p4sf"])
def test_a_format_holds_a_list_exactly_if_it_has_every_number_of_it(name: str) -> None:
    """Its own, those halfway between them, half the smallest, twice the largest, a negative one, a third of one, and 2^emin."""
    f = float_format(name)
    own = [Fraction(float(v)) for v in f.grid()]
    others = [*((a + b) / 2 for a, b in pairwise(own)), min(map(abs, filter(None, own))) / 2, 2 * own[-1], -own[-1]]
    for number in [*own, *others, own[-1] / 3, Fraction(2) ** f.emin]:  # which is no value of e3m2-nosub
        assert f.holds(GridFormat("few", tuple(sorted({number, *own[-2:]})))) == (number in own), number


@pytest.mark.parametrize(
    ("name", "dtype", "says"),
    [
        ("e8m3", torch.float16, "e8m3 does not fit float16, .* use float64 or float32 or bfloat16"),
        ("e5m3fn", torch.float16, "e5m3fn does not fit float16"),
        ("fp16", torch.bfloat16, "does not fit bfloat16, .* use float64 or float32 or float16"),
        ("e8m3f", torch.float32, "e8m3f does not fit float32, .* use float64"),
        ("e4m3", torch.int64, "x must be float64, float32, bfloat16 or float16, got int64"),
        ("e4m3", torch.int32, "x must be float64, float32, bfloat16 or float16, got int32"),
    ],
)
def test_dtypes_that_do_not_fit_are_refused(name: str, dtype: torch.dtype, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        quantize(torch.zeros(2, dtype=dtype), name)
    with pytest.raises(ValueError, match=says):
        format_parameters(["e4m3", name], ndim=1, dtype=dtype)


def test_parameters_are_held_to_the_dtype_they_were_made_for() -> None:
    parameters = format_parameters(["e8m3", "e4m3"], ndim=2)
    with pytest.raises(ValueError, match="parameters made for float32 got an x of float16"):
        quantize(torch.zeros(2, 3, dtype=torch.float16), parameters)
    in_bf16 = format_parameters(["e8m3", "e4m3"], ndim=2, dtype=torch.bfloat16)
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(quantize(x, in_bf16), quantize(x, parameters))


def test_unknown_modes_are_refused() -> None:
    x = torch.zeros(1)
    with pytest.raises(ValueError, match=r"rounding must be one of nearest_even, .*, got 'up'"):
        quantize(x, "e4m3", "up")
    with pytest.raises(ValueError, match=r"overflow must be one of saturate, .*, got 'wrap'"):
        quantize(x, "e4m3", overflow="wrap")
    with pytest.raises(ValueError, match="e2m1fn has neither inf nor NaN to overflow to"):
        quantize(x, "e2m1fn", overflow="nonsaturating")
    with pytest.raises(ValueError, match="stochastic_c needs a seed, or random_bits"):
        quantize(x, "e4m3", "stochastic")
    with pytest.raises(ValueError, match=r"stochastic_bits must be 1..32, got 0"):
        quantize(x, "e4m3", "stochastic", seed=1, stochastic_bits=0)
    with pytest.raises(ValueError, match="random_bits must be int32 or int64, got float32"):
        quantize(x, "e4m3", "stochastic", random_bits=x)
    with pytest.raises(ValueError, match=r"seed must be one number or one a run, \[4\] along the first axis"):
        quantize(torch.zeros(4, 3), "e4m3", "stochastic", seed=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"nf4: with 32 random bits .* take stochastic_bits of at most 2[0-9]"):
        quantize(x, "nf4", "stochastic", seed=1, stochastic_bits=32)


def test_batches_say_what_they_do_not_take() -> None:
    for name in ("e4m3fnuz", "int8", "nf4", "e8m0fnu", "binary8p4se", "e3m2-nosub", "e8m3b140"):
        with pytest.raises(ValueError, match=f"{name} can't share a program with other formats in float32"):
            format_parameters([name], ndim=1)
    parameters = format_parameters(["e4m3"], ndim=1)
    with pytest.raises(ValueError, match="a batch of formats saturates: overflow must be saturate, got 'propagate'"):
        quantize(torch.zeros(1), parameters, overflow="propagate")
    with pytest.raises(ValueError, match="a batch of formats takes stochastic_bits of at most 22, got 23"):
        quantize(torch.zeros(1), parameters, "stochastic_b", seed=1, stochastic_bits=23)


EVERY_MODE = [mode.value for mode in DETERMINISTIC]
NARROW = [f for f in IN_CI if f.bits <= 8]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rounding", EVERY_MODE)
def test_every_16_bit_input_of_every_narrow_format(dtype: torch.dtype, rounding: str) -> None:
    assert check_every_input(NARROW, dtype, rounding) > 100


@pytest.mark.proof
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rounding", EVERY_MODE)
def test_every_16_bit_input_of_every_format(dtype: torch.dtype, rounding: str) -> None:
    assert check_every_input(EVERY, dtype, rounding) > 200


def check_every_input(formats: list[ElementFormat], dtype: torch.dtype, rounding: str) -> int:
    """All 65,536 inputs of the dtype, for those of the formats that it holds; how many these are."""
    x = from_codes(EVERY_INPUT, dtype)
    fitting = [f for f in formats if float_format(CARRIERS[dtype]).holds(f)]
    for f in fitting:
        assert not len(find_wrong(Question(f, rounding), x, quantize(x, f, rounding))), f
    return len(fitting)
