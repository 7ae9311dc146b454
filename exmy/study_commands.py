"""Commands about a study directory: `exmy status`, `report`, `compare`, `landscape`, `merge` and `export`.

Heavy imports wait inside, as in `cli`.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from exmy.needed import check_packages
from exmy.places import FileToWrite, study_directories, study_directory
from exmy.refused import INTERRUPTED, Refused
from exmy.sweep_commands import device_option


@click.command()
@study_directories()
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


@click.command()
@study_directory
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


@click.command()
@study_directory
@click.option(
    "--zarr", metavar="OUT", type=click.Path(path_type=Path), help="A Zarr store, for xarray, dask and others."
)
@click.option("--netcdf", metavar="OUT.nc", type=click.Path(path_type=Path), help="One netCDF-4 file.")
@click.option(
    "--digest",
    metavar="OUT",
    type=click.Path(path_type=Path),
    help="A small study directory: histories every tenth step, signals of four seeds, all else whole.",
)
@click.option(
    "--alarms",
    is_flag=True,
    help="The digest is for `exmy alarms`: of signals the loudest, of all seeds, and the onset.",
)
@click.option("--force", is_flag=True, help="Replace what is there.")
def export(
    directory: Path, zarr: Path | None, netcdf: Path | None, digest: Path | None, *, alarms: bool, force: bool
) -> None:
    """Write a study as one Zarr store or netCDF file, in bounded memory; xarray.open_datatree(OUT, engine="zarr") opens it.

    A digest is a directory of a few megabytes, to be kept in a repository; every command that opens a study opens it.

    \b
    Example: exmy export runs/mine --zarr mine.zarr
    Example: exmy export runs/mine --netcdf mine.nc
    Example: exmy export runs/mine --digest results/mine
    Example: exmy export runs/mine --digest results/mine --alarms
    """  # noqa: D301
    if zarr is None and netcdf is None and digest is None:
        raise click.UsageError("name what to write: --zarr OUT, --netcdf OUT.nc, --digest OUT")
    if alarms and digest is None:
        raise click.UsageError("--alarms says what a digest keeps, and none is written: name it with --digest OUT")
    from exmy.export import export_study
    from train import StudyError

    try:
        written = export_study(directory, zarr, netcdf, digest, alarms=alarms, force=force)
    except StudyError as error:
        raise Refused(str(error)) from None
    for path in written:
        click.echo(path)


@click.command()
@study_directories("DIR [DIR]")
@click.option(
    "--out",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="Where to write; DIR/report by default, DIR/report/against-OTHER for two.",
)
@click.option(
    "--format",
    "formats",
    metavar="LIST",
    default="",
    help="Figures for papers as well: pdf, png, svg, or several, as pdf,png.",
)
def report(directories: tuple[Path, ...], out: Path | None, formats: str) -> None:
    """Write a study up as one HTML page that needs no network and no other file, and its figure as a PNG beside it.

    Two studies stand side by side. Also while a study is under way: the page shows the runs that are finished. --format adds
    FOLDER/figures: single-column figures without titles, a file each.

    \b
    Example: exmy report runs/first-look-cpu
    Example: exmy report runs/mine --format pdf,png
    Example: exmy report runs/before runs/after
    """  # noqa: D301
    check_packages()
    from exmy.report import run_report
    from train import StudyError

    try:
        written = run_report(directories, out, tuple(filter(None, formats.split(","))))
    except StudyError as error:
        raise Refused(str(error)) from None
    for path in written:
        click.echo(path)


@click.command("landscape")
@study_directory
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
@device_option
def landscape_command(
    directory: Path, measures: tuple[str, ...], runs: tuple[str, ...], quantisers: Any, epsilons: tuple[float, ...],
    device: str,
) -> None:  # fmt: skip
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


@click.command("compare")
@study_directory
@click.option("--baseline", metavar="RECIPE", help="What the others are held against; the study's own by default.")
@click.option("--page", metavar="FILE.md", type=FileToWrite(), help="Write it up in Markdown.")
@click.option("--figure", metavar="FILE.png", type=FileToWrite(), help="Draw the differences.")
@click.option("--json", "json_file", metavar="FILE.json", type=FileToWrite(), help="Every number, for machines.")
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


COMMANDS = (merge, status, export, report, landscape_command, compare_recipes)
