"""Where other libraries give something else than we do: one table, each row with who is right, and by which sentence.

`test_peers` holds every cast against its peer. What a row's `where` picks out must come out as the row says, and differ from
ours, so that it is noticed when a peer mends it; everything else must agree. NaN agrees with NaN: its sign and payload mean
nothing (IEEE 754-2019 6.2.3, 6.3; OFP8 and MX say no more), but where a peer's NaN is no NaN, or has a code that nobody
would expect, there is a row. Ours is compared with the overflow that the peer means: non-saturating where there is infinity
or NaN, else saturating.

`right`: "ours"; "theirs", which there must not be; or "either", where no standard decides and the two conventions differ.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from formats import ElementFormat

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
FLOAT8 = ("e5m2", "e4m3", "e4m3fn", "e3m4", "e5m2fnuz", "e4m3fnuz", "e4m3b11fnuz")
NARROWER = ("e3m2fn", "e2m3fn", "e2m1fn")
SMALLEST = 2.0**-127  # of E8M0


@dataclass(frozen=True)
class Disagreement:
    """One row. `formats`: our names; `source`: the dtype cast from, or "any"; `seen`: the versions it was seen in.

    where(f, x): which inputs, float64; gives(f, x): what the peer makes of them, float64, None where only the difference is
    asserted. Rows without `where` have a test of their own, by `name`. since: the first version that it holds for.
    """

    name: str
    peer: str
    seen: str
    formats: tuple[str, ...]
    source: str
    inputs: str
    theirs: str
    ours: str
    right: str
    by: str
    where: Callable[[ElementFormat, Floats], Flags] | None = None
    gives: Callable[[ElementFormat, Floats], Floats] | None = None
    since: tuple[int, ...] = ()


def rounded(f: ElementFormat, x: Floats) -> Floats:
    """Ours, nearest even, with the peers' overflow."""
    overflow = "nonsaturating" if f.has_inf or f.has_nan else "saturate"
    return f.decode(f.encode(x, "nearest_even", overflow))


def narrowed(x: Floats) -> Floats:
    """By way of FP32."""
    with np.errstate(all="ignore"):
        return x.astype(np.float32).astype(np.float64)


def double_rounded(f: ElementFormat, x: Floats) -> Flags:
    """Where rounding to FP32 first makes a difference."""
    once, twice = rounded(f, x), rounded(f, narrowed(x))
    return np.asarray((once != twice) & ~np.isnan(once + twice) | (np.isnan(once) ^ np.isnan(twice)))


def just_above_smallest(_: ElementFormat, x: Floats) -> Flags:
    """FP32 numbers nearer to 2^-127 than to 2^-126, but above the first."""
    y = narrowed(x)
    return np.asarray((y > SMALLEST) & (y < 1.5 * SMALLEST))


def e8m0_of_magnitude(f: ElementFormat, x: Floats) -> Floats:
    """E8M0 as torch makes it, of |x|, what lies above 2^-127 going to 2^-126."""
    y = np.abs(narrowed(x))
    return np.where(just_above_smallest(f, y), 2 * SMALLEST, rounded(f, y))


