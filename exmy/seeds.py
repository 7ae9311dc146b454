"""What a study's seeds can tell, and how many its question needs: the line of `exmy sweep --dry-run`, before any is trained.

The question is that of `exmy verdict`: does a recipe diverge as the baseline does, at one learning rate, on the same seeds? Each
recipe (at each setting of the other axes) is one comparison, and all share 5 % (Bonferroni). Looks that a study plans share its
own alpha, among recipes and rates; a plan of looks tells a little less than as many seeds looked at once.
"""

from __future__ import annotations

from typing import Any

from train import Study
from train.cells import Cell, by_cell
from train.equivalence import seeds_for_equivalence
from train.planned_looks import comparisons
from train.sample_size import least_telling, seeds_needed
from train.seed_cube import crossed

ALPHA, POWER = 0.05, 0.8
SHARE = 0.1  # that of the standing example: one run in ten fails
MARGIN = 0.1


def seeds_line(study: Study) -> str:
    """One line, and one more where seeds are crossed; of all looks together, where the study adds seeds by a plan."""
    cells = by_cell(study.runs())
    counts: dict[tuple[Cell, float], set[tuple[int, int]]] = {}
    for cell, runs in cells.items():
        for run in runs:
            counts.setdefault((cell, run.learning_rate), set()).add((run.init_seed, run.data_seed))
    plan = study.strategy
    looks = plan.looks if plan.kind == "seeds" else 1
    seeds = looks * min(map(len, counts.values()))
    shared = crossed(pair for pairs in counts.values() for pair in pairs)
    more = f"\n{shared}" if shared else ""
    compared: list[Any] = [
        cell for cell in cells if cell.recipe != study.reference and Cell(study.reference, cell.where) in cells
    ]
    if plan.kind == "seeds":
        compared = list(comparisons(study))
    here = f"seeds: {'at most ' if looks > 1 else ''}{seeds} a recipe and learning rate"
    if not compared:
        return f"{here}; no recipe is held against the baseline {study.reference}{more}"
    level = plan.alpha if plan.kind == "seeds" else ALPHA
    alpha = level / len(compared)
    told = least_telling(seeds, alpha, POWER)
    tell = (
        "can tell no share of diverged runs from 0 %"
        if told is None
        else f"can tell {100 * told:.0f} % diverged from 0 %"
    )
    apart, alike = seeds_needed(0.0, SHARE, POWER, alpha), seeds_for_equivalence(MARGIN, 0.0, POWER, alpha)
    many = f"{len(compared)} comparisons" if len(compared) > 1 else "one comparison"
    return (
        f"{here}, which in {many} with {study.reference} {tell} ({100 * POWER:.0f} % power, {100 * level:g} % in all); "
        f"{100 * SHARE:.0f} % from 0 % needs {apart}, as stable within {100 * MARGIN:.0f} % at least {alike}"
        f"{more}"
    )
