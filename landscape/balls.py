"""How far a loss rises within a ball around the parameters: SAM, m-SAM, ASAM, and adaptive sharpness.

    S(w) = max_{||d / s|| <= rho} f(w + d) - f(w)         worst case, in the loss's units

- SAM, Foret et al. 2021 (2010.01412): Euclidean norm, s = 1, and one step: d = rho g / ||g||, g the gradient at w. m-SAM
  is the mean of this over sub-batches of m examples, each with a perturbation of its own.
- ASAM, Kwon et al. 2021 (2102.11600): s = |w| + eta, elementwise, so d = rho s^2 g / ||s g||; unchanged when a ReLU
  network's layers are rescaled against each other (eta = 0), which moves SAM at will (Dinh et al. 2017, 1703.04933).
- Adaptive worst-case and average-case sharpness, Andriushchenko et al. 2023 (2302.07011): the same with s = |w|,
  Euclidean or maximum norm, several steps; and the mean of f(w + d) - f(w) over d ~ N(0, rho^2 s^2).

A step goes to the point of the ball that is highest on the tangent, d <- rho s^2 g(d) / ||s g(d)|| (maximum norm: rho s
sign(g)). Where the loss is convex this never falls, and at a quadratic's minimum it is the power iteration: rho^2
lambda_max / 2. The value is the highest that was visited, so a lower bound of the worst case; with one step from the
centre, SAM's own number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from landscape.evaluate import Estimate, Loss, Params, Point, State, count_of, draw, grid_of


def ball_sharpness(
    loss: Loss,
    params: Mapping[str, Tensor],
    batch: Any = None,
    rho: float | Sequence[float] = 0.05,
    *,
    norm: float = 2.0,
    adaptive: bool = False,
    eta: float = 0.0,
    steps: int = 1,
    starts: int = 1,
    seed: int = 0,
    run_axis: bool = False,
    state: State = (),
) -> Estimate:
    """Worst-case sharpness in a ball, from below: the largest rise at the points visited, FP64, in the loss's units.

    loss(params, batch) -> scalar or, with `run_axis`, [R]; `state`: a module, or tensors, that it may write to. Returns [],
    [R], or with a last axis for a sequence of rho. norm 2 or inf; `adaptive` scales each coordinate by |w| + eta; `starts`
    counts the centre, then random points on the sphere, without which an exact minimum gives 0. The centre's own 0 does not
    count, so one step can give less. NaN on the way gives NaN. n_forward counts evaluations, most of them with a gradient.
    Raises ValueError for what doesn't fit.
    """
    radii = grid_of("rho", rho)
    count_of("steps", steps)
    count_of("starts", starts)
    if norm not in (2, math.inf):
        raise ValueError(f"norm must be 2 or inf, got {norm}")
    with Point(loss, params, batch, run_axis, state) as point:
        scale = _scale(point, adaptive, eta)
        base, slope = point.slope()
        rises = []
        for radius in radii:
            ends = []
            for start in range(starts):
                g = slope
                if start:
                    # A gradient of noise: its step is a random point on the sphere.
                    g = point.slope(
                        _highest(point, draw(point.params, seed, f"start {start}", run_axis), scale, radius, norm)
                    )[1]
                for step in range(steps):
                    d = _highest(point, g, scale, radius, norm)
                    if step + 1 < steps:
                        value, g = point.slope(d)
                    else:
                        value = point.value(d)
                    ends.append(value)
            rises.append(torch.stack(ends).amax(0) - base)
        value = torch.stack(rises, -1) if isinstance(rho, Sequence) else rises[0]
        return Estimate(point.finish(value), None, point.n_forward)


def sam_sharpness(
    loss: Loss, params: Mapping[str, Tensor], batch: Any = None, rho: float | Sequence[float] = 0.05, **how: Any
) -> Estimate:
    """SAM's f(w + rho g / ||g||) - f(w); `how` as in `ball_sharpness` (steps, starts, seed, run_axis, state)."""
    return ball_sharpness(loss, params, batch, rho, **how)


def asam_sharpness(
    loss: Loss,
    params: Mapping[str, Tensor],
    batch: Any = None,
    rho: float | Sequence[float] = 0.5,
    *,
    eta: float = 0.0,
    **how: Any,
) -> Estimate:
    """ASAM's f(w + rho s^2 g / ||s g||) - f(w) with s = |w| + eta (its training adds 0.01, which gives up the invariance)."""
    return ball_sharpness(loss, params, batch, rho, adaptive=True, eta=eta, **how)


