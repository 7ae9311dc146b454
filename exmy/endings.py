"""How a command ends that was not to end so: by Ctrl-C, or by a file that can't be read or written and that it said nothing of.

Commands that keep what is finished say so themselves; this is for all others, whose files are written whole or not at all.
"""

from __future__ import annotations

import errno
import shlex
import sys
from typing import Any

import click

from exmy.refused import INTERRUPTED, Refused


class Commands(click.Group):
    """A group of commands none of which ends in a traceback for Ctrl-C or for a file."""

    def invoke(self, ctx: click.Context) -> Any:
        """As click does it. Ctrl-C: a line on how to start again, and 130; an OSError that names a file: a line, and 2."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            again = shlex.join(["exmy", *sys.argv[1:]])  # quoted, so that it may be pasted
            click.echo(f"\nexmy: stopped; no file is left half written. To start again: {again}", err=True)
            sys.exit(INTERRUPTED)
        except OSError as error:
            if error.filename is None or error.errno in (None, errno.EPIPE):
                raise
            raise Refused(f"{error.filename}: {error.strerror}; mend that, or name another place") from error
