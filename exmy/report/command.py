"""`exmy report`: the page of one study or two, and the figures for papers that were asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from exmy.busy import busy
from exmy.report.page import SIDE_BY_SIDE, cannot_write, opened, write_page
from exmy.report.paper import SUFFIXES, paper_figures
from train import StudyError

FIGURES = "figures"


def run_report(directories: Sequence[Path], out: Path | None, formats: Sequence[str]) -> list[Path]:
    """Write the page, and figures in each of `formats`; the paths written. StudyError for what can't be read or written.

    out: a folder; None for the first study's own, apart for two studies.
    """
    if len(directories) > SIDE_BY_SIDE:
        raise StudyError(
            f"a page has room for {SIDE_BY_SIDE} studies side by side, got {len(directories)}: name one or two"
        )
    unknown = [suffix for suffix in formats if suffix not in SUFFIXES]
    if unknown:
        raise StudyError(f"--format takes {', '.join(SUFFIXES)}, or several joined by commas, got {unknown[0]!r}")
    first, *others = directories
    if any(other.resolve() == first.resolve() for other in others):
        raise StudyError(f"{first} is named twice: name it once, or another study to stand beside it")
    folder = out or first / "report"
    if out is None and others:
        folder /= f"against-{others[0].resolve().name}"
    with busy("reading runs"):
        shown = [opened(directory) for directory in directories]
    with busy("writing the page"):
        written = write_page(directories, shown, folder)
    if not formats:
        return written
    with busy("drawing figures"):
        for number, (directory, (study, tree)) in enumerate(zip(directories, shown, strict=True), 1):
            own = folder / FIGURES / (f"{number}-{directory.resolve().name}" if others else "")
            try:
                written += paper_figures(study, tree, own, formats) if tree is not None else []
            except OSError as error:
                raise cannot_write(own, error) from None
    return written
