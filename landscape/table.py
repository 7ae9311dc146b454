"""The schema as a page: `python -m landscape.table docs/landscape-schema.md` writes what `LANDSCAPE` and `CURVATURE` say."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from landscape.curvature import CURVATURE
from landscape.schema import ENDINGS, LANDSCAPE, Variable

INTRODUCTION = """\
# What each variable of a landscape means

If a variable of a dataset has one of these names, it means this, whoever wrote it: a measure of `landscape`, or a study. It
carries `units`, `long_name` and `source` as attributes, so that files explain themselves; `landscape.validate(dataset_or_tree)`
says in one line each what does not fit. Dimensions in brackets may be absent: a run alone, a single epsilon. Units of `loss` are
the loss's own, nats for a cross entropy; parameters have none. A value that is not finite stays so.

What is known of a value's error stands beside it, under its name with an ending:

"""
CLOSING = "\nThis page is written by `python -m landscape.table docs/landscape-schema.md`.\n"


def page() -> str:
    """The page in Markdown."""
    endings = [(f"`{ending}`", words, units or "the value's") for ending, (words, units) in ENDINGS.items()]
    parts = [
        INTRODUCTION,
        table(("ending", "meaning", "units"), endings),
        "\n## In boxes, in balls and along lines\n\n",
        variables(LANDSCAPE),
        "\n## Curvature\n\n",
        variables(CURVATURE),
        CLOSING,
    ]
    return "".join(parts)


def variables(rows: Mapping[str, Variable]) -> str:
    """A row for each variable, in the schema's order."""
    heads = ("name", "dimensions", "units", "meaning", "definition, source")
    return table(heads, ((f"`{n}`", dims(row), row.units, row.long_name, row.source) for n, row in rows.items()))


def dims(row: Variable) -> str:
    """Dimensions in order, those in brackets that may be absent."""
    return ", ".join(f"[{d}]" if d in row.optional else d for d in row.dims)


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table, a bar inside a cell escaped."""
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
