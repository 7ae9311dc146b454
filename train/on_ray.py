"""`--executor ray`: packs as Ray tasks, on a cluster that is started here or that is there already.

Every pack is a task that asks for one GPU, or for as many CPUs as its products have threads, and tells no more than its times:
results go into the study's directory, which all machines share, or to its URL (see `remote`). The plan is made by a task too, on
a device of the kind that will train. A task whose worker is lost is run again by Ray, from its checkpoint where the directory is
shared. At most `IN_FLIGHT` tasks are Ray's at a time: the others wait here, where they cost nothing.

Workers say what they do to a `Board`, an actor that keeps the latest of each pack, and hear from it that a signal came.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from train.board import Board, Line
from train.checkpoint import packs_under_way
from train.interruption import Interruption
from train.local import count_workers
from train.observer import Observer
from train.one_pack import FAILURES, Report, Setting, Trainer, one_line
from train.pack_sizes import Lowered, Splits, read_lowered, read_splits
from train.plan import PlannedPack, counted, pick_device, plan
from train.program import Progress
from train.provenance import device_name
from train.remote import Remote, is_url
from train.schedule import RETRIES, Schedule, named
from train.store import PACKS, STUDY_FILE, study_text
from train.study import Study, StudyError
from train.text import Text
from train.watch import memory_in_use

IN_FLIGHT = 10_000
TICK = 1.0  # seconds between two looks at the board, from either side
FETCHES, PAUSE = 3, 2.0  # how often a finished pack is fetched from the URL, and seconds between

log = logging.getLogger(__name__)


class Voice(logging.Handler):
    """A worker's link to the board: a thread that says the latest every `TICK` seconds, and sets the interruption."""

    def __init__(self, board: Any, pack: str, interruption: Interruption) -> None:
        super().__init__(logging.INFO)
        self._board, self._pack, self._interruption = board, pack, interruption
        self._progress: Progress | None = None
        self._lines: list[Line] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._speak, daemon=True)

    def __enter__(self) -> Voice:
        self._say()
        self._thread.start()
        logging.getLogger("train").addHandler(self)
        logging.getLogger("train").setLevel(logging.INFO)
        return self

    def __exit__(self, *left: object) -> None:
        logging.getLogger("train").removeHandler(self)
        self._over.set()
        self._thread.join()
        self._say()

    def emit(self, record: logging.LogRecord) -> None:
        """A line of the log, for the sweep's process to say."""
        self._lines.append((record.name, record.levelno, record.getMessage()))

    def progress(self, progress: Progress) -> None:
        """To be said soon, if nothing newer comes before."""
        self._progress = replace(progress, memory=memory_in_use())

    def _speak(self) -> None:
        while not self._over.wait(TICK):
            self._say()

    def _say(self) -> None:
        progress, self._progress = self._progress, None
        lines, self._lines = self._lines, []
        try:
            said = None if progress is None else pickle.dumps(progress)
            number = ray.get(self._board.say.remote(self._pack, said, lines), timeout=60)
        except ray.exceptions.RayError:  # the board is being moved: training goes on without it
            return
        if number is not None and self._interruption.number is None:
            self._interruption.number = number


def plan_there(
    study: Study, device: str, finished: set[str], lowered: dict[str, dict[str, Lowered]], workers: int,
    splits: dict[str, Splits], under_way: set[str],
) -> tuple[list[PlannedPack], str]:  # fmt: skip
    """A task: the plan, by the memory of the device that it gets, and that device's name."""
    where = pick_device(device)
    name = device_name(where)
    return plan(study, where, finished, lowered.get(name), None, workers, splits.get(name), under_way), name


def train_there(pack: PlannedPack, setting: Setting, text: Text, url: str | None, board: Any) -> Report:
    """A task: train the pack, write its file where all can have it, and tell what became of it."""
    if torch.get_num_threads() != setting.threads:
        torch.set_num_threads(setting.threads)
    interruption = Interruption()
    with contextlib.ExitStack() as stack:
        if url is None:
            _check_shared(setting)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="exmy-")))
            (folder / PACKS).mkdir()
            setting = replace(setting, directory=folder)
        voice = stack.enter_context(Voice(board, pack.hash, interruption))
        trainer = Trainer(setting, pick_device(setting.device), interruption, {pack.program.dataset: text})
        report = trainer.alone(pack, voice.progress)
        if url is not None:
            report = _put_up(Remote(url), setting.directory, pack, report)
    return replace(report, result=report.result.times_alone() if report.result else None)


def _put_up(remote: Remote, folder: Path, pack: PlannedPack, report: Report) -> Report:
    """What a pack left in a worker's folder, at the URL; where that fails, in the machine's temporary folder."""
    if report.end == "failed":
        with contextlib.suppress(StudyError, OSError):
            remote.send(folder, f"{FAILURES}/{pack.hash}.txt")
        return replace(report, message=report.message.replace(str(folder), remote.url))
    if report.end == "finished":
        try:
            remote.send_pack(folder, f"{pack.hash}.nc")
        except StudyError as error:
            rescue = Path(tempfile.gettempdir()) / "exmy-rescued"
            shutil.copytree(folder / PACKS, rescue / PACKS, dirs_exist_ok=True)
            where = f"this pack is in {rescue / PACKS} on {os.uname().nodename}: move it there, and run the sweep again"
            return Report("stopped", message=f"{error}; {where}")
    return report


