"""Numbers as bits: codes from values and back, small codes packed into bytes, and other libraries' dtypes without a copy.

`encode` and `decode` take arrays and tensors alike; the codes are the same. A code has a whole integer to itself, uint8 or
wider. `pack` puts 4-bit codes two to a byte, the first in the low half, as torch.float4_e2m1fn_x2 has them and NVIDIA's and
AMD's matrix instructions read them; and 6-bit codes four to three bytes, in little-endian bit order: element i is bits 6i to
6i + 5 of the row, counted from the lowest bit of its first byte. (OCP MX v1.0, section 5.1, leaves storage to the
implementation.)

Where torch or ml_dtypes has the format as a dtype, `view_as_values` makes codes a tensor or array of that dtype, and
`view_as_codes` makes codes of one, over the same memory:

    view_as_values(encode(x, "e4m3fn"), "e4m3fn")    a torch.float8_e4m3fn tensor, or an ml_dtypes.float8_e4m3fn array
    view_as_codes(x.bfloat16())                      its uint16 codes

torch has 4-bit floating point in pairs only, so there the codes are packed ones: view_as_values(pack(codes, 4), "e2m1fn").
"""

from typing import Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from formats import codes as _codes
from formats.names import as_element
from formats.random_bits import random_bits as make_random_bits
from formats.rounding import DEFAULT_RANDOM_BITS, Overflow, Rounding, check_modes
from formats.spec import ElementFormat
from formats.torch_codes import CODES, bits_of, decode_tensor, dtype_name, encode_tensor

Array = npt.NDArray[Any]
Codes = npt.NDArray[np.unsignedinteger]


class Dtypes(NamedTuple):
    """The dtypes of a format: torch's, and ml_dtypes' or, with `numpy_owns`, NumPy's own; None without one."""

    torch: str | None
    numpy: str | None
    numpy_owns: bool = False


DTYPES = {
    "e11m52": Dtypes("float64", "float64", True),
    "e8m23": Dtypes("float32", "float32", True),
    "e5m10": Dtypes("float16", "float16", True),
    "e8m7": Dtypes("bfloat16", "bfloat16"),
    "e5m2": Dtypes("float8_e5m2", "float8_e5m2"),
    "e4m3fn": Dtypes("float8_e4m3fn", "float8_e4m3fn"),
    "e5m2fnuz": Dtypes("float8_e5m2fnuz", "float8_e5m2fnuz"),
    "e4m3fnuz": Dtypes("float8_e4m3fnuz", "float8_e4m3fnuz"),
    "e8m0fnu": Dtypes("float8_e8m0fnu", "float8_e8m0fnu"),
    "e4m3": Dtypes(None, "float8_e4m3"),
    "e3m4": Dtypes(None, "float8_e3m4"),
    "e4m3fnuzb11": Dtypes(None, "float8_e4m3b11fnuz"),
    "e3m2f": Dtypes(None, "float6_e3m2fn"),
    "e2m3f": Dtypes(None, "float6_e2m3fn"),
    "e2m1f": Dtypes("float4_e2m1fn_x2", "float4_e2m1fn"),
    "int16": Dtypes("int16", "int16", True),
    "int8": Dtypes("int8", "int8", True),
    "int4": Dtypes(None, "int4"),
    "int2": Dtypes(None, "int2"),
}
"""By canonical name."""
PACKED = {4: (2, 1), 6: (4, 3)}
"""Elements to bytes."""


@overload
def encode(
    x: Tensor, f: ElementFormat | str, rounding: str = ..., overflow: str = ...,
    *, seed: int | Tensor | None = ..., random_bits: Tensor | None = ..., stochastic_bits: int = ...,
) -> Tensor: ...  # fmt: skip
@overload
def encode(
    x: npt.ArrayLike, f: ElementFormat | str, rounding: str = ..., overflow: str = ...,
    *, seed: int | None = ..., random_bits: npt.ArrayLike | None = ..., stochastic_bits: int = ...,
) -> Codes: ...  # fmt: skip
def encode(
    x: Any,
    f: ElementFormat | str,
    rounding: str = Rounding.NEAREST_EVEN,
    overflow: str = Overflow.SATURATE,
    *,
    seed: Any = None,
    random_bits: Any = None,
    stochastic_bits: int = DEFAULT_RANDOM_BITS,
) -> Any:
    """The codes of x, rounded once: a tensor of x's shape on its device, or an array.

    x: a tensor of float64, float32, bfloat16 or float16, which need not hold the format's values; or what `f.encode` takes.
    Codes are uint8 or uint16, and wider ones int32 or int64 in a tensor (their two's complement), uint32 or uint64 in an
    array. Random bits as for `quantize`, and the same ones for an array with the same int seed. NaN becomes `f.nan_code`. A
    format without NaN refuses it in an array; in a tensor, which the host does not look into, it becomes the code of the
    largest value.

    ValueError for another dtype, for modes that mean nothing to the format, and where float64 does not hold the format's
    values.
    """
    if isinstance(x, Tensor):
        return encode_tensor(
            x, _known_as(f), rounding, overflow,
            seed=seed, random_bits=random_bits, stochastic_bits=stochastic_bits,
        )  # fmt: skip
    described = as_element(f)
    if random_bits is None and seed is not None and check_modes(rounding, overflow)[0].is_stochastic:
        random_bits = make_random_bits(seed, np.shape(x), stochastic_bits).numpy()
    return described.encode(x, rounding, overflow, random_bits=random_bits, stochastic_bits=stochastic_bits)


