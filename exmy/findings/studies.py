"""The studies behind the findings: opened where they are committed, and their runs sorted by what a figure puts on its axes.

A study that is not there, or of which no run is finished, is no error: the page says so. A study may vary more than recipe, rate
and seed; what else it varies parts it into groups (see `groups`), and nothing is pooled over them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from exmy.costs import Comparison, compare, with_validation
from exmy.groups import Group, groups
from exmy.looks import in_order
from formats import ElementFormat, FloatFormat, Rounding, ScaledFormat, get_format
from train import StudyError, VerdictSettings, open_study, seed_grid, study_runs, verdict
from train.digest import has_digest
from train.directory import STUDY_FILE, pack_files, study_of
from train.plan import shape_of
from train.recipe import Recipe
from train.study import Run, Study

STUDIES = ("seeds", "mantissa", "conditions", "exponent", "rounding", "scaling", "size")
ROUNDINGS = {
    Rounding.TOWARD_ZERO: "toward zero",
    Rounding.NEAREST_EVEN: "nearest even",
    Rounding.STOCHASTIC: "stochastic",
}
OF_SIZE = frozenset({"model", "preset", "architecture", "layers", "heads", "kv_heads", "width", "hidden"})
SWITCHES = {
    ("clip", "inf"): "no clipping",
    ("warmup", "0"): "no warm-up",
    ("products", "all"): "attention's products too",
    ("products", "linears"): "linear layers alone",
    ("lm_head", "body"): "LM head in the recipe's formats",
    ("mlp", "gelu"): "GELU",
    ("mlp", "swiglu"): "SwiGLU",
}


@dataclass(frozen=True)
class Numerics:
    """A recipe by its bits: None where its operands differ in them. rounding: "native" for the hardware's own products.

    scaling: "unscaled", or who shares a scale. loss_scale: a number, or None for a dynamic one.
    """

    rounding: str
    exponent_bits: int | None
    mantissa_bits: int | None
    scaling: str
    loss_scale: float | None

    @property
    def native(self) -> bool:
        """Whether the hardware's own products are taken."""
        return self.rounding == "native"


def numerics_of(recipe: Recipe) -> Numerics:
    """A recipe's bits, rounding and scales, as its blocks' linears have them."""
    structure = recipe.body.structure
    if structure.native is not None:
        f = get_format(structure.native) if structure.native != "fp64" else None
        e, m = (f.exponent_bits, f.mantissa_bits) if isinstance(f, FloatFormat) else (None, None)
        return Numerics("native", e, m, "unscaled", recipe.loss_scale)
    own = [recipe.body.activation, recipe.body.weight, recipe.body.gradient]
    if structure.rules is None:
        formats: list[Any] = own
        roundings = {structure.rounding}
    else:
        rules = [(own[i], rule) for i, of in enumerate(structure.rules.by_role().values()) for rule in of]
        formats = [given if rule.format is None else get_format(rule.format) for given, rule in rules]
        roundings = {rule.rounding for _, rule in rules}
    elements = [f.element if isinstance(f, ScaledFormat) else f for f in formats]
    e, m = (_one([_bits(f, which) for f in elements]) for which in ("exponent_bits", "mantissa_bits"))
    rounding = ROUNDINGS.get(next(iter(roundings)), str(next(iter(roundings)))) if len(roundings) == 1 else "mixed"
    scalings = {_scaling(f) for f in formats}
    return Numerics(rounding, e, m, scalings.pop() if len(scalings) == 1 else "mixed", recipe.loss_scale)


def _bits(f: ElementFormat | None, which: str) -> int | None:
    return getattr(f, which) if isinstance(f, FloatFormat) else None


def _one(values: Sequence[int | None]) -> int | None:
    return values[0] if len(set(values)) == 1 else None


def _scaling(f: object) -> str:
    if not isinstance(f, ScaledFormat):
        return "unscaled"
    sizes = "×".join(map(str, f.group))
    return {"tensor": "per tensor", "row": "per row"}.get(f.granularity.value, f"{f.granularity.value}s of {sizes}")


@dataclass(frozen=True, eq=False)
class Part:
    """The runs of a study that may be pooled. runs: those of /summary with `final_validation_loss`; of: a run of each recipe.

    label: where the group stands on the study's further axes, empty where it has none.
    """

    label: str
    where: Mapping[str, str]
    runs: xr.Dataset
    of: Mapping[str, Run]

    @property
    def key(self) -> str:
        """The group as `compare` calls it."""
        return ", ".join(f"{axis} {value}" for axis, value in self.where.items())

    @cached_property
    def grid(self) -> xr.Dataset:
        """The runs as a cube, see `seed_grid`."""
        return seed_grid(self.runs)

    @cached_property
    def names(self) -> npt.NDArray[np.str_]:
        """Each run's recipe, [runs]."""
        return self.runs["recipe"].values.astype(str)

    @cached_property
    def recipes(self) -> list[str]:
        """In the order of their first runs."""
        return in_order(self.runs["recipe"])

    @cached_property
    def rates(self) -> list[float]:
        """Learning rates, rising."""
        return [float(rate) for rate in np.unique(self.runs["learning_rate"].values)]

    @property
    def sample(self) -> Run:
        """Any run: what all of them share."""
        return next(iter(self.of.values()))

    @cached_property
    def parameters(self) -> int:
        """Of a model of this part."""
        return shape_of(self.sample.model).size

    def numerics(self, recipe: str) -> Numerics:
        """A recipe by its bits."""
        return numerics_of(self.of[recipe].recipe)


