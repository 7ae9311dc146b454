"""What a whole sweep costs beside its kernels: `python -m benchmarks.sweeps --out FILE.json`, on one GPU or several.

busy        how much of the time the GPU works during a study of 500 runs, through `run_study`, compiled before. The study is
            timed as it is, without a profiler. Kernel time is counts times means: how often the study makes each kind of pass
            follows from its program, and the mean kernel time of each is measured afterwards on a pack of the same program,
            by CUPTI through torch.profiler: the union of the kernels' intervals, copies left out. So kernels of starting a
            pack, and passes that only wild logits need, are not counted. Beside it `nvidia-smi`'s utilisation, sampled five
            times a second while the study runs, and where the time between packs goes.
checkpoint  steps with a checkpoint among them against steps without, in turns; from the difference, the cost at an interval of
            50 times the time of writing, as the sweep itself measures it.
resume      from a process' start to its first new step: of a study that begins, and of one that goes on from a checkpoint; each
            in a fresh process, compiled code in the cache.
compile     of each of `--programs`, until each kind of a pack's passes has run once: when its code is in no cache yet, and again
            in a fresh process. The cache is this call's own, and the parts after this one find it filled.
scaling     `exmy sweep --executor local --workers N` on the same study, for each N that the machine has GPUs for: of the whole
            command, of its packs alone, from the first one's start to the last one's end, by their files, what comes before and
            after these, and a pack's rate after its first step. The cache is filled by one pack's first steps before, and how
            much was compiled anew all the same is told. `--scaling-steps` makes it longer: what does not shrink with more workers
            takes the same time however long the study is. `--side-by-side`: all at once, each on GPUs of its own.

Each part is written to the file as soon as it is there. `--study small` is for trying it out, on a CPU too, where kernel times
are null.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_busy import busy
from benchmarks.one_start import FIRST_STEP, KEPT_AT
from benchmarks.scaling import scaling
from benchmarks.sweep_sizes import CUDA, SIZES, Size, make_study, one_pack, rewind, seconds, spread, warm
from train.checkpoint import PATIENCE, Times, write
from train.compiling import CACHE_VARIABLE
from train.durable import atomically
from train.pack import Pack
from train.plan import pick_device
from train.provenance import device_name, provenance

ROOT = Path(__file__).parent.parent


def checkpoint(size: Size, scratch: Path) -> dict[str, Any]:
    """The cost of a checkpoint among steps, and so of one every `PATIENCE` times what writing it takes."""
    found = {}
    for model in size.models:
        planned, pack, _ = one_pack(size, model, "e4m3fn", 1000)
        steps = max(2, size.few // (1 if model != "gpt2-124m" else 6))
        warm(pack)
        writing: list[float] = []

        def some(pack: Pack = pack, steps: int = steps) -> None:
            rewind(pack)
            for _ in range(steps):
                pack.step()

        def twice(some: Callable[[], None] = some) -> None:
            some()
            some()

        def keep(pack: Pack = pack, writing: list[float] = writing, steps: int = steps, model: str = model) -> None:
            some(pack, steps)
            pack.counter.cpu()
            begun = time.perf_counter()
            write(scratch / f"checkpoint-{model}", {"runs": []}, pack.made, Times(), pack.state())
            writing.append(time.perf_counter() - begun)
            some(pack, steps)

        keep()  # the first one makes the folder and fills what caches there are
        writing.clear()
        without, with_one = [], []
        for _ in range(size.repeats):
            without.append(seconds(twice))
            with_one.append(seconds(keep))
        cost = [b - a for a, b in zip(without, with_one, strict=True)]
        interval = PATIENCE * statistics.median(writing)
        found[model] = {
            "pack_size": planned.size, "state_bytes": sum(t.nbytes for t in pack.state().values()),
            "steps_around": 2 * steps, "writing_seconds": spread(writing), "cost_seconds": spread(cost),
            "without_seconds": spread(without), "interval_seconds": interval,
            "times_as_long": 1 + statistics.median(cost) / interval,
        }  # fmt: skip
        del pack
    return found


def child(*arguments: object) -> dict[str, Any]:
    """What `benchmarks.one_start` says, in a fresh process; the clock is the system's, so that starting counts."""
    command = [sys.executable, "-m", "benchmarks.one_start", str(time.monotonic()), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
    said: dict[str, Any] = json.loads(lines[-1])
    return said


def resume(size: Size, scratch: Path) -> dict[str, Any]:
    """From a start to the first new step, of a study that begins and of one that goes on."""
    model = next(iter(size.models))
    study = make_study(size, model, 1000, {"recipe": ["e4m3fn"], "learning_rate": [1e-3], "seed": 128})
    path = scratch / "resume.toml"
    path.write_text(study.to_toml(), encoding="utf-8")
    child("start", path, scratch / "resume-warm")  # code into the cache
    first, again = [], []
    for i in range(size.repeats):
        directory = scratch / f"resume-{i}"
        first.append(child("start", path, directory)[FIRST_STEP])
        resumed = child("start", path, directory)
        if resumed["from_step"] != KEPT_AT:
            raise RuntimeError(f"went on from step {resumed['from_step']}, not from {KEPT_AT}")
        again.append(resumed[FIRST_STEP])
    ratio = statistics.median(again) / statistics.median(first)
    return {"model": model, "first_seconds": spread(first), "again_seconds": spread(again), "times_as_long": ratio}


def compile_times(size: Size, scratch: Path) -> dict[str, Any]:  # noqa: ARG001
    """What a program's code takes, when it is not in the cache yet and when it is."""
    model = next(iter(size.models))
    found: dict[str, Any] = {}
    for recipe in size.programs:
        cold, *cached = (child("compile", model, recipe, size.name) for _ in range(1 + size.repeats))
        found[recipe] = {
            "cold_seconds": cold["passes"], "cached_seconds": spread([c["passes"] for c in cached]),
            "making_the_pack_seconds": spread([c["making"] for c in cached]),
        }  # fmt: skip
    return {"model": model, "programs": found}


PARTS: dict[str, Callable[[Size, Path], dict[str, Any]]] = {
    "busy": busy, "checkpoint": checkpoint, "resume": resume, "compile": compile_times,
    "scaling": lambda size, scratch: scaling(size, scratch, child),
}  # fmt: skip


def main() -> None:
    """The parts that are asked for, each in the file as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="JSON; parts that are there already stay")
    parser.add_argument("--study", choices=list(SIZES), default="h100")
    parser.add_argument("--parts", default="compile,busy,checkpoint,resume", help="of " + ", ".join(PARTS))
    parser.add_argument("--programs", default="e4m3fn", help="recipes whose code is timed, with commas between them")
    parser.add_argument("--models", help="of the study's, those whose checkpoints are timed, with commas between them")
    parser.add_argument(
        "--scaling-steps", type=int,
        help="of each of the 4 packs that one worker and more train; one H200 makes about 70 a second, so 7,000 take 400 s, a "
        "command of one worker about 45 s more, and filling the cache a minute before it (see benchmarks/scaling.py)",
    )  # fmt: skip
    parser.add_argument("--workers", help="how many, as 1,2; if not given, as many as the machine has GPUs for")
    parser.add_argument("--side-by-side", action="store_true", help="these sweeps at once, each on GPUs of its own")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"--parts: {', '.join(unknown)} is none of {', '.join(PARTS)}")
    size = dataclasses.replace(SIZES[arguments.study], programs=tuple(arguments.programs.split(",")))
    if arguments.models:
        size = dataclasses.replace(size, models={name: size.models[name] for name in arguments.models.split(",")})
    if arguments.scaling_steps:
        size = dataclasses.replace(size, scaling_steps=arguments.scaling_steps)
    if arguments.workers:
        size = dataclasses.replace(size, workers=tuple(map(int, arguments.workers.split(","))))
    if arguments.side_by_side:
        size = dataclasses.replace(size, side_by_side=True)
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault(CACHE_VARIABLE, f"{folder}/code")
        for part in parts:
            run_part(part, size, Path(folder), arguments.out)


def run_part(part: str, size: Size, folder: Path, out: Path) -> None:
    """One part, into the file beside those that are there."""
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        result = PARTS[part](size, Path(scratch))
    gc.collect()  # the next part may be another process' that wants the GPU
    if CUDA:
        torch.cuda.empty_cache()
    origin = provenance(make_study(size, next(iter(size.models)), 10, size.axes), pick_device("auto"))
    content: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    command = " ".join(["python -m benchmarks.sweeps", *sys.argv[1:]])
    content[part] = {
        **result, "seconds_in_all": time.perf_counter() - begun, "command": command,
        "devices": torch.cuda.device_count() if CUDA else 0, "device": device_name(pick_device("auto")),
        **{key: origin[key] for key in ("version_torch", "version_python", "cuda", "git_commit", "created")},
    }  # fmt: skip
    with atomically(out) as aside:
        aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(part, json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
