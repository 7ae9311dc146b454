"""How each of `measures` is taken of a pack at a point, all runs at once: `landscape`'s functions, and with what they are called.

    one gradient of the probe's batch costs 1;  a forward pass 1/3;  a Hessian-vector product about 3

    logit_sharpness                                  a forward pass, of weights that were kept
    *_eigenvalue                                     up to `MAX_HVP` products, less from the last probe's vectors
    hessian_trace                                    `samples` products
    spectral_density                                 `samples` x `LANCZOS_STEPS` products
    gradient_curvature                               a gradient and a product
    critical_sharpness                               about 15 forward passes
    sam_sharpness, asam_sharpness, m_sam_sharpness   a gradient and a forward pass a radius
    adaptive_sharpness                               `ASCENT` gradients a radius
    average_sharpness                                `samples` forward passes a radius
    box_sharpness, embedding_sharpness               up to `ASCENT` gradients an epsilon
    hidden_sharpness                                 a forward pass, and a search at a token of each sequence
    logit_sharpness_lbfgsb                           a forward pass, and SciPy on the CPU, one token after the other

What a run has no number for, it has NaN for, and nobody else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from landscape import (
    Bracket,
    Eigenpairs,
    Estimate,
    asam_sharpness,
    average_sharpness,
    ball_sharpness,
    box_sharpness,
    critical_sharpness,
    gradient_curvature,
    hessian_eigenvalues,
    hidden_sharpness,
    hutchinson_trace,
    lbfgsb_logit_sharpness,
    logit_sharpness,
    m_sam_sharpness,
    preconditioned_eigenvalues,
    sam_sharpness,
    spectral_density,
)
from train.at_point import AtPoint
from train.determinism import deterministic
from train.measures import AFTERWARDS, LOGITS
from train.probe_costs import ASCENT, BASIS, LANCZOS_STEPS, MAX_HVP
from train.program import Probe

TOLERANCE = 1e-2  # of an eigenvalue
ADAPTIVE = ("asam_sharpness", "adaptive_sharpness")  # whose radii are `adaptive_radii`
STARTED = (
    "hessian_eigenvalue",
    "smallest_eigenvalue",
    "preconditioned_eigenvalue",
)  # whose vectors are the next probe's start

Found = dict[str, NDArray[Any]]


def take(measure: str, at: AtPoint, start: Tensor | None = None) -> tuple[Found, Tensor | None]:
    """A measure's variables, [R, ...] each, NaN for runs that have none; and its vectors [R, k, P], where it has any.

    start: the vectors of an earlier probe; zeros are as good as none. LandscapeError where the question has no answer.
    """
    there = at.stepped if AFTERWARDS[measure].adam else at.finite
    vectors: Tensor | None = None
    found: Found = {}
    if there.any():
        if measure in STARTED:
            pairs = _eigenvalues(measure, at, start)
            found, vectors = _variables(pairs.dataset), pairs.vectors.nan_to_num()
            vectors[~there] = 0
        else:
            found = TAKEN[measure](at)
    none = ~there.cpu().numpy()
    whole = {}
    for name, axes in AFTERWARDS[measure].variables.items():
        values = np.asarray(found[name] if found else np.nan, np.float64)
        whole[name] = np.broadcast_to(values, (at.runs, *(len(ticks(at.probe, measure, axis)) for axis in axes))).copy()
        whole[name][none] = np.nan
    return whole, vectors


def ticks(probe: Probe, measure: str, axis: str) -> list[float] | list[int]:
    """What stands along an axis of a measure."""
    radii = probe.adaptive_radii if measure in ADAPTIVE else probe.radii
    stands: dict[str, list[float] | list[int]] = {
        "rank": list(range(probe.eigenvalues)),
        "sample": list(range(probe.samples)),
        "lanczos_step": list(range(LANCZOS_STEPS)),
        "epsilon": list(probe.epsilons),
        "rho": list(radii),
    }
    return stands[axis]


def _eigenvalues(measure: str, at: AtPoint, start: Tensor | None) -> Eigenpairs:
    k = at.probe.eigenvalues
    how: dict[str, Any] = {"start": start, "basis": max(BASIS, k + 2), "max_hvp": MAX_HVP, "tolerance": TOLERANCE}
    there = at.stepped if AFTERWARDS[measure].adam else at.finite
    how["asked"] = there.nonzero().flatten().tolist()
    if measure == "hessian_eigenvalue":
        return hessian_eigenvalues(at.problem, k, **how)
    if measure == "smallest_eigenvalue":
        return hessian_eigenvalues(at.problem, k, which="smallest", **how)
    p = at.in_place(at.preconditioner, at.stepped)
    return preconditioned_eigenvalues(at.problem, p, k, beta1=at.pack.program.optimizer.beta1, **how)


def _critical(at: AtPoint) -> Found:
    return _variables(critical_sharpness(at.problem, at.in_place(at.update, at.stepped)))


def _logits(at: AtPoint) -> Found:
    """Means over all tokens or each sequence's last, of the box around the logits and around these less their mean."""
    count, sums = 0, torch.zeros(2, at.runs, len(at.probe.epsilons), dtype=torch.float64)
    with torch.no_grad(), deterministic(False):
        for r, logits, targets in at.logits():
            count += targets.shape[1] if r.start == 0 else 0
            for of, centred in zip(sums, (False, True), strict=True):
                of[r] += logit_sharpness(logits, targets, at.probe.epsilons, centred=centred).double().sum(1).cpu()
    names = AFTERWARDS[LOGITS].own
    return {name: (of / count).numpy() for name, of in zip(names, sums, strict=True)}


