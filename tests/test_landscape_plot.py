"""Pictures say what the datasets say: the values, their errors, their units, and what is missing; `.exmy` only forwards."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import same_color
from matplotlib.figure import Figure

import landscape.plot
from landscape import CURVATURE, LANDSCAPE, LandscapeError, labelled, validate
from landscape.evaluate import Bracket, Estimate
from landscape.looks import COLOURS

RHO = [0.01, 0.1, 1.0]
VALUES = np.array([[1.0, 2.0, 3.0], [2.0, 4.0, 8.0]])


def drawn(ax: Axes, path: Path) -> Axes:
    """The axes, drawn in earnest."""
    assert isinstance(ax.figure, Figure)
    ax.figure.savefig(path / "drawn.png")
    return ax


def points(line: Any) -> npt.NDArray[np.float64]:
    return np.asarray(line.get_xydata(), dtype=np.float64)


def texts(ax: Axes) -> list[str]:
    legend = ax.get_legend()
    return [] if legend is None else [text.get_text() for text in legend.get_texts()]


def average(values: Any = VALUES) -> xr.Dataset:
    result = Estimate(torch.tensor(values), 0.1 * torch.tensor(values), 5)
    return labelled("average_sharpness", result, ("run", "rho"), {"rho": RHO}, units="nats")


def bracket() -> xr.Dataset:
    lower = torch.tensor(VALUES[0])
    result = Bracket(lower, 1.5 * lower, torch.ones(3, dtype=torch.bool), torch.ones(3, dtype=torch.int64))
    return labelled("hidden_sharpness", result, ("epsilon",), {"epsilon": [1e-4, 1e-3, 1e-2]})


def pack(values: Any, **coords: Any) -> xr.Dataset:
    """Sharpness of a study (run, probe_step), with coordinates of the runs."""
    n = len(values)
    steps = np.arange(np.shape(values)[1])
    row = LANDSCAPE["logit_sharpness"]
    data = xr.Dataset(
        {"logit_sharpness": (("run", "probe_step", "epsilon"), np.asarray(values, float)[..., None], row.attrs())},
        {"probe_step": ("probe_step", steps, LANDSCAPE["probe_step"].attrs()), "epsilon": ("epsilon", [5e-4])},
    )
    return data.assign(measured=("run", np.ones(n, bool))).assign_coords({k: ("run", v) for k, v in coords.items()})


def test_a_measure_is_drawn_as_it_is_with_names_units_and_its_error(tmp_path: Path) -> None:
    ax = drawn(landscape.plot.against(average(), "average_sharpness"), tmp_path)
    assert ax.get_ylabel().replace("\n", " ") == "average-case sharpness [nats]"
    assert ax.get_xlabel() == "radius of the ball"
    assert ax.get_xscale() == "log"
    for run, container in enumerate(ax.containers):
        line, _, (bars,) = container
        np.testing.assert_array_equal(points(line), np.c_[RHO, VALUES[run]])
        assert isinstance(bars, LineCollection)
        ends = np.array([segment[:, 1] for segment in bars.get_segments()])
        np.testing.assert_allclose(ends, np.c_[0.9 * VALUES[run], 1.1 * VALUES[run]])
    assert texts(ax) == ["run 0", "run 1", "a standard error each way"]


def test_bounds_are_a_band(tmp_path: Path) -> None:
    ax = drawn(bracket().exmy.plot.against("hidden_sharpness"), tmp_path)
    (band,) = [c for c in ax.collections if isinstance(c, PolyCollection)]
    corners = {tuple(v) for v in np.asarray(band.get_paths()[0].vertices).round(9).tolist()}
    assert {(e, v * s) for e, v in zip((1e-4, 1e-3, 1e-2), VALUES[0], strict=True) for s in (1, 1.5)} <= corners
    assert ax.get_ylabel().replace("\n", " ") == "sharpness at a token's final hidden state [percent]"
    assert texts(ax) == ["from the point found to the upper bound"]


def test_eigenvalues_have_their_residuals_as_bars_and_ranks_from_one(tmp_path: Path) -> None:
    rows = {n: CURVATURE[n] for n in ("hessian_eigenvalue", "residual")}
    found = np.array([[3.0, 1.0], [5.0, 4.0]])
    data = xr.Dataset(
        {n: (("run", "rank"), v, rows[n].attrs()) for n, v in zip(rows, (found, 0.1 * found), strict=True)}
    )
    ax = drawn(data.exmy.plot.eigenvalues(), tmp_path)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["1", "2"]
    segments = [s for c in ax.collections if isinstance(c, LineCollection) for s in c.get_segments()]
    np.testing.assert_allclose([s[:, 1] for s in segments], np.c_[0.9 * found.ravel(), 1.1 * found.ravel()])
    assert "a residual each way" in texts(ax)


def test_a_value_that_is_not_finite_is_a_gap_that_the_title_counts(tmp_path: Path) -> None:
    ax = drawn(pack([[1, np.nan, 3], [1, 2, np.inf]]).exmy.plot.against("logit_sharpness", "probe_step"), tmp_path)
    assert ax.get_title("left") == "logit sharpness; not finite: 2 of 6 values"
    assert np.isnan(points(ax.lines[0])[:, 1]).tolist() == [False, True, False]


def test_runs_that_were_not_measured_are_not_drawn(tmp_path: Path) -> None:
    data = pack([[1, 2], [np.nan, np.nan], [3, 4]])
    data["measured"][1] = False
    ax = drawn(data.exmy.plot.against("logit_sharpness", "probe_step"), tmp_path)
    assert [points(line)[:, 1].tolist() for line in ax.lines] == [[1, 2], [3, 4]]
    assert ax.get_title("left") == "logit sharpness"


def test_runs_are_called_by_what_tells_them_apart(tmp_path: Path) -> None:
    data = pack([[1, 2], [3, 4]], recipe=["e4m3", "e4m3"], learning_rate=[1e-3, 2e-3], seed=[0, 0])
    assert texts(drawn(data.exmy.plot.against("logit_sharpness", "probe_step"), tmp_path)) == ["0.001", "0.002"]
    both = data.assign_coords(recipe=("run", ["e4m3", "e8m7"]), seed=("run", [0, 1]), init_seed=("run", [0, 1]))
    assert texts(landscape.plot.against(both, "logit_sharpness", "probe_step")) == ["e4m3, 0.001, 0", "e8m7, 0.002, 1"]


def test_where_there_is_nothing_but_runs_each_is_a_point_by_its_name(tmp_path: Path) -> None:
    row = CURVATURE["gradient_curvature"]
    data = xr.Dataset({"gradient_curvature": ("run", [3.0, 1.0, np.inf], row.attrs())})
    data = data.assign_coords(run=["x", "y", "z"], learning_rate=("run", [1e-3, 2e-3, 4e-3]))
    ax = drawn(data.exmy.plot.against("gradient_curvature"), tmp_path)
    np.testing.assert_array_equal(points(ax.lines[0]), [[0, 3], [1, 1], [2, np.inf]])
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0.001", "0.002", "0.004"]
    assert (ax.get_xlabel(), ax.get_xscale(), ax.lines[0].get_linestyle()) == ("run", "linear", "None")
    assert len(landscape.plot.against(pack(np.ones((20, 1))).isel(probe_step=0), "logit_sharpness", "run").lines) == 1


def test_many_runs_are_thin_lines_under_each_recipes_median_in_which_a_lost_run_counts_as_infinite(
    tmp_path: Path,
) -> None:
    """Three of e8m7's five runs are lost at the second probe: its median there is no number, least of all the two left's."""
    values = np.array([[1, 1], [2, np.nan], [3, np.nan], [4, np.nan], [5, 5], [6, 6], [7, 7], [8, np.nan], [9, 9]])
    recipe = ["e8m7"] * 5 + ["e4m3"] * 4
    ax = drawn(pack(values, recipe=recipe).exmy.plot.against("logit_sharpness", "probe_step"), tmp_path)
    thin, thick = ax.lines[:9], ax.lines[9:]
    assert [line.get_label() for line in thick] == ["e8m7, median of 5", "e4m3, median of 4"]
    assert all(same_color(line.get_color(), COLOURS[r != "e8m7"]) for line, r in zip(thin, recipe, strict=True))
    np.testing.assert_array_equal([points(line)[:, 1] for line in thick], [[3, np.nan], [7.5, 8.0]])
    plain = landscape.plot.against(pack(np.ones((9, 2))), "logit_sharpness", "probe_step")
    assert texts(plain) == ["median of 9 runs"]


def test_the_density_is_the_smoothed_one_with_its_standard_error(tmp_path: Path) -> None:
    nodes = np.array([[[-1.0, 0.0, 2.0], [-1.0, 0.5, 2.0]]])
    rows = {n: CURVATURE[n].attrs() for n in ("node", "weight")}
    weights = np.full((1, 2, 3), 1 / 3)
    data = xr.Dataset(
        {n: (("run", "sample", "lanczos_step"), v, rows[n]) for n, v in zip(rows, (nodes, weights), strict=True)}
    )
    data["node"].attrs["units"] = "nats"
    at = np.linspace(-2, 3, 7)
    ax = drawn(data.exmy.plot.spectral_density(width=0.25, at=at), tmp_path)
    bells = np.exp(-(((at[:, None] - nodes[0][:, None]) / 0.25) ** 2) / 2) / (0.25 * np.sqrt(2 * np.pi)) / 3
    np.testing.assert_allclose(points(ax.lines[0])[:, 1], bells.sum(-1).mean(0), rtol=1e-12)
    (band,) = [c for c in ax.collections if isinstance(c, PolyCollection)]
    error = abs(np.diff(bells.sum(-1), axis=0)[0]) / 2  # of two samples
    vertices = np.asarray(band.get_paths()[0].vertices)
    np.testing.assert_allclose(
        [vertices[vertices[:, 0] == x, 1].max() for x in at], bells.sum(-1).mean(0) + error, rtol=1e-12
    )
    assert (ax.get_xlabel(), ax.get_yscale()) == ("eigenvalue [nats]", "log")
    assert ax.get_ylabel().replace("\n", " ").endswith("[1 /\u00a0nats]".replace(" ", "\u00a0"))
    assert ax.get_title("left") == "spectral density, smoothed by 0.25 nats"
    mass = landscape.plot.spectral_density(data).lines[0]
    assert np.trapezoid(*points(mass).T[::-1]) == pytest.approx(1, abs=1e-2)


def plane(runs: int) -> xr.Dataset:
    alpha, beta = np.linspace(-1, 1, 5), np.linspace(0, 2, 4)
    values = np.broadcast_to(alpha[:, None] ** 2 + 10 * beta, (runs, 5, 4))
    coords = {n: (n, v, LANDSCAPE[n].attrs()) for n, v in (("alpha", alpha), ("beta", beta))}
    attrs = LANDSCAPE["loss_plane"].attrs() | {"units": "nats"}
    return xr.Dataset({"loss_plane": (("run", "alpha", "beta"), values, attrs)}, coords)


def test_a_plane_is_drawn_with_alpha_across_and_beta_up(tmp_path: Path) -> None:
    ax = drawn(plane(3).isel(run=[1]).exmy.plot.loss_plane(levels=20), tmp_path)
    assert ax.get_xlabel() == "step along the direction"
    assert (ax.get_xlim(), ax.get_ylim()) == ((-1, 1), (0, 2))
    assert [a.get_ylabel() for a in ax.figure.axes[1:]] == ["loss over a plane [nats]"]
    # The loss rises upwards: the lowest contour lies at the bottom.
    lowest = np.concatenate([np.asarray(p.vertices) for p in ax.collections[0].get_paths()[:3]])
    assert lowest[:, 1].max() < 1


def test_a_slice_is_marked_where_the_parameters_are(tmp_path: Path) -> None:
    row = LANDSCAPE["loss_slice"]
    alpha = ("alpha", [-1.0, 0.0, 1.0], LANDSCAPE["alpha"].attrs())
    data = xr.Dataset({"loss_slice": ("alpha", [3.0, 1.0, 2.0], row.attrs())}, {"alpha": alpha})
    ax = drawn(data.exmy.plot.loss_slice(), tmp_path)
    assert [points(line)[:, 0].tolist() for line in ax.lines[1:]] == [[0, 0]]
    assert texts(ax) == []


def test_a_picture_can_go_into_axes_of_ones_own() -> None:
    own = landscape.plot.against(average(), "average_sharpness")
    before = len(own.containers)
    assert landscape.plot.against(average(), "average_sharpness", ax=own) is own
    assert len(own.containers) == 2 * before


def test_on_a_tree_the_accessor_finds_the_one_group_and_validates_all() -> None:
    tree = xr.DataTree.from_dict({"/balls": average(), "/hidden": bracket()})
    assert tree.exmy.plot.against("hidden_sharpness").get_xlabel() == "relative half-width of the box"
    assert tree.exmy.validate() == validate(tree) == []
    tree["again"] = xr.DataTree(average())
    with pytest.raises(
        LandscapeError, match=r"one group .* must have average_sharpness, got /balls, /again; choose a node"
    ):
        tree.exmy.plot.against("average_sharpness")
    assert tree["again"].exmy.plot.against("average_sharpness") is not None
    with pytest.raises(LandscapeError, match="must have node or density, got none"):
        tree.exmy.plot.spectral_density()


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (
            lambda: average().exmy.plot.against("sam_sharpness"),
            "no 'sam_sharpness' to draw; the variables are average_sharp",
        ),
        (
            lambda: average().exmy.plot.against("average_sharpness", "alpha"),
            "no dimension 'alpha'; its dimensions are run, rho",
        ),
        (lambda: plane(2).exmy.plot.against("loss_plane"), r"has alpha beside beta; choose with .isel\(alpha=0\)"),
        (lambda: plane(2).exmy.plot.loss_plane(), r"a plane is of one run.*choose with .isel\(run=0\)"),
        (lambda: average().exmy.plot.eigenvalues(), "no eigenvalues among average_sharpness"),
        (lambda: average().exmy.plot.spectral_density(), "no spectral density among"),
        (lambda: average().exmy.plot.loss_plane(), "no loss_plane among"),
    ],
)
def test_what_can_not_be_drawn_is_said_in_one_line(draw: Any, message: str) -> None:
    with pytest.raises(LandscapeError, match=message) as caught:
        draw()
    assert "\n" not in str(caught.value)


def test_matplotlib_is_imported_when_something_is_drawn_and_not_before() -> None:
    """Only `plot` imports it, and nothing of landscape imports `plot` at its top."""
    for path in Path(landscape.plot.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            heavy = {n for n in [module, *names] if n.split(".")[0] == "matplotlib"}
            drawing = module == "landscape.plot" or (module == "landscape" and "plot" in names)
            assert path.name == "plot.py" or not (heavy or drawing), path.name
