"""What a recipe costs, held to what is worked out by hand: differences of pairs, Student's interval, Holm's p-values.

The expectations are arithmetic on a handful of numbers, tabulated quantiles of t, and SciPy's own paired test, which the code
does not use; the committed study stands for a real one on the command line.
"""

from __future__ import annotations

import io
import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from click.testing import CliRunner, Result
from matplotlib.figure import Figure
from rich.console import Console
from scipy import stats

from exmy.cli import main
from exmy.compare import as_json, comparison_table
from exmy.compare_figure import compare_figure
from exmy.compare_page import findings, notes
from exmy.costs import Comparison, Row, compare
from tests.test_figure import marks, texts
from train import StudyError
from train.paired import holm, paired
from train.stability import divergence

ROOT = Path(__file__).parent.parent
FIRST_LOOK = ROOT / "studies" / "results" / "first-look-cpu"
NAN, INF = float("nan"), float("inf")
T_3 = 3.182446  # the 97.5 % quantile of Student's t with 3 degrees of freedom, from a printed table
ENTROPY = 6.0
STEPS = 30

BASE = [3.0, 3.5, 2.5, 4.0]
APART = [3.1, 3.8, 2.7, 4.4]  # +0.1 +0.3 +0.2 +0.4: mean 0.25, standard deviation sqrt(0.05 / 3)


def make_study(
    losses: dict[str, list[float]],
    rates: tuple[float, ...] = (1e-3,),
    datasets: tuple[str, ...] = ("python",),
    planned: int | None = None,
    worse: float = 0.0,
) -> xr.DataTree:
    """A study whose recipes end in these validation losses, by seed; training losses lie 0.5 below.

    The seeds of every rate and dataset beyond the first have losses that are `worse` times its place higher, for all recipes but
    the first: so a difference is known by the place too.
    """
    rows = [
        (recipe, rate, dataset, seed, loss + (worse * (i + 10 * j) if recipe != next(iter(losses)) else 0.0))
        for recipe, by_seed in losses.items()
        for i, rate in enumerate(rates)
        for j, dataset in enumerate(datasets)
        for seed, loss in enumerate(by_seed)
    ]
    recipe, rate, dataset, seed, loss = (list(column) for column in zip(*rows, strict=True))
    coords: dict[str, Any] = {
        "run": [f"{i:04d}" for i in range(len(rows))],
        "recipe": ("run", recipe), "format": ("run", recipe), "learning_rate": ("run", rate), "dataset": ("run", dataset),
        "init_seed": ("run", seed), "data_seed": ("run", seed), "seed": ("run", seed), "model": ("run", ["m"] * len(rows)),
        "pack_size": ("run", [8 if name == "a" else 16 for name in recipe]),
    }  # fmt: skip
    final = np.array(loss)
    history = xr.Dataset(
        {
            "train_loss": (("run", "step"), np.repeat(final[:, None] - 0.5, STEPS, axis=1)),
            "grad_norm": (("run", "step"), np.ones((len(rows), STEPS))),
            "last_step": ("run", [STEPS - 1] * len(rows)),
        },
        coords | {"step": np.arange(STEPS)},
    )
    evaluation = xr.Dataset(
        {"validation_loss": (("run", "eval_step"), np.stack([np.full(len(rows), 8.0), final], axis=1))},
        coords | {"eval_step": [0, STEPS]},
    )
    summary = divergence(history, ENTROPY, "a").assign(unigram_entropy=("run", [ENTROPY] * len(rows)))
    tree = xr.DataTree.from_dict({"/history": history, "/evaluation": evaluation, "/summary": summary})
    tree.attrs = {"name": "made", "baseline": "a", "runs_planned": planned or len(rows)}
    return tree


def only(comparison: Comparison, recipe: str) -> Row:
    (row,) = [row for row in comparison.rows if row.recipe == recipe]
    return row


