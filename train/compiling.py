"""What is compiled, and where: said once, in the log, when something runs eagerly.

A training step is compiled on a GPU, where it needs Triton and a C compiler. On a CPU compiling a whole step takes
50-80 s a program, longer than it saves; there only the quantisers are compiled, one small function for all shapes (11
s on two cores, once), and only where the study is long enough to earn that back.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor

from formats import quantize

logger = logging.getLogger(__name__)

Quantizer = Callable[..., Tensor]

# Measured inside packs on two CPU cores: elements a second through the quantiser, and the seconds that compiling
# takes, with a margin.
EAGER_RATE, COMPILED_RATE, COMPILE_SECONDS = 0.1e9, 0.6e9, 20.0


@functools.cache
def compiles_steps(device_type: str) -> bool:
    """Whether training steps are compiled on this kind of device; says once why not."""
    if device_type == "cpu":
        return False
    if importlib.util.find_spec("triton") is None:
        logger.warning("Triton is not installed: training steps run eagerly on the GPU, several times slower.")
        return False
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        logger.warning(
            "No C compiler (cc, gcc or clang) was found: training steps run eagerly on the GPU, several times slower."
        )
        return False
    return True


def quantizer_for(device_type: str, elements: float) -> Quantizer:
    """The quantiser for eager steps that will round `elements` elements in all: compiled where that pays and can be done."""
    saved = elements * (1 / EAGER_RATE - 1 / COMPILED_RATE)
    if device_type != "cpu" or saved < COMPILE_SECONDS or not _has_cpp_compiler():
        return quantize
    return _compiled_quantizer()


@functools.cache
def _has_cpp_compiler() -> bool:
    if any(map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++")))):
        return True
    logger.warning(
        "No C++ compiler (g++ or clang++) was found: quantisers run eagerly, about half the speed of a study."
    )
    return False


@functools.cache
def _compiled_quantizer() -> Quantizer:
    return torch.compile(quantize, dynamic=True, fullgraph=True)
