"""What holds of every measure of a loss, one test for all: nothing of the caller's is left changed, a batch may come in parts,
NaN stays NaN, a loss that is not one function is refused. Defects that other libraries have are named.

A measure added to `landscape` and not to the table here fails the first test.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import landscape as ls
from landscape import Batches, LandscapeError, Problem

F64 = torch.float64
Params = dict[str, Tensor]


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=F64)


# Every measure of a loss: measure(loss, params, batch, run_axis=..., state=...) -> its values by name.
Values = dict[str, Tensor]
Measure = Callable[..., Values]


def of_dataset(data: xr.Dataset) -> Values:
    return {str(n): torch.from_numpy(np.asarray(v.values)) for n, v in data.data_vars.items()}


def of_result(result: Any) -> Values:
    return {n: torch.as_tensor(v) for n, v in vars(result).items() if v is not None}


def of_problem(measure: Callable[[Problem], Any]) -> Measure:
    def measured(*args: Any, **how: Any) -> Values:
        found = measure(Problem(*args, dtype=F64, **how))
        return of_dataset(found.dataset if isinstance(found, ls.Eigenpairs) else found)

    return measured


def of_point(measure: Callable[..., Any], **more: Any) -> Measure:
    return lambda *args, **how: of_result(measure(*args, **more, **how))


def m_sam(loss: Any, params: Params, batch: Any, **how: Any) -> Values:
    return of_result(ls.m_sam_sharpness(loss, params, batch, [0.1], m=8, **how))


def sliced(loss: Any, params: Params, batch: Any, **how: Any) -> Values:
    return of_dataset(ls.slice_loss(loss, params, batch, params, [-0.1, 0.0, 0.1], **how))


def between(loss: Any, params: Params, batch: Any, **how: Any) -> Values:
    last = {n: 0.9 * v for n, v in params.items()}
    return of_dataset(ls.slice_between(loss, params, last, batch, [0.0, 0.5, 1.0], **how))


def preconditioned(problem: Problem) -> ls.Eigenpairs:
    return ls.preconditioned_eigenvalues(problem, problem.tree(1 + problem.point.abs()), tolerance=1e-9)


MEASURES: dict[str, Measure] = {
    "hessian_eigenvalues": of_problem(lambda p: ls.hessian_eigenvalues(p, 2, tolerance=1e-9)),
    "hessian_eigenvalues, smallest": of_problem(lambda p: ls.hessian_eigenvalues(p, which="smallest", tolerance=1e-9)),
    "preconditioned_eigenvalues": of_problem(preconditioned),
    "hutchinson_trace": of_problem(lambda p: ls.hutchinson_trace(p, 4)),
    "xtrace": of_problem(lambda p: ls.xtrace(p, 6)),
    "spectral_density": of_problem(lambda p: ls.spectral_density(p, 2, 4)),
    "gradient_curvature": of_problem(ls.gradient_curvature),
    "critical_sharpness": of_problem(lambda p: ls.critical_sharpness(p, learning_rate=0.1)),
    "box_sharpness": of_point(ls.box_sharpness, epsilon=[1e-2], starts=2),
    "box_sharpness, lbfgsb": of_point(ls.box_sharpness, epsilon=[1e-2], method="lbfgsb", subspace=4),
    "ball_sharpness": of_point(ls.ball_sharpness, rho=[0.1], steps=3, starts=2),
    "sam_sharpness": of_point(ls.sam_sharpness, rho=[0.1]),
    "asam_sharpness": of_point(ls.asam_sharpness, rho=[0.1]),
    "m_sam_sharpness": m_sam,
    "average_sharpness": of_point(ls.average_sharpness, rho=[0.1], samples=3),
    "gradient_direction": lambda *args, **how: dict(ls.gradient_direction(*args, **how)),
    "slice_loss": sliced,
    "slice_between": between,
}
every = pytest.mark.parametrize("name", MEASURES)
by_products = pytest.mark.parametrize("name", [n for n in MEASURES if n.split(",")[0] in (
    "hessian_eigenvalues", "preconditioned_eigenvalues", "hutchinson_trace", "xtrace", "spectral_density", "gradient_curvature",
)])  # fmt: skip
# What takes no loss: logits, directions, datasets, and what the measures are made of.
OTHERS = {
    "adam_preconditioner", "half_width", "hidden_sharpness", "labelled", "lbfgsb_logit_sharpness", "logit_sharpness",
    "module_loss", "random_direction", "small_box_sharpness", "smoothed_density", "smoothed_logit_sharpness", "validate",
}  # fmt: skip


def test_the_table_here_has_every_measure() -> None:
    functions = {n for n in ls.__all__ if inspect.isfunction(getattr(ls, n))}
    assert {n.split(",")[0] for n in MEASURES} | OTHERS == functions


def net(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    """[R] or a scalar, the mean over the examples."""
    x, y = batch
    error = torch.tanh(x @ p["a"]) @ p["b"] - y
    return error.square().mean((-1, -2))


BATCH = (draw(20, 4, seed=2), draw(20, 2, seed=3))


def weights(*lead: int) -> Params:
    return {"a": draw(*lead, 4, 3), "b": draw(*lead, 3, 2, seed=1)}


def same(found: Values, wanted: Values, rtol: float = 0.0, but: tuple[str, ...] = ()) -> None:
    assert found.keys() == wanted.keys()
    for name in found.keys() - set(but):
        atol = 0.0 if rtol == 0 else 1e-9
        torch.testing.assert_close(found[name], wanted[name], rtol=rtol, atol=atol, equal_nan=True)


# Everything as it was.


class MoodError(Exception):
    """A loss's own error."""


