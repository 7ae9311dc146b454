"""What precision a run trains in: a recipe names, for every linear layer, the formats of its operands.

A linear layer has three matrix products: y = x W forward, dx = dy Wᵀ and dW = xᵀ dy backward. Each takes two of three
operands, the activation x, the weight W and the gradient dy, so a recipe names three formats. *Simulated* recipes round the
operands to a format's grid and multiply in a *carrier*, the narrowest hardware type that holds the grid exactly; the
product's operands are then exactly those of hardware for that format. Sums are the carrier's FP32 sums, wider than what some
FP8 units do, unless `accumulate` says how they are formed. *Native* recipes hand the operands to the hardware's own BF16, TF32 or
FP32 products.

The attention products QKᵀ and PV are not linear layers: they stay in the carrier (BF16, for a BF16 carrier), whatever the
formats are. What a product's output is rounded to is `output`, a property of the recipe and never of the carrier.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from formats import FloatFormat, Rounding, float_format
from train.accumulate import Accumulation, parse_accumulation

Native = Literal["bf16", "tf32", "fp32", "fp64"]
Carrier = Literal["bf16", "tf32", "fp32", "fp64"]
Output = Literal["bf16", "fp32", "fp64"]

NATIVE_PREFIX = "native-"
NATIVE_RECIPES = tuple(NATIVE_PREFIX + kind for kind in get_args(Native))
# Narrowest first. FP16 is missing on purpose: its products round their result to FP16, which `output` forbids, and TF32
# (E8M10) holds every grid that FP16 (E5M10) holds.
CARRIERS: tuple[Literal["bf16", "tf32", "fp32"], ...] = ("bf16", "tf32", "fp32")


@dataclass(frozen=True)
class Structure:
    """The part of a linear layer's precision that is fixed in a program; the formats themselves vary along the run axis."""

    native: Native | None
    rounding: Rounding
    carrier: Carrier
    output: Output
    accumulate: Accumulation | None = None


@dataclass(frozen=True)
class LinearPrecision:
    """How one linear layer computes. `activation`, `weight` and `gradient` are None for a native product."""

    structure: Structure
    activation: FloatFormat | None = None
    weight: FloatFormat | None = None
    gradient: FloatFormat | None = None

    @property
    def label(self) -> str:
        """The format as a word: "e4m3", "native-bf16", or "e4m3fn/e4m3fn/e5m2" for activation/weight/gradient."""
        if self.activation is None or self.weight is None or self.gradient is None:
            return f"{NATIVE_PREFIX}{self.structure.native}"
        names = [self.activation.name, self.weight.name, self.gradient.name]
        return names[0] if len(set(names)) == 1 else "/".join(names)


@dataclass(frozen=True)
class Recipe:
    """A name, the precision of the blocks' linears (`body`) and that of the LM head."""

    name: str
    body: LinearPrecision
    lm_head: LinearPrecision

    @property
    def structure(self) -> tuple[Structure, Structure]:
        """What must be equal for two recipes to share a program: (body, LM head)."""
        return self.body.structure, self.lm_head.structure

    @property
    def format(self) -> str:
        """The formats as one word, the LM head's named where it differs."""
        if self.lm_head == self.body:
            return self.body.label
        return f"{self.body.label}+head:{self.lm_head.label}"

    @property
    def arithmetic(self) -> list[str]:
        """Everything that decides the recipe's numbers, as text: for body and LM head, formats, rounding, output, and how sums
        are formed where the recipe says so (runs of before could not).
        """
        return [
            ":".join(
                [linear.label, linear.structure.rounding.value, linear.structure.output]
                + ([linear.structure.accumulate.name] if linear.structure.accumulate else [])
            )
            for linear in (self.body, self.lm_head)
        ]

    @property
    def description(self) -> str:
        """One sentence for the reader of a dataset: what is rounded, how, and what is not."""
        body = self.body.structure
        if body.native is not None:
            text = f"{body.native.upper()} operands by the hardware's own products in every linear layer"
        else:
            text = (
                f"operands of every linear layer (x W, dy W^T, x^T dy) rounded to {self.body.label} by {body.rounding.value}, "
                f"saturating, multiplied in {body.carrier.upper()} {_sums(body)}"
            )
        head = "LM head included" if self.lm_head == self.body else f"LM head in {self.lm_head.label}"
        if self.lm_head.structure.accumulate != body.accumulate:
            head += f" {_sums(self.lm_head.structure)}"
        return (
            f"{text}; {head}; products' outputs rounded to {body.output.upper()}; QK^T and PV stay in the carrier; "
            "master weights, optimiser, norms and residuals in FP32"
        )


def _sums(structure: Structure) -> str:
    return "with FP32 sums" if structure.accumulate is None else f"and summed {structure.accumulate.description}"


