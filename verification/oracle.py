"""What is right, worked out from the definition by mpmath, sharing no code with what is tested.

Only a format's parameters are read, never its decoder, grid or reference; of a list of values, the list. mpmath gives each
finite value and each midpoint once, and the next value that an exponent without end would have. A rounding is a step function:
x lies between two neighbours, and the mode decides by comparing it with the middle, with the neighbours, by the parity of their
codes or, for a stochastic mode, with the one threshold that its random number picks. All of these are float64 numbers,
exactly, so comparing float64 numbers is comparing rationals.

What becomes of values beyond the ends is a table of its own, written from OCP OFP8 (5.2.1, saturating and not) and from the table
of P3109 4.0, 4.7.5.
"""

from contextlib import nullcontext
from fractions import Fraction
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import mpmath
import numpy as np
import numpy.typing as npt

from formats import ElementFormat, FloatFormat, GridFormat, IntegerFormat

MAX_BITS = 20
INFINITY = float("inf")
NAN = float("nan")
Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.int64]


def value(f: ElementFormat, code: int) -> mpmath.mpf:
    """The value of a code, special ones included, by the format's own standard."""
    if isinstance(f, IntegerFormat):
        signed = code - 2**f.width if code >= 2 ** (f.width - 1) else code
        return mpmath.mpf(signed) / 2**f.fraction_bits
    if isinstance(f, GridFormat):
        if code not in _places(f):
            raise ValueError(f"{f.name}: no value has code {code}")
        with mpmath.workprec(400):
            return _ratio(f.values[_places(f)[code]])
    assert isinstance(f, FloatFormat)
    width = f.exponent_bits + f.mantissa_bits
    magnitude, sign = code % 2**width, -1 if f.signed and code >= 2**width else 1
    top = 2**width - 1
    specials = {
        # IEEE 754-2019 3.4; OCP OFP8 table 1; P3109 4.0, 4.7.2.
        "ieee": lambda m: (
            None if m < top + 1 - 2**f.mantissa_bits else INFINITY if m % 2**f.mantissa_bits == 0 else NAN
        ),
        "fn": lambda m: NAN if m == top else None,
        "finite": lambda _: None,
        "fnuz": lambda m: NAN if sign < 0 and not m else None,
        "extended": lambda m: (
            (NAN if sign < 0 and not m else INFINITY if m == top else None)
            if f.signed
            else {top: NAN, top - 1: INFINITY}.get(m)
        ),
    }
    special = specials[f.specials](magnitude)
    if special is not None:
        return sign * mpmath.mpf(special)
    return sign * _finite(f, magnitude)


@cache
def _places(f: GridFormat) -> dict[int, int]:
    """Where in the list each code's value is."""
    return {code: place for place, code in enumerate(f.codes)}


def _ratio(number: Fraction) -> mpmath.mpf:
    return mpmath.mpf(number.numerator) / number.denominator


def _finite(f: FloatFormat, magnitude: int) -> mpmath.mpf:
    """The value of a magnitude code as if none were special, and as if fields went on for ever."""
    field, mantissa = divmod(magnitude, 2**f.mantissa_bits)
    with nullcontext() if mpmath.mp.prec >= 100 else mpmath.workprec(100):
        fraction = mpmath.mpf(mantissa) / 2**f.mantissa_bits
        if f.zero and magnitude == 0:
            return mpmath.mpf(0)
        if f.subnormals and f.zero and field == 0:
            return fraction * _power(1 - f.bias)
        return (1 + fraction) * _power(field - f.bias)


@cache
def _power(exponent: int) -> mpmath.mpf:
    return mpmath.mpf(2) ** exponent


class Table(NamedTuple):
    """Every value, ascending, float64; where neighbours divide; the parity of codes. Both ends may be phantoms.

    phantoms: whether the first and last entries are no values of the format but the next that there would be.
    """

    entries: Floats
    middles: Floats
    is_odd: Flags
    phantoms: bool


