"""What strategies decide about: cells, which are a study's runs but for learning rate and seed; and blocks of further runs."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from train.study import Run, Study, StudyError

Extra = tuple[tuple[str, Hashable], ...]


@dataclass(frozen=True)
class Cell:
    """A recipe at one setting of every axis beside learning rate and seed; where: dataset, and [axes]' fields of other tables."""

    recipe: str
    where: Extra

    @property
    def label(self) -> dict[str, Any]:
        """For a result, in JSON: what is no finite number there is a word."""
        where = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in self.where}
        return {"recipe": self.recipe, **where}


def cell_of(run: Run) -> Cell:
    """The cell that a run is in."""
    return Cell(run.recipe.name, (("dataset", run.path or run.dataset), *run.extra_axes))


def changed(study: Study, **changes: Any) -> Study:
    """The study with other tables in the place of some, validated anew; StudyError where it is too large then."""
    content = study.model_dump(mode="json", exclude_none=True, exclude_unset=True)
    try:
        return Study.model_validate(content | changes)
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise StudyError(f"strategy {study.strategy.kind}: the study with its rounds can't be run: {message}") from None


def blocks_of(study: Study) -> list[dict[str, Any]]:
    """[[more]] as tables, to be changed."""
    return [block.as_table() for block in study.more]


def new_blocks(wanted: Mapping[Cell, Mapping[str, Sequence[Any]]], number: int, study: Study) -> list[dict[str, Any]]:
    """Blocks for round `number`: each cell's axes; cells that differ in nothing but the recipe share a block."""
    varied = {key for key, values in study.axes.items() if len(values) > 1} | {
        key for block in study.more for key, _ in block.items()
    }
    recipes: dict[tuple[Extra, tuple[tuple[str, tuple[Any, ...]], ...]], list[str]] = {}
    for cell, axes in wanted.items():
        where = tuple((key, value) for key, value in cell.where if key in varied)
        recipes.setdefault((where, tuple((key, tuple(values)) for key, values in axes.items())), []).append(cell.recipe)
    return [
        {"round": number, "recipe": names, **{key: [value] for key, value in where}, **{k: list(v) for k, v in axes}}
        for (where, axes), names in recipes.items()
    ]


def last_round(study: Study) -> int:
    """The number of the last round that a study has; 1 for [axes] alone."""
    return max((block.round or 1 for block in study.more), default=1)


def by_cell(runs: Iterable[Run]) -> dict[Cell, list[Run]]:
    """Runs by cell, both in order of appearance."""
    cells: dict[Cell, list[Run]] = {}
    for run in runs:
        cells.setdefault(cell_of(run), []).append(run)
    return cells
