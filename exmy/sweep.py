"""`exmy sweep`: train a study, then show what became of it: a table on the terminal, a page and a picture beside the results; or
show what that would take.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from exmy.console import lost_baselines, output, stability_tables
from exmy.data import epochs_seen
from exmy.rang import rang_view
from exmy.report import write_report
from exmy.seeds import seeds_line
from exmy.strategies import findings, findings_view
from train import Study, StudyError, open_study, run_strategy, run_study
from train.adaptive import round_under_way
from train.checkpoint import packs_under_way
from train.estimate import Estimate, estimate, measured_rates, total
from train.hooks import Hook
from train.local import count_workers
from train.own_text import is_path
from train.pack_sizes import read_lowered, read_splits
from train.plan import PlannedPack, counted, describe, pick_device, plan
from train.progress import duration
from train.provenance import device_name
from train.ranks import leads, way_of
from train.rings import told
from train.snapshots import need
from train.store import finished_runs
from train.study_folder import refuse_digest
from train.tensorboard import EventFiles
from train.wandb import WandbRuns
from train.wide_recipes import Way

FIRST_LOOK = {"cpu": "first-look-cpu.toml", "cuda": "first-look-gpu.toml"}
REPORT = "report"


def default_study(device: str) -> Path:
    """The study that comes with exmy for this kind of device."""
    return Path(str(importlib.resources.files("studies") / FIRST_LOOK[pick_device(device).type]))


def run_sweep(
    study: Study, out: Path | str, device: str, *, tensorboard: bool = False, wandb: str | None = None,
    wide: str | None = None, **how: Any,
) -> None:  # fmt: skip
    """Train what is missing in `out`, print the table, write the report. StudyError where that can't be done.

    tensorboard: write event files, of what is there already too. wandb: the project of Weights & Biases that is told. wide: how
    torchrun's ranks share each run; only rank 0 prints and writes. how: `run_study`'s check, executor, workers and ray_address.
    """
    way = shared_way(out, wide, how)
    with contextlib.ExitStack() as stack:
        hooks = _hooks(study, out, tensorboard=tensorboard, wandb=wandb) if leads() else []
        for hook in hooks:
            stack.enter_context(hook)
        if way:
            from train.wide_study import run_wide

            assert isinstance(out, Path)
            if run_wide(study, out, way, device, check=how.get("check", False), hooks=hooks) is None:
                return
            directory, record = out, {}
        elif isinstance(out, Path):
            directory, record = out, run_strategy(study, out, device, hooks=hooks, **how)
        elif study.strategy.kind == "grid":
            directory, record = run_study(study, out, device, hooks=hooks, **how).directory, {}
        else:
            raise StudyError(
                f"strategy {study.strategy.kind!r} keeps its rounds in a directory of this machine: leave --out {out} out, or "
                "name a path that all machines share"
            )
    tree = open_study(directory)
    console = output()
    # A search tries too many rates for a column each; the report has them all.
    for table in stability_tables(tree) if study.strategy.kind != "bisect" else ():
        console.print(table)
    for line in lost_baselines(tree):
        console.print(line, soft_wrap=True)
    for part in findings_view(findings(record) if record else None):
        console.print(part)
    for part in rang_view(told(tree)):
        console.print(part)
    for line in epochs_seen(tree):
        console.print(line, soft_wrap=True)
    page, picture = write_report(directory, directory / REPORT, tree)
    console.print(f"Figure: {picture}", soft_wrap=True)
    console.print(f"Report: {page}", soft_wrap=True)
    console.print(
        f'Results: python -c "from train import open_study; print(open_study({str(directory)!r}))"', soft_wrap=True
    )


def shared_way(out: Path | str, wide: str | None, how: Mapping[str, Any]) -> Way | None:
    """How torchrun's ranks share each run, None without it; StudyError, alike on all ranks, where what else is asked can't be."""
    way = way_of(wide)
    if way and (not isinstance(out, Path) or how.get("executor", "local") != "local" or how.get("workers")):
        raise StudyError(f"{way} shares each run among torchrun's ranks: leave --executor, --workers and URLs out")
    return way


def _hooks(study: Study, out: Path | str, *, tensorboard: bool, wandb: str | None) -> list[Hook]:
    """What was asked for; StudyError, before any work, where its extra is missing."""
    hooks: list[Hook] = []
    if not (tensorboard or wandb):
        return hooks
    if not isinstance(out, Path):
        raise StudyError(
            f"--tensorboard and --wandb take packs from a directory of this machine: leave --out {out} out"
        )
    if tensorboard:
        files = EventFiles(out)
        hooks.append(Hook("TensorBoard", out, lambda: files, found=True))
    if wandb:
        runs = WandbRuns(out, wandb, study.name)
        hooks.append(Hook("Weights & Biases", out, lambda: runs, found=False))
    return hooks


def dry_run_view(study: Study, directory: Path | str, device: str, workers: int | None = None) -> None:
    """What a sweep into `directory` would train here, and about what it takes; nothing is written. StudyError as `run_sweep`."""
    if not isinstance(directory, Path):
        raise StudyError(f"--dry-run looks into a directory of this machine: leave --out {directory} out")
    where = pick_device(device)
    at_once = count_workers(where, workers)
    refuse_digest(directory)
    finished = finished_runs(directory, mend=False) if directory.is_dir() else {}
    study = round_under_way(study, directory, where)
    name, under_way = device_name(where), packs_under_way(directory)
    lowered, splits = read_lowered(directory).get(name), read_splits(directory).get(name)
    packs = plan(study, where, finished, lowered, None, at_once, splits, under_way)
    if packs:
        check_texts_are_there(study)
    at_once = min(at_once, len(packs))
    console = output()
    found = sum(identity in finished for identity in study.identities())
    console.print(
        f"{study.name} on {device_name(where)}: {describe(packs)}; {found} runs found finished", soft_wrap=True
    )
    if study.strategy.kind != "grid":
        console.print(
            f"strategy {study.strategy.kind}: the rounds so far, or the first; the next follow from their results",
            soft_wrap=True,
        )
    console.print(seeds_line(study), soft_wrap=True)
    if not packs:
        return
    rates = measured_rates(where)
    estimates = [estimate(pack, where.type, rates) for pack in packs]
    console.print(_plan_table(packs, estimates))
    whole = total(packs, estimates)
    compiling = f" and {duration(whole.compiling)} of compiling, less where code is cached" if whole.compiling else ""
    beside = f", {at_once} packs at once" if at_once > 1 else ""
    console.print(
        f"about {duration(whole.seconds / at_once)} of training{beside}{compiling}; as a rule within a factor of two",
        soft_wrap=True,
    )
    if at_once > 1:
        whole = whole._replace(memory=whole.memory * (at_once if where.type == "cpu" else 1))
    snapshots = need(study, packs)
    if snapshots.files:
        console.print(
            f"snapshots of {counted(snapshots.runs, 'run')}: {snapshots.files} files, at most {_size(snapshots.bytes)}",
            soft_wrap=True,
        )
        whole = whole._replace(disk=whole.disk + snapshots.bytes)
    above = next(folder for folder in (directory, *directory.absolute().parents) if folder.is_dir())
    console.print(
        f"at most {_size(whole.memory)} of memory at a time; at most {_size(whole.disk)} of files in {directory}, where "
        f"{_size(shutil.disk_usage(above).free)} are free",
        soft_wrap=True,
    )


def check_texts_are_there(study: Study) -> None:
    """StudyError for a text of one's own that is not where the study says: a plan reads none, and a sweep would end at once."""
    for axes in study.blocks:
        for dataset in axes.dataset:
            if is_path(dataset) and not Path(dataset).expanduser().exists():
                raise StudyError(
                    f"{dataset}: no such file or folder; a dataset with a slash or a dot in its name is a path"
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
    if number >= 2**30:
        return f"{number / 2**30:.1f} GiB"
    return f"{max(1, round(number / 2**20))} MiB"  # what is next to nothing is no more than that
