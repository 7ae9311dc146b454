"""The verdict: whether a recipe is as stable as the baseline, how much worse it trains, how much faster it would have to be.

A row a recipe. Which is held against what:

    divergence     at the learning rate that is best for the baseline (see `optimum`), or a stated one, on pairs of the same seed:
                   what happens if the format is exchanged and nothing else is
    window, sensitivity, optimum, loss   over all learning rates: what the format needs to be used well

The answer is about divergence. "as stable": the two shares are shown to differ by less than the margin (see `equivalence`);
"less stable", "more stable": McNemar's exact test shows that they differ and in which direction; "undecided": neither. Where
they are alike the second is wrong with a chance of at most alpha, where they differ by the margin the first is; never both.
Several recipes in one verdict share alpha by Holm's steps, for either question. Nothing is called stable because few seeds
showed nothing.

The break-even speed-up says how many times faster a run has to be to pay for the runs that fail and for the search of a
learning rate. A run that fails is started again, with another seed, until one does not: 1 / (1 - p) runs. A learning rate is
found by trying rates as far apart as the window is wide, so that one must fall into it; S octaves are searched, each trial
costs `search_cost` runs:

    cost = 1 / (1 - p) + search_cost * S / (w + g),    break-even = cost(recipe) / cost(baseline)

p: share diverged at the recipe's own optimum; w: octaves of its window, and g: of the grid's step, since each rate of a grid
stands for half a step to either side; S: of the whole grid, and a step. On an even grid S / (w + g) is rates over rates in the
window. A loss penalty is not in it: what a loss is worth in runs is another question. Its limits are those of p and w of both at
their worst, p's (Clopper and Pearson's) at whichever rate may be the optimum: of each recipe the window, the rates and p have a
sixth of the error each, so that they cover at least as often as they say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from train.equivalence import equivalent_rates, seeds_for_equivalence
from train.optimum import HALF, best_rates, loss_penalty, optimum, optimum_shift, spread
from train.paired import holm
from train.proportions import Pairs, clopper_pearson_interval, mcnemar, paired_interval, pairs_of, wilson_interval
from train.sample_size import seeds_needed
from train.seed_cube import common_rates
from train.sensitivity import described, lr_sensitivity
from train.window import ALLOWED, MARGIN, stable_window, window_difference

HOLDS = ("as stable", "more stable")


@dataclass(frozen=True)
class VerdictSettings:
    """What is asked. margin: of the shares of diverged runs; allowed, loss_margin: of the window.

    alpha: of any recipe called as stable that differs by the margin; and of any called less or more stable that is not.

    learning_rate: where divergence is compared; the baseline's optimum if None.
    """

    margin: float = 0.1
    alpha: float = 0.05
    allowed: float = ALLOWED
    loss_margin: float = MARGIN
    search_cost: float = 0.1
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        for name in ("margin", "alpha"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if not 0 <= self.allowed < 1:
            raise ValueError(f"allowed must be a share from 0 to below 1, got {self.allowed}")
        for name in ("loss_margin", "search_cost"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")


def verdict(
    grid: xr.Dataset, baseline: str, recipes: Sequence[str] | None = None, settings: VerdictSettings | None = None
) -> xr.Dataset:
    """A row for each recipe (all but the baseline if None), then the baseline's own, over recipe: see `VARIABLES`.

    grid: of `seed_grid`. ValueError for a name that is none of its recipes, and a learning rate at which the baseline has no run.
    """
    settings = settings or VerdictSettings()
    names = list(map(str, grid["recipe"].values))
    asked = [name for name in names if name != baseline] if recipes is None else list(recipes)
    for name in (*asked, baseline):
        if name not in names:
            raise ValueError(f"{name!r} has no run here; there are {', '.join(names)}")
    confidence = 1 - settings.alpha
    rate = reference_rate(grid, baseline, settings.learning_rate)
    rows = [_row(grid, name, baseline, rate, settings) for name in dict.fromkeys([*asked, baseline])]
    for p in ("p_differ", "p_equivalent"):
        adjusted = holm([math.nan if row["recipe"] == baseline else row[p] for row in rows])
        for row, of in zip(rows, adjusted.tolist(), strict=True):
            row[f"{p}_holm"] = of
    for row in rows:
        row["state"] = "baseline" if row["recipe"] == baseline else _state(row, settings.alpha)
    kept = grid.sel(recipe=[row["recipe"] for row in rows])
    if "clipped_loss" in grid and common_rates(kept).size:
        found = lr_sensitivity(kept, baseline, confidence)
        short = {"difference": "sensitivity_difference", "difference_low": "sensitivity_difference_low",
                 "difference_high": "sensitivity_difference_high"}  # fmt: skip
        for name in ("sensitivity", "sensitivity_low", "sensitivity_high", *short):
            for row, value in zip(rows, found[name].values.tolist(), strict=True):
                row[short.get(name, name)] = value
    columns = {name: [row[name] for row in rows] for name in VARIABLES if name in rows[0]}
    attrs = {"baseline": baseline, "definition": str(grid.attrs.get("definition", "")), "confidence": confidence}
    attrs |= {name: getattr(settings, name) for name in ("margin", "alpha", "allowed", "loss_margin", "search_cost")}
    return xr.Dataset(
        {name: ("recipe", values, described(VARIABLES[name])) for name, values in columns.items()},
        {"recipe": [row["recipe"] for row in rows]},
        attrs | {"reference_rate": rate},
    )


def reference_rate(grid: xr.Dataset, baseline: str, asked: float | None = None) -> float:
    """The learning rate where divergence is compared: the one asked for, or the baseline's optimum; NaN where it has none."""
    if asked is None:
        return optimum(grid, baseline)
    there = grid["diverged"].sel(recipe=baseline).notnull().any("seed").values
    rates = grid["learning_rate"].values[there]
    near = np.isclose(rates, asked, rtol=1e-9, atol=0.0)
    if not near.any():
        raise ValueError(
            f"{baseline} has no run at learning rate {asked:g}; it has {', '.join(f'{rate:g}' for rate in rates)}"
        )
    return float(rates[near][0])


