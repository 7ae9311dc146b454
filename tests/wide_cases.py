"""The runs that the tests of several ranks train, there and in one process: small packs of one run, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.recipe_packs import WIDE, program_for, slot
from tests.test_recipe_packs import OWN
from train.loss_scale import DynamicLossScale
from train.optim import AdamW, Muon
from train.program import Probe, Program, Slot
from train.recipe_table import RecipeTable
from train.resolve import resolve_recipe
from train.state import StateFormats

STEPS = 4
CPU = torch.device("cpu")
# 64 tokens a step for one process, 32 for each of two ranks, a size that no other axis has.
SHAPE = dataclasses.replace(WIDE, width=32, context=16, vocabulary=40, init_std=0.1)
LLAMA = dataclasses.replace(
    SHAPE, norm="rmsnorm", mlp="swiglu", positions="rope", tied=False, heads=4, kv_heads=1, qk_norm=True
)
UNCLIPPED = AdamW(clip=float("inf"))
RECIPES = {
    "products too": RecipeTable(base="nvfp4-nearest", products="all", attention_form="math"),
    "delayed head": OWN["delayed head"],
    "row head": RecipeTable(base="fp8-hybrid-row", lm_head="body"),
    "stochastic head": RecipeTable(base="stochastic-e5m2"),
}


class Case(NamedTuple):
    """A recipe, what of the program differs from the others', and whether it is stopped half way, too, and weighed."""

    recipe: str
    changes: Mapping[str, Any] = MappingProxyType({})
    ways: tuple[str, ...] = ("ddp", "fsdp")
    stopped: bool = False
    weighed: bool = False


CASES = {
    "native-fp32": Case("native-fp32"),
    "clipped": Case("native-fp32", {"optimizer": AdamW(clip=0.05)}, ("ddp",)),
    "native-bf16": Case("native-bf16", stopped=True, weighed=True),
    "masked-e8m3": Case("masked-e8m3"),
    "fp8-hybrid": Case("fp8-hybrid", weighed=True),
    "fp8-hybrid-delayed": Case("fp8-hybrid-delayed"),
    "delayed head": Case("delayed head", stopped=True),
    "ms-amp-o1": Case("ms-amp-o1", {}, ("ddp",)),
    "row head": Case("row head"),
    "mxfp8": Case("mxfp8"),
    "nvfp4": Case("nvfp4", stopped=True),
    "stochastic head": Case("stochastic head"),
    "products too": Case("products too"),
    "llama": Case("fp8-hybrid", {"shape": LLAMA}, weighed=True),
    "muon": Case("native-fp32", {"optimizer": Muon()}, ("ddp",)),
    "state": Case(
        "native-bf16",
        {"state": StateFormats(master="bf16", second="bf16", rounding="stochastic", kahan=True)},
        ("ddp",),
        stopped=True,
    ),
    # A first scale beyond what FP32 has room for: on both ranks the first steps are skipped.
    "loss scale": Case(
        "native-fp16-scaled",
        {"dynamic_loss_scale": DynamicLossScale(2.0**126, backoff=2.0**-60, interval=2)},
        stopped=True,
    ),
}


def setting(name: str, way: str) -> tuple[Program, list[Slot]]:
    """A case's program and its one slot."""
    case = CASES[name]
    recipe = resolve_recipe(case.recipe, OWN | RECIPES)
    changes = {
        "shape": SHAPE, "steps": STEPS, "sequences": 4, "evaluation_sequences": 4, "evaluate_every": 2, "probe": Probe(every=2),
        "signals_every": 2 if way == "ddp" else 0, "optimizer": UNCLIPPED, "warmup": 1,
    }  # fmt: skip
    program: Program = program_for(recipe, **(changes | dict(case.changes)))  # type: ignore[arg-type]
    return program, [slot(recipe, 1, 1e-2)]


def outcome(pack: Any) -> dict[str, Tensor]:
    """What a pack leaves after its last step."""
    state = {
        name: t.clone() for name, t in pack.state().items() if not name.startswith(("operand h.", "weight_scales"))
    }
    return state | {"tokens": torch.tensor(pack.offsets.shape)}


def trained(pack: Any) -> dict[str, Tensor]:
    """Every step of a pack, and its measurements, as `train_pack` has them."""
    while True:
        pack.measure()
        if pack.made == pack.program.steps:
            return outcome(pack)
        pack.step()
