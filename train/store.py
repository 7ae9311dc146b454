"""A study directory: one netCDF file a pack, complete or absent, joined on opening into one labelled DataTree.

    packs/<hash>.nc       /history, /evaluation, /sharpness, /signals and /probes of one pack's runs
    packs/<hash>.sha256   its checksum, for `sha256sum -c` too

What else is there, `directory` lists. A pack is written whole or not at all (see `durable`), and read only if it is what its
checksum says. Every group carries the run coordinates itself, since coordinates that are no index are not inherited. `/summary`
and the gradient ratios are derived on opening, from the histories, so that their definitions can be changed without training
again.
"""

from __future__ import annotations

import functools
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import xarray as xr

from train import index
from train.derived import (
    for_all_runs,
    in_bits,
    join,
    parts_of,
    shared_attributes,
    summary_of,
    with_quantisers,
    with_ratios,
)
from train.digest import read_digest
from train.directory import PACK, Stamp, is_digest, stamp_of
from train.directory import PACKS as PACKS
from train.directory import STUDY_FILE as STUDY_FILE
from train.directory import pack_files as pack_files
from train.directory import study_of as study_of
from train.directory import study_text as study_text
from train.durable import atomically, read_intact, seal, set_aside
from train.finished import finished_rows, record
from train.landscape_files import landscape_groups
from train.measures import MEASURES, group_of
from train.operands import ROLES
from train.pack_file import DAMAGE, damaged, facts
from train.plan import PlannedPack
from train.program import PackResult
from train.schema import COORDINATES, GROUPS, OF_MEASURES, RUN_COORDINATES
from train.signal_pass import tensor_names
from train.signals import OUTSIDE
from train.stability import DivergenceSettings, divergence, judged
from train.streams import evaluation_bytes_per_token
from train.study import Design, Run, Study, StudyError
from train.taking import ticks as ticks_of
from train.text import Text

ENGINE: Final = "h5netcdf"
OF_SOME = ("signals", *map(group_of, MEASURES))  # groups that some runs of a study may lack
RECORDED = ("history", "evaluation", "sharpness", *OF_SOME)  # groups that packs have; /summary is derived

log = logging.getLogger(__name__)


def pack_tree(pack: PlannedPack, result: PackResult, text: Text, provenance: Mapping[str, Any]) -> xr.DataTree:
    """A pack's results as a DataTree, padding dropped."""
    runs, program = pack.runs, pack.program
    n = len(runs)
    groups: dict[str, xr.Dataset] = {}
    steps = np.arange(program.steps)
    by_step = {"train_loss": result.train_loss, "grad_norm": result.grad_norm}
    if result.loss_scale is not None and result.skipped is not None:
        # Numbers, since beside packs without it NaN stands for "not recorded".
        by_step |= {"loss_scale": result.loss_scale, "skipped": result.skipped.astype(np.float32)}
    history: dict[str, tuple[Any, Mapping[str, Any]]] = {
        name: (values[:, :n].T, {"step": steps}) for name, values in by_step.items()
    }
    blocks = np.array([OUTSIDE, *range(program.shape.layers)])
    if result.grad_norm_block is not None:
        of_blocks = result.grad_norm_block[:, :n].swapaxes(0, 1)
        history["grad_norm_block"] = (of_blocks, {"step": steps, "block": blocks})
    groups["history"] = _dataset("history", {**history, "last_step": (np.full(n, program.steps - 1), {})}, pack)
    evaluated = {"eval_step": np.array(program.evaluation_steps)}
    groups["evaluation"] = _dataset(
        "evaluation", {"validation_loss": (result.validation_loss[:, :n].T, evaluated)}, pack
    )
    if result.sharpness:
        probed = {"probe_step": np.array(program.probe_steps), "epsilon": np.array(program.probe.epsilons)}
        sharpness = {name: (values[:, :n].swapaxes(0, 1), probed) for name, values in result.sharpness.items()}
        groups["sharpness"] = _dataset("sharpness", {**sharpness, "measured": (np.ones(n, bool), {})}, pack)
        groups["sharpness"].attrs["positions"] = (
            f"mean over {program.probe.positions} positions of the probe's sequences"
        )
    if result.signals:
        ticks = {
            "signal_step": np.array(program.signal_steps), "block": blocks, "tensor": np.array(tensor_names(program.shape)),
            "role": np.array(ROLES),
        }  # fmt: skip
        signals = {name: (values[:, :n].swapaxes(0, 1), ticks) for name, values in result.signals.items()}
        groups["signals"] = _dataset("signals", {**signals, "measured": (np.ones(n, bool), {})}, pack)
    for measure in program.measures:
        groups[group_of(measure)] = _measured(measure, result, pack)
    tree = xr.DataTree.from_dict({f"/{name}": dataset for name, dataset in groups.items()})
    tree.attrs = {
        **provenance,
        "dataset": text.name,
        "dataset_sha256": text.sha256,
        "dataset_source": text.source,
        "unigram_entropy": text.unigram_entropy,
        "tokenizer": text.tokenizer,
        "vocabulary": text.vocabulary,
        "corruption": str(runs[0].stream.corruption) or "none",
        "train_tokens": text.train.size,
        "validation_tokens": text.validation.size,
        "train_bytes_per_token": text.train_bytes_per_token,
        "evaluation_bytes_per_token": evaluation_bytes_per_token(program, text),
        "recipes": " | ".join(dict.fromkeys(f"{run.recipe.name}: {run.recipe.description}" for run in runs)),
        "pack": pack.hash,
        "pack_size": pack.size,
        **({"restarted_from_pack_size": pack.restarted_from} if pack.restarted_from else {}),
        "tokens_per_step": program.sequences * program.shape.context,
        "parameters_per_run": program.shape.size,
        "compiled": int(result.compiled),
        "seconds": result.seconds,
        "seconds_first_step": result.seconds_first_step,
        "steps_made": program.steps if result.steps_made is None else result.steps_made,
    }
    if result.peak_bytes is not None:
        tree.attrs["peak_bytes"] = result.peak_bytes
    return tree


