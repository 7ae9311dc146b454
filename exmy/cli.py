"""The command line. Heavy imports wait inside the commands, so that --help is quick.

Exit status 0: done, and what was asked holds. 1: done, and it does not hold. 2: bad input, or the work could not go
on, with one line that says what and how to mend it. 130, 143: ended by SIGINT, SIGTERM. Diverged runs are results, not errors.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exmy.refused import Refused
from exmy.stability_commands import COMMANDS
from exmy.version import __version__

if TYPE_CHECKING:
    from formats.names import Kind

INTERRUPTED = 130


class _Echo(logging.Handler):
    """Log lines by way of click, which finds the standard error of the moment: above the progress bar while there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """One line."""
        click.echo(self.format(record), err=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="exmy")
def main() -> None:
    """Is this number format safe to train a language model in? Ask, with evidence."""
    # Before torch is loaded. Its CPU threads wait for each other by spinning; where something else wants a core, that costs
    # 3 to 10 times the step (measured on two cores), and sleeping soon costs a quarter where nothing does.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[_Echo()])
    for noisy in ("torch", "matplotlib", "h5py"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.captureWarnings(capture=True)


for _command in COMMANDS:
    main.add_command(_command)


_device = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where to train."
)


def _site(command: Callable[..., None]) -> Callable[..., None]:
    """Where packs are trained: options of `sweep` and `resume`, which `run_study` takes by these names."""
    for option in (
        click.option("--ray-address", metavar="HOST:PORT", help="A Ray cluster; without it, one is started here."),
        click.option("--workers", metavar="N", type=click.IntRange(min=1), help="Packs at once; one a GPU by default."),
        click.option(
            "--executor", type=click.Choice(["local", "ray"]), default="local", show_default=True,
            help="This machine's GPUs, or a Ray cluster's.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


def _place(context: click.Context, parameter: click.Parameter, value: str | None) -> Path | str | None:  # noqa: ARG001
    """A path, or a URL as it is."""
    return Path(value) if value is not None and "://" not in value else value


def _hooked(command: Any) -> Any:
    """The options of what else is told of a study, off by default."""
    files = click.option("--tensorboard", is_flag=True, help="Event files in DIR/tensorboard; needs exmy[tensorboard].")
    project = click.option("--wandb", metavar="PROJECT", help="Log to Weights & Biases; needs exmy[wandb].")
    return files(project(command))


_wide = click.option(
    "--wide",
    type=click.Choice(["ddp", "fsdp"]),
    help="Under torchrun: one run on all ranks, weights whole or in parts; ddp.",
)


@main.command()
@click.argument("study_file", metavar="[STUDY.toml]", required=False, type=click.Path(path_type=Path))
@click.option(
    "--out",
    metavar="DIR",
    callback=_place,
    help="Study directory; runs/NAME by default. With --executor ray, a URL too.",
)
@click.option(
    "--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Change the study: training.steps=500, seed=4, ..."
)
@_device
@_site
@_wide
@click.option(
    "--strategy",
    type=click.Choice(["grid", "bisect", "seeds"]),
    help="Which runs: all of the file (grid); the largest stable learning rate of each recipe (bisect); seeds in planned looks.",
)
@click.option("--dry-run", is_flag=True, help="Show the plan, the memory and the time that it needs; train nothing.")
@_hooked
def sweep(
    study_file: Path | None, out: Path | str | None, overrides: tuple[str, ...], device: str, strategy: str | None,
    *, dry_run: bool, **how: Any,
) -> None:  # fmt: skip
    """Train every run of a study, and say which diverged.

    Without STUDY.toml: a first look, a few minutes long, chosen for this machine. Started again on the same directory,
    it trains only the runs that are missing, and goes on in the middle of those that were under way.

    \b
    Example: exmy sweep mine.toml --out runs/mine --set seed=16
    Example: exmy sweep mine.toml --dry-run
    Example: exmy sweep mine.toml --executor ray --ray-address auto --out s3://bucket/mine
    Example: exmy sweep mine.toml --strategy bisect
    Example: torchrun --nproc-per-node 2 -m exmy sweep mine.toml --wide ddp
    """  # noqa: D301
    from exmy.sweep import default_study, dry_run_view, run_sweep
    from train import read_study

    with _sweeping():
        changes = [*overrides, *([f'strategy.kind="{strategy}"'] if strategy else [])]
        study = read_study(study_file or default_study(device), changes)
        if dry_run:
            dry_run_view(study, out or Path("runs") / study.name, device, how["workers"])
            return
        run_sweep(study, out or Path("runs") / study.name, device, **how)


@main.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@_device
@_site
@_wide
@_hooked
def resume(directory: Path, device: str, **how: Any) -> None:
    """Go on with the study in DIR, after Ctrl-C, a kill or a power cut: `exmy sweep DIR/study.toml --out DIR`.

    What is finished stays, once it was held against its checksum, and a pack that was under way goes on from its last checkpoint,
    with the bits that it would have had.

    \b
    Example: exmy resume runs/first-look-cpu
    """  # noqa: D301
    from exmy.sweep import run_sweep
    from train.store import study_of

    with _sweeping():
        run_sweep(study_of(directory), directory, device, check=True, **how)


@contextlib.contextmanager
def _sweeping() -> Iterator[None]:
    """A sweep that is refused says why in one line, one that a signal ended how to go on."""
    from train import StudyError
    from train.interruption import KEPT, Interrupted

    try:
        yield
    except StudyError as error:
        raise Refused(str(error)) from None
    except KeyboardInterrupt as stop:
        again = shlex.join(["exmy", *sys.argv[1:]])  # quoted, so that it may be pasted
        click.echo(f"\nexmy: stopped; {str(stop) or KEPT}. To go on: {again}", err=True)
        sys.exit(128 + (stop.number if isinstance(stop, Interrupted) else signal.SIGINT))


@main.command()
@click.argument("directories", metavar="DIR...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A new directory for the merged study.")
@click.option("--name", help="The merged study's name; the first one's by default.")
def merge(directories: tuple[Path, ...], out: Path, name: str | None) -> None:
    """Make one study of several of the same design, trained on several machines: of other seeds, recipes or rates.

    Packs are copied, and checked on the way. What the axes of all multiply out to and nobody trained, a sweep into --out trains.

    \b
    Example: exmy merge runs/seeds-0-7 runs/seeds-8-15 --out runs/all
    """  # noqa: D301
    from train import StudyError, merge_studies

    try:
        merged = merge_studies(directories, out, name)
    except StudyError as error:
        raise Refused(str(error)) from None
    planned = sum(1 for _ in merged.study.runs())
    click.echo(
        f"{out}: {merged.runs} of {planned} runs in {merged.packs} packs; {merged.left_out} packs had nothing new"
    )
    if merged.runs < planned:
        click.echo(f"To train the others: {shlex.join(['exmy', 'resume', str(out)])}")


@main.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="For machines; the fields are described in train/status.py.")
def status(directory: Path, as_json: bool) -> None:
    """What a study directory holds, and what is under way in it: during a sweep, from another shell, and after.

    A sweep that was killed is "stale": its last sign of life is told. Exit status 0 whatever the state is, 2 where DIR holds no
    study.

    \b
    Example: exmy status runs/first-look-cpu
    Example: exmy status runs/first-look-cpu --json
    """  # noqa: D301
    import json

    from exmy.console import output
    from exmy.status import LATEST, status_view
    from train import StudyError, study_status

    try:
        found = study_status(directory, latest=None if as_json else LATEST)
    except StudyError as error:
        raise Refused(str(error)) from None
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    console = output()
    for part in status_view(found):
        console.print(part)


@main.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--zarr", metavar="OUT", type=click.Path(path_type=Path), help="A Zarr store, for xarray, dask and others."
)
@click.option("--netcdf", metavar="OUT.nc", type=click.Path(path_type=Path), help="One netCDF-4 file.")
@click.option("--force", is_flag=True, help="Replace what is there.")
def export(directory: Path, zarr: Path | None, netcdf: Path | None, *, force: bool) -> None:
    """Write a study as one Zarr store or netCDF file, in bounded memory; xarray.open_datatree(OUT, engine="zarr") opens it.

    \b
    Example: exmy export runs/mine --zarr mine.zarr
    Example: exmy export runs/mine --netcdf mine.nc
    """  # noqa: D301
    if zarr is None and netcdf is None:
        raise click.UsageError("name what to write: --zarr OUT, --netcdf OUT.nc or both")
    from exmy.export import export_study
    from train import StudyError

    try:
        written = export_study(directory, zarr, netcdf, force=force)
    except StudyError as error:
        raise Refused(str(error)) from None
    for path in written:
        click.echo(path)