def _row(grid: xr.Dataset, name: str, baseline: str, rate: float, settings: VerdictSettings) -> dict[str, Any]:
    confidence = 1 - settings.alpha
    row: dict[str, Any] = {"recipe": name, "learning_rate": rate}
    at_rate = grid["diverged"].sel(learning_rate=rate) if math.isfinite(rate) else None
    if at_rate is None:
        k = n = 0
        pairs = Pairs(0, 0, 0, 0)
    else:
        own = at_rate.sel(recipe=name)
        k, n = int(own.sum()), int(own.notnull().sum())
        pairs = pairs_of(own.drop_vars(("recipe", "learning_rate")), at_rate.sel(recipe=baseline, drop=True))
    row |= {"diverged": k, "runs": n, "rate": k / n if n else math.nan}
    row["rate_low"], row["rate_high"] = map(float, clopper_pearson_interval(k, n, confidence))
    row["wilson_low"], row["wilson_high"] = map(float, wilson_interval(k, n, confidence))
    row |= {"pairs": pairs.n, "only_recipe": pairs.first, "only_baseline": pairs.second}
    row["rate_difference"] = pairs.difference
    row["rate_difference_low"], row["rate_difference_high"] = paired_interval(pairs, confidence)
    row["p_differ"], row["p_equivalent"] = mcnemar(pairs), equivalent_rates(pairs, settings.margin).p
    row["pairs_needed"] = math.nan if name == baseline else _needed(pairs, settings)
    row |= _of_windows(grid, name, baseline, settings)
    shift = optimum_shift(grid, name, baseline, confidence)
    row |= {f"optimum_shift{end}": shift[of] for end, of in (("", "shift"), ("_low", "low"), ("_high", "high"))}
    row |= {"optimum": optimum(grid, name), "optimum_censored": shift["censored"]}
    penalty = dict(
        zip(
            ("loss_penalty", "loss_penalty_low", "loss_penalty_high", "loss_pairs"),
            loss_penalty(grid, name, baseline, confidence),
            strict=True,
        )
    )
    row |= penalty
    spreads = spread(grid.sel(recipe=[name]), confidence)
    at = spreads.sel(recipe=name, learning_rate=row["optimum"]) if math.isfinite(row["optimum"]) else None
    for variable in ("sd", "sd_low", "sd_high"):
        row[variable] = math.nan if at is None else float(at[variable])
    return row


def _of_windows(grid: xr.Dataset, name: str, baseline: str, settings: VerdictSettings) -> dict[str, Any]:
    error = settings.alpha
    ours = stable_window(grid, name, settings.allowed, settings.loss_margin, 1 - error)
    each = [stable_window(grid, of, settings.allowed, settings.loss_margin, 1 - error / 2) for of in (name, baseline)]
    apart = (0.0, 0.0, 0.0) if name == baseline else window_difference(*each)
    row: dict[str, Any] = {
        "window": ours.octaves, "window_lowest": ours.lowest, "window_highest": ours.highest, "window_at_least": ours.at_least,
        "window_at_most": math.inf if ours.open_ended else ours.at_most,
        "window_censored_below": ours.censored_below, "window_censored_above": ours.censored_above,
    }  # fmt: skip
    row |= dict(zip(("window_difference", "window_difference_low", "window_difference_high"), apart, strict=True))
    even = dict(
        zip(
            ("break_even", "break_even_low", "break_even_high"), break_even(grid, name, baseline, settings), strict=True
        )
    )
    return row | even


