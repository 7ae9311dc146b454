"""What a datasheet says of a format, and what two formats have and lack, as xarray datasets.

`exmy formats show` and `exmy formats compare` print the same facts; nothing there is known that is not here.
"""

from fractions import Fraction
from math import isinf, isnan
from typing import Any

import numpy as np
import xarray as xr

from formats.facts import facts, meaning, parts, written
from formats.names import as_element, element_format, get_format
from formats.scaled import ScaledFormat
from formats.spec import MAX_GRID_BITS, ElementFormat, FloatFormat, Format


def datasheet(f: Format | str) -> xr.Dataset:
    """Everything that there is to know of a format.

    Scalars, each with units and a description: bits, largest, lowest, smallest_positive, ulp_at_1, dynamic_range, finite_values;
    of a floating-point format exponent_bits, mantissa_bits, bias, emin, emax, smallest_normal too; of a scaled one
    scale_bits, elements_per_scale and bits_per_element. A number that float64 does not hold is NaN there, and its attribute
    `exact` writes it out. For up to 16 bits on the dimension `code`: kind, significand and exponent (value = significand *
    2^exponent, exact for every format), and value where float64 holds all of them.

    Attributes: name, canonical_name, kind, layout, specials, source, and confusable, one line a format that is easily taken for
    this one. Of a scaled format the numbers are the element's. ValueError for a name that means nothing.
    """
    described = get_format(f) if isinstance(f, str) else f
    element = described.element if isinstance(described, ScaledFormat) else described
    assert isinstance(element, ElementFormat)
    words, numbers = facts(described)
    return xr.Dataset({**{name: _scalar(*row) for name, row in numbers.items()}, **_codes(element)}, attrs=words)


def compare(a: ElementFormat | str, b: ElementFormat | str) -> xr.Dataset:
    """Which values one format has and the other lacks.

    Attributes: a, b, equal, a_holds_b, b_holds_a (0 or 1). For formats of up to 16 bits that float64 holds, on the dimension
    `value`, float64, every finite value of either, ascending: in_a and in_b, and code_a and code_b (-1 where it has none).
    ValueError for scaled formats.
    """
    first, second = as_element(a), as_element(b)
    attributes = {
        "a": first.name, "b": second.name, "equal": int(first == second),
        "a_holds_b": int(first.holds(second)), "b_holds_a": int(second.holds(first)),
    }  # fmt: skip
    if not (_is_listable(first) and _is_listable(second)):
        return xr.Dataset(attrs=attributes)
    grids = [f.grid() for f in (first, second)]
    union = np.union1d(*grids)
    data: dict[str, Any] = {}
    for label, f, grid in zip("ab", (first, second), grids, strict=True):
        code = np.full(len(union), -1, np.int64)
        code[np.searchsorted(union, grid)] = f.finite_codes
        data[f"code_{label}"] = (
            "value",
            code,
            {"long_name": f"code in {f.name}, -1 where it lacks the value", "units": "1"},
        )
        data[f"in_{label}"] = ("value", code >= 0, {"long_name": f"whether {f.name} has the value"})
    return xr.Dataset(data, {"value": ("value", union, {"long_name": "finite value", "units": "1"})}, attributes)


def _is_listable(f: ElementFormat) -> bool:
    return f.bits <= MAX_GRID_BITS and element_format("fp64").holds(f)


def _scalar(value: Any, units: str, long_name: str) -> tuple[tuple[()], Any, dict[str, str]]:
    attributes = {"units": units, "long_name": long_name}
    if isinstance(value, Fraction):
        attributes["exact"] = written(value)
        value = _held(value)
    return (), value, attributes


def _held(value: Fraction) -> float:
    """The same number in float64, or NaN where that does not hold it."""
    try:
        near = float(value)
    except OverflowError:
        return float("nan")
    return near if near == value else float("nan")


def _codes(f: ElementFormat) -> dict[str, Any]:
    """What each code stands for, up to 16 bits."""
    if f.bits > MAX_GRID_BITS:
        return {}
    codes = np.arange(1 << f.bits)
    meant = [meaning(f, int(code)) for code in codes]
    split = [parts(value) if isinstance(value, Fraction) else (_special(value), 0) for value in meant]
    kinds = [kind_of_value(f, value, exponent) for value, (_, exponent) in zip(meant, split, strict=True)]
    significands, exponents = (np.array(column) for column in zip(*split, strict=True))
    found: dict[str, Any] = {
        "code": ("code", codes, {"long_name": "code", "units": "1"}),
        "kind": ("code", np.array(kinds), {"long_name": "what the code stands for"}),
        "significand": (
            "code",
            significands,
            {"long_name": "value / 2^exponent", "units": "1"},
        ),
        "exponent": (
            "code",
            exponents,
            {"long_name": "floor(log2(|value|)); 0 for zero and specials", "units": "1"},
        ),
    }
    if element_format("fp64").holds(f):
        values = np.array([_special(value) if not isinstance(value, Fraction) else float(value) for value in meant])
        found["value"] = ("code", values, {"long_name": "value", "units": "1"})
    return found


def _special(value: Fraction | float | None) -> float:
    return float("nan") if value is None else float(value)


def kind_of_value(f: ElementFormat, value: Fraction | float | None, exponent: int) -> str:
    """normal, subnormal, zero, negative zero, infinity, NaN, value (of integers and lists) or unused."""
    if value is None:
        return "unused"
    if isinstance(value, float):
        return "NaN" if isnan(value) else "infinity" if isinf(value) else "negative zero"
    if not value:
        return "zero"
    if not isinstance(f, FloatFormat):
        return "value"
    return "subnormal" if f.subnormals and f.zero and exponent < f.emin else "normal"
