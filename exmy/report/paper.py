"""Figures of a study for papers: single-column, lettering of 8 points, no titles baked in, a file a figure and group of runs.

    verdicts             stable window, divergence rate and loss penalty of each recipe against the baseline, with intervals
    divergence           share of diverged runs by recipe and learning rate
    final-loss           final loss of every run against its learning rate, and the seeds' medians
    curves               loss and logit sharpness at the learning rate that suits the baseline best
    lead-times           steps from each signal's alarm to the onset
    quantization-error   of activations, weights and gradients over time, the mean over layers and seeds
    grids                the formats' positive values

What a study has no numbers for is left out. Legends are in the figures, since their markers say which recipe is which.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, LogFormatterSciNotation, LogLocator, NullLocator

from exmy.figure import highest, limits, reference_rate, room_of, smoothed
from exmy.groups import groups
from exmy.looks import Look, in_order, recipe_looks
from exmy.report.content import study_content
from exmy.report.packing import unpacked
from exmy.report.series import Room, lost_from
from train import Study, stability_table
from train.durable import atomically, made

SUFFIXES = ("pdf", "png", "svg")
COLUMN = 3.35  # inches: a column of two, in most venues
LETTERS: dict[Any, Any] = {
    "font.size": 8, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7, "legend.fontsize": 7, "axes.linewidth": 0.6,
    "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.2, "lines.markersize": 3.5,
    "legend.frameon": False, "pdf.fonttype": 42, "svg.fonttype": "none", "xtick.major.width": 0.6, "ytick.major.width": 0.6,
    "legend.handlelength": 2.6,
}  # fmt: skip
DPI = 600
GREY = "#555555"
FATES = {
    "open: diverged here": "o",
    "not finite here": "x",
    "diverged above": "^",
}  # and at the recipe's own marker, where it has one
SMALLEST = 3.8  # points, of letters in a cell; where even these don't fit, its colour says it


def paper_figures(study: Study, tree: xr.DataTree, folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Draw what the study has numbers for into `folder`, in each of the formats; the paths written. OSError for a bad place."""
    written = []
    with made(folder), matplotlib.rc_context(LETTERS):
        for name, figure in _figures(study, tree):
            for suffix in suffixes:
                path = folder / f"{name}.{suffix}"
                with atomically(path) as aside:
                    # No date: the same study gives the same file.
                    dated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(suffix, {})
                    figure.savefig(aside, format=suffix, metadata=dated)
                written.append(path)
    return written


def _figures(study: Study, tree: xr.DataTree) -> Iterator[tuple[str, Figure]]:
    summary, history = tree["summary"].to_dataset(), tree["history"].to_dataset()
    baseline = str(tree.attrs["baseline"])
    looks = recipe_looks(in_order(summary["recipe"]), baseline)
    content = study_content(study, tree, Room(layers=10**9))  # every layer's steps
    found = groups(summary)
    for group, held in zip(found, content["groups"], strict=True):
        slug = re.sub(r"[^\w.+-]+", "_", group.label)
        end = f"-{slug}" if len(found) > 1 else ""
        runs, of = summary.isel(run=group.runs), history.isel(run=group.runs)
        sharpness = tree["sharpness"].to_dataset().isel(run=group.runs) if "sharpness" in tree.children else None
        if held["verdicts"]["cards"]:
            yield f"verdicts{end}", _verdicts(held["verdicts"], np.unique(runs["learning_rate"].values), looks)
        yield f"divergence{end}", _divergence(runs)
        yield f"final-loss{end}", _final_losses(runs, of, looks)
        yield f"curves{end}", _curves(runs, of, sharpness, looks, baseline)
        if leads := _leads(content["signals"], tree, group.runs):
            yield f"lead-times{end}", _lead_times(leads, looks)
        if content["layers"] is not None:  # else nothing was recorded, or of all layers the loudest alone
            signals = tree["signals"].to_dataset().isel(run=group.runs)
            if "quantization_error" in signals and np.isfinite(signals["quantization_error"].values).any():
                yield f"quantization-error{end}", _quantization(signals, runs, looks, baseline)
    if content["formats"]:
        yield "grids", _grids(list(content["formats"].values()))


def _sheet(height: float, rows: int = 1, columns: int = 1, **how: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(COLUMN, height), dpi=DPI, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **how).ravel())


