"""The conformance page, picture and tables: read as a browser and a reader get them, held against the reports they are made of.

Reports are real where one is to be had in a moment: torch's cast, which rounds FP64 twice, and quantisers broken on purpose. What
they don't give, such as many implementations, is made up of them.
"""

from __future__ import annotations

import errno
import json
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from html.parser import HTMLParser
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.image import imread
from torch import Tensor

from exmy import conformance
from exmy.cli import main
from exmy.conformance import escaped, facts, markdown, rational, regenerated, render, repeats, write_matrix
from exmy.conformance_figure import conformance_figure, joined, panels
from tests import test_docs
from tests.test_figure import texts
from verification import LAWS, Failure, Report, Verdict, matrix, read_certificates, verify, write_certificates

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs" / "conformance.md"
COMMITTED = [ROOT / "benchmarks" / "results" / f"conformance-{where}.json.gz" for where in ("cpu", "h100")]
RUDE = "<script>alert(1)</script> & \"quotes\" | 'pipes'"


def cast(x: Tensor) -> Tensor:
    return x.to(torch.float8_e4m3fn).to(x.dtype)


def loses_nan(x: Tensor) -> Tensor:
    return torch.nan_to_num(cast(x), nan=0.0, posinf=448.0)


def is_rude(x: Tensor) -> Tensor:
    if (x == 1.5).any():
        raise RuntimeError(RUDE)
    return cast(x)


def doubles_large_scales(x: Tensor) -> Tensor:
    """MXFP4, but for blocks whose largest magnitude is above 1: twice too large."""
    from formats import quantize

    large = x.abs().amax(-1, keepdim=True) > 1
    return torch.where(large, 2 * quantize(x, "mxfp4"), quantize(x, "mxfp4"))


@pytest.fixture(scope="module")
def reports() -> list[Report]:
    def judge(quantizer: Callable[[Tensor], Tensor], name: str, dtype: torch.dtype, called: str) -> Report:
        return verify(quantizer, name, overflow="found" if name == "e4m3fn" else "saturate", input_dtype=dtype,
                      level="quick", name=called, version="1.0")  # fmt: skip

    return [
        judge(cast, "e4m3fn", torch.float32, "torch"),
        judge(loses_nan, "e4m3fn", torch.float32, "loses-nan"),
        judge(cast, "e4m3fn", torch.float64, "torch"),
        judge(is_rude, "e4m3fn", torch.float32, "<b>rude</b>"),
        judge(doubles_large_scales, "mxfp4", torch.float32, "doubles"),
    ]


def many(reports: list[Report], implementations: int, formats: int) -> list[Report]:
    """As many as the real matrix will have."""
    return [
        replace(reports[i % 2 * 2], implementation=f"implementation-{i}", format=f"mxfp8_e4m3fn:rule{j}")
        for i in range(implementations)
        for j in range(formats)
    ]


