"""A study: what to train, validated before any work starts, and the runs that it multiplies out to.

`[axes]` are multiplied out, every combination is one run; any field of `[model]`, `[training]` or `[data]` may be an axis
too. `[[more]]` are further blocks of axes, for studies that are no full grid. Every other table has defaults: see `settings` for
the tables and `study_file` for how a study is read from TOML.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import tomli_w
from pydantic import AfterValidator, Field, PrivateAttr, TypeAdapter, ValidationError, model_validator

from train.alarm_rules import check_recorded, rules_of
from train.axes import Axes
from train.blocks import BLOCKS_LIMIT, Block, block_axes, separate_seeds
from train.corruption import Corruption
from train.presets import ARCHITECTURES
from train.recipe import Recipe
from train.recipe_table import AXES, RecipeTable
from train.resolve import resolve_recipe
from train.selection import Selection, selection
from train.settings import (
    NAME_LIMIT,
    RUNS_LIMIT,
    SETTINGS_LIMIT,
    AlarmsTable,
    DataSettings,
    DivergenceTable,
    ExecutionTable,
    ModelSettings,
    ProbeSettings,
    SignalsTable,
    Table,
    TrainingSettings,
    check_folder_name,
)
from train.strategy_table import StrategyTable
from train.text import dataset_label

IDENTITY_VERSION = 1
WORDS = TypeAdapter(RecipeTable)


class StudyError(ValueError):
    """A study that can't be run; the message is one line that says where, what and how to mend it."""


@dataclass(frozen=True)
class TokenStream:
    """What decides a run's tokens: the text as the study names it, how it is tokenised and corrupted."""

    dataset: str
    tokenizer: str
    corruption: Corruption

    @property
    def key(self) -> str:
        """In words, and different for different tokens: "english as bpe-4096, noise 0.1"; a path's last part for a path."""
        words = dataset_label(self.dataset) + (f" as {self.tokenizer}" if self.tokenizer != "bytes" else "")
        return f"{words}, {self.corruption}" if self.corruption else words


@dataclass(frozen=True)
class IdentityWords:
    """An identity's text around a run's own rate and seeds, and what the text was made of.

    A study's runs are many and what they are made of is little: made once for all that share it, the text leaves a run no more to
    do than to hash it.
    """

    parts: tuple[Any, ...]
    before: str
    between: str
    after: str

    @property
    def text(self) -> str:
        """All of it, with gaps for the rate and the seeds."""
        return f"{self.before}_{self.between}_{self.after}"

    def serve(self, parts: tuple[Any, ...]) -> bool:
        """Whether a run of these parts has this text: they are the very objects."""
        return all(map(operator.is_, self.parts, parts))


@dataclass(frozen=True)
class Grid:
    """Every family of the same words, at every rate, of every pair of seeds."""

    families: frozenset[str]
    rates: frozenset[str]
    seeds: frozenset[tuple[int, int]]

    def __len__(self) -> int:
        """Its runs; one that the axes make twice counts once."""
        return len(self.families) * len(self.rates) * len(self.seeds)

    @property
    def content(self) -> list[Any]:
        """For a hash."""
        return [sorted(self.families), sorted(self.rates), sorted(self.seeds)]


