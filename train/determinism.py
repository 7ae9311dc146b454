"""The switches under which a program gives the same bits twice, set for the time it runs and put back after.

Deterministic algorithms are on, without the filling of uninitialised memory that PyTorch adds to them. cuBLAS reads its
workspace setting once, when CUDA starts, so it is set as soon as this module is imported. cuDNN's attention is off: its
backward has no deterministic form. Matmul precision belongs to the program: TF32 only where the carrier is TF32.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils.deterministic

_filling: Any = torch.utils.deterministic  # a module whose class carries the switch, which type checkers can't see

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
os.environ.setdefault(WORKSPACE, ":4096:8")


@contextlib.contextmanager
def deterministic(tf32: bool) -> Iterator[None]:
    """Deterministic algorithms, no reduced-precision sums, TF32 products if `tf32`; everything as it was on leaving."""
    if torch.cuda.is_available() and os.environ[WORKSPACE] not in (":4096:8", ":16:8"):
        raise RuntimeError(
            f"{WORKSPACE}={os.environ[WORKSPACE]!r} is not deterministic: set it to ':4096:8' and start again"
        )
    matmul = torch.backends.cuda.matmul
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        _filling.fill_uninitialized_memory,
        matmul.allow_tf32,
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_reduced_precision_reduction,
        torch.backends.cuda.cudnn_sdp_enabled(),
    )
    _switch(on=True)
    _filling.fill_uninitialized_memory = False
    matmul.allow_tf32 = tf32
    matmul.allow_bf16_reduced_precision_reduction = False
    matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        _switch(*before[:2])
        _filling.fill_uninitialized_memory = before[2]
        matmul.allow_tf32 = before[3]
        matmul.allow_bf16_reduced_precision_reduction = before[4]
        matmul.allow_fp16_reduced_precision_reduction = before[5]
        torch.backends.cuda.enable_cudnn_sdp(before[6])


def _switch(on: bool, warn_only: bool = False) -> None:
    """`torch.use_deterministic_algorithms`, which imports the compiler to tell it too: 3 s of a process that may compile nothing.

    Where the compiler is not there yet, `tell_compiler` tells it when it comes.
    """
    if torch.cuda.is_available() or "torch._inductor.config" in sys.modules:
        torch.use_deterministic_algorithms(on, warn_only=warn_only)
    else:
        torch.set_deterministic_debug_mode(("warn" if warn_only else "error") if on else "default")


def tell_compiler() -> None:
    """What the switches said before the compiler was imported; for whoever is about to compile."""
    torch.use_deterministic_algorithms(
        torch.are_deterministic_algorithms_enabled(), warn_only=torch.is_deterministic_algorithms_warn_only_enabled()
    )
