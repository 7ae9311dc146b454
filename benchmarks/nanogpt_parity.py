"""Our training against nanoGPT's own code on the same tokens and batches: validation losses, seed by seed.

    NANOGPT=/path/to/checkout python -m benchmarks.nanogpt_parity --preset gpt2-0.8m --steps 2000 --seeds 8
    NANOGPT=... python -m benchmarks.nanogpt_parity --preset shakespeare-char --dataset ./shakespeare_char --steps 5000

nanoGPT's model.py, its initialisation and its configure_optimizers (AdamW, decay on matrices, fused on a GPU), under BF16
autocast on a GPU; its loop written out: linear warm-up, cosine to a tenth, gradients clipped to 1. Ours: the same as a study's
pack, native BF16 (FP32 on a CPU). Both read the same batches, a seed each, and both are held against the same held-out
sequences. They start from weights of their own, so they differ by as much as seeds do: the page of results says by how much,
with Welch's interval for the difference of means, and whether it contains zero.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from scipy.stats import ttest_ind
from torch import Tensor, nn

from train.optim import AdamW
from train.pack import train_pack
from train.plan import shape_of
from train.program import PackResult, Probe, Program, Slot
from train.provenance import device_name
from train.resolve import resolve_recipe
from train.schedules import learning_rates
from train.seeds import batch_offsets, held_out_offsets
from train.settings import ModelSettings
from train.text import Text, load_text

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
BETAS, EPS, DECAY, CLIP = (0.9, 0.99), 1e-8, 0.1, 1.0  # train_shakespeare_char.py's


def main() -> int:
    """Train both, write the comparison, say it in a line; 1 where zero is outside the interval, 2 without a checkout."""
    options = arguments()
    folder = os.environ.get("NANOGPT")
    if not folder or not (Path(folder) / "model.py").is_file():
        print("nanogpt_parity: NANOGPT must name a checkout of nanoGPT, the folder of its model.py", file=sys.stderr)
        return 2
    model = ModelSettings(preset=options.preset)
    program = program_of(model, options)
    text = load_text(options.dataset, tokenizer=model.tokenizer)
    recipe = resolve_recipe("native-bf16" if CUDA else "native-fp32")
    # Theirs beside ours, each in a process of its own: one run alone leaves a GPU idle for most of the time.
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        courses = [
            pool.submit(nanogpt_losses, Path(folder), program, text, options.rate, seed)
            for seed in range(options.seeds)
        ]
        ours = train_pack(program, [Slot(recipe, options.rate, s, s) for s in range(options.seeds)], text, DEVICE)
        theirs = np.stack([course.result() for course in track(courses, "nanoGPT")], 1)
    result = compared(ours, theirs, program, options, text)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    low, high = result["difference_95"]
    print(
        f"final validation loss, nats/token: ours {result['ours_mean']:.4f}, nanoGPT's {result['theirs_mean']:.4f}, difference "
        f"{result['difference']:+.4f} [{low:+.4f}, {high:+.4f}] (95 %, {options.seeds} seeds); best {result['ours_best']:.4f}, "
        f"{result['theirs_best']:.4f}: {options.out}"
    )
    return 0 if low <= 0 <= high else 1


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--preset", default="gpt2-0.8m")
    parser.add_argument("--dataset", default="python")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--every", type=int, default=250)
    parser.add_argument("--processes", type=int, default=4, help="runs of nanoGPT at a time")
    parser.add_argument("--out", type=Path, default=Path("nanogpt-parity.json"))
    return parser.parse_args()


def program_of(model: ModelSettings, options: argparse.Namespace) -> Program:
    """What both train."""
    recipe = resolve_recipe("native-bf16" if CUDA else "native-fp32")
    return Program(
        shape=shape_of(model), structure=recipe.structure, dataset=options.dataset, steps=options.steps,
        sequences=options.sequences, warmup=options.warmup, schedule="cosine", final_fraction=0.1,
        optimizer=AdamW(*BETAS, EPS, DECAY, CLIP), evaluate_every=options.every, evaluation_sequences=4 * options.sequences,
        probe=Probe(0),
    )  # fmt: skip


def nanogpt_losses(folder: Path, program: Program, text: Text, rate: float, seed: int) -> np.ndarray[Any, Any]:
    """Validation losses of one run of nanoGPT's model at the program's evaluation steps, nats/token."""
    shape, T = program.shape, program.shape.context
    torch.manual_seed(seed)
    module = imported(folder)
    config = module.GPTConfig(
        block_size=T, vocab_size=shape.vocabulary, n_layer=shape.layers, n_head=shape.heads, n_embd=shape.width,
        dropout=shape.dropout, bias=False,
    )  # fmt: skip
    model: nn.Module = module.GPT(config).to(DEVICE)
    optimizer = model.configure_optimizers(DECAY, rate, BETAS, DEVICE.type)  # type: ignore[operator]
    forward = torch.compile(model) if CUDA else model
    rates = learning_rates([rate], program.steps, program.warmup, program.schedule, program.final_fraction)
    offsets = torch.from_numpy(batch_offsets(seed, program.steps, program.sequences, text.train.size - T))
    train, validation = (torch.from_numpy(part.astype(np.int64)).to(DEVICE) for part in (text.train, text.validation))
    losses, evaluate_at = [], set(program.evaluation_steps)
    for step in range(program.steps + 1):
        if step in evaluate_at:
            losses.append(held_out_loss(forward, validation, program))  # type: ignore[arg-type]
        if step == program.steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = rates[step][0]
        tokens, targets = windows(train, offsets[step].to(DEVICE), T)
        with autocast():
            _, loss = forward(tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return np.array(losses)


def imported(folder: Path) -> Any:
    """The model.py of nanoGPT, by its path."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def windows(tokens: Tensor, starts: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """Tokens and their successors, [N, T] each."""
    window = tokens[starts[:, None] + torch.arange(T + 1, device=tokens.device)]
    return window[:, :-1].contiguous(), window[:, 1:].contiguous()


@torch.no_grad()
def held_out_loss(model: nn.Module, validation: Tensor, program: Program) -> float:
    """The mean over the same held-out sequences as a pack's, without dropout, nats/token."""
    model.eval()
    T = program.shape.context
    starts = torch.from_numpy(held_out_offsets(program.evaluation_sequences, validation.numel() - T)).to(DEVICE)
    parts = []
    for some in starts.split(program.sequences):
        tokens, targets = windows(validation, some, T)
        with autocast():
            parts.append(float(model(tokens, targets)[1]))
    model.train()
    return sum(parts) / len(parts)


