"""Datasheets, comparisons and test vectors: their numbers against ml_dtypes, NumPy and the standards' tables; their words."""

from __future__ import annotations

import csv
import io
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import xarray as xr
from click.testing import CliRunner, Result

from exmy.cli import main
from formats import compare, datasheet, grid_format, list_formats
from formats.facts import confusable, limits, parts, written
from formats.names import element_format, well_known
from tests.exact_values import FLOATS, exact
from verification.vector_sets import as_csv, as_hex, decoding_vectors, vectors

# Types that another library has, and by which it knows their limits.
WITNESSES: dict[str, Any] = {
    "e5m2": ml_dtypes.float8_e5m2, "e4m3fn": ml_dtypes.float8_e4m3fn, "e4m3": ml_dtypes.float8_e4m3,
    "e3m4": ml_dtypes.float8_e3m4, "e5m2fnuz": ml_dtypes.float8_e5m2fnuz, "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "e4m3b11fnuz": ml_dtypes.float8_e4m3b11fnuz, "e2m1fn": ml_dtypes.float4_e2m1fn, "e3m2fn": ml_dtypes.float6_e3m2fn,
    "e2m3fn": ml_dtypes.float6_e2m3fn, "bf16": ml_dtypes.bfloat16, "fp16": np.float16, "fp32": np.float32, "fp64": np.float64,
}  # fmt: skip


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.mark.parametrize("name", WITNESSES)
def test_limits_are_another_librarys(name: str) -> None:
    known = ml_dtypes.finfo(WITNESSES[name])
    sheet = datasheet(name)
    want = {
        "bits": known.bits, "largest": float(known.max), "lowest": float(known.min),
        "smallest_normal": float(known.smallest_normal), "smallest_positive": float(known.smallest_subnormal),
        "ulp_at_1": float(known.eps), "mantissa_bits": known.nmant,
    }  # fmt: skip
    assert {key: float(sheet[key]) for key in want} == want


@pytest.mark.parametrize("name", [name for name in WITNESSES if element_format(name).bits <= 16])
def test_values_and_kinds_are_another_librarys(name: str) -> None:
    dtype = np.dtype(WITNESSES[name])
    sheet = datasheet(name)
    codes = sheet["code"].values.astype(f"u{dtype.itemsize}")
    with np.errstate(invalid="ignore"):
        values = codes.view(dtype).astype(np.float64)
    np.testing.assert_array_equal(sheet["value"], values)
    np.testing.assert_array_equal(np.ldexp(sheet["significand"], sheet["exponent"].values.astype(np.int32)), values)
    kinds = np.where(np.isnan(values), "NaN", np.where(np.isinf(values), "infinity", "normal")).astype("U16")
    kinds[np.abs(values) < float(ml_dtypes.finfo(dtype).smallest_normal)] = "subnormal"
    kinds[values == 0] = np.where(np.signbit(values[values == 0]), "negative zero", "zero")
    np.testing.assert_array_equal(sheet["kind"], kinds)
    assert int(sheet["finite_values"]) == len(np.unique(values[np.isfinite(values)]))


def test_what_float64_does_not_hold_is_written_out() -> None:
    sheet = datasheet("binary16p1ue")  # P3109 4.0: bias 2^15, emax 2^16 - 3 - 2^15
    assert np.isnan(float(sheet["largest"]))
    assert sheet["largest"].attrs["exact"] == "2^32765"
    assert "value" not in sheet
    assert int(sheet["exponent"].sel(code=1)) == -32767
    assert "code" not in datasheet("fp32").dims


def test_unsigned_formats_and_large_quanta() -> None:
    assert int(datasheet("binary8p3uf")["finite_values"]) == 255  # P3109 4.0: all codes but NaN's
    assert int(datasheet("e8m0fnu")["finite_values"]) == 255  # OCP MX, table 7
    assert float(datasheet("e3m2b0")["ulp_at_1"]) == 0.5  # emin 1, M = 2: a quantum is 2^-1
    assert float(datasheet("e2m1b0")["ulp_at_1"]) == 1  # 1 is subnormal, and 2 the smallest normal number


