"""The report's page as it is written: read with an HTML parser, its numbers held against the study's."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from click.testing import CliRunner, Result

from exmy.cli import main
from exmy.report import page as report_page
from exmy.report import render, write_report
from exmy.report.packing import KEPT_BITS
from exmy.report.paper import COLUMN
from exmy.report.series import MOST
from tests.report_page import STUDY, Page, full_tree, with_coordinates
from tests.test_figure import ENTROPY, make_tree
from train import StudyError, open_study
from train.store import study_of

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "studies" / "results"
REAL = RESULTS / "first-look-gpu"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def real() -> Page:
    """The page of the committed study of 392 runs."""
    return Page(render([(study_of(REAL), open_study(REAL))]))


def test_the_page_needs_nothing_but_itself(real: Page) -> None:
    assert real.open == []
    for tag, attrs in real.tags:
        assert tag not in {"link", "img", "iframe", "object", "embed"}
        for name in ("src", "srcset", "action", "data", "poster"):
            assert name not in attrs, (tag, attrs)
        assert (attrs.get("href") or "#").startswith("#")
    assert not re.search(r"url\(|@import", real.style)
    own = real.code.split('"use strict";\n')[-1]
    assert "async function start()" in own
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|fetch\(|XMLHttpRequest|import\(|WebSocket|eval\(", own)
    (policy,) = [attrs["content"] for tag, attrs in real.tags if tag == "meta" and attrs.get("http-equiv")]
    assert policy
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy


def test_plotly_is_there_once_and_the_page_is_small() -> None:
    page = render([(study_of(REAL), open_study(REAL))])
    assert page.count("* plotly.js v") == 1
    assert len(page.encode()) < 8_000_000
    assert 'name="viewport"' in page


def test_every_section_is_there(real: Page) -> None:
    for words in (
        "392 of 392 runs finished; 142 of them diverged",
        "Diverged means no_progress: final_loss is not below the unigram entropy",
        "Is it as stable as the baseline?",
        "e4m7 is less stable than native-bf16 at learning rate 0.002",
        "Where runs diverge, and what loss they reach",
        "Loss, gradient norm, sharpness and alarms while training",
        "How early would an alarm have rung?",
        "Final loss against learning rate",
        "Quantisation error and clipped shares by layer",
        "The formats' grids",
        "which product runs in what",
        "Where this comes from, and how to run it again",
        "NVIDIA H100 80GB HBM3",
        "exmy sweep study.toml --out runs/again",
        'baseline = "native-bf16"',
    ):
        assert words in real.words, words
    sections = [attrs["id"] for tag, attrs in real.tags if tag == "section"]
    links = [attrs["href"] for tag, attrs in real.tags if tag == "a" and attrs.get("class") != "skip"]
    assert links == [f"#{section}" for section in sections]


SCENES: dict[str, dict[str, Any]] = {
    "one run": {"recipes": 1, "rates": 1, "seeds": 1},
    "one step": {"recipes": 2, "rates": 2, "seeds": 1, "steps": 1},
    "many seeds": {"recipes": 4, "rates": 2, "seeds": 12},
    "two datasets": {"recipes": 2, "datasets": 2},
    "all NaN": {"fate": "nan"},
    "all explode": {"fate": "explode"},
    "all collapse": {"fate": "collapse"},
    "no baseline": {"baseline": "absent", "name": ""},
}


@pytest.mark.parametrize("scene", SCENES)
def test_whatever_became_of_the_runs_the_page_is_whole(scene: str) -> None:
    page = Page(render([(STUDY, with_coordinates(make_tree(**SCENES[scene])))]))
    assert page.open == []
    (study,) = page.content["studies"]
    assert study["finished"] == len(study["rate"])
    for group in study["groups"]:
        for limits in (group["final_limits"], group["loss_limits"]):
            assert limits[0] < limits[1]
        assert group["verdicts"]["cards"] or group["verdicts"]["why"]


def test_of_one_recipe_the_page_says_that_there_is_nothing_to_compare() -> None:
    page = Page(render([(STUDY, with_coordinates(make_tree(recipes=1)))]))
    assert "e8m7 is the only recipe here: there is nothing to hold against it." in page.words


def test_without_the_baseline_the_page_says_so() -> None:
    page = Page(render([(STUDY, with_coordinates(make_tree(baseline="absent")))]))
    assert "absent, the baseline, has no finished run here" in page.words


def test_facets_are_what_a_study_varies() -> None:
    page = Page(render([(STUDY, with_coordinates(make_tree(recipes=2, datasets=2)))]))
    boxes = [(attrs["data-facet"], attrs["value"]) for tag, attrs in page.tags if tag == "input"]
    assert boxes == [("dataset", "python"), ("dataset", "prose"), *(("seed", str(seed)) for seed in range(3))]
    chips = [attrs["data-value"] for tag, attrs in page.tags if attrs.get("class") == "chip"]
    assert chips == ["e8m7", "e8m3"]
    assert [group["where"] for group in page.content["studies"][0]["groups"]] == [
        {"dataset": "python"},
        {"dataset": "prose"},
    ]


def test_a_study_of_5000_runs_stays_below_the_limit() -> None:
    tree = full_tree(recipes=8, rates=21, seeds=30, steps=400)
    assert tree["summary"].sizes["run"] == 5040
    assert len(render([(STUDY, tree)]).encode()) < 12_000_000


def hostile_tree() -> tuple[xr.DataTree, str]:
    """A study with a recipe whose name is markup."""
    tree = with_coordinates(make_tree(recipes=2, name="<b>x</b>"))
    name = "</script><script>alert(1)</script>"
    for group in ("history", "summary"):
        data = tree[group].to_dataset()
        data["recipe"] = ("run", [name if r == "e8m3" else r for r in data["recipe"].values])
        tree[group] = xr.DataTree(data)
    return tree, name


def test_names_are_text_and_never_markup() -> None:
    tree, name = hostile_tree()
    page = Page(render([(STUDY.model_copy(update={"name": "<i>mine</i>"}), tree)]))
    assert "alert(1)" not in page.code
    assert "<i>mine</i>" in page.words
    assert name in page.words
    assert page.content["studies"][0]["columns"]["recipe"]["values"] == ["e8m7", name]


def test_the_command_writes_the_page_and_the_picture(tmp_path: Path) -> None:
    source = shutil.copytree(RESULTS / "first-look-cpu", tmp_path / "study")
    done = invoke("report", source)
    assert done.exit_code == 0, done.output
    written = [source / "report" / "index.html", source / "report" / "study.png"]
    assert done.output.split("\n")[:2] == [str(path) for path in written]
    assert "48 of 48 runs finished" in written[0].read_text(encoding="utf-8")
    assert invoke("report", source, "--out", tmp_path / "elsewhere" / "deep").exit_code == 0
    assert sorted(path.name for path in (tmp_path / "elsewhere" / "deep").iterdir()) == ["index.html", "study.png"]


def test_two_studies_share_a_page_of_its_own(tmp_path: Path) -> None:
    source = shutil.copytree(RESULTS / "first-look-cpu", tmp_path / "ours")
    done = invoke("report", source, REAL)
    assert done.exit_code == 0, done.output
    assert done.output.split("\n")[0] == str(source / "report" / "against-first-look-gpu" / "index.html")
    page = Page((source / "report" / "against-first-look-gpu" / "index.html").read_text(encoding="utf-8"))
    assert "first-look-cpu and first-look-gpu" in page.words
    assert "first-look-cpu: 48 of 48 runs finished" in page.words
    assert "first-look-gpu: 392 of 392 runs finished" in page.words
    assert [study["name"] for study in page.content["studies"]] == ["first-look-cpu", "first-look-gpu"]
    assert page.content["looks"]["e8m7"]["light"] == "#000000"  # the first one's baseline


def test_a_tree_that_is_there_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = shutil.copytree(RESULTS / "first-look-cpu", tmp_path / "study")
    tree = open_study(source)
    monkeypatch.setattr(report_page, "open_study", lambda _: pytest.fail("read again"))
    page, _ = write_report(source, tmp_path / "report", tree)
    assert "48 of 48 runs finished" in page.read_text(encoding="utf-8")


def test_other_tokens_than_bytes_and_other_text_than_it_was_are_told() -> None:
    tree = make_tree(tokenizer="bpe-4096", vocabulary="4096", corruption="noise 0.3")
    summary = tree["summary"].to_dataset()
    bits = summary["final_loss"] / (np.log(2) * 3.67)
    tree["summary"] = xr.DataTree(
        summary.assign_coords(noise=("run", np.repeat([0.0, 0.3], 24))).assign(final_bits_per_byte=bits)
    )
    page = Page(render([(STUDY, tree)]))
    for words in ("tokenizerbpe-4096", "tokens of its vocabulary4096", "corrupted on purposenoise 0.3"):  # dt, then dd
        assert words in page.words
    first, second = page.content["studies"][0]["groups"]
    assert first["bits"] == pytest.approx(1 / (np.log(2) * 3.67))
    assert [first["label"], second["label"]] == ["noise 0", "noise 0.3"]  # as a study file has them: not 0.0


def test_a_study_with_nothing_finished_says_so(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(STUDY.to_toml())
    done = invoke("report", tmp_path, "--format", "pdf")
    assert done.exit_code == 0, done.output
    page = Page((tmp_path / "report" / "index.html").read_text(encoding="utf-8"))
    assert "0 of 2 runs finished" in page.words
    assert "no run is finished" in page.words
    assert page.code.count("plotly.js") == 0
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["index.html"]


def test_a_study_in_progress_shows_what_is_there(tmp_path: Path) -> None:
    source = shutil.copytree(RESULTS / "first-look-cpu", tmp_path / "study")
    sorted((source / "packs").glob("*.nc"))[0].unlink()
    assert invoke("report", source).exit_code == 0
    page = Page((source / "report" / "index.html").read_text(encoding="utf-8"))
    assert "32 of 48 runs finished" in page.words
    assert "The study is not complete" in page.words


def test_the_docs_table_of_sizes_and_times_is_what_was_measured() -> None:
    measured = json.loads((ROOT / "benchmarks" / "results" / "report-page.json").read_text())
    page = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    for name, row in measured["studies"].items():
        times = f"{row['render_s']:.1f} | {row['first_paint_s']:.2f} | {row['ready_s']:.1f} | {row['draw_all_s']:.1f}"
        assert f"| {name} | {row['bytes'] / 1e6:.1f} | {times} |" in page
        assert row["first_paint_s"] < 3  # what was promised
        assert row["bytes"] < 12_000_000
    assert f"Median of {measured['loads']} loads in headless Chromium on two cores" in page
    assert measured["cores"] == 2


def test_the_page_on_the_report_says_what_the_code_does() -> None:
    page = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    assert f"at most {MOST} equal buckets" in page
    assert f"keep {KEPT_BITS} significant bits" in page
    assert f"{COLUMN} inches wide" in page


def test_bad_input_is_one_line_and_status_2(tmp_path: Path) -> None:
    def refusal(*arguments: object) -> str:
        refused = invoke("report", *arguments)
        assert refused.exit_code == 2
        assert refused.output.count("\n") == 1
        return refused.output

    assert "there is no such directory" in refusal(tmp_path / "absent")
    (tmp_path / "study.toml").write_text(STUDY.to_toml())
    (tmp_path / "file").write_text("")
    assert "can't write there (Not a directory)" in refusal(tmp_path, "--out", tmp_path / "file" / "x")
    assert "--format takes pdf, png, svg" in refusal(tmp_path, "--format", "pdf,gif")
    assert "room for 2 studies side by side, got 3" in refusal(tmp_path, tmp_path, tmp_path)
    assert "is named twice" in refusal(tmp_path, tmp_path / ".." / tmp_path.name)
    assert not (tmp_path / "report").exists()


def test_a_full_disk_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "study.toml").write_text(STUDY.to_toml())
    write_report(tmp_path, tmp_path / "report")
    before = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    fill_the_disk(monkeypatch)
    with pytest.raises(StudyError, match="No space left on device"):
        write_report(tmp_path, tmp_path / "report")
    assert (tmp_path / "report" / "index.html").read_text(encoding="utf-8") == before
    assert len(list((tmp_path / "report").iterdir())) == 1


def test_a_full_disk_leaves_no_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor those above it; but what was there before stays, empty or not."""
    (tmp_path / "study.toml").write_text(STUDY.to_toml())
    (tmp_path / "mine").mkdir()
    fill_the_disk(monkeypatch)
    for out in ("report", "new/one", "mine/report", "mine"):
        with pytest.raises(StudyError, match="No space left on device"):
            write_report(tmp_path, tmp_path / out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "study.toml"]
    assert list((tmp_path / "mine").iterdir()) == []


def fill_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page is written as far as there is room."""
    write: Callable[..., int] = Path.write_text

    def full(self: Path, text: str, *args: Any, **kwargs: Any) -> int:
        write(self, text[:1000], *args, **kwargs)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)


def test_the_made_up_studies_are_what_they_claim() -> None:
    assert make_tree(fate="collapse")["summary"]["final_loss"].values == pytest.approx(ENTROPY, abs=0.1)
    assert np.isnan(make_tree(fate="nan")["summary"].to_dataset()["final_loss"].values).all()
