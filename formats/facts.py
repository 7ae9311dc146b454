"""What there is to know of a format, in words and exact numbers: a datasheet before it is a dataset.

No xarray here, which takes longer to load than `exmy formats show` takes to answer.
"""

from collections.abc import Iterator
from fractions import Fraction
from math import isinf, isnan, log2
from typing import NamedTuple

from formats.integers import IntegerFormat
from formats.lists import GridFormat
from formats.names import FLOAT, SUFFIXES, element_format, well_known
from formats.scaled import ScaledFormat
from formats.spec import ElementFormat, FloatFormat, Format

FLOATS = "IEEE 754-2019, clause 3.4"
OFP8 = "OCP 8-bit Floating Point (OFP8) v1.0"
MX = "OCP Microscaling Formats (MX) v1.0, section 5.3"
FNUZ = "Noune et al., 8-bit Numerical Formats for Deep Neural Networks, arXiv 2206.02915"
SOURCES = {
    "e4m3fn": OFP8, "e5m2": OFP8, "e2m1f": MX, "e2m3f": MX, "e3m2f": MX, "int8q6": f"{MX}.4",
    "e8m0fnu": "OCP Microscaling Formats (MX) v1.0, section 5.4.1; rounding as torch and ml_dtypes",
    "e4m3fnuz": FNUZ, "e5m2fnuz": FNUZ, "e4m3fnuzb11": "Sun et al., Hybrid 8-bit Floating Point, NeurIPS 2019",
    "e8m7": "bfloat16, as FP32 with 7 mantissa bits", "e8m10": "NVIDIA TensorFloat-32: 19 bits",
}  # fmt: skip
POSITS = "posits from before the 2022 standard have es by their width (posit8: 0, posit16: 1), and other values"
NOTES = {
    "e2m3f": "the name e2m3fn says NaN only, but OCP's MX element has none: e2m3fn and e2m3f are the same",
    "e3m2f": "the name e3m2fn says NaN only, but OCP's MX element has none: e3m2fn and e3m2f are the same",
    "e2m1f": "the name e2m1fn says NaN only, but OCP's MX element has none: e2m1fn and e2m1f are the same",
    "e8m10": "tf32 is stored in 32 bits, of which the lowest 13 are zero",
}


class Limit(NamedTuple):
    """One number of a datasheet: exact, with its unit and what it is."""

    value: Fraction | float | int
    units: str
    long_name: str


class Facts(NamedTuple):
    """A datasheet: what is said in words, and the numbers."""

    attributes: dict[str, str]
    limits: dict[str, Limit]


def facts(f: Format) -> Facts:
    """The datasheet of a format, without a table of its codes; of a scaled one the numbers are the element's, and its scale's."""
    if not isinstance(f, ScaledFormat):
        assert isinstance(f, ElementFormat)
        return Facts(_attributes(f), limits(f))
    words = _attributes(f.element)
    words |= {
        "name": f.name,
        "canonical_name": f.canonical_name,
        "kind": kind_of(f),
        "element": f.element.name,
        "granularity": str(f.granularity),
        "scale": f.scale,
        "rule": str(f.rule),
        "layout": f"element {words['layout']}",
        "specials": f"element: {words['specials']}",
        "source": source(f),
        "confusable": "",
    }
    return Facts(words, limits(f.element) | _scaled_limits(f))


def limits(f: ElementFormat) -> dict[str, Limit]:
    """The numbers of a format's datasheet, exact: those that `datasheet` has as scalars."""
    smallest = _smallest_positive(f)
    sheet = {
        "bits": Limit(f.bits, "bits", "width of a code"),
        "finite_values": Limit(_count(f), "1", "finite values, zero counted once"),
        "largest": Limit(f.largest, "1", "largest finite value"),
        "lowest": Limit(f.lowest, "1", "lowest finite value"),
        "smallest_positive": Limit(smallest, "1", "smallest positive value, subnormals included"),
        "ulp_at_1": Limit(_ulp_at_one(f), "1", "distance from 1 to the next larger value; NaN where either is missing"),
        "dynamic_range": Limit(
            _log2(f.largest) - _log2(smallest), "binades", "log2(largest / smallest positive value)"
        ),
    }
    if isinstance(f, FloatFormat):
        normal = Fraction(2) ** f.emin if f.subnormals and f.zero else f.smallest
        sheet |= {
            "exponent_bits": Limit(f.exponent_bits, "bits", "E"),
            "mantissa_bits": Limit(f.mantissa_bits, "bits", "M, without the implicit one"),
            "bias": Limit(f.bias, "1", "exponent field of 2^0"),
            "emin": Limit(f.emin, "1", "exponent of the smallest normal number, 1.m × 2^e"),
            "emax": Limit(f.emax, "1", "exponent of the largest finite number, 1.m × 2^e"),
            "smallest_normal": Limit(normal, "1", "smallest number written 1.m × 2^e"),
        }
    return sheet


