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
    "execution": {"checkpoint_seconds": 0, "pack_size": 16},  # a file for each pack takes longer than its steps
}
# Axes of sizes, each value in small; the order stays, so that the widest is still the widest.
SMALLER: dict[str, dict[Any, Any]] = {
    "layers": {2: 1, 4: 2, 6: 2, 12: 3},
    "steps": {100: 3, 300: 4, 1000: 6, 3000: 9},
    "warmup": {0: 0, 20: 1, 30: 1, 100: 2, 300: 4},
    "width": {64: 8, 128: 12, 256: 16, 384: 24, 640: 32},
    "context": {64: 16, 256: 32},
    "sequences": {8: 2, 32: 4},
}
UNTIL = {100: 1, 500: 3, 900: 5}  # steps after which a recipe gives way to another
# A preset's tokenizer would be trained first, and its logits are most of a small model.
VOCABULARY = {"tokenizer": "bytes", "vocabulary": 300}


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
    full = Study.model_validate(content)
    blocks = [content["axes"], *content.get("more", [])]
    replaced = {name for block in blocks for name in block.get("recipe", []) if name in PEERS}
    kept = {*blocks[0]["learning_rate"][:2], *rates}
    for block in blocks:
        if "learning_rate" in block:
            every = block["learning_rate"]
            block["learning_rate"] = [rate for rate in every if rate in kept] or every[:1]
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
    for table in content.get("recipes", {}).values():
        if "until" in table:
            table["until"] = UNTIL[table["until"]]
    for name, table in TINY.items():
        content[name] = content.get(name, {}) | table  # an axis of the same name goes before it
    kept_blocks = max(of.first_blocks + of.last_blocks for of in map(full.recipe, full.recipes_named))
    content["model"]["layers"] = 1 + kept_blocks  # so that one is as the recipe says
    if "tokenizer" in content["model"]:
        content["model"] |= VOCABULARY
    return Study.model_validate(content), replaced
