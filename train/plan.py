"""From runs to packs: group the runs that can share a program, choose R for each program, fill its packs.

R is part of a program, since compiled reductions are shaped by it: it comes from a short list, it is chosen from all the runs
of the study (so that a study started again chooses the same), or of a strategy's round, and a short pack is padded, never shrunk.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields

import torch

from train.collection import no_collection
from train.compiling import compiles_steps
from train.loss_scale import DynamicLossScale
from train.measures import MEASURES
from train.model import ModelShape
from train.optim import AdamW, Muon
from train.pack_sizes import Lowered, Split, Splits, program_key
from train.program import Probe, Program, Slot
from train.recipe import Recipe
from train.settings import PACK_SIZES, ModelSettings, ProbeSettings, TrainingSettings
from train.splitting import Portion, split
from train.study import Run, Study, StudyError
from train.tokenizer import vocabulary_of

LARGEST = {"cpu": 16, "cuda": 128}
# What a step costs however small the pack is, in runs' worth: launches on a GPU, the interpreter on a CPU.
OVERHEAD = {"cpu": 1, "cuda": 8}
# The least R that packs are split to, so that no worker is idle; on a CPU one pack takes all cores, and none is split.
LEAST = {"cuda": 8}
MEMORY_SHARE = 0.8


@dataclass(frozen=True)
class PlannedPack:
    """Runs that train together: `size` is R, with padding where there are fewer runs.

    restarted_from: the R that was planned first, where the program was out of memory at it. split_from: the R that it would have
    had, had there been enough packs for all workers.
    """

    program: Program
    runs: tuple[Run, ...]
    size: int
    restarted_from: int | None = None
    split_from: int | None = None

    @property
    def slots(self) -> list[Slot]:
        """What the engine trains: the runs, then the last one again as padding."""
        slots = [
            Slot(run.recipe, run.learning_rate, run.init_seed, run.data_seed, run.recipe.loss_scale or 1.0)
            for run in self.runs
        ]
        return slots + [slots[-1]] * (self.size - len(slots))

    @functools.cached_property
    def hash(self) -> str:
        """16 hex digits over the runs and R; the name of the pack's file."""
        text = " ".join([*(run.identity for run in self.runs), str(self.size)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def shape_of(model: ModelSettings) -> ModelShape:
    """The shape that [model] asks for: its fields of the same names, and the tokenizer's vocabulary where it has none."""
    same = {f.name: getattr(model, f.name) for f in fields(ModelShape)}
    return ModelShape(**same | {"vocabulary": model.vocabulary or vocabulary_of(model.tokenizer)})


def program_of(run: Run) -> Program:
    """What a run must share with the others of its pack."""
    model, training, probe = run.model, run.training, run.probe
    return Program(
        shape=shape_of(model),
        structure=run.recipe.structure,
        before=run.recipe.before.structure if run.recipe.before else None,
        until=run.recipe.until,
        state=run.recipe.state,
        scales_loss=run.recipe.loss_scale not in (None, 1.0),
        dynamic_loss_scale=DynamicLossScale() if run.recipe.loss_scale is None else None,
        dataset=run.stream.key,
        steps=training.steps,
        sequences=training.sequences,
        warmup=training.warmup,
        schedule=training.schedule,
        final_fraction=training.final_fraction,
        optimizer=_optimizer(training),
        evaluate_every=training.evaluate_every,
        evaluation_sequences=training.evaluation_batches * training.sequences,
        probe=probe_of(probe),
        decay_fraction=training.decay_fraction,
        signals_every=run.signals.every,
    )


def probe_of(probe: ProbeSettings) -> Probe:
    """[probe] as a program has it: all but whose weights are kept."""
    return Probe(
        probe.every, tuple(probe.measures), tuple(probe.epsilons), probe.positions, tuple(probe.intervals.items()),
        probe.quantisers, probe.eigenvalues, tuple(probe.radii), tuple(probe.adaptive_radii), probe.samples, probe.at_once,
    )  # fmt: skip


def _optimizer(training: TrainingSettings) -> AdamW:
    t = training
    adamw = (t.beta1, t.beta2, t.eps, t.weight_decay, t.clip, tuple(t.no_decay))
    return Muon(*adamw, t.muon_rate) if t.optimizer == "muon" else AdamW(*adamw)


def plan(
    study: Study,
    device: torch.device,
    finished: Collection[str] = (),
    lowered: Mapping[str, Lowered] | None = None,
    bytes_of: Callable[[Program], int] | None = None,
    workers: int = 1,
    splits: Mapping[tuple[str, int], Split] | None = None,
    under_way: Collection[str] = (),
) -> list[PlannedPack]:
    """The packs that a study still needs, programs in order of first appearance; `finished` are identities of runs to
    leave out, `lowered` the R of programs that were out of memory before (see `pack_sizes`). bytes_of: what a run of a program
    takes of a device, where that is not the whole run. workers: how many packs are trained at once, of which none should be idle
    (see `splitting`); splits: what was split before; under_way: packs that have a checkpoint, by their hash.

    Raises StudyError where a run can't be trained on this device: a native type that it lacks, or too little memory.
    """
    groups: dict[tuple[int, Program], list[Run]] = {}
    with no_collection():
        for number, family in study.families_by_round():
            groups.setdefault((number, program_of(family[0])), []).extend(family)
    portions: list[Portion] = []
    _check_measures({program: None for _, program in groups}.keys())
    for (_, program), runs in groups.items():
        _check_device(program, runs[0], device)
        _check_recipe(program, runs[0].recipe)
        size = _pack_size(study, program, len(runs), device, bytes_of)
        low = (lowered or {}).get(program_key(program))
        missing = [run for run in runs if run.identity not in finished] if finished else runs
        size, planned = (low.size, low.planned) if low and low.size < size else (size, None)
        said = study.execution.pack_size != "auto"
        kept = splits.get((program_key(program), len(runs))) if splits and not said else None
        if kept and kept.size < size:
            portions.append(Portion(program, missing, kept.size, planned, size, is_fixed=True))
            continue
        begun = bool(under_way) and any(pack.hash in under_way for pack in chunked(program, missing, size))
        portions.append(Portion(program, missing, size, planned, is_fixed=begun or said))
    if workers > 1 and device.type in LEAST:
        portions = split(portions, workers, OVERHEAD[device.type], LEAST[device.type])
    return [pack for p in portions for pack in chunked(p.program, p.runs, p.size, p.restarted_from, p.split_from)]


def chunked(
    program: Program,
    runs: Sequence[Run],
    size: int,
    restarted_from: int | None = None,
    split_from: int | None = None,
) -> list[PlannedPack]:
    """Runs of one program in packs of R = size, in their order."""
    starts = range(0, len(runs), size)
    return [PlannedPack(program, tuple(runs[i : i + size]), size, restarted_from, split_from) for i in starts]


def splits_of(study: Study, packs: Sequence[PlannedPack]) -> Splits:
    """What of a study's plan was split, to be found again when it is started again."""
    found = {id(pack.program): pack for pack in packs if pack.split_from is not None}
    if not found:
        return {}
    counts = Counter[tuple[int, Program]]()
    for number, family in study.families_by_round():
        counts[number, program_of(family[0])] += len(family)
    of_program = {pack.program: Split(pack.size, pack.split_from or pack.size) for pack in found.values()}
    return {
        (program_key(program), count): of_program[program]
        for (_, program), count in counts.items()
        if program in of_program
    }


def capacity(study: Study, program: Program, device: torch.device) -> int:
    """The most runs of a program that a pack may have here; StudyError as `plan`."""
    return _pack_size(study, program, LARGEST[device.type], device, None)


def choose_pack_size(runs: int, largest: int, overhead: int) -> int:
    """The R of the list, at most `largest`, that trains `runs` soonest: ceil(runs / R) packs of cost R + overhead each."""
    sizes = [size for size in PACK_SIZES if size <= largest]
    return min(sizes, key=lambda size: (-(-runs // size) * (size + overhead), -size))


def _pack_size(
    study: Study, program: Program, runs: int, device: torch.device, bytes_of: Callable[[Program], int] | None
) -> int:
    need, have = program.bytes_per_run(compiles_steps(device.type)), free_memory(device)
    need = bytes_of(program) if bytes_of else need
    fit = int(MEMORY_SHARE * have // need)
    if fit < 1:
        raise StudyError(
            f"one run of {program.shape.layers}x{program.shape.width} with {program.sequences} sequences of "
            f"{program.shape.context} needs about {need / 2**30:.1f} GiB and {device} has {have / 2**30:.1f} GiB free: "
            "take fewer sequences or a smaller model"
        )
    asked = study.execution.pack_size
    if asked != "auto":
        if asked > fit:
            raise StudyError(
                f"execution.pack_size {asked} needs more memory than {device} has free; at most {fit} runs fit"
            )
        return asked
    return choose_pack_size(runs, min(fit, LARGEST[device.type]), OVERHEAD[device.type])


def free_memory(device: torch.device) -> int:
    """Bytes of the device's memory, a CPU's being the host's, that nothing uses."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # no such figure on this system
        return 8 * 2**30


def _check_device(program: Program, run: Run, device: torch.device) -> None:
    natives = program.structure.natives
    if device.type == "cpu" and "tf32" in natives:
        raise StudyError(
            f"recipe {run.recipe.name!r}: a CPU has no TF32 products; take 'tf32', the simulated format, or a GPU"
        )


def _check_recipe(program: Program, recipe: Recipe) -> None:
    kept, layers = recipe.first_blocks + recipe.last_blocks, program.shape.layers
    if kept > layers:
        raise StudyError(
            f"recipe {recipe.name!r}: first_blocks and last_blocks keep {kept} blocks, and the model has {layers}: keep fewer"
        )
    if program.until >= program.steps:
        raise StudyError(
            f"recipe {recipe.name!r}: until must be less than steps={program.steps}, got {program.until}, or it never begins"
        )


def _check_measures(programs: Collection[Program]) -> None:
    """StudyError for a measure that the model has none of, or that no run of the study could have."""
    for program in programs:
        cap = program.shape.logit_softcap
        if "hidden_sharpness" in program.measures and cap is not None:
            raise StudyError(
                f"probe.measures: hidden_sharpness is of logits that are linear in the hidden state, and logit_softcap={cap:g} "
                "bends them: leave one of the two out"
            )
    for measure in programs and next(iter(programs)).probe.measures:
        if measure in MEASURES and MEASURES[measure].adam and all(isinstance(p.optimizer, Muon) for p in programs):
            raise StudyError(
                f"probe.measures: {measure} is of Adam's moments, and every run has training.optimizer = 'muon': leave it out"
            )


def pick_device(name: str) -> torch.device:
    """CUDA for "auto", where there is one; StudyError for a device that this machine lacks."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise StudyError("device 'cuda': PyTorch sees no CUDA device here; leave it out, or take --device cpu")
    return torch.device(name)


def describe(packs: Sequence[PlannedPack]) -> str:
    """The plan in one line."""
    runs, programs = sum(len(p.runs) for p in packs), len({p.program for p in packs})
    steps = sum(len(p.runs) * p.program.steps for p in packs)
    sizes = ", ".join(map(str, sorted({p.size for p in packs})))
    before = sorted({p.split_from for p in packs if p.split_from is not None})
    split_from = f", R = {', '.join(map(str, before))} split so that no worker is idle" if before else ""
    of = f" of {sizes}{split_from} ({counted(programs, 'program')})" if packs else ""
    packed = counted(len(packs), "pack") + of
    return f"{counted(runs, 'run')} in {packed}, {steps:,} run-steps"


def counted(number: int, noun: str) -> str:
    """A number of things, in words."""
    return f"{number} {noun}" + ("s" if number != 1 else "")
