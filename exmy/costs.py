"""What a recipe costs: the losses in which its runs end, against the baseline's, run by run.

Two runs that differ in the recipe alone start from the same weights and read the same batches, so much of what a seed does to
the one's loss it does to the other's, and is gone from their difference. Over the n pairs of a recipe at one learning rate, with
differences of mean d and standard deviation s, Student's paired interval (Student 1908, Biometrika 6:1) is

    d ± t(0.975; n - 1) s / √n

It is about seeds, at this study's size and text, and for each recipe alone. Of many recipes some lie apart by chance, so the
p-values also come adjusted for all of them, by Holm (1979, Scand. J. Statist. 6:65).

A loss that is not finite has no difference: such runs are named beside the mean of the others, never left out in silence. A
diverged run that ends in a finite loss counts like any other. Losses are in nats/token: the validation loss is the evaluation
after a run's last step, the training loss the mean of its last steps, as the study's settings of divergence smooth it.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xarray as xr

from exmy.groups import groups
from exmy.looks import in_order
from train import StudyError
from train.paired import CONFIDENCE as CONFIDENCE
from train.paired import LEAST_PAIRS, Difference, holm, paired
from train.seed_cube import crossed_words

Key = tuple[Hashable, ...]

OF_THE_RECIPE = frozenset({"run", "recipe", "format", "pack_size"})  # coordinates in which paired runs may differ
NAN = float("nan")


@dataclass(frozen=True)
class Cost:
    """One loss of a recipe at one learning rate, nats/token: over the runs where it is finite, and against the baseline's.

    differences: by run, as `Row` names them, of the pairs whose losses are both finite; none for the baseline itself.
    """

    mean: float
    sd: float
    finite: int
    differences: Mapping[str, float]
    difference: Difference


@dataclass(frozen=True)
class Row:
    """A recipe at a learning rate, within a group of runs that may be pooled (see `groups`).

    Runs are named by what tells them apart, such as "seed 3". diverged: by the study's definition; lost: a final loss is not
    finite; unpaired: the baseline has no finished run with the same coordinates; partner_lost: a final loss of that run is not
    finite. The baseline's own row has neither.
    """

    group: str
    learning_rate: float
    recipe: str
    runs: tuple[str, ...]
    diverged: tuple[str, ...]
    lost: tuple[str, ...]
    unpaired: tuple[str, ...]
    partner_lost: tuple[str, ...]
    validation: Cost
    training: Cost


class Panel(NamedTuple):
    """Rows held against one row of the baseline, in the study's order, and that row: None where it has no finished run."""

    label: str
    rows: tuple[Row, ...]
    baseline: Row | None


@dataclass(frozen=True)
class Comparison:
    """Every recipe of a study against one of them; definition: of a diverged run; finished, missing: runs; attrs: the study's.

    crossed: what is to be said where pairs of seeds share one, so that intervals are too short; "" elsewhere.
    """

    name: str
    baseline: str
    definition: str
    finished: int
    missing: int
    rows: tuple[Row, ...]
    attrs: Mapping[str, Any]
    crossed: str = ""

    @property
    def comparisons(self) -> int:
        """How many p-values of the validation loss Holm's adjustment is for."""
        return sum(math.isfinite(row.validation.difference.p) for row in self.rows)

    def panels(self) -> Iterator[Panel]:
        """The rows by group and learning rate."""
        for (group, rate), alike in groupby(self.rows, lambda row: (row.group, row.learning_rate)):
            rows = tuple(alike)
            own = next((row for row in rows if row.recipe == self.baseline), None)
            others = tuple(row for row in rows if row is not own)
            yield Panel(f"learning rate {rate:g}" + (f", {group}" if group else ""), others, own)


def _more_pairs(summary: xr.Dataset, baseline: str) -> str:
    """What to do about too few pairs: more seeds do not help recipes that were trained at other learning rates."""
    own = summary["recipe"].values.astype(str) == baseline
    rates, theirs = (set(summary["learning_rate"].values[chosen].tolist()) for chosen in (own, ~own))
    if theirs and not rates & theirs:
        return (
            f"pairs are of one learning rate, and it was trained at {_listed(rates)}, the others at {_listed(theirs)}"
        )
    return "add seeds, such as seed = 8, or recipes"


def _listed(rates: set[float]) -> str:
    return ", ".join(f"{rate:.3g}" for rate in sorted(rates))


def compare(tree: xr.DataTree, baseline: str | None = None) -> Comparison:
    """Hold every recipe of a study against `baseline`, the study's own where None.

    tree: as `open_study` gives it. StudyError where the baseline has no finished run, or no recipe has two pairs with it.
    """
    summary = with_validation(tree)
    recipes = in_order(summary["recipe"])
    baseline = str(tree.attrs["baseline"]) if baseline is None else baseline
    if baseline not in recipes:
        near = difflib.get_close_matches(baseline, recipes, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(recipes)}"
        raise StudyError(f"baseline {baseline!r} has no finished run in this study; {hint}")
    rows = [row for group in groups(summary) for row in _rows(summary.isel(run=group.runs), group.label, baseline)]
    most = max(len(row.validation.differences) for row in rows)
    if most < LEAST_PAIRS:
        raise StudyError(
            f"an interval needs at least {LEAST_PAIRS} pairs of runs with finite losses, and no recipe has more than {most} with "
            f"{baseline!r}: {_more_pairs(summary, baseline)}"
        )
    name, word = str(tree.attrs.get("name", "")), str(summary["diverged"].attrs["definition"])
    finished = summary.sizes["run"]
    return Comparison(
        name, baseline, f"{word}: {summary[word].attrs['source']}", finished, int(tree.attrs["runs_planned"]) - finished,
        tuple(_adjusted(rows)), {str(key): value for key, value in tree.attrs.items()},
        crossed_words(summary),
    )  # fmt: skip


