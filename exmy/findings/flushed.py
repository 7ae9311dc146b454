"""Where gradients are flushed to zero, beside what the runs made of it: looked for after the runs, in the signals.

A gradient that goes back through the network is flushed in one layer after the other, so that a share over all of them says
little: the LM head's, which is the first, stands apart from the others'.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from exmy.findings.numbers import Number, has_signals, reference
from exmy.findings.studies import Evidence, Part
from exmy.findings.tables import NONE, headed, line, ranged, share
from formats import FloatFormat, get_format
from train.optimum import loss_penalty

HEAD = "lm_head"
MUCH = 0.1  # of a layer's gradient


class Flushed(NamedTuple):
    """Medians over runs, mean over steps, of a gradient's share: of the LM head's, the largest and the median of the others'."""

    head: float
    most: float
    where: str
    middle: float


def gradient_flushed(evidence: Evidence, part: Part, recipe: str, rate: float) -> Flushed | None:
    """At one rate, at all where it is NaN; None where no run has signals."""
    runs = part.runs
    chosen = runs["recipe"].values.astype(str) == recipe
    if math.isfinite(rate):
        chosen &= runs["learning_rate"].values == rate
    values = evidence.tree["signals"].to_dataset()["flushed"].sel(run=runs["run"].values[chosen], role="gradient")
    each = values.mean("signal_step", skipna=True).transpose("run", "tensor").values.astype(np.float64)
    each = each[np.isfinite(each).all(axis=1)]
    names = values["tensor"].values.astype(str)
    if not each.size or HEAD not in names:
        return None
    median = np.median(each, axis=0)
    others = np.where(names == HEAD, -1.0, median)
    return Flushed(float(median[names == HEAD][0]), float(others.max()), str(names[others.argmax()]),
                   float(np.median(median[names != HEAD])))  # fmt: skip


def others(found: Flushed, *, named: bool = False) -> tuple[str, str]:
    """Of the layers below the LM head; none where that lets nothing through."""
    if found.head == 1 and not found.most:
        return "nothing reaches them", NONE
    return f"{100 * found.most:.3g}" + (f" (`{found.where}`)" if named else ""), f"{100 * found.middle:.3g}"


def _smallest(part: Part, recipe: str) -> float:
    """The least gradient of the unscaled loss that is not flushed, its power of two; NaN for native recipes."""
    kind, scale = part.numerics(recipe), float(part.where.get("loss_scale", "1"))
    if kind.native or kind.exponent_bits is None or kind.mantissa_bits is None:
        return math.nan
    found = get_format(f"e{kind.exponent_bits}m{kind.mantissa_bits}")
    return math.log2(found.smallest_subnormal / scale) if isinstance(found, FloatFormat) else math.nan


def _same_range(evidence: Evidence) -> Iterator[str]:
    """Formats that at different divisors lose the same gradients."""
    each = [(part, recipe, _smallest(part, recipe)) for part in evidence.parts for recipe in part.recipes]
    for i, (part, recipe, least) in enumerate(each):
        for other_part, other, other_least in each[:i]:
            if least == other_least and part is not other_part and recipe != other:
                two = [
                    (f"`{name}` at {of.label}", found, int(of.runs["diverged"].values[own].sum()), int(own.sum()))
                    for of, name in ((part, recipe), (other_part, other))
                    if (found := gradient_flushed(evidence, of, name, reference(evidence, of))) is not None
                    for own in [of.names == name]
                ]
                if len(two) == 2:
                    (a, x, k, n), (b, y, k_2, n_2) = two
                    yield (
                        f"- {a} and {b} keep gradients of the loss down to the same 2^{least:.0f}: of the LM head's they flush "
                        f"{100 * x.head:.3g} % and {100 * y.head:.3g} %, and {k}/{n} and {k_2}/{n_2} of their runs diverged. "
                        "What a divisor takes away at the small end, exponent bits give back."
                    )


def of_signals(evidence: Evidence) -> Iterator[str]:
    """Where gradients are flushed, beside what the runs made of it."""
    if not has_signals(evidence):
        return
    yield from headed(
        ("recipe", f"flushed of the gradient, %: `{HEAD}`", "the most of another layer", "median of the other layers",
         "diverged at that rate [95 %]", "loss penalty, nats/token [95 %]")
    )  # fmt: skip
    much = []
    for part in evidence.parts:
        rate = reference(evidence, part)
        for recipe in part.recipes:
            found = gradient_flushed(evidence, part, recipe, rate)
            own = (part.names == recipe) & (part.runs["learning_rate"].values == rate)
            k, n = int(part.runs["diverged"].values[own].sum()), int(own.sum())
            if found is None or not found.head + found.most > 0:
                continue
            where = f", {part.label}" if part.label else ""
            penalty = Number(math.nan, math.nan, math.nan)
            if evidence.baseline in part.recipes:
                penalty = Number(*loss_penalty(part.grid, recipe, evidence.baseline)[:3])
            yield line(
                [f"`{recipe}`{where}", f"{100 * found.head:.3g}", *others(found, named=True), share(k, n),
                 ranged(penalty, "+.4f")]
            )  # fmt: skip
            if max(found.head, found.most) > MUCH and not k:
                much.append(f"`{recipe}`{where}")
    yield ""
    if much:
        yield (
            f"- Flushed in a tenth of a layer's gradient or more, and none diverged at that rate: {', '.join(much)}. So half of "
            "what we said would change our mind is here: that much is flushed is no failure by itself. What is flushed is the "
            "smallest, and of the LM head's gradient these are, we think, the tokens that the model holds for all but impossible."
        )
    yield from _same_range(evidence)
    clipped = evidence.tree["signals"].to_dataset()["clipped"].values
    known = clipped[np.isfinite(clipped)]
    if known.size:
        yield (
            f"- Clipped, the most of any operand, layer, run and step that was measured: {100 * float(known.max()):.3g} %. "
            + ("Range is missed at the small end alone." if known.max() == 0 else "")
        ).strip()
    yield ""
    yield "At the baseline's best rate: the median of the runs that have signals, mean over steps."
