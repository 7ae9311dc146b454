"""A study whose runs each train on all ranks of a torchrun: rank 0 has the directory, the others train along.

Rank 0 is `run_study` with another way to train a pack: it tells the others which run comes next, then every rank trains it in
step. They stop at the same step: a signal that any of them hears, and a checkpoint that is due, is agreed on after each step.
Rank 0 writes packs, checkpoints and status, and reads checkpoints for all. A study that is refused is refused by rank 0 alone, in
its one line; the others end quietly.

Results say so in their device, "2 x NVIDIA H100 (ddp)", and so do checkpoints: one that another number of ranks wrote would not
give the same bits, and is kept aside.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from train.checkpoint import Checkpointer, Times
from train.compiling import compiles_steps
from train.execute import Outcome, run_study
from train.interruption import Interrupted, Interruption
from train.local import train_here
from train.observer import Observer
from train.one_pack import Report, Setting, Trainer
from train.pack import Pack, train_pack
from train.plan import PlannedPack, plan, program_of
from train.program import PackResult, Program, Progress
from train.provenance import device_name
from train.ranks import Ranks, Spread, joined
from train.rings import listener
from train.schedule import Schedule
from train.sharded_pack import ShardedPack
from train.site import Here
from train.streams import load_texts
from train.study import Study, StudyError
from train.text import Text
from train.wide_memory import memory
from train.wide_pack import WidePack
from train.wide_recipes import Way, refusal

PACKS: dict[Way, type[WidePack]] = {"ddp": WidePack, "fsdp": ShardedPack}
REFUSED = 2  # exit status


def run_wide(
    study: Study, out: Path | str, way: Way = "ddp", device: str = "auto", observer: Observer | None = None,
    cache: Path | None = None, *, check: bool = False, hooks: Sequence[Observer] = (),
) -> Outcome | None:  # fmt: skip
    """`run_study` on every rank of a torchrun, each run on all of them; None on all ranks but 0.

    way: "ddp", all weights on every rank, or "fsdp", each block's weights in parts (see `sharded_pack`). StudyError on rank 0
    where a run can't be shared so (`wide_recipes`), or as `run_study`; the others then leave by SystemExit.
    """
    with joined(device) as ranks:
        if not ranks.leads:
            logging.getLogger().setLevel(logging.ERROR)
            _follow(study, ranks, way, cache)
            return None
        shared = Shared(Path(out), ranks, way)
        status = REFUSED
        try:
            site = contextlib.nullcontext(shared)
            outcome = run_study(study, out, observer=observer, cache=cache, check=check, hooks=hooks, site=site)
            status = 0
        finally:
            if shared.heard:
                ranks.tell({"end": status})
        return outcome


class Shared(Here):
    """A site of rank 0: it plans, names each run to the other ranks, and trains it with them.

    heard: whether the others wait for its next word, and not for its next step.
    """

    def __init__(self, directory: Path, ranks: Ranks, way: Way) -> None:
        super().__init__(directory, ranks.device, 1)
        self.ranks, self.way, self.heard = ranks, way, True

    def plan(self, study: Study, finished: Mapping[str, str]) -> tuple[list[PlannedPack], str]:
        """Packs of one run each, that fit and that all ranks can share."""
        ranks, way, asked = self.ranks.count, self.way, study.execution.pack_size
        if study.strategy.kind != "grid":
            raise StudyError(
                f"strategy {study.strategy.kind!r} fills packs with rounds of runs, and {ranks} ranks share packs of one: leave "
                "torchrun or --strategy out"
            )
        if asked not in ("auto", 1):
            raise StudyError(
                f"execution.pack_size {asked}: {ranks} ranks share packs of one run; take 1, or leave torchrun out to train "
                f"{asked} runs side by side"
            )
        if study.probe.snapshots:
            raise StudyError(
                f"probe.snapshots {study.probe.snapshots[0]!r}: {ranks} ranks keep no snapshots; leave it or torchrun out"
            )
        for name, program in {run.recipe.name: program_of(run) for run in study.runs()}.items():
            if why := refusal(program, ranks, way):
                raise StudyError(f"recipe {name!r}: {why}")

        def bytes_of(program: Program) -> int:
            return memory(program, ranks, way, compiles_steps(self.device)).total

        alone = study.model_copy(update={"execution": study.execution.model_copy(update={"pack_size": 1})})
        return plan(alone, self.ranks.device, finished, bytes_of=bytes_of), self._name

    def train(
        self, schedule: Schedule, setting: Setting, texts: Mapping[str, Text], lock: int, observer: Observer,  # noqa: ARG002
        interruption: Interruption,
    ) -> None:  # fmt: skip
        """One run after the other, each on all ranks."""
        train_here(schedule, Leader(self, setting, interruption, texts, {"device": self._name}), observer, interruption)

    @property
    def _name(self) -> str:
        return f"{self.ranks.count} x {device_name(self.ranks.device)} ({self.way})"


class Leader(Trainer):
    """Trains on all ranks. An error, or a signal that any of them heard, ends the study: the others are within a step."""

    def __init__(
        self, shared: Shared, setting: Setting, interruption: Interruption, texts: Mapping[str, Text],
        origin: Mapping[str, Any],
    ) -> None:  # fmt: skip
        super().__init__(setting, shared.ranks.device, interruption, texts, origin, overlaps=False)
        self._shared = shared

    def attempt(self, pack: PlannedPack, on_progress: Callable[[Progress], None]) -> Report:
        """Train a pack and write its file."""
        return Report("finished", self.write(self.train(pack, on_progress)))

    def result_of(
        self, pack: PlannedPack, text: Text, on_progress: Callable[[Progress], None], checkpointer: Checkpointer
    ) -> PackResult:
        """The pack trained on all ranks; to its last step, since each would have to know of all that no run can come back."""
        shared, ranks = self._shared, self._shared.ranks
        ranks.tell({"run": pack.runs[0].identity, "text": text.sha256})
        shared.heard = False
        if ranks.agree([0])[0]:
            raise StudyError(f"{text.name}: another rank read other tokens than rank 0; give all hosts the same text")
        alarms = listener(self.setting.study, pack)  # to what is alike on all ranks: it asks none of them
        result = _train(
            ranks, shared.way, pack, text, SharedCheckpointer(ranks, checkpointer),
            alarms.telling(on_progress) if alarms else on_progress, alarms.after_step if alarms else None,
        )  # fmt: skip
        shared.heard = True
        if alarms:
            alarms.listen()  # what was measured after the last report
        return result


def _follow(study: Study, ranks: Ranks, way: Way, cache: Path | None) -> None:
    """Train every run that rank 0 names, until it names none."""
    runs = {run.identity: run for run in study.runs()}
    texts: dict[str, Text] = {}
    with Interruption() as interruption:
        while "run" in (word := ranks.tell()):
            texts = texts or load_texts(study, cache)
            pack = PlannedPack(program_of(runs[word["run"]]), (runs[word["run"]],), 1)
            text = texts[pack.program.dataset]
            if ranks.agree([text.sha256 != word["text"]])[0]:
                raise SystemExit(REFUSED)
            _train(ranks, way, pack, text, SharedCheckpointer(ranks, None, interruption))
    if word["end"]:
        raise SystemExit(word["end"])


def _train(
    ranks: Ranks, way: Way, pack: PlannedPack, text: Text, checkpointer: SharedCheckpointer,
    on_progress: Callable[[Progress], None] | None = None, on_measured: Callable[[Pack], None] | None = None,
) -> PackResult:  # fmt: skip
    made: list[WidePack] = []

    def make(*arguments: object) -> WidePack:
        made.append(PACKS[way](ranks, *arguments))  # type: ignore[arg-type]
        return made[0]

    result = train_pack(
        pack.program, pack.slots, text, ranks.device, on_progress=on_progress, checkpointer=checkpointer, make=make,
        on_measured=on_measured,
    )  # fmt: skip
    made[0].check_alike()
    return result


class SharedCheckpointer:
    """A pack's checkpoint as all ranks see it: rank 0's `own` keeps it in its folder, and all agree on when."""

    def __init__(self, ranks: Ranks, own: Checkpointer | None, interruption: Interruption | None = None) -> None:
        self._ranks, self._own, self._interruption = ranks, own, interruption

    def restore(self, load: Callable[[Mapping[str, Tensor]], None]) -> Times:
        """`Checkpointer.restore` on rank 0, what it reads going to all ranks' `load`."""
        if self._own is None:
            if self._ranks.tell():
                try:
                    load(Spread(self._ranks, None))
                except ValueError:  # as on rank 0, which says so
                    return Times()
            return Times()
        found = []

        def load_everywhere(state: Mapping[str, Tensor]) -> None:
            found.append(self._ranks.tell(True))
            load(Spread(self._ranks, state))

        times = self._own.restore(load_everywhere)
        if not found:
            self._ranks.tell(False)
        return times

    def after_step(self, step: int, state: Callable[[], Mapping[str, Tensor]], times: Callable[[], Times]) -> None:
        """`Checkpointer.after_step` on all ranks at once."""
        own = self._own
        heard = own.signal if own else self._interruption.number if self._interruption else None
        number, due = self._ranks.agree([heard or 0, own is not None and own.due(step)])
        if number and not due:
            (due,) = self._ranks.agree([own is not None and own.due(step, last=True)])
        if due:
            whole = state()
            if own:
                own.keep(step, whole, times())
        if number:
            raise Interrupted(number, own.kept if own else 0)
