"""A sweep by two processes: what they refuse before any work, and what is left when one of them is stopped or killed."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from click.testing import CliRunner

from exmy.cli import main
from tests.recipe_packs import WIDE, program_for
from tests.test_recipe_packs import OWN
from tests.test_wide import ROOT, launch
from train import open_study
from train.optim import Muon
from train.plan import shape_of
from train.program import Probe, Program
from train.recipe_table import RecipeTable
from train.resolve import resolve_recipe
from train.settings import ModelSettings
from train.state import StateFormats
from train.wide_memory import memory, work_per_sequence
from train.wide_recipes import head_parts, refusal

RECIPES = OWN | {
    "summed short": RecipeTable("e4m3fn", "e4m3fn", "e5m2", accumulate="hopper-fp8"),
    "stream": RecipeTable("e4m3", "e4m3", "e4m3", residual="e4m3fn@tensor"),
    "head": RecipeTable(base="fp8-hybrid", lm_head="body"),
}

LONG = dataclasses.replace(WIDE, vocabulary=2**17, context=512)


def program(recipe: str, **changes: Any) -> Program:
    return program_for(resolve_recipe(recipe, RECIPES), **({"sequences": 4} | changes))


@pytest.mark.parametrize(
    ("made", "ranks", "way", "words"),
    [
        (program("e8m3"), 3, "ddp", "sequences = 3"),
        (program("e8m3", shape=dataclasses.replace(WIDE, dropout=0.1)), 2, "ddp", "dropout"),
        (program("summed short"), 2, "ddp", "accumulate = 'fp32'"),
        (program("stream"), 2, "ddp", "residual"),
        (program("deepseek"), 2, "ddp", "blocks of 128 tokens don't fit the 32 tokens"),
        (program("mxfp8", sequences=2), 2, "ddp", "blocks of 32 tokens don't fit the 16"),
        (program("head", shape=LONG, sequences=16), 8, "ddp", "would share one"),
        (program("e8m3", optimizer=Muon()), 2, "fsdp", "optimizer = 'adamw'"),
        (program("e8m3", state=StateFormats(master="bf16", rounding="stochastic")), 2, "fsdp", "rounded at random"),
        (program("ms-amp-o2"), 2, "fsdp", "whole matrices"),
        (program("e8m3", signals_every=10), 2, "fsdp", "every = 0"),
        (program("e8m3", probe=Probe(2, ("hessian_trace",))), 2, "ddp", "'hessian_trace' takes whole runs"),
        (program("e8m3", shape=dataclasses.replace(WIDE, heads=2, width=36)), 8, "fsdp", "rows"),
    ],
)  # fmt: skip
def test_what_ranks_cannot_share_is_refused_in_a_line(made: Program, ranks: int, way: Any, words: str) -> None:
    sequences = made.sequences if words.startswith("sequences") else max(made.sequences, ranks)
    made = dataclasses.replace(made, sequences=sequences)
    why = refusal(made, ranks, way)
    assert why is not None
    assert words in why
    assert "\n" not in why


@pytest.mark.parametrize(
    "recipe", ["native-bf16", "fp8-hybrid", "fp8-hybrid-row", "nvfp4", "mxfp8", "ms-amp-o2", "everything"]
)
def test_what_two_ranks_can_share_is_not(recipe: str) -> None:
    assert refusal(program(recipe), 2, "ddp") is None


def test_chunks_of_the_head_are_one_process_s_or_nobody_s() -> None:
    rows = 2**17
    assert head_parts(2048, rows, 1, 4) is None  # two parts of 4096
    parts = [head_parts(4096, rows, rank, 4) for rank in range(4)]
    assert [s for part in parts for s in part or []] == [slice(i, i + 4096) for i in range(0, 16384, 4096)]
    assert head_parts(1024, rows, 0, 8) is None
    assert head_parts(16, 64, 1, 2) == [slice(0, 32)]


def test_one_process_has_nobody_to_share_with(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["sweep", "--wide", "ddp", "--out", str(tmp_path / "study")])
    assert result.exit_code == 2
    assert result.output.startswith("exmy: --wide ddp")
    assert not (tmp_path / "study").exists()


STUDY = """
name = "wide"
[axes]
recipe = ["fp8-hybrid-delayed"]
learning_rate = [1e-2]
[model]
layers = 1
heads = 2
width = 16
context = 16
[training]
steps = 150
sequences = 4
evaluate_every = 75
[probe]
every = 0
[execution]
checkpoint_seconds = 0.2
"""


# To its end, and without the report, whose libraries take longer to load than all of this trains.
FINISH = """
import logging, sys
from train import read_study
from train.wide_study import run_wide
logging.basicConfig(level=logging.INFO, format="%(message)s")
run_wide(read_study(sys.argv[1]), sys.argv[2], "ddp", "cpu")
"""


def sweep(study: Path, out: Path) -> list[subprocess.Popen[str]]:
    """Two ranks' sweep, under way."""
    return launch(2, [sys.executable, "-m", "exmy", "sweep", str(study), "--out", str(out), "--device", "cpu"])


