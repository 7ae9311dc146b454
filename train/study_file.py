"""A study file: TOML, with overrides, read into a `Study` or refused in one line.

The line says where the mistake stands (file:line, --set or another option), the key, the value, the limit and the mend.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from train.axes import Axes
from train.recipe_table import ProductTable, RecipeTable
from train.settings import (
    AlarmsTable,
    DataSettings,
    DivergenceTable,
    ExecutionTable,
    ModelSettings,
    ProbeSettings,
    SignalsTable,
    Table,
    TrainingSettings,
)
from train.strategy_table import StrategyTable
from train.study import Study, StudyError

SET = "--set"  # the option of overrides
FILE_LIMIT = 2**20  # bytes
MESSAGE_LIMIT = 1000  # characters
RECIPE_DEPTH = 3  # recipes.NAME.word; a product's table is one deeper
SNAPSHOTS = "probe.snapshots: "  # a line of `Study`'s own that begins with the key
ALARMS = "alarms.thresholds: "


def read_study(
    path: Path | str, overrides: Sequence[str] | None = None, options: Mapping[str, str] | None = None
) -> Study:
    """The study in a TOML file, with `key=value` overrides; StudyError with one line where it can't be run.

    An override's key is a path ("training.steps") or a field's own name where only one table has it ("steps", "seed").
    options: overrides that options of their own stand for, such as {"--strategy": 'strategy.kind="bisect"'}, made after the
    others; what is wrong with one is said of that option.
    """
    changes = [(SET, text) for text in overrides or ()] + list((options or {}).items())
    try:
        return _read(Path(path), changes)
    except StudyError as error:
        raise StudyError(_in_a_line(str(error))) from None


def _read(path: Path, changes: Sequence[tuple[str, str]]) -> Study:
    try:
        with path.open("rb") as file:
            head = file.read(FILE_LIMIT + 1)
    except OSError as error:
        raise StudyError(
            f"{path}: {error.strerror}; name a TOML file with a study in it, such as studies/first-look-cpu.toml"
        ) from None
    if len(head) > FILE_LIMIT:
        raise StudyError(f"{path}: longer than 1 MiB, the most that a study file may be")
    try:
        source = head.decode("utf-8")
        content = tomllib.loads(source)
    except RecursionError:
        raise StudyError(f"{path}: nested deeper than any study: a table stands in a table, and no further") from None
    except ValueError as error:  # of TOML, of UTF-8, of numbers too long to be read
        raise StudyError(f"{path}: not a TOML file: {error}") from None
    overridden = {_override(content, text): option for option, text in changes}
    try:
        return Study.model_validate(content)
    except RecursionError:
        raise StudyError(f"{path}: recipes that rest on each other, hundreds deep: name them flat") from None
    except ValidationError as error:
        named = list(overridden.values())
        blamed = (SET if SET in named else named[0]) if named and _is_study(tomllib.loads(source)) else path
        raise StudyError(_first_error(error, blamed, source, overridden)) from None


def _in_a_line(message: str) -> str:
    """The message without what does not print, cut where it is longer than anybody reads."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
    return shown if len(shown) <= MESSAGE_LIMIT else shown[: MESSAGE_LIMIT - 2] + " …"


def _is_study(content: dict[str, Any]) -> bool:
    try:
        Study.model_validate(content)
    except ValidationError:
        return False
    return True


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
    tables |= {
        "probe": ProbeSettings,
        "signals": SignalsTable,
        "alarms": AlarmsTable,
        "divergence": DivergenceTable,
        "execution": ExecutionTable,
        "strategy": StrategyTable,
    }
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


def _first_error(
    error: ValidationError, blamed: Path | str, source: str, overridden: Mapping[tuple[str, ...], str]
) -> str:
    """The first thing wrong, in one line: file:line, or --set and its like, key, what is wrong, and the nearest key that exists.

    blamed: the file, or an option without which it would be in order. overridden: the options that set keys; one of its own, but
    --set, needs no key named beside it.
    """
    first = error.errors()[0]
    location = tuple(str(part) for part in first["loc"] if part not in ("function-after", "literal", "int"))
    message = first["msg"].removeprefix("Value error, ")
    unknown = first["type"] in ("extra_forbidden", "unexpected_keyword_argument")
    if unknown:
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
    if len(keys) == 1 and keys[0] not in Study.model_fields and not unknown:
        keys = ("axes", *keys)  # a value of an axis that the table whose field it is refuses
    if not keys and (named := re.match(r"recipe '([^']+)'", message)):
        keys = ("recipes", named[1]) if _line_of(source, ("recipes", named[1])) > 1 else ()
    for prefix, place in {SNAPSHOTS: ("probe", "snapshots"), ALARMS: ("alarms", "thresholds")}.items():
        if not keys and message.startswith(prefix):
            keys, message = place, message.removeprefix(prefix)
    block = int(location[1]) if location[0:1] == ("more",) and location[1:2] and location[1].isdigit() else 0
    option = overridden.get(keys) or (blamed if isinstance(blamed, str) else "")
    where = option or f"{blamed}:{_line_blamed(source, keys, message, block)}"
    told = keys and (option in ("", SET) or keys not in overridden)
    return f"{where}: {'.'.join(keys)}: {message}{more}" if told else f"{where}: {message}{more}"


def _nearest_key(location: tuple[str, ...]) -> str:
    tables: dict[tuple[str, ...], type[Table]] = {
        (): Study, ("model",): ModelSettings, ("training",): TrainingSettings, ("probe",): ProbeSettings,
        ("data",): DataSettings, ("signals",): SignalsTable, ("alarms",): AlarmsTable, ("divergence",): DivergenceTable,
        ("execution",): ExecutionTable, ("strategy",): StrategyTable,
    }  # fmt: skip
    if location[:1] == ("recipes",):
        known = [f.name for f in fields(RecipeTable if len(location) <= RECIPE_DEPTH else ProductTable)]
    else:
        known = list(tables.get(location[:-1], Study).model_fields)
    near = difflib.get_close_matches(location[-1], known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}"


def _line_blamed(source: str, keys: tuple[str, ...], message: str, block: int) -> int:
    """The line of what a message is about: of the field of the table that it begins with, of the recipe that it names, if any."""
    line = _line_of(source, keys, block)
    recipe = re.match(r"recipe '([^']+)'", message)
    if recipe and not keys:
        quoted = [
            n
            for n, text in enumerate(source.splitlines(), start=1)
            if re.search(rf"""["']{re.escape(recipe[1])}["']""", text)
        ]
        return quoted[0] if quoted else line
    field = re.match(r"\w+", message)
    return max(line, _line_of(source, (*keys, field[0]), block)) if field else line


def _line_of(source: str, keys: tuple[str, ...], block: int = 0) -> int:
    """The line on which a key stands, or its table begins, of repeated [[tables]] the one so numbered; 1 where neither is to
    be found.
    """
    table: tuple[str, ...] = ()
    best, depth = 1, 0
    passed = -1
    for number, line in enumerate(source.splitlines(), start=1):
        text = line.split("#")[0].strip()
        if text.startswith("["):
            table = tuple(part.strip(" \"'") for part in text.strip("[]").split("."))
            here = table
            if text.startswith("[[") and table == keys[:1]:
                passed += 1
                if passed < block:  # one of those before it
                    here = table = ()
        elif "=" in text:
            here = (*table, *(part.strip(" \"'") for part in text.split("=")[0].split(".")))
        else:
            continue
        if here == keys[: len(here)] and len(here) > depth:
            best, depth = number, len(here)
    return best
