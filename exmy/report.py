"""`exmy report`: a study as one HTML page that needs nothing else: no network, no server, no files beside it.

The page is a template (`report.html.j2`) around three kinds of data, each a block of JSON in the page: the stability table, the
figures, as plotly reads them (`charts`), and plotly itself, once. The script draws a figure when it comes into view, so a page of
many groups and learning rates opens as fast as one of few.
"""

from __future__ import annotations

import datetime
import importlib.resources
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import xarray as xr
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from exmy import charts
from exmy.figure import reference_rate, study_figure
from exmy.groups import Group, groups
from exmy.looks import Look, in_order, recipe_looks
from exmy.strategies import Findings, findings_of
from exmy.version import __version__
from train import Study, StudyError, open_study, stability_table
from train.durable import atomically
from train.store import PACKS, study_of

PAGE, PICTURE = "index.html", "study.png"
TEMPLATE = "report.html.j2"
SHAPES = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "h": "⬢", "*": "★"}
PROVENANCE = {
    "device": "device", "dataset": "text", "dataset_source": "text's source", "dataset_sha256": "text's SHA-256",
    "tokenizer": "tokenizer", "vocabulary": "tokens of its vocabulary", "corruption": "corrupted on purpose",
    "unigram_entropy": "text's unigram entropy (nats/token)", "parameters_per_run": "parameters of a run",
    "tokens_per_step": "tokens of a run's step", "pack_size": "pack size R", "packs": "packs", "seconds": "training time (s)",
    "seconds_first_step": "of it first steps, with compiling (s)", "git_commit": "commit", "study_hash": "study's hash",
    "version_exmy": "exmy", "version_torch": "PyTorch", "cuda": "CUDA", "version_python": "Python", "version_numpy": "NumPy",
    "version_xarray": "xarray", "cpu_threads": "CPU threads",
}  # fmt: skip


def write_report(directory: Path, out: Path, tree: xr.DataTree | None = None) -> list[Path]:
    """Write the page, and the figure where a run is finished, into the folder `out`; the paths written, the page first.

    tree: what `open_study(directory)` gives, from a caller who has it already; None to open it.
    StudyError where `directory` holds no study or `out` can't be written.
    """
    study = study_of(directory)
    if tree is None and any((directory / PACKS).glob("*.nc")):
        tree = open_study(directory)
    page = render(study, tree, findings_of(directory))
    written = [out / PAGE]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with atomically(out / PAGE) as aside:
            aside.write_text(page, encoding="utf-8")
        if tree is not None:
            with atomically(out / PICTURE) as aside:
                study_figure(tree, aside)
            written.append(out / PICTURE)
    except OSError as error:
        raise StudyError(
            f"{out}: can't write there ({error.strerror}); make room or name another folder with --out; the results are kept"
        ) from None
    return written


def render(study: Study, tree: xr.DataTree | None, strategy: Findings | None = None) -> str:
    """The whole page; tree: as `open_study` gives it, or None where no run is finished; strategy: what it found."""
    parts: dict[str, Any] = {
        "sections": [],
        "looks": [],
        "figures": {},
        "tables": [],
        "provenance": {},
        "definition": "",
    }
    if tree is not None:
        parts |= _contents(tree)
    template = importlib.resources.files("exmy").joinpath(TEMPLATE).read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        name=study.name,
        baseline=study.reference,
        planned=sum(1 for _ in study.runs()),
        finished=0 if tree is None else tree["summary"].sizes["run"],
        toml=study.to_toml(),
        version=__version__,
        made=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        plotly=Markup(get_plotlyjs()),  # plotly's own file: nothing a user wrote
        json=in_page,
        strategy=strategy,
        **parts,
    )


def _contents(tree: xr.DataTree) -> dict[str, Any]:
    summary = tree["summary"].to_dataset()
    looks = recipe_looks(in_order(summary["recipe"]), str(tree.attrs["baseline"]))
    drawn = charts.detail(summary.sizes["run"])
    figures: dict[str, charts.Chart] = {}
    sections = [_section(tree, group, number, looks, drawn, figures) for number, group in enumerate(groups(summary), 1)]
    definition = str(summary["diverged"].attrs["definition"])
    return {
        "sections": sections,
        "looks": [_legend(name, look, summary) for name, look in looks.items()],
        "figures": figures,
        "tables": [section.pop("data") for section in sections],
        "definition": f"{definition}: {summary[definition].attrs['source']}",
        "counted": int(summary["diverged"].sum()),
        "provenance": {label: _word(tree.attrs[key]) for key, label in PROVENANCE.items() if key in tree.attrs},
    }


