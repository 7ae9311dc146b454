"""The layers as training runs them, against the model that autograd differentiates, and their kernels against both.

Expectations are autograd's in FP64 through `model.forward`, which is held to a plain nn.Module elsewhere (test_pack),
PyTorch's own functions, or sums made by hand.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from formats import float_format, quantize
from landscape import logit_sharpness
from tests.small import SHAPE, SHAPES, make_program, make_slots
from train import compiling, head, layers
from train.determinism import deterministic
from train.head import chunks
from train.layers import Norm, Readout, add_norm, attend, cross_entropy_gradient, embedding_gradient, last_norm
from train.model import cross_entropy, forward, objective
from train.pack import Pack
from train.precision import Precision, pack_precision
from train.recipe_table import RecipeTable
from train.resolve import resolve_recipe
from train.text import Text
from train.weights import padded_vocabulary, parts_of

CPU = torch.device("cpu")
R, S, D = 3, 10, 24


def precision(name: str, device: torch.device = CPU, rounding: str = "nearest_even") -> Precision:
    tables = {"mine": RecipeTable(name, name, name, rounding=rounding)}
    linear = resolve_recipe(name if name.startswith("native") else "mine", tables).body
    return pack_precision([linear] * R, device)


def random(*size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("has_delta", [True, False])
def test_add_norm_is_the_norm_of_the_sum_with_autograds_gradients(has_delta: bool, norm: Norm) -> None:
    inputs = [random(R, S, D, seed=1), random(R, S, D, seed=2), random(R, D, seed=3)]
    inputs = [i.requires_grad_() for i in inputs]
    x, delta, gain = inputs
    wide = precision("native-fp64")
    total, a = add_norm(x, delta if has_delta else None, gain, wide, wide, False, norm)
    expected_total = x + delta if has_delta else x
    normalise: Any = torch.nn.functional.layer_norm if norm == "layernorm" else torch.nn.functional.rms_norm
    expected = normalise(expected_total, (D,), eps=1e-5) * gain[:, None]
    torch.testing.assert_close(a, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(total, expected_total, rtol=0, atol=0)
    out = random(R, S, D, seed=4), random(R, S, D, seed=5)
    leaves = inputs if has_delta else [x, gain]
    ours = torch.autograd.grad((total, a), leaves, out)
    theirs = torch.autograd.grad((expected_total, expected), leaves, out)
    for mine, plain in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rounding", ["nearest_even", "toward_zero"])
@pytest.mark.parametrize("name", ["e4m3fn", "e3m1", "native-bf16"])
def test_the_gradient_of_the_product_before_is_the_streams_on_its_grid(name: str, rounding: str) -> None:
    x, delta, gain = (random(*size, seed=6, dtype=torch.float32) for size in ((R, S, D), (R, S, D), (R, D)))
    leaves = [t.requires_grad_() for t in (x, delta, gain)]
    outputs = add_norm(*leaves, precision(name, rounding=rounding), precision(name, rounding=rounding), False)  # type: ignore[call-arg, arg-type]
    dx, d_delta, _ = torch.autograd.grad(
        outputs, leaves, [random(R, S, D, seed=s, dtype=torch.float32) for s in (7, 8)]
    )
    f = float_format("bf16" if name == "native-bf16" else name)
    mode = "nearest_even" if name == "native-bf16" else rounding
    np.testing.assert_array_equal(d_delta.numpy(), f.decode(f.encode(dx.numpy().astype(np.float64), rounding=mode)))
    assert not torch.equal(dx, d_delta)


def test_the_last_norm_rounds_ahead_for_the_head_and_behind_for_the_blocks() -> None:
    x, delta, gain = (random(*size, seed=9, dtype=torch.float32) for size in ((R, S, D), (R, S, D), (R, D)))
    leaves = [t.requires_grad_() for t in (x, delta, gain)]
    a = last_norm(*leaves, precision("e4m3fn"), precision("e3m1"), False)  # type: ignore[call-arg, arg-type]
    assert torch.equal(a, quantize(a, "e4m3fn"))
    assert not torch.equal(a, quantize(a, "e3m1"))
    d_delta = torch.autograd.grad(a, leaves, random(R, S, D, seed=10, dtype=torch.float32))[1]
    assert torch.equal(d_delta, quantize(d_delta, "e3m1"))


@pytest.mark.parametrize("limit", [10**9, 5 * 64])
@pytest.mark.parametrize("vocabulary", [32, 50])
@pytest.mark.parametrize("option", ["none", *SHAPES])
def test_the_gradients_of_a_step_are_autograds_through_the_plain_model(
    text: Text, monkeypatch: pytest.MonkeyPatch, option: str, vocabulary: int, limit: int
) -> None:
    """All parameters, FP64; 50 is no multiple of 8, so the LM head is padded; the head whole, or a few tokens at a time.

    The losses are cross entropies, whatever is added to what is descended.
    """
    monkeypatch.setattr(head, "CHUNK_OF_ONE_RUN", limit)
    shape = dataclasses.replace(SHAPES.get(option, SHAPE), vocabulary=vocabulary)
    pack = Pack(make_program("native-fp64", shape=shape), make_slots(["native-fp64"] * 2), text, CPU)
    with torch.no_grad():
        for name, p in pack.parameters.items():
            if "ln_" in name:  # gains that start at one would hide where they are left out
                p += 0.5 * random(*p.shape, seed=len(name))
    tokens, targets = pack.held_out[0]
    losses, grads = pack.gradients(tokens, targets)
    logits = forward(pack.parameters, tokens.view(2, -1, shape.context), shape, pack.numerics)
    assert logits.shape[-1] == vocabulary
    torch.testing.assert_close(losses, cross_entropy(logits, targets).detach(), rtol=0, atol=1e-13)
    descended = objective(logits, targets, shape)
    theirs = torch.autograd.grad(descended.sum(), list(pack.parameters.values()))
    assert len(grads) == len(theirs)
    for name, plain in zip(pack.parameters, theirs, strict=True):
        mine = torch.stack(list(grads[name])).sum(0)
        torch.testing.assert_close(mine, plain, rtol=0, atol=1e-13, msg=name)


@pytest.mark.parametrize("option", ["none", "llama", "everything"])
@pytest.mark.parametrize("recipe", ["e4m3", "hybrid", "native-bf16", "tf32"])
def test_a_rounded_steps_gradients_are_the_plain_models_but_for_ties(text: Text, recipe: str, option: str) -> None:
    """Sums in another order move a few elements to the next value of a grid: the norms of differences stay small."""
    shape = SHAPES.get(option, SHAPE)
    pack = Pack(make_program(recipe, shape=shape), make_slots([recipe] * 2), text, CPU)
    for _ in range(3):
        pack.step()
    tokens, targets = pack.held_out[0]
    losses, grads = pack.gradients(tokens, targets)
    logits = forward(pack.parameters, tokens.view(2, -1, SHAPE.context), shape, pack.numerics)
    torch.testing.assert_close(losses, cross_entropy(logits, targets).detach(), rtol=0, atol=2e-6)
    theirs = torch.autograd.grad(objective(logits, targets, shape).sum(), list(pack.parameters.values()))
    for name, plain in zip(pack.parameters, theirs, strict=True):
        mine = torch.stack([part.float() for part in grads[name]]).sum(0)
        assert float((mine - plain).norm() / plain.norm()) < 2e-3, name


@pytest.mark.parametrize("kernels", [False, True], ids=["plain", "as if there were kernels"])
@pytest.mark.parametrize("readout", [Readout(softcap=1.5), Readout(0.25), Readout(z_loss=0.1), Readout(3.0, 2.0, 0.01)])
def test_the_readouts_gradient_is_autograds_whether_there_are_kernels_or_not(readout: Readout, kernels: bool) -> None:
    """The kernel knows of no readout, so the plain form must be taken: here there is none to be taken by mistake."""
    check_cross_entropy_gradient(readout, kernels)


def test_cross_entropys_gradient_is_autograds_and_padding_has_none() -> None:
    check_cross_entropy_gradient(Readout(), False)


def check_cross_entropy_gradient(readout: Readout, kernels: bool) -> None:
    z = random(R, S, 64, seed=11).requires_grad_()
    targets = torch.randint(0, 50, (R, S), generator=torch.Generator().manual_seed(1))
    losses, dz = cross_entropy_gradient(z.detach(), targets, precision("native-fp64"), 50, 40, kernels, readout)
    logits = readout.multiplier * z[..., :50]
    if readout.softcap is not None:
        logits = readout.softcap * torch.tanh(logits / readout.softcap)
    plain = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    torch.testing.assert_close(losses, plain.sum(1).detach(), rtol=0, atol=1e-12)
    descended = plain + readout.z_loss * logits.exp().sum(-1).log() ** 2
    torch.testing.assert_close(dz, torch.autograd.grad(descended.sum() / 40, z)[0], rtol=0, atol=1e-15)
    assert not dz[..., 50:].any()


def test_the_embeddings_gradient_sums_rows_by_token() -> None:
    dx = random(2, 6, 4, seed=12)
    tokens = torch.tensor([[0, 2, 2, 1, 0, 2], [1, 1, 1, 1, 1, 1]])
    gradient = embedding_gradient(dx, tokens, 3, False)
    expected = torch.stack(
        [
            torch.stack([dx[0, 0] + dx[0, 4], dx[0, 3], dx[0, 1] + dx[0, 2] + dx[0, 5]]),
            torch.stack([torch.zeros(4), dx[1].sum(0), torch.zeros(4)]),
        ]
    )
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("runs", "tokens", "vocabulary", "limits", "shapes"),
    [
        (8, 4, 10, (1000, 4000), [(8, 4)]),
        (8, 4, 10, (100, 400), [(2, 4)] * 4),  # 2 runs of 40 are within 100
        (6, 4, 10, (170, 400), [(3, 4)] * 2),  # 4 would be within 170, and 3 divide 6
        (2, 12, 10, (10, 50), [(1, 4)] * 6),  # a run of 120 in parts of at most 50
        (1, 11, 10, (10, 30), [(1, 3)] * 3 + [(1, 2)]),  # 11 is prime
    ],
)
def test_chunks_cover_every_token_once_within_the_limit(
    monkeypatch: pytest.MonkeyPatch, runs: int, tokens: int, vocabulary: int, limits: tuple[int, int], shapes: Any
) -> None:
    monkeypatch.setattr(head, "CHUNK_LOGITS", limits[0])
    monkeypatch.setattr(head, "CHUNK_OF_ONE_RUN", limits[1])
    seen = torch.zeros(runs, tokens)
    found = []
    for r, s in chunks(runs, tokens, vocabulary):
        seen[r, s] += 1
        found.append(tuple(seen[r, s].shape))
    assert (seen == 1).all()
    assert found == shapes


@pytest.mark.parametrize("recipe", ["e4m3", "hybrid"])
def test_chunks_change_no_bit_but_the_order_of_the_heads_sums(
    text: Text, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    def run(of_runs: int, of_one: int) -> tuple[Tensor, Any]:
        monkeypatch.setattr(head, "CHUNK_LOGITS", of_runs)
        monkeypatch.setattr(head, "CHUNK_OF_ONE_RUN", of_one)
        pack = Pack(make_program(recipe), make_slots([recipe] * 4), text, CPU)
        losses, grads = pack.gradients(*pack.held_out[0])
        return losses, grads

    a_run = 4 * SHAPE.context * SHAPE.vocabulary
    (losses, whole), (same, by_runs), (near, by_tokens) = (
        run(4 * a_run, 4 * a_run), run(2 * a_run, 4 * a_run), run(1, a_run // 3)
    )  # fmt: skip
    assert torch.equal(losses, same)
    torch.testing.assert_close(losses, near, rtol=1e-6, atol=0)
    for name in whole:
        for a, b, c in zip(whole[name], by_runs[name], by_tokens[name], strict=True):
            assert torch.equal(a, b), name
            if name == "wte":
                torch.testing.assert_close(a, c, rtol=2**-7, atol=1e-7)  # rounded to BF16 after sums in another order
            else:
                assert torch.equal(a, c), name


class Largest(TorchDispatchMode):
    """The most elements in any tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("option", ["none", "softcap", "everything"])
