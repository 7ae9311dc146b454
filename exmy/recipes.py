"""`exmy recipes`: what the named recipes do, operand by operand, and what each follows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.table import Table

from train.named_recipes import NAMED, PREFIXES
from train.operands import OPERANDS, PRODUCTS, ROLES, OperandRule
from train.recipe import LinearPrecision, Recipe
from train.recipe_table import RecipeTable
from train.resolve import resolve_recipe
from train.study_file import read_study

PLACES = ("blocks' linears", "LM head", "attention's linears", "MLP's linears", "QKᵀ and PV", "kept blocks")


def tables_of(study: Path | None) -> Mapping[str, RecipeTable]:
    """The recipes of a study's own; none without a study. StudyError where it can't be read."""
    return {} if study is None else read_study(study).recipes


def recipe_list() -> Table:
    """Every named recipe, a row each."""
    table = Table(
        title="Named recipes",
        caption="Besides: any format's name for every operand (e4m3fn, nvfp4, e4m3fn@row), native-bf16, -fp16, -tf32, "
        "-fp32, -fp64, and [recipes.NAME] of a study. exmy recipes show NAME says all.",
        show_lines=True,
    )
    table.add_column("recipe", no_wrap=True)
    for heading in ("what it follows", "what it does otherwise"):
        table.add_column(heading)
    for name, named in NAMED.items():
        table.add_row(name, named.follows, named.departs)
    for prefix, (_, follows) in PREFIXES.items():
        table.add_row(f"{prefix}FORMAT", follows, "")
    return table


def recipe_sheet(name: str, tables: Mapping[str, RecipeTable]) -> Iterator[Table | str]:
    """All that a recipe says: its source, every place's six operands, and what else it sets. ValueError for an unknown name."""
    recipe = resolve_recipe(name, tables)
    if name in NAMED and name not in tables:
        named = NAMED[name]
        yield f"{name}: {named.follows}."
        if named.departs:
            yield f"Otherwise than there: {named.departs}."
    table = Table(title=name)
    for heading in ("place", "product", "operand", "format", "rounding", "scale from", "rotated by"):
        table.add_column(heading)
    for place, linear in zip(PLACES, recipe.places, strict=True):
        if linear is not None:
            for row in _rows(linear):
                table.add_row(place, *row)
            table.add_section()
    yield table
    yield from further(recipe)


def _rows(linear: LinearPrecision) -> Iterator[tuple[str, ...]]:
    structure = linear.structure
    if structure.native is not None:
        yield "all", "all", f"{structure.native.upper()}, the hardware's own", "", "", ""
        return
    if structure.rules is None:
        for role in ROLES:
            name = getattr(linear, role).name
            yield "all", role, name, structure.rounding.value, "none", ""
        return
    for product in PRODUCTS:
        for role, rule in zip(OPERANDS[product], getattr(structure.rules, product), strict=True):
            name = rule.format or getattr(linear, role).name
            yield (
                product,
                role,
                name,
                rule.rounding.value,
                scale_words(rule),
                f"{rule.hadamard}, signs {rule.signs}" if rule.hadamard else "",
            )


def scale_words(rule: OperandRule) -> str:
    """Where an operand's scales come from."""
    if rule.scaled is None:
        return "none"
    if rule.delayed is None:
        return f"its own amax, {rule.scaled.rule}"
    return f"{rule.delayed.rule} amax of {rule.delayed.length} steps, margin {rule.delayed.margin}"


def further(recipe: Recipe) -> Iterator[str]:
    """What a recipe says beside its operands, in sentences."""
    body = recipe.body.structure
    sums = body.accumulate.description if body.accumulate else "in FP32" if not body.hardware else "as FP8 units do"
    yield f"Products: multiplied in {body.carrier.upper()}, summed {sums}, rounded to {body.output.upper()}."
    if recipe.kept is not None:
        yield f"Kept blocks: the first {recipe.first_blocks} and the last {recipe.last_blocks}."
    yield f"Attention: {'its own fused kernel, in the carrier' if recipe.attention_form == 'fused' else 'written out'}."
    for what, name in recipe.elsewhere.items():
        yield f"{what.capitalize()} rounded to {name}."
    if recipe.loss_scale != 1:
        yield f"Loss scale: {'dynamic' if recipe.loss_scale is None else format(recipe.loss_scale, 'g')}."
    yield f"The optimiser keeps: {recipe.state.word or 'FP32'}."
    if recipe.before is not None:
        yield f"The first {recipe.until} steps: {recipe.before.name} ({recipe.before.format})."