class Page(HTMLParser):
    """Tags with their attributes; by id, the words in an element; the words of every cell; all words but those of the style."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[tuple[str, str | None]] = []
        self.words: dict[str | None, str] = {}
        self.cells: list[tuple[str | None, str]] = []
        self.style = ""
        self.feed(source)
        self.close()
        self.ids = [attrs["id"] for _, attrs in self.tags if "id" in attrs]
        self.links = [attrs["href"] for tag, attrs in self.tags if tag == "a"]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "dd":
            self.handle_data(" ")
        self.tags.append((tag, given))
        if tag not in {"meta", "br"}:
            self.open.append((tag, given.get("id")))
        if tag == "td":
            self.cells.append((given.get("class"), ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if any(tag == "style" for tag, _ in self.open):
            self.style += data
            return
        for _, identity in [*self.open, ("", "all")]:
            if identity:
                self.words[identity] = self.words.get(identity, "") + data
        if any(tag == "td" for tag, _ in self.open):
            kind, words = self.cells[-1]
            self.cells[-1] = kind, words + data


@pytest.fixture(scope="module")
def page(reports: list[Report]) -> Page:
    return Page(render(reports))


def counterexample(page: Page, report: Report, law: str) -> str:
    """The words of the only counterexample of that heading."""
    heading = f"{report.format} from {report.input_dtype}: {law}"
    (found,) = [
        words for key, words in page.words.items()
        if key and key.endswith(f"-{law}") and heading in words and f"verify {shlex.quote(report.implementation)} " in words
    ]  # fmt: skip
    return " ".join(found.split())


def test_the_page_needs_nothing_but_itself(page: Page) -> None:
    assert page.open == []
    for tag, attrs in page.tags:
        assert tag not in {"script", "link", "img", "iframe", "object", "embed", "form", "base"}
        assert not attrs.keys() & {"src", "srcset", "action", "data", "poster", "style"}, (tag, attrs)
    assert all(link and link.startswith("#") for link in page.links)
    assert not re.search(r"url\(|@import", page.style)
    (policy,) = [attrs["content"] for tag, attrs in page.tags if tag == "meta" and attrs.get("http-equiv")]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert any(attrs.get("name") == "viewport" for tag, attrs in page.tags if tag == "meta")
    assert "prefers-color-scheme: dark" in page.style


def test_every_link_leads_to_one_place(page: Page, reports: list[Report]) -> None:
    for each in (page, Page(render(many(reports, 3, 3)))):
        assert len(set(each.ids)) == len(each.ids)
        assert {str(link)[1:] for link in each.links} <= set(each.ids)


def test_every_broken_law_is_a_link_to_its_counterexample(page: Page, reports: list[Report]) -> None:
    broken = [(report, verdict) for report in reports for verdict in report.broken]
    assert {verdict.law for _, verdict in broken} >= {"single_rounding", "nan", "interface", "rounding"}
    for report, verdict in broken:
        assert f"{verdict.failed:,} of {verdict.checked:,}" in counterexample(page, report, verdict.law)
    leading = [attrs for tag, attrs in page.tags if tag == "a" and (attrs.get("aria-label") or "").startswith("fail, ")]
    assert len({attrs["href"] for attrs in leading}) == len(leading) == len(broken)


def test_a_verdict_is_told_in_words_and_by_its_sign(page: Page, reports: list[Report]) -> None:
    verdicts = [verdict for report in reports for verdict in report.laws]
    shown = [cell for cell in page.cells if cell[0] in ("pass", "fail", "not-applicable")]
    for kind, sign, words in (("pass", "✓", "pass"), ("fail", "✗ ", ""), ("not-applicable", "·", "not applicable")):
        own = [text for found, text in shown if found == kind]
        assert len(own) == sum(verdict.verdict.replace(" ", "-") == kind for verdict in verdicts)
        assert all(text.startswith(sign) and words in text for text in own)


def test_a_counterexample_in_every_notation(page: Page, reports: list[Report]) -> None:
    """The smallest FP64 above the tie 2^-10 of e4m3fn's 0 and 2^-9: FP32 does not hold it."""
    found = counterexample(page, reports[2], "single_rounding")
    for words in (
        LAWS["single_rounding"].sentence, "(IEEE 754-2019, 4.3)",
        "input 0.0009765625000000002", "as hex float 0x1.0000000000001p-10", "as bits 0x3f50000000000001",
        "exactly 4503599627370497/4611686018427387904 = 4503599627370497 × 2^-62", "decision point 1/1024 = 2^-10",
        "got 0.0 (0x0.0p+0)", "expected 0.001953125 (0x1.0000000000000p-9)",
        "again exmy verify torch e4m3fn --input float64 --level quick",
    ):  # fmt: skip
        assert words in found


