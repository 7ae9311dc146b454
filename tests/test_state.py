"""The optimiser's state in narrow formats, against exact rounding and an AdamW in Python's own FP64 numbers."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from formats import float_format, round_exact
from tests.small import make_program, make_slots, resolve
from train.optim import AdamW, Factors, Rule, factors, squares, update
from train.pack import Pack
from train.program import Slot
from train.rounding_seeds import run_keys
from train.state import Chance, Kept, StateFormats, Store, compensated, parameter_words, stored
from train.step import batch
from train.text import Text
from train.weights import parts_of

CPU = torch.device("cpu")
FP32 = float_format("fp32")


def exact(x: float, name: str, rounding: str = "nearest_even") -> float:
    """x on the format's grid; beyond its largest value infinity, or that value where there is none."""
    if not math.isfinite(x):
        return x
    return float(round_exact(x, float_format(name), rounding=rounding, overflow="sat_none"))


def exact_scaled(row: np.ndarray, element: str) -> list[float]:
    """Numbers that share a scale in FP32, amax / largest, by exact quotients; the product rounded to FP32 once."""
    f = float_format(element)
    scale = Fraction(round_exact(Fraction(float(abs(row).max())) / Fraction(f.max), FP32))
    return [
        math.copysign(float(round_exact(Fraction(round_exact(Fraction(float(x)) / scale, f)) * scale, FP32)), x)
        for x in row
    ]


# One rounding.


@pytest.mark.parametrize("rounding", ["nearest_even", "toward_zero"])
@pytest.mark.parametrize("name", ["bf16", "fp16", "e5m2", "e4m3fn", "e2m1fn"])
def test_plain_formats_store_what_exact_rounding_gives(name: str, rounding: str) -> None:
    rng = np.random.default_rng(5)
    x = (rng.standard_normal(600) * np.exp2(rng.integers(-30, 20, 600))).astype(np.float32)
    x[:6] = [0.0, -0.0, math.inf, -math.inf, math.nan, 3e38]
    values = stored(torch.from_numpy(x.reshape(2, 3, 100)), name, rounding).flatten().numpy()
    np.testing.assert_array_equal(values, np.array([exact(float(v), name, rounding) for v in x], np.float32))


@pytest.mark.parametrize("shape", [(3, 4, 10), (3, 10)])
@pytest.mark.parametrize(
    ("name", "element", "group"),
    [
        ("e4m3fn@tensor", "e4m3fn", None),
        ("e5m10@tensor", "fp16", None),
        ("e4m3fn@block4", "e4m3fn", (1, 4)),
        ("e4m3fn@tile2x4", "e4m3fn", (2, 4)),
    ],
)
def test_scaled_formats_scale_each_run_by_itself(
    name: str, element: str, group: tuple[int, int] | None, shape: tuple[int, ...]
) -> None:
    """The whole run, blocks along its last axis, or tiles, of which a vector is one row; the last ones are short."""
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    x *= np.array([1.0, 1e-6, 1e4], np.float32).reshape(3, *[1] * (len(shape) - 1))
    expected = np.empty_like(x).reshape(3, -1, 10)
    rows, columns = expected.shape[1:]
    a, b = group or (rows, columns)
    for run, matrix in enumerate(x.reshape(3, rows, columns)):
        for i in range(0, rows, a):
            for j in range(0, columns, b):
                tile = matrix[i : i + a, j : j + b]
                expected[run, i : i + a, j : j + b] = np.reshape(exact_scaled(tile.ravel(), element), tile.shape)
    np.testing.assert_array_equal(stored(torch.from_numpy(x), name).numpy(), expected.reshape(shape))


def test_a_non_finite_number_spoils_its_own_run_alone() -> None:
    x = torch.ones(3, 2, 2)
    x[1, 0, 0] = torch.inf
    assert stored(x, "e4m3fn")[1, 0, 0] == torch.inf, "which the format does not have"
    scaled = stored(x, "e4m3fn@tensor")
    assert scaled[1].isnan().all()
    assert torch.equal(scaled[[0, 2]], x[[0, 2]])


# Steps.