def break_even(grid: xr.Dataset, recipe: str, baseline: str, settings: VerdictSettings) -> tuple[float, float, float]:
    """How many times faster the recipe has to be: the number, its low and high; inf where it never pays.

    1, 1, 1 for the baseline itself. NaN where neither trains.
    """
    if recipe == baseline:
        return 1.0, 1.0, 1.0
    (own, low, high), (theirs, their_low, their_high) = (_cost(grid, name, settings) for name in (recipe, baseline))
    seen = math.nan if math.isinf(own) and math.isinf(theirs) else own / theirs
    # A limit that neither of two infinite costs gives is any number.
    return seen, 0.0 if math.isinf(their_high) else low / their_high, math.inf if math.isinf(high) else high / their_low


def _cost(grid: xr.Dataset, name: str, settings: VerdictSettings) -> tuple[float, float, float]:
    """In runs: what one that trains costs with its search, the least and the most that it may; each at half of alpha."""
    error = settings.alpha / 6
    window = stable_window(grid, name, settings.allowed, settings.loss_margin, 1 - error)
    best = optimum(grid, name)
    if not math.isfinite(best):
        return math.inf, _spent(0.0, window.at_most, grid, settings), math.inf
    own, rates = grid["diverged"].sel(recipe=name).transpose("learning_rate", "seed"), grid["learning_rate"].values
    k, n = own.sum("seed").values, own.notnull().sum("seed").values
    low, high = clopper_pearson_interval(k, n, 1 - error)
    # Among them rates at which more than half failed, where that may be luck: the optimum is one of those where fewer do.
    may = np.isin(rates, best_rates(grid, name, error)) | ((2 * k > n) & (low <= HALF) & (k < n)) | (rates == best)
    at = int(np.flatnonzero(rates == best)[0])
    return (
        _spent(int(k[at]) / int(n[at]), window.octaves, grid, settings),
        _spent(float(low[may].min()), window.at_most, grid, settings),
        _spent(float(high[may].max()), window.at_least, grid, settings),
    )


def _spent(share: float, octaves: float, grid: xr.Dataset, settings: VerdictSettings) -> float:
    """cost(p, w) of the module's formula; inf without a window, and where all fail."""
    if math.isnan(octaves) or share >= 1:
        return math.inf
    rates = np.log2(grid["learning_rate"].values.astype(np.float64))
    step = float(np.diff(rates).mean()) if rates.size > 1 else 1.0
    return float(1 / (1 - share) + settings.search_cost * (rates[-1] - rates[0] + step) / (octaves + step))


def _needed(pairs: Pairs, settings: VerdictSettings) -> float:
    """Pairs in all of which either question would be decided with 80 % power if the truth is as seen, that both are as stable or
    that they are not; NaN where it would take more than are looked for.
    """
    n = max(1, pairs.n)
    alone, apart = (pairs.first + pairs.second) / n, (pairs.first - pairs.second) / n
    alike = seeds_for_equivalence(settings.margin, alone, 0.8, settings.alpha, apart=apart)
    shares = (pairs.both + pairs.second) / n, (pairs.both + pairs.first) / n
    different = seeds_needed(*shares, alpha=settings.alpha, both=pairs.both / n) if apart else None
    return float(min((of for of in (alike, different) if of is not None), default=math.nan))


def _state(row: dict[str, Any], alpha: float) -> str:
    if row["p_equivalent_holm"] <= alpha:
        return "as stable"
    if row["p_differ_holm"] <= alpha:
        return "less stable" if row["only_recipe"] > row["only_baseline"] else "more stable"
    return "undecided"


