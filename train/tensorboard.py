"""A study in TensorBoard: an event file for each run, in DIR/tensorboard/<recipe, rate, seed, ...>/, written when its pack ends.

A run's file has a fixed name and is written whole, so that a sweep that was killed and goes on leaves no run twice or half there.
"""

from __future__ import annotations

import importlib.util
import io
import time
from pathlib import Path

from train.curves import Curves
from train.durable import atomically
from train.study import StudyError

FOLDER = "tensorboard"
EXTRA = "--tensorboard needs TensorBoard, which is not installed: pip install 'exmy[tensorboard]'"


class EventFiles:
    """Writes runs as TensorBoard's event files; StudyError where TensorBoard is missing."""

    def __init__(self, directory: Path) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise StudyError(EXTRA)
        self.folder = directory / FOLDER

    def write(self, curves: Curves) -> None:
        """The run's one file, in place of one that is there; OSError where it can't be written."""
        folder = self.folder / curves.name
        folder.mkdir(parents=True, exist_ok=True)
        with atomically(folder / f"events.out.tfevents.0.{curves.identity}") as aside:
            aside.write_bytes(events(curves))

    def close(self) -> None:
        """Nothing is open."""


def events(curves: Curves) -> bytes:
    """An event file's content: an event a step, with a scalar of each curve that has a point there, and one of verdicts."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    now, file = time.time(), io.BytesIO()
    records = RecordWriter(file)
    records.write(Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
    rows = curves.by_step()
    last = max(rows, default=0)
    verdicts = {f"summary/{name}": float(value) for name, value in curves.summary.items()}
    for step, values in [*rows.items(), (last, verdicts)]:
        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        records.write(Event(wall_time=now, step=step, summary=Summary(value=scalars)).SerializeToString())
    return file.getvalue()
