"""A pack's tree as the bytes of a netCDF-4 file, by a shorter way than xarray's, and deflated by several threads.

A GPU has nothing to do while the last pack's file is made. Variables are encoded by xarray's own conventions (fill values,
booleans, strings, which coordinates are whose), and so read back as what they were. What is left out is its way to the file,
which looks up each of a hundred small variables dozens of times, ten times the work of creating it, and deflates on one core.
A chunk is whole runs, as they are read, about `CHUNK_BYTES` of them; each is shuffled and deflated in a thread, where zlib and
NumPy's copies don't hold the interpreter.

The file is HDF5 with dimension scales, as netCDF-4 lays down ("NetCDF-4 File Format" in Unidata's File Format Specifications).
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import h5py
import numpy as np
import xarray as xr
from numpy.typing import NDArray
from xarray.conventions import cf_encoder, encode_dataset_coordinates

CHUNK_BYTES = 2**20
LEVEL = 1  # of deflate: more takes far longer, and random digits don't get smaller
THREADS = 8

Block = tuple[h5py.Dataset, int, "Future[bytes]"]


def netcdf(tree: xr.DataTree) -> bytes:
    """The file; every dimension of a group has to have its coordinate there.

    Made in memory: the HDF5 library, writing to a disk that is full, can crash the process.
    """
    with (
        h5py.File("pack.nc", "w", driver="core", backing_store=False, track_order=True) as file,
        ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool,
    ):
        blocks: list[Block] = []
        dimensions = 0
        for node in tree.subtree:
            group = file if node.path == "/" else file.create_group(node.path, track_order=True)
            dimensions += _write(group, node.to_dataset(inherit=False), dimensions, pool, blocks)
        for data, first, block in blocks:
            data.id.write_direct_chunk((first,) + (0,) * (data.ndim - 1), block.result())
        file.attrs["_NCProperties"] = np.bytes_(f"version=2,hdf5={h5py.version.hdf5_version},h5py={h5py.__version__}")
        file.flush()
        content: bytes = file.id.get_file_image()
    return content


def _write(group: h5py.Group, dataset: xr.Dataset, before: int, pool: ThreadPoolExecutor, blocks: list[Block]) -> int:
    """A group; chunks that are still being made go to `blocks`. How many dimensions it has, numbered from `before` on."""
    variables, attrs = cf_encoder(*encode_dataset_coordinates(dataset))
    _describe(group, attrs)
    made = {}
    for name, variable in variables.items():
        values, about = np.asarray(variable.values), dict(variable.attrs)
        fill = about.pop("_FillValue", None)
        made[name] = data = _create(group, name, values, fill)
        for first, block in _blocks(data, values):
            blocks.append((data, first, pool.submit(_deflated, block, data.chunks[0])))
        if fill is not None:
            data.attrs["_FillValue"] = np.array([fill], values.dtype)
        _describe(data, about)
    for number, name in enumerate(dataset.sizes, before):
        made[name].make_scale(str(name))
        made[name].attrs["_Netcdf4Dimid"] = np.int32(number)
    for name, variable in variables.items():
        if name not in variable.dims:
            for axis, dimension in enumerate(variable.dims):
                made[name].dims[axis].attach_scale(made[dimension])
    return len(dataset.sizes)


def _describe(what: h5py.Group | h5py.Dataset, attrs: Mapping[Any, Any]) -> None:
    """Attributes as netCDF has them: text, or arrays of numbers."""
    for name, value in attrs.items():
        what.attrs[name] = value if isinstance(value, str) else np.atleast_1d(value)


def _create(group: h5py.Group, name: str, values: NDArray[Any], fill: Any) -> h5py.Dataset:
    """A variable, with its values where it has one axis, and compressed where it has several."""
    if values.dtype.kind in "UO":
        return group.create_dataset(name, data=values.astype(object), dtype=h5py.string_dtype(), track_order=True)
    if values.ndim < 2 or not values.size:
        return group.create_dataset(name, data=values, fillvalue=fill, track_order=True)
    runs = max(1, min(values.shape[0], CHUNK_BYTES * values.shape[0] // values.nbytes))
    return group.create_dataset(
        name, values.shape, values.dtype, chunks=(runs, *values.shape[1:]), fillvalue=fill, shuffle=True, compression="gzip",
        compression_opts=LEVEL, track_order=True,
    )  # fmt: skip


def _blocks(data: h5py.Dataset, values: NDArray[Any]) -> Iterator[tuple[int, NDArray[Any]]]:
    """The first run of each chunk, and its values."""
    if data.chunks:
        for first in range(0, values.shape[0], data.chunks[0]):
            yield first, values[first : first + data.chunks[0]]


def _deflated(block: NDArray[Any], runs: int) -> bytes:
    """A chunk as HDF5's filters make it: padded to so many runs, the first byte of every number, the second, ..., deflated."""
    whole = np.zeros((runs, *block.shape[1:]), block.dtype)
    whole[: len(block)] = block
    planes = np.ascontiguousarray(whole.view(np.uint8).reshape(-1, block.dtype.itemsize).T)
    return zlib.compress(planes.data, LEVEL)
