"""How sharp a loss is at a point."""

from landscape.curvature import CURVATURE
from landscape.hessian import Eigenpairs, adam_preconditioner, hessian_eigenvalues, preconditioned_eigenvalues
from landscape.logits import half_width, logit_sharpness, small_box_sharpness
from landscape.products import LandscapeError, Problem
from landscape.schema import SHARPNESS, Variable
from landscape.steps import critical_sharpness, gradient_curvature
from landscape.traces import hutchinson_trace, smoothed_density, spectral_density, xtrace

__all__ = [
    "CURVATURE",
    "SHARPNESS",
    "Eigenpairs",
    "LandscapeError",
    "Problem",
    "Variable",
    "adam_preconditioner",
    "critical_sharpness",
    "gradient_curvature",
    "half_width",
    "hessian_eigenvalues",
    "hutchinson_trace",
    "logit_sharpness",
    "preconditioned_eigenvalues",
    "small_box_sharpness",
    "smoothed_density",
    "spectral_density",
    "xtrace",
]
