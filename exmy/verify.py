"""`exmy verify`: put an implementation before the judge, or all that are here, and show what it said."""

from __future__ import annotations

import hashlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from rich import box
from rich.console import Console, Group
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from exmy.console import output
from exmy.version import __version__
from formats import get_format, quantize
from formats.rounding import Rounding
from formats.scaled import ScaledFormat, is_scaled_name
from verification import Report, compare, read_certificates, verify, write_certificates
from verification.adapters import OURS, Adapter, adapters, fits, known, load_function
from verification.every_input import has_compiler
from verification.harness import check, strongest_level
from verification.points import CARRIERS
from verification.question import FOUND

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in CARRIERS}
OUR_NAME = "exmy"
WHOLE_CERTIFICATE = "exmy-certificate.json"
Asking = tuple[str, str, str, str, str]


@dataclass(frozen=True)
class Asked:
    """What the command line asks of every implementation; None for what each of them chooses."""

    dtype: str | None = None
    rounding: str = FOUND
    overflow: str = FOUND
    zero: str = FOUND
    subnormals: str = FOUND
    rule: str = FOUND
    level: str = "conditional"
    takes: str = "tensor"
    gives: str = "values"
    device: str = "cpu"
    seconds: float = 60.0
    bias: float = 0.0


@dataclass
class Request:
    """The command line: whom to judge, of which formats, and what to write and compare; `found` grows as judgements are made."""

    implementation: str | None
    formats: tuple[str, ...]
    asked: Asked
    certificate: Path | None = None
    against: Path | None = None
    matrix: Path | None = None
    certificates: tuple[Path, ...] = ()
    found: list[Report] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.is_whole and self.certificate is None:
            self.certificate = Path(WHOLE_CERTIFICATE)

    @property
    def is_whole(self) -> bool:
        """Whether it is the complete proof of our own."""
        return self.implementation is None and not self.formats and self.matrix is None

    @property
    def unfinished(self) -> Path | None:
        """Where a matrix keeps judgements when it is stopped, by what was asked of all; None without one, or without judging."""
        if self.matrix is None or self.certificates:
            return None
        asked = hashlib.sha256(f"{__version__} {torch.__version__} {self.asked}".encode()).hexdigest()[:8]
        return self.matrix / f"unfinished-{asked}.json.gz"

    def check(self) -> None:
        """ValueError or OSError, before any work, for what contradicts itself or could not be written."""
        if self.certificates and self.matrix is None:
            raise ValueError("--from is for --matrix: name the folder that the matrix goes to")
        if self.matrix is not None and (self.implementation or self.formats):
            raise ValueError(f"--matrix judges all that is here: leave {self.implementation or self.formats[0]} out")
        if self.certificate is not None and not self.certificate.parent.is_dir():
            raise FileNotFoundError(2, "no such folder", str(self.certificate.parent))
        if self.certificate is not None and not os.access(self.certificate.parent, os.W_OK):
            raise PermissionError(13, "can't be written", str(self.certificate))
        if self.matrix is not None:
            _check_options("--matrix", self.asked, "takes", "gives", "device")
            self.matrix.mkdir(parents=True, exist_ok=True)

    def kept(self) -> str:
        """Write the certificate of what was judged before a stop, and say so and how to go on."""
        again = shlex.join(["exmy", *sys.argv[1:]])
        place = self.unfinished or self.certificate
        if not self.found or place is None:
            return f"nothing was written. To start again: {again}"
        write_certificates(self.found, place)
        said = f"what {len(self.found)} judgements said is in {place}"
        return f"{said}{', and is not asked again. To go on' if self.unfinished else '. To start again'}: {again}"


