"""Codes of tensors and back, in the carrier's own integers, on any device and within compiled programs.

`encode` rounds with `quantize`; what is on the grid then has its code in its bits. With a the pattern of |q| in the carrier,
FP32 or FP64, of m mantissa bits, and k the carrier's exponent field of 2^emin:

    normal      (a >> m - M) - (k - 1 << M): fields ascend together, so the exponents differ by a constant.
    subnormal   |q| / quantum, read off the sum |q| + 2^m quanta, which is exact and whose low bits count quanta. Where emin
                is the carrier's own, its subnormals are the format's and the first line does for both.
    deep        where emin is below the carrier's: the carrier's subnormals are taken apart as in `formats.bitwise`, as
                integers.
    integer     q 2^F in two's complement.
    list        the place of q among the values, by bisection, and that place's code.

Then infinity, NaN and the sign. `decode` looks up to 16 bits up in a table; wider codes become the bits of FP32 or FP64.

The host does not look at a tensor's elements. So what an array would be refused for has a meaning here: NaN into a format
without one becomes the largest value, which OCP MX v1.0, 5.3, leaves to the implementation, and which is what NVIDIA's
conversions to FP6 and FP4 make of it (PTX ISA, cvt with .satfinite: positive MAX_NORM); bits of a code above the format's are
ignored, as by ml_dtypes; a code that stands for nothing decodes to NaN.
"""

from fractions import Fraction
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from formats import bitwise, codes
from formats.bitwise import FP32, FP64, Carrier, pattern
from formats.compile_time import assume_constant_result
from formats.integers import IntegerFormat
from formats.lists import GridFormat
from formats.names import element_format, float_format
from formats.quantizer import CARRIERS, check_carrier, quantize
from formats.rounding import DEFAULT_RANDOM_BITS, Overflow, Rounding
from formats.spec import ElementFormat, FloatFormat

CODES = {8: torch.uint8, 16: torch.uint16, 32: torch.int32, 64: torch.int64}
"""Dtype of codes of so many bits, at most. torch can do little with uint32 and uint64: there it is their two's complement."""
TABLE_BITS = 16


class Layout(NamedTuple):
    """What a format's codes need to be read off a carrier's bits, and written: numbers that the compiler folds in.

    drop: m - M. first: what to subtract from a >> drop. subnormals_below: the pattern under which quanta are counted; 0
    where there are none of the format's own. quantum: of them. fixed_drop: for deep formats, the bits that their subnormals
    drop from the carrier's fixed-point ones; None for others. zero_below: the pattern of the smallest value of a format with
    zero and without subnormals, else 0.
    """

    drop: int
    first: int
    subnormals_below: int
    quantum: float
    fixed_drop: int | None
    zero_below: int
    bits: int
    signed: bool
    inf_code: int
    nan_code: int


def encode_tensor(
    x: Tensor,
    name: str,
    rounding: str = Rounding.NEAREST_EVEN,
    overflow: str = Overflow.SATURATE,
    *,
    seed: int | Tensor | None = None,
    random_bits: Tensor | None = None,
    stochastic_bits: int = DEFAULT_RANDOM_BITS,
) -> Tensor:
    """Codes of x, float64, float32, bfloat16 or float16, in the element format of that canonical name: see `formats.encode`."""
    kind, bits, wide = _question(x.dtype, name)
    carrier = FP64 if wide else FP32
    q = quantize(
        x.detach().to(carrier.dtype), name, rounding, overflow,
        seed=seed, random_bits=random_bits, stochastic_bits=stochastic_bits,
    )  # fmt: skip
    if kind == "list":
        found = _list_codes(q, name, x.device)
    elif kind == "integer":
        found = _integer_codes(q, *_integer_layout(name))
    else:
        found = _float_codes(q, _layout(name, carrier.bits), carrier)
    return found.to(CODES[_width(bits)])


