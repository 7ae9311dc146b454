"""What a study is doing, for another shell: `status.json` in its directory, and one answer out of it and of the packs' index.

The packs' files are the truth of what is finished, and their index says what is in them (see `finished`). `status.json` tells
only what is under way: an observer writes it aside and renames it, every `HEARTBEAT` seconds by a thread of its own, so that the
heartbeat goes on while a step compiles for a minute and ends when the process does. Nobody has to ask whether a process id is
alive, which another host could not answer: a file that says "running" and is older than `STALE` was left behind by a process that
was killed. A status that can't be written never stops a training: the first failure is a line in the log.

`study_status` gives a dictionary of this form (schema 1), numbers in JSON's sense, null where nothing is known; times are
ISO 8601 in UTC, durations in seconds, memory in bytes:

    schema, name, study_hash, directory
    state           not_started, running, finished; or why it rests: interrupted, failed, stale, incomplete
    message         one sentence on the state
    runs            planned, finished, diverged; definition: the one of divergence that counts; unreadable packs are an error
    packs_finished  how many there are
    digest          whether there is a digest of them instead, which can be looked at, and not be gone on with
    packs           finished ones, from their files, oldest first: hash, runs, pack_size, diverged, device, written,
                    seconds, seconds_first_step, ended_early_at: null, or the step after which all runs were dead (`dead`)
    snapshots       how many weights are kept: runs, files
    landscape       what `exmy landscape` measured: quantisers, measure, points (files), by these
    alarms          of finished runs, by the study's alarms: alarm, runs, rang, diverged_silent, and who, as `rings.told` has it
    under_way       null, or the last `status.json`: state, error, started, heartbeat, live_rule and `watch.Snapshot`
                    (runs_found, runs_planned, packs_planned, packs_finished, run_steps, run_steps_done, seconds, seconds_left,
                    alive, non_finite, no_progress, dead, memory_bytes, rang; packs: those under way, as `watch.PackView`)
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime
import heapq
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from train.directory import SNAPSHOTS, is_digest, points_in, study_of
from train.finished import finished_rows
from train.index import Row, all_differ, modified, runs_of
from train.interruption import Interrupted
from train.settings import DivergenceTable
from train.study import Design, Study

if TYPE_CHECKING:  # torch: who asks for a status does not wait for it
    from train.plan import PlannedPack
    from train.program import PackResult, Progress

STATUS_FILE = "status.json"
SCHEMA = 1
ALL = ""  # of packs
HEARTBEAT = 2.0  # seconds between two writings
STALE = 30.0  # seconds without one, after which nobody is at work any more; a busy disk may hold a writing up for some

log = logging.getLogger(__name__)


def utc_now() -> datetime.datetime:
    """The time that status files are written in."""
    return datetime.datetime.now(datetime.UTC)


class StatusFile:
    """Keeps `directory`/status.json; an observer, and a context that says in the file how it was left."""

    def __init__(
        self,
        directory: Path,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime.datetime] = utc_now,
        margin: float = DivergenceTable().progress_margin,
    ) -> None:
        from train.watch import Watch, live_rule

        self.path = directory / STATUS_FILE
        self._aside = directory / f".{STATUS_FILE}.{os.getpid()}"
        self._watch = Watch(clock, margin=margin)
        self._live_rule = live_rule(margin)
        self._now = now
        self._started = now()
        self._state = "running"
        self._error: str | None = None
        self._failed = False
        self._writing, self._stop = threading.Lock(), threading.Event()
        self._heart = threading.Thread(target=self._beat, name="exmy-status", daemon=True)

    def __enter__(self) -> StatusFile:
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._heart.join()
        self.leave(value)

    def leave(self, error: BaseException | None) -> None:
        """Write down that the work is over: finished, interrupted by Ctrl-C or a signal, or failed with an error."""
        if isinstance(error, KeyboardInterrupt):
            self._state = "interrupted"
            if isinstance(error, Interrupted) and error.number != signal.SIGINT:
                self._error = error.name
        elif error is not None:
            self._state, self._error = "failed", " ".join(str(error).split()) or type(error).__name__
        else:
            self._state = "finished"
        self.write()

    def planned(self, packs: list[PlannedPack], finished: int, device: str) -> None:
        """The first status: nothing has begun."""
        self._watch.planned(packs, finished, device)
        self.write()

    def pack_started(self, pack: PlannedPack) -> None:
        """Told at the next heartbeat."""
        self._watch.pack_started(pack)

    def pack_progress(self, pack: PlannedPack, progress: Progress) -> None:
        """Told at the next heartbeat."""
        self._watch.pack_progress(pack, progress)

    def pack_finished(self, pack: PlannedPack, result: PackResult) -> None:
        """Told at the next heartbeat."""
        self._watch.pack_finished(pack, result)

    def write(self) -> None:
        """The status of this moment, whole or not at all; a failure is logged once."""
        with self._writing:
            try:
                self._aside.write_text(json.dumps(self._content(), indent=1), encoding="utf-8")
                self._aside.replace(self.path)
            except OSError as error:
                with contextlib.suppress(OSError):
                    self._aside.unlink(missing_ok=True)
                if not self._failed:
                    log.warning("%s can't be written (%s); the training goes on without it", self.path, error.strerror)
                self._failed = True

    def _content(self) -> dict[str, Any]:
        state = self._watch.snapshot()
        packs = [dataclasses.asdict(view) for view in state.packs if view.state != "finished"]
        return {
            "schema": SCHEMA, "state": self._state, "error": self._error, "started": _iso(self._started),
            "heartbeat": _iso(self._now()), "live_rule": self._live_rule,
            **dataclasses.asdict(state), "packs": packs,
        }  # fmt: skip

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            self.write()


def study_status(
    directory: Path | str, now: Callable[[], datetime.datetime] = utc_now, latest: int | None = None
) -> dict[str, Any]:
    """What a study directory holds and what is under way in it, in the form above; ready for json.dumps.

    latest: how many packs are told of, those that were written last; all by default.

    StudyError where the directory holds no study, or a pack that can't be read.
    """
    directory = Path(directory)
    study = study_of(directory)
    design = study.design()
    planned = len(design)
    under_way = read_status(directory)  # before the packs: what finishes in between is then counted twice, not never
    packs = finished_rows(directory, study)
    digest = is_digest(directory)
    finished, diverged = _counts_of_digest(directory) if digest else _counts(study, design, packs.values())
    state, message = (_state_of_digest if digest else _state)(planned, finished, under_way, now())
    told = heapq.nlargest(latest, packs.values(), modified)[::-1] if latest else sorted(packs.values(), key=modified)
    if under_way:
        under_way["packs"] = [pack for pack in under_way["packs"] if pack["hash"] not in packs]
    return {
        "schema": SCHEMA,
        "name": study.name,
        "study_hash": study.hash,
        "directory": str(directory),
        "state": state,
        "message": message,
        "runs": {
            "planned": planned,
            "finished": finished,
            "diverged": diverged[ALL],
            "definition": study.divergence.definition,
        },
        "packs_finished": len(packs),
        "digest": digest,
        "snapshots": _snapshots(directory),
        "landscape": _landscape(directory),
        "alarms": _alarms(directory, study) if finished else [],
        "packs": [_pack_row(row, diverged[row["pack"]]) for row in told],
        "under_way": None if state in ("finished", "not_started", "incomplete") else under_way,
    }


def _alarms(directory: Path, study: Study) -> list[dict[str, Any]]:
    """Of each alarm of the study for which finished runs it rang; of a study without alarms nothing is read."""
    if not study.alarms.thresholds:
        return []
    from train.rings import told
    from train.store import open_study

    return told(open_study(directory))


def _snapshots(directory: Path) -> dict[str, int]:
    """By the names of files alone."""
    found = [path.parent.name for path in (directory / SNAPSHOTS).glob("*/*.safetensors")]
    return {"runs": len(set(found)), "files": len(found)}


def _landscape(directory: Path) -> list[dict[str, Any]]:
    found = collections.Counter((point.quantisers, point.measure) for point in points_in(directory))
    return [{"quantisers": q, "measure": measure, "points": n} for (q, measure), n in sorted(found.items())]


def _counts(study: Study, design: Design, packs: Collection[Row]) -> tuple[int, dict[str, int]]:
    """How many of the study's runs are finished, and how many of each pack's, and of `ALL`, diverged by its definition."""
    definition = study.divergence.definition
    planned = {row["design"] for row in packs} <= {design.hash}  # all of them, without a look at each
    if definition != "gap" and planned and all_differ([row["runs"] for row in packs]):
        counts = {row["pack"]: row[definition].count("1") for row in packs}
        return sum(len(row[definition]) for row in packs), counts | {ALL: sum(counts.values())}
    diverged = _diverged(study, packs)
    counts = {row["pack"]: sum(diverged.get(run, False) for run in runs_of(row)) for row in packs}
    return len(diverged), counts | {ALL: sum(diverged.values())}


def _diverged(study: Study, packs: Collection[Row]) -> dict[str, bool]:
    """Whether each finished run of the study diverged; of a run that two packs have, the first's."""
    if study.divergence.definition == "gap":
        from train.gaps import gaps

        return gaps(study, packs)
    planned = set(study.identities())
    diverged: dict[str, bool] = {}
    for row in packs:
        for run, bit in zip(runs_of(row), row[study.divergence.definition], strict=True):
            if run in planned:
                diverged.setdefault(run, bit == "1")
    return diverged


