"""`exmy claims`: a file of claims held against studies: supported, refuted or undecided, and what it would take."""

from __future__ import annotations

import importlib.resources
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xarray as xr
from rich.table import Table
from rich.text import Text

from exmy.busy import busy
from exmy.console import output
from exmy.groups import groups
from exmy.outputs import write_text
from exmy.verdict import runs_together
from train import StudyError, seed_grid
from train.claims import UNITS, Claims, Judged, by_study, judge, read_claims
from train.directory import study_of

STYLES = {"supported": "green", "refuted": "bold red", "undecided": "yellow", "not tested": "dim"}


def default_claims() -> Path:
    """The claims that come with exmy."""
    return Path(str(importlib.resources.files("studies") / "claims.toml"))


def run_claims(directories: Sequence[Path], file: Path, json_file: Path | None) -> bool:
    """Print every claim's state; whether none that is expected is refuted. StudyError, in a line, where that can't be told."""
    claims = read_claims(file)
    by_name: dict[str, list[Path]] = {}
    for directory in directories:
        by_name.setdefault(study_of(directory).name, []).append(directory)
    wanted = {claim.study for claim in claims.claims}
    if not by_name.keys() & wanted:
        raise StudyError(f"{file}: no claim is about {', '.join(by_name)}; its studies are {', '.join(sorted(wanted))}")
    with busy("reading runs"):
        grids = {name: grids_of(of) for name, of in by_name.items() if name in wanted}
    try:
        with busy("judging claims"):
            found = judge(claims, by_study(grids))
    except ValueError as error:
        raise StudyError(f"{file}: {error}") from None
    console = output()
    console.print(claims_table(found, claims.alpha))
    for line in lines(claims, found):
        console.print(Text(line), soft_wrap=True)
    write_text(json_file, lambda: as_json(claims, found))
    return not any(of.state == "refuted" and of.claim.expected for of in found)


def grids_of(directories: Sequence[Path]) -> dict[tuple[tuple[str, str], ...], xr.Dataset]:
    """A study's runs as `by_study` takes them, of all its directories together; StudyError where two are one."""
    runs, _, _ = runs_together(directories)
    try:
        return {tuple(group.where.items()): seed_grid(runs.isel(run=group.runs)) for group in groups(runs)}
    except ValueError as error:
        raise StudyError(f"{directories[0]}: {error}") from None


def claims_table(found: Sequence[Judged], alpha: float) -> Table:
    """A row a claim: what it is, what came of it, effect and interval, seeds, Holm's p, and seeds until the next look."""
    shown = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold underline")
    shown.add_column("claim", overflow="fold")
    shown.add_column("", overflow="fold")
    for heading in (
        f"effect [{100 * (1 - alpha):g} % interval, over all looks]",
        "seeds",
        "Holm p",
        "next look, seeds",
    ):
        shown.add_column(heading, justify="right", overflow="fold")
    for of in found:
        more = f"{of.more} more" if of.more is not None and of.state in ("undecided", "not tested") else "-"
        shown.add_row(
            of.claim.name, Text(of.state, style=STYLES[of.state]), effect(of), seeds(of),
            f"{of.p_holm:.3g}" if math.isfinite(of.p_holm) else "-", more,
        )  # fmt: skip
    return shown


def seeds(of: Judged) -> str:
    """How many seeds it rests on, those of its last look; and how many there are, where that is more."""
    return f"{of.used} of {of.n}" if of.used and of.used != of.n else str(of.n)


def effect(of: Judged) -> str:
    """An effect with its limits and unit; - where it was not looked at."""
    if not of.looks:
        return "-"
    value = f"{of.effect:+.3f}" if math.isfinite(of.effect) else "none"
    limits = f" [{of.low:+.3f}, {of.high:+.3f}]" if not math.isnan(of.low + of.high) else ""
    return f"{value}{limits} {UNITS[of.claim.statistic]}"


def lines(claims: Claims, found: Sequence[Judged]) -> list[str]:
    """Every claim in its own words, with its source and what follows; then what the p-values are."""
    told = []
    for of in found:
        claim, words = of.claim, f"{of.claim.name}: {of.claim.claim} ({of.claim.source}) - {of.state}"
        if of.state == "not tested":
            words += f": {claim.study} is not here"
        elif of.state == "undecided":
            words += f": {of.more} more seeds until its next look" if of.more else ": its looks are over"
        told.append(words + ".")
    return [
        *told,
        f"p-values are Holm's, for all {len(claims.claims)} claims of the file at {100 * claims.alpha:g} %, over all looks.",
    ]


def as_json(claims: Claims, found: Sequence[Judged]) -> str:
    """Every claim and number, for machines; null where there is none."""

    def plain(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    rows = [
        {"claim": of.claim.model_dump(mode="json"), "state": of.state}
        | {
            name: plain(getattr(of, name))
            for name in ("effect", "low", "high", "n", "used", "p", "p_holm", "looks", "more")
        }
        for of in found
    ]
    return json.dumps({"alpha": claims.alpha, "claims": rows}, indent=1, allow_nan=False) + "\n"
