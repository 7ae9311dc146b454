"""Keskar's box, epsilon (|x| + 1) on each side of x, at other places than the logits.

At the final hidden state x of a token, under a linear LM head W, the rise of the cross entropy with target t is

    r(d) = log sum_i p_i exp(u_i . d),    u_i = W_i - W_t,    |d_j| <= b_j,

convex in d, so largest at a corner, but there are 2^D of them. From below: d <- b sign(grad r(d)) never falls (a convex function
lies above its tangent, which is largest exactly there) and comes to rest at a corner, from several starts. From above, both for
any d, with c_i = sum_j |u_ij| b_j the most that logit i can gain on the target:

    r <= log1p(sum_i p_i expm1(c_i)),
    r <= log1p(sum_i p_i (cosh c_i - 1) + sum_j b_j |sum_i p_i u_ij sinh(c_i) / c_i|).

The second replaces each exponential by its chord over [-c_i, c_i], which makes the sum linear in d: it exceeds r by terms of
order c^2 only, and the least of the two is reported.

At parameters or embeddings, for any loss, the maximum is only sought (`lower`, no `upper`): by sign ascent with step halving, for
all runs at once, or by L-BFGS-B as Keskar et al. 2017 (1609.04836) do. In a random subspace of dimension p the box is
theirs: x + A y with |y_i| <= epsilon (|(A^+ x)_i| + 1), here with orthonormal columns, so that A^+ is A transposed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from landscape.evaluate import Bracket, Loss, Params, Point, State, count_of, grid_of
from landscape.logits import half_width

TIGHT = 1e-9
# Tokens done together, as long as their tensors have no more elements than this (32 MB); corners together where all are tried.
GROUP, AT_ONCE, CORNERS = 32, 2**22, 256


def hidden_sharpness(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    epsilon: float | Sequence[float] = 5e-4,
    *,
    bias: Tensor | None = None,
    starts: int = 4,
    iterations: int = 20,
    enumerate_up_to: int = 10,
    seed: int = 0,
) -> Bracket:
    """Keskar's sharpness of the cross entropy at each token's final hidden state, in percent.

    hidden [..., D], head [V, D] (logits = hidden @ head.T + bias), targets [...] -> [...], or [..., E] for E epsilons, FP64.
    With a run axis: hidden [R, ..., D], head [R, V, D], bias [R, V]. `lower` is from corners that were tried, `upper` is
    certified (but for rounding), `converged` where they agree to 1e-9: always for D <= enumerate_up_to, where every corner is
    tried. `starts` counts the centre, then by turns the best corner of the wrong token that can get furthest (then the next)
    and a random corner. From two starts on, the loss at the best corner found is within log V of the maximum.

    Positions and runs are done together, 32 at once or as many as take 32 MB a tensor, one at least: then memory is a few times
    a head's in FP64. Not finite in, NaN out. Raises ValueError for what doesn't fit.
    """
    epsilons = grid_of("epsilon", epsilon)
    count_of("starts", starts)
    count_of("iterations", iterations)
    _check_hidden(hidden, head, targets, bias)
    (V, D), tokens = head.shape[-2:], targets.numel()
    x_ND, t_N = hidden.double().reshape(-1, D), targets.long().reshape(-1)
    run_N = torch.arange(tokens, device=hidden.device) // max(1, tokens // (head.shape[0] if head.ndim == 3 else 1))
    W, offset = head.reshape(-1, V, D), None if bias is None else bias.reshape(-1, V)
    signs = torch.tensor(
        list(itertools.product((-1.0, 1.0), repeat=D)) if enumerate_up_to >= D else [], dtype=torch.float64
    )
    # The same corners for every position and run: a value must not depend on its neighbours.
    generator = torch.Generator().manual_seed(seed)
    random = torch.randint(2, (starts, D), generator=generator).double() * 2 - 1
    signs, random = signs.to(hidden.device), random.to(hidden.device)
    # A group is always as long, by repeating its last token, since the bits of a product depend on how many there are.
    group = max(1, min(GROUP, AT_ONCE // (V * max(D, starts, min(CORNERS, len(signs))))))
    shape = (len(epsilons), tokens)
    lower, upper, calls = (torch.zeros(shape, dtype=torch.float64, device=hidden.device) for _ in range(3))
    for first in range(0, tokens, group):
        own = slice(first, min(first + group, tokens))
        at = torch.arange(first, first + group, device=hidden.device).clamp(max=tokens - 1)
        moved = _Tokens.at(x_ND[at], W, offset, t_N[at], run_N[at])
        for e, eps in enumerate(epsilons):
            found = _corners(moved, half_width(moved.x, eps), signs, random, iterations)
            for whole, part in zip((lower, upper, calls), found, strict=True):
                whole[e, own] = part[: own.stop - own.start]
    many = isinstance(epsilon, Sequence)
    lower, upper, calls = (
        v.T.reshape(*targets.shape, len(epsilons)) if many else v[0].reshape(targets.shape)
        for v in (lower, upper, calls)
    )
    return Bracket(lower, upper, upper - lower <= TIGHT * upper, calls.long())


class _Tokens(NamedTuple):
    """Where a group of n tokens stands, in the module's names."""

    x: Tensor  # [n, D]
    u: Tensor  # [n, V, D]
    log_p: Tensor  # [n, V]
    target: Tensor  # [n, 1]
    scale: Tensor  # [n], percent for a rise of the loss; NaN where something is not finite

    @classmethod
    def at(cls, x: Tensor, heads: Tensor, bias: Tensor | None, t: Tensor, run: Tensor) -> _Tokens:
        """For tokens x [n, D] with targets t [n] of runs run [n], whose heads are [R, V, D]."""
        W, target = heads[run].double(), t.unsqueeze(-1)
        z = (W @ x.unsqueeze(-1)).squeeze(-1)
        log_p = torch.log_softmax(z if bias is None else z + bias[run].double(), -1)
        f = -log_p.gather(-1, target).squeeze(-1)
        own = W.gather(1, target.unsqueeze(-1).expand(-1, 1, W.shape[2]))
        finite = x.isfinite().all(-1) & log_p.isfinite().all(-1)
        return cls(x, W - own, log_p, target, torch.where(finite, 100 / (1 + f), torch.nan))

    def rise(self, d: Tensor) -> Tensor:
        """Of the loss, [n, S] for moves [n, S, D]; no cancellation for small ones, no overflow for large."""
        gain, log_p = d @ self.u.mT, self.log_p.unsqueeze(1)
        small = torch.log1p((log_p.exp() * torch.expm1(gain.clamp(max=1))).sum(-1))
        return torch.where(gain.amax(-1) <= 1, small, torch.logsumexp(log_p + gain, -1))


