"""Hessian-vector products against matrices that are written down, batches in pieces, and what must be as it was afterwards."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from formats import quantize
from landscape import (
    LandscapeError,
    Problem,
    critical_sharpness,
    gradient_curvature,
    hessian_eigenvalues,
    hutchinson_trace,
    spectral_density,
    xtrace,
)
from landscape.programs import Programs
from tests.small import SHAPE, SHAPES, resolve
from tests.test_pack import PlainGPT
from train.model import ModelShape, Numerics, forward, objective
from train.numerics import make_numerics
from train.seeds import initial_weights

F64 = torch.float64


def random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=F64)


def dense(problem: Problem) -> Tensor:
    """The Hessian [R, P, P] by products with all unit vectors."""
    return torch.stack([problem.hvp(unit.expand(problem.R, -1)) for unit in torch.eye(problem.P).to(problem.point)], 2)


def regression(w: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (x @ w["w"] - y).square().mean()


def test_linear_regressions_hessian_is_2_xtx_over_n() -> None:
    x, y = random(20, 6), random(20, seed=1)
    problem = Problem(regression, {"w": random(6, seed=2)}, (x, y), dtype=F64)
    torch.testing.assert_close(dense(problem)[0], 2 * x.T @ x / 20, rtol=1e-13, atol=1e-13)
    assert problem.mode == "forward-over-reverse"


def softmax(w: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(batch[0] @ w["w"], batch[1])


def kronecker(x: Tensor, w: Tensor) -> Tensor:
    """Softmax regression's Hessian: the mean over examples of x x^T with diag(p) - p p^T as its Kronecker factor."""
    p = (x @ w).softmax(-1)
    terms = [torch.kron(torch.outer(a, a), torch.diag(q) - torch.outer(q, q)) for a, q in zip(x, p, strict=True)]
    return torch.stack(terms).mean(0)


def test_softmax_regressions_hessian_is_kroneckers() -> None:
    x, w, labels = random(30, 4), random(4, 3, seed=1), torch.arange(30) % 3
    problem = Problem(softmax, {"w": w}, (x, labels), dtype=F64)
    torch.testing.assert_close(dense(problem)[0], kronecker(x, w), rtol=1e-12, atol=1e-13)


# Batches in pieces.


def softmax_problem(cuts: list[int] | None, times: int = 1, dtype: torch.dtype = F64) -> Problem:
    x, labels = random(30, 4).repeat(times, 1), (torch.arange(30) % 3).repeat(times)
    w = {"w": random(4, 3, seed=1)}
    if cuts is None:
        return Problem(softmax, w, (x, labels), dtype=dtype)
    pieces = list(zip(x.split(cuts), labels.split(cuts), strict=True))
    return Problem(softmax, w, pieces, weights=lambda piece: len(piece[1]), dtype=dtype)


