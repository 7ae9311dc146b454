"""[axes] of a study file: lists that are multiplied out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from train.settings import SEEDS_LIMIT, Rate, Seed
from train.text import check_dataset, dataset_label


def as_lists(axes: Mapping[Any, Any]) -> dict[Any, Any]:
    """Axes as lists: a bare value is a list of one, and a number of seeds means those from 0."""
    lists: dict[Any, Any] = {}
    for key, value in axes.items():
        if key in ("seed", "init_seed", "data_seed") and isinstance(value, int) and not isinstance(value, bool):
            if not 1 <= value <= SEEDS_LIMIT:
                raise ValueError(
                    f"{key} counts seeds from 0, so it must be from 1 to {SEEDS_LIMIT}, got {value}; or give a list"
                )
            lists[key] = list(range(value))
        else:
            lists[key] = value if isinstance(value, list) else [value]
    return lists


class Axes(BaseModel):
    """[axes]: lists to be multiplied out. A bare value is a list of one, and `seed = 8` means seeds 0..7.

    Fields of [model], [training] and [data], and most words of recipes, may be axes as well.

    recipe         of what is trained, by names: a format's, a named recipe's, or one of this file's [recipes]
    learning_rate  peak learning rates
    seed           seeds of both initial weights and batches, or how many of them from 0
    init_seed      seeds of initial weights, where they are to be crossed with those of batches; [0] if only the other is given
    data_seed      seeds of the order of batches; as init_seed
    dataset        texts, by name or by the path of a file or folder of one's own
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    recipe: list[str] = Field(min_length=1)
    learning_rate: list[Rate] = Field(min_length=1)
    seed: list[Seed] = Field(default=[0], min_length=1)
    init_seed: list[Seed] | None = None
    data_seed: list[Seed] | None = None
    dataset: list[str] = Field(default=["python"], min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _lists(cls, data: Any) -> Any:
        return as_lists(data) if isinstance(data, Mapping) else data

    @model_validator(mode="after")
    def _no_repeats(self) -> Axes:
        for key, values in self.items():
            if len(set(map(str, values))) < len(values):
                raise ValueError(f"{key} names a value twice: {values}")
        for key in ("init_seed", "data_seed"):
            if getattr(self, key) is not None and "seed" in self.model_fields_set:
                raise ValueError(f"seed sets init_seed and data_seed both: leave it out where {key} is given")
        labels = [dataset_label(check_dataset(dataset)) for dataset in self.dataset]
        if len(set(labels)) < len(labels):
            raise ValueError(
                f"datasets are called by the last part of their paths, and two of {self.dataset} are one: rename it"
            )
        return self

    def items(self) -> list[tuple[str, list[Any]]]:
        """Every axis that was given or has a default, with its values."""
        named = [(key, getattr(self, key)) for key in type(self).model_fields]
        return [(k, v) for k, v in [*named, *(self.model_extra or {}).items()] if v is not None]
