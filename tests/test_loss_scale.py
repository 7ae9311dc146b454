"""Loss scales against torch.amp.GradScaler, a skipped run against itself, and scaled runs against unscaled ones."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from formats import float_format
from tests.small import make_program, make_slots
from train import head
from train.layers import PLAIN, cross_entropy_gradient
from train.loss_scale import DynamicLossScale, advance_scale, inverse
from train.optim import AdamW, Muon, Parts, Rule, factors, squares, update
from train.pack import Pack, train_pack
from train.precision import pack_precision
from train.program import Program, Slot
from train.recipe_table import RecipeTable
from train.resolve import resolve_recipe
from train.state import Kept, StateFormats
from train.step import Pieces
from train.text import Text
from train.weights import parts_of

CPU = torch.device("cpu")
# Steps whose gradients are finite, as digits; the others have an infinity or a NaN.
RUNS = ["111111111111", "011111111111", "110111011101", "000000111111", "111011101110", "10n1n0111111"]


@pytest.mark.parametrize("initial", [2.0**16, 2.0**126, 3.0])
def test_each_run_is_scaled_skipped_and_updated_as_torchs_own_scaler_and_adamw_do(initial: float) -> None:
    """A GradScaler and an AdamW a run, whose gradients are those numbers times its scale of the moment."""
    config = DynamicLossScale(initial, interval=3)
    optimizer = AdamW(weight_decay=0.0, clip=math.inf)
    R, steps = len(RUNS), len(RUNS[0])
    gradients = 1.8 * torch.rand(steps, R, 2, 2, generator=torch.Generator().manual_seed(2)) - 0.9
    rates = torch.full((steps, R), 0.01)
    w = torch.ones(R, 2, 2)
    kept = Kept(torch.zeros_like(w), torch.zeros_like(w))
    scale, good, updates = (
        torch.full((R,), initial),
        torch.zeros(R, dtype=torch.int64),
        torch.zeros(R, dtype=torch.int64),
    )
    scales, skipped = torch.zeros(steps, R), torch.zeros(steps, R, dtype=torch.bool)
    peers = [torch.nn.Parameter(torch.ones(2, 2)) for _ in RUNS]
    adamws = [torch.optim.AdamW([p], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0) for p in peers]
    scalers = [torch.amp.GradScaler("cpu", init_scale=initial, growth_interval=3) for _ in RUNS]
    for scaler in scalers:
        scaler.scale(torch.ones(()))  # a scaler makes its scale when it is first used
    for t in range(steps):
        bad = torch.tensor([{"1": 0.0, "0": math.inf, "n": math.nan}[run[t]] for run in RUNS])
        scaled = gradients[t] * scale[:, None, None]
        scaled[:, 0, 1] += bad
        for run, (peer, adamw, scaler) in enumerate(zip(peers, adamws, scalers, strict=True)):
            assert scaler.get_scale() == float(scale[run])
            peer.grad = scaled[run].clone()
            scaler.step(adamw)
            scaler.update()
        counter, unscale = torch.tensor([t]), inverse(scale)
        total = squares([(scaled,)], None, unscale)
        _, f = factors([total], rates, counter, optimizer, unscale, updates)
        update([w], [(scaled,)], [kept], f, optimizer, [Rule()])
        assert f.made is not None
        advance_scale(scale, good, updates, f.made, scales, skipped, counter, config)
        torch.testing.assert_close(w, torch.stack(list(peers)).detach(), rtol=2e-6, atol=0)
    assert scale.tolist() == [scaler.get_scale() for scaler in scalers]
    assert skipped.T.tolist() == [[digit != "1" for digit in run] for run in RUNS]
    assert updates.tolist() == [run.count("1") for run in RUNS]
    assert scales[0].tolist() == [initial] * R
    if initial == 2.0**126:
        assert scale[0] == 2.0**127, "the next one up is beyond FP32"


def weights_of(pack: Pack, run: int | slice = slice(None)) -> list[Tensor]:
    """All that a run has, copied: weights, moments, operands."""
    tensors = [*pack.parameters.values(), *(t for o in pack.operands.values() for t in parts_of(o))]
    tensors += [t for kept in pack.kept.values() for t in kept[:3] if t is not None]
    return [t.detach()[run].clone() for t in tensors]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": Muon()},
        {"state": StateFormats("bf16", "e4m3fn@tensor", "bf16", rounding="stochastic", kahan=True)},
    ],
    ids=["adamw", "muon", "narrow state"],
)
def test_a_skipped_run_keeps_every_bit_and_its_neighbours_notice_nothing(
    text: Text, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]
) -> None:
    """One infinity in one of a run's gradients, in its fourth step."""
    program = make_program("e4m3", dynamic_loss_scale=DynamicLossScale(1024.0, interval=5), **changes)
    packs = [Pack(program, make_slots(["e4m3"] * 3), text, CPU) for _ in range(2)]
    whole = packs[0].gradients

    def poisoned(tokens: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Parts]]:
        losses, grads = whole(tokens, targets)
        if int(packs[0].counter) == 3:
            grads["h.1.attn.proj"][0][1, 2, 3] = math.inf
        return losses, grads

    monkeypatch.setattr(packs[0], "gradients", poisoned)
    for t in range(9):
        before = weights_of(packs[0], 1)
        for pack in packs:
            pack.step()
        kept = [torch.equal(a, b) for a, b in zip(before, weights_of(packs[0], 1), strict=True)]
        assert all(kept) == (t == 3)
    for run in (0, 2):
        for a, b in zip(weights_of(packs[0], run), weights_of(packs[1], run), strict=True):
            assert torch.equal(a, b)
    assert packs[0].skipped[:9].nonzero().tolist() == [[3, 1]]
    assert packs[0].updates.tolist() == [9, 8, 9]
    assert packs[0].loss_scale[:9, 1].tolist() == [1024.0] * 4 + [512.0] * 5
    assert packs[0].loss_scale[:9, 0].tolist() == [1024.0] * 5 + [2048.0] * 4
    assert packs[0].grad_norm[3, 1] == math.inf
    assert packs[0].scale is not None
    assert packs[0].scale.tolist() == [
        2048.0,
        1024.0,
        2048.0,
    ]  # the fifth good step in a row of the middle one was its last


