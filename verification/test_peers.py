"""Every cast that ml_dtypes, NumPy, torch and gfloat have, held against ours: the same, but for the rows of one table.

Inputs of each cast: all 2^16 BF16 numbers, each value of the format and each point between two, and their neighbours in the dtype
cast from, in FP32 too where that is FP64. `verification.disagreements` has the table, and what "the same" means; each of its rows
is asserted, so that a peer that mends one is noticed. gfloat, torchao and microxcaling (a checkout of it, in the environment
variable MICROXCALING) are asked where they can be imported.
"""

import os
import sys
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from formats import ElementFormat, FloatFormat, element_format, get_format
from formats.bits import DTYPES, Codes, decode, encode, numpy_dtype, pack, torch_dtype, view_as_codes, view_as_values
from formats.codes import code_dtype
from verification.disagreements import BY_NAME, ROWS, Flags, Floats, rounded, rows_for

TORCH = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
OF_NUMPY = [
    name for name, row in DTYPES.items() if row.numpy and name not in ("e8m23", "e11m52") and not name.startswith("int")
]
OF_TORCH = [name for name in OF_NUMPY if DTYPES[name].torch and name != "e2m1f"]
CUSTOMARY = {"e8m7": "bf16", "e5m10": "fp16", "e3m2f": "e3m2fn", "e2m3f": "e2m3fn", "e2m1f": "e2m1fn"}
CUSTOMARY |= {"e4m3fnuzb11": "e4m3b11fnuz"}
SOURCES = ("float64", "float32", "bfloat16", "float16")
asserted: set[str] = set()


@cache
def inputs(name: str) -> Floats:
    """All BF16 numbers, the format's decision points and what lies beside them in FP64, FP32 and by 2^-40 of them."""
    f = element_format(name)
    brain = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    grid = f.grid()
    next_one = 2 * grid[-1:] - grid[-2:-1] if isinstance(f, FloatFormat) and f.mantissa_bits else 2 * grid[-1:]
    points = np.concatenate([grid, (grid[1:] + grid[:-1]) / 2, next_one, (next_one + grid[-1:]) / 2, 2 * next_one])
    with np.errstate(all="ignore"):
        single = points.astype(np.float32)
        beside = [np.nextafter(points, end) for end in (-np.inf, np.inf)]
        beside += [np.nextafter(single, np.float32(end)).astype(np.float64) for end in (-np.inf, np.inf)]
        every = np.concatenate(
            [brain.astype(np.float64), points, *beside, points * (1 + 2.0**-40), points * (1 - 2.0**-40)]
        )
    return np.unique(np.concatenate([every, -every, [0.0, -0.0, np.inf, np.nan]]).view(np.int64)).view(np.float64)


def same(a: Floats, b: Floats) -> Flags:
    equal = (a == b) & (np.signbit(a) == np.signbit(b))
    return np.asarray(equal | (np.isnan(a) & np.isnan(b)))


def check(peer: str, f: ElementFormat, source: str, x: Floats, theirs: Floats, ours: Floats, version: Any = ()) -> None:
    """The same but for the rows of the table, which are as it says."""
    known = np.zeros(x.shape, np.bool_)
    for row in rows_for(peer, f.name, source, version):
        assert row.where is not None
        here = row.where(f, x) & ~known & ~np.isnan(x)
        known |= here
        if not here.any():
            continue
        assert not same(theirs[here], ours[here]).all(), f"{row.name}: mended"
        if row.gives:
            wrong = here & ~same(theirs, np.where(here, row.gives(f, np.where(here, x, 1.0)), 0.0))
            assert not wrong.any(), f"{row.name}: {x[wrong][:3]} give {theirs[wrong][:3]}"
        asserted.add(row.name)
    wrong = ~known & ~same(theirs, ours)
    assert not wrong.any(), (
        f"{peer} {f.name} from {source}: {x[wrong][:3]} give {theirs[wrong][:3]}, not {ours[wrong][:3]}"
    )


def from_source(name: str, source: str) -> tuple[Any, Floats]:
    """The inputs as an array of that dtype, each once, and what they are in FP64. Without NaN where there is none."""
    dtype = np.dtype(getattr(ml_dtypes, source, None) or source)
    with np.errstate(all="ignore"):
        cast = inputs(name).astype(dtype)
        cast = np.unique(cast.view(f"u{dtype.itemsize}")).view(dtype)
        x = cast.astype(np.float64)
    keep = ~np.isnan(x) | element_format(name).has_nan
    return cast[keep], x[keep]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("canonical", OF_NUMPY)