@pytest.mark.parametrize("cuts", [[30], [10, 10, 10], [23, 7], [1, 28, 1]])
def test_a_batch_in_pieces_is_the_whole_batch(cuts: list[int]) -> None:
    """Unequal pieces count by their size: an unweighted mean over pieces fails here, and so does a sum."""
    whole, split, v = softmax_problem(None), softmax_problem(cuts), random(1, 12, seed=3)
    for got, want in zip([*split.gradient(), split.value()], [*whole.gradient(), whole.value()], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(split.hvp(v), whole.hvp(v), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("cuts", [[30] * 4, [50, 70]])
def test_a_batch_said_four_times_is_as_sharp_as_said_once(cuts: list[int]) -> None:
    once, often = (hessian_eigenvalues(p).dataset for p in (softmax_problem(None), softmax_problem(cuts, 4)))
    torch.testing.assert_close(
        torch.tensor(often.hessian_eigenvalue.values), torch.tensor(once.hessian_eigenvalue.values)
    )


def test_pieces_may_come_from_a_generator_with_a_list_of_weights() -> None:
    x, y, w = random(20, 6), random(20, seed=1), {"w": random(6, seed=2)}
    pieces = ((x[i : i + 5], y[i : i + 5]) for i in range(0, 20, 5))
    problem = Problem(regression, w, pieces, weights=[5, 5, 5, 5], dtype=F64)
    torch.testing.assert_close(dense(problem)[0], 2 * x.T @ x / 20, rtol=1e-13, atol=1e-13)


# Packs.


def gpt(
    shape: ModelShape, recipe: str, runs: int, **how: Any
) -> tuple[Callable[[Any, Any], Tensor], dict[str, Tensor], Any]:
    """A small GPT's loss, the initial weights of some runs, and a batch."""
    numerics: Numerics = make_numerics([resolve(recipe)] * runs, shape, torch.device("cpu"), quantize, False)
    numerics = numerics._replace(**how)
    weights = [initial_weights(shape, seed) for seed in range(runs)]
    params = {name: torch.stack([torch.from_numpy(w[name]) for w in weights]) for name in weights[0]}
    tokens = torch.randint(shape.vocabulary, (runs, 2, 9), generator=torch.Generator().manual_seed(5))

    def loss(p: Any, batch: Tensor) -> Tensor:
        logits = forward(p, batch[..., :-1], shape, numerics)
        return objective(logits, batch[..., 1:].flatten(1), shape)

    return loss, params, tokens


def by_double_backward(loss: Callable[[Any, Any], Tensor], params: dict[str, Tensor], batch: Any, v: Tensor) -> Tensor:
    """H v of each run in FP64, by torch.autograd twice."""
    at = {name: value.to(v.dtype).requires_grad_() for name, value in params.items()}
    gradient = torch.autograd.grad(loss(at, batch).sum(), list(at.values()), create_graph=True)
    flat = torch.cat([g.flatten(1) for g in gradient], 1)
    return torch.cat([g.flatten(1) for g in torch.autograd.grad((flat * v).sum(), list(at.values()))], 1)


@pytest.mark.parametrize("name", ["rmsnorm", "llama", "everything"])
def test_a_small_gpts_product_is_that_of_autograd_twice(name: str) -> None:
    shape = SHAPES[name]
    loss, params, batch = gpt(shape, "native-fp64", 2)
    problem = Problem(loss, params, batch, runs=True, dtype=F64)
    v = random(2, problem.P, seed=3)
    torch.testing.assert_close(problem.hvp(v), by_double_backward(loss, params, batch, v), rtol=1e-9, atol=1e-11)


def test_the_packs_product_is_that_of_plain_modules_forward_over_reverse() -> None:
    """`train`'s model against nn.Modules of the same weights; matrices turned."""
    loss, params, batch = gpt(SHAPE, "native-fp64", 1)
    pack = Problem(loss, params, batch, runs=True, dtype=F64)
    model = PlainGPT().double()
    model.load({name: value[0].numpy() for name, value in params.items()})
    plain = Problem(module_loss(model), dict(model.named_parameters()), (batch[0, :, :-1], batch[0, :, 1:]), dtype=F64)
    for problem in (pack, plain):
        assert problem.value().item() == pytest.approx(plain.value().item(), rel=1e-12)
    found = [hessian_eigenvalues(problem, 3, tolerance=1e-6).dataset for problem in (pack, plain)]
    for ours, other in zip(*(f.hessian_eigenvalue.values.ravel() for f in found), strict=True):
        assert ours == pytest.approx(other, rel=1e-9)
    assert [f.second_derivatives for f in found] == ["forward-over-reverse"] * 2
    curvatures = [float(gradient_curvature(problem).gradient_curvature.values.ravel()[0]) for problem in (pack, plain)]
    assert curvatures[0] == pytest.approx(curvatures[1], rel=1e-9)


@pytest.mark.parametrize("recipe", ["native-fp32", "e4m3", "hybrid"])
def test_through_quantised_linears_too(recipe: str) -> None:
    """Straight through: of the smooth surrogate, whose linears have rounded operands, in FP32. Their attention is fused, which
    autograd can't differentiate twice; the expectation has its products written out.
    """
    loss, params, batch = gpt(SHAPE, recipe, 2)
    problem = Problem(loss, params, batch, runs=True)
    v = random(2, problem.P, seed=3).float()
    want = by_double_backward(gpt(SHAPE, recipe, 2, attention="math")[0], params, batch, v)
    torch.testing.assert_close(problem.hvp(v), want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


def test_a_run_in_a_pack_is_the_run_alone() -> None:
    """Every measure, each run alone against the pack of three; eigenvalues stop when each is done, not when all are."""
    A = torch.stack([random(12, 12, seed=i) for i in range(3)])
    A = A @ A.mT
    x = random(3, 12, seed=9)

    def loss(p: Any, batch: Tensor) -> Tensor:
        x: Tensor = p["x"]
        return torch.einsum("ri,rij,rj->r", x, batch, x) / 2 + x.pow(4).sum(1)

    together = Problem(loss, {"x": x}, A, runs=True, dtype=F64)
    alone = [Problem(loss, {"x": x[i : i + 1]}, A[i : i + 1], runs=True, dtype=F64) for i in range(3)]
    measures: list[Callable[[Problem], Any]] = [
        lambda p: hessian_eigenvalues(p, 2, tolerance=1e-3).dataset,
        lambda p: hutchinson_trace(p, 4),
        lambda p: xtrace(p, 8),
        lambda p: spectral_density(p, 2, 5),
        gradient_curvature,
        critical_sharpness,
    ]
    for measure in measures:
        pack = measure(together)
        for run, problem in enumerate(alone):
            one = measure(problem)
            for name in pack:
                torch.testing.assert_close(
                    torch.tensor(pack[name].values[run]), torch.tensor(one[name].values[0]), rtol=1e-11, atol=1e-11
                )


def test_a_run_whose_loss_is_nan_is_nan_alone() -> None:
    def loss(p: Any, batch: Tensor) -> Tensor:
        x: Tensor = p["x"]
        return (x.square() * batch).sum(1)

    scale = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0], [1.0, math.nan, 1.0, 1.0, 1.0]])
    problem = Problem(loss, {"x": torch.ones(2, 5)}, scale, runs=True)
    found = hessian_eigenvalues(problem).dataset
    assert found.hessian_eigenvalue.values[0] == pytest.approx(10)
    assert found.converged.values.tolist() == [True, False]
    values = [
        found.hessian_eigenvalue,
        hutchinson_trace(problem, 4).hessian_trace,
        xtrace(problem, 4).hessian_trace,
        spectral_density(problem, 2, 3).node,
        spectral_density(problem, 2, 3).weight,
        gradient_curvature(problem).gradient_curvature,
        critical_sharpness(problem).critical_sharpness,
    ]
    for value in values:
        assert value[1].isnull().all(), value.name
        assert value[0].notnull().all(), value.name


