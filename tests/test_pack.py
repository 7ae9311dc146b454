"""The engine against a plain model, and a run against itself: in another slot, beside a wild neighbour, in another process.

The plain model below is written from GPT-2's description with nn.Module and torch.optim.AdamW, for one run, and shares
nothing with `train` but the initial weights and the batches.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from landscape import logit_sharpness
from tests.small import SHAPE, make_program, make_slots, resolve
from train.model import Numerics, cross_entropy, forward
from train.pack import Pack, train_pack
from train.program import Probe, Slot
from train.seeds import batch_offsets, initial_weights
from train.step import batch
from train.text import Text

CPU = torch.device("cpu")


class PlainBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1 = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_proj = nn.Linear(width, width, bias=False)
        self.ln_2 = nn.LayerNorm(width, bias=False)
        self.fc = nn.Linear(width, 4 * width, bias=False)
        self.mlp_proj = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(self.ln_1(x)).split(d, dim=2)
        q, k, v = (z.view(n, t, self.heads, d // self.heads).transpose(1, 2) for z in (q, k, v))
        scores = (q @ k.transpose(2, 3)) * (1.0 / math.sqrt(d // self.heads))
        mask = torch.tril(torch.ones(t, t, dtype=torch.bool))
        weights = torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1)
        x = x + self.attn_proj((weights @ v).transpose(1, 2).reshape(n, t, d))
        y: Tensor = x + self.mlp_proj(nn.functional.gelu(self.fc(self.ln_2(x))))
        return y


class PlainGPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(SHAPE.vocabulary, SHAPE.width)
        self.wpe = nn.Embedding(SHAPE.context, SHAPE.width)
        self.blocks = nn.ModuleList(PlainBlock(SHAPE.width, SHAPE.heads) for _ in range(SHAPE.layers))
        self.ln_f = nn.LayerNorm(SHAPE.width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.ln_f(x) @ self.wte.weight.T
        return logits

    def load(self, weights: dict[str, np.ndarray]) -> None:
        names = {"wte.weight": "wte", "wpe.weight": "wpe", "ln_f.weight": "ln_f"}
        for i in range(SHAPE.layers):
            for ours, theirs in {
                "ln_1": "ln_1", "attn.qkv": "qkv", "attn.proj": "attn_proj",
                "ln_2": "ln_2", "mlp.fc": "fc", "mlp.proj": "mlp_proj",
            }.items():  # fmt: skip
                names[f"blocks.{i}.{theirs}.weight"] = f"h.{i}.{ours}"
        state = {}
        for theirs, ours in names.items():
            value = torch.from_numpy(weights[ours]).double()
            state[theirs] = value.T if "attn" in ours or "mlp" in ours else value  # nn.Linear keeps [outputs, inputs]
        self.load_state_dict(state)


def plain_run(
    text: Text, steps: int, rate: float, init_seed: int, data_seed: int
) -> tuple[list[float], list[float], PlainGPT]:
    """Losses, gradient norms and weights of one run by nn.Module, torch.optim.AdamW and clip_grad_norm_, in FP64."""
    model = PlainGPT().double()
    model.load(initial_weights(SHAPE, init_seed))
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    gains = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), eps=1e-8)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 5, total_iters=4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps - 1 - 5, eta_min=rate / 10)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], milestones=[5])
    offsets = batch_offsets(data_seed, steps, 4, text.train.size - SHAPE.context)
    losses, norms = [], []
    for step in range(steps):
        windows = np.stack([text.train[o : o + SHAPE.context + 1] for o in offsets[step]]).astype(np.int64)
        tokens, targets = torch.from_numpy(windows[:, :-1]), torch.from_numpy(windows[:, 1:])
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses, norms, model


def test_one_run_of_a_pack_is_the_plain_model_in_fp64(text: Text) -> None:
    slots = make_slots(["native-fp64"] * 3, [1e-3, 2e-2, 5e-3])
    pack = Pack(make_program("native-fp64"), slots, text, CPU)
    ours = []
    for _ in range(20):
        ours.append(cross_entropy_of_next_batch(pack)[1])
        pack.step()
    losses, norms, model = plain_run(text, 20, slots[1].learning_rate, slots[1].init_seed, slots[1].data_seed)
    assert max(norms) > 1.0 > min(norms), "clipping must be seen both acting and not"
    np.testing.assert_allclose(ours, losses, rtol=0, atol=1e-10)
    np.testing.assert_allclose(pack.train_loss[:, 1].numpy(), losses, rtol=2e-7)  # histories are FP32
    np.testing.assert_allclose(pack.grad_norm[:, 1].numpy(), norms, rtol=2e-7)
    weight = model.get_parameter("blocks.1.mlp_proj.weight")
    np.testing.assert_allclose(
        pack.parameters["h.1.mlp.proj"][1].detach().numpy(), weight.T.detach().numpy(), rtol=0, atol=1e-10
    )
    np.testing.assert_allclose(
        pack.parameters["wte"][1].detach().numpy(), model.wte.weight.detach().numpy(), rtol=0, atol=1e-10
    )


def cross_entropy_of_next_batch(pack: Pack) -> list[float]:
    """The losses that the next step will see, in the pack's own dtype."""
    offsets = pack.offsets[int(pack.counter)]
    tokens, targets = batch(pack.text, offsets, SHAPE.context)
    with torch.no_grad():
        logits = forward(pack.parameters, by_sequence(tokens), SHAPE, pack.numerics)
        losses: list[float] = cross_entropy(logits, targets).tolist()
    return losses


