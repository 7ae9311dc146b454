"""The verdicts of a study as the page shows them: a sentence, the numbers under it, and what its small picture is drawn from.

All of it is `train.verdict`'s, of every recipe of a group against the baseline at once: Holm's steps are over the whole group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from exmy.groups import lost_baseline
from exmy.verdict import measured_rows, sentence
from train import clopper_pearson_interval, seed_grid, verdict

DRAWN = (
    "runs", "diverged", "rate", "rate_low", "rate_high", "window", "window_lowest", "window_highest", "window_censored_below",
    "window_censored_above", "loss_penalty", "loss_penalty_low", "loss_penalty_high", "loss_pairs", "learning_rate",
)  # fmt: skip
OPTION = "exmy verdict's --learning-rate"
AT_A_GLANCE = 3  # verdicts whose sentences are read at once; of more, it is told first which recipes have which
STATES = ("less stable", "as stable", "more stable", "undecided")


def group_verdicts(runs: xr.Dataset, baseline: str) -> dict[str, Any]:
    """The baseline's row and a card for each other recipe; `why` tells that nothing can be held against the baseline: instead
    of cards where it has none, or before them where all of its runs diverged.

    runs: one group's, with what `seed_grid` takes.
    """
    recipes = list(dict.fromkeys(runs["recipe"].values.astype(str).tolist()))
    if baseline not in recipes:
        return {
            "cards": [],
            "why": f"{baseline}, the baseline, has no finished run here: nothing to hold the others against.",
        }
    try:
        found = verdict(seed_grid(runs), baseline)
    except ValueError as error:
        return {"cards": [], "why": f"No verdict: {error}."}
    rows = [
        {str(name): of[name].item() for name in of.data_vars} for of in (found.isel(recipe=i) for i in _places(found))
    ]
    base = rows[-1]
    cards = [
        {
            "recipe": str(found["recipe"].values[i]), "state": rows[i]["state"],
            "sentence": sentence(found.isel(recipe=[i]), OPTION),
            "rows": [list(cells) for cells in measured_rows(rows[i], base)],
            "numbers": {name: rows[i][name] for name in DRAWN},
        }
        for i in range(len(rows) - 1)
    ]  # fmt: skip
    alone = "" if cards else f"{baseline} is the only recipe here: there is nothing to hold against it."
    why = lost_baseline(runs, baseline) or alone
    shown = {name: base[name] for name in DRAWN}
    tally = tallied(cards) if len(cards) > AT_A_GLANCE else {}
    settings = {name: found.attrs[name] for name in ("margin", "alpha", "allowed", "loss_margin", "confidence")}
    return {"cards": cards, "why": why, "tally": tally, "baseline": shown, "settings": settings}


def tallied(cards: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Which recipes have which verdict, those first that something was shown of."""
    states = dict.fromkeys([*STATES, *(card["state"] for card in cards)])
    found = {state: [card["recipe"] for card in cards if card["state"] == state] for state in states}
    return {state: recipes for state, recipes in found.items() if recipes}


def _places(found: xr.Dataset) -> range:
    return range(found.sizes["recipe"])


def share_limits(most: int) -> list[list[list[float]]]:
    """The 95 % limits of Clopper and Pearson's interval of k of n, at [n][k], n up to `most`: where the page looks them up."""
    limits: list[list[list[float]]] = []
    for n in range(most + 1):
        low, high = clopper_pearson_interval(np.arange(n + 1), np.full(n + 1, n))
        limits.append([[round(float(a), 5), round(float(b), 5)] for a, b in zip(low, high, strict=True)] if n else [])
    return limits
