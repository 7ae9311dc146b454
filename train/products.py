"""A linear layer's three products with operands rounded by rules: scaled formats, random bits, rotations, one rule a product.

    y  = out( Q(x) Q(W)   * factors )         x rounded along D, W along D
    dx = out( Q(dy) Q(W)ᵀ * factors )         dy along F, W along F
    dW = out( Q(x)ᵀ Q(dy) * factors )         both along S

What is rounded are values of the output type: what a mixed-precision program has in memory between two products, BF16 as a rule.
Weights are rounded from their master copies. A format with FP32 scales gives narrow values and factors (`formats.factored`): a
product of values is summed as the recipe says, in FP32 or shorter, and multiplied by both factors, first multiplied with each
other. Where a factor changes along the sum (tiles of 128, DeepSeek-V3), each chunk of it is multiplied by its own and the chunks
are added in FP32, in order.

To second derivatives every product is an ordinary one of the rounded operands, and rounding is the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from formats import FormatParameters, ScaledFormat, quantize, tensor_amax
from formats.compile_time import assume_constant_result
from formats.factored import Factored, quantize_factored
from train.accumulate import accumulated_product, parse_accumulation, smallest_normals
from train.hadamard import rotate, rotate_back
from train.operands import described
from train.precision import OperandPlan, Plan, Precision, ProductPlan, WeightOperand, dress, strip
from train.scaled_layers import can_change, scaled_matmul
from train.scaled_operands import is_served, seed_of, take_served
from train.straight_through import straight_through

FP8_DTYPES = {"e4m3fn": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
FP8_MULTIPLE = 16  # of each size, as cuBLAS asks
FIRST_OF_WGRAD = 4
HEAD_SITE = 0  # of another stream of seeds than the blocks' sites, which `model` numbers


def take(x: Tensor, plan: OperandPlan, axis: int, chunk: int, precision: Precision, site: int = 0) -> Factored:
    """The operand made from x for the product that contracts `axis` (-1 or -2): values in the carrier, [R, .., M, K], a factor.

    The factor, FP32 or None: [R, .., M or 1, K / chunk or 1]; or with the axes the other way round for -2. site: which of a
    block's products, so that no two draw the same random bits.
    """
    x = x.detach().to(torch.float32)
    if plan.hadamard:
        assert precision.signs is not None
        x = rotate(x, axis, precision.signs)
    seed, bits = seed_of(precision, plan, site) if plan.stochastic else None, None
    share = precision.share if precision.share is not None and precision.share.covers(plan.role) else None
    if share is not None and seed is not None:
        bits, seed = share.random_bits(seed, x.shape), None
    if plan.kind == "cast":
        return Factored(x.to(torch.bfloat16).to(precision.carrier), None)
    if plan.kind == "scaled":
        given = precision.scales[:, plan.role].detach() if plan.delayed and precision.scales is not None else None
        wider = x
        if share is not None and given is None:
            wider, given = share.with_largest(x, plan.name, axis)
        values, factor = quantize_factored(
            wider,
            plan.name,
            -1 if plan.tile else axis,
            plan.rounding,
            plan.overflow,
            tensor_scale=given,
            seed=seed,
            random_bits=bits,
            batch_dims=1,
        )
        values = values.narrow(-2, 0, x.shape[-2])
        if factor is not None:
            factor = _spread(factor, plan, axis, chunk, x.shape)
        return Factored(values.to(precision.carrier), factor)
    if plan.kind == "element":
        values = quantize(x, plan.name, plan.rounding, plan.overflow, seed=seed, random_bits=bits)
        return Factored(values.to(precision.carrier), None)
    parameters = (precision.activation, precision.weight, precision.gradient)[plan.role]
    assert parameters is not None
    parameters = FormatParameters(*(p.reshape(p.shape[0], *(1,) * (x.ndim - 1)) for p in parameters))
    if not plan.stochastic:
        values = precision.quantizer(x, parameters, plan.rounding)
    else:
        values = quantize(x, parameters, plan.rounding, seed=seed, random_bits=bits)
    return Factored(values.to(precision.carrier), None)


def _spread(factor: Tensor, plan: OperandPlan, axis: int, chunk: int, shape: Sequence[int]) -> Tensor:
    """A factor with an entry for each element of the axis that is kept, where it varies along it, and each chunk of the other."""
    last = factor.ndim - 1
    kept, along = (last - 1, last) if axis == -1 else (last, last - 1)
    if plan.across > 1:
        factor = factor.repeat_interleave(plan.across, kept).narrow(kept, 0, shape[kept])
    if chunk and plan.group > chunk:
        chunks = -(-shape[along] // chunk)
        factor = factor.repeat_interleave(plan.group // chunk, along).narrow(along, 0, chunks)
    return factor


def contract(a: Factored, b: Factored, plan: ProductPlan, precision: Precision, wide: bool = False) -> Tensor:
    """Each run's a b, [R, .., M, N], of operands [R, .., M, K] and [R, .., K, N]: FP32, or in the carrier where nothing remains
    to be done.
    """
    if precision.structure.hardware:
        names = [element_name(operand.name) for operand in (plan.first, plan.second)]
        output = torch.float32 if wide and precision.share is not None else precision.output
        y: Tensor = _fp8_product(a.values, b.values, a.factor, b.factor, *names, plan.fast, output)
        return y
    accumulate = precision.structure.accumulate
    chunk = plan.chunk if a.values.shape[-1] > plan.chunk else 0
    if accumulate is None and _has_kernel(a, b, chunk, precision):
        narrow = precision.output == torch.bfloat16 and not wide
        dtype = torch.bfloat16 if narrow else torch.float32
        by_kernel: Tensor = scaled_matmul(a.values, b.values, a.factor, b.factor, chunk, dtype)
        return by_kernel
    operands = (plan.first, plan.second)
    smallest = [None if accumulate is None else _smallest(operand, precision, a.values) for operand in operands]
    if chunk:
        by_chunks: Tensor = _chunked_product(
            a.values, b.values, a.factor, b.factor, chunk, accumulate.name if accumulate else None, *smallest
        )
        return by_chunks
    if accumulate is not None:
        y = accumulated_product(a.values, b.values, accumulate, *smallest)
    elif a.factor is None and b.factor is None and not (wide or precision.rounds_outputs):
        return torch.matmul(a.values, b.values)
    else:
        y = _wide_product(a.values, b.values)
    factors = [operand.factor for operand in (a, b) if operand.factor is not None]
    if not factors:
        return y
    return y * (factors[0] if len(factors) == 1 else factors[0] * factors[1])


def _has_kernel(a: Factored, b: Factored, chunk: int, precision: Precision) -> bool:
    """Whether a product has factors, and `scaled_kernels` takes it."""
    if not precision.kernels or (a.factor is None and b.factor is None):
        return False
    plain = a.values.ndim == 3 and a.values.dtype == b.values.dtype == torch.bfloat16
    return plain and (not chunk or can_change(chunk))


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype not in (torch.bfloat16, torch.float16):
        return torch.matmul(a, b)
    y = torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out_dtype=torch.float32)
    return y.view(*a.shape[:-1], b.shape[-1])


def _smallest(plan: OperandPlan, precision: Precision, like: Tensor) -> Tensor | None:
    """The smallest normal number of an operand's elements: exponents align by it."""
    parameters = (precision.activation, precision.weight, precision.gradient)[plan.role]
    if plan.kind == "run" and parameters is not None:
        return smallest_normals(parameters)
    return like.new_full((1, 1, 1), plan.smallest, dtype=torch.float32) if plan.smallest else None


