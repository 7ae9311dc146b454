"""Lanczos' method for a stack of R symmetric operators at once, each as if it were alone.

From a start v_1, each step multiplies once, w = A v_j, and takes out of w what lies along v_1 ... v_j. What is taken out is the
projected matrix T = V^T A V, whose eigenvalues (Ritz values) approach those of A from inside, the outer ones first. After the two
neighbours, which suffice in exact arithmetic, all earlier vectors are taken out: else the basis loses its orthogonality as soon
as an eigenvalue converges, and finds it again and again.

A basis that is full is restarted thick (Wu & Simon 2000): the best Ritz vectors are kept, with the next vector of the recurrence,
so memory does not grow with the number of steps: `basis` + 1 vectors of R P numbers. They may lie elsewhere than the operator
works, in a host's memory beside a GPU: each product then takes a vector each way, and the host makes it orthogonal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Operator = Callable[[Tensor], Tensor]  # [R, P] -> [R, P], symmetric for each run
SLAB = 2**26  # elements of a basis that are restarted at a time
STRETCH = 2**14  # of a vector, that an inner product is the sum of


class Largest(NamedTuple):
    """The largest eigenvalues found, of each run when it was done."""

    values: Tensor  # [R, k], largest first; NaN where the operator gave NaN
    vectors: Tensor  # [R, k, P], of length 1
    bounds: Tensor  # [R, k], the recurrence's residuals
    converged: Tensor  # [R], whether all k residuals met the tolerance
    products: Tensor  # [R], products until then
    sizes: Tensor  # [R, k], what the tolerance is relative to


class Basis:
    """Orthonormal vectors V [m, R, Q] and the projected matrix T [R, m, m], in FP64; on a device of their own, if told.

    Q is P filled up with zeros to whole stretches, since a library's product of a few long rows with a vector keeps a row to a
    few of a GPU's multiprocessors: rows are cut, the pieces multiplied beside each other, and their sums added in FP64.
    """

    def __init__(self, start: Tensor, size: int, fresh: bool, on: torch.device | None = None) -> None:
        R, self.P = start.shape
        self.works_on, start = start.device, start.to(on or start.device)
        stretch = min(self.P, STRETCH)
        self.V = start.new_zeros(size + 1, R, -(-self.P // stretch) * stretch)
        self.cut = (-1, stretch)
        self.T = torch.zeros(R, size, size, dtype=torch.float64, device=start.device)
        self.V[0, :, : self.P] = start / start.norm(dim=1, keepdim=True)
        self.length, self.fresh = 0, fresh
        self.rest = torch.zeros(R, dtype=torch.float64, device=start.device)

    def extend(self, apply: Operator) -> None:
        """Multiply the newest vector, and make the next of what is left; where nothing is, the space is invariant."""
        j = self.length
        w = self.V[j + 1]
        w[:, : self.P] = apply(self.V[j, :, : self.P].to(self.works_on))
        size = w.norm(dim=1)
        taken = self.orthogonalise(w, j + 1, max(0, j - 1))
        rest = w.norm(dim=1)
        # What rounding leaves of w, where nothing should be left, is no direction.
        gone = rest <= 10 * (j + 1) * torch.finfo(w.dtype).eps * size
        rest = torch.where(gone, torch.zeros_like(rest), rest)
        w /= rest[:, None]
        if gone.any():
            w.copy_(torch.where(gone[:, None], self.beyond(j + 1), w))
        self.T[:, : j + 1, j] = taken
        self.T[:, j, : j + 1] = taken
        self.rest = rest.double()
        self.length = j + 1

    def orthogonalise(self, w: Tensor, m: int, since: int = 0) -> Tensor:
        """Take out of w [R, Q], in place, what lies along vectors since .. m, and then along the first m: [R, m], in FP64."""
        R = len(w)
        taken = torch.zeros(R, m, dtype=torch.float64, device=w.device)
        for first in (since, 0):
            vectors = self.V[first:m]
            pieces = vectors.view(m - first, *self.cut).transpose(0, 1) @ w.view(*self.cut, 1)
            along = pieces.view(R, -1, m - first).sum(1, dtype=torch.float64)
            w[:, None].baddbmm_(along[:, None].to(w), vectors.transpose(0, 1), alpha=-1)
            taken[:, first:] += along
        return taken

    def beyond(self, j: int) -> Tensor:
        """A next vector for an invariant space: zero, or a random one orthogonal to the first j, to look further."""
        w = torch.zeros_like(self.V[j])
        if self.fresh and j < self.P:
            w[:, : self.P] = torch.randn(self.P, generator=torch.Generator().manual_seed(j), dtype=torch.float64).to(w)
            self.orthogonalise(w, j)
            w = w / w.norm(dim=1, keepdim=True)
        return w

    def combined(self, run: int, weights: Tensor) -> Tensor:
        """Combinations [k, P] of a run's first m vectors by weights [m, k]."""
        return weights.T.to(self.V) @ self.V[: len(weights), run, : self.P]

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Ritz values [R, m], ascending, and the eigenvectors of T, [R, m, m]; NaN of a run whose T has one."""
        T = self.T[:, : self.length, : self.length]
        finite = T.isfinite().all((1, 2))
        values, vectors = torch.linalg.eigh(torch.where(finite[:, None, None], T, 0.0).cpu())
        values, vectors = values.to(T), vectors.to(T)
        values[~finite] = torch.nan
        return values, vectors

    def restart(self, keep: int) -> None:
        """Keep the best Ritz vectors and the next vector, and forget the others."""
        values, vectors = self.ritz()
        best = vectors[:, :, -keep:].to(self.V.dtype)
        # In slabs of the parameters, so that no second basis lies beside this one.
        slab = max(1, SLAB // (self.V.shape[1] * self.length))
        for part in self.V.split(slab, 2):
            part[:keep] = torch.einsum("rmk,mrp->krp", best, part[: self.length])
        self.V[keep] = self.V[self.length]
        self.T.zero_()
        self.T[:, :keep, :keep] = torch.diag_embed(values[:, -keep:])
        self.length = keep


def largest(
    apply: Operator,
    start: Tensor,
    k: int,
    basis: int,
    products: int,
    tolerance: float,
    on: torch.device | None = None,
    of_operator: bool = False,
) -> Largest:
    """The k algebraically largest eigenvalues of each run's operator, from a start [R, P].

    basis: vectors held at most, beyond k; products: at most. on: where the basis lies. A run is done when all k residuals are
    within tolerance times the eigenvalue's size, or with `of_operator` the operator's, the largest size of a Ritz value so far:
    an eigenvalue that may be 0 has no size of its own. It keeps what it had then: what other runs still need changes nothing of
    it. An eigenvalue that repeats is found once, as by any method that starts from a single vector.
    """
    R, P = start.shape
    space = Basis(start, min(basis, P), fresh=True, on=on)
    device = space.V.device
    values = torch.full((R, k), torch.nan, dtype=torch.float64, device=device)
    bounds, sizes, vectors = values.clone(), values.clone(), space.V.new_full((R, k, P), torch.nan)
    norm = torch.zeros(R, 1, dtype=torch.float64, device=device)
    done = torch.zeros(R, dtype=torch.bool, device=device)
    converged, counts = done.clone(), torch.zeros(R, dtype=torch.int64, device=device)
    # Of runs that are done, how their vectors combine the basis, which takes a pass over it: once before it changes.
    awaited = dict[int, Tensor]()
    for n in range(1, products + 1):
        space.extend(apply)
        m = space.length
        theta, y = space.ritz()
        broken = theta.isnan().any(1)
        norm = torch.maximum(norm, theta.abs().amax(1, keepdim=True))
        found = torch.zeros_like(done)
        if m >= k:
            residuals = space.rest[:, None] * y[:, -1, -k:].abs()
            size = norm.expand(-1, k) if of_operator else theta[:, -k:].abs()
            found = (residuals <= tolerance * size).all(1)
        ended = (space.rest == 0) if m >= k else torch.zeros_like(done)
        stop = (found | broken | ended | torch.tensor(n == products, device=device)) & ~done
        counts[~done] = n
        if stop.any() and m >= k:
            awaited |= {run: y[run, :, -k:].flip(1) for run in stop.nonzero().flatten().tolist()}
            values[stop] = theta[stop][:, -k:].flip(1)
            bounds[stop], converged[stop] = residuals[stop].flip(1), found[stop] & ~broken[stop]
            sizes[stop] = size[stop].flip(1)
        done |= stop
        full = m == space.T.shape[1]
        if full or done.all():
            for run, weights in awaited.items():
                vectors[run] = space.combined(run, weights)
            awaited.clear()
        if done.all():
            break
        if full:
            space.restart(min(m - 1, k + (m - k) // 2))
    return Largest(*(found.to(start.device) for found in (values, vectors, bounds, converged, counts, sizes)))


def quadrature(apply: Operator, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights [R, steps] of the Gauss quadrature of a start's spectral measure, weights adding to 1.

    Where the space becomes invariant before the last step, the nodes beyond are zero, of weight zero.
    """
    space = Basis(start, steps, fresh=False)
    for _ in range(steps):
        space.extend(apply)
    nodes, vectors = space.ritz()
    weights = vectors[:, 0].square()
    return nodes, torch.where(nodes.isnan(), nodes, weights)
