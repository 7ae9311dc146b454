"""The fast ways to codes of FP32 arrays, and back: for each kind of format a pass or two, over blocks that stay in the cache.

Encoding, deterministic modes only. What none of these covers goes the general way, in `formats.codes`, and all give the same
codes:

    table      of at most 8 bits. Where every decision point (values, and the points that divide them) has zeros in the lower
               16 bits of its FP32 pattern, all inputs that share the upper 16 bits and differ only in a non-zero lower half
               lie strictly between the same two decision points. So 2 * upper + (lower != 0) determines the code, and a
               table of 2^17 codes, filled by the general encoder, holds them all.
    cut short  formats with FP32's exponents, bf16 among them, to nearest even: the upper bits of FP32's, with the lower ones
               rounded away by adding half of their range less one, and the last kept bit, so that ties go to even. A carry
               runs into the exponent, where it should. Blocks with NaN or values that overflow are done the general way.
    converted  bf16 and fp16, to nearest even, by a conversion that does it in one pass over memory, torch's (where torch is
               loaded) and NumPy's; what came out as infinity or NaN is done the general way.
    integers   the nearest, or a directed, integer between the ends.

Decoding: integers and formats cut short by a shift, fp16 by NumPy, all others of at most 16 bits by a table of their values.
"""

import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from formats.rounding import Overflow, Rounding

if TYPE_CHECKING:
    from formats.spec import ElementFormat

MIN_ELEMENTS = 1 << 16
BLOCK = 1 << 13
LONG_BLOCK = 1 << 16
LOW = 0xFFFF
MANTISSA = 23  # FP32's
Array = npt.NDArray[Any]
Words = npt.NDArray[np.uint32]
DIRECTED = {
    Rounding.NEAREST_EVEN: np.rint,
    Rounding.TOWARD_ZERO: np.trunc,
    Rounding.TOWARD_POSITIVE: np.ceil,
    Rounding.TOWARD_NEGATIVE: np.floor,
}


def encode(
    f: "ElementFormat", x: npt.NDArray[np.generic], mode: Rounding, over: Overflow
) -> npt.NDArray[np.unsignedinteger] | None:
    """The codes of an FP32 or FP16 array, or None where none of the ways is for it, or it has NaN without a code."""
    from formats.codes import code_dtype

    if x.dtype not in (np.float32, np.float16) or x.size < MIN_ELEMENTS or mode.is_stochastic:
        return None
    way = _way(f, mode, over)
    if way is None:
        return None
    flat = np.ascontiguousarray(x, np.float32).reshape(-1)
    codes = np.empty(flat.shape, code_dtype(f.bits))
    return codes.reshape(x.shape) if way(f, flat, codes, mode, over) else None


def _way(f: "ElementFormat", mode: Rounding, over: Overflow) -> Callable[..., bool] | None:
    from formats.integers import IntegerFormat

    if isinstance(f, IntegerFormat):
        return _integers if mode in DIRECTED else None
    if f.bits <= 8 and _is_decided(f):
        return _by_table
    if mode is Rounding.NEAREST_EVEN and over in (Overflow.SATURATE, Overflow.NONSATURATING):
        return _cut_short if is_fp32_cut_short(f) else _halved if is_fp16(f) else None
    return None


def _blocks(n: int, block: int = BLOCK) -> Iterator[slice]:
    return (slice(start, min(start + block, n)) for start in range(0, n, block))


def _by_table(f: "ElementFormat", flat: Array, codes: Array, mode: Rounding, over: Overflow) -> bool:
    table = _table(f, mode, over)
    words = flat.view(np.uint32)
    upper, lower = np.empty(BLOCK, np.uint32), np.empty(BLOCK, np.uint32)
    places = np.empty(BLOCK, np.intp)
    for part in _blocks(len(flat)):
        piece = words[part]
        n = len(piece)
        if f.nan_code is None and np.isnan(flat[part].max()):
            return False
        np.bitwise_and(piece, LOW, out=lower[:n])
        np.minimum(lower[:n], 1, out=lower[:n])
        np.right_shift(piece, 15, out=upper[:n])
        np.bitwise_and(upper[:n], ~np.uint32(1), out=upper[:n])
        np.bitwise_or(upper[:n], lower[:n], out=places[:n])
        np.take(table, places[:n], out=codes[part], mode="wrap")
    return True