@overload
def decode(codes: Tensor, f: ElementFormat | str, dtype: torch.dtype | None = ...) -> Tensor: ...
@overload
def decode(codes: npt.ArrayLike, f: ElementFormat | str, dtype: npt.DTypeLike | None = ...) -> Array: ...
def decode(codes: Any, f: ElementFormat | str, dtype: Any = None) -> Any:
    """The values of integer codes, exact, of the same shape.

    In a tensor of `dtype`, by default float32, or float64 where float32 does not hold the format; or in an array, by default of
    float64. Codes beyond the format's bits are refused in an array; in a tensor those bits are ignored. A code of a list
    that stands for nothing is NaN. ValueError for codes that are no integers, and for a dtype that does not hold all of the
    format's values.
    """
    if isinstance(codes, Tensor):
        return decode_tensor(codes, _known_as(f), dtype)
    return _codes.decode(as_element(f), codes, np.float64 if dtype is None else dtype)


def _known_as(f: ElementFormat | str) -> str:
    return f if isinstance(f, str) else f.canonical_name  # compiled programs know a format by name


@overload
def pack(codes: Tensor, f: ElementFormat | str | int) -> Tensor: ...
@overload
def pack(codes: npt.ArrayLike, f: ElementFormat | str | int) -> npt.NDArray[np.uint8]: ...
def pack(codes: Any, f: ElementFormat | str | int) -> Any:
    """Codes [..., n] of 4 or 6 bits to uint8 [..., n / 2] or [..., 3 n / 4]; `f` is the format or its number of bits.

    ValueError for another width, an n that is no multiple of 2 or 4, and in an array for codes that are wider; in a tensor
    their upper bits are ignored.
    """
    bits, elements, _ = _packing(f)
    is_tensor = isinstance(codes, Tensor)
    given: Any = codes if is_tensor else _checked(np.asarray(codes), bits)
    n = _last(given)
    if n % elements:
        raise ValueError(
            f"{bits}-bit codes are packed by {elements} along the last axis, and {n} is no multiple of that; "
            f"pad it to {-(-n // elements) * elements}"
        )
    wide = (given.to(torch.int32) if is_tensor else given.astype(np.uint32)) & ((1 << bits) - 1)
    grouped = wide.reshape(*given.shape[:-1], n // elements, elements)
    if bits == 4:
        packed = grouped[..., 0] | grouped[..., 1] << 4
    else:
        a, b, c, d = (grouped[..., i] for i in range(4))
        parts = [a | (b & 3) << 6, b >> 2 | (c & 15) << 4, c >> 4 | d << 2]
        stacked: Any = torch.stack(parts, -1) if is_tensor else np.stack(parts, -1)
        packed = stacked.reshape(*given.shape[:-1], n // 4 * 3)
    return packed.to(torch.uint8) if is_tensor else packed.astype(np.uint8)


@overload
def unpack(packed: Tensor, f: ElementFormat | str | int, count: int | None = ...) -> Tensor: ...
@overload
def unpack(packed: npt.ArrayLike, f: ElementFormat | str | int, count: int | None = ...) -> npt.NDArray[np.uint8]: ...
def unpack(packed: Any, f: ElementFormat | str | int, count: int | None = None) -> Any:
    """Codes, uint8 [..., count], of what `pack` made; `count`, by default all, leaves out what was padded.

    ValueError for bytes that are no uint8, for 6-bit codes whose bytes are no multiple of 3, and for a count that is not there.
    """
    bits, elements, size = _packing(f)
    is_tensor = isinstance(packed, Tensor)
    given: Any = packed if is_tensor else np.asarray(packed)
    if given.dtype != (torch.uint8 if is_tensor else np.uint8):
        raise ValueError(f"packed codes are bytes, uint8, got {given.dtype}; view them as that")
    n = _last(given)
    if n % size:
        raise ValueError(f"{bits}-bit codes come in {size} bytes, and the last axis, {n}, is no multiple of that")
    every = n // size * elements
    if count is not None and not 0 <= count <= every:
        raise ValueError(f"count must be 0..{every}, which {n} bytes hold, got {count}")
    if bits == 4:
        parts = [given & 15, given >> 4]
    else:
        x, y, z = (given.reshape(*given.shape[:-1], n // 3, 3)[..., i] for i in range(3))
        parts = [x & 63, x >> 6 | (y & 15) << 2, y >> 4 | (z & 3) << 4, z >> 2]
    stacked: Any = torch.stack(parts, -1) if is_tensor else np.stack(parts, -1)
    return stacked.reshape(*given.shape[:-1], every)[..., :count]


def _packing(f: ElementFormat | str | int) -> tuple[int, int, int]:
    bits = f if isinstance(f, int) else bits_of(_known_as(f))
    if bits not in PACKED:
        raise ValueError(f"codes of 4 and 6 bits are packed, and these have {bits}; wider ones fill their bytes")
    return bits, *PACKED[bits]


def _checked(codes: Array, bits: int) -> Array:
    if codes.dtype.kind not in "iu" or (codes.size and not 0 <= int(codes.min()) <= int(codes.max()) < 1 << bits):
        raise ValueError(f"codes must be integers in 0..{(1 << bits) - 1}")
    return codes


def _last(x: Any) -> int:
    if not x.ndim:
        raise ValueError("codes are packed along the last axis, and these have none; give them one")
    return int(x.shape[-1])


def torch_dtype(f: ElementFormat | str) -> torch.dtype:
    """The dtype of torch for the format: torch.float4_e2m1fn_x2, a pair, for e2m1fn. ValueError where this torch has none."""
    described = as_element(f)
    name = _dtypes(described).torch
    if name is None or not hasattr(torch, name):
        has = ", ".join(key for key, row in DTYPES.items() if row.torch is not None and hasattr(torch, row.torch))
        raise ValueError(f"torch has no dtype for {described.name}; it has {has}; decode the codes")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def numpy_dtype(f: ElementFormat | str) -> np.dtype[Any]:
    """NumPy's own dtype of the format, or ml_dtypes'. ValueError where there is none, or ml_dtypes is not installed."""
    described = as_element(f)
    row = _dtypes(described)
    if row.numpy is None:
        raise ValueError(
            f"neither NumPy nor ml_dtypes has a dtype for {described.name}; they have {', '.join(DTYPES)}; decode it"
        )
    if row.numpy_owns:
        return np.dtype(row.numpy)
    try:
        import ml_dtypes
    except ModuleNotFoundError:
        raise ValueError(
            f"an array of {described.name} is one of ml_dtypes', which is not installed; pip install ml_dtypes, or decode it"
        ) from None
    if not hasattr(ml_dtypes, row.numpy):
        raise ValueError(f"ml_dtypes {ml_dtypes.__version__} has no {row.numpy}; a newer one has, or decode it")
    dtype: np.dtype[Any] = np.dtype(getattr(ml_dtypes, row.numpy))
    return dtype


def _dtypes(f: ElementFormat) -> Dtypes:
    return DTYPES.get(f.canonical_name, Dtypes(None, None))


@overload
def view_as_values(codes: Tensor, f: ElementFormat | str) -> Tensor: ...
@overload
def view_as_values(codes: Codes, f: ElementFormat | str) -> Array: ...
def view_as_values(codes: Any, f: ElementFormat | str) -> Any:
    """The codes' memory as a tensor of torch's dtype for the format, or an array of ml_dtypes' or NumPy's.

    codes: of the integer dtype that `encode` gives, or any of that width; packed bytes for a tensor of e2m1fn. ValueError
    for another width, and where there is no such dtype.
    """
    described = as_element(f)
    is_tensor = isinstance(codes, Tensor)
    dtype: Any = torch_dtype(described) if is_tensor else numpy_dtype(described)
    if not is_tensor:
        codes = np.asarray(codes)
    is_integer = codes.dtype.kind in "iu" if not is_tensor else codes.dtype in INTEGERS
    if not is_integer or codes.dtype.itemsize != dtype.itemsize:
        raise ValueError(
            f"codes of {described.name} are integers of {8 * dtype.itemsize} bits here, got {_name(codes.dtype)}; convert them"
        )
    return codes.view(dtype)


@overload
def view_as_codes(values: Tensor) -> Tensor: ...
@overload
def view_as_codes(values: Array) -> Codes: ...
def view_as_codes(values: Any) -> Any:
    """The memory of a tensor or array of one of these dtypes as codes; packed ones of torch.float4_e2m1fn_x2.

    ValueError for a dtype that is no format's.
    """
    is_tensor = isinstance(values, Tensor)
    if not is_tensor:
        values = np.asarray(values)
    known = {row.torch for row in DTYPES.values()} if is_tensor else {row.numpy for row in DTYPES.values()}
    name = _name(values.dtype)
    if name not in known:
        raise ValueError(f"{name} is no format's dtype: there are {', '.join(sorted(filter(None, known)))}")
    bits = 8 * values.dtype.itemsize
    return values.view(CODES[bits] if is_tensor else _codes.code_dtype(bits))


INTEGERS = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64, torch.int64)


def _name(dtype: Any) -> str:
    return dtype_name(dtype) if isinstance(dtype, torch.dtype) else str(np.dtype(dtype).name)
