"""What the page of findings says beyond the claims, held to studies whose answers are known by arithmetic.

A cost that doubles with each bit must grow by exactly 2, one that grows fourfold by 4; a run that learnt and lost it again must
be seen although it ends well below the entropy; and a claim that came otherwise than expected must be said to have.
"""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest

from exmy.findings.beyond import of_conditions, of_mantissa, of_seeds
from exmy.findings.collapse import collapses
from exmy.findings.flushed import gradient_flushed, of_signals
from exmy.findings.growth import cells, growth
from exmy.findings.make import make
from exmy.findings.rules import as_expected, left_open, past_best
from exmy.findings.studies import Evidence, load
from exmy.findings.summary import in_short
from tests.synthetic_evidence import ENTROPY, make_study
from tests.test_findings import claims_file, exponent, flushed, grid, of_seed, rows, seeds
from train.claims import Claims, Judged
from train.study import Run

RATES = [2.0**-9, 2.0**-8]
BITS = {"masked-e8m": 2.0, "stochastic-e8m": 4.0}


def bits(run: Run) -> float:
    """0.4 nats at one bit, and by so many times less at each more; up to a tenth by seed, in turn."""
    name = run.recipe.name
    if name == "masked-e8m5":  # lower than the baseline
        return of_seed(run) - 0.1 * (1 + 0.01 * run.seed)
    for prefix, factor in BITS.items():
        if name.startswith(prefix):
            return of_seed(run) + 0.4 * (1 + 0.1 * (run.seed % 2)) * factor ** (1 - int(name[-1]))
    return of_seed(run)


def conditions(run: Run) -> float:
    """Three bits 0.2 lower, up to a hundredth a seed."""
    return of_seed(run) - 0.2 * (run.recipe.name != "native-bf16") * (1 + 0.01 * run.seed)


def opened(results: Path, name: str) -> Evidence:
    found = load(results, name)
    assert isinstance(found, Evidence)
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("beyond")
    make_study(folder, "seeds", grid("native-bf16 native-tf32 e8m7", 20, [2**-6]), seeds)
    recipes = " ".join(f"{prefix}{m}" for prefix in BITS for m in (4, 3, 2, 1))
    make_study(folder, "mantissa", grid(f"native-bf16 masked-e8m5 {recipes}", 4, RATES), bits)
    axes = grid("native-bf16 masked-e5m7", 4) + f"loss_scale = [1.0, {2**-8}]"
    make_study(folder, "exponent", axes, exponent, shares=flushed)
    axes = grid("native-bf16 masked-e8m3", 4, [2**-8]) + "steps = [30]"
    make_study(
        folder,
        "conditions",
        axes,
        lambda run: of_seed(run) - 0.2 * (run.recipe.name != "native-bf16") * (1 + 0.01 * run.seed),
    )
    return folder


@pytest.mark.parametrize(("rounding", "factor"), [("toward zero", 2.0), ("stochastic", 4.0)])
def test_a_cost_grows_by_what_it_was_made_to(results: Path, rounding: str, factor: float) -> None:
    evidence = opened(results, "mantissa")
    found = growth(cells(evidence, evidence.parts[0])[rounding, RATES[0]])
    assert found is not None
    assert (found.most, found.fewest) == (4, 1)
    # Losses are stored in FP32, and each seed's costs grow by the same: there is no spread but theirs.
    assert found.factor == pytest.approx((factor, factor, factor), rel=1e-4)


def test_of_seeds_that_grow_apart_the_interval_is_the_jackknifes(results: Path) -> None:
    evidence = opened(results, "mantissa")
    row = cells(evidence, evidence.parts[0])["toward zero", RATES[0]]
    few, many = {"a": 0.4, "b": 0.5, "c": 0.6}, {"a": 0.10, "b": 0.11, "c": 0.12}
    made = {
        m: dataclasses.replace(row[m], validation=dataclasses.replace(row[m].validation, differences=of))
        for m, of in ((1, few), (3, many))
    }
    found = growth(made)
    assert found is not None
    assert found.factor.value == pytest.approx(math.sqrt(1.5 / 0.33))
    left = [math.log(a / b) / 2 for a, b in ((1.1, 0.23), (1.0, 0.22), (0.9, 0.21))]
    half = 4.302653 * math.sqrt(2 / 3 * sum((x - sum(left) / 3) ** 2 for x in left))  # t of two degrees
    assert found.factor.high == pytest.approx(math.sqrt(1.5 / 0.33) * math.exp(half), rel=1e-6)


def test_the_most_bits_that_cost_something_are_named_by_rounding(results: Path) -> None:
    told = "\n".join(of_mantissa(opened(results, "mantissa")))
    assert (
        "Rounding toward zero, the most mantissa bits with a cost that is told from zero are 4, at 2^-9, 2^-8." in told
    )
    costs = "**-0.1015** | **+0.0525** | **+0.1050** | **+0.2100** | **+0.4200**"
    assert f"| toward zero, 2^-9 | {costs} | 2.00 [2.00, 2.00], M = 4 to 1 |" in told
    assert "Unexpected, lower losses with fewer bits, told from zero: `masked-e8m5` at 2^-9 -0.1015" in told


def test_counts_by_margin_are_those_of_the_losses(results: Path) -> None:
    told = list(of_seeds(opened(results, "seeds")))
    table = [line for line in told if line.startswith("| 0.")]
    # Three of TF32's seeds a nat above the entropy count by every margin; of e8m7, 0.1 above in each seed, only by that margin.
    several = [line.split(" | ")[1:5] for line in table if "`native-tf32`" in line and not line.startswith("| 0.1,")]
    assert several == [["`native-tf32`", "0 / 3", "0 / 3", "0.250"]] * 6  # McNemar: 2 / 2^3
    (above,) = [line for line in table if line.startswith("| 0.1,") and "`e8m7`" in line]
    assert "| 0 / 10 |" in above  # 2.1 + seed / 1000 above 2.0095 + 0.1: seeds 10 to 19
    assert any("20 seeds a side could tell" in line for line in told)


