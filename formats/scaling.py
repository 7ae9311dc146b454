"""Scaled formats on tensors: quantise and dequantise in one pass, or into codes and scales, and back.

    amax  = max |x| over a group               an integer maximum of FP32 patterns, in which inf and NaN win
    scale = rule(amax), rounded                formats.scaled.ScaleRule
    q     = round(x / scale)                   to the element format, of the exact quotient
    out   = q * scale                          rounded once to x's dtype, to nearest even

with `scale` standing for block scale * tensor scale in NVFP4. The arithmetic, with the reasons why each step is exact, is
in formats.scale_arithmetic: compiled or not, on CPU and GPU, the bits are the same.

What happens at the edges, the same for every scaled format:

    zeros           A group of zeros has the smallest scale there is: 2^-127 in E8M0 (as torchao), 2^-9 in E4M3, 2^-149 in
                    FP32. Its elements are zeros, with their signs where the element format has -0. Nothing divides by zero.
    inf, NaN        The scale of a group with an inf or a NaN in it is NaN, and so is every value of the group (OCP MX v1.0,
                    5.1: a NaN scale makes all of the block NaN; torchao). Where the tensor's amax enters a scale, the
                    group is the tensor. With a scale that was given, a NaN stays NaN, and an inf overflows like any number.
    too large       A product q * scale beyond x's dtype becomes inf, as IEEE 754 rounds: where a rule let an amax round up,
                    65504 in FP16 by mxfp4:even is 4 * 2^14. BF16 and FP32 have room up to their last binade.
    short groups    The last block or tile may be short, as if zeros followed; `encode_scaled` refuses that for MX and NVFP4,
                    which are stored in whole blocks.
    empty, 0-dim    An empty tensor gives an empty tensor; one without axes is a vector of one element.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from formats.rounding import DEFAULT_RANDOM_BITS, Overflow, Rounding
from formats.scale_arithmetic import INFINITY, MAGNITUDE, NAN, round_to_element
from formats.scaled_steps import find_scale, prepare, quotient, rounded, signed, times, times_anything
from formats.spec import Format


class Scales(NamedTuple):
    """The scales of a tensor, FP32: `group` of x's shape with each axis counted in groups; `tensor`, where there is one."""

    group: Tensor
    tensor: Tensor | None


def quantize_scaled(
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
) -> Tensor:
    """What x becomes when it is stored in the scaled format and read again; same shape and dtype.

    x: float32, bfloat16 or float16, any shape. f: a scaled format or its name. axis: the one along which rows and blocks lie;
    tiles lie in the last two. rounding, overflow, seed, random_bits, stochastic_bits: of the elements, as in `quantize`; scales
    round to nearest even. rule: another ScaleRule than the format's. tensor_scale: FP32, positive, of shape
    x.shape[:batch_dims] or a number: NVFP4's upper scale, or the scale itself of a format scaled per tensor; left out, it comes
    from the tensor's amax, which takes a pass of its own. batch_dims: so many leading axes stand for separate tensors (a pack's
    runs), each with a tensor scale of its own.

    The result carries no gradient. ValueError for another dtype, an axis that is not there or is one of the batch_dims, a tensor
    scale for a format that has none. A tensor scale that is not positive and finite makes its tensor NaN.
    """
    if x.ndim == 0:
        alone = quantize_scaled(
            x.reshape(1), f, axis, rounding, overflow, rule, tensor_scale, seed, random_bits, 0, stochastic_bits
        )
        return alone.reshape(())
    constants, layout = prepare(x, f, axis, rounding, overflow, rule, tensor_scale, batch_dims)
    if not x.numel():
        return x.detach().clone()
    x = x.detach()
    wide = layout.split(x.to(torch.float32))
    bits = wide.view(torch.int32)
    scale = find_scale(bits & MAGNITUDE, constants, layout, tensor_scale)
    if constants.fast:
        y = quotient(bits & MAGNITUDE, scale, constants)
        q = round_to_element(y, constants.element_constants)
        out = signed(times(q, scale, x.dtype, constants.two_bits), bits)
    else:
        q = rounded(bits, scale, constants, layout, x.shape, seed, random_bits, stochastic_bits)
        out = times_anything(q, scale, x.dtype, constants.long)
    if scale.given:
        out = torch.where(bits & MAGNITUDE > INFINITY, NAN, out.view(torch.int32)).view(torch.float32)
    return layout.join(out.to(x.dtype), x.shape)


def scales_of(
    x: Tensor,
    f: Format | str,
    axis: int = -1,
    rule: str | None = None,
    tensor_scale: Tensor | float | None = None,
    batch_dims: int = 0,
) -> Scales:
    """The scales that x has in the format; x not empty, otherwise as in `quantize_scaled`."""
    vector = x if x.ndim else x.reshape(1)
    constants, layout = prepare(
        vector, f, axis, Rounding.NEAREST_EVEN, Overflow.SATURATE, rule, tensor_scale, batch_dims
    )
    magnitude = layout.split(vector.detach().to(torch.float32)).view(torch.int32) & MAGNITUDE
    scale = find_scale(magnitude, constants, layout, tensor_scale)
    tensor = None if scale.tensor is None else scale.tensor.reshape(x.shape[:batch_dims])
    return Scales(scale.group.reshape(layout.group_shape), tensor)


def tensor_amax(x: Tensor, batch_dims: int = 0) -> Tensor:
    """The largest |x| of each tensor, FP32 of shape x.shape[:batch_dims]; inf or NaN if x has one (NaN wins), 0 if x is empty."""
    magnitude = x.detach().to(torch.float32).view(torch.int32) & MAGNITUDE
    flat = magnitude.reshape(*x.shape[:batch_dims], -1)
    return torch.cat([flat, flat.new_zeros(*flat.shape[:-1], 1)], -1).amax(-1).view(torch.float32)
