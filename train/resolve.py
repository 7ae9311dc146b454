"""From a recipe's name to what it means: a table of the study's own, a named recipe, native-*, or a format's name.

Everything that can't be is refused here, in one line, before any work.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any, Literal, get_args

from formats import FloatFormat, Rounding, ScaledFormat
from formats.names import FAMILIES
from formats.rounding import Overflow, check_overflow
from formats.scaled import Granularity, ScaleRule
from formats.spec import ElementFormat
from train.idle_words import check_words
from train.named_recipes import NAMED, named_table
from train.operands import (
    OPERANDS,
    PRODUCTS,
    ROLES,
    Delayed,
    Described,
    OperandRule,
    Product,
    ProductRules,
    Role,
    Rules,
    can_vary,
    described,
)
from train.recipe import (
    NATIVE_PREFIX,
    NATIVE_RECIPES,
    AttentionForm,
    Carrier,
    Elsewhere,
    LinearPrecision,
    Native,
    Output,
    Recipe,
    Structure,
    narrowest_carrier,
)
from train.recipe_table import BODY, NONE, ProductTable, RecipeTable
from train.state_formats import StateFormats
from train.sums import Accumulation, parse_accumulation

ROUNDED_ON_ARRIVAL = (Rounding.NEAREST_EVEN, Rounding.TOWARD_ZERO)
FP8_UNITS = {"e4m3fn", "e5m2"}


def resolve_recipe(
    name: str,
    tables: Mapping[str, RecipeTable] | None = None,
    changes: Mapping[str, Any] | None = None,
    _within: tuple[str, ...] = (),
) -> Recipe:
    """The recipe that `name` means, with words of its table changed by `changes` (a study's axes).

    Raises ValueError, naming the nearest that exist, where `name` means nothing.
    """
    tables = tables or {}
    if name in _within and (name in tables or named_table(name)):
        raise ValueError(
            f"recipe {name!r} names itself as its LM head, by way of {' -> '.join(_within)}: name a format there"
        )
    table = _table(name, tables)
    if changes:
        table = RecipeTable(**{**table.given(), **changes})
    within = (*_within, name)
    recipe = _resolved(name, table, tables, within)
    own = tables.get(name) or (None if name in NAMED else named_table(name))
    if own is not None:
        check_words(own, table, recipe, set(changes or ()), lambda other: _resolved(name, other, tables, within))
    return recipe


def _resolved(name: str, table: RecipeTable, tables: Mapping[str, RecipeTable], within: tuple[str, ...]) -> Recipe:
    def place(word: str | None) -> LinearPrecision | None:
        return None if word is None else resolve_recipe(word, tables, None, within).body

    try:
        body = _linear(table)
    except ValueError as error:
        if name in tables or named_table(name) is not None:
            told = str(error)
            raise ValueError(told if told.startswith("recipe ") else f"recipe {name!r}: {told}") from None
        told = _hinted(name, error, tables)
        raise ValueError(
            f"recipe {name!r} is neither a [recipes] table, a named recipe, native-* nor a format ({told})"
        ) from None
    head = body if table.lm_head in (None, BODY) else place(table.lm_head)
    attention, mlp = place(table.attention), place(table.mlp)
    first, last = table.first_blocks or 0, table.last_blocks or 0
    kept = place(table.kept or NATIVE_PREFIX + "bf16") if first or last else None
    products = _attention_products(name, table, attention or body)
    body_, head_, attention, mlp, products, kept = _one_switch(name, [body, head, attention, mlp, products, kept])
    assert body_ is not None
    assert head_ is not None
    elsewhere = _elsewhere(table)
    form = _attention_form(name, table, products, elsewhere, body_.structure.carrier)
    scale = None if table.loss_scale == "dynamic" else float(table.loss_scale or 1.0)
    recipe = Recipe(
        name, body_, head_, attention, mlp, products, kept, first, last, form, elsewhere, scale, _state(table)
    )
    return _with_before(recipe, table, tables, within)


def _hinted(name: str, error: ValueError, tables: Mapping[str, RecipeTable]) -> str:
    """What is wrong with a format's name, and one hint: of recipes and formats together, unless the error has another."""
    problem, formats_hint, formats = str(error).partition("; the nearest formats are ")
    if not formats_hint and ";" in problem:
        return problem
    nearest = formats.split(", ") if formats else []
    known = [*tables, *NAMED, *NATIVE_RECIPES, *nearest, "e8m7", "e4m3fn", "e5m2"]
    near = difflib.get_close_matches(name, dict.fromkeys(known), n=3, cutoff=0.4) or nearest
    near = list(dict.fromkeys([*FAMILIES.get(name.lower(), ()), *near]))
    return f"{problem}; near it: {', '.join(near)}" if near else problem


def _table(name: str, tables: Mapping[str, RecipeTable]) -> RecipeTable:
    """The table of that name with its bases under it; a format's or native product's name stands for a table of it alone."""
    table = tables.get(name) or named_table(name) or RecipeTable(name, name, name)
    seen = [name]
    while table.base is not None:
        if table.base in seen:
            raise ValueError(f"recipe {name!r} rests on itself, by way of {' -> '.join([*seen, table.base])}")
        seen.append(table.base)
        base = tables.get(table.base) or named_table(table.base)
        table = table.over(base or RecipeTable(table.base, table.base, table.base))
    missing = [role for role in ROLES if getattr(table, role) is None]
    if missing:
        raise ValueError(f"recipe {name!r} says no format for {', '.join(missing)}: name one, or a base that has it")
    return table


def _with_before(
    recipe: Recipe, table: RecipeTable, tables: Mapping[str, RecipeTable], within: tuple[str, ...]
) -> Recipe:
    if table.before is None and table.until is None:
        return recipe
    if table.before is None or table.until is None:
        known, missing = ("until", "before") if table.before is None else ("before", "until")
        raise ValueError(f"recipe {recipe.name!r} has {known} and no {missing}: a schedule of precision needs both")
    before = resolve_recipe(table.before, tables, None, within)
    if before.before is not None:
        raise ValueError(f"recipe {recipe.name!r}: {table.before!r}, which comes before it, has a schedule of its own")
    if "fp64" in recipe.structure.carriers | before.structure.carriers:
        raise ValueError(f"recipe {recipe.name!r}: FP64 is for a whole run or none of it, so it has no schedule")
    for what, is_lost in (
        ("loss_scale", before.loss_scale not in (1.0, recipe.loss_scale)),
        ("the optimiser's formats", before.state not in (StateFormats(), recipe.state)),
    ):
        if is_lost:
            raise ValueError(
                f"recipe {recipe.name!r}: {table.before!r}, which comes before it, sets {what}, and loss scale and state are of "
                f"a whole run: say them in {recipe.name!r} itself, alike"
            )
    if before.loss_scale != recipe.loss_scale:
        before = replace(before, loss_scale=recipe.loss_scale)
    return replace(recipe, before=before, until=table.until)


def _elsewhere(table: RecipeTable) -> Elsewhere:
    words = {f.name: getattr(table, f.name) for f in fields(Elsewhere)}
    return Elsewhere(**{what: None if name in (None, NONE, "fp32") else name for what, name in words.items()})


def _state(table: RecipeTable) -> StateFormats:
    words = (table.master, table.first_moment, table.second_moment, table.weight_gradient)
    master, first, second, gradient = (None if word in (None, NONE, "fp32") else word for word in words)
    kept = any((master, first, second))
    if table.kahan and master is None:
        raise ValueError("kahan keeps what master weights lose, and FP32 ones lose nothing: name a format for master")
    # Of what there is nothing, nothing is said: neither word is of a state in FP32, nor a rounding of a gradient's.
    rounding = (table.state_rounding if kept else None) or "nearest_even"
    of = (table.state_of if kept or gradient else None) or "all"
    return StateFormats(master, first, second, gradient, rounding, bool(table.kahan), of)


def _linear(table: RecipeTable) -> LinearPrecision:
    output: Output = table.output or "bf16"
    accumulation = parse_accumulation(table.accumulate)
    names = {role: str(getattr(table, role)) for role in ROLES}
    given: dict[Product, ProductTable] = {p: getattr(table, p) or ProductTable() for p in PRODUCTS}
    every = [*names.values(), *(n for p in given.values() for role in ROLES if (n := getattr(p, role)) is not None)]
    if any(name.startswith(NATIVE_PREFIX) for name in every):
        return _native(every, output, accumulation)
    rules = Rules(*(_product_rules(table, product, given[product], names) for product in PRODUCTS))
    formats = {role: described(name) for role, name in names.items()}
    plain = _is_plain(rules)
    taken = [formats[role] if rule.format is None else described(rule.format) for _, role, rule in rules.items()]
    carrier = narrowest_carrier(taken, output)
    if accumulation is not None and any(isinstance(f, ScaledFormat) and f.scale != "fp32" for f in taken):
        raise ValueError(
            f"accumulate {accumulation.name} takes elements with FP32 scales or none: MX and NVFP4 sum in FP32 here"
        )
    if table.delayed and table.delayed_roles == ():
        raise ValueError(
            f"delayed = {table.delayed} and delayed_roles = [] names no operand: name some, or leave it out for all three"
        )
    if table.delayed and not rules.is_delayed:
        raise ValueError(
            f"delayed = {table.delayed} and no operand has a tensor's scale: name a format such as e4m3fn@tensor"
        )
    hardware = table.multiply == "fp8"
    if hardware:
        _check_hardware(taken, accumulation)
        pairs = [
            {getattr(pair, place).format for place in ("first", "second")}
            for pair in (rules.forward, rules.dgrad, rules.wgrad)
        ]
        if any(all(str(name).startswith("e5m2") for name in pair) for pair in pairs):
            raise ValueError(
                "multiply = 'fp8': FP8 units have no product of e5m2 with e5m2; take e4m3fn for one of them"
            )
    rounding = rules.forward.first.rounding
    structure = Structure(None, rounding, carrier, output, accumulation, None if plain else rules, hardware)
    own = {
        role: f for role, f in formats.items() if any(r == role and rule.format is None for _, r, rule in rules.items())
    }
    return LinearPrecision(structure, **{role: f for role, f in own.items() if isinstance(f, FloatFormat)})


def _product_rules(
    table: RecipeTable, product: Product, given: ProductTable, names: Mapping[Role, str]
) -> ProductRules:
    foreign = [role for role in ROLES if role not in OPERANDS[product] and getattr(given, role) is not None]
    if foreign:
        raise ValueError(f"{product} takes {' and '.join(OPERANDS[product])}, not {foreign[0]}")
    return ProductRules(*(_rule(table, product, role, given, names[role]) for role in OPERANDS[product]))


def _rule(table: RecipeTable, product: Product, role: Role, given: ProductTable, own: str) -> OperandRule:
    name = getattr(given, role) or own
    f = described(name)
    word = given.rounding or getattr(table, f"{role}_rounding") or table.rounding or Rounding.NEAREST_EVEN
    # Of a product that alone takes BF16: what the others' format needs is no remedy there.
    mixed = name == "bf16" and f != described(own) and not (given.rounding or table.rounding)
    rounding = Rounding.NEAREST_EVEN if mixed else Rounding(word)
    if isinstance(f, ElementFormat) and not f.signed:
        raise ValueError(f"{name} has no sign, and operands have: take a signed format")
    delayed = None
    if table.delayed and role in (table.delayed_roles or ROLES) and isinstance(f, ScaledFormat):
        name, delayed = _delayed(table, name, f)
    if (
        role == "weight"
        and isinstance(f, ScaledFormat)
        and f.granularity is Granularity.TILE
        and f.group[0] != f.group[1]
    ):
        raise ValueError(f"{name}: a weight's tiles serve two products, and must be square")
    hadamard = (table.hadamard_size or 16) if product in (table.hadamard or ()) else 0
    signs: Literal["fixed", "step"] = table.hadamard_signs or "fixed"
    overflow = table.overflow or "saturate"
    if overflow == "nonsaturating":
        element = f.element if isinstance(f, ScaledFormat) else f
        check_overflow(element.name, element.has_inf, element.has_nan, Overflow.NONSATURATING)
    of_run = name == own and can_vary(f) and table.multiply != "fp8" and overflow == "saturate"
    return OperandRule(None if of_run else name, rounding, delayed, hadamard, signs if hadamard else "fixed", overflow)


def _delayed(table: RecipeTable, name: str, f: ScaledFormat) -> tuple[str, Delayed | None]:
    """The format to which a given scale applies, and where that scale comes from; None where a format has no scale to delay."""
    of_power = f.granularity is Granularity.TENSOR and f.scale == "e8m0fnu"
    if not (f.takes_tensor_scale or of_power):
        return name, None
    if of_power and f.rule is not ScaleRule.RCEIL:
        raise ValueError(f"{name}: a delayed power of two is rounded up, so the rule must be rceil, got {f.rule}")
    delayed = Delayed(table.delayed or 0, table.delayed_margin or 0, table.delayed_rule or "max", of_power)
    return (f"{f.element.name}@tensor" if of_power else name), delayed


def _is_plain(rules: Rules) -> bool:
    """Whether every operand is a run's own format, rounded once by one deterministic mode: what the fused passes do."""
    every = [rule for _, _, rule in rules.items()]
    rounding = every[0].rounding
    return rounding in ROUNDED_ON_ARRIVAL and all(rule == OperandRule(None, rounding) for rule in every)


def _check_hardware(taken: list[Described], accumulation: Accumulation | None) -> None:
    for f in taken:
        whole = not isinstance(f, ScaledFormat) or (f.granularity is Granularity.TENSOR and f.scale == "fp32")
        element = f.element if isinstance(f, ScaledFormat) else f
        if element.name not in FP8_UNITS or not whole:
            raise ValueError(f"multiply = 'fp8' takes e4m3fn and e5m2, plain or @tensor, got {f.name}")
    if accumulation is not None:
        raise ValueError("multiply = 'fp8' sums as the hardware does: leave accumulate out")


def _native(names: Iterable[str], output: Output, accumulate: Accumulation | None) -> LinearPrecision:
    names = list(names)
    if len(set(names)) > 1:
        raise ValueError(
            f"operands {'/'.join(names)} mix a native product with formats: name a format for all three ('bf16' for BF16)"
        )
    if names[0] not in NATIVE_RECIPES:
        raise ValueError(f"{names[0]!r} is no native product; there are {', '.join(NATIVE_RECIPES)}")
    kind: Native = next(kind for kind in get_args(Native) if names[0] == NATIVE_PREFIX + kind)
    if accumulate is not None:
        raise ValueError(
            f"native-{kind} sums as the hardware does, so accumulate must be 'fp32', got {accumulate.name!r}: "
            "name a simulated format for it"
        )
    if kind == "bf16" and output != "bf16":
        raise ValueError("native-bf16 leaves its products in BF16: for an FP32 output take the simulated format 'bf16'")
    if kind == "fp16":
        output = "fp16"
    if output == "fp16" and kind != "fp16":
        raise ValueError(f"native-{kind} does not leave its products in FP16: output must be 'bf16' or 'fp32'")
    return LinearPrecision(Structure(kind, Rounding.NEAREST_EVEN, kind, "fp64" if kind == "fp64" else output))


def _attention_products(name: str, table: RecipeTable, linear: LinearPrecision) -> LinearPrecision | None:
    """QKᵀ and PV as the blocks' linears, where `products` is "all"; None where they stay in the carrier.

    All of q, k, the weights and v are activations, and rounded as such.
    """
    if table.products != "all" or linear.structure.native is not None:
        return None
    structure = linear.structure
    same = OperandRule(None, structure.rounding)
    rules = structure.rules or Rules(*(ProductRules(same, same) for _ in PRODUCTS))
    if rules is not None and rules.is_delayed:
        raise ValueError(f"recipe {name!r}: delayed scales are kept for linears, so products must be 'linears'")
    if linear.structure.accumulate is not None or linear.structure.hardware:
        raise ValueError(
            f"recipe {name!r}: QKᵀ and PV sum in FP32, so products must be 'linears' beside accumulate or multiply"
        )
    x, dy, w = rules.forward.first, rules.dgrad.first, rules.dgrad.second
    # A product that takes weights otherwise than the forward one does takes keys and values so too; but for tiles, which are for
    # weights alone. What is rotated is, on both sides.
    k = x if w == rules.forward.second or (w.scaled is not None and w.scaled.granularity is Granularity.TILE) else w
    k = replace(k, hadamard=dy.hadamard, signs=dy.signs)
    rules = Rules(ProductRules(x, x), ProductRules(dy, k), rules.wgrad)
    return replace(linear, structure=replace(structure, rules=rules), weight=linear.activation)


def _attention_form(
    name: str, table: RecipeTable, products: LinearPrecision | None, elsewhere: Elsewhere, carrier: Carrier
) -> AttentionForm:
    """Written out where anything inside it is rounded, which the fused kernel never does; in FP64 it is so by itself."""
    inside = "products = 'all'" if products else f"softmax = {elsewhere.softmax!r}" if elsewhere.softmax else None
    if inside is None:
        return table.attention_form or "fused"
    if table.attention_form == "fused":
        raise ValueError(
            f"recipe {name!r}: {inside} rounds inside attention, which one fused kernel can't: take attention_form = 'math'"
        )
    return "math" if products or carrier != "fp64" else table.attention_form or "fused"


def _one_switch(name: str, places: list[LinearPrecision | None]) -> list[LinearPrecision | None]:
    """All places with carriers that one program can hold: TF32 is a switch for all FP32 products, so not beside FP32.

    Simulated operands in TF32 are exact in FP32 too; native TF32 products are not FP32's, and are refused there. FP64 and FP16's
    outputs are for all places or none.
    """
    there = [place for place in places if place is not None]
    carriers = {place.structure.carrier for place in there}
    if "fp64" in carriers and len(carriers) > 1:
        raise ValueError(
            f"recipe {name!r} mixes native-fp64 with narrower products: FP64 is for a whole run or none of it"
        )
    if not {"tf32", "fp32"} <= carriers:
        return places
    if "tf32" in {place.structure.native for place in there}:
        raise ValueError(
            f"recipe {name!r} mixes native-tf32 with FP32 products, and the hardware's switch is one for both: "
            "take 'tf32', the simulated format, for native-tf32"
        )

    def wide(place: LinearPrecision | None) -> LinearPrecision | None:
        if place is None or place.structure.carrier != "tf32":
            return place
        return replace(place, structure=replace(place.structure, carrier="fp32"))

    return [wide(place) for place in places]
