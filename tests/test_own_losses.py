"""Anyone's losses: tables of unequal runs, judged as a study's are, and `exmy stability`."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from click.testing import CliRunner, Result
from scipy import stats

from exmy.cli import main
from tests.test_stability import history, judge, noisy
from train import open_study
from train.own_losses import by_group, history_of_frame, own_stability
from train.stability import DivergenceSettings

ROOT = Path(__file__).parent.parent
FIRST_LOOK = ROOT / "studies" / "results" / "first-look-cpu"
NAN, INF = float("nan"), float("inf")
RULE: dict[str, Any] = {"spike_window": 8, "window": 5}


def frame(curves: dict[str, Any], every: int = 1, **columns: Any) -> pd.DataFrame:
    """A row a run and step; columns: a value for each run."""
    rows = [
        {"run": name, "step": every * i, "loss": loss} | {key: values[k] for key, values in columns.items()}
        for k, (name, curve) in enumerate(curves.items())
        for i, loss in enumerate(curve)
    ]
    return pd.DataFrame(rows)


def test_a_table_is_judged_as_the_same_runs_of_a_study_are() -> None:
    loss = noisy(4, 60).astype(np.float32)
    loss[1, 20], loss[2, 40:], loss[3, 50] = NAN, 6.0, 9.0
    table = frame({f"r{i}": row for i, row in enumerate(loss)})
    theirs = judge(history(loss), **RULE)
    ours = own_stability(history_of_frame(table), DivergenceSettings(**RULE), 3.2)
    for name in ("non_finite", "no_progress", "spike", "gap", "diverged", "diverged_step", "final_loss", "recovered"):
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_runs_may_have_other_steps_and_lengths_and_stand_in_any_order() -> None:
    short, long = [3.0, 2.0, NAN], [3.0, 2.5, 2.0, 1.5, 1.0]
    table = pd.concat([frame({"b": short}, every=100), frame({"a": long}, every=7)]).sample(frac=1, random_state=0)
    found = own_stability(history_of_frame(table), DivergenceSettings("non_finite", **RULE))
    by_run = {str(run): bool(bad) for run, bad in zip(found["run"].values, found["diverged"].values, strict=True)}
    assert by_run == {"a": False, "b": True}
    assert float(found["diverged_step"].sel(run="b")) == 200.0  # the table's own step, not the third
    assert float(found["final_loss"].sel(run="a")) == 2.0
    last = own_stability(history_of_frame(table), DivergenceSettings("non_finite", window=1))
    assert float(last["final_loss"].sel(run="a")) == 1.0  # of the last step, wherever its row stands
    assert "no_progress" not in found


def test_settings_say_which_definition_and_what_it_needs() -> None:
    runs = history_of_frame(frame({"a": [3.0, 3.0], "b": [1.0, 1.0]}))
    assert own_stability(runs)["diverged"].attrs["definition"] == "spike"
    assert own_stability(runs, unigram_entropy=3.05)["diverged"].values.tolist() == [True, False]
    with pytest.raises(ValueError, match="give it, in nats/token"):
        own_stability(runs, DivergenceSettings("no_progress"))
    gap = own_stability(
        history_of_frame(frame({"a": [1.0], "b": [1.3]}, group=["x", "y"]), group="group"), DivergenceSettings("gap")
    )
    assert gap["diverged"].values.tolist() == [False, True]


def test_a_study_is_its_own_tree() -> None:
    tree = open_study(FIRST_LOOK)
    summary = tree["summary"].to_dataset()
    found = own_stability(tree, DivergenceSettings(), float(tree.attrs["unigram_entropy"]), "e8m7")
    np.testing.assert_array_equal(found["diverged"], summary["diverged"])
    np.testing.assert_array_equal(found["spike"], summary["spike"])


@pytest.mark.parametrize(("change", "what"), [
    ({"columns": {"loss": "los"}}, "no column 'los' for the loss; the columns are run, step, loss"),
    ({"rows": 0}, "the table has no rows"),
    ({"cells": {"step": "ten"}}, "column 'step' must be numbers, got 'ten'"),
    ({"cells": {"step": NAN}}, "every row needs a step, and 1 have none"),
    ({"cells": {"step": 1}}, "run a has step 1 twice: is --run the column"),
    ({"cells": {"group": "z"}, "columns": {"group": "group"}}, "run a has group 'z' and 'x': a run has one"),
])  # fmt: skip
def test_tables_that_say_too_little_are_refused_in_a_line(change: dict[str, Any], what: str) -> None:
    table = frame({"a": [1.0, 2.0], "b": [1.0]}, group=["x", "y"]).astype(object).head(change.get("rows", 9))
    for name, value in change.get("cells", {}).items():
        table.loc[0, name] = value
    with pytest.raises(ValueError, match=what):
        history_of_frame(table, **change.get("columns", {}))


def groups(paired: bool, rates: bool = False) -> xr.Dataset:
    """x: 1 of 8 fails, y: 6 of 8; losses of the others y's 0.1 above."""
    rng = np.random.default_rng(0)
    level = rng.normal(2, 0.05, 8)
    curves: dict[str, Any] = {}
    for name, fails, above in (("x", 1, 0.0), ("y", 6, 0.1)):
        for seed in range(8):
            curves[f"{name}{seed}"] = [NAN] if seed < fails else [level[seed] + above + rng.normal(0, 0.001)]
    columns: dict[str, Any] = {"group": ["x"] * 8 + ["y"] * 8, "seed": [*range(8)] * 2}
    if rates:
        columns["lr"] = [1e-3] * 4 + [2e-3] * 4 + [1e-3] * 4 + [2e-3] * 4
    named = {"group": "group"} | ({"seed": "seed"} if paired else {}) | ({"learning_rate": "lr"} if rates else {})
    return own_stability(history_of_frame(frame(curves, **columns), **named), DivergenceSettings("non_finite"))


