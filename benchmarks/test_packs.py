"""Packs of small GPTs against one run at a time, on the device there is.

Run it by `make bench`. Peers, on the same model, batch and optimiser, in the same process:

* `plain`: one run as people write it, an nn.Module under autocast with torch.compile and fused AdamW, one batch a step from the
  host; nanoGPT's own model.py instead, where NANOGPT names a checkout of it;
* `graph`: the same with the whole step, batch to update, captured in one CUDA graph.

All run under deterministic algorithms, the peers without them as well. In extra_info, from the median step:
`run_steps_per_second`, where one step of one run counts one, `tokens_per_second`, and `tflops`, by the count of Chowdhery et
al. 2022 (6 times the parameters that are multiplied and 12 L D T for attention, a token), to be held against `test_bf16_peak`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from train.determinism import deterministic
from train.model import ModelShape
from train.optim import AdamW
from train.pack import Pack
from train.program import Probe, Program, Slot
from train.resolve import resolve_recipe
from train.text import Text, load_text

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
MIXED = ("e8m7", "e8m3", "e8m1", "e5m7", "e4m7", "e4m3", "e4m3fn", "e5m2")
EIGHT = tuple(1e-4 * 2**i for i in range(8))


@dataclass(frozen=True)
class Case:
    """A model, how many runs of it make a pack, how many sequences a run and how many steps are timed together."""

    shape: ModelShape
    runs: int
    sequences: int
    steps: int
    tokenizer: str = "bytes"
    peer_vocabulary: int | None = None  # as the peer's users pad it

    @property
    def flops(self) -> float:
        """Of one step of one run."""
        s = self.shape
        a_token = 6 * (s.size - s.context * s.width) + 12 * s.layers * s.width * s.context
        return a_token * self.sequences * s.context


CASES = {
    "4x128": Case(ModelShape(4, 4, 128, 256, 256), 128, 8, 10),
    "6x384": Case(ModelShape(6, 6, 384, 256, 4096), 32, 8, 10, "bpe-4096"),
    "gpt2-124m": Case(ModelShape(12, 12, 768, 1024, 50257), 1, 32, 4, "bpe-16384", 50304),
} if CUDA else {"2x64": Case(ModelShape(2, 4, 64, 64, 256), 16, 8, 3)}  # fmt: skip
PACKS = {"native-bf16": ("native-bf16",), "e4m3fn": ("e4m3fn",), "mixed": MIXED}
PAIRS = [(case, name) for case in CASES for name in PACKS if case != "gpt2-124m" or name == "e4m3fn"]


@functools.cache
def text(tokenizer: str) -> Text:
    """Real text; where V is 50,257, in a vocabulary of 16,384 that can be trained anywhere."""
    return load_text("python", tokenizer=tokenizer)


def synchronize() -> None:
    """Wait for the device."""
    if CUDA:
        torch.cuda.synchronize()


def measure(benchmark: Any, steps: Callable[[], None], case: Case, runs: int, name: str) -> None:
    """Time `case.steps` steps, after a warm-up, and note rates from the median."""

    def timed() -> None:
        steps()
        synchronize()

    benchmark.group = name
    benchmark.pedantic(timed, rounds=10 if CUDA else 5, warmup_rounds=3)
    rate = runs * case.steps / benchmark.stats.stats.median
    benchmark.extra_info["run_steps_per_second"] = rate
    benchmark.extra_info["tokens_per_second"] = rate * case.sequences * case.shape.context
    benchmark.extra_info["tflops"] = rate * case.flops / 1e12
    note_device(benchmark)


def note_device(benchmark: Any) -> None:
    """What ran it."""
    benchmark.extra_info["device"] = torch.cuda.get_device_name() if CUDA else "cpu"
    benchmark.extra_info["torch"] = torch.__version__


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_bf16_peak(benchmark: Any) -> None:
    """What the card's BF16 products reach: 8192 x 8192 x 8192, random operands."""
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))

    def timed() -> None:
        for _ in range(10):
            a @ b
        synchronize()

    benchmark.group = "ceilings"
    with deterministic(tf32=False):
        benchmark.pedantic(timed, rounds=20, warmup_rounds=3)
    benchmark.extra_info["tflops"] = 10 * 2 * 8192**3 / benchmark.stats.stats.median / 1e12
    note_device(benchmark)


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_copy(benchmark: Any) -> None:
    """What the card's memory moves: bytes read and written by a copy of 1 GiB, a second."""
    x = torch.randint(0, 255, (2**30,), device=DEVICE, dtype=torch.uint8)
    y = torch.empty_like(x)

    def timed() -> None:
        y.copy_(x)
        synchronize()

    benchmark.group = "ceilings"
    benchmark.pedantic(timed, rounds=20, warmup_rounds=3)
    benchmark.extra_info["bytes_per_second"] = 2 * 2**30 / benchmark.stats.stats.median
    note_device(benchmark)


def make_pack(case: Case, formats: tuple[str, ...]) -> Pack:
    """A pack of the case's size, its runs' recipes in turn; many steps, no evaluation."""
    recipes = [resolve_recipe(formats[i % len(formats)]) for i in range(case.runs)]
    program = Program(
        case.shape, recipes[0].structure, "python", 10_000, case.sequences, 100, "cosine", 0.1, AdamW(), 10_000,
        case.sequences, Probe(50, epsilons=EIGHT),
    )  # fmt: skip
    slots = [Slot(recipe, 1e-3, i, i) for i, recipe in enumerate(recipes)]
    return Pack(program, slots, text(case.tokenizer), DEVICE)


