"""From a name to a format: e{E}m{M} with its suffix, and the names that hardware has given to some of them.

The plain name follows IEEE 754, so the top exponent is infinity and NaN; `f` has finite values only; `fn` has no
infinity and NaN only where all bits are ones. By custom OCP's MX element types are called e2m3fn, e3m2fn and e2m1fn
though they have no NaN (OCP MX 5.3): those three names mean the `f` formats. e4m3, with maximum 240, is not OCP's
e4m3fn, with maximum 448.
"""

import re
from difflib import get_close_matches
from functools import cache

from formats.spec import MAX_EXPONENT_BITS, MAX_MANTISSA_BITS, FloatFormat, Specials, impossible, standard_bias

ALIASES = {"fp32": "e8m23", "tf32": "e8m10", "bf16": "e8m7", "fp16": "e5m10"}
NAN_IN_NAME_ONLY = ("e2m3fn", "e3m2fn", "e2m1fn")
WELL_KNOWN = (*ALIASES, "e5m2", "e4m3", "e4m3fn", *NAN_IN_NAME_ONLY)
SUFFIXES: dict[str, Specials] = {"": "ieee", "f": "finite", "fn": "fn"}
PATTERN = re.compile(r"e(\d+)m(\d+)(f|fn)?")


@cache
def get_format(name: str) -> FloatFormat:
    """The format of that name, which keeps the name. ValueError, with the nearest names, for one that means nothing."""
    parsed = _parse(ALIASES.get(name, name))
    if parsed is None:
        nearest = get_close_matches(name.lower(), list_formats(), n=3, cutoff=0.0)
        raise ValueError(
            f"{name}: neither e{{E}}m{{M}}[f|fn] nor a known name; the nearest formats are {', '.join(nearest)}"
        )
    exponent_bits, mantissa_bits, suffix = parsed
    specials: Specials = "finite" if name in NAN_IN_NAME_ONLY else SUFFIXES[suffix]
    problem = impossible(exponent_bits, mantissa_bits, specials)
    if problem:
        raise ValueError(
            f"{name}: {problem}; the nearest formats are {', '.join(_nearest(exponent_bits, mantissa_bits, suffix))}"
        )
    return FloatFormat(name, exponent_bits, mantissa_bits, standard_bias(exponent_bits), specials)


def as_format(f: FloatFormat | str) -> FloatFormat:
    """The format itself, or the one of that name."""
    return get_format(f) if isinstance(f, str) else f


@cache
def _all_names() -> tuple[str, ...]:
    return tuple(
        f"e{e}m{m}{suffix}"
        for e in range(1, MAX_EXPONENT_BITS + 1)
        for m in range(MAX_MANTISSA_BITS + 1)
        for suffix, specials in SUFFIXES.items()
        if not impossible(e, m, specials)
    )


def list_formats() -> list[str]:
    """Every name that means something: the well-known ones first, then all e{E}m{M}, e{E}m{M}f and e{E}m{M}fn by E and M."""
    return [*WELL_KNOWN, *(name for name in _all_names() if name not in WELL_KNOWN)]


def _parse(name: str) -> tuple[int, int, str] | None:
    match = PATTERN.fullmatch(name)
    return (int(match[1]), int(match[2]), match[3] or "") if match else None


def _nearest(exponent_bits: int, mantissa_bits: int, suffix: str) -> list[str]:
    """Three legal names by distance in bits, the same suffix first where that ties."""

    def distance(name: str) -> tuple[int, bool]:
        e, m, other = _parse(name) or (0, 0, "")
        return abs(e - exponent_bits) + abs(m - mantissa_bits), other != suffix

    return sorted(_all_names(), key=distance)[:3]