def test_groups_of_paired_runs_are_held_against_each_other_by_mcnemar_and_student() -> None:
    found = by_group(groups(True)).sel(row=1)
    assert (str(found["group"].values), str(found["how"].values), int(found["pairs"])) == ("y", "paired", 8)
    assert (int(found["diverged"]), int(found["runs"])) == (6, 8)
    assert float(found["p_rate"]) == stats.binomtest(5, 5).pvalue
    assert float(found["loss_difference"]) == pytest.approx(0.1, abs=0.005)
    assert float(found["p_rate_holm"]) == float(found["p_rate"])  # one comparison


def test_groups_of_unpaired_runs_are_held_against_each_other_by_boschloo_and_welch() -> None:
    summary = groups(False)
    found = by_group(summary, "x").sel(row=1)
    assert str(found["how"].values) == "unpaired"
    assert float(found["p_rate"]) == pytest.approx(stats.boschloo_exact([[6, 1], [2, 7]]).pvalue)
    loss = summary["final_loss"].values
    theirs = stats.ttest_ind(loss[14:], loss[1:8], equal_var=False)
    assert float(found["p_loss"]) == pytest.approx(theirs.pvalue)
    assert float(found["loss_difference_low"]) == pytest.approx(theirs.confidence_interval(0.95).low)


def test_groups_are_compared_within_learning_rates_and_baselines_must_be_there() -> None:
    found = by_group(groups(True, rates=True))
    assert list(zip(found["group"].values.tolist(), found["learning_rate"].values.tolist(), strict=True)) == [
        ("x", 1e-3), ("y", 1e-3), ("x", 2e-3), ("y", 2e-3),
    ]  # fmt: skip
    assert found["pairs"].values.tolist() == [0, 4, 0, 4]
    with pytest.raises(ValueError, match="'z' is none of the groups x, y"):
        by_group(groups(True), "z")


# --- on the command line


def exmy(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["stability", *map(str, arguments)])


def write(path: Path, rows: list[str]) -> Path:
    path.write_text("\n".join(["name,at,value,kind", *rows]) + "\n")
    return path


COLUMNS = ("--run", "name", "--step", "at", "--loss", "value")