def by_sequence(tokens_RS: Tensor) -> Tensor:
    return tokens_RS.view(tokens_RS.shape[0], -1, SHAPE.context)


def history(text: Text, device: torch.device, recipes: list[str], slot: int, wild: bool = False) -> bytes:
    """Losses, gradient norms, sharpness and final weights of the run "e4m3, seeds 99" put into a slot of a pack, as bytes."""
    slots = make_slots(recipes)
    slots[slot] = Slot(resolve("e4m3"), 4e-3, 99, 99)
    pack = Pack(make_program(), slots, text, device)
    if wild:
        with torch.no_grad():
            for p in pack.parameters.values():
                p[(slot + 1) % len(slots)] = torch.nan
    for _ in range(12):
        pack.step()
    parts = [pack.train_loss[:12, slot], pack.grad_norm[:12, slot], pack.sharpness()["logit_sharpness"][slot]]
    parts += [p[slot].detach() for p in pack.parameters.values()]
    if wild:
        assert not pack.train_loss[11, (slot + 1) % len(slots)].isfinite()
    assert all(part.isfinite().all() for part in parts)
    return b"".join(part.cpu().contiguous().numpy().tobytes() for part in parts)


NEIGHBOURS = ["e8m7", "e5m2", "e4m3", "e4m7"]


def test_a_run_has_the_same_bits_in_every_slot(text: Text, device: torch.device) -> None:
    bits = [history(text, device, NEIGHBOURS, slot) for slot in range(4)]
    assert bits[1:] == bits[:-1]


def test_a_run_has_the_same_bits_beside_other_formats(text: Text, device: torch.device) -> None:
    assert history(text, device, NEIGHBOURS, 2) == history(text, device, ["e8m1", "e3m2f", "e8m7", "e8m7"], 2)


def test_a_run_has_the_same_bits_beside_a_neighbour_driven_to_nan(text: Text, device: torch.device) -> None:
    assert history(text, device, NEIGHBOURS, 1, wild=True) == history(text, device, NEIGHBOURS, 1)


def test_a_run_has_the_same_bits_in_a_fresh_process(text: Text, device: torch.device, tmp_path: Path) -> None:
    """Of a machine on which nothing was compiled yet: what the compiler chooses, it chooses alike."""
    here = hashlib.sha256(history(text, device, NEIGHBOURS, 3)).hexdigest()
    (tmp_path / "text").write_bytes(pickle.dumps(text))
    code = (
        "import hashlib, pickle, sys, torch; from tests.test_pack import NEIGHBOURS, history; "
        "text = pickle.loads(open(sys.argv[1], 'rb').read()); "
        "print(hashlib.sha256(history(text, torch.device(sys.argv[2]), NEIGHBOURS, 3)).hexdigest())"
    )
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", code, str(tmp_path / "text"), device.type]
    clean = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")}
    there = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, env=clean)
    assert there.stdout.strip() == here