class Watched(nn.Module):
    """A loss that counts its evaluations, draws random numbers, and writes to its buffer and to a parameter; it may fail."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(value) for value in weights().values())
        self.register_buffer("calls", torch.zeros(()))
        self.evaluations, self.fails_at = 0, math.inf

    def forward(self, p: Params, batch: Any) -> Tensor:
        self.evaluations += 1
        with torch.no_grad():
            self.calls.add_(1)
            self.a.mul_(1.5)
        torch.rand(3)
        if self.evaluations >= self.fails_at:
            raise MoodError
        return net(p, batch)


def around() -> tuple[Any, ...]:
    """What surrounds a measure and is not the caller's tensors."""
    matmul = torch.backends.cuda.matmul.allow_tf32
    fused = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), matmul, fused, torch.get_default_dtype()


@pytest.fixture
def tf32() -> Iterator[None]:
    """TF32 on, as a caller may have it."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@every
@pytest.mark.usefixtures("tf32")
def test_parameters_buffers_gradients_and_random_state_are_as_before_also_after_an_exception(name: str) -> None:
    """At the first evaluation, in the middle and at the last; and where nothing goes wrong."""
    whole, surroundings = Watched(), around()
    params = {n: v.detach().clone() for n, v in whole.named_parameters()}
    MEASURES[name](whole, params, BATCH, state=whole)
    for fails_at in (1, 2, 3, (whole.evaluations + 3) // 2, whole.evaluations, math.inf):
        watched = Watched()
        watched.b.square().sum().backward()
        watched.fails_at = fails_at
        before = {n: v.clone() for n, v in watched.state_dict().items()}
        gradients = {n: None if v.grad is None else v.grad.clone() for n, v in watched.named_parameters()}
        given = {n: v.clone() for n, v in params.items()}
        torch.manual_seed(7)
        rng = torch.get_rng_state()
        if fails_at < math.inf:
            with pytest.raises(MoodError):
                MEASURES[name](watched, params, BATCH, state=watched)
        else:
            MEASURES[name](watched, params, BATCH, state=watched)
        same(dict(watched.state_dict()), before)
        same(params, given)
        assert torch.equal(torch.get_rng_state(), rng)
        assert around() == surroundings
        for n, v in watched.named_parameters():
            assert (v.grad is None) == (gradients[n] is None)
            assert v.requires_grad
            if v.grad is not None:
                torch.testing.assert_close(v.grad, gradients[n], rtol=0, atol=0)


@every
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_is_the_same_where_gradients_are_off(name: str, mode: Any) -> None:
    wanted = MEASURES[name](net, weights(), BATCH)
    with mode():
        same(MEASURES[name](net, weights(), BATCH), wanted)


# Defects of peers, each by its name.


@pytest.mark.parametrize("name", [n for n in MEASURES if n != "m_sam_sharpness"])  # which cuts the batch itself
def test_defect_a_sum_over_batches_grows_with_their_number_and_unequal_ones_are_averaged_unweighted(name: str) -> None:
    x, y = BATCH
    wanted = MEASURES[name](net, weights(), BATCH)
    cuts = Batches([(x[:13], y[:13]), (x[13:19], y[13:19]), (x[19:], y[19:])], lambda part: len(part[0]))
    for parts in (cuts, Batches([BATCH, BATCH, BATCH], [20, 20, 20])):
        # A product more or less, where a residual is about the tolerance: what it cost may differ, not what it found.
        same(MEASURES[name](net, weights(), parts), wanted, rtol=1e-6, but=("residual", "n_hvp", "n_forward"))


@by_products
def test_defect_the_hessian_is_evaluated_at_the_probe_instead_of_at_the_weights(name: str) -> None:
    """Of sum x^4 it is 12 x^2 at x, and elsewhere at x + v; all measures have a closed form, as it is diagonal."""
    x = torch.tensor([0.1, -0.4, 0.7, 1.0, -1.3], dtype=F64)
    H = 12 * x**2
    found = MEASURES[name](lambda p, _: p["x"].pow(4).sum(), {"x": x}, None)
    wanted = {
        "hessian_eigenvalues": ("hessian_eigenvalue", H.sort(descending=True).values[:2]),
        "hessian_eigenvalues, smallest": ("smallest_eigenvalue", H.min().reshape(1)),
        "preconditioned_eigenvalues": ("preconditioned_eigenvalue", (H / (1 + x.abs())).max().reshape(1)),
        "hutchinson_trace": ("hessian_trace", H.sum()),
        "xtrace": ("hessian_trace", H.sum()),
        "gradient_curvature": ("gradient_curvature", (H * x**6).sum() / (x**6).sum()),
    }
    if name == "spectral_density":
        moments = [(found["weight"] * found["node"] ** q).sum(-1) for q in (1, 2)]
        for moment, q in zip(moments, (1, 2), strict=True):
            torch.testing.assert_close(moment, (H**q).mean().expand(2), rtol=1e-9, atol=0)
        return
    variable, value = wanted[name]
    torch.testing.assert_close(found[variable], value, rtol=1e-8, atol=1e-8)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_defect_a_finite_difference_step_vanishes_in_bf16(name: str, dtype: torch.dtype) -> None:
    """Narrow parameters are refused, or measured at their values in FP64: as if they had been given so."""
    narrow = {n: v.to(dtype) for n, v in weights().items()}
    if name.split(",")[0] in ("box_sharpness", "ball_sharpness", "sam_sharpness", "asam_sharpness", "m_sam_sharpness",
                              "average_sharpness", "gradient_direction", "slice_loss", "slice_between"):  # fmt: skip
        with pytest.raises(ValueError, match=r"must be float32 or float64, got torch.*use .float\(\)"):
            MEASURES[name](net, narrow, BATCH)
    else:
        same(MEASURES[name](net, narrow, BATCH), MEASURES[name](net, {n: v.double() for n, v in narrow.items()}, BATCH))


@every
def test_defect_noise_is_added_to_a_maximum(name: str) -> None:
    """The same bits, whatever was drawn before."""
    first = MEASURES[name](net, weights(), BATCH)
    torch.manual_seed(12345)
    torch.rand(7)
    same(MEASURES[name](net, weights(), BATCH), first)


@pytest.mark.parametrize(
    "name", ["ball_sharpness", "sam_sharpness", "asam_sharpness", "box_sharpness", "box_sharpness, lbfgsb"]
)
def test_defect_noise_lifts_a_maximum_above_the_truth(name: str) -> None:
    """Of a loss that is flat: nothing rises."""
    found = MEASURES[name](lambda p, _: 0 * p["x"].sum() + 1, {"x": torch.ones(5, dtype=F64)}, None)
    assert found.get("value", found.get("lower")).tolist() == [0.0]  # type: ignore[union-attr]


@every
def test_defect_nan_is_replaced_by_a_mean_of_the_others(name: str) -> None:
    """Of a pack whose second run is lost, its numbers are NaN, and the others' are what they would be without it."""
    params = weights(3)
    found = MEASURES[name](net, params, BATCH, run_axis=True)
    params["a"][1, 0, 0] = math.nan
    lost = MEASURES[name](net, params, BATCH, run_axis=True)
    counts = ("n_hvp", "n_forward", "n_gradient", "direction_norm")
    assert found.keys() == lost.keys()
    for variable, value in lost.items():
        if value.ndim and len(value) == 3:
            same({variable: value[[0, 2]]}, {variable: found[variable][[0, 2]]}, rtol=1e-9)
            if value.is_floating_point() and variable not in counts:
                assert value[1].isnan().all(), variable
            if variable == "converged":
                assert not value[1].any()


