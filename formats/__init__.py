"""What a number format is: exact grids, rounding, encoding and quantisers."""

from typing import TYPE_CHECKING, Any

from formats.integers import IntegerFormat
from formats.lists import GridFormat, grid_format
from formats.names import element_format, float_format, get_format, list_formats
from formats.reference import round_exact
from formats.rounding import Overflow, Rounding
from formats.spec import ElementFormat, FloatFormat, Format

if TYPE_CHECKING:
    from formats.quantizer import FormatParameters, format_parameters, quantize

__all__ = [
    "ElementFormat",
    "FloatFormat",
    "Format",
    "FormatParameters",
    "GridFormat",
    "IntegerFormat",
    "Overflow",
    "Rounding",
    "element_format",
    "float_format",
    "format_parameters",
    "get_format",
    "grid_format",
    "list_formats",
    "quantize",
    "round_exact",
]


def __getattr__(name: str) -> Any:
    """Import the tensor side, and with it torch, only when it is asked for: describing a format does not need it."""
    if name in {"FormatParameters", "format_parameters", "quantize"}:
        from formats import quantizer

        return getattr(quantizer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
