"""`exmy claims`: files of claims held against studies: supported, refuted or undecided, and what it would take."""

from __future__ import annotations

import importlib.resources
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

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


class JudgedFile(NamedTuple):
    """A file of claims, and what came of them."""

    file: Path
    claims: Claims
    found: list[Judged]


def default_claims() -> Path:
    """The claims that come with exmy, of its first studies."""
    return Path(str(importlib.resources.files("studies") / "claims.toml"))


def own_claims() -> list[Path]:
    """All files of claims that come with exmy. Each has an alpha of its own, and its claims are adjusted for each other alone."""
    return [default_claims(), default_claims().with_name("claims-second.toml")]


def run_claims(directories: Sequence[Path], files: Sequence[Path], json_file: Path | None) -> bool:
    """Print every claim's state, of the files that have any about these studies; whether none that is expected is refuted.

    StudyError, in a line, where that can't be told.
    """
    each = {file: read_claims(file) for file in files}
    by_name: dict[str, list[Path]] = {}
    for directory in directories:
        by_name.setdefault(study_of(directory).name, []).append(directory)
    wanted = {file: {claim.study for claim in claims.claims} for file, claims in each.items()}
    about = [file for file in files if by_name.keys() & wanted[file]]
    every = set().union(*wanted.values())
    if not about:
        raise StudyError(
            f"{', '.join(map(str, files))}: no claim is about {', '.join(by_name)}; studies with claims are "
            f"{', '.join(sorted(every))}"
        )
    with busy("reading runs"):
        grids = {name: grids_of(of) for name, of in by_name.items() if name in every}
    judged = []
    for file in about:
        try:
            with busy("judging claims"):
                judged.append(JudgedFile(file, each[file], judge(each[file], by_study(grids))))
        except ValueError as error:
            raise StudyError(f"{file}: {error}") from None
    console = output()
    for of in judged:
        console.print(claims_table(of.found, of.claims.alpha))
        for line in lines(of):
            console.print(Text(line), soft_wrap=True)
    write_text(json_file, lambda: as_json(judged))
    return not any(of.state == "refuted" and of.claim.expected for file in judged for of in file.found)


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


def lines(judged: JudgedFile) -> list[str]:
    """Every claim in its own words, with its source and what follows; then what the p-values are."""
    claims, told = judged.claims, []
    for of in judged.found:
        claim, words = of.claim, f"{of.claim.name}: {of.claim.claim} ({of.claim.source}) - {of.state}"
        if of.state == "not tested":
            words += f": {claim.study} is not here"
        elif of.state == "undecided":
            words += f": {of.more} more seeds until its next look" if of.more else ": its looks are over"
        told.append(words + ".")
    return [
        *told,
        f"p-values are Holm's, for all {len(claims.claims)} claims of {judged.file.name} at {100 * claims.alpha:g} %, over all "
        "looks.",
    ]


def as_json(judged: Sequence[JudgedFile]) -> str:
    """Every claim and number, with its file's name and alpha, for machines; null where there is none."""

    def plain(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    names = ("effect", "low", "high", "n", "used", "p", "p_holm", "looks", "more")
    rows = [
        {"file": file.name, "alpha": claims.alpha, "claim": of.claim.model_dump(mode="json"), "state": of.state}
        | {name: plain(getattr(of, name)) for name in names}
        for file, claims, found in judged
        for of in found
    ]
    return json.dumps({"claims": rows}, indent=1, allow_nan=False) + "\n"
