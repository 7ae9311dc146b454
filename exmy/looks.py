"""How a recipe is drawn, in every picture alike: colour, marker, dashes; and the lettering of pictures.

Colours are Okabe and Ito's, told apart in any kind of colour blindness, and each comes with its own marker and dashes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import xarray as xr

DASHES: tuple[Any, ...] = (
    "-",
    (0, (6, 2)),
    (0, (2, 1.5)),
    (0, (6, 2, 1.5, 2)),
    (0, (10, 3)),
    (0, (4, 1, 1, 1, 1, 1)),
    (0, (1, 1)),
)
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#B8A800")
MARKERS = ("s", "^", "D", "v", "P", "h", "*")
BASELINE_COLOUR, BASELINE_MARKER = "#000000", "o"
LETTERING: dict[Any, Any] = {
    "font.size": 12.5,
    "axes.titlesize": 13.5,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Look:
    """How one recipe is drawn, and how far its points stand to the side of the learning rate, in units of the rates' spacing."""

    colour: str
    marker: str
    dashes: Any
    aside: float


def recipe_looks(recipes: Sequence[str], baseline: str) -> dict[str, Look]:
    """A look for each recipe in order; the baseline is black with round markers, whichever place it has."""
    others = [r for r in recipes if r != baseline]
    looks = {}
    for place, recipe in enumerate(recipes):
        aside = (place - (len(recipes) - 1) / 2) / max(len(recipes), 2) * 0.7
        if recipe == baseline:
            looks[recipe] = Look(BASELINE_COLOUR, BASELINE_MARKER, "-", aside)
        else:
            i = others.index(recipe)
            # A step of the dashes from round to round, so that the eighth recipe is not drawn as the first.
            dashes = DASHES[(i + i // len(COLOURS)) % len(DASHES)]
            looks[recipe] = Look(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], dashes, aside)
    return looks


def in_order(names: xr.DataArray) -> list[str]:
    """Each name once, in the order of its first run."""
    return list(dict.fromkeys(names.values.astype(str).tolist()))
