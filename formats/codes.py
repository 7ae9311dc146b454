"""Codes to values and back for whole arrays, in NumPy integers: bit fields of float64 in, bit fields of the format out.

Nothing here calls the rational reference, so that each can be held against the other. The steps of `encode`:

    1. magnitude   |x| is between two neighbours; the code of the one nearer zero, and what is left over, exactly.
    2. away        each mode decides from the left-over, the code's parity and the sign whether to take the next code.
    3. beyond      codes past the last finite one, and infinities, become what `overflow` says.
    4. sign, NaN   put back.

A list of values (`GridFormat`) has no bit fields; there the neighbours are found by bisection. `formats.tables` has the fast ways
for large FP32 arrays, and for decoding.
"""

from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from formats.overflow import Outcome, outcome
from formats.rounding import Rounding, check_modes, check_overflow, check_random_bits

if TYPE_CHECKING:
    from formats.lists import GridFormat
    from formats.rounding import Overflow
    from formats.spec import ElementFormat, FloatFormat

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

MANTISSA = 52  # float64's
BIAS = 1023
EMIN = -1022
TABLE_BITS = 16


def code_dtype(bits: int) -> type[np.unsignedinteger]:
    """The narrowest unsigned integer of 8, 16, 32 or 64 bits for a code."""
    return np.uint8 if bits <= 8 else np.uint16 if bits <= 16 else np.uint32 if bits <= 32 else np.uint64


def decode(f: "ElementFormat", codes: npt.ArrayLike, dtype: npt.DTypeLike = np.float64) -> npt.NDArray[Any]:
    """Values of integer codes, any shape, in float64, float32 or float16; see ElementFormat.decode.

    ValueError for codes out of range, and for a dtype that does not hold all of the format's values.
    """
    from formats import tables

    array = np.asarray(codes)
    kind = _check_holds(f, np.dtype(dtype))
    narrow = array.dtype.kind == "u" and array.dtype.itemsize * 8 <= f.bits
    if array.dtype.kind not in "iu" or (
        array.size and not narrow and not 0 <= _lowest(array) <= int(array.max()) < 1 << f.bits
    ):
        raise ValueError(f"{f.name}: codes must be integers in 0..{(1 << f.bits) - 1}")
    if f.bits <= TABLE_BITS:
        return tables.decode(f, array, table(f), kind)
    return _decode_fields(_as_float(f), array).astype(kind)


def _lowest(array: npt.NDArray[Any]) -> int:
    return 0 if array.dtype.kind == "u" else int(array.min())


def _check_holds(f: "ElementFormat", dtype: np.dtype[np.generic]) -> np.dtype[np.floating]:
    kinds = {np.dtype(np.float64): "fp64", np.dtype(np.float32): "fp32", np.dtype(np.float16): "fp16"}
    if dtype not in kinds:
        raise ValueError(f"dtype must be float64, float32 or float16, got {dtype}")
    if dtype != np.float64 and not _holds(kinds[dtype], f):
        raise ValueError(f"{f.name} does not fit {dtype}, which can't hold all of its values; use a wider one")
    return np.dtype(f"f{dtype.itemsize}")


@lru_cache(maxsize=256)
def _holds(carrier: str, f: "ElementFormat") -> bool:
    from formats.names import float_format

    return float_format(carrier).holds(f)


@lru_cache(maxsize=64)
def table(f: "ElementFormat") -> Floats:
    """The value of every code, float64 [2^bits]. NaN for a code that stands for nothing."""
    from formats.spec import FloatFormat

    if isinstance(f, FloatFormat):
        values = _decode_fields(f, np.arange(1 << f.bits))
    else:
        values = np.full(1 << f.bits, np.nan)
        for code in f.finite_codes:
            value = Fraction(f.decode_exact(int(code)))
            values[code] = float(value)
            if Fraction(values[code]) != value:
                raise ValueError(f"{f.name}: float64 can't hold {value}; use decode_exact, in rationals")
    values.setflags(write=False)
    return values