# One operation to the compiler: a sum over tokens has hundreds of chunks.
@torch.library.custom_op("exmy::chunked_product", mutates_args=())
def _chunked_product(
    a: Tensor, b: Tensor, a_factor: Tensor | None, b_factor: Tensor | None, chunk: int, accumulate: str | None,
    a_smallest: Tensor | None, b_smallest: Tensor | None,
) -> Tensor:  # fmt: skip
    accumulation = parse_accumulation(accumulate)
    length = a.shape[-1]

    def of_chunk(factor: Tensor | None, axis: int, i: int) -> Tensor | float:
        if factor is None:
            return 1.0
        return factor if factor.shape[axis] == 1 else factor.narrow(axis, i, 1)

    total = a.new_zeros(*a.shape[:-1], b.shape[-1], dtype=torch.float32)
    for i, k in enumerate(range(0, length, chunk)):
        end = min(k + chunk, length)
        part_a, part_b = a[..., k:end], b[..., k:end, :]
        if accumulation is None:
            y = _wide_product(part_a, part_b)
        else:
            y = accumulated_product(part_a, part_b, accumulation, a_smallest, b_smallest)
        factor = of_chunk(a_factor, -1, i) * of_chunk(b_factor, -2, i)
        total += y * factor
    return total


@_chunked_product.register_fake
def _(
    a: Tensor, b: Tensor, a_factor: Tensor | None, b_factor: Tensor | None, chunk: int, accumulate: str | None,  # noqa: ARG001
    a_smallest: Tensor | None, b_smallest: Tensor | None,  # noqa: ARG001
) -> Tensor:  # fmt: skip
    return a.new_empty(*a.shape[:-1], b.shape[-1], dtype=torch.float32)


