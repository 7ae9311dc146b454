"""Curvature against curvlinops, every operator that both have, on a small GPT and batches of unequal size.

Its norm is RMSNorm: curvlinops 3.0.1 multiplies by torch's jvp of jacrev under vmap, which is 4 to 7 % off through LayerNorm, and
the last test holds our products to autograd twice there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from landscape import (
    Batches,
    Problem,
    hessian_eigenvalues,
    hutchinson_trace,
    module_loss,
    smoothed_density,
    spectral_density,
    xtrace,
)

curvlinops = pytest.importorskip("curvlinops", reason="the extra 'curvature' is not installed")

F64 = torch.float64
V, WIDTH, HEADS, CONTEXT = 7, 8, 2, 5


class Block(nn.Module):
    """Attention with its products written out, since vmap has no fused one, and an MLP."""

    mask: Tensor

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.before, self.between = norm(WIDTH), norm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.register_buffer("mask", torch.ones(CONTEXT, CONTEXT, dtype=torch.bool).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.before(x)).unflatten(-1, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind(0)
        scores = (q @ k.mT / math.sqrt(WIDTH // HEADS)).masked_fill(self.mask, -math.inf)
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        y: Tensor = x + self.down(F.gelu(self.up(self.between(x))))
        return y


class GPT(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(V, WIDTH), nn.Parameter(0.3 * torch.randn(CONTEXT, WIDTH))
        self.block, self.norm, self.head = Block(norm), norm(WIDTH), nn.Linear(WIDTH, V, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.block(self.tokens(tokens) + self.positions)))
        return logits.flatten(0, 1)


class Both(NamedTuple):
    """One Hessian, of curvlinops and of ours, and its matrix by curvlinops."""

    theirs: Any
    ours: Problem
    matrix: Tensor


def problem_of(norm: Callable[[int], nn.Module]) -> tuple[GPT, list[tuple[Tensor, Tensor]], Problem]:
    torch.manual_seed(0)
    model = GPT(norm).double()
    tokens = torch.randint(V, (5, CONTEXT + 1))
    parts = [(part[:, :-1], part[:, 1:].flatten()) for part in tokens.split([3, 2])]
    loss, params = module_loss(model, lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]))
    return model, parts, Problem(loss, params, Batches(parts, lambda part: len(part[1])), dtype=F64)


@pytest.fixture(scope="module")
def both() -> Both:
    model, parts, ours = problem_of(nn.RMSNorm)
    theirs = curvlinops.HessianLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), parts, num_data=5, check_deterministic=False
    )
    return Both(theirs, ours, theirs @ torch.eye(ours.P, dtype=F64))


def signs(count: int, P: int) -> Tensor:
    """The Rademacher vectors of seed 0."""
    drawn = torch.randn(count, P, generator=torch.Generator().manual_seed(0), dtype=F64)
    return torch.where(drawn < 0, -1.0, 1.0).to(F64)


def test_products_agree(both: Both) -> None:
    v = signs(3, both.ours.P)
    for w in v:
        torch.testing.assert_close(both.ours.hvp(w[None])[0], both.theirs @ w, rtol=1e-10, atol=1e-12)
    assert both.ours.mode == "forward-over-reverse"


def test_both_ends_of_the_spectrum_are_those_that_arpack_finds_with_their_operator(both: Both) -> None:
    top = scipy.sparse.linalg.eigsh(both.theirs.to_scipy(), k=3, which="LA", return_eigenvectors=False, tol=1e-10)
    found = hessian_eigenvalues(both.ours, 3, tolerance=1e-6).dataset
    np.testing.assert_allclose(found.hessian_eigenvalue, np.sort(top)[::-1], rtol=1e-8)
    bottom = scipy.sparse.linalg.eigsh(both.theirs.to_scipy(), k=2, which="SA", return_eigenvectors=False, tol=1e-10)
    found = hessian_eigenvalues(both.ours, 2, which="smallest", tolerance=1e-6).dataset
    np.testing.assert_allclose(found.smallest_eigenvalue, np.sort(bottom), rtol=1e-8)


def test_hutchinsons_samples_are_those_of_their_operator_and_their_estimate_agrees(both: Both) -> None:
    found = hutchinson_trace(both.ours, 16)
    samples = [float(w @ (both.theirs @ w)) for w in signs(16, both.ours.P)]
    np.testing.assert_allclose(found.trace_sample, samples, rtol=1e-9)
    torch.manual_seed(0)
    theirs = float(curvlinops.hutchinson_trace(both.matrix, 16))
    assert abs(float(found.hessian_trace) - theirs) < 4 * math.sqrt(2) * float(found.hessian_trace_stderr)


def test_xtrace_agrees_within_its_error(both: Both) -> None:
    found = xtrace(both.ours, 64)
    torch.manual_seed(0)
    for truth, of in ((float(both.matrix.trace()), 1.0), (float(curvlinops.xtrace(both.matrix, 64)), math.sqrt(2))):
        assert abs(float(found.hessian_trace) - truth) < 4 * of * float(found.hessian_trace_stderr)


def test_the_spectral_density_is_theirs_from_the_same_start(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their Lanczos has no reorthogonalisation, so few steps; the start is ours, put where they draw one."""
    spectrum = pytest.importorskip("curvlinops.papyan2020traces.spectrum")
    (start,) = signs(1, both.ours.P)
    monkeypatch.setattr(spectrum, "randn", lambda *_, **__: start.clone())
    nodes, vectors = spectrum.fast_lanczos(both.theirs, 10)
    found = spectral_density(both.ours, 1, 10)
    np.testing.assert_allclose(found.node[0], nodes, rtol=1e-8)
    np.testing.assert_allclose(found.weight[0], vectors[0] ** 2, rtol=1e-6, atol=1e-12)
    ends, kappa, margin = (-2.0, 2.0), 3.0, 0.05
    grid, density = spectrum.lanczos_approximate_spectrum(both.theirs, 10, 101, 1, kappa, ends, margin)
    half = (ends[1] - ends[0]) * (1 + 2 * margin) / 2
    smoothed = smoothed_density(found, grid.numpy(), half * 2 / 9 / math.sqrt(8 * math.log(kappa)))
    np.testing.assert_allclose(smoothed.density, density, rtol=1e-6, atol=1e-9)


def test_defect_products_through_layer_norm_are_off() -> None:
    model, parts, ours = problem_of(nn.LayerNorm)
    (v,) = signs(1, ours.P)
    leaves = list(model.parameters())
    loss = sum(len(t) / 25 * F.cross_entropy(model(x), t) for x, t in parts)
    gradient = torch.autograd.grad(loss, leaves, create_graph=True)  # type: ignore[arg-type]
    slope = (torch.cat([g.flatten() for g in gradient]) * v).sum()
    twice = torch.cat([g.flatten() for g in torch.autograd.grad(slope, leaves)])
    torch.testing.assert_close(ours.hvp(v[None])[0], twice, rtol=1e-10, atol=1e-12)
