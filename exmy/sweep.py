"""`exmy sweep`: train a study, then show what became of it: a table on the terminal and a picture beside the results."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

import xarray as xr

from exmy.console import output, stability_tables
from exmy.data import epochs_seen
from exmy.figure import study_figure
from train import RichObserver, Study, StudyError, open_study, run_study
from train.plan import pick_device
from train.streams import load_texts

FIRST_LOOK = {"cpu": "first-look-cpu.toml", "cuda": "first-look-gpu.toml"}
REPORT = Path("report") / "study.png"


def default_study(device: str) -> Path:
    """The study that comes with exmy for this kind of device."""
    return Path(str(importlib.resources.files("studies") / FIRST_LOOK[pick_device(device).type]))


def run_sweep(study: Study, directory: Path, device: str) -> None:
    """Train what is missing in `directory`, print the table, draw the figure. StudyError where that can't be done."""
    load_texts(study)  # into the cache, before there is a display: it may take a minute, and shows that itself
    with RichObserver() as observer:
        run_study(study, directory, device, observer)
    tree = open_study(directory)
    console = output()
    for table in stability_tables(tree):
        console.print(table)
    for line in epochs_seen(tree):
        console.print(line, soft_wrap=True)
    picture = directory / REPORT
    _draw(tree, picture)
    console.print(f"Figure: {picture}", soft_wrap=True)
    console.print(
        f'Results: python -c "from train import open_study; print(open_study({str(directory)!r}))"', soft_wrap=True
    )


def _draw(tree: xr.DataTree, picture: Path) -> None:
    try:
        picture.parent.mkdir(parents=True, exist_ok=True)
        study_figure(tree, picture)
    except OSError as error:
        raise StudyError(f"{picture}: can't be written ({error.strerror}); every run is finished and kept") from None
