"""`exmy sweep`: train a study, then show what became of it: a table on the terminal, a page and a picture beside the results; or
show what that would take.
"""

from __future__ import annotations

import importlib.resources
import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from exmy.console import output, stability_tables
from exmy.data import epochs_seen
from exmy.report import write_report
from train import Study, open_study, run_study
from train.estimate import Estimate, estimate, measured_rates, total
from train.plan import PlannedPack, describe, pick_device, plan
from train.progress import duration
from train.provenance import device_name
from train.ranks import way_of
from train.store import finished_runs

FIRST_LOOK = {"cpu": "first-look-cpu.toml", "cuda": "first-look-gpu.toml"}
REPORT = "report"


def default_study(device: str) -> Path:
    """The study that comes with exmy for this kind of device."""
    return Path(str(importlib.resources.files("studies") / FIRST_LOOK[pick_device(device).type]))


def run_sweep(study: Study, directory: Path, device: str, wide: str | None = None) -> None:
    """Train what is missing in `directory`, print the table, write the report. StudyError where that can't be done.

    wide: how torchrun's ranks share each run; only rank 0 prints and writes.
    """
    if way := way_of(wide):
        from train.wide_study import run_wide

        if run_wide(study, directory, way, device) is None:
            return
    else:
        run_study(study, directory, device)
    tree = open_study(directory)
    console = output()
    for table in stability_tables(tree):
        console.print(table)
    for line in epochs_seen(tree):
        console.print(line, soft_wrap=True)
    page, picture = write_report(directory, directory / REPORT, tree)
    console.print(f"Figure: {picture}", soft_wrap=True)
    console.print(f"Report: {page}", soft_wrap=True)
    console.print(
        f'Results: python -c "from train import open_study; print(open_study({str(directory)!r}))"', soft_wrap=True
    )


def dry_run_view(study: Study, directory: Path, device: str) -> None:
    """What a sweep into `directory` would train, and about what it would take; nothing is written. StudyError as `run_sweep`."""
    where = pick_device(device)
    finished = finished_runs(directory, mend=False) if directory.is_dir() else {}
    packs = plan(study, where, finished)
    console = output()
    found = sum(run.identity in finished for run in study.runs())
    console.print(
        f"{study.name} on {device_name(where)}: {describe(packs)}; {found} runs found finished", soft_wrap=True
    )
    if not packs:
        return
    rates = measured_rates(where)
    estimates = [estimate(pack, where.type, rates) for pack in packs]
    console.print(_plan_table(packs, estimates))
    whole = total(packs, estimates)
    compiling = f" and {duration(whole.compiling)} of compiling, less where code is cached" if whole.compiling else ""
    console.print(
        f"about {duration(whole.seconds)} of training{compiling}; as a rule within a factor of two", soft_wrap=True
    )
    above = next(folder for folder in (directory, *directory.absolute().parents) if folder.is_dir())
    console.print(
        f"at most {_size(whole.memory)} of memory at a time; at most {_size(whole.disk)} of files in {directory}, where "
        f"{_size(shutil.disk_usage(above).free)} are free",
        soft_wrap=True,
    )


def _plan_table(packs: Sequence[PlannedPack], estimates: Sequence[Estimate]) -> Table:
    """A row a program."""
    rows: dict[object, list[tuple[PlannedPack, Estimate]]] = {}
    for pack, of in zip(packs, estimates, strict=True):
        rows.setdefault(pack.program, []).append((pack, of))
    shown = Table(title="programs: runs that train as one, in packs", show_lines=True)
    for heading in ("recipes", "model, text", "runs", "packs", "R", "memory", "time"):
        shown.add_column(heading, overflow="fold", justify="left" if heading in ("recipes", "model, text") else "right")
    for of_program in rows.values():
        runs = [run for pack, _ in of_program for run in pack.runs]
        first, seconds = runs[0], sum(of.seconds for _, of in of_program)
        shown.add_row(
            ", ".join(dict.fromkeys(run.recipe.name for run in runs)),
            f"{first.model.label}, {first.dataset}",
            str(len(runs)),
            str(len(of_program)),
            str(of_program[0][0].size),
            _size(max(of.memory for _, of in of_program)),
            duration(seconds),
        )
    return shown


def _size(number: int) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"
