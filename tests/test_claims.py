"""Claims: their rules, what decides them, how many seeds they still need; and `exmy claims`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from click.testing import CliRunner, Result
from scipy import stats

from exmy.claims import seeds as seeds_shown
from exmy.cli import main
from exmy.groups import groups
from tests.test_windows import NAN, grid
from train import StudyError
from train.claims import Claim, Claims, by_study, judge, read_claims
from train.equivalence import apart_rates
from train.proportions import Pairs
from train.sequential import sign_looks

ROOT = Path(__file__).parent.parent
GPU = ROOT / "studies" / "results" / "first-look-gpu"
ONE: dict[str, Any] = {
    "name": "c", "claim": "a fails more often than b.", "source": "here", "study": "s", "recipe": "a", "baseline": "b",
    "statistic": "divergence", "expect": "higher", "smallest_n": 4, "looks": [4, 8, 16],
}  # fmt: skip


def claims(*changes: dict[str, Any], alpha: float = 0.05) -> Claims:
    each = [ONE | {"name": f"c{i}"} | change for i, change in enumerate(changes)]
    return Claims.model_validate({"alpha": alpha, "claims": each})


def pairs(a_alone: int, b_alone: int, seeds: int) -> xr.Dataset:
    """One rate; the first a_alone seeds fail in a, the next b_alone in b."""
    a = [NAN if i < a_alone else 2.0 + 0.001 * i for i in range(seeds)]
    b = [NAN if a_alone <= i < a_alone + b_alone else 1.9 + 0.001 * i for i in range(seeds)]
    return grid({"a": [a], "b": [b]})


@pytest.mark.parametrize(("a_alone", "b_alone", "expect", "state"), [
    (8, 0, "higher", "supported"), (8, 0, "lower", "refuted"), (0, 8, "higher", "refuted"), (2, 1, "higher", "undecided"),
])  # fmt: skip
def test_a_claim_about_divergence_is_decided_by_its_sign(a_alone: int, b_alone: int, expect: str, state: str) -> None:
    (found,) = judge(claims({"expect": expect}), lambda _: pairs(a_alone, b_alone, 16))
    assert (found.state, found.n, found.looks) == (state, 16, 3)
    assert found.effect == (a_alone - b_alone) / 16
    assert found.low <= found.effect <= found.high


def test_a_p_value_is_the_least_alpha_whose_boundary_was_crossed() -> None:
    cube = pairs(6, 0, 16)
    (found,) = judge(claims({}), lambda _: cube)
    times = [4 / 16, 8 / 16, 1.0]
    counts = [4, 6, 6], [0, 0, 0]
    assert sign_looks(*counts, times, found.p * 1.0001)[-1].rejected
    assert not sign_looks(*counts, times, found.p * 0.97)[-1].rejected
    assert found.p >= stats.binomtest(6, 6).pvalue  # never below that of one look
    assert found.state == "supported"


def test_between_looks_nothing_new_is_decided_and_the_next_look_is_told() -> None:
    """Seeds 4 .. 7 all fail, but with 7 of them the looks are those of the first 4."""
    a = [2.0] * 4 + [NAN] * 12
    for seeds, looks, more in ((3, 0, 1), (4, 1, 4), (7, 1, 1), (8, 2, 8), (16, 3, None)):
        cube = grid({"a": [a[:seeds]], "b": [[1.9] * seeds]})
        (found,) = judge(claims({}), lambda _, cube=cube: cube)  # type: ignore[misc]
        assert (found.n, found.looks, found.more) == (seeds, looks, more)
        assert found.used == {0: 0, 1: 4, 2: 8, 3: 16}[looks]
        if looks == 1:
            assert found.effect == 0.0
            assert seeds_shown(found) == ("4 of 7" if seeds == 7 else "4")
    assert found.state == "supported"


def test_a_claim_is_undecided_below_its_smallest_number_of_seeds_whatever_they_show() -> None:
    (found,) = judge(claims({"looks": [16, 32], "smallest_n": 16}), lambda _: pairs(15, 0, 15))
    assert (found.state, found.more, found.looks) == ("undecided", 1, 0)
    assert math.isnan(found.p)


def test_claims_that_are_not_tested_count_in_holms_steps() -> None:
    cube = pairs(7, 0, 16)
    alone, *_ = judge(claims({}), lambda _: cube)
    first, second = judge(claims({}, {"study": "elsewhere"}), lambda claim: cube if claim.study == "s" else None)
    assert first.p_holm == pytest.approx(2 * alone.p)
    assert (second.state, second.looks) == ("not tested", 0)
    assert math.isnan(second.p_holm)


def test_alike_is_supported_by_equivalence_and_refuted_by_a_difference_beyond_the_margin() -> None:
    rule = {"expect": "alike", "margin": 0.3, "looks": [60], "smallest_n": 20}
    for a_alone, state in ((0, "supported"), (40, "refuted"), (18, "undecided")):
        (found,) = judge(claims(rule), lambda _, k=a_alone: pairs(k, 0, 60))  # type: ignore[misc]
        assert found.state == state, a_alone
    loss = rule | {"statistic": "loss", "margin": 0.2, "looks": [12], "smallest_n": 12}
    rng = np.random.default_rng(0)
    for shift, state in ((0.0, "supported"), (0.5, "refuted"), (0.2, "undecided")):
        base = rng.normal(2, 0.3, 12)
        cube = grid({"a": [(base + shift + rng.normal(0, 0.05, 12)).tolist()], "b": [base.tolist()]})
        (found,) = judge(claims(loss), lambda _, cube=cube: cube)  # type: ignore[misc]
        assert found.state == state, shift


@pytest.mark.parametrize("n", [12, 40])
def test_shares_that_differ_by_the_margin_are_said_to_differ_by_more_in_at_most_alpha(n: int) -> None:
    every = np.array([(b, c, n - b - c) for b in range(n + 1) for c in range(n + 1 - b)])
    shown = every[[apart_rates(Pairs(0, int(b), int(c), int(d)), 0.2) <= 0.05 for b, c, d in every]]
    assert len(shown)
    for q in np.linspace(0.0007, 0.3993, 41):
        assert stats.multinomial.pmf(shown, n, [0.2 + q, q, 0.8 - 2 * q]).sum() <= 0.05005
    assert apart_rates(Pairs(0, 0, 0, 0), 0.2) == 1.0
    assert apart_rates(Pairs(0, 200, 0, 150), 0.2) < 1e-6


def test_statistics_over_learning_rates_are_decided_by_their_intervals() -> None:
    """a loses twice as much away from its optimum, which lies an octave lower, and stands in a narrower window."""
    rng = np.random.default_rng(0)

    def curve(best: int, steep: float) -> list[list[float]]:
        return [(2 + steep * (i - best) ** 2 + rng.normal(0, 0.01, 200)).tolist() for i in range(4)]

    cube = grid({"a": curve(1, 0.2), "b": curve(2, 0.05)})
    rule = {"looks": [100, 200], "smallest_n": 50}
    found = judge(
        claims(rule | {"statistic": "sensitivity"}, rule | {"statistic": "optimum_shift", "expect": "lower"},
               rule | {"statistic": "window", "expect": "lower"}),
        lambda _: cube,
    )  # fmt: skip
    # b's window touches the grid's end, and is at least so wide.
    assert [of.state for of in found] == ["supported", "supported", "supported"]
    assert [of.effect for of in found] == pytest.approx([0.2 * 1.5 - 0.05 * 1.5, -1.0, -2.0], abs=0.01)
    assert [of.more for of in found] == [None, None, None]


@pytest.mark.parametrize("statistic", ["sensitivity", "optimum_shift"])
def test_what_is_not_spent_by_looks_is_divided_among_them(statistic: str) -> None:
    """One look of three that are planned: three times the p-value of one that is the only one."""
    rng = np.random.default_rng(3)
    a, b = (
        [(2 + steep * (i - best) ** 2 + rng.normal(0, 0.05, 12)).tolist() for i in range(3)]
        for best, steep in ((1, 0.15), (2, 0.02))
    )
    cube = grid({"a": a, "b": b})
    rule = {"statistic": statistic, "smallest_n": 12}
    (only,), (first,) = (judge(claims(rule | {"looks": looks}), lambda _: cube) for looks in ([12], [12, 24, 36]))
    assert 1e-6 < only.p < 1 / 3
    assert first.p == pytest.approx(3 * only.p)
    assert first.low <= only.low <= only.high <= first.high


@pytest.mark.parametrize(("change", "what"), [
    ({"looks": [8, 8]}, "looks must rise"), ({"looks": [2, 8]}, "the first look is at 2 seeds, below smallest_n = 4"),
    ({"recipe": "b"}, "recipe and baseline are both 'b'"), ({"expect": "alike"}, "needs a margin"),
    ({"expect": "alike", "margin": 0.1, "statistic": "window"}, "tested of divergence and loss"),
    ({"margin": 0.1}, "a margin belongs to"), ({"look": [3]}, r"claims\.0\.look: Extra inputs"),
    ({"statistic": "speed"}, r"claims\.0\.statistic"), ({"smallest_n": 0}, "smallest_n"),
    ({"beyond": {"width": 64}}, "beyond is for differences of loss, and statistic is 'divergence'"),
    ({"beyond": {"width": 64}, "where": {"width": 64.0}, "statistic": "loss"}, "beyond names the runs that where names"),
    ({"beyond": {}, "statistic": "loss"}, r"claims\.0\.beyond"), ({"where": {"width": [64]}}, r"claims\.0\.where\.width"),
    ({"loss_margin": 0.5}, "loss_margin is a window's"), ({"loss_margin": 0, "statistic": "window"}, "loss_margin"),
])  # fmt: skip
def test_rules_that_are_no_rules_are_refused_in_a_line(tmp_path: Path, change: dict[str, Any], what: str) -> None:
    path = write(tmp_path, [ONE | change])
    with pytest.raises(StudyError, match=what) as refused:
        read_claims(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_recipes_and_groups_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match="claim c0: 'z' has no run in s; it has a, b"):
        judge(claims({"recipe": "z"}), lambda _: pairs(1, 1, 4))
    find = by_study({"s": {(("dataset", "python"),): pairs(0, 0, 4), (("dataset", "maths"),): pairs(0, 0, 4)}})
    one, other = claims({"where": {"dataset": "maths"}}, {}).claims
    assert find(one) is not None
    with pytest.raises(StudyError, match="2 fit; there are dataset = 'python'; dataset = 'maths'"):
        find(other)


@pytest.mark.parametrize(("given", "word"), [
    (640, "640"), (1.0, "1"), (0.00390625, "0.00390625"), (math.inf, "inf"), ("python", "python"),
])  # fmt: skip
def test_a_group_may_be_named_by_a_number_as_the_study_file_has_it(given: object, word: str) -> None:
    (claim,) = claims({"where": {"axis": given}}).claims
    assert claim.where == {"axis": word}
    runs = xr.Dataset(coords={"run": [0, 1], "axis": ("run", [given, "other" if isinstance(given, str) else 7.5])})
    assert groups(runs)[0].where == claim.where, "as the study's runs are grouped"


WIDE, NARROW = {"width": "640"}, {"width": "64"}


def by_width(wide: xr.Dataset, narrow: xr.Dataset | None) -> Callable[[Claim], xr.Dataset | None]:
    return lambda claim: {"640": wide, "64": narrow}[claim.where["width"]]


@pytest.mark.parametrize(("expect", "state"), [("higher", "supported"), ("lower", "refuted")])
def test_a_difference_beyond_another_is_taken_seed_by_seed(expect: str, state: str) -> None:
    """a costs 0.3 where it is wide and 0.1 where it is narrow, on 12 seeds that both have; each width at its own best rate."""
    rng = np.random.default_rng(5)
    noise = rng.normal(0, 0.01, (4, 14))
    wide = grid({"a": [[9.0] * 14, (2.3 + noise[0]).tolist()], "b": [[9.0] * 14, (2.0 + noise[1]).tolist()]})
    narrow = grid({"a": [(3.1 + noise[2]).tolist(), [9.0] * 14], "b": [(3.0 + noise[3]).tolist(), [9.0] * 14]})
    wide, narrow = wide.isel(seed=slice(0, 13)), narrow.isel(seed=slice(1, 14))
    rule = {"statistic": "loss", "where": WIDE, "beyond": NARROW, "expect": expect, "looks": [12], "smallest_n": 12}
    (found,) = judge(claims(rule), by_width(wide, narrow))
    by_hand = ((noise[0] - noise[1]) - (noise[2] - noise[3]))[1:13] + 0.2
    assert (found.state, found.n) == (state, 12)
    assert found.effect == pytest.approx(by_hand.mean())
    assert 4 * 2 / 2**12 <= found.p < 1.05 * 4 * 2 / 2**12  # all signs agree, at the best of 2 rates and of 2
    assert found.low < by_hand.mean() < found.high


def test_a_difference_that_is_as_large_elsewhere_decides_nothing_and_one_without_an_elsewhere_is_not_tested() -> None:
    noise = np.random.default_rng(6).normal(0, 0.01, (2, 12))
    cube = grid({"a": [(2.5 + noise[0]).tolist()], "b": [(2.0 + noise[1]).tolist()]})
    rule = {"statistic": "loss", "where": WIDE, "beyond": NARROW, "looks": [12], "smallest_n": 12}
    (found,) = judge(
        claims(rule), by_width(cube, cube.isel(seed=slice(None, None, -1)).assign_coords(seed=cube["seed"]))
    )
    assert found.state == "undecided"
    assert abs(found.effect) < 1e-9
    (alone,) = judge(claims(rule), by_width(cube, None))
    assert (alone.state, alone.looks) == ("not tested", 0)
    (plain,) = judge(claims(rule | {"beyond": None}), by_width(cube, None))
    assert plain.state == "supported"


def test_a_rate_that_was_chosen_by_the_losses_compared_there_counts_as_all_that_might_have_been() -> None:
    """Bonferroni's: of 3 rates p is three times that of the same rate if it was stated before; of 3 and 3, nine times."""
    rng = np.random.default_rng(3)
    base = 2 + np.array([0.2, 0.0, 0.1])[:, None] + rng.normal(0, 0.02, (3, 12))
    cube = grid({"a": (base + rng.normal(0.02, 0.02, (3, 12))).tolist(), "b": base.tolist()})
    rates = cube["learning_rate"].values.tolist()
    rule = {"statistic": "loss", "looks": [12], "smallest_n": 12}
    (stated,) = judge(claims(rule | {"learning_rate": rates[1]}), lambda _: cube)
    (chosen,) = judge(claims(rule), lambda _: cube)
    assert 0 < stated.p < 1 / 9
    assert (chosen.effect, chosen.n, chosen.looks) == (stated.effect, 12, 1)
    assert chosen.p == pytest.approx(3 * stated.p)
    wider = judge(claims(rule | {"learning_rate": rates[1]}, alpha=0.05 / 3), lambda _: cube)[0]
    assert (chosen.low, chosen.high) == (wider.low, wider.high)
    none = grid({"a": base.tolist(), "b": base.tolist()})
    (beyond,) = judge(claims(rule | {"where": WIDE, "beyond": NARROW}), by_width(cube, none))
    assert beyond.p == pytest.approx(9 * stated.p)


