"""The conformance matrix to read and to keep: one HTML page that needs nothing else, and the tables of docs/conformance.md.

A *judgement* is a report on one implementation, format and input dtype. The page has them all in one table, a cell a law; a
cell of a broken law leads to its smallest counterexample: the input as decimal, hex float, bits and rational, what came, what is
right, and the command that shows it again. The tables for docs/ say the same in a line a judgement. Both are made of certificates
alone, so that what is committed can be made again:

    python -m exmy.conformance docs/conformance.md benchmarks/results/conformance-cpu.json ...

In a page of ours, what stands between `<!-- generated: NAME -->` and `<!-- end -->` is replaced; NAME is laws, levels or matrix.
"""

from __future__ import annotations

import importlib.resources
import math
import re
import shlex
import sys
from collections.abc import Callable, Hashable, Iterable, Sequence
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import NamedTuple, TypeVar

import jinja2

from exmy.conformance_figure import conformance_figure
from exmy.version import __version__
from train.durable import atomically
from train.store import ENGINE
from verification import LAWS, Failure, Report, Verdict, matrix, read_certificates, write_certificates
from verification.blocks import OF_BLOCKS
from verification.certificates import USUAL, by_default, label
from verification.report import PROVES

PAGE, PICTURE, DATA, CERTIFICATES = "index.html", "matrix.png", "matrix.nc", "certificates.json"
DIGITS = {"float32": 8, "float64": 16, "bfloat16": 4, "float16": 4}
GLYPHS = {"pass": "✓", "fail": "✗", "not applicable": "·"}
SHORT = 60  # characters up to which a rational is written out, and a note is quoted in a table
GENERATED = re.compile(r"<!-- generated: (\S+) -->\n.*?<!-- end -->", re.DOTALL)
Key = TypeVar("Key", bound=Hashable)


class Cell(NamedTuple):
    """What became of a law: its class, for the eye, in words, and where its counterexample is."""

    verdict: str
    shown: str
    words: str
    anchor: str = ""


class Row(NamedTuple):
    """A judgement; span: rows that its format has from here on, 0 where an earlier one has it."""

    report: Report
    span: int
    cells: tuple[Cell, ...]


class Counterexample(NamedTuple):
    """A broken law, and all that helps to see it; facts are the input in every notation and the results, by heading."""

    anchor: str
    report: Report
    verdict: Verdict
    counts: str
    facts: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    block: str
    command: str


class Convention(NamedTuple):
    """What a format's conversion was found to do; input dtypes that are treated alike share one."""

    format: str
    dtypes: str
    level: str
    judged_by: str
    found: dict[str, str]


class Section(NamedTuple):
    """An implementation."""

    name: str
    anchor: str
    summary: str
    rows: tuple[Row, ...]
    conventions: tuple[Convention, ...]
    broken: tuple[Counterexample, ...]


def write_matrix(reports: Iterable[Report], folder: Path) -> list[Path]:
    """The page, the picture, the numbers as netCDF (`verification.matrix`) and the certificates, in that order, in `folder`.

    ValueError for no reports; OSError for a bad place. Each file is written whole or not at all.
    """
    listed = judgements(reports)
    data = matrix(listed)
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / name for name in (PAGE, PICTURE, DATA, CERTIFICATES)]
    write_page(listed, written[0])
    conformance_figure(matrix(by_default(listed)), written[1])
    # Made in memory first: the HDF5 library, writing to a disk that is full, can crash the process.
    large = {name: {"zlib": True} for name, variable in data.data_vars.items() if variable.ndim > 1}
    content = data.to_netcdf(engine=ENGINE, encoding=large)
    with atomically(written[2]) as aside:
        aside.write_bytes(content)
    write_certificates(listed, written[3])
    return written


def write_page(reports: Iterable[Report], path: Path) -> None:
    """The HTML page, whole or not at all. ValueError for no reports, OSError for a bad place."""
    page = render(reports)
    with atomically(path) as aside:
        aside.write_text(page, encoding="utf-8")