def answer(request: Request) -> int:
    """Judge, write, show; the exit status. ValueError, in one line, for bad input, OSError for a bad place."""
    request.check()
    before = read_certificates(request.against) if request.against else []
    found = request.found
    if request.matrix is not None:
        from exmy.conformance import write_matrix

        listed = [] if request.certificates else everything(request.asked)
        found += [report for path in request.certificates for report in read_certificates(path)]
        if (kept := request.unfinished) is not None:
            known = {_asking(report): report for report in read_certificates(kept)} if kept.exists() else {}
            found.extend(reports(listed, _left_out, known))
        for path in write_matrix(found, request.matrix):
            click.echo(path)
        if kept is not None:
            kept.unlink(missing_ok=True)
    else:
        asked = request.asked
        listed = (
            complete(asked) if request.is_whole else jobs(request.implementation or OUR_NAME, request.formats, asked)
        )
        _check_jobs(listed, asked)
        for report in reports(listed):
            found.append(report)
    if request.certificate is not None:
        write_certificates(found, request.certificate)
    if request.matrix is None:
        output().print(view(found))
    if request.certificate is not None:
        click.echo(request.certificate)
    if request.against:
        click.echo("\n".join(compare(before, found)) or f"nothing differs from {request.against}")
    return 0 if request.matrix is not None or all(report.passed for report in found) else 1


def _check_jobs(listed: list[Job], asked: Asked) -> None:
    """ValueError, before the first is judged, for what one of them would be refused for; a word on those of a lower level."""
    if asked.rule != FOUND and not any(is_scaled_name(job.format) for job in listed):
        name = listed[0].format
        raise ValueError(
            f"--rule {asked.rule} is of scales, and {name} has none; leave it out, or name one such as mxfp4"
        )
    for job in listed:
        job.check()
    lower = [job for job in listed if job.asked.level != asked.level == "exhaustive"]
    if lower:
        kinds = dict.fromkeys("scaled formats" if is_scaled_name(j.format) else f"{j.dtype} inputs" for j in lower)
        click.echo(f"of {' and '.join(kinds)} all can't be asked: they are judged at level conditional", err=True)


def _check_options(name: str, asked: Asked, *options: str) -> None:
    """ValueError for options of MODULE:FUNCTION where a library is judged, which is called as it has to be."""
    for option in options:
        word = getattr(asked, option)
        if word != getattr(Asked, option):
            raise ValueError(f"--{option} {word} is for MODULE:FUNCTION, and {name} is none; leave it out")


def _left_out(job: Job, why: str) -> None:
    click.echo(f"left out: {job.implementation} {job.format} {job.dtype}: {why}", err=True)


@dataclass(frozen=True)
class Job:
    """One report to come: `make` gives the quantiser, when its turn comes."""

    implementation: str
    version: str
    format: str
    dtype: str
    claimed: str
    make: Callable[[], Callable[[Any], Any]]
    asked: Asked

    def run(self, progress: Callable[[float], None]) -> Report:
        """Judge. ValueError, in one line, for a library that can't be imported."""
        return verify(
            self.make(), **self._question, seconds=self.asked.seconds,
            name=self.implementation, version=self.version, progress=progress,
        )  # fmt: skip

    def check(self) -> None:
        """ValueError for what can't be judged."""
        check(**self._question)

    @property
    def _question(self) -> dict[str, Any]:
        a = self.asked
        return {
            "format": self.format, "rounding": a.rounding, "overflow": a.overflow, "input_dtype": DTYPES[self.dtype],
            "level": a.level, "zero": a.zero, "subnormals": a.subnormals,
            "rule": a.rule if is_scaled_name(self.format) else None, "claimed": self.claimed, "takes": a.takes,
            "gives": a.gives, "device": a.device, "bias": a.bias,
        }  # fmt: skip


def jobs(implementation: str, formats: tuple[str, ...], asked: Asked) -> list[Job]:
    """What there is to judge, in order. ValueError for names that mean nothing, before anything is judged."""
    for name in formats:
        get_format(name)
    if ":" in implementation:
        if not formats:
            raise ValueError(f"{implementation}: say which format it rounds to, by --format")
        function = load_function(implementation)
        claimed = asked.rounding if asked.rounding in {str(mode) for mode in Rounding} else Rounding.NEAREST_EVEN
        claimed = Rounding.NEAREST_EVEN if str(claimed).startswith("stochastic") else claimed
        dtype = asked.dtype or "float32"
        return [Job(implementation, "", name, dtype, str(claimed), lambda: function, asked) for name in formats]
    adapter = _adapter(implementation)
    _check_options(implementation, asked, "takes", "gives", "device")
    return _of_adapter(adapter, formats, asked)


