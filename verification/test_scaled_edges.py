"""Which elements share a scale, what happens at the edges of scaled formats, their codes, and what is refused."""

import numpy as np
import pytest
import torch

from formats.rounding import Overflow
from formats.scaled import scaled_format
from formats.scaled_codes import decode_scaled, encode_scaled
from formats.scaled_reference import quantize_group
from formats.scaling import quantize_scaled, scales_of, tensor_amax
from verification.test_scaled import BY_RULE, DTYPES, MX, assert_same, bits, expected


def groups_of(shape: tuple[int, ...], name: str, axis: int, batch_dims: int) -> list[list[int]]:
    """Flat indices of each group, by counting."""
    f = scaled_format(name)
    groups: dict[tuple[int, ...], list[int]] = {}
    for flat, index in enumerate(np.ndindex(*shape)):
        where = list(index)
        if f.granularity == "tensor":
            where[batch_dims:] = [0] * (len(shape) - batch_dims)
        elif f.granularity == "row":
            where[axis] = 0
        elif f.granularity == "block":
            where[axis] //= f.group[0]
        else:
            where[-2] //= f.group[0]
            where[-1] //= f.group[1]
        groups.setdefault(tuple(where), []).append(flat)
    return list(groups.values())


@pytest.mark.parametrize(
    ("name", "axis", "batch_dims"),
    [
        ("e4m3fn@tensor", -1, 0),
        ("e4m3fn@tensor", -1, 1),
        ("e4m3fn@tensor", -1, 2),
        ("e4m3fn@row", -1, 0),
        ("e4m3fn@row", 0, 0),
        ("e4m3fn@row", 1, 1),
        ("e4m3fn@block4", -1, 0),
        ("e4m3fn@block4", 1, 1),
        ("e2m1fn@block4:e8m0fnu", 0, 0),
        ("e4m3fn@tile2x3", -1, 0),
        ("e4m3fn@tile4x4:e8m0fnu:rceil", -1, 1),
    ],
)
def test_groups_lie_where_they_should(name: str, axis: int, batch_dims: int) -> None:
    x = torch.randn(3, 6, 10, generator=torch.Generator().manual_seed(2))
    want = torch.empty(x.numel())
    scales = set()
    for indices in groups_of(tuple(x.shape), name, axis, batch_dims):
        group = quantize_group(x.flatten()[indices].tolist(), name)
        want[indices] = torch.tensor(group.values("fp32"))
        scales.add(group.scale)
    got = quantize_scaled(x, name, axis, batch_dims=batch_dims)
    assert torch.equal(bits(got), bits(want.reshape(x.shape)))
    assert {float(s) for s in scales if s} == set(
        scales_of(x, name, axis, batch_dims=batch_dims).group.flatten().tolist()
    )


def test_a_run_never_sees_its_neighbours_amax() -> None:
    x = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(3))
    for name in ("nvfp4", "e4m3fn@tensor"):
        alone = torch.cat([quantize_scaled(x[r : r + 1], name, batch_dims=1) for r in range(3)])
        wild = x.clone()
        wild[1] *= 1e20
        assert torch.equal(quantize_scaled(x, name, batch_dims=1), alone)
        assert torch.equal(quantize_scaled(wild, name, batch_dims=1)[[0, 2]], alone[[0, 2]])
        given_scale = scales_of(x, name, batch_dims=1).tensor
        if given_scale is None:
            given_scale = scales_of(x, name, batch_dims=1).group.reshape(3)
        assert torch.equal(quantize_scaled(x, name, tensor_scale=given_scale, batch_dims=1), alone)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "e4m3fn@tile16x16"])
def test_a_short_last_group_is_as_if_zeros_followed(name: str) -> None:
    x = torch.randn(20, 40, generator=torch.Generator().manual_seed(4))
    padded = torch.nn.functional.pad(x, (0, 24, 0, 12))
    assert torch.equal(quantize_scaled(x, name), quantize_scaled(padded, name)[:20, :40])


# --- edges ---------------------------------------------------------------------------------------------------------------

