"""The report in Chromium, without a window and without a network: it draws, filters, links, saves and prints, and says no error.

What is counted is what a reader gets: the CSV files behind the figures, the pictures that are saved, the address. Skipped where
there is no Chromium or no Playwright.
"""

from __future__ import annotations

import csv
import os
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import xarray as xr

from exmy.report import render
from tests.report_page import RINGS, STUDY, full_tree, loudest, stretched, with_coordinates
from tests.test_figure import make_tree
from tests.test_report import SCENES, hostile_tree
from train import open_study, stability_table
from train.store import study_of

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parent.parent
FIGURES = ("multiple", "heat", "curves", "lead", "final", "layers", "grids", "recipe")
WIDTHS = (390, 820, 1360)
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on the PATH")
    with playwright.sync_playwright() as driver:
        unconfined = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses its sandbox to root
        window = driver.chromium.launch(executable_path=chromium, args=unconfined)
        yield window
        window.close()


@pytest.fixture
def visit(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Open a page, wait until it has drawn; at the end, nothing may have been said on the console or asked of a network."""
    said: list[str] = []
    contexts: list[Any] = []

    def asked_for(request: Any) -> None:
        if request.url.split(":")[0] not in ("file", "data", "blob"):
            said.append(request.url)

    def visit(source: str | Path, address: str = "", width: int = 1280, **how: Any) -> Any:
        path = source if isinstance(source, Path) else tmp_path / f"page-{len(contexts)}.html"
        if isinstance(source, str):
            path.write_text(source, encoding="utf-8")
        context = browser.new_context(viewport={"width": width, "height": 800}, accept_downloads=True, **how)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", asked_for)
        page.goto(path.as_uri() + address)
        page.wait_for_selector("html[data-ready]")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert said == []


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the made-up study that has everything."""
    path = tmp_path_factory.mktemp("full") / "index.html"
    path.write_text(render([(STUDY, full_tree())]), encoding="utf-8")
    return path


def settled(page: Any) -> None:
    """Wait until what is near the view is drawn, so that nothing moves any more."""
    page.wait_for_function("[...frames.values()].every(frame => !frame.near || !frame.stale)")


def draw_all(page: Any) -> None:
    """Go down the page until every figure has been near the view, and drawn."""
    for figure in page.query_selector_all("figure"):
        if figure.is_visible():
            figure.scroll_into_view_if_needed()
    page.wait_for_function("[...frames.values()].every(frame => !frame.stale)")


def saved(page: Any, name: str, kind: str, place: int = 0) -> bytes:
    """What the reader gets from a figure's button."""
    figure = page.locator(f"figure[data-name={name}]").nth(place)
    for _ in range(2):  # what comes near is drawn, and may move the button: a click that it moves from under is none
        figure.scroll_into_view_if_needed()
        page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        settled(page)
    with page.expect_download() as got:
        figure.get_by_role("button", name=f"as {kind}").click()
    assert got.value.suggested_filename.endswith("." + kind.lower())
    return Path(got.value.path()).read_bytes()


def table(page: Any, name: str, place: int = 0) -> list[dict[str, str]]:
    return list(csv.DictReader(saved(page, name, "CSV", place).decode().splitlines()))


@pytest.mark.parametrize(("width", "theme"), list(zip(WIDTHS, ("light", "dark", "light"), strict=True)))
def test_everything_is_drawn_at_three_widths_and_in_two_themes(
    visit: Any, full: Path, tmp_path: Path, width: int, theme: str
) -> None:
    page = visit(full, width=width, color_scheme=theme)
    draw_all(page)
    assert {f.get_attribute("data-name") for f in page.query_selector_all("figure")} == set(FIGURES)
    assert page.evaluate("document.documentElement.scrollWidth") == width  # nothing sticks out
    for plot in page.query_selector_all(".plot"):
        assert plot.query_selector("svg, p"), plot.inner_html()[:200]
        assert len(plot.get_attribute("aria-label")) > 20
        box = plot.bounding_box()
        for drawing in plot.query_selector_all("svg"):
            inside = drawing.bounding_box()
            assert inside is None or inside["width"] <= box["width"] + 1
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    pixels = matplotlib.image.imread(tmp_path / "page.png")
    assert pixels.shape[1] == width
    assert (pixels[5, 5, :3] > 0.9).all() == (theme == "light")


def test_a_recipe_that_is_put_away_is_in_no_figure(visit: Any, full: Path) -> None:
    page = visit(full)
    draw_all(page)
    before = {
        name: {line["recipe"] for line in table(page, name)} for name in FIGURES if name not in ("grids", "recipe")
    }
    assert before["lead"] == {"e8m7", "e8m3", "e8m1", "e5m7"}
    assert all("e8m1" in recipes for recipes in before.values())
    assert "e8m1" in {line["format"] for line in table(page, "grids")}
    page.get_by_role("button", name="e8m1", exact=True).click()
    for name, recipes in before.items():
        if name != "lead":
            assert {line["recipe"] for line in table(page, name)} == recipes - {"e8m1"}, name
    assert "No diverged run could be judged" in page.locator("figure[data-name=lead]").inner_text()
    assert "e8m1" not in {line["format"] for line in table(page, "grids")}
    assert page.locator("figure[data-recipe=e8m1]").count() == 0
    assert not page.locator("li[data-recipe=e8m1]").is_visible()
    assert page.inner_text("#count") == "144 of 192 runs"


def test_counts_and_intervals_of_some_seeds_are_those_of_python(visit: Any) -> None:
    tree = full_tree(seeds=8)
    page = visit(render([(STUDY, tree)]))
    page.locator(".picker[data-facet=seed] summary").click()
    for seed in ("0", "3", "5"):
        page.locator(f"input[data-facet=seed][value='{seed}']").click()
    assert page.locator("#verdict-note").is_visible()
    assert page.inner_text(".picker[data-facet=seed] .chosen") == "5 of 8"
    page.keyboard.press("Escape")
    summary = tree["summary"].to_dataset()
    expected = stability_table(summary.isel(run=~np.isin(summary["seed"].values, [0, 3, 5])))
    lines = table(page, "heat")
    assert len(lines) == 16
    for line in lines:
        cell = expected.sel(recipe=line["recipe"], learning_rate=float(line["learning_rate"]))
        assert (int(line["runs"]), int(line["diverged"])) == (5, int(cell["k"]))
        assert float(line["rate_lower"]) == pytest.approx(float(cell["rate_lower"]), abs=1e-5)
        assert float(line["rate_upper"]) == pytest.approx(float(cell["rate_upper"]), abs=1e-5)
        assert int(line["finite"]) == int(cell["finite"])
        if line["finite"] != "0":
            assert float(line["mean_final_loss"]) == pytest.approx(float(cell["final_loss_mean"]), rel=1e-3)
    assert {line["seed"] for line in table(page, "curves")} == set("12467")
    at = expected.sel(learning_rate=5e-4)  # the baseline's best
    for line in table(page, "multiple"):
        assert (line["runs"], line["chosen_runs"]) == ("8", "5")
        assert int(line["chosen_diverged"]) == int(at["k"].sel(recipe=line["recipe"]))
        assert float(line["chosen_rate_high"]) == pytest.approx(
            float(at["rate_upper"].sel(recipe=line["recipe"])), abs=1e-5
        )
    assert "chosen seeds" in page.inner_html("figure[data-name=multiple] svg")
    # Seeds 1, 2, 4, 6, 7: (seed + 1) has mean 5; the activations of the first tensor of e8m7 have 1 · 5 / 100 / 2.
    (first,) = {
        line["mean"] for line in table(page, "layers") if (line["recipe"], line["tensor"]) == ("e8m7", "h.0.attn.qkv")
    }
    assert float(first) == pytest.approx(0.025, rel=1e-3)


def test_runs_of_a_digest_that_have_no_signals_are_not_taken_for_lost(visit: Any) -> None:
    """Signals of 3 of 12 seeds: the line is the median of these, 1, and no gap as where most seeds were lost."""
    tree = full_tree()
    signals = tree["signals"].to_dataset()
    tree["signals"] = xr.DataTree(signals.where(signals["seed"] < 3))
    tree.attrs |= {"digest_every": 10, "digest_signal_seeds": 3}
    page = visit(render([(STUDY, tree)]), "#curves?signal=attention_logit")
    settled(page)
    assert "alarm signals and layers are of 3 of 12 seeds" in page.inner_text("header")
    drawn = "[...document.querySelector('figure[data-name=curves] .plot').data]"
    lines = page.evaluate(f"{drawn}.filter(t => t.yaxis === 'y4' && t.line?.dash).map(t => t.y)")
    assert [set(line) for line in lines] == [{1}] * 4


def test_a_digest_that_kept_the_loudest_of_all_layers_says_so_where_layers_would_be(visit: Any) -> None:
    page = visit(render([(STUDY, loudest(full_tree()))]), "#layers")
    settled(page)
    assert "this digest has kept the loudest of all layers alone" in page.inner_text("#layers")
    assert "signals are the loudest of blocks, tensors and roles" in page.inner_text("header")


def test_layers_are_drawn_within_the_steps_that_were_trained(visit: Any, full: Path) -> None:
    page = visit(full, "#layers")
    settled(page)
    for found in page.evaluate("[...document.querySelector('figure[data-name=layers] .plot').data].map(t => t.x)"):
        assert found == sorted(found)
        assert (found[0], found[-1]) == (0, 295)  # steps 0, 10, ... 290


def test_of_many_recipes_it_is_told_first_which_have_which_verdict(visit: Any) -> None:
    tree = with_coordinates(make_tree(recipes=7, rates=3, seeds=30))
    tree["summary"]["diverged"] |= tree["summary"]["recipe"] == "e4m3"
    page = visit(render([(STUDY, tree)]))
    tally = page.locator(".tally > div")
    told = {line.locator(".state").inner_text(): line.locator("dd").inner_text().split() for line in tally.all()}
    cards = [item.inner_text().split("\n")[0] for item in page.locator(".verdicts li").all()]
    assert len(cards) == 6
    assert sorted(name for names in told.values() for name in names) == sorted(
        line["recipe"] for line in table(page, "multiple") if line["verdict"] != "baseline"
    )
    for line in table(page, "multiple"):
        assert line["verdict"] == "baseline" or line["recipe"] in told[line["verdict"]]
    assert len(told) > 1
    (state, first), *_ = told.items()
    for name in first:
        page.get_by_role("button", name=name, exact=True).click()
    assert state not in page.locator(".tally").inner_text(), "a verdict of no recipe that is shown"


def test_texts_and_models_can_be_put_away(visit: Any) -> None:
    page = visit(render([(STUDY, with_coordinates(make_tree(recipes=3, datasets=2)))]))
    assert page.locator("figure[data-name=heat]").count() == 2
    page.locator(".picker[data-facet=dataset] summary").click()
    page.get_by_role("checkbox", name="prose").click()
    assert page.locator("figure[data-name=heat]").count() == 1
    assert page.locator(".group:visible h3").all_inner_texts() == ["dataset python"]
    assert page.inner_text("#count") == "36 of 72 runs"
    page.get_by_role("checkbox", name="python").click()
    assert page.locator("#nothing").is_visible()
    assert page.locator("figure").count() == 0
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Show everything").click()
    assert page.locator("figure[data-name=heat]").count() == 2
    assert page.inner_text("#count") == "all 72 runs"


def test_a_cell_of_the_heat_map_shows_its_runs(visit: Any, full: Path) -> None:
    page = visit(full)
    figure = page.locator("figure[data-name=heat]")
    figure.scroll_into_view_if_needed()
    settled(page)
    page.wait_for_selector("figure[data-name=heat] .xy .hm")
    area = page.locator("figure[data-name=heat] .xy .hm image, figure[data-name=heat] .xy .hm").first.bounding_box()
    # Four rates across and four recipes down; the third recipe at the last rate, e8m1 at 0.004.
    page.mouse.move(area["x"] + area["width"] * 3.5 / 4, area["y"] + area["height"] * 2.5 / 4)
    page.mouse.down()
    page.mouse.up()
    runs = figure.locator(".runs")
    assert runs.locator("h3").inner_text() == "e8m1 at learning rate 0.004: 1/12 [0–38 %] diverged"
    rows = [row.split("\t") for row in runs.locator("tbody tr").all_inner_texts()]
    assert [row[0] for row in rows] == [str(seed) for seed in range(12)]
    assert [row[3] for row in rows] == ["yes, at step 299", *["no"] * 11]
    assert "cell=0.0%7Ce8m1%7C0.004" in page.url
    runs.get_by_role("button", name="Show curves at this learning rate").click()
    assert {line["learning_rate"] for line in table(page, "curves")} == {"0.004"}
    assert page.locator("#rate").input_value() == "0.004"


def test_late_steps_are_told_to_the_last_digit(visit: Any) -> None:
    """Step 299 x 3343 is 999557, and the alarm's 60 x 3343 is 200580."""
    page = visit(render([(STUDY, stretched(full_tree(), 3343))]), "#heat?cell=0.0%7Ce8m1%7C0.004")
    settled(page)
    assert (
        page.locator("figure[data-name=heat] .runs tbody tr").first.inner_text().split("\t")[3] == "yes, at step 999557"
    )
    assert {line["diverged_step"] for line in table(page, "final") if line["recipe"] == "e8m1"} == {"", "999557"}
    (rang,) = [line for line in table(page, "lead") if line["signal"] == "attention_logit" and line["alarm_step"]]
    assert rang["alarm_step"] == str(RINGS * 3343)
    page.evaluate("state.rate = 0.004; state.signal = 'attention_logit'; changed()")
    lead = int(rang["lead_steps"])
    for name, words in (
        ("curves", ("diverged, step 999557,", f"alarm at step 200580, {lead} steps before the onset")),
        ("lead", (f"rang at step 200580, {lead} steps before", f"median {lead} steps")),
    ):
        figure = page.locator(f"figure[data-name={name}]")
        figure.scroll_into_view_if_needed()
        settled(page)
        said = page.evaluate(
            f"[...frames.values()].find(f => f.name === '{name}').plot.data.flatMap(t => t.text ?? [])"
        )
        for part in words:
            assert any(part in text for text in said), (part, said)
    assert f"median {lead} steps" in page.locator("figure[data-name=lead] .plot").get_attribute("aria-label")
    assert page.evaluate("[12345, 12345.5, 0, NaN, null].map(stepWord)") == ["12345", "12345.5", "0", "–", "–"]


def test_a_cell_is_reached_by_keyboard(visit: Any, full: Path) -> None:
    page = visit(full)
    summary = page.locator("figure[data-name=heat] .cells summary")
    summary.scroll_into_view_if_needed()
    summary.focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    runs = page.locator("figure[data-name=heat] .runs h3")
    assert runs.inner_text() == "e8m7 at learning rate 0.0005: 0/12 [0–26 %] diverged"
    assert page.evaluate("document.activeElement.dataset.cell") == "0.0|e8m7|0.0005"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert runs.inner_text().startswith("e8m7 at learning rate 0.001: ")
    page.keyboard.press("Enter")
    assert runs.count() == 0


def test_a_link_shows_what_it_was_taken_from(visit: Any, full: Path) -> None:
    page = visit(full)
    page.get_by_role("button", name="e8m3", exact=True).click()
    page.locator("#rate").select_option("0.002")
    page.locator("#signal").select_option("attention_logit")
    page.get_by_role("link", name="Final loss").click()
    address = page.url[page.url.index("#") :]
    assert address.startswith("#final?by.recipe=e8m7&by.recipe=e8m1&by.recipe=e5m7&")
    again = visit(full, address)
    assert again.get_by_role("button", name="e8m3", exact=True).get_attribute("aria-pressed") == "false"
    assert again.locator("#rate").input_value() == "0.002"
    assert again.locator("#signal").input_value() == "attention_logit"
    again.wait_for_function("Math.abs(document.getElementById('final').getBoundingClientRect().y) < 300")
    assert again.url == page.url
    # Back to all by an address that was typed.
    again.evaluate("location.hash = '#heat'")
    again.wait_for_selector("button.chip[data-value=e8m3][aria-pressed=true]")


def test_an_address_of_another_page_does_no_harm(visit: Any, full: Path) -> None:
    page = visit(full, "#nowhere?by.recipe=unknown&rate=fast&cell=a|b|c&by.seed=<b>")
    assert page.inner_text("#count") == "0 of 192 runs"
    page.get_by_role("button", name="Show everything").click()
    assert page.inner_text("#count") == "all 192 runs"


def test_every_figure_can_be_saved(visit: Any, full: Path, tmp_path: Path) -> None:
    page = visit(full)
    for name in FIGURES:
        picture = saved(page, name, "PNG")
        assert picture.startswith(PNG), name
        (tmp_path / "saved.png").write_bytes(picture)
        pixels = matplotlib.image.imread(tmp_path / "saved.png")
        assert pixels.shape[1] > 600, name
        assert len(np.unique(pixels[::5, ::5].reshape(-1, pixels.shape[2]), axis=0)) > 8, name  # something is drawn
        drawing = ET.fromstring(saved(page, name, "SVG"))
        assert drawing.tag == "{http://www.w3.org/2000/svg}svg", name
        assert len(list(drawing.iter("{http://www.w3.org/2000/svg}text"))) > 2, name
        lines = table(page, name)
        assert lines, name
        assert None not in lines[0], name  # no field beyond the heading's


def test_the_curves_extremes_are_in_what_is_drawn(visit: Any) -> None:
    tree = full_tree(seeds=3, steps=4000, rates=1)
    loss = tree["history"].to_dataset()["train_loss"]
    loss.values[4, 1234] = 5.4  # one step of 4,000
    page = visit(render([(STUDY, tree)]))
    lines = [line for line in table(page, "curves") if line["variable"] == "train_loss"]
    summary = tree["summary"].to_dataset()
    for run in range(summary.sizes["run"]):
        own = [
            line
            for line in lines
            if (line["recipe"], line["seed"]) == (summary["recipe"].values[run], str(summary["seed"].values[run]))
        ]
        assert len(own) <= 120
        assert max(float(line["high"]) for line in own) == pytest.approx(np.nanmax(loss.values[run]), rel=2e-4)
        assert min(float(line["low"]) for line in own) == pytest.approx(np.nanmin(loss.values[run]), rel=2e-4)
    # Late in training, where all else is below 2, the band of that run's recipe has the spike.
    bands = page.evaluate("""[...frames.values()].find(f => f.name === "curves").plot.data
        .filter(t => t.fill === "tonexty" && t.yaxis === "y")
        .map(t => Math.max(...t.y.filter((_, i) => t.x[i] > 1150)))""")
    assert [band > 3 for band in bands] == [False, True, False, False]
    assert bands[1] == pytest.approx(5.4, rel=2e-4)


def test_marks_stand_at_the_steps_of_divergence(visit: Any) -> None:
    tree = with_coordinates(make_tree(recipes=4, rates=2, seeds=3))
    page = visit(render([(STUDY, tree)]), "#curves?rate=0.001")
    page.locator("figure[data-name=curves]").scroll_into_view_if_needed()
    page.wait_for_selector("figure[data-name=curves] .main-svg")
    marks = page.evaluate("""[...frames.values()].find(f => f.name === "curves").plot.data
        .filter(t => t.mode === "markers").flatMap(t => t.x.map((x, i) => [x, t.marker.symbol[i]]))""")
    summary = tree["summary"].to_dataset()
    own = summary.isel(run=(summary["learning_rate"].values == 1e-3) & summary["diverged"].values)
    assert sorted(x for x, _ in marks) == sorted(own["diverged_step"].values.tolist())
    # e5m7's three seeds collapse, turn NaN and explode.
    assert sorted(symbol for _, symbol in marks) == ["diamond-open", "triangle-up", "x-thin-open"]


def test_medians_and_files_are_as_they_say(visit: Any, full: Path) -> None:
    page = visit(full)
    # A lost seed counts as infinite: of three, the second still has a finite middle, the third has none.
    found = page.evaluate("[[3, 1, 2], [1, 3], [1, 2, NaN], [1, NaN, NaN], []].map(values => String(median(values)))")
    assert found == ["2", "2", "2", "NaN", "NaN"]
    # Two runs, the second of which ends at step 10 and has nothing to say after it; the third is lost from step 20 on.
    parts = """const held = values => Object.assign(Float32Array.from(values), {shape: [3, 3]});
        const [low, high] = [held([1, 1, 1, 2, NaN, NaN, 3, 3, NaN]), held([4, 4, 4, 9, NaN, NaN, 6, 6, NaN])];
        return overSeeds({low, high, mean: low}, [0, 1, 2], [5, 15, 25], [29, 9, 29]);"""
    found = page.evaluate(f"(() => {{ {parts} }})()")
    assert (found["low"], found["high"]) == ([1, 1, 1], [9, 6, 4])
    assert found["middle"][:2] == [2, 2]
    assert np.isnan(found["middle"][2])
    assert page.evaluate("""csvOf({head: ["a", "b"], rows: [['x,"y"', 0.1], [NaN, null], [1 / 3, 2]]})""") == (
        'a,b\n"x,""y""",0.1\n,\n0.333333333,2\n'
    )


def test_a_median_goes_on_to_where_its_runs_end(visit: Any) -> None:
    """300 steps are 100 buckets of three. In that of steps 99, 100 and 101 a run ends at its first and one at its second."""
    tree = with_coordinates(make_tree(recipes=1, rates=1, seeds=3))
    history = tree["history"].to_dataset()
    loss = history["train_loss"].values.copy()
    loss[0, 100:], loss[1, 101:] = 0.0, 0.0  # padding
    tree["history"] = xr.DataTree(
        history.assign(train_loss=(("run", "step"), loss), last_step=("run", np.array([99, 100, 299])))
    )
    page = visit(render([(STUDY, tree)]), "#curves")
    settled(page)
    drawn = "[...document.querySelector('figure[data-name=curves] .plot').data]"
    (x, y), *_ = page.evaluate(
        f"{drawn}.filter(t => t.yaxis === 'y' && t.hovertemplate && t.mode === 'lines').map(t => [t.x, t.y])"
    )
    assert x[32:35] == [97, 100, 103]
    means = [loss[0, 99], loss[1, 99:101].mean(), loss[2, 99:102].mean()]
    expected = [np.median(loss[:, 96:99].mean(axis=1)), np.median(means), loss[2, 102:105].mean()]
    np.testing.assert_allclose(y[32:35], expected, rtol=2e-4)


def test_what_was_not_measured_is_in_no_median_of_signals(visit: Any, full: Path) -> None:
    """By hand: at step 8 run 0 was not measured, at step 10 none was; runs are lost from step 9 on, at first one, then two."""
    page = visit(full)
    of = """lost => {
        const values = [[1, 2, NaN, NaN, 3, 4], [3, 4, 4.5, NaN, 5, 6], [5, 6, 6.5, NaN, NaN, NaN]];
        const signal = {steps: [0, 6, 8, 10, 12, 16], values: Object.assign(Float32Array.from(values.flat()), {shape: [3, 6]})};
        if (lost[1] === 9) for (const b of [4, 5]) signal.values[6 + b] = NaN;
        const found = measured({study: {curves: {last: [15, 15, 15], lost}}}, signal, [0, 1, 2]);
        return {...found, middle: found.middle.map(String)};
    }"""
    found = page.evaluate(f"({of})([NaN, NaN, 9])")
    assert found["steps"] == [0, 6, 8, 12, 16]
    assert found["middle"] == ["3", "4", "5.5", "5", "6"]
    assert (found["low"], found["high"]) == ([1, 2, 4.5, 3, 4], [5, 6, 6.5, 5, 6])
    assert page.evaluate(f"({of})([NaN, 9, 9])")["middle"] == ["3", "4", "5.5", "NaN", "NaN"]
    assert page.evaluate(f"({of})([NaN, NaN, NaN])")["middle"] == ["3", "4", "5.5", "4", "5"]


def test_a_groups_line_of_sharpness_has_no_gaps_at_other_groups_steps(visit: Any) -> None:
    """Python was probed at every 50th step, prose at every 100th."""
    tree = full_tree(recipes=2, rates=1, seeds=3, datasets=2)
    sharpness = tree["sharpness"].to_dataset()
    kept = (sharpness["dataset"] == "python") | (sharpness["probe_step"] % 100 == 0)
    tree["sharpness"] = xr.DataTree(sharpness.where(kept))
    page = visit(render([(STUDY, tree)]), "#curves")
    draw_all(page)
    lines = page.evaluate("""[...frames.values()].filter(f => f.name === "curves").map(f => f.plot.data
        .filter(t => t.yaxis === "y3" && t.line?.dash).map(t => [t.x, t.y]))""")
    assert [[x for x, _ in of] for of in lines] == [[list(range(0, 301, 50))] * 2, [list(range(0, 301, 100))] * 2]
    assert all(None not in y for of in lines for _, y in of)


def test_the_theme_is_the_systems_until_it_is_chosen(visit: Any, full: Path) -> None:
    page = visit(full, color_scheme="dark")
    paper = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(paper) == "rgb(21, 25, 30)"
    page.get_by_role("button", name="Theme: auto").click()
    assert page.evaluate(paper) == "rgb(255, 255, 255)"
    page.get_by_role("button", name="Theme: light").click()
    assert page.evaluate(paper) == "rgb(21, 25, 30)"
    page.locator("figure[data-name=final]").scroll_into_view_if_needed()
    page.wait_for_selector("figure[data-name=final] .main-svg")
    settled(page)
    assert page.evaluate("[...frames.values()].find(f => f.name === 'final').plot.layout.paper_bgcolor") == "#15191e"
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert page.inner_text("#theme") == "Theme: dark"


def test_it_prints_on_white_with_every_figure(visit: Any, full: Path) -> None:
    page = visit(full, color_scheme="dark")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("[...frames.values()].every(f => !f.stale)")
    widths = page.evaluate("[...document.querySelectorAll('.plot')].map(p => p.getBoundingClientRect().width)")
    assert max(widths) <= 680
    assert page.evaluate("[...frames.values()].find(f => f.name === 'final').plot.layout.paper_bgcolor") == "#ffffff"
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 25, 30)"
    assert page.pdf(format="A4").startswith(b"%PDF")


