"""The section on studies in docs/landscape.md has every measure with what it costs, and every setting of [probe]."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.test_docs import ROOT
from train.measures import MEASURES, NAMES
from train.probe_costs import gradients_of
from train.program import Probe
from train.settings import ProbeSettings
from train.study_file import read_study

PAGE = ROOT / "docs" / "landscape.md"


def test_the_section_on_studies_has_every_measure_with_its_cost_and_every_setting(tmp_path: Path) -> None:
    section = PAGE.read_text(encoding="utf-8").split("## In a study")[1]
    rows = re.findall(r"^\| (.*?) \| `(.*?)` \| (.*?) \|$", section, re.MULTILINE)
    costs = {name: cost for cost, name, _ in rows if name in NAMES}
    assert costs.keys() == set(NAMES)
    for name in MEASURES:
        assert float(costs[name]) == pytest.approx(gradients_of(name, Probe(every=50)), rel=0.05), name
    defaults = {name: default for default, name, _ in rows if name not in NAMES}
    assert defaults.pop("[probe.intervals]") == "none"
    settings = ProbeSettings().model_dump()
    assert defaults.keys() == settings.keys() - {"intervals"}
    for name, default in defaults.items():
        assert ast.literal_eval(default) == settings[name], name
    shown = section[section.index("    [probe]") : section.index("Each measure")]
    toml = "\n".join(line[4:] for line in shown.splitlines())
    axes = 'axes = { recipe = ["e8m7", "e4m3"], learning_rate = [1e-3], seed = 2 }\n'
    (tmp_path / "mine.toml").write_text(axes + toml, encoding="utf-8")
    read = read_study(tmp_path / "mine.toml")
    assert [run.seed for run in read.chosen(read.probe.snapshots, read.runs())] == [0]
    assert read.probe.intervals == {"hessian_eigenvalue": 500}
