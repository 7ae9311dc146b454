"""A study directory: one netCDF file a pack, complete or absent, joined on opening into one labelled DataTree.

    study.toml            the study as resolved
    packs/<hash>.nc       /history, /evaluation, /sharpness and /signals of one pack's runs
    packs/<hash>.sha256   its checksum, for `sha256sum -c` too
    checkpoints/<hash>/   the state of a pack under way (see `checkpoint`)

A pack is written whole or not at all (see `durable`), and read only if it is what its checksum says. Every group carries the run
coordinates itself, since coordinates that are no index are not inherited. `/summary` and the gradient ratios are derived on
opening, from the histories, so that their definitions can be changed without training again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import xarray as xr

from train.durable import atomically, is_intact, seal, set_aside
from train.gradient_ratio import norm_to_mean
from train.operands import ROLES
from train.plan import PlannedPack
from train.program import PackResult
from train.schema import COORDINATES, GROUPS, RUN_COORDINATES
from train.signal_pass import tensor_names
from train.signals import OUTSIDE
from train.stability import DivergenceSettings, divergence
from train.streams import evaluation_bytes_per_token
from train.study import Run, Study, StudyError
from train.study_file import read_study
from train.text import Text

STUDY_FILE, PACKS = "study.toml", "packs"
ENGINE: Final = "h5netcdf"

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
        "train_bytes_per_token": text.bytes_per_token(text.train),
        "evaluation_bytes_per_token": evaluation_bytes_per_token(program, text),
        "recipes": " | ".join(dict.fromkeys(f"{run.recipe.name}: {run.recipe.description}" for run in runs)),
        "pack": pack.hash,
        "pack_size": pack.size,
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


def _dataset(group: str, arrays: Mapping[str, tuple[Any, Mapping[str, Any]]], pack: PlannedPack) -> xr.Dataset:
    schema = GROUPS[group]
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
    path = directory / PACKS / f"{pack.hash}.nc"
    compress = {
        node.path: {
            str(name): {"zlib": True, "complevel": 4, "shuffle": True}
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
    return path


def read_packs(directory: Path) -> Iterator[xr.DataTree]:
    """Every complete pack of a study directory, loaded into memory; StudyError where one is damaged."""
    for path in pack_files(directory):
        yield read_pack(path)


def pack_files(directory: Path) -> list[Path]:
    """The files of a study directory's finished packs, by name."""
    return sorted((directory / PACKS).glob("*.nc"))


def read_pack(path: Path) -> xr.DataTree:
    """A pack in memory; StudyError where it is damaged."""
    try:
        if is_intact(path) is False:
            raise ValueError("its SHA-256 does not match")
        with xr.open_datatree(path, engine=ENGINE) as tree:
            return tree.load()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise StudyError(
            f"{path}: a damaged pack ({error}); `exmy resume {path.parent.parent}` keeps it aside and trains its runs again"
        ) from None


def runs_of(pack: xr.DataTree) -> list[str]:
    """Identities of a pack's runs."""
    return [str(identity) for identity in pack["history"].to_dataset()["run"].values]


def finished_runs(directory: Path, *, mend: bool = True) -> dict[str, str]:
    """Identities of the runs that a directory holds, each with its text's hash.

    A damaged pack is set aside, with a line in the log: for whoever has the directory to itself, and trains what is missing. Who
    only looks does not `mend`: the pack counts as missing, and stays where it is.
    """
    finished: dict[str, str] = {}
    for path in pack_files(directory):
        try:
            tree = read_pack(path)
        except StudyError:
            if not mend:
                continue
            aside = set_aside(path, "damaged")
            log.warning("%s: damaged: kept as %s, and its runs are trained again", path, aside.name)
            continue
        finished |= dict.fromkeys(runs_of(tree), str(tree.attrs["dataset_sha256"]))
    return finished


def study_of(directory: Path) -> Study:
    """The study whose directory it is; StudyError where it is none."""
    if not (directory / STUDY_FILE).is_file():
        raise StudyError(f"{directory}: no {STUDY_FILE} here; a study directory is what `exmy sweep --out DIR` writes")
    return read_study(directory / STUDY_FILE)


def study_text(study: Study) -> str:
    """What a study directory's study.toml says."""
    return f"# As resolved, every default spelt out. Hash: {study.hash}\n{study.to_toml()}"


