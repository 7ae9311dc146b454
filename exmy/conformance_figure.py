"""The conformance matrix as one picture: implementations and their formats down, laws across, a cell what became of the law.

A cell joins the dtypes that an implementation was given: it is a cross where the law is broken from every dtype that the law
applies to, and cut in two, with the dtypes that break it, where it holds from the others. Colour is never all there is: each
verdict has a glyph of its own. An implementation's formats stay together, in as many columns as keep the page in proportion.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure

from exmy.grids import SUFFIXES
from exmy.looks import COLOURS, LETTERING
from train.durable import atomically

CELL = 0.235  # inches, and the unit of the axes
LABELS, NAMES, GAP = 7.2, 5.6, 2.2  # in cells: formats to the left, laws above, between columns and at the edges
HEAD = 1.5  # cells above each implementation for its name
PROPORTION = 1.5  # about which the page is taller than wide
AGAIN = 24  # cells down, after which the laws' names stand below as well
PASS, SOME, FAIL, NOT, ABSENT = "pass", "some", "fail", "not applicable", ""
FILLS = {PASS: "#D6E8F5", FAIL: COLOURS[0], NOT: "#F1F1F1", ABSENT: "#FFFFFF"}
MARKS = {PASS: ("$✓$", 26.0, 0.4, "#2B5F86"), FAIL: ("x", 26.0, 1.5, "#000000"), NOT: (".", 9.0, 0.4, "#777777")}
SHORT = {"float32": "32", "float64": "64", "float16": "16", "bfloat16": "b16"}
STARTS = ("on_grid", "monotone", "unbiased", "scale_rule")  # of kinds of laws; a line before each


class Cell(NamedTuple):
    """pass, fail, some (fails from the named dtypes and from no other), not applicable, or "" where nothing was asked."""

    verdict: str
    dtypes: tuple[str, ...] = ()


class Panel(NamedTuple):
    """An implementation: its formats, and for each a cell to every law."""

    name: str
    formats: tuple[str, ...]
    cells: tuple[tuple[Cell, ...], ...]

    @property
    def height(self) -> float:
        """In cells."""
        return HEAD + len(self.formats)

    @property
    def kept(self) -> int:
        """Formats of which no law is broken."""
        return sum(not any(cell.verdict in (FAIL, SOME) for cell in row) for row in self.cells)


def joined(verdicts: Mapping[str, str]) -> Cell:
    """One verdict of those by input dtype: what fails from all dtypes that it applies to, from some, or from none."""
    told = {dtype: verdict for dtype, verdict in verdicts.items() if verdict in (PASS, FAIL)}
    failing = tuple(dtype for dtype, verdict in told.items() if verdict == FAIL)
    if not told:
        return Cell(NOT if NOT in verdicts.values() else ABSENT)
    return Cell(FAIL if len(failing) == len(told) else SOME if failing else PASS, failing)


def panels(data: xr.Dataset) -> list[Panel]:
    """The rows of `verification.matrix`, formats left out that an implementation was not asked for."""
    dtypes = data["input_dtype"].values.astype(str).tolist()
    found = []
    for name in data["implementation"].values.astype(str).tolist():
        own = data["verdict"].sel(implementation=name).transpose("format", "law", "input_dtype").values.astype(str)
        asked = [i for i in range(own.shape[0]) if (own[i] != ABSENT).any()]
        cells = tuple(tuple(joined(dict(zip(dtypes, law, strict=True))) for law in own[i].tolist()) for i in asked)
        found.append(Panel(name, tuple(data["format"].values.astype(str)[asked].tolist()), cells))
    return [panel for panel in found if panel.formats]


def conformance_figure(data: xr.Dataset, path: Path) -> None:
    """Draw what `verification.matrix` gives into `path`, as PNG, SVG or PDF by its suffix, whole or not at all.

    ValueError for another suffix, or where nothing was judged; OSError for a bad place.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"{path}: the picture's name must end in {', '.join(SUFFIXES)}, got {path.suffix or 'no suffix'!r}"
        )
    listed = panels(data)
    if not listed:
        raise ValueError(f"{path}: nothing was judged, so there is nothing to draw; give it some reports")
    with matplotlib.rc_context(LETTERING | {"font.size": 9.5, "axes.grid": False}):
        figure = _draw(listed, data["law"].values.astype(str).tolist(), data["input_dtype"].values.astype(str).tolist())
        with atomically(path) as aside:
            figure.savefig(aside, format=path.suffix[1:].lower())


