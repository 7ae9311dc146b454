"""What second derivatives cost: `python -m benchmarks.curvature --out FILE.json`, on one GPU; `--small` tries it out on a CPU.

hvp      a Hessian-vector product against a gradient of the same batch, by the same kind of program, in turns: medians of 10 of
         each after a warm-up. Counting products of matrices, it is 9 for 3 as autograd goes, 8 for 3 recorded. Quantisers are
         off; with --on, for one model on as well.
lambda   lambda_max of all runs of a pack, to a residual of 1e-3, and to one of 0.03, where values are as exact as those that the
         first peer stops at, against run by run, on the same weights and tokens:
           pyhessian_style  PyHessian's `eigenvalues`: power iteration, twice backward, the gradient's graph kept from one
                            product to the next, until two values are within 1e-3 of each other, or 100 products
           power_iteration  the same to our residual, in 1,000 products at most
           curvlinops       its Hessian in SciPy's Lanczos, whose tolerance is of the residual too; if it is there
         What residual each one left is told, and how many of the eigenvalues were negative: power iteration finds the largest in
         size. Mean seconds a run are compared, over all runs of the pack: some take five times the products of others, of any
         method, and the pack waits for them. curvlinops, which takes ten seconds a run on an H100, always as many products,
         takes the first `--peer-runs`. Weights are those after some steps of Adam, where there is something to find.
memory   the most memory that tensors took during a product of GPT-2 124M, V = 50,257, T = 1,024, B = 8, by pieces of so many
         sequences; of a GPU.
probe    the share of the time that exact logit sharpness for 8 epsilons takes, every 50 steps of training a pack.

FP32 throughout, TF32 off, as products run; but for the steps that `probe` times. Peers are nn.Modules with attention in its
mathematical form, as without it there is no second derivative. curvlinops may be in a folder of its own: `--peers FOLDER`.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.curvature_peers import (
    TOLERANCE,
    Method,
    PlainGPT,
    by_curvlinops,
    by_power_iteration,
    by_pyhessian,
    twice_backward,
)
from benchmarks.sweep_sizes import CUDA, seconds, spread, synchronize
from landscape import LandscapeError, Problem, hessian_eigenvalues
from landscape.programs import How
from train.determinism import deterministic
from train.durable import atomically
from train.measures import Quantisers
from train.model import ModelShape
from train.optim import AdamW
from train.pack import Pack
from train.program import Probe, Program, Slot
from train.provenance import device_name, provenance
from train.resolve import resolve_recipe
from train.seeds import initial_weights
from train.study import Study
from train.surface import surface
from train.text import Text

DEVICE = torch.device("cuda" if CUDA else "cpu")
LOOSE = 0.03  # residual
EPSILONS = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2)


Keep = Callable[[str, Any], None]  # a case's result, by its name


@dataclass(frozen=True)
class Case:
    """A model, how many runs of it and sequences of each, and how many of these at a time in a product."""

    shape: ModelShape
    runs: int
    sequences: int
    piece: int


@dataclass(frozen=True)
class Size:
    """The cases of each part."""

    hvp: dict[str, Case]
    lambda_max: dict[str, Case]
    memory: dict[str, Case]
    probe: Case
    basis: int
    steps: int
    rounds: int


SIX = ModelShape(layers=6, heads=6, width=384, context=256, vocabulary=4096)
GPT2 = ModelShape(layers=12, heads=12, width=768, context=1024, vocabulary=50257)
TINY = ModelShape(layers=2, heads=2, width=32, context=32, vocabulary=128)
H100 = Size(
    hvp={"6x384 R32": Case(SIX, 32, 8, 2), "gpt2-124m R1": Case(GPT2, 1, 8, 2)},
    lambda_max={"6x384 R32, 256 tokens": Case(SIX, 32, 1, 1), "6x384 R32, 2,048 tokens": Case(SIX, 32, 8, 2)},
    memory={f"gpt2-124m, {n} at a time": Case(GPT2, 1, 8, n) for n in (1, 2, 4, 8)},
    probe=Case(SIX, 32, 8, 8),
    basis=12,
    steps=40,
    rounds=10,
)
SMALL = Size(
    hvp={"2x32 R4": Case(TINY, 4, 2, 1)},
    lambda_max={"2x32 R4": Case(TINY, 4, 2, 2)},
    memory={"2x32, 1 at a time": Case(TINY, 1, 2, 1)},
    probe=Case(TINY, 4, 2, 2),
    basis=12,
    steps=10,
    rounds=3,
)


def make_program(case: Case, recipe: str, probe: Probe = Probe()) -> Program:  # noqa: B008
    """A program of that model and recipe."""
    return Program(
        shape=case.shape, structure=resolve_recipe(recipe).structure, dataset="made", steps=1000, sequences=case.sequences,
        warmup=100, schedule="cosine", final_fraction=0.1, optimizer=AdamW(), evaluate_every=500,
        evaluation_sequences=case.sequences, probe=probe,
    )  # fmt: skip


def make_slots(case: Case, recipe: str) -> list[Slot]:
    """Runs that differ in their seeds."""
    return [Slot(resolve_recipe(recipe), 1e-3, seed, seed) for seed in range(case.runs)]


def make_weights(case: Case) -> dict[str, Tensor]:
    """Each run's initial weights, FP32."""
    drawn = [initial_weights(case.shape, seed) for seed in range(case.runs)]
    return {name: torch.from_numpy(np.stack([w[name] for w in drawn])).to(DEVICE) for name in drawn[0]}


