"""Claims that are tested: each in a sentence, with its source, its study, and a rule that is fixed before the study is run.

    [[claims]]
    name = "F3"
    claim = "Three exponent bits fewer make runs fail that train with eight."
    source = "Lee et al. 2405.18710"
    study = "first-look-gpu"        # the name in the study's file
    recipe = "e5m7"
    baseline = "e8m7"
    statistic = "divergence"        # or loss, window, sensitivity, optimum_shift: the recipe's above the baseline's
    expect = "higher"               # or lower; or alike, within `margin`, of divergence and loss
    smallest_n = 8                  # seeds below which nothing is decided
    looks = [8, 32, 128]            # seeds at which it is looked at, and at no other number
    learning_rate = 2e-3            # the baseline's best if not given; of a loss p counts once for each that it was chosen from
    where = {width = 640}           # of a study with further axes, the runs that are meant
    beyond = {width = 64}           # of loss: by how much the difference there exceeds the one here, on the same seeds
    loss_margin = 0.5               # of a window: nats/token above the recipe's own best that are in it; 0.1 if not given
    expected = true                 # exit status 1 if it is refuted

A claim is supported or refuted where its p-value, adjusted by Holm (1979) for all claims of the file, is at most alpha; the sign
of the effect says which. It is judged at the last planned look that its seeds reach, on the first so many seeds, so that adding
seeds one by one decides nothing earlier. p-values hold at all looks together (repeated p-values, Jennison and Turnbull 1989): of
divergence and loss the least alpha whose group-sequential boundary was crossed (see `sequential`), of the others the least over
looks times the number of looks. Claims that are not tested yet count in Holm's steps as much as others do.
"""

from __future__ import annotations

import itertools
import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import xarray as xr
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from train.equivalence import apart_rates, equivalent_means, equivalent_rates
from train.optimum import optimum_shift
from train.paired import holm
from train.proportions import Pairs, paired_interval, pairs_of
from train.sensitivity import lr_sensitivity
from train.sequential import (
    LEAST_ALPHA,
    Spending,
    flip_looks,
    repeated_interval,
    sign_p_value,
    spending_bounds,
)
from train.study import StudyError
from train.verdicts import reference_rate
from train.window import MARGIN, stable_window, window_difference

Statistic = Literal["divergence", "loss", "window", "sensitivity", "optimum_shift"]
State = Literal["supported", "refuted", "undecided", "not tested"]
Floats = npt.NDArray[np.float64]
UNITS = {
    "divergence": "of runs",
    "loss": "nats/token",
    "window": "octaves",
    "sensitivity": "nats/token",
    "optimum_shift": "octaves",
}


def _in_words(where: Any) -> Any:
    """A group's values as `exmy.groups` has them: 640, 1.0 and "python" are "640", "1" and "python"."""
    if not isinstance(where, Mapping):
        return where
    numbers = (int, float)
    return {
        key: str(value).removesuffix(".0") if isinstance(value, numbers) and not isinstance(value, bool) else value
        for key, value in where.items()
    }


Where = Annotated[dict[str, str], BeforeValidator(_in_words)]


