"""Which runs an alarm rang for, and when: while they train, in a line each time, and of whole studies, as a dataset.

What a study says, `/alarms (run, alarm)`, is made of what was recorded, when it is opened: so it is the same whether runs trained
in one go or in several, and another threshold needs no training. While a pack trains, a `Listener` looks at the same numbers
every `CHUNK` steps, as they come from the device a report later, and changes nothing: what it reads are copies.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from torch import Tensor

from train.alarm_rules import Rule, rules_of
from train.gradient_ratio import norm_to_mean
from train.measures import LOGITS, MEASURES
from train.program import Program, Progress
from train.schema import OF_ALARMS
from train.taking import ticks

if TYPE_CHECKING:
    from train.pack import Pack
    from train.plan import PlannedPack
    from train.study import Run, Study

Floats = npt.NDArray[np.float64]
NAMED = 3  # runs of a line

log = logging.getLogger(__name__)


def heard(values: npt.NDArray[np.floating], rule: Rule) -> npt.NDArray[np.bool_]:
    """Whether each value rings; NaN never does, infinity always."""
    with np.errstate(invalid="ignore"):
        return (values < rule.threshold) | (values == np.inf) if rule.below else values > rule.threshold


def first_heard(values: npt.NDArray[np.floating], steps: npt.NDArray[np.integer], rule: Rule) -> tuple[Floats, Floats]:
    """The step and the value of each run's first ring, [runs] each, of values [steps, runs]; NaN where it is silent."""
    if not len(steps):
        nothing = np.full(values.shape[1], np.nan)
        return nothing, nothing.copy()
    rings = heard(values.astype(np.float64), rule)
    rang, first = rings.any(axis=0), rings.argmax(axis=0)
    step = np.where(rang, steps[first], np.nan)
    return step, np.where(rang, values[first, np.arange(values.shape[1])], np.nan)


def with_rings(tree: xr.DataTree, study: Study) -> xr.DataTree:
    """The study's tree with /alarms: `rang_step` and `rang_value` (run, alarm), `threshold` and `below` (alarm)."""
    from train.study_alarms import study_signals  # waits for SciPy

    rules = rules_of(study.alarms.thresholds)
    history = tree["history"].to_dataset()
    signals = {name: of for name, of in study_signals(tree) if name in {rule.name for rule in rules}}
    shape = history.sizes["run"], len(rules)
    step, value = np.full(shape, np.nan), np.full(shape, np.nan)
    for i, rule in enumerate(rules):
        if rule.name in signals:  # runs of before may have been trained without
            of = signals[rule.name]
            axis = next(dim for dim in of.dims if dim != "run")
            values = of.transpose(axis, "run").values.astype(np.float64)
            step[:, i], value[:, i] = first_heard(values, of[axis].values, rule)
    rows = OF_ALARMS["alarms"]
    columns = {
        "rang_step": step, "rang_value": value, "threshold": np.array([rule.threshold for rule in rules]),
        "below": np.array([rule.below for rule in rules]),
    }  # fmt: skip
    labels = {name: of for name, of in history.coords.items() if of.dims == ("run",)}
    found = xr.Dataset(
        {name: (rows[name].dims, values, rows[name].attrs()) for name, values in columns.items()},
        {**labels, "alarm": ("alarm", np.array([rule.label for rule in rules], np.str_))},
    )
    return tree.assign({"alarms": xr.DataTree(found)})


class Listener:
    """Listens to a pack while it trains, at its reports: `rang` says for which slots an alarm rang so far.

    runs: by slot, for the lines. Numbers of a GPU are looked at one report later, so that it need not wait.
    """

    def __init__(self, rules: Sequence[Rule], program: Program, runs: Sequence[Run]) -> None:
        self._rules, self._program, self._runs = list(rules), program, runs
        self.rang = np.zeros(len(runs), bool)
        self._silent = np.ones((len(rules), len(runs)), bool)
        self._seen = [0] * len(rules)  # rows of each rule's signal that were looked at
        self._pack: Pack | None = None
        self._waiting: Callable[[], None] | None = None
        self._norms: list[list[npt.NDArray[np.float32]]] = [[] for _ in rules]  # of those on gnmr, all so far

    def after_step(self, pack: Pack) -> None:
        """The pack to listen to."""
        self._pack = pack

    def telling(self, on_progress: Callable[[Progress], None]) -> Callable[[Progress], None]:
        """The same, told for which runs an alarm rang, once what is new has been looked at."""

        def tell(progress: Progress) -> None:
            self.listen(wait=progress.step == self._program.steps)
            on_progress(replace(progress, rang=self.rang.copy()))

        return tell

    def listen(self, *, wait: bool = True) -> None:
        """Look at what was recorded since the last time; without waiting, of a GPU at what was on its way since then."""
        if self._pack is None:
            return
        copied = [self._copied(rule, i, self._pack) for i, rule in enumerate(self._rules)]
        arrived = None
        if self._pack.device.type == "cuda":
            arrived = torch.cuda.Event()
            arrived.record()

        def look() -> None:
            if arrived is not None:
                arrived.synchronize()
            for i, (rule, (steps, values)) in enumerate(zip(self._rules, copied, strict=True)):
                self._look(i, rule, steps, values.numpy())

        before, self._waiting = self._waiting, look
        if before:
            before()
        if wait or arrived is None:
            self._waiting = None
            look()

    def _copied(self, rule: Rule, i: int, pack: Pack) -> tuple[npt.NDArray[np.int64], Tensor]:
        """The steps and the values, [steps, runs], on their way to the host, that are new of a rule's signal."""
        steps, values = recorded_so_far(rule.name, pack)
        seen, self._seen[i] = self._seen[i], len(steps)
        new = _loudest(values[seen : len(steps)])[:, : len(self._runs)].detach()
        if new.device.type != "cuda":
            return steps[seen:], new.float().clone()
        host = torch.empty(new.shape, dtype=torch.float32, pin_memory=True)
        return steps[seen:], host.copy_(new, non_blocking=True)

    def _look(self, i: int, rule: Rule, steps: npt.NDArray[np.int64], values: npt.NDArray[np.float32]) -> None:
        if rule.name == "gnmr":
            self._norms[i].append(values)
            values = norm_to_mean(np.concatenate(self._norms[i]).T).T[-len(steps) :] if len(steps) else values
        step, value = first_heard(values, steps, rule)
        new = self._silent[i] & np.isfinite(step)
        if new.any():
            self._silent[i] &= ~new
            self.rang |= new
            log.info(
                "%s",
                _line(rule, [(self._runs[slot], step[slot], value[slot]) for slot in np.flatnonzero(new).tolist()]),
            )


