"""Datasets of this package as pictures: plain functions, an xarray Dataset in, matplotlib Axes out.

    import landscape.plot
    landscape.plot.against(data, "sam_sharpness").figure.savefig("sam.png")

or through the accessor, `data.exmy.plot.against("sam_sharpness")`. Axes are labelled with the variables' long names and units.
What is known of a value's error is drawn with it: bounds as a band, standard errors and residuals as bars. A run has a colour, a
marker and dashes; above `FEW` runs each is a thin line, coloured by recipe where there is one, under the runs' median. A value
that is not finite leaves a gap, and the title counts it.

Each function takes `ax`, drawn into as it is; without it a figure of its own, which belongs to no window and needs no closing.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from functools import wraps
from typing import Any, ParamSpec

import matplotlib
import numpy as np
import numpy.typing as npt
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import ArrayLike

from landscape.errors import LandscapeError
from landscape.looks import COLOURS, DASHES, LETTERING, MARKERS
from landscape.traces import smoothed_density

Floats = npt.NDArray[np.float64]

FEW = 7  # runs with a colour each
NAMING = (
    "recipe",
    "learning_rate",
    "seed",
    "init_seed",
    "data_seed",
    "dataset",
    "model",
)  # what tells runs apart, in this order
GREY = "#555555"
P = ParamSpec("P")


def _lettered(draw: Callable[P, Axes]) -> Callable[P, Axes]:
    """In this package's lettering, but for Axes of the caller's, which have their own."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Axes:
        with matplotlib.rc_context(LETTERING if kwargs.get("ax") is None else {}):
            return draw(*args, **kwargs)

    return drawn


@_lettered
def against(data: xr.Dataset, name: str, along: Hashable | None = None, *, ax: Axes | None = None) -> Axes:
    """A measure against one of its dimensions, the last if `along` is left out, a line a run; runs themselves are points.

    name: a variable, or the part before `_lower`; `_lower` to `_upper` is a band, `_stderr` or, for eigenvalues, `residual`
    bars of one each way. A dimension over two decades, all positive, is logarithmic. LandscapeError where there is no such
    variable, or where further dimensions have to be chosen from with `.isel` first.
    """
    data = _measured(data)
    main, lower, upper, bar = _parts(data, name)
    along = _axis(main, along)
    ax = _axes(ax)
    x, looks = _places(main, along), _Looks(data, main, along)
    for run, label in looks.rows:
        y = _row(main, run, along)
        style = looks.style(run)
        if bar is not None:
            ax.errorbar(x, y, _row(bar, run, along), label=label, capsize=3, **style)
        else:
            ax.plot(x, y, label=label, **style)
        if upper is not None and lower is not None:
            ax.fill_between(x, _row(lower, run, along), _row(upper, run, along), color=style["color"], alpha=0.25, lw=0)
    _median(ax, x, main, along, looks)
    _scale(ax, x, main.values if bar is None else (main - bar).values)
    _along(ax, data, along)
    ax.set_ylabel(_label(main))
    _title(ax, name.replace("_", " "), main)
    errors = (
        f"a {'residual' if str(bar.name).endswith('residual') else 'standard error'} each way"
        if bar is not None
        else ""
    )
    _legend(ax, "from the point found to the upper bound" if upper is not None else "", errors)
    return ax


@_lettered
def eigenvalues(data: xr.Dataset, *, ax: Axes | None = None) -> Axes:
    """Eigenvalues by rank, bars of a residual each way: an eigenvalue of H lies within."""
    names = [n for n in ("hessian_eigenvalue", "smallest_eigenvalue", "preconditioned_eigenvalue") if n in data]
    if not names:
        raise LandscapeError(f"there are no eigenvalues among {_listed(data)}; hessian_eigenvalues measures them")
    ax = against(data, names[0], "rank", ax=ax)
    count = data.sizes["rank"]
    ax.set_xlabel("rank")
    ax.set_xticks(range(count), [str(i + 1) for i in range(count)])
    return ax


