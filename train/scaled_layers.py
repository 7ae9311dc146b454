"""The kernels of scaled formats as operations that the compiler sees, and which formats they serve.

    scaled_matmul   a product times FP32 factors, constant or changing along its sum         `scaled_kernels`
    take_both       a tensor rounded for both products that take it, in one pass             `operand_kernels`
    amax            each run's largest magnitude, of a tensor and of its rotation            `operand_kernels`

`train.products` and `formats.factored` have the plain forms.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from formats import FloatFormat, ScaledFormat
from formats.bitwise import FP64, constants
from formats.compile_time import assume_constant_result
from formats.rounding import Overflow, Rounding
from formats.scaled import Granularity
from formats.scaled_constants import scaled_constants
from train.operands import described

LONGEST_MANTISSA = 3  # of an element: E4M3's
GROUPS = (16, 32, 64, 128)
ANY_GROUP = 16  # how a tile is cut where nothing depends on it
FEWEST_STEPS = 1 << 31  # elements of a run from which their numbers need 64 bits
SHORTEST_STEP, LONGEST_STEP = 16, 128  # terms of a sum that are multiplied at once
ROTATION = 16  # the size of rotations that there is a kernel for


class Elements(NamedTuple):
    """A scaled format as `take_both` takes it: group and kind of scale ("tensor" for a whole tensor's in FP32), then numbers.

    They are `formats.scaled_constants`', and for stochastic rounding `formats.bitwise`' in FP64 (wide_max, wide_normal: patterns
    of the largest value and of the smallest normal one).
    """

    group: int
    scale: str
    threshold: int
    offset: int
    largest: float
    p: int
    limit: int
    max_bits: int
    normal_bits: int
    magic: int
    quantum: float
    wide_max: int
    wide_normal: int


def elements_of(name: str) -> Elements | None:
    """A format's constants, or None where no kernel rounds to it: other groups, elements of more bits or all below 1, other
    scales.
    """
    f = described(name)
    if not isinstance(f, ScaledFormat) or not isinstance(f.element, FloatFormat) or f.element.ties_away:
        return None
    c = scaled_constants(f.canonical_name, None, Rounding.NEAREST_EVEN, Overflow.SATURATE)
    of_tensor = f.granularity is Granularity.TENSOR and f.scale == "fp32"
    of_blocks = f.granularity is Granularity.BLOCK and f.group[0] in GROUPS
    if not (of_tensor or of_blocks) or not c.fast or f.element.mantissa_bits > LONGEST_MANTISSA:
        return None
    if f.scale == "e8m0fnu" and c.offset < 0:  # subnormal amaxes have scales of their own
        return None
    wide = constants(f.element, FP64)
    e = c.element_constants
    return Elements(
        ANY_GROUP if of_tensor else f.group[0], "tensor" if of_tensor else f.scale, c.threshold, c.offset, c.largest, c.p,
        c.limit, e.max_bits, e.smallest_normal_bits, e.magic_shift, wide.quantum, wide.max_bits, wide.subnormals_below,
    )  # fmt: skip


@assume_constant_result
def kernel_group(name: str, rounding: str, overflow: str) -> int:
    """Of what the axes must be multiples for a kernel to round so: 1 for any size, 0 where there is no kernel."""
    elements = elements_of(name)
    if elements is None or overflow != Overflow.SATURATE:
        return 0
    if rounding not in (Rounding.NEAREST_EVEN, Rounding.STOCHASTIC, Rounding.STOCHASTIC_C):
        return 0
    return 1 if elements.scale == "tensor" else elements.group


@assume_constant_result
def whole_tensor_limit(name: str) -> float:
    """What a tensor's amax is divided by for its FP32 scale; 0 for formats without one."""
    f = described(name)
    assert isinstance(f, ScaledFormat)
    limit: float = scaled_constants(f.canonical_name, None, Rounding.NEAREST_EVEN, Overflow.SATURATE).largest_product
    return limit if f.takes_tensor_scale else 0.0


def can_change(chunk: int) -> bool:
    """Whether factors may change after so many terms: a power of two, or a multiple, that makes whole steps of the kernel."""
    if chunk > LONGEST_STEP:
        return chunk % LONGEST_STEP == 0
    return chunk >= SHORTEST_STEP and chunk & (chunk - 1) == 0


@torch.library.custom_op("exmy::scaled_matmul", mutates_args=())
def scaled_matmul(
    a: Tensor, b: Tensor, a_factor: Tensor | None, b_factor: Tensor | None, chunk: int, dtype: torch.dtype
) -> Tensor:
    """`scaled_kernels.scaled_matmul`."""
    from train import scaled_kernels

    return scaled_kernels.scaled_matmul(a, b, a_factor, b_factor, chunk, dtype)


@scaled_matmul.register_fake
def _(
    a: Tensor, b: Tensor, a_factor: Tensor | None, b_factor: Tensor | None, chunk: int, dtype: torch.dtype  # noqa: ARG001
) -> Tensor:  # fmt: skip
    return a.new_empty(a.shape[0], a.shape[1], b.shape[2], dtype=dtype)


@torch.library.custom_op("exmy::take_both", mutates_args=())
def take_both(
    x: Tensor, name: str, along_k: bool, along_m: bool, scale_k: Tensor | None, scale_m: Tensor | None,
    seed_k: Tensor | None, seed_m: Tensor | None, signs: Tensor | None, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`operand_kernels.take_both`, of a format by its name."""
    from train import operand_kernels

    elements = elements_of(name)
    if elements is None:
        raise ValueError(f"no kernel rounds to {name}; ask kernel_group first")
    return operand_kernels.take_both(
        x, elements, along_k, along_m, scale_k, scale_m, seed_k, seed_m, signs, dtype
    )  # fmt: skip


@take_both.register_fake
def _(
    x: Tensor, name: str, along_k: bool, along_m: bool, scale_k: Tensor | None, scale_m: Tensor | None,  # noqa: ARG001
    seed_k: Tensor | None, seed_m: Tensor | None, signs: Tensor | None, dtype: torch.dtype,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    elements = elements_of(name)
    assert elements is not None
    R, M, K = x.shape
    n, factors = elements.group, elements.scale == "fp32"
    return (
        x.new_empty((R, M, K) if along_k else (0,), dtype=dtype),
        x.new_empty((R, M, K) if along_m else (0,), dtype=dtype),
        x.new_empty((R, M, K // n) if along_k and factors else (0,), dtype=torch.float32),
        x.new_empty((R, M // n, K) if along_m and factors else (0,), dtype=torch.float32),
    )


@torch.library.custom_op("exmy::amax", mutates_args=())
def amax(x: Tensor, signs: Tensor | None) -> Tensor:
    """`operand_kernels.amax`."""
    from train import operand_kernels

    return operand_kernels.amax(x, signs)


@amax.register_fake
def _(x: Tensor, signs: Tensor | None) -> Tensor:  # noqa: ARG001
    return x.new_empty(x.shape[0], 2, dtype=torch.float32)
