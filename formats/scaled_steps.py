"""The steps that quantising, encoding and decoding in a scaled format share, on tensors cut into groups.

prepare -> find_scale -> quotient -> (round) -> times. What makes each exact is told in formats.scale_arithmetic.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from formats.groups import Layout, against, lay_out
from formats.quantizer import quantize
from formats.scale_arithmetic import (
    INFINITY,
    MAGNITUDE,
    NAN,
    SMALLEST_NORMAL,
    Scale,
    fp32_scale,
    long_product,
    nudged_quotient,
    power_of_two_scale,
    product,
    round_to_element,
    split_scale,
)
from formats.scaled_constants import ScaledConstants, scaled_constants
from formats.spec import Format

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class GroupScale(NamedTuple):
    """A group's scale, FP32; its inverse where that is exact; the tensor's scale; whether x had no part in it."""

    group: Tensor
    inverse: Tensor | None
    tensor: Tensor | None
    kind: str
    given: bool

    @property
    def is_nan(self) -> Tensor:
        """Whether either scale is NaN."""
        return self.group.isnan() if self.tensor is None else self.group.isnan() | self.tensor.isnan()

    @property
    def tensor_or_one(self) -> Tensor | float:
        """The tensor's scale, as a factor."""
        return 1.0 if self.tensor is None else self.tensor

    def split(self) -> Scale:
        """The product of both, ready for quotients and products."""
        return split_scale(self.group) if self.tensor is None else split_scale(self.tensor, self.group)


def find_scale(
    magnitude: Tensor, constants: ScaledConstants, layout: Layout, tensor_scale: Tensor | float | None
) -> GroupScale:
    """Each group's scale, of layout.reduced's shape. magnitude: int32 patterns of |x|, of layout.view's."""
    given = None if tensor_scale is None else _given(tensor_scale, magnitude, layout)
    if constants.scale == "fp32" and given is not None:
        return GroupScale(given.expand(layout.reduced), None, None, constants.scale, True)
    amax = magnitude.amax(layout.dims, keepdim=True)
    if constants.scale == "e8m0fnu":
        scale, inverse = power_of_two_scale(amax, constants.threshold, constants.offset)
        return GroupScale(scale, inverse, None, constants.scale, False)
    if constants.scale == "fp32":
        return GroupScale(fp32_scale(amax, constants.largest), None, None, constants.scale, False)
    if given is None:
        whole = tuple(range(layout.batch_dims, amax.ndim))
        given = fp32_scale(amax.amax(whole, keepdim=True), constants.largest_product)
    largest = split_scale(given, constants.largest)
    limit = constants.scale_constants.max_bits
    ratio = nudged_quotient(amax.view(torch.float32), largest, 5, limit)
    pattern = round_to_element(ratio, constants.scale_constants).view(torch.int32)
    group = torch.where(amax < INFINITY, torch.clamp(pattern, min=constants.smallest_scale_bits), NAN)
    return GroupScale(group.view(torch.float32), None, given, constants.scale, False)


def _given(tensor_scale: Tensor | float, magnitude: Tensor, layout: Layout) -> Tensor:
    t = torch.as_tensor(tensor_scale, dtype=torch.float32, device=magnitude.device).detach()
    t = against(t, layout.batch_dims, magnitude.ndim)
    return torch.where((t > 0) & (t < float("inf")), t, float("nan"))


def quotient(magnitude: Tensor, scale: GroupScale, constants: ScaledConstants) -> Tensor:
    """|x| / scale, or a number that rounds as it does."""
    a = magnitude.view(torch.float32)
    return (
        nudged_quotient(a, scale.split(), constants.p, constants.limit) if scale.inverse is None else a * scale.inverse
    )


