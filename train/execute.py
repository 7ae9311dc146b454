"""Run a study: plan it, train what is missing, write each pack as it ends.

Started again on the same directory, it trains only the runs that are not there yet: finished *runs* are subtracted,
not packs, so a study that grew seeds or formats trains what is new. A pack that was under way goes on from its checkpoint, with
the bits that it would have had. One sweep at a time has the directory. Where packs are trained, in this process, in others or on
other machines, is the `site`'s matter; the bits are the same.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from train.checkpoint import remove_finished, report_unplanned
from train.durable import atomically, remove_parts
from train.interruption import Interruption
from train.observer import Observer, Together
from train.one_pack import Setting
from train.pack_sizes import PACK_SIZES_FILE, Lowered, write_lowered, write_splits
from train.plan import PlannedPack, splits_of
from train.program import Program
from train.progress import RichObserver
from train.remote import is_url
from train.schedule import Schedule
from train.site import ExecutorName, Site, make_site
from train.snapshots import need, report_gone
from train.status import StatusFile
from train.store import PACKS, STUDY_FILE, finished_runs, study_text
from train.streams import load_texts, report_epochs
from train.study import Study, StudyError
from train.study_file import read_study
from train.study_folder import study_folder
from train.text import Text


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
    executor: ExecutorName = "local",
    workers: int | None = None,
    ray_address: str | None = None,
    *,
    check: bool = False,
    hooks: Sequence[Observer] = (),
    site: AbstractContextManager[Site] | None = None,
) -> Outcome:
    """Train every run of the study that `out` does not hold yet; open the results with `open_study(outcome.directory)`.

    device: "auto" (CUDA where there is one), "cpu" or "cuda". executor: "local" for this machine, "ray" for a Ray cluster, at
    `ray_address` or one that is started here. workers: how many packs at once, on this machine; if not given, one a GPU.
    out: a directory, or for "ray" the URL of one that fsspec can write to, of which `outcome.directory` is a copy. check: hold
    every finished pack against its checksum first, not only those whose files have changed. hooks hear of it beside the
    observer. site: a place of another kind, instead of what device, executor and workers say.
    Raises StudyError, before any work, where the study, the directory or the device won't do, or where another sweep has the
    directory, which is not left behind where it was not there before (see `study_folder`); and after all that could be trained,
    where packs could not. SIGINT and SIGTERM end the training between two steps, by `Interrupted`, a KeyboardInterrupt; a second
    SIGINT ends it at once.
    """
    study = study if isinstance(study, Study) else read_study(study)
    if study.probe.snapshots and is_url(out):
        raise StudyError(
            f"probe.snapshots {study.probe.snapshots[0]!r}: snapshots are kept in a directory, and {out} is a URL: leave them "
            "out, or name a directory that all machines share"
        )
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(site or make_site(executor, device, workers, ray_address, out))
        directory = place.directory
        lock = stack.enter_context(study_folder(directory))
        place.fetch()
        return _run(study, directory, place, lock, observer, cache, hooks, check=check)


def _run(
    study: Study, directory: Path, site: Site, lock: int, observer: Observer | None, cache: Path | None,
    hooks: Sequence[Observer], *, check: bool,
) -> Outcome:  # fmt: skip
    """`run_study`, in a directory that is there, and ours."""
    finished = _finished(directory, study, check=check)
    texts = load_texts(study, cache)
    wanted = {run.identity: run.stream.key for run in study.runs()}
    _same_text(directory, finished, wanted, texts)
    site.get_ready(len(wanted.keys() - finished.keys()), lock)
    packs, device = site.plan(study, finished)
    _enough_disk(directory, packs, need(study, packs).bytes)
    report_unplanned(directory, {pack.hash for pack in packs})
    report_epochs({pack.program for pack in packs}, texts)
    report_gone(directory, study, finished)
    _write_study(directory, study)
    site.send(STUDY_FILE)
    if splits := splits_of(study, packs):
        write_splits(directory, device, splits)
        site.send(PACK_SIZES_FILE)
    found = sum(identity in finished for identity in wanted)
    margin = study.divergence.progress_margin
    with contextlib.ExitStack() as stack:
        # The display comes last: fetching and tokenising texts shows itself.
        observer = observer or stack.enter_context(RichObserver(margin=margin))
        status = stack.enter_context(StatusFile(directory, margin=margin))
        interruption = stack.enter_context(Interruption())
        told = Together(status, observer, *hooks)

        def planned_anew(program: Program, lowered: Lowered) -> None:
            write_lowered(directory, device, program, lowered)
            site.send(PACK_SIZES_FILE)
            told.planned(schedule.packs, found, device)

        schedule = Schedule(packs, planned_anew)
        told.planned(schedule.packs, found, device)
        hashes = {key: text.sha256 for key, text in texts.items()}
        setting = Setting(study, directory.absolute(), site.device, hashes, cache)
        site.train(schedule, setting, texts, lock, told, interruption)
        schedule.conclude(interruption)
    return Outcome(directory, sum(len(pack.runs) for pack in schedule.finished), found, len(finished) - found)


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


def _enough_disk(directory: Path, packs: list[PlannedPack], snapshots: int) -> None:
    """Each run's histories and signals, twice over for the rest and for the file written aside; and bytes of snapshots."""
    wanted = sum(2 * pack.program.history_bytes * len(pack.runs) + 2**20 for pack in packs) + snapshots
    free = shutil.disk_usage(directory).free
    if packs and free < wanted:
        raise StudyError(
            f"{directory}: the study needs about {wanted / 2**20:.0f} MiB and {free / 2**20:.0f} MiB are free there"
        )


def _write_study(directory: Path, study: Study) -> None:
    try:
        with atomically(directory / STUDY_FILE) as aside:
            aside.write_text(study_text(study), encoding="utf-8")
    except OSError as error:
        raise StudyError(
            f"{directory / STUDY_FILE}: can't be written ({error.strerror}); make room and run the sweep again"
        ) from None