@main.group()
def data() -> None:
    """Texts to train on: which there are, and fetch them."""


@data.command("list")
def list_texts() -> None:
    """The texts that exmy knows: source, version, licence, size, hash, and what is on this machine.

    \b
    Example: exmy data list
    """  # noqa: D301
    from exmy.console import output
    from exmy.data import text_table
    from train.cache import cache_folder

    try:
        output().print(text_table(cache_folder()))
    except RuntimeError as error:
        raise Refused(f"no cache folder ({error}): set EXMY_CACHE") from None


@data.command("fetch")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.option("--tokenizer", default="bytes", show_default=True, help="bytes, bpe-4096, bpe-16384 or gpt2.")
def fetch_texts(names: tuple[str, ...], tokenizer: str) -> None:
    """Download texts into the cache and tokenise them, so that a sweep needs no network.

    NAME is a text of `exmy data list`, or the path of a file or folder of one's own. Nothing is installed.

    \b
    Example: exmy data fetch english maths
    Example: exmy data fetch english --tokenizer bpe-4096
    """  # noqa: D301
    from exmy.data import fetch

    for name in names:
        try:
            click.echo(fetch(name, tokenizer))
        except (ValueError, RuntimeError) as error:
            raise Refused(str(error)) from None


@main.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--out", metavar="FOLDER", type=click.Path(path_type=Path), help="Where to write; DIR/report by default.")
def report(directory: Path, out: Path | None) -> None:
    """Write a study up as one HTML page that needs no network and no other file, and its figure as a PNG beside it.

    Also while the study is under way: the page shows the runs that are finished.

    \b
    Example: exmy report runs/first-look-cpu
    """  # noqa: D301
    from exmy.report import write_report
    from train import StudyError

    try:
        written = write_report(directory, out or directory / "report")
    except StudyError as error:
        raise Refused(str(error)) from None
    for path in written:
        click.echo(path)


