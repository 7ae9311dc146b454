"""The second half of the findings, worked out anew: every claim, its validation loss, what is said beyond the claims, the alarms.

By pandas, NumPy and SciPy from the digests, never by what made the page; intervals and p-values by textbook tests, which the
page's sequential ones are held to within a few percent.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import tomllib
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from tests.test_evidence import ROOT, opened, page, readme, verdict

NAMES = (
    "scaling", "fp8", "hardware", "switch", "layers", "data", "schedules", "optimizer", "warning", "warning-english",
)  # fmt: skip
LATER = ("warning-6x256", "curvature")
LAST = "llama-120m"
CLAIMS = tomllib.loads((ROOT / "studies" / "claims-second.toml").read_text(encoding="utf-8"))
BY_NAME = {claim["name"]: claim for claim in CLAIMS["claims"]}
HORIZON, FALSE_ALARMS = 100, 0.05
NUMBER = r"([+-]\d+\.\d+)"
INTERVAL = rf"{NUMBER} \[{NUMBER}, {NUMBER}\]"


@cache
def runs(name: str) -> pd.DataFrame:
    """All runs of a study, with the last validation loss that each has."""
    found: pd.DataFrame = opened(name)["summary"].to_dataset().to_dataframe().reset_index()
    losses = opened(name)["evaluation"]["validation_loss"].transpose("run", "eval_step")
    last = [row[np.isfinite(row)][-1] if np.isfinite(row).any() else np.nan for row in losses.values]
    return found.assign(validation=found["run"].map(pd.Series(last, index=losses["run"].values)))


def chosen(table: pd.DataFrame, where: dict[str, Any]) -> pd.DataFrame:
    for axis, value in where.items():
        own = table[axis]
        table = table[own.astype(float) == float(value)] if isinstance(value, int | float) else table[own == value]
    return table


def contrast(claim: dict[str, Any], column: str) -> pd.Series:
    """By seed: recipe less baseline where the claim says, less the same elsewhere if it says so."""

    def of(where: dict[str, Any]) -> pd.Series:
        own = chosen(runs(claim["study"]), where)
        means = own[own["recipe"] == claim["baseline"]].groupby("learning_rate")["final_loss"].mean()
        own = own[np.isclose(own["learning_rate"], claim.get("learning_rate", means.idxmin()))]
        wide = own.pivot_table(column, "seed", "recipe", dropna=False)
        return wide[claim["recipe"]].astype(float) - wide[claim["baseline"]].astype(float)

    found = of(claim.get("where", {}))
    return (found - of({**claim["where"], **claim["beyond"]}) if "beyond" in claim else found).dropna()


def among(claim: dict[str, Any]) -> int:
    """From how many rates, or pairs of rates, a claim of loss without a rate of its own has them: Bonferroni's number."""
    if "learning_rate" in claim or claim["statistic"] != "loss":
        return 1
    where = claim.get("where", {})
    meant = [where, *([{**where, **claim["beyond"]}] if "beyond" in claim else [])]
    return math.prod(chosen(runs(claim["study"]), of)["learning_rate"].nunique() for of in meant)


def textbook(claim: dict[str, Any], differences: pd.Series) -> float:
    """A p-value: Student's or McNemar's; of equivalence twice the larger of two one-sided ones, Student's."""
    n = len(differences)
    if claim["expect"] == "alike":
        t = (abs(differences.mean()) - claim["margin"]) / stats.sem(differences)
        return float(min(1.0, 2 * stats.t.cdf(t, n - 1)))
    if claim["statistic"] == "divergence":
        up, down = int((differences > 0).sum()), int((differences < 0).sum())
        return float(stats.binomtest(up, up + down).pvalue) if up + down else 1.0
    return min(1.0, among(claim) * float(stats.ttest_1samp(differences, 0.0).pvalue))


@cache
def judged() -> dict[str, tuple[pd.Series, str]]:
    """Differences and state of every claim, by Holm's steps over all of the file."""
    each = {
        name: contrast(claim, "final_loss" if claim["statistic"] == "loss" else "diverged")
        for name, claim in BY_NAME.items()
    }
    p = {name: textbook(BY_NAME[name], of) for name, of in each.items()}
    found, going = {}, True
    for i, name in enumerate(sorted(p, key=lambda one: p[one])):
        going &= p[name] * (len(p) - i) <= CLAIMS["alpha"]
        expect, mean = BY_NAME[name]["expect"], each[name].mean()
        right = expect == "alike" or (mean > 0) == (expect == "higher")
        found[name] = (each[name], ("supported" if right else "refuted") if going else "undecided")
    return found


@pytest.mark.parametrize("name", [*NAMES, *LATER, LAST])
def test_they_ran_at_one_commit_and_three_later_at_two_others(name: str) -> None:
    commit = "eccb88927be3d6299a77aa10d50e5467fafa2176" if name in LATER else "5c87679e2bffb5e5ecbc86e2a7db171f658af56f"
    commit = "8d9db55d1e6bf9aac514dd8f9844a0e385cd55ab" if name == LAST else commit
    assert opened(name).attrs["git_commit"] == f"{commit}+changed"


