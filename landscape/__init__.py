"""How sharp a loss is at a point."""

from landscape.balls import asam_sharpness, average_sharpness, ball_sharpness, m_sam_sharpness, sam_sharpness
from landscape.boxes import box_sharpness, hidden_sharpness
from landscape.evaluate import Batches, Bracket, Estimate, module_loss
from landscape.logits import half_width, logit_sharpness, small_box_sharpness
from landscape.schema import LANDSCAPE, SHARPNESS, Variable, labelled, validate
from landscape.slices import gradient_direction, random_direction, slice_between, slice_loss
from landscape.smoothed import lbfgsb_logit_sharpness, smoothed_logit_sharpness

__all__ = [
    "LANDSCAPE",
    "SHARPNESS",
    "Batches",
    "Bracket",
    "Estimate",
    "Variable",
    "asam_sharpness",
    "average_sharpness",
    "ball_sharpness",
    "box_sharpness",
    "gradient_direction",
    "half_width",
    "hidden_sharpness",
    "labelled",
    "lbfgsb_logit_sharpness",
    "logit_sharpness",
    "m_sam_sharpness",
    "module_loss",
    "random_direction",
    "sam_sharpness",
    "slice_between",
    "slice_loss",
    "small_box_sharpness",
    "smoothed_logit_sharpness",
    "validate",
]