def _pack_row(row: Row, diverged: int) -> dict[str, Any]:
    written = datetime.datetime.fromtimestamp(modified(row) / 1e9, datetime.UTC)
    return {
        "hash": row["pack"],
        "runs": row["runs"].count(" ") + 1,
        "pack_size": row["size"],
        "diverged": diverged,
        "device": row["device"],
        "written": _iso(written),
        "seconds": row["seconds"],
        "seconds_first_step": row["first_step"],
        "ended_early_at": row["ended"] or None,
    }


def _state(planned: int, finished: int, under_way: dict[str, Any] | None, now: datetime.datetime) -> tuple[str, str]:
    """The state in a word and in a sentence."""
    if finished == planned:
        return "finished", f"all {planned} runs are finished"
    rest = f"{planned - finished} of {planned} runs are still to be trained"
    if under_way is None:
        return ("incomplete", rest) if finished else ("not_started", f"none of {planned} runs has begun")
    if under_way["state"] == "running":
        beat = datetime.datetime.fromisoformat(under_way["heartbeat"])
        if abs((now - beat).total_seconds()) <= STALE:  # one that lies far ahead is of before the clock was set
            return "running", rest
        return "stale", f"no sign of life since {_iso(beat)}: the process was killed or its host is gone; {rest}"
    if under_way["state"] == "interrupted":
        return "interrupted", f"stopped by {under_way['error'] or 'hand'} at {under_way['heartbeat']}; {rest}"
    if under_way["state"] == "failed":
        return "failed", f"failed at {under_way['heartbeat']}: {under_way['error']}; {rest}"
    return "incomplete", rest


def _counts_of_digest(directory: Path) -> tuple[int, dict[str, int]]:
    """As `_counts`, by the study's definition of when the digest was made."""
    from train.digest import read_digest  # xarray, for which nobody waits who has packs

    diverged = read_digest(directory)["summary"].to_dataset()["diverged"].values
    return diverged.size, {ALL: int(diverged.sum())}


def _state_of_digest(planned: int, finished: int, *_: object) -> tuple[str, str]:
    """As `_state`: nobody is at work there."""
    if finished == planned:
        return "finished", f"a digest of all {planned} runs"
    return "incomplete", f"a digest of {finished} of {planned} runs, made before the others were trained"


def read_status(directory: Path) -> dict[str, Any] | None:
    """The last status.json of a study directory; None where there is none that can be read."""
    try:
        content = json.loads((directory / STATUS_FILE).read_text(encoding="utf-8"))
        datetime.datetime.fromisoformat(content["heartbeat"]).astimezone()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return content if content.get("schema") == SCHEMA else None


def _iso(moment: datetime.datetime) -> str:
    return moment.isoformat(timespec="seconds")
