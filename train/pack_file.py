"""A pack's file, read whole, held against its checksum, and looked into with h5py, ten times as fast as it opens as a DataTree.

What a file says here and what xarray says of it is the same: a test holds every variable and attribute of one against the other.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from train.durable import CHECKSUM, read_intact
from train.index import rule_of
from train.settings import DivergenceTable
from train.stability import DivergenceSettings, no_progress, outcomes
from train.study import StudyError

DAMAGE = (OSError, ValueError, KeyError, RuntimeError)  # what HDF5 and h5netcdf raise at a file that is none
OUTCOMES = ("train_loss", "grad_norm", "skipped", "last_step")  # what the definitions of divergence look at


def damaged(path: Path, error: Exception) -> StudyError:
    """What is said of a pack that can't be read."""
    return StudyError(
        f"{path}: a damaged pack ({error}); `exmy resume {path.parent.parent}` keeps it aside and trains its runs again"
    )


class PackFile:
    """One pack; StudyError where the file is damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.content = read_intact(path)
            self._file = h5py.File(io.BytesIO(self.content), "r")
            self.attrs = {str(k): _value(v) for k, v in self._file.attrs.items() if not k.startswith("_NC")}
            self.runs: list[str] = self.values("history", "run").tolist()
        except DAMAGE as error:
            raise damaged(path, error) from None

    @property
    def groups(self) -> list[str]:
        """Its groups, by name."""
        return list(self._file)

    def variables(self, group: str) -> dict[str, tuple[int, ...]]:
        """The variables and coordinates of a group, with their shapes."""
        return {name: data.shape for name, data in self._file[group].items() if isinstance(data, h5py.Dataset)}

    def values(self, group: str, name: str) -> NDArray[Any]:
        """A variable's values; strings as NumPy's fixed-width ones."""
        data = self._file[group][name]
        if h5py.check_string_dtype(data.dtype):
            return np.array(data.asstr()[()], dtype=np.str_)
        values: NDArray[Any] = data[()]
        return values.astype(bool) if data.attrs.get("dtype") == "bool" else values

    def history(self) -> xr.Dataset:
        """What the definitions of divergence look at, along run and step."""
        there = self.variables("history")
        variables = {
            name: (("run",) if name == "last_step" else ("run", "step"), self.values("history", name))
            for name in OUTCOMES
            if name in there
        }
        return xr.Dataset(variables, {"step": self.values("history", "step")})

    def read_all(self) -> None:
        """Read every variable: a file without a checksum shows damage in no other way."""
        for group in self.groups:
            for name in self.variables(group):
                self.values(group, name)

    def close(self) -> None:
        """Give the memory back."""
        self._file.close()

    def __enter__(self) -> PackFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def facts(
    pack: str, runs: Sequence[str], attrs: Mapping[Any, Any], history: xr.Dataset, table: DivergenceTable
) -> dict[str, Any]:
    """What the index says of a pack (`index.Row`), its file apart."""
    settings = DivergenceSettings(**table.model_dump())
    found = outcomes(history, settings)
    final = found["final_loss"]
    stuck = no_progress(final, float(attrs.get("unigram_entropy", math.nan)), settings.progress_margin)
    return {
        "pack": pack,
        "text": str(attrs["dataset_sha256"]),
        "size": int(attrs["pack_size"]),
        "device": str(attrs["device"]),
        "seconds": float(attrs["seconds"]),
        "first_step": float(attrs["seconds_first_step"]),
        "runs": list(map(str, runs)),
        "rule": rule_of(table),
        "final_loss": [None if math.isnan(loss) else loss for loss in final.values.tolist()],
        "non_finite": _bits(found["first_non_finite_step"].notnull()),
        "no_progress": _bits(stuck),
        "spike": _bits(found["first_spike"].notnull()),
    }


def facts_of(path: Path, table: DivergenceTable) -> dict[str, Any]:
    """`facts` of a pack's file; StudyError where it is damaged."""
    with PackFile(path) as pack:
        try:
            if not path.with_suffix(CHECKSUM).exists():
                pack.read_all()
            return facts(path.stem, pack.runs, pack.attrs, pack.history(), table)
        except DAMAGE as error:
            raise damaged(path, error) from None


def _bits(found: xr.DataArray) -> str:
    return "".join("01"[bool(one)] for one in found.values)


def _value(attribute: Any) -> Any:
    return attribute[0] if isinstance(attribute, np.ndarray) and attribute.size == 1 else attribute