def test_a_csv_of_unequal_runs(tmp_path: Path) -> None:
    """An empty loss was not logged, a nan is one that is not finite, and both are told apart."""
    rows = [f"a{i},{10 * t},{2.0 + 0.01 * i},bf16" for i in range(3) for t in range(40 + i)]
    rows += [f"b{i},{t},{'nan' if t > 20 and i else 3.0},fp8" for i in range(3) for t in range(30)]
    rows += ["b0,30,,fp8", "b0,31,inf,fp8"]
    path = write(tmp_path / "losses.csv", rows)
    done = exmy(path, *COLUMNS, "--group", "kind", "--definition", "non_finite", "--json", tmp_path / "found.json")
    assert done.exit_code == 0, done.output
    assert re.search(r"^bf16 +0/3 .*^fp8 +3/3 ", done.output, re.MULTILINE | re.DOTALL)
    assert "1 rows without a loss were left out" in done.output
    content = json.loads((tmp_path / "found.json").read_text())
    assert content["baseline"] == "bf16"
    assert [of["diverged"] for of in content["groups"]] == [0, 3]
    assert [run["diverged_step"] for run in content["runs"]] == [None, None, None, 31.0, 21.0, 21.0]


@pytest.mark.parametrize("names", [
    ("20261127163825001", "20261127163825002"), ("1e3", "1000.0"), ("007", "7"), ("nan", "NaN"), ("inf", "Infinity"),
])  # fmt: skip
def test_names_of_runs_are_no_numbers(tmp_path: Path, names: tuple[str, str]) -> None:
    """As FP64 each two of them would be one: 17 digits are more than it has."""
    rows = [f"{name},{150 * i + t},2.0,x" for i, name in enumerate(names) for t in range(150)]
    done = exmy(write(tmp_path / "losses.csv", rows), *COLUMNS, "--json", tmp_path / "found.json")
    assert done.exit_code == 0, done.output
    assert [run["run"] for run in json.loads((tmp_path / "found.json").read_text())["runs"]] == list(names)


def test_groups_and_seeds_keep_their_words(tmp_path: Path) -> None:
    """Groups of bits, the baseline named as it is written; seeds in whole numbers pair by number, others as they are written."""
    for seeds, pairs in ((["0", "1", "2"], 3), (["a", "1", "01"], 3)):
        rows = [f"{bits}-{seed},{t},2.0,{bits},{seed}" for bits in (8, 16) for seed in seeds for t in range(30)]
        path = tmp_path / "losses.csv"
        path.write_text("\n".join(["name,at,value,kind,seed", *rows]) + "\n")
        columns = (*COLUMNS, "--group", "kind", "--seed", "seed", "--baseline", "16", "--json", tmp_path / "found.json")
        done = exmy(path, *columns)
        assert done.exit_code == 0, done.output
        content = json.loads((tmp_path / "found.json").read_text())
        assert [(of["group"], of["pairs"]) for of in content["groups"]] == [("8", pairs), ("16", 0)]


@pytest.mark.parametrize(("arguments", "what"), [
    ((), "no column 'run' for the run; the columns are name, at, value, kind"),
    ((*COLUMNS, "--definition", "no_progress"), "give it, in nats/token"),
    ((*COLUMNS, "--group", "kind", "--baseline", "fp4"), "'fp4' is none of the groups bf16"),
    ((*COLUMNS, "--window", "0"), "window must be at least 1"),
    (("--run", "name", "--step", "kind", "--loss", "value"), "column 'kind' must be numbers"),
])  # fmt: skip
def test_bad_input_has_one_line_and_status_2(tmp_path: Path, arguments: tuple[str, ...], what: str) -> None:
    done = exmy(write(tmp_path / "l.csv", ["a,0,2.0,bf16", "a,1,1.9,bf16"]), *arguments)
    assert done.exit_code == 2
    assert what in done.output
    assert len(done.output.strip().splitlines()) == 1


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00", b'a,b\n1,2,3\n"'])
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "l.csv").write_bytes(content)
    done = exmy(tmp_path / "l.csv")
    assert done.exit_code == 2
    assert "l.csv" in done.output
    assert len(done.output.strip().splitlines()) == 1


def test_one_run_and_short_ones_have_an_answer(tmp_path: Path) -> None:
    done = exmy(write(tmp_path / "l.csv", ["a,0,2.0,bf16"]), *COLUMNS)
    assert done.exit_code == 0, done.output
    assert "0/1" in done.output
    assert "1 runs logged at most 128 steps" in done.output


def test_a_json_that_can_t_be_written_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "l.csv", ["a,0,2.0,bf16"])
    shutil.rmtree(tmp_path / "absent", ignore_errors=True)
    done = exmy(path, *COLUMNS, "--json", tmp_path / "absent" / "f.json")
    assert done.exit_code == 2
    assert "can't be written" in done.output


