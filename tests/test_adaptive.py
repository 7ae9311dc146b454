"""Studies that choose their runs, with a trainer that is made up and knows the truth, and a tiny one that trains.

The made-up trainer keeps what a directory would: study.toml before it trains, and which runs were ever trained.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.small import SHAPE  # noqa: F401 (one thread)
from train import Study, StudyError, read_study, run_strategy, store
from train.adaptive import round_under_way
from train.bisect import rate_at
from train.plan import capacity, plan, program_of
from train.study import Run

CPU = torch.device("cpu")
BASE: dict[str, Any] = {
    "name": "adaptive",
    "axes": {"recipe": ["e8m7", "e4m3"], "learning_rate": [1e-3, 1.6e-2], "seed": 2},
    "model": {"layers": 1, "heads": 2, "width": 16, "context": 8},
    "training": {"steps": 4, "sequences": 2, "warmup": 1, "evaluate_every": 4},
    "probe": {"every": 0},
    "signals": {"every": 0},
    "strategy": {"kind": "bisect"},
}
SEEDS = {"kind": "seeds", "looks": 4, "alpha": 0.05}


def never(_: Run) -> bool:
    """No run diverges."""
    return False


def two(_: Run) -> float:
    """All end in the same loss."""
    return 2.0


class Killed(Exception):  # noqa: N818 (no error: an end)
    """The process is gone."""


class Pretended:
    """A trainer that knows the truth: whether a run diverges, and its final loss; killed in the n-th round, if asked."""

    def __init__(
        self,
        directory: Path,
        diverges: Callable[[Run], bool],
        loss: Callable[[Run], float] = two,
        killed_in: int = 0,
    ) -> None:
        self.directory, self.diverges, self.loss, self.killed_in = directory, diverges, loss, killed_in
        self.trained: list[str] = []
        self.studies: list[Study] = []

    def __call__(self, study: Study) -> xr.Dataset:
        self.directory.mkdir(exist_ok=True)
        (self.directory / store.STUDY_FILE).write_text(store.study_text(study))
        self.studies.append(study)
        if len(self.studies) == self.killed_in:
            raise Killed
        runs = list(study.runs())
        self.trained += [run.identity for run in runs if run.identity not in self.trained]
        values = {
            "diverged": np.array([self.diverges(run) for run in runs]),
            "final_loss": np.array([self.loss(run) for run in runs]),
        }
        return xr.Dataset(
            {name: ("run", of) for name, of in values.items()}, coords={"run": [run.identity for run in runs]}
        )


def study(**changes: Any) -> Study:
    content = copy.deepcopy(BASE)
    for table, values in changes.items():
        content[table] = {**content.get(table, {}), **values} if isinstance(values, dict) else values
    return Study.model_validate(content)


def below(thresholds: Mapping[str, float]) -> Callable[[Run], bool]:
    """Diverges above its recipe's threshold."""
    return lambda run: run.learning_rate > thresholds[run.recipe.name]


def row(record: Mapping[str, Any], recipe: str) -> dict[str, Any]:
    (found,) = (result for result in record["results"] if result["recipe"] == recipe)
    return dict(found)


