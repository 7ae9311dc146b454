"""Names mean what the standards say, and nonsense is refused with the names nearby."""

import gc
import math
import pickle
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch

from formats import (
    FloatFormat,
    GridFormat,
    element_format,
    float_format,
    get_format,
    grid_format,
    list_formats,
    quantize,
    round_exact,
)

# name: bits, max, smallest normal, smallest subnormal, inf, NaN.
# Sources: IEEE 754-2019 table 3.5; OCP OFP8, the table of exponent parameters; OCP MX 5.3.
STANDARDS = {
    "fp32": (32, (2 - 2**-23) * 2.0**127, 2.0**-126, 2.0**-149, True, True),
    "tf32": (19, (2 - 2**-10) * 2.0**127, 2.0**-126, 2.0**-136, True, True),
    "bf16": (16, (2 - 2**-7) * 2.0**127, 2.0**-126, 2.0**-133, True, True),
    "fp16": (16, 65504.0, 2.0**-14, 2.0**-24, True, True),
    "e5m2": (8, 57344.0, 2.0**-14, 2.0**-16, True, True),
    "e4m3": (8, 240.0, 2.0**-6, 2.0**-9, True, True),
    "e4m3fn": (8, 448.0, 2.0**-6, 2.0**-9, False, True),
    "e3m2fn": (6, 28.0, 0.25, 0.0625, False, False),
    "e2m3fn": (6, 7.5, 1.0, 0.125, False, False),
    "e2m1fn": (4, 6.0, 1.0, 0.5, False, False),
    "e1m0f": (2, 2.0, 2.0, 2.0, False, False),
    "e2m0fn": (3, 2.0, 1.0, 1.0, False, True),
}