@_lettered
def spectral_density(
    data: xr.Dataset, *, width: float | None = None, at: ArrayLike | None = None, ax: Axes | None = None
) -> Axes:
    """The density of H's eigenvalues on a logarithmic scale, from `spectral_density`'s nodes, or as `smoothed_density` gave it.

    width of the normal distribution around each node: a fiftieth of the nodes' range if left out; at: eigenvalues, 400 over the
    range. The band is a standard error each way. Below a millionth of the highest density nothing is drawn.
    """
    data = _measured(data)
    if "density" not in data:
        data = _smoothed(data, width, at)
    ax = _axes(ax)
    density, looks = data["density"], _Looks(data, data["density"], "eigenvalue")
    for run, label in looks.rows:
        y, e = _row(density, run, "eigenvalue"), _row(data["density_stderr"], run, "eigenvalue")
        style = looks.style(run) | {"marker": None}
        ax.plot(data["eigenvalue"], y, label=label, **style)
        ax.fill_between(data["eigenvalue"], np.maximum(y - e, 0), y + e, color=style["color"], alpha=0.25, lw=0)
    top = float(np.nanmax(density.values)) if density.notnull().any() else 1.0
    ax.set_yscale("log")
    ax.set_ylim(1e-6 * top, 3 * top)
    ax.set_xlabel(_label(data["eigenvalue"]))
    ax.set_ylabel(_label(density))
    units = data["eigenvalue"].attrs.get("units", "loss")
    _title(
        ax,
        f"spectral density, smoothed by {data.attrs['width']:.2g} {units}" if "width" in data.attrs else "density",
        density,
    )
    _legend(ax, "a standard error each way" if data["density_stderr"].notnull().any() else "")
    return ax


@_lettered
def loss_slice(data: xr.Dataset, *, ax: Axes | None = None) -> Axes:
    """The loss along a direction, with a mark where the parameters are."""
    ax = against(data, "loss_slice", "alpha", ax=ax)
    _mark(ax, data, "alpha")
    return ax


@_lettered
def loss_plane(data: xr.Dataset, *, ax: Axes | None = None, levels: int = 15) -> Axes:
    """Contours of the loss over a plane, of one run: choose it with `.isel(run=...)`. A cross is where the parameters are."""
    if "loss_plane" not in data:
        raise LandscapeError(
            f"there is no loss_plane among {_listed(data)}; slice_loss with a second direction gives it"
        )
    plane = data["loss_plane"].squeeze(drop=True)
    if set(plane.dims) != {"alpha", "beta"}:
        raise LandscapeError(f"a plane is of one run, got dims {data['loss_plane'].dims}; choose with .isel(run=0)")
    plane = plane.transpose("beta", "alpha")
    ax = _axes(ax)
    finite = np.ma.masked_invalid(plane.values)
    filled = ax.contourf(plane["alpha"], plane["beta"], finite, levels=levels, cmap="cividis")
    ax.contour(plane["alpha"], plane["beta"], finite, levels=filled.levels, colors="white", linewidths=0.5)
    assert ax.figure is not None
    ax.figure.colorbar(filled, ax=ax, label=_label(data["loss_plane"]))
    ax.plot(0, 0, "+", color="#D55E00", markersize=14, markeredgewidth=3)
    ax.grid(visible=False)
    ax.set_xlabel(_label(data["alpha"]))
    ax.set_ylabel(_label(data["beta"]))
    _title(ax, "loss plane", plane)
    return ax


