"""A text's tokens on the device: copied once for the packs that follow each other on it, and only one text's at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from train.text import Text
from train.text_on_device import tokens_on

CPU = torch.device("cpu")


def text_of(tokens: list[int], dtype: type) -> Text:
    train: NDArray[Any] = np.array(tokens, dtype)
    return Text("text", train, train[::-1].copy(), 70000, 1.0, "same hash", "here")


@pytest.mark.parametrize(
    ("dtype", "tokens", "wanted"),
    [(np.uint8, [0, 255, 7], torch.uint8), (np.uint16, [0, 65535, 7], torch.int32)],
)
def test_packs_of_one_text_share_its_tokens(dtype: type, tokens: list[int], wanted: torch.dtype) -> None:
    text = text_of(tokens, dtype)
    train, validation = tokens_on(CPU, text)
    assert (train.tolist(), validation.tolist()) == (tokens, tokens[::-1])
    assert train.dtype == validation.dtype == wanted
    assert tokens_on(CPU, text)[0] is train


def test_another_text_is_never_taken_for_the_last_one() -> None:
    """Not even one whose hash is the same, as tests and corrupted streams may have it."""
    tokens_on(CPU, text_of([1, 2, 3], np.uint8))
    assert tokens_on(CPU, text_of([4, 5], np.uint8))[0].tolist() == [4, 5]
