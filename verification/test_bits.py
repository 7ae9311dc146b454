"""Codes of tensors are the codes of arrays, fast ways to them are the general one, packed codes come back, views share memory.

`ElementFormat.encode` and `decode` are held against mpmath and the rational reference in test_codes and test_conditional; here
they are what everything else is held against, after one look at the oracle's values.
"""

import subprocess
import sys

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from formats import (
    ElementFormat,
    FloatFormat,
    bits,
    codes,
    element_format,
    float_format,
    get_format,
    list_formats,
    tables,
)
from formats.bits import decode, encode, numpy_dtype, pack, torch_dtype, unpack, view_as_codes, view_as_values
from formats.rounding import DETERMINISTIC, Overflow, Rounding
from verification import oracle

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NAMES = [
    name
    for name in list_formats()
    if isinstance(f := get_format(name), ElementFormat) and (isinstance(f, FloatFormat) or f.bits <= 12)
]
NARROW = [name for name in NAMES if element_format(name).bits <= 8]
KINDS = [
    "e4m3fn", "e5m2", "e4m3", "e5m2fnuz", "e8m0fnu", "bf16", "fp16", "tf32", "fp32", "fp64", "e8m3fnuz", "e8m9fn", "e3m9b138",
    "e5m20b100", "e4m3-nosub", "e8m9-nosub", "e2m1fn", "e3m2fn", "int4", "int8", "int8q6", "int12q4", "nf4", "posit8", "lns8q3",
    "binary8p3se", "binary8p4uf", "binary6p1sf", "binary16p7ue",
]  # fmt: skip
FAST = [*NARROW[:14], *NARROW[14::7], "bf16", "e8m3", "e8m10", "fp16", "int12q4", "int16", "int16q16"]


def samples(f: ElementFormat, seed: int = 0, count: int = 2000) -> npt.NDArray[np.float64]:
    """Values, middles, their neighbours in FP64 and FP32, numbers of every exponent, ends and specials."""
    rng = np.random.default_rng(seed)
    some = rng.integers(0, 1 << min(f.bits, 63), count) if f.bits > 12 else f.finite_codes
    values = f.decode(some)
    values = np.unique(values[np.isfinite(values)])
    with np.errstate(all="ignore"):
        points = np.concatenate(
            [values, (values[1:] + values[:-1]) / 2, [f.max * 1.5, f.min * 1.5, f.max + (f.max - f.min)]]
        )
        beside = [np.nextafter(points, end) for end in (-np.inf, np.inf)]
        beside += [
            np.nextafter(points.astype(np.float32), np.float32(end)).astype(np.float64) for end in (-np.inf, np.inf)
        ]
        wild = rng.integers(-(1 << 63), 1 << 63, count).view(np.float64)
        wild32 = rng.integers(0, 1 << 32, count, dtype=np.uint32).view(np.float32).astype(np.float64)
    every = np.concatenate([points, *beside, wild, wild32, [0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan]])
    return every if f.has_nan else every[~np.isnan(every)]


def overflows(f: ElementFormat) -> list[Overflow]:
    return [over for over in Overflow if over is not Overflow.NONSATURATING or f.has_inf or f.has_nan]


def as_integers(given_codes: torch.Tensor, f: ElementFormat) -> npt.NDArray[np.int64]:
    wide = given_codes.to(torch.int64).numpy()
    return wide if f.bits == 64 else wide & ((1 << f.bits) - 1)