def plain_adamw(
    weights: list[float], gradients: list[list[float]], rates: list[float], state: StateFormats, config: AdamW
) -> tuple[list[float], list[float], list[float]]:
    """One run's steps in Python's numbers, one at a time, every stored number rounded exactly: weights and both moments."""

    def keep(x: float, name: str | None, rounding: str = state.rounding) -> float:
        return x if name is None else exact(x, name, rounding)

    n = len(weights)
    weights, first, second, lost = list(weights), [0.0] * n, [0.0] * n, [0.0] * n
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        gradient = [keep(g, state.gradient, "nearest_even") for g in gradient]
        norm = math.sqrt(sum(g * g for g in gradient))
        clip = min(1.0, config.clip / (norm + 1e-6))
        for i, g in enumerate(gradient):
            m = first[i] + (1 - config.beta1) * (g * clip - first[i])
            v = config.beta2 * second[i] + (1 - config.beta2) * (g * clip) ** 2
            change = (rate / (1 - config.beta1**t)) * m / (math.sqrt(v) / math.sqrt(1 - config.beta2**t) + config.eps)
            if state.kahan:
                y = -rate * config.weight_decay * weights[i] - change + lost[i]
                total = keep(weights[i] + y, state.master)
                lost[i] = keep(y - (total - weights[i]), state.master)
                weights[i] = total
            else:
                weights[i] = keep(weights[i] * (1 - rate * config.weight_decay) - change, state.master)
            first[i], second[i] = keep(m, state.first), keep(v, state.second)
    return weights, first, second


@pytest.mark.parametrize(
    "state",
    [
        StateFormats(),
        StateFormats(master="bf16"),
        StateFormats(first="fp16", second="fp16"),
        StateFormats(gradient="e4m3"),
        StateFormats("fp16", "e5m2", "bf16", "e5m2", "toward_zero"),
        StateFormats("bf16", "bf16", "bf16", "bf16", kahan=True),
    ],
)
def test_steps_are_those_of_an_adamw_whose_every_stored_number_is_rounded(state: StateFormats) -> None:
    """In FP64, where nothing else rounds that could be seen; gradients of both sides of clipping, and FP16's subnormals."""
    rng = np.random.default_rng(11)
    steps, config = 12, AdamW(weight_decay=0.3, clip=2.0)
    weights = np.vectorize(lambda x: exact(x, state.master or "bf16"))(rng.standard_normal((2, 6, 1)))
    gradients = rng.standard_normal((steps, 2, 6, 1)) * np.array([1.0, 1e-3]).reshape(1, 2, 1, 1)
    rates = torch.tensor([[0.01 * (s + 1), 0.002 * (s + 1)] for s in range(steps)], dtype=torch.float64)
    w = torch.from_numpy(weights.copy())
    kept = Kept(torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(w) if state.kahan else None)
    for step in range(steps):
        parts = [(torch.from_numpy(gradients[step]),)]
        total = squares(parts, [state.gradient] * len(parts))
        _, f = factors([total], rates, torch.tensor([step]), config)
        update([w], parts, [kept], f, config, [Rule()], state)
    for run in range(2):
        expected = plain_adamw(
            weights[run].ravel().tolist(),
            gradients[:, run].reshape(steps, -1).tolist(),
            rates[:, run].tolist(),
            state,
            config,
        )
        assert kept.second is not None
        for mine, theirs in zip((w, kept.first, kept.second), expected, strict=True):
            np.testing.assert_allclose(mine[run].ravel().numpy(), theirs, rtol=1e-12, atol=1e-300)


def pack_of(text: Text, state: StateFormats, recipe: str = "native-fp32", **changes: Any) -> Pack:
    return Pack(make_program(recipe, state=state, **changes), make_slots([recipe] * 3), text, CPU)


def test_a_pack_starts_from_rounded_weights_and_stays_on_the_grid(text: Text) -> None:
    pack = pack_of(text, StateFormats("bf16", "fp16", "fp16"), recipe="e4m3")
    wide = pack_of(text, StateFormats(), recipe="e4m3")
    for _ in range(4):
        for name, p in pack.parameters.items():
            if int(pack.counter) == 0:
                assert torch.equal(p, wide.parameters[name].to(torch.bfloat16).float())
            assert torch.equal(p, p.to(torch.bfloat16).float()), name
            for moment in pack.kept[name][:2]:
                assert moment is not None
                assert torch.equal(moment, moment.half().float())
            if name.startswith("h.") and "ln" not in name:
                assert torch.equal(parts_of(pack.operands[name])[0], stored(p.detach(), "e4m3", "nearest_even"))
        pack.step()


def test_scaled_moments_are_stored_by_run_and_the_steps_own_update_sees_them_unrounded(text: Text) -> None:
    state = StateFormats(first="e4m3fn@tensor", second="e5m10@tensor")
    plain, scaled = pack_of(text, StateFormats()), pack_of(text, state)
    plain.step()
    scaled.step()
    for name, p in plain.parameters.items():
        assert torch.equal(p, scaled.parameters[name])
    for name in ("wte", "h.1.mlp.proj", "ln_f"):
        for run in range(3):
            for moment, element in ((0, "e4m3fn"), (1, "fp16")):
                before = plain.kept[name][moment]
                after = scaled.kept[name][moment]
                assert before is not None
                assert after is not None
                np.testing.assert_array_equal(after[run].ravel(), exact_scaled(before[run].ravel().numpy(), element))


