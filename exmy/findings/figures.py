"""Which figures the page of findings has, of the studies that are there."""

from __future__ import annotations

from collections.abc import Iterator

from exmy.findings.bits import nothing, penalty_drawing, signal_drawings, window_drawing
from exmy.findings.canvas import Drawing
from exmy.findings.collapse import collapse_drawing
from exmy.findings.growth import cells, growth_drawing
from exmy.findings.numbers import has_signals
from exmy.findings.rates import rate_drawings, size_drawings
from exmy.findings.rows import condition_drawings, seed_drawings
from exmy.findings.studies import Available, Evidence


def drawings(studies: Available) -> Iterator[Drawing]:
    """In the order of the page; none of what a dataset has nothing for."""
    for name, evidence in studies.items():
        if isinstance(evidence, Evidence):
            yield from _of(name, evidence)


def _of(name: str, evidence: Evidence) -> Iterator[Drawing]:
    judged = not nothing(evidence.verdicts)
    if name == "seeds":
        yield from seed_drawings(evidence)
    elif name == "mantissa":
        yield from rate_drawings(evidence, name)
        if judged:
            yield window_drawing(evidence)
        yield from _growth(evidence)
    elif name == "conditions" and not isinstance(evidence.comparison, str):
        yield from condition_drawings(evidence)
        yield from collapse_drawing(evidence)
    elif name == "exponent":
        yield from rate_drawings(evidence, name)
        if has_signals(evidence):
            yield from signal_drawings(evidence)
    elif name == "rounding" and judged:
        yield penalty_drawing(evidence, name, "mantissa_bits", "rounding")
        yield from _growth(evidence)
    elif name == "scaling" and judged:
        yield penalty_drawing(evidence, name, "exponent_bits", "scaling")
    elif name == "size":
        yield from size_drawings(evidence)


def _growth(evidence: Evidence) -> Iterator[Drawing]:
    """Where the formats of a rounding have bits enough for a line."""
    if any(len(rows) > 2 for rows in cells(evidence, evidence.parts[0]).values()):
        yield growth_drawing(evidence, evidence.name)
