"""Sharpness in balls against closed forms: quadratics' eigenvalues and traces by NumPy, SAM's formula by hand, and Dinh's
rescaling, which changes the weights and not the function.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from landscape import (
    Batches,
    asam_sharpness,
    average_sharpness,
    ball_sharpness,
    m_sam_sharpness,
    module_loss,
    sam_sharpness,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def quadratic(params: dict[str, Tensor], H: Tensor) -> Tensor:
    """w^T H w / 2 over the last axes."""
    w = params["w"]
    return 0.5 * (w * (H @ w.unsqueeze(-1)).squeeze(-1)).sum(-1)


def positive(n: int, seed: int = 1) -> Tensor:
    A = draw(n, n, seed=seed)
    return A @ A.T / n


# --- quadratics


@pytest.mark.parametrize("rho", [1e-3, 0.05, 2.0])
def test_at_a_quadratics_minimum_the_ball_gives_half_rho_squared_lambda_max(rho: float) -> None:
    H = positive(8)
    got = ball_sharpness(quadratic, {"w": torch.zeros(8, dtype=torch.float64)}, H, rho, steps=200, starts=2)
    assert float(got.value) == pytest.approx(rho**2 * np.linalg.eigvalsh(H.numpy())[-1] / 2, rel=1e-9)


def test_from_the_minimum_itself_one_step_goes_nowhere() -> None:
    assert float(sam_sharpness(quadratic, {"w": torch.zeros(8, dtype=torch.float64)}, positive(8)).value) == 0


def test_one_step_is_sams_formula_and_a_grid_of_radii_is_single_calls() -> None:
    H, w = positive(6), draw(6, seed=3)
    g = H @ w
    expected = []
    for rho in (0.05, 0.5):
        moved = w + rho * g / g.norm()
        expected.append(float(moved @ H @ moved / 2 - w @ H @ w / 2))
    got = sam_sharpness(quadratic, {"w": w}, H, [0.05, 0.5])
    assert got.value.tolist() == pytest.approx(expected, rel=1e-12)
    assert got.n_forward == 3
    assert got.stderr is None


def test_one_step_is_asams_formula() -> None:
    H, w = positive(6), draw(6, seed=3)
    for eta in (0.0, 0.01):
        T = abs(w) + eta
        moved = w + 0.5 * T**2 * (H @ w) / (T * (H @ w)).norm()
        expected = float(moved @ H @ moved / 2 - w @ H @ w / 2)
        assert float(asam_sharpness(quadratic, {"w": w}, H, eta=eta).value) == pytest.approx(expected, rel=1e-12)


def test_the_adaptive_ball_at_a_shifted_minimum_is_the_scaled_hessians_eigenvalue() -> None:
    H, w = positive(6), draw(6, seed=3)

    def loss(p: dict[str, Tensor], batch: Any) -> Tensor:
        return quadratic({"w": p["w"] - w}, H)

    got = ball_sharpness(loss, {"w": w}, None, 0.1, adaptive=True, steps=300, starts=3)
    D = np.diag(abs(w.numpy()))
    assert float(got.value) == pytest.approx(0.1**2 * np.linalg.eigvalsh(D @ H.numpy() @ D)[-1] / 2, rel=1e-9)


def test_the_maximum_norms_ball_at_a_diagonal_quadratic() -> None:
    h, w = draw(7).abs(), draw(7, seed=2)
    got = ball_sharpness(quadratic, {"w": w}, torch.diag(h), 0.3, norm=math.inf, adaptive=True)
    # Every |w_i| grows by 0.3 |w_i|.
    assert float(got.value) == pytest.approx(float((h * w**2).sum() * (1.3**2 - 1) / 2), rel=1e-12)


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_average_case_is_the_scaled_trace(adaptive: bool) -> None:
    H, w = positive(5), draw(5, seed=3)

    def loss(p: dict[str, Tensor], batch: Any) -> Tensor:
        return quadratic({"w": p["w"] - w}, H)

    got = average_sharpness(loss, {"w": w}, None, [0.1, 0.2], adaptive=adaptive, samples=400)
    s = w.numpy() if adaptive else np.ones(5)
    A = s[:, None] * H.numpy() * s
    assert got.stderr is not None
    for i, rho in enumerate((0.1, 0.2)):
        # Mean rho^2 tr A / 2, and its standard error rho^2 sqrt(tr A^2 / 2) / sqrt(samples), of a Gaussian's quadratic form.
        assert abs(float(got.value[i]) - rho**2 * np.trace(A) / 2) < 4 * float(got.stderr[i])
        assert float(got.stderr[i]) == pytest.approx(rho**2 * math.sqrt((A * A).sum() / 2) / 20, rel=0.25)


# --- Dinh's rescaling


def relu_net(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (torch.relu(x @ params["a"]) @ params["b"] - y).square().mean()


def test_rescaling_relu_layers_moves_sam_and_not_the_elementwise_adaptive_measures() -> None:
    params = {"a": draw(4, 8), "b": draw(8, 2, seed=1)}
    scaled = {"a": 16 * params["a"], "b": params["b"] / 16}
    batch = (draw(20, 4, seed=2), draw(20, 2, seed=3))
    assert float(relu_net(scaled, batch)) == pytest.approx(float(relu_net(params, batch)), rel=1e-13)
    how: dict[str, Any] = {"adaptive": True, "steps": 3}
    for measure in (
        lambda p: asam_sharpness(relu_net, p, batch, 0.1),
        lambda p: ball_sharpness(relu_net, p, batch, 0.1, **how),
        lambda p: ball_sharpness(relu_net, p, batch, 0.1, norm=math.inf, **how),
        lambda p: average_sharpness(relu_net, p, batch, 0.1),
    ):
        assert float(measure(scaled).value) == pytest.approx(float(measure(params).value), rel=1e-9)
    assert float(sam_sharpness(relu_net, scaled, batch).value) > 3 * float(sam_sharpness(relu_net, params, batch).value)
    assert float(average_sharpness(relu_net, scaled, batch, adaptive=False).value) > 3 * float(
        average_sharpness(relu_net, params, batch, adaptive=False).value
    )


# --- batches


def data(n: int = 10) -> tuple[Tensor, Tensor]:
    return draw(n, 4, seed=2), draw(n, 2, seed=3)


def test_a_batch_in_parts_and_a_batch_twice_are_the_batch() -> None:
    """Defects of peers: a sum over batches that scales with their number, and unequal batches averaged unweighted."""
    params, (x, y) = {"a": draw(4, 8), "b": draw(8, 2, seed=1)}, data()
    whole = sam_sharpness(relu_net, params, (x, y), steps=3)
    parts = Batches([(x[:7], y[:7]), (x[7:9], y[7:9]), (x[9:], y[9:])], [7, 2, 1])
    for other in (parts, Batches([(x, y), (x, y)], [10, 10]), (torch.cat([x, x]), torch.cat([y, y]))):
        got = sam_sharpness(relu_net, params, other, steps=3)
        assert float(got.value) == pytest.approx(float(whole.value), rel=1e-12)


def test_m_sam_weights_its_sub_batches_by_size() -> None:
    params, (x, y) = {"a": draw(4, 8), "b": draw(8, 2, seed=1)}, data()
    got = m_sam_sharpness(relu_net, params, (x, y), 0.1, m=4)
    pieces = [float(sam_sharpness(relu_net, params, (x[i:j], y[i:j]), 0.1).value) for i, j in ((0, 4), (4, 8), (8, 10))]
    mean = np.average(pieces, weights=[4, 4, 2])
    assert float(got.value) == pytest.approx(mean, rel=1e-12)
    assert got.n_forward == 6
    assert got.stderr is not None
    # Of equal sub-batches it is the usual s / sqrt(n).
    equal = m_sam_sharpness(relu_net, params, (x[:8], y[:8]), 0.1, m=4)
    assert equal.stderr is not None
    assert float(equal.stderr) == pytest.approx(np.std(pieces[:2], ddof=1) / math.sqrt(2), rel=1e-10)


def test_m_of_the_whole_batch_is_sam_without_a_standard_error() -> None:
    params, batch = {"a": draw(4, 8), "b": draw(8, 2, seed=1)}, data()
    got = m_sam_sharpness(relu_net, params, list(batch), m=50)
    assert float(got.value) == float(sam_sharpness(relu_net, params, batch).value)
    assert got.stderr is not None
    assert got.stderr.isnan()


def test_a_pack_of_runs_is_each_run_alone() -> None:
    H = torch.stack([positive(6, seed) for seed in (1, 2, 3)])
    w = draw(3, 6)
    for call in (
        lambda w, H: ball_sharpness(quadratic, {"w": w}, H, [0.1, 1.0], steps=4, starts=3, run_axis=True),
        lambda w, H: ball_sharpness(quadratic, {"w": w}, H, [0.1, 1.0], norm=math.inf, adaptive=True, run_axis=True),
        lambda w, H: average_sharpness(quadratic, {"w": w}, H, [0.1, 1.0], samples=4, run_axis=True),
        lambda w, H: m_sam_sharpness(lambda p, h: quadratic(p, h.mean(1)), {"w": w}, torch.stack([H, 2 * H, H], 1), [0.1, 1.0],
                                     m=2, batch_dim=1, run_axis=True),
    ):  # fmt: skip
        together = call(w, H)
        assert together.value.shape == (3, 2)
        for r in range(3):
            alone = call(w[r : r + 1], H[r : r + 1])
            torch.testing.assert_close(together.value[r], alone.value[0], rtol=1e-12, atol=0)


# --- defects of peers


@pytest.mark.parametrize(
    "measure",
    [
        lambda loss, p: sam_sharpness(loss, p, steps=4),
        lambda loss, p: asam_sharpness(loss, p),
        lambda loss, p: average_sharpness(loss, p, rho=1.0, samples=8),
    ],
)
def test_nan_is_not_replaced_by_a_mean_of_the_others(measure: Any) -> None:
    def loss(p: dict[str, Tensor], batch: Any) -> Tensor:
        w = p["w"]
        return torch.where(w > 1.0001, math.nan, 1.0).prod() * w.square().sum()

    assert measure(loss, {"w": torch.tensor([1.0, -1.0])}).value.isnan()


def test_a_run_of_nan_leaves_its_neighbours_alone() -> None:
    w = draw(3, 6)
    w[1, 0] = math.nan
    got = sam_sharpness(quadratic, {"w": w}, positive(6), run_axis=True, steps=2, starts=2)
    clean = sam_sharpness(quadratic, {"w": w[[0, 2]]}, positive(6), run_axis=True, steps=2, starts=2)
    assert got.value.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(got.value[[0, 2]], clean.value)


def test_no_noise_is_added_to_a_maximum_and_every_call_gives_the_same_bits() -> None:
    """A peer jitters its maxima. Dropout's numbers are the same in every evaluation, so that rho = 1e-12 gives almost nothing."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1)).double()
    loss, params = module_loss(model, lambda net, x: net(x).square().mean())
    values = [float(sam_sharpness(loss, params, draw(16, 4), 1e-12).value) for _ in range(2)]
    assert values[0] == values[1]
    assert abs(values[0]) < 1e-10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_that_would_vanish_in_narrow_parameters_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"'w' must be float32 or float64, got torch.*round away: use .float\(\)"):
        sam_sharpness(quadratic, {"w": torch.ones(3, dtype=dtype)}, None)


