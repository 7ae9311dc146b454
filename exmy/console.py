"""What the terminal shows: tables for people, by rich."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    import xarray as xr

PIPE_WIDTH = 200  # where the output is no terminal, whose width is unknown


def output() -> Console:
    """Standard output; wide enough for tables when it is a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=max(PIPE_WIDTH, console.width))


def stability_tables(tree: xr.DataTree) -> Iterator[Table]:
    """Recipe × learning rate: mean final loss, k/n diverged with its exact interval; a table for each group of runs."""
    from exmy.groups import groups
    from train import stability_table

    summary = tree["summary"].to_dataset()
    for group in groups(summary):
        part = summary.isel(run=group.runs)
        yield _stability_table(stability_table(part), part, str(tree.attrs["baseline"]), group.label)


def lost_baselines(tree: xr.DataTree) -> Iterator[str]:
    """A line for each group of runs whose baseline diverged in all."""
    from exmy.groups import groups, lost_baseline

    summary, baseline = tree["summary"].to_dataset(), str(tree.attrs["baseline"])
    told = (lost_baseline(summary.isel(run=group.runs), baseline, group.label) for group in groups(summary))
    yield from filter(None, told)


def _stability_table(table: xr.Dataset, summary: xr.Dataset, baseline: str, where: str) -> Table:
    definition = summary["diverged"].attrs["definition"]
    shown = Table(
        title="Final training loss (nats/token, mean of seeds) and runs diverged, k/n [95 % exact interval, %]"
        + (f"; {where}" if where else ""),
        caption=f"diverged = {definition}: {summary[definition].attrs['source']}",
        show_lines=True,
    )  # fmt: skip
    shown.add_column("recipe", overflow="fold")
    for rate in table["learning_rate"].values:
        shown.add_column(f"lr {rate:g}", justify="right", overflow="fold")
    for recipe in table["recipe"].values:
        cells = [_cell(table.sel(recipe=recipe, learning_rate=rate)) for rate in table["learning_rate"].values]
        shown.add_row(f"{recipe}\n(baseline)" if recipe == baseline else str(recipe), *cells)
    return shown


def _cell(cell: xr.Dataset) -> Text:
    n, k = int(cell["n"]), int(cell["k"])
    if not n:
        return Text("-", style="dim")
    loss = float(cell["final_loss_mean"])
    low, high = 100 * float(cell["rate_lower"]), 100 * float(cell["rate_upper"])
    value = f"{loss:.3f}" if math.isfinite(loss) else "non-finite"
    style = "bold red" if k == n else "yellow" if k else ""
    return Text(f"{value}\n{k}/{n} [{low:.0f}–{high:.0f}]", style=style)
