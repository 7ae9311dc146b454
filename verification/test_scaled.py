"""Scaled formats on tensors against the rational reference, elementwise and to the last bit."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from formats import element_format, float_format
from formats.random_bits import random_bits
from formats.rounding import DETERMINISTIC, Overflow
from formats.scale_arithmetic import long_product, product, split_scale
from formats.scaled import ScaledFormat, rules_for, scaled_format, significant_bits
from formats.scaled_reference import quantize_group, reference_tensor_scale
from formats.scaling import quantize_scaled, scales_of
from verification.points import CARRIERS
from verification.test_conditional import needs_compiler

MX = ["mxfp8_e4m3fn", "mxfp8_e5m2", "mxfp6_e2m3fn", "mxfp6_e3m2fn", "mxfp4", "mxint8"]
E8M0_RULES = [str(rule) for rule in rules_for("e8m0fnu")]
BY_RULE = [f"{name}:{rule}" for name in MX for rule in E8M0_RULES]
SHORT = ["e4m3fn@block8", "e5m2@block8", "e2m1fn@block8", "e5m10@block8", "e3m4@block8", "e1m2f@block8", "int8@block8"]
LONG = ["int16@block8", "nf4@block8", "posit8@block8"]  # by FP64: their decision points are long
LONG_LARGEST = ["e4m20@row", "e2m15@row", "e5m12@row", "int16@row", "e4m22@row"]
ODD_ONES = ["e4m3fnuz@block8", "e3m2-nosub@block8:e8m0fnu", "e3m0f@block8", "int4@block8:e4m3fn"]
WITH_FP32_SCALES = [*SHORT, "e4m3fnuz@block8"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def bits(x: Tensor) -> Tensor:
    """Patterns of x in FP32, every NaN the same."""
    wide = x.to(torch.float32)
    return torch.where(wide.isnan(), torch.tensor(0x7FC00000), wide.view(torch.int32))


def expected(
    x: Tensor,
    f: ScaledFormat | str,
    rounding: str = "nearest_even",
    tensor_scale: float | None = None,
    overflow: str = "saturate",
) -> Tensor:
    """By the reference: x is cut into groups along its only axis."""
    f, values = scaled_format(f) if isinstance(f, str) else f, x.tolist()
    upper = tensor_scale
    if f.has_tensor_scale and upper is None:
        exact = reference_tensor_scale(values, f)
        if exact is None:
            return torch.full_like(x, float("nan"))
        upper = float(exact)
    n = f.elements_per_scale or len(values)
    out: list[float] = []
    for start in range(0, len(values), n):
        group = quantize_group(values[start : start + n], f, rounding, overflow, tensor_scale=upper)
        out += group.values(CARRIERS[x.dtype])
    return torch.tensor(out).to(x.dtype)


def assert_same(got: Tensor, want: Tensor, x: Tensor) -> None:
    wrong = bits(got) != bits(want)
    assert got.dtype == want.dtype
    assert not wrong.any(), [
        (x[i].item(), got[i].item(), want[i].item()) for i in wrong.nonzero().flatten().tolist()[:4]
    ]


@cache
def decision_points(f: ScaledFormat) -> list[float]:
    """Values of the element and the middles between two, where it begins to overflow included, positive."""
    grid = f.element.grid()
    grid = np.concatenate([grid[grid >= 0][:300], grid[-2:]])
    return [*grid, *((grid[1:] + grid[:-1]) / 2), 1.5 * grid[-1] - 0.5 * grid[-2]]


@st.composite
def nasty_blocks(draw: st.DrawFn, f: ScaledFormat, dtype: torch.dtype, size: int = 8) -> Tensor:
    """Values a few ulps around decision points times a scale, powers of two, subnormals and zeros, or any bit patterns."""
    points = decision_points(f)
    smallest = -149 if dtype != torch.float16 else -24
    exponent = draw(st.integers(smallest - 4, 127 if dtype != torch.float16 else 15))
    scale = 2.0**exponent
    if f.scale != "e8m0fnu":
        scale *= draw(st.sampled_from([1.0, 1.125, 1.75]) | st.integers(2**23, 2**24 - 1).map(lambda m: m / 2**23))
    near = st.builds(lambda p: p * scale, st.sampled_from(points))
    power = st.builds(lambda e: 2.0**e, st.integers(smallest, 127))
    mixed = st.builds(lambda m, e: m * 2.0**e * scale, st.floats(1, 2), st.integers(-12, 12))
    value = st.one_of(near, near, power, mixed, st.just(0.0), st.floats(0, 1e-38))
    chosen = draw(st.lists(value, min_size=size, max_size=size))
    if draw(st.booleans()):  # so that the scale is the one that the points were multiplied by
        chosen[0] = f.element.max * scale
    return spread(draw, chosen, dtype)


def spread(draw: st.DrawFn, values: Sequence[float], dtype: torch.dtype) -> Tensor:
    """To the dtype, kept finite, some moved by an ulp or two, with signs."""
    n = len(values)
    nudges = draw(st.lists(st.integers(-2, 2), min_size=n, max_size=n))
    signs = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    kind, top = (torch.int32, 0x7F7FFFFF) if dtype == torch.float32 else (torch.int16, 0)
    top = top or (0x7F7F if dtype == torch.bfloat16 else 0x7BFF)
    patterns = torch.tensor(values, dtype=torch.float64).to(dtype).view(kind).to(torch.int64)
    moved = torch.clamp(patterns + torch.tensor(nudges), 0, top).to(kind).view(dtype)
    return torch.where(torch.tensor(signs), -moved, moved)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*MX, *WITH_FP32_SCALES])
@settings(max_examples=30)
@given(data=st.data())
def test_equals_the_reference(name: str, dtype: torch.dtype, data: st.DataObject) -> None:
    f = scaled_format(name)
    rule = data.draw(st.sampled_from(rules_for(f.scale)))
    x = data.draw(nasty_blocks(f, dtype))
    assert_same(quantize_scaled(x, name, rule=rule), expected(x, f.with_rule(rule)), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=80)
@given(data=st.data())
def test_nvfp4_equals_the_reference(dtype: torch.dtype, data: st.DataObject) -> None:
    x = data.draw(nasty_blocks(scaled_format("nvfp4"), dtype, 20))
    assert_same(quantize_scaled(x, "nvfp4"), expected(x, "nvfp4"), x)


@st.composite
def near_products(draw: st.DrawFn, dtype: torch.dtype, t: float) -> Tensor:
    """A block whose E4M3 scale is drawn, and elements beside decision points times that scale times t."""
    f = scaled_format("nvfp4")
    scale = float(element_format("e4m3fn").decode(draw(st.integers(1, 126)))) * t
    points = st.sampled_from(decision_points(f)).map(lambda p: p * scale)
    return spread(draw, [6 * scale, *draw(st.lists(points, min_size=15, max_size=15))], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=80)
@given(data=st.data())
def test_nvfp4_under_a_given_tensor_scale(dtype: torch.dtype, data: st.DataObject) -> None:
    low, high = (-20, 3) if dtype == torch.float16 else (-150, 110)
    mantissa = data.draw(st.integers(2**23, 2**24 - 1))
    t = float(torch.tensor(mantissa / 2**23 * 2.0 ** data.draw(st.integers(low, high)), dtype=torch.float32))
    if t == 0.0:
        return
    x = data.draw(near_products(dtype, t))
    assert_same(quantize_scaled(x, "nvfp4", tensor_scale=t), expected(x, "nvfp4", tensor_scale=t), x)


@pytest.mark.parametrize("name", [*MX, *SHORT, *LONG, *ODD_ONES])
@settings(max_examples=30)
@given(data=st.data())
def test_every_rounding_and_overflow_equals_the_reference(name: str, data: st.DataObject) -> None:
    f = scaled_format(name)
    rounding = data.draw(st.sampled_from(DETERMINISTIC))
    overflow = data.draw(st.sampled_from([o for o in Overflow if o != "nonsaturating" or f.element.has_nan]))
    x = data.draw(nasty_blocks(f, torch.float32))
    upper = data.draw(st.sampled_from([1.0, 0xBD70A4 / 2**25])) if f.has_tensor_scale else None
    got = quantize_scaled(x, name, rounding=rounding, overflow=overflow, tensor_scale=upper)
    assert_same(got, expected(x, name, rounding, upper, overflow), x)


@pytest.mark.parametrize("name", [*MX, *SHORT])
@settings(max_examples=20)
@given(data=st.data())
def test_stochastic_rounding_equals_the_reference(name: str, data: st.DataObject) -> None:
    f = scaled_format(name)
    rounding = data.draw(st.sampled_from(["stochastic_a", "stochastic_b", "stochastic_c"]))
    x = data.draw(nasty_blocks(f, torch.float32))
    random = data.draw(st.lists(st.integers(0, 15), min_size=len(x), max_size=len(x)))
    given_bits = torch.tensor(random, dtype=torch.int32)
    got = quantize_scaled(x, name, rounding=rounding, random_bits=given_bits, stochastic_bits=4)
    group = quantize_group(x.tolist(), f, rounding, random_bits=random, stochastic_bits=4)
    assert_same(got, torch.tensor(group.values("fp32")), x)


def test_random_bits_are_those_of_the_elements_place_in_its_run() -> None:
    """Whatever the layout of groups: all of x, not a block or its padding, is what the elements are counted in."""
    x = torch.randn(2, 10, 40, generator=torch.Generator().manual_seed(7))
    seed = torch.tensor([5, 6])
    bits_of = random_bits(seed, x.shape, 23)
    for name, axis in [("mxfp4", -1), ("mxfp4", 1), ("e4m3fn@tile4x16", -1), ("e4m3fn@row", 1)]:
        seeded = quantize_scaled(x, name, axis, "stochastic", seed=seed, batch_dims=1)
        assert torch.equal(seeded, quantize_scaled(x, name, axis, "stochastic", random_bits=bits_of, batch_dims=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_beside_the_middles_of_a_dtype_are_rounded_once(dtype: torch.dtype) -> None:
    """Scales t for which element * short * t is, but for t's own rounding, halfway between two numbers of the dtype."""
    carrier = float_format(CARRIERS[dtype])
    m = carrier.mantissa_bits
    elements = torch.from_numpy(scaled_format("nvfp4").element.grid())[8:]
    shorts = torch.from_numpy(element_format("e4m3fn").decode(np.arange(1, 127)))
    middles = torch.arange(2 ** (m + 1) + 1, 2 ** (m + 2), max(2, 2 ** (m - 6)), dtype=torch.float64)
    for exponent in (-m - 1, carrier.emin - m - 4, carrier.emin - 2 * m - 2):
        multiples = (elements[:, None] * shorts).flatten()[:, None]
        t = (middles * 2.0**exponent / multiples).to(torch.float32)
        q = elements[:, None, None].expand(-1, len(shorts), len(middles)).reshape(t.shape).to(torch.float32)
        short = shorts[None, :, None].expand(len(elements), -1, len(middles)).reshape(t.shape).to(torch.float32)
        got = product(q, split_scale(t, short), t, dtype).to(dtype)
        exact = (multiples * t.double()).numpy()  # 30 bits
        want = torch.from_numpy(carrier.decode(carrier.encode(exact)))
        assert torch.equal(got.double(), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["nf4", "int16", "lns8q3"])
