"""What a page is about: a study's runs, groups, verdicts, series, recipes and formats, in plain values.

The page counts runs and takes medians of those that its filters leave, and looks intervals up; every verdict, interval and alarm
in it is made here, by `train`'s functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from exmy.costs import with_validation
from exmy.figure import highest, limits, reference_rate
from exmy.groups import Group, groups
from exmy.report.formulas import diagram, formats_of, grid, resolved
from exmy.report.looks import BACKGROUNDS, page_looks
from exmy.report.packing import packed, packed_steps
from exmy.report.series import Room, curves, layers, signals
from exmy.report.verdicts import group_verdicts, share_limits
from exmy.verdict import KEPT
from train import Study, study_runs
from train.seed_cube import crossed_words, seed_labels
from train.seed_cube import in_order as seeds_in_order

POOLED = ("recipe", "seed")  # facets that part no groups
ALWAYS = ("dataset", "model")  # facets that are there though a study has one value of them
PROVENANCE = {
    "device": "device", "dataset": "text", "dataset_source": "text's source", "dataset_sha256": "text's SHA-256",
    "tokenizer": "tokenizer", "vocabulary": "tokens of its vocabulary", "corruption": "corrupted on purpose",
    "unigram_entropy": "text's unigram entropy (nats/token)", "parameters_per_run": "parameters of a run",
    "tokens_per_step": "tokens of a run's step", "pack_size": "pack size R", "packs": "packs", "seconds": "training time (s)",
    "seconds_first_step": "of it first steps, with compiling (s)", "git_commit": "commit", "study_hash": "study's hash",
    "version_exmy": "exmy", "version_torch": "PyTorch", "cuda": "CUDA", "version_python": "Python", "version_numpy": "NumPy",
    "version_xarray": "xarray", "cpu_threads": "CPU threads",
}  # fmt: skip


def content(studies: Sequence[tuple[Study, xr.DataTree | None]]) -> dict[str, Any]:
    """Everything that the page's figures are drawn from; studies: each with its tree, None where no run is finished."""
    room = Room().shared(len(studies))
    parts = [study_content(study, tree, room) for study, tree in studies]
    recipes = list(
        dict.fromkeys(name for part in parts for name in part["columns"].get("recipe", {}).get("values", []))
    )
    facets = list(dict.fromkeys([*ALWAYS, *(facet for part in parts for facet in part["columns"])]))
    return {
        "studies": parts,
        "facets": [*(facet for facet in facets if facet not in POOLED), *POOLED],
        "looks": page_looks(recipes, studies[0][0].reference),
        "limits": share_limits(max((part["most"] for part in parts), default=0)),
        "backgrounds": BACKGROUNDS,
    }


def study_content(study: Study, tree: xr.DataTree | None, room: Room) -> dict[str, Any]:
    """One study; with nothing but its name where no run is finished."""
    known = {"name": study.name, "baseline": study.reference, "planned": sum(1 for _ in study.runs())}
    if tree is None:
        return known | {
            "finished": 0,
            "most": 0,
            "columns": {},
            "groups": [],
            "signals": [],
            "layers": None,
            "recipes": {},
        }
    runs, history = study_runs(tree), tree["history"].to_dataset()
    baseline = str(tree.attrs["baseline"])
    of_groups = groups(runs)
    recipes = resolved(dict.fromkeys(runs["recipe"].values.astype(str).tolist()), study.recipes)
    return known | {
        "baseline": baseline,
        "finished": runs.sizes["run"],
        "diverged": int(runs["diverged"].sum()),
        "definition": definition(runs),
        "digest": digest_words(tree, runs),
        "most": _most_of_a_cell(runs),
        "columns": _columns(runs, of_groups),
        "rate": runs["learning_rate"].values.astype(float).tolist(),
        "run": _per_run(runs, tree),
        "groups": [_group(runs, history, group, baseline) for group in of_groups],
        "curves": curves(history, runs, room.curves),
        "signals": signals(tree, room.signals),
        "layers": layers(tree, room.layers),
        "without_layers": (
            "Of signals this digest has kept the loudest of all layers alone: the study itself has them by layer."
            if "signals" in tree.children and "tensor" not in tree["signals"].dims
            else "This study recorded no signals of its layers: set [signals] every in the study file."
        ),
        "recipes": {name: diagram(recipe) for name, recipe in recipes.items()},
        "formats": {f.name: grid(f) for recipe in recipes.values() for f in formats_of(recipe)},
    }


def definition(runs: xr.Dataset) -> str:
    """What diverged means in the study, in words."""
    word = str(runs["diverged"].attrs["definition"])
    return f"{word}: {runs[word].attrs['source']}"


