"""Rounding where no product is: norm gains, the residual stream, softmax, the MLP's activation, embeddings.

Values are rounded to nearest even, saturating, along the last axis where the format has groups there; the derivative is the
identity's. Each run is a tensor of its own.
"""

from __future__ import annotations

from torch import Tensor

from formats import quantize, quantize_scaled
from formats.scaled import is_scaled_name
from train.straight_through import straight_through


def rounded(x: Tensor, name: str | None) -> Tensor:
    """X [R, ...] in a format, straight through; same shape and dtype, and x itself for None."""
    if name is None:
        return x
    wide = x.detach().float()
    y = quantize_scaled(wide, name, batch_dims=1) if is_scaled_name(name) else quantize(wide, name)
    return straight_through(x, y.to(x.dtype))
