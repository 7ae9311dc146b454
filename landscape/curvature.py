"""What each variable of a curvature dataset means, and how tensors become one.

As in `schema`: if a variable has this name, it has these dimensions, this unit, this definition. A problem without a run axis has
the same variables without the dimension `run`. Units of "loss" are the loss's own, `Problem.units`; parameters have no unit.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from landscape.products import Problem
from landscape.schema import QUANTISERS, Variable

_LANCZOS = "Lanczos with full reorthogonalisation and thick restarts (Wu & Simon 2000)"
_ADAM = "largest eigenvalues of P^-1/2 H P^-1/2, P Adam's preconditioner (Cohen et al. 2207.14484); " + _LANCZOS
_RESIDUAL = "||A v - lambda v||, ||v|| = 1, from a product of its own: an eigenvalue of A lies no further away"
_SLQ = "Lanczos from a random vector: eigenvalues of T, and squared first components (Ubaru, Chen & Saad 2017)"
_CRITICAL = "2 / lr_c, lr_c the smallest step along the update that raises the loss (Kalra et al. 2601.16979)"

_ROWS: dict[str, Variable] = {
    "hessian_eigenvalue": Variable(("run", "rank"), "loss", "largest eigenvalues of the loss's Hessian H", _LANCZOS),
    "smallest_eigenvalue": Variable(("run", "rank"), "loss", "smallest eigenvalues of H, most negative first", _LANCZOS),
    "preconditioned_eigenvalue": Variable(("run", "rank"), "1 / learning rate", "eigenvalues of P^-1 H", _ADAM),
    "residual": Variable(("run", "rank"), "as the eigenvalue", "length of the residual", _RESIDUAL),
    "converged": Variable(("run",), "1", "whether the tolerance was met", "False: values are the best so far, or NaN"),
    "n_hvp": Variable(("run",), "1", "Hessian-vector products over the whole batch", "counted"),
    "n_gradient": Variable(("run",), "1", "gradients over the whole batch", "counted"),
    "n_forward": Variable(("run",), "1", "evaluations of the loss over the whole batch", "counted"),
    "hessian_trace": Variable(("run",), "loss", "trace of the loss's Hessian", "the sum of its eigenvalues"),
    "hessian_trace_stderr": Variable(("run",), "loss", "standard error of the trace", "of the mean over the samples"),
    "trace_sample": Variable(("run", "sample"), "loss", "estimate of the trace by each sample", "the trace is their mean"),
    "node": Variable(("run", "sample", "lanczos_step"), "loss", "nodes of the spectral density, as they are", _SLQ),
    "weight": Variable(("run", "sample", "lanczos_step"), "1", "weights of the nodes, 1 in sum for each sample", _SLQ),
    "density": Variable(
        ("run", "eigenvalue"), "1 / loss", "density of H's eigenvalues, smoothed", "nodes as normal distributions, 1 in all"
    ),
    "density_stderr": Variable(
        ("run", "eigenvalue"), "1 / loss", "standard error of the density", "of the mean over the samples; NaN for a single one"
    ),
    "eigenvalue": Variable(("eigenvalue",), "loss", "eigenvalue", "where the density is given"),
    "gradient_curvature": Variable(("run",), "loss", "curvature along the gradient", "g^T H g / g^T g"),
    "gradient_curvature_residual": Variable(
        ("run",), "loss", "length of H u - (u^T H u) u, u the gradient's direction", "an eigenvalue lies no further away"
    ),
    "gradient_norm": Variable(("run",), "loss", "length of the gradient", "Euclidean norm over all parameters"),
    "loss": Variable(("run",), "loss", "the loss at the parameters", "weighted mean over the batch's pieces"),
    "critical_sharpness": Variable(("run",), "1 / learning rate", "critical sharpness", _CRITICAL),
    "critical_sharpness_lower": Variable(("run",), "1 / learning rate", "its lower bound", "2 / the step that raised it"),
    "critical_sharpness_upper": Variable(("run",), "1 / learning rate", "its upper bound", "2 / the step that did not"),
}  # fmt: skip
_MANY = ("run", "probe_step")  # either may be absent: a run alone, at one point
CURVATURE: dict[str, Variable] = {
    name: row._replace(dims=(*_MANY, *row.dims[1:]), optional=_MANY) if "run" in row.dims else row
    for name, row in _ROWS.items()
}


def labelled(problem: Problem, values: Mapping[str, Tensor | int | bool], **attrs: str | float) -> xr.Dataset:
    """Tensors [R, ...] as a dataset with names, units and sources; a number stands for all runs.

    Says how the numbers came about: precision, how second derivatives were taken, and in which form attention was.
    """
    variables = {}
    for name, value in values.items():
        entry = CURVATURE[name]
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.full(problem.R, value)
        dims = tuple(d for d in entry.dims if d != "probe_step")
        if not problem.run_axis:
            array, dims = array[0], dims[1:]
        variables[name] = (dims, array, entry.attrs() | {"units": units_of(entry, problem.units)})
    said: dict[str, str | float] = {"dtype": str(problem.dtype).removeprefix("torch."), "attention": "math"}
    if problem.attention_why:
        said["attention_why"] = problem.attention_why
    if "n_hvp" in values:
        said |= {"second_derivatives": problem.mode, "why": problem.why}
        said |= {"program": problem.program} if problem.mode == "forward-over-reverse" else {}
        said |= {"difference": problem.difference} if problem.mode == "finite-difference" else {}
    word = problem.quantisers
    coords = {} if word is None else {"quantisers": ((), word, QUANTISERS["quantisers"].attrs())}
    return xr.Dataset(variables, coords, attrs=said | attrs)


def units_of(row: Variable, units: str) -> str:
    """A row's units where the loss's are known."""
    return {"loss": units, "1 / loss": f"1 / {units}"}.get(row.units, row.units)


def random_vectors(problem: Problem, count: int, seed: int, kind: str) -> Tensor:
    """Gaussian or Rademacher vectors [count, P] from a seed alone, the same for every run of a pack.

    Drawn on the CPU in FP64: the same on every device, whatever the pack and the global random state.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, problem.P, generator=generator, dtype=torch.float64)
    if kind == "rademacher":
        drawn = torch.where(drawn < 0, -1.0, 1.0).to(torch.float64)
    return drawn.to(problem.point)