def _section(
    tree: xr.DataTree,
    group: Group,
    number: int,
    looks: dict[str, Look],
    drawn: charts.Detail,
    figures: dict[str, charts.Chart],
) -> dict[str, Any]:
    """One group of runs: its table and its figures, which are added to `figures` by their names."""
    runs, history = (tree[name].to_dataset().isel(run=group.runs) for name in ("summary", "history"))
    sharpness = tree["sharpness"].to_dataset().isel(run=group.runs) if "sharpness" in tree.children else None
    table = stability_table(runs)
    baseline = str(tree.attrs["baseline"])
    figures[f"final-{number}"] = charts.final_losses(runs, history, looks)
    figures[f"heat-{number}"] = charts.heat_map(table)
    best, why = reference_rate(runs, baseline)
    choices = []
    for index, rate in enumerate(table["learning_rate"].values.tolist()):
        chosen = runs["learning_rate"].values == rate
        probes = None if sharpness is None else sharpness.isel(run=chosen)
        figures[f"curves-{number}-{index}"] = charts.curves(
            history.isel(run=chosen), runs.isel(run=chosen), probes, looks, drawn
        )
        note = f" ({why})" if rate == best else ""
        choices.append({"figure": f"curves-{number}-{index}", "label": f"{rate:.3g}{note}", "chosen": rate == best})
    return {
        "id": f"group-{number}",
        "number": number,
        "label": group.label,
        "size": int(group.runs.sum()),
        "bits": _bits_of_a_nat(runs),
        "table": _rows(table, baseline),
        "rates": [f"{rate:.3g}" for rate in table["learning_rate"].values],
        "choices": choices,
        "probed": sharpness is not None,
        "window": max(1, history.sizes["step"] // 60),
        "data": {"group": group.where, "cells": _cells(table)},
    }


def _bits_of_a_nat(runs: xr.Dataset) -> str:
    """Bits per byte in a nat per token of a group's text; empty where tokens' bytes are not known."""
    if "final_bits_per_byte" not in runs:
        return ""
    ratio = (runs["final_bits_per_byte"] / runs["final_loss"]).values
    known = ratio[np.isfinite(ratio)]
    return f"{known[0]:.4g}" if known.size else ""


def _rows(table: xr.Dataset, baseline: str) -> list[dict[str, Any]]:
    rows = []
    for recipe in table["recipe"].values.astype(str).tolist():
        cells = [_cell(table.sel(recipe=recipe).isel(learning_rate=i)) for i in range(table.sizes["learning_rate"])]
        rows.append({"recipe": recipe, "baseline": recipe == baseline, "cells": cells})
    return rows


def _cell(cell: xr.Dataset) -> dict[str, str] | None:
    n, k = int(cell["n"]), int(cell["k"])
    if not n:
        return None
    loss = float(cell["final_loss_mean"])
    return {
        "loss": f"{loss:.3f}" if math.isfinite(loss) else "non-finite",
        "count": f"{k}/{n}",
        "interval": f"{100 * float(cell['rate_lower']):.0f}–{100 * float(cell['rate_upper']):.0f} %",
        "kind": "all" if k == n else "some" if k else "none",
    }


def _cells(table: xr.Dataset) -> list[dict[str, Any]]:
    """The table for machines: a row a cell that has runs, null where a number is not finite."""
    flat = table.stack(cell=("recipe", "learning_rate"))
    cells = []
    for i in range(flat.sizes["cell"]):
        cell = flat.isel(cell=i)
        values = {str(name): cell[name].item() for name in ("recipe", "learning_rate", *table.data_vars)}
        if values["n"]:
            cells.append(values)
    return cells


def _legend(name: str, look: Look, summary: xr.Dataset) -> dict[str, Any]:
    own = summary["recipe"].values == name
    k, n = int(summary["diverged"].values[own].sum()), int(own.sum())
    pattern = "" if look.dashes == "-" else ",".join(f"{2 * length:g}" for length in look.dashes[1])
    return {"name": name, "colour": look.colour, "shape": SHAPES[look.marker], "dashes": pattern, "count": f"{k}/{n}"}


def _word(value: Any) -> str:
    number = isinstance(value, float | np.floating)
    return f"{float(value):,.6g}" if number else f"{value:,}" if isinstance(value, int | np.integer) else str(value)


def in_page(content: Mapping[str, Any] | list[Any]) -> Markup:
    """JSON that may stand in a script element: strict, NaN and infinities as null, and no "<" that could end the element."""
    text = json.dumps(_strict(content), allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))


def _strict(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {str(key): _strict(value) for key, value in content.items()}
    return [_strict(value) for value in content] if isinstance(content, list | tuple) else content
