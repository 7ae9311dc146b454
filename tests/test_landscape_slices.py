"""Slices and planes of a loss against the loss itself, and filter normalisation against norms taken filter by filter."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from landscape import (
    Problem,
    gradient_direction,
    hessian_eigenvalues,
    module_loss,
    random_direction,
    slice_between,
    slice_loss,
    validate,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def net(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (torch.tanh(x @ params["a"]) @ params["b"] - y).square().mean((-1, -2))


BATCH = (draw(20, 4, seed=2), draw(20, 2, seed=3))
PARAMS = {"a": draw(4, 8), "b": draw(8, 2, seed=1)}


def test_every_point_of_a_slice_is_the_loss_there() -> None:
    d = {"a": draw(4, 8, seed=8), "b": draw(8, 2, seed=9)}
    alphas = [-1.0, 0.0, 0.5]
    got = slice_loss(net, PARAMS, BATCH, d, alphas)
    for alpha, value in zip(alphas, got["loss_slice"].values, strict=True):
        assert value == float(net({n: PARAMS[n] + alpha * d[n] for n in d}, BATCH))
    assert got["loss_slice"].dims == ("alpha",)
    assert got["alpha"].values.tolist() == alphas
    assert got["loss_slice"].attrs["units"] == "nats"
    assert float(got["direction_norm"]) == pytest.approx(math.hypot(float(d["a"].norm()), float(d["b"].norm())))
    assert validate(got) == []


def test_every_point_of_a_plane_is_the_loss_there_and_the_middle_is_the_loss_to_the_bit() -> None:
    d, e = {"a": draw(4, 8, seed=8)}, {"a": draw(4, 8, seed=9), "b": draw(8, 2, seed=10)}
    got = slice_loss(net, PARAMS, BATCH, d, [-1.0, 0.0], e, [0.0, 2.0, 3.0])
    for i, alpha in enumerate((-1.0, 0.0)):
        for j, beta in enumerate((0.0, 2.0, 3.0)):
            at = {"a": PARAMS["a"] + alpha * d["a"] + beta * e["a"], "b": PARAMS["b"] + beta * e["b"]}
            assert got["loss_plane"].values[i, j] == pytest.approx(float(net(at, BATCH)), rel=1e-13)
    assert got["loss_plane"].values[1, 0] == float(net(PARAMS, BATCH))
    cosine = (d["a"] * e["a"]).sum() / d["a"].norm() / torch.cat([e["a"].flatten(), e["b"].flatten()]).norm()
    assert float(got["direction_cosine"]) == pytest.approx(float(cosine))
    assert validate(got) == []


def test_between_two_checkpoints_the_ends_are_their_losses_to_the_bit() -> None:
    """a + 1 (b - a) is not b in floating point: at 1e8 and 1e-8 it is nowhere near."""
    last = {"a": 1e-8 * draw(4, 8, seed=5), "b": draw(8, 2, seed=6)}
    first = {"a": 1e8 * PARAMS["a"], "b": PARAMS["b"]}
    got = slice_between(net, first, last, BATCH, [0.0, 0.25, 1.0])
    assert got["loss_slice"].values[0] == float(net(first, BATCH))
    assert got["loss_slice"].values[2] == float(net(last, BATCH))
    middle = {n: 0.75 * first[n] + 0.25 * last[n] for n in first}
    assert got["loss_slice"].values[1] == pytest.approx(float(net(middle, BATCH)), rel=1e-12)
    assert validate(got) == []


@pytest.mark.parametrize("run_axis", [False, True])
def test_each_filter_of_a_random_direction_has_the_norm_of_the_weights_filter(run_axis: bool) -> None:
    shapes = {"linear": (5, 3), "conv": (4, 3, 2, 2), "other_way": (3, 6), "bias": (5,)}
    lead = (2,) if run_axis else ()
    params = {name: draw(*lead, *shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    got = random_direction(params, seed=4, filter_axis={"other_way": 1}, run_axis=run_axis)
    for r in range(2 if run_axis else 1):
        w, d = ({n: (v[r] if run_axis else v).numpy() for n, v in tree.items()} for tree in (params, got))
        for name in ("linear", "conv"):
            for i in range(w[name].shape[0]):
                assert np.linalg.norm(d[name][i].ravel()) == pytest.approx(np.linalg.norm(w[name][i].ravel()))
        for j in range(6):
            assert np.linalg.norm(d["other_way"][:, j]) == pytest.approx(np.linalg.norm(w["other_way"][:, j]))
        assert not d["bias"].any()
    assert not torch.allclose(got["linear"], random_direction(params, seed=5, run_axis=run_axis)["linear"])


def test_a_random_direction_does_not_depend_on_the_pack_or_the_global_generator() -> None:
    params = {"w": draw(3, 5, 4)}
    together = random_direction(params, run_axis=True)["w"]
    torch.manual_seed(99)
    for r in range(3):
        assert torch.equal(together[r], random_direction({"w": params["w"][r]})["w"])
    plain = random_direction(params, run_axis=True, filter_normalised=False)["w"]
    assert torch.equal(plain[0], plain[2])


def test_the_gradients_direction_is_uphill_with_the_gradients_slope() -> None:
    d = gradient_direction(net, PARAMS, BATCH)
    got = slice_loss(net, PARAMS, BATCH, d, [-1e-5, 1e-5])
    assert float(got["direction_norm"]) == pytest.approx(1, rel=1e-12)
    slope = float(np.diff(got["loss_slice"].values)[0]) / 2e-5
    leaves = {n: v.clone().requires_grad_(True) for n, v in PARAMS.items()}
    net(leaves, BATCH).backward()
    norm = math.sqrt(sum(float(v.grad.square().sum()) for v in leaves.values() if v.grad is not None))
    assert slope == pytest.approx(norm, rel=1e-6)


def test_a_pack_of_runs_is_each_run_alone() -> None:
    params = {"a": draw(3, 4, 8), "b": draw(3, 8, 2, seed=1)}
    d = random_direction(params, run_axis=True, filter_axis=1)
    e = gradient_direction(net, params, BATCH, run_axis=True)
    got = slice_loss(net, params, BATCH, d, [0.0, 1.0], e, [0.0, 0.1], run_axis=True)
    between = slice_between(net, params, d, BATCH, [0.0, 0.5], run_axis=True)
    assert got["loss_plane"].dims == ("run", "alpha", "beta")
    assert validate(got) == validate(between) == []
    for r in range(3):
        p, d1, e1 = ({n: v[r] for n, v in tree.items()} for tree in (params, d, e))
        alone = slice_loss(net, p, BATCH, d1, [0.0, 1.0], e1, [0.0, 0.1])
        for name in ("loss_plane", "direction_norm", "direction_cosine"):
            np.testing.assert_allclose(got[name].values[r], alone[name].values, rtol=1e-12, atol=1e-15)
        line = slice_between(net, p, d1, BATCH, [0.0, 0.5])
        np.testing.assert_allclose(between["loss_slice"].values[r], line["loss_slice"].values, rtol=1e-12)


def test_along_the_sharpest_direction_a_pack_bends_by_each_runs_eigenvalue() -> None:
    """Eigenpairs against the loss itself: f(h) - 2 f(0) + f(-h) is lambda h^2, with no derivative taken."""
    params = {"a": draw(3, 4, 8), "b": draw(3, 8, 2, seed=1)}
    problem = Problem(net, params, BATCH, run_axis=True, dtype=torch.float64)
    h = 1e-3
    for which, name in (("largest", "hessian_eigenvalue"), ("smallest", "smallest_eigenvalue")):
        found = hessian_eigenvalues(problem, 2, which=which, tolerance=1e-7)  # type: ignore[arg-type]
        for k in range(2):
            line = slice_loss(net, params, BATCH, problem.tree(found.vectors[:, k]), [-h, 0.0, h], run_axis=True)
            np.testing.assert_allclose(line["direction_norm"], 1, rtol=1e-9)
            bend = line["loss_slice"].values @ [1, -2, 1] / h**2
            np.testing.assert_allclose(bend, found.dataset[name][:, k], rtol=1e-4, atol=1e-6)


def test_directions_without_a_tensor_in_common_are_at_right_angles() -> None:
    found = slice_loss(net, PARAMS, BATCH, {"a": PARAMS["a"]}, [0.0], {"b": PARAMS["b"]}, [0.0])
    assert float(found["direction_cosine"]) == 0


def test_a_loss_of_nan_stays_nan_where_it_is() -> None:
    def loss(p: dict[str, Tensor], batch: Any) -> Tensor:
        return torch.where(p["w"] > 1.5, math.nan, p["w"]).sum()

    w = {"w": torch.ones(2)}
    got = slice_loss(loss, w, None, w, [0.0, 0.25, 1.0])
    assert np.isnan(got["loss_slice"].values).tolist() == [False, False, True]


def test_after_an_exception_all_is_as_before() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1)).double()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    rng, calls = torch.get_rng_state(), 0

    def compute(m: nn.Module, x: Tensor) -> Tensor:
        nonlocal calls
        value: Tensor = m(x).square().mean()
        calls += 1
        if calls == 3:
            raise RuntimeError("out of luck")
        return value

    loss, params = module_loss(model, compute)
    d = random_direction(params)
    with pytest.raises(RuntimeError, match="out of luck"):
        slice_loss(loss, params, draw(16, 4), d, [0.0, 1.0, 2.0])
    same = slice_loss(loss, params, draw(16, 4), d, [1.0, 1.0])["loss_slice"].values
    assert same[0] == same[1]  # the same numbers for dropout
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


W = {"w": torch.ones(2, 3)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: slice_loss(net, W, None, {"v": W["w"]}, [0.0]), r"direction 'v' is no parameter; they are \['w'\]"),
        (lambda: slice_loss(net, W, None, {"w": torch.ones(3)}, [0.0]), r"shape \(2, 3\), got \(3,\)"),
        (lambda: slice_loss(net, W, None, {}, [0.0]), "must move something"),
        (lambda: slice_loss(net, W, None, W, []), "alphas must be a sequence of finite numbers"),
        (lambda: slice_loss(net, W, None, W, [0.0], W), "a plane needs a second direction and betas"),
        (lambda: slice_between(net, W, {"v": W["w"]}, None, [0.0]), r"these are in one: \['v', 'w'\]"),
        (lambda: random_direction(W, filter_axis=2), r"filter_axis of 'w' must be 0..1, got 2"),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
