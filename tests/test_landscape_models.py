"""Models of others as they are: a CNN with batch norm; Hugging Face causal LMs made from a config, in eager attention and sdpa.

Products are held to autograd twice, of a copy of the module in FP64 that never saw `landscape`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from landscape import Batches, Problem, average_sharpness, hessian_eigenvalues, module_loss

F64 = torch.float64


def by_autograd_twice(loss: Tensor, model: nn.Module, v: Tensor) -> Tensor:
    leaves = list(model.parameters())
    gradient = torch.autograd.grad(loss, leaves, create_graph=True)
    slope = (torch.cat([g.flatten() for g in gradient]) * v).sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(slope, leaves)])


def direction(problem: Problem) -> Tensor:
    return torch.randn(1, problem.P, generator=torch.Generator().manual_seed(1), dtype=F64)


def images(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


@pytest.mark.parametrize("training", [False, True])
def test_a_cnn_of_fp32_in_fp64_with_its_running_means_untouched(training: bool) -> None:
    """In training mode batch norm's statistics are the batch's, which the parameters move, and its buffers are written to."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)
    )
    batch = torch.randn(8, 1, 6, 6), torch.arange(8) % 3
    net(batch[0])  # running means of their own
    net.train(training)
    kept = copy.deepcopy(net.state_dict())
    problem = Problem(*module_loss(net, images), batch, dtype=F64)
    v = direction(problem)
    twin = copy.deepcopy(net).double()
    wanted = by_autograd_twice(images(twin, (batch[0].double(), batch[1])), twin, v[0])
    torch.testing.assert_close(problem.hvp(v)[0], wanted, rtol=1e-9, atol=1e-11)
    assert problem.mode == "forward-over-reverse"
    assert hessian_eigenvalues(problem).dataset.converged
    average_sharpness(*module_loss(net, images), batch)
    torch.testing.assert_close(net.state_dict(), kept, rtol=0, atol=0)


def hugging_face(name: str, attention: str) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="the extra 'curvature' is not installed")
    torch.manual_seed(0)
    tokens = {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": 0, "attn_implementation": attention}
    if name == "gpt2":
        config = transformers.GPT2Config(n_positions=16, n_embd=16, n_layer=1, n_head=2, **tokens)
        return transformers.GPT2LMHeadModel(config).eval()  # type: ignore[no-any-return]
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, **tokens
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()  # type: ignore[no-any-return]


def language(model: nn.Module, tokens: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=tokens, labels=tokens).loss
    return loss


def logits_in_fp64(model: nn.Module, tokens: Tensor) -> Tensor:
    """Next-token loss from the logits, without the cast to FP32 that `labels` takes."""
    return F.cross_entropy(model(input_ids=tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("name", "compute", "precision"), [
    ("gpt2", language, 1e-6), ("gpt2", logits_in_fp64, 1e-9), ("llama", language, 1e-6), ("llama", logits_in_fp64, 1e-6),
])  # fmt: skip
def test_a_hugging_face_model_made_from_a_config(
    name: str, compute: Callable[[Any, Tensor], Tensor], precision: float, attention: str
) -> None:
    """Llama's norms and rotary angles are in FP32 whatever the parameters are, so FP64 gets it to about 1e-7 only."""
    model, tokens = (
        hugging_face(name, attention),
        torch.randint(40, (4, 10), generator=torch.Generator().manual_seed(2)),
    )
    parts = Batches(tokens.split([3, 1]), len)
    problem = Problem(*module_loss(model, compute), parts, dtype=F64)
    v = direction(problem)
    twin = hugging_face(name, "eager").double()
    twin.load_state_dict({n: t.double() for n, t in model.state_dict().items()})
    wanted = by_autograd_twice(compute(twin, tokens), twin, v[0])
    torch.testing.assert_close(problem.hvp(v)[0], wanted, rtol=0, atol=precision * float(wanted.abs().max()))
    assert problem.mode == "forward-over-reverse"
