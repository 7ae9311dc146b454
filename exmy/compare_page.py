"""A comparison of recipes as a page in Markdown: how it was made, the table, and what follows from the numbers by rule.

Nothing on the page is written by hand. A recipe is said to cost something where its interval leaves zero out, and the page says
for how many recipes that happens by chance; where an interval contains zero, how much the recipe may yet cost is its upper end.
"""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import xarray as xr

from exmy.costs import CONFIDENCE, Comparison, Cost, Panel, Row
from exmy.looks import in_order
from train import Study
from train.store import STUDY_FILE

LEVEL = 1 - CONFIDENCE
VERSIONS = {"version_exmy": "exmy", "version_torch": "PyTorch", "cuda": "CUDA", "version_python": "Python"}


def signed(value: float) -> str:
    """A difference in nats/token with its sign, or - where there is none."""
    return f"{value:+.4f}" if math.isfinite(value) else "-"


def p_value(p: float) -> str:
    """To three places, "<0.001" below, - where there is none."""
    return "-" if not math.isfinite(p) else "<0.001" if p < 0.001 else f"{p:.3f}"


def pairs(row: Row) -> str:
    """How many pairs the differences are of; of validation and training where that is not the same."""
    counts = dict.fromkeys(str(len(cost.differences)) for cost in (row.validation, row.training))
    return "; ".join(counts)


def interval_rule() -> str:
    """What an interval is, in a sentence."""
    return (
        "Intervals are Student's, over pairs of runs that differ in nothing but the recipe, for each recipe by itself."
    )


def adjustment(comparisons: int) -> str:
    """What the number of recipes does to intervals and p-values, in a sentence."""
    return (
        f"They are not adjusted for there being {comparisons} comparisons: of so many that cost nothing, about "
        f"{comparisons * LEVEL:.1f} would be shown apart from zero by chance; Holm's p-values are adjusted for it."
    )


def notes(comparison: Comparison) -> Iterator[str]:
    """What is missing from the table, and why, a line each; then what diverged means."""
    if comparison.missing:
        yield (
            f"Unfinished: {comparison.missing} of the study's {comparison.finished + comparison.missing} runs are missing here; "
            "run the sweep again to go on."
        )
    several = len(list(comparison.panels())) > 1
    for panel in comparison.panels():
        where = f" at {panel.label}" if several else ""
        for row in (*([panel.baseline] if panel.baseline else []), *panel.rows):
            so = "" if row is panel.baseline else ", so there is no difference"
            told = (
                (row.lost, f"the final loss is not finite{so}"),
                (row.partner_lost, f"the final loss of {comparison.baseline} is not finite, so there is no difference"),
                (row.unpaired, f"no finished run of {comparison.baseline} to pair with"),
            )
            for names, why in told:
                if names:
                    yield f"{row.recipe}{where}, {len(names)} of {len(row.runs)} runs ({', '.join(names)}): {why}."
    yield f"Diverged means {comparison.definition}."
    if comparison.crossed:
        yield comparison.crossed


def compare_page(
    comparison: Comparison, tree: xr.DataTree, study: Study, directory: Path, page: Path, figure: Path | None
) -> str:
    """The page; tree, study: of `directory`, as `open_study` and `read_study` give them; page, figure: where they will lie."""
    lines = [f"# {comparison.name}: what each recipe costs against {comparison.baseline}", ""]
    lines += [" ".join(_made(comparison, tree, study)), ""]
    against = [] if comparison.baseline == tree.attrs["baseline"] else ["--baseline", comparison.baseline]
    drawn = [] if figure is None else ["--figure", figure]
    for command in (
        ["sweep", directory / STUDY_FILE, "--out", directory],
        ["compare", directory, *against, "--page", page, *drawn],
    ):
        lines += [f"    exmy {shlex.join(map(str, command))}"]
    lines += [""]
    if figure is not None:
        place = Path(os.path.relpath(figure.resolve(), page.resolve().parent)).as_posix()
        lines += [f"![Differences of final losses from {comparison.baseline}, with 95 % intervals]({place})", ""]
    lines += [f"Losses in nats/token, means of seeds (SD). {interval_rule()} {adjustment(comparison.comparisons)}", ""]
    panels = list(comparison.panels())
    for panel in panels:
        if len(panels) > 1:
            lines += [f"## {panel.label.capitalize()}", ""]
        lines += [*_table(panel), "", "**What follows from the numbers**", ""]
        lines += [f"- {finding}" for finding in findings(comparison, panel)] + [""]
    return "\n".join([*lines, *(f"- {note}" for note in notes(comparison))]) + "\n"