def train(program: Program, slots: list[Slot], text: Text) -> tuple[list[Tensor], Pack]:
    pack = Pack(program, slots, text, CPU)
    for _ in range(12):
        pack.step()
    return [pack.train_loss[:12], pack.grad_norm[:12], *weights_of(pack)], pack


def scaled_slots(recipe: str, scales: list[float]) -> list[Slot]:
    return [
        Slot(slot.recipe, slot.learning_rate, slot.init_seed, slot.data_seed, scale)
        for slot, scale in zip(make_slots([recipe] * len(scales)), scales, strict=True)
    ]


@pytest.mark.parametrize("recipe", ["native-fp64", "native-fp32", "bf16"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("of_runs", [10**9, 1])
def test_a_power_of_two_changes_no_bit_where_no_range_is_narrow(
    text: Text, monkeypatch: pytest.MonkeyPatch, recipe: str, dynamic: bool, of_runs: int
) -> None:
    """Each run by its own scale, the head in one chunk or in one a run; a dynamic scale that grows on the way as well."""
    monkeypatch.setattr(head, "CHUNK_LOGITS", of_runs)
    plain, pack = train(make_program(recipe), scaled_slots(recipe, [1.0] * 3), text)
    assert pack.scale is None
    scales = [1.0] * 3 if dynamic else [2.0**10, 1.0, 2.0**-3]
    program = make_program(recipe, dynamic_loss_scale=DynamicLossScale(2.0**8, interval=4) if dynamic else None)
    scaled, pack = train(program, scaled_slots(recipe, scales), text)
    assert pack.scale is not None
    assert pack.scale.tolist() == ([2.0**11] * 3 if dynamic else scales)
    for a, b in zip(plain, scaled, strict=True):
        assert torch.equal(a, b)


def test_a_scale_that_is_no_power_of_two_changes_little(text: Text) -> None:
    plain, _ = train(make_program("native-fp64"), scaled_slots("native-fp64", [1.0]), text)
    scaled, _ = train(make_program("native-fp64"), scaled_slots("native-fp64", [1234567.0]), text)
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    assert any(not torch.equal(a, b) for a, b in zip(plain, scaled, strict=True))


def test_the_scale_comes_before_the_gradients_rounding() -> None:
    """Each run's own, in a format that most of the gradients are too small for without it; and in no loss."""
    table = RecipeTable("e8m7", "e8m7", "e4m3")
    p = pack_precision([resolve_recipe("mine", {"mine": table}).body] * 2, CPU)
    rng = np.random.default_rng(8)
    z = rng.standard_normal((2, 5, 20)).astype(np.float32)
    targets = rng.integers(0, 20, (2, 5))
    losses, dz = cross_entropy_gradient(
        torch.from_numpy(z), torch.from_numpy(targets), p, 20, 4000, False, PLAIN, torch.tensor([1.0, 4096.0])
    )
    log_sum = np.logaddexp.reduce(z.astype(np.float64), axis=2)
    chosen = np.take_along_axis(z, targets[..., None], 2)[..., 0]
    np.testing.assert_allclose(losses, (log_sum - chosen).sum(1), rtol=1e-6)
    gradient = (np.exp(z - log_sum[..., None]) - np.eye(20)[targets]) / 4000
    f = float_format("e4m3")
    for run, scale in enumerate((1.0, 4096.0)):
        np.testing.assert_array_equal(dz[run], f.decode(f.encode(gradient[run] * scale)))
    assert float((dz[0] == 0).float().mean()) > 0.8 > 0.1 > float((dz[1] == 0).float().mean())


def test_a_static_scale_saves_gradients_that_a_narrow_range_loses(text: Text) -> None:
    """A batch's gradient of 48 tokens in e3m4, whose smallest value is 2^-6: at most the target's own survives."""
    name = resolve_recipe("mine", {"mine": RecipeTable("e8m7", "e8m7", "e3m4")})
    program = make_program(structure=name.structure, steps=60, schedule="constant")
    slots = [Slot(name, 1e-2, 5, 5, scale) for scale in (1.0, 2.0**8)]
    result = train_pack(program, slots, text, CPU)
    assert result.train_loss[-5:, 1].mean() < result.train_loss[-5:, 0].mean() - 0.3


def test_a_scale_too_large_for_gradients_in_fp16_falls_until_they_fit(text: Text) -> None:
    """Of each run by itself; from then on it trains, with the gradients that FP16 holds."""
    dynamic = DynamicLossScale(2.0**30, interval=4)
    program = make_program("native-fp32", state=StateFormats(gradient="fp16"), dynamic_loss_scale=dynamic, steps=60)
    result = train_pack(program, make_slots(["native-fp32"] * 2, 1e-2), text, CPU)
    assert result.skipped is not None
    assert result.loss_scale is not None
    for run in range(2):
        skips = int(np.argmin(result.skipped[:, run]))
        assert 5 < skips < 20, "2^30 less a few binades, down to 65504 of the largest gradient"
        assert result.skipped[:skips, run].all()
        assert result.loss_scale[skips, run] == 2.0 ** (30 - skips)
        assert result.loss_scale[skips + 1 :, run].max() <= 2.0 ** (32 - skips), "and it stays near there"
    assert (result.train_loss[-1] < result.train_loss[0] - 0.5).all()


def test_a_pack_hands_back_its_scales_only_where_they_move(text: Text) -> None:
    slots = make_slots(["e4m3"] * 2)
    for program in (make_program(), make_program(dynamic_loss_scale=DynamicLossScale())):
        result = train_pack(program, slots, text, CPU)
        if program.dynamic_loss_scale is None:
            assert result.loss_scale is None
            assert result.skipped is None
        else:
            assert result.loss_scale is not None
            assert result.skipped is not None
            assert result.loss_scale.shape == result.skipped.shape == (20, 2)
            assert (result.loss_scale == 2.0**16).all()
            assert not result.skipped.any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DynamicLossScale(growth=1.0), "growth of the loss scale must be greater than 1, got 1; 2 is usual"),
        (lambda: DynamicLossScale(backoff=1.0), "backoff of the loss scale must be between 0 and 1, got 1"),
        (lambda: DynamicLossScale(interval=0), "interval of the loss scale must be at least 1 step, got 0"),
        (lambda: DynamicLossScale(0.0), r"a loss scale must be in 2\^-126..2\^126, got 0; 2\^16 is usual"),
        (lambda: scaled_slots("e4m3", [math.nan]), "a loss scale must be in .* got nan"),
    ],
)
def test_what_is_no_loss_scale_is_refused(make: functools.partial[object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_static_scale_beside_a_dynamic_one_is_refused(text: Text) -> None:
    program = make_program(dynamic_loss_scale=DynamicLossScale())
    with pytest.raises(ValueError, match="static or dynamic, got 8 for a run of a program that has a dynamic one"):
        Pack(program, scaled_slots("e4m3", [1.0, 8.0]), text, CPU)


def test_pieces_that_scale_and_skip_are_traced_whole_and_as_often_as_plain_ones(text: Text) -> None:
    """The tracer alone, eager kernels: the same numbers but for the last digits, and no program a step or a layer."""
    counts, results = [], []
    for dynamic in (None, DynamicLossScale(2.0**5, interval=2)):
        for traced in (False, True):
            torch._dynamo.reset()
            pack = Pack(
                make_program("native-fp64", dynamic_loss_scale=dynamic, optimizer=Muon()),
                make_slots(["native-fp64"] * 2),
                text,
                CPU,
            )
            counted = CompileCounterWithBackend("aot_eager")
            if traced:
                pack._pieces = Pieces(functools.partial(torch.compile, dynamic=False, fullgraph=True, backend=counted))
            for _ in range(4):
                pack.step()
            counts += [counted.frame_count] if traced else []
            results.append([pack.train_loss[:4], pack.grad_norm[:4], *weights_of(pack)])
    assert counts[1] == counts[0] + 1  # the scaler itself
    for traced_results in results[1:2] + results[3:]:
        for a, b in zip(results[0], traced_results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-10)
