"""Study directories as a command's arguments, and files that it is to write, looked at before it does any work."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from exmy import completing
from exmy.refused import Refused

Command = TypeVar("Command", bound=Callable[..., Any])

# @study_directory: the argument DIR.
study_directory = click.argument(
    "directory", metavar="DIR", type=click.Path(path_type=Path), shell_complete=completing.study_directories
)


def study_directories(metavar: str = "DIR...") -> Callable[[Command], Command]:
    """The argument of one or more."""
    return click.argument(
        "directories", metavar=metavar, nargs=-1, required=True, type=click.Path(path_type=Path),
        shell_complete=completing.study_directories,
    )  # fmt: skip


class FileToWrite(click.Path):
    """A path, refused where its folder is not there or can't be written to, or where it is a folder itself."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(  # what click calls it with
        self,
        value: str | os.PathLike[str],
        param: click.Parameter | None,  # noqa: ARG002
        ctx: click.Context | None,  # noqa: ARG002
    ) -> Path:
        """The path. Refused where no file can be written there; root may write to any folder, and is told by the file system."""
        path = Path(value)
        if path.is_dir():
            raise _refused(path, "Is a directory")
        if not path.absolute().parent.is_dir():
            raise _refused(path, "No such file or directory")
        if not os.access(path.absolute().parent, os.W_OK):
            raise _refused(path, "Permission denied")
        return path


def _refused(path: Path, why: str) -> Refused:
    return Refused(f"{path}: can't be written ({why}); name another place")
