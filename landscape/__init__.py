"""How sharp a loss is at a point."""

from landscape.logits import half_width, logit_sharpness, small_box_sharpness
from landscape.schema import SHARPNESS, Variable

__all__ = ["SHARPNESS", "Variable", "half_width", "logit_sharpness", "small_box_sharpness"]
