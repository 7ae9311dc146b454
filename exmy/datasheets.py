"""`exmy formats show` and `compare`: datasheets for people, from `formats.facts` and the dataset of `formats.compare`.

xarray is loaded for a comparison alone: it takes longer than a datasheet does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from formats import ElementFormat, FloatFormat, Format, ScaledFormat, get_format
from formats.facts import Facts, Limit, facts, layout, limits, meaning, source, written
from formats.names import well_known

if TYPE_CHECKING:
    import xarray as xr

CHART_UP_TO_BITS = 8
LISTED = 64
ENDS = 6
LIMITS = ("largest", "lowest", "smallest_normal", "smallest_positive", "ulp_at_1")
WORDS = {
    "largest": "largest",
    "lowest": "lowest",
    "smallest_normal": "smallest normal",
    "smallest_positive": "smallest positive",
    "ulp_at_1": "ulp at 1",
}


def format_table() -> Group:
    """The well-known formats, a row each: single numbers, then those with scales."""
    single = Table(title="Formats of single numbers", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in (
        "name",
        "bits",
        "E",
        "M",
        "bias",
        "largest",
        "smallest normal",
        "smallest",
        "ulp at 1",
        "inf",
        "NaN",
        "-0",
    ):
        single.add_column(heading, justify="left" if heading == "name" else "right", no_wrap=True)
    scaled = Table(title="Formats with scales", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("name", "bits an element", "element", "a scale for", "scale", "rule"):
        scaled.add_column(heading, justify="right" if heading.startswith("bits") else "left")
    for name in well_known():
        f = get_format(name)
        if isinstance(f, ElementFormat):
            single.add_row(*_row(f))
            continue
        a, numbers = facts(f)
        per = float(numbers["elements_per_scale"].value)
        shared = a["granularity"] + (f" of {per:g}" if math.isfinite(per) else "")
        bits = f"{float(numbers['bits_per_element'].value):g}"
        scaled.add_row(name, bits, a["element"], shared, a["scale"], a["rule"])
    grammar = Text(
        "Also: e{E}m{M}[f|fn|fnuz][b{bias}][-nosub] (E 1..8, M 0..23), binary{K}p{P}{s|u}{e|f} of IEEE P3109 (K 3..16), "
        "int{n}[q{F}] (2..16), posit{n} (3..16), lns{n}q{F}, and ELEMENT@tensor|row|block{n}|tile{a}x{b}[:SCALE][:RULE]."
    )
    return Group(single, scaled, grammar)


def _row(f: ElementFormat) -> list[str]:
    found = {name: limit.value for name, limit in limits(f).items()}
    fields = [str(f.exponent_bits), str(f.mantissa_bits), str(f.bias)] if isinstance(f, FloatFormat) else ["", "", ""]
    numbers = [_plainly(found.get(name)) for name in ("largest", "smallest_normal", "smallest_positive", "ulp_at_1")]
    flags = ["yes" if there else "no" for there in (f.has_inf, f.has_nan, f.has_negative_zero)]
    return [f.name, str(f.bits), *fields, *numbers, *flags]


def _plainly(value: Fraction | float | None) -> str:
    return "" if value is None or math.isnan(value) else written(Fraction(value))


def format_sheet(f: Format, width: int) -> Group:
    """A format's datasheet; for up to 8 bits with a chart of its codes, as wide as fits into `width` columns."""
    sheet = facts(f)
    a, numbers = sheet
    rows = Table(title=a["name"], show_header=False, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    rows.add_column(no_wrap=True)
    rows.add_column(overflow="fold")
    if a["canonical_name"] != a["name"] and a["kind"] != "list":
        rows.add_row("the same as", a["canonical_name"])
    if a["kind"] == "scaled":
        rows.add_row(
            "bits an element", f"{float(numbers['bits_per_element'].value):g}, its share of the scale included"
        )
        rows.add_row("element", a["element"])
    rows.add_row("bits", f"{numbers['bits'].value}: {a['layout']}")
    rows.add_row("defined by", a["source"])
    for name in LIMITS:
        if name in numbers and not _is_missing(numbers[name]):
            rows.add_row(WORDS[name], _number(numbers[name]))
    if "emin" in numbers:
        rows.add_row("exponents", f"emin {numbers['emin'].value}, emax {numbers['emax'].value} (of 1.m × 2^e)")
    rows.add_row("dynamic range", f"{_range(sheet)} binades, largest over smallest positive")
    rows.add_row("finite values", _count(sheet))
    rows.add_row("special codes", a["specials"])
    for i, line in enumerate(filter(None, a["confusable"].split("\n"))):
        rows.add_row("" if i else "not to be confused with", line)
    parts: list[RenderableType] = [rows]
    element = f.element if isinstance(f, ScaledFormat) else f
    assert isinstance(element, ElementFormat)
    if element.bits <= CHART_UP_TO_BITS:
        parts.append(_chart(element, width))
    return Group(*parts)


def _is_missing(limit: Limit) -> bool:
    return isinstance(limit.value, float) and math.isnan(limit.value)


def _number(limit: Limit) -> str:
    """A value exactly and, where that is not plain to read and float64 holds it, in decimals too."""
    exact = written(Fraction(limit.value))
    decimal = f"{float(limit.value):.10g}" if _held(limit.value) else exact
    return exact if exact == decimal or exact.startswith("≈") else f"{exact} = {decimal}"


def _held(value: Fraction | float) -> bool:
    try:
        return float(value) == value
    except OverflowError:
        return False


def _range(sheet: Facts) -> str:
    return f"{float(sheet.limits['dynamic_range'].value):.1f}"


def _count(sheet: Facts) -> str:
    return f"{int(sheet.limits['finite_values'].value):,}"


def _chart(f: ElementFormat, width: int) -> Group:
    """Every code's value, in rows of 16, 8 or 4; of sign and magnitude the positive half."""
    half = isinstance(f, FloatFormat) and f.signed
    count = (1 << f.bits) >> half
    cells = [_cell(f, code) for code in range(count)]
    widest = max(len(cell) for cell in cells) + 3
    columns = next((n for n in (16, 8, 4) if n * widest + 6 <= width), 2)
    sign = 1 << (f.bits - 1)
    mirrored = f"; 0x{sign:X} to 0x{2 * sign - 1:X} are the same below zero" if half and f.has_negative_zero else ""
    if half and not f.has_negative_zero:
        mirrored = f"; 0x{sign:X} is NaN, the codes above it are the same below zero"
    chart = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    chart.add_column("code", no_wrap=True)
    for column in range(min(columns, count)):
        chart.add_column(f"+{column:X}", justify="right", no_wrap=True)
    for start in range(0, count, columns):
        chart.add_row(f"0x{start:0{-(-f.bits // 4)}X}", *cells[start : start + columns])
    return Group(Text(f"Every value: row + column is the code{mirrored}", style="italic"), chart)


def _cell(f: ElementFormat, code: int) -> str:
    value = meaning(f, code)
    return "" if value is None else written(value)


def comparison(a: ElementFormat, b: ElementFormat) -> Group:
    """Two formats beside each other: limits and specials, then the values that one has and the other lacks."""
    from formats import compare

    found = compare(a, b)
    sheets = [facts(f) for f in (a, b)]
    rows = Table(title=f"{a.name} and {b.name}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    rows.add_column()
    for f in (a, b):
        rows.add_column(f.name, overflow="fold")
    rows.add_row("bits", *(f"{f.bits}: {layout(f)}" for f in (a, b)))
    for name in LIMITS:
        found_of = [sheet.limits.get(name) for sheet in sheets]
        cells = ["–" if limit is None or _is_missing(limit) else _number(limit) for limit in found_of]
        if set(cells) != {"–"}:
            rows.add_row(WORDS[name], *cells)
    rows.add_row("dynamic range, binades", *map(_range, sheets))
    rows.add_row("finite values", *map(_count, sheets))
    rows.add_row("special codes", *(sheet.attributes["specials"] for sheet in sheets))
    rows.add_row("defined by", *(source(f) for f in (a, b)))
    return Group(rows, *map(Text, _sentences(found, a, b)))


def _sentences(found: xr.Dataset, a: ElementFormat, b: ElementFormat) -> Iterable[str]:
    facts = found.attrs
    if facts["equal"]:
        yield f"{a.name} and {b.name} are one format: the same values with the same codes."
        return
    if "value" not in found.coords:
        for one, other, holds in ((a, b, facts["a_holds_b"]), (b, a, facts["b_holds_a"])):
            yield f"{one.name} {'has every' if holds else 'lacks some'} finite value of {other.name}."
        yield "Values are listed for formats of at most 16 bits that FP64 holds."
        return
    values, in_a, in_b = (found[name].values for name in ("value", "in_a", "in_b"))
    both = in_a & in_b
    yield f"Values that both have: {int(both.sum()):,}."
    for one, only in ((a, in_a & ~in_b), (b, in_b & ~in_a)):
        yield f"Only {one.name} has {_listed(values[only])}"
    moved = both & (found["code_a"].values != found["code_b"].values)
    if moved.any() and a.bits == b.bits:
        at = (
            int(np.flatnonzero(moved & (values > 0))[0])
            if (moved & (values > 0)).any()
            else int(np.flatnonzero(moved)[0])
        )
        codes = (f"0x{int(found[f'code_{label}'].values[at]):X} in {f.name}" for label, f in (("a", a), ("b", b)))
        yield f"Codes differ for {int(moved.sum()):,} of the values that both have: {values[at]:.10g} is {' and '.join(codes)}."


def _listed(values: npt.NDArray[np.float64]) -> str:
    """Values in words: those with both signs once, long lists by their ends."""
    if not len(values):
        return "no value of its own."
    positive = values[values > 0]
    mirrored = len(positive) > 0 and np.array_equal(np.sort(-values[values < 0]), positive) and not (values == 0).any()
    shown = positive if mirrored else values
    words = [written(Fraction(v)) for v in shown.tolist()]
    listed = " ".join(words if len(words) <= LISTED else [*words[:ENDS], "…", *words[-ENDS:]])
    return f"{len(values):,}: {'±(' if mirrored else ''}{listed}{')' if mirrored else ''}"
