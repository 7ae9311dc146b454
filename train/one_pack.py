"""One planned pack, from its text to its file on the disk: what every executor does, in this process, another or elsewhere.

What packs of a sweep have in common is a `Setting`; what became of one is a `Report`. Both are plain data that can be sent, and
small. An error in a pack ends that pack alone: its traceback is kept in `failures/<hash>.txt` of the study's directory.
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
from train.documents import TextError
from train.interruption import Interrupted, Interruption
from train.pack import train_pack
from train.pack_sizes import is_out_of_memory, program_key
from train.plan import PlannedPack
from train.program import PackResult, Progress
from train.provenance import provenance
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


class Trainer:
    """Trains planned packs one after the other on one device of this process.

    texts: by `TokenStream.key`; those that it lacks are read from the cache. origin: what packs and checkpoints say in place of
    `provenance`.
    """

    def __init__(
        self,
        setting: Setting,
        device: torch.device,
        interruption: Interruption,
        texts: Mapping[str, Text] | None = None,
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        self.setting, self.device, self.interruption = setting, device, interruption
        self.texts = dict(texts or {})
        self.origin = provenance(setting.study, device) | dict(origin or {})

    def __call__(self, pack: PlannedPack, on_progress: Callable[[Progress], None]) -> Report:
        """Train a pack, from its checkpoint if there is one, and write its file; errors are in the report."""
        report = self.attempt(pack, on_progress)
        if report.end not in ("finished", "interrupted"):
            # Tensors that the error's frames held, recorded graphs and code with its constants go before the next pack comes.
            torch._dynamo.reset()
            gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return report

    def attempt(self, pack: PlannedPack, on_progress: Callable[[Progress], None]) -> Report:
        """Train a pack, whatever comes of it."""
        try:
            return Report("finished", self.train(pack, on_progress))
        except Interrupted as stop:
            return Report("interrupted", step=max(stop.steps, default=0))
        except StudyError as error:
            return Report("stopped", message=str(error))
        except Exception as error:
            if is_out_of_memory(error):
                shutil.rmtree(self._folder(pack), ignore_errors=True)  # no pack of this R will go on from it
                return Report("out of memory", message=one_line(error))
            return Report("failed", message=f"{one_line(error)}{self._keep_traceback(pack)}")

    def train(self, pack: PlannedPack, on_progress: Callable[[Progress], None]) -> PackResult:
        """Train a pack and write its file."""
        text = self._text(pack)
        checkpointer = Checkpointer(
            self._folder(pack), checkpoint_of(pack, text, self.origin),
            self.setting.study.execution.checkpoint_seconds, self.interruption,
        )  # fmt: skip
        result = self.result_of(pack, text, on_progress, checkpointer)
        save(self.setting.directory, pack, result, text, self.origin)
        checkpointer.remove()
        with contextlib.suppress(OSError):
            self._failure(pack).unlink(missing_ok=True)
        return result

    def result_of(
        self, pack: PlannedPack, text: Text, on_progress: Callable[[Progress], None], checkpointer: Checkpointer
    ) -> PackResult:
        """The pack trained to its end, in this process."""
        setting = self.setting
        snapshots = keeper(setting.directory, setting.study, pack, text.sha256, self.origin)
        return train_pack(
            pack.program, pack.slots, text, self.device, None, on_progress, checkpointer, setting.study.execution.dead_after,
            on_measured=snapshots.after_step if snapshots else None,
        )  # fmt: skip

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
