"""strategy = bisect: the largest stable learning rate of every recipe, and of every combination of the other axes.

A study's own learning rates, moved to the nearest of the lattice, are the first round; where they leave room in the packs,
rates between them are added. Further rounds are [[more]] blocks (see `bisect` for which rates, `adaptive` for how they are
kept). A rate is stable where at most `allowed` of its runs, all seeds of the study, diverged by the study's own definition.
"""

from __future__ import annotations

from typing import Any

import torch
import xarray as xr
from scipy import stats

from train.bisect import edge, filled, limits, nearest, next_rates, rate_at
from train.cells import Cell, blocks_of, by_cell, changed, last_round, new_blocks
from train.plan import capacity, program_of
from train.study import Run, Study

CONFIDENCE = 0.95


def first_round(study: Study, device: torch.device) -> Study:
    """The study that the search begins with: its rates on the lattice, and more of them where packs have room."""
    per_octave = study.strategy.per_octave
    own = _on_lattice(study.axes.learning_rate, per_octave)
    points = min(_points(study, by_cell(study.runs()), device).values())
    axes = study.model_dump(mode="json", exclude_none=True, exclude_unset=True)["axes"]
    rates = [rate_at(k, per_octave) for k in filled(own, points)]
    blocks = [_snapped(block, per_octave) for block in blocks_of(study) if "round" not in block]
    return changed(study, axes=axes | {"learning_rate": rates}, more=blocks)


def next_round(study: Study, summary: xr.Dataset, device: torch.device) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The blocks of the next round, none at the end, and the record of what is known; summary: of every run of the study."""
    settings, number = study.strategy, last_round(study)
    cells = by_cell(study.runs())
    diverged = dict(zip(map(str, summary["run"].values), map(bool, summary["diverged"].values), strict=True))
    counts = {cell: _counts(runs, diverged, settings.per_octave) for cell, runs in cells.items()}
    stable = {cell: {k: bad / n <= settings.allowed for k, (bad, n) in of.items()} for cell, of in counts.items()}
    wanted = {cell: _wanted(study, runs, stable[cell], 1) for cell, runs in cells.items()}
    still = {cell: runs for cell, runs in cells.items() if wanted[cell]}
    if number < settings.rounds:
        points = _points(study, still, device)
        wanted = {cell: _wanted(study, cells[cell], stable[cell], points[cell]) for cell in still}
        blocks = new_blocks(
            {cell: {"learning_rate": [rate_at(k, settings.per_octave) for k in ks]} for cell, ks in wanted.items()},
            number + 1, study,
        )  # fmt: skip
    else:
        blocks = []
    results = [
        {
            **cell.label,
            **_result(stable[cell], counts[cell], settings.per_octave),
            "runs": len(runs),
            "found": cell not in still,
        }
        for cell, runs in cells.items()
    ]
    definition = study.divergence.definition
    record = {
        "kind": "bisect", "definition": definition, "allowed": settings.allowed, "per_octave": settings.per_octave,
        "rounds": number, "runs": sum(map(len, cells.values())), "finished": not blocks, "results": results,
    }  # fmt: skip
    return blocks, record


def _on_lattice(rates: list[float], per_octave: int) -> list[int]:
    return sorted({nearest(rate, per_octave) for rate in rates})


def _snapped(block: dict[str, Any], per_octave: int) -> dict[str, Any]:
    if "learning_rate" not in block:
        return block
    return block | {"learning_rate": [rate_at(k, per_octave) for k in _on_lattice(block["learning_rate"], per_octave)]}


def _points(study: Study, cells: dict[Cell, list[Run]], device: torch.device) -> dict[Cell, int]:
    """Learning rates a round for each cell: as the study says, or as many as fill a pack of all cells that share a program."""
    if study.strategy.points != "auto":
        return dict.fromkeys(cells, study.strategy.points)
    program = {cell: program_of(runs[0]) for cell, runs in cells.items()}
    room = {of: capacity(study, of, device) for of in set(program.values())}
    seeds = {cell: len({(run.init_seed, run.data_seed) for run in runs}) for cell, runs in cells.items()}
    together = {of: sum(seeds[cell] for cell in cells if program[cell] == of) for of in room}
    return {cell: max(1, room[of] // together[of]) for cell, of in program.items()}


def _counts(runs: list[Run], diverged: dict[str, bool], per_octave: int) -> dict[int, tuple[int, int]]:
    """Diverged runs and runs, at each k."""
    found: dict[int, tuple[int, int]] = {}
    for run in runs:
        k = nearest(run.learning_rate, per_octave)
        bad, n = found.get(k, (0, 0))
        found[k] = (bad + diverged[run.identity], n + 1)
    return dict(sorted(found.items()))


def _wanted(study: Study, runs: list[Run], stable: dict[int, bool], points: int) -> list[int]:
    settings = study.strategy
    first = _on_lattice(study.axes.learning_rate, settings.per_octave)
    return next_rates(stable, points, limits(first, settings.per_octave, settings.octaves)) if runs else []


def _result(stable: dict[int, bool], counts: dict[int, tuple[int, int]], per_octave: int) -> dict[str, Any]:
    """A cell's edge, in rates, with the counts on which it rests."""
    found = edge(stable)

    def rate(k: int | None) -> float | None:
        return None if k is None else rate_at(k, per_octave)

    return {
        "largest_stable": rate(found.largest), "smallest_unstable": rate(found.unstable), "beyond": found.beyond,
        "highest_stable": rate(found.highest), "monotone": found.monotone,
        "exceptions": [_share(k, counts[k], per_octave) for k in found.exceptions],
        "tried": [_share(k, counts[k], per_octave) for k in counts],
    }  # fmt: skip


def _share(k: int, count: tuple[int, int], per_octave: int) -> dict[str, Any]:
    """A rate with its share of diverged runs and the interval of Clopper and Pearson (1934, Biometrika 26:404)."""
    interval = stats.binomtest(*count).proportion_ci(CONFIDENCE, method="exact")
    return {
        "learning_rate": rate_at(k, per_octave), "diverged": count[0], "runs": count[1],
        "low": float(interval.low), "high": float(interval.high),
    }  # fmt: skip
