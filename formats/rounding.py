"""The names of what can happen to a value that lies between two neighbours, or beyond the last.

IEEE 754-2019 clause 4.3 names the roundings; OCP OFP8 and the IEEE P3109 draft add what to do on overflow. Only what
every implementation here can do is a member.
"""

from enum import StrEnum
from typing import TypeVar

Mode = TypeVar("Mode", bound=StrEnum)


class Rounding(StrEnum):
    """Which neighbour a value between two grid points goes to.

    With no mantissa bits "even" means that the code is even (P3109): consecutive values are consecutive codes, so one
    of any two neighbours always is.
    """

    NEAREST_EVEN = "nearest_even"
    TOWARD_ZERO = "toward_zero"


class Overflow(StrEnum):
    """What becomes of a value that rounds, with an unbounded exponent, beyond the largest finite one."""

    SATURATE = "saturate"


def check_modes(rounding: str, overflow: str) -> tuple[Rounding, Overflow]:
    """The two names as members; ValueError, naming what there is, for any other."""
    return _member(Rounding, "rounding", rounding), _member(Overflow, "overflow", overflow)


def _member(kind: type[Mode], argument: str, name: str) -> Mode:
    try:
        return kind(name)
    except ValueError:
        raise ValueError(f"{argument} must be one of {', '.join(kind)}, got {name!r}") from None