def test_a_run_that_learnt_and_lost_it_again_is_seen(results: Path) -> None:
    evidence = opened(results, "conditions")
    tree = evidence.tree.copy()
    history = tree["history"].to_dataset()
    recipes = history["recipe"].values.astype(str)
    values = history["train_loss"].transpose("run", "step").values.copy()
    rise = np.concatenate([np.full(11, ENTROPY - 1), np.full(12, ENTROPY + 0.2), np.full(7, ENTROPY - 0.3)])
    values[recipes == "masked-e8m3"] = rise
    tree["history"].dataset = history.assign(train_loss=(("run", "step"), values))
    made = dataclasses.replace(evidence, tree=tree)
    part, rate = made.parts[0], made.parts[0].rates[0]
    assert collapses(made, part, "native-bf16", rate) is None or not collapses(made, part, "native-bf16", rate).back  # type: ignore[union-attr]
    found = collapses(made, part, "masked-e8m3", rate)
    assert found is not None
    assert (found.back, found.runs) == (4, 4)
    assert (found.lowest_step, found.highest_step) == (
        9,
        20,
    )  # means of ten: the first of the low ones, the first of the high ones
    assert (found.lowest, found.highest) == pytest.approx((ENTROPY - 1, ENTROPY + 0.2), abs=1e-5)
    assert found.end == pytest.approx(ENTROPY + (3 * 0.2 - 7 * 0.3) / 10, abs=1e-5)
    assert any("4 of 4 runs came 0.5 nats below" in line for line in of_conditions(made))
    assert any("4 of 4 runs learnt" in words for _, words in in_short({"conditions": made}))


def test_less_loss_with_fewer_bits_is_called_unexpected(results: Path) -> None:
    told = "\n".join(of_conditions(opened(results, "conditions")))
    assert (
        "Unexpected, lower losses with fewer bits, told from zero over all rows: as usual, `masked-e8m3` -0.2030"
        in told
    )


def test_the_heads_gradient_stands_apart(results: Path) -> None:
    evidence = opened(results, "exponent")
    part = evidence.parts[0]
    signals = evidence.tree["signals"].to_dataset()
    below = (signals["tensor"] == "h.1.mlp.fc") & (signals["recipe"] == "masked-e5m7")
    tree = evidence.tree.copy()
    tree["signals"].dataset = signals.assign(flushed=signals["flushed"].where(~below, 0.125))
    made = dataclasses.replace(evidence, tree=tree)
    found = gradient_flushed(made, part, "masked-e5m7", math.nan)
    assert found is not None
    assert (found.head, found.most, found.where, found.middle) == (0.25, 0.125, "h.1.mlp.fc", 0.0)
    told = "\n".join(of_signals(made))
    assert "| `masked-e5m7`, loss scale 1 | 25 | 12.5 (`h.1.mlp.fc`) | 0 | 0/4" in told
    assert "none diverged at that rate: `masked-e5m7`, loss scale 1. So half" in told
    assert "at the small end alone" in told


def judged(state: str, expected: bool, low: float = -0.1, high: float = 0.3) -> Judged:
    claim = {
        "name": "c", "claim": "c.", "source": "here", "study": "s", "recipe": "a", "baseline": "b", "statistic": "loss",
        "expect": "higher", "smallest_n": 4, "looks": [4], "expected": expected, "learning_rate": 2**-8,
    }  # fmt: skip
    return Judged(Claims.model_validate({"claims": [claim]}).claims[0], state, 0.1, low, high, 4, 0.5, 0.5, 1, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("state", "expected", "said"),
    [
        ("supported", True, "yes"),
        ("supported", False, "**no**, supported"),
        ("refuted", True, "**no**, refuted"),
        ("refuted", False, "yes"),
        ("undecided", True, "**no**, not shown"),
        ("undecided", False, "yes"),
        ("not tested", True, "–"),
    ],
)
def test_what_came_otherwise_than_expected_is_said_to_have(state: str, expected: bool, said: str) -> None:
    assert as_expected(judged(state, expected)) == said


def test_the_undecided_says_what_it_leaves_open() -> None:
    assert left_open(judged("undecided", True)) == "; an effect beyond +0.300 nats/token is excluded"
    assert left_open(judged("supported", True)) == ""
    assert left_open(judged("undecided", True, high=math.inf)) == ""


def test_surprises_stand_below_the_claims(results: Path, tmp_path: Path) -> None:
    """Of the claims' file of the other tests: one supported, one refuted though expected, one of too few seeds."""
    page = make(results, claims_file(tmp_path), tmp_path / "findings.md")
    assert re.search(
        r"\d of the \d that are judged came as we expected; otherwise came .*`F1-lower`[^;]* \(refuted\)", page
    )
    found = {row[1].split("`")[1]: row[-1] for row in rows(page, "[") if row[1].startswith("`")}
    assert (found["F1-loss"], found["F1-lower"]) == ("yes", "**no**, refuted")


def test_a_rate_beyond_the_best_is_said_to_be_chosen_badly(results: Path) -> None:
    evidence = opened(results, "mantissa")
    of = judged("undecided", True)
    claim = of.claim.model_copy(update={"baseline": "native-bf16", "learning_rate": RATES[1]})
    assert past_best(dataclasses.replace(of, claim=claim), evidence) == ""  # as good as at the other rate
