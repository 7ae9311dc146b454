"""What a report is made with is looked for before any work: training that ends in a traceback has been waited for."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from click.testing import CliRunner

from exmy.cli import main
from exmy.needed import FOR_REPORTS

ROOT = Path(__file__).parent.parent
STUDY = ROOT / "studies" / "results" / "first-look-cpu"


def without(monkeypatch: pytest.MonkeyPatch, *absent: str) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in absent else real(name, *rest))


@pytest.mark.parametrize("command", ["sweep", "resume", "report"])
@pytest.mark.parametrize(
    ("absent", "said"),
    [
        (["plotly"], "plotly is not installed, and the report needs it: pip install plotly"),
        (["PIL"], "pillow is not installed, and the report needs it: pip install pillow"),
        (
            ["jinja2", "matplotlib"],
            "jinja2, matplotlib are not installed, and the report needs them: pip install jinja2 matplotlib",
        ),
    ],
)
def test_it_is_said_in_a_line_before_any_work(
    command: str, absent: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, *absent)
    out = tmp_path / "out"
    arguments = {
        "sweep": [str(STUDY / "study.toml"), "--out", str(out)], "resume": [str(out)], "report": [str(STUDY), "--out", str(out)],
    }[command]  # fmt: skip
    if command == "resume":
        out.mkdir()
        (out / "study.toml").write_bytes((STUDY / "study.toml").read_bytes())
    before = sorted(tmp_path.rglob("*"))
    refused = CliRunner().invoke(main, [command, *arguments])
    assert (refused.exit_code, refused.output) == (2, f"exmy: {said}\n")
    assert sorted(tmp_path.rglob("*")) == before


def test_of_a_hosts_ranks_one_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "plotly")
    monkeypatch.setenv("LOCAL_RANK", "1")
    refused = CliRunner().invoke(main, ["sweep", str(STUDY / "study.toml"), "--out", str(tmp_path / "out")])
    assert (refused.exit_code, refused.output) == (2, "")


def printed(code: str) -> str:
    """What a fresh Python prints that runs the code."""
    where = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=where).stdout


def test_it_takes_no_import_of_what_takes_long() -> None:
    code = (
        "import sys\nfrom exmy.needed import check_packages\ncheck_packages()\n"
        "print(sorted({'torch', 'numpy', 'matplotlib', 'plotly', 'jinja2', 'PIL'} & set(sys.modules)))"
    )
    assert printed(code) == "[]\n"


@pytest.mark.parametrize("module", FOR_REPORTS)
def test_pip_knows_each_by_the_name_that_is_said(module: str) -> None:
    assert FOR_REPORTS[module] in {name.lower() for name in packages_distributions()[module]}


def test_a_report_imports_nothing_else_of_others_that_a_sweep_has_not_by_then() -> None:
    """What is first imported while it is written would be missed after all the training."""
    code = (
        "import json, sys, tempfile\nfrom pathlib import Path\nimport train\nfrom train import open_study\n"
        f"study = Path({str(STUDY)!r})\ntree = open_study(study)\ntree.load()\n"
        "import exmy.sweep\nbefore = {name.partition('.')[0] for name in sys.modules}\n"
        "from exmy.report import write_report\nwrite_report(study, Path(tempfile.mkdtemp()), tree)\n"
        "after = {name.partition('.')[0] for name in sys.modules} - before - set(sys.stdlib_module_names)\n"
        "print(json.dumps([name for name in after if not name.startswith('_')]))"
    )
    assert set(json.loads(printed(code))) <= {*FOR_REPORTS, "mpl_toolkits"}