def finish(study: Path, out: Path) -> list[subprocess.Popen[str]]:
    """The same, for a sweep that will reach its end."""
    return launch(2, [sys.executable, "-c", FINISH, str(study), str(out)])


def ended(ranks: list[subprocess.Popen[str]]) -> list[str]:
    return [rank.communicate(timeout=300)[0] for rank in ranks]


def wait_for_checkpoint(out: Path, beyond: int) -> int:
    """The step of a checkpoint beyond one, of a pack under way."""
    for _ in range(3000):
        for path in out.glob("checkpoints/*/checkpoint.json"):
            try:
                step = int(json.loads(path.read_text())["step"])
            except (OSError, ValueError):
                continue
            if step > beyond:
                return step
        time.sleep(0.01)
    raise AssertionError(f"no checkpoint beyond step {beyond} in {out}")


def test_a_stopped_rank_stops_all_and_a_killed_one_ends_all_in_a_line_and_nothing_is_lost(tmp_path: Path) -> None:
    """SIGTERM to one rank, then SIGKILL to one, then left alone: the bits of a sweep that nobody disturbed."""
    study, out = tmp_path / "study.toml", tmp_path / "disturbed"
    study.write_text(STUDY)
    ranks = sweep(study, out)
    step = wait_for_checkpoint(out, 0)
    ranks[1].send_signal(signal.SIGTERM)
    said = ended(ranks)
    assert ranks[0].returncode == 128 + signal.SIGTERM, said
    assert "up to step" in said[0]
    assert ranks[1].returncode == 128 + signal.SIGTERM, said

    ranks = sweep(study, out)
    wait_for_checkpoint(out, step + 5)
    os.kill(ranks[1].pid, signal.SIGKILL)
    said = ended(ranks)
    assert ranks[0].returncode == 2, said
    (line,) = [line for line in said[0].splitlines() if line.startswith("exmy:")]
    assert line.startswith("exmy: rank 1 of 2 is gone: ")
    assert "Traceback" not in said[0]

    ranks = finish(study, out)
    said = ended(ranks)
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert "going on after step" in said[0]
    ended(finish(study, tmp_path / "whole"))
    disturbed, undisturbed = open_study(out), open_study(tmp_path / "whole")
    for group in ("history", "evaluation"):
        xr.testing.assert_equal(disturbed[group].to_dataset(), undisturbed[group].to_dataset())
    assert disturbed.attrs["device"].startswith("2 x CPU")
    assert np.isfinite(disturbed["history/train_loss"]).all()


def test_alarms_ring_while_ranks_train_as_the_histories_say_afterwards(tmp_path: Path) -> None:
    study, out = tmp_path / "study.toml", tmp_path / "out"
    alarms = '[alarms]\nthresholds = ["train_loss<5.4", "grad_norm>1e9", "kurtosis>0.5"]\n[signals]\nevery = 7\n'
    study.write_text(
        STUDY.replace("steps = 150", "steps = 40\nwarmup = 4").replace("every = 75", "every = 20") + alarms
    )
    ranks = finish(study, out)
    said = ended(ranks)
    assert [rank.returncode for rank in ranks] == [0, 0], said
    losses = open_study(out)["history"].to_dataset()["train_loss"].values[0]
    first = int(np.flatnonzero(losses < 5.4)[0])
    assert 0 < first < 39, "neither at once nor never"
    run = "fp8-hybrid-delayed, rate 0.01, seed 0 at step"
    rang = sorted(line for line in said[0].splitlines() if line.startswith("alarm "))
    assert [line.rpartition(" (")[0] for line in rang] == [
        f"alarm kurtosis>0.5: {run} 0", f"alarm train_loss<5.4: {run} {first}",
    ]  # fmt: skip
    assert "alarm " not in said[1], "rank 0 speaks for all"


