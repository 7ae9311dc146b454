"""Who rang: of each alarm of a study a row, and the first runs for which it rang; for `exmy status`, `exmy sweep`, the report."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table

FIRST = 5  # runs that are named of an alarm
HEADINGS = ("alarm", "rang", "of them diverged", "diverged in silence", "first step, median", "the first of them")


def rang_rows(alarms: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """A row an alarm, as `told` has them."""
    rows: list[tuple[str, ...]] = []
    for of in alarms:
        who = of["who"]
        steps = f"{statistics.median(one['step'] for one in who):g}" if who else "-"
        more = f" and {len(who) - FIRST} more" if len(who) > FIRST else ""
        named = "; ".join(map(_named, who[:FIRST])) + more
        bad = sum(one["diverged"] for one in who)
        rows.append(
            (of["alarm"], f"{len(who)}/{of['runs']}", str(bad), str(of["diverged_silent"]), steps, named or "-")
        )
    return rows


def _named(one: Mapping[str, Any]) -> str:
    seeds = {one["init_seed"], one["data_seed"]}
    seed = f"seed {one['init_seed']}" if len(seeds) == 1 else f"seeds {one['init_seed']}/{one['data_seed']}"
    value = "" if one["value"] is None else f" ({one['value']:.4g})"
    return f"{one['recipe']} at {one['learning_rate']:g}, {seed}: step {one['step']}{value}"


def rang_view(alarms: Sequence[Mapping[str, Any]]) -> Iterator[RenderableType]:
    """The rows as a table for a terminal; nothing of a study without alarms."""
    if not alarms:
        return
    table = Table(title="Alarms", title_justify="left")
    for heading in HEADINGS:
        table.add_column(
            heading, overflow="fold", justify="left" if heading in (HEADINGS[0], HEADINGS[-1]) else "right"
        )
    for row in rang_rows(alarms):
        table.add_row(*row)
    yield table