# As the compiler folds in formats' numbers: by name.
@assume_constant_result
def element_name(name: str) -> str:
    """The name of a format's elements."""
    f = described(name)
    return f.element.name if isinstance(f, ScaledFormat) else f.name


@torch.library.custom_op("exmy::fp8_product", mutates_args=())
def _fp8_product(
    a: Tensor, b: Tensor, a_factor: Tensor | None, b_factor: Tensor | None, a_name: str, b_name: str, fast: bool,
    output: torch.dtype,
) -> Tensor:  # fmt: skip
    """Each run's product by FP8 units, [R, M, N] in the output's dtype: of values that are FP8 numbers already."""
    (R, M, K), N = a.shape, b.shape[2]
    edge = [-size % FP8_MULTIPLE for size in (M, K, N)]
    a8 = F.pad(a, (0, edge[1], 0, edge[0])).to(FP8_DTYPES[a_name]).contiguous()
    b8 = F.pad(b, (0, edge[2], 0, edge[1])).mT.to(FP8_DTYPES[b_name]).contiguous().mT  # columns side by side
    one = torch.ones(R, 1, 1, dtype=torch.float32, device=a.device)
    # A scale has memory of its own: cuBLAS refuses one that does not begin at a multiple of 16 bytes.
    first, second = (list(map(Tensor.clone, (one if f is None else f).flatten())) for f in (a_factor, b_factor))
    y = [
        torch._scaled_mm(a8[r], b8[r], scale_a=first[r], scale_b=second[r], out_dtype=output, use_fast_accum=fast)
        for r in range(R)
    ]
    return torch.stack(y)[:, :M, :N].contiguous()


@_fp8_product.register_fake
def _(
    a: Tensor, b: Tensor, a_factor: Tensor | None, b_factor: Tensor | None, a_name: str, b_name: str, fast: bool,  # noqa: ARG001
    output: torch.dtype,
) -> Tensor:  # fmt: skip
    return a.new_empty(a.shape[0], a.shape[1], b.shape[2], dtype=output)


def transposed(f: Factored) -> Factored:
    """The operand with its last two axes exchanged."""
    return Factored(f.values.mT, None if f.factor is None else f.factor.mT)


def take_weight(w: Tensor, precision: Precision, site: int = 0, is_transposed: bool = False) -> WeightOperand:
    """A master weight [R, D, F] as its two products take it; or with its axes exchanged, [R, F, D], as an embedding lies."""
    plan = _plan(precision)
    axes = (-1, -2) if is_transposed else (-2, -1)
    first = take(w, plan.forward.second, axes[0], plan.forward.chunk, precision, site)
    if serves_both(plan, 1):
        return WeightOperand(*first)
    return WeightOperand(*first, *take(w, plan.dgrad.second, axes[1], plan.dgrad.chunk, precision, site))


def _plan(precision: Precision) -> Plan:
    assert precision.plan is not None
    return precision.plan


def serves_both(plan: Plan, role: int) -> bool:
    """Whether what was rounded for the first product of a role's two serves the other, factor and all."""
    operand = (plan.forward.first, plan.forward.second, plan.dgrad.first)[role]
    return plan.shared[role] and not operand.tile


def take_activation(x: Tensor, precision: Precision, site: int, training: bool) -> tuple[Factored, Factored | None]:
    """X [R, S, D] for the forward product, and for wgrad if that is to come."""
    plan = _plan(precision)
    both = serves_both(plan, 0)
    second = (plan.wgrad.first, plan.wgrad.chunk) if training and not both else None
    first, other = _take_both(x, (plan.forward.first, plan.forward.chunk), second, precision, site)
    return first, first if training and both else other


