"""Names mean what the standards say, and nonsense is refused with the names nearby."""

import math
import subprocess
import sys
from fractions import Fraction

import pytest

from formats import FloatFormat, float_format, get_format, list_formats

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
        ("e0m3", "exponent_bits must be 1..8, got 0; the nearest formats are e1m3f, "),
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
    plain, finite, fn = 7 * 23, 8 * 24, 8 * 24 - 1
    assert len(names) == plain + finite + fn + len(["fp32", "tf32", "bf16", "fp16"])


def test_formats_are_equal_by_what_their_codes_mean() -> None:
    assert get_format("fp16") == get_format("e5m10")
    assert get_format("fp16").canonical_name == "e5m10"
    assert get_format("e2m1fn") == get_format("e2m1f")
    assert len({get_format("e4m3"), get_format("e4m3f"), get_format("e4m3fn")}) == 3


def test_a_format_of_impossible_parameters_is_not_made() -> None:
    with pytest.raises(ValueError, match="bias must be 7 for 4 exponent bits, got 8"):
        FloatFormat("mine", 4, 3, 8, "fn")
    with pytest.raises(ValueError, match=r"exponent_bits must be 1..8, got 11"):
        FloatFormat("fp64", 11, 52, 1023, "ieee")


def test_holds_is_containment_of_values() -> None:
    small = [f for f in map(float_format, list_formats("float")) if f.bits <= 6]
    values = {f: {f.decode_exact(code) for code in range(f.max_code + 1)} for f in small}
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