def test_slots_do_not_matter_where_two_threads_share_the_work(text: Text) -> None:
    """Tensors large enough for PyTorch to split them among threads, at other places for every slot."""
    shape = dataclasses.replace(SHAPE, width=64, context=64)
    run = Slot(resolve("e4m3"), 4e-3, 99, 99)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        losses = []
        for slot in (0, 1, 2):
            slots = make_slots(["e8m7", "e5m2", "e4m7"])
            slots[slot] = run
            pack = Pack(make_program(shape=shape, sequences=8), slots, text, CPU)
            for _ in range(3):
                pack.step()
            weights = torch.cat([p[slot].detach().flatten() for p in pack.parameters.values()])
            losses.append((pack.train_loss[:3, slot].tolist(), weights))
    finally:
        torch.set_num_threads(threads)
    for loss, weights in losses[1:]:
        assert loss == losses[0][0]
        assert torch.equal(weights, losses[0][1])


def test_a_run_that_reads_other_batches_has_other_bits(text: Text) -> None:
    """The comparisons above can fail: one other data seed shows."""
    slots = make_slots(["e4m3", "e4m3"])
    slots[1] = dataclasses.replace(slots[0], data_seed=slots[0].data_seed + 1)
    pack = Pack(make_program(), slots, text, CPU)
    pack.step()
    pack.step()
    assert pack.train_loss[1, 0] != pack.train_loss[1, 1]


def hessian_vector_product(loss: Tensor, weights: list[Tensor], vectors: list[Tensor]) -> list[Tensor]:
    grads = torch.autograd.grad(loss, weights, create_graph=True)
    inner = sum((g * v).sum() for g, v in zip(grads, vectors, strict=True))
    assert isinstance(inner, Tensor)
    return list(torch.autograd.grad(inner, weights))


def test_the_hessian_vector_product_is_plain_autograds(text: Text) -> None:
    """With quantisers off, in FP64, through the same linear layers (DESIGN.md 9)."""
    slots = make_slots(["native-fp64"] * 2)
    pack = Pack(make_program("native-fp64"), slots, text, CPU)
    names = ["wte", "h.0.attn.qkv", "h.1.mlp.fc"]
    generator = torch.Generator().manual_seed(3)
    vectors = [torch.randn(pack.parameters[n].shape, generator=generator, dtype=torch.float64) for n in names]
    tokens, targets = pack.held_out[0]
    losses = cross_entropy(forward(pack.parameters, by_sequence(tokens), SHAPE, pack.numerics), targets)
    ours = hessian_vector_product(losses.sum(), [pack.parameters[n] for n in names], vectors)

    model = PlainGPT().double()
    model.load(initial_weights(SHAPE, slots[1].init_seed))
    weights = [model.get_parameter(n) for n in ("wte.weight", "blocks.0.qkv.weight", "blocks.1.fc.weight")]
    loss = nn.functional.cross_entropy(model(by_sequence(tokens)[1]).flatten(0, 1), targets[1])
    flipped = [vectors[0][1], vectors[1][1].T, vectors[2][1].T]
    plain = hessian_vector_product(loss, weights, flipped)  # type: ignore[arg-type]
    for mine, theirs, turn in zip(ours, plain, (False, True, True), strict=True):
        expected = theirs.T if turn else theirs
        assert float((mine[1] - expected).abs().max()) < 1e-12 * max(1.0, float(expected.abs().max()))


def test_the_hessian_vector_product_through_quantisers_is_that_of_the_surrogate(text: Text) -> None:
    """Straight-through means: with operands that are on the grid already, rounding changes no derivative of any order.

    fp32's own format rounds nothing, so the product through real quantisers must be that of the native FP32 model; an
    autograd function that saved its rounded copies for backward would be off by tens of percent.
    """
    products = []
    for recipe in ("fp32", "native-fp32"):
        pack = Pack(make_program(recipe), make_slots([recipe]), text, CPU)
        wide = pack.numerics.body._replace(structure=dataclasses.replace(pack.numerics.body.structure, output="fp32"))
        numerics = Numerics(wide, wide, "math")
        tokens, targets = pack.held_out[0]
        losses = cross_entropy(forward(pack.parameters, by_sequence(tokens), SHAPE, numerics), targets)
        weights = [pack.parameters["h.0.attn.qkv"], pack.parameters["h.1.mlp.fc"]]
        vectors = [torch.randn(w.shape, generator=torch.Generator().manual_seed(5)) for w in weights]
        products.append(hessian_vector_product(losses.sum(), weights, vectors))
    for quantised, native in zip(*products, strict=True):
        assert float(native.abs().max()) > 1e-3
        torch.testing.assert_close(quantised, native, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("positions", "chosen"), [("all", slice(None)), ("last", slice(-1, None))])
