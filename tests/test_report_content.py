"""What goes into the report, number by number: against the study's own arrays, and against numbers worked out by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from exmy.report.content import content
from exmy.report.formulas import diagram, formats_of, grid
from exmy.report.looks import BACKGROUNDS, contrast, page_looks, visible
from exmy.report.packing import bucketed, embedded, packed, packed_steps, rounded, strict, unpacked
from exmy.report.page import render
from exmy.report.series import lost_from
from formats import get_format
from tests.report_page import LONELY, RINGS, ROLES, STUDY, TENSORS, full_tree, numbers, stretched, with_coordinates
from tests.test_figure import ENTROPY, NAN, make_tree
from train import open_study
from train.resolve import resolve_recipe
from train.store import study_of
from train.study_alarms import study_onset

ROOT = Path(__file__).parent.parent
REAL = ROOT / "studies" / "results" / "first-look-gpu"
CLOSE = 2.0**-13  # what rounding to 13 bits may lose of a number


@pytest.fixture(scope="module")
def real() -> tuple[dict[str, Any], xr.DataTree]:
    """The content of the committed study of 392 runs, and the study."""
    tree = open_study(REAL)
    return content([(study_of(REAL), tree)])["studies"][0], tree


@pytest.fixture(scope="module")
def full() -> tuple[dict[str, Any], xr.DataTree]:
    tree = full_tree()
    return content([(STUDY, tree)])["studies"][0], tree


@given(st.lists(st.floats(width=32), min_size=1))
def test_rounding_keeps_thirteen_bits_and_whatever_is_not_finite(values: list[float]) -> None:
    single = np.array(values, np.float32)
    kept = rounded(single)
    finite = np.isfinite(single)
    np.testing.assert_array_equal(kept[~finite], single[~finite])
    assert np.isfinite(kept[finite]).all()
    normal = finite & (np.abs(single) >= 2.0**-126)
    assert (np.abs(kept[normal] / single[normal].astype(np.float64) - 1) <= CLOSE).all()


def test_arrays_are_little_endian_singles_in_their_shape() -> None:
    held = packed(np.array([[1.5, NAN], [-np.inf, 0.1]]))
    assert held["shape"] == [2, 2]
    np.testing.assert_allclose(numbers(held), [[1.5, NAN], [-np.inf, 0.1]], rtol=CLOSE)


@given(st.lists(st.one_of(st.integers(0, 2**24).map(float), st.just(NAN)), min_size=1))
def test_steps_are_packed_to_the_last_digit(steps: list[float]) -> None:
    np.testing.assert_array_equal(unpacked(packed_steps(steps)), steps)


def test_numbers_that_json_lacks_become_null() -> None:
    assert json.dumps(strict({"a": [NAN, float("inf"), np.float64(1.5), np.int64(2)], "b": "</script>"})) == (
        '{"a": [null, null, 1.5, 2], "b": "</script>"}'
    )
    assert re.fullmatch(r"[A-Za-z0-9+/=]+", embedded({"b": "</script>"}))


@given(st.integers(1, 200), st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_a_buckets_low_and_high_are_the_curves_own(steps: int, most: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    curves = rng.normal(size=(3, steps))
    curves[rng.random(curves.shape) < 0.1] = NAN
    middles, parts = bucketed(np.arange(steps, dtype=float), curves, most)
    assert middles.size <= most
    assert (np.diff(middles) > 0).all()
    for name, extreme in (("low", np.fmin), ("high", np.fmax)):
        np.testing.assert_array_equal(extreme.reduce(parts[name], axis=1), extreme.reduce(curves, axis=1))
    # A value of every bucket that lost one is not there; all others' means are those of the bucket.
    width = -(-steps // most)
    cells = [curves[:, i : i + width] for i in range(0, steps, width)]
    np.testing.assert_allclose(parts["mean"], np.stack([np.mean(cell, axis=1) for cell in cells], axis=1))


@given(
    st.integers(1, 60),
    st.integers(1, 20),
    st.lists(st.integers(-1, 59), min_size=1, max_size=4),
    st.integers(0, 2**32 - 1),
)
def test_a_buckets_mean_is_over_what_was_recorded(steps: int, most: int, lasts: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    recorded = np.arange(steps) <= np.array(lasts)[:, None]
    curves = rng.normal(size=recorded.shape)
    curves[rng.random(curves.shape) < 0.1] = NAN
    _, parts = bucketed(np.arange(steps, dtype=float), np.where(recorded, curves, NAN), most, recorded)
    width = -(-steps // most)
    for run, last in enumerate(lasts):
        cells = [curves[run, start : min(start + width, last + 1)] for start in range(0, steps, width)]
        expected = [cell.mean() if cell.size else NAN for cell in cells]
        np.testing.assert_allclose(parts["mean"][run], expected, rtol=1e-12)


def test_a_run_that_ended_is_not_lost_in_its_last_bucket() -> None:
    """By hand, in buckets of two steps: ends after step 2; the same, but without a number there; ends after step 3."""
    curves = np.array([[4.0, 2, 3, NAN, NAN, NAN], [4, 2, NAN, NAN, NAN, NAN], [4, 2, 3, 5, NAN, NAN]])
    recorded = np.arange(6) <= np.array([2, 2, 3])[:, None]
    _, parts = bucketed(np.arange(6.0), curves, 3, recorded)
    np.testing.assert_array_equal(parts["mean"], [[3, 3, NAN], [3, NAN, NAN], [3, 4, NAN]])


def test_a_run_is_lost_where_no_later_loss_is_finite() -> None:
    """By hand: learns; lost at 20; not finite once; lost at its end, 20; ended before padding; never finite; infinite at last."""
    loss = np.array([
        [4.0, 3, 2, 1], [4, 3, NAN, NAN], [4, NAN, 2, 1], [4, 3, NAN, 0], [4, 3, NAN, NAN], [NAN] * 4, [4, 3, 2, np.inf],
    ])  # fmt: skip
    steps = np.array([0.0, 10, 20, 30])
    recorded = steps <= np.array([30, 30, 30, 20, 10, 30, 30])[:, None]
    np.testing.assert_array_equal(lost_from(steps, loss, recorded), [NAN, 20, NAN, 20, NAN, 0, 30])


def test_a_spike_of_one_step_among_thousands_survives(full: tuple[dict[str, Any], xr.DataTree]) -> None:
    curves = np.ones((2, 5000))
    curves[0, 2718], curves[1, 3141] = 77.0, -5.0
    _, parts = bucketed(np.arange(5000.0), curves, 24)
    assert parts["high"][0].max() == 77.0
    assert parts["low"][1].min() == -5.0
    assert (parts["high"] == 1).sum() == parts["high"].size - 1


def test_every_runs_extremes_are_in_the_page(real: tuple[dict[str, Any], xr.DataTree]) -> None:
    study, tree = real
    history = tree["history"].to_dataset()
    for name in ("train_loss", "grad_norm"):
        values = history[name].values
        for part, extreme in (("low", np.nanmin), ("high", np.nanmax)):
            np.testing.assert_allclose(
                extreme(numbers(study["curves"][name][part]), axis=1), extreme(values, axis=1), rtol=CLOSE
            )
    sharpness = {
        signal["name"]: numbers(signal["values"]) for signal in study["signals"] if signal["kind"] == "sharpness"
    }
    own = tree["sharpness"].to_dataset()["logit_sharpness"].sel(epsilon=1e-3)
    np.testing.assert_allclose(sharpness["logit_sharpness at epsilon 0.001"], own.values, rtol=CLOSE)


def test_runs_are_as_the_summary_has_them(real: tuple[dict[str, Any], xr.DataTree]) -> None:
    study, tree = real
    summary = tree["summary"].to_dataset()
    assert study["rate"] == summary["learning_rate"].values.tolist()
    assert study["run"]["diverged"] == summary["diverged"].values.astype(int).tolist()
    assert study["diverged"] == summary["diverged"].sum()
    np.testing.assert_allclose(numbers(study["run"]["final"]), summary["final_loss"].values, rtol=CLOSE)
    np.testing.assert_allclose(numbers(study["run"]["at"]), summary["diverged_step"].values, rtol=CLOSE)
    last = tree["evaluation"].to_dataset()["validation_loss"].isel(eval_step=-1)
    np.testing.assert_allclose(numbers(study["run"]["validation"]), last.values, rtol=CLOSE)
    for facet in ("recipe", "seed", "dataset", "model"):
        column = study["columns"][facet]
        assert [column["values"][i] for i in column["of"]] == summary[facet].values.astype(str).tolist()


def test_a_run_that_was_lost_has_no_validation_loss_from_before(real: tuple[dict[str, Any], xr.DataTree]) -> None:
    """Run 0's evaluations end in NaN; run 1 ends a step before the last evaluation, whose column is padding."""
    tree = real[1].copy()
    evaluation, history = tree["evaluation"].to_dataset().load(), tree["history"].to_dataset().load()
    loss = evaluation["validation_loss"].transpose("run", "eval_step").values.copy()
    assert np.isfinite(loss[:2]).all()
    loss[0, -2:] = loss[1, -1:] = NAN
    last = history["last_step"].values.copy()
    last[1] = evaluation["eval_step"].values[-1] - 2
    tree["evaluation"] = xr.DataTree(evaluation.assign(validation_loss=(("run", "eval_step"), loss)))
    tree["history"] = xr.DataTree(history.assign(last_step=("run", last)))
    shown = numbers(content([(study_of(REAL), tree)])["studies"][0]["run"]["validation"])
    assert np.isnan(shown[0])
    np.testing.assert_allclose(shown[1:], [loss[1, -2], *loss[2:, -1]], rtol=CLOSE)


