"""Kills a study at random instants until it has been killed often enough, damages a file of its directory now and then, and holds
what comes out against a study that nobody disturbed: `python -m tests.kill_harness --kills 200`, or `make survive`.

The study has a pack for each kind of state: histories of delayed scales, dynamic loss scales, moments and master weights in
narrow formats with Kahan's compensation and random bits, a switch of precision in mid-training. It is trained by forked
processes, so that a start costs nothing and a kill may come at any instant: while texts are read, in a step, while a
checkpoint, a pack or its checksum is written. With `--workers 2` packs train in processes of their own, and a third of the kills
are a worker's, which the sweep has to outlive. Exit status 0 where every study that finished had the same bits, 1 where one had
not.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from train import Study, open_study, run_study
from train.plan import PlannedPack
from train.program import PackResult, Progress

STEPS = 30
FINISHED = 0
FAILED = 3


class Silent:
    """An observer that says nothing."""

    def planned(self, packs: list[PlannedPack], finished: int, device: str) -> None: ...
    def pack_started(self, pack: PlannedPack) -> None: ...
    def pack_progress(self, pack: PlannedPack, progress: Progress) -> None: ...
    def pack_finished(self, pack: PlannedPack, result: PackResult) -> None: ...


def study(checkpoint_seconds: float) -> Study:
    """Eight runs in four packs, with everything on that is recorded."""
    return Study.model_validate(
        {
            "name": "killed",
            "axes": {
                "recipe": ["delayed", "scaled", "narrow", "switched"], "learning_rate": [3e-3], "seed": 2,
            },
            "model": {"layers": 1, "heads": 2, "width": 32, "context": 32},
            "training": {"steps": STEPS, "sequences": 2, "warmup": 3, "evaluate_every": 7, "evaluation_batches": 1},
            "probe": {"every": 9},
            "signals": {"every": 4},
            "execution": {"pack_size": 2, "checkpoint_seconds": checkpoint_seconds},
            "recipes": {
                "delayed": {"base": "fp8-hybrid-delayed", "delayed": 5},
                "scaled": {"base": "native-fp16-scaled"},
                "narrow": {
                    "base": "e4m3", "master": "bf16", "first_moment": "e4m3fn@tensor", "second_moment": "bf16",
                    "state_rounding": "stochastic", "kahan": True,
                },
                "switched": {"base": "fp8-hybrid-delayed", "before": "native-bf16", "until": STEPS // 2},
            },
        }
    )  # fmt: skip


def start(directory: Path, checkpoint_seconds: float, log: Path, workers: int | None = None) -> int:
    """A process that trains the study in the directory, and writes its log to a file; its id."""
    child = os.fork()
    if child:
        return child
    status = FAILED
    try:
        logging.basicConfig(filename=log, level=logging.INFO, format="%(message)s", force=True)
        run_study(study(checkpoint_seconds), directory, "cpu", Silent(), workers=workers)
        status = FINISHED
    except BaseException:
        with log.open("a", encoding="utf-8") as file:
            traceback.print_exc(file=file)
    finally:
        os._exit(status)


def ended(child: int) -> int:
    """Wait for a process: its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def workers_of(sweep: int) -> list[int]:
    """The processes that a process has started and not yet waited for."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == sweep:
                found.append(int(entry.name))
    return found


def damage(directory: Path, rng: random.Random) -> str:
    """Flip a bit of a random file, or cut it off at a random place; what was done, "nothing" where there is no file."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.stat().st_size)
    if not files:
        return "nothing"
    path = rng.choice(files)
    content = bytearray(path.read_bytes())
    if flips := rng.random() < 0.5:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    else:
        del content[rng.randrange(len(content)) :]
    path.write_bytes(content)
    return f"{'flipped a bit of' if flips else 'cut off'} {path.relative_to(directory)}"


def differences(one: Path, other: Path) -> Iterator[str]:
    """The variables of two studies' groups that differ in a bit, in their runs or in what describes them."""
    mine, theirs = open_study(one), open_study(other)
    if set(mine.children) != set(theirs.children):
        yield f"groups {set(mine.children) ^ set(theirs.children)}"
    for name in set(mine.children) & set(theirs.children):
        a, b = mine[name].to_dataset(), theirs[name].to_dataset()
        if not a.identical(b):
            yield name
        for key in set(a.variables) & set(b.variables):
            x, y = np.asarray(a[key].values), np.asarray(b[key].values)
            if x.dtype != object and x.tobytes() != y.tobytes():
                yield f"{name}/{key}"


def survive(kills: int, seed: int, folder: Path, workers: int | None = None) -> bool:
    """Whether every study had the bits of the undisturbed one; a line for each, and one on what happened to them all."""
    rng = random.Random(seed)
    torch.set_num_threads(1)
    whole, log = folder / "whole", folder / "log"
    began = time.monotonic()
    if ended(start(whole, 0, log)) != FINISHED:
        print(log.read_text(encoding="utf-8"))
        return False
    seconds = time.monotonic() - began
    if workers:
        began = time.monotonic()
        if ended(start(folder / "by workers", 0, log, workers)) or list(differences(folder / "by workers", whole)):
            print(log.read_text(encoding="utf-8"))
            return False
        seconds = time.monotonic() - began
    killed = number = done = of_workers = 0
    same = True
    while same and (killed < kills or done < number):
        directory = folder / str(done)
        number = done + 1
        child = start(directory, 0.01, log, workers)
        if killed < kills:
            time.sleep(rng.uniform(0, 0.7 * seconds))
            victims = workers_of(child) if workers and rng.random() < 1 / 3 else []
            if victims:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rng.choice(victims), signal.SIGKILL)
                killed, of_workers = killed + 1, of_workers + 1
            else:
                os.kill(child, signal.SIGKILL)
        status = ended(child)
        if status == -signal.SIGKILL:
            killed += 1
            if rng.random() < 0.4 and directory.is_dir():
                with log.open("a", encoding="utf-8") as file:
                    print(f"HARM: {damage(directory, rng)}", file=file)
            continue
        found = [f"exit status {status}"] if status else list(differences(directory, whole))
        same = not found
        done += 1
        print(f"study {done}, after {killed} kills: {', '.join(found) or 'the same bits'}", flush=True)
    said = log.read_text(encoding="utf-8")
    by_workers = f", {of_workers} of them of workers" if workers else ""
    if not same:
        print(said)
    print(
        f"{killed} kills{by_workers}; {done} studies of {seconds:.1f} s; {said.count('going on after step')} times in the middle "
        f"of a pack; {said.count('HARM')} files damaged, {said.count('kept as')} of them kept aside"
    )
    return same


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, help="processes that train packs; none by default")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        sys.exit(not survive(arguments.kills, arguments.seed, Path(scratch), arguments.workers))
