"""What `curvature` is held against: a run's model as an nn.Module, and how others find its Hessian's largest eigenvalue."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.model import ModelShape

TOLERANCE, POWER_ITERATIONS = 1e-3, 100


class PlainBlock(nn.Module):
    """A GPT-2 block without biases."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        D, self.heads = shape.width, shape.heads
        self.ln_1, self.ln_2 = nn.LayerNorm(D, bias=False), nn.LayerNorm(D, bias=False)
        self.qkv, self.attn_proj = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.fc, self.mlp_proj = nn.Linear(D, 4 * D, bias=False), nn.Linear(4 * D, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The stream [N, T, D] behind it."""
        N, T, D = x.shape
        q, k, v = (part.view(N, T, self.heads, -1).transpose(1, 2) for part in self.qkv(self.ln_1(x)).split(D, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_proj(y.transpose(1, 2).reshape(N, T, D))
        mixed: Tensor = x + self.mlp_proj(F.gelu(self.fc(self.ln_2(x))))
        return mixed


class PlainGPT(nn.Module):
    """One run's model as one writes it; logits [N·T, V]."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(shape.vocabulary, shape.width), nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(PlainBlock(shape) for _ in range(shape.layers))
        self.ln_f = nn.LayerNorm(shape.width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of tokens [N, T]."""
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.ln_f(x) @ self.wte.weight.T
        return logits.flatten(0, 1)

    def load(self, weights: dict[str, Tensor]) -> None:
        """From our parameters of one run."""
        state = {"wte.weight": weights["wte"], "wpe.weight": weights["wpe"], "ln_f.weight": weights["ln_f"]}
        names = {
            "ln_1": "ln_1",
            "attn.qkv": "qkv",
            "attn.proj": "attn_proj",
            "ln_2": "ln_2",
            "mlp.fc": "fc",
            "mlp.proj": "mlp_proj",
        }
        for i in range(len(self.blocks)):
            for ours, theirs in names.items():
                value = weights[f"h.{i}.{ours}"]
                state[f"blocks.{i}.{theirs}.weight"] = value.T if value.ndim == 2 else value
        self.load_state_dict(state)


Product = Callable[[Tensor], Tensor]
Method = Callable[[PlainGPT, Tensor, Tensor], tuple[float, Tensor, int]]  # eigenvalue, eigenvector, products


def twice_backward(model: PlainGPT, tokens: Tensor, targets: Tensor) -> Product:
    """H v by the gradient's graph, which is kept: each product is one more pass backward."""
    parameters = list(model.parameters())
    loss = F.cross_entropy(model(tokens), targets)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)])

    def product(v: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(gradient, parameters, v, retain_graph=True)])

    return product


def by_pyhessian(model: PlainGPT, tokens: Tensor, targets: Tensor) -> tuple[float, Tensor, int]:
    """As PyHessian's `eigenvalues`: the value, its vector, and how many products."""
    before = math.nan

    def enough(value: float, _: Tensor) -> bool:
        nonlocal before
        last, before = before, value
        return abs(last - value) / (abs(last) + 1e-6) < TOLERANCE

    return iterate(twice_backward(model, tokens, targets), a_vector(model), enough, POWER_ITERATIONS)


def by_power_iteration(model: PlainGPT, tokens: Tensor, targets: Tensor) -> tuple[float, Tensor, int]:
    """The same until the residual is ours."""

    def enough(value: float, residual: Tensor) -> bool:
        return float(residual.norm()) <= TOLERANCE * abs(value)

    return iterate(twice_backward(model, tokens, targets), a_vector(model), enough, 10 * POWER_ITERATIONS)


def a_vector(model: PlainGPT) -> Tensor:
    """A random one, of the model's parameters."""
    return torch.randn(sum(p.numel() for p in model.parameters()), device=model.wte.weight.device)


def iterate(
    product: Product, start: Tensor, enough: Callable[[float, Tensor], bool], most: int
) -> tuple[float, Tensor, int]:
    """Power iteration."""
    count, value, v, w, done = 0, math.nan, start, start, False
    while not done and count < most:
        v = w / (w.norm() + 1e-6)
        w = product(v)
        value = float(w @ v)
        count, done = count + 1, enough(value, w - value * v)
    return value, v, count


def by_curvlinops(model: PlainGPT, tokens: Tensor, targets: Tensor) -> tuple[float, Tensor, int]:
    """Curvlinops' Hessian in SciPy's Lanczos."""
    from curvlinops import HessianLinearOperator  # type: ignore[import-not-found]
    from scipy.sparse.linalg import LinearOperator, eigsh

    H = HessianLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), [(tokens, targets)], check_deterministic=False,
        num_data=len(tokens),
    )  # fmt: skip
    scipy, count = H.to_scipy(), 0

    def product(v: np.ndarray[Any, Any]) -> Any:
        nonlocal count
        count += 1
        return scipy @ v

    counted = LinearOperator(scipy.shape, matvec=product, dtype=scipy.dtype)
    values, vectors = eigsh(counted, k=1, which="LA", tol=TOLERANCE)
    return float(values[0]), torch.from_numpy(vectors[:, 0]).to(tokens.device, torch.float32), count