def test_verdicts_are_those_of_exmy_verdict(real: tuple[dict[str, Any], xr.DataTree]) -> None:
    """The numbers of docs: e4m7 lost all of its 8 pairs, so McNemar's exact p is 2/2^8, and by Holm's steps 6 of those."""
    (group,) = real[0]["groups"]
    cards = {card["recipe"]: card for card in group["verdicts"]["cards"]}
    assert list(cards) == ["e8m7", "e8m3", "e8m1", "e5m7", "e4m7", "e4m3"]
    assert [card["state"] for card in cards.values()] == ["undecided"] * 4 + ["less stable"] * 2
    assert f"(p = {6 * 2 / 2**8:.2g})" in cards["e4m7"]["sentence"]
    assert "of 8 pairs of seeds e4m7 alone diverged in 8" in cards["e4m7"]["sentence"]
    # Clopper and Pearson's 8 of 8: the lower limit is the eighth root of 0.025.
    assert cards["e4m7"]["numbers"]["rate_low"] == pytest.approx(0.025 ** (1 / 8))
    assert cards["e4m7"]["numbers"]["rate_high"] == 1
    summary = real[1]["summary"].to_dataset()
    best = [
        float(
            summary["final_loss"]
            .values[(summary["recipe"].values == name) & (summary["learning_rate"].values == 2e-3)]
            .mean()
        )
        for name in ("e8m1", "native-bf16")
    ]
    assert cards["e8m1"]["numbers"]["loss_penalty"] == pytest.approx(best[0] - best[1], rel=1e-6)


