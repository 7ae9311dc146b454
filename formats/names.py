"""From a name to a format: the names that standards and hardware have given, and those that spell a format's parameters.

    e{E}m{M}[f|fn|fnuz][b{bias}][-nosub]    e4m3, e2m1f, e4m3fnb8, e4m3fnuzb11 (e4m3b11fnuz too), e3m2-nosub
    e{E}m0fnu                               unsigned powers of two without zero: e8m0fnu, the scale of OCP MX
    binary{K}p{P}{s|u}{e|f}                 IEEE P3109 version 4: K bits, precision P, signed or unsigned, extended or finite
    int{n}, int{n}q{F}                      two's complement, F bits behind the point: int8, int8q6 (MXINT8's element)
    posit{n}, lns{n}q{F}, nf4               lists of values
    mxfp4, nvfp4, e4m3fn@tile128x128, ...   elements with scales: see `formats.scaled`

The plain name follows IEEE 754, so the top exponent is infinity and NaN; `f` has finite values only; `fn` has no
infinity and NaN only where all bits are ones; `fnuz` has NaN in place of -0, no infinity, and bias 2^(E-1). By custom OCP's MX
element types are called e2m3fn, e3m2fn and e2m1fn though they have no NaN (OCP MX 5.3): those three names mean the `f`
formats. e4m3, with maximum 240, is not OCP's e4m3fn, with maximum 448. fp64 is there as a reference.
"""

import re
from collections.abc import Callable
from difflib import get_close_matches
from functools import cache
from typing import Literal

from formats.integers import IntegerFormat
from formats.lists import GridFormat, lns, made_list, nf4, posit
from formats.spec import (
    MAX_EXPONENT_BITS,
    MAX_MANTISSA_BITS,
    ElementFormat,
    FloatFormat,
    Format,
    Specials,
    default_bias,
    impossible,
    impossible_width,
    p3109_bias,
    standard_bias,
)

ALIASES = {"fp64": "e11m52", "fp32": "e8m23", "tf32": "e8m10", "bf16": "e8m7", "fp16": "e5m10"}
NAN_IN_NAME_ONLY = ("e2m3fn", "e3m2fn", "e2m1fn")
FP8 = ("e5m2", "e4m3fn", "e4m3", "e3m4", "e5m2fnuz", "e4m3fnuz", "e4m3b11fnuz", "e8m0fnu")
LISTED = ("nf4", "posit8", "posit16", "lns8q3")
FAMILIES = {
    "fp8": FP8[:2],
    "fp6": ("e3m2fn", "e2m3fn"),
    "fp4": ("e2m1fn", "nf4"),
    "mxfp8": ("mxfp8_e4m3fn", "mxfp8_e5m2"),
}
"""What people call several formats by, and those that they mean."""
SUFFIXES: dict[str, Specials] = {"": "ieee", "f": "finite", "fn": "fn", "fnuz": "fnuz"}
FLOAT = re.compile(r"e(\d+)m(\d+)(?:b(\d+))?(f|fn|fnuz|fnu)?(?:b(\d+))?(-nosub)?")
P3109 = re.compile(r"[Bb]inary(\d+)p(\d+)([su])([ef])")
INTEGER = re.compile(r"int(\d+)(?:q(\d+))?")
POSIT = re.compile(r"posit(\d+)")
LNS = re.compile(r"lns(\d+)q(\d+)")
MIN_K, MAX_K = 3, 16


@cache
def get_format(name: str) -> Format:
    """The format of that name, which keeps the name. ValueError, with the nearest names, for one that means nothing."""
    from formats.scaled import is_scaled_name, scaled_format

    if is_scaled_name(name):
        scaled: Format = scaled_format(name)
        return scaled
    spelled = ALIASES.get(name, name)
    parsers: list[tuple[re.Pattern[str], Callable[[str, re.Match[str]], ElementFormat]]] = [
        (FLOAT, _float),
        (P3109, _p3109),
        (INTEGER, _integer),
        (POSIT, lambda _, match: posit(int(match[1]))),
        (LNS, lambda _, match: lns(int(match[1]), int(match[2]))),
    ]
    for pattern, parse in parsers:
        match = pattern.fullmatch(spelled)
        if match:
            return parse(name, match)
    if name == "nf4":
        return nf4()
    nearest = FAMILIES.get(name.lower()) or get_close_matches(name.lower(), list_formats(), n=3, cutoff=0.0)
    raise ValueError(
        f"{name}: neither e{{E}}m{{M}}[f|fn|fnuz], binary{{K}}p{{P}}{{s|u}}{{e|f}} nor a known name; "
        f"the nearest formats are {', '.join(nearest)}"
    )


def element_format(name: str) -> ElementFormat:
    """The element format of that name. ValueError for other names, those of scaled formats among them."""
    f = made_list(name) or get_format(name)
    if not isinstance(f, ElementFormat):
        raise ValueError(
            f"{name} is a scaled format, and here single numbers are rounded: give an element format, such as e4m3fn"
        )
    return f


def float_format(name: str) -> FloatFormat:
    """The floating-point format of that name. ValueError for other names, those of integers and lists among them."""
    f = element_format(name)
    if not isinstance(f, FloatFormat):
        raise ValueError(f"{name} is no floating-point format, and here one is needed: e4m3fn, e5m2, bf16, ...")
    return f


