"""`exmy compare`: what every recipe of a study costs against one of them, on the terminal, as JSON, a picture and a page."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from exmy.busy import busy
from exmy.compare_figure import compare_figure
from exmy.compare_page import adjustment, compare_page, interval_rule, notes, p_value, pairs, signed
from exmy.console import output
from exmy.costs import Comparison, Cost, Panel, compare
from exmy.grids import SUFFIXES
from exmy.outputs import write_whole
from train import StudyError, open_study
from train.store import STUDY_FILE
from train.study_file import read_study

FIELDS = {
    "validation": "final validation loss, nats/token, and its difference from the baseline's",
    "training": "final smoothed training loss, nats/token, and its difference from the baseline's",
    "mean, sd": "over the runs of the recipe whose loss is finite; sd with n - 1",
    "differences": "recipe - baseline of each pair of runs that differ in nothing but the recipe",
    "difference": "mean of those, Student's 95 % interval low..high, two-sided p, and p_holm adjusted for all rows of the study",
    "lost": "runs whose final loss is not finite",
    "unpaired": "runs without a finished run of the baseline",
    "partner_lost": "runs whose run of the baseline has a loss that is not finite",
}


def run_compare(
    directory: Path, baseline: str | None, page: Path | None, figure: Path | None, json_file: Path | None
) -> None:
    """Print the table, and write what is asked for. StudyError where there is nothing to compare or a file can't be written."""
    if figure is not None and figure.suffix.lower() not in SUFFIXES:
        raise StudyError(
            f"{figure}: the picture's name must end in {', '.join(SUFFIXES)}, got {figure.suffix or 'none'!r}"
        )
    with busy("reading runs"):
        tree = open_study(directory)
    with busy("comparing recipes"):
        comparison = compare(tree, baseline)
    console = output()
    for panel in comparison.panels():
        console.print(comparison_table(comparison, panel))
    rule = f"± is half of the 95 % interval. {interval_rule()} {adjustment(comparison.comparisons)}"
    for line in (rule, *notes(comparison)):
        console.print(Text(line))
    writers: dict[Path, Callable[[Path], object]] = {}
    if json_file is not None:
        writers[json_file] = lambda aside: aside.write_text(as_json(comparison), encoding="utf-8")
    if figure is not None:
        picture = figure.suffix[1:].lower()
        writers[figure] = lambda aside: compare_figure(comparison, aside, picture)
    if page is not None:
        text = compare_page(comparison, tree, read_study(directory / STUDY_FILE), directory, page, figure)
        writers[page] = lambda aside: aside.write_text(text, encoding="utf-8")
    for path, write in writers.items():
        write_whole(path, write)
        console.print(Text(str(path)), soft_wrap=True)


def comparison_table(comparison: Comparison, panel: Panel) -> Table:
    """One learning rate's recipes, in 80 columns."""
    table = Table(
        title=f"{comparison.name}, {panel.label}: difference from {comparison.baseline}, nats/token",
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        title_justify="left",
        header_style="bold underline",
    )
    table.add_column("recipe", overflow="fold")
    for heading in ("val.\nloss", "difference", "Holm p", "train\nloss", "difference", "pairs", "div"):
        table.add_column(heading, justify="right", vertical="bottom")
    if panel.baseline is not None:
        own = panel.baseline
        table.add_row(
            own.recipe, f"{own.validation.mean:.3f}", f"SD {own.validation.sd:.4f}", "", f"{own.training.mean:.3f}",
            f"SD {own.training.sd:.4f}", "", f"{len(own.diverged)}/{len(own.runs)}", style="bold",
        )  # fmt: skip
    for row in panel.rows:
        table.add_row(
            row.recipe, _loss(row.validation), _difference(row.validation), p_value(row.validation.difference.p_holm),
            _loss(row.training), _difference(row.training), pairs(row),
            Text(f"{len(row.diverged)}/{len(row.runs)}", style="red" if row.diverged else ""),
        )  # fmt: skip
    return table


def _loss(cost: Cost) -> str:
    return f"{cost.mean:.3f}" if cost.finite else "-"


def _difference(cost: Cost) -> Text:
    found = cost.difference
    if not math.isfinite(found.low):
        return Text(signed(found.mean))
    apart = found.low > 0 or found.high < 0
    return Text(f"{signed(found.mean)} ±{(found.high - found.low) / 2:.4f}", style="yellow" if apart else "")


def as_json(comparison: Comparison) -> str:
    """All numbers, with what the fields mean; null where there is none."""
    content = {
        "study": comparison.name, "baseline": comparison.baseline, "diverged": comparison.definition,
        "runs_finished": comparison.finished, "runs_missing": comparison.missing, "comparisons": comparison.comparisons,
        "fields": FIELDS, "rows": [_strict(asdict(row)) for row in comparison.rows],
    }  # fmt: skip
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _strict(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _strict(value) for key, value in content.items()}
    return None if isinstance(content, float) and not math.isfinite(content) else content