def _hidden(at: AtPoint) -> Found:
    """At the last token of each sequence, where a state has seen most; bounds and costs are means over these tokens."""
    hidden, head, targets = at.last_states()
    found = hidden_sharpness(hidden, head, targets, at.probe.epsilons)
    return {name: values.astype(np.float64).mean(1) for name, values in _of_bracket("hidden_sharpness", found).items()}


def _lbfgsb(at: AtPoint) -> Found:
    """At the last token of each sequence, as Lee et al. take it: means of what was reached, the maximum, and evaluations."""
    count, sums = 0, torch.zeros(3, at.runs, len(at.probe.epsilons), dtype=torch.float64)
    with torch.no_grad(), deterministic(False):
        for batch in at.batches.parts:
            for r, logits, targets in at.surface.logits(at.params, batch, at.shape.context):
                count += targets.shape[1] if r.start == 0 else 0
                found = lbfgsb_logit_sharpness(logits, targets, at.probe.epsilons)
                for of, values in zip(sums, (found.lower, found.upper, found.n_forward), strict=True):
                    assert values is not None
                    of[r] += values.double().sum(1).cpu()
    names = AFTERWARDS["logit_sharpness_lbfgsb"].own
    return {name: (of / count).numpy() for name, of in zip(names, sums, strict=True)}


def _ball(name: str, measure: Callable[..., Estimate], **how: Any) -> Callable[[AtPoint], Found]:
    def of(at: AtPoint) -> Found:
        radii = at.probe.adaptive_radii if name in ADAPTIVE else at.probe.radii
        more: dict[str, Any] = {"samples": at.probe.samples} if measure is average_sharpness else {}
        return _of_estimate(name, at.around(measure, list(radii), **how, **more))

    return of


TAKEN: Mapping[str, Callable[[AtPoint], Found]] = {
    LOGITS: _logits,
    "hessian_trace": lambda at: _variables(hutchinson_trace(at.problem, at.probe.samples)),
    "spectral_density": lambda at: _variables(
        spectral_density(at.problem, at.probe.samples, min(LANCZOS_STEPS, at.problem.P))
    ),
    "gradient_curvature": lambda at: _variables(gradient_curvature(at.problem)),
    "critical_sharpness": _critical,
    "sam_sharpness": _ball("sam_sharpness", sam_sharpness),
    "m_sam_sharpness": _ball("m_sam_sharpness", m_sam_sharpness, m=1, batch_dim=1, whole=True),
    "asam_sharpness": _ball("asam_sharpness", asam_sharpness),
    "adaptive_sharpness": _ball("adaptive_sharpness", ball_sharpness, adaptive=True, steps=ASCENT),
    "average_sharpness": _ball("average_sharpness", average_sharpness),
    "box_sharpness": lambda at: _of_bracket(
        "box_sharpness", at.around(box_sharpness, list(at.probe.epsilons), iterations=ASCENT)
    ),
    "embedding_sharpness": lambda at: _of_bracket(
        "embedding_sharpness", at.around(box_sharpness, list(at.probe.epsilons), names=["wte"], iterations=ASCENT)
    ),
    "hidden_sharpness": _hidden,
    "logit_sharpness_lbfgsb": _lbfgsb,
}


def _variables(data: xr.Dataset) -> Found:
    return {str(name): of.values for name, of in data.data_vars.items()}


def _of_estimate(name: str, found: Estimate) -> Found:
    parts: dict[str, Any] = {name: found.value, f"{name}_n_forward": torch.as_tensor(found.n_forward)}
    if found.stderr is not None:
        parts[f"{name}_stderr"] = found.stderr
    return {key: value.cpu().numpy() for key, value in parts.items()}


def _of_bracket(name: str, found: Bracket) -> Found:
    parts = {"lower": found.lower, "upper": found.upper, "converged": found.converged, "n_forward": found.n_forward}
    return {f"{name}_{ending}": value.cpu().numpy() for ending, value in parts.items() if value is not None}