def m_sam_sharpness(
    loss: Loss,
    params: Mapping[str, Tensor],
    batch: Any,
    rho: float | Sequence[float] = 0.05,
    *,
    m: int,
    batch_dim: int = 0,
    **how: Any,
) -> Estimate:
    """m-SAM: the mean of `ball_sharpness` over sub-batches of m examples, weighted by their sizes (the last may be smaller).

    batch: a tensor, or tuples, lists and dicts of them, with the examples along batch_dim of each. stderr is the standard
    error of the mean over sub-batches as a sample of all such: NaN for a single one. `how` as in `ball_sharpness`.
    """
    sizes, found, calls = [], [], 0
    for part, size in _parts(batch, count_of("m", m), batch_dim):
        one = ball_sharpness(loss, params, part, rho, **how)
        sizes.append(float(size))
        found.append(one.value)
        calls += one.n_forward
    weight = torch.tensor(sizes, dtype=torch.float64, device=found[0].device)
    weight = (weight / weight.sum()).reshape([-1] + [1] * found[0].ndim)
    values, n = torch.stack(found), len(found)
    mean = (weight * values).sum(0)
    spread = (weight * (values - mean)).square().sum(0)
    stderr = (spread * n / (n - 1)).sqrt() if n > 1 else torch.full_like(mean, torch.nan)
    return Estimate(mean, stderr, calls)


def average_sharpness(
    loss: Loss,
    params: Mapping[str, Tensor],
    batch: Any = None,
    rho: float | Sequence[float] = 0.05,
    *,
    adaptive: bool = True,
    samples: int = 16,
    seed: int = 0,
    run_axis: bool = False,
    state: State = (),
) -> Estimate:
    """Average-case sharpness: mean and standard error of f(w + d) - f(w), d ~ N(0, rho^2 s^2), s = |w| (adaptive) or 1.

    Shapes as `ball_sharpness`, in the loss's units. The noise is the same for all runs and all rho, so their differences are
    known better than their values. At a quadratic's minimum it is rho^2 / 2 sum_i s_i^2 H_ii. samples >= 2. NaN on
    the way gives NaN.
    """
    radii = grid_of("rho", rho)
    count_of("samples", samples, 2)
    with Point(loss, params, batch, run_axis, state) as point:
        scale = _scale(point, adaptive, 0.0)
        base = point.value()
        rises = []
        for sample in range(samples):
            noise = draw(point.params, seed, f"sample {sample}", run_axis)
            for radius in radii:
                d = {name: radius * scale[name] * noise[name] for name in noise}
                rises.append(point.value(d) - base)
        values = torch.stack(rises).reshape(samples, len(radii), point.runs)
        mean, stderr = (v.movedim(0, -1) for v in (values.mean(0), values.std(0) / samples**0.5))
        if not isinstance(rho, Sequence):
            mean, stderr = mean.squeeze(-1), stderr.squeeze(-1)
        return Estimate(point.finish(mean), point.finish(stderr), point.n_forward)


def _scale(point: Point, adaptive: bool, eta: float) -> Params:
    if eta < 0:
        raise ValueError(f"eta must be at least 0, got {eta}")
    return {n: v.abs() + eta if adaptive else torch.ones_like(v) for n, v in point.params.items()}


def _highest(point: Point, gradient: Params, scale: Params, rho: float, norm: float) -> Params:
    """The point of the ball that is highest on the tangent; no move where the gradient is zero."""
    if norm == math.inf:
        return {name: rho * scale[name] * g.sign() for name, g in gradient.items()}
    scaled = {name: scale[name] * g for name, g in gradient.items()}
    length = point.norm(scaled)
    factor = torch.where(length == 0, 0.0, rho / length)
    return {name: point.spread(factor, g) * scale[name] * g for name, g in scaled.items()}


def _parts(batch: Any, m: int, dim: int) -> Iterator[tuple[Any, int]]:
    """Sub-batches of m examples and their sizes."""
    sizes = {tensor.shape[dim] for tensor in _tensors(batch)}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            f"the batch's tensors must have as many examples each along {dim}, at least one, got {sorted(sizes)}"
        )
    (whole,) = sizes
    for start in range(0, whole, m):
        size = min(m, whole - start)
        yield _narrow(batch, dim, start, size), size


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from _tensors(value)
    else:
        raise ValueError(
            f"a batch to be split is a tensor, or tuples, lists and dicts of them, got {type(batch).__name__}"
        )


def _narrow(batch: Any, dim: int, start: int, size: int) -> Any:
    if isinstance(batch, Tensor):
        return batch.narrow(dim, start, size)
    if isinstance(batch, Mapping):
        return {key: _narrow(value, dim, start, size) for key, value in batch.items()}
    return (
        [_narrow(v, dim, start, size) for v in batch]
        if isinstance(batch, list)
        else tuple(_narrow(v, dim, start, size) for v in batch)
    )
