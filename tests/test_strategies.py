"""Strategies as a user meets them: `exmy sweep --strategy`, status, report, resume, and what is refused; trained, in a second."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import xarray as xr
from click.testing import CliRunner, Result

from exmy.cli import main
from exmy.strategies import findings
from tests.small import SHAPE  # noqa: F401 (one thread)
from train import Study, open_study, read_study, run_strategy, run_study
from train.interruption import Interrupted
from train.observer import Together
from train.plan import PlannedPack
from train.strategy_table import WORDS, StrategyTable

BASE: dict[str, Any] = {
    "name": "tiny",
    "axes": {"recipe": ["e8m7", "e4m3"], "learning_rate": [1e-3, 4e-3], "seed": 2},
    "model": {"layers": 1, "heads": 2, "width": 16, "context": 8},
    "training": {"steps": 4, "sequences": 2, "warmup": 1, "evaluate_every": 4},
    "probe": {"every": 0},
    "signals": {"every": 0},
    "execution": {"pack_size": 2},
}
BISECT = BASE | {"strategy": {"kind": "bisect", "octaves": 1, "points": 2}}


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def write(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(tomli_w.dumps(content))
    return path


def write_text(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


class Stops(Together):
    """An observer that ends the training at the start of the n-th pack, as a signal does."""

    def __init__(self, at_pack: int) -> None:
        super().__init__()
        self.at_pack = at_pack

    def pack_started(self, pack: PlannedPack) -> None:
        self.at_pack -= 1
        if not self.at_pack:
            raise Interrupted(15)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps train nothing, so the search goes down to its limit, an octave below, in a second round."""
    folder = tmp_path_factory.mktemp("searched")
    path = write(folder / "tiny.toml", BASE | {"strategy": {"octaves": 1, "points": 2, "kind": "bisect"}})
    found = invoke("sweep", path, "--out", folder / "out", "--device", "cpu")
    assert found.exit_code == 0, found.output
    assert "Largest stable learning rate, 2 rounds, 16 runs" in found.output
    assert "none of those tried, down to 0.0004883" in found.output
    return folder / "out"


def test_what_a_search_found_is_shown_again_by_status_and_report(searched: Path) -> None:
    record = json.loads((searched / "strategy.json").read_text())
    assert [of["recipe"] for of in record["results"]] == ["e8m7", "e4m3"]
    assert [share["learning_rate"] for share in record["results"][0]["tried"]] == [2**-11, 2**-10.5, 2**-10, 2**-8]
    status = invoke("status", searched)
    assert "finished: all 16 runs are finished" in status.output
    assert "Largest stable learning rate" in status.output
    assert invoke("report", searched).exit_code == 0
    page = (searched / "report" / "index.html").read_text()
    assert "Largest stable learning rate, 2 rounds, 16 runs" in page
    assert "none of those tried, down to 0.0004883" in page
    tree = open_study(searched)
    assert tree.attrs["runs_planned"] == tree.attrs["runs_finished"] == 16


def test_a_search_that_was_stopped_in_its_second_round_ends_with_the_same_bits(searched: Path, tmp_path: Path) -> None:
    study = Study.model_validate(BISECT)
    with pytest.raises(Interrupted):
        run_strategy(study, tmp_path / "out", "cpu", Stops(at_pack=6))
    assert open_study(tmp_path / "out").attrs["runs_finished"] == 10
    found = invoke("resume", tmp_path / "out", "--device", "cpu")
    assert found.exit_code == 0, found.output
    ours, theirs = open_study(tmp_path / "out"), open_study(searched)
    for group in ("history", "evaluation"):
        xr.testing.assert_identical(ours[group].to_dataset().drop_attrs(), theirs[group].to_dataset().drop_attrs())
    for name in ("study.toml", "strategy.json"):
        assert (tmp_path / "out" / name).read_text() == (searched / name).read_text()


