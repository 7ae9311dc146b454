"""One quantised linear layer against exact arithmetic: forward and both gradients, to the last bit.

The expectation rounds operands with the formats' NumPy codes (`encode`, `decode`), which share nothing with the tensor
quantiser, and multiplies in FP64. Inputs are small enough that every sum is exact in FP32 (see `exact_sums`), so the
product's only rounding is the one to the recipe's output, and nothing is left to a tolerance.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from formats import FloatFormat, Rounding, float_format, format_parameters, quantize
from train import compiling
from train.determinism import deterministic
from train.linear import linear
from train.precision import pack_precision
from train.recipe_table import RecipeTable
from train.resolve import resolve_recipe

S, D, F_OUT = 8, 8, 6
RECIPES = {
    "e4m3fn": RecipeTable("e4m3fn", "e4m3fn", "e4m3fn"),
    "hybrid": RecipeTable("e4m3fn", "e3m2f", "e5m2"),
    "truncated": RecipeTable("e4m3", "e4m3", "e4m2", rounding="toward_zero"),
    "wide output": RecipeTable("e4m3fn", "e4m3fn", "e5m2", output="fp32"),
    "tf32 carrier": RecipeTable("e5m9", "e3m1", "e4m2"),
}


def rounded(values: NDArray[np.float64], f: FloatFormat | None, rounding: str = "nearest_even") -> NDArray[np.float64]:
    return values if f is None else f.decode(f.encode(values, rounding=rounding))


def exact_sums(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """a @ b, once it is sure that FP32 sums in any order are exact: multiples of one quantum, below 2^24 of it."""
    quantum_a, quantum_b = (np.min(np.abs(np.ldexp(*split(z)))) for z in (a, b))
    total = np.max(np.abs(a) @ np.abs(b))
    assert total / (quantum_a * quantum_b) < 2**24
    return a @ b


def split(z: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Lowest set bits of the non-zero elements, as (1, exponent)."""
    mantissa, exponent = np.frexp(z[z != 0])
    integer = (mantissa * 2**53).astype(np.int64)
    low = integer & -integer
    return np.ones(low.shape), (exponent - 53 + np.round(np.log2(low)).astype(np.int64)).astype(np.int64)


@pytest.mark.parametrize("name", RECIPES)
def test_every_product_takes_rounded_operands_and_rounds_its_output(name: str, device: torch.device) -> None:
    rng = np.random.default_rng(11)
    x, w, dy = (rng.uniform(-2, 2, size=size) for size in ((2, S, D), (2, D, F_OUT), (2, S, F_OUT)))
    if name == "tf32 carrier":
        x = np.round(x * 2**7) / 2**9  # 9 mantissa bits in x leave fewer for an exact sum
    x, w, dy = (z.astype(np.float32).astype(np.float64) for z in (x, w, dy))
    recipe = resolve_recipe(name, RECIPES)
    p = recipe.body
    x_t, w_t = (torch.tensor(z, dtype=torch.float32, device=device, requires_grad=True) for z in (x, w))
    y_t = linear(x_t, w_t, pack_precision([p, p], device))
    y_t.backward(torch.tensor(dy, dtype=torch.float32, device=device))

    output = float_format("bf16") if p.structure.output == "bf16" else None
    rounding = p.structure.rounding
    for run in range(2):
        x_q, w_q, dy_q = (
            rounded(x[run], p.activation, rounding),
            rounded(w[run], p.weight, rounding),
            rounded(dy[run], p.gradient, rounding),
        )
        assert not np.array_equal(x_q, x[run]) or name == "tf32 carrier"
        assert x_t.grad is not None
        assert w_t.grad is not None
        products = {"y": (x_q, w_q, y_t), "dx": (dy_q, w_q.T, x_t.grad), "dW": (x_q.T, dy_q, w_t.grad)}
        for what, (a, b, got) in products.items():
            np.testing.assert_array_equal(
                got[run].detach().cpu().numpy(), rounded(exact_sums(a, b), output), err_msg=what
            )


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_a_native_product_takes_and_leaves_its_own_type(kind: str, device: torch.device) -> None:
    """And overflows to infinity as that does: the last column of W is too large for FP16."""
    rng = np.random.default_rng(12)
    x, w, dy = (np.round(rng.uniform(-2, 2, size=size) * 2**12) / 2**12 for size in ((S, D), (D, F_OUT), (S, F_OUT)))
    x, dy = np.round(x * 8) / 8, np.round(dy * 8) / 8  # few bits, so that sums of them with W's are exact
    w[:, -1] = np.sign(w[:, -1]) * 60000.0
    linear_ = resolve_recipe(f"native-{kind}").body
    x_t, w_t = (torch.tensor(z[None], dtype=torch.float32, device=device, requires_grad=True) for z in (x, w))
    y_t = linear(x_t, w_t, pack_precision([linear_], device))
    y_t.backward(torch.tensor(dy[None], dtype=torch.float32, device=device))
    f = float_format(kind)

    def out(exact: NDArray[np.float64]) -> NDArray[np.float64]:
        return f.decode(f.encode(exact, overflow="nonsaturating"))

    w_q = out(w)
    assert not np.array_equal(w_q, w)
    assert x_t.grad is not None
    assert w_t.grad is not None
    for got, exact in ((y_t, x @ w_q), (x_t.grad, dy @ w_q.T), (w_t.grad, x.T @ dy)):
        np.testing.assert_array_equal(got[0].detach().cpu().numpy(), out(exact))
    assert np.isinf(out(x @ w_q)).any() == (kind == "fp16")


