"""What is compiled, and where: said once, in the log, when something runs eagerly.

A training step is compiled on a GPU, in pieces (see `step`), where it needs Triton and a C compiler; compiled code is kept in
exmy's cache folder, so that the next process finds it. On a CPU compiling a whole step takes 50-80 s a program, longer than it
saves; there only the quantisers are compiled, one small function for all shapes (11 s on two cores, once), and only where
the study is long enough to earn that back.
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
import importlib
import importlib.util
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor

from formats import quantize
from train.cache import cache_folder
from train.collection import no_collection
from train.determinism import tell_compiler

logger = logging.getLogger(__name__)

Quantizer = Callable[..., Tensor]

# One code for one program, on any day: nothing is chosen by a clock. `deterministic` leaves out pointwise code, which is timed in
# several block sizes all the same; in each, other products are fused with the sum after them, and round once instead of twice.
# Reductions along both axes at once lose the leading axis of a gradient [1, D], a pack of one's (seen in PyTorch 2.11).
OPTIONS: dict[str, bool] = {
    "deterministic": True,
    "triton.autotune_pointwise": False,
    "triton.mix_order_reduction": False,
}

CACHE_VARIABLE, CACHE_CUSTOM = "TORCHINDUCTOR_CACHE_DIR", "autograd_cache_allow_custom_autograd_functions"

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


def warm_up(device_type: str) -> None:
    """Import what a first step would wait for: the compiler where steps are compiled, and elsewhere nothing. The GPU's memory is
    left alone: how much is free decides the plan.
    """
    if device_type == "cuda":
        with no_collection():  # what is imported stays
            importlib.import_module("torch._inductor.compile_fx")


def compiler(dynamic: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """torch.compile for the pieces of a training step: static shapes, whole functions, and a cache that outlives the process.

    dynamic: for what is asked for tensors of many shapes, and compiled once for them all.

    Code is chosen by shapes alone (`OPTIONS`). The compiler's own cache is in the temporary folder, which machines empty;
    $TORCHINDUCTOR_CACHE_DIR, where it is set, is kept. What is in it is found again from any process: see `_by_name`.
    """
    copyreg.pickle(torch.memory_format, _by_name)
    # Which products run in TF32 a recipe says, and no advice from where the compiler looks at another's.
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores", UserWarning, r"torch\._inductor\.compile_fx")
    if CACHE_VARIABLE not in os.environ:
        # Without a home folder, or one that can be written to, the compiler keeps its own.
        with contextlib.suppress(RuntimeError, OSError):
            folder = cache_folder() / "compiled"
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                os.environ[CACHE_VARIABLE] = str(folder)
    if hasattr(functorch_config, CACHE_CUSTOM):  # ours are pure functions of their arguments
        setattr(functorch_config, CACHE_CUSTOM, True)
    return functools.partial(_wrapped, dynamic=dynamic)


def _by_name(memory_format: torch.memory_format) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """How a memory format is pickled. The keys of the compiler's cache are hashes of pickles.

    PyTorch (2.11 to 2.13) gives pickle no more than its name, "torch.contiguous_format", to be found in whichever module comes
    first in `sys.modules` that has imported torch: code that `exmy sweep` compiled was compiled again by its workers, in a
    notebook and in a script, each of which has another such module.
    """
    return _memory_format, (str(memory_format).removeprefix("torch."),)


def _memory_format(name: str) -> torch.memory_format:
    found: torch.memory_format = getattr(torch, name)
    return found


@functools.cache
def _wrapped(piece: Callable[..., Any], dynamic: bool) -> Callable[..., Any]:
    """A piece as the compiler takes it, once a process: wrapping all of them takes as long as a hundred launches, for each pack.

    What is compiled lies with the piece's own code, not here: `torch._dynamo.reset` forgets it all the same.
    """
    wrapped: Callable[..., Any] = torch.compile(piece, dynamic=dynamic, fullgraph=True, options=dict(OPTIONS))
    return wrapped


def quantizer_for(device_type: str, elements: float) -> Quantizer:
    """The quantiser for eager steps that will round `elements` elements in all: compiled where that pays and can be done."""
    saved = elements * (1 / EAGER_RATE - 1 / COMPILED_RATE)
    if device_type != "cpu" or saved < COMPILE_SECONDS or not has_cpp_compiler():
        return quantize
    return compiled_quantizer


@functools.cache
def has_cpp_compiler() -> bool:
    """Whether quantisers can be compiled for a CPU; says once why not."""
    if any(map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++")))):
        return True
    logger.warning(
        "No C++ compiler (g++ or clang++) was found: quantisers run eagerly, about half the speed of a study."
    )
    return False


def compiled_quantizer(x: Tensor, parameters: Any, rounding: str) -> Tensor:
    """`quantize` to formats' parameters, compiled once for all shapes."""
    return _program(str(rounding))(x, parameters)


@functools.cache
def _program(rounding: str) -> Callable[..., Tensor]:
    """A program a rounding: its name must be a constant to the compiler, which an argument of the outermost function is not."""
    tell_compiler()
    return torch.compile(lambda x, parameters: quantize(x, parameters, rounding), dynamic=True, fullgraph=True)