def test_bits_are_as_many_as_the_dtype_has() -> None:
    smallest = Failure(2.0**-149, 1, 0.0, 2.0**-149)
    for dtype, digits in (("float64", 16), ("float32", 8), ("bfloat16", 4), ("float16", 4), ("codes", 1)):
        assert dict(facts(smallest, dtype))["as bits"] == "0x" + "1".zfill(digits)


def test_nan_as_an_input(page: Page, reports: list[Report]) -> None:
    found = counterexample(page, reports[1], "nan")
    assert re.search(
        r"input nan as hex float nan as bits 0x[0-9a-f]{8} got 0.0 \(0x0.0p\+0\) expected nan again", found
    )


def test_the_block_of_a_counterexample(page: Page, reports: list[Report]) -> None:
    (verdict,) = [v for v in reports[4].broken if v.law == "rounding"]
    assert verdict.smallest is not None
    assert len(verdict.smallest.block) == 32
    found = counterexample(page, reports[4], "rounding")
    assert f"its block {repeats(verdict.smallest.block)} again" in found
    assert f"note {verdict.smallest.note}" in found


OWN_KERNELS = """
import numpy as np
import torch

def mx(x):
    return x

def codes(x):
    return torch.from_numpy(np.asarray(x, np.float32)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
"""


