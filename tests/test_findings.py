"""The page of findings, held to studies whose answers are known: histories made by hand, every expected number by arithmetic.

A recipe that ends exactly 0.1 nats higher must be said to do so, three diverged runs of twenty must be three of twenty, and what
is not there, not finished or not finite must be said and never crash.
"""

from __future__ import annotations

import io
import math
import re
import shutil
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from click.testing import CliRunner
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy import stats

from exmy.findings import canvas
from exmy.findings.bits import series_of
from exmy.findings.canvas import plain
from exmy.findings.make import PAGE, RESULTS, main, make
from exmy.findings.rates import rate_drawings
from exmy.findings.rows import condition_drawings
from exmy.findings.rules import rule
from exmy.findings.studies import STUDIES, Evidence, Numerics, load, numerics_of
from exmy.findings.text import FINDINGS, OPEN
from tests.synthetic_evidence import ENTROPY, make_study
from tests.test_figure import texts
from train import open_study
from train.claims import Claims
from train.digest import write_digest
from train.named_recipes import NAMED
from train.resolve import resolve_recipe
from train.study import Run

ROOT = Path(__file__).parent.parent
NAN = float("nan")
LIMIT = 150_000  # bytes of a picture
RATES = [2.0**k for k in (-10, -9, -8, -7, -6)]
CURVE = dict(zip(RATES, (0.2, 0.05, 0.0, 0.05, 0.2), strict=True))
"""Above the best rate's loss, nats: within the window's 0.1 from 2^-9 to 2^-7, two octaves; the mean over rates is 0.1."""


def of_seed(run: Run) -> float:
    return 2.0 + 0.001 * run.seed


def seeds(run: Run) -> float:
    """e8m7 0.1 higher; three of TF32's seeds at a nat above the text's entropy."""
    if run.recipe.name == "native-tf32" and run.seed in (4, 9, 17):
        return ENTROPY + 1
    return of_seed(run) + (0.1 if run.recipe.name == "e8m7" else 0.0)


def mantissa(run: Run) -> float:
    """One bit: 0.1 higher, and lost from 2^-7 on."""
    one = run.recipe.name == "masked-e8m1"
    return NAN if one and run.learning_rate >= RATES[3] else of_seed(run) + CURVE[run.learning_rate] + 0.1 * one


def conditions(run: Run) -> float:
    """0.05 higher as usual; 0.3 without clipping, up to a thousandth of a seed."""
    where = dict(run.extra_axes)
    higher = 0.3 if where["clip"] == math.inf else 0.05
    return of_seed(run) + (0.0 if run.recipe.name == "native-bf16" else higher * (1 + 0.001 * (run.seed % 2)))


def exponent(run: Run) -> float:
    """Five bits train at the divisor of packs, and never at nanoGPT's: half of the runs not finite, the others at the entropy."""
    if run.recipe.name == "masked-e5m7" and run.recipe.loss_scale != 1:
        return NAN if run.seed % 2 else ENTROPY + 0.01
    return of_seed(run) + CURVE[run.learning_rate]


def flushed(run: Run, which: str, role: str) -> float:
    return 0.25 if (which, role) == ("flushed", "gradient") and run.recipe.name == "masked-e5m7" else 0.0


def rounding(run: Run) -> float:
    name = run.recipe.name
    return of_seed(run) + (0.02 if name.startswith("masked") else -0.01 if name.startswith("stochastic") else 0.0)


def scaling(run: Run) -> float:
    return NAN if run.recipe.name == "e4m7" else of_seed(run) + (0.03 if run.recipe.name == "mx-e4m7" else 0.0)


def size(run: Run) -> float:
    """Half the rate at twice the width for one bit; the baseline at every rate."""
    limit = RATES[3] * 16 / run.model.width
    return NAN if run.recipe.name == "masked-e8m1" and run.learning_rate > limit else of_seed(run)


