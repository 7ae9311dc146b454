"""How recipes are drawn on the page: as in every picture of ours, with enough contrast on its light and on its dark background.

WCAG 2.2 asks for a contrast of 3 between a line and what it lies on. Colours of `exmy.looks` that have less are mixed with black
or white until they have it; a recipe is told apart by its marker and its dashes as well. The baseline is black, and white on the
dark background.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from exmy.looks import BASELINE_COLOUR, Look, recipe_looks

BACKGROUNDS = {"light": "#ffffff", "dark": "#15191e"}  # --paper in report.css
TOWARDS = {"light": (0, 0, 0), "dark": (255, 255, 255)}
LEAST_CONTRAST = {"light": 3.2, "dark": 4.5}
SYMBOLS = {"o": "circle", "s": "square", "^": "triangle-up", "D": "diamond", "v": "triangle-down", "P": "cross"}
SYMBOLS |= {"h": "hexagon", "*": "star"}
SIGNS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "h": "⬢", "*": "★"}

Channels = tuple[int, int, int]


def page_looks(recipes: Sequence[str], baseline: str) -> dict[str, dict[str, Any]]:
    """Each recipe's colours, plotly's symbol and dashes, its sign as a character, and how far its points stand aside."""
    return {name: _in_words(look) for name, look in recipe_looks(recipes, baseline).items()}


def _in_words(look: Look) -> dict[str, Any]:
    dash = "solid" if look.dashes == "-" else ",".join(f"{2 * length:g}px" for length in look.dashes[1])
    colours = {theme: visible(look.colour, theme) for theme in BACKGROUNDS}
    return colours | {"symbol": SYMBOLS[look.marker], "sign": SIGNS[look.marker], "dash": dash, "aside": look.aside}


def visible(colour: str, theme: str) -> str:
    """The colour itself where it has the contrast on that background, else mixed with as little black or white as gives it."""
    own, end = channels(colour), TOWARDS[theme]
    if colour == BASELINE_COLOUR:
        own = end
    for share in range(0, 101, 2):
        mixed = tuple(round(a + (b - a) * share / 100) for a, b in zip(own, end, strict=True))
        word = "#" + "".join(f"{value:02x}" for value in mixed)
        if contrast(word, BACKGROUNDS[theme]) >= LEAST_CONTRAST[theme]:
            return word
    raise AssertionError(f"{theme}: {BACKGROUNDS[theme]} has no contrast with {end}")


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours, 1 to 21 (WCAG 2.2, 1.4.3)."""
    low, high = sorted(_luminance(colour) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    linear = [
        value / 255 / 12.92 if value / 255 <= 0.04045 else ((value / 255 + 0.055) / 1.055) ** 2.4
        for value in channels(colour)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def channels(colour: str) -> Channels:
    """Red, green and blue of #rrggbb, 0 to 255."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return red, green, blue