def test_of_alike_recipes_hardly_any_is_called_worse_at_the_baselines_luckiest_rate() -> None:
    """Of 5 equally good ones. By p of that rate alone 12 in 100 are, in simulations of Student's t without this code."""
    rng, worse, rates = np.random.default_rng(0), 0, [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]
    rule = claims({"statistic": "loss", "looks": [16], "smallest_n": 16})
    for _ in range(60):
        loss = 2 + 0.02 * rng.standard_normal((2, 5, 16))
        cube = grid({"a": loss[0].tolist(), "b": loss[1].tolist()}, rates=rates)
        (found,) = judge(rule, lambda _, cube=cube: cube)  # type: ignore[misc]
        worse += found.state == "supported"
    assert worse <= stats.binom.ppf(0.999, 60, 0.025)


@pytest.mark.parametrize("statistic", ["divergence", "loss"])
def test_seeds_beyond_the_first_look_do_not_choose_its_learning_rate(statistic: str) -> None:
    """a fails at the second rate alone; b's ninth seed makes that b's best one."""
    b = [[1.99] * 8 + [2.3], [2.0] * 9]
    cube = grid({"a": [b[0], [NAN] * 9], "b": b})
    rule = {"statistic": statistic, "looks": [8], "smallest_n": 8}
    first, more = (judge(claims(rule), lambda _, n=n: cube.isel(seed=slice(n)))[0] for n in (8, 9))  # type: ignore[misc]
    assert (first.effect, first.p, first.used) == (more.effect, more.p, more.used) == (0, 1, 8)


