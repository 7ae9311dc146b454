"""Packs of named recipes, small enough for a test: a program and slots for a recipe of any kind."""

from __future__ import annotations

import dataclasses

from tests.small import SHAPE, make_program
from train.loss_scale import DynamicLossScale
from train.model import ModelShape
from train.program import Program, Slot
from train.recipe import Recipe

WIDE = dataclasses.replace(SHAPE, width=32, context=16)


def program_for(recipe: Recipe, shape: ModelShape = WIDE, **changes: object) -> Program:
    """A small program in which that recipe trains."""
    program = make_program(
        shape=shape, structure=recipe.structure, state=recipe.state, until=recipe.until,
        before=recipe.before.structure if recipe.before else None,
        dynamic_loss_scale=DynamicLossScale() if recipe.loss_scale is None else None,
        scales_loss=recipe.loss_scale not in (None, 1.0),
    )  # fmt: skip
    return dataclasses.replace(program, **changes)  # type: ignore[arg-type]


def slot(recipe: Recipe, seed: int, rate: float = 3e-3) -> Slot:
    """One run of it."""
    return Slot(recipe, rate, 10 + seed, 20 + seed, recipe.loss_scale or 1.0)
