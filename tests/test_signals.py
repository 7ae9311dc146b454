"""Each signal against numbers worked out by hand, or by NumPy in FP64 from the tensors that it is computed from."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from formats import quantize, quantize_scaled
from formats.factored import Factored
from tests.small import SHAPE, make_program, make_slots, resolve
from tests.test_pack import CPU, PlainGPT
from train import products, signal_pass, signals
from train.gradient_ratio import norm_to_mean
from train.model import forward, is_matrix
from train.numerics import make_numerics, place_of
from train.operands import OPERANDS, ROLES, Role
from train.optim import Muon
from train.pack import Pack
from train.precision import Precision
from train.program import Slot
from train.recipe_table import RecipeTable
from train.resolve import resolve_recipe
from train.seeds import initial_weights
from train.seen import LM_HEAD, Seen
from train.signal_pass import chosen, rounded, rounded_weight
from train.signals import OF_OPERANDS, Look, Rounded, statistics
from train.step import batch
from train.text import Text
from train.weights import detached, head_operand


def precision_of(name: str, **words: Any) -> Precision:
    recipe = resolve_recipe("mine", {"mine": RecipeTable(name, name, name, **words)})
    return make_numerics([recipe], SHAPE, CPU, quantize, False).body


def of(r: Rounded | None) -> dict[str, float]:
    """The signals of the only run."""
    assert r is not None
    return dict(zip(OF_OPERANDS, statistics(*r)[:, 0].tolist(), strict=True))


def spy_on(pack: Pack) -> list[Rounded]:
    """Every operand that the pack looks at from now on, copied: weights are updated in place."""
    looked: list[Rounded] = []

    def look(x: Tensor, q: Tensor, limit: Tensor, scale: Tensor | None, edge: Tensor) -> Tensor:
        copy = None if scale is None else scale.clone()
        looked.append(Rounded(x.detach().clone(), q.clone(), limit.clone(), copy, edge.clone()))
        return statistics(x, q, limit, scale, edge)

    pack._statistics = look
    return looked


def tensor(values: list[list[float]]) -> Tensor:
    return torch.tensor([values], dtype=torch.float32)


def error(x: list[float], q: list[float]) -> float:
    return float(np.sqrt(np.sum((np.array(q) - np.array(x)) ** 2) / np.sum(np.square(x))))


# What is rounded, row by row; what it becomes; clipped, flushed and at the maximum, counted; and the scales' exponents.
CRAFTED: dict[str, tuple[list[list[float]], list[list[float]], tuple[int, int, int], float]] = {
    # The largest is 448, the smallest 2^-9: half of it falls to zero, the even one.
    "e4m3fn": ([[500, 448, 449, -460, 0, 2**-10, 2**-11, 3]], [[448, 448, 448, -448, 0, 0, 0, 3]], (3, 2, 4), 0),
    # Signs and numbers of 1.875 * 2^127 and 2^-129: FP32 has both, and more.
    "e8m3": ([[2.0**127 * 1.9, -1, 2.0**-131, 0]], [[2.0**127 * 1.875, -1, 0, 0]], (1, 1, 1), 0),
    # 7 / 448 = 2^-6; elements are multiples of 2^-9 below 2^-6.
    "e4m3fn@tensor": ([[7, -7, 3.5], [2**-17, 0, 1]], [[7, -7, 3.5], [0, 0, 1]], (0, 1, 2), -6),
    # A row is what x W contracts; 127/8 and 508.
    "int8@row": ([[15.875, 0.125, 0.03], [508, -508, 4]], [[15.875, 0.125, 0], [508, -508, 4]], (0, 1, 3), (-3 + 2) / 2),
    # Scales 2^(floor(log2 7.5) - 2) = 1 and 2^-3; the largest element is 6, and 0.25 is halfway to nothing.
    "mxfp4": (
        [[7.5, -6, 0.25, *[1] * 29, 0.75, *[0.5] * 31]], [[6, -6, 0, *[1] * 29, 0.75, *[0.5] * 31]], (1, 1, 3),
        (32 * 0 + 32 * -3) / 64,
    ),
    # 2688 / (6 * 448) = 1 for the tensor; for the blocks 448 and 2^-3, of amaxes 2688 and 0.75.
    "nvfp4": ([[2688, *[100] * 15, 0.75, *[0.02] * 15]], [[2688, *[0] * 15, 0.75, *[0] * 15]], (0, 30, 2),
              (np.log2(448) - 3) / 2),
}  # fmt: skip


@pytest.mark.parametrize("name", CRAFTED)
@pytest.mark.parametrize("role", ["activation", "gradient"])
def test_an_operands_signals_are_those_worked_out_by_hand(name: str, role: Role) -> None:
    x, q, (clipped, flushed, at_maximum), exponent = CRAFTED[name]
    flat_x, flat_q = ([value for row in rows for value in row] for rows in (x, q))
    found = of(rounded(tensor(x), precision_of(name, output="fp32"), role, 0))
    assert found["clipped"] == pytest.approx(clipped / len(flat_x))
    assert found["flushed"] == pytest.approx(flushed / np.count_nonzero(flat_x))
    assert found["at_maximum"] == pytest.approx(at_maximum / len(flat_x))
    assert found["quantization_error"] == pytest.approx(error(flat_x, flat_q), rel=1e-5, abs=1e-9)
    assert found["scale"] == pytest.approx(exponent, abs=1e-6)


@pytest.mark.parametrize("name", ["e4m3fn@tensor", "int8@row", "e4m3fn@block16", "e4m3fn@tile8x8", "e5m2@tensor"])
def test_a_scale_of_the_tensors_own_clips_nothing_and_its_largest_is_at_the_maximum(name: str) -> None:
    """Whichever way the FP32 scale is rounded: its amax times a little more or less."""
    for seed in range(20):
        x = torch.randn(1, 24, 32, generator=torch.Generator().manual_seed(seed)) * 1.1**seed
        found = of(rounded(x, precision_of(name, output="fp32"), "activation", 0))
        assert found["clipped"] == 0
        assert found["at_maximum"] >= 1 / x.numel()


def test_a_delayed_scale_clips_what_outgrew_it() -> None:
    """The scale is given, 2; the largest is 896."""
    precision = precision_of("e4m3fn@tensor", output="fp32", delayed=4)._replace(scales=torch.tensor([[2.0, 1, 1]]))
    found = of(rounded(tensor([[1000, 896, -897, 1]]), precision, "activation", 0))
    assert (found["clipped"], found["at_maximum"], found["scale"]) == (0.5, 0.75, 1)


def test_two_sided_limits_of_twos_complement() -> None:
    """-128 is there and 128 is not."""
    found = of(rounded(tensor([[-128, 127, 128, -128.5]]), precision_of("int8", output="fp32"), "activation", 0))
    assert (found["clipped"], found["at_maximum"]) == (0.5, 1)


def test_what_is_zero_is_not_flushed_and_has_no_error() -> None:
    for name in ("e4m3fn", "e4m3fn@tensor", "nvfp4"):
        found = of(rounded(torch.zeros(1, 4, 16), precision_of(name), "activation", 0))
        assert set(found.values()) == {0.0}, name


def test_small_gradients_have_an_error() -> None:
    """Squares of 1e-30 are nothing in FP32."""
    r = Rounded(tensor([[1e-30, 2e-30]]), tensor([[1e-30, 1e-30]]), torch.ones(1, 1, 1), None, torch.ones(1, 1, 1))
    assert of(r)["quantization_error"] == pytest.approx(np.sqrt(1 / 5), rel=1e-6)


def test_what_is_not_finite_counts_as_it_is() -> None:
    found = of(rounded(tensor([[np.inf, np.nan, 1, 0]]), precision_of("e4m3fn"), "activation", 0))
    assert (found["clipped"], found["flushed"]) == (0.25, 0)
    assert np.isnan(found["quantization_error"])


@pytest.mark.parametrize("recipe", ["native-fp32", "native-fp64"])
def test_what_is_not_rounded_has_no_signals(recipe: str, text: Text) -> None:
    pack = Pack(make_program(recipe, signals_every=1), make_slots([recipe]), text, CPU)
    pack.step()
    assert all(pack.signals.values[name].isnan().all() for name in OF_OPERANDS)
    assert pack.signals.values["kurtosis"][0, :, 1:].isfinite().all()


def test_native_fp16_gradients_flush_and_a_loss_scale_helps(text: Text) -> None:
    """Of the first MLP's input: queries and keys of a first token have a gradient of zero, and processors round that to
    different nothings."""
    shares = []
    for scale in (2.0**-14, 2.0**6):
        slots = [dataclasses.replace(slot, loss_scale=scale) for slot in make_slots(["native-fp16"])]
        pack = Pack(make_program("native-fp16", signals_every=1), slots, text, CPU)
        pack.step()
        shares.append(float(pack.signals.values["flushed"][0, 0, 2, 2]))
    assert shares[0] > 0.1, shares
    assert shares[1] == 0


WEIGHTS = ["e4m3", "native-bf16", "fp8-hybrid", "fp8-hybrid-row", "fp8-hybrid-delayed", "deepseek", "mxfp8", "nvfp4-nearest",
           "int8", "ms-amp-o1", "mxfp4", "nvfp4-all", "stochastic-e4m3", "int8-switchback"]  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTS)
def test_no_operand_of_a_step_is_beyond_its_limit(name: str, text: Text) -> None:
    """Of every layer and role: limits and scales lie where the operand's values do."""
    recipe = resolve(name)
    pack = Pack(make_program(name, signals_every=2, state=recipe.state), make_slots([name] * 2), text, CPU)
    looked = spy_on(pack)
    for _ in range(3):
        pack.step()
    assert len(looked) == 2 * 3 * (4 * SHAPE.layers + 1)
    for r in looked:
        assert (r.q.abs() <= r.edge).all()
        within = r.x.abs() <= r.edge
        assert ((r.q - r.x).abs() <= 0.5 * r.limit)[within].all()


