"""Test vectors for benches in other languages: what every input of a set becomes, by the rational reference.

Rounding vectors say which code an input's bits become, under each rounding and overflow:

    inputs in a format of at most 8 bits     all of its codes
    of at most 16 bits                       all with every=True, else the decision points
    FP32, FP64                               the decision points

Decision points are, for each value of the result's format and each point that divides two of them: the nearest inputs below, at
and above, both signs; the overflow point; the input format's own edges; infinity and NaN. A quantiser that is monotone and
right at these is right everywhere. Decoding vectors say what each code stands for, in bits of FP32 or FP64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from math import copysign, isinf, isnan
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr

from formats import ElementFormat, FloatFormat, GridFormat, Overflow, Rounding, element_format, round_exact
from formats.rounding import DETERMINISTIC
from verification import oracle
from verification.points import CARRIERS, INTEGERS, decision_inputs

MAX_BITS = 16
COMPLETE_BITS = 8
Codes = npt.NDArray[np.int64]
Progress = Callable[[Iterable[Any], str], Iterable[Any]]


def vectors(
    f: ElementFormat | str,
    input_format: ElementFormat | str = "fp32",
    roundings: Iterable[str] = tuple(DETERMINISTIC),
    overflows: Iterable[str] | None = None,
    *,
    every: bool = False,
    progress: Progress | None = None,
) -> xr.Dataset:
    """Rounding vectors of a format of at most 16 bits, one for each input, rounding and overflow.

    On the dimension `vector`: rounding, overflow, input_bits and expected_code (uint64), input_value and expected_value (float64,
    each exactly the number that the bits stand for). Overflows are by default all that mean something to the format. An input
    NaN is left out where the format has none: standards leave that open. Attributes: format, input_format, inputs (which), level.

    progress: wraps the loop over inputs, as `rich.progress.track` does. ValueError for wider formats, for lists as
    inputs, for stochastic modes, for values that float64 does not hold, and for modes that mean nothing.
    """
    result = element_format(f) if isinstance(f, str) else f
    given = element_format(input_format) if isinstance(input_format, str) else input_format
    modes = [_deterministic(name) for name in roundings]
    overs = _legal(result) if overflows is None else [Overflow(_known(name)) for name in overflows]
    _check(result, given, every)
    inputs, complete = _inputs(result, given, every)
    values = [given.decode_exact(int(code)) for code in inputs]
    if not result.has_nan:
        there = [not (isinstance(value, float) and isnan(value)) for value in values]
        inputs, values = inputs[there], [value for value, keep in zip(values, there, strict=True) if keep]
    code_of = _coder(result)
    codes, rounded = (np.empty((len(modes), len(overs), len(inputs)), kind) for kind in (np.uint64, np.float64))
    for i, mode in enumerate(modes):
        for k, value in enumerate((progress or _plainly)(values, str(mode))):
            for j, outcome in enumerate(_under(result, value, mode, overs)):
                codes[i, j, k], rounded[i, j, k] = code_of(outcome), float(outcome)
    repeats = len(modes) * len(overs)
    return xr.Dataset(
        {
            "rounding": ("vector", np.repeat([str(mode) for mode in modes], codes[0].size)),
            "overflow": ("vector", np.tile(np.repeat([str(over) for over in overs], len(inputs)), len(modes))),
            "input_bits": ("vector", np.tile(inputs.astype(np.uint64), repeats), _code_in(given)),
            "input_value": ("vector", np.tile(np.array([float(value) for value in values]), repeats), {"units": "1"}),
            "expected_code": ("vector", codes.ravel(), _code_in(result)),
            "expected_value": ("vector", rounded.ravel(), {"units": "1"}),
        },
        attrs={
            "format": result.name, "format_bits": result.bits, "input_format": given.name, "input_format_bits": given.bits,
            "inputs": "all codes" if complete else "decision points and their neighbours", "reference": "rationals",
        },
    )  # fmt: skip


def decoding_vectors(f: ElementFormat | str) -> xr.Dataset:
    """What each code of a format of at most 16 bits stands for, in the bits of FP32, or of FP64 where FP32 lacks a value.

    On the dimension `vector`: input_bits (the code), expected_code (the FP32 or FP64 bits), and expected_value (float64). NaN is
    the carrier's quiet NaN, 0x7FC00000. Codes of a list that stand for nothing are left out. ValueError for wider formats and
    for values that float64 does not hold.
    """
    described = element_format(f) if isinstance(f, str) else f
    if described.bits > MAX_BITS:
        raise ValueError(
            f"{described.name} has {described.bits} bits; vectors are for formats of at most {MAX_BITS} bits"
        )
    carrier = element_format("fp32")
    if not carrier.holds(described):
        carrier = element_format("fp64")
        if not carrier.holds(described):
            raise ValueError(f"{described.name} does not fit FP64, so no bits can say what its codes stand for")
    unused = isinstance(described, GridFormat)
    codes = [c for c in range(1 << described.bits) if not unused or c == described.nan_code or c in described.codes]  # type: ignore[attr-defined]
    values = np.array([float(described.decode_exact(code)) for code in codes])
    patterns = values.astype(np.float32).view(np.uint32) if carrier.bits == 32 else values.view(np.uint64)
    quiet = 0x7FC00000 if carrier.bits == 32 else 0x7FF8 << 48
    patterns = np.where(np.isnan(values), quiet, patterns.astype(np.uint64))
    return xr.Dataset(
        {
            "input_bits": ("vector", np.array(codes, np.uint64), _code_in(described)),
            "expected_code": ("vector", patterns.astype(np.uint64), _code_in(carrier)),
            "expected_value": ("vector", values, {"units": "1"}),
        },
        attrs={
            "format": carrier.name, "format_bits": carrier.bits, "input_format": described.name,
            "input_format_bits": described.bits, "inputs": "all codes", "reference": "rationals",
        },
    )  # fmt: skip


def as_csv(found: xr.Dataset) -> Iterator[str]:
    """Lines of a CSV file with a heading: bits in hexadecimal, values as the shortest decimals that give them back."""
    names = [name for name in ("rounding", "overflow") if name in found]
    has_value = "input_value" in found
    yield ",".join([*names, "input_bits", *(["input_value"] if has_value else []), "expected_code", "expected_value"])
    columns = [found[name].values.tolist() for name in names]
    columns.append([_hex(bits, found.attrs["input_format_bits"]) for bits in found["input_bits"].values.tolist()])
    columns += [[repr(v) for v in found["input_value"].values.tolist()]] if has_value else []
    columns.append([_hex(bits, found.attrs["format_bits"]) for bits in found["expected_code"].values.tolist()])
    columns.append([repr(v) for v in found["expected_value"].values.tolist()])
    for row in zip(*columns, strict=True):
        yield ",".join(row)


def as_hex(found: xr.Dataset) -> Iterator[str]:
    """Lines that Verilog's $readmemh reads: comments, then a word a vector, its fields of whole digits parted by underscores.

    Fields: rounding and overflow, a digit each, numbered as the comments say (rounding vectors only); the input's bits; the
    expected code.
    """
    a, result = found.attrs, "expected code"
    yield f"// {a['input_format']} to {a['format']}: {found.sizes['vector']} vectors, inputs: {a['inputs']}"
    fields = [f"input ({_digits(a['input_format_bits'])} digits)", f"{result} ({_digits(a['format_bits'])})"]
    numbers: list[list[str]] = []
    for name in ("rounding", "overflow"):
        if name in found:
            words = list(dict.fromkeys(found[name].values.tolist()))
            yield f"// {name}: {', '.join(f'{i:X} {word}' for i, word in enumerate(words))}"
            fields.insert(len(numbers), f"{name} (1)")
            numbers.append([f"{words.index(word):X}" for word in found[name].values.tolist()])
    yield f"// a word: {' _ '.join(fields)}"
    numbers.append([_hex(bits, a["input_format_bits"])[2:] for bits in found["input_bits"].values.tolist()])
    numbers.append([_hex(bits, a["format_bits"])[2:] for bits in found["expected_code"].values.tolist()])
    for row in zip(*numbers, strict=True):
        yield "_".join(row)


def _code_in(f: ElementFormat) -> dict[str, str]:
    return {"long_name": f"code in {f.name}", "units": "1"}


def _digits(bits: int) -> int:
    return -(-bits // 4)


def _hex(bits: int, width: int) -> str:
    return f"0x{bits:0{_digits(width)}X}"


def _plainly(items: Iterable[Any], _: str) -> Iterable[Any]:
    return items


def _deterministic(name: str) -> Rounding:
    if name not in list(DETERMINISTIC):
        raise ValueError(f"rounding must be one of {', '.join(DETERMINISTIC)}, got {str(name)!r}")
    return Rounding(name)


def _known(name: str) -> str:
    if name not in list(Overflow):
        raise ValueError(f"overflow must be one of {', '.join(Overflow)}, got {str(name)!r}")
    return name


def _legal(f: ElementFormat) -> list[Overflow]:
    return [over for over in Overflow if over is not Overflow.NONSATURATING or f.has_inf or f.has_nan]


def _check(result: ElementFormat, given: ElementFormat, every: bool) -> None:
    if result.bits > MAX_BITS:
        raise ValueError(f"{result.name} has {result.bits} bits; vectors are for formats of at most {MAX_BITS} bits")
    for f in (result, given):
        if not element_format("fp64").holds(f):
            raise ValueError(
                f"{f.name} does not fit FP64, in which vectors are written; round single values by round_exact"
            )
    if given.bits > MAX_BITS and given.canonical_name not in ("e8m23", "e11m52"):
        raise ValueError(f"{given.name}: inputs are fp32, fp64, or a format of at most {MAX_BITS} bits")
    if every and given.bits > MAX_BITS:
        raise ValueError(
            f"{given.name} has 2^{given.bits} inputs; all of them are for inputs of at most {MAX_BITS} bits"
        )


def _inputs(result: ElementFormat, given: ElementFormat, every: bool) -> tuple[Codes, bool]:
    """The codes of the inputs, ascending, and whether these are all that there are."""
    if given.bits <= COMPLETE_BITS or every:
        unused = (
            set(range(1 << given.bits)) - {*given.codes, given.nan_code} if isinstance(given, GridFormat) else set()
        )
        return np.array(sorted(set(range(1 << given.bits)) - unused), np.int64), True
    dtype = next((dtype for dtype, name in CARRIERS.items() if element_format(name) == given), None)
    if dtype is not None:
        patterns = decision_inputs(result, dtype).view(INTEGERS[dtype])
        return _unsigned(patterns, given.bits), False
    listed = oracle.table(result)
    targets = np.unique(np.concatenate([listed.middles, listed.entries, -listed.middles, -listed.entries]))
    grid = given.grid()
    place = np.searchsorted(grid, targets)
    near = np.unique(np.clip(np.concatenate([place - 2, place - 1, place, place + 1]), 0, len(grid) - 1))
    special = [code for code in (given.inf_code, given.nan_code) if code is not None]
    if isinstance(given, FloatFormat) and given.signed:
        special += [given.inf_code | 1 << (given.bits - 1)] if given.inf_code is not None else []
        special += [1 << (given.bits - 1)] if given.has_negative_zero else []
    return np.unique(np.concatenate([given.finite_codes[near], np.array(special, np.int64)])), False


def _unsigned(patterns: torch.Tensor, bits: int) -> Any:
    """Bit patterns as non-negative Python-sized integers, ascending."""
    raw = patterns.numpy()
    wide = np.sort(raw.view(raw.dtype.str.replace("i", "u")))
    return wide.astype(np.uint64 if bits == 64 else np.int64)


def _under(
    f: ElementFormat, value: Fraction | float, mode: Rounding, overflows: list[Overflow]
) -> Iterator[Fraction | float]:
    """The value rounded under each overflow: alike unless it ends at an end of the format, where they may part."""
    saturated = round_exact(value, f, mode)
    ends = isinstance(saturated, float) or saturated in (f.lowest, f.largest)
    for over in overflows:
        yield round_exact(value, f, mode, over) if ends and over is not Overflow.SATURATE else saturated


def _coder(f: ElementFormat) -> Callable[[Fraction | float], int]:
    """From a value to its code, by decoding all codes: nothing here is the encoder under test."""
    codes: dict[Any, int] = {}
    for code in f.finite_codes.tolist():
        codes[f.decode_exact(code)] = code

    def find(value: Fraction | float) -> int:
        if isinstance(value, Fraction):
            return codes[value]
        if isnan(value):
            assert f.nan_code is not None
            return f.nan_code
        negative = copysign(1.0, value) < 0
        if isinf(value):
            assert f.inf_code is not None
            return f.inf_code | (1 << (f.bits - 1) if negative else 0)
        return 1 << (f.bits - 1)

    return find