def grid(recipes: str, count: int, rates: list[float] | None = None) -> str:
    return f"recipe = [{', '.join(repr(name) for name in recipes.split())}]\nlearning_rate = {rates or RATES}\nseed = {count}\n"


OWN = "\n".join(f'[recipes.{n}]\nactivation = "{f}"\nweight = "{f}"\ngradient = "{f}"' for n, f in (
    ("tensor-e4m7", "e4m7@tensor"), ("mx-e4m7", "e4m7@block32:e8m0fnu:rceil")))  # fmt: skip


def make_all(results: Path) -> None:
    make_study(results, "seeds", grid("native-bf16 native-tf32 e8m7", 20, [2**-6]), seeds)
    make_study(results, "mantissa", grid("native-bf16 masked-e8m3 masked-e8m1", 6), mantissa)
    axes = grid("native-bf16 masked-e8m1", 4, [2**-8]) + "clip = [1.0]\nwarmup = [5]\nlayers = [2]"
    more = '[[more]]\nclip = ["none"]\n[[more]]\nwarmup = [0]\n[[more]]\nlayers = [3]\n[[more]]\nclip = ["none"]\nwarmup = [0]'
    make_study(results, "conditions", axes, conditions, more=more)
    axes = grid("native-bf16 masked-e8m7 masked-e5m7", 4) + f"loss_scale = [1.0, {2**-8}]"
    make_study(results, "exponent", axes, exponent, shares=flushed)
    make_study(results, "rounding", grid("native-bf16 e8m3 masked-e8m3 stochastic-e8m3", 4, RATES[2:4]), rounding)
    make_study(results, "scaling", grid("native-bf16 e4m7 tensor-e4m7 mx-e4m7", 4, RATES[2:4]), scaling, more=OWN)
    make_study(results, "size", grid("native-bf16 masked-e8m1", 2) + "width = [16, 32]", size)


CLAIM = """
[[claims]]
name = "{name}"
claim = "{name} holds."
source = "here"
study = "{study}"
recipe = "{recipe}"
baseline = "native-bf16"
statistic = "loss"
expect = "{expect}"
smallest_n = 4
looks = [{look}]
{more}
"""


def claims_file(folder: Path) -> Path:
    """Of one claim each: supported, refuted, undecided, and four that can't be judged."""
    rows = [
        ("F1-loss", "seeds", "e8m7", "higher", 20, ""),
        ("F1-lower", "seeds", "e8m7", "lower", 20, ""),
        ("F2", "mantissa", "masked-e8m3", "higher", 6, ""),
        ("F2-none", "mantissa", "masked-e8m2", "higher", 6, ""),
        ("F3-rate", "exponent", "masked-e5m7", "higher", 4, 'learning_rate = 0.7\nwhere = {loss_scale = "1"}'),
        ("R4", "exponent", "masked-e5m7", "higher", 4, ""),
        ("R1", "elsewhere", "masked-e8m3", "higher", 4, ""),
        ("alone", "rounding", "masked-e8m3", "higher", 8, ""),
    ]
    names = ("name", "study", "recipe", "expect", "look", "more")
    path = folder / "claims.toml"
    path.write_text("".join(CLAIM.format(**dict(zip(names, row, strict=True))) for row in rows))
    return path


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    make_all(folder)
    return folder