def narrowest_carrier(formats: tuple[FloatFormat, ...], output: Output) -> Carrier:
    """The narrowest hardware type whose grid holds every one of `formats` and whose products can leave in `output`.

    A BF16 product leaves in BF16, so an FP32 output needs TF32 at least. Raises ValueError where FP32 itself is too narrow.
    """
    for carrier in CARRIERS:
        if carrier == "bf16" and output == "fp32":
            continue
        if all(float_format(carrier).holds(f) for f in formats):
            return carrier
    wide = [f.name for f in formats if not float_format("fp32").holds(f)]
    raise ValueError(
        f"{', '.join(wide)} does not fit FP32, the widest carrier: take a format with a smaller range, e.g. e8m7"
    )


def _native(kind: Native, output: Output, accumulate: Accumulation | None) -> LinearPrecision:
    if accumulate is not None:
        raise ValueError(
            f"native-{kind} sums as the hardware does, so accumulate must be 'fp32', got {accumulate.name!r}: "
            "name a simulated format for it"
        )
    if kind == "bf16" and output == "fp32":
        raise ValueError("native-bf16 leaves its products in BF16: for an FP32 output take the simulated format 'bf16'")
    return LinearPrecision(Structure(kind, Rounding.NEAREST_EVEN, kind, "fp64" if kind == "fp64" else output))


def _linear(
    activation: str, weight: str, gradient: str, rounding: str, output: Output, accumulate: str | None = None
) -> LinearPrecision:
    operands = (activation, weight, gradient)
    if any(name.startswith(NATIVE_PREFIX) for name in operands):
        if len(set(operands)) > 1:
            raise ValueError(
                f"operands {'/'.join(operands)} mix a native product with formats: name a format for all three ('bf16' for BF16)"
            )
        if activation not in NATIVE_RECIPES:
            raise ValueError(f"{activation!r} is no native product; there are {', '.join(NATIVE_RECIPES)}")
        kind: Native = next(kind for kind in get_args(Native) if activation == NATIVE_PREFIX + kind)
        return _native(kind, output, parse_accumulation(accumulate))
    formats = tuple(float_format(name) for name in operands)
    for f in formats:
        if not f.shares_programs:
            raise ValueError(
                f"{f.name} can't be an operand's format yet: packs take signed floating-point formats with -0 and gradual "
                "underflow within FP32's normal range, such as e4m3fn"
            )
    carrier = narrowest_carrier(formats, output)
    structure = Structure(None, Rounding(rounding), carrier, output, parse_accumulation(accumulate))
    return LinearPrecision(structure, *formats)


def _without_mixed_fp32(
    name: str, body: LinearPrecision, head: LinearPrecision
) -> tuple[LinearPrecision, LinearPrecision]:
    """Both places with carriers that one program can hold: TF32 is a switch for all FP32 products, so not beside FP32.

    Simulated operands in TF32 are exact in FP32 too; native TF32 products are not FP32's, and are refused there.
    """
    if {body.structure.carrier, head.structure.carrier} != {"tf32", "fp32"}:
        return body, head
    if "tf32" in (body.structure.native, head.structure.native):
        raise ValueError(
            f"recipe {name!r} mixes native-tf32 with FP32 products, and the hardware's switch is one for both: "
            "take 'tf32', the simulated format, for native-tf32"
        )
    wide = [replace(place, structure=replace(place.structure, carrier="fp32")) for place in (body, head)]
    return wide[0], wide[1]


@dataclass(frozen=True)
class RecipeTable:
    """A `[recipes.NAME]` table of a study file, as validated; the words are public names."""

    activation: str
    weight: str
    gradient: str
    rounding: str = "nearest_even"
    output: Output = "bf16"
    lm_head: str | None = None
    accumulate: str | None = None


def resolve_recipe(name: str, tables: Mapping[str, RecipeTable] | None = None, _within: tuple[str, ...] = ()) -> Recipe:
    """The recipe that `name` means: a table of one's own, `native-bf16|tf32|fp32|fp64`, or a format's name for every operand.

    Raises ValueError, naming the nearest that exist, where `name` means nothing.
    """
    tables = tables or {}
    if name in _within:
        raise ValueError(
            f"recipe {name!r} names itself as its LM head, by way of {' -> '.join(_within)}: name a format there"
        )
    if name in tables:
        table = tables[name]
        body = _linear(table.activation, table.weight, table.gradient, table.rounding, table.output, table.accumulate)
        head = body if table.lm_head is None else resolve_recipe(table.lm_head, tables, (*_within, name)).body
        if (body.structure.carrier == "fp64") != (head.structure.carrier == "fp64"):
            raise ValueError(
                f"recipe {name!r} mixes native-fp64 with narrower products: FP64 is for a whole run or none of it"
            )
        return Recipe(name, *_without_mixed_fp32(name, body, head))
    try:
        body = _linear(name, name, name, Rounding.NEAREST_EVEN, "bf16")
    except ValueError as error:
        near = difflib.get_close_matches(name, [*tables, *NATIVE_RECIPES, "e8m7", "e4m3fn", "e5m2"], n=3, cutoff=0.4)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise ValueError(
            f"recipe {name!r} is neither a [recipes] table, native-* nor a format ({error}{hint})"
        ) from None
    return Recipe(name, body, body)
