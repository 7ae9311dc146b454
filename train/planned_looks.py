"""strategy = seeds: more seeds in looks that are planned beforehand, each format against the baseline, with alpha spending.

`axes.seed` are the seeds of one look; look k adds as many, numbered on. At each look every comparison that is open, a recipe
against the baseline at one learning rate and one setting of the other axes, is judged on the pairs of runs so far (see
`sequential`). One that rejects ends there, and its recipe gets no more seeds; the others go on to the last planned look, and no
further.

A study has as many chances of a false finding as comparisons, so each is tested at alpha / comparisons (Bonferroni): the chance
of any false finding in the whole study is at most alpha. Holm's step-down would reject more once one is rejected, but its
boundaries would depend on what the others did; those here are known before the first look.

outcome = "divergence": pairs in which one of the two runs diverged. outcome = "loss": differences of the final smoothed loss,
where a loss counts as at most ln V, that of guessing among V tokens and of a model before its first step (after Wortsman et al.,
2309.14322, who take the initial loss): so a run without a finite loss has one, and how far beyond a run ended weighs nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from train.cells import Cell, blocks_of, by_cell, changed, last_round, new_blocks
from train.plan import shape_of
from train.sequential import SignLook, alpha_spent, flip_looks, repeated_interval, sign_looks, spending_bounds
from train.study import Study, StudyError


@dataclass(frozen=True)
class Comparison:
    """A recipe's cell and the baseline's, at one learning rate."""

    cell: Cell
    baseline: Cell
    learning_rate: float


def first_look(study: Study) -> Study:
    """The study without further looks; StudyError, in a line, where it can't be looked at so."""
    settings = study.strategy
    if study.axes.init_seed is not None or study.axes.data_seed is not None:
        raise StudyError("strategy seeds pairs runs by seed: give seed, in place of init_seed and data_seed")
    if any(block.seed is not None for block in study.more if block.round is None):
        raise StudyError("strategy seeds adds seeds itself, the same to all: leave seed out of [[more]]")
    if settings.outcome == "divergence" and study.divergence.definition == "gap":
        raise StudyError(
            "strategy seeds: whether a run diverged by definition 'gap' changes with later runs of the baseline; "
            'take another definition, or outcome = "loss"'
        )
    seeds = study.axes.seed
    if max(seeds) + (settings.looks - 1) * _stride(study) >= 2**32:
        raise StudyError(
            f"strategy seeds: seeds of {settings.looks} looks must be below 2^32, and begin at {min(seeds)}"
        )
    if not comparisons(study):
        raise StudyError(
            f"strategy seeds holds recipes against the baseline {study.reference!r}, and no other has its learning rates and "
            "axes: name another recipe in axes.recipe"
        )
    return study


def comparisons(study: Study) -> list[Comparison]:
    """Every recipe against the baseline, at each learning rate that both have; the plan's, whatever was trained since."""
    cells = by_cell(run for number, run in study.runs_by_round() if number == 1)
    rates = {cell: list(dict.fromkeys(run.learning_rate for run in runs)) for cell, runs in cells.items()}
    found = []
    for cell, own in rates.items():
        baseline = Cell(study.reference, cell.where)
        if cell != baseline and baseline in rates:
            found += [Comparison(cell, baseline, rate) for rate in own if rate in rates[baseline]]
    return found


def seeds_of_look(study: Study, look: int) -> list[int]:
    """The seeds that a look adds, from 1."""
    return [seed + (look - 1) * _stride(study) for seed in study.axes.seed]


def _stride(study: Study) -> int:
    return max(study.axes.seed) - min(study.axes.seed) + 1


