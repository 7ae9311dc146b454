"""Keskar's box at the logits, the hidden state and any tensors, against things that don't search: every corner of the box in
NumPy, closed forms of quadratics, the exact logit sharpness, an optimiser of its own.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from landscape import (
    Batches,
    box_sharpness,
    hidden_sharpness,
    lbfgsb_logit_sharpness,
    logit_sharpness,
    smoothed_logit_sharpness,
)
from landscape.boxes import rise_bound

Floats = npt.NDArray[np.float64]


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def targets_of(shape: tuple[int, ...], V: int, seed: int = 1) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def corners(n: int) -> Floats:
    return np.array(list(itertools.product([-1.0, 1.0], repeat=n)))


def loss_of(z: Floats, t: int, smoothing: float = 0.0, weight: float = 0.0) -> Any:
    """Cross entropy with label smoothing and z-loss, written from their definitions, over the last axis."""
    level = np.logaddexp.reduce(z, axis=-1)
    own, mean = level - z[..., t], level - z.mean(-1)
    return (1 - smoothing) * own + smoothing * mean + weight * level**2


def percent(worst: float, f: float) -> float:
    return 100 * (worst - f) / (1 + f)


# --- smoothed logits


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(("smoothing", "weight"), [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.3, 1e-4), (0.1, 0.3)])
def test_smoothed_brackets_every_corner_of_the_box(smoothing: float, weight: float, centred: bool) -> None:
    for V in (2, 3, 7):
        z_NV, t_N = draw(12, V, seed=V, scale=2.0), targets_of((12,), V)
        for eps in (5e-4, 0.1, 1.0):
            got = smoothed_logit_sharpness(z_NV, t_N, eps, label_smoothing=smoothing, z_loss=weight, centred=centred)
            assert got.upper is not None
            for i, (z, t) in enumerate(zip(z_NV.numpy(), t_N.tolist(), strict=True)):
                box = eps * (abs(z - z.mean() * centred) + 1)
                worst = loss_of(z + box * corners(V), t, smoothing, weight).max()
                exact = percent(worst, loss_of(z, t, smoothing, weight))
                slack = 1e-11  # the enumeration subtracts losses of up to 40, in percent
                assert got.lower[i] - slack <= exact <= got.upper[i] + slack
                if got.converged[i]:
                    assert float(got.lower[i]) == pytest.approx(exact, rel=2e-9, abs=slack)
            if V <= 6 and weight < 0.3:  # there L stays above 1 - 1 / (2 weight)
                assert got.converged.all()


def test_smoothed_finds_the_best_corner_nearly_always() -> None:
    z, t = draw(100, 9, scale=2.0), targets_of((100,), 9)
    got = smoothed_logit_sharpness(z, t, 0.2, label_smoothing=0.2)
    exact = [
        percent(loss_of(r + 0.2 * (abs(r) + 1) * corners(9), k, 0.2).max(), loss_of(r, k, 0.2))
        for r, k in zip(z.numpy(), t.tolist(), strict=True)
    ]
    assert (got.lower.numpy() > 0.9999999 * np.array(exact)).mean() > 0.95
    assert got.converged.double().mean() > 0.9


@pytest.mark.parametrize("near", [1, 2, 6])
def test_the_upper_bound_holds_where_the_corners_tried_are_not_the_best(
    near: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nearly equal logits and much smoothing put all p_i next to y_i: the order says little, and a narrow search misses."""
    monkeypatch.setattr("landscape.smoothed.NEAR", near)
    z, t = draw(300, 8, seed=4), targets_of((300,), 8)
    z_NCV = (z[:, None] + (abs(z) + 1)[:, None] * torch.from_numpy(corners(8))).numpy()
    missed = 0
    for smoothing, weight in ((0.3, 0.0), (0.5, 0.0), (0.7, 0.0), (0.7, 1e-2)):
        got = smoothed_logit_sharpness(z, t, 1.0, label_smoothing=smoothing, z_loss=weight)
        assert got.upper is not None
        assert near < 6 or got.converged.double().mean() > 0.95
        exact = np.array(
            [
                percent(loss_of(c, k, smoothing, weight).max(), loss_of(r, k, smoothing, weight))
                for r, c, k in zip(z.numpy(), z_NCV, t.tolist(), strict=True)
            ]
        )
        assert (got.lower.numpy() <= exact + 1e-11).all()
        assert (got.upper.numpy() >= exact - 1e-11).all()
        missed += int((got.lower.numpy() < exact - 1e-9).sum())
    assert near > 2 or missed > 10


