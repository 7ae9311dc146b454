"""`exmy alarms`: which of a study's signals, sharpness among them, warned before its runs diverged; and how early."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from rich.table import Table
from rich.text import Text

from exmy.busy import busy
from exmy.console import output
from exmy.outputs import write_text
from train import StudyError, open_study
from train.study_alarms import VARIABLES, study_warnings

ONSETS = {
    "non_finite": "the first loss or gradient norm that is not finite",
    "spike": "the first spike",
}
NO_RETURN = "the step after the last one whose loss was within 0.1 nats/token of the lowest so far"


def run_alarms(directory: Path, horizon: float, false_alarms: float, json_file: Path | None) -> None:
    """Print every signal's worth. StudyError, in a line, where the study or the numbers are none."""
    if not horizon > 0:
        raise StudyError(f"--horizon must be above 0 steps, got {horizon:g}")
    if not 0 < false_alarms < 1:
        raise StudyError(f"--false-alarms must be a rate per run between 0 and 1, got {false_alarms:g}")
    with busy("reading runs"):
        tree = open_study(directory)
    with busy("judging signals", 1) as shown:
        found = study_warnings(tree, horizon, false_alarms, on_progress=shown)
    console = output()
    if found.attrs["diverged"]:  # else it has nothing but false alarms
        console.print(alarms_table(found))
    for line in notes(found):
        console.print(Text(line), soft_wrap=True)
    write_text(json_file, lambda: as_json(found))


def alarms_table(found: xr.Dataset) -> Table:
    """A row a signal."""
    percent = f"[{100 * found.attrs['confidence']:g} %]"
    shown = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold underline")
    shown.add_column("signal", overflow="fold")
    for heading in (
        f"AUROC {percent}", f"average precision {percent}", "by chance", f"adds to AUROC {percent}", "rang in time",
        "too early", "false alarms", "median lead, steps",
    ):  # fmt: skip
        shown.add_column(heading, justify="right", overflow="fold")
    for i, name in enumerate(found["signal"].values.tolist()):
        row = {str(of): float(found[of].values[i]) for of in found.data_vars}
        judged = int(row["diverged_judged"])
        shown.add_row(
            name, _interval(row, "auroc", ".2f"), _interval(row, "average_precision", ".2f"),
            _number(row["average_precision_chance"], ".2f"), _interval(row, "gain", "+.2f"),
            *(f"{round(row[of] * judged)}/{judged}" if judged else "-" for of in ("detected", "early")),
            _number(100 * row["false_alarm_rate"], ".0f", " %"),
            _number(row["median_lead"], ".0f"),
        )  # fmt: skip
    return shown


def notes(found: xr.Dataset) -> list[str]:
    """What the table rests on, and what could not be judged."""
    attrs = found.attrs
    definition = str(attrs["definition"])
    lines = [
        f"{attrs['diverged']} of {attrs['runs']} runs diverged ({definition}); the onset is {ONSETS.get(definition, NO_RETURN)}.",
        f"Scores are within recipe, learning rate and step, for an onset within {attrs['horizon']:g} steps; 0.5 is chance, and "
        "intervals are over seeds. What a signal adds is to learning rate, step, loss and gradient norm.",
        f"Alarms ring falsely in at most {100 * attrs['false_alarms']:g} % of runs that do not diverge; rang in time: of the "
        "diverged runs that could be judged, those whose first ring came within the horizon before the onset; too early: sooner.",
    ]
    if not attrs["diverged"]:
        lines.append("No run diverged: there was nothing to warn of.")
    elif attrs["diverged"] == attrs["runs"]:
        lines.append("Every run diverged: no signal can be told from the study's end.")
    elif not found["informative_strata"].values.any():
        lines.append(
            "At no recipe, learning rate and step did one run diverge within the horizon and another not: nothing can be told."
        )
    unjudged = int(found["not_judged"].max()) if found.sizes["signal"] else 0
    if unjudged:
        least = math.ceil(round(1 / attrs["false_alarms"], 9)) - 1
        lines.append(
            f"Up to {unjudged} runs of {attrs['runs']} have no threshold: that takes {least} runs of the same recipe and "
            "learning rate, of other seeds, that did not diverge."
        )
    return lines


def _interval(row: dict[str, float], name: str, form: str) -> str:
    value, low, high = row[name], row[f"{name}_low"], row[f"{name}_high"]
    if math.isnan(value):
        return "-"
    return f"{value:{form}}" + ("" if math.isnan(low) else f" [{low:{form}}, {high:{form}}]")


def _number(value: float, form: str, unit: str = "") -> str:
    return f"{value:{form}}{unit}" if math.isfinite(value) else "-"


def as_json(found: xr.Dataset) -> str:
    """Every number of every signal, and what it is; null where there is none."""

    def plain(value: Any) -> Any:
        value = value.item() if isinstance(value, np.generic) else value
        return None if isinstance(value, float) and not math.isfinite(value) else value

    content = {
        **{str(name): plain(of) for name, of in found.attrs.items()},
        "fields": {name: f"{of['long_name']} ({of['units']})" for name, of in VARIABLES.items()},
        "signals": [
            {"signal": name} | {str(of): plain(found[of].values[i]) for of in found.data_vars}
            for i, name in enumerate(found["signal"].values.tolist())
        ],
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"