def test_beyond_keeps_what_it_does_not_name() -> None:
    (claim,) = claims({"where": WIDE | {"dataset": "python"}, "beyond": NARROW, "statistic": "loss"}).claims
    assert claim.elsewhere is not None
    assert (claim.elsewhere.where, claim.elsewhere.beyond) == ({"width": "64", "dataset": "python"}, None)
    assert claims({}).claims[0].elsewhere is None


def test_a_windows_margin_is_the_claims() -> None:
    """b keeps within half a nat over five rates and within a tenth at one; a falls behind by more on both sides of its best."""

    def curve(heights: list[float]) -> list[list[float]]:
        return [
            (2 + height + np.random.default_rng(i).normal(0, 0.005, 120)).tolist() for i, height in enumerate(heights)
        ]

    cube = grid(
        {"a": curve([2, 0.9, 0, 0.9, 2]), "b": curve([2, 0.3, 0, 0.3, 2])}, rates=[1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]
    )
    rule = {"statistic": "window", "expect": "lower", "looks": [120], "smallest_n": 100}
    narrow, wide = judge(claims(rule, rule | {"loss_margin": 0.5}), lambda _: cube)
    assert (narrow.state, narrow.effect) == ("undecided", 0.0)
    assert (wide.state, wide.effect) == ("supported", -2.0)