@cache
def table(f: ElementFormat) -> Table:
    """The format as a list. ArithmeticError where float64 does not hold it, ValueError where it is too long."""
    if f.bits > MAX_BITS:
        raise ValueError(f"{f.name} is too wide to list its values: at most {MAX_BITS} bits")
    if isinstance(f, GridFormat):
        return _listed(f)
    if isinstance(f, IntegerFormat):
        half = 2 ** (f.width - 1)
        return _table([mpmath.mpf(k) / 2**f.fraction_bits for k in range(-half - 1, half + 1)], first_is_odd=True)
    assert isinstance(f, FloatFormat)
    sign_bit = 2 ** (f.exponent_bits + f.mantissa_bits)
    with mpmath.workprec(100):
        positive = [value(f, code) for code in range(sign_bit)]
        finite = [v for v in positive if mpmath.isfinite(v)]
        finite.append(_finite(f, len(finite)))
    if not f.zero:
        # Below the smallest value there is none: what lies there rounds to it, and a negative number is beyond.
        return _table([finite[0] - 1, *finite], first_is_odd=True)
    if not f.signed:
        return _table([-finite[1], *finite], first_is_odd=True)
    half = _table(finite, first_is_odd=False)
    both = (np.concatenate([-half.entries[:0:-1], half.entries]), np.concatenate([-half.middles[::-1], half.middles]))
    for array in both:
        array.setflags(write=False)  # it is shared through the cache
    return Table(*both, np.concatenate([half.is_odd[:0:-1], half.is_odd]), phantoms=True)


def _table(values: list[mpmath.mpf], *, first_is_odd: bool) -> Table:
    with mpmath.workprec(100):
        middles = [(low + high) / 2 for low, high in pairwise(values)]
        # A phantom that float64 does not reach is as good at infinity: nothing finite gets there.
        reachable = mpmath.mpf(2) ** 1024
        values = [v if abs(v) < reachable else mpmath.sign(v) * mpmath.inf for v in values]
    is_odd = (np.arange(len(values)) % 2 == 1) ^ first_is_odd
    return Table(_exactly(values), _exactly(middles), is_odd, phantoms=True)


def _listed(f: GridFormat) -> Table:
    with mpmath.workprec(400):
        entries, dividers = [_ratio(v) for v in f.values], [_ratio(d) for d in f.dividers]
    return Table(
        _exactly(entries),
        _exactly(dividers, strictly=False),
        np.array([code % 2 == 1 for code in f.codes]),
        phantoms=False,
    )


def _exactly(values: list[mpmath.mpf], *, strictly: bool = True) -> Floats:
    with mpmath.workprec(400):
        floats = [float(v) for v in values]
        inexact = any(v != near for v, near in zip(values, floats, strict=True))
    array = np.array(floats, np.float64)
    with np.errstate(invalid="ignore"):
        steps = np.diff(array)
    if inexact or np.any(steps <= 0 if strictly else steps < 0):
        raise ArithmeticError("float64 does not hold these values, or they do not ascend")
    array.setflags(write=False)  # it is shared through the cache
    return array


def finite_values(f: ElementFormat) -> Floats:
    """Every finite value, ascending."""
    listed = table(f)
    return listed.entries[1:-1] if listed.phantoms else listed.entries


def values(f: ElementFormat) -> Floats:
    """Every finite value from 0 up, so that a value's index is its code, for formats whose codes ascend so."""
    every = finite_values(f)
    return every[every >= 0]


def decision_points(f: ElementFormat, rounding: str) -> Floats:
    """Where the result steps from non-negative value i to value i + 1, for each i: between the two, or at the second."""
    positive = values(f)
    if rounding == "nearest_even":
        listed = table(f)
        inner = listed.middles[1:-1] if listed.phantoms else listed.middles
        return inner[len(inner) - len(positive) + 1 :]
    return {"toward_zero": positive[1:]}[rounding]


def expected(
    f: ElementFormat,
    rounding: str,
    x: Floats,
    overflow: str = "saturate",
    random: Integers | None = None,
    random_width: int = 0,
) -> Floats:
    """What x, float64 of any shape, rounds to: NaN for NaN, zeros with the sign that the format gives them.

    random: of x's shape, for stochastic modes, numbers of random_width bits.
    """
    listed = table(f)
    last = len(listed.entries) - 1
    finite = np.where(np.isfinite(x), x, 0.0)
    low = np.clip(np.searchsorted(listed.entries, finite, side="right") - 1, 0, last - 1)
    up = _goes_up(f, listed, rounding, finite, low, random, random_width)
    at = low + up
    at = np.where(finite <= listed.entries[0], 0, np.where(finite >= listed.entries[-1], last, at))
    at = np.where(x == INFINITY, last, np.where(x == -INFINITY, 0, at))
    result = listed.entries[at]
    if listed.phantoms:
        if not getattr(f, "zero", True):  # what is not negative stays
            at = np.where((at == 0) & (x >= 0), 1, at)
            at = np.where(x < 0, 0, at)
            result = listed.entries[at]
        for below, end in ((True, 0), (False, last)):
            for infinite in (True, False):
                chosen = (at == end) & (np.isinf(x) == infinite)
                result = np.where(chosen, beyond(f, rounding, overflow, below=below, infinite=infinite), result)
    else:
        for below in (True, False):
            chosen = x == (-INFINITY if below else INFINITY)
            result = np.where(chosen, beyond(f, rounding, overflow, below=below, infinite=True), result)
    keeps_sign = isinstance(f, FloatFormat) and f.signed and f.specials in ("ieee", "fn", "finite")
    result = np.where(result == 0, np.copysign(0.0, x) if keeps_sign else 0.0, result)
    return np.where(np.isnan(x), np.nan, result)


