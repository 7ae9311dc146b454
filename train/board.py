"""What Ray's workers say of their packs, and the signal that ends them: a small actor between them and the sweep's own process.

It knows nothing of packs, and imports nothing: its process is there in a second, where one that imports PyTorch takes several.
"""

from __future__ import annotations

Line = tuple[str, int, str]  # a logger, a level and what it said


class Board:
    """The latest that was said of each pack, until it is taken."""

    def __init__(self) -> None:
        self._said: dict[str, bytes | None] = {}
        self._lines: list[Line] = []
        self._number: int | None = None

    def say(self, pack: str, progress: bytes | None, lines: list[Line]) -> int | None:
        """A worker's word on its pack, None where there is nothing new; gives the signal's number, if one came."""
        if progress is not None or pack not in self._said:
            self._said[pack] = progress
        self._lines += lines
        return self._number

    def take(self) -> tuple[dict[str, bytes | None], list[Line]]:
        """What was said since the last time."""
        said, lines = self._said, self._lines
        self._said, self._lines = {}, []
        return said, lines

    def end(self, number: int) -> None:
        """Every worker ends its step, keeps a checkpoint and leaves."""
        self._number = number