@pytest.mark.parametrize("name", [*NAMES, *LATER, LAST])
def test_minutes_are_the_digests_and_said_to_be_of_shared_cards_where_they_are(name: str) -> None:
    attrs = opened(name).attrs
    whole, first = (f"{attrs[key] / 60:.1f}" for key in ("seconds", "seconds_first_step"))
    table = (ROOT / "studies" / "README.md").read_text(encoding="utf-8")
    assert re.search(rf"^\| {name} \| [^|]*\| [^|]*\| {whole} \| {first} \|$", table, re.MULTILINE)
    if name not in ("warning-english", "warning-6x256"):
        block = page().split(f"### Study `{name}`")[1].split("\n![")[0]
        assert ("minutes as they went, and not what the study takes alone" in block) == (name not in (*LATER, LAST))


def test_no_rule_and_no_expectation_was_touched_since_the_runs() -> None:
    """The claims as they were at the commit that ran, but for comments."""
    assert len(CLAIMS["claims"]) == 26
    content = json.dumps(CLAIMS, sort_keys=True).encode()
    assert hashlib.sha256(content).hexdigest() == "681fc8480c1b15e82674d7e8cad11a621fa54ba9ef274dfeba972c0691e0e334"


@pytest.mark.parametrize("name", BY_NAME)
def test_a_claim_has_the_effect_the_interval_and_the_verdict_of_its_pairs(name: str) -> None:
    differences, state = judged()[name]
    effect, said = verdict(name)
    assert len(differences) == BY_NAME[name]["looks"][-1]
    assert effect.startswith(f"{differences.mean():+.3f} [")
    assert said == state
    if BY_NAME[name]["statistic"] == "loss":
        low, high = (float(x) for x in re.findall(r"[+-]\d+\.\d+", effect)[1:])
        half = stats.t.isf(0.025 / among(BY_NAME[name]), len(differences) - 1) * stats.sem(differences)
        # Where a claim has two looks its interval is a few percent wider; limits have three places.
        assert (high - low) / 2 == pytest.approx(half, rel=0.05, abs=1e-3)


@pytest.mark.parametrize("name", [name for name, claim in BY_NAME.items() if claim["statistic"] == "loss"])
def test_beside_a_claims_training_loss_stands_its_validation_loss(name: str) -> None:
    found = contrast(BY_NAME[name], "validation")
    half = stats.t.ppf(0.975, len(found) - 1) * stats.sem(found)
    told = f"{found.mean():+.4f} [{found.mean() - half:+.4f}, {found.mean() + half:+.4f}]"
    result = page().split(f"**Our claim, `{name}`.**")[1].split("\n\n")[1]
    assert f"in validation loss the same is {told} (95 %, Student's), by which no rule decides" in result
    training = judged()[name][0]
    shown = abs(training.mean()) > stats.t.ppf(0.975, len(training) - 1) * stats.sem(training)
    if BY_NAME[name]["expect"] != "alike":
        assert ("whose interval has zero in it" in result) == (shown and abs(found.mean()) <= half)
        assert ("whose interval has no zero in it" in result) == (not shown and abs(found.mean()) > half)


def test_how_many_came_as_expected_and_which_did_not_is_said() -> None:
    odd = [name for name, claim in BY_NAME.items() if claim.get("expected", True) != (judged()[name][1] == "supported")]
    by_state = {
        state: [f"`{name}`" for name in odd if judged()[name][1] == state] for state in ("supported", "undecided")
    }
    second = page().split("## The second half\n")[1]
    assert (
        f"{26 - len(odd)} of the 26 that are judged came as we expected; otherwise came {', '.join(by_state['supported'])} "
        f"(supported); {', '.join(by_state['undecided'])} (not shown)." in second
    )
    refuted = [f"`{name}`" for name in BY_NAME if judged()[name][1] == "refuted"]
    assert f"Refuted, so that the contrary is shown, are {', '.join(refuted)}." in second


def test_every_table_of_the_page_has_as_many_cells_in_each_row_as_in_its_head() -> None:
    heads = 0
    lines = page().splitlines()
    for i, line in enumerate(lines):
        if line.startswith("|") and not lines[i - 1].startswith("|"):
            heads += 1
            cells = line.count("|")
        if line.startswith("|"):
            assert line.count("|") == cells, f"line {i + 1}: {line[:80]}"
    assert heads > 50


def test_the_lm_head_in_eight_bits_ends_lower_than_in_bf16() -> None:
    own = runs("fp8")[lambda of: (of["mlp"] == "gelu") & np.isclose(of["learning_rate"], 4e-3)]
    for recipe in ("fp8-hybrid", "ms-amp-o2"):
        told = []
        for column in ("final_loss", "validation"):
            wide = own[own["recipe"] == recipe].pivot_table(column, "seed", "lm_head")
            found = (wide["body"] - wide["native-bf16"]).dropna()
            half = stats.t.ppf(0.975, len(found) - 1) * stats.sem(found)
            assert found.mean() + half < 0
            told.append(f"{found.mean():+.4f} [{found.mean() - half:+.4f}, {found.mean() + half:+.4f}]")
        assert f"`{recipe}` at 0.004 {told[0]} training, {told[1]} validation" in page()
    wide = own[own["recipe"] == "native-bf16"].pivot_table("final_loss", "seed", "lm_head")
    assert (wide["body"] == wide["native-bf16"]).all()


