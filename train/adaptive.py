"""Studies that choose their runs as they go: round by round, the next from what became of those before.

    study.toml       the study with all rounds so far, as [[more]] blocks with their `round`: written before a round is trained
    strategy.json    what is known after the last whole round: see `stable_rates` and `planned_looks` for what it holds

Nothing else is kept, and nothing else is needed: rounds that study.toml holds are taken as they are, what they lack is trained,
and the next one follows from the results. So a study that was killed at any point goes on to the rounds that it would have had.
"""

from __future__ import annotations

import json
import logging
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xarray as xr

from train.bisect import nearest
from train.cells import blocks_of, changed
from train.durable import atomically
from train.merge import differences
from train.named_recipes import BF16, named_table
from train.plan import pick_device
from train.planned_looks import first_look, next_look
from train.stable_rates import first_round, next_round
from train.store import STUDY_FILE, open_study, study_of
from train.strategy_record import SCHEMA, STRATEGY_FILE, read_strategy
from train.study import Study, StudyError
from train.study_file import read_study

if TYPE_CHECKING:
    from train.observer import Observer

Trainer = Callable[[Study], xr.Dataset]

log = logging.getLogger(__name__)


def run_strategy(
    study: Study | Path | str,
    out: Path | str,
    device: str = "auto",
    observer: Observer | None = None,
    cache: Path | None = None,
    trainer: Trainer | None = None,
    **how: Any,
) -> dict[str, Any]:
    """Train a study as its [strategy] says, to the end; the record, as strategy.json has it, empty for a grid.

    trainer: trains all runs of the study that it is given and tells their /summary; `run_study` and `open_study` where None,
    with the other arguments and `how`, which are run_study's. StudyError as `run_study`; and where the plan of a study in looks
    was changed after its first look.
    """
    study = study if isinstance(study, Study) else read_study(study)
    directory, where = Path(out), pick_device(device)
    train = trainer or _trainer(directory, device, observer, cache, how)
    now = round_under_way(study, directory, where)
    while True:
        summary = train(now)
        if now.strategy.kind == "grid":
            return {}
        blocks, record = next_round(now, summary, where) if now.strategy.kind == "bisect" else next_look(now, summary)
        record = {"schema": SCHEMA, "study": now.name} | record
        _write(directory, record)
        if not blocks:
            return record
        now = changed(now, more=[*blocks_of(now), *blocks])


def round_under_way(study: Study, directory: Path, device: torch.device) -> Study:
    """The study with the rounds that its directory holds already, or with the first alone; a grid as it is.

    StudyError as `run_strategy`.
    """
    kind = study.strategy.kind
    fresh = study
    if kind == "bisect":
        fresh = first_round(study, device)
    elif kind == "seeds":
        fresh = first_look(_base(study))
    _same_plan(read_strategy(directory), fresh, directory)
    if kind == "grid" or not (directory / STUDY_FILE).is_file():
        return fresh
    recorded = study_of(directory)
    if recorded.strategy.kind != kind or not _same_design(fresh, recorded):
        if recorded.strategy.kind == kind:
            log.info(
                "%s: the study has changed: its rounds are chosen anew, and finished runs count in them", directory
            )
        return fresh
    axes = recorded.model_dump(mode="json", exclude_none=True, exclude_unset=True)["axes"]
    return changed(fresh, axes=axes, more=blocks_of(recorded))


def _trainer(
    directory: Path, device: str, observer: Observer | None, cache: Path | None, how: dict[str, Any]
) -> Trainer:
    from train.execute import run_study

    def train(study: Study) -> xr.Dataset:
        run_study(study, directory, device, observer, cache, **how)
        if study.strategy.kind == "grid":  # nothing follows from it, and opening a large study takes its time
            return xr.Dataset()
        return open_study(directory)["summary"].to_dataset()

    return train


def _base(study: Study) -> Study:
    """The study without the rounds that a strategy added."""
    if all(block.round is None for block in study.more):
        return study
    return changed(study, more=[block for block in blocks_of(study) if "round" not in block])


def _content(study: Study) -> dict[str, Any]:
    """What a study's rounds follow from: all but its name, how it is executed, what is only recorded, and the rounds."""
    content = tomllib.loads(_base(study).to_toml())
    first = {"strategy": {"kind": study.strategy.kind, **study.strategy.as_table()}, "reference": study.reference}
    content["probe"].pop("snapshots", None)
    used = _recipes_of(study)
    content["recipes"] = {name: table for name, table in content.get("recipes", {}).items() if name in used}
    return first | {
        key: value
        for key, value in content.items()
        if key not in (*first, "name", "baseline", "execution", "signals", "alarms")
    }


def _recipes_of(study: Study) -> set[str]:
    """Every name that may be a recipe's on which a run rests: words of axes, of their tables, and of tables that these name."""
    extra = [value for axes in study.blocks for values in (axes.model_extra or {}).values() for value in values]
    waiting: list[Any] = [*study.recipes_named, *extra, BF16]  # the last of blocks that are kept, where none is named
    used: set[str] = set()
    while waiting:
        name = waiting.pop()
        if isinstance(name, str) and name not in used:
            used.add(name)
            table = study.recipes.get(name) or named_table(name)
            waiting += table.given().values() if table else ()
    return used


def _same_design(fresh: Study, recorded: Study) -> bool:
    """Whether recorded rounds are those of this study; a search may have begun with more rates than fit the packs of today."""
    ours, theirs = _content(fresh), _content(recorded)
    if fresh.strategy.kind == "bisect":
        rates, known = (
            {nearest(rate, fresh.strategy.per_octave) for rate in content["axes"].pop("learning_rate")}
            for content in (ours, theirs)
        )
        if not (rates <= known or known <= rates) or (min(rates), max(rates)) != (min(known), max(known)):
            return False
    return ours == theirs


def _same_plan(record: dict[str, Any] | None, fresh: Study, directory: Path) -> None:
    """StudyError, in a line, where a look was taken and the plan is another one now."""
    if record is None or record.get("kind") != "seeds":
        return
    try:
        planned = Study.model_validate(tomllib.loads(record["design"]))
    except (KeyError, TypeError, ValueError):
        raise StudyError(
            f"{directory / STRATEGY_FILE}: holds no plan of looks; name another directory with --out"
        ) from None
    key, was, now = next(differences(_content(planned), _content(fresh)), ("", None, None))
    if key:
        raise StudyError(
            f"{directory}: {key} was {was!r} when the first of {planned.strategy.looks} planned looks was taken, and is {now!r}: "
            "a plan that follows its results proves nothing; leave it as it was, or name another directory with --out"
        )


def _write(directory: Path, record: dict[str, Any]) -> None:
    try:
        with atomically(directory / STRATEGY_FILE) as aside:
            aside.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise StudyError(
            f"{directory / STRATEGY_FILE}: can't be written ({error.strerror}); make room and run the sweep again"
        ) from None
