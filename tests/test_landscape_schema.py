"""The schema catches what is wrong with a dataset, one line each, and lets through what the measures and a study write."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import torch
import xarray as xr
from dask.base import is_dask_collection
from torch import Tensor

from landscape import (
    CURVATURE,
    LANDSCAPE,
    Problem,
    Variable,
    average_sharpness,
    critical_sharpness,
    gradient_curvature,
    hessian_eigenvalues,
    hidden_sharpness,
    hutchinson_trace,
    labelled,
    lbfgsb_logit_sharpness,
    logit_sharpness,
    preconditioned_eigenvalues,
    sam_sharpness,
    slice_loss,
    smoothed_density,
    smoothed_logit_sharpness,
    spectral_density,
    validate,
    xtrace,
)
from landscape.table import page
from train import open_study

ROOT = Path(__file__).parent.parent


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def square(params: dict[str, Tensor], batch: Any) -> Tensor:
    return params["w"].square().sum(-1)


def hidden() -> xr.Dataset:
    targets = torch.zeros(2, 3, dtype=torch.int64)
    got = hidden_sharpness(draw(2, 3, 4), draw(2, 5, 4), targets, [1e-3, 1e-2])
    return labelled("hidden_sharpness", got, ("run", "position", "epsilon"), {"epsilon": [1e-3, 1e-2]})


def whole() -> xr.DataTree:
    """A group for each kind of measure, as their functions return them."""
    z, t = draw(3, 8), torch.zeros(3, dtype=torch.int64)
    w = {"w": draw(2, 4)}
    sam = sam_sharpness(square, w, rho=[0.1, 0.2], run_axis=True)
    average = average_sharpness(square, w, rho=[0.1, 0.2], run_axis=True)
    dims, rho = ("run", "rho"), {"rho": [0.1, 0.2]}
    balls = xr.merge(
        [
            labelled("sam_sharpness", sam, dims, rho, units="nats"),
            labelled("average_sharpness", average, dims, rho, units="nats"),
        ]
    )
    logits = xr.merge(
        [
            labelled("logit_sharpness_smoothed", smoothed_logit_sharpness(z, t), ("position",)),
            labelled("logit_sharpness_lbfgsb", lbfgsb_logit_sharpness(z, t), ("position",)),
            labelled("token_logit_sharpness", logit_sharpness(z, t), ("position",)),
        ]
    )
    line = slice_loss(square, {"w": draw(2, 4)}, None, w, [0.0, 1.0], run_axis=True)
    plane = slice_loss(square, {"w": draw(4)}, None, {"w": draw(4)}, [0.0, 1.0], {"w": draw(4, seed=1)}, [-1.0, 0.0])
    groups = {"/hidden": hidden(), "/balls": balls, "/logits": logits, "/slices": line, "/slices/plane": plane}
    for where, problem in {
        "/pack": Problem(
            lambda p, b: (p["w"] ** 4 * b).sum(1), w, torch.tensor([[1.0] * 4, [math.nan] * 4]), run_axis=True
        ),
        "/alone": Problem(lambda p, _: p["w"].sum(), {"w": draw(4)}, None, dtype=torch.float64, units="nats"),
    }.items():
        density = spectral_density(problem, 2, 3)
        groups |= {
            f"{where}/largest": hessian_eigenvalues(problem, 2).dataset,
            f"{where}/smallest": hessian_eigenvalues(problem, which="smallest").dataset,
            f"{where}/adam": preconditioned_eigenvalues(problem, problem.tree(1 + problem.point.abs())).dataset,
            f"{where}/trace": hutchinson_trace(problem, 3),
            f"{where}/xtrace": xtrace(problem, 4),
            f"{where}/density": density,
            f"{where}/smoothed": smoothed_density(density, [0.0, 1.0], 0.5),
            f"{where}/gradient": gradient_curvature(problem),
            f"{where}/critical": critical_sharpness(problem, max_forward=5),
        }
    groups["/hidden"]["hidden_sharpness_upper"].values[0, 0, 0] = math.inf
    return xr.DataTree.from_dict(groups)


@pytest.fixture(scope="module")
def tree() -> xr.DataTree:
    return whole()


def identical(found: xr.DataTree, wanted: xr.DataTree) -> None:
    """Values, NaN for NaN, dimensions, coordinates, attributes and dtypes of every group."""
    assert set(found.groups) == set(wanted.groups)
    for node in wanted.subtree:
        back, data = found[node.path].to_dataset(), node.to_dataset()
        xr.testing.assert_identical(back, data)
        for name, variable in data.variables.items():
            assert back[name].dtype == variable.dtype, f"{node.path}/{name}"
        for name, value in data.attrs.items():
            assert isinstance(back.attrs[name], str) == isinstance(value, str), f"{node.path} {name}"


def test_what_the_measures_return_is_valid(tree: xr.DataTree) -> None:
    assert validate(tree) == []
    assert {"hidden_sharpness_lower", "hidden_sharpness_upper"} <= set(tree["hidden"].data_vars)
    assert {"average_sharpness", "average_sharpness_stderr"} <= set(tree["balls"].data_vars)
    assert tree["balls"]["sam_sharpness"].attrs["units"] == "nats"
    exact = tree["logits"]["token_logit_sharpness"]
    assert exact.attrs == LANDSCAPE["token_logit_sharpness"].attrs()
    np.testing.assert_allclose(exact, tree["logits"]["logit_sharpness_smoothed_upper"], rtol=1e-8)


def test_the_groups_here_have_every_kind_of_value(tree: xr.DataTree) -> None:
    """What a file might lose: NaN beside numbers, infinity, booleans, whole numbers, FP32, empty strings."""
    lost = tree["pack/largest"]
    assert lost["hessian_eigenvalue"].isnull().values.tolist() == [[False] * 2, [True] * 2]
    assert np.isinf(tree["hidden"]["hidden_sharpness_upper"]).any()
    kinds = {v.dtype.str[1:] for node in tree.subtree for v in node.to_dataset().variables.values()}
    assert {"b1", "i8", "f4", "f8"} <= kinds
    assert lost.attrs["why"] == ""


def test_a_study_is_valid() -> None:
    tree = open_study(ROOT / "studies" / "results" / "first-look-cpu")
    assert "logit_sharpness" in tree["sharpness"].data_vars
    assert validate(tree) == []


def written(tree: xr.DataTree, folder: Path, engine: str) -> tuple[Path, dict[str, Any]]:
    """The tree in a file, and how to open it."""
    if engine == "zarr":
        pytest.importorskip("zarr")
        tree.to_zarr(folder / "tree.zarr", consolidated=False)
        return folder / "tree.zarr", {"engine": "zarr", "consolidated": False}
    tree.to_netcdf(folder / "tree.nc", engine="h5netcdf")
    return folder / "tree.nc", {"engine": "h5netcdf"}


@pytest.mark.parametrize("engine", ["h5netcdf", "zarr"])
def test_a_file_loses_nothing(tree: xr.DataTree, tmp_path: Path, engine: str) -> None:
    path, how = written(tree, tmp_path, engine)
    with xr.open_datatree(path, **how) as back:
        assert validate(back) == []
        identical(back, tree)


@pytest.mark.parametrize("engine", ["h5netcdf", "zarr"])
def test_a_file_opens_lazily_and_stays_so_until_something_is_asked(
    tree: xr.DataTree, tmp_path: Path, engine: str
) -> None:
    """With dask in chunks, and a scheduler that refuses to work while the schema is checked and a density is smoothed."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was loaded")

    path, how = written(tree, tmp_path, engine)
    with xr.open_datatree(path, chunks={}, **how) as back:
        with dask.config.set(scheduler=refuse):
            assert validate(back) == []
            smoothed = smoothed_density(back["pack/density"].to_dataset(), [0.0, 1.0], 0.5)
            assert all(is_dask_collection(back[f"{where}/trace"]["trace_sample"].data) for where in ("pack", "alone"))
            assert is_dask_collection(smoothed["density"].data)
        with dask.config.set(scheduler="synchronous"):
            xr.testing.assert_identical(smoothed.compute(), tree["pack/smoothed"].to_dataset())
            identical(back.compute(), tree)
            back["alone/density"].exmy.plot.spectral_density()


