"""One run on one GPU and on all of a torchrun's, by the clock and by the loss.

    torchrun --nproc-per-node 2 -m benchmarks.wide --out wide.json

GPT-2 124M, 32 sequences of 1,024 tokens a step: on one card (its steps recorded as a CUDA graph, as ever), shared by all (`ddp`,
and `fsdp` with its blocks in parts), and `weak`, 32 on each card. Of each: tokens a second of all cards, over the steps after the
first five; peak memory of rank 0's card, beside what `train.wide_memory` works out; the losses, and how far they are from one
card's. Every part is written to --out as soon as it is there; none begins after --budget seconds. Ranks compile at the same time,
and keep their code where $TORCHINDUCTOR_CACHE_DIR says.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from train.compiling import compiles_steps
from train.optim import AdamW
from train.pack import Pack
from train.plan import shape_of
from train.program import Probe, Program, Slot
from train.provenance import device_name
from train.ranks import Ranks, joined
from train.resolve import resolve_recipe
from train.settings import ModelSettings
from train.text import Text
from train.wide_memory import memory
from train.wide_recipes import Way, refusal
from train.wide_study import PACKS

UNTIMED = 5  # steps: compiling, recording, and what follows them
# What says most comes first, should the budget end.
PARTS = [
    ("native-bf16", "one"), ("native-bf16", "ddp"), ("fp8-hybrid", "one"), ("fp8-hybrid", "ddp"), ("native-bf16", "fsdp"),
    ("masked-e8m3", "one"), ("masked-e8m3", "ddp"), ("native-bf16", "weak"), ("fp8-hybrid", "fsdp"), ("masked-e8m3", "fsdp"),
    ("fp8-hybrid", "weak"), ("masked-e8m3", "weak"),
]  # fmt: skip


def main() -> None:
    """Every part, on every rank."""
    options = arguments()
    began = time.monotonic()
    model = ModelSettings(preset=options.preset, **({"context": options.context} if options.context else {}))
    text = made_text(shape_of(model).vocabulary)
    with joined() as ranks:
        result: dict[str, Any] = {
            "device": device_name(ranks.device), "ranks": ranks.count, "torch": torch.__version__, "preset": options.preset,
            "sequences": options.sequences, "context": model.context, "steps": options.steps, "parts": [],
        }  # fmt: skip
        for recipe, how in PARTS:
            wanted = recipe in options.recipes.split(",") and how in options.parts.split(",")
            if not wanted or ranks.tell(time.monotonic() - began > options.budget):
                continue
            part = measured(ranks, program_of(model, recipe, how, ranks, options), recipe, how, text)
            if ranks.leads:
                result["parts"].append(part | {"seconds_since_start": round(time.monotonic() - began, 1)})
                compare(result["parts"])
                options.out.write_text(json.dumps(result, indent=1) + "\n")
                print(json.dumps(result["parts"][-1]), flush=True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--preset", default="gpt2-124m")
    parser.add_argument("--context", type=int, help="Tokens of a sequence; the preset's by default.")
    parser.add_argument("--sequences", type=int, default=32, help="A step's, of all cards; of each card for weak.")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--recipes", default="native-bf16,masked-e8m3,fp8-hybrid")
    parser.add_argument("--parts", default="one,ddp,fsdp,weak")
    parser.add_argument("--budget", type=float, default=200.0, help="Seconds after which no part begins.")
    parser.add_argument("--out", type=Path, default=Path("wide.json"))
    return parser.parse_args()


def made_text(vocabulary: int) -> Text:
    """Tokens with something to learn, the same on every rank: each is most often followed by one of three others."""
    walk = np.cumsum(np.random.default_rng(7).choice([1, 1, 7, 31], size=2_000_000))
    kind: type[np.unsignedinteger[Any]] = np.uint16 if vocabulary > 256 else np.uint8
    tokens = (walk % vocabulary).astype(kind)
    digest = hashlib.sha256(tokens.tobytes()).hexdigest()
    return Text(
        "made", tokens[:-200_000], tokens[-200_000:], vocabulary, float(np.log(vocabulary)), digest, "made here"
    )


def program_of(model: ModelSettings, recipe: str, how: str, ranks: Ranks, options: argparse.Namespace) -> Program:
    """What a part trains; nothing is measured on held-out text."""
    return Program(
        shape=shape_of(model), structure=resolve_recipe(recipe).structure, dataset="made", steps=options.steps,
        sequences=options.sequences * (ranks.count if how == "weak" else 1), warmup=2, schedule="constant", final_fraction=1.0,
        optimizer=AdamW(), evaluate_every=options.steps, evaluation_sequences=options.sequences * ranks.count, probe=Probe(0),
    )  # fmt: skip


def measured(ranks: Ranks, program: Program, recipe: str, how: str, text: Text) -> dict[str, Any]:
    """A part on rank 0 alone ("one"), or on all ranks; what it says on rank 0."""
    way: Way | None = how if how in get_args(Way) else "ddp" if how == "weak" else None  # type: ignore[assignment]
    if way and (why := refusal(program, ranks.count, way)):
        return {"recipe": recipe, "how": how, "refused": why}
    found: dict[str, Any] = {}
    if way or ranks.leads:
        found = {"recipe": recipe, "how": how} | timed(
            ranks, program, Slot(resolve_recipe(recipe), 6e-4, 1, 1), way, text
        )
    ranks.tell()  # who has nothing to do waits
    return found


def timed(ranks: Ranks, program: Program, slot: Slot, way: Way | None, text: Text) -> dict[str, Any]:
    """Steps of a pack, and what they took."""
    cuda = ranks.device.type == "cuda"
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    pack = PACKS[way](ranks, program, [slot], text, ranks.device) if way else Pack(program, [slot], text, ranks.device)
    times = []
    for _ in range(program.steps):
        pack.step()
        if pack.made == 1:
            wait(pack)
            first = time.perf_counter() - start
        if pack.made == min(UNTIMED, program.steps - 1):
            wait(pack)
            times.append(time.perf_counter())
    wait(pack)
    seconds = time.perf_counter() - times[0]
    tokens = program.sequences * program.shape.context * (program.steps - min(UNTIMED, program.steps - 1))
    planned = memory(program, ranks.count if way else 1, way or "ddp", compiles_steps(ranks.device.type))
    return {
        "sequences": program.sequences,
        "tokens_per_second": tokens / seconds,
        "seconds_first_step": first,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "planned_memory_bytes": planned.total,
        "planned_memory": planned._asdict(),
        "train_loss": [round(float(loss), 6) for loss in pack.train_loss[:, 0].cpu()],
        "grad_norm_first": float(pack.grad_norm[0, 0]),
    }


def wait(pack: Pack) -> None:
    """Until the steps so far are made."""
    pack.train_loss[0].cpu()


def compare(parts: list[dict[str, Any]]) -> None:
    """The last part beside one card's of its recipe: speed, and the losses of the same batches."""
    part = parts[-1]
    one = next((p for p in parts if p["how"] == "one" and p["recipe"] == part["recipe"]), None)
    if one is None or "refused" in part or part is one:
        return
    part["speed_over_one_card"] = part["tokens_per_second"] / one["tokens_per_second"]
    if part["sequences"] == one["sequences"]:
        differences = np.abs(np.array(part["train_loss"]) - np.array(one["train_loss"]))
        part["loss_difference_last"], part["loss_difference_most"] = float(differences[-1]), float(differences.max())


if __name__ == "__main__":
    main()
