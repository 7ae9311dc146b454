"""A share of diverged runs has one interval, Clopper and Pearson's by SciPy, whichever command shows it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import xarray as xr
from click.testing import CliRunner
from rich.console import Console
from scipy.stats import binomtest

from exmy.cli import main
from exmy.console import stability_tables
from exmy.report.content import content
from train import open_study
from train.store import study_of

STUDY = Path(__file__).parent.parent / "studies" / "results" / "first-look-cpu"


def share(k: int, n: int) -> str:
    """Such as "3/3 [29–100": all that is shown of a share, but for what closes it."""
    interval = binomtest(k, n).proportion_ci(0.95, method="exact")
    return f"{k}/{n} [{100 * interval.low:.0f}–{100 * interval.high:.0f}"


@pytest.fixture(scope="module")
def tree() -> xr.DataTree:
    return open_study(STUDY)


def test_what_it_is_by_hand() -> None:
    """Of three runs of which none diverged 1 - 0.025^(1/3); Wilson's would end at 56 %."""
    assert (share(0, 3), share(3, 3)) == ("0/3 [0–71", "3/3 [29–100")


def test_the_table_that_a_sweep_ends_with_shows_it(tree: xr.DataTree) -> None:
    (table,) = stability_tables(tree)
    paper = io.StringIO()
    Console(file=paper, width=200).print(table)
    shown = paper.getvalue()
    assert shown.count(share(0, 3)) == 8
    assert shown.count(share(3, 3)) == 8


def test_a_verdict_shows_it() -> None:
    shown = CliRunner().invoke(main, ["verdict", "e4m3", str(STUDY)]).output
    assert share(0, 3) in shown
    assert share(3, 3) in shown


def test_the_report_looks_it_up(tree: xr.DataTree) -> None:
    limits = content([(study_of(STUDY), tree)])["limits"]
    for k in range(4):
        interval = binomtest(k, 3).proportion_ci(0.95, method="exact")
        assert limits[3][k] == pytest.approx([interval.low, interval.high], abs=1e-5)


def test_a_table_of_ones_own_losses_shows_it(tmp_path: Path) -> None:
    rows = ["run,step,loss,format"]
    rows += [
        f"{name}{seed},{step},{loss},{name}"
        for name, lost in (("fine", 0), ("lost", 2))
        for seed in range(5)
        for step, loss in enumerate((3.0, 2.0, "nan" if seed < lost else 1.0))
    ]
    path = tmp_path / "losses.csv"
    path.write_text("\n".join(rows) + "\n")
    done = CliRunner().invoke(main, ["stability", str(path), "--group", "format", "--definition", "non_finite"])
    assert done.exit_code == 0, done.output
    assert share(0, 5) in done.output
    assert share(2, 5) in done.output
    assert "ilson" not in done.output