def without_units(data: xr.Dataset) -> xr.Dataset:
    del data["hidden_sharpness_lower"].attrs["units"]
    return data


def with_units(data: xr.Dataset, name: str, units: str) -> xr.Dataset:
    data[name].attrs["units"] = units
    return data


def without_long_name(data: xr.Dataset) -> xr.Dataset:
    del data["hidden_sharpness_upper"].attrs["long_name"]
    return data


NAMED = dict(LANDSCAPE["logit_sharpness"].attrs())


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (without_units, "hidden_sharpness_lower: units are missing, must be 'percent'"),
        (lambda d: with_units(d, "hidden_sharpness_upper", "1"), "hidden_sharpness_upper: units are '1', must be 'percent'"),
        (lambda d: with_units(d, "epsilon", "m"), "epsilon: units are 'm', must be '1'"),
        (without_long_name, "hidden_sharpness_upper: long_name is missing"),
        (lambda d: d.drop_vars("hidden_sharpness_lower"), "hidden_sharpness_lower: missing beside hidden_sharpness_upper"),
        (lambda d: d.drop_vars("epsilon"), "epsilon: missing coordinate of a dimension"),
        (lambda d: d.assign(hidden_sharpnes=d["hidden_sharpness_lower"]), "hidden_sharpnes: not in the schema"),
        (
            lambda d: d.assign(box_sharpness_stderr=("epsilon", [0.0, 0.0], NAMED)),
            "box_sharpness: missing beside box_sharpness_stderr",
        ),
        (
            lambda d: d.assign(direction_norm=((), 1.0, {"units": "1", "long_name": "x"})).assign(
                measured=("run", [True, True], {"units": "1", "long_name": "x"}), logit_sharpness=("epsilon", [0.0, 0.0], NAMED)
            ),
            "logit_sharpness: dims are (epsilon), must be (run, probe_step, epsilon), those in brackets where there are such",
        ),
        (
            lambda d: d.assign(sam_sharpness=("layer", [0.0], {"units": "nats", "long_name": "x"})),
            "sam_sharpness: dims are (layer), must be ([run], [probe_step], [rho]), those in brackets where there are such",
        ),
    ],
)  # fmt: skip
def test_each_fault_is_one_line(spoil: Callable[[xr.Dataset], xr.Dataset], line: str) -> None:
    data = hidden()
    assert validate(spoil(data)) == [line]


