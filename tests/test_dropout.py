"""Dropout: masks of the right share, the same in both forms of the model, none where nothing is trained, the run's own."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.recipe_packs import program_for, slot
from tests.small import SHAPE
from train.dropout import dropped
from train.model import forward, objective
from train.optim import AdamW
from train.pack import Pack
from train.resolve import resolve_recipe
from train.text import Text

CPU = torch.device("cpu")
DROPPING = dataclasses.replace(SHAPE, dropout=0.25)


def made(name: str, text: Text, seeds: list[int], rates: list[float] | None = None) -> Pack:
    recipe = resolve_recipe(name)
    program = program_for(recipe, DROPPING, optimizer=AdamW())
    rates = rates or [3e-3] * len(seeds)
    return Pack(program, [slot(recipe, s, rate) for s, rate in zip(seeds, rates, strict=True)], text, CPU)


def test_a_share_is_dropped_and_the_rest_makes_up_for_it() -> None:
    """2^18 elements a run: the share's standard error is below 0.001, and five of them are allowed."""
    x = torch.ones(3, 512, 512)
    y = dropped(x, torch.tensor([1, 2, 1]), 0.3, 1)
    for run in y:
        assert abs(float((run == 0).float().mean()) - 0.3) < 5 * (0.3 * 0.7 / 2**18) ** 0.5
        assert set(run.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.7))}
    assert torch.equal(y[0], y[2])
    assert not torch.equal(y[0], y[1])
    assert not torch.equal(y[0], dropped(x, torch.tensor([1, 2, 1]), 0.3, 2)[0])
    assert dropped(x, None, 0.3, 1) is x


@pytest.mark.parametrize("name", ["native-fp64", "native-fp32", "e4m3fn", "nvfp4-nearest"])
def test_a_training_step_is_the_model_with_the_same_masks(name: str, text: Text) -> None:
    pack = made(name, text, [0, 1])
    pack.step()
    tokens, targets = pack.held_out[0]
    losses, parts = pack.gradients(tokens, targets)
    numerics = pack._draws.at(pack.numerics, pack.counter, training=True)
    logits = forward(pack.parameters, tokens.view(2, -1, SHAPE.context), DROPPING, numerics)
    loss = objective(logits, targets, DROPPING)
    exact = name == "native-fp64"
    torch.testing.assert_close(losses, loss.detach(), rtol=1e-13 if exact else 2e-5, atol=0)
    expected = torch.autograd.grad(loss.sum(), list(pack.parameters.values()))
    for parameter, theirs in zip(pack.parameters, expected, strict=True):
        gradient = torch.stack([part.to(theirs.dtype) for part in parts[parameter]]).sum(0)
        assert float((gradient - theirs).norm() / theirs.norm()) < (1e-12 if exact else 5e-3), parameter
    without = forward(pack.parameters, tokens.view(2, -1, SHAPE.context), DROPPING, pack.numerics)
    assert float((without - logits).abs().mean()) > 0.01


def test_nothing_is_dropped_where_nothing_is_trained(text: Text) -> None:
    pack = made("native-fp64", text, [0, 1])
    pack.step()
    tokens, targets = pack.held_out[0]
    plain = dataclasses.replace(DROPPING, dropout=0.0)
    losses = [
        objective(forward(pack.parameters, t.view(2, -1, SHAPE.context), plain, pack.numerics), y, plain).detach()
        for t, y in pack.held_out
    ]
    torch.testing.assert_close(pack.validation_loss(), torch.stack(losses).mean(0), rtol=1e-13, atol=0)
    assert torch.equal(pack.validation_loss(), pack.validation_loss())
    assert targets.shape == tokens.shape


def test_masks_are_the_runs_own_and_the_steps(text: Text) -> None:
    alone, moved = made("e4m3fn", text, [0, 1]), made("e4m3fn", text, [5, 0], [1e4, 3e-3])
    for _ in range(4):
        alone.step()
        moved.step()
    assert torch.equal(alone.train_loss[:4, 0], moved.train_loss[:4, 1])
    assert all(torch.equal(p[0], moved.parameters[name][1]) for name, p in alone.parameters.items())
    first, second = (alone._draws.at(alone.numerics, torch.tensor([step]), training=True) for step in (0, 1))
    seeds = [block.drop for block in first.blocks] + [first.drop, second.drop, second.blocks[0].drop]
    assert len({int(seed[0]) for seed in seeds if seed is not None}) == len(seeds)
