"""A bar is for those who wait: on a terminal, and after two seconds."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from train import waiting
from train.waiting import Waiting


@pytest.mark.parametrize(("terminal", "seconds", "shown"), [(True, 3.0, True), (True, 1.0, False), (False, 3.0, False)])
def test_a_bar_is_shown_on_a_terminal_after_two_seconds(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, seconds: float, shown: bool
) -> None:
    clock = [0.0]
    monkeypatch.setattr(waiting, "monotonic", lambda: clock[0])
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=80)
    with Waiting("encoding", 100, console) as bar:
        bar.advance(10)
        clock[0] = seconds
        bar.advance(10)
        bar.advance(10)
    assert ("encoding" in output.getvalue()) is shown
    assert bool(output.getvalue()) is shown
