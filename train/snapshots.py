"""Weights of named runs, kept at every probe: what there is to be measured later of a run that went on, or diverged.

    snapshots/<run>/<step>.safetensors    weights, moments, and what delayed scales are made of, of one run after so many steps
    snapshots/<run>/<step>.sha256         its checksum, for `sha256sum -c` too

A run is called by its identity, and `[probe] snapshots` says which are kept (see `selection`). Each file is written whole or not
at all, after its checksum (see `durable`), and says in its header whose it is; reading one runs no code. A pack that goes on from
a checkpoint leaves those that are there as they are, since it would make the same; one that starts over removes them first. Where
one can't be written the training goes on without it.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import safetensors
import safetensors.torch
from torch import Tensor

from train.directory import SNAPSHOTS
from train.durable import CHECKSUM, atomically, read_intact, seal

if TYPE_CHECKING:
    from train.pack import Pack
    from train.plan import PlannedPack
    from train.program import Program
    from train.study import Study

TENSORS, HEADER = ".safetensors", "exmy"
SCHEMA = "1"
KEPT = ("parameter ", "first ", "second ", "amaxes ", "updates")
DELAYED = ("operand ",)  # of a recipe with delayed scales: its weights were rounded with scales that are gone since

log = logging.getLogger(__name__)


class Kept(NamedTuple):
    """A snapshot's file, and whose it is: a run's identity, after how many steps."""

    path: Path
    run: str
    step: int


class Need(NamedTuple):
    """What snapshots of a plan take: runs of which there are any, files, and bytes at most."""

    runs: int
    files: int
    bytes: int


def state_of(state: Mapping[str, Tensor], slot: int, *, delayed: bool) -> dict[str, Tensor]:
    """One run's part of a pack's state, with a run axis of one; what a snapshot holds."""
    wanted = KEPT + (DELAYED if delayed else ())
    return {name: t.narrow(axis_of(name), slot, 1) for name, t in state.items() if name.startswith(wanted)}


def axis_of(name: str) -> int:
    """Where the run axis is in a tensor of a pack's state: amaxes are [M, R, H], of several matrices."""
    return int(name.startswith("amaxes "))


class Snapshots:
    """Keeps runs of a pack while it trains. slots: identities by slot. of: what headers say beside the run and the step."""

    def __init__(self, directory: Path, slots: Mapping[int, str], steps: Sequence[int], of: Mapping[str, str]) -> None:
        self._folder, self._slots, self._steps, self._of = (
            directory / SNAPSHOTS,
            dict(slots),
            frozenset(steps),
            dict(of),
        )
        self._warned = False

    def after_step(self, pack: Pack) -> None:
        """Keep the runs where the pack is at a probe; what can't be written costs a line in the log."""
        if pack.made not in self._steps:
            return
        state = pack.state()
        for slot, run in self._slots.items():
            try:
                if not pack.made:
                    shutil.rmtree(self._folder / run, ignore_errors=True)
                self._keep(run, pack.made, state_of(state, slot, delayed=bool(pack.histories.names)))
            except OSError as error:
                if not self._warned:
                    log.warning(
                        "%s: a snapshot can't be written (%s); the training goes on without it",
                        self._folder,
                        error.strerror,
                    )
                self._warned = True

    def _keep(self, run: str, step: int, state: Mapping[str, Tensor]) -> None:
        path = self._folder / run / f"{step}{TENSORS}"
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(path.parent).free < 2 * sum(t.nbytes for t in state.values()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        header = {"schema": SCHEMA, "run": run, "step": str(step), **self._of}
        # One entry: of several, safetensors writes the order as it comes, and the same weights would not be the same file.
        metadata = {HEADER: json.dumps(header, sort_keys=True)}
        content = safetensors.torch.save({name: t.cpu().contiguous() for name, t in state.items()}, metadata)
        seal(path, content)
        with atomically(path) as aside:
            aside.write_bytes(content)


def keeper(
    directory: Path, study: Study, pack: PlannedPack, text_sha256: str, origin: Mapping[str, Any]
) -> Snapshots | None:
    """Who keeps what the study asks for of a pack; None where that is nothing."""
    runs = [run.identity for run in study.chosen(study.probe.snapshots, pack.runs)]
    if not runs:
        return None
    slots = {slot: run.identity for slot, run in enumerate(pack.runs) if run.identity in runs}
    of = {
        "text": text_sha256, "pack": pack.hash, "pack_size": str(pack.size), "device": str(origin["device"]),
        "version_exmy": str(origin["version_exmy"]), "version_torch": str(origin["version_torch"]),
    }  # fmt: skip
    return Snapshots(directory, slots, pack.program.snapshot_steps, of)


def need(study: Study, packs: Sequence[PlannedPack]) -> Need:
    """What the snapshots of these packs will take on the disk."""
    if not study.probe.snapshots:
        return Need(0, 0, 0)
    rows = [(pack.program, len(study.chosen(study.probe.snapshots, pack.runs))) for pack in packs]
    files = [(program, count * len(program.snapshot_steps)) for program, count in rows]
    return Need(
        sum(count for _, count in rows), sum(count for _, count in files),
        sum(count * bytes_of(program) for program, count in files),
    )  # fmt: skip


def report_gone(directory: Path, study: Study, finished: Collection[str]) -> None:
    """A line in the log where the study names runs that were finished before anybody kept their weights."""
    if not study.probe.snapshots:
        return
    runs = study.chosen(study.probe.snapshots, (run for run in study.runs() if run.identity in finished))
    gone = [run.identity for run in runs if not (directory / SNAPSHOTS / run.identity).is_dir()]
    if gone:
        log.warning(
            "probe.snapshots names %d runs that are finished, and whose weights were not kept: to have them, train these runs in "
            "another directory", len(gone),
        )  # fmt: skip


def bytes_of(program: Program) -> int:
    """Of one run's snapshot, at most: weights, two moments, and operands where scales are delayed."""
    places = (*program.structure.places, *(program.before.places if program.before else ()))
    delayed = any(place is not None and place.rules is not None and place.rules.is_delayed for place in places)
    return program.shape.size * program.dtype.itemsize * (6 if delayed else 3) + 2**14


def snapshots_in(directory: Path) -> Iterator[Kept]:
    """The snapshots of a study directory, by run and step; whoever reads one sees whether it is whole."""
    for path in (directory / SNAPSHOTS).glob(f"*/*{TENSORS}"):
        if path.stem.isdigit():
            yield Kept(path, path.parent.name, int(path.stem))


def read(kept: Kept) -> tuple[dict[str, str], dict[str, Tensor]]:
    """A snapshot's header and tensors; ValueError where it is damaged or another's, OSError where it can't be read."""
    if not kept.path.with_suffix(CHECKSUM).exists():
        raise ValueError("it has no checksum beside it")
    content = read_intact(kept.path)
    try:
        tensors = safetensors.torch.load(content)
        size = int.from_bytes(content[:8], "little")
        header: dict[str, str] = json.loads(json.loads(content[8 : 8 + size])["__metadata__"][HEADER])
    except (safetensors.SafetensorError, KeyError) as error:
        raise ValueError(f"no snapshot of exmy's: {error}") from None
    if (header.get("run"), header.get("step")) != (kept.run, str(kept.step)):
        raise ValueError(f"it is of run {header.get('run')} after step {header.get('step')}")
    return header, tensors
