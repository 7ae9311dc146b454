"""How a command ends that was not to end so: by a wrong command line, by Ctrl-C, or by a file that can't be read or written.

Commands that keep what is finished say so themselves at Ctrl-C; this is for all others, whose files are written whole or not at
all.
"""

from __future__ import annotations

import difflib
import errno
import shlex
import sys
from typing import Any

import click

from exmy.refused import INTERRUPTED, Refused


class Commands(click.Group):
    """A group of commands each of which ends with one line: no traceback for Ctrl-C or a file, no usage before what is wrong."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> Any:
        """As click does it; what is wrong before a command's name is a line, too."""
        try:
            return super().make_context(info_name, args, parent, **extra)
        except click.UsageError as error:
            raise _in_a_line(error) from None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """The command of that name, or a line with the one that is meant, probably."""
        if (self.get_command(ctx, args[0])) is None and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1) or self.list_commands(ctx)
            meant = f"did you mean {near[0]!r}?" if len(near) == 1 else f"there are {', '.join(near)}"
            raise Refused(f"{_words(ctx)} has no command {args[0]!r}; {meant}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """As click does it, with those endings: status 2 for a line, 130 for Ctrl-C with a line on how to start again."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            again = shlex.join(["exmy", *sys.argv[1:]])  # quoted, so that it may be pasted
            click.echo(f"\nexmy: stopped; no file is left half written. To start again: {again}", err=True)
            sys.exit(INTERRUPTED)
        except click.UsageError as error:
            raise _in_a_line(error, ctx) from None
        except OSError as error:
            if error.filename is None or error.errno in (None, errno.EPIPE):
                raise
            raise Refused(f"{error.filename}: {error.strerror}; mend that, or name another place") from error


def _in_a_line(error: click.UsageError, group: click.Context | None = None) -> click.ClickException:
    """What was wrong and where to look; a group without a command shows its help, as it is.

    group: whose command was called; of an option without its argument, click doesn't say to which command it belongs.
    """
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        return error
    if isinstance(error, click.NoSuchOption) and error.ctx is not None:
        error = _with_options(error, error.ctx)
    called = group.invoked_subcommand if group is not None and error.ctx is None else None
    where = _words(error.ctx or group) + (f" {called}" if called else "")
    return Refused(f"{' '.join(error.format_message().split()).rstrip('.')}; {where} --help has examples")


def _with_options(error: click.NoSuchOption, ctx: click.Context) -> click.NoSuchOption:
    """Names the option that is meant, probably, compared without its dashes; else all that the command has."""
    names = [name for parameter in ctx.command.get_params(ctx) for name in parameter.opts if name.startswith("--")]
    by_word = {name.lstrip("-"): name for name in names}
    near = [by_word[word] for word in difflib.get_close_matches(error.option_name.lstrip("-"), by_word, n=1)]
    message = None if near else f"No such option {error.option_name!r}; there are {', '.join(names)}"
    return click.NoSuchOption(error.option_name, message, near, ctx)


def _words(ctx: click.Context | None) -> str:
    """The command as one types it, however it was started."""
    names = []
    above = ctx
    while above is not None and above.parent is not None:
        names.append(above.info_name or "")
        above = above.parent
    return " ".join(["exmy", *reversed(names)])
