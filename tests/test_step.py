"""The head's written-out gradients to the last bit, whose formats a step takes where, and what a pack reads and measures.

Expectations round with the formats' NumPy codes and multiply in FP64, on numbers whose FP32 sums are exact in any order; or
they are counted and averaged by hand.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from formats import float_format
from landscape import logit_sharpness
from tests.recipe_packs import program_for, slot
from tests.small import OPTIONS, SHAPE, SHAPES, make_program, make_slots
from train import head
from train.head import head_over_chunks
from train.model import ModelShape, Numerics, cross_entropy, forward
from train.optim import Muon
from train.pack import Pack, train_pack
from train.precision import pack_precision
from train.program import Probe, Progress, Slot
from train.recipe_table import RecipeTable
from train.resolve import resolve_recipe
from train.state import StateFormats
from train.step import Pieces
from train.text import Text
from train.weights import padded_vocabulary, parts_of

CPU = torch.device("cpu")
# Three formats in the blocks and three others in the head, of different precisions: none can pass for another.
SIXFOLD = {
    "sixfold": RecipeTable("e5m4", "e5m3", "e5m2", lm_head="head"),
    "head": RecipeTable("e5m6", "e5m5", "e6m1"),
}


def sixfold_pack(text: Text, runs: int = 2) -> Pack:
    recipe = resolve_recipe("sixfold", SIXFOLD)
    return Pack(
        make_program(structure=recipe.structure), [Slot(recipe, 3e-3, 10 + i, 20 + i) for i in range(runs)], text, CPU
    )


def on_grid(values: NDArray[Any], name: str, rounding: str = "nearest_even") -> NDArray[np.float64]:
    f = float_format(name)
    return f.decode(f.encode(np.asarray(values, np.float64), rounding=rounding))


# The head, by exact sums.

TOKENS, WIDTH, VOCABULARY = 12, 6, 10
GRADIENTS = ["e5m2", "e4m3", "e5m1"]


@pytest.mark.parametrize("rounding", ["nearest_even", "toward_zero"])
@pytest.mark.parametrize(
    ("of_runs", "of_one", "calls"),
    [
        (10**9, 10**9, 1),
        (64 * TOKENS, 10**9, 3),  # a run at a time
        (1, 64 * 5, 9),  # 4 tokens of a run at a time
    ],
)
def test_the_heads_gradients_are_those_of_exact_sums_rounded_once_however_it_is_cut(
    monkeypatch: pytest.MonkeyPatch, of_runs: int, of_one: int, calls: int, rounding: str
) -> None:
    """Each run's dz on that run's own grid; dW over all tokens is one sum, rounded to BF16 once."""
    monkeypatch.setattr(head, "CHUNK_LOGITS", of_runs)
    monkeypatch.setattr(head, "CHUNK_OF_ONE_RUN", of_one)
    rng = np.random.default_rng(3)
    x = rng.integers(-16, 17, (3, TOKENS, WIDTH)) / 8
    w = rng.integers(-16, 17, (3, VOCABULARY, WIDTH)) / 16
    targets = rng.integers(0, VOCABULARY, (3, TOKENS))
    tables = {name: RecipeTable("e8m7", "e8m7", name, rounding=rounding) for name in GRADIENTS}
    p = pack_precision([resolve_recipe(name, tables).body for name in GRADIENTS], CPU)
    pieces = Pieces()
    counted = pieces.head = Mock(wraps=pieces.head)
    padded = torch.zeros(3, padded_vocabulary(VOCABULARY), WIDTH)
    padded[:, :VOCABULARY] = torch.from_numpy(w)
    losses, dx, dw, _ = head_over_chunks(
        pieces, torch.from_numpy(x).float(), padded, torch.from_numpy(targets), Numerics(p, p), VOCABULARY
    )
    assert counted.call_count == calls
    for run, name in enumerate(GRADIENTS):
        z = on_grid(x[run] @ w[run].T, "bf16")
        log_sum = np.logaddexp.reduce(z, axis=1)
        one_hot = np.eye(VOCABULARY)[targets[run]]
        dz = on_grid((np.exp(z - log_sum[:, None]) - one_hot) / TOKENS, name, rounding)
        np.testing.assert_allclose(losses[run], (log_sum - (z * one_hot).sum(1)).mean(), rtol=1e-6)
        np.testing.assert_array_equal(dx[run], on_grid(dz @ w[run], "bf16"))
        np.testing.assert_array_equal(dw[run, :VOCABULARY], on_grid(dz.T @ x[run], "bf16"))
        assert not dw[run, VOCABULARY:].any()
        assert not np.array_equal(dz, on_grid(dz, GRADIENTS[run - 1], rounding)), "a neighbour's grid would show"


# Which format goes where.


def test_a_steps_gradients_take_each_operand_on_its_own_grid(text: Text) -> None:
    """Against the plain model, whose linear layers are held to exact sums (test_linear), but for ties."""
    pack = sixfold_pack(text)
    tokens, targets = pack.held_out[0]
    losses, grads = pack.gradients(tokens, targets)
    expected = cross_entropy(forward(pack.parameters, tokens.view(2, -1, SHAPE.context), SHAPE, pack.numerics), targets)
    torch.testing.assert_close(losses, expected.detach(), rtol=0, atol=2e-6)
    theirs = torch.autograd.grad(expected.sum(), list(pack.parameters.values()))
    for name, plain in zip(pack.parameters, theirs, strict=True):
        mine = torch.stack([part.float() for part in grads[name]]).sum(0)
        assert float((mine - plain).norm() / plain.norm()) < 2e-3, name


def test_operands_are_on_the_weights_grids_from_the_first_step_on(text: Text) -> None:
    pack = sixfold_pack(text)
    for _ in range(3):
        for name, operand in pack.operands.items():
            f = "e5m5" if name == "wte" else "e5m3"
            weights = pack.parameters[name].detach().numpy()
            np.testing.assert_array_equal(parts_of(operand)[0].detach().numpy(), on_grid(weights, f), err_msg=name)
        pack.step()


def test_runs_in_chunks_of_their_own_keep_their_own_formats(text: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = ["e4m3", "e5m2", "e8m3", "e4m5"]

    def run(of_runs: int) -> list[Tensor]:
        monkeypatch.setattr(head, "CHUNK_LOGITS", of_runs)
        pack = Pack(make_program(), make_slots(recipes), text, CPU)
        losses, grads = pack.gradients(*pack.held_out[0])
        return [losses, *grads["wte"], pack.validation_loss(), *pack.sharpness().values()]

    together, apart = run(10**9), run(1)
    for a, b in zip(together, apart, strict=True):
        assert torch.equal(a, b)


# What a pack reads and measures.


def wide_text() -> Text:
    """Tokens beyond a byte, uint16; training and validation tokens differ."""
    tokens = np.random.default_rng(1).integers(0, 300, 4000).astype(np.uint16)
    return Text("python", tokens[:3000], tokens[3000:], 300, 5.7, "0" * 64, "made here")


def test_a_pack_reads_every_token_and_is_held_to_the_validation_text_from_end_to_end() -> None:
    text, T = wide_text(), SHAPE.context
    pack = Pack(make_program(shape=dataclasses.replace(SHAPE, vocabulary=300)), make_slots(["e4m3"] * 2), text, CPU)
    assert pack.text.tolist() == text.train.tolist()
    starts = [987 * i // 7 for i in range(8)]  # 1000 - 12 - 1 is the last place where a window and its successor fit
    assert len(pack.held_out) == 2
    for part, (tokens, targets) in enumerate(pack.held_out):
        for run in range(2):
            windows = [text.validation[s : s + T + 1].astype(int) for s in starts[4 * part : 4 * part + 4]]
            assert tokens[run].tolist() == [t for window in windows for t in window[:-1]]
            assert targets[run].tolist() == [t for window in windows for t in window[1:]]


@pytest.mark.parametrize("option", ["none", *SHAPES])
@pytest.mark.parametrize("limit", [10**9, 64 * SHAPE.context])
def test_the_validation_loss_is_the_mean_over_every_held_out_token(
    text: Text, monkeypatch: pytest.MonkeyPatch, limit: int, option: str
) -> None:
    """And it stays what it was when it is taken again; 50 tokens, so that the head is padded."""
    monkeypatch.setattr(head, "CHUNK_OF_ONE_RUN", limit)
    shape = dataclasses.replace(SHAPES.get(option, SHAPE), vocabulary=50)
    pack = Pack(make_program("native-fp64", shape=shape), make_slots(["native-fp64"] * 3), text, CPU)

    def expected() -> Tensor:
        logits = [
            forward(pack.parameters, t.view(3, -1, SHAPE.context), shape, pack.numerics) for t, _ in pack.held_out
        ]
        losses = [
            torch.nn.functional.cross_entropy(z.transpose(1, 2), targets, reduction="none")
            for z, (_, targets) in zip(logits, pack.held_out, strict=True)
        ]
        return torch.cat(losses, 1).mean(1).detach()

    at_first = expected()
    before = pack.validation_loss()
    pack.step()
    torch.testing.assert_close(pack.validation_loss(), expected(), rtol=0, atol=1e-13)
    torch.testing.assert_close(before, at_first, rtol=0, atol=1e-13)
    assert (before != pack.validation_loss()).all()


def test_measurements_belong_to_the_step_that_they_are_taken_after(text: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations after 0, 10 and 20 updates, probes after 0, 7, 14 and 20; progress tells the last step's losses."""
    program = make_program(probe=Probe(every=7))
    slots = make_slots(["e4m3"] * 2)
    pack, losses, sharpness = Pack(program, slots, text, CPU), [], []
    for done in range(21):
        if done in (0, 10, 20):
            losses.append(pack.validation_loss())
        if done in (0, 7, 14, 20):
            sharpness.append(pack.sharpness())
        if done < 20:
            pack.step()
    heard: list[Progress] = []
    result = train_pack(program, slots, text, CPU, on_progress=heard.append)
    np.testing.assert_array_equal(result.validation_loss, torch.stack(losses))
    for name, values in result.sharpness.items():
        np.testing.assert_array_equal(values, torch.stack([s[name] for s in sharpness]))
        assert len({values[i].tobytes() for i in range(4)}) == 4
    np.testing.assert_array_equal(result.train_loss, pack.train_loss)
    assert [p.step for p in heard] == [10, 20]
    for p in heard:
        np.testing.assert_array_equal(p.loss, result.train_loss[p.step - 1])