def _scaled_limits(f: ScaledFormat) -> dict[str, Limit]:
    per = f.elements_per_scale
    shared = float("nan") if per is None else float(per)
    return {
        "scale_bits": Limit(f.scale_bits, "bits", f"width of a scale, in {f.scale}"),
        "elements_per_scale": Limit(shared, "1", "elements that share a scale; NaN: a row or a tensor"),
        "bits_per_element": Limit(
            f.bits_per_element, "bits", "element and its share of the scale; of rows' and tensors' scales none"
        ),
    }


def _attributes(f: ElementFormat) -> dict[str, str]:
    lines = [f"{name}: {difference}" for name, difference in confusable(f).items()]
    if f.canonical_name in NOTES:
        lines.insert(0, NOTES[f.canonical_name])
    if f.name.startswith("posit"):
        lines.insert(0, POSITS)
    return {
        "name": f.name,
        "canonical_name": f.canonical_name,
        "kind": kind_of(f),
        "layout": layout(f),
        "specials": ", ".join(_specials(f)) or "none: every code is a finite value",
        "source": source(f),
        "confusable": "\n".join(lines),
    }


def confusable(f: ElementFormat) -> dict[str, str]:
    """Names of other formats that are easily taken for this one, and what is different about each."""
    return {name: _difference(f, other) for name, other in _neighbours(f) if other != f}


def _neighbours(f: ElementFormat) -> Iterator[tuple[str, ElementFormat]]:
    names: list[str] = []
    if isinstance(f, FloatFormat):
        fields = f"e{f.exponent_bits}m{f.mantissa_bits}"
        names += [
            name for name in well_known() if (match := FLOAT.fullmatch(name)) and f"e{match[1]}m{match[2]}" == fields
        ]
        names += [fields + suffix for suffix in SUFFIXES]
        names += [f"binary{f.bits}p{f.mantissa_bits + 1}{'s' if f.signed else 'u'}{domain}" for domain in "ef"]
        names += ["bf16", "fp16"] if f.bits == 16 else []
    elif isinstance(f, IntegerFormat):
        names += [f"int{f.bits}", f"int{f.bits}q{f.bits - 2}"]
    elif f.bits == 4:
        names += ["e2m1fn", "int4", "nf4"]
    seen: list[ElementFormat] = []
    for name in dict.fromkeys(names):
        try:
            other = element_format(name)
        except ValueError:
            continue  # no such format: e1m3, say, would have no finite values left
        if other not in seen:
            seen.append(other)
            yield name, other


def _difference(f: ElementFormat, other: ElementFormat) -> str:
    """What tells the other one from f, shortest first."""
    parts = [f"largest {written(other.largest)}"] if other.largest != f.largest else []
    if isinstance(f, FloatFormat) and isinstance(other, FloatFormat) and other.bias != f.bias:
        parts.append(f"bias {other.bias}")
    for what, mine, its in (
        ("infinity", f.has_inf, other.has_inf),
        ("NaN", f.has_nan, other.has_nan),
        ("-0", f.has_negative_zero, other.has_negative_zero),
    ):
        if mine != its:
            parts.append(what if its else f"no {what}")
    return ", ".join(parts) or "other values for its codes"


def written(value: Fraction | float) -> str:
    """A value to read: decimal where that is short and exact, else a significand times a power of two; ≈ where it is rounded."""
    if isinstance(value, float):
        if isnan(value):
            return "NaN"
        return ("-" if value < 0 else "+") + "inf" if isinf(value) else "-0"
    significand, exponent = parts(value)
    if abs(exponent) < 1000:
        decimal = f"{float(value):.9g}"
        if Fraction(decimal) == value and len(decimal) <= 9 and "e" not in decimal:
            return decimal
    if significand.as_integer_ratio()[1] > 1 << 13:  # the digits of a longer one would hide more than they tell
        short = 2 - Fraction(abs(significand))
        sign = "-" * (value < 0)
        return f"{sign}(2 - {written(short)})×2^{exponent}" if short.numerator == 1 else f"≈{float(value):.9g}"
    power = f"2^{exponent}"
    return power if significand == 1 else f"-{power}" if significand == -1 else f"{significand:.17g}×{power}"


def parts(value: Fraction) -> tuple[float, int]:
    """Significand and exponent of a binary fraction: value = significand * 2^exponent with 1 <= |significand| < 2; 0, 0 of 0.

    In integers of the length of the value's own digits, so that 2^-32767 costs no more than 1.
    """
    n, d = value.numerator, value.denominator
    if not n:
        return 0.0, 0
    exponent = abs(n).bit_length() - d.bit_length()
    zeros = (n & -n).bit_length() - 1
    odd = n >> zeros
    return odd / (1 << (abs(odd).bit_length() - 1)), exponent


def kind_of(f: Format) -> str:
    """float, integer, list or scaled, as in `list_formats`."""
    kinds: dict[type[Format], str] = {FloatFormat: "float", IntegerFormat: "integer", GridFormat: "list"}
    return kinds.get(type(f), "scaled")


