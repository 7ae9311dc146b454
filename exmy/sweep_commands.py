"""Commands that train: `exmy sweep` and `exmy resume`. Heavy imports wait inside, as in `cli`."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from exmy import completing
from exmy.needed import check_packages
from exmy.places import study_directory
from exmy.refused import Refused
from train.early import early_workers

device_option = click.option(
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


@click.command()
@click.argument(
    "study_file", metavar="[STUDY.toml]", required=False, type=click.Path(path_type=Path), shell_complete=completing.study_files,
)  # fmt: skip
@click.option(
    "--out",
    metavar="DIR",
    callback=_place,
    help="Study directory; runs/NAME by default. With --executor ray, a URL too.",
)
@click.option(
    "--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Change the study: training.steps=500, seed=4, ..."
)
@device_option
@_site
@_wide
@click.option(
    "--strategy",
    type=click.Choice(["grid", "bisect", "seeds"]),
    help="Which runs: all of the file (grid); the largest stable learning rate of each recipe (bisect); seeds in planned looks.",
)
@click.option(
    "--alarm", "alarms", metavar="NAME[=VALUE]", multiple=True,
    help="Report a run whose signal is above VALUE; NAME<VALUE: below. Without VALUE, or with best as NAME, as healthy runs of "
    "the study warning have it; how seldom it rang in time there is said.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Show the plan, the memory and the time that it needs; train nothing.")
@_hooked
def sweep(
    study_file: Path | None, out: Path | str | None, overrides: tuple[str, ...], device: str, strategy: str | None,
    alarms: tuple[str, ...], *, dry_run: bool, **how: Any,
) -> None:  # fmt: skip
    """Train every run of a study, and say which diverged.

    Without STUDY.toml: a first look, a few minutes long, chosen for this machine. Started again on the same directory,
    it trains only the runs that are missing, and goes on in the middle of those that were under way.

    \b
    Example: exmy sweep mine.toml --out runs/mine --set seed=16
    Example: exmy sweep mine.toml --dry-run
    Example: exmy sweep mine.toml --executor ray --ray-address auto --out s3://bucket/mine
    Example: exmy sweep mine.toml --strategy bisect
    Example: exmy sweep mine.toml --alarm kurtosis=12 --alarm "update_rms<0.2"
    Example: torchrun --nproc-per-node 2 -m exmy sweep mine.toml --wide ddp
    """  # noqa: D301
    check_packages()
    count = how["workers"] or 1
    early = 1 < count <= (os.cpu_count() or 1) and how["executor"] == "local" and not (dry_run or how["wide"])
    with early_workers(count, device) if early else contextlib.nullcontext():
        _sweep(study_file, out, overrides, device, strategy, alarms, dry_run=dry_run, **how)


def _sweep(
    study_file: Path | None, out: Path | str | None, overrides: tuple[str, ...], device: str, strategy: str | None,
    alarms: tuple[str, ...], *, dry_run: bool, **how: Any,
) -> None:  # fmt: skip
    """`sweep`, once workers import what this process does too."""
    from train.collection import no_collection

    with no_collection():  # what is imported stays
        from exmy.sweep import default_study, dry_run_view, run_sweep, shared_way
        from train import read_study
        from train.ranks import leads

    with _sweeping(alike=True):
        options = {"--strategy": f'strategy.kind="{strategy}"'} if strategy else {}
        if alarms:
            from exmy.alarm_options import thresholds

            options["--alarm"] = f"alarms.thresholds={json.dumps(thresholds(alarms))}"
        study = read_study(study_file or default_study(device), overrides, options)
        place = out or Path("runs") / study.name
        if dry_run:
            if leads():  # what every rank would say is said once
                dry_run_view(study, place, device, how["workers"])
            return
        shared_way(place, how["wide"], how)
    with _sweeping():
        run_sweep(study, place, device, **how)


@click.command()
@study_directory
@device_option
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
    check_packages()
    from exmy.sweep import run_sweep, shared_way
    from train.store import study_of

    with _sweeping(alike=True):
        study = study_of(directory)
        shared_way(directory, how["wide"], how)
    with _sweeping():
        run_sweep(study, directory, device, check=True, **how)


@contextlib.contextmanager
def _sweeping(*, alike: bool = False) -> Iterator[None]:
    """A sweep that is refused says why in one line, one that a signal ended how to go on.

    alike: every rank of a torchrun is refused the same, and one says it.
    """
    from train import StudyError
    from train.interruption import KEPT, Interrupted
    from train.ranks import speaks

    try:
        yield
    except StudyError as error:
        if alike and not speaks():
            sys.exit(Refused.exit_code)
        raise Refused(str(error)) from None
    except KeyboardInterrupt as stop:
        again = shlex.join(["exmy", *sys.argv[1:]])  # quoted, so that it may be pasted
        click.echo(f"\nexmy: stopped; {str(stop) or KEPT}. To go on: {again}", err=True)
        sys.exit(128 + (stop.number if isinstance(stop, Interrupted) else signal.SIGINT))


COMMANDS = (sweep, resume)
