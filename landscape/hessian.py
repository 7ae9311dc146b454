"""The outermost eigenvalues of a loss's Hessian, of each run of a pack: how sharp the sharpest directions are.

Gradient descent at learning rate lr is stable on a quadratic as long as

    lambda_max(H) < 2 / lr                              (gradient descent),
    lambda_max(P^-1 H) < (2 + 2 beta1) / ((1 - beta1) lr),  38 / lr at beta1 = 0.9     (Adam with P held still),

and training hovers at that edge (Cohen et al. 2021, 2103.00065; 2022, 2207.14484). Adam's P is diagonal,

    P = (1 - beta1^t) (sqrt(v / (1 - beta2^t)) + eps),

v its second moment after t steps. P^-1 H has the eigenvalues of the symmetric P^-1/2 H P^-1/2, which Lanczos takes.

Every eigenvalue comes with its residual ||A v - lambda v||, from one more product with the vector found: some eigenvalue of A
lies within it of lambda. That it is the largest one, no residual can say.

The smallest eigenvalues, those of -H from the other end, say whether a point is a minimum: one below zero is a way down that
the gradient does not show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from torch.utils._pytree import tree_map

from landscape.curvature import labelled
from landscape.errors import LandscapeError
from landscape.lanczos import OfRuns, largest
from landscape.products import Problem


class Eigenpairs(NamedTuple):
    """Eigenvalues as a dataset, and their vectors [R, k, P], outermost first, for slices and for the next probe's start."""

    dataset: xr.Dataset
    vectors: Tensor


def hessian_eigenvalues(
    problem: Problem,
    k: int = 1,
    *,
    which: Literal["largest", "smallest"] = "largest",
    start: Tensor | None = None,
    basis: int = 32,
    max_hvp: int = 200,
    tolerance: float = 1e-3,
    seed: int = 0,
    basis_on: torch.device | str | None = None,
    asked: Sequence[int] | None = None,
) -> Eigenpairs:
    """The k algebraically largest eigenvalues of H: `hessian_eigenvalue (run, rank)`, `residual`, `converged (run)`, `n_hvp`.

    which: "smallest" gives `smallest_eigenvalue`, the most negative first. Its tolerance is relative to the largest eigenvalue
    met in size, since it may be 0; an upper bound of lambda_min, as `hessian_eigenvalue` is a lower one of lambda_max.

    start: the vectors of an earlier probe, [R, k, P] of any k; a tenth of noise is mixed in, so that a direction that has
    overtaken them is found. basis: vectors of memory, with some six more around it: (basis + 6) R P numbers, 19 GB for GPT-2 124M
    in FP32 and 32 of them, all but six vectors of which `basis_on="cpu"` moves off a GPU, and with fewer there are more products.
    A run is done when its residuals are within tolerance times the eigenvalue;
    the eigenvalue itself is then off by about the residual's square over the gap to the next. After max_hvp products `converged`
    is False and the value a lower bound of lambda_max but for rounding. A run whose loss is NaN gives NaN. An eigenvalue that
    repeats exactly is found once. asked: of which runs, all if left out; others give NaN. Where the problem knows the loss of
    some runs alone (`of_runs`), those that are done cost no products. Raises LandscapeError for a k that does not fit.
    """
    if which not in ("largest", "smallest"):
        raise LandscapeError(f'which must be "largest" or "smallest", got {which!r}')
    name, sign = ("hessian_eigenvalue", 1) if which == "largest" else ("smallest_eigenvalue", -1)

    def apply(v: Tensor, runs: Sequence[int] | None) -> Tensor:
        return sign * problem.hvp(v, runs)

    return _eigenvalues(problem, apply, name, k, start, basis, max_hvp, tolerance, seed, {}, basis_on, asked, sign)


def preconditioned_eigenvalues(
    problem: Problem,
    preconditioner: Mapping[str, Any],
    k: int = 1,
    *,
    beta1: float = 0.9,
    start: Tensor | None = None,
    basis: int = 32,
    max_hvp: int = 200,
    tolerance: float = 1e-3,
    seed: int = 0,
    basis_on: torch.device | str | None = None,
    asked: Sequence[int] | None = None,
) -> Eigenpairs:
    """The k largest eigenvalues of P^-1 H, P > 0 diagonal and shaped as the parameters: `preconditioned_eigenvalue (run, rank)`.

    The attribute `edge_of_stability` is what the largest, times the learning rate, may reach under Adam with this beta1: 38 at
    0.9. Residuals and vectors are those of P^-1/2 H P^-1/2. Otherwise as `hessian_eigenvalues`.
    """
    root = problem.vector(preconditioner)
    if (root <= 0).any():  # a NaN is its run's own
        raise LandscapeError(
            f"a preconditioner must be positive everywhere, got {root.nan_to_num(1).min().item():.3g}; add Adam's epsilon"
        )
    scale = root.rsqrt()
    edge = (2 + 2 * beta1) / (1 - beta1)

    def apply(v: Tensor, runs: Sequence[int] | None) -> Tensor:
        own = scale if runs is None else scale[list(runs)]
        return own * problem.hvp(own * v, runs)

    attrs = {"edge_of_stability": edge, "beta1": beta1}
    return _eigenvalues(
        problem, apply, "preconditioned_eigenvalue", k, start, basis, max_hvp, tolerance, seed, attrs, basis_on, asked
    )


