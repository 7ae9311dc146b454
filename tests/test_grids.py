"""The picture of formats: its numbers against ml_dtypes and NumPy, which share nothing with us; its text whole and apart."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner, Result
from matplotlib.figure import Figure

from exmy.cli import main
from exmy.grids import grids_figure, largest_error, ulp
from formats import element_format, float_format
from formats.names import well_known
from formats.scaled import is_scaled_name
from tests.exact_values import FLOATS, exact
from tests.test_figure import texts

# Formats that another library has too.
WITNESSES: dict[str, Any] = {
    "e5m2": ml_dtypes.float8_e5m2,
    "e4m3": ml_dtypes.float8_e4m3,
    "e4m3fn": ml_dtypes.float8_e4m3fn,
    "e3m2fn": ml_dtypes.float6_e3m2fn,
    "e2m1fn": ml_dtypes.float4_e2m1fn,
    "bf16": ml_dtypes.bfloat16,
    "fp16": np.float16,
}


def positive_values(name: str) -> np.ndarray:
    """Every positive finite value, by the other library's decoder."""
    dtype = np.dtype(WITNESSES[name])
    codes = np.arange(2 ** (8 * dtype.itemsize), dtype=f"u{dtype.itemsize}")
    if name in ("e3m2fn", "e2m1fn"):
        codes = codes[: {"e3m2fn": 64, "e2m1fn": 16}[name]]
    with np.errstate(invalid="ignore"):
        values = codes.view(dtype).astype(np.float64)
    return np.unique(values[np.isfinite(values) & (values > 0)])


@pytest.mark.parametrize("name", WITNESSES)
def test_the_ulp_is_the_distance_to_the_next_value(name: str) -> None:
    values = positive_values(name)
    np.testing.assert_array_equal(ulp(float_format(name), values[:-1]), np.diff(values))
    assert ulp(float_format(name), values[0] / 4) == values[0]
    assert np.isnan(ulp(float_format(name), values[-1] * 1.01))


@pytest.mark.parametrize("name", WITNESSES)
def test_the_error_is_the_largest_that_a_conversion_makes(name: str) -> None:
    """Between two values a and b it is largest at the midpoint: ((b - a) / 2) / midpoint, made by a real cast."""
    values = np.concatenate([[0.0], positive_values(name)])
    middle = (values[:-1] + values[1:]) / 2
    with np.errstate(over="ignore"):
        cast = middle.astype(WITNESSES[name]).astype(np.float64)
    np.testing.assert_allclose(largest_error(float_format(name), middle), np.abs(cast - middle) / middle, rtol=1e-12)


def test_the_error_beyond_the_ends() -> None:
    f = float_format("e4m3fn")  # 2^-9 to 448
    assert largest_error(f, 2.0**-12) == 1
    assert largest_error(f, 896.0) == 0.5
    assert largest_error(f, 448.0) == 16 / 448


@pytest.fixture
def drawn(figures: list[Figure], tmp_path: Path) -> Callable[[list[str]], Figure]:
    def draw(names: list[str]) -> Figure:
        grids_figure([float_format(name) for name in names], tmp_path / "formats.png")
        return figures[-1]

    return draw


@pytest.mark.parametrize(
    "names",
    [["e4m3fn"], ["e4m3fn", "e5m2", "e2m1fn"], ["e1m0f"], ["fp32", "bf16", "fp16", "e4m3fn", "e5m2", "e2m1fn", "e8m0f", "e2m23"]],
)  # fmt: skip
def test_text_is_whole_and_apart(drawn: Callable[[list[str]], Figure], names: list[str]) -> None:
    figure = drawn(names)
    width, height = figure.get_size_inches() * figure.dpi
    shown = texts(figure)
    boxes = [t.get_window_extent() for t in shown]
    for text, box in zip(shown, boxes, strict=True):
        assert 0 <= box.x0 < box.x1 <= width, text
        assert 0 <= box.y0 < box.y1 <= height, text
    for i, a in enumerate(boxes):
        for j in range(i):
            assert not a.overlaps(boxes[j]), (shown[i], shown[j])


def test_the_ends_of_a_format_are_numbers_as_people_write_them(drawn: Callable[[list[str]], Figure]) -> None:
    assert "e5m2: 8 bits, 1.53e-05 to 57344" in [text.get_text() for text in texts(drawn(["e5m2"]))]


def test_few_values_are_strokes_and_many_a_band(drawn: Callable[[list[str]], Figure]) -> None:
    top = drawn(["e4m3fn", "fp32"]).axes[0]
    strokes = [c for c in top.collections if len(c.get_paths()) > 1]
    assert sum(len(c.get_paths()) for c in strokes) == len(positive_values("e4m3fn")) == 126
    bands = [c for c in top.collections if len(c.get_paths()) == 1]
    assert len(bands) == 2  # normal and subnormal


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["formats", "plot", *(str(a) for a in arguments)])


