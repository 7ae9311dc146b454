"""What a strategy found, as a table: on the terminal after a sweep, in `exmy status` and in the report.

The numbers are strategy.json's: see `train.stable_rates` and `train.planned_looks` for what they mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from train.strategy_record import read_strategy

OWN = frozenset(
    {
        "recipe", "largest_stable", "smallest_unstable", "beyond", "highest_stable", "monotone", "exceptions", "tried", "runs",
        "found", "learning_rate", "pairs", "looks", "state", "difference", "spent", "only_recipe", "only_baseline", "bound",
        "low", "high",
    }
)  # fmt: skip
SHOWN_EXCEPTIONS = 4


@dataclass(frozen=True)
class Findings:
    """A table in words: notes come under it."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


def findings(record: Mapping[str, Any]) -> Findings:
    """What strategy.json holds, for people."""
    shown = _rates(record) if record["kind"] == "bisect" else _looks(record)
    rows = tuple(tuple(map(_printable, row)) for row in shown.rows)
    return Findings(_printable(shown.title), shown.headings, rows, tuple(map(_printable, shown.notes)))


def findings_of(directory: Path) -> Findings | None:
    """Those of a study directory; None where it has none, or none that can be read."""
    record = read_strategy(directory)
    try:
        return findings(record) if record else None
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):  # from a stranger, or another version
        return None


def findings_view(shown: Findings | None) -> Iterator[RenderableType]:
    """The same for the terminal; nothing for None."""
    if shown is None:
        return
    table = Table(title=shown.title, title_justify="left", show_lines=True)
    for heading in shown.headings:
        table.add_column(heading, overflow="fold", justify="left")
    for row in shown.rows:
        table.add_row(*map(Text, row))
    yield table
    for note in shown.notes:
        yield Text(note, style="dim")


def _rates(record: Mapping[str, Any]) -> Findings:
    results = record["results"]
    varied = _varied(results)
    rows = [
        (
            str(of["recipe"]),
            *(str(of[axis]) for axis in varied),
            _largest(of),
            _unstable(of),
            str(of["runs"]),
            _exceptions(of),
        )
        for of in results
    ]
    step = f"2^(1/{record['per_octave']})"
    share = f"at most {100 * record['allowed']:g} % of" if record["allowed"] else "none of"
    state = "" if record["finished"] else ", the search goes on"
    notes = [
        f"A rate is stable where {share} its runs diverged ({record['definition']}). Neighbours tried differ by {step}."
    ]
    if any(not of["monotone"] for of in results):
        notes.append(
            "Not monotone: a rate above these was stable. k/n diverged, with the 95 % interval of Clopper and Pearson: whether "
            "that is chance, or a rate too low to train, more seeds will tell. Rates that were not tried may hide others."
        )
    return Findings(
        f"Largest stable learning rate, {record['rounds']} rounds, {record['runs']} runs{state}",
        ("recipe", *varied, "largest stable", "smallest unstable above it", "runs", "not monotone: unstable, and stable above"),
        tuple(rows), tuple(notes),
    )  # fmt: skip


def _looks(record: Mapping[str, Any]) -> Findings:
    results = record["results"]
    varied = _varied(results)
    divergence = record["outcome"] == "divergence"
    what = ("only it diverged", "only the baseline", "to end") if divergence else ("difference", "repeated interval")
    rows = []
    for of in results:
        if divergence:
            bound = "-" if of["bound"] is None else f"{of['bound']} apart"
            numbers = (str(of["only_recipe"]), str(of["only_baseline"]), bound)
        else:
            ends = "-" if of["low"] is None or of["high"] is None else f"{of['low']:+.4f} to {of['high']:+.4f}"
            numbers = (f"{of['difference']:+.4f}", ends)  # type: ignore[assignment]
        rows.append(
            (
                str(of["recipe"]), *(str(of[axis]) for axis in varied), f"{of['learning_rate']:g}", str(of["pairs"]),
                *numbers, str(of["state"]),
            )
        )  # fmt: skip
    compared = "whether a run diverged" if divergence else "final losses, nats/token"
    each = f"{record['alpha_each']:.3g}"
    notes = (
        f"Pairs of runs of a seed, {compared}; alpha {record['alpha']:g} for the whole study, {each} for each of "
        f"{record['comparisons']} comparisons (Bonferroni), spent by looks ({record['spending']}).",
        "Not shown is no proof of being alike. A difference found at an early look is, as a rule, overrated.",
    )
    return Findings(
        f"Against {record['baseline']}: look {record['looks_taken']} of {record['looks_planned']} planned, {record['runs']} runs",
        ("recipe", *varied, "learning rate", "pairs", *what, "state"), tuple(rows), notes,
    )  # fmt: skip


def _varied(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Axes beside recipe and learning rate that have several values."""
    names = [name for name in results[0] if name not in OWN] if results else []
    return [name for name in names if len({str(of[name]) for of in results}) > 1]


def _largest(of: Mapping[str, Any]) -> str:
    largest = of["largest_stable"]
    if largest is None:
        return f"none of those tried, down to {min(share['learning_rate'] for share in of['tried']):.4g}"
    more = " or more" if of["smallest_unstable"] is None else ""
    return _rate(largest) + more + ("" if of["found"] else " (so far)")


def _unstable(of: Mapping[str, Any]) -> str:
    known = of["largest_stable"] is not None and of["smallest_unstable"] is not None
    return _rate(of["smallest_unstable"]) if known else "-"


def _exceptions(of: Mapping[str, Any]) -> str:
    found = of["exceptions"]
    if not found:
        return ""
    words = [
        f"{share['learning_rate']:.4g}: {share['diverged']}/{share['runs']} [{_percent(share)}]"
        for share in found[-SHOWN_EXCEPTIONS:]
    ]
    more = f", and {len(found) - SHOWN_EXCEPTIONS} lower ones" if len(found) > SHOWN_EXCEPTIONS else ""
    return f"{', '.join(words)}{more}; stable up to {_rate(of['highest_stable'])}"


def _percent(share: Mapping[str, Any]) -> str:
    return f"{100 * share['low']:.0f}–{100 * share['high']:.0f} %"


def _printable(words: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in words)


def _rate(value: float) -> str:
    """A rate, and as a power of two where it is on the lattice of quarter octaves."""
    power = math.log2(value)
    return f"{value:.4g} (2^{power:g})" if abs(power * 4 - round(power * 4)) < 1e-9 else f"{value:.4g}"