def render(reports: Iterable[Report]) -> str:
    """The whole page; of reports on the same implementation, format and dtype the last counts. ValueError for none."""
    listed = judgements(reports)
    template = importlib.resources.files("exmy").joinpath("conformance.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        judgements=len(listed),
        passed=sum(report.passed for report in listed),
        sections=[_section(f"i{i}", name, own) for i, (name, own) in enumerate(_alike(listed, label).items(), 1)],
        laws=LAWS,
        convention_names=list(dict.fromkeys(name for report in listed for name in report.conventions)),
        levels=list(dict.fromkeys((report.level, report.proves) for report in listed)),
        environments=_environments(listed),
        version=__version__,
    )


def judgements(reports: Iterable[Report]) -> list[Report]:
    """Each once, the last of equals; an implementation's together, and so a format's, in the order of their first."""
    listed = {(label(r), r.format, r.input_dtype): r for r in reports}
    if not listed:
        raise ValueError("no reports, so there is no matrix to show: judge something first, as `exmy verify` does")
    named = _alike(listed.values(), label).values()
    return [report for own in named for alike in _alike(own, lambda r: r.format).values() for report in alike]


def _alike(reports: Iterable[Report], key: Callable[[Report], Key]) -> dict[Key, list[Report]]:
    found: dict[Key, list[Report]] = {}
    for report in reports:
        found.setdefault(key(report), []).append(report)
    return found


def _section(anchor: str, name: str, own: list[Report]) -> Section:
    rows: list[Row] = []
    broken: list[Counterexample] = []
    for alike in _alike(own, lambda report: report.format).values():
        for place, report in enumerate(alike):
            anchors = {v.law: f"{anchor}-{len(rows) + 1}-{v.law}" for v in report.broken}
            rows.append(Row(report, 0 if place else len(alike), tuple(_cell(report, law, anchors) for law in LAWS)))
            broken += [_counterexample(report, v, anchors[v.law]) for v in report.broken]
    return Section(name, anchor, _kept(own), tuple(rows), tuple(_conventions(own)), tuple(broken))


def _cell(report: Report, law: str, anchors: dict[str, str]) -> Cell:
    verdict = next((v for v in report.laws if v.law == law), None)
    if verdict is None:
        return Cell("absent", "", "not asked")
    if verdict.verdict == "fail":
        return Cell("fail", f"{GLYPHS['fail']} {_short(verdict.failed)}", f"fail, {_counts(verdict)}", anchors[law])
    return Cell(verdict.verdict.replace(" ", "-"), GLYPHS[verdict.verdict], verdict.verdict)


def _short(count: int) -> str:
    """In at most four characters, rounded down: 999, 1.5k, 63k, 2G."""
    places = (len(str(count)) - 1) // 3
    tenths = 10 * count // 1000**places
    return f"{tenths / 10 if tenths < 100 else tenths // 10:g}{' kMGT'[places].strip()}"


def _counts(verdict: Verdict) -> str:
    unit = "blocks" if verdict.law in OF_BLOCKS else "inputs"
    return f"{verdict.failed:,} of {verdict.checked:,} {unit}"


def _counterexample(report: Report, verdict: Verdict, anchor: str) -> Counterexample:
    failure = verdict.smallest
    told = facts(failure, report.input_dtype) if failure else ()
    notes = tuple(note for note in (verdict.note, failure.note if failure else "") if note)
    block = repeats(failure.block) if failure else ""
    return Counterexample(anchor, report, verdict, _counts(verdict), told, notes, block, command(report))


