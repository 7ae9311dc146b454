"""How sharp a loss is at a point."""

from landscape.accessor import Accessor
from landscape.balls import asam_sharpness, average_sharpness, ball_sharpness, m_sam_sharpness, sam_sharpness
from landscape.boxes import box_sharpness, hidden_sharpness
from landscape.curvature import CURVATURE
from landscape.errors import LandscapeError
from landscape.evaluate import Batches, Bracket, Estimate, module_loss
from landscape.hessian import Eigenpairs, adam_preconditioner, hessian_eigenvalues, preconditioned_eigenvalues
from landscape.logits import half_width, logit_sharpness, small_box_sharpness
from landscape.products import Problem
from landscape.schema import LANDSCAPE, SHARPNESS, Variable, labelled, validate
from landscape.slices import gradient_direction, random_direction, slice_between, slice_loss
from landscape.smoothed import lbfgsb_logit_sharpness, smoothed_logit_sharpness
from landscape.steps import critical_sharpness, gradient_curvature
from landscape.traces import hutchinson_trace, smoothed_density, spectral_density, xtrace

__all__ = [
    "CURVATURE",
    "LANDSCAPE",
    "SHARPNESS",
    "Accessor",
    "Batches",
    "Bracket",
    "Eigenpairs",
    "Estimate",
    "LandscapeError",
    "Problem",
    "Variable",
    "adam_preconditioner",
    "asam_sharpness",
    "average_sharpness",
    "ball_sharpness",
    "box_sharpness",
    "critical_sharpness",
    "gradient_curvature",
    "gradient_direction",
    "half_width",
    "hessian_eigenvalues",
    "hidden_sharpness",
    "hutchinson_trace",
    "labelled",
    "lbfgsb_logit_sharpness",
    "logit_sharpness",
    "m_sam_sharpness",
    "module_loss",
    "preconditioned_eigenvalues",
    "random_direction",
    "sam_sharpness",
    "slice_between",
    "slice_loss",
    "small_box_sharpness",
    "smoothed_density",
    "smoothed_logit_sharpness",
    "spectral_density",
    "validate",
    "xtrace",
]
