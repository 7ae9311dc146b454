"""A line for work of unknown length: on a terminal once it has lasted, and nowhere else."""

from __future__ import annotations

import io
import threading

import pytest
from rich.console import Console

from exmy.busy import busy


class Seen(io.StringIO):
    """What is written, and an event once a word is."""

    def __init__(self) -> None:
        super().__init__()
        self.shown = threading.Event()

    def write(self, text: str) -> int:
        if "judging" in text:
            self.shown.set()
        return super().write(text)


def test_work_that_lasts_is_shown_with_how_much_is_done_and_leaves_nothing() -> None:
    seen = Seen()
    with busy("judging", 3, Console(file=seen, force_terminal=True, width=60), patience=0) as say:
        say(1, 3)
        assert seen.shown.wait(20)
    assert "1/3" in seen.getvalue()
    assert seen.getvalue().endswith("\x1b[2K")  # the line is wiped


@pytest.mark.parametrize(("terminal", "patience"), [(False, 0.0), (True, 1e6)])
def test_nothing_is_written_without_a_terminal_and_for_what_is_quick(terminal: bool, patience: float) -> None:
    seen = Seen()
    with busy("judging", console=Console(file=seen, force_terminal=terminal), patience=patience) as say:
        say(1, 2)
    assert seen.getvalue() == ""


def test_an_error_passes_through() -> None:
    with (
        pytest.raises(ValueError, match="no such recipe"),
        busy("judging", console=Console(file=Seen(), force_terminal=True), patience=1e6),
    ):
        raise ValueError("no such recipe")
