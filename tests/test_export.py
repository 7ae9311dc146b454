"""An exported study is the study: every bit, label and attribute; and what is there is not lost to one that fails."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import xarray as xr
from click.testing import CliRunner, Result

from exmy import export
from exmy.cli import main
from tests.test_lazy import Silent, study
from train import lazy, open_study, run_study

pytest.importorskip("zarr")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two kinds, some of which end in NaN."""
    directory = tmp_path_factory.mktemp("exported")
    run_study(study(axes={"seed": 1, "layers": [2]}), directory, "cpu", Silent())
    return directory


def exported(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["export", *map(str, arguments)])


@pytest.mark.parametrize(("option", "name", "engine"), [("--zarr", "s.zarr", "zarr"), ("--netcdf", "s.nc", "h5netcdf")])
@pytest.mark.parametrize("chunk_bytes", [2**26, 1])
def test_a_round_trip(
    option: str, name: str, engine: Any, chunk_bytes: int, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """In one piece, and a run at a time."""
    monkeypatch.setattr(lazy, "CHUNK_BYTES", chunk_bytes)
    done = exported(directory, option, tmp_path / name)
    assert (done.exit_code, done.output) == (0, f"{tmp_path / name}\n")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    whole = open_study(directory)
    assert bool(whole["history"]["train_loss"].isnull().any())
    with xr.open_datatree(tmp_path / name, engine=engine) as tree:
        loaded = tree.load()
    assert set(loaded.children) == set(whole.children)
    assert loaded.attrs == whole.attrs
    for group in whole.children:
        ours, theirs = loaded[group].to_dataset(), whole[group].to_dataset()
        xr.testing.assert_identical(ours, theirs)
        for variable in theirs.variables:
            assert ours[variable].dtype == theirs[variable].dtype
            assert ours[variable].values.tobytes() == theirs[variable].values.tobytes(), f"{group}/{variable}"


def test_what_is_there_is_replaced_only_by_force(directory: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.zarr"
    assert exported(directory, "--zarr", out).exit_code == 0
    (out / "mine").write_text("kept")
    refused = exported(directory, "--zarr", out)
    assert refused.exit_code == 2
    assert refused.output == f"exmy: {out}: there already; name another place, or replace it with --force\n"
    assert (out / "mine").exists()
    assert exported(directory, "--zarr", out, "--force").exit_code == 0
    assert not (out / "mine").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["s.zarr"]


def test_force_is_for_stores_alone(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("dear")
    inside = tmp_path / "store" / "study"
    shutil.copytree(directory, inside)
    (tmp_path / "store" / ".zgroup").write_text("{}")
    refused = exported(inside, "--zarr", tmp_path / "store", "--force")
    assert refused.output == f"exmy: {tmp_path / 'store'}: the study itself lies there; name another place\n"
    for out in (tmp_path / "mine", directory, directory.parent, tmp_path / "mine" / "letter"):
        refused = exported(directory, "--zarr", out, "--force")
        assert refused.exit_code == 2, out
        assert refused.output.count("\n") == 1
    assert (tmp_path / "mine" / "letter").read_text() == "dear"
    assert (directory / "study.toml").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--digest", "x", "--zarr", "x"], "x: named for two exports"),
        (["--netcdf", "x", "--digest", "x"], "x: named for two exports"),
        (["--zarr", "sub/../x", "--netcdf", "x"], "x: named for two exports"),
        (["--zarr", "link/x", "--digest", "sub/x"], "x: named for two exports"),
        (["--zarr", "sub", "--digest", "sub/x"], "sub/x: lies in sub, which is written too"),
        (["--digest", "link", "--netcdf", "sub/x"], "sub/x: lies in link, which is written too"),
    ],
)
def test_two_exports_of_one_place_are_refused_before_any_work(
    options: list[str], said: str, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "link").symlink_to("sub")
    monkeypatch.chdir(tmp_path)
    refused = exported(directory, *options, *(["--force"] if said.startswith("sub") else []))
    assert refused.exit_code == 2
    [line] = refused.output.splitlines()
    assert said in line
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["link", "sub"]


@pytest.mark.parametrize("option", ["--zarr", "--netcdf"])
def test_one_that_fails_leaves_what_was_there(
    option: str, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert exported(directory, option, out).exit_code == 0
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lazy.Packs, "values", full)
    failed = exported(directory, option, out, "--force")
    assert failed.exit_code == 2
    assert (
        failed.output == f"exmy: {out}: can't be written (No space left on device); make room, or name another place\n"
    )
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


def test_without_zarr_a_line_says_how_to_get_it(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    refused = exported(directory, "--zarr", tmp_path / "s.zarr")
    assert (refused.exit_code, refused.output) == (2, "exmy: zarr is not installed: pip install 'exmy[zarr]'\n")
    assert not list(tmp_path.iterdir())


def test_force_replaces_no_file_that_is_another_thing(directory: Path, tmp_path: Path) -> None:
    """The study's own files, its packs, and notes of the user's."""
    (tmp_path / "notes.txt").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    refused = exported(
        directory, "--netcdf", tmp_path / "pipe", "--force"
    )  # without waiting for someone to write into it
    assert "no netCDF file" in refused.output
    pack = next((directory / "packs").glob("*.nc"))
    for out, said in (
        (directory / "study.toml", "no netCDF file, so --force does not replace it"),
        (tmp_path / "notes.txt", "no netCDF file, so --force does not replace it"),
        (pack, "the study's own packs lie there"),
    ):
        before = out.read_bytes()
        refused = exported(directory, "--netcdf", out, "--force")
        assert refused.exit_code == 2
        assert refused.output == f"exmy: {out}: {said}; name another place\n"
        assert out.read_bytes() == before
    mine = tmp_path / "study.nc"
    assert [exported(directory, "--netcdf", mine, "--force").exit_code for _ in range(2)] == [0, 0]


def test_bad_requests_are_refused(directory: Path, tmp_path: Path) -> None:
    assert "name what to write: --zarr OUT, --netcdf OUT.nc, --digest OUT" in exported(directory).output
    assert exported(directory, "--zarr", tmp_path / "no" / "s.zarr").output.endswith("make it, or name another place\n")
    assert "no study.toml here" in exported(tmp_path, "--zarr", tmp_path / "s.zarr").output
    assert export.ZARR_MARKS == (".zgroup", "zarr.json")