def test_a_difference_and_its_interval_by_hand() -> None:
    row = only(compare(make_study({"a": BASE, "b": APART})), "b")
    half = T_3 * math.sqrt(0.05 / 3) / 2
    for cost in (row.validation, row.training):
        assert cost.differences == pytest.approx({"seed 0": 0.1, "seed 1": 0.3, "seed 2": 0.2, "seed 3": 0.4})
        assert cost.difference.mean == pytest.approx(0.25)
        assert cost.difference.low == pytest.approx(0.25 - half, abs=1e-6)
        assert cost.difference.high == pytest.approx(0.25 + half, abs=1e-6)
    assert row.validation.mean == pytest.approx(3.5)
    assert row.training.mean == pytest.approx(3.0)
    assert row.validation.sd == pytest.approx(math.sqrt((0.4**2 + 0.3**2 + 0.8**2 + 0.9**2) / 3))


@pytest.mark.parametrize("n", [2, 3, 8, 40])
def test_it_is_scipys_paired_test(n: int) -> None:
    rng = np.random.default_rng(n)
    base, other = rng.normal(3, 0.1, n), rng.normal(3.05, 0.1, n)
    theirs = stats.ttest_rel(other, base)
    ours = paired(list(other - base))
    assert ours.p == pytest.approx(theirs.pvalue, rel=1e-9)
    assert [ours.low, ours.high] == pytest.approx(list(theirs.confidence_interval(0.95)), rel=1e-9)


def test_runs_of_the_same_bits_cost_nothing_for_sure_and_few_pairs_say_little() -> None:
    same = paired([0.0, 0.0, 0.0])
    assert (same.mean, same.low, same.high, same.p) == (0, 0, 0, 1)
    assert paired([0.5, 0.5]).p == 0
    one = paired([0.5])
    assert one.mean == 0.5
    assert math.isnan(one.low)
    assert math.isnan(one.p)
    assert math.isnan(paired([]).mean)


@pytest.mark.parametrize(
    ("p", "adjusted"),
    [
        (
            [0.01, 0.04, 0.03, 0.005],
            [0.03, 0.06, 0.06, 0.02],
        ),  # 4 x 0.005, 3 x 0.01, 2 x 0.03, then not below what came before
        ([0.6, 0.7], [1.0, 1.0]),
        ([0.02], [0.02]),
        ([NAN, 0.04, 0.01], [NAN, 0.04, 0.02]),  # no test, and none of the two
        ([], []),
    ],
)
def test_holms_p_values_by_hand(p: list[float], adjusted: list[float]) -> None:
    np.testing.assert_allclose(holm(p), adjusted, rtol=1e-12)


def test_all_recipes_of_a_study_are_adjusted_for_together() -> None:
    found = compare(make_study({"a": BASE, "b": APART, "c": [x + 0.001 * i for i, x in enumerate(BASE)]}))
    assert found.comparisons == 2
    assert math.isnan(only(found, "a").validation.difference.p_holm)
    raw = {name: only(found, name).validation.difference.p for name in "bc"}
    small, large = sorted(raw, key=raw.__getitem__)
    assert only(found, small).validation.difference.p_holm == pytest.approx(2 * raw[small])
    assert only(found, large).validation.difference.p_holm == pytest.approx(max(2 * raw[small], raw[large]))


def test_pairs_are_found_by_what_runs_are_not_by_where_they_stand() -> None:
    tree = make_study({"a": BASE, "b": APART})
    order = np.random.default_rng(1).permutation(8)
    shuffled = xr.DataTree.from_dict({name: tree[name].to_dataset().isel(run=order) for name in tree.children})
    shuffled.attrs = tree.attrs
    ours = only(compare(shuffled), "b").validation
    assert ours.differences == pytest.approx({"seed 0": 0.1, "seed 1": 0.3, "seed 2": 0.2, "seed 3": 0.4})


def test_a_row_each_learning_rate_and_a_group_each_text() -> None:
    found = compare(make_study({"a": BASE, "b": APART}, rates=(1e-3, 4e-3), datasets=("python", "english"), worse=0.01))
    means = {(row.group, row.learning_rate): row.validation.difference.mean for row in found.rows if row.recipe == "b"}
    assert means == pytest.approx(
        {
            ("dataset python", 1e-3): 0.25, ("dataset python", 4e-3): 0.26,
            ("dataset english", 1e-3): 0.35, ("dataset english", 4e-3): 0.36,
        }
    )  # fmt: skip
    assert found.comparisons == 4
    assert [panel.label for panel in found.panels()][1] == "learning rate 0.004, dataset python"


def test_a_loss_that_is_not_finite_is_named_and_the_others_count() -> None:
    found = compare(make_study({"a": [*BASE[:3], NAN], "b": [INF, *APART[1:]], "c": APART}))
    b, c = only(found, "b"), only(found, "c")
    assert b.lost == ("seed 0",)
    assert b.partner_lost == c.partner_lost == ("seed 3",)
    assert b.validation.finite == 3
    assert b.validation.mean == pytest.approx(np.mean(APART[1:]))
    assert b.validation.differences == pytest.approx({"seed 1": 0.3, "seed 2": 0.2})
    assert c.validation.difference.mean == pytest.approx(0.2)
    told = list(notes(found))
    assert "a, 1 of 4 runs (seed 3): the final loss is not finite." in told
    assert "b, 1 of 4 runs (seed 0): the final loss is not finite, so there is no difference." in told
    assert "c, 1 of 4 runs (seed 3): the final loss of a is not finite, so there is no difference." in told
    assert b.diverged == ("seed 0",)


def test_a_recipe_that_is_lost_altogether_keeps_its_row() -> None:
    found = compare(make_study({"a": BASE, "b": [NAN] * 4, "c": APART}))
    b = only(found, "b")
    assert b.validation.finite == 0
    assert math.isnan(b.validation.difference.mean)
    assert found.comparisons == 1
    (panel,) = found.panels()
    assert [row.recipe for row in panel.rows] == ["b", "c"]
    assert any("4 of 4 runs (seed 0, seed 1, seed 2, seed 3)" in note for note in notes(found))


def test_a_shorter_runs_final_loss_is_its_own_last() -> None:
    tree = make_study({"a": BASE, "b": APART})
    history, evaluation = tree["history"].to_dataset(), tree["evaluation"].to_dataset()
    longer = evaluation.reindex(eval_step=[0, STEPS, 2 * STEPS])
    longer["validation_loss"][:, 2] = np.where(evaluation["recipe"].values == "a", NAN, 1.0)
    tree["evaluation"] = xr.DataTree(longer)
    tree["history"] = xr.DataTree(history)
    assert only(compare(tree), "b").validation.difference.mean == pytest.approx(0.25)


def test_runs_without_a_partner_are_counted() -> None:
    tree = make_study({"a": BASE, "b": APART}, planned=8)
    kept = [i for i in range(8) if i != 1]  # the baseline's second seed is not finished
    part = xr.DataTree.from_dict({name: tree[name].to_dataset().isel(run=kept) for name in tree.children})
    part.attrs = tree.attrs
    found = compare(part)
    assert found.missing == 1
    assert only(found, "b").unpaired == ("seed 1",)
    assert len(only(found, "b").validation.differences) == 3
    first, second, *_ = notes(found)
    assert first.startswith("Unfinished: 1 of the study's 8 runs are missing here")
    assert second == "b, 1 of 4 runs (seed 1): no finished run of a to pair with."


def test_a_rate_without_the_baseline_is_shown_without_differences(drawn: Any) -> None:
    tree = make_study({"a": BASE, "b": APART}, rates=(1e-3, 4e-3))
    summary = tree["summary"].to_dataset()
    kept = ~((summary["recipe"].values == "a") & (summary["learning_rate"].values == 4e-3))
    part = xr.DataTree.from_dict({name: tree[name].to_dataset().isel(run=kept) for name in tree.children})
    part.attrs = tree.attrs
    found = compare(part)
    _, without = found.panels()
    assert without.baseline is None
    assert without.rows[0].unpaired == ("seed 0", "seed 1", "seed 2", "seed 3")
    assert without.rows[0].validation.mean == pytest.approx(3.5)
    assert found.comparisons == 1
    assert [text.get_text() for text in drawn(found).axes[2].texts] == ["no pair with finite losses"]


@pytest.mark.parametrize(
    ("losses", "baseline", "message"),
    [
        ({"a": BASE, "b": APART}, "absent", "baseline 'absent' has no finished run in this study; there are a, b"),
        ({"e8m7": BASE, "e4m3": APART}, "e8m8", "did you mean 'e8m7'"),
        ({"a": BASE[:1], "b": APART[:1]}, "a", "at least 2 pairs of runs with finite losses, and no recipe has more than 1"),
        ({"a": BASE}, "a", "no recipe has more than 0 with 'a'"),
        ({"a": BASE, "b": [3.0, NAN, NAN, NAN]}, "a", "no recipe has more than 1 with 'a'"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused_in_a_line(
    losses: dict[str, list[float]], baseline: str, message: str
) -> None:
    with pytest.raises(StudyError, match=message) as refusal:
        compare(make_study(losses), baseline)
    assert "\n" not in str(refusal.value)


def test_recipes_trained_at_other_rates_are_not_told_to_take_more_seeds() -> None:
    tree = make_study({"a": BASE, "b": APART})
    summary = tree["summary"].to_dataset()
    rate = np.where(summary["recipe"].values == "a", 0.0019, 0.006)
    for name in ("summary", "evaluation"):
        tree[name] = xr.DataTree(tree[name].to_dataset().assign_coords(learning_rate=("run", rate)))
    with pytest.raises(StudyError, match=r"it was trained at 0\.0019, the others at 0\.006$"):
        compare(tree, "a")


def test_any_recipe_may_be_the_baseline() -> None:
    tree = make_study({"a": BASE, "b": APART})
    assert only(compare(tree, "b"), "a").validation.difference.mean == pytest.approx(-0.25)


def test_what_follows_is_said_by_rule() -> None:
    lower, even = [x - 1 - 0.001 * i for i, x in enumerate(BASE)], [x + 0.01 * (-1) ** i for i, x in enumerate(BASE)]
    found = compare(make_study({"a": BASE, "b": APART, "c": lower, "d": even, "e": [7.0, 7.1, 7.0, 7.2]}))
    (panel,) = found.panels()
    first, second, *_, last = findings(found, panel)
    # p of b is 0.03, and of four; those of c and e are far below
    assert "higher `b` +0.2500, `e` +3.8250; lower `c` -1.0015. After Holm's adjustment still apart: `e`, `c`." in first
    assert "SD of a's own runs is 0.6455" in first
    assert "for 1 of 4: `d`" in second
    assert "still allow up to +0.0184 (`d`)" in second  # 3.182 x 0.011547 / 2
    assert last == "Diverged: `e` 4/4; no other."


def test_the_table_of_many_recipes_fits_80_columns() -> None:
    losses = {"a": BASE} | {f"fp8-hybrid-unscale{i}": APART for i in range(9)} | {"lost": [NAN] * 4}
    found = compare(make_study(losses))
    (panel,) = found.panels()
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(comparison_table(found, panel))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("+0.2500 ±0.2054" in line for line in lines) == 9
    assert any(line.startswith("fp8-hybrid-unscale3 ") for line in lines)
    assert any(line.startswith("lost ") and line.split()[-1] == "4/4" for line in lines)


def test_json_has_every_number_and_null_for_none() -> None:
    found = compare(make_study({"a": BASE, "b": APART, "c": [NAN] * 4}))
    read = json.loads(as_json(found), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert read["rows"][1]["validation"]["difference"]["mean"] == pytest.approx(0.25)
    assert read["rows"][2]["validation"]["difference"]["mean"] is None
    assert read["rows"][2]["lost"] == ["seed 0", "seed 1", "seed 2", "seed 3"]
    assert [row["recipe"] for row in read["rows"]] == ["a", "b", "c"]


@pytest.fixture
def drawn(figures: list[Figure], tmp_path: Path) -> Any:
    """Draws a comparison; gives back the figure, laid out. Any warning is an error."""

    def draw(comparison: Comparison) -> Figure:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            compare_figure(comparison, tmp_path / "compare.png")
        return figures[-1]

    return draw


def test_the_figure_shows_every_seed_or_says_why_not(drawn: Any) -> None:
    near = {f"n{i}": [x + 0.01 * (-1) ** (i + j) for j, x in enumerate(BASE)] for i in range(5)}
    far = [x + 2.5 + 0.1 * i for i, x in enumerate(BASE)]
    figure = drawn(
        compare(make_study({"a": BASE, **near, "far": far, "low": [x - 2 for x in BASE], "lost": [NAN] * 4}))
    )
    for axes in figure.axes:
        words = [text.get_text() for text in axes.texts]
        assert words == [
            "2.65 higher, seeds +2.50 to +2.80",
            "2.00 lower, seeds -2.00 to -2.00",
            "no pair with finite losses",
        ]
        assert marks(axes, ">") == marks(axes, "<") == 1
        dots = [line for line in axes.lines if line.get_marker() == "o" and line.get_markersize() < 5]
        assert sum(len(np.atleast_1d(line.get_xdata())) for line in dots) == 5 * 4
        low, high = axes.get_xlim()
        assert low < 0 < high < 0.1
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[-3:] == ["far (1/4 diverged)", "low", "lost (4/4 diverged, 4/4 not finite)"]


def test_what_fits_to_one_side_and_not_to_the_other_is_an_arrow_too(drawn: Any) -> None:
    small = {f"n{i}": [x + 0.01 * (-1) ** j for j, x in enumerate(BASE)] for i in range(4)}
    reach = 0.01 * 3.182446 * 2 / math.sqrt(3) / 2  # of each small one's interval: t s / √n
    wide = [x + 4 * reach for x in BASE]  # just inside, so that the axis goes far up and hardly down
    beyond = [x - 4.05 * reach for x in BASE]  # no farther from zero than the axis' upper end
    figure = drawn(compare(make_study({"a": BASE, **small, "wide": wide, "beyond": beyond})))
    for axes in figure.axes:
        assert marks(axes, "<") == 1
        assert marks(axes, ">") == 0
        assert -axes.get_xlim()[0] < 4.05 * reach < axes.get_xlim()[1]


def test_a_diverged_seed_is_an_open_dot(drawn: Any) -> None:
    high = [5.95, 6.5, 6.5, 6.5]  # training losses of 5.45 and 6.0, against an entropy of 6 less 0.1
    figure = drawn(compare(make_study({"a": [6.0, 6.4, 6.5, 6.4], "b": high})))
    dots = [line for line in figure.axes[0].lines if line.get_marker() == "o" and line.get_markersize() < 5]
    assert [(len(line.get_xdata()), line.get_markerfacecolor()) for line in dots] == [(1, "#9A9A9A"), (3, "#FFFFFF")]


SCENES: dict[str, dict[str, Any]] = {
    "one recipe": {"losses": {"a": BASE, "b": APART}},
    "no difference at all": {"losses": {"a": BASE, "b": BASE}},
    "many": {"losses": {"a": BASE} | {f"a-rather-long-recipe-{i}": [x + 0.01 * i for x in APART] for i in range(27)}},
    "rates and texts": {"losses": {"a": BASE, "b": APART}, "rates": (1e-3, 4e-3), "datasets": ("python", "english")},
    "far ones": {"losses": {"a": BASE, "b": APART, "c": APART, "d": [x + 30 for x in APART], "e": [x - 30 for x in BASE]}},
    "mathematics": {"losses": {"a": BASE, "$\\frac$": APART}},
}  # fmt: skip


@pytest.mark.parametrize("scene", SCENES)
def test_nothing_in_the_figure_overlaps_or_is_cut_off(drawn: Any, scene: str) -> None:
    figure = drawn(compare(make_study(**SCENES[scene])))
    width, height = figure.get_size_inches() * figure.dpi
    shown = texts(figure)
    boxes = [text.get_window_extent() for text in shown]
    for text, box in zip(shown, boxes, strict=True):
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= width, text
        assert box.y1 <= height, text
    for i, a in enumerate(boxes):
        for j in range(i):
            assert not a.overlaps(boxes[j]), (shown[i], shown[j])


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_the_command_shows_a_table_a_rate_and_writes_what_is_asked_for(tmp_path: Path) -> None:
    page, picture, numbers = tmp_path / "page.md", tmp_path / "picture.png", tmp_path / "numbers.json"
    done = invoke("compare", FIRST_LOOK, "--page", page, "--figure", picture, "--json", numbers)
    assert done.exit_code == 0, done.output
    assert done.output.count("first-look-cpu, learning rate ") == 4
    assert [line for line in done.output.splitlines() if line.endswith((".md", ".png", ".json"))] == [
        str(numbers), str(picture), str(page),
    ]  # fmt: skip
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = page.read_text(encoding="utf-8")
    assert text.count("\n## Learning rate ") == 4
    assert "(picture.png)" in text
    rows = json.loads(numbers.read_text(encoding="utf-8"))["rows"]
    assert len(rows) == 16
    assert all(f"| {row['validation']['mean']:.4f} (" in text for row in rows)
    again = tmp_path / "again.md"
    assert invoke("compare", FIRST_LOOK, "--baseline", "e8m1", "--page", again).exit_code == 0
    assert "--baseline e8m1" in again.read_text(encoding="utf-8")
    assert "![" not in again.read_text(encoding="utf-8")


def test_packs_of_before_are_written_up_too(tmp_path: Path) -> None:
    """They don't say how their text was tokenised, nor how much of it there was."""
    page = tmp_path / "page.md"
    assert invoke("compare", FIRST_LOOK.with_name("first-look-gpu"), "--page", page).exit_code == 0
    text = page.read_text(encoding="utf-8")
    assert "392 runs: 7 recipes, 8 seeds each at learning rate 0.0005, 0.001," in text
    assert "1,000 steps of 2,048 tokens of `python`. The validation loss is over 4,096 held-out tokens," in text
    assert "nan" not in text


def test_a_study_under_way_is_compared_with_a_note(tmp_path: Path) -> None:
    shutil.copytree(FIRST_LOOK, tmp_path / "study")
    text = (tmp_path / "study" / "study.toml").read_text()
    (tmp_path / "study" / "study.toml").write_text(text.replace("    2,\n]", "    2,\n    3,\n]"))
    done = invoke("compare", tmp_path / "study")
    assert done.exit_code == 0, done.output
    assert "Unfinished: 16 of the study's 64 runs are missing here; run the sweep again to go on." in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: there is no such directory; a study directory is what `exmy sweep --out DIR` writes"),
        ([FIRST_LOOK, "--baseline", "e8m2"], "baseline 'e8m2' has no finished run in this study; did you mean 'e8m"),
        ([FIRST_LOOK, "--figure", "picture.gif"], "the picture's name must end in .png, .svg, .pdf, got '.gif'"),
        ([FIRST_LOOK, "--page", "/proc/none/page.md"], "/proc/none/page.md: can't be written"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_status_2(arguments: list[object], message: str) -> None:
    done = invoke("compare", *arguments)
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output
