"""Linear layers and training steps whose sums a recipe forms: all three products, their second derivatives, the LM head."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from formats import float_format
from tests.rational_sums import reference_matrix, round_to, sums
from tests.small import SHAPE, make_program
from train import head
from train.head import head_over_chunks
from train.linear import linear, product
from train.model import Numerics, cross_entropy, forward
from train.pack import Pack
from train.precision import pack_precision
from train.program import Slot
from train.resolve import resolve_recipe
from train.step import Pieces
from train.text import Text
from train.weights import padded_vocabulary

CPU = torch.device("cpu")
HOPPER = "k32p14a13:toward_zero"

# In a linear layer.


@pytest.mark.parametrize("output", ["bf16", "fp32"])
@pytest.mark.parametrize("word", ["k8p6a5:toward_zero", "k8p9f16:nearest_even"])
def test_all_three_products_of_a_layer_sum_as_the_recipe_says(word: str, output: str, device: torch.device) -> None:
    """Small gradients: many of e5m2's are subnormal, and the exponents by which terms align are the format's."""
    rng = np.random.default_rng(7)
    scaled = {(20, 24): 1.0, (24, 18): 1.0, (20, 18): 2.0**-15}
    x, w, dy = ((rng.normal(size=size) * scale).astype(np.float32) for size, scale in scaled.items())
    p = resolve_recipe("mine", {"mine": sums(word, output=output)}).body
    x_t, w_t = (torch.tensor(z[None], device=device, requires_grad=True) for z in (x, w))
    y_t = linear(x_t, w_t, pack_precision([p], device))
    y_t.backward(torch.tensor(dy[None], device=device))
    assert x_t.grad is not None
    assert w_t.grad is not None
    x_q, w_q, dy_q = (round_to(z, name) for z, name in ((x, "e4m3fn"), (w, "e3m2f"), (dy, "e5m2")))
    e = {name: float_format(name).emin for name in ("e4m3fn", "e3m2f", "e5m2")}
    products = [
        (y_t, x_q, w_q, ("e4m3fn", "e3m2f")), (x_t.grad, dy_q, w_q.T, ("e5m2", "e3m2f")),
        (w_t.grad, x_q.T, dy_q, ("e4m3fn", "e5m2")),
    ]  # fmt: skip
    for got, a, b, (first, second) in products:
        expected = reference_matrix(a, b, word, (e[first], e[second]))
        expected = round_to(expected, "bf16") if output == "bf16" else expected
        np.testing.assert_array_equal(got[0].detach().cpu().numpy(), expected, err_msg=f"{first} {second}")


def test_second_derivatives_are_an_ordinary_products() -> None:
    """Of sum(c · x W): the Hessian-vector product is c v_Wᵀ and v_xᵀ c whatever the sums are, and so are mixed orders."""
    generator = torch.Generator().manual_seed(0)
    x, w, v_x, v_w, c = (
        torch.randint(-4, 5, size, generator=generator).float() / 4
        for size in ((1, 9, 40), (1, 40, 6), (1, 9, 40), (1, 40, 6), (1, 9, 6))
    )
    p = pack_precision([resolve_recipe("mine", {"mine": sums("k8p3a3:toward_zero", output="fp32")}).body], CPU)
    x, w, c = (t.requires_grad_() for t in (x, w, c))
    dx, dw = torch.autograd.grad((c * product(x, w, p)).sum(), [x, w], create_graph=True)
    assert not torch.equal(dw, (x.transpose(1, 2) @ c)), "the sums are short"
    second = torch.autograd.grad((dx * v_x).sum() + (dw * v_w).sum(), [x, w, c])
    cc = c.detach()
    expected = (cc @ v_w.transpose(1, 2), v_x.transpose(1, 2) @ cc, v_x @ w.detach() + x.detach() @ v_w)
    for got, want in zip(second, expected, strict=True):
        torch.testing.assert_close(got, want.detach(), rtol=1e-6, atol=1e-6)


def test_the_compiler_sees_one_program_with_the_same_bits() -> None:
    p = pack_precision([resolve_recipe("mine", {"mine": sums(HOPPER)}).body] * 2, CPU)
    x, w, dy = (
        torch.randn(size, generator=torch.Generator().manual_seed(1)) for size in ((2, 9, 50), (2, 50, 6), (2, 9, 6))
    )
    results = []
    for run in (linear, torch.compile(linear, backend="aot_eager", fullgraph=True, dynamic=False)):
        x_leaf, w_leaf = (t.clone().requires_grad_() for t in (x, w))
        y = run(x_leaf, w_leaf, p)
        results.append([y.detach(), *torch.autograd.grad(y, [x_leaf, w_leaf], dy)])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


# In a step.


def test_a_compiled_step_is_the_eager_one(text: Text) -> None:
    """Loss and gradients, to the bit: a piece that holds accumulated products is one program, without a break."""
    recipe = resolve_recipe("mine", {"mine": sums("hopper-fp8-promoted", weight="e4m3fn")})
    found = []
    for wrap in (None, functools.partial(torch.compile, backend="aot_eager", fullgraph=True, dynamic=False)):
        pack = Pack(make_program(structure=recipe.structure), [Slot(recipe, 3e-3, 10, 20)], text, CPU)
        pack._pieces = Pieces(wrap)
        losses, gradients = pack.gradients(*pack.held_out[0])
        found.append([losses, *(parts[0].float() for parts in gradients.values())])
    for eager, compiled in zip(*found, strict=True):
        assert eager.any()
        assert torch.equal(eager, compiled)


def test_a_step_is_the_plain_models(text: Text) -> None:
    """Logits to the bit; gradients but for ties, as in test_step; both far from those of FP32 sums."""
    tables = {"mine": sums("k4p5a4:toward_zero", lm_head="head"), "head": sums("k8p6:nearest_even")}
    recipe = resolve_recipe("mine", tables)
    packs = [
        Pack(make_program(structure=r.structure), [Slot(r, 3e-3, 10 + i, 20 + i) for i in range(2)], text, CPU)
        for r in (recipe, resolve_recipe("mine", {"mine": sums("fp32")}))
    ]
    (pack, other), (tokens, targets) = packs, packs[0].held_out[0]
    plain = forward(pack.parameters, tokens.view(2, -1, SHAPE.context), SHAPE, pack.numerics)
    _, hidden = pack._hidden(tokens)
    of_step = head.head_product(hidden.detach(), pack.operands["wte"], pack.numerics.lm_head)
    assert torch.equal(of_step[..., : SHAPE.vocabulary], plain)
    expected = cross_entropy(plain, targets)
    losses, grads = pack.gradients(tokens, targets)
    torch.testing.assert_close(losses, expected.detach(), rtol=0, atol=2e-6)
    theirs = torch.autograd.grad(expected.sum(), list(pack.parameters.values()))
    kind = other.gradients(tokens, targets)[1]
    for name, gradient in zip(pack.parameters, theirs, strict=True):
        mine, exact = (torch.stack([part.float() for part in g[name]]).sum(0) for g in (grads, kind))
        assert float((mine - gradient).norm() / gradient.norm()) < 2e-3, name
        assert float((mine - exact).norm() / exact.norm()) > 1e-2, name


@pytest.mark.parametrize("word", ["k2p9a4:toward_zero", "k2p7a6f6:toward_zero", "k3p6:nearest_even"])
def test_the_heads_sums_are_the_same_however_it_is_cut(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And those of the plain layer, whose vocabulary is not padded: alignment cuts the first accumulator in every chunk, even one
    of zeros. The cut is made where the sums can be interrupted, of which 4 tokens are no multiple.
    """
    tokens, vocabulary = 24, 10
    rng = np.random.default_rng(3)
    x, w = (
        torch.from_numpy(round_to(rng.normal(size=s), n)).float()
        for s, n in (((2, tokens, 6), "e4m3fn"), ((2, vocabulary, 6), "e3m2f"))
    )
    targets = torch.from_numpy(rng.integers(0, vocabulary, (2, tokens)))
    p = pack_precision([resolve_recipe("mine", {"mine": sums(word)}).body] * 2, CPU)
    padded = torch.zeros(2, padded_vocabulary(vocabulary), 6)
    padded[:, :vocabulary] = w
    results = []
    for of_one in (10**9, 64 * 5):
        monkeypatch.setattr(head, "CHUNK_OF_ONE_RUN", of_one)
        results.append(head_over_chunks(Pieces(), x, padded, targets, Numerics(p, p), vocabulary))
    (_, dx, dw, _), (_, dx_cut, dw_cut, _) = results
    assert torch.equal(dx, dx_cut)
    assert torch.equal(dw, dw_cut)
    x_leaf, w_leaf = x.clone().requires_grad_(), w.transpose(1, 2).clone().requires_grad_()
    loss = cross_entropy(linear(x_leaf, w_leaf, p), targets).sum()
    dx_plain, dw_plain = torch.autograd.grad(loss, [x_leaf, w_leaf])
    assert torch.equal(dx, dx_plain)
    assert torch.equal(dw[:, :vocabulary], dw_plain.transpose(1, 2))
