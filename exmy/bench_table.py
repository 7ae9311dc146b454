"""What `exmy bench` shows: a line of progress while it measures, a table, and a file for machines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.progress import (
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from exmy.bench import Row, Spread, bench
from train.plan import pick_device
from train.progress import redraws
from train.provenance import device_name, machine

SUFFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def measure(parts: Sequence[str], device: str, rounds: int) -> list[Row]:
    """All rows, with a sign of life on a terminal: what is being timed, and the rounds that are left of it."""
    console = Console(stderr=True)
    progress = Progress(
        SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=console, transient=True, disable=not redraws(console),
    )  # fmt: skip
    with progress:
        task = progress.add_task("making ready", total=rounds)

        def begun(what: str, done: int, of: int) -> None:
            if done == 0:
                progress.reset(task, description=what, total=of)
            progress.update(task, completed=done)

        return list(bench(parts, device, rounds, begun=begun))


def bench_table(rows: Sequence[Row], device: str, rounds: int) -> Table:
    """Each thing measured and its rate, and under it how many times as long what is held against it takes for the same work.

    Two columns, of at most about a hundred characters together: in a pipe nothing is known of who reads it and how wide.
    """
    shown = Table(
        title=f"{device_name(pick_device(device))}: medians of {rounds} rounds [95 % interval of the median]",
        caption="3 ×: takes three times as long for the same work, timed in the same rounds",
        box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold underline", title_justify="left",
        caption_justify="left",
    )  # fmt: skip
    shown.add_column("measured", overflow="fold")
    shown.add_column("median", overflow="fold")
    for row in rows:
        if shown.rows:
            shown.add_row()
        shown.add_row(row.what, _rate(row.rate, row.unit))
        for name, found in row.times.items():
            shown.add_row(f"  {name}", _times(found))
        for name in row.wrong:
            shown.add_row(f"  {name}", "gives other values, not timed")
    return shown


def as_json(rows: Sequence[Row], device: str, rounds: int) -> str:
    """Rows with all their numbers, versions, device, commit and time."""
    told = {"schema": 1, **machine(pick_device(device)), "rounds": rounds, "rows": [asdict(row) for row in rows]}
    return json.dumps(told, indent=1) + "\n"


def _rate(rate: Spread, unit: str) -> str:
    scale, suffix = next(((scale, suffix) for scale, suffix in SUFFIXES if rate.median >= scale), (1.0, ""))
    middle, low, high = (_digits(x / scale) for x in (rate.median, rate.low, rate.high))
    return f"{middle} [{low}, {high}] {suffix + ' ' if suffix else ''}{unit}"


def _times(found: Spread) -> str:
    return f"{_digits(found.median)} [{_digits(found.low)}, {_digits(found.high)}] ×"


def _digits(number: float) -> str:
    """Three digits that count, and no power of ten: 0.123, 12.3, 12,300."""
    rounded = float(f"{number:.3g}")
    return f"{rounded:,.0f}" if rounded >= 1000 else f"{rounded:.3g}"