def _measured(measure: str, result: PackResult, pack: PlannedPack) -> xr.Dataset:
    """A measure's group."""
    n, probe = len(pack.runs), pack.program.probe
    arrays: dict[str, tuple[Any, Mapping[str, Any]]] = {"measured": (np.ones(n, bool), {})}
    for name, axes in MEASURES[measure].variables.items():
        along = {axis: np.array(ticks_of(probe, measure, axis)) for axis in axes}
        probed = {"probe_step": np.array(pack.program.steps_of(measure))}
        arrays[name] = (result.measures[f"{measure}/{name}"][:, :n].swapaxes(0, 1), probed | along)
    return _dataset(group_of(measure), arrays, pack).assign_attrs(quantisers=probe.quantisers)


def _dataset(group: str, arrays: Mapping[str, tuple[Any, Mapping[str, Any]]], pack: PlannedPack) -> xr.Dataset:
    schema = GROUPS.get(group) or OF_MEASURES[group]
    variables = {}
    coordinates = run_coordinates(pack.runs, pack.size)
    for name, (values, axes) in arrays.items():
        variables[name] = (schema[name].dims, values, schema[name].attrs())
        for axis, ticks in axes.items():
            coordinates[axis] = (axis, ticks, COORDINATES[axis].attrs())
    return xr.Dataset(variables, coordinates)


def run_coordinates(runs: tuple[Run, ...], pack_size: int) -> dict[str, Any]:
    """The coordinates along `run` that every group carries; axes beyond the usual ones under their own names."""
    columns: dict[str, Any] = {
        "recipe": [run.recipe.name for run in runs],
        "format": [run.recipe.format for run in runs],
        "learning_rate": [run.learning_rate for run in runs],
        "init_seed": [run.init_seed for run in runs],
        "data_seed": [run.data_seed for run in runs],
        "seed": [run.seed for run in runs],
        "dataset": [run.dataset for run in runs],
        "model": [run.model.label for run in runs],
        "pack_size": [pack_size] * len(runs),
    }
    coordinates = {
        name: ("run", np.array(values), {"units": "1", "long_name": RUN_COORDINATES[name]})
        for name, values in columns.items()
    }
    for axis, _ in runs[0].extra_axes:
        values = np.array([dict(run.extra_axes)[axis] for run in runs])
        coordinates[axis] = ("run", values, {"units": "1", "long_name": f"the study's axis {axis}"})
    identities = np.array([run.identity for run in runs])
    coordinates["run"] = ("run", identities, {"long_name": "identity: a hash over all that decides the run's numbers"})
    return coordinates


