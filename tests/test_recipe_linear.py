"""Every recipe's linear layer, forward and both gradients, against `tests.reference_linear`: exactly, or within derived bounds.

What is not stochastic is known up to the order of FP32's sums. Of stochastic operands the reference knows the two neighbours
but not the bits: results lie between, on one of the two where a sum has one term, and on average where they should.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from formats import get_format
from formats.scaled import ScaledFormat
from formats.scaled_reference import quantize_group, reference_tensor_scale
from tests.reference_linear import (
    CONTRACTED,
    EXPECTED,
    PRODUCTS,
    Bounds,
    operand,
    quantised,
    reference_products,
    rotated,
    rotated_back,
    rule_of,
)
from train.linear import linear, product
from train.named_recipes import NAMED
from train.operands import Product
from train.precision import Precision, pack_precision
from train.recipe import LinearPrecision
from train.recipe_table import ProductTable, RecipeTable
from train.resolve import resolve_recipe

CPU = torch.device("cpu")
PHASES = (Phase.explicit, Phase.generate)
SMALL = settings(max_examples=10, derandomize=True, database=None, phases=PHASES)
Singles = NDArray[np.float32]
SIGNS = np.array([-1, 1], np.float32)


# The recipes: one for each of two runs.


def table(a: str, w: str | None = None, g: str | None = None, **words: Any) -> RecipeTable:
    return RecipeTable(a, w or a, g or w or a, **words)


def wide(name: str) -> RecipeTable:
    return RecipeTable(base=name, output="fp32")


MIXED = {
    "forward": ProductTable(activation="nvfp4"),
    "dgrad": ProductTable(weight="mxfp8_e5m2:rceil", rounding="toward_zero"),
    "wgrad": ProductTable(activation="bf16", gradient="e5m2@row"),
}
TABLES = {
    "fp8 in fp32": table("e4m3fn", "e4m3fn", "e5m2", output="fp32"),
    "int8 unscaled": table("int8"),
    "mxint8": table("mxint8"),
    "mxint8:even in fp32": table("mxint8:even", output="fp32"),
    "mxfp8_e5m2:nearest": table("mxfp8_e5m2:nearest"),
    "mxfp6_e2m3fn:ceil": table("mxfp6_e2m3fn:ceil"),
    "nf4 blocks": table("nf4@block16"),
    "posit8": table("posit8"),
    **{f"{name} in fp32": wide(name) for name in (
        "fp8-hybrid", "fp8-row", "mxfp8", "nvfp4-nearest", "deepseek", "int8-switchback", "mxfp4", "nvfp4",
    )},
    "per product": table("e4m3fn", "e4m3fn", "e5m2", **MIXED),
    "per product, other formats": table("e3m2f", "e2m3f", "e3m1", **MIXED),
    "per product in fp32": table("e4m3fn", "e4m3fn", "e5m2", output="fp32", **MIXED),
    "a rounding each": table(
        "e4m3fn@row", "e3m4@block12", "mxfp8_e5m2",
        activation_rounding="toward_zero", weight_rounding="to_odd", gradient_rounding="nearest_away",
    ),
    "blocks and tiles": table("e4m3fn@block12", "e4m3fn@tile8x8", "e5m2@block20"),
    "tiles of a gradient": table("e4m3fn@tile4x10", "e4m3fn@tile6x6", "e5m2@tile3x2"),
    "power-of-two tiles": table("e4m3fn@tile2x8:e8m0fnu", "e3m2f@tile5x5:e8m0fnu:ceil", "e5m2@row:e8m0fnu"),
    "everything rotated": table(
        "e4m3fn@block12", "e4m3fn@tile4x4", "nvfp4", hadamard=("forward", "dgrad", "wgrad"), hadamard_size=8,
    ),
    "all rotated in fp32": table(
        "mxfp8_e4m3fn:rceil", "e4m3fn@tensor", "e5m2@row", hadamard=("forward", "dgrad", "wgrad"), hadamard_size=16,
        output="fp32",
    ),
    "rotated and rounded up": table("mxfp4:rceil", rounding="toward_positive", hadamard=("forward", "wgrad"), hadamard_size=4),
    "unscaled and rotated": table("e4m3fn", "e3m2f", "e5m2", hadamard=("forward", "wgrad"), hadamard_size=2),
    "nvfp4 delayed": RecipeTable(base="nvfp4-nearest", delayed=4, hadamard=("wgrad",), hadamard_size=4),
    "nvfp4 delayed, stochastic": RecipeTable(base="nvfp4", delayed=4),
    "int8 delayed": table("int8@tensor", "int8@row", delayed=1, output="fp32"),
    "fp8 rows, all stochastic": table("e4m3fn@row", "e4m3fn@row", "e5m2@row", rounding="stochastic", output="fp32"),
    "mxfp4 halves": table("mxfp4:rceil", rounding="stochastic_b"),
    "stochastic in fp32": table("e4m3fn", "e3m2f", "e5m2", rounding="stochastic", output="fp32"),
    "stochastic fp16 in fp32": table("fp16", rounding="stochastic", output="fp32"),
    "stochastic e4m9 in fp32": table("e4m9", rounding="stochastic", output="fp32"),
    "summed short": table("e4m3fn", "e3m2f", "e5m2", accumulate="k8p9f16:nearest_even"),
    "hopper, one scale": RecipeTable(base="fp8-hybrid", accumulate="hopper-fp8"),
    "hopper, blocks": table("e4m3fn@block32", "e4m3fn@tile32x32", "e5m2@block32", accumulate="k8p10a9:toward_zero"),
    "hopper, tiles": RecipeTable(base="deepseek", accumulate="hopper-fp8", output="fp32"),
    "hopper, rows": table("e4m3fn@row", "e4m3fn@row", "e5m2@row", accumulate="k4p6a5f8:toward_zero", output="fp32"),
    "other places": table("mxfp4", lm_head="e4m3fn", attention="nvfp4-nearest", mlp="int8", first_blocks=1, kept="fp16"),
}  # fmt: skip
PAIRS = {
    "plain": ("e4m3fn", "e3m2f"),
    "plain wide": ("e5m9", "fp16"),
    "plain widest": ("e8m12", "e5m14"),
    "plain bf16": ("bf16", "e5m2"),
    "masked": ("masked-e4m3fn", "masked-e2m1f"),
    "stochastic": ("stochastic-e4m3fn", "stochastic-e3m2f"),
    "stochastic wide": ("stochastic fp16 in fp32", "stochastic e4m9 in fp32"),
    "mixed": ("per product", "per product, other formats"),
}


def simulated(name: str) -> dict[str, LinearPrecision]:
    """The simulated linear layers of a recipe, wherever in the model they stand, by place."""
    recipe = resolve_recipe(name, TABLES)
    found: dict[str, LinearPrecision] = {}
    for place in ("body", "lm_head", "attention", "mlp", "kept"):
        p = getattr(recipe, place)
        if p is not None and p.structure.native is None and not p.structure.hardware and p not in found.values():
            found[f"{name}, {place}" if place != "body" else name] = p
    return found


def cases() -> dict[str, tuple[LinearPrecision, LinearPrecision]]:
    alone = {key: p for name in (*NAMED, *TABLES) for key, p in simulated(name).items()}
    pairs = {name: tuple(resolve_recipe(n, TABLES).body for n in pair) for name, pair in PAIRS.items()}
    return {**{name: (p, p) for name, p in alone.items()}, **pairs}  # type: ignore[dict-item]


CASES = cases()


def stochastic(p: LinearPrecision, of: Product) -> bool:
    return any(rule_of(p, of, i).rounding.is_stochastic for i in (0, 1))


def rotation(p: LinearPrecision) -> int:
    return p.structure.rules.hadamard if p.structure.rules else 0


STOCHASTIC = [name for name, (p, _) in CASES.items() if any(stochastic(p, of) for of in PRODUCTS)]
DETERMINISTIC = [name for name in CASES if name not in STOCHASTIC]


# A layer: its values, made by Hypothesis, and what the code makes of them.


class Layer(NamedTuple):
    """x [R, S, D], W [R, D, F], dy [R, S, F]; seeds [R], signs [R, n] and scales [R, 3], for the recipes that take them."""

    x: Singles
    w: Singles
    dy: Singles
    seeds: NDArray[np.int64]
    signs: Singles
    scales: Singles


def shapes() -> st.SearchStrategy[tuple[int, int, int]]:
    """(S, D, F): all small, or one that goes over blocks of 128 with the others smaller."""
    small = st.tuples(*[st.integers(1, 40)] * 3)
    long = st.tuples(st.integers(0, 2), st.integers(120, 300), st.integers(1, 7), st.integers(1, 7))
    turned = long.map(lambda t: ((t[1], t[2], t[3]), (t[2], t[1], t[3]), (t[2], t[3], t[1]))[t[0]])
    return small | turned


@st.composite
def matrices(draw: st.DrawFn, shape: tuple[int, ...], together: bool = False) -> Singles:
    """Numbers of few bits, close together, whose sums are exact in most formats; or far apart, with numbers of Hypothesis' own,
    single zeros and a zero block among them. together: only the first.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    exponent = draw(st.integers(-20, 20))
    if together or draw(st.booleans()):
        z = few_bits(rng, shape) * 2.0**exponent
    else:
        z = rng.normal(size=shape) * 2.0 ** rng.uniform(exponent, exponent + draw(st.sampled_from([1, 4, 16])), shape)
        number = st.floats(-1024, 1024, width=32).filter(lambda v: v == 0 or abs(v) > 2**-16)
        for v in draw(st.lists(number, max_size=4)):
            z[tuple(rng.integers(0, n) for n in shape)] = v * 2.0**exponent
    z[rng.random(shape) < draw(st.sampled_from([0.0, 0.0, 0.3, 0.9, 1.0]))] = 0
    start, length = (draw(st.integers(0, 40)) for _ in range(2))
    band = slice(start, start + length)
    z[(..., band) if draw(st.booleans()) else (..., band, slice(None))] = 0
    return z.astype(np.float32)