def test_the_simulation_foretells_the_mean_and_not_the_run() -> None:
    own = runs("hardware")[lambda of: of["width"] == 128]
    wide = own.pivot_table("final_loss", "seed", "recipe")
    r = np.corrcoef(wide["fp8-hybrid"], wide["native-fp8"])[0, 1]
    spread = (wide["fp8-hybrid"] - wide["native-fp8"]).std()
    # Fisher's z.
    low, high = np.tanh(np.arctanh(r) + np.array([-1, 1]) * stats.norm.isf(0.025) / math.sqrt(len(wide) - 3))
    row = f"| `fp8-hybrid` | as usual, rate 0.008 | 0 of 128 | {r:.2f} [{low:.2f}, {high:.2f}] | {spread:.3f} |"
    assert row in page()
    seeds = runs("seeds")[lambda of: np.isclose(of["learning_rate"], 8e-3) & (of["dataset"] == "python")]
    natives = seeds.pivot_table("final_loss", "seed", "recipe")
    least = 1.0
    for one, other in (("bf16", "tf32"), ("bf16", "fp32"), ("tf32", "fp32")):
        native = np.corrcoef(natives[f"native-{one}"], natives[f"native-{other}"])[0, 1]
        assert f"`native-{one}` and `native-{other}` {native:.2f} [" in page()
        least = min(least, native)
    assert high > least
    assert "So single runs part at this rate whatever the products are" in page()
    failed = own.groupby("recipe")["diverged"].sum()
    told = readme("Does simulated FP8 stand for the hardware's?")
    assert f"{failed['fp8-hybrid']} and {failed['native-fp8']} of 128 runs fail" in told
    tf32 = np.corrcoef(natives["native-bf16"], natives["native-tf32"])[0, 1]
    assert f"single runs' losses correlate by {r:.2f}, BF16's and TF32's by {tf32:.2f}" in told
    assert re.search(INTERVAL, told)[0] == verdict("hardware-loss")[0].removesuffix(" nats/token")  # type: ignore[index]


def saved(study: str, recipe: str, of: str, rate: float) -> float:
    """Which share of what a recipe costs in training loss another saves."""
    wide = runs(study)[lambda t: np.isclose(t["learning_rate"], rate)].pivot_table("final_loss", "seed", "recipe")
    return float((wide[of] - wide[recipe]).mean() / (wide[of] - wide["masked-e8m7"]).mean())


def test_where_bits_are_kept_saves_what_the_page_says() -> None:
    text = page().split("### Study `layers`")[1]
    share = {
        what: saved("layers", f"e8m1-{what}-kept", "masked-e8m1", 4e-3)
        for what in ("head", "first", "last", "ends", "mlp")
    }
    for what, value in share.items():
        assert re.search(rf"^\| `masked-e8m1` \| {what} \| [^|]* \| {100 * value:.0f} % \|$", text, re.MULTILINE), what
    ends = {which: 100 * saved("switch", f"e8m1-{which}", "masked-e8m1", 4e-3) for which in ("after-100", "until-900")}
    told = readme("Where does precision pay most?")
    for value in (100 * share["head"], 100 * share["first"], 100 * share["last"], *ends.values()):
        assert f"{value:.0f} %" in told
    row = f"| 0.004 | `e8m1-after-100` | {ends['after-100']:.0f} % | 0/64 | `e8m1-until-900` | {ends['until-900']:.0f} % | 0/64 |"
    assert row in page()


def test_where_the_boundary_lies_on_each_text_is_counted() -> None:
    own = runs("data")[lambda of: of["recipe"] == "masked-e5m7"]
    plain = (own["noise"] == 0) & (own["shuffled"] == 0) & (own["duplicated"] == 0)
    rows = {
        "as usual": plain & (own["dataset"] == "python"), "english": plain & (own["dataset"] == "english"),
        "maths": plain & (own["dataset"] == "maths"), "noise 0.3": own["noise"] > 0, "shuffled 0.3": own["shuffled"] > 0,
        "duplicated 0.8": own["duplicated"] > 0,
    }  # fmt: skip
    counts = {name: own[mask].groupby("learning_rate")["no_progress"].sum().tolist() for name, mask in rows.items()}
    for name, of in counts.items():
        assert f"| {name} | `masked-e5m7` | {' | '.join(f'{k}/21' for k in of)} |" in page()
    assert counts["shuffled 0.3"][0] == 21
    assert counts["as usual"][0] == 0
    told = readme("What moves where five exponent bits fail?")
    assert f"{counts['as usual'][1]} of 21 runs on Python source, {counts['maths'][1]} on mathematics" in told
    assert f"{counts['noise 0.3'][1]} with 30 % of noise" in told
    long = runs("schedules")[lambda of: (of["warmup"] == 300) & (of["recipe"] == "masked-e5m7")]
    assert f"{long[np.isclose(long['learning_rate'], 2.38e-3)]['no_progress'].sum()} with thrice the warm-up" in told
    by = runs("optimizer")[lambda of: (of["recipe"] == "masked-e5m7") & (of["clip"] == 1) & (of["eps"] == 1e-8)]
    failed = by[by["beta2"] == 0.95].groupby("optimizer")["no_progress"].agg(["sum", "count"])
    assert f"Muon {failed.loc['muon', 'sum']} of {failed.loc['muon', 'count']}" in told
    assert f"AdamW {failed.loc['adamw', 'sum']} of {failed.loc['adamw', 'count']}" in told


