"""Lanczos' method for a stack of R symmetric operators at once, each as if it were alone.

From a start v_1, each step multiplies once, w = A v_j, and takes out of w what lies along v_1 ... v_j. What is taken out is the
projected matrix T = V^T A V, whose eigenvalues (Ritz values) approach those of A from inside, the outer ones first. After the two
neighbours, which suffice in exact arithmetic, all earlier vectors are taken out: else the basis loses its orthogonality as soon
as an eigenvalue converges, and finds it again and again.

A basis that is full is restarted thick (Wu & Simon 2000): the best Ritz vectors are kept, with the next vector of the recurrence,
so memory does not grow with the number of steps: `basis` + 1 vectors of R P numbers. They may lie elsewhere than the operator
works, in a host's memory beside a GPU: each product then takes a vector each way, and the host makes it orthogonal.

Some runs take several times the steps of others. So runs stand in groups, each with a basis of its own, and as soon as those that
are not done fit into fewer groups, those of one group move into places of others where a run is done, and the group is gone. All
groups are as large, and all runs at the same step: a run's bits are those that it has beside any others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Operator = Callable[[Tensor], Tensor]  # [R, P] -> [R, P], symmetric for each run


class OfRuns(Protocol):
    """Operators of some runs, [n, P] -> [n, P] by their numbers, or of all."""

    def __call__(self, v: Tensor, runs: Sequence[int] | None) -> Tensor:
        """Multiply."""


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
        self.multiply(apply)
        self.take_out()

    def multiply(self, apply: Operator) -> None:
        """The first half of `extend`, in which the host waits for nothing."""
        self.V[self.length + 1, :, : self.P] = apply(self.V[self.length, :, : self.P].to(self.works_on))

    def take_out(self) -> None:
        """The second half."""
        j = self.length
        w = self.V[j + 1]
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
    apply: OfRuns,
    start: Tensor,
    k: int,
    basis: int,
    products: int,
    tolerance: float,
    on: torch.device | None = None,
    of_operator: bool = False,
    group: int | None = None,
    asked: Sequence[int] | None = None,
) -> Largest:
    """The k algebraically largest eigenvalues of each run's operator, from a start [R, P].

    basis: vectors held at most, beyond k; products: at most. on: where the basis lies. A run is done when all k residuals are
    within tolerance times the eigenvalue's size, or with `of_operator` the operator's, the largest size of a Ritz value so far:
    an eigenvalue that may be 0 has no size of its own. It keeps what it had then: what other runs still need changes nothing of
    it, and a run that is done, or whose operator gave NaN, costs nothing as soon as `group` of these are (see this module).
    asked: of which runs; of the others nothing is known, NaN, after no product. An eigenvalue that repeats is found once, as by
    any method that starts from a single vector.
    """
    R, P = start.shape
    device = on or start.device
    values = torch.full((R, k), torch.nan, dtype=torch.float64, device=device)
    counts = torch.zeros(R, dtype=torch.int64, device=device)
    vectors = start.new_full((R, k, P), torch.nan, device=device)
    into = Largest(values, vectors, values.clone(), counts.bool(), counts, values.clone())
    runs = list(range(R) if asked is None else asked)
    width = min(group or R, R)
    groups = [_Group(start, runs[i : i + width], width, min(basis, P), on, into) for i in range(0, len(runs), width)]
    for n in range(1, products + 1):
        for of in groups:
            rows = None if of.rows == list(range(R)) else of.rows
            of.space.multiply(functools.partial(apply, runs=rows))
        for of in groups:  # only now, since a GPU's host waits there for what it was given
            of.space.take_out()
            of.judge(n, tolerance, of_operator=of_operator, last=n == products)
        groups = _closed_up(groups)
        if not groups:
            break
        for of in groups:
            m = of.space.length
            if m == of.space.T.shape[1]:
                of.space.restart(min(m - 1, k + (m - k) // 2))
    return Largest(*(found.to(start.device) for found in into))


class _Group:
    """Runs that are multiplied together, in the slots of one basis: whose operator acts in each, and who is not done."""

    def __init__(
        self, start: Tensor, runs: list[int], width: int, basis: int, on: torch.device | None, into: Largest
    ) -> None:
        self.rows = [*runs, *[runs[-1]] * (width - len(runs))]
        self.runs: dict[int, int] = dict(enumerate(runs))
        self.space = Basis(
            start if self.rows == list(range(len(start))) else start[self.rows], basis, fresh=True, on=on
        )
        self.norm = torch.zeros(width, 1, dtype=torch.float64, device=self.space.V.device)
        self.into = into

    def judge(self, n: int, tolerance: float, *, of_operator: bool, last: bool) -> None:
        """Who is done after n products: what was found goes to where it is asked for, before the basis changes."""
        space, k, m = self.space, self.into.values.shape[1], self.space.length
        theta, y = space.ritz()
        broken = theta.isnan().any(1)
        self.norm = torch.maximum(self.norm, theta.abs().amax(1, keepdim=True))
        found = ended = torch.zeros_like(broken)
        if m >= k:
            residuals = space.rest[:, None] * y[:, -1, -k:].abs()
            sizes = self.norm.expand(-1, k) if of_operator else theta[:, -k:].abs()
            found, ended = (residuals <= tolerance * sizes).all(1), space.rest == 0
        stop = (found | broken | ended).tolist()
        for slot, run in list(self.runs.items()):
            if not (stop[slot] or last):
                continue
            self.into.products[run] = n
            del self.runs[slot]
            if m < k:
                continue
            self.into.values[run], self.into.bounds[run] = theta[slot, -k:].flip(0), residuals[slot].flip(0)
            self.into.sizes[run], self.into.converged[run] = sizes[slot].flip(0), found[slot] & ~broken[slot]
            self.into.vectors[run] = space.combined(slot, y[slot, :, -k:].flip(1))

    def take_in(self, other: _Group) -> None:
        """Runs of another group that are not done, as many as there are places of done ones here; all are at the same step."""
        free = [slot for slot in range(len(self.rows)) if slot not in self.runs]
        m = self.space.length
        for to, (slot, run) in zip(free, list(other.runs.items()), strict=False):
            self.space.V[: m + 1, to] = other.space.V[: m + 1, slot]
            self.space.T[to], self.space.rest[to] = other.space.T[slot], other.space.rest[slot]
            self.norm[to], self.rows[to], self.runs[to] = other.norm[slot], run, run
            del other.runs[slot]


def _closed_up(groups: list[_Group]) -> list[_Group]:
    """The least number of groups of the same width that hold all runs which are not done."""
    groups = sorted(groups, key=lambda group: -len(group.runs))
    waiting = sum(len(group.runs) for group in groups)
    while groups and waiting <= (len(groups) - 1) * len(groups[0].rows):
        leaving = groups.pop()
        for group in groups:
            group.take_in(leaving)
    return groups


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
