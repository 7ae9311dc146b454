"""The trace of a loss's Hessian and the density of its spectrum, from products with random vectors.

Hutchinson (1990): E[w^T H w] = tr H for w of independent signs; its variance, 2 sum_{i != j} H_ij^2, is zero for a diagonal H.
XTrace (Epperly, Tropp & Webber 2023, 2301.07825): half of the products find the range of H, and what lies outside of it is left
to Hutchinson; every vector serves both ends, being left out of the range in turn. Where the spectrum falls off, as a Hessian's
does, the error falls as fast.

Stochastic Lanczos quadrature (Ubaru, Chen & Saad 2017; Ghorbani et al. 1901.10159): the tridiagonal matrix of m steps of Lanczos
from w gives nodes t_j and weights c_j with w^T f(H) w / w^T w ~ sum_j c_j f(t_j), exact for polynomials up to degree 2 m - 1.
Nodes and weights are kept as they are: smoothing is the reader's.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import xarray as xr
from numpy.typing import ArrayLike
from torch import Tensor

from landscape.curvature import CURVATURE, labelled, random_vectors, units_of
from landscape.errors import LandscapeError
from landscape.lanczos import quadrature
from landscape.products import Problem


def hutchinson_trace(problem: Problem, probes: int = 32, *, seed: int = 0) -> xr.Dataset:
    """Trace of H by `probes` >= 2 products with Rademacher vectors: `hessian_trace (run)`, `_stderr`, `trace_sample`, `n_hvp`.

    The same vectors for every run, so that differences between runs are paired.
    """
    if probes < 2:
        raise LandscapeError(f"probes must be at least 2, for a standard error, got {probes}")
    signs = random_vectors(problem, probes, seed, "rademacher")
    samples = torch.stack([_along(problem, sign)[0] for sign in signs], 1)
    return _trace(problem, samples, probes, "hutchinson", seed)


def xtrace(problem: Problem, products: int = 32, *, seed: int = 0) -> xr.Dataset:
    """Trace of H by XTrace in an even number of products >= 4, or exactly where that is no fewer than the parameters.

    `hessian_trace (run)`, `_stderr` (0 where exact), `trace_sample (run, sample)`, `n_hvp`; the attribute `method` says which.
    The standard error takes the samples as independent, as its authors do, which they nearly are. Exact too, but for rounding,
    where the rank of H is below products / 2. Memory: `products` vectors [R, P].
    """
    if products < 4 or products % 2:
        raise LandscapeError(f"products must be an even number of at least 4, got {products}")
    if products >= problem.P:
        basis = torch.eye(problem.P).to(problem.point)
        trace = torch.stack([_along(problem, unit)[0] for unit in basis], 1).sum(1, keepdim=True)
        return _trace(problem, trace, problem.P, "exact", seed)
    count = products // 2
    omega = random_vectors(problem, count, seed, "gaussian")
    omega = math.sqrt(problem.P) * omega / omega.norm(dim=1, keepdim=True)
    y = torch.stack([problem.hvp(w.expand(problem.R, -1)) for w in omega], 1)
    finite = y.isfinite().all((1, 2))
    q_RPk, r = torch.linalg.qr(torch.where(finite[:, None, None], y, 0.0).mT)
    q, h, t = q_RPk.mT, [], []
    for j in range(count):
        z = problem.hvp(q[:, j])
        h.append(torch.einsum("rkp,rp->rk", q, z))
        t.append(z @ omega.mT)
    samples = _leave_one_out(q @ omega.mT, r, torch.stack(h, 2), torch.stack(t, 1), problem.P)
    samples[~finite] = torch.nan
    return _trace(problem, samples, products, "xtrace", seed)


def spectral_density(problem: Problem, probes: int = 8, steps: int = 32, *, seed: int = 0) -> xr.Dataset:
    """Nodes and weights of the density of H's eigenvalues: `node`, `weight (run, sample, lanczos_step)`, `n_hvp` = probes steps.

    From Rademacher vectors. The mean over probes of sum_j weight_j f(node_j), times P, estimates tr f(H); the attribute
    `parameters` is P. steps are at most P.
    """
    if probes < 1 or not 1 <= steps <= problem.P:
        raise LandscapeError(f"probes must be at least 1 and steps 1..{problem.P}, got {probes} and {steps}")
    pairs = [
        quadrature(problem.hvp, sign.expand(problem.R, -1), steps)
        for sign in random_vectors(problem, probes, seed, "rademacher")
    ]
    nodes, weights = (torch.stack(part, 1) for part in zip(*pairs, strict=True))
    return labelled(
        problem, {"node": nodes, "weight": weights, "n_hvp": probes * steps}, parameters=problem.P, seed=seed
    )


def smoothed_density(dataset: xr.Dataset, at: ArrayLike, width: float) -> xr.Dataset:
    """`spectral_density`'s nodes as `density (run, eigenvalue)`, a normal distribution of that width around each; 1 in all.

    `density_stderr` is of the mean over the probes: NaN for a single one. Stays lazy where the nodes are.
    """
    if not 0 < width < math.inf:
        raise LandscapeError(f"width must be a positive number, in the eigenvalues' unit, got {width}")
    place = xr.DataArray(np.asarray(at, dtype=np.float64), dims="eigenvalue")
    bell = np.exp(-(((place - dataset.node) / width) ** 2) / 2) / (width * math.sqrt(2 * math.pi))
    each = (dataset.weight * bell).sum("lanczos_step", skipna=False)
    probes = dataset.sizes["sample"]
    spread = (
        each.std("sample", ddof=1, skipna=False) / math.sqrt(probes) if probes > 1 else each.mean("sample") * math.nan
    )
    units = dataset["node"].attrs.get("units", "loss")
    found = xr.Dataset(
        {"density": each.mean("sample", skipna=False), "density_stderr": spread},
        {"eigenvalue": place},
        {"width": width},
    )
    for name in ("density", "density_stderr", "eigenvalue"):
        found[name].attrs = CURVATURE[name].attrs() | {"units": units_of(CURVATURE[name], units)}
    return found


def _along(problem: Problem, w: Tensor) -> tuple[Tensor, Tensor]:
    """w^T H w [R] and H w [R, P] for one vector [P]."""
    product = problem.hvp(w.expand(problem.R, -1))
    return (product * w).sum(1), product  # not a matrix times a vector, whose sums depend on the row


def _leave_one_out(w: Tensor, r: Tensor, h: Tensor, t: Tensor, P: int) -> Tensor:
    """XTrace's k samples [R, k], from W = Q^T Omega, H Omega = Q R, Q^T H Q and T = (H Q)^T Omega, all [R, k, k].

    Without omega_i, the range is Q (I - s_i s_i^T) Q^T with s_i the direction orthogonal to all columns of R but the i-th:
    the i-th column of R^-T. With x_i = (I - s_i s_i^T) W_i, what is left of omega_i is rho_i = omega_i - Q x_i, and

        sample_i = tr(Q^T H Q) - s_i^T Q^T H Q s_i + rho_i^T H rho_i (P - k + 1) / ||rho_i||^2,

    the last factor being 1 on average over omega's direction, and removing the variance of its length.
    """
    k = r.shape[-1]
    pivots = r.diagonal(dim1=1, dim2=2)
    floor = torch.finfo(r.dtype).eps * pivots.abs().amax(1, keepdim=True)
    floor = torch.where(floor > 0, floor, torch.ones_like(floor))
    raised = torch.where(pivots.abs() < floor, floor, pivots)
    eye = torch.eye(k, dtype=r.dtype, device=r.device)
    inverse = torch.linalg.solve_triangular(r - torch.diag_embed(pivots - raised), eye.expand_as(r), upper=True)
    s = inverse.mT / inverse.mT.norm(dim=1, keepdim=True)
    sw = (s * w).sum(1)
    x = w - s * sw[:, None]
    hx = h @ x
    inside = h.diagonal(dim1=1, dim2=2).sum(1, keepdim=True) - (s * (h @ s)).sum(1)
    outside = sw * (s * r).sum(1) - (t * x).sum(1) + (x * hx).sum(1)
    samples: Tensor = inside + outside * (P - k + 1) / (P - x.square().sum(1))
    return samples


def _trace(problem: Problem, samples: Tensor, products: int, method: str, seed: int) -> xr.Dataset:
    """The mean of the samples [R, n], and its standard error; of one sample, which is exact, none."""
    n = samples.shape[1]
    samples = samples.double()
    mean = samples.mean(1)
    stderr = samples.std(1) / math.sqrt(n) if n > 1 else mean * 0.0
    values: dict[str, Tensor | int | bool] = {
        "hessian_trace": mean,
        "hessian_trace_stderr": stderr,
        "trace_sample": samples,
        "n_hvp": products,
    }
    return labelled(problem, values, method=method, seed=seed)