def test_a_baseline_without_a_rate_leaves_a_claim_open() -> None:
    (found,) = judge(claims({}), lambda _: grid({"a": [[NAN] * 16], "b": [[NAN] * 16]}))
    assert (found.state, found.looks) == ("undecided", 0)


# --- on the command line


def write(folder: Path, each: list[dict[str, Any]]) -> Path:
    import tomli_w

    path = folder / "claims.toml"
    path.write_text(tomli_w.dumps({"claims": each}))
    return path


def exmy(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["claims", *map(str, arguments)])


REAL = ONE | {"study": "first-look-gpu", "recipe": "e4m7", "baseline": "e8m7", "smallest_n": 8, "looks": [8]}


@pytest.mark.parametrize(("expect", "expected", "code"), [("higher", True, 0), ("lower", True, 1), ("lower", False, 0)])
def test_an_expected_claim_that_is_refuted_has_status_1(tmp_path: Path, expect: str, expected: bool, code: int) -> None:
    done = exmy(
        GPU,
        "--claims",
        write(tmp_path, [REAL | {"expect": expect, "expected": expected}]),
        "--json",
        tmp_path / "f.json",
    )
    assert done.exit_code == code, done.output
    (row,) = json.loads((tmp_path / "f.json").read_text())["claims"]
    assert row["state"] == ("supported" if expect == "higher" else "refuted")
    assert (row["n"], row["effect"]) == (8, 1.0)
    assert row["state"] in done.output


