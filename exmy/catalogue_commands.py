"""Commands that look things up: `exmy data`, `exmy recipes` and `exmy formats`. Heavy imports wait inside, as in `cli`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from exmy import completing
from exmy.endings import Commands
from exmy.places import FileToWrite
from exmy.refused import Refused

if TYPE_CHECKING:
    from formats.names import Kind


@click.group(cls=Commands)
def data() -> None:
    """Texts to train on: which there are, and fetch them.

    \b
    Example: exmy data list
    """  # noqa: D301


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
@click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=completing.texts)
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


@click.group(cls=Commands)
def recipes() -> None:
    """Look training recipes up: what is rounded, where, and after whom.

    \b
    Example: exmy recipes show mxfp8
    """  # noqa: D301


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
@click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=completing.recipes_and_formats)
@click.option(
    "--study",
    metavar="STUDY.toml",
    type=click.Path(path_type=Path),
    shell_complete=completing.study_files,
    help="A study whose [recipes] count too.",
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


@click.group(cls=Commands)
def formats() -> None:
    """Look number formats up.

    \b
    Example: exmy formats show e4m3fn
    """  # noqa: D301


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
@click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=completing.formats)
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
@click.argument("a", metavar="A", shell_complete=completing.formats)
@click.argument("b", metavar="B", shell_complete=completing.formats)
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
@click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=completing.formats)
@click.option(
    "--out", metavar="FILE", type=FileToWrite(), default=Path("formats.png"), show_default=True,
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


COMMANDS = (data, recipes, formats)