def make_tokens(vocabulary: int, length: int, seed: int) -> np.ndarray[Any, Any]:
    """Tokens with something to learn: each is most often followed by its successor."""
    rng = np.random.default_rng(seed)
    return np.cumsum(rng.choice([1, 1, 1, 5, 11], size=length)) % vocabulary


def make_batch(case: Case) -> tuple[Tensor, Tensor]:
    """Tokens and targets of each run, [R, N, T]."""
    T = case.shape.context
    drawn = [make_tokens(case.shape.vocabulary, case.sequences * (T + 1), seed) for seed in range(case.runs)]
    windows = torch.from_numpy(np.stack(drawn)).view(case.runs, case.sequences, T + 1).to(DEVICE)
    return windows[..., :-1].contiguous(), windows[..., 1:].contiguous()


def make_problem(
    case: Case, params: dict[str, Tensor], how: How, recipe: str = "native-bf16", quantisers: Quantisers = "off"
) -> Problem:
    """The pack's loss."""
    made = surface(make_program(case, recipe), make_slots(case, recipe), DEVICE, quantisers)
    return made.problem(params, *make_batch(case), sequences=case.piece, program=how)


def tidy() -> None:
    """Give back what is not in use."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# A product against a gradient.


def hvp(size: Size, asked: argparse.Namespace, keep: Keep) -> None:
    """Seconds of both, and their ratio, by kind of program."""
    for name, case in size.hvp.items():
        params = make_weights(case)
        settings: list[tuple[str, str, Quantisers]] = [("off", "native-bf16", "off")]
        settings += [("e4m3fn on", "e4m3fn", "on")] if case.runs > 1 and asked.on else []
        for word, recipe, quantisers in settings:
            for how in asked.programs.split(","):
                tidy()
                try:
                    found = product_against_gradient(make_problem(case, params, how, recipe, quantisers), size.rounds)
                except (RuntimeError, LandscapeError) as error:  # the other cases count
                    found = {"failed": str(error).strip().split("\n")[0][:300]}
                keep(f"{name}, {word}, {how}", found)


def product_against_gradient(problem: Problem, rounds: int) -> dict[str, Any]:
    """In turns, after a first of each, which records or compiles."""
    v = torch.randn_like(problem.point)
    v /= v.norm(dim=1, keepdim=True)
    first = {"gradient": seconds(problem.gradient), "hvp": seconds(lambda: problem.hvp(v))}
    problem.gradient()
    problem.hvp(v)
    gradients, products = [], []
    for _ in range(rounds):
        gradients.append(seconds(problem.gradient))
        products.append(seconds(lambda: problem.hvp(v)))
    ratio = float(np.median(products) / np.median(gradients))
    return {
        "hvp_over_gradient": ratio, "gradient_seconds": spread(gradients), "hvp_seconds": spread(products),
        "first_seconds": first, "second_derivatives": problem.mode, "why": problem.why, "memory": peak(),
    }  # fmt: skip


def peak() -> int | None:
    """The most bytes that tensors took since `tidy`, on a GPU."""
    return torch.cuda.max_memory_allocated() if CUDA else None


# lambda_max.


def trained(case: Case, steps: int) -> dict[str, Tensor]:
    """Weights of all runs after some steps of Adam on the batch, all of them a warm-up: without it some runs go astray."""
    params = {name: value.requires_grad_() for name, value in make_weights(case).items()}
    made = surface(make_program(case, "native-bf16"), make_slots(case, "native-bf16"), DEVICE, "off")
    tokens, targets = make_batch(case)
    optimizer = torch.optim.Adam(params.values(), lr=1e-3)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / steps)
    for step in range(steps):
        part = slice(step % case.sequences, step % case.sequences + 1)
        optimizer.zero_grad()
        made.loss(params, (tokens[:, part], targets[:, part])).sum().backward()
        optimizer.step()
        warm_up.step()
    return {name: value.detach() for name, value in params.items()}


def lambda_max(size: Size, asked: argparse.Namespace, keep: Keep) -> None:
    """Seconds a run by each method, the eigenvalues, and how far from eigenvectors what they found is."""
    for name, case in size.lambda_max.items():
        params = trained(case, size.steps)
        tidy()
        problem = make_problem(case, params, asked.lambda_program)
        own = ours(problem, size.basis, TOLERANCE)
        keep(f"{name}, exmy", own)
        by_value = ours(problem, size.basis, LOOSE)
        by_value["differs_at_most"] = differs(by_value, own)
        keep(f"{name}, exmy, residual {LOOSE}", by_value)
        del problem
        peers: dict[str, Method] = {"pyhessian_style": by_pyhessian, "power_iteration": by_power_iteration}
        if importlib.util.find_spec("curvlinops") is None:
            keep(f"{name}, curvlinops", {"failed": "curvlinops is not installed; --peers names a folder that has it"})
        else:
            peers["curvlinops"] = by_curvlinops
        for peer, method in peers.items():
            tidy()
            try:
                runs = min(asked.peer_runs, case.runs) if peer == "curvlinops" else case.runs
                other = run_by_run(method, case, params, runs)
            except (RuntimeError, ValueError, TypeError) as error:  # a peer's own
                keep(f"{name}, {peer}", {"failed": str(error).strip().split("\n")[0][:300]})
                continue
            for word, found in (("", own), ("_by_value", by_value)):
                other[f"times_as_long_as_exmy{word}"] = other["mean_seconds_a_run"] / found["seconds_a_run"]["median"]
            other["differs_at_most"] = differs(other, own)
            other["negative"] = sum(value < 0 for value in other["eigenvalue"])
            keep(f"{name}, {peer}", other)


def differs(found: dict[str, Any], exact: dict[str, Any]) -> float:
    """The most by which positive eigenvalues differ, as a share of those found to the smallest residual."""
    pairs = zip(found["eigenvalue"], exact["eigenvalue"], strict=False)
    return max((float(abs(a / b - 1)) for a, b in pairs if a > 0), default=math.nan)


def ours(problem: Problem, basis: int, tolerance: float) -> dict[str, Any]:
    """All runs at once, three times, the first of which may record."""

    def find() -> Any:
        return hessian_eigenvalues(problem, basis=basis, tolerance=tolerance).dataset

    times = [seconds(find) for _ in range(3)]
    dataset = find()
    value, residual = dataset.hessian_eigenvalue.values[:, 0], dataset.residual.values[:, 0]
    return {
        "runs": problem.R, "program": problem.program, "tolerance": tolerance, "seconds": spread(times[1:]),
        "first_seconds": times[0],
        "seconds_a_run": spread([t / problem.R for t in times[1:]]), "products": dataset.n_hvp.values.tolist(),
        "converged": int(dataset.converged.values.sum()), "eigenvalue": value.tolist(),
        "relative_residual": spread((residual / value).tolist()), "memory": peak(),
    }  # fmt: skip


def run_by_run(
    method: Method, case: Case, params: dict[str, Tensor], runs: int
) -> dict[str, Any]:  # fmt: skip
    """A peer on the first runs, one after another, after one that is not counted."""
    tokens, targets = make_batch(case)
    model = PlainGPT(case.shape).to(DEVICE)
    times, values, products, residuals = [], [], [], []
    for run in (0, *range(runs)):
        model.load({name: value[run] for name, value in params.items()})
        y = targets[run].flatten()
        with sdpa_kernel(SDPBackend.MATH):
            synchronize()
            begun = time.perf_counter()
            value, vector, count = method(model, tokens[run], y)
            synchronize()
            times.append(time.perf_counter() - begun)
            product = twice_backward(model, tokens[run], y)(vector)
        values.append(value)
        products.append(count)
        residuals.append(float((product - value * vector).norm()) / abs(value))
    return {
        "runs": runs, "seconds_a_run": spread(times[1:]), "mean_seconds_a_run": float(np.mean(times[1:])),
        "products": products[1:], "eigenvalue": values[1:],
        "relative_residual": spread(residuals[1:]),
    }  # fmt: skip


# Memory, and the probe.


def memory(size: Size, asked: argparse.Namespace, keep: Keep) -> None:
    """The peak of a product, with the parameters and vectors that were there before it, and of the first, which records."""
    for name, case in size.memory.items():
        for how in asked.programs.split(","):
            tidy()
            try:
                problem = make_problem(case, make_weights(case), how)
                v = torch.randn_like(problem.point)
                problem.hvp(v)
                synchronize()
                first = peak()
                tidy()
                problem.hvp(v)
                synchronize()
                found: dict[str, Any] = {"first_bytes": first, "bytes": peak()}
                del problem, v
            except torch.OutOfMemoryError as error:
                found = {"failed": str(error).split("\n")[0][:200]}
            keep(f"{name}, {how}", found)


def probe(size: Size, asked: argparse.Namespace, keep: Keep) -> None:  # noqa: ARG001
    """Seconds of a step and of a probe, by `sharpness` of a pack."""
    case = size.probe
    V = case.shape.vocabulary
    train, held_out = (make_tokens(V, length, 7).astype(np.uint16) for length in (200_000, 50_000))
    text = Text("made", train, held_out, V, math.log(V), "0" * 64, "made here")
    program = make_program(case, "e4m3fn", Probe(every=50, epsilons=EPSILONS))
    pack = Pack(program, make_slots(case, "e4m3fn"), text, DEVICE)

    def steps() -> None:
        pack.counter.zero_()
        for _ in range(10):
            pack.step()

    for _ in range(2):
        steps()
        pack.sharpness()
    a_step = spread([seconds(steps) / 10 for _ in range(size.rounds)])
    a_probe = spread([seconds(pack.sharpness) for _ in range(size.rounds)])
    share = a_probe["median"] / (a_probe["median"] + 50 * a_step["median"])
    keep(
        f"{case.shape.layers}x{case.shape.width} R{case.runs}, e4m3fn",
        {"step_seconds": a_step, "probe_seconds": a_probe, "every": 50, "epsilons": len(EPSILONS), "share": share},
    )


PARTS: dict[str, Callable[[Size, argparse.Namespace, Keep], None]] = {
    "hvp": hvp, "lambda": lambda_max, "memory": memory, "probe": probe,
}  # fmt: skip


def main() -> None:
    """The parts that are asked for, each in the file as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="JSON; parts that are there already stay")
    parser.add_argument("--parts", default="hvp,memory,lambda", help="of " + ", ".join(PARTS))
    parser.add_argument(
        "--programs", default="eager,recorded", help="of eager, recorded, compiled, which takes minutes"
    )
    parser.add_argument("--lambda-program", choices=("eager", "recorded", "compiled"), default="recorded")
    parser.add_argument("--small", action="store_true", help="tiny models, for trying it out")
    parser.add_argument("--peer-runs", type=int, default=4, help="how many runs curvlinops takes")
    parser.add_argument("--peers", type=Path, help="a folder with curvlinops and what it needs")
    parser.add_argument("--on", action="store_true", help="hvp with quantisers on, too")
    parser.add_argument("--cases", help="only cases whose name begins so")
    asked = parser.parse_args()
    if unknown := [part for part in asked.parts.split(",") if part not in PARTS]:
        parser.error(f"--parts: {', '.join(unknown)} is none of {', '.join(PARTS)}")
    if asked.peers is not None:
        sys.path.append(str(asked.peers))
    size = SMALL if asked.small else H100
    if asked.cases:
        for cases in (size.hvp, size.lambda_max, size.memory):
            for name in [name for name in cases if not name.startswith(asked.cases)]:
                del cases[name]
    for part in asked.parts.split(","):
        run_part(part, size, asked)


