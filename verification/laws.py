"""The laws that a quantiser must keep: each with a name, a sentence, the clause that it comes from, and what breaks it.

Some laws say what an input becomes, and every input belongs to one of them: NaN to `nan`, infinities to `infinity`, and so on
down to `rounding`. A wrong result breaks the law of its input, so a report says where a quantiser is wrong, not only that.
The others compare results with each other, or with the grid, and need no oracle: on_grid, monotone, idempotent, odd_symmetry,
deterministic. `unbiased` is of stochastic rounding, `round_trip` of codes, the last three before `interface` of scaled formats;
`interface` is about the call itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from formats import ElementFormat, GridFormat
from verification import oracle
from verification.question import Question, smallest_normal

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Places = npt.NDArray[np.intp]
SYMMETRIC = ("nearest_even", "nearest_away", "toward_zero", "to_odd")


class Law(NamedTuple):
    """What it is called, what it says, and where that is written."""

    name: str
    sentence: str
    clause: str


LAWS = {
    law.name: law
    for law in (
        Law("interface", "A call gives an array of its input's shape and dtype, raises nothing, and leaves its input alone.", ""),
        Law("on_grid", "Every result is a value of the format, or an infinity or NaN that it has.", "IEEE 754-2019, 4.3"),
        Law("rounding", "A value between two neighbours becomes the one that the rounding says.", "IEEE 754-2019, 4.3"),
        Law("ties", "A value halfway between two neighbours becomes the one that the rounding says.", "IEEE 754-2019, 4.3.1"),
        Law("subnormals", "Values below the smallest normal number become subnormals, not zero.", "IEEE 754-2019, 3.4"),
        Law("signed_zero", "A zero has the sign of what became zero, where the format has -0.", "IEEE 754-2019, 6.3"),
        Law("nan", "NaN becomes NaN, where the format has one.", "IEEE 754-2019, 6.2"),
        Law("overflow_point", "What rounds to the largest value stays, what rounds beyond overflows.", "IEEE 754-2019, 7.4"),
        Law("infinity", "Infinity becomes what the overflow mode says.", "OCP OFP8 v1.0, conversions; P3109 4.0, 4.7.5"),
        Law("single_rounding", "FP64 is rounded once, not by way of a narrower type.", "IEEE 754-2019, 4.3"),
        Law("monotone", "A larger input never has a smaller result.", "follows from IEEE 754-2019, 4.3"),
        Law("idempotent", "A result, quantised again, is itself.", "follows from IEEE 754-2019, 4.3"),
        Law("odd_symmetry", "-x becomes the negative of what x becomes.", "follows from IEEE 754-2019, 4.3"),
        Law("deterministic", "A result depends on its input alone: not on its place, its neighbours, strides or alignment.", ""),
        Law("unbiased", "Stochastic results have the value as their mean.", "P3109 4.0, 4.7.4"),
        Law("round_trip", "A code stands for its value, and its value has that code.", "IEEE 754-2019, 3.4; OCP OFP8, table 1"),
        Law("scale_rule", "A block's scale is what the rule makes of its largest magnitude.", "OCP MX v1.0, 6.3"),
        Law("scale_then_quantise", "Elements are quantised by the scale as it is stored, not by the one before its rounding.",
            "OCP MX v1.0, 5.1 and 6.3"),
        Law("zero_block", "A block of zeros gives zeros, and divides by none.", "OCP MX v1.0, 5.1"),
    )
}  # fmt: skip
OF_INPUTS = ("nan", "infinity", "signed_zero", "single_rounding", "overflow_point", "ties", "subnormals", "rounding")
"""The laws that say what an input becomes, the first that applies being an input's own."""


@dataclass(frozen=True)
class Failure:
    """One input that came out wrong. Floats hold FP64 numbers and all narrower ones exactly.

    decision_point: of the format, the one nearest to the input, as a rational: what the rounding should have compared it with.
    block: of a scaled format, the whole block that the input stood in, made as simple as it could be.
    """

    input: float
    input_bits: int
    got: float
    expected: float
    law: str = "rounding"
    note: str = ""
    decision_point: str = ""
    block: tuple[float, ...] = ()

    @property
    def exact(self) -> Fraction | None:
        """The input as a rational; None for infinities and NaN."""
        return Fraction(self.input) if np.isfinite(self.input) else None

    def __str__(self) -> str:
        where = f"{self.input!r} ({self.input.hex()}, bits {self.input_bits:#x}{self._rational()})"
        return f"{where}: got {self.got!r}, expected {self.expected!r}" + (f"; {self.note}" if self.note else "")

    def _rational(self) -> str:
        if not self.decision_point:
            return ""
        exact = str(self.exact)
        side = (
            "the decision point" if exact == self.decision_point else f"beside the decision point {self.decision_point}"
        )
        short = f"{exact}, " if len(exact) <= 40 else ""
        return f"; {short}{side}"