def _as_float(f: "ElementFormat") -> "FloatFormat":
    from formats.spec import FloatFormat

    assert isinstance(f, FloatFormat)  # no other kind is so wide
    return f


def _decode_fields(f: "FloatFormat", codes: npt.NDArray[np.integer]) -> Floats:
    gradual = f.subnormals and f.zero
    finest = (1 if gradual else 0) - f.bias - f.mantissa_bits
    if f.emax > 1023 or (finest < -1074 and f.smallest < Fraction(2) ** -1074):
        raise ValueError(f"{f.name}: float64 can't hold its values, up to 2^{f.emax}; use decode_exact, in rationals")
    wide = codes.astype(np.int64)
    field_bits = f.exponent_bits + f.mantissa_bits
    magnitude = wide & ((1 << field_bits) - 1)
    k = magnitude >> f.mantissa_bits
    hidden = np.minimum(k, 1) if gradual else np.int64(1)
    significand = (hidden << f.mantissa_bits) | (magnitude & ((1 << f.mantissa_bits) - 1))
    value = np.ldexp(significand.astype(np.float64), np.where(gradual, np.maximum(k, 1), k) - f.bias - f.mantissa_bits)
    if f.zero:
        value = np.where(magnitude == 0, 0.0, value)
    value = np.where(magnitude > f.max_code, np.nan, value)
    if f.inf_code is not None:
        value = np.where(magnitude == f.inf_code, np.inf, value)
    if f.signed:
        value = np.where(wide >> field_bits & 1 == 1, -value, value)
        if not f.has_negative_zero:
            value = np.where(wide == 1 << field_bits, np.nan, value)
    return np.asarray(value, np.float64)


class _Between(NamedTuple):
    """Where |x| lies: the code of the neighbour nearer zero, whether it is that value, how it compares with the middle.

    And the share of the way to the next code as a pair left / whole.
    """

    code: Integers
    exact: Flags
    past_middle: npt.NDArray[np.int8]
    left: Floats
    whole: Floats


def encode(
    f: "ElementFormat",
    values: npt.ArrayLike,
    rounding: str,
    overflow: str,
    random_bits: npt.ArrayLike | None,
    stochastic_bits: int,
) -> npt.NDArray[np.unsignedinteger]:
    """Codes of values, any shape, rounded once from float64's bits; see ElementFormat.encode."""
    from formats import tables
    from formats.lists import GridFormat

    mode, over = check_modes(rounding, overflow)
    check_overflow(f.name, f.has_inf, f.has_nan, over)
    random = _random(f, mode, random_bits, check_random_bits(stochastic_bits))
    array = np.asarray(values)
    _check_exact(f, array)
    looked_up = tables.encode(f, array, mode, over)
    if looked_up is not None:
        return looked_up
    x = array.astype(np.float64)
    nan = np.isnan(x)
    if f.nan_code is None and nan.any():
        raise ValueError(f"{f.name} has no NaN, and {int(nan.sum())} of the values are NaN; replace them first")
    if isinstance(f, GridFormat):
        found = _in_list(f, np.where(nan, 0.0, x), mode, over, random, stochastic_bits)
    else:
        found = _in_fields(f, np.where(nan, 0.0, x), mode, over, random, stochastic_bits)
    codes = np.where(nan, f.nan_code, found) if f.nan_code is not None else found
    return np.asarray(codes, code_dtype(f.bits))