def as_element(f: ElementFormat | str) -> ElementFormat:
    """The format itself, or the one of that name."""
    return element_format(f) if isinstance(f, str) else f


Kind = Literal["float", "integer", "list", "scaled"]


@cache
def list_formats(kind: Kind | None = None) -> list[str]:
    """Every name that means something without a bias of its own: the well-known ones first, then all others by kind.

    With `kind`, those of one kind: "float", "integer", "list" or "scaled". An explicit bias, `-nosub`, other logarithms, fixed
    points and scales come on top of these. ValueError for another kind.
    """
    integers = [f"int{n}" for n in range(MIN_K - 1, MAX_K + 1)]
    rest = [*_float_names(), *_p3109_names(), *integers, *(f"posit{n}" for n in range(MIN_K, MAX_K + 1))]
    every = [*well_known(), *(name for name in rest if name not in well_known())]
    if kind is None:
        return every
    kinds: dict[str, type[Format]] = {"float": FloatFormat, "integer": IntegerFormat, "list": GridFormat}
    if kind == "scaled":
        return [name for name in every if not isinstance(get_format(name), ElementFormat)]
    if kind not in kinds:
        raise ValueError(f"kind must be one of {', '.join([*kinds, 'scaled'])}, got {kind!r}")
    return [name for name in every if isinstance(get_format(name), kinds[kind])]


@cache
def well_known() -> tuple[str, ...]:
    """The names that standards, papers and hardware gave, widest first, then 8 bits and fewer, lists and scaled formats."""
    from formats.scaled import NAMED

    return (*ALIASES, *FP8, *NAN_IN_NAME_ONLY, "int8", "int8q6", *LISTED, *NAMED)


@cache
def _float_names() -> tuple[str, ...]:
    return tuple(
        f"e{e}m{m}{suffix}"
        for e in range(1, MAX_EXPONENT_BITS + 1)
        for m in range(MAX_MANTISSA_BITS + 1)
        for suffix, specials in SUFFIXES.items()
        if not impossible(e, m, specials)
    )


@cache
def _p3109_names() -> tuple[str, ...]:
    return tuple(
        f"binary{k}p{p}{sign}{domain}"
        for k in range(MIN_K, MAX_K + 1)
        for sign in "su"
        for p in range(1, k + (sign == "u"))
        for domain in "ef"
    )


def _float(name: str, match: re.Match[str]) -> FloatFormat:
    e, m, early, suffix, late, nosub = match.groups()
    exponent_bits, mantissa_bits, suffix = int(e), int(m), suffix or ""
    if early is not None and late is not None:
        raise ValueError(f"{name}: two biases, {early} and {late}; give one")
    given = early if early is not None else late
    unsigned = suffix == "fnu"
    specials: Specials = "finite" if name in NAN_IN_NAME_ONLY else "fn" if unsigned else SUFFIXES[suffix]
    # Of a width that is refused below: 2 to the power of any number that somebody writes may not fit the memory.
    usual = default_bias(min(exponent_bits, 64), specials) if exponent_bits else 0
    bias = usual if given is None else int(given)
    problem = None if match[0] == ALIASES["fp64"] else impossible_width(exponent_bits, mantissa_bits)
    problem = problem or impossible(exponent_bits, mantissa_bits, specials, bias)
    if unsigned and (mantissa_bits or given or nosub):
        problem = "fnu, unsigned powers of two without zero, is for M = 0 and takes nothing else"
    if problem:
        near = _nearest(exponent_bits, mantissa_bits, suffix.removesuffix("u"))
        raise ValueError(f"{name}: {problem}; the nearest formats are {', '.join(near)}")
    if unsigned:
        return FloatFormat(name, exponent_bits, 0, standard_bias(exponent_bits), "fn", signed=False, zero=False)
    return FloatFormat(name, exponent_bits, mantissa_bits, bias, specials, subnormals=not nosub)


def _p3109(name: str, match: re.Match[str]) -> FloatFormat:
    k, p, sign, domain = int(match[1]), int(match[2]), match[3], match[4]
    signed = sign == "s"
    most = k - 1 if signed else k
    if not MIN_K <= k <= MAX_K:
        raise ValueError(f"{name}: K, the width, must be {MIN_K}..{MAX_K}, got {k}")
    if not 1 <= p <= most:
        raise ValueError(f"{name}: P, the precision, must be 1..{most} for K = {k}, got {p}")
    exponent_bits = k - p + (0 if signed else 1)
    specials: Specials = "extended" if domain == "e" else "fnuz" if signed else "fn"
    return FloatFormat(name, exponent_bits, p - 1, p3109_bias(exponent_bits), specials, signed=signed)


def _integer(name: str, match: re.Match[str]) -> IntegerFormat:
    return IntegerFormat(name, int(match[1]), int(match[2] or 0))


def _nearest(exponent_bits: int, mantissa_bits: int, suffix: str) -> list[str]:
    """Three legal names by distance in bits, the same suffix first where that ties."""

    def distance(name: str) -> tuple[int, bool]:
        match = FLOAT.fullmatch(name)
        e, m, other = (int(match[1]), int(match[2]), match[4] or "") if match else (0, 0, "")
        return abs(e - exponent_bits) + abs(m - mantissa_bits), other != suffix

    return sorted(_float_names(), key=distance)[:3]
