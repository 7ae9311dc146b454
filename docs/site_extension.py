"""What Sphinx lacks for this guide: pages that are read out of the code, and docstrings that are prose, not reStructuredText."""

from __future__ import annotations

import re
from importlib import import_module
from inspect import cleandoc
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import ExtensionMetadata

from docs.site_tables import TABLES

LONGEST = 700  # of a signature, in characters
SPECIAL = re.compile(r"([\\*_|])")


class Generated(SphinxDirective):
    """`:::{generated} NAME`: the Markdown of `site_tables` under that name."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The nodes of the table's text."""
        return self.parse_text_to_nodes(TABLES[self.arguments[0]](), allow_section_headings=True)


class PublicNames(SphinxDirective):
    """`:::{public} PACKAGE`: autodoc of every name that the package says is public, under the module docstring."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The nodes of every entry, in the order of `__all__`."""
        package = self.arguments[0]
        lines = [f".. py:module:: {package}", ""]
        for name in import_module(package).__all__:
            lines += [*_entry(package, name), ""]
        text = "\n".join(lines)
        return self.parse_text_to_nodes(f"````{{eval-rst}}\n{text}\n````")


def _entry(package: str, name: str) -> list[str]:
    thing = getattr(import_module(package), name)
    if isinstance(thing, type):
        return [f".. autoclass:: {package}.{name}", "   :members:"]
    if callable(thing):
        return [f".. autofunction:: {package}.{name}"]
    return [f".. autodata:: {package}.{name}", "   :no-value:"]


def to_rst(docstring: str) -> list[str]:
    """The house's docstrings in reStructuredText: paragraphs stay, code in backticks is code, indented lines stay as they are."""
    lines: list[str] = []
    for paragraph in re.split(r"\n\s*\n", cleandoc(docstring)):
        rows = paragraph.splitlines()
        if all(row.startswith("  ") for row in rows) or any(
            re.search(r"\S {3,}\S", row) or row.startswith("  ") for row in rows
        ):
            lines += ["::", "", *(f"    {row}" for row in rows), ""]
        else:
            lines += [*(_escaped(row) for row in _joined(rows)), ""]
    return lines


def _joined(rows: list[str]) -> list[str]:
    """A paragraph in one line, so that code in backticks is never cut in two."""
    return [" ".join(row.strip() for row in rows)]


def _escaped(row: str) -> str:
    parts = row.split("`")
    if len(parts) % 2 == 0:  # a backtick by itself
        return SPECIAL.sub(r"\\\1", row).replace("`", "\\`")
    return "".join(
        f"\\ ``{part}``\\ " if odd and part else SPECIAL.sub(r"\\\1", part)
        for part, odd in zip(parts, [False, True] * len(parts), strict=False)
    )


def _docstring(_app: Sphinx, what: str, _name: str, of: object, _options: Any, lines: list[str]) -> None:
    """A table of the package's has its page; what Python says of every dict is no docstring of it."""
    lines[:] = [] if what == "data" and of.__doc__ == type(of).__doc__ else to_rst("\n".join(lines))


def _signature(
    _app: Sphinx, _what: str, _name: str, _of: object, _options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """A study's every default in one line helps nobody: the page about study files has them."""
    return ("(...)", returns) if signature is not None and len(signature) > LONGEST else (signature, returns)


def _without_what_is_missing(app: Sphinx, name: str, content: list[str]) -> None:
    """The findings are written from studies, and a checkout may be without them; so may one of before the report's page."""
    for page in ("findings", "report"):
        if name == "index" and not (Path(app.srcdir) / f"{page}.md").is_file():
            content[0] = content[0].replace(f"\n{page}\n", "\n")


def setup(app: Sphinx) -> ExtensionMetadata:
    """Tell Sphinx of them."""
    app.add_directive("generated", Generated)
    app.add_directive("public", PublicNames)
    app.connect("autodoc-process-docstring", _docstring)
    app.connect("autodoc-process-signature", _signature)
    app.connect("source-read", _without_what_is_missing)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