def _in_fields(
    f: "ElementFormat", x: Floats, mode: Rounding, over: "Overflow", random: Integers | None, bits: int
) -> Integers:
    from formats.integers import IntegerFormat

    negative = np.signbit(x)
    infinite = np.isinf(x)
    finite = np.where(infinite, 0.0, np.abs(x))
    integer = isinstance(f, IntegerFormat)
    between = _integer_neighbours(f, finite) if integer else _neighbours(_as_float(f), finite)
    magnitude = between.code + _away(f, mode, between, negative, random, bits)
    ends = [_end(f, negative=False), _end(f, negative=True)]
    limit = np.where(negative, ends[1][0], ends[0][0])
    beyond = (magnitude > limit) | infinite
    if not f.signed and not _as_float(f).zero:
        beyond |= x < 0  # whatever its size, it rounds to no value
    if integer:
        width = (1 << f.bits) - 1
        codes = np.where(negative, -magnitude, magnitude) & width
    else:
        keeps_sign = negative & f.signed & (f.has_negative_zero | (magnitude > 0))
        codes = magnitude | (keeps_sign.astype(np.int64) << (f.bits - 1))
    if not beyond.any():
        return codes
    for is_negative in (False, True):
        for is_infinite in (False, True):
            chosen = beyond & (negative == is_negative) & (infinite == is_infinite)
            codes = np.where(chosen, _beyond(f, mode, over, is_negative, is_infinite), codes)
    return codes


def _end(f: "ElementFormat", *, negative: bool) -> tuple[int, int]:
    """The end's magnitude code, counted from zero, and its code."""
    from formats.integers import IntegerFormat

    if isinstance(f, IntegerFormat):
        half = 1 << (f.bits - 1)
        return (half, half) if negative else (half - 1, half - 1)
    float_format = _as_float(f)
    if not negative:
        return float_format.max_code, float_format.max_code
    return (float_format.max_code, float_format.max_code | 1 << (f.bits - 1)) if f.signed else (0, 0)


def _beyond(f: "ElementFormat", mode: Rounding, over: "Overflow", negative: bool, infinite: bool) -> int:
    """The code of what is left of a value past an end."""
    left = outcome(f, mode, over, negative=negative, infinite=infinite)
    if left is Outcome.NAN:
        assert f.nan_code is not None
        return f.nan_code
    if left is Outcome.INFINITY:
        assert f.inf_code is not None
        return f.inf_code | (1 << (f.bits - 1) if negative else 0)
    return _end(f, negative=negative)[1]


def _neighbours(f: "FloatFormat", magnitude: Floats) -> _Between:
    """In the format's own fields, as if exponents went on for ever."""
    gradual = f.subnormals and f.zero
    if f.emin < EMIN:  # float64's subnormals may be normal here
        fraction, exponent = np.frexp(magnitude)
        significand = np.ldexp(fraction, MANTISSA + 1).astype(np.int64)
        exponent = np.where(significand == 0, f.emin, exponent.astype(np.int64) - 1)
    else:
        bits: Integers = magnitude.view(np.int64)
        field = bits >> MANTISSA
        # |x| = significand * 2^(exponent - 52); zero and float64's own subnormals share the exponent of field 1 and lack
        # the hidden bit.
        significand = (bits & ((1 << MANTISSA) - 1)) | (np.minimum(field, 1) << MANTISSA)
        exponent = np.maximum(field, 1) - BIAS
    binade = np.maximum(exponent, f.emin)
    # So many low bits lie below the quantum 2^(binade - M). Past 62 of them |x| is far under half of it.
    drop = np.minimum(MANTISSA - f.mantissa_bits + binade - exponent, 62)
    kept = significand >> drop
    rest = significand - (kept << drop)
    # The hidden bit, counted in `kept`, is the 1 that lifts a code from the field before.
    code = kept + ((binade - f.emin - (not gradual)) << f.mantissa_bits)
    half = np.left_shift(np.int64(1), np.maximum(drop - 1, 0))
    past_middle = np.where(drop > 0, np.sign(rest - half), -1).astype(np.int8)
    left, whole = rest.astype(np.float64), np.ldexp(1.0, drop)
    if drop.size and int(drop.max()) == 62:  # shares that small matter to stochastic modes, exactly
        exact_drop = MANTISSA - f.mantissa_bits + binade - exponent
        left = np.ldexp(left, np.clip(62 - exact_drop, -900, 0))
    if gradual:
        return _Between(code, rest == 0, past_middle, left, whole)
    # Below the smallest value there is zero, or nothing: then that value is the nearest.
    smallest = float(f.smallest)
    below = magnitude < smallest
    small_left = magnitude if f.zero else np.zeros_like(magnitude)
    return _Between(
        np.where(below, 0, code),
        np.where(below, small_left == 0, rest == 0),
        np.where(below, np.sign(small_left - smallest / 2), past_middle).astype(np.int8),
        np.where(below, small_left, left),
        np.where(below, smallest, whole),
    )


