"""`exmy bench`: how fast this machine is at what exmy does, beside libraries that do the same work in the same minutes.

All that is compared is timed in turns, round by round, so that it sees the same machine; a call's output is a new tensor, as
users get it, for the copy too. Before anything is timed its values are held against ours: a peer that gives others does other
work, is left out, and the row says so. What takes less than 5 ms is repeated within a round, after a pass that is not timed.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.stats import quantile_test
from torch import Tensor

from formats import quantize
from landscape import lbfgsb_logit_sharpness, logit_sharpness
from train.compiling import compiler, compiles_steps, has_cpp_compiler
from train.model import ModelShape
from train.optim import AdamW
from train.pack import Pack
from train.plan import pick_device
from train.program import Probe, Program, Slot
from train.provenance import device_name
from train.resolve import resolve_recipe
from train.study import StudyError
from train.text import load_text

LEAST_ROUNDS = 6  # the fewest in which a median has an interval of 95 %
LEAST_SECONDS = 5e-3
Call = Callable[[], Any]
Begun = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Spread:
    """Of all rounds: the median, its 95 % interval by order statistics (the exact binomial one), and the ends."""

    median: float
    low: float
    high: float
    least: float
    most: float


@dataclass(frozen=True)
class Row:
    """One thing measured: a rate in `unit`, and by name of what it is held against, how many times its speed this has.

    wrong: what was to be held against it and gives other values, which is not the same work.
    """

    part: str
    what: str
    unit: str
    rate: Spread
    times: dict[str, Spread] = field(default_factory=dict)
    wrong: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """Something to be timed: what does it, how much that is, in a unit, and by name what does the same.

    same: of those held against it, whether they give its values; who is not named does other work, a copy, and is no peer.
    """

    part: str
    what: str
    unit: str
    amount: float
    call: Call
    against: Mapping[str, Call] = field(default_factory=dict)
    same: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Sizes:
    """How much of each is measured: elements of a tensor, tokens and vocabulary, a model and the runs and steps of a pack."""

    elements: int
    tokens: int
    vocabulary: int
    shape: ModelShape
    runs: int
    sequences: int
    steps: int


SIZES = {
    "cuda": Sizes(2**28, 2, 50_257, ModelShape(4, 4, 128, 256, 256), 128, 8, 10),
    "cpu": Sizes(2**24, 2, 50_257, ModelShape(2, 4, 64, 64, 256), 16, 8, 3),
}


def bench(
    parts: Sequence[str], device: str, rounds: int, sizes: Sizes | None = None,
    begun: Begun = lambda *_: None,
) -> Iterator[Row]:  # fmt: skip
    """Rows as they come. parts: of `PARTS`, or none for all; device: "auto", "cpu" or "cuda"; rounds: at least six.

    begun: told what is being measured and which round of how many, as it goes. StudyError for what can't be.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise StudyError(f"there is no part {unknown[0]!r}: {', '.join(PARTS)}")
    if rounds < LEAST_ROUNDS:
        raise StudyError(f"rounds must be at least {LEAST_ROUNDS}, for a median with a 95 % interval, got {rounds}")
    where = pick_device(device)
    for part in parts or PARTS:
        for task in PARTS[part](where, sizes or SIZES[where.type]):
            yield _measured(task, where, rounds, begun)
            del task  # and its tensors, before the next one's are made


