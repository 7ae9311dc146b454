"""Eigenvalues, traces and densities against spectra that are known, and edges of stability against descent itself.

The Hessians here are matrices that are written down, and numpy, scipy or a formula says what comes out; autograd only multiplies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
import xarray as xr
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from landscape import (
    CURVATURE,
    LandscapeError,
    Problem,
    adam_preconditioner,
    critical_sharpness,
    gradient_curvature,
    hessian_eigenvalues,
    hutchinson_trace,
    lanczos,
    preconditioned_eigenvalues,
    smoothed_density,
    spectral_density,
    validate,
    xtrace,
)

F64 = torch.float64


def random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=F64)


def quadratic(A: Tensor, at: Tensor | None = None, dtype: torch.dtype = F64) -> Problem:
    """x^T A x / 2 for each run, A [R, P, P] symmetric, at a point [R, P]."""

    def loss(p: Any, batch: Tensor) -> Tensor:
        x: Tensor = p["x"]
        half: Tensor = torch.einsum("ri,rij,rj->r", x, batch, x) / 2
        return half

    return Problem(loss, {"x": random(*A.shape[:2], seed=99) if at is None else at}, A, run_axis=True, dtype=dtype)


def with_spectrum(values: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with those eigenvalues, in a random basis."""
    q = torch.linalg.qr(random(len(values), len(values), seed=seed))[0]
    matrix: Tensor = q @ torch.diag(values) @ q.T
    return matrix


def wishart(P: int, n: int, seed: int) -> Tensor:
    x = random(n, P, seed=seed)
    return x.T @ x / n


def numbers(array: xr.DataArray) -> list[float]:
    return [float(value) for value in array.values.ravel()]


# Eigenvalues.


@pytest.mark.parametrize("basis", [8, 32])
def test_the_top_of_wishart_spectra_is_eigvalshs(basis: int) -> None:
    """Three runs at once; with a basis of 8, by restarts. The residual bounds the error."""
    A = torch.stack([wishart(60, n, seed=n) for n in (30, 60, 240)])
    found = hessian_eigenvalues(quadratic(A), 3, basis=basis, tolerance=1e-7).dataset
    want = np.linalg.eigvalsh(A.numpy())[:, ::-1][:, :3]
    np.testing.assert_allclose(found.hessian_eigenvalue, want, rtol=1e-10)
    assert found.converged.all()
    assert (found.residual <= 2e-7 * found.hessian_eigenvalue).all()


def test_the_largest_is_algebraic_not_in_magnitude() -> None:
    A = with_spectrum(torch.tensor([-50.0, -3.0, -1.0, 0.5, 2.0], dtype=F64))
    found = hessian_eigenvalues(quadratic(A[None]), 2, tolerance=1e-9).dataset
    assert numbers(found.hessian_eigenvalue) == pytest.approx([2.0, 0.5])


def test_a_hessian_below_zero_has_a_maximum_below_zero() -> None:
    A = with_spectrum(-torch.arange(1.0, 8.0, dtype=F64))
    found = hessian_eigenvalues(quadratic(A[None]), 7, tolerance=1e-9).dataset
    assert numbers(found.hessian_eigenvalue) == pytest.approx([-1, -2, -3, -4, -5, -6, -7])


@pytest.mark.parametrize("basis", [8, 32])
def test_the_smallest_are_eigvalshs_most_negative_first(basis: int) -> None:
    """Indefinite, positive with a smallest that is no outlier, and of a rank that leaves it zero."""
    below = with_spectrum(torch.cat([torch.tensor([-7.0, -2.0]), torch.linspace(-0.1, 3, 38)]).to(F64))
    A = torch.stack([below, wishart(40, 80, seed=1), wishart(40, 10, seed=2)])
    found = hessian_eigenvalues(quadratic(A), 2, which="smallest", basis=basis, max_hvp=1000, tolerance=1e-6).dataset
    want, top = np.linalg.eigvalsh(A.numpy())[:, :2], np.linalg.eigvalsh(A.numpy())[:, -1:]
    assert found.converged.all()
    assert (np.abs(found.smallest_eigenvalue[:2] - want[:2]) <= 2e-6 * top[:2]).all()
    # Thirty zeros are found as the one that they are.
    assert abs(found.smallest_eigenvalue[2, 0]) <= 2e-6 * top[2, 0]
    assert (found.residual <= 2e-6 * np.maximum(top, -want[:, :1])).all()
    assert (found.smallest_eigenvalue[:, 0] >= want[:, 0] - 1e-12).all()


