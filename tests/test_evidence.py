"""The committed studies are whole, are those of the study files, and say what the page of findings and the README say of them.

Numbers are worked out here by pandas, NumPy and SciPy from /summary, never by what made the page.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from train import open_study, read_study
from train.directory import study_of

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "studies" / "results"
NAMES = ("mantissa", "conditions", "exponent", "rounding", "scaling", "seeds", "size")
RUNS = {
    "mantissa": 3680, "conditions": 2016, "exponent": 2376, "rounding": 1536, "scaling": 960, "seeds": 1920, "size": 1260,
    "fp8": 1952, "hardware": 352, "switch": 2112, "layers": 1088, "data": 1512, "schedules": 1860, "optimizer": 1682,
    "warning": 896, "warning-english": 384, "warning-6x256": 384, "curvature": 128, "llama-120m": 16,
}  # fmt: skip


@cache
def opened(name: str) -> Any:
    return open_study(RESULTS / name)


@cache
def runs(name: str) -> pd.DataFrame:
    found: pd.DataFrame = opened(name)["summary"].to_dataset().to_dataframe().reset_index()
    return found


@cache
def page() -> str:
    return (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")


def readme(question: str) -> str:
    """The answer to a question of the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| {re.escape(question)}.* \| (.*) \|$", text, re.MULTILINE)
    return str(row)


def verdict(claim: str) -> tuple[str, str]:
    """Effect and verdict in the table of claims."""
    ((effect, state),) = re.findall(
        rf"^\| [^|]*\| `{claim}`: [^|]*\| [^|]*\| ([^|]*) \| [^|]*\| ([^|]*) \| [^|]*\|$", page(), re.MULTILINE
    )
    return effect, state.strip("*")


def paired(table: pd.DataFrame, recipe: str, baseline: str) -> pd.Series:
    """Differences of final training losses, by seed."""
    wide = table.pivot_table("final_loss", "seed", "recipe", dropna=False)
    return (wide[recipe] - wide[baseline]).dropna()


@pytest.mark.parametrize("name", RUNS)
def test_a_digest_is_whole_and_its_studys(name: str) -> None:
    folder = RESULTS / name
    digest, file = (folder / "digest.sha256").read_text().split()
    assert (file, hashlib.sha256((folder / "digest.nc").read_bytes()).hexdigest()) == ("digest.nc", digest)
    attrs = opened(name).attrs
    assert (attrs["runs_finished"], attrs["runs_planned"]) == (RUNS[name],) * 2
    assert attrs["device"] == "NVIDIA H200"
    ours, theirs = study_of(folder), read_study(ROOT / "studies" / f"{name}.toml")
    assert ours == theirs
    identities = set(opened(name)["summary"]["run"].values.tolist())
    assert identities == {run.identity for run in theirs.runs()}


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_that_had_other_files_beside_it_is_said_to_have(name: str) -> None:
    commit = opened(name).attrs["git_commit"]
    assert re.fullmatch(r"[0-9a-f]{40}\+changed", commit)
    block = page().split(f"### Study `{name}`")[1].split("\n![")[0]
    assert commit in block
    assert (RESULTS / name / "git_commit_note.txt").read_text().strip() in block


def test_bf16_and_tf32_fail_as_often() -> None:
    own = runs("seeds")
    wide = own[(own["dataset"] == "python") & (own["learning_rate"] == 8e-3)].pivot_table("diverged", "seed", "recipe")
    ours, theirs = wide["native-bf16"] > 0, wide["native-tf32"] > 0
    assert verdict("F1")[0].startswith(f"{ours.mean() - theirs.mean():+.3f} [")
    assert verdict("F1")[1] == "undecided"
    assert stats.binomtest(int((ours & ~theirs).sum()), int((ours != theirs).sum())).pvalue > 0.4
    assert f"| {int((ours & ~theirs).sum())} / {int((~ours & theirs).sum())} | 0.500 |" in page()
    high = own[own["learning_rate"] == 0.0113].pivot_table("diverged", "seed", "recipe").sum()
    low = wide.sum()
    told = readme("Does BF16 fail where TF32 does not?")
    assert f"{low['native-bf16']:.0f} of 192 runs against {low['native-tf32']:.0f}" in told
    assert f"half an octave above {high['native-bf16']:.0f} against {high['native-tf32']:.0f}" in told