def _draw(listed: list[Panel], laws: list[str], dtypes: list[str]) -> Figure:
    columns = _columns(listed, LABELS + len(laws) + GAP)
    across = LABELS + len(laws) + GAP
    down = max(sum(panel.height for panel in column) for column in columns)
    below = NAMES if down > AGAIN else 1.0
    notes = _notes(dtypes, absent=any(cell.verdict == ABSENT for p in listed for row in p.cells for cell in row))
    lines = -(-len(notes) // len(columns))
    width, height = len(columns) * across + 1.5, NAMES + down + below + 1.4 * lines + 3.0
    figure = Figure(figsize=(width * CELL, height * CELL), dpi=130)
    for place, column in enumerate(columns):
        own = sum(panel.height for panel in column)
        left, top = place * across + 1.2 + LABELS, NAMES + 1.4
        axes = figure.add_axes((left / width, 1 - (top + own) / height, len(laws) / width, own / height))
        _column(axes, column, laws)
        if place == 0:
            axes.set_ylabel("number format, by implementation")
            axes.yaxis.set_label_coords(-(LABELS + 0.4) / len(laws), 0.5)
    axes = figure.add_axes((1.2 / width, 0.6 / height, 1 - 1.4 / width, 1.4 * lines / height))
    axes.set(xlim=(0, width - 1.4), ylim=(1.4 * lines, 0))
    axes.axis("off")
    for place, (cell, words) in enumerate(notes):
        x, y = (place // lines) * across, 1.4 * (place % lines)
        _cells(axes, [(x, y, cell)])
        axes.text(x + 1.5, y + 0.5, words, va="center")
    return figure


def _columns(listed: list[Panel], across: float) -> list[list[Panel]]:
    """Panels in order, in the number of columns that comes nearest to the proportion, none much longer than it must be."""
    total = sum(panel.height for panel in listed)
    count = min(range(1, len(listed) + 1), key=lambda n: abs(total / n / (n * across) - PROPORTION))
    most = max(total / count, *(panel.height for panel in listed), 0.0)
    while len(found := _filled(listed, most)) > count:
        most += 1
    return found


def _filled(listed: list[Panel], most: float) -> list[list[Panel]]:
    columns: list[list[Panel]] = [[]]
    for panel in listed:
        if columns[-1] and sum(other.height for other in columns[-1]) + panel.height > most:
            columns.append([])
        columns[-1].append(panel)
    return columns


def _column(axes: Axes, column: Iterable[Panel], laws: list[str]) -> None:
    """One above the other: each implementation's name, and its formats with their cells."""
    cells: list[tuple[float, float, Cell]] = []
    places: list[float] = []
    names: list[str] = []
    y = 0.0
    for panel in column:
        axes.text(-LABELS, y + HEAD - 0.5, panel.name, weight="bold", va="center", size=10.5)
        kept = f"{panel.kept} of {len(panel.formats)} formats keep every law"
        axes.text(len(laws), y + HEAD - 0.5, kept, ha="right", va="center", size=8, color="#555555")
        y += HEAD
        for name, row in zip(panel.formats, panel.cells, strict=True):
            cells += [(float(x), y, cell) for x, cell in enumerate(row)]
            places.append(y + 0.5)
            names.append(name)
            y += 1
        starts = [x for x, law in enumerate(laws) if law in STARTS]
        bottom = y - len(panel.formats)
        axes.add_collection(LineCollection([[(x, bottom), (x, y)] for x in starts], colors="#555555", linewidths=0.9))
    _cells(axes, cells)
    axes.set(xlim=(0, len(laws)), ylim=(y, 0))
    axes.set_yticks(places, names, size=8)
    axes.set_xticks([x + 0.5 for x in range(len(laws))], laws, rotation=60, ha="left", rotation_mode="anchor")
    axes.tick_params(length=0, pad=3, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("law")
    axes.xaxis.set_label_position("top")
    if y > AGAIN:
        for x, law in enumerate(laws):
            axes.text(x + 0.7, y + 0.25, law, rotation=60, ha="right", va="top", rotation_mode="anchor")


def _cells(axes: Axes, cells: list[tuple[float, float, Cell]]) -> None:
    """Squares, their glyphs, and the dtypes of those cut in two."""
    frame: dict[str, Any] = {"edgecolors": "#FFFFFF", "linewidths": 0.8}
    squares = [[(x, y), (x + 1, y), (x + 1, y + 1), (x, y + 1)] for x, y, _ in cells]
    fills = [FILLS[PASS if cell.verdict == SOME else cell.verdict] for _, _, cell in cells]
    axes.add_collection(PolyCollection(squares, facecolors=fills, **frame))
    cut = [(x, y, cell) for x, y, cell in cells if cell.verdict == SOME]
    halves = [[(x + 1, y), (x + 1, y + 1), (x, y + 1)] for x, y, _ in cut]
    axes.add_collection(PolyCollection(halves, facecolors=FILLS[FAIL], **frame))
    for verdict, (marker, size, weight, colour) in MARKS.items():
        own = [(x + 0.5, y + 0.5) for x, y, cell in cells if cell.verdict == verdict]
        across, down = [x for x, _ in own], [y for _, y in own]
        axes.scatter(across, down, s=size, marker=marker, c=colour, lw=weight, clip_on=False, gid=verdict)
    for x, y, cell in cut:
        words = [SHORT.get(dtype, dtype) for dtype in cell.dtypes]
        size = {1: 6.2 if len(words[0]) > 2 else 7.5, 2: 5.0}.get(len(words), 3.6)
        style: dict[str, Any] = {"weight": "bold", "size": size, "linespacing": 0.9, "gid": SOME}
        axes.text(x + 0.5, y + 0.52, "\n".join(words), ha="center", va="center", **style)


def _notes(dtypes: list[str], *, absent: bool) -> list[tuple[Cell, str]]:
    """The legend: a cell and its meaning."""
    words = ", ".join(f"{SHORT[dtype]} {dtype}" if dtype in SHORT else dtype for dtype in dtypes)
    return [
        (Cell(PASS), "kept from every input dtype that the law applies to"),
        (Cell(FAIL), "broken from every one of them"),
        (Cell(SOME, tuple(dtypes[-1:])), f"broken from those named only ({words})"),
        (Cell(NOT), "not applicable"),
        *([(Cell(ABSENT), "not asked")] if absent else []),
    ]
