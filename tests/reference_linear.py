"""One linear layer's three products by a recipe, slowly: NumPy, a matrix at a time, every rounding spelled out.

    forward  y = x W       dgrad  dx = dy Wᵀ       wgrad  dW = xᵀ dy

It takes a resolved recipe's words (its formats and rules) and shares no arithmetic with what trains: scales come from
`formats.scaled_reference`, elements from the formats' own `encode` and `decode`, sums from FP64 or rationals.

What is exact. An element is the rounded quotient x / s. In FP64 the quotient lies on the same side of every point where a
rounding decides, and on it only if the exact one does: such a point m has 26 bits at most and s 24, or 8 and 28 (an FP32 tensor
scale times an E4M3 one), so that x and m s are multiples of one number, 2^-51 of theirs at least; where they differ they are
further apart than FP64's 2^-53.

What is not. The order of an FP32 sum is the hardware's, so that a sum of K products a_k b_k is known to lie within

    E = K u / (1 - K u) * sum |a_k b_k| + K 2^-126,    u = 2^-24

of the exact one: K u / (1 - K u) bounds any order of K - 1 additions and as many roundings of products (Higham, Accuracy and
Stability, section 3.1), and an operation beneath the normal numbers, which some units flush, adds 2^-126 at most. E is 0 where
every partial sum, in whatever order, is a multiple of one quantum and at most 2^24 of it. Everything after the sum (the factor,
the addition of chunks, the output's rounding) is a correctly rounded and so a monotone operation, hence applied to both ends
of the interval: `Bounds`. With E = 0 both ends are one number, and nothing is left to a tolerance. Values are to stay within
FP32's normal numbers.

A stochastic operand has two values, its neighbours below and above, and widens the interval of the sum likewise.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from math import gcd, sqrt
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from formats import FloatFormat, ScaledFormat, float_format, get_format
from formats.scaled import Granularity
from formats.scaled_reference import group_scale, reference_tensor_scale
from formats.spec import ElementFormat
from tests.rational_sums import reference
from train.accumulate import parse_accumulation
from train.operands import OPERANDS, ROLES, OperandRule, Product
from train.recipe import LinearPrecision

Reals = NDArray[np.float64]
Singles = NDArray[np.float32]
Matrix = NDArray[Any]
PRODUCTS: tuple[Product, ...] = ("forward", "dgrad", "wgrad")
# Which axis of either operand is summed over, as it lies in memory: x [S, D], W [D, F], dy [S, F].
CONTRACTED: dict[Product, tuple[int, int]] = {"forward": (1, 0), "dgrad": (1, 1), "wgrad": (0, 0)}
UNIT = 2.0**-24
SMALLEST_NORMAL = 2.0**-126
EXPECTED = "expected"  # no rounding but the ends: a stochastic element's mean


class Operand(NamedTuple):
    """A quantised operand [B, M, N] as it lies in memory, its contracted axis perhaps padded.

    low, high: what is multiplied, equal unless rounding is stochastic. factor: the FP32 scale that is left out of each.
    """

    low: Reals
    high: Reals
    factor: Singles
    groups: int  # how many along the contracted axis share a factor, 0 for all

    def matrix(self, b: int) -> Operand:
        """The b-th one."""
        return Operand(self.low[b], self.high[b], self.factor[b], self.groups)


class Bounds(NamedTuple):
    """Between which two numbers a result lies, ends included; equal where it is known to the last bit.

    spread: sum over k of (the widest difference that stochastic operands make to a_k b_k)^2, before the output's rounding.
    """

    low: Reals
    high: Reals
    spread: Reals

    @property
    def exact(self) -> bool:
        """Whether nothing is left open."""
        return bool(np.all(self.low == self.high))


def reference_products(
    p: LinearPrecision,
    x: Matrix,
    w: Matrix,
    dy: Matrix,
    signs: Matrix | None = None,
    scales: Matrix | None = None,
    stand_ins: tuple[str, str] | None = None,
    products: Sequence[Product] = PRODUCTS,
) -> dict[Product, Bounds]:
    """y, dx and dW of one run from FP32 values: x [S, D], W [D, F], dy [S, F], or [B, ..] each for B products of one tensor.

    signs: of rotations, [n]. scales: delayed ones, of x, W and dy. stand_ins: modes instead of a product's operands' stochastic
    rounding, for the first and the second one.
    """
    together = [np.asarray(z, np.float32).reshape(-1, *z.shape[-2:]) for z in (x, w, dy)]
    values = dict(zip(ROLES, together, strict=True))
    result: dict[Product, Bounds] = {}
    for product in products:
        pair = [
            operand(p, product, i, values[role], signs, scales, stand_ins) for i, role in enumerate(OPERANDS[product])
        ]
        first, second = (contracted_last(o, axis) for o, axis in zip(pair, CONTRACTED[product], strict=True))
        emin = (smallest_exponent(p, product, 0), smallest_exponent(p, product, 1))
        parts = [multiplied(first.matrix(b), second.matrix(b), p, emin) for b in range(len(first.low))]
        result[product] = Bounds(*(np.stack(z).reshape(*x.shape[:-2], *z[0].shape) for z in zip(*parts, strict=True)))
    return result


def operand(
    p: LinearPrecision,
    product: Product,
    i: int,
    z: Singles,
    signs: Matrix | None = None,
    scales: Matrix | None = None,
    stand_ins: tuple[str, str] | None = None,
) -> Operand:
    """A product's first or second operand from its FP32 values z [B, M, N]; the others as in `reference_products`."""
    role, rule, axis = OPERANDS[product][i], rule_of(p, product, i), CONTRACTED[product][i]
    z = arriving(z, p, role == "weight")
    if rule.hadamard:
        assert signs is not None
        z = rotated(z, axis, rule.hadamard, signs)
    scale = None
    if rule.delayed:
        assert scales is not None
        scale = float(scales[ROLES.index(role)])
    mode = stand_ins[i] if stand_ins and rule.rounding.is_stochastic else rule.rounding.value
    return quantised(z, format_of(p, product, i), mode, axis, scale)


