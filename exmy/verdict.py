"""`exmy verdict`: is a format as stable as the baseline? A sentence, and a table with intervals; for each text and model.

Studies of the same question, such as the same design with other seeds, are taken together; a run that is in several counts once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from rich.table import Table
from rich.text import Text

from exmy.busy import busy
from exmy.console import output
from exmy.groups import groups
from exmy.outputs import write_text
from train import StudyError, open_study
from train.seed_cube import crossed_words, seed_grid, study_runs
from train.verdicts import HOLDS, VARIABLES, VerdictSettings, verdict

ABSENT = "-"  # a coordinate that a study has no axis for
KEPT = ("diverged", "final_loss", "initial_loss")


def run_verdict(
    recipe: str, directories: Sequence[Path], baseline: str | None, settings: VerdictSettings, json_file: Path | None
) -> bool:
    """Print the verdict of each group of runs; whether it holds in all: as stable as the baseline, or more."""
    with busy("reading runs"):
        runs, named, definition = runs_together(directories)
    baseline = named if baseline is None else baseline
    if recipe == baseline:
        raise StudyError(f"{recipe} is the baseline itself: name another recipe, or another --baseline")
    absent = [name for name in (recipe, baseline) if name not in runs["recipe"].values]
    if absent:
        there = ", ".join(dict.fromkeys(runs["recipe"].values.astype(str).tolist()))
        raise StudyError(f"{absent[0]!r} has no finished run here; there are {there}")
    with busy("judging"):
        found = _of_groups(runs, recipe, baseline, settings)
    if not found:
        raise StudyError(f"{recipe} and {baseline} share no text and model: nothing holds the one against the other")
    console = output()
    for label, of in found:
        if label:
            console.print(Text(f"{label}:"))
        console.print(Text(sentence(of)), soft_wrap=True)
        console.print(verdict_table(of))
    shared = crossed_words(runs)
    window = (
        f"Stable window: the widest range of rates at which at most {100 * settings.allowed:g} % of runs diverge and the loss is "
        f"within {settings.loss_margin:g} nats/token of the recipe's best; an octave is a factor of two. Final loss: each at its "
        "best rate, with an interval that covers every rate that may be the best. Formulas: docs/stability.md."
    )
    for line in (f"Diverged means {definition}.", window, *([shared] if shared else [])):
        console.print(Text(line), soft_wrap=True)
    write_text(json_file, lambda: as_json(found, definition))
    return all(str(of["state"].values[0]) in HOLDS for _, of in found)


def _of_groups(runs: xr.Dataset, recipe: str, baseline: str, settings: VerdictSettings) -> list[tuple[str, xr.Dataset]]:
    """The verdict of each group that has both, with its label."""
    found = []
    for group in groups(runs):
        part = runs.isel(run=group.runs)
        if {recipe, baseline} <= set(part["recipe"].values.tolist()):
            try:
                found.append((group.label, verdict(seed_grid(part), baseline, [recipe], settings)))
            except ValueError as error:
                raise StudyError(f"{group.label}: {error}" if group.label else str(error)) from None
    return found


def runs_together(directories: Sequence[Path]) -> tuple[xr.Dataset, str, str]:
    """The runs of all studies, the baseline they name, and what diverged means there; StudyError where those are not the same."""
    trees = [open_study(directory) for directory in directories]
    parts = []
    said: dict[str, set[str]] = {"baseline": set(), "definition of diverged": set()}
    for tree in trees:
        runs = study_runs(tree)
        word = str(runs["diverged"].attrs["definition"])
        said["baseline"].add(str(tree.attrs["baseline"]))
        said["definition of diverged"].add(f"{word}: {runs[word].attrs['source']}")
        parts.append(runs[list(KEPT)])
    for what, values in said.items():
        if len(values) > 1:
            raise StudyError(f"the studies differ in their {what} ({'; '.join(sorted(values))}): judge them apart")
    names = {str(name): None for part in parts for name in part.coords if part[name].dims == ("run",)}
    alike = []
    for part in parts:
        absent = {
            name: ("run", np.full(part.sizes["run"], ABSENT, object)) for name in names if name not in part.coords
        }
        kept = part.drop_vars([name for name in part.coords if name not in names]).assign_coords(absent)
        alike.append(kept)
    runs = xr.concat(alike, "run", combine_attrs="override") if len(alike) > 1 else alike[0]
    return (
        runs.isel(run=~runs.get_index("run").duplicated()),
        said["baseline"].pop(),
        said["definition of diverged"].pop(),
    )


def sentence(of: xr.Dataset, option: str = "--learning-rate") -> str:
    """The verdict of the first row, in a sentence, with what it rests on and what it would take where it is open.

    option: by which one says at which learning rate divergence is compared.
    """
    row = {str(name): of[name].values[0] for name in of.data_vars}
    recipe, baseline, margin = str(of["recipe"].values[0]), of.attrs["baseline"], 100 * of.attrs["margin"]
    n, b, c = int(row["pairs"]), int(row["only_recipe"]), int(row["only_baseline"])
    if not math.isfinite(row["learning_rate"]):
        return (
            f"Whether {recipe} is as stable as {baseline} is undecided: more than half of {baseline}'s runs diverged at each "
            f"learning rate, so there is none to compare at; name one with {option}."
        )
    where = f"at learning rate {row['learning_rate']:g}"
    counts = f"of {n} {'pair' if n == 1 else 'pairs'} of seeds {recipe} alone diverged in {b}, {baseline} alone in {c}"
    if not n:
        why = "they share no seed there" if row["runs"] else f"{recipe} was not trained there"
        return (
            f"Whether {recipe} is as stable as {baseline} {where}, within {margin:g} %, is undecided: {why}; "
            f"train {recipe} on {baseline}'s seeds at that rate, or name another with {option}."
        )
    state = str(row["state"])
    if state == "as stable":
        return f"{recipe} is as stable as {baseline} {where}, within {margin:g} % (p = {_p(row['p_equivalent_holm'])}): {counts}."
    if state in ("less stable", "more stable"):
        return f"{recipe} is {state} than {baseline} {where} (p = {_p(row['p_differ_holm'])}): {counts}."
    needed = row["pairs_needed"]
    more = (
        f"if that is the truth, about {needed:.0f} pairs in all would decide" if needed > n
        else "as many would decide with a chance of 80 %, and did not" if math.isfinite(needed)
        else "more than 1,000 pairs would be needed to decide"
    )  # fmt: skip
    return f"Whether {recipe} is as stable as {baseline} {where}, within {margin:g} %, is undecided: {counts}; {more}."


def _p(value: float) -> str:
    return f"{value:.2g}" if value >= 0.0001 else f"{value:.0e}"


def verdict_table(of: xr.Dataset) -> Table:
    """What was measured, a row each: the recipe's, the baseline's, and the difference with its interval."""
    recipe, baseline = map(str, of["recipe"].values)
    row, base = ({str(name): of[name].values[i] for name in of.data_vars} for i in (0, 1))
    percent = f"{100 * of.attrs['confidence']:g} %"
    shown = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold underline", title_justify="left")
    shown.add_column("measured", overflow="fold")
    for heading in (recipe, baseline, f"difference [{percent} interval]"):
        shown.add_column(heading, justify="right", overflow="fold")
    for name, *cells in measured_rows(row, base):
        shown.add_row(name, *cells)
    return shown


def measured_rows(row: dict[str, Any], base: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """What was measured, in words: what it is, the recipe's, the baseline's, and the difference with its interval."""

    def both(write: Any) -> tuple[str, str]:
        return write(row), write(base)

    def share(of: dict[str, Any]) -> str:
        if not of["runs"]:
            return "no runs"
        return f"{of['diverged']}/{of['runs']} [{_number(100 * of['rate_low'], '.0f')}–{_number(100 * of['rate_high'], '.0f')} %]"

    apart = tuple(100 * end for end in _ends(row, "rate_difference"))
    yield "diverged", *both(share), _interval(apart[0], apart[1], apart[2], "+.1f", " %")
    yield "stable window, octaves", *both(_window), _interval(*_ends(row, "window_difference"), "+.1f")
    if "sensitivity" in row:
        yield (
            "LR sensitivity, nats/token",
            *both(lambda of: _interval(*_ends(of, "sensitivity"), ".3f")),
            _interval(*_ends(row, "sensitivity_difference"), "+.3f"),
        )
    yield "best learning rate", *both(lambda of: _number(of["optimum"], ".3g")), _shift(row)
    pairs = f"final loss, nats/token ({int(row['loss_pairs'])} pairs)"
    yield pairs, "", "", _interval(*_ends(row, "loss_penalty"), "+.4f")
    yield "its spread over seeds, nats/token", *both(lambda of: _interval(*_ends(of, "sd"), ".4f")), ""
    yield "break-even speed-up", _interval(*_ends(row, "break_even"), ".2f", " ×"), "", ""


def _ends(of: dict[str, Any], name: str) -> tuple[float, float, float]:
    return of[name], of[f"{name}_low"], of[f"{name}_high"]


def _window(of: dict[str, Any]) -> str:
    if not math.isfinite(of["window"]):
        return "none"
    censored = of["window_censored_below"] or of["window_censored_above"]
    return (
        f"{'at least ' if censored else ''}{of['window']:.1f}: {of['window_lowest']:.3g} to {of['window_highest']:.3g}"
    )


def _shift(row: dict[str, Any]) -> str:
    text = _interval(*_ends(row, "optimum_shift"), "+.1f", " octaves")
    return f"{text}, at the grid's end" if row["optimum_censored"] else text


def _interval(value: float, low: float, high: float, form: str, unit: str = "") -> str:
    if math.isnan(value):
        return "-"
    limits = "" if math.isnan(low) or math.isnan(high) else f" [{_number(low, form)}, {_number(high, form)}]"
    return f"{_number(value, form)}{unit}{limits}"


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else "∞" if value == math.inf else "-∞" if value == -math.inf else f"{value:{form}}"


def as_json(found: Sequence[tuple[str, xr.Dataset]], definition: str) -> str:
    """Every number of every group, and what it is; null where there is none, "inf" where it has no bound."""
    content = {
        "diverged": definition,
        "fields": {name: f"{long_name} ({units}): {source}" for name, (units, long_name, source) in VARIABLES.items()},
        "groups": [{"group": label, **as_content(of)} for label, of in found],
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def as_content(of: xr.Dataset, option: str = "--learning-rate") -> dict[str, Any]:
    """A verdict's sentence, settings and rows in plain values."""
    return {
        "sentence": sentence(of, option), "holds": str(of["state"].values[0]) in HOLDS,
        "settings": {str(name): _plain(value) for name, value in of.attrs.items()},
        "rows": [
            {"recipe": str(recipe)} | {str(name): _plain(of[name].values[i]) for name in of.data_vars}
            for i, recipe in enumerate(of["recipe"].values)
        ],
    }  # fmt: skip


def _plain(value: Any) -> Any:
    plain = value.item() if isinstance(value, np.generic) else value
    if isinstance(plain, float) and not math.isfinite(plain):
        return None if math.isnan(plain) else "inf" if plain > 0 else "-inf"
    return plain