@pytest.mark.parametrize("wild", [False, True])
@pytest.mark.parametrize("option", ["none", "untied", "softcap", "z_loss", "mup", "everything"])
def test_probes_measure_the_two_sharpnesses_of_a_padded_vocabulary(
    text: Text, monkeypatch: pytest.MonkeyPatch, option: str, wild: bool
) -> None:
    """By softmax's slope at a small epsilon, which knows neither series nor chunks; boxes around zero and around the mean.

    Logits are those that softmax sees, the loss is the cross entropy; and also where boxes are taken for `wild` ones.
    """
    monkeypatch.setattr(head, "CHUNK_OF_ONE_RUN", 64 * SHAPE.context)
    shape = dataclasses.replace(SHAPE, vocabulary=50, **OPTIONS.get(option, {}))
    program = make_program("native-fp64", shape=shape, probe=Probe(every=10, epsilons=(1e-7, 2e-7)))
    pack = Pack(program, make_slots(["native-fp64"] * 2), text, CPU)
    with torch.no_grad():
        pack.parameters[shape.head] *= 30
        parts_of(pack.operands[shape.head])[0][:, :50] *= 30
    if wild:
        monkeypatch.setattr(pack._pieces, "head_sharpness", lambda *chunk: step_without_small_boxes(*chunk))
    measured = pack.sharpness()
    z, targets = pack.logits(), pack.held_out[0][1]
    p = z.softmax(-1)
    one_hot = torch.nn.functional.one_hot(targets, 50)
    loss = -(p * one_hot).sum(-1).log()
    for name, zero in (("logit_sharpness", 0.0), ("logit_sharpness_centred", z.mean(-1, keepdim=True))):
        slope = 100 * (((z - zero).abs() + 1) * (p - one_hot).abs()).sum(-1) / (1 + loss)
        for column, epsilon in enumerate(program.probe.epsilons):
            expected = epsilon * slope.mean(1)
            # The next term is of relative size 2 epsilon (max |z| + 1).
            torch.testing.assert_close(measured[name][:, column], expected, rtol=1e-4, atol=0)
    assert float((measured["logit_sharpness"] / measured["logit_sharpness_centred"] - 1).abs().min()) > 5e-4