# Any torch callable.


class Net(nn.Module):
    """A small CNN."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(F.max_pool2d(torch.tanh(self.norm(self.conv(x))), 2).flatten(1))
        return y


def module_loss(model: nn.Module) -> Callable[[Any, Any], Tensor]:
    def loss(p: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        logits = torch.func.functional_call(model, p, batch[0])
        return F.cross_entropy(logits.flatten(0, -2), batch[1].flatten())

    return loss


def cnn() -> tuple[Net, tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return Net().double(), (random(6, 1, 6, 6), torch.arange(6) % 3)


def test_a_cnns_product_is_that_of_torchs_whole_hessian() -> None:
    model, batch = cnn()
    params = dict(model.named_parameters())
    problem = Problem(module_loss(model), params, batch, dtype=F64, state=model)
    start = {name: value.detach() for name, value in params.items()}
    whole = torch.autograd.functional.hessian(
        lambda flat: module_loss(model)(problem.tree(flat), batch), problem.vector(start)
    )
    v = random(1, problem.P, seed=2)
    torch.testing.assert_close(problem.hvp(v)[0], whole[0, :, 0] @ v[0], rtol=1e-10, atol=1e-12)


class Cube(torch.autograd.Function):
    """x^3, with a backward that can be differentiated and no forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        grad: Tensor = 3 * x**2 * gradients[0]
        return grad


def test_without_a_forward_derivative_it_goes_twice_backward_and_says_so() -> None:
    x = random(5)
    problem = Problem(lambda p, _: Cube.apply(p["x"]).sum() + p["unused"].sum(), {"x": x, "unused": x}, None, dtype=F64)
    torch.testing.assert_close(dense(problem)[0].diagonal(), torch.cat([6 * x, 0 * x]))
    said = hutchinson_trace(problem, 2)
    assert said.second_derivatives == "double-backward"
    assert said.why


