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
    """forward, dgrad or wgrad of a recipe: what this product's operands are rounded to, where it differs.

    activation  format of the activations that it takes
    weight      format of the weights that it takes
    gradient    format of the gradients that it takes
    rounding    of its operands
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    activation: str | None = None
    weight: str | None = None
    gradient: str | None = None
    rounding: RoundingWord | None = None


@dataclass(frozen=True)
class RecipeTable:
    """A recipe as a table. What is left out is as the base has it, or, without a base, the default.

    base                 a recipe to start from
    activation           format of the activations x that products take, scaled or not, or native-* for all three operands
    weight               format of the weights W that products take
    gradient             format of the gradients dy that products take
    rounding             of all operands (default: nearest_even)
    activation_rounding  of activations, where it differs
    weight_rounding      of weights, where it differs
    gradient_rounding    of gradients, where it differs
    forward              what y = x W rounds its operands to, where it differs: see [recipes.NAME.forward]
    dgrad                the same of dx = dy W^T
    wgrad                the same of dW = x^T dy
    overflow             what is too large becomes the largest value (saturate), or infinity, or NaN (default: saturate)
    output               type that products leave (default: bf16)
    accumulate           how sums are formed: fp32, hopper-fp8, hopper-fp8-promoted, k..p.. (default: fp32)
    multiply             products in a carrier that holds the formats, or by the hardware's own FP8 units (default: carrier)
    delayed              steps of amaxes from which tensors' scales are taken; 0 for the tensor's own amax (default: 0)
    delayed_margin       powers of two by which a delayed scale leaves room (default: 0)
    delayed_rule         the largest amax of those steps, or the latest (default: max)
    delayed_roles        operands with delayed scales (default: all three)
    hadamard             products whose operands are rotated by a Hadamard matrix first (default: none)
    hadamard_size        rows of that matrix (default: 16)
    hadamard_signs       random signs before it, fixed for a run, or new ones each step (default: fixed)
    lm_head              recipe of the LM head (default: body, the recipe itself)
    attention            recipe of attention's linears (default: the recipe itself)
    mlp                  recipe of the MLP's linears (default: the recipe itself)
    first_blocks         how many blocks at the start are done as `kept` says (default: 0)
    last_blocks          how many blocks at the end are done as `kept` says (default: 0)
    kept                 recipe of those blocks (default: native-bf16)
    products             rounded: of linears alone, or all, QK^T and PV too (default: linears)
    attention_form       one fused kernel, or math, written out (default: fused)
    gains                format that norms' gains are rounded to (default: none)
    residual             format that the residual stream is rounded to (default: none)
    softmax              format that attention's weights are rounded to (default: none)
    gelu                 format that the MLP's activation is rounded to (default: none)
    embedding            format that embeddings are rounded to (default: none)
    loss_scale           number by which the loss's gradient is multiplied, or dynamic (torch.amp.GradScaler's rule) (default: 1)
    master               format that weights are kept in (default: FP32)
    first_moment         format that Adam's first moment is kept in (default: FP32)
    second_moment        format that Adam's second moment is kept in (default: FP32)
    weight_gradient      format that the weight's gradient is rounded to before the update (default: FP32)
    state_rounding       of weights and moments that are kept (default: nearest_even)
    kahan                whether what a kept weight's rounding loses is added to the next update (default: false)
    state_of             whose weights and moments are kept so: all parameters', or only linears' (default: all)
    before               recipe of the first `until` steps
    until                steps that are trained by the recipe `before`

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
