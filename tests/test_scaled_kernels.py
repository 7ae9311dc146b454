"""The kernels of scaled formats against the plain forms that they must equal: operands bit for bit, products within FP32's sums.

On a GPU in BF16. Elsewhere Triton's interpreter runs the same kernels, where it is asked to:

    TRITON_INTERPRET=1 PYTHONPATH=... python -m pytest tests/test_scaled_kernels.py

It has no BF16 arithmetic, so there tensors are FP32 and hold BF16 values.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from formats import quantize, tensor_amax
from formats.factored import Factored, quantize_factored
from train import products, scaled_layers
from train.hadamard import random_signs, rotate
from train.precision import Precision, pack_precision
from train.resolve import resolve_recipe
from train.scaled_operands import is_served

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
R = 2
SEEDS = (12345678901234567, -987654321)


class Place(NamedTuple):
    """Where kernels run, and the dtype of the tensors there."""

    device: torch.device
    dtype: torch.dtype


CPU = Place(torch.device("cpu"), torch.float32)


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.cuda)])
def place(request: pytest.FixtureRequest) -> Place:
    """Triton's interpreter, and a CUDA device, each with a visible skip."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("no Triton")
    if request.param == "interpreter":
        if not INTERPRETED:
            pytest.skip("TRITON_INTERPRET is not 1")
        return CPU
    if INTERPRETED or not torch.cuda.is_available():
        pytest.skip("no CUDA device, or Triton interprets")
    return Place(torch.device("cuda"), torch.bfloat16)