def test_simulated_bf16_is_bf16_to_the_last_bit() -> None:
    own = runs("seeds")
    wide = own.pivot_table("final_loss", ["dataset", "learning_rate", "seed"], "recipe")
    assert (wide["e8m7"] == wide["native-bf16"]).all()
    assert f"to the last bit in {len(wide)} of {len(wide)} pairs" in page()


def test_only_one_mantissa_bit_fails_where_bf16_trains() -> None:
    failed = runs("mantissa").pivot_table("no_progress", "learning_rate", "recipe", aggfunc="sum")
    trains = failed[failed["native-bf16"] == 0]
    assert len(trains) == 9
    assert set(trains.columns[(trains > 0).any()]) == {"masked-e8m1"}
    k = {rate: int(trains.loc[rate, "masked-e8m1"]) for rate in (0.032, 0.064)}
    assert f"`masked-e8m1` ({k[0.032]}/96 at 0.032, {k[0.064]}/96 at 0.064); of the other formats none" in page()
    assert verdict("F2-one-bit") == (f"{k[0.064] / 96:+.3f} [+0.629, +0.826] of runs", "supported")
    told = readme("How few mantissa bits train?")
    assert f"{k[0.064]} of 96 runs fail" in told


def test_truncation_costs_twice_as_much_a_bit_and_noise_four_times() -> None:
    cost: dict[str, list[float]] = {}
    own = runs("rounding")
    for name in ("masked-e8m", "stochastic-e8m"):
        at = own[own["learning_rate"] == 1e-3]
        wide = at.pivot_table("final_loss", "seed", "recipe")
        cost[name] = [float((wide[f"{name}{m}"] - wide["native-bf16"]).mean()) for m in (5, 4, 3, 2, 1)]
    assert (cost["masked-e8m"][-1] / cost["masked-e8m"][0]) ** 0.25 == pytest.approx(2, abs=0.3)
    assert cost["stochastic-e8m"][-1] / cost["stochastic-e8m"][-2] == pytest.approx(4, abs=0.8)
    own = runs("mantissa")
    shared = own[
        (own["learning_rate"] == 6.25e-5) & (own["seed"] < own.loc[own["recipe"] == "masked-e8m7", "seed"].max() + 1)
    ]
    loss = opened("mantissa")["evaluation"]["validation_loss"].isel(eval_step=-1)
    last = pd.Series(loss.values, index=loss["run"].values)
    wide = shared.assign(last=shared["run"].map(last)).pivot_table("last", "seed", "recipe").dropna()
    few, many = ((wide[f"masked-e8m{m}"] - wide["native-bf16"]).mean() for m in (1, 7))
    assert len(wide) == 16
    assert f"| **+0.2572** | {(few / many) ** (1 / 6):.2f} [2.06, 2.08], M = 7 to 1 |" in page()
    told = readme("Why does cutting bits off cost more than rounding?")
    growth = {
        (kind, rate): [float(x) for x in re.findall(r"\d+\.\d\d", cell)]
        for kind, rate, cell in re.findall(
            r"^\| ([a-z ]+), (\S+) \| .* \| ([^|]*), M = \d to \d \|$", page(), re.MULTILINE
        )
    }
    cut, noise = growth["toward zero", "0.001"], growth["stochastic", "0.001"]
    assert cut[2] < noise[1]
    for value, low, high in (cut, noise):
        assert f"{value:.2f} [{low:.2f}, {high:.2f}]" in told
    assert growth["toward zero", "0.004"][2] > growth["stochastic", "0.004"][1], (
        "at the best rate they are not told apart"
    )