def format_of(p: LinearPrecision, product: Product, i: int) -> ElementFormat | ScaledFormat:
    """The format of that operand, the rule's or the run's own."""
    name = rule_of(p, product, i).format
    f = getattr(p, OPERANDS[product][i]) if name is None else get_format(name)
    assert isinstance(f, ElementFormat | ScaledFormat)
    return f


def rule_of(p: LinearPrecision, product: Product, i: int) -> OperandRule:
    """The rule of a product's first or second operand; without rules, the run's own format by the recipe's rounding."""
    rules = p.structure.rules
    if rules is None:
        return OperandRule(None, p.structure.rounding)
    pair = getattr(rules, product)
    rule: OperandRule = pair.second if i else pair.first
    return rule


def arriving(z: Singles, p: LinearPrecision, is_weight: bool) -> Singles:
    """Activations and gradients come to rules as values of the output's type; weights, and all without rules, as they are."""
    if p.structure.rules is None or is_weight or p.structure.output != "bf16":
        return z
    return to_output(z, p).astype(np.float32)


def to_output(z: Matrix, p: LinearPrecision) -> Reals:
    """Rounded to the output's type."""
    wide = np.asarray(z, np.float64)
    return elements(wide, float_format("bf16"), "nearest_even")[0] if p.structure.output == "bf16" else wide


def smallest_exponent(p: LinearPrecision, product: Product, i: int) -> int:
    """Of the element's smallest normal number; sums that align their terms go by it."""
    f = format_of(p, product, i)
    element = f.element if isinstance(f, ScaledFormat) else f
    return element.emin if isinstance(element, FloatFormat) else -126


# Rotations.


