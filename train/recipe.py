"""What precision a run trains in: a recipe names, for every linear layer, the formats of its operands.

A linear layer has three matrix products: y = x W forward, dx = dy Wᵀ and dW = xᵀ dy backward. Each takes two of three
operands, the activation x, the weight W and the gradient dy, so a recipe names three formats, or six where a product differs
(`operands`). *Simulated* recipes round the operands to a format's grid and multiply in a *carrier*, the narrowest hardware type
that holds the values exactly; the product's operands are then exactly those of hardware for that format. Sums are the carrier's
FP32 sums, wider than what some FP8 units do, unless `accumulate` says how they are formed. *Native* recipes hand the operands to
the hardware's own BF16, FP16, TF32 or FP32 products.

Places can differ: the blocks' linears (body; attention and MLP apart), the LM head, the first and last blocks, the attention
products QKᵀ and PV, which stay in the carrier unless `products` is "all", and operations that are no products (`elsewhere`). What
a product's output is rounded to is `output`, a property of the recipe and never of the carrier.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, get_args

from formats import ElementFormat, FloatFormat, Rounding, ScaledFormat, float_format
from train.operands import PRODUCTS, ROLES, Described, Rules, fits_bf16, significant
from train.state_formats import StateFormats
from train.sums import Accumulation

Native = Literal["bf16", "fp16", "tf32", "fp32", "fp64"]
Carrier = Literal["bf16", "fp16", "tf32", "fp32", "fp64"]
Output = Literal["bf16", "fp16", "fp32", "fp64"]
AttentionForm = Literal["fused", "math"]

NATIVE_PREFIX = "native-"
NATIVE_RECIPES = tuple(NATIVE_PREFIX + kind for kind in get_args(Native))
TF32_BITS = 11


@dataclass(frozen=True)
class Structure:
    """The part of a linear layer's precision that is fixed in a program; formats that no rule names vary along the run axis.

    rules: None where every operand is rounded once, by `rounding`, to its run's format. hardware: products of FP8 units.
    """

    native: Native | None
    rounding: Rounding
    carrier: Carrier
    output: Output
    accumulate: Accumulation | None = None
    rules: Rules | None = None
    hardware: bool = False


@dataclass(frozen=True)
class LinearPrecision:
    """How one linear layer computes. `activation`, `weight` and `gradient` are None for native products and where rules name the
    format.
    """

    structure: Structure
    activation: FloatFormat | None = None
    weight: FloatFormat | None = None
    gradient: FloatFormat | None = None

    @property
    def label(self) -> str:
        """The format as a word: "e4m3", "native-bf16", or "e4m3fn/e4m3fn/e5m2" for activation/weight/gradient; what a product
        takes otherwise is named behind it.
        """
        if self.structure.native is not None:
            return f"{NATIVE_PREFIX}{self.structure.native}"
        own = {role: f.name for role in ROLES if (f := getattr(self, role)) is not None}
        rules = self.structure.rules
        if rules is None:
            return _joined(list(own.values()))
        first = {role: pair[0].format or own[role] for role, pair in rules.by_role().items()}
        text = _joined(list(first.values()))
        for product in PRODUCTS:
            names = {role: rule.format or own[role] for p, role, rule in rules.items() if p == product}
            if any(name != first[role] for role, name in names.items()):
                text += f"+{product}:{_joined(list(names.values()))}"
        return text

    @property
    def arithmetic(self) -> str:
        """Everything that decides the layer's numbers, as text; what is as it was before a word for it existed is left out."""
        structure = self.structure
        words = [self.label, structure.rounding.value, structure.output]
        words += [structure.accumulate.name] if structure.accumulate else []
        words += [structure.rules.word] if structure.rules else []
        words += ["hardware"] if structure.hardware else []
        return ":".join(words)


def _joined(names: list[str]) -> str:
    return names[0] if len(set(names)) == 1 else "/".join(names)