def test_a_scaled_format_tells_its_scale_and_its_elements() -> None:
    sheet = datasheet("nvfp4")
    assert (float(sheet["bits_per_element"]), float(sheet["elements_per_scale"])) == (4.5, 16)
    assert (sheet.attrs["element"], sheet.attrs["scale"]) == ("e2m1fn", "e4m3fn")
    assert float(sheet["largest"]) == 6
    assert np.isnan(float(datasheet("e4m3fn@row")["elements_per_scale"]))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Fraction(448), "448"), (Fraction(1, 64), "0.015625"), (Fraction(11, 512), "1.375×2^-6"), (Fraction(-1, 512), "-2^-9"),
        (Fraction(2) ** 1023 * (2 - Fraction(1, 2**52)), "(2 - 2^-52)×2^1023"), (Fraction(2) ** -32767, "2^-32767"),
        (Fraction(0.07958029955625534), "≈0.0795802996"), (float("nan"), "NaN"), (float("-inf"), "-inf"), (-0.0, "-0"),
        (Fraction(0), "0"),
    ],
)  # fmt: skip
def test_values_are_written_exactly_or_marked(value: Fraction | float, text: str) -> None:
    assert written(value) == text


@pytest.mark.parametrize("value", [Fraction(3, 8), Fraction(-448), Fraction(5) * Fraction(2) ** -20000, Fraction(0)])
def test_parts_give_the_value_back(value: Fraction) -> None:
    significand, exponent = parts(value)
    assert Fraction(significand) * Fraction(2) ** exponent == value
    assert not value or 1 <= abs(significand) < 2


