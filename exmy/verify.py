"""`exmy verify`: put an implementation before the judge, and show what it said."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from formats import element_format
from verification import Report, verify
from verification.adapters import adapters, fits, load_function
from verification.points import CARRIERS

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in CARRIERS}


def reports(
    implementation: str, formats: tuple[str, ...], dtype_name: str, rounding: str, overflow: str, level: str,
    takes: str, gives: str,
) -> Iterator[Report]:  # fmt: skip
    """One report a format. ValueError for names that mean nothing, before anything is judged."""
    dtype = DTYPES[dtype_name]
    known = adapters()
    if ":" in implementation:
        if not formats:
            raise ValueError(f"{implementation}: say which format it rounds to, by --format")
        chosen, make = formats, lambda _: load_function(implementation)
    elif implementation in known:
        adapter = known[implementation]
        missing = [name for name in formats if name not in adapter.formats]
        if missing and implementation != "exmy":
            raise ValueError(f"{implementation} has no {missing[0]}: it has {', '.join(adapter.formats)}")
        if dtype_name not in adapter.dtypes:
            raise ValueError(f"{implementation} is given {', '.join(adapter.dtypes)}, got {dtype_name}")
        chosen, make, takes = formats or adapter.formats, adapter.make, adapter.takes
    else:
        raise ValueError(f"{implementation}: neither {', '.join(known)} nor MODULE:FUNCTION")
    fitting = [element_format(name).name for name in chosen if formats or fits(name, dtype)]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task("", total=len(fitting))
        for place, name in enumerate(fitting):
            progress.update(task, description=f"{implementation} {name}", completed=place)

            def show(share: float, place: int = place) -> None:
                progress.update(task, completed=place + share)

            yield verify(
                make(name), name, rounding, overflow, dtype, level,
                takes=takes, gives=gives, name=implementation, progress=show,
            )  # fmt: skip


def view(found: list[Report]) -> Group:
    """A row a format: the verdict, what it was judged by, what the implementation does; then each broken law."""
    first = found[0]
    table = Table(
        title=f"{first.implementation}, {first.input_dtype} inputs, level {first.level}: {first.proves}",
        title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False,
    )  # fmt: skip
    for heading in ("format", "verdict", "inputs", "judged by", "NaN", "-0", "subnormals", "laws broken"):
        table.add_column(heading, justify="right" if heading == "inputs" else "left", overflow="fold")
    for report in found:
        broken = [verdict for verdict in report.laws if verdict.verdict == "fail"]
        c = report.conventions
        table.add_row(
            report.format, Text("pass", style="green") if report.passed else Text("FAIL", style="bold red"),
            f"{report.checked:,}", f"{report.rounding}, {report.overflow}", c.nan, c.zero, c.subnormals,
            ", ".join(f"{v.law} ({v.failed:,})" for v in broken),
        )  # fmt: skip
    lines = [
        Text(f"{report.format} breaks {verdict}")
        for report in found
        for verdict in report.laws
        if verdict.verdict == "fail"
    ]
    return Group(table, *lines)


def write_certificate(found: list[Report], path: Path) -> None:
    """All reports as one JSON document. OSError for a bad place."""
    content: list[Any] = [json.loads(report.to_json()) for report in found]
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