@dataclass(frozen=True)
class Elsewhere:
    """Formats that operations outside the products are rounded to, to nearest even, their derivative left alone; None for FP32.

    gains: of the norms; residual: the stream after each addition; softmax: attention's weights; gelu: the MLP's activation;
    embedding: the tokens' and positions' vectors.
    """

    gains: str | None = None
    residual: str | None = None
    softmax: str | None = None
    gelu: str | None = None
    embedding: str | None = None

    def items(self) -> Iterator[tuple[str, str]]:
        """(what, format) for what is rounded."""
        for what in ("gains", "residual", "softmax", "gelu", "embedding"):
            if (name := getattr(self, what)) is not None:
                yield what, name


@dataclass(frozen=True)
class BlockLinears:
    """One block: its attention's linears, its MLP's, and QKᵀ and PV where these are rounded too."""

    attention: LinearPrecision
    mlp: LinearPrecision
    products: LinearPrecision | None = None


@dataclass(frozen=True)
class RecipeStructure:
    """What must be equal for two recipes to share a program."""

    places: tuple[Structure | None, ...]
    first_blocks: int
    last_blocks: int
    attention_form: AttentionForm
    elsewhere: Elsewhere

    @property
    def body(self) -> Structure:
        """Of the blocks."""
        assert self.places[0] is not None
        return self.places[0]

    @property
    def carriers(self) -> set[Carrier]:
        """Of all places."""
        return {place.carrier for place in self.places if place is not None}

    @property
    def natives(self) -> set[Native]:
        """The hardware's own products that are asked for."""
        return {place.native for place in self.places if place is not None and place.native is not None}


@dataclass(frozen=True)
class Recipe:
    """A name, the precision of the blocks' linears (`body`) and that of the LM head; the other fields where they differ.

    attention, mlp: of these linears, where not the body's. The first and last blocks are done as `kept` says. `products`: of QKᵀ
    and PV. loss_scale: a number, or None for a dynamic one. state: what the optimiser keeps. before: another recipe for the
    first `until` steps.
    """

    name: str
    body: LinearPrecision
    lm_head: LinearPrecision
    attention: LinearPrecision | None = None
    mlp: LinearPrecision | None = None
    products: LinearPrecision | None = None
    kept: LinearPrecision | None = None
    first_blocks: int = 0
    last_blocks: int = 0
    attention_form: AttentionForm = "fused"
    elsewhere: Elsewhere = field(default_factory=Elsewhere)
    loss_scale: float | None = 1.0
    state: StateFormats = field(default_factory=StateFormats)
    before: Recipe | None = None
    until: int = 0

    @property
    def places(self) -> tuple[LinearPrecision | None, ...]:
        """Every place in a fixed order: body, LM head, attention, MLP, attention's products, kept blocks."""
        return self.body, self.lm_head, self.attention, self.mlp, self.products, self.kept

    def block(self, index: int, layers: int) -> BlockLinears:
        """How block `index` of so many computes."""
        if self.kept is not None and (index < self.first_blocks or index >= layers - self.last_blocks):
            return BlockLinears(self.kept, self.kept)
        return BlockLinears(self.attention or self.body, self.mlp or self.body, self.products)

    @property
    def structure(self) -> RecipeStructure:
        """What must be equal for two recipes to share a program."""
        places = tuple(None if place is None else place.structure for place in self.places)
        return RecipeStructure(places, self.first_blocks, self.last_blocks, self.attention_form, self.elsewhere)

    @property
    def format(self) -> str:
        """The formats as one word, those of other places named where they differ."""
        text = self.body.label
        for name, place in (("attention", self.attention), ("mlp", self.mlp), ("head", self.lm_head)):
            if place is not None and place != self.body:
                text += f"+{name}:{place.label}"
        return text

    @property
    def arithmetic(self) -> list[str]:
        """Everything that decides the recipe's numbers, as text: for body and LM head, formats, rounding, output, and what else
        differs from what runs of before could do.
        """
        words = [self.body.arithmetic, self.lm_head.arithmetic]
        for name, place in (("attention", self.attention), ("mlp", self.mlp), ("products", self.products)):
            words += [f"{name}={place.arithmetic}"] if place is not None else []
        if self.kept is not None:
            words.append(f"kept{self.first_blocks}+{self.last_blocks}={self.kept.arithmetic}")
        words += [f"attention_form={self.attention_form}"] if self.attention_form != "fused" else []
        words += [f"{what}={name}" for what, name in self.elsewhere.items()]
        words += [f"loss_scale={self.loss_scale or 'dynamic'}"] if self.loss_scale != 1 else []
        words += [f"state={self.state.word}"] if self.state != StateFormats() else []
        words += [f"until{self.until}={self.before.arithmetic}"] if self.before is not None else []
        return words

    @property
    def description(self) -> str:
        """One sentence for the reader of a dataset: what is rounded, how, and what is not."""
        body = self.body.structure
        head = "LM head included" if self.lm_head == self.body else f"LM head in {self.lm_head.label}"
        if self.lm_head.structure.accumulate != body.accumulate:
            head += f" {_sums(self.lm_head.structure)}"
        parts = [
            _operands(self.body), head,
            *(f"{name} linears in {place.label}" for name, place in (("attention", self.attention), ("MLP", self.mlp)) if place),
        ]  # fmt: skip
        if self.kept is not None:
            parts.append(f"first {self.first_blocks} and last {self.last_blocks} blocks in {self.kept.label}")
        parts.append(f"products' outputs rounded to {body.output.upper()}")
        parts.append(
            "QK^T and PV stay in the carrier" if self.products is None else f"QK^T and PV in {self.products.label}"
        )
        rounded = [f"{what} rounded to {name}" for what, name in self.elsewhere.items()]
        parts += rounded
        if self.loss_scale != 1:
            parts.append(
                "loss scaled dynamically" if self.loss_scale is None else f"loss scaled by {self.loss_scale:g}"
            )
        if self.state != StateFormats():
            parts.append(f"the optimiser keeps {self.state.word}")
        if self.before is not None:
            parts.append(f"the first {self.until} steps in {self.before.format}")
        return "; ".join([*parts, "what is not named stays in FP32"])