class _Looks:
    """The runs of a picture: which are drawn, what they are called, and how."""

    def __init__(self, data: xr.Dataset, values: xr.DataArray, along: Hashable) -> None:
        lines = "run" in values.dims and along != "run"
        self.count = values.sizes["run"] if lines else 1
        self.few = self.count <= FEW
        names = _names(data, self.count) if lines else [""]
        self.across = along == "run"
        self.recipes = None if self.few or "recipe" not in data.coords else data["recipe"].values.astype(str)
        kinds = [] if self.recipes is None else list(dict.fromkeys(self.recipes.tolist()))
        self.kinds = kinds if len(kinds) <= FEW else []
        self.rows: list[tuple[int | None, str | None]] = (
            [(None, None)]
            if not lines
            else [(run, names[run] if self.few and self.count > 1 else None) for run in range(self.count)]
        )

    def style(self, run: int | None) -> dict[str, Any]:
        if not self.few:
            kind = self.kinds.index(self.recipes[run]) if self.kinds and self.recipes is not None else None
            return {"color": GREY if kind is None else COLOURS[kind], "lw": 0.8, "alpha": 0.6}
        i = run or 0
        if self.across:
            return {"color": COLOURS[i], "marker": MARKERS[i], "linestyle": "none", "markersize": 6}
        return {"color": COLOURS[i], "marker": MARKERS[i], "linestyle": DASHES[i], "lw": 1.8, "markersize": 5}


def _measured(data: xr.Dataset) -> xr.Dataset:
    """Without the runs that were not measured, whose values are padding."""
    if "measured" in data and data["measured"].dims == ("run",):
        return data.isel(run=data["measured"].values.astype(bool))
    return data


