"""What one step of training would meet: the curvature along the gradient, and the step that first raises the loss.

Along an update -lr d a quadratic loss changes by -lr g^T d + lr^2 / 2 d^T H d, so it rises from lr_c = 2 g^T d / d^T H d on.
Kalra et al. 2026 (2601.16979) turn that around: the critical sharpness of a loss, quadratic or not, is

    2 / lr_c,      lr_c the smallest lr > 0 with f(theta - lr d) > f(theta),

found with forward passes alone. For gradient descent on a quadratic it is g^T H g / g^T g, at most lambda_max.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from landscape.curvature import labelled
from landscape.errors import LandscapeError
from landscape.products import Problem


def gradient_curvature(problem: Problem) -> xr.Dataset:
    """g^T H g / g^T g: `gradient_curvature (run)`, `_residual`, `gradient_norm`, `loss`, `n_gradient`, `n_hvp`; NaN where g = 0.

    The residual ||H u - (u^T H u) u||, u = g / ||g||, says how far the gradient is from an eigenvector.
    """
    loss, gradient = problem.gradient()
    norm = gradient.norm(dim=1)
    u = gradient / norm[:, None]
    product = problem.hvp(u)
    curvature = (u * product).sum(1)
    residual = (product - curvature[:, None] * u).norm(dim=1)
    return labelled(
        problem,
        {
            "gradient_curvature": curvature,
            "gradient_curvature_residual": residual,
            "gradient_norm": norm,
            "loss": loss,
            "n_gradient": 1,
            "n_hvp": 1,
        },
    )


def critical_sharpness(
    problem: Problem,
    direction: Mapping[str, Any] | None = None,
    *,
    learning_rate: float = 1e-3,
    tolerance: float = 0.05,
    max_forward: int = 64,
) -> xr.Dataset:
    """Critical sharpness 2 / lr_c: `critical_sharpness (run)`, `_lower`, `_upper`, `converged`, `loss`, `n_forward`.

    direction: d of the update theta - lr d, shaped as the parameters, such as Adam's P^-1 m; the gradient if left out. From
    learning_rate, which should be near the one in use, the step is doubled until the loss rises or halved until it does not, and
    the bracket halved until its ends are within `tolerance` of each other, relatively. The value is from the middle. A loss
    that is not finite has risen. Where a loss falls and rises more than once, it is the crossing that doubling meets first.

    Not converged, NaN with the bound that there is: a loss that no step raised, or that every step raised, as against a direction
    that climbs. In FP32, a step whose change is below the loss's rounding looks like none: take FP64 near a minimum.
    """
    if not (0 < learning_rate < math.inf and 0 < tolerance < 1 and max_forward >= 3):
        raise LandscapeError(
            "learning_rate must be positive, tolerance in (0, 1) and max_forward at least 3, got "
            f"{learning_rate}, {tolerance}, {max_forward}"
        )
    if direction is None:
        here, d = problem.gradient()
    else:
        here, d = problem.value(), problem.vector(direction)
    low, high, counts, done = _bracket(problem, here, d, learning_rate, tolerance, max_forward)
    unknown = here.isnan() | d.isnan().any(1)
    middle = (low + high) / 2
    value = torch.where(done, 2 / middle, torch.nan)
    nan = torch.full_like(value, torch.nan)
    return labelled(
        problem,
        {
            "critical_sharpness": torch.where(unknown, nan, value),
            "critical_sharpness_lower": torch.where(unknown, nan, 2 / high),
            "critical_sharpness_upper": torch.where(unknown, nan, 2 / low),
            "converged": done & ~unknown,
            "loss": here,
            "n_gradient": int(direction is None),
            "n_forward": counts + int(direction is not None),
        },
        tolerance=tolerance,
    )


def _bracket(
    problem: Problem, here: Tensor, d: Tensor, learning_rate: float, tolerance: float, max_forward: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The largest step seen not to raise the loss, the smallest to, forward passes, and whether they are close, [R] each."""
    low = torch.zeros(problem.R, dtype=torch.float64, device=here.device)
    high = torch.full_like(low, torch.inf)
    counts = torch.zeros(problem.R, dtype=torch.int64, device=here.device)
    done = torch.zeros(problem.R, dtype=torch.bool, device=here.device)
    runs = list(range(problem.R))  # who is evaluated: those that are done, too, until the others fit into fewer groups
    for _ in range(max_forward):
        step = torch.where(high.isinf(), (2 * low).clamp_min(0), (low + high) / 2)
        step = torch.where((low == 0) & high.isinf(), learning_rate, step)
        there = _losses_along(problem, d, step, runs)
        raised = ~(there <= here)
        counts += (~done).long()
        low = torch.where(~done & ~raised, step, low)
        high = torch.where(~done & raised, step, high)
        done = (low > 0) & (high - low <= tolerance * low)
        waiting = (~done).nonzero().flatten().tolist()
        if not waiting:
            break
        if -(-len(waiting) // problem.group) < -(-len(runs) // problem.group):
            runs = waiting
    return low, high, counts, done


def _losses_along(problem: Problem, d: Tensor, step: Tensor, runs: list[int]) -> Tensor:
    """The losses [R] of these runs a step [R] further down; 0 of others."""
    moved = problem.point[runs] - (step[runs, None] * d[runs]).to(problem.point)
    losses = torch.zeros(problem.R, dtype=problem.dtype, device=d.device)
    losses[runs] = problem.value(moved, runs)
    return losses