@pytest.mark.parametrize("name", ["stochastic-e4m3", "fp8-hybrid-delayed", "nvfp4-all", "mxfp8"])
def test_what_is_looked_at_is_what_training_multiplies_by(
    name: str, text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of one sequence, so that scales are of the same tensors: x, W and dy of every block as a step's products take them,
    with its scales and random bits. Sums have another order, so that a few elements round otherwise.
    """
    pack = Pack(
        make_program(name, sequences=1, signals_every=2, state=resolve(name).state), make_slots([name]), text, CPU
    )
    for _ in range(2):
        pack.step()
    looked, weights = spy_on(pack), {}
    for matrix in filter(is_matrix, pack.operands):
        plan, operand = place_of(matrix, pack.numerics).plan, detached(pack.operands[matrix])
        assert plan is not None
        assert not isinstance(operand, Tensor)
        factored = Factored(operand.forward, operand.forward_factor)
        weights[matrix] = products.whole(factored, plan.forward.chunk, -2).clone()  # updated in place
    taken: dict[int, list[Tensor]] = {}
    real, gradients = products.take, pack.gradients

    def take(x: Tensor, plan: Any, axis: int, chunk: int, *rest: Any) -> Any:
        factored = real(x, plan, axis, chunk, *rest)
        taken.setdefault(plan.number, []).append(products.whole(factored, chunk, axis))
        return factored

    def from_here(*arguments: Any) -> Any:
        taken.clear()
        return gradients(*arguments)

    monkeypatch.setattr(products, "take", take)
    monkeypatch.setattr(pack, "gradients", from_here)
    pack.step()
    monkeypatch.undo()
    layers = 4 * SHAPE.layers
    forward, backward = taken[0][:layers], taken[2][-layers:][::-1]
    for i, matrix in enumerate(signal_pass.tensor_names(SHAPE)[:layers]):
        for role, expected in enumerate((forward[i], weights[matrix], backward[i])):
            same = torch.isclose(looked[3 * i + role].q, expected, rtol=1e-6, atol=0).float().mean()
            assert same > (0.9 if role != 1 else 0.9999), (matrix, role)


@pytest.mark.parametrize("name", ["fp8-hybrid", "mxfp8", "nvfp4-nearest", "int8"])
def test_a_weight_is_looked_at_as_its_products_take_it(name: str, text: Text) -> None:
    """`quantize_scaled` stores and reads again in one number what the products have in two factors."""
    pack = Pack(make_program(name), make_slots([name] * 2), text, CPU)
    for matrix in filter(is_matrix, pack.parameters):
        w, precision = pack.parameters[matrix].detach(), place_of(matrix, pack.numerics)
        operand = detached(pack.operands[matrix])
        r = rounded_weight(w, operand, precision, head=False)
        assert r is not None
        assert precision.plan is not None
        assert torch.equal(r.x, w)
        assert torch.equal(r.q, quantize_scaled(w, precision.plan.forward.second.name, -2, batch_dims=1))


def test_the_head_is_looked_at_without_its_padding(text: Text) -> None:
    """Fifty rows of 64, in its signals and in the logits: padding would add 14 logits of zero."""
    shape = dataclasses.replace(SHAPE, vocabulary=50)
    for name in ("e4m3", "ms-amp-o1"):
        program = make_program(name, shape=shape, signals_every=1, state=resolve(name).state)
        pack = Pack(program, make_slots([name]), text, CPU)
        precision = pack.numerics.lm_head
        r = rounded_weight(pack.parameters["wte"].detach(), detached(pack.operands["wte"]), precision, head=True)
        assert r is not None
        assert r.x.shape == r.q.shape == (1, 50, SHAPE.width)
        tokens = batch(pack.text, pack.offsets[0], SHAPE.context)[0][:, None, : SHAPE.context]
        expected = forward(pack.parameters, tokens, shape, pack.numerics).detach().logsumexp(-1).mean()
        pack.step()
        assert float(pack.signals.values["logsumexp_mean"][0, 0]) == pytest.approx(float(expected), abs=2e-3)


@pytest.mark.parametrize("name", ["e4m3fn@row", "e4m3fn@block4", "e4m3fn@tile4x4", "e4m3fn@block8:e8m0fnu"])
def test_the_heads_scales_lie_along_the_width(name: str, text: Text) -> None:
    """Its matrix lies [V, D], and D is what the logits' product contracts; with rows that pad the vocabulary, and are cut off."""
    recipe = resolve_recipe("mine", {"mine": RecipeTable(name, name, name)})
    shape = dataclasses.replace(SHAPE, vocabulary=50)
    program = dataclasses.replace(make_program(shape=shape), structure=recipe.structure)
    pack = Pack(program, [Slot(recipe, 1e-3, 1, 1)], text, CPU)
    w = pack.parameters["wte"].detach() * torch.logspace(-3, 3, 50)[:, None]
    operand = head_operand(w, pack.numerics.lm_head)
    r = rounded_weight(w, operand, pack.numerics.lm_head, head=True)
    assert r is not None
    expected = quantize_scaled(w, name, -1, batch_dims=1)
    torch.testing.assert_close(r.q, expected, rtol=1e-6, atol=0)
    assert ((r.q - r.x).abs() <= r.limit / 7).all(), "half a step, or what MX clips, 1/8"
    at_limit = (r.q.abs() == r.limit).float()
    assert 0 < float(at_limit.mean()) < 1
    assert r.scale is not None
    of_rows = r.scale.expand_as(r.x)
    assert len(of_rows.unique()) > 6, "the rows differ by powers of ten"


@pytest.mark.parametrize(
    ("name", "product"),
    [("mxfp4", ("wgrad", "dgrad", "dgrad")), ("int8-switchback", ("forward", "forward", "dgrad")),
     ("nvfp4-all", ("forward", "forward", "dgrad")), ("stochastic-e4m3", ("forward", "forward", "dgrad"))],
)  # fmt: skip
def test_of_two_products_the_first_with_scales_is_looked_at(name: str, product: tuple[str, str, str]) -> None:
    precision = make_numerics([resolve(name)], SHAPE, CPU, quantize, False).body
    for role, expected in zip(ROLES, product, strict=True):
        choice = chosen(precision, role)
        plan = getattr(precision.plan, expected)
        assert choice.rule == plan[OPERANDS[expected].index(role)]  # type: ignore[index]
        assert choice.axis == {"forward": (-1, -2), "dgrad": (-1, -1), "wgrad": (-2, -2)}[expected][
            OPERANDS[expected].index(role)  # type: ignore[index]
        ]  # fmt: skip


def test_kurtosis_of_two_valued_tokens() -> None:
    """Of a share p at one value and the rest at another it is (1 - 3 p (1 - p)) / (p (1 - p)), whatever the values."""
    half, eighth = torch.tensor([1.0, -1] * 8), torch.tensor([1.0, *[0] * 7] * 2)
    x = torch.stack([torch.stack([half, eighth]), torch.stack([1e15 * half + 3e15, half])])
    look = Look(Seen(streams=[x, x.flip(0)]), torch.zeros(()), 1.0)
    of_eighth = (1 - 3 * 7 / 64) / (7 / 64)
    expected = np.array([[(1 + of_eighth) / 2, 1], [1, (1 + of_eighth) / 2]])
    np.testing.assert_allclose(signals.kurtosis(look).numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("at_once", [1, 2**25])
def test_the_largest_attention_logit_is_of_no_future_key(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "SCORES_AT_ONCE", at_once)
    rng = np.random.default_rng(3)
    q, k = rng.normal(size=(2, 2, 1, 3, 5, 4))
    k[0, 0, 1, 4] = 1e6  # seen by the last query alone
    q[0, 0, 1, 4] = 1e-6
    look = Look(Seen(queries=[torch.from_numpy(q)], keys=[torch.from_numpy(k)]), torch.zeros(()), 0.5)
    expected = [
        max(abs(float(q[r, 0, h, t] @ k[r, 0, h, s])) * 0.5 for h in range(3) for t in range(5) for s in range(t + 1))
        for r in range(2)
    ]
    np.testing.assert_allclose(signals.attention_logit(look)[:, 0].numpy(), expected, rtol=1e-12)


def test_logsumexp_is_of_the_logits() -> None:
    z = np.random.default_rng(4).normal(size=(2, 7, 11)) * 30
    look = Look(Seen(), torch.from_numpy(z), 1.0)
    expected = np.log(np.exp(z).sum(-1))
    np.testing.assert_allclose(signals.logsumexp_mean(look).numpy(), expected.mean(1), rtol=1e-12)
    np.testing.assert_allclose(signals.logsumexp_max(look).numpy(), expected.max(1), rtol=1e-12)


@pytest.mark.parametrize("loss_scale", [1.0, 64.0])
def test_what_is_seen_is_the_plain_models_with_the_gradients_of_the_whole_batchs_loss(
    text: Text, loss_scale: float
) -> None:
    """By hooks on `test_pack`'s model, which shares nothing with ours, trained on all four sequences in FP64."""
    recipe = resolve_recipe("wide", {"wide": RecipeTable("fp32", "fp32", "fp32", output="fp32")})
    program = dataclasses.replace(make_program("fp32", signals_every=1), structure=recipe.structure)
    pack = Pack(program, [Slot(recipe, 1e-3, 1, 2, loss_scale), Slot(recipe, 1e-3, 3, 4, loss_scale)], text, CPU)
    looked = spy_on(pack)
    tokens, targets = batch(pack.text, pack.offsets[0], SHAPE.context)
    pack.step()

    model = PlainGPT().double()
    model.load(initial_weights(SHAPE, 3))
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    streams: list[Tensor] = []

    def keep(module: nn.Module, arguments: Any, y: Tensor) -> None:
        y.retain_grad()
        inputs.append(arguments[0])
        outputs.append(y)

    for block in model.blocks:
        for part in (block.qkv, block.attn_proj, block.fc, block.mlp_proj):
            assert isinstance(part, nn.Module)
            part.register_forward_hook(keep)
        block.register_forward_hook(lambda *a: streams.append(a[2]))
    model.ln_f.register_forward_hook(lambda *a: inputs.append(a[2]))
    logits = model(tokens[1].view(4, -1))
    logits.retain_grad()
    outputs.append(logits)
    (loss_scale * nn.functional.cross_entropy(logits.flatten(0, 1), targets[1])).backward()

    assert len(looked) == 3 * len(outputs) == 3 * 9
    for i, (x, y) in enumerate(zip(inputs, outputs, strict=True)):
        assert y.grad is not None
        for mine, theirs in ((looked[3 * i].x, x), (looked[3 * i + 2].x, y.grad)):
            expected = theirs[0].detach()
            assert float((mine[1].double() - expected).abs().max()) < 1e-4 * float(expected.abs().max())
    values = pack.signals.values
    z = logits[0].detach().numpy()
    np.testing.assert_allclose(values["logsumexp_mean"][0, 1], np.log(np.exp(z).sum(-1)).mean(), rtol=1e-5)
    stream = streams[1][0].detach().numpy()
    centred = stream - stream.mean(-1, keepdims=True)
    fourth = (centred**4).mean(-1) / (centred**2).mean(-1) ** 2
    np.testing.assert_allclose(values["kurtosis"][0, 1, 2], fourth.mean(), rtol=1e-4)


@pytest.mark.parametrize("optimizer", [None, Muon()])
def test_update_rms_and_norms_of_blocks_are_those_of_a_plain_loop(text: Text, optimizer: Muon | None) -> None:
    program = make_program("native-fp64", signals_every=2, **({"optimizer": optimizer} if optimizer else {}))
    pack = Pack(program, make_slots(["native-fp64"] * 2, 2e-2), text, CPU)
    second = {name: np.zeros(p.shape) for name, p in pack.parameters.items()}
    groups = [[n for n in second if not n.startswith("h.")], *([n for n in second if f"h.{i}." in n] for i in (0, 1))]
    for t in range(1, 6):
        tokens, targets = batch(pack.text, pack.offsets[t - 1], SHAPE.context)
        parts_of = pack.gradients(tokens, targets)[1]
        g = {name: np.sum([part.numpy() for part in parts], 0) for name, parts in parts_of.items()}
        pack.step()
        norms = np.array([[np.sqrt(sum(np.sum(g[n][r] ** 2) for n in group)) for group in groups] for r in (0, 1)])
        np.testing.assert_allclose(pack.grad_norm_block[t - 1], norms, rtol=1e-6)
        whole = np.sqrt((norms**2).sum(1))
        np.testing.assert_allclose(pack.grad_norm[t - 1], whole, rtol=1e-6)
        clip = np.minimum(1, 1 / (whole + 1e-6))
        expected = np.full((2, 3), np.nan)
        for b, group in enumerate(groups):
            for r in (0, 1):
                ratios = []
                for n in group:
                    if optimizer and is_matrix(n):
                        continue
                    clipped = g[n][r] * clip[r]
                    second[n][r] = 0.95 * second[n][r] + 0.05 * clipped**2
                    v = second[n][r] / (1 - 0.95**t)
                    ratios.append((clipped**2 / np.maximum(v, 1e-16)).ravel())
                expected[r, b] = np.sqrt(np.concatenate(ratios).mean())
        if t % 2:
            np.testing.assert_allclose(pack.signals.values["update_rms"][t // 2], expected, rtol=1e-5)
    assert np.any(clip < 1), "clipping must be seen"


def test_the_gradient_ratio_by_hand() -> None:
    norms = np.array([[2.0, 4, 3, 1], [1, np.inf, 3, np.nan], [np.nan, 1, 1, 5]])
    expected = [[np.nan, 2, 1, 1 / 3], [np.nan, np.inf, 3, np.nan], [np.nan, np.nan, 1, 5]]
    np.testing.assert_allclose(norm_to_mean(norms), expected, rtol=1e-6)
    assert norm_to_mean(norms).dtype == np.float32
    np.testing.assert_allclose(norm_to_mean(np.stack([norms, norms], 2))[..., 1], expected, rtol=1e-6)


def test_layers_are_in_their_order(text: Text) -> None:
    names = signal_pass.tensor_names(SHAPE)
    assert names[:4] == ["h.0.attn.qkv", "h.0.attn.proj", "h.0.mlp.fc", "h.0.mlp.proj"]
    assert names[-1] == LM_HEAD
    assert len(names) == 9