def test_casts_of_numpy_and_ml_dtypes(canonical: str, source: str) -> None:
    f = element_format(CUSTOMARY.get(canonical, canonical))
    array, x = from_source(f.name, source)
    with np.errstate(all="ignore"):
        codes = view_as_codes(array.astype(numpy_dtype(f)))
    check("ml_dtypes", f, source, x, f.decode(codes), rounded(f, x))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("canonical", OF_TORCH)
def test_casts_of_torch(canonical: str, source: str) -> None:
    f = element_format(CUSTOMARY.get(canonical, canonical))
    array, x = from_source(f.name, source)
    tensor = (
        torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if source == "bfloat16" else torch.from_numpy(array)
    )
    for cast in (tensor.to(torch_dtype(f)), torch.stack([tensor, tensor], 1)[:, 0].to(torch_dtype(f))):  # and strided
        theirs = f.decode(view_as_codes(cast.contiguous()).numpy())
        check("torch", f, source, x, theirs, rounded(f, x), TORCH)
    ours = encode(tensor, f, overflow="nonsaturating")  # our own tensors' codes are held to the same
    assert same(decode(ours, f, torch.float64).numpy(), rounded(f, x)).all()


@pytest.mark.parametrize("canonical", OF_NUMPY)
def test_values_of_every_code(canonical: str) -> None:
    f = element_format(canonical)
    codes: Codes = np.arange(1 << f.bits).astype(code_dtype(f.bits))
    with np.errstate(invalid="ignore"):
        assert same(view_as_values(codes, f).astype(np.float64), f.decode(codes)).all()
    if canonical in OF_TORCH:
        for dtype in (torch.float64, torch.float32):
            values = view_as_values(torch.from_numpy(codes), f).to(dtype).double().numpy()
            assert same(values, f.decode(codes)).all()


def test_pairs_of_fp4_are_torchs_dtype_and_lie_as_ml_dtypes_elements_do() -> None:
    x = torch.tensor([0.5, -6.0, 1.5, 3.0])
    packed = view_as_values(pack(encode(x, "e2m1fn"), 4), "e2m1fn")
    assert packed.dtype == torch.float4_e2m1fn_x2
    theirs = x.numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    assert view_as_codes(packed).tolist() == [int(theirs[0] | theirs[1] << 4), int(theirs[2] | theirs[3] << 4)]


@pytest.mark.parametrize("name", ["int2", "int4"])
def test_integers_of_ml_dtypes_and_where_they_truncate_and_wrap(name: str) -> None:
    f = element_format(name)
    inside = np.arange(f.min, f.max + 1)
    assert (view_as_codes(inside.astype(numpy_dtype(f))) == f.encode(inside)).all()
    x = np.array([0.75, -0.75, f.max + 1, f.min - 1], np.float32)
    theirs = f.decode(view_as_codes(x.astype(numpy_dtype(f))))
    wrapped = (np.trunc(x) - f.min) % (2 * -f.min) + f.min
    assert (theirs == wrapped).all()
    assert not (theirs == f.decode(f.encode(x))).any()
    asserted.add("ml_dtypes truncates and wraps integers")


def test_ml_dtypes_makes_nan_a_zero() -> None:
    row = BY_NAME["ml_dtypes makes NaN a zero"]
    for name in row.formats:
        f = element_format(name)
        theirs = f.decode(view_as_codes(np.array([np.nan, -np.nan], np.float32).astype(numpy_dtype(f))))
        assert same(theirs, np.array([-0.0, 0.0])).all()
        assert decode(encode(torch.tensor([np.nan]), f), f).item() == f.max
    asserted.add(row.name)


def test_torch_makes_every_nan_one_code_in_bf16() -> None:
    nan = np.array([0x7FC00000, 0xFFC00000, 0x7F800001], np.uint32).view(np.float32)
    theirs = view_as_codes(torch.from_numpy(np.repeat(nan, 64)).to(torch.bfloat16))
    assert set(theirs.tolist()) == {0xFFFF}
    assert set(encode(torch.from_numpy(nan), "bf16").tolist()) == {0x7FC0}
    asserted.add("torch makes every NaN 0xffff in BF16")