def step_without_small_boxes(*chunk: Any) -> tuple[Tensor, Tensor]:
    sums, small = head.head_sharpness(*chunk)
    return torch.full_like(sums, torch.nan), torch.zeros_like(small)


def test_boxes_are_small_where_those_of_every_token_are_around_zero_and_around_the_mean() -> None:
    """By hand, epsilon 1e-3, target 0: widths of |z| + 1 there and at another logit make no more than 0.5."""
    calm, wild = torch.zeros(16), torch.tensor([0.0, *[1000.0] * 15])
    # 1 and 241 around zero; around the mean, 195, they are 196 and 436.
    off_centre = torch.tensor([0.0, -240.0, *[240.0] * 14])
    rows = torch.stack([torch.stack([a, b]) for a, b in ((calm, calm), (calm, off_centre), (wild, calm), (calm, wild))])
    p = pack_precision([resolve_recipe("native-fp32").body] * 4, CPU)
    # The columns of w are the tokens' logits; x picks them.
    x, targets = torch.eye(2).expand(4, -1, -1), torch.zeros(4, 2, dtype=torch.int64)
    _, small = head.head_sharpness(x, rows.transpose(1, 2), targets, p, 16, (1e-4, 1e-3))
    assert small.tolist() == [True, False, False, False]