def command(report: Report) -> str:
    """What judges the same again: every option that was asked for, and for a function of the user's how it is called."""
    asked = {"rounding": "found", **report.question}
    if asked["rounding"] == "found" and report.claimed != USUAL:
        asked["rounding"] = report.claimed
    decodes = report.input_dtype == "codes"
    given = ["--takes", "codes"] if decodes else ["--input", report.input_dtype]
    given += [] if report.level == "conditional" else ["--level", report.level]
    usual = {"rounding": "found", "overflow": "found", "zero": "found", "subnormals": "found", "rule": "found"}
    if ":" in report.implementation:
        asked["device"] = report.device
        usual |= {"takes": "codes" if decodes else "tensor", "gives": "values", "device": "cpu"}
    for option, word in usual.items():
        if asked.get(option, word) != word:
            given += [f"--{option}", asked[option]]
    for option, number in (("bias", 0.0), ("seconds", 60.0)):
        if float(asked.get(option, number)) != number:
            given += [f"--{option}", asked[option]]
    return shlex.join(["exmy", "verify", report.implementation, report.format, *given])


def facts(failure: Failure, dtype: str) -> tuple[tuple[str, str], ...]:
    """An input of that dtype in every notation, what became of it and what should, each by its heading."""
    exact, results = failure.exact, (("got", failure.got), ("expected", failure.expected))
    bits = f"{failure.input_bits:#0{DIGITS.get(dtype, 0) + 2}x}"
    told = [("input", repr(failure.input)), ("as hex float", failure.input.hex()), ("as bits", bits)]
    if exact is not None:
        told.append(("exactly", rational(exact)))
    if failure.decision_point:
        point = Fraction(failure.decision_point)
        told.append(("decision point", "the input itself" if point == exact else rational(point)))
    return (*told, *((name, repr(x) + (f" ({x.hex()})" if math.isfinite(x) else "")) for name, x in results))


def rational(value: Fraction) -> str:
    """Written out if that is short; and where it has a large power of two in it, as an odd integer times that."""
    written = str(value)
    odd, twos = value.numerator, 1 - value.denominator.bit_length()
    while odd and odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    if abs(twos) < 4 or odd * Fraction(2) ** twos != value:
        return written
    power = f"2^{twos}" if odd == 1 else f"{odd} × 2^{twos}"
    return f"{written} = {power}" if len(written) <= SHORT else power


def repeats(block: Sequence[float]) -> str:
    """Elements of a block in order; what repeats once, with how often."""
    counted = [(word, len(list(same))) for word, same in groupby(block, repr)]
    return ", ".join(f"{word} ({count} times)" if count > 1 else word for word, count in counted)


def _conventions(own: list[Report]) -> list[Convention]:
    merged = _alike(own, lambda r: (r.format, r.level, _judged_by(r), tuple(r.conventions.items())))
    return [
        Convention(name, ", ".join(r.input_dtype for r in alike), level, asked, dict(found))
        for (name, level, asked, found), alike in merged.items()
    ]


def _judged_by(report: Report) -> str:
    """Where that is not what was found, or there was nothing to find."""
    found = {name: report.conventions.get(name, "none") for name in report.asked}
    return ", ".join(f"{k} {word}" for k, word in report.asked.items() if found[k] not in (word, "none")) or "as found"


def _environments(listed: list[Report]) -> list[tuple[list[str], dict[str, str]]]:
    """Each once, with the implementations that were judged there."""
    found = _alike(listed, lambda report: tuple(report.environment.items()))
    return [(list(_alike(own, label)), dict(environment)) for environment, own in found.items()]


def _kept(own: list[Report]) -> str:
    by_format = _alike(own, lambda report: report.format).values()
    return f"{sum(all(r.passed for r in alike) for alike in by_format)} of {len(by_format)} formats keep every law"