def same(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> bool:
    equal = (a == b) & (np.signbit(a) == np.signbit(b))
    return bool(np.all(equal | (np.isnan(a) & np.isnan(b))))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_codes_of_tensors_are_those_of_arrays(name: str, dtype: torch.dtype) -> None:
    f = element_format(name)
    x = torch.from_numpy(samples(f)).to(dtype)
    for mode in DETERMINISTIC:
        for over in overflows(f):
            expected = f.encode(x.to(torch.float64).numpy(), mode, over).astype(np.int64)
            np.testing.assert_array_equal(as_integers(encode(x, name, mode, over), f), expected, f"{mode} {over}")


@pytest.mark.parametrize("name", NAMES)
def test_every_format_has_codes_and_values_in_tensors(name: str) -> None:
    f = element_format(name)
    try:
        x = samples(f, count=100)
    except ValueError:
        with pytest.raises(ValueError, match="which can't hold all of its values"):
            encode(torch.ones(3), f)
        return
    expected = f.encode(x)
    got = encode(torch.from_numpy(x), f)
    np.testing.assert_array_equal(as_integers(got, f), expected.astype(np.int64))
    assert same(decode(got, f).double().numpy(), f.decode(expected))


@pytest.mark.parametrize("name", ["e4m3fn", "bf16", "int8", "e8m0fnu", "binary8p3se"])
def test_stochastic_codes_are_one_function_of_the_seed_for_arrays_and_tensors(name: str) -> None:
    x = np.random.default_rng(0).standard_normal((8, 500)).astype(np.float32) * 3
    for mode in (mode for mode in Rounding if mode.is_stochastic):
        from_seed = encode(torch.from_numpy(x), name, mode, seed=7)
        np.testing.assert_array_equal(from_seed.to(torch.int64), encode(x, name, mode, seed=7).astype(np.int64))
        assert not torch.equal(
            from_seed.to(torch.int64), encode(torch.from_numpy(x), name, mode, seed=8).to(torch.int64)
        )


@pytest.mark.parametrize("name", KINDS)
def test_every_code_decodes_in_every_dtype_that_holds_the_format(name: str) -> None:
    f = element_format(name)
    rng = np.random.default_rng(1)
    edges = [0, 1, (1 << (f.bits - 1)) - 1, 1 << (f.bits - 1), f.nan_code or 0, f.inf_code or 0]
    some = np.arange(1 << f.bits) if f.bits <= 16 else rng.integers(0, 1 << min(f.bits, 63), 4000)
    given_codes = np.concatenate([some, np.array([edge for edge in edges if edge < 1 << 63], np.int64)])
    expected = f.decode(given_codes)
    for dtype in DTYPES:
        carrier = element_format(
            {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16"}.get(dtype, "fp16")
        )
        if carrier.holds(f):
            values = decode(torch.from_numpy(given_codes), name, dtype)
            assert values.dtype == dtype
            assert same(values.double().numpy(), expected)
        else:
            with pytest.raises(ValueError, match="does not fit"):
                decode(torch.from_numpy(given_codes), name, dtype)
    default = torch.float32 if element_format("fp32").holds(f) else torch.float64
    assert decode(torch.from_numpy(given_codes), name).dtype == default


@pytest.mark.parametrize(
    "name",
    [
        "e4m3fn", "e8m0fnu", "int8q6", "nf4", "e4m3-nosub", "e8m9fn",
        *(pytest.param(name, marks=pytest.mark.proof) for name in ("bf16", "fp32")),
    ],
)  # fmt: skip
def test_compiled_whole_they_give_the_same_codes_and_values(name: str) -> None:
    torch._dynamo.reset()
    x = torch.from_numpy(samples(element_format(name), count=300)).float()
    compiled = torch.compile(lambda x: encode(x, name), fullgraph=True)(x)
    assert compiled.dtype == encode(x, name).dtype
    assert torch.equal(compiled.to(torch.int64), encode(x, name).to(torch.int64))
    values = torch.compile(lambda c: decode(c, name), fullgraph=True)(compiled)
    assert same(values.double().numpy(), decode(compiled, name).double().numpy())


def test_compiled_whole_packing_is_the_same() -> None:
    torch._dynamo.reset()
    given_codes = torch.arange(64, dtype=torch.uint8).reshape(2, 32)
    for width in (4, 6):
        packed = torch.compile(lambda c: pack(c, width), fullgraph=True)(given_codes)  # noqa: B023
        assert torch.equal(packed, pack(given_codes, width))
        back = torch.compile(lambda p: unpack(p, width), fullgraph=True)(packed)  # noqa: B023
        assert torch.equal(back, given_codes & ((1 << width) - 1))


def test_nan_without_a_code_is_the_largest_value_in_a_tensor_and_refused_in_an_array() -> None:
    for name in ("e2m1fn", "e3m2fn", "int4", "int8q6", "nf4"):
        f = element_format(name)
        for dtype in DTYPES:
            x = torch.tensor([float("nan"), -float("nan"), 0.25], dtype=torch.float32).to(dtype)
            if name != "nf4" or dtype in (torch.float32, torch.float64):
                assert decode(encode(x, name), name, torch.float64)[:2].tolist() == [f.max, f.max]
        with pytest.raises(ValueError, match="has no NaN"):
            encode(np.full(1 << 17, np.nan, np.float32), f)
        with pytest.raises(ValueError, match="has no NaN"):
            encode([np.nan], f)


def test_upper_bits_of_a_code_are_ignored_in_a_tensor_and_refused_in_an_array() -> None:
    assert decode(torch.tensor([0x12, 0xF7], dtype=torch.uint8), "e2m1fn").tolist() == [1.0, 6.0]
    with pytest.raises(ValueError, match=r"codes must be integers in 0\.\.15"):
        decode(np.array([0x12], np.uint8), "e2m1fn")
    assert torch.isnan(decode(torch.tensor([1 << 7]), "lns8q3"))  # no value has that code


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="x must be float64, float32, bfloat16 or float16, got int32"):
        encode(torch.ones(2, dtype=torch.int32), "e4m3fn")
    with pytest.raises(ValueError, match="codes must be integers, got float32"):
        decode(torch.ones(2), "e4m3fn")
    with pytest.raises(ValueError, match="bf16 has 16 bits, and uint8 does not hold its codes"):
        decode(torch.ones(2, dtype=torch.uint8), "bf16")
    with pytest.raises(ValueError, match="dtype must be float64, float32, bfloat16 or float16, got int64"):
        decode(torch.ones(2, dtype=torch.uint8), "e4m3fn", torch.int64)
    with pytest.raises(ValueError, match="dtype must be float64, float32 or float16, got int64"):
        decode(np.ones(2, np.uint8), "e4m3fn", np.int64)
    with pytest.raises(ValueError, match="e8m3 does not fit float16"):
        decode(np.ones(2, np.uint8), "e8m3", np.float16)


# Packing.
def test_four_bits_lie_first_element_low_and_six_bits_in_little_endian_order() -> None:
    assert pack([0x1, 0x2, 0xE, 0xF], 4).tolist() == [0x21, 0xFE]
    assert pack([0b000001, 0b100010, 0b111100, 0b110011], 6).tolist() == [0b10000001, 0b11001000, 0b11001111]


@pytest.mark.parametrize("width", [4, 6])
@given(st.data())
def test_packed_codes_come_back(width: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(0, 6)) * (2 if width == 4 else 4)
    rows = data.draw(st.integers(1, 3))
    elements = data.draw(st.lists(st.integers(0, (1 << width) - 1), min_size=n * rows, max_size=n * rows))
    given_codes = np.array(elements, np.uint8).reshape(rows, n)
    packed = pack(given_codes, width)
    assert packed.shape == (rows, n * width // 8)
    # The row as one number, least significant byte first, is the sum of the elements at their places.
    for row, line in zip(packed, given_codes, strict=True):
        assert int.from_bytes(row.tobytes(), "little") == sum(int(c) << width * i for i, c in enumerate(line))
    np.testing.assert_array_equal(unpack(packed, width), given_codes)
    assert torch.equal(pack(torch.from_numpy(given_codes), width), torch.from_numpy(packed))
    assert torch.equal(unpack(torch.from_numpy(packed), width), torch.from_numpy(given_codes))
    count = data.draw(st.integers(0, n))
    np.testing.assert_array_equal(unpack(packed, width, count), given_codes[:, :count])


def test_what_cannot_be_packed_is_refused() -> None:
    for kind in (np.asarray, torch.tensor):
        with pytest.raises(ValueError, match="6-bit codes are packed by 4 along the last axis, and 5 is no multiple"):
            pack(kind([1, 2, 3, 4, 5]), "e2m3fn")
        with pytest.raises(ValueError, match="codes of 4 and 6 bits are packed, and these have 8"):
            pack(kind([1, 2]), "e4m3fn")
        with pytest.raises(ValueError, match="and these have none"):
            pack(kind(1), 4)
        with pytest.raises(ValueError, match="packed codes are bytes, uint8, got"):
            unpack(kind([1, 2]), 4)
    with pytest.raises(ValueError, match=r"codes must be integers in 0\.\.15"):
        pack([16, 0], 4)
    with pytest.raises(ValueError, match="come in 3 bytes, and the last axis, 4"):
        unpack(np.zeros(4, np.uint8), 6)
    with pytest.raises(ValueError, match=r"count must be 0\.\.4, which 2 bytes hold, got 5"):
        unpack(np.zeros(2, np.uint8), 4, 5)


# Views.
@pytest.mark.parametrize("name", bits.DTYPES)
def test_views_share_memory_and_hold_the_formats_values(name: str) -> None:
    f = element_format(name)
    rng = np.random.default_rng(2)
    some = np.arange(1 << f.bits) if f.bits <= 16 else rng.integers(0, 1 << min(f.bits, 63), 1000)
    array = some.astype(codes.code_dtype(f.bits))
    pytest.importorskip("ml_dtypes")
    theirs = view_as_values(array, name)
    assert np.shares_memory(theirs, array)
    with np.errstate(invalid="ignore"):
        assert same(theirs.astype(np.float64), f.decode(array))
    assert view_as_codes(theirs).dtype == array.dtype
    assert np.shares_memory(view_as_codes(theirs), array)
    if bits.DTYPES[name].torch is None:
        with pytest.raises(ValueError, match=f"torch has no dtype for {name}; it has"):
            torch_dtype(name)
        return
    tensor = torch.from_numpy(array.copy())
    if f.bits > 16:
        tensor = tensor.view({4: torch.int32, 8: torch.int64}[array.itemsize])
    packed = pack(tensor, 4) if f.bits == 4 else tensor
    values = view_as_values(packed, f)
    assert values.dtype == torch_dtype(name)
    assert values.data_ptr() == packed.data_ptr() == view_as_codes(values).data_ptr()
    assert view_as_codes(values).dtype == packed.dtype
    if f.bits == 4:  # torch has no casts from it
        assert torch.equal(unpack(view_as_codes(values), f), tensor)
    else:
        assert same(values.to(torch.float64).numpy(), f.decode(array))


def test_views_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"neither NumPy nor ml_dtypes has a dtype for nf4; they have e11m52"):
        numpy_dtype("nf4")
    with pytest.raises(ValueError, match="codes of bf16 are integers of 16 bits here, got uint8"):
        view_as_values(torch.zeros(2, dtype=torch.uint8), "bf16")
    with pytest.raises(ValueError, match="codes of e4m3fn are integers of 8 bits here, got uint16"):
        view_as_values(np.zeros(2, np.uint16), "e4m3fn")
    with pytest.raises(ValueError, match="bool is no format's dtype"):
        view_as_codes(torch.zeros(2, dtype=torch.bool))


def test_without_ml_dtypes_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(ValueError, match="one of ml_dtypes', which is not installed; pip install ml_dtypes"):
        view_as_values(np.zeros(2, np.uint8), "e4m3fn")
    assert view_as_values(np.zeros(2, np.uint16), "fp16").dtype == np.float16


# The fast ways for large arrays.
def fp32_patterns(f: ElementFormat) -> npt.NDArray[np.float32]:
    """More numbers than the general way is for: random patterns, each upper half with telling lower ones, decision points."""
    rng = np.random.default_rng(3)
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    words = np.concatenate([upper | np.uint32(low) for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    words = np.concatenate([words, rng.integers(0, 1 << 32, 1 << 16, dtype=np.uint32)])
    with np.errstate(all="ignore"):
        points = samples(f).astype(np.float32)
        steps = [np.nextafter(points, np.float32(end)) for end in (-np.inf, np.inf)]
    every = np.concatenate([points, *steps, words.view(np.float32)])
    return every if f.has_nan else every[~np.isnan(every)]


def the_general_way(
    f: ElementFormat, x: npt.NDArray[np.float32], mode: Rounding, over: Overflow
) -> npt.NDArray[np.integer]:
    with np.errstate(invalid="ignore"):
        return f.encode(x.astype(np.float64), mode, over)  # FP64 has no fast way


@pytest.mark.parametrize("name", FAST)
def test_fast_encoding_is_the_general_one(name: str) -> None:
    f = element_format(name)
    x = fp32_patterns(f)
    assert x.size > tables.MIN_ELEMENTS
    for mode, over in [
        (Rounding.NEAREST_EVEN, Overflow.SATURATE),
        *((Rounding.NEAREST_EVEN, over) for over in overflows(f) if over is Overflow.NONSATURATING),
        (Rounding.TOWARD_NEGATIVE, Overflow.PROPAGATE),
        (Rounding.TO_ODD, Overflow.SAT_NONE),
    ]:
        np.testing.assert_array_equal(f.encode(x, mode, over), the_general_way(f, x, mode, over), f"{mode} {over}")


@pytest.mark.parametrize("over", ["saturate", "nonsaturating"])
def test_bf16_without_torchs_conversion_is_the_same(over: str, monkeypatch: pytest.MonkeyPatch) -> None:
    f = element_format("bf16")
    x = fp32_patterns(f)
    finite = np.concatenate([x[np.abs(x) < 1e38]] * 2)  # long blocks without a value to mend
    for values in (x, finite):
        expected = the_general_way(f, values, Rounding.NEAREST_EVEN, Overflow(over))
        assert tables.torch_rounds_to_bf16()
        np.testing.assert_array_equal(f.encode(values, overflow=over), expected)
        monkeypatch.setattr(tables, "torch_rounds_to_bf16", lambda: False)
        np.testing.assert_array_equal(f.encode(values, overflow=over), expected)
        for dtype in (np.float32, np.float64):
            assert same(codes.decode(f, expected, dtype).astype(np.float64), oracle_values(f)[expected])
        monkeypatch.undo()


@pytest.mark.parametrize("name", ["bf16", "e8m3", "fp16"])
def test_a_single_value_at_the_overflow_point_among_many_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    f = float_format(name)
    monkeypatch.setattr(tables, "torch_rounds_to_bf16", lambda: False)
    point = np.float32(f.max + (f.max - float(f.decode(f.max_code - 1))) / 2)
    for lone in (point, -point, np.nextafter(point, np.float32(0)), -np.nextafter(point, np.float32(0))):
        x = np.ones(1 << 17, np.float32)
        x[[3, -5]] = lone
        for over in (Overflow.SATURATE, Overflow.NONSATURATING):
            expected = the_general_way(f, x, Rounding.NEAREST_EVEN, over)
            np.testing.assert_array_equal(f.encode(x, overflow=over), expected)


def oracle_values(f: ElementFormat) -> npt.NDArray[np.float64]:
    values = np.array([float(oracle.value(f, code)) for code in range(1 << f.bits)])
    if f.has_negative_zero:  # mpmath has none
        values[1 << (f.bits - 1)] = -0.0
    return values


@pytest.mark.parametrize(
    "name", ["bf16", "fp16", "e4m3fn", "e8m0fnu", "int4", "int8q6", "int12", "e2m1fn", "binary12p7ue"]
)
def test_fast_decoding_is_the_definition_whatever_the_codes_dtype_and_shape(name: str) -> None:
    f = element_format(name)
    defined = oracle_values(f)
    every = np.arange(1 << f.bits)
    for kind in (np.int32, np.int64, codes.code_dtype(f.bits)):
        for given_codes in (every.astype(kind), np.tile(every.astype(kind), 3)[::-1].reshape(3, -1)[:, ::2]):
            for dtype in (np.float64, np.float32):
                values = decode(given_codes, f, dtype)
                assert values.dtype == dtype
                assert same(values.astype(np.float64), defined[given_codes])
    assert decode(np.uint8(1), f).shape == ()


def test_arrays_that_must_not_be_written_are_read_all_the_same(recwarn: pytest.WarningsRecorder) -> None:
    x = np.linspace(-3, 3, 1 << 17, dtype=np.float32)
    expected = encode(x, "bf16")
    x.setflags(write=False)
    codes_of_x = encode(x, "bf16")
    np.testing.assert_array_equal(codes_of_x, expected)
    codes_of_x.setflags(write=False)
    np.testing.assert_array_equal(decode(codes_of_x, "bf16"), decode(expected, "bf16"))
    assert not recwarn.list


def test_fp16_arrays_are_encoded_as_the_same_numbers_in_fp32() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    with np.errstate(invalid="ignore"):
        for name in ("e4m3fn", "bf16", "fp16", "e5m2fnuz"):
            f = element_format(name)
            np.testing.assert_array_equal(f.encode(every), f.encode(every.astype(np.float64)))


def test_describing_and_encoding_formats_does_not_import_torch() -> None:
    program = (
        "import sys, numpy as np; from formats import get_format;"
        "get_format('bf16').encode(np.ones(1 << 17, np.float32)); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