def write_pack(directory: Path, pack: PlannedPack, tree: xr.DataTree) -> Path:
    """The tree in packs/<hash>.nc, whole or not at all, and its checksum; OSError where it can't be written."""
    path = directory / PACKS / f"{pack.hash}{PACK}"
    compress = {
        node.path: {
            str(name): {"zlib": True, "complevel": 1, "shuffle": True}
            for name, v in node.data_vars.items()
            if v.ndim > 1
        }
        for node in tree.subtree
        if node.path != "/"
    }
    # Made in memory first: the HDF5 library, writing to a disk that is full, can crash the process.
    content = bytes(tree.to_netcdf(engine=ENGINE, encoding=compress))
    seal(path, content)
    with atomically(path) as aside:
        aside.write_bytes(content)
    _record(directory, path, pack, tree)
    return path


def _record(directory: Path, path: Path, pack: PlannedPack, tree: xr.DataTree) -> None:
    """Note the pack, which is on the disk, in the study's index; nothing that goes wrong here undoes that."""
    if not (directory / STUDY_FILE).is_file():
        return
    try:
        study, design = _study_and_design(directory, stamp_of(directory / STUDY_FILE))
        own = design.hash if all(run in design for run in pack.runs) else ""
        runs = [run.identity for run in pack.runs]
        history = tree["history"].to_dataset()
        record(directory, path, facts(path.stem, runs, tree.attrs, history, study.divergence, own))
    except (OSError, ValueError, KeyError) as error:
        log.warning("%s: not in the index (%s): it is read again at the next start", path, error)


@functools.lru_cache(maxsize=4)
def _study_and_design(directory: Path, _: Stamp) -> tuple[Study, Design]:
    """The directory's study while its file has that stamp, for all packs that are written meanwhile."""
    study = study_of(directory)
    return study, study.design()


def read_packs(directory: Path) -> Iterator[xr.DataTree]:
    """Every complete pack of a study directory, loaded into memory; StudyError where one is damaged."""
    for path in pack_files(directory):
        yield read_pack(path)


def read_pack(path: Path) -> xr.DataTree:
    """A pack in memory; StudyError where it is damaged."""
    try:
        with xr.open_datatree(io.BytesIO(read_intact(path)), engine=ENGINE) as tree:
            return tree.load()
    except DAMAGE as error:
        raise damaged(path, error) from None


def runs_of(pack: xr.DataTree) -> list[str]:
    """Identities of a pack's runs."""
    return [str(identity) for identity in pack["history"].to_dataset()["run"].values]


def finished_runs(
    directory: Path, study: Study | None = None, *, mend: bool = True, check: bool = False
) -> dict[str, str]:
    """Identities of the runs that a directory holds, each with its text's hash, from its index where that is up to date.

    A damaged pack is set aside, with a line in the log: for whoever has the directory to itself, and trains what is missing. Who
    only looks does not `mend`: the pack counts as missing, and stays where it is. check: hold every file against its checksum.
    study: the one whose runs they will be, for what is written into the index.
    """

    def set_aside_and_say(path: Path, _: StudyError) -> None:
        if mend:
            aside = set_aside(path, "damaged")
            log.warning("%s: damaged: kept as %s, and its runs are trained again", path, aside.name)

    rows = finished_rows(directory, study, "nothing" if check else "stamps", set_aside_and_say, keep=mend)
    return {run: row["text"] for row in rows.values() for run in index.runs_of(row)}


def open_study(directory: Path | str, chunks: int | Literal["auto"] | None = None) -> xr.DataTree:
    """A study directory as one DataTree: /history, /evaluation, /sharpness, /signals, /probes (a group a further measure) and
    /summary, aligned to all finished runs; what `exmy landscape` measured since is in /landscape.

    Runs stand in the study's order; padding is NaN after `last_step`, and where a run has no such block, tensor or signal.
    chunks: None for all in memory; a number of runs, or "auto", for dask arrays that read that many runs' histories at a time
    (see `lazy`), with the same values. Where there are no packs but a digest of them, that is what is opened (see `digest`).
    StudyError where the directory holds no study, no finished run of it, or a damaged pack.
    """
    directory = Path(directory)
    study = study_of(directory)
    if is_digest(directory):
        return read_digest(directory, chunks)
    if chunks is not None:
        return _open_lazily(study, directory, chunks)
    packs = list(read_packs(directory))
    groups: dict[str, xr.Dataset] = {}
    planned = list(study.identities())
    for group in RECORDED:
        parts = parts_of(packs, group)
        if not parts:
            continue
        joined = join(parts)
        there = joined["run"].values.tolist()
        present = set(there)
        wanted = [identity for identity in planned if identity in present]
        if there != wanted:  # seldom: all of it is copied, twice
            joined = joined.isel(run=~joined.get_index("run").duplicated()).sel(run=wanted)
        groups[group] = joined
    if "history" not in groups or not groups["history"].sizes["run"]:
        raise _none_finished(directory, len(planned))
    groups["history"] = with_ratios(groups["history"])
    for group in OF_SOME:
        if group in groups:
            groups[group] = for_all_runs(groups[group], groups["history"])
    if "evaluation" in groups:
        by_byte = _per_run(packs, groups["evaluation"], "evaluation_bytes_per_token")
        groups["evaluation"] = in_bits(groups["evaluation"], by_byte)
    groups["summary"] = summarise(study, groups["history"], packs)
    return _tree(study, directory, groups, planned, [pack.attrs for pack in packs])


