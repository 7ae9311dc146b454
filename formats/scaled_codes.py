"""Tensors in scaled formats as they are stored: a code for each element, a scale for each group, and back to values.

Conventions of the codes: an element's is its format's (`element.encode`), one in a byte; an E8M0 scale's is FP32's exponent
field, 2^(code - 127), 255 for NaN (OCP MX v1.0, 5.4.1); an E4M3 scale's is e4m3fn's. FP32 scales are values.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from formats.bits import decode, encode
from formats.groups import against, lay_out
from formats.rounding import DEFAULT_RANDOM_BITS, Overflow, Rounding
from formats.scale_arithmetic import HALF_OF_SMALLEST_NORMAL, MAGNITUDE, NAN
from formats.scaled import ScaledFormat
from formats.scaled_constants import is_long, resolve
from formats.scaled_steps import DTYPES, GroupScale, dtype_name, find_scale, prepare, rounded, times_anything
from formats.spec import Format


class Scaled(NamedTuple):
    """A tensor in a scaled format: one code an element, one scale a group.

    elements: uint8, of the tensor's shape, one code in each (not packed). scales: codes, uint8, for E8M0 and E4M3 scales, values
    for FP32 ones; their shape is the tensor's, each axis counted in groups. tensor_scale: FP32, of the leading batch_dims axes.
    """

    format: ScaledFormat
    elements: Tensor
    scales: Tensor
    tensor_scale: Tensor | None
    axis: int
    batch_dims: int


def encode_scaled(
    x: Tensor,
    f: Format | str,
    axis: int = -1,
    rounding: str = Rounding.NEAREST_EVEN,
    overflow: str = Overflow.SATURATE,
    rule: str | None = None,
    tensor_scale: Tensor | float | None = None,
    seed: int | Tensor | None = None,
    random_bits: Tensor | None = None,
    batch_dims: int = 0,
    stochastic_bits: int = DEFAULT_RANDOM_BITS,
) -> Scaled:
    """The codes and scales of x; arguments and errors as in `quantize_scaled`. Elements under a NaN scale are coded as 0.

    ValueError besides, where the format is stored in whole groups and x ends within one, for elements of more than 8 bits,
    and for x without axes or elements.
    """
    described = resolve(f, rule)
    constants, layout = prepare(x, f, axis, rounding, overflow, rule, tensor_scale, batch_dims)
    if not x.numel() or not x.ndim:
        raise ValueError(f"x of shape {tuple(x.shape)} has no groups to encode; give it an axis and elements")
    element = described.element
    if element.bits > 8:
        raise ValueError(f"codes are uint8, and {element} has {element.bits} bits; use quantize_scaled")
    if described.whole_groups:
        layout.check_whole(described.name)
    bits = layout.split(x.detach().to(torch.float32)).view(torch.int32)
    scale = find_scale(bits & MAGNITUDE, constants, layout, tensor_scale)
    q = rounded(bits, scale, constants, layout, x.shape, seed, random_bits, stochastic_bits)
    q = torch.where(scale.is_nan, 0.0, q)
    group = scale.group.reshape(layout.group_shape)
    scales = group if described.scale == "fp32" else _scale_codes(described.scale, group)
    tensor = None if scale.tensor is None else scale.tensor.reshape(x.shape[:batch_dims])
    # q is rounded already, by `overflow`: what is infinite now is to stay so.
    elements = encode(layout.join(q, x.shape), element, overflow=Overflow.PROPAGATE)
    return Scaled(described, elements, scales, tensor, axis, batch_dims)


def decode_scaled(scaled: Scaled, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of what `encode_scaled` made, element * scale [* tensor scale] rounded once to float32, bfloat16 or float16."""
    f, shape = scaled.format, scaled.elements.shape
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype_name(dtype)}")
    layout = lay_out(shape, f.granularity, f.group, scaled.axis, scaled.batch_dims)
    q = layout.split(decode(scaled.elements, f.element, torch.float32))
    group = scaled.scales if f.scale == "fp32" else _scale_values(f.scale, scaled.scales)
    group = group.reshape(layout.reduced)
    tensor = None if scaled.tensor_scale is None else against(scaled.tensor_scale, scaled.batch_dims, len(layout.view))
    scale = GroupScale(group, None, tensor, f.scale, False)
    return layout.join(times_anything(q, scale, dtype, is_long(f.element.canonical_name)).to(dtype), shape)


def _scale_codes(name: str, scales: Tensor) -> Tensor:
    if name == "e8m0fnu":
        return (scales.view(torch.int32) >> 23).to(torch.uint8)  # FP32's exponent field, NaN's and 2^-127's 0 included
    return encode(scales, name)


def _scale_values(name: str, codes: Tensor) -> Tensor:
    if name == "e8m0fnu":
        code = codes.to(torch.int32)
        pattern = torch.where(code == 0, HALF_OF_SMALLEST_NORMAL, torch.where(code == 255, NAN, code << 23))
        return pattern.view(torch.float32)
    return decode(codes, name, torch.float32)