@pytest.mark.parametrize(("name", "recipe"), PAIRS)
def test_pack(benchmark: Any, name: str, recipe: str) -> None:
    case = CASES[name]
    pack = make_pack(case, PACKS[recipe])

    def steps() -> None:
        for _ in range(case.steps):
            pack.step()

    measure(benchmark, steps, case, case.runs, name)
    assert pack.train_loss[0].isfinite().all()


@pytest.mark.parametrize("name", [name for name in CASES if name != "gpt2-124m"])
def test_probe_of_eight_epsilons(benchmark: Any, name: str) -> None:
    """Forward pass and sharpness, as defined and centred, of every position of a batch; `of_training` is its share at one every
    50 steps.
    """
    case = CASES[name]
    pack = make_pack(case, PACKS["native-bf16"])
    for _ in range(3):
        pack.step()

    def probe() -> None:
        pack.sharpness()
        synchronize()

    def step() -> None:
        for _ in range(case.steps):
            pack.step()
        synchronize()

    benchmark.group = name
    benchmark.pedantic(probe, rounds=10, warmup_rounds=3)
    seconds = median_seconds(step, 10) / case.steps
    benchmark.extra_info["of_training"] = benchmark.stats.stats.median / (50 * seconds)
    note_device(benchmark)


def median_seconds(work: Callable[[], None], rounds: int) -> float:
    """The median of some rounds after one, in seconds."""
    work()
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


class Block(nn.Module):
    """A pre-norm block without biases."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        D, self.heads = shape.width, shape.heads
        self.ln_1, self.ln_2 = nn.LayerNorm(D, bias=False), nn.LayerNorm(D, bias=False)
        self.qkv, self.proj = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.fc, self.out = nn.Linear(D, 4 * D, bias=False), nn.Linear(4 * D, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, D] to the same."""
        n, t, d = x.shape
        q, k, v = (z.view(n, t, self.heads, -1).transpose(1, 2) for z in self.qkv(self.ln_1(x)).split(d, 2))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(n, t, d))
        mlp: Tensor = self.out(nn.functional.gelu(self.fc(self.ln_2(x))))
        return x + mlp


class PlainGPT(nn.Module):
    """The same decoder for one run, as an nn.Module."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(shape.vocabulary, shape.width), nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.ln_f = nn.LayerNorm(shape.width, bias=False)
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


def single_model(case: Case) -> tuple[str, nn.Module]:
    """NanoGPT's model where NANOGPT names its folder, ours otherwise; and whose it is."""
    folder = os.environ.get("NANOGPT")
    if not folder:
        return "plain nn.Module", PlainGPT(case.shape).to(DEVICE)
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(folder) / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shape = case.shape
    config = module.GPTConfig(
        block_size=shape.context, vocab_size=case.peer_vocabulary or shape.vocabulary, n_layer=shape.layers,
        n_head=shape.heads, n_embd=shape.width, dropout=0.0, bias=False,
    )  # fmt: skip
    model: nn.Module = module.GPT(config).to(DEVICE)
    return "nanoGPT", model


def autocast() -> contextlib.AbstractContextManager[Any]:
    """BF16 on a GPU, plain FP32 on a CPU, as nanoGPT's loop has it."""
    return torch.autocast("cuda", torch.bfloat16) if CUDA else contextlib.nullcontext()


def single_run(case: Case, capturable: bool) -> tuple[str, nn.Module, torch.optim.Optimizer]:
    """One run: model, compiled on a GPU, and fused AdamW with decay on matrices."""
    torch._dynamo.reset()
    whose, model = single_model(case)
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
@pytest.mark.parametrize("name", CASES)
def test_one_run_at_a_time(benchmark: Any, name: str, deterministically: bool) -> None:
    case = CASES[name]
    T = case.shape.context
    whose, model, optimizer = single_run(case, capturable=False)
    tokens = torch.from_numpy(text(case.tokenizer).train.astype("int32"))
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        starts = torch.randint(len(tokens) - T, (case.sequences,), generator=generator).tolist()
        window = torch.stack([tokens[s : s + T + 1] for s in starts]).long()
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
            for _ in range(case.steps):
                step()

    benchmark.extra_info["peer"] = whose
    measure(benchmark, steps, case, 1, name)
    assert_finite(model)


def assert_finite(model: nn.Module) -> None:
    """The peer's weights are finite after the steps that were timed."""
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.skipif(not CUDA, reason="a CUDA graph needs a CUDA device")
@pytest.mark.parametrize("deterministically", MODES.values(), ids=MODES)
@pytest.mark.parametrize("name", [name for name in CASES if name != "gpt2-124m"])
def test_one_run_in_a_cuda_graph(benchmark: Any, name: str, deterministically: bool) -> None:
    case = CASES[name]
    T = case.shape.context
    whose, model, optimizer = single_run(case, capturable=True)
    tokens = torch.from_numpy(text(case.tokenizer).train.astype("int32")).to(DEVICE)
    ticks = torch.arange(T + 1, device=DEVICE)

    def step() -> None:
        starts = torch.randint(len(tokens) - T, (case.sequences, 1), device=DEVICE)
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
        for _ in range(case.steps):
            graph.replay()

    benchmark.extra_info["peer"] = whose
    measure(benchmark, steps, case, 1, name)
    assert_finite(model)
