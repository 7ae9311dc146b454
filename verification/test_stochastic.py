"""Stochastic rounding: every threshold of every interval for few bits, the distribution for many, and where the bits come from.

For a fixed random number a stochastic rounding is a step function with one step in each interval between neighbours, which the
oracle works out from P3109's inequalities. So being right at each step, just below and just above it, for every random number
of N bits is a proof for N bits, if the quantiser is monotone.
"""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom, chisquare

from formats import element_format, float_format, format_parameters, grid_format, quantize, round_exact
from formats.random_bits import keys, random_bits
from verification import oracle, verify
from verification.points import from_codes
from verification.test_conditional import needs_compiler, needs_cuda

MODES = ["stochastic_a", "stochastic_b", "stochastic_c"]
NAMES = [
    "e4m3fn",
    "e5m2fnuz",
    "e8m0fnu",
    "e2m1fn",
    "int8",
    "nf4",
    "posit8",
    "binary8p4ue",
    "e3m2-nosub",
    "e4m3fnb8",
    "binary6p1se",
]
ALPHA = (
    1e-9  # of each distribution test: with seeds fixed they do not flicker, and this says how lucky a wrong one must be
)
DTYPES: dict[torch.dtype, Any] = {torch.float32: np.float32, torch.float64: np.float64}


