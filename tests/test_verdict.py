"""The verdict, worked by hand on made-up studies, and `exmy verdict` on made-up and committed ones."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from click.testing import CliRunner, Result
from scipy import stats

from exmy.cli import main
from exmy.verdict import run_verdict, sentence
from tests.test_windows import NAN, grid, runs
from train import StudyError
from train.equivalence import equivalent_rates
from train.proportions import Pairs
from train.verdicts import VARIABLES, VerdictSettings, break_even, reference_rate, verdict

ROOT = Path(__file__).parent.parent
CPU, GPU = (ROOT / "studies" / "results" / name for name in ("first-look-cpu", "first-look-gpu"))


def study(base_fails: int, fails: int, seeds: int, both: int = 0) -> xr.Dataset:
    """One rate; a fails in `fails` of the seeds, the baseline b in `base_fails`, in `both` of them together."""
    a = [NAN if i < fails else 2.0 + i / 1000 for i in range(seeds)]
    b = [NAN if fails - both <= i < fails - both + base_fails else 1.9 + i / 1000 for i in range(seeds)]
    return grid({"a": [a], "b": [b]})


def row(of: xr.Dataset, recipe: str = "a") -> dict[str, Any]:
    return {str(name): of[name].sel(recipe=recipe).item() for name in of.data_vars}


@pytest.mark.parametrize(("base_fails", "fails", "seeds", "state"), [
    (0, 0, 28, "undecided"), (0, 0, 29, "as stable"),  # 0.9^29 < 5 % < 0.9^28
    (0, 5, 40, "undecided"), (0, 6, 40, "less stable"),  # 2 / 2^6 < 5 % < 2 / 2^5
    (6, 0, 40, "more stable"), (0, 3, 3, "undecided"), (1, 1, 100, "as stable"), (0, 0, 1, "undecided"),
])  # fmt: skip
def test_states_by_hand(base_fails: int, fails: int, seeds: int, state: str) -> None:
    found = verdict(study(base_fails, fails, seeds), "b")
    assert row(found)["state"] == state
    assert row(found, "b")["state"] == "baseline"
    assert (row(found)["only_recipe"], row(found)["only_baseline"], row(found)["pairs"]) == (fails, base_fails, seeds)
    assert state in sentence(found)


def test_no_verdict_rests_on_fewer_pairs_than_could_bear_one() -> None:
    for seeds in (1, 5):
        fails = [(b, a) for a in range(seeds + 1) for b in {0, min(1, seeds - a)}]
        assert {row(verdict(study(*each, seeds), "b"))["state"] for each in fails} == {"undecided"}


def test_several_recipes_share_alpha_by_holms_steps() -> None:
    clean, six = [1.9] * 40, [NAN] * 6 + [2.0] * 34
    one, two = grid({"a": [six], "b": [clean]}), grid({"a": [six], "c": [six], "b": [clean]})
    assert row(verdict(one, "b"))["state"] == "less stable"
    both = verdict(two, "b")
    assert row(both)["p_differ"] == 2 / 2**6
    assert row(both)["p_differ_holm"] == 4 / 2**6
    assert row(both)["state"] == "undecided"
    assert row(verdict(two, "b", ["a"]))["state"] == "less stable"  # asked for alone


def test_divergence_is_compared_at_the_baselines_optimum_or_where_one_says() -> None:
    cube = grid({"a": [[2.0] * 30, [NAN] * 30], "b": [[2.5] * 30, [2.0] * 30]})
    assert reference_rate(cube, "b") == 2e-3
    assert row(verdict(cube, "b"))["state"] == "less stable"
    there = verdict(cube, "b", settings=VerdictSettings(learning_rate=1e-3))
    assert (row(there)["state"], row(there)["learning_rate"]) == ("as stable", 1e-3)
    with pytest.raises(ValueError, match=r"b has no run at learning rate 0\.5; it has 0\.001, 0\.002"):
        verdict(cube, "b", settings=VerdictSettings(learning_rate=0.5))


def test_break_even_by_its_formula() -> None:
    """Five rates, octaves apart. b: all in its window, none fails: 1 + 0.1 * 5 / (4 + 1). a: two, a quarter fails at the best."""
    rates = [1e-3 * 2**i for i in range(5)]
    b = [[2.0] * 4] * 5
    a = [[2.01, 2.0, 2.0, 2.0], [NAN, 1.99, 1.99, 1.99], [NAN] * 4, [NAN] * 4, [NAN] * 4]
    settings = VerdictSettings(allowed=0.3)
    cube = grid({"a": a, "b": b}, rates=rates)
    expected = (1 / 0.75 + 0.1 * 5 / (1 + 1)) / (1 + 0.1)
    found = break_even(cube, "a", "b", settings)
    assert found[0] == pytest.approx(expected)
    assert found[1] <= expected <= found[2]
    dear = break_even(cube, "a", "b", VerdictSettings(allowed=0.3, search_cost=1.0))
    assert dear[0] == pytest.approx((1 / 0.75 + 5 / 2) / 2)
    assert break_even(cube, "b", "b", settings) == (1.0, 1.0, 1.0)
    never = grid({"a": [[NAN] * 4] * 5, "b": b}, rates=rates)
    assert break_even(never, "a", "b", settings)[0] == math.inf
    assert break_even(never, "b", "a", settings)[0] == 0.0
    assert math.isnan(break_even(grid({"a": [[NAN]], "b": [[NAN]]}), "a", "b", settings)[0])


def test_break_even_limits_hold_where_two_rates_are_nearly_as_good() -> None:
    """a's better rate, by 0.001 at a spread of 0.05, loses 40 % of its runs and its other rate none: which is which is luck.

    At the better one, both rates in both windows: (1 / 0.6 + 0.1) / (1 + 0.1).
    """
    rng, truth, held = np.random.default_rng(0), (1 / 0.6 + 0.1) / 1.1, 0
    for _ in range(40):
        losses = 2 + np.array([0.0, 0.001])[:, None] + 0.05 * rng.standard_normal((2, 2, 48))
        failed = rng.random((2, 48)) < np.array([0.4, 0.0])[:, None]
        cube = grid(
            {"a": losses[0].tolist(), "b": losses[1].tolist()},
            {"a": failed.tolist(), "b": np.zeros((2, 48), bool).tolist()},
        )
        _, low, high = break_even(cube, "a", "b", VerdictSettings(allowed=0.5))
        held += low <= truth <= high
    assert held == 40


@pytest.mark.parametrize(("first", "second", "n"), [(3, 0, 50), (5, 0, 100), (1, 1, 40), (9, 3, 60)])
def test_as_many_pairs_as_are_told_decide_if_the_truth_is_as_seen(first: int, second: int, n: int) -> None:
    """The power of either test at the shares that were seen, summed over tables that these tests are asked about one by one."""
    fails = {"a": [[i < first for i in range(n)]], "b": [[first <= i < first + second for i in range(n)]]}
    losses = {name: [[2.0] * n] for name in fails}
    needed = verdict(grid(losses, fails), "b")["pairs_needed"].sel(recipe="a").item()
    assert needed > 0
    for pairs, enough in ((int(needed), True), (int(0.9 * needed), False)):
        powers = [0.0, 0.0]
        b, c = np.meshgrid(np.arange(60), np.arange(60), indexing="ij")
        rest = pairs - b - c
        chance = stats.multinomial.pmf(
            np.stack([b, c, rest], -1)[rest >= 0], pairs, [first / n, second / n, 1 - (first + second) / n]
        )
        for weight, one, other in zip(chance, b[rest >= 0].tolist(), c[rest >= 0].tolist(), strict=True):
            if weight > 1e-5:
                table = Pairs(0, one, other, pairs - one - other)
                powers[0] += weight * (equivalent_rates(table, 0.1).p <= 0.05)
                powers[1] += weight * (stats.binomtest(one, one + other).pvalue <= 0.05 if one + other else 0)
        assert (max(powers) > 0.795) == enough, powers


def test_break_even_limits_close_with_seeds() -> None:
    b, a = [[1.9] * 400, [2.5] * 400], [[NAN] * 20 + [1.9] * 380, [NAN] * 400]
    found = break_even(grid({"a": a, "b": b}), "a", "b", VerdictSettings())
    assert found[0] == pytest.approx((1 / 0.95 + 0.2) / 1.2)
    assert 1.0 < found[1] < found[0] < found[2] < 1.1


def test_a_verdict_has_all_that_it_promises_with_what_it_means() -> None:
    cube = grid({"a": [[2.0, 2.1, 2.2, 2.3, 2.2, 2.0]] * 2, "b": [[1.9, 2.0, 2.1, 2.2, 2.1, 2.0]] * 2})
    found = verdict(cube, "b")
    assert set(found.data_vars) == set(VARIABLES)
    assert all({"units", "long_name", "source"} <= set(found[name].attrs) for name in found.data_vars)
    assert found["recipe"].values.tolist() == ["a", "b"]
    assert found.attrs["confidence"] == 0.95


@pytest.mark.parametrize(
    "name",
    ["none diverged", "all diverged", "one seed", "NaN everywhere", "missing cells", "no pair", "not at that rate"],
)
def test_degenerate_studies_have_a_clear_answer(name: str) -> None:
    """Never an exception or a verdict, always a sentence and the counts that it rests on."""
    data = {
        "none diverged": runs({"a": [[2.0] * 4] * 2, "b": [[1.9] * 4] * 2}),
        "all diverged": runs({"a": [[9.0] * 4] * 2, "b": [[9.0] * 4] * 2}, {"a": [[1] * 4] * 2, "b": [[1] * 4] * 2}),
        "one seed": runs({"a": [[2.0]], "b": [[1.9]]}),
        "NaN everywhere": runs({"a": [[NAN] * 4], "b": [[NAN] * 4]}, initial=NAN),
        "missing cells": runs({"a": [[2.0, None], [None, 2.0]], "b": [[None, 1.9], [1.8, 1.9]]}),
        "no pair": runs({"a": [[2.0, None]], "b": [[None, 1.9]]}),
        "not at that rate": runs({"a": [[2.0, 2.0], [None, None]], "b": [[2.5, 2.5], [1.9, 1.9]]}),
    }[name]
    from train.seed_cube import seed_grid

    found = verdict(seed_grid(data), "b")
    assert row(found)["state"] == "undecided"
    text = sentence(found)
    said = {
        "none diverged": "of 4 pairs", "all diverged": "more than half of b's runs diverged at each learning rate",
        "one seed": "of 1 pair ", "NaN everywhere": "more than half of b's runs diverged at each learning rate",
        "missing cells": "of 1 pair ", "no pair": "they share no seed there; train a on b's seeds at that rate",
        "not at that rate": "undecided: a was not trained there; train a on b's seeds at that rate",
    }  # fmt: skip
    assert said[name] in text
    if name in ("all diverged", "NaN everywhere"):
        assert math.isnan(row(found)["window"])
        assert math.isnan(row(found)["break_even"])
    else:
        assert np.isfinite(row(found)["optimum"])


@pytest.mark.parametrize(("numbers", "what"), [
    ({"margin": 0.0}, "margin must be between 0 and 1"), ({"alpha": 1.0}, "alpha must be between"),
    ({"allowed": -0.1}, "allowed must be a share"), ({"search_cost": math.inf}, "search_cost must be at least 0"),
])  # fmt: skip
def test_settings_that_mean_nothing_are_refused(numbers: dict[str, float], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        VerdictSettings(**numbers)


# --- on the command line


def exmy(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["verdict", *map(str, arguments)])


def test_few_seeds_of_a_study_leave_it_open_and_say_how_many_would_not(tmp_path: Path) -> None:
    done = exmy("e8m3", GPU, "--json", tmp_path / "v.json")
    assert done.exit_code == 1, done.output
    assert (
        "Whether e8m3 is as stable as native-bf16 at learning rate 0.002, within 10 %, is undecided: of 8 pairs"
        in done.output
    )
    assert "about 29 pairs in all would decide" in done.output
    content = json.loads((tmp_path / "v.json").read_text())
    (group,) = content["groups"]
    assert group["holds"] is False
    assert [of["recipe"] for of in group["rows"]] == ["e8m3", "native-bf16"]
    assert group["rows"][0]["pairs"] == 8
    assert set(group["rows"][0]) - {"recipe"} == set(content["fields"])


def test_a_format_that_fails_is_less_stable() -> None:
    done = exmy("e4m3", GPU)
    assert done.exit_code == 1, done.output
    assert re.search(
        r"e4m3 is less stable than native-bf16 at learning rate 0\.002 \(p = 0\.0078\): of 8 pairs", done.output
    )


def test_the_same_runs_count_once_and_a_wide_margin_is_met(tmp_path: Path) -> None:
    done = exmy("e8m3", GPU, GPU, "--margin", "0.4")
    assert done.exit_code == 0, done.output  # 0.6^8 < 5 %
    assert "e8m3 is as stable as native-bf16 at learning rate 0.002, within 40 %" in done.output
    assert "of 8 pairs" in done.output


@pytest.mark.parametrize(("arguments", "what"), [
    (["e9m9", GPU], "'e9m9' has no finished run here; there are native-bf16"),
    (["native-bf16", GPU], "native-bf16 is the baseline itself"),
    (["e4m3", GPU, CPU], "the studies differ in their baseline"),
    (["e8m3", GPU, "--learning-rate", "0.5"], "has no run at learning rate 0.5"),
    (["e8m3", GPU, "--margin", "2"], "margin must be between 0 and 1"),
    (["e8m3", "nowhere"], "nowhere"),
])  # fmt: skip
def test_bad_input_has_one_line_and_status_2(arguments: list[str | Path], what: str) -> None:
    done = exmy(*arguments)
    assert done.exit_code == 2
    assert what in done.output
    assert len(done.output.strip().splitlines()) == 1


def test_groups_are_judged_apart_and_all_must_hold(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two texts: as stable on one, fails on the other; and a third on which the recipe was not run."""
    parts = []
    for text, fails, recipes in (("python", 0, "ab"), ("maths", 40, "ab"), ("hebrew", 0, "b")):
        data = runs({name: [[NAN if name == "a" and i < fails else 2.0 for i in range(40)]] for name in recipes})
        labels = [f"{text}{i}" for i in range(data.sizes["run"])]
        parts.append(data.assign_coords(dataset=("run", [text] * data.sizes["run"]), run=labels))
    together = xr.concat(parts, "run")
    monkeypatch.setattr("exmy.verdict.runs_together", lambda _: (together, "b", "made up"))
    assert not run_verdict("a", [], None, VerdictSettings(), None)
    printed = capsys.readouterr().out
    assert "dataset python:\na is as stable as b" in printed
    assert "dataset maths:\na is less stable than b" in printed
    assert "hebrew" not in printed
    assert run_verdict("a", [], None, VerdictSettings(margin=0.2), None) is False
    monkeypatch.setattr("exmy.verdict.runs_together", lambda _: (together.isel(run=slice(0, 80)), "b", "made up"))
    assert run_verdict("a", [], None, VerdictSettings(), None)


def test_a_file_that_can_t_be_written_is_told(tmp_path: Path) -> None:
    done = exmy("e8m3", GPU, "--json", tmp_path / "absent" / "v.json")
    assert done.exit_code == 2
    assert "can't be written" in done.output
    with pytest.raises(StudyError, match="is the baseline itself"):
        run_verdict("e8m3", [GPU], "e8m3", VerdictSettings(), None)
