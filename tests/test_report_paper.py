"""Figures for papers: as wide as a column, without titles, with every letter inside and large enough to read."""

from __future__ import annotations

import errno
import warnings
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure

from exmy.looks import COLOURS
from exmy.report.paper import COLUMN, paper_figures
from tests.report_page import STUDY, full_tree, loudest, with_coordinates
from tests.test_figure import make_tree, marks, texts
from tests.test_report import SCENES, invoke

ALL = ["verdicts", "divergence", "final-loss", "curves", "lead-times", "quantization-error", "grids"]

LONG = [
    "native-bf16",
    "native-fp16-scaled",
    "stochastic-e8m3",
    "fp8-hybrid-unscaled",
    "fp8-hybrid-delayed",
    "nvfp4-nearest",
]


def draw(tree: Any, folder: Path, *suffixes: str) -> list[Path]:
    """Any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return paper_figures(STUDY, tree, folder, suffixes)


def test_every_figure_is_drawn_in_every_format_that_was_asked_for(tmp_path: Path) -> None:
    written = draw(full_tree(), tmp_path, "pdf", "svg")
    assert [path.name for path in written] == [f"{name}.{suffix}" for name in ALL for suffix in ("pdf", "svg")]
    for path in written:
        assert path.read_bytes()[:5] == {".pdf": b"%PDF-", ".svg": b"<?xml"}[path.suffix]


def test_they_are_single_column_and_bear_no_title(figures: list[Figure], tmp_path: Path) -> None:
    draw(full_tree(), tmp_path, "png")
    assert len(figures) == len(ALL)
    for name, figure in zip(ALL, figures, strict=True):
        assert figure.get_figwidth() == COLUMN == 3.35, name
        assert figure.get_figheight() < 5, name
        assert figure.get_suptitle() == "", name
        assert all(axes.get_title(loc) == "" for axes in figure.axes for loc in ("left", "center", "right")), name
        width, height = figure.get_size_inches() * figure.dpi
        for text in texts(figure):
            assert float(text.get_fontsize()) >= 6, (name, text.get_text())
            box = text.get_window_extent()
            inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1
            assert inside, (name, text.get_text())
        assert any(axes.get_xlabel() for axes in figure.axes), name
    assert matplotlib.image.imread(tmp_path / "curves.png").shape[1] == pytest.approx(COLUMN * 600, abs=1)


def test_long_names_and_many_rates_stay_inside(
    figures: list[Figure], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.test_figure.RECIPES", LONG)
    tree = with_coordinates(make_tree(recipes=6, rates=12, seeds=2, steps=60))
    tree.attrs["baseline"] = LONG[0]
    draw(tree, tmp_path, "png")
    for figure in figures:
        width, height = figure.get_size_inches() * figure.dpi
        for text in texts(figure):
            box = text.get_window_extent()
            inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1
            assert inside, text.get_text()


def test_every_run_has_its_mark(figures: list[Figure], tmp_path: Path) -> None:
    tree = with_coordinates(make_tree())
    draw(tree, tmp_path, "png")
    names = sorted(path.stem for path in tmp_path.iterdir())
    final = figures[["divergence", "final-loss", "curves"].index("final-loss") + ("verdicts" in names)].axes[0]
    summary = tree["summary"].to_dataset()
    loss = summary["final_loss"].values
    assert marks(final, "x") == (~np.isfinite(loss)).sum()
    drawn = sum(marks(final, marker) for marker in ("o", "s", "^", "D", "x"))
    assert drawn == summary.sizes["run"]


def test_curves_mark_the_runs_that_diverged_at_their_step(figures: list[Figure], tmp_path: Path) -> None:
    """By hand, at the one learning rate: losses of 4, of no number and of 99, at steps 10, 20 and 30; and what the marks mean."""
    tree = with_coordinates(make_tree(recipes=2, rates=1, seeds=4, steps=60, fate="train"))
    summary, history = tree["summary"].to_dataset(), tree["history"].to_dataset().transpose("run", "step", ...)
    found = summary["recipe"].values == "e8m7"
    chosen = np.flatnonzero(found)[:3]
    loss, diverged, step = (
        history["train_loss"].values.copy(), np.zeros(found.size, bool), np.full(found.size, np.nan)
    )  # fmt: skip
    for run, at, value in zip(chosen, (10, 20, 30), (4.0, np.nan, 99.0), strict=True):
        loss[run, at:], diverged[run], step[run] = value, True, at
    tree["history"] = xr.DataTree(history.assign(train_loss=(("run", "step"), loss)))
    attrs = summary["diverged"].attrs
    tree["summary"] = xr.DataTree(summary.assign(diverged=("run", diverged, attrs), diverged_step=("run", step)))
    draw(tree, tmp_path, "png")
    curves = next(figure for figure in figures if figure.axes[0].get_ylabel().startswith("training"))
    axes = curves.axes[0]
    points = {
        str(line.get_marker()): np.asarray(line.get_xydata())[0].tolist()
        for line in axes.lines
        if line.get_linestyle() == "None"
    }
    (own,) = set(points) - {"x", "^"}
    edge = axes.get_ylim()[1]
    assert points[own] == pytest.approx([10, 4.0])
    assert (points["x"][0], points["^"][0]) == (20, 30)
    assert points["x"][1] == points["^"][1] == pytest.approx(0.98 * edge)
    said = [text.get_text() for text in curves.legends[0].get_texts()]
    assert said[-3:] == ["open: diverged here", "not finite here", "diverged above"]


def test_probes_medians_leave_out_what_was_not_measured(figures: list[Figure], tmp_path: Path) -> None:
    """By hand: of three seeds one is not probed at step 50, none at 100; the third is lost at step 120, so infinite after it."""
    tree = full_tree(recipes=1, rates=1, seeds=3, fate="train")
    none = np.nan
    values = np.array([[1, none, none, 1, 1, 1, 1], [2, 2, none, 3, none, 2, 2], [3, 4, none, none, none, none, none]])
    sharpness = tree["sharpness"].to_dataset()
    both = np.stack([values, values], axis=2)
    tree["sharpness"] = xr.DataTree(sharpness.assign(logit_sharpness=(("run", "probe_step", "epsilon"), both)))
    history = tree["history"].to_dataset()
    loss = history["train_loss"].values.copy()
    loss[2, 120:] = none
    tree["history"] = xr.DataTree(history.assign(train_loss=(("run", "step"), loss)))
    draw(tree, tmp_path, "svg")
    below = next(figure for figure in figures if figure.axes[0].get_ylabel().startswith("training")).axes[1]
    x, y = np.asarray(below.lines[0].get_xydata()).T
    np.testing.assert_array_equal(x, [0, 50, 150, 200, 250, 300])
    np.testing.assert_array_equal(y, [2, 3, 3, none, 2, 2])  # of 1 and infinity there is no middle


def test_a_run_that_ended_is_not_lost_in_the_median_of_losses(figures: list[Figure], tmp_path: Path) -> None:
    """Two of three seeds end after step 150; a loss is the mean of 300 / 60 steps."""
    tree = with_coordinates(make_tree(recipes=1, rates=1, seeds=3, fate="train"))
    history = tree["history"].to_dataset()
    tree["history"] = xr.DataTree(history.assign(last_step=("run", [299, 150, 150])))
    draw(tree, tmp_path, "svg")
    axes = next(figure for figure in figures if figure.axes[0].get_ylabel().startswith("training")).axes[0]
    y = np.asarray(axes.lines[0].get_ydata())
    loss = history["train_loss"].values.astype(np.float64)
    expected = [np.median(loss[:, 146:151].mean(axis=1)), loss[0, 147:152].mean(), loss[0, 295:].mean()]
    np.testing.assert_allclose(y[[150, 151, 299]], expected)


def test_close_learning_rates_keep_their_runs_and_their_labels_apart(figures: list[Figure], tmp_path: Path) -> None:
    """Rates 4 % apart, beside one four octaves above: each mark stands nearest to its own rate, and no label on another."""
    tree = with_coordinates(make_tree(recipes=3, rates=9, seeds=2, fate="train"))
    close = 2e-3 * np.append(1.04 ** np.arange(8), 16.0)
    for name in ("history", "summary"):
        data = tree[name].to_dataset()
        place = np.round(np.log2(data["learning_rate"].values / 5e-4)).astype(int)
        tree[name] = xr.DataTree(data.assign_coords(learning_rate=("run", close[place])))
    draw(tree, tmp_path, "png")
    final = next(figure for figure in figures if figure.axes[0].get_ylabel().startswith("final")).axes[0]
    summary = tree["summary"].to_dataset()
    for recipe, colour in zip(dict.fromkeys(summary["recipe"].values), ("#000000", *COLOURS), strict=False):
        points = [
            line.get_xdata() for line in final.lines if line.get_linestyle() == "None" and line.get_color() == colour
        ]
        x = np.concatenate([np.asarray(places, dtype=np.float64) for places in points])
        nearest = close[np.abs(np.log(x[:, None] / close)).argmin(axis=1)]
        own = summary["learning_rate"].values[summary["recipe"].values == recipe]
        np.testing.assert_array_equal(np.sort(nearest), np.sort(own))
    shown = [label for label in final.get_xticklabels() if label.get_text()]
    assert [shown[0].get_text(), shown[-1].get_text()] == ["0.002", "0.032"]
    left = [label.get_window_extent().x0 for label in shown]
    assert min(np.diff(left)) > 7 / 72 * final.figure.dpi  # letters of 7 points that lean stand so far apart, or touch


def test_many_recipes_leave_the_figures_their_room(figures: list[Figure], tmp_path: Path) -> None:
    """A legend of 28 names is longer than a figure of few recipes is tall."""
    tree = with_coordinates(make_tree(recipes=8, rates=1, seeds=4))
    for name in ("history", "summary"):
        data = tree[name].to_dataset()
        long = [
            f"{recipe}-of-{seed}" if recipe != "e8m7" else recipe
            for recipe, seed in zip(data["recipe"].values, data["seed"].values, strict=True)
        ]
        tree[name] = xr.DataTree(
            data.assign_coords(recipe=("run", long), seed=("run", np.where(data["recipe"] == "e8m7", data["seed"], 0)))
        )
    draw(tree, tmp_path, "png")
    with_legend = [figure for figure in figures if figure.legends]
    assert len(with_legend) == 2
    for figure in with_legend:
        legend = figure.legends[0].get_window_extent()
        for axes in figure.axes:
            assert axes.get_window_extent().height > 0.8 * figure.dpi
            assert legend.y1 <= axes.get_window_extent().y0


def test_of_the_loudest_layers_alone_there_is_no_figure_of_layers(tmp_path: Path) -> None:
    names = [
        {path.stem for path in draw(tree, tmp_path / at, "svg")}
        for at, tree in (("a", full_tree()), ("b", loudest(full_tree())))
    ]
    assert names[0] - names[1] == {"quantization-error"}
    assert names[1] < names[0]


def test_each_group_has_its_own_files(tmp_path: Path) -> None:
    names = {path.stem for path in draw(with_coordinates(make_tree(recipes=2, datasets=2)), tmp_path, "svg")}
    assert {"final-loss-dataset_python", "final-loss-dataset_prose", "grids"} <= names


@pytest.mark.parametrize("scene", [scene for scene in SCENES if scene not in ("two datasets", "many seeds")])
def test_whatever_became_of_the_runs_they_are_drawn(tmp_path: Path, scene: str) -> None:
    names = {path.stem for path in draw(with_coordinates(make_tree(**SCENES[scene])), tmp_path, "svg")}
    assert {"divergence", "final-loss", "curves"} <= names
    assert "quantization-error" not in names


def test_the_same_study_gives_the_same_file(tmp_path: Path) -> None:
    tree = with_coordinates(make_tree(recipes=2, rates=2))
    first, second = (draw(tree, tmp_path / name, "pdf") for name in ("a", "b"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_figures_that_can_not_be_written_leave_no_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match="No space left"):
        paper_figures(STUDY, full_tree(), tmp_path / "report" / "figures", ["pdf"])
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_them_beside_the_page(tmp_path: Path) -> None:
    study = Path(__file__).parent.parent / "studies" / "results" / "first-look-cpu"
    done = invoke("report", study, "--out", tmp_path, "--format", "svg")
    assert done.exit_code == 0, done.output
    assert str(tmp_path / "figures" / "final-loss.svg") in done.output.split("\n")
    assert (tmp_path / "index.html").exists()
    assert len(done.output.split("\n")) == 1 + 2 + len(
        list((tmp_path / "figures").iterdir())
    )  # nothing but paths is said