@main.command("landscape")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--measure", "measures", metavar="NAME", multiple=True, help="One of them, or several; [probe]'s by default."
)
@click.option("--run", "runs", metavar="RUNS", multiple=True, help='A recipe, or "e4m3, seed=0"; all by default.')
@click.option(
    "--quantisers", type=click.Choice(["on", "off", "finite-difference"]),
    help="Of the loss as the run rounds it, or without; [probe]'s by default.",
)  # fmt: skip
@click.option(
    "--epsilon", "epsilons", metavar="E", type=float, multiple=True, help="Half-widths of boxes; [probe]'s by default."
)
@_device
def landscape_command(
    directory: Path,
    measures: tuple[str, ...],
    runs: tuple[str, ...],
    quantisers: Any,
    epsilons: tuple[float, ...],
    device: str,
) -> None:
    """Measure how sharp the loss is at the weights that a study has kept: its snapshots, and the packs under way.

    Adds to DIR/landscape and touches nothing else. Stopped and started again, it measures what is missing. docs/landscape.md says
    what each measure is, and what it costs.

    \b
    Example: exmy landscape runs/mine
    Example: exmy landscape runs/mine --measure hessian_eigenvalue --measure sam_sharpness --run "e4m3, seed=0"
    Example: exmy landscape runs/mine --quantisers off
    Example: exmy landscape runs/mine --measure logit_sharpness --epsilon 2e-3 --epsilon 5e-3
    """  # noqa: D301
    from exmy.landscape import run_landscape
    from train import StudyError

    try:
        done = run_landscape(directory, measures, runs, quantisers, device, epsilons)
    except StudyError as error:
        raise Refused(str(error)) from None
    except KeyboardInterrupt:
        again = shlex.join(["exmy", *sys.argv[1:]])
        click.echo(f"\nexmy: stopped; what was measured is kept. To go on: {again}", err=True)
        sys.exit(INTERRUPTED)
    if done.failed:
        raise Refused(f"{directory}: {done.failed} values could not be measured; the lines above say why")