def test_products_of_long_elements_are_rounded_once(name: str, dtype: torch.dtype) -> None:
    """The same for elements of more than 12 bits: with a scale they have at most 48, which FP64 holds."""
    carrier = float_format(CARRIERS[dtype])
    m = carrier.mantissa_bits
    elements = torch.from_numpy(element_format(name).grid())
    elements = elements[elements > 0][:: max(1, len(elements) // 200)]
    middles = torch.arange(2 ** (m + 1) + 1, 2 ** (m + 2), max(2, 2 ** (m - 6)), dtype=torch.float64)
    for exponent in (-m - 1, carrier.emin - m - 4, carrier.emin - 2 * m - 2):
        t = (middles * 2.0**exponent / elements[:, None]).to(torch.float32)
        exact = elements[:, None] * t.double()
        got = long_product(elements[:, None].to(torch.float32), t).to(dtype)
        want = torch.from_numpy(carrier.decode(carrier.encode(exact.numpy())))
        assert torch.equal(got.double(), want)


@needs_compiler
def test_long_elements_by_hand_compiled_or_not() -> None:
    """NF4's -0.52507305 times 2.0058594 is nearer to one of two FP16 numbers by 5e-7; e4m20's largest is 2^7 * (2 - 2^-20)."""
    torch._dynamo.reset()
    x = torch.tensor([2.005859375, -1.130859375], dtype=torch.float16)
    exact = 2.005859375 * -0.5250730514526367
    above, below = -1.052734375, -1.0537109375
    assert exact - below < above - exact
    row = torch.tensor([1.625])
    right = float(np.float32(1.625 / (2.0**7 * (2 - 2.0**-20))))
    for how in (lambda f: f, lambda f: torch.compile(f, fullgraph=True)):
        assert how(quantize_scaled)(x, "nf4@block2").tolist() == [2.005859375, below]
        assert how(scales_of)(row, "e4m20@row").group.item() == right


EVERY_BINADE = torch.arange(0, 255 << 23, 1 << 22, dtype=torch.int32)


@pytest.mark.parametrize("rule", E8M0_RULES)
@pytest.mark.parametrize("name", MX)
def test_scale_rules_at_every_power_of_two(name: str, rule: str) -> None:
    """In each binade the power of two, where M bits round up to the next one, the largest element and 1.5 times it, with both
    FP32 neighbours; and FP32's subnormal powers of two."""
    f = scaled_format(f"{name}:{rule}")
    shape = torch.tensor([1.0, f.element.max, 1.5 * f.element.max, 2 - 2.0 ** -significant_bits(f.element)])
    binades = torch.cat([shape.view(torch.int32) & 0x7FFFFF | k << 23 for k in range(0, 255, 1)])
    centres = torch.cat([binades, (2.0 ** torch.arange(-149.0, -126.0)).view(torch.int32)])
    around = (centres[:, None] + torch.arange(-1, 2)).clamp(0, 0x7F7FFFFF).unique()
    x = around.to(torch.int32).view(torch.float32)
    got = scales_of(x[:, None], f).group[:, 0]
    want = [quantize_group([value], f).scale for value in x.tolist()]
    assert got.tolist() == [float(scale) for scale in want if scale is not None]


ALL_BELOW_ONE = [
    "int8q7@block2:e8m0fnu",
    "int8q8@block32:e8m0fnu",
    "e4m3fb30@block4:e8m0fnu",
    "e2m1fb60@block32:e8m0fnu",
]


@pytest.mark.parametrize("rule", E8M0_RULES)
@pytest.mark.parametrize("name", ALL_BELOW_ONE)
def test_scale_rules_at_subnormal_amaxes_where_all_elements_are_below_one(name: str, rule: str) -> None:
    """Scales above 2^-127 then, of the smallest amaxes too: every rule at all of both sides of each subnormal power of two."""
    f = scaled_format(f"{name}:{rule}")
    shape = torch.tensor([1.0, f.element.max, 1.5 * f.element.max, 2 - 2.0 ** -significant_bits(f.element)])
    mantissas = (shape.view(torch.int32) & 0x7FFFFF).double() / 2**23 + 1
    centres = (mantissas[:, None] * 2.0 ** torch.arange(0.0, 25.0, dtype=torch.float64)).round().to(torch.int32)
    around = (centres[..., None] + torch.arange(-2, 3, dtype=torch.int32)).clamp(0, 1 << 25).unique()
    x = around.view(torch.float32)
    got = scales_of(x[:, None], f).group[:, 0]
    assert got.tolist() == [float(quantize_group([value], f).scale or 0) for value in x.tolist()]


@needs_compiler
@pytest.mark.parametrize(
    ("name", "scale", "right"),
    [
        # 3 * 2^-136 asks for 2^-134 / 2^-1, below 2^-127; of that it is 3/4 of int8q7's quantum, 2^-7, and 2^-136 a quarter
        ("int8q7@block2:e8m0fnu:ceil", 2.0**-127, [2.0**-134, 0.0]),
        # e4m3fb30's emax is 15 - 30, and -135 + 15 is no less than -127
        ("e4m3fb30@block4:e8m0fnu", 2.0**-120, [3 * 2.0**-136, 2.0**-136]),
    ],
)
def test_a_subnormal_amax_by_hand_compiled_or_not(name: str, scale: float, right: list[float]) -> None:
    torch._dynamo.reset()
    x = torch.tensor([3 * 2.0**-136, 2.0**-136])
    for how in (quantize_scaled, torch.compile(quantize_scaled, fullgraph=True)):
        assert how(x, name).tolist() == right
    assert scales_of(x, name).group.tolist() == [scale]


@pytest.mark.parametrize("name", ["e4m3fn@row", "e5m2@row", "e2m1fn@row", "e5m10@row", *LONG_LARGEST])
def test_fp32_scales_are_rounded_once(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(0, 0x7F800000, (1000,), generator=generator, dtype=torch.int32)
    tiny = torch.randint(0, 1 << 24, (1000,), generator=generator, dtype=torch.int32)
    x = torch.cat([EVERY_BINADE, random, tiny, torch.arange(2000, dtype=torch.int32)]).view(torch.float32)
    got = scales_of(x[:, None], name).group[:, 0].tolist()
    assert got == [float(quantize_group([value], name).scale or 0) for value in x.tolist()]


@pytest.mark.parametrize(
    ("name", "amax", "scale"),
    [
        ("mxfp4:floor", 128 - 2.0**-17, 16.0),
        ("mxfp4:floor", 128.0, 32.0),
        ("mxfp4:ceil", 128 - 2.0**-17, 32.0),
        ("mxfp4:ceil", 128.0, 32.0),
        ("mxfp4:ceil", 128 + 2.0**-16, 64.0),
        ("mxfp4:rceil", 96.0, 16.0),
        ("mxfp4:rceil", 96 + 2.0**-17, 32.0),
        ("mxfp4:nearest", 144.0, 32.0),
        ("mxfp4:nearest", 144 - 2.0**-16, 16.0),
        ("mxfp4:even", 111.99, 16.0),
        ("mxfp4:even", 112.0, 32.0),
        ("mxfp8_e4m3fn:floor", 448.0, 1.0),
        ("mxfp8_e4m3fn:floor", 511.9, 1.0),
        ("mxfp8_e4m3fn:rceil", 448.0, 1.0),
        ("mxfp8_e4m3fn:rceil", 449.0, 2.0),
        ("mxfp8_e5m2:floor", 57344.0, 1.0),
        ("e4m3fn@tensor", 448.0, 1.0),
        ("e4m3fn@tensor", 1.0, 2.0 * 0x924925 / 2**33),  # 1/448
    ],
)
def test_scales_worked_out_by_hand(name: str, amax: float, scale: float) -> None:
    assert scales_of(torch.tensor([amax, -0.5]), name).group.tolist() == [scale]


def test_nvfp4_worked_out_by_hand() -> None:
    """amax 2688 gives a tensor scale of 1; the second block's 3 / 6 is an E4M3 number."""
    x = torch.zeros(32)
    x[:4] = torch.tensor([2688.0, 1344.0, -100.0, 112.0])
    x[16:20] = torch.tensor([3.0, 0.375, -0.125, 0.13])
    scales = scales_of(x, "nvfp4")
    assert scales.group.tolist() == [448.0, 0.5]
    assert scales.tensor is not None
    assert scales.tensor.item() == 1.0
    want = torch.zeros(32)
    want[:4] = torch.tensor([2688.0, 1344.0, -0.0, 0.0])
    want[16:20] = torch.tensor([3.0, 0.5, -0.0, 0.25])
    assert torch.equal(bits(quantize_scaled(x, "nvfp4")), bits(want))


COMPILED_IN_CI = {
    ("mxfp8_e4m3fn", torch.float32), ("mxfp4:even", torch.bfloat16), ("nvfp4", torch.float32),
    ("e4m3fn@tile16x16", torch.float16), ("e4m3fn@block32", torch.bfloat16),
}  # fmt: skip


@needs_compiler
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=[] if (name, dtype) in COMPILED_IN_CI else pytest.mark.proof)
        for name in ("mxfp8_e4m3fn", "mxfp4:even", "nvfp4", "e4m3fn@tile16x16", "e4m3fn@block32")
        for dtype in DTYPES
    ],
    ids=str,
)
def test_compiled_gives_the_same_bits(name: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(1)
    patterns = torch.randint(-(2**31), 2**31, (64, 64), generator=generator, dtype=torch.int64).to(torch.int32)
    wild = patterns.view(torch.float32)
    x = torch.cat([wild, torch.randn(64, 64, generator=generator), torch.zeros(64, 64)]).to(dtype)
    x[:, 0] = x[:, 0].clamp(-1, 1)
    upper = 0.0123 if name == "nvfp4" else None
    compiled = torch.compile(quantize_scaled, fullgraph=True)(x, name, tensor_scale=upper)
    assert torch.equal(bits(compiled), bits(quantize_scaled(x, name, tensor_scale=upper)))


@needs_compiler
@pytest.mark.parametrize(
    ("name", "rounding"), [("mxint8", "nearest_even"), ("nvfp4", "toward_positive"), ("int16@row", "stochastic")]
)
def test_compiled_gives_the_same_bits_by_the_other_ways(name: str, rounding: str) -> None:
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-(2**15), 2**15, (64, 64), generator=generator, dtype=torch.int16).view(torch.bfloat16)
    compiled = torch.compile(quantize_scaled, fullgraph=True)(x, name, rounding=rounding, seed=3)
    assert torch.equal(bits(compiled), bits(quantize_scaled(x, name, rounding=rounding, seed=3)))
