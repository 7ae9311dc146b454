"""docs/landscape.md shows what comes out, and its table has every measure and every value."""

from __future__ import annotations

import re
from typing import Any

import landscape
from tests.test_docs import ROOT, blocks, python

PAGE = ROOT / "docs" / "landscape.md"


def test_the_examples_print_what_the_page_shows() -> None:
    namespace: dict[str, Any] = {}
    printed = ""
    for language, text, line in blocks(PAGE):
        if language == "python":
            printed = python(text, namespace, f"{PAGE.name}:{line}")
        else:
            assert (language, printed) == ("text", text), f"{PAGE.name}:{line}"


def test_the_table_has_every_measure_and_variable() -> None:
    rows = [
        re.findall(r"`(\w+)`", line) for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")
    ]
    named = {word for row in rows for word in row}
    everywhere = {"n_hvp", "n_gradient", "n_forward"}
    assert landscape.CURVATURE.keys() <= named | everywhere
    assert all(hasattr(landscape, row[0]) for row in rows)
    measures = {"hessian_eigenvalues", "preconditioned_eigenvalues", "hutchinson_trace", "xtrace", "spectral_density"}
    assert {row[0] for row in rows} == measures | {"gradient_curvature", "critical_sharpness"}