@pytest.mark.parametrize("limit", [10**9, 64 * SHAPE.context])
def test_a_run_with_one_wild_token_is_measured_again_and_no_other(
    text: Text, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """Whole, or in chunks of which the wild token is in the first; 50 logits and what pads them."""
    monkeypatch.setattr(head, "CHUNK_OF_ONE_RUN", limit)
    shape = dataclasses.replace(SHAPE, vocabulary=50)
    pack = Pack(make_program(shape=shape), make_slots(["e4m3"] * 3), text, CPU)
    (tokens, targets), again = pack.held_out[0], pack._pieces.head_sharpness_of_any
    x = pack._hidden(tokens)[1].detach()
    monkeypatch.setattr(pack, "_hidden", lambda *_: (None, x))
    before = pack.sharpness()
    x[1, 2] *= 1e6

    def wrong_of_others(*arguments: Any) -> Tensor:
        sums: Tensor = again(*arguments)
        if sums.shape[1] == 3:
            sums[:, [0, 2]] = torch.nan
        return sums

    monkeypatch.setattr(pack._pieces, "head_sharpness_of_any", wrong_of_others)
    after = pack.sharpness()
    z = (x[1] @ parts_of(pack.operands["wte"])[0][1, :50].T).to(torch.bfloat16).double()
    for name, centred in (("logit_sharpness", False), ("logit_sharpness_centred", True)):
        assert torch.equal(after[name][[0, 2]], before[name][[0, 2]])
        expected = logit_sharpness(z, targets[1], pack.program.probe.epsilons, centred=centred).mean(0)
        torch.testing.assert_close(after[name][1].double(), expected, rtol=1e-5, atol=0)


def most_memory(work: Callable[[], object]) -> int:
    """The most bytes that were allocated at a time, by PyTorch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    results: Any = recorded.profiler
    events = [(e.start_ns(), e.nbytes()) for e in results.kineto_results.events() if e.name() == "[memory]"]
    return int(np.cumsum([size for _, size in sorted(events)]).max())


@pytest.mark.parametrize(
    ("recipe", "layers", "width", "vocabulary", "option", "changes"),
    [
        ("tf32", 4, 64, 256, "none", {}),
        ("native-fp64", 1, 128, 64, "none", {}),
        ("native-fp32", 2, 64, 1000, "none", {}),
        ("native-fp32", 6, 32, 32, "none", {}),
        ("tf32", 2, 64, 1000, "none", {}),
        ("e4m3", 2, 64, 1000, "none", {}),
        ("native-fp32", 6, 32, 32, "swiglu", {}),
        ("native-fp32", 6, 32, 32, "rope", {}),
        ("native-fp32", 6, 32, 32, "qk_norm", {}),
        ("native-fp32", 6, 32, 32, "grouped", {}),
        ("native-fp64", 6, 32, 32, "everything", {}),
        ("native-fp32", 6, 64, 32, "llama", {}),
        ("native-fp32", 1, 32, 1000, "softcap", {}),
        ("native-fp32", 1, 32, 1000, "z_loss", {}),
        ("e4m3", 1, 32, 1000, "everything", {}),
        ("native-fp32", 6, 128, 64, "none", {"optimizer": Muon()}),
        (
            "native-fp32", 1, 128, 64, "none",
            {"state": StateFormats("e4m3fn@block32", "bf16", "bf16", None, "stochastic", True)},
        ),
        ("native-fp32", 6, 128, 64, "none", {"state": StateFormats("bf16", kahan=True)}),
        *((name, layers, 32, 1000, "none", {}) for name in (
            "fp8-hybrid-delayed", "nvfp4-all", "deepseek-hopper", "mxfp4", "native-bf16-math", "stochastic-e5m2", "scores",
        ) for layers in (1, 6)),
    ],
)  # fmt: skip
def test_the_memory_of_a_run_is_estimated_from_above_and_not_far(
    recipe: str, layers: int, width: int, vocabulary: int, option: str, changes: dict[str, Any]
) -> None:
    """Against an allocator's account of two steps, an evaluation and a probe, on a CPU, where nothing is compiled."""
    shape = dataclasses.replace(ModelShape(layers, 2, width, 32, vocabulary), **OPTIONS.get(option, {}))
    meant = resolve_recipe(recipe, {"scores": RecipeTable(base="nvfp4-all", products="all")})
    program = program_for(meant, shape, sequences=16, evaluation_sequences=16, **changes)
    text = wide_text()
    text = dataclasses.replace(text, train=text.train % vocabulary, validation=text.validation % vocabulary)
    made: list[Pack] = []

    def work() -> None:
        made.append(Pack(program, [slot(meant, seed) for seed in range(2)], text, CPU))
        made[0].step()
        made[0].step()
        made[0].validation_loss()
        made[0].sharpness()

    measured = most_memory(work) / 2
    assert measured <= program.bytes_per_run(compiled=False) <= 3 * measured


def test_a_compiled_step_of_every_option_is_the_eager_one(text: Text) -> None:
    """To the bit, by the compiler's tracing alone: each piece is one program, without a break."""
    torch._dynamo.reset()
    found = []
    for wrap in (None, functools.partial(torch.compile, backend="aot_eager", fullgraph=True, dynamic=False)):
        pack = Pack(make_program(shape=SHAPES["everything"]), make_slots(["e4m3", "e5m2"]), text, CPU)
        pack._pieces = Pieces(wrap)
        losses, grads = pack.gradients(*pack.held_out[0])
        found.append([losses, *(part for parts in grads.values() for part in parts)])
    for eager, compiled in zip(*found, strict=True):
        assert eager.any()
        assert torch.equal(eager, compiled)