def test_the_smallest_vector_goes_down_from_a_saddle() -> None:
    A = with_spectrum(torch.tensor([-1.0, 0.5, 2.0, 30.0], dtype=F64))
    problem = quadratic(A[None], at=torch.zeros(1, 4, dtype=F64))
    found = hessian_eigenvalues(problem, which="smallest", tolerance=1e-9)
    assert float(problem.value(found.vectors[:, 0])[0]) == pytest.approx(-0.5)


def test_an_eigenvalue_is_within_its_residual_even_before_it_converged() -> None:
    A = torch.stack([with_spectrum(torch.linspace(0, 1, 80, dtype=F64), seed=i) for i in range(3)])
    found = hessian_eigenvalues(quadratic(A), max_hvp=8, tolerance=1e-12).dataset
    assert not found.converged.any()
    assert (found.n_hvp == 9).all()
    for A_r, value, residual in zip(A, numbers(found.hessian_eigenvalue), numbers(found.residual), strict=True):
        distance = float((torch.linalg.eigvalsh(A_r) - value).abs().min())
        assert 0 < distance <= residual


def test_vectors_are_eigenvectors_of_length_one_with_the_parameters_names() -> None:
    A = wishart(20, 40, seed=1)
    problem = quadratic(A[None])
    found = hessian_eigenvalues(problem, 2, tolerance=1e-8)
    _, vectors = np.linalg.eigh(A.numpy())
    overlap = np.abs(found.vectors[0].numpy() @ vectors[:, ::-1][:, :2])
    np.testing.assert_allclose(overlap, np.eye(2), atol=1e-6)
    assert problem.tree(found.vectors[:, 0]).keys() == {"x"}


def test_a_warm_start_needs_fewer_products_and_does_not_miss_what_has_overtaken() -> None:
    """The weights moved a little; and they moved so that another direction, orthogonal to the old one, is the sharpest now."""
    values = torch.cat([torch.linspace(0, 0.9, 198, dtype=F64), torch.tensor([0.97, 1.0], dtype=F64)])
    A = with_spectrum(values)
    before = hessian_eigenvalues(quadratic(A[None]))
    moved = quadratic((A + 1e-3 * with_spectrum(values, seed=5))[None])
    cold, warm = hessian_eigenvalues(moved), hessian_eigenvalues(moved, start=before.vectors)
    assert int(warm.dataset.n_hvp[0]) < int(cold.dataset.n_hvp[0])
    assert numbers(warm.dataset.hessian_eigenvalue) == pytest.approx(numbers(cold.dataset.hessian_eigenvalue), rel=1e-4)
    values[-2] = 1.3
    overtaken = hessian_eigenvalues(quadratic(with_spectrum(values)[None]), start=before.vectors)
    assert numbers(overtaken.dataset.hessian_eigenvalue) == pytest.approx([1.3], rel=1e-4)


def test_few_distinct_eigenvalues_end_the_search_early_without_zeros_of_its_own() -> None:
    """The identity's Krylov space ends after one step; what fills the basis then may not add eigenvalues 0."""
    found = hessian_eigenvalues(quadratic(-2 * torch.eye(9, dtype=F64)[None]), 3).dataset
    assert numbers(found.hessian_eigenvalue) == pytest.approx([-2, -2, -2])
    flat = hessian_eigenvalues(quadratic(torch.zeros(1, 9, 9, dtype=F64))).dataset
    assert numbers(flat.hessian_eigenvalue) == [0]
    assert flat.converged.all()