@pytest.fixture(scope="module")
def page(results: Path) -> str:
    """Written beside the results, with its pictures; any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return make(results, claims_file(results), results / "findings.md")


def rows(page: str, start: str, study: str = "") -> list[list[str]]:
    """The rows of tables whose first cell begins so, in the section of a study or on the whole page."""
    text = page[page.index(f"### Study `{study}`") :] if study else page
    text = text[: text.index("**What would change our mind.**")] if study else text
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(f"| {start}")]


def exact(k: int, n: int) -> str:
    interval = stats.binomtest(k, n).proportion_ci(0.95, method="exact")
    return f"{k}/{n} [{100 * interval.low:.1f}–{100 * interval.high:.1f} %]"


def test_three_of_twenty_are_three_of_twenty_with_the_exact_interval(page: str) -> None:
    (row,) = rows(page, "`native-tf32`", "seeds")
    assert row[1] == exact(3, 20) == "3/20 [3.2–37.9 %]"
    assert row[2] == "0 · 3 · 0 · 3 of 20"  # non_finite, no_progress, spike, gap
    assert row[3] == "3 / 0"
    assert row[4] == "0.500"  # McNemar's 2 / 2^3, times two recipes
    assert row[5].startswith("+15.0 [")


def test_a_tenth_of_a_nat_is_a_tenth_of_a_nat(page: str) -> None:
    (row,) = rows(page, "`e8m7`", "seeds")
    assert row[1:3] == [exact(0, 20), "0 · 0 · 0 · 0 of 20"]
    assert row[6:] == ["2.1095", "+0.1000 [+0.1000, +0.1000]"]  # the median of 2.100 .. 2.119
    (base,) = rows(page, "**`native-bf16`**", "seeds")
    assert base[6] == "2.0095"


def test_captions_name_marks_at_the_edge_and_odd_axes_only_where_they_are(page: str, tmp_path: Path) -> None:
    words = {name: text for text, name in re.findall(r"^!\[(.*)\]\(findings/([\w-]+)\.png\)$", page, re.MULTILINE)}
    cross = "a cross: half of the runs or more are not finite"
    # What ends as NaN: one bit from 2^-7 on, half of five exponent bits' runs at nanoGPT's divisor, four bits unscaled.
    assert [cross in words[name] for name in ("mantissa-rates", "exponent-rates-1", "exponent-rates-2")] == [
        True,
        False,
        True,
    ]
    assert "a triangle" not in words["mantissa-rates"]
    assert ["trains at no rate" in words[name] for name in ("scaling", "rounding")] == [True, False]
    assert "logarithmic beyond" in words["exponent-signals"]
    # Without clipping six times what else it costs: beyond the axis.
    assert ["an arrow" in words[name] for name in words if name.startswith("conditions")] == [True]
    make_study(tmp_path, "conditions", grid("native-bf16 masked-e8m1", 4, [2**-8]) + "warmup = [0, 5]", of_seed)
    level = load(tmp_path, "conditions")
    assert isinstance(level, Evidence)
    assert ["an arrow" in drawn.words for drawn in condition_drawings(level)] == [False]

    def far(run: Run) -> float:
        return ENTROPY + 3 if run.recipe.name == "masked-e8m1" else of_seed(run)

    make_study(tmp_path, "mantissa", grid("native-bf16 masked-e8m1", 4, RATES[2:4]), far)
    evidence = load(tmp_path, "mantissa")
    assert isinstance(evidence, Evidence)
    drawn = next(rate_drawings(evidence, "mantissa"))
    assert drawn.words.endswith("; at the upper edge a triangle: a median beyond it")
    marks = [line.get_marker() for line in drawn.draw().axes[0].lines]
    assert ("^" in marks, "x" in marks) == (True, False)


def test_a_window_and_a_sensitivity_are_those_of_the_curve(page: str) -> None:
    (base,) = rows(page, "**`native-bf16`**", "mantissa")
    (three,) = rows(page, "`masked-e8m3`", "mantissa")
    (one,) = rows(page, "`masked-e8m1`", "mantissa")
    assert [row[4].split(" [")[0] for row in (base, three, one)] == ["2.0", "2.0", "1.0"]
    assert [row[5].split(" [")[0] for row in (base, three)] == ["0.1000", "0.1000"]
    # 2.3, 2.15, 2.1 and the initial 5.5 twice: their mean above the least
    assert float(one[5].split(" [")[0]) == pytest.approx(
        (2.3 + 2.15 + 2.1 + 11) / 5 - 2.1 + 0.0025 * (3 / 5 - 1), abs=5e-4
    )
    assert one[2] == "12 · 12 · 12 · 18 of 30"  # at 2^-10 it ends 0.3 above the baseline's best: a gap of more than 0.2
    assert one[7].startswith("+0.1000 [")
    assert one[8] == "6"


@pytest.mark.parametrize(
    ("condition", "mean"),
    [
        ("as usual", 0.05),
        ("no clipping", 0.3),
        ("no warm-up", 0.05),
        ("3 layers", 0.05),
        ("no clipping, no warm-up", 0.3),
    ],
)
def test_a_condition_is_named_by_what_it_changes(page: str, condition: str, mean: float) -> None:
    (row,) = [row for row in rows(page, condition, "conditions") if row[0] == condition and len(row) == 8]
    mean *= 1.0005
    half = 3.182446 * mean * 0.001 / 1.0005 * math.sqrt(1 / 3) / 2  # t of 3, the spread of two ones and two zeros
    assert row[3] == f"{mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}]"
    assert row[5] == "4"


def test_failing_runs_are_told_by_divisor_and_by_how_they_ended(page: str) -> None:
    assert rows(page, "`masked-e5m7`, loss scale 2^-8 | 20/20") == [
        ["`masked-e5m7`, loss scale 2^-8", "20/20", "10", "10", "0", "15"]
    ]
    assert not rows(page, "`masked-e5m7`, loss scale 1 | 20/20")
    trains, fails = rows(page, "`masked-e5m7`", "exponent")
    assert (trains[1], trains[7].split(" [")[0]) == (exact(0, 4), "+0.0000")
    assert fails[1] == exact(4, 4)
    assert fails[3:8] == ["not finite", "–", "–", "–", "–"]
    assert "Trained at no learning rate that was tried: `masked-e5m7`." in page


def test_what_is_flushed_is_told_of_each_role(page: str) -> None:
    found = [row for row in rows(page, "`masked-e5m7`, loss scale 1") if len(row) == 7]
    assert found == [["`masked-e5m7`, loss scale 1", "0 [0, 0]", "0 [0, 0]", "25 [25, 25]", *["0 [0, 0]"] * 3]]


def test_roundings_are_held_against_nearest_even(page: str) -> None:
    (masked,) = rows(page, "`masked-e8m3` | `e8m3`", "rounding")
    (stochastic,) = rows(page, "`stochastic-e8m3` | `e8m3`", "rounding")
    assert [row[2].split(" [")[0] for row in (masked, stochastic)] == ["+0.0200", "-0.0100"]


def test_scales_and_sizes_have_their_numbers(page: str) -> None:
    for name, penalty in (("tensor-e4m7", "+0.0000"), ("mx-e4m7", "+0.0300"), ("e4m7", "–")):
        (row,) = rows(page, f"`{name}`", "scaling")
        assert row[7].split(" [")[0] == penalty
    small, large = (row for row in rows(page, "gpt2-2x", "size") if row[2] == "`masked-e8m1`")
    assert small[3:5] == ["2^-7 (0/2)", "2^-6 (2/2)"]
    assert large[3:5] == ["2^-8 (0/2)", "2^-7 (2/2)"]
    assert [row[4] for row in rows(page, "gpt2-2x", "size") if row[2] == "**`native-bf16`**"] == ["beyond the grid"] * 2


def test_claims_are_told_with_their_rules_and_what_came_of_them(page: str) -> None:
    assert "**Our claim, `F1-loss`.** F1-loss holds. *Rule:* the final training loss" in page
    verdicts = {row[1].split("`")[1]: row[-2] for row in rows(page, "[") if row[1].startswith("`")}
    assert verdicts["F1-loss"] == "**supported**"
    assert verdicts["F1-lower"] == "**refuted**"
    assert verdicts["F2"] == "undecided"
    assert verdicts["F2-none"] == "not yet: `masked-e8m2` has no finished run in `mantissa`"
    assert verdicts["F3-rate"].startswith("not yet: native-bf16 has no run at learning rate 0.7; it has")
    assert verdicts["R4"].startswith("not yet: where must name one group of exponent, 2 fit")
    assert verdicts["R1"] == "not yet run"
    assert (
        "**Supported**: +0.100 [+0.100, +0.100] nats/token, 95 % interval over all looks, 20 seeds, Holm p <0.001."
        in page
    )
    assert "**Where we disagree.** `F1-lower`." in page
    assert "**Our result.** Undecided: 4 seeds, and the first look is at 8." in page  # `alone`, among further claims
    assert page.index("## Further claims") < page.index("**Our claim, `alone`.**") < page.index("## Still open")


def test_each_study_says_how_it_was_trained(page: str) -> None:
    cells = {row[0]: row[1] for row in rows(page, "", "seeds") if len(row) == 2}
    assert cells["runs"] == "60"
    assert cells["seeds"] == "20 for each recipe, rate and setting"
    assert cells["tokens a run"] == f"{30 * 4 * 12:,}, in 30 steps; {60 * 30 * 4 * 12:,} in all"
    assert cells["batch"] == "4 sequences of 12 tokens"
    # embeddings of 256 bytes and 12 places, two blocks of 12 width^2 and two gains, and the last
    assert cells["model"] == f"gpt2-2x16; {16 * (256 + 12) + 2 * (12 * 16 * 16 + 2 * 16) + 16:,} parameters"
    assert cells["hardware"] == "a pencil; 3.0 minutes of training, 0.3 of them first steps with their compiling"
    assert "exmy 0.1.0, PyTorch 2.11.0, CUDA none, Python 3.12.3; commit 0000" in cells["versions"]
    assert cells["run it again"] == "`make study STUDY=seeds`"
    assert cells["diverged means"].startswith("`no_progress`: final_loss is not below the unigram entropy")


WINDOW = {
    "name": "c", "claim": "c.", "source": "here", "study": "s", "recipe": "a", "baseline": "b", "statistic": "window",
    "expect": "lower", "smallest_n": 4, "looks": [4, 8],
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "window of learning rates, in octaves, within 0.1 nats/token of the recipe's own best, of `a` against `b`: "
             "supported if shown to be lower, refuted if shown to be higher, with p at most 0.05"),
        ({"loss_margin": 1.0}, "within 1 nats/token"),
        ({"statistic": "divergence", "learning_rate": 2**-6}, "runs that diverge, at 2^-6, in pairs of the same seed, of"),
        ({"statistic": "loss"}, "at the rate that is best for `b`, in pairs"),
        ({"statistic": "loss", "where": {"loss_scale": 0.00390625}, "beyond": {"loss_scale": 1}},
         "of `a` against `b`, loss scale 2^-8, less the same at loss scale 1 on the same seeds: supported"),
        ({"statistic": "loss", "expect": "alike", "margin": 0.05}, "if shown to differ by less than 0.05, refuted if"),
        ({"expected": False}, "and at no other number. We expect it not to be supported here."),
    ],
)  # fmt: skip
def test_a_rule_is_said_in_a_sentence(change: dict[str, object], words: str) -> None:
    claims = Claims.model_validate({"claims": [WINDOW | change]})
    assert words in rule(claims.claims[0], claims)


def test_a_digest_gives_the_same_numbers_as_the_packs(page: str, results: Path, tmp_path: Path) -> None:
    """Of the study with signals, of which it keeps four seeds: as many as this one has."""
    folder = tmp_path / "exponent"
    folder.mkdir()
    write_digest(open_study(results / "exponent"), results / "exponent", folder)
    text = make(tmp_path, claims_file(tmp_path), tmp_path / "findings.md")
    same = [row for row in rows(page, "", "exponent") if len(row) > 2]
    assert [row for row in rows(text, "", "exponent") if len(row) > 2] == same
    start, end = "## R4", "**What would change our mind.**"
    ours, theirs = (of[of.index(start) : of.index(end, of.index(start))] for of in (text, page))
    assert ours == theirs
    assert "| kept of it | histories of every 10th step, signals of 4 seeds; all else of all |" in text


def test_what_is_open_is_listed_and_every_finding_is_there(page: str) -> None:
    for finding in FINDINGS:
        assert finding.paper in page
        assert finding.mind in page
    assert OPEN.keys() | {finding.key for finding in FINDINGS} - {"size"} == {
        *(f"F{i}" for i in range(1, 8)), *(f"R{i}" for i in range(1, 8)),
    }  # fmt: skip


DRAWN = (
    "seeds-rates", "seeds-losses", "mantissa-rates", "mantissa-windows", "conditions", "exponent-rates-1", "exponent-rates-2",
    "exponent-signals", "rounding", "scaling", "size",
)  # fmt: skip


def points(axes: Axes, marker: str) -> list[tuple[float, float]]:
    """The points of the panel's lines with this marker, to three digits."""
    return [
        (round(float(x), 3), round(float(y), 3))
        for line in axes.lines
        if line.get_marker() == marker
        for x, y in zip(np.atleast_1d(line.get_xdata()), np.atleast_1d(line.get_ydata()), strict=True)
    ]