# gfloat.
OF_GFLOAT = {
    "ocp_e4m3": "e4m3fn", "ocp_e5m2": "e5m2", "ocp_e2m1": "e2m1fn", "ocp_e2m3": "e2m3fn", "ocp_e3m2": "e3m2fn",
    "ocp_e8m0": "e8m0fnu", "ocp_int8": "int8q6", "binary16": "fp16", "bfloat16": "bf16",
}  # fmt: skip
P3109 = [
    f"binary{k}p{p}{sign}{domain}"
    for k in range(3, 9)
    for sign in "su"
    for domain in "ef"
    for p in range(1, k + (sign == "u"))
]
GFLOAT_MODES = {
    "toward_zero": "TowardZero", "toward_negative": "TowardNegative", "toward_positive": "TowardPositive",
    "nearest_even": "TiesToEven", "nearest_away": "TiesToAway",
}  # fmt: skip


def gfloats(name: str) -> Any:
    """gfloat's description of the format."""
    gfloat = pytest.importorskip("gfloat.formats")
    types = pytest.importorskip("gfloat.types")
    theirs = {ours: key for key, ours in OF_GFLOAT.items()}
    if name in theirs:
        return getattr(gfloat, f"format_info_{theirs[name]}")
    k, p, kind = name[len("binary")], name[len("binaryKp")], name[-2:]
    signedness = types.Signedness.Signed if kind[0] == "s" else types.Signedness.Unsigned
    return gfloat.format_info_p3109(
        int(k), int(p), signedness, types.Domain.Extended if kind[1] == "e" else types.Domain.Finite
    )


def against_gfloat(name: str, every: int, modes: dict[str, str]) -> None:
    gfloat = pytest.importorskip("gfloat")
    f, info = element_format(name), gfloats(name)
    x = inputs(name)
    x = x[(np.arange(len(x)) % every == 0) | (x.astype(np.float32).view(np.uint32) & 0xFFFF != 0)] if every > 1 else x
    x = x if f.has_nan else x[~np.isnan(x)]
    for mode, their_mode in modes.items():
        for overflow in ("saturate", "nonsaturating") if f.has_inf or f.has_nan else ("saturate",):
            with np.errstate(all="ignore"):
                theirs = gfloat.round_ndarray(info, x, gfloat.RoundMode[their_mode], overflow == "saturate")
            ours = f.decode(f.encode(x, mode, overflow))
            if mode == "nearest_even":
                check("gfloat", f, "float64", x, theirs, ours)
            else:
                decided = (
                    (x > 0) | np.isnan(x) | ((x == 0) & (name != "e8m0fnu")) if not f.signed else np.ones(x.shape, bool)
                )
                decided &= (x >= f.min) | f.signed | (name != "e8m0fnu")
                assert same(theirs[decided], ours[decided]).all(), mode


@pytest.mark.parametrize("name", [*OF_GFLOAT.values(), *P3109])
def test_values_and_roundings_of_gfloat(name: str) -> None:
    gfloat = pytest.importorskip("gfloat")
    f, info = element_format(name), gfloats(name)
    codes = np.arange(1 << f.bits)
    assert same(gfloat.decode_ndarray(info, codes), f.decode(codes)).all()
    against_gfloat(name, 31 if name in P3109 else 1, GFLOAT_MODES if f.bits <= 8 else {"nearest_even": "TiesToEven"})


@pytest.mark.proof
@pytest.mark.parametrize("name", P3109)
def test_roundings_of_gfloat_on_every_bf16_number(name: str) -> None:
    pytest.importorskip("gfloat")
    against_gfloat(name, 1, GFLOAT_MODES)


@pytest.mark.parametrize(
    ("mode", "theirs"),
    [("stochastic_a", "StochasticFastest"), ("stochastic_b", "StochasticFast"), ("stochastic_c", "Stochastic")],
)
@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e2m1fn", "binary8p4se", "binary8p3uf", "binary6p2sf"])
def test_stochastic_roundings_of_gfloat(name: str, mode: str, theirs: str) -> None:
    gfloat = pytest.importorskip("gfloat")
    f, info, width = element_format(name), gfloats(name), 3
    x = inputs(name)
    grid = f.grid()
    shares = [low + (high - low) * k / 64 for low, high in pairwise(grid) for k in range(65)]
    x = np.concatenate([x[np.isfinite(x) & (np.abs(x) <= f.max)][::17], shares])
    x = x if f.signed else x[x >= 0]
    for random in range(1 << width):
        ours = f.decode(f.encode(x, mode, random_bits=random, stochastic_bits=width))
        bits = np.full(x.shape, random)
        got = gfloat.round_ndarray(info, x, gfloat.RoundMode[theirs], True, bits, width)
        assert same(got, ours).all(), random


