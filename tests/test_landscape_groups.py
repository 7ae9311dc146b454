"""A pack that is measured a few runs at a time: right by NumPy, the same bits beside anybody, and no product for who is done.

The Hessians are matrices that are written down, some of whose largest eigenvalues stand alone and some in a crowd, which takes
many products; NumPy knows them all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from landscape import (
    Batches,
    LandscapeError,
    Problem,
    critical_sharpness,
    hessian_eigenvalues,
    preconditioned_eigenvalues,
)
from tests.small import resolve
from tests.test_landscape_hessian import numbers, random, with_spectrum
from tests.test_probes import ALL, SMALL, setting
from tests.test_surface import RECIPES, TINY, of, weights
from train import at_point, measured_together
from train.at_point import AtPoint
from train.measured_together import Together, in_groups, is_of_whole_tensors, together
from train.model import ModelShape
from train.pack import Pack, train_pack
from train.taking import take
from train.text import Text

F64 = torch.float64
P = 40


def alone(seed: int) -> Tensor:
    """A largest eigenvalue that a few products find."""
    return with_spectrum(torch.cat([torch.linspace(0.1, 1, P - 1), torch.tensor([30.0])]).to(F64), seed)


def crowded(seed: int) -> Tensor:
    """One that takes many."""
    return with_spectrum(torch.cat([torch.linspace(0.1, 4.8, P - 2), torch.tensor([4.95, 5.0])]).to(F64), seed)


class Counted:
    """x^T A x / 2 of each run, and of how many runs the loss was asked for, call by call."""

    def __init__(self, A: Tensor, group: int | None, at: Tensor | None = None, dtype: torch.dtype = F64) -> None:
        self.calls: list[tuple[int, ...]] = []

        def loss(p: Any, batch: Tensor) -> Tensor:
            half: Tensor = torch.einsum("ri,rij,rj->r", p["x"], batch, p["x"]) / 2
            return half

        def of_runs(runs: Sequence[int]) -> tuple[Any, Batches]:
            def counted(p: Any, batch: Tensor) -> Tensor:
                self.calls.append(tuple(runs))
                return loss(p, batch)

            return counted, Batches([A[list(runs)]] * 2, [1.0, 2.0])

        point = {"x": random(*A.shape[:2], seed=99) if at is None else at}
        some: dict[str, Any] = {} if group is None else {"of_runs": of_runs, "group": group}
        self.problem = Problem(loss, point, Batches([A] * 2, [1.0, 2.0]), run_axis=True, dtype=dtype, **some)
        self.calls.clear()


MIXED = torch.stack([alone(0), crowded(1), alone(2), alone(3), crowded(4), alone(5), alone(6)])


@pytest.mark.parametrize("group", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("k", [1, 2])
def test_eigenvalues_are_numpys_whoever_stands_together(group: int, k: int) -> None:
    found = hessian_eigenvalues(Counted(MIXED, group).problem, k, basis=6, tolerance=1e-7, max_hvp=400)
    want = np.linalg.eigvalsh(MIXED.numpy())[:, ::-1][:, :k]
    np.testing.assert_allclose(found.dataset.hessian_eigenvalue, want, rtol=1e-10)
    assert found.dataset.converged.all()
    turned = torch.einsum("rij,rkj->rki", MIXED, found.vectors)
    np.testing.assert_allclose(turned, torch.from_numpy(want.copy())[..., None] * found.vectors, atol=1e-4)


def test_preconditioned_ones_are_numpys_too() -> None:
    p = random(*MIXED.shape[:2], seed=3).exp()
    found = preconditioned_eigenvalues(Counted(MIXED, 2).problem, {"x": p}, basis=8, tolerance=1e-7, max_hvp=400)
    root = p.rsqrt().numpy()
    want = np.linalg.eigvalsh(root[:, :, None] * MIXED.numpy() * root[:, None])[:, -1]
    np.testing.assert_allclose(found.dataset.preconditioned_eigenvalue[:, 0], want, rtol=1e-10)


@pytest.mark.parametrize("group", [1, 2, 3])
def test_a_run_that_is_done_is_multiplied_no_more(group: int) -> None:
    """As many groups a product as those hold that are not done by then, and one product of everybody for the residuals."""
    counted = Counted(MIXED, group)
    found = hessian_eigenvalues(counted.problem, basis=6, tolerance=1e-7, max_hvp=400).dataset
    made = np.array(numbers(found.n_hvp)) - 1
    assert made.max() > 3 * np.median(made)
    waiting = [int((made >= n).sum()) for n in range(1, int(made.max()) + 1)]
    products = sum(-(-count // group) for count in [*waiting, len(MIXED)])
    assert len(counted.calls) == 2 * products, "two pieces each"
    assert {len(call) for call in counted.calls} == {group}


def test_a_run_has_the_same_bits_beside_any_others_and_in_any_slot() -> None:
    """In FP32, where another order of sums would show: among slow ones that stay to the end, and among fast ones."""
    point, found = random(len(MIXED), P, seed=99), []
    for order in ([0, 1, 2, 3, 4, 5, 6], [1, 4, 6, 5, 0, 2, 3], [0, 0, 0, 0, 1, 0, 0]):
        counted = Counted(MIXED[order].float(), 2, point[order].float(), torch.float32)
        pairs = hessian_eigenvalues(counted.problem, basis=6, tolerance=1e-4)
        slot = order.index(1)
        found.append(
            [pairs.dataset[name].values[slot].tolist() for name in ("hessian_eigenvalue", "residual", "n_hvp")]
        )
        found[-1].append(pairs.vectors[slot].tolist())
    assert found[0] == found[1] == found[2]
    assert found[0][2] > 12


def test_a_run_without_numbers_costs_one_product_and_one_that_is_not_asked_for_none() -> None:
    A = MIXED.clone()
    A[1] = torch.nan
    counted = Counted(A, 1)
    asked = [0, 1, 3]
    found = hessian_eigenvalues(counted.problem, basis=6, tolerance=1e-7, asked=asked).dataset
    others = [r for r in range(len(A)) if r not in (0, 3)]
    assert np.isnan(found.hessian_eigenvalue[others]).all()
    assert not found.converged[others].any()
    assert numbers(found.n_hvp[others]) == [2, 1, 1, 1, 1]
    want = np.linalg.eigvalsh(A[[0, 3]].numpy())[:, -1]
    np.testing.assert_allclose(found.hessian_eigenvalue[[0, 3], 0], want, rtol=1e-10)
    for wrong in ([0, 0], [7], [-1]):
        with pytest.raises(LandscapeError, match=r"asked must be different runs of 0\.\.6"):
            hessian_eigenvalues(counted.problem, asked=wrong)


@pytest.mark.parametrize("group", [None, 2, 3])
def test_what_is_asked_of_some_runs_is_theirs(group: int | None) -> None:
    at, v, runs = random(7, P, seed=1), random(7, P, seed=2), [5, 0, 3]
    problem = Counted(MIXED, group, at).problem
    np.testing.assert_allclose(problem.hvp(v), torch.einsum("rij,rj->ri", MIXED, v), rtol=1e-12)
    np.testing.assert_allclose(problem.hvp(v[runs], runs), torch.einsum("rij,rj->ri", MIXED[runs], v[runs]), rtol=1e-12)
    for x, of_runs in ((at, None), (at[runs], runs), (v[runs], runs)):
        A = MIXED if of_runs is None else MIXED[of_runs]
        slope = torch.einsum("rij,rj->ri", A, x)
        given = None if x is at else x
        value, gradient = problem.gradient(given, of_runs)
        np.testing.assert_allclose(gradient, slope, rtol=1e-12)
        np.testing.assert_allclose(value, (x * slope).sum(1) / 2, rtol=1e-12)
        np.testing.assert_allclose(problem.value(given, of_runs), (x * slope).sum(1) / 2, rtol=1e-12)
    with pytest.raises(LandscapeError, match=r"a vector must be \[3, 40\]"):
        problem.hvp(v, runs)


def test_critical_sharpness_leaves_out_who_is_done() -> None:
    """Down the gradient of a quadratic it is g^T A g / g^T g; steps are tried for those alone that do not know theirs."""
    scales = torch.tensor([1.0, 40.0, 1.0, 1e4, 1.0], dtype=F64)
    A = scales[:, None, None] * torch.stack([alone(r) for r in range(5)])
    at = random(5, P, seed=4)
    counted = Counted(A, 1, at)
    found = critical_sharpness(counted.problem, learning_rate=0.05, tolerance=1e-3)
    g = torch.einsum("rij,rj->ri", A, at)
    want = torch.einsum("ri,rij,rj->r", g, A, g) / g.square().sum(1)
    np.testing.assert_allclose(found.critical_sharpness, want, rtol=1e-3)
    made = np.array(numbers(found.n_forward))
    assert made.max() > made.min() + 5
    assert len(counted.calls) == 2 * (made.sum() + len(A)), "and a gradient of each"
    whole = critical_sharpness(Counted(A, None, at).problem, learning_rate=0.05, tolerance=1e-3)
    assert numbers(whole.n_forward) == made.tolist()


def test_a_group_needs_what_it_is_made_of() -> None:
    def loss(p: Any, batch: Tensor) -> Tensor:
        product: Tensor = (p["x"] * batch).sum(1)
        return product

    def of_runs(runs: Sequence[int]) -> tuple[Any, Tensor]:
        return loss, batch[list(runs)]

    batch = random(3, 4)
    where: dict[str, Any] = {"params": {"x": random(3, 4)}, "batch": batch, "run_axis": True}
    with pytest.raises(LandscapeError, match="group=2 needs of_runs"):
        Problem(loss, **where, group=2)
    with pytest.raises(LandscapeError, match="group must be at least 1, got 0"):
        Problem(loss, **where, of_runs=of_runs, group=0)
    with pytest.raises(LandscapeError, match="program=\"eager\", got run_axis=True and program='recorded'"):
        Problem(loss, **where, of_runs=of_runs, program="recorded")
    with pytest.raises(LandscapeError, match=r"of_runs must part the batch .* \[0.5, 0.5\], got \[1.0\]"):
        Problem(loss, **where | {"batch": Batches([batch, batch], [1.0, 1.0])}, of_runs=of_runs, group=2)


# Of packs.


@pytest.mark.parametrize("name", [*RECIPES, "stochastic-e4m3"])
def test_the_loss_of_some_runs_is_the_one_that_they_have_among_all(name: str) -> None:
    delayed = [place.rules.is_delayed for place in resolve(name).structure.places if place and place.rules]
    # Coarse ones, each run's own, so that another run's would show.
    scales = {key: 2.0 ** torch.arange(12.0).view(4, 3) for key in weights(TINY, 1)} if any(delayed) else None
    made, params, (tokens, targets) = of(name, runs=4, scales=scales)
    params = {key: p.float() for key, p in params.items()}
    runs = [2, 0, 0]
    whole = made.loss(params, (tokens, targets))
    some = made.of_runs(runs).loss({key: p[runs] for key, p in params.items()}, (tokens[runs], targets[runs]))
    torch.testing.assert_close(some, whole[runs], rtol=1e-6, atol=0)


def test_runs_of_other_formats_keep_theirs(text: Text) -> None:
    """Groups of a run: of recipes that share a program each has its own format, so that another's would show."""
    made, params, (tokens, targets) = of("masked-e5m7", runs=2)
    other, *_ = of("masked-e5m2", runs=2)
    mixed = dataclasses.replace(made, slots=(made.slots[0], other.slots[1]), _made={})
    params = {key: p.float() for key, p in params.items()}
    want = torch.stack([made.loss(params, (tokens, targets))[0], other.loss(params, (tokens, targets))[1]])
    assert (want - made.loss(params, (tokens, targets))).abs()[1] > 1e-4
    for group in (1, 2):
        problem = mixed.problem(params, tokens, targets, group=group)
        torch.testing.assert_close(problem.value(), want, rtol=1e-6, atol=0)


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(measured_together.BUSY, "cpu", 1)