@every
def test_a_loss_that_is_not_one_function_is_refused_with_the_reason(name: str) -> None:
    """Random numbers of a generator of its own, which nobody can put back."""
    noise = itertools.count()
    with pytest.raises(LandscapeError, match=r"not deterministic: .*values .* apart; turn dropout off") as caught:
        MEASURES[name](lambda p, b: net(p, b) * (1 + 1e-6 * next(noise)), weights(), BATCH)
    assert "\n" not in str(caught.value)


@every
def test_a_run_in_a_pack_is_the_run_alone(name: str) -> None:
    params = weights(3)
    together = MEASURES[name](net, params, BATCH, run_axis=True)
    for r in range(3):
        alone = MEASURES[name](net, {n: v[r : r + 1] for n, v in params.items()}, BATCH, run_axis=True)
        plain = MEASURES[name](net, {n: v[r] for n, v in params.items()}, BATCH)
        assert plain.keys() == together.keys()
        for variable, value in together.items():
            if value.ndim and len(value) == 3:
                for one in (alone[variable][0], plain[variable]):
                    torch.testing.assert_close(value[r], one, rtol=1e-6, atol=1e-9, equal_nan=True)


def moved(of: Any, device: torch.device) -> Any:
    return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, of)


@pytest.mark.cuda
@every
@pytest.mark.parametrize("run_axis", [False, True])
def test_on_a_gpu_it_is_what_it_is_on_the_cpu(name: str, run_axis: bool, cuda: torch.device) -> None:
    """In FP64; random directions, starts and probes are drawn alike on both."""
    params = weights(2) if run_axis else weights()
    wanted = MEASURES[name](net, params, BATCH, run_axis=run_axis)
    found = MEASURES[name](net, moved(params, cuda), moved(BATCH, cuda), run_axis=run_axis)
    same(moved(found, torch.device("cpu")), wanted, rtol=1e-6, but=("residual", "n_hvp", "n_forward"))