# A simulated format and the hardware type that it is. What is multiplied in TF32 cuBLAS rounds to nearest even, ten bits of
# mantissa; the smallest products, and those of sizes that are no multiples of four, it leaves in FP32.
SMALL = (8, 8, 6)
HARDWARE = {
    "native-bf16": RecipeTable("e8m7", "e8m7", "e8m7"),
    "native-fp16": RecipeTable("fp16", "fp16", "fp16", output="fp16", overflow="nonsaturating"),
    "native-tf32": RecipeTable("e8m10", "e8m10", "e8m10"),
}


@pytest.mark.parametrize("native", HARDWARE)
@pytest.mark.parametrize("size", [SMALL, (512, 256, 384), (200, 96, 1000)])
def test_a_format_carried_in_hardware_has_the_bits_of_its_own_type(
    native: str, size: tuple[int, int, int], device: torch.device
) -> None:
    """Output and both gradients of operands drawn at random, of all sizes that FP16 has, its subnormal numbers too."""
    if native == "native-tf32" and (device.type == "cpu" or size == SMALL):
        pytest.skip("TF32 units are a GPU's, and cuBLAS asks them only for more than this")
    s, d, f = size
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> Tensor:
        sizes = torch.randint(-9, 2, shape, generator=generator)
        return torch.ldexp(torch.randn(shape, generator=generator), sizes).to(device)

    x, w, dy = drawn(2, s, d), drawn(2, d, f), drawn(2, s, f)
    x.view(-1)[::7] *= 2.0**-12
    found = []
    for recipe in (resolve_recipe(native), resolve_recipe("mine", {"mine": HARDWARE[native]})):
        p = pack_precision([recipe.body] * 2, device)
        leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
        with deterministic(tf32="tf32" in recipe.structure.carriers):
            y = linear(leaves[0], leaves[1], p)
            found.append([y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))])
    for hardware, simulated in zip(*found, strict=True):
        assert hardware.isfinite().all()
        assert torch.equal(hardware, simulated)


def test_each_run_of_a_pack_has_its_own_format(device: torch.device) -> None:
    names = ["e4m3fn", "e3m2f", "e2m1f", "e5m2"]
    x = np.random.default_rng(5).uniform(-3, 3, size=(S, D))
    identity = np.eye(D)
    x_t = torch.tensor(np.stack([x] * 4), dtype=torch.float32, device=device)
    w_t = torch.tensor(np.stack([identity] * 4), dtype=torch.float32, device=device)
    y = linear(x_t, w_t, pack_precision([resolve_recipe(name).body for name in names], device)).cpu().numpy()
    for run, name in enumerate(names):
        np.testing.assert_array_equal(y[run], rounded(x.astype(np.float32).astype(np.float64), float_format(name)))