@pytest.mark.usefixtures("small_groups")
def test_a_pack_in_groups_has_the_values_of_a_pack_as_a_whole(text: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    """In FP64, where another order of sums is 1e-9 at most; also of what is done and of how many products that took."""
    probe = dataclasses.replace(
        ALL,
        measures=("hessian_eigenvalue", "critical_sharpness", "gradient_curvature", "asam_sharpness", "box_sharpness"),
        eigenvalues=1,
    )
    program, slots = setting("native-fp64", (3e-3, 2e-3, 4e-3, 1e-3), probe=probe)
    pack = Pack(program, slots, text, torch.device("cpu"))
    for _ in range(3):
        pack.step()
    few = dataclasses.replace(probe, at_once=1)
    assert together(program, few, 4, "cpu") == Together(1, 2)
    for measure in probe.measures:
        found, _ = take(measure, AtPoint(pack, few))
        with monkeypatch.context() as patch:
            patch.setattr(AtPoint, "problem", property(whole))
            patch.setattr(at_point, "in_groups", lambda surface, _: surface.loss)
            want, _ = take(measure, AtPoint(pack, few))
        for name, values in found.items():
            np.testing.assert_allclose(values, want[name], rtol=1e-8, err_msg=name)


def whole(at: AtPoint) -> Problem:
    """All runs at once."""
    return at.surface.problem(at.params, *at.pack.held_out[0], sequences=1)


@pytest.mark.usefixtures("small_groups")
def test_a_neighbour_changes_nothing_in_groups_either(text: Text) -> None:
    measures = (
        "hessian_eigenvalue",
        "preconditioned_eigenvalue",
        "critical_sharpness",
        "gradient_curvature",
        "sam_sharpness",
    )
    probe = dataclasses.replace(ALL, measures=measures, eigenvalues=1, at_once=1, quantisers="on")
    program, slots = setting("e4m3", (3e-3, 1e-2, 1e6, 2e-3), probe=probe)
    assert together(program, probe, 4, "cpu").runs == 1
    wild = train_pack(program, slots, text, torch.device("cpu"))
    order = [1, 0, 3, 3]
    tame = train_pack(program, [slots[i] for i in order], text, torch.device("cpu"))
    assert np.isnan(wild.measures["hessian_eigenvalue/hessian_eigenvalue"][-1, 2]).all()
    for name, values in wild.measures.items():
        np.testing.assert_array_equal(values[:, order], tame.measures[name], err_msg=name)


STUDY = ModelShape(layers=4, heads=4, width=128, context=256, vocabulary=256)


@pytest.mark.parametrize(
    ("recipe", "runs", "changes", "want"),
    [
        ("masked-e5m7", 128, {}, Together(16, 8)),
        ("masked-e5m7", 32, {}, Together(4, 8)),
        ("masked-e5m7", 4, {}, Together(1, 4)),
        ("masked-e5m7", 1, {}, Together(1, 1)),
        ("masked-e5m7", 128, {"at_once": 8}, Together(16, 8)),
        ("mxfp8", 128, {}, Together(128, 1)),
        ("stochastic-e4m3", 128, {}, Together(128, 1)),
        ("stochastic-e4m3", 128, {"at_once": 4}, Together(32, 4)),
        ("stochastic-e4m3", 128, {"quantisers": "off"}, Together(16, 8)),
    ],
)
def test_as_many_runs_together_as_keep_a_gpu_busy_in_no_more_memory(
    recipe: str, runs: int, changes: dict[str, Any], want: Together
) -> None:
    asked: dict[str, Any] = {"at_once": 1, "quantisers": "on"} | changes
    probe = dataclasses.replace(ALL, **asked)
    program, _ = setting(recipe, shape=STUDY, sequences=8)
    assert together(program, probe, runs, "cuda") == want
    assert want.runs * want.sequences <= runs * probe.at_once


@pytest.mark.parametrize("name", ["nvfp4", "deepseek", "stochastic-e4m3", "ms-amp-o1", "deepseek-hopper"])
def test_sequences_are_put_together_only_where_each_number_is_rounded_by_itself(name: str) -> None:
    program, _ = setting(name, shape=SMALL)
    assert is_of_whole_tensors(program)


@pytest.mark.parametrize("group", [1, 2, 3])
def test_first_derivatives_in_groups_are_those_of_all_runs_at_once(group: int) -> None:
    """Of all parameters, and of some; of five runs, which no group divides; each time of the loss times something a run."""
    made, params, batch = of("masked-e5m7", runs=5)
    for names in (list(params), ["wte"]):
        found = []
        for loss in (made.loss, in_groups(made, group)):
            leaves = {name: params[name].clone().requires_grad_() for name in names}
            losses = loss(params | leaves, batch)
            slopes = torch.autograd.grad((losses * torch.arange(1.0, 6.0, dtype=F64)).sum(), list(leaves.values()))
            found.append([losses.detach(), *slopes])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(in_groups(made, group)(params, batch), made.loss(params, batch), rtol=1e-12, atol=0)


def test_adams_preconditioner_is_by_each_runs_own_updates(text: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that have skipped steps, as under a dynamic loss scale, have made fewer."""
    program, slots = setting("native-fp64", (3e-3, 2e-3, 1e-3))
    pack = Pack(program, slots, text, torch.device("cpu"))
    for _ in range(3):
        pack.step()
    made = torch.tensor([3, 1, 3])
    monkeypatch.setattr(AtPoint, "updates", property(lambda _: made))
    found, adam = AtPoint(pack, ALL).preconditioner, program.optimizer
    for name, p in found.items():
        second = pack.kept[name].second
        assert second is not None
        for run, t in enumerate(made.tolist()):
            v = second[run].numpy()
            want = (1 - adam.beta1**t) * (np.sqrt(v / (1 - adam.beta2**t)) + adam.eps) / pack.rules[name].factor
            np.testing.assert_allclose(p[run], np.where(v == 0, np.inf, want), rtol=1e-12)
