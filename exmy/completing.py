"""What a shell offers when Tab is pressed: studies that are there, and names of formats, recipes and texts.

Nothing here loads torch; a shell waits for it. A place that can't be read offers nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import click
from click.shell_completion import CompletionItem

DEEPEST = 3  # folders below what is typed: runs/group/mine/
MOST = 200  # entries that are looked at; a folder of thousands must not hold up a shell

Offers = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def _named(
    names: Callable[[], Iterable[str]], few: Callable[[], Iterable[str]] | None = None, *, or_file: bool = False
) -> Offers:
    """Names that begin as what is typed; the few that are well known while nothing is. or_file: else paths, where none does."""

    def offers(context: click.Context, parameter: click.Parameter, typed: str) -> list[CompletionItem]:  # noqa: ARG001
        known = (few or names)() if not typed else names()
        found = [CompletionItem(name) for name in dict.fromkeys(known) if name.startswith(typed)]
        return found or ([CompletionItem(typed, type="file")] if or_file else [])

    return offers


def _formats() -> Iterator[str]:
    from formats import list_formats

    yield from _well_known()
    yield from list_formats()


def _well_known() -> Iterable[str]:
    from formats.names import well_known

    return well_known()


def _recipes() -> Iterator[str]:
    from train.named_recipes import NAMED

    yield from NAMED
    yield from (f"native-{name}" for name in ("bf16", "fp16", "tf32", "fp32", "fp64"))


def _recipes_and_formats() -> Iterator[str]:
    yield from _recipes()
    yield from _formats()


def _texts() -> Iterable[str]:
    from train.text import KNOWN_TEXTS

    return KNOWN_TEXTS


def study_directories(context: click.Context, parameter: click.Parameter, typed: str) -> list[CompletionItem]:  # noqa: ARG001
    """Folders with a study in them, from what is typed three levels down; any folder where there are none."""
    found = [str(folder) for folder in _folders(typed, DEEPEST) if (folder / "study.toml").is_file()]
    return [CompletionItem(name) for name in found] or [CompletionItem(typed, type="dir")]


def study_files(context: click.Context, parameter: click.Parameter, typed: str) -> list[CompletionItem]:  # noqa: ARG001
    """Files that end in .toml and have an [axes] table, here and one folder down; any file where there are none."""
    above = Path(typed if typed.endswith(os.sep) else Path(typed).parent)
    folders = [above, *_folders(typed, 1)]
    files = [path for folder in folders for path in _entries(folder) if path.suffix == ".toml" and _has_axes(path)]
    named = [str(path) for path in files if str(path).startswith(typed.removeprefix("./"))]
    return [CompletionItem(name) for name in dict.fromkeys(named)] or [CompletionItem(typed, type="file")]


def _folders(typed: str, deepest: int) -> Iterator[Path]:
    """Folders whose path begins as what is typed, and theirs; hidden ones left out."""
    path = Path(typed)
    above, start = (path, "") if not typed or typed.endswith(os.sep) else (path.parent, path.name)
    level = [folder for folder in _entries(above) if folder.is_dir() and folder.name.startswith(start)]
    for _ in range(deepest):
        yield from level
        level = [inner for folder in level for inner in _entries(folder) if inner.is_dir()]


def _entries(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for _, entry in zip(range(MOST), entries, strict=False) if entry.name[0] != ".")
    except OSError:
        return []
    return [folder / name for name in names]


def _has_axes(path: Path) -> bool:
    try:
        return "[axes]" in path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


formats = _named(_formats, _well_known)
recipes = _named(_recipes)
recipes_and_formats = _named(_recipes_and_formats, _recipes)
texts = _named(_texts, or_file=True)
