"""What a number format is: exact grids, rounding, encoding and quantisers."""

from typing import TYPE_CHECKING, Any

from formats.integers import IntegerFormat
from formats.lists import GridFormat, grid_format
from formats.names import element_format, float_format, get_format, list_formats
from formats.reference import round_exact
from formats.rounding import Overflow, Rounding
from formats.scaled import ScaledFormat, ScaleRule, scaled_format
from formats.spec import ElementFormat, FloatFormat, Format

if TYPE_CHECKING:
    from formats.bits import decode, encode, numpy_dtype, pack, torch_dtype, unpack, view_as_codes, view_as_values
    from formats.datasheets import compare, datasheet
    from formats.delayed import AmaxHistory, quantize_delayed
    from formats.factored import Factored, quantize_factored
    from formats.quantizer import FormatParameters, format_parameters, quantize
    from formats.scaled_codes import Scaled, decode_scaled, encode_scaled
    from formats.scaling import quantize_scaled, scales_of, tensor_amax

__all__ = [
    "AmaxHistory",
    "ElementFormat",
    "Factored",
    "FloatFormat",
    "Format",
    "FormatParameters",
    "GridFormat",
    "IntegerFormat",
    "Overflow",
    "Rounding",
    "ScaleRule",
    "Scaled",
    "ScaledFormat",
    "compare",
    "datasheet",
    "decode",
    "decode_scaled",
    "element_format",
    "encode",
    "encode_scaled",
    "float_format",
    "format_parameters",
    "get_format",
    "grid_format",
    "list_formats",
    "numpy_dtype",
    "pack",
    "quantize",
    "quantize_delayed",
    "quantize_factored",
    "quantize_scaled",
    "round_exact",
    "scaled_format",
    "scales_of",
    "tensor_amax",
    "torch_dtype",
    "unpack",
    "view_as_codes",
    "view_as_values",
]


def __getattr__(name: str) -> Any:
    """Import torch, or xarray, only when what needs it is asked for: describing a format does not."""
    from importlib import import_module

    later = {
        "datasheets": ("compare", "datasheet"),
        "bits": ("decode", "encode", "numpy_dtype", "pack", "torch_dtype", "unpack", "view_as_codes", "view_as_values"),
        "delayed": ("AmaxHistory", "quantize_delayed"),
        "factored": ("Factored", "quantize_factored"),
        "quantizer": ("FormatParameters", "format_parameters", "quantize"),
        "scaled_codes": ("Scaled", "decode_scaled", "encode_scaled"),
        "scaling": ("quantize_scaled", "scales_of", "tensor_amax"),
    }
    for module, names in later.items():
        if name in names:
            return getattr(import_module(f"formats.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
