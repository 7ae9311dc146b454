"""A pack's file is a netCDF-4 file like xarray's own: held against what `to_netcdf` writes of the same tree."""

from __future__ import annotations

import io

import h5py
import numpy as np
import pytest
import xarray as xr

from train import pack_writer

RUNS, STEPS = 7, 5
rng = np.random.default_rng(0)


def group(name: str) -> xr.Dataset:
    """All that packs' groups have: floats with NaN, numbers, booleans, text, an index of text, three axes and views of others."""
    loss = rng.standard_normal((STEPS, RUNS)).astype(np.float32)
    loss[2, 3] = np.nan
    loss[4, 0] = np.inf
    return xr.Dataset(
        {
            name: (("run", "step"), loss.T, {"units": "nats", "source": "caf\u00e9"}),
            "deep": (("run", "step", "block"), rng.standard_normal((RUNS, STEPS, 3))),
            "whole": (("run", "step"), rng.integers(-9, 9, (RUNS, STEPS))),
            "last_step": ("run", np.full(RUNS, 4)),
            "measured": ("run", np.arange(RUNS) % 2 == 0),
            "nothing": (("run", "never"), np.zeros((RUNS, 0), np.float32)),
        },
        {
            "run": ("run", np.array([f"r{i}" * (i + 1) for i in range(RUNS)]), {"long_name": "identity"}),
            "recipe": ("run", np.array(["e4m3fn", "", "\u03bc"] + ["x"] * 4)),
            "learning_rate": ("run", np.linspace(0, 1, RUNS)),
            "step": ("step", np.arange(STEPS)),
            "block": ("block", np.array([-1, 0, 1])),
            "never": ("never", np.array([], np.int64)),
        },
    )


def tree() -> xr.DataTree:
    made = xr.DataTree.from_dict(
        {"/history": group("loss"), "/probes/sam": group("sharpness"), "/signals": group("scale")}
    )
    made["history"].attrs["positions"] = "mean over all"
    made.attrs = {f"attribute_{i}": i for i in range(12)} | {
        "text": "two\nlines",
        "empty": "",
        "entropy": 3.5,
        "seconds": 1,
    }
    return made


def read(content: bytes) -> xr.DataTree:
    with xr.open_datatree(io.BytesIO(content), engine="h5netcdf") as opened:
        return opened.load()


@pytest.mark.parametrize("chunk", [1, 40, 100, 2**20])
def test_a_file_says_what_xarrays_own_says(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, dimensions, types, values, attributes and their order; whole chunks, and a last one that is not full."""
    monkeypatch.setattr(pack_writer, "CHUNK_BYTES", chunk)
    wanted = tree()
    ours, theirs = read(pack_writer.netcdf(wanted)), read(bytes(wanted.to_netcdf(engine="h5netcdf")))
    assert ours.identical(wanted)
    assert ours.groups == theirs.groups
    for name in theirs.groups:
        a, b = ours[name].to_dataset(), theirs[name].to_dataset()
        assert (list(a.variables), list(a.attrs.items())) == (list(b.variables), list(b.attrs.items()))
        for variable in b.variables:
            x, y = a[variable], b[variable]
            assert (x.dims, x.dtype, x.attrs) == (y.dims, y.dtype, y.attrs)
            assert x.encoding.get("dtype") == y.encoding.get("dtype")
            assert x.values.tobytes() == y.values.tobytes() or x.dtype.kind == "O"


def test_a_chunk_is_whole_runs_and_is_compressed() -> None:
    """So a file of many steps is no larger than the numbers, and one of zeros far smaller."""
    zeros = xr.Dataset(
        {"loss": (("run", "step"), np.zeros((64, 20_000), np.float32))},
        {"run": np.arange(64), "step": np.arange(20_000)},
    )
    content = pack_writer.netcdf(xr.DataTree.from_dict({"/history": zeros}))
    assert len(content) < 64 * 20_000 * 4 / 10
    with h5py.File(io.BytesIO(content)) as file:
        data = file["history/loss"]
        assert data.chunks == (2**20 // 80_000, 20_000)
        assert (data.compression, data.shuffle) == ("gzip", True)


def test_a_dimension_is_found_by_readers_that_know_hdf5_alone() -> None:
    with h5py.File(io.BytesIO(pack_writer.netcdf(tree()))) as file:
        deep = file["probes/sam/deep"]
        assert [dimension[0].name for dimension in deep.dims] == [
            f"/probes/sam/{name}" for name in ("run", "step", "block")
        ]
        numbers = [
            int(file[f"{group}/{name}"].attrs["_Netcdf4Dimid"])
            for group in ("history", "probes/sam", "signals")
            for name in ("run", "step", "block", "never")
        ]
        assert sorted(numbers) == list(range(12))  # netCDF's are one sequence for the whole file
