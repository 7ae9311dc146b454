"""`exmy`, and `python -m exmy`: the command line, from its first import to its exit status."""

from __future__ import annotations

import os
import sys
import threading


def run() -> None:
    """Do what the command line says. A Ctrl-C that comes before there is a command ends like one that comes after: with 130."""
    try:
        from exmy.cli import main

        main()
    except KeyboardInterrupt:
        status: int | str | None = 130
    except SystemExit as end:
        status = end.code
    else:
        status = 0
    if any(thread.name == "exmy-call" for thread in threading.enumerate()):
        # A judged function that never came back: Python would end its thread from within, and C++ the process with an abort.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else int(status is not None))
    sys.exit(status)


if __name__ == "__main__":
    run()
