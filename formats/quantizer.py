"""Rounding whole tensors to a format: a dozen bit operations an element, which torch.compile fuses into one pass.

With x in FP32 (BF16 and FP16 travel through it, exactly), a = |x| as an integer, and s = 23 - M the bits to drop:

    1. clamp      a <- min(a, bits of the largest value). That value is on the grid and rounding is monotone, so
                  clamping first saturates, inf included, and no later sum can overflow, at the top of E = 8 either.
    2. normal     (a + 2^(s-1) - 1 + lsb) & -2^s, lsb the lowest kept bit: a tie carries only if that bit is 1. A carry
                  out of the mantissa lands in the exponent, which is the next binade: codes ascend with values.
    3. subnormal  (|x| + c) - c with c = 2^23 quanta, a quantum being 2^(emin - M): the sum lies in [c, 2c), where
                  FP32's own spacing is one quantum, so the hardware rounds to nearest even and the difference is exact.
    4. sign, NaN  put back.

Why the corners hold:

    M = 0   the lowest kept bit is FP32's exponent's; its bias 127 and ours, 2^(E-1) - 1, are both odd, so it has the
            parity of our code (E = 1 has bias 0, but one binade only, whose one normal value needs no rounding).
    M = 23  nothing to drop: a >> 31, which is 0, stands in for lsb, and 0 for 2^(s-1) - 1.
    E = 8   its subnormals are FP32's own, equally spaced integers in a, so step 2 covers them and step 3 never applies.
    E <= 7  a quantum is at least 2^-85, so whatever is subnormal in FP32 rounds to zero, and step 3 yields no FP32
            subnormals: with the line above, flush-to-zero modes of the hardware change nothing.

No division, no logarithm, no product that rounds: compiled or not, on CPU and GPU, the bits are the same.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from formats.names import as_format, get_format
from formats.rounding import Overflow, Rounding, check_modes
from formats.spec import FloatFormat

FP32_MANTISSA = 23
MAGNITUDE = 0x7FFFFFFF
INFINITY = 0x7F800000
CARRIERS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class FormatParameters(NamedTuple):
    """What step 1 to 3 need of a format, as tensors that broadcast against x; made by `format_parameters`.

    All are int32 patterns of FP32 numbers or masks of them, except quantum, whose dtype is the narrowest x that was promised.
    """

    max_bits: Tensor
    lsb_shift: Tensor
    half_less_one: Tensor
    keep_mask: Tensor
    subnormals_below: Tensor
    quantum: Tensor


class _Constants(NamedTuple):
    """The same for one format, as numbers that the compiler folds into the program."""

    max_bits: int
    lsb_shift: int
    half_less_one: int
    keep_mask: int
    subnormals_below: int
    quantum: float


def quantize(
    x: Tensor,
    f: FloatFormat | str | FormatParameters,
    rounding: str = Rounding.NEAREST_EVEN,
    overflow: str = Overflow.SATURATE,
) -> Tensor:
    """Round every element of x to the format; same shape and dtype (IEEE 754-2019 4.3; saturating as OCP OFP8).

    x: float32, bfloat16 or float16, any shape. f: a format, its name, or `format_parameters` that broadcast against
    x, so that one program serves a format a run. inf gives the largest value; -0 stays -0; NaN stays the NaN it is,
    bit for bit in FP32, even where the format has none (a tensor can hold it, and to refuse it the host would have to
    look at every element).

    The result carries no gradient: wrap it, straight through or otherwise, where one is wanted. ValueError for
    another dtype, or one that does not hold the format's values, before any work.
    """
    mode = _mode(rounding, overflow)
    if isinstance(f, FormatParameters):
        _check_parameters(f, x.dtype)
        parameters: FormatParameters | _Constants = f
    else:
        parameters = _constants(x.dtype, f if isinstance(f, str) else f.canonical_name)
    x = x.detach()
    return _quantize_fp32(x.to(torch.float32), parameters, mode).to(x.dtype)


def format_parameters(
    formats: Sequence[FloatFormat | str],
    ndim: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> FormatParameters:
    """Parameters of R formats for an x of `ndim` dimensions whose first axis is theirs: every field [R, 1, ..., 1].

    `dtype` is that of the tensors to come (FP32 ones are always welcome). ValueError if it does not hold one of the formats.
    """
    described = [as_format(f) for f in formats]
    for f in described:
        check_carrier(f, dtype)
    rows = [_derive(f) for f in described]
    shape = (len(rows),) + (1,) * (ndim - 1)

    def column(field: str, kind: torch.dtype) -> Tensor:
        return torch.tensor([getattr(row, field) for row in rows], dtype=kind, device=device).reshape(shape)

    integers = {field: column(field, torch.int32) for field in _Constants._fields if field != "quantum"}
    return FormatParameters(**integers, quantum=column("quantum", dtype))


def check_carrier(f: FloatFormat, dtype: torch.dtype) -> None:
    """ValueError unless dtype is one of FP32, BF16 and FP16 and holds every value of the format."""
    if dtype not in CARRIERS:
        raise ValueError(f"x must be float32, bfloat16 or float16, got {_name(dtype)}; convert it, or use encode")
    fitting = [_name(carrier) for carrier, name in CARRIERS.items() if get_format(name).holds(f)]
    if _name(dtype) not in fitting:
        mend = f"use {' or '.join(fitting)}" if fitting else "no dtype here does, so round arrays with encode"
        raise ValueError(f"{f.name} does not fit {_name(dtype)}, which can't hold all of its values; {mend}")


def _check_parameters(p: FormatParameters, dtype: torch.dtype) -> None:
    made_for = p.quantum.dtype
    if dtype not in (torch.float32, made_for):
        raise ValueError(
            f"parameters made for {_name(made_for)} got an x of {_name(dtype)}; give format_parameters its dtype"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# The compiler runs the next two itself and folds in what they return, guarding on their arguments. So a format comes by
# name: its numbers would become symbols once they change, and the program would no longer be one of constants.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _mode(rounding: str, overflow: str) -> str:
    return str(check_modes(rounding, overflow)[0])


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _constants(dtype: torch.dtype, name: str) -> _Constants:
    f = get_format(name)
    check_carrier(f, dtype)
    return _derive(f)


@cache
def _derive(f: FloatFormat) -> _Constants:
    drop = FP32_MANTISSA - f.mantissa_bits
    has_own_subnormals = f.emin > get_format("fp32").emin
    return _Constants(
        max_bits=_pattern(f.max),
        lsb_shift=drop if drop else 31,
        half_less_one=(1 << drop >> 1) - 1 if drop else 0,
        keep_mask=-(1 << drop),
        subnormals_below=_pattern(f.smallest_normal) if has_own_subnormals else 0,
        # Where step 3 never applies any number would do, but products with FP32 subnormals slow a CPU down fourfold.
        quantum=f.smallest_subnormal if has_own_subnormals else 1.0,
    )


def _pattern(value: float) -> int:
    """The bits of a number that FP32 holds."""
    return int(get_format("fp32").encode(value))


def _quantize_fp32(x: Tensor, p: FormatParameters | _Constants, mode: str) -> Tensor:
    bits = x.view(torch.int32)
    magnitude = bits & MAGNITUDE
    a = torch.clamp(magnitude, max=p.max_bits)
    carry = p.half_less_one + ((a >> p.lsb_shift) & 1) if mode == Rounding.NEAREST_EVEN else 0
    rounded = torch.where(a < p.subnormals_below, _round_subnormal(a, p, mode), (a + carry) & p.keep_mask)
    signed = rounded | (bits & ~MAGNITUDE)
    return torch.where(magnitude > INFINITY, bits, signed).view(torch.float32)


def _round_subnormal(a: Tensor, p: FormatParameters | _Constants, mode: str) -> Tensor:
    magnitude = a.view(torch.float32)
    quantum = p.quantum.to(torch.float32) if isinstance(p, FormatParameters) else p.quantum
    c = quantum * 2.0**FP32_MANTISSA
    rounded = (magnitude + c) - c
    if mode == Rounding.TOWARD_ZERO:
        # Nearest went up: the neighbour below is one quantum less, exactly.
        rounded = torch.where(rounded > magnitude, rounded - quantum, rounded)
    return rounded.view(torch.int32)