def _float_codes(q: Tensor, p: Layout, carrier: Carrier) -> Tensor:
    bits = q.view(carrier.integer)
    a = bits & carrier.magnitude
    if p.fixed_drop is not None:
        one, lowest_exponent = 1 << carrier.mantissa, carrier.mantissa - carrier.emin
        a_wide = torch.where(a < one, a.to(carrier.dtype).view(carrier.integer) - lowest_exponent * one, a)
        code = (a_wide >> p.drop) - p.first
        if p.subnormals_below:
            code = torch.where(a < p.subnormals_below, a >> p.fixed_drop, code)
    else:
        code = (a >> p.drop) - p.first
        if p.subnormals_below:
            c = p.quantum * 2.0**carrier.mantissa
            quanta = (a.view(carrier.dtype) + c).view(carrier.integer) & ((1 << carrier.mantissa) - 1)
            code = torch.where(a < p.subnormals_below, quanta, code)
    if p.zero_below:
        code = torch.where(a < p.zero_below, 0, code)
    if p.inf_code >= 0:
        code = torch.where(a == carrier.infinity, p.inf_code, code)
    if p.signed:
        # The quantiser left no -0 where the format has none.
        code = code | torch.where(bits < 0, _bit(p.bits - 1, carrier), 0).to(carrier.integer)
    return torch.where(a > carrier.infinity, p.nan_code, code)


def _bit(place: int, carrier: Carrier) -> int:
    """2^place as the carrier's signed integer has it."""
    return -(1 << place) if place == carrier.bits - 1 else 1 << place


def _integer_codes(q: Tensor, scale: float, mask: int, nan_code: int) -> Tensor:
    integer = torch.where(q.isnan(), 0.0, q * scale).to(torch.int32) & mask
    return torch.where(q.isnan(), nan_code, integer)


def _list_codes(q: Tensor, name: str, device: torch.device) -> Tensor:
    values, found, nan_code = _list_layout(name, q.dtype == torch.float64, device)
    place = torch.bucketize(q, values)
    return torch.where(q.isnan(), nan_code, found[torch.clamp(place, max=len(values) - 1)])


def decode_tensor(code: Tensor, name: str, dtype: torch.dtype | None = None) -> Tensor:
    """Values of integer codes in the element format of that name, in a dtype that holds them: see `formats.decode`."""
    kind, bits, wide = _decoding(code.dtype, name, dtype)
    if kind == "table":
        out = dtype or (torch.float64 if wide else torch.float32)
        mask = (1 << bits) - 1
        values: Tensor = _table(name, out, code.device)
        return values[code.to(torch.int32) & mask]
    if not wide and _is_fp32_cut_short(name):
        value = _widened(code.to(torch.int32), _layout(name, FP32.bits), FP32)
        return value.to(dtype or torch.float32)
    value = _composed(code.to(torch.int64), _layout(name, FP64.bits), _largest(name))
    return value.to(dtype or (torch.float64 if wide else torch.float32))


def _widened(code: Tensor, p: Layout, carrier: Carrier) -> Tensor:
    """Of a format with the carrier's exponents: its bits with zeros below, infinity and NaN included."""
    sign = torch.where((code >> (p.bits - 1)) & 1 == 1, _bit(carrier.bits - 1, carrier), 0).to(carrier.integer)
    magnitude = code & ((1 << (p.bits - 1)) - 1)
    return ((magnitude << p.drop) | sign).view(carrier.dtype)


def _composed(code: Tensor, p: Layout, max_code: int) -> Tensor:
    """By way of FP64, to which all of these are normal numbers, or its own format."""
    negative = (code >> (p.bits - 1)) & 1 == 1
    magnitude = code & ((1 << (p.bits - 1)) - 1)
    pattern64 = (magnitude + p.first) << p.drop
    value = pattern64.view(torch.float64)
    if p.subnormals_below:
        least_normal = (p.subnormals_below >> p.drop) - p.first
        value = torch.where(magnitude < least_normal, magnitude.to(torch.float64) * p.quantum, value)
    if p.zero_below:
        value = torch.where(magnitude == 0, 0.0, value)
    value = torch.where(magnitude > max_code, torch.nan, value)
    if p.inf_code >= 0:
        value = torch.where(magnitude == p.inf_code, torch.inf, value)
    value = torch.where(negative, -value, value)
    nan_at_minus_zero = p.nan_code == 1 << (p.bits - 1)
    return torch.where(negative & (magnitude == 0), torch.nan, value) if nan_at_minus_zero else value


def _width(bits: int) -> int:
    return next(width for width in CODES if bits <= width)


def dtype_name(dtype: torch.dtype) -> str:
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


# The compiler runs the decorated ones itself and folds in what they return, as in `formats.quantizer`.
@assume_constant_result
def _question(dtype: torch.dtype, name: str) -> tuple[str, int, bool]:
    """The kind of format, its bits, and whether FP64 is to carry it; ValueError where nothing here does."""
    f = element_format(name)
    if dtype not in CARRIERS:
        raise ValueError(f"x must be float64, float32, bfloat16 or float16, got {dtype_name(dtype)}; convert it")
    wide = dtype == torch.float64 or not _carried(f)
    if wide:
        check_carrier(f, torch.float64)
    return _kind(f), f.bits, wide


