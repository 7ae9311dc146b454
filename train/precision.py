"""One place's precision for a whole pack, as tensors and constants that a program can be compiled for.

A recipe says what is meant (`recipe`, `operands`); here that becomes numbers. What differs between a pack's runs are tensors with
the run axis first, [R, ...]: each run's formats, its random seeds, signs and scales. All else is a constant of the program.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from formats import FloatFormat, FormatParameters, Rounding, format_parameters, quantize
from formats.factored import Factored
from formats.scaled import Granularity
from train.compiling import Quantizer
from train.operands import OPERANDS, PRODUCTS, ROLES, TILE_AXES, OperandRule, Product, Role, Rules, described
from train.recipe import LinearPrecision, Structure
from train.share import Share

CARRIER_DTYPES = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32, "fp64": torch.float64,
}  # fmt: skip
OUTPUT_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


class OperandPlan(NamedTuple):
    """A rule as constants. kind: "run" takes the run's own format of that role, "cast" is BF16's own conversion, "element" and
    "scaled" a named format.

    group: how many elements along the contracted axis share a factor, 0 for all; across: how many on the other axis, 0 for all.
    number: 0..5, by which the operands of a layer draw different random bits. smallest: the elements' smallest normal number, 0
    where it is a run's own or the elements have none.
    """

    kind: str
    name: str
    rounding: str
    overflow: str
    stochastic: bool
    hadamard: int
    delayed: bool
    tile: bool
    group: int
    across: int
    role: int
    number: int
    smallest: float


class ProductPlan(NamedTuple):
    """Both operands of a product; after how many terms of its sum a factor changes, 0 for never; whether FP8 units sum fast and
    short, as they do in forward products (Transformer Engine, torchao).
    """

    first: OperandPlan
    second: OperandPlan
    chunk: int
    fast: bool


class Plan(NamedTuple):
    """The three products; and for which roles one rounded tensor serves both products that take it."""

    forward: ProductPlan
    dgrad: ProductPlan
    wgrad: ProductPlan
    shared: tuple[bool, bool, bool]


class Precision(NamedTuple):
    """The program's structure, and each run's formats, [R, 1, 1], where it has its own.

    plan: where operands are rounded by rules, these as constants. seed, int64 [R]: a step's and a layer's, where rules are
    stochastic. signs [R, n]: of rotations. scales [R, 3]: delayed scales of activation, weight and gradient.
    kernels: whether products by rules take the hand-written passes of `scaled_layers` where there is one. share: which part of a
    run's tokens this process has, None for all of them. smooth: whether only what the forward pass rounds is wanted, for
    derivatives of every order (see `smooth`).
    """

    structure: Structure
    carrier: torch.dtype
    activation: FormatParameters | None
    weight: FormatParameters | None
    gradient: FormatParameters | None
    quantizer: Quantizer
    plan: Plan | None = None
    seed: Tensor | None = None
    signs: Tensor | None = None
    scales: Tensor | None = None
    kernels: bool = False
    share: Share | None = None
    smooth: bool = False

    def formats(self, role: Role) -> FormatParameters | None:
        """The runs' own formats of that operand, where it is rounded when it is made; None where products do it."""
        own: FormatParameters | None = None if self.plan is not None else getattr(self, role)
        return own

    @property
    def native_dtype(self) -> torch.dtype | None:
        """What the hardware's own products take, where they are narrower than what lies between them."""
        native = self.structure.native
        return CARRIER_DTYPES[native] if native in ("bf16", "fp16") else None

    @property
    def output(self) -> torch.dtype:
        """What products leave."""
        return OUTPUT_DTYPES[self.structure.output]

    @property
    def rounds_outputs(self) -> bool:
        """Whether a product's result needs rounding to the output, since its carrier does not do so by itself."""
        return self.structure.output in ("bf16", "fp16") and self.carrier != self.output

    @property
    def unrounded(self) -> Precision:
        """For a gradient that is rounded further back: it stays in FP32 (FP64 in FP64)."""
        wide: Literal["fp32", "fp64"] = "fp64" if self.carrier == torch.float64 else "fp32"
        structure = Structure(wide, Rounding.NEAREST_EVEN, wide, wide)
        return Precision(structure, CARRIER_DTYPES[wide], None, None, None, self.quantizer)

    def to_output(self, x: Tensor) -> Tensor:
        """Values of the output type, in the carrier: what lies in memory between products."""
        x = x.to(self.output) if self.rounds_outputs else x
        # PyTorch 2.11 compiles a function of autograd whose result a cast left as it was to one with gradients of zero.
        return x if x.dtype == self.carrier else x.to(self.carrier)