def test_without_smoothing_it_is_the_closed_form() -> None:
    z, t = draw(40, 300, scale=3.0), targets_of((40,), 300)
    got = smoothed_logit_sharpness(z, t, [5e-4, 0.1])
    torch.testing.assert_close(got.lower, logit_sharpness(z, t, [5e-4, 0.1]), rtol=1e-9, atol=1e-12)
    assert got.converged.all()
    assert got.lower.shape == got.n_forward.shape == (40, 2)


def test_smoothing_is_torchs() -> None:
    z, t = draw(9), torch.tensor(4)
    expected = torch.nn.functional.cross_entropy(z, t, label_smoothing=0.1)
    assert float(expected) == pytest.approx(loss_of(z.numpy(), 4, 0.1), rel=1e-14)


def test_a_level_where_z_loss_is_not_convex_is_still_bracketed() -> None:
    """L far below -1 / (2 c): the loss falls with L, no corner need be worst; sampled points stay below upper."""
    z = draw(1, 4) - 20
    got = smoothed_logit_sharpness(z, torch.tensor([1]), 0.5, z_loss=0.3)
    assert got.upper is not None
    row, rng = z[0].numpy(), np.random.default_rng(0)
    points = row + 0.5 * (abs(row) + 1) * rng.uniform(-1, 1, (20000, 4))
    f = loss_of(row, 1, 0.0, 0.3)
    worst = percent(loss_of(np.vstack([points, row + 0.5 * (abs(row) + 1) * corners(4)]), 1, 0.0, 0.3).max(), f)
    assert worst <= float(got.upper[0])
    assert float(got.lower[0]) <= worst + 1e-9


def test_ten_steps_of_lbfgsb_stay_below_the_maximum_and_see_nothing_where_the_token_is_sure() -> None:
    z, t = draw(12, 40, scale=3.0), targets_of((12,), 40)
    z[0, t[0]] = z[0].max() + 30
    got = lbfgsb_logit_sharpness(z, t, [5e-4, 1e-3])
    exact = logit_sharpness(z, t, [5e-4, 1e-3])
    assert got.lower.shape == (12, 2)
    assert (got.lower <= exact + 1e-11).all()
    assert got.lower[0].tolist() == [0.0, 0.0]
    assert (got.lower[1:] > 0.4 * exact[1:]).any(1).any()
    assert (got.n_forward[1:] >= 2).all()
    torch.testing.assert_close(got.upper, exact)
    # And it is ten: in a large box each iteration counts.
    first, tenth = (lbfgsb_logit_sharpness(z[1:], t[1:], 1.0, iterations=n).lower.sum() for n in (1, 10))
    assert first < 0.5 * tenth
    assert torch.equal(lbfgsb_logit_sharpness(z[1:], t[1:], 1.0).lower.sum(), tenth)


# --- the hidden state


def hidden_exact(x: Floats, W: Floats, t: int, eps: float, bias: Floats | float = 0.0) -> float:
    moved = x + eps * (abs(x) + 1) * corners(len(x))
    return float(
        100 * (loss_of(moved @ W.T + bias, t).max() - loss_of(W @ x + bias, t)) / (1 + loss_of(W @ x + bias, t))
    )


