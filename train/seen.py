"""The linear layers of a model's forward pass, with weights given as products take them, and what an onlooker sees of a pass.

`model.forward` asks `Layers` for every linear layer's output by the layer's name. Left alone they round the master weights, which
is differentiable in them. Given a step's *operands* they multiply by exactly what training multiplies by, rounded once for both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from train.linear import linear, multiply_operand
from train.precision import Precision, WeightOperand

LM_HEAD = "lm_head"
"""The LM head among the linear layers, whatever its matrix is called."""


@dataclass
class Seen:
    """Tensors of one pass, all with their gradients' history; what has none is empty.

    inputs, outputs: of each linear layer, x [R, S, D] before it is rounded and y [R, S, F] after, FP32. queries, keys: of each
    block as attention takes them, [R, N, H, T, d] in the carrier. streams: [R, S, D] behind each block.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    queries: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    streams: list[Tensor] = field(default_factory=list)


@dataclass
class Layers:
    """Linear layers by name. operands: weights as products take them, in place of the master weights `p`, and not differentiable;
    the LM head's under its matrix's own name, [R, V', D]. scales: delayed ones by the same names. seen: who looks on.
    """

    p: Mapping[str, Tensor]
    head: str
    operands: Mapping[str, Tensor | WeightOperand] | None = None
    scales: Mapping[str, Tensor] | None = None
    seen: Seen | None = None

    def __call__(self, x_RSD: Tensor, name: str, precision: Precision, site: int = 0) -> Tensor:
        """Y [R, S, F] of a layer, or the LM head's product [R, S, V]."""
        matrix = self.head if name == LM_HEAD else name
        if self.scales is not None:
            precision = precision._replace(scales=self.scales.get(matrix))
        head = name == LM_HEAD
        w = self.p[matrix]
        if self.operands is None:
            y = linear(x_RSD, w, precision, site, is_transposed=head)
        else:
            y = multiply_operand(x_RSD, self.operands[matrix], precision, site, is_transposed=head)
            y = y[..., : w.shape[1]] if head else y  # what pads the vocabulary is cut off
        if self.seen is not None:
            self.seen.inputs[name], self.seen.outputs[name] = x_RSD, y
        return y