@pytest.mark.parametrize(
    "options",
    [
        ["own_again:mx", "mxfp4", "--input", "bfloat16", "--rounding", "toward_zero", "--rule", "ceil", "--seconds", "30.0"],
        ["own_again:codes", "e4m3fn", "--input", "float32", "--level", "quick", "--overflow", "nonsaturating",
         "--zero", "unsigned", "--subnormals", "flushed", "--takes", "array", "--gives", "codes"],
        ["own_again:mx", "e2m1fn", "--input", "float32", "--level", "quick", "--rounding", "stochastic", "--bias", "0.25"],
        ["torch", "e4m3fn", "--input", "float64", "--overflow", "saturate"],
    ],
)  # fmt: skip
def test_the_command_has_every_option_that_was_asked(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was typed is what is told; and of a certificate from before it was kept, what there is to tell by."""
    (tmp_path / "own_again.py").write_text(OWN_KERNELS)
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(main, ["verify", *options, "--json", "c.json"]).exit_code in (0, 1)
    (report,) = read_certificates("c.json")
    told = shlex.split(conformance.command(report))
    assert told[:4] == ["exmy", "verify", *options[:2]]
    assert sorted(told[4:]) == sorted(options[2:])
    rows = json.loads(Path("c.json").read_text())
    del rows[0]["question"]
    Path("c.json").write_text(json.dumps(rows))
    (old,) = read_certificates("c.json")
    assert conformance.command(old).startswith(shlex.join(["exmy", "verify", *options[:4]]))


def test_repeated_elements_of_a_block_are_counted() -> None:
    assert repeats([0.0, 0.0, -0.0, 1.5, 1.5, 1.5, 0.0]) == "0.0 (2 times), -0.0, 1.5 (3 times), 0.0"
    assert repeats([float("nan")] * 3) == "nan (3 times)"


def test_what_others_wrote_is_text(page: Page, reports: list[Report]) -> None:
    assert RUDE in page.words["all"]
    assert "<b>rude</b> 1.0" in page.words["all"]
    assert not any(tag in {"script", "b"} and "class" not in attrs for tag, attrs in page.tags)
    assert "exmy verify '<b>rude</b>' e4m3fn" in page.words["all"]
    table = markdown(reports)
    assert "### \\<b\\>rude\\</b\\> 1.0" in table
    assert "<script>" not in table.replace("\\<", "")


def test_conventions_and_where_it_was(page: Page, reports: list[Report]) -> None:
    assert "block of zeros" not in page.words["conventions"]
    for word in ("overflow", "saturate", "zero_block", "rule", "floor", "as found"):
        assert word in page.words["conventions"]
    for key, value in reports[0].environment.items():
        assert key in page.words["where"]
        assert value in page.words["where"]


def test_what_it_was_judged_by_is_told_where_that_is_not_what_it_does() -> None:
    report = verify(cast, "e4m3fn", overflow="nonsaturating", level="quick", name="torch")
    assert "overflow nonsaturating" in Page(render([report])).words["conventions"]


def test_the_last_of_equal_judgements_counts(reports: list[Report]) -> None:
    good, bad = reports[0], replace(reports[1], implementation="torch")
    assert "1 judgement of one format" in render([bad, good])
    assert "1 of 1 formats keep every law" in render([bad, good])
    assert "0 of 1 formats keep every law" in render([good, bad])


def test_a_law_that_a_certificate_does_not_know_was_not_asked(reports: list[Report]) -> None:
    old = replace(reports[0], laws=reports[0].laws[:-1])
    assert (("absent", "not asked")) in Page(render([old])).cells


@pytest.mark.parametrize("make", [render, markdown, lambda none: write_matrix(none, Path("/nowhere"))])
def test_no_reports_make_no_page(make: Callable[[list[Report]], Any]) -> None:
    with pytest.raises(ValueError, match=r"^no reports, so there is no matrix to show: [^\n]*$"):
        make([])


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (Fraction(0), "0"),
        (Fraction(-7), "-7"),
        (Fraction(1, 1024), "1/1024 = 2^-10"),
        (Fraction(-3, 32), "-3/32 = -3 × 2^-5"),
        (Fraction(448), "448 = 7 × 2^6"),
        (Fraction(1, 3), "1/3"),
        (Fraction(1, 1000), "1/1000"),
        (Fraction(2.0**-149), "1/713623846352979940529142984724747568191373312 = 2^-149"),
        (Fraction(5e-324), "2^-1074"),
    ],
)
def test_a_rational_is_short_and_exact(value: Fraction, written: str) -> None:
    assert rational(value) == written


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_rational_says_the_number(value: float) -> None:
    for part in rational(Fraction(value)).split(" = "):
        odd, _, power = part.rpartition("2^")
        exact = Fraction(part) if not _ else Fraction(odd.removesuffix(" × ") or 1) * Fraction(2) ** int(power)
        assert exact == Fraction(value)


@pytest.mark.parametrize(
    ("verdicts", "verdict", "dtypes"),
    [
        ({"float32": "pass", "float64": "pass"}, "pass", ()),
        ({"float32": "not applicable", "float64": "fail"}, "fail", ("float64",)),
        ({"float32": "pass", "float64": "fail"}, "some", ("float64",)),
        ({"float32": "fail", "float64": "fail", "float16": ""}, "fail", ("float32", "float64")),
        ({"float32": "not applicable", "float64": ""}, "not applicable", ()),
        ({"float32": "", "float64": ""}, "", ()),
    ],
)
def test_verdicts_of_dtypes_are_joined(verdicts: dict[str, str], verdict: str, dtypes: tuple[str, ...]) -> None:
    assert joined(verdicts) == (verdict, dtypes)


@pytest.fixture
def drawn(figures: list[Figure], tmp_path: Path) -> Callable[[list[Report]], Figure]:
    def draw(listed: list[Report]) -> Figure:
        conformance_figure(matrix(listed), tmp_path / "matrix.png")
        return figures[-1]

    return draw


def test_the_picture_shows_every_verdict(drawn: Callable[[list[Report]], Figure], reports: list[Report]) -> None:
    figure = drawn(reports)
    found = [cell.verdict for panel in panels(matrix(reports)) for row in panel.cells for cell in row]
    assert len(found) == 4 * len(LAWS)
    legend = 1
    for verdict in ("pass", "fail", "not applicable"):
        points = [c for axes in figure.axes for c in axes.collections if c.get_gid() == verdict]
        assert sum(len(np.asarray(c.get_offsets())) for c in points) == found.count(verdict) + legend
    assert sum(text.get_gid() == "some" for text in texts(figure)) == found.count("some") + legend


def test_the_picture_is_not_blank(tmp_path: Path, reports: list[Report]) -> None:
    conformance_figure(matrix(reports), tmp_path / "a.png")
    pixels = imread(tmp_path / "a.png")[..., :3]
    assert (pixels < 0.99).any(axis=2).mean() > 0.1


@pytest.mark.parametrize(("implementations", "formats"), [(1, 1), (3, 6), (10, 17)])
def test_text_is_whole_and_apart(
    drawn: Callable[[list[Report]], Figure], reports: list[Report], implementations: int, formats: int
) -> None:
    figure = drawn(many(reports, implementations, formats))
    width, height = figure.get_size_inches() * figure.dpi
    shown = texts(figure)
    boxes = [text.get_window_extent() for text in shown]
    for text, box in zip(shown, boxes, strict=True):
        assert 0 <= box.x0 < box.x1 <= width, text
        assert 0 <= box.y0 < box.y1 <= height, text
    # Slanted names lie beside each other, a column apart; their boxes say nothing about that.
    slanted = [text.get_rotation() == 60 for text in shown]
    for i, j in combinations(range(len(shown)), 2):
        if not (slanted[i] and slanted[j]):
            assert not boxes[i].overlaps(boxes[j]), (shown[i], shown[j])


def test_a_large_matrix_is_about_as_wide_as_a_page(
    drawn: Callable[[list[Report]], Figure], reports: list[Report]
) -> None:
    width, height = drawn(many(reports, 10, 17)).get_size_inches()
    assert 1 < height / width < 2.2


@pytest.mark.parametrize(("suffix", "start"), [("svg", b"<?xml"), ("pdf", b"%PDF"), ("PNG", b"\x89PNG")])
def test_pictures_by_their_suffix(tmp_path: Path, reports: list[Report], suffix: str, start: bytes) -> None:
    path = tmp_path / f"matrix.{suffix}"
    conformance_figure(matrix(reports), path)
    assert path.read_bytes().startswith(start)


def test_pictures_that_cannot_be(tmp_path: Path, reports: list[Report]) -> None:
    with pytest.raises(ValueError, match=r"a\.gif: the picture's name must end in \.png, \.svg, \.pdf, got '\.gif'"):
        conformance_figure(matrix(reports), tmp_path / "a.gif")
    with pytest.raises(ValueError, match="nothing was judged"):
        conformance_figure(matrix([]), tmp_path / "a.png")
    with pytest.raises(FileNotFoundError):
        conformance_figure(matrix(reports), tmp_path / "nowhere" / "a.png")
    assert not list(tmp_path.iterdir())


def test_a_picture_that_fails_leaves_the_one_before(
    tmp_path: Path, reports: list[Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(self: Figure, path: Path, **kwargs: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "a.png").write_bytes(b"whole")
    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="No space left"):
        conformance_figure(matrix(reports), tmp_path / "a.png")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"whole"]


def test_all_of_it_in_a_folder(tmp_path: Path, reports: list[Report]) -> None:
    written = write_matrix(reports, tmp_path / "deep" / "matrix")
    assert [path.name for path in written] == ["index.html", "matrix.png", "matrix.nc", "certificates.json"]
    assert sorted(path.name for path in written[0].parent.iterdir()) == sorted(path.name for path in written)
    kept = read_certificates(written[3])
    assert {r.to_json() for r in kept} == {r.to_json() for r in reports}
    with xr.open_dataset(written[2], engine="h5netcdf") as read:
        expected = matrix(kept)
        assert read.attrs == expected.attrs
        for name, variable in expected.variables.items():
            assert read[name].dims == variable.dims
            np.testing.assert_array_equal(read[name].values.astype(variable.dtype), variable.values)
            assert read[name].attrs == variable.attrs


def test_the_same_certificates_give_the_same_page_and_tables(tmp_path: Path, reports: list[Report]) -> None:
    write_matrix(reports, tmp_path)
    again = read_certificates(tmp_path / "certificates.json")
    assert render(again) == (tmp_path / "index.html").read_text(encoding="utf-8") == render(reports)
    assert markdown(again) == markdown(reports)


def test_the_tables_say_what_came_out(reports: list[Report]) -> None:
    lines = markdown(reports).splitlines()
    assert "| torch 1.0 | 0 of 1 | single_rounding (1) |" in lines
    (row,) = [line for line in lines if line.startswith("| e4m3fn | float64 |")]
    assert "| **fail** | quick | nearest_even, saturate, inf: largest, NaN: nan, zeros signed, subnormals kept |" in row
    assert re.search(
        r"single_rounding \([\d,]+ of [\d,]+ inputs\): `0x1.0000000000001p-10` gives `0.0`, not `0.001953125` \|$", row
    )


def test_every_line_of_a_table_has_its_cells(reports: list[Report]) -> None:
    cells = [len(re.findall(r"(?<!\\)\|", line)) for line in markdown(reports).splitlines()]
    for before, after in pairwise(cells):
        assert before == after or 0 in (before, after)


def test_words_stay_words_in_markdown() -> None:
    assert escaped("nearest_even __init__ _x_") == r"nearest_even \_\_init\_\_ \_x\_"
    assert escaped("a | b\n <c> `d` *e*") == r"a \| b \<c\> \`d\` \*e\*"


def test_the_docs_page_is_what_the_code_and_the_committed_certificates_say() -> None:
    reports = [report for path in COMMITTED if path.exists() for report in read_certificates(path)]
    page = DOCS.read_text(encoding="utf-8")
    assert regenerated(page, reports) == page, f"make it anew: python -m exmy.conformance {DOCS.relative_to(ROOT)} ..."
    assert re.findall(r"<!-- generated: (\S+) -->", page) == ["laws", "levels", "matrix"]
    assert not reports or DOCS.with_suffix(".png").exists()


def test_the_docs_page_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    (tmp_path / "kernels.py").write_text(next(text for _, text, _ in test_docs.blocks(DOCS) if "# kernels.py" in text))
    test_docs.follow(DOCS, tmp_path)
    assert (tmp_path / "kernels.json").exists()


def test_the_docs_page_is_made_anew(tmp_path: Path, reports: list[Report], capsys: pytest.CaptureFixture[str]) -> None:
    page, certificates = tmp_path / "page.md", tmp_path / "certificates.json"
    page.write_text("before\n<!-- generated: matrix -->\nold\n<!-- end -->\nafter\n")
    write_certificates(reports, certificates)
    conformance.main([str(page)])
    assert "old" in page.read_text()
    conformance.main([str(page), str(certificates)])
    made = markdown(reports)
    assert page.read_text(encoding="utf-8") == f"before\n<!-- generated: matrix -->\n{made}<!-- end -->\nafter\n"
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    for arguments, message in (
        ([str(tmp_path / "none.md")], "none.md"),
        ([str(page), str(page)], "page.md is no certificate"),
    ):
        with pytest.raises(SystemExit) as stopped:
            conformance.main(arguments)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="no generated part is called 'other'"):
        regenerated("<!-- generated: other -->\n<!-- end -->", [])


def test_notes_of_laws_are_shown_and_cut_in_tables(reports: list[Report]) -> None:
    """A kernel that never answers has no counterexample, only what it said."""
    verdict = Verdict("interface", "fail", 10, 10, None, "raises ValueError: " + "x" * 500)
    report = replace(reports[0], laws=(verdict,))
    assert "x" * 500 in Page(render([report])).words["all"]
    assert "interface (10 of 10 inputs): raises ValueError: xx" in markdown([report])
    assert "x" * 100 not in markdown([report])