@pytest.mark.parametrize(("baseline", "lost"), [("native-bf16", False), ("e4m7", True)])
def test_a_baseline_that_always_diverges_is_told_before_the_verdicts(baseline: str, lost: bool) -> None:
    """Of 56 runs native-bf16 lost none and e4m7 all, as the README has it."""
    tree = open_study(REAL)
    tree.attrs["baseline"] = baseline
    page = render([(study_of(REAL), tree)])
    assert ("e4m7, the baseline, diverged in all of its 56 runs, so nothing is learnt" in page) == lost
    assert page.index("Is it as stable") < page.index("is undecided")
    if lost:
        assert page.index("diverged in all of its 56") < page.index("is undecided")


def test_shares_intervals_are_those_of_the_verdicts() -> None:
    """Clopper and Pearson 1934: of 2 in 8 the shares of which so many, or so few, come up in 2.5 % of trials; of 0, by hand."""
    limits = content([(STUDY, with_coordinates(make_tree(recipes=1, rates=1, seeds=8)))])["limits"]
    assert len(limits) == 9
    interval = binomtest(2, 8).proportion_ci(0.95, method="exact")
    assert limits[8][2] == pytest.approx([interval.low, interval.high], abs=1e-5)
    assert limits[8][0] == pytest.approx([0, 1 - 0.025 ** (1 / 8)], abs=1e-5)
    assert limits[3][0][0] == 0
    assert limits[3][3][1] == 1
    assert [len(row) for row in limits] == [0, *range(2, 10)]


def test_diverged_runs_stand_at_their_step_with_their_loss(full: tuple[dict[str, Any], xr.DataTree]) -> None:
    study, tree = full
    summary, loss = tree["summary"].to_dataset(), tree["history"].to_dataset()["train_loss"].values
    at, value = numbers(study["run"]["at"]), numbers(study["curves"]["loss_at"])
    for run in np.flatnonzero(summary["diverged"].values):
        assert at[run] == summary["diverged_step"].values[run]
        np.testing.assert_allclose(value[run], loss[run, int(at[run])], rtol=CLOSE)
    assert np.isnan(at[~summary["diverged"].values]).all()