@main.command("compare")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--baseline", metavar="RECIPE", help="What the others are held against; the study's own by default.")
@click.option("--page", metavar="FILE.md", type=click.Path(path_type=Path), help="Write it up in Markdown.")
@click.option("--figure", metavar="FILE.png", type=click.Path(path_type=Path), help="Draw the differences.")
@click.option(
    "--json", "json_file", metavar="FILE.json", type=click.Path(path_type=Path), help="Every number, for machines."
)
def compare_recipes(
    directory: Path, baseline: str | None, page: Path | None, figure: Path | None, json_file: Path | None
) -> None:
    """What each recipe of a study costs against the baseline: differences of final losses, paired by seed, with 95 % intervals.

    Also while the study is under way: what is missing is said.

    \b
    Example: exmy compare runs/first-look-cpu
    Example: exmy compare runs/mine --baseline e8m7 --page mine.md --figure mine.png
    """  # noqa: D301
    from exmy.compare import run_compare
    from train import StudyError

    try:
        run_compare(directory, baseline, page, figure, json_file)
    except StudyError as error:
        raise Refused(str(error)) from None


@main.group()
def recipes() -> None:
    """Look training recipes up: what is rounded, where, and after whom."""


@recipes.command("list")
def list_recipes() -> None:
    """The named recipes, each with the sentence that it follows.

    \b
    Example: exmy recipes list
    """  # noqa: D301
    from exmy.console import output
    from exmy.recipes import recipe_list

    output().print(recipe_list())


@recipes.command("show")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.option(
    "--study", metavar="STUDY.toml", type=click.Path(path_type=Path), help="A study whose [recipes] count too."
)
def show_recipes(names: tuple[str, ...], study: Path | None) -> None:
    """All that a recipe does: each operand of each product in each place, what is rounded elsewhere, what the optimiser keeps.

    \b
    Example: exmy recipes show nvfp4 masked-e8m3
    Example: exmy recipes show careful-fp8 --study my.toml
    """  # noqa: D301
    from exmy.console import output
    from exmy.recipes import recipe_sheet, tables_of
    from train import StudyError

    try:
        tables = tables_of(study)
        sheets = [list(recipe_sheet(name, tables)) for name in names]
    except (StudyError, ValueError) as error:
        raise Refused(str(error)) from None
    console = output()
    for sheet in sheets:
        for part in sheet:
            console.print(part)


@main.group()
def formats() -> None:
    """Look number formats up."""


@formats.command("list")
@click.option("--all", "every", is_flag=True, help="Every name that needs no further parameters, one a line.")
@click.option(
    "--kind", type=click.Choice(["float", "integer", "list", "scaled"]), help="With --all: formats of this kind alone."
)
def list_command(every: bool, kind: Kind | None) -> None:
    """The well-known formats with their limits, and the grammar of all others.

    \b
    Example: exmy formats list
    Example: exmy formats list --all --kind integer
    """  # noqa: D301
    from exmy.console import output
    from exmy.datasheets import format_table
    from formats import list_formats

    if every or kind:
        click.echo("\n".join(list_formats(kind)))
    else:
        output().print(format_table())


@formats.command("show")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
def show_command(names: tuple[str, ...]) -> None:
    """A datasheet: bit layout, limits, special codes, what it is easily confused with and, up to 8 bits, every value.

    \b
    Example: exmy formats show e4m3fn e4m3
    Example: exmy formats show nvfp4 binary8p3se int8 posit8
    """  # noqa: D301
    from exmy.console import output
    from exmy.datasheets import format_sheet
    from formats import get_format

    try:
        described = [get_format(name) for name in names]
    except ValueError as error:
        raise Refused(str(error)) from None
    console = output()
    for f in described:
        console.print(format_sheet(f, console.width))


