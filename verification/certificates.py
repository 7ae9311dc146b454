"""Certificates together: one dataset of many reports, files of them, and what differs between two.

A certificate file is a JSON list of reports (`Report.to_dict`). Libraries, versions and machines are compared by putting their
reports into one dataset, or two files against each other.
"""

from __future__ import annotations

import gzip
import json
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import xarray as xr

from verification.laws import LAWS
from verification.report import Report

ABSENT, PACKED = "", ".gz"
USUAL = "nearest_even"
VERDICTS = ("pass", "fail", "not applicable")


def label(report: Report) -> str:
    """An implementation as a row of the matrix: its name, its version, its rounding, and where it ran if that was no CPU."""
    words = [report.implementation, report.version, "" if report.claimed == USUAL else report.claimed]
    if report.device != "cpu":
        words.append(f"on {report.environment['device'].removeprefix('NVIDIA ')}")
    return " ".join(word for word in words if word)


def by_default(reports: Iterable[Report]) -> list[Report]:
    """Without those of roundings that an implementation offers besides the one that it was judged by first."""
    listed = list(reports)
    first = {(r.implementation, r.version): r.claimed for r in reversed(listed)}
    return [r for r in listed if r.claimed == first[r.implementation, r.version]]


def matrix(reports: Iterable[Report]) -> xr.Dataset:
    """verdict, checked, failed and counterexample on (implementation, format, input_dtype, law); the last of equals counts.

    verdict is "pass", "fail", "not applicable", or empty where nothing was asked; counts are int64, 0 there. Conventions are
    variables convention_NAME on (implementation, format, input_dtype), and so are level, checked_inputs and failed_inputs;
    where each implementation ran is environment_NAME on (implementation).
    """
    listed = list(reports)
    names = list(dict.fromkeys(label(r) for r in listed))
    formats = list(dict.fromkeys(r.format for r in listed))
    dtypes = list(dict.fromkeys(r.input_dtype for r in listed))
    laws = list(LAWS)
    shape = (len(names), len(formats), len(dtypes))
    verdicts = np.full((*shape, len(laws)), ABSENT, dtype=object)
    examples = np.full((*shape, len(laws)), ABSENT, dtype=object)
    counted = {name: np.zeros((*shape, len(laws)), np.int64) for name in ("checked", "failed")}
    inputs = {name: np.zeros(shape, np.int64) for name in ("checked_inputs", "failed_inputs")}
    conventions = sorted({f"convention_{name}" for r in listed for name in r.conventions})
    words = {name: np.full(shape, ABSENT, dtype=object) for name in ("level", *conventions, "rounding", "overflow")}
    kept = sorted({name for r in listed for name in r.environment})
    environments = {name: np.full(len(names), ABSENT, dtype=object) for name in kept}
    for r in listed:
        at = names.index(label(r)), formats.index(r.format), dtypes.index(r.input_dtype)
        for v in r.laws:
            place = (*at, laws.index(v.law))
            verdicts[place], examples[place] = v.verdict, str(v.smallest or v.note)
            counted["checked"][place], counted["failed"][place] = v.checked, v.failed
        inputs["checked_inputs"][at], inputs["failed_inputs"][at] = r.checked, r.failure_count
        words["level"][at], words["rounding"][at], words["overflow"][at] = r.level, r.rounding, r.overflow
        for name, word in r.conventions.items():
            words[f"convention_{name}"][at] = word
        for name, word in r.environment.items():
            environments[name][at[0]] = word
    dims = ("implementation", "format", "input_dtype")
    longer = {"checked": "inputs that the law was held against", "failed": "inputs that break the law",
              "checked_inputs": "inputs asked", "failed_inputs": "inputs that came out wrong"}  # fmt: skip
    return xr.Dataset(
        {
            "verdict": ((*dims, "law"), verdicts.astype(str), {"long_name": "verdict", "flag_values": ", ".join(VERDICTS)}),
            "counterexample": ((*dims, "law"), examples.astype(str), {"long_name": "smallest counterexample"}),
            **{n: ((*dims, "law"), a, {"long_name": longer[n], "units": "1"}) for n, a in counted.items()},
            **{n: (dims, a, {"long_name": longer[n], "units": "1"}) for n, a in inputs.items()},
            **{n: (dims, a.astype(str)) for n, a in words.items()},
            **{f"environment_{n}": ("implementation", a.astype(str)) for n, a in environments.items()},
        },
        {
            "implementation": names, "format": formats, "input_dtype": dtypes, "law": laws,
            "sentence": ("law", [LAWS[law].sentence for law in laws]), "clause": ("law", [LAWS[law].clause for law in laws]),
        },
        {"source": "verification.verify: every result against exact values by mpmath"},
    )  # fmt: skip


def write_certificates(reports: Sequence[Report], path: str | Path) -> None:
    """All reports as one JSON file, gzipped if its name ends in .gz; whole or not at all. OSError for a bad place."""
    path = Path(path)
    content = (json.dumps([r.to_dict() for r in reports], indent=1) + "\n").encode()
    content = gzip.compress(content, mtime=0) if path.suffix == PACKED else content
    if path.exists() and not path.is_file():  # a device or a pipe, which a renamed file would take the place of
        path.write_bytes(content)
        return
    path = path.resolve()
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")  # no file of anyone's
    try:
        aside.write_bytes(content)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def read_certificates(path: str | Path) -> list[Report]:
    """The reports of a file. ValueError, naming it, for one that holds none; OSError where there is no file."""
    content = Path(path).read_bytes()
    try:
        rows = json.loads(gzip.decompress(content) if Path(path).suffix == PACKED else content)
        if not isinstance(rows, list):
            raise TypeError("no list of reports")
        return [Report.from_dict(row) for row in rows]
    except (ValueError, KeyError, TypeError, AttributeError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is no certificate: {type(error).__name__}: {error}") from None


def compare(before: Iterable[Report], after: Iterable[Report]) -> list[str]:
    """What differs, a sentence each: laws and conventions of what both judged, by implementation, format and input dtype."""
    old = {_identity(r): r for r in before}
    found = []
    for new in after:
        was = old.get(_identity(new))
        if was is None:
            continue
        where = " ".join(_identity(new))
        for v in new.laws:
            earlier = next((w for w in was.laws if w.law == v.law), None)
            if earlier is not None and (earlier.verdict, earlier.failed) != (v.verdict, v.failed):
                example = f"; {v.smallest}" if v.smallest else ""
                found.append(
                    f"{where}: {v.law}: {_words(earlier.verdict, earlier.failed)}, now {_words(v.verdict, v.failed)}{example}"
                )
        for name in sorted({*was.conventions, *new.conventions}):
            a, b = was.conventions.get(name, "unknown"), new.conventions.get(name, "unknown")
            if a != b:
                found.append(f"{where}: {name}: {a}, now {b}")
    return found


def _identity(r: Report) -> tuple[str, ...]:
    return r.implementation, r.format, r.input_dtype, r.claimed


def _words(verdict: str, failed: int) -> str:
    return f"{verdict} ({failed:,})" if failed else verdict