def _cut_short(f: "ElementFormat", flat: Array, codes: Array, mode: Rounding, over: Overflow) -> bool:
    if f.bits == 16 and is_torchs(flat) and torch_rounds_to_bf16():
        import torch

        theirs, x = torch.from_numpy(codes).view(torch.bfloat16), torch.from_numpy(flat)
        for part in _blocks(len(flat), 4 * LONG_BLOCK):
            theirs[part].copy_(x[part])
            _mend(f, flat[part], codes[part], mode, over)
        return True
    words = flat.view(np.uint32)
    room = np.empty(LONG_BLOCK, np.uint32)
    # From here on it rounds beyond the largest value; negative patterns are higher by the sign bit.
    drop = 32 - f.bits
    limit = ((f.inf_code or 0) << drop) - (1 << (drop - 1))
    for part in _blocks(len(flat), LONG_BLOCK):
        piece = words[part]
        if int(piece.view(np.int32).max()) >= limit or int(piece.max()) >= limit + (1 << 31):
            codes[part] = _general(f, flat[part], mode, over)
        else:
            _cut(piece, drop, room[: len(piece)], codes[part])
    return True


def _cut(words: Words, drop: int, room: Words, codes: Array) -> None:
    """The words' upper bits, the lower `drop` rounded to nearest even."""
    np.right_shift(words, drop, out=room)
    np.bitwise_and(room, 1, out=room)
    np.add(room, words, out=room)
    np.add(room, (1 << (drop - 1)) - 1, out=room)
    np.right_shift(room, drop, out=codes, casting="unsafe")


def torch_rounds_to_bf16() -> bool:
    """Whether torch is loaded, and its conversion rounds to nearest even, subnormals too.

    It is checked, not trusted: processors have an instruction for it that flushes subnormals to zero.
    """
    return "torch" in sys.modules and _torch_agrees()


def is_torchs(array: Array) -> bool:
    """Whether torch takes the array as it is: it has no negative strides, and warns of arrays that are read-only."""
    return array.flags.c_contiguous and array.flags.writeable


@lru_cache(maxsize=1)
def _torch_agrees() -> bool:
    import torch

    upper = np.arange(1 << 16, dtype=np.uint32)
    upper = upper[(upper & 0x7F80) != 0x7F80] << 16
    words = np.concatenate([upper | lower for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, LOW)])
    codes = np.empty(len(words), np.uint16)
    _cut(words, 16, np.empty_like(words), codes)
    theirs = torch.from_numpy(words.view(np.float32)).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    return bool(np.array_equal(codes, theirs))


def _halved(f: "ElementFormat", flat: Array, codes: Array, mode: Rounding, over: Overflow) -> bool:
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for part in _blocks(len(flat), LONG_BLOCK):
            codes[part].view(np.float16)[:] = flat[part]
            _mend(f, flat[part], codes[part], mode, over)
    return True


def _mend(f: "ElementFormat", flat: Array, codes: Array, mode: Rounding, over: Overflow) -> None:
    """Encode again what became infinity or NaN: saturation and the canonical NaN are ours."""
    assert f.inf_code is not None
    if int(codes.view(np.int16).max()) < f.inf_code and int(codes.max()) < f.inf_code + (1 << 15):
        return
    places = np.flatnonzero((codes & 0x7FFF) >= f.inf_code)
    codes[places] = _general(f, flat[places], mode, over)


def _integers(f: "ElementFormat", flat: Array, codes: Array, mode: Rounding, over: Overflow) -> bool:  # noqa: ARG001
    from formats.integers import IntegerFormat

    assert isinstance(f, IntegerFormat)
    half = 1 << (f.bits - 1)
    room = np.empty(LONG_BLOCK, np.float32)
    signed = codes.view(np.int8 if f.bits <= 8 else np.int16)
    for part in _blocks(len(flat), LONG_BLOCK):
        piece, t = flat[part], room[: len(codes[part])]
        if f.fraction_bits:
            with np.errstate(over="ignore"):  # to infinity, and so to the end
                piece = np.multiply(piece, np.float32(2.0**f.fraction_bits), out=t)
        np.clip(piece, -half, half - 1, out=t)
        if np.isnan(t.max()):
            return False
        DIRECTED[mode](t, out=t)
        signed[part] = t
        if f.bits not in (8, 16):
            codes[part] &= (1 << f.bits) - 1
    return True


def _general(f: "ElementFormat", x: Array, mode: Rounding, over: Overflow) -> Array:
    return f.encode(x.astype(np.float64), mode, over)