# --- nothing of the caller's changes


def test_after_an_exception_parameters_buffers_generators_and_gradients_are_as_before() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1)).double()
    model(draw(16, 4)).sum().backward()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    torch.manual_seed(5)
    rng = torch.get_rng_state()
    calls = 0

    def compute(net: nn.Module, x: Tensor) -> Tensor:
        nonlocal calls
        value: Tensor = net(x).square().mean()
        calls += 1
        if calls == 3:
            raise RuntimeError("out of luck")
        return value

    loss, params = module_loss(model, compute)
    for measure in (
        lambda: sam_sharpness(loss, params, draw(16, 4), steps=5),
        lambda: average_sharpness(loss, params, draw(16, 4)),
    ):
        calls = 0
        with pytest.raises(RuntimeError, match="out of luck"):
            measure()
        with torch.no_grad():
            sam_sharpness(loss, params, draw(16, 4))
        assert torch.equal(torch.get_rng_state(), rng)
        assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
        assert all(p.requires_grad for p in model.parameters())
        found = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(torch.equal(a, b) for a, b in zip(found, gradients, strict=True))


def test_a_tied_weight_moves_in_both_its_places() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens: Tensor) -> Tensor:
            logits: Tensor = self.head(self.embedding(tokens))
            return logits

    model, tokens = Tied().double(), torch.tensor([0, 3, 4])
    loss, params = module_loss(model, lambda net, x: net(x).square().sum())
    assert list(params) == ["embedding.weight"]
    got = average_sharpness(loss, params, tokens, 0.5, samples=2)
    W = params["embedding.weight"]
    # f(c W) = c^4 f(W) only if both places move.
    doubled = loss({"embedding.weight": 2 * W}, tokens)
    assert float(doubled) == pytest.approx(16 * float(loss(params, tokens)), rel=1e-12)
    assert got.n_forward == 3


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"rho": -1.0}, "rho must be positive and finite"),
        ({"norm": 1}, "norm must be 2 or inf, got 1"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"adaptive": True, "eta": -1.0}, "eta must be at least 0"),
    ],
)
def test_what_does_not_fit_is_refused(how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ball_sharpness(quadratic, {"w": torch.ones(3)}, positive(3).float(), **how)


def test_batches_that_cannot_be_split_are_refused() -> None:
    with pytest.raises(ValueError, match="got str"):
        m_sam_sharpness(quadratic, {"w": torch.ones(3)}, "text", m=1)
    with pytest.raises(ValueError, match=r"as many examples each along 0, at least one, got \[2, 3\]"):
        m_sam_sharpness(quadratic, {"w": torch.ones(3)}, [torch.ones(2), torch.ones(3)], m=1)
    with pytest.raises(ValueError, match="samples must be at least 2, got 1"):
        average_sharpness(quadratic, {"w": torch.ones(3)}, None, samples=1)
