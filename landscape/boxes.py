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
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from landscape.evaluate import Bracket, Loss, Params, Point, State, count_of, grid_of
from landscape.logits import half_width

TIGHT = 1e-9


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

    Positions are done one at a time: memory is a few times the head. Not finite in, NaN out. Raises ValueError for what
    doesn't fit.
    """
    epsilons = grid_of("epsilon", epsilon)
    count_of("starts", starts)
    count_of("iterations", iterations)
    packed = head.ndim == 3
    _check_hidden(hidden, head, targets, bias)
    D = hidden.shape[-1]
    runs = head.shape[0] if packed else 1
    x_RPD = hidden.double().reshape(runs, -1, D)
    t_RP = targets.long().reshape(runs, -1)
    if enumerate_up_to >= D:
        signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=D)), dtype=torch.float64, device=hidden.device)
    else:
        signs = None
    # The same corners for every position and run: a value must not depend on its neighbours.
    generator = torch.Generator().manual_seed(seed)
    random = torch.randint(2, (starts, D), generator=generator).double().to(hidden.device) * 2 - 1
    rows = []
    for r in range(runs):
        W = (head[r] if packed else head).double()
        offset = 0.0 if bias is None else (bias[r] if packed else bias).double()
        for x, t in zip(x_RPD[r], t_RP[r], strict=True):
            rows.append(_at_token(x, W, offset, t, epsilons, signs, random, iterations))
    many = isinstance(epsilon, Sequence)
    shape = (*targets.shape, len(epsilons)) if many else targets.shape
    lower, upper, calls = (
        torch.stack([row[i] for row in rows]).reshape(shape) if rows else x_RPD.new_zeros(shape) for i in range(3)
    )
    return Bracket(lower, upper, upper - lower <= TIGHT * upper, calls.long())


def _at_token(
    x: Tensor,
    W: Tensor,
    offset: Tensor | float,
    t: Tensor,
    epsilons: list[float],
    signs: Tensor | None,
    random: Tensor,
    iterations: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Lower, upper and calls, [E] each, at one hidden state [D]."""
    log_p = torch.log_softmax(W @ x + offset, -1)
    p, f = log_p.exp(), -log_p[t]
    u = W - W[t]
    scale = torch.where(x.isfinite().all() & log_p.isfinite().all(), 100 / (1 + f), torch.nan)
    out: list[tuple[Tensor, Tensor, Tensor]] = []
    for eps in epsilons:
        b = half_width(x, eps)

        def rise(d: Tensor) -> Tensor:
            """Of the loss, for moves [..., D]; no cancellation for small ones, no overflow for large."""
            gain = d @ u.T
            small = torch.log1p((p * torch.expm1(gain.clamp(max=1))).sum(-1))
            return torch.where(gain.amax(-1) <= 1, small, torch.logsumexp(log_p + gain, -1))

        upper = rise_bound(p, log_p, u, b)
        if signs is not None:
            lower = torch.stack([rise(part * b).amax() for part in signs.split(256)]).amax()
            upper, calls = lower, len(signs)
        else:
            reach = (log_p + u.abs() @ b).index_fill(0, t, -math.inf)
            d = _starts(u, b, reach.topk(min(len(random), len(W) - 1)).indices, random)
            calls = 0
            for _ in range(iterations):
                slope = torch.softmax(log_p + d @ u.T, -1) @ u
                moved = b * torch.where(slope < 0, -1.0, 1.0)
                calls += len(d)
                if torch.equal(moved, d):
                    break
                d = moved
            lower, calls = rise(d).amax(), calls + len(d)
        out.append((scale * lower, scale * torch.maximum(upper, lower), torch.tensor(float(calls), device=x.device)))
    lowers, uppers, counts = (torch.stack([row[i] for row in out]) for i in range(3))
    return lowers, uppers, counts


def _starts(u: Tensor, b: Tensor, reaching: Tensor, random: Tensor) -> Tensor:
    """[starts, D]: the centre, then by turns the best corner of a wrong token that gets furthest, and a random one."""
    starts = [torch.zeros_like(b)]
    for s in range(1, len(random)):
        wrong = s // 2
        starts.append(b * torch.sign(u[reaching[wrong]]) if s % 2 and wrong < len(reaching) else b * random[s])
    return torch.stack(starts)


def rise_bound(p: Tensor, log_p: Tensor, u: Tensor, b: Tensor) -> Tensor:
    """The least of the two certified bounds of the rise over the box, []; p and log_p [V], u [V, D], b [D]."""
    c = u.abs() @ b
    interval = torch.where(c.amax() <= 1, torch.log1p((p * torch.expm1(c)).sum()), torch.logsumexp(log_p + c, -1))
    sinhc = torch.where(c > 0, c.sinh() / c, 1.0)
    half = (c / 2).sinh()  # cosh c - 1 = 2 sinh(c / 2)^2
    chord = torch.log1p((2 * p * half * half).sum() + b @ ((p * sinhc) @ u).abs())
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
    NaN anywhere on the way gives NaN. n_forward counts evaluations of the pack. Raises ValueError for what doesn't fit.
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
            before, width = point.n_forward, half_width(space.centre, eps)
            if method == "ascent":
                rise, rest = _ascend(point, space, width, base, space.pull(slope), iterations, starts, seed)
            else:
                rise, rest = _lbfgsb(point, space, width, base, iterations)
            calls = torch.full_like(base, point.n_forward - before + 1, dtype=torch.int64)
            results.append((100 * rise / (1 + base), rest, calls))
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
) -> tuple[Tensor, Tensor]:
    """Sign ascent inside the box, step halved where the loss did not rise: rise [R] and whether it came to rest."""
    best, rest = torch.zeros_like(base), torch.ones_like(base, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    for start in range(starts):
        y, value, g = torch.zeros_like(width), base, slope
        if start:
            random = 2 * torch.rand(1, width.shape[1], generator=generator, dtype=torch.float64) - 1
            y = random.to(width.device) * width
            value, pulled = point.slope(space.move(y), space.names)
            g = space.pull(pulled)
        step, worst = torch.full_like(base, 2.0), value
        settled = torch.zeros_like(rest)
        for _ in range(iterations):
            trial = torch.clamp(y + step[:, None] * width * g.sign(), -width, width)
            there, pulled = point.slope(space.move(trial), space.names)
            worst = torch.maximum(worst, there)  # a NaN stays
            settled = (trial == y).all(1)
            rose = there > value
            y, value = torch.where(rose[:, None], trial, y), torch.where(rose, there, value)
            g = torch.where(rose[:, None], space.pull(pulled), g)
            step = torch.where(rose, step, step / 2)
            if bool(settled.all()):
                break
        best, rest = torch.maximum(best, worst - base), rest & settled
    return best, rest


def _lbfgsb(point: Point, space: _Space, width: Tensor, base: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Scipy's L-BFGS-B from the centre, run by run, the others standing still: rise [R] and whether it met its tolerance."""
    from scipy.optimize import minimize  # 0.4 s that who trains should not wait for

    rise, rest = torch.full_like(base, torch.nan), torch.zeros_like(base, dtype=torch.bool)
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
        if not spoilt:
            rise[r] = max(-done.fun - float(base[r]), 0.0)
            rest[r] = bool(done.success)
    return rise, rest
