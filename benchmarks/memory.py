"""What a run takes of the device's memory, beside what the planner reckons with: `python -m benchmarks.memory --out FILE.json`.

For each case and recipe a pack is made, in a fresh process, and makes each kind of its passes, all that is recorded on.

    measured    the peak over what there was before the pack, the text left out, for each run: on a GPU of tensors, those of the
                CUDA graphs while they are recorded (torch.cuda.max_memory_allocated), on a CPU of the process (VmHWM)
    reserved    what PyTorch took of the GPU for that
    model       `Program.bytes_per_run`, by which the planner chooses R so that `MEMORY_SHARE` of what is free suffices; it should
                be more than was measured, and not much more

Rows are in the file as soon as they are there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.sweep_sizes import CUDA, Size, one_pack, passes_of, rewind, synchronize
from train.compiling import compiles_steps
from train.durable import atomically
from train.plan import MEMORY_SHARE
from train.provenance import provenance
from train.study import Study

ROOT = Path(__file__).parent.parent
RECIPES = ("native-bf16", "e4m3fn", "nvfp4-all", "ms-amp-o2")
GPU = Size(
    "memory-gpu",
    {
        "4x128 R128": {
            "model": {"layers": 4, "heads": 4, "width": 128, "context": 256}, "training": {"sequences": 8},
            "execution": {"pack_size": 128},
        },
        "6x384 R32": {
            "model": {"layers": 6, "heads": 6, "width": 384, "context": 256, "tokenizer": "bpe-4096"},
            "training": {"sequences": 8}, "execution": {"pack_size": 32},
        },
        "gpt2-124m R1": {
            "model": {
                "layers": 12, "heads": 12, "width": 768, "context": 1024, "vocabulary": 50257, "tokenizer": "bpe-16384",
            },
            "training": {"sequences": 32}, "execution": {"pack_size": 1},
        },
    },
    {}, 0, 0, 0, 0, 0,
)  # fmt: skip
CPU = Size(
    "memory-cpu",
    {
        "4x128 R8": {
            "model": {"layers": 4, "heads": 4, "width": 128, "context": 128}, "training": {"sequences": 8},
            "execution": {"pack_size": 8},
        },
        "2x256 R4": {
            "model": {"layers": 2, "heads": 4, "width": 256, "context": 128, "tokenizer": "bpe-4096"},
            "training": {"sequences": 8}, "execution": {"pack_size": 4},
        },
    },
    {}, 0, 0, 0, 0, 0,
)  # fmt: skip
SIZE = GPU if CUDA else CPU


def high_water() -> int:
    """The most that this process has held since `forget`, bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def forget() -> int:
    """Begin to look for the peak anew; what is held now, bytes."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return high_water()


def measure(case: str, recipe: str, steps: int = 1000) -> dict[str, Any]:
    """One pack of the recipe, in this process."""
    small = one_pack(SIZE, case, recipe, steps, runs=1)[1]  # libraries and, on a GPU, their workspaces
    if not CUDA:
        for work in passes_of(small).values():
            work()
    del small
    before = forget()
    planned, pack, _ = one_pack(SIZE, case, recipe, steps)
    for _ in range(3):
        for work in passes_of(pack).values():
            work()
    rewind(pack)
    synchronize()
    peak = torch.cuda.max_memory_allocated() if CUDA else high_water()
    model = planned.program.bytes_per_run(compiles_steps(pack.device.type))
    text = pack.text.nbytes * (1 if CUDA else 2)  # on a CPU beside its tensor what it was made of
    measured = (peak - before - text) / planned.size
    reserved = torch.cuda.max_memory_reserved() / planned.size if CUDA else None
    return {
        "case": case, "recipe": recipe, "pack_size": planned.size, "model": model, "measured": measured,
        "reserved": reserved, "model_over_measured": model / measured,
        "model_over_reserved": None if reserved is None else model / reserved,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> Table:
    """MiB a run, and how many times the model is of what was measured."""
    shown = Table(title=f"memory of a run; the planner fills {MEMORY_SHARE:.0%} of what is free")
    for heading in ("case", "recipe", "model MiB", "measured MiB", "model / measured", "reserved MiB"):
        shown.add_column(heading, justify="left" if heading in ("case", "recipe") else "right")
    for row in rows:
        sizes = ["-" if row[key] is None else f"{row[key] / 2**20:.1f}" for key in ("model", "measured", "reserved")]
        shown.add_row(row["case"], row["recipe"], sizes[0], sizes[1], f"{row['model_over_measured']:.2f}", sizes[2])
    return shown


def main() -> None:
    """Each case and recipe in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="JSON; rows of other cases and recipes that are there stay")
    parser.add_argument("--cases", default=",".join(SIZE.models), help="with commas between them")
    parser.add_argument("--recipes", default=",".join(RECIPES), help="with commas between them")
    parser.add_argument("--one", nargs=2, metavar=("CASE", "RECIPE"), help="this process' own")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(*arguments.one)))
        return
    rows: list[dict[str, Any]] = []
    if arguments.out and arguments.out.exists():
        rows = json.loads(arguments.out.read_text(encoding="utf-8"))["rows"]
    study = Study.model_validate({"axes": {"recipe": ["e8m7"], "learning_rate": [1e-3]}})
    origin = provenance(study, torch.device("cuda" if CUDA else "cpu"))
    for case in arguments.cases.split(","):
        for recipe in arguments.recipes.split(","):
            command = [sys.executable, "-m", "benchmarks.memory", "--one", case, recipe]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{case}, {recipe}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                continue
            row = json.loads(done.stdout.splitlines()[-1])
            rows = [r for r in rows if (r["case"], r["recipe"]) != (case, recipe)] + [row]
            if arguments.out:
                told = {key: origin[key] for key in ("device", "version_torch", "cuda", "git_commit", "created")}
                content = {**told, "command": "python -m benchmarks.memory", "rows": rows}
                with atomically(arguments.out) as aside:
                    aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    Console(width=110).print(table(rows))


if __name__ == "__main__":
    main()