def values(place: Place, *shape: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    """BF16 numbers of many binades, zeros among them and one whole row and column of zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp2(spread * torch.randn(shape, generator=generator))
    x[..., 0, :] = x[..., :, 1] = 0
    x[..., 1, ::7] = -0.0
    return x.to(torch.bfloat16).to(place.dtype).to(place.device)


def bits(x: Tensor) -> Tensor:
    """For comparisons that tell -0 from 0 and take all NaN for one."""
    return torch.where(x.isnan(), torch.nan, x.to(torch.float32)).view(torch.int32)


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    different = bits(found) != bits(expected)
    assert not different.any(), f"{int(different.sum())} of {found.numel()}, first at {different.nonzero()[0].tolist()}"


def assert_same_operand(found: Factored | None, expected: Factored | None) -> None:
    assert (found is None) == (expected is None)
    if found is None or expected is None:
        return
    assert_same(found.values, expected.values)
    assert (found.factor is None) == (expected.factor is None)
    if found.factor is not None and expected.factor is not None:
        assert_same(found.factor, expected.factor)


# Operands


class Case(NamedTuple):
    """A format, a shape, and what each side is: rounded to nearest or stochastically, rotated or not."""

    name: str
    stochastic: tuple[bool, bool] = (False, False)
    rotated: bool = False
    shape: tuple[int, int] = (64, 96)


CASES = [
    *(Case(f"{name}:{rule}") for name in ("mxfp8_e4m3fn", "mxfp8_e5m2", "mxfp4") for rule in ("floor", "rceil")),
    *(Case(name) for name in ("mxfp6_e2m3fn", "mxfp6_e3m2fn", "mxfp4:even", "mxfp4:nearest", "mxfp8_e4m3fn:ceil")),
    *(Case(name, (True, True)) for name in ("mxfp8_e4m3fn:rceil", "mxfp8_e5m2", "mxfp4:rceil", "mxfp6_e2m3fn")),
    Case("mxfp4:rceil", (False, True), True),
    Case("mxfp8_e4m3fn", shape=(160, 32)),
    Case("nvfp4"),
    Case("nvfp4", (True, True)),
    Case("nvfp4", (False, False), True),
    Case("nvfp4", (True, True), True, (80, 112)),
    Case("nvfp4", (False, True), True),
    Case("e4m3fn@block128", shape=(256, 128)),
    Case("e4m3fn@block128", (True, False), shape=(128, 384)),
    Case("e5m2@block128", shape=(128, 128)),
    Case("e2m1fn@block64", (True, True), shape=(64, 64)),
    Case("e4m3fn@tensor", shape=(50, 37)),
    Case("e5m2@tensor", shape=(33, 70)),
    Case("e5m2@tensor", (True, True), shape=(33, 70)),
]  # fmt: skip


def plain(x: Tensor, case: Case, axis: int, place: Place, scale: Tensor | None) -> Factored:
    """What `products.take` does, of a scale that is given or found."""
    stochastic = case.stochastic[0 if axis == -1 else 1]
    wide = x.to(torch.float32)
    if case.rotated and axis == -2:
        wide = rotate(wide, -2, signs_of(place))
    made = quantize_factored(
        wide, case.name, axis, "stochastic" if stochastic else "nearest_even",
        tensor_scale=scale, seed=seeds_of(place, axis) if stochastic else None, batch_dims=1,
    )  # fmt: skip
    return Factored(made.values.to(place.dtype), made.factor)


def seeds_of(place: Place, axis: int) -> Tensor:
    return torch.tensor(SEEDS, device=place.device) + axis * 7919


def signs_of(place: Place) -> Tensor:
    return random_signs(torch.tensor(SEEDS, device=place.device), 16)


def take_both(
    x: Tensor, case: Case, place: Place, scales: list[Tensor | None], sides: tuple[bool, bool]
) -> list[Factored]:
    """The kernel's two operands, of those sides that are asked for."""
    elements = scaled_layers.elements_of(case.name)
    assert elements is not None
    seeds = [seeds_of(place, axis) if it else None for axis, it in zip((-1, -2), case.stochastic, strict=True)]
    signs = signs_of(place) if case.rotated else None
    k, m, factor_k, factor_m = scaled_layers.take_both(x, case.name, *sides, *scales, *seeds, signs, place.dtype)
    from_groups = elements.scale == "fp32"
    return [Factored(k, factor_k if from_groups else None), Factored(m, factor_m if from_groups else None)]


def check(x: Tensor, case: Case, place: Place, given: list[Tensor | None] | None = None) -> None:
    found = [plain(x, case, axis, place, None if given is None else given[i]) for i, axis in enumerate((-1, -2))]
    has_scale = bool(scaled_layers.whole_tensor_limit(case.name))
    scales = [f.factor.flatten() if has_scale and f.factor is not None else None for f in found]
    for sides in ((True, True), (True, False), (False, True)):
        for i, ours in enumerate(take_both(x, case, place, scales, sides)):
            if sides[i]:
                assert_same_operand(ours, Factored(found[i].values, None if has_scale else found[i].factor))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_operands_are_the_plain_forms_bits(place: Place, case: Case) -> None:
    check(values(place, R, *case.shape, seed=1), case, place)


@pytest.mark.parametrize("case", [c for c in CASES if not any(c.stochastic)], ids=str)
def test_operands_on_and_beside_decision_points(place: Place, case: Case) -> None:
    """Of whole elements, middles between them and FP32 neighbours of both, in one group with the largest."""
    elements = scaled_layers.elements_of(case.name)
    assert elements is not None
    half = torch.arange(-64, 65, dtype=torch.float32) / 8
    near = torch.cat([half, *(half.nextafter(torch.tensor(to)) for to in (-torch.inf, torch.inf))])
    M, K = case.shape
    x = near[torch.arange(R * M * K) * 41 % near.numel()].view(R, M, K)
    x = x * torch.exp2((torch.arange(M) % 5 - 2).float())[:, None]
    check(x.to(place.device), case, place)


@pytest.mark.parametrize("name", ["mxfp8_e4m3fn", "mxfp8_e5m2:rceil", "nvfp4", "e4m3fn@block128", "e5m2@tensor"])
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("exponent", [-126, -133, 126])
def test_operands_at_the_ends_of_bf16(place: Place, name: str, stochastic: bool, exponent: int) -> None:
    x = values(place, R, 128, 128, seed=2, spread=0.5).to(torch.float32) * 2.0**-8
    x = (x * 2.0 ** (exponent // 2) * 2.0 ** (exponent - exponent // 2) * 2.0**8).clamp(-3.38e38, 3.38e38)
    check(x.to(place.dtype), Case(name, (stochastic, stochastic)), place)


@pytest.mark.parametrize("name", ["mxfp4", "e4m3fn@block128"])
@pytest.mark.parametrize("stochastic", [False, True])
def test_a_group_with_an_infinity_or_a_nan_has_no_scale(place: Place, name: str, stochastic: bool) -> None:
    """NaN in the values or in the factor, as the plain form has it; of a factor that is NaN the values are anything."""
    x = values(place, R, 128, 128, seed=3)
    x[0, 5, 9], x[1, 70, 100] = torch.inf, torch.nan
    case = Case(name, (stochastic, stochastic))
    for axis, ours in zip((-1, -2), take_both(x, case, place, [None, None], (True, True)), strict=True):
        expected = plain(x, case, axis, place, None)
        whole = [products.whole(f, 128, axis) for f in (ours, expected)]
        assert whole[1].isnan().any()
        assert_same(*whole)


@pytest.mark.parametrize("case", [c for c in CASES if any(c.stochastic) and not c.name.startswith("mx")], ids=str)
@pytest.mark.parametrize("always", [True, False])
def test_stochastic_decisions_in_fp64_and_in_fp32_are_the_same(
    place: Place, case: Case, always: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them left in doubt, to be made again; and none: of so few elements hardly one is as near as that."""
    from train import operand_kernels

    elements = scaled_layers.elements_of(case.name)
    assert elements is not None
    monkeypatch.setattr(operand_kernels, "DOUBT", (1 << 22) >> (23 - elements.magic) if always else 0)
    check(values(place, R, *case.shape, seed=15), case, place)


@pytest.mark.parametrize("name", ["nvfp4", "e4m3fn@tensor"])
@pytest.mark.parametrize("wrong", [2.0**-12, -(2.0**-12)])
def test_a_tile_with_a_decision_in_doubt_is_done_again(
    name: str, wrong: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With quotients wrong by 2^-12 one decision in some thousand is another; half of these small tiles have one in doubt."""
    if not INTERPRETED:
        pytest.skip("TRITON_INTERPRET is not 1, and only the interpreter takes another quotient")
    from train import operand_kernels, rounding_kernels

    quotient = rounding_kernels._quotient
    monkeypatch.setattr(rounding_kernels, "_quotient", lambda *args: quotient(*args) * (1 + wrong))
    monkeypatch.setattr(operand_kernels, "TILES", {16: (16, 16, 1)})
    x, case = values(CPU, R, 128, 64, seed=21), Case(name, (True, True))
    monkeypatch.setattr(operand_kernels, "DOUBT", 0)
    with pytest.raises(AssertionError):
        check(x, case, CPU)
    monkeypatch.setattr(operand_kernels, "DOUBT", (1 << 12) + 16)
    check(x, case, CPU)


def test_a_nan_outlives_a_scale_that_was_given(place: Place) -> None:
    x = values(place, R, 40, 24, seed=4)
    x[0, 3, 3], x[1, 4, 4] = torch.nan, -torch.inf
    given: list[Tensor | None] = [torch.tensor([0.37, 1.9], device=place.device)] * 2
    check(x, Case("e4m3fn@tensor"), place, given)
    check(x, Case("e5m2@tensor", (True, True)), place, given)


def test_one_runs_bits_do_not_depend_on_its_neighbours(place: Place) -> None:
    """The second run alone, in a pack of one, with its own seed and signs."""
    x = values(place, R, 64, 64, seed=5)
    seed, signs = seeds_of(place, -2), signs_of(place)
    scale = torch.tensor([0.01, 0.02], device=place.device)
    both = scaled_layers.take_both(x, "nvfp4", True, True, scale, scale, seed, seed, signs, place.dtype)
    alone = scaled_layers.take_both(
        x[1:], "nvfp4", True, True, scale[1:], scale[1:], seed[1:], seed[1:], signs[1:], place.dtype
    )
    for a, b in zip(both[:2], alone[:2], strict=True):
        assert_same(a[1:], b)


@pytest.mark.parametrize("shape", [(64, 96), (272, 130), (16, 1)])
def test_amax_is_that_of_the_tensor_and_of_its_rotation(place: Place, shape: tuple[int, int]) -> None:
    x = values(place, R, *shape, seed=6) if min(shape) > 1 else torch.ones(R, *shape).to(place.dtype).to(place.device)
    signs = signs_of(place)
    found = scaled_layers.amax(x, signs)
    assert_same(found[:, 0], tensor_amax(x, 1))
    assert_same(found[:, 1], tensor_amax(rotate(x.to(torch.float32), -2, signs), 1))
    assert_same(scaled_layers.amax(x[:, :13], None)[:, 1], tensor_amax(x[:, :13], 1))
    x[1, 5, 0], x[1, 2, 0] = torch.nan, torch.inf
    assert scaled_layers.amax(x, None)[1].isnan().all()


# Products


class Size(NamedTuple):
    """M, N, K; the axes that each factor varies on (rows or columns, chunks), None for no factor; and a chunk's terms."""

    M: int
    N: int
    K: int
    a: tuple[bool, bool] | None = (False, False)
    b: tuple[bool, bool] | None = (False, False)
    chunk: int = 0


SIZES = [
    Size(64, 64, 64),
    Size(130, 70, 90),
    Size(130, 258, 100, (True, False), (True, False)),
    Size(33, 17, 40, None, (True, False)),
    Size(33, 17, 40, (True, False), None),
    Size(33, 17, 40, None, None),
    Size(130, 70, 384, (True, True), (True, True), 128),
    Size(40, 140, 300, (True, True), (False, True), 128),
    Size(40, 40, 300, (True, True), None, 128),
    Size(40, 40, 300, None, (True, True), 128),
    Size(40, 40, 300, (False, False), (True, True), 128),
    Size(40, 40, 200, (True, True), (True, True), 32),
    Size(40, 40, 600, (True, True), (True, True), 256),
    Size(40, 24, 100, (True, False), (True, False), 128),
    Size(48, 80, 4100, (True, False), (True, False)),
    Size(48, 80, 4100, (True, True), (True, True), 128),
]
FEW_BITS = "e3m1"


def operands(place: Place, s: Size, transposed: tuple[bool, bool], few: bool) -> tuple[Factored, Factored]:
    """BF16 values and factors; of few bits each, powers of two for factors, so that every sum is exact."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator)
        return (quantize(x, FEW_BITS) if few else x).to(torch.bfloat16).to(place.dtype).to(place.device)

    def factor(axes: tuple[bool, bool] | None, size: int) -> Tensor | None:
        if axes is None:
            return None
        chunks = -(-s.K // s.chunk) if s.chunk and s.chunk < s.K and axes[1] else 1
        x = torch.randn(R, size if axes[0] else 1, chunks, generator=generator)
        x = torch.exp2(x.sign()) if few else 0.1 + x.abs()
        return x.to(place.device)

    a = normal(R, s.K, s.M).mT if transposed[0] else normal(R, s.M, s.K)
    b = normal(R, s.N, s.K).mT if transposed[1] else normal(R, s.K, s.N)
    b_factor = factor(s.b, s.N)
    return Factored(a, factor(s.a, s.M)), Factored(b, None if b_factor is None else b_factor.mT)


def exact_product(a: Factored, b: Factored, chunk: int) -> Tensor:
    """Every term in FP64, the factors' FP32 product among it."""
    K = a.values.shape[2]

    def along(factor: Tensor | None, axis: int) -> Tensor | float:
        if factor is None:
            return 1.0
        if factor.shape[axis] == 1:
            return factor
        return factor.repeat_interleave(chunk, axis).narrow(axis, 0, K)

    x, y = a.values.double()[..., None], b.values.double()[:, None]
    f, g = along(a.factor, 2), along(b.factor, 1)
    f = f[..., None] if isinstance(f, Tensor) else f
    g = g[:, None] if isinstance(g, Tensor) else g
    total: Tensor = (x * y * (f * g)).sum(2)
    return total


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True)], ids=["ab", "aTb", "abT"])
def test_products_of_few_bits_are_exact(place: Place, size: Size, transposed: tuple[bool, bool]) -> None:
    """No sum rounds, in whatever order: so all terms and factors are there, each once."""
    a, b = operands(place, size, transposed, few=True)
    y = scaled_layers.scaled_matmul(a.values, b.values, a.factor, b.factor, size.chunk, torch.float32)
    assert_same(y, exact_product(a, b, size.chunk).float())
    # The interpreter converts to BF16 by cutting bits off, so only a GPU says how the result is rounded.
    if place.device.type == "cuda":
        narrow = scaled_layers.scaled_matmul(a.values, b.values, a.factor, b.factor, size.chunk, torch.bfloat16)
        assert_same(narrow, y.to(torch.bfloat16))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products_are_right_to_fp32s_sums_and_always_the_same(place: Place, size: Size) -> None:
    """Each of K sums and two products rounds by at most 2^-24 of the sum of magnitudes, tensor cores by twice that: they cut."""
    a, b = operands(place, size, (True, False), few=False)
    args = (a.values, b.values, a.factor, b.factor, size.chunk, torch.float32)
    y = scaled_layers.scaled_matmul(*args)
    magnitudes = [Factored(f.values.abs(), f.factor) for f in (a, b)]
    bound = (size.K + 3) * 2.0**-23 * exact_product(magnitudes[0], magnitudes[1], size.chunk)
    assert ((y - exact_product(a, b, size.chunk)).abs() <= bound).all()
    assert torch.equal(y, scaled_layers.scaled_matmul(*args))
    for r in range(R):
        alone = scaled_layers.scaled_matmul(
            *(f if f is None else f[r : r + 1] for f in args[:4]), size.chunk, torch.float32
        )
        assert torch.equal(alone[0], y[r])


def test_a_chunk_that_is_no_whole_steps_is_refused(place: Place) -> None:
    x, f = torch.ones(1, 96, 96, device=place.device, dtype=place.dtype), torch.ones(1, 96, 2, device=place.device)
    with pytest.raises(ValueError, match="got 48"):
        scaled_layers.scaled_matmul(x, x, f, None, 48, torch.float32)


# In recipes


def precision_of(recipe: str, place: Place, kernels: bool) -> Precision:
    linear = resolve_recipe(recipe).body
    precision = pack_precision([linear] * R, place.device)
    seeds = torch.tensor(SEEDS, device=place.device)
    rules = linear.structure.rules
    assert rules is not None
    signs = random_signs(seeds, rules.hadamard) if rules.hadamard else None
    scales = torch.tensor([[0.5, 1.0, 0.25], [0.1, 0.2, 0.3]], device=place.device) if rules.is_delayed else None
    return precision._replace(seed=seeds, signs=signs, scales=scales, kernels=kernels)


RECIPES = [
    "fp8-hybrid",
    "fp8-hybrid-delayed",
    "deepseek",
    "mxfp8",
    "mxfp8-floor",
    "mxfp6",
    "mxfp4-all",
    "nvfp4",
    "nvfp4-nearest",
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipes_activations_and_gradients_are_the_same_by_kernel(place: Place, recipe: str) -> None:
    by_hand, without = (precision_of(recipe, place, kernels) for kernels in (True, False))
    assert by_hand.plan is not None
    x = values(place, R, 128, 256, seed=8)
    assert is_served(x, by_hand.plan.forward.first, -1, by_hand)
    assert is_served(x, by_hand.plan.wgrad.second, -2, by_hand)

    def taken(p: Precision) -> list[Factored | None]:
        training, gradient = products.take_activation(x, p, 3, training=True), products.take_gradient(x, p, 3)
        return [*training, *gradient, *products.take_activation(x, p, 3, training=False)]

    for found, expected in zip(taken(by_hand), taken(without), strict=True):
        assert_same_operand(found, expected)


@pytest.mark.parametrize(("recipe", "shape"), [("mxfp8", (128, 80)), ("mxfp4", (128, 128)), ("int8", (128, 128))])
def test_what_no_kernel_serves_takes_the_plain_form(place: Place, recipe: str, shape: tuple[int, int]) -> None:
    """Groups that are not whole, rotations of 64, integers."""
    by_hand = precision_of(recipe, place, True)
    assert by_hand.plan is not None
    x = values(place, R, *shape, seed=9)
    assert not is_served(x, by_hand.plan.wgrad.first, -2, by_hand) or shape[1] % 32
    for a, b in zip(
        products.take_gradient(x, by_hand, 1),
        products.take_gradient(x, by_hand._replace(kernels=False), 1),
        strict=True,
    ):
        assert_same(a.values, b.values)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipes_compiled_operands_are_the_same(place: Place, recipe: str) -> None:
    """In one graph: the compiler sees operations, and constants by a format's name."""
    precision = precision_of(recipe, place, True)
    x = values(place, R, 128, 256, seed=16)

    def taken(x: Tensor) -> list[Tensor | None]:
        pairs = (*products.take_activation(x, precision, 3, training=True), *products.take_gradient(x, precision, 3))
        return [t for pair in pairs if pair is not None for t in pair]

    torch._dynamo.reset()
    for found, expected in zip(torch.compile(taken, backend="aot_eager", fullgraph=True)(x), taken(x), strict=True):
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:
            assert_same(found, expected)


def test_operations_are_what_the_compiler_is_told(place: Place) -> None:
    x, signs, seeds = values(place, R, 128, 256, seed=17), signs_of(place), seeds_of(place, -1)
    scale, factor = torch.tensor([0.1, 0.2], device=place.device), torch.rand(R, 128, 2, device=place.device)
    checks: list[tuple[Any, tuple[Any, ...]]] = [
        (scaled_layers.take_both, (x, "nvfp4", True, True, scale, scale, seeds, seeds, signs, place.dtype)),
        (scaled_layers.take_both, (x, "e4m3fn@block128", True, False, None, None, None, None, None, place.dtype)),
        (scaled_layers.amax, (x, signs)),
        (scaled_layers.amax, (x, None)),
        (scaled_layers.scaled_matmul, (x, x.mT, factor, factor.mT, 128, torch.float32)),
    ]
    for operation, args in checks:
        torch.library.opcheck(operation, args)


@pytest.mark.parametrize("recipe", ["fp8-hybrid", "deepseek", "nvfp4", "fp8-hybrid-row", "mxfp8"])
def test_what_products_ask_of_their_kernel(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Triton: a stand-in that multiplies as the plain form does, on BF16's values, and what it was asked for."""
    cpu = Place(torch.device("cpu"), torch.bfloat16)
    by_hand = precision_of(recipe, cpu, True)._replace(carrier=torch.bfloat16)
    asked: list[tuple[int, torch.dtype]] = []

    def stand_in(a: Tensor, b: Tensor, f: Tensor | None, g: Tensor | None, chunk: int, dtype: torch.dtype) -> Tensor:
        asked.append((chunk, dtype))
        whole = [products.whole(Factored(*pair), chunk, axis).double() for pair, axis in (((a, f), -1), ((b, g), -2))]
        return torch.matmul(*whole).to(dtype)

    monkeypatch.setattr(products, "scaled_matmul", stand_in)
    monkeypatch.setattr(products, "is_served", lambda *_: False)
    x, dy = values(cpu, R, 256, 256, seed=18, spread=0), values(cpu, R, 256, 128, seed=19, spread=0)
    w = values(cpu, R, 256, 128, seed=20, spread=0).float()
    results = []
    for precision in (by_hand, by_hand._replace(carrier=torch.float32, kernels=False)):
        leaves = [x.to(precision.carrier).requires_grad_(), w.clone().requires_grad_()]
        y = products.product_by_rules(leaves[0], leaves[1], precision)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, dy.to(precision.carrier))])
    chunks = {"deepseek": [128, 0, 128], "mxfp8": []}.get(recipe, [0, 0, 0])
    assert asked == [(chunk, torch.bfloat16) for chunk in chunks]
    for ours, theirs in zip(*results, strict=True):
        assert float((ours - theirs).float().norm() / theirs.float().norm()) < 2**-8


