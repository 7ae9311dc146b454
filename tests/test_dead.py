"""A pack of runs that have diverged for good ends early, and gives what it would have given; one that may come back does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.kill_harness import differences
from tests.recipe_packs import program_for, slot
from tests.test_execute import Recorder, tiny
from train import run_study, study_status
from train.dead import Vigil, beyond_help
from train.loss_scale import DynamicLossScale
from train.model import ModelShape
from train.pack import Pack, train_pack
from train.program import PackResult, Probe, Program, Progress, Slot
from train.recipe_table import RecipeTable
from train.resolve import resolve_recipe
from train.store import read_packs
from train.text import Text

SMALL = ModelShape(layers=1, heads=2, width=32, context=16, vocabulary=32)
BROAD = ModelShape(layers=1, heads=2, width=128, context=16, vocabulary=32)  # compiled rules need blocks that are whole
STEPS, PATIENCE = 75, 20
RECIPES = {
    "delayed": RecipeTable(base="fp8-hybrid-delayed", delayed=5),
    "narrow": RecipeTable(
        base="e4m3", master="bf16", first_moment="e4m3fn@tensor", second_moment="bf16", state_rounding="stochastic", kahan=True,
    ),
    "switched": RecipeTable(base="e4m3", before="native-bf16", until=12),
}  # fmt: skip
NAMES = [
    "native-bf16", "e4m3", "delayed", "switched",
    *(pytest.param(name, marks=pytest.mark.proof) for name in ("nvfp4", "mxfp8", "ms-amp-o2", "narrow")),
]  # fmt: skip


def setting(
    name: str, device: torch.device, rates: tuple[float, ...] = (1e8, 1e30), **changes: Any
) -> tuple[Program, list[Slot]]:
    """A program with all on that is recorded, and a run for each rate."""
    recipe = resolve_recipe(name, RECIPES)
    recorded = {"steps": STEPS, "evaluate_every": 15, "probe": Probe(every=20), "signals_every": 7}
    shape = SMALL if device.type == "cpu" else BROAD
    return program_for(recipe, shape, **recorded | changes), [slot(recipe, i, rate) for i, rate in enumerate(rates)]


def everything(result: PackResult) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(result):
        value = getattr(result, field.name)
        if not field.name.startswith(("seconds", "steps_made", "peak")):
            yield from value.items() if isinstance(value, dict) else [(field.name, value)]


def assert_same_bits(one: PackResult, other: PackResult) -> None:
    for (name, mine), (_, theirs) in zip(everything(one), everything(other), strict=True):
        assert (mine is None) == (theirs is None), name
        if mine is not None:
            assert np.asarray(mine).tobytes() == np.asarray(theirs).tobytes(), name


@pytest.mark.parametrize("name", NAMES)
def test_a_pack_of_dead_runs_ends_early_with_the_bits_of_one_that_did_not(
    name: str, text: Text, device: torch.device
) -> None:
    program, slots = setting(name, device)
    whole = train_pack(program, slots, text, device)
    early = train_pack(program, slots, text, device, dead_after=PATIENCE)
    assert whole.steps_made == STEPS
    assert early.steps_made is not None
    assert PATIENCE < early.steps_made < STEPS
    assert np.isnan(whole.train_loss[-1]).all()
    assert_same_bits(early, whole)


def steps_made(program: Program, slots: list[Slot], text: Text) -> int | None:
    return train_pack(program, slots, text, torch.device("cpu"), dead_after=PATIENCE).steps_made


def test_one_run_that_trains_keeps_its_pack_alive(text: Text) -> None:
    """And the reports say which are dead."""
    cpu = torch.device("cpu")
    program, slots = setting("e4m3", cpu, (1e30, 3e-3))
    heard: list[Progress] = []
    result = train_pack(program, slots, text, cpu, on_progress=heard.append, dead_after=PATIENCE)
    assert result.steps_made == STEPS
    assert [None if p.dead is None else p.dead.tolist() for p in heard] == [
        [p.step >= PATIENCE + 10, False] for p in heard
    ]


def test_a_run_whose_steps_are_skipped_may_come_back(text: Text) -> None:
    """A loss that is NaN for now: the weights are what they were, and the scale is on its way down."""
    scale = DynamicLossScale(initial=2.0**120)
    program, slots = setting("e4m3", torch.device("cpu"), (3e-3,), dynamic_loss_scale=scale, scales_loss=False)
    assert steps_made(program, slots, text) == STEPS
    pack = Pack(program, slots, text, torch.device("cpu"))
    for name, tensor in pack.state().items():
        if name.startswith(("parameter", "first", "second")):
            tensor.fill_(torch.nan)
    vigil = Vigil(pack, PATIENCE)
    for _ in range(PATIENCE + 10):
        pack.step()
        vigil.hear(pack.train_loss[pack.made - 1].numpy())
    assert beyond_help(pack, PATIENCE).all(), "and yet its scale falls on, which the history has to say"
    assert not vigil.dead.any()


def test_weights_alone_do_not_make_a_run_dead(text: Text) -> None:
    """One element of a moment that is a number, or one loss, and the run may go on."""
    cpu = torch.device("cpu")
    program, slots = setting("e4m3", cpu)
    pack = Pack(program, slots, text, cpu)
    for _ in range(PATIENCE + 5):
        pack.step()
    assert beyond_help(pack, PATIENCE).tolist() == [True, True]
    for tensor in (pack.parameters["h.0.mlp.fc"].detach(), pack.kept["wte"].first, pack.kept["ln_f"].second):
        assert tensor is not None
        before, tensor[1].view(-1)[3] = tensor[1].view(-1)[3].clone(), 1.0
        assert beyond_help(pack, PATIENCE).tolist() == [True, False]
        tensor[1].view(-1)[3] = before
    for history in (pack.train_loss, pack.grad_norm):
        history[pack.made - PATIENCE, 0] = 1.0
        assert beyond_help(pack, PATIENCE).tolist() == [False, True]
        history[pack.made - PATIENCE, 0] = torch.nan
    assert beyond_help(pack, PATIENCE).all()


def dead_pack(text: Text, **changes: Any) -> tuple[Pack, Vigil]:
    """A pack whose runs are known to be dead, after the looks that it takes."""
    cpu = torch.device("cpu")
    program, slots = setting("delayed", cpu, steps=200, **changes)
    pack = Pack(program, slots, text, cpu)
    vigil = Vigil(pack, PATIENCE)
    while not vigil.dead.all():
        pack.step()
        if pack.made % 10 == 0:
            vigil.hear(pack.train_loss[pack.made - 1].numpy())
    assert not vigil.ends(), "no look at signals since"
    for _ in range(2 * pack.program.signals_every + 1):
        pack.step()
    return pack, vigil


def test_signals_that_still_change_keep_a_pack_alive(text: Text) -> None:
    pack, vigil = dead_pack(text)
    looks = sum(step < pack.made for step in pack.program.signal_steps)
    pack.signals.values["flushed"][looks - 2, 1, 0, 0] = 0.5
    assert not vigil.ends()
    pack.signals.values["flushed"][looks - 2] = pack.signals.values["flushed"][looks - 1]
    assert vigil.ends()


def test_amaxes_that_still_change_keep_a_pack_alive(text: Text) -> None:
    pack, vigil = dead_pack(text)
    amaxes = next(iter(pack.histories.state().values()))
    before = amaxes.clone()
    amaxes[0, 1, 3] = 2.0
    assert not vigil.ends()
    amaxes.copy_(before)
    assert vigil.ends()


@pytest.mark.parametrize("what", ["validation_loss", "sharpness"])
def test_what_could_still_be_measured_keeps_a_pack_alive(
    what: str, text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack, vigil = dead_pack(text)
    number = torch.tensor([1.0, torch.nan])
    monkeypatch.setattr(pack, what, lambda: number if what == "validation_loss" else {"logit_sharpness": number})
    assert not vigil.ends()


def test_a_switch_of_precision_that_is_still_to_come_keeps_a_pack_alive(text: Text) -> None:
    program, slots = setting("switched", torch.device("cpu"), until=STEPS - 5)
    assert steps_made(program, slots, text) == STEPS


def test_a_study_says_where_its_packs_ended(tmp_path: Path) -> None:
    """Two packs of four die; the results are those of a study that let them go on, and of one that asks for no end."""
    changes: dict[str, Any] = {
        "axes": {"recipe": ["e8m7", "e4m3"], "learning_rate": [100.0, 1e-3], "seed": 2},
        "training": {"steps": 80},
        "signals": {"every": 5},
    }
    directories = {}
    for dead_after in (20, 0):
        study = tiny(**changes, execution={"pack_size": 2, "dead_after": dead_after})
        directories[dead_after] = tmp_path / str(dead_after)
        run_study(study, directories[dead_after], "cpu", Recorder())
    assert list(differences(directories[20], directories[0])) == []
    made = {
        n: {str(p.attrs["pack"]): int(p.attrs["steps_made"]) for p in read_packs(d)} for n, d in directories.items()
    }
    assert set(made[0].values()) == {80}
    assert made[0].keys() == made[20].keys()
    assert sorted(made[20].values())[2:] == [80, 80]
    assert sorted(made[20].values())[1] < 80
    told = {pack["hash"]: pack["ended_early_at"] for pack in study_status(directories[20])["packs"]}
    assert told == {name: steps if steps < 80 else None for name, steps in made[20].items()}
