"""Run a study: plan it, train what is missing, write each pack as it ends.

Started again on the same directory, it trains only the runs that are not there yet: finished *runs* are subtracted,
not packs, so a study that grew seeds or formats trains what is new. A pack that was under way goes on from its checkpoint, with
the bits that it would have had. One sweep at a time has the directory.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from train.checkpoint import CHECKPOINTS, Checkpointer, remove_finished, report_unplanned
from train.durable import atomically, remove_parts
from train.interruption import Interrupted, Interruption
from train.lock import locked
from train.pack import train_pack
from train.plan import PlannedPack, pick_device, plan
from train.program import PackResult, Progress
from train.progress import RichObserver
from train.provenance import device_name, provenance
from train.status import StatusFile
from train.store import PACKS, STUDY_FILE, finished_runs, pack_tree, study_text, write_pack
from train.streams import load_texts, report_epochs
from train.study import Study, StudyError
from train.study_file import read_study
from train.text import Text


class Observer(Protocol):
    """Who hears how a study goes; `RichObserver`, the default, shows it on a terminal or in a notebook."""

    def planned(self, packs: list[PlannedPack], finished: int, device: str) -> None:
        """Before any training: what will be trained, how many runs are there already, and on what."""

    def pack_started(self, pack: PlannedPack) -> None:
        """A pack begins; its first step may compile for a minute."""

    def pack_progress(self, pack: PlannedPack, progress: Progress) -> None:
        """A few steps were made."""

    def pack_finished(self, pack: PlannedPack, result: PackResult) -> None:
        """A pack's results are on the disk."""


class Together:
    """Several observers as one, each told in turn."""

    def __init__(self, *observers: Observer) -> None:
        self.observers = observers

    def planned(self, packs: list[PlannedPack], finished: int, device: str) -> None:
        """Tell all."""
        for observer in self.observers:
            observer.planned(packs, finished, device)

    def pack_started(self, pack: PlannedPack) -> None:
        """Tell all."""
        for observer in self.observers:
            observer.pack_started(pack)

    def pack_progress(self, pack: PlannedPack, progress: Progress) -> None:
        """Tell all."""
        for observer in self.observers:
            observer.pack_progress(pack, progress)

    def pack_finished(self, pack: PlannedPack, result: PackResult) -> None:
        """Tell all."""
        for observer in self.observers:
            observer.pack_finished(pack, result)


@dataclass(frozen=True)
class Outcome:
    """What a call of `run_study` did: runs trained now, runs found finished, and where they are."""

    directory: Path
    trained: int
    found: int
    left_out: int


def run_study(
    study: Study | Path | str,
    out: Path | str,
    device: str = "auto",
    observer: Observer | None = None,
    cache: Path | None = None,
    *,
    check: bool = False,
) -> Outcome:
    """Train every run of the study that `out` does not hold yet; open the results with `open_study(out)`.

    device: "auto" (CUDA where there is one), "cpu" or "cuda". check: hold every finished pack against its checksum first,
    not only those whose files have changed. Raises StudyError, before any work, where the study, the directory or the device
    won't do, or where another sweep has the directory. SIGINT and SIGTERM end the training between two steps, by `Interrupted`, a
    KeyboardInterrupt; a second SIGINT ends it at once.
    """
    study = study if isinstance(study, Study) else read_study(study)
    directory = Path(out)
    where = pick_device(device)
    with contextlib.ExitStack() as stack:
        try:
            (directory / PACKS).mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(directory))
            with tempfile.TemporaryFile(dir=directory / PACKS):
                pass
        except OSError as error:
            raise StudyError(f"{directory}: can't write there ({error.strerror}); name another with --out") from None
        return _run(study, directory, where, observer, cache, check=check)


def _run(
    study: Study, directory: Path, where: torch.device, observer: Observer | None, cache: Path | None, *, check: bool
) -> Outcome:  # fmt: skip
    """`run_study`, in a directory that is there, and ours."""
    finished = _finished(directory, study, check=check)
    texts = load_texts(study, cache)
    wanted = {run.identity: run.stream.key for run in study.runs()}
    _same_text(directory, finished, wanted, texts)
    packs = plan(study, where, finished)
    _enough_disk(directory, packs)
    report_unplanned(directory, {pack.hash for pack in packs})
    report_epochs({pack.program for pack in packs}, texts)
    _write_study(directory, study)
    found = sum(identity in finished for identity in wanted)
    margin = study.divergence.progress_margin
    with contextlib.ExitStack() as stack:
        # The display comes last: fetching and tokenising texts shows itself.
        observer = observer or stack.enter_context(RichObserver(margin=margin))
        status = stack.enter_context(StatusFile(directory, margin=margin))
        interruption = stack.enter_context(Interruption())
        origin = provenance(study, where)

        def checkpointer(pack: PlannedPack) -> Checkpointer:
            of = _checkpoint_of(pack, texts[pack.program.dataset], origin)
            seconds = study.execution.checkpoint_seconds
            return Checkpointer(directory / CHECKPOINTS / pack.hash, of, seconds, interruption)

        _train(packs, texts, where, directory, origin, Together(status, observer), found, checkpointer, interruption)
    return Outcome(directory, sum(len(pack.runs) for pack in packs), found, len(finished) - found)