def take_gradient(dy: Tensor, precision: Precision, site: int) -> tuple[Factored, Factored]:
    """Dy [R, S, F] for dgrad and for wgrad."""
    plan = _plan(precision)
    second = None if serves_both(plan, 2) else (plan.wgrad.second, plan.wgrad.chunk)
    first, other = _take_both(dy, (plan.dgrad.first, plan.dgrad.chunk), second, precision, site)
    return first, other or first


def _take_both(
    x: Tensor, first: tuple[OperandPlan, int], second: tuple[OperandPlan, int] | None, precision: Precision, site: int
) -> tuple[Factored, Factored | None]:
    """X by two rules and chunks, for the product that contracts -1 and, if there is one, for that which contracts -2."""
    alike = second is not None and first[0].name == second[0].name
    if second is None or not (
        alike and is_served(x, first[0], -1, precision) and is_served(x, second[0], -2, precision)
    ):
        other = None if second is None else take_alone(x, second[0], -2, second[1], precision, site)
        return take_alone(x, first[0], -1, first[1], precision, site), other
    taken = take_served(x, first[0], second[0], precision, site)
    return _of_kernel(taken[0], *first, -1, x.shape), _of_kernel(taken[1], *second, -2, x.shape)


def take_alone(x: Tensor, plan: OperandPlan, axis: int, chunk: int, precision: Precision, site: int = 0) -> Factored:
    """`take`, by a kernel where one serves."""
    if not is_served(x, plan, axis, precision):
        return take(x, plan, axis, chunk, precision, site)
    taken = take_served(x, plan if axis == -1 else None, plan if axis == -2 else None, precision, site)
    return _of_kernel(taken[0] or taken[1], plan, chunk, axis, x.shape)


def _of_kernel(taken: Factored | None, plan: OperandPlan, chunk: int, axis: int, shape: Sequence[int]) -> Factored:
    assert taken is not None
    factor = None if taken.factor is None else _spread(taken.factor, plan, axis, chunk, shape)
    return Factored(taken.values, factor)


def forward_product(x: Factored, w: Factored, precision: Precision) -> Tensor:
    """Y = x W of operands, in the carrier."""
    return precision.to_output(contract(x, w, _plan(precision).forward, precision))


def dgrad_product(dy: Factored, w: Factored, precision: Precision) -> Tensor:
    """Dx = dy Wᵀ of operands, in the carrier."""
    return precision.to_output(contract(dy, transposed(w), _plan(precision).dgrad, precision))


def wgrad_product(x: Factored, dy: Factored, precision: Precision, rounded: bool = True) -> Tensor:
    """DW = xᵀ dy of operands, in the carrier; or in FP32, as a part of a sum, not rounded."""
    dw = contract(transposed(x), dy, _plan(precision).wgrad, precision, wide=not rounded)
    return precision.to_output(dw) if rounded else dw


