"""Small programs and slots, so that a pack trains in a second."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from train.model import ModelShape
from train.optim import AdamW
from train.program import Probe, Program, Slot
from train.recipe import Recipe
from train.recipe_table import RecipeTable
from train.resolve import resolve_recipe

torch.set_num_threads(1)  # tensors this small gain nothing from a second thread, and tests run side by side

SHAPE = ModelShape(layers=2, heads=2, width=16, context=12, vocabulary=32)
# Every option of the model by itself, and together; weights large enough that nothing is nearly linear.
OPTIONS: dict[str, dict[str, Any]] = {
    "rmsnorm": {"norm": "rmsnorm"},
    "swiglu": {"mlp": "swiglu"},
    "hidden": {"hidden": 24},
    "rope": {"positions": "rope", "rope_base": 50.0},
    "untied": {"tied": False},
    "grouped": {"heads": 4, "kv_heads": 2},
    "qk_norm": {"qk_norm": True},
    "z_loss": {"z_loss": 0.3},
    "softcap": {"logit_softcap": 2.0},
    "mup": {"mup_base_width": 6, "mup_base_heads": 3},
    "llama": {"norm": "rmsnorm", "mlp": "swiglu", "positions": "rope", "tied": False},
}
OPTIONS["everything"] = {key: value for options in OPTIONS.values() for key, value in options.items()} | {
    "hidden": None
}
SHAPES = {name: dataclasses.replace(SHAPE, init_std=0.3, **options) for name, options in OPTIONS.items()}


def make_program(recipe: str = "e4m3", **changes: object) -> Program:
    """A small program for packs of that recipe's structure."""
    program = Program(
        shape=SHAPE, structure=resolve(recipe).structure, dataset="python", steps=20, sequences=4, warmup=5, schedule="cosine",
        final_fraction=0.1, optimizer=AdamW(), evaluate_every=10, evaluation_sequences=8, probe=Probe(every=10),
    )  # fmt: skip
    return dataclasses.replace(program, **changes)  # type: ignore[arg-type]


def make_slots(recipes: list[str], rates: list[float] | float = 3e-3) -> list[Slot]:
    """A slot a recipe, each with seeds of its own."""
    peaks = [rates] * len(recipes) if isinstance(rates, float) else rates
    return [
        Slot(resolve(name), rate, 10 + i, 20 + i) for i, (name, rate) in enumerate(zip(recipes, peaks, strict=True))
    ]


def resolve(name: str) -> Recipe:
    """A recipe by name, "hybrid" among them."""
    return resolve_recipe(name, {"hybrid": RecipeTable("e4m3fn", "e4m3fn", "e5m2", lm_head="bf16")})
