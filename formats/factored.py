"""Scaled formats as matrix units take them: narrow values for the product, FP32 scales for its result.

`quantize_scaled` gives element * scale, rounded to a dtype. A matrix unit multiplies elements and brings FP32 scales in after its
sums, where they cost nothing and round nothing away: 448-level elements fit BF16, their products with an FP32 number do not.

    scale in e8m0fnu   values = element * scale                        factor: none
    scale in e4m3fn    values = element * scale, of the block           factor: the tensor's FP32 scale
    scale in fp32      values = element                                 factor: the group's FP32 scale

So values of at most 8 significant bits stay exact in BF16: E4M3, E5M2 and 8-bit integers, MX elements times a power of two within
BF16's exponents, and NVFP4's elements (2 bits) times E4M3 scales (4 bits). Where x's dtype holds the values so, or there is no
factor, `values * factor`, taken exactly and rounded once to x's dtype, is `quantize_scaled`. Where it does not, NF4's or int16's
elements in BF16 say, they are rounded to it first, and the product is another; such an x is to be given in FP32.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from formats.rounding import DEFAULT_RANDOM_BITS, Overflow, Rounding
from formats.scale_arithmetic import INFINITY, MAGNITUDE, NAN, round_to_element
from formats.scaled_steps import find_scale, prepare, quotient, rounded, signed, times_anything
from formats.spec import Format


class Factored(NamedTuple):
    """values * factor: values of x's shape and dtype; factor FP32, or None for 1.

    The factor has x's axes, each of as many entries as there are groups along it: [R, 1, 1] for one scale a tensor of R,
    [R, M, 1] for rows, [R, M, K / n] for blocks of n, [R, M / a, K / b] for tiles.
    """

    values: Tensor
    factor: Tensor | None


def quantize_factored(
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
) -> Factored:
    """X in a scaled format, in two factors; arguments, errors and edge cases as in `quantize_scaled`; x has an axis and elements.

    An inf or a NaN in x makes its group's factor NaN, or where there is none its values; a NaN under a scale that was given
    stays a NaN of the values.
    """
    constants, layout = prepare(x, f, axis, rounding, overflow, rule, tensor_scale, batch_dims)
    x = x.detach()
    wide = layout.split(x.to(torch.float32))
    bits = wide.view(torch.int32)
    scale = find_scale(bits & MAGNITUDE, constants, layout, tensor_scale)
    if constants.fast:
        y = quotient(bits & MAGNITUDE, scale, constants)
        values = signed(round_to_element(y, constants.element_constants), bits)
    else:
        values = rounded(bits, scale, constants, layout, x.shape, seed, random_bits, stochastic_bits)
    if constants.scale == "e8m0fnu":
        values = times_anything(values, scale, x.dtype, constants.long)
    elif constants.scale != "fp32":
        values = values * scale.group
    if scale.given:
        values = torch.where(bits & MAGNITUDE > INFINITY, NAN, values.view(torch.int32)).view(torch.float32)
    factor = scale.group if constants.scale == "fp32" else scale.tensor
    if factor is not None:
        shape = (
            layout.group_shape if constants.scale == "fp32" else (*x.shape[:batch_dims], *(1,) * (x.ndim - batch_dims))
        )
        factor = factor.reshape(shape)
    return Factored(layout.join(values.to(x.dtype), x.shape), factor)