def test_runs_of_different_structure_are_refused() -> None:
    linears = [resolve_recipe("e4m3").body, resolve_recipe("native-bf16").body]
    with pytest.raises(ValueError, match="2 structures can't share a program"):
        pack_precision(linears, torch.device("cpu"))


@pytest.mark.parametrize(
    ("formats", "output", "carrier"),
    [
        (("e8m7", "e5m2", "e4m3fn"), "bf16", "bf16"),
        (("e8m7", "e5m2", "e4m3fn"), "fp32", "tf32"),
        (("fp16", "e5m2", "e4m3fn"), "fp16", "fp16"),
        (("e8m7", "e5m2", "e4m3fn"), "fp16", "tf32"),
        (("fp16", "e4m3", "e4m3"), "bf16", "tf32"),
        (("fp16", "bf16", "bf16"), "bf16", "tf32"),
        (("e8m10", "e4m3", "e4m3"), "bf16", "tf32"),
        (("e8m11", "e4m3", "e4m3"), "bf16", "fp32"),
        (("e5m23", "e4m3", "e4m3"), "bf16", "fp32"),
    ],
)
def test_the_carrier_is_the_narrowest_that_holds_all_operands(
    formats: tuple[str, str, str], output: str, carrier: str
) -> None:
    table = RecipeTable(*formats, output=output)  # type: ignore[arg-type]
    assert resolve_recipe("mine", {"mine": table}).body.structure.carrier == carrier


@pytest.mark.parametrize(("body", "head"), [("e8m10", "native-fp32"), ("fp16", "e8m12"), ("e8m12", "tf32")])
def test_tf32_products_never_stand_beside_fp32_ones(body: str, head: str) -> None:
    """The switch between them is the whole program's: with it on, FP32 operands would be cut to TF32's ten bits."""
    recipe = resolve_recipe("mine", {"mine": RecipeTable(body, body, body, lm_head=head)})
    assert recipe.structure.carriers == {"fp32"}


@pytest.mark.parametrize(
    ("name", "tables", "message"),
    [
        ("e8m7f", {}, "does not fit FP32"),
        ("native-bf17", {}, "native-bf16"),
        ("e4m3fnn", {}, "near it: .*e4m3fn"),
        ("mine", {"mine": RecipeTable("e4m3", "native-bf16", "e5m2")}, "name a format for all three"),
        ("mine", {"mine": RecipeTable("e4m3", "e4m3", "e5m2", lm_head="mine")}, "names itself"),
        (
            "mine",
            {"mine": RecipeTable("e8m12", "e8m12", "e8m12", lm_head="native-tf32")},
            "switch is one for both",
        ),
        (
            "mine",
            {"mine": RecipeTable("native-bf16", "native-bf16", "native-bf16", output="fp32")},
            "native-bf16 leaves",
        ),
    ],
)
def test_a_recipe_that_means_nothing_says_why(name: str, tables: dict[str, RecipeTable], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_recipe(name, tables)


@pytest.mark.skipif(not compiling.has_cpp_compiler(), reason="no C++ compiler")
@pytest.mark.parametrize("rounding", [Rounding.NEAREST_EVEN, "toward_zero"])
def test_the_quantiser_of_a_long_study_on_a_cpu_compiles(rounding: str) -> None:
    """As eager steps call it, with the rounding as an argument; `make sweep` rests on it."""
    compiled = compiling.quantizer_for("cpu", 1e12)
    assert compiled is not quantize
    x = torch.randn(2, 5, 7)
    parameters = format_parameters(["e4m3fn", "e5m2"], ndim=3)
    assert torch.equal(compiled(x, parameters, rounding), quantize(x, parameters, rounding))
