"""Commands about this machine: `exmy doctor` and `exmy completion`. Heavy imports wait inside, as in `cli`."""

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


COMMANDS = (doctor, completion)