def test_fp32_says_what_it_lost() -> None:
    """The recurrence's residual falls to 1e-8 in FP32 too; the measured one does not."""
    A = wishart(50, 100, seed=3)
    found = hessian_eigenvalues(quadratic(A[None], dtype=torch.float32), tolerance=1e-8).dataset
    assert numbers(found.hessian_eigenvalue) == pytest.approx([float(torch.linalg.eigvalsh(A)[-1])], rel=1e-5)
    assert int(found.n_hvp[0]) < 200
    assert not found.converged.any()
    assert found.dtype == "float32"


def test_preconditioned_eigenvalues_are_scipys_generalised_ones() -> None:
    A, P = wishart(30, 60, seed=2), random(30, seed=4).exp()
    found = preconditioned_eigenvalues(quadratic(A[None]), {"x": P[None]}, 3, tolerance=1e-8).dataset
    want = scipy.linalg.eigh(A.numpy(), np.diag(P.numpy()), eigvals_only=True)[::-1][:3]
    np.testing.assert_allclose(found.preconditioned_eigenvalue[0], want, rtol=1e-9)
    assert found.edge_of_stability == pytest.approx(38)


def frozen_adam(A: Tensor, P: Tensor, rate: float, beta1: float, steps: int) -> float:
    """How far a step of descent with Adam's momentum and a preconditioner that stands still grew |x|, on average, at the end."""
    x, m = torch.ones(len(A), dtype=F64), torch.zeros(len(A), dtype=F64)
    sizes = []
    for _ in range(steps):
        m = beta1 * m + (1 - beta1) * (A @ x)
        x = x - rate * m / P
        sizes.append(float(x.norm()))
    return math.log(sizes[-1] / max(sizes[: steps // 2])) / steps


@pytest.mark.parametrize("beta1", [0.9, 0.0, 0.5])
def test_frozen_adam_diverges_just_above_the_edge_and_not_just_below(beta1: float) -> None:
    A, P = wishart(20, 40, seed=6), random(20, seed=7).exp()
    found = preconditioned_eigenvalues(quadratic(A[None]), {"x": P[None]}, beta1=beta1, tolerance=1e-8).dataset
    edge = found.edge_of_stability / float(found.preconditioned_eigenvalue[0, 0])
    assert frozen_adam(A, P, 1.01 * edge, beta1, 4000) > 1e-4
    assert frozen_adam(A, P, 0.99 * edge, beta1, 4000) < -1e-4


def test_adams_preconditioner_is_torchs_step() -> None:
    """A step of torch.optim.Adam is lr P^-1 m, from the moments that it keeps."""
    x = random(6).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.01, betas=(0.8, 0.95), eps=1e-3)
    for step in range(3):
        before = x.detach().clone()
        x.grad = random(6, seed=step)
        optimizer.step()
    state = optimizer.state[x]
    P = adam_preconditioner({"x": state["exp_avg_sq"]}, 3, beta1=0.8, beta2=0.95, epsilon=1e-3)["x"]
    # The step is a difference of numbers about 1, so it is good to 2^-52.
    torch.testing.assert_close(before - x.detach(), 0.01 * state["exp_avg"] / P, rtol=1e-12, atol=1e-15)


# Traces and densities.


def test_rademacher_vectors_have_no_variance_on_a_diagonal() -> None:
    diagonal = random(2, 40)
    found = hutchinson_trace(quadratic(torch.diag_embed(diagonal)), 3)
    np.testing.assert_allclose(found.hessian_trace, diagonal.sum(1), rtol=1e-12)
    np.testing.assert_allclose(found.hessian_trace_stderr, 0, atol=1e-13)


def test_hutchinsons_standard_error_is_the_formulas() -> None:
    """Var w^T A w = 2 sum_{i != j} A_ij^2; with 400 samples the estimate of it is good to about 10 %."""
    A = wishart(30, 60, seed=8)
    found = hutchinson_trace(quadratic(A[None]), 400)
    variance = 2 * float((A - torch.diag(A.diagonal())).square().sum())
    assert numbers(found.hessian_trace_stderr) == pytest.approx([math.sqrt(variance / 400)], rel=0.3)
    assert abs(numbers(found.hessian_trace)[0] - float(A.trace())) < 4 * math.sqrt(variance / 400)
    assert int(found.n_hvp[0]) == 400


def reference_xtrace(A: Tensor, omega: Tensor) -> list[float]:
    """XTrace's samples as they are defined: the whole range of A Omega without one column, made anew for each."""
    P, k = omega.shape
    samples = []
    for i in range(k):
        q = torch.linalg.qr(A @ omega[:, [j for j in range(k) if j != i]])[0]
        rho = omega[:, i] - q @ (q.T @ omega[:, i])
        outside = rho @ A @ rho / (rho @ rho) * (P - k + 1)
        samples.append(float((q.T @ A @ q).trace() + outside))
    return samples


def test_xtrace_is_its_definition() -> None:
    A = with_spectrum(0.7 ** torch.arange(40.0, dtype=F64))
    drawn = torch.randn(5, 40, generator=torch.Generator().manual_seed(3), dtype=F64)
    omega = math.sqrt(40) * (drawn / drawn.norm(dim=1, keepdim=True)).T
    found = xtrace(quadratic(A[None]), 10, seed=3)
    assert numbers(found.trace_sample) == pytest.approx(reference_xtrace(A, omega), rel=1e-9)
    assert found.method == "xtrace"
    assert int(found.n_hvp[0]) == 10


def test_xtrace_beats_hutchinson_where_the_spectrum_falls_off_and_its_error_is_honest() -> None:
    A = torch.stack([with_spectrum(0.7 ** torch.arange(100.0, dtype=F64), seed=i) for i in range(8)])
    problem = quadratic(A)
    truth = A.diagonal(dim1=1, dim2=2).sum(1).numpy()
    plain, better = hutchinson_trace(problem, 24), xtrace(problem, 24)
    errors = [np.sqrt(((found.hessian_trace - truth) ** 2).mean()) for found in (plain, better)]
    assert errors[1] < errors[0] / 10
    assert 0.2 < errors[1] / float(better.hessian_trace_stderr.mean()) < 5


@pytest.mark.parametrize("products", [12, 20])
def test_xtrace_is_exact_where_the_range_is_found(products: int) -> None:
    """In as many products as parameters, whatever the spectrum; and where the rank is below half of the products."""
    A = with_spectrum(random(12, seed=1))
    found = xtrace(quadratic(A[None]), products)
    assert numbers(found.hessian_trace) == pytest.approx([float(A.trace())], rel=1e-11)
    assert numbers(found.hessian_trace_stderr) == [0]
    assert found.method == "exact"
    assert int(found.n_hvp[0]) == 12
    low = random(40, 4, seed=2)
    found = xtrace(quadratic((low @ low.T)[None]), products)
    assert numbers(found.hessian_trace) == pytest.approx([float(low.square().sum())], rel=1e-7)
    assert numbers(xtrace(quadratic(torch.zeros(1, 40, 40, dtype=F64)), 4).hessian_trace) == [0]


def test_the_densitys_moments_are_those_of_the_random_vectors() -> None:
    """Gauss quadrature of m nodes is exact to degree 2 m - 1: sum_j c_j t_j^q = w^T A^q w / w^T w, w recomputed here."""
    A = torch.stack([wishart(30, 60, seed=1), with_spectrum(random(30, seed=2))])
    found = spectral_density(quadratic(A), 3, 6, seed=4)
    drawn = torch.randn(3, 30, generator=torch.Generator().manual_seed(4), dtype=F64)
    w = torch.where(drawn < 0, -1.0, 1.0).to(F64)
    for q in range(12):
        want = torch.einsum("ni,rij,nj->rn", w, torch.linalg.matrix_power(A, q), w) / 30
        np.testing.assert_allclose((found.weight * found.node**q).sum("lanczos_step"), want, rtol=1e-9, atol=1e-12)
    assert (found.n_hvp == 18).all()


def test_with_as_many_steps_as_parameters_the_nodes_are_the_spectrum() -> None:
    A = wishart(15, 30, seed=1)
    found = spectral_density(quadratic(A[None]), 2, 15)
    for probe in range(2):
        np.testing.assert_allclose(found.node[0, probe], np.linalg.eigvalsh(A.numpy()), rtol=1e-8)


def test_a_space_that_ends_early_leaves_nodes_without_weight() -> None:
    found = spectral_density(quadratic(3 * torch.eye(10, dtype=F64)[None]), 2, 5)
    np.testing.assert_allclose((found.weight * (found.node == 3)).sum("lanczos_step"), 1)
    np.testing.assert_allclose(found.weight.sum("lanczos_step"), 1)


def test_a_smoothed_density_has_unit_mass_and_the_nodes_mean() -> None:
    A = wishart(30, 60, seed=1)
    found = spectral_density(quadratic(A[None]), 4, 10)
    at = np.linspace(-3, 8, 2001)
    smoothed = smoothed_density(found, at, 0.1)
    density = smoothed.density
    assert validate(smoothed) == []
    assert density.dims == ("run", "eigenvalue")
    mass, mean = (float(np.trapezoid(density[0] * f, at)) for f in (np.ones_like(at), at))
    assert mass == pytest.approx(1, abs=1e-9)
    assert mean == pytest.approx(float((found.weight * found.node).sum("lanczos_step").mean()), rel=1e-9)
    each = [smoothed_density(found.isel(sample=[i]), at, 0.1) for i in range(4)]
    assert each[0].density_stderr.isnull().all()
    spread = np.std([one.density for one in each], axis=0, ddof=1) / 2
    np.testing.assert_allclose(smoothed.density_stderr, spread, rtol=1e-9, atol=1e-12)


# Steps.


def test_curvature_along_the_gradient_is_rayleighs_quotient() -> None:
    A, x = wishart(10, 20, seed=1), random(1, 10, seed=2)
    found = gradient_curvature(quadratic(A[None], at=x))
    g = A @ x[0]
    want = float(g @ A @ g / (g @ g))
    assert numbers(found.gradient_curvature) == pytest.approx([want])
    assert numbers(found.gradient_norm) == pytest.approx([float(g.norm())])
    assert numbers(found.loss) == pytest.approx([float(x[0] @ A @ x[0] / 2)])
    distance = float((torch.linalg.eigvalsh(A) - want).abs().min())
    assert distance <= numbers(found.gradient_curvature_residual)[0]
    assert np.isnan(gradient_curvature(quadratic(A[None], at=0 * x)).gradient_curvature).all()


@pytest.mark.parametrize("first", [1e-6, 1.0, 1e3])
def test_critical_sharpness_of_a_quadratic_is_the_curvature_along_the_gradient(first: float) -> None:
    """From a step that is too small, about right, or too large; each run brackets its own."""
    A = torch.stack([s * wishart(10, 20, seed=1) for s in (0.1, 1.0, 30.0)])
    problem = quadratic(A)
    found = critical_sharpness(problem, learning_rate=first, tolerance=1e-3)
    want = gradient_curvature(problem).gradient_curvature
    assert found.converged.all()
    np.testing.assert_allclose(found.critical_sharpness, want, rtol=1e-3)
    assert (found.critical_sharpness_lower <= want * (1 + 1e-9)).all()
    assert (found.critical_sharpness_upper >= want * (1 - 1e-9)).all()
    # The value's step is the middle of the bracket's.
    steps = 1 / found.critical_sharpness_lower + 1 / found.critical_sharpness_upper
    np.testing.assert_allclose(2 / found.critical_sharpness, steps, rtol=1e-12)


def test_critical_sharpness_along_another_update() -> None:
    A, x, d = wishart(10, 20, seed=1), random(1, 10, seed=2), random(10, seed=3)
    d = d * torch.sign(d @ A @ x[0])
    found = critical_sharpness(quadratic(A[None], at=x), {"x": d[None]}, tolerance=1e-4)
    assert numbers(found.critical_sharpness) == pytest.approx([float(d @ A @ d / (d @ A @ x[0]))], rel=1e-4)


def test_a_loss_that_no_step_raises_or_every_step_has_no_critical_sharpness() -> None:
    downhill = critical_sharpness(Problem(lambda p, _: p["x"].sum(), {"x": torch.ones(3)}, None), max_forward=20)
    A, x = wishart(10, 20, seed=1), random(1, 10, seed=2)
    uphill = critical_sharpness(quadratic(A[None], at=x), {"x": -(A @ x[0])[None]}, max_forward=20)
    for found in (downhill, uphill):
        assert not found.converged.any()
        assert np.isnan(found.critical_sharpness).all()
    assert numbers(downhill.critical_sharpness_lower) == [0]
    assert numbers(uphill.critical_sharpness_upper) == [math.inf]


def test_a_loss_that_is_not_finite_has_risen_and_one_that_stays_has_not() -> None:
    """The root of x - lr / 2, at x = 1, is NaN above lr = 2; along y, x^2 stays as it is."""
    root = Problem(lambda p, _: p["x"].sqrt(), {"x": torch.ones((), dtype=F64)}, None, dtype=F64)
    assert numbers(critical_sharpness(root, tolerance=1e-4).critical_sharpness) == pytest.approx([1.0], rel=1e-4)
    flat = Problem(
        lambda p, _: p["x"].square().sum() + 0 * p["y"].sum(), {"x": torch.ones(1), "y": torch.ones(1)}, None
    )
    found = critical_sharpness(flat, {"x": torch.zeros(1), "y": torch.ones(1)}, max_forward=20)
    assert numbers(found.critical_sharpness_lower) == [0]
    assert numbers(found.critical_sharpness_upper)[0] < math.inf


# Datasets.


def test_every_variable_is_named_in_the_table_with_its_dimensions() -> None:
    packs = quadratic(torch.stack([wishart(8, 20, seed=i) for i in range(2)]))
    A = wishart(8, 20, seed=1)
    single = Problem(lambda p, b: p["x"] @ b @ p["x"] / 2, {"x": random(8)}, A, dtype=F64)
    seen: set[Hashable] = set()
    for problem, dropped in ((packs, 0), (single, 1)):
        datasets = [
            hessian_eigenvalues(problem, 2).dataset, hessian_eigenvalues(problem, which="smallest").dataset,
            preconditioned_eigenvalues(problem, problem.tree(torch.ones_like(problem.point))).dataset,
            hutchinson_trace(problem, 2), xtrace(problem, 4), spectral_density(problem, 2, 3),
            gradient_curvature(problem), critical_sharpness(problem),
        ]  # fmt: skip
        smoothed = smoothed_density(datasets[-3], [0.0, 1.0], 0.1)
        assert smoothed.density.dims == ("run", "eigenvalue")[dropped:]
        assert validate(smoothed) == []
        seen |= {*smoothed.variables}
        for dataset in datasets:
            assert validate(dataset) == []
            for name, variable in dataset.items():
                entry = CURVATURE[str(name)]
                assert variable.dims == tuple(d for d in entry.dims if d != "probe_step")[dropped:]
                assert variable.attrs == entry.attrs()
                seen.add(name)
            assert dataset.attention == "math"
            assert dataset.dtype == "float64"
    assert seen == CURVATURE.keys()


LINE = Problem(lambda p, _: p["x"].sum(), {"x": torch.ones(3)}, None)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: hessian_eigenvalues(LINE, 4), r"k must be 1..3.*got 4"),
        (lambda: hessian_eigenvalues(LINE, 0), r"got 0"),
        (lambda: hessian_eigenvalues(LINE, 1, basis=2), "basis of at least 3"),
        (lambda: hessian_eigenvalues(LINE, which="both"), "which must be .* got 'both'"),  # type: ignore[arg-type]
        (lambda: hessian_eigenvalues(LINE, 2, max_hvp=1), "max_hvp of at least 2"),
        (lambda: hessian_eigenvalues(LINE, start=torch.ones(3)), r"start must be \[1, k, 3\]"),
        (lambda: preconditioned_eigenvalues(LINE, {"x": torch.zeros(3)}), "positive everywhere"),
        (lambda: adam_preconditioner({"x": torch.ones(3)}, 0), "step must be at least 1"),
        (lambda: hutchinson_trace(LINE, 1), "at least 2"),
        (lambda: xtrace(LINE, 5), "even number"),
        (lambda: spectral_density(LINE, 1, 4), r"steps 1..3"),
        (lambda: smoothed_density(xr.Dataset(), [0.0], 0.0), "width must be"),
        (lambda: critical_sharpness(LINE, tolerance=0.0), "tolerance in"),
    ],
)
def test_what_can_not_be_is_refused_in_one_line(ask: Callable[[], Any], message: str) -> None:
    with pytest.raises(LandscapeError, match=message) as caught:
        ask()
    assert "\n" not in str(caught.value)


