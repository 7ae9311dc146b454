"""A study's block on the page of findings: what was trained, on how many tokens, where, how long, and how to do it again."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from exmy.compare_page import VERSIONS
from exmy.findings.studies import Evidence, axis_words
from exmy.findings.tables import line, rate_words
from train.plan import shape_of

COMMIT_NOTE = "git_commit_note.txt"  # beside a digest, whose checksum is of what was measured
MINUTES_NOTE = "minutes_note.txt"  # the same of how long it took


def _version(word: str, version: str) -> str:
    return f"{word} from its source" if version == "not installed" else f"{word} {version}"


def command(name: str) -> str:
    """By which a study is run again, on a GPU, and its dataset made anew."""
    return f"make study STUDY={name}"


def block(evidence: Evidence) -> Iterator[str]:
    """What a study trained, on what, for how long, and how to train it again."""
    attrs, runs = evidence.tree.attrs, list(evidence.runs.values())
    finished = len(runs)
    tokens = [run.training.steps * run.training.sequences * run.model.context for run in runs]
    parameters = {shape_of(model).size for model in dict.fromkeys(run.model for run in runs)}
    definition = str(evidence.summary["diverged"].attrs["definition"])
    rows = {
        "runs": f"{finished:,}"
        + (f" of {evidence.planned:,}; the others are not finished" if finished < evidence.planned else ""),
        "recipes": ", ".join(f"`{name}`" for name in dict.fromkeys(run.recipe.name for run in runs)),
        "learning rates": ", ".join(rate_words(rate) for rate in sorted({run.learning_rate for run in runs})),
        "seeds": _seeds(evidence),
        "also varied": _varied(evidence),
        "text": ", ".join(f"`{name}`" for name in dict.fromkeys(run.dataset for run in runs))
        + f", tokenizer {', '.join(dict.fromkeys(run.model.tokenizer for run in runs))}{_epochs(evidence)}",
        "model": f"{', '.join(dict.fromkeys(run.model.label for run in runs))}; {_span(parameters)} parameters",
        "batch": f"{_span(run.training.sequences for run in runs)} sequences of "
        f"{_span(run.model.context for run in runs)} tokens",
        "tokens a run": f"{_span(tokens)}, in {_span(run.training.steps for run in runs)} steps; {sum(tokens):,} in all",
        "schedule": _schedule(evidence),
        "hardware": f"{attrs['device']}; {attrs['seconds'] / 60:.1f} minutes of training, "
        f"{attrs['seconds_first_step'] / 60:.1f} of them first steps with their compiling",
        "versions": ", ".join(_version(word, str(attrs[key])) for key, word in VERSIONS.items() if key in attrs)
        + f"; commit {attrs['git_commit']}, study hash {attrs['study_hash']}",
        "diverged means": f"`{definition}`: {evidence.summary[definition].attrs['source']}",
        "run it again": f"`{command(evidence.name)}`",
    }
    note = evidence.directory / COMMIT_NOTE
    if str(attrs["git_commit"]).endswith("+changed") and note.is_file():
        rows["note on the commit"] = " ".join(note.read_text(encoding="utf-8").split())
    if (note := evidence.directory / MINUTES_NOTE).is_file():
        rows["note on the minutes"] = " ".join(note.read_text(encoding="utf-8").split())
    if "digest_every" in attrs:
        signals = (
            f"signals of {attrs['digest_signal_seeds']} seeds"
            if "digest_signal_seeds" in attrs
            else "of blocks, tensors and roles the loudest signals"
        )
        rows["kept of it"] = f"histories of every {attrs['digest_every']}th step, {signals}; all else of all"
    rows |= {
        word: str(attrs[key])
        for key, word in (("left_out", "left out"), ("set_afterwards", "set after training"))
        if key in attrs
    }
    yield from (line(("", "")), line(("---", "---")))
    for word, cell in rows.items():
        yield line((word, cell.replace("|", "/")))


def _varied(evidence: Evidence) -> str:
    """Each further axis with its values."""
    axes = {axis: dict.fromkeys(part.where[axis] for part in evidence.parts) for axis in evidence.parts[0].where}
    if {"width", "layers"} & set(axes):
        axes.pop("model", None)
    return (
        "; ".join(", ".join(axis_words(axis, value) for value in values) for axis, values in axes.items()) or "nothing"
    )


def _seeds(evidence: Evidence) -> str:
    counts = [
        len(set(part.runs["seed"].values[part.names == recipe].tolist()))
        for part in evidence.parts
        for recipe in part.recipes
    ]
    return f"{_span(counts)} for each recipe, rate and setting"


def _epochs(evidence: Evidence) -> str:
    epochs = evidence.summary["epochs"].values
    known = np.unique(epochs[np.isfinite(epochs)].round(2))
    return f"; {_span(known.tolist())} epochs" if known.size else ""


def _schedule(evidence: Evidence) -> str:
    runs = list(evidence.runs.values())
    kinds = ", ".join(dict.fromkeys(run.training.schedule for run in runs))
    clips = ", ".join(
        dict.fromkeys("none" if run.training.clip == float("inf") else f"{run.training.clip:g}" for run in runs)
    )
    optimizers = ", ".join(dict.fromkeys(run.training.optimizer for run in runs))
    return f"{optimizers}, {kinds}, warm-up {_span(run.training.warmup for run in runs)} steps, clip {clips}"


def _span(values: object) -> str:
    found = sorted(set(values))  # type: ignore[call-overload]
    if not found:
        return "–"
    return f"{found[0]:,}" if len(found) == 1 else f"{found[0]:,} to {found[-1]:,}"