class Claim(BaseModel):
    """One claim; see the module."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    claim: str = Field(min_length=1)
    source: str = Field(min_length=1)
    study: str = Field(min_length=1)
    recipe: str
    baseline: str
    statistic: Statistic
    expect: Literal["higher", "lower", "alike"]
    smallest_n: int = Field(ge=1)
    looks: tuple[int, ...] = Field(min_length=1)
    margin: float | None = Field(default=None, gt=0)
    learning_rate: float | None = Field(default=None, gt=0)
    where: Where = Field(default_factory=dict)  # the group of runs, where the study has several: dataset = "python"
    beyond: Where | None = Field(default=None, min_length=1)
    loss_margin: float | None = Field(default=None, gt=0)
    spending: Spending = "obrien-fleming"
    expected: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> Claim:
        if list(self.looks) != sorted(set(self.looks)):
            raise ValueError(f"looks must rise, got {list(self.looks)}")
        if self.looks[0] < self.smallest_n:
            raise ValueError(f"the first look is at {self.looks[0]} seeds, below smallest_n = {self.smallest_n}")
        if self.recipe == self.baseline:
            raise ValueError(f"recipe and baseline are both {self.recipe!r}")
        if self.expect == "alike" and (self.margin is None or self.statistic not in ("divergence", "loss")):
            raise ValueError('expect = "alike" is tested of divergence and loss, and needs a margin')
        if self.expect != "alike" and self.margin is not None:
            raise ValueError('a margin belongs to expect = "alike"')
        if self.beyond is not None and self.statistic != "loss":
            raise ValueError(f"beyond is for differences of loss, and statistic is {self.statistic!r}: leave it out")
        if self.beyond is not None and self.beyond.items() <= self.where.items():
            raise ValueError(f"beyond names the runs that where names, {self.beyond}: name others")
        if self.loss_margin is not None and self.statistic != "window":
            raise ValueError(f"loss_margin is a window's, and statistic is {self.statistic!r}: leave it out")
        return self

    @property
    def elsewhere(self) -> Claim | None:
        """The same claim of the runs that `beyond` names: whatever it does not name is as in `where`; None without it."""
        if self.beyond is None:
            return None
        return self.model_copy(update={"where": {**self.where, **self.beyond}, "beyond": None})


class Claims(BaseModel):
    """A file of claims; alpha: the chance that any of them is decided wrongly."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    alpha: float = Field(default=0.05, gt=0, lt=1)
    claims: tuple[Claim, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _named_apart(self) -> Claims:
        names = [claim.name for claim in self.claims]
        if len(set(names)) < len(names):
            raise ValueError(f"two claims are named {next(name for name in names if names.count(name) > 1)!r}")
        return self


@dataclass(frozen=True)
class Judged:
    """What came of a claim: effect with its limits, which hold at all looks, seeds n, p and Holm's; looks taken, seeds needed.

    more: seeds until its next look, None where there is none. Numbers are NaN where it was not looked at.
    """

    claim: Claim
    state: State
    effect: float
    low: float
    high: float
    n: int
    p: float
    p_holm: float
    looks: int
    more: int | None

    @property
    def used(self) -> int:
        """Seeds of its last look, on which all of it rests; 0 where it was not looked at."""
        return self.claim.looks[self.looks - 1] if self.looks else 0


def read_claims(path: Path) -> Claims:
    """The claims of a TOML file; StudyError, in a line, where it can't be read or a claim is not whole."""
    try:
        return Claims.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise StudyError(f"{path}: {error.strerror}; name a file of claims with --claims") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise StudyError(
            f"{path}: {place + ': ' if place else ''}{first['msg'].removeprefix('Value error, ')}"
        ) from None
    except ValueError as error:
        raise StudyError(f"{path}: not a TOML file: {error}") from None


def judge(claims: Claims, grid_of: Callable[[Claim], xr.Dataset | None]) -> list[Judged]:
    """Every claim; grid_of: the `seed_grid` of a claim's runs, None where its study is not here. ValueError: no such recipe."""
    found = [_at_looks(claim, _grids(claim, grid_of), claims.alpha) for claim in claims.claims]
    adjusted = holm([1.0 if math.isnan(p) else p for _, _, _, _, p, _, _ in found]).tolist()
    judged = []
    for claim, (effect, low, high, n, p, looks, tested), p_holm in zip(claims.claims, found, adjusted, strict=True):
        ahead = [look for look in claim.looks if look > n]
        more = ahead[0] - n if ahead else None
        state: State = "not tested" if not tested else "undecided"
        if p_holm <= claims.alpha:
            state = "supported" if _agrees(claim, effect, low, high) else "refuted"
        judged.append(Judged(claim, state, effect, low, high, n, p, p_holm if looks else math.nan, looks, more))
    return judged


def _agrees(claim: Claim, effect: float, low: float, high: float) -> bool:
    if claim.expect == "alike":
        return abs(effect) < (claim.margin or 0.0)
    # Where one recipe has no window there is no difference of two, and the limits alone say which is the wider.
    above = effect > 0 if math.isfinite(effect) else low > 0
    below = effect < 0 if math.isfinite(effect) else high < 0
    return above if claim.expect == "higher" else below


Found = tuple[float, float, float, int, float, int, bool]  # effect, low, high, n, p, looks, whether its study is here


def _grids(claim: Claim, grid_of: Callable[[Claim], xr.Dataset | None]) -> list[xr.Dataset]:
    """Of the runs that the claim is about, and of those beyond which it goes; none where they are not here."""
    meant = [claim, *([claim.elsewhere] if claim.elsewhere else [])]
    found = [grid for of in meant if (grid := grid_of(of)) is not None]
    return found if len(found) == len(meant) else []


def _at_looks(claim: Claim, grids: Sequence[xr.Dataset], alpha: float) -> Found:
    nothing = (math.nan, math.nan, math.nan, 0, math.nan, 0)
    if not grids:
        return (*nothing, False)
    for grid, name in itertools.product(grids, (claim.recipe, claim.baseline)):
        if name not in grid["recipe"].values:
            raise ValueError(
                f"claim {claim.name}: {name!r} has no run in {claim.study}; it has {', '.join(grid['recipe'].values)}"
            )
    if claim.statistic not in ("divergence", "loss"):
        return _on_seeds(claim, _on_shared_seeds(claim, grids), alpha)
    rates = rates_of(claim, grids)
    if any(map(math.isnan, rates)):
        return (*nothing, True)
    at_rates = [grid.sel(learning_rate=rate) for grid, rate in zip(grids, rates, strict=True)]
    return _on_seeds(claim, _on_shared_seeds(claim, at_rates), alpha, _chosen_among(claim, grids))


def rates_of(claim: Claim, grids: Sequence[xr.Dataset]) -> list[float]:
    """Of each grid the learning rate at which divergence or loss are compared; NaN where the baseline has no best one.

    The one that the claim states, or the baseline's best (see `optimum`) on the seeds of the first look at which it has one: the
    same from there on, however many seeds there are.
    """
    if claim.learning_rate is not None:
        return [reference_rate(grid, claim.baseline, claim.learning_rate) for grid in grids]
    found = []
    for grid in _on_shared_seeds(claim, grids):
        taken = [look for look in claim.looks if look <= grid.sizes["seed"]] or [grid.sizes["seed"]]
        each = (reference_rate(grid.isel(seed=slice(look)), claim.baseline) for look in taken)
        found.append(next((rate for rate in each if math.isfinite(rate)), math.nan))
    return found


def _chosen_among(claim: Claim, grids: Sequence[xr.Dataset]) -> int:
    """From how many rates, or pairs of rates, those were chosen by the losses that are compared there."""
    if claim.learning_rate is not None or claim.statistic != "loss":
        return 1
    tried = [grid["diverged"].sel(recipe=claim.baseline).notnull().any("seed").sum() for grid in grids]
    return math.prod(map(int, tried))


def _on_seeds(claim: Claim, grids: Sequence[xr.Dataset], alpha: float, among: int = 1) -> Found:
    """On the first seeds of each look.

    among: a rate that is the best of several is one at which the baseline's seeds were lucky, so what is held against it there
    looks worse: of alike recipes, at 5 equally good rates, 9 % would be called worse at 5 %. Over all that might have been
    chosen, whichever was, p-values and limits hold by Bonferroni.
    """
    n = grids[0].sizes["seed"]
    taken = [look for look in claim.looks if look <= n]
    if not taken:
        return math.nan, math.nan, math.nan, n, math.nan, 0, True
    if claim.statistic == "divergence":
        effect, low, high, p = _of_rates(claim, grids[0], taken, alpha)
    elif claim.statistic == "loss":
        effect, low, high, p = _of_losses(claim, grids, taken, alpha / among)
    else:
        effect, low, high, p = _of_grids(claim, grids[0], taken, alpha)
    return effect, low, high, n, min(1.0, among * p), len(taken), True


def _on_shared_seeds(claim: Claim, grids: Sequence[xr.Dataset]) -> list[xr.Dataset]:
    """The grids on the seeds at which both recipes have a run in each of them: at some rate, where there are several."""
    shared: list[set[Any]] = []
    for grid in grids:
        there = grid["diverged"].sel(recipe=[claim.recipe, claim.baseline]).notnull()
        there = there.any("learning_rate") if "learning_rate" in there.dims else there
        shared.append(set(grid["seed"].values[there.all("recipe").values].tolist()))
    common = set.intersection(*shared)
    in_order = [seed for seed in grids[0]["seed"].values.tolist() if seed in common]
    return [grid.sel(seed=in_order) for grid in grids]


def _of_rates(
    claim: Claim, at_rate: xr.Dataset, taken: Sequence[int], alpha: float
) -> tuple[float, float, float, float]:
    """Effect, limits and repeated p of divergence at one learning rate, over the first seeds of each look."""
    times, planned = [look / claim.looks[-1] for look in taken], len(claim.looks)
    ours, theirs = (at_rate["diverged"].sel(recipe=name, drop=True) for name in (claim.recipe, claim.baseline))
    tables = [pairs_of(*(of.isel(seed=slice(look)) for of in (ours, theirs))) for look in taken]
    effect, limits = tables[-1].difference, paired_interval(tables[-1], 1 - alpha / planned)
    if claim.expect == "alike":
        return effect, *limits, _least_over_looks([_alike_rates(of, claim.margin or 0.0) for of in tables], planned)
    first, second = [of.first for of in tables], [of.second for of in tables]
    return effect, *limits, sign_p_value(first, second, times, claim.spending)


def _of_losses(
    claim: Claim, at_rates: Sequence[xr.Dataset], taken: Sequence[int], alpha: float
) -> tuple[float, float, float, float]:
    """The same of losses, seed by seed; of a second grid, whose seeds are the same, the difference is taken off."""
    times, planned, last = [look / claim.looks[-1] for look in taken], len(claim.looks), taken[-1]
    differences, *less = [_loss_differences(claim, grid) for grid in at_rates]
    for other in less:
        differences = differences - other
    bound = float(spending_bounds(times, alpha, claim.spending)[-1])
    effect = float(differences[:last].mean())
    low, high = repeated_interval(differences[:last], bound)
    if claim.expect == "alike":
        each = [_alike_means(differences[:look], claim.margin or 0.0) for look in taken]
        return effect, low, high, _least_over_looks(each, planned)
    rejected = _least_alpha(lambda a: flip_looks(differences[:last], taken, times, a, claim.spending)[-1].rejected)
    return effect, low, high, rejected


def _loss_differences(claim: Claim, at_rate: xr.Dataset) -> Floats:
    loss = at_rate["clipped_loss"]
    ours, theirs = (np.asarray(loss.sel(recipe=name).values, np.float64) for name in (claim.recipe, claim.baseline))
    return np.asarray(ours - theirs)


def _alike_rates(pairs: Pairs, margin: float) -> float:
    """Of either decision, alike or apart by more than the margin: twice the smaller p-value."""
    return min(1.0, 2 * min(equivalent_rates(pairs, margin).p, apart_rates(pairs, margin)))


def _alike_means(differences: Floats, margin: float) -> float:
    of = equivalent_means(differences, margin)
    apart = 2 * min(1 - of.p_higher, 1 - of.p_lower)  # that the mean is beyond the margin, in either direction
    return min(1.0, 2 * min(of.p, apart))


def _of_grids(claim: Claim, grid: xr.Dataset, taken: Sequence[int], alpha: float) -> tuple[float, float, float, float]:
    """The same of a statistic over learning rates, from its intervals."""
    planned = len(claim.looks)
    looks = [grid.isel(seed=slice(look)) for look in taken]
    effect, low, high = _interval(claim, looks[-1], 1 - alpha / planned)
    each = [_least_alpha(_excluding(claim, of)) for of in looks]
    return effect, low, high, _least_over_looks(each, planned)


def _interval(claim: Claim, grid: xr.Dataset, confidence: float) -> tuple[float, float, float]:
    if claim.statistic == "window":
        margin = claim.loss_margin or MARGIN
        ours, theirs = (
            stable_window(grid, name, margin=margin, confidence=(1 + confidence) / 2)
            for name in (claim.recipe, claim.baseline)
        )
        return window_difference(ours, theirs)
    if claim.statistic == "sensitivity":
        found = lr_sensitivity(grid.sel(recipe=[claim.recipe, claim.baseline]), claim.baseline, confidence).sel(
            recipe=claim.recipe
        )
        return float(found["difference"]), float(found["difference_low"]), float(found["difference_high"])
    shift = optimum_shift(grid, claim.recipe, claim.baseline, confidence)
    return float(shift["shift"]), float(shift["low"]), float(shift["high"])


def _least_over_looks(each: Sequence[float], planned: int) -> float:
    return min(1.0, planned * min(each))


def _excluding(claim: Claim, grid: xr.Dataset) -> Callable[[float], bool]:
    """Whether the interval at 1 - alpha leaves zero out."""

    def excludes(alpha: float) -> bool:
        _, low, high = _interval(claim, grid, 1 - alpha)
        return low > 0 or high < 0

    return excludes


def _least_alpha(rejects: Callable[[float], bool]) -> float:
    """The least alpha at which a test rejects that does so at all above it, to 2 %; 1 if it never does, LEAST_ALPHA at least."""
    low, high = LEAST_ALPHA, 1.0
    if rejects(low):
        return low
    while low < 0.98 * high:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if rejects(middle) else (middle, high)
    return high if high < 0.99 else 1.0


def by_study(
    grids: Mapping[str, Mapping[tuple[tuple[str, str], ...], xr.Dataset]],
) -> Callable[[Claim], xr.Dataset | None]:
    """`judge`'s grid_of: grids by the study's name and group, ((axis, value), ...); StudyError where no one group is meant."""

    def find(claim: Claim) -> xr.Dataset | None:
        groups = grids.get(claim.study)
        if groups is None:
            return None
        fitting = [key for key in groups if set(claim.where.items()) <= set(key)]
        if len(fitting) != 1:
            labels = "; ".join(", ".join(f"{axis} = {value!r}" for axis, value in key) for key in groups)
            raise StudyError(
                f"claim {claim.name}: where must name one group of {claim.study}, {len(fitting)} fit; there are {labels}"
            )
        return groups[fitting[0]]

    return find