@dataclass(frozen=True, eq=False)
class Evidence:
    """A study that is there, with at least one finished run. runs: the finished ones, by identity."""

    name: str
    directory: Path
    tree: xr.DataTree
    study: Study
    runs: Mapping[str, Run]

    @property
    def baseline(self) -> str:
        """The recipe that the others are held against."""
        return str(self.tree.attrs["baseline"])

    @property
    def planned(self) -> int:
        """Runs of the study, finished or not."""
        return int(self.tree.attrs["runs_planned"])

    @cached_property
    def summary(self) -> xr.Dataset:
        """All runs, with their first and their last validation and training losses."""
        both = study_runs(self.tree)
        return both.assign(final_validation_loss=with_validation(self.tree)["final_validation_loss"].variable)

    @cached_property
    def parts(self) -> list[Part]:
        """The groups of runs, in the study's order."""
        found = groups(self.summary)
        said = self._labels(found)
        return [self._part(group, label) for group, label in zip(found, said, strict=True)]

    def _part(self, group: Group, label: str) -> Part:
        own = self.summary.isel(run=group.runs)
        of: dict[str, Run] = {}
        for identity, recipe in zip(own["run"].values.tolist(), own["recipe"].values.astype(str).tolist(), strict=True):
            of.setdefault(recipe, self.runs[identity])
        return Part(label, group.where, own, of)

    def _labels(self, found: Sequence[Group]) -> list[str]:
        """Where the model's name only repeats its width or its layers, it is left out."""
        axes = [axis for axis in found[0].where if axis != "model" or not {"width", "layers"} & set(found[0].where)]
        return [", ".join(axis_words(axis, group.where[axis]) for axis in axes) for group in found]

    @cached_property
    def comparison(self) -> Comparison | str:
        """What each recipe costs in every group, or why that can't be said."""
        try:
            return compare(self.tree)
        except StudyError as error:
            return str(error)

    @cached_property
    def verdicts(self) -> list[xr.Dataset | str]:
        """The verdict on all recipes of each part, or why there is none."""
        return [self.verdict_at(part) for part in self.parts]

    def verdict_at(self, part: Part, rate: float | None = None) -> xr.Dataset | str:
        """The same with divergence compared at a learning rate; at the baseline's best if None."""
        if self.baseline not in part.recipes:
            return f"{self.baseline} has no finished run here, so nothing is held against it"
        try:
            return verdict(part.grid, self.baseline, settings=VerdictSettings(learning_rate=rate))
        except ValueError as error:
            return str(error)


def sizes_apart(parts: Sequence[Part]) -> dict[str, list[Part]]:
    """The parts that differ in the model's size alone together, smallest first, by where they are on other axes, in words."""
    found: dict[str, list[Part]] = {}
    for part in parts:
        words = [axis_words(axis, value) for axis, value in part.where.items() if axis not in OF_SIZE]
        found.setdefault(", ".join(words), []).append(part)
    return {words: sorted(of, key=lambda part: part.parameters) for words, of in found.items()}


def axis_words(axis: str, value: str) -> str:
    """A place on an axis in words, such as "no clipping", "12 layers" or "loss scale 2^-8"."""
    if (axis, value) in SWITCHES:
        return SWITCHES[axis, value]
    if axis == "loss_scale":
        return f"loss scale {power(float(value))}" if _number(value) else f"{value} loss scale"
    if axis == "lm_head":
        return f"LM head in {value}"
    if axis in ("layers", "steps", "sequences"):
        return f"{int(value):,} {axis}" if value.isdigit() else f"{axis} {value}"
    return f"{ {'warmup': 'warm-up', 'model': '', 'dataset': ''}.get(axis, axis.replace('_', ' ')) } {value}".strip()


def _number(value: str) -> bool:
    try:
        return math.isfinite(float(value))
    except ValueError:
        return False


def power(value: float) -> str:
    """A power of two as one, "2^-8"; another number as it is; 1 as 1."""
    exponent = math.log2(value)
    return f"2^{exponent:.0f}" if exponent == round(exponent) and value != 1 else f"{value:g}"


def load(results: Path, name: str) -> Evidence | str:
    """A study by its name in a folder of them, or in words why it is not there. StudyError for a damaged one."""
    directory = results / name
    if not (directory / STUDY_FILE).is_file():
        return "not yet run"
    study = study_of(directory)
    if not pack_files(directory) and not has_digest(directory):
        return f"begun, and none of its {len(study.design()):,} runs is finished"
    tree = open_study(directory)
    there = set(tree["summary"].to_dataset()["run"].values.tolist())
    return Evidence(name, directory, tree, study, {run.identity: run for run in study.runs() if run.identity in there})


def usual(parts: Sequence[Part]) -> dict[str, str]:
    """For each further axis the value that most groups have, of equally many the first: what the others depart from."""
    return {
        axis: Counter(part.where[axis] for part in parts).most_common(1)[0][0]
        for axis in (parts[0].where if parts else {})
    }


def departures(part: Part, parts: Sequence[Part]) -> str:
    """What sets a group apart from the usual one, in words; "as usual" for that."""
    common = usual(parts)
    axes = [axis for axis in common if part.where[axis] != common[axis]]
    if {"width", "layers"} & set(axes):
        axes = [axis for axis in axes if axis != "model"]
    return ", ".join(axis_words(axis, part.where[axis]) for axis in axes) or "as usual"


Available = Mapping[str, Evidence | str]


def load_all(results: Path, told: Callable[[int, int], None] = lambda _done, _of: None) -> dict[str, Evidence | str]:
    """All studies of the findings, by name; told: how many are read, of how many."""
    found: dict[str, Evidence | str] = {}
    for done, name in enumerate(STUDIES):
        told(done, len(STUDIES))
        found[name] = load(results, name)
    return found
