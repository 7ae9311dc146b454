"""Is sharpness at the logits ordered by bits over training? Of the study of mantissa bits: medians over seeds at probe steps, and
in how many pairs of seeds a recipe ends sharper than the baseline.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import xarray as xr

from exmy.findings.numbers import reference
from exmy.findings.studies import Evidence, Part
from exmy.findings.tables import NONE, headed, line, named, rate_words, share, shown

MEASURE, EPSILON = "logit_sharpness", 5e-4
STUDY = "mantissa"


def sharpness_by_bits(evidence: Evidence) -> Iterator[str]:
    """A table a part with a row a recipe, the baseline first, then the more bits the sooner; nothing without sharpness."""
    if "sharpness" not in evidence.tree:
        return
    sharpness = evidence.tree["sharpness"].to_dataset()[MEASURE].sel(epsilon=EPSILON, method="nearest")
    for part in evidence.parts:
        rate = reference(evidence, part)
        own = at_rate(sharpness, part, rate)
        if not own.sizes["run"]:
            continue
        where = f", {part.label}" if part.label else ""
        yield (
            f"Of [study `{STUDY}`](#study-{STUDY}), at {rate_words(rate)}{where}, its baseline's best: the median over seeds of "
            f"sharpness at the logits, epsilon {EPSILON:g}, mean over the probe's tokens, in %, after so many steps; and in how "
            "many pairs of seeds a recipe ends sharper than the baseline."
        )
        yield ""
        steps = [f"{step:,}" for step in own["probe_step"].values.tolist()]
        yield from headed(("recipe", *steps, f"sharper than `{evidence.baseline}` at the end [95 %]"))
        ends: list[tuple[str, float]] = []
        for recipe in by_bits(evidence, part):
            of = own.isel(run=own["recipe"].values.astype(str) == recipe)
            if of.sizes["run"]:
                medians = np.median(np.where(np.isfinite(of.values), of.values, np.inf), axis=0).tolist()
                ends.append((recipe, medians[-1]))
                sharper = NONE if recipe == evidence.baseline else share(*pairs_sharper(own, recipe, evidence.baseline))
                yield line([named(evidence, recipe), *(shown(value, ".4f") for value in medians), sharper])
        yield ""
        yield _in_order([one for one in ends if one[0] != evidence.baseline])
        yield ""


def _in_order(ends: list[tuple[str, float]]) -> str:
    """Whether the last medians rise as bits go; ends: (recipe, median), the most bits first."""
    below = [
        f"`{recipe}` ({value:.4f}) below `{more}` ({before:.4f})"
        for (more, before), (recipe, value) in itertools.pairwise(ends)
        if value < before
    ]
    return (
        f"At the end it is not in the order of the bits: {', '.join(below)}."
        if below
        else "At the end it is in the order of the bits."
    )


def at_rate(sharpness: xr.DataArray, part: Part, rate: float) -> xr.DataArray:
    """The sharpness (run, probe_step) of a part's runs at a learning rate."""
    runs = part.runs["run"].values[part.runs["learning_rate"].values == rate]
    return sharpness.sel(run=runs).transpose("run", "probe_step")


def by_bits(evidence: Evidence, part: Part) -> list[str]:
    """The baseline, then by mantissa bits, the most first."""

    def bits(recipe: str) -> int:
        return part.numerics(recipe).mantissa_bits or 0

    return sorted(part.recipes, key=lambda recipe: (recipe != evidence.baseline, -bits(recipe)))


def pairs_sharper(own: xr.DataArray, recipe: str, baseline: str) -> tuple[int, int]:
    """In how many pairs of the same seeds the recipe's last sharpness is above the baseline's, and of how many; NaN is above."""
    last: dict[str, dict[tuple[int, int], float]] = {}
    for name in (recipe, baseline):
        of = own.isel(run=own["recipe"].values.astype(str) == name)
        seeds = zip(of["init_seed"].values.tolist(), of["data_seed"].values.tolist(), strict=True)
        last[name] = dict(zip(seeds, np.nan_to_num(of.values[:, -1], nan=np.inf).tolist(), strict=True))
    both = last[recipe].keys() & last[baseline].keys()
    return sum(last[recipe][seed] > last[baseline][seed] for seed in both), len(both)