def test_trained_three_times_as_long_one_bit_learns_and_loses_it_again() -> None:
    own = runs("conditions")
    long = own[(own["steps"] == 3000) & (own["learning_rate"] == 8e-3)]
    one = long[long["recipe"] == "masked-e8m1"]
    assert (int(one["no_progress"].sum()), int(one["gap"].sum()), len(one)) == (0, 24, 24)
    history = opened("conditions")["history"]["train_loss"]
    chosen = pd.Index(history["run"].values).isin(one["run"])
    losses = history.transpose("run", "step").values[chosen]
    losses = losses[:, np.isfinite(losses).any(axis=0)]
    smooth = pd.DataFrame(losses.T.astype(float)).rolling(10).mean().to_numpy()[9:]  # (step, run)
    entropy = float(one["unigram_entropy"].iloc[0])
    back = 0
    for run in smooth.T:
        learnt = int(np.argmax(run < entropy - 0.5))
        back += bool(run.min() < entropy - 0.5 and (run[learnt:] >= entropy - 0.1).any())
    median = np.median(smooth, axis=1)
    assert f"{back} of 24 runs came 0.5 nats below the entropy" in page()
    assert f"falls to {median[: len(median) // 2].min():.2f} at step" in page()
    assert f"rises to {median[len(median) // 4 :].max():.2f} at step" in page()
    assert f"all {back} learn and lose it again" in readme("How few mantissa bits train?")


def test_five_exponent_bits_fail_by_the_divisor() -> None:
    own = runs("exponent")
    failed = own.groupby(["recipe", "loss_scale"])["no_progress"].agg(["sum", "count"])
    five = failed.loc["e5m7"].sort_index()
    assert f"`e5m7` {five.iloc[1]['sum']}/180 at loss scale 1, {five.iloc[0]['sum']}/180 at loss scale 2^-8" in page()
    assert failed.loc[["e6m7", "e7m7", "e8m4"], "sum"].sum() == 0
    told = readme("How few exponent bits train, unscaled?")
    assert f"{five.iloc[1]['sum']} of 180 runs fail" in told
    assert "all 180" in told
    assert five.iloc[0]["sum"] == 180
    assert f"none of {failed.loc['e6m7', 'count'].sum()}" in told
    at = own[(own["loss_scale"].astype(float) == 2**-8) & (own["learning_rate"] == 2e-3)]
    wide = at.pivot_table("no_progress", "seed", "recipe").dropna(subset=["e5m7", "e8m4"])
    assert verdict("F3")[0].startswith(f"{(wide['e5m7'] - wide['e8m4']).mean():+.3f} [")
    assert len(wide) == 100


def test_scales_save_three_exponent_bits() -> None:
    own = runs("scaling")
    failed = own.groupby("recipe")["no_progress"].agg(["sum", "count"])
    lost = failed[failed["sum"] > 0]
    assert dict(lost["sum"]) == {"e4m7": 64, "e3m7": 64}
    assert set(failed["count"]) == {64}
    assert "Failed, of all rates together: `e4m7` 64/64; `e3m7` 64/64; none of" in page()
    effect = verdict("R2")[0]
    assert effect.startswith("-1.000 [")
    at = own[own["learning_rate"] == 1e-3]
    assert verdict("R2-blocks")[0].startswith(f"{paired(at, 'e3m7@block32:e8m0fnu', 'e8m7').mean():+.3f} [")
    means = own[own["no_progress"] == 0].pivot_table("final_loss", "recipe", "learning_rate")
    best = means.idxmin(axis=1)
    by_run = own.set_index(["recipe", "learning_rate", "seed"])["final_loss"].sort_index()
    shown, dearer = [], set()
    for recipe in set(means.index) - {"e8m7"}:
        gap = by_run[recipe, best[recipe]] - by_run["e8m7", best["e8m7"]]
        low, high = stats.t.interval(0.95, len(gap) - 1, gap.mean(), stats.sem(gap))
        row = rf"^\| `{re.escape(recipe)}` .* \| (\S+) \[(\S+), (\S+)\] \| 32 \|$"
        ((mean, least, most),) = re.findall(row, _scaling_block(), re.MULTILINE)
        assert mean == f"{gap.mean():+.4f}"
        assert float(least) == pytest.approx(low, abs=0.004)  # the page's limits allow for the choice of a rate too
        assert float(most) == pytest.approx(high, abs=0.004)
        if float(least) > 0:
            dearer.add(recipe)
        else:
            shown.append(float(most))
    assert dearer == {"e5m7", "e4m7-loss-2p8"}
    assert f"and beyond {max(shown):+.4f} none can be" in page()
    told = readme("And with a scale?")
    assert (
        f"none of {failed.loc['e3m7@tensor', 'count']} runs fails, against all {failed.loc['e3m7', 'sum']} without"
        in told
    )
    with_scales = list(re.findall(r"^\| `e3m7@\S+` .* \[\S+, (\S+)\] \| 32 \|$", _scaling_block(), re.MULTILINE))
    assert len(with_scales) == 3
    assert f"no more than {max(map(float, with_scales)):+.3f}" in told


