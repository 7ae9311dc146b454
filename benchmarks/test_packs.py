"""Packs of small GPTs against one run at a time, on the device there is.

Run it by `make bench`. Peers, on the same model, batch and optimiser, in the same process:

* `plain`: one run as people write it, an nn.Module under autocast with torch.compile and fused AdamW, one batch a step
from the
  host; nanoGPT's own model.py instead, where NANOGPT names a checkout of it;
* `graph`: the same with the whole step, batch to update, captured in one CUDA graph.

All run under deterministic algorithms, the peers without them as well. `run_steps_per_second` in extra_info is what
compares: one step of one run counts one.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from train.determinism import deterministic
from train.model import ModelShape
from train.optim import AdamW
from train.pack import Pack, Probe, Program, Slot
from train.recipe import resolve_recipe
from train.text import load_text

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# The GPU's shape is the one of the targets; the CPU's is the first look's.
SHAPE = ModelShape(4, 4, 128, 256, 256) if CUDA else ModelShape(2, 4, 64, 64, 256)
R, N, STEPS = (128, 8, 10) if CUDA else (16, 8, 3)
MIXED = ("e8m7", "e8m3", "e8m1", "e5m7", "e4m7", "e4m3", "e4m3fn", "e5m2")


def synchronize() -> None:
    """Wait for the device."""
    if CUDA:
        torch.cuda.synchronize()


def measure(benchmark: Any, steps: Callable[[], None], runs: int, group: str) -> None:
    """Time `STEPS` steps, after a warm-up, and note run-steps a second from the median."""

    def timed() -> None:
        steps()
        synchronize()

    benchmark.group = group
    benchmark.pedantic(timed, rounds=10 if CUDA else 5, warmup_rounds=3)
    benchmark.extra_info["run_steps_per_second"] = runs * STEPS / benchmark.stats.stats.median
    benchmark.extra_info["device"] = torch.cuda.get_device_name() if CUDA else "cpu"
    benchmark.extra_info["torch"] = torch.__version__


def program(recipe: str) -> Program:
    """Many steps, no evaluation, no probe."""
    return Program(
        SHAPE, resolve_recipe(recipe).structure, "python", 10_000, N, 100, "cosine", 0.1, AdamW(), 10_000, N, Probe()
    )


PACKS = {"native-bf16": ("native-bf16",), "e8m7": ("e8m7",), "e4m3fn": ("e4m3fn",), "mixed": MIXED}


@pytest.mark.parametrize("formats", PACKS.values(), ids=PACKS)
def test_pack(benchmark: Any, formats: tuple[str, ...]) -> None:
    recipes = [resolve_recipe(formats[i % len(formats)]) for i in range(R)]
    slots = [Slot(recipe, 1e-3, i, i) for i, recipe in enumerate(recipes)]
    pack = Pack(program(formats[0]), slots, load_text("python"), DEVICE)

    def steps() -> None:
        for _ in range(STEPS):
            pack.step()

    measure(benchmark, steps, R, "training")
    assert pack.train_loss[0].isfinite().all()


class Block(nn.Module):
    """A pre-norm block without biases."""

    def __init__(self) -> None:
        super().__init__()
        D = SHAPE.width
        self.ln_1, self.ln_2 = nn.LayerNorm(D, bias=False), nn.LayerNorm(D, bias=False)
        self.qkv, self.proj = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.fc, self.out = nn.Linear(D, 4 * D, bias=False), nn.Linear(4 * D, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, D] to the same."""
        n, t, d = x.shape
        q, k, v = (z.view(n, t, SHAPE.heads, -1).transpose(1, 2) for z in self.qkv(self.ln_1(x)).split(d, 2))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(n, t, d))
        mlp: Tensor = self.out(nn.functional.gelu(self.fc(self.ln_2(x))))
        return x + mlp


