"""Pairs of seeds that share weights or batches are not independent: every command that gives an interval says so."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from exmy.cli import main
from exmy.seeds import seeds_line
from train.seed_cube import crossed
from train.study import Study

WORDS = "Seeds are crossed: 4 pairs of 2 init_seed and 2 data_seed share weights or batches"
STUDY = """
name = "crossed"
baseline = "e8m7"

[axes]
recipe = ["e8m7", "e8m1"]
learning_rate = [1e-3]
{seeds}

[model]
layers = 1
heads = 1
width = 8
context = 8

[training]
steps = 3
sequences = 2
warmup = 1
"""
CROSSED, TOGETHER = "init_seed = [0, 1]\ndata_seed = [3, 4]", "seed = 4"


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ([(0, 0), (1, 1), (2, 2)], ""),
        ([(5, 0), (6, 0), (7, 0)], ""),  # batches alike, weights vary: independent given the batches
        ([(5, 0), (5, 1)], ""),
        ([(0, 3), (0, 4), (1, 3), (1, 4)], "4 pairs of 2 init_seed and 2 data_seed"),
        ([(0, 3), (1, 4), (2, 4)], "3 pairs of 3 init_seed and 2 data_seed"),
        ([(0, 1), (1, 0), (0, 1)], ""),  # one pair twice, of two recipes
        ([(0, 0), (0, 1), (1, 2)], "3 pairs of 2 init_seed and 3 data_seed"),
    ],
)
def test_seeds_are_crossed_where_one_stands_in_several_pairs(pairs: list[tuple[int, int]], words: str) -> None:
    found = crossed(pairs)
    assert bool(found) == bool(words)
    assert words in found


@pytest.mark.parametrize(("seeds", "said"), [(CROSSED, True), (TOGETHER, False)])
def test_every_command_with_intervals_says_so(tmp_path: Path, seeds: str, said: bool) -> None:
    file, out = tmp_path / "crossed.toml", tmp_path / "crossed"
    file.write_text(STUDY.format(seeds=seeds), encoding="utf-8")

    def exmy(*arguments: str | Path) -> str:
        done = CliRunner().invoke(main, [*map(str, arguments)])
        assert done.exit_code in (0, 1), done.output
        return " ".join(done.output.split())

    assert (WORDS in exmy("sweep", file, "--device", "cpu", "--dry-run")) == said
    exmy("sweep", file, "--device", "cpu", "--out", out)
    assert (WORDS in exmy("verdict", "e8m1", out)) == said
    assert (WORDS in exmy("compare", out)) == said
    assert (WORDS in (out / "report" / "index.html").read_text(encoding="utf-8")) == said


def test_a_study_without_another_recipe_is_told_too() -> None:
    axes = {"recipe": ["e8m7"], "learning_rate": [1e-3], "init_seed": [0, 1], "data_seed": [0, 1]}
    assert WORDS in seeds_line(Study.model_validate({"name": "s", "baseline": "e8m7", "axes": axes}))
