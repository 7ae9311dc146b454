"""The planner and the store with 100,000 packs: `python -m benchmarks.scale --packs 100000`; a quarter of an hour, 10 GB of disk.

A study of 8 runs a pack is planned for true, and its packs are simulated: one of each recipe and rate is written as a sweep
writes it, with made-up histories, and the others are its bytes with their own identities and seeds, so that `open_study` reads
true packs. What is measured: planning; `exmy status`, in a process of its own; finding the finished runs as a second start does
(by stamps) and as `exmy resume` does (every checksum); an index made again; opening, joining and a mean over all histories in
bounded memory, each in a process of its own, whose peak memory is its own. Seconds are of a clock on the wall; where others use
the machine too, those that the processor was at work, `..._cpu`, say more.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from rich.console import Console
from rich.progress import track

from train.directory import INDEX, PACKS, STUDY_FILE, found_packs, pack_names, study_text
from train.durable import atomically
from train.finished import TOGETHER
from train.index import append_rows, read_index, row_of
from train.pack_file import facts
from train.plan import PlannedPack, plan
from train.program import PackResult
from train.provenance import device_name, provenance
from train.store import finished_runs, pack_tree, write_pack
from train.study import Run, Study
from train.text import Text

CPU = torch.device("cpu")
R, RECIPES, RATES, STEPS = 8, ("e8m7", "e8m3", "e5m7", "e4m3", "e5m2"), 10, 60
FIRST_SEED = 1_000_000  # so that no other numbers of a file have the bytes of eight seeds
OUT = Path(__file__).parent / "results" / "cpu-scale.json"
console = Console(stderr=True)

OPENED = """
import re, sys, time
import dask
from train import open_study

def peak():  # of this program: what getrusage says holds the memory of the process that started it too
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])

dask.config.set(scheduler="synchronous")
before = peak()
began = time.perf_counter()
tree = open_study(sys.argv[1], chunks="auto")
opened = time.perf_counter() - began
mean = float(tree["history"]["train_loss"].mean())
joined = time.perf_counter() - began - opened
print(opened, joined, before, peak(), tree["history"].sizes["run"], mean)
"""


def study_of(packs: int) -> Study:
    """So many packs of eight runs: a pack has eight seeds of one recipe and rate."""
    seeds = R * packs // (len(RECIPES) * RATES)
    return Study.model_validate(
        {
            "name": "scale",
            "axes": {
                "recipe": list(RECIPES), "learning_rate": [1e-3 * 2 ** (i / 4) for i in range(RATES)],
                "seed": list(range(FIRST_SEED, FIRST_SEED + seeds)),
            },
            "model": {"layers": 1, "heads": 2, "width": 16, "context": 16},
            "training": {"steps": STEPS, "sequences": 2, "warmup": 3},
            "execution": {"pack_size": R},
        }
    )  # fmt: skip


def result(pack: PlannedPack) -> PackResult:
    """Histories of a pack, made up."""
    program, rng = pack.program, np.random.default_rng(len(pack.hash))

    def values(*sizes: int) -> Any:
        return rng.normal(3, 1, sizes).astype(np.float32)

    sharpness = {"logit_sharpness": values(len(program.probe_steps), R, len(program.probe.epsilons))}
    return PackResult(
        values(STEPS, R), values(STEPS, R), values(len(program.evaluation_steps), R), sharpness, 60.0, 1.0, compiled=False,
        grad_norm_block=values(STEPS, R, 1 + program.shape.layers),
    )  # fmt: skip


def seeds_of(run: Run) -> bytes:
    return np.int64(run.seed).tobytes()


def simulate(study: Study, packs: list[PlannedPack], directory: Path) -> None:
    """The study's directory with all packs written, checksums, index and all."""
    (directory / PACKS).mkdir(parents=True)
    with atomically(directory / STUDY_FILE) as aside:
        aside.write_text(study_text(study), encoding="utf-8")
    rows = []
    template: tuple[PlannedPack, bytes, xr.DataTree] | None = None
    origin = provenance(study, CPU)
    text = Text("python", np.zeros(9000, np.uint8), np.zeros(1000, np.uint8), 256, 3.2, "0" * 64, "simulated")
    for pack in track(packs, "simulating packs", console=console):
        first, run = pack.runs[0], template[0].runs[0] if template else None
        if template is None or run is None or (run.recipe, run.learning_rate) != (first.recipe, first.learning_rate):
            tree = pack_tree(pack, result(pack), text, origin)
            template = (pack, write_pack(directory, pack, tree).read_bytes(), tree)
            continue
        content = template[1].replace(template[0].hash.encode(), pack.hash.encode())
        for old, new in zip(template[0].runs, pack.runs, strict=True):
            content = content.replace(old.identity.encode(), new.identity.encode())
        of_template, own = (b"".join(map(seeds_of, one.runs)) for one in (template[0], pack))
        content = content.replace(of_template, own)
        path = directory / PACKS / f"{pack.hash}.nc"
        path.write_bytes(content)
        path.with_suffix(".sha256").write_text(f"{hashlib.sha256(content).hexdigest()}  {path.name}\n")
        rows.append((pack, path, template[2]))
        if len(rows) == TOGETHER:
            _note(directory, study, rows)
    _note(directory, study, rows)


def _hashes(plans: list[PlannedPack]) -> set[str]:
    return {pack.hash for pack in plans}


def _note(directory: Path, study: Study, rows: list[tuple[PlannedPack, Path, xr.DataTree]]) -> None:
    from train.finished import _stamps

    said: dict[int, dict[str, Any]] = {}
    new = []
    for pack, path, tree in rows:
        known = said.get(id(tree))
        if known is None:
            history = tree["history"].to_dataset()
            known = said[id(tree)] = facts(pack.hash, [], tree.attrs, history, study.divergence, study.design().hash)
        own = {"pack": pack.hash, "runs": " ".join(run.identity for run in pack.runs)}
        new.append(row_of(_stamps(path), known | own))
    append_rows(directory, new)
    rows.clear()