@dataclass(frozen=True)
class Design:
    """Which runs a study has: those of [axes] and of each block, of which `count` are different."""

    grids: tuple[Grid, ...]
    count: int

    def __len__(self) -> int:
        return self.count

    def __contains__(self, run: Run) -> bool:
        words = run.words if run.words is not None and run.words.serve(run.parts) else run.identity_words()
        rate, seeds = _as_json(run.learning_rate), (run.init_seed, run.data_seed)
        return any(words.text in g.families and rate in g.rates and seeds in g.seeds for g in self.grids)

    @property
    def hash(self) -> str:
        """16 hex digits; designs of one hash have the same runs, whatever version of exmy worked their identities out."""
        return hashlib.sha256(json.dumps([grid.content for grid in self.grids]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Run:
    """One run of a study, wholly resolved. Two runs with equal identity give the same numbers.

    `dataset` is the text's name, or the last part of its path: `stream` has the whole path. `words` save work where they serve,
    and decide nothing.
    """

    recipe: Recipe
    learning_rate: float
    init_seed: int
    data_seed: int
    dataset: str
    model: ModelSettings
    training: TrainingSettings
    probe: ProbeSettings
    extra_axes: tuple[tuple[str, Any], ...] = ()
    data: DataSettings = field(default_factory=DataSettings)
    path: str | None = None
    signals: SignalsTable = field(default_factory=SignalsTable)
    words: IdentityWords | None = field(default=None, compare=False, repr=False)
    # Not a cached property, which would give each of a million runs a dictionary for the garbage collector to look at.
    _identity: str | None = field(default=None, init=False, compare=False, repr=False)

    @property
    def stream(self) -> TokenStream:
        """Which tokens the run reads."""
        return TokenStream(self.path or self.dataset, self.model.tokenizer, self.data.corruption)

    @property
    def seed(self) -> int:
        """The run's seed where both are equal; the data seed otherwise."""
        return self.data_seed

    @property
    def _recipe_words(self) -> list[str]:
        """Axes that change words of recipes: two of their values can mean the same, and are two runs all the same."""
        return [f"{key}={word}" for key, word in self.extra_axes if key in AXES]

    @property
    def parts(self) -> tuple[Any, ...]:
        """What decides the run's numbers, its rate and its seeds apart."""
        return (self.recipe, self.dataset, self.model, self.training, self.probe, self.data, self.extra_axes)

    def identity_words(self) -> IdentityWords:
        """The text of the run's identity, for it and for those that differ from it in the rate and the seeds alone."""
        settings: list[Table] = [self.model, self.training, self.probe]
        if self.data != DataSettings():  # a table that runs of before did not have
            settings.append(self.data)
        content = {
            "version": IDENTITY_VERSION,
            "recipe": [self.recipe.name, self.recipe.arithmetic, *self._recipe_words],
            "dataset": self.dataset,
            # A preset counts by what it came to, and whose weights are kept changes no number.
            "settings": [
                table.model_dump(mode="json", exclude_defaults=True, exclude={"preset", "snapshots"})
                for table in settings
            ],
        }
        # In the order in which JSON sorts the keys, "learning_rate" and "seeds" between them.
        dataset, recipe, tables, version = (
            json.dumps({key: content[key]}, sort_keys=True)[1:-1] for key in sorted(content)
        )
        return IdentityWords(
            self.parts, f'{{{dataset}, "learning_rate": ', f', {recipe}, "seeds": [', f"], {tables}, {version}}}"
        )

    @property
    def identity(self) -> str:
        """24 hex digits over everything that decides the run's numbers, the device and the pack's size apart.

        Settings count where they differ from their defaults, so that a setting added later, whose default is what runs did
        before, leaves finished runs finished. Whoever changes a default raises IDENTITY_VERSION. A text counts by its name,
        without the place where it lies, so that one that moves is the same; that it still holds the same is `execute`'s to see.
        """
        if self._identity is not None:
            return self._identity
        words = self.words
        if words is None or not words.serve(self.parts):
            words = self.identity_words()
        identity = identity_of(words, _as_json(self.learning_rate), f"{self.init_seed}, {self.data_seed}")
        object.__setattr__(self, "_identity", identity)
        return identity


def _as_json(rate: float) -> str:
    """As json.dumps writes it, which takes a microsecond for a number."""
    return float.__repr__(rate) if isinstance(rate, float) else json.dumps(rate)


def identity_of(words: IdentityWords, rate: str, seeds: str) -> str:
    """The identity of a run of these words; its rate and "init seed, data seed" as JSON writes them."""
    text = f"{words.before}{rate}{words.between}{seeds}{words.after}"
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _tick(key: str, word: Any, tables: tuple[Table, ...]) -> Any:
    """An axis' value as it is shown: a field's as validated, a list of words as one, a recipe's word as written."""
    value = next((getattr(table, key) for table in tables if key in type(table).model_fields), word)
    return ("+".join(value) or "none") if isinstance(value, list) else value


def _read_words(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Words of recipes as their table reads them; ValueError, in a line, for those that mean nothing."""
    try:
        table = WORDS.validate_python(dict(changes))
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"axes.{first['loc'][0]}: {message}, got {first['input']!r}") from None
    return {key: getattr(table, key) for key in changes}


def _check_axis(key: str) -> None:
    """ValueError, with the nearest name, for an axis that no table has."""
    known = {*ModelSettings.model_fields, *TrainingSettings.model_fields, *DataSettings.model_fields, *AXES}
    if key not in known:
        near = difflib.get_close_matches(key, [*known, *Axes.model_fields], n=1)
        hint = (
            f"; did you mean {near[0]!r}?"
            if near
            else "; it must be a field of [model], [training] or [data], or a word of a recipe"
        )
        raise ValueError(f"axes.{key} is no axis{hint}")


def _recipe_changes(axes: Axes) -> Iterator[dict[str, Any]]:
    """Every combination of the axes that name words of recipes."""
    extra = {key: values for key, values in (axes.model_extra or {}).items() if key in AXES}
    for values in itertools.product(*extra.values()):
        yield dict(zip(extra, values, strict=True))


def _seeds(axes: Axes) -> list[tuple[int, int]]:
    """Every run's initial seed and data seed."""
    if separate_seeds(axes):
        return list(itertools.product(axes.init_seed or [0], axes.data_seed or [0]))
    return [(s, s) for s in axes.seed]


def in_words(error: ValueError) -> str:
    """What a table refused, without pydantic's frame."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"] if not isinstance(part, int))
    message = first["msg"].removeprefix("Value error, ")
    return f"{key}: {message}, got {first['input']!r}" if key else message


class Study(Table):
    """A validated study. `Study(...)` takes the tables as keywords; `study_file.read_study` takes a TOML file.

    name      of the study, and of its directory in runs; a folder's name
    baseline  the recipe of [axes] that the others are held against (default: the first)
    """

    name: Annotated[str, AfterValidator(check_folder_name)] = "study"
    baseline: str | None = None
    axes: Axes
    more: list[Block] = Field(default_factory=list, max_length=BLOCKS_LIMIT)
    strategy: StrategyTable = StrategyTable()
    model: ModelSettings = ModelSettings()
    training: TrainingSettings = TrainingSettings()
    data: DataSettings = DataSettings()
    probe: ProbeSettings = ProbeSettings()
    signals: SignalsTable = SignalsTable()
    alarms: AlarmsTable = AlarmsTable()
    divergence: DivergenceTable = DivergenceTable()
    execution: ExecutionTable = ExecutionTable()
    recipes: dict[str, RecipeTable] = Field(default_factory=dict)
    _recipes: dict[tuple[str, str], Recipe] = PrivateAttr(default_factory=dict)
    _blocks: list[Axes] = PrivateAttr(default_factory=list)

    @model_validator(mode="after")
    def _hangs_together(self) -> Study:
        self._blocks = [self.axes, *(block_axes(self.axes, block, i) for i, block in enumerate(self.more, 1))]
        self._check_size()
        for number, axes in enumerate(self._blocks):
            try:
                self._check_block(axes)
            except ValueError as error:
                if not number:
                    raise
                raise ValueError(f"more, block {number}: {in_words(error)}") from None
        if self.baseline is not None and self.baseline not in self.recipes_named:
            raise ValueError(
                f"baseline {self.baseline!r} is not among axes.recipe: {', '.join(self.recipes_named)}; name one of these, "
                f"as in --set baseline={self.recipes_named[0]}"
            )
        self._check_snapshots()
        try:
            check_recorded(rules_of(self.alarms.thresholds), self.probe, self.signals)
        except ValueError as error:
            raise ValueError(f"alarms.thresholds: {error}") from None
        return self

    def _check_snapshots(self) -> None:
        """ValueError for a name in [probe] snapshots that means no run; a strategy's runs are not known beforehand."""
        try:
            unmet = self._selections(self.probe.snapshots)
            runs = self.runs() if self.strategy.kind == "grid" else iter(())
            while unmet and (run := next(runs, None)):
                unmet = [name for name in unmet if run not in name]
            if unmet and self.strategy.kind == "grid":
                raise ValueError(f"{unmet[0].text!r} matches no run of the study")
        except ValueError as error:
            raise ValueError(f"probe.snapshots: {error}") from None

    def _selections(self, names: Iterable[str]) -> list[Selection]:
        return [selection(name, self.recipes_named, self.axes.model_extra or {}) for name in names]

    def chosen(self, names: Sequence[str], runs: Iterable[Run]) -> list[Run]:
        """Those of the runs that any of the names means, in their order (see `selection`); ValueError for one without meaning."""
        selections = self._selections(names)
        return [run for run in runs if any(run in name for name in selections)]

    def _check_block(self, axes: Axes) -> None:
        """ValueError for recipes that mean nothing, axes without values, names that don't print, tables that can't be."""
        for changes in _recipe_changes(axes):
            for name in axes.recipe:
                self._resolved(name, changes)
        for key in axes.model_extra or {}:
            _check_axis(key)
        for key, values in axes.items():
            if not values:
                raise ValueError(f"axes.{key} has no values: give it some, or leave it out")
        for name in (*self.recipes, *axes.dataset):
            if not name.isprintable() or len(name) > 10 * NAME_LIMIT:
                raise ValueError(
                    f"a recipe's name and a text's path have at most {10 * NAME_LIMIT} characters, which print; got {name!r}"
                )
        self._check_values(axes)

    def _check_values(self, axes: Axes) -> None:
        """ValueError where a combination of axes makes no valid tables, or two values of one axis are read as the same."""
        extra = axes.model_extra or {}
        known: dict[tuple[str, str], Any] = {}

        def read(key: str, meaning: Any, value: Any) -> None:
            first = known.setdefault((key, repr(meaning)), value)
            if str(first) != str(value):  # as written they all differ
                raise ValueError(f"axes.{key}: {first!r} and {value!r} mean the same: leave one out")

        for values, (model, _, _, chosen) in zip(itertools.product(*extra.values()), self._settings(axes), strict=True):
            for (key, tick), value in zip(chosen.items(), values, strict=True):
                if key not in AXES:  # a preset is what it comes to
                    read(key, model.model_dump(exclude={"preset"}) if key == "preset" else tick, value)
        for key in AXES:
            for value in extra.get(key, []):
                read(key, _read_words({key: value})[key], value)

    @property
    def blocks(self) -> list[Axes]:
        """[axes], and every block of [[more]] in full."""
        return list(self._blocks)

    @property
    def recipes_named(self) -> list[str]:
        """Every recipe on an axis, in [axes] or in a block, once."""
        return list(dict.fromkeys(name for axes in self._blocks for name in axes.recipe))

    def _check_size(self) -> None:
        """ValueError for more runs than a study may have, or more tables of settings, which take a hundred times as long."""
        runs = sum(math.prod(len(values) for _, values in axes.items()) for axes in self._blocks)
        if runs > RUNS_LIMIT:
            raise ValueError(f"axes multiply to {runs} runs, more than {RUNS_LIMIT}: split the study")
        settings = sum(math.prod(map(len, (axes.model_extra or {}).values())) for axes in self._blocks)
        if settings > SETTINGS_LIMIT:
            raise ValueError(
                f"axes of settings multiply to {settings} combinations, more than {SETTINGS_LIMIT}: split the study"
            )

    def recipe(self, name: str, changes: Mapping[str, Any] | None = None) -> Recipe:
        """The recipe called `name`, from [recipes] or by its format, with some words changed."""
        return resolve_recipe(name, self.recipes, changes)

    def _resolved(self, name: str, changes: dict[str, Any]) -> Recipe:
        """`recipe`, made once for all runs that have it."""
        key = (name, json.dumps(changes, sort_keys=True))
        if key not in self._recipes:
            self._recipes[key] = self.recipe(name, _read_words(changes))
        return self._recipes[key]

    @property
    def reference(self) -> str:
        """The recipe that the others are held against: `baseline`, or the first one."""
        return self.baseline or self.axes.recipe[0]

    def _settings(self, axes: Axes) -> Iterator[tuple[ModelSettings, TrainingSettings, DataSettings, dict[str, Any]]]:
        """[model], [training] and [data] for every combination of the axes that name their fields."""
        extra = axes.model_extra or {}
        for values in itertools.product(*extra.values()):
            chosen = dict(zip(extra, values, strict=True))
            model = {k: v for k, v in chosen.items() if k in ModelSettings.model_fields}
            training = {k: v for k, v in chosen.items() if k in TrainingSettings.model_fields}
            data = {k: v for k, v in chosen.items() if k in DataSettings.model_fields}
            tables = (
                # What was written alone: a preset or an architecture that is an axis says the rest.
                ModelSettings.model_validate(self.model.model_dump(exclude_unset=True) | model),
                TrainingSettings.model_validate(self.training.model_dump() | training),
                DataSettings.model_validate(self.data.model_dump() | data),
            )
            yield *tables, {key: _tick(key, word, tables) for key, word in chosen.items()}

    def _first_runs(self, axes: Axes) -> Iterator[Run]:
        """A run for each combination of a block's axes, rates and seeds apart; its `words` are those of all that share it."""
        rate, (init_seed, data_seed) = axes.learning_rate[0], _seeds(axes)[0]
        for name, dataset in itertools.product(axes.recipe, axes.dataset):
            for model, training, data, chosen in self._settings(axes):
                recipe = self._resolved(name, {key: value for key, value in chosen.items() if key in AXES})
                run = Run(
                    recipe, rate, init_seed, data_seed, dataset_label(dataset), model, training, self.probe,
                    tuple(chosen.items()), data, dataset, self.signals,
                )  # fmt: skip
                yield replace(run, words=run.identity_words())

    def design(self) -> Design:
        """What the identities of its runs are made of, and so which runs they are, without making one."""
        grids = [
            Grid(
                frozenset((first.words or first.identity_words()).text for first in self._first_runs(axes)),
                frozenset(map(_as_json, axes.learning_rate)),
                frozenset(_seeds(axes)),
            )
            for axes in self._blocks
        ]
        return Design(tuple(grids), len(set(self.identities())) if self.more else len(grids[0]))

    def families_by_round(self) -> Iterator[tuple[int, list[Run]]]:
        """Runs that differ in rate and seeds alone, together, each once, with their round: that of their block, 1 for [axes] and
        blocks without one. [axes] come before the blocks, and of each the first axis is the slowest.
        """
        rounds = [1, *(block.round or 1 for block in self.more)]
        seen: set[str] = set()
        for number, axes in zip(rounds, self._blocks, strict=True):
            rates_and_seeds = list(itertools.product(axes.learning_rate, _seeds(axes)))
            for first in self._first_runs(axes):
                shared = (
                    first.dataset, first.model, first.training, first.probe, first.extra_axes, first.data, first.path,
                    first.signals, first.words,
                )  # fmt: skip
                family = [Run(first.recipe, rate, i, d, *shared) for rate, (i, d) in rates_and_seeds]
                if self.more:  # a grid by itself names no run twice
                    family = [run for run in family if run.identity not in seen]
                    seen.update(run.identity for run in family)
                if family:
                    yield number, family

    def runs_by_round(self) -> Iterator[tuple[int, Run]]:
        """The runs as `runs` has them, each with its round."""
        for number, family in self.families_by_round():
            for run in family:
                yield number, run

    def runs(self) -> Iterator[Run]:
        """Every run once, [axes] before the blocks, of each the first axis slowest."""
        for _, family in self.families_by_round():
            yield from family

    def identities(self) -> Iterator[str]:
        """The identities of `runs`, in their order, without making the runs: ten times as fast."""
        seen: set[str] = set()
        sha256 = hashlib.sha256
        for axes in self._blocks:
            rates = [_as_json(rate) for rate in axes.learning_rate]
            seeds = [f"{init_seed}, {data_seed}" for init_seed, data_seed in _seeds(axes)]
            for first in self._first_runs(axes):
                words = first.words or first.identity_words()
                for rate in rates:
                    before, after = (
                        f"{words.before}{rate}{words.between}",
                        words.after,
                    )  # `identity_of`, without its calls
                    found = [sha256(f"{before}{pair}{after}".encode()).hexdigest()[:24] for pair in seeds]
                    if self.more:
                        found = [identity for identity in found if identity not in seen]
                        seen.update(found)
                    yield from found

    def to_toml(self) -> str:
        """The study as resolved, with every default, as a study file."""
        # What an architecture or a preset says is left for it to say: written here, it would win over another of them.
        by_preset = self.model.preset is not None or "preset" in (self.axes.model_extra or {})
        said = set(ModelSettings.model_fields) if by_preset else set(ARCHITECTURES["gpt2"])
        unwritten = said - self.model.model_fields_set
        content = self.model_dump(
            mode="json", exclude_none=True, exclude={"model": unwritten, "more": True, "strategy": True, "alarms": True}
        )
        content["axes"] = {
            key: values for key, values in self.axes.items() if key != "seed" or not separate_seeds(self.axes)
        }
        if strategy := self.strategy.as_table():
            content["strategy"] = strategy
        if self.alarms.thresholds:
            content["alarms"] = self.alarms.model_dump(mode="json")
        blocks = "".join(f"\n[[more]]\n{tomli_w.dumps(block.as_table())}" for block in self.more)
        return tomli_w.dumps(content) + blocks

    @property
    def hash(self) -> str:
        """12 hex digits over the resolved study."""
        return hashlib.sha256(self.to_toml().encode()).hexdigest()[:12]
