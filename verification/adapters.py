"""Other people's casts, each in the few lines that it takes to put one before `verify`.

An adapter is a name, the formats that it has, and for each a function from a tensor or array of values to one of values. To judge
a library that is not here, write the same for it, or give its function to `exmy verify` as MODULE:FUNCTION.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch

from formats import element_format, numpy_dtype, quantize, torch_dtype
from formats.bits import DTYPES
from formats.rounding import Rounding

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
GFLOAT = {
    "e4m3fn": "ocp_e4m3", "e5m2": "ocp_e5m2", "e2m1fn": "ocp_e2m1", "e2m3fn": "ocp_e2m3", "e3m2fn": "ocp_e3m2",
    "e8m0fnu": "ocp_e8m0", "int8q6": "ocp_int8", "fp16": "binary16", "bf16": "bfloat16",
}  # fmt: skip


class Adapter(NamedTuple):
    """A library. make(format) is its quantiser, which takes tensors or arrays and gives values; dtypes: those it can be given."""

    name: str
    package: str
    formats: tuple[str, ...]
    make: Callable[[str], Callable[[Any], Any]]
    takes: str = "tensor"
    dtypes: tuple[str, ...] = ("float32", "float64", "bfloat16", "float16")

    @property
    def version(self) -> str:
        """Of the package that is installed."""
        return version(self.package)


def _ours(name: str) -> Callable[[Any], Any]:
    return lambda x: quantize(x, name, Rounding.NEAREST_EVEN)


def _torchs(name: str) -> Callable[[Any], Any]:
    dtype = torch_dtype(name)
    return lambda x: x.to(dtype).to(x.dtype)


def _compiled(name: str) -> Callable[[Any], Any]:
    dtype = torch_dtype(name)
    torch._dynamo.reset()
    return torch.compile(lambda x: x.to(dtype).to(x.dtype), dynamic=True)


def _on_cuda(name: str) -> Callable[[Any], Any]:
    dtype = torch_dtype(name)
    return lambda x: x.cuda().to(dtype).to(x.dtype).cpu()


def _ml_dtypes(name: str) -> Callable[[Any], Any]:
    dtype = numpy_dtype(name)
    return lambda x: x.astype(dtype).astype(x.dtype)


def _gfloats(name: str) -> Callable[[Any], Any]:
    gfloat = import_module("gfloat")
    info = getattr(import_module("gfloat.formats"), f"format_info_{GFLOAT[name]}")
    f = element_format(name)
    saturates = not (f.has_inf or f.has_nan)  # it raises where an infinity has nowhere to go
    return lambda x: gfloat.round_ndarray(info, x.astype("float64"), sat=saturates)


def adapters() -> dict[str, Adapter]:
    """Those whose libraries are installed, by name; ours is "exmy"."""
    floating = [key for key in DTYPES if key not in WIDE and not key.startswith("int")]
    of_torch = tuple(
        NAMES.get(key, key)
        for key in floating
        if (named := DTYPES[key].torch) and "x2" not in named and hasattr(torch, named)
    )
    of_numpy = tuple(NAMES.get(key, key) for key in floating if DTYPES[key].numpy and not DTYPES[key].numpy_owns)
    found = [
        Adapter("exmy", "exmy", OURS, _ours),
        Adapter("torch", "torch", of_torch, _torchs),
        Adapter("torch-compiled", "torch", of_torch, _compiled),
        Adapter("ml_dtypes", "ml_dtypes", of_numpy, _ml_dtypes, "array", ("float32", "float64", "float16")),
        Adapter("gfloat", "gfloat", tuple(GFLOAT), _gfloats, "array", ("float32", "float64", "float16")),
    ]
    if torch.cuda.is_available():
        found.append(Adapter("torch-cuda", "torch", of_torch, _on_cuda))
    return {adapter.name: adapter for adapter in found if _is_there(adapter.package)}


def _is_there(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def load_function(place: str) -> Callable[[Any], Any]:
    """The function at MODULE:FUNCTION. ValueError, with the reason, where there is none."""
    module, _, name = place.partition(":")
    try:
        found = import_module(module)
    except Exception as error:  # whatever importing somebody else's module does
        raise ValueError(f"{place}: {module} can't be imported ({type(error).__name__}: {error})") from None
    function: Any = found
    for part in name.split("."):
        function = getattr(function, part, None)
    if not callable(function):
        raise ValueError(f"{place}: {module} has no function {name!r}")
    loaded: Callable[[Any], Any] = function
    return loaded


def fits(format_name: str, dtype: torch.dtype) -> bool:
    """Whether a tensor of the dtype holds the format."""
    from formats.quantizer import check_carrier

    try:
        check_carrier(element_format(format_name), dtype)
    except ValueError:
        return False
    return True