def _legend(figure: Figure, looks: dict[str, Look], present: Sequence[str], fates: Sequence[str] = ()) -> None:
    handles = [
        Line2D([], [], color=look.colour, ls=look.dashes, marker=look.marker, label=_plain(name))
        for name, look in looks.items()
        if name in present
    ]
    handles += [
        Line2D([], [], ls="", marker=FATES[name], color=GREY, mfc="none", mew=0.7, label=name) for name in fates
    ]
    if len(handles) > 1:
        figure.legend(handles=handles, loc="outside lower center", ncols=_columns([*present, *fates]))


def _columns(names: Sequence[str]) -> int:
    """Of a legend: as many, up to three, as the longest name leaves room for; all in points, of letters of 7."""
    line_and_gaps, letter, gap = 38, 4.5, 14
    return int(np.clip((72 * COLUMN + gap) // (line_and_gaps + letter * max(map(len, names))), 1, 3))


def _key_height(runs: xr.Dataset, fates: Sequence[str] = ()) -> float:
    """Inches that a legend of the runs' recipes and of their fates takes, so that it takes nothing from what is drawn."""
    names = [*in_order(runs["recipe"]), *fates]
    return 0.15 * math.ceil(len(names) / _columns(names))


def _verdicts(held: dict[str, Any], rates: Any, looks: dict[str, Look]) -> Figure:
    cards, base = held["cards"], held["baseline"]
    figure, (left, middle, right) = _sheet(0.7 + 0.24 * len(cards), columns=3, sharey=True, width_ratios=(1.1, 1, 1))
    for place, card in enumerate(cards):
        of, look = card["numbers"], looks[card["recipe"]]
        for numbers, colour, aside, width in ((base, GREY, -0.16, 2.2), (of, look.colour, 0.12, 3.6)):
            if math.isfinite(numbers["window_lowest"]):
                ends = [numbers["window_lowest"], numbers["window_highest"]]
                left.plot(ends, [place + aside] * 2, color=colour, lw=width, marker="s", ms=width)
            _interval(middle, numbers, ("rate", "rate_low", "rate_high"), place + aside, colour)
        _interval(right, of, ("loss_penalty", "loss_penalty_low", "loss_penalty_high"), place, look.colour)
    left.set_xscale("log", base=2)
    left.set_xlim(rates[0] / 1.5, rates[-1] * 1.5)
    left.xaxis.set_major_locator(FixedLocator([rates[0], rates[-1]]))
    left.xaxis.set_minor_locator(NullLocator())
    left.set_xlabel("stable window\n(learning rate)")
    middle.set_xlabel(f"diverged at\n{base['learning_rate']:.3g}")
    middle.set_xlim(-0.04, 1.04)
    right.axvline(0, color=GREY, lw=0.6)
    right.set_xlabel("loss penalty\n(nats/token)")
    left.set_yticks(range(len(cards)), [_plain(card["recipe"]) for card in cards])
    left.set_ylim(len(cards) - 0.5, -0.5)
    left.xaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
    return figure


def _interval(axes: Axes, of: dict[str, Any], names: tuple[str, str, str], y: float, colour: str) -> None:
    value, low, high = (of[name] for name in names)
    if math.isfinite(value):
        if math.isfinite(low) and math.isfinite(high):
            axes.plot([low, high], [y, y], color=colour, lw=1)
        axes.plot([value], [y], marker="o", ms=3, color=colour)


def _divergence(runs: xr.Dataset) -> Figure:
    table = stability_table(runs)
    recipes, rates = table["recipe"].values.astype(str).tolist(), table["learning_rate"].values
    figure, (axes,) = _sheet(0.6 + 0.2 * len(recipes))
    axes.pcolormesh(100 * table["rate"].values, cmap="Oranges", vmin=0, vmax=100, edgecolors="white", lw=0.8)
    k, n, share = (table[name].values for name in ("k", "n", "rate"))
    # What fits into a cell beside the names, of letters as wide as 0.62 of their size, in points.
    room = (72 * COLUMN - 4.5 * max(map(len, recipes)) - 12) / rates.size
    size = min(6.5, room / (0.62 * len(f"{k.max()}/{n.max()}")))
    for i, j in np.ndindex(*k.shape):
        if n[i, j] and size >= SMALLEST:
            colour = "white" if share[i, j] > 0.6 else "black"
            axes.text(j + 0.5, i + 0.5, f"{k[i, j]}/{n[i, j]}", ha="center", va="center", fontsize=size, color=colour)
    axes.set_yticks(np.arange(len(recipes)) + 0.5, [_plain(name) for name in recipes])
    axes.set_xticks(
        np.arange(rates.size) + 0.5, [f"{rate:.2g}" for rate in rates], rotation=45 if rates.size > 7 else 0
    )
    axes.tick_params(length=0)
    axes.invert_yaxis()
    axes.set_xlabel("peak learning rate")
    return figure


def _final_losses(runs: xr.Dataset, history: xr.Dataset, looks: dict[str, Look]) -> Figure:
    recipe, rate = runs["recipe"].values.astype(str), runs["learning_rate"].values.astype(np.float64)
    loss, diverged = runs["final_loss"].values.astype(np.float64), runs["diverged"].values.astype(bool)
    entropy = runs["unigram_entropy"].values
    low, high = limits(
        np.concatenate([loss[np.isfinite(loss)], entropy[np.isfinite(entropy)]]), highest(history, runs), 0.1
    )
    above, lost = high - 0.05 * (high - low), high - 0.01 * (high - low)
    figure, (axes,) = _sheet(2.3 + _key_height(runs))
    _, room = room_of(np.unique(rate))
    for value in np.unique(entropy[np.isfinite(entropy)]):
        axes.axhline(value, color=GREY, ls=":", lw=0.8)
    for name, look in looks.items():
        own = recipe == name
        if not own.any():
            continue
        aside = 2 ** (room * look.aside)  # never as far as another rate's runs
        x = rate * aside
        for kind, chosen, at in _kinds(look, own, loss, diverged, above, lost):
            filled = kind == look.marker and not diverged[chosen].any()
            axes.plot(
                x[chosen],
                at[chosen],
                ls="",
                marker=kind,
                color=look.colour,
                mfc=look.colour if filled else "none",
                mew=0.7,
            )
        tried = np.unique(rate[own])
        middles = np.array([np.median(np.where(np.isfinite(loss), loss, np.inf)[own & (rate == r)]) for r in tried])
        axes.plot(
            tried * aside,
            np.where(middles <= above, middles, np.nan),
            color=look.colour,
            ls=look.dashes,
        )
    axes.set_ylim(low, high)
    _rate_axis(axes, np.unique(rate))
    axes.set_ylabel("final training loss\n(nats/token)")
    _legend(figure, looks, in_order(runs["recipe"]))
    return figure


def _kinds(
    look: Look, own: Any, loss: Any, diverged: Any, above: float, lost: float
) -> Iterator[tuple[str, Any, Any]]:  # fmt: skip
    """Markers, the runs that have them, and where these stand: trained, diverged, not finite, above the axis."""
    finite = np.isfinite(loss)
    inside = finite & (loss <= above)
    places = np.where(finite, np.minimum(loss, above), lost)
    yield look.marker, own & inside & ~diverged, places
    yield look.marker, own & inside & diverged, places
    yield "x", own & ~finite, places
    yield "^", own & finite & ~inside, places


def _rate_axis(axes: Axes, rates: Any) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(rates.tolist()))
    axes.xaxis.set_minor_locator(NullLocator())
    leaning = rates.size > 7
    axes.set_xticks(rates.tolist(), _labelled(rates, 0.06 if leaning else 0.14), rotation=45 if leaning else 0)
    axes.set_xlabel("peak learning rate")


def _labelled(rates: Any, least: float) -> list[str]:
    """A label for each ascending rate, "" for one that is less than a share `least` of the axis beyond the last that has one."""
    places, last, labels = np.log2(rates / rates[0]), -np.inf, []
    for rate, place in zip(rates, places, strict=True):
        shown = bool(place - last >= least * places[-1])
        labels.append(f"{rate:.2g}" if shown else "")
        last = place if shown else last
    return labels


def _curves(
    runs: xr.Dataset, history: xr.Dataset, sharpness: xr.Dataset | None, looks: dict[str, Look], baseline: str
) -> Figure:
    rate, _ = reference_rate(runs, baseline)
    at, recipe = runs["learning_rate"].values == rate, runs["recipe"].values.astype(str)
    steps = history["step"].values.astype(np.float64)
    last = history["last_step"].values.astype(np.float64)
    recorded = steps <= last[:, None]
    loss = np.where(recorded, history["train_loss"].transpose("run", "step").values.astype(np.float64), np.nan)
    lost = lost_from(steps, loss, recorded)
    window = max(1, steps.size // 60)
    probes = None
    if sharpness is not None and "logit_sharpness" in sharpness:
        probes = sharpness["logit_sharpness"].sortby("epsilon").isel(epsilon=-1).transpose("run", "probe_step")
    probed = probes is not None and bool(np.isfinite(probes.values[at]).any())
    finite = loss[at][np.isfinite(loss[at])]
    low, high = limits(np.append(finite, runs["unigram_entropy"].values), highest(history, runs), 0.04)
    fates = _fates(runs, loss, steps, high)
    shown = [name for name, (chosen, *_) in fates.items() if (chosen & at).any()]
    figure, (top, *below) = _sheet(
        (3.3 if probed else 2.2) + _key_height(runs.isel(run=at), shown), rows=2 if probed else 1, sharex=True
    )
    for name, look in looks.items():
        own = at & (recipe == name)
        if own.any():
            course = smoothed(loss[own], window)
            _band(top, steps, np.where(recorded[own] & ~np.isfinite(course), np.inf, course), look, high)
        for fate, (chosen, x, y) in fates.items():
            marker = look.marker if fate == "open: diverged here" else FATES[fate]
            if (own & chosen).any():
                top.plot(
                    x[own & chosen], y[own & chosen], ls="", marker=marker, color=look.colour, mfc="none", mew=0.8, clip_on=False,
                    zorder=3,
                )  # fmt: skip
        if own.any() and probed and probes is not None:
            at_probes, values = probes["probe_step"].values, probes.values[own].astype(np.float64)
            _band(below[0], at_probes, _measured(at_probes, values, lost[own], last[own]), look, np.inf)
    for value in np.unique(runs["unigram_entropy"].values[np.isfinite(runs["unigram_entropy"].values)]):
        top.axhline(value, color=GREY, ls=":", lw=0.8)
    top.set_ylim(low, high)
    top.set_ylabel("training loss\n(nats/token)")
    for axes in below:
        _log_axis(axes)
        axes.set_ylabel("logit\nsharpness (%)")
    (below[-1] if below else top).set_xlabel("step")
    _legend(figure, looks, in_order(runs["recipe"].isel(run=at)), shown)  # not all recipes were trained at every rate
    return figure


def _fates(runs: xr.Dataset, loss: Any, steps: Any, high: float) -> dict[str, tuple[Any, Any, Any]]:
    """Of each kind of mark which runs have it, at which step and loss, as on the page: at the edge if above, or no number."""
    diverged, step = runs["diverged"].values.astype(bool), runs["diverged_step"].values.astype(np.float64)
    column = np.clip(np.searchsorted(steps, np.nan_to_num(step)), 0, steps.size - 1)
    there, edge = loss[np.arange(column.size), column], high - 0.02 * abs(high)
    finite, inside = np.isfinite(there), there <= edge
    places = np.where(inside, there, edge)
    kinds = (diverged & inside, diverged & ~finite, diverged & finite & ~inside)
    return {name: (chosen, step, places) for name, chosen in zip(FATES, kinds, strict=True)}


def _log_axis(axes: Axes) -> None:
    """A logarithmic axis of y; within two decades with labels at 2 and 5 times its powers of ten too, further apart without."""
    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.yaxis.set_minor_formatter(LogFormatterSciNotation(labelOnlyBase=False, minor_thresholds=(2, 2)))


def _band(axes: Axes, x: Any, curves: Any, look: Look, ceiling: float) -> None:
    """The seeds' median and a band over all seeds where there are several; a lost seed's values are infinite.

    What is NaN, behind a run's end or not measured, is left out, and so are steps at which no seed has a value.
    """
    there = ~np.isnan(curves).all(axis=0)
    if not there.any() or not len(curves):
        return
    x, curves = x[there], curves[:, there]
    middle = np.nanmedian(curves, axis=0)
    axes.plot(
        x, np.where(middle <= min(ceiling, np.finfo(np.float64).max), middle, np.nan), color=look.colour, ls=look.dashes
    )
    if len(curves) > 1:
        finite = np.where(np.isfinite(curves), curves, np.nan)
        low, high = np.fmin.reduce(finite, axis=0), np.fmax.reduce(finite, axis=0)
        axes.fill_between(x, low, high, color=look.colour, alpha=0.15, lw=0)


def _measured(x: Any, values: Any, lost: Any, last: Any) -> Any:
    """Of the runs that were measured at all the values at steps x, [run, step]; infinite where a run that was lost has none.

    Where no run has one they are NaN, as of runs that were not measured there.
    """
    measured, none = np.isfinite(values).any(axis=1), np.isnan(values)
    gone = none & (x >= lost[:, None]) & (x <= last[:, None] + 1) & ~none.all(axis=0)
    return np.where(gone, np.inf, values)[measured]


def _leads(signals: Sequence[dict[str, Any]], tree: xr.DataTree, chosen: Any) -> list[tuple[str, Any, Any]]:
    """Signals that warned, each with the leads of the group's runs and their recipes, the surest first."""
    recipe, found = tree["summary"].to_dataset()["recipe"].values.astype(str), []
    for signal in signals:
        ahead = np.where(chosen & np.array(signal["failed"], bool), unpacked(signal["lead"]), np.nan)
        rang = np.isfinite(ahead)
        if rang.any():
            found.append((signal["name"], ahead[rang], recipe[rang]))
    return sorted(found, key=lambda row: -row[1].size)[:12]


def _short(name: str) -> str:
    return name.replace("_", " ").replace(" at epsilon ", ", ε ").replace("logit sharpness", "sharpness")


def _lead_times(leads: Sequence[tuple[str, Any, Any]], looks: dict[str, Look]) -> Figure:
    figure, (axes,) = _sheet(0.6 + 0.24 * len(leads))
    for place, (_, ahead, recipes) in enumerate(leads):
        for name, look in looks.items():
            own = recipes == name
            axes.plot(
                ahead[own],
                np.full(own.sum(), place + 0.4 * look.aside),
                ls="",
                marker=look.marker,
                ms=3,
                color=look.colour,
            )
        axes.plot([np.median(ahead)], [place], marker="|", ms=9, color="black")
    axes.set_yticks(range(len(leads)), [_plain(f"{_short(name)} ({ahead.size})") for name, ahead, _ in leads])
    axes.set_ylim(len(leads) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("steps before the onset")
    _legend(figure, looks, list(dict.fromkeys(name for _, _, recipes in leads for name in recipes.tolist())))
    return figure


def _quantization(signals: xr.Dataset, runs: xr.Dataset, looks: dict[str, Look], baseline: str) -> Figure:
    rate, _ = reference_rate(runs, baseline)
    at, recipe = runs["learning_rate"].values == rate, runs["recipe"].values.astype(str)
    figure, panels = _sheet(3.3 + _key_height(runs), rows=3, sharex=True)
    for axes, role in zip(panels, ("activation", "weight", "gradient"), strict=True):
        error = signals["quantization_error"].sel(role=role).transpose("run", "signal_step", "tensor")
        for name, look in looks.items():
            own = at & (recipe == name)
            if own.any() and bool(np.isfinite(error.values[own]).any()):
                course = error.isel(run=own).mean(["run", "tensor"])
                axes.plot(course["signal_step"].values, course.values, color=look.colour, ls=look.dashes)
        _log_axis(axes)
        axes.set_ylabel(f"{role}s")
    panels[-1].set_xlabel("step")
    figure.supylabel("relative quantisation error", fontsize=8)
    _legend(figure, looks, in_order(runs["recipe"]))
    return figure


def _grids(formats: Sequence[dict[str, Any]]) -> Figure:
    figure, (axes,) = _sheet(0.5 + 0.2 * len(formats))
    for place, f in enumerate(formats):
        if f["values"]:
            for value in f["values"]:
                axes.plot(
                    [value] * 2,
                    [place - 0.3, place + 0.3],
                    color="black",
                    lw=0.4,
                    alpha=1 if value >= f["normal"] else 0.45,
                )
        else:
            for start, end, opacity in ((f["smallest"], f["normal"], 0.3), (f["normal"], f["largest"], 0.75)):
                axes.fill_between([start, end], place - 0.3, place + 0.3, color=GREY, alpha=opacity, lw=0)
    axes.set_xscale("log", base=2)
    axes.set_yticks(range(len(formats)), [f["name"] for f in formats])
    axes.set_ylim(len(formats) - 0.4, -0.6)
    axes.set_xlabel("magnitude")
    return figure


def _plain(text: str) -> str:
    """Text that matplotlib won't read as mathematics."""
    return text.replace("$", r"\$")