@pytest.mark.parametrize("name", STANDARDS)
def test_limits_are_those_of_the_standard(name: str) -> None:
    f = float_format(name)
    found = (f.bits, f.max, f.smallest_normal, f.smallest_subnormal, f.has_inf, f.has_nan)
    assert found == STANDARDS[name]
    assert f.name == str(f) == name
    assert f.emin == math.frexp(f.smallest_normal)[1] - 1
    assert f.emax == math.frexp(f.max)[1] - 1
    assert f.eps == 2.0**-f.mantissa_bits


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("e9m3", "exponent_bits must be 1..8, got 9; the nearest formats are e8m3, "),
        ("fp8", "nor a known name; the nearest formats are e5m2, e4m3fn"),
        ("FP4", "the nearest formats are e2m1fn, nf4"),
        ("e0m3", "exponent_bits must be 1..8, got 0; the nearest formats are e1m3f, "),
        (f"e{10**50}m3fn", f"exponent_bits must be 1..8, got {10**50}; the nearest formats are e8m3fn, "),
        ("e4m24", "mantissa_bits must be 0..23, got 24; the nearest formats are e4m23, "),
        ("e1m3", "exponent_bits must be at least 2 .* got 1; the nearest formats are e1m3f, "),
        ("e4m0", "mantissa_bits must be at least 1 .* got 0; the nearest formats are e4m0f, "),
        ("e1m0fn", "its only finite value is 0; the nearest formats are e1m0f, "),
        ("E4M3", "the nearest formats are e4m3, "),
        ("e4m3fnx", "the nearest formats are e4m3fn, "),
        ("float32", "the nearest formats are "),
        ("", "the nearest formats are "),
    ],
)
def test_nonsense_is_refused_with_what_is_near(name: str, says: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: .*{says}") as refusal:
        get_format(name)
    assert "\n" not in str(refusal.value)
    for near in str(refusal.value).split("formats are ")[1].split(", "):
        assert get_format(near)


def test_every_listed_name_is_a_format_and_every_legal_name_is_listed() -> None:
    names = list_formats()
    assert len(names) == len(set(names))
    assert [get_format(name).name for name in names] == names
    plain, finite, fn, fnuz = 7 * 23, 8 * 24, 8 * 24 - 1, 8 * 24
    p3109 = sum(2 * (k - 1) + 2 * k for k in range(3, 17))
    hardware = ["fp64", "fp32", "tf32", "bf16", "fp16", "e4m3b11fnuz", "e8m0fnu"]
    assert len(list_formats("float")) == plain + finite + fn + fnuz + p3109 + len(hardware)
    assert len(list_formats("integer")) == 15 + len(["int8q6"])
    assert len(list_formats("list")) == 14 + len(["nf4", "lns8q3"])
    kinds = [list_formats(kind) for kind in ("float", "integer", "list", "scaled")]
    assert sorted(names) == sorted(name for kind in kinds for name in kind)


def test_formats_are_equal_by_what_their_codes_mean() -> None:
    assert get_format("fp16") == get_format("e5m10")
    assert get_format("fp16").canonical_name == "e5m10"
    assert get_format("e2m1fn") == get_format("e2m1f")
    assert len({get_format("e4m3"), get_format("e4m3f"), get_format("e4m3fn")}) == 3


def test_a_format_of_impossible_parameters_is_not_made() -> None:
    with pytest.raises(ValueError, match=r"bias must be 0..512, got 513"):
        FloatFormat("mine", 4, 3, 513, "fn")
    with pytest.raises(ValueError, match=r"exponent_bits must be 1..8, got 11"):
        FloatFormat("wide", 11, 52, 1022, "ieee")
    with pytest.raises(ValueError, match="extended formats are IEEE P3109's, with bias 8"):
        FloatFormat("mine", 4, 3, 7, "extended")
    with pytest.raises(ValueError, match="unsigned formats are IEEE P3109's and e"):
        FloatFormat("mine", 4, 4, 7, "finite", signed=False)


# Sources: ml_dtypes' documentation of each; IEEE P3109 4.0, table of section 4.7.2; OCP MX 5.4.1; QLoRA.
OTHERS = {
    "e3m4": (8, 15.5, -15.5, 2.0**-6, 0x78),
    "e4m3fnuz": (8, 240.0, -240.0, 2.0**-10, 0x80),
    "e4m3b11fnuz": (8, 30.0, -30.0, 2.0**-13, 0x80),
    "e5m2fnuz": (8, 57344.0, -57344.0, 2.0**-17, 0x80),
    "e8m0fnu": (8, 2.0**127, 2.0**-127, 2.0**-127, 0xFF),
    "binary8p4se": (8, 224.0, -224.0, 2.0**-10, 0x80),
    "binary8p4sf": (8, 240.0, -240.0, 2.0**-10, 0x80),
    "binary8p4ue": (8, 52 * 1024.0, 0.0, 2.0**-18, 0xFF),
    "binary8p1se": (8, 2.0**62, -(2.0**62), 2.0**-63, 0x80),
    "binary8p1ue": (8, 2.0**125, 0.0, 2.0**-127, 0xFF),
    "binary3p2sf": (3, 1.5, -1.5, 0.5, 4),
    "e4m3fnb8": (8, 224.0, -224.0, 2.0**-10, 0x7F),
}


@pytest.mark.parametrize("name", OTHERS)
def test_limits_are_those_of_other_standards(name: str) -> None:
    f = float_format(name)
    assert (f.bits, f.max, f.min, f.smallest_subnormal, f.nan_code) == OTHERS[name]


def test_other_kinds_have_their_limits() -> None:
    assert (element_format("int8").min, element_format("int8").max) == (-128, 127)
    assert (element_format("int8q6").min, element_format("int8q6").max) == (-2, 127 / 64)
    assert (element_format("posit8").max, element_format("posit16").max) == (2.0**24, 2.0**56)
    assert (element_format("nf4").min, element_format("nf4").max) == (-1, 1)
    assert element_format("lns8q3").max == -element_format("lns8q3").min == float(np.float32(2.0**7.875))


def test_one_format_has_one_canonical_name() -> None:
    assert float_format("binary8p4sf") == float_format("e4m3fnuz")
    assert float_format("Binary8p4se") == float_format("binary8p4se")
    assert float_format("e4m3b11fnuz").canonical_name == float_format("e4m3fnuzb11").canonical_name == "e4m3fnuzb11"
    for name in [*list_formats("float"), "e4m3fnb8", "e3m2-nosub", "e5m2b3-nosub"]:
        f = float_format(name)
        assert float_format(f.canonical_name) == f, name


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("binary8p8se", r"P, the precision, must be 1..7 for K = 8, got 8"),
        ("binary8p9ue", r"P, the precision, must be 1..8 for K = 8, got 9"),
        ("binary17p3se", r"K, the width, must be 3..16, got 17"),
        ("binary2p1se", r"K, the width, must be 3..16, got 2"),
        ("int17", r"bits must be 2..16, got 17"),
        ("int1", r"bits must be 2..16, got 1"),
        ("int8q9", r"fraction bits must be 0..8, got 9"),
        ("posit2", r"bits must be 3..16, got 2"),
        ("lns16q3", r"1..7 must be before the point, got 12"),
        ("e4m3b600", r"bias must be 0..512, got 600"),
        ("e4m3b1fnb2", "two biases, 1 and 2; give one"),
        ("e4m3fnu", "fnu, unsigned powers of two without zero, is for M = 0"),
    ],
)
def test_parameters_out_of_range_are_named(name: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as refusal:
        get_format(name)
    assert str(refusal.value).startswith(name)
    assert "\n" not in str(refusal.value)


def test_what_is_no_element_is_refused_where_one_is_needed() -> None:
    with pytest.raises(ValueError, match="mxfp4 is a scaled format, and here single numbers are rounded"):
        element_format("mxfp4")
    with pytest.raises(ValueError, match="nf4 is no floating-point format"):
        float_format("nf4")
    with pytest.raises(ValueError, match="kind must be one of float, integer, list, scaled, got 'block'"):
        list_formats("block")


def test_a_list_is_known_by_its_name_as_long_as_any_equal_one_lives() -> None:
    """Compiled programs, and all that quantises, know a list by name; a copy that dies, or comes by pickle, changes nothing."""
    values, x = (0.0, 1.0, 2.5, 7.0), torch.tensor([0.4, 6.0, 1.8])
    first, second = grid_format("mortal", values), grid_format("mortal", values)
    del second
    gc.collect()
    assert quantize(x, first).tolist() == [0.0, 7.0, 2.5]
    second = grid_format("mortal", values)
    del first
    gc.collect()
    assert quantize(x, second).tolist() == [0.0, 7.0, 2.5]
    pickled = pickle.dumps(second)
    del second
    gc.collect()
    assert quantize(x, pickle.loads(pickled)).tolist() == [0.0, 7.0, 2.5]


@pytest.mark.parametrize("bits", [3, 5, 8, 10, 14])
def test_posits_round_their_bits(bits: int) -> None:
    """Standard for Posit Arithmetic (2022), 4.1: the bit string is cut to nearest, ties to even; never to zero, never to NaR.

    A posit of two more bits is the same string, two bits longer. So its code says where its value goes, and no value is asked.
    """
    f, longer = element_format(f"posit{bits}"), element_format(f"posit{bits + 2}")
    assert isinstance(f, GridFormat)
    largest = (1 << (bits - 1)) - 1
    for code in range(1, 1 << (bits + 1), 1 if bits <= 10 else 7):
        cut, rest = code >> 2, code & 3
        goes_to = min(max(cut + (rest > 2 or (rest == 2 and cut % 2 == 1)), 1), largest)
        value = Fraction(longer.decode_exact(code))
        assert round_exact(value, f) == f.decode_exact(goes_to), (code, value)
        assert round_exact(-value, f) == -Fraction(f.decode_exact(goes_to))
    tiny, huge = Fraction(1, 2**900), Fraction(2) ** 900
    assert [round_exact(x, f) for x in (tiny, -tiny, huge)] == [
        f.decode_exact(1),
        -Fraction(f.decode_exact(1)),
        f.largest,
    ]


def test_a_list_of_ones_own() -> None:
    mine = grid_format("mine", [3, -1, 0, Fraction(1, 2)])
    assert mine.grid().tolist() == [-1, 0, 0.5, 3]
    assert mine.encode([-5, -0.5, 0.25, 1.75, 9]).tolist() == [0, 0, 2, 2, 3]  # ties to the even code
    for values, says in [
        ([1], "a format needs at least 2 values, got 1"),
        (range(70000), "codes must fit 16 bits, got 69999"),
    ]:
        with pytest.raises(ValueError, match=says):
            grid_format("mine", values)
    with pytest.raises(ValueError, match="values must ascend, each once, got 1 after 2"):
        GridFormat("mine", (Fraction(2), Fraction(1)))
    with pytest.raises(ValueError, match="codes of neighbouring values must be one even, one odd"):
        GridFormat("mine", (Fraction(0), Fraction(1)), codes=(0, 2))


def test_holds_is_containment_of_values() -> None:
    small = [f for f in map(float_format, list_formats("float")) if f.bits <= 6]
    values = {f: {f.decode_exact(code) for code in f.finite_codes.tolist()} for f in small}
    for f in small:
        for other in small:
            assert f.holds(other) == (values[other] <= values[f]), (f, other)


def test_holds_knows_which_carriers_fit() -> None:
    fp32, bf16, fp16 = map(float_format, ("fp32", "bf16", "fp16"))
    assert not fp16.holds(float_format("e8m3"))
    assert not fp16.holds(float_format("e5m3fn"))  # one binade beyond FP16
    assert not fp32.holds(float_format("e8m3fn"))
    assert fp32.holds(float_format("e8m0fn"))  # all ones is its whole top binade
    assert bf16.holds(float_format("e5m7fn"))
    assert not bf16.holds(fp16)
    assert not fp16.holds(bf16)


def test_exact_limits_survive_where_fp32_ends() -> None:
    f = float_format("e8m23f")
    assert f.decode_exact(f.max_code) == Fraction(2**24 - 1) * 2 ** (128 - 23)


def test_describing_a_format_does_not_import_torch() -> None:
    code = "import sys; from formats import get_format; get_format('e4m3fn').grid(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