def test_an_alarm_rings_where_its_signal_was_made_to(full: tuple[dict[str, Any], xr.DataTree]) -> None:
    study, tree = full
    summary = tree["summary"].to_dataset()
    lonely = np.logical_and.reduce([summary[name].values == value for name, value in LONELY.items()])
    signal = next(signal for signal in study["signals"] if signal["name"] == "attention_logit")
    rang, lead = numbers(signal["rang"]), numbers(signal["lead"])
    assert rang[lonely].tolist() == [RINGS]
    # The loss explodes at step 100, a third of 300; the last good step lies a few before, since losses are noisy.
    assert 85 - RINGS <= lead[lonely][0] <= 100 - RINGS
    assert np.isnan(np.delete(lead, np.flatnonzero(lonely))).all()
    assert signal["worth"]["detected"] == 1
    assert signal["worth"]["diverged_judged"] == 1
    assert signal["failed"] == summary["diverged"].values.astype(int).tolist()


def test_late_steps_are_as_the_study_has_them() -> None:
    """Steps up to 299 x 3343 = 999,557, of which 13 bits would leave multiples of 128: no run diverges at such a one."""
    tree = stretched(full_tree(), 3343)
    summary = tree["summary"].to_dataset()
    study = content([(STUDY, tree)])["studies"][0]
    at, expected = numbers(study["run"]["at"]), summary["diverged_step"].values
    assert np.nanmax(expected) == 299 * 3343
    np.testing.assert_array_equal(at, expected)
    signal = next(signal for signal in study["signals"] if signal["name"] == "attention_logit")
    lonely = np.logical_and.reduce([summary[name].values == value for name, value in LONELY.items()])
    assert numbers(signal["rang"])[lonely].tolist() == [RINGS * 3343]
    onset = study_onset(tree).values[lonely]
    assert 85 * 3343 <= onset <= 100 * 3343
    np.testing.assert_array_equal(numbers(signal["lead"])[lonely], onset - RINGS * 3343)


@pytest.mark.parametrize("pooled", [False, True])
def test_layers_hold_what_was_recorded(pooled: bool) -> None:
    tree = full_tree(seeds=4)
    if pooled:  # too many numbers to hold each run's
        shown = content([(STUDY, tree)])["studies"][0]["layers"]
        from exmy.report.series import layers

        found = layers(tree, room=4000)
        assert found
        assert len(found["units"]) == 16
        assert shown["units"] == [[run] for run in range(64)]
    else:
        found = content([(STUDY, tree)])["studies"][0]["layers"]
    assert (found["tensors"], found["roles"]) == (list(TENSORS), list(ROLES))
    assert [measure["name"] for measure in found["measures"]] == ["quantization_error", "clipped"]
    values = numbers(found["measures"][0]["values"])
    assert values.shape == (len(found["units"]), len(found["steps"]), 3, 3)
    summary = tree["summary"].to_dataset()
    recipes = ["e8m7", "e8m3", "e8m1", "e5m7"]
    for unit, held in zip(found["units"], values, strict=True):
        place = {recipes.index(name) for name in summary["recipe"].values[unit]}
        (recipe,) = place
        seeds = summary["seed"].values[unit]
        mean = (recipe + 1) * (seeds + 1.0).mean() / 100
        expected = mean * np.array([[0.5 ** (t + 1) * 0.25**r for r in range(3)] for t in range(3)])
        np.testing.assert_allclose(held, np.broadcast_to(expected, held.shape), rtol=CLOSE)


def test_a_diagram_says_what_each_product_takes() -> None:
    """MXFP4 as mxfp4-llm trains: forward products in BF16, backward ones in FP4, gradients rounded stochastically."""
    found = diagram(resolve_recipe("mxfp4", {}))
    blocks, head = found["places"]
    assert blocks["names"] == ["blocks' linears"]
    assert head["names"] == ["LM head"]
    forward, dgrad, wgrad = blocks["products"]
    assert [p["equation"] for p in blocks["products"]] == ["y = x W", "dx = dy Wᵀ", "dW = xᵀ dy"]
    assert [o["format"] for o in forward["operands"]] == ["bf16", "bf16"]
    assert [o["format"].split("@")[0] for o in (*dgrad["operands"], *wgrad["operands"])] == ["e2m1fn"] * 4
    assert {o["rounding"] for o in dgrad["operands"]} == {"stochastic"}
    assert [o["letter"] for p in blocks["products"] for o in p["operands"]] == ["x", "W", "dy", "Wᵀ", "xᵀ", "dy"]
    assert {o["format"] for p in head["products"] for o in p["operands"]} == {"bf16"}
    assert all(p["output"] == "BF16" for place in found["places"] for p in place["products"])


