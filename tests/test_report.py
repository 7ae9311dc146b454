"""The report as a browser gets it: read with an HTML parser, its numbers held against the study's, its figures against plotly."""

from __future__ import annotations

import base64
import errno
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import xarray as xr
from click.testing import CliRunner, Result

from exmy import report
from exmy.cli import main
from exmy.report import in_page, render, write_report
from tests.test_figure import ENTROPY, NAN, make_tree
from train import Study, StudyError, open_study, stability_table
from train.store import study_of

ROOT = Path(__file__).parent.parent
REAL = ROOT / "studies" / "results" / "first-look-gpu"
STUDY = Study.model_validate({"name": "first-look", "axes": {"recipe": ["e8m7", "e4m3"], "learning_rate": [1e-3]}})


class Page(HTMLParser):
    """Tags with their attributes, JSON blocks by id, and the text outside of scripts and styles."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.blocks: dict[str, str] = {}
        self.code, self.style, self.words = "", "", ""
        self._block: str | None = None
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append((tag, given))
        if tag not in {"meta", "br", "input", "line", "link", "img"}:
            self.open.append(tag)
        self._block = given.get("id") if tag == "script" and given.get("type") == "application/json" else None

    def handle_endtag(self, tag: str) -> None:
        if tag not in {"line"}:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._block and self.open[-1] == "script":
            self.blocks[self._block] = self.blocks.get(self._block, "") + data
        elif self.open and self.open[-1] == "script":
            self.code += data
        elif self.open and self.open[-1] == "style":
            self.style += data
        else:
            self.words += data

    def figures(self) -> dict[str, dict[str, Any]]:
        return {
            key.removeprefix("figure-"): strict(text) for key, text in self.blocks.items() if key.startswith("figure-")
        }


def strict(text: str) -> Any:
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def numbers(field: Any) -> np.ndarray:
    """What plotly reads: a list, or base64 of little-endian FP32."""
    return np.frombuffer(base64.b64decode(field["bdata"]), "<f4") if isinstance(field, dict) else np.asarray(field)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def real() -> Page:
    """The page of the committed study of 392 runs."""
    return Page(render(study_of(REAL), open_study(REAL)))


def with_coordinates(tree: xr.DataTree) -> xr.DataTree:
    """The made-up study with what `open_study` gives besides."""
    tree.attrs |= {"runs_planned": tree["summary"].sizes["run"], "device": "none"}
    return tree


def test_the_page_needs_nothing_but_itself(real: Page) -> None:
    assert real.open == []
    for tag, attrs in real.tags:
        assert tag not in {"link", "img", "iframe", "object", "embed"}
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert name not in attrs, (tag, attrs)
    assert not re.search(r"url\(|@import", real.style)
    own = [part for part in real.code.split('"use strict";') if "IntersectionObserver(seen" in part]
    assert len(own) == 1
    assert not re.search(r"https?://|fetch\(|XMLHttpRequest", own[0])
    (policy,) = [attrs["content"] for tag, attrs in real.tags if tag == "meta" and attrs.get("http-equiv")]
    assert policy
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy


def test_plotly_is_there_once_and_the_page_is_small(real: Page) -> None:
    page = render(study_of(REAL), open_study(REAL))
    assert page.count("* plotly.js v") == 1
    assert len(page.encode()) < 8_000_000
    assert 'name="viewport"' in page


def test_every_section_is_there(real: Page) -> None:
    for words in (
        "392 of 392 runs finished; 142 of them diverged",
        "Diverged means no_progress: final_loss is not below the unigram entropy",
        "Stability by recipe and learning rate",
        "Final loss against learning rate",
        "Where runs diverge",
        "Loss, gradient norm and sharpness while training",
        "Where this comes from, and how to run it again",
        "NVIDIA H100 80GB HBM3",
        "exmy sweep study.toml --out runs/again",
        'baseline = "native-bf16"',
    ):
        assert words in real.words, words
    wanted = {attrs["data-figure"] for _, attrs in real.tags if "data-figure" in attrs}
    chosen = {attrs["value"] for tag, attrs in real.tags if tag == "option"}
    assert wanted | chosen == set(real.figures())
    assert len(chosen) == 7  # learning rates


def test_the_numbers_are_the_stability_tables(real: Page) -> None:
    table = stability_table(open_study(REAL)["summary"].to_dataset())
    (group,) = strict(real.blocks["stability"])
    assert len(group["cells"]) == table["n"].size == 49
    for cell in group["cells"]:
        expected = table.sel(recipe=cell["recipe"], learning_rate=cell["learning_rate"])
        for name in ("n", "k", "rate", "rate_lower", "rate_upper", "final_loss_mean", "finite"):
            assert cell[name] == expected[name].item(), name
    heat = real.figures()["heat-1"]["data"][0]
    np.testing.assert_allclose(np.array(heat["z"], float), 100 * table["k"].values / table["n"].values)
    assert heat["text"][3][5] == "2/8"
    assert "3.004" in real.words  # e8m1 at 0.016, as in the README's picture


def test_every_run_has_its_point(real: Page) -> None:
    summary = open_study(REAL)["summary"].to_dataset()
    marks = [trace for trace in real.figures()["final-1"]["data"] if trace["mode"] == "markers"]
    assert sum(numbers(trace["x"]).size for trace in marks) == summary.sizes["run"]
    hollow = sum(symbol.endswith("-open") or symbol == "triangle-up" for t in marks for symbol in t["marker"]["symbol"])
    own = summary["recipe"].values == "e8m3"  # whose own marker is a triangle
    assert not summary["diverged"].values[own].any()
    assert hollow - own.sum() == summary["diverged"].sum()


def test_plotly_takes_every_figure(real: Page) -> None:
    for name, figure in real.figures().items():
        go.Figure(figure)  # ValueError for a word or a value that plotly does not know
        if not name.startswith("heat"):
            titles = [axis["title"]["text"] for key, axis in figure["layout"].items() if "axis" in key]
            assert all(titles), name


def test_a_curves_extremes_are_drawn(real: Page) -> None:
    tree = open_study(REAL)
    summary = tree["summary"].to_dataset()
    own = (summary["recipe"].values == "e8m7") & (summary["learning_rate"].values == 2e-3)
    norm = tree["history"].to_dataset()["grad_norm"].values[own]
    figure = real.figures()["curves-1-2"]
    lines = [t for t in figure["data"] if t.get("meta") == "e8m7" and t.get("yaxis") == "y2" and "opacity" in t]
    assert len(lines) == 8
    np.testing.assert_allclose([numbers(t["y"]).max() for t in lines], norm.max(axis=1), rtol=1e-6)
    np.testing.assert_allclose([numbers(t["y"]).min() for t in lines], norm.min(axis=1), rtol=1e-6)


def test_diverged_runs_are_marked_at_their_step() -> None:
    tree = with_coordinates(make_tree(recipes=4, rates=2, seeds=3))
    summary = tree["summary"].to_dataset()
    figures = Page(render(STUDY, tree)).figures()
    for index, rate in enumerate((5e-4, 1e-3)):
        marks = [t for t in figures[f"curves-1-{index}"]["data"] if t["mode"] == "markers"]
        own = summary.isel(run=(summary["learning_rate"].values == rate) & summary["diverged"].values)
        stand = [x for t in marks for x in numbers(t["x"]).tolist()]
        assert sorted(stand) == sorted(own["diverged_step"].values.tolist())
    # At the higher rate the fourth recipe's three seeds collapse, turn NaN and explode.
    assert [s for t in marks for s in t["marker"]["symbol"]] == ["diamond-open", "x-thin-open", "triangle-up"]


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
    page = Page(render(STUDY, with_coordinates(make_tree(**SCENES[scene]))))
    assert page.open == []
    assert "Sharpness was not measured in this study." in page.words
    assert strict(page.blocks["stability"])
    for figure in page.figures().values():
        go.Figure(figure)
        for trace in figure["data"]:
            if trace["type"] == "scatter" and trace["mode"] == "markers":
                assert np.isfinite(numbers(trace["y"])).all()
        for key in ("yaxis", "yaxis2"):
            span = figure["layout"].get(key, {}).get("range")
            assert span is None or span[0] < span[1]


def test_groups_can_be_chosen() -> None:
    page = Page(render(STUDY, with_coordinates(make_tree(recipes=2, datasets=2))))
    sections = [attrs["id"] for tag, attrs in page.tags if attrs.get("class") == "group"]
    options = [
        attrs["value"] for tag, attrs in page.tags if tag == "option" and str(attrs["value"]).startswith("group")
    ]
    assert options == sections == ["group-1", "group-2"]
    assert "dataset python" in page.words
    assert [group["group"] for group in strict(page.blocks["stability"])] == [
        {"dataset": "python"},
        {"dataset": "prose"},
    ]


def test_a_study_of_5000_runs_stays_below_the_limit() -> None:
    tree = with_coordinates(make_tree(recipes=8, rates=21, seeds=30, steps=400))
    assert tree["summary"].sizes["run"] == 5040
    page = render(STUDY, tree)
    assert len(page.encode()) < 12_000_000
    several = Page(page).figures()["curves-1-0"]["data"]
    assert len(several) < 100


def test_names_are_text_and_never_markup() -> None:
    tree = with_coordinates(make_tree(recipes=2, name="<b>x</b>"))
    hostile = "</script><script>alert(1)</script>"
    for group in ("history", "summary"):
        data = tree[group].to_dataset()
        data["recipe"] = ("run", [hostile if r == "e8m3" else r for r in data["recipe"].values])
        tree[group] = xr.DataTree(data)
    page = Page(render(STUDY.model_copy(update={"name": "<i>mine</i>"}), tree))
    assert "alert(1)" not in page.code
    assert "<i>mine</i>" in page.words
    assert hostile in page.words
    assert [attrs["value"] for tag, attrs in page.tags if tag == "input"] == ["e8m7", hostile]
    assert "&lt;script&gt;" in json.dumps(page.figures()["final-1"])


def test_numbers_that_json_lacks_become_null() -> None:
    assert in_page({"a": [NAN, float("inf"), 1.5], "b": "</script>"}) == '{"a":[null,null,1.5],"b":"\\u003c/script>"}'


def test_the_command_writes_the_page_and_the_picture(tmp_path: Path) -> None:
    source = shutil.copytree(ROOT / "studies" / "results" / "first-look-cpu", tmp_path / "study")
    done = invoke("report", source)
    assert done.exit_code == 0, done.output
    written = [source / "report" / "index.html", source / "report" / "study.png"]
    assert done.output.split("\n")[:2] == [str(path) for path in written]
    assert "48 of 48 runs finished" in written[0].read_text(encoding="utf-8")
    assert invoke("report", source, "--out", tmp_path / "elsewhere" / "deep").exit_code == 0
    assert sorted(path.name for path in (tmp_path / "elsewhere" / "deep").iterdir()) == ["index.html", "study.png"]


def test_a_tree_that_is_there_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = shutil.copytree(ROOT / "studies" / "results" / "first-look-cpu", tmp_path / "study")
    tree = open_study(source)
    monkeypatch.setattr(report, "open_study", lambda _: pytest.fail("read again"))
    page, _ = write_report(source, tmp_path / "report", tree)
    assert "48 of 48 runs finished" in page.read_text(encoding="utf-8")


def test_other_tokens_than_bytes_and_other_text_than_it_was_are_told() -> None:
    tree = make_tree(tokenizer="bpe-4096", vocabulary="4096", corruption="noise 0.3")
    summary = tree["summary"].to_dataset()
    bits = summary["final_loss"] / (np.log(2) * 3.67)
    tree["summary"] = xr.DataTree(
        summary.assign_coords(noise=("run", np.repeat([0.0, 0.3], 24))).assign(final_bits_per_byte=bits)
    )
    page = Page(render(STUDY, tree))
    for words in ("tokenizerbpe-4096", "tokens of its vocabulary4096", "corrupted on purposenoise 0.3"):  # dt, then dd
        assert words in page.words
    assert f"1 nat/token is {1 / (np.log(2) * 3.67):.4g} bits/byte" in page.words
    assert "noise 0noise 0.3" in page.words  # the groups to choose from, as a study file has them: not 0.0


def test_a_study_with_nothing_finished_says_so(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(STUDY.to_toml())
    done = invoke("report", tmp_path)
    assert done.exit_code == 0, done.output
    page = Page((tmp_path / "report" / "index.html").read_text(encoding="utf-8"))
    assert "0 of 2 runs finished" in page.words
    assert "no run is finished" in page.words
    assert not (tmp_path / "report" / "study.png").exists()


def test_a_study_in_progress_shows_what_is_there(tmp_path: Path) -> None:
    source = shutil.copytree(ROOT / "studies" / "results" / "first-look-cpu", tmp_path / "study")
    sorted((source / "packs").glob("*.nc"))[0].unlink()
    assert invoke("report", source).exit_code == 0
    page = Page((source / "report" / "index.html").read_text(encoding="utf-8"))
    assert "32 of 48 runs finished" in page.words
    assert "The study is not complete" in page.words


def test_bad_input_is_one_line_and_status_2(tmp_path: Path) -> None:
    refused = invoke("report", tmp_path / "absent")
    assert refused.exit_code == 2
    assert "no study.toml here" in refused.output
    (tmp_path / "study.toml").write_text(STUDY.to_toml())
    (tmp_path / "file").write_text("")
    refused = invoke("report", tmp_path, "--out", tmp_path / "file" / "x")
    assert refused.exit_code == 2
    assert "can't write there (Not a directory)" in refused.output
    assert refused.output.count("\n") == 1


def test_a_full_disk_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "study.toml").write_text(STUDY.to_toml())
    write_report(tmp_path, tmp_path / "report")
    before = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    write: Callable[..., int] = Path.write_text

    def full(self: Path, text: str, *args: Any, **kwargs: Any) -> int:
        write(self, text[:1000], *args, **kwargs)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(StudyError, match="No space left on device"):
        write_report(tmp_path, tmp_path / "report")
    assert (tmp_path / "report" / "index.html").read_text(encoding="utf-8") == before
    assert len(list((tmp_path / "report").iterdir())) == 1


def test_the_made_up_studies_are_what_they_claim() -> None:
    assert make_tree(fate="collapse")["summary"]["final_loss"].values == pytest.approx(ENTROPY, abs=0.1)