@dataclass(frozen=True)
class Verdict:
    """What became of one law: "pass", "fail" or "not applicable", over how many inputs, and the smallest counterexample."""

    law: str
    verdict: str
    checked: int
    failed: int
    smallest: Failure | None = None
    note: str = ""

    def __str__(self) -> str:
        counts = f"{self.failed:,} of {self.checked:,}" if self.failed else f"{self.checked:,}"
        words = f"{self.law}: {self.verdict}" + (f" ({counts})" if self.checked else "")
        return words + (f"; {self.note}" if self.note else "") + (f"; {self.smallest}" if self.smallest else "")


def law_of(question: Question, dtype: str, x: Floats, right: Floats) -> npt.NDArray[np.intp]:
    """The place in OF_INPUTS of each input's own law."""
    f = question.f
    values = oracle.finite_values(f)
    applies = {
        "nan": np.isnan(x),
        "infinity": np.isinf(x),
        "signed_zero": x == 0,
        "overflow_point": (x > values[-1]) | ((x < values[0]) & (x < 0)),
        "ties": np.isin(x, oracle.table(f).middles),
        "single_rounding": rounds_twice(question, x, right) if dtype == "float64" else np.zeros(x.shape, np.bool_),
        "subnormals": np.abs(x) < smallest_normal(f),
        "rounding": np.ones(x.shape, np.bool_),
    }
    return np.asarray(np.argmax(np.stack([applies[name] for name in OF_INPUTS]), axis=0))


def rounds_twice(question: Question, x: Floats, right: Floats) -> Flags:
    """FP64 inputs that a detour by way of FP32 or FP16 sends elsewhere."""
    found = np.zeros(x.shape, np.bool_)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for narrow in (np.float32, np.float16):
            there = x.astype(narrow).astype(np.float64)
            twice = question.expected(there)
            found |= np.isfinite(there) & (twice != right) & ~(np.isnan(twice) & np.isnan(right))
    return found


def decision_point(f: ElementFormat, x: float) -> str:
    """The value or divider of the format nearest to x, as a rational; empty for infinities and NaN."""
    if not np.isfinite(x):
        return ""
    listed = oracle.table(f)
    points = np.concatenate([listed.entries[np.isfinite(listed.entries)], listed.middles])
    distance = np.abs(points - x)
    near = points[distance == distance.min()]
    return str(Fraction(float(near[0])))


def off_grid(f: ElementFormat, x: Floats, got: Floats) -> Places:
    """Where a result is no value of the format, and no infinity or NaN that it has."""
    values = oracle.finite_values(f)
    place = np.clip(np.searchsorted(values, np.where(np.isnan(got), 0.0, got)), 0, len(values) - 1)
    fine = values[place] == got
    if f.has_inf:
        fine |= np.isinf(got)
    # A tensor holds a NaN even where the format has none: what becomes of that is the law of NaN's.
    fine |= np.isnan(got) & (np.isnan(x) | f.has_nan)
    return np.flatnonzero(~fine)


def falls(x: Floats, got: Floats) -> tuple[Places, Places]:
    """Where a result is smaller than that of the input before it, in the order of inputs, and where that input is.

    NaN has no place in that order.
    """
    ordered = np.argsort(x, kind="stable")
    ordered = ordered[~np.isnan(x[ordered]) & ~np.isnan(got[ordered])]
    down = np.flatnonzero(np.diff(got[ordered]) < 0) if len(ordered) else ordered
    return ordered[down + 1], ordered[down]


def is_odd_function(f: ElementFormat, rounding: str) -> bool:
    """Whether rounding to the format is one: signed, as far below zero as above, to a mode that treats both sides alike."""
    symmetric = f.signed and f.largest == -f.lowest
    if isinstance(f, GridFormat):
        symmetric = symmetric and tuple(-v for v in reversed(f.values)) == f.values
    return symmetric and rounding in SYMMETRIC


def asymmetries(x: Floats, got: Floats) -> Places:
    """Where the result of -x, if that is among the inputs, is not the negative of x's, for x > 0."""
    ordered = np.argsort(x, kind="stable")
    place = np.clip(np.searchsorted(x[ordered], -x), 0, len(x) - 1)
    mirror = ordered[place]
    with np.errstate(invalid="ignore"):
        paired = (x > 0) & (x[mirror] == -x)
    same = (got[mirror] == -got) | (np.isnan(got[mirror]) & np.isnan(got))
    return np.flatnonzero(paired & ~same)