class WeightOperand(NamedTuple):
    """A weight as its products take it: values [R, D, F] in the carrier, and FP32 factors of the results, None for 1.

    forward serves x W, and gradients are asked of it; backward serves dy Wᵀ, None where that takes forward, factor and all.
    """

    forward: Tensor
    forward_factor: Tensor | None = None
    backward: Tensor | None = None
    backward_factor: Tensor | None = None

    @property
    def first(self) -> Factored:
        """What x W takes."""
        return Factored(self.forward, self.forward_factor)

    @property
    def second(self) -> Factored:
        """What dy Wᵀ takes, lying as the forward one does."""
        return self.first if self.backward is None else Factored(self.backward, self.backward_factor)

    def map(self, change: Callable[[Tensor], Tensor]) -> WeightOperand:
        """The operand with every tensor changed."""
        return WeightOperand(*(None if t is None else change(t) for t in self))  # type: ignore[arg-type]


def strip(precision: Precision) -> tuple[Precision, tuple[int, ...], list[Tensor]]:
    """A precision without its tensors, how many each field had, and the tensors: the compiler takes them one by one."""
    fields = (
        precision.activation,
        precision.weight,
        precision.gradient,
        precision.seed,
        precision.signs,
        precision.scales,
    )
    parts = [() if f is None else (f,) if isinstance(f, Tensor) else tuple(f) for f in fields]
    bare = precision._replace(activation=None, weight=None, gradient=None, seed=None, signs=None, scales=None)
    return bare, tuple(len(part) for part in parts), [tensor for part in parts for tensor in part]


def dress(bare: Precision, counts: tuple[int, ...], tensors: Sequence[Tensor]) -> Precision:
    """What `strip` took apart, together again."""
    fields: list[tuple[Tensor, ...]] = []
    start = 0
    for count in counts:
        fields.append(tuple(tensors[start : start + count]))
        start += count
    activation, weight, gradient = (FormatParameters(*f) if f else None for f in fields[:3])
    seed, signs, scales = (f[0] if f else None for f in fields[3:])
    return bare._replace(activation=activation, weight=weight, gradient=gradient, seed=seed, signs=signs, scales=scales)


def pack_precision(
    linears: Sequence[LinearPrecision], device: torch.device, quantizer: Quantizer = quantize
) -> Precision:
    """Stack the runs' formats along the run axis. On a CPU the carrier is FP32, since its narrow products are several
    times slower.

    All runs must share one structure (the planner groups them so); raises ValueError otherwise.
    """
    structures = {linear.structure for linear in {id(linear): linear for linear in linears}.values()}
    if len(structures) != 1:
        raise ValueError(f"runs of {len(structures)} structures can't share a program: {sorted(map(str, structures))}")
    structure = structures.pop()
    carrier = CARRIER_DTYPES[structure.carrier]
    if device.type == "cpu" and carrier in (torch.bfloat16, torch.float16):
        carrier = torch.float32

    def stack(formats: list[FloatFormat | None]) -> FormatParameters | None:
        present = [f for f in formats if f is not None]
        return format_parameters(present, ndim=3, device=device) if present else None

    return Precision(
        structure,
        carrier,
        stack([linear.activation for linear in linears]),
        stack([linear.weight for linear in linears]),
        stack([linear.gradient for linear in linears]),
        quantizer,
        None if structure.rules is None else make_plan(structure.rules),
    )


def make_plan(rules: Rules) -> Plan:
    """The rules as constants."""
    plans = {}
    for n, product in enumerate(PRODUCTS):
        pair = getattr(rules, product)
        first, second = (_operand_plan(rule, product, i, 2 * n + i) for i, rule in enumerate(pair))
        plans[product] = ProductPlan(first, second, pair.chunk(product) or 0, product == "forward")
    shared = tuple(rule == other and not rule.along_an_axis for rule, other in rules.by_role().values())
    return Plan(plans["forward"], plans["dgrad"], plans["wgrad"], (shared[0], shared[1], shared[2]))


def _operand_plan(rule: OperandRule, product: Product, place: int, number: int) -> OperandPlan:
    f = rule.scaled
    group = across = 0
    tile = f is not None and f.granularity is Granularity.TILE
    if f is None or f.scale != "fp32":  # narrower scales are in the values
        pass
    elif tile:
        group, across = f.group[TILE_AXES[product][place]], f.group[1 - TILE_AXES[product][place]]
    elif f.granularity in (Granularity.ROW, Granularity.BLOCK):
        group, across = (f.group[0] if f.group else 0), 1
    kind = "run" if rule.format is None else "scaled" if f is not None else "element"
    element = None if rule.format is None else described(rule.format) if f is None else f.element
    smallest = max(element.smallest_normal, 2.0**-126) if isinstance(element, FloatFormat) else 0.0
    if rule.format == "bf16" and rule.rounding == "nearest_even":
        kind = "cast"
    return OperandPlan(
        kind, rule.format or "", rule.rounding.value, rule.overflow, rule.rounding.is_stochastic, rule.hadamard,
        rule.delayed is not None,
        tile, group, across, ROLES.index(OPERANDS[product][place]), number, smallest,
    )  # fmt: skip
