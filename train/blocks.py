"""[[more]]: further blocks of runs, for studies that are no full grid.

A block is written like [axes] and multiplied out by itself; an axis that it leaves out has the values of [axes], and it has no
axes of its own, so that every run of a study has the same ones. All blocks are joined to the first, [axes], each run once.

    [axes]
    recipe = ["e8m7", "e5m7"]
    learning_rate = [1e-3, 4e-3]
    seed = 4

    [[more]]                        # two further rates, of one recipe alone
    recipe = ["e5m7"]
    learning_rate = [2.5e-4, 5e-4]

`round` is a strategy's (see `adaptive`): blocks that it added in its second round, in its third, and so on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from train.axes import Axes, as_lists
from train.settings import RUNS_LIMIT, Rate, Seed

BLOCKS_LIMIT = 5000  # as many fit a study file


class Block(BaseModel):
    """One [[more]]: lists as in [axes], all of them optional; fields of other tables that [axes] has among them.

    What it does not name, it has from [axes].

    round          the strategy's round that added the block; never written by hand
    recipe         as in [axes]
    learning_rate  as in [axes]
    seed           as in [axes]
    init_seed      as in [axes]
    data_seed      as in [axes]
    dataset        as in [axes]
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    round: Annotated[int, Field(ge=2, le=RUNS_LIMIT)] | None = None
    recipe: Annotated[list[str], Field(min_length=1)] | None = None
    learning_rate: Annotated[list[Rate], Field(min_length=1)] | None = None
    seed: Annotated[list[Seed], Field(min_length=1)] | None = None
    init_seed: Annotated[list[Seed], Field(min_length=1)] | None = None
    data_seed: Annotated[list[Seed], Field(min_length=1)] | None = None
    dataset: Annotated[list[str], Field(min_length=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _lists(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        own = {key: value for key, value in data.items() if key == "round"}
        return own | as_lists({key: value for key, value in data.items() if key != "round"})

    def items(self) -> list[tuple[str, list[Any]]]:
        """The axes that the block names, with its values."""
        named = [(key, getattr(self, key)) for key in type(self).model_fields if key != "round"]
        return [(key, values) for key, values in [*named, *(self.model_extra or {}).items()] if values is not None]

    def as_table(self) -> dict[str, Any]:
        """The block as a study file has it."""
        return ({"round": self.round} if self.round else {}) | dict(self.items())


def block_axes(axes: Axes, block: Block, number: int) -> Axes:
    """A block's axes in full; ValueError, in a line with the block's number, where it names an axis that [axes] lacks or repeats
    a value.
    """
    given = {key: values for key, values in axes.items() if key != "seed" or not separate_seeds(axes)}
    for key, _ in block.items():
        if key not in given:
            raise ValueError(f"more, block {number}: {key} is no axis of this study: give it in [axes] too")
    try:
        return Axes.model_validate(given | dict(block.items()))
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ValueError(f"more, block {number}: {message}") from None


def separate_seeds(axes: Axes) -> bool:
    """Whether initial weights and batches have seeds of their own."""
    return axes.init_seed is not None or axes.data_seed is not None