@lru_cache(maxsize=64)
def is_fp32_cut_short(f: "ElementFormat") -> bool:
    """Whether its codes are the upper bits of FP32's."""
    from formats.names import float_format
    from formats.spec import FloatFormat

    fp32 = float_format("fp32")
    alike = isinstance(f, FloatFormat) and (f.exponent_bits, f.bias, f.specials) == (8, fp32.bias, fp32.specials)
    return alike and isinstance(f, FloatFormat) and f.subnormals and f.mantissa_bits < MANTISSA


@lru_cache(maxsize=64)
def is_fp16(f: "ElementFormat") -> bool:
    """Whether its codes are NumPy's half precision."""
    from formats.names import float_format

    return f == float_format("fp16")


@lru_cache(maxsize=64)
def _is_decided(f: "ElementFormat") -> bool:
    """Whether every value and every point between two has an FP32 pattern that ends in 16 zeros."""
    values = f.grid()
    after = values[-1:] + np.diff(values[-2:])
    points = np.concatenate([values, (values[1:] + values[:-1]) / 2, after, (values[-1:] + after) / 2])
    with np.errstate(over="ignore"):
        in_fp32 = points.astype(np.float32)
    return bool(np.all(in_fp32 == points) and not np.any(in_fp32.view(np.uint32) & LOW))


@lru_cache(maxsize=32)
def _table(f: "ElementFormat", mode: Rounding, over: Overflow) -> npt.NDArray[np.uint8]:
    patterns = np.arange(1 << 16, dtype=np.uint32) << 16
    fp32 = np.stack([patterns, patterns | 1], axis=1).reshape(-1).view(np.float32)
    with np.errstate(invalid="ignore"):  # signalling NaN
        x = fp32.astype(np.float64)
    if f.nan_code is None:
        x = np.where(np.isnan(x), 0.0, x)
    return np.asarray(f.encode(x, mode, over), np.uint8)


def decode(
    f: "ElementFormat", codes: npt.NDArray[np.integer], values: npt.NDArray[np.float64], dtype: np.dtype[Any]
) -> Array:
    """The values of codes that are in range, of any shape, in `dtype`, which holds them; `values` are those of all codes."""
    from formats.integers import IntegerFormat

    flat = codes.reshape(-1)
    out = np.empty(flat.shape, dtype)
    if isinstance(f, IntegerFormat):
        _decode_integers(f, flat, out)
    elif is_fp32_cut_short(f):
        _decode_cut_short(f, flat, out)
    elif is_fp16(f) and flat.dtype == np.uint16:
        out[:] = flat.view(np.float16)
    else:
        table = values.astype(dtype)
        places = np.empty(BLOCK, np.intp)
        for part in _blocks(len(flat)):
            at = places[: len(flat[part])]
            np.copyto(at, flat[part], casting="unsafe")
            np.take(table, at, out=out[part], mode="wrap")
    return out.reshape(codes.shape)


def _decode_integers(f: Any, flat: Array, out: Array) -> None:
    narrow, whole = (np.uint8, np.int8) if f.bits <= 8 else (np.uint16, np.int16)
    half = 1 << (f.bits - 1)
    room = np.empty(LONG_BLOCK, narrow)
    for part in _blocks(len(flat), LONG_BLOCK):
        t = room[: len(out[part])]
        piece = flat[part]
        if piece.dtype != narrow:
            np.copyto(t, piece, casting="unsafe")
            piece = t
        np.bitwise_xor(piece, half, out=t)  # the sign bit counts -half: 0 is -half now
        np.subtract(t, half, out=t)
        if f.fraction_bits:
            np.multiply(t.view(whole), out.dtype.type(2.0**-f.fraction_bits), out=out[part], dtype=out.dtype)
        else:
            np.copyto(out[part], t.view(whole))


def _decode_cut_short(f: Any, flat: Array, out: Array) -> None:
    if (
        f.bits == 16
        and flat.dtype == np.uint16
        and out.dtype != np.float16
        and is_torchs(flat)
        and torch_rounds_to_bf16()
    ):
        import torch

        torch.from_numpy(out).copy_(torch.from_numpy(flat.view(np.int16)).view(torch.bfloat16))
        return
    up = 32 - f.bits
    room = np.empty(BLOCK, np.uint32)
    with np.errstate(invalid="ignore"):  # signalling NaN
        for part in _blocks(len(flat)):
            t = out[part].view(np.uint32) if out.dtype == np.float32 else room[: len(out[part])]
            np.copyto(t, flat[part], casting="unsafe")
            np.left_shift(t, up, out=t)
            if out.dtype != np.float32:
                np.copyto(out[part], t.view(np.float32), casting="same_kind")
