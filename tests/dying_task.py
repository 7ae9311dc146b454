"""Ray's task with a worker that dies, once, in the middle of its pack (see `faulty_worker`)."""

from __future__ import annotations

from typing import Any

from tests.faulty_worker import train_and_die
from train import on_ray, one_pack


def train_there(*arguments: Any) -> Any:
    """`on_ray.train_there`, in a process of Ray's."""
    vars(one_pack)["train_pack"] = train_and_die
    return on_ray.train_there(*arguments)