def _goes_up(
    f: ElementFormat,
    listed: Table,
    rounding: str,
    x: Floats,
    low: Integers,
    random: Integers | None,
    width: int,
) -> Flags:
    """Whether x, at or above its lower neighbour, goes to the higher one."""
    entries = listed.entries
    below, above, middle, odd = entries[low], entries[low + 1], listed.middles[low], listed.is_odd[low]
    inexact: Flags = x > below
    away: Flags
    if rounding == "nearest_even" and isinstance(f, FloatFormat) and not f.zero:
        rounding = "nearest_away"  # e8m0fnu, by custom; "nearest_even_code" is P3109's
    decisions = {
        "nearest_even": (x > middle) | ((x == middle) & odd),
        "nearest_even_code": (x > middle) | ((x == middle) & odd),
        "nearest_away": (x > middle) | ((x == middle) & (x > 0)),
        "toward_zero": x < 0,
        "toward_positive": np.ones_like(inexact),
        "toward_negative": np.zeros_like(inexact),
        "to_odd": ~odd,
    }
    if rounding in decisions:
        decided: Flags = decisions[rounding]
        return inexact & decided
    assert random is not None
    inner_is_high = above <= 0
    inner, outer = np.where(inner_is_high, above, below), np.where(inner_is_high, below, above)
    threshold, included = threshold_of(rounding, inner, outer, random, width)
    past = (x > threshold) ^ inner_is_high
    away = np.where(x == threshold, included, past)
    up: Flags = np.asarray(away ^ inner_is_high)
    return inexact & up


def threshold_of(rounding: str, inner: Floats, outer: Floats, random: Integers, width: int) -> tuple[Floats, Flags]:
    """From where on, seen from the inner neighbour, R sends x to the outer one, and whether that point itself goes.

    P3109 4.0, 4.7.4, solved for the share d of the way, with T = 2^N - R:

        A   floor(d 2^N) + R >= 2^N                  d >= T / 2^N
        B   floor(d 2^(N+1)) + 2R + 1 >= 2^(N+1)     d >= (2T - 1) / 2^(N+1)
        C   half_even(d 2^N) + R >= 2^N              d > (2T - 1) / 2^(N+1), and there itself if T is even
    """
    t = (1 << width) - random.astype(np.float64)
    share = t / 2.0**width if rounding == "stochastic_a" else (2 * t - 1) / 2.0 ** (width + 1)
    included = (t % 2 == 0) if rounding in ("stochastic", "stochastic_c") else np.ones(t.shape, np.bool_)
    return inner + share * (outer - inner), included


def beyond(f: ElementFormat, rounding: str, overflow: str, *, below: bool, infinite: bool) -> float:
    """What a value past an end becomes: finite values that rounded past it, or infinity itself."""
    every = finite_values(f)
    end = float(every[0] if below else every[-1])
    infinity = -INFINITY if below else INFINITY
    has_infinity = isinstance(f, FloatFormat) and f.specials in ("ieee", "extended")
    is_signed = not isinstance(f, FloatFormat) or f.signed
    inward = rounding in ("toward_zero", "toward_positive" if below else "toward_negative")
    if overflow == "saturate" or (
        overflow == "propagate" and not (infinite and has_infinity and (is_signed or not below))
    ):
        return end
    if overflow == "propagate":
        return infinity
    if overflow == "nonsaturating":
        if (inward or rounding == "to_odd") and not infinite:
            return end
        return infinity if has_infinity and (is_signed or not below) else NAN
    rows = [  # P3109 4.0, 4.7.5, SatNone, the first row that applies
        (infinite and has_infinity and (is_signed or not below), infinity),
        (infinite and not is_signed and below, NAN),
        (infinite, end),
        (rounding == "to_odd" and not is_signed and has_infinity and not below, end),
        (inward, end),
        (not is_signed and below, NAN),
        (has_infinity, infinity),
        (True, end),
    ]
    return next(result for applies, result in rows if applies)