def steps(name: str, mode: str, bits: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs below, at and above each threshold of each interval for each random number, and those numbers."""
    f = element_format(name)
    values = oracle.finite_values(f)
    low, high = values[:-1], values[1:]
    inner, outer = np.where(high <= 0, high, low), np.where(high <= 0, low, high)
    random = np.arange(2**bits)[:, None]
    thresholds, _ = oracle.threshold_of(mode, inner, outer, random, bits)
    near = thresholds.astype(DTYPES[dtype])
    infinity = DTYPES[dtype](np.inf)
    beside = np.stack(
        [
            np.nextafter(near, -infinity),
            near,
            np.nextafter(near, infinity),
            np.broadcast_to(low.astype(near.dtype), near.shape),
        ]
    )
    numbers = np.broadcast_to(random, near.shape)
    x = torch.from_numpy(beside.reshape(-1))
    return x, torch.from_numpy(np.broadcast_to(numbers, beside.shape).reshape(-1).astype(np.int32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_every_threshold_of_every_interval(name: str, mode: str, dtype: torch.dtype) -> None:
    f = element_format(name)
    for bits in range(1, 9):
        x, random = steps(name, mode, bits, dtype)
        got = quantize(x, f, mode, random_bits=random, stochastic_bits=bits).double().numpy()
        want = oracle.expected(f, mode, x.double().numpy(), random=random.numpy().astype(np.int64), random_width=bits)
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(np.signbit(got), np.signbit(want))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [16, 22, 23, 24, 32])
def test_many_bits_at_random(mode: str, bits: int) -> None:
    """Fewer, as many and more than FP32's: in FP32's own steps, and through FP64."""
    generator = np.random.default_rng(bits)
    for name in ("e4m3fn", "e5m2", "e8m0fnu", "bf16", "fp16", "int8", "binary8p4ue", "e3m2-nosub", "e8m7fnuz"):
        f = element_format(name)
        patterns = generator.integers(0, 2**32, 1 << 14)
        near = np.abs(generator.choice(oracle.finite_values(f), 1 << 14)) * generator.uniform(0.5, 2, 1 << 14)
        for x in (
            from_codes(patterns, torch.float32),
            torch.from_numpy(near).float(),
            torch.from_numpy(near * 2.0**-20),
        ):
            random = generator.integers(0, 2**bits, len(x))
            got = quantize(x, f, mode, random_bits=torch.from_numpy(random), stochastic_bits=bits).double().numpy()
            want = oracle.expected(f, mode, x.double().numpy(), random=random, random_width=bits)
            np.testing.assert_array_equal(got, want, err_msg=name)


@pytest.mark.parametrize("name", ["e4m3fn", "e8m0fnu", "int8", "nf4", "posit16", "bf16", "e3m2-nosub"])
@pytest.mark.parametrize("mode", MODES)
def test_values_are_never_bumped(name: str, mode: str) -> None:
    f = element_format(name)
    x = torch.from_numpy(f.grid().copy())
    for random in (0, 2**22 - 1, 2**22 // 2):
        same = quantize(x, f, mode, random_bits=torch.tensor(random), stochastic_bits=22)
        assert torch.equal(same, x)


def test_two_values_without_zero_between_them() -> None:
    """However near to zero x lies, it is on one side of the middle."""
    signs = grid_format("signs", [-1, 1])
    x = torch.tensor([2.0**-100, -(2.0**-100), 0.0, 2.0**-149], dtype=torch.float32)
    for mode in MODES:
        for random in range(4):
            got = quantize(x, signs, mode, random_bits=torch.tensor(random), stochastic_bits=2).double().numpy()
            numbers = np.full(4, random)
            want = oracle.expected(signs, mode, x.double().numpy(), random=numbers, random_width=2)
            np.testing.assert_array_equal(got, want)
            exact = [round_exact(float(v), signs, mode, random_bits=random, stochastic_bits=2) for v in x]
            np.testing.assert_array_equal(got, [float(v) for v in exact])


def test_a_batch_of_formats_takes_random_bits_too() -> None:
    names = ["e4m3fn", "e5m2", "bf16", "e8m3", "fp32"]
    x = torch.randn(len(names), 4096, generator=torch.Generator().manual_seed(0)) * 0.01
    seed = torch.arange(len(names)) + 5
    for mode in MODES:
        for bits in (3, 16, 22):
            got = quantize(x, format_parameters(names, ndim=2), mode, seed=seed, stochastic_bits=bits)
            for row, name in enumerate(names):
                alone = quantize(x[row], name, mode, seed=int(seed[row]), stochastic_bits=bits)
                assert torch.equal(got[row], alone), (mode, bits, name)


@pytest.mark.parametrize("x", [0.3, -1.07, 0.001, 300.0])
def test_the_mean_is_the_value(x: float) -> None:
    """A binomial count of 2^20 roundings of one number, against its share of the way: two-sided, at ALPHA."""
    n = 1 << 20
    exact = float(np.float32(x))
    got = quantize(torch.full((n,), x), "e4m3fn", "stochastic", seed=7).double().numpy()
    low, high = np.unique(got)
    share = (exact - low) / (high - low)
    count = int((got == high).sum())
    assert binom.ppf(ALPHA / 2, n, share) <= count <= binom.isf(ALPHA / 2, n, share)


def test_random_bits_are_the_documented_function() -> None:
    for seed in (0, 1, -1, 2**63 + 12345, 987654321987654321):
        for bits in (1, 8, 23, 31, 32):
            got = random_bits(seed, (3, 50), bits).reshape(-1).tolist()
            assert got == [documented(seed, i, bits) for i in range(150)]


def documented(seed: int, index: int, bits: int) -> int:
    """The formula of formats.random_bits in plain integers."""
    m64, m32 = (1 << 64) - 1, (1 << 32) - 1
    z = (seed + 0x9E3779B97F4A7C15) & m64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & m64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & m64
    z ^= z >> 31
    k0, k1 = z & m32, z >> 32
    h = (((index & m32) ^ k0) * 0x21F0AAAD) & m32
    h = ((h ^ (h >> 16)) + k1 + (index >> 32) * 0x9E3779B1) & m32
    h = (h * 0x735A2D97) & m32
    h = ((h ^ (h >> 15)) * 0x2C1B3C6D) & m32
    return h >> (32 - bits)


def test_bits_depend_on_the_runs_seed_and_the_element_alone() -> None:
    seeds = torch.tensor([11, -5, 2**62])
    packed = random_bits(seeds, (3, 4, 5), 23)
    for row, seed in enumerate(seeds.tolist()):
        assert torch.equal(packed[row], random_bits(seed, (4, 5), 23))
    swapped = random_bits(seeds.flip(0), (3, 4, 5), 23)
    assert torch.equal(swapped.flip(0), packed)
    assert torch.equal(random_bits(seeds.reshape(3, 1, 1), (3, 4, 5), 23), packed)
    assert torch.equal(random_bits(torch.tensor(11), (4, 5), 23), packed[0])
    assert keys(11) != keys(12)


def test_bits_are_spread_evenly_and_neighbours_are_strangers() -> None:
    """Chi-square of bytes, and of the exclusive-or of neighbouring indices and of neighbouring seeds, each at ALPHA."""
    n = 1 << 20
    first, second = random_bits(1, (n,), 32).numpy(), random_bits(2, (n,), 32).numpy()
    for name, words in {"words": first, "indices": first[1:] ^ first[:-1], "seeds": first ^ second}.items():
        for shift in (0, 8, 16, 24):
            counts = np.bincount((words >> shift) & 255, minlength=256)
            assert chisquare(counts).pvalue > ALPHA, (name, shift)
    flips = np.array(
        [
            [(documented(3, i, 32) ^ documented(3, i ^ (1 << bit), 32)).bit_count() for i in range(500)]
            for bit in range(32)
        ]
    )
    assert abs(flips.mean() - 16) < 0.5, "half of the bits change with any bit of the index"


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=needs_compiler), pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize("name", ["e4m3fn", "nf4"])
def test_compiled_and_on_a_gpu_the_same(name: str, device: str) -> None:
    x = torch.randn(4, 3000, generator=torch.Generator().manual_seed(1)) * 0.1
    seed = torch.arange(4) * 1000
    eager = quantize(x, name, "stochastic", seed=seed)
    torch._dynamo.reset()
    program = torch.compile(lambda x, seed: quantize(x, name, "stochastic", seed=seed), fullgraph=True)
    assert torch.equal(program(x.to(device), seed.to(device)).cpu(), eager)
    assert torch.equal(quantize(x.to(device), name, "stochastic", seed=seed.to(device)).cpu(), eager)


def test_fp64_is_never_rounded_by_way_of_fp32() -> None:
    """Middles plus and minus 2^-40 of themselves, which FP32 would turn into ties."""
    for name in ("e4m3fn", "e5m2", "bf16", "fp16", "e2m1fn", "e8m0fnu", "int8", "tf32"):
        f = float_format(name) if name != "int8" else element_format(name)
        middles = oracle.table(f).middles
        for factor in (1 + 2.0**-40, 1 - 2.0**-40):
            x = middles * factor
            got = quantize(torch.from_numpy(x), f).numpy()
            np.testing.assert_array_equal(got, oracle.expected(f, "nearest_even", x))


def test_the_judge_of_chance_where_the_dtype_has_nothing_between_two_values() -> None:
    """BF16 numbers to BF16: nothing is rounded, and what has to stay is judged all the same."""
    report = verify(lambda x: quantize(x, "bf16"), "bf16", "stochastic", input_dtype=torch.bfloat16)
    assert report.passed, str(report)
    assert {law: report.law(law).verdict for law in ("rounding", "on_grid", "unbiased", "idempotent")} == {
        "rounding": "not applicable", "on_grid": "not applicable", "unbiased": "not applicable", "idempotent": "pass"
    }  # fmt: skip
    moved = verify(lambda x: x * 2, "bf16", "stochastic", input_dtype=torch.bfloat16)
    assert not moved.passed
    assert moved.law("idempotent").verdict == "fail"
