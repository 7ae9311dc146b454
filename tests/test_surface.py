"""A pack's own loss as a landscape, against plain models written here: no rounding of `train`'s, no model of `train`'s.

The contract is that second derivatives are right through every named recipe's linears. With quantisers off they are those of
PyTorch's own modules, twice backward; with them on those of the surrogate: a small GPT whose rounded values come from
`tests.reference_linear`, in NumPy, and count as constants beside what they were rounded from.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from formats import get_format
from formats.factored import Factored
from landscape import LandscapeError, Problem, hessian_eigenvalues, hutchinson_trace, products
from landscape.schema import LANDSCAPE
from tests.recipe_packs import program_for, slot
from tests.reference_linear import operand, quantised, reference_products
from tests.small import SHAPE, SHAPES, resolve
from tests.test_pack import PlainGPT
from train import products as products_of_train
from train.again import again
from train.linear import linear
from train.model import ModelShape
from train.named_recipes import NAMED
from train.numerics import make_numerics
from train.operands import ROLES
from train.pack import Pack
from train.precision import Precision
from train.recipe import LinearPrecision, Recipe
from train.seeds import initial_weights
from train.surface import Surface, pieces, surface, surface_of
from train.text import Text

F64, CPU = torch.float64, torch.device("cpu")
TINY = ModelShape(layers=2, heads=2, width=8, context=4, vocabulary=12, init_std=0.4)
RECIPES = [*NAMED, "native-bf16", "native-fp32", "native-fp64", "e4m3", "e5m2", "masked-e5m7"]
STOCHASTIC = ["stochastic-e4m3", "stochastic-e3m2"]


def random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=F64)


def weights(shape: ModelShape, runs: int) -> dict[str, Tensor]:
    """Initial ones, but gains that are not all 1, which every format holds."""
    drawn = [initial_weights(shape, seed) for seed in range(runs)]
    made = {name: torch.stack([torch.from_numpy(w[name]) for w in drawn]).double() for name in drawn[0]}
    return {
        name: value + 0.1 * random(*value.shape, seed=9) if "ln_" in name else value for name, value in made.items()
    }


def windows(shape: ModelShape, runs: int, sequences: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    drawn = torch.randint(shape.vocabulary, (runs, sequences, shape.context + 1), generator=generator)
    return drawn[..., :-1], drawn[..., 1:]


def of(
    name: str, quantisers: Any = "on", shape: ModelShape = TINY, runs: int = 2, **how: Any
) -> tuple[Surface, dict[str, Tensor], tuple[Tensor, Tensor]]:
    """A recipe's surface, initial weights, tokens and targets."""
    recipe = resolve(name)
    slots = [slot(recipe, seed) for seed in range(runs)]
    made = surface(program_for(recipe, shape), slots, quantisers=quantisers, **how)
    return made, weights(shape, runs), windows(shape, runs)


def twice_backward(
    loss: Callable[[dict[str, Tensor]], Tensor], at: dict[str, Tensor], v: dict[str, Tensor]
) -> dict[str, Tensor]:
    """H v of a scalar loss by torch.autograd twice."""
    leaves = {name: value.clone().requires_grad_() for name, value in at.items()}
    gradient = torch.autograd.grad(loss(leaves), list(leaves.values()), create_graph=True)
    slope = torch.stack([(g * v[name]).sum() for name, g in zip(leaves, gradient, strict=True)]).sum()
    return dict(zip(leaves, torch.autograd.grad(slope, list(leaves.values())), strict=True))


def close(got: Tensor, want: Tensor, share: float = 1e-11) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=share * float(want.abs().max()))


# The contract with quantisers off.