def few_bits(rng: np.random.Generator, shape: tuple[int, ...], largest: int = 15) -> NDArray[np.float64]:
    """Integers of either sign between an eighth of the largest and it."""
    z: NDArray[np.float64] = rng.integers(max(1, largest // 8), largest + 1, shape) * rng.choice([-1.0, 1.0], shape)
    return z


@st.composite
def layers(draw: st.DrawFn, p: LinearPrecision, together: bool = False) -> Layer:
    S, D, F = draw(shapes())
    values = [draw(matrices((2, *s), together)) for s in ((S, D), (D, F), (S, F))]
    return dressed(p, values, draw(st.integers(0, 2**32 - 1)))


def dressed(p: LinearPrecision, values: Iterable[NDArray[Any]], seed: int) -> Layer:
    """With seeds, signs, and scales by which some of the values clip."""
    rng = np.random.default_rng(seed)
    x, w, dy = (np.asarray(z, np.float32) for z in values)
    signs = rng.choice(SIGNS, (len(x), max(1, rotation(p))))
    amaxes = np.stack([np.abs(z).max(tuple(range(1, z.ndim))) for z in (x, w, dy)], 1)
    scales = (np.where(amaxes > 0, amaxes, 1) * rng.uniform(2**-12, 2**-6, amaxes.shape)).astype(np.float32)
    return Layer(x, w, dy, rng.integers(-(2**63), 2**63 - 1, len(x)), signs, scales)


def a_layer(p: LinearPrecision, S: int, D: int, F: int, seed: int, runs: int = 1) -> Layer:
    """Of normal numbers."""
    rng = np.random.default_rng(seed)
    return dressed(p, [rng.normal(size=(runs, *s)) for s in ((S, D), (D, F), (S, F))], seed)


def repeated(layer: Layer, runs: int) -> Layer:
    """The same in each of so many runs."""
    x, w, dy, signs, scales = (np.repeat(z, runs, 0) for z in (layer.x, layer.w, layer.dy, layer.signs, layer.scales))
    return Layer(x, w, dy, np.repeat(layer.seeds, runs, 0), signs, scales)


def precision_of(runs: list[LinearPrecision], layer: Layer, device: torch.device = CPU) -> Precision:
    """The pack's precision, with the seeds, signs and scales that its rules take."""
    precision, rules = pack_precision(runs, device), runs[0].structure.rules
    if rules is None:
        return precision
    fields: dict[str, Tensor] = {}
    if rules.is_stochastic:
        fields["seed"] = torch.tensor(layer.seeds, device=device)
    if rules.hadamard:
        fields["signs"] = torch.tensor(layer.signs, device=device)
    if rules.is_delayed:
        fields["scales"] = torch.tensor(layer.scales, device=device, requires_grad=True)
    return precision._replace(**fields)  # type: ignore[arg-type]


def computed(
    runs: list[LinearPrecision], layer: Layer, site: int = 0, device: torch.device = CPU
) -> tuple[dict[Product, Singles], Precision]:
    """y, dx and dW of every run by the code under test."""
    precision = precision_of(runs, layer, device)
    x, w = (torch.tensor(z, device=device, requires_grad=True) for z in (layer.x, layer.w))
    y = linear(x, w, precision, site)
    y.backward(torch.tensor(layer.dy, device=device))
    assert x.grad is not None
    assert w.grad is not None
    results = (y.detach(), x.grad, w.grad)
    assert all(z.dtype == torch.float32 for z in results)
    return {of: z.cpu().numpy() for of, z in zip(PRODUCTS, results, strict=True)}, precision


def expected(p: LinearPrecision, layer: Layer, run: int, **how: Any) -> dict[Product, Bounds]:
    scales = layer.scales[run]
    return reference_products(p, layer.x[run], layer.w[run], layer.dy[run], layer.signs[run], scales, **how)


def check_within(got: Singles, bounds: Bounds, what: str) -> None:
    """Between the ends, which are included; with equal ends that is equality."""
    assert got.shape == bounds.low.shape
    outside = ~((bounds.low <= got) & (got <= bounds.high))
    where = tuple(np.argwhere(outside)[0]) if outside.any() else ()
    assert not outside.any(), f"{what} at {where}: {got[where]} is not in [{bounds.low[where]}, {bounds.high[where]}]"


# Against the reference.


@pytest.mark.parametrize("name", CASES)
def test_all_three_products_are_the_references(name: str) -> None:
    """Over shapes and values that Hypothesis makes, for two runs side by side."""
    runs = CASES[name]

    @SMALL
    @given(layers(runs[0]))
    def check(layer: Layer) -> None:
        got, precision = computed(list(runs), layer)
        for run, p in enumerate(runs):
            for of, bounds in expected(p, layer, run).items():
                check_within(got[of][run], bounds, f"{of} of run {run}")
        if precision.scales is not None:
            check_amaxes(runs[0], layer, precision.scales)

    check()


def check_amaxes(p: LinearPrecision, layer: Layer, scales: Tensor) -> None:
    """A layer tells its history the amaxes of x and dy, as values of the output's type, by the scales' gradient."""
    output = torch.bfloat16 if p.structure.output == "bf16" else torch.float32
    x, dy = (torch.tensor(z).to(output).float().abs().amax((1, 2)) for z in (layer.x, layer.dy))
    assert scales.grad is not None
    assert torch.equal(scales.grad, torch.stack([x, torch.zeros_like(x), dy], 1))


@pytest.mark.parametrize("name", sorted({*DETERMINISTIC} - {"nf4 blocks"}))  # whose values have FP32's 24 bits
def test_numbers_of_few_bits_leave_nothing_to_a_tolerance(name: str, device: torch.device) -> None:
    """Every sum is exact in FP32, in any order, and so all three products are known to the last bit."""
    runs, rng = CASES[name], np.random.default_rng(3)
    S, D, F = 21, 20, 19
    layer = dressed(runs[0], [few_bits(rng, (2, *s)) for s in ((S, D), (D, F), (S, F))], 4)
    got, _ = computed(list(runs), layer, device=device)
    for run, p in enumerate(runs):
        for of, bounds in expected(p, layer, run).items():
            assert bounds.exact, f"{of} of run {run}"
            np.testing.assert_array_equal(got[of][run], bounds.low, err_msg=f"{of} of run {run}")


@pytest.mark.parametrize("name", ["deepseek", "deepseek in fp32", "deepseek-hopper", "hopper, tiles"])
@pytest.mark.parametrize("product_", PRODUCTS)
def test_chunks_of_128_have_factors_of_their_own(name: str, product_: Product, device: torch.device) -> None:
    """A sum over three blocks, the last one short, of magnitudes far apart; exact within each."""
    rng = np.random.default_rng(5)
    S, D, F = (290 if length == product_ else 4 for length in ("wgrad", "forward", "dgrad"))
    blocks = 2.0 ** np.array([0, 9, -7])[np.arange(290) // 128]
    x, w, dy = (few_bits(rng, (2, *s)) for s in ((S, D), (D, F), (S, F)))
    if product_ == "forward":
        x, w = x * blocks, w / blocks[:, None] * 2.0 ** rng.integers(-2, 3, (2, 1, 1))
    elif product_ == "dgrad":
        dy, w = dy * blocks, w / blocks
    else:
        x, dy = x * blocks[:, None], dy / blocks[:, None]
    p = CASES[name][0]
    layer = dressed(p, (x, w, dy), 6)
    got, _ = computed([p, p], layer, device=device)
    for run in range(2):
        bounds = expected(p, layer, run, products=[product_])[product_]
        assert bounds.exact
        np.testing.assert_array_equal(got[product_][run], bounds.low)


@pytest.mark.parametrize(
    "name",
    ["e4m3fn", *(f"e4m3fn@{group}" for group in ("tensor", "row", "block32"))],
)
def test_aligned_sums_take_subnormals_of_scaled_elements_as_those_of_plain_ones(name: str) -> None:
    """2^-9 * 1.125 with 5 fraction bits under 2^T: T = -6 + 0 by the smallest normal number, and so 2^-9 is left."""
    p = resolve_recipe("mine", {"mine": table(name, accumulate="k4p6a5:toward_zero", output="fp32")}).body
    layer = dressed(p, [np.array(z) for z in ([[[448, 0, 2**-9]]], [[[0], [448], [1.125]]], [[[1]]])], 0)
    assert expected(p, layer, 0)["forward"].low == 2**-9
    assert computed([p], layer)[0]["forward"] == 2**-9


# Stochastic operands.


def one_term_tells(p: LinearPrecision, of: Product) -> bool:
    """A rotation makes a sum of one term."""
    return stochastic(p, of) and not any(rule_of(p, of, i).hadamard for i in (0, 1))


@pytest.mark.parametrize(
    ("name", "product_"), [(name, of) for name in STOCHASTIC for of in PRODUCTS if one_term_tells(CASES[name][0], of)]
)
def test_a_product_of_one_term_takes_a_neighbour_of_each_operand(name: str, product_: Product) -> None:
    """Of the four products of neighbours it is one, to the last bit; over many elements each of the four occurs."""
    runs = CASES[name]
    S, D, F = (1 if length == product_ else 30 for length in ("wgrad", "forward", "dgrad"))
    layer = a_layer(runs[0], S, D, F, 7, runs=2)
    got, _ = computed(list(runs), layer)
    ends = ("toward_negative", "toward_positive")
    for run, p in enumerate(runs):
        corners = [expected(p, layer, run, stand_ins=(i, j), products=[product_])[product_] for i in ends for j in ends]
        assert all(corner.exact for corner in corners)
        taken = np.stack([got[product_][run] == corner.low for corner in corners])
        assert np.all(taken.any(0))
        assert np.all(taken.any((1, 2)))


@pytest.mark.parametrize("name", STOCHASTIC)
def test_equal_seeds_give_equal_bits_in_any_slot(name: str) -> None:
    """And others do not, nor do other layers of one seed."""
    p = CASES[name][0]
    layer = repeated(a_layer(p, 33, 35, 34, 9), 3)
    layer.seeds[1] += 1
    got, elsewhere = (computed([p] * 3, layer, site)[0] for site in (0, 1))
    alone = computed([p], a_layer(p, 33, 35, 34, 9))[0]
    for of in PRODUCTS:
        y = got[of]
        np.testing.assert_array_equal(y[0], y[2])
        np.testing.assert_array_equal(y[0], alone[of][0])
        assert np.array_equal(y[0], y[1]) != stochastic(p, of)
        assert np.array_equal(y[0], elsewhere[of][0]) != stochastic(p, of)


SEEDS, CONFIDENCE = 4096, 1e-9
UNBIASED = ["stochastic in fp32", "fp8 rows, all stochastic", "mxfp4 in fp32", "nvfp4 in fp32"]


@pytest.mark.parametrize("name", UNBIASED)
def test_the_mean_over_seeds_is_the_product_of_the_unrounded_operands(name: str) -> None:
    """Hoeffding's inequality (1963, theorem 2): a sum's terms a_k b_k are independent, each in an interval of width d_k, and so
    are n seeds; their mean is further than t from what is expected with a probability of at most 2 exp(-2 n t^2 / sum d_k^2).
    t is that of 1e-9 for a product's elements together. 23 random bits are off by 2^-24 of a gap at most, which is that of d_k
    for either operand.
    """
    p, (S, D, F) = CASES[name][0], (6, 7, 5)
    one = a_layer(p, S, D, F, 11)
    many = repeated(one, SEEDS)._replace(seeds=np.arange(SEEDS) * 2654435761)
    got, _ = computed([p] * SEEDS, many)
    ends, means = expected(p, one, 0), expected(p, one, 0, stand_ins=(EXPECTED, EXPECTED))
    for of, length in zip(PRODUCTS, (D, F, S), strict=True):
        spread, (low, high, _) = ends[of].spread, means[of]
        t = np.sqrt(spread * np.log(2 * spread.size / CONFIDENCE) / (2 * SEEDS))
        slack = t + 2**-23 * np.sqrt((length + max(1, rotation(p))) * spread)
        assert np.all(spread > 0) == stochastic(p, of)
        check_within(got[of].astype(np.float64).mean(0), Bounds(low - slack, high + slack, spread), of)


@pytest.mark.parametrize("name", UNBIASED[:3])
def test_where_nothing_clips_the_mean_is_the_exact_product(name: str) -> None:
    """In both gradients, all of whose operands are stochastic; 1e-5 is for rotations in FP32, FP32 scales and the sum's bound."""
    p = CASES[name][0]
    one = a_layer(p, 6, 7, 5, 13)
    means = expected(p, one, 0, stand_ins=(EXPECTED, EXPECTED))
    x, w, dy = (z[0].astype(np.float64) for z in one[:3])
    assert np.all(np.abs(means["dgrad"].low + means["dgrad"].high - 2 * dy @ w.T) < 1e-5)
    assert np.all(np.abs(means["wgrad"].low + means["wgrad"].high - 2 * x.T @ dy) < 1e-5)


# Attention's products.


ATTENTION = (
    "e4m3fn", "stochastic-e4m3fn", "masked-e3m2f", "fp8-hybrid", "fp8-row", "int8", "mxfp8", "nvfp4", "nvfp4-nearest",
    "mxfp4",
)  # fmt: skip


@pytest.mark.parametrize("output", ["bf16", "fp32"])
@pytest.mark.parametrize("name", ATTENTION)
def test_attentions_products_are_the_references_matrix_by_matrix(name: str, output: str) -> None:
    """q [R, B, M, K] and kᵀ [R, B, K, N], a tensor's scale over all B of a run; both are activations, of the output's type."""
    p = resolve_recipe(name, None, {"products": "all", "output": output}).products
    assert p is not None

    @SMALL
    @given(st.data())
    def check(data: st.DataObject) -> None:
        B, M, K, N = (data.draw(st.integers(1, most)) for most in (3, 20, 40, 20))
        values = [data.draw(matrices((2, B, *s))) for s in ((M, K), (K, N), (M, N))]
        if output == "bf16":
            values = [torch.tensor(z).bfloat16().float().numpy() for z in values]
        layer = dressed(p, values, data.draw(st.integers(0, 99)))
        precision = precision_of([p, p], layer)
        q, k = (torch.tensor(z, requires_grad=True) for z in values[:2])
        y = product(q, k, precision)
        y.backward(torch.tensor(values[2], dtype=y.dtype))
        assert q.grad is not None
        assert k.grad is not None
        for run in range(2):
            for got, (of, bounds) in zip((y.detach(), q.grad, k.grad), expected(p, layer, run).items(), strict=True):
                check_within(got[run].float().numpy(), bounds, f"{of} of run {run}")

    check()


# Second derivatives.


@pytest.mark.parametrize(
    "name",
    [
        "fp8 in fp32", "fp8-hybrid in fp32", "fp8-row in fp32", "mxfp8 in fp32", "nvfp4-nearest in fp32", "deepseek in fp32",
        "int8-switchback in fp32", "per product in fp32", "int8 delayed",
        "all rotated in fp32",
    ],
)  # fmt: skip
def test_second_derivatives_are_an_ordinary_products_of_the_rounded_operands(name: str) -> None:
    """Of sum(c · linear(x, W)): with dx = c Wᵀ and dW = xᵀ c of rounded operands, whose rounding has the identity as derivative,
    the derivative of dx · v_x + dW · v_w is c v_wᵀ in x, v_xᵀ c in W, and v_x W + x v_w in c, operands as that product takes
    them, and rotated back. The tolerance is FP32's for sums of 40 terms with some cancellation.
    """
    p, (S, D, F) = CASES[name][0], (33, 40, 35)
    layer, (v_x, v_w, *_) = a_layer(p, S, D, F, 15, runs=2), a_layer(p, S, D, F, 16, runs=2)
    x, w, c = layer[:3]
    x_t, w_t, c_t = (torch.tensor(z, requires_grad=True) for z in (x, w, c))
    y = linear(x_t, w_t, precision_of([p, p], layer))
    dx, dw = torch.autograd.grad((c_t * y).sum(), [x_t, w_t], create_graph=True)
    inner = (dx * torch.tensor(v_x)).sum() + (dw * torch.tensor(v_w)).sum()
    second = torch.autograd.grad(inner, [x_t, w_t, c_t])
    for run in range(2):
        c_d, w_d = (taken(p, "dgrad", i, z[run], layer, run) for i, z in enumerate((c, w)))
        x_w, c_w = (taken(p, "wgrad", i, z[run], layer, run) for i, z in enumerate((x, c)))
        wanted = (c_w @ v_w[run].T, v_x[run].T @ c_d, v_x[run] @ w_d + x_w @ v_w[run])
        for got, want, what in zip(second, wanted, "xWc", strict=True):
            np.testing.assert_allclose(got[run], want, rtol=2e-5, atol=2e-5, err_msg=what)


def taken(p: LinearPrecision, of: Product, i: int, z: Singles, layer: Layer, run: int) -> NDArray[np.float64]:
    """An operand as its product takes it, with its scales, and rotated back."""
    signs, rule, axis = layer.signs[run], rule_of(p, of, i), CONTRACTED[of][i]
    o = operand(p, of, i, z[None], signs, layer.scales[run])
    value: NDArray[np.float64] = (o.low * o.factor)[0]
    if not rule.hadamard:
        return value
    back: NDArray[np.float64] = rotated_back(value[None], axis, rule.hadamard, signs, z.shape[axis])[0]
    return back


@pytest.mark.parametrize("name", ["fp8 in fp32", "fp8-row in fp32", "mxfp8 in fp32"])
def test_a_quadratics_hessian_is_that_of_matrices_where_nothing_is_rounded(name: str) -> None:
    """Of sum(y²) / 2, y = x W: H v is (x v_w + v_x W) Wᵀ + y v_wᵀ in x and xᵀ (x v_w + v_x W) + v_xᵀ y in W; to the bit, as all
    are integers that the formats hold.
    """
    p, rng = CASES[name][0], np.random.default_rng(18)
    x, w, v_x, v_w = (rng.integers(-1, 2, (1, *s)).astype(np.float64) for s in ((5, 3), (3, 4), (5, 3), (3, 4)))
    layer = dressed(p, (x, w, x @ w), 19)
    x_t, w_t, v_x_t, v_w_t = (torch.tensor(z, dtype=torch.float32, requires_grad=True) for z in (x, w, v_x, v_w))
    loss = linear(x_t, w_t, precision_of([p], layer)).square().sum() / 2
    dx, dw = torch.autograd.grad(loss, [x_t, w_t], create_graph=True)
    got = torch.autograd.grad((dx * v_x_t).sum() + (dw * v_w_t).sum(), [x_t, w_t])
    change, y = x @ v_w + v_x @ w, x @ w
    np.testing.assert_array_equal(got[0], change @ w.mT + y @ v_w.mT)
    np.testing.assert_array_equal(got[1], x.mT @ change + v_x.mT @ y)


# The reference itself.


@pytest.mark.parametrize(
    "name", ["nvfp4", "mxfp4:rceil", "e4m3fn@block3", "int8@row", "mxint8:even", "e5m2@tile2x3", "nf4@tensor"]
)
@pytest.mark.parametrize("rounding", ["nearest_even", "toward_zero", "to_odd"])
def test_the_reference_quantises_groups_as_rationals_do(name: str, rounding: str) -> None:
    """Whose scale an element takes, found here by slices; and its quotient, in FP64, by `formats.scaled_reference`."""
    f = get_format(name)
    assert isinstance(f, ScaledFormat)

    @SMALL
    @given(matrices((2, 8, 9)))
    def check(z: Singles) -> None:
        upper = reference_tensor_scale(z.ravel().tolist(), f) if f.has_tensor_scale else None
        depth = 2 if f.granularity == "tensor" else 1
        rows, columns = {"tile": f.group, "tensor": (8, 9), "row": (1, 9), "block": (1, *f.group)}[f.granularity]
        o = quantised(z, f, rounding, 1)
        for cell in itertools.product(cut(2, depth), cut(8, rows), cut(9, columns)):
            group = quantize_group(z[cell].ravel().tolist(), f, rounding, tensor_scale=upper)
            assert group.scale is not None
            narrow, factor = (Fraction(1), group.scale) if f.scale == "fp32" else (group.scale, group.tensor_scale)
            assert o.low[cell].ravel().tolist() == [float(Fraction(e) * narrow) for e in group.elements]
            assert np.all(o.factor[cell] == float(factor))

    check()


def cut(length: int, size: int) -> list[slice]:
    return [slice(i, i + size) for i in range(0, length, size)]


@pytest.mark.parametrize("n", [2, 16, 64])
@pytest.mark.parametrize("axis", [0, 1])
def test_the_references_rotation_is_sylvesters_matrix(n: int, axis: int) -> None:
    """By butterflies and by the matrix, which are each other's inverses."""
    rng = np.random.default_rng(17)
    z, signs = rng.normal(size=(2, 9, 11)).astype(np.float32), rng.choice(SIGNS, n)
    turned = rotated(z, axis, n, signs)
    length = z.shape[axis + 1]
    assert turned.shape[axis + 1] == -(-length // n) * n
    np.testing.assert_allclose(rotated_back(turned.astype(np.float64), axis, n, signs, length), z, atol=2e-6)
    assert not np.allclose(rotated_back(turned.astype(np.float64), axis, n, -signs, length), z, atol=0.1)