def test_the_losss_units_are_everywhere_its_own() -> None:
    problem = Problem(lambda p, _: p["x"].pow(2).sum(), {"x": random(4)}, None, dtype=F64, units="nats")
    density = smoothed_density(spectral_density(problem, 2, 2), [0.0], 1.0)
    units = {
        str(n): v.attrs["units"]
        for data in (hessian_eigenvalues(problem).dataset, density)
        for n, v in data.variables.items()
    }
    assert units["hessian_eigenvalue"] == units["eigenvalue"] == "nats"
    assert units["density"] == units["density_stderr"] == "1 / nats"
    assert units["converged"] == "1"


@pytest.mark.parametrize("runs", [False, True])
def test_what_curvature_says_keeps_to_its_schema(runs: bool) -> None:
    """Of a problem alone, and of two side by side; and a wrong unit is told."""
    H = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    x = torch.ones((2, 3) if runs else 3, dtype=torch.float64)
    problem = Problem(
        lambda p, _: ((p["x"] @ H) * p["x"]).sum(-1) / 2, {"x": x}, None, run_axis=runs, dtype=torch.float64
    )
    found = [hessian_eigenvalues(problem, 2).dataset, hutchinson_trace(problem), gradient_curvature(problem)]
    assert [validate(dataset) for dataset in found] == [[], [], []]
    found[0]["n_hvp"].attrs["units"] = "nats"
    (line,) = validate(found[0])
    assert "n_hvp: units" in line


