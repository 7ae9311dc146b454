"""A `[recipes.NAME]` table of a study file: the words by which a recipe is described, each with its default.

Every word is optional where the table names a `base`, a recipe to start from and change. `recipe` says what it comes to.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator
from pydantic.dataclasses import dataclass

from formats import Rounding, get_format
from train.accumulate import parse_accumulation
from train.operands import HADAMARD_SIZES, LONGEST_HISTORY, Product

NONE, BODY = "none", "body"  # no format; the recipe's own body, for its LM head
CLOSED = ConfigDict(extra="forbid")
RoundingWord = Literal[
    "nearest_even", "nearest_away", "toward_zero", "toward_positive", "toward_negative", "to_odd", "stochastic",
    "stochastic_a", "stochastic_b", "stochastic_c",
]  # fmt: skip
assert set(RoundingWord.__args__) == set(Rounding)  # type: ignore[attr-defined]


def known_format(name: str | None) -> str | None:
    """A format's name as it is; ValueError for one that means nothing."""
    if name is not None:
        get_format(name)
    return name


@dataclass(frozen=True, config=CLOSED)
class ProductTable:
    """forward, dgrad or wgrad of a recipe: what this product's operands are rounded to, where it differs."""

    activation: str | None = None
    weight: str | None = None
    gradient: str | None = None
    rounding: RoundingWord | None = None


@dataclass(frozen=True, config=CLOSED)
class RecipeTable:
    """A recipe as a table. None stands for the base's word, and without a base for the default that is told here.

    base: a recipe to start from. activation, weight, gradient: formats of the operands, scaled ones too, or native-* for all.
    rounding: of all operands (nearest_even); activation_rounding, ...: of one. forward, dgrad, wgrad: what a product does otherwise.
    output: what products leave (bf16). accumulate: how sums are formed (fp32). multiply: "carrier", or "fp8" for the hardware's own
    FP8 products. delayed: steps of history for tensors' scales (0: the tensor's own amax), delayed_margin, delayed_rule.
    hadamard: products whose operands are rotated first; hadamard_size (16); hadamard_signs: "fixed" for a run or new each "step".

    lm_head, attention, mlp: recipes for the LM head ("body": the recipe itself), the attention's linears, the MLP's. first_blocks, last_blocks: how many
    blocks are done as `kept` says (native-bf16). products: "linears", or "all" for QKᵀ and PV too. attention_form: "fused", or
    "math", written out.

    gains, residual, softmax, gelu, embedding: formats that what is no product is rounded to, to nearest even ("none").
    loss_scale: a number by which the loss's gradient is multiplied (1), or "dynamic". master, first_moment, second_moment,
    weight_gradient: formats of what the optimiser keeps (FP32), state_rounding and kahan: how master weights and moments are
    rounded. before, until: another recipe for the first `until` steps.
    """

    activation: str | None = None
    weight: str | None = None
    gradient: str | None = None
    rounding: RoundingWord | None = None
    output: Literal["bf16", "fp16", "fp32"] | None = None
    lm_head: str | None = None
    accumulate: str | None = None
    base: str | None = None
    activation_rounding: RoundingWord | None = None
    weight_rounding: RoundingWord | None = None
    gradient_rounding: RoundingWord | None = None
    forward: ProductTable | None = None
    dgrad: ProductTable | None = None
    wgrad: ProductTable | None = None
    multiply: Literal["carrier", "fp8"] | None = None
    delayed: Annotated[int, Field(ge=0, le=LONGEST_HISTORY)] | None = None
    delayed_margin: Annotated[int, Field(ge=-64, le=64)] | None = None
    delayed_rule: Literal["max", "most_recent"] | None = None
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
    gains: str | None = None
    residual: str | None = None
    softmax: str | None = None
    gelu: str | None = None
    embedding: str | None = None
    loss_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["dynamic"] | None = None
    master: str | None = None
    first_moment: str | None = None
    second_moment: str | None = None
    weight_gradient: str | None = None
    state_rounding: Literal["nearest_even", "toward_zero", "stochastic"] | None = None
    kahan: bool | None = None
    before: str | None = None
    until: Annotated[int, Field(ge=1)] | None = None

    @field_validator("accumulate")
    @classmethod
    def _known_sum(cls, word: str | None) -> str | None:
        parse_accumulation(word)
        return word

    @field_validator(
        "gains", "residual", "softmax", "gelu", "embedding", "master", "first_moment", "second_moment", "weight_gradient"
    )
    @classmethod
    def _known_formats(cls, name: str | None) -> str | None:
        return name if name == NONE else known_format(name)

    def given(self) -> dict[str, Any]:
        """The words that are not left to the base."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

    def over(self, base: RecipeTable) -> RecipeTable:
        """This table's words where it has them, the base's elsewhere."""
        return RecipeTable(**{**base.given(), **self.given(), "base": base.base})


assert HADAMARD_SIZES == (2, 4, 8, 16, 32, 64, 128, 256)
# What may be an axis of a study, and then changes every recipe of it; None for a recipe's own.
AXES = (
    "rounding", "output", "lm_head", "accumulate", "first_blocks", "last_blocks", "kept", "products", "attention_form", "gains",
    "residual", "softmax", "gelu", "embedding", "loss_scale", "master", "first_moment", "second_moment", "weight_gradient",
    "state_rounding", "kahan", "before", "until", "hadamard_size", "delayed", "delayed_margin", "delayed_rule",
    "gradient_rounding",
)  # fmt: skip