def run_part(part: str, size: Size, asked: argparse.Namespace) -> None:
    """One part, each case in the file as soon as it is there, beside those that are."""
    begun = time.perf_counter()
    origin = provenance(Study.model_validate({"axes": {"recipe": ["e4m3fn"], "learning_rate": [1e-3]}}), DEVICE)
    told = {
        "tolerance": TOLERANCE, "command": " ".join(["python -m benchmarks.curvature", *sys.argv[1:]]),
        "device": device_name(DEVICE), "version_curvlinops": version("curvlinops-for-pytorch"),
        "version_scipy": version("scipy"),
        **{key: origin[key] for key in ("version_torch", "version_python", "cuda", "cpu_threads", "git_commit", "created")},
    }  # fmt: skip

    def keep(name: str, result: Any) -> None:
        print(f"{part}: {name}: {json.dumps(result)}", flush=True)
        content: dict[str, Any] = json.loads(asked.out.read_text(encoding="utf-8")) if asked.out.exists() else {}
        cases = content.get(part, {}).get("cases", {}) | {name: told | result}
        content[part] = {"cases": cases, "seconds_in_all": time.perf_counter() - begun}
        with atomically(asked.out) as aside:
            aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    tidy()
    with deterministic(tf32=False):
        torch.use_deterministic_algorithms(True, warn_only=True)  # peers have what has no deterministic form
        PARTS[part](size, asked, keep)


def version(package: str) -> str:
    """A peer's version."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
