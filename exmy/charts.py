"""The report's figures as plotly reads them: dictionaries of data and layout, made from a group of runs.

Nothing is drawn here; the page's script draws a figure when it comes into view. Colours, markers and dashes are those of
`looks`, and `figure`'s are the marks of a run that diverged: an open marker; a cross where the loss is not finite; a triangle at
the upper edge where it is finite and above the axis. Titles and legends are the page's own, so that they cannot overlap a plot.
"""

from __future__ import annotations

import base64
import html
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from exmy.figure import FEW_SEEDS, highest, limits, smoothed
from exmy.looks import Look
from exmy.thinning import thinned

Floats = npt.NDArray[np.float64]
Chart = dict[str, Any]

SYMBOLS = {"o": "circle", "s": "square", "^": "triangle-up", "D": "diamond", "v": "triangle-down", "P": "cross"}
SYMBOLS |= {"h": "hexagon", "*": "star"}
GREY, GRID, INK = "#555555", "#E4E4E4", "#222222"
# One hue, light to dark, and a step from none to the first, so that one run of thirty is seen.
SHARES = [[0.0, "#FFFFFF"], [0.001, "#FCE9DA"], [0.5, "#F2A66A"], [1.0, "#B24A00"]]
FEWEST_POINTS, MOST_POINTS = 60, 400  # of a thinned curve
MANY_RUNS = 1000  # in a study: above, seeds are drawn as bands, so that the page stays small


@dataclass(frozen=True)
class Detail:
    """How much of a study's curves a page holds: points of a curve, and up to how many seeds are drawn a line each."""

    points: int
    seeds: int


def final_losses(runs: xr.Dataset, history: xr.Dataset, looks: dict[str, Look]) -> Chart:
    """Final loss of every run against its learning rate, and a line through the seed medians of each recipe."""
    recipe, rate = runs["recipe"].values.astype(str), runs["learning_rate"].values.astype(np.float64)
    loss, diverged = runs["final_loss"].values.astype(np.float64), runs["diverged"].values.astype(bool)
    seeds = _seeds(runs)
    rates = np.unique(rate)
    edge = highest(history, runs)
    entropy = _finite(runs["unigram_entropy"].values)
    low, high = limits(np.concatenate([_finite(loss), entropy]), edge, headroom=0.16)
    above_at, lost_at = high - 0.08 * (high - low), high - 0.03 * (high - low)
    spacing = float(np.diff(np.log(rates)).min()) if rates.size > 1 else 1.0
    data: list[Chart] = [_line_at(value, rates[0] / 2, rates[-1] * 2) for value in np.unique(entropy)]
    for name, look in looks.items():
        own = recipe == name
        if not own.any():
            continue
        aside = math.exp(look.aside * min(spacing, 1.0) * 0.8)
        tried = np.unique(rate[own])
        medians = np.array([np.median(np.where(np.isfinite(loss), loss, np.inf)[own & (rate == r)]) for r in tried])
        data.append(_line(tried * aside, np.where(medians <= above_at, medians, np.nan), name, look, width=2))
        shown = np.where(np.isfinite(loss), np.minimum(loss, above_at), lost_at)
        symbols = _symbols(look, loss, diverged, above_at)
        said = [
            f"{_plain(name)}, seed {seed}<br>lr {r:.3g}, final loss {value:.4g}{', diverged' if bad else ''}"
            for seed, r, value, bad in zip(seeds[own], rate[own], loss[own], diverged[own], strict=True)
        ]
        data.append(
            {
                "type": "scatter", "mode": "markers", "x": packed(rate[own] * aside), "y": packed(shown[own]), "meta": name,
                "marker": _marks(symbols[own], look) | {"opacity": 0.85},
                "text": said, "hovertemplate": "%{text}<extra></extra>", "cliponaxis": False,
            }
        )  # fmt: skip
    margin = math.log10(math.exp(0.5 * spacing))
    axis = _axis("peak learning rate (log scale)") | {
        "type": "log", "tickvals": rates.tolist(), "ticktext": [f"{r:.3g}" for r in rates],
        "range": [math.log10(rates[0]) - margin, math.log10(rates[-1]) + margin],
    }  # fmt: skip
    return {
        "data": data,
        "layout": _layout(430)
        | {"xaxis": axis, "yaxis": _axis("final training loss (nats/token)") | {"range": [low, high]}},
    }


