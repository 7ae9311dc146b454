"""Words of a recipe's table that would do nothing there, refused in a line that says what they need.

A word does nothing where any other value in its place makes the same recipe. Only those are looked at that the table itself has:
what a base brings along may be of no use to a recipe that starts from it, and what a word needs may come from a study's axes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from dataclasses import replace
from typing import Any, NamedTuple

from train.operands import PRODUCTS
from train.recipe import Recipe
from train.recipe_table import ProductTable, RecipeTable


class _Word(NamedTuple):
    """Some of a word's values; why it may do nothing, with the mend; which words of axes mend it, too; what it may always say.

    of_operands: whether it is of operands that are rounded, so that native products have none of it.
    """

    values: tuple[Any, ...]
    why: str
    mended_by: tuple[str, ...] = ()
    nothing: Any = None
    of_operands: bool = True


_ROUNDINGS = ("nearest_even", "toward_zero")
_OVERRIDDEN = "where every product that takes them has a rounding of its own, or BF16: leave it out"
_ROLES = _Word(_ROUNDINGS, _OVERRIDDEN, ("rounding",), "nearest_even")
_HADAMARD = "without hadamard: name the products whose operands are rotated"
_DELAYED = "without delayed: say of how many steps"
_MOMENTS = ("master", "first_moment", "second_moment")
_STATE = "to what the optimiser keeps, which is FP32 here: name a format for master, first_moment"
_SIMULATED = "name formats for the operands"

_WORDS: dict[str, _Word] = {
    "rounding": _Word(_ROUNDINGS, "where all operands have roundings of their own: leave it out", (), "nearest_even"),
    "activation_rounding": _ROLES,
    "weight_rounding": _ROLES,
    "gradient_rounding": _ROLES,
    "overflow": _Word(("saturate", "nonsaturating"), _SIMULATED, (), "saturate"),
    "multiply": _Word(("carrier", "fp8"), _SIMULATED, (), "carrier"),
    "delayed": _Word((0, 1), _SIMULATED, (), 0),
    "delayed_margin": _Word((0, 1), _DELAYED, ("delayed",)),
    "delayed_rule": _Word(("max", "most_recent"), _DELAYED, ("delayed",)),
    "delayed_roles": _Word((("activation",), ("weight",), ("gradient",)), _DELAYED, ("delayed",)),
    "hadamard": _Word(((), ("wgrad",)), _SIMULATED, (), ()),
    "hadamard_size": _Word((16, 32), _HADAMARD),
    "hadamard_signs": _Word(("fixed", "step"), _HADAMARD),
    "output": _Word(("bf16", "fp32"), _SIMULATED),
    "products": _Word(("linears", "all"), "where attention's linears are native: name formats for them", (), "linears"),
    "kept": _Word(
        ("native-bf16", "native-fp32"), "without first_blocks or last_blocks: say how many", ("first_blocks", "last_blocks"),
        of_operands=False,
    ),
    "state_rounding": _Word(_ROUNDINGS, f"{_STATE} or second_moment", _MOMENTS, "nearest_even", False),
    "state_of": _Word(
        ("all", "linears"), f"{_STATE}, second_moment or weight_gradient", (*_MOMENTS, "weight_gradient"), "all",
        False,
    ),
}  # fmt: skip


def check_words(
    own: RecipeTable,
    table: RecipeTable,
    recipe: Recipe,
    axes: Set[str],
    resolved: Callable[[RecipeTable], Recipe],
) -> None:
    """ValueError for a word of `own` that does nothing in `recipe`, which `resolved` made of the table, `own` over its bases.

    axes: the words that axes of a study have set in the table.
    """
    native = recipe.body.structure.native

    def same(other: RecipeTable) -> bool:
        try:
            return resolved(other) == recipe
        except ValueError:  # refused for what it would do
            return False

    for said, word, value, others in _said(own, table):
        nothing = recipe.body.structure.output if said == "output" else word.nothing
        if value == nothing or said in axes or not axes.isdisjoint(word.mended_by) or not all(map(same, others)):
            continue
        shown = list(value) if isinstance(value, tuple) else value
        why = word.why
        if native and word.of_operands:
            why = f"beside native-{native}, the hardware's own products: {_SIMULATED}"
        raise ValueError(f"recipe {recipe.name!r}: {said} = {shown!r} does nothing {why}")


def _said(own: RecipeTable, table: RecipeTable) -> Iterator[tuple[str, _Word, Any, list[RecipeTable]]]:
    """What the table itself says: the word, its value, and the whole table with other values in its place."""

    def changed(name: str, value: Any) -> RecipeTable:
        return replace(table, **{name: value})

    for name, word in _WORDS.items():
        if (value := getattr(own, name)) is not None:
            yield name, word, value, [changed(name, other) for other in word.values if other != value]
    for product in PRODUCTS:
        given: ProductTable | None = getattr(own, product)
        if given is not None and (value := given.rounding) is not None:
            others = [changed(product, replace(given, rounding=other)) for other in _ROUNDINGS if other != value]
            yield f"{product}.rounding", _WORDS["rounding"], value, others