class Seconds(NamedTuple):
    """On the wall, and of the processor, children's included."""

    wall: float
    cpu: float


def cpu_seconds() -> float:
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def timed(call: Callable[[], Any]) -> tuple[Seconds, Any]:
    began, cpu = time.perf_counter(), cpu_seconds()
    found = call()
    return Seconds(time.perf_counter() - began, cpu_seconds() - cpu), found


def named(name: str, seconds: Seconds) -> Iterator[tuple[str, float]]:
    yield f"{name}_seconds", round(seconds.wall, 2)
    yield f"{name}_cpu", round(seconds.cpu, 2)


def process(*arguments: str) -> tuple[Seconds, str]:
    """A Python process that runs to its end, and what it printed."""
    seconds, done = timed(
        lambda: subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    )
    return seconds, done.stdout


def subset(directory: Path, out: Path, packs: int) -> Path:
    """A directory of the same study that has some of the packs, no index."""
    (out / PACKS).mkdir(parents=True)
    shutil.copy(directory / STUDY_FILE, out)
    for pack in pack_names(directory)[:packs]:
        for end in (".nc", ".sha256"):
            shutil.copy(directory / PACKS / f"{pack}{end}", out / PACKS)
    return out


def opened(directory: Path, packs: int) -> dict[str, float]:
    """Opening and joining in bounded memory."""
    whole, said = process("-c", OPENED, str(directory))
    seconds, joining, before, peak, runs, _ = map(float, said.split())
    return {
        "packs": packs, "runs": int(runs), "open_seconds": round(seconds, 2), "join_seconds": round(joining, 2),
        "cpu": round(whole.cpu, 2), "imported_mib": round(before / 2**20), "peak_mib": round(peak / 2**20),
    }  # fmt: skip


def measured(packs: int, folder: Path, *, whole: bool) -> Iterator[tuple[str, Any]]:
    """Each number, by its name, as it comes."""
    study = study_of(packs)
    directory = folder / "study"

    plans: list[PlannedPack]
    seconds, plans = timed(lambda: plan(study, CPU))
    hashing, hashes = timed(lambda: _hashes(plans))
    assert len(hashes) == len(plans)
    yield "packs", len(plans)
    yield "runs", R * len(plans)
    yield from named("plan", seconds)
    yield from named("hashes", hashing)
    del hashes
    simulate(study, plans, directory)
    there = found_packs(directory)
    bytes_of_packs = sum(found.file.size for found in there.values())
    bytes_of_index = sum(path.stat().st_size for path in (directory / INDEX).iterdir())
    yield "bytes_per_pack", bytes_of_packs // len(there)
    yield "bytes_per_run", bytes_of_packs // (R * len(there))
    yield "files_per_pack", 2
    yield "index_bytes", bytes_of_index
    yield "index_bytes_per_pack", bytes_of_index // len(there)
    yield from named("list_names", timed(lambda: sum(1 for _ in os.scandir(directory / PACKS)))[0])
    yield from named("list_stamps", timed(lambda: found_packs(directory))[0])
    yield from named("read_index", timed(lambda: read_index(directory))[0])
    yield from named("status", sorted(process("-m", "exmy", "status", str(directory))[0] for _ in range(3))[1])
    seconds, runs = timed(lambda: finished_runs(directory, study))
    assert len(runs) == R * len(there)
    yield from named("second_start", seconds)
    yield from named("resume", timed(lambda: finished_runs(directory, study, check=True))[0])
    part = subset(directory, folder / "part", 1000)
    yield from named("reindex_1000", timed(lambda: finished_runs(part, study))[0])
    yield from named("write_100_packs", _writing(study, folder / "written"))
    places = [(part, min(packs, 1000))]
    if packs > 10_000:
        places.append((subset(directory, folder / "more", 10_000), 10_000))
    if whole:
        places.append((directory, packs))
    done: list[dict[str, float]] = []
    for place, count in places:
        done.append(opened(place, count))
        yield "opened", done


def _writing(study: Study, directory: Path, packs: int = 100) -> Seconds:
    """Of the store for so many packs: each made a tree, compressed, flushed to the disk with its checksum, noted in the index."""
    (directory / PACKS).mkdir(parents=True)
    (directory / STUDY_FILE).write_text(study_text(study), encoding="utf-8")
    text = Text("python", np.zeros(9000, np.uint8), np.zeros(1000, np.uint8), 256, 3.2, "0" * 64, "simulated")
    origin = provenance(study, CPU)
    some = plan(study, CPU)[:packs]

    def write() -> None:
        for pack in some:
            write_pack(directory, pack, pack_tree(pack, result(pack), text, origin))

    return timed(write)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--packs", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, help="where to simulate; a temporary folder by default")
    parser.add_argument("--whole", action="store_true", help="open all packs too, not only 1,000 and 10,000 of them")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    origin = provenance(study_of(1000), CPU)
    kept = (
        "version_exmy",
        "version_torch",
        "version_numpy",
        "version_xarray",
        "version_python",
        "git_commit",
        "created",
    )
    found: dict[str, Any] = {"device": device_name(CPU), "cores": os.cpu_count(), "platform": platform.platform()}
    found["load_before"] = round(os.getloadavg()[0], 1)
    found |= {key: origin[key] for key in kept}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        for name, value in measured(arguments.packs, Path(scratch), whole=arguments.whole):
            found[name] = value
            arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            console.print(f"{name}: {value}")
        console.print("removing what was simulated")


if __name__ == "__main__":
    main()