@pytest.mark.parametrize("scene", ["one run", "one step", "all NaN", "all explode"])
def test_whatever_became_of_the_runs_the_page_draws(visit: Any, scene: str) -> None:
    page = visit(render([(STUDY, with_coordinates(make_tree(**SCENES[scene])))]))
    draw_all(page)
    assert page.locator("#broken").is_hidden()
    assert page.locator("figure[data-name=heat] svg").count()
    assert page.locator("figure[data-name=final] svg").count()
    crosses = page.locator("figure[data-name=heat] .annotation").all_text_contents()
    assert crosses == (["✕"] * 16 if scene == "all NaN" else [])
    assert "set [signals] every in the study file" in page.inner_text("#layers")


def test_a_study_in_progress_and_one_with_nothing_finished(visit: Any, browser: Any, tmp_path: Path) -> None:
    source = shutil.copytree(ROOT / "studies" / "results" / "first-look-cpu", tmp_path / "study")
    sorted((source / "packs").glob("*.nc"))[0].unlink()
    page = visit(render([(study_of(source), open_study(source)), (STUDY, None)]))
    draw_all(page)
    assert "32 of 48 runs finished" in page.inner_text("header")
    assert "no run is finished" in page.inner_text("header")
    (tmp_path / "nothing.html").write_text(render([(STUDY, None)]), encoding="utf-8")
    empty = browser.new_page()
    empty.goto((tmp_path / "nothing.html").as_uri())
    assert "0 of 2 runs finished" in empty.inner_text("body")
    assert empty.query_selector("script:not(:empty)[type]") is None
    empty.close()


