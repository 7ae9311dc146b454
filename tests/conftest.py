"""What the tests of train and exmy share: a small text, small programs, and a CUDA device or a visible skip."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from tests.small import SHAPE
from train.text import Text


def make_text() -> Text:
    """A text of 32 tokens with something to learn: each token is most often followed by its successor."""
    rng = np.random.default_rng(7)
    steps = rng.choice([1, 1, 1, 5, 11], size=6000)
    tokens = (np.cumsum(steps) % SHAPE.vocabulary).astype(np.uint8)
    digest = hashlib.sha256(tokens.tobytes()).hexdigest()
    return Text(
        "python", tokens[:5000], tokens[5000:], SHAPE.vocabulary, float(np.log(SHAPE.vocabulary)), digest, "made here"
    )


@pytest.fixture(scope="session")
def text() -> Text:
    """`make_text`'s, made once."""
    return make_text()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and a CUDA device, skipped where there is none."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


@pytest.fixture
def cuda() -> torch.device:
    """A CUDA device, or a visible skip."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda")


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure of matplotlib's that is saved while the test runs, in that order."""
    saved: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *args: Any, **kwargs: Any) -> None:
        saved.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved
