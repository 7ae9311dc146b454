"""The picture of a study: that it is drawn whatever became of the runs, and that no run is left out of it.

What a picture looks like, a test can't say; what it can: every run has its mark, marks say what they should, text does
not overlap and nothing is cut off.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from exmy.figure import highest, reference_rate, smoothed, study_figure
from exmy.looks import recipe_looks
from train.stability import DivergenceSettings, divergence

NAN = float("nan")
ENTROPY = 3.23
START = 5.55  # every curve's first loss, about ln 256
RECIPES = ["e8m7", "e8m3", "e8m1", "e5m7", "e4m7", "e4m3", "careful-fp8", "native-bf16"]


def loss_curve(recipe: int, rate: int, seed: int, steps: int, fate: str) -> Any:
    rng = np.random.default_rng([recipe, rate, seed])
    t = np.arange(steps)
    end = 1.5 + 0.15 * recipe + 0.06 * rate + rng.normal(0, 0.03)
    loss = end + (START - end) * np.exp(-t / (steps / 6)) + rng.normal(0, 0.06, steps)
    if fate == "collapse":
        loss = ENTROPY + (START - ENTROPY) * np.exp(-t / (steps / 20)) + rng.normal(0, 0.06, steps)
    if fate == "nan":
        loss[steps // 2 :] = NAN
    if fate == "explode":
        loss[steps // 3 :] = 40.0 + rng.normal(0, 3, steps - steps // 3)
    return loss


def make_tree(
    recipes: int = 4,
    rates: int = 4,
    seeds: int = 3,
    steps: int = 300,
    datasets: int = 1,
    fate: str = "mixed",
    **attrs: str,
) -> xr.DataTree:
    """A study with known fates: from the fourth recipe on, runs collapse, turn NaN or explode at the higher rates."""
    rows = [(d, r, lr, s) for d in range(datasets) for r in range(recipes) for lr in range(rates) for s in range(seeds)]

    def fate_of(r: int, lr: int, s: int) -> str:
        if fate != "mixed":
            return fate
        bad = ["collapse", "nan", "explode"][(r + s) % 3]
        return bad if (r >= 3 and lr >= 1) or (r == 2 and lr == 3 and s == 0) else "train"

    coords: dict[str, Any] = {
        "recipe": ("run", [RECIPES[r] for _, r, _, _ in rows]),
        "learning_rate": ("run", [5e-4 * 2**lr for _, _, lr, _ in rows]),
        "seed": ("run", [s for *_, s in rows]),
        "dataset": ("run", [["python", "prose"][d] for d, *_ in rows]),
    }
    loss = np.array([loss_curve(r, lr, s, steps, fate_of(r, lr, s)) for _, r, lr, s in rows], np.float32)
    if fate == "nan":
        loss[:] = NAN
    n = len(rows)
    history = xr.Dataset(
        {
            "train_loss": (("run", "step"), loss),
            "grad_norm": (("run", "step"), loss),
            "last_step": ("run", [steps - 1] * n),
        },
        coords | {"step": np.arange(steps)},
    )
    summary = divergence(history, ENTROPY, "e8m7", DivergenceSettings()).assign(unigram_entropy=("run", [ENTROPY] * n))
    tree = xr.DataTree.from_dict({"/history": history, "/summary": summary})
    tree.attrs = {"baseline": "e8m7", "name": "first-look"} | attrs
    return tree


@pytest.fixture
def drawn(figures: list[Figure], tmp_path: Path) -> Any:
    """Draws a tree; gives back the figure, laid out, and its pixels. Any warning is an error."""

    def draw(tree: xr.DataTree) -> tuple[Figure, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            study_figure(tree, tmp_path / "study.png")
        return figures[-1], matplotlib.image.imread(tmp_path / "study.png")

    return draw


def texts(figure: Figure) -> list[Text]:
    """All text that shows, but for tick labels outside of the axes' limits."""
    found = [t for t in figure.findobj(Text) if isinstance(t, Text) and t.get_visible() and t.get_text().strip()]
    hidden = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in axis.get_major_ticks():
                if not low - 1e-12 <= tick.get_loc() <= high + 1e-12:
                    hidden |= {id(tick.label1), id(tick.label2)}
    return [t for t in found if id(t) not in hidden]