def at_bits(axes: Axes, markers: str) -> list[tuple[int, float]]:
    """The same by bits, beside which they may stand; each once."""
    return sorted({(round(x), y) for marker in markers for x, y in points(axes, marker)})


def words(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def shown_right(figure: dict[str, Figure]) -> None:
    """What is drawn is what was made."""
    assert words(figure["seeds-rates"].axes[0]) == ["0/20", "3/20", "0/20"]
    assert words(figure["seeds-losses"].axes[0]) == ["+ 3"]  # far above all others
    assert words(figure["mantissa-rates"].axes[1]) == ["0"] * 13 + ["100"] * 2
    windows, sensitivities = figure["mantissa-windows"].axes
    assert at_bits(windows, "s") == [(1, 1.0), (3, 2.0)]
    assert at_bits(sensitivities, "s")[1] == (3, 0.1)
    (forest,) = figure["conditions"].axes
    assert points(forest, "s") == [(0.05, 0.0), (0.05, 2.0), (0.05, 3.0)]
    assert words(forest) == ["+0.30 [+0.30, +0.30]"] * 2  # far beyond the others
    assert at_bits(figure["exponent-signals"].axes[1], "D") == [(5, 0.25), (8, 0.0)]  # at nanoGPT's divisor
    assert at_bits(figure["rounding"].axes[0], "s^D") == [(3, -0.01), (3, 0.0), (3, 0.02)]
    assert at_bits(figure["scaling"].axes[0], "s^D") == [(4, 0.0), (4, 0.03)]
    assert len(points(figure["scaling"].axes[0], "x")) == 1  # unscaled trains at no rate
    assert [y for _, y in points(figure["size"].axes[0], "s")] == [0.008, 0.004]


def test_a_second_time_nothing_changes_and_nothing_overlaps_or_is_cut_off(
    page: str, results: Path, figures: list[Figure]
) -> None:
    folder = results / "findings"
    before = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    assert {f"findings/{name}" for name in before} == set(re.findall(r"\]\((findings/[\w-]+\.png)\)", page))
    assert len(before) == 11
    assert all(len(content) < LIMIT for content in before.values())
    (folder / "old.png").touch()
    assert make(results, results / "claims.toml", results / "findings.md") == page
    assert {path.name: path.read_bytes() for path in folder.glob("*.png")} == before
    assert len(figures) == 11
    shown_right(dict(zip(DRAWN, figures, strict=True)))
    for figure in figures:
        assert not figure.get_suptitle()
        width, height = figure.get_size_inches() * figure.dpi
        shown = texts(figure)
        boxes = [text.get_window_extent() for text in shown]
        for i, (text, box) in enumerate(zip(shown, boxes, strict=True)):
            assert min(box.x0, box.y0, width - box.x1, height - box.y1) >= 0, text
            for j in range(i):
                assert not box.overlaps(boxes[j]), (text, shown[j])


def test_without_a_study_the_page_says_so_of_each(tmp_path: Path) -> None:
    text = make(tmp_path / "nowhere", claims_file(tmp_path), tmp_path / "findings.md")
    assert "Studies that are here: none." in text
    for name in STUDIES:
        assert f"`{name}`: not yet run. When it has: `make study STUDY={name}`, then" in text
    assert text.count("**Our result.** Not yet run: there is no dataset of") == 8
    assert not (tmp_path / "findings").exists()
    assert "![" not in text


SCENES = {
    "all diverged": (lambda _: NAN, lambda _: True),
    "one seed": (of_seed, lambda run: run.seed == 0),
    "one run": (of_seed, lambda run: run.recipe.name == "e8m1" and run.seed == 1 and run.learning_rate == 2**-8),
}  # fmt: skip


@pytest.mark.parametrize("scene", SCENES)
def test_whatever_is_there_there_is_a_page(scene: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canvas, "DPI", 30)  # drawn all the same, and faster
    loss, finished = SCENES[scene]
    for name in STUDIES:
        axes = grid("e8m7 e8m1", 2, RATES[2:4])
        extra = {
            "conditions": 'clip = [1.0, "none"]',
            "size": "width = [16, 32]",
            "exponent": f"loss_scale = [1.0, {2**-8}]",
        }
        make_study(tmp_path, name, axes + extra.get(name, ""), loss, finished=finished,
                   shares=flushed if name == "exponent" else None, baseline="e8m7")  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = make(tmp_path, claims_file(tmp_path), tmp_path / "findings.md")
    assert "None is missing." in text
    assert not re.search(r"\bnan\b|\binf\b|None(?! is missing| in the claims)", text)
    told = {
        "all diverged": "4/4 | 4 | 0 | 0",
        "one seed": "| runs | 4 of 8; the others are not finished |",
        "one run": "| runs | 1 of 8; the others are not finished |",
    }  # fmt: skip
    assert told[scene] in text
    nothing = "No comparison: e8m7 has no finished run here, so nothing is held against it."
    assert (nothing in text) == (scene == "one run")


def test_a_study_that_only_began_is_said_to_have(tmp_path: Path) -> None:
    make_study(tmp_path, "seeds", grid("native-bf16 e8m7", 3, [2**-6]), seeds, finished=lambda _: False)
    text = make(tmp_path, claims_file(tmp_path), tmp_path / "findings.md")
    assert "`seeds` (begun, and none of its 6 runs is finished)" in text
    assert "**Our result.** Not yet: `seeds` is begun, and none of its 6 runs is finished." in text


def test_a_dataset_without_signals_says_so(results: Path, tmp_path: Path) -> None:
    make_study(tmp_path, "exponent", grid("native-bf16 masked-e5m7", 2) + "loss_scale = [1.0]", of_seed)
    text = make(tmp_path, claims_file(tmp_path), tmp_path / "findings.md")
    assert "What is flushed and clipped is not in the dataset: run it again with `[signals]`." in text
    assert "No run diverged." in text
    assert not (tmp_path / "findings" / "exponent-signals.png").exists()


def test_a_damaged_dataset_or_a_bad_claims_file_is_one_line(results: Path, tmp_path: Path) -> None:
    shutil.copytree(results / "seeds", tmp_path / "seeds")
    (pack, *_) = (tmp_path / "seeds" / "packs").glob("*.nc")
    pack.write_bytes(pack.read_bytes()[:-100])
    for arguments, message in (
        (["--results", tmp_path], "damaged"),
        (["--claims", tmp_path / "none.toml"], "none.toml: No such file"),
        (
            ["--claims", claims_file(tmp_path), "--page", "/proc/none/findings.md", "--results", tmp_path / "none"],
            "/proc/none",
        ),
    ):
        done = CliRunner().invoke(main, ["--page", str(tmp_path / "findings.md"), *map(str, arguments)])
        assert done.exit_code == 2, done.output
        assert message in done.output
        assert "Traceback" not in done.output


def test_the_committed_page_is_made_of_the_committed_studies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So is what `make figures` writes, run where the project is; pictures by name, since their bytes are a font's matter."""
    monkeypatch.setattr(canvas, "DPI", 30)  # drawn all the same, and faster
    page = tmp_path / PAGE.name
    done = CliRunner().invoke(main, ["--results", str(ROOT / RESULTS), "--page", str(page)])
    assert done.exit_code == 0, done.output
    assert (ROOT / PAGE).read_text(encoding="utf-8") == page.read_text(encoding="utf-8"), "run make figures"
    committed = {path.name for path in (ROOT / PAGE).with_suffix("").glob("*")}
    assert committed == {path.name for path in page.with_suffix("").glob("*")}
    assert all(path.stat().st_size < LIMIT for path in (ROOT / PAGE).with_suffix("").glob("*"))


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("native-bf16", Numerics("native", 8, 7, "unscaled", 1.0)),
        ("native-tf32", Numerics("native", 8, 10, "unscaled", 1.0)),
        ("native-fp64", Numerics("native", None, None, "unscaled", 1.0)),
        ("masked-e8m3", Numerics("toward zero", 8, 3, "unscaled", 1.0)),
        ("stochastic-e5m2", Numerics("stochastic", 5, 2, "unscaled", 1.0)),
        ("fp8-row", Numerics("nearest even", 4, 3, "per row", 1.0)),
        ("fp8-hybrid", Numerics("nearest even", None, None, "per tensor", 1.0)),
        ("mxfp8", Numerics("nearest even", 4, 3, "blocks of 32", 1.0)),
        ("int8", Numerics("nearest even", None, None, "per row", 1.0)),
        ("nvfp4", Numerics("mixed", 2, 1, "mixed", 1.0)),
        ("native-fp16-scaled", Numerics("native", 5, 10, "unscaled", None)),
    ],
)
def test_a_recipe_is_sorted_by_its_bits_its_rounding_and_its_scales(name: str, found: Numerics) -> None:
    assert numerics_of(resolve_recipe(name, {})) == found