def test_gfloat_encodes_e8m0s_zero_in_two_ways() -> None:
    gfloat = pytest.importorskip("gfloat")
    info = gfloats("e8m0fnu")
    assert gfloat.encode_float(info, 0.0) == 0xFF
    assert gfloat.encode_ndarray(info, np.array([0.0])).tolist() == [0]
    assert element_format("e8m0fnu").encode([0.0]).tolist() == [0]
    asserted.add("gfloat encodes E8M0's zero in two ways")


def test_gfloat_without_subnormals_leaves_the_grid() -> None:
    gfloat = pytest.importorskip("gfloat")
    types = pytest.importorskip("gfloat.types")
    info = gfloat.FormatInfo(
        "e4m3nosub", 8, 4, bias=7, is_signed=True, domain=types.Domain.Finite, has_nz=True, num_high_nans=1,
        has_subnormals=False, is_twos_complement=False,
    )  # fmt: skip
    f = element_format("e4m3fn-nosub")
    codes = np.arange(256)
    assert same(np.array([gfloat.decode_float(info, int(code)).fval for code in codes]), f.decode(codes)).all()
    assert gfloat.round_float(info, 2.0**-8) == 2.0**-8
    assert 2.0**-8 not in f.grid()
    asserted.add("gfloat without subnormals leaves the grid")


# Scales.
def block(*leading: float) -> torch.Tensor:
    x = torch.zeros(1, 32)
    x[0, : len(leading)] = torch.tensor(leading)
    return x


def scale_code(x: torch.Tensor, rule: str) -> int:
    from formats import encode_scaled

    return int(encode_scaled(x, "mxfp4", rule=rule).scales.flatten()[0])


def test_torchaos_scales() -> None:
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    rules = pytest.importorskip("torchao.prototype.mx_formats.config").ScaleCalculationMode
    from formats import quantize_scaled

    above = block(float(np.nextafter(np.float32(6 * 2.0**20), np.float32(np.inf))))
    scale, _ = mx.to_mx(above, torch.float4_e2m1fn_x2, 32, rules.RCEIL)
    assert int(scale.view(torch.uint8)) == 127 + 20
    assert scale_code(above, "rceil") == 127 + 21
    asserted.add("torchao's RCEIL divides in FP32")
    small = block(2.0**-126)
    scale, data = mx.to_mx(small, torch.float4_e2m1fn_x2, 32, rules.FLOOR)
    assert float(mx.to_dtype(data, scale, torch.float4_e2m1fn_x2, 32, torch.float32)[0, 0]) == 2.0**-127
    assert float(quantize_scaled(small, "mxfp4")[0, 0]) == 2.0**-126
    asserted.add("torchao halves blocks whose scale is 2^-127")


@pytest.mark.skipif("MICROXCALING" not in os.environ, reason="set MICROXCALING to a checkout of microsoft/microxcaling")
def test_microxcalings_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    from formats import quantize_scaled

    monkeypatch.setattr(sys, "path", [*sys.path, os.environ["MICROXCALING"]])
    quantize_mx: Callable[..., torch.Tensor] = pytest.importorskip("mx.mx_ops")._quantize_mx
    x = block(float(np.nextafter(np.float32(128), np.float32(0))))
    theirs = quantize_mx(x, 8, "fp4_e2m1", axes=[-1], block_size=32, round="even", custom_cuda=False)
    assert float(theirs[0, 0]) == 128.0
    assert float(quantize_scaled(x, "mxfp4")[0, 0]) == 96.0
    asserted.add("microxcaling takes floor(log2(amax)) in FP32")


def test_the_table_is_in_order() -> None:
    assert len(BY_NAME) == len(ROWS)
    for row in ROWS:
        assert row.right in ("ours", "either"), row.name
        assert all([row.by, row.inputs, row.theirs, row.ours, row.seen])
        assert row.source in (*SOURCES, "any")
        for name in row.formats:
            get_format(name.replace("{K}p{P}", "8p3"))


@pytest.fixture(scope="module", autouse=True)
def every_row_was_asserted(request: pytest.FixtureRequest) -> Any:
    """After a whole run of this file, each row whose peer is here has been seen."""
    yield
    here = {"ml_dtypes", "torch"} | ({"gfloat"} if "gfloat" in sys.modules else set())
    missing = {row.name for row in ROWS if row.peer in here and (row.peer != "torch" or row.since <= TORCH)} - asserted
    whole = (
        request.session.testscollected >= 200
        and not request.session.testsfailed
        and "PYTEST_XDIST_WORKER" not in os.environ
    )
    selected = request.config.option.keyword or "::" in " ".join(request.config.args)
    assert not (whole and not selected) or not missing, f"rows that no cast showed: {missing}"