def test_readme_says_of_fp8_what_the_claims_say() -> None:
    told = readme("Does FP8 as people use it cost anything?")
    for name in ("R6-loss", "F4", "F4-four-bits"):
        assert verdict(name)[0].removesuffix(" nats/token") in told
    bad = runs("fp8")[lambda of: (of["recipe"] == "fp8-hybrid-unscaled") & np.isclose(of["learning_rate"], 4e-3)]
    assert f"{bad['gap'].sum()} of {len(bad)} runs fail" in told


def test_what_two_seeds_of_a_large_model_cost_is_described_by_the_page_and_the_readme() -> None:
    own, baseline, rates = runs(LAST), "native-bf16", (4e-4, 1.6e-3)
    (line,) = re.findall(rf"^- \*\*Llama\*\*, study \[`{LAST}`\].*$", page(), re.MULTILINE)
    means = {}
    for recipe in ("fp8-hybrid", "masked-e8m1", "masked-e5m7"):
        at = [own[np.isclose(own["learning_rate"], rate)] for rate in rates]
        wide = [table.pivot(index="seed", columns="recipe", values="validation") for table in at]
        means[recipe] = [float((table[recipe] - table[baseline]).mean()) for table in wide]
        bad = [table[table["recipe"] == recipe]["gap"] for table in at]
        fails = ", ".join(f"{of.sum()}/{len(of)}" for of in bad)
        assert f"`{recipe}` {', '.join(f'{mean:+.4f}' for mean in means[recipe])} ({fails} failed)" in line
    assert "at 0.0004, 0.0016, means of 2 pairs, described and not judged: `fp8-hybrid`" in line
    assert not any(claim["study"] == LAST for claim in CLAIMS["claims"])
    told = readme("Do small models stand for large ones?")
    assert (
        f"two seeds, fp8-hybrid {means['fp8-hybrid'][0]:+.3f}, e8m1 {means['masked-e8m1'][0]:+.2f}, e5m7 diverges"
        in told
    )
    assert own[own["recipe"] == "masked-e5m7"]["no_progress"].all()


def test_a_batch_four_times_as_large_is_four_times_the_tokens() -> None:
    own = runs("schedules")[lambda of: (of["recipe"] == "masked-e8m7") & np.isclose(of["learning_rate"], 4e-3)]
    usual = (own["warmup"] == 100) & (own["schedule"] == "cosine") & (own["final_fraction"] == 0.1)
    ends = own[usual].groupby("sequences")[["final_loss", "epochs"]].mean()
    assert ends.loc[32, "epochs"] / ends.loc[8, "epochs"] == pytest.approx(4)
    assert f"and {ends.loc[32, 'final_loss']:.2f} at 0.004; with 8," in page()
    assert "32 sequences for as many steps are 4 times the tokens" in page()


# What a probe says of a measure: the value, or what was found of a maximum from below.
PROBES = {name: name for name in (
    "hessian_eigenvalue", "preconditioned_eigenvalue", "gradient_curvature", "critical_sharpness", "sam_sharpness",
    "asam_sharpness")} | {name: f"{name}_lower" for name in ("box_sharpness", "hidden_sharpness", "logit_sharpness_lbfgsb")
}  # fmt: skip