@pytest.fixture(scope="module")
def by_modules() -> tuple[float, Tensor]:
    """The loss and H v of run 1 by nn.Modules in FP64, twice backward; v is random(2, P, seed=3)."""
    params, (tokens, targets) = weights(SHAPE, 2), windows(SHAPE, 2)
    problem = of("native-fp64", "off", SHAPE)[0].problem(params, tokens, targets, dtype=F64)
    v = problem.tree(random(2, problem.P, seed=3))
    model = PlainGPT().double()
    model.load({name: value[1].numpy() for name, value in v.items()})
    direction = {name: value.detach().clone() for name, value in model.named_parameters()}
    model.load({name: value[1].numpy() for name, value in params.items()})
    at = {name: value.detach() for name, value in model.named_parameters()}

    def loss(p: dict[str, Tensor]) -> Tensor:
        logits = torch.func.functional_call(model, p, (tokens[1],))
        return F.cross_entropy(logits.flatten(0, 1), targets[1].flatten())

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        found = twice_backward(loss, at, direction)
        value = float(loss(at))
    model.load_state_dict(found)
    names = {"wte": "wte.weight", "wpe": "wpe.weight", "ln_f": "ln_f.weight"}
    for i in range(SHAPE.layers):
        parts = {
            "ln_1": "ln_1",
            "attn.qkv": "qkv",
            "attn.proj": "attn_proj",
            "ln_2": "ln_2",
            "mlp.fc": "fc",
            "mlp.proj": "mlp_proj",
        }
        names |= {f"h.{i}.{ours}": f"blocks.{i}.{theirs}.weight" for ours, theirs in parts.items()}
    turned = {
        ours: found[names[ours]].T if ".attn." in ours or ".mlp." in ours else found[names[ours]] for ours in params
    }
    return value, torch.cat([turned[name].reshape(-1) for name in params])


@pytest.mark.parametrize("name", [*RECIPES, *STOCHASTIC])
def test_with_quantisers_off_every_recipes_products_are_those_of_plain_modules(
    name: str, by_modules: tuple[float, Tensor]
) -> None:
    made, params, (tokens, targets) = of(name, "off", SHAPE)
    problem = made.problem(params, tokens, targets, dtype=F64)
    value, product = by_modules
    assert problem.value()[1].item() == pytest.approx(value, rel=1e-14)
    close(problem.hvp(random(2, problem.P, seed=3))[1], product)
    assert problem.mode == "forward-over-reverse"