class PlainGPT(nn.Module):
    """The same decoder for one run, as an nn.Module."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(SHAPE.vocabulary, SHAPE.width), nn.Embedding(SHAPE.context, SHAPE.width)
        self.blocks = nn.ModuleList(Block() for _ in range(SHAPE.layers))
        self.ln_f = nn.LayerNorm(SHAPE.width, bias=False)
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and loss, as nanoGPT's model returns them."""
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits = nn.functional.linear(self.ln_f(x), self.wte.weight)
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def single_model() -> tuple[str, nn.Module]:
    """NanoGPT's model where NANOGPT names its folder, ours otherwise; and whose it is."""
    folder = os.environ.get("NANOGPT")
    if not folder:
        return "plain nn.Module", PlainGPT().to(DEVICE)
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(folder) / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.GPTConfig(
        block_size=SHAPE.context, vocab_size=SHAPE.vocabulary, n_layer=SHAPE.layers, n_head=SHAPE.heads, n_embd=SHAPE.width,
        dropout=0.0, bias=False,
    )  # fmt: skip
    model: nn.Module = module.GPT(config).to(DEVICE)
    return "nanoGPT", model


def autocast() -> contextlib.AbstractContextManager[Any]:
    """BF16 on a GPU, plain FP32 on a CPU, as nanoGPT's loop has it."""
    return torch.autocast("cuda", torch.bfloat16) if CUDA else contextlib.nullcontext()


def single_run(capturable: bool) -> tuple[str, nn.Module, torch.optim.Optimizer]:
    """One run: model, compiled on a GPU, and fused AdamW with decay on matrices."""
    torch._dynamo.reset()
    whose, model = single_model()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=CUDA, capturable=capturable)
    return whose, torch.compile(model) if CUDA else model, optimizer  # type: ignore[return-value]


def switches(deterministically: bool) -> contextlib.AbstractContextManager[Any]:
    """Packs' determinism for a peer, or none, as its users run it, with TF32 allowed either way."""
    if deterministically:
        return deterministic(tf32=True)
    torch.backends.cuda.matmul.allow_tf32 = True
    return contextlib.nullcontext()


MODES = {"deterministic": True, "as-users-run-it": False}


@pytest.mark.parametrize("deterministically", MODES.values(), ids=MODES)
def test_one_run_at_a_time(benchmark: Any, deterministically: bool) -> None:
    whose, model, optimizer = single_run(capturable=False)
    tokens = torch.from_numpy(load_text("python").train.copy())
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        starts = torch.randint(len(tokens) - SHAPE.context, (N,), generator=generator).tolist()
        window = torch.stack([tokens[s : s + SHAPE.context + 1] for s in starts]).long()
        if CUDA:
            window = window.pin_memory().to(DEVICE, non_blocking=True)
        with autocast():
            _, loss = model(window[:, :-1].contiguous(), window[:, 1:].contiguous())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def steps() -> None:
        with switches(deterministically):
            for _ in range(STEPS):
                step()

    benchmark.extra_info["peer"] = whose
    measure(benchmark, steps, 1, "training")
    assert_finite(model)


def assert_finite(model: nn.Module) -> None:
    """The peer's weights are finite after the steps that were timed."""
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.skipif(not CUDA, reason="a CUDA graph needs a CUDA device")
@pytest.mark.parametrize("deterministically", MODES.values(), ids=MODES)
def test_one_run_in_a_cuda_graph(benchmark: Any, deterministically: bool) -> None:
    whose, model, optimizer = single_run(capturable=True)
    tokens = torch.from_numpy(load_text("python").train.copy()).to(DEVICE)
    ticks = torch.arange(SHAPE.context + 1, device=DEVICE)

    def step() -> None:
        starts = torch.randint(len(tokens) - SHAPE.context, (N, 1), device=DEVICE)
        window = tokens[starts + ticks].long()
        with autocast():
            _, loss = model(window[:, :-1].contiguous(), window[:, 1:].contiguous())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    with switches(deterministically):
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(5):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()

    def steps() -> None:
        for _ in range(STEPS):
            graph.replay()

    benchmark.extra_info["peer"] = whose
    measure(benchmark, steps, 1, "training")
    assert_finite(model)