def rounded(
    bits: Tensor,
    scale: GroupScale,
    constants: ScaledConstants,
    layout: Layout,
    shape: Sequence[int],
    seed: int | Tensor | None,
    random_bits: Tensor | None,
    stochastic_bits: int,
) -> Tensor:
    """The elements, signed, by any rounding; FP32 in layout.view's shape."""
    magnitude = bits & MAGNITUDE
    if constants.wide and scale.inverse is None:
        exact = _wide_quotient(bits, scale)
    else:
        y = quotient(magnitude, scale, constants).view(torch.int32)
        # Whatever is not zero must not look like it to a directed rounding, and inf must look like inf.
        y = torch.where(magnitude > 0, torch.clamp(y, min=SMALLEST_NORMAL), y)
        y = torch.where(magnitude >= INFINITY, magnitude, y)
        exact = signed(y.view(torch.float32), bits)
    q = quantize(
        layout.join(exact, shape),
        constants.element,
        constants.rounding,
        constants.overflow,
        seed=seed,
        random_bits=random_bits,
        stochastic_bits=stochastic_bits,
    )
    return layout.split(q.to(torch.float32))


def _wide_quotient(bits: Tensor, scale: GroupScale) -> Tensor:
    """The quotient x / S in FP64, to 48 bits: for stochastic rounding, and for elements too long for `nudged_quotient`.

    S is exact in FP64. The quotient's last bits go so that it does not matter how a compiler divides; a quotient equal to a
    number of at most 16 bits becomes it, and no other does (x and such a number times S differ by 2^-44 of themselves).
    """
    s = scale.group.to(torch.float64) * (1.0 if scale.tensor is None else scale.tensor.to(torch.float64))
    y = bits.view(torch.float32).to(torch.float64) / s
    return ((y.view(torch.int64) + (1 << 4)) & -(1 << 5)).view(torch.float64)


def times(q: Tensor, scale: GroupScale, dtype: torch.dtype, two_bits: bool = False, long: bool = False) -> Tensor:
    """Magnitudes of finite elements times their scale: FP32 numbers that round to dtype as the exact products do."""
    if long and dtype != torch.float32:
        return long_product(q, scale.group)  # such elements have no scale of the tensor
    if scale.kind == "e8m0fnu":
        return q * scale.group
    return product(q, scale.split(), scale.group if scale.tensor is None else scale.tensor, dtype, two_bits)


def times_anything(q: Tensor, scale: GroupScale, dtype: torch.dtype, long: bool) -> Tensor:
    """The same for signed elements, inf and NaN among them."""
    if scale.kind == "e8m0fnu" and not long:
        return q * scale.group
    exact = signed(times(q.abs(), scale, dtype, long=long), q.view(torch.int32))
    return torch.where(q.isfinite(), exact, q * scale.group * scale.tensor_or_one)


def signed(magnitude: Tensor, bits: Tensor) -> Tensor:
    """A non-negative FP32 magnitude with the sign bit of an int32 pattern."""
    return (magnitude.view(torch.int32) | (bits & ~MAGNITUDE)).view(torch.float32)


def prepare(
    x: Tensor,
    f: Format | str,
    axis: int,
    rounding: str,
    overflow: str,
    rule: str | None,
    tensor_scale: Tensor | float | None,
    batch_dims: int,
) -> tuple[ScaledConstants, Layout]:
    """Everything that can be refused before any work is."""
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be float32, bfloat16 or float16, got {dtype_name(x.dtype)}; convert it first")
    name = f if isinstance(f, str) else f.canonical_name
    constants = scaled_constants(name, rule, rounding, overflow)
    if tensor_scale is not None and not constants.takes_tensor_scale:
        raise ValueError(f"{name} has no tensor scale, so none can be given; leave tensor_scale out")
    if isinstance(tensor_scale, Tensor) and tensor_scale.ndim and tensor_scale.shape != x.shape[:batch_dims]:
        expected = tuple(x.shape[:batch_dims])
        raise ValueError(f"tensor_scale must have the shape {expected} of the batch, got {tuple(tensor_scale.shape)}")
    return constants, lay_out(tuple(x.shape), constants.granularity, constants.group, axis, batch_dims)


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name, without torch's."""
    return str(dtype).removeprefix("torch.")