def next_look(study: Study, summary: xr.Dataset) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The blocks of the next look, none at the end, and the record of all looks; summary: of every run of the study."""
    settings, look = study.strategy, last_round(study)
    plan = comparisons(study)
    outcomes = _outcomes(study, summary)
    judged = [_judged(study, comparison, outcomes, look, len(plan)) for comparison in plan]
    still = [comparison for comparison, result in zip(plan, judged, strict=True) if result["state"] == "open"]
    blocks = _blocks(study, still, look + 1) if look < settings.looks else []
    for result in judged:
        if result["state"] == "open" and look == settings.looks:
            result["state"] = "not shown"
    level = settings.alpha / len(plan)
    record = {
        "kind": "seeds", "design": _without_rounds(study),
        "baseline": study.reference, "outcome": settings.outcome, "definition": study.divergence.definition,
        "alpha": settings.alpha, "spending": settings.spending, "comparisons": len(plan), "alpha_each": level,
        "looks_planned": settings.looks, "looks_taken": look, "seeds_a_look": len(study.axes.seed),
        "looks": _plan_of_looks(study, level),
        "runs": sum(1 for _ in study.runs()), "finished": not blocks, "results": judged,
    }  # fmt: skip
    return blocks, record


def _plan_of_looks(study: Study, level: float) -> list[dict[str, Any]]:
    """Each planned look: its seeds, the share of the planned sample then, alpha spent up to it, the |z| that this is worth."""
    times, spending = _times(study), study.strategy.spending
    bounds = spending_bounds(times, level, spending)
    return [
        {
            "look": k,
            "seeds": seeds_of_look(study, k),
            "time": time,
            "alpha_spent": alpha_spent(time, level, spending),
            "z": float(bound) if math.isfinite(bound) else None,
        }
        for k, (time, bound) in enumerate(zip(times, bounds, strict=True), 1)
    ]


def _without_rounds(study: Study) -> str:
    return changed(study, more=[block for block in blocks_of(study) if "round" not in block]).to_toml()


def _times(study: Study) -> list[float]:
    return [k / study.strategy.looks for k in range(1, study.strategy.looks + 1)]


def _blocks(study: Study, still: list[Comparison], look: int) -> list[dict[str, Any]]:
    """The next seeds for every open comparison, and for the baselines that they are held against."""
    rates: dict[Cell, list[float]] = {}
    for comparison in still:
        for cell in (comparison.baseline, comparison.cell):
            known = rates.setdefault(cell, [])
            if comparison.learning_rate not in known:
                known.append(comparison.learning_rate)
    seeds = seeds_of_look(study, look)
    return new_blocks({cell: {"learning_rate": of, "seed": seeds} for cell, of in rates.items()}, look, study)


Outcomes = dict[tuple[Cell, float, int], float]


def _outcomes(study: Study, summary: xr.Dataset) -> Outcomes:
    """What each run contributes, by cell, learning rate and seed: 1 if it diverged, else 0; or its loss, at most ln V."""
    if study.strategy.outcome == "divergence":
        values = summary["diverged"].values.astype(np.float64)
    else:
        values = summary["final_loss"].values.astype(np.float64)
    known = dict(zip(map(str, summary["run"].values), values.tolist(), strict=True))
    if study.strategy.outcome == "loss":
        guessing = {run.identity: math.log(shape_of(run.model).vocabulary) for run in study.runs()}
        known = {identity: float(np.fmin(loss, guessing[identity])) for identity, loss in known.items()}
    cells = by_cell(study.runs())
    return {(cell, run.learning_rate, run.seed): known[run.identity] for cell, runs in cells.items() for run in runs}


def _judged(study: Study, comparison: Comparison, outcomes: Outcomes, look: int, family: int) -> dict[str, Any]:
    """A comparison's looks so far, each on the seeds up to it, and what came of them."""
    settings, rate = study.strategy, comparison.learning_rate
    level, times = settings.alpha / family, _times(study)[:look]
    differences: list[float] = []
    pairs: list[int] = []
    for k in range(1, look + 1):
        for seed in seeds_of_look(study, k):
            ours, theirs = (outcomes.get((cell, rate, seed)) for cell in (comparison.cell, comparison.baseline))
            if ours is not None and theirs is not None:
                differences.append(ours - theirs)
        pairs.append(len(differences))
    values = np.array(differences)
    looks: list[Any]
    if settings.outcome == "divergence":
        first, second = ([int((sign * values[:n] > 0).sum()) for n in pairs] for sign in (1, -1))
        looks = list(sign_looks(first, second, times, level, settings.spending))
    else:
        looks = list(flip_looks(values, pairs, times, level, settings.spending))
    used = values[: pairs[len(looks) - 1]]
    rejected = looks[-1].rejected
    worse = used.sum() > 0
    result = {
        **comparison.cell.label, "learning_rate": rate, "pairs": int(used.size), "looks": len(looks),
        "state": ("worse" if worse else "better") if rejected else "open", "difference": float(used.mean()),
        "spent": looks[-1].spent,
    }  # fmt: skip
    if isinstance(looks[-1], SignLook):
        return result | {"only_recipe": looks[-1].first, "only_baseline": looks[-1].second, "bound": looks[-1].bound}
    bound = float(spending_bounds(times, level, settings.spending)[len(looks) - 1])
    low, high = repeated_interval(used, bound)
    ends = {"low": low, "high": high}
    return result | {key: value if math.isfinite(value) else None for key, value in ends.items()}