ALL = [*MX, "nvfp4", "e4m3fn@tensor", "e4m3fn@row", "e4m3fn@block16", "e4m3fn@tile1x16"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_zeros_stay_zeros_with_their_signs(name: str, dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, -0.0] * 16, dtype=dtype).reshape(1, 32)
    zeros = x if scaled_format(name).element.has_negative_zero else x.abs()
    assert torch.equal(bits(quantize_scaled(x, name)), bits(zeros))
    smallest = {"e8m0fnu": 2.0**-127, "e4m3fn": 2.0**-9, "fp32": 2.0**-149}[scaled_format(name).scale]
    assert set(scales_of(x, name).group.flatten().tolist()) == {smallest}


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_a_group_with_inf_or_nan_is_nan(name: str, dtype: torch.dtype, bad: float) -> None:
    x = torch.ones(2, 64, dtype=dtype)
    x[0, 3] = bad
    upper = 1.0 if name == "nvfp4" else None
    got = quantize_scaled(x, name, tensor_scale=upper)
    f = scaled_format(name)
    n = f.elements_per_scale or 64
    whole = f.granularity == "tensor"
    assert got[0, :n].isnan().all()
    assert got[0, n:].isnan().all() == (whole or n == 64)
    assert got[1].isnan().all() == whole
    assert quantize_scaled(x, "nvfp4").isnan().all()


def test_with_a_given_scale_nan_stays_and_inf_overflows() -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0, 1e30])
    got = quantize_scaled(x, "e4m3fn@tensor", tensor_scale=0.5)
    assert torch.equal(bits(got), bits(torch.tensor([float("nan"), 224.0, -224.0, 1.0, 224.0])))


@pytest.mark.parametrize("t", [0.0, -1.0, float("nan"), float("inf")])
def test_a_tensor_scale_that_is_none_gives_nan(t: float) -> None:
    assert quantize_scaled(torch.ones(16), "nvfp4", tensor_scale=t).isnan().all()


def test_a_product_that_the_dtype_cannot_hold_is_inf() -> None:
    x = torch.tensor([65504.0, 100.0], dtype=torch.float16)
    assert quantize_scaled(x, "mxfp4:even").tolist() == [float("inf"), 0.0]
    assert quantize_scaled(x, "mxfp4:floor").tolist() == [6 * 2.0**13, 0.0]
    top = torch.tensor([torch.finfo(torch.float32).max])
    assert quantize_scaled(top, "mxfp4:even").tolist() == [float("inf")]


def test_subnormal_amax_and_subnormal_scales() -> None:
    x = torch.tensor([2.0**-149, 3 * 2.0**-140, -(2.0**-130)])
    for name in [*BY_RULE, "e4m3fn@tensor", "e5m2@tensor", "nvfp4"]:
        assert_same(quantize_scaled(x, name), expected(x, name), x)
    assert scales_of(x, "e5m2@tensor").group.item() == 9 * 2.0**-149  # 2^-130 / 57344 is 64 / 7 of them


def test_empty_and_without_axes() -> None:
    for name in ALL:
        assert quantize_scaled(torch.empty(0, 32), name).shape == (0, 32)
        assert quantize_scaled(torch.empty(3, 0), name).shape == (3, 0)
    for name in ("mxfp4", "nvfp4", "e4m3fn@tensor", "e4m3fn@row"):
        x = torch.tensor(1.7)
        assert torch.equal(quantize_scaled(x, name), quantize_scaled(x[None], name)[0])
    assert tensor_amax(torch.empty(2, 0), 1).tolist() == [0.0, 0.0]
    assert tensor_amax(torch.tensor([[1.0, -3.0], [float("inf"), float("nan")]]), 1)[0] == 3.0


def test_strided_inputs_and_no_gradient() -> None:
    x = torch.randn(64, 48, generator=torch.Generator().manual_seed(5), requires_grad=True)
    turned = quantize_scaled(x.t(), "mxfp8_e4m3fn", axis=1)
    assert torch.equal(turned, quantize_scaled(x, "mxfp8_e4m3fn", axis=0).t())
    assert not turned.requires_grad


