"""Other people's casts, each in the few lines that it takes to put one before `verify`.

An adapter is a name, the formats and roundings that it has, and for each a function from a tensor or array of values to one of
values or codes; `verification.peers` has the functions. To judge a library that is not here, write the same for it, or give its
function to `exmy verify` as MODULE:FUNCTION.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import subprocess
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from formats import element_format
from formats.bits import DTYPES
from formats.rounding import DETERMINISTIC
from formats.scaled import list_scaled_formats
from verification import peers
from verification.peers import EVEN, Quantizer

NAMES = {
    "e8m7": "bf16",
    "e5m10": "fp16",
    "e3m2f": "e3m2fn",
    "e2m3f": "e2m3fn",
    "e2m1f": "e2m1fn",
    "e4m3fnuzb11": "e4m3b11fnuz",
}
WIDE = ("e8m23", "e11m52")
OURS = ("e4m3fn", "e5m2", "e4m3", "e3m4", "e5m2fnuz", "e4m3fnuz", "e4m3b11fnuz", "e8m0fnu", "e3m2fn", "e2m3fn", "e2m1fn",
        "bf16", "fp16", "int8", "int4", "nf4", "posit8")  # fmt: skip
RULES = ("ceil", "rceil", "nearest", "even")
OUR_BLOCKS = (*list_scaled_formats(), *(f"mxfp4:{rule}" for rule in RULES), *(f"mxfp8_e4m3fn:{rule}" for rule in RULES),
              "e4m3fn@row", "e5m2@row", "e4m3fn@tensor", "e5m2@tensor", "int8@row", "int8q6@row:e8m0fnu")  # fmt: skip
ALL = ("float32", "float64", "bfloat16", "float16")
OF_NUMPY = ("float32", "float64", "float16")
BLOCKS_OF_NUMPY = ("float32", "float16")
OWN, CHECKOUT = "exmy", "microxcaling"
"""Ours needs no installing; microxcaling is no package but a checkout, at the place that MICROXCALING names."""


class Adapter(NamedTuple):
    """A library, in one of its configurations. make(format, rounding="nearest_even") is its quantiser.

    package: whose version it is. takes: "tensor" or "array". dtypes, block_dtypes: those that it can be given, for formats of
    elements and of blocks. gives: "values" or "codes". device: where tensors given to it must lie. roundings: those that it
    offers, by our names, its users' default first. `verification.peers` says what shapes go in and come out.
    """

    name: str
    package: str
    formats: tuple[str, ...]
    make: Callable[..., Quantizer]
    takes: str = "tensor"
    dtypes: tuple[str, ...] = ALL
    gives: str = "values"
    device: str = "cpu"
    roundings: tuple[str, ...] = (EVEN,)
    block_dtypes: tuple[str, ...] = ("float32",)

    @property
    def version(self) -> str:
        """Of the package that is installed; of a checkout its commit, or "checkout"."""
        if self.package == CHECKOUT:
            return _commit()
        try:
            return version(self.package)
        except PackageNotFoundError:  # ours, run from its sources
            return "checkout"


def adapters() -> dict[str, Adapter]:
    """Those that can be used here, by name; ours is "exmy". No library is imported for it."""
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return {adapter.name: adapter for adapter in known() if adapter.device in devices and _is_there(adapter.package)}


def known() -> list[Adapter]:
    """All that there are, whether their libraries and devices are here or not."""
    every = tuple(DETERMINISTIC)
    ours = (*OURS, *OUR_BLOCKS)
    return [
        Adapter("exmy", "exmy", ours, peers.of_exmy, roundings=every, block_dtypes=("float32", "bfloat16", "float16")),
        *(Adapter(name, "exmy", ours, make, device="cuda", block_dtypes=("float32", "bfloat16", "float16"))
          for name, make in (("exmy-cuda", peers.of_exmy), ("exmy-cuda-compiled", peers.of_exmy_compiled))),
        *_of_torch(),
        Adapter("exmy-codes", "exmy", ours, peers.codes_of_exmy, gives="codes", roundings=every,
                block_dtypes=("float32", "bfloat16", "float16")),
        Adapter("ml_dtypes", "ml_dtypes", _floating("numpy"), peers.of_ml_dtypes, "array", OF_NUMPY),
        Adapter("gfloat", "gfloat", (*peers.OF_GFLOAT, *peers.P3109_FORMATS, *peers.MX_OF_GFLOAT), peers.of_gfloat, "array",
                OF_NUMPY, roundings=tuple(peers.GFLOAT_MODES), block_dtypes=BLOCKS_OF_NUMPY),
        *_of_pychop(),
        Adapter("qtorch", "qtorch", (*peers.OF_QTORCH, *peers.INTEGERS_OF_QTORCH, *peers.BLOCKS_OF_QTORCH), peers.of_qtorch,
                dtypes=("float32",)),
        *_of_torchao(),
        Adapter(CHECKOUT, CHECKOUT, (*peers.OF_MICROXCALING, *peers.MX_OF_MICROXCALING), peers.of_microxcaling,
                roundings=tuple(peers.MICROXCALING_MODES), block_dtypes=("float32", "bfloat16", "float16")),
        Adapter("transformer-engine", "transformer_engine", _of_transformer_engine(), peers.of_transformer_engine,
                device="cuda", block_dtypes=("float32", "bfloat16")),
    ]  # fmt: skip


def _of_transformer_engine() -> tuple[str, ...]:
    """MX and NVFP4 only where there is a Blackwell to make them."""
    blackwell = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (10, 0)
    return tuple(name for name in peers.OF_TRANSFORMER_ENGINE if blackwell or name.endswith("@tensor"))


def _of_torch() -> list[Adapter]:
    named = _floating("torch")
    return [
        Adapter("torch", "torch", named, peers.of_torch),
        Adapter("torch-compiled", "torch", named, peers.of_torch_compiled),
        Adapter("torch-cuda", "torch", named, peers.of_torch, device="cuda"),
        Adapter("torch-cuda-compiled", "torch", named, peers.of_torch_compiled, device="cuda"),
    ]


def _of_pychop() -> list[Adapter]:
    modes, elements = tuple(peers.PYCHOP_MODES), tuple(peers.OF_PYCHOP)
    blocks = tuple(peers.MX_OF_PYCHOP)
    return [
        Adapter("pychop", "pychop", elements, peers.of_pychop, roundings=modes),
        Adapter("pychop-numpy", "pychop", elements, peers.of_pychop, "array", OF_NUMPY, roundings=modes),
        Adapter("pychop-fault", "pychop", tuple(peers.OF_FAULTCHOP), peers.of_faultchop,
                dtypes=("float32", "float64"), roundings=modes[:4]),
        Adapter("pychop-p3109", "pychop", peers.P3109_FORMATS, peers.of_pychops_p3109, dtypes=("float32", "float64"),
                roundings=peers.P3109_MODES),
        Adapter("pychop-mx", "pychop", blocks, peers.of_pychop, "array", OF_NUMPY, block_dtypes=BLOCKS_OF_NUMPY),
    ]  # fmt: skip


def _of_torchao() -> list[Adapter]:
    """to_mx by each of its rules; it takes FP32 and BF16."""
    mx, fp8 = tuple(peers.MX_OF_TORCHAO), peers.FP8_OF_TORCHAO
    kernels = tuple(peers.KERNELS_OF_TORCHAO)
    single, both = ("float32",), ("float32", "bfloat16")
    codes = [("torchao", (*kernels, *mx, "nvfp4", *fp8))]
    codes += [(f"torchao-{rule}", tuple(f"{name}:{rule}" for name in mx)) for rule in ("ceil", "rceil", "even")]
    values = [
        ("torchao-values", (*mx, "nvfp4", *fp8), peers.of_torchao),
        ("torchao-training", fp8, peers.of_torchaos_training),
    ]
    return [
        *(Adapter(name, "torchao", formats, peers.codes_of_torchao, dtypes=single, gives="codes", block_dtypes=both)
          for name, formats in codes),
        *(Adapter(name, "torchao", formats, make, dtypes=single, block_dtypes=both) for name, formats, make in values),
        *(Adapter(f"{name}-cuda", "torchao", formats, make, dtypes=single, block_dtypes=both, device="cuda")
          for name, formats, make in values),
    ]  # fmt: skip


def _floating(whose: str) -> tuple[str, ...]:
    """The floating-point formats that have a dtype of their own in "torch" or in "numpy" with ml_dtypes, by custom's names."""
    named = []
    for key, row in DTYPES.items():
        if key in WIDE or key.startswith("int"):
            continue
        in_torch = bool(row.torch) and "x2" not in str(row.torch) and hasattr(torch, str(row.torch))
        if in_torch if whose == "torch" else bool(row.numpy) and not row.numpy_owns:
            named.append(NAMES.get(key, key))
    return tuple(named)