def grown(path: Path, *, fails: bool) -> Path:
    """Two formats, two rates, eight seeds; the second format fails at the higher rate."""
    rows = ["name,at,value,kind,lr,seed"]
    for kind, lr, seed in ((k, r, s) for k in ("bf16", "fp8") for r in (0.001, 0.002) for s in range(8)):
        bad = fails and kind == "fp8" and lr == 0.002
        rows += [
            f"{kind}-{lr}-{seed},{t},{5 if not t else 9 if bad else 2 + seed / 100 - lr},{kind},{lr},{seed}"
            for t in range(30)
        ]
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.mark.parametrize(("fails", "state"), [(True, "less stable"), (False, "undecided")])
def test_runs_with_rates_and_seeds_have_a_verdict(tmp_path: Path, fails: bool, state: str) -> None:
    """As `exmy verdict` has it: window, sensitivity and break-even of one's own runs."""
    path, file = grown(tmp_path / "l.csv", fails=fails), tmp_path / "f.json"
    columns = (*COLUMNS, "--group", "kind", "--learning-rate", "lr", "--entropy", "3.24")
    done = exmy(path, *columns, "--seed", "seed", "--json", file)
    assert done.exit_code == 0, done.output
    assert {"stable window, octaves", "LR sensitivity, nats/token", "break-even speed-up"} <= {
        line.split("  ")[0] for line in done.output.splitlines()
    }
    (found,) = json.loads(file.read_text())["verdicts"]
    fp8, bf16 = found["rows"]
    assert (fp8["state"], fp8["diverged"], fp8["runs"], fp8["learning_rate"]) == (state, 8 * fails, 8, 0.002)
    assert (fp8["window"], bf16["window"]) == (0.0 if fails else 1.0, 1.0)
    # Mean - min over both rates of the seeds' means, of losses 2.035 - rate and the first step's 5 where all end at 9.
    low = 2.035 - 0.001
    assert fp8["sensitivity"] == pytest.approx((5 - low) / 2 if fails else 0.0005, abs=1e-9)
    at = exmy(path, *columns, "--seed", "seed", "--at", "0.001")
    assert "fp8 is as stable as bf16 at learning rate 0.001, within 10 %, is undecided: of 8 pairs" in at.output
    apart = exmy(path, *columns)
    assert "with --learning-rate and --seed" in apart.output
    assert "stable window, octaves" not in apart.output


@pytest.mark.parametrize(("row", "what"), [
    ("a,0,2.0,x,1e-3,", "run a has no seed: fill column 'seed'"), ("a,0,2.0,x,,0", "run a has no lr: fill column 'lr'"),
    ("a,0,2.0,,1e-3,0", "run a has no kind"), ("a,0,2.0,x,-1,0", "run a has lr -1.0: a learning rate is a number above 0"),
    ("a,0,2.0,x,fast,0", "run a has lr fast: a learning rate is a number above 0"),
    ("a,0,2.0,x,inf,0", "run a has lr inf"), (",0,2.0,x,1e-3,0", "column 'name': every row needs a run, and 1 have none"),
    ("a,0,2.0,x,1e-3,0\nb,0,oops,x,1e-3,0", "column 'value' must be numbers, got 'oops'"),
    ("1,0,2.0,x,1e-3,0\n,1,2.0,x,1e-3,0", "every row needs a run, and 1 have none"),
])  # fmt: skip
def test_runs_that_lack_a_label_are_refused_by_name(tmp_path: Path, row: str, what: str) -> None:
    path = tmp_path / "l.csv"
    path.write_text(f"name,at,value,kind,lr,seed\n{row}\n")
    done = exmy(path, *COLUMNS, "--group", "kind", "--learning-rate", "lr", "--seed", "seed")
    assert done.exit_code == 2
    assert what in done.output
    assert len(done.output.strip().splitlines()) == 1


def test_a_baseline_without_a_finite_loss_is_told_in_words(tmp_path: Path) -> None:
    rows = [f"{name},{t},nan,{name}" for name in ("a", "b") for t in range(30)]
    done = exmy(write(tmp_path / "l.csv", rows), *COLUMNS, "--group", "kind", "--definition", "gap")
    assert done.exit_code == 0
    assert "no finite final loss of the baseline 'a' to hold 2 runs against" in done.output
    assert "Warning" not in done.output