@pytest.mark.parametrize(
    "name", [*well_known(), "e1m1f", "e3m2-nosub", "binary3p1uf", "int2", "posit3", "e4m3fn@tile128x128"]
)
def test_what_a_file_of_a_datasheet_holds_is_the_standards(name: str, tmp_path: Path) -> None:
    """Read back: exactly what the formulas give, in rationals; of formats of 16 bits every 37th code and the ends."""
    datasheet(name).to_netcdf(tmp_path / "sheet.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "sheet.nc", engine="h5netcdf") as opened:
        sheet = opened.load()
    assert sheet.attrs["name"] == name
    if name in ("fp64", "fp32", "tf32"):  # too many codes to list
        ends = {"largest": (1 << FLOATS[name].exponent + FLOATS[name].mantissa) - (1 << FLOATS[name].mantissa) - 1}
        assert "code" not in sheet.dims
        for key, code in (ends | {"smallest_positive": 1, "smallest_normal": 1 << FLOATS[name].mantissa}).items():
            assert Fraction(float(sheet[key])) == exact(name, code), key
        return
    count = sheet.sizes["code"]
    assert sheet["code"].values.tolist() == list(range(count))
    half = count // 2
    codes = range(count) if count <= 256 else {*range(0, count, 37), half - 1, half, half + 1, count - 1}
    if name == "nf4":
        values = np.array([-1.0, 0, 1])  # QLoRA, appendix E: 0 and both ends are exact
        assert sheet["value"].values[[0, 7, 15]].tolist() == values.tolist()
        assert (np.diff(sheet["value"].values) > 0).all()
        return
    columns = (sheet[key].values.tolist() for key in ("significand", "exponent", "value", "kind"))
    rows = list(zip(*columns, strict=True))
    for code in codes:
        significand, exponent, value, kind = rows[code]
        want = exact(name, code)
        if isinstance(want, Fraction):
            assert Fraction(significand) * Fraction(2) ** exponent == want, code
            assert Fraction(value) == want, code
            assert kind in ("normal", "subnormal", "value") if want else kind == "zero", code
        else:
            assert repr(value) == repr(want), code
            nan = "unused" if name == "lns8q3" else "NaN"  # the code where -0 would be
            assert kind == {"nan": nan, "inf": "infinity", "-inf": "infinity", "-0.0": "negative zero"}[repr(want)]
    finite = [v for code in range(count) if isinstance(v := exact(name, code), Fraction)]
    assert int(sheet["finite_values"]) == len(finite)
    assert Fraction(float(sheet["largest"])) == max(finite)
    assert Fraction(float(sheet["lowest"])) == min(finite)
    assert Fraction(float(sheet["smallest_positive"])) == min(v for v in finite if v > 0)


def test_all_registered_formats_have_limits() -> None:
    names = [name for kind in ("float", "integer") for name in list_formats(kind)]
    for name in names:
        f = element_format(name)
        found = {key: limit.value for key, limit in limits(f).items()}
        assert found["smallest_positive"] <= found["largest"], name


def test_confusable_names_say_what_is_different() -> None:
    others = confusable(element_format("e4m3fn"))
    assert others["e4m3"] == "largest 240, infinity"
    assert others["e4m3fnuz"] == "largest 240, bias 8, no -0"
    assert "e4m3fn" not in others
    assert "e2m1fn and e2m1f are the same" in datasheet("e2m1fn").attrs["confusable"]
    assert confusable(element_format("int8")) == {"int8q6": "largest 1.984375"}


@pytest.mark.parametrize(
    ("a", "b"), [("e4m3fn", "e4m3"), ("e5m2", "e5m2fnuz"), ("e4m3fnuz", "e4m3b11fnuz"), ("bf16", "fp16")]
)
def test_a_comparison_is_another_librarys_set_difference(a: str, b: str) -> None:
    found = compare(a, b)
    grids = []
    for name in (a, b):
        dtype = np.dtype(WITNESSES[name])
        with np.errstate(invalid="ignore"):
            every = np.arange(1 << (8 * dtype.itemsize), dtype=f"u{dtype.itemsize}").view(dtype).astype(np.float64)
        grids.append(np.unique(every[np.isfinite(every)]))
    values, in_a, in_b = (found[key].values for key in ("value", "in_a", "in_b"))
    first, second = grids
    np.testing.assert_array_equal(values, np.union1d(first, second))
    np.testing.assert_array_equal(values[in_a & ~in_b], np.setdiff1d(first, second))
    np.testing.assert_array_equal(values[in_b & ~in_a], np.setdiff1d(second, first))
    for label, name in (("a", a), ("b", b)):
        there = found[f"in_{label}"].values
        codes = found[f"code_{label}"].values
        dtype = np.dtype(WITNESSES[name])
        back = codes[there].astype(f"u{dtype.itemsize}").view(dtype).astype(np.float64)
        np.testing.assert_array_equal(back, found["value"].values[there])
        assert (codes[~there] == -1).all()


def test_wide_formats_are_compared_by_what_they_hold() -> None:
    found = compare("bf16", "fp32")
    assert (found.attrs["a_holds_b"], found.attrs["b_holds_a"], found.attrs["equal"]) == (0, 1, 0)
    assert not found.sizes
    assert compare("fp16", "e5m10").attrs["equal"] == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["show", "e4m3fn"], ["s eeee mmm", "448", "2^-9 = 0.001953125", "0.125", "17.8 binades", "NaN 0x7F and 0xFF"]),
        (["show", "e4m3fn"], ["1.875×2^-6", "e4m3: largest 240, infinity", "binary8p4se", "0x80 to 0xFF are the same"]),
        (["show", "e4m3fnuz"], ["NaN 0x80", "0x80 is NaN", "e4m3fn: largest 448, bias 7, -0"]),
        (["show", "int8q6"], ["ii.ffffff", "1.984375", "-2", "int8: largest 127"]),
        (["show", "nf4"], ["≈0.0795802996", "arXiv 2305.14314"]),
        (["show", "posit8"], ["16777216", "NaN 0x80", "2022"]),
        (["show", "mxfp4"], ["4.25", "e2m1fn", "2^(floor(log2(amax)) - emax)"]),
        (["show", "binary16p1ue"], ["2^32765", "IEEE P3109"]),
        (["compare", "e4m3fn", "e4m3"], ["Only e4m3fn has 14: ±(256 288 320 352 384 416 448)", "Only e4m3 has no value"]),
        (["compare", "e4m3fn", "e4m3fnuz"], ["0.001953125 is 0x1 in e4m3fn and 0x2 in e4m3fnuz"]),
        (["compare", "bf16", "fp32"], ["fp32 has every finite value of bf16", "bf16 lacks some finite value of fp32"]),
        (["compare", "fp16", "e5m10"], ["are one format"]),
        (["list"], ["e4m3b11fnuz", "posit16", "nvfp4", "binary{K}p{P}"]),
        (["list", "--all", "--kind", "integer"], ["int2", "int16"]),
        (["list", "--kind", "scaled"], ["mxint8"]),
    ],
)  # fmt: skip
def test_the_command_tells(arguments: list[str], told: list[str]) -> None:
    done = invoke("formats", *arguments)
    assert done.exit_code == 0, done.output
    for text in told:
        assert text in done.output


