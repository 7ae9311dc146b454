"""Values and factors of scaled formats: their exact product, rounded once, is what `quantize_scaled` gives.

That is held to rationals elsewhere. FP64 holds the product of an FP32 factor and values of at most 24 bits, and inputs
are FP32, so that the one rounding is the cast to FP32.
"""

import pytest
import torch
from torch import Tensor

from formats import decode_scaled, encode_scaled, grid_format, quantize_scaled
from formats.factored import Factored, quantize_factored

FORMATS = [
    "e4m3fn@tensor", "e5m2@row", "int8@row", "e4m3fn@block128", "e4m3fn@block5", "e4m3fn@tile128x128", "e2m1fn@tile3x7",
    "mxfp8_e4m3fn", "mxfp6_e3m2fn:rceil", "mxfp4:even", "mxint8", "nvfp4", "e2m1fn@tile16x16:e4m3fn", "e5m10@tensor",
]  # fmt: skip
NARROW = [name for name in FORMATS if not name.startswith("e5m10")]


def spread(shape: tuple[int, ...], seed: int) -> Tensor:
    """Numbers over some twenty octaves, zeros among them, one block of nothing else."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp(4 * torch.randn(shape, generator=generator))
    x[..., 3] = 0.0
    x[0, :16] = 0.0
    return x


def whole(f: Factored, groups: tuple[int, int]) -> Tensor:
    """values * factor, FP64; groups: how many elements of each of the last axes share a factor, 0 for all."""
    if f.factor is None:
        return f.values.double()
    factor = f.factor
    for axis, size in zip((1, 2), groups, strict=True):
        if size > 1:
            factor = factor.repeat_interleave(size, axis).narrow(axis, 0, f.values.shape[axis])
    return f.values.double() * factor.double()


def groups_of(name: str, axis: int) -> tuple[int, int]:
    group = name.partition("@")[2].partition(":")[0]
    if ":e4m3fn" in name or not group:
        return 0, 0
    if group.startswith("tile"):
        a, b = map(int, group.removeprefix("tile").split("x"))
        return a, b
    size = int(group.removeprefix("block")) if group.startswith("block") else 0
    return (size, 1) if axis == -2 else (1, size)


@pytest.mark.parametrize("rounding", ["nearest_even", "toward_zero", "stochastic"])
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("name", FORMATS)
def test_the_exact_product_rounded_once_is_the_quantised_value(name: str, axis: int, rounding: str) -> None:
    if "tile" in name and axis == -2:
        axis = -1
    x, seed = spread((3, 70, 150), 1), torch.tensor([5, 6, 7])
    expected = quantize_scaled(x, name, axis, rounding, seed=seed, batch_dims=1)
    found = quantize_factored(x, name, axis, rounding, seed=seed, batch_dims=1)
    assert torch.equal(whole(found, groups_of(name, axis)).float(), expected)


def test_a_long_element_times_a_power_of_two_is_rounded_once() -> None:
    """(1 + 2^-7 + 2^-23) * 2^-127 lies above the middle of two BF16 subnormals by what FP32's subnormals do not hold."""
    listed = grid_format("above-a-middle", [-1.0, 0.0, 1 + 2.0**-7 + 2.0**-23])
    name = f"{listed.canonical_name}@block2:e8m0fnu"
    x = torch.tensor([2.0**-127, 0.0], dtype=torch.bfloat16)
    right = [(1 + 2.0**-6) * 2.0**-127, 0.0]
    assert quantize_scaled(x, name).tolist() == right
    assert quantize_factored(x, name).values.tolist() == right
    assert decode_scaled(encode_scaled(x, name), x.dtype).tolist() == right


@pytest.mark.parametrize("name", NARROW)
def test_values_fit_bf16(name: str) -> None:
    values = quantize_factored(spread((2, 64, 96), 2), name, batch_dims=1).values
    assert torch.equal(values.bfloat16().float(), values)
    assert values.any()


def test_given_scales_and_numbers_that_are_none() -> None:
    x = spread((2, 8, 32), 3)
    x[0, 0, 5], x[1, 2, 7] = float("nan"), float("inf")
    scale = torch.tensor([0.5, 2.0])
    found = quantize_factored(x, "e4m3fn@tensor", tensor_scale=scale, batch_dims=1)
    assert found.factor is not None
    assert torch.equal(found.factor, scale[:, None, None])
    assert found.values[0, 0, 5].isnan()
    assert found.values[1, 2, 7] == 448
    own = quantize_factored(x, "e4m3fn@row", batch_dims=1)
    assert own.factor is not None
    assert own.factor[0, 0].isnan()
    assert own.factor[1, 2].isnan()
    assert int(own.factor.isnan().sum()) == 2
