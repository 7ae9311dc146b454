"""A pack's file, read whole, held against its checksum, and looked into with h5py, ten times as fast as it opens as a DataTree.

What a file says here and what xarray says of it is the same: a test holds every variable and attribute of one against the other.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from h5py import h5, h5a, h5d, h5f, h5g, h5s
from numpy.typing import NDArray

from train.durable import CHECKSUM, read_intact
from train.index import rule_of
from train.measures import PROBES
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
    """One pack; StudyError where the file is damaged.

    By HDF5's own calls: h5py's objects take ten times as long for the hundred small arrays and attributes of a pack.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            content = read_intact(path)
            self._file = h5f.open_file_image(content)
            self._groups: dict[str, Any] = {}
            if not path.with_suffix(CHECKSUM).exists():
                self._read_all()
        except DAMAGE as error:
            raise damaged(path, error) from None

    @functools.cached_property
    def attrs(self) -> dict[str, Any]:
        """Of the pack, in the order in which they were written; NumPy's scalars for numbers."""
        try:
            return self._attributes()
        except DAMAGE as error:
            raise damaged(self.path, error) from None

    @functools.cached_property
    def runs(self) -> list[str]:
        """Identities of the pack's runs."""
        try:
            found: list[str] = self.values("history", "run").tolist()
        except DAMAGE as error:
            raise damaged(self.path, error) from None
        return found

    @property
    def groups(self) -> list[str]:
        """Its groups, by name, and each measure by its path."""
        found = []
        for name in h5g.open(self._file, b"/"):
            within = list(h5g.open(self._file, name)) if name.decode() == PROBES else []
            found += [f"{name.decode()}/{inner.decode()}" for inner in within] or [name.decode()]
        return found

    def names(self, group: str) -> list[str]:
        """The variables and coordinates of a group."""
        return [name.decode() for name in self._group(group)]

    def shape(self, group: str, name: str) -> tuple[int, ...]:
        """A variable's."""
        shape: tuple[int, ...] = h5d.open(self._group(group), name.encode()).shape
        return shape

    def values(self, group: str, name: str) -> NDArray[Any]:
        """A variable's values; strings as NumPy's fixed-width ones."""
        data = h5d.open(self._group(group), name.encode())
        values: NDArray[Any] = np.empty(data.shape, data.dtype)
        data.read(h5s.ALL, h5s.ALL, values)
        if values.dtype.kind == "O":
            return np.array([text.decode() for text in values.ravel()], np.str_).reshape(values.shape)
        # netCDF has no booleans: xarray writes bytes, and says so.
        return values.astype(bool) if values.dtype == np.int8 and h5a.exists(data, b"dtype") else values

    def _group(self, name: str) -> Any:
        if name not in self._groups:
            self._groups[name] = h5g.open(self._file, name.encode())
        return self._groups[name]

    def _attributes(self) -> dict[str, Any]:
        root = h5g.open(self._file, b"/")
        attributes = {}
        for i in range(h5a.get_num_attrs(root)):
            attribute = h5a.open(root, index=i, index_type=h5.INDEX_CRT_ORDER)
            name = attribute.name.decode()
            if name.startswith("_NC"):  # the format's own
                continue
            value = np.empty(attribute.shape, attribute.dtype)
            attribute.read(value)
            only = value.reshape(-1)[0]
            attributes[name] = only.decode() if isinstance(only, bytes) else only
        return attributes

    def history(self) -> xr.Dataset:
        """What the definitions of divergence look at, along run and step."""
        there = self.names("history")
        variables = {
            name: (("run",) if name == "last_step" else ("run", "step"), self.values("history", name))
            for name in OUTCOMES
            if name in there
        }
        return xr.Dataset(variables, {"step": self.values("history", "step")})

    def _read_all(self) -> None:
        """Every variable once: a file without a checksum, as those of before, shows damage in no other way."""
        for group in self.groups:
            for name in self.names(group):
                self.values(group, name)


def facts(
    pack: str,
    runs: Sequence[str],
    attrs: Mapping[Any, Any],
    history: xr.Dataset,
    table: DivergenceTable,
    design: str = "",
) -> dict[str, Any]:
    """What the index says of a pack (`index.Row`), its file apart."""
    settings = DivergenceSettings(**table.model_dump())
    found = outcomes(history, settings)
    final = found["final_loss"]
    steps = history.sizes["step"]
    made = int(attrs.get("steps_made", steps))
    stuck = no_progress(final, float(attrs.get("unigram_entropy", math.nan)), settings.progress_margin)
    return {
        "pack": pack,
        "design": design,
        "text": str(attrs["dataset_sha256"]),
        "size": int(attrs["pack_size"]),
        "device": str(attrs["device"]),
        "seconds": float(attrs["seconds"]),
        "first_step": float(attrs["seconds_first_step"]),
        "ended": 0 if made == steps else made,
        "runs": " ".join(runs),
        "rule": rule_of(table),
        "final_loss": " ".join(map(repr, final.values.tolist())),
        "non_finite": _bits(found["first_non_finite_step"].notnull()),
        "no_progress": _bits(stuck),
        "spike": _bits(found["first_spike"].notnull()),
    }


def facts_of(path: Path, table: DivergenceTable) -> dict[str, Any]:
    """`facts` of a pack's file; StudyError where it is damaged."""
    pack = PackFile(path)
    try:
        return facts(path.stem, pack.runs, pack.attrs, pack.history(), table)
    except DAMAGE as error:
        raise damaged(path, error) from None


def _bits(found: xr.DataArray) -> str:
    return "".join("01"[bool(one)] for one in found.values)