def listener(study: Study, pack: PlannedPack) -> Listener | None:
    """Who listens to a pack; None where the study has no alarm."""
    rules = rules_of(study.alarms.thresholds)
    return Listener(rules, pack.program, pack.runs) if rules else None


def recorded_so_far(name: str, pack: Pack) -> tuple[npt.NDArray[np.int64], Tensor]:
    """A signal's steps up to now, and its values, [steps or more, R, ...], as the pack holds them; of gnmr gradient norms."""
    program, made = pack.program, pack.made
    if name in ("train_loss", "grad_norm", "gnmr"):
        return np.arange(made), pack.train_loss if name == "train_loss" else pack.grad_norm
    if name in pack.signals.values:
        return np.array([step for step in program.signal_steps if step < made], np.int64), pack.signals.values[name]
    variable, _, at = name.partition(" at ")
    if variable in (LOGITS, f"{LOGITS}_centred"):
        values = pack.probed[:, int(variable != LOGITS), :, _place(program.probe.epsilons, at)]
        return _up_to(program.probe_steps, made), values
    (main, axes), *_ = MEASURES[variable].variables.items()
    values = pack.probes.values(f"{variable}/{main}")
    if axes:
        values = values[..., _place(ticks(program.probe, variable, axes[0]), at)]
    return _up_to(program.steps_of(variable), made), values


def _place(stands: Sequence[float], at: str) -> int:
    """Where a tick such as "epsilon 0.001" stands."""
    return [f"{tick:g}" for tick in stands].index(at.split()[1])


def _up_to(steps: Sequence[int], made: int) -> npt.NDArray[np.int64]:
    """Probes are taken after a step."""
    return np.array([step for step in steps if step <= made], np.int64)


def _loudest(values: Tensor) -> Tensor:
    """Of blocks, tensors and roles the largest, as `study_alarms.loudest` has it, NaN left out; [steps, R]."""
    if values.ndim == 2:
        return values
    flat = values.flatten(2)
    found = torch.where(flat.isnan(), -math.inf, flat).amax(-1)
    return torch.where(flat.isnan().all(-1), math.nan, found)


def _line(rule: Rule, rang: Sequence[tuple[Run, float, float]]) -> str:
    """An alarm that rang for some runs, in a line: the first few by name."""
    words = [f"{_name(run)} at step {step:.0f} ({value:.4g})" for run, step, value in rang[:NAMED]]
    more = f" and {len(rang) - NAMED} more" if len(rang) > NAMED else ""
    return f"alarm {rule.label}: {'; '.join(words)}{more}"


def _name(run: Run) -> str:
    seed = f"seed {run.init_seed}" if run.init_seed == run.data_seed else f"seeds {run.init_seed}/{run.data_seed}"
    return f"{run.recipe.name}, rate {run.learning_rate:g}, {seed}"


def told(tree: xr.DataTree) -> list[dict[str, Any]]:
    """Of each alarm of a study's /alarms who rang, for machines: run, its coordinates, step, value, and whether it diverged.

    Nothing of a study without alarms.
    """
    if "alarms" not in tree:
        return []
    alarms, fate = tree["alarms"].to_dataset(), tree["summary"].to_dataset()["diverged"]
    rows: list[dict[str, Any]] = []
    runs = alarms["run"].values.astype(str).tolist()
    diverged = dict(zip(fate["run"].values.astype(str).tolist(), fate.values.astype(bool).tolist(), strict=True))
    for i, label in enumerate(alarms["alarm"].values.astype(str).tolist()):
        step, value = alarms["rang_step"].values[:, i], alarms["rang_value"].values[:, i]
        which = np.flatnonzero(np.isfinite(step))
        who = [
            {
                "run": runs[k], "recipe": str(alarms["recipe"].values[k]),
                "learning_rate": float(alarms["learning_rate"].values[k]),
                "init_seed": int(alarms["init_seed"].values[k]), "data_seed": int(alarms["data_seed"].values[k]),
                "step": int(step[k]), "value": float(value[k]) if math.isfinite(value[k]) else None,
                "diverged": diverged[runs[k]],
            }
            for k in which[np.argsort(step[which], kind="stable")]
        ]  # fmt: skip
        quiet = sum(diverged.values()) - sum(bool(of["diverged"]) for of in who)
        rows.append({"alarm": label, "runs": len(runs), "rang": len(who), "diverged_silent": quiet, "who": who})
    return rows