@pytest.mark.parametrize("eps", [1e-3, 0.1, 2.0])
@pytest.mark.parametrize("D", [1, 4, 9])
def test_small_hidden_states_are_enumerated_exactly(D: int, eps: float) -> None:
    x, W, t, bias = draw(5, D), draw(7, D, seed=3), targets_of((5,), 7), draw(7, seed=4)
    got = hidden_sharpness(x, W, t, eps, bias=bias)
    assert got.converged.all()
    assert (got.n_forward == 2**D).all()
    for i in range(5):
        expected = hidden_exact(x[i].numpy(), W.numpy(), int(t[i]), eps, bias.numpy())
        assert float(got.lower[i]) == pytest.approx(expected, rel=1e-9, abs=1e-10)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    D=st.integers(1, 7),
    V=st.integers(2, 9),
    eps=st.sampled_from([1e-4, 1e-2, 0.3, 3.0, 300.0]),
    scale=st.sampled_from([0.01, 1.0, 10.0]),
)
def test_lower_exact_upper_in_that_order(seed: int, D: int, V: int, eps: float, scale: float) -> None:
    x, W, t = draw(1, D, seed=seed, scale=scale), draw(V, D, seed=seed + 1), targets_of((1,), V, seed)
    got = hidden_sharpness(x, W, t, eps, enumerate_up_to=0)
    assert got.upper is not None
    exact = hidden_exact(x[0].numpy(), W.numpy(), int(t[0]), eps)
    slack = 1e-9 * (1 + exact)
    assert float(got.lower[0]) <= exact + slack
    assert exact <= float(got.upper[0]) + slack
    # The corner that lifts the token which can get furthest is among the starts: V times as much is the most there is.
    f = loss_of((W @ x[0]).numpy(), int(t[0]))
    assert (float(got.lower[0]) - exact) / 100 * (1 + f) >= -math.log(V) - slack


@pytest.mark.parametrize("width", [1e-3, 0.3, 5.0])
def test_the_bound_is_the_rise_itself_where_only_its_second_order_is_left(width: float) -> None:
    """Two wrong tokens as likely, moving opposite ways: no slope, and a rise of log(p_t + (1 - p_t) cosh(width))."""
    p = torch.tensor([0.6, 0.2, 0.2], dtype=torch.float64)
    u = torch.tensor([[0.0], [1.0], [-1.0]], dtype=torch.float64)
    got = float(rise_bound(p, p.log(), u, torch.tensor([width], dtype=torch.float64)))
    assert got == pytest.approx(math.log(0.6 + 0.4 * math.cosh(width)), rel=1e-12)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6), D=st.integers(1, 7), V=st.integers(2, 9), width=st.sampled_from([1e-4, 0.1, 1.0, 20.0])
)
def test_the_bound_by_itself_is_above_every_corner(seed: int, D: int, V: int, width: float) -> None:
    """In `hidden_sharpness` it is never below what was found, which would hide a bound that is too low."""
    log_p = torch.log_softmax(draw(V, seed=seed, scale=3.0), 0)
    u = draw(V, D, seed=seed + 1)
    u[0] = 0
    b = width * draw(D, seed=seed + 2).abs()
    rises = np.logaddexp.reduce(log_p.numpy() + (corners(D) * b.numpy()) @ u.numpy().T, axis=1)
    assert float(rise_bound(log_p.exp(), log_p, u, b)) >= rises.max() - 1e-12


def test_the_chord_bound_is_within_second_order_for_small_boxes() -> None:
    """D = 200: nothing to enumerate; the interval bound alone is far off."""
    x, W, t = draw(8, 200), draw(50, 200, seed=5, scale=0.1), targets_of((8,), 50)
    got = hidden_sharpness(x, W, t, 1e-4)
    assert got.upper is not None
    assert (got.upper / got.lower).max() < 1.01
    gain = (W - W[t[0]]).abs() @ (1e-4 * (x[0].abs() + 1))
    interval = math.log1p(float((torch.softmax(W @ x[0], -1) * torch.expm1(gain)).sum()))
    f = float(torch.logsumexp(W @ x[0], -1) - (W @ x[0])[t[0]])
    assert 100 * interval / (1 + f) > 1.2 * float(got.lower[0])


def test_identity_as_head_is_the_exact_logit_sharpness() -> None:
    z, t = draw(6, 40, scale=2.0), targets_of((6,), 40)
    got = hidden_sharpness(z, torch.eye(40, dtype=torch.float64), t, [1e-3, 0.5])
    torch.testing.assert_close(got.lower, logit_sharpness(z, t, [1e-3, 0.5]), rtol=1e-10, atol=1e-12)