def test_a_gradient_is_stored_when_its_parts_are_summed_and_before_its_norm_is_taken(text: Text) -> None:
    """Of the token embedding, from either end; by each run's own scale."""
    pack = pack_of(text, StateFormats(gradient="e4m3fn@tensor"), optimizer=AdamW(clip=math.inf))
    offsets = pack.offsets[0]
    _, grads = pack.gradients(*batch(pack.text, offsets, pack.program.shape.context))
    pack.step()
    total = np.zeros(3)
    for name, parts in grads.items():
        summed = torch.stack([part.float() for part in parts]).sum(0)
        for run in range(3):
            rounded = np.array(exact_scaled(summed[run].ravel().numpy(), "e4m3fn"))
            total[run] += (rounded**2).sum()
            np.testing.assert_allclose(pack.kept[name].first[run].ravel(), 0.1 * rounded, rtol=1e-6)
    np.testing.assert_allclose(pack.grad_norm[0], np.sqrt(total), rtol=1e-6)


# Chance.


def test_a_stochastic_master_keeps_the_mean_and_draws_for_each_run_step_and_parameter() -> None:
    """A change of 0.3 of the distance between BF16's 1 and its successor, made by 4096 runs: up with probability 0.3."""
    ulp, runs = 2.0**-7, 4096
    state = StateFormats(master="bf16", rounding="stochastic")
    keys = run_keys([(s, s + 1) for s in range(runs)])
    ups = {}
    for step in (0, 1):
        for name in ("h.0.mlp.fc", "h.1.mlp.fc"):
            chance = Chance(keys, torch.tensor([step]))
            value = torch.full((runs, 2, 1), 1 + 0.3 * ulp)
            drawn = Store(state, chance, parameter_words(name))(value, "master")
            assert set(drawn.flatten().tolist()) == {1.0, 1 + ulp}
            ups[step, name] = (drawn > 1).numpy()
            # The standard deviation of the share of 8192 draws is sqrt(0.21 / 8192); four of them.
            assert abs(ups[step, name].mean() - 0.3) < 4 * math.sqrt(0.21 / (2 * runs))
    columns = [column.reshape(runs, 2) for column in ups.values()]
    draws = np.concatenate(columns, 1)
    for i in range(draws.shape[1]):
        for j in range(i):
            together = np.histogram2d(draws[:, i], draws[:, j], bins=2)[0]
            assert stats.chi2_contingency(together).pvalue > 1e-5, "two draws that follow each other"


def test_moments_and_masters_are_rounded_by_different_draws() -> None:
    state = StateFormats("e8m3", "e8m3", "e8m3", rounding="stochastic", kahan=True)
    chance = Chance(run_keys([(1, 2)]), torch.tensor([9]))
    store = Store(state, chance, parameter_words("wte"))
    value = torch.full((1, 500, 1), 1 + 1 / 16)
    drawn = [store(value, what) for what in ("master", "lost", "first", "second")]
    for i in range(4):
        for j in range(i):
            assert abs(float(((drawn[i] > 1.0) == (drawn[j] > 1.0)).float().mean()) - 0.5) < 0.12  # 5 / sqrt(4 * 500)


@pytest.mark.parametrize("master", ["bf16", "e4m3fn@block4"])
def test_a_run_with_stochastic_state_has_the_same_bits_in_every_slot(text: Text, master: str) -> None:
    """And others with other seeds, which shows that the comparison can fail."""
    state = StateFormats(master, "e5m10@tensor", "bf16", rounding="stochastic")

    def bits(slot: int, data_seed: int = 99) -> list[object]:
        slots = make_slots(["e8m7", "e5m2", "e4m3"])
        slots[slot] = Slot(resolve("e4m7"), 4e-3, 99, data_seed)
        pack = Pack(make_program(state=state), slots, text, CPU)
        for _ in range(5):
            pack.step()
        return [pack.train_loss[:5, slot].tolist(), *(p[slot].tolist() for p in pack.parameters.values())]

    assert bits(0) == bits(1) == bits(2)
    assert bits(0) != bits(0, data_seed=98)


# Kahan.


