"""Commands about this machine: `exmy doctor`, `exmy bench` and `exmy completion`. Heavy imports wait inside, as in `cli`."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import click

from exmy.places import FileToWrite
from exmy.refused import Refused

COLOURS = {"ok": "green", "note": "yellow", "broken": "red"}


@click.command()
@click.option(
    "--runs", metavar="DIR", type=click.Path(path_type=Path), default=Path("runs"), show_default=True,
    help="Where studies are to be kept.",
)  # fmt: skip
@click.option("--json", "json_file", metavar="FILE.json", type=FileToWrite(), help="All of it, for machines.")
def doctor(runs: Path, json_file: Path | None) -> None:
    """Is all that exmy needs here, and does it work? Versions, devices, compiling, FP8, the same bits twice, memory, disk, texts.

    Each device computes a little, half a minute where nothing was compiled before. Exit status 0: exmy works here, if not at its
    fastest; 1: something that it needs is broken.

    \b
    Example: exmy doctor
    Example: exmy doctor --runs /data/runs --json doctor.json
    """  # noqa: D301
    from exmy.doctor import as_json, examine, is_broken
    from train.durable import atomically

    findings, under_way = [], examine(runs)
    while True:
        with _sign_of_life():
            found = next(under_way, None)
        if found is None:
            break
        findings.append(found)  # and a line as soon as it is known
        click.echo(f"{click.style(f'{found.state:6}', COLOURS[found.state])}  {found.name}: {found.text}")
    if json_file is not None:
        try:
            with atomically(json_file) as aside:
                aside.write_text(as_json(findings), encoding="utf-8")
        except OSError as error:
            raise Refused(f"{json_file}: can't be written ({error.strerror}); name another place") from None
    sys.exit(1 if is_broken(findings) else 0)


def _sign_of_life() -> contextlib.AbstractContextManager[object]:
    """`busy`, where what that needs can be loaded: what is broken is for the findings to say."""
    try:
        from exmy.busy import busy

        return busy("examining")
    except Exception:
        return contextlib.nullcontext()


PARTS = ("elements", "blocks", "sharpness", "packs")  # as in `exmy.bench`, which takes seconds to import


@click.command()
@click.argument("parts", nargs=-1, metavar="[PART]...", type=click.Choice(PARTS))
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option(
    "--rounds", metavar="N", type=click.IntRange(min=6), default=20, show_default=True,
    help="Rounds, in each of which all that is compared is timed once.",
)  # fmt: skip
@click.option(
    "--json", "json_file", metavar="FILE.json", type=FileToWrite(), help="All of it, with versions and device."
)
def bench(parts: tuple[str, ...], device: str, rounds: int, json_file: Path | None) -> None:
    """How fast is this machine at what exmy does? With what other libraries take for the same work.

    \b
    elements   numbers rounded to a format and back, beside torch's own casts, ml_dtypes and a copy
    blocks     the same with scales (MX, NVFP4), beside a copy
    sharpness  exact logit sharpness, beside the numerical search by L-BFGS-B
    packs      steps of training many small GPTs at once, beside one after another

    All of them, or the PARTs named; a few minutes on two cores. Medians with 95 % intervals, of rounds in turns. Leave the
    machine to it: what else runs is in the numbers. Exit status 1: a peer gives other values than exmy.

    \b
    Example: exmy bench
    Example: exmy bench elements blocks --device cuda --json bench.json
    """  # noqa: D301
    from exmy.bench_table import as_json, bench_table, measure
    from exmy.console import output
    from exmy.outputs import write_text
    from train.study import StudyError

    try:
        rows = measure(parts, device, rounds)
        output().print(bench_table(rows, device, rounds))
        write_text(json_file, lambda: as_json(rows, device, rounds))
    except StudyError as error:
        raise Refused(str(error)) from None
    sys.exit(1 if any(row.wrong for row in rows) else 0)


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what makes a shell complete exmy's commands, options, studies, and names of formats, recipes and texts.

    \b
    bash: eval "$(exmy completion bash)" in ~/.bashrc
    zsh:  eval "$(exmy completion zsh)" in ~/.zshrc, after compinit
    fish: exmy completion fish > ~/.config/fish/completions/exmy.fish

    \b
    Example: exmy completion bash
    """  # noqa: D301
    from click.shell_completion import get_completion_class

    from exmy.cli import main

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(main, {}, "exmy", "_EXMY_COMPLETE").source())


COMMANDS = (doctor, bench, completion)