def test_what_is_refused_ends_every_rank_before_any_work(tmp_path: Path) -> None:
    study = tmp_path / "study.toml"
    study.write_text(STUDY.replace("sequences = 4", "sequences = 3"))
    ranks = sweep(study, tmp_path / "out")
    said = ended(ranks)
    assert [rank.returncode for rank in ranks] == [2, 2], said
    assert said[0].splitlines() == [
        "exmy: recipe 'fp8-hybrid-delayed': 2 ranks share a batch in equal parts, and it has 3 sequences: take sequences = 2"
    ]
    assert said[1] == ""


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("sweep FILE --out OUT --executor ray", "ddp shares each run among torchrun's ranks: leave --executor"),
        ("sweep FILE --out OUT --workers 2 --wide fsdp", "fsdp shares each run among torchrun's ranks"),
        ("sweep FILE --out OUT --set training.steps=0", "training.steps"),
        ("resume OUT", "OUT"),
    ],
)
def test_what_every_rank_finds_by_itself_one_says(
    command: str, words: str, rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before they have met: options, the study file and the directory are the same to all."""
    study, out = tmp_path / "study.toml", tmp_path / "OUT"
    study.write_text(STUDY)
    for name, value in {"TORCHELASTIC_RUN_ID": "t", "WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank}.items():
        monkeypatch.setenv(name, str(value))
    result = CliRunner().invoke(
        main, [{"FILE": str(study), "OUT": str(out)}.get(word, word) for word in command.split()]
    )
    assert result.exit_code == 2
    lines = result.output.splitlines()
    assert len(lines) == 1 - rank
    assert all(words in line for line in lines)
    assert not out.exists()


RECIPES_OF_THE_TABLE = ("native-bf16", "masked-e8m3", "fp8-hybrid", "mxfp8")


def seven_b(recipe: str) -> Program:
    """The paper's 7B shape, a sequence a card of eight."""
    model = ModelSettings(
        architecture="llama", layers=32, heads=32, width=4096, hidden=11008, context=2048, vocabulary=32_000
    )
    return program(recipe, shape=shape_of(model), sequences=8, evaluation_sequences=8, steps=100)


def row(recipe: str, way: Any) -> str:
    """Of the guide's table."""
    made = seven_b(recipe)
    each = memory(made, 8, way, compiled=True)
    numbers = [*each, each.total, work_per_sequence(made, compiled=True)]
    return f"| `{recipe}` | {way} | {' | '.join(f'{number / 2**30:.1f}' for number in numbers)} |"


def test_the_guides_table_is_what_the_memory_works_out_to() -> None:
    page = (ROOT / "docs" / "wide.md").read_text()
    for recipe in RECIPES_OF_THE_TABLE:
        assert row(recipe, "ddp") in page
        assert row(recipe, "fsdp") in page
    made = seven_b("native-bf16")
    # Llama-2-7B: embeddings and head, 32 blocks of 4 D^2 + 3 D F + 2 D, the last norm.
    D, F, V = 4096, 11008, 32_000
    in_blocks = 32 * (4 * D * D + 3 * D * F + 2 * D)
    assert f"{2 * V * D + in_blocks + D:,} parameters, {in_blocks:,} of them in the blocks" in page
    # By hand: FP32 masters of an eighth of the blocks, and of what is outside them.
    assert memory(made, 8, "fsdp", compiled=True).masters == 4 * (2 * V * D + D + in_blocks // 8)
    assert memory(made, 8, "ddp", compiled=True).moments == 8 * (2 * V * D + D + in_blocks)
