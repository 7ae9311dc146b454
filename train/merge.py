"""Studies of one design from several machines, made one: packs are copied, nothing is trained.

One design is equal in everything but the name, the values on its axes and how it was executed: one machine may have seeds 0 to
7 and another 8 to 15, or each a part of the same study's runs. The merged study's axes have the values of all; where that
multiplies out to runs that nobody trained, a sweep into the merged directory trains them. Where a study is no full grid, the
others' axes and blocks are joined as blocks instead: the merged study has the runs of all and no others, and no strategy.
Snapshots, and what was measured of them, are copied too: [probe] snapshots then names the runs that any of the studies names.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.blocks import separate_seeds
from train.directory import INDEX, LANDSCAPE, PACKS, SNAPSHOTS, STUDY_FILE, is_digest, pack_files, study_of, study_text
from train.durable import atomically, seal
from train.finished import record
from train.pack_file import PackFile, facts_of
from train.study import Study, StudyError, in_words
from train.waiting import Waiting

SAME_TEXT = ("dataset", "tokenizer", "corruption")
NOT_THE_DESIGN = {"name", "axes", "more", "strategy", "execution"}


@dataclass(frozen=True)
class Merged:
    """What was merged: the study, how many of its runs are there, and packs that were left out, all of whose runs others have."""

    study: Study
    runs: int
    packs: int
    left_out: int


def merge_studies(directories: Sequence[Path], out: Path, name: str | None = None) -> Merged:
    """Copy the packs of several study directories into a new one, `out`, with the study of which all of them are parts.

    Each run is there once: a pack whose runs are all there already is left out. StudyError, and nothing written, where designs
    differ, or texts, a pack is damaged, one has only a digest, or `out` has something in it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StudyError(f"{out}: there already; merge into a directory that is new or empty")
    studies = [study_of(directory) for directory in directories]
    for directory in filter(is_digest, directories):
        raise StudyError(
            f"{directory}: a digest of a study, without packs to copy: name the directory that it was made of"
        )
    study = merged_study(studies, [str(directory) for directory in directories], name)
    design = study.design().hash
    wanted = set(study.identities())
    with Waiting("reading packs") as bar:
        chosen, left_out = _chosen(directories, wanted, bar)
    (out / PACKS).mkdir(parents=True, exist_ok=True)
    try:
        with Waiting("copying packs", len(chosen)) as bar:
            for path in chosen:
                _copy(path, out, study, design, wanted)
                bar.advance(1)
        _copy_measured(directories, out)
        with atomically(out / STUDY_FILE) as aside:
            aside.write_text(study_text(study), encoding="utf-8")
    except BaseException as error:  # Ctrl-C too: what is half a study would be in the way of the next try
        for folder in (PACKS, INDEX, SNAPSHOTS, LANDSCAPE):
            shutil.rmtree(out / folder, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise StudyError(f"{out}: can't be written ({error.strerror}); make room, or name another directory") from None
    return Merged(study, sum(map(len, chosen.values())), len(chosen), left_out)


def _copy(path: Path, out: Path, study: Study, design: str, wanted: set[str]) -> None:
    """A pack, its checksum, and its row in the index."""
    copied, content = out / PACKS / path.name, path.read_bytes()
    seal(copied, content)
    with atomically(copied) as aside:
        aside.write_bytes(content)
    facts = facts_of(copied, study.divergence)
    record(out, copied, facts | {"design": design if wanted.issuperset(facts["runs"].split()) else ""})


def _copy_measured(directories: Sequence[Path], out: Path) -> None:
    """Every snapshot and point, the first directory's where several have one of a name."""
    for directory in reversed(directories):
        for folder in (SNAPSHOTS, LANDSCAPE):
            for path in sorted((directory / folder).rglob("*")):
                if path.is_file() and not path.name.startswith("."):
                    copied = out / path.relative_to(directory)
                    copied.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, copied)