def test_a_dry_run_shows_the_round_that_comes_and_writes_nothing(searched: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.toml", BASE)
    arguments = [
        "sweep",
        path,
        "--device",
        "cpu",
        "--dry-run",
        "--strategy",
        "bisect",
        "--set",
        "octaves=1",
        "--set",
        "points=2",
    ]
    new = invoke(*arguments, "--out", tmp_path / "out")
    assert "8 runs in 4 packs of 2" in new.output
    assert "strategy bisect: the rounds so far, or the first" in new.output
    assert not (tmp_path / "out").exists()
    assert "16 runs found finished" in invoke(*arguments, "--out", searched).output


def test_planned_looks_are_taken_shown_and_not_changed(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.toml", BASE | {"axes": BASE["axes"] | {"learning_rate": [1e-3]}})
    arguments = ["sweep", path, "--out", tmp_path / "out", "--device", "cpu", "--strategy", "seeds"]
    found = invoke(*arguments, "--set", "looks=2")
    assert found.exit_code == 0, found.output
    assert "Against e8m7: look 2 of 2 planned, 8 runs" in found.output
    assert "not shown" in found.output
    assert open_study(tmp_path / "out")["summary"].to_dataset()["seed"].values.tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    changed = invoke(*arguments, "--set", "looks=3")
    assert changed.exit_code == 2
    assert "strategy.looks was 2 when the first of 2 planned looks was taken, and is 3" in changed.output
    assert len(changed.output.strip().splitlines()) == 1
    assert "Against e8m7" in invoke("status", tmp_path / "out").output


def test_a_strategy_on_the_command_line_is_refused_in_a_line(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.toml", BISECT)
    found = invoke("sweep", path, "--out", tmp_path / "out", "--strategy", "seeds", "--device", "cpu")
    assert found.exit_code == 2
    assert "octaves is a word of kind = 'bisect', and kind is 'seeds': leave it out" in found.output
    assert invoke("sweep", path, "--strategy", "guess").exit_code == 2


def test_a_grid_is_what_it_was(tmp_path: Path) -> None:
    study = Study.model_validate(BASE)
    assert run_strategy(study, tmp_path / "a", "cpu", Together()) == {}
    run_study(study, tmp_path / "b", "cpu", Together())
    assert not (tmp_path / "a" / "strategy.json").exists()
    assert (tmp_path / "a" / "study.toml").read_text() == (tmp_path / "b" / "study.toml").read_text()
    ours, theirs = (open_study(tmp_path / name)["history"].to_dataset().drop_attrs() for name in "ab")
    xr.testing.assert_identical(ours, theirs)


def test_findings_in_words() -> None:
    share = {"learning_rate": 2**-9, "diverged": 1, "runs": 4, "low": 0.0063, "high": 0.8059}
    found = {
        "recipe": "e5m7", "dataset": "python", "largest_stable": 2**-9.25, "smallest_unstable": 2**-9, "beyond": "",
        "highest_stable": 2**-6, "monotone": False, "exceptions": [share] * 6, "tried": [share], "runs": 40, "found": True,
    }  # fmt: skip
    record = {
        "kind": "bisect", "definition": "no_progress", "allowed": 0.1, "per_octave": 4, "rounds": 3, "runs": 80, "finished": True,
        "results": [found, found | {"largest_stable": 1.0, "smallest_unstable": None, "exceptions": [], "found": False}],
    }  # fmt: skip
    shown = findings(record)
    assert shown.rows[0][:4] == ("e5m7", "0.001642 (2^-9.25)", "0.001953 (2^-9)", "40")
    assert shown.rows[0][4].startswith("0.001953: 1/4 [1–81 %], ")
    assert shown.rows[0][4].count("1/4") == 4
    assert shown.rows[0][4].endswith(", and 2 lower ones; stable up to 0.01562 (2^-6)")
    assert shown.rows[1][1:3] == ("1 (2^0) or more (so far)", "-")
    assert "at most 10 % of its runs diverged (no_progress)" in shown.notes[0]


def test_the_page_on_strategies_has_every_word_with_its_default(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "strategies.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    studies = [read_study(write_text(tmp_path / "study.toml", block)) for block in blocks if "[axes]" in block]
    assert [sum(1 for _ in study.runs()) for study in studies] == [3 * 4 * 8 + 2 * 8 + 8, 2 * 16]
    for block in blocks:
        if "[strategy]" in block:
            table = tomllib.loads(block)["strategy"]
            assert set(table) == {"kind", *WORDS[table["kind"]]}
            assert StrategyTable.model_validate(table) == StrategyTable(kind=table["kind"])


@pytest.mark.parametrize(
    "content", ["", "[]", '{"schema": 1}', '{"schema": 1, "kind": "bisect", "results": [1]}', "\x1b[2J"]
)
def test_what_can_t_be_read_is_not_shown(content: str, searched: Path, tmp_path: Path) -> None:
    shutil.copy(searched / "study.toml", tmp_path / "study.toml")
    write_text(tmp_path / "strategy.json", content)
    found = invoke("status", tmp_path)
    assert found.exit_code == 0, found.output
    assert "Largest stable" not in found.output