def heat_map(table: xr.Dataset) -> Chart:
    """Share of runs that diverged by recipe and learning rate; table: as `train.stability_table` gives it."""
    k, n = table["k"].values, table["n"].values
    recipes, rates = table["recipe"].values.astype(str).tolist(), table["learning_rate"].values.tolist()
    cells = [[f"{a}/{b}" if b else "" for a, b in zip(*rows, strict=True)] for rows in zip(k, n, strict=True)]

    def said(i: int, j: int) -> str:
        cell = table.isel(recipe=i, learning_rate=j)
        interval = f"[{100 * float(cell['rate_lower']):.0f}–{100 * float(cell['rate_upper']):.0f} %]"
        return (
            f"{_plain(recipes[i])}, lr {rates[j]:.3g}<br>{cells[i][j] or 'no run'} diverged {interval if cells[i][j] else ''}"
            f"<br>mean final loss {float(cell['final_loss_mean']):.4g} nats/token"
        )

    data = {
        "type": "heatmap", "z": [[None if math.isnan(share) else share for share in row] for row in 100 * table["rate"].values],
        "x": [f"{rate:.3g}" for rate in rates], "y": [_plain(name) for name in recipes], "text": cells, "texttemplate": "%{text}",
        "hovertext": [[said(i, j) for j in range(len(rates))] for i in range(len(recipes))],
        "hovertemplate": "%{hovertext}<extra></extra>", "zmin": 0, "zmax": 100, "colorscale": SHARES, "xgap": 2, "ygap": 2,
        "showscale": False,
    }  # fmt: skip
    layout = _layout(130 + 34 * len(recipes)) | {
        "xaxis": _axis("peak learning rate") | {"type": "category", "showgrid": False},
        "yaxis": _axis("") | {"type": "category", "autorange": "reversed", "showgrid": False},
    }
    return {"data": [data], "layout": layout}


def curves(
    history: xr.Dataset, runs: xr.Dataset, sharpness: xr.Dataset | None, looks: dict[str, Look], drawn: Detail
) -> Chart:
    """Training loss, gradient norm and sharpness of the runs at one learning rate, below each other on one axis of steps.

    The strong line is the median over seeds of the mean over the last steps; thin lines are the seeds themselves, or a band
    from their least to their greatest value where there are many, every step's extremes kept.
    """
    steps = history["step"].values.astype(np.float64)
    recorded = np.asarray(steps <= history["last_step"].values.astype(np.float64)[:, None])
    loss, norm = (
        np.where(recorded, history[name].transpose("run", "step").values.astype(np.float64), np.nan)
        for name in ("train_loss", "grad_norm")
    )
    recipe, seeds = runs["recipe"].values.astype(str), _seeds(runs)
    entropy = _finite(runs["unigram_entropy"].values)
    low, high = limits(np.concatenate([_finite(loss), entropy]), highest(history, runs), headroom=0.04)
    probes = None if sharpness is None else _probed(sharpness)
    data: list[Chart] = [_line_at(value, float(steps[0]), float(steps[-1])) for value in np.unique(entropy)]
    for name, look in looks.items():
        own = recipe == name
        if not own.any():
            continue
        data += _band_and_median(steps, loss[own], name, look, seeds[own], drawn, "y", high)
        data += _band_and_median(steps, norm[own], name, look, seeds[own], drawn, "y2", math.inf)
        if probes is not None:
            data += _band_and_median(*probes[0], name, look, seeds, drawn, "y3", math.inf, own=own, smooth=False)
        data += _divergences(steps, loss[own], runs.isel(run=own), name, look, high)
    panels = 2 if probes is None else 3
    domains = {2: [(0.42, 1.0), (0.0, 0.35)], 3: [(0.56, 1.0), (0.29, 0.51), (0.0, 0.24)]}[panels]
    last = "y" if panels == 1 else f"y{panels}"
    end = float(steps[-1]) if steps.size > 1 else float(steps[0]) + 1
    layout = _layout(560 if panels == 2 else 820) | {
        "xaxis": _axis("step") | {"anchor": last, "range": [float(steps[0]), end * 1.01]},
        "yaxis": _axis("loss (nats/token)") | {"range": [low, high], "domain": domains[0]},
        "yaxis2": _axis("gradient norm (log)") | {"domain": domains[1]} | _log_ticks(norm),
    }
    if probes is not None:
        layout["yaxis3"] = _axis(f"sharpness (%), ε {probes[1]:g}") | {"domain": domains[2]} | _log_ticks(probes[0][1])
    data.sort(key=lambda trace: trace.get("meta") is not None and not trace.pop("under", False))  # medians over seeds
    return {"data": data, "layout": layout}