def layout(f: ElementFormat) -> str:
    """The bits of a code from the top, a letter each, and what they mean."""
    if isinstance(f, FloatFormat):
        parts = [("s", "sign", int(f.signed)), ("e", "exponent", f.exponent_bits), ("m", "mantissa", f.mantissa_bits)]
        there = [part for part in parts if part[2]]
        widths = ", ".join(f"{width} {word}" for _, word, width in there)
        return f"{' '.join(letter * width for letter, _, width in there)}   ({widths}; bias {f.bias})"
    if isinstance(f, IntegerFormat):
        whole, fraction = "i" * (f.bits - f.fraction_bits), "f" * f.fraction_bits
        point = f", {f.fraction_bits} of them behind the point" if f.fraction_bits else ""
        return f"{whole}{'.' if fraction else ''}{fraction}   (two's complement of {f.bits} bits{point})"
    return f"{'c' * f.bits}   (the code of a list of {len(f.finite_codes)} values)"


def source(f: Format) -> str:
    """Where the format is defined."""
    if isinstance(f, ScaledFormat):
        return f.description
    if f.canonical_name in SOURCES:
        return SOURCES[f.canonical_name]
    if isinstance(f, IntegerFormat):
        return "two's complement integers" + (" with a binary point" if f.fraction_bits else "")
    if isinstance(f, GridFormat):
        known = {
            "nf4": "Dettmers et al., QLoRA, arXiv 2305.14314, appendix E",
            "posit": "Standard for Posit Arithmetic (2022), es = 2",
            "lns": "logarithmic numbers: a sign and a biased fixed-point logarithm",
        }
        return next((text for start, text in known.items() if f.name.startswith(start)), "a list of values")
    assert isinstance(f, FloatFormat)
    if f.specials == "extended" or not f.signed or f.canonical_name.startswith("binary"):
        return "IEEE P3109 version 4.0"
    return {
        "ieee": FLOATS,
        "fn": f"as {OFP8} has E4M3: no infinity, NaN at all ones",
        "finite": "every code a finite value",
        "fnuz": f"as {FNUZ}: NaN in place of -0",
    }[f.specials]


def _specials(f: ElementFormat) -> list[str]:
    digits = -(-f.bits // 4)
    found = []
    if f.inf_code is not None:
        found.append(f"+inf 0x{f.inf_code:0{digits}X}")
        if f.signed:
            found.append(f"-inf 0x{f.inf_code | 1 << (f.bits - 1):0{digits}X}")
    if f.nan_code is not None:
        found.append(f"NaN {_nan_codes(f, digits)}")
    if f.has_negative_zero:
        found.append(f"-0 0x{1 << (f.bits - 1):0{digits}X}")
    return found


def _nan_codes(f: ElementFormat, digits: int) -> str:
    """NaN's codes: one, or the ends of the ranges that they fill."""
    assert f.nan_code is not None
    if not isinstance(f, FloatFormat) or f.specials in ("fnuz", "extended") or not f.signed:
        return f"0x{f.nan_code:0{digits}X}"
    sign, half = 1 << (f.bits - 1), (1 << (f.bits - 1)) - 1
    first = f.max_code + 1 + f.has_inf
    written_as = f"0x{first:0{digits}X}" + (f"–0x{half:0{digits}X}" if half > first else "")
    upper = f"0x{first | sign:0{digits}X}" + (f"–0x{half | sign:0{digits}X}" if half > first else "")
    return f"{written_as} and {upper}"


def meaning(f: ElementFormat, code: int) -> Fraction | float | None:
    """What a code stands for; None where a list has no value for it."""
    if isinstance(f, GridFormat) and not f.has_code(code):
        return None
    return f.decode_exact(code)


def _log2(value: Fraction) -> float:
    significand, exponent = parts(value)
    return exponent + log2(significand)


def _smallest_positive(f: ElementFormat) -> Fraction:
    if isinstance(f, FloatFormat):
        return f.smallest
    return min(v for code in f.finite_codes if (v := Fraction(f.decode_exact(int(code)))) > 0)


def _count(f: ElementFormat) -> int:
    if not isinstance(f, FloatFormat):
        return len(f.finite_codes)
    positive = f.max_code + (not f.zero)
    return positive * (1 + f.signed) + f.zero


def _ulp_at_one(f: ElementFormat) -> Fraction | float:
    if not isinstance(f, FloatFormat):
        larger = sorted(v for code in f.finite_codes if (v := Fraction(f.decode_exact(int(code)))) >= 1)
        return larger[1] - 1 if len(larger) > 1 and larger[0] == 1 else float("nan")
    ulp = Fraction(2) ** (max(f.emin, 0) - f.mantissa_bits)
    both_there = all(f.smallest <= v <= f.largest and f.interval(v).low == v for v in (Fraction(1), 1 + ulp))
    return ulp if both_there else float("nan")