def _corners(at: _Tokens, b: Tensor, signs: Tensor, random: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lower, upper and calls, [n] each, in the boxes of half-widths b [n, D]."""
    b_n1D = b.unsqueeze(1)
    if len(signs):
        lower = torch.stack([at.rise(part * b_n1D).amax(1) for part in signs.split(CORNERS)]).amax(0)
        return at.scale * lower, at.scale * lower, torch.full_like(lower, len(signs))
    d = _starts(at, b_n1D, random)
    calls, going = torch.zeros_like(at.scale), torch.ones_like(at.scale, dtype=torch.bool)
    for _ in range(iterations):
        slope = torch.softmax(at.log_p.unsqueeze(1) + d @ at.u.mT, -1) @ at.u
        moved = b_n1D * torch.where(slope < 0, -1.0, 1.0)
        calls += going * d.shape[1]
        going, d = (moved != d).any(2).any(1), moved
        if not going.any():
            break
    lower, upper = at.rise(d).amax(1), rise_bound(at.log_p.exp(), at.log_p, at.u, b)
    return at.scale * lower, at.scale * torch.maximum(upper, lower), calls + d.shape[1]


def _starts(at: _Tokens, b: Tensor, random: Tensor) -> Tensor:
    """[n, starts, D]: the centre, then by turns the best corner of a wrong token that gets furthest, and a random one."""
    reach = (at.log_p + (at.u.abs() @ b.mT).squeeze(-1)).scatter(-1, at.target, -math.inf)
    furthest = reach.topk(min(len(random), reach.shape[1] - 1)).indices
    starts = [torch.zeros_like(b)]
    for s in range(1, len(random)):
        if s % 2 and s // 2 < furthest.shape[1]:
            best = at.u.gather(1, furthest[:, s // 2, None, None].expand(-1, 1, at.u.shape[2]))
            starts.append(b * torch.sign(best))
        else:
            starts.append(b * random[s])
    return torch.cat(starts, 1)


def rise_bound(p: Tensor, log_p: Tensor, u: Tensor, b: Tensor) -> Tensor:
    """The least of the two certified bounds of the rise over the box, [...]; p and log_p [..., V], u [..., V, D], b [..., D]."""
    c = (u.abs() @ b.unsqueeze(-1)).squeeze(-1)
    interval = torch.where(c.amax(-1) <= 1, torch.log1p((p * torch.expm1(c)).sum(-1)), torch.logsumexp(log_p + c, -1))
    sinhc = torch.where(c > 0, c.sinh() / c, 1.0)
    half = (c / 2).sinh()  # cosh c - 1 = 2 sinh(c / 2)^2
    slope = ((p * sinhc).unsqueeze(-2) @ u).squeeze(-2)
    chord = torch.log1p((2 * p * half * half).sum(-1) + (b * slope.abs()).sum(-1))
    return torch.where(chord.isnan(), interval, torch.minimum(chord, interval))  # sinh overflows above c = 710


def _check_hidden(hidden: Tensor, head: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    if not hidden.is_floating_point() or not head.is_floating_point():
        raise ValueError(f"hidden and head must be of floating dtypes, got {hidden.dtype} and {head.dtype}")
    if head.ndim not in (2, 3) or hidden.ndim < 1 or hidden.shape[-1] != head.shape[-1] or head.shape[-2] < 2:
        raise ValueError(
            f"hidden [..., D] needs a head [V, D] or [R, V, D], V >= 2, got {tuple(hidden.shape)} and {tuple(head.shape)}"
        )
    if head.ndim == 3 and (hidden.ndim < 2 or hidden.shape[0] != head.shape[0]):
        raise ValueError(
            f"a head of {head.shape[0]} runs needs hidden [{head.shape[0]}, ..., D], got {tuple(hidden.shape)}"
        )
    if targets.shape != hidden.shape[:-1] or targets.is_floating_point() or targets.dtype == torch.bool:
        raise ValueError(
            f"targets must be integers {tuple(hidden.shape[:-1])}, got {targets.dtype} {tuple(targets.shape)}"
        )
    V = head.shape[-2]
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < V:
        found = f"{int(targets.min())}..{int(targets.max())}"
        raise ValueError(f"targets must be in 0..{V - 1}, got {found}; leave ignored tokens out")
    if bias is not None and bias.shape != head.shape[:-1]:
        raise ValueError(f"bias must be {tuple(head.shape[:-1])}, got {tuple(bias.shape)}")


def box_sharpness(
    loss: Loss,
    params: Mapping[str, Tensor],
    batch: Any = None,
    epsilon: float | Sequence[float] = 5e-4,
    *,
    names: Iterable[str] | None = None,
    subspace: int | None = None,
    method: Literal["ascent", "lbfgsb"] = "ascent",
    iterations: int = 10,
    starts: int = 1,
    seed: int = 0,
    run_axis: bool = False,
    state: State = (),
) -> Bracket:
    """Keskar's sharpness in the weights, the embeddings or any tensors: a lower bound, in percent.

    loss(params, batch) -> scalar, or [R] with `run_axis`; it may write to `state`. `names` moves some tensors only (token
    embeddings, say). Returns [], [R], [E] or [R, E], FP64. `subspace` p looks in p random directions; they take p times the
    moved tensors' memory in FP64 and are the same for all runs. Method "ascent" is for all runs at once; "lbfgsb", the
    original's, takes one run after the other, each evaluation of a pack of R serving one. `starts`: the centre, then random
    points of the box ("ascent" alone).

    `converged` tells whether the ascent came to rest ("lbfgsb": its own tolerance), not that the maximum is global. A loss of
    NaN anywhere on the way gives NaN. n_forward counts a run's evaluations until it was done. Raises ValueError for what doesn't
    fit.
    """
    epsilons = grid_of("epsilon", epsilon)
    count_of("iterations", iterations)
    count_of("starts", starts)
    if method not in ("ascent", "lbfgsb"):
        raise ValueError(f'method must be "ascent" or "lbfgsb", got {method!r}')
    with Point(loss, params, batch, run_axis, state) as point:
        chosen = list(point.params) if names is None else list(names)
        if unknown := set(chosen) - point.params.keys():
            raise ValueError(f"names must be among the parameters {sorted(point.params)}, got {sorted(unknown)}")
        space = _Space(point, chosen, subspace, seed)
        base, slope = point.slope(None, chosen)
        results = []
        for eps in epsilons:
            width = half_width(space.centre, eps)
            if method == "ascent":
                rise, rest, calls = _ascend(point, space, width, base, space.pull(slope), iterations, starts, seed)
            else:
                rise, rest, calls = _lbfgsb(point, space, width, base, iterations)
            results.append((100 * rise / (1 + base), rest, calls + 1))
    lower, converged, n_forward = (
        torch.stack([row[i] for row in results], -1) if isinstance(epsilon, Sequence) else results[0][i]
        for i in range(3)
    )
    return Bracket(point.finish(lower), None, point.finish(converged), point.finish(n_forward))


class _Space:
    """Coordinates y [R, n] of moves of some parameters: the parameters themselves, or n random orthonormal directions."""

    def __init__(self, point: Point, names: list[str], dimension: int | None, seed: int) -> None:
        self.point, self.names = point, names
        self.basis: Tensor | None = None
        flat = torch.cat([point.flat(point.params[name]).double() for name in names], 1)
        if dimension is not None:
            if not 1 <= dimension <= flat.shape[1]:
                raise ValueError(f"subspace must be 1..{flat.shape[1]}, the number of coordinates, got {dimension}")
            generator = torch.Generator().manual_seed(seed)
            random = torch.randn(flat.shape[1], dimension, generator=generator, dtype=torch.float64)
            self.basis = torch.linalg.qr(random).Q.to(flat.device)
        self.centre = flat if self.basis is None else flat @ self.basis

    def move(self, y: Tensor) -> Params:
        """Y [R, n] as changes of the parameters."""
        flat = y if self.basis is None else y @ self.basis.T
        delta, done = {}, 0
        for name in self.names:
            value = self.point.params[name]
            size = value.numel() // self.point.runs
            delta[name] = flat[:, done : done + size].reshape(value.shape).to(value.dtype)
            done += size
        return delta

    def pull(self, gradient: Params) -> Tensor:
        """A gradient in the parameters as one in y, [R, n]."""
        flat = torch.cat([self.point.flat(gradient[name]).double() for name in self.names], 1)
        return flat if self.basis is None else flat @ self.basis


def _ascend(
    point: Point, space: _Space, width: Tensor, base: Tensor, slope: Tensor, iterations: int, starts: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Sign ascent inside the box, step halved where the loss did not rise: rise, whether it came to rest, and calls, [R] each."""
    best, rest = torch.zeros_like(base), torch.ones_like(base, dtype=torch.bool)
    calls = torch.zeros_like(base, dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    for start in range(starts):
        y, value, g = torch.zeros_like(width), base, slope
        if start:
            random = 2 * torch.rand(1, width.shape[1], generator=generator, dtype=torch.float64) - 1
            y = random.to(width.device) * width
            value, pulled = point.slope(space.move(y), space.names)
            g = space.pull(pulled)
            calls += 1
        step, worst = torch.full_like(base, 2.0), value
        settled = torch.zeros_like(rest)
        for _ in range(iterations):
            calls += ~(settled | worst.isnan())
            trial = torch.clamp(y + step[:, None] * width * g.sign(), -width, width)
            there, pulled = point.slope(space.move(trial), space.names)
            worst = torch.maximum(worst, there)  # a NaN stays
            settled = (trial == y).all(1)
            rose = there > value
            y, value = torch.where(rose[:, None], trial, y), torch.where(rose, there, value)
            g = torch.where(rose[:, None], space.pull(pulled), g)
            step = torch.where(rose, step, step / 2)
            if bool((settled | worst.isnan()).all()):
                break
        best, rest = torch.maximum(best, worst - base), rest & settled
    return best, rest, calls


def _lbfgsb(point: Point, space: _Space, width: Tensor, base: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scipy's L-BFGS-B from the centre, run by run, the others standing still: rise, whether it met its tolerance, and calls."""
    from scipy.optimize import minimize  # 0.4 s that who trains should not wait for

    rise, rest = torch.full_like(base, torch.nan), torch.zeros_like(base, dtype=torch.bool)
    calls = torch.zeros_like(base, dtype=torch.int64)
    for r in range(point.runs):
        spoilt = False

        def descend(y: np.ndarray, r: int = r) -> tuple[float, np.ndarray]:
            nonlocal spoilt
            moves = torch.zeros_like(width)
            moves[r] = torch.from_numpy(y).to(width.device)
            there, pulled = point.slope(space.move(moves), space.names)
            spoilt = spoilt or bool(there[r].isnan())
            return -float(there[r]), -space.pull(pulled)[r].cpu().numpy()

        box = width[r].cpu().numpy()
        done = minimize(
            descend,
            np.zeros_like(box),
            jac=True,
            method="L-BFGS-B",
            bounds=np.stack([-box, box], 1),
            options={"maxiter": iterations},
        )
        calls[r] = done.nfev
        if not spoilt:
            rise[r] = max(-done.fun - float(base[r]), 0.0)
            rest[r] = bool(done.success)
    return rise, rest, calls
