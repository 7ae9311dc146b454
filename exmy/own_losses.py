"""`exmy stability`: anyone's losses in a CSV file, judged by the definitions that studies are judged by."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from rich.table import Table
from rich.text import Text

from exmy.busy import busy
from exmy.console import output
from exmy.outputs import write_text
from exmy.verdict import as_content, sentence, verdict_table
from train import StudyError
from train.own_losses import by_group, history_of_frame, own_stability
from train.seed_cube import seed_grid
from train.stability import DivergenceSettings
from train.verdicts import VerdictSettings, verdict

AT = "--at"  # the option that names the learning rate at which divergence is compared


def run_stability(
    path: Path, columns: dict[str, str | None], settings: DivergenceSettings, entropy: float | None, baseline: str | None,
    json_file: Path | None, asked: VerdictSettings | None = None,
) -> None:  # fmt: skip
    """Print what became of the runs, by group, and the verdict of each where runs have learning rates and seeds.

    StudyError, in a line, where the file can't be read or says too little.
    """
    with busy(f"reading {path.name}"):
        frame, unlogged = read_losses(path, columns)
    try:
        named: dict[str, Any] = dict(columns)
        with busy("judging"), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", UserWarning)
            history = history_of_frame(frame, named.pop("run"), named.pop("step"), named.pop("loss"), **named)
            summary = own_stability(history, settings, entropy, baseline)
            found = by_group(summary, baseline)
            verdicts = own_verdicts(summary, history, str(found.attrs["baseline"]), asked)
    except ValueError as error:
        raise StudyError(f"{path}: {error}") from None
    console = output()
    console.print(group_table(found))
    for of in verdicts:
        console.print(Text(sentence(of, AT)), soft_wrap=True)
        console.print(verdict_table(of))
    said = [f"{of.message}." for of in told if issubclass(of.category, UserWarning)]
    for line in [*notes(found, summary, history, settings, unlogged), *said]:
        console.print(Text(line), soft_wrap=True)
    write_text(json_file, lambda: as_json(found, summary, verdicts))


def own_verdicts(
    summary: xr.Dataset, history: xr.Dataset, baseline: str, asked: VerdictSettings | None = None
) -> list[xr.Dataset]:
    """Each further group against the baseline, as `verdict` has it, two rows each; none without learning rates and seeds.

    All of them share alpha. The first logged loss is the initial one.
    """
    if not {"learning_rate", "seed"} <= set(summary.coords) or len(set(summary["recipe"].values.tolist())) < 2:
        return []
    first = history["train_loss"].isel(step=0, drop=True)
    all_of_them = verdict(seed_grid(summary.assign(initial_loss=first)), baseline, settings=asked)
    return [all_of_them.isel(recipe=[i, -1]) for i in range(all_of_them.sizes["recipe"] - 1)]


def read_losses(path: Path, columns: dict[str, str | None]) -> tuple[pd.DataFrame, int]:
    """The table, and how many rows had an empty loss: those are not logged, while "nan" is a loss that is not a number."""
    try:
        frame = pd.read_csv(path, keep_default_na=False, dtype=str, skipinitialspace=True)
    except OSError as error:
        raise StudyError(
            f"{path}: can't be read ({error.strerror or error}); name a CSV table, a row a logged step"
        ) from None
    except (ValueError, pd.errors.ParserError) as error:
        why = " ".join(str(error).split()).rstrip(".")
        raise StudyError(f"{path}: is no CSV table ({why}); give one with a head, and a row a logged step") from None
    loss = columns["loss"]
    empty = frame[loss].str.strip() == "" if loss in frame.columns else pd.Series(False, index=frame.index)
    frame = frame[~empty].apply(lambda column: column.str.strip())
    of_numbers = {columns[name] for name in ("step", "loss", "learning_rate", "grad_norm")}
    for name in frame.columns:
        if name in of_numbers:
            frame[name] = _numbers_of(frame[name])
        elif name == columns["seed"]:
            frame[name] = _seeds_of(frame[name])
    return frame, int(empty.sum())


def _numbers_of(column: pd.Series[Any]) -> pd.Series[Any]:
    """Numbers where all are, an empty one NaN; else as it stands."""
    try:
        return column.map(lambda word: float(word or "nan"))
    except ValueError:
        return column


def _seeds_of(column: pd.Series[Any]) -> pd.Series[Any]:
    """Whole numbers where all are, so that 10 comes after 9; else as they stand: what is written otherwise is another seed."""
    words = column.tolist()
    return column.map(int) if all(re.fullmatch(r"0|-?[1-9][0-9]{0,17}", word) for word in words) else column


def group_table(found: xr.Dataset) -> Table:
    """A row for each group and learning rate."""
    baseline = found.attrs["baseline"]
    several = len(set(found["group"].values.tolist())) > 1
    shown = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold underline")
    shown.add_column("group", overflow="fold")
    headings = ["lr"] if "learning_rate" in found.coords else []
    headings += ["diverged [95 %]", "final loss (SD), nats/token"]
    if several:
        headings += [f"diverged - {baseline}'s [95 %]", "Holm p", f"loss - {baseline}'s, nats/token [95 %]", "Holm p"]
    for heading in headings:
        shown.add_column(heading, justify="right", overflow="fold")
    for i in range(found.sizes["row"]):
        row = found.isel(row=i)
        cells = [str(row["group"].values)]
        cells += [f"{float(row['learning_rate']):g}"] if "learning_rate" in found.coords else []
        low, high = 100 * float(row["exact_low"]), 100 * float(row["exact_high"])
        cells += [f"{int(row['diverged'])}/{int(row['runs'])} [{low:.0f}–{high:.0f} %]"]
        cells += [
            _number(float(row["loss_mean"]), ".4f")
            + (f" ({float(row['loss_sd']):.4f})" if float(row["finite"]) > 1 else "")
        ]
        if several:
            cells += [_interval(row, "rate_difference", 100, "+.1f", " %"), _number(float(row["p_rate_holm"]), ".3g")]
            cells += [_interval(row, "loss_difference", 1, "+.4f"), _number(float(row["p_loss_holm"]), ".3g")]
        shown.add_row(*cells)
    return shown


def notes(
    found: xr.Dataset, summary: xr.Dataset, history: xr.Dataset, settings: DivergenceSettings, unlogged: int
) -> list[str]:
    """What the table rests on, and what could not be judged."""
    word = str(summary["diverged"].attrs["definition"])
    lines = [f"Diverged means {word}: {summary[word].attrs['source']}."]
    counts = ", ".join(
        f"{name} {int(summary[name].sum())}"
        for name in ("non_finite", "no_progress", "spike", "gap")
        if name in summary
    )
    lines.append(f"Of {summary.sizes['run']} runs, by each definition: {counts}.")
    short = int((history["last_step"] + 1 <= settings.spike_window).sum())
    if short and settings.definition == "spike":
        lines.append(
            f"{short} runs logged at most {settings.spike_window} steps: there, only a loss that is not finite is a spike; "
            "lower --spike-window, or take another --definition."
        )
    how = set(found["how"].values.tolist()) - {""}
    if "paired" in how:
        lines.append(
            "Against the baseline, in pairs of the same seed: Tango's interval and McNemar's test, Student's t; Holm's p."
        )
    elif how:
        lines.append(
            "Against the baseline, unpaired: Newcombe's interval and Boschloo's test, Welch's t; Holm's p. --seed pairs runs."
        )
    if how and not {"learning_rate", "seed"} <= set(summary.coords):
        lines.append(
            "Whether a group is as stable, its window of learning rates, LR sensitivity and break-even speed-up: with "
            "--learning-rate and --seed."
        )
    if unlogged:
        lines.append(f"{unlogged} rows without a loss were left out.")
    return lines


def _interval(row: xr.Dataset, name: str, scale: float, form: str, unit: str = "") -> str:
    value, low, high = (scale * float(row[f"{name}{end}"]) for end in ("", "_low", "_high"))
    if math.isnan(value):
        return "-"
    limits = f" [{low:{form}}, {high:{form}}]" if math.isfinite(low) else ""
    return f"{value:{form}}{unit}{limits}"


def _number(value: float, form: str) -> str:
    return f"{value:{form}}" if math.isfinite(value) else "-"


def as_json(found: xr.Dataset, summary: xr.Dataset, verdicts: Sequence[xr.Dataset] = ()) -> str:
    """Groups, verdicts and runs, for machines; null where there is no number."""

    def rows(of: xr.Dataset, axis: str) -> list[dict[str, Any]]:
        names = [*(str(name) for name in of.coords if of[name].dims == (axis,)), *map(str, of.data_vars)]
        return [{name: _plain(of[name].values[i]) for name in names} for i in range(of.sizes[axis])]

    content = {
        **{str(name): _plain(of) for name, of in found.attrs.items()},
        "groups": rows(found, "row"),
        "verdicts": [as_content(of, AT) for of in verdicts],
        "runs": rows(summary, "run"),
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    plain = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(plain, float) and not math.isfinite(plain) else plain