def _adapter(name: str) -> Adapter:
    found = adapters()
    if name in found:
        return found[name]
    missing = {adapter.name: adapter for adapter in known()}
    if name in missing:
        needed = "a CUDA device" if missing[name].device == "cuda" else missing[name].package
        raise ValueError(f"{name}: needs {needed}, which is not here; here are {', '.join(found)}")
    if is_format(name):
        raise ValueError(f"{name} is a format: say first who is to be judged, as in exmy verify torch {name}")
    raise ValueError(f"{name}: neither {', '.join(found)} nor MODULE:FUNCTION")


def is_format(name: str) -> bool:
    """Whether a format has that name."""
    try:
        get_format(name)
    except ValueError:
        return False
    return True


def _of_adapter(adapter: Adapter, formats: tuple[str, ...], asked: Asked, every_rounding: bool = False) -> list[Job]:
    absent = [name for name in formats if name not in adapter.formats]
    if absent and adapter.package != OUR_NAME:
        raise ValueError(f"{adapter.name} has no {absent[0]}: it has {', '.join(adapter.formats)}")
    if asked.rounding != FOUND:
        _check_rounding(adapter, asked.rounding)
    found = []
    for name in formats or adapter.formats:
        offered = adapter.block_dtypes if is_scaled_name(name) else adapter.dtypes
        dtype = asked.dtype or offered[0]
        if dtype not in offered:
            if formats:
                raise ValueError(f"{adapter.name} is given {', '.join(offered)}, got {dtype}")
            continue
        if not formats and not is_scaled_name(name) and not fits(name, DTYPES[dtype]):
            continue
        roundings = (asked.rounding,) if asked.rounding != FOUND else adapter.roundings[:1]
        level = asked.level if formats else strongest_level(name, asked.level, DTYPES[dtype])
        own = replace(asked, level=level)
        for claimed in adapter.roundings if every_rounding else roundings:
            found.append(_job(adapter, name, dtype, claimed, own))
    if not found:
        raise ValueError(f"{adapter.name} is given {', '.join(adapter.dtypes)}, got {asked.dtype}")
    return found


def _check_rounding(adapter: Adapter, mode: str) -> None:
    if mode not in adapter.roundings:
        offered = ", ".join(adapter.roundings)
        raise ValueError(f"{adapter.name}: rounding must be found, or one that it offers ({offered}), got {mode!r}")


def _job(adapter: Adapter, name: str, dtype: str, claimed: str, asked: Asked) -> Job:
    takes = "array" if adapter.takes == "array" else "tensor"
    own = Asked(dtype, asked.rounding, asked.overflow, asked.zero, asked.subnormals, asked.rule, asked.level, takes,
                adapter.gives, adapter.device, asked.seconds, asked.bias)  # fmt: skip
    return Job(adapter.name, adapter.version, name, dtype, claimed, lambda: adapter.make(name, claimed), own)


def complete(asked: Asked) -> list[Job]:
    """The complete proof of our own quantiser: of its element formats all FP32, BF16 and FP16 inputs, compiled where that works;
    FP64 and scaled formats by points.
    """
    adapter = adapters()[OUR_NAME]
    _check_options(OUR_NAME, asked, "takes", "gives")
    if asked.level == "quick":
        raise ValueError(
            "the complete proof asks every input: for --level quick say who is to be judged, as in exmy verify exmy"
        )
    mode = adapter.roundings[0] if asked.rounding == FOUND else asked.rounding
    _check_rounding(adapter, mode)
    found = []
    for name in OURS:
        for dtype in ("bfloat16", "float16", "float32", "float64"):
            if not fits(name, DTYPES[dtype]):
                continue
            level = "conditional" if dtype == "float64" else "exhaustive"
            own = Asked(**{**vars(asked), "dtype": dtype, "level": level})
            compiled = dtype == "float32" and (own.device != "cpu" or has_compiler())
            make = partial(_compiled, name, mode) if compiled else partial(adapter.make, name, mode)
            found.append(Job(OUR_NAME, adapter.version, name, dtype, mode, make, own))
    scaled = [name for name in adapter.formats if isinstance(get_format(name), ScaledFormat)]
    for name in scaled:
        found.append(_job(adapter, name, "float32", mode, replace(asked, level=strongest_level(name, asked.level))))
    return found


