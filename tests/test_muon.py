"""Newton and Schulz's iteration against an SVD, and a pack that trains with Muon against one run written out for itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.small import SHAPE, make_program, make_slots
from tests.test_pack import PlainGPT
from train.muon import muon_direction, orthogonalize
from train.optim import Muon
from train.pack import Pack
from train.seeds import batch_offsets, initial_weights
from train.text import Text

CPU = torch.device("cpu")


def quintic(s: np.ndarray, times: int = 5) -> np.ndarray:
    for _ in range(times):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return s


@pytest.mark.parametrize(("rows", "columns"), [(24, 24), (16, 40), (40, 16), (1, 7)])
def test_the_iteration_sends_singular_values_through_its_polynomial_and_keeps_their_vectors(
    rows: int, columns: int
) -> None:
    """Each matrix of a batch by itself, however large its numbers are."""
    u = np.random.default_rng(rows).standard_normal((3, rows, columns)) * np.array([1.0, 1e-4, 1e6])[:, None, None]
    left, s, right = np.linalg.svd(u, full_matrices=False)
    share = s / (np.linalg.norm(u, axis=(1, 2)) + 1e-7)[:, None]
    expected = left @ (quintic(share)[..., None] * right)
    np.testing.assert_allclose(orthogonalize(torch.from_numpy(u)), expected, rtol=0, atol=1e-12)


def test_singular_values_land_near_one() -> None:
    """All from 0.005 of the norm up, in the band that Jordan describes; five in FP32 as well."""
    s = np.geomspace(0.005, 1, 100_000)
    assert quintic(s).min() > 0.67
    assert quintic(s).max() < 1.21
    matrices = np.random.default_rng(0).standard_normal((8, 32, 96))
    for dtype in (torch.float64, torch.float32):
        values = np.linalg.svd(orthogonalize(torch.from_numpy(matrices).to(dtype)).numpy(), compute_uv=False)
        assert values.min() > 0.67
        assert values.max() < 1.21


def test_a_zero_matrix_stays_zero_and_a_nan_stays_with_its_own() -> None:
    u = torch.stack([torch.zeros(4, 6), torch.full((4, 6), torch.nan), torch.eye(4, 6)])
    result = orthogonalize(u)
    assert not result[0].any()
    assert result[1].isnan().all()
    assert result[2].isfinite().all()


@pytest.mark.parametrize("parts", [(12,), (4, 4, 4), (6, 3, 3)])
def test_matrices_side_by_side_are_each_orthogonalised_and_scaled_by_their_own_shape(parts: tuple[int, ...]) -> None:
    u = torch.from_numpy(np.random.default_rng(4).standard_normal((2, 5, 12)))
    direction = muon_direction(u, parts)
    start = 0
    for outputs in parts:
        columns = slice(start, start + outputs)
        expected = orthogonalize(u[:, :, columns]) * max(1.0, math.sqrt(outputs / 5))
        torch.testing.assert_close(direction[:, :, columns], expected, rtol=0, atol=1e-13)
        start += outputs
    assert start == 12


def plain_step(weight: Tensor, gradient: Tensor, buffer: Tensor, rate: float, decay: float) -> None:
    """Jordan's step on one matrix as nn.Linear keeps it, [outputs, inputs], written from his description; in place."""
    buffer.copy_(0.95 * buffer + 0.05 * gradient)
    x = 0.05 * gradient + 0.95 * buffer
    outputs, inputs = x.shape
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        g = x @ x.T
        x = 3.4445 * x + (-4.7750 * g + 2.0315 * g @ g) @ x
    weight.copy_(weight * (1 - rate * decay) - rate * max(1.0, outputs / inputs) ** 0.5 * x)


def plain_muon_run(
    text: Text, steps: int, rate: float, seeds: tuple[int, int], muon_rate: float
) -> tuple[list[float], PlainGPT]:
    """Losses and weights of one run in FP64: Muon for the blocks' matrices, Q, K and V apart, torch.optim.AdamW for the rest."""
    model = PlainGPT().double()
    model.load(initial_weights(SHAPE, seeds[0]))
    inner = {n: p for n, p in model.named_parameters() if n.startswith("blocks") and p.ndim == 2}
    outer = [p for n, p in model.named_parameters() if n not in inner]
    groups = [
        {"params": [p for p in outer if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in outer if p.ndim == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), eps=1e-8)
    buffers = {n: torch.zeros_like(p) for n, p in inner.items()}
    offsets = batch_offsets(seeds[1], steps, 4, text.train.size - SHAPE.context)
    losses = []
    for step in range(steps):
        windows = np.stack([text.train[o : o + SHAPE.context + 1] for o in offsets[step]]).astype(np.int64)
        tokens, targets = torch.from_numpy(windows[:, :-1]), torch.from_numpy(windows[:, 1:])
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        now = rate * min(1.0, (step + 1) / 5)
        for group in adamw.param_groups:
            group["lr"] = now
        adamw.step()
        with torch.no_grad():
            for name, p in inner.items():
                assert p.grad is not None
                parts = 3 if "qkv" in name else 1
                rows = zip(p.chunk(parts), p.grad.chunk(parts), buffers[name].chunk(parts), strict=True)
                for weight, gradient, buffer in rows:
                    plain_step(weight, gradient, buffer, muon_rate * now, 0.1)
        losses.append(loss.item())
    return losses, model


def test_one_run_of_a_pack_is_the_plain_muon_in_fp64(text: Text) -> None:
    slots = make_slots(["native-fp64"] * 3, [1e-3, 4e-3, 2e-3])
    program = make_program("native-fp64", schedule="constant", optimizer=Muon(muon_rate=7.0))
    pack = Pack(program, slots, text, CPU)
    assert all((pack.kept[name].second is None) == (name.startswith("h.") and "ln" not in name) for name in pack.kept)
    for _ in range(20):
        pack.step()
    losses, model = plain_muon_run(text, 20, 4e-3, (slots[1].init_seed, slots[1].data_seed), 7.0)
    assert losses[-1] < losses[0] - 0.1
    np.testing.assert_allclose(pack.train_loss[:, 1].numpy(), losses, rtol=2e-7)  # histories are FP32
    for ours, theirs in {
        "h.0.attn.qkv": "blocks.0.qkv", "h.1.mlp.proj": "blocks.1.mlp_proj", "h.1.mlp.fc": "blocks.1.fc",
        "h.0.attn.proj": "blocks.0.attn_proj",
    }.items():  # fmt: skip
        expected = model.get_parameter(f"{theirs}.weight").T.detach()
        torch.testing.assert_close(pack.parameters[ours][1].detach(), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(pack.parameters["wte"][1].detach(), model.wte.weight.detach(), rtol=0, atol=1e-9)


def test_a_run_with_muon_has_the_same_bits_in_every_slot(text: Text) -> None:
    bits = []
    for slot in range(3):
        slots = make_slots(["e8m7", "e5m2", "e4m3"])
        slots[slot] = make_slots(["e4m7"])[0]
        pack = Pack(make_program(optimizer=Muon()), slots, text, CPU)
        for _ in range(6):
            pack.step()
        bits.append([pack.train_loss[:6, slot].tolist(), *(p[slot].tolist() for p in pack.parameters.values())])
    assert bits[0] == bits[1] == bits[2]