def test_attention_takes_its_mathematical_form_and_says_so() -> None:
    """In FP32, where the fused form would be taken, which has no second derivative."""
    qkv = random(3, 2, 5, 4)

    def loss(p: Any, batch: None) -> Tensor:
        q, k, v = p["qkv"].unbind(0)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).square().mean()

    def written(p: Any, batch: None) -> Tensor:
        q, k, v = p["qkv"].unbind(0)
        scores = (q @ k.mT / 2).masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -math.inf)
        mixed: Tensor = scores.softmax(-1) @ v
        return mixed.square().mean()

    one, other = (Problem(f, {"qkv": qkv}, None) for f in (loss, written))
    v = random(1, one.P, seed=1)
    torch.testing.assert_close(one.hvp(v), other.hvp(v), rtol=1e-4, atol=1e-6)
    assert one.mode == "forward-over-reverse", one.why
    assert hutchinson_trace(one, 2).attention == "math"


def test_dinhs_rescaling_moves_lambda_max_and_not_the_loss() -> None:
    """A ReLU network with one layer larger by a and the next smaller: the same function (Dinh et al. 2017, 1703.04933)."""
    x, y, w, u = random(20, 4), random(20, seed=1), random(4, 6, seed=2), random(6, seed=3)

    def loss(p: Any, batch: None) -> Tensor:
        error: Tensor = (x @ p["w"]).relu() @ p["u"] - y
        return error.square().mean()

    plain, scaled = (Problem(loss, {"w": w * a, "u": u / a}, None, dtype=F64) for a in (1.0, 8.0))
    torch.testing.assert_close(plain.value(), scaled.value(), rtol=1e-13, atol=0)
    before, after = (float(hessian_eigenvalues(p).dataset.hessian_eigenvalue[0]) for p in (plain, scaled))
    assert after > 5 * before


# Everything as it was, and refusals.


class MoodError(Exception):
    """A loss's own error."""


@pytest.mark.parametrize("fails", [False, True])
def test_parameters_buffers_and_random_state_are_as_before(fails: bool) -> None:
    """Also after an exception, in training mode, where batch norm writes its buffers and the loss draws random numbers."""
    model, batch = cnn()
    inner, calls = module_loss(model), 0

    def loss(p: Any, b: Any) -> Tensor:
        nonlocal calls
        calls += 1
        torch.rand(3)
        value = inner(p, b)
        with torch.no_grad():
            model.out.bias.add_(1)  # not what is differentiated, but the caller's
        if fails and calls == 7:
            raise MoodError
        return value

    before, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    params = {name: value.detach() for name, value in model.named_parameters()}
    problem = Problem(loss, params, batch, dtype=F64, state=model)
    measures: list[Callable[[Problem], Any]] = [
        hessian_eigenvalues, lambda p: hutchinson_trace(p, 4), lambda p: xtrace(p, 4), gradient_curvature,
        lambda p: spectral_density(p, 1, 5), critical_sharpness,
    ]  # fmt: skip
    for measure in measures:
        calls = 0
        if fails and measure is not gradient_curvature:  # which is done by then
            with pytest.raises(MoodError):
                [measure(problem) for _ in range(7)]
        else:
            measure(problem)
        torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
        assert torch.equal(torch.get_rng_state(), generator)
        assert all(p.grad is None for p in model.parameters())
        assert not torch.is_inference_mode_enabled()