def test_places_that_compute_alike_are_one_diagram() -> None:
    assert [place["names"] for place in diagram(resolve_recipe("e4m3", {}))["places"]] == [
        ["blocks' linears", "LM head"]
    ]
    native = diagram(resolve_recipe("native-bf16", {}))["places"][0]["products"][0]
    assert native["summed"] == "the hardware's own"
    assert sorted({f.name for f in formats_of(resolve_recipe("fp8-hybrid", {}))}) == ["bf16", "e4m3fn", "e5m2"]


def test_grids_are_the_formats_values() -> None:
    """OCP's FP4: 0.5, 1, 1.5, 2, 3, 4, 6; its smallest normal value is 1."""
    four = grid(get_format("e2m1fn"))  # type: ignore[arg-type]
    assert (four["values"], four["normal"], four["bits"]) == ([0.5, 1, 1.5, 2, 3, 4, 6], 1, 4)
    wide = grid(get_format("bf16"))  # type: ignore[arg-type]
    assert (wide["values"], wide["smallest"], wide["normal"]) == ([], 2.0**-133, 2.0**-126)
    assert wide["largest"] == (2 - 2**-7) * 2.0**127


@pytest.mark.parametrize("theme", BACKGROUNDS)
def test_every_recipes_colour_stands_out_from_the_page(theme: str) -> None:
    looks = page_looks([f"r{i}" for i in range(12)], "r0")
    for name, look in looks.items():
        assert contrast(look[theme], BACKGROUNDS[theme]) >= 3.2, name
    assert looks["r0"][theme] == {"light": "#000000", "dark": "#ffffff"}[theme]
    assert visible("#0072B2", "light") == "#0072b2"  # enough as it is
    drawn = {(look[theme], look["symbol"], look["dash"]) for look in looks.values()}
    assert len(drawn) == 12


def test_contrast_is_wcags() -> None:
    """WCAG's ends: black on white is 21, a colour on itself 1; #767676 on white is the grey that just has 4.5."""
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#123456", "#123456") == 1
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)


PAIRS = [
    ("ink", "paper"),
    ("soft", "paper"),
    ("link", "paper"),
    ("good", "good-paper"),
    ("bad", "bad-paper"),
    ("open", "open-paper"),
]
PAIRS += [("ink", "panel"), ("soft", "panel"), ("ink", "bad-paper")]


def themes() -> dict[str, dict[str, str]]:
    """The variables of the style sheet, of both themes; the dark one stands there twice and must be the same."""
    style = (ROOT / "exmy" / "report" / "report.css").read_text()
    found = [dict(re.findall(r"--([\w-]+): (#\w{6});", block)) for block in re.findall(r":root[^{]*\{([^}]*)\}", style)]
    light, dark, chosen = found
    assert dark == chosen
    return {"light": light, "dark": dark}


@pytest.mark.parametrize("theme", BACKGROUNDS)
@pytest.mark.parametrize(("text", "paper"), PAIRS)
def test_text_can_be_read(theme: str, text: str, paper: str) -> None:
    assert themes()[theme]["paper"] == BACKGROUNDS[theme]
    assert contrast(themes()[theme][text], themes()[theme][paper]) >= 4.5  # WCAG 2.2 AA


def test_unigram_entropy_and_limits_are_the_groups_own(full: tuple[dict[str, Any], xr.DataTree]) -> None:
    (group,) = full[0]["groups"]
    assert group["entropy"] == [ENTROPY]
    assert group["loss_limits"][0] < ENTROPY < group["loss_limits"][1]
    assert group["reference"] == 5e-4
    assert group["why"] == "the best of e8m7"


def test_of_eight_seeds_no_alarm_is_judged() -> None:
    """A false alarm in at most a tenth of runs needs nine healthy neighbours for its threshold: ceil(0.9 (m + 1)) <= m."""
    for signal in content([(STUDY, full_tree(seeds=8))])["studies"][0]["signals"]:
        assert not any(signal["judged"]), signal["name"]