def test_the_logits_of_all_runs_and_tokens_are_never_in_memory(
    text: Text, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    shape = dataclasses.replace(SHAPES.get(option, SHAPE), vocabulary=512)
    logits = 4 * 16 * shape.context * shape.vocabulary
    monkeypatch.setattr(head, "CHUNK_LOGITS", logits // 4)
    pack = Pack(make_program(shape=shape, sequences=16, evaluation_sequences=16), make_slots(["e4m3"] * 4), text, CPU)
    with Largest() as largest:
        pack.step()
        pack.validation_loss()
        pack.sharpness()
    assert largest.elements <= logits // 4


@pytest.mark.parametrize(("vocabulary", "padded"), [(256, 256), (50257, 50304), (50, 64), (8, 8), (4100, 4160)])
def test_a_vocabulary_is_padded_where_products_would_be_slow(vocabulary: int, padded: int) -> None:
    assert padded_vocabulary(vocabulary) == padded


def test_operands_are_the_weights_on_their_grid_after_every_step(text: Text) -> None:
    pack = Pack(make_program("hybrid"), make_slots(["hybrid"] * 2), text, CPU)
    for _ in range(3):
        for name, operand in pack.operands.items():
            f = "bf16" if name == "wte" else "e4m3fn"
            assert torch.equal(parts_of(operand)[0].detach(), quantize(pack.parameters[name].detach(), f)), name
        pack.step()


def test_the_training_path_refuses_second_derivatives(text: Text) -> None:
    """They would be wrong without an error: `model.forward` is for them."""
    pack = Pack(make_program(), make_slots(["e4m3"] * 2), text, CPU)
    x, hidden = pack._hidden(pack.held_out[0][0])
    torch.autograd.grad(hidden.sum(), x, retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(hidden.sum(), x, create_graph=True)


def test_a_pack_frees_its_memory_without_the_garbage_collector(text: Text) -> None:
    """The next pack may need it before the collector runs."""
    gc.disable()
    try:
        pack = Pack(make_program(), make_slots(["e4m3"] * 2), text, CPU)
        pack.step()
        pack.sharpness()
        watched = weakref.ref(pack)
        del pack
        assert watched() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("writable", [True, False])
def test_compiled_code_is_kept_in_the_cache_folder_where_it_can_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, writable: bool
) -> None:
    folder = tmp_path / "cache"
    if not writable:
        folder.write_text("a file where the folder should be")
    monkeypatch.setenv("EXMY_CACHE", str(folder))
    monkeypatch.setenv(compiling.CACHE_VARIABLE, "put back when the test ends")
    monkeypatch.delenv(compiling.CACHE_VARIABLE)
    compiling.compiler()
    kept = os.environ.get(compiling.CACHE_VARIABLE)
    assert kept == (str(folder / "compiled") if writable else None)
    monkeypatch.setenv(compiling.CACHE_VARIABLE, "mine")
    compiling.compiler()
    assert os.environ[compiling.CACHE_VARIABLE] == "mine"


def test_a_piece_is_wrapped_for_the_compiler_once_a_process_and_kind_of_shapes() -> None:
    wrapped = compiling.compiler()(torch.sin)
    assert compiling.compiler()(torch.sin) is wrapped
    assert compiling.compiler(dynamic=True)(torch.sin) is not wrapped
    assert compiling.compiler()(torch.cos) is not wrapped


# On a GPU: the kernels.


def on(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    return [t.to(device) for t in tensors]


@pytest.mark.cuda
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("size", [(3, 70, 24), (2, 256, 384), (1, 33, 768)])
@pytest.mark.parametrize(
    ("name", "rounding"), [("native-bf16", "nearest_even"), ("e4m3fn", "nearest_even"), ("e4m3", "toward_zero")]
)
def test_the_norms_kernel_is_the_plain_form(
    cuda: torch.device, size: tuple[int, int, int], name: str, rounding: str, norm: Norm
) -> None:
    runs, tokens, width = size
    names = [name] * runs if name.startswith("native") else [name, "e5m3", "e3m2f"][:runs]
    tables = {n: RecipeTable(n, n, n, rounding=rounding) for n in names if not n.startswith("native")}
    p = pack_precision([resolve_recipe(n, tables).body for n in names], cuda)
    results = []
    for kernels in (True, False):
        x, gain = on(cuda, random(*size, seed=1, dtype=torch.float32), random(runs, width, seed=2, dtype=torch.float32))
        (delta,) = on(cuda, random(*size, seed=3, dtype=torch.bfloat16))
        leaves = [t.requires_grad_() for t in (x, delta, gain)]
        grads = on(cuda, random(*size, seed=4, dtype=torch.float32), random(*size, seed=5, dtype=torch.bfloat16))
        results.append(torch.autograd.grad(add_norm(x, delta, gain, p, p, kernels, norm), leaves, grads))
    (dx, d_delta, d_gain), (dx_plain, _, d_gain_plain) = results
    torch.testing.assert_close(dx, dx_plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(d_gain, d_gain_plain, rtol=1e-4, atol=1e-4 * math.sqrt(tokens))
    for run, n in enumerate(names):
        expected = dx[run] if name.startswith("native") else quantize(dx[run], n, rounding)
        assert torch.equal(d_delta[run], expected.to(torch.bfloat16)), n


@pytest.mark.cuda
def test_the_kernels_rounding_is_the_quantizers_at_every_decision_point(cuda: torch.device) -> None:
    """Through the norm's kernel with a gain of zero, the gradient of the stream passes unchanged and is rounded."""
    from verification.points import decision_inputs

    for name in ("e4m3fn", "e5m2", "e2m1f", "e8m3", "e3m4"):
        near = decision_inputs(float_format(name), torch.float32)
        width = 64
        stream = torch.nn.functional.pad(near, (0, -near.numel() % width)).view(1, -1, width).to(cuda)
        x = torch.randn(stream.shape, device=cuda)
        for rounding in ("nearest_even", "toward_zero"):
            p = pack_precision(
                [resolve_recipe("mine", {"mine": RecipeTable(name, name, name, rounding=rounding)}).body], cuda
            )
            assert p.gradient is not None
            zero = torch.zeros_like(stream, dtype=torch.bfloat16)
            dx, rounded, _ = layers._norm_backward(
                zero, x, x.mean(-1), x.std(-1), torch.zeros(1, width, device=cuda), stream, True,
                layers.ROUNDINGS[p.structure.rounding], list(p.gradient),
            )  # fmt: skip
            assert ((dx == stream) | stream.isnan()).all()
            expected = quantize(dx, name, rounding).to(torch.bfloat16)
            assert torch.equal(rounded.nan_to_num(7), expected.nan_to_num(7)), (name, rounding)


@pytest.mark.cuda
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(
    ("B", "T", "H", "d"), [(4, 256, 3, 32), (2, 64, 2, 16), (3, 100, 1, 64), (1, 1, 2, 128), (2, 1000, 2, 64)]
)
def test_the_attention_kernel_is_attention(
    cuda: torch.device, B: int, T: int, H: int, d: int, scale: float | None
) -> None:
    """Against softmax written out in FP64, to BF16's resolution, forward and backward; and twice the same bits."""
    qkv = random(B, T, 3, H, d, seed=1, dtype=torch.bfloat16).to(cuda)
    dy = random(B, T, H, d, seed=2, dtype=torch.bfloat16).to(cuda)

    def ours() -> tuple[Tensor, Tensor]:
        leaf = qkv.clone().requires_grad_()
        y = attend(leaf, True, scale)
        return y.detach(), torch.autograd.grad(y, leaf, dy)[0]

    wide = qkv.double().requires_grad_()
    q, k, v = (t.transpose(1, 2) for t in wide.unbind(2))
    scores = q @ k.transpose(2, 3) * (scale or 1 / math.sqrt(d))
    scores = scores.masked_fill(torch.ones(T, T, device=cuda).triu(1).bool(), -math.inf)
    expected = (scores.softmax(-1) @ v).transpose(1, 2)
    gradient = torch.autograd.grad(expected, wide, dy.double())[0]
    (y, dqkv), again = ours(), ours()
    assert float((y - expected).norm() / expected.norm()) < 2**-7
    for part in range(3):
        if T > 1 or part == 2:  # of a single position, only the value has a gradient
            assert float((dqkv - gradient)[:, :, part].norm() / gradient[:, :, part].norm()) < 2**-7
    assert torch.equal(y, again[0])
    assert torch.equal(dqkv, again[1])


@pytest.mark.cuda
@pytest.mark.parametrize("vocabulary", [32, 4096, 50257, 16001])
@pytest.mark.parametrize("names", [("native-bf16",) * R, ("e5m2", "e5m1", "e5m3")])
@pytest.mark.parametrize("rounding", ["nearest_even", "toward_zero"])
def test_the_cross_entropy_kernel_is_the_plain_form(
    cuda: torch.device, vocabulary: int, names: tuple[str, ...], rounding: str
) -> None:
    """40 tokens of a run's 56, each run's gradient on its own grid."""
    padded = padded_vocabulary(vocabulary)
    z = (3 * random(R, 40, padded, seed=1)).to(torch.bfloat16).to(cuda)
    targets = torch.randint(0, vocabulary, (R, 40), generator=torch.Generator().manual_seed(1)).to(cuda)
    tables = {n: RecipeTable(n, n, n, rounding=rounding) for n in names if not n.startswith("native")}
    p = pack_precision([resolve_recipe(n, tables).body for n in names], cuda)
    losses, dz = cross_entropy_gradient(z, targets, p, vocabulary, 56, True)
    plain = torch.nn.functional.cross_entropy(z[..., :vocabulary].double().transpose(1, 2), targets, reduction="none")
    torch.testing.assert_close(losses.double(), plain.sum(1), rtol=1e-6, atol=0)
    _, expected = cross_entropy_gradient(z, targets, p, vocabulary, 56, False)
    assert not dz[..., vocabulary:].any()
    assert float((dz != expected).float().mean()) < 2e-3, "another exponential moves a few over a decision point"
    torch.testing.assert_close(dz.float(), expected.float(), rtol=0.51 if tables else 2**-7, atol=2**-15)


@pytest.mark.cuda
@pytest.mark.parametrize("names", [("native-bf16",) * R, ("e5m2", "e5m1", "e5m3")])
def test_the_cross_entropy_kernel_multiplies_each_runs_gradient_by_its_scale(
    cuda: torch.device, names: tuple[str, ...]
) -> None:
    """Powers of two that leave the middle run alone: of the unrounded gradient, so BF16's range alone shows nothing else."""
    z = (3 * random(R, 40, 4096, seed=1)).to(torch.bfloat16).to(cuda)
    targets = torch.randint(0, 4096, (R, 40), generator=torch.Generator().manual_seed(1)).to(cuda)
    scale = torch.tensor([2.0**12, 1.0, 2.0**-3], device=cuda)
    p = pack_precision([resolve_recipe(n).body for n in names], cuda)
    bare, plain = cross_entropy_gradient(z, targets, p, 4096, 56, True)
    losses, dz = cross_entropy_gradient(z, targets, p, 4096, 56, True, layers.PLAIN, scale)
    assert torch.equal(losses, bare)
    assert torch.equal(dz[1], plain[1])
    if names[0] == "native-bf16":
        assert torch.equal(dz, plain * scale[:, None, None].to(torch.bfloat16))
    _, expected = cross_entropy_gradient(z, targets, p, 4096, 56, False, layers.PLAIN, scale)
    assert float((dz != expected).float().mean()) < 2e-3, "another exponential moves a few over a decision point"


@pytest.mark.cuda
def test_a_logit_that_is_not_a_number_shows_in_its_own_runs_loss(cuda: torch.device) -> None:
    z = random(R, 40, 4096, seed=1, dtype=torch.bfloat16).to(cuda)
    targets = torch.zeros(R, 40, dtype=torch.int64, device=cuda)
    p = precision("e5m2", cuda)
    clean, _ = cross_entropy_gradient(z, targets, p, 4096, 40, True)
    z[1, 7, 1000] = torch.nan
    losses, _ = cross_entropy_gradient(z, targets, p, 4096, 40, True)
    assert losses.isnan().tolist() == [False, True, False]
    assert torch.equal(losses[[0, 2]], clean[[0, 2]])


@pytest.mark.cuda
@pytest.mark.parametrize("width", [384, 768])
def test_the_embedding_kernel_sums_rows_by_token(cuda: torch.device, width: int) -> None:
    dx = random(2, 500, width, seed=1, dtype=torch.float32).to(cuda)
    tokens = (torch.arange(1000, device=cuda).view(2, 500) ** 2) % 37
    expected = torch.zeros(2, 41, width, dtype=torch.float64, device=cuda)
    for run in range(2):
        for place in range(500):
            expected[run, tokens[run, place]] += dx[run, place]
    gradient = embedding_gradient(dx, tokens, 41, True)
    torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=1e-4)
    assert torch.equal(gradient, embedding_gradient(dx, tokens, 41, True))


@pytest.mark.cuda
@pytest.mark.parametrize("recipe", ["e4m3", "native-bf16", "tf32"])
def test_a_replayed_step_has_the_bits_of_a_launched_one(text: Text, cuda: torch.device, recipe: str) -> None:
    shape = dataclasses.replace(SHAPE, width=32, vocabulary=50)
    histories = []
    for replayed in (True, False):
        pack = Pack(make_program(recipe, shape=shape), make_slots([recipe] * 4), text, cuda)
        for work in (pack._step, pack._evaluation, pack._probe):
            work._enabled = replayed
        parts: list[Tensor] = []
        for _ in range(6):
            pack.step()
            parts += [pack.validation_loss(), pack.sharpness()["logit_sharpness"]]
        histories.append(torch.cat([pack.train_loss[:6].flatten(), *(p.flatten() for p in parts)]).cpu())
        assert (pack._step._graph is not None) == replayed
    assert histories[0].isfinite().all()
    assert torch.equal(histories[0], histories[1])


@pytest.mark.cuda
def test_nothing_in_a_step_waits_for_the_host(text: Text, cuda: torch.device) -> None:
    pack = Pack(make_program(), make_slots(["e4m3"] * 4), text, cuda)
    pack.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with deterministic(tf32=False):
            pack._train()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_wild_logits_are_measured_and_leave_their_neighbours_sharpness_alone(text: Text, device: torch.device) -> None:
    """One run's boxes grow too large for the series; the other runs' bits are those from before."""
    pack = Pack(make_program(), make_slots(["e4m3"] * 4), text, device)
    pack.step()
    before = pack.sharpness()
    with torch.no_grad():
        parts_of(pack.operands["wte"])[0][2] *= 1e6
    after = pack.sharpness()
    others = [0, 1, 3]
    for name, centred in (("logit_sharpness", False), ("logit_sharpness_centred", True)):
        assert torch.equal(before[name][others], after[name][others])
        tokens, targets = pack.held_out[0]
        hidden = pack._hidden(tokens)[1].detach()[2]
        logits = (hidden @ parts_of(pack.operands["wte"])[0][2].T).to(torch.bfloat16)
        expected = logit_sharpness(logits.double(), targets[2], pack.program.probe.epsilons, centred=centred).mean(0)
        torch.testing.assert_close(after[name][2].double(), expected, rtol=1e-3, atol=0)
