"""The picture and the tables of `tensor_cores`, made from its JSON alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from exmy.looks import COLOURS, LETTERING

BEGIN, END = "<!-- tensor-cores: begin -->", "<!-- tensor-cores: end -->"
FAST, PROMOTED, FP32_SUMS = "fast accumulation", "no fast accumulation", "fp32"
# What the picture and the table show, in this order: the curve's name, its title, and how it is drawn.
HARDWARE = {
    FAST: ("tensor cores, fast accumulation", "#000000", "o"),
    PROMOTED: ("tensor cores, without it", COLOURS[1], "s"),
}
SIMULATED = {
    "hopper-fp8": ("simulated, hopper-fp8", COLOURS[0], "-"),
    "hopper-fp8-promoted": ("simulated, hopper-fp8-promoted", COLOURS[5], "-"),
    "k32p14:toward_zero": ("simulated, k32p14:toward_zero", COLOURS[4], (0, (6, 2))),
    "k32p14:nearest_even": ("simulated, k32p14:nearest_even", COLOURS[2], (0, (2, 1.5))),
    FP32_SUMS: ("operands alone simulated, FP32 sums", COLOURS[3], (0, (6, 2, 1.5, 2))),
}


def draw(content: dict[str, Any], path: Path) -> None:
    """Error against K, a panel for each pair of formats: hardware as open markers, simulated sums as lines, seeds as bands."""
    with matplotlib.rc_context(LETTERING):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
        figure = Figure(figsize=(13.5, 6.6), dpi=100, layout=layout)
        panels = figure.subplots(1, len(content["operands"]), squeeze=False, sharey=True)[0]
        for panel, (title, measured) in zip(panels, content["operands"].items(), strict=True):
            _draw_panel(panel, title, measured)
        panels[0].set_ylabel(r"relative error, $\|y-y_{exact}\|\ /\ \|y_{exact}\|$")
        figure.suptitle(f"What operand simulation leaves out: {content['device']}", x=0.012, ha="left", fontsize=15)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, handlelength=3.2)
        figure.savefig(path, format="png")


def _draw_panel(panel: Axes, title: str, measured: dict[str, Any]) -> None:
    Ks, curves = measured["K"], measured["curves"]
    for name, (label, colour, dashes) in SIMULATED.items():
        shown = [value or float("nan") for value in curves[name]["median"]]  # no logarithm of an exact product
        panel.plot(Ks, shown, color=colour, linestyle=dashes, linewidth=2, label=label)
        seen = [low > 0 for low in curves[name]["min"]]
        panel.fill_between(
            Ks, curves[name]["min"], curves[name]["max"], where=seen, color=colour, alpha=0.15, linewidth=0
        )
    for name, (label, colour, marker) in HARDWARE.items():
        if name in curves:
            curve = curves[name]
            spread = [
                [m - low for m, low in zip(curve["median"], curve["min"], strict=True)],
                [high - m for m, high in zip(curve["median"], curve["max"], strict=True)],
            ]
            panel.errorbar(
                Ks, curve["median"], yerr=spread, fmt=marker, color=colour, markerfacecolor="none", markersize=9,
                markeredgewidth=1.8, capsize=3, label=label, zorder=4,
            )  # fmt: skip
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_title(title.replace(" x ", " × "), loc="left")
    panel.set_xlabel("K (products summed)")
    panel.xaxis.set_major_locator(FixedLocator(Ks[::2]))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda K, _: f"{K:,.0f}"))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_minor_formatter(NullFormatter())


def tables(content: dict[str, Any]) -> str:
    """The tables in Markdown: errors against K, what follows the hardware best, and what the probes found."""
    machine = f"{content['device']}, torch {content['torch']}, CUDA {content['cuda'] or 'none'}"
    parts = [
        f"Measured on {machine}; M = N = {content['M']}, medians of {content['seeds']} seeds, output in {_output(content)}."
    ]
    for title, measured in content["operands"].items():
        parts += [f"**{title.replace(' x ', ' × ')}**", _errors(measured)]
        if measured["nearest"]:
            parts.append(_nearest(measured))
    if content["probes"]:
        parts += ["What probes found:", _answers(content["probes"])]
    return "\n\n".join(parts) + "\n"


def _output(content: dict[str, Any]) -> str:
    return {"float32": "FP32", "bfloat16": "BF16", None: "FP32 (no tensor cores here)"}[content["output"]]


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _errors(measured: dict[str, Any]) -> str:
    names = [name for name in (*HARDWARE, *SIMULATED) if name in measured["curves"]]
    titles = [(HARDWARE | SIMULATED)[name][0] for name in names]
    rows = [
        [f"{K:,}", *(_number(measured["curves"][name]["median"][i]) for name in names)]
        for i, K in enumerate(measured["K"])
    ]
    return _table(["K", *titles], rows)


def _number(error: float) -> str:
    return f"{error:.2e}" if error else "0"


def _nearest(measured: dict[str, Any]) -> str:
    rows = []
    for name, found in measured["nearest"].items():
        best = found[0]
        rows.append(
            [name, f"`{best['accumulate']}`", f"{2 ** best['max_log2_ratio']:.3f} ×", *map(_percent, _ends(best["same_bits"]))]
        )  # fmt: skip
    return _table(["tensor cores", "followed best by", "farthest, over K", "equal outputs, least K", "largest K"], rows)


def _ends(values: list[float]) -> tuple[float, float]:
    return values[0], values[-1]


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _answers(probes: dict[str, Any]) -> str:
    keys = list(dict.fromkeys(key for answers in probes.values() for key in answers))
    rows = [[key.replace("_", " "), *(_answer(answers.get(key)) for answers in probes.values())] for key in keys]
    return _table(["", *probes], rows)


def _answer(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_answer(inner)}" for key, inner in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def write_page(content: dict[str, Any], path: Path) -> None:
    """Put the tables between the page's two markers; ValueError where it has none."""
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{path} needs {BEGIN!r} and {END!r} once each, in this order, around the place of the tables")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    path.write_text(f"{before}{BEGIN}\n{tables(content)}{END}{after}", encoding="utf-8")
