"""Every option of the model against a plain one: a Llama of torch's own modules, written from the papers for one run.

It shares nothing with `train` but initial weights and batches: RMSNorm and SiLU are torch's, RoPE is a multiplication of complex
numbers, grouped queries are attention's own `enable_gqa`, muP is per-parameter settings of torch's AdamW. `test_pack` does the
same for GPT-2, `test_layers` and `test_step` hold training's form to `model.forward`.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.small import OPTIONS, SHAPE, SHAPES, make_program, make_slots
from train import Study, model, open_study, run_study
from train.model import ModelShape, forward, objective
from train.pack import Pack
from train.seeds import batch_offsets, initial_weights
from train.text import Text

CPU = torch.device("cpu")


def matrix(w: Tensor) -> nn.Linear:
    """The linear layer of a weight [inputs, outputs], which torch keeps the other way round."""
    layer = nn.Linear(w.shape[0], w.shape[1], bias=False, dtype=torch.float64)
    layer.weight = nn.Parameter(w.T.contiguous())
    return layer


def rms_norm(features: int) -> nn.RMSNorm:
    return nn.RMSNorm(features, eps=1e-5, dtype=torch.float64)


class PlainBlock(nn.Module):
    """One layer; options as in OLMo 2 (QK-norm before RoPE) and muP (the scale of attention)."""

    def __init__(self, shape: ModelShape, w: dict[str, Tensor]) -> None:
        super().__init__()
        self.d, self.rope_base, self.scale = shape.head_size, shape.rope_base, 1 / math.sqrt(shape.head_size)
        if shape.mup_base_width:
            d_base = shape.mup_base_width / (shape.mup_base_heads or shape.heads)
            self.scale = math.sqrt(d_base) / self.d
        kv = (shape.kv_heads or shape.heads) * self.d
        self.q, self.k, self.v = (matrix(part) for part in w["attn.qkv"].split([shape.width, kv, kv], 1))
        self.gate, self.up = (matrix(part) for part in w["mlp.fc"].chunk(2, 1))
        self.o, self.down = matrix(w["attn.proj"]), matrix(w["mlp.proj"])
        self.norm_1, self.norm_2 = rms_norm(shape.width), rms_norm(shape.width)
        self.norm_q, self.norm_k = (rms_norm(self.d) if shape.qk_norm else nn.Identity() for _ in range(2))

    def turned(self, x_NTHd: Tensor) -> Tensor:
        """Features i and i + d/2 as a complex number, times e^(i t base^(-2i/d))."""
        T, half = x_NTHd.shape[1], self.d // 2
        angle = torch.tensor(
            [[t * self.rope_base ** (-2 * i / self.d) for i in range(half)] for t in range(T)], dtype=torch.float64
        )
        z = torch.complex(x_NTHd[..., :half], x_NTHd[..., half:]) * torch.exp(1j * angle)[:, None]
        return torch.cat([z.real, z.imag], -1)

    def forward(self, x: Tensor) -> Tensor:
        N, T, _ = x.shape
        a = self.norm_1(x)
        q, k, v = (layer(a).view(N, T, -1, self.d) for layer in (self.q, self.k, self.v))
        q, k = (self.turned(y).transpose(1, 2) for y in (self.norm_q(q), self.norm_k(k)))
        y = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True, scale=self.scale, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        a = self.norm_2(x)
        out: Tensor = x + self.down(F.silu(self.gate(a)) * self.up(a))
        return out


class PlainLlama(nn.Module):
    """One run, FP64, [N, T] -> [N, T, V]; with Gemma 2's cap on logits and muP's factor."""

    def __init__(self, shape: ModelShape, weights: dict[str, np.ndarray]) -> None:
        super().__init__()
        w = {name: torch.from_numpy(value).double() for name, value in weights.items()}
        self.cap, self.m = shape.logit_softcap, shape.width / (shape.mup_base_width or shape.width)
        self.embed = nn.Embedding.from_pretrained(w["wte"], freeze=False)
        self.lm_head = matrix(w["wte" if shape.tied else "lm_head"].T)
        if shape.tied:
            self.lm_head.weight = self.embed.weight
        layers = [f"h.{i}." for i in range(shape.layers)]
        self.blocks = nn.ModuleList(
            PlainBlock(shape, {k.removeprefix(h): v for k, v in w.items() if k.startswith(h)}) for h in layers
        )
        self.norm = rms_norm(shape.width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        z: Tensor = self.lm_head(self.norm(x)) / self.m
        return z if self.cap is None else self.cap * torch.tanh(z / self.cap)


LLAMAS = ["llama", "llama, tied", "llama, grouped", "llama, one key", "llama, qk_norm", "llama, mup", "everything"]


def llama(name: str) -> ModelShape:
    shape = SHAPES[name.split(",")[0]]
    others: dict[str, dict[str, Any]] = {"tied": {"tied": True}, "one key": {"heads": 4, "kv_heads": 1}}
    return dataclasses.replace(shape, **(OPTIONS | others)[name.split(", ")[-1]])


@pytest.mark.parametrize("name", LLAMAS)
def test_the_model_is_torchs_own_modules_in_fp64(text: Text, name: str) -> None:
    shape = llama(name)
    slots = make_slots(["native-fp64"] * 3)
    pack = Pack(make_program("native-fp64", shape=shape), slots, text, CPU)
    tokens = pack.held_out[0][0].view(3, -1, shape.context)
    ours = forward(pack.parameters, tokens, shape, pack.numerics)
    for run, slot in enumerate(slots):
        plain = PlainLlama(shape, initial_weights(shape, slot.init_seed))(tokens[run]).flatten(0, 1)
        torch.testing.assert_close(ours[run], plain, rtol=0, atol=1e-12)
    assert float(ours.detach().std()) > 0.1, "logits near zero would agree whatever was computed"


@pytest.mark.parametrize("name", ["llama", "llama, mup", "everything"])
def test_a_run_is_trained_as_torch_trains_the_modules(text: Text, name: str) -> None:
    """20 steps in FP64: z-loss descended and not recorded, muP's rates and its weight decay, gradients clipped as one."""
    shape = llama(name)
    slot = make_slots(["native-fp64"] * 2, 2e-2)[1]
    pack = Pack(make_program("native-fp64", shape=shape, schedule="constant", warmup=0), [slot] * 2, text, CPU)
    plain = PlainLlama(shape, initial_weights(shape, slot.init_seed))
    groups = []
    for key, p in plain.named_parameters():
        hidden = key.startswith("blocks") and p.ndim == 2
        rate = 2e-2 / plain.m if hidden else 2e-2
        # torch multiplies the decay by the group's rate; muP leaves it at the whole rate (as mup's MuAdamW does).
        decay = 0.0 if p.ndim < 2 else 0.1 * (plain.m if hidden else 1.0)
        groups.append({"params": [p], "lr": rate, "weight_decay": decay})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    offsets = batch_offsets(slot.data_seed, 20, 4, text.train.size - shape.context)
    losses, norms = [], []
    for step in range(20):
        windows = np.stack([text.train[o : o + shape.context + 1] for o in offsets[step]]).astype(np.int64)
        logits = plain(torch.from_numpy(windows[:, :-1])).flatten(0, 1)
        loss = F.cross_entropy(logits, torch.from_numpy(windows[:, 1:]).flatten())
        optimizer.zero_grad()
        (loss + shape.z_loss * torch.logsumexp(logits, 1).square().mean()).backward()
        norms.append(float(nn.utils.clip_grad_norm_(plain.parameters(), 1.0)))
        optimizer.step()
        losses.append(loss.item())
        pack.step()
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(pack.train_loss[:, 1].numpy(), losses, rtol=2e-7)  # histories are FP32
    np.testing.assert_allclose(pack.grad_norm[:, 1].numpy(), norms, rtol=2e-7)
    weight = plain.get_parameter("blocks.1.down.weight").T.detach()
    torch.testing.assert_close(pack.parameters["h.1.mlp.proj"][1].detach(), weight, rtol=0, atol=1e-10)
    torch.testing.assert_close(pack.parameters["wte"][1].detach(), plain.embed.weight.detach(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_queries_are_full_attention_whose_keys_and_values_are_written_out(text: Text, kv_heads: int) -> None:
    """Each of them for 4 / K queries that follow each other."""
    few = dataclasses.replace(SHAPES["llama"], heads=4, kv_heads=kv_heads, qk_norm=True)
    full = dataclasses.replace(few, kv_heads=None)
    d, slots = few.head_size, make_slots(["native-fp64"])
    pack = Pack(make_program("native-fp64", shape=few), slots, text, CPU)
    weights = dict(pack.parameters)
    for name, w in pack.parameters.items():
        if name.endswith("qkv"):
            q, k, v = w.split([16, kv_heads * d, kv_heads * d], -1)
            columns = [h * kv_heads // 4 * d + j for h in range(4) for j in range(d)]
            weights[name] = torch.cat([q, k[..., columns], v[..., columns]], -1)
    assert weights["h.0.attn.qkv"].shape[1:] == full.parameters()["h.0.attn.qkv"]
    tokens = pack.held_out[0][0].view(1, -1, few.context)
    ours = forward(pack.parameters, tokens, few, pack.numerics)
    torch.testing.assert_close(ours, forward(weights, tokens, full, pack.numerics), rtol=0, atol=1e-13)


def test_scores_of_turned_queries_and_keys_depend_on_distance_alone() -> None:
    shape = dataclasses.replace(SHAPES["rope"], context=64)
    q, k = torch.randn(2, shape.head_size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    turn = model.rotation(64, shape, q)
    assert turn is not None
    at = [model.rotate(x.expand(1, 1, 64, 1, -1), turn)[0, 0, :, 0] for x in (q, k)]
    scores = at[0] @ at[1].T
    for distance in (0, 1, 17):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-13)
    assert abs(scores[1, 0] - scores[17, 0]) > 1e-2
    torch.testing.assert_close(at[0][0], q, rtol=0, atol=0)


@pytest.mark.parametrize("option", ["qk_norm", "softcap", "z_loss", "llama", "everything"])
def test_the_hessian_vector_product_is_the_slope_of_the_gradient(text: Text, option: str) -> None:
    """By central differences of the gradient in FP64, through every parameter that is a matrix (DESIGN.md 9)."""
    shape = SHAPES[option]
    pack = Pack(make_program("native-fp64", shape=shape), make_slots(["native-fp64"]), text, CPU)
    tokens, targets = pack.held_out[0]
    names = [name for name, p in pack.parameters.items() if p.ndim == 3]
    weights = {name: p.detach() for name, p in pack.parameters.items()}
    generator = torch.Generator().manual_seed(3)
    vectors = [torch.randn(weights[n].shape, generator=generator, dtype=torch.float64) for n in names]

    def gradient(t: float, create_graph: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        leaves = [(weights[n] + t * v).requires_grad_() for n, v in zip(names, vectors, strict=True)]
        at = weights | dict(zip(names, leaves, strict=True))
        logits = forward(at, tokens.view(1, -1, shape.context), shape, pack.numerics)
        loss = objective(logits, targets, shape).sum()
        return leaves, list(torch.autograd.grad(loss, leaves, create_graph=create_graph))

    leaves, first = gradient(0.0, create_graph=True)
    inner = torch.stack([(g * v).sum() for g, v in zip(first, vectors, strict=True)]).sum()
    products = torch.autograd.grad(inner, leaves)
    t = 1e-5
    for product, above, below in zip(products, gradient(t)[1], gradient(-t)[1], strict=True):
        slope = (above - below) / (2 * t)
        assert float((product - slope).norm() / slope.norm()) < 1e-6


# A run and its pack.


@pytest.mark.parametrize("option", ["llama", "everything"])
def test_a_run_has_the_same_bits_in_every_slot(text: Text, option: str) -> None:
    bits = []
    for slot in range(3):
        slots = make_slots(["e8m7", "e5m2", "e4m7"])
        slots[slot] = make_slots(["e4m3"])[0]
        pack = Pack(make_program(shape=SHAPES[option]), slots, text, CPU)
        for _ in range(6):
            pack.step()
        parts = [pack.train_loss[:6], *pack.sharpness().values(), *pack.parameters.values()]
        bits.append([part.detach().select(1 if i == 0 else 0, slot) for i, part in enumerate(parts)])
    for other in bits[1:]:
        assert all(torch.equal(a, b) for a, b in zip(bits[0], other, strict=True))


# muP.


@pytest.mark.parametrize("option", ["none", "llama"])
def test_mup_at_its_base_width_is_the_standard_model_to_the_bit(text: Text, option: str) -> None:
    results = []
    for base in (None, SHAPE.width):
        shape = dataclasses.replace(SHAPES.get(option, SHAPE), mup_base_width=base)
        pack = Pack(make_program(shape=shape), make_slots(["e4m3"] * 2), text, CPU)
        for _ in range(6):
            pack.step()
        results.append([pack.train_loss[:6], pack.grad_norm[:6], pack.validation_loss(), *pack.parameters.values()])
    for standard, mup in zip(*results, strict=True):
        assert torch.equal(standard, mup)


@pytest.mark.parametrize(
    ("heads", "base_heads", "scale"),
    [
        (4, None, math.sqrt(4) / 32),  # of a base with as many heads, 16 / 4 wide
        (4, 4, math.sqrt(4) / 32),
        (32, 4, 1 / math.sqrt(4)),  # heads that stay as they are keep their scale
    ],
)
def test_mups_scale_of_attention_goes_by_the_size_of_heads(heads: int, base_heads: int | None, scale: float) -> None:
    shape = ModelShape(1, heads, 128, 8, 32, mup_base_width=16, mup_base_heads=base_heads)
    assert shape.attention_scale == pytest.approx(scale, rel=1e-15)
    assert dataclasses.replace(shape, mup_base_width=None).attention_scale == 1 / math.sqrt(128 // heads)


def test_mups_factors_are_those_of_the_papers_table() -> None:
    """Table 8 of 2203.03466 at four times the base's width: hidden weights' deviation 1/2 and rate 1/4, output's factor 1/4."""
    shape = ModelShape(2, 4, 64, 8, 32, tied=False, qk_norm=True, mup_base_width=16)
    assert {name: (shape.initial_std(name), shape.rate_factor(name)) for name in shape.parameters() if "h.1" not in name} == {
        "wte": (0.02, 1.0), "wpe": (0.02, 1.0), "lm_head": (0.02, 1.0), "ln_f": (None, 1.0),
        "h.0.ln_1": (None, 1.0), "h.0.ln_2": (None, 1.0), "h.0.attn.ln_q": (None, 1.0), "h.0.attn.ln_k": (None, 1.0),
        "h.0.attn.qkv": (0.01, 0.25), "h.0.attn.proj": (0.005, 0.25), "h.0.mlp.fc": (0.01, 0.25), "h.0.mlp.proj": (0.005, 0.25),
    }  # fmt: skip
    assert shape.readout.multiplier == 0.25


WIDTHS = (32, 64, 128, 256)


def changes_of_activations(
    text: Text, monkeypatch: pytest.MonkeyPatch, base: int | None, **options: Any
) -> list[list[float]]:
    """How far four Adam steps move the last stream and the logits, root mean square, [widths, 2]."""
    found = []
    for width in WIDTHS:
        shape = dataclasses.replace(SHAPE, heads=4, width=width, mup_base_width=base, **options)
        program = make_program("native-fp64", shape=shape, warmup=0, schedule="constant")
        pack = Pack(program, make_slots(["native-fp64"] * 2, 1e-2), text, CPU)

        def activations(pack: Pack = pack) -> list[Tensor]:
            with monkeypatch.context() as patch:
                norm = Mock(wraps=model._norm)
                patch.setattr(model, "_norm", norm)
                logits = pack.logits()
            return [norm.call_args.args[0].detach(), logits]

        before = activations()
        for _ in range(4):
            pack.step()
        found.append([float((b - a).square().mean().sqrt()) for a, b in zip(before, activations(), strict=True)])
    return found


@pytest.mark.parametrize("option", ["none", "llama"])
def test_under_mup_activations_move_as_far_at_every_width(
    text: Text, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    """The coordinate check of muP (appendix D.1): one learning rate, widths 32 to 256; without muP they move ever further."""
    mup, standard = (
        np.array(changes_of_activations(text, monkeypatch, base, **OPTIONS.get(option, {}))) for base in (32, None)
    )
    np.testing.assert_array_equal(mup[0], standard[0])  # the base width
    assert (np.abs(np.log2(mup / mup[0])) < 0.5).all()
    assert (np.diff(standard, axis=0) > 0).all()
    assert (standard[-1] / standard[0] > 3).all()


# From a study file to results.


def test_both_architectures_are_trained_from_a_study(tmp_path: Path) -> None:
    """And each option as an axis: results under their own coordinates, nothing trained twice."""
    study = Study.model_validate({
        "axes": {"recipe": ["e8m7"], "learning_rate": [4e-3], "architecture": ["gpt2", "llama"], "qk_norm": [False, True]},
        "model": {
            "layers": 1, "heads": 2, "kv_heads": 1, "width": 16, "context": 16, "z_loss": 1e-4, "logit_softcap": 30.0,
            "mup_base_width": 8, "vocabulary": 264,
        },
        "training": {"steps": 12, "sequences": 2, "warmup": 3, "evaluate_every": 6, "evaluation_batches": 1},
        "probe": {"every": 6},
        "execution": {"pack_size": 1},
    })  # fmt: skip
    assert run_study(study, tmp_path, "cpu").trained == 4
    assert run_study(study, tmp_path, "cpu").trained == 0
    tree = open_study(tmp_path)
    history = tree["history"].to_dataset()
    assert sorted(history["model"].values.tolist()) == ["gpt2-1x16"] * 2 + ["llama-1x16"] * 2
    assert sorted(zip(history["architecture"].values.tolist(), history["qk_norm"].values.tolist(), strict=True)) == [
        ("gpt2", False), ("gpt2", True), ("llama", False), ("llama", True),
    ]  # fmt: skip
    losses = history["train_loss"].values
    assert len({row.tobytes() for row in losses}) == 4
    assert np.isfinite(losses).all()
    assert (losses[:, -1] < losses[:, 0]).all()
    assert np.isfinite(tree["sharpness"].to_dataset()["logit_sharpness"].values).all()
    np.testing.assert_allclose(losses[:, 0], math.log(264), atol=0.1)  # the rows beyond the tokenizer's count
    assert (losses[:, 0] > math.log(257)).all()
