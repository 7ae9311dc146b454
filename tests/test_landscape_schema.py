"""The schema catches what is wrong with a dataset, one line each, and lets through what the measures and a study write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

from landscape import (
    LANDSCAPE,
    Variable,
    average_sharpness,
    hidden_sharpness,
    labelled,
    lbfgsb_logit_sharpness,
    sam_sharpness,
    slice_loss,
    smoothed_logit_sharpness,
    validate,
)
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
        ]
    )
    line = slice_loss(square, {"w": draw(2, 4)}, None, w, [0.0, 1.0], run_axis=True)
    return xr.DataTree.from_dict({"/hidden": hidden(), "/balls": balls, "/logits": logits, "/slices": line})


def test_what_the_measures_return_is_valid() -> None:
    tree = whole()
    assert validate(tree) == []
    assert {"hidden_sharpness_lower", "hidden_sharpness_upper"} <= set(tree["hidden"].data_vars)
    assert {"average_sharpness", "average_sharpness_stderr"} <= set(tree["balls"].data_vars)
    assert tree["balls"]["sam_sharpness"].attrs["units"] == "nats"


def test_a_study_is_valid() -> None:
    tree = open_study(ROOT / "studies" / "results" / "first-look-cpu")
    assert "logit_sharpness" in tree["sharpness"].data_vars
    assert validate(tree) == []


def test_a_file_loses_nothing(tmp_path: Path) -> None:
    tree = whole()
    tree["hidden"].variables["hidden_sharpness_lower"].values[0, 1, 0] = np.nan
    tree.to_netcdf(tmp_path / "tree.nc", engine="h5netcdf")
    with xr.open_datatree(tmp_path / "tree.nc", engine="h5netcdf") as back:
        assert validate(back) == []
        for node in tree.subtree:
            xr.testing.assert_identical(back[node.path].to_dataset(), node.to_dataset())
            for name, variable in node.to_dataset().variables.items():
                assert back[node.path].to_dataset()[name].dtype == variable.dtype


def test_a_zarr_store_loses_nothing(tmp_path: Path) -> None:
    pytest.importorskip("zarr")
    tree = whole()
    tree.to_zarr(tmp_path / "tree.zarr", consolidated=False)
    with xr.open_datatree(tmp_path / "tree.zarr", engine="zarr", consolidated=False) as back:
        assert validate(back) == []
        for node in tree.subtree:
            xr.testing.assert_identical(back[node.path].to_dataset(), node.to_dataset())


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


def test_every_row_says_what_it_is() -> None:
    for name, row in LANDSCAPE.items():
        assert row.units, name
        assert row.long_name, name
        assert row.source, name
        assert set(row.optional) <= set(row.dims), name
        assert set(row.dims) <= LANDSCAPE.keys() | {"run"}, name