def _open_lazily(study: Study, directory: Path, chunks: int | Literal["auto"]) -> xr.DataTree:
    """`open_study` with chunks; StudyError where they are none, or dask is missing."""
    if chunks != "auto" and chunks < 1:
        raise StudyError(f'chunks must be "auto" or a number of runs, at least 1, got {chunks}')
    from train.lazy import layout, survey  # dask, for those who ask for it

    planned = list(study.identities())
    settings = DivergenceSettings(**study.divergence.model_dump())
    found = survey(pack_files(directory), settings)
    laid = layout(found, read_pack, join, RECORDED, OF_SOME)
    if not laid.rows("history", planned).size:
        raise _none_finished(directory, len(planned))
    groups = laid.groups(planned, None if chunks == "auto" else chunks)
    history = groups["history"] = with_ratios(groups["history"])

    def number(attribute: str, like: xr.Dataset = history) -> xr.DataArray:
        values = laid.numbers(like["run"].values, attribute, _absent(attribute))
        return xr.DataArray(values, dims="run", coords={"run": like["run"].values}, name=attribute)

    if "evaluation" in groups:
        groups["evaluation"] = in_bits(groups["evaluation"], number("evaluation_bytes_per_token", groups["evaluation"]))
    labels = {name: of for name, of in history.coords.items() if of.dims == ("run",)}
    rows = found.outcomes.isel(run=laid.rows("history", planned)).assign_coords(labels)
    within = ("dataset", "model", *(study.axes.model_extra or {}))
    judgement = judged(rows, history["last_step"], number("unigram_entropy"), study.reference, settings, within)
    groups["summary"] = summary_of(judgement, history["last_step"], number)
    return _tree(study, directory, groups, planned, found.attrs)


def _none_finished(directory: Path, planned: int) -> StudyError:
    return StudyError(f"{directory}: none of the study's {planned} runs is finished; run the sweep again to go on")


def _tree(
    study: Study, directory: Path, groups: Mapping[str, xr.Dataset], planned: Sequence[str],
    packs: Sequence[Mapping[Any, Any]],
) -> xr.DataTree:  # fmt: skip
    whole = {**groups, **landscape_groups(directory, planned, groups["history"])}
    named = {name: with_quantisers(dataset) for name, dataset in whole.items()}
    tree = xr.DataTree.from_dict({f"/{name}": dataset for name, dataset in named.items()})
    tree.attrs = {
        "name": study.name, "baseline": study.reference, "study_hash": study.hash, "runs_planned": len(planned),
        "runs_finished": groups["history"].sizes["run"], "packs": len(packs), **shared_attributes(packs),
    }  # fmt: skip
    if study.alarms.thresholds:
        from train.rings import with_rings  # waits for SciPy

        return with_rings(tree, study)
    return tree


def summarise(study: Study, history: xr.Dataset, packs: list[xr.DataTree]) -> xr.Dataset:
    """/summary: each definition of divergence, the final loss and the yardstick, for every run."""
    settings = DivergenceSettings(**study.divergence.model_dump())
    within = ("dataset", "model", *(study.axes.model_extra or {}))
    unigram = _per_run(packs, history, "unigram_entropy")
    judgement = divergence(history, unigram, study.reference, settings, within)
    return summary_of(judgement, history["last_step"], lambda attribute: _per_run(packs, history, attribute))


def _per_run(packs: list[xr.DataTree], like: xr.Dataset | xr.DataArray, attribute: str) -> xr.DataArray:
    """A number that packs have, for each run of `like`."""
    absent = _absent(attribute)
    number = {identity: float(pack.attrs.get(attribute, absent)) for pack in packs for identity in runs_of(pack)}
    values = [number[str(identity)] for identity in like["run"].values]
    return xr.DataArray(values, dims="run", coords={"run": like["run"].values}, name=attribute)


def _absent(attribute: str) -> float:
    """What packs of before don't have: NaN, or 1 byte for a token."""
    return 1.0 if attribute.endswith("bytes_per_token") else np.nan