def test_every_named_recipe_can_be_sorted() -> None:
    assert all(numerics_of(resolve_recipe(name, {})).rounding for name in NAMED)


def test_a_line_joins_only_what_differs_in_the_bits_of_its_axis(tmp_path: Path) -> None:
    make_study(tmp_path, "mantissa", grid("native-bf16 e8m3 e8m1 e5m1 masked-e8m1", 1, RATES[2:3]), of_seed)
    evidence = load(tmp_path, "mantissa")
    assert isinstance(evidence, Evidence)
    series = series_of(evidence.parts[0], evidence.verdicts[0], "native-bf16", "mantissa_bits", "optimum", "rounding")
    assert {name: [point.bits for point in points] for name, points in series.items()} == {
        "nearest even, E8": [1, 3], "nearest even, E5": [1], "toward zero, E8": [1],
    }  # fmt: skip


SCALES = [
    "unscaled", "unscaled, loss scale 2^8", "unscaled, loss scale 2^16", "unscaled, dynamic loss scale", "per tensor", "per row",
    "blocks of 32",
]  # fmt: skip


@pytest.mark.parametrize(
    "labels", [["a"], SCALES, [f"masked-e8m{i}" for i in range(15)], ["a rather long label " * 3] * 3]
)
def test_a_legend_is_no_wider_than_its_figure(labels: list[str]) -> None:
    with matplotlib.rc_context(canvas.SMALL):
        figure, _ = canvas.sheet((2.0,))
        canvas.legend_below(figure, [Line2D([], [], label=plain(label)) for label in labels])
        figure.savefig(io.BytesIO(), format="png")
    box = figure.legends[0].get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.get_size_inches()[0] * figure.dpi


def test_powers_are_raised_in_pictures() -> None:
    assert plain("loss scale 2^-8, $x") == r"loss scale 2⁻⁸, \$x"
