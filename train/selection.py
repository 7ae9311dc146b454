"""Runs of a study by name: in `[probe] snapshots`, and after `exmy landscape --run`.

    "e4m3"                                  every run of the recipe
    "e4m3, learning_rate=4e-3, seed=0"      those of them that agree in all of it
    "seed=0, width=256"                     any coordinate of a run, and any further axis of the study
    "3f9c01ab"                              an identity, or how it begins, 8 hex digits at least
    "all"                                   every run

Numbers are compared as numbers: 4e-3 is 0.004. A name that matches no run is refused, with what there would have been.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.study import Run

ALL = "all"
IDENTITY = re.compile(r"[0-9a-f]{8,24}")
COORDINATES: dict[str, Callable[[Run], Any]] = {
    "recipe": lambda run: run.recipe.name,
    "format": lambda run: run.recipe.format,
    "learning_rate": lambda run: run.learning_rate,
    "init_seed": lambda run: run.init_seed,
    "data_seed": lambda run: run.data_seed,
    "seed": lambda run: run.seed,
    "dataset": lambda run: run.dataset,
    "model": lambda run: run.model.label,
}


@dataclass(frozen=True)
class Selection:
    """What a name means: the coordinates that a run has to have, or how its identity begins; nothing for all runs."""

    text: str
    wanted: tuple[tuple[str, str], ...] = ()
    identity: str = ""

    def __contains__(self, run: Run) -> bool:
        if self.identity:
            return run.identity.startswith(self.identity)
        return all(_agree(coordinate(run, key), value) for key, value in self.wanted)


def coordinate(run: Run, key: str) -> Any:
    """A run's coordinate, or its value on a further axis; KeyError where it has neither."""
    return COORDINATES[key](run) if key in COORDINATES else dict(run.extra_axes)[key]


def selection(text: str, recipes: Sequence[str], axes: Iterable[str]) -> Selection:
    """What a name means in a study of these recipes and further axes; ValueError where it means nothing."""
    if text == ALL:
        return Selection(text)
    if text in recipes:
        return Selection(text, (("recipe", text),))
    parts = [part.strip() for part in text.split(",")]
    if len(parts) == 1 and IDENTITY.fullmatch(parts[0]):
        return Selection(text, identity=parts[0])
    known = [*COORDINATES, *axes]
    wanted = []
    for part in parts:
        key, equals, value = (word.strip() for word in part.partition("="))
        if not equals:
            key, value = "recipe", part
        if key not in known:
            raise ValueError(f"{text!r}: runs have no {key!r}{_near(key, known)}")
        if key == "recipe" and value not in recipes:
            raise ValueError(f"{text!r}: the study has no recipe {value!r}{_near(value, recipes)}")
        wanted.append((key, value))
    return Selection(text, tuple(wanted))


def _agree(value: Any, wanted: str) -> bool:
    """Whether a value is what was written: as a number where both are, else to the letter."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(wanted) == value
        except ValueError:
            return False
    return str(value).lower() == wanted.lower() if isinstance(value, bool) else str(value) == wanted


def _near(word: str, known: Iterable[str]) -> str:
    words = list(dict.fromkeys(known))
    near = difflib.get_close_matches(word, words, n=1)
    few = ", ".join(words[:12]) + (", ..." if len(words) > 12 else "")
    return f"; did you mean {near[0]!r}?" if near else f"; there are {few}"