def _train(
    packs: list[PlannedPack], texts: dict[str, Text], where: torch.device, directory: Path, origin: dict[str, Any],
    observer: Observer, found: int, checkpointer_of: Callable[[PlannedPack], Checkpointer], interruption: Interruption,
) -> None:  # fmt: skip
    """One pack after the other, each on the disk before the next begins."""
    observer.planned(packs, found, device_name(where))
    for pack in packs:
        if interruption.number is not None:
            raise Interrupted(interruption.number)
        observer.pack_started(pack)
        text, checkpointer = texts[pack.program.dataset], checkpointer_of(pack)
        result = train_pack(
            pack.program, pack.slots, text, where,
            on_progress=lambda progress, pack=pack: observer.pack_progress(pack, progress),  # type: ignore[misc]
            checkpointer=checkpointer,
        )  # fmt: skip
        _save(directory, pack, result, text, origin)
        checkpointer.remove()
        observer.pack_finished(pack, result)
        if where.type == "cuda":
            torch.cuda.empty_cache()


def _checkpoint_of(pack: PlannedPack, text: Text, origin: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint has to agree in with the pack that goes on from it, by words for a log."""
    return {
        "program": hashlib.sha256(repr(pack.program).encode()).hexdigest()[:16],
        "runs": [run.identity for run in pack.runs],
        "pack_size": pack.size,
        "text": text.sha256,
        "version_of_exmy": origin["version_exmy"],
        "version_of_torch": origin["version_torch"],
        "device": origin["device"],
    }


def _finished(directory: Path, study: Study, *, check: bool) -> dict[str, str]:
    """The runs that the directory holds; StudyError where they are another study's alone."""
    for folder in (directory, directory / PACKS):
        remove_parts(folder)
    finished = finished_runs(directory, study, check=check)
    remove_finished(directory, finished)
    if finished and not finished.keys() & set(study.identities()):
        raise StudyError(
            f"{directory} holds {len(finished)} runs of another study and none of {study.name!r}: "
            "name another directory with --out"
        )
    return finished


def _same_text(directory: Path, finished: dict[str, str], wanted: dict[str, str], texts: dict[str, Text]) -> None:
    for identity, sha256 in finished.items():
        name = wanted.get(identity)
        if name is not None and texts[name].sha256 != sha256:
            raise StudyError(
                f"{directory} holds runs on another {name!r} text ({sha256[:12]}, now {texts[name].sha256[:12]}: "
                f"{texts[name].source}); "
                "go on with the text that began it, or name another directory with --out"
            )


def _enough_disk(directory: Path, packs: list[PlannedPack]) -> None:
    """Each run's histories and signals, twice over for the rest and for the file written aside."""
    need = sum(2 * pack.program.history_bytes * len(pack.runs) + 2**20 for pack in packs)
    free = shutil.disk_usage(directory).free
    if packs and free < need:
        raise StudyError(
            f"{directory}: the study needs about {need / 2**20:.0f} MiB and {free / 2**20:.0f} MiB are free there"
        )


def _write_study(directory: Path, study: Study) -> None:
    try:
        with atomically(directory / STUDY_FILE) as aside:
            aside.write_text(study_text(study), encoding="utf-8")
    except OSError as error:
        raise StudyError(
            f"{directory / STUDY_FILE}: can't be written ({error.strerror}); make room and run the sweep again"
        ) from None


def _save(directory: Path, pack: PlannedPack, result: PackResult, text: Text, origin: dict[str, Any]) -> None:
    """The pack on the disk; where that fails, in the temporary folder, so that nothing computed is lost."""
    tree = pack_tree(pack, result, text, origin)
    try:
        write_pack(directory, pack, tree)
    except OSError as error:
        rescue = Path(tempfile.gettempdir()) / "exmy-rescued"
        try:
            (rescue / PACKS).mkdir(parents=True, exist_ok=True)
            saved = f"this pack is in {write_pack(rescue, pack, tree)}: move it to {directory / PACKS}"
        except OSError:
            saved = f"this pack's {len(pack.runs)} runs are lost"
        raise StudyError(
            f"{directory / PACKS}: can't write there ({error.strerror or error}); {saved}, make room and run the "
            "sweep again; the other finished runs are kept"
        ) from None
