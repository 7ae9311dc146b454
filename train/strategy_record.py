"""strategy.json of a study directory, read without what trains: `exmy status` waits for no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

STRATEGY_FILE = "strategy.json"
SCHEMA = 1


def read_strategy(directory: Path) -> dict[str, Any] | None:
    """strategy.json of a study directory; None where there is none that can be read."""
    try:
        content = json.loads((directory / STRATEGY_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content.get("schema") == SCHEMA else None