def _integer_neighbours(f: "ElementFormat", magnitude: Floats) -> _Between:
    from formats.integers import IntegerFormat

    assert isinstance(f, IntegerFormat)
    scaled = np.ldexp(np.minimum(magnitude, 2.0**20), f.fraction_bits)
    code = np.floor(scaled)
    left = scaled - code
    return _Between(code.astype(np.int64), left == 0, np.sign(left - 0.5).astype(np.int8), left, np.ones_like(left))


def _away(
    f: "ElementFormat", mode: Rounding, between: _Between, negative: Flags, random: Integers | None, bits: int
) -> Flags:
    """Whether to go to the neighbour away from zero."""
    inexact: Flags = ~between.exact
    is_odd: Flags = np.asarray(between.code & 1 == 1)
    if mode is Rounding.NEAREST_AWAY or (mode is Rounding.NEAREST_EVEN and f.ties_away):
        past: Flags = np.asarray(between.past_middle >= 0)
        return inexact & past
    if mode is Rounding.NEAREST_EVEN:
        nearer: Flags = np.asarray((between.past_middle > 0) | ((between.past_middle == 0) & is_odd))
        return inexact & nearer
    if mode is Rounding.TO_ODD:
        return inexact & ~is_odd
    if mode is Rounding.TOWARD_POSITIVE:
        return inexact & ~negative
    if mode is Rounding.TOWARD_NEGATIVE:
        return inexact & negative
    if mode is Rounding.TOWARD_ZERO:
        return np.zeros_like(inexact)
    assert random is not None
    return inexact & _goes_away(mode, between.left, between.whole, np.broadcast_to(random, inexact.shape), bits)


def _goes_away(mode: Rounding, left: Floats, whole: Floats, random: Integers, bits: int) -> Flags:
    """The stochastic decision for a share left / whole of the way, exactly.

    Each of the three rules is a threshold k / 2^(N+1) on the share, itself included or not. FP64 decides all but the shares
    beside it, and Fractions those.
    """
    short = (1 << bits) - random
    if mode is Rounding.STOCHASTIC_A:
        k, included = 2 * short, np.ones(short.shape, np.bool_)
    elif mode is Rounding.STOCHASTIC_B:
        k, included = 2 * short - 1, np.ones(short.shape, np.bool_)
    else:
        k, included = 2 * short - 1, short % 2 == 0
    share = np.ldexp(left / whole, bits + 1)
    away: Flags = np.asarray(share > k)
    for place in np.argwhere(np.abs(share - k) < 2.0**-10):
        at = tuple(place)
        exact = Fraction(float(left[at])) / Fraction(float(whole[at])) * 2 ** (bits + 1)
        away[at] = exact > int(k[at]) or (exact == int(k[at]) and bool(included[at]))
    return away


