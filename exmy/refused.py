"""How a command says that it can't: one line on standard error, and exit status 2."""

from __future__ import annotations

from typing import IO, Any

import click

INTERRUPTED = 130  # exit status, by SIGINT


class Refused(click.ClickException):
    """One line on what is wrong and how to mend it; exit status 2."""

    exit_code = 2

    def show(self, file: IO[Any] | None = None) -> None:
        """To standard error, without a traceback."""
        click.echo(f"exmy: {self.message}", file=file, err=True)