@formats.command("compare")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
def compare_command(a: str, b: str) -> None:
    """Two formats beside each other: limits, special codes, and which values one has and the other lacks.

    \b
    Example: exmy formats compare e4m3fn e4m3
    Example: exmy formats compare e2m1fn nf4
    """  # noqa: D301
    from exmy.console import output
    from exmy.datasheets import comparison
    from formats import element_format

    try:
        described = element_format(a), element_format(b)
    except ValueError as error:
        raise Refused(str(error)) from None
    output().print(comparison(*described))


@formats.command("plot")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.option(
    "--out", metavar="FILE", type=click.Path(path_type=Path), default=Path("formats.png"), show_default=True,
    help="The picture: .png, .svg or .pdf.",
)  # fmt: skip
def plot_command(names: tuple[str, ...], out: Path) -> None:
    """Draw formats beside each other: their values, the ulp and the largest relative rounding error against magnitude.

    \b
    Example: exmy formats plot e4m3fn e5m2 bf16 --out fp8.svg
    Example: exmy formats plot e2m1fn nf4 int4
    """  # noqa: D301
    from exmy.grids import grids_figure
    from formats import element_format

    try:
        grids_figure([element_format(name) for name in dict.fromkeys(names)], out)
    except ValueError as error:
        raise Refused(str(error)) from None
    except OSError as error:
        raise Refused(f"{out}: can't be written ({error.strerror}); name another file with --out") from None
    click.echo(out)


@main.command()
@click.argument("implementation", metavar="[IMPLEMENTATION]", required=False)
@click.argument("formats", metavar="[FORMAT]...", nargs=-1)
@click.option("--format", "more", metavar="FORMAT", multiple=True, help="The same, as an option.")
@click.option(
    "--input",
    "dtype",
    type=click.Choice(["float32", "float64", "bfloat16", "float16"]),
    help="What it is given; float32 where it takes that.",
)
@click.option(
    "--rounding", default="found", show_default=True, help="What it is judged by, or stochastic; the one it has."
)
@click.option("--overflow", default="found", show_default=True, help="What it is judged by: a mode, or the one it has.")
@click.option("--zero", default="found", show_default=True, help="signed, unsigned, or what it does.")
@click.option("--subnormals", default="found", show_default=True, help="kept, flushed, flushed_early, or what it does.")
@click.option("--rule", default="found", show_default=True, help="Of scales: floor, ceil, rceil, nearest, even, amax.")
@click.option(
    "--level",
    type=click.Choice(["quick", "conditional", "exhaustive"]),
    default="conditional",
    show_default=True,
    help="How much is proved; exhaustive takes half a minute a format.",
)
@click.option(
    "--takes", type=click.Choice(["tensor", "array", "codes"]), default="tensor", help="What MODULE:FUNCTION is given."
)
@click.option("--gives", type=click.Choice(["values", "codes"]), default="values", help="What MODULE:FUNCTION gives.")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="Where MODULE:FUNCTION is given tensors."
)
@click.option("--bias", default=0.0, help="Allowed to stochastic rounding: 2^-N for N random bits.")
@click.option(
    "--seconds", default=60.0, show_default=True, help="How long one call may take before it counts as hanging."
)
@click.option(
    "--json", "certificate", metavar="FILE", type=click.Path(path_type=Path), help="Write the certificate too."
)
@click.option(
    "--against", metavar="FILE", type=click.Path(path_type=Path), help="Say what differs from an earlier certificate."
)
@click.option(
    "--matrix",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="Judge all that is here, and write the table as a page, a picture, a dataset and certificates.",
)
@click.option(
    "--from",
    "certificates",
    metavar="FILE",
    multiple=True,
    type=click.Path(path_type=Path),
    help="With --matrix: of these certificates, and judge nothing.",
)
def verify(
    implementation: str | None, formats: tuple[str, ...], more: tuple[str, ...], certificate: Path | None,
    against: Path | None, matrix: Path | None, certificates: tuple[Path, ...], **asked: Any,
) -> None:  # fmt: skip
    """Judge a quantiser by the laws of its format, and show the smallest input that breaks each.

    IMPLEMENTATION is exmy (our own), a library that is installed (torch, torch-compiled, torch-cuda, ml_dtypes, gfloat, pychop,
    qtorch, torchao, ...), or MODULE:FUNCTION, from tensor to tensor. First it is found out what it does where standards leave a
    choice, and it is judged by that, unless options say by what. Without IMPLEMENTATION: the complete proof of our own, all 2^32
    FP32 inputs of 17 formats and more, about ten minutes on two cores; its certificate is exmy-certificate.json. Exit status 0
    if every law is kept, 1 if one is broken, 2 for bad input.

    \b
    Example: exmy verify torch e4m3fn e5m2 --input float64
    Example: exmy verify ml_dtypes
    Example: exmy verify mypackage.kernels:to_fp8 --format e4m3fn --input float32 --overflow saturate
    Example: exmy verify --matrix conformance
    """  # noqa: D301
    from exmy.verify import Asked, Request, answer

    sys.path.insert(0, str(Path.cwd()))  # MODULE may be the user's own, beside which they stand
    request = Request(implementation, (*formats, *more), Asked(**asked), certificate, against, matrix, certificates)
    try:
        sys.exit(answer(request))
    except ValueError as error:
        raise Refused(str(error)) from None
    except OSError as error:
        raise Refused(f"{error.filename or certificate}: {error.strerror}; name another place") from None
    except KeyboardInterrupt:
        kept = request.kept()
        click.echo(f"\nexmy: stopped; {kept or 'nothing was written'}", err=True)
        sys.exit(INTERRUPTED)


