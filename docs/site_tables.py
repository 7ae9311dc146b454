"""What reference pages list, as Markdown, read out of the code that it describes: nothing here is copied by hand.

Each function of `TABLES` is the text behind a directive of that name on a page (see `site_extension`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from inspect import cleandoc
from typing import Any

from exmy.recipes import recipe_sheet
from formats import ElementFormat, get_format, list_formats
from formats.facts import facts, limits, written
from formats.names import well_known
from landscape import Variable
from train.named_recipes import NAMED, PREFIXES
from train.schema import COORDINATES, GROUPS, OF_ALARMS, OF_MEASURES, RUN_COORDINATES
from train.study import Study

ORDER = {
    "axes": "Axes", "more": "Block", "model": "ModelSettings", "training": "TrainingSettings", "data": "DataSettings",
    "strategy": "StrategyTable", "probe": "ProbeSettings", "signals": "SignalsTable", "alarms": "AlarmsTable",
    "divergence": "DivergenceTable", "execution": "ExecutionTable", "recipes.NAME": "RecipeTable",
    "recipes.NAME.forward": "ProductTable",
}  # fmt: skip
"""Tables of a study file, by what stands in brackets, and the model that checks each."""
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "gt": ">", "maximum": "≤", "exclusiveMaximum": "<"}
HEADINGS = ("key", "accepts", "default", "meaning")
DEFAULT = re.compile(r"(.*?)(?: \(default: (.*)\))?")
MEANING = re.compile(r"^ *(\w+)  +(\S.*)$")


def table(headings: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    """A Markdown table; bars in cells are escaped."""
    lines = [headings, ("---",) * len(headings), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def accepts(schema: Mapping[str, Any]) -> str:
    """The type and the limits of a JSON schema, in a few words."""
    if "anyOf" in schema:
        return " or ".join(accepts(one) for one in schema["anyOf"] if one.get("type") != "null")
    if "$ref" in schema:
        return "a table"
    if "const" in schema:
        return f'`"{schema["const"]}"`'
    if "enum" in schema:
        return ", ".join(f"`{_toml(word)}`" for word in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {accepts(schema['items'])}"
    if schema.get("type") == "object":
        return f"a table of {accepts(schema['additionalProperties'])}"
    bounds = " and ".join(f"{sign} {_count(schema[key])}" for key, sign in BOUNDS.items() if key in schema)
    return f"{schema.get('type', 'any')} {bounds}".strip()


def _count(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _toml(value: Any) -> str:
    """A value as a study file has it; nothing where leaving it out is the default."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _prose_and_meanings(docstring: str) -> tuple[str, dict[str, str]]:
    """A docstring's paragraphs, and what its aligned lines say of each key."""
    prose: list[str] = []
    meanings: dict[str, str] = {}
    key = None
    for line in cleandoc(docstring).splitlines():
        if found := MEANING.match(line):
            key = found[1]
            meanings[key] = found[2]
        elif key and line.startswith("  ") and len(line) - len(line.lstrip()) > 8:
            meanings[key] += f" {line.strip()}"
        else:
            key = None
            prose.append(line)
    return "\n".join(prose).strip(), meanings


def study_file() -> str:
    """Every table and key of a study file, with what it accepts and its default."""
    schema = Study.model_json_schema()
    left = set(schema["$defs"]) - set(ORDER.values())
    assert not left, f"tables of a study file without a place on the page: {left}"
    tables = {name.split(".")[0] for name in ORDER}
    parts = [
        "## Above all tables\n\n"
        + table(
            HEADINGS,
            _keys(
                {key: entry for key, entry in schema["properties"].items() if key not in tables},
                schema.get("required", []),
                _prose_and_meanings(schema["description"])[1],
            ),
        )
    ]
    for name, model in ORDER.items():
        described = schema["$defs"][model]
        prose, meanings = _prose_and_meanings(described["description"])
        rows = _keys(described["properties"], described.get("required", []), meanings)
        bracket = f"[[{name}]]" if name == "more" else f"[{name}]"
        parts.append(f"## {bracket}\n\n{prose}\n\n" + table(HEADINGS, rows))
    return "\n\n".join(parts)


