"""What a study's DataTree says beyond what its packs hold: joined along the runs, with ratios, bits per byte and a summary.

Each function takes datasets in memory or in dask's chunks along `run`, and gives the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from train.gradient_ratio import norm_to_mean
from train.schema import COORDINATES, GROUPS


def join(parts: Sequence[xr.Dataset]) -> xr.Dataset:
    """One group of several packs, one after the other along `run`, each axis with the ticks of all."""
    return xr.concat(parts, dim="run", join="outer", combine_attrs="override", data_vars="all", coords="all")


def parts_of(packs: Sequence[xr.DataTree], group: str) -> list[xr.Dataset]:
    """A group, by its path, of each pack that has it."""
    return [pack[group].to_dataset() for pack in packs if any(node.path == f"/{group}" for node in pack.subtree)]


def with_ratios(history: xr.Dataset) -> xr.Dataset:
    """/history with the ratios of gradient norms to those before."""
    for name, of in (("gnmr", "grad_norm"), ("gnmr_block", "grad_norm_block")):
        if of in history:  # runs of before have no norms of blocks
            row = GROUPS["history"][name]
            norms = history[of].transpose(*row.dims)
            lazy = norms.chunks is not None
            ratio = norms.data.map_blocks(norm_to_mean, dtype=np.float32) if lazy else norm_to_mean(norms.values)
            history = history.assign({name: (row.dims, ratio, row.attrs())})
    return history


def for_all_runs(group: xr.Dataset, history: xr.Dataset) -> xr.Dataset:
    """A group that some runs have, with NaN for the others, and `measured` telling which."""
    runs = {name: values for name, values in history.coords.items() if values.dims == ("run",)}
    whole = group.drop_vars("measured").reindex(run=history["run"]).assign_coords(runs)
    return whole.assign(measured=measured(group, history))


def measured(group: xr.Dataset, history: xr.Dataset) -> tuple[str, NDArray[np.bool_], dict[Any, Any]]:
    """Which runs of the history a group has, as a variable."""
    return "run", history.get_index("run").isin(group.get_index("run")), group["measured"].attrs


def with_quantisers(group: xr.Dataset) -> xr.Dataset:
    """A measure's group with what it says of the quantisers as a coordinate; any other as it is."""
    if "quantisers" not in group.attrs:
        return group
    said = xr.Variable((), group.attrs["quantisers"], COORDINATES["quantisers"].attrs())
    return group.assign_coords(quantisers=said)


def in_bits(evaluation: xr.Dataset, bytes_per_token: xr.DataArray) -> xr.Dataset:
    """/evaluation with the losses in bits per byte beside those in nats per token."""
    row = GROUPS["evaluation"]["bits_per_byte"]
    bits = evaluation["validation_loss"] / (math.log(2) * bytes_per_token)
    return evaluation.assign(bits_per_byte=(row.dims, bits.transpose(*row.dims).data, row.attrs()))


def summary_of(judgement: xr.Dataset, last_step: xr.DataArray, number: Callable[[str], xr.DataArray]) -> xr.Dataset:
    """/summary: what `stability.judged` says, and the yardsticks. number: what the packs of the runs have by that name, (run)."""
    tokens = (last_step + 1) * number("tokens_per_step")
    derived = {
        "unigram_entropy": number("unigram_entropy"),
        "final_bits_per_byte": judgement["final_loss"] / (math.log(2) * number("train_bytes_per_token")),
        "epochs": tokens / number("train_tokens"),
    }
    return judgement.assign(
        {name: ("run", values.values, GROUPS["summary"][name].attrs()) for name, values in derived.items()}
    )


def shared_attributes(packs: Sequence[Mapping[Any, Any]]) -> dict[str, Any]:
    """Provenance over all packs: a value that all share, or every different one, joined by " | ", "absent" too; seconds are
    added up, and of peaks the highest counts.
    """
    shared: dict[str, Any] = {}
    for key in dict.fromkeys(str(key) for attrs in packs for key in attrs):
        values = [attrs[key] for attrs in packs if key in attrs]
        if key in ("seconds", "seconds_first_step"):
            shared[key] = float(sum(values))
        elif key == "peak_bytes":
            shared[key] = max(values)
        elif key not in ("pack", "created"):
            distinct = list(dict.fromkeys(attrs.get(key, "absent") for attrs in packs))
            shared[key] = distinct[0] if len(distinct) == 1 else " | ".join(map(str, distinct))
    return shared