@main.command()
@click.argument("name", metavar="NAME")
@click.option(
    "--from", "input_format", metavar="FORMAT", default="fp32", show_default=True, help="Format of the inputs."
)
@click.option(
    "--rounding", "roundings", multiple=True, help="One of them, or several; all deterministic ones by default."
)
@click.option(
    "--overflow", "overflows", multiple=True, help="One of them, or several; all that NAME has a use for by default."
)
@click.option(
    "--every", is_flag=True, help="All inputs, where they have at most 16 bits; of at most 8 bits it is always all."
)
@click.option("--decode", is_flag=True, help="The other way: the value of each code, in bits of FP32 (or FP64).")
@click.option("--as", "file_format", type=click.Choice(["csv", "hex"]), help="By the suffix of --out, else csv.")
@click.option("--out", metavar="FILE", type=click.Path(path_type=Path), help="Standard output by default.")
def vectors(
    name: str, input_format: str, roundings: tuple[str, ...], overflows: tuple[str, ...], every: bool, decode: bool,
    file_format: str | None, out: Path | None,
) -> None:  # fmt: skip
    """Test vectors for RTL and C++ benches: input bits, rounding, overflow, expected code, by exact rationals.

    Complete for inputs of at most 8 bits; for wider ones the decision points: both sides of every value and of every point
    between two values, where a monotone quantiser can go wrong. CSV has a heading; hex is for $readmemh, with its fields
    explained in comments.

    \b
    Example: exmy vectors e4m3fn --from bf16 --rounding nearest_even --out e4m3fn.hex
    Example: exmy vectors e2m1fn --from e5m2 > all.csv
    Example: exmy vectors e4m3fn --decode
    """  # noqa: D301
    from exmy.vectors import write_vectors

    try:
        count = write_vectors(
            name, input_format, roundings, overflows, every=every, decode=decode, file_format=file_format, out=out
        )
    except ValueError as error:
        raise Refused(str(error)) from None
    except BrokenPipeError:
        raise  # a reader that has seen enough, as head has
    except OSError as error:
        raise Refused(
            f"{out or 'standard output'}: can't be written ({error.strerror}); name another file with --out"
        ) from None
    except KeyboardInterrupt:
        click.echo("\nexmy: stopped; nothing was written", err=True)
        sys.exit(INTERRUPTED)
    if out is not None:
        click.echo(f"{out}: {count:,} vectors")
