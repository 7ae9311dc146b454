"""What is run, what is recorded and what is replayed, on a stand-in for CUDA's graphs."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from train.capture import Recorded


class Graph:
    """Work that is called while a graph records is noted, not done; a replay does it."""

    recording: Graph | None = None

    def __init__(self) -> None:
        self.work: list[Counter] = []
        self.shared: object = None

    def pool(self) -> object:
        return self

    def replay(self) -> None:
        for work in self.work:
            work.done += 1
            work.how.append("replayed")

    @staticmethod
    @contextlib.contextmanager
    def record(graph: Graph, pool: object = None) -> Iterator[None]:
        graph.shared = pool
        Graph.recording = graph
        try:
            yield
        finally:
            Graph.recording = None


class Counter:
    def __init__(self) -> None:
        self.done, self.how = 0, list[str]()

    def __call__(self) -> None:
        if Graph.recording is not None:
            Graph.recording.work.append(self)
            self.how.append("recorded")
        else:
            self.done += 1
            self.how.append("run")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Graph.record)


@pytest.mark.usefixtures("graphs")
def test_work_is_run_then_recorded_once_then_replayed_and_done_once_a_call() -> None:
    work, recorded = Counter(), Recorded(True)
    for calls in range(1, 5):
        recorded(work)
        assert work.done == calls
    assert work.how == ["run", "recorded", "replayed", "replayed", "replayed"]


@pytest.mark.usefixtures("graphs")
def test_where_there_is_nothing_to_record_on_work_is_run_every_time() -> None:
    work, recorded = Counter(), Recorded(False)
    for _ in range(4):
        recorded(work)
    assert work.how == ["run"] * 4


@pytest.mark.usefixtures("graphs")
def test_a_graph_shares_the_memory_of_the_one_beside_it_once_that_is_recorded() -> None:
    step = Recorded(True)
    early, late = Recorded(True, step), Recorded(True, step)
    for recorded in (early, early, step, step, late, late):
        recorded(Counter())
    assert [shared(early), shared(step)] == [None, None]
    assert shared(late) is step._graph is not None


def shared(recorded: Recorded) -> object:
    graph: Any = recorded._graph
    return graph.shared


@pytest.mark.usefixtures("graphs")
def test_python_collects_nothing_while_code_is_compiled_and_as_before_after_it() -> None:
    collects: list[bool] = []
    recorded = Recorded(True)
    for _ in range(2):
        recorded(lambda: collects.append(gc.isenabled()))
    assert collects == [False, True]
    assert gc.isenabled()

    def fails() -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        Recorded(True)(fails)
    assert gc.isenabled()