def _compiled(name: str, rounding: str) -> Callable[[Any], Any]:
    torch._dynamo.reset()
    compiled: Callable[[Any], Any] = torch.compile(lambda x: quantize(x, name, rounding), dynamic=True)
    return compiled


def everything(asked: Asked) -> list[Job]:
    """All implementations that are here: every format, from every dtype by its users' rounding, from FP32 by every one."""
    found = []
    for adapter in adapters().values():
        for dtype in DTYPES:
            if dtype not in {*adapter.dtypes, *adapter.block_dtypes}:
                continue
            own = Asked(**{**vars(asked), "dtype": dtype})
            try:
                found += _of_adapter(adapter, (), own, every_rounding=dtype == "float32")
            except ValueError:  # none of its formats fits this dtype
                continue
    return found


def _asking(report: Report) -> Asking:
    """By which a report is found again for its job."""
    return report.implementation, report.version, report.format, report.input_dtype, report.claimed


def reports(
    listed: list[Job], skip: Callable[[Job, str], None] | None = None, known: Mapping[Asking, Report] | None = None
) -> Iterator[Report]:
    """One report a job, with progress. ValueError where a job can't be done, or, with `skip`, a word to it and on.

    known: reports that are there already, and are given as they are.
    """
    known = known or {}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task("", total=len(listed))
        for place, job in enumerate(listed):
            progress.update(task, description=f"{job.implementation} {job.format} {job.dtype}", completed=place)

            def show(share: float, place: int = place) -> None:
                progress.update(task, completed=place + share)

            if (there := known.get((job.implementation, job.version, job.format, job.dtype, job.claimed))) is not None:
                yield there
                continue
            try:
                yield job.run(show)
            except ValueError as error:
                if skip is None:
                    raise
                skip(job, str(error))


def view(found: list[Report]) -> Group:
    """A row a report: the verdict, what it was judged by, what the implementation does; then each broken law."""
    first = found[0]
    alike = len({(r.implementation, r.level) for r in found}) == 1
    name = f"{first.implementation} {first.version}".strip()
    title = f"{name}, level {first.level}: {first.proves}" if alike else None
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    headings = ["format", "input", "verdict", "inputs", "judged by", "conventions", "laws broken"]
    for heading in headings if alike else ["implementation", *headings]:
        table.add_column(heading, justify="right" if heading == "inputs" else "left", overflow="fold")
    for report in found:
        cells: list[str | Text] = [
            report.format, report.input_dtype,
            Text("pass", style="green") if report.passed else Text("FAIL", style="bold red"),
            f"{report.checked:,}", _judged_by(report), _conventions(report),
            ", ".join(f"{v.law} ({v.failed:,})" for v in report.broken),
        ]  # fmt: skip
        table.add_row(*(cells if alike else [report.implementation, *cells]))
    lines = [Text(f"{where(report, alike)} breaks {verdict}") for report in found for verdict in report.broken]
    return Group(table, *lines)


def where(report: Report, alike: bool) -> str:
    """What a line is about."""
    words = [report.format, f"from {report.input_dtype}"]
    return " ".join(words if alike else [report.implementation, *words])


def _judged_by(report: Report) -> str:
    words = [report.rounding, report.overflow]
    return ", ".join([*([report.asked["rule"]] if "rule" in report.asked else []), *words])


def _conventions(report: Report) -> str:
    """Those that the judgement does not name already."""
    names = {"nan": "NaN", "zero": "zero", "subnormals": "subnormals", "infinity": "inf", "zero_block": "zero block"}
    return ", ".join(f"{names[n]} {word}" for n, word in report.conventions.items() if n in names and word != "none")
