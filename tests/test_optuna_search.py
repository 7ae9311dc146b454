"""The documented search with Optuna, on a tiny study: packs of trials, pruning, and going on after being killed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.small import SHAPE  # noqa: F401 (one thread)
from train import Study, open_study

pytest.importorskip("optuna", reason="the extra 'optuna' is not installed")

from optuna.trial import TrialState

from scripts import optuna_search

BASE = Study.model_validate(
    {
        "name": "search",
        "axes": {"recipe": ["e5m7", "e4m3"], "learning_rate": [1e-4, 1.0], "seed": 2},
        "model": {"layers": 1, "heads": 2, "width": 16, "context": 8},
        "training": {"sequences": 2, "warmup": 1, "evaluate_every": 4},
        "probe": {"every": 0},
        "signals": {"every": 0},
    }
)


def search(out: Path) -> Any:
    return optuna_search.search(BASE, out, trials=6, batch=3, rungs=[4, 8], device="cpu")


def ended(study: Any) -> dict[str, list[tuple[Any, ...]]]:
    """Params and values at each rung, by state."""
    return {
        state.name: [(sorted(t.params.items()), t.intermediate_values) for t in study.get_trials(states=[state])]
        for state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("search") / "out"
    return out, search(out)


def test_a_batch_is_trained_as_a_pack_and_the_less_promising_are_pruned(whole: tuple[Path, Any]) -> None:
    out, study = whole
    trials = ended(study)
    assert len(trials["COMPLETE"]) + len(trials["PRUNED"]) == 6
    assert len(trials["PRUNED"]) >= 2
    assert trials["FAIL"] == []
    first = [t.intermediate_values[4] for t in study.trials[:3]]
    assert study.trials[first.index(min(first))].state is TrialState.COMPLETE
    tree = open_study(out)
    summary = tree["summary"].to_dataset()
    assert summary.sizes["run"] == 2 * (6 + len(trials["COMPLETE"]))
    packs = sorted(set(summary["pack_size"].values.tolist()))
    assert packs[-1] == 8, "three trials of two seeds in one pack"
    for trial in study.get_trials(states=[TrialState.COMPLETE]):
        own = summary.isel(run=(summary["learning_rate"] == trial.params["learning_rate"]) & (summary["steps"] == 8))
        loss = own["final_loss"].values.clip(max=math.log(256))
        assert own.sizes["run"] == 2
        assert trial.value == pytest.approx(loss.mean(), rel=1e-12)


def test_killed_in_any_batch_it_goes_on_with_the_trials_that_were_under_way(
    whole: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when the second batch's first rung is trained, and Optuna has not heard of it: nothing is trained twice."""
    train = optuna_search.train
    calls: list[int] = []

    def killed(*args: Any) -> dict[int, float]:
        values = train(*args)
        calls.append(args[4])
        if calls.count(4) == 2:
            raise KeyboardInterrupt
        return values

    monkeypatch.setattr(optuna_search, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "out")
    monkeypatch.undo()
    before = open_study(tmp_path / "out").attrs["runs_finished"]
    study = search(tmp_path / "out")
    ours, theirs = ended(study), ended(whole[1])
    assert len(ours["FAIL"]) == 3
    assert (ours["COMPLETE"], ours["PRUNED"]) == (theirs["COMPLETE"], theirs["PRUNED"])
    assert open_study(tmp_path / "out").attrs["runs_finished"] == open_study(whole[0]).attrs["runs_finished"] == before
    again = search(tmp_path / "out")
    assert len(again.trials) == len(study.trials), "what has ended is not begun again"