@given(
    exponents=st.tuples(st.floats(-16, 4), st.floats(-16, 4)), points=st.sampled_from(["auto", 1, 2, 5]),
    per_octave=st.sampled_from([2, 4]), rates=st.sampled_from([[1e-3], [1e-3, 1.6e-2], [3e-4, 1e-3, 2e-1]]),
)  # fmt: skip
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_recipe_s_threshold_is_found_within_a_step_of_the_lattice(
    exponents: tuple[float, float],
    points: Any,
    per_octave: int,
    rates: list[float],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    truth = {"e8m7": 2 ** exponents[0], "e4m3": 2 ** exponents[1]}
    directory = tmp_path_factory.mktemp("search") / "out"
    trainer = Pretended(directory, below(truth))
    wanted = study(strategy={"points": points, "per_octave": per_octave, "octaves": 20}, axes={"learning_rate": rates})
    record = run_strategy(wanted, directory, "cpu", trainer=trainer)
    assert record["finished"]
    assert record["rounds"] <= 14
    for recipe, threshold in truth.items():
        found = row(record, recipe)
        assert found["found"]
        assert found["monotone"]
        assert found["exceptions"] == []
        largest = found["largest_stable"]
        assert largest is not None
        assert largest <= threshold < largest * 2 ** (1 / per_octave) * (1 + 1e-12)
        assert found["smallest_unstable"] / largest == pytest.approx(2 ** (1 / per_octave))
    assert record == json.loads((directory / "strategy.json").read_text())
    assert record["runs"] == len(trainer.trained) == sum(result["runs"] for result in record["results"])


def test_what_lies_beyond_the_limits_is_said_to(tmp_path: Path) -> None:
    trainer = Pretended(tmp_path / "out", below({"e8m7": 1e9, "e4m3": 0.0}))
    record = run_strategy(study(strategy={"octaves": 3}), tmp_path / "out", "cpu", trainer=trainer)
    above, under = row(record, "e8m7"), row(record, "e4m3")
    assert (above["beyond"], above["smallest_unstable"], above["largest_stable"]) == ("above", None, 2**-3)
    assert (under["beyond"], under["largest_stable"], under["smallest_unstable"]) == ("below", None, 2**-13)
    assert above["found"]
    assert under["found"]


def test_every_combination_of_the_other_axes_has_its_own_threshold(tmp_path: Path) -> None:
    def diverges(run: Run) -> bool:
        return (
            run.learning_rate
            > {(1, 0.5): 0.001, (1, math.inf): 0.01, (2, 0.5): 0.1, (2, math.inf): 0.0001}[
                (run.model.layers, run.training.clip)
            ]
        )

    trainer = Pretended(tmp_path / "out", diverges)
    axes = {"recipe": ["e4m3"], "layers": [1, 2], "clip": [0.5, "none"]}
    record = run_strategy(study(axes=axes), tmp_path / "out", "cpu", trainer=trainer)
    found = [(r["layers"], r["clip"], r["largest_stable"] <= t < r["smallest_unstable"]) for r, t in zip(
        record["results"], (0.001, 0.01, 0.1, 0.0001), strict=True)]  # fmt: skip
    assert found == [(1, 0.5, True), (1, "inf", True), (2, 0.5, True), (2, "inf", True)]


def test_verdicts_that_are_not_monotone_are_told_with_their_counts_and_intervals(tmp_path: Path) -> None:
    """One of four seeds fails at 2^-8, and all above 2^-6."""

    def diverges(run: Run) -> bool:
        return run.learning_rate > 2**-6 or (run.learning_rate == 2**-8 and run.seed == 3)

    wanted = study(axes={"seed": 4, "learning_rate": [2**-10, 2**-8, 2**-6, 2**-4]})
    record = run_strategy(wanted, tmp_path / "a", "cpu", trainer=Pretended(tmp_path / "a", diverges))
    found = row(record, "e4m3")
    assert not found["monotone"]
    assert found["largest_stable"] == rate_at(-33, 4)
    assert found["smallest_unstable"] == 2**-8
    assert found["highest_stable"] == 2**-6
    (exception,) = found["exceptions"]
    assert (exception["learning_rate"], exception["diverged"], exception["runs"]) == (2**-8, 1, 4)
    # Clopper and Pearson by hand: (1 - low)^4 = 1 - 0.025, and P(X <= 1) = 0.025 at the upper end.
    assert (1 - exception["low"]) ** 4 == pytest.approx(0.975)
    high = exception["high"]
    assert (1 - high) ** 4 + 4 * high * (1 - high) ** 3 == pytest.approx(0.025)
    allowed = study(axes={"seed": 4, "learning_rate": [2**-10, 2**-8, 2**-6, 2**-4]}, strategy={"allowed": 0.25})
    record = run_strategy(allowed, tmp_path / "b", "cpu", trainer=Pretended(tmp_path / "b", diverges))
    assert row(record, "e4m3")["monotone"]
    assert row(record, "e4m3")["largest_stable"] == 2**-6


def test_a_share_is_held_against_what_is_allowed_as_written(tmp_path: Path) -> None:
    """29 of 100 are 0.29, though 0.29 times 100 is less than 29."""
    wanted = study(axes={"seed": 100, "recipe": ["e4m3"]}, strategy={"allowed": 0.29})
    trainer = Pretended(tmp_path / "out", lambda run: run.seed < 29 or run.learning_rate > 2**-7)
    assert row(run_strategy(wanted, tmp_path / "out", "cpu", trainer=trainer), "e4m3")["largest_stable"] == 2**-7


def test_a_search_that_does_not_end_says_that_it_did_not(tmp_path: Path) -> None:
    trainer = Pretended(tmp_path / "out", below({"e8m7": 0.004, "e4m3": 0.004}))
    record = run_strategy(study(strategy={"points": 1, "rounds": 2}), tmp_path / "out", "cpu", trainer=trainer)
    assert (record["rounds"], record["finished"]) == (2, True)
    assert not row(record, "e4m3")["found"]


@pytest.mark.parametrize("strategy", [{"points": 2}, SEEDS | {"kind": "seeds"}])
def test_killed_in_any_round_it_comes_to_the_same_rounds_and_the_same_record(
    strategy: dict[str, Any], tmp_path: Path
) -> None:
    truth = below({"e8m7": 0.02, "e4m3": 0.0007})
    wanted = study(strategy=strategy) if "points" in strategy else study(strategy=strategy, axes={"seed": 8})
    if strategy.get("kind") == "seeds":
        wanted = Study.model_validate(BASE | {"strategy": SEEDS, "axes": BASE["axes"] | {"seed": 3}})
    whole = Pretended(tmp_path / "whole", truth)
    record = run_strategy(wanted, tmp_path / "whole", "cpu", trainer=whole)
    assert len(whole.studies) >= 3
    for killed_in in range(1, len(whole.studies) + 1):
        directory = tmp_path / f"killed-{killed_in}"
        first = Pretended(directory, truth, killed_in=killed_in)
        with pytest.raises(Killed):
            run_strategy(wanted, directory, "cpu", trainer=first)
        again = Pretended(directory, truth)
        assert run_strategy(wanted, directory, "cpu", trainer=again) == record
        assert {study.hash for study in again.studies} <= {study.hash for study in whole.studies}
        assert len(again.studies) == len(whole.studies) - killed_in + 1
        assert (directory / "study.toml").read_text() == (tmp_path / "whole" / "study.toml").read_text()
        # From the directory alone, as `exmy resume` does.
        assert run_strategy(read_study(directory / "study.toml"), directory, "cpu", trainer=again) == record


def test_a_study_that_grew_chooses_its_rounds_anew_and_keeps_its_runs(tmp_path: Path) -> None:
    truth = below({"e8m7": 0.02, "e4m3": 0.0007, "e5m2": 0.003})
    trainer = Pretended(tmp_path / "out", truth)
    run_strategy(study(), tmp_path / "out", "cpu", trainer=trainer)
    before = set(trainer.trained)
    grown = study(axes={"recipe": ["e8m7", "e4m3", "e5m2"], "seed": 3})
    record = run_strategy(grown, tmp_path / "out", "cpu", trainer=trainer)
    assert before & {run.identity for run in trainer.studies[-1].runs()}
    assert [row(record, recipe)["found"] for recipe in ("e8m7", "e4m3", "e5m2")] == [True] * 3


def test_blocks_of_one_s_own_are_part_of_the_first_round(tmp_path: Path) -> None:
    truth = below({"e8m7": 0.02, "e4m3": 0.0007, "e5m2": 0.003})
    more = [{"recipe": ["e5m2"], "learning_rate": [2e-3]}]
    trainer = Pretended(tmp_path / "out", truth)
    record = run_strategy(study(more=more), tmp_path / "out", "cpu", trainer=trainer)
    found = row(record, "e5m2")
    assert found["largest_stable"] <= 0.003 < found["smallest_unstable"]
    assert trainer.studies[-1].more[0].round is None


def test_rounds_fill_the_packs(tmp_path: Path) -> None:
    """Of a CPU, 16 runs: 2 recipes of 2 seeds, at four rates a round."""
    trainer = Pretended(tmp_path / "out", below({"e8m7": 0.004, "e4m3": 0.004}))
    wanted = study(axes={"learning_rate": [2**-14, 2**-2]})
    run_strategy(wanted, tmp_path / "out", "cpu", trainer=trainer)
    assert capacity(wanted, program_of(next(wanted.runs())), CPU) == 16
    assert [len(study.axes.learning_rate) for study in trainer.studies[:1]] == [4]
    packs = plan(trainer.studies[-1], CPU)
    assert [(len(pack.runs), pack.size) for pack in packs][:2] == [(16, 16), (16, 16)]


# Planned looks.


def looks(directory: Path, diverges: Callable[[Run], bool], **strategy: Any) -> tuple[dict[str, Any], Pretended]:
    content = BASE | {"strategy": SEEDS | strategy, "axes": BASE["axes"] | {"learning_rate": [1e-3], "seed": 8}}
    trainer = Pretended(directory, diverges)
    return run_strategy(Study.model_validate(content), directory, "cpu", trainer=trainer), trainer


def test_looks_end_where_a_difference_is_shown_and_else_at_the_plan_s_end(tmp_path: Path) -> None:
    always, trainer = looks(tmp_path / "a", lambda run: run.recipe.name == "e4m3")
    (found,) = always["results"]
    # 8 of 8 pairs have a chance of 2 / 2^8 = 0.0078 of alike, more than the first look of four may spend; 16 have 3e-5.
    assert (found["state"], found["pairs"], found["only_recipe"], found["only_baseline"]) == ("worse", 16, 16, 0)
    assert always["looks_taken"] == 2
    assert sorted({run.seed for run in trainer.studies[-1].runs()}) == list(range(16))
    none, trainer = looks(tmp_path / "b", never)
    (found,) = none["results"]
    assert (found["state"], found["pairs"], none["looks_taken"]) == ("not shown", 32, 4)
    assert len(trainer.trained) == 64
    again = run_strategy(trainer.studies[-1], tmp_path / "b", "cpu", trainer=trainer)
    assert again == none
    assert len(trainer.trained) == 64


def test_pocock_may_end_at_the_first_look(tmp_path: Path) -> None:
    """What it may spend there, 0.05 ln(1 + (e - 1) / 4) = 0.0179, is more than the 2 / 2^8 of eight pairs out of eight."""
    record, _ = looks(tmp_path / "a", lambda run: run.recipe.name == "e4m3", spending="pocock")
    assert (record["looks_taken"], record["results"][0]["state"]) == (1, "worse")
    better, _ = looks(tmp_path / "b", lambda run: run.recipe.name == "e8m7", spending="pocock")
    assert better["results"][0]["state"] == "better"


def test_alpha_is_shared_by_all_comparisons(tmp_path: Path) -> None:
    """Of four, each may spend 0.0125 ln(1 + (e - 1) / 4) = 0.0045 at the first look: eight of eight pairs are not enough."""
    axes = {"recipe": ["e8m7", "e4m3", "e5m2"], "learning_rate": [1e-3, 1e-2], "seed": 8}
    wanted = Study.model_validate(BASE | {"strategy": SEEDS | {"spending": "pocock"}, "axes": axes})
    trainer = Pretended(tmp_path / "out", lambda run: run.recipe.name == "e4m3")
    record = run_strategy(wanted, tmp_path / "out", "cpu", trainer=trainer)
    assert {r["pairs"] for r in record["results"] if r["recipe"] == "e4m3"} == {16}


def test_a_recipe_that_is_decided_gets_no_more_seeds(tmp_path: Path) -> None:
    axes = {"recipe": ["e8m7", "e4m3", "e5m2"], "learning_rate": [1e-3, 1e-2], "seed": 8}
    wanted = Study.model_validate(BASE | {"strategy": SEEDS, "axes": axes})

    def diverges(run: Run) -> bool:
        return run.recipe.name == "e4m3" and run.learning_rate == 1e-2

    trainer = Pretended(tmp_path / "out", diverges)
    record = run_strategy(wanted, tmp_path / "out", "cpu", trainer=trainer)
    assert record["comparisons"] == 4
    assert record["alpha_each"] == 0.05 / 4
    found = {(r["recipe"], r["learning_rate"]): (r["state"], r["pairs"]) for r in record["results"]}
    assert found == {
        ("e4m3", 1e-3): ("not shown", 32), ("e4m3", 1e-2): ("worse", 16),
        ("e5m2", 1e-3): ("not shown", 32), ("e5m2", 1e-2): ("not shown", 32),
    }  # fmt: skip
    seeds = dict.fromkeys(found, 0)
    for run in trainer.studies[-1].runs():
        if run.recipe.name != "e8m7":
            seeds[(run.recipe.name, run.learning_rate)] += 1
    assert list(seeds.values()) == [32, 16, 32, 32]


def test_losses_are_held_against_each_other_and_count_as_no_worse_than_nothing_learned(tmp_path: Path) -> None:
    def loss(run: Run) -> float:
        noise = np.random.default_rng(run.seed).normal(0, 0.05)
        mine = np.random.default_rng([run.seed, 1]).normal(0, 0.01)
        return float(
            2 + noise + (0.02 + mine if run.recipe.name == "e4m3" else math.nan if run.recipe.name == "e5m2" else 0)
        )

    axes = {"recipe": ["e8m7", "e4m3", "e5m2"], "learning_rate": [1e-3], "seed": 8}
    wanted = Study.model_validate(BASE | {"strategy": SEEDS | {"outcome": "loss"}, "axes": axes})
    record = run_strategy(wanted, tmp_path / "out", "cpu", trainer=Pretended(tmp_path / "out", never, loss))
    near, lost = row(record, "e4m3"), row(record, "e5m2")
    assert (near["state"], lost["state"]) == ("worse", "worse")
    assert 0 < near["low"] < near["difference"] < near["high"]
    assert lost["difference"] == pytest.approx(math.log(256) - 2, abs=0.05)


@pytest.mark.parametrize(
    "changes",
    [
        {"alarms": {"thresholds": ["grad_norm>5"]}},
        {"signals": {"every": 2}},
        {"probe": {"every": 0, "snapshots": ["e4m3"]}},
        {"recipes": {"unused": {"base": "e4m3"}}},
    ],
    ids=lambda changes: next(iter(changes)),
)
@pytest.mark.parametrize("strategy", [SEEDS, {"kind": "bisect", "points": 2}], ids=lambda strategy: strategy["kind"])
def test_what_is_only_recorded_may_change_between_rounds_and_counts_from_then_on(
    strategy: dict[str, Any], changes: dict[str, Any], tmp_path: Path
) -> None:
    truth = below({"e8m7": 0.02, "e4m3": 0.0007})
    base = BASE | {"strategy": strategy, "axes": BASE["axes"] | {"seed": 3}}
    whole = Pretended(tmp_path / "whole", truth)
    record = run_strategy(Study.model_validate(base), tmp_path / "whole", "cpu", trainer=whole)
    killed = Pretended(tmp_path / "out", truth, killed_in=3)
    with pytest.raises(Killed):
        run_strategy(Study.model_validate(base), tmp_path / "out", "cpu", trainer=killed)
    wanted = Study.model_validate(base | changes)
    again = Pretended(tmp_path / "out", truth)
    assert run_strategy(wanted, tmp_path / "out", "cpu", trainer=again) | {"design": ""} == record | {"design": ""}
    assert len(again.studies) == len(whole.studies) - 2, "the rounds so far are kept"
    assert set(again.trained) == set(whole.trained)
    for table in changes:
        assert all(getattr(study, table) == getattr(wanted, table) for study in again.studies)


@pytest.mark.parametrize(
    ("recipes", "axes"),
    [
        ({"e4m3": {"base": "e4m3fn"}}, {}),
        ({"mine": {"base": "other"}, "other": {"base": "e4m3"}}, {}),
        ({"mine": {"base": "e4m3", "lm_head": "other"}, "other": {"base": "e4m3"}}, {}),
        ({"mine": {"base": "e4m3", "first_blocks": 1}, "native-bf16": {"base": "e4m3"}}, {}),
        ({"mine": {"base": "e4m3"}, "other": {"base": "e4m3"}}, {"lm_head": ["other"]}),
        ({"mine": {"base": "masked-e4m3"}, "e4m3": {"base": "e4m3fn"}}, {}),
    ],
    ids=["itself", "a base", "an LM head", "blocks that are kept", "an axis", "a named recipe's base"],
)
def test_a_recipe_on_which_another_rests_is_part_of_the_plan(
    recipes: dict[str, Any], axes: dict[str, Any], tmp_path: Path
) -> None:
    *_, last = recipes
    names = ["e8m7", "mine" if "mine" in recipes else "e4m3"]
    base = BASE | {"strategy": SEEDS, "axes": BASE["axes"] | axes | {"recipe": names}, "recipes": recipes}
    trainer = Pretended(tmp_path / "out", never)
    run_strategy(Study.model_validate(base), tmp_path / "out", "cpu", trainer=trainer)
    other = base | {"recipes": recipes | {last: {"base": "e5m2"}}}
    with pytest.raises(StudyError, match=rf"recipes.{last}.base was 'e4m3(fn)?' when .*, and is 'e5m2'"):
        run_strategy(Study.model_validate(other), tmp_path / "out", "cpu", trainer=trainer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": SEEDS | {"looks": 5}}, r"strategy.looks was 4 when .* planned looks was taken, and is 5"),
        ({"strategy": SEEDS | {"alpha": 0.1}}, r"strategy.alpha was 0.05 .* and is 0.1"),
        ({"strategy": SEEDS | {"outcome": "loss"}}, r"strategy.outcome was 'divergence'"),
        ({"axes": {"seed": 9}}, r"axes.seed was \[0, 1, 2"),
        ({"axes": {"recipe": ["e8m7", "e4m3", "e5m2"]}}, r"axes.recipe was \['e8m7', 'e4m3'\]"),
        ({"baseline": "e4m3"}, r"reference was 'e8m7' .* and is 'e4m3'"),
        ({"divergence": {"window": 3}}, r"divergence.window was 20"),
        ({"strategy": {"kind": "bisect"}}, r"strategy.kind was 'seeds' .* and is 'bisect'"),
        ({"strategy": {"kind": "grid"}}, r"strategy.kind was 'seeds' .* and is 'grid'"),
    ],
)
def test_a_plan_is_not_changed_after_its_first_look(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    looks(tmp_path / "out", never)
    content = BASE | {"strategy": SEEDS, "axes": BASE["axes"] | {"learning_rate": [1e-3], "seed": 8}}
    content |= {key: content[key] | value if key == "axes" else value for key, value in changes.items()}
    trainer = Pretended(tmp_path / "out", never)
    with pytest.raises(StudyError, match=message) as refused:
        run_strategy(Study.model_validate(content), tmp_path / "out", "cpu", trainer=trainer)
    assert "\n" not in str(refused.value)
    assert trainer.studies == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axes": {"recipe": ["e8m7"]}}, r"holds recipes against the baseline 'e8m7', and no other"),
        ({"axes": {"init_seed": 2, "data_seed": 2}}, r"pairs runs by seed"),
        ({"more": [{"seed": 3}]}, r"leave seed out of \[\[more\]\]"),
        ({"divergence": {"definition": "gap"}}, r"definition 'gap' changes with later runs"),
        ({"axes": {"seed": [2**32 - 1]}}, r"must be below 2\^32"),
    ],
)
def test_what_can_t_be_looked_at_is_refused_before_any_work(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    axes = {"recipe": ["e8m7", "e4m3"], "learning_rate": [1e-3]} | changes.pop("axes", {})
    content = BASE | {"strategy": SEEDS, "axes": axes} | changes
    with pytest.raises(StudyError, match=message):
        round_under_way(Study.model_validate(content), tmp_path, CPU)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ('kind = "bisection"', r"strategy.kind: .*'grid', 'bisect' or 'seeds', got 'bisection'"),
        ('kind = "bisect"\nlooks = 3', r"looks is a word of kind = 'seeds', and kind is 'bisect'"),
        ("points = 3", r"points is a word of kind = 'bisect', and kind is 'grid'"),
        ('kind = "bisect"\npoints = 0', r'points must be "auto" or from 1 to 64, got 0'),
        ('kind = "seeds"\nalpha = 0.9', r"strategy.alpha: .*less than or equal to 0.5, got 0.9"),
        ('kind = "seeds"\nspendings = "pocock"', r"strategy.spendings: unknown key; did you mean 'spending'"),
    ],
)
def test_a_bad_strategy_is_refused_in_a_line(strategy: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(f'[axes]\nrecipe = ["e8m7"]\nlearning_rate = [1e-3]\n[strategy]\n{strategy}\n')
    with pytest.raises(StudyError, match=message) as refused:
        read_study(path)
    assert "\n" not in str(refused.value)
