"""`exmy sweep`: train a study, then show what became of it: a table on the terminal, a page and a picture beside the results."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from exmy.console import output, stability_tables
from exmy.data import epochs_seen
from exmy.report import write_report
from train import Study, open_study, run_study
from train.plan import pick_device

FIRST_LOOK = {"cpu": "first-look-cpu.toml", "cuda": "first-look-gpu.toml"}
REPORT = "report"


def default_study(device: str) -> Path:
    """The study that comes with exmy for this kind of device."""
    return Path(str(importlib.resources.files("studies") / FIRST_LOOK[pick_device(device).type]))


def run_sweep(study: Study, directory: Path, device: str) -> None:
    """Train what is missing in `directory`, print the table, write the report. StudyError where that can't be done."""
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