def test_files_of_claims_are_judged_each_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of one claim each, and one about a study that is not here: p-values are those of a file alone, and it is left out."""
    files = []
    for name, changes in (("a", {}), ("b", {"expect": "lower", "expected": False}), ("c", {"study": "elsewhere"})):
        (tmp_path / name).mkdir()
        files.append(write(tmp_path / name, [REAL | changes]).rename(tmp_path / f"{name}.toml"))
    monkeypatch.setattr("exmy.claims.own_claims", lambda: files)
    done = exmy(GPU, "--json", tmp_path / "f.json")
    assert done.exit_code == 0, done.output
    assert done.output.count("p-values are Holm's, for all 1 claims") == 2
    first, second = json.loads((tmp_path / "f.json").read_text())["claims"]
    assert [(row["file"], row["state"]) for row in (first, second)] == [("a.toml", "supported"), ("b.toml", "refuted")]
    assert first["p_holm"] == first["p"] == second["p_holm"]
    assert first["alpha"] == 0.05


def test_an_undecided_claim_says_how_many_more_seeds_its_next_look_needs(tmp_path: Path) -> None:
    done = exmy(GPU, "--claims", write(tmp_path, [REAL | {"looks": [20], "name": "later"}]))
    assert done.exit_code == 0, done.output
    assert "undecided: 12 more seeds until its next look" in done.output


@pytest.mark.parametrize(("arguments", "what"), [
    ([GPU], "no claim is about first-look-gpu; studies with claims are conditions, data, exponent, fp8, hardware"),
    ([GPU, "--claims", "absent.toml"], "absent.toml: No such file"),
    (["nowhere"], "nowhere"),
])  # fmt: skip
def test_bad_input_has_one_line_and_status_2(arguments: list[str | Path], what: str) -> None:
    done = exmy(*arguments)
    assert done.exit_code == 2
    assert what in done.output
    assert len(done.output.strip().splitlines()) == 1