def detail(runs: int) -> Detail:
    """What a page about that many runs can hold, so that it stays small whatever the study's size is."""
    points = int(np.clip(150_000 // max(min(runs, MANY_RUNS), 1), FEWEST_POINTS, MOST_POINTS))
    return Detail(points, FEW_SEEDS if runs <= MANY_RUNS else 2)


def packed(values: npt.ArrayLike) -> Any:
    """Numbers in plotly's compact form, single precision: 4 bytes each and NaN kept, where JSON has no word for it."""
    array = np.ascontiguousarray(values, dtype="<f4")
    return {"dtype": "f4", "bdata": base64.b64encode(array.tobytes()).decode("ascii")}


def along(x: npt.ArrayLike) -> Chart:
    """Plotly's words for an axis of numbers: start and spacing where it is even."""
    array = np.asarray(x, np.float64)
    gaps = np.diff(array)
    if array.size > 2 and np.all(gaps == gaps[0]):
        return {"x0": float(array[0]), "dx": float(gaps[0])}
    return {"x": packed(array)}


def _band_and_median(
    steps: Floats, values: Floats, name: str, look: Look, seeds: npt.NDArray[Any], drawn: Detail, axis: str, ceiling: float,
    *, own: npt.NDArray[np.bool_] | None = None, smooth: bool = True,
) -> list[Chart]:  # fmt: skip
    """Seeds as thin lines or as a band, and their median; values above the ceiling are cut to just above it."""
    if own is not None:
        values, seeds = values[own], seeds[own]
    if axis != "y":  # a logarithm needs what is positive
        values = np.where(values > 0, values, np.nan)
    x, y = thinned(steps, values, drawn.points)
    y = np.where(y > ceiling, ceiling * 1.05, y)
    thin = {"type": "scatter", "mode": "lines", "meta": name, "yaxis": axis, "under": True}
    traces: list[Chart] = []
    if len(values) > drawn.seeds:
        least, greatest = (_over_seeds(function, y) for function in (np.fmin, np.fmax))
        band = thin | along(x) | {"line": {"width": 0}, "hoverinfo": "skip"}
        traces.append(band | {"y": packed(least)})
        traces.append(band | {"y": packed(greatest), "fill": "tonexty", "fillcolor": _faint(look.colour)})
    else:
        for seed, curve in zip(seeds, y, strict=True):
            traces.append(
                thin | along(x) | {"y": packed(curve), "opacity": 0.2, "line": {"color": look.colour, "width": 1}}
                | {"hovertemplate": f"{_plain(name)}, seed {seed}: %{{y:.4g}} at step %{{x:.0f}}<extra></extra>"}
            )  # fmt: skip
    window = max(1, steps.size // 60) if smooth else 1
    course = smoothed(values, window) if smooth else values
    median = np.median(np.where(np.isfinite(course), course, np.inf), axis=0)  # a lost seed counts as infinite
    median = np.where(np.isfinite(median) & (median <= ceiling), median, np.nan)
    x, (median,) = thinned(steps, median[None], drawn.points)
    return [*traces, _line(x, median, name, look, width=2.4, axis=axis)]


def _divergences(steps: Floats, loss: Floats, runs: xr.Dataset, name: str, look: Look, high: float) -> list[Chart]:
    """A marker for every run that diverged, at its step: a cross where the loss is not finite, a triangle above the axis."""
    chosen = runs["diverged"].values.astype(bool)
    if not chosen.any():
        return []
    at = runs["diverged_step"].values.astype(np.float64)[chosen]
    column = np.clip(np.searchsorted(steps, at), 0, steps.size - 1)
    value = loss[chosen, column]
    edge = high - 0.02 * abs(high)
    symbols = _symbols(look, value, np.ones(value.size, bool), edge)
    said = [
        f"{_plain(name)}, seed {seed}<br>diverged, step {step:.0f}, loss {v:.4g}"
        for seed, step, v in zip(_seeds(runs)[chosen], at, value, strict=True)
    ]
    return [
        {
            "type": "scatter", "mode": "markers", "meta": name,
            "x": packed(at), "y": packed(np.where(value <= edge, value, edge)), "marker": _marks(symbols, look),
            "text": said, "hovertemplate": "%{text}<extra></extra>", "cliponaxis": False,
        }
    ]  # fmt: skip


def _probed(sharpness: xr.Dataset) -> tuple[tuple[Floats, Floats], float] | None:
    """((probe steps, logit sharpness [run, probe]), epsilon) at the largest epsilon; None where nothing was measured."""
    if "logit_sharpness" not in sharpness:
        return None
    values = sharpness["logit_sharpness"].sortby("epsilon").isel(epsilon=-1).transpose("run", "probe_step")
    if not np.isfinite(values.values).any():
        return None
    return (values["probe_step"].values.astype(np.float64), values.values.astype(np.float64)), float(values["epsilon"])


def _over_seeds(function: Any, curves_of_seeds: Floats) -> Floats:
    """The ufunc fmin or fmax over seeds, which pass NaN over and say nothing where there is no other."""
    return np.asarray(function.reduce(curves_of_seeds, axis=0), np.float64)


def _symbols(look: Look, loss: Floats, diverged: npt.NDArray[np.bool_], edge: float) -> npt.NDArray[Any]:
    own = SYMBOLS[look.marker]
    inside = np.where(diverged, f"{own}-open", own)
    return np.where(np.isfinite(loss), np.where(loss > edge, "triangle-up", inside), "x-thin-open")


def _marks(symbols: npt.NDArray[Any], look: Look) -> Chart:
    return {"symbol": symbols.tolist(), "size": 8, "color": look.colour, "line": {"width": 1.5, "color": look.colour}}


def _line(x: npt.ArrayLike, y: npt.ArrayLike, name: str, look: Look, width: float, axis: str = "y") -> Chart:
    return {
        "type": "scatter", "mode": "lines", **along(x), "y": packed(y), "meta": name, "yaxis": axis, "hoverinfo": "skip",
        "line": {"color": look.colour, "width": width, "dash": dash(look)},
    }  # fmt: skip


def dash(look: Look) -> str:
    """A look's dashes in CSS pixels, "solid" for none."""
    return "solid" if look.dashes == "-" else ",".join(f"{2 * length:g}px" for length in look.dashes[1])


def _line_at(value: float, start: float, end: float) -> Chart:
    return {
        "type": "scatter", "mode": "lines", "x": [start, end], "y": [value, value],
        "line": {"color": GREY, "dash": "dot", "width": 1.5},
        "hovertemplate": f"unigram entropy {value:.4g} nats/token<extra></extra>",
    }  # fmt: skip


def _layout(height: int) -> Chart:
    return {
        "height": height, "margin": {"l": 62, "r": 16, "t": 12, "b": 52}, "showlegend": False, "hovermode": "closest",
        "font": {"size": 13, "color": INK, "family": "system-ui, sans-serif"}, "dragmode": False,
        "paper_bgcolor": "#FFFFFF", "plot_bgcolor": "#FFFFFF",
    }  # fmt: skip


def _axis(title: str) -> Chart:
    return {
        "title": {"text": title, "standoff": 8}, "gridcolor": GRID, "zeroline": False, "linecolor": "#999999", "ticks": "outside",
        "ticklen": 4, "tickcolor": "#999999", "automargin": True,
    }  # fmt: skip


def _log_ticks(values: Floats) -> Chart:
    """A logarithmic axis with a label at each power of ten, or at 1, 2 and 5 times it where there are few."""
    positive = values[np.isfinite(values) & (values > 0)]
    low, high = (np.log10(positive.min()), np.log10(positive.max())) if positive.size else (0.0, 1.0)
    decades = range(math.floor(low) - 1, math.ceil(high) + 2)
    every = max(1, math.ceil((high - low) / 5))
    factors = (1, 2, 5) if high - low < 2 else (1,)
    ticks = [factor * 10.0**decade for decade in decades if decade % every == 0 for factor in factors]
    pad = 0.06 * max(high - low, 0.1)
    return {
        "type": "log",
        "tickvals": ticks,
        "ticktext": [f"{t:g}" for t in ticks],
        "range": [float(low - pad), float(high + pad)],
    }


def _faint(colour: str) -> str:
    return f"rgba({int(colour[1:3], 16)},{int(colour[3:5], 16)},{int(colour[5:7], 16)},0.18)"


def _seeds(runs: xr.Dataset) -> npt.NDArray[Any]:
    return np.asarray(runs["seed"].values if "seed" in runs.coords else np.arange(runs.sizes["run"]))


def _finite(values: npt.ArrayLike) -> Floats:
    array = np.asarray(values, np.float64)
    return array[np.isfinite(array)]


def _plain(text: str) -> str:
    """Text that plotly won't read as markup."""
    return html.escape(text, quote=False)