def _keys(
    entries: Mapping[str, Mapping[str, Any]], needed: Collection[str], meanings: Mapping[str, str]
) -> Iterator[tuple[str, ...]]:
    """A row a key."""
    for key, entry in entries.items():
        meaning, default = DEFAULT.fullmatch(meanings[key]).groups()  # type: ignore[union-attr]
        written = _toml(entry.get("default"))
        otherwise = "needed" if key in needed else f"`{written}`" if written else _plain(default or "none")
        yield f"`{key}`", accepts(entry), otherwise, _plain(meaning)


def recipes() -> str:
    """Every named recipe: what it follows, and all its operands."""
    parts = []
    for name in NAMED:
        lines: list[str] = []
        for part in recipe_sheet(name, {}):
            if isinstance(part, str):
                lines.append(part)
                continue
            cells = zip(*(column.cells for column in part.columns), strict=True)
            rows = (tuple(str(cell) or " " for cell in row) for row in cells)
            lines.append(table(tuple(str(column.header) for column in part.columns), rows))
        parts.append(f"## {name}\n\n" + "\n\n".join(lines))
    prefixed = (f"`{prefix}FORMAT`: {follows}." for prefix, (_, follows) in PREFIXES.items())
    return "\n\n".join([*parts, "## Made from a format's name", *prefixed])


def formats() -> str:
    """The well-known formats with their limits, then the names of all others."""
    single, scaled = [], []
    for name in well_known():
        f = get_format(name)
        said = facts(f).attributes
        if isinstance(f, ElementFormat):
            found = limits(f)
            numbers = (
                written(found[key].value) if key in found else ""
                for key in ("largest", "smallest_normal", "smallest_positive", "ulp_at_1")
            )
            single.append((f"`{name}`", str(f.bits), *(_number(n) for n in numbers), said["specials"], said["source"]))
        else:
            per = limits_of_scale(name)
            scaled.append((f"`{name}`", said["element"], said["granularity"], said["scale"], said["rule"], per))
    headings = ("name", "bits", "largest", "smallest normal", "smallest", "ulp at 1", "special codes", "source")
    names = list_formats()
    every = ", ".join(f"`{name}`" for name in names)
    return "\n\n".join(
        [
            "## Single numbers",
            table(headings, iter(single)),
            "## With scales",
            table(("name", "element", "a scale for", "scale", "rule", "bits an element"), iter(scaled)),
            "## Every name",
            f"All {len(names)} that need no parameters:",
            every,
        ]
    )


def limits_of_scale(name: str) -> str:
    """Bits an element, its share of the scale counted."""
    return f"{float(facts(get_format(name)).limits['bits_per_element'].value):g}"


def _number(text: str) -> str:
    return "" if text == "nan" else text


def dataset() -> str:
    """Every group of a study's tree, and its coordinates."""
    groups: list[tuple[str, Mapping[str, Variable]]] = [(f"/{name}", rows) for name, rows in GROUPS.items()]
    groups += [(f"/{name}", rows) for name, rows in (OF_ALARMS | OF_MEASURES).items()]
    parts = ["## Coordinates\n\n" + _variables(COORDINATES)]
    along = table(("coordinate", "of each run"), ((f"`{name}`", words) for name, words in RUN_COORDINATES.items()))
    parts.append(f"Of each `run`:\n\n{along}")
    parts += [f"## {name}\n\n{_variables(rows)}" for name, rows in groups]
    return "\n\n".join(parts)


def _variables(rows: Mapping[str, Variable]) -> str:
    return table(
        ("name", "dimensions", "units", "meaning", "definition, source"),
        ((f"`{name}`", ", ".join(v.dims), v.units, v.long_name, _plain(v.source)) for name, v in rows.items()),
    )


def _plain(text: str) -> str:
    """Without what Markdown would take for emphasis."""
    return text.replace("*", "\\*").replace("_", "\\_")


TABLES: dict[str, Callable[[], str]] = {
    "study-file": study_file, "recipes": recipes, "formats": formats, "dataset": dataset,
}  # fmt: skip
