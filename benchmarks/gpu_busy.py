"""How much of the time of a study the GPU works: the part `busy` of `sweeps`, whose docstring says what is counted."""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.sweep_sizes import CUDA, Size, make_study, passes_of, seconds, synchronize, warm
from train import run_study
from train.pack import Pack
from train.plan import PlannedPack, pick_device, plan
from train.program import PackResult, Program, Progress
from train.streams import load_texts

WHOLE = ("until_second_report", "steady", "until_the_next")  # of a study's time


class Marks:
    """An observer that writes down when each pack begins, reports and ends."""

    def __init__(self) -> None:
        self._packs: dict[str, dict[str, float]] = {}

    def planned(self, packs: list[PlannedPack], finished: int, device: str) -> None:
        """Nothing is known of any yet."""

    def pack_started(self, pack: PlannedPack) -> None:
        """A pack begins."""
        self._packs[pack.hash] = {"started": time.perf_counter(), "reports": 0.0}

    def pack_progress(self, pack: PlannedPack, progress: Progress) -> None:  # noqa: ARG002
        """Ten steps were made."""
        marks, now = self._packs[pack.hash], time.perf_counter()
        marks["reports"] += 1
        if marks["reports"] <= 2:
            marks["second report"] = now
        marks["last report"] = now

    def pack_finished(self, pack: PlannedPack, result: PackResult) -> None:  # noqa: ARG002
        """A pack's file is there."""
        self._packs[pack.hash]["finished"] = time.perf_counter()

    def gaps(self) -> list[dict[str, float]]:
        """Of each pack, seconds until its second report, of the steps between that and its last, and from there until the next
        one begins, or the last one's file is there; and how long its file took to be there, whatever trained meanwhile.
        """
        marks = list(self._packs.values())
        ends = [m["started"] for m in marks[1:]] + [marks[-1]["finished"]]
        return [
            {
                "until_second_report": m["second report"] - m["started"],
                "steady": m["last report"] - m["second report"],
                "until_the_next": end - m["last report"],
                "last_report_to_file": m["finished"] - m["last report"],
            }
            for m, end in zip(marks, ends, strict=True)
        ]


@contextlib.contextmanager
def utilisation() -> Iterator[list[int]]:
    """What `nvidia-smi` says of the GPU's share of busy time, five times a second, in percent; empty where it says nothing."""
    said: list[int] = []
    command = ["nvidia-smi", "-i", "0", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "200"]
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            yield said
            process.terminate()
            said += [int(line) for line in process.communicate()[0].split() if line.isdigit()]
    except FileNotFoundError:
        yield said


def counts_of(program: Program) -> dict[str, int]:
    """How often a pack makes each kind of pass."""
    watched = len(program.signal_steps)
    return {
        "step": program.steps - watched, "watched step": watched, "evaluation": len(program.evaluation_steps),
        "probe": len(program.probe_steps),
    }  # fmt: skip


def kernel_seconds(work: Callable[[], object], calls: int) -> float | None:
    """Of a call, the mean time in which a kernel ran: the union of their intervals; None without a GPU."""
    if not CUDA:
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(calls):
            work()
        synchronize()
    spans = sorted(
        (e.time_range.start, e.time_range.end)
        for e in profiled.events()
        if e.device_type.name == "CUDA" and not e.name.startswith(("Memcpy", "Memset", "ProfilerStep"))
    )
    total, end = 0.0, 0.0
    for start, stop in spans:
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total / 1e6 / calls


def busy(size: Size, scratch: Path) -> dict[str, Any]:
    """How much of the time of a study the GPU works."""
    model = next(iter(size.models))
    study = make_study(size, model, size.busy_steps, size.axes)
    device = pick_device("auto")
    packs = plan(study, device)
    text = load_texts(study)[packs[0].program.dataset]
    pack = Pack(packs[0].program, packs[0].slots, text, device)
    warm(pack)
    del pack
    marks = Marks()
    with utilisation() as percent:
        wall = seconds(lambda: run_study(study, scratch / "busy", observer=marks))
    pack = Pack(packs[0].program, packs[0].slots, text, device)
    warm(pack)
    kinds: dict[str, dict[str, Any]] = {}
    for name, work in passes_of(pack).items():
        for _ in range(3):
            work()
        calls = 10 if name == "step" else 3
        whole = [seconds(work) for _ in range(calls)]
        kinds[name] = {
            "a_pack": counts_of(packs[0].program)[name], "seconds": statistics.median(whole),
            "kernel_seconds": kernel_seconds(work, calls),
        }  # fmt: skip
    by_kernels = [k["a_pack"] * k["kernel_seconds"] for k in kinds.values() if k["kernel_seconds"] is not None]
    kernels = len(packs) * sum(by_kernels) if by_kernels else None
    gaps = marks.gaps()
    return {
        "runs": sum(len(p.runs) for p in packs), "packs": len(packs), "pack_size": packs[0].size,
        "steps": size.busy_steps, "model": model, "wall_seconds": wall, "kernel_seconds": kernels,
        "busy_share": None if kernels is None else kernels / wall, "kinds": kinds, "by_pack": gaps,
        "outside_packs_seconds": wall - sum(sum(gap[k] for k in WHOLE) for gap in gaps),
        "nvidia_smi_percent": {"mean": statistics.fmean(percent), "samples": len(percent)} if percent else None,
    }  # fmt: skip