def test_it_works_under_no_grad_and_inference_mode() -> None:
    want, slope = dense(softmax_problem(None)), softmax_problem(None).gradient()[1]
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            problem = softmax_problem([23, 7])
            torch.testing.assert_close(dense(problem), want, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(problem.gradient()[1], slope, rtol=1e-12, atol=1e-14)


def test_a_loss_with_dropout_is_refused() -> None:
    with pytest.raises(LandscapeError, match="not deterministic"):
        Problem(lambda p, _: F.dropout(p["x"], 0.5).sum(), {"x": random(20)}, None)


X = {"x": torch.ones(3)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Problem(lambda p, _: p["x"].sum(), X, None, dtype=torch.bfloat16), "dtype must be"),
        (lambda: Problem(lambda p, _: p["x"], X, None), r"a scalar, got \[3\]"),
        (lambda: Problem(lambda p, _: p["x"].sum(), X, None, runs=True), r"\[3\], one a run, got \[\]"),
        (
            lambda: Problem(lambda p, _: p["x"].sum(), {"x": torch.ones(3).int()}, None),
            "floating tensors, got torch.int32",
        ),
        (lambda: Problem(lambda *_: torch.zeros(()), {}, None), "at least one tensor"),
        (lambda: Problem(lambda *_: torch.zeros(()), X | {"y": torch.ones(2)}, None, runs=True), r"got \[2, 3\]"),
        (lambda: Problem(lambda p, _: p["x"].sum(), X, [1, 2], weights=[3]), "2 pieces and 1 weights"),
        (lambda: Problem(lambda p, _: p["x"].sum(), X, [1, 2], weights=[3, 0]), "positive numbers"),
        (lambda: Problem(lambda p, _: p["x"].sum(), X, None).hvp(torch.ones(3)), r"must be \[1, 3\]"),
        (lambda: Problem(lambda p, _: p["x"].sum(), X, None).vector({"y": torch.ones(3)}), "named"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(LandscapeError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


# Programs.


def test_a_recorded_product_is_the_same_to_the_bit() -> None:
    """Pieces of two shapes, two programs; and the gradient's, at other parameters too."""
    x, w, labels = random(30, 4), random(4, 3, seed=1), torch.arange(30) % 3
    pieces = list(zip(x.split([12, 12, 6]), labels.split([12, 12, 6]), strict=True))

    def problem(how: Any) -> Problem:
        return Problem(softmax, {"w": w}, pieces, weights=lambda piece: len(piece[1]), dtype=F64, program=how)

    eager, other, v = problem("eager"), problem("recorded"), random(1, 12, seed=3)
    for _ in range(2):
        assert torch.equal(other.hvp(v), eager.hvp(v))
        assert torch.equal(other.hvp(2 * v), 2 * eager.hvp(v))
        for at in (None, eager.point + 1):
            for got, want in zip(other.gradient(at), eager.gradient(at), strict=True):
                assert torch.equal(got, want)
    assert other.mode == "forward-over-reverse"
    assert hutchinson_trace(other, 2).program == "recorded"
    assert len(other._tangents._made) == len(other._gradients._made) == 2


def test_what_a_product_does_not_need_is_not_computed() -> None:
    """Of each of two layers: the gradient's own product for its weights, beside which the tangent is."""
    x, y, w = random(5, 4), random(5, 2, seed=1), {"a": random(4, 3, seed=2), "b": random(3, 2, seed=3)}

    class Count(TorchDispatchMode):
        products = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.products += func is torch.ops.aten.mm.default
            return func(*args, **(kwargs or {}))

    counts = []
    for how in ("eager", "recorded"):
        problem = Problem(lambda p, b: (torch.tanh(b @ p["a"]) @ p["b"] - y).pow(2).sum(), w, x, dtype=F64, program=how)
        problem.hvp(problem.point)
        with Count() as count:
            problem.hvp(problem.point)
        counts.append(count.products)
    assert counts[0] - counts[1] == 2


def by_an_if(p: Any, _: None) -> Tensor:
    x: Tensor = p["x"]
    return (x if x.square().sum() < 3.5 else -x).pow(3).sum()


def by_a_number(p: Any, _: None) -> Tensor:
    x: Tensor = p["x"]
    return x.pow(3).sum() * float(np.asarray(x.detach().cpu().tolist()).sum())


@pytest.mark.parametrize("loss", [by_an_if, by_a_number])
def test_a_loss_that_goes_by_its_parameters_values_is_not_recorded(loss: Any) -> None:
    """Whose program would keep what was decided, or computed, once."""
    with pytest.raises(LandscapeError, match=r"can't be recorded, .* take program='eager'") as caught:
        Problem(loss, {"x": torch.ones(3)}, None, program="recorded").hvp(torch.ones(1, 3))
    assert "\n" not in str(caught.value)


def test_a_program_that_keeps_a_value_is_refused() -> None:
    """Of a loss that is another at each call, by a counter that no recording sees."""
    kept = []

    def loss(p: Any, _: None) -> Tensor:
        x: Tensor = p["x"]
        kept.append(0)
        return x.pow(3).sum() * len(kept)

    programs = Programs(lambda x, _: loss({"x": x}, None), "recorded")
    with pytest.raises(LandscapeError, match="at other parameters its program gives other numbers"):
        programs([torch.ones(3)], None)


def test_a_compiled_product_is_the_same_but_for_rounding() -> None:
    x, w, labels = random(30, 4), random(4, 3, seed=1), torch.arange(30) % 3
    eager, other = (Problem(softmax, {"w": w}, (x, labels), dtype=F64, program=how) for how in ("eager", "compiled"))
    v = random(1, 12, seed=3)
    torch.testing.assert_close(other.hvp(v), eager.hvp(v), rtol=1e-12, atol=1e-14)
    assert other.mode == "forward-over-reverse"
