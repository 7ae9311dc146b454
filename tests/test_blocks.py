"""Studies that are no full grid: blocks joined to the axes, every run once, with the identity and bits that it has in a grid."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
import xarray as xr
from click.testing import CliRunner

from exmy.cli import main
from tests.small import SHAPE  # noqa: F401 (one thread)
from train import Study, StudyError, merge_studies, open_study, read_study, run_study
from train.plan import plan

BASE: dict[str, Any] = {
    "name": "blocks",
    "baseline": "e8m7",
    "axes": {"recipe": ["e8m7", "e4m3"], "learning_rate": [1e-3], "seed": [0, 1]},
    "model": {"layers": 1, "heads": 2, "width": 16, "context": 8},
    "training": {"steps": 4, "sequences": 2, "warmup": 1, "evaluate_every": 4},
    "probe": {"every": 0},
    "signals": {"every": 0},
    "execution": {"pack_size": 1},
}
MORE: list[dict[str, Any]] = [
    {"recipe": ["e4m3"], "learning_rate": [1e-2, 1e-3]},  # the second is in [axes] already
    {"recipe": ["e5m2"], "seed": [1, 7]},
]
# The study before there were blocks: its hash and those of its runs, from that version.
ADDED = (  # settings that came later
    "dead_after = 50\n",
    'quantisers = "on"\neigenvalues = 1\nradii = [\n    0.05,\n]\nadaptive_radii = [\n    0.5,\n]\n'
    "samples = 8\nat_once = 1\n\n[probe.intervals]\n",
)
GOLDEN = ("5840f0a410f4", "8de917d9150e", "0f8413e1898e")


def study(**changes: Any) -> Study:
    return Study.model_validate(copy.deepcopy(BASE) | changes)


def write(path: Path, **changes: Any) -> Path:
    path.write_text(tomli_w.dumps(BASE | changes), encoding="utf-8")
    return path


def named(of: Study) -> list[tuple[str, float, int]]:
    return [(run.recipe.name, run.learning_rate, run.seed) for run in of.runs()]


def test_blocks_are_multiplied_out_and_joined_every_run_once() -> None:
    assert named(study(more=MORE)) == [
        ("e8m7", 1e-3, 0), ("e8m7", 1e-3, 1), ("e4m3", 1e-3, 0), ("e4m3", 1e-3, 1),
        ("e4m3", 1e-2, 0), ("e4m3", 1e-2, 1),
        ("e5m2", 1e-3, 1), ("e5m2", 1e-3, 7),
    ]  # fmt: skip


def test_a_run_of_a_block_is_the_same_as_in_a_grid() -> None:
    grid = study(axes={"recipe": ["e8m7", "e4m3", "e5m2"], "learning_rate": [1e-3, 1e-2], "seed": [0, 1, 7]})
    whole = {key: run.identity for key, run in zip(named(grid), grid.runs(), strict=True)}
    blocks = study(more=MORE)
    assert [run.identity for run in blocks.runs()] == [whole[key] for key in named(blocks)]


def test_a_study_without_blocks_has_the_hash_that_it_had() -> None:
    folder = Path(__file__).parent.parent / "studies"
    files = ("first-look-cpu.toml", "first-look-gpu.toml", "recipes-12m.toml")
    texts = [read_study(folder / name).to_toml() for name in files]
    for added in ADDED:
        assert all(text.count(added) == 1 for text in texts)
        texts = [text.replace(added, "") for text in texts]
    assert tuple(hashlib.sha256(text.encode()).hexdigest()[:12] for text in texts) == GOLDEN
    assert "more" not in study().to_toml()
    assert "strategy" not in study(strategy={"kind": "grid"}).to_toml()


def test_further_fields_may_stand_in_blocks(tmp_path: Path) -> None:
    axes = BASE["axes"] | {"layers": [1], "recipe": ["e8m7"]}
    path = write(tmp_path / "study.toml", axes=axes, more=[{"layers": [2, 3], "seed": [5]}])
    assert [(run.model.layers, run.seed) for run in read_study(path).runs()] == [(1, 0), (1, 1), (2, 5), (3, 5)]


def test_the_resolved_file_means_the_same_study(tmp_path: Path) -> None:
    first = study(more=[*MORE, {"learning_rate": 0.5, "seed": 3, "round": 2}])
    (tmp_path / "study.toml").write_text(first.to_toml())
    again = read_study(tmp_path / "study.toml")
    assert [run.identity for run in again.runs()] == [run.identity for run in first.runs()]
    assert again.hash == first.hash
    assert first.to_toml().count("[[more]]") == 3
    assert study(more=MORE).hash != study(more=MORE[:1]).hash != study().hash


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([{}, {"learning_rate": [-1.0]}], r"study.toml:\d+: more.learning_rate: .*greater than 0, got -1.0"),
        ([{"layers": [2]}], r"more, block 1: layers is no axis of this study: give it in \[axes\] too"),
        ([{}, {"init_seed": [2]}], r"more, block 2: init_seed is no axis of this study"),
        ([{"seed": [1, 1]}], r"more, block 1: seed names a value twice"),
        ([{"recipe": ["e9m3"]}], r"more, block 1: recipe 'e9m3' is neither .*exponent_bits must be 1..8, got 9"),
        ([{"recipe": []}], r"more.recipe: .*at least 1 item"),
        ([{"dataset": ["rust"]}], r"more, block 1: dataset 'rust' is unknown"),
        ([{"round": 1}], r"more.round: .*greater than or equal to 2, got 1"),
        ([{"seed": 99_999}] * 11, r"axes multiply to \d+ runs, more than 1000000"),
        ({"recipe": ["e4m3"]}, r"more: .*valid list"),
    ],
)
def test_a_bad_block_is_refused_in_a_line(more: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=message) as refused:
        read_study(write(tmp_path / "study.toml", more=more))
    assert "\n" not in str(refused.value)


def test_the_line_is_that_of_the_block(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(f"{tomli_w.dumps(BASE)}\n[[more]]\nseed = 3\n\n[[more]]\nrecipe = ['e4m3']\nseed = [-1]\n")
    lines = path.read_text().splitlines()
    with pytest.raises(StudyError, match=rf"study.toml:{lines.index('seed = [-1]') + 1}: more.seed: .*got -1"):
        read_study(path)


def test_the_baseline_may_be_in_a_block() -> None:
    assert study(baseline="e5m2", more=MORE).reference == "e5m2"
    with pytest.raises(ValueError, match=r"baseline 'e5m3' is not among axes.recipe: e8m7, e4m3, e5m2"):
        study(baseline="e5m3", more=MORE)


def test_what_fills_a_pack_is_reckoned_round_by_round() -> None:
    """A later round does not change the R of those before it, nor they its own."""
    auto = {"execution": {"pack_size": "auto"}}
    rounds = [{"round": 2, "seed": [8]}, {"round": 3, "seed": list(range(10, 18))}, {"seed": [20]}]
    packs = plan(study(more=rounds, **auto), torch.device("cpu"))
    assert [(len(pack.runs), pack.size) for pack in packs] == [(6, 8), (2, 2), (16, 16)]
    assert {run.seed for run in packs[0].runs} == {0, 1, 20}
    whole = plan(study(axes=BASE["axes"] | {"seed": [0, 1, 20]}, **auto), torch.device("cpu"))
    assert [pack.size for pack in whole] == [8]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blocks")
    run_study(study(more=MORE), folder / "out", "cpu")
    return folder / "out"


def test_it_is_trained_opened_shown_and_gone_on_with(trained: Path, tmp_path: Path) -> None:
    tree = open_study(trained)
    assert tree["summary"].to_dataset()["run"].values.tolist() == [run.identity for run in study(more=MORE).runs()]
    assert tree.attrs["runs_planned"] == tree.attrs["runs_finished"] == 8
    for command in ("status", "report", "compare", "resume"):
        found = CliRunner().invoke(main, [command, str(trained)])
        assert found.exit_code == 0, found.output
    more = [*MORE, {"seed": [9]}]
    path = write(tmp_path / "study.toml", more=more)
    dry = CliRunner().invoke(main, ["sweep", str(path), "--out", str(trained), "--device", "cpu", "--dry-run"])
    assert "2 runs in 2 packs of 1" in dry.output, dry.output
    assert "8 runs found finished" in dry.output


def test_merged_it_has_the_runs_of_all_and_no_others(trained: Path, tmp_path: Path) -> None:
    other = study(name="other", axes=BASE["axes"] | {"seed": [5]})
    run_study(other, tmp_path / "other", "cpu")
    merged = merge_studies([trained, tmp_path / "other"], tmp_path / "all")
    assert {run.identity for run in merged.study.runs()} == {
        run.identity for of in (study(more=MORE), other) for run in of.runs()
    }
    assert merged.runs == 10 == sum(1 for _ in merged.study.runs())
    ours, theirs = open_study(tmp_path / "all")["history"].to_dataset(), open_study(trained)["history"].to_dataset()
    same = ours.sel(run=theirs["run"].values)
    xr.testing.assert_identical(same["train_loss"].drop_attrs(), theirs["train_loss"].drop_attrs())
