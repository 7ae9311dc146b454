"""Rounding whole tensors to a format: a dozen bit operations an element, which torch.compile fuses into one pass.

`formats.bitwise` has the steps and why they are right. BF16 and FP16 travel through FP32, exactly; FP64 is rounded from its own
bits, never by way of FP32. FP32 goes through FP64, exactly, in the rare cases that FP32's own steps do not cover: more than 23
random bits, formats with bits below FP32's smallest normal number but a larger emin. Lists of values have
`formats.list_quantizer`; formats with scales `formats.scaling`.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from formats import bitwise
from formats.bitwise import FP32, FP64, Carrier, Constants, Parameters
from formats.compile_time import assume_constant_result
from formats.lists import GridFormat, made_list
from formats.names import as_element, element_format, float_format, get_format
from formats.random_bits import random_bits as make_random_bits
from formats.rounding import DEFAULT_RANDOM_BITS, Overflow, Rounding, check_modes, check_overflow, check_random_bits
from formats.spec import ElementFormat, FloatFormat, Format

CARRIERS = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class FormatParameters(NamedTuple):
    """What the steps need of each format of a batch, as tensors that broadcast against x; made by `format_parameters`.

    All are int32 patterns of FP32 numbers or masks of them, except quantum, whose dtype is the narrowest x that was promised.
    """

    max_bits: Tensor
    lsb_shift: Tensor
    half_less_one: Tensor
    keep_mask: Tensor
    subnormals_below: Tensor
    quantum: Tensor


def quantize(
    x: Tensor,
    f: Format | str | FormatParameters,
    rounding: str = Rounding.NEAREST_EVEN,
    overflow: str = Overflow.SATURATE,
    *,
    seed: int | Tensor | None = None,
    random_bits: Tensor | None = None,
    stochastic_bits: int = DEFAULT_RANDOM_BITS,
) -> Tensor:
    """Round every element of x to the format, once; same shape and dtype (IEEE 754-2019 4.3; OCP OFP8; P3109 4.0, 4.7).

    x: float64, float32, bfloat16 or float16, any shape. f: a format, its name, or `format_parameters` that broadcast against
    x, so that one program serves a format a run; a scaled format is applied along the last axis (`quantize_scaled` says the
    rest). -0 stays -0 where the format has it; NaN stays the NaN it is, bit for bit in FP32, even where the format has none
    (a tensor can hold it, and to refuse it the host would have to look at every element).

    Stochastic modes take N = `stochastic_bits` random bits an element, 1..32, from `random_bits`, integers in 0..2^N - 1 that
    broadcast against x (int32, or int64 for N = 32), or from `seed`, an int or one a run, [R]: then they are
    `formats.random_bits` of the seed and of the element's index within its run.

    The result carries no gradient: wrap it, straight through or otherwise, where one is wanted. ValueError for another dtype, or
    one that does not hold the format's values, for overflow='nonsaturating' where the format has neither inf nor NaN, and
    for missing random bits, before any work.
    """
    if isinstance(f, FormatParameters):
        mode = _mode(rounding, overflow, stochastic_bits)
        _check_parameters(f, x.dtype)
        parameters = bitwise.parameters_alone(Parameters(*f))
        beyond, carrier = bitwise.SATURATED, FP32
    else:
        name = f if isinstance(f, str) else f.canonical_name
        kind = _kind(name)
        if kind == "scaled":
            from formats.scaling import quantize_scaled

            return quantize_scaled(
                x, name, rounding=rounding, overflow=overflow,
                seed=seed, random_bits=random_bits, stochastic_bits=stochastic_bits,
            )  # fmt: skip
        if kind == "list":
            from formats.list_quantizer import quantize_to_list

            random = _random(x, _plain_mode(rounding), seed, random_bits, stochastic_bits)
            return quantize_to_list(x.detach(), name, rounding, overflow, random, stochastic_bits)
        mode, carrier = _question(x.dtype, name, rounding, overflow, stochastic_bits), FP32
        if _needs_fp64(x.dtype, name, rounding, stochastic_bits):
            carrier = FP64
        parameters = _constants(name, carrier.bits)
        beyond = _beyond(name, rounding, overflow)
    random = _random(x, mode, seed, random_bits, stochastic_bits)
    wide = x.detach().to(carrier.dtype)
    if random is not None:
        random = random.to(carrier.integer)
    return bitwise.round_bits(wide, carrier, parameters, mode, beyond, random, stochastic_bits).to(x.dtype)


def format_parameters(
    formats: Sequence[FloatFormat | str],
    ndim: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> FormatParameters:
    """Parameters of R formats for an x of `ndim` dimensions whose first axis is theirs: every field [R, 1, ..., 1].

    `dtype` is that of the tensors to come (FP32 ones are always welcome). ValueError if it does not hold one of the formats,
    and for formats that differ in more than their parameters: those without -0, without subnormals or sign, integers, lists.
    """
    described = [as_element(f) for f in formats]
    for f in described:
        check_carrier(f, dtype)
        if dtype == torch.float64 or not (isinstance(f, FloatFormat) and f.shares_programs):
            raise ValueError(
                f"{f.name} can't share a program with other formats in {_name(dtype)}: that takes signed floating-point formats "
                "with -0 and gradual underflow, in float32 or narrower; quantize to it by name"
            )
    rows = [bitwise.constants(f, FP32) for f in described]
    shape = (len(rows),) + (1,) * (ndim - 1)

    def column(field: str, kind: torch.dtype) -> Tensor:
        return torch.tensor([getattr(row, field) for row in rows], dtype=kind, device=device).reshape(shape)

    integers = {field: column(field, torch.int32) for field in FormatParameters._fields if field != "quantum"}
    return FormatParameters(**integers, quantum=column("quantum", dtype))


@cache
def _holds(dtype: torch.dtype, f: ElementFormat) -> bool:
    return float_format(CARRIERS[dtype]).holds(f)


def check_carrier(f: ElementFormat, dtype: torch.dtype) -> None:
    """ValueError unless dtype is one of FP64, FP32, BF16 and FP16 and holds every value of the format."""
    if dtype not in CARRIERS:
        raise ValueError(
            f"x must be float64, float32, bfloat16 or float16, got {_name(dtype)}; convert it, or use encode"
        )
    if not _holds(dtype, f):
        fitting = [_name(carrier) for carrier in CARRIERS if _holds(carrier, f)]
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


# The compiler runs the decorated ones itself and folds in what they return, guarding on their arguments. So a format comes by
# name: its numbers would become symbols once they change, and the program would no longer be one of constants.
@assume_constant_result
def _mode(rounding: str, overflow: str, stochastic_bits: int) -> str:
    mode = _checked_mode("a batch of formats", True, True, rounding, overflow, stochastic_bits)
    if overflow != Overflow.SATURATE:
        raise ValueError(f"a batch of formats saturates: overflow must be saturate, got {overflow!r}")
    most = _most_random_bits(mode, FP32)
    if mode.startswith("stochastic") and stochastic_bits > most:
        raise ValueError(f"a batch of formats takes stochastic_bits of at most {most}, got {stochastic_bits}")
    return mode


def _checked_mode(name: str, has_inf: bool, has_nan: bool, rounding: str, overflow: str, stochastic_bits: int) -> str:
    mode, over = check_modes(rounding, overflow)
    check_overflow(name, has_inf, has_nan, over)
    check_random_bits(stochastic_bits)
    return mode.value


@assume_constant_result
def _kind(name: str) -> str:
    f = made_list(name) or get_format(name)
    return "list" if isinstance(f, GridFormat) else "element" if isinstance(f, ElementFormat) else "scaled"


@assume_constant_result
def _plain_mode(rounding: str) -> str:
    return check_modes(rounding, Overflow.SATURATE)[0].value


@assume_constant_result
def _question(dtype: torch.dtype, name: str, rounding: str, overflow: str, stochastic_bits: int) -> str:
    f = element_format(name)
    mode = _checked_mode(f.name, f.has_inf, f.has_nan, rounding, overflow, stochastic_bits)
    check_carrier(f, dtype)
    return mode


@assume_constant_result
def _needs_fp64(dtype: torch.dtype, name: str, rounding: str, stochastic_bits: int) -> bool:
    f = element_format(name)
    mode, _ = check_modes(rounding, Overflow.SATURATE)
    if dtype == torch.float64 or not bitwise.fits(f, FP32):
        return True
    if not mode.is_stochastic:
        return False
    lone = isinstance(f, FloatFormat) and f.zero and not f.subnormals
    return lone or stochastic_bits > _most_random_bits(mode, FP32)


@assume_constant_result
def _constants(name: str, width: int) -> Constants:
    return bitwise.constants(element_format(name), FP32 if width == FP32.bits else FP64)


@assume_constant_result
def _beyond(name: str, rounding: str, overflow: str) -> bitwise.Beyond:
    return bitwise.outcomes(element_format(name), *check_modes(rounding, overflow))


def _most_random_bits(mode: str, carrier: Carrier) -> int:
    return carrier.mantissa - (mode == Rounding.STOCHASTIC_B)


def _random(
    x: Tensor, mode: str, seed: int | Tensor | None, random_bits: Tensor | None, stochastic_bits: int
) -> Tensor | None:
    """The random numbers for x, of any integer dtype that holds them; None where the mode takes none."""
    if not mode.startswith("stochastic"):
        return None
    if random_bits is not None:
        if random_bits.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"random_bits must be int32 or int64, got {_name(random_bits.dtype)}")
        return random_bits
    if seed is None:
        raise ValueError(
            f"{mode} needs a seed, or random_bits: integers in 0..2^{stochastic_bits} - 1 for each element"
        )
    return make_random_bits(seed, x.shape, stochastic_bits, x.device)
