"""A `[recipes.NAME]` table of a study file: the words by which a recipe is described, each with its default.

Every word is optional where the table names a `base`, a recipe to start from and change. `recipe` says what it comes to.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, ConfigDict, Field

from formats import Rounding, get_format
from train.operands import LONGEST_HISTORY, Product, Role
from train.sums import parse_accumulation

NONE, BODY = "none", "body"  # no format; the recipe's own body, for its LM head


def known_rounding(word: str) -> str:
    """A rounding's name as it is; ValueError for one that there is not."""
    if word not in set(Rounding):
        raise ValueError(f"rounding must be one of {', '.join(Rounding)}, got {word!r}")
    return word


def known_format(name: str) -> str:
    """A format's name, or "none", as it is; ValueError for one that means nothing."""
    if name != NONE:
        get_format(name)
    return name


def known_sum(word: str) -> str:
    """A word for how sums are formed, as it is; ValueError for one that means nothing."""
    parse_accumulation(word)
    return word


RoundingWord = Annotated[str, AfterValidator(known_rounding)]
FormatWord = Annotated[str, AfterValidator(known_format)]
SumWord = Annotated[str, AfterValidator(known_sum)]


@dataclass(frozen=True)
class ProductTable:
    """forward, dgrad or wgrad of a recipe: what this product's operands are rounded to, where it differs."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    activation: str | None = None
    weight: str | None = None
    gradient: str | None = None
    rounding: RoundingWord | None = None


@dataclass(frozen=True)
class RecipeTable:
    """A recipe as a table. None stands for the base's word, and without a base for the default that is told here.

    base: a recipe to start from. activation, weight, gradient: formats of the operands, scaled ones too, or native-* for all.
    rounding: of all operands (nearest_even); activation_rounding, ...: of one. forward, dgrad, wgrad: what a product does
    otherwise. overflow: what is too large becomes the largest value, or infinity. output: what products leave (bf16).
    accumulate: how sums are formed (fp32). multiply: "carrier", or "fp8" for the hardware's own FP8 products. delayed: steps of
    history for tensors' scales (0: the tensor's own amax), delayed_margin (0), delayed_rule (max), delayed_roles (all three).
    hadamard: products whose operands are rotated first; hadamard_size (16); hadamard_signs: "fixed" for a run, or new ones each
    "step".

    lm_head, attention, mlp: recipes for the LM head ("body": the recipe itself), the attention's linears, the MLP's.
    first_blocks, last_blocks: how many blocks are done as `kept` says (native-bf16). products: "linears", or "all" for QKᵀ and
    PV too. attention_form: "fused", or "math", written out.

    gains, residual, softmax, gelu, embedding: formats that what is no product is rounded to, to nearest even ("none").
    loss_scale: a number by which the loss's gradient is multiplied (1), or "dynamic". master, first_moment, second_moment,
    weight_gradient: formats of what the optimiser keeps (FP32), of all parameters or only of linears' weights (state_of);
    state_rounding and kahan: how master weights and moments are rounded. before, until: another recipe for the first `until`
    steps.

    A study file's tables are checked word by word as they are read; `resolve` checks what they mean together.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    activation: str | None = None
    weight: str | None = None
    gradient: str | None = None
    rounding: RoundingWord | None = None
    output: Literal["bf16", "fp16", "fp32"] | None = None
    lm_head: str | None = None
    accumulate: SumWord | None = None
    base: str | None = None
    activation_rounding: RoundingWord | None = None
    weight_rounding: RoundingWord | None = None
    gradient_rounding: RoundingWord | None = None
    forward: ProductTable | None = None
    dgrad: ProductTable | None = None
    wgrad: ProductTable | None = None
    overflow: Literal["saturate", "nonsaturating"] | None = None
    multiply: Literal["carrier", "fp8"] | None = None
    delayed: Annotated[int, Field(ge=0, le=LONGEST_HISTORY)] | None = None
    delayed_margin: Annotated[int, Field(ge=-64, le=64)] | None = None
    delayed_rule: Literal["max", "most_recent"] | None = None
    delayed_roles: tuple[Role, ...] | None = None
    hadamard: tuple[Product, ...] | None = None
    hadamard_size: Literal[2, 4, 8, 16, 32, 64, 128, 256] | None = None
    hadamard_signs: Literal["fixed", "step"] | None = None
    attention: str | None = None
    mlp: str | None = None
    first_blocks: Annotated[int, Field(ge=0)] | None = None
    last_blocks: Annotated[int, Field(ge=0)] | None = None
    kept: str | None = None
    products: Literal["linears", "all"] | None = None
    attention_form: Literal["fused", "math"] | None = None
    gains: FormatWord | None = None
    residual: FormatWord | None = None
    softmax: FormatWord | None = None
    gelu: FormatWord | None = None
    embedding: FormatWord | None = None
    loss_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["dynamic"] | None = None
    master: FormatWord | None = None
    first_moment: FormatWord | None = None
    second_moment: FormatWord | None = None
    weight_gradient: FormatWord | None = None
    state_rounding: Literal["nearest_even", "toward_zero", "stochastic"] | None = None
    kahan: bool | None = None
    state_of: Literal["all", "linears"] | None = None
    before: str | None = None
    until: Annotated[int, Field(ge=1)] | None = None

    def given(self) -> dict[str, Any]:
        """The words that are not left to the base."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

    def over(self, base: RecipeTable) -> RecipeTable:
        """The words that are given here, and the base's for the others."""
        return RecipeTable(**{**base.given(), **self.given(), "base": base.base})


# What may be an axis of a study, and then changes every recipe of it; None for a recipe's own.
AXES = (
    "rounding", "output", "lm_head", "accumulate", "first_blocks", "last_blocks", "kept", "products", "attention_form", "gains",
    "residual", "softmax", "gelu", "embedding", "loss_scale", "master", "first_moment", "second_moment", "weight_gradient",
    "state_rounding", "kahan", "state_of", "before", "until", "hadamard_size", "delayed", "delayed_margin", "delayed_rule",
    "gradient_rounding", "overflow",
)  # fmt: skip