@pytest.mark.parametrize("width", [60, 80, 100, 200])
@pytest.mark.parametrize("name", ["e4m3fn", "int8", "binary8p1ue", "nf4", "e2m1fn"])
def test_a_chart_has_every_value_at_any_width(monkeypatch: pytest.MonkeyPatch, name: str, width: int) -> None:
    from rich.console import Console

    from exmy.datasheets import format_sheet

    f = element_format(name)
    console = Console(width=width, file=io.StringIO())
    console.print(format_sheet(f, width))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "…" not in shown
    rows = [line.split()[1:] for line in shown.split("Every value")[1].splitlines() if line.startswith(" 0x")]
    cells = [cell for row in rows for cell in row]
    half = (1 << f.bits) // (2 if f.has_negative_zero else 1)
    assert cells == [written(f.decode_exact(code)) for code in range(half)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["formats", "compare", "e4m3fn", "e9m3"], "e9m3: exponent_bits must be 1..8, got 9"),
        (["formats", "compare", "mxfp4", "nvfp4"], "is a scaled format"),
        (["formats", "show", "binary17p3se"], "K, the width, must be 3..16, got 17"),
        (["vectors", "fp32"], "fp32 has 32 bits; vectors are for formats of at most 16 bits"),
        (["vectors", "binary16p1ue"], "binary16p1ue does not fit FP64"),
        (["vectors", "e4m3fn", "--from", "tf32"], "tf32: inputs are fp32, fp64, or a format of at most 16 bits"),
        (["vectors", "e4m3fn", "--every"], "fp32 has 2^32 inputs"),
        (["vectors", "e4m3fn", "--rounding", "stochastic"], "rounding must be one of nearest_even"),
        (["vectors", "e4m3fn", "--overflow", "wrap"], "overflow must be one of saturate"),
        (["vectors", "e2m1fn", "--overflow", "nonsaturating"], "e2m1fn has neither inf nor NaN"),
        (["vectors", "e4m3fn", "--decode", "--every"], "decoding has no rounding"),
        (["vectors", "e4m3fn", "--out", "/proc/nowhere/a.csv"], "/proc/nowhere/a.csv: can't be written"),
        (["vectors", "e4m3fn", "--out", "/tmp"], "/tmp: can't be written (Is a directory)"),
        (["vectors", "mxfp4"], "is a scaled format"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments: list[str], message: str) -> None:
    refused = invoke(*arguments)
    assert refused.exit_code == 2, refused.output
    assert message in refused.output
    assert "Traceback" not in refused.output