def adam_preconditioner(
    second_moment: Mapping[str, Any], step: int, *, beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8
) -> Any:
    """Adam's P = (1 - beta1^t) (sqrt(v / (1 - beta2^t)) + eps) after t >= 1 steps, from its second moment v before correction.

    With it, an update of Adam is lr P^-1 m, m the raw first moment. Same names and shapes as v.
    """
    if step < 1:
        raise LandscapeError(f"step must be at least 1, got {step}: before the first step Adam has no second moment")
    correct = 1 - beta2**step
    return tree_map(lambda v: (1 - beta1**step) * ((v / correct).sqrt() + epsilon), dict(second_moment))


def _eigenvalues(
    problem: Problem, apply: OfRuns, name: str, k: int, start: Tensor | None, basis: int, max_hvp: int, tolerance: float,
    seed: int, attrs: dict[str, float], basis_on: torch.device | str | None, asked: Sequence[int] | None, sign: int = 1,
) -> Eigenpairs:  # fmt: skip
    """The largest eigenvalues of an operator, times a sign."""
    if not 1 <= k <= problem.P:
        raise LandscapeError(f"k must be 1..{problem.P}, the number of parameters, got {k}")
    if basis < min(k + 2, problem.P) or max_hvp < k:
        raise LandscapeError(
            f"k = {k} needs a basis of at least {k + 2} and max_hvp of at least {k}, got {basis} and {max_hvp}"
        )
    on = None if basis_on is None else torch.device(basis_on)
    if asked is not None and (len(set(asked)) < len(asked) or not set(asked) <= set(range(problem.R))):
        raise LandscapeError(f"asked must be different runs of 0..{problem.R - 1}, got {list(asked)}")
    found = largest(
        apply,
        _start(problem, start, seed),
        k,
        basis,
        max_hvp,
        tolerance,
        on,
        of_operator=sign < 0,
        group=problem.group,
        asked=asked,
    )
    values, residuals = _rayleigh(apply, found.vectors)
    # Measured, so that what the recurrence lost in FP32 shows; twice, as it may lie anywhere about a bound that was just met.
    converged = found.converged & (residuals <= 2 * tolerance * found.sizes).all(1)
    dataset = labelled(
        problem,
        {name: sign * values, "residual": residuals, "converged": converged, "n_hvp": found.products + k},
        tolerance=tolerance,
        seed=seed,
        **attrs,
    )
    return Eigenpairs(dataset, found.vectors)


def _start(problem: Problem, start: Tensor | None, seed: int) -> Tensor:
    # Uniform numbers take a tenth of the time of normal ones, in the host while a GPU waits, and have the same bits anywhere.
    uniform = np.random.Generator(np.random.Philox(seed)).random(problem.P, dtype=np.float32)
    drawn = 2 * torch.from_numpy(uniform).to(problem.point) - 1
    noise: Tensor = (drawn / drawn.norm()).expand(problem.R, -1)
    if start is None:
        return noise
    if start.ndim != 3 or start.shape[0] != problem.R or start.shape[2] != problem.P:
        raise LandscapeError(
            f"start must be [{problem.R}, k, {problem.P}], runs and parameters, got {list(start.shape)}"
        )
    total: Tensor = start.to(problem.point).nan_to_num().sum(1)
    length = total.norm(dim=1, keepdim=True).clamp_min(torch.finfo(total.dtype).tiny)
    mixed: Tensor = total / length + 0.1 * noise
    return mixed


def _rayleigh(apply: OfRuns, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """v^T A v and ||A v - (v^T A v) v||, [R, k], by one product for each rank; NaN where the vectors are."""
    values, residuals = [], []
    for v in vectors.unbind(1):
        product = apply(v, None)
        value = (v * product).sum(1) / v.square().sum(1)
        values.append(value)
        residuals.append((product - value[:, None] * v).norm(dim=1))
    return torch.stack(values, 1), torch.stack(residuals, 1)