@cache
def signal(study: str, name: str, epsilon: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Values (run, step), and the steps."""
    tree = opened(study)
    group, axis = ("sharpness", "probe_step") if epsilon else ("signals", "signal_step")
    group, axis = ("history", "step") if name == "grad_norm" else (group, axis)
    group, axis = (f"probes/{name}", "probe_step") if name in PROBES else (group, axis)
    of = tree[group].to_dataset()[PROBES.get(name, name)]
    of = of.sel(epsilon=epsilon, method="nearest") if epsilon else of
    of = of.squeeze([dim for dim in ("rank", "rho") if dim in of.dims], drop=True)
    return of.transpose("run", axis).values.astype(float), of[axis].values


def onsets(study: str) -> np.ndarray:
    table = runs(study)
    return np.where(table["diverged"], table["onset"].astype(float), np.inf)


def auroc(values: np.ndarray, steps: np.ndarray, study: str, kept: np.ndarray) -> float:
    """Over pairs of a run that diverges within the horizon and one that does not, of one recipe, rate and step."""
    table, onset, won, pairs = runs(study), onsets(study), 0.0, 0
    last = int(opened(study)["history"]["last_step"].max())
    kind = table.groupby(["recipe", "learning_rate"]).ngroup().to_numpy()
    for one in np.unique(kind):
        own = kept & (kind == one)
        for j, step in enumerate(steps):
            x, start = values[own, j], onset[own]
            soon = (start > step) & (start <= step + HORIZON)
            later = np.where(np.isfinite(start), start > step + HORIZON, step + HORIZON <= last)
            a, b = x[soon & ~np.isnan(x)], x[later & ~np.isnan(x)]
            if a.size and b.size:
                ranks = stats.rankdata(np.concatenate([a, b]))[: a.size]
                won, pairs = won + ranks.sum() - a.size * (a.size + 1) / 2, pairs + a.size * b.size
    return won / pairs


BEST = "`logit_sharpness at epsilon 0.001`, falling"


@pytest.mark.parametrize(
    ("study", "row", "name", "epsilon", "sign"),
    [("warning", BEST, "logit_sharpness", 1e-3, -1), ("warning", "`logsumexp_max`, falling", "logsumexp_max", 0.0, -1),
     ("warning", "`quantization_error`", "quantization_error", 0.0, 1),
     ("warning", "`grad_norm`, falling", "grad_norm", 0.0, -1),
     ("curvature", "`logsumexp_max`, falling", "logsumexp_max", 0.0, -1),
     ("curvature", "`critical_sharpness`, falling", "critical_sharpness", 0.0, -1),
     ("curvature", "`hessian_eigenvalue at rank 0`, falling", "hessian_eigenvalue", 0.0, -1),
     ("curvature", "`preconditioned_eigenvalue at rank 0`", "preconditioned_eigenvalue", 0.0, 1),
     ("curvature", "`box_sharpness at epsilon 0.001`, falling", "box_sharpness", 1e-3, -1),
     ("curvature", "`hidden_sharpness at epsilon 0.0005`", "hidden_sharpness", 5e-4, 1),
     ("curvature", "`update_rms`, falling", "update_rms", 0.0, -1)],
)  # fmt: skip
def test_an_alarms_score_and_its_rings_are_those_of_the_raw_histories(
    study: str, row: str, name: str, epsilon: float, sign: int
) -> None:
    table, last = runs(study), int(opened(study)["history"]["last_step"].max())
    values, steps = signal(study, name, epsilon)
    seeds = np.sort(table["seed"].unique())
    even = table["seed"].isin(seeds[::2]).to_numpy()
    (cells,) = re.findall(
        rf"^\| {re.escape(row)} \| (.*) \|$", page().split(f"### Study `{study}`")[1].split("Beyond")[0], re.MULTILINE
    )
    chosen_on, scored, _, in_time, early, *_ = cells.split(" | ")
    assert float(chosen_on) == pytest.approx(auroc(sign * values, steps, study, even), abs=6e-4)
    assert float(scored.split(" [")[0]) == pytest.approx(auroc(sign * values, steps, study, ~even), abs=6e-4)
    onset, kind = onsets(study), table.groupby(["recipe", "learning_rate"]).ngroup().to_numpy()
    counts = (steps < onset[:, None]) & (steps <= last) & ~np.isnan(values)
    loudest = np.where(counts, sign * values, -np.inf).max(axis=1)
    rang = too_soon = judged_ = 0
    for run in np.flatnonzero(~even & np.isfinite(onset)):
        # The page's thresholds are of other folds of seeds, these of all other seeds: a run or two may differ.
        others = ~even & (kind == kind[run]) & ~np.isfinite(onset) & (table["seed"] != table["seed"][run]).to_numpy()
        place = math.ceil(round((1 - FALSE_ALARMS) * (others.sum() + 1), 9))
        if place > others.sum():
            continue
        judged_ += 1
        heard = counts[run] & (sign * values[run] > np.sort(loudest[others])[place - 1])
        if heard.any():
            soon = onset[run] - steps[heard.argmax()] <= HORIZON
            rang, too_soon = rang + soon, too_soon + (not soon)
    few = (
        0 if study == "warning" else 2
    )  # with half as many seeds a fold's threshold has fewer runs, or too few, to rest on
    told = [int(count) for count in in_time.split("/")]
    assert told == [pytest.approx(rang, abs=few), pytest.approx(judged_, abs=few)]
    assert int(early.split("/")[0]) == pytest.approx(too_soon, abs=2)


def test_a_threshold_that_moves_with_the_step_rings_in_time_before_as_many() -> None:
    table, onset = runs("warning"), onsets("warning")
    values, steps = signal("warning", "logsumexp_max")
    even = table["seed"].isin(np.sort(table["seed"].unique())[::2]).to_numpy()
    healthy, kind = ~np.isfinite(onset), table.groupby(["recipe", "learning_rate"]).ngroup().to_numpy()
    moved = np.full(values.shape, np.nan)
    for one in np.unique(kind):
        own = values[even & healthy & (kind == one)]
        if len(own) >= 5:
            moved[kind == one] = (own.mean(axis=0) - values[kind == one]) / np.where(
                own.std(axis=0) > 0, own.std(axis=0), np.inf
            )
    counts = (steps < onset[:, None]) & (steps <= 999) & ~np.isnan(moved)
    loudest = np.where(counts, moved, -np.inf).max(axis=1)
    in_time = 0
    for run in np.flatnonzero(~even & ~healthy):
        others = (
            ~even
            & healthy
            & (kind == kind[run])
            & np.isfinite(loudest)
            & (table["seed"] != table["seed"][run]).to_numpy()
        )
        place = math.ceil(round((1 - FALSE_ALARMS) * (others.sum() + 1), 9))
        if place <= others.sum():
            heard = counts[run] & (moved[run] > np.sort(loudest[others])[place - 1])
            in_time += heard.any() and onset[run] - steps[heard.argmax()] <= HORIZON
    beyond = page().split("### Study `warning`")[1].split("Beyond the claims")[1]
    (told,) = re.findall(r"^\| `logsumexp_max`, falling \| (\d+)/41 \|", beyond, re.MULTILINE)
    assert int(told) == pytest.approx(in_time, abs=2)  # thresholds of folds there, of all other seeds here
    low, high = (100 * x for x in (stats.beta.ppf(0.05 / 18, 14, 28), stats.beta.isf(0.05 / 18, 15, 27)))
    assert (int(told), f"{low:.1f} to {high:.1f} %") == (14, "15.7 to 56.9 %")
    assert f"`logsumexp_max`, rings in time before 14 of 41, {low:.1f} to {high:.1f} %" in beyond


def test_no_alarm_is_usable_and_readme_and_page_say_so() -> None:
    of = page().split("### Study `warning`")[1].split("### Study")[0]
    rows = re.findall(r"^\| `[^|]*\| \d\.\d+ \| [^|]* \| [^|]* \| (\d+)/(\d+) \|", of, re.MULTILINE)
    assert set(rows) == {("0", "41")}
    assert f"of {len(rows)}, none rang in time before any of the 41 runs that diverged and could be judged" in of
    told = readme("Does any signal warn before a run collapses?")
    (score,) = re.findall(rf"^\| {re.escape(BEST)} \| [^|]* \| ([^|]*) \|", of.split("Beyond")[0], re.MULTILINE)
    assert f"AUROC {score}" in told
    most = 100 * (1 - 0.025 ** (1 / 41))  # Clopper and Pearson's upper limit of none
    assert (
        f"of {len(rows)} signals none rings in time before any of 41 runs, so {most:.1f} % at most (95 % limit)" in told
    )
    assert f"of one alarm by itself 0/41 [0.0–{most:.1f} %]; of the best of {len(rows)}," in of
    assert f"up to {100 * (1 - (0.025 / len(rows)) ** (1 / 41)):.1f} %" in of
    table, onset = runs("warning"), onsets("warning")
    odd = ~table["seed"].isin(np.sort(table["seed"].unique())[::2]).to_numpy()
    assert (
        f"The other {(odd & np.isfinite(onset)).sum() - 41} of the {(odd & np.isfinite(onset)).sum()} that diverged"
        in of
    )
    for (recipe, rate), own in table.groupby(["recipe", "learning_rate"]):
        assert f"`{recipe}` at {rate:.3g} {own['diverged'].sum()}/{len(own)}" in of
    assert "no alarm to rely on" in (ROOT / "docs" / "how-to" / "own-alarm.md").read_text(encoding="utf-8")


def test_sharpness_is_lowest_at_the_first_step_which_tells_the_text_and_falls_behind_before_an_onset() -> None:
    table, onset = runs("warning"), onsets("warning")
    values, steps = signal("warning", "logit_sharpness", 1e-3)
    healthy = ~np.isfinite(onset)
    assert (values[healthy, 1:].min(axis=1) > values[healthy, 0]).all()
    assert (
        f"every one of the {healthy.sum()} runs that did not diverge has its loudest value at the first step" in page()
    )
    english = signal("warning-english", "logit_sharpness", 1e-3)[0][:, 0]
    assert english.max() < values[:, 0].min()
    assert f"its values there are {english.min():.4f} to {english.max():.4f}" in page()
    assert runs("warning-english")["diverged"].all()
    papers, _ = signal("warning", "logit_sharpness", 5e-4)
    ratios: dict[int, list[float]] = {100: [], 0: []}
    kind = table.groupby(["recipe", "learning_rate"]).ngroup().to_numpy()
    for run in np.flatnonzero(~healthy):
        others = healthy & (kind == kind[run])
        for lag, of in ratios.items():
            at = np.flatnonzero(steps <= onset[run] - lag)
            if others.sum() >= 5 and at.size:
                of.append(papers[run, at[-1]] / np.median(papers[others, at[-1]]))
    assert f"100 steps before {np.median(ratios[100]):.2f}" in page()
    assert f"at it {np.median(ratios[0]):.2f} times" in page()
    assert np.median(ratios[0]) < np.median(ratios[100]) < 1


MEASURES = {
    "logit_sharpness at epsilon 0.0005": 5e-4, "logit_sharpness_centred at epsilon 0.0005": 5e-4,
    "hessian_eigenvalue at rank 0": 0.0, "preconditioned_eigenvalue at rank 0": 0.0, "gradient_curvature": 0.0,
    "critical_sharpness": 0.0, "sam_sharpness at rho 0.05": 0.0, "asam_sharpness at rho 0.5": 0.0,
    "box_sharpness at epsilon 0.0005": 5e-4, "hidden_sharpness at epsilon 0.0005": 5e-4,
    "logit_sharpness_lbfgsb at epsilon 0.0005": 5e-4,
}  # fmt: skip


def correlation(one: str, other: str) -> tuple[float, float]:
    """Spearman's within rate and step, of runs that did not diverge, mean over cells, by pandas; and half of an interval, by
    leaving out each of 16 lots of seeds.
    """
    table, healthy = runs("curvature"), ~np.isfinite(onsets("curvature"))
    (a, at), (b, there) = (signal("curvature", name.split(" at ")[0], MEASURES.get(name, 0.0)) for name in (one, other))
    both = np.intersect1d(at, there)
    a, b = a[:, np.isin(at, both)], b[:, np.isin(there, both)]

    def mean(kept: np.ndarray) -> float:
        each = [
            pd.Series(a[rows, j]).corr(pd.Series(b[rows, j]), method="spearman")
            for rate in table["learning_rate"].unique()
            if (rows := np.flatnonzero(kept & healthy & (table["learning_rate"] == rate).to_numpy())).size
            for j in range(len(both))
            if np.isfinite(a[rows, j]).all() and np.isfinite(b[rows, j]).all()
        ]
        return float(np.nanmean(each))

    lots = [mean((table["seed"] % 16 != lot).to_numpy()) for lot in range(16)]  # the jackknife by groups
    error = math.sqrt(15 / 16 * float(((np.array(lots) - np.mean(lots)) ** 2).sum()))
    return mean(np.ones(len(table), bool)), 2.0 * error


@pytest.mark.parametrize("name", MEASURES)
def test_measures_correlate_over_seeds_as_the_page_says(name: str) -> None:
    of = page().split("### Study `curvature`")[1].split("Whether they measure one thing")[1]
    (row,) = re.findall(rf"^\| `{re.escape(name)}` \| (.*) \|$", of.split("Ten iterations")[0], re.MULTILINE)
    others = ("logit_sharpness at epsilon 0.0005", "hessian_eigenvalue at rank 0", "grad_norm")
    for cell, other in zip(row.split(" | "), others, strict=True):
        if other == name:
            assert cell == "1"
            continue
        value, low, high = map(float, re.fullmatch(INTERVAL, cell).groups())  # type: ignore[union-attr]
        mean, reach = correlation(name, other)
        assert value == pytest.approx(mean, abs=0.006)
        assert (high - low) / 2 == pytest.approx(reach, rel=0.6, abs=0.006)
    told = readme("Is sharpness at the logits curvature?")
    if name.startswith(("logit_sharpness at", "box")):
        assert row.split(" | ")[1] in told
    if name.startswith("logit_sharpness at"):
        explained = (ROOT / "docs" / "explanation" / "exact-sharpness.md").read_text(encoding="utf-8")
        assert row.split(" | ")[1] in " ".join(explained.split())


def test_of_measures_of_curvature_none_rings_in_time() -> None:
    of = page().split("### Study `curvature`")[1].split("Beyond")[0]
    rows = dict(re.findall(r"^\| `([^`]*)`[^|]*\| \d\.\d+ \| [^|]* \| [^|]* \| (\d+/\d+) \|", of, re.MULTILINE))
    assert {rows[name] for name in rows if "eigenvalue" in name or "sharpness" in name} == {"0/7"}
    assert "[eigenvalues, critical sharpness or balls]" in readme("Does any signal warn before a run collapses?")
    most = 100 * (1 - 0.025 ** (1 / 7))
    assert f"before any of 7, which leaves up to {most:.1f} % open" in readme(
        "Does any signal warn before a run collapses?"
    )
    assert f"of one alarm by itself 0/7 [0.0–{most:.1f} %] and 1/7 [" in of
    assert (
        f"of the best of 29, over all at once (Bonferroni), up to {100 * stats.beta.isf(0.025 / 29, 2, 6):.1f} %" in of
    )
    assert "that is not excluded of all at once" in of
    table = runs("curvature")
    failed = table.groupby("learning_rate")["diverged"].sum()
    assert failed.tolist() == [0, 16]  # so that one of two rates tells anything at all
    assert "Within a recipe and rate 1 of these 2 can tell runs apart." in of
    name = max(rows, key=lambda one: int(rows[one].split("/")[0]))
    assert f"of {len(rows)}, the most that one rang in time is {rows[name].replace('/', ' of ')} (`{name}`)" in of


def test_what_the_mean_of_correlations_is_made_of_and_how_it_is_along_a_run() -> None:
    table, onset = runs("curvature"), onsets("curvature")
    (a, at), (b, there) = signal("curvature", "logit_sharpness", 5e-4), signal("curvature", "hessian_eigenvalue")
    both = np.intersect1d(at, there)
    a, b = a[:, np.isin(at, both)], b[:, np.isin(there, both)]
    healthy, rate = ~np.isfinite(onset), table["learning_rate"].to_numpy()
    cells = pd.DataFrame([
        (one, step, stats.spearmanr(a[healthy & (rate == one), j], b[healthy & (rate == one), j]).statistic)
        for one in np.unique(rate) for j, step in enumerate(both)
    ], columns=["rate", "step", "rho"])  # fmt: skip
    of = page().split("### Study `curvature`")[1]
    least, most = cells.loc[cells["rho"].idxmin()], cells.loc[cells["rho"].idxmax()]
    ends = [f"{row['rho']:+.2f} (rate {row['rate']:.3g}, step {row['step']:.0f})" for row in (least, most)]
    assert f"is of {len(cells)} cells, which go from {ends[0]} to {ends[1]}; means:" in of
    for one, own in cells.groupby("rate"):
        assert f"at {one:.3g} {own['rho'].mean():+.2f} [" in of
    before = cells["step"] < onset.min()
    assert f"before step {onset.min():.0f}, at which the first run failed, {cells[before]['rho'].mean():+.2f} [" in of
    assert f"from then on {cells[~before]['rho'].mean():+.2f} [" in of
    late = both >= 100  # the end of the warm-up
    along = [stats.spearmanr(a[run, late], b[run, late]).statistic for run in np.flatnonzero(healthy)]
    low, high = np.quantile(along, (0.1, 0.9))
    assert (
        f"correlate by {np.median(along):+.2f}, the median of {len(along)} runs, in the middle 80 % by {low:+.2f} to {high:+.2f}"
        in of
    )
    told = readme("Is sharpness at the logits curvature?")
    assert f"the mean of {least['rho']:+.2f} to {most['rho']:+.2f} by rate and step" in told
    assert f"over a run's steps, in which both rise, by {np.median(along):+.2f}" in told
    assert np.median(a[healthy][:, late][:, -1]) > np.median(a[healthy][:, late][:, 0])
    assert np.median(b[healthy][:, late][:, -1]) > np.median(b[healthy][:, late][:, 0])


@pytest.mark.parametrize("study", ["warning", "curvature"])
def test_which_way_the_papers_metric_goes_before_an_onset_is_by_a_sign_test(study: str) -> None:
    table, onset = runs(study), onsets(study)
    papers, steps = signal(study, "logit_sharpness", 5e-4)
    healthy, kind = ~np.isfinite(onset), table.groupby(["recipe", "learning_rate"]).ngroup().to_numpy()
    told = []
    for lag in (200, 150, 100, 50, 20):
        below = of = 0
        for run in np.flatnonzero(~healthy):
            others = healthy & (kind == kind[run])
            at = np.flatnonzero(steps <= onset[run] - lag)
            if others.sum() >= 5 and at.size:
                of += 1
                below += papers[run, at[-1]] < np.median(papers[others, at[-1]])
        if stats.binomtest(below, of).pvalue <= 0.05 / 5:
            assert below > of / 2
            told.append(str(lag))
    words = (
        f"told {', '.join(told[:-1])} and {told[-1]} steps before"
        if told
        else "At no step before the onset is it told from theirs"
    )
    assert words in page().split(f"### Study `{study}`")[1].split("Thresholds that move")[0]
    assert bool(told) == (study == "warning")


def test_a_verdict_that_turns_round_at_other_rates_is_named() -> None:
    """Every contrast of losses at every other rate that has all its cells, by Student's test and Bonferroni over all of them."""
    looks, turned = [], []
    for name, claim in BY_NAME.items():
        if claim["statistic"] == "loss":
            for rate in np.unique(runs(claim["study"])["learning_rate"]):
                if "learning_rate" in claim and math.isclose(rate, claim["learning_rate"]):
                    continue
                try:
                    found = contrast({**claim, "learning_rate": rate}, "final_loss")
                except KeyError:  # a recipe that has no run there
                    continue
                if len(found) > 1:
                    looks.append((name, rate, found))
    for name, rate, found in looks:
        half = stats.t.ppf(0.975, len(found) - 1) * stats.sem(found)
        result = page().split(f"**Our claim, `{name}`.**")[1].split("\n\n")[1]
        assert f"{found.mean():+.4f} [{found.mean() - half:+.4f}, {found.mean() + half:+.4f}] at {rate:.3g}" in result
        differences, state = judged()[name]
        other = (found.mean() > 0) != (differences.mean() > 0)
        told = stats.ttest_1samp(found, 0.0).pvalue <= 0.05 / len(looks)
        if state != "undecided" and BY_NAME[name]["expect"] != "alike" and other and told:
            turned.append(f"`{name}` at {rate:.3g}")
    assert turned == ["`R7-decay` at 0.00238"]
    second = page().split("## The second half\n")[1]
    assert f"of {len(looks)} looks at the same contrast at other rates" in second
    assert f"(Bonferroni over all of them): {', '.join(turned)}." in second
    assert second.count("it is the other way round**") == len(turned)


def test_ten_iterations_find_so_much_of_the_maximum_at_their_own_logits() -> None:
    of = opened("curvature")["probes/logit_sharpness_lbfgsb"].to_dataset()
    share = 100 * of["logit_sharpness_lbfgsb_lower"].values / of["logit_sharpness_lbfgsb_upper"].values
    assert share.max() < 100.001
    words = (
        f"find {share.min():.1f} % of the exact maximum at these logits or more, in the median {np.median(share):.1f} %"
    )
    assert f"at {share.size:,} points of training" in page()
    assert words in page()


def test_the_best_alarm_on_the_size_that_it_never_saw() -> None:
    own = runs("warning-6x256")
    values, steps = signal("warning-6x256", "logit_sharpness", 1e-3)
    score = auroc(-values, steps, "warning-6x256", np.ones(len(own), bool))
    (cells,) = re.findall(rf"^\| at 6 × 256 \(`warning-6x256`\) \| {re.escape(BEST)} \| (.*) \|$", page(), re.MULTILINE)
    assert float(cells.split(" [")[0]) == pytest.approx(score, abs=6e-4)