ROWS = (
    Disagreement(
        "ml_dtypes rounds FP64 twice", "ml_dtypes", "0.5.0-0.6.0",
        (*FLOAT8, *NARROWER, "bf16", "e8m0fnu"), "float64",
        "FP64 numbers that FP32 rounds onto, or across, a point that divides two values",
        "the nearest value to the FP32 number nearest to x",
        "the nearest value to x", "ours",
        "IEEE 754-2019 4.3: as if it first produced an intermediate result correct to infinite precision, then rounded it once",
        double_rounded, lambda f, x: rounded(f, narrowed(x)),
    ),
    Disagreement(
        "torch rounds FP64 twice", "torch", "2.11-2.13",
        ("e5m2", "e4m3fn", "e5m2fnuz", "e4m3fnuz", "e8m0fnu", "bf16", "fp16"), "float64",
        "FP64 numbers that FP32 rounds onto, or across, a point that divides two values",
        "the nearest value to the FP32 number nearest to x",
        "the nearest value to x", "ours",
        "IEEE 754-2019 4.3, as above",
        double_rounded, lambda f, x: rounded(f, narrowed(x)),
    ),
    Disagreement(
        "ml_dtypes lifts E8M0 above its smallest value", "ml_dtypes", "0.5.0-0.6.0", ("e8m0fnu",), "any",
        "2^-127 < x < 1.5 * 2^-127", "2^-126", "2^-127, the nearest", "ours",
        "IEEE 754-2019 4.3.1: the floating-point number nearest to the infinitely precise result",
        just_above_smallest, lambda _, x: np.full(x.shape, 2 * SMALLEST),
    ),
    Disagreement(
        "torch lifts E8M0 above its smallest value", "torch", "2.13", ("e8m0fnu",), "any",
        "2^-127 < x < 1.5 * 2^-127", "2^-126", "2^-127, the nearest", "ours",
        "IEEE 754-2019 4.3.1, as above",
        just_above_smallest, lambda _, x: np.full(x.shape, 2 * SMALLEST),
    ),
    Disagreement(
        "ml_dtypes has no E8M0 for zero", "ml_dtypes", "0.5.0-0.6.0", ("e8m0fnu",), "any",
        "0 and -0", "NaN", "2^-127, the nearest value", "either",
        "OCP MX v1.0 5.4.1: E8M0 represents no zero; what a conversion makes of zero it does not say",
        lambda _, x: np.asarray(x == 0), lambda _, x: np.full(x.shape, np.nan),
    ),
    Disagreement(
        "torch drops signs into E8M0", "torch", "2.13", ("e8m0fnu",), "any",
        "-1.5 * 2^127 < x < 0", "the value for |x|", "NaN", "ours",
        "IEEE P3109 4.0 4.7.5, SatNone: a negative value into an unsigned format is NaN; OCP MX v1.0 5.4.1: E8M0 is unsigned",
        lambda _, x: np.asarray((narrowed(x) < 0) & (narrowed(x) > -1.5 * 2.0**127)), e8m0_of_magnitude,
    ),
    Disagreement(
        "torch saturates into e4m3fn without being asked, though not into e5m2", "torch", "2.13; 2.11 gave NaN",
        ("e4m3fn",), "any", "infinity, and what rounds beyond 448", "448 of that sign", "NaN: non-saturating; 448: saturating",
        "either", "OCP OFP8 v1.0, conversions: both are defined, saturating and not",
        lambda _, x: np.asarray(np.abs(narrowed(x)) > 464), lambda f, x: np.copysign(f.max, x), (2, 13),
    ),
    Disagreement(
        "ml_dtypes makes NaN a zero", "ml_dtypes", "0.5.0-0.6.0", NARROWER, "any",
        "NaN", "-0 for +NaN, +0 for -NaN", "ValueError in an array, the largest value in a tensor", "either",
        "OCP MX v1.0 5.3.2, 5.3.3: conversion of NaN is implementation-defined",
    ),
    Disagreement(
        "ml_dtypes truncates and wraps integers", "ml_dtypes", "0.6.0", ("int4", "int2"), "float32",
        "numbers that are no integers, or beyond the ends", "C's conversion: towards zero, then the low bits",
        "the nearest, halves to even, and the end", "either",
        "OCP MX v1.0 5.3.4 asks it of MXINT8 alone: nearest even, saturating",
    ),
    Disagreement(
        "torch makes every NaN 0xffff in BF16", "torch", "2.13", ("bf16",), "float32",
        "NaN of either sign", "the code 0xffff: negative, all payload bits", "0x7fc0", "either",
        "IEEE 754-2019 6.3: this standard does not interpret the sign of a NaN",
    ),
    Disagreement(
        "gfloat has negative values of unsigned formats", "gfloat", "0.5.2",
        ("e8m0fnu", "binary{K}p{P}ue", "binary{K}p{P}uf"), "float64",
        "negative numbers that do not round to 0", "the rounded negative number, which has no code",
        "the lowest value, or NaN where overflow does not saturate", "ours",
        "IEEE P3109 4.0 4.7.5: a negative value into an unsigned format saturates to its lowest, or is NaN",
        lambda f, x: np.asarray((x < 0) & (not f.signed)),
    ),
    Disagreement(
        "gfloat sends E8M0's ties to even", "gfloat", "0.5.2", ("e8m0fnu",), "float64",
        "1.5 * 2^k, k even or odd so that the code below is even", "the lower value", "the higher: ties go up", "either",
        "P3109 4.0 4.7.4 has even codes for M = 0; OCP MX v1.0 does not say; torch's and ml_dtypes' users have ties up",
        lambda f, x: np.asarray(
            (np.frexp(x)[0] == 0.75) & (x > SMALLEST) & (f.encode(np.where(x > 0, x, 1.0), "toward_zero") % 2 == 0)
        ),
        lambda f, x: np.where(x > f.max, f.max, f.decode(f.encode(x, "toward_zero"))),
    ),
    Disagreement(
        "gfloat goes below E8M0's smallest value", "gfloat", "0.5.2", ("e8m0fnu",), "float64",
        "0 <= x < 2^-127", "0, or a power of two that has no code", "2^-127, the nearest value", "ours",
        "IEEE 754-2019 4.3.1: the result is a number of the destination format",
        lambda _, x: np.asarray((x >= 0) & (x < SMALLEST)),
    ),
    Disagreement(
        "gfloat encodes E8M0's zero in two ways", "gfloat", "0.5.2", ("e8m0fnu",), "float64",
        "encode_float(0.0) and encode_ndarray([0.0])", "0xff and 0x00", "0x00", "either",
        "OCP MX v1.0 5.4.1: E8M0 represents no zero",
    ),
    Disagreement(
        "gfloat without subnormals leaves the grid", "gfloat", "0.5.2", ("e4m3fn-nosub",), "float64",
        "numbers below the smallest value", "powers of two that have no code", "zero or the smallest value", "ours",
        "IEEE 754-2019 4.3.1: the result is a number of the destination format",
    ),
    Disagreement(
        "torchao's RCEIL divides in FP32", "torchao", "0.18.0", ("mxfp4",), "float32",
        "amax just above 6 * 2^k", "the scale 2^k, too small", "2^(k+1)", "ours",
        "NVIDIA's rule, formats.scale_arithmetic: 2^ceil(log2(amax / 6)), so that no element saturates",
    ),
    Disagreement(
        "torchao halves blocks whose scale is 2^-127", "torchao", "0.18.0", ("mxfp4",), "float32",
        "a block whose amax is 2^-126", "values of half the size: elements divided by 2^-126, multiplied by 2^-127",
        "2^-126", "ours", "OCP MX v1.0 5.1: v_i = X * P_i, with the scale X that is stored",
    ),
    Disagreement(
        "microxcaling takes floor(log2(amax)) in FP32", "microxcaling", "7bc41952", ("mxfp4",), "float32",
        "amax just under 2^k, for 249 of 254 k", "a scale twice as large", "the floor of the exact logarithm", "ours",
        "OCP MX v1.0 6.3: X is the largest power of two less than or equal to max |V_i|, divided by that of the element type",
    ),
)  # fmt: skip
BY_NAME = {row.name: row for row in ROWS}


def rows_for(peer: str, f: str, source: str, version: tuple[int, ...] = ()) -> list[Disagreement]:
    """The rows that a cast by this peer, from that dtype into the format of that name, must show; e8m0fnu's own ones first."""
    unsigned = "binary{K}p{P}ue" if f.startswith("binary") and "u" in f else f
    found = [
        row
        for row in ROWS
        if row.peer == peer and row.where and row.source in ("any", source) and {f, unsigned} & {*row.formats}
        and (not version or version >= row.since)
    ]  # fmt: skip
    return sorted(found, key=lambda row: len(row.formats))