def open_study(directory: Path | str) -> xr.DataTree:
    """A study directory as one DataTree: /history, /evaluation, /sharpness, /signals and /summary, aligned to all finished runs.

    Runs stand in the study's order; padding is NaN after `last_step`, and where a run has no such block, tensor or signal.
    StudyError where the directory holds no study or no finished run of it.
    """
    directory = Path(directory)
    study = study_of(directory)
    packs = list(read_packs(directory))
    groups: dict[str, xr.Dataset] = {}
    planned = [run.identity for run in study.runs()]
    for group in ("history", "evaluation", "sharpness", "signals"):
        parts = [pack[group].to_dataset() for pack in packs if group in pack]
        if not parts:
            continue
        joined = xr.concat(parts, dim="run", join="outer", combine_attrs="override", data_vars="all", coords="all")
        joined = joined.isel(run=~joined.get_index("run").duplicated())
        present = set(joined["run"].values.tolist())
        groups[group] = joined.sel(run=[identity for identity in planned if identity in present])
    if "history" not in groups or not groups["history"].sizes["run"]:
        raise StudyError(
            f"{directory}: none of the study's {len(planned)} runs is finished; run the sweep again to go on"
        )
    groups["history"] = _with_ratios(groups["history"])
    if "signals" in groups:
        groups["signals"] = _for_all_runs(groups["signals"], groups["history"])
    if "evaluation" in groups:
        groups["evaluation"] = _in_bits(groups["evaluation"], packs)
    groups["summary"] = summarise(study, groups["history"], packs)
    tree = xr.DataTree.from_dict({f"/{name}": dataset for name, dataset in groups.items()})
    tree.attrs = {
        "name": study.name, "baseline": study.reference, "study_hash": study.hash, "runs_planned": len(planned),
        "runs_finished": groups["history"].sizes["run"], "packs": len(packs), **_shared_attributes(packs),
    }  # fmt: skip
    return tree


def summarise(study: Study, history: xr.Dataset, packs: list[xr.DataTree]) -> xr.Dataset:
    """/summary: each definition of divergence, the final loss and the yardstick, for every run."""
    unigram = _per_run(packs, history, "unigram_entropy")
    settings = DivergenceSettings(**study.divergence.model_dump())
    within = ("dataset", "model", *(study.axes.model_extra or {}))
    summary = divergence(history, unigram, study.reference, settings, within)
    tokens = (history["last_step"] + 1) * _per_run(packs, history, "tokens_per_step")
    derived = {
        "unigram_entropy": unigram,
        "final_bits_per_byte": _bits_per_byte(summary["final_loss"], packs, "train_bytes_per_token"),
        "epochs": tokens / _per_run(packs, history, "train_tokens"),
    }
    return summary.assign(
        {name: ("run", values.values, GROUPS["summary"][name].attrs()) for name, values in derived.items()}
    )


def _with_ratios(history: xr.Dataset) -> xr.Dataset:
    """/history with the ratios of gradient norms to those before."""
    for name, of in (("gnmr", "grad_norm"), ("gnmr_block", "grad_norm_block")):
        if of in history:  # runs of before have no norms of blocks
            row = GROUPS["history"][name]
            ratio = norm_to_mean(history[of].transpose(*row.dims).values)
            history = history.assign({name: (row.dims, ratio, row.attrs())})
    return history


def _for_all_runs(group: xr.Dataset, history: xr.Dataset) -> xr.Dataset:
    """A group that some runs have, with NaN for the others, and `measured` telling which."""
    runs = {name: values for name, values in history.coords.items() if values.dims == ("run",)}
    measured = history.get_index("run").isin(group.get_index("run"))
    row = group["measured"]
    whole = group.drop_vars("measured").reindex(run=history["run"]).assign_coords(runs)
    return whole.assign(measured=("run", measured, row.attrs))


def _in_bits(evaluation: xr.Dataset, packs: list[xr.DataTree]) -> xr.Dataset:
    """/evaluation with the losses in bits per byte beside those in nats per token."""
    bits = _bits_per_byte(evaluation["validation_loss"], packs, "evaluation_bytes_per_token")
    row = GROUPS["evaluation"]["bits_per_byte"]
    return evaluation.assign(bits_per_byte=(row.dims, bits.transpose(*row.dims).values, row.attrs()))


def _bits_per_byte(loss: xr.DataArray, packs: list[xr.DataTree], attribute: str) -> xr.DataArray:
    return loss / (math.log(2) * _per_run(packs, loss, attribute))


def _per_run(packs: list[xr.DataTree], like: xr.Dataset | xr.DataArray, attribute: str) -> xr.DataArray:
    """A number that packs have, for each run of `like`; what packs of before don't have is NaN, or 1 byte for a token."""
    absent = 1.0 if attribute.endswith("bytes_per_token") else np.nan
    number = {identity: float(pack.attrs.get(attribute, absent)) for pack in packs for identity in runs_of(pack)}
    values = [number[str(identity)] for identity in like["run"].values]
    return xr.DataArray(values, dims="run", coords={"run": like["run"].values}, name=attribute)


def _shared_attributes(packs: list[xr.DataTree]) -> dict[str, Any]:
    """Provenance over all packs: a value that all share, or every different one, joined by " | "; seconds are added up, and of
    peaks the highest counts.
    """
    shared: dict[str, Any] = {}
    for key in map(str, packs[0].attrs):
        values = [pack.attrs[key] for pack in packs if key in pack.attrs]
        if key in ("seconds", "seconds_first_step"):
            shared[key] = float(sum(values))
        elif key == "peak_bytes":
            shared[key] = max(values)
        elif key not in ("pack", "created"):
            distinct = list(dict.fromkeys(values))
            shared[key] = distinct[0] if len(distinct) == 1 else " | ".join(map(str, distinct))
    return shared
