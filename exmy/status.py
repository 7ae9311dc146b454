"""`exmy status`: what a study directory holds and what is under way in it, for people."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from exmy.rang import rang_view
from exmy.strategies import findings_of, findings_view
from train.quantities import duration, gibibytes, number

COLOURS = {"running": "green", "finished": "green", "not_started": "", "incomplete": "yellow"}
LATEST = 12  # finished packs that are listed


def status_view(status: Mapping[str, Any]) -> Iterator[RenderableType]:
    """A study's status, as `train.study_status` gives it, from the head line to how to go on."""
    runs, directory = status["runs"], str(status["directory"])
    head = Text(f"{status['name']} ", style="bold")
    head.append(status["state"].replace("_", " "), style=COLOURS.get(status["state"], "bold red"))
    head.append(f": {status['message']}", style="not bold")
    yield head
    yield Text(
        f"{runs['finished']} of {runs['planned']} runs finished; {runs['diverged']} of them diverged ({runs['definition']})"
    )
    if status["packs"]:
        yield _finished_packs(status["packs"], status["packs_finished"])
    yield from findings_view(findings_of(Path(directory)))
    yield from rang_view(status["alarms"])
    yield from _weights(status)
    if status["under_way"]:
        yield from _under_way(status["under_way"], at_work=status["state"] == "running")
    if status["state"] not in ("running", "finished") and not status["digest"]:
        yield Text(f"To go on: {shlex.join(['exmy', 'resume', directory])}")
    if runs["finished"]:
        yield Text(f"To look at what is there: {shlex.join(['exmy', 'report', directory])}")


def _weights(status: Mapping[str, Any]) -> Iterator[Text]:
    """What snapshots there are, and what was measured of weights that were kept."""
    kept, measured = status["snapshots"], status["landscape"]
    if kept["files"]:
        yield Text(f"Snapshots: {kept['files']} of {kept['runs']} runs")
    if measured:
        counts = ", ".join(f"{row['measure']} {row['points']}" for row in measured)
        yield Text(f"Measured since, in points: {counts}")
    elif kept["files"]:
        yield Text(f"To measure them: {shlex.join(['exmy', 'landscape', str(status['directory'])])}")


def _finished_packs(packs: list[Mapping[str, Any]], count: int) -> Table:
    more = f", the latest {LATEST} of {count}" if count > LATEST else ""
    table = Table(title=f"Finished packs{more}", title_justify="left")
    for heading in ("pack", "runs", "diverged", "took", "first step", "written (UTC)", "device"):
        table.add_column(
            heading, justify="left" if heading in ("pack", "device") else "right", no_wrap=heading == "pack"
        )
    for pack in packs[-LATEST:]:
        table.add_row(
            pack["hash"], str(pack["runs"]), str(pack["diverged"]), _took(pack),
            duration(pack["seconds_first_step"]), pack["written"][:19].replace("T", " "), pack["device"],
        )  # fmt: skip
    return table


def _took(pack: Mapping[str, Any]) -> str:
    early = pack["ended_early_at"]
    return duration(pack["seconds"]) + (f", all dead at step {early}" if early is not None else "")


def _under_way(told: Mapping[str, Any], *, at_work: bool) -> Iterator[RenderableType]:
    begun = told["packs_finished"] + len(told["packs"])
    when = f"pack {begun} of {told['packs_planned']}" if begun else f"none of {told['packs_planned']} packs has begun"
    memory = f", {gibibytes(told['memory_bytes'])} of memory" if told["memory_bytes"] else ""
    if told["packs"]:
        rest = "Was under way; goes on from its last checkpoint, or from its start where it has none"
        table = Table(title="Under way" if at_work else rest, title_justify="left")
        for heading in ("pack", "model", "dataset", "step", "steps/s", "run-steps/s", "alive", "no progress", "left"):
            words = heading in ("pack", "model", "dataset")
            table.add_column(heading, justify="left" if words else "right", no_wrap=heading == "pack")
        for pack in told["packs"]:
            step = "first step" if pack["state"] == "first step" else f"{pack['step']}/{pack['steps']}"
            table.add_row(
                pack["hash"], pack["model"], pack["dataset"], step, number(pack["steps_per_second"]),
                number(pack["run_steps_per_second"]), f"{pack['alive']}/{pack['runs']}", str(pack["no_progress"]),
                duration(pack["seconds_left"]) if at_work else "-",
            )  # fmt: skip
        yield table
        yield Text(told["live_rule"], style="dim")
    left = f", {duration(told['seconds_left'])} left" if at_work and told["seconds_left"] is not None else ""
    yield Text(f"{when}, on {told['device']}, {duration(told['seconds'])} gone{left}{memory}")
