"""A text's tokens where packs read them, copied there once: packs of a sweep follow each other on one text.

Only the last text is kept, so that a sweep over several holds no more memory than its packs need.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.text import Text

_last: list[tuple[Text, torch.device, tuple[Tensor, Tensor]]] = []


def tokens_on(device: torch.device, text: Text) -> tuple[Tensor, Tensor]:
    """A text's training and validation tokens on the device, [tokens] each, uint8 or int32; shared: nobody writes to them."""
    for kept, where, tokens in _last:
        if kept is text and where == device:
            return tokens
    _last.clear()  # before the next is made
    made = _tokens(text.train).to(device), _tokens(text.validation).to(device)
    _last.append((text, device, made))
    return made


def _tokens(tokens: NDArray[Any]) -> Tensor:
    """Tokens as a tensor that can be indexed on every device: uint8 as they are, wider ones as int32."""
    return torch.tensor(tokens if tokens.dtype == np.uint8 else tokens.astype(np.int32))