@pytest.mark.cuda
@pytest.mark.parametrize("D", [5, 40])
def test_hidden_states_and_logits_on_a_gpu_are_what_they_are_on_the_cpu(D: int, cuda: torch.device) -> None:
    x, W, t = draw(2, 20, D), draw(2, 60, D, seed=1), torch.arange(40).reshape(2, 20)
    logits = x @ W.mT
    found, wanted = (ls.hidden_sharpness(*given) for given in (moved((x, W, t), cuda), (x, W, t)))
    same(moved(of_result(found), torch.device("cpu")), of_result(wanted), rtol=1e-6)
    for measure in (ls.smoothed_logit_sharpness, ls.lbfgsb_logit_sharpness):
        found, wanted = (measure(*given) for given in (moved((logits, t), cuda), (logits, t)))
        same(moved(of_result(found), torch.device("cpu")), of_result(wanted), rtol=1e-6)


# Memory.


class Largest(TorchDispatchMode):
    """The most elements that a tensor made inside has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else (out,):
            if isinstance(made, Tensor):
                self.elements = max(self.elements, made.untyped_storage().nbytes() // made.element_size())
        return out


VOCABULARY, POSITIONS, WIDTH = 5000, 12, 8


@by_products
def test_products_of_a_large_vocabulary_need_the_logits_of_one_part_at_a_time(name: str) -> None:
    """[positions, vocabulary] is never there: of a part's two positions only."""
    w, x, t = 0.1 * draw(WIDTH, VOCABULARY), draw(POSITIONS, WIDTH, seed=1), torch.arange(POSITIONS)

    def loss(p: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy((batch[0] * p["gain"]) @ w, batch[1])

    parts = Batches(list(zip(x.split(2), t.split(2), strict=True)), [2.0] * 6)
    with Largest() as largest:
        MEASURES[name](loss, {"gain": torch.ones(WIDTH, dtype=F64)}, parts)
    assert 2 * VOCABULARY <= largest.elements <= WIDTH * VOCABULARY


@pytest.mark.parametrize("E", [1, 9])
def test_logits_of_a_large_vocabulary_need_a_few_times_themselves_whatever_the_epsilons(E: int) -> None:
    z, t = draw(POSITIONS, VOCABULARY), torch.arange(POSITIONS)
    for measure in (ls.logit_sharpness, ls.smoothed_logit_sharpness):
        with Largest() as largest:
            measure(z, t, [1e-3] * E)
        assert largest.elements <= POSITIONS * (VOCABULARY + 1)


def test_hidden_states_need_a_few_heads_however_many_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("landscape.boxes.AT_ONCE", 3 * VOCABULARY * WIDTH)
    x, W, t = draw(POSITIONS, WIDTH), draw(VOCABULARY, WIDTH, seed=1), torch.arange(POSITIONS)
    with Largest() as largest:
        ls.hidden_sharpness(x, W, t, enumerate_up_to=0)
    assert largest.elements <= 3 * VOCABULARY * WIDTH