class _Products(torch.autograd.Function):
    """x W, with gradients by rules. Tensors come one by one, and each once, which is how the compiler sees them: `strip`'s, then
    what else there is of a WeightOperand, whose forward tensor w is; `prepared` says what there is, None for a master weight.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, scales: Tensor | None, bare: Precision, counts: tuple[int, ...], site: int,
        is_transposed: bool, prepared: tuple[bool, ...] | None, *tensors: Tensor,
    ) -> Tensor:  # fmt: skip
        n = sum(counts)
        precision = dress(bare, counts, tensors[:n])._replace(scales=scales)
        x_out = precision.to_output(x.detach())
        if prepared is None:
            w_op = take_weight(w, precision, site, is_transposed)
        else:
            rest = iter(tensors[n:])
            w_op = WeightOperand(w, *(next(rest) if there else None for there in prepared))
        w_op = w_op.map(_turn) if is_transposed else w_op
        first, second = take_activation(x_out, precision, site, ctx.needs_input_grad[1])
        amax = tensor_amax(x_out, 1) if scales is not None else None
        ctx.save_for_backward(x, w, scales, amax, *w_op.second, *(second or (None, None)), *tensors[:n])
        ctx.bare, ctx.counts, ctx.site, ctx.is_transposed = bare, counts, site, is_transposed
        ctx.inputs = 8 + len(tensors)
        return forward_product(first, w_op.first, precision)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, w, scales, amax, w_values, w_factor, x_values, x_factor, *tensors = ctx.saved_tensors
        precision = dress(ctx.bare, ctx.counts, tensors)._replace(scales=scales)
        g = precision.to_output(dy.detach())
        for_dgrad, for_wgrad = take_gradient(g, precision, ctx.site)
        w_op, x_op = Factored(w_values, w_factor), Factored(x_values, x_factor)
        dx = dw = d_scales = None
        if ctx.needs_input_grad[0]:
            dx = dgrad_product(for_dgrad, w_op, precision).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dw = wgrad_product(x_op, for_wgrad, precision).to(w.dtype)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            plan, w = _plan(precision), _turn(w) if ctx.is_transposed else w
            if dx is not None:
                a, b = (_surrogate(t, o, plan.dgrad, i, precision) for i, t, o in ((0, dy, for_dgrad), (1, w, w_op)))
                dx = straight_through(torch.matmul(a, b.to(a.dtype).mT).to(x.dtype), dx)
            if dw is not None:
                a, b = (_surrogate(t, o, plan.wgrad, i, precision) for i, t, o in ((0, x, x_op), (1, dy, for_wgrad)))
                dw = straight_through(torch.matmul(a.mT, b.to(a.dtype)).to(w.dtype), dw)
        if dw is not None and ctx.is_transposed:
            dw = _turn(dw)
        if scales is not None and ctx.needs_input_grad[2]:
            of_g = tensor_amax(g, 1)
            d_scales = torch.stack([amax, torch.zeros_like(of_g), of_g], 1)
        return dx, dw, d_scales, *(None for _ in range(ctx.inputs - 3))


def _turn(t: Tensor) -> Tensor:
    return t.mT


def _surrogate(x: Tensor, operand: Factored, plan: ProductPlan, place: int, precision: Precision) -> Tensor:
    """What second derivatives see of an operand: its rounded value, rotated back, as if it were x."""
    rule = (plan.first, plan.second)[place]
    axis = -2 if rule.number >= FIRST_OF_WGRAD else -1
    value = whole(operand, plan.chunk, axis)
    if rule.hadamard:
        assert precision.signs is not None
        value = rotate_back(value, axis, precision.signs, x.shape[axis])
    return straight_through(x, value.to(x.dtype))


def whole(f: Factored, chunk: int, axis: int) -> Tensor:
    """Values * factor of an operand of the product that contracts `axis`, FP32."""
    values, factor = f.values.to(torch.float32), factor_of_elements(f, chunk, axis)
    return values if factor is None else values * factor


def factor_of_elements(f: Factored, chunk: int, axis: int) -> Tensor | None:
    """An operand's factor as it broadcasts against its values, or None."""
    if f.factor is None:
        return None
    factor, along = f.factor, f.values.ndim + axis
    if chunk and factor.shape[along] > 1:
        factor = factor.repeat_interleave(chunk, along).narrow(along, 0, f.values.shape[along])
    return factor


def product_by_rules(
    x: Tensor, w: Tensor | WeightOperand, precision: Precision, site: int = 0, is_transposed: bool = False
) -> Tensor:
    """Each run's x W, [R, S, F] in the carrier, of x [R, S, D] and a weight, master [R, D, F] or as it was taken; or a product
    of two activations, [R, .., M, K] and [R, .., K, N].

    is_transposed: the weight lies as [R, F, D], and is rounded as it lies. The gradient of precision.scales, [R, 3] where scales
    are delayed, is no derivative: it is the amaxes of activation and gradient, which the next scales come from (columns 0 and 2).
    """
    bare, counts, tensors = strip(precision._replace(scales=None))
    leaf, prepared = w, None
    if isinstance(w, WeightOperand):
        leaf, *others = w
        prepared = tuple(t is not None for t in others)
        tensors += [t for t in others if t is not None]
    if len(tensors) == 2:
        # Where nothing is differentiated, the compiler of PyTorch 2.11 knows a function without ctx by its number of
        # arguments, and takes one whose last, starred one has two for such a function: all would move by a place. A third, which
        # no one reads, keeps them where they belong; that of 2.13 allows no tensor twice.
        tensors.append(tensors[0].new_empty(0))
    result: Tensor = _Products.apply(x, leaf, precision.scales, bare, counts, site, is_transposed, prepared, *tensors)
    return result