def _made(comparison: Comparison, tree: xr.DataTree, study: Study) -> Iterator[str]:
    """Sentences on the runs, the machine and the versions."""
    attrs, summary = tree.attrs, tree["summary"].to_dataset()
    recipes = len(set(summary["recipe"].values.tolist()))
    seeds = sorted({len(row.runs) for row in comparison.rows})
    steps = sorted({int(step) + 1 for step in tree["history"].to_dataset()["last_step"].values})
    rates = ", ".join(f"{rate:g}" for rate in np.unique(summary["learning_rate"].values))
    epochs = np.unique(summary["epochs"].values.round(2))
    read = [f"tokenizer {attrs['tokenizer']}"] if "tokenizer" in attrs else []  # packs of before have neither
    read += [f"{_span(epochs.tolist())} epochs"] if np.isfinite(epochs).all() else []
    text = f"`{attrs['dataset']}`" + (f" ({'; '.join(read)})" if read else "")
    yield (
        f"{comparison.finished} runs: {recipes} recipes, {_span(seeds)} seeds each at learning rate {rates}, "
        f"{_number(attrs['parameters_per_run'])} parameters ({', '.join(in_order(summary['model']))}), {_span(steps)} steps of "
        f"{_number(attrs['tokens_per_step'])} tokens of {text}."
    )
    yield (
        f"The validation loss is over {_held_out(attrs['tokens_per_step'], study)}, the same for every run, after the last step; "
        f"the training loss is the mean of the last {study.divergence.window} steps' batches, each before its update."
    )
    versions = ", ".join(f"{word} {attrs[key]}" for key, word in VERSIONS.items() if key in attrs)
    yield (
        f"Trained on {attrs['device']} in {attrs['seconds'] / 60:.1f} minutes, {attrs['seconds_first_step'] / 60:.1f} of them "
        f"first steps with their compiling, with {versions}; commit {attrs['git_commit']}, study hash {attrs['study_hash']}."
    )
    if "set_afterwards" in attrs:
        yield f"Set after training: {attrs['set_afterwards']}."
    if "left_out" in attrs:
        yield f"Left out of the packs: {attrs['left_out']}."


def _number(value: object) -> str:
    return value if isinstance(value, str) else f"{int(value):,}"  # type: ignore[call-overload]


def _span(values: Sequence[float]) -> str:
    low, high = (f"{value:,}" for value in (values[0], values[-1]))
    return low if low == high else f"{low} to {high}"


def _held_out(tokens_per_step: object, study: Study) -> str:
    """How much is evaluated: batches of a step's size; without a number where that varies in the study."""
    if isinstance(tokens_per_step, str) or "evaluation_batches" in (study.axes.model_extra or {}):
        return "held-out sequences"
    return f"{study.training.evaluation_batches * int(tokens_per_step):,} held-out tokens"  # type: ignore[call-overload]


def _table(panel: Panel) -> Iterator[str]:
    headings = (
        "recipe", "validation loss (SD)", "difference [95 % interval]", "Holm p", "training loss (SD)",
        "difference [95 % interval]", "Holm p", "pairs", "diverged",
    )  # fmt: skip
    yield _line(headings)
    yield _line(["---", *["---:"] * (len(headings) - 1)])
    if panel.baseline is not None:
        own = panel.baseline
        shown = [_loss(own.validation), "baseline", "", _loss(own.training), "baseline", "", ""]
        yield _line([f"**`{own.recipe}`**", *shown, f"{len(own.diverged)}/{len(own.runs)}"])
    for row in panel.rows:
        cells = [
            text
            for cost in (row.validation, row.training)
            for text in (_loss(cost), interval(cost), p_value(cost.difference.p_holm))
        ]
        yield _line([f"`{row.recipe}`", *cells, pairs(row), f"{len(row.diverged)}/{len(row.runs)}"])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _loss(cost: Cost) -> str:
    if not cost.finite:
        return "not finite"
    return f"{cost.mean:.4f}" + (f" ({cost.sd:.4f})" if math.isfinite(cost.sd) else "")


def interval(cost: Cost) -> str:
    """A difference with its interval, such as "+0.0142 [-0.0034, +0.0318]"; the mean alone where a pair is all there is."""
    found = cost.difference
    if not math.isfinite(found.low):
        return signed(found.mean)
    return f"{signed(found.mean)} [{signed(found.low)}, {signed(found.high)}]"


def findings(comparison: Comparison, panel: Panel) -> Iterator[str]:
    """What the numbers of a panel say by rule, a sentence or two each."""
    yield from _of_loss("validation", comparison.baseline, panel, lambda row: row.validation)
    yield from _of_loss("training", comparison.baseline, panel, lambda row: row.training)
    every = (*([panel.baseline] if panel.baseline else []), *panel.rows)
    counted = [f"`{row.recipe}` {len(row.diverged)}/{len(row.runs)}" for row in every if row.diverged]
    yield f"Diverged: {', '.join(counted)}; no other." if counted else "Diverged: none."


def _of_loss(what: str, baseline: str, panel: Panel, cost: Callable[[Row], Cost]) -> Iterator[str]:
    known = [row for row in panel.rows if math.isfinite(cost(row).difference.low)]
    higher = [row for row in known if cost(row).difference.low > 0]
    lower = [row for row in known if cost(row).difference.high < 0]
    within = [row for row in known if row not in (*higher, *lower)]

    def told(rows: list[Row]) -> str:
        return ", ".join(f"`{row.recipe}` {signed(cost(row).difference.mean)}" for row in rows) or "none"

    sure = [f"`{row.recipe}`" for row in (*higher, *lower) if cost(row).difference.p_holm < LEVEL]
    own = cost(panel.baseline).sd if panel.baseline else math.nan
    scale = f" For scale: the SD of {baseline}'s own runs is {own:.4f}." if math.isfinite(own) else ""
    yield (
        f"Final {what} loss apart from {baseline}'s, the interval without zero: higher {told(higher)}; lower {told(lower)}. "
        f"After Holm's adjustment still apart: {', '.join(sure) or 'none'}.{scale}"
    )
    if within:
        most = max(within, key=lambda row: cost(row).difference.high)
        yield (
            f"No difference of the final {what} loss is shown, the interval contains zero, for {len(within)} of {len(known)}: "
            f"{', '.join(f'`{row.recipe}`' for row in within)}. That is no proof of equality: these intervals still allow up to "
            f"{signed(cost(most).difference.high)} (`{most.recipe}`)."
        )
