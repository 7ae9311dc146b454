"""How a recipe is drawn, in every picture alike: in `landscape`'s colours, markers and dashes, and its lettering."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import xarray as xr

from landscape.looks import COLOURS, DASHES, LETTERING, MARKERS

__all__ = ["BASELINE_COLOUR", "COLOURS", "DASHES", "LETTERING", "MARKERS", "Look", "in_order", "recipe_looks"]

BASELINE_COLOUR, BASELINE_MARKER = "#000000", "o"


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
