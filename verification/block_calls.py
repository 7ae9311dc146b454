"""Calling a quantiser of blocks: blocks laid out as it wants them, and what it gives read as values, or as codes with scales."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from formats import element_format
from formats.scaled import Granularity, ScaledFormat
from verification.calls import Caller
from verification.laws import Floats


class Answer(NamedTuple):
    """What came of blocks, FP64, NaN where nothing came: values [B, n], and of codes the elements [B, n] and scales [B] too."""

    values: Floats
    elements: Floats | None
    scales: Floats | None


class BlockCaller(Caller):
    """A Caller for blocks [B, n]: lays them out as the format's groups, and reads values, or codes with scales."""

    def __init__(
        self, call: Callable[[Any], Any], f: ScaledFormat, takes: str, gives: str, seconds: float, device: str
    ) -> None:
        super().__init__(call, f.element, takes, "values", seconds, device)
        self.blocks, self.with_codes = f, gives == "codes"
        self._elements: Tensor | None = None
        self._scales: Tensor | None = None

    def answer(self, x: Tensor, layout: str = "plain") -> Answer:
        """Of these blocks, which are the whole tensor."""
        self._elements = self._scales = None
        values = self(x, layout).double().cpu().numpy()
        if not self.with_codes:
            return Answer(values, None, None)
        nothing = np.full(values.shape, np.nan)
        if self._elements is None or self._scales is None or self.unanswered.any():
            return Answer(nothing, nothing, nothing[:, 0])
        return Answer(values, self._elements.numpy(), self._scales.numpy())

    def _limited(self, x: Tensor, layout: str = "plain") -> Any:
        return super()._limited(self._tiled(x), layout)

    def _tiled(self, x: Tensor) -> Tensor:
        if self.blocks.granularity is not Granularity.TILE:
            return x
        return x.reshape(-1, self.blocks.group[1])

    def _read(self, x: Tensor, answer: Any) -> Tensor:
        tiled = self._tiled(x)
        if not self.with_codes:
            return super()._read(tiled, answer).reshape(x.shape)
        if not isinstance(answer, tuple | list) or len(answer) not in (2, 3):
            raise TypeError(f"gives a {type(answer).__name__}, no (codes, scales) or (codes, scales, tensor scale)")
        codes, scales = self._tensor(answer[0]).cpu(), self._tensor(answer[1]).cpu()
        if codes.shape != tiled.shape or scales.numel() != len(x):
            wrong = f"codes {tuple(codes.shape)} and {scales.numel()} scales"
            raise TypeError(f"gives {wrong} for {tuple(tiled.shape)} with {len(x)}; unpack codes, one to an element")
        upper = float(self._tensor(answer[2]).flatten()[0]) if len(answer) == 3 else 1.0
        elements = self._values_of(codes, self.f).reshape(x.shape)
        group = self._scales_of(scales).reshape(-1)
        self._elements, self._scales = elements, group
        return (elements * group[:, None] * upper).to(x.dtype)

    def _scales_of(self, scales: Tensor) -> Tensor:
        if self.blocks.scale == "fp32":
            return scales.double()
        narrow = element_format(self.blocks.scale)
        if scales.dtype.is_floating_point and scales.dtype.itemsize > 1:
            return scales.double()
        return self._values_of(scales, narrow)
