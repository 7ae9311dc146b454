"""`exmy landscape`: measure the weights that a study directory has, of snapshots and of packs under way.

    weights    snapshots, by run and step; checkpoints, a whole pack at one step
    point      one measure of the runs that are in memory together, at one step: the least that is written, or lost

Runs of one program are measured together, as in a pack, as many as fit. What is there already, of the same weights, is left out,
so that this can be stopped at any time and started again; nothing that a sweep wrote is touched, and one may go on meanwhile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from landscape import LandscapeError
from train.at_point import AtPoint
from train.checkpoint import Checkpoint, CheckpointError, checkpoints_in
from train.checkpoint import read as read_checkpoint
from train.determinism import deterministic
from train.directory import LANDSCAPE, points_in, study_of
from train.documents import TextError
from train.durable import CHECKSUM, remove_parts
from train.landscape_files import by_age, point_dataset, read_point, write_point
from train.lock import locked
from train.measures import AFTERWARDS, LOGITS, MEASURES, Quantisers
from train.pack import Pack
from train.plan import capacity, chunked, pick_device, probe_of, program_of
from train.program import Probe, Program
from train.provenance import provenance
from train.snapshots import Kept, read, snapshots_in
from train.store import run_coordinates
from train.study import Run, Study, StudyError
from train.taking import take, ticks
from train.text import Text, load_text

DEFAULT = ("hessian_eigenvalue", "hessian_trace", "gradient_curvature", "critical_sharpness")
WEIGHTS = 'no weights are kept there: set [probe] snapshots, such as snapshots = ["all"], before the study is trained'

log = logging.getLogger(__name__)


class Progress(NamedTuple):
    """How far it is: points that will have been measured, those of them that are, and what comes next, in words."""

    points: int
    done: int
    what: str


@dataclass(frozen=True)
class Measured:
    """What a call did, in runs x steps x measures: taken now, found, and that could not be taken, each with a line in the log."""

    taken: int
    found: int
    failed: int


@dataclass(frozen=True)
class Weights:
    """Where weights of some runs after one step are. `sha256` by run: of the file that has them."""

    step: int
    runs: tuple[Run, ...]
    sha256: Mapping[str, str]
    kept: Mapping[str, Kept] = field(default_factory=dict)
    checkpoint: Checkpoint | None = None


def measure_study(
    directory: Path, measures: Sequence[str] = (), names: Sequence[str] = (), quantisers: Quantisers | None = None,
    device: str = "auto", cache: Path | None = None, on_progress: Callable[[Progress], None] | None = None,
    epsilons: Sequence[float] = (),
) -> Measured:  # fmt: skip
    """Measure what there is, and keep each point in `landscape/` of the directory; `open_study` then has it.

    measures: what [probe] names beside the logit sharpness where none is given, or `DEFAULT`. names: which runs, as `selection`
    has them; all by default. quantisers, epsilons: the study's own by default. StudyError where there is no study, no weights, or
    no such run.
    """
    study, where = study_of(directory), pick_device(device)
    probe = _probe(study, measures, quantisers, epsilons)
    todo = list(_weights(directory, study, names))
    _check_linear(probe, todo)
    (directory / LANDSCAPE).mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(directory / LANDSCAPE, "exmy landscape"))
        except OSError as error:
            raise StudyError(f"{directory / LANDSCAPE}: can't write there ({error.strerror})") from None
        _tidy(directory)
        work = _Work(directory, study, where, probe, cache, on_progress)
        return work.do(todo)


def _probe(study: Study, measures: Sequence[str], quantisers: Quantisers | None, epsilons: Sequence[float]) -> Probe:
    own = [name for name in study.probe.measures if name in MEASURES]
    for name in measures:
        if name not in AFTERWARDS:
            near = difflib.get_close_matches(name, AFTERWARDS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(AFTERWARDS)}"
            raise StudyError(f"{name!r} is nothing that is measured afterwards; {hint}")
    for epsilon in epsilons:
        if not 0 < epsilon <= 1:
            raise StudyError(
                f"an epsilon must be above 0 and at most 1, got {epsilon:g}: it is a box's half-width, relative"
            )
    chosen = tuple(dict.fromkeys(measures or own or DEFAULT))
    if epsilons and not any("epsilon" in AFTERWARDS[name].axes for name in chosen):
        boxes = ", ".join(name for name, row in AFTERWARDS.items() if "epsilon" in row.axes)
        raise StudyError(f"an epsilon is of boxes, and none of {', '.join(chosen)} is one: name {boxes}")
    return dataclasses.replace(
        probe_of(study.probe), measures=chosen, every=1, intervals=(), quantisers=quantisers or study.probe.quantisers,
        epsilons=tuple(dict.fromkeys(epsilons or study.probe.epsilons)),
    )  # fmt: skip


def _check_linear(probe: Probe, todo: Sequence[Weights]) -> None:
    caps = {cap for of in todo for run in of.runs if (cap := program_of(run).shape.logit_softcap) is not None}
    if "hidden_sharpness" in probe.measures and caps:
        raise StudyError(
            f"hidden_sharpness is of logits that are linear in the hidden state, and logit_softcap={min(caps):g} bends them: "
            "name another measure, or by --run runs without it"
        )


def _weights(directory: Path, study: Study, names: Sequence[str]) -> Iterator[Weights]:
    """What there is of the runs that are named, a program and a step at a time; StudyError where that is nothing."""
    kept = {(one.run, one.step): one for one in snapshots_in(directory)}
    checkpoints = list(checkpoints_in(directory))
    there = {run for run, _ in kept} | {run for one in checkpoints for run in one.runs}
    if not there:
        raise StudyError(f"{directory}: {WEIGHTS}")
    runs = {run.identity: run for run in study.runs() if run.identity in there}
    try:
        chosen = {run.identity: run for run in study.chosen(names, runs.values())} if names else runs
    except ValueError as error:
        raise StudyError(str(error)) from None
    if not chosen:
        of = ", ".join(dict.fromkeys(run.recipe.name for run in runs.values())) or "another study"
        raise StudyError(
            f"{directory}: no weights of {', '.join(names) or 'its runs'} are kept there, but those of runs of {of}"
        )
    groups: dict[tuple[Program, int], list[Kept]] = {}
    for (run, step), one in sorted(kept.items(), key=lambda item: item[0][1]):
        if run in chosen:
            groups.setdefault((program_of(chosen[run]), step), []).append(one)
    order = {run: i for i, run in enumerate(chosen)}
    for (_, step), those in groups.items():
        those.sort(key=lambda one: order[one.run])
        by_run = {one.run: one for one in those}
        sha256 = {run: _sha256(one) for run, one in by_run.items()}
        yield Weights(step, tuple(chosen[run] for run in by_run), sha256, by_run)
    for checkpoint in checkpoints:
        rest = tuple(chosen[run] for run in checkpoint.runs if run in chosen and (run, checkpoint.step) not in kept)
        if rest and all(run in runs for run in checkpoint.runs):
            yield Weights(
                checkpoint.step, rest, dict.fromkeys(checkpoint.runs, checkpoint.sha256), checkpoint=checkpoint
            )


def _sha256(kept: Kept) -> str:
    """What the checksum beside a snapshot says; empty where there is none, which `read` will not take."""
    try:
        return kept.path.with_suffix(CHECKSUM).read_text(encoding="ascii")[:64]
    except (OSError, ValueError):
        return ""


def _tidy(directory: Path) -> None:
    """Remove what a measurement that was killed left half written."""
    for folder in (directory / LANDSCAPE).glob("*/*"):
        remove_parts(folder)


class _Work:
    """One call: packs come into memory one after the other, and each measure of each of them is a point."""

    def __init__(
        self, directory: Path, study: Study, device: torch.device, probe: Probe, cache: Path | None,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:  # fmt: skip
        self.directory, self.study, self.device, self.probe, self.cache = directory, study, device, probe, cache
        self._hear = on_progress or (lambda _: None)
        # What training asked for is nothing to this machine.
        self._any_size = study.model_copy(
            update={"execution": study.execution.model_copy(update={"pack_size": "auto"})}
        )
        self._texts: dict[str, Text] = {}
        self._pack: tuple[Any, Pack] | None = None
        self._origin = provenance(study, device)
        self._done: dict[str, dict[tuple[str, int], str]] = {measure: {} for measure in probe.measures}
        for point in by_age(points_in(directory)):
            if point.quantisers == probe.quantisers and point.measure in self._done:
                with contextlib.suppress(StudyError):  # one that is damaged is measured again, and written over
                    data = read_point(point)
                    if "epsilon" in data.dims and not {*probe.epsilons} <= {*data["epsilon"].values.tolist()}:
                        continue
                    pairs = zip(data["run"].values.tolist(), data["weights"].values.tolist(), strict=True)
                    self._done[point.measure].update({(run, point.step): sha256 for run, sha256 in pairs})

    def do(self, weights: Sequence[Weights]) -> Measured:
        """Measure all that is not there."""
        everything = sum(len(self._measures(of)) * len(of.runs) for of in weights)
        parts = [part for of in weights for part in self._parts(of)]
        points, done, taken, failed = sum(len(measures) for _, measures in parts), 0, 0, 0
        found = everything - sum(len(of.runs) * len(measures) for of, measures in parts)
        for of, measures in parts:
            whole, at = of, None
            for measure in measures:
                self._hear(Progress(points, done, f"{measure}, {len(of.runs)} runs after step {of.step}"))
                try:
                    if at is None and of.runs:
                        of, pack = self._loaded(of)
                        at = AtPoint(pack, self.probe) if pack else None
                    if at is not None:
                        self._take(measure, of, at)
                except (LandscapeError, CheckpointError, ValueError, OSError) as error:
                    if isinstance(error, StudyError):
                        raise
                    log.warning("%s after step %d of %s: %s", measure, of.step, _named(of.runs), error)
                    failed += len(whole.runs)
                else:
                    taken += len(of.runs)
                    failed += len(whole.runs) - len(of.runs)
                done += 1
                self._hear(Progress(points, done, ""))
        return Measured(taken, found, failed)

    def _measures(self, of: Weights) -> list[str]:
        """Those that the runs' optimiser leaves."""
        left = dataclasses.replace(program_of(of.runs[0]), probe=self.probe).measures
        return [measure for measure in self.probe.measures if measure == LOGITS or measure in left]

    def _parts(self, of: Weights) -> Iterator[tuple[Weights, list[str]]]:
        """What is still to be measured: runs that fit into memory together, each part with its measures."""
        wanted: dict[tuple[str, ...], list[Run]] = {}
        for run in of.runs:
            at, sha256 = (run.identity, of.step), of.sha256[run.identity]
            missing = tuple(measure for measure in self._measures(of) if self._done[measure].get(at) != sha256)
            wanted.setdefault(missing, []).append(run)
        for measures, runs in wanted.items():
            if not measures:
                continue
            program = dataclasses.replace(program_of(runs[0]), probe=self.probe)
            most = len(runs) if of.checkpoint else capacity(self._any_size, program, self.device)
            for i in range(0, len(runs), most):
                yield dataclasses.replace(of, runs=tuple(runs[i : i + most])), list(measures)

    def _loaded(self, of: Weights) -> tuple[Weights, Pack | None]:
        """A pack that stands where the weights were taken, None where none can be read; and what it has of them."""
        if of.checkpoint:
            return of, self._from_checkpoint(of.checkpoint, of.step)
        saved, runs = [], []
        for run in of.runs:
            try:
                saved.append(read(of.kept[run.identity]))
                runs.append(run)
            except (ValueError, OSError) as error:
                log.warning("%s: not measured: %s", of.kept[run.identity].path, error)
        of = dataclasses.replace(of, runs=tuple(runs))
        if not saved:
            return of, None
        program = dataclasses.replace(program_of(of.runs[0]), probe=Probe(), signals_every=0)
        pack = self._pack_of(program, of.runs, len(of.runs), {header["text"] for header, _ in saved})
        pack.put(of.step, [tensors for _, tensors in saved])
        return of, pack

    def _from_checkpoint(self, checkpoint: Checkpoint, step: int) -> Pack:
        by_identity = {run.identity: run for run in self.study.runs() if run.identity in checkpoint.runs}
        runs = tuple(by_identity[run] for run in checkpoint.runs)
        self._pack = None  # one that has made steps can't be loaded
        pack = self._pack_of(program_of(runs[0]), runs, checkpoint.pack_size, {checkpoint.text})
        found = read_checkpoint(checkpoint.folder, checkpoint.of)
        if found is None or found[0] != step:
            raise ValueError("its checkpoint has been replaced meanwhile: once more will measure the new one")
        pack.load(found[2])
        return pack

    def _pack_of(self, program: Program, runs: tuple[Run, ...], size: int, texts: set[str]) -> Pack:
        """The pack of these runs, the last one where it is; texts: the SHA-256 of what they were trained on."""
        key = (program, tuple(run.identity for run in runs), size)
        text = self._text(runs[0], texts)
        if self._pack is None or self._pack[0] != key:
            self._pack = None  # before the next one needs the memory
            [planned] = chunked(program, runs, size)
            self._pack = (key, Pack(program, planned.slots, text, self.device, compiled=False))
        return self._pack[1]

    def _text(self, run: Run, wanted: set[str]) -> Text:
        stream = run.stream
        if stream.key not in self._texts:
            try:
                self._texts[stream.key] = load_text(stream.dataset, self.cache, stream.tokenizer, stream.corruption)
            except (TextError, ValueError) as error:
                raise StudyError(str(error)) from None
        text = self._texts[stream.key]
        if others := wanted - {text.sha256}:
            raise StudyError(
                f"{stream.key}: runs were trained on another text ({min(others)[:12]}, now {text.sha256[:12]}: {text.source}); "
                "measure with the one that they were trained on"
            )
        return text

    def _take(self, measure: str, of: Weights, at: AtPoint) -> None:
        with deterministic(False):
            values, _ = take(measure, at)
        slots = [self._slot(run, of) for run in of.runs]
        along = {axis: ticks(self.probe, measure, axis) for axis in AFTERWARDS[measure].axes}
        size = of.checkpoint.pack_size if of.checkpoint else len(of.runs)
        attrs = {**self._origin, "measured_together": size, "at_once": self.probe.at_once}
        data = point_dataset(
            {name: array[slots] for name, array in values.items()}, measure, self.probe.quantisers, of.step, along,
            run_coordinates(of.runs, size), [of.sha256[run.identity] for run in of.runs], attrs,
        )  # fmt: skip
        try:
            write_point(self.directory, data, measure, self.probe.quantisers, of.step)
        except OSError as error:
            raise StudyError(
                f"{self.directory / LANDSCAPE}: can't write there ({error.strerror or error}); make room and start again: what "
                "was measured before is kept"
            ) from None

    def _slot(self, run: Run, of: Weights) -> int:
        return of.checkpoint.runs.index(run.identity) if of.checkpoint else of.runs.index(run)


def _named(runs: Iterable[Run]) -> str:
    """Runs for a line: by recipe, rate and seed, the first of them."""
    first, *others = runs
    more = f" and {len(others)} more" if others else ""
    return f"{first.recipe.name} at {first.learning_rate:g}, seed {first.seed}{more}"
