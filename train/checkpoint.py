"""A pack under way on the disk, so that a study that was killed goes on in the middle of it, with the same bits.

    checkpoints/<hash>/checkpoint.json      whose state it is, after how many steps, and the SHA-256 of the tensors and of itself
    checkpoints/<hash>/<step>.safetensors   `Pack.state`

The tensors are on the disk before the JSON names them, and the ones before go after that: killed at any instant, the folder
holds one whole checkpoint, or none yet. Reading one runs no code. One that is damaged or of another program, text, version or
device, whose numbers would be a mixture, is kept aside with a line in the log, and the pack starts over.

Writing costs time: it comes every `checkpoint_seconds`, by default every minute, or as many more seconds as keep its cost below
two percent. Where it can't be done, training goes on, and the checkpoint before stays; one that would leave less room than it
takes is not written, since the results, which are smaller, need some.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import safetensors.torch
from torch import Tensor

from train.durable import atomically, set_aside
from train.interruption import Interrupted, Interruption

CHECKPOINTS, DESCRIPTION, TENSORS = "checkpoints", "checkpoint.json", ".safetensors"
SCHEMA = 1
LEAST_SECONDS = 60.0
PATIENCE = 60  # times what writing takes, at least, between two checkpoints

log = logging.getLogger(__name__)


class Times(NamedTuple):
    """How long a pack has trained, in all and until its first step was made, seconds."""

    total: float = 0.0
    first_step: float = 0.0


class CheckpointError(ValueError):
    """A checkpoint that can't be gone on from; `word` names it when it is set aside."""

    def __init__(self, word: str, why: str) -> None:
        super().__init__(why)
        self.word = word


def write(folder: Path, of: Mapping[str, Any], step: int, times: Times, state: Mapping[str, Tensor]) -> int:
    """The state as the folder's one checkpoint, whole or not at all; its size in bytes. OSError where it can't be written.

    of: what it belongs to, JSON's strings, numbers and lists.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder).free < 2 * sum(t.nbytes for t in state.values()):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    content = safetensors.torch.save({name: t.cpu().contiguous() for name, t in state.items()})
    tensors = folder / f"{step}{TENSORS}"
    described = {
        "of": {"schema": SCHEMA, **of}, "step": step, "seconds": times.total, "seconds_first_step": times.first_step,
        "tensors": tensors.name, "sha256": hashlib.sha256(content).hexdigest(),
    }  # fmt: skip
    with atomically(tensors) as aside:
        aside.write_bytes(content)
    with atomically(folder / DESCRIPTION) as aside:
        aside.write_text(json.dumps({**described, "seal": _seal(described)}, indent=1), encoding="utf-8")
    for old in folder.iterdir():
        if old.name not in (tensors.name, DESCRIPTION):
            with contextlib.suppress(OSError):
                old.unlink()
    return len(content)


def read(folder: Path, of: Mapping[str, Any]) -> tuple[int, Times, dict[str, Tensor]] | None:
    """The step, times and state of the folder's checkpoint, None where there is none; CheckpointError where it won't do."""
    described = _described(folder)
    if described is None:
        return None
    for key, wanted in {"schema": SCHEMA, **of}.items():
        found = described["of"].get(key)
        if found != wanted:
            values = f" ({found}, now {wanted})" if isinstance(wanted, str | int) else ""
            raise CheckpointError("other", f"of another {key.replace('_', ' ')}{values}")
    if described["tensors"] != f"{described['step']}{TENSORS}":  # no path that a stranger wrote
        raise CheckpointError("damaged", f"whose {DESCRIPTION} names another file than its own")
    try:
        content = (folder / described["tensors"]).read_bytes()
    except OSError as error:
        raise CheckpointError("damaged", f"whose {described['tensors']} can't be read ({error.strerror})") from None
    if hashlib.sha256(content).hexdigest() != described["sha256"]:
        raise CheckpointError("damaged", f"whose {described['tensors']} is damaged (its SHA-256 does not match)")
    state = safetensors.torch.load(content)
    return described["step"], Times(described["seconds"], described["seconds_first_step"]), state


def _described(folder: Path) -> dict[str, Any] | None:
    """What `write` said of the tensors; None where there is nothing, CheckpointError where it is damaged."""
    try:
        described: dict[str, Any] = json.loads((folder / DESCRIPTION).read_bytes())
        seal = described.pop("seal")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError("damaged", f"whose {DESCRIPTION} is damaged") from None
    if seal != _seal(described):
        raise CheckpointError("damaged", f"whose {DESCRIPTION} is damaged (its SHA-256 does not match)")
    return described


class Checkpoint(NamedTuple):
    """What a folder's checkpoint says of itself: runs and R of the pack, its text, the steps made, and its tensors' SHA-256."""

    folder: Path
    runs: list[str]
    pack_size: int
    text: str
    step: int
    sha256: str

    @property
    def of(self) -> dict[str, Any]:
        """What `read` has to find of it again."""
        return {"runs": self.runs, "pack_size": self.pack_size, "text": self.text}


def checkpoints_in(directory: Path) -> Iterator[Checkpoint]:
    """The checkpoints of a study directory, those that are damaged or set aside left out; their tensors are not looked at."""
    for folder in sorted((directory / CHECKPOINTS).glob("*")):
        with contextlib.suppress(CheckpointError, KeyError):
            described = None if folder.suffix else _described(folder)
            if described is not None:
                of = described["of"]
                yield Checkpoint(
                    folder, of["runs"], of["pack_size"], of["text"], described["step"], described["sha256"]
                )


def packs_under_way(directory: Path) -> set[str]:
    """The packs, by their hash, that a sweep will go on with."""
    return {folder.name for folder in (directory / CHECKPOINTS).glob("*")}


def remove_finished(directory: Path, finished: Collection[str]) -> None:
    """Remove the checkpoints of a study directory whose runs are all finished: of packs after whose end there was no time to."""
    for folder in (directory / CHECKPOINTS).glob("*"):
        with contextlib.suppress(CheckpointError):
            described = _described(folder)
            if described is not None and set(described["of"]["runs"]) <= set(finished):
                shutil.rmtree(folder, ignore_errors=True)


def report_unplanned(directory: Path, planned: Collection[str]) -> None:
    """A line in the log for each checkpoint of a study directory that no pack of these hashes will go on from."""
    for folder in sorted((directory / CHECKPOINTS).glob("*")):
        if folder.name not in planned and not folder.suffix:
            log.warning("%s: a checkpoint of a pack of other runs, or of another pack_size: left where it is", folder)


def _seal(described: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


class Keeper(Protocol):
    """What `train_pack` asks of who keeps its pack: `Checkpointer`, or all ranks' together."""

    def restore(self, load: Callable[[Mapping[str, Tensor]], None]) -> Times:
        """Give what was kept to `load`, if there is any; how long it had trained."""

    def after_step(self, step: int, state: Callable[[], Mapping[str, Tensor]], times: Callable[[], Times]) -> None:
        """Keep the state where it is time; `Interrupted` where it is time to stop."""


