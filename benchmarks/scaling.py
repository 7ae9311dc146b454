"""One GPU against several on the same study: the part `scaling` of `sweeps`, whose docstring says what is measured.

Of two workers against one, with W seconds of steps in all, and f1 and f2 seconds that do not shrink: (f1 + W) / (f2 + W / 2),
which is 1.9 at W = 20 (1.9 f2 - f1), 18 f where both are alike. `docs/scaling.md` has what H200s needed for it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.sweep_sizes import CUDA, Size, make_study, spread
from train.compiling import CACHE_VARIABLE
from train.plan import pick_device, plan
from train.store import read_packs

ROOT = Path(__file__).parent.parent
KEPT = {"code": "fxgraph/*/*", "graphs": "aotautograd/*"}  # where the compiler's cache has an entry for each


def scaling(size: Size, scratch: Path, fill: Callable[..., Mapping[str, Any]]) -> dict[str, Any]:
    """The same sweep with one worker and with more, one after the other or side by side.

    fill: makes a pack of a model, a recipe and a size, of so many steps and runs, and each kind of its passes once, in a process
    of its own: code depends on the number of steps, by the shapes of histories, and not on how many of them are made.
    """
    model, steps = next(iter(size.models)), size.scaling_steps
    counts = size.workers or tuple(n for n in (1, 2, 4, 8) if n <= (torch.cuda.device_count() if CUDA else 2))
    places = apart(counts, visible()) if size.side_by_side else dict.fromkeys(counts)
    study = make_study(
        size, model, steps, {**size.axes, "seed": size.scaling_seeds}, **({} if CUDA else {"pack_size": 4})
    )
    path = scratch / "scaling.toml"
    path.write_text(study.to_toml(), encoding="utf-8")
    # R is part of a program: the pack that fills the cache is planned as those of the study are.
    filled = fill("compile", model, size.programs[0], size.name, steps, plan(study, pick_device("auto"))[0].size)
    before = kept()

    def measured(workers: int) -> dict[str, Any]:
        told = sweep(path, scratch / f"scaling-{workers}", workers, places[workers])
        print(f"{workers} of {counts}:", json.dumps(told), flush=True)  # kept, whatever becomes of the others
        return told

    with ThreadPoolExecutor(len(counts) if size.side_by_side else 1) as pool:
        found = dict(zip(counts, pool.map(measured, counts), strict=True))
    for told in found.values() if 1 in found else ():
        told["times_one_worker"] = {
            what: found[1][f"{what}_seconds"] / told[f"{what}_seconds"] for what in ("command", "packs")
        }
    return {
        "model": model, "steps": steps, "side_by_side": size.side_by_side, "filling_the_cache_seconds": filled["passes"],
        "in_the_cache": before, "made_anew": {kind: count - before[kind] for kind, count in kept().items()}, "workers": found,
    }  # fmt: skip


def sweep(study: Path, directory: Path, workers: int, gpus: str | None) -> dict[str, Any]:
    """One command, from its start to its end, and what its packs say; gpus: as CUDA_VISIBLE_DEVICES names them, None for all."""
    command = [
        sys.executable, "-m", "exmy", "sweep", str(study), "--out", str(directory), "--executor", "local",
        "--workers", str(workers), *([] if CUDA else ["--device", "cpu"]),
    ]  # fmt: skip
    seen = {} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus}
    begun, clock = time.time(), time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=os.environ | seen, capture_output=True, text=True, check=False)
    whole, ended = time.perf_counter() - clock, time.time()
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
    packs, first, last = packs_seconds(directory)
    return {
        "command_seconds": whole, **packs, "before_packs_seconds": first - begun, "after_packs_seconds": ended - last,
        "gpus": gpus,
    }  # fmt: skip


def packs_seconds(directory: Path) -> tuple[dict[str, Any], float, float]:
    """From the first pack's start to the last one's end, and what each took, by a study's files; and when these two were."""
    spans, first, rates = [], [], []
    for pack in read_packs(directory):
        written = (directory / "packs" / f"{pack.attrs['pack']}.nc").stat().st_mtime
        spans.append((written - float(pack.attrs["seconds"]), written))
        first.append(float(pack.attrs["seconds_first_step"]))
        made = int(pack.attrs.get("steps_made", pack["history"].sizes["step"]))
        rates.append((made - 1) / (float(pack.attrs["seconds"]) - first[-1]))
    begun, ended = min(start for start, _ in spans), max(end for _, end in spans)
    told = {
        "packs": len(spans), "packs_seconds": ended - begun, "a_pack_seconds": spread([end - start for start, end in spans]),
        "first_step_seconds": spread(first), "steps_per_second_after_it": spread(rates),
    }  # fmt: skip
    return told, begun, ended


def visible() -> list[str]:
    """The GPUs that this process sees, by the names that a child is told them by; none without any."""
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named or [str(i) for i in range(torch.cuda.device_count() if CUDA else 0)]


def apart(counts: Sequence[int], gpus: Sequence[str]) -> dict[int, str | None]:
    """GPUs of its own for each sweep of so many workers; on a CPU they share it. ValueError where there are too few."""
    if not gpus:
        return dict.fromkeys(counts)
    if sum(counts) > len(gpus):
        raise ValueError(f"side by side these sweeps need {sum(counts)} GPUs, and there are {len(gpus)}")
    left: Iterator[str] = iter(gpus)
    return {count: ",".join(next(left) for _ in range(count)) for count in counts}


def kept() -> dict[str, int]:
    """How much the compiler's cache holds, by kind: what a sweep adds it did not find."""
    folder = Path(os.environ[CACHE_VARIABLE])
    return {kind: sum(1 for _ in folder.glob(where)) for kind, where in KEPT.items()}