def _is_there(package: str) -> bool:
    if package == CHECKOUT:
        return bool(os.environ.get("MICROXCALING"))
    if package == OWN:
        return True
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _commit() -> str:
    """Of the checkout of microxcaling."""
    command = ["git", "-C", os.environ.get("MICROXCALING", ""), "rev-parse", "--short", "HEAD"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "checkout"
    return asked.stdout.strip()


def load_function(place: str) -> Quantizer:
    """The function at MODULE:FUNCTION. ValueError, with the reason, where there is none."""
    module, _, name = place.partition(":")
    try:
        found = import_module(module)
    except Exception as error:  # whatever importing somebody else's module does
        raise ValueError(
            f"{place}: {module} can't be imported ({type(error).__name__}: {error}){_meant(place)}"
        ) from None
    function: Any = found
    for part in name.split("."):
        function = getattr(function, part, None)
    if not callable(function):
        own = [key for key, value in vars(found).items() if callable(value)]
        raise ValueError(f"{place}: {module} has no function {name!r}{_near(name, own)}")
    loaded: Quantizer = function
    return loaded


def _near(name: str, others: Sequence[str]) -> str:
    """A hint at the name that was meant, if one is near."""
    found = difflib.get_close_matches(name, others, n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def _can_be_found(module: str) -> bool:
    """Whether there is a module of that name, whatever importing it does."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _meant(place: str) -> str:
    """What to write in place of a file's path."""
    module, _, name = place.partition(":")
    if "/" not in module and not module.endswith(".py"):
        if _can_be_found(module):
            return ""
        near = _near(module, [path.stem for path in Path().glob("*.py")])
        return f"; looked for in this folder, {Path.cwd()}, and among what is installed{near}"
    return f"; MODULE is a name, as after import: {Path(module).stem}:{name}, from the folder of {Path(module).stem}.py"


def fits(format_name: str, dtype: torch.dtype) -> bool:
    """Whether a tensor of the dtype holds the format of elements; never for one of blocks."""
    from formats.quantizer import check_carrier

    try:
        check_carrier(element_format(format_name), dtype)
    except ValueError:
        return False
    return True