def test_vectors_to_a_pipe_leave_the_pipe_where_it_is(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    done = invoke("vectors", "e2m1fn", "--decode", "--out", pipe)
    assert done.exit_code == 0, done.output
    read = os.read(reader, 1 << 16).decode()
    os.close(reader)
    assert pipe.is_fifo()
    assert len(read.splitlines()) == 1 + 16  # a heading, and a line a code
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_vectors_touch_no_file_but_theirs(tmp_path: Path) -> None:
    """Nor a link: what it leads to is written."""
    kept = tmp_path / "v.csv.partial"
    kept.write_text("mine")
    (tmp_path / "link.csv").symlink_to(tmp_path / "v.csv")
    for name in ("v.csv", "link.csv"):
        assert invoke("vectors", "e2m1fn", "--decode", "--out", tmp_path / name).exit_code == 0
    assert kept.read_text() == "mine"
    assert (tmp_path / "link.csv").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.csv", "v.csv", "v.csv.partial"]
    assert (tmp_path / "v.csv").stat().st_mode & 0o444


def rounded_by_ml_dtypes(found: xr.Dataset, dtype: Any) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(found["input_value"].values.astype(np.float32).astype(dtype).view(np.uint8))


@pytest.mark.parametrize(
    ("name", "overflow"),
    [("e5m2", "nonsaturating"), ("e4m3", "nonsaturating"), ("e3m4", "nonsaturating"), ("e2m1fn", "saturate")],
)
def test_vectors_are_another_librarys_casts(name: str, overflow: str) -> None:
    found = vectors(name, roundings=["nearest_even"], overflows=[overflow])
    cast = rounded_by_ml_dtypes(found, WITNESSES[name])
    nan = np.isnan(found["input_value"].values)
    np.testing.assert_array_equal(found["expected_code"].values[~nan], cast[~nan])
    patterns = found["input_bits"].values.astype(np.uint32).view(np.float32)
    np.testing.assert_array_equal(patterns.astype(np.float64), found["input_value"])


def test_vectors_hold_both_sides_of_every_step() -> None:
    """Of each two neighbouring values of a 4-bit format: some input just below and just above the middle, and the middle."""
    found = vectors("e2m1fn", roundings=["nearest_even"], overflows=["saturate"])
    inputs = np.unique(found["input_value"])
    for middle in (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0):
        at = np.float32(middle)
        for x in (np.nextafter(at, np.float32(0)), at, np.nextafter(at, np.float32(9))):
            assert float(x) in inputs
            assert -float(x) in inputs


def test_vectors_of_wider_inputs_hold_their_own_neighbours() -> None:
    """The inputs' format is no tensor's dtype, so its values beside each middle come from its own list."""
    given = element_format("binary12p5se")
    inputs, grid = np.unique(vectors("e2m1fn", given, ["nearest_even"])["input_value"]), given.grid()
    for middle in (-3.5, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0):
        place = int(np.searchsorted(grid, middle))
        assert {grid[place - 1], grid[place], grid[place + 1]} <= set(inputs.tolist())


def test_vectors_of_narrow_inputs_are_complete() -> None:
    found = vectors("e4m3fn", "e5m2", ["toward_zero", "to_odd"], ["saturate", "sat_none"])
    assert found.attrs["inputs"] == "all codes"
    assert found.sizes["vector"] == 4 * 256
    own = grid_format("mine", [0, 1, 2, 5])
    assert set(vectors(own, "e2m1fn")["expected_value"].values.tolist()) == {0.0, 1.0, 2.0, 5.0}


@pytest.mark.parametrize(
    ("given", "numbers"), [("binary12p5se", 2**12 - 1), pytest.param("fp16", 2**16 - 2 * 1023, marks=pytest.mark.proof)]
)
def test_vectors_of_every_input_are_complete(given: str, numbers: int) -> None:
    """All codes but those of NaN."""
    assert vectors("e2m1fn", given, ["nearest_even"], ["saturate"], every=True).sizes["vector"] == numbers


def test_overflows_are_told_apart() -> None:
    found = vectors("e5m2", "fp32", ["nearest_even", "toward_zero"])
    at = (found["input_value"].values == 2.0**100) & (found["rounding"].values == "nearest_even")
    assert not at.any()  # 2^100 is no decision point, but the largest FP32 number is one
    huge = float(np.finfo(np.float32).max)
    code = {
        (str(r), str(o)): int(c)
        for r, o, v, c in zip(
            *(found[n].values for n in ("rounding", "overflow", "input_value", "expected_code")), strict=True
        )
        if v == huge
    }
    assert code == {
        ("nearest_even", "saturate"): 0x7B, ("nearest_even", "propagate"): 0x7B, ("nearest_even", "nonsaturating"): 0x7C,
        ("nearest_even", "sat_none"): 0x7C, ("toward_zero", "saturate"): 0x7B, ("toward_zero", "propagate"): 0x7B,
        ("toward_zero", "nonsaturating"): 0x7B, ("toward_zero", "sat_none"): 0x7B,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["e4m3fn", "bf16", "e5m2fnuz"])
def test_decoding_vectors_are_another_librarys_values(name: str) -> None:
    found = decoding_vectors(name)
    dtype = np.dtype(WITNESSES[name])
    codes = found["input_bits"].values.astype(f"u{dtype.itemsize}")
    with np.errstate(invalid="ignore"):
        values = codes.view(dtype).astype(np.float32)
    got = found["expected_code"].values.astype(np.uint32).view(np.float32)
    np.testing.assert_array_equal(got, values)
    np.testing.assert_array_equal(np.signbit(got[values == 0]), np.signbit(values[values == 0]))


def test_csv_and_hex_say_the_same() -> None:
    found = vectors("e4m3fn", "bf16", ["nearest_even", "to_odd"])
    rows = list(csv.DictReader(io.StringIO("\n".join(as_csv(found)))))
    assert len(rows) == found.sizes["vector"]
    lines = list(as_hex(found))
    comments = [line for line in lines if line.startswith("//")]
    assert "// rounding: 0 nearest_even, 1 to_odd" in comments
    words = [line.split("_") for line in lines if not line.startswith("//")]
    assert [f"0x{word[2]}" for word in words] == [row["input_bits"] for row in rows]
    assert [f"0x{word[3]}" for word in words] == [row["expected_code"] for row in rows]
    assert {len("".join(word)) for word in words} == {1 + 1 + 4 + 2}
    names = ["nearest_even", "to_odd"]
    assert [names[int(word[0], 16)] for word in words] == [row["rounding"] for row in rows]
    assert [float(row["expected_value"]) for row in rows[:50]] == found["expected_value"].values[:50].tolist()


def test_the_vectors_command_writes_a_file(tmp_path: Path) -> None:
    path = tmp_path / "e2m1.hex"
    done = invoke("vectors", "e2m1fn", "--from", "e4m3fn", "--rounding", "nearest_even", "--out", path)
    assert done.exit_code == 0, done.output
    assert "762 vectors" in done.output  # 254 codes that are no NaN, under the three overflows of a format without one
    assert path.read_text().startswith("// e4m3fn to e2m1fn: 762 vectors, inputs: all codes\n")
    assert [p.name for p in tmp_path.iterdir()] == ["e2m1.hex"]
    printed = invoke("vectors", "e2m1fn", "--decode")
    assert printed.output.splitlines()[:3] == [
        "input_bits,expected_code,expected_value",
        "0x0,0x00000000,0.0",
        "0x1,0x3F000000,0.5",
    ]
