"""The loss along one direction or over a plane through the parameters, as datasets.

    slice:  f(w + alpha d),    plane:  f(w + alpha d + beta e),    between two checkpoints:  f((1 - alpha) w + alpha v)

A direction is a dict like the parameters (names that are absent don't move): random, the gradient, an eigenvector, a difference.
A random direction says little as it is, since a network that is wide or has large weights takes a step of length 1 for
less: Li et al. 2018 (1712.09913) scale each filter of it, the weights into one output, to the norm of the same filter of w.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from landscape.evaluate import Loss, Params, Point, State, check_params, draw
from landscape.schema import LANDSCAPE, describe


def random_direction(
    params: Mapping[str, Tensor],
    *,
    seed: int = 0,
    filter_normalised: bool = True,
    filter_axis: int | Mapping[str, int] = 0,
    run_axis: bool = False,
) -> Params:
    """A normal random direction; each filter with the norm of the same filter of the parameters, vectors zero (Li et al.'s own).

    filter_axis: the axis of the outputs, not counting the run axis, for all parameters or by name (0 for all others): 0 for
    torch's Linear and Conv, 1 for x @ W. Unnormalised, all coordinates are standard normal. The same for every run up to the
    normalisation, and independent of the device.
    """
    check_params(params, run_axis)
    noise = draw(params, seed, "direction", run_axis)
    if not filter_normalised:
        return {name: value.clone() for name, value in noise.items()}
    lead = int(run_axis)
    direction = {}
    for name, value in params.items():
        if value.ndim - lead < 2:
            direction[name] = torch.zeros_like(value)
            continue
        axis = filter_axis if isinstance(filter_axis, int) else filter_axis.get(name, 0)
        if not 0 <= axis < value.ndim - lead:
            raise ValueError(f"filter_axis of {name!r} must be 0..{value.ndim - lead - 1}, got {axis}")
        others = [i for i in range(lead, value.ndim) if i != axis + lead]
        wanted, has = (torch.linalg.vector_norm(v, dim=others, keepdim=True) for v in (value.detach(), noise[name]))
        direction[name] = noise[name] * (wanted / has)
    return direction


def gradient_direction(
    loss: Loss, params: Mapping[str, Tensor], batch: Any = None, *, run_axis: bool = False, state: State = ()
) -> Params:
    """The gradient over its norm, uphill: alpha is then a Euclidean distance. A gradient of zero gives NaN."""
    with Point(loss, params, batch, run_axis, state) as point:
        gradient = point.slope()[1]
        length = 1 / point.norm(gradient)
        return {name: g * point.spread(length, g) for name, g in gradient.items()}


def slice_loss(
    loss: Loss,
    params: Mapping[str, Tensor],
    batch: Any,
    direction: Mapping[str, Tensor],
    alphas: Sequence[float],
    second: Mapping[str, Tensor] | None = None,
    betas: Sequence[float] | None = None,
    *,
    units: str = "nats",
    run_axis: bool = False,
    state: State = (),
) -> xr.Dataset:
    """`loss_slice` (run, alpha), or `loss_plane` (run, alpha, beta) with a second direction; no run without a run axis.

    loss(params, batch) -> scalar or [R] in `units`; it may write to `state`. Also `direction_norm`, the Euclidean length of
    alpha = 1, with two directions `direction_cosine`, and `_n_forward`. Where alpha = beta = 0 the loss is that of the parameters
    as they are, bit for bit. A loss that is not finite stays so. Raises ValueError for what doesn't fit.
    """
    if (second is None) != (betas is None):
        raise ValueError("a plane needs a second direction and betas, a slice neither; got one of them")
    steps = [_steps("alpha", alphas)] + ([] if betas is None else [_steps("beta", betas)])
    directions = [direction] + ([] if second is None else [second])
    with Point(loss, params, batch, run_axis, state) as point:
        for d in directions:
            _check_direction(point, d)
        values = [
            point.value(_moves(directions, at))
            for at in (np.stack(np.meshgrid(*steps, indexing="ij"), -1).reshape(-1, len(steps)))
        ]
        shape = (-1, *(len(s) for s in steps))
        extras = {"direction_norm": point.norm(direction)}
        if second is not None:
            dot = [(direction[n].double() * second[n].double()) for n in direction.keys() & second.keys()]
            none = torch.zeros_like(extras["direction_norm"])
            product = torch.stack([point.flat(d).sum(1) for d in dot]).sum(0) if dot else none
            extras["direction_cosine"] = product / (extras["direction_norm"] * point.norm(second))
        name = "loss_slice" if second is None else "loss_plane"
        axes = dict(zip(("alpha", "beta"), steps, strict=False))
        return _dataset(point, name, torch.stack(values, 1).reshape(shape), axes, extras, units)


def slice_between(
    loss: Loss,
    first: Mapping[str, Tensor],
    last: Mapping[str, Tensor],
    batch: Any,
    alphas: Sequence[float],
    *,
    units: str = "nats",
    run_axis: bool = False,
    state: State = (),
) -> xr.Dataset:
    """`loss_slice` (run, alpha) on the line from the first parameters (alpha = 0) to the last (1), both exact to the bit."""
    along = _steps("alpha", alphas)
    with Point(loss, first, batch, run_axis, state) as point:
        if last.keys() != first.keys():
            raise ValueError(
                f"both ends must have the same parameters; these are in one: {sorted(last.keys() ^ first.keys())}"
            )
        _check_direction(point, last)
        ends = [(point.params[name], last[name].detach()) for name in point.params]
        values = []
        for alpha in along.tolist():
            # lerp returns its ends exactly, which a + 1 (b - a) does not.
            values.append(
                point.value_at({n: torch.lerp(a, b, alpha) for n, (a, b) in zip(point.params, ends, strict=True)})
            )
        length = point.norm({n: b.double() - a.double() for n, (a, b) in zip(point.params, ends, strict=True)})
        return _dataset(
            point, "loss_slice", torch.stack(values, 1), {"alpha": along}, {"direction_norm": length}, units
        )


def _moves(directions: Iterable[Mapping[str, Tensor]], at: np.ndarray) -> Params:
    delta: Params = {}
    for d, factor in zip(directions, at.tolist(), strict=True):
        for name, value in d.items():
            delta[name] = delta[name] + factor * value if name in delta else factor * value
    return delta


def _steps(name: str, values: Sequence[float]) -> np.ndarray:
    steps = np.asarray(values, dtype=np.float64)
    if steps.ndim != 1 or not len(steps) or not np.isfinite(steps).all():
        raise ValueError(f"{name}s must be a sequence of finite numbers, at least one, got {values}")
    return steps


def _check_direction(point: Point, direction: Mapping[str, Tensor]) -> None:
    for name, value in direction.items():
        if name not in point.params:
            raise ValueError(f"direction {name!r} is no parameter; they are {sorted(point.params)}")
        if value.shape != point.params[name].shape:
            raise ValueError(
                f"direction {name!r} must have the parameter's shape {tuple(point.params[name].shape)}, got {tuple(value.shape)}"
            )
    if not direction or not all(math.prod(v.shape) for v in direction.values()):
        raise ValueError("a direction must move something, got none")


def _dataset(
    point: Point, name: str, values: Tensor, axes: Mapping[str, np.ndarray], extras: Mapping[str, Tensor], units: str
) -> xr.Dataset:
    lead = ("run",) if point.run_axis else ()
    data = {
        name: xr.Variable(
            (*lead, *axes), point.finish(values).cpu().numpy(), LANDSCAPE[name].attrs() | {"units": units}
        )
    }
    calls = describe(f"{name}_n_forward")
    assert calls is not None
    data[f"{name}_n_forward"] = xr.Variable((), point.n_forward, calls.attrs())
    for extra, value in extras.items():
        data[extra] = xr.Variable(lead, point.finish(value).cpu().numpy(), LANDSCAPE[extra].attrs())
    coords = {axis: xr.Variable((axis,), steps, LANDSCAPE[axis].attrs()) for axis, steps in axes.items()}
    return xr.Dataset(data, coords)