def _check_shared(setting: Setting) -> None:
    """StudyError where a worker's machine does not have the study's directory."""
    try:
        same = (setting.directory / STUDY_FILE).read_text(encoding="utf-8") == study_text(setting.study)
    except OSError:
        same = False
    if not same:
        raise StudyError(
            f"{setting.directory}: not the study's on {os.uname().nodename}, one of Ray's machines: name with --out a directory "
            "that all of them share, or a URL such as s3://bucket/name"
        )


class OnRay:
    """A Ray cluster. remote: the study at its URL, None where its directory is shared."""

    def __init__(self, device: str, directory: Path, remote: Remote | None) -> None:
        self.device, self.directory, self._remote = device, directory, remote
        self._owed: list[tuple[PlannedPack, Report]] = []  # finished, and still to be fetched

    def fetch(self) -> None:
        """Make the directory a copy of the URL, if there is one."""
        if self._remote:
            self._remote.fetch(self.directory)

    def send(self, name: str) -> None:
        """Keep a file at the URL, if there is one."""
        if self._remote:
            self._remote.send(self.directory, name)

    def get_ready(self, runs: int, lock: int) -> None:
        """The cluster's matter."""

    def plan(self, study: Study, finished: Mapping[str, str]) -> tuple[list[PlannedPack], str]:
        """By the memory of one of the cluster's devices; waits for one."""
        ask = _task(plan_there, self.device)
        lowered, splits = read_lowered(self.directory), read_splits(self.directory)
        under_way = packs_under_way(self.directory)
        try:
            planned: tuple[list[PlannedPack], str] = ray.get(
                ask.remote(study, self.device, set(finished), lowered, _workers(self.device), splits, under_way)
            )
        except ray.exceptions.RayError as error:
            raise StudyError(_said(error)) from None
        return planned

    def train(
        self, schedule: Schedule, setting: Setting, texts: Mapping[str, Text], lock: int, observer: Observer,  # noqa: ARG002
        interruption: Interruption,
    ) -> None:  # fmt: skip
        """As tasks, `IN_FLIGHT` at a time."""
        board, task = _board(), _task(train_there, self.device)
        url = self._remote.url if self._remote else None
        common = ray.put(setting)
        of_texts = {key: ray.put(texts[key]) for key in {pack.program.dataset for pack in schedule.packs}}
        tasks: dict[Any, PlannedPack] = {}
        begun: set[str] = set()
        told = False
        try:
            while True:
                if interruption.number is not None and not told:
                    told = True
                    ray.get(board.end.remote(interruption.number))
                    for ref, waits in tasks.items():
                        if waits.hash not in begun:  # it would wait for a device, to hear that it is over
                            ray.cancel(ref)
                while not told and len(tasks) < IN_FLIGHT and (pack := schedule.take()) is not None:
                    tasks[task.remote(pack, common, of_texts[pack.program.dataset], url, board)] = pack
                if not tasks:
                    self._settle(schedule, begun, observer, told)
                    return
                done, _ = ray.wait(list(tasks), num_returns=len(tasks), timeout=TICK)
                _news(board, schedule, begun, observer)
                for ref in done:
                    self._hear(ref, tasks.pop(ref), schedule, begun, observer, told)
        finally:
            for ref in tasks:
                ray.cancel(ref, force=True)

    def _hear(
        self, ref: Any, pack: PlannedPack, schedule: Schedule, begun: set[str], observer: Observer, told: bool
    ) -> None:
        """What became of a task."""
        try:
            report: Report = ray.get(ref)
        except ray.exceptions.TaskCancelledError:
            report = Report("interrupted")
        except ray.exceptions.OutOfMemoryError:
            report = Report("out of memory", message="its machine's memory was full, and Ray ended it")
        except ray.exceptions.RayTaskError as error:
            end: Literal["stopped", "failed"] = "stopped" if isinstance(error.cause, StudyError) else "failed"
            report = Report(end, message=_said(error))
        except ray.exceptions.RayError as error:
            report = Report("failed", message=f"its worker was lost {RETRIES + 1} times ({_said(error)})")
        if report.end == "interrupted" and not told:
            schedule.lost(pack, "was stopped by a signal")
            return
        # Where one is owed already, the others don't wait for the network.
        if report.end == "finished" and (why := self._fetch(pack, 1 if self._owed else FETCHES)):
            log.warning("%s: finished, and not fetched (%s): tried again at the end", named(pack), why)
            self._owed.append((pack, report))
            return
        _tell(pack, report, schedule, begun, observer)

    def _fetch(self, pack: PlannedPack, times: int) -> str:
        """Bring a finished pack from the URL, if there is one; why it is not here after so many tries, else nothing."""
        if not self._remote:
            return ""
        for left in reversed(range(times)):
            try:
                self._remote.fetch_pack(self.directory, f"{pack.hash}.nc")
                return ""
            except Exception as error:  # each file system has errors of its own
                why = one_line(error)
            if left:
                time.sleep(PAUSE)
        return why

    def _settle(self, schedule: Schedule, begun: set[str], observer: Observer, told: bool) -> None:
        """Packs that are owed, once nothing else is to be done; what can't be fetched is no finished pack of this sweep."""
        lacking: list[PlannedPack] = []
        why = ""
        for pack, report in self._owed:
            if said := self._fetch(pack, 1 if lacking else FETCHES):
                lacking.append(pack)
                why = said
            else:
                _tell(pack, report, schedule, begun, observer)
        if lacking and self._remote:
            why = (
                f"{self._remote.url}: {counted(len(lacking), 'pack')} finished there and can't be fetched ({why}): run the sweep "
                "again, which fetches what is missing here"
            )
            log.error("%s", why)
        for pack in lacking:
            schedule.hear(pack, Report("interrupted") if told else Report("stopped", message=why))
        self._owed.clear()