# Units, long name, and how it is made; low and high are the limits of what stands above them.
VARIABLES: dict[str, tuple[str, str, str]] = {
    "state": ("1", "the verdict", "as stable, more stable, less stable or undecided than the baseline; see train.verdicts"),
    "learning_rate": ("1", "learning rate where divergence is compared", "the baseline's optimum, or as stated"),
    "runs": ("1", "runs there", "whose divergence is known"),
    "diverged": ("1", "runs that diverged there", "by the definition of the study"),
    "rate": ("1", "share of runs that diverged there", "diverged / runs"),
    "rate_low": ("1", "lower limit of the rate", "Clopper and Pearson 1934"),
    "rate_high": ("1", "upper limit of the rate", "Clopper and Pearson 1934"),
    "wilson_low": ("1", "lower limit of the rate", "Wilson 1927"),
    "wilson_high": ("1", "upper limit of the rate", "Wilson 1927"),
    "pairs": ("1", "pairs of runs of the same seed", "recipe and baseline at that learning rate"),
    "only_recipe": ("1", "pairs in which the recipe alone diverged", "count"),
    "only_baseline": ("1", "pairs in which the baseline alone diverged", "count"),
    "rate_difference": ("1", "rate above the baseline's, in pairs", "(only_recipe - only_baseline) / pairs"),
    "rate_difference_low": ("1", "lower limit of that difference", "Tango 1998, score"),
    "rate_difference_high": ("1", "upper limit of that difference", "Tango 1998, score"),
    "p_differ": ("1", "p-value that both diverge alike", "McNemar 1947, exact"),
    "p_differ_holm": ("1", "the same, adjusted for all recipes asked for", "Holm 1979"),
    "p_equivalent": ("1", "p-value that the rates differ by the margin", "two one-sided exact tests; see train.equivalence"),
    "p_equivalent_holm": ("1", "the same, adjusted for all recipes asked for", "Holm 1979"),
    "pairs_needed": ("1", "pairs in all that would decide", "80 % power, if the truth is as seen"),
    "window": ("octaves", "stable window", "see train.window; NaN where no rate is in it"),
    "window_lowest": ("1", "lowest learning rate of the window", "of the grid"),
    "window_highest": ("1", "highest learning rate of the window", "of the grid"),
    "window_at_least": ("octaves", "lower limit of the window", "widest run of rates shown to be in it; NaN: none"),
    "window_at_most": ("octaves", "upper limit of the window", "widest run of rates not shown to be out; inf: touches the end"),
    "window_censored_below": ("1", "the window touches the lowest rate tried", "it is at least this wide"),
    "window_censored_above": ("1", "the window touches the highest rate tried", "it is at least this wide"),
    "window_difference": ("octaves", "window above the baseline's", "as seen, censored or not"),
    "window_difference_low": ("octaves", "lower limit of that difference", "both windows' limits at half the error"),
    "window_difference_high": ("octaves", "upper limit of that difference", "both windows' limits at half the error"),
    "sensitivity": ("nats/token", "LR sensitivity", "Wortsman et al. 2309.14322; see train.sensitivity"),
    "sensitivity_low": ("nats/token", "lower limit of the sensitivity", "contrasts"),
    "sensitivity_high": ("nats/token", "upper limit of the sensitivity", "contrasts"),
    "sensitivity_difference": ("nats/token", "sensitivity above the baseline's", "the same grid and seeds"),
    "sensitivity_difference_low": ("nats/token", "lower limit of that difference", "contrasts"),
    "sensitivity_difference_high": ("nats/token", "upper limit of that difference", "contrasts"),
    "optimum": ("1", "best learning rate", "lowest mean loss of runs that trained, where half of the seeds did"),
    "optimum_shift": ("octaves", "optimum above the baseline's", "log2 of the ratio"),
    "optimum_shift_low": ("octaves", "lower limit of the shift", "of the rates that may be best, see train.optimum"),
    "optimum_shift_high": ("octaves", "upper limit of the shift", "of the rates that may be best, see train.optimum"),
    "optimum_censored": ("1", "an optimum is the lowest or highest rate tried", "it may lie beyond"),
    "loss_penalty": ("nats/token", "final loss above the baseline's", "pairs that trained, each recipe at its own optimum"),
    "loss_penalty_low": ("nats/token", "lower limit of the penalty", "Student's paired bounds, over all rates that may be best"),
    "loss_penalty_high": ("nats/token", "upper limit of the penalty", "Student's paired bounds, over all rates that may be best"),
    "loss_pairs": ("1", "pairs of the loss penalty", "seeds that trained in both"),
    "sd": ("nats/token", "spread over seeds of the final loss at the optimum", "standard deviation of runs that trained"),
    "sd_low": ("nats/token", "lower limit of the spread", "chi-squared, for normal losses"),
    "sd_high": ("nats/token", "upper limit of the spread", "chi-squared, for normal losses"),
    "break_even": ("1", "break-even speed-up", "see train.verdicts; inf: never"),
    "break_even_low": ("1", "lower limit of the break-even speed-up", "limits of failure rate and window at their best"),
    "break_even_high": ("1", "upper limit of the break-even speed-up", "limits of failure rate and window at their worst"),
}  # fmt: skip
