"""The names of what can happen to a value that lies between two neighbours, or beyond the last.

IEEE 754-2019 clause 4.3 names the directed and nearest roundings; the interim report of IEEE P3109, version 4.0 (June 2026),
adds to_odd, three stochastic roundings (4.7.4) and three saturation modes (4.7.5); OCP OFP8 the saturating and the
non-saturating conversion.

Stochastic rounding takes N random bits, a number R in 0..2^N - 1. With the value a share d, 0 < d < 1, of the way from the
neighbour nearer zero to the other one, it rounds away from zero where

    stochastic_a    floor(d 2^N) + R >= 2^N                    P(away) = floor(d 2^N) / 2^N      bias in (-2^-N, 0]
    stochastic_b    floor(d 2^(N+1)) + 2 R + 1 >= 2^(N+1)      d 2^N rounded, halves up          |bias| <= 2^-(N+1)
    stochastic_c    round_half_even(d 2^N) + R >= 2^N          d 2^N rounded, halves to even     |bias| <= 2^-(N+1)

the bias P(away) - d being in units of the distance between the neighbours. `stochastic` is stochastic_c: its bias is 0 where d
has no more than N bits, and cancels over evenly spaced d. Exact values (d = 0) are never bumped by any of them.
"""

from enum import StrEnum
from typing import TypeVar

Mode = TypeVar("Mode", bound=StrEnum)

DEFAULT_RANDOM_BITS = 23
"""N where it is not given: as many bits as FP32 has below its leading one, so that with FP32 input d 2^N is an integer, and
the bias exactly 0, wherever the result is a normal number; below, |bias| <= 2^-24."""
MAX_RANDOM_BITS = 32


class Rounding(StrEnum):
    """Which neighbour a value between two grid points goes to.

    "even" and "odd" are the parity of the code of the neighbour, counted from zero: that of the last mantissa bit, and with no
    mantissa bits that of the exponent (P3109 4.7.4); consecutive values are consecutive codes, so one of any two neighbours
    always is even. e8m0fnu, by custom, sends ties up.
    """

    NEAREST_EVEN = "nearest_even"
    NEAREST_AWAY = "nearest_away"
    TOWARD_ZERO = "toward_zero"
    TOWARD_POSITIVE = "toward_positive"
    TOWARD_NEGATIVE = "toward_negative"
    TO_ODD = "to_odd"
    STOCHASTIC = "stochastic"
    STOCHASTIC_A = "stochastic_a"
    STOCHASTIC_B = "stochastic_b"
    STOCHASTIC_C = "stochastic_c"

    @property
    def is_stochastic(self) -> bool:
        """Whether it takes random bits."""
        return self.value.startswith("stochastic")

    def stops_at_end(self, negative: bool) -> bool:
        """Whether it rounds towards zero on that side, as toward_zero and one directed mode do: IEEE 754-2019 7.4."""
        inward = Rounding.TOWARD_POSITIVE if negative else Rounding.TOWARD_NEGATIVE
        return self in (Rounding.TOWARD_ZERO, inward)


DETERMINISTIC = tuple(mode for mode in Rounding if not mode.is_stochastic)


class Overflow(StrEnum):
    """What becomes of a value that rounds, with an unbounded exponent, beyond the largest finite one.

    saturate       the largest finite value, for inf too (P3109's SatFinite, OFP8's saturating conversion)
    propagate      the same, but inf stays inf where the format has one (SatPropagate)
    nonsaturating  inf, or NaN without one, as OFP8's non-saturating conversion; modes that round inward, to_odd among
                   them, stop at the largest finite value, save for inf itself. Refused where there is neither
    sat_none       P3109 4.0's SatNone: inf where there is one, else the largest finite value; modes that round inward, and
                   to_odd in unsigned formats with infinity, stop at the largest finite value. (The draft D1 of July 2026 gives
                   NaN in finite formats instead)

    A negative value, unless it rounds to 0, is beyond the end of an unsigned format: saturate and propagate give the lowest
    value, the other two NaN, save that modes that round inward stop at the lowest value.
    """

    SATURATE = "saturate"
    PROPAGATE = "propagate"
    NONSATURATING = "nonsaturating"
    SAT_NONE = "sat_none"


def check_modes(rounding: str, overflow: str) -> tuple[Rounding, Overflow]:
    """The two names as members, `stochastic` as the mode that it stands for; ValueError, naming what there is, otherwise."""
    mode = _member(Rounding, "rounding", rounding)
    return (
        Rounding.STOCHASTIC_C if mode is Rounding.STOCHASTIC else mode,
        _member(Overflow, "overflow", overflow),
    )


def check_random_bits(stochastic_bits: int) -> int:
    """N itself; ValueError unless it is in 1..32."""
    if not 1 <= stochastic_bits <= MAX_RANDOM_BITS:
        raise ValueError(f"stochastic_bits must be 1..{MAX_RANDOM_BITS}, got {stochastic_bits}")
    return stochastic_bits


def check_overflow(name: str, has_inf: bool, has_nan: bool, overflow: Overflow) -> None:
    """ValueError for nonsaturating where there is nothing to overflow to."""
    if overflow is Overflow.NONSATURATING and not has_inf and not has_nan:
        raise ValueError(
            f"{name} has neither inf nor NaN to overflow to, so overflow='nonsaturating' means nothing: "
            f"use {', '.join(o for o in Overflow if o is not overflow)}"
        )


def _member(kind: type[Mode], what: str, value: str) -> Mode:
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"{what} must be one of {', '.join(kind)}, got {value!r}") from None
