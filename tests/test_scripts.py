"""Scripts in `scripts/` answer what their first lines ask, of the committed studies, by ways of their own."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from train import open_study

ROOT = Path(__file__).parent.parent
SCRIPTS = [path.stem for path in sorted((ROOT / "scripts").glob("*.py")) if path.stem != "optuna_search"]
PAGE = ROOT / "docs" / "how-to" / "questions.md"


@cache
def opened(study: str) -> Any:
    """A study takes seconds to open, and scripts share three."""
    return open_study(study)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each script gives, drawn into a folder."""
    folder = tmp_path_factory.mktemp("pictures")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLBACKEND", "Agg")
        for name in SCRIPTS:
            script = import_module(f"scripts.{name}")
            patch.setattr(script, "open_study", opened)
            picture = folder / f"{name}.png"
            found[name] = script.main(str(ROOT / script.STUDY), str(picture))
            assert picture.read_bytes().startswith(b"\x89PNG")
    return found


def summary(study: str) -> Any:
    return opened(str(ROOT / "studies" / "results" / study))["summary"].to_dataset().to_dataframe()


def test_there_are_six_and_each_is_short_and_on_the_page() -> None:
    assert len(SCRIPTS) == 6
    for name in SCRIPTS:
        assert len((ROOT / "scripts" / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 60
        assert f"literalinclude}} ../../scripts/{name}.py" in PAGE.read_text(encoding="utf-8")


def test_range_or_precision_counts_runs(answers: dict[str, Any]) -> None:
    counted = summary("first-look-gpu").groupby("recipe")["diverged"].agg(["sum", "count"])
    found = answers["range_or_precision"].to_dataframe()
    assert (found["k"] == counted["sum"]).all()
    assert (found["n"] == counted["count"]).all()
    for row in found.itertuples():
        interval = binomtest(int(row.k), int(row.n)).proportion_ci(0.95, method="exact")
        assert (row.low, row.high) == pytest.approx((interval.low, interval.high))


def test_a_bias_doubles_what_noise_makes_fourfold(answers: dict[str, Any]) -> None:
    runs = summary("rounding").reset_index()
    found = answers["bias_or_noise"]["mean"]
    runs = runs[runs["learning_rate"] == 2e-3].pivot_table("final_loss", "seed", "recipe")
    for rounding, name in (("toward zero", "masked-e8m"), ("stochastic", "stochastic-e8m"), ("to nearest even", "e8m")):
        for bits in (5, 4, 3, 2, 1):
            expected = float((runs[f"{name}{bits}"] - runs["native-bf16"]).mean())
            assert float(found.sel(rounding=rounding, bits=bits)) == pytest.approx(expected, abs=1e-9)
    cut, noise = (found.sel(rounding=rounding).values for rounding in ("toward zero", "stochastic"))
    assert 1.5 < (cut[-1] / cut[0]) ** (1 / 4) < 2.7
    assert 2.8 < noise[-1] / noise[-2] < 4.5


def test_costs_end_where_the_page_on_recipes_says(answers: dict[str, Any]) -> None:
    page = (ROOT / "docs" / "recipes-12m.md").read_text(encoding="utf-8")
    last = answers["cost_while_training"].isel(eval_step=-1)
    for recipe in last["recipe"].values.tolist():
        mean, half = float(last["mean"].sel(recipe=recipe)), float(last["half"].sel(recipe=recipe))
        assert f"{mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}]" in page, recipe


def test_sharing_seeds_narrows_differences(answers: dict[str, Any]) -> None:
    runs = summary("recipes-12m").reset_index().pivot_table("final_loss", "seed", "recipe")
    found = answers["shared_seeds"].to_dataframe()
    assert "fp8-hybrid-unscaled" not in found.index, "of which one seed trained"
    for recipe, row in found.iterrows():
        difference = runs[recipe] - runs["native-bf16"]
        assert row["paired"] == pytest.approx(difference.std(), rel=1e-9)
        assert row["apart"] == pytest.approx(np.hypot(runs[recipe].std(), runs["native-bf16"].std()), rel=1e-9)


def test_the_readme_says_how_many_seeds_are_saved(answers: dict[str, Any]) -> None:
    found = answers["shared_seeds"].to_dataframe()
    times = ((found["apart"] / found["paired"]) ** 2).median()
    assert f"[A factor of {times:.0f}](docs/how-to/questions.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_sharpness_is_the_median_of_the_seeds(answers: dict[str, Any]) -> None:
    tree = opened(str(ROOT / "studies" / "results" / "first-look-gpu"))
    values = tree["sharpness"]["logit_sharpness"]
    for recipe in answers["sharpness_and_loss"]["recipe"].values.tolist():
        runs = values[((values["recipe"] == recipe) & (values["learning_rate"] == 8e-3)).values]
        expected = np.median(runs.values[:, :, 0], axis=0)
        np.testing.assert_array_equal(answers["sharpness_and_loss"]["logit_sharpness"].sel(recipe=recipe), expected)
    assert float(values["epsilon"][0]) == 5e-4


def test_definitions_overlap_as_counted_one_by_one(answers: dict[str, Any]) -> None:
    runs = summary("first-look-gpu")
    for one in ("no_progress", "spike", "gap"):
        for other in ("no_progress", "spike", "gap"):
            both = sum(bool(a) and bool(b) for a, b in zip(runs[one], runs[other], strict=True))
            found = answers["definitions_of_divergence"].sel(definition=one, other=other)
            assert float(found) == pytest.approx(both / int(runs[one].sum()))
    assert np.isnan(answers["definitions_of_divergence"].sel(definition="non_finite")).all()
