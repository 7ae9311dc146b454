"""Keskar's sharpness at the logits where the closed form of `logits` does not hold, and as it was first computed.

With label smoothing s and a z-loss of weight c the loss of a token is

    f(z) = L + c L^2 - sum_i y_i z_i,    L = logsumexp(z),    y = (1 - s) onehot(target) + s / V,

and whether it rises with z_i depends on whether p_i exceeds y_i, so on where one stands. It is still convex in z (for L >=
-1 / (2 c), which an L of -5000 at c = 1e-4 would violate), so its maximum over the box is at a corner. With S the logits that
go up, and p the probabilities in the centre of the box,

    change of L = log1p(q),    q = sum_i p_i expm1(-b_i) + sum_{i in S} g_i,    g_i = 2 p_i sinh(b_i),
    change of sum y z = -sum_i y_i b_i + sum_{i in S} h_i,                      h_i = 2 y_i b_i:

only the sums of g and h over S matter, and the loss is concave in the first. So where parts of a logit may go up, the best S is
the first k in the order of h_i / g_i, with at most one part. The V + 1 corners of that kind are tried, and around the best
of them all ways of setting the six logits next to the divide (`lower`). For each of these ways, a tangent of the
concave function bounds what any setting of the other logits can reach by something additive over i, whose best S is
known: the least over the tangent at the corner and a few beside it (`upper`). The two mostly agree, and always for V <= 6.

That needs the loss to be concave in the sum, L >= 1 - 1 / (2 c) all over the box. Elsewhere `upper` comes from the range of L.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from landscape.evaluate import Bracket, grid_of
from landscape.logits import check_logits, half_width, logit_sharpness

TIGHT = 1e-9
NEAR = 6
TANGENTS = 9


def smoothed_logit_sharpness(
    logits: Tensor,
    targets: Tensor,
    epsilon: float | Sequence[float] = 5e-4,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    centred: bool = False,
) -> Bracket:
    """Keskar's sharpness of the cross entropy with label smoothing and z-loss at each token's logits, in percent.

    logits [..., V], targets [...] of an integer dtype -> [...], or [..., E] for a sequence of E epsilons, FP64: `lower` from a
    corner of the box, `upper` certified (but for rounding), `converged` where they agree to 1e-9. label_smoothing in [0, 1) as
    in torch's cross_entropy, z_loss >= 0 the weight of logsumexp^2. Without either, `logit_sharpness`.

    Rounding errors are absolute, around 1e-14 percent for small boxes: a sure token's rise is lost in them. Logits that are
    not finite, and boxes of more than 700 on a side, give NaN. Raises ValueError for what doesn't fit.
    """
    epsilons = grid_of("epsilon", epsilon)
    check_logits(logits, targets)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}; 0.1 is usual")
    if not 0 <= z_loss < float("inf"):
        raise ValueError(f"z_loss must be a weight of at least 0, got {z_loss}; 1e-4 is usual")
    z = logits.double()
    V = z.shape[-1]
    y = torch.full_like(z, label_smoothing / V)
    y.scatter_add_(-1, targets.long().unsqueeze(-1), torch.full_like(z[..., :1], 1 - label_smoothing))
    around = z - z.mean(-1, keepdim=True) if centred else z
    brackets = [_bracket(z, y, half_width(around, eps), z_loss) for eps in epsilons]
    calls = V + 1 + 2 ** min(NEAR, V)
    lower, upper = (torch.stack([pair[i] for pair in brackets], -1) for i in (0, 1))
    if not isinstance(epsilon, Sequence):
        lower, upper = lower.squeeze(-1), upper.squeeze(-1)
    return Bracket(lower, upper, upper - lower <= TIGHT * upper.abs(), torch.full_like(lower, calls, dtype=torch.int64))


def _bracket(z: Tensor, y: Tensor, b: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """Lower and upper sharpness [...] of a box of half-widths b [..., V]."""
    level = torch.logsumexp(z, -1, keepdim=True)
    p = (z - level).exp()
    f = (level + z_loss * level.square()).squeeze(-1) - (y * z).sum(-1)

    def rise(q: Tensor) -> Tensor:
        """Of L + c L^2, when the sum of exponentials grows by the factor 1 + q."""
        grown = torch.log1p(q)
        return grown + z_loss * grown * (2 * level + grown)

    g, h = 2 * p * b.sinh(), 2 * y * b
    q0 = (p * torch.expm1(-b)).sum(-1, keepdim=True)
    free = (y * b).sum(-1, keepdim=True)  # what the linear part gains with every logit down
    order = torch.where(h > 0, h / g, 0.0).argsort(-1)
    up = torch.nn.functional.pad(g.gather(-1, order).cumsum(-1), (1, 0))
    cost = torch.nn.functional.pad(h.gather(-1, order).cumsum(-1), (1, 0))
    k = (rise(q0 + up) - cost).argmax(-1, keepdim=True)
    K = min(NEAR, z.shape[-1])
    first = (k - K // 2).clamp(0, z.shape[-1] - K)  # the logits before the window are up, those after it down
    near = order.gather(-1, first + torch.arange(K, device=z.device))
    g_near, h_near = g.gather(-1, near), h.gather(-1, near)
    g_far, h_far = g.scatter(-1, near, 0.0), h.scatter(-1, near, 0.0)
    g_up, h_up = up.gather(-1, first), cost.gather(-1, first)

    def tangent(q: Tensor) -> tuple[Tensor, Tensor]:
        """The slope at q, and what the tangent there allows the far logits."""
        slope = (1 + 2 * z_loss * (level + torch.log1p(q))) / (1 + q)
        return slope, (slope * g_far - h_far).clamp(min=0).sum(-1, keepdim=True)

    # Tangents that all ways share: at sums from one end of the window to the other.
    ends = q0 + g_up, q0 + up.gather(-1, first + K)
    shared = [(q, *tangent(q)) for q in (torch.lerp(*ends, i / (TANGENTS - 1)) for i in range(TANGENTS))]
    values, bounds = [], []
    for bits in itertools.product((0.0, 1.0), repeat=K):
        chosen = torch.tensor(bits, dtype=z.dtype, device=z.device)
        g_chosen, h_chosen = ((chosen * part).sum(-1, keepdim=True) for part in (g_near, h_near))
        q = q0 + g_up + g_chosen
        value = rise(q) + free - h_up - h_chosen
        slope, far = tangent(q)
        bound = value + far - (slope * g_up - h_up)
        for at, slope, far in shared:
            bound = torch.minimum(bound, rise(at) + slope * (q0 + g_chosen - at) + free - h_chosen + far)
        values.append(value)
        bounds.append(bound)
    most = torch.stack(bounds).amax(0)
    prefixes = (rise(q0 + up) + free - cost).amax(-1, keepdim=True)
    lower = torch.maximum(torch.stack(values).amax(0), prefixes).squeeze(-1).clamp(min=0)  # 0 is the centre
    # Both ends of what L can be: L + c L^2 is convex in L, so largest at an end; and the linear part by itself.
    lowest, highest = q0, (p * torch.expm1(b)).sum(-1, keepdim=True)
    apart = torch.maximum(rise(lowest), rise(highest)) + free
    concave = 1 + 2 * z_loss * (level + torch.log1p(lowest) - 1) >= 0
    upper = torch.where(concave, torch.minimum(most, apart), apart).squeeze(-1)
    finite = (z.isfinite() & (b < 700)).all(-1)
    scale = torch.where(finite, 100 / (1 + f), torch.nan)
    return scale * lower, scale * torch.maximum(upper, lower)


def lbfgsb_logit_sharpness(
    logits: Tensor,
    targets: Tensor,
    epsilon: float | Sequence[float] = 5e-4,
    *,
    iterations: int = 10,
    centred: bool = False,
) -> Bracket:
    """Keskar's sharpness at the logits as Keskar and Lee compute it: ten iterations of L-BFGS-B, for replication.

    Shapes as `logit_sharpness`; FP64, percent. `lower` is what the optimiser reached, `upper` the exact maximum, `n_forward` the
    optimiser's evaluations. It under-reports: at V = 32k it reaches 77 % to 99 %, and 0 where the token is sure. One token
    after the other, on the CPU.
    """
    from scipy.optimize import Bounds, minimize  # 0.4 s that who trains should not wait for

    epsilons = grid_of("epsilon", epsilon)
    check_logits(logits, targets)
    rows = logits.detach().double().cpu().reshape(-1, logits.shape[-1]).numpy()
    found = np.full((len(rows), len(epsilons)), np.nan)
    calls = np.zeros(found.shape, dtype=np.int64)
    for r, (z, t) in enumerate(zip(rows, targets.reshape(-1).tolist(), strict=True)):
        if not np.isfinite(z).all():
            continue

        def descend(at: np.ndarray, t: int = t) -> tuple[float, np.ndarray]:
            level = np.logaddexp.reduce(at)
            slope = np.exp(at - level)
            slope[t] -= 1
            return at[t] - level, -slope

        for e, eps in enumerate(epsilons):
            box = eps * (np.abs(z - z.mean() * centred) + 1)
            limits = Bounds(z - box, z + box)  # pairs would be taken apart one by one, half of the time
            done = minimize(descend, z, jac=True, method="L-BFGS-B", bounds=limits, options={"maxiter": iterations})
            f = -descend(z)[0]
            found[r, e], calls[r, e] = 100 * (-done.fun - f) / (1 + f), done.nfev
    shape = (*targets.shape, len(epsilons)) if isinstance(epsilon, Sequence) else targets.shape
    lower = torch.from_numpy(found).reshape(shape).to(logits.device)
    upper = logit_sharpness(logits.double(), targets, epsilon, centred=centred)
    n_forward = torch.from_numpy(calls).reshape(shape).to(logits.device)
    return Bracket(lower, upper, upper - lower <= TIGHT * upper, n_forward)