def autocast() -> Any:
    """BF16 on a GPU, as nanoGPT's loop has it; FP32 on a CPU."""
    return torch.autocast("cuda", torch.bfloat16, enabled=CUDA)


def compared(
    ours: PackResult, theirs: np.ndarray[Any, Any], program: Program, options: argparse.Namespace, text: Text
) -> dict[str, Any]:
    """Both courses, their last and best values, and Welch's interval for the difference of the last."""
    mine = ours.validation_loss.astype(np.float64)
    interval = ttest_ind(mine[-1], theirs[-1], equal_var=False).confidence_interval(0.95)
    return {
        "preset": options.preset, "dataset": text.name, "dataset_sha256": text.sha256, "steps": program.steps,
        "sequences": program.sequences, "learning_rate": options.rate, "seeds": options.seeds,
        "evaluation_steps": program.evaluation_steps, "ours": mine.T.tolist(), "theirs": theirs.T.tolist(),
        "ours_mean": float(mine[-1].mean()), "theirs_mean": float(theirs[-1].mean()),
        "ours_sd": float(mine[-1].std(ddof=1)), "theirs_sd": float(theirs[-1].std(ddof=1)),
        "ours_best": float(mine.min(0).mean()), "theirs_best": float(theirs.min(0).mean()),
        "difference": float(mine[-1].mean() - theirs[-1].mean()),
        "difference_95": [float(interval.low), float(interval.high)],
        "device": device_name(DEVICE), "torch": torch.__version__, "command": " ".join(sys.argv),
        "finite": bool(math.isfinite(mine.sum() + theirs.sum())),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
