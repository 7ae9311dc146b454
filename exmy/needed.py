"""Packages that a page and its figures are made with: looked for before hours of training, not missed at their end."""

from __future__ import annotations

import importlib.util
import os
import sys

from exmy.refused import Refused

FOR_REPORTS = {
    "jinja2": "jinja2",
    "markupsafe": "markupsafe",
    "matplotlib": "matplotlib",
    "PIL": "pillow",
    "plotly": "plotly",
}
"""By the name under which each is imported, the one under which pip knows it."""


def check_packages() -> None:
    """Refused, in one line, where a report could not be written for want of a package. Nothing is imported, and no time lost."""
    missing = [package for module, package in FOR_REPORTS.items() if importlib.util.find_spec(module) is None]
    if not missing:
        return
    if os.environ.get("LOCAL_RANK", "0") != "0":  # torchrun's ranks on a host lack the same, and one says it
        sys.exit(Refused.exit_code)
    verb, pronoun = ("is", "it") if len(missing) == 1 else ("are", "them")
    raise Refused(
        f"{', '.join(missing)} {verb} not installed, and the report needs {pronoun}: pip install {' '.join(missing)}"
    )