def _names(data: xr.Dataset, count: int) -> list[str]:
    """What tells runs apart: the coordinates that differ between them, each said once, or their numbers."""
    told = [data[n].values.tolist() for n in NAMING if n in data.coords and data[n].dims == ("run",)]
    differ = [row for i, row in enumerate(told) if len(set(row)) > 1 and row not in told[:i]]
    if not differ:
        return [f"run {i}" for i in range(count)]
    return [", ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row) for row in zip(*differ, strict=True)]


def _parts(
    data: xr.Dataset, name: str
) -> tuple[xr.DataArray, xr.DataArray | None, xr.DataArray | None, xr.DataArray | None]:
    """A measure's values, lower and upper bounds, and bars, those of them that there are."""
    lower, upper = data.get(f"{name}_lower"), data.get(f"{name}_upper")
    main = data[name] if name in data.data_vars else lower
    if main is None:
        raise LandscapeError(f"there is no {name!r} to draw; the variables are {_listed(data)}")
    bar = data.get(f"{name}_stderr", data.get(f"{name}_residual"))
    if bar is None and name.endswith("_eigenvalue"):
        bar = data.get("residual")
    return main, lower, upper, bar


def _axis(values: xr.DataArray, along: Hashable | None) -> Hashable:
    """The dimension to draw along; every other but `run` must be of one."""
    dims = [d for d in values.dims if d != "run" and (values.sizes[d] > 1 or d == along)]
    if along is None:
        along = dims[-1] if dims else next((d for d in reversed(values.dims) if d != "run"), "run")
    if along not in values.dims:
        raise LandscapeError(
            f"{values.name} has no dimension {along!r}; its dimensions are {', '.join(map(str, values.dims))}"
        )
    if others := [str(d) for d in dims if d != along]:
        raise LandscapeError(
            f"{values.name} has {' and '.join(others)} beside {along}; choose with .isel({others[0]}=0)"
        )
    return along


def _row(values: xr.DataArray, run: int | None, along: Hashable) -> Floats:
    """One run's values along a dimension."""
    one = values if run is None or along == "run" else values.isel(run=run)
    return np.asarray(one.squeeze([d for d in one.dims if d != along]).values, dtype=np.float64)


def _places(values: xr.DataArray, along: Hashable) -> Floats:
    if along in values.coords and along != "run":
        return np.asarray(values[along].values, dtype=np.float64)
    return np.arange(values.sizes[along], dtype=np.float64)


def _along(ax: Axes, data: xr.Dataset, along: Hashable) -> None:
    """What is said of the axis: its name and units; of runs, what each is called where there is room for it."""
    if along != "run":
        ax.set_xlabel(_label(data[along]) if along in data.coords else str(along))
        return
    names = _names(data, data.sizes["run"])
    if len(names) <= 2 * FEW:
        ax.set_xticks(range(len(names)), names, rotation=30, ha="right")
    ax.set_xlabel("run")


def _median(ax: Axes, x: Floats, values: xr.DataArray, along: Hashable, looks: _Looks) -> None:
    """Of many runs, of each recipe where they have a colour; a value that is not finite counts as infinite, and is a gap."""
    if looks.few:
        return
    chosen = [(None, "#000000")] if not looks.kinds else list(zip(looks.kinds, COLOURS, strict=False))
    for kind, colour in chosen:
        own = values if kind is None or looks.recipes is None else values.isel(run=looks.recipes == kind)
        own = own.squeeze([d for d in own.dims if d not in ("run", along)])
        middle = own.where(np.isfinite(own), np.inf).median("run")
        label = f"median of {own.sizes['run']} runs" if kind is None else f"{kind}, median of {own.sizes['run']}"
        ax.plot(x, middle.where(np.isfinite(middle)).values, color=colour, lw=2.8, label=label)


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    made: Axes = Figure(figsize=(8, 5), dpi=100, layout="constrained").subplots()
    return made


def _scale(ax: Axes, x: Floats, y: Floats) -> None:
    """Logarithmic where a grid of sizes runs over decades, and then values too that do; y: the lowest that is drawn."""
    if len(x) > 1 and (x > 0).all() and x.max() >= 10 * x.min():
        ax.set_xscale("log")
        held = y[np.isfinite(y)]
        if held.size and (held > 0).all() and held.max() >= 100 * held.min():
            ax.set_yscale("log")


def _label(values: xr.DataArray) -> str:
    """Long name and units, without what belongs to a bound."""
    words = str(values.attrs.get("long_name", values.name)).removesuffix(": from below").removesuffix(": from above")
    units = values.attrs.get("units", "1")
    text = words if units == "1" else f"{words} [{units}]".replace(units, units.replace(" ", "\u00a0"))
    return "\n".join(_wrapped(text))


def _wrapped(text: str, width: int = 44) -> Iterator[str]:
    """Lines of at most `width` characters, so that a long name stays beside its axis."""
    line = ""
    for word in text.split(" "):
        if line and len(line) + 1 + len(word) > width:
            yield line
            line = word
        else:
            line = f"{line} {word}".strip()
    yield line


def _title(ax: Axes, words: str, values: xr.DataArray) -> None:
    lost = int((~np.isfinite(values)).sum())
    ax.set_title(f"{words}; not finite: {lost} of {values.size} values" if lost else words, loc="left")


def _legend(ax: Axes, band: str, bars: str = "") -> None:
    """What lines, bands and bars are; none where there is nothing to say."""
    handles, labels = ax.get_legend_handles_labels()
    if band:
        handles, labels = [*handles, Patch(color=GREY, alpha=0.25, lw=0)], [*labels, band]
    if bars:
        handles, labels = [*handles, Line2D([], [], color=GREY, marker="|", markersize=12, lw=0)], [*labels, bars]
    if handles:
        ax.legend(handles, labels, fontsize="small")


def _mark(ax: Axes, data: xr.Dataset, axis: str) -> None:
    if float(data[axis].min()) <= 0 <= float(data[axis].max()):
        ax.axvline(0, color=GREY, lw=1, ls=":", zorder=0)


def _smoothed(data: xr.Dataset, width: float | None, at: ArrayLike | None) -> xr.Dataset:
    if "node" not in data:
        raise LandscapeError(f"there is no spectral density among {_listed(data)}; spectral_density measures it")
    held = data["node"].where(data["weight"] > 0)
    low, high = float(held.min()), float(held.max())
    spread = max(high - low, 1e-3 * max(abs(low), abs(high)), 1e-12)
    width = spread / 50 if width is None else width
    places = np.linspace(low - 3 * width, high + 3 * width, 400) if at is None else at
    smoothed = smoothed_density(data, places, width)
    return smoothed.assign_coords({n: c for n, c in data.coords.items() if set(c.dims) <= {"run"}})


def _listed(data: xr.Dataset) -> str:
    return ", ".join(sorted(map(str, data.data_vars))) or "no variables"