def _tell(pack: PlannedPack, report: Report, schedule: Schedule, begun: set[str], observer: Observer) -> None:
    schedule.hear(pack, report)
    if report.result is not None:
        if pack.hash not in begun:  # it was over before it was looked at
            observer.pack_started(pack)
        observer.pack_finished(pack, report.result)


def _news(board: Any, schedule: Schedule, begun: set[str], observer: Observer) -> None:
    """What the workers said since the last time."""
    try:
        said, lines = ray.get(board.take.remote(), timeout=60)
    except ray.exceptions.RayError:  # it is being moved
        return
    for name, level, line in lines:
        logging.getLogger(name).log(level, "%s", line)
    for key, progress in said.items():
        pack = schedule.under_way.get(key)
        if pack is not None and key not in begun:
            begun.add(key)
            observer.pack_started(pack)
        if pack is not None and progress is not None:
            observer.pack_progress(pack, pickle.loads(progress))


def _task(function: Callable[..., Any], device: str) -> Any:
    remote: Any = ray.remote
    needs = {"num_gpus": 1} if device == "cuda" else {"num_cpus": torch.get_num_threads()}
    return remote(**needs, max_retries=RETRIES)(function)


def _workers(device: str) -> int:
    """Packs that the cluster, as it is, trains at once."""
    there = ray.cluster_resources()
    return max(1, int(there.get("GPU", 0) if device == "cuda" else there.get("CPU", 0) // torch.get_num_threads()))


def _board() -> Any:
    """On this process's machine, if there is room: it is lost only if the sweep is."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    remote: Any = ray.remote
    return remote(num_cpus=0, max_restarts=-1)(Board).options(scheduling_strategy=here).remote()


def _said(error: Any) -> str:
    """The line of an error of Ray's, or of what it stands for."""
    cause = getattr(error, "cause", None)
    return str(cause) if isinstance(cause, StudyError) else one_line(cause or error)


@contextlib.contextmanager
def ray_site(device: str, workers: int | None, address: str | None, out: Path | str) -> Iterator[OnRay]:
    """The cluster that this process is connected to, or the one at the address, or one that is started here and ended again."""
    ours = not ray.is_initialized()
    remote = Remote(str(out)) if is_url(out) else None
    try:
        if ours:
            _connect(device, workers, address or os.environ.get("RAY_ADDRESS"))
        yield OnRay(_kind(device), remote.copy if remote else Path(out), remote)
    finally:
        if ours:
            ray.shutdown()


def _connect(device: str, workers: int | None, address: str | None) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no reports to anybody
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        where = pick_device(device)
        count = count_workers(where, workers)
        enough: dict[str, Any] = (
            {"num_gpus": count} if where.type == "cuda" else {"num_cpus": count * torch.get_num_threads()}
        )
        ray.init(address="local", include_dashboard=False, **enough, **quiet)
        return
    if workers is not None:
        raise StudyError(
            f"workers is for a cluster that is started here, and the one at {address} has its own: leave it out"
        )
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise StudyError(
            f"no Ray cluster at {address} ({one_line(error)}); start one by `ray start --head`; if it asks for a token, set "
            "RAY_AUTH_MODE=token"
        ) from None


def _kind(device: str) -> str:
    """What trains, "cpu" or "cuda"; a cluster that has none of it yet may grow."""
    there = ray.cluster_resources()
    kind = device if device != "auto" else "cuda" if there.get("GPU", 0) >= 1 else "cpu"
    needs, name = (1, "GPU") if kind == "cuda" else (torch.get_num_threads(), "CPU")
    if there.get(name, 0) < needs:
        log.warning("the Ray cluster has no %d %ss for a pack: waiting until it has", needs, name)
    return kind