def markdown(reports: Iterable[Report]) -> str:
    """How each implementation did; a table of each, a line a format and the input dtypes that did alike; then where.

    Of roundings that are not its users' default, the first table alone.
    """
    listed = judgements(reports)
    found = _alike(listed, label)
    shown = _alike(by_default(listed), label)
    overview = []
    for name, own in found.items():
        laws = [verdict.law for report in own for verdict in report.broken]
        counted = ", ".join(f"{law} ({laws.count(law)})" for law in LAWS if law in laws)
        overview.append((escaped(name), _kept(own).removesuffix(" formats keep every law"), counted))
    lines = _table(("implementation", "formats that keep every law", "laws broken (by how many judgements)"), overview)
    for name, own in shown.items():
        lines += ["", f"### {escaped(name)}", "", *_of_implementation(own)]
    lines += ["", "### Where", ""]
    for names, environment in _environments(listed):
        told = ", ".join(f"{key} {value}" for key, value in environment.items() if value)
        lines.append(f"- {escaped(', '.join(names))}: {escaped(told)}")
    return "\n".join(lines) + "\n"


def _of_implementation(own: list[Report]) -> list[str]:
    merged = _alike(own, lambda r: (r.format, r.level, _in_words(r), "; ".join(map(_brief, r.broken))))
    rows = [
        (escaped(name), ", ".join(r.input_dtype for r in alike), "**fail**" if broken else "pass", level, words, broken)
        for (name, level, words, broken), alike in merged.items()
    ]
    return _table(
        ("format", "input", "verdict", "level", "conventions", "laws broken, each with its smallest input"), rows
    )


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (headings, ["---"] * len(headings), *rows)]


def _brief(verdict: Verdict) -> str:
    words = f"{verdict.law} ({_counts(verdict)})"
    failure = verdict.smallest
    if failure is not None:
        return f"{words}: `{failure.input.hex()}` gives `{failure.got!r}`, not `{failure.expected!r}`"
    note = verdict.note if len(verdict.note) <= SHORT else verdict.note[:SHORT] + "…"
    return f"{words}: {escaped(note)}" if note else words


def _in_words(report: Report) -> str:
    before = {"infinity": "inf: ", "nan": "NaN: ", "zero": "zeros ", "subnormals": "subnormals ", "rule": "rule ",
              "zero_block": "block of zeros: "}  # fmt: skip
    return escaped(", ".join(before.get(name, "") + word for name, word in report.conventions.items()))


def escaped(text: str) -> str:
    """Text that Markdown, and the HTML and mathematics in it, leave as it is; "_" within words needs nothing."""
    return re.sub(r"([\\`*{}\[\]<>|#~$&]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", " ".join(text.split()))


def regenerated(page: str, reports: Sequence[Report]) -> str:
    """A page of ours with its generated parts made anew; without reports `matrix` stays as it is. ValueError for other parts."""
    laws = [(f"`{law.name}`", law.sentence, law.clause) for law in LAWS.values()]
    parts = {
        "laws": "\n".join(_table(("law", "says", "written in"), laws)) + "\n",
        "levels": "\n".join(_table(("level", "proves"), [(f"`{level}`", words) for level, words in PROVES.items()]))
        + "\n",
    }
    if reports:
        parts["matrix"] = markdown(reports)

    def make(found: re.Match[str]) -> str:
        if found[1] not in (*parts, "matrix"):
            raise ValueError(f"no generated part is called {found[1]!r}: there are laws, levels, matrix")
        return f"<!-- generated: {found[1]} -->\n{parts[found[1]]}<!-- end -->" if found[1] in parts else found[0]

    return GENERATED.sub(make, page)


def main(arguments: Sequence[str]) -> None:
    """Make the page named first anew, of the certificates after it; with any, the picture beside it too."""
    if not arguments:
        sys.exit("usage: python -m exmy.conformance PAGE.md [CERTIFICATE.json]...")
    page, *certificates = map(Path, arguments)
    try:
        reports = [report for path in certificates for report in read_certificates(path)]
        text = regenerated(page.read_text(encoding="utf-8"), reports)
        with atomically(page) as aside:
            aside.write_text(text, encoding="utf-8")
        if reports:
            conformance_figure(matrix(by_default(judgements(reports))), page.with_suffix(".png"))
    except (OSError, ValueError) as error:
        sys.stderr.write(f"exmy: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