# Memory.


def test_a_basis_restarts_in_slabs_and_makes_no_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of them at most at a time: whatever it makes is smaller than the basis, and the eigenvalues are the same."""
    A = torch.stack([wishart(60, 70, seed=i) for i in range(2)])
    whole = hessian_eigenvalues(quadratic(A), 2, basis=6, tolerance=1e-8, max_hvp=400).dataset
    assert whole.converged.all()
    assert (whole.n_hvp > 6).all()
    monkeypatch.setattr(lanczos, "SLAB", 2 * 6 * 20)
    space, largest = lanczos.Basis(random(2, 60), 6, fresh=True), 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(largest, out.numel() if func is torch.ops.aten.bmm.default else 0)
            return out

    for _ in range(6):
        space.extend(lambda v: torch.einsum("rij,rj->ri", A, v))
    with Largest():
        space.restart(3)
    assert 0 < largest <= 2 * 3 * 20
    slabs = hessian_eigenvalues(quadratic(A), 2, basis=6, tolerance=1e-8, max_hvp=400).dataset
    np.testing.assert_allclose(slabs.hessian_eigenvalue, whole.hessian_eigenvalue, rtol=1e-12)


def test_a_basis_stays_orthonormal_in_fp32_over_restarts() -> None:
    """150 steps past three eigenvalues that converge in ten: what a step leaves of them would come back in every later one."""
    values = torch.cat([torch.tensor([1e4, 3e3, 1e3]), torch.logspace(2, -3, 297)]).double()
    turn = torch.linalg.qr(random(2, 300, 300))[0]
    A = ((turn * values) @ turn.mT).float()
    space = lanczos.Basis(random(2, 300).float(), 60, fresh=True)
    for _ in range(150):
        space.extend(lambda v: torch.einsum("rij,rj->ri", A, v))
        V = space.V[: space.length + 1].transpose(0, 1)
        assert (V @ V.mT - torch.eye(space.length + 1)).abs().max() < 5e-6
        if space.length == 60:
            space.restart(30)


def test_a_run_that_is_done_keeps_its_vector_whatever_its_operator_gives_afterwards() -> None:
    A = torch.stack([torch.diag(torch.tensor([9.0, 1, 1, 1, 1, 1, 1, 1, 1, 1])).double(), wishart(10, 12, seed=0)])
    products = 0

    def apply(v: torch.Tensor, runs: object) -> torch.Tensor:
        nonlocal products
        assert runs is None
        products += 1
        w = torch.einsum("rij,rj->ri", A, v)
        return w if products <= 2 else torch.stack([torch.full_like(w[0], torch.nan), w[1]])

    found = lanczos.largest(apply, random(2, 10), 1, basis=10, products=50, tolerance=1e-8)
    assert found.products[0] == 2 < found.products[1]
    assert found.converged.all()
    np.testing.assert_allclose(found.vectors[0, 0].abs(), np.eye(10)[0], atol=1e-7)


def test_long_vectors_are_multiplied_in_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    """60 parameters in stretches of 7, with three zeros behind them: eigenvalues are NumPy's, vectors fit them."""
    A = torch.stack([wishart(60, 70, seed=i) for i in range(3)])
    monkeypatch.setattr(lanczos, "STRETCH", 7)
    assert lanczos.Basis(random(3, 60), 6, fresh=True).V.shape == (7, 3, 63)
    want = np.linalg.eigvalsh(A.numpy())[:, :-3:-1]
    found = hessian_eigenvalues(quadratic(A), 2, basis=6, tolerance=1e-8, max_hvp=400)
    np.testing.assert_allclose(found.dataset.hessian_eigenvalue, want, rtol=1e-12)
    turned = torch.einsum("rij,rkj->rki", A, found.vectors)
    np.testing.assert_allclose(turned, torch.from_numpy(want.copy())[..., None] * found.vectors, atol=1e-6 * want.max())


@pytest.mark.cuda
def test_a_basis_in_the_hosts_memory_finds_the_same(cuda: torch.device) -> None:
    A = torch.stack([wishart(60, 70, seed=i) for i in range(2)]).to(cuda)
    there, here = (
        hessian_eigenvalues(quadratic(A, at=random(2, 60).to(cuda)), 2, basis=6, tolerance=1e-6, basis_on=on)
        for on in (None, "cpu")
    )
    np.testing.assert_allclose(here.dataset.hessian_eigenvalue, there.dataset.hessian_eigenvalue, rtol=1e-9)
    assert here.vectors.device == there.vectors.device