def merged_study(studies: Sequence[Study], where: Sequence[str], name: str | None = None) -> Study:
    """The study of which all are parts; StudyError where one differs from the first in more than its name and its axes."""
    contents = [_design_of(study) for study in studies]
    for study, content, directory in zip(studies[1:], contents[1:], where[1:], strict=True):
        key, first, other = next(differences(contents[0], content), ("", None, None))
        if key:
            raise StudyError(
                f"{directory}: {key} is {other!r}, and {first!r} in {where[0]}: only studies that differ in nothing but their "
                "[axes] can be merged"
            )
        if study.reference != studies[0].reference:
            raise StudyError(
                f"{directory}: its baseline is {study.reference!r}, and {studies[0].reference!r} in {where[0]}"
            )
    axes: dict[str, list[Any]] = {}
    kinds = [
        {key for key, _ in study.axes.items() if key != "seed" or not separate_seeds(study.axes)} for study in studies
    ]
    for study, kind, directory in zip(studies, kinds, where, strict=True):
        if kind != kinds[0]:
            apart = ", ".join(sorted(kind ^ kinds[0]))
            raise StudyError(
                f"{directory}: axes.{apart} is in this study or in {where[0]}, and not in both: write the axes alike"
            )
        for key, values in study.axes.items():
            if key in kind:
                known = axes.setdefault(key, [])
                known += [value for value in values if value not in known]
    content = studies[0].model_dump(mode="json", exclude_none=True, exclude_unset=True, exclude={"more", "strategy"})
    if names := list(dict.fromkeys(name for study in studies for name in study.probe.snapshots)):
        content["probe"] = content.get("probe", {}) | {"snapshots": names}
    if any(study.more for study in studies):
        axes, content["more"] = _joined(studies, kinds[0])
    try:
        return Study.model_validate(content | {"name": name or studies[0].name, "axes": axes})
    except ValueError as error:
        raise StudyError(f"the studies together are none: {in_words(error)}") from None


def _design_of(study: Study) -> dict[str, Any]:
    """What two studies that are merged have to agree in."""
    content = study.model_dump(mode="json", exclude=NOT_THE_DESIGN)
    del content["probe"]["snapshots"]
    return content


def _joined(studies: Sequence[Study], kind: set[str]) -> tuple[dict[str, list[Any]], list[dict[str, Any]]]:
    """The first study's axes, and as blocks its own, and the axes and blocks of the others, each in full and once."""
    tables = [
        {key: values for key, values in axes.items() if key in kind} for study in studies for axes in study.blocks
    ]
    distinct = [table for i, table in enumerate(tables) if table not in tables[:i]]
    return distinct[0], distinct[1:]


def differences(a: Mapping[str, Any], b: Mapping[str, Any], within: str = "") -> Any:
    """Where two studies' tables differ, the key and both values."""
    for key in dict.fromkeys([*a, *b]):
        mine, theirs = a.get(key), b.get(key)
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            yield from differences(mine, theirs, f"{within}{key}.")
        elif mine != theirs and f"{within}{key}" != "baseline":
            yield f"{within}{key}", mine, theirs


def _chosen(directories: Sequence[Path], wanted: set[str], bar: Waiting) -> tuple[dict[Path, list[str]], int]:
    """The packs to be copied, each with the runs that it brings, and how many bring nothing new; StudyError for other texts."""
    chosen: dict[Path, list[str]] = {}
    texts: dict[tuple[str, ...], tuple[str, Path]] = {}
    seen: set[str] = set()
    left_out = 0
    for directory in directories:
        for path in pack_files(directory):
            pack = PackFile(path)
            bar.advance(1)
            text = tuple(str(pack.attrs.get(key, "")) for key in SAME_TEXT)
            sha256 = str(pack.attrs["dataset_sha256"])
            known, first = texts.setdefault(text, (sha256, directory))
            if known != sha256:
                raise StudyError(
                    f"{path}: trained on another text {text[0]!r} ({sha256[:12]}) than {first} ({known[:12]}): "
                    "runs on two texts are no one study"
                )
            new = [run for run in pack.runs if run in wanted and run not in seen]
            seen.update(new)
            if new:
                chosen[path] = new
            else:
                left_out += 1
    return chosen, left_out
