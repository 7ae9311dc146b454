"""What the parts of `sweeps` share: studies of two sizes, a full pack of one recipe, and how times are taken and told."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from train import Study
from train.determinism import deterministic
from train.pack import Pack
from train.plan import PlannedPack, pick_device, plan
from train.streams import load_texts

CUDA = torch.cuda.is_available()


@dataclass(frozen=True)
class Size:
    """How large the studies are: the models, the steps of each part, and how often what is repeated is repeated."""

    name: str
    models: dict[str, dict[str, Any]]
    axes: dict[str, Any]
    busy_steps: int
    scaling_steps: int
    scaling_seeds: int
    few: int
    repeats: int
    programs: tuple[str, ...] = ()
    workers: tuple[int, ...] = ()
    side_by_side: bool = False


BUSY_AXES = {
    "recipe": ["e4m3fn", "e8m3", "e5m2", "e4m3", "e8m7"],
    "learning_rate": [5e-4, 1e-3, 2e-3, 3e-3, 4e-3],
    "seed": 20,
}
SIZES = {
    "h100": Size(
        "h100",
        {
            "4x128": {"model": {"layers": 4, "heads": 4, "width": 128, "context": 256}, "training": {"sequences": 8}},
            "gpt2-124m": {
                "model": {
                    "layers": 12, "heads": 12, "width": 768, "context": 1024, "vocabulary": 50257, "tokenizer": "bpe-16384",
                },
                "training": {"sequences": 32}, "execution": {"pack_size": 1},
            },
        },
        BUSY_AXES, busy_steps=1000, scaling_steps=600, scaling_seeds=20, few=60, repeats=2,
    ),
    "small": Size(
        "small",
        {"2x32": {"model": {"layers": 2, "heads": 2, "width": 32, "context": 32}, "training": {"sequences": 2}}},
        BUSY_AXES | {"learning_rate": [1e-3], "seed": 4}, busy_steps=30, scaling_steps=30, scaling_seeds=4, few=5, repeats=1,
    ),
}  # fmt: skip


def make_study(size: Size, model: str, steps: int, axes: dict[str, Any], **execution: Any) -> Study:
    """A study of one of the models, all that is recorded by default on."""
    tables = size.models[model]
    training = {
        "steps": steps,
        "warmup": max(1, steps // 10),
        "evaluate_every": max(1, steps // 10),
        **tables["training"],
    }
    return Study.model_validate(
        {
            "name": "sweeps",
            "axes": axes,
            "model": tables["model"],
            "training": training,
            "execution": tables.get("execution", {}) | execution,
        }
    )


def one_pack(
    size: Size, model: str, recipe: str, steps: int, runs: int | None = None
) -> tuple[PlannedPack, Pack, float]:
    """A full pack of one recipe, as the planner makes it, and the seconds that making it took; of as many `runs` if told."""
    device = pick_device("auto")
    study = make_study(size, model, steps, {"recipe": [recipe], "learning_rate": [1e-3], "seed": 128})
    planned = plan(study, device)[0]
    if runs is not None:
        planned = PlannedPack(planned.program, planned.runs[:runs], runs)
    text = load_texts(study)[planned.program.dataset]
    begun = time.perf_counter()
    pack = Pack(planned.program, planned.slots, text, device)
    return planned, pack, time.perf_counter() - begun


def synchronize() -> None:
    """Wait for the device."""
    if CUDA:
        torch.cuda.synchronize()


def seconds(work: Callable[[], object]) -> float:
    """Of one call, the device waited for before and after."""
    synchronize()
    begun = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - begun


def spread(values: Sequence[float]) -> dict[str, float | int]:
    """Median, least and most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values), "times": len(values)}


def passes_of(pack: Pack) -> dict[str, Callable[[], object]]:
    """Each kind of pass that a study makes, on the batch of the first step, again and again."""

    def step(watched: bool) -> Callable[[], None]:
        def make() -> None:
            rewind(pack)
            pack.made = 0 if watched else 1  # which kind the next one is
            pack.step()

        return make

    return {
        "step": step(watched=False), "watched step": step(watched=True), "evaluation": pack.validation_loss,
        "probe": pack.sharpness,
    }  # fmt: skip


def rewind(pack: Pack) -> None:
    """Back to the first step's batch and rows, whatever the weights are by now."""
    pack.made = 0
    pack.counter.zero_()
    pack.signals.state()["counter"].zero_()


def probe_wild(pack: Pack) -> None:
    """The pass that only wild logits need."""
    with deterministic(pack.tf32):
        pack._probe_of_any(lambda: pack._measure(boxes_are_small=False))


def warm(pack: Pack) -> None:
    """Every kind of pass, as often as it takes to be recorded, and the one that only wild logits need."""
    for _ in range(2):
        for work in passes_of(pack).values():
            work()
        probe_wild(pack)
    rewind(pack)
    synchronize()