def test_sharpness_is_the_mean_over_the_positions_that_the_probe_names(
    text: Text, positions: str, chosen: slice
) -> None:
    program = make_program(probe=Probe(every=10, positions=positions))
    pack = Pack(program, make_slots(["e4m3"] * 2), text, CPU)
    pack.step()
    logits = pack.logits().view(2, program.sequences, SHAPE.context, SHAPE.vocabulary)[:, :, chosen]
    targets = pack.held_out[0][1].view(2, program.sequences, SHAPE.context)[:, :, chosen]
    for column, epsilon in enumerate(program.probe.epsilons):
        for run in range(2):
            expected = logit_sharpness(logits[run].double(), targets[run], epsilon).mean()
            assert float(pack.sharpness()["logit_sharpness"][run, column]) == pytest.approx(float(expected), rel=1e-5)


def test_fused_and_mathematical_attention_agree(text: Text) -> None:
    pack = Pack(make_program("native-fp32"), make_slots(["native-fp32"] * 2), text, CPU)
    fused = forward(pack.parameters, by_sequence(pack.held_out[0][0]), SHAPE, pack.numerics)
    written_out = forward(
        pack.parameters, by_sequence(pack.held_out[0][0]), SHAPE, pack.numerics._replace(attention="math")
    )
    torch.testing.assert_close(fused, written_out, rtol=0, atol=2e-3)  # outputs are rounded to BF16: 2^-8 of about 0.1


def test_e8m7_is_bf16_operands_bit_for_bit(text: Text, device: torch.device) -> None:
    """Simulated e8m7, nearest even, against the hardware's own BF16 operands with the same output: a whole training run."""
    results = []
    for recipe in ("e8m7", "native-bf16"):
        slots = make_slots([recipe] * 2)
        results.append(train_pack(make_program(recipe), slots, text, device, compiled=False))
    simulated, native = results
    assert simulated.train_loss[-1].max() < simulated.train_loss[0].min()
    np.testing.assert_array_equal(simulated.train_loss, native.train_loss)
    np.testing.assert_array_equal(simulated.grad_norm, native.grad_norm)
    np.testing.assert_array_equal(simulated.validation_loss, native.validation_loss)


@pytest.mark.cuda
@pytest.mark.parametrize("recipe", ["e4m3", "hybrid", "tf32"])
def test_a_compiled_pack_follows_the_eager_one(text: Text, cuda: torch.device, recipe: str) -> None:
    """Fusion reorders sums, so not the same bits: the losses of 20 steps agree to a few BF16 roundings."""
    slots = make_slots([recipe] * 4)
    eager = train_pack(make_program(recipe), slots, text, cuda, compiled=False)
    compiled = train_pack(make_program(recipe), slots, text, cuda, compiled=True)
    np.testing.assert_allclose(compiled.train_loss, eager.train_loss, rtol=0, atol=0.02)


@pytest.mark.cuda
def test_packs_of_one_program_compile_it_once(text: Text, cuda: torch.device) -> None:
    graphs = torch._dynamo.utils.counters["stats"]
    for recipes in (["e4m3", "e8m7"], ["e5m2", "e4m7"]):
        before = graphs["unique_graphs"]
        train_pack(make_program(), make_slots(recipes), text, cuda, compiled=True)
    assert graphs["unique_graphs"] == before > 0


def test_a_training_run_learns(text: Text, device: torch.device) -> None:
    program = make_program("e8m7", steps=150, warmup=10)
    result = train_pack(program, make_slots(["e8m7", "e8m3"], 1e-2), text, device)
    assert (result.validation_loss[0] > 3.3).all(), "untrained: log 32 = 3.47"
    assert (result.validation_loss[-1] < 1.6).all(), "the text's own entropy is about 0.95 nats"
    assert result.sharpness["logit_sharpness"].shape == (len(program.probe_steps), 2, 2)
