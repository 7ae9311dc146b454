"""Delayed scaling: a tensor's scale from the amaxes of the tensors before it, so that it is read once and not twice.

    scale = amax * 2^margin / largest          amax: the history's maximum, or its most recent entry

rounded once to FP32; 2^margin leaves room for a tensor that outgrows its history, whose values saturate. Then the tensor's own
amax is recorded, for the next ones. That is NVIDIA's Transformer Engine's recipe DelayedScaling, whose "scale" is the
inverse of ours.

The state is a value: recording gives a new history, so that a step which carries it can be compiled, captured or replayed. With
a leading run axis each run has its own row, and no scale depends on another run's.
"""

from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor

from formats.compile_time import assume_constant_result
from formats.scale_arithmetic import fp32_scale
from formats.scaled import largest_product
from formats.scaled_constants import resolve
from formats.scaling import quantize_scaled, tensor_amax
from formats.spec import Format

MAX_MARGIN = 64


class HistoryRule(StrEnum):
    """Which of a history's amaxes counts."""

    MAX = "max"
    """The largest."""
    MOST_RECENT = "most_recent"
    """The last one recorded."""


class AmaxHistory(NamedTuple):
    """The amaxes of the last H tensors, FP32 [H] or [R, H] for R runs, the newest first; 0 stands for none.

    A tensor of zeros and one with an inf or a NaN leave no amax: they are recorded as 0, and passed over. Without any amax,
    at the start too, the scale is 1.
    """

    amaxes: Tensor

    @classmethod
    def empty(cls, length: int, runs: int | None = None, device: torch.device | str | None = None) -> "AmaxHistory":
        """A history of `length` tensors, none recorded, of one tensor or of one in each of `runs` runs."""
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        shape = (length,) if runs is None else (runs, length)
        return cls(torch.zeros(shape, dtype=torch.float32, device=device))

    def record(self, amax: Tensor) -> "AmaxHistory":
        """The history after a tensor of that amax, FP32 of shape [] or [R]; the oldest entry goes."""
        kept = torch.where(amax.isfinite(), amax.detach().abs(), 0.0).to(torch.float32)
        return AmaxHistory(torch.cat([kept[..., None], self.amaxes[..., :-1]], -1))

    def scale(self, f: Format | str, rule: str = HistoryRule.MAX, margin: int = 0) -> Tensor:
        """The scale of the next tensor, FP32 of shape [] or [R]: amax * 2^margin / largest element, or 1 without an amax.

        f: a format scaled per tensor, e4m3fn@tensor; or one with a tensor scale, nvfp4, where `largest` is the largest element
        times the largest scale. margin: -64..64. ValueError for other formats, rules and margins.
        """
        largest = _largest(f if isinstance(f, str) else f.canonical_name, rule, margin)
        amax = self.amaxes.amax(-1) if rule == HistoryRule.MAX else _newest(self.amaxes)
        return torch.where(amax > 0, fp32_scale(amax.view(torch.int32), largest), 1.0)


def quantize_delayed(
    x: Tensor,
    f: Format | str,
    history: AmaxHistory,
    rule: str = HistoryRule.MAX,
    margin: int = 0,
    **arguments: object,
) -> tuple[Tensor, AmaxHistory]:
    """What x becomes under the scale of its history, and the history with x's amax.

    x: any shape, or [R, ...] with a history of R runs. arguments: those of `quantize_scaled`, tensor_scale and batch_dims left
    out. Returns x's shape and dtype. ValueError where x has not as many runs as the history.
    """
    batch_dims = history.amaxes.ndim - 1
    if x.shape[:batch_dims] != history.amaxes.shape[:-1]:
        raise ValueError(f"x of shape {tuple(x.shape)} must begin with the history's {history.amaxes.shape[0]} runs")
    scale = history.scale(f, rule, margin)
    quantized = quantize_scaled(x, f, tensor_scale=scale, batch_dims=batch_dims, **arguments)  # type: ignore[arg-type]
    return quantized, history.record(tensor_amax(x, batch_dims))


def _newest(amaxes: Tensor) -> Tensor:
    """The first entry that is not 0, if any."""
    first = (amaxes > 0).to(torch.int32).argmax(-1, keepdim=True)
    return amaxes.gather(-1, first)[..., 0]


# As in formats.scaled_constants: numbers for the compiler, found by name.
@assume_constant_result
def _largest(name: str, rule: str, margin: int) -> float:
    described = resolve(name, None)
    if not described.takes_tensor_scale:
        raise ValueError(f"{name} has no tensor scale to delay; use a format such as e4m3fn@tensor or nvfp4")
    if rule not in set(HistoryRule):
        raise ValueError(f"rule must be one of {', '.join(HistoryRule)}, got {rule!r}")
    if not -MAX_MARGIN <= margin <= MAX_MARGIN:
        raise ValueError(f"margin must be -{MAX_MARGIN}..{MAX_MARGIN}, got {margin}")
    return largest_product(described) * 2.0**-margin