def digest_words(tree: xr.DataTree, runs: xr.Dataset) -> str:
    """What a digest has left out, in a sentence; nothing where it is none."""
    if "digest_every" not in tree.attrs:
        return ""
    words = f"This is a digest of the study: histories have every {int(tree.attrs['digest_every'])}th step"
    seeds = len(np.unique(runs["data_seed" if "data_seed" in runs.coords else "seed"].values))
    kept = int(tree.attrs.get("digest_signal_seeds", 0))
    if "signals" not in tree.children or (kept and kept >= seeds):
        return f"{words}."
    if not kept:
        return f"{words}, and signals are the loudest of blocks, tensors and roles."
    return f"{words}, and alarm signals and layers are of {kept} of {seeds} seeds."


def _columns(runs: xr.Dataset, of_groups: Sequence[Group]) -> dict[str, dict[str, Any]]:
    """What runs can be filtered by: each facet's values in words, and every run's place among them."""
    labels: dict[str, list[str]] = {
        name: runs[name].values.astype(str).tolist() for name in ALWAYS if name in runs.coords
    }
    for group in of_groups:
        for axis, value in group.where.items():
            labels.setdefault(axis, [""] * runs.sizes["run"])
            for run in np.flatnonzero(group.runs).tolist():
                labels[axis][run] = value
    labels["recipe"] = runs["recipe"].values.astype(str).tolist()
    found = {name: _coded(of, list(dict.fromkeys(of))) for name, of in labels.items()}
    seeds = seed_labels(runs)
    return found | {"seed": _coded(list(map(str, seeds)), [str(seed) for seed in seeds_in_order(seeds)])}


def _coded(labels: list[str], values: list[str]) -> dict[str, Any]:
    place = {value: i for i, value in enumerate(values)}
    return {"values": values, "of": [place[label] for label in labels]}


def _per_run(runs: xr.Dataset, tree: xr.DataTree) -> dict[str, Any]:
    content: dict[str, Any] = {
        "id": [str(run)[:8] for run in runs["run"].values] if "run" in runs.coords else [],
        "final": packed(runs["final_loss"].values),
        "diverged": runs["diverged"].values.astype(int).tolist(),
        "at": packed_steps(runs["diverged_step"].values),
        "spikes": packed(runs["spike_score"].values),
    }
    if "evaluation" in tree.children:
        content["validation"] = packed(with_validation(tree)["final_validation_loss"].values)
    return content


def _most_of_a_cell(runs: xr.Dataset) -> int:
    """Runs of a recipe and learning rate in the whole study, at most: no count on the page is of more."""
    cells = zip(runs["recipe"].values.tolist(), runs["learning_rate"].values.tolist(), strict=True)
    counts: dict[Any, int] = {}
    for cell in cells:
        counts[cell] = counts.get(cell, 0) + 1
    return max(counts.values())


def _group(runs: xr.Dataset, history: xr.Dataset, group: Group, baseline: str) -> dict[str, Any]:
    own, curves_of = runs.isel(run=group.runs), history.isel(run=group.runs)
    edge = highest(curves_of, own)
    entropy = np.unique(own["unigram_entropy"].values[np.isfinite(own["unigram_entropy"].values)]).tolist()
    final = own["final_loss"].values.astype(np.float64)
    loss = curves_of["train_loss"].values.astype(np.float64)
    best, why = reference_rate(own, baseline)
    return {
        "label": group.label,
        "where": dict(group.where),
        "runs": np.flatnonzero(group.runs).tolist(),
        "crossed": crossed_words(own),
        "entropy": entropy,
        "bits": bits_of_a_nat(own),
        "reference": best,
        "why": why,
        "final_limits": limits(np.concatenate([final[np.isfinite(final)], entropy]), edge, headroom=0.16),
        "loss_limits": limits(np.concatenate([loss[np.isfinite(loss)], entropy]), edge, headroom=0.04),
        "verdicts": group_verdicts(own[[name for name in (*KEPT,) if name in own]], baseline),
    }


def bits_of_a_nat(runs: xr.Dataset) -> float | None:
    """Bits per byte in a nat per token of a group's text; None where tokens' bytes are not known."""
    if "final_bits_per_byte" not in runs:
        return None
    ratio = (runs["final_bits_per_byte"] / runs["final_loss"]).values
    known = ratio[np.isfinite(ratio)]
    return float(known[0]) if known.size else None


def provenance(tree: xr.DataTree | None) -> Mapping[str, str]:
    """Where a study's numbers come from, by the words of the page."""
    if tree is None:
        return {}
    return {label: _word(tree.attrs[key]) for key, label in PROVENANCE.items() if key in tree.attrs}


def _word(value: Any) -> str:
    number = isinstance(value, float | np.floating)
    return f"{float(value):,.6g}" if number else f"{value:,}" if isinstance(value, int | np.integer) else str(value)