@pytest.mark.cuda
@pytest.mark.parametrize("recipe", ["fp8-hybrid", "deepseek", "mxfp8", "nvfp4"])
def test_a_recipes_linear_layer_is_the_same_by_kernel(cuda: torch.device, recipe: str) -> None:
    """Output and both gradients: the operands are the same, and results BF16 of sums in another order."""
    place = Place(cuda, torch.bfloat16)
    x, dy = values(place, R, 512, 256, seed=10, spread=0), values(place, R, 512, 384, seed=11, spread=0)
    w = values(place, R, 256, 384, seed=12, spread=0).float()
    results = []
    for kernels in (True, False):
        precision = precision_of(recipe, place, kernels)
        leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
        y = products.product_by_rules(leaves[0], leaves[1], precision)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, dy)])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert float((ours - theirs).float().norm() / theirs.float().norm()) < 2**-8


@pytest.mark.parametrize("recipe", ["fp8-hybrid", "deepseek", "nvfp4"])
def test_a_compiled_layer_has_the_bits_of_an_eager_one(device: torch.device, recipe: str) -> None:
    """By kernels and generated code on a GPU; on a CPU, as the compiler sees it."""
    place = Place(device, torch.bfloat16)
    precision = precision_of(recipe, place, device.type == "cuda")
    x, w = values(place, R, 256, 256, seed=13, spread=0), values(place, R, 256, 384, seed=14, spread=0).float()
    torch._dynamo.reset()
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(products.product_by_rules, dynamic=False, backend=backend)
    with torch.no_grad():
        assert torch.equal(compiled(x, w, precision), products.product_by_rules(x, w, precision))


def test_kernels_are_off_where_nobody_asks_for_them() -> None:
    precision = pack_precision([resolve_recipe("mxfp8").body], torch.device("cpu"))
    assert not precision.kernels


def test_no_kernel_rounds_where_subnormal_amaxes_have_scales_of_their_own() -> None:
    """The kernels' power of two is exact for elements that reach 1; those of e2m1fb60 end below 2^-50."""
    assert scaled_layers.kernel_group("e2m1fb60@block32:e8m0fnu", "nearest_even", "saturate") == 0
    assert scaled_layers.kernel_group("e2m1fb60@block32", "nearest_even", "saturate") == 32
    assert scaled_layers.kernel_group("mxfp4", "nearest_even", "saturate") == 32
