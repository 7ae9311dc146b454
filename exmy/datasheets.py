"""`exmy formats show` and `compare`: datasheets for people, from the datasets of `formats.datasheet` and `formats.compare`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import xarray as xr
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from formats import ElementFormat, FloatFormat, Format, compare, datasheet, element_format, get_format
from formats.datasheets import layout, limits, source, written
from formats.names import well_known

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
        sheet = datasheet(f) if not isinstance(f, ElementFormat) else None
        if isinstance(f, ElementFormat):
            single.add_row(*_row(f))
        elif sheet is not None:
            per = float(sheet["elements_per_scale"])
            shared = f"{sheet.attrs['granularity']}" + (f" of {per:g}" if math.isfinite(per) else "")
            bits = f"{float(sheet['bits_per_element']):g}"
            scaled.add_row(name, bits, sheet.attrs["element"], shared, sheet.attrs["scale"], sheet.attrs["rule"])
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
    sheet = datasheet(f)
    a = sheet.attrs
    rows = Table(title=a["name"], show_header=False, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    rows.add_column(no_wrap=True)
    rows.add_column(overflow="fold")
    if a["canonical_name"] != a["name"] and a["kind"] != "list":
        rows.add_row("the same as", a["canonical_name"])
    if a["kind"] == "scaled":
        rows.add_row("bits an element", f"{float(sheet['bits_per_element']):g}, its share of the scale included")
        rows.add_row("element", a["element"])
    rows.add_row("bits", f"{int(sheet['bits'])}: {a['layout']}")
    rows.add_row("defined by", a["source"])
    for name in LIMITS:
        if name in sheet and not (name == "ulp_at_1" and _is_missing(sheet[name])):
            rows.add_row(WORDS[name], _number(sheet[name]))
    if "emin" in sheet:
        rows.add_row("exponents", f"emin {int(sheet['emin'])}, emax {int(sheet['emax'])} (of 1.m × 2^e)")
    rows.add_row("dynamic range", f"{float(sheet['dynamic_range']):.1f} binades, largest over smallest positive")
    rows.add_row("finite values", f"{int(sheet['finite_values']):,}")
    rows.add_row("special codes", a["specials"])
    for i, line in enumerate(filter(None, a["confusable"].split("\n"))):
        rows.add_row("" if i else "not to be confused with", line)
    parts: list[RenderableType] = [rows]
    if int(sheet["bits"]) <= CHART_UP_TO_BITS:
        parts.append(_chart(f if isinstance(f, ElementFormat) else element_format(a["element"]), sheet, width))
    return Group(*parts)


def _is_missing(number: xr.DataArray) -> bool:
    return bool(np.isnan(float(number))) and "exact" not in number.attrs


def _number(number: xr.DataArray) -> str:
    exact = str(number.attrs.get("exact", ""))
    decimal = f"{float(number):.10g}"
    return exact if exact == decimal or exact.startswith("≈") or math.isnan(float(number)) else f"{exact} = {decimal}"


def _chart(f: ElementFormat, sheet: xr.Dataset, width: int) -> Group:
    """Every code's value, in rows of 16, 8 or 4; of sign and magnitude the positive half."""
    half = isinstance(f, FloatFormat) and f.signed
    count = (1 << f.bits) >> half
    cells = [_cell(f, code, str(sheet["kind"].values[code])) for code in range(count)]
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


def _cell(f: ElementFormat, code: int, kind: str) -> str:
    return "" if kind == "unused" else written(f.decode_exact(code))


def comparison(a: ElementFormat, b: ElementFormat) -> Group:
    """Two formats beside each other: limits and specials, then the values that one has and the other lacks."""
    found = compare(a, b)
    sheets = [datasheet(f) for f in (a, b)]
    rows = Table(title=f"{a.name} and {b.name}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    rows.add_column()
    for f in (a, b):
        rows.add_column(f.name, overflow="fold")
    rows.add_row("bits", *(f"{f.bits}: {layout(f)}" for f in (a, b)))
    for name in LIMITS:
        if any(name in sheet and not _is_missing(sheet[name]) for sheet in sheets):
            rows.add_row(
                WORDS[name], *(_number(s[name]) if name in s and not _is_missing(s[name]) else "–" for s in sheets)
            )
    rows.add_row("dynamic range, binades", *(f"{float(sheet['dynamic_range']):.1f}" for sheet in sheets))
    rows.add_row("finite values", *(f"{int(sheet['finite_values']):,}" for sheet in sheets))
    rows.add_row("special codes", *(sheet.attrs["specials"] for sheet in sheets))
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