def test_what_rounding_lost_and_what_it_kept_are_the_exact_sum() -> None:
    """Changes of BF16's 2^-12 and less to a weight of 1, whose neighbours are 2^-8 below and 2^-7 above."""
    store = Store(StateFormats(master="bf16", kahan=True), None, None)
    w, lost = torch.ones(1, 3, 1), torch.zeros(1, 3, 1)
    changes = [Fraction(1, 4096), Fraction(-3, 8192), Fraction(5, 16384)]
    exact_sums = [Fraction(1)] * 3
    change = torch.tensor([[[float(c)] for c in changes]])
    for step in range(200):
        w, lost = compensated(w, change, lost, store)
        exact_sums = [s + c for s, c in zip(exact_sums, changes, strict=True)]
        assert torch.equal(w, w.to(torch.bfloat16).float())
        sums = [Fraction(float(a)) + Fraction(float(b)) for a, b in zip(w.flatten(), lost.flatten(), strict=True)]
        assert sums == exact_sums, step
    assert w.flatten().tolist() == [exact(float(s), "bf16") for s in exact_sums] != [1.0] * 3


def test_kahans_bf16_master_follows_an_fp32_one_where_a_plain_one_stands_still(text: Text) -> None:
    """At a rate whose changes are below BF16's resolution."""
    made = {}
    for name, state in {
        "fp32": StateFormats(),
        "plain": StateFormats(master="bf16"),
        "kahan": StateFormats(master="bf16", kahan=True),
    }.items():
        program = make_program("native-fp32", state=state, schedule="constant", steps=60)
        pack = Pack(program, make_slots(["native-fp32"] * 2, 3e-5), text, CPU)
        start = pack.parameters["h.0.mlp.fc"].detach().clone()
        for _ in range(60):
            pack.step()
        made[name] = pack.parameters["h.0.mlp.fc"].detach() - start
        if name == "kahan":
            lost = pack.kept["h.0.mlp.fc"].lost
            assert lost is not None
            assert torch.equal(lost, lost.to(torch.bfloat16).float())
            made["kahan and its buffer"] = made[name] + lost

    def error(name: str) -> float:
        return float((made[name] - made["fp32"]).norm() / made["fp32"].norm())

    assert error("plain") > 3 * error("kahan")
    assert error("plain") > 10 * error("kahan and its buffer")


# Refusals and the compiler.


def test_what_cannot_be_a_state_is_refused() -> None:
    with pytest.raises(ValueError, match="e9m3"):
        StateFormats(first="e9m3")
    with pytest.raises(
        ValueError, match="rounding of the state must be nearest_even, toward_zero, stochastic, got 'up'"
    ):
        StateFormats(rounding="up")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs FP32 runs, and native-fp64's are FP64"):
        make_program("native-fp64", state=StateFormats(first="mxfp8_e4m3fn"))


def test_a_step_that_rounds_its_state_is_traced_whole_and_once_for_all_layers() -> None:
    """Scaled and plain formats, by chance, with Kahan's buffer; the tracer alone, eager kernels: the same bits."""
    state = StateFormats("bf16", "e4m3fn@block4", "e5m10@tensor", "e5m2", "stochastic", kahan=True)
    keys, counter, config = run_keys([(1, 2), (3, 4)]), torch.tensor([3]), AdamW()
    f = Factors(*(torch.full((2,), x) for x in (1.0, 1e-4, 1e-2, 0.5, 1e-3)))
    results = []
    torch._dynamo.reset()
    counted = CompileCounterWithBackend("aot_eager")
    for step in (update, torch.compile(update, dynamic=False, fullgraph=True, backend=counted)):
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(2, 8, 12, generator=generator) for _ in range(3)]
        kept = [Kept(w * 0.1, w.abs(), w * 0.001, parameter_words(f"h.{i}.x")) for i, w in enumerate(weights)]
        for i in range(3):
            step([weights[i]], [(weights[i] * 0.3,)], [kept[i]], f, config, [Rule()], state, Chance(keys, counter))
        results.append([*weights, *(t for k in kept for t in k[:3] if t is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert counted.frame_count == 1


def test_a_state_in_fp32_by_name_is_the_default(text: Text) -> None:
    packs = [pack_of(text, state) for state in (StateFormats(), StateFormats("fp32", "fp32", "fp32", "fp32"))]
    for pack in packs:
        for _ in range(3):
            pack.step()
    for name in packs[0].parameters:
        tensors: list[list[Tensor | None]] = [[p.parameters[name], *p.kept[name][:2]] for p in packs]
        for a, b in zip(*tensors, strict=True):
            assert a is not None
            assert b is not None
            assert torch.equal(a, b)
    assert dataclasses.replace(StateFormats()) == StateFormats()
