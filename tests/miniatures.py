"""A study's design in miniature, for two CPU cores: every recipe and every value of its further axes at a few rates, two seeds, a
model of some thousand weights, some steps.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from train.study import Study

# What a CPU has no products for, and the simulated format that stands for it here.
PEERS = {"native-tf32": "tf32"}
TINY: dict[str, dict[str, Any]] = {
    "model": {"layers": 1, "heads": 2, "width": 32, "context": 32},
    "training": {"steps": 6, "warmup": 2, "sequences": 2, "evaluate_every": 3, "evaluation_batches": 1},
    "probe": {"every": 3},
    "signals": {"every": 3},
    "divergence": {"definition": "non_finite"},  # nothing is learnt in a few steps, and that is not the question
    "execution": {"checkpoint_seconds": 0},
}
# Axes of sizes, each value in small; the order stays, so that the widest is still the widest.
SMALLER: dict[str, dict[Any, Any]] = {
    "layers": {4: 1, 12: 2},
    "steps": {1000: 6, 3000: 9},
    "warmup": {100: 2, 0: 0},
    "width": {64: 8, 128: 12, 256: 16, 384: 24, 640: 32},
}


def in_small(axis: str, value: str) -> str:
    """A value of a full study's axis, as groups have it, in its miniature: a text that comes with exmy has no name to lend."""
    if axis == "dataset":
        return f"small-{value}"
    return str(SMALLER[axis][int(value)]) if axis in SMALLER else value


def miniature(path: Path, texts: Path, rates: set[float]) -> tuple[Study, set[str]]:
    """The study of a file in miniature, its texts those in the folder `texts`, at two of its rates and those that are named; and
    what was replaced of its recipes.
    """
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    blocks = [content["axes"], *content.get("more", [])]
    replaced = {name for block in blocks for name in block.get("recipe", []) if name in PEERS}
    kept = {*blocks[0]["learning_rate"][:2], *rates}
    for block in blocks:
        if "learning_rate" in block:
            block["learning_rate"] = [rate for rate in block["learning_rate"] if rate in kept]
        for axis, values in SMALLER.items():
            if axis in block:
                block[axis] = [values[value] for value in block[axis]]
        if "recipe" in block:
            block["recipe"] = [PEERS.get(name, name) for name in block["recipe"]]
        if "seed" in block:
            seeds = block["seed"] if isinstance(block["seed"], list) else range(block["seed"])
            block["seed"] = list(seeds)[:2]
        if "dataset" in block or block is blocks[0]:
            block["dataset"] = [str(texts / in_small("dataset", name)) for name in block.get("dataset", ["python"])]
    for name, table in TINY.items():
        content[name] = content.get(name, {}) | table  # an axis of the same name goes before it
    return Study.model_validate(content), replaced
