"""Blocks at which a scaled quantiser has to be right: both sides of every step of its scale, and of its elements under it.

A block's scale depends on amax alone. In every binade (or some of them) amax takes the values at which a rule steps and their
neighbours: powers of two, multiples of the largest element, its halfway points, the mantissas that round up a binade. The other
elements of such a block are decision points of the element format times that scale, and their neighbours, as far as they are no
larger. Besides: zeros of both signs, subnormals, the ends of the range.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from formats.scaled import Granularity, ScaledFormat, rules_for
from verification import oracle
from verification.block_oracle import decision_points, scales_of, significant_length, tensor_scale
from verification.laws import Floats

ROW = 32
TENSORS = 192
BINADES = {"quick": 12, "conditional": 277}
LARGEST = {"float32": 3.4028234663852886e38, "bfloat16": 3.3895313892515355e38, "float16": 65504.0}
SMALLEST = {"float32": -149, "bfloat16": -133, "float16": -24}


def block_size(f: ScaledFormat) -> int:
    """Elements that a block of ours has: the format's, or 32 for rows and tensors."""
    return f.elements_per_scale or ROW


def beside_others(f: ScaledFormat) -> int:
    """Where in a block one element is made another than the rest: the second place, or the only one."""
    return min(1, block_size(f) - 1)


def decision_blocks(f: ScaledFormat, dtype: torch.dtype, level: str) -> list[Tensor]:
    """Finite blocks of the dtype, the same every time, as the tensors [B, n] to be given: where a scale is one for the tensor, or
    another stands above those of blocks, several small ones, so that there are several such scales.
    """
    name = str(dtype).removeprefix("torch.")
    n = block_size(f)
    rng = np.random.default_rng(2405)
    edges = _edges(n, name, dtype)
    if f.has_tensor_scale and f.granularity is not Granularity.TENSOR:
        tops = range(*{"float32": (-100, 101, 25), "bfloat16": (-100, 101, 25), "float16": (0, 16, 5)}[name])
        ranges = [_amaxes(f, name, "conditional", top - 16, top) for top in tops]
        return [*edges.split(1), *(_filled(f, amax, n, name, rng).to(dtype) for amax in ranges if len(amax))]
    amax = _amaxes(f, name, level)
    if f.granularity is Granularity.TENSOR:
        amax = amax[:: max(1, len(amax) // TENSORS)]
        alone = amax[:, None] if f.has_tensor_scale else [amax]  # such a scale is that of its own tensor
        return [*edges.split(1), *(row for one in alone for row in _filled(f, one, n, name, rng).to(dtype).split(1))]
    return [torch.cat([edges, _filled(f, amax, n, name, rng).to(dtype)])]


def _amaxes(f: ScaledFormat, dtype: str, level: str, low: int = -149, high: int = 127) -> Floats:
    """Largest magnitudes of the binades low..high, FP32 or narrower, ascending; both sides of where some rule steps."""
    largest = oracle.finite_values(f.element)[-1]
    top = float(np.frexp(largest)[0]) * 2  # in 1..2
    steps = [
        1.0,
        top,
        1.5 * top if 1.5 * top < 2 else 0.75 * top,
        2 - 2.0 ** -significant_length(f.element),
        1.40625,
        1.84375,
        1.96875,
    ]
    mantissas = np.array(steps, np.float64)
    bits = {"float32": 23, "bfloat16": 7, "float16": 10}[dtype]
    ulp = 2.0**-bits
    near = np.concatenate([mantissas - ulp, mantissas, mantissas + ulp, [2 - ulp]]).astype(np.float64)
    near = np.unique(np.round(near / ulp) * ulp)
    exponents = np.arange(max(low, SMALLEST[dtype]), min(high, int(np.log2(LARGEST[dtype]))) + 1)
    if len(exponents) > BINADES[level]:
        exponents = exponents[np.linspace(0, len(exponents) - 1, BINADES[level]).astype(int)]
    every = np.unique(np.ldexp(near[None], exponents[:, None]))
    every = _to(every, dtype)
    return np.unique(every[(every > 0) & (every <= LARGEST[dtype])])


def _filled(f: ScaledFormat, amax: Floats, n: int, dtype: str, rng: np.random.Generator) -> Tensor:
    """A block for each amax, at some place of it, among elements beside decision points times its scale."""
    t = tensor_scale(f, float(amax.max())) if f.has_tensor_scale else 1.0
    scale = scales_of(f, amax, t) * t
    points = decision_points(f.element)
    points = points[points >= 0]
    at = (np.arange(len(amax))[:, None] * n + np.arange(n)) % len(points)
    with np.errstate(all="ignore"):
        x = _to(points[at] * scale[:, None], dtype)
        x = np.where(np.isfinite(x), x, 0.0)
        moved = rng.integers(-1, 2, x.shape)
        x = np.where(moved < 0, _beside(x, dtype, -1), np.where(moved > 0, _beside(x, dtype, 1), x))
    inside = x <= amax[:, None]
    x = np.where(inside, x, rng.random(x.shape) * amax[:, None])
    x = _to(x, dtype)
    x[np.arange(len(amax)), rng.integers(0, n, len(amax))] = amax
    signs = rng.integers(0, 2, x.shape) * 2 - 1
    return torch.from_numpy(x * signs)


def _edges(n: int, dtype: str, wanted: torch.dtype) -> Tensor:
    """Zeros of either sign, the smallest and largest numbers, powers of two alone and in a row."""
    tiny, huge = 2.0 ** SMALLEST[dtype], LARGEST[dtype]
    rows = [np.zeros(n), -np.zeros(n), np.full(n, tiny), np.full(n, -huge), np.full(n, 1.0)]
    rows += [np.where(np.arange(n) == i % n, value, 0.0) for i, value in enumerate((tiny, huge, 1.0, -3.0, 448.0, 6.0))]
    rows.append(np.ldexp(1.0, -np.arange(n) % 14))
    return torch.from_numpy(np.stack(rows)).to(wanted)


def _to(x: Floats, dtype: str) -> Floats:
    """The nearest numbers of the dtype."""
    return torch.from_numpy(x).to(getattr(torch, dtype)).double().numpy()


def _beside(x: Floats, dtype: str, way: int) -> Floats:
    """The next number of the dtype above or below positive x; 0 stays."""
    tensor = torch.from_numpy(x).to(getattr(torch, dtype))
    integers = torch.int32 if dtype == "float32" else torch.int16
    moved = (tensor.view(integers) + way).view(tensor.dtype)
    return torch.where(tensor > 0, moved, tensor).double().numpy()


def every_rule(f: ScaledFormat) -> list[ScaledFormat]:
    """The format with each rule that gives a scale like its own."""
    return [f.with_rule(str(rule)) for rule in rules_for(f.scale)]