def _adjusted(rows: list[Row]) -> Iterator[Row]:
    """The rows with Holm's p-values, of each loss over all rows."""
    validation = holm([row.validation.difference.p for row in rows]).tolist()
    training = holm([row.training.difference.p for row in rows]).tolist()
    for row, p, q in zip(rows, validation, training, strict=True):
        yield replace(row, validation=_with_p(row.validation, p), training=_with_p(row.training, q))


def _with_p(cost: Cost, p_holm: float) -> Cost:
    return replace(cost, difference=replace(cost.difference, p_holm=p_holm))


def with_validation(tree: xr.DataTree) -> xr.Dataset:
    """/summary with `final_validation_loss` (run): the evaluation after the run's last step."""
    loss = tree["evaluation"].to_dataset()["validation_loss"].transpose("run", "eval_step")
    updates = tree["history"].to_dataset()["last_step"].values + 1
    # Where the lengths of runs vary, a shorter one's later columns are padding.
    last = np.searchsorted(loss["eval_step"].values, updates, side="right") - 1
    final = loss.values[np.arange(last.size), last].astype(np.float64)
    return tree["summary"].to_dataset().assign(final_validation_loss=("run", final))


def _rows(runs: xr.Dataset, group: str, baseline: str) -> Iterator[Row]:
    rates, names = runs["learning_rate"].values, runs["recipe"].values.astype(str)
    for rate in np.unique(rates).tolist():
        here = rates == rate
        partners = _Losses.of(runs, here & (names == baseline))
        for name in dict.fromkeys(names[here].tolist()):
            own = _Losses.of(runs, here & (names == name))
            yield own.row(group, rate, name, None if name == baseline else partners)


class _Losses(NamedTuple):
    """The runs of one recipe at one rate: their names, which diverged, and both final losses, by their coordinates."""

    names: dict[Key, str]
    diverged: dict[Key, bool]
    validation: dict[Key, float]
    training: dict[Key, float]

    @classmethod
    def of(cls, runs: xr.Dataset, chosen: npt.NDArray[np.bool_]) -> _Losses:
        def own(name: Hashable) -> npt.NDArray[Any]:
            return np.asarray(runs.variables[name].values[chosen])

        same = [name for name in runs.coords if name not in OF_THE_RECIPE and runs.variables[name].dims == ("run",)]
        keys = list(zip(*(own(name).tolist() for name in same), strict=True))
        columns = (
            _names(own),
            own("diverged").astype(bool).tolist(),
            *(own(name).astype(np.float64).tolist() for name in ("final_validation_loss", "final_loss")),
        )
        return cls(*(dict(zip(keys, column, strict=True)) for column in columns))

    def lost(self, key: Key) -> bool:
        return not (math.isfinite(self.validation[key]) and math.isfinite(self.training[key]))

    def row(self, group: str, rate: float, recipe: str, against: _Losses | None) -> Row:
        """against: the baseline's runs in the same group, at the same rate; None for the baseline itself."""

        def called(condition: Callable[[Key], bool]) -> tuple[str, ...]:
            return tuple(name for key, name in self.names.items() if condition(key))

        return Row(
            group, rate, recipe,
            runs=tuple(self.names.values()),
            diverged=called(lambda key: self.diverged[key]),
            lost=called(self.lost),
            unpaired=called(lambda key: against is not None and key not in against.names),
            partner_lost=called(lambda key: against is not None and key in against.names and against.lost(key)),
            validation=_cost(self.validation, against.validation if against else {}, self.names),
            training=_cost(self.training, against.training if against else {}, self.names),
        )  # fmt: skip


def _names(own: Callable[[str], npt.NDArray[Any]]) -> list[str]:
    """By the seed, or by both seeds where that does not tell the runs apart; own: a coordinate of the runs, by its name."""
    seeds = own("seed").tolist()
    if len(set(seeds)) == len(seeds):
        return [f"seed {seed}" for seed in seeds]
    both = zip(own("init_seed").tolist(), own("data_seed").tolist(), strict=True)
    return [f"init_seed {weights} data_seed {batches}" for weights, batches in both]


def _cost(own: Mapping[Key, float], partners: Mapping[Key, float], names: Mapping[Key, str]) -> Cost:
    finite = np.array([loss for loss in own.values() if math.isfinite(loss)], np.float64)
    mean = float(finite.mean()) if finite.size else NAN
    sd = float(finite.std(ddof=1)) if finite.size > 1 else NAN
    both = {names[key]: loss - partners[key] for key, loss in own.items() if key in partners}
    differences = {name: value for name, value in both.items() if math.isfinite(value)}
    return Cost(mean, sd, finite.size, differences, paired(list(differences.values())))
