"""What the terminal shows: tables for people, by rich."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from exmy.groups import groups
from formats import FloatFormat, float_format

if TYPE_CHECKING:
    import xarray as xr

LISTED = ("fp32", "tf32", "bf16", "fp16", "e5m2", "e4m3", "e4m3fn", "e3m2fn", "e2m3fn", "e2m1fn")
CONFUSED = {
    "e4m3": "e4m3fn, OCP's FP8: no infinity, maximum 448",
    "e4m3fn": "e4m3, by IEEE 754's rules: infinities, maximum 240",
    "e2m3fn": "the name says NaN only, but OCP's MX element has none",
    "e3m2fn": "the name says NaN only, but OCP's MX element has none",
    "e2m1fn": "the name says NaN only, but OCP's MX element has none",
}
VALUES_UP_TO_BITS = 8
PIPE_WIDTH = 200  # where the output is no terminal, whose width is unknown


def output() -> Console:
    """Standard output; wide enough for tables when it is a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=max(PIPE_WIDTH, console.width))


def format_table() -> Table:
    """The well-known formats, a row each."""
    table = Table(title="Number formats; any e{E}m{M}, e{E}m{M}f, e{E}m{M}fn is one too (E 1..8, M 0..23)")
    for heading in (
        "name",
        "bits",
        "E",
        "M",
        "bias",
        "max",
        "smallest normal",
        "smallest subnormal",
        "eps",
        "inf",
        "NaN",
    ):
        table.add_column(heading, justify="left" if heading == "name" else "right", no_wrap=heading == "name")
    for name in LISTED:
        f = float_format(name)
        table.add_row(
            name, str(f.bits), str(f.exponent_bits), str(f.mantissa_bits), str(f.bias), f"{f.max:.6g}", _power(f.smallest_normal),
            _power(f.smallest_subnormal), _power(f.eps), "yes" if f.has_inf else "no", "yes" if f.has_nan else "no",
        )  # fmt: skip
    return table


def format_sheet(f: FloatFormat) -> Group:
    """A format's data sheet."""
    sheet = Table(title=f.name, show_header=False, title_justify="left")
    specials = [word for word, there in (("infinities", f.has_inf), ("NaN", f.has_nan)) if there]
    rows = {
        "bits": f"{f.bits}: 1 sign, {f.exponent_bits} exponent, {f.mantissa_bits} mantissa; bias {f.bias}",
        "largest": f"{f.max:.10g}",
        "smallest normal": f"{f.smallest_normal:.10g} = {_power(f.smallest_normal)}",
        "smallest subnormal": f"{f.smallest_subnormal:.10g} = {_power(f.smallest_subnormal)}",
        "ulp at 1 (eps)": _power(f.eps),
        "exponents": f"emin {f.emin}, emax {f.emax} (of 1.m x 2^e)",
        "dynamic range": f"{math.log2(f.max / f.smallest_subnormal):.1f} binades, subnormals included",
        "special codes": " and ".join(specials) or "none: every code is a finite value",
    }
    if f.name in CONFUSED:
        rows["not to be confused"] = CONFUSED[f.name]
    if f.bits <= VALUES_UP_TO_BITS:
        values = [value for value in f.grid() if value > 0]
        rows[f"positive values ({len(values)})"] = " ".join(f"{value:.6g}" for value in values)
    for key, value in rows.items():
        sheet.add_row(key, value)
    return Group(sheet)


def _power(value: float) -> str:
    """A power of two as such."""
    return f"2^{math.frexp(value)[1] - 1}"


def stability_tables(tree: xr.DataTree) -> Iterator[Table]:
    """Recipe × learning rate: mean final loss, k/n diverged, Wilson interval; a table for each group of runs."""
    from train import stability_table

    summary = tree["summary"].to_dataset()
    for group in groups(summary):
        part = summary.isel(run=group.runs)
        yield _stability_table(stability_table(part), part, str(tree.attrs["baseline"]), group.label)


def _stability_table(table: xr.Dataset, summary: xr.Dataset, baseline: str, where: str) -> Table:
    definition = summary["diverged"].attrs["definition"]
    shown = Table(
        title="Final training loss (nats/token, mean of seeds) and runs diverged, k/n [95 % Wilson interval, %]"
        + (f"; {where}" if where else ""),
        caption=f"diverged = {definition}: {summary[definition].attrs['source']}",
        show_lines=True,
    )  # fmt: skip
    shown.add_column("recipe", overflow="fold")
    for rate in table["learning_rate"].values:
        shown.add_column(f"lr {rate:g}", justify="right", overflow="fold")
    for recipe in table["recipe"].values:
        cells = [_cell(table.sel(recipe=recipe, learning_rate=rate)) for rate in table["learning_rate"].values]
        shown.add_row(f"{recipe}\n(baseline)" if recipe == baseline else str(recipe), *cells)
    return shown


def _cell(cell: xr.Dataset) -> Text:
    n, k = int(cell["n"]), int(cell["k"])
    if not n:
        return Text("-", style="dim")
    loss = float(cell["final_loss_mean"])
    low, high = 100 * float(cell["rate_lower"]), 100 * float(cell["rate_upper"])
    value = f"{loss:.3f}" if math.isfinite(loss) else "non-finite"
    style = "bold red" if k == n else "yellow" if k else ""
    return Text(f"{value}\n{k}/{n} [{low:.0f}–{high:.0f}]", style=style)
