"""What `[probe] measures` may name: each measure of `landscape` that makes sense of a training run, and what it leaves behind.

A measure is a group of a study's tree, `/probes/<measure>`, with the variables below along (run, probe_step) and, where it has
some, axes of its own. Only `logit_sharpness` has another home while training, `/sharpness`. How they are taken is `taking`'s;
here are names alone, so that a study file is read without waiting for torch.
"""

from __future__ import annotations

import difflib
from typing import Literal, NamedTuple, get_args

LOGITS = "logit_sharpness"
PROBES = "probes"  # the group of groups
Quantisers = Literal["on", "off", "finite-difference"]
QUANTISERS: tuple[Quantisers, ...] = get_args(Quantisers)


class Measure(NamedTuple):
    """own: variables with the measure's own axes behind (run, probe_step), plain: those without.

    second: whether it takes Hessian-vector products. adam: whether it needs what Adam keeps, which other optimisers lack.
    """

    what: str
    own: tuple[str, ...] = ()
    axes: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    second: bool = False
    adam: bool = False

    @property
    def variables(self) -> dict[str, tuple[str, ...]]:
        """Each variable's axes behind (run, probe_step)."""
        return {**dict.fromkeys(self.own, self.axes), **dict.fromkeys(self.plain, ())}


def _rise(name: str, what: str, *, spread: bool = False) -> Measure:
    """A rise of the loss in a ball of each radius; with a standard error where it is a mean."""
    return Measure(what, (name, *([f"{name}_stderr"] if spread else [])), ("rho",), (f"{name}_n_forward",))


MEASURES: dict[str, Measure] = {
    "hessian_eigenvalue": Measure(
        "largest eigenvalues of the Hessian", ("hessian_eigenvalue", "residual"), ("rank",), ("converged", "n_hvp"), second=True
    ),
    "smallest_eigenvalue": Measure(
        "smallest eigenvalues of the Hessian: below zero where the point is no minimum",
        ("smallest_eigenvalue", "residual"), ("rank",), ("converged", "n_hvp"), second=True,
    ),
    "preconditioned_eigenvalue": Measure(
        "largest eigenvalues of the Hessian as Adam sees it, by the run's own second moments",
        ("preconditioned_eigenvalue", "residual"), ("rank",), ("converged", "n_hvp"), second=True, adam=True,
    ),
    "hessian_trace": Measure(
        "trace of the Hessian, by random signs", plain=("hessian_trace", "hessian_trace_stderr", "n_hvp"), second=True
    ),
    "spectral_density": Measure(
        "nodes and weights of the Hessian's spectrum", ("node", "weight"), ("sample", "lanczos_step"), ("n_hvp",), second=True
    ),
    "gradient_curvature": Measure(
        "curvature along the gradient",
        plain=("gradient_curvature", "gradient_curvature_residual", "gradient_norm", "loss", "n_gradient", "n_hvp"),
        second=True,
    ),
    "critical_sharpness": Measure(
        "2 / the smallest step along Adam's update that raises the loss",
        plain=(
            "critical_sharpness", "critical_sharpness_lower", "critical_sharpness_upper", "converged", "loss", "n_forward"
        ),
        adam=True,
    ),
    "sam_sharpness": _rise("sam_sharpness", "rise of the loss at SAM's perturbation"),
    "m_sam_sharpness": _rise("m_sam_sharpness", "the same, mean over single sequences", spread=True),
    "asam_sharpness": _rise("asam_sharpness", "rise of the loss at ASAM's perturbation"),
    "adaptive_sharpness": _rise("adaptive_sharpness", "adaptive worst-case sharpness, several steps"),
    "average_sharpness": _rise("average_sharpness", "adaptive average-case sharpness", spread=True),
    "box_sharpness": Measure(
        "sharpness in a box around the weights, from below",
        ("box_sharpness_lower", "box_sharpness_converged", "box_sharpness_n_forward"), ("epsilon",),
    ),
    "embedding_sharpness": Measure(
        "sharpness in a box around the token embeddings, from below",
        ("embedding_sharpness_lower", "embedding_sharpness_converged", "embedding_sharpness_n_forward"), ("epsilon",),
    ),
    "hidden_sharpness": Measure(
        "sharpness in a box around the last hidden states, mean over the sequences' last tokens",
        ("hidden_sharpness_lower", "hidden_sharpness_upper", "hidden_sharpness_converged", "hidden_sharpness_n_forward"),
        ("epsilon",),
    ),
    "logit_sharpness_lbfgsb": Measure(
        "sharpness at the logits as the papers compute it, ten iterations of L-BFGS-B, mean over the sequences' last tokens",
        ("logit_sharpness_lbfgsb_lower", "logit_sharpness_lbfgsb_upper", "logit_sharpness_lbfgsb_n_forward"), ("epsilon",),
    ),
}  # fmt: skip
AFTERWARDS: dict[str, Measure] = {
    LOGITS: Measure("exact sharpness at the logits", ("logit_sharpness", "logit_sharpness_centred"), ("epsilon",)),
    **MEASURES,
}
"""What `exmy landscape` takes of weights that were kept: the same, and logit sharpness as one among them."""
NAMES = tuple(AFTERWARDS)


def group_of(measure: str) -> str:
    """Where a measure stands in a pack and in a study's tree. Not at the top: there xarray (2026.9) leaves a variable unread that
    has a group's name, when it loads a tree.
    """
    return f"{PROBES}/{measure}"


def check_measure(name: str) -> str:
    """The name, if it is a measure's; else ValueError, with the nearest."""
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1)
        raise ValueError(
            f"{name!r} is no measure" + (f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(NAMES)}")
        )
    return name