def rotated(z: Singles, axis: int, n: int, signs: Matrix) -> Singles:
    """Each n along an axis times diag(signs) H / sqrt(n), zeros appended to whole blocks: FP32, one butterfly after another."""
    last = np.moveaxis(z, axis + 1, -1)
    last = np.pad(last, [(0, 0), (0, 0), (0, -last.shape[-1] % n)])
    result = np.zeros_like(last)
    for block in range(0, last.shape[-1], n):
        v = [last[..., block + i] * np.float32(signs[i]) for i in range(n)]
        stride = 1
        while stride < n:
            for i in range(n):
                if not i & stride:
                    v[i], v[i + stride] = v[i] + v[i + stride], v[i] - v[i + stride]
            stride *= 2
        for i in range(n):
            result[..., block + i] = v[i] * np.float32(1 / sqrt(n))
    return np.moveaxis(result, -1, axis + 1)


def rotated_back(z: Reals, axis: int, n: int, signs: Matrix, length: int) -> Reals:
    """The transposed rotation in FP64, by the matrix itself, and the padding cut off."""
    hadamard = np.ones((1, 1))
    while len(hadamard) < n:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    last = np.moveaxis(z, axis + 1, -1)
    blocks = last.reshape(*last.shape[:-1], -1, n) @ (hadamard / sqrt(n)) * signs
    return np.moveaxis(blocks.reshape(last.shape)[..., :length], -1, axis + 1)


# Quantisation.


def quantised(z: Singles, f: ElementFormat | ScaledFormat, mode: str, axis: int, given: float | None = None) -> Operand:
    """z [B, M, N] in the format, with groups along axis 0 or 1 of each matrix; `given` replaces a tensor's own scale."""
    x = z.astype(np.float64)
    if not isinstance(f, ScaledFormat):
        low, high = elements(x, f, mode)
        return Operand(low, high, np.ones(x.shape, np.float32), 0)
    upper = 1.0
    if f.has_tensor_scale:
        own = reference_tensor_scale([float(np.max(np.abs(x)))], f)
        assert own is not None
        upper = float(own) if given is None else given
        given = None
    owner = owners(x.shape, f, axis)
    amax = np.zeros(int(owner.max()) + 1)
    np.maximum.at(amax, owner, np.abs(x))
    scale = np.array([given if given is not None else scale_of(a, f, upper) for a in amax.tolist()])[owner]
    low, high = elements(x / (scale * upper), f.element, mode)
    if f.scale != "fp32":
        return Operand(low * scale, high * scale, np.full(x.shape, upper, np.float32), 0)
    return Operand(low, high, scale.astype(np.float32), f.group[axis if len(f.group) == 2 else 0] if f.group else 0)