def marks(axes: Axes, marker: Any) -> int:
    """How many points of the panel have this marker."""
    return sum(len(np.atleast_1d(line.get_xdata())) for line in axes.lines if line.get_marker() == marker)


SCENES: dict[str, dict[str, Any]] = {
    "one run": {"recipes": 1, "rates": 1, "seeds": 1},
    "one step": {"recipes": 2, "rates": 2, "seeds": 1, "steps": 1},
    "two recipes": {"recipes": 2},
    "the usual": {"recipes": 5, "rates": 4, "seeds": 3},
    "eight recipes, twelve rates": {"recipes": 8, "rates": 12, "seeds": 4},
    "many seeds": {"recipes": 4, "rates": 3, "seeds": 30},
    "two datasets": {"recipes": 4, "datasets": 2},
    "all NaN": {"fate": "nan"},
    "all explode": {"fate": "explode"},
    "no baseline": {"baseline": "absent", "name": ""},
}


@pytest.mark.parametrize("scene", SCENES)
def test_it_is_drawn_and_nothing_overlaps_or_is_cut_off(drawn: Any, scene: str) -> None:
    figure, pixels = drawn(make_tree(**SCENES[scene]))
    assert pixels.shape[1] == 1600
    assert pixels.shape[0] >= 600
    shown = texts(figure)
    boxes = [t.get_window_extent() for t in shown]
    for t, box in zip(shown, boxes, strict=True):
        assert box.x0 >= 0, t
        assert box.y0 >= 0, t
        assert box.x1 <= 1600, t
        assert box.y1 <= pixels.shape[0], t
    rotated = [abs(t.get_rotation() % 90) > 1 for t in shown]  # their boxes are wider than their letters
    for i, a in enumerate(boxes):
        for j in range(i):
            assert (rotated[i] and rotated[j]) or not a.overlaps(boxes[j]), (shown[i], shown[j])


def test_every_run_has_its_mark(drawn: Any) -> None:
    tree = make_tree(recipes=5, rates=4, seeds=3)
    summary = tree["summary"].to_dataset()
    final, diverged = summary["final_loss"].values, summary["diverged"].values
    left = drawn(tree)[0].axes[0]
    looks = recipe_looks(RECIPES[:5], "e8m7")
    own = [line for line in left.lines if line.get_marker() in {look.marker for look in looks.values()}]
    filled = sum(len(line.get_xdata()) for line in own if line.get_markerfacecolor() != "white")
    hollow = sum(len(line.get_xdata()) for line in own if line.get_markerfacecolor() == "white")
    lost, above = ~np.isfinite(final), final > 1.04 * START
    assert lost.any()
    assert above.any()
    assert (diverged & ~lost & ~above).any()
    assert marks(left, "x") == lost.sum()
    assert marks(left, 6) == above.sum()
    assert hollow == (diverged & ~lost & ~above).sum()
    assert filled == (~diverged).sum()
    counted = [int(t.get_text()[:-1]) for t in left.texts if t.get_text().endswith("×")]
    assert sum(counted) == lost.sum()


def test_curves_end_with_a_cross_where_the_loss_stops_being_finite_and_not_where_the_run_does(drawn: Any) -> None:
    tree = make_tree(recipes=1, rates=1, seeds=2, steps=120)
    history = tree["history"].to_dataset()
    history["train_loss"][0, 80:] = NAN
    history["train_loss"][1, 80:] = NAN
    history["last_step"][1] = 79  # the rest is padding
    tree["history"] = xr.DataTree(history)
    right = drawn(tree)[0].axes[1]
    (cross,) = [line for line in right.lines if line.get_marker() == "x" and len(line.get_xdata())]
    assert list(cross.get_xdata()) == [80]


def test_huge_losses_do_not_squeeze_the_axis(drawn: Any) -> None:
    tree = make_tree(recipes=2, rates=2, seeds=2)
    history, summary = tree["history"].to_dataset(), tree["summary"].to_dataset()
    history["train_loss"][:, 100] = 1e30
    summary["final_loss"][0] = 1e30
    tree["history"], tree["summary"] = xr.DataTree(history), xr.DataTree(summary)
    left, right = drawn(tree)[0].axes
    assert left.get_ylim()[1] < 1.2 * math.log(256)
    assert right.get_ylim()[1] < 1.2 * math.log(256)
    assert marks(left, 6) == 1