@assume_constant_result
def bits_of(name: str) -> int:
    """The bits of the element format of that name."""
    return element_format(name).bits


def _kind(f: ElementFormat) -> str:
    return "list" if isinstance(f, GridFormat) else "integer" if isinstance(f, IntegerFormat) else "float"


@cache
def _carried(f: ElementFormat) -> bool:
    """Whether FP32 holds the format and shows its codes by the steps above."""
    return float_format("fp32").holds(f) and (isinstance(f, GridFormat) or bitwise.fits(f, FP32))


@assume_constant_result
def _layout(name: str, width: int) -> Layout:
    return layout(float_format(name), FP32 if width == FP32.bits else FP64)


@cache
def layout(f: FloatFormat, carrier: Carrier) -> Layout:
    """The layout of a floating-point format's codes in a carrier that it fits."""
    gradual = f.subnormals and f.zero
    deep = f.emin < carrier.emin
    quantum = Fraction(2) ** (f.emin - f.mantissa_bits)
    own_subnormals = gradual and f.emin > carrier.emin
    code = -1 if f.inf_code is None else f.inf_code
    return Layout(
        drop=carrier.mantissa - f.mantissa_bits,
        first=(f.emin - carrier.emin + 1 - gradual) << f.mantissa_bits,
        subnormals_below=pattern(Fraction(2) ** f.emin, carrier) if own_subnormals or (deep and gradual) else 0,
        quantum=float(quantum) if own_subnormals else 1.0,
        fixed_drop=max(0, f.emin - f.mantissa_bits - (carrier.emin - carrier.mantissa)) if deep else None,
        zero_below=pattern(f.smallest, carrier) if f.zero and not gradual else 0,
        bits=f.bits,
        signed=f.signed,
        inf_code=code,
        nan_code=f.max_code if f.nan_code is None else f.nan_code,
    )


@assume_constant_result
def _largest(name: str) -> int:
    return float_format(name).max_code


@assume_constant_result
def _integer_layout(name: str) -> tuple[float, int, int]:
    f = element_format(name)
    assert isinstance(f, IntegerFormat)
    return 2.0**f.fraction_bits, (1 << f.bits) - 1, (1 << (f.bits - 1)) - 1


@assume_constant_result
def _list_layout(name: str, is_double: bool, device: torch.device) -> tuple[Tensor, Tensor, int]:
    return _made_list_layout(name, is_double, device)


@cache
def _made_list_layout(name: str, is_double: bool, device: torch.device) -> tuple[Tensor, Tensor, int]:
    f = element_format(name)
    values = torch.from_numpy(f.grid()).to(device, torch.float64 if is_double else torch.float32)
    found = torch.from_numpy(f.finite_codes.astype(np.int32)).to(device)
    return values, found, int(f.finite_codes[-1]) if f.nan_code is None else f.nan_code


@assume_constant_result
def _decoding(code_dtype: torch.dtype, name: str, dtype: torch.dtype | None) -> tuple[str, int, bool]:
    """How codes are decoded, their bits, and whether FP32 does not hold their values."""
    f = element_format(name)
    if code_dtype.is_floating_point or code_dtype.is_complex or code_dtype == torch.bool:
        raise ValueError(f"codes must be integers, got {dtype_name(code_dtype)}; view_as_codes reads other dtypes")
    if code_dtype.itemsize * 8 < f.bits:
        raise ValueError(f"{f.name} has {f.bits} bits, and {dtype_name(code_dtype)} does not hold its codes")
    wide = not float_format("fp32").holds(f)
    if dtype is None:
        check_carrier(f, torch.float64 if wide else torch.float32)
    elif dtype in CARRIERS:
        check_carrier(f, dtype)
    else:
        raise ValueError(f"dtype must be float64, float32, bfloat16 or float16, got {dtype_name(dtype)}")
    return "table" if f.bits <= TABLE_BITS else "bits", f.bits, wide


@assume_constant_result
def _is_fp32_cut_short(name: str) -> bool:
    f = float_format(name)
    return f.specials == "ieee" and f.subnormals and (f.exponent_bits, f.bias) == (8, 127)


@assume_constant_result
def _table(name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    return _made_table(name, dtype, device)


@cache
def _made_table(name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.from_numpy(codes.table(element_format(name)).copy()).to(device, dtype)