@pytest.mark.parametrize("name", [*RECIPES, *STOCHASTIC])
def test_the_linears_that_train_are_ordinary_products_once_nothing_is_rounded(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training's own functions of autograd, twice backward in FP64, all their rounding replaced by the identity: products that
    saved rounded copies, or rounded what arrives, would give other second derivatives. Small integers, so that FP32, which all of
    them pass through, loses nothing, and equal is equal.
    """
    recipe = resolve(name)
    numerics = make_numerics([recipe] * 2, TINY, CPU, lambda x, *_: x, False)
    monkeypatch.setattr(products_of_train, "take", lambda x, *_: Factored(x.detach().double(), None))
    x, w, c, v_x, v_w = (
        (2 * random(2, *size, seed=seed)).round() for seed, size in enumerate(((6, 5), (5, 7), (6, 7), (6, 5), (5, 7)))
    )
    at, v = {"x": x, "w": w}, {"x": v_x, "w": v_w}

    def loss(p: dict[str, Tensor], multiply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return (multiply(p["x"], p["w"]).pow(3) * c).sum()

    want = twice_backward(lambda p: loss(p, torch.matmul), at, v)
    for place in (numerics.lm_head, *(p for block in numerics.blocks for p in block[:2])):
        assert isinstance(place, Precision)
        multiply = partial(linear, precision=unrounded(place))
        got = twice_backward(partial(loss, multiply=multiply), at, v)
        assert all(torch.equal(got[name], want[name]) for name in at)


def unrounded(p: Precision) -> Precision:
    """The same machinery in FP64: nothing rounds outputs, sums are FP64's, and nothing is rotated."""
    structure = dataclasses.replace(
        p.structure, native=None, carrier="fp64", output="fp64", accumulate=None, hardware=False
    )
    plan = p.plan
    if plan is not None:
        plain = [
            product._replace(first=product.first._replace(hadamard=0), second=product.second._replace(hadamard=0))
            for product in plan[:3]
        ]
        plan = plan._replace(forward=plain[0], dgrad=plain[1], wgrad=plain[2])
    return p._replace(structure=structure, carrier=F64, plan=plan)


# The contract with quantisers on.


def surrogate(x: Tensor, value: np.ndarray | Tensor) -> Tensor:
    """The value, with the derivative of x."""
    return x + (torch.as_tensor(value, dtype=F64) - x).detach()


def plain_linear(x: Tensor, w: Tensor, p: LinearPrecision, scales: list[float]) -> Tensor:
    """out(Q(x) Q(w)) of one run, [S, D] and [D, F]."""
    narrow = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(p.structure.output)
    arrays = [t.detach().numpy() for t in (x, w)]
    if p.structure.native is not None:
        native = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": F64, "fp64": F64}[p.structure.native]
        a, b = (surrogate(t, t.detach().to(native)) for t in (x, w))
    else:
        taken = [
            operand(p, "forward", i, z[None].astype(np.float32), None, np.array(scales)) for i, z in enumerate(arrays)
        ]
        a, b = (surrogate(t, (o.low * o.factor)[0]) for t, o in zip((x, w), taken, strict=True))
    y = a @ b
    if p.structure.accumulate is not None:
        singles = [z.astype(np.float32) for z in arrays]
        nothing = np.zeros((len(singles[0]), singles[1].shape[1]), np.float32)
        bounds = reference_products(p, singles[0], singles[1], nothing, scales=np.array(scales), products=("forward",))[
            "forward"
        ]
        assert bounds.exact
        return surrogate(y, bounds.low)
    return y if narrow is None else surrogate(y, y.detach().to(narrow))


def plain_gpt(p: dict[str, Tensor], tokens: Tensor, targets: Tensor, recipe: Recipe, scales: list[float]) -> Tensor:
    """The loss of one run of TINY by that recipe, written out."""
    (N, T), H = tokens.shape, TINY.heads

    def norm(x: Tensor, gain: Tensor) -> Tensor:
        if recipe.elsewhere.gains is not None:
            f: Any = get_format(recipe.elsewhere.gains)
            o = quantised(gain.detach().numpy()[None, None].astype(np.float32), f, "nearest_even", 1)
            gain = surrogate(gain, (o.low * o.factor)[0, 0])
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain

    x = (p["wte"][tokens] + p["wpe"][:T]).reshape(N * T, -1)
    for i in range(TINY.layers):
        h, block = f"h.{i}.", recipe.block(i, TINY.layers)
        qkv = plain_linear(norm(x, p[h + "ln_1"]), p[h + "attn.qkv"], block.attention, scales)
        q, k, v = qkv.reshape(N, T, 3, H, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(N * T, -1)
        x = x + plain_linear(mixed, p[h + "attn.proj"], block.attention, scales)
        y = plain_linear(norm(x, p[h + "ln_2"]), p[h + "mlp.fc"], block.mlp, scales)
        y = y * (1 + torch.erf(y / math.sqrt(2))) / 2
        x = x + plain_linear(y, p[h + "mlp.proj"], block.mlp, scales)
    logits = plain_linear(norm(x, p["ln_f"]), p["wte"].T, recipe.lm_head, scales)
    return F.cross_entropy(logits, targets.flatten())


@pytest.mark.parametrize("name", RECIPES)
def test_with_quantisers_on_every_recipes_products_are_the_surrogates(name: str) -> None:
    recipe = resolve(name)
    delayed = any(
        p is not None and p.structure.rules is not None and p.structure.rules.is_delayed for p in recipe.places
    )
    numbers = [2.0**-7 * (1 + i / 8) for i, _ in enumerate(ROLES)]
    names = weights(TINY, 1).keys()
    scales = {n: torch.tensor([numbers] * 2) for n in names} if delayed else None
    made, params, (tokens, targets) = of(name, scales=scales)
    problem = made.problem(params, tokens, targets, dtype=F64)
    v = random(2, problem.P, seed=3)
    products_of_runs, values, whole = problem.hvp(v), problem.value(), problem.tree(v)
    for run in range(2):
        at = {n: value[run] for n, value in params.items()}

        def loss(p: dict[str, Tensor], run: int = run) -> Tensor:
            return plain_gpt(p, tokens[run], targets[run], recipe, numbers)

        assert values[run].item() == pytest.approx(float(loss(at)), rel=1e-13)
        want = twice_backward(loss, at, {n: value[run] for n, value in whole.items()})
        close(products_of_runs[run], torch.cat([want[n].reshape(-1) for n in params]))
    assert problem.mode == "forward-over-reverse", problem.why


@pytest.mark.parametrize("name", ["nvfp4", "int8", "stochastic-e3m2", "deepseek-hopper"])
def test_what_rounds_is_in_the_loss_and_its_hessian_is_symmetric(name: str) -> None:
    """u' H v = v' H u for what eigenvalues are sought of, also where two products round one tensor differently."""
    found = [made.problem(params, *both, dtype=F64) for made, params, both in (of(name), of(name, "off"))]
    u, v = random(2, found[0].P, seed=1), random(2, found[0].P, seed=2)
    one, other = ((u * found[0].hvp(v)).sum(1), (v * found[0].hvp(u)).sum(1))
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert (found[0].value() != found[1].value()).all()


# What the loss is.


@pytest.mark.parametrize("name", ["e4m3", "nvfp4", "native-bf16", "ms-amp-o1", "mxfp8", "stochastic-e4m3"])
def test_the_loss_is_the_one_that_a_pack_evaluates(name: str, text: Text) -> None:
    """To the bit, after some steps, with its next step's random bits, on its held-out text; the pack computes it in pieces of its
    own.
    """
    recipe = resolve(name)
    program = program_for(recipe, SHAPE, evaluation_sequences=4)
    pack = Pack(program, [slot(recipe, seed) for seed in range(2)], text, CPU)
    for _ in range(3):
        pack.step()
    (batch,) = pack.held_out
    on, off = (surface_of(pack, word).problem(pack.parameters, *batch).value() for word in ("on", "off"))
    assert torch.equal(on, pack.validation_loss())
    assert (off != on).all()


@pytest.mark.parametrize("name", ["rmsnorm", "llama", "everything", "z_loss", "softcap"])
def test_every_option_of_the_model_is_in_it(name: str) -> None:
    """Against training's own forward pass and loss, of which a recipe in FP64 leaves everything alone."""
    from train.model import forward, objective

    shape = SHAPES[name]
    made, params, (tokens, targets) = of("native-fp64", "off", shape)
    numerics = make_numerics([resolve("native-fp64")] * 2, shape, CPU, lambda x, *_: x, False)

    def loss(p: dict[str, Tensor]) -> Tensor:
        return objective(forward(p, tokens, shape, numerics), targets.flatten(1), shape).sum()

    problem = made.problem(params, tokens, targets, dtype=F64)
    v = random(2, problem.P, seed=3)
    want = twice_backward(loss, params, problem.tree(v))
    close(problem.hvp(v), torch.cat([want[n].flatten(1) for n in params], 1))
    assert problem.value().sum().item() == pytest.approx(float(loss(params)), rel=1e-13)


def test_stochastic_rounding_is_a_function_of_the_runs_seeds_and_the_step() -> None:
    """The same loss twice, or there would be none to differentiate; other bits at another step; a run's own in any slot."""
    name = "stochastic-e3m2"
    made, params, both = of(name)
    one = made.problem(params, *both).value()
    assert torch.equal(one, made.problem(params, *both).value())
    assert (one != of(name, step=1)[0].problem(params, *both).value()).all()
    recipe = resolve(name)
    turned = surface(made.program, [slot(recipe, 1), slot(recipe, 0)])
    flipped = [part.flip(0) for part in both]
    assert torch.equal(one, turned.problem({n: p.flip(0) for n, p in params.items()}, *flipped).value().flip(0))


def test_a_run_with_another_recipe_before_a_step_has_that_ones_loss() -> None:
    from train.recipe_table import RecipeTable
    from train.resolve import resolve_recipe

    recipe = resolve_recipe("late", {"late": RecipeTable("e4m3", "e4m3", "e4m3", before="native-bf16", until=3)})
    program, slots = program_for(recipe, TINY), [slot(recipe, 0)]
    params, both = weights(TINY, 1), windows(TINY, 1)
    early, late = (surface(program, slots, step=step).problem(params, *both).value() for step in (3, 4))
    for found, name in ((early, "native-bf16"), (late, "e4m3")):
        assert torch.equal(found, of(name, runs=1)[0].problem(params, *both).value())


def test_an_unknown_word_is_refused() -> None:
    with pytest.raises(ValueError, match="quantisers must be one of on, off, finite-difference, got 'maybe'"):
        of("e4m3", "maybe")
    with pytest.raises(ValueError, match="sequences must be at least 1, got 0"):
        pieces(*windows(TINY, 1), TINY.context, 0)


# Memory.


@pytest.mark.parametrize("name", ["e4m3", "ms-amp-o1", "native-fp64"])
@pytest.mark.parametrize("limit", [2 * SHAPE.vocabulary, 24 * SHAPE.vocabulary])
def test_chunks_of_the_vocabulary_change_nothing(name: str, limit: int) -> None:
    """Of one run's tokens, and of whole runs; a tensor's scale is the whole tensor's in each."""
    whole, params, both = of(name, shape=SHAPE)
    parts = dataclasses.replace(whole, limit=limit, _made={})
    a, b = (made.problem(params, *both, dtype=F64) for made in (whole, parts))
    v = random(2, a.P, seed=3)
    torch.testing.assert_close(a.value(), b.value(), rtol=1e-14, atol=0)
    close(b.gradient()[1], a.gradient()[1], 1e-13)
    close(b.hvp(v), a.hvp(v), 1e-13)
    assert b.mode == "forward-over-reverse"


def test_what_is_computed_again_has_every_derivative_within_other_functions() -> None:
    """Of a loss that bends what is computed again, so that its own tangent counts; forward over reverse and twice backward."""

    def f(x: Tensor, w: Tensor, c: Tensor) -> Tensor:
        return (torch.tanh(x @ w) * c).sum()

    params, c = {"x": random(3, 4), "w": random(4, 2, seed=1)}, random(3, 2, seed=2)
    plain = Problem(lambda p, _: f(p["x"], p["w"], c).exp() + p["x"].pow(4).sum(), params, None, dtype=F64)
    v = random(1, plain.P, seed=3)
    for mode in ("forward-over-reverse", "double-backward"):
        other = Problem(
            lambda p, _: again(f, p["x"], p["w"], c).exp() + p["x"].pow(4).sum(), params, None, dtype=F64,
            products=mode,
        )  # fmt: skip
        close(other.hvp(v), plain.hvp(v), 1e-14)
        close(other.gradient()[1], plain.gradient()[1], 1e-14)
        assert other.mode == mode


def test_chunks_have_the_short_sums_of_their_recipe() -> None:
    made, params, both = of("deepseek-hopper", limit=3 * TINY.vocabulary)
    recipe = dataclasses.replace(resolve("deepseek-hopper"), lm_head=resolve("deepseek-hopper").body)
    slots = [slot(recipe, seed) for seed in range(2)]
    program = program_for(recipe, TINY)
    a, b = (surface(program, slots, limit=limit).problem(params, *both, dtype=F64) for limit in (2**20, made.limit))
    v = random(2, a.P, seed=3)
    torch.testing.assert_close(a.value(), b.value(), rtol=1e-14, atol=0)
    close(b.hvp(v), a.hvp(v), 1e-13)


class Live(TorchDispatchMode):
    """The most tensors of so many elements, or more, that were alive at once."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.now, self.most, self.largest = least, 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and tensor.numel() >= self.least and tensor._base is None:
                self.now += 1
                self.most, self.largest = max(self.most, self.now), max(self.largest, tensor.numel())
                weakref.finalize(tensor, self._gone)
        return out

    def _gone(self) -> None:
        self.now -= 1


def test_a_product_holds_the_logits_of_one_chunk_however_many_there_are() -> None:
    """By every tensor that is made, forward over reverse; parameters are smaller than a chunk."""
    shape = dataclasses.replace(SHAPE, vocabulary=512, context=16)
    params, most = weights(shape, 1), []
    for sequences in (2, 4, 8):
        tokens, targets = windows(shape, 1, sequences)
        made = of("native-fp32", "off", shape, runs=1, limit=32 * shape.vocabulary)[0]
        problem = made.problem(params, tokens, targets)
        v = random(1, problem.P).float()
        with Live(30 * shape.vocabulary) as live:
            problem.hvp(v)
        most.append(live.most)
        assert live.largest <= max(32 * shape.vocabulary, problem.P)
    assert most[1] == most[2], most
    assert most[0] > 0


@pytest.mark.parametrize("sequences", [1, 2, 3])
def test_pieces_of_sequences_are_the_whole_batch(sequences: int) -> None:
    """Three sequences in unequal pieces too, each counted by its tokens."""
    made, params, _ = of("e4m3")
    both = windows(TINY, 2, 3)
    whole, split = (made.problem(params, *both, sequences=n, dtype=F64) for n in (None, sequences))
    v = random(2, whole.P, seed=3)
    close(split.hvp(v), whole.hvp(v), 1e-13)


# Finite differences.


def test_differences_of_gradients_are_the_product_where_nothing_is_rounded() -> None:
    """Central ones: off by the step's square, and by FP64's rounding over the step."""
    exact, params, both = of("native-fp64", "off")
    problem = exact.problem(params, *both, dtype=F64)
    v = random(2, problem.P, seed=3)
    want = problem.hvp(v)
    for scale in (1.0, 1e6):
        other = of("native-fp64", "finite-difference")[0].problem(params, *both)
        close(other.hvp(scale * v) / scale, want, 1e-7)
    errors = [
        float(
            (of("native-fp64", "finite-difference")[0].problem(params, *both, difference=step).hvp(v) - want)
            .abs()
            .max()
        )
        for step in (1e-2, 1e-3)
    ]
    assert 80 < errors[0] / errors[1] < 120
    assert other.hvp(torch.zeros_like(v)).abs().max() == 0
    assert hutchinson_trace(other, 2).second_derivatives == "finite-difference"


def test_differences_see_the_rounding_that_derivatives_do_not() -> None:
    """Of x^2 on a grid of 1/4, straight through: the surrogate's H is 2; over a step that crosses a line of the grid at one end
    and a step that crosses none, differences are the grid's own.
    """
    from train.straight_through import straight_through

    def loss(p: Any, _: None) -> Tensor:
        x: Tensor = p["x"]
        return straight_through(x, (4 * x.detach()).round() / 4).square().sum()

    x = {"x": torch.full((1,), 1.1, dtype=F64)}
    one = torch.ones(1, 1, dtype=F64)
    assert Problem(loss, x, None, dtype=F64).hvp(one).item() == 2
    step = Problem(loss, x, None, dtype=F64, products="finite-difference", difference=0.05 / 1.1).hvp(one).item()
    assert step == pytest.approx(2 * (1.25 - 1.0) / 0.1)  # 1.15 and 1.05 round to 1.25 and 1.0
    with pytest.raises(LandscapeError, match="vanishes"):
        Problem(loss, x, None, dtype=F64, products="finite-difference", difference=1e-3).hvp(one)


@pytest.mark.parametrize("name", ["native-bf16", "e4m3", "nvfp4"])
def test_logits_are_those_of_the_loss_and_the_same_in_chunks_of_runs_or_of_tokens(name: str) -> None:
    made, params, both = of(name)
    targets, T = both[1].flatten(1), both[1].shape[2]
    [(_, whole, _)] = made.logits(params, both)
    found = F.cross_entropy(whole.transpose(1, 2), targets, reduction="none").mean(1)
    torch.testing.assert_close(found, made.loss(params, both))
    for limit in (whole[0].numel(), whole[0].numel() // 2):
        for every in (1, T):
            parts = list(dataclasses.replace(made, limit=limit).logits(params, both, every))
            for run in range(2):
                mine = [(z[run - r.start], t[run - r.start]) for r, z, t in parts if r.start <= run < r.stop]
                torch.testing.assert_close(torch.cat([z for z, _ in mine]), whole[run, every - 1 :: every])
                assert torch.equal(torch.cat([t for _, t in mine]), targets[run, every - 1 :: every])


def test_a_step_that_vanishes_for_one_run_is_nan_for_it_alone(caplog: pytest.LogCaptureFixture) -> None:
    """Two runs of x^2, rounded to quarters the one, not rounded the other."""
    from train.straight_through import straight_through

    def loss(p: Any, _: None) -> Tensor:
        x: Tensor = p["x"]
        rounded = straight_through(x, (4 * x.detach()).round() / 4)
        return torch.stack([rounded[0], x[1]]).square().sum(1)

    x = {"x": torch.full((2, 3), 1.1, dtype=F64)}
    problem = Problem(
        loss, x, None, dtype=F64, run_axis=True, products="finite-difference", difference=1e-3, quantisers="on"
    )
    products._say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        found = problem.hvp(torch.ones(2, 3, dtype=F64))
    assert found[0].isnan().all()
    torch.testing.assert_close(found[1], torch.full((3,), 2.0, dtype=F64))
    assert "vanishes" in caplog.text
    top = hessian_eigenvalues(problem).dataset
    assert np.isnan(top.hessian_eigenvalue[0]).all()
    assert top.converged.values.tolist() == [False, True]
    assert top.hessian_eigenvalue[1].item() == pytest.approx(2)


def test_a_step_that_vanishes_in_bf16_is_refused_and_the_default_does_not() -> None:
    """Of sum(a x^2) / 2 of x cast to BF16: a step that FP32 sees leaves every BF16 number where it is, and H v would be zero.
    The default moves some of 4,000 numbers, v' H v is right on average, and off by 4 % or so: 1 / sqrt(4,000 times their share).
    """
    x, a = 1 + random(4000).abs(), random(4000, seed=1).abs()
    v = random(1, 4000, seed=2).float()

    def loss(p: Any, batch: Tensor) -> Tensor:
        narrow: Tensor = p["x"].bfloat16().float()
        return (batch * narrow.square()).sum() / 2

    with pytest.raises(LandscapeError, match=r"a step of 1e-06 .* make difference larger") as caught:
        Problem(loss, {"x": x.bfloat16()}, a, products="finite-difference", difference=1e-6).hvp(v)
    assert "\n" not in str(caught.value)
    product = Problem(loss, {"x": x}, a, products="finite-difference").hvp(v)
    assert (v * product).sum().item() == pytest.approx((v.square() * a).sum().item(), rel=0.15)


@pytest.mark.parametrize(("name", "least"), [("native-bf16", 0.95), ("native-fp32", 0.95), ("e4m3", 0.2)])
def test_a_recipes_default_step_is_wider_than_its_outputs_grid(name: str, least: float) -> None:
    """Cosines with the surrogate's product; at Problem's own step they are 0.45, 0.83 and -0.1."""
    made, params, both = of(name, "finite-difference")
    smooth = of(name)[0].problem(params, *both)
    v = random(2, smooth.P, seed=3).float()
    found = made.problem(params, *both).hvp(v)
    assert (torch.cosine_similarity(found, smooth.hvp(v), 1) > least).all()


def test_a_flat_direction_is_no_vanished_step() -> None:
    x = {"x": torch.ones(2, dtype=F64), "unused": torch.ones(2, dtype=F64)}
    problem = Problem(lambda p, _: p["x"].pow(2).sum(), x, None, dtype=F64, products="finite-difference")
    unit = problem.vector({"x": torch.zeros(2), "unused": torch.ones(2)})
    assert problem.hvp(unit).abs().max() == 0


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            {"difference": 1e-3},
            "difference is a step of finite differences, got 0.001 for products by forward-over-reverse",
        ),
        ({"products": "finite-difference", "difference": 0.0}, "difference must be positive"),
    ],
)
def test_a_step_that_does_not_fit_is_refused(how: dict[str, Any], message: str) -> None:
    with pytest.raises(LandscapeError, match=message):
        Problem(lambda p, _: p["x"].sum(), {"x": torch.ones(2)}, None, **how)


# What is said.


def test_what_quantisers_do_is_a_coordinate_of_what_is_stored() -> None:
    for word in ("on", "off", "finite-difference"):
        made, params, both = of("e4m3", word)
        problem = made.problem(params, *both)
        for dataset in (hutchinson_trace(problem, 2), hessian_eigenvalues(problem, max_hvp=3).dataset):
            assert dataset.quantisers.item() == word
            assert dataset.quantisers.attrs == LANDSCAPE["quantisers"].attrs()
    assert "quantisers" not in hutchinson_trace(Problem(lambda p, _: p["x"].sum(), {"x": torch.ones(2)}, None), 2)


@pytest.mark.parametrize(("name", "fused"), [("native-bf16", True), ("native-bf16-math", False)])
def test_fused_attention_is_switched_for_second_derivatives_and_that_is_said(
    name: str, fused: bool, caplog: pytest.LogCaptureFixture
) -> None:
    products._say_once.cache_clear()
    made, params, both = of(name)
    with caplog.at_level(logging.WARNING, "landscape.products"):
        for _ in range(2):
            said = hutchinson_trace(made.problem(params, *both), 2)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [products.SWITCHED] * fused
    assert said.attrs.get("attention_why") == (products.SWITCHED if fused else None)
    assert said.attention == "math"
