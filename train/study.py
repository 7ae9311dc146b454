"""A study: what to train, as read from a TOML file or keywords, validated before any work starts.

`[axes]` are multiplied out, every combination is one run; any field of `[model]`, `[training]` or `[data]` may be an axis
too. Every other table has defaults. An unknown key or an impossible value is refused with one line: where it stands in the
file, the value, the limit and the mend.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import itertools
import json
import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from formats import Rounding
from train.corruption import Corruption
from train.recipe import Output, Recipe, RecipeTable, resolve_recipe
from train.text import check_dataset, dataset_label
from train.tokenizer import check_tokenizer

PACK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
IDENTITY_VERSION = 1
CONTEXT_LIMIT, STEPS_LIMIT, RUNS_LIMIT = 8192, 1_000_000, 100_000

Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Share = Annotated[float, Field(ge=0, le=1)]


class StudyError(ValueError):
    """A study that can't be run; the message is one line that says where, what and how to mend it."""


class Table(BaseModel):
    """A table of a study file: frozen, and closed to keys that mean nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSettings(Table):
    """[model]: the architecture and its sizes; width and context in units of features and tokens."""

    architecture: Literal["gpt2"] = "gpt2"
    layers: Annotated[int, Field(ge=1, le=200)] = 4
    heads: Annotated[int, Field(ge=1, le=256)] = 4
    width: Annotated[int, Field(ge=1, le=65536)] = 128
    context: Annotated[int, Field(ge=1, le=CONTEXT_LIMIT)] = 128
    tokenizer: Annotated[str, AfterValidator(check_tokenizer)] = "bytes"

    @model_validator(mode="after")
    def _heads_divide_width(self) -> ModelSettings:
        if self.width % self.heads:
            nearest = max(1, round(self.width / self.heads)) * self.heads
            raise ValueError(
                f"width must be a multiple of heads={self.heads}, got {self.width}; the nearest is {nearest}"
            )
        return self

    @property
    def label(self) -> str:
        """The model as a word of a dataset: "gpt2-4x128"."""
        return f"{self.architecture}-{self.layers}x{self.width}"


class DataSettings(Table):
    """[data]: what is done to the training text on purpose, in shares of its tokens, and to whole documents.

    Validation is never touched. Which documents it is depends on the text alone: see `corruption`, which defines each kind.
    """

    noise: Share = 0.0
    shuffled: Share = 0.0
    duplicated: Share = 0.0

    @model_validator(mode="after")
    def _a_share_of_one(self) -> DataSettings:
        if (total := self.noise + self.shuffled + self.duplicated) > 1:
            raise ValueError(f"noise, shuffled and duplicated must be at most 1 together, got {total:g}")
        return self

    @property
    def corruption(self) -> Corruption:
        """The same as `load_text` takes it."""
        return Corruption(self.noise, self.shuffled, self.duplicated)


class TrainingSettings(Table):
    """[training]: one run's batch, schedule and optimiser (AdamW)."""

    steps: Annotated[int, Field(ge=1, le=STEPS_LIMIT)] = 300
    sequences: Positive = 8
    warmup: Annotated[int, Field(ge=0)] = 50
    schedule: Literal["cosine", "constant"] = "cosine"
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    clip: Annotated[float, Field(gt=0)] = 1.0
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.1
    evaluate_every: Positive = 50
    evaluation_batches: Positive = 2

    @model_validator(mode="after")
    def _warm_up_ends(self) -> TrainingSettings:
        if self.warmup >= self.steps:
            raise ValueError(
                f"warmup must be less than steps={self.steps}, got {self.warmup}; take {self.steps // 10} or more steps"
            )
        return self


class ProbeSettings(Table):
    """[probe]: sharpness measured while training, every `every` steps (0 for never), on a fixed held-out batch."""

    every: Annotated[int, Field(ge=0)] = 50
    measures: list[Literal["logit_sharpness"]] = ["logit_sharpness"]
    epsilons: list[Annotated[float, Field(gt=0, le=1)]] = [5e-4, 1e-3]
    positions: Literal["all", "last"] = "all"
    snapshots: Annotated[list[str], Field(max_length=0)] = []

    @field_validator("epsilons")
    @classmethod
    def _distinct(cls, epsilons: list[float]) -> list[float]:
        if not epsilons or len(set(epsilons)) < len(epsilons):
            raise ValueError(f"epsilons must be one or more different numbers, got {epsilons}")
        return epsilons


