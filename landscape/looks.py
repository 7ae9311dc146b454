"""How lines are told apart in pictures, and their lettering.

Colours are Okabe and Ito's, told apart in any kind of colour blindness, and each comes with its own marker and dashes.
"""

from __future__ import annotations

from typing import Any

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