def _measured(task: Task, device: torch.device, rounds: int, begun: Begun) -> Row:
    wrong = tuple(name for name, same in task.same.items() if not same)
    calls = {"": task.call, **{name: call for name, call in task.against.items() if name not in wrong}}
    begun(task.what, 0, rounds)
    repeats = {name: _repeats(call, device) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for done in range(rounds):
        for name, call in calls.items():
            if repeats[name] > 1:
                call()  # untimed: the first pass after another's pays for the memory that it gave back
            seconds[name].append(_timed(call, repeats[name], device))
        begun(task.what, done + 1, rounds)
    own = np.array(seconds.pop(""))
    times = {name: spread(np.array(theirs) / own) for name, theirs in seconds.items()}
    return Row(task.part, task.what, task.unit, spread(task.amount / own), times, wrong)


def _repeats(call: Call, device: torch.device) -> int:
    """How often a call is made in a round; the first, which may compile, is not counted."""
    call()
    return max(1, math.ceil(LEAST_SECONDS / max(_timed(call, 1, device), 1e-7)))


def _timed(call: Call, repeats: int, device: torch.device) -> float:
    """Seconds a call."""
    _wait(device)
    begun = time.perf_counter()
    for _ in range(repeats):
        call()
    _wait(device)
    return (time.perf_counter() - begun) / repeats


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(values: np.ndarray[Any, np.dtype[np.float64]]) -> Spread:
    """Of the values of all rounds, at least six."""
    interval = quantile_test(values, p=0.5).confidence_interval(0.95)
    return Spread(
        float(np.median(values)), float(interval.low), float(interval.high), float(values.min()), float(values.max())
    )


# What is measured.


def _compiled(function: Callable[..., Tensor], device: torch.device) -> tuple[Callable[..., Tensor], str]:
    """The function compiled where this machine can, and the word for it."""
    able = compiles_steps("cuda") if device.type == "cuda" else has_cpp_compiler()
    return (compiler()(function), "compiled") if able else (function, "eager")


def _random(elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normal numbers, within the range of every format here; StudyError where there is no room for a few such tensors."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        needed = 8 * elements * dtype.itemsize
        if free < needed:
            raise StudyError(
                f"{needed / 2**30:.1f} GiB of {device_name(device)}'s memory are needed, {free / 2**30:.1f} are free: end "
                f"what takes the rest, or take --device cpu"
            )
    return torch.randn(elements, generator=torch.Generator(device).manual_seed(0), device=device).to(dtype)


def _elements(device: torch.device, sizes: Sizes) -> Iterator[Task]:
    """One number at a time, FP32 to FP32."""
    x = _random(sizes.elements, torch.float32, device)
    for name, dtype in (("e4m3fn", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2), ("bf16", torch.bfloat16)):
        ours, how = _compiled(_to(name), device)
        expected = ours(x)
        against: dict[str, Call] = {"a copy": x.clone, "torch's casts": partial(_cast, x, dtype)}
        if device.type == "cpu" and importlib.util.find_spec("ml_dtypes"):
            against["ml_dtypes"] = _ml_dtypes(x, name)
        same = {
            peer: torch.equal(torch.as_tensor(call()), expected) for peer, call in against.items() if peer != "a copy"
        }
        what = f"FP32 to {name} and back, nearest even, {how}, 2^{sizes.elements.bit_length() - 1} elements"
        yield Task("elements", what, "elements/s", sizes.elements, partial(ours, x), against, same)


def _to(name: str) -> Callable[[Tensor], Tensor]:
    """A function a format, whose name is a constant to the compiler."""
    return lambda x: quantize(x, name)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).to(x.dtype)


def _ml_dtypes(x: Tensor, name: str) -> Call:
    import ml_dtypes

    dtype = {"e4m3fn": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2, "bf16": ml_dtypes.bfloat16}[name]
    array = x.numpy()
    return lambda: array.astype(dtype).astype(np.float32)


def _blocks(device: torch.device, sizes: Sizes) -> Iterator[Task]:
    """Numbers with a scale to a block, BF16 to BF16."""
    x = _random(sizes.elements, torch.bfloat16, device).view(-1, 4096)
    for name in ("mxfp8_e4m3fn", "mxfp4", "nvfp4"):
        ours, how = _compiled(_to(name), device)
        what = f"BF16 to {name} and back, {how}, 2^{sizes.elements.bit_length() - 1} elements"
        yield Task("blocks", what, "elements/s", sizes.elements, partial(ours, x), {"a copy": x.clone})


def _sharpness(device: torch.device, sizes: Sizes) -> Iterator[Task]:
    """The exact one, and the numerical search for it that the literature runs, which finds most of it."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(sizes.tokens, sizes.vocabulary, generator=generator)
    targets = torch.randint(0, sizes.vocabulary, (sizes.tokens,), generator=generator)
    z, t = logits.to(device), targets.to(device)
    ours, how = _compiled(logit_sharpness, device)
    exact = ours(z, t).double().cpu()
    search = partial(lbfgsb_logit_sharpness, logits, targets)
    found = torch.as_tensor(search().lower)
    what = f"exact logit sharpness, V = {sizes.vocabulary:,}, epsilon 5e-4, {how}, {sizes.tokens} tokens"
    most_of_it = bool((found <= exact * (1 + 1e-4)).all() and (found > exact / 2).all())
    peer = "ten iterations of SciPy's L-BFGS-B"
    yield Task("sharpness", what, "tokens/s", sizes.tokens, partial(ours, z, t), {peer: search}, {peer: most_of_it})


def _packs(device: torch.device, sizes: Sizes) -> Iterator[Task]:
    """Steps of training, of all runs of a pack at once and of one run alone."""
    s = sizes.shape
    for recipe in ("native-bf16", "e4m3fn"):
        many, one = (_pack(recipe, runs, device, sizes) for runs in (sizes.runs, 1))
        what = f"training {s.layers} × {s.width}, {sizes.sequences} × {s.context} tokens a step, {recipe}, a pack of {sizes.runs}"
        yield Task(
            "packs", what, "run-steps/s", sizes.runs * sizes.steps, partial(_train, many, sizes.steps),
            {f"{sizes.runs} runs one after another": partial(_train, one, sizes.runs * sizes.steps)},
        )  # fmt: skip


def _pack(recipe: str, runs: int, device: torch.device, sizes: Sizes) -> Pack:
    resolved = resolve_recipe(recipe)
    program = Program(
        sizes.shape, resolved.structure, "python", 1_000_000, sizes.sequences, 100, "cosine", 0.1, AdamW(), 1_000_000,
        sizes.sequences, Probe(1_000_000, epsilons=(5e-4,)),
    )  # fmt: skip
    return Pack(program, [Slot(resolved, 1e-3, i, i) for i in range(runs)], load_text("python"), device)


def _train(pack: Pack, steps: int) -> None:
    for _ in range(steps):
        pack.step()


PARTS: Mapping[str, Callable[[torch.device, Sizes], Iterator[Task]]] = {
    "elements": _elements, "blocks": _blocks, "sharpness": _sharpness, "packs": _packs,
}  # fmt: skip