class DivergenceTable(Table):
    """[divergence]: which definition the study reports, and the margins of all of them (nats, steps, standard deviations)."""

    definition: Literal["non_finite", "no_progress", "spike", "gap"] = "no_progress"
    window: Positive = 20
    progress_margin: Annotated[float, Field(ge=0)] = 0.1
    gap_margin: Annotated[float, Field(ge=0)] = 0.2
    sigma: Annotated[float, Field(gt=0)] = 6.0
    spike_window: Annotated[int, Field(ge=8)] = 128
    recovery_margin: Annotated[float, Field(ge=0)] = 0.1


class ExecutionTable(Table):
    """[execution]: how runs become packs; a run's identity does not depend on it."""

    pack_size: Literal["auto"] | int = "auto"

    @field_validator("pack_size")
    @classmethod
    def _from_the_list(cls, size: Literal["auto"] | int) -> Literal["auto"] | int:
        if size != "auto" and size not in PACK_SIZES:
            raise ValueError(f'pack_size must be "auto" or one of {", ".join(map(str, PACK_SIZES))}, got {size}')
        return size


class RecipeSettings(Table):
    """[recipes.NAME]: a recipe of one's own."""

    activation: str
    weight: str
    gradient: str
    rounding: Rounding = Rounding.NEAREST_EVEN
    output: Literal["bf16", "fp32"] = "bf16"
    lm_head: str | None = None

    def table(self) -> RecipeTable:
        """The same as `recipe.resolve_recipe` takes it."""
        output: Output = self.output
        return RecipeTable(self.activation, self.weight, self.gradient, self.rounding.value, output, self.lm_head)


