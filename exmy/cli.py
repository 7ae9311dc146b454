"""The command line. Commands are in modules by subject; heavy imports wait inside them, so that --help is quick.

Exit status 0: done, and what was asked holds. 1: done, and it does not hold. 2: bad input, or the work could not go
on, with one line that says what and how to mend it. 130, 143: ended by SIGINT, SIGTERM. Diverged runs are results, not errors.
"""

from __future__ import annotations

import logging
import os

import click

from exmy import (
    catalogue_commands,
    machine_commands,
    stability_commands,
    study_commands,
    sweep_commands,
    verify_commands,
)
from exmy.endings import Commands
from exmy.version import __version__


class _Echo(logging.Handler):
    """Log lines by way of click, which finds the standard error of the moment: above the progress bar while there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """One line."""
        click.echo(self.format(record), err=True)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="exmy")
def main() -> None:
    """Is this number format safe to train a language model in? Ask, with evidence.

    \b
    Example: exmy sweep --dry-run
    Example: exmy formats show e4m3fn
    """  # noqa: D301
    # Before torch is loaded. Its CPU threads wait for each other by spinning; where something else wants a core, that costs
    # 3 to 10 times the step (measured on two cores), and sleeping soon costs a quarter where nothing does.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[_Echo()])
    for noisy in ("torch", "matplotlib", "h5py", "fontTools"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("matplotlib.font_manager").setLevel(
        logging.ERROR
    )  # of a cache of fonts that is older than matplotlib
    logging.captureWarnings(capture=True)


for _of_subject in (
    sweep_commands, study_commands, catalogue_commands, verify_commands, stability_commands, machine_commands,
):  # fmt: skip
    for _command in _of_subject.COMMANDS:
        main.add_command(_command)