def owners(shape: tuple[int, ...], f: ScaledFormat, axis: int) -> NDArray[np.int64]:
    """For each element of [B, M, N] the number of the group whose scale it takes."""
    b, i, j = np.indices(shape)
    along, across = (i, j) if axis == 0 else (j, i)
    longest = max(shape)
    owner: NDArray[np.int64]
    match f.granularity:
        case Granularity.TENSOR:
            owner = np.zeros(shape, np.int64)
        case Granularity.ROW:
            owner = b * longest + across
        case Granularity.BLOCK:
            owner = (b * longest + across) * longest + along // f.group[0]
        case Granularity.TILE:
            owner = (b * longest + i // f.group[0]) * longest + j // f.group[1]
    return owner


@cache
def scale_of(amax: float, f: ScaledFormat, upper: float) -> float:
    """The reference's scale of a group with that largest magnitude."""
    scale = group_scale([amax], f, Fraction(upper))
    assert scale is not None
    return float(scale)


def elements(x: Reals, f: ElementFormat, mode: str) -> tuple[Reals, Reals]:
    """The values below and above by a stochastic mode, and twice the same by any other."""
    if mode == EXPECTED:
        clipped = np.clip(x, float(f.lowest), float(f.largest))
        return clipped, clipped
    ends = ("toward_negative", "toward_positive") if mode.startswith("stochastic") else (mode, mode)
    low, high = (f.decode(f.encode(x, rounding=end)) for end in ends)
    return low, high


# Products.


def contracted_last(o: Operand, axis: int) -> Operand:
    """[B, M, N] with the contracted axis as the last."""
    turn = (0, 1, 2) if axis else (0, 2, 1)
    return Operand(o.low.transpose(turn), o.high.transpose(turn), o.factor.transpose(turn), o.groups)


def multiplied(a: Operand, b: Operand, p: LinearPrecision, emin: tuple[int, int]) -> Bounds:
    """a [M, K] and b [N, K]: [M, N], chunk by chunk of what shares its factors, and rounded to the output."""
    length = a.low.shape[1]
    chunk = gcd(a.groups, b.groups) or max(length, 1)
    total: tuple[Singles, Singles] | None = None
    spread = np.zeros((len(a.low), len(b.low)))
    for k in range(0, length, chunk):
        part = slice(k, k + chunk)
        assert all(np.all(o.factor[:, part] == o.factor[:, k : k + 1]) for o in (a, b)), "a chunk has one factor"
        factor = a.factor[:, k, None] * b.factor[None, :, k]
        ends = (a.low[:, part], a.high[:, part]), (b.low[:, part], b.high[:, part])
        low, high, squares = summed(*ends, p, emin)
        scaled = (low * factor, high * factor)
        spread += squares * factor.astype(np.float64) ** 2
        total = scaled if total is None else (total[0] + scaled[0], total[1] + scaled[1])
    assert total is not None
    return Bounds(to_output(total[0], p), to_output(total[1], p), spread)


def summed(
    a: tuple[Reals, Reals], b: tuple[Reals, Reals], p: LinearPrecision, emin: tuple[int, int]
) -> tuple[Singles, Singles, Reals]:
    """From both operands' low and high values the sums over their last axes in FP32, or as the recipe says: the lowest that they
    can be, the highest, and their spread.
    """
    accumulation = p.structure.accumulate
    if accumulation is not None:
        assert parse_accumulation(accumulation.name) == accumulation
        assert all(np.array_equal(*ends) for ends in (a, b))
        rows, columns, word = a[0].tolist(), b[0].tolist(), accumulation.name
        exact = np.array([[float(reference(r, c, word, emin)) for c in columns] for r in rows], np.float32)
        return exact, exact, np.zeros(exact.shape)
    corners = np.stack([u[:, None] * v[None] for u in a for v in b])
    lowest, highest = corners.min(0), corners.max(0)
    most = np.abs(corners).max(0).sum(-1)
    error = sum_error(most, corners.shape[-1])
    error[most <= 2**24 * common_quantum(a, b)] = 0.0
    low, high = (lowest.sum(-1) - error).astype(np.float32), (highest.sum(-1) + error).astype(np.float32)
    return low, high, ((highest - lowest) ** 2).sum(-1)


def sum_error(magnitudes: Reals, length: int) -> Reals:
    """E of this module for sums of |a_k b_k|; the FP64 sums and the ends' own roundings are within its last part in a million."""
    u = length * UNIT
    return np.where(magnitudes > 0, u / (1 - u) * magnitudes * (1 + 2**-20) + length * SMALLEST_NORMAL, 0.0)


def common_quantum(a: tuple[Reals, Reals], b: tuple[Reals, Reals]) -> Reals:
    """For each sum a number of which all its products are multiples; 0 where one may lie beneath FP32's normal numbers."""
    first, second = (np.minimum(*(lowest_bits(end) for end in ends)).min(-1) for ends in (a, b))
    quantum: Reals = first[:, None] * second[None]
    quantum[quantum < SMALLEST_NORMAL] = 0.0
    return quantum


def lowest_bits(z: Reals) -> Reals:
    """The value of each number's lowest set bit, inf for zeros."""
    mantissa, exponent = np.frexp(z)
    integer = np.abs(mantissa * 2.0**53).astype(np.int64)
    low = (integer & -integer).astype(np.float64)
    return np.where(z == 0, np.inf, np.ldexp(low, exponent - 53))
