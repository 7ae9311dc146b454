"""Recipes as diagrams, and the grids of their formats: which product takes what, rounded how, and which values there are.

A recipe's places (its blocks' linears, the LM head, ...) that compute alike are one diagram of three products.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from exmy.grids import STROKES_UP_TO, smallest_positive
from exmy.recipes import PLACES, further, scale_words
from formats import ElementFormat, FloatFormat, ScaledFormat, get_format
from train.operands import OPERANDS, PRODUCTS, Product, Role
from train.recipe import LinearPrecision, Recipe
from train.recipe_table import RecipeTable
from train.resolve import resolve_recipe

EQUATIONS: dict[Product, str] = {"forward": "y = x W", "dgrad": "dx = dy Wᵀ", "wgrad": "dW = xᵀ dy"}
RESULTS: dict[Product, str] = {"forward": "y", "dgrad": "dx", "wgrad": "dW"}
LETTERS: dict[tuple[Product, Role], str] = {
    ("forward", "activation"): "x", ("forward", "weight"): "W", ("dgrad", "gradient"): "dy", ("dgrad", "weight"): "Wᵀ",
    ("wgrad", "activation"): "xᵀ", ("wgrad", "gradient"): "dy",
}  # fmt: skip


def resolved(names: Iterable[str], tables: Mapping[str, RecipeTable]) -> dict[str, Recipe]:
    """The recipes of those names; one that this version does not know is left out."""
    found = {}
    for name in names:
        try:
            found[name] = resolve_recipe(name, tables)
        except ValueError:
            continue
    return found


def diagram(recipe: Recipe) -> dict[str, Any]:
    """The recipe's places, each with its three products, and what else it says, in sentences."""
    places: dict[LinearPrecision, list[str]] = {}
    for name, linear in zip(PLACES, recipe.places, strict=True):
        if linear is not None:
            places.setdefault(linear, []).append(name)
    return {
        "places": [{"names": names, "products": list(map(_product(linear), PRODUCTS))} for linear, names in places.items()],
        "notes": list(further(recipe)),
        "formats": sorted({f.name for f in formats_of(recipe)}),
    }  # fmt: skip


def _product(linear: LinearPrecision) -> Any:
    structure = linear.structure
    if structure.native is not None:
        summed = "the hardware's own"
    elif structure.accumulate is not None:
        summed = f"summed {structure.accumulate.description}"
    else:
        summed = "summed as FP8 units do" if structure.hardware else "summed in FP32"

    def of(product: Product) -> dict[str, Any]:
        operands = [_operand(linear, product, role) for role in OPERANDS[product]]
        return {
            "name": product, "equation": EQUATIONS[product], "operands": operands, "carrier": structure.carrier.upper(),
            "summed": summed, "result": RESULTS[product], "output": structure.output.upper(),
        }  # fmt: skip

    return of


def _operand(linear: LinearPrecision, product: Product, role: Role) -> dict[str, str]:
    structure = linear.structure
    known = {"letter": LETTERS[product, role], "role": role, "rounding": "", "scale": "", "rotated": ""}
    if structure.native is not None:
        return known | {"format": structure.native}
    if structure.rules is None:
        return known | {"format": getattr(linear, role).name, "rounding": _plain(structure.rounding.value)}
    rule = next(of for p, r, of in structure.rules.items() if (p, r) == (product, role))
    scale = "" if rule.scaled is None else f"scale: {scale_words(rule)}"
    name = rule.format or getattr(linear, role).name
    rotated = f"rotated by Hadamard {rule.hadamard}" if rule.hadamard else ""
    return known | {"format": name, "rounding": _plain(rule.rounding.value), "scale": scale, "rotated": rotated}


def _plain(word: str) -> str:
    return word.replace("_", " ")


def formats_of(recipe: Recipe) -> Iterator[ElementFormat]:
    """The element formats that operands are rounded to, those of native products among them."""
    for linear in recipe.places:
        if linear is None:
            continue
        for product in PRODUCTS:
            for role in OPERANDS[product]:
                f = get_format(_operand(linear, product, role)["format"])
                yield f.element if isinstance(f, ScaledFormat) else f  # type: ignore[misc]


def grid(f: ElementFormat) -> dict[str, Any]:
    """A format's positive values, or only its ends where they are too many to be told apart, and where normal ones begin."""
    smallest = smallest_positive(f)
    count = f.max_code if isinstance(f, FloatFormat) else f.grid().size
    values = [float(value) for value in f.grid() if value > 0] if count <= STROKES_UP_TO else []
    normal = f.smallest_normal if isinstance(f, FloatFormat) else smallest
    return {
        "name": f.name,
        "bits": f.bits,
        "smallest": smallest,
        "normal": normal,
        "largest": float(f.max),
        "values": values,
    }