def test_signals_are_named_by_their_epsilon_or_radius(visit: Any) -> None:
    page = visit(render([(STUDY, full_tree(seeds=2))]))
    names = ["logit_sharpness at epsilon 0.001", "sam_sharpness at rho 0.05", "hessian_eigenvalue at rank 0",
             "hessian_eigenvalue at rank 1"]  # fmt: skip
    assert page.evaluate("names => names.map(spoken)", names) == [
        "logit sharpness, ε\xa00.001", "sam sharpness, ρ\xa00.05", "hessian eigenvalue", "hessian eigenvalue at rank 1",
    ]  # fmt: skip
    assert page.locator("#sharpness option").all_text_contents()[0] == "logit sharpness, ε\xa00.0005"


def test_names_stay_text_in_the_browser(visit: Any) -> None:
    tree, name = hostile_tree()
    page = visit(render([(STUDY.model_copy(update={"name": "<i>mine</i>"}), tree)]))
    draw_all(page)  # an alert would stop the page, and be told
    assert page.locator(".chip span").nth(1).inner_text() == name
    assert name in {line["recipe"] for line in table(page, "final")}
    assert page.locator("i").count() == 0


def test_two_studies_stand_side_by_side(visit: Any) -> None:
    first, second = full_tree(seeds=3), with_coordinates(make_tree(recipes=2, rates=3, seeds=4))
    page = visit(render([(STUDY, first), (STUDY.model_copy(update={"name": "later"}), second)]), width=1400)
    draw_all(page)
    boxes = [figure.bounding_box() for figure in page.query_selector_all("figure[data-name=final]")]
    assert len(boxes) == 2
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    ranges = page.evaluate("[...frames.values()].filter(f => f.name === 'final').map(f => f.plot.layout.yaxis.range)")
    assert ranges[0] == ranges[1]  # one scale for both
    assert len(table(page, "final", 1)) == 24
    page.get_by_role("button", name="e8m3", exact=True).click()
    assert {line["recipe"] for line in table(page, "final", 1)} == {"e8m7"}


def test_5000_runs_are_drawn(visit: Any) -> None:
    tree = full_tree(recipes=8, rates=21, seeds=30, steps=400)
    page = visit(render([(STUDY, tree)]))
    assert page.inner_text("#count") == "all 5040 runs"
    page.locator("figure[data-name=curves]").scroll_into_view_if_needed()
    page.wait_for_selector("figure[data-name=curves] .main-svg")
    assert page.evaluate("performance.getEntriesByName('first-contentful-paint').length") == 1