class Axes(BaseModel):
    """[axes]: lists to be multiplied out. A bare value is a list of one, and `seed = 8` means seeds 0..7."""

    model_config = ConfigDict(frozen=True, extra="allow")

    recipe: list[str] = Field(min_length=1)
    learning_rate: list[Rate] = Field(min_length=1)
    seed: list[Seed] = Field(default=[0], min_length=1)
    init_seed: list[Seed] | None = None
    data_seed: list[Seed] | None = None
    dataset: list[str] = Field(default=["python"], min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _lists(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        lists: dict[str, Any] = {}
        for key, value in data.items():
            if key in ("seed", "init_seed", "data_seed") and isinstance(value, int) and not isinstance(value, bool):
                if value < 1:
                    raise ValueError(
                        f"{key} counts seeds from 0, so it must be at least 1, got {value}; or give a list"
                    )
                lists[key] = list(range(value))
            else:
                lists[key] = value if isinstance(value, list) else [value]
        return lists

    @model_validator(mode="after")
    def _no_repeats(self) -> Axes:
        for key, values in self.items():
            if len(set(map(str, values))) < len(values):
                raise ValueError(f"{key} names a value twice: {values}")
        for key in ("init_seed", "data_seed"):
            if getattr(self, key) is not None and "seed" in self.model_fields_set:
                raise ValueError(f"seed sets init_seed and data_seed both: leave it out where {key} is given")
        labels = [dataset_label(check_dataset(dataset)) for dataset in self.dataset]
        if len(set(labels)) < len(labels):
            raise ValueError(
                f"datasets are called by the last part of their paths, and two of {self.dataset} are one: rename it"
            )
        return self

    def items(self) -> list[tuple[str, list[Any]]]:
        """Every axis that was given or has a default, with its values."""
        named = [(key, getattr(self, key)) for key in type(self).model_fields]
        return [(k, v) for k, v in [*named, *(self.model_extra or {}).items()] if v is not None]


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
class Run:
    """One run of a study, wholly resolved. Two runs with equal identity give the same numbers.

    `dataset` is the text's name, or the last part of its path: `stream` has the whole path.
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

    @property
    def stream(self) -> TokenStream:
        """Which tokens the run reads."""
        return TokenStream(self.path or self.dataset, self.model.tokenizer, self.data.corruption)

    @property
    def seed(self) -> int:
        """The run's seed where both are equal; the data seed otherwise."""
        return self.data_seed

    @functools.cached_property
    def identity(self) -> str:
        """24 hex digits over everything that decides the run's numbers, the device and the pack's size apart.

        Settings count where they differ from their defaults, so that a setting added later, whose default is what runs did
        before, leaves finished runs finished. Whoever changes a default raises IDENTITY_VERSION. A text counts by its name,
        without the place where it lies, so that one that moves is the same; that it still holds the same is `execute`'s to see.
        """
        settings: list[Table] = [self.model, self.training, self.probe]
        if self.data != DataSettings():  # a table that runs of before did not have
            settings.append(self.data)
        content = {
            "version": IDENTITY_VERSION,
            "recipe": [self.recipe.name, self.recipe.arithmetic],
            "learning_rate": self.learning_rate,
            "seeds": [self.init_seed, self.data_seed],
            "dataset": self.dataset,
            "settings": [table.model_dump(mode="json", exclude_defaults=True) for table in settings],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]


class Study(Table):
    """A validated study. `Study(...)` takes the tables as keywords; `read_study` takes a TOML file."""

    name: str = "study"
    baseline: str | None = None
    axes: Axes
    model: ModelSettings = ModelSettings()
    training: TrainingSettings = TrainingSettings()
    data: DataSettings = DataSettings()
    probe: ProbeSettings = ProbeSettings()
    divergence: DivergenceTable = DivergenceTable()
    execution: ExecutionTable = ExecutionTable()
    recipes: dict[str, RecipeSettings] = {}

    @model_validator(mode="after")
    def _hangs_together(self) -> Study:
        for name in {*self.axes.recipe, *([self.baseline] if self.baseline else [])}:
            self.recipe(name)
        if self.baseline is not None and self.baseline not in self.axes.recipe:
            raise ValueError(f"baseline {self.baseline!r} is not among axes.recipe: {', '.join(self.axes.recipe)}")
        known = {*ModelSettings.model_fields, *TrainingSettings.model_fields, *DataSettings.model_fields}
        for key in self.axes.model_extra or {}:
            if key not in known:
                near = difflib.get_close_matches(key, [*known, *Axes.model_fields], n=1)
                hint = (
                    f"; did you mean {near[0]!r}?" if near else "; it must be a field of [model], [training] or [data]"
                )
                raise ValueError(f"axes.{key} is no axis{hint}")
        count = math.prod(len(values) for _, values in self.axes.items())
        if count > RUNS_LIMIT:
            raise ValueError(f"axes multiply to {count} runs, more than {RUNS_LIMIT}: split the study")
        for _ in self._settings():  # every combination of axes makes valid tables
            pass
        return self

    def recipe(self, name: str) -> Recipe:
        """The recipe called `name`, from [recipes] or by its format."""
        return resolve_recipe(name, {key: settings.table() for key, settings in self.recipes.items()})

    @property
    def reference(self) -> str:
        """The recipe that the others are held against: `baseline`, or the first one."""
        return self.baseline or self.axes.recipe[0]

    def _settings(self) -> Iterator[tuple[ModelSettings, TrainingSettings, DataSettings, dict[str, Any]]]:
        """[model], [training] and [data] for every combination of the axes that name their fields."""
        extra = self.axes.model_extra or {}
        for values in itertools.product(*extra.values()):
            chosen = dict(zip(extra, values, strict=True))
            model = {k: v for k, v in chosen.items() if k in ModelSettings.model_fields}
            training = {k: v for k, v in chosen.items() if k in TrainingSettings.model_fields}
            data = {k: v for k, v in chosen.items() if k in DataSettings.model_fields}
            yield (
                ModelSettings.model_validate(self.model.model_dump() | model),
                TrainingSettings.model_validate(self.training.model_dump() | training),
                DataSettings.model_validate(self.data.model_dump() | data),
                chosen,
            )

    def runs(self) -> Iterator[Run]:
        """Every run, the first axis slowest."""
        axes = self.axes
        seeds: list[tuple[int, int]] = [(s, s) for s in axes.seed]
        if self._separate_seeds:
            seeds = list(itertools.product(axes.init_seed or [0], axes.data_seed or [0]))
        for name, dataset in itertools.product(axes.recipe, axes.dataset):
            recipe = self.recipe(name)
            for model, training, data, chosen in self._settings():
                for rate, (init_seed, data_seed) in itertools.product(axes.learning_rate, seeds):
                    yield Run(
                        recipe, rate, init_seed, data_seed, dataset_label(dataset), model, training, self.probe,
                        tuple(chosen.items()), data, dataset,
                    )  # fmt: skip

    def to_toml(self) -> str:
        """The study as resolved, with every default, as a study file."""
        content = self.model_dump(mode="json", exclude_none=True)
        content["axes"] = {
            key: values for key, values in self.axes.items() if key != "seed" or not self._separate_seeds
        }
        return tomli_w.dumps(content)

    @property
    def _separate_seeds(self) -> bool:
        return self.axes.init_seed is not None or self.axes.data_seed is not None

    @property
    def hash(self) -> str:
        """12 hex digits over the resolved study."""
        return hashlib.sha256(self.to_toml().encode()).hexdigest()[:12]


def read_study(path: Path | str, overrides: list[str] | None = None) -> Study:
    """The study in a TOML file, with `key=value` overrides; StudyError with one line where it can't be run.

    An override's key is a path ("training.steps") or a field's own name where only one table has it ("steps", "seed").
    """
    path = Path(path)
    try:
        source = path.read_text(encoding="utf-8")
        content = tomllib.loads(source)
    except OSError as error:
        raise StudyError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise StudyError(f"{path}: not a TOML file: {error}") from None
    overridden = [_override(content, text) for text in overrides or []]
    try:
        return Study.model_validate(content)
    except ValidationError as error:
        raise StudyError(_first_error(error, path, source, overridden)) from None


def _override(content: dict[str, Any], text: str) -> tuple[str, ...]:
    key, equals, value = text.partition("=")
    if not equals:
        raise StudyError(f"--set {text!r}: needs key=value, for example training.steps=500")
    location = _locate(content, key.strip())
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    table = content
    for part in location[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise StudyError(f"--set {text!r}: {part} is no table")
    table[location[-1]] = parsed
    return location


def _locate(content: dict[str, Any], key: str) -> tuple[str, ...]:
    """A key's place in the study: as written if it has a dot or stands at the top, else the one table that knows it."""
    if "." in key or key in Study.model_fields:
        return tuple(key.split("."))
    if key in Axes.model_fields or key in content.get("axes", {}):
        return ("axes", key)
    tables: dict[str, type[Table]] = {"model": ModelSettings, "training": TrainingSettings, "data": DataSettings}
    tables |= {"probe": ProbeSettings, "divergence": DivergenceTable, "execution": ExecutionTable}
    for name, table in tables.items():
        if key in table.model_fields:
            return (name, key)
    every = (
        {f for table in tables.values() for f in table.model_fields} | set(Axes.model_fields) | set(Study.model_fields)
    )
    near = difflib.get_close_matches(key, every, n=1)
    raise StudyError(
        f"--set {key}: no table of a study has this key" + (f"; did you mean {near[0]!r}?" if near else "")
    )


def _first_error(error: ValidationError, path: Path, source: str, overridden: list[tuple[str, ...]]) -> str:
    """The first thing wrong, in one line: file:line, key, what is wrong, and the nearest key that exists."""
    first = error.errors()[0]
    location = tuple(str(part) for part in first["loc"] if part not in ("function-after", "literal", "int"))
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = f"unknown key{_nearest_key(location)}"
    elif first["type"] == "missing":
        message = "is missing"
    elif (
        first["input"] is not None
        and not isinstance(first["input"], dict | BaseModel)
        and repr(first["input"]) not in message
    ):
        message += f", got {first['input']!r}"
    more = f" (and {len(error.errors()) - 1} more)" if len(error.errors()) > 1 else ""
    keys = tuple(part for part in location if not part.isdigit())
    where = "--set" if keys in overridden else f"{path}:{_line_of(source, keys)}"
    return f"{where}: {'.'.join(keys)}: {message}{more}" if keys else f"{where}: {message}{more}"


def _nearest_key(location: tuple[str, ...]) -> str:
    tables: dict[tuple[str, ...], type[Table]] = {
        (): Study, ("model",): ModelSettings, ("training",): TrainingSettings, ("probe",): ProbeSettings,
        ("data",): DataSettings, ("divergence",): DivergenceTable, ("execution",): ExecutionTable,
    }  # fmt: skip
    table = RecipeSettings if location[:1] == ("recipes",) else tables.get(location[:-1], Study)
    near = difflib.get_close_matches(location[-1], table.model_fields, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(table.model_fields)}"


def _line_of(source: str, keys: tuple[str, ...]) -> int:
    """The line on which a key stands, or its table begins; 1 where neither is to be found."""
    table: tuple[str, ...] = ()
    best, depth = 1, 0
    for number, line in enumerate(source.splitlines(), start=1):
        text = line.split("#")[0].strip()
        if text.startswith("["):
            table = tuple(part.strip(" \"'") for part in text.strip("[]").split("."))
            here = table
        elif "=" in text:
            here = (*table, *(part.strip(" \"'") for part in text.split("=")[0].split(".")))
        else:
            continue
        if here == keys[: len(here)] and len(here) > depth:
            best, depth = number, len(here)
    return best