def _operands(linear: LinearPrecision) -> str:
    structure = linear.structure
    if structure.native is not None:
        return f"{structure.native.upper()} operands by the hardware's own products in every linear layer"
    how = (
        f"by {structure.rounding.value}, saturating"
        if structure.rules is None
        else f"({_by_role(linear, structure.rules)})"
    )
    product = "by FP8 units" if structure.hardware else f"in {structure.carrier.upper()}"
    return (
        f"operands of every linear layer (x W, dy W^T, x^T dy) rounded to {linear.label} {how}, multiplied {product} "
        f"{_sums(structure)}"
    )


def _by_role(linear: LinearPrecision, rules: Rules) -> str:
    """How each operand is rounded, product by product where they differ."""
    parts = []
    for role, of in rules.by_role().items():
        products = [product for product, other, _ in rules.items() if other == role]
        words = [
            rule.word.replace("*", getattr(linear, role).name) if rule.format is None else rule.word for rule in of
        ]
        named = words[:1] if words[0] == words[1] else [f"{p} {word}" for p, word in zip(products, words, strict=True)]
        parts.append(f"{role} {', '.join(named)}")
    return "; ".join(parts)


def _sums(structure: Structure) -> str:
    return "with FP32 sums" if structure.accumulate is None else f"and summed {structure.accumulate.description}"


def narrowest_carrier(formats: list[Described], output: Output) -> Carrier:
    """The narrowest hardware type that holds an operand's values in every one of `formats` and whose products can leave in
    `output`.

    A BF16 product leaves in BF16 and an FP16 one in FP16, so each carries for its own output alone; TF32 (E8M10) holds the grids
    of both. ValueError where FP32 is too narrow.
    """
    if output == "bf16" and all(fits_bf16(f) for f in formats):
        return "bf16"
    if output == "fp16" and all(isinstance(f, ElementFormat) and float_format("fp16").holds(f) for f in formats):
        return "fp16"
    wide = [f.name for f in formats if not isinstance(f, ScaledFormat) and not float_format("fp32").holds(f)]
    if wide:
        raise ValueError(
            f"{', '.join(wide)} does not fit FP32, the widest carrier: take a format with a smaller range, e.g. e8m7"
        )
    return "tf32" if all(_fits_tf32(f) for f in formats) else "fp32"


def _fits_tf32(f: Described) -> bool:
    return significant(f) <= TF32_BITS if isinstance(f, ScaledFormat) else float_format("tf32").holds(f)
