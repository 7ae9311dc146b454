"""How the operands of a linear layer's three products are rounded: one rule for each of the six.

    product    contracts over    takes                        gives
    forward    inputs D          activation x, weight W       y = x W
    dgrad      outputs F         gradient dy, weight W        dx = dy Wᵀ
    wgrad      tokens S          activation x, gradient dy    dW = xᵀ dy

A format with a scale for a row or a block has it along the axis that the product contracts, since only such scales can be
taken out of a sum. So x is rounded along D for one product and along S for another, two different tensors; a format without
such scales is rounded once, and both products take the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd
from typing import Literal, get_args

from formats import FloatFormat, Rounding, ScaledFormat, float_format, get_format
from formats.scaled import Granularity, significant_bits
from formats.spec import ElementFormat

Role = Literal["activation", "weight", "gradient"]
Product = Literal["forward", "dgrad", "wgrad"]
ROLES: tuple[Role, ...] = get_args(Role)
PRODUCTS: tuple[Product, ...] = get_args(Product)
OPERANDS: dict[Product, tuple[Role, Role]] = {
    "forward": ("activation", "weight"),
    "dgrad": ("gradient", "weight"),
    "wgrad": ("activation", "gradient"),
}
# Which of a tile's sizes lies along the contracted axis, of either operand as it lies in memory: x [S, D], W [D, F], dy [S, F].
TILE_AXES: dict[Product, tuple[int, int]] = {"forward": (1, 0), "dgrad": (1, 1), "wgrad": (0, 0)}
LONGEST_HISTORY = 4096
BF16_BITS = 8  # of its significand, the leading one included


@dataclass(frozen=True)
class Delayed:
    """A tensor's scale from the amaxes of the last `length` steps (`formats.delayed`), rounded up to a power of two or not."""

    length: int
    margin: int = 0
    rule: str = "max"
    power_of_two: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.length <= LONGEST_HISTORY:
            raise ValueError(f"delayed must be 1..{LONGEST_HISTORY} steps of history, got {self.length}")
        if not -64 <= self.margin <= 64:
            raise ValueError(f"delayed_margin must be -64..64, got {self.margin}")
        if self.rule not in ("max", "most_recent"):
            raise ValueError(f"delayed_rule must be max or most_recent, got {self.rule!r}")


@dataclass(frozen=True)
class OperandRule:
    """How one operand is rounded. `format` is None where each run of a pack has its own, and a program serves them all.

    hadamard: blocks of so many elements along the contracted axis are first rotated by a Hadamard matrix with random signs; 0
    for none. signs: "fixed" for a run's whole length, or "step" for new ones each step. overflow: what is too large is the
    largest value, or infinity (NaN without one).
    """

    format: str | None
    rounding: Rounding = Rounding.NEAREST_EVEN
    delayed: Delayed | None = None
    hadamard: int = 0
    signs: Literal["fixed", "step"] = "fixed"
    overflow: Literal["saturate", "nonsaturating"] = "saturate"

    @property
    def scaled(self) -> ScaledFormat | None:
        """The format, if it has scales."""
        f = None if self.format is None else get_format(self.format)
        return f if isinstance(f, ScaledFormat) else None

    @property
    def along_an_axis(self) -> bool:
        """Whether what comes out depends on the axis that is contracted."""
        f = self.scaled
        return bool(self.hadamard) or (f is not None and f.granularity in (Granularity.ROW, Granularity.BLOCK))

    @property
    def word(self) -> str:
        """The rule as text, for identities and datasets; the run's own format is not in it."""
        words = [self.format or "*", self.rounding.value]
        if self.delayed:
            power = ":power" if self.delayed.power_of_two else ""
            words.append(f"delayed{self.delayed.length}{self.delayed.rule}{self.delayed.margin:+d}{power}")
        words += [self.overflow] if self.overflow != "saturate" else []
        if self.hadamard:
            words.append(f"hadamard{self.hadamard}{self.signs}")
        return ":".join(words)


@dataclass(frozen=True)
class ProductRules:
    """The rules of one product's two operands, in the order of `OPERANDS`."""

    first: OperandRule
    second: OperandRule

    def __iter__(self) -> Iterator[OperandRule]:
        return iter((self.first, self.second))

    def chunk(self, product: Product) -> int | None:
        """After how many terms of its sum a factor changes: the common measure of the groups with FP32 scales along it."""
        sizes = []
        for rule, axis in zip(self, TILE_AXES[product], strict=True):
            f = rule.scaled
            if f is not None and f.scale == "fp32" and f.group:
                sizes.append(f.group[axis] if len(f.group) == 2 else f.group[0])
        return gcd(*sizes) if sizes else None


@dataclass(frozen=True)
class Rules:
    """All six."""

    forward: ProductRules
    dgrad: ProductRules
    wgrad: ProductRules

    def items(self) -> Iterator[tuple[Product, Role, OperandRule]]:
        """(product, role, rule) of each operand."""
        for product in PRODUCTS:
            for role, rule in zip(OPERANDS[product], getattr(self, product), strict=True):
                yield product, role, rule

    def by_role(self) -> dict[Role, list[OperandRule]]:
        """Both rules of each role, that of the earlier product first."""
        return {role: [rule for _, of, rule in self.items() if of == role] for role in ROLES}

    @property
    def is_stochastic(self) -> bool:
        """Whether a rule takes random bits."""
        return any(rule.rounding.is_stochastic for _, _, rule in self.items())

    @property
    def is_delayed(self) -> bool:
        """Whether a rule has a history."""
        return any(rule.delayed for _, _, rule in self.items())

    @property
    def hadamard(self) -> int:
        """The size of the rotations, 0 where there are none."""
        return max(rule.hadamard for _, _, rule in self.items())

    @property
    def word(self) -> str:
        """All six as text."""
        return " ".join(f"{product}.{role}={rule.word}" for product, role, rule in self.items())


Described = ElementFormat | ScaledFormat


def described(name: str) -> Described:
    """The format of that name, of either kind."""
    f = get_format(name)
    assert isinstance(f, ElementFormat | ScaledFormat)
    return f


def significant(f: Described) -> int:
    """The significant bits of an operand's values as a product takes them: a narrow scale's are in them, an FP32 one's not."""
    if isinstance(f, ScaledFormat):
        scale = 4 if f.scale == "e4m3fn" else 0
        return significant_bits(f.element) + scale
    return significant_bits(f)


def fits_bf16(f: Described) -> bool:
    """Whether BF16 holds an operand's values. Those of MX may pass its ends, where they round to it once more."""
    return significant(f) <= BF16_BITS if isinstance(f, ScaledFormat) else float_format("bf16").holds(f)


def can_vary(f: Described) -> bool:
    """Whether a pack's runs can each have one like it in one program."""
    return isinstance(f, FloatFormat) and f.shares_programs