def _scaling_block() -> str:
    return page().split("### Study `scaling`")[1].split("\n## ")[0]


@pytest.mark.parametrize(
    ("claim", "study", "recipe", "baseline", "rate"),
    [
        ("R1", "rounding", "masked-e8m3", "e8m3", 2e-3),
        ("R1-stochastic", "rounding", "stochastic-e8m1", "masked-e8m1", 2e-3),
        ("F2-unprotected", "conditions", "masked-e8m3", "masked-e8m7", 2e-3),
        ("R4-more", "exponent", "e8m6", "e8m7", 2e-3),
    ],
)
def test_a_claims_loss_is_the_mean_of_its_pairs(
    claim: str, study: str, recipe: str, baseline: str, rate: float
) -> None:
    own = runs(study)
    own = own[own["learning_rate"] == rate]
    if study == "conditions":
        plain = (own["layers"] == 4) & (own["steps"] == 1000) & (own["products"] == "linears")
        own = own[plain & (own["warmup"] == 0) & np.isinf(own["clip"].astype(float))]
    if study == "exponent":
        own = own[own["loss_scale"].astype(float) == 2**-8]
    differences = paired(own, recipe, baseline)
    assert verdict(claim)[0].startswith(f"{differences.mean():+.3f} [")
    t = stats.ttest_1samp(differences, 0.0).pvalue
    if claim != "R4-more":  # which is of equivalence
        assert verdict(claim)[1] == ("supported" if t < 0.05 / 17 else "undecided")


def test_the_unscaled_boundary_moves_with_size_and_the_mantissas_cost_does_not() -> None:
    own = runs("size")
    means = own.pivot_table("final_loss", ["width", "recipe"], "learning_rate")
    sound = own.pivot_table("no_progress", ["width", "recipe"], "learning_rate", aggfunc="sum").map(
        lambda k: k <= 0.1 * 9
    )
    best = {key: means.loc[key][sound.loc[key]].idxmin() for key in means.index}
    told = readme("Do small models stand for large ones?")
    for recipe in ("e5m7", "e8m1"):
        shown = []
        for width in (64, 640):
            at = own[own["width"] == width].set_index(["recipe", "learning_rate", "seed"])["final_loss"].sort_index()
            both = at[recipe, best[width, recipe]] - at["e8m7", best[width, "e8m7"]]
            shown.append(f"{both.mean():+.4f}")
        assert re.search(rf"`{recipe}` \{shown[0]} \[\S+ \S+\] to \{shown[1]} \[", page())
        assert f"{float(shown[0]):+.2f} to {float(shown[1]):+.2f}" in told


def test_no_rule_and_no_expectation_was_touched_since_the_runs() -> None:
    """The claims as they were at the commit that ran, but for comments; a new question gets a file of its own, with an alpha."""
    claims = tomllib.loads((ROOT / "studies" / "claims.toml").read_text(encoding="utf-8"))
    assert len(claims["claims"]) == 17
    content = json.dumps(claims, sort_keys=True).encode()
    assert hashlib.sha256(content).hexdigest() == "208971afe48bb924e70cc9a8696b28d8171b65c5ffdcf7796b547c1d9e92e88d"