class Checkpointer:
    """Keeps one pack's checkpoint in a folder while it trains, and listens for signals.

    of: what the pack is, for `read`. seconds: between two checkpoints, "auto" for what the module's docstring says, 0 for none.
    """

    def __init__(
        self, folder: Path, of: Mapping[str, Any], seconds: float | Literal["auto"] = "auto",
        interruption: Interruption | None = None, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.folder, self._of, self._seconds, self._interruption, self._clock = folder, of, seconds, interruption, clock
        self._kept, self._warned = 0, False
        self._wait, self._last = LEAST_SECONDS if seconds == "auto" else seconds, clock()

    def restore(self, load: Callable[[Mapping[str, Tensor]], None]) -> Times:
        """Give the checkpoint's state, if there is one, to `load`, which raises ValueError for a state of another program."""
        try:
            found = read(self.folder, self._of)
            if found is None:
                return Times()
            step, times, state = found
            try:
                load(state)
            except ValueError as error:
                raise CheckpointError("other", str(error)) from None
        except CheckpointError as error:
            aside = set_aside(self.folder, error.word)
            log.warning("%s: a checkpoint %s: kept as %s, and its pack starts over", self.folder, error, aside.name)
            return Times()
        log.info("%s: going on after step %d", self.folder, step)
        self._kept, self._last = step, self._clock()
        return times

    def after_step(self, step: int, state: Callable[[], Mapping[str, Tensor]], times: Callable[[], Times]) -> None:
        """Write a checkpoint where one is due or a signal has come; then `Interrupted`."""
        number = self.signal
        if self.due(step, number is not None):
            self.keep(step, state(), times())
        if number is not None:
            raise Interrupted(number, self.kept)

    @property
    def signal(self) -> int | None:
        """The signal that has come, if any."""
        return self._interruption.number if self._interruption else None

    @property
    def kept(self) -> int:
        """Up to which step the pack is on the disk."""
        return self._kept

    def due(self, step: int, last: bool = False) -> bool:
        """Whether a checkpoint should be written after so many steps; `last` where there may be no other time."""
        return bool(self._seconds) and (last or self._clock() - self._last >= self._wait) and step > self._kept

    def keep(self, step: int, state: Mapping[str, Tensor], times: Times) -> None:
        """Write one, or say in the log why not."""
        state["counter"].cpu()  # what a GPU still has to do is no cost of writing
        began = self._clock()
        try:
            write(self.folder, self._of, step, times, state)
            self._kept = step
        except OSError as error:
            if not self._warned:
                log.warning(
                    "%s: a checkpoint can't be written (%s); the training goes on, and %s", self.folder, error.strerror,
                    f"the one of step {self._kept} stays" if self._kept else "there is none yet",
                )  # fmt: skip
            self._warned = True
        self._last = self._clock()
        if self._seconds == "auto":
            self._wait = max(LEAST_SECONDS, PATIENCE * (self._last - began))

    def remove(self) -> None:
        """Once the pack's results are on the disk."""
        shutil.rmtree(self.folder, ignore_errors=True)
