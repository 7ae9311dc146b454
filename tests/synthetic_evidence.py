"""Study directories whose answers are known: a study file, and histories made by hand in the place of trained ones.

A run's training loss is one number from its second step to its last, and its validation loss is that number too; the first step's
is `INITIAL`. So a final loss is exactly what was asked for, and a run that ends above the entropy, or in NaN, diverged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.conftest import make_text
from train.directory import study_text
from train.plan import PlannedPack, program_of
from train.program import PackResult, Program
from train.signal_pass import tensor_names
from train.store import pack_tree, write_pack
from train.study import Run
from train.study_file import read_study

INITIAL, ENTROPY = 5.5, 3.2
STEPS = 30
PROVENANCE = {
    "version_exmy": "0.1.0", "version_torch": "2.11.0", "version_python": "3.12.3", "device": "a pencil", "cuda": "none",
    "git_commit": "0" * 40, "study": "made", "study_hash": "0" * 12, "created": "2026-01-01T00:00:00+00:00",
}  # fmt: skip
TABLES = f"""
[model]
layers = 2
heads = 2
width = 16
context = 12

[training]
steps = {STEPS}
sequences = 4
warmup = 5
evaluate_every = {STEPS}

[probe]
every = 0
"""

Loss = Callable[[Run], float]
Shares = Callable[[Run, str, str], float]
"""Of a run, "flushed" or "clipped", and a role."""


def make_study(
    results: Path, name: str, axes: str, loss: Loss, *, shares: Shares | None = None,
    finished: Callable[[Run], bool] = lambda _: True, more: str = "", baseline: str = "native-bf16",
) -> Path:  # fmt: skip
    """A study directory results/name: axes and more as in a study file; finished: which runs have a pack."""
    directory = results / name
    (directory / "packs").mkdir(parents=True)
    file = directory / "study.toml"
    signals = f"[signals]\nevery = {10 if shares else 0}\n"
    file.write_text(f'name = "{name}"\nbaseline = "{baseline}"\n[axes]\n{axes}\n{more}\n{TABLES}\n{signals}')
    study = read_study(file)
    file.write_text(study_text(study))
    text = dataclasses.replace(make_text(), unigram_entropy=ENTROPY)
    programs: dict[Program, list[Run]] = {}  # a file each: many small ones would take seconds to open
    for _, family in study.families_by_round():
        programs.setdefault(program_of(family[0]), []).extend(run for run in family if finished(run))
    for program, runs in programs.items():
        if runs:
            kept = PlannedPack(program, tuple(runs), len(runs))
            write_pack(directory, kept, pack_tree(kept, _result(kept, loss, shares), text, PROVENANCE))
    return directory


def _result(pack: PlannedPack, loss: Loss, shares: Shares | None) -> PackResult:
    program, runs = pack.program, pack.runs
    final = np.array([loss(run) for run in runs], np.float32)
    train = np.tile(final, (program.steps, 1))
    train[0] = INITIAL
    validation = np.tile(final, (len(program.evaluation_steps), 1))
    validation[0] = INITIAL
    signals = {}
    if shares is not None:
        tensors = len(tensor_names(program.shape))
        for which in ("flushed", "clipped"):
            of = np.array([[shares(run, which, role) for role in ("activation", "weight", "gradient")] for run in runs])
            signals[which] = np.zeros((len(program.signal_steps), len(runs), tensors, 3), np.float32)
            signals[which][:, :, -1] = of  # of one layer alone
    return PackResult(
        train,
        np.ones_like(train),
        validation,
        {},
        seconds=60.0,
        seconds_first_step=6.0,
        compiled=False,
        signals=signals,
    )
