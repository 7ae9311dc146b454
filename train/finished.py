"""Which runs a study directory holds: what the index knows and still holds, and the other packs read.

A sweep that starts trusts a row of the index whose file and checksum have the size and the times that the row says, and reads
every other pack: one that was cut off, changed, copied here or added by hand is held against its checksum. A bit that a disk lost
by itself changes no time; that is found where the file is read (`open_study` and all that rests on it), and by `exmy resume`,
which holds every file against its checksum, in threads, before it trains anything: seconds for 100,000 small packs. Who only
asks for a status trusts the name, so that it is told at once, of a study that was copied too, and nothing is changed.
"""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

from train.directory import INDEX, PACK, PACKS, Found, Stamp, found_packs, pack_names, stamp_of
from train.durable import CHECKSUM, is_intact, remove_parts
from train.index import Row, append_rows, is_mostly_dead, is_unchanged, read_index, row_of, rule_of, write_index
from train.settings import DivergenceTable
from train.study import Study, StudyError
from train.waiting import Waiting

Trust = Literal["name", "stamps", "nothing"]
TOGETHER = 500  # rows that are appended at a time: so many packs at most are read twice if it is killed
THREADS = 16  # of checksums; they wait for the disk or the network, or hash without holding Python up


def finished_rows(
    directory: Path,
    study: Study | None = None,
    trust: Trust = "name",
    damaged: Callable[[Path, StudyError], None] | None = None,
    *,
    keep: bool = False,
) -> dict[str, Row]:
    """A row of the index for every pack that is there, by its hash, in the order of `pack_files`.

    study: the directory's, if what became of the runs is asked for: rows by another [divergence] are made again of their packs.
    trust: when a row of the index counts (see above). damaged: hears of packs that can't be read, which are then left out;
    without it, the first is raised. keep: write down what was learnt; for whoever has the directory.
    """
    there: Mapping[str, Found | None]
    there = dict.fromkeys(pack_names(directory)) if trust == "name" else found_packs(directory)
    index = read_index(directory)
    wanted = rule_of(study.divergence) if study else None
    rows: dict[str, Row] = {}
    unknown: list[str] = []
    for pack, found in there.items():
        row = index.rows.get(pack)
        if row is not None and wanted in (None, row["rule"]) and (found is None or is_unchanged(row, found)):
            rows[pack] = row
        else:
            unknown.append(pack)
    if trust == "nothing":
        for path in _changed(directory, list(rows)):
            del rows[path.stem]
            unknown.append(path.stem)
    for row in _read(directory, sorted(unknown), study, damaged, keep=keep):
        rows[row["pack"]] = row
    if keep:
        remove_parts(directory / INDEX)
        if is_mostly_dead(index, len(rows)):
            write_index(directory, rows.values())
    return {pack: rows[pack] for pack in there if pack in rows}


def record(directory: Path, path: Path, facts: Mapping[str, object]) -> None:
    """Note a pack that was just written in the directory's index."""
    append_rows(directory, [row_of(_stamps(path), facts)])


def _read(
    directory: Path, packs: list[str], study: Study | None, damaged: Callable[[Path, StudyError], None] | None, *, keep: bool
) -> Iterator[Row]:  # fmt: skip
    """Rows of packs that the index does not know, made of their files."""
    if not packs:
        return
    from train.pack_file import facts_of  # xarray, for which nobody waits who has an index

    table = study.divergence if study else DivergenceTable()
    design, planned = (study.design().hash, set(study.identities())) if study else ("", set())
    new: list[Row] = []
    with Waiting("reading packs", len(packs)) as bar:
        for pack in packs:
            path = directory / PACKS / f"{pack}{PACK}"
            try:
                # Before the file is read: one that is changed meanwhile is not taken for what was read.
                stamps = _stamps(path)
                facts = facts_of(path, table)
                own = design if planned.issuperset(facts["runs"].split()) else ""
                new.append(row_of(stamps, facts | {"design": own}))
            except FileNotFoundError:
                continue
            except StudyError as error:
                if damaged is None:
                    raise
                damaged(path, error)
                continue
            finally:
                bar.advance(1)
            yield new[-1]
            if keep and len(new) == TOGETHER:
                append_rows(directory, new)
                new = []
    if keep and new:
        append_rows(directory, new)


def _changed(directory: Path, packs: list[str]) -> Iterator[Path]:
    """The packs whose files are not what their checksums say."""
    paths = [directory / PACKS / f"{pack}{PACK}" for pack in packs]
    threads = min(THREADS, 4 * (os.cpu_count() or 1))
    with Waiting("checking packs", len(paths)) as bar, concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for path, intact in zip(paths, pool.map(_intact, paths, chunksize=64), strict=True):
            bar.advance(1)
            if not intact:
                yield path


def _intact(path: Path) -> bool:
    """Whether a file can be read, and is what its checksum says, if it has one."""
    try:
        return is_intact(path) is not False
    except OSError:
        return False


def _stamps(path: Path) -> Found:
    try:
        seal: Stamp | None = stamp_of(path.with_suffix(CHECKSUM))
    except FileNotFoundError:
        seal = None
    return Found(stamp_of(path), seal)
