"""One planned pack, from its text to its file on the disk: what every executor does, in this process, another or elsewhere.

What packs of a sweep have in common is a `Setting`; what became of one is a `Report`. Both are plain data that can be sent, and
small. An error in a pack ends that pack alone: its traceback is kept in `failures/<hash>.txt` of the study's directory.

On a GPU a pack's file is written while the next pack trains already (`overlap`); its checkpoint stays until it is written.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import shutil
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from train.checkpoint import CHECKPOINTS, Checkpointer
from train.compiling import warm_up
from train.documents import TextError
from train.interruption import Interrupted, Interruption
from train.overlap import OVERLAPS, Drawing, Writing
from train.pack import Pack, train_pack
from train.pack_sizes import is_out_of_memory, program_key
from train.plan import PlannedPack
from train.program import PackResult, Progress
from train.provenance import provenance
from train.rings import listener
from train.snapshots import keeper
from train.store import PACKS, pack_tree, write_pack
from train.study import Study, StudyError
from train.text import Text, load_text

FAILURES = "failures"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setting:
    """What the packs of a sweep have in common, wherever they are trained.

    directory: the study's, absolute. device: "cpu" or "cuda". texts: the SHA-256 of each text, by `TokenStream.key`. threads: of
    a CPU's products, on which its sums depend.
    """

    study: Study
    directory: Path
    device: str
    texts: Mapping[str, str]
    cache: Path | None = None
    threads: int = field(default_factory=torch.get_num_threads)


@dataclass(frozen=True)
class Report:
    """What became of a pack.

    interrupted     by a signal; `step` is up to which it is kept, 0 where nothing of it is
    out of memory   at this R
    failed          by an error in this pack, `message`
    stopped         by what would stop every other pack too, `message`
    """

    end: Literal["finished", "interrupted", "out of memory", "failed", "stopped"]
    result: PackResult | None = None
    message: str = ""
    step: int = 0


@dataclass(frozen=True)
class Trained:
    """A pack that was trained and whose file is still to be written."""

    pack: PlannedPack
    result: PackResult
    text: Text
    checkpointer: Checkpointer


Hear = Callable[[PlannedPack, Report], None]


class Trainer:
    """Trains planned packs one after the other on one device of this process.

    texts: by `TokenStream.key`; those that it lacks are read from the cache. origin: what packs and checkpoints say in place of
    `provenance`. overlaps: whether files are written, and weights drawn, beside the training; where not told, on a
    GPU.
    """

    def __init__(
        self,
        setting: Setting,
        device: torch.device,
        interruption: Interruption,
        texts: Mapping[str, Text] | None = None,
        origin: Mapping[str, Any] | None = None,
        overlaps: bool | None = None,
    ) -> None:
        warm_up(device.type)  # that no pack's first step is charged for it
        self.setting, self.device, self.interruption = setting, device, interruption
        self.texts = dict(texts or {})
        self.origin = provenance(setting.study, device) | dict(origin or {})
        self.overlaps = device.type in OVERLAPS if overlaps is None else overlaps
        self._drawing, self._writing = Drawing(), Writing[Report]()

    def __call__(self, pack: PlannedPack, on_progress: Callable[[Progress], None], hear: Hear) -> None:
        """Train a pack, from its checkpoint if there is one, and write its file; errors are in the report.

        hear: what became of a pack, called in this thread. Where they overlap, of one whose file is being written a later call
        tells, of this or of `finish`; where that file can't be written, the pack that is under way is `stopped` too.
        """

        def go_on(progress: Progress) -> None:
            self.listen(hear, stop=True)
            on_progress(progress)

        ended = self.attempt(pack, go_on)
        self.finish(hear)
        if isinstance(ended, Trained):
            self._writing.begin(pack, lambda: self._written(ended))
        else:
            hear(pack, ended)
        if isinstance(ended, Report) and ended.end not in ("finished", "interrupted"):
            # Tensors that the error's frames held, recorded graphs and code with its constants go before the next pack comes.
            torch._dynamo.reset()
            gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def expect(self, pack: PlannedPack | None) -> None:
        """Draw what the next pack will begin with, as far as one can know which it is."""
        if self.overlaps:
            self._drawing.begin(pack)

    @property
    def writing(self) -> bool:
        """Whether there is a pack that `hear` has not heard of."""
        return self._writing.pack is not None

    def listen(self, hear: Hear, *, wait: bool = False, stop: bool = False) -> None:
        """Tell of the pack whose file was being written, if it is; stop: StudyError where that stops the sweep."""
        ended = self._writing.ended(wait)
        if ended is not None:
            hear(*ended)
            if stop and ended[1].end == "stopped":
                raise StudyError(ended[1].message)

    def alone(self, pack: PlannedPack, on_progress: Callable[[Progress], None]) -> Report:
        """What became of a pack after which none comes, and before which none came."""
        heard: list[Report] = []
        self(pack, on_progress, lambda _, report: heard.append(report))
        self.finish(lambda _, report: heard.append(report))
        return heard[0]

    def finish(self, hear: Hear) -> None:
        """Wait for the file that is being written."""
        self.listen(hear, wait=True)

    def attempt(self, pack: PlannedPack, on_progress: Callable[[Progress], None]) -> Report | Trained:
        """Train a pack, whatever comes of it, and write its file; `Trained` where that is to be done beside the next one."""
        try:
            trained = self.train(pack, on_progress)
            return trained if self.overlaps else Report("finished", self.write(trained))
        except (Exception, Interrupted) as error:
            return self._report_of(pack, error)

    def _written(self, trained: Trained) -> Report:
        try:
            return Report("finished", self.write(trained))
        except Exception as error:
            return self._report_of(trained.pack, error)

    def _report_of(self, pack: PlannedPack, error: Exception | Interrupted) -> Report:
        """What became of a pack that ended by this error, which is being handled."""
        if isinstance(error, Interrupted):
            return Report("interrupted", step=max(error.steps, default=0))
        if isinstance(error, StudyError):
            return Report("stopped", message=str(error))
        if is_out_of_memory(error):
            shutil.rmtree(self._folder(pack), ignore_errors=True)  # no pack of this R will go on from it
            return Report("out of memory", message=one_line(error))
        return Report("failed", message=f"{one_line(error)}{self._keep_traceback(pack)}")

    def train(self, pack: PlannedPack, on_progress: Callable[[Progress], None]) -> Trained:
        """Train a pack to its end."""
        text = self._text(pack)
        checkpointer = Checkpointer(
            self._folder(pack), checkpoint_of(pack, text, self.origin),
            self.setting.study.execution.checkpoint_seconds, self.interruption,
        )  # fmt: skip
        return Trained(pack, self.result_of(pack, text, on_progress, checkpointer), text, checkpointer)

    def write(self, trained: Trained) -> PackResult:
        """Write a pack's file; what else is kept of it goes."""
        save(self.setting.directory, trained.pack, trained.result, trained.text, self.origin)
        trained.checkpointer.remove()
        with contextlib.suppress(OSError):
            self._failure(trained.pack).unlink(missing_ok=True)
        return trained.result

    def result_of(
        self, pack: PlannedPack, text: Text, on_progress: Callable[[Progress], None], checkpointer: Checkpointer
    ) -> PackResult:
        """The pack trained to its end, in this process."""
        setting = self.setting
        snapshots = keeper(setting.directory, setting.study, pack, text.sha256, self.origin)
        alarms = listener(setting.study, pack)
        shown = [of.after_step for of in (snapshots, alarms) if of]

        def show(under_way: Pack) -> None:
            for each in shown:
                each(under_way)

        result = train_pack(
            pack.program, pack.slots, text, self.device, None, alarms.telling(on_progress) if alarms else on_progress,
            checkpointer, setting.study.execution.dead_after, weights=self._drawing.take(pack),
            on_measured=show if shown else None,
        )  # fmt: skip
        if alarms:
            alarms.listen()  # what was measured after the last report
        return result

    def _text(self, pack: PlannedPack) -> Text:
        """The tokens that the sweep's own process read; StudyError where this one finds others."""
        stream = pack.runs[0].stream
        if stream.key not in self.texts:
            try:
                text = load_text(stream.dataset, self.setting.cache, stream.tokenizer, stream.corruption)
            except (TextError, ValueError) as error:
                raise StudyError(str(error)) from None
            if text.sha256 != (wanted := self.setting.texts[stream.key]):
                raise StudyError(
                    f"{stream.key}: a worker reads another text ({text.sha256[:12]}: {text.source}) than the sweep "
                    f"({wanted[:12]}); see to it that it stays the same while the sweep runs"
                )
            self.texts[stream.key] = text
        return self.texts[stream.key]

    def _folder(self, pack: PlannedPack) -> Path:
        return self.setting.directory / CHECKPOINTS / pack.hash

    def _failure(self, pack: PlannedPack) -> Path:
        return self.setting.directory / FAILURES / f"{pack.hash}.txt"

    def _keep_traceback(self, pack: PlannedPack) -> str:
        """Of the error that is being handled; where it is, for a message."""
        path = self._failure(pack)
        try:
            path.parent.mkdir(exist_ok=True)
            path.write_text(traceback.format_exc(), encoding="utf-8")
        except OSError:
            log.error("%s", traceback.format_exc())
            return ""
        return f" (its traceback is in {path})"


def one_line(error: BaseException) -> str:
    """An exception's class and the first line of what it says."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def checkpoint_of(pack: PlannedPack, text: Text, origin: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint has to agree in with the pack that goes on from it, by words for a log."""
    return {
        "program": program_key(pack.program),
        "runs": [run.identity for run in pack.runs],
        "pack_size": pack.size,
        "text": text.sha256,
        "version_of_exmy": origin["version_exmy"],
        "version_of_torch": origin["version_torch"],
        "device": origin["device"],
    }


def save(directory: Path, pack: PlannedPack, result: PackResult, text: Text, origin: Mapping[str, Any]) -> None:
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
