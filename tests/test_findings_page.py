"""The committed page of findings is what `make figures` makes of the committed studies, to the letter and to a figure."""

from __future__ import annotations

from pathlib import Path

import pytest

from exmy.findings.canvas import Drawing
from exmy.findings.make import make

ROOT = Path(__file__).parent.parent


def test_the_committed_page_is_what_the_committed_studies_make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Drawing, "save", lambda _, path: path.write_bytes(b""))  # drawn by other tests
    page, studies = ROOT / "docs" / "findings.md", ROOT / "studies"
    text = make(studies / "results", studies / "claims.toml", tmp_path / "findings.md", studies / "claims-second.toml")
    assert text.splitlines() == page.read_text(encoding="utf-8").splitlines(), "run `make figures`"
    assert {path.name for path in (tmp_path / "findings").iterdir()} == {
        path.name for path in (ROOT / "docs" / "findings").iterdir()
    }