def test_runs_and_positions_are_each_their_own() -> None:
    x, W, t = draw(3, 4, 12), draw(3, 8, 12, seed=2), targets_of((3, 4), 8)
    together = hidden_sharpness(x, W, t, [1e-2, 0.2])
    assert together.lower.shape == (3, 4, 2)
    for r, p in itertools.product(range(3), range(4)):
        alone = hidden_sharpness(x[r, p], W[r], t[r, p], [1e-2, 0.2])
        assert torch.equal(together.lower[r, p], alone.lower)
        assert torch.equal(together.n_forward[r, p], alone.n_forward)


@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_from_the_centre_alone_it_is_sign_ascent_until_it_rests(iterations: int) -> None:
    """Written once more, for a token at a time; evaluations are gradients until rest, and the corner's own."""
    x, W, t = draw(20, 30), draw(40, 30, seed=2), targets_of((20,), 40)
    got = hidden_sharpness(x, W, t, 3.0, starts=1, iterations=iterations)
    for i, (z, k) in enumerate(zip(x.numpy(), t.tolist(), strict=True)):
        b, d, calls = 3.0 * (abs(z) + 1), np.zeros(30), 0
        for _ in range(iterations):
            logits = W.numpy() @ (z + d)
            p = np.exp(logits - np.logaddexp.reduce(logits))
            before, d = d, b * np.where((p @ W.numpy() - W.numpy()[k]) < 0, -1.0, 1.0)
            calls += 1
            if (before == d).all():
                break
        expected = percent(loss_of(W.numpy() @ (z + d), k), loss_of(W.numpy() @ z, k))
        assert float(got.lower[i]) == pytest.approx(expected, rel=1e-10)
        assert int(got.n_forward[i]) == calls + 1
    assert iterations < 20 or len(set(got.n_forward.tolist())) > 1


def test_a_token_has_the_same_bits_in_any_company() -> None:
    """Of a group and a rest, alone and among others: products of fewer matrices at once would round in another order."""
    x, W, t = draw(33, 40), draw(60, 40, seed=2), targets_of((33,), 60)
    together = hidden_sharpness(x, W, t, [1e-3, 0.1])
    assert together.upper is not None
    for p in (0, 31, 32):
        alone = hidden_sharpness(x[p], W, t[p], [1e-3, 0.1])
        assert alone.upper is not None
        assert torch.equal(together.lower[p], alone.lower)
        assert torch.equal(together.upper[p], alone.upper)


@pytest.mark.parametrize("D", [3, 15])
def test_a_hidden_state_of_nan_spoils_its_own_token_only(D: int) -> None:
    x, W, t = draw(3, D), draw(5, D, seed=1), targets_of((3,), 5)
    x[1, 0] = math.nan
    got = hidden_sharpness(x, W, t)
    assert got.upper is not None
    assert got.lower.isnan().tolist() == got.upper.isnan().tolist() == [False, True, False]
    assert got.converged[1].item() is False


# --- any tensors


def quadratic(params: dict[str, Tensor], h: Tensor) -> Tensor:
    """(1/2) sum h w^2 + 1, h of w's shape, over all but a leading run axis where h has one."""
    return 0.5 * (h * params["w"].square()).sum(-1) + 1


def diagonal_exact(w: Floats, h: Floats, eps: float) -> float:
    """The box of a diagonal quadratic comes apart: each coordinate's worst end is away from zero if h > 0, zero if h < 0."""
    b = eps * (abs(w) + 1)
    far, near = abs(w) + b, np.maximum(abs(w) - b, 0)
    rise = np.where(h > 0, far**2, near**2) * h / 2 - h * w**2 / 2
    return float(100 * rise.sum() / (2 + (h * w**2).sum() / 2))


@pytest.mark.parametrize("method", ["ascent", "lbfgsb"])
def test_a_diagonal_hessians_box_in_closed_form(method: Any) -> None:
    w, h = draw(30, seed=6), draw(30, seed=7).abs()
    got = box_sharpness(quadratic, {"w": w}, h, [1e-3, 0.1], method=method, iterations=50)
    for e, eps in enumerate((1e-3, 0.1)):
        assert float(got.lower[e]) == pytest.approx(diagonal_exact(w.numpy(), h.numpy(), eps), rel=1e-9)
    assert got.upper is None
    assert got.lower.shape == (2,)