def _in_list(
    f: "GridFormat", x: Floats, mode: Rounding, over: "Overflow", random: Integers | None, bits: int
) -> Integers:
    """Codes of float64 numbers in a list of values, by bisection."""
    values = f.grid()
    below = np.clip(np.searchsorted(values, x, side="right") - 1, 0, len(values) - 2)
    low, high = values[below], values[below + 1]
    exact = (x == low) | (x <= values[0])
    at_end = (x >= values[-1]) | (x <= values[0])
    codes = f.finite_codes
    if mode in (Rounding.NEAREST_EVEN, Rounding.NEAREST_AWAY):
        divide = np.array([float(divider) for divider in f.dividers])
        if any(Fraction(float(d)) != d for d in f.dividers):
            raise ValueError(
                f"{f.name}: float64 can't hold the points between its values; use round_exact, in rationals"
            )
        tie_up = codes[below + 1] & 1 == 0 if mode is Rounding.NEAREST_EVEN else x > 0
        up = (x > divide[below]) | ((x == divide[below]) & tie_up)
    elif mode is Rounding.TO_ODD:
        up = codes[below] & 1 == 0
    elif mode is Rounding.TOWARD_POSITIVE:
        up = np.ones_like(exact)
    elif mode is Rounding.TOWARD_NEGATIVE:
        up = np.zeros_like(exact)
    elif mode is Rounding.TOWARD_ZERO:
        up = high <= 0
    else:
        assert random is not None
        inner_is_high = high <= 0
        inner = np.where(inner_is_high, high, low)
        inside = np.clip(x, values[0], values[-1])
        up = _share_goes_away(mode, inside, inner, low, high, np.broadcast_to(random, x.shape), bits) ^ inner_is_high
    place = below + np.where(at_end, x >= values[-1], up & ~exact)
    found = codes[place]
    for negative in (False, True):
        if outcome(f, mode, over, negative=negative, infinite=True) is Outcome.NAN:
            found = np.where(np.isinf(x) & (np.signbit(x) == negative), f.nan_code, found)
    return np.asarray(found, np.int64)


def _share_goes_away(
    mode: Rounding, x: Floats, inner: Floats, low: Floats, high: Floats, random: Integers, bits: int
) -> Flags:
    """As _goes_away, for a share |x - inner| / (high - low) whose two differences FP64 may have to round."""
    short = (1 << bits) - random
    k = 2 * short - (0 if mode is Rounding.STOCHASTIC_A else 1)
    share = np.ldexp(np.abs(x - inner) / (high - low), bits + 1)
    away: Flags = np.asarray(share > k)
    for place in np.argwhere(np.abs(share - k) < 2.0**-10):
        at = tuple(place)
        left = abs(Fraction(float(x[at])) - Fraction(float(inner[at])))
        exact = left / (Fraction(float(high[at])) - Fraction(float(low[at]))) * 2 ** (bits + 1)
        included = mode is not Rounding.STOCHASTIC_C or int(short[at]) % 2 == 0
        away[at] = exact > int(k[at]) or (exact == int(k[at]) and included)
    return away


def _random(f: "ElementFormat", mode: Rounding, random_bits: npt.ArrayLike | None, bits: int) -> Integers | None:
    if not mode.is_stochastic:
        return None
    if random_bits is None:
        raise ValueError(
            f"{f.name}: {mode} needs random_bits, integers in 0..2^{bits} - 1 that broadcast against the values"
        )
    random = np.asarray(random_bits)
    if random.dtype.kind not in "iu" or (random.size and not 0 <= int(random.min()) <= int(random.max()) < 1 << bits):
        raise ValueError(
            f"{f.name}: random_bits must be integers in 0..2^{bits} - 1, the limit that stochastic_bits sets"
        )
    return random.astype(np.int64)


def _check_exact(f: "ElementFormat", array: npt.NDArray[np.generic]) -> None:
    exact_float = array.dtype.kind == "f" and array.dtype.itemsize <= 8
    exact_integer = array.dtype.kind in "iub" and (
        not array.size or max(int(array.max()), -int(array.min())) <= 1 << 53
    )
    if not (exact_float or exact_integer):
        raise ValueError(
            f"{f.name}: encode rounds once, from float64, which does not hold these {array.dtype} values exactly"
        )