@pytest.mark.parametrize("vocabulary", [256, 4096, 50257])
def test_the_axis_reaches_up_to_guessing_evenly_whatever_the_vocabulary(vocabulary: int) -> None:
    guess = math.log(vocabulary)
    history = xr.Dataset({"train_loss": (("run", "step"), [[guess, 2.0], [guess + 0.02, 1e30], [NAN, NAN]])})
    runs = xr.Dataset({"unigram_entropy": ("run", [3.2] * 3)})
    assert guess < highest(history, runs) < 1.06 * guess


def test_without_a_first_loss_the_axis_is_the_texts() -> None:
    history = xr.Dataset({"train_loss": (("run", "step"), [[NAN, NAN]])})
    assert highest(history, xr.Dataset({"unigram_entropy": ("run", [3.0])})) == pytest.approx(6.24)
    low = xr.Dataset({"train_loss": (("run", "step"), [[0.5, 0.4]])})
    assert highest(low, xr.Dataset({"unigram_entropy": ("run", [3.0])})) == pytest.approx(3.12)


def test_points_of_different_recipes_do_not_stand_on_each_other(drawn: Any) -> None:
    looks = recipe_looks(RECIPES, "e8m7")
    sides = [look.aside for look in looks.values()]
    assert len(set(sides)) == len(RECIPES)
    assert max(np.abs(sides)) < 0.5  # halfway to the next learning rate
    assert len({(look.colour, look.marker) for look in looks.values()}) == len(RECIPES)
    assert looks["e8m7"].colour == "#000000"


@pytest.mark.parametrize("baseline", ["e8m7", "e4m3"])
def test_the_baseline_is_black_whichever_place_it_has(baseline: str) -> None:
    looks = recipe_looks(RECIPES, baseline)
    assert [name for name, look in looks.items() if look.colour == "#000000"] == [baseline]


def summary_of(rows: list[tuple[str, float, float]]) -> xr.Dataset:
    recipe, rate, loss = zip(*rows, strict=True)
    return xr.Dataset(
        {"final_loss": ("run", list(loss))}, {"recipe": ("run", list(recipe)), "learning_rate": ("run", list(rate))}
    )


def test_the_curves_are_shown_at_the_baselines_best_rate() -> None:
    runs = summary_of([("a", 1e-3, 2.0), ("a", 2e-3, 1.0), ("a", 2e-3, NAN), ("a", 2e-3, NAN), ("b", 4e-3, 0.5)])
    assert reference_rate(runs, "a") == (1e-3, "the best of a")
    assert reference_rate(runs, "absent") == (4e-3, "the best of all")
    assert reference_rate(summary_of([("a", 2e-3, NAN), ("a", 1e-3, NAN)]), "a") == (1e-3, "the lowest")


def test_smoothing_by_hand() -> None:
    loss = np.array([[1.0, 3.0, 5.0, NAN, 7.0, 9.0, 1.0]])
    np.testing.assert_array_equal(smoothed(loss, 2), [[1, 2, 4, NAN, NAN, 8, 5]])
    np.testing.assert_array_equal(smoothed(loss, 1), loss)
    np.testing.assert_array_equal(smoothed(loss, 9), [[1, 2, 3, NAN, NAN, NAN, NAN]])
    spike = np.array([[1.0, 1.0, 1e30, 1.0, 1.0, 1.0]])
    assert smoothed(spike, 2)[0, -1] == 1.0


def test_names_are_not_read_as_mathematics(drawn: Any) -> None:
    tree = make_tree(recipes=1, name="$\\frac$ study")
    figure, _ = drawn(tree)
    assert any("study" in t.get_text() for t in texts(figure))


def test_a_folder_that_is_not_there_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        study_figure(make_tree(recipes=1, rates=1, seeds=1), tmp_path / "absent" / "study.png")


def test_it_leaves_the_readers_own_settings_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 7.5)
    before = dict(matplotlib.rcParams)
    study_figure(make_tree(recipes=1, rates=1, seeds=1), tmp_path / "study.png")
    assert dict(matplotlib.rcParams) == before