def test_dims_in_another_order_are_a_fault_for_each_variable() -> None:
    data = hidden().transpose("epsilon", "position", "run")
    assert len(validate(data)) == 4
    assert all("dims are (epsilon, position, run)" in line for line in validate(data))


def test_measured_must_be_there_where_a_study_is_padded() -> None:
    line = xr.Dataset(
        {"logit_sharpness": (("run", "probe_step", "epsilon"), np.zeros((1, 1, 1)), NAMED)},
        {n: (n, [0], LANDSCAPE[n].attrs()) for n in ("probe_step", "epsilon")},
    )
    assert validate(line) == ["measured: missing; it tells runs that were measured from padding"]


def test_a_fault_names_its_group_and_others_groups_are_theirs() -> None:
    bad = hidden().drop_vars("epsilon")
    tree = xr.DataTree.from_dict({"/a/b": bad, "/history": xr.Dataset({"train_loss": ("x", [1.0])})})
    assert validate(tree) == ["/a/b/epsilon: missing coordinate of a dimension"]


def test_further_rows_may_be_given() -> None:
    row = Variable(("run",), "1", "a measure of mine", "mine", ("run",))
    good = xr.Dataset({"mine": ((), 1.0, row.attrs()), "mine_stderr": ((), 1.0, row.attrs())})
    assert validate(good, {"mine": row}) == []
    assert validate(good.assign(mine=((), 1.0)), {"mine": row}) == [
        "mine: units are missing, must be '1'",
        "mine: long_name is missing",
    ]


def test_labels_that_do_not_fit_are_refused() -> None:
    got = sam_sharpness(square, {"w": draw(4)}, rho=[0.1])
    with pytest.raises(ValueError, match=r"'sharpness' is not in the schema; its names are"):
        labelled("sharpness", got, ("rho",))
    with pytest.raises(ValueError, match=r"sam_sharpness has 1 axes, got dims \(\)"):
        labelled("sam_sharpness", got)


def test_the_page_is_the_tables() -> None:
    """After a change: python -m landscape.table docs/landscape-schema.md."""
    written = (ROOT / "docs" / "landscape-schema.md").read_text(encoding="utf-8")
    assert written == page()
    for name in LANDSCAPE | CURVATURE:
        (row,) = (line for line in written.splitlines() if line.startswith(f"| `{name}` |"))
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
        assert len(cells) == 5
        assert all(cells)


def test_every_row_says_what_it_is() -> None:
    for name, row in (LANDSCAPE | CURVATURE).items():
        assert row.units, name
        assert row.long_name, name
        assert row.source, name
        assert set(row.optional) <= set(row.dims), name
        assert set(row.dims) <= (LANDSCAPE | CURVATURE).keys() | {"run", "rank", "sample", "lanczos_step"}, name
