"""docs/landscape.md shows what comes out, and its table has every measure and every value."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import landscape
from tests.test_docs import ROOT, blocks, python

PAGE = ROOT / "docs" / "landscape.md"


def follow(wanted: bool, namespace: dict[str, Any]) -> int:
    """Run the page's blocks, those with transformers or the others, and hold what they print to the page."""
    printed, ran = "", 0
    for language, text, line in blocks(PAGE):
        if language == "python":
            skipped = ("transformers" in text) != wanted
            printed = "" if skipped else python(text, namespace, f"{PAGE.name}:{line}")
            ran += not skipped
        elif not skipped:
            assert (language, printed) == ("text", text), f"{PAGE.name}:{line}"
    return ran


def test_the_examples_print_what_the_page_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert follow(False, {}) == 8
    assert {path.name for path in tmp_path.iterdir()} == {"density.png", "eigenvalues.png", "curvature.nc"}


def test_the_hugging_face_model_does_too() -> None:
    pytest.importorskip("transformers", reason="the extra 'curvature' is not installed")
    namespace: dict[str, Any] = {}
    exec(
        "import torch\nfrom landscape import Problem, hessian_eigenvalues, module_loss\ntorch.manual_seed(0)", namespace
    )
    assert follow(True, namespace) == 1


def test_the_table_has_every_measure_and_variable() -> None:
    rows = [
        re.findall(r"`(\w+)`", line) for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")
    ]
    named = {word for row in rows for word in row}
    everywhere = {"n_hvp", "n_gradient", "n_forward"}
    assert landscape.CURVATURE.keys() <= named | everywhere
    assert all(hasattr(landscape, row[0]) for row in rows)
    measures = {"hessian_eigenvalues", "preconditioned_eigenvalues", "hutchinson_trace", "xtrace", "spectral_density"}
    assert {row[0] for row in rows} == measures | {"gradient_curvature", "critical_sharpness", "smoothed_density"}