def test_concave_coordinates_stop_inside_the_box() -> None:
    """h < 0: the maximum over the box is where the coordinate reaches zero, not a corner."""
    w, h = torch.tensor([0.05, -0.02], dtype=torch.float64), torch.tensor([-1.0, -2.0], dtype=torch.float64)
    got = box_sharpness(quadratic, {"w": w}, h, 0.1, method="lbfgsb", iterations=100)
    assert float(got.lower) == pytest.approx(diagonal_exact(w.numpy(), h.numpy(), 0.1), rel=1e-6)
    ascent = box_sharpness(quadratic, {"w": w}, h, 0.1, iterations=80)
    assert 0.95 * float(got.lower) < float(ascent.lower) <= float(got.lower) * (1 + 1e-6)


def test_a_pack_of_runs_is_each_run_alone() -> None:
    w, h = draw(3, 10, seed=8), draw(3, 10, seed=9)
    ways: list[dict[str, Any]] = [{}, {"method": "lbfgsb"}, {"subspace": 4}, {"starts": 3}]
    for how in ways:
        together = box_sharpness(quadratic, {"w": w}, h, [1e-2, 0.3], run_axis=True, **how)
        assert together.lower.shape == (3, 2)
        for r in range(3):
            alone = box_sharpness(
                quadratic,
                {"w": w[r : r + 1]},
                h[r : r + 1],
                [1e-2, 0.3],
                run_axis=True,
                **how,
            )
            torch.testing.assert_close(together.lower[r], alone.lower[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["ascent", "lbfgsb"])
def test_evaluations_are_counted_for_each_run_until_it_is_done(method: Any) -> None:
    """A run that rests in a corner at once, one that looks for a maximum inside, and one that is lost, which waits for none."""
    w = draw(3, 6, seed=8) / 100
    h = torch.stack([torch.ones(6), -torch.arange(1.0, 7.0), torch.full((6,), math.nan)]).double()
    got = box_sharpness(quadratic, {"w": w}, h, 0.3, run_axis=True, method=method, iterations=30)
    alone = [box_sharpness(quadratic, {"w": w[r]}, h[r], 0.3, method=method, iterations=30) for r in range(3)]
    assert got.n_forward.tolist() == [int(one.n_forward) for one in alone]
    assert method == "lbfgsb" or got.n_forward[0] < got.n_forward[1]
    assert method == "lbfgsb" or got.n_forward.tolist()[::2] == [3, 1]


def test_a_subspace_of_all_dimensions_rotates_and_a_smaller_one_loses() -> None:
    """f = |w|^2 / 2 does not see the rotation: Keskar's box around y = A^T w, worst at |y| + b in each."""
    w = draw(6, seed=3)
    h = torch.ones(6, dtype=torch.float64)
    full = box_sharpness(quadratic, {"w": w}, h, 0.1, subspace=6, iterations=60)
    # The basis is the library's own: its orthonormality is what is relied on, through the rotated norm.
    A = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q.numpy()
    y = A.T @ w.numpy()
    assert float(full.lower) == pytest.approx(diagonal_exact(y, np.ones(6), 0.1), rel=1e-9)
    assert float(box_sharpness(quadratic, {"w": w}, h, 0.1, subspace=1).lower) < float(full.lower)


def test_only_the_named_tensors_move() -> None:
    def loss(p: dict[str, Tensor], batch: Any) -> Tensor:
        return (p["w"].square().sum() + 100 * p["e"].square().sum()) / 2

    w, e = draw(5), draw(4, seed=2)
    got = box_sharpness(loss, {"w": w, "e": e}, None, 0.1, names=["w"])
    rise = (((abs(w) + 0.1 * (abs(w) + 1)) ** 2 - w**2).sum() / 2).item()
    f = (w.square().sum() / 2 + 50 * e.square().sum()).item()
    assert float(got.lower) == pytest.approx(100 * rise / (1 + f), rel=1e-12)


@pytest.mark.parametrize("method", ["ascent", "lbfgsb"])
def test_a_nan_on_the_way_is_not_taken_for_a_maximum_elsewhere(method: Any) -> None:
    """A peer takes nanmax over what it visits, and an optimiser forgets a NaN when it turns back."""

    def loss(p: dict[str, Tensor], batch: Any) -> Tensor:
        return torch.where(p["w"] > 1.05, math.nan, p["w"]).sum()

    got = box_sharpness(loss, {"w": torch.tensor([1.0, 2e-3], dtype=torch.float64)}, None, 0.1, method=method)
    assert got.lower.isnan()


@pytest.mark.parametrize("bad", [4, 5, 6, 7])
def test_a_nan_that_the_optimiser_recovers_from_is_not_forgotten(bad: int) -> None:
    calls = 0

    def loss(p: dict[str, Tensor], batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        w = p["w"]
        value = (w - 0.3 * w**3 + torch.sin(3 * w) * torch.arange(1, 3)).sum()
        return value * math.nan if calls == bad else value

    w = torch.tensor([1.0, 0.5], dtype=torch.float64)
    assert box_sharpness(loss, {"w": w}, None, 0.5, method="lbfgsb").lower.isnan()
    assert calls >= bad


def test_batches_of_unequal_size_count_by_their_size() -> None:
    """A peer averages a last batch of 1 like one of 9."""
    h = draw(10, 4, seed=5).abs()

    def loss(p: dict[str, Tensor], rows: Tensor) -> Tensor:
        return 0.5 * (rows * p["w"].square()).sum(-1).mean() + 1

    w = {"w": draw(4)}
    whole = box_sharpness(loss, w, h, 0.1)
    parts = box_sharpness(loss, w, Batches([h[:9], h[9:]], [9, 1]), 0.1)
    torch.testing.assert_close(parts.lower, whole.lower, rtol=1e-12, atol=0)
    twice = box_sharpness(loss, w, Batches([h, h], [10, 10]), 0.1)
    torch.testing.assert_close(twice.lower, whole.lower, rtol=1e-12, atol=0)


X, HEAD, T = torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hidden_sharpness(X, HEAD[:, :2], T), r"needs a head \[V, D\]"),
        (lambda: hidden_sharpness(X, HEAD.expand(3, 5, 3), T), r"a head of 3 runs needs hidden \[3, ..., D\]"),
        (lambda: hidden_sharpness(X, HEAD, T.float()), r"targets must be integers \(2,\), got torch.float32"),
        (
            lambda: hidden_sharpness(X, HEAD, T - 100),
            r"targets must be in 0..4, got -100..-100; leave ignored tokens out",
        ),
        (lambda: hidden_sharpness(X, HEAD, T + 5), r"targets must be in 0..4, got 5..5"),
        (lambda: hidden_sharpness(X, HEAD, T, bias=X), r"bias must be \(5,\)"),
        (lambda: hidden_sharpness(X, HEAD, T, 0.0), r"epsilon must be positive"),
        (lambda: smoothed_logit_sharpness(X, T, label_smoothing=1.0), r"label_smoothing must be in \[0, 1\), got 1.0"),
        (lambda: smoothed_logit_sharpness(X, T, z_loss=-1.0), r"z_loss must be a weight of at least 0, got -1.0"),
        (lambda: box_sharpness(quadratic, {}), r"at least one tensor"),
        (lambda: box_sharpness(quadratic, {"w": X.bfloat16()}, X), r"must be float32 or float64, got torch.bfloat16"),
        (lambda: box_sharpness(quadratic, {"w": X[0]}, X[0], names=["v"]), r"names must be among .*got \['v'\]"),
        (lambda: box_sharpness(quadratic, {"w": X[0]}, X[0], subspace=4), r"subspace must be 1..3"),
        (lambda: box_sharpness(quadratic, {"w": X}, X), r"must return a scalar, got shape \(2,\)"),
        (lambda: box_sharpness(quadratic, {"w": X, "v": X[:1]}, X, run_axis=True), r"of one R >= 1, got R of \[1, 2\]"),
        (
            lambda: box_sharpness(quadratic, {"w": X[0]}, Batches([X[0]], [0.0])),
            r"sizes must be positive numbers .*got \[0.0\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
