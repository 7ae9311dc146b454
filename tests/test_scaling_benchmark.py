"""The benchmark of one worker against more: which GPUs each sweep has, and what is told of them; the sweeps are made up."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks import scaling
from benchmarks.sweep_sizes import SIZES
from train.compiling import CACHE_VARIABLE


def test_sweeps_side_by_side_share_no_gpu() -> None:
    assert scaling.apart((1, 2), ["0", "1", "2", "3"]) == {1: "0", 2: "1,2"}
    assert scaling.apart((2, 1), ["5", "GPU-1", "7"]) == {2: "5,GPU-1", 1: "7"}
    assert scaling.apart((1, 2), []) == {1: None, 2: None}
    with pytest.raises(ValueError, match="need 3 GPUs, and there are 2"):
        scaling.apart((1, 2), ["0", "1"])


@pytest.mark.parametrize("side_by_side", [False, True])
def test_one_call_gives_the_ratio(side_by_side: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One worker takes 100 s, two 60 s; side by side they meet, one after the other they could not."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "code"))
    (tmp_path / "code" / "fxgraph" / "ab" / "abc").mkdir(parents=True)
    asked: list[tuple[Any, ...]] = []
    meeting = threading.Barrier(2)

    def fill(*of: Any) -> Mapping[str, Any]:
        asked.append(of)
        return {"passes": 40.0}

    def sweep(study: Path, directory: Path, workers: int, gpus: str | None) -> dict[str, Any]:
        if side_by_side:
            meeting.wait(10)
        assert f"steps = {size.scaling_steps}" in study.read_text(encoding="utf-8")
        assert directory != study.parent
        assert gpus is None
        if workers == 2:
            (Path(os.environ[CACHE_VARIABLE]) / "fxgraph" / "ab" / "missed").mkdir()
        return {"command_seconds": 140.0 - 40 * workers, "packs_seconds": 130.0 - 30 * workers}

    monkeypatch.setattr(scaling, "CUDA", False)
    monkeypatch.setattr(scaling, "sweep", sweep)
    size = dataclasses.replace(
        SIZES["small"], programs=("e4m3fn",), workers=(1, 2), side_by_side=side_by_side, scaling_steps=77
    )
    told = scaling.scaling(size, tmp_path, fill)
    assert asked == [("compile", "2x32", "e4m3fn", "small", 77, 4)]
    assert told["workers"][2]["times_one_worker"] == {"command": 100 / 60, "packs": 100 / 70}
    assert told["in_the_cache"] == {"code": 1, "graphs": 0}
    assert told["made_anew"] == {"code": 1, "graphs": 0}