# --- codes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*BY_RULE, "nvfp4", "e4m3fn@tile8x16", "e5m2@tensor", "e4m3fn@row"])
def test_decoding_the_codes_gives_what_quantising_gives(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(6)
    x = (torch.randn(4, 64, generator=generator) * 2.0 ** torch.randint(-20, 15, (4, 64), generator=generator)).to(
        dtype
    )
    x[0, :32] = 0.0
    if scaled_format(name).granularity != "tensor":
        x[3, 40] = float("nan")
    upper = 0.037 if name == "nvfp4" else None
    scaled = encode_scaled(x, name, tensor_scale=upper)
    assert scaled.elements.dtype == torch.uint8
    assert scaled.elements.shape == x.shape
    assert torch.equal(bits(decode_scaled(scaled, dtype)), bits(quantize_scaled(x, name, tensor_scale=upper)))


@pytest.mark.parametrize("overflow", list(Overflow))
@pytest.mark.parametrize("name", ["mxfp8_e5m2", "e4m3@block32", "e4m3fn@row", "e3m4@block32:e8m0fnu", "e5m2@tensor"])
def test_codes_keep_what_overflow_made_of_an_element(name: str, overflow: str) -> None:
    """1.99 under a scale of 2^-15 lies beyond e5m2's largest, 1.75; under a scale that was given, 1e30 and inf lie beyond all."""
    x = torch.ones(32)
    x[0], x[1] = 1.99, -1.99
    upper = None
    if name == "e5m2@tensor":
        x[2], x[3], upper = 1e30, -float("inf"), 2.0**-10
    got = quantize_scaled(x, name, overflow=overflow, tensor_scale=upper)
    assert torch.equal(bits(decode_scaled(encode_scaled(x, name, overflow=overflow, tensor_scale=upper))), bits(got))
    if name == "mxfp8_e5m2":
        ends = {"saturate": 1.75, "propagate": 1.75}.get(overflow, float("inf"))
        assert decode_scaled(encode_scaled(x, name, overflow=overflow))[:2].tolist() == [ends, -ends]


def test_codes_worked_out_by_hand() -> None:
    x = torch.zeros(32)
    x[:4] = torch.tensor([96.0, -24.0, 8.0, 1.0])
    scaled = encode_scaled(x, "mxfp4")
    assert scaled.scales.tolist() == [127 + 4]
    assert scaled.elements[:5].tolist() == [0b0111, 0b1011, 0b0001, 0, 0]
    x[7] = float("nan")
    scaled = encode_scaled(x, "mxfp4")
    assert scaled.scales.tolist() == [0xFF]
    assert not scaled.elements.any()


# --- what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"f": "mxfp9"}, "mxfp9: neither mxfp8_e4m3fn"),
        ({"f": "e4m3fn@block0"}, "a block has 1 sizes of at least 1, got"),
        ({"f": "e8m3@row"}, "e8m3's positive values must lie in 2\\^-80..2\\^64"),
        ({"f": "mxfp4", "rule": "amax"}, "follows the rule floor or ceil or rceil or nearest or even, got amax"),
        ({"f": "mxfp4", "rule": "round"}, "the rule must be one of floor, ceil, .* got 'round'"),
        ({"f": "e4m3fn@row", "rule": "floor"}, "a scale in fp32 follows the rule amax, got floor"),
        ({"f": "mxfp4", "tensor_scale": 1.0}, "mxfp4 has no tensor scale"),
        (
            {"f": "nvfp4", "tensor_scale": torch.ones(2)},
            r"tensor_scale must have the shape \(\) of the batch, got \(2,\)",
        ),
        ({"f": "mxfp4", "axis": 2}, "axis must be -2..1 for a tensor of 2 axes, got 2"),
        ({"f": "mxfp4", "axis": 0, "batch_dims": 1}, "axis 0 is one of the 1 batch_dims"),
        ({"f": "mxfp4", "batch_dims": 3}, "batch_dims must be 0..2 for a tensor of 2 axes, got 3"),
        ({"f": "e4m3fn@tile2x2", "axis": 0}, "tiles lie in the last two axes"),
        ({"f": "mxfp4", "rounding": "up"}, "rounding must be one of"),
        ({"f": "mxfp4", "x": torch.ones(2, 2, dtype=torch.int32)}, "x must be float32, bfloat16 or float16, got int32"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says) as refused:
        quantize_scaled(**{"x": torch.ones(4, 64), **arguments})  # type: ignore[arg-type]
    assert "\n" not in str(refused.value)


def test_encode_demands_whole_blocks_where_the_format_does() -> None:
    with pytest.raises(
        ValueError, match=r"mxfp4 is stored in whole groups, and axis 0 has 40 elements; pad it .* to 64"
    ):
        encode_scaled(torch.ones(40), "mxfp4")
    encode_scaled(torch.ones(40), "e4m3fn@block32")
    with pytest.raises(ValueError, match="codes are uint8, and e5m10 has 16 bits"):
        encode_scaled(torch.ones(40), "e5m10@row")