@pytest.mark.parametrize(
    ("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF"), ("PNG", b"\x89PNG")]
)
def test_the_command_writes_the_picture_and_says_where(tmp_path: Path, suffix: str, start: bytes) -> None:
    path = tmp_path / f"two.{suffix}"
    done = invoke("e4m3fn", "e5m2", "e5m2", "--out", path)
    assert done.exit_code == 0, done.output
    assert done.output == f"{path}\n"
    assert path.read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["e9m3"], "e9m3: exponent_bits must be 1..8, got 9; the nearest formats are e8m3"),
        (["bf61"], "the nearest formats are bf16"),
        (["bf16", "--out", "a.gif"], "a.gif: the picture's name must end in .png, .svg, .pdf, got '.gif'"),
        (["bf16", "--out", "a"], "got 'no suffix'"),
        (["bf16", "--out", "/proc/nowhere/a.png"], "/proc/nowhere/a.png: can't be written (No such file or directory)"),
        ([], "Missing argument 'NAME...'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments: list[str], message: str) -> None:
    refused = invoke(*arguments)
    assert refused.exit_code == 2
    assert message in refused.output
    assert "Traceback" not in refused.output


KNOWN = [
    *(name for name in well_known() if not is_scaled_name(name) and name != "fp64"),
    "e8m0f", "e1m1f", "e8m23f", "e8m23-nosub", "int2", "int16", "posit3",
]  # fmt: skip


@pytest.mark.parametrize("names", [KNOWN[i::4] for i in range(4)], ids=" ".join)
def test_every_known_format_is_drawn_value_by_value_or_from_end_to_end(
    names: list[str], figures: list[Figure], tmp_path: Path
) -> None:
    """Against the standards' formulas, in rationals: a stroke a positive value, or two bands that meet and end where these do."""
    grids_figure([element_format(name) for name in names], tmp_path / "known.png")
    top = figures[-1].axes[0]
    rows = {name: len(names) - 1 - place for place, name in enumerate(names)}
    assert [tick.get_text() for tick in top.get_yticklabels()] == names[::-1]
    for name, row in rows.items():
        paths = [np.asarray(path.vertices) for part in top.collections for path in part.get_paths()]
        own = [vertices[:, 0] for vertices in paths if row - 0.5 < vertices[:, 1].mean() < row + 0.5]
        strokes = sorted({float(x[0]) for x in own if np.ptp(x) == 0})
        if name in ("fp32", "tf32", "e8m23f", "e8m23-nosub"):
            f = FLOATS[name]
            last = (1 << f.exponent + f.mantissa) - 1 - (f.specials == "ieee") * (1 << f.mantissa)
            ends = float(exact(name, 1)), float(exact(name, last))
        elif name == "nf4":
            assert (len(strokes), strokes[-1]) == (8, 1.0)  # QLoRA, appendix E
            continue
        else:
            bits = element_format(name).bits
            found = (exact(name, code) for code in range(1 << bits))
            values = sorted({float(value) for value in found if isinstance(value, Fraction) and value > 0})
            if len(values) <= 300:
                assert strokes == values, name
                continue
            ends = values[0], values[-1]
        assert (min(x.min() for x in own), max(x.max() for x in own)) == ends, name
        assert len(own) in (1, 2), name


def test_the_ulp_of_other_formats() -> None:
    assert ulp(element_format("int8q6"), [0.01, 1.0]).tolist() == [1 / 64, 1 / 64]
    assert ulp(element_format("e3m2-nosub"), [0.01, 0.2]).tolist() == [0.15625, 0.03125]  # smallest: 1.25 × 2^-3
    assert np.isnan(ulp(element_format("e8m0fnu"), 2.0**-130))
    assert ulp(element_format("nf4"), 0.8).tolist() == 1.0 - 0.7229568362236023


def test_the_error_of_posits_is_that_of_their_own_dividers() -> None:
    """posit8's 2^20 and 2^24 part at 2^22, the posit9 between them: from there up the error is (2^24 - 2^22) / 2^22 = 3."""
    f = element_format("posit8")
    assert largest_error(f, 2.0**22) == 3
    assert largest_error(f, 2.0**-26) == 3  # nothing but 0 becomes 0
    assert largest_error(element_format("nf4"), 0.01) == 1  # which becomes 0


def test_what_pictures_cannot_hold_is_refused() -> None:
    refused = invoke("fp64")
    assert refused.exit_code == 2
    assert "fp64 reaches the ends of float64" in refused.output
